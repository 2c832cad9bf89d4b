"""Device to host: write-through, write-through selective, write-back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from radixkv.controller import STORING, WRITING
from radixkv.errors import TransferError

from .kit import P, Stack, prompt


def refuse(kind: str) -> BaseException:
    return TransferError("the link is down")


# ---- write-through ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("policy", "hits"), [("write_through", 1), ("write_through_selective", 3)])
def test_a_node_is_copied_at_its_nth_hit(policy: str, hits: int) -> None:
    stack = Stack(write_policy=policy)
    for hit in range(1, hits + 1):
        assert stack.controller.stats().writes_in_flight == 0
        node = stack.compute(prompt(1, 3))
        assert stack.controller.stats().writes_in_flight == (hit == hits)
    stack.check()
    assert stack.tree.node_info(node).lock_ref == 1  # not evicted under the copy
    stack.settle()
    info = stack.tree.node_info(node)
    assert (info.lock_ref, info.marks) == (0, 0)
    assert come_back(stack, prompt(1, 3)) == 3 * P
    stack.close()


def come_back(stack: Stack, tokens: Any) -> int:
    """Evict all, load a prompt back, check its bytes. Returns: tokens served."""
    stack.controller.evict(10**6)
    stack.controller.load(stack.controller.match(tokens).host_node)
    stack.controller.start_loads()
    stack.settle()
    stack.check()
    return stack.serve(tokens)


def test_thresholds_can_be_set() -> None:
    stack = Stack(write_through_threshold=2)
    stack.compute(prompt(1, 3))
    assert stack.controller.stats().writes_in_flight == 0
    stack.compute(prompt(1, 3))
    assert stack.controller.stats().writes_in_flight == 1


def test_a_node_is_not_copied_again_while_its_copy_is_in_flight() -> None:
    stack = Stack()
    node = stack.compute(prompt(1, 3))
    for _ in range(3):
        stack.compute(prompt(1, 3))
        assert stack.controller.backup(node) == 0
    assert stack.controller.stats().writes_in_flight == 1
    assert stack.host.available_size() == stack.host.size - 3 * P
    stack.check()


def test_a_split_while_the_copy_is_in_flight_leaves_both_parts_with_their_host_pages() -> None:
    stack = Stack()
    tokens = prompt(1, 4)
    lower = stack.compute(tokens)
    stack.compute(np.concatenate([tokens[: 2 * P], prompt(2, 1)]))  # splits after two pages
    upper = stack.tree.node_info(lower).parent
    assert stack.tree.node_info(upper).marks == WRITING
    assert stack.controller.stats().writes_in_flight == 2  # the upper part is not written again
    stack.check()
    stack.settle()
    assert come_back(stack, tokens) == 4 * P


def test_a_copy_that_fails_gives_everything_back_and_is_tried_at_the_next_hit() -> None:
    stack = Stack()
    stack.mover.fail = refuse
    node = stack.compute(prompt(1, 3))
    assert [polled.failed for polled in stack.settle()] == [1]
    info = stack.tree.node_info(node)
    assert (info.lock_ref, info.marks, info.host_page_ids) == (0, 0, None)
    assert stack.host.available_size() == stack.host.size
    stack.check()
    stack.mover.fail = lambda kind: None
    stack.compute(prompt(1, 3))
    stack.settle()
    assert stack.tree.node_info(node).host_page_ids is not None
    assert stack.controller.stats().backup_failures == 1


def test_a_mover_that_refuses_is_a_copy_that_failed() -> None:
    stack = Stack()

    def backup(*pages: Any) -> Any:
        raise TransferError("no context")

    stack.mover.backup = backup
    stack.compute(prompt(1, 3))
    stack.check()
    assert stack.controller.poll().failed == 1
    stack.check()
    assert stack.host.available_size() == stack.host.size


def test_no_room_on_the_host_evicts_once_and_retries() -> None:
    stack = Stack(host_pages=4)
    stack.compute(prompt(1, 3))
    stack.settle()
    second = stack.compute(prompt(2, 3))
    assert stack.controller.stats().refused_backups == 1  # the first is on the device: its copy may not go
    assert stack.controller.evict(3 * P) == 3 * P
    assert stack.controller.backup(second) == 3 * P
    assert stack.controller.stats().host_evicted_tokens == 3 * P
    stack.settle()
    stack.check()


def test_writes_in_flight_are_bounded() -> None:
    stack = Stack(max_writes=2)
    for seed in range(4):
        stack.compute(prompt(seed, 1))
    stats = stack.controller.stats()
    assert (stats.writes_in_flight, stats.refused_backups) == (2, 2)
    stack.settle()
    stack.check()


@pytest.mark.parametrize("begun", [False, True], ids=["not begun", "begun"])
def test_a_pending_write_has_a_deadline(begun: bool) -> None:
    now_s = [0.0]
    stack = Stack(write_timeout_s=5.0, clock=lambda: now_s[0])
    stack.mover.begins = begun
    node = stack.compute(prompt(1, 3))
    for now_s[0] in (100.0, 104.9):  # nobody polled before
        assert not stack.controller.poll()
    now_s[0] = 105.0
    assert stack.controller.poll().failed == 1
    info = stack.tree.node_info(node)
    assert (info.lock_ref, info.marks, info.host_page_ids) == (0, 0, None)
    assert stack.controller.stats().stuck_pages == (3 if begun else 0)  # what runs may still write them
    stack.check()
    assert stack.controller.evict(3 * P) == 3 * P
    stack.mover.run()
    stack.controller.poll()
    assert stack.host.available_size() == stack.host.size
    stack.check()


def test_a_scheduler_that_seldom_polls_gets_its_backups() -> None:
    """SGLang's polls only while a request waits: what a quiet hour began must not be given up by the first one."""
    now_s = [0.0]
    stack = Stack(threads=True, clock=lambda: now_s[0])
    node = stack.compute(prompt(1, 3))
    now_s[0] += 3600.0
    assert not stack.controller.poll()  # begins the copy
    assert stack.controller._writes.operations[0].ticket.wait(30)
    now_s[0] += 3600.0
    assert stack.controller.poll().writes == 1
    assert stack.tree.node_info(node).host_page_ids is not None
    stack.check()
    stack.close()


