"""KV events in the shape that engines publish."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from radixkv.hicache import AllBlocksCleared, BlockRemoved, BlockStored, get_hash_str

from .kit import CONFIG, hiradix_cache, radix_cache, settle, take


def test_stored_and_removed_pages() -> None:
    cache = radix_cache(page_size=4, enable_kv_cache_events=True)
    cache.reset()
    cache.take_events()
    key = list(range(12))
    cache.insert(key, take(cache, 12))
    stored = cache.take_events()
    assert [type(event) for event in stored] == [BlockStored] * 3
    assert [event.token_ids for event in stored] == [key[:4], key[4:8], key[8:]]
    assert [event.block_size for event in stored] == [4] * 3
    assert stored[0].parent_block_hash is None
    assert [event.parent_block_hash for event in stored[1:]] == [event.block_hashes[0] for event in stored[:-1]]
    assert cache.take_events() == []
    cache.match_prefix(key[:4])
    assert cache.take_events() == [], "a split moves no page"
    cache.evict(100)
    removed = cache.take_events()
    assert [type(event) for event in removed] == [BlockRemoved] * 3
    assert [event.block_hashes for event in removed] == [event.block_hashes for event in reversed(stored)]
    cache.reset()
    assert [type(event) for event in cache.take_events()] == [AllBlocksCleared]


def test_equal_pages_after_different_prefixes_have_different_names() -> None:
    cache = radix_cache(page_size=4, enable_kv_cache_events=True)
    cache.insert([1] * 4 + [9] * 4, take(cache, 8))
    cache.insert([2] * 4 + [9] * 4, take(cache, 8))
    names = [event.block_hashes[0] for event in cache.take_events() if isinstance(event, BlockStored)]
    assert len(names) == len(set(names)) == 4


def test_the_pages_of_a_tenant_are_not_everybodys() -> None:
    """With storage pages are named by SHA-256: a router that follows the events takes none for another's."""
    config = replace(CONFIG, enable_kv_cache_events=True, page_hashes=True)
    key = list(range(12))
    with hiradix_cache(64, 4, config=config) as cache:
        for namespace in ({}, {"cache_salt": "a"}, {"cache_salt": "b"}, {"extra_key": "a"}):
            cache.insert(key, take(cache, 12), **namespace)
            assert len(cache.match_prefix(key, **namespace).device_indices) == 12
        stored = [event for event in cache.take_events() if isinstance(event, BlockStored) and event.medium == "GPU"]
    names = [event.block_hashes[0] for event in stored]
    assert len(names) == 12
    assert len(set(names)) == 12
    assert [event.parent_block_hash for event in stored[::3]] == [None] * 4
    plain = [get_hash_str(key[:4])]
    plain += [get_hash_str(key[4:8], plain[0])]
    default = [name % 2**64 for name in names[:2]]
    assert default == [int(name[:16], 16) for name in plain], "the default namespace is the chain of SGLang"


def test_names_are_int64_as_those_of_the_publisher() -> None:
    cache = radix_cache(page_size=4, enable_kv_cache_events=True)
    cache.insert(list(range(128)), take(cache, 128))
    stored = cache.take_events()[-32:]
    keys = cache.tree.page_keys(cache.match_prefix(list(range(128))).last_device_node.id)
    assert max(keys) >= 1 << 63
    assert [event.block_hashes for event in stored] == [[name] for name in keys.view("int64").tolist()]
    assert [event.parent_block_hash for event in stored[1:]] == [event.block_hashes[0] for event in stored[:-1]]


def test_without_events() -> None:
    cache = radix_cache(page_size=4)
    cache.insert([1] * 4, take(cache, 4))
    assert cache.take_events() == []


def test_the_tier_is_named() -> None:
    config = replace(CONFIG, enable_kv_cache_events=True)
    with hiradix_cache(64, 4, config=config) as cache:
        cache.insert([1] * 4, take(cache, 4))
        settle(cache)
        cache.evict(4)
        cache.evict_host(4)
        events = cache.take_events()
    assert [(type(event), event.medium) for event in events if not isinstance(event, AllBlocksCleared)] == [
        (BlockStored, "GPU"), (BlockStored, "CPU"), (BlockRemoved, "GPU"), (BlockRemoved, "CPU"),
    ]  # fmt: skip


def test_the_wire_format() -> None:
    """Arrays that begin with the class's name, as SGLang's and vLLM's consumers decode them."""
    stored = BlockStored([-(2**63)], None, [1, 2], 2, None, "GPU")
    wire = msgspec.msgpack.decode(msgspec.msgpack.encode([stored, BlockRemoved([3]), AllBlocksCleared()]))
    assert wire[0] == ["BlockStored", [-(2**63)], None, [1, 2], 2, None, "GPU"]
    assert wire[1][:2] == ["BlockRemoved", [3]]
    assert wire[2] == ["AllBlocksCleared"]


def test_a_full_queue_drops_and_counts() -> None:
    cache = radix_cache(page_size=4, enable_kv_cache_events=True, max_kv_cache_events=2)
    cache.insert([1] * 16, take(cache, 16))
    assert len(cache.take_events()) == 2
    assert cache.tree.stats().dropped_events >= 2


def test_events_without_msgspec(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib
    import sys

    monkeypatch.setitem(sys.modules, "msgspec", None)
    name = "radixkv.hicache.events"
    mine = sys.modules.pop(name)
    try:
        events = importlib.import_module(name)
        assert events.BlockStored([1], None, [1], 1, None) == events.BlockStored([1], None, [1], 1, None, None)
        assert events.BlockRemoved([1]).medium is None
        assert isinstance(events.AllBlocksCleared(), events.KVCacheEvent)
    finally:
        sys.modules[name] = mine
        sys.modules["radixkv.hicache"].events = mine  # type: ignore[attr-defined]
