"""Runs copies on a GPU: the kernels of kernels/, through CuPy, on the caller's stream.

CuPy is imported when a ``CudaKernels`` is made, never before. Kernels come from a fatbin that the build left beside the
plugin, else they are compiled at first use with NVRTC (and kept by CuPy's own cache on disk).
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DeviceUnavailableError, InvalidArgumentError, TransferError
from ..pool.layout import KVView
from .launch import DEFAULT_CTAS, Addresses, Family, Launch, common_ids, first_of_run, launches_of, layer_launches
from .plan import CopyPlan
from .reach import Reach
from .staging import UploadRing

__all__ = ["CudaKernels", "kernel_folder", "kernel_source"]

FATBIN = "radixkv_kernels.fatbin"
CACHED_TABLES = 256

_PACKAGE = Path(__file__).resolve().parents[1]


def kernel_folder() -> Path:
    """The folder of the CUDA sources: in a wheel inside the package, in a source tree beside it."""
    for folder in (_PACKAGE / "kernels", _PACKAGE.parent / "kernels"):
        if (folder / "all.cu").is_file():
            return folder
    raise DeviceUnavailableError(f"this installation has no CUDA sources: no kernels/all.cu in or beside {_PACKAGE}")


@functools.cache
def kernel_source(name: str = "all.cu") -> str:
    """One source with its own headers in place of their #include lines, for compilers that are given no folder."""
    folder, seen = kernel_folder(), set()

    def flat(file: str) -> str:
        if file in seen:
            return ""
        seen.add(file)
        text = (folder / file).read_text()
        # hostsim.h is for the simulator only and stays a line that no CUDA compiler reaches
        return re.sub(r'^#include "(?!hostsim\.h)([\w.]+)"\n', lambda found: flat(found[1]), text, flags=re.MULTILINE)

    return flat(name)


