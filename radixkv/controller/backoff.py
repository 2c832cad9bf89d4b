"""L3: leaving storage alone after failures, alike on all ranks."""

from __future__ import annotations

from collections.abc import Callable

from .config import ControllerConfig

__all__ = ["BackOff"]


class BackOff:
    """Counts failures in a row, as agreed; when to try again is by each rank's own clock, so it is agreed in poll.

    calm --backoff_failures in a row--> backing off --agreed that the time is over--> calm, but the next failure backs
    off at once, for twice as long
    """

    def __init__(self, config: ControllerConfig, clock: Callable[[], float]) -> None:
        self._config, self._clock = config, clock
        self.failures = 0
        self.active = False
        self._until_s = 0.0

    def result(self, success: bool) -> None:
        """An operation has ended, as agreed."""
        config = self._config
        self.failures = 0 if success else self.failures + 1
        beyond = self.failures - config.backoff_failures
        if beyond >= 0:
            self.active = True
            self._until_s = self._clock() + min(config.backoff_max_s, config.backoff_base_s * 2.0 ** min(beyond, 30))

    def may_end(self) -> bool:
        """Whether this rank would try again."""
        return not self.active or self._clock() >= self._until_s

    def end(self) -> None:
        """All ranks would."""
        self.active = False

    def reset(self) -> None:
        """Another storage."""
        self.failures, self.active = 0, False
