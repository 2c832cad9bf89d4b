"""radixkv itself, through its public Python API."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np

import radixkv
import radixkv.types

from .base import PageIds, Tokens, TreePeer


class _Match(NamedTuple):
    result: Any
    page_ids: PageIds


class Peer(TreePeer):
    """``radixkv.RadixTree``: int32 numpy keys and page ids, insert with the match as a hint."""

    name = "radixkv"
    POLICIES = ("lru", "lfu", "fifo", "mru", "filo", "priority", "slru")
    INPUT_TYPES: ClassVar[dict[str, Callable[[Tokens], Any]]] = {
        "numpy int32": lambda t: t,
        "array('q')": lambda t: array("q", t.astype(np.int64).tobytes()),
        "numpy int64": lambda t: t.astype(np.int64),
        "list": lambda t: t.tolist(),
    }

    @classmethod
    def probe(cls) -> None:
        radixkv.RadixTree  # noqa: B018  an AttributeError here is the reason that is reported

    @classmethod
    def version(cls) -> str:
        return f"radixkv {radixkv.__version__}"

    def __init__(self, page_size: int, policy: str = "lru") -> None:
        self.tree = radixkv.RadixTree(page_size=page_size, policy=cast(radixkv.types.Policy, policy))
        # The call itself is what is measured: no frame of ours around it.
        self.find = self.tree.match  # type: ignore[method-assign, assignment]

    @classmethod
    def row(cls, page_ids: PageIds, tokens: Tokens, num_cached_tokens: int, page_size: int) -> PageIds:
        return page_ids.copy()

    def write_ids(self, row: PageIds, first_page: int, page_ids: PageIds) -> None:
        row[first_page : first_page + len(page_ids)] = page_ids

    def write_prefix(self, row: PageIds, match: _Match) -> None:
        row[: len(match.page_ids)] = match.page_ids

    def num_tokens(self, match: _Match) -> int:
        return int(match.result.num_tokens)

    def evicted_page_ids(self, evicted: Any) -> PageIds:
        return cast(PageIds, evicted.page_ids)

    def cached_tokens(self) -> int:
        stats = self.tree.stats()
        return stats.evictable_tokens + stats.protected_tokens

    def memory_bytes(self) -> int:
        return int(self.tree.stats().memory_bytes)

    def match(self, key: Any) -> _Match:
        result = self.tree.match(key)
        return _Match(result, result.page_ids())

    def insert(self, key: Any, row: PageIds, match: _Match) -> None:
        self.tree.insert(key, row, match.result)

    def evict(self, num_tokens: int) -> Any:
        return self.tree.evict(num_tokens)
