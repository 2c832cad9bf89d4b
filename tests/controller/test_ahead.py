"""Prefetches that take free host pages ahead: they bring what storage has though nobody polls, and keep only what it
takes."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from radixkv.errors import GroupError
from radixkv.tree.page_hash import sha256_chain

from .kit import ROOT, P, Stack, ThreadGroup, on_ranks, prompt
from .test_storage import Clock, keys_of, stored


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


@pytest.mark.parametrize("policy", ["best_effort", "timeout", "wait_complete"])
def test_what_waits_without_a_poll_is_brought(policy: str) -> None:
    """A scheduler whose batch is full does not poll; then one round does all."""
    clock = Clock()
    stack = stored(prompt(1, 6), prefetch_policy=policy, clock=clock)
    assert stack.controller.prefetch("req", prompt(1, 6), ROOT)
    stack.edge.run()
    clock.now_s += 100.0
    stack.controller.poll()
    assert stack.controller.finish_prefetch("req")
    assert stack.controller.match(prompt(1, 6)).host_num_tokens == 6 * P
    assert (stack.controller.stats().stuck_pages, stack.controller.stats().prefetch_failures) == (0, 0)
    stack.check()


def test_with_threads_and_no_poll_at_all() -> None:
    stack = Stack(threads=True, storage=True, store_after_backup=True, prefetch_policy="best_effort")
    stack.compute(prompt(1, 6))
    stack.settle(10**6)
    stack.controller.reset()
    assert stack.controller.prefetch("req", prompt(1, 6), ROOT)
    wait_for(lambda: stack.controller.prefetch_progress("req").fetched_tokens == 6 * P)
    assert stack.controller.finish_prefetch("req")
    assert stack.controller.match(prompt(1, 6)).host_num_tokens == 6 * P
    stack.check()
    assert stack.controller.close()


def test_the_surplus_comes_back_with_the_look_up() -> None:
    """48 pages are asked for, of which storage has 6."""
    tokens = np.concatenate([prompt(1, 6), prompt(2, 42)])
    stack = stored(prompt(1, 6), prefetch_capacity_floor=1.0)
    assert stack.controller.prefetch("req", tokens, ROOT)
    assert stack.host.available_size() == stack.host.size - 48 * P
    stack.controller.poll()
    assert stack.host.available_size() == stack.host.size - 48 * P
    stack.edge.step()
    assert stack.controller.poll().revoked == 0
    assert stack.host.available_size() == stack.host.size - 6 * P
    assert stack.controller.stats().prefetch_tokens_in_flight == 6 * P
    stack.check()
    stack.edge.run()
    assert stack.controller.finish_prefetch("req")
    assert stack.controller.match(tokens).host_num_tokens == 6 * P
    stack.check()


@pytest.mark.parametrize("by", ["poll", "finish"])
def test_a_miss_gives_everything_back(by: str) -> None:
    stack = stored(prompt(1, 3), prefetch_threshold=4 * P, prefetch_policy="wait_complete")
    assert stack.controller.prefetch("req", prompt(1, 3).tolist() + prompt(2, 5).tolist(), ROOT)
    stack.edge.step()
    assert not stack.edge.waiting, "it reads what is not worth it"
    if by == "poll":
        assert stack.controller.poll().revoked == 1
    assert stack.controller.finish_prefetch("req")
    stats = stack.controller.stats()
    assert (stats.prefetch_revoked, stats.prefetch_failures, stats.prefetch_tokens, stats.stuck_pages) == (1, 0, 0, 0)
    assert stack.host.available_size() == stack.host.size
    assert len(stack.tree) == 0
    stack.check()


def test_a_backup_gets_the_surplus_before_anything_is_evicted() -> None:
    """Nobody polls; a request that ends inserts, and its backup needs room."""
    stack = stored(prompt(1, 2), prefetch_capacity_floor=1.0, host_pages=16)
    stack.compute(prompt(3, 4))
    stack.settle()
    stack.controller.evict(4 * P)  # host-only: an eviction would take it
    assert stack.controller.prefetch("req", np.concatenate([prompt(1, 2), prompt(2, 10)]), ROOT)
    assert stack.host.available_size() == 0
    stack.edge.step()
    stack.compute(prompt(4, 6))
    assert stack.controller.stats().writes_in_flight == 1
    assert stack.controller.stats().host_evicted_tokens == 0
    stack.check()
    stack.settle()
    assert stack.controller.finish_prefetch("req")
    assert stack.controller.match(prompt(1, 2)).host_num_tokens == 2 * P
    stack.check()


def test_what_poll_has_agreed_on_is_settled_once() -> None:
    """Two look-ups have answered; the first needs room, which the second one's surplus could be."""
    stack = stored([prompt(1, 6), prompt(2, 2)], prefetch_capacity_floor=1.0, host_pages=16)
    stack.compute(prompt(9, 10))
    stack.settle()
    assert stack.controller.prefetch("late", np.concatenate([prompt(1, 6), prompt(5, 2)]), ROOT)
    assert stack.controller.prefetch("ahead", np.concatenate([prompt(2, 2), prompt(6, 3)]), ROOT)
    assert stack.host.available_size() == P
    stack.edge.step("look_up")
    stack.edge.step("fetch")
    stack.controller.poll()
    stack.check()
    stack.settle()
    for name in ("late", "ahead"):
        assert stack.controller.finish_prefetch(name)
    stack.check()
    assert stack.controller.match(prompt(2, 2)).host_num_tokens == 2 * P


