"""L2: a circuit breaker: after some failures in a row calls are refused at once, but for a trial now and then."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import InvalidArgumentError

__all__ = ["Breaker", "BreakerConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerConfig:
    """When a store counts as dead, and how often it is tried again.

    Args:
        failures: in a row, until calls are refused. 3: a lost connection is retried, a dead server soon left alone.
        first_pause_s: until the first trial; each failed trial doubles the pause, up to longest_pause_s. The actual
            pause is 50 to 100 % of that, so that many engines don't return to a server all at once.
    """

    failures: int = 3
    first_pause_s: float = 0.5
    longest_pause_s: float = 30.0

    def __post_init__(self) -> None:
        if self.failures < 1 or not 0 < self.first_pause_s <= self.longest_pause_s:
            raise InvalidArgumentError(f"no breaker: {self}")


class Breaker:
    """Closed: every call is allowed. Open: none, until the pause is over; then one at a time, as a trial. Thread-safe.

        closed --`failures` in a row--> open --pause over--> trial --success--> closed
                                          ^                    |
                                          +--failure, twice the pause
    """

    def __init__(self, config: BreakerConfig | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.config, self._clock = config or BreakerConfig(), clock
        self._lock = threading.Lock()
        self._failures, self._pause_s, self._retry_at, self._trial = 0, 0.0, 0.0, False
        self.times_opened = 0
        """Since it was made; a failed trial is none."""

    @property
    def open(self) -> bool:
        """Whether calls are being refused (a trial may be due)."""
        with self._lock:
            return self._failures >= self.config.failures

    def allow(self) -> bool:
        """May a call be made now? Who gets True must report ``succeeded`` or ``failed``."""
        with self._lock:
            if self._failures < self.config.failures:
                return True
            if self._trial or self._clock() < self._retry_at:
                return False
            self._trial = True
            return True

    def succeeded(self) -> bool:
        """The store answered: closed again. Returns: whether it was open."""
        with self._lock:
            was_open = self._failures >= self.config.failures
            self._failures, self._pause_s, self._trial = 0, 0.0, False
            return was_open

    def failed(self) -> bool:
        """The call failed as a whole. Returns: whether that has opened it."""
        with self._lock:
            self._failures += 1
            self._trial = False
            if self._failures >= self.config.failures:
                config = self.config
                self._pause_s = min(max(2 * self._pause_s, config.first_pause_s), config.longest_pause_s)
                self._retry_at = self._clock() + self._pause_s * random.uniform(0.5, 1)
            opened = self._failures == self.config.failures
            self.times_opened += opened
            return opened
