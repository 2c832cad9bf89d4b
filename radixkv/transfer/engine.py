"""The copy-engine path: a plan as a list of (source, destination, bytes), put on a stream in batches.

    CopyPlan -> Runs, merged over consecutive pages -> batches of at most MAX_BATCH -> one driver call each

One call takes a whole batch where the driver has cuMemcpyBatchAsync (CUDA 12.8), else one cudaMemcpyAsync a run. No SM
works on it. Source order is the stream's: "any" order lets the engine read before the kernel that writes the source has
finished.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..errors import DeviceUnavailableError, InvalidArgumentError, TransferError
from ..pool.layout import KVGeometry, KVView
from .launch import DEFAULT_CTAS
from .loops import Runs, expand, loops_of
from .plan import CopyPlan
from .reach import Reach

__all__ = ["MAX_BATCH", "CopyEngine", "CudaRuntime", "EngineWork", "LayerRuns", "Runtime", "batches_of"]

MAX_BATCH = 8192
"""Copies a driver call: 192 KiB of addresses and sizes."""

LEGACY_STREAMS = (0, 1)
"""Handles of the legacy default stream, which batched copies refuse."""

NOT_SUPPORTED = 801  # CUDA_ERROR_NOT_SUPPORTED
SOURCE_ORDER_STREAM = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM


class EngineWork(NamedTuple):
    """What one ``run`` has put on the stream."""

    calls: int
    copies: int
    num_bytes: int


class Runtime(Protocol):
    """What the path needs from a driver."""

    def check(self, geometry: KVGeometry, view: KVView) -> None:
        """Raises: InvalidArgumentError unless the GPU reaches all that lies behind a view (``Reach``)."""

    def copy(self, src: int, dst: int, num_bytes: int, stream: int) -> None:
        """Put one copy on a stream. Raises: TransferError."""

    def copy_batch(self, runs: Runs, stream: int) -> bool:
        """Put a batch on a stream, in one call. Returns: False, with nothing done, if there is no such call."""
        ...


class LayerRuns:
    """The runs of a plan, layer by layer: expanded once for all layers, which differ in their bases alone.

    Where a view has boundaries that no run may span, each layer is expanded by itself: they lie elsewhere in each.

    Attributes:
        runs_a_layer: runs of one layer, consecutive pages merged.
    """

    def __init__(self, plan: CopyPlan) -> None:
        self._plan, self._layers = plan, plan.layers
        self._seams = bool(plan.src.boundaries or plan.dst.boundaries)
        self._halves = plan.geometry.halves
        loops = loops_of(plan, outer_layers=True, sort_pages=True)
        self._src = loops.src[0] + np.uint64(loops.src_base)  # [layers * halves]
        self._dst = loops.dst[0] + np.uint64(loops.dst_base)
        one = replace(loops, src_base=0, dst_base=0, src=loops.src[1:], dst=loops.dst[1:], steps_per_layer=0)
        self._inner = expand(one)
        self._sizes = np.tile(self._inner.num_bytes, self._halves)
        self.runs_a_layer = len(self._sizes)

    def of(self, layer: int) -> Runs:
        """The runs of one of the plan's layers: uint64 arrays of ``runs_a_layer``, or more where some are cut."""
        if self._seams:
            return expand(loops_of(self._plan.layer(layer), sort_pages=True))
        first = self._layers.index(layer) * self._halves
        part = slice(first, first + self._halves)
        src = (self._src[part, None] + self._inner.src).ravel()
        dst = (self._dst[part, None] + self._inner.dst).ravel()
        return Runs(src, dst, self._sizes)


def batches_of(plan: CopyPlan, max_batch: int = MAX_BATCH, runs: Runs | None = None) -> Iterator[Runs]:
    """Cut a plan into batches: uint64 arrays of 1 .. max_batch runs, together every byte of the plan once.

    Args:
        runs: the plan's, if they have been expanded already.
    """
    if not plan.num_pages:
        return
    runs = expand(loops_of(plan, sort_pages=True)) if runs is None else runs
    for start in range(0, len(runs.src), max_batch):
        yield Runs(*(part[start : start + max_batch] for part in runs))