@pytest.mark.parametrize("policy", ["best_effort", "timeout"])
def test_a_fetch_that_had_to_wait_for_room_gets_a_moment(policy: str) -> None:
    """The host is full, so pages are taken in the round in which the request is due: it would end with none."""
    clock = Clock()
    options = {"compute_ns_per_token": 10_000_000, "prefetch_timeout_base_s": 1.0}  # 0.24 s for six pages
    options |= {"host_pages": 8, "prefetch_capacity_floor": 1.0}
    stack = stored(prompt(1, 6), prefetch_policy=policy, clock=clock, **options)
    stack.compute(prompt(3, 7))
    stack.settle()
    stack.controller.evict(7 * P)
    assert stack.controller.prefetch("req", prompt(1, 6), ROOT)
    stack.edge.run()
    assert stack.controller.stats().host_evicted_tokens == 0
    clock.now_s += 50.0
    stack.controller.poll()
    assert not stack.controller.can_terminate("req")
    assert not stack.controller.finish_prefetch("req")
    stack.edge.step("fetch")
    clock.now_s += 0.2
    assert not stack.controller.finish_prefetch("req")
    clock.now_s += 0.1
    assert stack.controller.finish_prefetch("req"), "no longer than computing it would take"
    assert stack.controller.match(prompt(1, 6)).host_num_tokens == 2 * P
    stack.settle()
    stack.check()


def test_who_has_not_waited_is_not_kept_waiting() -> None:
    clock = Clock()
    stack = stored(prompt(1, 6), prefetch_policy="best_effort", clock=clock, host_pages=8, prefetch_capacity_floor=1.0)
    stack.compute(prompt(3, 7))
    stack.settle()
    stack.controller.evict(7 * P)
    assert stack.controller.prefetch("req", prompt(1, 6), ROOT)
    stack.edge.run()
    stack.controller.poll()
    assert stack.controller.finish_prefetch("req")
    stack.settle()
    stack.check()


def test_who_is_stopped_takes_no_room() -> None:
    """Nothing was free for it when it began; a poll finds that storage has it, but nobody wants it any more."""
    stack = stored(prompt(1, 6), host_pages=8, prefetch_capacity_floor=1.0)
    stack.compute(prompt(3, 7))
    stack.settle()
    stack.controller.evict(7 * P)
    assert stack.controller.prefetch("req", prompt(1, 6), ROOT)
    stack.edge.run()
    stack.controller.stop_prefetch("req")
    stack.controller.poll()
    assert stack.controller.stats().host_evicted_tokens == 0
    assert stack.edge.waiting == []
    assert stack.controller.finish_prefetch("req")
    stack.check()


@pytest.mark.parametrize("calls", range(7))
def test_cancelled_at_any_point_without_a_poll(calls: int) -> None:
    stack = stored(prompt(1, 6))
    assert stack.controller.prefetch("req", np.concatenate([prompt(1, 6), prompt(2, 2)]), ROOT)
    for call in range(calls):
        stack.edge.begins = bool(call % 2)
        stack.edge.step()
    stack.controller.cancel_prefetch("req")
    stack.check()
    stack.settle()
    assert stack.host.available_size() == stack.host.size
    stack.check()


