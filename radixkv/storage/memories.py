"""L2: which memory was registered with a library that moves bytes by itself, and where a buffer lies."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable

import numpy as np

from ..errors import InvalidArgumentError
from .base import Buffer

__all__ = ["Memories", "address_of"]


def address_of(view: Buffer) -> int:
    """Address of a buffer's first byte, read-only ones included."""
    address: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return address


class Memories:
    """Registered ranges of memory, disjoint. Thread-safe.

    Args: add, remove: called with (address, bytes) for what is registered and unregistered; what add returns is kept,
        and given to remove.
    """

    def __init__(self, add: Callable[[int, int], object], remove: Callable[[int, int, object], None]) -> None:
        self._add, self._remove = add, remove
        self._lock = threading.Lock()
        self._ranges: dict[int, tuple[int, object]] = {}
        self._starts: list[int] = []

    def register(self, memory: Buffer) -> None:
        """Raises: InvalidArgumentError if it overlaps what is registered already."""
        start, num_bytes = address_of(memoryview(memory).cast("B")), memoryview(memory).nbytes
        with self._lock:
            if any(start < a + size and a < start + num_bytes for a, (size, _) in self._ranges.items()):
                raise InvalidArgumentError(f"{num_bytes} bytes at {start:#x} overlap memory that is registered")
            self._ranges[start] = (num_bytes, self._add(start, num_bytes))
            self._starts = sorted(self._ranges)

    def unregister(self, memory: Buffer) -> None:
        """Memory that is not registered is none to unregister."""
        start = address_of(memoryview(memory).cast("B"))
        with self._lock:
            found = self._ranges.pop(start, None)
            self._starts = sorted(self._ranges)
            if found is not None:
                self._remove(start, *found)

    def clear(self) -> None:
        """Unregister all."""
        with self._lock:
            for start, found in self._ranges.items():
                self._remove(start, *found)
            self._ranges.clear()
            self._starts.clear()

    def holds(self, address: int, num_bytes: int) -> bool:
        """Whether all of these bytes are in one registered range."""
        starts = self._starts
        index = bisect_right(starts, address) - 1
        if index < 0:
            return False
        found = self._ranges.get(starts[index])
        return found is not None and address + num_bytes <= starts[index] + found[0]
