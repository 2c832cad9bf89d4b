"""Host to device: quotas, batches, layers, failures."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest

from radixkv import RadixTree
from radixkv.controller import LayerCounter, Load
from radixkv.errors import GroupError, InvalidArgumentError, LoadError, LockError, TransferError
from radixkv.pool.states import MemoryStateInt
from radixkv.transfer.cpu import Progress
from radixkv.types import NodeInfo

from .kit import GEOMETRY, ROOT, P, Stack, content_of, prompt


def refuse(kind: str) -> BaseException:
    return TransferError("the link is down")


def on_host(stack: Stack, *prompts: Any) -> list[int]:
    """The prompts are on the host only. Returns: their last nodes."""
    for tokens in prompts:
        stack.compute(tokens)
    stack.settle()
    stack.controller.evict(10**6)
    nodes = [stack.controller.match(tokens).host_node for tokens in prompts]
    stack.check()
    return nodes


def test_several_loads_become_one_copy() -> None:
    stack = Stack()
    first, second = on_host(stack, prompt(1, 3), prompt(2, 2))
    loads = [stack.controller.load(first), stack.controller.load(second)]
    assert [load.num_tokens for load in loads if load] == [3 * P, 2 * P]
    assert stack.controller.load(first) is None  # it is on its way
    assert stack.mover.waiting == []
    assert stack.controller.start_loads() == 0
    assert stack.controller.start_loads() == -1
    assert len(stack.mover.waiting) == 1
    stack.check()
    stack.mover.run()
    assert stack.controller.poll().loads == 2
    assert stack.serve(prompt(1, 3)) == 3 * P
    assert stack.serve(prompt(2, 2)) == 2 * P
    stack.check()


def test_the_whole_tail_comes_back_in_key_order() -> None:
    stack = Stack()
    tokens = prompt(1, 6)
    for pages in (2, 4, 6):
        stack.compute(tokens[: pages * P])
    [node] = on_host(stack, tokens)
    load = stack.controller.load(node)
    assert load is not None
    assert load.num_tokens == 6 * P
    assert np.array_equal(stack.controller.match(tokens).page_ids(), load.page_ids)
    stack.controller.start_loads()
    stack.settle()
    assert stack.serve(tokens) == 6 * P


def test_the_pages_of_a_load_are_the_callers_to_change() -> None:
    stack = Stack()
    [node] = on_host(stack, prompt(1, 3))
    load = stack.controller.load(node)
    assert load is not None
    load.page_ids[:] *= P  # slots
    stack.controller.start_loads()
    stack.mover.run()
    stack.controller.poll()
    assert stack.serve(prompt(1, 3)) == 3 * P
    stack.check()


def test_host_pages_are_not_evicted_before_the_load_has_been_settled() -> None:
    stack = Stack()
    [node] = on_host(stack, prompt(1, 3))
    stack.controller.load(node)
    pages = stack.tree.node_info(node).host_page_ids
    for step in (stack.controller.start_loads, stack.mover.run):
        assert stack.controller.evict_host(10**6) == 0
        assert stack.controller.evict(10**6) == 0
        assert set(stack.host.states_of(pages)) == {MemoryStateInt.PROTECTED}
        step()
    stack.controller.poll()
    assert set(stack.host.states_of(pages)) == {MemoryStateInt.SYNCED}
    stack.check()


@pytest.mark.parametrize(("policy", "loaded"), [("all", 0), ("longest_prefix", 4)])
def test_a_quota_refuses_or_cuts(policy: str, loaded: int) -> None:
    stack = Stack(load_policy=policy)
    tokens = prompt(1, 6)
    stack.compute(tokens[: 3 * P])
    [node] = on_host(stack, tokens)
    load = stack.controller.load(node, quota_tokens=4 * P + 1)
    assert (load.num_tokens if load else 0) == loaded * P
    if load:
        match = stack.controller.match(tokens)
        assert (match.num_tokens, match.host_num_tokens, match.device_node) == (4 * P, 2 * P, load.node)
    stack.check()
    assert stack.controller.load(node, quota_tokens=6 * P) is not None
    stack.check()


def test_the_quota_is_less_by_what_protecting_the_path_takes() -> None:
    stack = Stack()
    tokens = prompt(1, 6)
    stack.compute(tokens[: 3 * P])
    stack.compute(tokens)
    stack.settle()
    stack.controller.evict(3 * P)  # the lower half; the upper is evictable, until the load protects it
    node = stack.controller.match(tokens).host_node
    assert stack.controller.load(node, quota_tokens=6 * P - 1) is None
    assert stack.controller.load(node, quota_tokens=6 * P) is not None
    stack.check()


def test_short_tails_are_computed_again() -> None:
    stack = Stack(load_back_threshold=2 * P + 1)
    short, long = on_host(stack, prompt(1, 2), prompt(2, 3))
    assert stack.controller.load(short) is None
    assert stack.controller.load(long) is not None
    assert stack.controller.load(0) is None


def test_what_costs_more_than_computing_is_computed() -> None:
    stack = Stack(load_policy="cost", load_base_ns=1000 * P, load_ns_per_token=100, compute_ns_per_token=500)
    short, long = on_host(stack, prompt(1, 2), prompt(2, 3))
    assert stack.controller.load(short) is None  # 1,000 + 200 against 1,000 (times P)
    assert stack.controller.load(long) is not None
    stack.check()


def test_a_load_evicts_once_and_retries() -> None:
    stack = Stack(device_pages=4)
    [node] = on_host(stack, prompt(1, 3))
    busy = stack.compute(prompt(2, 4), backup=False)
    stack.controller.lock(busy)
    assert stack.controller.load(node) is None
    assert stack.controller.stats().refused_loads == 1
    stack.check()
    stack.controller.unlock(busy)
    assert stack.controller.load(node) is not None
    stack.check()


def test_a_load_can_be_taken_back_until_it_is_started() -> None:
    stack = Stack()
    [node] = on_host(stack, prompt(1, 3))
    load = stack.controller.load(node)
    assert load is not None
    stack.controller.lock(node)
    with pytest.raises(LockError):
        stack.controller.cancel_load(load)
    stack.check()
    stack.controller.unlock(node)
    assert stack.controller.cancel_load(load)
    stack.check()
    assert stack.device.available == stack.device.capacity
    load = stack.controller.load(node)
    stack.controller.start_loads()
    assert isinstance(load, Load)
    assert not stack.controller.cancel_load(load)
    stack.settle()
    stack.check()


def test_what_is_computed_again_is_in_sync_with_its_host_copy() -> None:
    stack = Stack()
    tokens = prompt(1, 6)
    stack.compute(tokens[: 2 * P])
    on_host(stack, tokens)
    stack.compute(tokens[: 4 * P])  # adopts the first node, and half of the second
    stack.check()
    assert stack.controller.stats().writes_in_flight == 0
    match = stack.controller.match(tokens)
    assert (match.num_tokens, match.host_num_tokens) == (4 * P, 2 * P)
    assert stack.controller.evict(4 * P) == 4 * P  # without another copy
    assert stack.controller.match(tokens).host_num_tokens == 6 * P
    stack.check()


def test_an_insert_does_not_free_what_a_copy_is_filling() -> None:
    stack = Stack()
    tokens = prompt(1, 3)
    [node] = on_host(stack, tokens)
    load = stack.controller.load(node)
    assert load is not None
    stack.controller.start_loads()
    pages = stack.device.alloc(3)
    assert pages is not None
    stack.device.data[pages] = content_of(tokens)
    result = stack.controller.insert(tokens, pages)  # somebody has computed it meanwhile
    assert result.duplicate_page_ids.tolist() == pages.tolist()
    stack.device.free(result.duplicate_page_ids)
    stack.check()
    stack.settle()
    assert np.array_equal(stack.controller.match(tokens).page_ids(), load.page_ids)
    assert stack.serve(tokens) == 3 * P
    stack.check()


def test_a_request_that_goes_away_during_its_load_leaks_nothing() -> None:
    stack = Stack()
    [node] = on_host(stack, prompt(1, 3))
    stack.controller.load(node)
    stack.controller.lock(node)
    stack.controller.start_loads()
    stack.controller.unlock(node)  # it is gone
    assert stack.controller.evict(3 * P) == 0  # the copy is not
    stack.settle()
    assert stack.controller.evict(3 * P) == 3 * P
    assert stack.device.available == stack.device.capacity
    stack.check()


# ---- failure ---------------------------------------------------------------------------------------------------------
def test_a_load_that_fails_is_undone_and_whoever_waits_is_told() -> None:
    stack = Stack()
    [node] = on_host(stack, prompt(1, 3))
    stack.mover.fail = refuse
    stack.controller.load(node)
    index = stack.controller.start_loads()
    told: list[BaseException] = []
    stack.controller.layer_counter.set_consumer(index)

    def forward() -> None:
        try:
            stack.controller.layer_counter.wait_until(0)
        except LoadError as error:
            told.append(error)

    thread = threading.Thread(target=forward)
    thread.start()
    stack.mover.run()
    thread.join()
    assert "the link is down" in str(told[0])
    assert stack.controller.poll().failed == 1
    assert stack.controller.match(prompt(1, 3)).host_num_tokens == 3 * P
    assert stack.device.available == stack.device.capacity
    stack.check()
    with pytest.raises(LoadError):  # who comes late is told, too
        stack.controller.layer_counter.wait(0, 0.0)


def test_a_failed_load_whose_pages_somebody_holds_is_copied_again() -> None:
    stack = Stack()
    [node] = on_host(stack, prompt(1, 3))
    stack.mover.fail = refuse
    stack.controller.load(node)
    index = stack.controller.start_loads()
    stack.controller.lock(node)
    stack.mover.run()
    stack.controller.poll()
    stack.check()
    assert stack.controller.match(prompt(1, 3)).loading_tokens == 3 * P
    with pytest.raises(LoadError):
        stack.controller.layer_counter.wait(1, 0.0, index)
    stack.mover.fail = lambda kind: None
    stack.mover.run()
    assert stack.controller.layer_counter.wait(1, 0.0, stack.controller.layer_counter.latest)
    stack.controller.poll()
    stack.controller.unlock(node)
    assert stack.serve(prompt(1, 3)) == 3 * P
    stack.check()


def test_a_load_that_always_fails_is_given_up() -> None:
    """However long somebody holds it; then its nodes leave the host, and the next request computes."""
    stack = Stack()
    tokens = prompt(1, 3)
    node, other = on_host(stack, tokens, prompt(2, 2))
    copies = Counter[str]()
    stack.mover.fail = lambda kind: (copies.update([kind]), TransferError("the link is down"))[1]
    stack.controller.load(node)
    stack.controller.lock(node)
    stack.controller.start_loads()
    for _ in range(10):
        stack.mover.run()
        stack.controller.poll()
        stack.check()
    with pytest.raises(LoadError):
        stack.controller.layer_counter.wait(0, 0.0, stack.controller.layer_counter.latest)
    assert copies["load"] == 3
    assert stack.controller.stats().broken_loads == 1
    assert stack.controller.stats().loads_in_flight == 1
    assert list(stack.controller.in_flight().loads) == [node]

    stack.mover.fail = lambda kind: None
    stack.controller.load(other)  # while the broken one matches, nobody can tell who has matched it
    index = stack.controller.start_loads()
    stack.mover.run()
    stack.controller.poll()
    with pytest.raises(LoadError, match="the link is down"):
        stack.controller.layer_counter.wait(0, 0.0, index)

    stack.controller.unlock(node)
    stack.controller.poll()
    stack.check()
    assert stack.controller.stats().loads_in_flight == 0
    assert stack.controller.match(tokens).host_node == ROOT
    stack.controller.evict(10 * P)
    assert stack.device.available == stack.device.capacity
    assert stack.host.available_size() == stack.host.size - 2 * P
    stack.compute(tokens)
    stack.settle()
    assert stack.serve(tokens) == 3 * P
    stack.controller.load(other)
    index = stack.controller.start_loads()
    stack.mover.run()
    assert stack.controller.layer_counter.wait(0, 0.0, index)


def test_a_broken_load_that_is_held_costs_no_walk_over_the_tree() -> None:
    class Walked(RadixTree):
        walks = 0

        def dump(self) -> list[NodeInfo]:
            self.walks += 1
            return super().dump()

    tree = Walked(P)
    stack = Stack(tree=tree, load_attempts=1)
    (node,) = on_host(stack, prompt(1, 3))
    stack.mover.fail = lambda kind: TransferError("the link is down")
    stack.controller.load(node)
    stack.controller.lock(node)
    stack.controller.start_loads()
    stack.mover.run()
    tree.walks = 0
    for _ in range(5):
        stack.controller.poll()
    assert (stack.controller.stats().loads_in_flight, tree.walks) == (1, 0)
    stack.controller.unlock(node)
    stack.controller.poll()
    assert stack.controller.stats().loads_in_flight == 0
    stack.check()


def test_what_fails_for_one_request_after_the_other_leaves_the_host() -> None:
    stack = Stack(load_attempts=2, storage=True)
    tokens = prompt(1, 4)
    upper, lower = on_host(stack, tokens[: 2 * P], tokens)
    stack.controller.store(upper)
    stack.controller.store(lower)  # which keeps it for a while
    stack.mover.fail = lambda kind: TransferError("the link is down")
    for _ in range(2):
        assert stack.controller.load(lower)
        stack.controller.start_loads()
        stack.mover.run()
        stack.controller.poll()
        stack.check()
    assert stack.controller.match(tokens).host_num_tokens == 4 * P
    assert stack.controller.load(lower) is None  # it will not be tried again
    stack.settle()
    assert stack.controller.match(tokens).host_node == ROOT
    assert stack.host.available_size() == stack.host.size
    stack.check()


def test_what_was_computed_below_a_broken_load_does_not_hold_it() -> None:
    stack = Stack(load_attempts=1)
    tokens = prompt(1, 6)
    on_host(stack, tokens[: 4 * P])
    match = stack.controller.match(tokens[: 4 * P])
    load = stack.controller.load(match.host_node)
    assert load is not None
    stack.controller.start_loads()
    fresh = stack.controller.alloc_pages(2)
    assert fresh is not None
    first = tokens[: 2 * P]  # splits what is being loaded
    result = stack.controller.insert(
        np.concatenate([first, prompt(2, 2)]), np.concatenate([load.page_ids[:2], fresh]), backup=False
    )
    stack.controller.lock(result.node)
    stack.mover.fail = lambda kind: TransferError("the link is down")
    stack.mover.run()
    stack.controller.poll()
    assert stack.controller.match(first).loading_tokens == 2 * P
    stack.check()
    stack.controller.unlock(result.node)
    stack.controller.poll()
    stack.check()
    assert stack.device.available == stack.device.capacity
    assert stack.controller.match(first).num_tokens == 0


def test_who_matched_a_load_that_failed_is_told_by_its_own_batch() -> None:
    """Batch 1 succeeds, but its request may have matched what batch 0 did not bring."""
    stack = Stack()
    tokens = prompt(1, 6)
    first, second = on_host(stack, tokens[: 3 * P], prompt(2, 2))
    stack.mover.fail = refuse
    stack.controller.load(first)
    stack.controller.start_loads()
    stack.controller.load(second)
    index = stack.controller.start_loads()
    stack.mover.step()
    stack.mover.fail = lambda kind: None
    stack.mover.step()
    counter = stack.controller.layer_counter
    with pytest.raises(LoadError, match="load batch 0"):
        counter.wait(1, 0.0, index)
    stack.controller.poll()
    with pytest.raises(LoadError, match="batch 1 depends on"):  # still so once they have been settled
        counter.wait(1, 0.0, index)
    stack.controller.load(first)
    last = stack.controller.start_loads()
    stack.mover.run()
    assert counter.wait(1, 0.0, last)  # but who comes after that does not depend on it
    stack.settle()
    stack.check()


# ---- the counter -----------------------------------------------------------------------------------------------------
def test_layers_complete_one_by_one() -> None:
    counter = LayerCounter(3)
    assert (counter.latest, counter.next_producer()) == (-1, 0)
    counter.wait_until(0)  # nothing to wait for
    progress = Progress(3)
    index = counter.begin(progress)
    counter.set_consumer(index)
    assert not counter.wait(0, 0.0)
    progress.begin(3)
    progress.advance(2)
    counter.wait_until(0)
    counter.wait_until(1)
    assert not counter.wait(2, 0.0)
    progress.advance(3)
    counter.wait_until(2)
    counter.settle(index)
    counter.wait_until(2)
    assert counter.next_producer() == 1


def test_a_consumer_that_waits_too_long_is_told() -> None:
    counter = LayerCounter(2, timeout_s=0.001)
    counter.set_consumer(counter.begin(Progress(2)))
    with pytest.raises(LoadError, match=r"after 0\.001 s"):
        counter.wait_until(0)


def test_reset_wakes_who_waits() -> None:
    counter = LayerCounter(2)
    progress = Progress(2)
    index = counter.begin(progress)
    counter.reset()
    with pytest.raises(LoadError, match="reset"):
        counter.wait(0, 0.0, index)
    assert counter.latest == index
    assert counter.consumer_index == -1


def test_layers_and_batches_that_there_are_not() -> None:
    counter = LayerCounter(2)
    with pytest.raises(InvalidArgumentError, match="layer 2"):
        counter.wait(2, 0.0, 0)
    with pytest.raises(InvalidArgumentError, match="batch 0 has not begun"):
        counter.wait(0, 0.0, 0)


def test_failures_are_remembered_but_not_for_ever() -> None:
    counter = LayerCounter(1)
    for _ in range(300):
        index = counter.begin(Progress(1))
        counter.settle(index, TransferError("down"))
    with pytest.raises(LoadError):
        counter.wait(0, 0.0, index)
    assert counter.wait(0, 0.0, 0)
    assert GEOMETRY.num_layers == 2


def test_a_load_whose_eviction_raises_protects_nothing() -> None:
    """A rank has gone while an eviction waits for the others."""
    stack = Stack()
    stack.compute(prompt(1, 3))
    stack.settle()
    stack.controller.evict(3 * P)
    node = stack.controller.match(prompt(1, 3)).host_node

    def gone(num_pages: int) -> None:
        raise GroupError("rank 1 is gone")

    stack.controller._room.alloc_for_load = gone  # type: ignore[method-assign,assignment]
    with pytest.raises(GroupError):
        stack.controller.load(node)
    assert stack.tree.node_info(node).host_ref == 0
    stack.check()
    assert stack.controller.evict_host(3 * P) == 3 * P