def test_many_are_bounded_by_tokens_and_what_has_arrived_counts_as_it_is() -> None:
    """200 requests of 3 pages in a deep queue; storage has one page of each."""
    prompts = [prompt(seed, 3) for seed in range(40)]
    stack = stored([each[:P] for each in prompts], host_pages=1000)
    begun = [stack.controller.prefetch(f"r{n}", prompts[n % 40] if n < 40 else prompt(n, 3), ROOT) for n in range(200)]
    assert all(begun)
    assert stack.controller.stats().prefetch_tokens_in_flight == 600 * P
    stack.edge.run()
    stack.controller.poll()
    stack.controller.poll()
    stats = stack.controller.stats()
    assert (stats.prefetches_in_flight, stats.prefetch_tokens_in_flight) == (40, 40 * P)
    stack.check()


def test_those_that_have_arrived_are_not_counted_as_running() -> None:
    prompts = [prompt(seed, 2) for seed in range(4)]
    stack = stored(prompts, max_prefetches=2, host_pages=256)
    for number in (0, 2):
        assert stack.controller.prefetch(f"r{number}", prompts[number], ROOT)
        assert stack.controller.prefetch(f"r{number + 1}", prompts[number + 1], ROOT)
        assert not stack.controller.prefetch("more", prompt(9, 2), ROOT)
        stack.edge.run()
        stack.controller.poll()  # looked up
        stack.controller.poll()  # fetched
    assert stack.controller.stats().prefetches_in_flight == 4
    for number in range(4):
        assert stack.controller.finish_prefetch(f"r{number}")
        assert stack.controller.match(prompts[number]).host_num_tokens == 2 * P
    stack.check()


# ---- ranks -----------------------------------------------------------------------------------------------------------
def two_ranks(found: tuple[int, int], run: Any, **options: Any) -> list[Any]:
    """Two ranks with storages of their own, which have so many pages of prompt(1, 8)."""

    def rank(group: ThreadGroup) -> Any:
        stack = stored(prompt(1, 8), group=group, **options)
        keys = np.flatnonzero(keys_of(stack, prompt(1, 8)))
        assert len(keys) == 8
        names = stack.edge.pages.keys(sha256_chain(prompt(1, 8), P))
        stack.edge.pages.storage.delete_many(names[found[group.rank] :])
        assert stack.controller.prefetch("req", prompt(1, 8), ROOT)
        return run(stack, group)

    return on_ranks(2, rank)


