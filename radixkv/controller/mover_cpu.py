"""L3: copies between host memory and a device whose memory is host memory too, on two threads."""

from __future__ import annotations

from typing import Any

from ..pool.layout import KVView
from ..transfer.base import Transfer
from ..types import PageIds
from .base import LayerProgress, Ticket

__all__ = ["CpuMover"]


class CpuMover:
    """A Mover over the CPU path: one thread for backups, one for loads, started when they are needed.

    Args:
        transfer: a CpuTransfer of the pools' geometry.
        device_view, host_view: where the bytes lie.
    """

    def __init__(self, transfer: Transfer, device_view: KVView, host_view: KVView) -> None:
        raise NotImplementedError

    def backup(self, device_pages: PageIds, host_pages: PageIds) -> Ticket:
        raise NotImplementedError

    def load(self, host_pages: PageIds, device_pages: PageIds, progress: Any) -> Ticket:
        raise NotImplementedError

    def new_progress(self) -> LayerProgress:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError
