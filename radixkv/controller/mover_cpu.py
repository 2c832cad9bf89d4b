"""L3: copies between host memory and a device whose memory is host memory too, on two threads."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ..errors import StateError
from ..pool.layout import KVView
from ..transfer.cpu import CpuTransfer, Progress
from ..types import PageIds

__all__ = ["CpuMover", "CpuTicket"]


class CpuTicket:
    """One copy of a CpuMover; see Ticket."""

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


class _Lane:
    """One thread that runs tickets in order."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._waiting: deque[CpuTicket] = deque()
        self._closed = False
        self._thread: threading.Thread | None = None

    def put(self, ticket: CpuTicket) -> None:
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
        with self._changed:
            self._closed = True
            waiting = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        for ticket in waiting:
            ticket.cancel()
        if self._thread is not None:
            self._thread.join()


class CpuMover:
    """A Mover over the CPU path: one thread for backups, one for loads, each started with its first copy.

    What computes on such a device must have written the pages when ``backup`` is called.

    Args:
        transfer: a CpuTransfer of the pools' geometry.
        device_view, host_view: where the bytes lie; both on "cpu".
    Raises: InvalidArgumentError for views of another shape or device.
    """

    def __init__(self, transfer: CpuTransfer, device_view: KVView, host_view: KVView) -> None:
        self._to_host = transfer.route(device_view, host_view)
        self._to_device = transfer.route(host_view, device_view)
        self._num_layers = transfer.geometry.num_layers
        self._writes, self._loads = _Lane("radixkv-write"), _Lane("radixkv-load")

    def backup(self, device_pages: PageIds, host_pages: PageIds) -> CpuTicket:
        """See Mover."""
        ticket = CpuTicket(lambda: self._to_host.copy(device_pages, host_pages))
        self._writes.put(ticket)
        return ticket

    def load(self, host_pages: PageIds, device_pages: PageIds, progress: Any) -> CpuTicket:
        """See Mover."""
        ticket = CpuTicket(lambda: self._to_device.copy(host_pages, device_pages, progress), progress.fail)
        self._loads.put(ticket)
        return ticket

    def new_progress(self) -> Progress:
        """See Mover."""
        return Progress(self._num_layers)

    def close(self) -> None:
        """See Mover. Waits for the copies that run."""
        self._writes.close()
        self._loads.close()
