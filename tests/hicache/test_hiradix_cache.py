"""HiRadixCache, method by method, and every edge that hicache.md names."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from radixkv.controller import Attribution, ControllerConfig
from radixkv.errors import (
    HandleError,
    InvalidArgumentError,
    LoadError,
    StateError,
    StorageError,
    TransferError,
    UnsupportedLayoutError,
)
from radixkv.hicache import (
    HiCacheConfig,
    HiRadixCache,
    MHATokenToKVPoolHost,
    MLATokenToKVPoolHost,
    PagedTokenToKVPoolAllocator,
    RadixCache,
    ReqToTokenPool,
    cache_controller,
    get_hash_str,
)
from radixkv.hicache.config import MODEL_VARIABLE
from radixkv.storage import MemoryStorage

from ..controller.kit import on_ranks
from .kit import CONFIG, allocator_of, device_pool, hiradix_cache, settle, take
from .scheduler import Bytes, Req

MANY = 10**6


@pytest.fixture
def make() -> Iterator[Any]:
    """Makes caches, and closes them."""
    made: list[HiRadixCache] = []

    def cache(*args: Any, **more: Any) -> HiRadixCache:
        made.append(hiradix_cache(*args, **{"load_back_threshold": 1, **more}))
        return made[-1]

    yield cache
    for one in made:
        one.close()


def put(cache: HiRadixCache, key: list[int]) -> torch.Tensor:
    """Insert a key with KV of its own, free the duplicates, and settle; its slots."""
    slots = take(cache, len(key))
    Bytes(cache.kv_cache).write(key, 0, slots)
    cache.token_to_kv_pool_allocator.free(slots[: cache.insert(key, slots)])
    settle(cache)
    return slots


def to_host(cache: HiRadixCache, *keys: list[int]) -> None:
    """Put keys, and take them off the device."""
    for key in keys:
        put(cache, key)
    cache.evict(MANY)
    assert cache.total_size() == 0


def load(cache: HiRadixCache, key: list[int], **more: Any) -> Any:
    """match, load back, start, settle: the slots and the node."""
    found = cache.match_prefix(key)
    slots, node = cache.init_load_back(found.last_host_node, found.host_hit_length, **more)
    index = cache.ready_to_load_host_cache()
    counter = cache.cache_controller.layer_done_counter
    counter.set_consumer(index)
    for layer in range(counter.num_layers):
        counter.wait_until(layer)
    settle(cache)
    return torch.cat([found.device_indices, slots]), node


KEY = list(range(32))


# ---- write, evict, load ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["mha", "mla"])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_there_and_back(make: Any, kind: str, page_size: int) -> None:
    cache = make(128, page_size, kind)
    put(cache, KEY)
    node = cache.match_prefix(KEY).last_device_node
    assert (node.backuped, node.evicted, node.lock_ref) == (True, False, 0)
    assert cache.evict(1) == 32
    found = cache.match_prefix(KEY)
    assert (len(found.device_indices), found.host_hit_length) == (0, 32)
    assert found.last_device_node == cache.root_node
    assert found.last_host_node == node
    assert (node.backuped, node.evicted) == (True, True)
    for buffers in Bytes(cache.kv_cache).halves:
        for buffer in buffers:
            buffer[:] = 0
    slots, last = load(cache, KEY)
    assert last == node
    assert not node.evicted
    assert node.value.tolist() == slots.tolist()
    Bytes(cache.kv_cache).check(KEY, slots)
    cache.check_integrity()


def test_write_through_selective_backs_up_at_the_third_hit(make: Any) -> None:
    cache = make(policy="write_through_selective")
    for hit in (1, 2, 3):
        assert not cache.match_prefix(KEY).last_device_node.backuped
        put(cache, KEY)
        assert cache.match_prefix(KEY).last_device_node.hit_count == hit
    assert cache.match_prefix(KEY).last_device_node.backuped
    assert (cache.write_through_threshold, cache.write_through_threshold_storage) == (3, 3)


def test_write_back_writes_at_eviction(make: Any) -> None:
    cache = make(policy="write_back")
    for _ in range(5):
        put(cache, KEY)
    node = cache.match_prefix(KEY).last_device_node
    cache.inc_hit_count(node)
    settle(cache)
    assert not node.backuped
    assert cache.evict(1) == 32
    assert (node.backuped, node.evicted) == (True, True)
    slots, _ = load(cache, KEY)
    Bytes(cache.kv_cache).check(KEY, slots)


def test_write_back_drops_what_finds_no_room(make: Any) -> None:
    cache = make(64, 4, policy="write_back", host=0.25)
    put(cache, KEY)
    assert cache.evict(1) == 32
    assert cache.match_prefix(KEY).host_hit_length == 0
    assert cache.cache_controller.core.stats().dropped_tokens == 32
    cache.check_integrity()


def test_write_backup(make: Any) -> None:
    cache = make(policy="write_through_selective")
    put(cache, KEY)
    node = cache.match_prefix(KEY).last_device_node
    before = cache.evictable_size()
    assert cache.write_backup(node) == 32
    assert (cache.evictable_size(), cache.protected_size(), node.lock_ref) == (before - 32, 32, 1)
    assert cache.write_backup(node) == 0, "one copy at a time"
    cache.writing_check(write_back=True)
    assert (node.backuped, node.lock_ref, cache.evictable_size()) == (True, 0, before)
    assert cache.write_backup(node) == 0, "it has a copy"
    assert cache.write_backup(cache.root_node) == 0
    assert node.host_value.tolist() != []


def test_write_backup_without_room(make: Any) -> None:
    cache = make(64, 4, policy="write_through_selective", host=0.5)
    first, second = [1] * 32, [2] * 32
    put(cache, first)
    put(cache, second)
    nodes = [cache.match_prefix(key).last_device_node for key in (first, second)]
    assert cache.write_backup(nodes[0]) == 32
    settle(cache)
    assert cache.write_backup(nodes[1]) == 0, "the host is full, and its pages are still on the device"
    cache.match_prefix(second)
    assert cache.evict(32) == 32
    assert cache.write_backup(nodes[1]) == 32, "what is on the host only makes room"
    settle(cache)
    with pytest.raises(HandleError):
        _ = nodes[0].key


def test_inc_hit_count_starts_a_backup(make: Any) -> None:
    cache = make(policy="write_through_selective")
    put(cache, KEY)
    put(cache, KEY)
    node = cache.match_prefix(KEY).last_device_node
    cache.inc_hit_count(node)
    settle(cache)
    assert node.backuped


def test_an_evicted_node_takes_up_what_is_computed_again(make: Any) -> None:
    cache = make(128, 4)
    put(cache, KEY)
    put(cache, KEY + [70] * 16)
    cache.evict(MANY)
    slots = take(cache, 48)
    assert cache.insert(KEY + [70] * 16, slots) == 0, "all of it counts as new"
    found = cache.match_prefix(KEY + [70] * 16)
    assert found.device_indices.tolist() == slots.tolist()
    assert found.last_device_node.backuped
    assert found.last_device_node.parent.backuped
    assert cache.evict(16) == 16
    slots = take(cache, 48)
    assert cache.insert(KEY + [70] * 16, slots) == 32
    cache.token_to_kv_pool_allocator.free(slots[:32])
    settle(cache)
    cache.check_integrity()
    assert cache.total_size() == 48


def test_evict_host_takes_what_is_on_the_host_only(make: Any) -> None:
    cache = make(256, 4)
    upper, lower = [1] * 16, [1] * 16 + [2] * 16
    for key in (upper, lower, [3] * 16):
        put(cache, key)
    host = cache.token_to_kv_pool_host
    free = host.available_size()
    assert cache.evict_host(MANY) == 0, "all of it is on the device"
    cache.evict(16)
    assert cache.evict_host(1) == 16
    cache.evict(MANY)
    left = [key for key in (lower, [3] * 16) if cache.match_prefix(key).host_hit_length == len(key)]
    assert len(left) == 1, "one of the two leaves is gone"
    node = cache.match_prefix(left[0]).last_host_node
    node.protect_host()
    assert node.host_ref_counter == 1
    assert cache.evict_host(MANY) == (16 if left == [[3] * 16] else 0), "what is above a protected node stays"
    assert cache.match_prefix(left[0]).host_hit_length == len(left[0])
    node.release_host()
    cache.evict_host(MANY)
    assert host.available_size() == host.size
    assert free == host.size - 48


def test_load_back_is_all_or_nothing(make: Any) -> None:
    cache = make(64, 4, host=4)
    to_host(cache, KEY)
    found = cache.match_prefix(KEY)
    held = take(cache, 36)
    assert cache.load_back(found.last_host_node) is None, "28 slots are free"
    slots, node = cache.init_load_back(found.last_host_node, found.host_hit_length)
    assert len(slots) == 0
    assert slots.dtype == torch.int64
    assert node == cache.root_node
    assert cache.token_to_kv_pool_allocator.available_size() == 28
    assert found.last_host_node.host_ref_counter == 0
    cache.token_to_kv_pool_allocator.free(held)
    assert len(cache.load_back(found.last_host_node)) == 32
    settle_loads(cache)


def settle_loads(cache: HiRadixCache) -> None:
    cache.ready_to_load_host_cache()
    settle(cache)


def test_load_back_makes_room(make: Any) -> None:
    cache = make(64, 4, host=4)
    to_host(cache, KEY)
    put(cache, [9] * 48)
    slots, _ = load(cache, KEY)
    Bytes(cache.kv_cache).check(KEY, slots)
    assert len(cache.match_prefix([9] * 48).device_indices) == 0


def test_load_back_below_the_threshold(make: Any) -> None:
    cache = make(page_size=1, load_back_threshold=10)
    assert cache.load_back_threshold == 10
    to_host(cache, KEY)
    for length, loaded in ((9, 0), (10, 10)):
        node = cache.match_prefix(KEY[:length]).last_host_node
        slots, last = cache.init_load_back(node, length)
        assert len(slots) == loaded
        assert (last == node) == bool(loaded)
    settle_loads(cache)


def test_the_quota_counts_what_locking_the_path_takes(make: Any) -> None:
    cache = make(128, 4)
    put(cache, KEY)
    put(cache, KEY + [7] * 16)
    cache.evict(16)
    node = cache.match_prefix(KEY + [7] * 16).last_host_node
    assert cache.load_back(node, 15) is None
    assert cache.load_back(node, 16 + 31) is None, "32 tokens above become unevictable"
    assert len(cache.load_back(node, 16 + 32)) == 16
    settle_loads(cache)
    cache.evict(16)
    above = cache.match_prefix(KEY).last_device_node
    cache.inc_lock_ref(above)
    assert len(cache.load_back(node, 16)) == 16, "as it is locked already, that costs nothing"
    cache.dec_lock_ref(above)
    settle_loads(cache)


def test_a_quota_may_cut_a_load(make: Any) -> None:
    cache = make(128, 4, load_policy="longest_prefix")
    to_host(cache, KEY)
    found = cache.match_prefix(KEY)
    slots, node = cache.init_load_back(found.last_host_node, 32, mem_quota=13)
    assert len(slots) == 12
    assert node.key == KEY[:12]
    settle_loads(cache)
    found = cache.match_prefix(KEY)
    assert (len(found.device_indices), found.host_hit_length) == (12, 20)
    Bytes(cache.kv_cache).check(KEY[:12], found.device_indices)


def test_init_load_back_of_what_is_on_the_device(make: Any) -> None:
    cache = make()
    put(cache, KEY)
    node = cache.match_prefix(KEY).last_device_node
    slots, last = cache.init_load_back(node, 0)
    assert (len(slots), last) == (0, node)
    slots, last = cache.init_load_back(cache.root_node, 0)
    assert (len(slots), last) == (0, cache.root_node)


def test_what_is_loading_is_protected_and_matches(make: Any) -> None:
    cache = make(128, 4)
    to_host(cache, KEY)
    found = cache.match_prefix(KEY)
    slots, node = cache.init_load_back(found.last_host_node, 32)
    assert node.loading
    assert cache.match_prefix(KEY).device_indices.tolist() == slots.tolist()
    assert (cache.evictable_size(), cache.protected_size()) == (0, 32)
    assert cache.evict(MANY) == cache.evict_host(MANY) == 0
    cache.inc_lock_ref(node)
    settle_loads(cache)
    assert not node.loading
    assert node.host_ref_counter == 0
    assert cache.protected_size() == 32
    cache.dec_lock_ref(node)
    assert cache.evictable_size() == 32


def test_insert_over_a_load_keeps_the_loading_pages(make: Any) -> None:
    """The slots that a copy in flight writes are the tree's; the caller frees its own."""
    cache = make(128, 4)
    to_host(cache, KEY)
    loading, _ = cache.init_load_back(cache.match_prefix(KEY).last_host_node, 32)
    mine = take(cache, 32)
    assert cache.insert(KEY, mine) == 32
    assert cache.match_prefix(KEY).device_indices.tolist() == loading.tolist()
    cache.token_to_kv_pool_allocator.free(mine)
    settle_loads(cache)
    Bytes(cache.kv_cache).check(KEY, loading)


