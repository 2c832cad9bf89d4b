"""L2: the contract of a storage backend: a blob store with batches, gather and scatter lists, and deadlines.

Every backend passes one suite (tests/storage/test_conformance.py) against the real thing. A backend knows nothing of
pages, tokens or checksums: that is ``pages.py`` and ``envelope.py``, the same over every backend.

    key    a str of 1 .. 200 characters of 0-9 a-z A-Z . _ - (not starting with a dot): safe as a file name, an object
           name and in a URL
    value  opaque bytes, at least one, given and taken in *parts*: a list of buffers, in this order its bytes

A value is written once and never changes: two writers of one key write the same bytes, so the first one wins and the
second may skip its work.
"""

from __future__ import annotations

import importlib
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import InvalidArgumentError, StorageError, StorageTimeoutError
from .batch import FlatParts, flat_sizes

__all__ = ["BoolArray", "Buffer", "Deadline", "FlatParts", "IntArray", "Parts", "Positions", "Storage", "byte_views"]
__all__ += ["MISS", "check_keys", "check_pairs", "flat_parts", "require_package"]

Buffer: TypeAlias = Any
"""Anything with a C-contiguous buffer: bytes, bytearray, memoryview, mmap, a numpy array. Writable, to read into."""
Parts: TypeAlias = Sequence[Buffer]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
IntArray: TypeAlias = npt.NDArray[np.int64]

Positions: TypeAlias = Sequence[int]
"""Of some keys in the sequences of a call."""

MISS = -1
"""What get_many reports for a key that is not there (or that could not be read, which is counted)."""

_KEY = re.compile(r"[0-9A-Za-z_-][0-9A-Za-z._-]{0,199}")
_PLAIN = bytes(range(48, 58)) + bytes(range(65, 91)) + bytes(range(97, 123)) + b"_-"
"""Of keys without dots, which PageStore makes."""


class Storage(ABC):
    """A blob store. Thread-safe: any number of threads may be in any methods, but ``close``.

    Failures. What concerns one key (no room, one unreadable file) is a flag of that key and a count in ``stats``. What
    concerns the call (no connection, a server that answers nothing) raises StorageError, or StorageTimeoutError once
    ``timeout_s`` seconds have passed; of its keys nothing is known then, and a put may or may not have happened. None
    means no deadline for a local store, and the backend's own default for a server: no call hangs on a dead one.
    A call that has returned or raised no longer touches the buffers it was given. That comes first: where the kernel or
    a library moves bytes from and to these buffers itself, a call may overrun its deadline by one of their operations.
    Programmer errors (a bad key, as many parts as keys are not) raise InvalidArgumentError before anything is done.
    """

    name: str
    """Of the kind of backend, as the registry knows it: "file", "redis", ..."""

    chained: bool = False
    """Whether ``put_each`` heeds ``after``."""

    @abstractmethod
    def put_many(self, keys: Sequence[str], parts: Sequence[Parts], *, timeout_s: float | None = None) -> BoolArray:
        """Write values: bool [len(keys)], whether each is stored now (also if it was there already).

        All or nothing for each key: no reader ever sees half a value, unless the machine fails (see each backend's
        durability), which is what the envelope is for. Args: parts: a gather list for each key.
        """

    @abstractmethod
    def get_many(self, keys: Sequence[str], parts: Sequence[Parts], *, timeout_s: float | None = None) -> IntArray:
        """Read values: int64 [len(keys)], the length of each value in bytes, MISS (-1) if there is none.

        A value of exactly the length of its parts fills them in order. The parts of a MISS, or of a value of another
        length, hold anything afterwards; nothing beyond them is written.
        Args: parts: a scatter list of writable buffers for each key.
        """

    def put_each(self, keys: Sequence[str], parts: Sequence[Parts], prepare: Callable[[Positions], None] | None = None,
                 *, after: str | None = None, timeout_s: float | None = None) -> BoolArray:  # fmt: skip
        """put_many, with all that a store may make use of. By default, all is prepared and given to put_many.

        Args:
            prepare: ``prepare(positions)`` completes the bytes of these values before they are looked at. A store that
                writes values one after the other calls it just before it writes them, so that a checksum and the write
                go through memory once; then it is called from several threads at once, of positions that are not the
                same. Values that were there already need not be prepared; those of a write that is tried again are so
                again. What it raises, the call raises (an OSError may count as a write that failed).
            after: the values are a chain, like the pages of a prompt: each is of no use without the one before it, the
                first without the value of this key ("": it begins the chain). A store that is ``chained`` keeps every
                chain whole from its beginning on: it makes room at the ends of chains, and does not take a value if the
                one before it is not there. None: nothing is known of that.
        """
        if prepare is not None:
            prepare(range(len(keys)))
        return self.put_many(keys, parts, timeout_s=timeout_s)

    def get_each(self, keys: Sequence[str], parts: Sequence[Parts], arrived: Callable[[Positions], None], *,
                 timeout_s: float | None = None) -> IntArray:  # fmt: skip
        """get_many, but ``arrived(positions)`` is told of values that are in their parts, each once, before the end.

        A store that reads values one after the other tells at once, while their bytes are in the processor's cache;
        then it is called from several threads at once. Of values of another length than their parts it may be told too.
        What it raises, the call raises.
        """
        sizes = self.get_many(keys, parts, timeout_s=timeout_s)
        arrived(np.flatnonzero(sizes != MISS).tolist())
        return sizes

    @abstractmethod
    def exists_many(self, keys: Sequence[str], *, timeout_s: float | None = None) -> BoolArray:
        """Look up keys: bool [len(keys)]. A later get may miss all the same (eviction, another process)."""

    def touch_many(self, keys: Sequence[str], *, timeout_s: float | None = None) -> BoolArray:
        """Look up keys, and count what is there as used now, where the store makes room by use. By default only the
        former."""
        return self.exists_many(keys, timeout_s=timeout_s)

    @abstractmethod
    def delete_many(self, keys: Sequence[str], *, timeout_s: float | None = None) -> None:
        """Remove keys; those that are not there are no error."""

    @abstractmethod
    def clear(self, *, timeout_s: float | None = None) -> None:
        """Remove everything that this store holds (its folder, its key prefix), and nothing else."""

    @abstractmethod
    def close(self) -> None:
        """End threads and connections. Values stay. A second call does nothing; any other call raises StorageError."""

    def stats(self) -> Mapping[str, int]:
        """Counters of this backend, by name, since it was made; what they mean is in the backend's docstring."""
        return {}

    def lost(self) -> int:
        """How many values have gone since this store was made, for want of room or whatever reason, as far as it knows:
        only whether it has changed matters. Answers at once: what must be asked for is asked in the background. 0 from
        a backend whose server does not tell what it evicts."""
        return 0

    def register(self, memory: Buffer) -> None:  # noqa: B027  most backends have no use for it
        """Announce memory that parts will lie in (a host pool's arena), before its first use.

        Parts elsewhere work too, but backends that move bytes by DMA or RDMA copy those once more.
        """

    def unregister(self, memory: Buffer) -> None:  # noqa: B027
        """Take ``register`` back; call it before the memory goes away."""

    def __enter__(self) -> Storage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Deadline:
    """When a call must have ended; made once at its beginning, and asked at every step."""

    __slots__ = ("_end", "timeout_s", "what")

    def __init__(self, timeout_s: float | None, what: str) -> None:
        if timeout_s is not None and not timeout_s > 0:
            raise InvalidArgumentError(f"timeout_s is {timeout_s}, and must be above 0 or None")
        self.timeout_s, self.what = timeout_s, what
        self._end = None if timeout_s is None else time.monotonic() + timeout_s

    def remaining_s(self) -> float | None:
        """Seconds left, None without a deadline. Raises: StorageTimeoutError if there are none."""
        if self._end is None:
            return None
        left = self._end - time.monotonic()
        if left <= 0:
            raise StorageTimeoutError(f"{self.what} did not end within {self.timeout_s} s")
        return left

    def left_s(self) -> float | None:
        """Seconds left, at least 1 ms, None without a deadline: for the next call of a series that has begun."""
        return None if self._end is None else max(self._end - time.monotonic(), 1e-3)

    def passed(self) -> bool:
        """Whether the time is up."""
        return self._end is not None and time.monotonic() >= self._end