def test_pressure_raises_an_adaptive_threshold() -> None:
    stack = Stack(adaptive_thresholds=True, max_writes=4, host_pages=64)
    policy = stack.controller._policy
    assert policy.hits_to_host == 1
    for seed in range(2):
        stack.compute(prompt(seed, 1))
    assert policy.hits_to_host == 2  # half of max_writes are in flight
    stack.settle()
    assert policy.hits_to_host == 1
    stack.host.alloc(60 * P)
    assert policy.hits_to_host == 2  # less than a tenth of the host is to be had


def test_what_is_loading_pending_host_only_or_unknown_is_not_backed_up() -> None:
    stack = Stack()
    node = stack.compute(prompt(1, 3))
    stack.settle()
    assert stack.controller.backup(node) == 0  # has its copy
    stack.controller.evict(3 * P)
    assert stack.controller.backup(node) == 0  # host-only
    stack.controller.load(node)
    assert stack.controller.backup(node) == 0  # loading
    assert stack.controller.backup(0) == 0


def test_without_a_host_tier_evicting_drops() -> None:
    from radixkv import RadixTree
    from radixkv.controller import Controller

    from .kit import DeviceMemory

    device = DeviceMemory(8)
    controller = Controller(RadixTree(P), device)
    node = controller.insert(prompt(1, 3), device.alloc(3)).node
    assert controller.backup(node) == 0
    assert controller.load(node) is None
    assert controller.evict(100) == 3 * P
    controller.poll()
    controller.check_integrity(np.zeros(0, np.int32))
    controller.reset()
    controller.close()


# ---- write-back ------------------------------------------------------------------------------------------------------
def test_write_back_copies_on_eviction_only() -> None:
    stack = Stack(write_policy="write_back")
    stack.mover.instant = True
    tokens = prompt(1, 6)
    for _ in range(4):
        stack.compute(tokens)
    assert stack.controller.stats().host_tokens == 0 == stack.tree.stats().host_tokens
    assert stack.controller.evict(6 * P) == 6 * P
    stack.check()
    match = stack.controller.match(tokens)
    assert (match.num_tokens, match.host_num_tokens) == (0, 6 * P)
    stack.controller.load(match.host_node)
    stack.controller.start_loads()
    stack.settle()
    assert stack.serve(tokens) == 6 * P
    stack.check()


