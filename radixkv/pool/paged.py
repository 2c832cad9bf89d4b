"""L1: hands out the slots of a device pool, as engines ask for them: by tokens, a page at a time.

Names and behaviour follow SGLang's PagedTokenToKVPoolAllocator (2025-08), so that it can take its place. Bookkeeping is
numpy on the CPU, a fixed number of vector operations a call; nothing here touches the KV itself. Unlike there, what
would silently give two requests one slot raises.

    pages:  [reserved][ ready, ascending ........ ][ handed out ][ released: freed since ready was last sorted ]
    alloc takes from the front of ready; only when that is too short, released pages are sorted into it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentTypeError, IntegrityError, InvalidArgumentError, PageOwnershipError, StateError
from .arrays import Array, Library, parse_device, to_library

__all__ = ["AllocatorState", "PagedTokenToKVPoolAllocator", "TokenToKVPoolAllocator"]

Ints: TypeAlias = npt.NDArray[np.int64]

_NONE = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class AllocatorState:
    """What ``backup_state`` saved, for ``restore_state`` of the same allocator. Opaque."""

    owner: object
    epoch: int
    ready: Ints
    released: Ints
    in_use: npt.NDArray[np.bool_]


class PagedTokenToKVPoolAllocator:
    """Allocates the slots of ``size // page_size`` pages. Not thread-safe.

    Args:
        size: tokens that can be held, not counting reserved pages. Costs about 17 bytes a page and 4 a token.
        page_size: P.
        dtype, kvcache: of the pool; kept for engines that ask for them. A torch dtype also makes ``library`` "torch".
        device: where slots are returned as torch tensors.
        reserved_pages: pages at the start of the pool that are never handed out. Engines write dummy tokens to slot 0,
            so the default is 1; then slots are P .. size + P - 1.
        library: what ``alloc`` returns: "torch" tensors on ``device``, or "numpy" arrays. The two others return what
            they are given.
    Raises: InvalidArgumentError for sizes below 0 or pages below 1.
    """

    def __init__(
        self,
        size: int,
        page_size: int,
        dtype: Any = None,
        device: Any = "cpu",
        kvcache: Any = None,
        *,
        reserved_pages: int = 1,
        library: Library | None = None,
    ) -> None:
        if size < 0 or page_size < 1 or reserved_pages < 0:
            raise InvalidArgumentError(f"{size} tokens in pages of {page_size}, {reserved_pages} pages reserved")
        self.size = size
        self.page_size = page_size
        self.dtype = dtype
        self.device = device
        self.num_pages = size // page_size
        self.reserved_pages = reserved_pages
        self._kvcache = kvcache
        self._device_name = parse_device(device)
        self._library: Library = library or ("torch" if type(dtype).__module__ == "torch" else "numpy")
        total_pages = self.num_pages + reserved_pages
        self._in_use = np.zeros(total_pages, np.bool_)
        self._page_order = np.zeros(total_pages, np.int32)
        self._slot_order = np.zeros(total_pages * page_size, np.int32)
        self._identity = object()  # of this allocator: id() may be another's later
        self._epoch = 0
        self._ready: Ints = _NONE
        self._released: list[Ints] = []
        self._num_released = 0
        self._group: list[Ints] | None = None
        self._grouped: npt.NDArray[np.bool_] | None = None  # by slot; made when a group needs it
        self.clear()

    # ---- asking ------------------------------------------------------------------------------------------------------
    def available_size(self) -> int:
        """Tokens that can be allocated now. What a free group holds back does not count."""
        return (self._ready.size + self._num_released) * self.page_size

    @property
    def used_size(self) -> int:
        """Tokens of pages handed out and not free again, those that a free group holds back among them."""
        return self.num_pages * self.page_size - self.available_size()

    @property
    def free_pages(self) -> Ints:
        """int64 ids of the ready pages, ascending. A view: do not write."""
        return self._ready

    @property
    def release_pages(self) -> Ints:
        """int64 ids of the pages freed since the ready ones were last sorted."""
        return np.concatenate([_NONE, *self._released])

    @property
    def is_not_in_free_group(self) -> bool:
        """Whether ``free`` frees at once."""
        return self._group is None

    def get_kvcache(self) -> Any:
        """The pool that was given to the constructor."""
        return self._kvcache

    def debug_print(self) -> str:
        """One line on the state of the allocator."""
        held = sum(part.size for part in self._group or ())
        return f"ready_pages={self._ready.size} released_pages={self._num_released} grouped_slots={held}"

    # ---- taking ------------------------------------------------------------------------------------------------------
    def alloc(self, need_size: int) -> Array | None:
        """Take whole pages.

        Args: need_size: tokens, a multiple of page_size.
        Returns: int64 [need_size], new, the slots page by page, lowest free page first; None (nothing changes) if
        fewer are free.
        Raises: InvalidArgumentError if need_size is negative or no multiple of page_size.
        """
        if need_size < 0 or need_size % self.page_size:
            raise InvalidArgumentError(f"{need_size} tokens are no whole pages of {self.page_size}")
        pages = self._take(need_size // self.page_size)
        if pages is None:
            return None
        slots = (pages[:, None] * self.page_size + np.arange(self.page_size, dtype=np.int64)).reshape(-1)
        return to_library(slots, self._library, self._device_name)

    def alloc_extend(self, prefix_lens: Any, seq_lens: Any, last_loc: Any, extend_num_tokens: int) -> Array | None:
        """Take slots for the tokens that each request grows by: the rest of its last page first, then new pages.

            request i:  ......prefix......][last page: used | part 1 ][ part 2: whole pages ][ part 3 |     ]
                                                    last_loc[i] ^

        Args:
            prefix_lens: integers [requests], tokens that have slots already.
            seq_lens: integers [requests], tokens afterwards.
            last_loc: integers [requests], the slot of token prefix_lens[i] - 1; not read where the prefix fills its
            pages.
            extend_num_tokens: sum(seq_lens - prefix_lens).
        Returns: int64 [extend_num_tokens], request by request, in the library and on the device of ``last_loc``; None
            (nothing changes) if there are too few pages.
        Raises: InvalidArgumentError for lengths that contradict each other or the slots; PageOwnershipError for a
            last_loc whose page is not in use, or which two requests would fill.
        """
        size = self.page_size
        before, after, last = (_ints(values, name) for values, name in (
            (prefix_lens, "prefix_lens"), (seq_lens, "seq_lens"), (last_loc, "last_loc")
        ))  # fmt: skip
        _check_lengths(before, after, last, extend_num_tokens)
        self._check_last(before, after, last)
        pages_before, pages_after = -(-before // size), -(-after // size)  # rounded up
        new_pages = pages_after - pages_before
        pages = self._take(int(new_pages.sum()))
        if pages is None:
            return None
        # What a page takes is a run of consecutive slots. Runs of request i: part 1 if it has one, then its new pages.
        grown = after - before
        part = (before % size != 0) & (grown > 0)
        runs = part + new_pages
        ends = np.cumsum(runs)
        first = (ends - runs)[part]
        fresh = np.ones(int(runs.sum()), np.bool_)
        fresh[first] = False
        starts, lengths = np.empty(fresh.size, np.int64), np.full(fresh.size, size)
        starts[fresh] = pages * size
        grows = new_pages > 0
        lengths[ends[grows] - 1] = (after - (pages_after - 1) * size)[grows]
        starts[first] = last[part] + 1
        lengths[first] = np.minimum(grown, size - before % size)[part]
        at = np.cumsum(lengths) - lengths
        slots = np.repeat(starts - at, lengths) + np.arange(extend_num_tokens)
        return to_library(slots, last_loc)

    def alloc_decode(self, seq_lens: Any, last_loc: Any) -> Array | None:
        """Take one slot for each request: the next of its last page, or the first of a new one.

        Args:
            seq_lens: integers [requests], tokens with the new one, at least 1.
            last_loc: integers [requests], the slot of token seq_lens[i] - 2; not read where a page begins.
        Returns, Raises: as alloc_extend.
        """
        after = _ints(seq_lens, "seq_lens")
        last = _ints(last_loc, "last_loc")
        before = after - 1
        _check_lengths(before, after, last, after.size)
        self._check_last(before, after, last)
        fresh = before % self.page_size == 0
        pages = self._take(int(fresh.sum()))
        if pages is None:
            return None
        slots = last + 1
        slots[fresh] = pages * self.page_size
        return to_library(slots, last_loc)

    def _take(self, num_pages: int) -> Ints | None:
        """The lowest ready pages, now in use; None if there are too few."""
        if num_pages > self._ready.size:
            if num_pages > self._ready.size + self._num_released:
                return None
            self.merge_and_sort_free()
        pages, self._ready = self._ready[:num_pages], self._ready[num_pages:]
        self._in_use[pages] = True
        return pages

    def merge_and_sort_free(self) -> None:
        """Sort released pages into the ready ones. O(free log free)."""
        if self._released:
            self._ready = np.sort(np.concatenate([self._ready, *self._released]))
            self._released, self._num_released = [], 0

    def _check_last(self, before: Ints, after: Ints, last: Ints) -> None:
        """Check the slots after which requests go on inside of a page."""
        inside = (before % self.page_size != 0) & (after > before)
        last, before = last[inside], before[inside]
        wrong = (last + 1) % self.page_size != before % self.page_size
        if wrong.any():
            raise InvalidArgumentError(
                f"slot {last[wrong][0]} is not at the place of token {before[wrong][0] - 1} "
                f"in a page of {self.page_size}"
            )
        pages = self._pages_in_use(last)
        if np.unique(pages).size != pages.size:
            raise PageOwnershipError(f"two requests would go on in one page: last slots {sorted(last.tolist())}")

    # ---- giving back -------------------------------------------------------------------------------------------------
    def free(self, free_index: Any) -> None:
        """Give pages back: all pages of which a slot is given, whole. Inside a free group, at its end.

        Args: free_index: integers [n], slots in any order.
        Raises (nothing changes):
            PageOwnershipError: a slot of no page that is in use, or given twice in this call or group.
            ArgumentTypeError: not a one-dimensional array of integers.
        """
        slots = _ints(free_index, "free_index")
        if not slots.size:
            return
        pages = self._whole_pages(slots)
        if pages is None:
            pages = self._pages_in_use(slots)
            self._check_once(slots)
        if self._group is None:
            self._release(pages)
            return
        if self._grouped is None:
            self._grouped = np.zeros(self._slot_order.size, np.bool_)
        again = self._grouped[slots]
        if again.any():
            raise PageOwnershipError(f"slot {slots[again][0]} is given twice in one free group")
        self._grouped[slots] = True
        self._group.append(slots.copy())

    def _whole_pages(self, slots: Ints) -> Ints | None:
        """The pages of slots that are whole pages in use, each once; None if they are not, whatever is wrong with them.

        The usual case, in which looking at pages will do.
        """
        size = self.page_size
        if size == 1 or slots.size % size:
            return None
        starts = slots[::size]
        if (slots.reshape(-1, size) != starts[:, None] + np.arange(size)).any() or (starts % size != 0).any():
            return None
        pages: Ints = starts // size
        if pages.min() < self.reserved_pages or pages.max() >= self._in_use.size or not self._in_use[pages].all():
            return None
        order = np.arange(pages.size, dtype=np.int32)
        self._page_order[pages] = order
        return pages if (self._page_order[pages] == order).all() else None

    def _check_once(self, slots: Ints) -> None:
        """Raises: PageOwnershipError if a slot is given twice."""
        order = np.arange(slots.size, dtype=np.int32)
        self._slot_order[slots] = order  # of a slot given twice, only the later mark is left
        twice = self._slot_order[slots] != order
        if twice.any():
            raise PageOwnershipError(f"slot {slots[twice][0]} is given twice in one call")

    def free_group_begin(self) -> None:
        """Hold back what is freed until ``free_group_end``, which then frees it in one step. Raises: StateError if
        one is open."""
        if self._group is not None:
            raise StateError(f"a free group is open already and holds {sum(part.size for part in self._group)} slots")
        self._group = []

    def free_group_end(self) -> None:
        """Free what the group held back. Raises: StateError if none is open."""
        if self._group is None:
            raise StateError("free_group_end without free_group_begin")
        group, self._group, self._grouped = self._group, None, None
        if group:
            self._release(np.concatenate(group) // self.page_size)

    def _release(self, pages: Ints) -> None:
        """Free pages; each may be named several times."""
        order = np.arange(pages.size, dtype=np.int32)
        self._page_order[pages] = order
        pages = pages[self._page_order[pages] == order]
        self._in_use[pages] = False
        self._released.append(pages)
        self._num_released += pages.size

    def _pages_in_use(self, slots: Ints) -> Ints:
        """The page of each slot. Raises: PageOwnershipError if one is not handed out."""
        outside = (slots < self.reserved_pages * self.page_size) | (slots >= self._slot_order.size)
        if outside.any():
            raise PageOwnershipError(
                f"slot {slots[outside][0]} is not of this pool: slots {self.reserved_pages * self.page_size} .. "
                f"{self._slot_order.size - 1}"
            )
        pages: Ints = slots // self.page_size
        idle = ~self._in_use[pages]
        if idle.any():
            page = pages[idle][0]
            raise PageOwnershipError(f"slot {slots[idle][0]} is of page {page}, which is not in use (freed twice?)")
        return pages

    # ---- state -------------------------------------------------------------------------------------------------------
    def clear(self) -> None:
        """Free everything, drop an open free group, and void all saved states."""
        self._epoch += 1
        self._in_use[:] = False
        self._ready = np.arange(self.reserved_pages, self._in_use.size, dtype=np.int64)
        self._released, self._num_released = [], 0
        self._group, self._grouped = None, None

    def backup_state(self) -> AllocatorState:
        """Save what is free, so that allocations after this can be undone as a whole. O(pages).

        Raises: StateError in an open free group.
        """
        self._outside_of_a_group("backup_state")
        return AllocatorState(self._identity, self._epoch, self._ready, self.release_pages, self._in_use.copy())

    def restore_state(self, state: AllocatorState) -> None:
        """Go back to a saved state: pages taken since are free again, pages freed since are in use again.

        Raises: StateError if the state is of another allocator or from before ``clear``, or a free group is open.
        """
        self._outside_of_a_group("restore_state")
        if state.owner is not self._identity or state.epoch != self._epoch:
            raise StateError("this state is of another allocator, or was saved before clear()")
        self._ready = state.ready
        self._released = [state.released] if state.released.size else []
        self._num_released = state.released.size
        self._in_use[:] = state.in_use

    def _outside_of_a_group(self, name: str) -> None:
        if self._group is not None:
            held = sum(part.size for part in self._group)
            raise StateError(f"{name} in an open free group, which holds {held} slots")

    def get_cpu_copy(self, indices: Array) -> Any:
        """The pool's copy of these tokens in host memory."""
        return self._kvcache.get_cpu_copy(indices)

    def load_cpu_copy(self, kv_cache_cpu: Any, indices: Array) -> None:
        """Give such a copy to the pool, for these slots."""
        self._kvcache.load_cpu_copy(kv_cache_cpu, indices)

    def check_integrity(self) -> None:
        """Verify from scratch that each page is free, once, or in use, and ready pages ascend. Raises:
        IntegrityError."""
        free = np.concatenate([self._ready, *self._released])
        if free.size and not (self.reserved_pages <= free.min() and free.max() < self._in_use.size):
            raise IntegrityError(f"page {free.min()} or {free.max()} is free, and not of the pool")
        if (np.diff(self._ready) <= 0).any():
            raise IntegrityError("ready pages do not ascend")
        times = np.bincount(free, minlength=self._in_use.size) + self._in_use
        times[: self.reserved_pages] += 1
        wrong = np.flatnonzero(times != 1)
        if wrong.size:
            raise IntegrityError(f"page {wrong[0]} is free, in use or reserved {times[wrong[0]]} times over")
        if sum(part.size for part in self._released) != self._num_released:
            raise IntegrityError(f"{self._num_released} released pages are counted")


