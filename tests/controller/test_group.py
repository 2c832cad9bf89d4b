"""Ranks that must decide alike: in threads, many runs; over torch.distributed with gloo, real processes."""

from __future__ import annotations

import importlib.util
import re
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from radixkv.controller import LocalGroup, TorchGroup
from radixkv.controller.agree import compare_ranks
from radixkv.errors import GroupError, InvalidArgumentError, LoadError, StorageError, TransferError
from radixkv.storage import MemoryStorage
from radixkv.tree.page_hash import sha256_chain

from .kit import ROOT, P, Stack, ThreadGroup, launch, on_ranks, page_store, prompt
from .soak import Soak, digest_of

torch_needed = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="torch is not installed")


# ---- threads ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("shared", [False, True], ids=["MHA", "MLA"])
def test_ranks_with_their_own_delays_and_failures_have_the_same_tree(size: int, shared: bool) -> None:
    for seed in range(6):
        storage = MemoryStorage() if shared else None
        on_ranks(size, lambda group: Soak(seed, group=group, shared=shared, storage=storage).run(400))  # noqa: B023


def test_a_copy_that_fails_on_one_rank_has_failed() -> None:
    def run(group: ThreadGroup) -> Any:
        stack = Stack(group=group)
        if group.rank == 1:
            stack.mover.fail = lambda kind: TransferError("rank 1 has a broken link")
        node = stack.compute(prompt(1, 3))
        if group.rank == 0:
            stack.mover.run()
        assert not stack.controller.poll()  # rank 1 has not ended
        stack.mover.run()
        polled = stack.controller.poll()
        stack.check()
        return polled.failed, stack.tree.node_info(node).host_page_ids is None, stack.host.available_size()

    results = on_ranks(2, run)
    assert results[0] == results[1] == (1, True, 64 * P)


def test_a_rank_that_gets_no_thread_parts_from_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    here, start = threading.local(), threading.Thread.start

    def start_on_rank_0(thread: threading.Thread) -> None:
        if thread.name.startswith("radixkv-") and getattr(here, "rank", 0) == 1:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_on_rank_0)

    def run(group: ThreadGroup) -> Any:
        here.rank = group.rank
        stack = Stack(group=group, threads=True, storage=MemoryStorage(), backoff_failures=100)
        node = stack.compute(prompt(1, 3))
        stack.settle(10**6)
        assert stack.controller.stats().backup_failures == 1
        here.rank = 0  # threads enough
        assert stack.controller.backup(node)
        stack.settle(10**6)
        here.rank = group.rank
        stack.controller.store(node)
        stack.controller.prefetch("r", prompt(2, 3), ROOT)
        stack.settle(10**6)
        while stack.controller.stats().prefetches_in_flight:
            stack.controller.poll()
        stack.controller.evict(3 * P)
        assert stack.controller.load(node)
        stack.controller.start_loads()
        stack.settle(10**6)
        stats = stack.controller.stats()
        assert (stats.store_failures, stats.prefetch_failures, stats.load_failures) == (1, 1, 1)
        stack.check()
        stack.close()
        return digest_of(stack.tree)

    first, second = on_ranks(2, run)
    assert first == second


def test_a_load_has_ended_when_it_has_ended_everywhere() -> None:
    def run(group: ThreadGroup) -> Any:
        stack = Stack(group=group)
        stack.compute(prompt(1, 3))
        stack.settle()
        stack.controller.evict(3 * P)
        node = stack.controller.match(prompt(1, 3)).host_node
        stack.controller.load(node)
        index = stack.controller.start_loads()
        if group.rank == 1:
            stack.mover.fail = lambda kind: TransferError("rank 1 has a broken link")
        else:
            stack.mover.run()
        assert not stack.controller.poll()
        assert stack.tree.node_info(node).loading
        stack.mover.run()
        assert stack.controller.poll().failed == 1
        with pytest.raises(LoadError):  # on the rank where it went well, too: it is not in the tree
            stack.controller.layer_counter.wait(0, 0.0, index)
        stack.check()
        return stack.controller.match(prompt(1, 3)).host_num_tokens

    assert on_ranks(2, run) == [3 * P, 3 * P]


def test_a_load_that_always_fails_on_one_rank_is_given_up_on_all() -> None:
    def run(group: ThreadGroup) -> Any:
        stack = Stack(group=group)
        tokens = prompt(1, 3)
        stack.compute(tokens)
        stack.settle()
        stack.controller.evict(3 * P)
        if group.rank == 1:
            stack.mover.fail = lambda kind: TransferError("rank 1 has a broken link")
        load = stack.controller.load(stack.controller.match(tokens).host_node)
        assert load is not None
        stack.controller.lock(load.node)
        stack.controller.start_loads()
        for _ in range(10):
            stack.mover.run()
            stack.controller.poll()
            stack.check()
        with pytest.raises(LoadError):
            stack.controller.layer_counter.wait(0, 0.0, stack.controller.layer_counter.latest)
        stack.controller.unlock(load.node)
        stack.controller.poll()
        stack.check()
        stats = stack.controller.stats()
        return stats.load_batches, stats.broken_loads, len(stack.tree), stack.device.available, group.calls

    first, second = on_ranks(2, run)
    assert first == second
    assert first[:4] == (3, 1, 0, 32)


