"""The two caches under one set of names: the original, and radixkv's. A test is given a factory and knows neither.

A side brings pools, allocator and cache, and ``settle``: wait until every copy and storage call that has been started
is done, without telling the cache (``check_hicache_events`` does that, as a step of its own).
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

SETTLE_S = 30.0
LAYERS, HEADS, HEAD_DIM = 3, 1, 2
LORA_RANK, ROPE_DIM = 2, 2


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One cache. Sizes in tokens; host_ratio: host pool over device pool; storage: None or a folder's name."""

    page_size: int = 16
    write_policy: str = "write_through"
    kind: str = "mha"
    layout: str = "layer_first"
    io_backend: str = "kernel"
    device_tokens: int = 1024
    host_ratio: float = 2.0
    storage: bool = False
    prefetch_policy: str = "wait_complete"
    prefetch_threshold: int | None = None
    requests: int = 16
    context_tokens: int = 4096

    def __str__(self) -> str:
        parts = [self.write_policy, f"page{self.page_size}", self.kind, self.layout, self.io_backend]
        return "-".join(parts + ["file-" + self.prefetch_policy] * self.storage)


class Side(ABC):
    """One implementation, ready to use. Close it."""

    name: str
    setup: Setup
    valve: Any
    """What copies and storage calls pass first: original.shims.Valve."""
    cache: Any
    allocator: Any
    device_pool: Any
    req_to_token_pool: Any

    # ---- what the harness needs beyond the API ---------------------------------------------------------------------
    @abstractmethod
    def settle(self, flush: bool = True) -> None:
        """Wait until what was started is done. Raises: TimeoutError that names what is not.

        flush: also what ``begin_copies`` begins.
        """

    @abstractmethod
    def advance(self, seconds: float) -> None:
        """Let the cache's clock go on."""

    @abstractmethod
    def host_rows(self, slots: torch.Tensor) -> np.ndarray:
        """KV of host slots: float32 [n, planes, D], planes as ``planes``."""

    @abstractmethod
    def lagging_rank(self) -> AbstractContextManager[None]:
        """A second rank of a tensor-parallel group, none of whose operations ever ends."""

    @abstractmethod
    def tear_storage(self) -> None:
        """Cut every stored value off, as a machine that fails while it writes."""

    @abstractmethod
    def close(self) -> None: ...

    def in_flight_host_tokens(self) -> int:
        """Host slots taken by copies and prefetches that the cache has not been told of the end of."""
        return 0

    def begin_copies(self) -> None:  # noqa: B027 - the original puts nothing off
        """Begin what the cache has taken on, and would begin in the next check_hicache_events."""

    @abstractmethod
    def storing(self) -> bool:
        """Whether something is on its way to storage."""

    def has_copy(self, node: Any) -> bool:
        """A host copy, there or on its way."""
        return bool(node.backuped)

    def host_free_tokens(self) -> int:
        return int(self.cache.token_to_kv_pool_host.available_size())

    def host_tokens(self) -> int:
        return int(self.cache.token_to_kv_pool_host.size)

    def planes(self) -> list[torch.Tensor]:
        """Buffers of the device pool, [slots, D] each: layers of K, then of V."""
        pool = self.device_pool
        halves = [pool.kv_buffer] if self.setup.kind == "mla" else [pool.k_buffer, pool.v_buffer]
        return [layer.view(layer.shape[0], -1) for half in halves for layer in half]

    def device_rows(self, slots: torch.Tensor) -> np.ndarray:
        """KV of device slots: float32 [n, planes, D]."""
        return torch.stack([plane[slots] for plane in self.planes()], 1).numpy()

    def write(self, slots: torch.Tensor, rows: np.ndarray) -> None:
        for index, plane in enumerate(self.planes()):
            plane[slots] = torch.from_numpy(np.ascontiguousarray(rows[:, index]))

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


Factory = Callable[[Setup], Side]


