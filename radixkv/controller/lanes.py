"""L3: copies that run one after the other on a thread of their own: what movers are made of."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from ..errors import StateError

__all__ = ["CopyLane", "CopyTicket", "FailedTicket"]


class CopyTicket:
    """One copy; see Ticket.

    Args:
        copy: does it, and returns when its bytes are in place.
        failed: is told why it did not happen.
    """

    def __init__(self, copy: Callable[[], None], failed: Callable[[BaseException], object] | None = None) -> None:
        self._copy, self._failed = copy, failed
        self._lock = threading.Lock()
        self._begun = False
        self._ended = threading.Event()
        self.error: BaseException | None = None
        self.seconds = 0.0

    def done(self) -> bool:
        return self._ended.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        return self._ended.wait(timeout_s)

    def cancel(self) -> bool:
        return self.fail(StateError("the copy was cancelled"))

    def fail(self, error: BaseException) -> bool:
        """End it with an error, unless it has begun. Returns: whether it had not."""
        with self._lock:
            if self._begun:
                return False
            self._begun = True
        self._end(error)
        return True

    def run(self) -> None:
        """By the mover's thread."""
        with self._lock:
            if self._begun:
                return
            self._begun = True
        began_s = time.perf_counter()
        error: BaseException | None = None
        try:
            self._copy()
        except Exception as raised:  # whatever it is, the copy has not happened
            error = raised
        self.seconds = time.perf_counter() - began_s
        self._end(error)

    def _end(self, error: BaseException | None) -> None:
        self.error = error
        if error is not None and self._failed is not None:
            self._failed(error)
        self._ended.set()


class FailedTicket:
    """A copy that could not even be asked for; see Ticket."""

    seconds = 0.0

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def done(self) -> bool:
        return True

    def wait(self, timeout_s: float | None = None) -> bool:
        return True

    def cancel(self) -> bool:
        return False


class CopyLane:
    """One thread that runs tickets in order; started with the first. Args: name: of the thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._waiting: deque[CopyTicket] = deque()
        self._closed = False
        self._thread: threading.Thread | None = None

    def put(self, ticket: CopyTicket) -> None:
        """Run it after all others; fail it if the lane is closed."""
        with self._changed:
            if not self._closed:
                self._waiting.append(ticket)
                if self._thread is None:
                    self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                    self._thread.start()
                self._changed.notify()
                return
        ticket.fail(StateError("the mover is closed"))

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    if self._closed:
                        return
                    self._changed.wait()
                ticket = self._waiting.popleft()
            ticket.run()

    def close(self) -> None:
        """Cancel what has not begun, wait for what has, end the thread. A second call does nothing."""
        with self._changed:
            self._closed = True
            waiting = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        for ticket in waiting:
            ticket.cancel()
        if self._thread is not None:
            self._thread.join()