class TokenToKVPoolAllocator(PagedTokenToKVPoolAllocator):
    """The same with pages of one token, and the constructor of SGLang's class of this name."""

    def __init__(self, size: int, dtype: Any = None, device: Any = "cpu", kvcache: Any = None, **settings: Any) -> None:
        super().__init__(size, 1, dtype, device, kvcache, **settings)


def _ints(values: Any, name: str) -> Ints:
    """int64 [n] of an array, tensor or list of integers."""
    given: npt.NDArray[Any] = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    if given.size == 0:
        return _NONE
    if given.ndim != 1 or given.dtype.kind not in "iu":
        raise ArgumentTypeError(f"{name} is a 1-d array of integers, not {given.ndim}-d {given.dtype}")
    return given.astype(np.int64, copy=False)


def _check_lengths(before: Ints, after: Ints, last: Ints, num_tokens: int) -> None:
    """Lengths of one call belong together."""
    if not before.size == after.size == last.size:
        raise InvalidArgumentError(f"{before.size} prefix lengths, {after.size} lengths, {last.size} last slots")
    wrong = (before < 0) | (after < before)
    if wrong.any():
        raise InvalidArgumentError(f"a request of {before[wrong][0]} tokens cannot grow to {after[wrong][0]}")
    total = int((after - before).sum())
    if total != num_tokens:
        raise InvalidArgumentError(f"the requests grow by {total} tokens, not by {num_tokens}")
