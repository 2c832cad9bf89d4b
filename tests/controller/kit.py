"""Shared by the tests of the controller: a whole stack in plain memory, with a mover and a storage edge that do what a
test says, when it says so."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from radixkv import RadixTree
from radixkv.controller import Controller, ControllerConfig, CpuMover, Polled
from radixkv.controller.base import Digests
from radixkv.controller.lanes import CopyTicket
from radixkv.controller.workers import Job, let_go, work_on
from radixkv.errors import GroupError
from radixkv.pool.arena import ArenaConfig
from radixkv.pool.host import HostKVCache, HostPoolConfig
from radixkv.pool.layout import KVGeometry, KVView
from radixkv.pool.slots import SlotAllocator
from radixkv.pool.states import MemoryStateInt
from radixkv.storage import MemoryStorage, PageNamespace, PageStore, Storage, host_page_parts
from radixkv.transfer.cpu import CpuTransfer, Progress
from radixkv.transfer.plan import staging_view
from radixkv.tree.page_hash import sha256_page_hash
from radixkv.types import ROOT, PageIds

GEOMETRY = KVGeometry(kind="mha", num_layers=2, num_heads=1, head_bytes=16, page_size=4)
P = GEOMETRY.page_size
POISON = 0xEE
"""Every byte of pages that were just handed out."""
NOTHING_THERE = {MemoryStateInt.IDLE, MemoryStateInt.RESERVED}


def content_of(tokens: Any, num_pages: int | None = None, salt: bytes = b"") -> np.ndarray[Any, Any]:
    """What the pages of a prompt hold: uint8 [pages, page_bytes], each a function of all tokens up to its end."""
    data = np.asarray(tokens, np.int32).tobytes()
    pages = len(tokens) // P if num_pages is None else num_pages
    digest, rows = salt, []
    for page in range(pages):
        digest = hashlib.blake2b(digest + data[4 * P * page : 4 * P * (page + 1)], digest_size=64).digest()
        rows.append(digest * (GEOMETRY.page_bytes // 64))
    return np.frombuffer(b"".join(rows), np.uint8).reshape(pages, GEOMETRY.page_bytes)


class DeviceMemory(SlotAllocator):
    """Device pages and their bytes: ``data`` uint8 [pages, page_bytes]. ``refuse``: allocations that fail, by count."""

    def __init__(self, num_pages: int) -> None:
        super().__init__(num_pages)
        self.data = np.zeros((num_pages, GEOMETRY.page_bytes), np.uint8)
        self.refuse = 0

    def view(self) -> KVView:
        return staging_view(GEOMETRY, self.data.ctypes.data, len(self.data))

    def alloc(self, num_pages: int) -> PageIds | None:
        if self.refuse:
            self.refuse -= 1
            return None
        pages = super().alloc(num_pages)
        if pages is not None:
            self.data[pages] = POISON
        return pages


class PoisonedHost(HostKVCache):
    """Pages that are handed out hold nothing right by accident. page_first."""

    def alloc_pages(self, num_pages: int, for_copy: bool = False) -> PageIds | None:
        pages = super().alloc_pages(num_pages, for_copy)
        if pages is not None:
            self.kv_buffer[:, pages] = POISON
        return pages


def host_cache(num_pages: int) -> HostKVCache:
    """A host pool that does not mind how little memory the machine has."""
    config = HostPoolConfig(headroom_bytes=0, arena=ArenaConfig(huge_pages="none"))
    return PoisonedHost(GEOMETRY, num_pages * P, "page_first", config=config)


class ScriptedTicket(CopyTicket):
    """A copy that may have begun long before it ends. ``check``: that what it writes is still its own."""

    check: Callable[[], None]

    def begin(self) -> None:
        """From now on it cannot be cancelled."""
        self._begun = True

    def run(self) -> None:
        if not self.done():
            self.check()
            self._begun = False
            super().run()


class ScriptedMover:
    """A Mover that copies when told: ``step()`` runs the oldest copy. ``instant``: each at once. ``begins``: a copy
    begins at once, so that it cannot be cancelled, and ends with its step. ``fail``: what a copy of a kind raises."""

    def __init__(self, device: Any, host: HostKVCache) -> None:
        """Args: device: a DeviceMemory, or anything with ``view`` and ``free_ids``."""
        transfer = CpuTransfer(host.geometry, 1)
        self._device, self._host = device, host
        self._to_host = transfer.route(device.view(), host.view())
        self._to_device = transfer.route(host.view(), device.view())
        self.waiting: list[tuple[str, ScriptedTicket]] = []
        self.instant = self.begins = False
        self.ticket: Callable[..., ScriptedTicket] = ScriptedTicket
        self.fail: Callable[[str], BaseException | None] = lambda kind: None

    def backup(self, device_pages: PageIds, host_pages: PageIds) -> CopyTicket:
        def copy() -> None:
            self._raise("backup")
            self._to_host.copy(device_pages, host_pages)

        def check() -> None:
            states = set(self._host.states_of(host_pages).tolist())
            assert states == {MemoryStateInt.PROTECTED}, f"a copy writes host pages in states {states}"

        return self._put("backup", self.ticket(copy), check)

    def flush(self) -> None:
        """Copies begin when the test says."""

    def load(self, host_pages: PageIds, device_pages: PageIds, progress: Any) -> CopyTicket:
        def copy() -> None:
            self._raise("load")
            self._to_device.copy(host_pages, device_pages, progress)

        def check() -> None:
            free = set(device_pages.tolist()) & set(self._device.free_ids().tolist())
            assert not free, f"a copy writes device pages {free}, which are free"

        return self._put("load", self.ticket(copy, progress.fail), check)

    def new_progress(self) -> Progress:
        return Progress(self._host.geometry.num_layers)

    def _raise(self, kind: str) -> None:
        error = self.fail(kind)
        if error is not None:
            raise error

    def _put(self, kind: str, ticket: ScriptedTicket, check: Callable[[], None]) -> ScriptedTicket:
        ticket.check = check
        if self.instant:
            ticket.run()
        else:
            self.waiting.append((kind, ticket))
            if self.begins:
                ticket.begin()
        return ticket

    def step(self, kind: str | None = None) -> bool:
        """Run the oldest copy (of a kind). Returns: whether there was one."""
        for at, (name, ticket) in enumerate(self.waiting):
            if kind in (None, name):
                del self.waiting[at]
                ticket.run()
                return True
        return False

    def run(self) -> None:
        """Run all copies."""
        while self.step():
            pass

    def close(self, timeout_s: float | None = None) -> bool:
        for _, ticket in self.waiting:
            ticket.cancel()
        return True


class ScriptedEdge:
    """A StorageEdge that works when told: ``step()`` makes one call to storage for the oldest job of a kind.
    ``begins``: one step begins the call, which no cancel stops then, and the next one does what it does."""

    def __init__(self, store: PageStore, config: ControllerConfig, host: HostKVCache) -> None:
        self.pages, self._config, self._host = store, config, host
        self.waiting: list[tuple[Job, Iterator[None]]] = []
        self.closed = self.begins = False
        self._in_call: set[Job] = set()

    def look_up(self, digests: Digests, salt: bytes) -> Job:
        return self._put(Job("look_up", digests, None, salt))

    def fetch(self, digests: Digests, host_pages: PageIds, salt: bytes) -> Job:
        return self._put(Job("fetch", digests, host_pages, salt))

    def bring(self, digests: Digests, host_pages: PageIds, salt: bytes, least: int) -> Job:
        return self._put(Job.bring(digests, host_pages, salt, least))

    def store(
        self, digests: Digests, host_pages: PageIds, salt: bytes, again: bool = False, after: bytes = b""
    ) -> Job:  # fmt: skip
        return self._put(Job("store", digests, host_pages, salt, again, after))

    def lost(self) -> int:
        return self.pages.lost()

    def _put(self, job: Job) -> Job:
        assert not self.closed
        self.waiting.append((job, work_on(job, self.pages, self._config)))
        return job

    def step(self, kind: str | None = None) -> bool:
        """One call for the oldest job (of a kind). Returns: whether there was one."""
        for at, (job, work) in enumerate(self.waiting):
            if kind in (None, job.kind):
                if self.begins and job not in self._in_call and not job.cancelled:
                    self._in_call.add(job)
                else:
                    self._call(at, job, work)
                return True
        return False

    def _call(self, at: int, job: Job, work: Iterator[None]) -> None:
        cancelled = job.cancelled
        if job in self._in_call:
            self._in_call.remove(job)
            job.cancelled = False
        if job.host_pages is not None and not job.cancelled:
            end = job.reach if job.kind == "fetch" else len(job.host_pages)
            states = set(self._host.states_of(job.host_pages[job.pages : end]).tolist())
            fine = {MemoryStateInt.RESERVED} if job.kind == "fetch" else set(MemoryStateInt) - NOTHING_THERE
            assert states <= fine, f"storage works on host pages in states {states}: {job.kind}"
        try:
            next(work)
        except StopIteration:
            del self.waiting[at]
            job.end()
        except Exception as error:
            let_go(error)
            del self.waiting[at]
            job.end(error)
        job.cancelled = cancelled

    def run(self) -> None:
        """All calls."""
        while self.step():
            pass

    def close(self, timeout_s: float) -> bool:
        self.closed = True
        for job, _ in self.waiting:
            job.cancelled = True
        self.run()
        return True


class ThreadGroup:
    """Ranks that are threads of one process. ``broken``: this rank raises GroupError, and so do the others."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, slots: list[list[int]]) -> None:
        self.rank, self.size, self._barrier, self._slots = rank, size, barrier, slots
        self.calls = 0

    @classmethod
    def make(cls, size: int, timeout_s: float = 30.0) -> list[ThreadGroup]:
        barrier, slots = threading.Barrier(size, timeout=timeout_s), [[] for _ in range(size)]
        return [cls(rank, size, barrier, slots) for rank in range(size)]

    def min(self, values: Sequence[int]) -> list[int]:
        self.calls += 1
        self._slots[self.rank] = list(values)
        try:
            self._barrier.wait()
            assert len({len(slot) for slot in self._slots}) == 1, f"vectors of {[len(slot) for slot in self._slots]}"
            result = [min(column) for column in zip(*self._slots, strict=True)]
            self._barrier.wait()
        except threading.BrokenBarrierError as error:
            raise GroupError(f"rank {self.rank}: another rank is gone") from error
        return result

    def leave(self) -> None:
        """This rank is gone."""
        self._barrier.abort()


