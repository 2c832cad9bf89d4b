"""L1: which pages of a host pool are taken, and what state each is in. Bookkeeping only; the bytes are in ``host.py``.

States follow SGLang's host pool (MemoryStateInt); there they are only checked when debugging, here always:

    IDLE --alloc--> RESERVED --protect_write--> PROTECTED --complete_io--> SYNCED --update_backup--> BACKUP
                       |                            ^                        ^  the device copy is gone |
                       +--update_prefetch: loaded from storage, to BACKUP    |                          |
                                                    +--------protect_load----|--------------------------+
    free: from every state but IDLE (a double free) and PROTECTED (a copy is in flight)

Storage writes RESERVED pages only, and reads what a copy or storage has written: not IDLE, not RESERVED.
"""

from __future__ import annotations

import threading
from enum import IntEnum
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentTypeError, IntegrityError, InvalidArgumentError, PageOwnershipError, StateError
from ..types import PageIds
from . import page_ops
from .arrays import Array, Library, to_library
from .slots import SlotAllocator

__all__ = ["HostSlots", "MemoryStateInt"]


class MemoryStateInt(IntEnum):
    """The state of a host page; see the drawing at the top."""

    IDLE = 0
    RESERVED = 1
    PROTECTED = 2
    SYNCED = 3
    BACKUP = 4


_IDLE, _RESERVED, _PROTECTED, _SYNCED, _BACKUP = MemoryStateInt
_ANY_BUT_PROTECTED = sum(1 << state for state in MemoryStateInt) & ~(1 << _PROTECTED)


def _bits(states: tuple[MemoryStateInt, ...]) -> int:
    """States as page_ops takes them."""
    bits = 0
    for state in states:
        bits |= 1 << state
    return bits