# ---- layers ----------------------------------------------------------------------------------------------------------
def test_the_index_of_a_batch(make: Any) -> None:
    cache = make(128, 4)
    counter = cache.cache_controller.layer_done_counter
    assert cache.kv_cache.layer_transfer_counter is counter
    assert cache.ready_to_load_host_cache() == 0, "nothing was queued"
    assert counter.next_producer() == 1
    counter.set_consumer(0)
    counter.wait_until(0)
    to_host(cache, KEY, [9] * 16)
    cache.load_back(cache.match_prefix(KEY).last_host_node)
    assert cache.ready_to_load_host_cache() == 1
    again = cache.ready_to_load_host_cache()
    assert again in (0, 1), "the last one, while it is on its way"
    counter.set_consumer(1)
    assert counter.consumer_index == 1
    counter.wait_until(2)
    cache.kv_cache.get_key_buffer(2)
    settle(cache)
    assert cache.ready_to_load_host_cache() == 0
    cache.load_back(cache.match_prefix([9] * 16).last_host_node)
    assert cache.ready_to_load_host_cache() == 2
    counter.set_consumer(-1)
    assert counter.consumer_index == 0
    settle(cache)


def test_who_matches_pages_that_are_on_their_way_waits_for_them(make: Any) -> None:
    cache = make(128, 4)
    to_host(cache, KEY)
    cache.load_back(cache.match_prefix(KEY).last_host_node)
    assert cache.ready_to_load_host_cache() == 1
    assert len(cache.match_prefix(KEY).device_indices) == 32
    assert cache.ready_to_load_host_cache() == 1, "nothing new, but batch 1 has not been settled"
    settle(cache)
    assert cache.ready_to_load_host_cache() == 0


