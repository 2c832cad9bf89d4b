"""L3: copies between page-locked host memory and a GPU, on two streams."""

from __future__ import annotations

from typing import Any

from ..pool.layout import KVView
from ..types import PageIds
from .base import LayerProgress, Ticket

__all__ = ["CudaMover"]


class CudaMover:
    """A Mover over the GPU path: a stream for backups, a stream for loads.

    Args:
        geometry: of the pools.
        device_view, host_view: where the bytes lie; the host's should be page-locked.
        compute_stream: what returns the stream that computes now, as a number (cudaStream_t); a backup waits for it, a
            layer that is waited for makes it wait. None: torch's current stream, or CuPy's without torch.
    Raises: DeviceUnavailableError that says what is missing.
    """

    def __init__(self, geometry: Any, device_view: KVView, host_view: KVView, compute_stream: Any = None) -> None:
        raise NotImplementedError

    def backup(self, device_pages: PageIds, host_pages: PageIds) -> Ticket:
        raise NotImplementedError

    def load(self, host_pages: PageIds, device_pages: PageIds, progress: Any) -> Ticket:
        raise NotImplementedError

    def new_progress(self) -> LayerProgress:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError
