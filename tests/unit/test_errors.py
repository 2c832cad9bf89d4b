"""Every error of radixkv can be caught as RadixKVError and as the builtin that a caller would expect."""

from __future__ import annotations

import builtins
import inspect
import pickle

import pytest

from radixkv import errors
from radixkv.errors import RadixKVError

EXPECTED = {
    "InvalidArgumentError": ValueError,
    "ArgumentTypeError": TypeError,
    "TokenRangeError": OverflowError,
    "DeviceUnavailableError": RuntimeError,
    "HandleError": KeyError,
    "LockError": RuntimeError,
    "MissingExtraError": ImportError,
    "StateError": RuntimeError,
    "PageOwnershipError": ValueError,
    "AllocationError": MemoryError,
    "HostMemoryError": MemoryError,
    "PageLockError": RuntimeError,
    "UnsupportedLayoutError": ValueError,
    "IntegrityError": AssertionError,
    "TransferError": RuntimeError,
    "StorageError": OSError,
    "StorageTimeoutError": TimeoutError,
}
CONCRETE = [cls for _, cls in inspect.getmembers(errors, inspect.isclass)
            if issubclass(cls, RadixKVError) and cls is not RadixKVError]  # fmt: skip


def test_all_is_complete() -> None:
    assert set(errors.__all__) == {cls.__name__ for cls in CONCRETE} | {"RadixKVError"}


def test_the_table_above_is_complete() -> None:
    assert {cls.__name__ for cls in CONCRETE} >= set(EXPECTED)


@pytest.mark.parametrize("cls", CONCRETE, ids=lambda cls: cls.__name__)
def test_each_concrete_error_inherits_ours_and_a_builtin(cls: type[Exception]) -> None:
    assert issubclass(cls, RadixKVError)
    builtin = [base for base in cls.__mro__ if base.__module__ == builtins.__name__]
    assert set(builtin) - {Exception, BaseException, object}
    if cls.__name__ in EXPECTED:
        assert issubclass(cls, EXPECTED[cls.__name__])
    assert cls.__doc__


@pytest.mark.parametrize("cls", CONCRETE, ids=lambda cls: cls.__name__)
def test_the_message_is_shown_as_it_is(cls: type[Exception]) -> None:
    error = cls("need 128 slots, 96 evictable")
    assert str(error) == "need 128 slots, 96 evictable"  # KeyError alone would show its repr
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (cls, str(error))
    assert str(cls()) == ""


def test_the_base_is_no_builtin() -> None:
    assert RadixKVError.__bases__ == (Exception,)