def check_keys(keys: Sequence[str]) -> None:
    """Raise InvalidArgumentError for a key that is none."""
    with suppress(TypeError, UnicodeEncodeError):  # a key that is no such str: found below
        rest = "/".join(keys).encode().translate(None, _PLAIN)  # all at once, at a third of the time
        if len(rest) == len(keys) - 1 == rest.count(b"/") and 0 < min(map(len, keys)) <= max(map(len, keys)) <= 200:
            return
    for key in keys:
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise InvalidArgumentError(f"{key!r} is no key: 1 .. 200 characters of 0-9 a-z A-Z . _ -, no dot first")


def check_pairs(keys: Sequence[str], parts: Sequence[Parts]) -> None:
    """check_keys, and as many lists of parts as keys."""
    check_keys(keys)
    if len(keys) != len(parts):
        raise InvalidArgumentError(f"{len(keys)} keys and {len(parts)} lists of parts")


def byte_views(parts: Parts, writable: bool = False) -> list[memoryview]:
    """The parts as flat memoryviews of bytes, no copy. Raises: InvalidArgumentError if one has no such buffer."""
    views = []
    for part in parts:
        try:
            view = part if type(part) is memoryview else memoryview(part)
            view = view if view.format == "B" and view.ndim == 1 and view.contiguous else view.cast("B")
        except (TypeError, ValueError, BufferError) as error:
            raise InvalidArgumentError(f"a part is no C-contiguous buffer: {type(part).__name__}: {error}") from error
        if writable and view.readonly:
            raise InvalidArgumentError(f"a part to read into is read-only: {type(part).__name__}")
        views.append(view)
    return views


def flat_parts(parts: Sequence[Parts], writable: bool = False) -> FlatParts:
    """The parts of a call as ``byte_views`` makes them. Raises: InvalidArgumentError, as it does."""
    if isinstance(parts, FlatParts) and (parts.writable or not writable):
        return parts
    if (sizes := flat_sizes(parts, writable)) is not None:
        lists: list[Any] = list(parts)
        return FlatParts(lists, sizes, writable=writable)
    views = [byte_views(pieces, writable) for pieces in parts]
    return FlatParts(views, [sum(map(len, pieces)) for pieces in views], writable=writable)


def require_package(module: str, package: str, what: str) -> ModuleType:
    """Import an optional package. Raises: StorageError that names it and how it is installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise StorageError(f"{what} needs {module} (pip install {package}): {error}") from error
