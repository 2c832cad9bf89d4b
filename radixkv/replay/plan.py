"""L5: hit rate against capacity, at every size at once, from a trace alone: no tokens, no tree.

The unit of caching is the trace's block, and hits are prefix hits. Each block is identified with its whole prefix
(BlockTrie), and a request touches the blocks of its path at one moment, deepest first, so that ancestors are always
more recent than their descendants. The first C blocks of the LRU stack are then closed under parent, which is what a
tree that evicts leaves first holds, and a block hits at capacity C exactly if its stack distance is at most C:
everything before it in the prompt is higher in the stack and hits as well.

A tree evicts whole nodes, and a request needs room while it runs. Both count only where the capacity is a few prompts:
from about five of the longest prompts on, ``radixkv replay`` agrees within a point, and below it hits less.

Source: Mattson, Gecsei, Slutz, Traiger 1970 (stack distances); Bennett, Kruskal 1975 (in one pass over a tree of
counts); Belady 1966.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..trace import DEFAULT_BLOCK_TOKENS, BlockTrie, TraceRequest

__all__ = ["Accesses", "Plan", "belady_hits", "choose_capacities", "make_plan", "number_accesses", "stack_distances"]

_Ints = npt.NDArray[np.int64]
NEVER = -1


@dataclass(frozen=True, slots=True)
class Accesses:
    """Every block of every prompt in order. All arrays int64 [blocks].

    ``request``: which request. ``depth``: which block of its prompt. ``block``: number of the prefix. ``tokens``: of
    the block (a cut one has fewer). ``previous``: the access of the same block before, or NEVER. ``last``: the last
    access of its request.
    """

    request: _Ints
    depth: _Ints
    block: _Ints
    tokens: _Ints
    previous: _Ints
    last: _Ints
    unique_blocks: int


def number_accesses(requests: Sequence[TraceRequest], block_tokens: int = DEFAULT_BLOCK_TOKENS) -> Accesses:
    """Lay a trace out as arrays. O(blocks)."""
    trie = BlockTrie()
    paths = [np.array(trie.add(request.hash_ids), np.int64) for request in requests]
    lengths = np.array([len(path) for path in paths], np.int64)
    request = np.repeat(np.arange(len(paths)), lengths)
    block = np.concatenate([*paths, np.zeros(0, np.int64)])
    ends = np.cumsum(lengths)
    depth = np.arange(len(block)) - (ends - lengths)[request]
    inputs = np.array([r.input_length for r in requests], np.int64)
    tokens = np.minimum(block_tokens, inputs[request] - depth * block_tokens)
    order = np.argsort(block, kind="stable")  # the accesses of each block side by side, in order of time
    same = block[order[1:]] == block[order[:-1]]
    previous = np.full(len(block), NEVER, np.int64)
    previous[order[1:][same]] = order[:-1][same]
    return Accesses(request, depth, block, tokens, previous, ends[request] - 1, len(trie))


def stack_distances(accesses: Accesses) -> _Ints:
    """The smallest LRU capacity, in blocks, at which each access hits; NEVER for first uses. O(blocks log blocks).

    Numbered on the time line of touches (deepest first within a request). A Fenwick tree counts, for each access, the
    blocks touched since its previous one. Among those are the deeper blocks of its own request, which were below it in
    the stack when the request came: they are taken off again.
    """
    size = len(accesses.block)
    first = np.arange(size) - accesses.depth  # first access of the same request
    touch_at = (first + accesses.last - np.arange(size) + 1).tolist()  # 1-based time of each access's touch
    previous = accesses.previous.tolist()
    counts = [0] * (size + 1)  # Fenwick tree over times: 1 where a block was touched last
    live = 0
    distances = [NEVER] * size
    for access in np.argsort(touch_at, kind="stable").tolist():
        before = previous[access]
        if before != NEVER:
            older_or_equal = 0
            at = time = touch_at[before]
            while at:
                older_or_equal += counts[at]
                at &= at - 1
            distances[access] = live - older_or_equal + 1
            while time <= size:
                counts[time] -= 1
                time += time & -time
            live -= 1
        time = touch_at[access]
        while time <= size:
            counts[time] += 1
            time += time & -time
        live += 1
    found = np.array(distances, np.int64).reshape(size)
    return np.where(found == NEVER, NEVER, found - (accesses.last - np.arange(size)))


def belady_hits(accesses: Accesses, capacity_blocks: int) -> npt.NDArray[np.bool_]:
    """Which accesses hit if the cache knows the future: farthest next use leaves first, or never enters (bypass).

    Each reuse is an interval of time (previous access, access] in which the block must stay. An optimal choice sweeps
    over the requests and, whenever more than ``capacity_blocks`` intervals are open, gives up the one that ends last;
    of those that end together, the deepest, so the kept blocks stay closed under parent. No cache of that many blocks
    has more hits: a bound. (It does not even count the room that a request needs while it runs.)

    Returns: bool [blocks]. O(reuses log reuses).
    """
    hits: npt.NDArray[np.bool_] = accesses.previous != NEVER
    ends = np.flatnonzero(hits)
    begins = accesses.previous[ends]
    order = np.argsort(begins, kind="stable")
    end_access = ends[order].tolist()
    end_request = accesses.request[ends][order].tolist()
    open_until = [0] * (max(end_request, default=0) + 1)  # open intervals by the request that ends them
    open_count = settled = 0
    heap: list[tuple[int, int]] = []  # farthest end first; intervals that have ended sink to the bottom
    given_up = []
    for now, end, access in zip(accesses.request[begins][order].tolist(), end_request, end_access, strict=True):
        while settled <= now:  # what ends here has hit, and its room is free again
            open_count -= open_until[settled]
            settled += 1
        heapq.heappush(heap, (-end, -access))
        open_until[end] += 1
        open_count += 1
        if open_count > capacity_blocks:
            far_end, far_access = heapq.heappop(heap)
            open_until[-far_end] -= 1
            open_count -= 1
            given_up.append(-far_access)
    hits[given_up] = False
    return hits


# ---- the plan --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Plan:
    """The answer for one trace. Capacities are in blocks; *_hit_tokens count each hit block's own tokens.

    ``lru_hit_blocks`` and ``lru_hit_tokens``: int64 [largest useful capacity + 1], indexed by capacity. ``capacities``:
    int64, rising; ``clairvoyant_*`` are parallel to it. The last one is the largest useful one unless the caller chose.
    """

    block_tokens: int
    requests: int
    blocks: int
    tokens: int
    unique_blocks: int
    lru_hit_blocks: _Ints
    lru_hit_tokens: _Ints
    capacities: _Ints
    clairvoyant_hit_blocks: _Ints
    clairvoyant_hit_tokens: _Ints

    @property
    def achievable_hit_tokens(self) -> int:
        """What an unbounded cache hits."""
        return int(self.lru_hit_tokens[-1])

    def lru_tokens_at(self, capacity_blocks: int) -> int:
        """Hit tokens of LRU at any capacity."""
        return int(self.lru_hit_tokens[min(capacity_blocks, len(self.lru_hit_tokens) - 1)])

    def knee(self, share: float) -> int:
        """The smallest LRU capacity, in blocks, that reaches this share (0 .. 1) of the achievable hits."""
        return int(np.searchsorted(self.lru_hit_tokens, share * self.achievable_hit_tokens - 1e-9, side="left"))

    def as_dict(self, bytes_per_token: int, shares: Sequence[float] = ()) -> dict[str, Any]:
        """The plan at its capacities and knees, for JSON: sizes in blocks, tokens and bytes; rates are fractions."""
        bounds = zip(self.clairvoyant_hit_blocks.tolist(), self.clairvoyant_hit_tokens.tolist(), strict=True)
        return {
            "block_tokens": self.block_tokens,
            "bytes_per_token": bytes_per_token,
            "requests": self.requests,
            "blocks": self.blocks,
            "tokens": self.tokens,
            "unique_blocks": self.unique_blocks,
            "unbounded": {
                "hit_blocks": int(self.lru_hit_blocks[-1]),
                "hit_tokens": self.achievable_hit_tokens,
                "hit_rate": self._rate(self.achievable_hit_tokens),
                "capacity_blocks": len(self.lru_hit_tokens) - 1,
            },
            "curve": [
                self._lru_at(capacity, bytes_per_token)
                | {
                    "clairvoyant_hit_blocks": blocks,
                    "clairvoyant_hit_tokens": tokens,
                    "clairvoyant_hit_rate": self._rate(tokens),
                }
                for capacity, (blocks, tokens) in zip(self.capacities.tolist(), bounds, strict=True)
            ],
            "knees": [{"share": share} | self._lru_at(self.knee(share), bytes_per_token) for share in shares],
        }

    def _lru_at(self, capacity: int, bytes_per_token: int) -> dict[str, Any]:
        tokens = self.lru_tokens_at(capacity)
        return {
            "capacity_blocks": capacity,
            "capacity_tokens": capacity * self.block_tokens,
            "capacity_bytes": capacity * self.block_tokens * bytes_per_token,
            "lru_hit_blocks": int(self.lru_hit_blocks[min(capacity, len(self.lru_hit_blocks) - 1)]),
            "lru_hit_tokens": tokens,
            "lru_hit_rate": self._rate(tokens),
        }

    def _rate(self, hit_tokens: int) -> float | None:
        return hit_tokens / self.tokens if self.tokens else None


def make_plan(
    requests: Sequence[TraceRequest],
    block_tokens: int = DEFAULT_BLOCK_TOKENS,
    capacities: Sequence[int] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Plan:
    """Analyse a trace.

    Args:
        capacities: in blocks, for the clairvoyant bound; default choose_capacities. LRU is known at every size anyway.
        progress: told what is being done, step by step.
    """
    tell = progress or (lambda step: None)
    tell("reading prefixes")
    accesses = number_accesses(requests, block_tokens)
    tell("stack distances")
    distances = stack_distances(accesses)
    reused = distances != NEVER
    lru_blocks = np.cumsum(np.bincount(distances[reused], minlength=1))
    lru_tokens = np.cumsum(np.bincount(distances[reused], accesses.tokens[reused], minlength=1)).astype(np.int64)
    chosen = choose_capacities(len(lru_blocks) - 1) if capacities is None else np.unique(np.array(capacities, np.int64))
    bound_blocks, bound_tokens = [], []
    for i, capacity in enumerate(chosen.tolist()):
        tell(f"clairvoyant {i + 1}/{len(chosen)}")
        hits = belady_hits(accesses, capacity)
        bound_blocks.append(int(hits.sum()))
        bound_tokens.append(int(accesses.tokens[hits].sum()))
    return Plan(
        block_tokens=block_tokens,
        requests=len(requests),
        blocks=len(accesses.block),
        tokens=int(accesses.tokens.sum()),
        unique_blocks=accesses.unique_blocks,
        lru_hit_blocks=lru_blocks,
        lru_hit_tokens=lru_tokens,
        capacities=chosen,
        clairvoyant_hit_blocks=np.array(bound_blocks, np.int64),
        clairvoyant_hit_tokens=np.array(bound_tokens, np.int64),
    )


def choose_capacities(largest: int, count: int = 16) -> _Ints:
    """``count`` capacities (or all, if there are fewer) in geometric steps over a factor of 500, up to the largest."""
    largest = max(1, largest)
    sizes = np.unique(np.geomspace(max(1, largest / 500), largest, count).round().astype(np.int64))
    if len(sizes) < count:  # steps that fell together: fill up with the smallest sizes that are left
        unused = np.setdiff1d(np.arange(1, min(largest, 2 * count) + 1), sizes)
        sizes = np.sort(np.concatenate([sizes, unused[: count - len(sizes)]]))
    return sizes