def test_write_back_of_a_chain_goes_in_rounds() -> None:
    stack = Stack(write_policy="write_back")
    stack.mover.instant = True
    tokens = prompt(1, 6)
    for pages in (2, 4, 6):
        stack.compute(tokens[: pages * P])
    assert len(stack.tree) == 3
    assert stack.controller.evict(6 * P) == 6 * P
    assert stack.controller.match(tokens).host_num_tokens == 6 * P
    stack.check()


def test_write_back_with_a_full_unevictable_host_drops_and_counts() -> None:
    stack = Stack(write_policy="write_back", host_pages=4)
    stack.mover.instant = True
    stack.host.alloc(3 * P)  # somebody else's
    stack.compute(prompt(1, 3))
    stack.compute(prompt(2, 1))
    assert stack.controller.evict(4 * P) == 4 * P
    stats = stack.controller.stats()
    assert (stats.dropped_nodes, stats.dropped_tokens, stats.write_back_tokens) == (1, 3 * P, P)
    assert stack.controller.match(prompt(1, 3)).host_num_tokens == 0
    assert stack.controller.match(prompt(2, 1)).host_num_tokens == P


def test_a_write_back_that_fails_drops() -> None:
    stack = Stack(write_policy="write_back")
    stack.mover.instant = True
    stack.mover.fail = refuse
    stack.compute(prompt(1, 3))
    assert stack.controller.evict(3 * P) == 3 * P
    assert stack.controller.stats().dropped_tokens == 3 * P
    assert stack.host.available_size() == stack.host.size
    stack.check()


def test_a_write_back_that_does_not_begin_in_time_is_cancelled() -> None:
    stack = Stack(write_policy="write_back", copy_timeout_s=0.001)
    stack.compute(prompt(1, 3))
    assert stack.controller.evict(3 * P) == 3 * P
    assert stack.host.available_size() == stack.host.size
    assert stack.controller.stats().stuck_pages == 0
    stack.check()


def test_a_write_back_that_does_not_end_in_time_keeps_its_host_pages_until_it_does() -> None:
    stack = Stack(write_policy="write_back", copy_timeout_s=0.001)
    stack.mover.begins = True
    stack.compute(prompt(1, 3))
    assert stack.controller.evict(3 * P) == 3 * P  # the device has them back: that they are read does no harm
    assert stack.host.available_size() == stack.host.size - 3 * P
    assert stack.controller.stats().stuck_pages == 3
    stack.check()
    stack.controller.poll()
    assert stack.controller.stats().stuck_pages == 3
    stack.mover.run()
    stack.controller.poll()
    assert stack.controller.stats().stuck_pages == 0
    assert stack.host.available_size() == stack.host.size
    stack.check()


def test_evicting_an_unbacked_node_returns_the_host_pages_below_it() -> None:
    stack = Stack(write_through_threshold=2)
    tokens = prompt(1, 4)
    stack.compute(tokens[: 2 * P])
    stack.compute(tokens, backup=False)
    child = stack.controller.match(tokens).device_node
    stack.controller.backup(child)
    stack.settle()
    assert stack.controller.evict(2 * P) == 2 * P  # the child, now on the host only
    assert stack.controller.evict(2 * P) == 2 * P  # its parent, which has no copy: both leave the tree
    assert len(stack.tree) == 0
    assert stack.host.available_size() == stack.host.size
    stack.check()


def test_write_back_and_storage_without_hits() -> None:
    stack = Stack(write_policy="write_back", storage=True, store_after_backup=True)
    stack.mover.instant = True
    node = stack.compute(prompt(1, 3))
    stack.controller.evict(3 * P)
    assert stack.tree.node_info(node).marks == STORING
    stack.settle()
    assert stack.controller.stats().store_tokens == 3 * P
    stack.check()
