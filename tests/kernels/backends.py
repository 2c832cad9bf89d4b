"""Where the one test body runs: the host simulator, and a GPU where there is one.

A backend keeps bytes in a tier ("device" or "host") between guards that nobody may touch, and does plans.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from radixkv.errors import DeviceUnavailableError
from radixkv.transfer.launch import Family, Launch, launches_of
from radixkv.transfer.plan import CopyPlan

from . import simulator
from .oracle import Bytes

GUARD = 512
POISON = 0xEE


class Block:
    """Some halves of KV bytes, each in memory of its own between guards; ``shift`` bytes off a 256-byte boundary."""

    def __init__(self, device: str, addresses: list[int], size: int, fetch: Callable[[int], Bytes]) -> None:
        """Bytes that a backend has placed.

        Args:
            addresses: of each half; size: bytes of each.
            fetch: copies a half with its guards, and keeps the memory alive.
        """
        self.device, self.addresses = device, addresses
        self._size, self._fetch = size, fetch

    def read(self) -> Bytes:
        """uint8 [halves, bytes], after a look at the guards."""
        read = []
        for half in range(len(self.addresses)):
            whole = self._fetch(half)
            guard = (len(whole) - self._size) // 2
            guards = np.concatenate([whole[:guard], whole[guard + self._size :]])
            assert (guards == POISON).all(), f"{int((guards != POISON).sum())} guard bytes of half {half} were written"
            read.append(whole[guard : guard + self._size])
        return np.stack(read)


class Backend(Protocol):
    name: str

    def place(self, content: Bytes, tier: str, shift: int = 0) -> Block: ...

    def run(
        self, plan: CopyPlan, *, family: Family = "auto", ctas: int = 4, vector_bytes: int | None = None
    ) -> list[Launch]: ...


class HostSim:
    """Everything is host memory; the simulator reads the tables where they are."""

    name = "hostsim"

    def __init__(self, sim: simulator.Simulator, guarded: bool = True) -> None:
        """guarded False: bytes end where their allocation ends, for ASan to guard."""
        self._sim, self._guard = sim, GUARD if guarded else 0

    def place(self, content: Bytes, tier: str, shift: int = 0) -> Block:
        halves = []
        for half in content:
            whole = np.empty(half.size + 2 * self._guard + shift, dtype=np.uint8)
            assert whole.ctypes.data % 16 == 0, "malloc aligns to 16"
            memory = whole[shift:]
            memory[:] = np.pad(half, self._guard, constant_values=POISON)
            halves.append(memory)
        addresses = [memory.ctypes.data + self._guard for memory in halves]
        return Block("cpu", addresses, content.shape[1], lambda i: halves[i].copy())

    def run(
        self, plan: CopyPlan, *, family: Family = "auto", ctas: int = 4, vector_bytes: int | None = None
    ) -> list[Launch]:
        return self._sim.run(plan, family=family, ctas=ctas, vector_bytes=vector_bytes)


class Cuda:
    """Device memory from cudaMalloc, host memory page-locked; launched through radixkv.transfer.cuda.

    RADIXKV_TEST_NVRTC=1 compiles the kernels with NVRTC, even where the build left a fatbin. RADIXKV_TEST_PATH=kernel
    or engine copies through GpuTransfer with that path, load backs layer by layer; what comes back is then what the
    kernels would have launched.
    """

    name = "cuda"

    def __init__(self, guarded: bool = True) -> None:
        """guarded False: bytes end where their allocation ends, for compute-sanitizer to guard."""
        from radixkv.transfer.cuda import CudaKernels

        self._kernels = CudaKernels(prebuilt=os.environ.get("RADIXKV_TEST_NVRTC") != "1")
        self._guard = GUARD if guarded else 0
        self._path = os.environ.get("RADIXKV_TEST_PATH")
        import cupy

        self._cupy: Any = cupy
        cupy.cuda.set_allocator(None)  # an allocation of its own for each array

    def place(self, content: Bytes, tier: str, shift: int = 0) -> Block:
        size = content.shape[1] + 2 * self._guard
        guarded = [np.pad(half, self._guard, constant_values=POISON) for half in content]
        halves: list[Any] = []
        for half in guarded:
            if tier == "device":
                part = self._cupy.empty(size + shift, dtype=self._cupy.uint8)[shift:]
                part.set(half)
            else:
                pinned = self._cupy.cuda.alloc_pinned_memory(size + shift)
                part = np.frombuffer(pinned, dtype=np.uint8, count=size + shift)[shift:]
                part[:] = half
            halves.append(part)
        if tier == "device":
            addresses = [int(part.data.ptr) + self._guard for part in halves]
            return Block(f"cuda:{self._kernels.device}", addresses, content.shape[1], lambda i: halves[i].get())
        addresses = [int(part.ctypes.data) + self._guard for part in halves]
        return Block("cpu", addresses, content.shape[1], lambda i: halves[i].copy())

    def run(
        self, plan: CopyPlan, *, family: Family = "auto", ctas: int = 4, vector_bytes: int | None = None
    ) -> list[Launch]:
        stream = self._cupy.cuda.Stream(non_blocking=True)
        self._cupy.cuda.Device(self._kernels.device).synchronize()
        if self._path:
            self._transfer(plan, stream.ptr)
            stream.synchronize()
            return launches_of(plan, family=family, ctas=ctas, vector_bytes=vector_bytes)
        launches = self._kernels.run(plan, stream=stream.ptr, family=family, ctas=ctas, vector_bytes=vector_bytes)
        stream.synchronize()
        return launches


    def _transfer(self, plan: CopyPlan, stream: int) -> None:
        from radixkv.transfer.choose import Chooser
        from radixkv.transfer.gpu import GpuTransfer

        chooser = Chooser("tests", override=self._path)  # type: ignore[arg-type]
        transfer = GpuTransfer(plan.geometry, stream=stream, kernels=self._kernels, chooser=chooser)
        if plan.src.device == "cpu":
            transfer.copy_layers(plan)
        else:
            transfer.copy(plan)
        assert transfer.copies == {"kernel": 0, "engine": 0} | {self._path: int(plan.num_pages > 0)}


@functools.cache
def _cuda() -> Cuda | str:
    """The GPU, or why there is none."""
    try:
        return Cuda()
    except DeviceUnavailableError as error:
        return str(error)


def backend(name: str) -> Backend:
    """A backend by name; skips the test where the machine has none, unless RADIXKV_REQUIRE_GPU=1."""
    if name == "hostsim":
        return HostSim(simulator.plain())
    import pytest  # not at the top: on_gpu.py does without

    found = _cuda()
    if isinstance(found, str):
        if os.environ.get("RADIXKV_REQUIRE_GPU") == "1":
            pytest.fail(f"RADIXKV_REQUIRE_GPU=1, and {found}")
        pytest.skip(found)
    return found
