"""L3: copies between page-locked host memory and a GPU, on two streams.

    compute stream   --- forward ---[e]-----------------[wait layer 0]- attention 0 -[wait layer 1]- attention 1 ...
                                     |                        ^                           ^
    write stream     ............ [wait e]== backup ==[done]  |                           |
    load stream      ............ [wait e]== layer 0 ==[e0]---+     == layer 1 ==[e1]-----+

A copy waits for what computes when it is asked for (the forward pass may still write the pages that are backed up, or
read those that a load gets), and a layer that computes waits for its load. A thread a direction puts copies on the
stream and waits for their end, so that the caller launches nothing.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any, Protocol

from ..errors import DeviceUnavailableError, TransferError
from ..pool.layout import KVGeometry, KVView
from ..transfer.cpu import Progress
from ..transfer.plan import CopyPlan, plan_copy
from ..types import PageIds
from .lanes import CopyLane, CopyTicket

__all__ = ["CudaMover", "CudaProgress", "CupyStreams", "DeviceCopies", "Streams"]


class Streams(Protocol):
    """What is needed of streams and events. Events and streams are opaque, but that a stream has a number."""

    def new(self) -> int:
        """A stream of our own, as a number."""
        ...

    def record(self, stream: int) -> Any:
        """An event at the end of a stream."""
        ...

    def wait(self, stream: int, event: Any) -> None:
        """What is put on the stream from now on waits for the event."""
        ...

    def finish(self, event: Any) -> None:
        """Wait here for an event. Raises: TransferError."""
        ...


class CupyStreams:
    """Streams by CuPy. Raises: DeviceUnavailableError without CuPy."""

    def __init__(self, device: int) -> None:
        try:
            self._cupy: Any = importlib.import_module("cupy")
        except ImportError as error:
            raise DeviceUnavailableError(f"a GPU needs CuPy (radixkv[cuda12] or [cuda13]): {error}") from error
        self.device = device
        self._kept: list[Any] = []

    def new(self) -> int:
        """See Streams."""
        with self._cupy.cuda.Device(self.device):
            stream = self._cupy.cuda.Stream(non_blocking=True)
        self._kept.append(stream)  # a CuPy stream ends with its object
        return int(stream.ptr)

    def record(self, stream: int) -> Any:
        """See Streams."""
        with self._cupy.cuda.Device(self.device):
            event = self._cupy.cuda.Event(disable_timing=True)
            event.record(self._cupy.cuda.ExternalStream(stream, self.device))
        return event

    def wait(self, stream: int, event: Any) -> None:
        """See Streams."""
        with self._cupy.cuda.Device(self.device):
            self._cupy.cuda.ExternalStream(stream, self.device).wait_event(event)

    def finish(self, event: Any) -> None:
        """See Streams."""
        try:
            event.synchronize()
        except self._cupy.cuda.runtime.CUDARuntimeError as error:
            raise TransferError(f"a copy on cuda:{self.device} failed: {error}") from error


class DeviceCopies(Protocol):
    """Puts copies on streams."""

    def copy(self, plan: CopyPlan, stream: int) -> None:
        """Put a whole copy on a stream."""
        ...

    def copy_layers(self, plan: CopyPlan, stream: int, after_layer: Callable[[int], None]) -> None:
        """Put a copy on a stream layer by layer; ``after_layer`` is called when one has been put there."""
        ...


class GpuCopies:
    """By kernels or copy engine, as the chooser of a GpuTransfer says."""

    def __init__(self, geometry: KVGeometry, device: int) -> None:
        from ..transfer import gpu  # which needs no GPU to be imported, but makes sense with one only

        self._gpu = gpu
        self._transfer = gpu.GpuTransfer(geometry, device)

    def copy(self, plan: CopyPlan, stream: int) -> None:
        """See DeviceCopies."""
        if plan.num_pages:
            self._path(plan).run(plan, stream=stream)

    def copy_layers(self, plan: CopyPlan, stream: int, after_layer: Callable[[int], None]) -> None:
        """See DeviceCopies."""
        path: Any = self._path(plan.layer(plan.layers.start))
        if hasattr(path, "run_layers"):  # one upload of the page ids for all layers
            path.run_layers(plan, stream=stream, after_layer=after_layer)
            return
        for layer in plan.layers:
            path.run(plan.layer(layer), stream=stream)
            after_layer(layer)

    def _path(self, plan: CopyPlan) -> Any:
        return self._transfer.paths[self._transfer.chooser.choose(*self._gpu.shape_of(plan))]


class CudaProgress:
    """The layers of one batch of loads; see LayerProgress. ``wait`` blocks until a layer's copy has been put on the
    load stream, and then makes the compute stream wait for it."""

    def __init__(self, num_layers: int, streams: Streams, compute_stream: Callable[[], int]) -> None:
        self.issued = Progress(num_layers)
        self._streams, self._compute_stream = streams, compute_stream
        self.events: list[Any] = []

    @property
    def error(self) -> BaseException | None:
        """Why the batch failed."""
        return self.issued.error

    def fail(self, error: BaseException) -> bool:
        """See LayerProgress."""
        return self.issued.fail(error)

    def put(self, event: Any) -> None:
        """The next layer is on the load stream, up to this event."""
        self.events.append(event)
        self.issued.advance(len(self.events))

    def wait(self, layer: int, timeout_s: float | None = None) -> bool:
        """See LayerProgress."""
        if not self.issued.wait(layer, timeout_s):
            return False
        self._streams.wait(self._compute_stream(), self.events[layer])
        return True


class CudaMover:
    """A Mover over the GPU path: a stream and a thread for backups, a stream and a thread for loads.

    Args:
        geometry: of the pools.
        device_view, host_view: where the bytes lie; the host's must be page-locked.
        compute_stream: returns the stream that computes now, as a number (cudaStream_t); called on the thread that asks
            for a copy or waits for a layer. None: torch's current stream, or CuPy's without torch.
        streams, copies: None: made for the device, now.
    Raises: DeviceUnavailableError that says what is missing.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        device_view: KVView,
        host_view: KVView,
        compute_stream: Callable[[], int] | None = None,
        *,
        streams: Streams | None = None,
        copies: DeviceCopies | None = None,
    ) -> None:
        name, _, number = device_view.device.partition(":")
        if name != "cuda":
            raise DeviceUnavailableError(f"the device pool is on {device_view.device}, and this mover needs a GPU")
        device = int(number or 0)
        self._geometry, self._device, self._host = geometry, device_view, host_view
        self._streams: Streams = streams or CupyStreams(device)
        self._copies: DeviceCopies = copies or GpuCopies(geometry, device)
        self._compute_stream = compute_stream or (lambda: current_stream(device))
        self._write_stream, self._load_stream = self._streams.new(), self._streams.new()
        self._writes, self._loads = CopyLane("radixkv-write"), CopyLane("radixkv-load")

    def backup(self, device_pages: PageIds, host_pages: PageIds) -> CopyTicket:
        """See Mover."""
        plan = plan_copy(self._geometry, self._device, self._host, device_pages, host_pages)
        computed = self._streams.record(self._compute_stream())

        def copy() -> None:
            self._streams.wait(self._write_stream, computed)
            self._copies.copy(plan, self._write_stream)
            self._streams.finish(self._streams.record(self._write_stream))

        ticket = CopyTicket(copy)
        self._writes.put(ticket)
        return ticket

    def load(self, host_pages: PageIds, device_pages: PageIds, progress: Any) -> CopyTicket:
        """See Mover."""
        plan = plan_copy(self._geometry, self._host, self._device, host_pages, device_pages)
        computed = self._streams.record(self._compute_stream())

        def copy() -> None:
            progress.issued.begin(self._geometry.num_layers)
            self._streams.wait(self._load_stream, computed)
            self._copies.copy_layers(
                plan, self._load_stream, lambda layer: progress.put(self._streams.record(self._load_stream))
            )
            self._streams.finish(self._streams.record(self._load_stream))

        ticket = CopyTicket(copy, progress.fail)
        self._loads.put(ticket)
        return ticket

    def new_progress(self) -> CudaProgress:
        """See Mover."""
        return CudaProgress(self._geometry.num_layers, self._streams, self._compute_stream)

    def close(self) -> None:
        """See Mover. Waits for the copies that run."""
        self._writes.close()
        self._loads.close()


def current_stream(device: int) -> int:
    """The stream that computes now on the calling thread: torch's if torch is loaded, else CuPy's."""
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.cuda.current_stream(device).cuda_stream)
    return int(importlib.import_module("cupy").cuda.get_current_stream().ptr)
