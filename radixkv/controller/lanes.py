"""L3: copies that run one after the other on a thread of their own: what movers are made of."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..errors import StateError, TransferError
from ..types import PageIds

__all__ = ["CopyLane", "CopyTicket", "FailedProgress", "FailedTicket", "PageLane", "PageTicket", "close_lanes"]
__all__ += ["start_thread"]

_CHANGES = threading.Lock()
"""About every ticket's change of state: held for a few assignments, and cheaper than a lock and an event a ticket."""

PAGES_TOGETHER = 256
"""A PageLane begins by itself once so many pages wait, and copies no more at a time."""


class CopyTicket:
    """One copy; see Ticket.

    Args:
        copy: does it, and returns when its bytes are in place.
        failed: is told why it did not happen; what it raises is added to that (a TransferError then).
    """

    # of the class until they change: a ticket is made for every backup
    _copy: Callable[[], None] | None = None
    _failed: Callable[[BaseException], object] | None = None
    _begun = _done = False
    _waited_for: threading.Event | None = None
    error: BaseException | None = None
    seconds = 0.0

    def __init__(self, copy: Callable[[], None], failed: Callable[[BaseException], object] | None = None) -> None:
        self._copy, self._failed = copy, failed

    def done(self) -> bool:
        return self._done

    def wait(self, timeout_s: float | None = None) -> bool:
        with _CHANGES:
            if self._done:
                return True
            if self._waited_for is None:
                self._waited_for = threading.Event()
        return self._waited_for.wait(timeout_s)

    def cancel(self) -> bool:
        return self.fail(StateError("the copy was cancelled"))

    def fail(self, error: BaseException) -> bool:
        """End it with an error, unless it has begun. Returns: whether it had not."""
        if not self.begin_once():
            return False
        self.end(error)
        return True

    def run(self) -> None:
        """By the mover's thread."""
        if not self.begin_once():
            return
        assert self._copy is not None
        began_s = time.perf_counter()
        error = _error_of(self._copy)
        self.seconds = time.perf_counter() - began_s
        self.end(error)

    def begin_once(self) -> bool:
        """Returns: False if it has begun already, or ended without."""
        with _CHANGES:
            begun, self._begun = self._begun, True
        return not begun

    def end(self, error: BaseException | None) -> None:
        """It has begun and is over."""
        if error is not None and self._failed is not None:
            told = _error_of(partial(self._failed, error))
            if told is not None:  # whoever waits for the ticket must hear of it all the same
                untold, error = error, TransferError(f"the copy failed ({error!r}), and telling so did, too: {told!r}")
                error.__cause__ = untold
        self.error = error
        with _CHANGES:
            self._done = True
            waited_for = self._waited_for
        if waited_for is not None:
            waited_for.set()


def _error_of(copy: Callable[[], object]) -> BaseException | None:
    try:
        copy()
    except BaseException as raised:  # whatever it is, the copy has not happened, and the thread goes on
        return raised
    return None


def start_thread(work: Callable[[], None], name: str) -> threading.Thread:
    """A daemon thread that has started. Raises: StateError if the system has none left."""
    thread = threading.Thread(target=work, name=name, daemon=True)
    try:
        thread.start()
    except (RuntimeError, MemoryError) as error:
        raise StateError(f"thread {name} cannot be started: {error}") from error
    return thread


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


class FailedProgress:
    """Of a load that could not even be asked for; see LayerProgress."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def wait(self, layer: int, timeout_s: float | None = None) -> bool:
        raise TransferError(f"layer {layer} will not come: {self.error}") from self.error

    def fail(self, error: BaseException) -> None:
        """It has failed already."""


class CopyLane:
    """One thread that runs tickets in order; started with the first. Args: name: of the thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._waiting: deque[Any] = deque()
        self._closed = False
        self._thread: threading.Thread | None = None

    def put(self, ticket: CopyTicket) -> None:
        """Run it after all others; fail it if the lane is closed."""
        with self._lock:
            closed = self._closed
            if not closed:
                self._waiting.append(ticket)
                self._wake()
        if closed:
            ticket.fail(StateError("the mover is closed"))

    def _wake(self) -> None:
        """The thread goes on with what waits, under the lock; it fails if there can be no thread. What comes next may
        fare better."""
        if self._thread is None:
            try:
                self._thread = start_thread(self._work, self._name)
            except StateError as error:
                waiting = list(self._waiting)
                self._waiting.clear()
                self._fail(waiting, error)
                return
        self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._lock:
                while not self._waiting:
                    if self._closed:
                        return
                    self._changed.wait()
            self._turn()

    def _turn(self) -> None:
        """Copy what is next, if it is there still. What breaks beside the copies fails them, and nothing else."""
        with self._lock:
            tickets = self._next() if self._waiting else []
        error = _error_of(partial(self._run, tickets))
        if error is not None:
            self._fail(tickets, error)

    def _fail(self, tickets: Sequence[CopyTicket], error: BaseException) -> None:
        for ticket in tickets:
            ticket.begin_once()
            if not ticket.done():
                ticket.end(error)

    def _next(self) -> list[Any]:
        """What is copied next, off the queue."""
        return [self._waiting.popleft()]

    def _run(self, tickets: list[Any]) -> None:
        for ticket in tickets:
            ticket.run()

    def close(self, timeout_s: float | None = None) -> bool:
        """Cancel what has not begun, wait for what has, end the thread. Returns: whether it has ended in time."""
        with self._lock:
            self._closed = True
            waiting = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        for ticket in waiting:
            ticket.cancel()
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()