# ---- storage ---------------------------------------------------------------------------------------------------------
LONG = [*range(1000, 1064)]


def to_storage(cache: HiRadixCache, key: list[int]) -> None:
    """Store a key, and forget it on device and host."""
    put(cache, key)
    put(cache, key)
    node = cache.match_prefix(key).last_device_node
    if not node.backuped_storage:
        cache.write_backup_storage(node)
        settle(cache)
    assert node.backuped_storage
    cache.evict(MANY)
    cache.evict_host(MANY)
    assert cache.match_prefix(key).host_hit_length == 0


def prefetch(cache: HiRadixCache, rid: str, key: list[int]) -> Any:
    found = cache.match_prefix(key)
    matched = len(found.device_indices) + found.host_hit_length
    node = found.last_host_node
    return cache.prefetch_from_storage(rid, node, key[matched:], node.get_last_hash_value())


def until_done(cache: HiRadixCache, rid: str) -> None:
    deadline = time.monotonic() + 10
    while not cache.check_prefetch_progress(rid):
        assert time.monotonic() < deadline
        cache.check_hicache_events()
        time.sleep(0.0005)


@pytest.mark.parametrize("policy", ["wait_complete", "timeout", "best_effort"])
def test_storage_and_back(make: Any, policy: str) -> None:
    cache = make(256, 4, storage=MemoryStorage(), prefetch=policy, prefetch_threshold=4, prefetch_timeout_base_s=5)
    assert cache.enable_storage
    assert cache.prefetch_stop_policy == policy
    to_storage(cache, LONG)
    operation = prefetch(cache, "r", [*LONG, 1])
    assert operation.request_id == "r"
    deadline = time.monotonic() + 10
    while not operation.is_done():
        assert cache.can_terminate_prefetch(operation) == (policy == "best_effort") or operation.completed_tokens
        cache.check_hicache_events()
        assert time.monotonic() < deadline
    assert operation.completed_tokens == 64
    until_done(cache, "r")
    assert operation.is_done()
    found = cache.match_prefix(LONG)
    assert (len(found.device_indices), found.host_hit_length) == (0, 64)
    assert found.last_host_node.backuped_storage
    slots, _ = load(cache, LONG)
    Bytes(cache.kv_cache).check(LONG, slots)
    cache.check_integrity()


