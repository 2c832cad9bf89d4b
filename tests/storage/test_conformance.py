"""What every backend does alike, each against the real thing: see base.py."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from radixkv.errors import InvalidArgumentError, StorageError
from radixkv.storage import PageStore, Storage

from .kit import PAGE_BYTES, HostPages, digests, namespace
from .sites import SITES, Site


@pytest.fixture(scope="module", params=list(SITES))
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = SITES[request.param](tmp_path_factory.mktemp(request.param))
    yield made
    made.stop()


@pytest.fixture(scope="module", params=[name for name, kind in SITES.items() if kind.shared])
def shared_site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = SITES[request.param](tmp_path_factory.mktemp(request.param))
    yield made
    made.stop()


@pytest.fixture(scope="module")
def client(site: Site) -> Iterator[Storage]:
    made = site.open()
    yield made
    made.close()


@pytest.fixture
def storage(client: Storage) -> Storage:
    client.clear()
    return client


def value(key: str, size: int) -> bytes:
    """The bytes that belong to a key."""
    return np.random.default_rng(list(key.encode())).bytes(size)


def put(storage: Storage, sizes: dict[str, int]) -> list[bool]:
    flags: list[bool] = storage.put_many(list(sizes), [[value(key, size)] for key, size in sizes.items()]).tolist()
    return flags


def get(storage: Storage, key: str, size: int) -> bytes | None:
    buffer = bytearray(size)
    found = storage.get_many([key], [[buffer]]).tolist()
    return None if found == [-1] else bytes(buffer[: found[0]])


@pytest.mark.parametrize("size", [1, 63, 4096, 65_600, (1 << 20) + 7])
@pytest.mark.parametrize("pieces", [1, 2, 65])
def test_values_come_back_whatever_their_parts(storage: Storage, size: int, pieces: int) -> None:
    data = value("k", size)
    cuts = np.linspace(0, size, pieces + 1).astype(int)
    parts = [data[a:b] for a, b in itertools.pairwise(cuts)]
    assert storage.put_many(["k"], [parts]).tolist() == [True]
    assert get(storage, "k", size) == data
    buffer = np.zeros(size, np.uint8)  # read with other cuts than it was written with
    ends = np.linspace(0, size, pieces + 2).astype(int)
    scattered = [buffer[a:b] for a, b in itertools.pairwise(ends)]
    assert storage.get_many(["k"], [scattered]).tolist() == [size]
    assert buffer.tobytes() == data


def test_more_parts_than_one_system_call_takes(storage: Storage) -> None:
    data = np.frombuffer(value("many", 3 * 2500), np.uint8)
    assert storage.put_many(["many"], [list(data.reshape(2500, 3))]).all()
    buffer = np.zeros((2500, 3), np.uint8)
    assert storage.get_many(["many"], [list(buffer)]).tolist() == [7500]
    np.testing.assert_array_equal(buffer.reshape(-1), data)


def test_kinds_of_buffers(storage: Storage) -> None:
    data = value("kinds", 48)
    words = np.frombuffer(data[16:32], np.int32).reshape(2, 2)
    parts = [data[:8], bytearray(data[8:16]), words, memoryview(data)[32:]]
    assert storage.put_many(["kinds"], [parts]).all()
    whole = bytearray(100)
    words = np.zeros((2, 2), np.float32)
    assert storage.get_many(["kinds"], [[memoryview(whole)[10:42], words]]).tolist() == [48]
    assert bytes(whole[10:42]) + words.tobytes() == data
    assert not any(whole[:10])
    assert not any(whole[42:])


def test_a_batch_keeps_its_order(storage: Storage) -> None:
    names = [f"key-{i}" for i in range(130)]
    assert all(put(storage, {name: 100 + i for i, name in enumerate(names) if i % 3}))
    order = np.random.default_rng(0).permutation(130).tolist()
    buffers = [bytearray(100 + i) for i in order]
    sizes = storage.get_many([names[i] for i in order], [[buffer] for buffer in buffers])
    assert sizes.tolist() == [100 + i if i % 3 else -1 for i in order]
    assert all(buffer == value(names[i], 100 + i) for i, buffer in zip(order, buffers, strict=True) if i % 3)
    assert storage.exists_many([names[i] for i in order]).tolist() == [bool(i % 3) for i in order]


def test_empty_batches(storage: Storage) -> None:
    assert storage.put_many([], []).tolist() == []
    assert storage.get_many([], []).tolist() == []
    assert storage.exists_many([]).tolist() == []
    storage.delete_many([])


def test_kinds_of_results(storage: Storage) -> None:
    assert storage.put_many(["a"], [[b"x"]]).dtype == np.bool_
    assert storage.exists_many(["a"]).dtype == np.bool_
    assert storage.get_many(["a"], [[bytearray(1)]]).dtype == np.int64
    assert all(isinstance(name, str) and isinstance(count, int) for name, count in storage.stats().items())


@pytest.mark.parametrize("room", [10, 99, 101, 5000])
def test_a_value_of_another_length_is_reported_by_its_length(storage: Storage, room: int) -> None:
    put(storage, {"before": 100, "k": 100, "after": 100})
    buffers = [bytearray(100), bytearray(room), bytearray(100)]
    guard = bytearray(64)
    sizes = storage.get_many(["before", "k", "after"], [[buffers[0]], [buffers[1]], [buffers[2]]])
    assert sizes.tolist() == [100, 100, 100]
    assert (buffers[0], buffers[2]) == (value("before", 100), value("after", 100))
    assert not any(guard)


def test_the_first_value_of_a_key_stays(storage: Storage) -> None:
    assert storage.put_many(["k"], [[b"first"]]).tolist() == [True]
    assert storage.put_many(["k"], [[b"first"]]).tolist() == [True]
    assert get(storage, "k", 5) == b"first"


def test_a_key_twice_in_a_batch(storage: Storage) -> None:
    data = value("twice", 50)
    assert storage.put_many(["twice", "other", "twice"], [[data], [b"x"], [data]]).tolist() == [True] * 3
    buffers = [bytearray(50), bytearray(50)]
    assert storage.get_many(["twice", "twice"], [[buffers[0]], [buffers[1]]]).tolist() == [50, 50]
    assert buffers[0] == buffers[1] == data


def test_delete(storage: Storage) -> None:
    put(storage, {"a": 10, "b": 10, "c": 10})
    storage.delete_many(["b", "nothing", "b"])
    assert storage.exists_many(["a", "b", "c"]).tolist() == [True, False, True]
    assert get(storage, "b", 10) is None
    assert put(storage, {"b": 20}) == [True]
    assert get(storage, "b", 20) == value("b", 20)


def test_clear(storage: Storage) -> None:
    put(storage, {f"k{i}": 10 for i in range(20)})
    storage.clear()
    assert not storage.exists_many([f"k{i}" for i in range(20)]).any()
    storage.clear()
    assert put(storage, {"k1": 30}) == [True]


@pytest.mark.parametrize("key", ["", ".", "..", ".hidden", "a/b", "a b", "ü", "x" * 201, "a\n", 7, None, b"bytes"])
def test_bad_keys(storage: Storage, key: str) -> None:
    calls = [lambda: storage.put_many(["good", key], [[b"x"], [b"x"]]), lambda: storage.exists_many([key]),
             lambda: storage.get_many([key], [[bytearray(1)]]), lambda: storage.delete_many([key])]  # fmt: skip
    for call in calls:
        with pytest.raises(InvalidArgumentError, match="is no key"):
            call()
    assert not storage.exists_many(["good"]).any()


def test_longest_key_and_every_character(storage: Storage) -> None:
    names = ["x" * 200, "0-9.A_Z", "_", "-", "a.tmp", "CON", "case", "CASE"]
    assert all(put(storage, {name: 10 + i for i, name in enumerate(names)}))
    for i, name in enumerate(names):
        assert get(storage, name, 10 + i) == value(name, 10 + i)


def test_bad_parts(storage: Storage) -> None:
    put(storage, {"k": 1})
    with pytest.raises(InvalidArgumentError, match="1 keys and 2 lists"):
        storage.put_many(["k"], [[b"x"], [b"y"]])
    with pytest.raises(InvalidArgumentError, match="2 keys and 1 lists"):
        storage.get_many(["k", "l"], [[bytearray(1)]])
    with pytest.raises(InvalidArgumentError, match="read-only"):
        storage.get_many(["k"], [[b"x"]])
    with pytest.raises(InvalidArgumentError, match="contiguous"):
        storage.put_many(["new"], [[np.zeros((4, 4), np.uint8)[:, :2]]])
    with pytest.raises(InvalidArgumentError, match="contiguous"):
        storage.put_many(["new"], [["text"]])
    with pytest.raises(InvalidArgumentError, match="timeout_s"):
        storage.exists_many(["k"], timeout_s=0)


def test_deadlines_that_are_met_change_nothing(storage: Storage) -> None:
    assert storage.put_many(["k"], [[b"x"]], timeout_s=30).all()
    assert storage.exists_many(["k"], timeout_s=30).all()
    assert storage.get_many(["k"], [[bytearray(1)]], timeout_s=30).tolist() == [1]
    storage.delete_many(["k"], timeout_s=30)
    storage.clear(timeout_s=30)


def test_clients_see_each_other(shared_site: Site) -> None:
    with shared_site.open() as storage, shared_site.open() as other:
        storage.clear()
        assert put(storage, {"a": 1000, "b": 2000}) == [True, True]
        assert get(other, "a", 1000) == value("a", 1000)
        other.delete_many(["a"])
        assert storage.exists_many(["a", "b"]).tolist() == [False, True]
        put(other, {"c": 10})
        assert get(storage, "c", 10) == value("c", 10)
        other.clear()
        assert get(storage, "b", 2000) is None


def test_values_outlive_clients(shared_site: Site) -> None:
    with shared_site.open() as storage:
        storage.clear()
        put(storage, {f"k{i}": 1000 + i for i in range(30)})
        storage.delete_many(["k7"])
    with shared_site.open() as again:
        assert [get(again, f"k{i}", 1000 + i) for i in range(30)] == [
            None if i == 7 else value(f"k{i}", 1000 + i) for i in range(30)
        ]


def test_close(site: Site) -> None:
    storage = site.open()
    storage.close()
    storage.close()
    for call in (lambda: storage.exists_many(["k"]), lambda: storage.put_many(["k"], [[b"x"]]),
                 lambda: storage.get_many(["k"], [[bytearray(1)]]), lambda: storage.delete_many(["k"]),
                 storage.clear):  # fmt: skip
        with pytest.raises(StorageError):
            call()


def test_many_threads(storage: Storage) -> None:
    """Readers and writers of the same keys: whoever gets a value gets the right one."""
    names = [f"t{i}" for i in range(40)]
    barrier = threading.Barrier(4)

    def work(seed: int) -> int:
        rng, hits = np.random.default_rng(seed), 0
        barrier.wait()
        for _ in range(10):
            some = [names[i] for i in rng.choice(40, 12, replace=False)]
            if rng.random() < 0.5:
                storage.put_many(some, [[value(name, 3000)] for name in some])  # others may delete, or be at it
                continue
            buffers = [bytearray(3000) for _ in some]
            sizes = storage.get_many(some, [[buffer] for buffer in buffers])
            for name, buffer, size in zip(some, buffers, sizes.tolist(), strict=True):
                assert size in (-1, 3000)
                assert size == -1 or buffer == value(name, 3000)
                hits += size == 3000
            if rng.random() < 0.3:
                storage.delete_many(some[:3])
        return hits

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(work, range(4))) > 0


def test_pages(storage: Storage) -> None:
    """A PageStore over it, from registered memory, and one wrong page."""
    host = HostPages(64)
    storage.register(host.data)
    store = PageStore(storage, namespace(), host.parts)
    names, pages = digests(32), np.arange(32, dtype=np.int32)
    written = host.fill(pages, seed=1)
    assert store.set_pages(names, pages).all()
    assert store.count_prefix(names) == 32
    assert store.count_prefix(digests(40)) in (0, 32)
    key = store.keys(names)[5]
    storage.delete_many([key])
    storage.put_many([key], [[bytes(64 + PAGE_BYTES)]])
    flags = store.get_pages(names, pages + 32)
    assert flags.tolist() == [i != 5 for i in range(32)]
    np.testing.assert_array_equal(host.read(pages + 32)[flags], written[flags])
    assert (store.counters.corrupt, store.counters.removed) == (1, 1)
    assert not storage.exists_many([key]).any()
    storage.unregister(host.data)


def test_touching_looks_up(storage: Storage) -> None:
    put(storage, {"a": 10, "b": 20})
    assert storage.touch_many(["a", "none", "b", "a"]).tolist() == [True, False, True, True]
    assert storage.touch_many(["b"]).dtype == np.bool_
    assert storage.touch_many([]).tolist() == []


def test_a_chain_is_stored_and_goes_on(storage: Storage) -> None:
    keys = [f"c{number}" for number in range(6)]
    values = [[value(key, 5000)] for key in keys]
    assert storage.put_each(keys[:2], values[:2], after="").tolist() == [True, True]
    assert storage.put_each(keys[1:5], values[1:5], after="c0").tolist() == [True] * 4
    assert storage.put_each(keys[5:], values[5:], after="c4", timeout_s=30).tolist() == [True]
    assert [get(storage, key, 5000) for key in keys] == [value(key, 5000) for key in keys]
    if storage.chained:
        assert storage.put_each(["x"], [[b"x"]], after="missing").tolist() == [False]
