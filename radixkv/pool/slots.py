"""L1: hands out the pages of one pool, by number. Bookkeeping only: the bytes are in ``host.py`` or on the device.
Engines ask for slots of a device pool by tokens: that is ``paged.py``.

ids:    0 ........... fresh ............ capacity
        [ handed out once, maybe freed ][ never handed out: one contiguous run ]
freed ids wait on a stack and come back in the order in which they were freed, so the run of a node stays a run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentTypeError, IntegrityError, InvalidArgumentError, PageOwnershipError
from ..types import PageIds

__all__ = ["SlotAllocator"]


class SlotAllocator:
    """Allocates page ids 0 .. capacity - 1. Every operation is O(pages of the call). Not thread-safe.

    Args:
        capacity: pages, >= 0. Costs 9 bytes a page.
    """

    def __init__(self, capacity: int) -> None:
        if not 0 <= capacity <= 2**31 - 1:
            raise InvalidArgumentError(f"capacity must be 0 .. 2**31 - 1 pages, not {capacity}")
        self.capacity = capacity
        self._fresh = 0
        self._stack = np.zeros(capacity, np.int32)
        self._stack_len = 0
        self._in_use = np.zeros(capacity, np.bool_)
        self._scratch = np.zeros(capacity, np.int32)

    @property
    def available(self) -> int:
        """Pages that can be allocated now."""
        return self.capacity - self._fresh + self._stack_len

    @property
    def used(self) -> int:
        """Pages handed out and not freed yet."""
        return self._fresh - self._stack_len

    def alloc(self, num_pages: int) -> PageIds | None:
        """Take pages: one contiguous run while there is a fresh one, else freed pages, last freed first.

        Returns: a new int32 array of num_pages ids, which the caller owns until ``free``; None (and nothing changes) if
            fewer are available.
        Raises: InvalidArgumentError if num_pages < 0.
        """
        if num_pages < 0:
            raise InvalidArgumentError(f"cannot allocate {num_pages} pages")
        if num_pages > self.available:
            return None
        from_fresh = min(num_pages, self.capacity - self._fresh)
        if from_fresh < num_pages:  # no run is long enough: keep the rest of the fresh one for a shorter call if we can
            from_fresh = max(0, num_pages - self._stack_len)
        from_stack = num_pages - from_fresh
        ids = self._stack[self._stack_len - from_stack : self._stack_len]
        if from_fresh:
            fresh = np.arange(self._fresh, self._fresh + from_fresh, dtype=np.int32)
            ids = np.concatenate([ids, fresh]) if from_stack else fresh
        else:
            ids = ids.copy()
        self._stack_len -= from_stack
        self._fresh += from_fresh
        self._in_use[ids] = True
        return ids

    def free(self, page_ids: npt.ArrayLike) -> None:
        """Give pages back. Nothing changes if it raises.

        Raises:
            ArgumentTypeError: not a one-dimensional array of integers.
            PageOwnershipError: an id outside the pool, one that is free already, or one given twice in this call.
        """
        ids = self._own(page_ids)
        self._in_use[ids] = False
        self._stack[self._stack_len : self._stack_len + ids.size] = ids
        self._stack_len += ids.size

    def _own(self, page_ids: npt.ArrayLike) -> npt.NDArray[np.intp]:
        """Check that the caller may free these."""
        given: npt.NDArray[Any] = np.asarray(page_ids)
        if given.size == 0:
            return np.zeros(0, np.intp)
        if given.ndim != 1 or given.dtype.kind not in "iu":
            raise ArgumentTypeError(f"page ids are a 1-d array of integers, not {given.ndim}-d {given.dtype}")
        outside = (given < 0) | (given >= self.capacity)
        if outside.any():
            raise PageOwnershipError(f"page {given[outside][0]} is not of this pool of {self.capacity} pages")
        ids = given.astype(np.intp)
        idle = ~self._in_use[ids]
        if idle.any():
            raise PageOwnershipError(f"page {ids[idle][0]} is freed twice: it is not in use")
        # A page given twice keeps only the later of its two marks. O(n), where sorting would not be.
        order = np.arange(ids.size, dtype=np.int32)
        self._scratch[ids] = order
        twice = self._scratch[ids] != order
        if twice.any():
            raise PageOwnershipError(f"page {ids[twice][0]} is given twice in one call")
        return ids

    def free_ids(self) -> PageIds:
        """All ids that are free now: a new int32 array, in no order. O(free)."""
        fresh = np.arange(self._fresh, self.capacity, dtype=np.int32)
        return np.concatenate([self._stack[: self._stack_len], fresh])

    def check_integrity(self) -> None:
        """Verify from scratch that each page is either free, once, or in use. O(capacity). Raises: IntegrityError."""
        if not 0 <= self._stack_len <= self._fresh <= self.capacity:
            raise IntegrityError(f"stack {self._stack_len}, fresh {self._fresh}, capacity {self.capacity}")
        times = np.bincount(self.free_ids(), minlength=self.capacity) + self._in_use
        wrong = np.flatnonzero(times != 1)
        if wrong.size:
            raise IntegrityError(f"page {wrong[0]} is free or in use {times[wrong[0]]} times over")
