"""SGLang's storage interface over a Storage, and a plug-in with it as a Storage."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from radixkv.errors import InvalidArgumentError, StorageError, StorageTimeoutError
from radixkv.storage import MemoryStorage, create_storage
from radixkv.storage.sglang_api import HiCacheAdapter, HiCacheStorage, PluginStorage, is_plugin

from .faults import FaultyStorage, dead, flip
from .kit import HostPages, digests, ids, namespace, page_store
from .plugin import Plugin


def tensors(count: int, seed: int = 0) -> list[torch.Tensor]:
    data = torch.randn((count, 4, 8), generator=torch.Generator().manual_seed(seed))
    return list(data.to(torch.bfloat16))


def test_tensors_in_and_out() -> None:
    cache = HiCacheAdapter(MemoryStorage())
    keys = [f"{i:064x}" for i in range(4)]
    values = tensors(4)
    assert cache.batch_set(keys[:3], values[:3])
    assert cache.set(keys[3], values[3])
    assert cache.exists(keys[0])
    assert not cache.exists("other")
    assert cache.batch_exists([*keys, "other", keys[0]]) == 4
    targets = [torch.zeros(4, 8, dtype=torch.bfloat16) for _ in range(4)]
    found = cache.batch_get([*keys[:3], "other"], targets)
    assert found[0] is targets[0]
    assert found[3] is None
    assert all(torch.equal(a, b) for a, b in zip(found[:3], values, strict=False))
    assert torch.equal(cache.get(keys[3], targets[3]), values[3])
    assert torch.equal(cache.get(keys[3]).view(torch.bfloat16), values[3].reshape(-1))
    assert cache.get("other") is None
    cache.delete(keys[0])
    assert not cache.exists(keys[0])
    cache.clear()
    assert cache.batch_exists(keys[1:]) == 0
    cache.close()
    assert not cache.set("k", values[0])


def test_pointers_in_and_out() -> None:
    """As SGLang's zero-copy path does: addresses in the host pool, and sizes."""
    cache = HiCacheAdapter(MemoryStorage(), namespace())
    pool = torch.arange(256, dtype=torch.uint8)
    cache.register_buffer(pool)
    assert cache.batch_set(["a_k", "a_v"], None, [pool.data_ptr(), pool.data_ptr() + 100], [100, 50])
    target = torch.zeros(256, dtype=torch.uint8)
    found = cache.batch_get(["a_k", "a_v"], [target.data_ptr() + 10, target.data_ptr() + 200], [100, 50])
    assert None not in found
    assert torch.equal(target[10:110], pool[:100])
    assert torch.equal(target[200:250], pool[100:150])
    assert not target[110:200].any()
    assert cache.get("a_k", target.data_ptr(), 99) is None  # not of this length
    assert cache.counters.short == 1


def test_wrong_values_and_dead_stores_are_misses() -> None:
    inner = FaultyStorage(MemoryStorage())
    cache = HiCacheAdapter(inner, timeout_s=1.0)
    cache.set("k", torch.ones(100))
    inner.faults.damage = flip(200)
    assert cache.get("k", torch.zeros(100)) is None
    assert (cache.counters.corrupt, cache.counters.removed) == (1, 1)
    inner.faults = dead()
    assert cache.get("k", torch.zeros(100)) is None
    assert cache.get("k") is None
    assert not cache.exists("k")
    assert not cache.set("k", torch.ones(100))
    assert cache.counters.errors == 3


def test_namespaces_of_two_models() -> None:
    memory = MemoryStorage()
    one, other = HiCacheAdapter(memory, namespace()), HiCacheAdapter(memory, namespace(model="tiny@2"))
    one.set("k", torch.ones(3))
    assert not other.exists("k")
    assert one.exists("k")


def test_bad_values() -> None:
    cache = HiCacheAdapter(MemoryStorage())
    with pytest.raises(InvalidArgumentError, match="2 keys and 1 values"):
        cache.batch_set(["a", "b"], [torch.ones(1)])
    with pytest.raises(InvalidArgumentError, match="1 keys and 0 values"):
        cache.set("a")
    with pytest.raises(InvalidArgumentError, match="without a size"):
        cache.set("a", None, 4096)
    with pytest.raises(InvalidArgumentError, match="no contiguous tensor"):
        cache.set("a", torch.ones(4, 4).t())