class HostSlots:
    """The slots of ``num_pages`` host pages, each page with a state. Thread-safe: one lock about every change.

    Args:
        library: what ``alloc`` returns: "numpy" int64 arrays, or "torch" tensors.
    """

    def __init__(self, num_pages: int, page_size: int, library: Library = "numpy") -> None:
        if num_pages < 1 or page_size < 1:
            raise InvalidArgumentError(f"{num_pages} host pages of {page_size} slots")
        self.num_pages, self.page_size, self.size = num_pages, page_size, num_pages * page_size
        self.lock = threading.RLock()
        self._library: Library = library
        self._offsets = np.arange(page_size, dtype=np.int64)
        self.clear()

    # ---- slots -------------------------------------------------------------------------------------------------------
    def clear(self) -> None:
        """Make every page IDLE, whatever it was. No copy may be in flight."""
        with self.lock:
            self._allocator = SlotAllocator(self.num_pages)
            self._state = self._allocator.states  # IDLE is 0: free

    def available_size(self) -> int:
        """Slots that can be allocated now."""
        return self._allocator.available * self.page_size

    def alloc(self, need_size: int) -> Array | None:
        """Take whole pages: IDLE to RESERVED.

        Args: need_size: slots, a multiple of page_size.
        Returns: int64 [need_size], page by page; None (nothing changes) if fewer are free.
        Raises: InvalidArgumentError.
        """
        if need_size < 0 or need_size % self.page_size:
            raise InvalidArgumentError(f"{need_size} slots are no whole pages of {self.page_size}")
        pages = self.alloc_pages(need_size // self.page_size)
        if pages is None:
            return None
        slots = (pages.astype(np.int64)[:, None] * self.page_size + self._offsets).reshape(-1)
        return to_library(slots, self._library)

    def free(self, indices: Any) -> int:
        """Give pages back: to IDLE.

        Args: indices: integers [n], whole pages as ``alloc`` returned them, in any order of pages.
        Returns: n.
        Raises (nothing changes): PageOwnershipError for a page that is not allocated or given twice; StateError for one
            that a copy is reading or writing.
        """
        pages = self._pages(indices)
        self.free_pages(pages)
        return pages.size * self.page_size

    def _pages(self, indices: Any) -> npt.NDArray[np.int64]:
        """Page ids of whole pages of slots."""
        given: npt.NDArray[Any] = np.asarray(indices.detach().cpu() if hasattr(indices, "detach") else indices)
        if given.size == 0:
            return np.zeros(0, np.int64)
        if given.ndim != 1 or given.dtype.kind not in "iu":
            raise ArgumentTypeError(f"slots are a 1-d array of integers, not {given.ndim}-d {given.dtype}")
        if given.size % self.page_size:
            raise InvalidArgumentError(f"{given.size} slots are no whole pages of {self.page_size}")
        slots = given.astype(np.int64, copy=False).reshape(-1, self.page_size)
        pages: npt.NDArray[np.int64] = slots[:, 0] // self.page_size
        if (slots != pages[:, None] * self.page_size + self._offsets).any():
            raise InvalidArgumentError(f"slots are not whole pages of {self.page_size}, each in ascending order")
        outside = (pages < 0) | (pages >= self.num_pages)
        if outside.any():
            raise PageOwnershipError(f"host page {pages[outside][0]} is not of this pool of {self.num_pages}")
        return pages

    # ---- by page ids: what a controller calls for every node, so nothing is expanded to slots ------------------------
    def alloc_pages(self, num_pages: int, for_copy: bool = False) -> PageIds | None:
        """As ``alloc``, in pages; PROTECTED at once if a copy is to write them. Returns: int32 ids, new."""
        with self.lock:
            return self._allocator.alloc(num_pages, _PROTECTED if for_copy else _RESERVED)

    def free_pages(self, pages: npt.NDArray[Any]) -> None:
        """As ``free``, in pages."""
        with self.lock:
            at = page_ops.find_not(self._state, pages, _ANY_BUT_PROTECTED)
            if at >= 0:
                raise StateError(f"host page {pages[at]} is freed while a copy is in flight")
            self._allocator.free(pages)

    def move_pages(self, pages: npt.NDArray[Any], to: MemoryStateInt, verb: str, *allowed: MemoryStateInt) -> None:
        """Change the state of pages that the caller knows to be of this pool.

        Args: verb: for the message, "be loaded". Raises: StateError, and nothing changes, unless each is in one of
        ``allowed``.
        """
        with self.lock:
            at = page_ops.move(self._state, pages, _bits(allowed), to)
            if at >= 0:
                self._refuse(pages, at, verb, allowed)

    def move_values(
        self, table: PageIds, keys: PageIds, to: MemoryStateInt, verb: str, *allowed: MemoryStateInt
    ) -> int:
        """move_pages of those that ``table`` has for ``keys`` (-1: none), and then it has none. Returns: how many."""
        with self.lock:
            moved = page_ops.move_values(table, keys, self._state, _bits(allowed), to)
            if moved < 0:
                self._check(page_ops.pairs_of(table, keys), verb, allowed)
        return moved

    def states_of(self, pages: npt.NDArray[Any] | slice) -> npt.NDArray[np.uint8]:
        """The states of pages (slice(None): of all), a copy."""
        with self.lock:
            return np.array(self._state[pages])

    def free_page_ids(self) -> PageIds:
        """All pages that are free now: a new int32 array, in no order. O(free)."""
        with self.lock:
            return self._allocator.free_ids()

    # ---- states ------------------------------------------------------------------------------------------------------
    def get_state(self, indices: Any) -> MemoryStateInt:
        """The one state of all these pages.

        Raises: StateError if they differ, InvalidArgumentError if there are none.
        """
        pages = self._pages(indices)
        if not pages.size:
            raise InvalidArgumentError("the state of no pages")
        with self.lock:
            states = self._state[pages]
        other = states != states[0]
        if other.any():
            first, second = MemoryStateInt(states[0]).name, MemoryStateInt(states[other][0]).name
            raise StateError(f"host page {pages[0]} is {first}, and page {pages[other][0]} is {second}")
        return MemoryStateInt(states[0])

    def is_reserved(self, indices: Any) -> bool:
        """Allocated, and not written yet."""
        return self.get_state(indices) is _RESERVED

    def is_protected(self, indices: Any) -> bool:
        """A copy from or to the device is in flight."""
        return self.get_state(indices) is _PROTECTED

    def is_synced(self, indices: Any) -> bool:
        """Written, and the device has the same."""
        return self.get_state(indices) is _SYNCED

    def is_backup(self, indices: Any) -> bool:
        """Written, and the device does not have it."""
        return self.get_state(indices) is _BACKUP

    def protect_write(self, indices: Any) -> None:
        """A copy from the device begins: RESERVED to PROTECTED.

        Raises: StateError, and nothing changes (so do all of these).
        """
        self._move(indices, _PROTECTED, "be written", _RESERVED)

    def protect_load(self, indices: Any) -> None:
        """A copy to the device begins: BACKUP to PROTECTED."""
        self._move(indices, _PROTECTED, "be loaded", _BACKUP)

    def complete_io(self, indices: Any) -> None:
        """The copy is done: PROTECTED to SYNCED."""
        self._move(indices, _SYNCED, "complete a copy", _PROTECTED)

    def update_backup(self, indices: Any) -> None:
        """The device copy is gone: SYNCED to BACKUP."""
        self._move(indices, _BACKUP, "become a backup", _SYNCED)

    def update_prefetch(self, indices: Any) -> None:
        """Storage has filled the pages: RESERVED to BACKUP."""
        self._move(indices, _BACKUP, "become a backup", _RESERVED)

    def update_synced(self, indices: Any) -> None:
        """The device has the same bytes, whoever saw to it: from RESERVED, SYNCED or BACKUP."""
        self._move(indices, _SYNCED, "be synced", _RESERVED, _SYNCED, _BACKUP)

    def abort_io(self, indices: Any, to: MemoryStateInt) -> None:
        """A copy has failed or was cancelled: PROTECTED back to RESERVED (a write) or BACKUP (a load)."""
        if to not in (_RESERVED, _BACKUP):
            raise InvalidArgumentError(f"a copy that failed leaves RESERVED or BACKUP pages, not {to!r}")
        self._move(indices, to, "abort a copy", _PROTECTED)

    def _move(self, indices: Any, to: MemoryStateInt, verb: str, *allowed: MemoryStateInt) -> None:
        self.move_pages(self._pages(indices), to, verb, *allowed)

    def check_integrity(self) -> None:
        """Verify that exactly the allocated pages have a state but IDLE. O(pages). Raises: IntegrityError."""
        with self.lock:
            free = np.zeros(self.num_pages, np.bool_)
            free[self._allocator.free_ids()] = True
            wrong = np.flatnonzero(free != (self._state == _IDLE))
            if wrong.size:
                page, state = wrong[0], MemoryStateInt(self._state[wrong[0]]).name
                raise IntegrityError(f"host page {page} is {'free' if free[page] else 'allocated'} and {state}")
            self._allocator.check_integrity()

    def _accessible(self, indices: Any, verb: str, *allowed: MemoryStateInt) -> npt.NDArray[np.int64]:
        """The pages of these slots, if each is in one of these states. Raises: StateError."""
        pages = self._pages(indices)
        self._check(pages, verb, allowed)
        return pages

    def _check(self, pages: npt.NDArray[Any], verb: str, allowed: tuple[MemoryStateInt, ...]) -> None:
        at = page_ops.find_not(self._state, pages, _bits(allowed))
        if at >= 0:
            self._refuse(pages, at, verb, allowed)

    def _refuse(self, pages: npt.NDArray[Any], at: int, verb: str, allowed: tuple[MemoryStateInt, ...]) -> NoReturn:
        names = " or ".join(state.name for state in allowed)
        now = MemoryStateInt(self._state[pages[at]]).name
        raise StateError(f"host page {pages[at]} is {now}, and must be {names} to {verb}")
