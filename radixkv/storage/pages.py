"""L2: pages of a host pool, in and out of any ``Storage``: keys, envelope, verification, counters, and back-off.

    key = 32 hex digits of the namespace's digest (model, layout, ..., tenant salt) + the page's own digest in hex

A page's digest is that of its whole prefix (a hash chain), so equal keys mean equal bytes, in every process and on
every machine. Nothing here raises because storage failed: a page that cannot be had is a miss, and is counted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import InvalidArgumentError, StorageError, StorageTimeoutError
from ..types import PageIds
from .base import BoolArray, Deadline, Storage
from .breaker import Breaker, BreakerConfig
from .envelope import HEADER_BYTES, Verdict, seal, verify
from .namespace import PageNamespace

__all__ = ["PageCounters", "PageParts", "PageStore", "host_page_parts"]

PageParts = Callable[[int], list[memoryview]]
"""Host page id -> the page's contiguous pieces, in the order of its flat bytes; valid while the page is allocated."""

Digests = npt.NDArray[np.uint8]
Answer = TypeVar("Answer")

_FIRST_LOOK_UP = 64
"""Keys asked for at once by count_prefix, doubled at each step: a short hit costs little, a long one few calls."""


@dataclass(slots=True, kw_only=True)
class PageCounters:
    """Of one PageStore, since it was made. Pages, but for the last lines.

    hits, misses: pages that get_pages brought, and did not bring for whatever reason.
    corrupt, foreign, short: misses because of what was stored (envelope.Verdict). removed: of those, from storage.
    stored, refused: pages that set_pages stored (or found there), and that storage had no room for or failed to write.
    errors, timeouts: calls that failed as a whole, by StorageError and by StorageTimeoutError.
    skipped: calls not made because the breaker was open.
    bytes_read, bytes_written: payload bytes of hits, and of pages stored (found there included).
    """

    hits: int = 0
    misses: int = 0
    corrupt: int = 0
    foreign: int = 0
    short: int = 0
    removed: int = 0
    stored: int = 0
    refused: int = 0
    errors: int = 0
    timeouts: int = 0
    skipped: int = 0
    bytes_read: int = 0
    bytes_written: int = 0


