"""L0: the plain values that the tree hands out. No logic.

Units: *tokens* are counted in tokens (always a multiple of page_size here), *page ids* are int32, times are ticks of
the tree's own logical clock, except pins, which are nanoseconds of whatever clock the caller passes in.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = [
    "POLICIES", "ROOT", "BackupRequest", "Event", "Medium", "NextTier", "NodeInfo", "PageIds", "Policy", "TreeStats",
]  # fmt: skip

PageIds = npt.NDArray[np.int32]
Policy = Literal["lru", "lfu", "fifo", "mru", "filo", "priority", "slru"]
Medium = Literal["device", "host"]
NextTier = Literal["host", "storage"]

POLICIES: tuple[Policy, ...] = ("lru", "lfu", "fifo", "mru", "filo", "priority", "slru")

ROOT = 0
"""The handle of the root of every namespace: always locked, holds no tokens, never freed."""


class BackupRequest(NamedTuple):
    """One node that ``evict(backup=True)`` wants copied to the host before its device pages may be freed."""

    node: int
    page_ids: PageIds


class Event(NamedTuple):
    """One page entered or left one tier.

    ``key`` and ``parent_key`` are the first 8 bytes, big-endian, of the page digests (parent_key is None for the first
    page of a prefix). ``tokens`` has page_size entries for "stored" and is None else. "cleared" has only ``kind``.
    """

    kind: Literal["stored", "removed", "cleared"]
    key: int
    parent_key: int | None
    tokens: PageIds | None
    medium: Medium | None


class NodeInfo(NamedTuple):
    """A snapshot of one node. ``tokens`` is its own run, ``path_tokens`` the length of the path up to its end.
    ``marks`` is the caller's byte of marks, see ``BaseRadixTree.mark``."""

    node: int
    parent: int
    namespace: bytes
    tokens: PageIds
    path_tokens: int
    page_ids: PageIds | None
    host_page_ids: PageIds | None
    lock_ref: int
    host_ref: int
    hit_count: int
    priority: int
    access_time: int
    created_time: int
    pinned_until_ns: int | None
    loading: bool
    backup_pending: bool
    marks: int


class TreeStats(NamedTuple):
    """Counters of a tree, each maintained incrementally (reading them costs O(1)).

    evictable_tokens + protected_tokens = all tokens with device pages. Protected: locked, pinned or loading, or on the
    path above such a node. pending_tokens (backup requested, not finished) are counted in one of the two as well.
    host_tokens: every token with a host copy; of these host_evictable_tokens could be freed by ``evict_host`` now, were
    it asked for everything. loading_tokens: their device pages are still being filled; protected ones, all.
    memory_bytes: resident memory of the tree's own bookkeeping, page digests apart (digest_memory_bytes).
    dropped_events: events lost because nobody drained the bounded queue.
    """

    evictable_tokens: int
    protected_tokens: int
    pending_tokens: int
    host_tokens: int
    nodes: int
    namespaces: int
    pinned_nodes: int
    memory_bytes: int
    digest_memory_bytes: int
    queued_events: int
    dropped_events: int
    host_evictable_tokens: int
    loading_tokens: int
