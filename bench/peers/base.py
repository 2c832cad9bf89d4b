"""The small interface behind which every tree is timed.

Only ``match``, ``find``, ``insert`` and ``evict`` are ever inside a timed part. They take *native* keys and rows:
whatever that implementation reads fastest, built beforehand by ``key`` and ``row``. A *row* is a request's page
table as the engine keeps it: the ids of the matched prefix (written there by ``write_prefix``, outside the timed
part, as an engine's own table update is), then freshly allocated ids.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Tokens: TypeAlias = npt.NDArray[np.int32]
PageIds: TypeAlias = npt.NDArray[np.int32]


class Absent(NamedTuple):
    """A peer that cannot be run here, and why."""

    name: str
    reason: str


def slots(page_ids: PageIds, page_size: int) -> npt.NDArray[np.int64]:
    """Every token's slot, int64, of whole pages: what a tree that stores one value a token is given."""
    return (page_ids.astype(np.int64)[:, None] * page_size + np.arange(page_size)).reshape(-1)


def single_threaded_torch() -> Any:
    """Import torch with one intra-op thread: the fastest for trees that copy tensors.

    torch splits copies of more than 32,768 values over all cores and waits at a barrier. The Rust core on the trace:
    0.78 s with one thread on a loaded 2-core machine, 1.03 s with two on a quiet one, 4.6 to 5.7 s with two on the
    loaded one.
    """
    import torch

    torch.set_num_threads(1)
    return torch


class TreePeer(ABC):
    """One tree implementation. A fresh instance is an empty tree.

    Args:
        page_size: tokens a page.
        policy: eviction policy, one of ``POLICIES``.
    """

    name: ClassVar[str]
    POLICIES: ClassVar[tuple[str, ...]] = ("lru",)
    HOLDS_PAGE_IDS: ClassVar[bool] = True
    """False: an index that says how much is cached but not where; it is timed on less work than a tree does."""
    INPUT_TYPES: ClassVar[dict[str, Callable[[Tokens], Any]]]
    """Every input type that match accepts, the one in use (the fastest, see ``bench_tree.input_types``) first."""

    @classmethod
    @abstractmethod
    def probe(cls) -> None:
        """Import what the peer needs. Raises ImportError or OSError if it is not there."""

    @classmethod
    @abstractmethod
    def version(cls) -> str:
        """Package name and version, as reported."""

    @abstractmethod
    def __init__(self, page_size: int, policy: str = "lru") -> None: ...

    # ---- outside the timed part --------------------------------------------------------------------------------------
    @classmethod
    def key(cls, tokens: Tokens) -> Any:
        """The native key for int32 ``tokens``."""
        return next(iter(cls.INPUT_TYPES.values()))(tokens)

    @classmethod
    @abstractmethod
    def row(cls, page_ids: PageIds, tokens: Tokens, num_cached_tokens: int, page_size: int) -> Any:
        """The native row for int32 ``page_ids`` (one a whole page of ``tokens``), with whatever else insert needs
        that an engine would have at hand. ``num_cached_tokens``: how many tokens the tree is going to have already."""

    def write_ids(self, row: Any, first_page: int, page_ids: PageIds) -> None:  # noqa: B027  an index has no ids to write
        """Write ``page_ids`` into the row from page ``first_page`` on."""

    def write_prefix(self, row: Any, match: Any) -> None:  # noqa: B027
        """Write the page ids that ``match`` found over the head of the row."""

    @abstractmethod
    def num_tokens(self, match: Any) -> int:
        """Tokens that ``match`` found."""

    @abstractmethod
    def evicted_page_ids(self, evicted: Any) -> PageIds:
        """The page ids that an ``evict`` gave back, int32."""

    def cached_tokens(self) -> int | None:
        """Tokens in the tree, or None if it does not say."""
        return None

    def memory_bytes(self) -> int | None:
        """What the implementation itself says that it uses, or None."""
        return None

    # ---- timed -------------------------------------------------------------------------------------------------------
    @abstractmethod
    def match(self, key: Any) -> Any:
        """Longest cached prefix with its page ids materialised."""

    def find(self, key: Any) -> Any:
        """The cheapest call that says how long the cached prefix is, page ids left out; ``match`` if there is none."""
        return self.match(key)

    @abstractmethod
    def insert(self, key: Any, row: Any, match: Any) -> None:
        """Insert the whole key. ``match`` is this request's own match, just made."""

    @abstractmethod
    def evict(self, num_tokens: int) -> Any:
        """Evict whole leaves until at least ``num_tokens`` tokens are freed."""
