"""An engine's own HiCacheStorage behind HiRadixCache."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from radixkv.hicache import HiCacheStorage
from radixkv.storage import MemoryStorage
from radixkv.storage.base import BoolArray, Parts

from .kit import hiradix_cache, settle, take
from .scheduler import Bytes


class DictStorage(HiCacheStorage):
    """As a user would write it."""

    def __init__(self) -> None:
        self.values: dict[str, torch.Tensor] = {}

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        value = self.values.get(key)
        if value is None:
            return None
        target_location.copy_(value)
        return target_location

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> Any:
        return [self.get(key, target) for key, target in zip(keys, target_locations, strict=True)]

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
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


class Broken(MemoryStorage):
    """A plug-in with a bug: what it raises is no StorageError, and its traceback has views of host pages."""

    def put_many(self, keys: Sequence[str], parts: Sequence[Parts], *, timeout_s: float | None = None) -> BoolArray:
        try:
            raise KeyError(len(parts))
        except KeyError as error:
            raise RuntimeError("a bug") from error


def test_a_plugin_with_a_bug_is_logged_once_and_does_not_keep_the_pool(caplog: pytest.LogCaptureFixture) -> None:
    with hiradix_cache(256, 4, storage=Broken(), write_through_threshold_storage=1) as cache:
        for start in (0, 100):
            for _ in range(2):
                slots = take(cache, 64)
                key = list(range(start, start + 64))
                cache.token_to_kv_pool_allocator.free(slots[: cache.insert(key, slots)])
                settle(cache)
        assert cache.cache_controller.core.stats().store_failures >= 2
    assert [m for m in caplog.messages if "a bug" in m] == ["worker=store error=RuntimeError('a bug')"]


class Hung(MemoryStorage):
    """A server that does not answer, and a client without deadlines."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.answer = threading.Event(), threading.Event()

    def put_many(self, keys: Sequence[str], parts: Sequence[Parts], *, timeout_s: float | None = None) -> BoolArray:
        self.asked.set()
        self.answer.wait(20)
        return super().put_many(keys, parts)


def test_closing_while_a_call_to_storage_hangs_keeps_the_memory_that_it_reads(caplog: pytest.LogCaptureFixture) -> None:
    storage, key = Hung(), list(range(64))
    cache = hiradix_cache(256, 4, storage=storage, store_after_backup=True, close_timeout_s=0.05)
    cache.insert(key, take(cache, 64))
    cache.writing_check(write_back=True)
    assert storage.asked.wait(10)
    assert not cache.close()
    assert not cache.token_to_kv_pool_host.arena.closed
    assert any("close again" in message for message in caplog.messages)
    storage.answer.set()
    deadline = time.monotonic() + 10
    while not cache.close():
        assert time.monotonic() < deadline
    assert cache.token_to_kv_pool_host.arena.closed
