"""NVIDIA Dynamo's RadixTree (PyPI ai-dynamo-runtime): a router's index, not a cache's tree.

What its API means, as seen by calling it:

* ``apply_event(worker, json)``: a "stored" event lists blocks, each with a ``tokens_hash`` (the local hash of the
  block's tokens: the edge that find_matches follows) and a ``block_hash`` (identifies the block to the engine: the
  handle by which "removed" events and ``parent_hash`` name it). Blocks are chained below ``parent_hash``
* ``find_matches(list of tokens_hash)`` -> OverlapScores; ``.scores`` maps (worker, dp_rank) to leading blocks held;
  nothing else. No page ids, no splits, no locks, no eviction order
* the tree lives on a thread of its own; every call is a message there and back, which is most of a short call's time

Tree-like use: tokens are hashed by its own ``compute_block_hash_for_seq`` inside the timed match (a tree that is
handed tokens must do it); page ids do not exist, so it does less than a tree. Events are JSON built outside the
timed part and hold only the new blocks.
"""

from __future__ import annotations

import importlib.metadata
import json
from array import array
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from .base import PageIds, Tokens, TreePeer


def stored_event(
    keys: npt.NDArray[np.uint64], parent_key: int | None = None, token_hashes: npt.NDArray[np.uint64] | None = None
) -> bytes:
    """A "stored" event for a run of chained page keys (uint64) below ``parent_key``; token_hashes default to the
    keys."""
    hashes = keys if token_hashes is None else token_hashes
    blocks = [{"block_hash": k, "tokens_hash": h} for k, h in zip(keys.tolist(), hashes.tolist(), strict=True)]
    event = {"event_id": 1, "data": {"stored": {"parent_hash": parent_key, "blocks": blocks}}, "dp_rank": 0}
    return json.dumps(event).encode()


def core() -> Any:
    """Dynamo's native module. Raises: ImportError."""
    from dynamo import _core

    return _core


class _Match(NamedTuple):
    num_tokens: int


class Peer(TreePeer):
    """One worker; keys are lists of ints (numpy and array were slower to hash, see ``INPUT_TYPES``)."""

    name = "dynamo"
    POLICIES = ()
    HOLDS_PAGE_IDS = False
    INPUT_TYPES: ClassVar[dict[str, Callable[[Tokens], Any]]] = {
        "list": lambda t: t.tolist(),
        "array('I')": lambda t: array("I", t.astype(np.uint32).tobytes()),
        "numpy uint32": lambda t: t.astype(np.uint32),
    }

    @classmethod
    def probe(cls) -> None:
        core().RadixTree  # noqa: B018

    @classmethod
    def version(cls) -> str:
        return f"ai-dynamo-runtime {importlib.metadata.version('ai-dynamo-runtime')}"

    def __init__(self, page_size: int, policy: str = "lru") -> None:
        module = core()
        self._hash, self._tree, self._page_size = module.compute_block_hash_for_seq, module.RadixTree(), page_size

    @classmethod
    def row(cls, page_ids: PageIds, tokens: Tokens, num_cached_tokens: int, page_size: int) -> bytes | None:
        """The event for the blocks that are not cached yet; their ``block_hash`` is a 64-bit chain over the local
        hashes."""
        hashes = np.array(core().compute_block_hash_for_seq(tokens.tolist(), page_size), np.uint64)
        chained = chain(hashes)
        first = num_cached_tokens // page_size
        if first == len(hashes):
            return None
        parent = int(chained[first - 1]) if first else None
        return stored_event(chained[first:], parent, hashes[first:])

    def num_tokens(self, match: _Match) -> int:
        return match.num_tokens

    def evicted_page_ids(self, evicted: Any) -> PageIds:
        raise NotImplementedError("Dynamo's RadixTree evicts nothing by itself")

    def match(self, key: Any) -> _Match:
        scores = self._tree.find_matches(self._hash(key, self._page_size)).scores
        return _Match(scores.get((0, 0), 0) * self._page_size)

    def insert(self, key: Any, row: bytes | None, match: _Match) -> None:
        if row is not None:
            self._tree.apply_event(0, row)

    def evict(self, num_tokens: int) -> Any:
        raise NotImplementedError("Dynamo's RadixTree evicts nothing by itself")


def chain(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A prefix-identifying uint64 for each of a run of local hashes: h[i] = mix(h[i - 1], local[i]), never 0."""
    out = np.empty_like(hashes)
    value, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    for index, local in enumerate(hashes.tolist()):
        value = ((value ^ local) * 0x9FB21C651E98DF25) & mask
        value ^= value >> 29
        out[index] = value or 1
    return out
