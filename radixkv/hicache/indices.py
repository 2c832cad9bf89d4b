"""L5: what an engine holds (tensors of slots, allocators of slots) as page ids, and back."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from ..errors import InvalidArgumentError
from ..pool.arrays import Array, Library, parse_device
from ..types import PageIds
from .slots import Tensors, pages_of, slots_of

__all__ = ["AllocatorPages", "Indices", "NumberedPages"]


class Indices:
    """Turns page ids into int64 slots where the engine wants them, and slots into page ids.

    On a GPU the ids travel (an int32 a page), and are expanded there.

    Args:
        page_size: P.
        device: of the slots that are handed out.
        library: "torch" or "numpy"; None: torch if it is installed.
    """

    def __init__(self, page_size: int, device: Any = "cpu", library: Library | None = None) -> None:
        self.page_size = page_size
        self.device = device
        self.library: Library = library or ("torch" if importlib.util.find_spec("torch") else "numpy")
        self._on_cpu = parse_device(device) == "cpu"
        self._tensors: Tensors | None = None
        if self.library == "torch":
            import torch

            self._from_numpy = torch.from_numpy
            exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)  # from 2.10 on
            if exchange is not None:
                with suppress(InvalidArgumentError):  # of another DLPack than is known here: by arrays, then
                    self._tensors = Tensors(torch.Tensor, exchange)
            self._offsets = torch.arange(page_size, dtype=torch.int64, device=device)
        self.none = self.of_pages(np.zeros(0, np.int32))
        """No slots. One array for all: nobody may write to it."""

    def of_pages(self, page_ids: PageIds) -> Array:
        """The slots of pages, page by page: a new int64 array on the device."""
        if self.library != "torch":
            return slots_of(page_ids, self.page_size)
        if self._on_cpu:
            if self._tensors is not None:
                return self._tensors.slots_of(page_ids, self.page_size)
            return self._from_numpy(slots_of(page_ids, self.page_size))
        pages = self._from_numpy(page_ids).to(self.device)
        return (pages.long()[:, None] * self.page_size + self._offsets).reshape(-1)

    def pages(self, indices: Any, num_pages: int | None = None) -> PageIds:
        """The pages of slots: a new int32 array. From a GPU only the first slot of each page travels, and is checked.

        Args: indices: a tensor, array or sequence of integers; num_pages: read only so many.
        Raises: InvalidArgumentError if there are too few, or they are not whole pages, each in ascending order.
        """
        wanted = -1 if num_pages is None else num_pages
        if self._tensors is not None:
            found = self._tensors.pages_of(indices, self.page_size, wanted)
            if found is not None:
                return found
        on_cpu = getattr(indices, "is_cpu", None)
        if on_cpu is not False:
            return pages_of(indices.numpy() if on_cpu else np.asarray(indices), self.page_size, wanted)
        have = len(indices)
        wanted = have if num_pages is None else num_pages * self.page_size
        if wanted > have or wanted % self.page_size:
            raise InvalidArgumentError(f"{have} slots for {wanted} tokens in pages of {self.page_size}")
        return self._pages_on_gpu(indices[: wanted : self.page_size])

    def _pages_on_gpu(self, starts: Any) -> PageIds:
        """The pages that begin at these slots."""
        slots = starts.cpu().numpy()
        wrong = np.flatnonzero(slots % self.page_size)
        if wrong.size:
            raise InvalidArgumentError(f"slot {slots[wrong[0]]} does not begin a page of {self.page_size}")
        return pages_of(slots // self.page_size, 1)

    def copy(self, indices: Array) -> Array:
        """A copy of slots as int64."""
        if self.library == "torch":
            return indices.to(self.none.dtype, copy=True)
        return indices.astype(np.int64)


class AllocatorPages:
    """An engine's allocator of slots as an allocator of pages: whole pages, in the order in which it gives them.

    Freeing goes through ``allocator.free``, so an open free group holds the pages back until it ends.
    """

    def __init__(self, allocator: Any, indices: Indices, capacity: int) -> None:
        self.allocator = allocator
        self.capacity = capacity
        self._indices = indices
        self._to_forget: int | None = None

    @property
    def available(self) -> int:
        """Pages that ``alloc`` could give now."""
        return int(self.allocator.available_size()) // self._indices.page_size

    def alloc(self, num_pages: int) -> PageIds | None:
        """Take pages; None, and nothing changes, if there are fewer."""
        slots = self.allocator.alloc(num_pages * self._indices.page_size)
        return None if slots is None else self._indices.pages(slots)

    def free(self, page_ids: PageIds) -> None:
        """Give pages back."""
        if self._to_forget is not None:
            self._to_forget -= len(page_ids)
        elif len(page_ids):
            self.allocator.free(self._indices.of_pages(page_ids))

    @contextmanager
    def forgetting(self, num_pages: int) -> Iterator[Callable[[], int]]:
        """What is freed meanwhile does not go to the allocator, which its owner clears.

        Yields: says how many of num_pages are still to come.
        """
        self._to_forget = num_pages
        try:
            yield lambda: self._to_forget or 0
        finally:
            self._to_forget = None


class NumberedPages:
    """Pages of no pool: numbers for a tree that only remembers keys (a scheduler's look at its own queue)."""

    def __init__(self) -> None:
        self._next = 0
        self._spare: list[PageIds] = []

    def alloc(self, num_pages: int) -> PageIds:
        """Numbers that nobody has, as small as is cheap: the tree's own cost grows with the largest."""
        parts: list[PageIds] = []
        missing = num_pages
        while missing and self._spare:
            spare = self._spare.pop()
            if len(spare) > missing:
                self._spare.append(spare[missing:])
            parts.append(spare[:missing])
            missing -= len(parts[-1])
        parts.append(np.arange(self._next, self._next + missing, dtype=np.int32))
        self._next += missing
        return np.concatenate(parts)

    def free(self, page_ids: PageIds) -> None:
        """Take numbers back."""
        if len(page_ids):
            self._spare.append(page_ids)

    def clear(self) -> None:
        """All numbers are free again."""
        self._next, self._spare = 0, []
