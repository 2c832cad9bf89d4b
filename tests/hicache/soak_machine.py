"""A HiRadixCache on a machine that does as a random run says: one folder, and processes that come and go.

A token's KV is a function of all tokens up to it, of its namespace and the model, in each layer and half. Slots and
host pages that are handed out are filled with something else.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch

from radixkv.controller import ControllerConfig
from radixkv.controller import controller as controller_module
from radixkv.errors import TransferError
from radixkv.hicache import HiRadixCache, MHATokenToKVPool, MLATokenToKVPool, ReqToTokenPool, cache_controller
from radixkv.hicache import hiradix_cache as hiradix_module
from tests.controller.disk import Crash, Disk
from tests.controller.kit import POISON, ScriptedEdge, ScriptedMover, ScriptedTicket
from tests.controller.soak import POLICIES, Driver, Unreliable
from tests.controller.soak_files import MODELS, Lives

from .kit import CONFIG, allocator_of
from .scheduler import fingerprints

LAYERS, ROW_BYTES, CONTEXT = 2, 16, 256
LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_head")


# ---- bytes that tell what they are -----------------------------------------------------------------------------------
def content_of(tokens: list[int], namespace: bytes, planes: int) -> np.ndarray[Any, Any]:
    """uint8 [planes, tokens, row bytes]."""
    start = np.frombuffer(hashlib.blake2b(namespace, digest_size=8).digest(), np.uint64)
    with np.errstate(over="ignore"):
        factors = 2 * np.arange(planes, dtype=np.uint64) + np.uint64(3)
        words = (fingerprints(tokens) + start)[None, :] * factors[:, None]
        rows = words[:, :, None] + np.arange(ROW_BYTES // 8, dtype=np.uint64)
    return np.ascontiguousarray(rows).view(np.uint8)


class Planes:
    """The buffers of a device pool as bytes: one uint8 [slots, row bytes] a half and layer, layer by layer."""

    def __init__(self, pool: Any) -> None:
        halves = [pool.kv_buffer] if hasattr(pool, "kv_buffer") else [pool.k_buffer, pool.v_buffer]
        buffers = [half[layer] for layer in range(LAYERS) for half in halves]
        tensors = [buffer.view(torch.uint8).reshape(len(buffer), -1) for buffer in buffers]
        self.on_cpu = tensors[0].is_cpu
        self.planes: list[Any] = [tensor.numpy() if self.on_cpu else tensor for tensor in tensors]
        self.halves = len(halves)

    def __len__(self) -> int:
        return len(self.planes)

    def write(self, slots: np.ndarray[Any, Any], rows: Any) -> None:
        """Args: rows: uint8 [planes, slots, row bytes], or one byte for all."""
        at: Any = slots if self.on_cpu else torch.from_numpy(slots).cuda()
        for number, plane in enumerate(self.planes):
            if isinstance(rows, int):
                plane[at] = rows
            else:
                plane[at] = rows[number] if self.on_cpu else torch.from_numpy(rows[number]).cuda()

    def read(self, slots: np.ndarray[Any, Any], layer: int) -> np.ndarray[Any, Any]:
        """uint8 [halves, slots, row bytes] of one layer."""
        some = self.planes[layer * self.halves : (layer + 1) * self.halves]
        if self.on_cpu:
            return np.stack([plane[slots] for plane in some])
        at = torch.from_numpy(slots).cuda()
        return np.stack([plane[at].cpu().numpy() for plane in some])


# ---- a machine that does as it is told -------------------------------------------------------------------------------
class _Device:
    """What a ScriptedMover looks at."""

    def __init__(self, view: Any, allocator: Any) -> None:
        self._view, self._allocator = view, allocator

    def view(self) -> Any:
        return self._view

    def free_ids(self) -> Any:
        return free_pages(self._allocator)


def free_pages(allocator: Any) -> np.ndarray[Any, Any]:
    return np.concatenate([allocator.free_pages, allocator.release_pages])


class _Moment:
    """``time`` for HiRadixCache: while it sleeps, the machine works."""

    def __init__(self, work: Any, clock: Any) -> None:
        self._work, self.monotonic = work, clock

    def sleep(self, seconds: float) -> None:
        self._work()


class CacheMachine(Lives, Driver):
    """A HiRadixCache with all that belongs to it, on a Disk, which must be installed; new for each process.

    Args: threads: copies and storage calls run by themselves, as in earnest; a seed does not name a run then. device:
        "cuda": the same on GPU 0, with threads. io_backend: None: drawn.
    """

    cache: Any

    def __init__(
        self, seed: int, disk: Disk, *, threads: bool = False, device: str = "cpu", io_backend: str | None = None
    ) -> None:
        super().__init__(seed)
        self.now_s, self.threads, self.device = 0.0, threads, device
        self.local = np.random.default_rng([seed, 2])
        self.copy_speed = self.storage_speed = 1.0
        self.segments = [self.random.integers(0, 50, int(n)).tolist() for n in self.random.integers(3, 14, 6)]
        self.served_tokens, self.requests_made = 0, 0
        self.settle_in(disk, 0)
        draw = self.random.integers
        choose = self.random.choice
        self.page_size, self.kind = int(choose([1, 2, 4])), str(choose(["mha", "mla"]))
        pages = 100 // self.page_size
        self.device_tokens = int(draw(pages // 2, pages)) * self.page_size
        self.settings = {
            "ratio": float(choose([0.4, 0.8, 1.5])), "policy": str(choose(POLICIES)),
            "io_backend": io_backend or "kernel", "layout": str(choose(LAYOUTS)),
            "prefetch": str(choose(["best_effort", "wait_complete", "wait_complete", "timeout"])),
            "by_name": bool(draw(2)) and not threads, "eviction": str(choose(["lru", "lfu", "fifo", "mru", "filo"])),
        }  # fmt: skip
        self.control = {
            "prefetch_threshold": self.page_size, "load_back_threshold": 1, "storage_batch_pages": int(draw(1, 5)),
            "load_policy": str(choose(["all", "longest_prefix", "cost"])), "store_after_backup": bool(draw(4)),
            "adaptive_thresholds": bool(draw(2)), "write_through_threshold_storage": 1,
            "write_through_threshold": [None, 1][int(draw(2))],
            "max_writes": int(draw(2, 8)), "max_stores": int(draw(3, 12)), "prefetch_capacity_floor": 0.5,
            "settle_timeout_s": 30.0 if threads else 0.0, "copy_timeout_s": 30.0, "write_timeout_s": 0.5,
            "prefetch_deadline_s": 2.0, "prefetch_abandon_s": 5.0, "recheck_stored_s": 1.0,
        }  # fmt: skip

    # ---- processes ---------------------------------------------------------------------------------------------------
    def start(self) -> None:
        """A process starts: everything but the folder is new."""
        gc.collect()
        self.model = str(self.random.choice(MODELS))
        self.requests: list[Any] = []
        self.locked: list[Any] = []
        self.protected: list[Any] = []
        self.mover: Any = None
        self.edge: Any = None
        if self.kind == "mha":
            pool: Any = MHATokenToKVPool(self.device_tokens, self.page_size, torch.bfloat16, 1, 8, LAYERS, self.device)
        else:
            pool = MLATokenToKVPool(self.device_tokens, self.page_size, torch.bfloat16, 6, 2, LAYERS, self.device)
        self.pool, self.kv = pool, Planes(pool)
        self.allocator = allocator_of(pool, self.page_size)
        self.refused = 0
        self._poison_slots()
        self.rows = ReqToTokenPool(6, CONTEXT, self.device)
        settings = self.settings
        config = replace(
            CONFIG, control=ControllerConfig(**self.control), model=self.model, clock=lambda: self.now_s,
            eviction_policy=settings["eviction"], storage_options={"path": self.disk.root, **self.files},
        )  # fmt: skip
        storage = self.open_storage()
        with self.told():
            self.cache = HiRadixCache(
                self.rows, self.allocator, None, self.page_size, settings["ratio"], 0, settings["policy"],
                settings["io_backend"], settings["layout"], storage, settings["prefetch"], config=config,
            )  # fmt: skip
        self.counter = self.cache.cache_controller.layer_done_counter
        self._poison_host()

    def open_storage(self) -> Any:
        """What the cache is given: the backend's name, or one that fails in ways of its own, too."""
        self.storage = None
        opened = self.new_process(self.seed)
        if self.settings["by_name"]:
            opened.close()
            return "file"
        self.storage = Unreliable(opened, np.random.default_rng([self.seed, self.lives]))
        return self.storage

    def _poison_slots(self) -> None:
        take = self.allocator.alloc

        def alloc(need_size: int) -> Any:
            if self.refused:
                self.refused -= 1
                return None
            slots = take(need_size)
            if slots is not None and len(slots):
                self.kv.write(slots.cpu().numpy(), POISON)
            return slots

        self.allocator.alloc = alloc

    def _poison_host(self) -> None:
        host = self.cache.token_to_kv_pool_host
        take = host.alloc_pages

        def alloc_pages(num_pages: int, for_copy: bool = False) -> Any:
            pages = take(num_pages, for_copy)
            if pages is not None:
                starts, size = host.page_pieces(pages)
                data = host.arena.data
                for at in starts.reshape(-1).tolist():
                    data[at : at + size] = POISON
            return pages

        host.alloc_pages = alloc_pages

    def mover_of(self, found: Any, host: Any, io_backend: str, config: Any) -> Any:
        """In place of the threads."""
        soak = self

        class Ticket(ScriptedTicket):
            def wait(self, timeout_s: float | None = None) -> bool:
                if soak.local.random() < 0.8:  # else the time is up
                    self.run()
                return self.done()

        self.mover = ScriptedMover(_Device(found.view, self.allocator), host)
        self.mover.ticket = Ticket

        def fail(kind: str) -> TransferError | None:  # loads are fewer
            chance = self.trouble * (3 if kind == "load" else 1)
            return TransferError("the copy failed") if self.local.random() < chance else None

        self.mover.fail = fail
        self.host = host
        return self.mover

    def edge_of(self, store: Any, config: ControllerConfig) -> ScriptedEdge:
        store.breaker._clock = lambda: self.now_s
        self.edge = ScriptedEdge(store, config, self.host)
        return self.edge

    def work(self) -> None:
        """What the machine does while somebody waits."""
        self.mover.run()
        if self.edge is not None:
            self.edge.step()
        self.now_s += 0.01

    @contextlib.contextmanager
    def scripted(self) -> Iterator[None]:
        """Copies and storage calls happen when this run says."""
        if self.threads:
            yield
            return
        with (
            mock.patch.object(cache_controller, "mover_of", self.mover_of),
            mock.patch.object(controller_module, "StorageWorkers", self.edge_of),
            mock.patch.object(hiradix_module, "time", _Moment(self.work, lambda: self.now_s)),
        ):
            yield

    def act(self, action: Any) -> None:
        self.disk.running = self.process
        try:
            action(self)
        except Crash:
            assert self.process.dead
        if self.process.dead:
            self.done["died"] += 1
            self.kill()

    def kill(self) -> None:
        """It is gone, as it stands. Another one starts."""
        if self.threads:  # nobody can kill those
            return
        self.count_pages()
        self.process.bury()
        self.trouble = 0.0
        self.start()

    def count_pages(self) -> None:
        store = self.cache.cache_controller.core.storage
        if store is not None:
            self.count(store)

    def die_soon(self) -> None:
        self.process.dies_in = 0 if self.threads else int(self.random.integers(1, 60))

    def close(self) -> None:
        self.count_pages()
        assert self.cache.close()
        if self.storage is not None:
            self.storage.close()
        if not self.threads:
            assert not self.process.fds, f"{len(self.process.fds)} files are still open"

    def stop(self) -> None:
        """It is told to end, and closes all with everything in flight."""
        self.close()
        self.start()