def wait_for(condition: Callable[[], bool], what: Callable[[], str], seconds: float | None = None) -> None:
    """Poll until the condition holds. Raises: TimeoutError after ``seconds``, SETTLE_S by default."""
    seconds = SETTLE_S if seconds is None else seconds
    end = time.monotonic() + seconds
    for turn in itertools.count():
        if condition():
            return
        if time.monotonic() > end:
            raise TimeoutError(f"not settled within {seconds} s: {what()}")
        time.sleep(0.00005 if turn < 40 else 0.0005)


def single_rank_group() -> Any:
    """The gloo group of one process; made once."""
    distributed = torch.distributed
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    return distributed.group.WORLD


# ---- the original ----------------------------------------------------------------------------------------------------
class OriginalSide(Side):
    """The original in a ``World`` of its own."""

    name = "original"
    _step_began = 0.0

    def __init__(self, setup: Setup, world: Any, storage_folder: Path | None = None) -> None:
        from .original import world as names

        self.setup, self.world, self.valve = setup, world, world.valve
        pools, allocators = world.module(names.POOL), world.module(names.ALLOCATOR)
        size, page = setup.device_tokens, setup.page_size
        if setup.kind == "mha":
            self.device_pool = pools.MHATokenToKVPool(size, page, torch.float32, HEADS, HEAD_DIM, LAYERS, "cpu", False)
        else:
            self.device_pool = pools.MLATokenToKVPool(
                size, page, torch.float32, LORA_RANK, ROPE_DIM, LAYERS, "cpu", False
            )
        if page == 1:
            self.allocator = allocators.TokenToKVPoolAllocator(size, torch.float32, "cpu", self.device_pool)
        else:
            self.allocator = allocators.PagedTokenToKVPoolAllocator(size, page, torch.float32, "cpu", self.device_pool)
        self.req_to_token_pool = pools.ReqToTokenPool(setup.requests, setup.context_tokens, "cpu", False)
        self._own_folder = tempfile.TemporaryDirectory() if setup.storage and storage_folder is None else None
        self.storage_folder = Path(self._own_folder.name) if self._own_folder else storage_folder
        with _environment("SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR", str(self.storage_folder or "")):
            self.cache = world.module(names.HIRADIX).HiRadixCache(
                self.req_to_token_pool, self.allocator, single_rank_group(), page, setup.host_ratio, 0,
                setup.write_policy, setup.io_backend, setup.layout, "file" if setup.storage else None,
                setup.prefetch_policy,
            )  # fmt: skip
        if setup.prefetch_threshold is not None:
            self.cache.prefetch_threshold = self.controller.prefetch_threshold = setup.prefetch_threshold
        self._started = self.controller.layer_done_counter.producer_index
        self._launched: list[Any] = []
        self._watch()

    def stamp_hits_only(self) -> OriginalSide:
        """Let the part of a node beyond a hit keep its old access time, as radixkv does: the one difference that would
        show in every later eviction. Shown by test_part_beyond_a_hit_is_touched. Returns: itself."""
        node_class, cache, clock = type(self.cache.root_node), self.cache, self.world.clock

        def stamp(node: Any, at: float) -> None:
            node.stamps = (getattr(node, "stamps", (at, at))[1], at)

        node_class.last_access_time = property(lambda node: node.stamps[1], stamp)
        cache.root_node.last_access_time = clock.monotonic()
        split = cache._split_node

        def keep(key: Any, child: Any, length: int) -> Any:
            upper = split(key, child, length)
            before, now = child.stamps
            if now > self._step_began:
                child.stamps = (before, before)
            return upper

        def begun(method: Any) -> Any:
            def call(*args: Any, **options: Any) -> Any:
                self._step_began = clock.monotonic()
                return method(*args, **options)

            return call

        cache._split_node = keep
        cache.match_prefix, cache.insert = begun(cache.match_prefix), begun(cache.insert)
        return self

    @property
    def controller(self) -> Any:
        return self.cache.cache_controller

    def _watch(self) -> None:
        """Remember which loads have been started: it shows only in a local variable of the load thread."""
        cache = self.cache
        ready = cache.ready_to_load_host_cache

        def remembered() -> int:
            self._launched = list(cache.ongoing_load_back.values())
            self._started = ready()
            return int(self._started)

        cache.ready_to_load_host_cache = remembered

    def settle(self, flush: bool = True) -> None:
        wait_for(lambda: not self._busy(), lambda: ", ".join(self._busy()))

    def _busy(self) -> list[str]:
        """What is under way, in words."""
        cache, controller = self.cache, self.controller
        busy = []
        if cache.load_cache_event.is_set() or controller.layer_done_counter.producer_index != self._started:
            busy.append("a start of loads")
        launched = sum(any(load is one for one in self._launched) for load in cache.ongoing_load_back.values())
        if launched != controller.ack_load_queue.qsize():
            busy.append(f"{launched} loads, {controller.ack_load_queue.qsize()} acks")
        queues = ["write_queue"] + ["prefetch_queue", "prefetch_buffer", "backup_queue"] * self.setup.storage
        busy += [name for name in queues if not (hasattr(controller, name) and getattr(controller, name).idle())]
        return busy

    def storing(self) -> bool:
        return "backup_queue" in self._busy()

    def in_flight_host_tokens(self) -> int:
        return sum(len(operation.host_indices) for *_, operation in self.cache.ongoing_prefetch.values())

    def advance(self, seconds: float) -> None:
        self.world.clock.advance(seconds)

    @contextmanager
    def lagging_rank(self) -> Any:
        class Distributed:
            ReduceOp = torch.distributed.ReduceOp

            @staticmethod
            def all_reduce(tensor: torch.Tensor, **options: Any) -> None:
                tensor.zero_()

        shim = self.world.module("torch")
        self.cache.tp_world_size, shim.distributed = 2, Distributed
        try:
            yield
        finally:
            self.cache.tp_world_size, shim.distributed = 1, torch.distributed

    def tear_storage(self) -> None:
        assert self.storage_folder is not None
        for path in self.storage_folder.iterdir():
            path.write_bytes(path.read_bytes()[:100])

    def host_rows(self, slots: torch.Tensor) -> np.ndarray:
        kv = self.cache.token_to_kv_pool_host.kv_buffer
        if self.setup.kind == "mla":
            kv = kv.unsqueeze(0)
        by_layer = kv if self.cache.token_to_kv_pool_host.layout == "layer_first" else kv.transpose(1, 2)
        rows = by_layer[:, :, slots].flatten(3)  # halves, layers, n, D
        return rows.flatten(0, 1).transpose(0, 1).numpy()

    def close(self) -> None:
        controller = self.controller
        controller.stop_event.set()
        threads = [controller.write_thread, controller.load_thread]
        if self.setup.storage:
            threads += [controller.prefetch_thread, controller.backup_thread]
        for thread in threads:
            thread.join(SETTLE_S)
            assert not thread.is_alive(), f"{thread} of the original does not stop"
        if self._own_folder:
            self._own_folder.cleanup()


@contextmanager
def _environment(name: str, value: str) -> Any:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def make_original(
    setup: Setup,
    *,
    jitter: int | None = None,
    poll_s: float | None = 0.01,
    storage_folder: Path | None = None,
    copies: bool = True,
) -> OriginalSide:
    """The original, in modules of its own; the keywords are World's. Raises: OriginalAbsent."""
    from .original.world import World

    return OriginalSide(setup, World(jitter, poll_s, copies), storage_folder)


# ---- ours ------------------------------------------------------------------------------------------------------------
def make_ours(setup: Setup, **options: Any) -> Side:
    """radixkv's facade over radixkv's own pools; options: as OurSide."""
    from .ours import OurSide

    return OurSide(setup, **options)
