"""The GPU path: kernels or copy engine, whichever the chooser picks for a copy, on one stream.

plan -> shape_of (direction, bytes a run, runs) -> Chooser -> CudaKernels.run | CopyEngine.run
A load back chooses once and goes layer by layer (run_layers), with an event behind each layer (progress.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, get_args

import numpy as np

from ..errors import InvalidArgumentError, TransferError
from ..pool.layout import KVGeometry, KVView, view_of_layout
from .base import Pages, Transfer
from .choose import Chooser, Direction, PathName
from .cuda import CudaKernels
from .engine import CopyEngine, LayerRuns
from .launch import DEFAULT_CTAS, LOCAL_CTAS
from .loops import Runs, expand, loops_of
from .plan import CopyPlan, plan_copy
from .progress import CudaProgress

__all__ = ["CopyShape", "CudaTimer", "GpuTransfer", "Runner", "device_key", "layer_runs_of", "layer_shape_of"]
__all__ += ["runs_of", "shape_of"]

EXACT_RUNS = 1 << 16
"""Copies of more runs than this are not searched for neighbours before a path is chosen."""
BUSY_BYTES = 64 << 20
"""1.2 ms of PCIe gen 5."""


class Runner(Protocol):
    """What kernels and engine have in common.

    ctas: quota of thread blocks; the engine takes none.
    runs: what ``GpuTransfer`` has expanded of the plan to choose a path, so that the engine need not do it again; None
        if that would have been too much. Kernels read the views themselves.
    """

    def run(self, plan: CopyPlan, *, stream: int = 0, ctas: int = DEFAULT_CTAS, runs: Runs | None = None) -> object:
        """Put a copy on a stream and return."""

    def run_layers(
        self,
        plan: CopyPlan,
        *,
        stream: int = 0,
        ctas: int = DEFAULT_CTAS,
        after_layer: Callable[[int], None] | None = None,
        runs: LayerRuns | None = None,
    ) -> object:
        """Put a copy on a stream layer by layer, with a call of ``after_layer`` behind each, and return."""


class CopyShape(NamedTuple):
    """What the choice depends on."""

    direction: Direction
    run_bytes: int
    num_runs: int


def shape_of(plan: CopyPlan, runs: Runs | None = None) -> CopyShape:
    """The direction of a copy, its runs once consecutive pages are merged, and their mean length in bytes.

    Args:
        runs: the plan's, where ``runs_of`` has expanded them; None: it is asked.
    Raises: InvalidArgumentError if neither side is on a GPU.
    """
    direction = _direction_of(plan)
    runs = runs_of(plan) if runs is None else runs
    num_runs = loops_of(plan).num_runs if runs is None else len(runs.src)
    return CopyShape(direction, plan.total_bytes // max(1, num_runs), num_runs)


def runs_of(plan: CopyPlan) -> Runs | None:
    """The runs of a copy, or None if there are more than ``EXACT_RUNS`` before neighbours are merged."""
    loops = loops_of(plan, sort_pages=True)
    return expand(loops) if loops.num_runs <= EXACT_RUNS else None


def layer_runs_of(plan: CopyPlan) -> LayerRuns | None:
    """The runs of a copy that goes layer by layer, or None if a layer has more than ``EXACT_RUNS``."""
    first = loops_of(plan.layer(plan.layers.start), sort_pages=True)
    return LayerRuns(plan) if first.num_runs <= EXACT_RUNS else None


def layer_shape_of(plan: CopyPlan, runs: LayerRuns | None) -> CopyShape:
    """``shape_of`` one layer of a copy that goes layer by layer."""
    layer = plan.layer(plan.layers.start)
    num_runs = loops_of(layer).num_runs if runs is None else runs.runs_a_layer
    return CopyShape(_direction_of(plan), layer.total_bytes // max(1, num_runs), num_runs)


def _direction_of(plan: CopyPlan) -> Direction:
    on_device = plan.src.device != "cpu", plan.dst.device != "cpu"
    directions: dict[tuple[bool, bool], Direction] = {
        (True, False): "device_to_host",
        (False, True): "host_to_device",
        (True, True): "device_to_device",
    }
    if on_device not in directions:
        raise InvalidArgumentError("neither side is on a GPU: copy on the CPU path")
    return directions[on_device]


class GpuTransfer(Transfer):
    """Copies between one GPU and page-locked host memory, and within the GPU.

    ``copy`` and the methods over it put the work on the stream and return: bytes may be read, and sources changed, once
    the stream has passed it. A backup must follow the forward pass on its stream, a load back must precede it.

    Args:
        geometry: of every view it is given.
        device: number of the GPU.
        stream: a cudaStream_t as a number, not 0 if the copy engine is to take whole batches.
        ctas: quota of thread blocks of a kernel that copies over the link, so that the other SMs stay with the model.
        local_ctas: the same for copies within the device.
        kernels, engine, chooser: None: made for the device, now.
    Raises: DeviceUnavailableError that says what is missing.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        device: int = 0,
        *,
        stream: int = 0,
        ctas: int = DEFAULT_CTAS,
        local_ctas: int = LOCAL_CTAS,
        kernels: Runner | None = None,
        engine: Runner | None = None,
        chooser: Chooser | None = None,
    ) -> None:
        super().__init__(geometry)
        if min(ctas, local_ctas) < 1:
            raise InvalidArgumentError(f"a quota of {min(ctas, local_ctas)} blocks copies nothing")
        self.device = device
        self.stream = stream
        self.ctas, self.local_ctas = ctas, local_ctas
        self.paths: dict[PathName, Runner] = {
            "kernel": CudaKernels(device) if kernels is None else kernels,
            "engine": CopyEngine(device) if engine is None else engine,
        }
        self.chooser = Chooser(device_key(device, ctas, local_ctas)) if chooser is None else chooser
        self.copies: dict[PathName, int] = {"kernel": 0, "engine": 0}

    def copy(self, plan: CopyPlan, *, ctas: int | None = None) -> None:
        """Put one checked copy on the stream, by the path that the chooser picks; ``copies`` counts them.

        Args:
            ctas: quota of this copy; None: that of the transfer.
        Raises: InvalidArgumentError for views of another device, or memory that it does not reach, by either path;
            StateError for memory that is closed; TransferError.
        """
        if not plan.num_pages:
            return
        runs = runs_of(plan)
        shape = shape_of(plan, runs)
        path = self.chooser.choose(*shape)
        self.paths[path].run(plan, stream=self.stream, ctas=ctas or self._quota(shape.direction), runs=runs)
        self.copies[path] += 1

    def _quota(self, direction: Direction) -> int:
        return self.local_ctas if direction == "device_to_device" else self.ctas

    def load_back(
        self,
        host: KVView,
        device: KVView,
        host_pages: Pages,
        device_pages: Pages,
        progress: CudaProgress | None = None,
        *,
        ctas: int | None = None,
    ) -> None:
        """Copy all layers of pages from the host to the device, one after the other, by one path for all of them.

        Args:
            progress: gets an event behind each layer.
            ctas: quota of this copy; None: that of the transfer.
        Raises: as ``copy`` and ``plan``: the progress fails then, so that nobody waits for ever; StateError for a
            progress that had a copy.
        """
        if progress is None:
            self.copy_layers(self.plan(host, device, host_pages, device_pages), ctas=ctas)
            return
        progress.begin(self.geometry.num_layers)
        try:
            plan = self.plan(host, device, host_pages, device_pages)
            self.copy_layers(plan, lambda _: progress.record(self.stream), ctas=ctas)
        except BaseException as error:
            progress.fail(error)
            raise

    def copy_layers(
        self, plan: CopyPlan, after_layer: Callable[[int], None] | None = None, *, ctas: int | None = None
    ) -> None:
        """Put a checked copy on the stream layer by layer, by one path for all of them.

        Args:
            after_layer: called with each layer once its copy is on the stream; it must not copy itself.
            ctas: quota of this copy; None: that of the transfer.
        Raises: as ``copy``.
        """
        runs, quota = None, self.ctas
        path: PathName = "kernel"
        if plan.num_pages:
            runs = layer_runs_of(plan)
            shape = layer_shape_of(plan, runs)
            path, quota = self.chooser.choose(*shape), self._quota(shape.direction)
        self.paths[path].run_layers(plan, stream=self.stream, ctas=ctas or quota, after_layer=after_layer, runs=runs)
        self.copies[path] += bool(plan.num_pages)

    def make_progress(
        self,
        num_layers: int | None = None,
        *,
        compute_stream: Callable[[], int] | None = None,
        timing: bool = False,
    ) -> CudaProgress:
        """What ``load_back`` records its events in; see ``CudaProgress``."""
        layers = self.geometry.num_layers if num_layers is None else num_layers
        return CudaProgress(layers, self.device, compute_stream=compute_stream, timing=timing)

    def tune(self, *, again: bool = False) -> bool:
        """Measure both paths on this device, unless that has been done. Takes seconds, and 768 MiB for a while.

        Returns: whether it has measured.
        """
        if self.chooser.tuned and not again:
            return False
        with CudaTimer(self.device, self.paths, quota=self._quota) as timer:
            return self.chooser.tune(timer.seconds, again=again)


