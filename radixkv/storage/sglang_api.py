"""L2: SGLang's storage interface (``HiCacheStorage`` as of 2025-08), in both directions.

    HiCacheStorage    the interface: tensors or pointers, one key or many
    HiCacheAdapter    any Storage as a HiCacheStorage, for engines that take one
    PluginStorage     any object with that interface as a Storage; of a class with it,
                      ``create_storage("dynamic", path="module:Class")`` makes one

Values pass through the interface as whole tensors of bytes, so a PluginStorage copies each value once either way. The
interface has no deadlines: calls run on worker threads, and are left at theirs (remote.py).
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from ..errors import InvalidArgumentError, StorageError
from .base import Storage, byte_views
from .breaker import BreakerConfig
from .envelope import HEADER_BYTES
from .namespace import PageNamespace
from .remote import RemoteStorage, Value
from .sealed import PageCounters, SealedStore

__all__ = ["HiCacheAdapter", "HiCacheStorage", "PluginStorage", "is_plugin"]

Location: TypeAlias = Any
"""Where a value lies: a contiguous torch tensor on the CPU, a buffer, or an address (then with a size)."""


class HiCacheStorage(ABC):
    """SGLang's interface, as its storage plug-ins spell it."""

    @abstractmethod
    def get(self, key: str, target_location: Location = None, target_sizes: Any = None) -> Any:
        """Read a value into ``target_location`` (of ``target_sizes`` bytes if it is an address), or into a new tensor.

        Returns: the target, or the new tensor; None if there is none, or it is not of this length.
        """

    @abstractmethod
    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> list[Any]:
        """``get`` for each key."""

    @abstractmethod
    def set(self, key: str, value: Any = None, target_location: Location = None, target_sizes: Any = None) -> bool:
        """Store ``value``, or what lies at ``target_location``. Returns: whether it is stored."""

    @abstractmethod
    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """``set`` for each key. Returns: whether all are stored."""

    @abstractmethod
    def exists(self, key: str) -> bool | dict[str, Any]:
        """Whether there is a value."""

    def batch_exists(self, keys: list[str]) -> int:
        """How many leading keys have a value."""
        for count, key in enumerate(keys):
            if not _says_yes(self.exists(key), key):
                return count
        return len(keys)


def is_plugin(kind: Any) -> bool:
    """Whether a class or an object has SGLang's interface, derived from ours, from SGLang's own, or from nothing."""
    return all(callable(getattr(kind, name, None)) for name in ("get", "set", "exists", "batch_get", "batch_set"))


# ---- ours as theirs --------------------------------------------------------------------------------------------------
class HiCacheAdapter(HiCacheStorage):
    """A Storage as a HiCacheStorage. Values are in envelopes: a wrong one is a miss, and failures are too.

    Args:
        storage: any backend; ``close`` closes it.
        namespace: what bytes depend on besides their keys; None if the caller's keys say it all.
        timeout_s: of each call. breaker: when to leave a dead storage alone.
    """

    def __init__(self, storage: Storage, namespace: PageNamespace | None = None, *, timeout_s: float | None = None,
                 breaker: BreakerConfig | None = None) -> None:  # fmt: skip
        self._sealed = SealedStore(storage, breaker=breaker)
        self._prefix = "" if namespace is None else namespace.digest().hex()
        self.timeout_s = timeout_s

    @property
    def counters(self) -> PageCounters:
        """A copy of the counters."""
        return self._sealed.counters

    def register_buffer(self, tensor: Location) -> None:
        """Announce memory that values will lie in; see Storage.register."""
        self._sealed.storage.register(_view(tensor, None))

    def get(self, key: str, target_location: Location = None, target_sizes: Any = None) -> Any:
        locations = None if target_location is None else [target_location]
        sizes = None if target_sizes is None else [target_sizes]
        return self.batch_get([key], locations, sizes)[0]

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> list[Any]:
        names = self._names(keys)
        if target_locations is None:
            target_locations = self._new_targets(names)
        present = [index for index, target in enumerate(_as_many(keys, target_locations)) if target is not None]
        views = [[_view(target_locations[index], _size(target_sizes, index))] for index in present]
        flags = self._sealed.get([names[index] for index in present], views, self.timeout_s)
        found = {index for index, good in zip(present, flags.tolist(), strict=True) if good}
        return [target_locations[index] if index in found else None for index in range(len(keys))]

    def set(self, key: str, value: Any = None, target_location: Location = None, target_sizes: Any = None) -> bool:
        locations = None if target_location is None else [target_location]
        sizes = None if target_sizes is None else [target_sizes]
        return self.batch_set([key], None if value is None else [value], locations, sizes)

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        given = _as_many(keys, target_locations if values is None else values)
        views = [[_view(value, _size(target_sizes, index))] for index, value in enumerate(given)]
        return bool(self._sealed.put(self._names(keys), views, self.timeout_s).all())

    def exists(self, key: str) -> bool:
        return bool(self._sealed.exists(self._names([key]), self.timeout_s)[0])

    def batch_exists(self, keys: list[str]) -> int:
        return self._sealed.find_prefix(self._names(keys), self.timeout_s).found

    def delete(self, key: str) -> None:
        """Remove a value."""
        self._sealed.delete(self._names([key]), self.timeout_s)

    def clear(self) -> None:
        """Remove everything in the storage, other namespaces too."""
        self._sealed.storage.clear(timeout_s=self.timeout_s)

    def close(self) -> None:
        """Close the storage."""
        self._sealed.storage.close()

    def _names(self, keys: Sequence[str]) -> list[str]:
        return [self._prefix + key for key in keys]

    def _new_targets(self, names: Sequence[str]) -> list[Any]:
        """A new tensor of each value's length, None where there is none."""
        try:
            lengths = self._sealed.storage.get_many(names, [[] for _ in names], timeout_s=self.timeout_s)
        except StorageError:
            return [None] * len(names)
        return [_new_tensor(int(length) - HEADER_BYTES) if length > HEADER_BYTES else None for length in lengths]


