"""One rank of the facade's tests with torch.distributed: python -m tests.hicache.rank JSON. Prints one line of JSON.

Scenarios, each with groups and a cache of its own. "serve": random chats through the small engine, the same on all
ranks, while copies and storage calls end when they please on each rank, and fail; every rank compares its tree with the
others' after every step. A seed names a write policy, a prefetch policy, MHA or MLA, and which rank has which trouble:
one has a storage that fails, one is slow, one has no memory for what is asked of it. "hang", "exit": in the middle of
that the last rank stops taking part (until the others have noticed), or dies. "starve": there an allocation on the
device fails that succeeds elsewhere.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from radixkv.controller import TorchGroup
from radixkv.controller.context import Where
from radixkv.errors import GroupError, LoadError, TransferError
from radixkv.storage.file import FileStorage
from tests.controller.soak import Unreliable, digest_of

from .kit import CONFIG, hiradix_cache
from .scheduler import Bytes, Engine, Req
from .test_scheduler import POLICIES, chat

PREFETCH_POLICIES = ("best_effort", "wait_complete", "timeout")
DEADLINE_S = 1.5
PAGE = 4


class LateTicket:
    """A copy of which this rank hears only after it has asked some times more."""

    def __init__(self, ticket: Any, asks: int) -> None:
        self._ticket, self._asks = ticket, asks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ticket, name)

    def done(self) -> bool:
        self._asks -= 1
        return self._asks < 0 and self._ticket.done()

    def wait(self, timeout_s: float | None = None) -> bool:
        self._asks = 0
        return bool(self._ticket.wait(timeout_s))


class FlakyMover:
    """Another mover, whose copies fail (``chance``), end late (``asks``), or cannot be asked for, as there is no memory
    (``starved``), by this rank's own dice."""

    def __init__(self, mover: Any, random: np.random.Generator) -> None:
        self._mover, self._random = mover, random
        self.chance = self.starved = 0.0
        self.asks, self.failed = 4, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mover, name)

    def _put(self, begin: Any, *arguments: Any) -> LateTicket:
        for chance, error in ((self.chance, TransferError("a broken link")), (self.starved, MemoryError("no memory"))):
            if self._random.random() < chance:
                self.failed += 1
                raise error
        return LateTicket(begin(*arguments), int(self._random.integers(self.asks)))

    def backup(self, *arguments: Any) -> LateTicket:
        return self._put(self._mover.backup, *arguments)

    def load(self, *arguments: Any) -> LateTicket:
        return self._put(self._mover.load, *arguments)


class StarvedEdge:
    """Another StorageEdge, that has no memory for a job at times."""

    def __init__(self, edge: Any, random: np.random.Generator) -> None:
        self._edge, self._random, self.chance = edge, random, 0.0

    def __getattr__(self, name: str) -> Any:
        if name in ("look_up", "fetch", "store") and self._random.random() < self.chance:
            raise MemoryError(f"no memory for {name}")
        return getattr(self._edge, name)


class SlowStorage(Unreliable):
    """Unreliable, and slow at times."""

    slow_s = 0.002

    def _fails(self) -> bool:
        time.sleep(self.slow_s * self.random.random() ** 4)
        return super()._fails()


class RecordedGroup:
    """Another group, of which it is recorded what was agreed on: where, after how many operations, how many values."""

    def __init__(self, group: TorchGroup) -> None:
        self._group, self.rank, self.size = group, group.rank, group.size
        self.places: Counter[str] = Counter()
        self.hash = hashlib.blake2b(digest_size=6)
        self.latest: list[tuple[int, int]] = []

    def min(self, values: Sequence[int]) -> list[int]:
        self.places[Where(values[0] % 16).name] += 1
        self.latest = [*self.latest[-9:], (values[0], len(values))]
        self.hash.update(repr(self.latest[-1]).encode())
        return self._group.min(values)


class RankBytes(Bytes):
    """KV of this rank's heads: that of no other rank."""

    def __init__(self, pool: Any, rank: int) -> None:
        super().__init__(pool)
        self._shift = 1_000_003 * rank

    def write(self, tokens: Sequence[int], first: int, slots: Any) -> None:
        super().write([token + self._shift for token in tokens], first, slots)

    def check(self, tokens: Sequence[int], slots: Any, layers: Sequence[int] | None = None) -> None:
        super().check([token + self._shift for token in tokens], slots, layers)


