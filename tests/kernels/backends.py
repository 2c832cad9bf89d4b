"""Where the one test body runs: the host simulator, and a GPU where there is one.

A backend keeps bytes in a tier ("device" or "host") between guards that nobody may touch, and does plans.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import pytest

from radixkv.errors import DeviceUnavailableError
from radixkv.transfer.launch import Family, Launch
from radixkv.transfer.plan import CopyPlan

from . import simulator
from .oracle import Bytes

GUARD = 512
POISON = 0xEE


class Block:
    """Some halves of KV bytes, each in memory of its own between guards; ``shift`` bytes off a 256-byte boundary."""

    def __init__(self, device: str, halves: list[Bytes], addresses: list[int], size: int, fetch: Callable[[int], Bytes]):
        self.device, self.addresses = device, addresses
        self._halves, self._size, self._fetch = halves, size, fetch

    def read(self) -> Bytes:
        """uint8 [halves, bytes], after a look at the guards."""
        read = []
        for half in range(len(self._halves)):
            whole = self._fetch(half)
            guards = np.concatenate([whole[:GUARD], whole[GUARD + self._size :]])
            assert (guards == POISON).all(), f"{int((guards != POISON).sum())} guard bytes of half {half} were written"
            read.append(whole[GUARD : GUARD + self._size])
        return np.stack(read)


class Backend(Protocol):
    name: str

    def place(self, content: Bytes, tier: str, shift: int = 0) -> Block: ...

    def run(
        self, plan: CopyPlan, *, family: Family = "auto", ctas: int = 4, vector_bytes: int | None = None
    ) -> list[Launch]: ...


def _guarded(content: Bytes) -> Bytes:
    return np.pad(content, (GUARD, GUARD), constant_values=POISON)


def _aligned(size: int, shift: int) -> Bytes:
    """uint8 [size] whose first byte lies ``shift`` after a multiple of 256; its end is the allocation's end, for ASan."""
    whole = np.empty(size + 256 + shift, dtype=np.uint8)
    start = (-whole.ctypes.data) % 256 + shift
    return whole[start : start + size]


class HostSim:
    """Everything is host memory; the simulator reads the tables where they are."""

    name = "hostsim"

    def __init__(self, sim: simulator.Simulator) -> None:
        self._sim = sim

    def place(self, content: Bytes, tier: str, shift: int = 0) -> Block:
        halves = []
        for half in content:
            guarded = _guarded(half)
            memory = _aligned(len(guarded), shift)
            memory[:] = guarded
            halves.append(memory)
        return Block("cpu", halves, [m.ctypes.data + GUARD for m in halves], content.shape[1], lambda i: halves[i].copy())

    def run(
        self, plan: CopyPlan, *, family: Family = "auto", ctas: int = 4, vector_bytes: int | None = None
    ) -> list[Launch]:
        return self._sim.run(plan, family=family, ctas=ctas, vector_bytes=vector_bytes)


class Cuda:
    """Device memory from CuPy, host memory page-locked; launched through radixkv.transfer.cuda."""

    name = "cuda"

    def __init__(self) -> None:
        from radixkv.transfer.cuda import CudaKernels

        self._kernels = CudaKernels()
        import cupy

        self._cupy: Any = cupy

    def place(self, content: Bytes, tier: str, shift: int = 0) -> Block:
        cupy = self._cupy
        size = content.shape[1] + 2 * GUARD
        halves: list[Any] = []
        for half in content:
            if tier == "device":
                memory = cupy.empty(size + 256, dtype=cupy.uint8)
                part = memory[shift : shift + size]
                part.set(_guarded(half))
            else:
                pinned = cupy.cuda.alloc_pinned_memory(size + 256)
                memory = np.frombuffer(pinned, dtype=np.uint8, count=size + 256)
                start = (-memory.ctypes.data) % 256 + shift
                part = memory[start : start + size] if start + size <= len(memory) else memory[shift : shift + size]
                part[:] = _guarded(half)
            halves.append(part)
        if tier == "device":
            addresses = [int(part.data.ptr) + GUARD for part in halves]
            return Block(f"cuda:{self._kernels.device}", halves, addresses, content.shape[1], lambda i: halves[i].get())
        return Block("cpu", halves, [p.ctypes.data + GUARD for p in halves], content.shape[1], lambda i: halves[i].copy())

    def run(
        self, plan: CopyPlan, *, family: Family = "auto", ctas: int = 4, vector_bytes: int | None = None
    ) -> list[Launch]:
        stream = self._cupy.cuda.Stream(non_blocking=True)
        self._cupy.cuda.Device(self._kernels.device).synchronize()
        launches = self._kernels.run(plan, stream=stream.ptr, family=family, ctas=ctas, vector_bytes=vector_bytes)
        stream.synchronize()
        return launches


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
    found = _cuda()
    if isinstance(found, str):
        if os.environ.get("RADIXKV_REQUIRE_GPU") == "1":
            pytest.fail(f"RADIXKV_REQUIRE_GPU=1, and {found}")
        pytest.skip(found)
    return found