class PageStore:
    """Pages under keys. Thread-safe, as its storage is; the host pages of a call are the caller's until it returns.

    Args:
        storage: any backend; ``close`` of this store leaves it open, as several may share one.
        namespace: what bytes depend on; its page_bytes is the size of a page.
        page_parts: where a host page's bytes are; ``host_page_parts(pool)`` for a HostKVCache.
        breaker: when to leave a dead store alone.
    """

    def __init__(
        self,
        storage: Storage,
        namespace: PageNamespace,
        page_parts: PageParts,
        *,
        breaker: BreakerConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.storage, self.namespace, self.page_bytes = storage, namespace, namespace.page_bytes
        self.breaker = Breaker(breaker, clock)
        self._page_parts = page_parts
        self._lock = threading.Lock()
        self._counters = PageCounters()
        self._prefixes: dict[bytes, str] = {}

    # ---- keys --------------------------------------------------------------------------------------------------------
    def keys(self, digests: Digests, salt: bytes = b"") -> list[str]:
        """The storage keys of pages. Args: digests: uint8 [pages, digest bytes]; salt: the request's namespace."""
        if digests.ndim != 2 or digests.dtype != np.uint8 or not 8 <= digests.shape[1] <= 64:
            raise InvalidArgumentError(f"digests are uint8 [pages, 8 .. 64], not {digests.dtype} {digests.shape}")
        prefix = self._prefixes.get(salt)
        if prefix is None:
            if len(self._prefixes) >= 1024:  # salts are the callers' choice: no cache may grow with them
                self._prefixes.clear()
            prefix = self._prefixes[salt] = self.namespace.digest(salt).hex()
        text, step = digests.tobytes().hex(), 2 * digests.shape[1]
        return [prefix + text[at : at + step] for at in range(0, len(text), step)]

    # ---- pages -------------------------------------------------------------------------------------------------------
    def set_pages(self, digests: Digests, host_pages: PageIds, *, salt: bytes = b"",
                  timeout_s: float | None = None) -> BoolArray:  # fmt: skip
        """Store host pages: bool [pages], whether each is in storage now. Args: host_pages: int32 [pages]."""
        keys, payloads = self._batch(digests, host_pages, salt)
        if not keys:
            return np.zeros(0, np.bool_)
        headers = seal(keys, payloads, self.page_bytes)
        parts = [[header, *payload] for header, payload in zip(headers, payloads, strict=True)]
        flags = self._call(self.storage.put_many, keys, parts, timeout_s=timeout_s)
        if flags is None:
            return np.zeros(len(keys), np.bool_)
        stored = int(flags.sum())
        self._count(stored=stored, refused=len(keys) - stored, bytes_written=stored * self.page_bytes)
        return flags

    def get_pages(self, digests: Digests, host_pages: PageIds, *, salt: bytes = b"",
                  timeout_s: float | None = None) -> BoolArray:  # fmt: skip
        """Fetch pages into host pages: bool [pages], whether each holds exactly what was stored under its digest.

        The bytes of a host page whose flag is False are anything: don't use it. Wrong pages are removed from storage.
        """
        keys, payloads = self._batch(digests, host_pages, salt)
        good = np.zeros(len(keys), np.bool_)
        if not keys:
            return good
        deadline = Deadline(timeout_s, "get_pages")
        headers = np.zeros((len(keys), HEADER_BYTES), np.uint8)
        parts = [[header, *payload] for header, payload in zip(headers, payloads, strict=True)]
        sizes = self._call(self.storage.get_many, keys, parts, timeout_s=timeout_s)
        if sizes is None:
            self._count(misses=len(keys))
            return good
        there = np.flatnonzero(sizes >= 0)
        found = [keys[index] for index in there.tolist()]
        verdicts = verify(headers[there], found, [payloads[index] for index in there.tolist()], self.page_bytes,
                          sizes[there])  # fmt: skip
        good[there] = [verdict is Verdict.GOOD for verdict in verdicts]
        wrong = {key: verdict for key, verdict in zip(found, verdicts, strict=True) if verdict is not Verdict.GOOD}
        hits = int(good.sum())
        self._count(hits=hits, misses=len(keys) - hits, bytes_read=hits * self.page_bytes)
        if wrong:
            self._remove(wrong, deadline)
        return good

    def count_prefix(self, digests: Digests, *, salt: bytes = b"", timeout_s: float | None = None) -> int:
        """How many leading pages storage has, as far as it knows; get_pages may still miss some."""
        keys = self.keys(digests, salt)
        deadline = Deadline(timeout_s, "count_prefix")
        found, step = 0, _FIRST_LOOK_UP
        while found < len(keys) and not deadline.passed():
            asked = keys[found : found + step]
            flags = self._call(self.storage.exists_many, asked, timeout_s=deadline.left_s())
            if flags is None:
                break
            leading = len(asked) if flags.all() else int(flags.argmin())
            found += leading
            if leading < len(asked):
                break
            step *= 2
        return found

    # ---- the rest ----------------------------------------------------------------------------------------------------
    @property
    def counters(self) -> PageCounters:
        """A copy of the counters."""
        with self._lock:
            return replace(self._counters)

    def _batch(self, digests: Digests, host_pages: PageIds, salt: bytes) -> tuple[list[str], list[list[memoryview]]]:
        keys = self.keys(digests, salt)
        if len(keys) != len(host_pages):
            raise InvalidArgumentError(f"{len(keys)} digests and {len(host_pages)} host pages")
        payloads = [self._page_parts(page) for page in np.asarray(host_pages).tolist()]
        for page, payload in zip(host_pages, payloads, strict=True):
            if (size := sum(map(len, payload))) != self.page_bytes:
                raise InvalidArgumentError(f"host page {page} has {size} bytes, the namespace's {self.page_bytes}")
        return keys, payloads

    def _call(self, function: Callable[..., Answer], *arguments: Any, timeout_s: float | None) -> Answer | None:
        """The answer of storage, or None, counted, if it failed or is being left alone."""
        if not self.breaker.allow():
            self._count(skipped=1)
            return None
        try:
            answer = function(*arguments, timeout_s=timeout_s)
        except StorageTimeoutError:
            self._count(timeouts=1)
        except StorageError:
            self._count(errors=1)
        except BaseException:
            self.breaker.failed()  # a trial that ends otherwise must not leave the breaker waiting for its result
            raise
        else:
            self.breaker.succeeded()
            return answer
        self.breaker.failed()
        return None

    def _remove(self, wrong: Mapping[str, Verdict], deadline: Deadline) -> None:
        kinds = list(wrong.values())
        self._count(**{verdict.value: kinds.count(verdict) for verdict in set(kinds)})
        if deadline.passed():
            return  # the next get finds them again
        keys = list(wrong)
        if self._call(self._delete, keys, timeout_s=deadline.left_s()):
            self._count(removed=len(keys))

    def _delete(self, keys: list[str], *, timeout_s: float | None) -> bool:
        self.storage.delete_many(keys, timeout_s=timeout_s)
        return True

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, value in more.items():
                setattr(self._counters, name, getattr(self._counters, name) + value)


assert {field.name for field in fields(PageCounters)} >= {verdict.value for verdict in Verdict} - {"good"}


class _HostPool(Protocol):
    """What host_page_parts needs of a HostKVCache."""

    page_size: int

    @property
    def arena(self) -> Any: ...

    def page_buffer(self, index: int) -> Sequence[tuple[int, int]]: ...


def host_page_parts(pool: _HostPool) -> PageParts:
    """Where the pages of a HostKVCache lie, as slices of its arena: no copy, and no ctypes a piece."""

    def parts(page: int) -> list[memoryview]:
        memory, base = memoryview(pool.arena.data), pool.arena.address
        pieces = pool.page_buffer(page * pool.page_size)
        return [memory[address - base : address - base + num_bytes] for address, num_bytes in pieces]

    return parts
