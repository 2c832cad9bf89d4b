"""replay/plan.py: stack distances against a list that is moved to the front, the bound against all possible choices,
the LRU curve against replays."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radixkv.replay.plan import NEVER, belady_hits, choose_capacities, make_plan, number_accesses, stack_distances
from radixkv.trace import TraceRequest, read_trace, summarize

from .support import BEST_TREE, HAS_CORE, make_replay, real_trace, workload

BLOCK = 4


@st.composite
def traces(draw: st.DrawFn, max_requests: int = 25, fanout: int = 3, depth: int = 5) -> list[TraceRequest]:
    requests = []
    for _ in range(draw(st.integers(1, max_requests))):
        ids = draw(st.lists(st.integers(0, fanout - 1), max_size=depth))
        cut = draw(st.integers(0, BLOCK - 1)) if ids else 0
        requests.append(TraceRequest(0, len(ids) * BLOCK - cut, 0, tuple(ids)))
    return requests


def paths(requests: list[TraceRequest]) -> list[list[tuple[int, ...]]]:
    return [[r.hash_ids[: k + 1] for k in range(len(r.hash_ids))] for r in requests]


# ---- LRU -------------------------------------------------------------------------------------------------------------
@given(traces())
def test_stack_distances_are_places_in_the_stack_when_the_request_comes(requests: list[TraceRequest]) -> None:
    stack: list[tuple[int, ...]] = []  # most recent first
    expected = []
    for path in paths(requests):
        expected += [stack.index(block) + 1 if block in stack else NEVER for block in path]
        stack = path + [block for block in stack if block not in path]
    assert stack_distances(number_accesses(requests, BLOCK)).tolist() == expected


@given(traces(), st.integers(0, 12))
def test_lru_curve_is_a_leaf_first_cache_at_each_size(requests: list[TraceRequest], capacity: int) -> None:
    """A simulation of one size: the cache is always closed under parent, and only prefix hits count."""
    cache: list[tuple[int, ...]] = []
    hits = tokens = 0
    for request, path in zip(requests, paths(requests), strict=True):
        for k, block in enumerate(path):
            if block not in cache:
                break
            hits += 1
            tokens += min(BLOCK, request.input_length - k * BLOCK)
        cache = (path + [block for block in cache if block not in path])[:capacity]
        assert all(block[:-1] in cache for block in cache if len(block) > 1)
    plan = make_plan(requests, BLOCK, capacities=[1])
    assert int(plan.lru_hit_blocks[min(capacity, len(plan.lru_hit_blocks) - 1)]) == hits
    assert plan.lru_tokens_at(capacity) == tokens


@given(traces())
def test_unbounded_end_of_the_curve_is_what_the_trace_repeats(requests: list[TraceRequest]) -> None:
    plan = make_plan(requests, BLOCK)
    summary = summarize(requests, 1, BLOCK)
    assert int(plan.lru_hit_blocks[-1]) == summary.hit_blocks
    assert plan.blocks == summary.blocks
    assert plan.unique_blocks == summary.unique_blocks
    assert plan.tokens == summary.input_tokens
    assert (np.diff(plan.lru_hit_tokens) >= 0).all()


# ---- the bound -------------------------------------------------------------------------------------------------------
def best_possible(requests: list[TraceRequest], capacity: int) -> int:
    """Most block hits of any choice of what to keep after each request: dynamic programming over all kept sets."""
    best: dict[frozenset[tuple[int, ...]], int] = {frozenset(): 0}
    for path in paths(requests):
        following: dict[frozenset[tuple[int, ...]], int] = {}
        for kept, hits in best.items():
            found = hits
            for block in path:
                if block not in kept:
                    break
                found += 1
            choices = kept | set(path)
            for size in range(min(capacity, len(choices)) + 1):
                for subset in combinations(sorted(choices), size):
                    key = frozenset(subset)
                    following[key] = max(following.get(key, 0), found)
        best = following
    return max(best.values())


@settings(max_examples=60, deadline=None)
@given(traces(max_requests=6, fanout=2, depth=3), st.integers(0, 3))
def test_bound_is_the_best_that_any_choice_reaches(requests: list[TraceRequest], capacity: int) -> None:
    hits = belady_hits(number_accesses(requests, BLOCK), capacity)
    assert int(hits.sum()) == best_possible(requests, capacity)


@given(traces(max_requests=40), st.integers(0, 15))
def test_bound_keeps_prefixes_and_is_above_lru(requests: list[TraceRequest], capacity: int) -> None:
    accesses = number_accesses(requests, BLOCK)
    hits = belady_hits(accesses, capacity)
    for k in range(1, len(hits)):
        assert not hits[k] or accesses.depth[k] == 0 or hits[k - 1]
    distances = stack_distances(accesses)
    assert hits.sum() >= ((distances != NEVER) & (distances <= capacity)).sum()
    if capacity >= accesses.unique_blocks:
        assert (hits == (accesses.previous != NEVER)).all()


def test_bypass_beats_a_scan() -> None:
    """LRU of 2 blocks is flushed by a scan each time; the bound never lets the scan in."""
    requests = [TraceRequest(0, BLOCK, 0, (block,)) for n in range(10) for block in (0, 100 + n, 200 + n)]
    plan = make_plan(requests, BLOCK, capacities=[0, 1, 2, 3])
    assert plan.clairvoyant_hit_blocks.tolist() == [0, 9, 9, 9]
    assert plan.lru_hit_blocks.tolist() == [0, 0, 0, 9]


# ---- the plan --------------------------------------------------------------------------------------------------------
def test_knees_are_the_smallest_sizes_that_reach_their_share() -> None:
    plan = make_plan(workload(300), 64)
    for share in (0.1, 0.5, 0.9, 0.99, 1.0):
        size = plan.knee(share)
        assert plan.lru_tokens_at(size) >= share * plan.achievable_hit_tokens - 1
        assert plan.lru_tokens_at(size - 1) < share * plan.achievable_hit_tokens
    assert plan.knee(1.0) == len(plan.lru_hit_tokens) - 1


def test_nothing_repeats() -> None:
    plan = make_plan([TraceRequest(0, BLOCK, 0, (k,)) for k in range(5)], BLOCK)
    assert plan.achievable_hit_tokens == 0
    assert plan.knee(0.9) == 0
    assert set(plan.clairvoyant_hit_blocks.tolist()) == {0}


def test_requests_without_prompts() -> None:
    plan = make_plan([TraceRequest(0, 0, 5, ())] * 3, BLOCK)
    assert (plan.blocks, plan.tokens, plan.achievable_hit_tokens) == (0, 0, 0)
    assert plan.as_dict(1)["unbounded"]["hit_rate"] is None


@pytest.mark.parametrize("largest", [0, 1, 5, 16, 20, 100, 10**6])
def test_capacities_rise_to_the_largest_useful(largest: int) -> None:
    sizes = choose_capacities(largest)
    assert sizes[-1] == max(1, largest)
    assert (np.diff(sizes) > 0).all()
    assert len(sizes) == min(16, max(1, largest))


def test_as_dict_is_the_plan() -> None:
    plan = make_plan(workload(100), 64, capacities=[50, 10, 1000])
    figures = plan.as_dict(1024, (0.5, 1.0))
    assert [row["capacity_tokens"] for row in figures["curve"]] == [640, 3200, 64_000]
    assert [row["capacity_bytes"] for row in figures["curve"]] == [640 * 1024, 3200 * 1024, 64_000 * 1024]
    assert [row["lru_hit_tokens"] for row in figures["curve"]] == [plan.lru_tokens_at(c) for c in (10, 50, 1000)]
    for row in figures["curve"]:
        assert row["lru_hit_rate"] <= row["clairvoyant_hit_rate"] <= figures["unbounded"]["hit_rate"]
    assert figures["knees"][1]["lru_hit_tokens"] == figures["unbounded"]["hit_tokens"]


def test_the_conversation_trace() -> None:
    plan = make_plan(read_trace(str(real_trace())), capacities=[4000])
    assert (int(plan.lru_hit_blocks[-1]), plan.blocks, plan.unique_blocks) == (105_710, 288_500, 182_790)
    assert round(100 * plan.achievable_hit_tokens / plan.tokens, 2) == 37.36


# ---- against replay --------------------------------------------------------------------------------------------------
def replayed_rate(tree: str, requests: list[TraceRequest], **options: Any) -> float:
    replay = make_replay(tree, verify=False, **options)
    assert replay.run(requests)
    counters = replay.counters
    assert counters.uncached_requests == 0
    return (counters.device_hit_tokens + counters.host_hit_tokens) / counters.prompt_tokens


def test_lru_agrees_with_replay_on_a_generated_workload() -> None:
    requests = workload(1500, "mixed", seed=11, sessions_per_s=5.0)
    plan = make_plan(requests, 64)
    spread = []
    for share in (0.6, 0.8, 0.95):
        size = plan.knee(share)
        planned = plan.lru_tokens_at(size) / plan.tokens
        assert abs(planned - replayed_rate(BEST_TREE, requests, device_pages=size * 64 // 16)) < 0.01
        spread.append(planned)
    assert spread[2] - spread[0] > 0.2  # three sizes that matter


def test_lru_agrees_with_replay_on_the_conversation_trace() -> None:
    requests = read_trace(str(real_trace()), limit=2000)
    plan = make_plan(requests)
    for tokens in (2_000_000, 5_000_000, 10_000_000):
        planned = plan.lru_tokens_at(tokens // 512) / plan.tokens
        replayed = replayed_rate(BEST_TREE, requests, device_pages=tokens // 16, block_tokens=512)
        assert abs(planned - replayed) < 0.01, (tokens, planned, replayed, HAS_CORE)


@pytest.mark.parametrize("write_policy", ["write_back", "write_through"])
def test_two_tiers_hit_between_the_host_alone_and_both_added(write_policy: str) -> None:
    """What ``plan --device-tokens`` says about the host: write_back is nearly exclusive, write_through inclusive."""
    requests = workload(500, "mixed", seed=11)
    plan = make_plan(requests, 64)
    host = plan.knee(0.8)
    device = host // 2
    rate = replayed_rate(BEST_TREE, requests, device_pages=device * 4, host_pages=host * 4, write_policy=write_policy)
    assert plan.lru_tokens_at(host) / plan.tokens - 0.01 < rate
    assert rate < plan.lru_tokens_at(host + device) / plan.tokens + 0.01
