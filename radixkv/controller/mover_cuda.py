"""L3: copies between page-locked host memory and a GPU, on two streams.

    compute stream   --- forward ---[e]-----------------[wait layer 0]- attention 0 -[wait layer 1]- attention 1 ...
                                     |                        ^                           ^
    write stream     ............ [wait e]== backup ==[done]  |                           |
    load stream      ............ [wait e]== layer 0 ==[e0]---+     == layer 1 ==[e1]-----+

A copy waits for what computes when it is asked for (the forward pass may still write the pages that are backed up, or
those that a load gets: the token of a request that has ended is computed and dropped), and a layer that computes waits
for its load. A thread a direction puts copies on the stream and waits for their end, so that the caller launches
nothing.

What computes is the end of a stream, if all that concerns the copy is on it by then. Where another thread launches the
forward passes it is not: see ``Fence``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeAlias

from ..errors import DeviceUnavailableError, TransferError
from ..pool.layout import KVGeometry, KVView
from ..transfer.choose import Chooser, PathName
from ..transfer.gpu import GpuTransfer, device_key
from ..transfer.plan import CopyPlan, plan_copy
from ..types import PageIds
from .lanes import CopyLane, CopyTicket, PageLane, PageTicket, close_lanes

__all__ = ["CudaMover", "CupyStreams", "Fence", "GpuTransfers", "StreamProgress", "StreamTransfer", "Streams"]


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
            cupy: Any = importlib.import_module("cupy")
        except ImportError as error:
            raise DeviceUnavailableError(f"a GPU needs CuPy (radixkv[cuda12] or [cuda13]): {error}") from error
        self.device = device
        self._cuda: Any = cupy.cuda
        self._runtime: Any = cupy.cuda.runtime
        self._kept: list[Any] = []

    def new(self) -> int:
        """See Streams."""
        with self._cuda.Device(self.device):
            stream = self._cuda.Stream(non_blocking=True)
        self._kept.append(stream)  # a CuPy stream ends with its object
        return int(stream.ptr)

    def record(self, stream: int) -> Any:
        """See Streams. Raises: TransferError."""
        try:
            with self._cuda.Device(self.device):
                event = self._cuda.Event(disable_timing=True)
                self._runtime.eventRecord(event.ptr, stream)
        except self._runtime.CUDARuntimeError as error:
            raise TransferError(f"no event on a stream of cuda:{self.device}: {error}") from error
        return event

    def wait(self, stream: int, event: Any) -> None:
        """See Streams."""
        self._runtime.streamWaitEvent(stream, event.ptr)

    def finish(self, event: Any) -> None:
        """See Streams."""
        try:
            self._runtime.eventSynchronize(event.ptr)
        except self._runtime.CUDARuntimeError as error:
            raise TransferError(f"a copy on cuda:{self.device} failed: {error}") from error


class StreamTransfer(Protocol):
    """Puts copies on one stream: a GpuTransfer."""

    def copy(self, plan: CopyPlan) -> None:
        """Put a whole copy on the stream."""
        ...

    def load_back(
        self, host: KVView, device: KVView, host_pages: PageIds, device_pages: PageIds, progress: Any
    ) -> None:
        """Put a copy on the stream layer by layer, an event of ``progress`` behind each; fail it if that fails."""
        ...

    def make_progress(self) -> Any:
        """For one load_back: a transfer.progress.CudaProgress."""
        ...


class StreamProgress:
    """The layers of one batch of loads; see LayerProgress. ``wait`` blocks until a layer's copy has been put on the
    load stream, and then makes the stream that computes wait for it."""

    def __init__(self, events: Any, compute_stream: Callable[[], int]) -> None:
        self.events = events
        self._compute_stream = compute_stream

    @property
    def error(self) -> BaseException | None:
        """Why the batch failed."""
        error: BaseException | None = self.events.error
        return error

    def fail(self, error: BaseException) -> object:
        """See LayerProgress."""
        return self.events.fail(error)

    def wait(self, layer: int, timeout_s: float | None = None) -> bool:
        """See LayerProgress."""
        return bool(self.events.wait_on_stream(layer, self._compute_stream(), timeout_s))


Fence: TypeAlias = Callable[[], Callable[[], int | None]]
"""For an engine that launches forward passes on a thread of its own. Called when a copy is asked for, by that thread;
must not wait. What it returns is called by the copy's thread, before anything of the copy is on its stream: it waits
until every forward pass that had been handed over at that time is launched, and returns the stream that they are on
(None: there is none to wait for). What it raises fails the copy."""


class CudaMover:
    """A Mover over the GPU path: a stream and a thread for backups, a stream and a thread for loads.

    Args:
        geometry: of the pools.
        device_view, host_view: where the bytes lie; the host's must be page-locked.
        compute_stream: returns the stream that computes now, as a number (cudaStream_t); called on the thread that asks
            for a copy or waits for a layer. None: torch's current stream, or CuPy's without torch.
        fence: None: forward passes are launched by the thread that asks for copies.
        streams, transfer_on: None: made for the device, now; transfer_on gives what copies on a stream.
    Raises: DeviceUnavailableError that says what is missing.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        device_view: KVView,
        host_view: KVView,
        compute_stream: Callable[[], int] | None = None,
        *,
        fence: Fence | None = None,
        streams: Streams | None = None,
        transfer_on: Callable[[int], StreamTransfer] | None = None,
    ) -> None:
        name, _, number = device_view.device.partition(":")
        if name != "cuda":
            raise DeviceUnavailableError(f"the device pool is on {device_view.device}, and this mover needs a GPU")
        device = int(number or 0)
        self._geometry, self._device, self._host = geometry, device_view, host_view
        self._streams: Streams = streams or CupyStreams(device)
        self._compute_stream = compute_stream or (lambda: current_stream(device))
        self._fence = fence
        self._write_stream, self._load_stream = self._streams.new(), self._streams.new()
        transfer_on = transfer_on or GpuTransfers(geometry, device).on
        self._writer, self._loader = transfer_on(self._write_stream), transfer_on(self._load_stream)
        self._writes = PageLane("radixkv-write", self._copy_to_host, self._computed)
        self._loads = CopyLane("radixkv-load")

    def backup(self, device_pages: PageIds, host_pages: PageIds) -> PageTicket:
        """See Mover."""
        return self._writes.take_on(device_pages, host_pages)

    def flush(self) -> None:
        """See Mover. The event of the compute stream that the copy waits for is recorded here."""
        self._writes.flush()

    def _computed(self) -> Callable[[], Any]:
        """When a copy is asked for. Returns: what its thread gets the event from that it must wait for, or None."""
        if self._fence is None:
            event = self._streams.record(self._compute_stream())
            return lambda: event
        launched = self._fence()

        def record() -> Any:
            stream = launched()
            return None if stream is None else self._streams.record(stream)

        return record

    def _wait_for(self, stream: int, computed: Callable[[], Any]) -> None:
        event = computed()
        if event is not None:
            self._streams.wait(stream, event)

    def _copy_to_host(
        self, device_pages: PageIds, host_pages: PageIds, computed: list[Callable[[], Any]]
    ) -> None:  # fmt: skip
        plan = plan_copy(self._geometry, self._device, self._host, device_pages, host_pages)
        with self._to_the_end(self._write_stream):
            for each in computed:
                self._wait_for(self._write_stream, each)
            self._writer.copy(plan)

    @contextmanager
    def _to_the_end(self, stream: int) -> Iterator[None]:
        """What is put on the stream inside has run when this is left. Also if something fails half way: the pages of a
        copy that has failed are free at once, and what is on the stream already still writes them."""
        try:
            yield
        except BaseException:
            with suppress(TransferError):
                self._streams.finish(self._streams.record(stream))
            raise
        self._streams.finish(self._streams.record(stream))

    def load(self, host_pages: PageIds, device_pages: PageIds, progress: Any) -> CopyTicket:
        """See Mover."""
        computed = self._computed()

        def copy() -> None:
            with self._to_the_end(self._load_stream):
                self._wait_for(self._load_stream, computed)
                self._loader.load_back(self._host, self._device, host_pages, device_pages, progress.events)

        ticket = CopyTicket(copy, progress.fail)
        self._loads.put(ticket)
        return ticket

    def new_progress(self) -> StreamProgress:
        """See Mover."""
        return StreamProgress(self._loader.make_progress(), self._compute_stream)

    def close(self, timeout_s: float | None = None) -> bool:
        """See Mover."""
        return close_lanes([self._writes, self._loads], timeout_s)


class GpuTransfers:
    """GpuTransfers on several streams of one device, with the same kernels, engine and chooser.

    Args: path: "kernel" or "engine" for every copy; None: whichever was measured to be faster.
    """

    def __init__(self, geometry: KVGeometry, device: int, path: PathName | None = None) -> None:
        self._geometry, self._device, self._path = geometry, device, path
        self._first: GpuTransfer | None = None

    def on(self, stream: int) -> GpuTransfer:
        """One on a stream."""
        first = self._first
        if first is None:
            chooser = Chooser(device_key(self._device), override=self._path) if self._path else None
            self._first = GpuTransfer(self._geometry, self._device, stream=stream, chooser=chooser)
            return self._first
        return GpuTransfer(
            self._geometry, self._device, stream=stream, kernels=first.paths["kernel"], engine=first.paths["engine"],
            chooser=first.chooser,
        )  # fmt: skip


def current_stream(device: int) -> int:
    """The stream that computes now on the calling thread: torch's if torch is loaded, else CuPy's."""
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.cuda.current_stream(device).cuda_stream)
    return int(importlib.import_module("cupy").cuda.get_current_stream().ptr)
