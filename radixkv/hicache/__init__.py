"""L5: the HiCache API: SGLang's prefix caches and the classes around them (2025-08), over radixkv's own parts."""

from __future__ import annotations

from ..pool.device import MHATokenToKVPool, MLATokenToKVPool
from ..pool.host import MHATokenToKVPoolHost, MLATokenToKVPoolHost
from ..pool.paged import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
from ..pool.states import MemoryStateInt
from ..storage.sglang_api import HiCacheStorage
from .base import BasePrefixCache, MatchResult, Request
from .cache_controller import HiCacheController, LayerDoneCounter, PrefetchOperation
from .config import HiCacheConfig
from .events import AllBlocksCleared, BlockRemoved, BlockStored
from .hashes import get_hash_str
from .hiradix_cache import HiRadixCache
from .node import TreeNode
from .radix_cache import RadixCache
from .req_pool import ReqToTokenPool

__all__ = [
    "AllBlocksCleared",
    "BasePrefixCache",
    "BlockRemoved",
    "BlockStored",
    "HiCacheConfig",
    "HiCacheController",
    "HiCacheStorage",
    "HiRadixCache",
    "LayerDoneCounter",
    "MHATokenToKVPool",
    "MHATokenToKVPoolHost",
    "MLATokenToKVPool",
    "MLATokenToKVPoolHost",
    "MatchResult",
    "MemoryStateInt",
    "PagedTokenToKVPoolAllocator",
    "PrefetchOperation",
    "RadixCache",
    "ReqToTokenPool",
    "Request",
    "TokenToKVPoolAllocator",
    "TreeNode",
    "get_hash_str",
]
