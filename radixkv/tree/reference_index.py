"""L1: the multi-holder index as plain Python, written to be read: the oracle of ``prefix_index.pyx``, one entry a page.

Runs do not exist here, so a PathNode is one page, recency is kept per page, and eviction takes one leaf page at a time.
"""

from __future__ import annotations

import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import index as as_int
from typing import Any

import numpy as np

from ..errors import ArgumentTypeError, HandleError, IntegrityError, InvalidArgumentError
from .index_base import MAX_WORKERS, IndexStats, PageKeys, PathNode, PrefixIndexBase

__all__ = ["ReferencePrefixIndex"]


@dataclass(slots=True)
class _Page:
    key: int
    parent: int | None  # None: starts a prefix. A key that is not known: an orphan head
    handle: int
    holders: set[int] = field(default_factory=set)
    found: int = 0  # clock of the last insert or find
    word: int = 0


def _to_key(value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ArgumentTypeError(f"a page key must be an int, got {type(value).__name__}")
    if not -(1 << 63) <= as_int(value) < 1 << 64:
        raise InvalidArgumentError(f"page key {value} does not fit 64 bits")
    return as_int(value) % (1 << 64)


def _to_keys(page_keys: PageKeys) -> list[int]:
    if isinstance(page_keys, list | tuple):
        return [_to_key(k) for k in page_keys]
    if not isinstance(page_keys, np.ndarray | array.array | memoryview):
        raise ArgumentTypeError(f"page_keys must be a uint64 buffer or a list of ints, got {type(page_keys).__name__}")
    a = np.asarray(page_keys)
    if a.ndim != 1 or a.dtype.kind not in "iu" or a.dtype.itemsize != 8 or not a.dtype.isnative:
        raise ArgumentTypeError(f"page_keys must be one-dimensional uint64 or int64, got {a.ndim}d {a.dtype}")
    return [int(k) for k in a.view(np.uint64)]


def _to_worker(worker: Any) -> int:
    if isinstance(worker, bool) or not hasattr(worker, "__index__"):
        raise ArgumentTypeError(f"worker must be an int, got {type(worker).__name__}")
    if not 0 <= as_int(worker) < MAX_WORKERS:
        raise InvalidArgumentError(f"worker {worker} is not in 0 .. {MAX_WORKERS - 1}")
    return as_int(worker)


class ReferencePrefixIndex(PrefixIndexBase):
    """See PrefixIndexBase."""

    def __init__(self, max_pages: int | None = None) -> None:
        if max_pages is not None and (isinstance(max_pages, bool) or not isinstance(max_pages, int)):
            raise ArgumentTypeError(f"max_pages must be an int or None, got {type(max_pages).__name__}")
        if max_pages is not None and not 1 <= max_pages < 1 << 40:
            raise InvalidArgumentError(f"max_pages must be in 1 .. 2**40 - 1, got {max_pages}")
        self.max_pages = max_pages
        self._pages: dict[int, _Page] = {}
        self._children: dict[int | None, set[int]] = {}  # also of parents that are not known: orphans that wait
        self._workers: set[int] = set()
        self._clock = 0
        self._handles = 0
        self._evicted = 0

    # ------------------------------------------------------------------------------------------------------- changes

    def insert(self, worker: int, page_keys: PageKeys, parent_key: int | None = None) -> int:
        worker = _to_worker(worker)
        parent = None if parent_key is None else _to_key(parent_key)
        keys = _to_keys(page_keys)
        self._check_chain(keys, parent)
        self._workers.add(worker)
        self._clock += 1
        added = 0
        for key in keys:
            page = self._pages.get(key)
            if page is None:
                self._handles += 1
                page = self._pages[key] = _Page(key, parent, self._handles)
                self._children.setdefault(parent, set()).add(key)
            added += worker not in page.holders
            page.holders.add(worker)
            page.found = self._clock
            parent = key
        self._evict()
        return added

    def _check_chain(self, keys: list[int], parent: int | None) -> None:
        """Raise if the chain contradicts what is known. New links (key -> parent) must not close a circle."""
        links: dict[int, int | None] = {}
        for key in keys:
            known = self._pages.get(key)
            if key in links or (known is not None and known.parent != parent):
                raise InvalidArgumentError(f"page key {key:#018x} is known under another parent, or twice in the chain")
            links[key] = parent
            parent = key
        above: int | None = keys[0] if keys else None
        seen: set[int] = set()
        while above is not None and above not in seen:
            seen.add(above)
            page = self._pages.get(above)
            above = links.get(above, page.parent if page else None)
        if above is not None:
            raise InvalidArgumentError(f"page key {above:#018x} would be its own ancestor")

    def remove(self, worker: int, page_keys: PageKeys) -> int:
        worker = _to_worker(worker)
        removed = 0
        for key in _to_keys(page_keys):
            page = self._pages.get(key)
            if page is not None and worker in page.holders:
                page.holders.remove(worker)
                removed += 1
                self._forget_upwards(key)
        return removed

    def _forget_upwards(self, key: int | None) -> None:
        """Forget the page, then its ancestors, as long as nobody holds them or anything below them."""
        while key is not None:
            page = self._pages.get(key)
            if page is None or page.holders or self._children.get(key):
                return
            del self._pages[key]
            siblings = self._children[page.parent]
            siblings.remove(key)
            if not siblings:
                del self._children[page.parent]
            key = page.parent

    def clear_worker(self, worker: int) -> int:
        worker = _to_worker(worker)
        return self.remove(worker, [p.key for p in self._pages.values() if worker in p.holders])

    def remove_worker(self, worker: int) -> int:
        removed = self.clear_worker(worker)
        self._workers.discard(worker)
        return removed

    def _evict(self) -> None:
        while self.max_pages is not None and len(self._pages) > self.max_pages:
            leaf = min((p for p in self._pages.values() if not self._children.get(p.key)), key=lambda p: p.found)
            leaf.holders.clear()
            before = len(self._pages)
            self._forget_upwards(leaf.key)
            self._evicted += before - len(self._pages)

    # ------------------------------------------------------------------------------------------------------- queries

    def _path(self, keys: list[int]) -> Iterator[_Page]:
        parent = None
        for key in keys:
            page = self._pages.get(key)
            if page is None or page.parent != parent:
                return
            yield page
            parent = key

    def find(self, page_keys: PageKeys, nodes: bool = False) -> Any:
        self._clock += 1
        counts: dict[int, int] = {}
        path = list(self._path(_to_keys(page_keys)))
        for i, page in enumerate(path):
            page.found = self._clock
            for worker in page.holders:
                if counts.get(worker, 0) == i:
                    counts[worker] = i + 1
        if not nodes:
            return counts
        return counts, [PathNode(p.handle, i, 1, tuple(sorted(p.holders)), p.word) for i, p in enumerate(path)]

    def _node(self, node: int) -> _Page:
        for page in self._pages.values():
            if page.handle == node:
                return page
        raise HandleError(f"node {node} has left the index, or is another's")

    def get_word(self, node: int) -> int:
        return self._node(_to_key(node)).word

    def set_word(self, node: int, word: int) -> None:
        self._node(_to_key(node)).word = _to_key(word)

    def workers(self) -> list[int]:
        return sorted(self._workers)

    def _is_orphan(self, key: int | None) -> bool:
        while key is not None and key in self._pages:
            key = self._pages[key].parent
        return key is not None

    def stats(self) -> IndexStats:
        return IndexStats(
            pages=len(self._pages),
            entries=sum(len(p.holders) for p in self._pages.values()),
            orphan_pages=sum(self._is_orphan(k) for k in self._pages),
            workers=len(self._workers),
            nodes=len(self._pages),
            memory_bytes=200 * len(self._pages),
            evicted_pages=self._evicted,
        )

    def dump(self) -> dict[int, tuple[int | None, tuple[int, ...]]]:
        return {p.key: (p.parent, tuple(sorted(p.holders))) for p in self._pages.values()}

    def check_integrity(self) -> None:
        for key, page in self._pages.items():
            if not page.holders and not self._children.get(key):
                raise IntegrityError(f"page {key:#x} is a leaf that nobody holds")
            if not page.holders <= self._workers:
                raise IntegrityError(f"page {key:#x} is held by workers that are not registered")
            if key not in self._children.get(page.parent, set()):
                raise IntegrityError(f"page {key:#x} is not among its parent's children")
        if sum(map(len, self._children.values())) != len(self._pages):
            raise IntegrityError("the children do not add up to the pages")
        if self.max_pages is not None and len(self._pages) > self.max_pages:
            raise IntegrityError(f"{len(self._pages)} pages, at most {self.max_pages}")
