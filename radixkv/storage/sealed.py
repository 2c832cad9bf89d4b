"""L2: values in envelopes, over any ``Storage``: verification, counters, and back-off. What PageStore is made of.

Nothing here raises because storage failed: a value that cannot be had is a miss, and is counted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ..errors import StorageError, StorageTimeoutError
from .base import BoolArray, Deadline, Parts, Storage, flat_parts
from .breaker import Breaker, BreakerConfig
from .envelope import Check, Seal, Verdict, require_checksum

__all__ = ["PageCounters", "Prefix", "SealedStore"]

Answer = TypeVar("Answer")

_log = logging.getLogger("radixkv.storage")

_FIRST_LOOK_UP = 64
"""Keys asked for at once by count_prefix, doubled at each step: a short hit costs little, a long one few calls."""


@dataclass(slots=True, kw_only=True)
class PageCounters:
    """Of one store, since it was made. Pages, but for the last lines.

    hits, misses: pages that a get brought, and did not bring for whatever reason.
    corrupt, foreign, short: misses because of what was stored (envelope.Verdict). removed: of those, from storage.
    stored, refused: pages that a put stored (or found there), and that storage had no room for or failed to write.
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


class Prefix(NamedTuple):
    """Leading values that are in storage. answered: False if storage failed, was left alone, or took too long: there
    may be more."""

    found: int
    answered: bool


class SealedStore:
    """Values under keys, each in an envelope. Thread-safe, as its storage is.

    Args:
        storage: any backend; it stays open, as several stores may share it.
        breaker: when to leave a dead one alone. That it is, and that it is not any more, is logged.
    Raises: StorageError if the checksum's package is missing.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        breaker: BreakerConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        require_checksum()
        self.storage, self.breaker = storage, Breaker(breaker, clock)
        self._lock = threading.Lock()
        self._counters = PageCounters()

    @property
    def counters(self) -> PageCounters:
        """A copy of the counters."""
        with self._lock:
            return replace(self._counters)

    def put(self, keys: Sequence[str], payloads: Sequence[Parts], timeout_s: float | None,
            after: str | None = None) -> BoolArray:  # fmt: skip
        """Store values: bool [len(keys)], whether each is there now. Args: after: of a chain; see Storage.put_each."""
        if not keys:
            return np.zeros(0, np.bool_)
        flat = flat_parts(payloads)
        seal = Seal(keys, flat)
        put = partial(self.storage.put_each, after=after)
        flags = self._call(put, keys, seal.parts(), seal.prepare, timeout_s=timeout_s)
        if flags is None:
            return np.zeros(len(keys), np.bool_)
        stored = int(flags.sum())
        self._count(stored=stored, refused=len(keys) - stored, bytes_written=int(np.array(flat.sizes)[flags].sum()))
        return flags

    def get(self, keys: Sequence[str], payloads: Sequence[Parts], timeout_s: float | None) -> BoolArray:
        """Fetch values: bool [len(keys)], whether each payload holds exactly what was put. Wrong ones are removed."""
        good = np.zeros(len(keys), np.bool_)
        if not keys:
            return good
        deadline = Deadline(timeout_s, "get")
        flat = flat_parts(payloads, writable=True)
        check = Check(keys, flat)
        sizes = self._call(self.storage.get_each, keys, check.parts(), check.arrived, timeout_s=timeout_s)
        if sizes is None:
            self._count(misses=len(keys))
            return good
        verdicts = check.verdicts(sizes)
        good[:] = sizes >= 0
        good[list(verdicts)] = False
        hits = int(good.sum())
        self._count(hits=hits, misses=len(keys) - hits, bytes_read=int(np.array(flat.sizes)[good].sum()))
        if verdicts:
            self._remove({keys[index]: verdict for index, verdict in verdicts.items()}, deadline)
        return good

    def exists(self, keys: Sequence[str], timeout_s: float | None) -> BoolArray:
        """Look keys up. A get may still miss."""
        flags = self._call(self.storage.exists_many, keys, timeout_s=timeout_s) if keys else None
        return np.zeros(len(keys), np.bool_) if flags is None else flags

    def find_prefix(self, keys: Sequence[str], timeout_s: float | None, touch: bool = False) -> Prefix:
        """How many leading keys are there. Args: touch: they count as used now; see Storage.touch_many."""
        deadline = Deadline(timeout_s, "find_prefix")
        look_up = self.storage.touch_many if touch else self.storage.exists_many
        found, step = 0, _FIRST_LOOK_UP
        while found < len(keys):
            some = keys[found : found + step]
            flags = None if deadline.passed() else self._call(look_up, some, timeout_s=deadline.left_s())
            if flags is None:
                return Prefix(found, False)
            leading = len(flags) if flags.all() else int(flags.argmin())
            found += leading
            if leading < len(flags):
                break
            step *= 2
        return Prefix(found, True)

    def delete(self, keys: Sequence[str], timeout_s: float | None) -> bool:
        """Remove keys. Returns: whether storage did."""
        return bool(self._call(self._delete, keys, timeout_s=timeout_s))

    def _delete(self, keys: Sequence[str], *, timeout_s: float | None) -> bool:
        self.storage.delete_many(keys, timeout_s=timeout_s)
        return True

    def _call(self, function: Callable[..., Answer], *arguments: Any, timeout_s: float | None) -> Answer | None:
        """The answer of storage, or None, counted, if it failed or is being left alone."""
        if not self.breaker.allow():
            self._count(skipped=1)
            return None
        try:
            answer = function(*arguments, timeout_s=timeout_s)
        except StorageTimeoutError as error:
            self._count(timeouts=1)
            reason = str(error)
        except StorageError as error:
            self._count(errors=1)
            reason = str(error)
        except BaseException:
            self.breaker.failed()  # a trial that ends otherwise must not leave the breaker waiting for its result
            raise
        else:
            if self.breaker.succeeded():
                _log.info("storage=back backend=%s", self.storage.name)
            return answer
        if self.breaker.failed():
            _log.warning("storage=left_alone backend=%s error=%r", self.storage.name, reason)
        return None

    def _remove(self, wrong: Mapping[str, Verdict], deadline: Deadline) -> None:
        kinds = list(wrong.values())
        self._count(**{verdict.value: kinds.count(verdict) for verdict in set(kinds)})
        if not deadline.passed() and self.delete(list(wrong), deadline.left_s()):  # else the next get finds them again
            self._count(removed=len(wrong))

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, value in more.items():
                setattr(self._counters, name, getattr(self._counters, name) + value)


assert {field.name for field in fields(PageCounters)} >= {verdict.value for verdict in Verdict}
