"""The GPU path: kernels or copy engine, whichever the chooser picks for a copy, on one stream.

plan -> shape_of (direction, bytes a run, runs) -> Chooser -> CudaKernels.run | CopyEngine.run
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple, Protocol, get_args

import numpy as np

from ..errors import InvalidArgumentError, TransferError
from ..pool.layout import KVGeometry, KVView, view_of_layout
from .base import Transfer
from .choose import Chooser, Direction, PathName
from .cuda import CudaKernels
from .engine import CopyEngine
from .loops import expand, loops_of
from .plan import CopyPlan, plan_copy

__all__ = ["CopyShape", "CudaTimer", "GpuTransfer", "Runner", "device_key", "shape_of"]

EXACT_RUNS = 1 << 16
"""Copies of more runs than this are not searched for neighbours before a path is chosen."""


class Runner(Protocol):
    """What kernels and engine have in common."""

    def run(self, plan: CopyPlan, *, stream: int = 0) -> object:
        """Put a copy on a stream and return."""


class CopyShape(NamedTuple):
    """What the choice depends on."""

    direction: Direction
    run_bytes: int
    num_runs: int


def shape_of(plan: CopyPlan) -> CopyShape:
    """The direction of a copy, its runs once consecutive pages are merged, and their mean length in bytes.

    Raises: InvalidArgumentError if neither side is on a GPU.
    """
    on_device = plan.src.device != "cpu", plan.dst.device != "cpu"
    directions: dict[tuple[bool, bool], Direction] = {
        (True, False): "device_to_host",
        (False, True): "host_to_device",
        (True, True): "device_to_device",
    }
    if on_device not in directions:
        raise InvalidArgumentError("neither side is on a GPU: copy on the CPU path")
    loops = loops_of(plan, sort_pages=True)
    num_runs = len(expand(loops).src) if loops.num_runs <= EXACT_RUNS else loops.num_runs
    return CopyShape(directions[on_device], plan.total_bytes // max(1, num_runs), num_runs)


class GpuTransfer(Transfer):
    """Copies between one GPU and page-locked host memory, and within the GPU.

    ``copy`` and the methods over it put the work on the stream and return: bytes may be read, and sources changed, once
    the stream has passed it. A backup must follow the forward pass on its stream, a load back must precede it.

    Args:
        geometry: of every view it is given.
        device: number of the GPU.
        stream: a cudaStream_t as a number, not 0 if the copy engine is to take whole batches.
        kernels, engine, chooser: None: made for the device, now.
    Raises: DeviceUnavailableError that says what is missing.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        device: int = 0,
        *,
        stream: int = 0,
        kernels: Runner | None = None,
        engine: Runner | None = None,
        chooser: Chooser | None = None,
    ) -> None:
        super().__init__(geometry)
        self.device = device
        self.stream = stream
        self.paths: dict[PathName, Runner] = {
            "kernel": CudaKernels(device) if kernels is None else kernels,
            "engine": CopyEngine(device) if engine is None else engine,
        }
        self.chooser = Chooser(device_key(device)) if chooser is None else chooser
        self.copies: dict[PathName, int] = {"kernel": 0, "engine": 0}

    def copy(self, plan: CopyPlan) -> None:
        """Put one checked copy on the stream, by the path that the chooser picks; ``copies`` counts them.

        Raises: InvalidArgumentError for views of another device; TransferError.
        """
        if not plan.num_pages:
            return
        path = self.chooser.choose(*shape_of(plan))
        self.paths[path].run(plan, stream=self.stream)
        self.copies[path] += 1

    def load_back(self, host: KVView, device: KVView, host_pages: Any, device_pages: Any) -> None:
        """Copy all layers of pages from the host to the device, one after the other: an event after each says when."""
        plan = self.plan(host, device, host_pages, device_pages)
        for layer in plan.layers:
            self.copy(plan.layer(layer))

    def tune(self, *, again: bool = False) -> bool:
        """Measure both paths on this device, unless that has been done. Takes seconds, and 768 MiB for a while.

        Returns: whether it has measured.
        """
        if self.chooser.tuned and not again:
            return False
        with CudaTimer(self.device, self.paths) as timer:
            return self.chooser.tune(timer.seconds, again=again)


class CudaTimer:
    """Times copies of given shapes between scratch buffers, by events on a stream of its own.

    Args:
        paths: what to time.
        scratch_bytes: of each buffer: device twice, page-locked host once.
    """

    def __init__(self, device: int, paths: dict[PathName, Runner], scratch_bytes: int = 256 << 20) -> None:
        self._cupy: Any = importlib.import_module("cupy")
        self._runtime: Any = self._cupy.cuda.runtime
        self._device, self._paths, self._scratch_bytes = device, paths, scratch_bytes
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
        start, end = self._cupy.cuda.Event(), self._cupy.cuda.Event()
        with self._cupy.cuda.Device(self._device):
            self._paths[path].run(plan, stream=self._stream.ptr)
            start.record(self._stream)
            self._paths[path].run(plan, stream=self._stream.ptr)
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


def device_key(device: int) -> str:
    """What a measurement is valid for: the model, its SMs and copy engines, and the driver."""
    runtime: Any = importlib.import_module("cupy").cuda.runtime
    found = runtime.getDeviceProperties(device)
    name = found["name"].decode()
    engines, sms = found["asyncEngineCount"], found["multiProcessorCount"]
    return f"{name}, {sms} SMs, {engines} copy engines, driver {runtime.driverGetVersion()}"
