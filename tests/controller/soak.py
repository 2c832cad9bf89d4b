"""Drives the whole stack at random and checks every byte: python -m tests.controller.soak --steps N --seed S

Requests go through their life a step at a time, interleaved with copies and storage calls that end when chance says,
fail, or are cancelled; with allocations that fail, evictions, resets, detached storage and restarts. What is served
must be the bytes that belong to the tokens. Deterministic: the seed and the number of steps name a run.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from radixkv import RadixTree
from radixkv.controller import Load, LocalGroup
from radixkv.errors import LoadError, LockError, StorageError, TransferError
from radixkv.key import encode_namespace
from radixkv.storage import MemoryStorage, Storage
from radixkv.tree.page_hash import sha256_page_hash
from radixkv.tree.reference import ReferenceTree
from radixkv.types import PageIds

from .kit import GEOMETRY, ROOT, P, Stack, content_of

LAST_LAYER = GEOMETRY.num_layers - 1
POLICIES = ("write_through", "write_through_selective", "write_back")


class Driver:
    """Random steps, each drawn by its weight from ``ACTIONS``."""

    ACTIONS: tuple[tuple[Any, float], ...]
    settings: Mapping[str, Any]
    place = 0
    """Of runs with the same seed, side by side."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = np.random.default_rng([seed, self.place] if self.place else seed)
        random.seed(seed)  # how long a breaker stays open
        self.trouble, self.at = 0.0, 0
        self.done: Counter[str] = Counter()

    def chance(self, share: float) -> bool:
        return bool(self.random.random() < share)

    def act(self, action: Any) -> None:
        """One step."""
        action(self)

    def run(self, steps: int) -> None:
        """That many random steps, then an orderly end."""
        self.steps(steps)
        with self.told():
            self.end()

    def steps(self, steps: int) -> None:
        """That many random steps."""
        weights = np.array([weight for _, weight in self.ACTIONS])
        with self.told():
            for action in self.random.choice(len(self.ACTIONS), steps, p=weights / weights.sum()):
                self.act(self.ACTIONS[action][0])
                self.at += 1

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """What is raised says where."""
        try:
            yield
        except BaseException as error:
            error.add_note(f"seed {self.seed}.{self.place}, at step {self.at}; settings {self.settings}")
            raise

    def end(self) -> None:
        """Come to rest, and let go of everything."""
        raise NotImplementedError


class Unreliable(Storage):
    """Another storage, that fails, loses and damages as ``chance`` says; see the base class."""

    name = "unreliable"

    def __init__(self, inner: Storage, random: np.random.Generator) -> None:
        self.inner, self.random = inner, random
        self.chance = 0.0

    def _fails(self) -> bool:
        return bool(self.random.random() < self.chance)

    def put_many(self, keys: Any, parts: Any, *, timeout_s: float | None = None) -> Any:
        return self.put_each(keys, parts, timeout_s=timeout_s)

    def put_each(self, keys: Any, parts: Any, prepare: Any = None, *, after: Any = None, timeout_s: Any = None) -> Any:
        if self._fails():
            raise StorageError("no connection")
        flags = self.inner.put_each(keys, parts, prepare, after=after, timeout_s=timeout_s)
        if self._fails():
            flags[self.random.integers(len(flags))] = False
        return flags

    def touch_many(self, keys: Any, *, timeout_s: float | None = None) -> Any:
        if self._fails():
            raise StorageError("no connection")
        return self.inner.touch_many(keys, timeout_s=timeout_s)

    def get_many(self, keys: Any, parts: Any, *, timeout_s: float | None = None) -> Any:
        return self.get_each(keys, parts, lambda positions: None, timeout_s=timeout_s)

    def get_each(self, keys: Any, parts: Any, arrived: Any, *, timeout_s: float | None = None) -> Any:
        if self._fails():
            raise RuntimeError("a defect of the backend")
        flip = int(self.random.integers(len(parts))) if self._fails() else None

        def damaged(positions: Any) -> None:
            if flip in positions:
                np.frombuffer(parts[flip][-1], np.uint8)[-1:] ^= 1
            arrived(positions)

        sizes = self.inner.get_each(keys, parts, damaged, timeout_s=timeout_s)
        if self._fails():
            sizes[self.random.integers(len(sizes))] = -1
        return sizes

    def exists_many(self, keys: Any, *, timeout_s: float | None = None) -> Any:
        if self._fails():
            raise StorageError("no connection")
        return self.inner.exists_many(keys, timeout_s=timeout_s)

    def delete_many(self, keys: Any, *, timeout_s: float | None = None) -> None:
        self.inner.delete_many(keys, timeout_s=timeout_s)

    def clear(self, *, timeout_s: float | None = None) -> None:
        self.inner.clear(timeout_s=timeout_s)

    def lost(self) -> int:
        return self.inner.lost()

    def close(self) -> None:
        self.inner.close()


