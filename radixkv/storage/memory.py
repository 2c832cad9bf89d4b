"""L2: values in this process's memory: for tests, demos, and as the plainest form of the contract.

Nothing survives the process. ``stats``: values, value_bytes (held now), evicted (for room), refused (larger than all).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import InvalidArgumentError, StorageError
from .base import MISS, BoolArray, Deadline, IntArray, Parts, Storage, byte_views, check_keys, check_pairs

__all__ = ["MemoryStorage", "scatter"]


class MemoryStorage(Storage):
    """A dict under a lock. Args: max_bytes: of all values; the least recently used go for room. None: no limit."""

    name = "memory"

    def __init__(self, *, max_bytes: int | None = None) -> None:
        if max_bytes is not None and max_bytes < 1:
            raise InvalidArgumentError(f"max_bytes is {max_bytes}")
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._values: OrderedDict[str, bytes] | None = OrderedDict()
        self._bytes = self._evicted = self._refused = self._lost = 0

    def _open(self) -> OrderedDict[str, bytes]:
        if self._values is None:
            raise StorageError("the storage is closed")
        return self._values

    def put_many(self, keys: Sequence[str], parts: Sequence[Parts], *, timeout_s: float | None = None) -> BoolArray:
        check_pairs(keys, parts)
        Deadline(timeout_s, self.name)
        flags = np.zeros(len(keys), np.bool_)
        for index, (key, pieces) in enumerate(zip(keys, parts, strict=True)):
            value = b"".join(byte_views(pieces))
            with self._lock:
                flags[index] = self._put(key, value)
        return flags

    def _put(self, key: str, value: bytes) -> bool:
        values = self._open()
        if key in values:
            values.move_to_end(key)
            return True
        if self.max_bytes is not None and len(value) > self.max_bytes:
            self._refused += 1
            return False
        values[key] = value
        self._bytes += len(value)
        while self.max_bytes is not None and self._bytes > self.max_bytes:
            self._bytes -= len(values.popitem(last=False)[1])
            self._evicted += 1
            self._lost += 1
        return True

    def get_many(self, keys: Sequence[str], parts: Sequence[Parts], *, timeout_s: float | None = None) -> IntArray:
        check_pairs(keys, parts)
        Deadline(timeout_s, self.name)
        sizes = np.full(len(keys), MISS, np.int64)
        for index, (key, pieces) in enumerate(zip(keys, parts, strict=True)):
            views = byte_views(pieces, writable=True)
            with self._lock:
                values = self._open()
                value = values.get(key)
                if value is not None:
                    values.move_to_end(key)
            if value is not None:
                scatter(value, views)
                sizes[index] = len(value)
        return sizes

    def exists_many(self, keys: Sequence[str], *, timeout_s: float | None = None) -> BoolArray:
        check_keys(keys)
        Deadline(timeout_s, self.name)
        with self._lock:
            values = self._open()
            return np.fromiter((key in values for key in keys), np.bool_, len(keys))

    def touch_many(self, keys: Sequence[str], *, timeout_s: float | None = None) -> BoolArray:
        found = self.exists_many(keys, timeout_s=timeout_s)
        with self._lock:
            for key in keys:
                if key in self._open():
                    self._open().move_to_end(key)
        return found

    def delete_many(self, keys: Sequence[str], *, timeout_s: float | None = None) -> None:
        check_keys(keys)
        Deadline(timeout_s, self.name)
        with self._lock:
            values = self._open()
            for key in keys:
                self._lost += key in values
                self._bytes -= len(values.pop(key, b""))

    def clear(self, *, timeout_s: float | None = None) -> None:
        with self._lock:
            self._lost += len(self._open())
            self._open().clear()
            self._bytes = 0

    def close(self) -> None:
        with self._lock:
            self._values = None

    def lost(self) -> int:
        return self._lost

    def stats(self) -> Mapping[str, int]:
        with self._lock:
            held = len(self._values or ())
            return {"values": held, "value_bytes": self._bytes, "evicted": self._evicted, "refused": self._refused}


def scatter(value: bytes | memoryview, views: Sequence[memoryview]) -> None:
    """Copy a value into parts, in order, as far as both go."""
    rest = memoryview(value)
    for view in views:
        piece = rest[: len(view)]
        view[: len(piece)] = piece
        rest = rest[len(piece) :]