class RankEngine(Engine):
    """The engine of one rank. What it serves is agreed: if a load failed anywhere, all ranks give the batch up, and its
    requests start again."""

    group: TorchGroup
    lost = 0

    def prefill(self, batch: list[Req]) -> None:
        try:
            super().prefill(batch)
        except LoadError:
            self.lost += 1
            for req in batch:
                self.give_up(req)

    def decode(self) -> None:
        """Who runs may have gone over to pages that another request was loading."""
        try:
            super().decode()
        except LoadError:
            self.lost += 1
            given_up, self.running = self.running, []
            for req in given_up:
                self.give_up(req)

    def make_room(self, num_tokens: int) -> bool:
        """What counts as evictable can be evicted, whatever is in flight."""
        missing = num_tokens - self.allocator.available_size()
        promised = self.cache.evictable_size()
        there = super().make_room(num_tokens)
        assert there or missing > promised, f"{num_tokens} tokens asked for, {missing} missing, {promised} evictable"
        return there

    def forward(self, batch: list[tuple[Req, int]]) -> None:
        there = True
        try:
            super().forward(batch)
        except LoadError:
            there = False
        if not self.group.min([int(there)])[0]:
            raise LoadError("on some rank")

    def give_up(self, req: Req) -> None:
        if self.chunked is req:
            self.chunked = None
        cached = len(req.prefix_indices) // self.page_size * self.page_size  # a chunk may end inside a page of its own
        self.allocator.free(self.row(req)[cached : len(req.fill_ids)])
        self.rows.free(req.req_pool_idx)
        self.cache.dec_lock_ref(req.last_node)
        req.req_pool_idx, req.prefix_indices, req.last_node, req.last_host_node = None, (), None, None
        self.submit(req)