def test_page_hashes_are_those_of_the_whole_path(make: Any) -> None:
    cache = make(256, 4, storage=MemoryStorage())
    put(cache, LONG)
    put(cache, LONG[:32] + [5] * 8)
    hashes, last = [], None
    for at in range(0, 64, 4):
        last = get_hash_str(LONG[at : at + 4], last)
        hashes.append(last)
    node = cache.match_prefix(LONG).last_device_node
    assert node.get_last_hash_value() == hashes[-1]
    assert node.parent.get_last_hash_value() == hashes[7]
    cache.write_backup_storage(node)
    settle(cache)
    assert node.hash_value == hashes[8:], "also if the parent is not in storage"
    assert cache.root_node.get_last_hash_value() is None
    assert cache.root_node.hash_value is None


def test_the_hash_of_a_page_is_sglangs() -> None:
    import hashlib

    first = hashlib.sha256(b"".join(token.to_bytes(4, "little") for token in (1, 2, 3)))
    assert get_hash_str([1, 2, 3]) == first.hexdigest()
    second = hashlib.sha256(first.digest() + (2**30).to_bytes(4, "little"))
    assert get_hash_str([2**30], get_hash_str([1, 2, 3])) == second.hexdigest()
    assert get_hash_str([]) == hashlib.sha256(b"").hexdigest()


