"""L2: pages of a host pool, in and out of any ``Storage``, under keys that say all that their bytes depend on.

    key = 32 hex digits of the namespace's digest (model, layout, ..., tenant salt) + the page's own digest in hex

A page's digest is that of its whole prefix (a hash chain), so equal keys mean equal bytes, in every process and on
every machine. Nothing here raises because storage failed: a page that cannot be had is a miss, and is counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import InvalidArgumentError
from ..types import PageIds
from .base import BoolArray, FlatParts, Storage, flat_parts
from .breaker import Breaker, BreakerConfig
from .namespace import PageNamespace
from .sealed import PageCounters, Prefix, SealedStore

__all__ = ["PageParts", "PageStore", "host_page_parts"]

PageParts = Callable[[int], list[memoryview]]
"""Host page id -> the page's contiguous pieces, in the order of its flat bytes; valid while the page is allocated.
If it has a method ``many`` (page ids -> a list of that, or FlatParts), that is asked once a batch."""

Digests = npt.NDArray[np.uint8]


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
        self.namespace, self.page_bytes = namespace, namespace.page_bytes
        self._sealed = SealedStore(storage, breaker=breaker, clock=clock)
        self._page_parts = page_parts
        self._prefixes: dict[bytes, str] = {}

    @property
    def storage(self) -> Storage:
        """The backend."""
        return self._sealed.storage

    @property
    def breaker(self) -> Breaker:
        """Whether storage is being left alone."""
        return self._sealed.breaker

    @property
    def counters(self) -> PageCounters:
        """A copy of the counters."""
        return self._sealed.counters

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
    def set_pages(self, digests: Digests, host_pages: PageIds, *, salt: bytes = b"", timeout_s: float | None = None,
                  after: bytes | None = None) -> BoolArray:  # fmt: skip
        """Store host pages: bool [pages], whether each is in storage now.

        Args:
            host_pages: int32 [pages].
            after: the pages follow each other in one prompt, and this is the digest of the page before them (b"": there
                is none). Storage may then see to it that no page outlives the pages that it is reached by, and does not
                take it without (Storage.put_each). None: nothing is known of that.
        """
        keys, payloads = self._batch(digests, host_pages, salt)
        before = None if after is None else ""
        if after:
            before = self.keys(np.frombuffer(after, np.uint8)[None], salt)[0]
        return self._sealed.put(keys, payloads, timeout_s, before)

    def get_pages(self, digests: Digests, host_pages: PageIds, *, salt: bytes = b"",
                  timeout_s: float | None = None) -> BoolArray:  # fmt: skip
        """Fetch pages into host pages: bool [pages], whether each holds exactly what was stored under its digest.

        The bytes of a host page whose flag is False are anything: don't use it. Wrong pages are removed from storage.
        """
        return self._sealed.get(*self._batch(digests, host_pages, salt), timeout_s)

    def count_prefix(self, digests: Digests, *, salt: bytes = b"", timeout_s: float | None = None) -> int:
        """How many leading pages storage has, as far as it knows; get_pages may still miss some."""
        return self.find_prefix(digests, salt=salt, timeout_s=timeout_s).found

    def find_prefix(self, digests: Digests, *, salt: bytes = b"", timeout_s: float | None = None,
                    touch: bool = False) -> Prefix:  # fmt: skip
        """count_prefix, and whether storage has answered. Args: touch: the pages count as used now, where storage makes
        room by use."""
        return self._sealed.find_prefix(self.keys(digests, salt), timeout_s, touch)

    def lost(self) -> int:
        """See Storage.lost."""
        return self.storage.lost()

    def _batch(self, digests: Digests, host_pages: PageIds, salt: bytes) -> tuple[list[str], FlatParts]:
        keys = self.keys(digests, salt)
        if len(keys) != len(host_pages):
            raise InvalidArgumentError(f"{len(keys)} digests and {len(host_pages)} host pages")
        many = getattr(self._page_parts, "many", None)
        payloads = flat_parts(
            [self._page_parts(page) for page in np.asarray(host_pages).tolist()] if many is None else many(host_pages)
        )
        for page, size in zip(host_pages, payloads.sizes, strict=True):
            if size != self.page_bytes:
                raise InvalidArgumentError(f"host page {page} has {size} bytes, the namespace's {self.page_bytes}")
        return keys, payloads


class _HostPool(Protocol):
    """What host_page_parts needs of a HostKVCache."""

    @property
    def arena(self) -> Any: ...

    def page_pieces(self, page_ids: PageIds) -> tuple[npt.NDArray[np.int64], int]: ...


class _HostPageParts:
    """PageParts of a host pool, and ``many`` of them at once."""

    def __init__(self, pool: _HostPool) -> None:
        self._pool = pool

    def many(self, pages: PageIds) -> FlatParts:
        memory = memoryview(self._pool.arena.data)
        starts, size = self._pool.page_pieces(pages)
        if (starts[:, 1:] == starts[:, :-1] + size).all():  # one behind the other: page_first
            starts, size = starts[:, :1], size * starts.shape[1]
        return FlatParts.of_slices(memory, starts, size)

    def __call__(self, page: int) -> list[memoryview]:
        return self.many(np.array([page], np.int32))[0]


def host_page_parts(pool: _HostPool) -> PageParts:
    """Where the pages of a HostKVCache lie, as slices of its arena: no copy, and their states checked once a batch."""
    return _HostPageParts(pool)