def on_ranks(size: int, run: Callable[[ThreadGroup], Any]) -> list[Any]:
    """Call ``run`` on a thread for each rank. Returns: the results; raises the first error that no other one caused."""
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def rank(group: ThreadGroup) -> None:
        try:
            results[group.rank] = run(group)
        except BaseException as error:
            errors.append(error)
            group.leave()

    threads = [threading.Thread(target=rank, args=(group,)) for group in ThreadGroup.make(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in sorted(errors, key=lambda error: isinstance(error, GroupError)):
        raise error
    return results


def launch(tmp_path: Path, size: int, module: str = "tests.controller.rank", **job: Any) -> list[dict[str, Any]]:
    """Run ``module`` in ``size`` processes. Returns: what the ranks printed; {} for one that printed nothing."""
    job = {"size": size, "store": str(tmp_path / "store"), "folder": str(tmp_path), "timeout_s": 120.0} | job
    root = Path(__file__).parents[2]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(job | {"rank": rank})],
            cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    failed = [errors[-3000:] for rank, (_, errors) in zip(ranks, outputs, strict=True) if rank.returncode]
    assert not failed, min(failed, key=lambda errors: "closed by peer" in errors)
    return [json.loads(out.splitlines()[-1]) if out.strip() else {} for out, _ in outputs]


def page_store(host: HostKVCache, storage: Storage | None = None, model: str = "test", **more: Any) -> PageStore:
    """Pages of a host pool in a storage of its own, or a given one. more: of PageStore."""
    namespace = PageNamespace.of_geometry(host.geometry, host.page_dims, model=model, dtype="uint8")
    return PageStore(storage or MemoryStorage(), namespace, host_page_parts(host), **more)


class Stack:
    """Tree, pools, a mover and a controller; the test is the engine. threads: copies and storage calls run by
    themselves, as they do in earnest. gpu: a GpuStacks, whose memory and mover are taken; with threads."""

    def __init__(
        self, device_pages: int = 32, host_pages: int = 64, *, tree: Any = None, threads: bool = False,
        storage: Any = None, group: Any = None, listener: Any = None, clock: Callable[[], float] | None = None,
        gpu: Any = None, model: str = "test", **config: Any,
    ) -> None:  # fmt: skip
        self.device: Any = DeviceMemory(device_pages) if gpu is None else gpu.device_memory(device_pages)
        self.host = host_cache(host_pages) if gpu is None else gpu.host_cache(host_pages)
        self.tree = tree if tree is not None else RadixTree(P, page_hash=sha256_page_hash())
        threads = threads or gpu is not None
        if gpu is not None:
            self.mover: Any = gpu.mover(self.device, self.host)
        elif threads:
            self.mover = CpuMover(CpuTransfer(GEOMETRY, 1), self.device.view(), self.host.view())
        else:
            self.mover = ScriptedMover(self.device, self.host)
        more = {} if clock is None else {"clock": clock}
        self.config = ControllerConfig(
            **{"write_policy": "write_through", "prefetch_threshold": P, "load_back_threshold": 1,
               "storage_batch_pages": 2} | config
        )  # fmt: skip
        self.edge: Any = None
        self.pages = page_store(self.host, None if storage is True else storage, model, **more) if storage else None
        if self.pages is not None and not threads:
            self.edge = ScriptedEdge(self.pages, self.config, self.host)
        self.controller = Controller(
            self.tree, self.device, self.host, self.mover, storage=self.edge or self.pages, group=group,
            listener=listener, config=self.config, **more,
        )  # fmt: skip

    def compute(self, tokens: Any, **more: Any) -> int:
        """Do what an engine does for a prompt that is not cached: take pages, fill them, insert. Returns the node."""
        tokens = np.asarray(tokens, np.int32)
        pages = self.controller.alloc_pages(len(tokens) // P)
        assert pages is not None, f"no room for {len(tokens)} tokens"
        self.device.data[pages] = content_of(tokens)
        result = self.controller.insert(tokens, pages, **more)
        self.device.free(result.duplicate_page_ids)
        return result.node

    def settle(self, limit: int = 100) -> list[Polled]:
        """Let everything that waits end, and poll until nothing is in flight."""
        polls = []
        for _ in range(limit):
            if isinstance(self.mover, ScriptedMover):
                self.mover.run()
            if self.edge is not None:
                self.edge.run()
            polls.append(self.controller.poll())
            stats = self.controller.stats()
            busy = stats.writes_in_flight or stats.stores_in_flight or stats.stuck_pages
            if not busy and stats.loads_in_flight == stats.queued_loads:
                return polls
        raise AssertionError(f"does not quiesce: {self.controller.stats()}")

    def serve(self, tokens: Any) -> int:
        """Match, and check every byte of what is on the device. Returns: tokens that were."""
        match = self.controller.match(tokens)
        pages = match.page_ids()
        assert np.array_equal(self.device.data[pages], content_of(tokens, len(pages))), "wrong bytes"
        return match.num_tokens

    def check(self, held: PageIds | None = None) -> None:
        """Everything adds up."""
        self.controller.check_integrity(np.zeros(0, np.int32) if held is None else held)

    def close(self) -> None:
        self.controller.close()


def prompt(seed: int, pages: int) -> np.ndarray[Any, Any]:
    """Tokens, of whole pages."""
    return np.random.default_rng(seed).integers(0, 1000, pages * P).astype(np.int32)


__all__ = ["GEOMETRY", "ROOT", "DeviceMemory", "P", "ScriptedEdge", "ScriptedMover", "Stack", "ThreadGroup"]
__all__ += ["content_of", "host_cache", "launch", "on_ranks", "page_store", "prompt"]
