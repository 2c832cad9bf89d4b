"""L2: what backends over a network share: chunks of a batch on worker threads, and deadlines that hold.

A worker only ever touches bytes of its own: values are joined before they are handed to it, and copied into the
caller's parts after it has answered. So a call can leave at its deadline while a worker still waits for a server that
says nothing; the worker ends by the client library's own time-out, and its answer is dropped.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial
from typing import Any, TypeAlias, TypeVar

import numpy as np

from ..errors import InvalidArgumentError, StorageError, StorageTimeoutError
from .base import MISS, BoolArray, Deadline, IntArray, Parts, Storage, byte_views, check_keys, check_pairs
from .memory import scatter
from .threads import DaemonPool

__all__ = ["RemoteStorage", "Value"]

T = TypeVar("T")
Value: TypeAlias = Any
"""A value as the client library returned it: anything with a buffer."""

class RemoteStorage(Storage):
    """Base of backends that ask a server. Subclasses do one chunk at a time, on a worker thread.

    Args:
        prefix: of every key on the server: what ``clear`` removes, and all that this store sees.
        timeout_s: of calls that name none.
        num_threads: workers, each with a connection of its own.
    stats: refused (values that the server would not take), late (calls that left at their deadline).
    """

    def __init__(self, *, prefix: str, timeout_s: float, num_threads: int) -> None:
        if not timeout_s > 0 or num_threads < 1:
            raise InvalidArgumentError(f"timeout_s is {timeout_s}, num_threads {num_threads}")
        check_keys([prefix])
        self.prefix, self.timeout_s = prefix, timeout_s
        self._pool: DaemonPool | None = DaemonPool(num_threads, f"radixkv-{self.name}")
        self._lock = threading.Lock()
        self._counters = {"refused": 0, "late": 0}

    chunk_bytes, chunk_keys = 4 << 20, 512
    """What one worker does at a time, at most; a longer value is a chunk of its own."""

    # ---- what a subclass does ----------------------------------------------------------------------------------------
    @abstractmethod
    def _put_chunk(self, keys: Sequence[str], values: Sequence[bytes]) -> Sequence[bool]:
        """Store values that are not there yet. Keys come with the prefix, here and below.

        Raises: what ``_translate`` knows.
        """

    @abstractmethod
    def _get_chunk(self, keys: Sequence[str], sizes: Sequence[int]) -> Sequence[Value | None]:
        """Values, None for a miss. Args: sizes: bytes that are expected; values may have others."""

    @abstractmethod
    def _exists_chunk(self, keys: Sequence[str]) -> Sequence[bool]:
        """Look keys up."""

    def _touch_chunk(self, keys: Sequence[str]) -> Sequence[bool]:
        """Look keys up, and count them as used, where the server knows how."""
        return self._exists_chunk(keys)

    @abstractmethod
    def _delete_chunk(self, keys: Sequence[str]) -> None:
        """Remove keys."""

    @abstractmethod
    def _clear(self) -> None:
        """Remove every key with the prefix."""

    @abstractmethod
    def _disconnect(self) -> None:
        """Close connections."""

    @abstractmethod
    def _translate(self, error: Exception) -> StorageError | None:
        """The error of the client library as ours; None if it is none of its errors."""

    # ---- calls -------------------------------------------------------------------------------------------------------
    def put_many(self, keys: Sequence[str], parts: Sequence[Parts], *, timeout_s: float | None = None) -> BoolArray:
        check_pairs(keys, parts)
        views = [byte_views(pieces) for pieces in parts]
        chunks = self._chunks(views)
        calls = (
            partial(self._put_chunk, [self.prefix + keys[i] for i in chunk], [b"".join(views[i]) for i in chunk])
            for chunk in chunks
        )
        flags = np.zeros(len(keys), np.bool_)
        for chunk, stored in zip(chunks, self._run("put_many", calls, timeout_s), strict=True):
            flags[chunk] = stored
        return flags

    def get_many(self, keys: Sequence[str], parts: Sequence[Parts], *, timeout_s: float | None = None) -> IntArray:
        check_pairs(keys, parts)
        views = [byte_views(pieces, writable=True) for pieces in parts]
        chunks = self._chunks(views)
        room = [sum(map(len, pieces)) for pieces in views]
        calls = (
            partial(self._get_chunk, [self.prefix + keys[i] for i in chunk], [room[i] for i in chunk])
            for chunk in chunks
        )
        sizes = np.full(len(keys), MISS, np.int64)
        for chunk, values in zip(chunks, self._run("get_many", calls, timeout_s), strict=True):
            for index, value in zip(chunk, values, strict=True):
                if value is not None:
                    whole = memoryview(value)
                    scatter(whole, views[index])
                    sizes[index] = whole.nbytes
        return sizes

    def exists_many(self, keys: Sequence[str], *, timeout_s: float | None = None) -> BoolArray:
        return self._look_up("exists_many", self._exists_chunk, keys, timeout_s)

    def touch_many(self, keys: Sequence[str], *, timeout_s: float | None = None) -> BoolArray:
        return self._look_up("touch_many", self._touch_chunk, keys, timeout_s)

    def _look_up(self, what: str, chunk: Callable[[Sequence[str]], Sequence[bool]], keys: Sequence[str],
                 timeout_s: float | None) -> BoolArray:  # fmt: skip
        check_keys(keys)
        calls = [partial(chunk, names) for names in self._names(keys)]
        return np.array([flag for flags in self._run(what, calls, timeout_s) for flag in flags], np.bool_)

    def delete_many(self, keys: Sequence[str], *, timeout_s: float | None = None) -> None:
        check_keys(keys)
        self._run("delete_many", [partial(self._delete_chunk, names) for names in self._names(keys)], timeout_s)

    def clear(self, *, timeout_s: float | None = None) -> None:
        self._run("clear", [self._clear], timeout_s)

    def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            self._disconnect()
            pool.shutdown(wait=False)

    def stats(self) -> Mapping[str, int]:
        with self._lock:
            return dict(self._counters)

    def _count(self, name: str, more: int = 1) -> None:
        with self._lock:
            self._counters[name] += more

    def _names(self, keys: Sequence[str]) -> list[list[str]]:
        names = [self.prefix + key for key in keys]
        return [names[at : at + self.chunk_keys] for at in range(0, len(names), self.chunk_keys)]

    def _chunks(self, views: Sequence[Sequence[memoryview]]) -> list[list[int]]:
        """Positions of values, in lists of about chunk_bytes."""
        chunks: list[list[int]] = [[]]
        num_bytes = 0
        for index, pieces in enumerate(views):
            size = sum(map(len, pieces))
            if chunks[-1] and (num_bytes + size > self.chunk_bytes or len(chunks[-1]) == self.chunk_keys):
                chunks.append([])
                num_bytes = 0
            chunks[-1].append(index)
            num_bytes += size
        return chunks if views else []

    def _run(self, what: str, calls: Iterable[Callable[[], T]], timeout_s: float | None) -> list[T]:
        """Run chunks on the workers: their answers, in order. Raises: StorageError, StorageTimeoutError."""
        deadline = Deadline(self.timeout_s if timeout_s is None else timeout_s, f"{self.name}: {what}")
        if self._pool is None:
            raise StorageError(f"{self.name}: the storage is closed")
        futures: list[Future[T]] = []
        try:
            for call in calls:  # a chunk is joined while the one before it is on its way
                futures.append(self._pool.submit(call))
                deadline.remaining_s()
            return [future.result(deadline.remaining_s()) for future in futures]
        except (FutureTimeout, StorageTimeoutError) as error:
            self._count("late")
            raise StorageTimeoutError(f"{deadline.what} did not end within {deadline.timeout_s} s") from error
        except Exception as error:
            known = error if isinstance(error, StorageError) else self._translate(error)
            if known is None:
                raise
            raise known from error
        finally:
            for future in futures:
                future.cancel()