class PageTicket(CopyTicket):
    """A copy of pages that a PageLane does together with others. after: what its ``mark`` said when it was flushed."""

    after: Any = None

    def __init__(self, lane: PageLane, src_pages: PageIds, dst_pages: PageIds) -> None:
        self.lane, self.src_pages, self.dst_pages = lane, src_pages, dst_pages

    def wait(self, timeout_s: float | None = None) -> bool:
        if self._done:
            return True
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        self.lane.awaited(self, until_s)
        return self._done or super().wait(None if until_s is None else max(0.0, until_s - time.monotonic()))


class PageLane(CopyLane):
    """Copies of pages that are taken on one by one, begin together with ``flush``, and are done together.

    A thread that wakes takes the interpreter from its caller, which costs more than the whole book-keeping of a backup.
    So nothing wakes before ``flush``, and what waits then is one copy (of PAGES_TOGETHER pages, unless one ticket alone
    has more). If it fails, each ticket is tried by itself: a bad one takes no other along.

    Args:
        copy: (source pages, destination pages, marks) returns when the bytes are in place. marks: see mark; distinct,
            in order.
        mark: is called in flush; what it returns is handed to the copy. What is to be copied is complete then.
    """

    def __init__(
        self,
        name: str,
        copy: Callable[[PageIds, PageIds, list[Any]], None],
        mark: Callable[[], Any] = lambda: None,
    ) -> None:
        super().__init__(name)
        self._copy_pages, self._mark = copy, mark
        self._taken_on: list[PageTicket] = []
        self._pages_taken_on = 0

    def take_on(self, src_pages: PageIds, dst_pages: PageIds) -> PageTicket:
        """A copy that begins with the next flush: of the caller, of who waits for it, or when enough has come
        together."""
        ticket = PageTicket(self, src_pages, dst_pages)
        with self._lock:
            if not self._closed:
                self._taken_on.append(ticket)
                self._pages_taken_on += len(src_pages)
                if self._pages_taken_on >= PAGES_TOGETHER:
                    self._begin()
                return ticket
        ticket.fail(StateError("the mover is closed"))
        return ticket

    def flush(self) -> None:
        """Begin what was taken on."""
        if self._taken_on:
            with self._lock:
                self._begin()

    def awaited(self, ticket: PageTicket, until_s: float | None) -> None:
        """Somebody waits for a ticket until then (of time.monotonic)."""
        self.flush()

    def _begin(self) -> None:
        self._line_up()
        if self._waiting:
            self._wake()

    def _line_up(self) -> None:
        """Put what was taken on into the queue."""
        tickets, self._taken_on, self._pages_taken_on = self._taken_on, [], 0
        if not tickets:
            return
        try:
            mark = self._mark()
        except Exception as raised:
            for ticket in tickets:
                ticket.fail(raised)
            return
        for ticket in tickets:
            ticket.after = mark
        self._waiting.extend(tickets)

    def _next(self) -> list[PageTicket]:
        tickets = [self._waiting.popleft()]
        num_pages = len(tickets[0].src_pages)
        while self._waiting:
            num_pages += len(self._waiting[0].src_pages)
            if num_pages > PAGES_TOGETHER:
                break
            tickets.append(self._waiting.popleft())
        return tickets

    def _run(self, tickets: list[PageTicket]) -> None:
        begun = [ticket for ticket in tickets if ticket.begin_once()]
        if not begun:
            return
        seconds, error = self._copy_together(begun)
        if error is not None and len(begun) > 1:
            for ticket in begun:
                ticket.seconds, error = self._copy_together([ticket])
                ticket.end(error)
            return
        num_pages = sum(len(ticket.src_pages) for ticket in begun)
        for ticket in begun:
            ticket.seconds = seconds * len(ticket.src_pages) / num_pages if num_pages else seconds
            ticket.end(error)

    def _copy_together(self, tickets: list[PageTicket]) -> tuple[float, BaseException | None]:
        """Returns: how long it took, and why it failed."""
        src_pages, dst_pages = tickets[0].src_pages, tickets[0].dst_pages
        if len(tickets) > 1:
            src_pages = np.concatenate([ticket.src_pages for ticket in tickets])
            dst_pages = np.concatenate([ticket.dst_pages for ticket in tickets])
        marks = list({id(ticket.after): ticket.after for ticket in tickets}.values())
        began_s = time.perf_counter()
        error = _error_of(lambda: self._copy_pages(src_pages, dst_pages, marks))
        return time.perf_counter() - began_s, error

    def close(self, timeout_s: float | None = None) -> bool:
        with self._lock:
            tickets, self._taken_on = self._taken_on, []
        for ticket in tickets:
            ticket.cancel()
        return super().close(timeout_s)


def close_lanes(lanes: Sequence[CopyLane], timeout_s: float | None) -> bool:
    """Close all. Returns: whether all threads have ended within that time."""
    end_s = None if timeout_s is None else time.monotonic() + timeout_s
    ended = [lane.close(None if end_s is None else max(0.0, end_s - time.monotonic())) for lane in lanes]
    return all(ended)
