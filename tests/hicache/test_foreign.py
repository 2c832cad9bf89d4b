"""An engine's own pool and allocators: known by their attributes, and used through their methods only."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from radixkv.hicache import HiRadixCache, RadixCache

from .kit import CONFIG, settle
from .scheduler import Engine, Req
from .test_scheduler import chat

LAYERS = 2


class EnginePool:
    """Keys and values as an engine keeps them: lists of tensors, and a counter to wait for."""

    def __init__(self, size: int, page_size: int) -> None:
        self.size, self.page_size, self.layer_num, self.head_num, self.head_dim = size, page_size, LAYERS, 2, 4
        self.dtype = self.store_dtype = torch.bfloat16
        self.device, self.start_layer, self.end_layer = "cpu", 0, LAYERS - 1
        shape = (size + page_size, self.head_num, self.head_dim)
        self.k_buffer = [torch.zeros(shape, dtype=self.dtype) for _ in range(LAYERS)]
        self.v_buffer = [torch.zeros(shape, dtype=self.dtype) for _ in range(LAYERS)]
        self.layer_transfer_counter: Any = None

    def register_layer_transfer_counter(self, counter: Any) -> None:
        self.layer_transfer_counter = counter


class LatentPool:
    """Latent rows, with no way to register a counter."""

    def __init__(self, size: int, page_size: int) -> None:
        self.size, self.page_size, self.layer_num = size, page_size, LAYERS
        self.dtype, self.device = torch.float16, "cpu"
        self.kv_buffer = [torch.zeros((size + page_size, 1, 8), dtype=self.dtype) for _ in range(LAYERS)]


class EngineAllocator:
    """Slots in torch tensors: a free list of pages, freed by any slot of theirs, and free groups. It checks nothing."""

    def __init__(self, pool: Any, page_size: int) -> None:
        self.pool, self.page_size, self.size, self.device = pool, page_size, pool.size, "cpu"
        self.group: list[torch.Tensor] | None = None
        self.clear()

    def clear(self) -> None:
        self.free_pages = torch.arange(1, self.size // self.page_size + 1)

    def get_kvcache(self) -> Any:
        return self.pool

    def available_size(self) -> int:
        return len(self.free_pages) * self.page_size

    def alloc(self, need_size: int) -> torch.Tensor | None:
        assert need_size % self.page_size == 0
        pages = need_size // self.page_size
        if pages > len(self.free_pages):
            return None
        taken, self.free_pages = self.free_pages[:pages], self.free_pages[pages:]
        return (taken[:, None] * self.page_size + torch.arange(self.page_size)).reshape(-1)

    def alloc_extend(self, prefix_lens: Any, seq_lens: Any, last_loc: Any, extend_num_tokens: int) -> Any:
        parts = []
        for before, after, last in zip(prefix_lens.tolist(), seq_lens.tolist(), last_loc.tolist(), strict=True):
            inside = min(after - before, -before % self.page_size)
            parts.append(torch.arange(last + 1, last + 1 + inside))
            rest = after - before - inside
            fresh = self.alloc(-(-rest // self.page_size) * self.page_size)
            if fresh is None:
                return None
            parts.append(fresh[:rest])
        return torch.cat(parts)

    def alloc_decode(self, seq_lens: Any, last_loc: Any) -> Any:
        return self.alloc_extend(seq_lens - 1, seq_lens, last_loc, len(seq_lens))

    def free(self, free_index: torch.Tensor) -> None:
        if free_index.numel() == 0:
            return
        if self.group is not None:
            self.group.append(free_index)
            return
        pages = torch.unique(free_index.long() // self.page_size)
        assert not torch.isin(pages, self.free_pages).any(), "an engine's allocator would now give a page out twice"
        self.free_pages = torch.cat([self.free_pages, pages])

    def free_group_begin(self) -> None:
        self.group = []

    def free_group_end(self) -> None:
        group, self.group = self.group, None
        if group:
            self.free(torch.cat(group))


class EngineRows:
    """An engine's ReqToTokenPool."""

    def __init__(self, size: int, max_context_len: int) -> None:
        self.size = size
        self.req_to_token = torch.zeros((size, max_context_len), dtype=torch.int32)
        self.free_slots = list(range(size))

    def write(self, indices: Any, values: torch.Tensor) -> None:
        self.req_to_token[indices] = values

    def alloc(self, need_size: int) -> list[int]:
        taken, self.free_slots = self.free_slots[:need_size], self.free_slots[need_size:]
        return taken

    def free(self, free_index: Any) -> None:
        self.free_slots.extend([free_index] if isinstance(free_index, int) else free_index)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("pool_class", [EnginePool, LatentPool])
def test_an_engines_own_pool(pool_class: Any, page_size: int) -> None:
    allocator = EngineAllocator(pool_class(40 * 16, page_size), page_size)
    engine = Engine(RadixCache(EngineRows(8, 2048), allocator, page_size))
    chat(engine, 1, 30, 16)
    cached = engine.cache.total_size()
    assert engine.cache.evict(10**6) == cached
    assert allocator.available_size() == engine.total


@pytest.mark.parametrize("policy", ["write_through", "write_back"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_an_engines_own_pool_with_a_host_tier(page_size: int, policy: str) -> None:
    pool = EnginePool(640, page_size)
    allocator = EngineAllocator(pool, page_size)
    with HiRadixCache(
        EngineRows(8, 2048), allocator, None, page_size, 2.0, 0, policy, "kernel", "page_first_direct", config=CONFIG
    ) as cache:
        assert pool.layer_transfer_counter is cache.cache_controller.layer_done_counter
        engine = Engine(cache, chunk=48)
        chat(engine, 2, 40, 16)
        assert engine.tokens["host"] > 0
        settle(cache)
        while cache.evict(10**6):
            pass
        assert allocator.available_size() == engine.total


def test_a_load_in_a_free_group_waits_for_the_groups_end() -> None:
    """What is evicted inside a free group is not free yet: the load is refused, and nothing is lost."""
    allocator = EngineAllocator(EnginePool(64, 4), 4)
    with HiRadixCache(
        EngineRows(2, 64), allocator, None, 4, 4.0, 0, "write_through", "kernel", "layer_first", config=CONFIG
    ) as cache:
        engine = Engine(cache)
        first, second = list(range(40)), list(range(100, 140))
        engine.run(Req("a", first, 1))
        settle(cache)
        engine.run(Req("b", second, 1))
        settle(cache)
        found = cache.match_prefix(first)
        assert found.host_hit_length == 40
        allocator.free_group_begin()
        assert cache.load_back(found.last_host_node) is None
        allocator.free_group_end()
        assert len(cache.load_back(found.last_host_node)) == 40
        cache.ready_to_load_host_cache()
        settle(cache)
        engine.bytes.check(first, cache.match_prefix(first).device_indices)
        cache.check_integrity()
