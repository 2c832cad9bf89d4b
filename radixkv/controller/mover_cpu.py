"""L3: copies between host memory and a device whose memory is host memory too, on two threads."""

from __future__ import annotations

from typing import Any

from ..pool.layout import KVView
from ..transfer.cpu import CpuTransfer, Progress
from ..types import PageIds
from .lanes import CopyLane, CopyTicket, PageLane, PageTicket

__all__ = ["CpuMover"]


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
        self._writes = PageLane("radixkv-write", lambda src, dst, _: self._to_host.copy(src, dst))
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

    def close(self) -> None:
        """See Mover. Waits for the copies that run."""
        self._writes.close()
        self._loads.close()
