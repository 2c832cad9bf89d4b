"""Multi-holder indexes ("who holds which prefix") behind one small interface: radixkv.PrefixIndex and Dynamo's
RadixTree.

As in base.py, only ``insert``, ``find`` and ``remove_worker`` are timed, on native arguments built beforehand.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

import radixkv

from . import dynamo
from .base import Absent

Keys = npt.NDArray[np.uint64]


class IndexPeer(ABC):
    """One index; a fresh instance is empty. Keys are uint64, one a page, each naming its whole prefix."""

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def probe(cls) -> None:
        """Import what the peer needs. Raises ImportError, OSError or AttributeError if it is not there."""

    @classmethod
    @abstractmethod
    def version(cls) -> str:
        """Package name and version, as reported."""

    @classmethod
    @abstractmethod
    def stored(cls, keys: Keys) -> Any:
        """The native argument that says "these pages are held"."""

    @classmethod
    @abstractmethod
    def key(cls, keys: Keys) -> Any:
        """The native argument of find."""

    @staticmethod
    @abstractmethod
    def holders(found: Any) -> dict[int, int]:
        """worker -> leading pages held, from what find returned."""

    def memory_bytes(self) -> int | None:
        """What the index says that it uses, or None."""
        return None

    @abstractmethod
    def insert(self, worker: int, stored: Any) -> None:
        """Record a worker's pages."""

    @abstractmethod
    def find(self, key: Any) -> Any:
        """Look up who holds how much, in the form that a router reads."""

    @abstractmethod
    def remove_worker(self, worker: int) -> None:
        """Forget a worker."""


class PrefixIndex(IndexPeer):
    """radixkv's: uint64 numpy keys."""

    name = "radixkv"

    def __init__(self) -> None:
        self.index = radixkv.PrefixIndex()
        # The calls themselves are what is measured: no frame of ours around them.
        self.insert = self.index.insert  # type: ignore[method-assign]
        self.find = self.index.find  # type: ignore[method-assign]
        self.remove_worker = self.index.remove_worker  # type: ignore[method-assign]

    @classmethod
    def probe(cls) -> None:
        radixkv.PrefixIndex  # noqa: B018

    @classmethod
    def version(cls) -> str:
        return f"radixkv {radixkv.__version__}"

    @classmethod
    def stored(cls, keys: Keys) -> Keys:
        return keys

    @classmethod
    def key(cls, keys: Keys) -> Keys:
        return keys

    @staticmethod
    def holders(found: dict[int, int]) -> dict[int, int]:
        return found

    def memory_bytes(self) -> int:
        return int(self.index.stats().memory_bytes)

    def insert(self, worker: int, stored: Keys) -> None:
        self.index.insert(worker, stored)

    def find(self, key: Keys) -> dict[int, int]:
        return dict(self.index.find(key))

    def remove_worker(self, worker: int) -> None:
        self.index.remove_worker(worker)


class DynamoIndex(IndexPeer):
    """Dynamo's RadixTree: JSON events in, lists of ints to find. The scores are read, as a router does."""

    name = "dynamo"

    def __init__(self) -> None:
        self._tree = dynamo.core().RadixTree()

    @classmethod
    def probe(cls) -> None:
        dynamo.core().RadixTree  # noqa: B018

    @classmethod
    def version(cls) -> str:
        return dynamo.Peer.version()

    @classmethod
    def stored(cls, keys: Keys) -> bytes:
        return dynamo.stored_event(keys)

    @classmethod
    def key(cls, keys: Keys) -> list[int]:
        return [int(key) for key in keys]

    @staticmethod
    def holders(found: dict[tuple[int, int], int]) -> dict[int, int]:
        return {worker: pages for (worker, _), pages in found.items()}

    def insert(self, worker: int, stored: bytes) -> None:
        self._tree.apply_event(worker, stored)

    def find(self, key: list[int]) -> Any:
        return self._tree.find_matches(key).scores

    def remove_worker(self, worker: int) -> None:
        self._tree.remove_worker(worker)


INDEX_PEERS: dict[str, type[IndexPeer]] = {"radixkv": PrefixIndex, "dynamo": DynamoIndex}


def load_all() -> tuple[dict[str, type[IndexPeer]], list[Absent]]:
    """Indexes that work here, and those that do not, with reasons."""
    present, absent = {}, []
    for name, peer in INDEX_PEERS.items():
        try:
            peer.probe()
        except (ImportError, OSError, AttributeError) as error:
            absent.append(Absent(name, f"{type(error).__name__}: {error}"))
        else:
            present[name] = peer
    return present, absent
