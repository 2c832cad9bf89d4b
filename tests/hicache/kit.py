"""Pools, allocators and caches for the tests of the facade: small ones, and all shapes that engines have."""

from __future__ import annotations

from typing import Any

import torch

from radixkv.hicache import (
    MHATokenToKVPool,
    MLATokenToKVPool,
    PagedTokenToKVPoolAllocator,
    RadixCache,
    ReqToTokenPool,
    TokenToKVPoolAllocator,
)

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