class Bare(HiCacheStorage):
    """The least that the interface allows."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.gate: threading.Event | None = None
        self.bad = ""

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        if key.endswith(self.bad or "\0"):
            raise RuntimeError("shape '[3]' is invalid for input of size 2")
        return self.values.get(key)

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> list[Any]:
        return [self.get(key) for key in keys]

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        if self.gate is not None:
            self.gate.wait()
        self.values[key] = value.clone()
        return len(self.values) <= 3

    def batch_set(self, keys: list[str], values: Any = None, target_locations: Any = None, sizes: Any = None) -> bool:
        stored = [self.set(key, value) for key, value in zip(keys, values, strict=True)]
        return all(stored)

    def exists(self, key: str) -> bool | dict[str, bool]:
        return {key: key in self.values}


def test_a_plugin_that_says_only_that_not_all_are_stored() -> None:
    storage = PluginStorage(Bare())
    assert storage.put_many(list("abcd"), [[b"1"], [b"2"], [b"3"], [b"4"]]).all()  # it had stored them all the same
    assert storage.exists_many(list("abcde")).tolist() == [True] * 4 + [False]
    assert storage.plugin.batch_exists(["radixkv.a", "radixkv.b", "nothing", "radixkv.c"]) == 2


def test_a_plugin_that_raises() -> None:
    plugin = Bare()
    storage = PluginStorage(plugin)
    storage.put_many(["a", "b"], [[b"1"], [b"2"]])
    plugin.bad = "a"
    buffers = [bytearray(1), bytearray(1)]
    assert storage.get_many(["a", "b"], [[buffers[0]], [buffers[1]]]).tolist() == [-1, 1]
    assert storage.stats()["failed"] == 1
    plugin.bad = "."
    plugin.values = None  # type: ignore[assignment]
    with pytest.raises(StorageError, match=r"Bare: .*NoneType"):
        storage.exists_many(["a"])
    with pytest.raises(StorageError, match="Bare"):
        storage.get_many(["a", "b"], [[buffers[0]], [buffers[1]]])
    storage.delete_many(["a"])  # it has no delete
    storage.clear()
    storage.close()


def test_a_plugin_that_hangs_is_left() -> None:
    plugin = Bare()
    plugin.gate = threading.Event()
    storage = PluginStorage(plugin, timeout_s=0.05)
    with pytest.raises(StorageTimeoutError):
        storage.put_many(["a"], [[b"1"]])
    plugin.gate.set()
    storage.close()


def test_pages_through_a_plugin(tmp_path: Path) -> None:
    storage = create_storage("dynamic", path="tests.storage.plugin:Plugin", folder=tmp_path / "values")
    host = HostPages(8)
    store = page_store(storage, host)
    written = host.fill(ids(0, 1), seed=1)
    assert store.set_pages(digests(2), ids(0, 1)).all()
    (first, second) = sorted((tmp_path / "values").iterdir())
    first.write_bytes(first.read_bytes()[:-1])
    data = bytearray(second.read_bytes())
    data[100] ^= 1
    assert store.get_pages(digests(2), ids(2, 3)).sum() == 1
    second.write_bytes(data)
    assert not store.get_pages(digests(2), ids(2, 3)).any()
    assert (store.counters.short, store.counters.corrupt, store.counters.removed) == (1, 1, 2)
    assert not list((tmp_path / "values").iterdir())
    assert store.set_pages(digests(2), ids(0, 1)).all()
    assert store.get_pages(digests(2), ids(2, 3)).all()
    np.testing.assert_array_equal(host.read(ids(2, 3)), written)
    storage.close()


def test_what_is_a_plugin() -> None:
    assert is_plugin(Plugin)
    assert is_plugin(HiCacheAdapter(MemoryStorage()))
    assert not is_plugin(MemoryStorage)
    with pytest.raises(InvalidArgumentError, match="a dict has no get, set"):
        PluginStorage({})


HANGS = """
import sys, threading
from radixkv.storage import create_storage
class Hangs:
    get = set = batch_get = batch_set = None
    def exists(self, key):
        threading.Event().wait()
for name in ("get", "set", "batch_get", "batch_set"):
    setattr(Hangs, name, lambda *_: None)
with create_storage("dynamic", path="__main__:Hangs") as storage:
    try:
        storage.exists_many(["a"], timeout_s=0.1)
    except Exception as error:
        print(type(error).__name__)
"""


def test_a_plugin_that_never_returns_does_not_keep_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "StorageTimeoutError\n"
