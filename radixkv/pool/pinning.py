"""L1: page-locking of host memory for a GPU, through whatever CUDA runtime is at hand, and which memory is near it."""

from __future__ import annotations

import ctypes
import importlib
from pathlib import Path
from typing import Any, Protocol

from ..errors import DeviceUnavailableError, PageLockError
from .memory import read_text

__all__ = ["CudaRegistrar", "Registrar", "cuda_registrar", "numa_node_of"]

# cudaHostRegisterPortable | cudaHostRegisterMapped: for all contexts, and readable from kernels
_PORTABLE_MAPPED = 3
_LIBRARIES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so")


class Registrar(Protocol):
    """Page-locks ranges of host memory. Both methods raise an Exception if they fail, and then changed nothing."""

    name: str

    def register(self, address: int, num_bytes: int) -> None: ...

    def unregister(self, address: int) -> None: ...


class CudaRegistrar:
    """cudaHostRegister and cudaHostUnregister of a CUDA runtime.

    Args:
        runtime: an object with these two functions, which return 0 or an error code:
            ``torch.cuda.cudart()``, or libcudart.
        name: shown by ``radixkv doctor``.
    """

    def __init__(self, runtime: Any, name: str) -> None:
        self.runtime = runtime
        self.name = name

    def register(self, address: int, num_bytes: int) -> None:
        """Page-lock a range, for all devices, readable from kernels. Raises: PageLockError with CUDA's error."""
        self._check("cudaHostRegister", address, num_bytes, _PORTABLE_MAPPED)

    def unregister(self, address: int) -> None:
        """Unlock a range by its address. Raises: PageLockError."""
        self._check("cudaHostUnregister", address)

    def _check(self, function: str, *arguments: int) -> None:
        code = int(getattr(self.runtime, function)(*arguments))
        if code:
            raise PageLockError(f"{function}{tuple(map(hex, arguments))} through {self.name} failed: CUDA error {code}")


class _CupyRuntime:
    """CuPy's runtime raises where CUDA returns a code; this hands the code on."""

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        return self._code(self.runtime.hostRegister, address, num_bytes, flags)

    def cudaHostUnregister(self, address: int) -> int:
        return self._code(self.runtime.hostUnregister, address)

    def _code(self, function: Any, *arguments: int) -> int:
        try:
            function(*arguments)
        except self.runtime.CUDARuntimeError as error:
            return int(error.status)
        return 0


def cuda_registrar() -> CudaRegistrar:
    """The registrar of this machine: through torch, CuPy, or libcudart, the first that sees a GPU.

    Raises: DeviceUnavailableError with what each of them lacks.
    """
    reasons = []
    for find in (_through_torch, _through_cupy, _through_library):
        found = find()
        if isinstance(found, CudaRegistrar):
            return found
        reasons.append(found)
    raise DeviceUnavailableError(f"page-locking needs CUDA: {'; '.join(reasons)}")


def _through_torch() -> CudaRegistrar | str:
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        return f"torch cannot be loaded ({error})"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU"
    return CudaRegistrar(torch.cuda.cudart(), "torch")


def _through_cupy() -> CudaRegistrar | str:
    try:
        runtime = importlib.import_module("cupy").cuda.runtime
    except (ImportError, OSError) as error:
        return f"cupy cannot be loaded ({error})"
    try:
        count = runtime.getDeviceCount()
    except RuntimeError as error:
        return f"cupy sees no GPU ({error})"
    return CudaRegistrar(_CupyRuntime(runtime), "cupy") if count else "cupy sees no GPU"


def _through_library() -> CudaRegistrar | str:
    for name in _LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        count = ctypes.c_int()
        code = library.cudaGetDeviceCount(ctypes.byref(count))
        if code or not count.value:
            return f"{name} sees no GPU (CUDA error {code})"
        library.cudaHostRegister.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
        library.cudaHostUnregister.argtypes = [ctypes.c_void_p]
        return CudaRegistrar(library, name)
    return "no libcudart is found"


def numa_node_of(device: str, root: Path = Path("/")) -> int | None:
    """The NUMA node that a GPU is attached to: its PCI address from the driver, the node from /sys.

    Args: device: "cuda:N".
    Returns: None if the driver or the kernel does not tell; locality is then left to the kernel.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    name = ctypes.create_string_buffer(32)
    number = int(device.partition(":")[2])
    if driver.cuInit(0) or driver.cuDeviceGetPCIBusId(name, len(name), number):
        return None
    text = (read_text(root / "sys/bus/pci/devices" / name.value.decode().lower() / "numa_node") or "-1").strip()
    return int(text) if text.isdigit() else None
