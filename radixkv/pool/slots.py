"""L1: hands out the pages of one pool, by number. Bookkeeping only: the bytes are in ``host.py`` or on the device.
Engines ask for slots of a device pool by tokens: that is ``paged.py``.

ids:    0 ........... fresh ............ capacity
        [ handed out once, maybe freed ][ never handed out: one contiguous run ]
freed ids wait on a stack and come back in the order in which they were freed, so the run of a node stays a run.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import IntegrityError, InvalidArgumentError
from ..types import PageIds
from .page_ops import give_back, take

__all__ = ["SlotAllocator"]


class SlotAllocator:
    """Allocates page ids 0 .. capacity - 1. Every operation is O(pages of the call). Not thread-safe.

    Args:
        capacity: pages, >= 0. Costs 5 bytes a page.
    Attributes:
        states: uint8 [capacity], 0 for a free page, else as ``alloc`` has marked it; the owner may change it to other
            values of 1 .. 127.
    """

    def __init__(self, capacity: int) -> None:
        if not 0 <= capacity <= 2**31 - 1:
            raise InvalidArgumentError(f"capacity must be 0 .. 2**31 - 1 pages, not {capacity}")
        self.capacity = capacity
        self._fresh = 0
        self._stack = np.zeros(capacity, np.int32)
        self._stack_len = 0
        self.states: npt.NDArray[np.uint8] = np.zeros(capacity, np.uint8)

    @property
    def available(self) -> int:
        """Pages that can be allocated now."""
        return self.capacity - self._fresh + self._stack_len

    @property
    def used(self) -> int:
        """Pages handed out and not freed yet."""
        return self._fresh - self._stack_len

    def alloc(self, num_pages: int, mark: int = 1) -> PageIds | None:
        """Take pages: one contiguous run while there is a fresh one, else freed pages, last freed first.

        Args: mark: their state from now on.
        Returns: a new int32 array of num_pages ids, which the caller owns until ``free``; None (and nothing changes) if
            fewer are available.
        Raises: InvalidArgumentError if num_pages < 0.
        """
        if num_pages < 0:
            raise InvalidArgumentError(f"cannot allocate {num_pages} pages")
        fresh, stacked = self._fresh, self._stack_len
        never_used = self.capacity - fresh
        if num_pages > never_used + stacked:
            return None
        from_stack = 0
        if num_pages > never_used:  # no run is long enough: keep the rest of the fresh one for a shorter call if we can
            from_stack = min(num_pages, stacked)
        from_fresh = num_pages - from_stack
        ids = take(self._stack, stacked, from_stack, fresh, from_fresh, self.states, mark)
        self._stack_len = stacked - from_stack
        self._fresh = fresh + from_fresh
        return ids

    def free(self, page_ids: npt.ArrayLike) -> None:
        """Give pages back. Nothing changes if it raises.

        Raises:
            ArgumentTypeError: not a one-dimensional array of integers.
            PageOwnershipError: an id outside the pool, one that is free already, or one given twice in this call.
        """
        self._stack_len += give_back(page_ids, self.states, self._stack, self._stack_len)

    def free_ids(self) -> PageIds:
        """All ids that are free now: a new int32 array, in no order. O(free)."""
        fresh = np.arange(self._fresh, self.capacity, dtype=np.int32)
        return np.concatenate([self._stack[: self._stack_len], fresh])

    def check_integrity(self) -> None:
        """Verify from scratch that each page is either free, once, or in use. O(capacity). Raises: IntegrityError."""
        if not 0 <= self._stack_len <= self._fresh <= self.capacity:
            raise IntegrityError(f"stack {self._stack_len}, fresh {self._fresh}, capacity {self.capacity}")
        times = np.bincount(self.free_ids(), minlength=self.capacity) + (self.states != 0)
        wrong = np.flatnonzero(times != 1)
        if wrong.size:
            raise IntegrityError(f"page {wrong[0]} is free or in use {times[wrong[0]]} times over")
