"""radixkv's side of a comparison: the facade over radixkv's own pools, with the same valve that the original has."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from radixkv.controller import WRITING, ControllerConfig
from radixkv.controller.context import HEADER
from radixkv.controller.operations import RUNNING
from radixkv.hicache import (
    HiCacheConfig,
    HiRadixCache,
    MHATokenToKVPool,
    MLATokenToKVPool,
    PagedTokenToKVPoolAllocator,
    ReqToTokenPool,
    TokenToKVPoolAllocator,
)
from radixkv.pool.host import HostPoolConfig
from radixkv.storage import Storage, create_storage
from radixkv.storage.base import BoolArray, IntArray, Parts

from .original.shims import Clock, Valve
from .sides import HEAD_DIM, HEADS, LAYERS, LORA_RANK, ROPE_DIM, Setup, Side, single_rank_group, wait_for


class ValvedRoute:
    """Copies in one direction that pass a valve first; without ``copies`` they move nothing."""

    def __init__(self, route: Any, kind: str, num_layers: int, valve: Valve, copies: bool) -> None:
        self._route, self._kind, self._num_layers = route, kind, num_layers
        self._valve, self._copies = valve, copies

    def copy(self, src_pages: Any, dst_pages: Any, progress: Any = None) -> None:
        self._valve(self._kind)
        if self._copies:
            self._route.copy(src_pages, dst_pages, progress)
        elif progress is not None:
            progress.begin(self._num_layers)
            progress.advance(self._num_layers)

    def copy_until(self, src_pages: Any, dst_pages: Any, until_s: float | None = None) -> int:
        """None before the valve opens."""
        if not self._valve.passes(self._kind, until_s):
            return 0
        return self._route.copy_until(src_pages, dst_pages, until_s) if self._copies else len(src_pages)


class ValvedStorage(Storage):
    """A backend whose calls pass a valve first."""

    name = "valved"

    def __init__(self, storage: Storage, valve: Valve) -> None:
        self.inner, self._valve = storage, valve

    def put_many(self, keys: Sequence[str], parts: Sequence[Parts], *, timeout_s: float | None = None) -> BoolArray:
        self._valve("set")
        return self.inner.put_many(keys, parts, timeout_s=timeout_s)

    def get_many(self, keys: Sequence[str], parts: Sequence[Parts], *, timeout_s: float | None = None) -> IntArray:
        self._valve("get")
        return self.inner.get_many(keys, parts, timeout_s=timeout_s)

    def exists_many(self, keys: Sequence[str], *, timeout_s: float | None = None) -> BoolArray:
        self._valve("exists")
        return self.inner.exists_many(keys, timeout_s=timeout_s)

    def delete_many(self, keys: Sequence[str], *, timeout_s: float | None = None) -> None:
        self.inner.delete_many(keys, timeout_s=timeout_s)

    def clear(self, *, timeout_s: float | None = None) -> None:
        self.inner.clear(timeout_s=timeout_s)

    def close(self) -> None:
        self.inner.close()


class OurSide(Side):
    """HiRadixCache of radixkv, its storage in memory.

    Args: control: more fields of ControllerConfig; the others as make_original's.
    """

    name = "radixkv"

    def __init__(
        self,
        setup: Setup,
        jitter: int | None = None,
        copies: bool = True,
        **control: Any,
    ) -> None:
        self.setup, self.clock, self.valve = setup, Clock(), Valve(jitter)
        size, page = setup.device_tokens, setup.page_size
        self.device_pool: Any
        if setup.kind == "mha":
            self.device_pool = MHATokenToKVPool(size, page, torch.float32, HEADS, HEAD_DIM, LAYERS)
        else:
            self.device_pool = MLATokenToKVPool(size, page, torch.float32, LORA_RANK, ROPE_DIM, LAYERS)
        if page == 1:
            self.allocator = TokenToKVPoolAllocator(size, torch.float32, "cpu", self.device_pool)
        else:
            self.allocator = PagedTokenToKVPoolAllocator(size, page, torch.float32, "cpu", self.device_pool)
        self.req_to_token_pool = ReqToTokenPool(setup.requests, setup.context_tokens, "cpu", False)
        if setup.prefetch_threshold is not None:
            control = {"prefetch_threshold": setup.prefetch_threshold, **control}
        self.storage = None
        if setup.storage:
            self.storage = ValvedStorage(create_storage("memory"), self.valve)
        self.cache = HiRadixCache(
            self.req_to_token_pool, self.allocator, single_rank_group(), page, setup.host_ratio, 0,
            setup.write_policy, setup.io_backend, setup.layout, self.storage, setup.prefetch_policy,
            config=HiCacheConfig(
                control=ControllerConfig(**control), host_pool=HostPoolConfig(headroom_bytes=0), model="test",
                copy_threads=1, clock=self.clock.monotonic,
            ),
        )  # fmt: skip
        mover = self.core._context.mover
        mover._to_host = ValvedRoute(mover._to_host, "backup", LAYERS, self.valve, copies)
        mover._to_device = ValvedRoute(mover._to_device, "load", LAYERS, self.valve, copies)

    @property
    def core(self) -> Any:
        return self.cache.cache_controller.core

    def begin_copies(self) -> None:
        self.core._context.flush_backups()

    def settle(self, flush: bool = True) -> None:
        if flush:
            self.begin_copies()
        wait_for(lambda: not self._busy(), lambda: ", ".join(self._busy()))

    def _busy(self) -> list[str]:
        core = self.core
        put_off = core._context.mover._writes._taken_on
        writes = [op for op in core._writes.operations if op.ticket not in put_off]
        busy = [f"write {op.op_id}" for op in writes if not op.ticket.done()]
        busy += [f"load {batch.index}" for batch in core._loads.batches if not batch.ticket.done()]
        busy += [f"store {op.op_id}" for op in core._stores.operations if not op.job.done()]
        busy += [f"drain of {op.op_id}" for op in core._drains.operations if not op.work.done()]
        return busy + [f"prefetch of {op.req_id}" for op in core._prefetches.running if not op.job.done()]

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)

    def in_flight_host_tokens(self) -> int:
        core = self.core
        pages = [len(op.host_pages) for op in core._writes.operations]
        pages += [len(op.host_pages) for op in core._prefetches.operations.values() if op.host_pages is not None]
        return sum(pages) * self.setup.page_size

    def storing(self) -> bool:
        return any(not op.job.done() for op in self.core._stores.operations)

    def has_copy(self, node: Any) -> bool:
        return bool(node.backuped or (node != self.cache.root_node and node._info.marks & WRITING))

    def host_rows(self, slots: torch.Tensor) -> np.ndarray:
        pool, page = self.cache.token_to_kv_pool_host, self.setup.page_size
        starts = np.asarray(slots)[::page]
        pages = np.stack([pool._by_page()[start // page] for start in starts])  # n pages, halves, ...page_dims, D
        order = pool.page_dims.replace("K ", "").split()
        apart = pages.view(np.float32)  # pages, halves, <order>
        letters = ["N", "K", *order]
        wanted = [letters.index(letter) for letter in ("N", "P", "K", "L", "H", "D")]
        rows = apart.transpose(wanted)  # pages, slots a page, halves, layers, heads, D
        return rows.reshape(rows.shape[0] * rows.shape[1], rows.shape[2] * rows.shape[3], -1)

    @contextmanager
    def lagging_rank(self) -> Any:
        class Group:
            rank, size = 0, 2

            @staticmethod
            def min(values: Sequence[int]) -> list[int]:
                return [*values[:HEADER], *(min(value, RUNNING) for value in values[HEADER:])]

        context = self.core._context
        context.group, own = Group(), context.group
        try:
            yield
        finally:
            context.group = own

    def tear_storage(self) -> None:
        assert self.storage is not None
        values = self.storage.inner._values  # type: ignore[attr-defined]
        for key in values:
            values[key] = values[key][:100]

    def close(self) -> None:
        for kind in ("backup", "load", "set", "get", "exists"):
            self.valve.open(kind)
        self.cache.close()
        if self.storage is not None:
            self.storage.close()