class Rank:
    """One rank's cache, engine and dice."""

    def __init__(self, job: dict[str, Any], seed: int, timeout_s: float) -> None:
        self.group = TorchGroup(dist.new_group(), timeout_s)
        rank, size = self.group.rank, self.group.size
        kind = "mla" if seed % 2 else "mha"  # of MLA all ranks have the same bytes, and rank 0 stores for all
        folder = Path(job["folder"]) / (f"kv{seed}" if kind == "mla" else f"kv{seed}-{rank}")
        self.storage = SlowStorage(FileStorage(folder), np.random.default_rng([seed, rank, 1]))
        self.cache = hiradix_cache(
            160, PAGE, kind, policy=POLICIES[seed % 3], host=2.0, storage=self.storage,
            prefetch=PREFETCH_POLICIES[seed // 3 % 3], group=dist.new_group(),
            config=replace(CONFIG, group_timeout_s=timeout_s), load_back_threshold=1, prefetch_threshold=PAGE,
            write_through_threshold_storage=1, store_after_backup=True, prefetch_timeout_base_s=0.05,
            backoff_base_s=0.01, storage_timeout_s=1.0, load_attempts=2,
        )  # fmt: skip
        core = self.cache.cache_controller.core
        context = core._context
        context.group = self.agreed = RecordedGroup(context.group)
        context._mover = self.mover = FlakyMover(context.mover, np.random.default_rng([seed, rank]))
        self.edge = StarvedEdge(core._stores.edge, np.random.default_rng([seed, rank, 2]))
        core._stores.edge = core._prefetches.edge = self.edge
        self.engine = RankEngine(self.cache, chunk=5 * PAGE)
        self.engine.bytes = RankBytes(self.engine.pool, rank if kind == "mha" else 0)
        self.engine.group = self.group
        self.mover.chance = self.storage.chance = 0.05
        if rank == seed % size:
            self.storage.chance = 0.3
        if rank == (seed + 1) % size:
            self.mover.asks, self.storage.slow_s = 25, 0.02
        if rank == (seed + 2) % size:
            self.mover.starved = self.edge.chance = 0.1
        self.compared = 0

    def compare(self) -> None:
        """All ranks have the same tree, and have agreed on the same things at the same places, as often."""
        tree, places = digest_of(self.cache.tree), int.from_bytes(self.agreed.hash.digest(), "big")
        low, high, first, last = self.group.min([tree, -tree, places, -places])
        assert first == -last == places, f"rank {self.group.rank} has agreed on other things: {self.agreed.latest}"
        assert low == -high == tree, f"rank {self.group.rank} has another tree"
        self.compared += 1

    def close(self) -> None:
        self.cache.close()
        self.storage.close()


def come_to_rest(rank: Rank) -> Any:
    """Nothing is in flight, and everything adds up. Returns: the controller's figures."""
    core = rank.cache.cache_controller.core
    for _ in range(4000):  # as often on all ranks
        rank.cache.check_hicache_events()
        stats = core.stats()
        if not (stats.writes_in_flight or stats.loads_in_flight or stats.stores_in_flight or stats.stuck_pages):
            rank.cache.check_integrity()
            rank.compare()
            return stats
        time.sleep(0.0005)
    raise AssertionError(f"does not come to rest: {stats}")


def serve(job: dict[str, Any]) -> dict[str, Any]:
    """Twice the same chats, with a reset in between: the second time storage has them."""
    total: Counter[str] = Counter()
    for seed in job["seeds"]:
        rank = Rank(job, seed, 60.0)
        for _ in range(2):
            chat(rank.engine, seed, job["requests"], 2 * PAGE, rank.compare)
            stats = come_to_rest(rank)
            rank.cache.reset()
            rank.cache.token_to_kv_pool_allocator.clear()
            rank.compare()
        total += Counter(rank.agreed.places)
        total += Counter({
            "compared": rank.compared, "lost": rank.engine.lost, "failed": rank.mover.failed,
            "host": rank.engine.tokens["host"], "stores": stats.stores, "prefetched": stats.prefetch_tokens,
            "dropped": stats.dropped_nodes, "broken": stats.broken_loads, "store failures": stats.store_failures,
        })  # fmt: skip
        rank.group.min([0])
        rank.close()
    return dict(total)


def refuse_twice(pages: Any) -> None:
    """A load that asks for device pages gets none, and none after it has evicted."""
    alloc, left = pages.alloc, 2

    def refuse(num_pages: int) -> Any:
        nonlocal left
        left -= 1
        return alloc(num_pages) if left < 0 else None

    pages.alloc = refuse


def lose_a_rank(scenario: str, job: dict[str, Any]) -> dict[str, Any]:
    """The last rank goes in the middle of its work, or parts from the others ("starve"). All that are left are told
    within the deadline, and can still close."""
    seed = job["lost_seed"]
    rank = Rank(job, seed, DEADLINE_S)
    folder, last = Path(job["folder"]), rank.group.rank == rank.group.size - 1
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        if last and steps == 20 and scenario == "starve":
            refuse_twice(rank.cache._pages)
        elif last and steps == 20:
            if scenario == "exit":
                os._exit(0)
            while len(list(folder.glob("noticed*"))) < rank.group.size - 1:
                time.sleep(0.01)
            raise GroupError("gone")

    last_s = time.monotonic()

    def timed() -> None:
        nonlocal last_s
        step()
        last_s = time.monotonic()

    try:
        chat(rank.engine, seed, 10_000, 2 * PAGE, timed)
    except GroupError as error:
        if last and scenario != "starve":
            return {}
        told = {"error": str(error), "seconds": time.monotonic() - last_s}
    began_s = time.monotonic()
    for call in (rank.cache.check_hicache_events, rank.cache.reset):
        try:
            call()
        except GroupError:
            continue
        raise AssertionError("a broken group was used")
    if scenario == "hang":
        (folder / f"noticed{rank.group.rank}").touch()
    rank.cache.cache_controller.close()  # the host pool has pages whose copy nobody can settle any more
    return told | {"after_s": time.monotonic() - began_s}


def main() -> None:
    job = json.loads(sys.argv[1])
    faulthandler.dump_traceback_later(job["deadline_s"], exit=True)  # nothing hangs for longer
    torch.set_num_threads(1)
    store = dist.FileStore(job["store"], job["size"])
    dist.init_process_group(
        "gloo", store=store, rank=job["rank"], world_size=job["size"], timeout=timedelta(seconds=60)
    )
    results = {name: serve(job) if name == "serve" else lose_a_rank(name, job) for name in job["scenarios"]}
    print(json.dumps(results), flush=True)
    os._exit(0)  # gloo may wait for a peer that is gone


if __name__ == "__main__":
    main()
