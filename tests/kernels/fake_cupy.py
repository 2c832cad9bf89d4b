"""Just enough of CuPy for radixkv.transfer's GPU half, on the host simulator; all memory is host memory.

Keeps a log of the calls in order, and knows which addresses a device can reach. With ``lazy`` on, streams are queues:
nothing that is put on one happens before somebody waits for it, so that what is reused too early shows as wrong bytes.
Any number of threads may use it. Events have times: whatever is on a stream takes a millisecond, an idle kernel what it
is told, and streams overlap.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import threading
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from radixkv.transfer.launch import CopyParams, RelayoutParams

from .simulator import FIBRE, LOOP, build

NOT_READY = 600


class CUDARuntimeError(RuntimeError):
    pass


class CUDADriverError(RuntimeError):
    pass


def _in_turn(method: Callable[..., Any]) -> Callable[..., Any]:
    """One thread at a time in all that changes streams, events or memory."""

    @functools.wraps(method)
    def call(self: FakeCupy, *arguments: Any, **more: Any) -> Any:
        with self._turn:
            return method(self, *arguments, **more)

    return call


class FakeCupy:
    def __init__(self, gpus: int = 1, capability: str = "90", driver: bool = True) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.known: dict[int, tuple[int, int]] = {}  # host address: device, and the address there
        self.failing = ""  # the call that fails from now on
        self.lazy = False
        self._turn = threading.RLock()
        self._memory: dict[int, Any] = {}
        self._kinds: dict[int, str] = {}
        self._locked: dict[int, int] = {}  # page-locked by hostRegister
        self._queues: dict[int, deque[Callable[[], object]]] = {}
        self._put: dict[int, int] = {}  # stream: how much was ever put on it
        self._events: dict[int, tuple[int, int]] = {}  # event: stream, and how much was on it
        self._now = 0.0  # ms, of the host
        self._clocks: dict[int, float] = {}  # stream: ms
        self._times: dict[int, float] = {}  # event: ms
        self._handles = itertools.count(0x9000)
        self._names: dict[int, str] = {}
        self._gpus, self._capability, self._driver = gpus, capability, driver
        self._launch = ctypes.CDLL(str(build())).rkv_sim_launch
        self._launch.restype = ctypes.c_char_p
        runtime = SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            memcpyHostToDevice=1,
            getDeviceCount=self._count,
            deviceSynchronize=self.finish,
            hostRegister=lambda address, size, flags: self._locked.update({address: size}),
            hostUnregister=lambda address: self._locked.pop(address),
            pointerGetAttributes=self._attributes,
            malloc=lambda size: self._allocate("malloc", size),
            hostAlloc=lambda size, flags: self._allocate("hostAlloc", size),
            free=lambda address: self._free("free", address),
            freeHost=lambda address: self._free("freeHost", address),
            memcpyDefault=4,
            eventCreateWithFlags=lambda flags: next(self._handles),
            eventDestroy=lambda event: self._events.pop(event, None),
            eventRecord=self._record,
            eventQuery=lambda event: 0 if self._passed(event) else NOT_READY,
            eventSynchronize=self._wait_event,
            streamWaitEvent=self._stream_waits,
            driverGetVersion=lambda: 13000,
            getDeviceProperties=lambda device: {
                "name": b"Fake 100", "multiProcessorCount": 8, "asyncEngineCount": 3,
            },
            memcpy=lambda to, come, size, kind: self._copy("memcpy", to, come, size),
            streamSynchronize=lambda stream: self.log.append(("streamSynchronize",)),
            memcpyAsync=lambda to, come, size, kind, stream: self._copy("memcpyAsync", to, come, size, stream),
        )
        driver_api = SimpleNamespace(launchKernel=self._launch_kernel, CUDADriverError=CUDADriverError)
        self.cuda = SimpleNamespace(runtime=runtime, driver=driver_api, Device=self._device)
        self.cuda.Event, self.cuda.Stream = self._event, self._stream
        self.cuda.get_elapsed_time = lambda start, end: self._times[end.ptr] - self._times[start.ptr]
        self.current = 0  # stream

    # ---- streams and events
    @_in_turn
    def _on(self, stream: int, action: Callable[[], object], ms: float = 1.0) -> None:
        self._clocks[stream] = max(self._now, self._clocks.get(stream, 0.0)) + ms
        self._put[stream] = self._put.get(stream, 0) + 1
        self._queues.setdefault(stream, deque()).append(action)
        if not self.lazy:
            self.finish()

    @_in_turn
    def finish(self) -> None:
        """Do everything that is on any stream."""
        while waiting := [stream for stream, queue in self._queues.items() if queue]:
            self._step(waiting[0])

    @_in_turn
    def _step(self, stream: int) -> None:
        action = self._queues[stream][0]
        action()
        self._queues[stream].popleft()

    @_in_turn
    def _record(self, event: int, stream: int) -> None:
        self._fail("eventRecord")
        self.log.append(("eventRecord", stream))
        self._events[event] = stream, self._put.get(stream, 0)
        self._times[event] = max(self._now, self._clocks.get(stream, 0.0))

    @_in_turn
    def _stream_waits(self, stream: int, event: int, flags: int = 0) -> None:
        self._clocks[stream] = max(self._clocks.get(stream, 0.0), self._times.get(event, 0.0))
        self._on(stream, lambda: self._wait_event(event), ms=0.0)

    @_in_turn
    def _passed(self, event: int) -> bool:
        stream, count = self._events.get(event, (0, 0))
        return self._put.get(stream, 0) - len(self._queues.get(stream, ())) >= count

    @_in_turn
    def _wait_event(self, event: int) -> None:
        while not self._passed(event):
            self._step(self._events[event][0])

    def _event(self, disable_timing: bool = False) -> Any:
        event = SimpleNamespace(ptr=next(self._handles))
        event.record = lambda stream: self._record(event.ptr, stream.ptr)
        event.synchronize = lambda: self._wait_event(event.ptr)
        return event

    def batched_copies(self, *given: Any) -> int:
        """cuMemcpyBatchAsync of CUDA 13, in the order of the stream."""
        dsts, srcs, sizes, count, *_, stream = given
        arrays = [list((ctypes.c_uint64 * count.value).from_address(part.value)) for part in (dsts, srcs, sizes)]
        self.log.append(("batch", count.value, stream.value))

        def run() -> None:
            for dst, src, size in zip(*arrays, strict=True):
                ctypes.memmove(dst, src, size)

        self._on(stream.value, run)
        return 0

    def _stream(self, non_blocking: bool = False) -> Any:
        return _Stream(self, next(self._handles))

    def RawKernel(self, code: str, name: str) -> Any:
        """A kernel that does nothing, and takes its turn on the current stream for it."""
        return _Idle(self)

    def place(self, content: np.ndarray[Any, Any], device: int) -> int:
        """Declare an array to be memory that a device can reach. Returns: its address."""
        self.known[content.ctypes.data] = (device, content.ctypes.data)
        return int(content.ctypes.data)

    def RawModule(self, **options: Any) -> Any:
        self.log.append(("RawModule", sorted(options)))
        return SimpleNamespace(get_function=self._function)

    def _function(self, name: str) -> Any:
        pointer = 0x1000 + len(self._names)
        self._names[pointer] = name
        return SimpleNamespace(kernel=SimpleNamespace(ptr=pointer))

    def _count(self) -> int:
        if not self._driver:
            raise CUDARuntimeError("cudaErrorInsufficientDriver")
        return self._gpus

    def _device(self, number: int) -> Any:
        assert 0 <= number < self._gpus
        return _Device(self._capability)

    @_in_turn
    def _attributes(self, address: int) -> Any:
        held = [base for base in self._memory if base <= address < base + len(self._memory[base])]
        found = (0 if self._kinds[held[0]] == "malloc" else -1, address) if held else (-2, 0)
        if any(base <= address < base + size for base, size in self._locked.items()):
            found = (-1, address)
        device, seen = self.known.get(address, found)
        return SimpleNamespace(device=device, devicePointer=seen, type=0 if not seen else 1 if device < 0 else 2)

    def _fail(self, name: str) -> None:
        if self.failing == name:
            raise CUDARuntimeError(f"cudaError of {name}")

    @_in_turn
    def _allocate(self, name: str, size: int, *stream: int) -> int:
        self._fail(name)
        memory = ctypes.create_string_buffer(size)
        address = ctypes.addressof(memory)
        self._memory[address] = memory
        self._kinds[address] = name
        self.log.append((name, size, *stream))
        return address

    @_in_turn
    def _free(self, name: str, address: int, *stream: int) -> None:
        self.finish()  # as cudaFree does
        del self._memory[address]
        self.log.append((name, *stream))

    def _copy(self, name: str, to: int, come: int, size: int, *stream: int) -> None:
        self._fail(name)
        self.log.append((name, size, *stream))
        if stream:
            self._on(stream[0], lambda: ctypes.memmove(to, come, size))
        else:
            ctypes.memmove(to, come, size)

    def _launch_kernel(
        self, function: int, gx: int, gy: int, gz: int, bx: int, by: int, bz: int, shared: int, stream: int, args: int,
        extra: int
    ) -> None:  # fmt: skip
        assert (gy, gz, by, bz, shared, extra) == (1, 1, 1, 1, 0, 0)
        if self.failing == "launchKernel":
            raise CUDADriverError("CUDA_ERROR_LAUNCH_FAILED")
        name = self._names[function]
        self.log.append(("launch", name, stream))
        staged = name.startswith("rkv_relayout")
        # the driver keeps the parameters as they are now
        at = (ctypes.c_void_p * 1).from_address(args)[0]
        params = (RelayoutParams if staged else CopyParams).from_buffer_copy(ctypes.string_at(
            at, ctypes.sizeof(RelayoutParams if staged else CopyParams)))  # fmt: skip

        def run() -> None:
            kept = (ctypes.c_void_p * 1)(ctypes.addressof(params))
            said = self._launch(name.encode(), gx, bx, kept, FIBRE if staged else LOOP, 0)
            assert said is None, said

        self._on(stream, run)

    @property
    def allocated(self) -> int:
        return len(self._memory)


class _Stream:
    def __init__(self, cupy: FakeCupy, ptr: int) -> None:
        self._cupy, self.ptr = cupy, ptr

    def synchronize(self) -> None:
        with self._cupy._turn:
            while self._cupy._queues.get(self.ptr):
                self._cupy._step(self.ptr)
            self._cupy._now = max(self._cupy._now, self._cupy._clocks.get(self.ptr, 0.0))

    def __enter__(self) -> None:
        self._cupy.current = self.ptr

    def __exit__(self, *error: object) -> None:
        self._cupy.current = 0


class _Idle:
    def __init__(self, cupy: FakeCupy) -> None:
        self._cupy = cupy

    def compile(self) -> None:
        pass

    def __call__(self, grid: tuple[int], block: tuple[int], arguments: tuple[Any]) -> None:
        self._cupy._on(self._cupy.current, lambda: None, ms=int(arguments[0]) / 1e6)


class _Device:
    def __init__(self, capability: str) -> None:
        self.compute_capability = capability

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass
