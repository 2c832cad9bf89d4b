"""Just enough of CuPy for radixkv.transfer.cuda, on the host simulator; all memory is host memory.

Keeps a log of the calls in order, and knows which addresses a device can reach.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np

from .simulator import FIBRE, LOOP, build


class CUDARuntimeError(RuntimeError):
    pass


class CUDADriverError(RuntimeError):
    pass


class FakeCupy:
    def __init__(self, gpus: int = 1, capability: str = "90", driver: bool = True) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.known: dict[int, tuple[int, int]] = {}  # host address: device, and the address there
        self.failing = ""  # the call that fails from now on
        self._memory: dict[int, Any] = {}
        self._names: dict[int, str] = {}
        self._gpus, self._capability, self._driver = gpus, capability, driver
        self._launch = ctypes.CDLL(str(build())).rkv_sim_launch
        self._launch.restype = ctypes.c_char_p
        runtime = SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            memcpyHostToDevice=1,
            getDeviceCount=self._count,
            pointerGetAttributes=self._attributes,
            malloc=lambda size: self._allocate("malloc", size),
            mallocAsync=lambda size, stream: self._allocate("mallocAsync", size, stream),
            free=lambda address: self._free("free", address),
            freeAsync=lambda address, stream: self._free("freeAsync", address, stream),
            memcpy=lambda to, come, size, kind: self._copy("memcpy", to, come, size),
            streamSynchronize=lambda stream: self.log.append(("streamSynchronize",)),
            memcpyAsync=lambda to, come, size, kind, stream: self._copy("memcpyAsync", to, come, size, stream),
        )
        driver_api = SimpleNamespace(launchKernel=self._launch_kernel, CUDADriverError=CUDADriverError)
        self.cuda = SimpleNamespace(runtime=runtime, driver=driver_api, Device=self._device)

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

    def _attributes(self, address: int) -> Any:
        device, seen = self.known.get(address, (-2, 0))
        return SimpleNamespace(device=device, devicePointer=seen, type=2 if seen else 0)

    def _fail(self, name: str) -> None:
        if self.failing == name:
            raise CUDARuntimeError(f"cudaError of {name}")

    def _allocate(self, name: str, size: int, *stream: int) -> int:
        self._fail(name)
        memory = ctypes.create_string_buffer(size)
        address = ctypes.addressof(memory)
        self._memory[address] = memory
        self.log.append((name, size, *stream))
        return address

    def _free(self, name: str, address: int, *stream: int) -> None:
        del self._memory[address]
        self.log.append((name, *stream))

    def _copy(self, name: str, to: int, come: int, size: int, *stream: int) -> None:
        self._fail(name)
        ctypes.memmove(to, come, size)
        self.log.append((name, size, *stream))

    def _launch_kernel(
        self, function: int, gx: int, gy: int, gz: int, bx: int, by: int, bz: int, shared: int, stream: int, args: int,
        extra: int
    ) -> None:  # fmt: skip
        assert (gy, gz, by, bz, shared, extra) == (1, 1, 1, 1, 0, 0)
        if self.failing == "launchKernel":
            raise CUDADriverError("CUDA_ERROR_LAUNCH_FAILED")
        name = self._names[function]
        self.log.append(("launch", name, stream))
        mode = FIBRE if name.startswith("rkv_relayout") else LOOP
        said = self._launch(name.encode(), gx, bx, ctypes.c_void_p(args), mode, 0)
        assert said is None, said

    @property
    def allocated(self) -> int:
        return len(self._memory)


class _Device:
    def __init__(self, capability: str) -> None:
        self.compute_capability = capability

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass
