"""An engine's own HiCacheStorage behind HiRadixCache."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from radixkv.errors import StorageError
from radixkv.hicache import HiCacheStorage
from radixkv.hicache.storage import PluginStorage

from .kit import hiradix_cache, settle, take
from .scheduler import Bytes


class DictStorage(HiCacheStorage):
    """As a user would write it. ``replaces``: get returns a tensor of its own instead of filling the target."""

    def __init__(self, replaces: bool = False, room: int = 10**6) -> None:
        self.values: dict[str, torch.Tensor] = {}
        self.replaces, self.room = replaces, room
        self.closed = False

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        value = self.values.get(key)
        if value is None:
            return None
        if self.replaces:
            return value
        target_location.copy_(value)
        return target_location

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> Any:
        return [self.get(key, target) for key, target in zip(keys, target_locations, strict=True)]

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        if len(self.values) >= self.room:
            return False
        self.values[key] = value.clone()
        return True

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        return all(self.set(key, value) for key, value in zip(keys, values, strict=True))

    def exists(self, key: str) -> bool:
        return key in self.values

    def delete(self, key: str) -> None:
        self.values.pop(key, None)

    def clear(self) -> None:
        self.values.clear()


@pytest.mark.parametrize("replaces", [False, True])
def test_a_plugin_as_a_backend(replaces: bool) -> None:
    storage = PluginStorage(DictStorage(replaces))
    parts = [[b"ab", b"cde"], [np.arange(5, dtype=np.uint8)]]
    assert storage.put_many(["a", "b"], parts).tolist() == [True, True]
    assert storage.put_many([], []).tolist() == []
    assert storage.exists_many(["a", "c", "b"]).tolist() == [True, False, True]
    first, second, rest = bytearray(1), bytearray(4), np.zeros(5, np.uint8)
    assert storage.get_many(["a", "c", "b"], [[first, second], [bytearray(5)], [rest]]).tolist() == [5, -1, 5]
    assert (bytes(first), bytes(second), rest.tolist()) == (b"a", b"bcde", [0, 1, 2, 3, 4])
    storage.delete_many(["a", "never"])
    assert storage.exists_many(["a"]).tolist() == [False]
    storage.clear()
    assert storage.exists_many(["b"]).tolist() == [False]
    storage.close()


def test_a_plugin_that_stores_a_part() -> None:
    storage = PluginStorage(DictStorage(room=1))
    assert storage.put_many(["a", "b"], [[b"1"], [b"2"]]).tolist() == [True, False]


def test_a_plugin_that_raises() -> None:
    class Broken(DictStorage):
        def exists(self, key: str) -> bool:
            raise ConnectionError("no server")

    with pytest.raises(StorageError, match=r"Broken\.exists: ConnectionError"):
        PluginStorage(Broken()).exists_many(["a"])


def test_existence_as_a_dict() -> None:
    class Answers(DictStorage):
        def exists(self, key: str) -> Any:
            return {key: 1 if key == "a" else 0}

    assert PluginStorage(Answers()).exists_many(["a", "b"]).tolist() == [True, False]


@pytest.mark.parametrize("layout", ["layer_first", "page_head"])
def test_a_cache_over_a_plugin(layout: str) -> None:
    plugin, key = DictStorage(), list(range(64))
    settings: dict[str, Any] = {
        "storage": plugin, "layout": layout, "prefetch": "wait_complete", "prefetch_threshold": 4,
        "load_back_threshold": 1, "write_through_threshold_storage": 1,
    }  # fmt: skip
    with hiradix_cache(256, 4, **settings) as cache:
        for _ in range(2):
            slots = take(cache, 64)
            Bytes(cache.kv_cache).write(key, 0, slots)
            cache.token_to_kv_pool_allocator.free(slots[: cache.insert(key, slots)])
            settle(cache)
        assert cache.match_prefix(key).last_device_node.backuped_storage
    assert len(plugin.values) == 16
    with hiradix_cache(256, 4, **settings) as cache:
        cache.prefetch_from_storage("r", cache.root_node, key)
        deadline = time.monotonic() + 10
        while not cache.check_prefetch_progress("r"):
            cache.check_hicache_events()
            assert time.monotonic() < deadline
        found = cache.match_prefix(key)
        assert found.host_hit_length == 64
        loaded, _ = cache.init_load_back(found.last_host_node, 64)
        cache.ready_to_load_host_cache()
        settle(cache)
        Bytes(cache.kv_cache).check(key, loaded)