def digest_of(tree: Any) -> int:
    """Of everything that ranks must have alike."""
    lines = [
        (info.namespace, info.tokens.tolist(), info.page_ids is not None and info.page_ids.tolist(),
         info.host_page_ids is not None and info.host_page_ids.tolist(), info.hit_count, info.marks, info.lock_ref,
         info.host_ref, info.loading)
        for info in tree.dump()
    ]  # fmt: skip
    return int.from_bytes(hashlib.blake2b(repr(lines).encode(), digest_size=6).digest(), "big")


@dataclass
class Request:
    """One request on its way; ``step`` names what comes next."""

    req_id: str
    tokens: np.ndarray[Any, Any]
    salt: str | None
    step: str = "prefetch"
    node: int = ROOT
    held_tokens: int = 0
    batch: int = -1
    load: Load | None = None
    pages: list[PageIds] = field(default_factory=list)


class Soak(Driver):
    """One run, on one rank.

    What the engine does is drawn alike on all ranks (``random``); when copies and storage calls end, how, and what the
    clock says, is each rank's own (``local``).

    Args: seed: names it; tree: "core" or "reference"; storage: None: in memory; group: None: one rank; shared: MLA: all
        ranks have the same bytes, and one storage.
    """

    def __init__(
        self, seed: int, tree: str = "core", storage: Storage | None = None, group: Any = None, shared: bool = False
    ) -> None:
        super().__init__(seed)
        self.group, self.shared = group or LocalGroup(), shared
        self.local = np.random.default_rng([seed, self.group.rank])
        self.rank_salt = b"" if shared else bytes([self.group.rank])
        self.tree_name = tree
        self.storage = Unreliable(storage or MemoryStorage(), np.random.default_rng([seed, self.group.rank, 1]))
        self.now_s = 0.0
        self.copy_speed = self.storage_speed = 1.0
        self.model = "test"
        self.served_pages = 0
        self.segments = [self.random.integers(0, 50, int(n) * P) for n in self.random.integers(1, 4, 6)]
        self.requests: list[Request] = []
        self.number = 0
        self.settings = {
            "write_policy": str(self.random.choice(POLICIES)),
            "prefetch_policy": str(self.random.choice(["best_effort", "wait_complete", "timeout", "timeout"])),
            "load_policy": str(self.random.choice(["all", "longest_prefix", "cost"])),
            "store_after_backup": bool(self.random.integers(4)),
            "adaptive_thresholds": bool(self.random.integers(2)),
            "write_through_threshold_storage": int(self.random.integers(1, 3)),
            "max_writes": int(self.random.integers(2, 8)), "max_stores": int(self.random.integers(3, 12)),
            "prefetch_capacity_floor": 0.5, "settle_timeout_s": 0.0, "copy_timeout_s": 1e-6, "share_storage": shared,
            "write_timeout_s": 0.5, "prefetch_deadline_s": 2.0, "prefetch_abandon_s": 5.0,
            "recheck_stored_s": 1.0,
        }  # fmt: skip
        self.device_pages = int(self.random.integers(16, 40))
        self.host_pages = int(self.random.integers(8, 60))
        self.start()

    def start(self) -> None:
        """A process starts: everything but storage is new."""
        page_hash = sha256_page_hash() if self.random.integers(2) else None  # None: paths are hashed by the controller
        tree = RadixTree(P, page_hash=page_hash) if self.tree_name == "core" else ReferenceTree(P)
        self.stack = Stack(
            self.device_pages, self.host_pages, tree=tree, storage=self.storage, clock=lambda: self.now_s,
            group=self.group, model=self.model, **self.settings,
        )  # fmt: skip
        self.stack.mover.fail = self.copy_error
        self.controller = self.stack.controller
        self.requests = []

    def copy_error(self, kind: str) -> BaseException | None:
        return TransferError("the copy failed") if self.local.random() < self.trouble else None

    # ---- requests ----------------------------------------------------------------------------------------------------
    def new_request(self) -> None:
        if len(self.requests) >= 5:
            return
        parts = self.random.integers(0, len(self.segments), int(self.random.integers(1, 5)))
        tokens = np.concatenate([self.segments[part] for part in parts]).astype(np.int32)
        self.number += 1
        self.requests.append(Request(f"r{self.number}", tokens, "salt" if self.chance(0.2) else None))

    def step_request(self) -> None:
        if self.requests:
            request = self.requests[int(self.random.integers(len(self.requests)))]
            if self.chance(0.01):
                self.abort(request)
            else:
                getattr(self, f"do_{request.step}")(request)

    def content(self, request: Request, pages: int | None = None) -> np.ndarray[Any, Any]:
        salt = self.rank_salt + self.model.encode() + encode_namespace(None, request.salt)
        return content_of(request.tokens, pages, salt)

    def verify(self, request: Request, pages: PageIds) -> None:
        """These are the first pages of the prompt: every byte."""
        assert np.array_equal(self.stack.device.data[pages], self.content(request, len(pages))), (
            f"wrong bytes are served to {request}"
        )
        self.served_pages += len(pages)

    def do_prefetch(self, request: Request) -> None:
        match = self.controller.match(request.tokens, cache_salt=request.salt)
        known = match.num_tokens + match.host_num_tokens
        begun = self.controller.prefetch(
            request.req_id, request.tokens[known:], match.host_node, cache_salt=request.salt
        )
        request.step = "wait_prefetch" if begun else "match"

    def do_wait_prefetch(self, request: Request) -> None:
        if self.chance(0.02):
            self.controller.cancel_prefetch(request.req_id)
            request.step = "match"
        elif self.chance(0.25) and self.controller.finish_prefetch(request.req_id):
            request.step = "match"

    def do_match(self, request: Request) -> None:
        match = self.controller.match(request.tokens, cache_salt=request.salt)
        quota = int(self.random.integers(0, 60)) if self.chance(0.3) else None
        load = self.controller.load(match.host_node, quota) if match.host_num_tokens else None
        request.node = load.node if load is not None else match.device_node
        request.held_tokens = match.num_tokens + (load.num_tokens if load is not None else 0)
        self.controller.attribute(request.req_id, len(request.tokens), match, load.num_tokens if load else 0)
        self.controller.lock(request.node)
        request.load = load
        if load is None and not match.loading_tokens:
            self.verify(request, match.page_ids())
            request.step = "compute"
        else:
            request.step = "start"

    def do_start(self, request: Request) -> None:
        if request.load is not None and self.chance(0.1):
            self.controller.unlock(request.node)
            with contextlib.suppress(LockError):  # somebody has matched it
                self.controller.cancel_load(request.load)
            self.requests.remove(request)
            return
        self.controller.start_loads()
        request.batch = self.controller.layer_counter.latest
        request.step = "wait_load"

    def do_wait_load(self, request: Request) -> None:
        if self.group.size > 1:  # the engine's forward pass waits, on all ranks
            self.stack.mover.run()
        try:
            there = 1 + self.controller.layer_counter.wait(LAST_LAYER, 0.0, request.batch)
        except LoadError:
            there = 0
        there = self.group.min([there])[0]  # engines agree on what they serve
        if not there:
            self.done["load errors"] += 1
            self.abort(request)
        if there < 2:
            return
        match = self.controller.tree.peek(request.tokens, cache_salt=request.salt)
        self.verify(request, match.page_ids()[: request.held_tokens // P])
        request.step = "compute"

    def do_compute(self, request: Request) -> None:
        """Compute all or a part of what is missing, and insert it."""
        have = request.held_tokens // P
        match = self.controller.tree.peek(request.tokens, cache_salt=request.salt)
        mine = match.page_ids()[:have]
        self.verify(request, mine)
        want = len(request.tokens) // P if self.chance(0.8) else min(have + 1, len(request.tokens) // P)
        fresh = self.controller.alloc_pages(want - have)
        if fresh is None:
            self.done["no room"] += 1
            self.abort(request)
            return
        self.stack.device.data[fresh] = self.content(request, want)[have:]
        result = self.controller.insert(
            request.tokens[: want * P], np.concatenate([mine, fresh]), cache_salt=request.salt
        )
        self.stack.device.free(result.duplicate_page_ids)
        self.controller.unlock(request.node)
        request.node, request.held_tokens = result.node, want * P
        self.controller.lock(request.node)
        request.step = "start_again" if match.loading_tokens else "finish"

    def do_start_again(self, request: Request) -> None:
        """What was inserted meets pages that another request is loading."""
        request.load = None
        self.do_start(request)

    def do_finish(self, request: Request) -> None:
        match = self.controller.tree.peek(request.tokens, cache_salt=request.salt)
        if not match.loading_tokens:
            self.verify(request, match.page_ids()[: request.held_tokens // P])
        self.abort(request)

    def abort(self, request: Request) -> None:
        """It ends, wherever it is."""
        self.done[request.step] += 1
        self.controller.cancel_prefetch(request.req_id)
        if request.step not in ("prefetch", "wait_prefetch", "match"):
            self.controller.unlock(request.node)
        self.requests.remove(request)

    # ---- everything else ---------------------------------------------------------------------------------------------
    def evict(self) -> None:
        self.controller.evict(int(self.random.integers(1, 12)) * P)

    def evict_host(self) -> None:
        self.controller.evict_host(int(self.random.integers(1, 12)) * P)

    def copy(self) -> None:
        for _ in range(self.pace(self.copy_speed)):
            self.stack.mover.step()

    def call_storage(self) -> None:
        assert self.stack.edge is not None
        for _ in range(self.pace(self.storage_speed)):
            kinds = sorted({job.kind for job, _ in self.stack.edge.waiting})
            if kinds:
                self.stack.edge.step(kinds[int(self.local.integers(len(kinds)))])

    def poll(self) -> None:
        self.now_s += 0.2 * self.local.random()
        self.controller.poll()

    def change_trouble(self) -> None:
        self.trouble = float(self.random.choice([0.0, 0.0, 0.0, 0.05, 0.3]))
        self.storage.chance = self.trouble / 2

    def refuse(self) -> None:
        self.stack.device.refuse = int(self.random.integers(0, 3))

    def some_node(self) -> None:
        """A facade asks for a node to be copied."""
        nodes = list(self.controller.tree)
        if nodes:
            node = nodes[int(self.random.integers(len(nodes)))]
            getattr(self.controller, str(self.random.choice(["backup", "store", "hit"])))(node)

    def pace(self, speed: float) -> int:
        """How much happens at a time: one thing; nothing for long where it is slow; any number on one of many ranks."""
        if self.local.random() >= speed:
            return 0
        return int(self.local.integers(3)) if self.group.size > 1 else 1

    def machine(self) -> None:
        """The machine is idle, or busy, or slow; a call to storage takes no time, or some."""
        mover = self.stack.mover
        mover.run()
        mover.instant, mover.begins = [(True, False), (False, False), (False, True)][int(self.local.integers(3))]
        self.stack.edge.begins = bool(self.local.integers(2))
        self.copy_speed, self.storage_speed = self.local.choice([1.0, 1.0, 1.0, 0.05], 2).tolist()

    def reset(self) -> None:
        for request in list(self.requests):
            self.abort(request)
        self.controller.reset()
        self.check()

    def reattach(self) -> None:
        edge = self.controller.detach_storage()
        assert edge is self.stack.edge
        edge.closed = False
        self.check()
        self.controller.attach_storage(edge)

    def restart(self) -> None:
        self.finish()
        self.stack.close()
        self.start()

    def check(self) -> None:
        self.stack.check()
        if self.group.size > 1:
            tree = digest_of(self.controller.tree)
            low, high = self.group.min([tree, -tree])
            assert low == -high == tree, f"rank {self.group.rank} has another tree"

    ACTIONS = (
        (new_request, 10), (step_request, 60), (copy, 16), (call_storage, 36), (poll, 12), (evict, 1.5),
        (evict_host, 0.5), (some_node, 2), (refuse, 0.5), (change_trouble, 0.5), (machine, 0.5), (reset, 0.1),
        (reattach, 0.1), (restart, 0.05), (check, 3),
    )  # fmt: skip
    def end(self) -> None:
        self.finish()
        self.stack.close()

    def finish(self) -> None:
        """All requests end; then everything must come to rest, and every page back."""
        for request in list(self.requests):
            self.abort(request)
        self.trouble = self.storage.chance = 0.0
        self.stack.device.refuse = 0
        controller = self.controller
        controller.start_loads()
        self.rest()
        self.check()
        stats = controller.stats()
        moving = {name: value for name, value in stats._asdict().items() if "in_flight" in name or "stuck" in name}
        assert not any(moving.values()), f"does not come to rest: {moving}"
        self.stack.mover.instant = True  # which means nothing to a real one
        total = controller.tree.stats()
        assert total.protected_tokens == 0, f"{total.protected_tokens} tokens are still locked"
        while controller.evict(1000 * P):
            self.rest()  # what was written back may go on to storage
        while controller.evict_host(1000 * P):
            pass
        self.check()
        assert len(controller.tree) == 0, controller.tree.dump()
        assert self.stack.device.available == self.stack.device.capacity
        assert self.stack.host.available_size() == self.stack.host.size
        self.stack.mover.instant = False

    def rest(self) -> None:
        """Let everything end."""
        for _ in range(20):
            self.stack.mover.run()
            self.stack.edge.run()
            self.now_s += 100.0
            self.controller.poll()


class ThreadedSoak(Soak):
    """The same with the threads of earnest: copies and storage calls end when they do. A seed does not name a run.

    Args: gpu: a GpuStacks: the device pool is on a GPU, the host pool page-locked, and copies go over two streams.
    """

    def __init__(self, seed: int, gpu: Any = None) -> None:
        self.gpu = gpu
        super().__init__(seed)

    def start(self) -> None:
        if self.gpu is not None:
            self.gpu.free()  # what the process before had
        tree = RadixTree(P, page_hash=sha256_page_hash())
        settings = self.settings | {"copy_timeout_s": 30.0, "settle_timeout_s": 30.0}
        self.stack = Stack(
            self.device_pages, self.host_pages, tree=tree, threads=True, storage=self.storage,
            clock=lambda: self.now_s, gpu=self.gpu, model=self.model, **settings,
        )  # fmt: skip
        self.controller = self.stack.controller
        self.requests = []

    def copy(self) -> None:
        time.sleep(0)  # let threads run

    call_storage = machine = copy

    def reattach(self) -> None:
        store = self.controller.detach_storage()
        assert store is self.stack.pages
        self.check()
        self.controller.attach_storage(store)

    def rest(self) -> None:
        end_s = time.monotonic() + 60
        while time.monotonic() < end_s:
            self.now_s += 100.0
            self.controller.poll()
            stats = self.controller.stats()
            if not any(value for name, value in stats._asdict().items() if "in_flight" in name or "stuck" in name):
                return
            time.sleep(0)

    ACTIONS = (
        *((action, weight) for action, weight in Soak.ACTIONS if action.__name__ not in
          ("copy", "call_storage", "machine", "reattach")),
        (copy, 40), (reattach, 0.1),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000, help="in all")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first run")
    parser.add_argument("--steps-each", type=int, default=5_000, help="of a run, before the next seed")
    parser.add_argument("--tree", choices=["core", "reference"], default="core")
    parser.add_argument("--files", action="store_true", help="storage in a folder, which outlives the processes on it")
    parser.add_argument("--cuda", choices=["kernel", "engine", "auto"], help="on GPU 0, copied by this path")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--threads", action="store_true", help="with the real threads; a seed does not name a run then")
    options = parser.parse_args()
    gpu = None
    if options.cuda:
        from .gpu_kit import GpuStacks

        gpu = GpuStacks(None if options.cuda == "auto" else options.cuda)
    began_s, seed, left, served = time.time(), options.seed, options.steps, 0
    while left > 0:
        steps = min(left, options.steps_each)
        try:
            served += run_one(options, gpu, seed, steps)
        except BaseException:
            again = f"python -m tests.controller.soak --seed {seed} --steps {steps} --steps-each {steps}"
            more = f"--cuda {options.cuda}" if gpu else f"--tree {options.tree}"
            more += " --files" * options.files + " --threads" * options.threads
            print(f"seed {seed} fails; again: {again} {more}", file=sys.stderr)
            raise
        seed, left = seed + 1, left - steps
        if gpu is not None:
            gpu.free()
    seconds = time.time() - began_s
    if options.json:
        figures = {"steps": options.steps, "seeds": [options.seed, seed - 1], "served_pages": served,
                   "seconds": seconds,
                   "copies": None if gpu is None else gpu.copies}  # fmt: skip
        options.json.write_text(json.dumps(figures))
    print(f"{options.steps} steps, seeds {options.seed} .. {seed - 1}: {served} pages verified, {seconds:.1f} s")


def run_one(options: Any, gpu: Any, seed: int, steps: int) -> int:
    """One seed. Returns: pages served."""
    threads = options.threads or gpu is not None
    if not options.files:
        soak = ThreadedSoak(seed, gpu) if threads else Soak(seed, options.tree)
        soak.run(steps)
        return soak.served_pages
    from .soak_files import ThreadedFileSoak, soak_on_files

    with tempfile.TemporaryDirectory(prefix="radixkv-soak-", ignore_cleanup_errors=True) as folder:
        if not threads:
            return soak_on_files(seed, steps, Path(folder), options.tree)["served"]
        soak = ThreadedFileSoak(seed, Path(folder), gpu)
        soak.run(steps)
        return soak.served_pages


if __name__ == "__main__":
    main()
