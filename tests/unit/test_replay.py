"""replay/: the run through tree, allocators and pools; and that the verifier catches what it is there for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from radixkv.cli import load_tree
from radixkv.errors import IntegrityError, InvalidArgumentError, RadixKVError
from radixkv.pool.host import HostPagePool
from radixkv.replay import replay as replay_module
from radixkv.replay.content import page_bytes, page_seeds
from radixkv.replay.replay import Counters, Replay, ReplayConfig, VerificationError
from radixkv.replay.report import latency_summary, replay_report
from radixkv.trace import TraceRequest, expand_prompt, read_trace, summarize
from radixkv.tree.reference import ReferenceTree
from radixkv.types import POLICIES

from .support import BEST_TREE, TREES, make_replay, real_trace, workload

every_tree = pytest.mark.parametrize("tree", TREES)


def checked_run(replay: Replay, requests: list[TraceRequest]) -> Counters:
    """Run with check_integrity, tree + free = capacity on both tiers, after every request."""
    assert replay.run(requests, progress=lambda _: replay.check_integrity())
    assert not [info for info in replay.tree.dump() if info.lock_ref or info.host_ref]
    return replay.counters


# ---- contents of pages -----------------------------------------------------------------------------------------------
M = 2**64


def slow_mix(x: int) -> int:
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53, 1):
        x = (x ^ x >> 33) * factor % M
    return x


def slow_page(tokens: list[int], page_size: int, page: int, bytes_per_page: int) -> bytes:
    """The documented function, one number at a time."""
    golden, odd = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03
    total = 0
    for q in range(page + 1):
        run = tokens[q * page_size : (q + 1) * page_size]
        digest = sum(slow_mix((token % 2**32 + (i + 1) * golden) % M) for i, token in enumerate(run)) % M
        total = (total + slow_mix((digest + (q + 1) * odd) % M)) % M
    seed = slow_mix((total + page) % M)
    out = b""
    for k in range(-(-bytes_per_page // 8)):
        word = (seed ^ slow_mix((k + 1) * golden % M)) * 0xFF51AFD7ED558CCD % M
        out += (word ^ word >> 32).to_bytes(8, "little")
    return out[:bytes_per_page]


@given(
    st.lists(st.integers(-(2**31), 2**31 - 1), max_size=24),
    st.sampled_from([1, 2, 3, 16]),
    st.sampled_from([1, 5, 8, 40]),
)
def test_contents_are_the_documented_function(tokens: list[int], page_size: int, size: int) -> None:
    found = page_bytes(page_seeds(np.array(tokens, np.int32), page_size), size)
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    assert [row.tobytes() for row in found] == [
        slow_page(tokens, page_size, page, size) for page in range(len(tokens) // page_size)
    ]


@given(st.integers(0, 63), st.integers(1, 2**31), st.sampled_from([1, 4, 7, 16]))
def test_a_token_changes_its_page_and_all_after_it_and_none_before(at: int, change: int, page_size: int) -> None:
    tokens = expand_prompt(TraceRequest(0, 64, 0, (3,)), 64)
    other = tokens.copy()
    other[at] ^= np.int32(change - 1) | np.int32(1)
    before, after = (page_bytes(page_seeds(t, page_size), 8 * page_size) for t in (tokens, other))
    changed = np.arange(64 // page_size) >= at // page_size
    words = (before.view(np.uint64) != after.view(np.uint64)).reshape(-1, page_size)
    assert (words.all(axis=1) == changed).all()  # every word of a changed page
    assert (words.any(axis=1) == changed).all()


def test_order_of_tokens_and_of_pages_matters() -> None:
    tokens = np.arange(32, dtype=np.int32)
    swapped_tokens = tokens.copy()
    swapped_tokens[[0, 1]] = swapped_tokens[[1, 0]]
    swapped_pages = np.concatenate([tokens[16:], tokens[:16]])
    same_twice = np.concatenate([tokens[:16], tokens[:16]])
    seeds = [page_seeds(t, 16).tolist() for t in (tokens, swapped_tokens, swapped_pages, same_twice)]
    assert len({pair[1] for pair in seeds}) == 4
    assert seeds[3][0] != seeds[3][1]


def test_contents_of_many_pages_are_all_different() -> None:
    seeds = np.concatenate([page_seeds(expand_prompt(r, 64), 16) for r in workload(60, "system")])
    rows = page_bytes(np.unique(seeds), 256)
    assert len(rows) > 1000
    words = np.sort(rows.view(np.uint64), axis=0)
    assert (words[1:] != words[:-1]).all()


# ---- whole runs ------------------------------------------------------------------------------------------------------
@every_tree
@pytest.mark.parametrize(("page_size", "block_tokens"), [(1, 64), (16, 64), (16, 40), (64, 100), (7, 64)])
def test_unbounded_counts_are_those_of_the_trace(tree: str, page_size: int, block_tokens: int) -> None:
    requests = workload(100, block_tokens=block_tokens, max_input_tokens=4000)
    expected = summarize(requests, page_size, block_tokens)
    pages = expected.cached_tokens // page_size  # to the page
    replay = make_replay(tree, device_pages=pages, page_size=page_size, block_tokens=block_tokens)
    counters = checked_run(replay, requests)
    assert counters.prompt_tokens == expected.input_tokens
    assert counters.device_hit_tokens == expected.hit_tokens
    assert counters.host_hit_tokens == counters.evicted_tokens == counters.duplicate_pages == 0
    assert replay.cached_tokens() == expected.cached_tokens
    assert counters.verified_pages == expected.hit_tokens // page_size
    assert counters.written_pages == pages
    assert replay.device_slots.available == 0


@every_tree
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("write_policy", ["write_back", "write_through"])
def test_two_tiers_under_pressure(tree: str, policy: str, write_policy: str) -> None:
    requests = workload(100, max_input_tokens=5000, sessions_per_s=3.0)
    options = {"device_pages": 400, "host_pages": 900, "policy": policy, "write_policy": write_policy}
    replay = make_replay(tree, **options)
    counters = checked_run(replay, requests)
    assert counters.evicted_tokens > 0
    assert counters.backed_up_tokens > 0
    hit = counters.device_hit_tokens + counters.host_hit_tokens
    assert counters.verified_pages == hit // 16
    assert hit <= summarize(requests, 16, 64).hit_tokens
    assert counters.loaded_back_tokens == counters.host_hit_tokens
    if policy not in ("mru", "filo"):  # those throw out what was used last, and may never come back to the host
        assert counters.host_hit_tokens > 0


@every_tree
def test_a_host_tier_helps_and_none_is_allowed(tree: str) -> None:
    requests = workload(200, sessions_per_s=3.0)
    rates = []
    for host_pages in (0, 2000, 20_000):
        counters = checked_run(make_replay(tree, device_pages=1000, host_pages=host_pages), requests)
        through = make_replay(tree, device_pages=1000, host_pages=host_pages, write_policy="write_through")
        assert (checked_run(through, requests).host_hit_tokens > 0) == (host_pages > 0)
        rates.append(counters.device_hit_tokens + counters.host_hit_tokens)
        assert (counters.host_hit_tokens > 0) == (host_pages > 0)
    assert rates[0] < rates[1] < rates[2]
    assert rates[2] == summarize(requests, 16, 64).hit_tokens  # both tiers hold everything


@every_tree
@pytest.mark.parametrize("host_pages", [1, 3, 20])
def test_a_tiny_host_drops_what_does_not_fit(tree: str, host_pages: int) -> None:
    for write_policy in ("write_back", "write_through"):
        replay = make_replay(tree, device_pages=400, host_pages=host_pages, write_policy=write_policy)
        assert checked_run(replay, workload(80, max_input_tokens=5000)).dropped_tokens > 0


@every_tree
def test_requests_longer_than_the_device_are_counted_and_leave_no_trace(tree: str) -> None:
    requests = workload(80, max_input_tokens=5000)
    longest = max(request.input_length for request in requests)
    replay = make_replay(tree, device_pages=longest // 16 // 2, host_pages=500)
    counters = checked_run(replay, requests)
    too_long = [request for request in requests if request.input_length // 16 > longest // 16 // 2]
    assert counters.uncached_requests == len(too_long) > 0
    assert counters.requests == 80
    assert counters.prompt_tokens == sum(request.input_length for request in requests)
    assert len(replay.latencies_ns["match"]) == 80 - len(too_long)


@every_tree
def test_prompts_shorter_than_a_page_and_empty_ones(tree: str) -> None:
    requests = [
        TraceRequest(0, 0, 3, ()),
        TraceRequest(0, 15, 3, (1,)),
        TraceRequest(0, 16, 3, (1,)),
        TraceRequest(0, 16, 3, (1,)),
    ]
    counters = checked_run(make_replay(tree, device_pages=1), requests)
    assert (counters.device_hit_tokens, counters.prompt_tokens, counters.uncached_requests) == (16, 47, 0)


@every_tree
def test_output_tokens_are_kept_beside_the_prompts(tree: str) -> None:
    requests = workload(60, "chat")
    summary = summarize(requests, 16, 64)
    replay = make_replay(tree, output_tokens=True)
    counters = checked_run(replay, requests)
    assert counters.device_hit_tokens == summary.hit_tokens  # responses are unique: they cost room and hit nothing
    extra = replay.cached_tokens() - summary.cached_tokens
    outputs = sum(request.output_length for request in requests)
    assert outputs - 16 * 60 < extra < outputs + 16 * 60
    assert counters.prompt_tokens == summary.input_tokens


@every_tree
def test_stop_ends_between_two_requests(tree: str) -> None:
    replay = make_replay(tree)
    assert not replay.run(workload(50), should_stop=lambda: replay.counters.requests == 20)
    assert replay.counters.requests == 20
    assert replay.device_slots.used * 16 == replay.cached_tokens()


def test_the_first_2000_requests_of_the_conversation_trace() -> None:
    requests = read_trace(str(real_trace()), limit=2000)
    replay = make_replay(BEST_TREE, device_pages=19_356_288 // 16, block_tokens=512)
    assert replay.run(requests)
    counters = replay.counters
    assert (counters.device_hit_tokens, counters.prompt_tokens) == (8_070_832, 27_441_774)
    assert replay.cached_tokens() == 19_356_288
    assert counters.verified_pages == 8_070_832 // 16
    assert counters.evicted_tokens == 0


def test_both_trees_replay_alike() -> None:
    """Every counter, under pressure on both tiers: the same hits, evictions and copies in the same order."""
    if BEST_TREE != "core":
        pytest.skip("radixkv.tree.core is not built")
    for policy in POLICIES:
        found = [
            checked_run(
                make_replay(tree, device_pages=400, host_pages=900, policy=policy), workload(100, max_input_tokens=5000)
            )
            for tree in ("reference", "core")
        ]
        assert dataclasses.asdict(found[0]) == dataclasses.asdict(found[1])


# ---- planted faults --------------------------------------------------------------------------------------------------
def twice() -> list[TraceRequest]:
    """The same prompt of 10 pages, twice."""
    return [TraceRequest(0, 160, 0, (1, 2, 3))] * 2


def pressed() -> list[TraceRequest]:
    """A prompt that goes to the host because another one comes, and is loaded back."""
    first, other = TraceRequest(0, 160, 0, (1, 2, 3)), TraceRequest(0, 160, 0, (7, 8, 9))
    return [first, other, first]


@every_tree
@pytest.mark.parametrize("page", [0, 4, 9])
@pytest.mark.parametrize("byte", [0, 100, 255])
def test_one_wrong_bit_on_the_device_is_found(tree: str, page: int, byte: int) -> None:
    replay = make_replay(tree, device_pages=16)
    first, second = twice()
    replay.serve(first)
    replay.device.data[page, byte] ^= 0x20
    with pytest.raises(VerificationError, match=rf"request 1: page {page} .*on the device.* byte {byte} of 256"):
        replay.serve(second)


@every_tree
@pytest.mark.parametrize("write_policy", ["write_back", "write_through"])
def test_one_wrong_bit_on_the_host_is_found(tree: str, write_policy: str) -> None:
    replay = make_replay(tree, device_pages=10, host_pages=20, write_policy=write_policy)
    first, other, again = pressed()
    replay.serve(first)
    replay.serve(other)
    [wrong] = np.flatnonzero(
        (replay.host.data == page_bytes(page_seeds(expand_prompt(first, 64), 16), 256)[6]).all(axis=1)
    )
    replay.host.data[wrong, 77] ^= 1
    with pytest.raises(VerificationError, match=r"request 2: page 6 .*loaded back from the host.* byte 77 of 256"):
        replay.serve(again)


def rotated(copy: Callable[..., None]) -> Callable[..., None]:
    return lambda src, src_ids, dst, dst_ids: copy(src, np.roll(src_ids, 1), dst, dst_ids)


def one_short(copy: Callable[..., None]) -> Callable[..., None]:
    return lambda src, src_ids, dst, dst_ids: copy(src, src_ids[:-1], dst, dst_ids[:-1])


def half_a_page(copy: Callable[..., None]) -> Callable[..., None]:
    def wrong(src: HostPagePool, src_ids: Any, dst: HostPagePool, dst_ids: Any) -> None:
        dst.data[dst_ids, :128] = src.data[src_ids, :128]

    return wrong


@every_tree
@pytest.mark.parametrize("fault", [rotated, one_short, half_a_page])
def test_wrong_copies_between_the_tiers_are_found(tree: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_module, "copy_pages", fault(replay_module.copy_pages))
    replay = make_replay(tree, device_pages=10, host_pages=20)
    replay.device.data[:] = replay.host.data[:] = 0
    with pytest.raises(VerificationError, match=r"request 2: page 0|request 2: page 9"):
        replay.run(pressed())


@every_tree
@pytest.mark.parametrize(
    "lie", [lambda ids: np.roll(ids, 1), lambda ids: ids[::-1].copy(), lambda ids: np.zeros_like(ids)]
)
def test_a_tree_that_returns_wrong_pages_is_found(tree: str, lie: Any) -> None:
    replay = make_replay(tree, device_pages=20)
    honest = replay._match

    def lying(prompt: Any) -> Any:
        match, device_ids, host_ids = honest(prompt)
        return match, lie(device_ids), host_ids

    replay._match = lying  # type: ignore[method-assign]
    with pytest.raises(VerificationError):
        replay.run(twice())


@every_tree
def test_a_page_handed_out_twice_is_found(tree: str) -> None:
    """A page freed while the tree still holds it: its next owner overwrites it, or the tree refuses the id."""
    replay = make_replay(tree, device_pages=12)
    first, second = twice()
    replay.serve(first)
    replay.device_slots.free([3])
    with pytest.raises(IntegrityError):
        replay.check_integrity()
    replay.device.scatter(np.array([3], np.int32), np.zeros((1, 256), np.uint8))
    with pytest.raises(VerificationError, match="page 3 "):
        replay.serve(second)


@every_tree
@pytest.mark.parametrize("tier", ["device_slots", "host_slots"])
def test_a_lost_page_is_found(tree: str, tier: str) -> None:
    replay = make_replay(tree, device_pages=30, host_pages=30)
    replay.run(pressed())
    getattr(replay, tier).alloc(1)
    with pytest.raises(IntegrityError):
        replay.check_integrity()


@every_tree
def test_a_device_held_by_somebody_else_is_said_with_the_numbers(tree: str) -> None:
    replay = make_replay(tree, device_pages=12)
    first, other, _ = pressed()
    replay.serve(first)
    replay.tree.lock(next(iter(replay.tree)))
    with pytest.raises(RadixKVError, match=r"request 1: need 10 device pages, 2 free, .* 0 evictable tokens"):
        replay.serve(other)


@every_tree
def test_a_lock_left_behind_is_found(tree: str) -> None:
    replay = make_replay(tree, device_pages=30)
    replay.run(twice())
    [info] = replay.tree.dump()
    replay.tree.lock(info.node)
    with pytest.raises(IntegrityError, match="160 tokens are protected"):
        replay.check_integrity()


def test_insert_gets_the_match_as_hint() -> None:
    hints = []

    class Spy(ReferenceTree):
        def insert(self, tokens: Any, page_ids: Any, match: Any = None, **more: Any) -> Any:
            hints.append(match.num_tokens)
            return super().insert(tokens, page_ids, match, **more)

    make_replay(Spy).run(twice())
    assert hints == [0, 160]


@every_tree
def test_without_verify_nothing_is_compared(tree: str) -> None:
    replay = make_replay(tree, device_pages=16, verify=False)
    first, second = twice()
    replay.serve(first)
    replay.device.data[:] = 0
    replay.serve(second)
    assert replay.counters.device_hit_tokens == 160
    assert replay.counters.verified_pages == 0


@every_tree
def test_long_prompts_are_verified_in_pieces(tree: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_module, "_VERIFY_BYTES", 700)  # two pages at a time
    replay = make_replay(tree, device_pages=16)
    assert replay.run(twice())
    assert replay.counters.verified_pages == 10
    replay.device.data[9, 3] ^= 1
    with pytest.raises(VerificationError, match="page 9 "):
        replay.serve(twice()[0])


# ---- options and report ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [
    {"device_pages": 0}, {"page_size": 0}, {"bytes_per_token": 0}, {"host_pages": -1}, {"block_tokens": 0},
    {"write_policy": "write_never"},
])  # fmt: skip
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(options))):
        ReplayConfig(**({"device_pages": 1} | options))


def test_report_adds_up() -> None:
    replay = make_replay("reference", device_pages=400, host_pages=900)
    requests = workload(100, max_input_tokens=5000)
    checked_run(replay, requests)
    report = replay_report(replay, trace="t", tree="reference", finished=True, wall_s=2.0)
    rate, counters = report["hit_rate"], report["counters"]
    assert rate["total"] == pytest.approx(rate["device"] + rate["host"])
    assert rate["device"] == counters["device_hit_tokens"] / sum(request.input_length for request in requests)
    tree = report["tree"]
    assert tree["device_tokens"] <= 400 * 16
    assert tree["host_tokens"] <= 900 * 16
    assert (
        max(tree["device_tokens"], tree["host_tokens"])
        <= tree["cached_tokens"]
        <= tree["device_tokens"] + tree["host_tokens"]
    )
    assert tree["cached_tokens"] == sum(len(info.tokens) for info in replay.tree.dump())
    assert tree["memory_bytes_per_cached_token"] == tree["memory_bytes"] / tree["cached_tokens"]
    assert tree["tokens_per_s"] == pytest.approx(counters["prompt_tokens"] / tree["time_s"])
    assert tree["time_s"] * 1e3 == pytest.approx(sum(summary["total_ms"] for summary in report["latency"].values()))
    assert report["latency"]["match"]["count"] == report["latency"]["insert"]["count"] == 100
    assert report["config"]["tree"] == "reference"


def test_report_of_nothing() -> None:
    report = replay_report(make_replay("reference"), trace="t", tree="reference", finished=False, wall_s=0.0)
    assert report["hit_rate"] == {"device": None, "host": None, "total": None}
    assert report["tree"]["tokens_per_s"] is None


def test_latency_summary() -> None:
    summary = latency_summary([k * 1000 for k in range(1, 101)])
    assert summary == {"count": 100, "total_ms": 5.05, "p50_us": 50.5, "p90_us": pytest.approx(90.1),
                       "p99_us": pytest.approx(99.01), "max_us": 100.0}  # fmt: skip
    assert latency_summary([]) == {"count": 0, "total_ms": 0.0}


def test_trees_are_found_by_name() -> None:
    assert load_tree("reference").__name__ == "ReferenceTree"
