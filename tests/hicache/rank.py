"""One rank of the facade's tests with torch.distributed: python -m tests.hicache.rank JSON. Prints one line of JSON.

Scenarios, each with a group and a cache of its own. "serve": random chats through the small engine, the same on all
ranks, while copies and storage calls end when they please on each rank, and fail; every rank compares its tree with the
others'. "hang", "exit": in the middle of that the last rank stops taking part (until the others have noticed), or dies.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from radixkv.controller import TorchGroup
from radixkv.errors import GroupError, LoadError, TransferError
from radixkv.storage.file import FileStorage
from tests.controller.soak import Unreliable, digest_of

from .kit import CONFIG, hiradix_cache
from .scheduler import Engine, Req
from .test_scheduler import chat

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
    """Another mover, whose copies fail (``chance``), or end late, by this rank's own dice."""

    def __init__(self, mover: Any, random: np.random.Generator) -> None:
        self._mover, self._random = mover, random
        self.chance, self.failed = 0.0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mover, name)

    def _put(self, begin: Any, *arguments: Any) -> LateTicket:
        if self._random.random() < self.chance:
            self.failed += 1
            raise TransferError("a broken link")
        return LateTicket(begin(*arguments), int(self._random.integers(4)))

    def backup(self, *arguments: Any) -> LateTicket:
        return self._put(self._mover.backup, *arguments)

    def load(self, *arguments: Any) -> LateTicket:
        return self._put(self._mover.load, *arguments)


class SlowStorage(Unreliable):
    """Unreliable, and slow at times."""

    def _fails(self) -> bool:
        time.sleep(0.002 * self.random.random() ** 4)
        return super()._fails()


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
        rank = self.group.rank
        folder = FileStorage(Path(job["folder"]) / f"kv{seed}")
        self.storage = SlowStorage(folder, np.random.default_rng([seed, rank, 1]))
        policies = ("write_through", "write_through_selective", "write_back")
        self.cache = hiradix_cache(
            160, PAGE, "mla" if seed % 2 else "mha", policy=policies[seed % 3], host=2.0, storage=self.storage,
            prefetch=("best_effort", "wait_complete", "timeout")[seed % 3], group=dist.new_group(),
            config=replace(CONFIG, group_timeout_s=timeout_s), load_back_threshold=1, prefetch_threshold=PAGE,
            write_through_threshold_storage=1, store_after_backup=True, prefetch_timeout_base_s=0.05,
            backoff_base_s=0.01, storage_timeout_s=1.0,
        )  # fmt: skip
        context = self.cache.cache_controller.core._context
        context._mover = self.mover = FlakyMover(context.mover, np.random.default_rng([seed, rank]))
        self.engine = RankEngine(self.cache, chunk=5 * PAGE)
        self.engine.group = self.group
        self.mover.chance = self.storage.chance = 0.05
        self.compared = 0

    def compare(self) -> None:
        """All ranks have the same tree."""
        tree = digest_of(self.cache.tree)
        low, high = self.group.min([tree, -tree])
        assert low == -high == tree, f"rank {self.group.rank} has another tree"
        self.compared += 1

    def close(self) -> None:
        self.cache.close()
        self.storage.close()


def serve(job: dict[str, Any]) -> dict[str, Any]:
    total = {"compared": 0, "lost": 0, "failed": 0, "host": 0, "stores": 0, "prefetched": 0}
    for seed in job["seeds"]:
        rank = Rank(job, seed, 60.0)
        chat(rank.engine, seed, job["requests"], 2 * PAGE, rank.compare)
        rank.mover.chance = rank.storage.chance = 0.0
        rank.group.min([0])
        for _ in range(2000):  # as often on all ranks
            rank.cache.check_hicache_events()
            stats = rank.cache.cache_controller.core.stats()
            if not (stats.writes_in_flight or stats.loads_in_flight or stats.stores_in_flight or stats.stuck_pages):
                break
            time.sleep(0.0005)
        else:
            raise AssertionError(f"does not come to rest: {stats}")
        rank.cache.check_integrity()
        rank.compare()
        more = {
            "compared": rank.compared, "lost": rank.engine.lost, "failed": rank.mover.failed,
            "host": rank.engine.tokens["host"], "stores": stats.stores, "prefetched": stats.prefetch_tokens,
        }  # fmt: skip
        total = {name: value + more[name] for name, value in total.items()}
        rank.group.min([0])
        rank.close()
    return total


def lose_a_rank(scenario: str, job: dict[str, Any]) -> dict[str, Any]:
    """The last rank goes in the middle of its work. The others are told within the deadline, and can still close."""
    rank = Rank(job, 1, DEADLINE_S)
    folder, last = Path(job["folder"]), rank.group.rank == rank.group.size - 1
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        if last and steps == 20:
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
        chat(rank.engine, 1, 10_000, 2 * PAGE, timed)
    except GroupError as error:
        if last:
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