def test_ranks_take_what_all_of_them_have_from_storage() -> None:
    def run(group: ThreadGroup) -> Any:
        stack = Stack(group=group, storage=True, store_after_backup=True, prefetch_policy="wait_complete")
        tokens = prompt(1, 6)
        stack.compute(tokens)
        stack.settle()
        stack.controller.reset()
        assert stack.edge is not None
        if group.rank == 0:  # it has lost the last two
            keys = stack.edge.pages.keys(sha256_chain(tokens, P))
            stack.edge.pages.storage.delete_many(keys[4:])
        stack.controller.prefetch("r", tokens, ROOT)
        while not stack.controller.finish_prefetch("r"):
            stack.edge.run()
            stack.controller.poll()
        stack.check()
        return stack.controller.match(tokens).host_num_tokens

    assert on_ranks(2, run) == [4 * P, 4 * P]


def test_of_mla_rank_0_stores_for_all() -> None:
    storage = MemoryStorage()
    puts: Counter[int] = Counter()

    def run(group: ThreadGroup) -> Any:
        stack = Stack(group=group, storage=storage, share_storage=True)
        assert stack.edge is not None
        set_pages = stack.edge.pages.set_pages

        def count(*arguments: Any, **more: Any) -> Any:
            puts[group.rank] += 1
            return set_pages(*arguments, **more)

        stack.edge.pages.set_pages = count  # type: ignore[method-assign]
        node = stack.compute(prompt(1, 3))
        stack.settle()
        stack.controller.store(node)
        if group.rank:
            assert not stack.controller.poll()  # rank 0 has not stored it yet
        else:
            stack.controller.poll()
        stack.settle()
        stack.check()
        return stack.tree.node_info(node).marks

    assert on_ranks(2, run) == [2, 2]
    assert set(puts) == {0}


def test_how_many_collectives_there_are() -> None:
    def run(group: ThreadGroup) -> Any:
        stack = Stack(group=group, storage=True, write_policy="write_back")
        stack.mover.instant = True
        calls = {"make": group.calls}

        def count(name: str, call: Any, *arguments: Any) -> None:
            before = group.calls
            call(*arguments)
            calls[name] = group.calls - before

        stack.compute(prompt(1, 3))
        count("idle poll", stack.controller.poll)
        count("evict", stack.controller.evict, 3 * P)
        stack.compute(prompt(2, 3))
        stack.controller.backup(stack.controller.match(prompt(2, 3)).device_node)
        stack.controller.prefetch("r", prompt(3, 3), ROOT)
        count("busy poll", stack.controller.poll)
        count("finish", stack.controller.finish_prefetch, "r")
        count("finish again", stack.controller.finish_prefetch, "r")
        count("evict nothing", stack.controller.evict, 0)
        count("match", stack.controller.match, prompt(1, 3))
        count("reset", stack.controller.reset)
        count("close", stack.controller.close)
        return calls

    expected = {
        "make": 2, "idle poll": 1, "evict": 1, "busy poll": 1, "finish": 1, "finish again": 0, "evict nothing": 0,
        "match": 0, "reset": 1, "close": 0,
    }  # fmt: skip
    assert on_ranks(2, run) == [expected, expected]


def test_ranks_that_were_made_differently_are_refused() -> None:
    def run(group: ThreadGroup) -> None:
        with pytest.raises(InvalidArgumentError, match="ranks differ in host pages: "):
            Stack(group=group, host_pages=16 + group.rank)
        wrong = "load_back_threshold: 0.0 (rank 0), 1.0 (rank 1); max_writes: 1.0 (rank 0), 2.0 (rank 1)"
        with pytest.raises(InvalidArgumentError, match=re.escape(f"ranks differ in {wrong}")):
            Stack(group=group, load_back_threshold=group.rank, max_writes=group.rank + 1)

    on_ranks(2, run)


def test_who_of_many_ranks_differs_is_named() -> None:
    def run(group: ThreadGroup) -> int:
        mine = {"model": "a" * 60, "write_policy": "write_back" if group.rank == 2 else "write_through"}
        with pytest.raises(InvalidArgumentError) as told:
            compare_ranks(group.min, group.rank, group.size, mine)
        assert str(told.value) == "ranks differ in write_policy: 'write_through' (rank 0, 1, 3), 'write_back' (rank 2)"
        with pytest.raises(InvalidArgumentError, match=r"ranks differ in more: 1 \(rank 0\), nothing \(rank 1, 2, 3\)"):
            compare_ranks(group.min, group.rank, group.size, {} if group.rank else {"more": 1})
        compare_ranks(group.min, group.rank, group.size, {"model": "a"})
        return group.calls

    assert on_ranks(4, run) == [5] * 4