@pytest.mark.parametrize("polls", [0, 1, 2])
def test_ranks_that_found_different_numbers_agree_and_no_page_is_freed_under_a_worker(polls: int) -> None:
    def run(stack: Stack, group: ThreadGroup) -> Any:
        stack.edge.begins = True
        stack.edge.step()
        stack.edge.step()  # the look-up; rank 1 goes on to read eight pages
        for _ in range(group.rank):
            stack.edge.step()
        free = []
        for _ in range(polls):
            stack.controller.poll()
            stack.check()
            free.append(stack.host.available_size() // P)
        stack.edge.begins = False
        stack.edge.run()  # its kit looks at the state of every page that it writes
        assert stack.controller.finish_prefetch("req")
        stack.settle()
        stack.check()
        return free, stack.controller.match(prompt(1, 8)).host_num_tokens // P, stack.host.available_size() // P

    first, second = two_ranks((3, 8), run)
    assert first == second == ([56] * polls, 3, 61)


def test_one_rank_below_the_threshold_revokes_on_all() -> None:
    def run(stack: Stack, group: ThreadGroup) -> Any:
        stack.edge.begins = True
        for _ in range(3):
            stack.edge.step()
        revoked = stack.controller.poll().revoked
        stack.check()
        stuck = stack.controller.stats().stuck_pages
        stack.settle()
        stack.check()
        return revoked, stuck, stack.host.available_size() // P

    first, second = two_ranks((2, 6), run, prefetch_threshold=4 * P)
    assert first == second == (1, 6, 64)


def test_one_rank_that_has_not_looked_yet_keeps_everything() -> None:
    def run(stack: Stack, group: ThreadGroup) -> Any:
        if group.rank:
            stack.edge.run()
        stack.controller.poll()
        assert stack.host.available_size() // P == 56
        assert not stack.controller.finish_prefetch("req")
        stack.check()
        stack.edge.run()
        assert stack.controller.finish_prefetch("req")
        stack.settle()
        stack.check()
        return stack.controller.match(prompt(1, 8)).host_num_tokens // P

    assert two_ranks((5, 8), run) == [5, 5]


def test_a_rank_whose_worker_refuses_fails_it_for_all() -> None:
    def rank(group: ThreadGroup) -> Any:
        stack = stored(prompt(1, 4), group=group)
        if group.rank:
            def refuse(*_: Any) -> Any:
                raise MemoryError("no memory for a job")

            stack.edge.bring = refuse
        assert stack.controller.prefetch("req", prompt(1, 4), ROOT)
        stack.edge.begins = True
        for _ in range(3):
            stack.edge.step()
        assert stack.controller.poll().failed == 1
        stack.check()
        stack.settle()
        stack.check()
        return stack.controller.stats().prefetch_failures, stack.host.available_size()

    first, second = on_ranks(2, rank)
    assert first == second == (1, 64 * P)


def test_ranks_whose_pools_have_parted_find_out() -> None:
    """It cannot happen while they do the same; if it does, it is an error and no hang."""

    def rank(group: ThreadGroup) -> Any:
        stack = stored(prompt(1, 4), group=group)
        if group.rank:
            stack.host.alloc(62 * P)
        assert stack.controller.prefetch("req", prompt(1, 4), ROOT)
        stack.controller.poll()

    with pytest.raises((GroupError, AssertionError), match=r"vectors of|another rank"):
        on_ranks(2, rank)


def test_what_ends_before_its_look_up_is_no_success() -> None:
    outcomes: list[tuple[str, int]] = []

    class Ear:
        def finished(self, event: Any) -> None:
            if event.kind == "prefetch":
                outcomes.append((event.outcome, event.num_tokens))

        def evicted(self, tier: str, num_tokens: int) -> None: ...

        def made_room(self, num_tokens: int, seconds: float) -> None: ...

    stack = stored(prompt(1, 6), prefetch_policy="best_effort", listener=Ear())
    for calls in (0, 2, 9):
        assert stack.controller.prefetch("req", prompt(1, 6), ROOT)
        for _ in range(calls):
            stack.edge.step()
        assert stack.controller.finish_prefetch("req")
        stack.settle()
        stack.controller.reset()
    stack.controller.prefetch("miss", prompt(2, 6), ROOT)
    stack.edge.run()
    assert stack.controller.finish_prefetch("miss")
    assert outcomes == [("partial", 0), ("partial", 2 * P), ("done", 6 * P), ("revoked", 0)]


@pytest.mark.parametrize("calls", [0, 1, 2, 3])
def test_what_is_stopped_keeps_what_has_come(calls: int) -> None:
    stack = stored(prompt(1, 6), prefetch_policy="wait_complete")
    assert stack.controller.prefetch("req", prompt(1, 6), ROOT)
    for _ in range(calls):
        stack.edge.step()
    assert not stack.controller.can_terminate("req")
    stack.controller.stop_prefetch("req")
    stack.controller.stop_prefetch("unknown")
    assert stack.controller.can_terminate("req")
    assert stack.controller.finish_prefetch("req")
    stack.settle()
    assert stack.controller.match(prompt(1, 6)).host_num_tokens == max(0, calls - 1) * 2 * P
    assert stack.controller.stats().prefetch_failures == 0
    stack.check()


def test_what_storage_has_evicted_meanwhile_is_no_failure() -> None:
    """A disk whose budget is full loses pages all the time: three such fetches are no reason to leave it alone."""
    stack = stored([prompt(seed, 4) for seed in range(4)], backoff_failures=1, prefetch_policy="wait_complete")
    for seed in range(4):
        assert stack.controller.prefetch("req", prompt(seed, 4), ROOT)
        stack.edge.step()
        stack.controller.poll()
        names = stack.edge.pages.keys(sha256_chain(prompt(seed, 4), P))
        stack.edge.pages.storage.delete_many(names[2:])
        stack.edge.run()
        if seed % 2:
            stack.controller.poll()
        assert stack.controller.finish_prefetch("req")
        assert stack.controller.match(prompt(seed, 4)).host_num_tokens == 2 * P
    assert (stack.controller.stats().prefetch_failures, stack.controller.stats().backing_off) == (0, False)
    stack.check()