class CudaKernels:
    """The kernels on one GPU. May be shared by threads; copies on one stream happen in order.

    Host memory that takes part must be page-locked, and stay so until the stream has passed the copy.
    """

    def __init__(self, device: int = 0, prebuilt: bool = True) -> None:
        """Find CuPy, the driver and the device.

        Args:
            prebuilt: load the fatbin that the build left, if it did; False: compile with NVRTC in any case.
        Raises: DeviceUnavailableError that says what is missing.
        """
        self.device, self._name, self._prebuilt = device, f"cuda:{device}", prebuilt
        self._cupy = _import_cupy()
        self._runtime: Any = self._cupy.cuda.runtime
        try:
            count = self._runtime.getDeviceCount()
        except self._runtime.CUDARuntimeError as error:
            raise DeviceUnavailableError(f"no NVIDIA driver that CuPy can use: {error}") from error
        if not 0 <= device < count:
            raise DeviceUnavailableError(f"there is no GPU {device}: the driver shows {count}")
        self.capability = int(self._cupy.cuda.Device(device).compute_capability)
        self._module: Any = None
        self._functions: dict[str, int] = {}
        self._tables: OrderedDict[bytes, int] = OrderedDict()
        self._reach = Reach(self._runtime, device)
        self._uploads = UploadRing(self._runtime)
        self._lock = threading.Lock()  # a table in use must not be dropped for another thread's

    def run(
        self,
        plan: CopyPlan,
        *,
        stream: int = 0,
        family: Family = "auto",
        ctas: int = DEFAULT_CTAS,
        vector_bytes: int | None = None,
        runs: object = None,
    ) -> list[Launch]:
        """Put a copy on a stream and return; bytes may be read, and sources changed, once the stream has passed it.

        Args:
            stream: a cudaStream_t as a number (torch: ``stream.cuda_stream``; CuPy: ``stream.ptr``); 0: the legacy
                default stream.
            family, ctas, vector_bytes: see ``launches_of``.
            runs: not needed here; see ``Runner``.
        Returns: what was launched; empty for no pages.
        Raises: InvalidArgumentError for views of another device, host memory that is not page-locked, or a family that
            the device or the plan does not allow, all before any launch. DeviceUnavailableError if the kernels cannot
            be compiled. TransferError if CUDA refuses a step.
        """
        groups = [launches_of(plan, family=family, ctas=ctas, vector_bytes=vector_bytes)]
        return self._run(plan, groups, stream, family, None)

    def run_layers(
        self,
        plan: CopyPlan,
        *,
        stream: int = 0,
        family: Family = "auto",
        ctas: int = DEFAULT_CTAS,
        after_layer: Callable[[int], None] | None = None,
        runs: object = None,
    ) -> list[Launch]:
        """Load back: ``run`` layer after layer of the plan, the page ids uploaded once for all of them.

        Args:
            after_layer: called with each layer once its copy is on the stream, to record an event there; it must not
                use these kernels.
        Raises: as ``run``, all of it before the first layer but for TransferError.
        """
        return self._run(plan, layer_launches(plan, family=family, ctas=ctas), stream, family, after_layer)

    def _run(
        self,
        plan: CopyPlan,
        groups: list[list[Launch]],
        stream: int,
        family: Family,
        after_layer: Callable[[int], None] | None,
    ) -> list[Launch]:
        """Groups of launches of a plan, with one upload of page ids. See ``run``."""
        self._check_devices(plan)
        if family == "bulk" and self.capability < 90:
            raise InvalidArgumentError(f"bulk copies need sm_90, and GPU {self.device} is sm_{self.capability}")
        try:
            with self._lock, self._cupy.cuda.Device(self.device):
                for name in {launch.kernel for group in groups for launch in group}:
                    self._function(name)  # whatever must be compiled, before anything is launched
                with self._tables_of(plan, stream) if plan.num_pages else nullcontext() as addresses:
                    for layer, group in enumerate(groups, plan.layers.start):
                        for launch in group:
                            self._launch(launch, addresses, stream)
                        if after_layer is not None:
                            after_layer(layer)
        except (self._runtime.CUDARuntimeError, self._cupy.cuda.driver.CUDADriverError) as error:
            kernel = groups[0][0].kernel if plan.num_pages else "an event behind a copy"
            what = f"{kernel} of {plan.num_pages} pages on {self._name}"
            raise TransferError(f"{what}: {error}") from error
        return [launch for group in groups for launch in group]

    def close(self) -> None:
        """Free what is kept on the device. Waits for it. The object may be used again."""
        with self._lock, self._cupy.cuda.Device(self.device):
            self._uploads.close()
            while self._tables:
                self._runtime.free(self._tables.popitem()[1])

    def _check_devices(self, plan: CopyPlan) -> None:
        here = self._name
        sides = {"src": plan.src.device, "dst": plan.dst.device}
        for side, device in sides.items():
            if device not in ("cpu", here):
                raise InvalidArgumentError(f"{side} is on {device}, and these kernels run on {here}")
        if here not in sides.values():
            raise InvalidArgumentError(f"neither side is on {here}: copy on the CPU path")

    def _bases(self, view: KVView) -> int:
        """The device's copy of a view's table of bases, uploaded once; the last 256 are kept."""
        key = view.device.encode() + view.bases.tobytes()
        if key in self._tables:
            self._tables.move_to_end(key)
            return self._tables[key]
        while len(self._tables) >= CACHED_TABLES:
            self._runtime.free(self._tables.popitem(last=False)[1])  # waits for kernels that read it
        table = np.ascontiguousarray(view.bases)
        address = self._tables[key] = int(self._runtime.malloc(table.nbytes))
        try:
            # memcpy returns once the driver has read the table; every stream may read it once it has arrived
            self._runtime.memcpy(address, table.ctypes.data, table.nbytes, self._runtime.memcpyHostToDevice)
            self._runtime.streamSynchronize(0)
        except BaseException:
            self._runtime.free(self._tables.pop(key))
            raise
        return address

    @contextmanager
    def _tables_of(self, plan: CopyPlan, stream: int) -> Iterator[Addresses]:
        """The tables that a plan's launches read: bases, which stay, and page ids, in a slot of the ring."""
        for view in (plan.src, plan.dst):
            self._reach.check(plan.geometry, view)
        bases = self._bases(plan.src), self._bases(plan.dst)
        ids = common_ids(plan)
        uploads = [side for side in (0, 1) if first_of_run(ids[side]) is None]
        with self._uploads.upload([ids[side] for side in uploads], stream) as addresses:
            pages = dict(zip(uploads, addresses, strict=True))
            yield Addresses(
                src_bases=bases[0], dst_bases=bases[1], src_pages=pages.get(0, 0), dst_pages=pages.get(1, 0)
            )

    def _launch(self, launch: Launch, addresses: Addresses | None, stream: int) -> None:
        assert addresses is not None, "launches are of pages, and pages have tables"
        params = launch.bind(addresses)
        args = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        grid, block = (launch.grid, 1, 1), (launch.block, 1, 1)
        function = self._function(launch.kernel)
        self._cupy.cuda.driver.launchKernel(function, *grid, *block, 0, stream, ctypes.addressof(args), 0)

    def _function(self, name: str) -> int:
        """The CUfunction of a kernel on this device, compiled or loaded at first use."""
        if name not in self._functions:
            try:
                if self._module is None:
                    self._module = self._load()
                self._functions[name] = int(self._module.get_function(name).kernel.ptr)
            except Exception as error:
                raise DeviceUnavailableError(f"kernel {name} for sm_{self.capability}: {error}") from error
        return self._functions[name]

    def _load(self) -> Any:
        fatbin = _PACKAGE / "lib" / FATBIN
        if self._prebuilt and fatbin.is_file():
            return self._cupy.RawModule(path=str(fatbin))
        return self._cupy.RawModule(code=kernel_source(), options=("-std=c++17",), backend="nvrtc")


def _import_cupy() -> Any:
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        message = f"CuPy cannot be imported ({error}): pip install 'radixkv[cuda13]' or 'radixkv[cuda12]'"
        raise DeviceUnavailableError(message) from error
