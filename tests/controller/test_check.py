"""check_integrity can fail: each kind of damage is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from radixkv.controller import STORING, WRITING
from radixkv.errors import IntegrityError
from radixkv.pool.states import MemoryStateInt

from .kit import ROOT, P, Stack, prompt


def busy() -> Stack:
    """Something of everything."""
    stack = Stack(storage=True)
    nodes = [stack.compute(prompt(seed, 3)) for seed in (1, 2)]
    stack.settle()
    stack.controller.evict(3 * P)
    stack.controller.load(stack.controller.match(prompt(1, 3)).host_node)
    stack.controller.store(nodes[1])
    stack.controller.prefetch("r", prompt(4, 3), ROOT)
    stack.compute(prompt(3, 3))
    stack.check()
    return stack


def node_of(stack: Stack, seed: int) -> int:
    return stack.controller.match(prompt(seed, 3)).host_node


def lose_device_page(stack: Stack) -> None:
    stack.device.alloc(1)


def lose_host_page(stack: Stack) -> None:
    stack.host.alloc_pages(1)


def free_host_page_of_the_tree(stack: Stack) -> None:
    stack.host.free_pages(stack.tree.node_info(node_of(stack, 2)).host_page_ids)


def wrong_state(stack: Stack) -> None:
    pages = stack.tree.node_info(node_of(stack, 2)).host_page_ids
    stack.host.move_pages(pages, MemoryStateInt.BACKUP, "be broken", MemoryStateInt.SYNCED)


def unpaired(stack: Stack) -> None:
    stack.controller._context.ledger._host_of[:] = -1


def backups_miscounted(stack: Stack) -> None:
    stack.controller._context.ledger.backup_pages += 1


def unprotected(stack: Stack) -> None:
    stack.tree.release_host(node_of(stack, 2))


def marked(mark: int) -> Callable[[Stack], None]:
    def damage(stack: Stack) -> None:
        stack.tree.mark(node_of(stack, 1), set=mark)

    return damage


def loaded_behind_its_back(stack: Stack) -> None:
    stack.tree.finish_load(node_of(stack, 1), True)


def pending(stack: Stack) -> None:
    stack.controller.reset()
    stack.compute(prompt(9, 1), backup=False)
    stack.tree.evict(P, backup=True)


def prefetch_miscounted(stack: Stack) -> None:
    stack.controller._prefetches.tokens_in_flight += 1


DAMAGES: dict[str, tuple[Callable[[Stack], Any], str]] = {
    "a device page is lost": (lose_device_page, "capacity"),
    "a host page is lost": (lose_host_page, "capacity"),
    "a host page of the tree is free": (free_host_page_of_the_tree, "free"),
    "a host page is in the wrong state": (wrong_state, "is BACKUP, and must be SYNCED"),
    "pairs are forgotten": (unpaired, "pairs"),
    "backups are miscounted": (backups_miscounted, "backups"),
    "a stored node is not protected": (unprotected, "host_ref 0, not 1"),
    "a node is marked as written": (marked(WRITING), "being written"),
    "a node is marked as stored": (marked(STORING), "being stored"),
    "a load ended behind its back": (loaded_behind_its_back, "PROTECTED, and must be SYNCED"),
    "a node is left pending": (pending, "pending"),
    "a prefetch is miscounted": (prefetch_miscounted, "prefetches ask for"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found(name: str) -> None:
    damage, message = DAMAGES[name]
    stack = busy()
    damage(stack)
    with pytest.raises(IntegrityError, match=message):
        stack.check()


def test_without_held_pages_the_device_is_not_added_up() -> None:
    stack = busy()
    held = stack.device.alloc(2)
    stack.controller.check_integrity()
    stack.check(held)
    with pytest.raises(IntegrityError):
        stack.check(np.zeros(0, np.int32))
