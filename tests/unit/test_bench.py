"""The benchmarks measure what they say: workloads, what must be found in them, verdicts and gates. No timing is
asserted."""

from __future__ import annotations

import ast
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import bench_tree, floor, peers, report, run, tree_worker, workloads
from bench.callgrind import run as callgrind

BENCHES = Path(bench_tree.__file__).parent

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


CHECKS = [
    report.Check("a", 1.0, 1.0, "us"),
    report.Check("b", 1.1, 1.0, "us"),
    report.Check("c", None, 1.0, "us", "not run"),
    report.Check("d", 5.0, None, "us"),
]


def test_verdicts() -> None:
    assert [check.verdict for check in CHECKS] == ["met", "MISSED", "not measured", "no aim"]
    assert all(check.verdict == "not measured" for check in bench_tree.checks({}))


def test_a_missed_aim_is_said_aloud_and_with_check_fails(capsys: pytest.CaptureFixture[str]) -> None:
    report.conclude(CHECKS, must_meet=False)
    said = capsys.readouterr().out.splitlines()
    assert said[-3:] == [
        "MISSED: b: 1.100, aim <= 1.000 us", "NOT MEASURED: c: not run", "1 of 3 aims met, 1 MISSED, 1 not measured",
    ]  # fmt: skip
    assert len([line for line in said if " MISSED" in line or " met" in line]) == 3, "a line an aim, and the sum"
    for wrong in (CHECKS[1], CHECKS[2]):
        with pytest.raises(SystemExit) as ended:
            report.conclude([CHECKS[0], wrong], must_meet=True)
        assert ended.value.code == "--check: 1 of 2 aims are not met"
    report.conclude([CHECKS[0], CHECKS[3]], must_meet=True)


@pytest.mark.parametrize("name", [path.stem for path in sorted(BENCHES.glob("bench_*.py"))])
def test_every_bench_ends_with_its_verdicts(name: str) -> None:
    """All by one rule, so that none can miss an aim in silence."""
    tree = ast.parse((BENCHES / f"{name}.py").read_text())
    called = {ast.unparse(node.func).split(".")[-1] for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert {"conclude", "add_check_option"} <= called


def test_make_bench_ends_with_what_was_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"tree": CHECKS[:1], "index": CHECKS[1:2]}
    monkeypatch.setattr(run, "run_part", lambda part, *_: {"checks": report.checks_as_dicts(found[part])})
    plain = ["bench", "--only", "tree,index", "--json", str(tmp_path / "bench.json")]
    for more, fails in (([], False), (["--check"], True)):
        monkeypatch.setattr(sys, "argv", [*plain, *more])
        if fails:
            with pytest.raises(SystemExit, match="--check: 1 of 2 aims are not met"):
                run.main()
        else:
            run.main()
        assert capsys.readouterr().out.splitlines()[-2:] == [
            "MISSED: b: 1.100, aim <= 1.000 us", "1 of 2 aims met, 1 MISSED, 0 not measured",
        ]  # fmt: skip


def test_medians_are_taken_field_by_field() -> None:
    runs = [{"a": x, "b": {"c": -x, "d": None}, "name": "n"} for x in (3, 1, 2)]
    assert bench_tree.medians(runs) == {"a": 2, "b": {"c": -2, "d": None}, "name": "n"}


def counted(instructions: float, valgrind: str = "1") -> dict[str, Any]:
    return {"versions": {"valgrind": valgrind}, "units": {"match": 5}, "counts": {"per_token": instructions}}


def test_instruction_counts_gate_only_where_versions_match() -> None:
    assert callgrind.compare(counted(103.0), counted(100.0)) == []
    assert len(callgrind.compare(counted(103.1), counted(100.0))) == 1
    assert callgrind.compare(counted(200.0, valgrind="2"), counted(100.0)) == []