def test_hits_drive_a_node_to_storage(make: Any) -> None:
    cache = make(256, 4, storage=MemoryStorage(), write_through_threshold_storage=2)
    put(cache, LONG)
    node = cache.match_prefix(LONG).last_device_node
    assert (node.backuped, node.backuped_storage, node.hash_value) == (True, False, None)
    put(cache, LONG)
    assert node.backuped_storage
    assert cache.write_backup_storage(node) is None, "it is stored"


def test_prefetch_is_refused_below_the_threshold(make: Any) -> None:
    cache = make(256, 4, storage=MemoryStorage())
    assert cache.prefetch_threshold == 256
    assert prefetch(cache, "r", LONG) is None
    assert cache.check_prefetch_progress("r"), "there is none to wait for"
    assert cache.check_prefetch_progress("never heard of")


def test_prefetch_of_what_is_not_there_is_revoked(make: Any) -> None:
    cache = make(256, 4, storage=MemoryStorage(), prefetch="wait_complete", prefetch_threshold=4)
    assert prefetch(cache, "r", LONG) is not None
    deadline = time.monotonic() + 10
    while not cache.check_hicache_events().revoked:
        assert time.monotonic() < deadline
    assert cache.check_prefetch_progress("r")
    assert cache.match_prefix(LONG).host_hit_length == 0
    cache.check_integrity()


def test_a_prefetch_may_be_given_up(make: Any) -> None:
    cache = make(256, 4, storage=MemoryStorage(), prefetch="wait_complete", prefetch_threshold=4)
    to_storage(cache, LONG)
    operation = prefetch(cache, "a", LONG)
    operation.mark_done()
    assert operation.is_done()
    assert prefetch(cache, "b", LONG) is not None
    cache.cancel_prefetch("b")
    cache.cancel_prefetch("never heard of")
    settle(cache)
    assert cache.match_prefix(LONG).host_hit_length == 0
    cache.check_integrity()


def test_storage_that_comes_and_goes(make: Any) -> None:
    cache = make(256, 4)
    put(cache, LONG)
    node = cache.match_prefix(LONG).last_device_node
    assert not cache.enable_storage
    assert node.get_last_hash_value() is None
    assert cache.write_backup_storage(node) is None
    assert cache.cache_controller.storage_backend is None
    storage = MemoryStorage()
    cache.attach_storage_backend(storage)
    assert cache.cache_controller.storage_backend is storage
    with pytest.raises(StateError):
        cache.attach_storage_backend(storage)
    assert len(node.get_last_hash_value()) == 64
    cache.write_backup_storage(node)
    settle(cache)
    assert node.backuped_storage
    cache.detach_storage_backend()
    assert not node.backuped_storage
    cache.detach_storage_backend()
    assert storage.stats()["values"] == 16, "what is stored stays, and the backend is its owner's"
    cache.attach_storage_backend("memory")
    assert cache.enable_storage