class CudaTimer:
    """Times copies of given shapes between scratch buffers, by events on a stream of its own.

    The stream is kept busy by a copy that does not count while the timed one is put on it: what Python takes for that
    is no part of the copy, as long as it is less than ``BUSY_BYTES`` take.

    Args:
        paths: what to time.
        scratch_bytes: of each buffer: device twice, page-locked host once.
        quota: blocks of the kernels in a direction; None: as GpuTransfer by default.
    """

    def __init__(
        self,
        device: int,
        paths: dict[PathName, Runner],
        scratch_bytes: int = 256 << 20,
        *,
        quota: Callable[[Direction], int] | None = None,
    ) -> None:
        self._cupy: Any = importlib.import_module("cupy")
        self._runtime: Any = self._cupy.cuda.runtime
        self._device, self._paths, self._scratch_bytes = device, paths, scratch_bytes
        self._quota = quota or (lambda direction: LOCAL_CTAS if direction == "device_to_device" else DEFAULT_CTAS)
        self._held: list[tuple[Any, int]] = []
        self._tiers: dict[str, int] = {}
        self._stream: Any = None

    def __enter__(self) -> CudaTimer:
        with self._cupy.cuda.Device(self._device):
            self._stream = self._cupy.cuda.Stream(non_blocking=True)
            try:
                for name in ("device", "other device"):
                    self._hold(name, self._runtime.malloc(self._scratch_bytes), self._runtime.free)
                self._hold("host", self._runtime.hostAlloc(self._scratch_bytes, 0), self._runtime.freeHost)
            except self._runtime.CUDARuntimeError as error:
                self.__exit__()
                raise TransferError(f"no scratch memory to time copies on cuda:{self._device}: {error}") from error
        return self

    def _hold(self, name: str, address: int, free: Any) -> None:
        self._held.append((free, address))
        self._tiers[name] = address

    def __exit__(self, *_: object) -> None:
        with self._cupy.cuda.Device(self._device):
            self._stream.synchronize()
            while self._held:
                free, address = self._held.pop()
                free(address)

    def seconds(self, path: PathName, direction: Direction, run_bytes: int, num_runs: int) -> float:
        """Time one copy of num_runs pages that do not follow each other, after one that does not count."""
        plan = self._plan(direction, run_bytes, num_runs)
        start, end, ctas = self._cupy.cuda.Event(), self._cupy.cuda.Event(), self._quota(direction)
        with self._cupy.cuda.Device(self._device):
            self._paths[path].run(plan, stream=self._stream.ptr, ctas=ctas)
            busy = self._tiers["device"], self._tiers["host"], min(BUSY_BYTES, self._scratch_bytes)
            self._runtime.memcpyAsync(*busy, self._runtime.memcpyHostToDevice, self._stream.ptr)
            start.record(self._stream)
            self._paths[path].run(plan, stream=self._stream.ptr, ctas=ctas)
            end.record(self._stream)
            end.synchronize()
            return float(self._cupy.cuda.get_elapsed_time(start, end)) / 1e3

    def _plan(self, direction: Direction, run_bytes: int, num_runs: int) -> CopyPlan:
        """Pages of run_bytes from places in order to places in reverse order, so that none can be merged."""
        assert direction in get_args(Direction)
        g = KVGeometry(kind="mla", num_layers=1, num_heads=1, head_bytes=run_bytes, page_size=1)
        here = f"cuda:{self._device}"
        tiers = {"device": ("device", here), "host": ("host", "cpu")}
        source, _, destination = direction.partition("_to_")
        ends = [tiers[source], ("other device", here) if source == destination else tiers[destination]]
        src, dst = (
            view_of_layout("layer_first", g, self._scratch_bytes // run_bytes, [self._tiers[name]], device)
            for name, device in ends
        )
        pages = np.arange(num_runs, dtype=np.int64)
        return plan_copy(g, src, dst, pages, pages[::-1].copy())


def device_key(device: int, ctas: int = DEFAULT_CTAS, local_ctas: int = LOCAL_CTAS) -> str:
    """What a measurement is valid for: the model, its SMs and copy engines, the driver, and the kernels' quotas."""
    runtime: Any = importlib.import_module("cupy").cuda.runtime
    found = runtime.getDeviceProperties(device)
    name = found["name"].decode()
    engines, sms = found["asyncEngineCount"], found["multiProcessorCount"]
    return f"{name}, {sms} SMs, {engines} copy engines, driver {runtime.driverGetVersion()}, {ctas}/{local_ctas} CTAs"
