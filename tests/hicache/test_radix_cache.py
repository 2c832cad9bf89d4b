"""RadixCache, method by method."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from radixkv.errors import (
    ArgumentTypeError,
    HandleError,
    InvalidArgumentError,
    LockError,
    PageOwnershipError,
    RadixKVError,
)
from radixkv.hicache import MHATokenToKVPool, PagedTokenToKVPoolAllocator, RadixCache, ReqToTokenPool, TreeNode

from .kit import radix_cache, take
from .scheduler import Req


def put(cache: RadixCache, key: list[int], **more: Any) -> torch.Tensor:
    """Insert a key with slots of its own and free the duplicates; its slots."""
    slots = take(cache, len(key) // cache.page_size * cache.page_size)
    cache.token_to_kv_pool_allocator.free(slots[: cache.insert(key, slots, **more)])
    return slots


def running(cache: RadixCache, tokens: list[int], outputs: int = 0) -> Req:
    """A request whose KV is computed: matched, locked, its row filled."""
    req = Req("r", tokens, output_ids=list(range(900, 900 + outputs)))
    req.fill_ids = tokens + req.output_ids
    found = cache.match_prefix(tokens[:-1])
    req.prefix_indices, req.last_node = found.device_indices, found.last_device_node
    cache.inc_lock_ref(req.last_node)
    rows = cache.req_to_token_pool.alloc(1)
    req.req_pool_idx = rows[0]
    extend(cache, req, len(found.device_indices), len(req.fill_ids))
    return req


def extend(cache: RadixCache, req: Req, before: int, after: int) -> None:
    """Slots for tokens before .. after of a request, in its row."""
    row = cache.req_to_token_pool.req_to_token[req.req_pool_idx]
    row[: len(req.prefix_indices)] = req.prefix_indices
    allocator = cache.token_to_kv_pool_allocator
    if cache.page_size == 1:
        slots = allocator.alloc(after - before)
    else:
        last = torch.tensor([int(row[before - 1]) if before else -1])
        slots = allocator.alloc_extend(torch.tensor([before]), torch.tensor([after]), last, after - before)
    row[before:after] = slots


# ---- match and insert ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("page_size", [1, 4])
def test_match_what_was_inserted(page_size: int) -> None:
    cache = radix_cache(page_size=page_size)
    slots = put(cache, list(range(20)))
    found = cache.match_prefix(key=list(range(30)), rid="any")
    assert found.device_indices.tolist() == slots.tolist()
    assert found.device_indices.dtype == torch.int64
    assert found.device_indices.device == torch.device("cpu")
    assert found.last_host_node == found.last_device_node != cache.root_node
    assert found.host_hit_length == 0
    indices, node, host_node, host = found
    assert (len(indices), node, host_node, host) == (20, found.last_device_node, found.last_device_node, 0)


def test_a_hit_ends_at_a_page() -> None:
    cache = radix_cache(page_size=4)
    put(cache, list(range(20)))
    for length, hit in ((3, 0), (4, 4), (7, 4), (8, 8), (19, 16), (25, 20)):
        found = cache.match_prefix(list(range(length)))
        assert len(found.device_indices) == hit
        assert (found.last_device_node == cache.root_node) == (hit == 0)


def test_nothing_is_found() -> None:
    cache = radix_cache(page_size=4)
    for key in ([], [1], [1, 2, 3, 4, 5], np.array([1, 2, 3, 4])):
        found = cache.match_prefix(key)
        assert found.device_indices.tolist() == []
        assert found.device_indices.dtype == torch.int64
        assert found.last_device_node == found.last_host_node == cache.root_node
    assert cache.total_size() == 0


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor, lambda key: np.array(key, np.int32)])
def test_keys_of_every_type(make: Any) -> None:
    cache = radix_cache(page_size=4)
    slots = take(cache, 8)
    assert cache.insert(make(list(range(8))), slots) == 0
    assert cache.match_prefix(make(list(range(8)))).device_indices.tolist() == slots.tolist()


def test_insert_returns_what_was_there() -> None:
    cache = radix_cache(page_size=4)
    first = put(cache, list(range(12)))
    second = take(cache, 16)
    key = list(range(8)) + [50] * 8
    assert cache.insert(key, second) == 8
    found = cache.match_prefix(key).device_indices
    assert found.tolist() == first[:8].tolist() + second[8:].tolist()
    assert cache.total_size() == 20


def test_a_tail_that_is_no_page_stays_the_callers() -> None:
    cache = radix_cache(page_size=4)
    slots = take(cache, 12)
    assert cache.insert(list(range(10)), slots[:10]) == 0
    assert cache.total_size() == 8
    cache.token_to_kv_pool_allocator.free(slots[8:])


def test_slots_that_are_refused() -> None:
    cache = radix_cache(page_size=4)
    slots = put(cache, list(range(8)))
    own = take(cache, 8)
    for error, key, value in (
        (InvalidArgumentError, [9] * 8, own[:4]),
        (InvalidArgumentError, [9] * 8, own + 1),
        (InvalidArgumentError, [9] * 8, None),
        (PageOwnershipError, [9] * 8, slots),
        (PageOwnershipError, [9] * 8, torch.cat([own[:4], own[:4]])),
        (ArgumentTypeError, "abcdefgh", own),
        (ArgumentTypeError, [1.5] * 8, own),
    ):
        with pytest.raises(error):
            cache.insert(key, value)
    assert cache.total_size() == 8


def test_namespaces_do_not_share() -> None:
    cache = radix_cache(page_size=4)
    first = put(cache, list(range(8)), extra_key="lora")
    assert len(cache.match_prefix(list(range(8))).device_indices) == 0
    second = put(cache, list(range(8)), cache_salt="tenant")
    assert cache.match_prefix(list(range(8)), extra_key="lora").device_indices.tolist() == first.tolist()
    assert cache.match_prefix(list(range(8)), cache_salt="tenant").device_indices.tolist() == second.tolist()


# ---- requests --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("page_size", [1, 4])
def test_a_finished_request_leaves_its_whole_pages(page_size: int) -> None:
    cache = radix_cache(page_size=page_size)
    allocator = cache.token_to_kv_pool_allocator
    req = running(cache, list(range(10)), outputs=2)
    req.output_ids.append(902)  # its KV is not there yet
    row = cache.req_to_token_pool.req_to_token[req.req_pool_idx, :12].tolist()
    cache.cache_finished_req(req)
    assert cache.total_size() == 12
    assert cache.match_prefix([*range(10), 900, 901, 902]).device_indices.tolist() == row
    assert cache.protected_size() == 0
    assert cache.req_to_token_pool.available_size() == 16
    assert allocator.available_size() + 12 == allocator.size


def test_a_partial_last_page_is_freed() -> None:
    cache = radix_cache(page_size=4)
    req = running(cache, list(range(10)), outputs=1)
    cache.cache_finished_req(req)
    allocator = cache.token_to_kv_pool_allocator
    assert (cache.total_size(), allocator.available_size()) == (8, allocator.size - 8)


def test_a_request_that_never_computed_an_output() -> None:
    cache = radix_cache(page_size=4)
    req = running(cache, list(range(9)))
    cache.cache_finished_req(req)
    assert cache.total_size() == 8
    assert cache.protected_size() == 0


@pytest.mark.parametrize("page_size", [1, 4])
def test_duplicates_of_a_finished_request_are_freed(page_size: int) -> None:
    cache = radix_cache(page_size=page_size)
    first, second = running(cache, list(range(13))), running(cache, list(range(13)))
    for req in (first, second):
        req.output_ids.append(900)
    cache.cache_finished_req(first)
    cache.cache_finished_req(second)
    allocator = cache.token_to_kv_pool_allocator
    whole = 13 // page_size * page_size
    assert cache.total_size() == whole
    assert allocator.available_size() + whole == allocator.size
    allocator.check_integrity()


@pytest.mark.parametrize("page_size", [1, 4])
def test_an_unfinished_request_goes_on_where_the_cache_ends(page_size: int) -> None:
    cache = radix_cache(page_size=page_size)
    req = running(cache, list(range(10)))
    row = cache.req_to_token_pool.req_to_token[req.req_pool_idx, :10].tolist()
    cache.cache_unfinished_req(req)
    whole = 10 // page_size * page_size
    assert cache.protected_size() == whole
    assert req.prefix_indices.tolist() == row
    assert req.prefix_indices.dtype == torch.int64
    assert req.last_node == cache.match_prefix(list(range(10))).last_device_node
    assert req.last_node.lock_ref == 1
    req.prefix_indices[0] = -5
    assert cache.req_to_token_pool.req_to_token[req.req_pool_idx, 0] == row[0], "a copy"


def test_an_unfinished_request_takes_the_caches_pages() -> None:
    """Also the slots of a page of which a part was computed in an earlier chunk, before the cache had that page."""
    cache = radix_cache(page_size=4)
    allocator = cache.token_to_kv_pool_allocator
    tokens = list(range(12))
    first = running(cache, tokens[:6])
    cache.cache_unfinished_req(first)
    assert len(first.prefix_indices) == 6
    other = put(cache, tokens)
    first.origin_input_ids = first.fill_ids = tokens
    extend(cache, first, 6, 12)
    own = cache.req_to_token_pool.req_to_token[first.req_pool_idx, :12].clone()
    cache.cache_unfinished_req(first)
    row = cache.req_to_token_pool.req_to_token[first.req_pool_idx, :12]
    assert row.tolist() == cache.match_prefix(tokens).device_indices.tolist() == first.prefix_indices.tolist()
    assert row[4:].tolist() == other[4:].tolist()
    assert row[4:6].tolist() != own[4:6].tolist(), "slots of a page that was freed"
    assert allocator.available_size() + 12 == allocator.size
    allocator.check_integrity()


def test_a_lock_moves_without_a_moment_in_between() -> None:
    cache = radix_cache(size=16, page_size=4)
    req = running(cache, list(range(8)))
    cache.cache_unfinished_req(req)
    req.origin_input_ids = req.fill_ids = list(range(16))
    extend(cache, req, 8, 16)
    locked: list[int] = []
    inc = cache.inc_lock_ref

    def inc_lock_ref(node: TreeNode) -> int:
        delta = inc(node)
        locked.append(cache.evictable_size())
        return delta

    cache.inc_lock_ref = inc_lock_ref  # type: ignore[method-assign]
    cache.cache_unfinished_req(req)
    assert locked == [0]
    assert (cache.protected_size(), cache.evictable_size()) == (16, 0)
    cache.dec_lock_ref(req.last_node)
    assert (cache.protected_size(), cache.evictable_size()) == (0, 16)


def test_an_unfinished_request_shorter_than_a_page() -> None:
    cache = radix_cache(page_size=16)
    req = running(cache, list(range(5)))
    cache.cache_unfinished_req(req)
    assert req.last_node == cache.root_node
    assert len(req.prefix_indices) == 5
    assert cache.total_size() == 0
    req.output_ids.append(900)
    cache.cache_finished_req(req)
    allocator = cache.token_to_kv_pool_allocator
    assert allocator.available_size() == allocator.size


def test_requests_bring_their_namespace() -> None:
    cache = radix_cache(page_size=4)
    req = running(cache, list(range(8)))
    req.extra_key = "lora"
    cache.cache_unfinished_req(req)
    assert len(cache.match_prefix(list(range(8))).device_indices) == 0
    assert len(cache.match_prefix(list(range(8)), extra_key="lora").device_indices) == 8
    req.output_ids.append(900)
    cache.cache_finished_req(req)
    assert cache.total_size() == 8


def test_a_disabled_cache_frees_everything() -> None:
    cache = radix_cache(page_size=4, disable=True)
    allocator = cache.token_to_kv_pool_allocator
    req = running(cache, list(range(10)))
    assert req.last_node == cache.root_node
    cache.cache_unfinished_req(req)
    req.output_ids.append(900)
    cache.cache_finished_req(req)
    assert allocator.available_size() == allocator.size
    assert cache.req_to_token_pool.available_size() == 16
    assert cache.insert(list(range(8)), take(cache, 8)) == 0
    assert len(cache.match_prefix(list(range(8))).device_indices) == 0
    assert cache.evict(100) == cache.inc_lock_ref(cache.root_node) == cache.dec_lock_ref(cache.root_node) == 0
    assert cache.evictable_size() == cache.protected_size() == cache.total_size() == 0


# ---- locks -----------------------------------------------------------------------------------------------------------
def test_lock_deltas_are_signed() -> None:
    cache = radix_cache(page_size=4)
    put(cache, list(range(16)))
    put(cache, list(range(8)) + [70] * 8)
    left = cache.match_prefix(list(range(16))).last_device_node
    right = cache.match_prefix(list(range(8)) + [70] * 8).last_device_node
    assert cache.inc_lock_ref(left) == -16
    assert cache.inc_lock_ref(right) == -8, "what they share is locked already"
    assert cache.inc_lock_ref(right) == 0
    assert (cache.evictable_size(), cache.protected_size()) == (0, 24)
    assert cache.dec_lock_ref(left) == 8
    assert cache.dec_lock_ref(right) == 0
    assert cache.dec_lock_ref(right, swa_uuid_for_lock=None) == 16
    assert (cache.evictable_size(), cache.protected_size()) == (24, 0)


def test_the_root_is_always_locked() -> None:
    cache = radix_cache()
    assert cache.root_node.lock_ref == 1
    assert cache.inc_lock_ref(cache.root_node) == 0
    assert cache.dec_lock_ref(cache.root_node) == cache.dec_lock_ref(cache.root_node) == 0


def test_a_lock_is_undone_by_its_own_node_only() -> None:
    cache = radix_cache(page_size=4)
    put(cache, list(range(16)))
    upper = cache.match_prefix(list(range(8))).last_device_node
    lower = cache.match_prefix(list(range(16))).last_device_node
    cache.inc_lock_ref(lower)
    with pytest.raises(LockError):
        cache.dec_lock_ref(upper)
    assert cache.dec_lock_ref(lower) == 16
    with pytest.raises(LockError):
        cache.dec_lock_ref(lower)


def test_a_lock_outlives_the_splits_of_its_node() -> None:
    cache = radix_cache(page_size=4)
    put(cache, list(range(32)))
    node = cache.match_prefix(list(range(32))).last_device_node
    cache.inc_lock_ref(node)
    for cut in (16, 8, 24, 4):
        put(cache, list(range(cut)) + [99] * 4)
    assert node.lock_ref == 1
    assert cache.get_height(node) == 5
    assert cache.protected_size() == 32
    assert cache.evict(1000) == 16
    assert len(cache.match_prefix(list(range(32))).device_indices) == 32
    assert cache.dec_lock_ref(node) == 32
    assert cache.evict(1000) == 32


# ---- room ------------------------------------------------------------------------------------------------------------
def test_evict_takes_the_least_recently_used_leaf() -> None:
    cache = radix_cache(page_size=4)
    allocator = cache.token_to_kv_pool_allocator
    for first in (10, 20, 30):
        put(cache, [first] * 8)
    cache.match_prefix([10] * 8)
    free = allocator.available_size()
    assert cache.evict(1) == 8
    assert allocator.available_size() == free + 8
    assert [len(cache.match_prefix([first] * 8).device_indices) for first in (10, 20, 30)] == [8, 0, 8]
    assert cache.evict(9) == 16
    assert cache.evict(5) == 0
    assert allocator.available_size() == allocator.size


def test_evict_leaves_what_is_locked() -> None:
    cache = radix_cache(page_size=4)
    put(cache, list(range(8)))
    put(cache, list(range(8)) + [5] * 8)
    node = cache.match_prefix(list(range(8))).last_device_node
    cache.inc_lock_ref(node)
    assert cache.evict(1000) == 8
    assert cache.evictable_size() == 0
    cache.dec_lock_ref(node)
    assert cache.evict(-3) == 0
    assert cache.evict(1000) == 8


def test_reset_forgets_and_leaves_the_allocator_alone() -> None:
    cache = radix_cache(page_size=4)
    allocator = cache.token_to_kv_pool_allocator
    put(cache, list(range(8)))
    node = cache.match_prefix(list(range(8))).last_device_node
    cache.inc_lock_ref(node)
    cache.reset()
    assert cache.total_size() == cache.protected_size() == cache.evictable_size() == 0
    assert allocator.available_size() == allocator.size - 8, "engines clear it themselves"
    allocator.clear()
    assert len(cache.match_prefix(list(range(8))).device_indices) == 0
    with pytest.raises(HandleError):
        cache.dec_lock_ref(node)
    put(cache, list(range(8)))
    assert cache.total_size() == 8


# ---- without an allocator --------------------------------------------------------------------------------------------
def test_a_cache_without_an_allocator_remembers_keys() -> None:
    """As the scheduler uses one for its waiting queue: values are dummies, only lengths are looked at."""
    cache = RadixCache(None, None, page_size=1)
    key = list(range(40))
    assert cache.insert(key, torch.empty(40, dtype=torch.bool)) == 0
    assert cache.insert(key[:20] + [7] * 5, torch.empty(25, dtype=torch.bool)) == 20
    assert cache.insert(key) == 40
    assert len(cache.match_prefix(rid="x", key=key).device_indices) == 40
    assert cache.total_size() == 45
    assert cache.evict(1000) == 45
    cache.insert(key)
    cache.reset()
    assert len(cache.match_prefix(key).device_indices) == 0
    assert cache.insert(key) == 0
    assert cache.match_prefix(key).device_indices.tolist() == list(range(40)), "numbers begin anew"


def test_a_cache_of_numpy_pools() -> None:
    pool = MHATokenToKVPool(64, 4, "float16", 1, 2, 2, library="numpy")
    allocator = PagedTokenToKVPoolAllocator(64, 4, "float16", "cpu", pool)
    cache = RadixCache(ReqToTokenPool(2, 64, library="numpy"), allocator, 4)
    req = Req("r", list(range(10)), fill_ids=list(range(10)))
    found = cache.match_prefix(req.fill_ids)
    assert isinstance(found.device_indices, np.ndarray)
    req.last_node, req.prefix_indices = found.last_device_node, found.device_indices
    req.req_pool_idx = cache.req_to_token_pool.alloc(1)[0]
    slots = allocator.alloc(12)
    cache.req_to_token_pool.write((req.req_pool_idx, slice(0, 10)), slots[:10])
    cache.cache_unfinished_req(req)
    assert isinstance(req.prefix_indices, np.ndarray)
    assert cache.match_prefix(list(range(10))).device_indices.tolist() == slots[:8].tolist()
    req.output_ids.append(1)
    cache.cache_finished_req(req)
    assert allocator.available_size() == 64 - 8
    assert cache.evict(100) == 8


# ---- looking ---------------------------------------------------------------------------------------------------------
def test_all_values(capsys: pytest.CaptureFixture[str]) -> None:
    cache = radix_cache(page_size=4)
    assert cache.all_values_flatten().tolist() == []
    first, second = put(cache, list(range(8))), put(cache, [9] * 4)
    assert sorted(cache.all_values_flatten().tolist()) == sorted(first.tolist() + second.tolist())
    put(cache, [0, 1, 2, 3, 50, 51, 52, 53])
    cache.pretty_print()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["0", "[]", "r=1"]
    assert lines[1:-1] == [
        "   4 [0, 1, 2, 3] r=0", "     4 [4, 5, 6, 7] r=0", "     4 [50, 51, 52, 53] r=0", "   4 [9, 9, 9, 9] r=0",
    ]  # fmt: skip
    assert lines[-1] == "#tokens: 16"


def test_height() -> None:
    cache = radix_cache(page_size=4)
    put(cache, list(range(8)))
    put(cache, list(range(12)))
    assert cache.get_height(cache.root_node) == 0
    assert cache.get_height(cache.match_prefix(list(range(8))).last_device_node) == 1
    assert cache.get_height(cache.match_prefix(list(range(12))).last_device_node) == 2


def test_settings_that_are_refused() -> None:
    with pytest.raises(InvalidArgumentError):
        RadixCache(None, None, 0)
    with pytest.raises(RadixKVError):
        RadixCache(None, None, 1, eviction_policy="none")  # type: ignore[arg-type]


def test_what_has_no_host_tier() -> None:
    cache = radix_cache()
    for call in (
        lambda: cache.init_load_back(cache.root_node, 0), cache.ready_to_load_host_cache, cache.check_hicache_events,
    ):  # fmt: skip
        with pytest.raises(NotImplementedError):
            call()
    sizes = [cache.full_evictable_size, cache.swa_evictable_size, cache.full_protected_size, cache.swa_protected_size]
    assert [size() for size in sizes] == [0, 0, 0, 0]
