"""What the original does and radixkv, on purpose, does not; no defects. rules.py names these tests."""

from __future__ import annotations

import pytest

from ..gate import original_or_skip
from .kit import PAGE, A, B, end_of, make, put, settled


@pytest.fixture(scope="module", autouse=True)
def _original() -> None:
    original_or_skip()


def test_write_back_counts_no_hits() -> None:
    with make(write_policy="write_back") as side:
        put(side, A)
        put(side, A)
        assert end_of(side, A).hit_count == 0


def test_load_locks_its_path() -> None:
    with make() as side:
        put(side, A)
        put(side, A + B)
        settled(side)
        side.cache.evict(len(B))
        match = side.cache.match_prefix(A + B)
        side.cache.load_back(match.last_host_node)
        assert (end_of(side, A).lock_ref, end_of(side, A + B).lock_ref) == (1, 1)
        side.cache.ready_to_load_host_cache()
        settled(side)
        assert (end_of(side, A).lock_ref, end_of(side, A + B).lock_ref) == (0, 0)


def test_write_back_frees_a_parent_while_its_child_is_copied() -> None:
    """A parent with a host copy leaves before the copy of its child has even begun."""
    with make(write_policy="write_back") as side:
        put(side, A)
        side.cache.evict(len(A))
        side.cache.load_back(end_of(side, A))
        side.cache.ready_to_load_host_cache()
        settled(side)
        put(side, A + B)
        order: list[str] = []
        writing_check, evict_backuped = side.cache.writing_check, side.cache._evict_backuped
        side.cache.writing_check = lambda write_back=False: (
            order.append("copies are awaited"),
            writing_check(write_back),
        )
        side.cache._evict_backuped = lambda node: (order.append("A" if node.key == A else "B"), evict_backuped(node))[1]
        side.cache.evict(len(A) + len(B))
        assert order == ["A", "copies are awaited", "B"]


def test_adopted_node_is_not_stored() -> None:
    """A node that is recomputed after its eviction is not hit by that insertion, and stays out of storage."""
    with make(storage=True) as side:
        put(side, A)
        settled(side)
        side.cache.evict(len(A))
        put(side, A)
        settled(side)
        assert end_of(side, A).backuped
        assert not end_of(side, A).backuped_storage
        put(side, A)
        settled(side)
        assert end_of(side, A).backuped_storage


def test_prefetch_protects_a_node_without_host_copy() -> None:
    with make(storage=True, write_policy="write_back") as side:
        put(side, A)
        side.cache.prefetch_from_storage("r", end_of(side, A), B, None)
        assert end_of(side, A).host_ref_counter == 1
        assert not end_of(side, A).backuped


def test_part_beyond_a_hit_is_touched() -> None:
    """A match that ends inside of a node also makes the part behind it look used; then a leaf used later goes first."""

    def left(stamp_hits_only: bool) -> tuple[int, int]:
        with make(write_policy="write_back") as side:
            if stamp_hits_only:
                side.stamp_hits_only()
            put(side, A)
            put(side, B)
            side.cache.match_prefix(A[:PAGE])
            side.cache.evict(3 * PAGE)
            return tuple(len(side.cache.match_prefix(key).device_indices) for key in (A, B))  # type: ignore[return-value]

    assert left(stamp_hits_only=False) == (4 * PAGE, 0)
    assert left(stamp_hits_only=True) == (PAGE, 4 * PAGE)
