"""Pools, allocators and caches for the tests of the facade: small ones, and all shapes that engines have."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from radixkv.controller import ControllerConfig
from radixkv.hicache import (
    HiCacheConfig,
    HiRadixCache,
    MHATokenToKVPool,
    MLATokenToKVPool,
    PagedTokenToKVPoolAllocator,
    RadixCache,
    ReqToTokenPool,
    TokenToKVPoolAllocator,
)
from radixkv.pool.host import HostPoolConfig

LAYERS = 3


def device_pool(kind: str, size: int, page_size: int, dtype: Any = torch.bfloat16) -> Any:
    """One of our own device pools, of a few bytes a token."""
    if kind == "mha":
        return MHATokenToKVPool(size, page_size, dtype, 2, 4, LAYERS)
    return MLATokenToKVPool(size, page_size, dtype, 6, 2, LAYERS)


def allocator_of(pool: Any, page_size: int) -> Any:
    """The allocator that an engine takes for this page size."""
    if page_size == 1:
        return TokenToKVPoolAllocator(pool.size, pool.dtype, pool.device, pool)
    return PagedTokenToKVPoolAllocator(pool.size, page_size, pool.dtype, pool.device, pool)


def radix_cache(size: int = 512, page_size: int = 4, kind: str = "mha", **more: Any) -> RadixCache:
    """A RadixCache over a pool of its own."""
    allocator = allocator_of(device_pool(kind, size, page_size), page_size)
    return RadixCache(ReqToTokenPool(16, 4096), allocator, page_size, **more)


def take(cache: Any, num_tokens: int) -> torch.Tensor:
    """Slots from the cache's allocator."""
    slots = cache.token_to_kv_pool_allocator.alloc(num_tokens)
    assert slots is not None
    return slots


CONFIG = HiCacheConfig(host_pool=HostPoolConfig(headroom_bytes=0), model="test", copy_threads=1)


def hiradix_cache(
    size: int = 512,
    page_size: int = 4,
    kind: str = "mha",
    *,
    policy: str = "write_through",
    host: float = 2.0,
    io_backend: str = "kernel",
    layout: str = "layer_first",
    storage: Any = None,
    prefetch: str = "best_effort",
    allocator: Any = None,
    group: Any = None,
    config: HiCacheConfig = CONFIG,
    **control: Any,
) -> HiRadixCache:
    """A HiRadixCache over pools of its own. ``host``: slots a device slot; control: fields of ControllerConfig."""
    allocator = allocator or allocator_of(device_pool(kind, size, page_size), page_size)
    config = replace(config, control=ControllerConfig(**control))
    return HiRadixCache(
        ReqToTokenPool(16, 4096), allocator, group, page_size, host, 0, policy, io_backend, layout, storage, prefetch,
        config=config,
    )  # fmt: skip


def settle(cache: HiRadixCache) -> None:
    """Poll until nothing is in flight."""
    deadline = time.monotonic() + 20
    while True:
        cache.check_hicache_events()
        stats = cache.cache_controller.core.stats()
        if not (stats.writes_in_flight or stats.loads_in_flight or stats.stores_in_flight or stats.stuck_pages):
            return
        assert time.monotonic() < deadline, stats
        time.sleep(0.0002)