def test_all_ranks_have_storage_or_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A rank that cannot make its own would refuse prefetches that the others begin: they would part for good."""
    monkeypatch.setattr(cache_controller, "group_of", lambda group, *_: group)
    (tmp_path / "1").write_text("no folder")

    def run(group: Any) -> list[bool]:
        options = {"path": str(tmp_path / str(group.rank))}
        with hiradix_cache(64, 4, group=group, config=replace(CONFIG, storage_options=options)) as cache:
            with pytest.raises(StorageError, match="cannot be used" if group.rank == 1 else "another rank"):
                cache.attach_storage_backend("file")
            begun = cache.prefetch_from_storage("r", cache.root_node, list(range(300)))
            cache.check_hicache_events()
            return [cache.enable_storage, begun is not None]

    assert on_ranks(3, run) == [[False, False]] * 3


def test_storage_needs_a_model(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MODEL_VARIABLE, raising=False)
    nameless = replace(CONFIG, model="")
    with pytest.raises(InvalidArgumentError, match=MODEL_VARIABLE):
        make(storage="memory", config=nameless)
    monkeypatch.setenv(MODEL_VARIABLE, "from the environment")
    assert make(storage="memory", config=nameless).enable_storage


def test_two_models_share_no_page(make: Any) -> None:
    storage = MemoryStorage()
    first = make(256, 4, storage=storage)
    to_storage(first, LONG)
    second = make(256, 4, storage=storage, config=replace(CONFIG, model="another"), prefetch_threshold=4,
                  prefetch="wait_complete")  # fmt: skip
    prefetch(second, "r", LONG)
    until_done(second, "r")
    assert second.match_prefix(LONG).host_hit_length == 0


def test_the_folder_of_files(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR", str(tmp_path / "a"))
    cache = make(256, 4, storage="file")
    to_storage(cache, LONG)
    assert (tmp_path / "a").is_dir()
    make(256, 4, storage="file", config=replace(CONFIG, storage_options={"path": tmp_path / "b"}))
    assert (tmp_path / "b").is_dir()
    monkeypatch.delenv("SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR")
    monkeypatch.setenv("RADIXKV_CACHE_DIR", str(tmp_path / "c"))
    make(256, 4, storage="file")
    assert (tmp_path / "c" / "kv").is_dir()


def test_the_folder_of_nixl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's --hicache-storage-backend nixl has no option for it."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(cache_controller, "create_storage", lambda name, **options: asked.update(options))
    monkeypatch.setenv("SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR", str(tmp_path))
    cache_controller.storage_of("nixl", CONFIG)
    assert asked == {"path": str(tmp_path)}


def test_attribution(make: Any) -> None:
    cache = make(256, 4, storage=MemoryStorage(), prefetch="wait_complete", prefetch_threshold=4)
    to_storage(cache, LONG)
    prefetch(cache, "r", LONG)
    settle(cache)
    until_done(cache, "r")
    found = cache.match_prefix(LONG)
    slots, _ = cache.init_load_back(found.last_host_node, found.host_hit_length)
    assert cache.attribute("r", 70, found, len(slots)) == Attribution(0, 0, 64, 6)
    settle_loads(cache)
    found = cache.match_prefix(LONG[:32])
    assert cache.attribute("s", 40, found) == Attribution(32, 0, 0, 8)
    stats = cache.cache_controller.core.stats()
    assert (stats.device_tokens, stats.storage_tokens, stats.computed_tokens) == (32, 64, 14)


class Registering(MemoryStorage):
    """Knows which memory is registered; may hang in an exists_many."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: list[int] = []
        self.go, self.inside, self.closed = threading.Event(), threading.Event(), False
        self.go.set()

    def register(self, memory: Any) -> None:
        self.memory.append(memory.ctypes.data)

    def unregister(self, memory: Any) -> None:
        self.memory.remove(memory.ctypes.data)

    def exists_many(self, keys: Any, *, timeout_s: float | None = None) -> Any:
        self.inside.set()
        assert self.go.wait(30)
        return super().exists_many(keys)

    def close(self) -> None:
        self.closed = True


def test_a_backend_knows_the_host_memory_while_it_is_attached(make: Any) -> None:
    """Else Mooncake copies each page once more, and NIXL registers each page for each call."""
    storage = Registering()
    cache = make(storage=storage)
    for _ in range(2):
        assert storage.memory == [cache.token_to_kv_pool_host.arena.address]
        with pytest.raises(StateError, match="already"):
            cache.attach_storage_backend(Registering())
        cache.detach_storage_backend()
        assert storage.memory == []
        cache.attach_storage_backend(storage)
    cache.close()
    assert storage.memory == []
    assert not storage.closed  # it is the caller's


@pytest.mark.parametrize("how", ["detach", "close"])
def test_a_backend_that_hangs_is_not_closed(make: Any, how: str) -> None:
    cache = make(
        storage="tests.hicache.test_hiradix_cache:Registering", close_timeout_s=0.05, prefetch_threshold=1
    )
    storage = cache.cache_controller.storage_backend
    storage.go.clear()
    cache.prefetch_from_storage("r", cache.root_node, KEY)
    assert storage.inside.wait(30)
    (cache.detach_storage_backend if how == "detach" else cache.close)()
    assert not storage.closed
    assert storage.memory
    storage.go.set()


def test_one_that_hangs_does_not_keep_another_from_being_closed(make: Any) -> None:
    """And it is closed itself, once its call has returned."""
    name = "tests.hicache.test_hiradix_cache:Registering"
    cache = make(storage=name, close_timeout_s=0.05, prefetch_threshold=1)
    hanging = cache.cache_controller.storage_backend
    hanging.go.clear()
    cache.prefetch_from_storage("r", cache.root_node, KEY)
    assert hanging.inside.wait(30)
    cache.detach_storage_backend()
    cache.attach_storage_backend(name)
    healthy = cache.cache_controller.storage_backend
    cache.detach_storage_backend()
    assert healthy.closed
    assert healthy.memory == []
    assert not hanging.closed
    hanging.go.set()
    while not cache.close():
        pass
    assert hanging.closed
    assert hanging.memory == []


