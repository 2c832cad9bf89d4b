"""L5: which slots the tokens of each running request have: one row a request. Names are those of SGLang."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from ..errors import InvalidArgumentError, PageOwnershipError
from ..pool.arrays import Array, Library, allocate, choose_library, parse_device

__all__ = ["ReqToTokenPool"]


class ReqToTokenPool:
    """``req_to_token``: int32 [size, max_context_len] on ``device``. Not thread-safe.

    Args:
        size: requests at a time.
        max_context_len: tokens of a request.
        enable_memory_saver: taken for the engines' sake; must be False.
        library: "torch" or "numpy"; by default torch, or what there is without it.
    """

    def __init__(
        self,
        size: int,
        max_context_len: int,
        device: Any = "cpu",
        enable_memory_saver: bool = False,
        *,
        library: Library | None = None,
    ) -> None:
        if size < 1 or max_context_len < 1 or enable_memory_saver:
            raise InvalidArgumentError(
                f"{size} requests of {max_context_len} tokens, enable_memory_saver={enable_memory_saver}"
            )
        name = parse_device(device)
        self.size, self.max_context_len, self.device = size, max_context_len, device
        self.req_to_token: Array = allocate((size, max_context_len), "int32", name, choose_library(name, library))
        self.free_slots: list[int] = []
        self._in_use = np.zeros(size, np.bool_)
        self.clear()

    def write(self, indices: Any, values: Array) -> None:
        """req_to_token[indices] = values."""
        self.req_to_token[indices] = values

    def available_size(self) -> int:
        """Rows that are free."""
        return len(self.free_slots)

    def alloc(self, need_size: int) -> list[int] | None:
        """Take rows: their numbers; None, and nothing changes, if fewer are free."""
        if need_size > len(self.free_slots):
            return None
        taken, self.free_slots = self.free_slots[:need_size], self.free_slots[need_size:]
        self._in_use[taken] = True
        return taken

    def free(self, free_index: int | Iterable[int]) -> None:
        """Give one row or several back. Raises: PageOwnershipError, and nothing changes, for one that is not in use."""
        rows = [free_index] if isinstance(free_index, int) else list(free_index)
        wrong = [row for row in rows if not (0 <= row < self.size and self._in_use[row])]
        if wrong or len(set(rows)) != len(rows):
            raise PageOwnershipError(f"rows {wrong or rows} of {self.size} are freed, and not in use or named twice")
        self._in_use[rows] = False
        self.free_slots.extend(rows)

    def clear(self) -> None:
        """Free all rows. What is in them stays until it is written over."""
        self.free_slots = list(range(self.size))
        self._in_use[:] = False
