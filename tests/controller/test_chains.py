"""What is in storage can be reached from the beginning of its prompt: nodes are stored after those above them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radixkv.controller import STORED
from radixkv.controller.workers import StorageWorkers
from radixkv.errors import StorageError
from radixkv.storage import MemoryStorage
from radixkv.storage.file import FileStorage
from radixkv.tree.page_hash import sha256_chain

from ..storage.faults import FaultyStorage, dead
from .kit import P, Stack, ThreadGroup, content_of, on_ranks, page_store, prompt
from .test_storage import keys_of, make, prefetched, stored

SEGMENT = 4096


def chat(system: Any, seed: int, pages: int = 4) -> Any:
    return np.concatenate([system, prompt(seed, pages)])


def compute_rest(stack: Stack, tokens: Any) -> int:
    """As an engine that takes what it has from the cache. Returns: tokens that it had."""
    match = stack.controller.match(tokens)
    new = stack.controller.alloc_pages(len(tokens) // P - match.num_tokens // P)
    assert new is not None
    stack.device.data[new] = content_of(tokens)[match.num_tokens // P :]
    stack.controller.insert(tokens, np.concatenate([match.page_ids(), new]).astype(np.int32))
    return int(match.num_tokens)


# ---- a budget below what flows through -------------------------------------------------------------------------------
@pytest.mark.parametrize("policy", ["write_through", "write_through_selective", "write_back"])
def test_after_a_restart_whole_prompts_are_found(tmp_path: Path, policy: str) -> None:
    """A system prompt is served from the device all the time; chats come and go. Found: 0 of its pages before."""
    budget = {"max_bytes": 40 * SEGMENT, "segment_bytes": 2048}
    system = prompt(0, 8)
    with FileStorage(tmp_path, **budget) as storage:
        stack = make(storage=storage, store_after_backup=True, write_policy=policy, write_through_threshold=1,
                     device_pages=40)  # fmt: skip
        stack.mover.instant = True
        for seed in range(60):
            compute_rest(stack, chat(system, 1 + seed))
            stack.settle()
            if seed:
                assert stack.serve(chat(system, 1 + seed)) == 12 * P
        stack.controller.evict(32 * P)
        stack.settle()
        assert storage.stats()["evicted_segments"] > 20
        assert storage.stats()["used_bytes"] <= 40 * SEGMENT
        stack.check()
        stack.close()
    with FileStorage(tmp_path, **budget) as storage:
        stack = make(storage=storage)
        for seed in (60, 59):  # the newest
            assert stack.edge is not None
            assert stack.edge.pages.count_prefix(sha256_chain(chat(system, seed), P)) == 12
        assert prefetched(stack, chat(system, 60))
        assert stack.controller.match(chat(system, 60)).host_num_tokens == 12 * P
        stack.check()


def test_what_is_hit_on_the_device_counts_as_used_in_storage() -> None:
    """Only while storage makes room: then each node that is hit is looked for once a doubt, and looking is using."""
    storage = MemoryStorage(max_bytes=14 * 320)
    stack = make(storage=storage, recheck_stored_s=0.0, store_after_backup=True, host_pages=256, device_pages=256)
    hot = prompt(0, 6)
    for seed in range(12):
        stack.compute(prompt(1 + seed, 2))
        stack.settle()
        stack.compute(hot)
        stack.settle()
    assert storage.stats()["evicted"] == 6 + 12 * 2 - 14, "each page was written once, and the hot ones never left"
    assert keys_of(stack, hot) == [True] * 6
    assert sum(keys_of(stack, prompt(1, 2))) == 0
    stack.check()


# ---- what comes before is not there ----------------------------------------------------------------------------------
def test_an_ancestor_that_storage_has_lost_is_stored_again_before_its_descendant() -> None:
    class Silent(MemoryStorage):
        """It does not tell what it evicts."""

        def lost(self) -> int:
            return 0

    stack = make(storage=Silent(), recheck_stored_s=0.0)
    top, tokens = prompt(1, 4), chat(prompt(1, 4), 2, 3)
    upper = stack.compute(top)
    stack.settle()
    assert stack.controller.store(upper) is not None
    stack.settle()
    assert stack.edge is not None
    stack.edge.pages.storage.delete_many(stack.edge.pages.keys(sha256_chain(top, P))[2:])
    lower = stack.compute(tokens)
    stack.settle()
    polls = [poll for _ in range(1) if stack.controller.store(lower) is not None for poll in stack.settle()]
    assert sum(poll.revoked for poll in polls) == 1
    assert sum(poll.failed for poll in polls) == 0
    assert keys_of(stack, tokens) == [True, True] + [False] * 5, "no descendant without its ancestor"
    stats = stack.controller.stats()
    assert (stats.store_gaps, stats.store_failures, stats.backing_off) == (1, 0, False)
    assert stack.tree.node_info(upper).marks == 0
    stack.check()
    stack.compute(tokens)  # it is hit: the ancestor is due, and the descendant follows it
    stack.settle()
    assert keys_of(stack, tokens) == [True] * 7
    assert {info.marks for info in stack.tree.dump()} == {STORED}
    assert stack.controller.stats().store_gaps == 1
    stack.check()


def test_of_a_node_that_was_split_meanwhile_each_part_waits_for_the_one_above() -> None:
    stack = make(write_through_threshold_storage=100)  # nothing but what is asked for
    top = prompt(1, 2)
    tokens = chat(top, 2, 4)
    upper = stack.compute(top)
    stack.settle()
    stack.controller.store(upper)
    stack.settle()
    assert stack.edge is not None
    stack.edge.pages.storage.clear()
    lower = stack.compute(tokens)
    stack.settle()
    stack.controller.store(lower)
    stack.compute(np.concatenate([tokens[: 4 * P], prompt(3, 1)]))  # between 2 and 2 pages of it
    stack.settle()
    assert stack.controller.stats().store_gaps == 1
    assert [info.marks for info in stack.tree.dump() if info.node in (upper, lower)] == [0, 0]
    assert stack.controller.store(upper) is not None
    stack.settle()
    assert keys_of(stack, tokens) == [True] * 6
    stack.check()


def test_ranks_agree_on_what_waits() -> None:
    def run(group: ThreadGroup) -> Any:
        stack = make(group=group, recheck_stored_s=0.0)
        top, tokens = prompt(1, 3), chat(prompt(1, 3), 2, 3)
        upper = stack.compute(top)
        stack.settle()
        stack.controller.store(upper)
        stack.settle()
        assert stack.edge is not None
        if group.rank == 1:  # only there
            stack.edge.pages.storage.clear()
        lower = stack.compute(tokens)
        stack.settle()
        stack.controller.store(lower)
        stack.settle()
        gaps, marks = stack.controller.stats().store_gaps, stack.tree.node_info(upper).marks
        stack.compute(tokens)
        stack.settle()
        stack.check()
        return gaps, marks, keys_of(stack, tokens), [info.marks for info in stack.tree.dump()]

    assert on_ranks(2, run) == [(1, 0, [True] * 6, [STORED, STORED])] * 2


def test_nodes_that_wait_are_few_and_forgotten_with_the_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radixkv.controller.stores.KEPT_WAITING", 3)
    stack = make(device_pages=128, host_pages=128)
    top = prompt(0, 2)
    upper = stack.compute(top)
    children = [stack.compute(chat(top, 1 + seed, 1)) for seed in range(5)]
    others = [stack.compute(np.concatenate([prompt(50 + seed, 1), prompt(1, 1)])) for seed in range(5)]
    tails = [stack.compute(np.concatenate([prompt(50 + seed, 1), prompt(1, 2)])) for seed in range(5)]
    stack.settle()
    assert [stack.controller.store(node) for node in children + tails] == [None] * 10
    waiting = stack.controller._stores._waiting
    assert len(waiting) == 3
    assert all(len(nodes) <= 3 for nodes in waiting.values())
    stack.controller.store(others[-1])
    stack.settle()
    assert stack.tree.node_info(tails[-1]).marks == STORED
    stack.controller.evict(10**6)
    stack.controller.evict_host(10**6)
    stack.settle()
    with pytest.raises(Exception, match="node"):
        stack.tree.node_info(upper)
    stack.controller.reset()
    assert not waiting
    stack.check()


# ---- the order of the worker -----------------------------------------------------------------------------------------
def test_stores_are_done_one_after_the_other(tmp_path: Path) -> None:
    """A long one is not overtaken by what follows it, which storage would not take then."""
    with FileStorage(tmp_path) as storage:
        stack = Stack(host_pages=64)
        order: list[int] = []
        put_each = storage.put_each
        gate = threading.Event()

        def put(keys: Any, *arguments: Any, **more: Any) -> Any:
            assert gate.wait(60)
            order.append(len(keys))
            return put_each(keys, *arguments, **more)

        storage.put_each = put  # type: ignore[method-assign]
        workers = StorageWorkers(page_store(stack.host, storage), stack.config)
        pages = stack.host.alloc_pages(7)
        assert pages is not None
        digests = sha256_chain(prompt(1, 7), P)
        jobs = [
            workers.store(digests[:6], pages[:6], b""),
            workers.store(digests[6:], pages[6:], b"", after=digests[5].tobytes()),
        ]
        gate.set()
        assert all(job.wait(30) for job in jobs)
        assert order == [2, 2, 2, 1]
        assert [(job.pages, job.error) for job in jobs] == [(6, None), (1, None)]
        assert workers.close(5.0)


# ---- a dead store ----------------------------------------------------------------------------------------------------
def test_a_dead_store_fails_look_ups_and_raises_nothing() -> None:
    storage = FaultyStorage(MemoryStorage())
    stack = stored([], storage=storage, backoff_failures=3, backoff_base_s=1e6)
    for answers in (True, False, False, False):
        if not answers:
            storage.faults = dead()
        assert stack.controller.prefetch("r", prompt(1, 4), 0)
        assert stack.edge is not None
        stack.edge.run()
        polled = stack.controller.poll()
        assert (polled.revoked, polled.failed) == ((1, 0) if answers else (0, 1))
        assert stack.controller.finish_prefetch("r"), "the request goes on without"
        stack.compute(prompt(1, 4))
        stack.check()
    stats = stack.controller.stats()
    assert (stats.prefetch_revoked, stats.prefetch_failures, stats.backing_off) == (1, 3, True)
    assert not stack.controller.prefetch("r", prompt(1, 4), 0), "left alone"
    stack.settle()
    stack.check()


def test_what_a_dying_store_has_said_is_fetched_all_the_same() -> None:
    """It dies between two look-ups of one count; what was found until then may be there."""
    stack = stored(prompt(1, 6), prefetch_policy="wait_complete")
    assert stack.edge is not None
    find = stack.edge.pages.find_prefix
    stack.edge.pages.find_prefix = lambda digests, **more: find(digests[:4], **more)._replace(answered=False)
    assert prefetched(stack, prompt(1, 6))
    assert stack.controller.match(prompt(1, 6)).host_num_tokens == 4 * P
    assert stack.controller.stats().prefetch_failures == 1
    stack.check()


def test_a_dead_store_is_no_gap() -> None:
    storage = FaultyStorage(MemoryStorage())
    stack = make(storage=storage)
    upper = stack.compute(prompt(1, 2))
    stack.settle()
    stack.controller.store(upper)
    stack.settle()
    storage.faults = dead()
    lower = stack.compute(chat(prompt(1, 2), 2, 2))
    stack.settle()
    assert stack.controller.store(lower) is not None
    stack.settle()
    stats = stack.controller.stats()
    assert (stats.store_gaps, stats.store_failures) == (0, 1)
    assert stack.tree.node_info(upper).marks == STORED
    storage.faults.error = StorageError("still")
    stack.check()
