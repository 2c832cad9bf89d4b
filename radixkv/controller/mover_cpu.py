"""L3: copies between host memory and a device whose memory is host memory too: on two threads, and by who waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ..pool.layout import KVView
from ..transfer.cpu import CpuTransfer, Progress
from ..types import PageIds
from .lanes import CopyLane, CopyTicket, PageLane, PageTicket, close_lanes

__all__ = ["CpuMover", "SharedLane"]


class _Rest(PageTicket):
    """What is left of a ticket that has begun: its pages from ``start`` on."""

    def __init__(self, ticket: PageTicket, start: int) -> None:
        super().__init__(ticket.lane, ticket.src_pages[start:], ticket.dst_pages[start:])
        self._ticket = ticket

    def end(self, error: BaseException | None) -> None:
        super().end(error)
        self._ticket.seconds += self.seconds
        self._ticket.end(error)


class SharedLane(PageLane):
    """A PageLane in which whoever waits for a copy does it himself, if the thread does none just now.

    To hand it over and to be woken takes longer than most copies, and who waits has nothing else to do. He stops when
    his time is up, and then the thread does the rest; what fails it tries again, one by one. There is one copy at a
    time, in order, whoever does it.

    Args: copy_until: (source pages, destination pages, until) copies from the first page on until then (of
        time.monotonic; it may take somewhat longer), and says how many it has copied.
    """

    def __init__(
        self,
        name: str,
        copy: Callable[[PageIds, PageIds, list[Any]], None],
        copy_until: Callable[[PageIds, PageIds, float | None], int],
    ) -> None:
        super().__init__(name, copy)
        self._copy_until = copy_until
        self._copying = threading.Lock()

    def _turn(self) -> None:
        with self._copying:
            super()._turn()

    def awaited(self, ticket: PageTicket, until_s: float | None) -> None:
        """See PageLane: copy until it is done, or the time is up."""
        if not self._copying.acquire(blocking=False):
            self.flush()
            return
        try:
            helps = until_s is None or time.monotonic() < until_s
            while helps and not ticket.done():
                with self._lock:
                    self._line_up()
                    tickets = self._next() if self._waiting else []
                helps = bool(tickets) and self._help(tickets, until_s)
        finally:
            self._copying.release()
            if not ticket.done() or self._waiting:
                with self._lock:
                    self._begin()

    def _help(self, tickets: list[PageTicket], until_s: float | None) -> bool:
        """Copy tickets of the queue, here. Returns: False: the thread has to go on with them."""
        begun = [ticket for ticket in tickets if ticket.begin_once()]
        if not begun:
            return True
        src_pages, dst_pages = begun[0].src_pages, begun[0].dst_pages
        if len(begun) > 1:
            src_pages = np.concatenate([ticket.src_pages for ticket in begun])
            dst_pages = np.concatenate([ticket.dst_pages for ticket in begun])
        began_s, copied = time.perf_counter(), 0
        try:
            copied = self._copy_until(src_pages, dst_pages, until_s)
        except Exception as error:
            if len(begun) == 1:
                begun[0].end(error)
                return True
        except BaseException:  # who waits is interrupted, which is nothing to the copy
            self._leave([_Rest(ticket, 0) for ticket in begun])
            raise
        seconds, rests = (time.perf_counter() - began_s) / len(begun), []
        for ticket in begun:
            ticket.seconds = seconds
            here = min(copied, len(ticket.src_pages))
            copied -= here
            if here < len(ticket.src_pages):
                rests.append(_Rest(ticket, here))
            else:
                ticket.end(None)
        self._leave(rests)
        return not rests

    def _leave(self, rests: list[_Rest]) -> None:
        """To the thread, before all others."""
        with self._lock:
            self._waiting.extendleft(reversed(rests))


class CpuMover:
    """A Mover over the CPU path: one thread for backups, one for loads, each started with its first copy. Who waits for
    a backup copies it himself, as long as he has time.

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
        self._writes = SharedLane(
            "radixkv-write",
            lambda src, dst, _: self._to_host.copy(src, dst),
            lambda src, dst, until_s: self._to_host.copy_until(src, dst, until_s),
        )
        self._loads = CopyLane("radixkv-load")

    def backup(self, device_pages: PageIds, host_pages: PageIds) -> PageTicket:
        """See Mover."""
        return self._writes.take_on(device_pages, host_pages)

    def flush(self) -> None:
        """See Mover."""
        self._writes.flush()

    def load(self, host_pages: PageIds, device_pages: PageIds, progress: Any) -> CopyTicket:
        """See Mover."""
        ticket = CopyTicket(lambda: self._to_device.copy(host_pages, device_pages, progress), progress.fail)
        self._loads.put(ticket)
        return ticket

    def new_progress(self) -> Progress:
        """See Mover."""
        return Progress(self._num_layers)

    def close(self, timeout_s: float | None = None) -> bool:
        """See Mover."""
        return close_lanes([self._writes, self._loads], timeout_s)