def test_a_rank_that_makes_other_calls_is_found_out() -> None:
    def run(group: ThreadGroup) -> None:
        stack = Stack(group=group, storage=True)
        if group.rank == 0:
            stack.compute(prompt(1, 3))
            stack.mover.run()
        with pytest.raises((GroupError, AssertionError)):
            [stack.controller.poll() for _ in range(2)]

    on_ranks(2, run)


def test_a_rank_with_another_tree_is_found_out() -> None:
    """An allocation failed on rank 1 alone, so that it has evicted."""

    def run(group: ThreadGroup) -> None:
        stack = Stack(group=group, device_pages=8)
        stack.compute(prompt(1, 4))
        stack.settle()
        stack.device.refuse = group.rank
        assert stack.controller.alloc_pages(2) is not None
        with pytest.raises(GroupError, match="another tree than others"):
            stack.controller.poll()

    on_ranks(2, run)


def test_one_rank_agrees_with_itself() -> None:
    assert LocalGroup().min([3, 1]) == [3, 1]


# ---- processes -------------------------------------------------------------------------------------------------------
@torch_needed
def test_two_processes_have_the_same_tree_and_notice_a_lost_one(tmp_path: Path) -> None:
    lost = ["parted", "hang", "exit"]
    results = launch(tmp_path, 2, scenarios=["soak", *lost], seeds=[1, 2, 3, 4], steps=300)
    assert results[0]["soak"]["served_pages"] > 0
    assert results[1] == {}  # dead
    for scenario in lost:
        told = results[0][scenario]
        assert told["seconds"] < 3.0, f"{scenario}: {told}"  # the deadline is 1 s
        assert told["after_s"] < 1.0, f"{scenario}: {told}"
        assert told["error"].startswith("rank 0"), f"{scenario}: {told}"


@torch_needed
def test_four_processes_have_the_same_tree(tmp_path: Path) -> None:
    results = launch(tmp_path, 4, scenarios=["soak"], seeds=[5, 6], steps=300)
    assert all(result["soak"]["served_pages"] > 0 for result in results)


@torch_needed
def test_torch_group_needs_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)  # another test may have initialised it
    with pytest.raises(GroupError, match="not initialised"):
        TorchGroup()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(GroupError, match="needs torch"):
        TorchGroup()


@pytest.mark.parametrize("where", ["made before", "made inside", "refuses to be asked"])
def test_storage_is_attached_on_all_ranks_or_none(where: str) -> None:
    def run(group: ThreadGroup) -> Any:
        stack = Stack(threads=True, group=group)
        store = page_store(stack.host)

        def broken() -> Any:
            raise StorageError("cannot be reached from here")

        storage: Any = store
        if where == "made inside":
            storage = broken if group.rank else lambda: store
        elif group.rank:
            store.lost = broken  # type: ignore[method-assign]
        if where == "made before" and not group.rank:
            storage = lambda: store  # noqa: E731  # a function here, a PageStore there: both are fine
        with pytest.raises(StorageError, match="from here" if group.rank else "another rank"):
            stack.controller.attach_storage(storage)
        assert stack.controller.storage is None
        for step in range(2):  # they go on together
            assert not stack.controller.prefetch(f"r{step}", prompt(1, 8), ROOT)
            stack.controller.poll()
        stack.controller.attach_storage(lambda: page_store(stack.host))
        assert stack.controller.prefetch("r", prompt(1, 8), ROOT)
        stack.controller.poll()
        stack.controller.cancel_prefetch("r")
        stack.settle(10**6)
        stack.check()
        return stack.controller.close()

    assert on_ranks(2, run) == [True, True]


def test_a_rank_that_never_comes_to_attach_is_an_error() -> None:
    made = threading.Event()

    def run(group: ThreadGroup) -> None:
        stack = Stack(group=group)
        if group.rank:
            assert made.wait(30)
            group.leave()
            return
        made.set()
        with pytest.raises(GroupError):
            stack.controller.attach_storage(page_store(stack.host))
        assert stack.controller.storage is None
        assert not stack.controller.prefetch("r", prompt(1, 8), ROOT)

    on_ranks(2, run)


def test_a_slow_copy_of_one_rank_does_not_break_a_group_of_less_patience() -> None:
    """It waits for its copy half of the time that the others wait for it; then it is given up, on all."""
    groups, results = ThreadGroup.make(2, timeout_s=2.0), {}

    def run(group: ThreadGroup) -> None:
        group.timeout_s = 0.2
        stack = Stack(device_pages=4, group=group, copy_timeout_s=30.0)
        stack.compute(prompt(1, 4))
        if group.rank == 0:
            stack.mover.run()
        stack.controller.evict(4 * P)
        stack.settle()
        stack.check()
        results[group.rank] = stack.tree.stats()

    threads = [threading.Thread(target=run, args=(group,)) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1]
