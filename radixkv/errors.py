"""L0: the exceptions of radixkv. Each concrete class also inherits the builtin that a caller would expect to catch."""

from __future__ import annotations

__all__ = [
    "AllocationError",
    "ArgumentTypeError",
    "DeviceUnavailableError",
    "EndpointError",
    "GroupError",
    "HandleError",
    "HostMemoryError",
    "IntegrityError",
    "InvalidArgumentError",
    "LoadError",
    "LockError",
    "MissingExtraError",
    "PageLockError",
    "PageOwnershipError",
    "RadixKVError",
    "StateError",
    "StorageError",
    "StorageTimeoutError",
    "TokenRangeError",
    "TransferError",
    "UnsupportedLayoutError",
]


class RadixKVError(Exception):
    """Base of every error that radixkv raises on purpose."""


class InvalidArgumentError(RadixKVError, ValueError):
    """An argument breaks the contract: a wrong length, a negative count, an unknown policy."""


class ArgumentTypeError(RadixKVError, TypeError):
    """Tokens, ids or a namespace of a type or dtype that has no defined meaning here."""


class TokenRangeError(RadixKVError, OverflowError):
    """A token or page id outside the range of int32."""


class MissingExtraError(RadixKVError, ImportError):
    """An optional package is not installed; the message says how to install it."""


class HandleError(RadixKVError, KeyError):
    """A node handle that is stale (the node has left the tree) or belongs to another tree."""

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0]) if self.args else ""


class LockError(RadixKVError, RuntimeError):
    """unlock without lock, release_host without protect_host, or deleting what is still in use."""


class StateError(RadixKVError, RuntimeError):
    """The node is in the wrong state: for example locking a node that has no device pages."""


class PageOwnershipError(RadixKVError, ValueError):
    """A page id that the tree already owns elsewhere, or that appears twice in one call."""


class AllocationError(RadixKVError, MemoryError):
    """Memory for the tree's own bookkeeping could not be had; the tree is as it was before the call."""


class DeviceUnavailableError(RadixKVError, RuntimeError):
    """A GPU was asked for, and this machine or installation lacks something for it; the message says what."""


class HostMemoryError(RadixKVError, MemoryError):
    """Host memory for a pool is not to be had: more than is free, or the system refused it; nothing was kept."""


class PageLockError(RadixKVError, RuntimeError):
    """Memory could not be page-locked, or unlocked; the message says which part and what became of the others."""


class UnsupportedLayoutError(RadixKVError, ValueError):
    """A device pool whose memory no view describes; the message names the shapes and strides that were found."""


class TransferError(RadixKVError, RuntimeError):
    """A driver refused a copy; how much of it has happened is unknown."""


class LoadError(RadixKVError, RuntimeError):
    """Pages that somebody waits for did not arrive on the device: the copy failed, was cancelled, or takes too long."""


class GroupError(RadixKVError, RuntimeError):
    """Ranks that must agree cannot: one is gone, does not answer in time, or has made other calls than the rest."""


class StorageError(RadixKVError, OSError):
    """A storage backend cannot be used, or failed as a whole; of the call's keys nothing is known."""


class StorageTimeoutError(StorageError, TimeoutError):
    """A storage backend did not answer within the deadline of the call."""


class EndpointError(RadixKVError, OSError):
    """An address of a socket cannot be had: in use, not of this machine, not allowed, or not an address at all."""


class IntegrityError(RadixKVError, AssertionError):
    """check_integrity found a broken invariant; the message names it."""
