"""The benchmarks measure what they say: workloads, what must be found in them, verdicts and gates. No timing is
asserted."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest

from bench import bench_tree, floor, peers, report, tree_worker, workloads
from bench.callgrind import run as callgrind

SMALL = {
    "growing": lambda: workloads.growing(num_users=3, num_turns=4, shared_tokens=40, turn_tokens=21),
    "churn": lambda: workloads.churn(capacity_pages=1_024, passes=2),
}


@pytest.fixture(params=sorted(SMALL))
def small(request: pytest.FixtureRequest) -> workloads.Workload:
    return SMALL[request.param]()


def test_a_page_has_one_identity_exactly_if_its_prefix_is_one(small: workloads.Workload) -> None:
    prefix_of: dict[int, bytes] = {}
    identity_of: dict[bytes, int] = {}
    for tokens, identity in zip(small.tokens, small.page_identity, strict=True):
        assert len(identity) == len(tokens) // small.page_size
        for page, number in enumerate(identity.tolist()):
            prefix = tokens[: (page + 1) * small.page_size].tobytes()
            assert prefix_of.setdefault(number, prefix) == prefix
            assert identity_of.setdefault(prefix, number) == number


def test_layout_says_what_an_unbounded_cache_finds(small: workloads.Workload) -> None:
    seen: set[int] = set()
    place = workloads.layout(small)
    for request, identity in enumerate(small.page_identity):
        hit = 0
        while hit < len(identity) and int(identity[hit]) in seen:
            hit += 1
        segments = slice(place.first_segment[request], place.first_segment[request + 1])
        assert place.hit_pages[request] == hit == place.segment_pages[segments].sum()
        assert place.tail_start[request] == len(seen)
        seen.update(identity.tolist())
    assert place.num_pages == len(seen)


def test_workloads_repeat_by_seed(small: workloads.Workload) -> None:
    again = SMALL[small.name]()
    assert all(np.array_equal(a, b) for a, b in zip(small.tokens, again.tokens, strict=True))


def test_the_trace_has_its_known_counts() -> None:
    try:
        trace = workloads.trace()
    except workloads.WorkloadAbsent as absent:
        pytest.skip(str(absent))
    place = workloads.layout(trace)
    assert sum(map(len, trace.tokens)) == 27_441_774
    assert place.hit_pages.sum() * trace.page_size == trace.known_hit_tokens == 8_070_832
    assert place.num_pages * trace.page_size == 19_356_288


def test_a_missing_trace_says_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("RADIXKV_TRACE", str(tmp_path / "none.jsonl"))
    with pytest.raises(workloads.WorkloadAbsent, match="RADIXKV_TRACE"):
        workloads.trace()


@pytest.mark.skipif(shutil.which("cc") is None, reason="the floor needs a C compiler called cc")
@pytest.mark.parametrize("kind", floor.MEMORY)
def test_the_floor_compares_equal_bytes(kind: str) -> None:
    workload = SMALL["growing"]()
    place = workloads.layout(workload)
    assert len(floor.run(workload, place, kind).match_ns) == len(workload.tokens)
    with pytest.raises(RuntimeError, match="segments differ"):
        floor.run(workload, place._replace(segment_start=place.segment_start + 1), kind)


def test_a_replay_checks_what_the_tree_found(small: workloads.Workload) -> None:
    peer = peers.load("radixkv")
    assert not isinstance(peer, peers.Absent), peer
    result = tree_worker.replay(peer, small)
    place = workloads.layout(small)
    if small.capacity_pages is None:
        assert result["hit_tokens"] == int(place.hit_pages.sum()) * small.page_size
        assert result["cached_tokens"] == place.num_pages * small.page_size
    else:
        assert 0 < result["cached_tokens"] <= small.capacity_pages * small.page_size
        assert result["evict"]["calls"] > 0


def test_an_absent_peer_is_reported_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.TREE_PEERS, "nobody", "no_such_module")
    present, absent = peers.load_all(["nobody"])
    assert not present
    assert "no_such_module" in absent[0].reason


def test_verdicts() -> None:
    assert report.Check("a", 1.0, 1.0, "us").verdict == "pass"
    assert report.Check("a", 1.1, 1.0, "us").verdict == "SHORT"
    assert report.Check("a", None, 1.0, "us", "not run").verdict == "absent"
    assert all(check.verdict == "absent" for check in bench_tree.checks({}))


def test_medians_are_taken_field_by_field() -> None:
    runs = [{"a": x, "b": {"c": -x, "d": None}, "name": "n"} for x in (3, 1, 2)]
    assert bench_tree.medians(runs) == {"a": 2, "b": {"c": -2, "d": None}, "name": "n"}


def counted(instructions: float, valgrind: str = "1") -> dict[str, Any]:
    return {"versions": {"valgrind": valgrind}, "units": {"match": 5}, "counts": {"per_token": instructions}}


def test_instruction_counts_gate_only_where_versions_match() -> None:
    assert callgrind.compare(counted(103.0), counted(100.0)) == []
    assert len(callgrind.compare(counted(103.1), counted(100.0))) == 1
    assert callgrind.compare(counted(200.0, valgrind="2"), counted(100.0)) == []
