"""What counts as evictable can be evicted, whatever storage reads. At random, and with ranks: tests/hicache/rank.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from radixkv.controller.config import STORED
from radixkv.errors import TransferError
from radixkv.types import NodeInfo

from .kit import ROOT, P, ScriptedEdge, Stack, page_store, prompt


def info_of(stack: Stack, tokens: Any) -> NodeInfo:
    return stack.tree.node_info(stack.controller.match(tokens).host_node)


def mark_stored(stack: Stack, tokens: Any) -> None:
    """As if a node that was fetched stood below: what follows it may be stored, whatever is above it."""
    stack.tree.mark(stack.controller.match(tokens).device_node, set=STORED)


def parent_without_a_copy(**options: Any) -> tuple[Stack, Any]:
    """[2 pages | device] -- [2 pages | host], the latter about to be stored."""
    stack = Stack(storage=True, **options)
    tokens = prompt(1, 4)
    stack.mover.fail = lambda kind: TransferError("the parent's copy fails")
    stack.compute(tokens[: 2 * P], backup=False)
    stack.mover.fail = lambda kind: None
    node = stack.compute(tokens, backup=False)
    stack.controller.backup(node)
    stack.settle()
    assert stack.controller.evict(2 * P) == 2 * P
    assert info_of(stack, tokens).page_ids is None
    assert info_of(stack, tokens[: 2 * P]).host_page_ids is None
    mark_stored(stack, tokens)
    return stack, tokens


def evictable(stack: Stack) -> int:
    return stack.tree.stats().evictable_tokens


@pytest.mark.parametrize("begun", [False, True])
def test_a_store_does_not_keep_the_device_full(begun: bool) -> None:
    stack, tokens = parent_without_a_copy()
    stack.edge.begins = begun
    assert stack.controller.store(info_of(stack, tokens).node) is not None
    if begun:
        stack.edge.step("store")  # now it is in a call
    assert evictable(stack) == 2 * P
    assert stack.controller.evict(2 * P) == 2 * P
    assert len(stack.tree) == 0
    assert stack.controller.stats().stores_in_flight == 0
    assert stack.controller.stats().stuck_pages == 2
    stack.check()
    stack.edge.run()
    stack.controller.poll()
    assert stack.host.available_size() == stack.host.size
    assert stack.device.available == stack.device.capacity
    stack.check()


def test_a_store_goes_on_if_nothing_else_is_asked_for() -> None:
    stack, tokens = parent_without_a_copy()
    other = prompt(2, 2)
    stack.compute(other)
    stack.settle()
    stack.controller.store(info_of(stack, tokens).node)
    assert stack.controller.evict(2 * P) == 2 * P  # of the other prompt, though it is younger
    assert stack.controller.stats().stores_in_flight == 1
    stack.settle()
    assert info_of(stack, tokens).host_page_ids is not None
    stack.check()


def test_write_back_saves_what_is_above_a_store() -> None:
    """With room on the host nothing is dropped."""
    stack = Stack(storage=True, write_policy="write_back", store_after_backup=True)
    stack.mover.instant = True
    tokens = prompt(1, 4)
    stack.compute(tokens[: 2 * P])
    stack.compute(tokens)
    mark_stored(stack, tokens[: 2 * P])
    for left in (2 * P, 0):
        assert stack.controller.evict(2 * P) == 2 * P
        assert evictable(stack) == left
        stack.check()
    assert stack.controller.match(tokens).host_num_tokens == 4 * P
    stack.settle()
    assert stack.controller.stats().dropped_tokens == 0
    stack.check()


def test_write_back_without_room_drops_what_is_above_a_store() -> None:
    stack = Stack(host_pages=2, storage=True, write_policy="write_back", store_after_backup=True)
    stack.mover.instant = stack.edge.begins = True
    tokens = prompt(1, 4)
    stack.compute(tokens[: 2 * P])
    stack.compute(tokens)
    mark_stored(stack, tokens[: 2 * P])
    assert stack.controller.evict(2 * P) == 2 * P
    stack.edge.step("store")  # in a call: it reads the only host pages
    assert stack.controller.evict(10 * P) == 2 * P
    assert stack.controller.stats().dropped_tokens == 2 * P
    assert stack.controller.stats().stuck_pages == 2
    assert stack.host.available_size() == 0
    stack.check()
    stack.edge.run()
    stack.controller.poll()
    assert stack.host.available_size() == 2 * P
    stack.check()


def test_a_prefetch_does_not_keep_the_device_full() -> None:
    stack, tokens = parent_without_a_copy(prefetch_policy="wait_complete")
    longer = np.concatenate([tokens, prompt(3, 2)])
    assert stack.controller.prefetch("r", longer[4 * P :], info_of(stack, tokens).node)
    assert stack.controller.evict(2 * P) == 2 * P
    assert len(stack.tree) == 0
    stack.check()
    stack.settle()
    assert stack.controller.finish_prefetch("r")
    stack.check()
    assert stack.host.available_size() == stack.host.size


def test_two_storages_read_what_is_dropped() -> None:
    """The one that was detached hangs in a call, and so does the next: the pages return once, after both."""
    stack, tokens = parent_without_a_copy()
    first, second = stack.edge, ScriptedEdge(page_store(stack.host), stack.config, stack.host)
    first.close = lambda timeout_s: False
    for edge in (first, second):
        edge.begins = True
        if edge is second:
            stack.controller.detach_storage()
            stack.controller.attach_storage(edge)
            mark_stored(stack, tokens)
        assert stack.controller.store(info_of(stack, tokens).node) is not None
        edge.step("store")
    assert stack.controller.evict(2 * P) == 2 * P
    for edge in (first, second):
        assert stack.controller.stats().stuck_pages == 2
        stack.check()
        edge.run()
        stack.controller.poll()
    assert stack.host.available_size() == stack.host.size
    stack.check()


def test_nothing_is_promised_that_is_in_use() -> None:
    """What a load or a backup in flight holds does not count as evictable."""
    stack = Stack()
    tokens = prompt(1, 3)
    stack.compute(tokens)
    assert evictable(stack) == stack.controller.evict(10 * P) == 0  # it is being copied
    stack.settle()
    assert evictable(stack) == stack.controller.evict(10 * P) == 3 * P
    stack.controller.load(stack.controller.match(tokens).host_node)
    assert evictable(stack) == stack.controller.evict(10 * P) == 0
    stack.controller.start_loads()
    stack.settle()
    assert evictable(stack) == 3 * P
    assert stack.controller.match(tokens, "other").host_node == ROOT
