"""Workloads: sequences of prompts, the same for every implementation, by seed.

``python -m bench.workloads`` prints their sizes. Tokens are int32.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

VOCABULARY = 128_000
PAGE_SIZE = 16
BLOCK_TOKENS = 512
"""Tokens that one hash id of a Mooncake trace stands for."""

Tokens = npt.NDArray[np.int32]


class WorkloadAbsent(Exception):
    """The data of a workload is not on this machine; the text says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Prompts in order of arrival.

    Attributes:
        tokens: one int32 array a request.
        page_identity: per request, a dense number (0 ..) for each whole page together with everything before it,
        int64: equal
            numbers exactly when the prefixes up to there are equal. Not device page ids.
        capacity_pages: pages that fit; None = everything fits.
        known_hit_tokens: from the trace's own documentation, to check a run against; None if nothing is known.
    """

    name: str
    seed: int
    tokens: list[Tokens]
    page_identity: list[npt.NDArray[np.int64]]
    page_size: int = PAGE_SIZE
    capacity_pages: int | None = None
    known_hit_tokens: int | None = None
    notes: str = ""


class Layout(NamedTuple):
    """Where each page lies if new pages are appended to one arena in order of arrival, nothing ever leaving it.

    segment_start / segment_pages: the runs of arena pages that a request's hit consists of; request r has the segments
    first_segment[r] .. first_segment[r + 1]. tail_start[r]: where its new pages go. hit_pages[r]: how many it finds.
    """

    first_segment: npt.NDArray[np.int64]
    segment_start: npt.NDArray[np.int64]
    segment_pages: npt.NDArray[np.int64]
    tail_start: npt.NDArray[np.int64]
    hit_pages: npt.NDArray[np.int64]
    num_pages: int


def layout(workload: Workload) -> Layout:
    """The layout of a workload in an unbounded cache; also the oracle for how much each request must find."""
    size = 1 + max((int(p.max()) for p in workload.page_identity if len(p)), default=0)
    position = np.full(size, -1, np.int64)
    first, starts, lengths, tails, hits = [0], [], [], [], []
    used = 0
    for identity in workload.page_identity:
        where = position[identity]
        hit = int(np.argmax(where < 0)) if (where < 0).any() else len(where)
        head = where[:hit]
        cuts = np.flatnonzero(np.diff(head) != 1) + 1
        bounds = np.concatenate([[0], cuts, [hit]]) if hit else np.zeros(1, np.int64)
        starts.append(head[bounds[:-1]] if hit else head)
        lengths.append(np.diff(bounds))
        first.append(first[-1] + len(starts[-1]))
        tails.append(used)
        hits.append(hit)
        tail = len(identity) - hit
        position[identity[hit:]] = np.arange(used, used + tail)
        used += tail
    return Layout(
        np.array(first, np.int64),
        np.concatenate(starts).astype(np.int64),
        np.concatenate(lengths).astype(np.int64),
        np.array(tails, np.int64),
        np.array(hits, np.int64),
        used,
    )


def mix_tokens(values: npt.NDArray[np.uint64]) -> Tokens:
    """A fixed mix (the finaliser of splitmix64) of uint64 values, modulo the vocabulary: int32 token ids."""
    x = values.astype(np.uint64)
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) % np.uint64(VOCABULARY)).astype(np.int32)


# ---- (i) a real trace ------------------------------------------------------------------------------------------------
def trace_path() -> Path:
    """$RADIXKV_TRACE, else ../shared/traces/conversation_trace.jsonl beside the repository. Raises: WorkloadAbsent."""
    root = Path(__file__).resolve().parent.parent
    named = os.environ.get("RADIXKV_TRACE")
    if named:
        candidates = [Path(named)]
    else:  # a linked worktree lies deeper than the main one
        tail = Path("shared") / "traces" / "conversation_trace.jsonl"
        candidates = [root.parent / tail, root.parent.parent / tail]
    for path in candidates:
        if path.is_file():
            return path
    raise WorkloadAbsent(
        f"trace: no file at {' or '.join(map(str, candidates))}; set RADIXKV_TRACE to conversation_trace.jsonl "
        "of Mooncake's FAST25 release"
    )


def trace(num_requests: int = 2_000, page_size: int = PAGE_SIZE) -> Workload:
    """The first requests of the conversation trace, prompts only, nothing ever evicted. Raises: WorkloadAbsent."""
    tokens, identity = [], []
    offsets = np.arange(BLOCK_TOKENS, dtype=np.uint64)
    pages_a_block = BLOCK_TOKENS // page_size
    with trace_path().open() as lines:
        for _, line in zip(range(num_requests), lines, strict=False):
            request = json.loads(line)
            ids, length = np.array(request["hash_ids"], np.uint64), int(request["input_length"])
            tokens.append(mix_tokens((ids[:, None] * np.uint64(BLOCK_TOKENS) + offsets).reshape(-1)[:length]))
            pages = ids.astype(np.int64)[:, None] * pages_a_block + np.arange(pages_a_block)
            identity.append(pages.reshape(-1)[: length // page_size])
    known = 8_070_832 if (num_requests, page_size) == (2_000, 16) else None
    return Workload(
        name="trace",
        seed=0,
        tokens=tokens,
        page_identity=identity,
        page_size=page_size,
        known_hit_tokens=known,
        notes=f"first {len(tokens):,} requests of conversation_trace.jsonl, unbounded",
    )


# ---- (ii) growing conversations --------------------------------------------------------------------------------------
def growing(
    num_users: int = 1_000,
    num_turns: int = 10,
    shared_tokens: int = 2_000,
    turn_tokens: int = 500,
    seed: int = 7,
    page_size: int = PAGE_SIZE,
) -> Workload:
    """Users share a system prompt; each turn is the whole conversation so far plus ``turn_tokens``; turns
    round-robin."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, VOCABULARY, shared_tokens, np.int32)
    whole = [
        np.concatenate([shared, rng.integers(0, VOCABULARY, num_turns * turn_tokens, np.int32)])
        for _ in range(num_users)
    ]
    pages = len(whole[0]) // page_size
    shared_pages = shared_tokens // page_size
    tokens, identity = [], []
    for turn in range(1, num_turns + 1):
        length = shared_tokens + turn * turn_tokens
        for user in range(num_users):
            tokens.append(whole[user][:length])
            ids = np.arange(length // page_size, dtype=np.int64)
            identity.append(np.where(ids < shared_pages, ids, ids + user * pages))
    return Workload(
        name="growing",
        seed=seed,
        tokens=tokens,
        page_identity=identity,
        page_size=page_size,
        notes=f"{num_users:,} users x {num_turns} turns, {shared_tokens:,} shared tokens, +{turn_tokens} a turn",
    )


# ---- (iii) churn at capacity -----------------------------------------------------------------------------------------
def churn(capacity_pages: int = 32_768, passes: int = 10, seed: int = 11, page_size: int = PAGE_SIZE) -> Workload:
    """Cohorts of growing conversations among random documents, until ``passes`` x the capacity was new."""
    rng = np.random.default_rng(seed)
    users, turns, shared_tokens, turn_tokens, documents = 32, 10, 2_000, 500, 8
    shared = rng.integers(0, VOCABULARY, shared_tokens, np.int32)
    tokens: list[Tokens] = []
    identity: list[npt.NDArray[np.int64]] = []
    used, new_pages = shared_tokens // page_size, 0
    while new_pages < passes * capacity_pages:
        whole = [
            np.concatenate([shared, rng.integers(0, VOCABULARY, turns * turn_tokens, np.int32)]) for _ in range(users)
        ]
        own = len(whole[0]) // page_size - shared_tokens // page_size
        firsts = [used + user * own for user in range(users)]
        used += users * own
        new_pages += users * own
        for turn in range(1, turns + 1):
            length = shared_tokens + turn * turn_tokens
            for user in range(users):
                tokens.append(whole[user][:length])
                tail = length // page_size - shared_tokens // page_size
                identity.append(np.concatenate([np.arange(shared_tokens // page_size), firsts[user] + np.arange(tail)]))
            for _ in range(documents):
                pages = int(rng.integers(32, 257))
                tokens.append(rng.integers(0, VOCABULARY, pages * page_size, np.int32))
                identity.append(used + np.arange(pages))
                used += pages
                new_pages += pages
    return Workload(
        name="churn",
        seed=seed,
        tokens=tokens,
        page_identity=identity,
        page_size=page_size,
        capacity_pages=capacity_pages,
        notes=f"capacity {capacity_pages * page_size:,} tokens, {passes}x passes through",
    )


def build(name: str, quick: bool = False) -> Workload:
    """A workload by name: trace, growing or churn; ``quick`` makes it about 10 times smaller.

    Raises: WorkloadAbsent, KeyError.
    """
    full: dict[str, Callable[[], Workload]] = {"trace": trace, "growing": growing, "churn": churn}
    small: dict[str, Callable[[], Workload]] = {
        "trace": lambda: trace(200),
        "growing": lambda: growing(num_users=100),
        "churn": lambda: churn(capacity_pages=4_096),
    }
    return (small if quick else full)[name]()


NAMES = ("trace", "growing", "churn")


def main() -> None:
    """Print what each workload holds."""
    for name in NAMES:
        try:
            workload = build(name)
        except WorkloadAbsent as absent:
            print(f"{name}: SKIPPED, {absent}")
            continue
        place = layout(workload)
        hit = int(place.hit_pages.sum()) * workload.page_size
        total = sum(map(len, workload.tokens))
        print(
            f"{name}: {len(workload.tokens):,} requests, {total:,} tokens, hit {hit:,} ({hit / total:.2%}) unbounded, "
            f"{place.num_pages * workload.page_size:,} cached, {len(place.segment_start):,} segments; {workload.notes}"
        )


if __name__ == "__main__":
    main()