# ---- reset and the end -----------------------------------------------------------------------------------------------
def test_reset_frees_the_host_and_leaves_the_device_to_the_engine(make: Any) -> None:
    cache = make(128, 4, storage=MemoryStorage(), prefetch="wait_complete", prefetch_threshold=4)
    allocator, host = cache.token_to_kv_pool_allocator, cache.token_to_kv_pool_host
    to_storage(cache, LONG)
    to_host(cache, KEY)
    put(cache, [5] * 16)
    cache.insert([6] * 16, take(cache, 16))
    cache.load_back(cache.match_prefix(KEY).last_host_node)
    prefetch(cache, "r", LONG)
    cache.reset()
    settle(cache)
    assert host.available_size() == host.size
    assert cache.total_size() == cache.protected_size() == 0
    assert allocator.available_size() == 128 - 64
    allocator.clear()
    assert cache.check_prefetch_progress("r")
    assert cache.ready_to_load_host_cache() == 0
    cache.check_integrity()
    slots = put(cache, KEY)
    assert cache.match_prefix(KEY).device_indices.tolist() == slots.tolist()
    assert cache.match_prefix(KEY).last_device_node.backuped


def test_reset_waits_for_a_copy_that_writes_to_the_device(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pages may not go to the engine before; without an end there is an error."""
    import threading

    cache = make(128, 4, settle_timeout_s=0, copy_timeout_s=0.05)
    to_host(cache, KEY)
    allocator = cache.token_to_kv_pool_allocator
    gate, begun = threading.Event(), threading.Event()
    mover = cache.cache_controller.core._context.mover
    inner = mover._to_device

    class Slow:
        def copy(self, *args: Any) -> None:
            begun.set()
            gate.wait(10)
            inner.copy(*args)

    monkeypatch.setattr(mover, "_to_device", Slow())
    cache.load_back(cache.match_prefix(KEY).last_host_node)
    cache.ready_to_load_host_cache()
    assert begun.wait(10)
    for _ in range(2):
        with pytest.raises(StateError, match=r"^8 device pages are being written"):
            cache.reset()
    gate.set()
    cache.reset()
    allocator.clear()
    settle(cache)  # nothing of before the reset comes back to the allocator
    cache.check_integrity()
    assert allocator.available_size() == 128


def test_close_ends_the_threads() -> None:
    import threading

    before = set(threading.enumerate())
    with hiradix_cache(128, 4, storage="memory", load_back_threshold=1) as cache:
        to_host(cache, KEY)
        load(cache, KEY)
        assert set(threading.enumerate()) - before
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("radixkv")]
    cache.close()


# ---- the constructor -------------------------------------------------------------------------------------------------
def construct(allocator: Any = None, **changes: Any) -> HiRadixCache:
    arguments: dict[str, Any] = {
        "req_to_token_pool": ReqToTokenPool(2, 64), "tp_cache_group": None, "page_size": 4, "hicache_ratio": 2.0,
        "hicache_size": 0, "hicache_write_policy": "write_through", "hicache_io_backend": "kernel",
        "hicache_mem_layout": "layer_first", "config": CONFIG,
        "token_to_kv_pool_allocator": allocator or allocator_of(device_pool("mha", 64, 4), 4), **changes,
    }  # fmt: skip
    return HiRadixCache(**arguments)


@pytest.mark.parametrize(("kind", "host"), [("mha", MHATokenToKVPoolHost), ("mla", MLATokenToKVPoolHost)])
def test_the_host_pool_fits_the_device_pool(kind: str, host: type) -> None:
    with construct(allocator_of(device_pool(kind, 64, 4), 4)) as cache:
        pool = cache.token_to_kv_pool_host
        assert isinstance(pool, host)
        assert pool.size == 128
        controller = cache.cache_controller
        assert controller.mem_pool_host is pool
        assert controller.mem_pool_device is cache.kv_cache
        assert controller.mem_pool_device_allocator is cache.token_to_kv_pool_allocator
        assert (controller.write_policy, controller.io_backend, controller.page_size) == ("write_through", "kernel", 4)


def test_a_host_pool_by_its_size_and_smaller_than_the_device() -> None:
    token_bytes = 2 * 3 * 2 * 4 * 2
    with construct(hicache_size=token_bytes * 18 / 1e9) as cache:
        assert cache.token_to_kv_pool_host.size == 16
        assert cache.cache_controller.core._prefetches.capacity_tokens >= 0


@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct", "page_head"])
@pytest.mark.parametrize("io_backend", ["kernel", "direct", "auto"])
def test_layouts_and_io_backends(layout: str, io_backend: str, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.WARNING, "radixkv"),
        construct(hicache_mem_layout=layout, hicache_io_backend=io_backend) as cache,
    ):
        falls_back = (layout, io_backend) == ("page_first", "direct")
        assert cache.token_to_kv_pool_host.layout == ("layer_first" if falls_back else layout)
        assert len(caplog.records) == falls_back


@pytest.mark.parametrize(("name", "value"), [
    ("hicache_write_policy", "write_never"), ("hicache_io_backend", "pigeon"), ("hicache_mem_layout", "random"),
    ("hicache_storage_prefetch_policy", "hope"), ("hicache_storage_backend", "no such"), ("page_size", 0),
    ("hicache_ratio", 0),
])  # fmt: skip
def test_settings_that_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        construct(**{name: value})
    assert isinstance(caught.value, InvalidArgumentError)


def test_no_prefetch_policy_is_the_default() -> None:
    with construct(hicache_storage_prefetch_policy=None) as cache:
        assert cache.prefetch_stop_policy == "best_effort"


def test_other_kinds_of_pools() -> None:
    class Neither:
        size, device = 64, "cpu"

    with pytest.raises(ValueError, match="neither k_buffer and v_buffer") as caught:
        construct(PagedTokenToKVPoolAllocator(64, 4, torch.float16, "cpu", Neither()))
    assert isinstance(caught.value, UnsupportedLayoutError)


def test_nothing_is_kept_of_a_cache_that_could_not_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    closed = []
    close = MHATokenToKVPoolHost.close
    monkeypatch.setattr(MHATokenToKVPoolHost, "close", lambda self: (closed.append(self), close(self)))
    before = set(threading.enumerate())
    for wrong in ({"hicache_storage_backend": "no such"}, {"hicache_io_backend": "pigeon"}):
        with pytest.raises(InvalidArgumentError):
            construct(**wrong)
    assert len(closed) == 2
    assert set(threading.enumerate()) == before


def test_settings_go_to_the_controller() -> None:
    config = HiCacheConfig(
        control=ControllerConfig(write_policy="write_back", load_back_threshold=77, prefetch_policy="timeout"),
        host_pool=CONFIG.host_pool, model="m",
    )  # fmt: skip
    with construct(config=config) as cache:
        control = cache.cache_controller.core.config
        assert (control.write_policy, control.prefetch_policy) == ("write_through", "best_effort")
        assert cache.load_back_threshold == control.load_back_threshold == 77
    with pytest.raises(TypeError):
        HiCacheConfig(unknown=1)  # type: ignore[call-arg]


def test_checks_under_their_old_names(make: Any) -> None:
    cache = make(128, 4)
    slots = take(cache, 32)
    cache.insert(KEY, slots)
    deadline = time.monotonic() + 10
    while not cache.match_prefix(KEY).last_device_node.backuped:
        for check in (cache.writing_check, cache.loading_check, cache.check_revoked_prefetch,
                      cache.check_backup_progress):  # fmt: skip
            check()
        assert time.monotonic() < deadline


@pytest.mark.parametrize("page_size", [1, 2, 8])
def test_pages_of_another_size_than_the_allocators_are_refused(page_size: int) -> None:
    """It would free a page of its own when a part of it is evicted, and hand out what is still cached."""
    allocator = allocator_of(device_pool("mha", 64, 4), 4)
    with pytest.raises(InvalidArgumentError, match=f"pages of {page_size} tokens in the cache, of 4 in the allocator"):
        hiradix_cache(64, page_size, allocator=allocator)
    with pytest.raises(InvalidArgumentError, match="in the allocator"):
        RadixCache(None, allocator, page_size)


def test_who_goes_over_to_pages_that_are_being_loaded_waits_for_them() -> None:
    """A request has computed what another one loads meanwhile. The cache keeps the latter's pages, and the load fails:
    the next step of the former, which loads nothing itself, must not read them."""
    cache = hiradix_cache(64, 4, load_back_threshold=1)
    tokens = list(range(100, 116))
    cache.insert(tokens, take(cache, 16))
    settle(cache)
    cache.evict(16)
    rows, own = cache.req_to_token_pool, take(cache, 16)
    req = Req("a", tokens, fill_ids=tokens, req_pool_idx=rows.alloc(1)[0], last_node=cache.root_node)
    rows.write((req.req_pool_idx, slice(0, 16)), own.to(torch.int32))
    mover, counter = cache.cache_controller.core._context.mover, cache.cache_controller.layer_done_counter
    load, fail = mover.load, [True]

    def load_or_fail(*arguments: Any) -> Any:
        if fail.pop() if fail else False:
            raise TransferError("a broken link")
        return load(*arguments)

    mover.load = load_or_fail
    found = cache.match_prefix(tokens)
    cache.init_load_back(found.last_host_node, 16)
    cache.cache_unfinished_req(req)
    assert req.prefix_indices.tolist() != own.tolist()
    counter.set_consumer(0)  # decode
    with pytest.raises(LoadError, match="a broken link"):
        counter.wait_until(0)
    cache.check_hicache_events()  # it is in use, so it is loaded again
    counter.set_consumer(0)
    counter.wait_until(2)
    settle_loads(cache)
    counter.set_consumer(0)
    assert counter.consumer_index == 0
    cache.check_integrity()
    cache.close()