# ---- theirs as ours --------------------------------------------------------------------------------------------------
class PluginStorage(RemoteStorage):
    """A HiCacheStorage as a backend.

    Whatever the plug-in raises is a StorageError, or a MISS if it raises for some keys only. ``delete`` and ``clear``
    are used where it has them; without, a wrong page stays, and is found wrong each time.

    Args:
        plugin: the object. prefix, timeout_s, num_threads: see RemoteStorage. One thread: few plug-ins are thread-safe.
    stats, besides those of RemoteStorage: failed (keys that the plug-in raised for alone).
    """

    name = "plugin"

    def __init__(self, plugin: Any, *, prefix: str = "radixkv.", timeout_s: float = 10.0, num_threads: int = 1) -> None:
        if not is_plugin(plugin):
            raise InvalidArgumentError(f"a {type(plugin).__name__} has no get, set, exists, batch_get and batch_set")
        super().__init__(prefix=prefix, timeout_s=timeout_s, num_threads=num_threads)
        self.plugin = plugin
        self._counters["failed"] = 0

    def _put_chunk(self, keys: Sequence[str], values: Sequence[bytes]) -> Sequence[bool]:
        there = self._exists_chunk(keys)
        new = [index for index, exists in enumerate(there) if not exists]
        if not new or self.plugin.batch_set([keys[i] for i in new], [_tensor_of(values[i]) for i in new]):
            return [True] * len(keys)
        flags = self._exists_chunk(keys)  # which of them is not said
        self._count("refused", list(flags).count(False))
        return flags

    def _get_chunk(self, keys: Sequence[str], sizes: Sequence[int]) -> Sequence[Value | None]:
        try:
            found = self.plugin.batch_get(list(keys), [_new_tensor(size) for size in sizes])
        except Exception:
            found = self._one_by_one(keys, sizes)
        return [None if value is None else _view(value, None) for value in found]

    def _one_by_one(self, keys: Sequence[str], sizes: Sequence[int]) -> list[Any]:
        """Values of a chunk that failed as a whole. Raises: what the plug-in raised, if it does so for every key."""
        found: list[Any] = []
        failed: Exception | None = None
        for key, size in zip(keys, sizes, strict=True):
            try:
                found.append(self.plugin.get(key, _new_tensor(size)))
            except Exception as error:
                failed = error
                found.append(error)
        errors = [value for value in found if isinstance(value, Exception)]
        if failed is not None and len(errors) == len(found) > 1:
            raise failed
        self._count("failed", len(errors))
        return [None if isinstance(value, Exception) else value for value in found]

    def _exists_chunk(self, keys: Sequence[str]) -> Sequence[bool]:
        return [_says_yes(self.plugin.exists(key), key) for key in keys]

    def _delete_chunk(self, keys: Sequence[str]) -> None:
        if hasattr(self.plugin, "delete"):
            for key in keys:
                self.plugin.delete(key)

    def _clear(self) -> None:
        if hasattr(self.plugin, "clear"):
            self.plugin.clear()

    def _disconnect(self) -> None:
        if hasattr(self.plugin, "close"):
            self.plugin.close()

    def _translate(self, error: Exception) -> StorageError | None:
        return StorageError(f"{type(self.plugin).__name__}: {error!r}")


# ---- values ----------------------------------------------------------------------------------------------------------
def _says_yes(answer: Any, key: str) -> bool:
    return bool(answer.get(key)) if isinstance(answer, dict) else bool(answer)


def _as_many(keys: Sequence[str], given: Any) -> Sequence[Any]:
    if given is None or len(given) != len(keys):
        raise InvalidArgumentError(f"{len(keys)} keys and {0 if given is None else len(given)} values or locations")
    many: Sequence[Any] = given
    return many


def _size(sizes: Any, index: int) -> int | None:
    return None if sizes is None else int(sizes[index])


def _view(location: Location, num_bytes: int | None) -> memoryview:
    """The bytes at a location, no copy. Raises: InvalidArgumentError."""
    if isinstance(location, int):
        if num_bytes is None:
            raise InvalidArgumentError(f"the address {location:#x} without a size")
        return memoryview((ctypes.c_char * num_bytes).from_address(location)).cast("B")
    if not hasattr(location, "data_ptr"):
        return byte_views([location])[0]
    if location.device.type != "cpu" or not location.is_contiguous():
        raise InvalidArgumentError(f"no contiguous tensor on the CPU: {location.device}, strides {location.stride()}")
    size = location.numel() * location.element_size()
    if size == 0:
        return memoryview(b"")
    array = (ctypes.c_char * size).from_address(location.data_ptr())
    array._owner = location  # the view keeps the tensor
    return memoryview(array).cast("B")


def _new_tensor(num_bytes: int) -> Any:
    return _tensor_of(bytearray(num_bytes))


def _tensor_of(data: bytes | bytearray) -> Any:
    """A torch tensor over the bytes; a numpy array without torch. Bytes are copied, as tensors are writable."""
    array = np.frombuffer(data if isinstance(data, bytearray) else bytearray(data), np.uint8)
    try:
        import torch
    except ImportError:
        return array
    return torch.from_numpy(array)
