"""L1: the arrays that pools are made of: torch tensors, CuPy arrays, or numpy. The first two are imported on use only.

Copies need an address, a shape and strides in bytes; how they are held is of no interest to them. So everything here
ends in ``Buffer``, and a dtype that numpy has no name for (bf16, fp8) is stored as an unsigned integer of its width.
"""

from __future__ import annotations

import importlib
import re
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from ..errors import ArgumentTypeError, DeviceUnavailableError, InvalidArgumentError

__all__ = ["ITEM_BYTES", "Array", "Buffer", "Library", "allocate", "canonical_dtype", "choose_library", "describe"]
__all__ += ["parse_device", "storage_dtype", "to_library"]

Array: TypeAlias = Any
"""A numpy.ndarray, torch.Tensor or cupy.ndarray."""

Library: TypeAlias = Literal["torch", "cupy", "numpy"]

ITEM_BYTES = {
    "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1, "uint8": 1,
}  # fmt: skip
"""Bytes of one element. uint8: packed rows (quantised KV with its scales inline), of which only whole rows have a
meaning."""

_ALIASES = {
    "fp32": "float32", "float": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16",
    "fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2", "byte": "uint8", "packed": "uint8",
}  # fmt: skip


class Buffer(NamedTuple):
    """Where the elements of one array lie. Valid as long as that array is alive and not resized.

    address: of element [0, ..., 0]. shape: elements. strides: bytes. item_bytes: of one element. device: "cpu" or
    "cuda:N".
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    item_bytes: int
    device: str


# ---- names -----------------------------------------------------------------------------------------------------------
def canonical_dtype(dtype: Any) -> str:
    """The name of a KV dtype in ``ITEM_BYTES``, from a name, an alias ("bf16", "fp8"), or a torch, numpy or CuPy dtype.

    Raises: InvalidArgumentError for any other.
    """
    name = dtype if isinstance(dtype, str) else str(getattr(dtype, "__name__", dtype))
    name = name.removeprefix("torch.")
    name = _ALIASES.get(name, name)
    if name not in ITEM_BYTES:
        raise InvalidArgumentError(f"dtype {dtype!r} is none of {', '.join(ITEM_BYTES)}")
    return name


def storage_dtype(dtype: str, library: Library) -> str:
    """The dtype under which a library stores a KV dtype: its own, or an unsigned integer of its width.

    torch cannot index-assign fp8, numpy and CuPy have neither fp8 nor bf16.
    """
    if dtype.startswith("float8"):
        return "uint8"
    return "uint16" if dtype == "bfloat16" and library != "torch" else dtype


def parse_device(device: Any) -> str:
    """ "cpu" or "cuda:N", from that, from "cuda" (the current one, taken as 0), or from a torch.device.

    Raises: InvalidArgumentError for any other.
    """
    name = str(device)
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if match:
        return f"cuda:{int(match[1] or 0)}"
    if name not in ("cpu", "cpu:0"):
        raise InvalidArgumentError(f"device {name!r} is not cpu, cuda or cuda:N")
    return "cpu"


# ---- libraries -------------------------------------------------------------------------------------------------------
def choose_library(device: str, wanted: Library | None = None) -> Library:
    """The array library for a pool on ``device``: what is wanted, else torch, else CuPy (GPU) or numpy (CPU).

    Raises: DeviceUnavailableError with what each library lacks, InvalidArgumentError for numpy or CuPy on the wrong
    device.
    """
    if device == "cpu":
        if wanted == "cupy":
            raise InvalidArgumentError("CuPy arrays are on a GPU: for device cpu use torch or numpy")
        if wanted == "numpy":
            return "numpy"
        missing = _missing("torch")
        if missing and wanted == "torch":
            raise DeviceUnavailableError(f"torch tensors on {device}: {missing}")
        return "numpy" if missing else "torch"
    if wanted == "numpy":
        raise InvalidArgumentError(f"numpy arrays are in host memory, not on {device}")
    reasons = []
    candidates: tuple[Library, ...] = (wanted,) if wanted else ("torch", "cupy")
    for library in candidates:
        missing = _missing(library) or _no_device(library, device)
        if not missing:
            return library
        reasons.append(missing)
    raise DeviceUnavailableError(f"no pool on {device}: {'; '.join(reasons)}; device='cpu' works without a GPU")


def _missing(library: str) -> str:
    """Why a library cannot be imported; "" if it can."""
    try:
        importlib.import_module(library)
    except ImportError as error:
        return f"{library} is not installed ({error})"
    except OSError as error:  # a shared library of it cannot be loaded
        return f"{library} cannot be loaded ({error})"
    return ""


def _no_device(library: str, device: str) -> str:
    """Why a library that is there sees no such GPU; "" if it does."""
    number, module = int(device.partition(":")[2]), importlib.import_module(library)
    try:
        count = module.cuda.device_count() if library == "torch" else module.cuda.runtime.getDeviceCount()
    except RuntimeError as error:  # CuPy's CUDARuntimeError: no driver
        return f"{library} finds no GPU ({error})"
    if number < count:
        return ""
    built = library == "torch" and module.version.cuda is None and getattr(module.version, "hip", None) is None
    return f"{library} {module.__version__} " + ("is a CPU build" if built else f"sees {count} GPUs, not {device}")


def allocate(shape: tuple[int, ...], dtype: str, device: str, library: Library) -> Array:
    """A new array of zeros (zeros: an attention kernel may read a slot that nothing wrote, and NaNs spread).

    Args: dtype: the name of a storage dtype. device: as of ``parse_device``.
    """
    if library == "numpy":
        return np.zeros(shape, np.dtype(dtype))
    module = importlib.import_module(library)
    if library == "torch":
        return module.zeros(shape, dtype=getattr(module, dtype), device=device)
    with module.cuda.Device(int(device.partition(":")[2])):
        return module.zeros(shape, dtype=np.dtype(dtype))


def to_library(values: np.ndarray[Any, Any], like: Any, device: str = "cpu") -> Array:
    """Hand numpy ``values`` over in the library of ``like``: a tensor on its device if that is one, else as they are.

    Args: like: any value, or the string "torch" (then on ``device``).
    """
    if like == "torch" if isinstance(like, str) else _is_torch(like):
        torch = importlib.import_module("torch")
        return torch.from_numpy(values).to(device if isinstance(like, str) else like.device)
    return values


def _is_torch(array: Any) -> bool:
    return callable(getattr(array, "data_ptr", None)) and callable(getattr(array, "stride", None))


def describe(array: Array) -> Buffer:
    """Where an array's elements lie, read from its attributes; imports nothing.

    Raises: ArgumentTypeError if it is no torch tensor, CuPy array, numpy array or object with their array interfaces.
    """
    if _is_torch(array):
        item = int(array.element_size())
        strides = tuple(int(step) * item for step in array.stride())
        return Buffer(int(array.data_ptr()), tuple(array.shape), strides, item, parse_device(array.device))
    cuda = getattr(array, "__cuda_array_interface__", None)
    interface = getattr(array, "__array_interface__", None) if cuda is None else cuda
    if interface is None:
        raise ArgumentTypeError(f"{type(array).__name__} is neither a torch tensor nor a CuPy or numpy array")
    number = getattr(getattr(array, "device", None), "id", 0)
    return _from_interface(interface, "cpu" if cuda is None else f"cuda:{number}")


def _from_interface(interface: dict[str, Any], device: str) -> Buffer:
    shape, item = tuple(map(int, interface["shape"])), np.dtype(interface["typestr"]).itemsize
    strides = interface.get("strides")
    if strides is None:  # C order
        strides = [item * int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape))]
    return Buffer(int(interface["data"][0]), shape, tuple(map(int, strides)), item, device)