class CopyEngine:
    """Copies through the copy engines of one GPU. Host memory must be page-locked, as for the kernels.

    Args:
        device: number of the GPU.
        runtime: None: CuPy's, loaded now.
        max_batch: copies a driver call, 1 or more.
    Raises: DeviceUnavailableError that says what is missing.
    """

    def __init__(self, device: int = 0, runtime: Runtime | None = None, max_batch: int = MAX_BATCH) -> None:
        if max_batch < 1:
            raise InvalidArgumentError(f"batches of {max_batch} copies")
        self.device = device
        self.max_batch = max_batch
        self._runtime = CudaRuntime(device) if runtime is None else runtime

    def run(self, plan: CopyPlan, *, stream: int = 0, ctas: int = DEFAULT_CTAS, runs: Runs | None = None) -> EngineWork:
        """Put a copy on a stream and return; bytes may be read, and sources changed, once the stream has passed it.

        Args:
            stream: a cudaStream_t as a number. On the legacy default stream (0) each run is a call of its own.
            ctas: not needed here: no block of threads takes part.
            runs: the plan's, all layers together, if they have been expanded already.
        Raises: InvalidArgumentError for views of another device, or host memory that is not page-locked, before
            anything is put on the stream; TransferError.
        """
        self._check(plan)
        work = EngineWork(0, 0, 0)
        for batch in batches_of(plan, self.max_batch, runs):
            work = self._put(batch, stream, work)
        return work

    def run_layers(
        self,
        plan: CopyPlan,
        *,
        stream: int = 0,
        ctas: int = DEFAULT_CTAS,
        after_layer: Callable[[int], None] | None = None,
        runs: LayerRuns | None = None,
    ) -> EngineWork:
        """Load back: ``run`` layer after layer of the plan, expanded once for all of them.

        Args:
            after_layer: called with each layer once its copy is on the stream, to record an event there.
            runs: the plan's, if they have been expanded already.
        Raises: as ``run``.
        """
        self._check(plan)
        runs = LayerRuns(plan) if runs is None and plan.num_pages else runs
        work = EngineWork(0, 0, 0)
        for layer in plan.layers:
            for batch in batches_of(plan, self.max_batch, runs.of(layer)) if runs is not None else ():
                work = self._put(batch, stream, work)
            if after_layer is not None:
                after_layer(layer)
        return work

    def _check(self, plan: CopyPlan) -> None:
        here = f"cuda:{self.device}"
        for side, view in (("src", plan.src), ("dst", plan.dst)):
            if view.device not in ("cpu", here):
                raise InvalidArgumentError(f"{side} is on {view.device}, and this engine is of {here}")
        if here not in (plan.src.device, plan.dst.device):
            raise InvalidArgumentError(f"neither side is on {here}: copy on the CPU path")
        for view in (plan.src, plan.dst) if plan.num_pages else ():
            self._runtime.check(plan.geometry, view)

    def _put(self, runs: Runs, stream: int, before: EngineWork) -> EngineWork:
        """Put one batch on the stream. Returns: the work with it."""
        calls = copies = len(runs.src)
        if copies > 1 and stream not in LEGACY_STREAMS and self._runtime.copy_batch(runs, stream):
            calls = 1
        else:
            for src, dst, num_bytes in zip(*(part.tolist() for part in runs), strict=True):
                self._runtime.copy(src, dst, num_bytes, stream)
        return EngineWork(before.calls + calls, before.copies + copies, before.num_bytes + int(runs.num_bytes.sum()))


class _Location(ctypes.Structure):
    """CUmemLocation; zero: no hint."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes."""

    _fields_ = (
        ("source_order", ctypes.c_int),
        ("source", _Location),
        ("destination", _Location),
        ("flags", ctypes.c_uint),
    )


class CudaRuntime:
    """CuPy's runtime, and cuMemcpyBatchAsync from the driver itself, which CuPy does not wrap.

    Args:
        driver: None: libcuda as the loader finds it. For tests.
    Raises: DeviceUnavailableError if there is no CuPy.
    """

    def __init__(self, device: int, driver: Any = None) -> None:
        try:
            self._cupy: Any = importlib.import_module("cupy")
        except ImportError as error:
            raise DeviceUnavailableError(
                f"the copy engine needs CuPy (radixkv[cuda12] or [cuda13]): {error}"
            ) from error
        self.device = device
        self._runtime: Any = self._cupy.cuda.runtime
        self._batch, self._batch_name = _find_batch(driver)
        self._reach = Reach(self._runtime, device)

    @property
    def has_batch(self) -> bool:
        """Whether batches go in one call; turns False when the driver says that this GPU cannot."""
        return self._batch is not None

    def check(self, geometry: KVGeometry, view: KVView) -> None:
        """Raises: InvalidArgumentError unless the GPU reaches all behind a view (``Reach``); TransferError."""
        with self._cupy.cuda.Device(self.device):
            try:
                self._reach.check(geometry, view)
            except self._runtime.CUDARuntimeError as error:
                raise TransferError(f"cuda:{self.device} does not say what it reaches: {error}") from error

    def copy(self, src: int, dst: int, num_bytes: int, stream: int) -> None:
        """Put one copy on a stream. Raises: TransferError."""
        with self._cupy.cuda.Device(self.device):
            try:
                self._runtime.memcpyAsync(dst, src, num_bytes, self._runtime.memcpyDefault, stream)
            except self._runtime.CUDARuntimeError as error:
                raise TransferError(f"copy of {num_bytes} bytes on cuda:{self.device}: {error}") from error

    def copy_batch(self, runs: Runs, stream: int) -> bool:
        """Put a batch on a stream, in one call. Returns: False, with nothing done, if there is no such call."""
        if self._batch is None:
            return False
        src, dst, sizes = (np.ascontiguousarray(part) for part in runs)
        attributes = _Attributes(source_order=SOURCE_ORDER_STREAM)
        first, failed = ctypes.c_size_t(0), ctypes.c_size_t(0)
        # the first form, of CUDA 12.8, also says which copy failed
        fail = [ctypes.byref(failed)] if self._batch_name == "cuMemcpyBatchAsync" else []
        pointers = [ctypes.c_void_p(part.ctypes.data) for part in (dst, src, sizes)]
        count, one, handle = ctypes.c_size_t(len(src)), ctypes.c_size_t(1), ctypes.c_void_p(stream)
        with self._cupy.cuda.Device(self.device):
            error = self._batch(*pointers, count, ctypes.byref(attributes), ctypes.byref(first), one, *fail, handle)
        if error == NOT_SUPPORTED:
            self._batch = None
            return False
        if error:
            raise TransferError(f"{self._batch_name} of {len(src)} copies on cuda:{self.device}: CUDA error {error}")
        return True


def _find_batch(driver: Any) -> tuple[Any, str]:
    """The batched copy of a driver and its name; (None, "") if it is older than CUDA 12.8 or cannot be loaded."""
    if driver is None:
        try:
            driver = ctypes.CDLL("libcuda.so.1")
        except OSError:
            return None, ""
    for name in ("cuMemcpyBatchAsync_v2", "cuMemcpyBatchAsync"):
        function = getattr(driver, name, None)
        if function is not None:
            return function, name
    return None, ""
