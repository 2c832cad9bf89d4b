"""L5: HiCacheStorage, the storage interface that engines' plug-ins implement, and such a plug-in as a ``Storage``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import StorageError
from ..storage.base import MISS, BoolArray, IntArray, Parts, Storage, byte_views, check_pairs
from ..storage.memory import scatter

__all__ = ["HiCacheStorage", "PluginStorage"]


class HiCacheStorage(ABC):
    """SGLang's interface of 2025-08: values are tensors of bytes, targets are tensors to read into."""

    @abstractmethod
    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        """The value (``target_location``, or a tensor of its own), or None."""

    @abstractmethod
    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> Any:
        """A list of values and Nones."""

    @abstractmethod
    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """Store a value. Returns: whether it is stored."""

    @abstractmethod
    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """Store values. Returns: whether all of them are stored."""

    @abstractmethod
    def exists(self, key: str) -> bool | dict[str, Any]:
        """Whether there is a value."""


class PluginStorage(Storage):
    """A HiCacheStorage as a backend. It has no deadlines: what it hangs in, hangs its worker (and nobody else).

    Every value passes through a copy, as the interface takes whole tensors. An exception of the plug-in's is a
    StorageError; ``delete`` and ``clear`` are used where it has them.
    """

    name = "plugin"

    def __init__(self, plugin: Any) -> None:
        self.plugin = plugin

    def put_many(self, keys: Sequence[str], parts: Sequence[Parts], *, timeout_s: float | None = None) -> BoolArray:
        """See Storage."""
        check_pairs(keys, parts)
        values = [_tensor(np.concatenate([np.frombuffer(view, np.uint8) for view in byte_views(p)])) for p in parts]
        if not len(keys):
            return np.zeros(0, np.bool_)
        if self._ask("batch_set", list(keys), values):
            return np.ones(len(keys), np.bool_)
        return self.exists_many(keys)  # which of them is not said

    def get_many(self, keys: Sequence[str], parts: Sequence[Parts], *, timeout_s: float | None = None) -> IntArray:
        """See Storage."""
        check_pairs(keys, parts)
        targets = [_tensor(np.zeros(sum(view.nbytes for view in byte_views(p)), np.uint8)) for p in parts]
        sizes = np.full(len(keys), MISS, np.int64)
        for at, key in enumerate(keys):
            found = self._ask("get", key, targets[at])
            if found is None or found is False:
                continue
            data = np.ascontiguousarray(np.asarray(targets[at] if found is True else found)).reshape(-1).view(np.uint8)
            sizes[at] = data.size
            scatter(data.data, byte_views(parts[at], writable=True))
        return sizes

    def exists_many(self, keys: Sequence[str], *, timeout_s: float | None = None) -> BoolArray:
        """See Storage."""
        return np.array([_is_there(self._ask("exists", key), key) for key in keys], np.bool_)

    def delete_many(self, keys: Sequence[str], *, timeout_s: float | None = None) -> None:
        """See Storage."""
        if hasattr(self.plugin, "delete"):
            for key in keys:
                self._ask("delete", key)

    def clear(self, *, timeout_s: float | None = None) -> None:
        """See Storage."""
        if hasattr(self.plugin, "clear"):
            self._ask("clear")

    def close(self) -> None:
        """See Storage."""
        if hasattr(self.plugin, "close"):
            self._ask("close")

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self.plugin, method)(*arguments)
        except Exception as error:
            raise StorageError(f"{type(self.plugin).__name__}.{method}: {error!r}") from error


def _tensor(data: np.ndarray[Any, Any]) -> Any:
    """Plug-ins expect torch tensors; without torch they get arrays."""
    try:
        import torch
    except ImportError:
        return data
    return torch.from_numpy(data)


def _is_there(answer: Any, key: str) -> bool:
    return bool(answer.get(key)) if isinstance(answer, dict) else bool(answer)
