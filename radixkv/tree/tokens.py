"""L1: from what a caller passes as tokens or ids to an int32 array, or a typed error. See ``Tokens`` in base.py."""

from __future__ import annotations

import operator
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentTypeError, InvalidArgumentError, TokenRangeError

__all__ = ["read_int", "read_tokens"]

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
# PEP 3118 codes of 4- and 8-byte integers (which of the two, the item size says), and the prefixes that mean this
# machine's byte order
_INTEGER_FORMATS = frozenset("iIlLqQnN")
_NATIVE_PREFIXES = "@=<" if sys.byteorder == "little" else "@=>!"


def read_tokens(tokens: Any, what: str = "tokens") -> npt.NDArray[np.int32]:
    """Read one dimension of tokens (or page ids) into a new int32 array.

    Args:
        tokens: any of the types listed under ``Tokens`` in base.py.
        what: how errors call it.
    Raises: ArgumentTypeError, TokenRangeError.
    """
    if isinstance(tokens, (list, tuple)):
        return _from_list(tokens, what)
    array = _as_array(tokens, what)
    if array.ndim != 1:
        raise ArgumentTypeError(f"{what} must have one dimension, not {array.ndim}")
    if array.dtype.kind not in "iu" or array.dtype.itemsize not in (4, 8) or not array.dtype.isnative:
        raise ArgumentTypeError(f"{what} must be native int32, uint32, int64 or uint64, not {array.dtype}")
    outside = np.flatnonzero((array < INT32_MIN) | (array > INT32_MAX))
    if len(outside):
        raise TokenRangeError(f"{what}[{outside[0]}] is {array[outside[0]]}, outside int32")
    return array.astype(np.int32)


def read_int(value: Any, what: str, low: int = INT64_MIN, high: int = INT64_MAX) -> int:
    """Read one integer argument. Raises: ArgumentTypeError if it is none, InvalidArgumentError outside [low, high]."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ArgumentTypeError(f"{what} must be an int, not {type(value).__name__}") from None
    if not low <= number <= high:
        raise InvalidArgumentError(f"{what} is {number}, outside {low} .. {high}")
    return number


def _from_list(items: list[Any] | tuple[Any, ...], what: str) -> npt.NDArray[np.int32]:
    values = [item if type(item) is int else _item(item, at, what) for at, item in enumerate(items)]
    for at, value in enumerate(values):
        if not INT32_MIN <= value <= INT32_MAX:
            raise TokenRangeError(f"{what}[{at}] is {value}, outside int32")
    return np.array(values, dtype=np.int32)


def _item(item: Any, at: int, what: str) -> int:
    if isinstance(item, bool):
        raise ArgumentTypeError(f"{what}[{at}] is a bool")
    try:
        return operator.index(item)
    except TypeError:
        raise ArgumentTypeError(f"{what}[{at}] is of type {type(item).__name__}, not int") from None


def _as_array(tokens: Any, what: str) -> npt.NDArray[Any]:
    """See the memory of an array, a tensor or a buffer as a NumPy array, without a copy."""
    if isinstance(tokens, np.ndarray):
        return tokens
    torch = sys.modules.get("torch")  # never imported here: a tensor can only come from a caller who has
    if torch is not None and isinstance(tokens, torch.Tensor):
        if tokens.device.type != "cpu" or tokens.dtype not in (torch.int32, torch.int64):
            raise ArgumentTypeError(f"{what} must be int32 or int64 on the CPU, not {tokens.dtype} on {tokens.device}")
        array: npt.NDArray[Any] = tokens.numpy()
        return array
    try:
        view = memoryview(tokens)
    except TypeError:
        raise ArgumentTypeError(f"{what} cannot be read from a {type(tokens).__name__}") from None
    code = view.format if len(view.format) == 1 else view.format.lstrip(_NATIVE_PREFIXES)
    if code not in _INTEGER_FORMATS:
        raise ArgumentTypeError(f"{what} must be 4- or 8-byte integers, not a buffer of format {view.format!r}")
    return np.asarray(view)
