"""A storage that goes wrong as it is told, around any other: delays, failures, lost and damaged values."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from radixkv.errors import StorageError, StorageTimeoutError
from radixkv.storage.base import MISS, BoolArray, IntArray, Parts, Storage, byte_views
from radixkv.storage.memory import scatter

Damage = Callable[[bytes], bytes]
"""Stored value -> what a reader gets."""


def flip(at: int) -> Damage:
    """One bit of byte ``at`` is wrong."""
    return lambda value: value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :]


def cut(size: int) -> Damage:
    """Only the first ``size`` bytes are there."""
    return lambda value: value[:size]


def torn(size: int) -> Damage:
    """The whole length, but only the first ``size`` bytes were written."""
    return lambda value: value[:size] + bytes(len(value) - size)


@dataclass(slots=True, kw_only=True)
class Faults:
    """What goes wrong, now; change it at any time.

    delay_s: before every call; a deadline below it raises StorageTimeoutError once it has passed.
    error: raised by every call, if set. gate: if set, every call waits for it first (with its deadline).
    lose: share of the keys of a put that get False, and of a get that are a MISS, drawn from ``seed``.
    damage: applied to every value that is read.
    """

    delay_s: float = 0.0
    error: Exception | None = None
    gate: threading.Event | None = None
    lose: float = 0.0
    damage: Damage | None = None
    seed: int = 0


class FaultyStorage(Storage):
    """``inner`` seen through ``faults``. ``calls`` counts by method name."""

    name = "faulty"

    def __init__(self, inner: Storage, faults: Faults | None = None) -> None:
        self.inner, self.faults = inner, faults or Faults()
        self.calls: dict[str, int] = {}
        self._random = np.random.default_rng(self.faults.seed)
        self._lock = threading.Lock()

    def _enter(self, what: str, timeout_s: float | None) -> None:
        with self._lock:
            self.calls[what] = self.calls.get(what, 0) + 1
        faults = self.faults
        if faults.gate is not None and not faults.gate.wait(timeout_s):
            raise StorageTimeoutError(f"{what}: the gate stayed shut for {timeout_s} s")
        if faults.delay_s:
            time.sleep(min(faults.delay_s, timeout_s or faults.delay_s))
            if timeout_s is not None and timeout_s <= faults.delay_s:
                raise StorageTimeoutError(f"{what} did not end within {timeout_s} s")
        if faults.error is not None:
            raise faults.error

    def _lost(self, count: int) -> BoolArray:
        with self._lock:
            lost: BoolArray = self._random.random(count) < self.faults.lose
            return lost

    def put_many(self, keys: Sequence[str], parts: Sequence[Parts], *, timeout_s: float | None = None) -> BoolArray:
        self._enter("put_many", timeout_s)
        flags = np.zeros(len(keys), np.bool_)
        kept = np.flatnonzero(~self._lost(len(keys)))
        flags[kept] = self.inner.put_many([keys[i] for i in kept], [parts[i] for i in kept], timeout_s=timeout_s)
        return flags

    def get_many(self, keys: Sequence[str], parts: Sequence[Parts], *, timeout_s: float | None = None) -> IntArray:
        self._enter("get_many", timeout_s)
        sizes = self.inner.get_many(keys, parts, timeout_s=timeout_s)
        sizes[self._lost(len(keys))] = MISS
        if self.faults.damage is not None:
            for index in np.flatnonzero(sizes >= 0).tolist():
                views = byte_views(parts[index])
                value = self.faults.damage(b"".join(views))
                scatter(value, views)
                sizes[index] = len(value)
        return sizes

    def exists_many(self, keys: Sequence[str], *, timeout_s: float | None = None) -> BoolArray:
        self._enter("exists_many", timeout_s)
        return self.inner.exists_many(keys, timeout_s=timeout_s)

    def delete_many(self, keys: Sequence[str], *, timeout_s: float | None = None) -> None:
        self._enter("delete_many", timeout_s)
        self.inner.delete_many(keys, timeout_s=timeout_s)

    def clear(self, *, timeout_s: float | None = None) -> None:
        self._enter("clear", timeout_s)
        self.inner.clear(timeout_s=timeout_s)

    def close(self) -> None:
        self.inner.close()

    def stats(self) -> Any:
        return self.inner.stats()


def dead() -> Faults:
    """A server that is gone."""
    return Faults(error=StorageError("connection refused"))
