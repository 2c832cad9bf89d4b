"""Values that are hashed as they arrive and just before they are written: who is told of what, and when.

put_each and get_each of every store, the runs of the file backend, and damage anywhere in what it reads.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from radixkv.errors import InvalidArgumentError, StorageError
from radixkv.storage import MemoryStorage, SealedStore, Storage, batch, segment
from radixkv.storage.base import byte_views, flat_parts
from radixkv.storage.envelope import HEADER_BYTES
from radixkv.storage.file import FileStorage
from radixkv.storage.threads import DaemonPool

from .kit import HostPages, digests, namespace, page_store


def file_storage(run_bytes: int, **options: Any) -> Callable[[Path], FileStorage]:
    def make(folder: Path) -> FileStorage:
        made = FileStorage(folder, **options)
        made.run_bytes = run_bytes
        return made

    return make


STORES: dict[str, Callable[[Path], Storage]] = {
    "memory": lambda folder: MemoryStorage(),  # the default of base.py: everything at once
    "file": file_storage(512 << 10),
    "file, runs of one value": file_storage(1, num_threads=1),
    "file, short runs and segments": file_storage(300, segment_bytes=1000),
}


@pytest.fixture(params=STORES)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    with STORES[request.param](tmp_path / "store") as made:
        yield made


def value(position: int) -> bytes:
    """Of a length of its own: odd, even, a single byte."""
    return np.random.default_rng(position).bytes(1 + 37 * position)


def in_pieces(data: bytearray, pieces: int) -> list[memoryview]:
    bounds = [len(data) * piece // pieces for piece in range(pieces + 1)]
    return [memoryview(data)[start:end] for start, end in pairwise(bounds)]


KEYS = [f"key{number}" for number in range(20)]


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_each_value_is_prepared_before_it_is_written(storage: Storage, pieces: int) -> None:
    storage.put_many(KEYS[:3], [[value(number)] for number in range(3)])
    buffers = [bytearray(len(value(number))) for number in range(20)]
    lock, prepared = threading.Lock(), []

    def prepare(positions: Any) -> None:
        with lock:
            prepared.extend(positions)
        for position in positions:
            buffers[position][:] = value(position)

    assert storage.put_each(KEYS, [in_pieces(buffer, pieces) for buffer in buffers], prepare).all()
    assert len(set(prepared)) == len(prepared)
    assert set(range(3, 20)) <= set(prepared)
    back = [bytearray(len(buffer)) for buffer in buffers]
    assert storage.get_many(KEYS, [[buffer] for buffer in back]).tolist() == [len(buffer) for buffer in buffers]
    assert back == [value(number) for number in range(20)]


@pytest.mark.parametrize("order", ["as put", "backwards", "every third", "with misses", "twice"])
@pytest.mark.parametrize("pieces", [1, 3])
def test_each_value_is_whole_when_it_is_told_of(storage: Storage, order: str, pieces: int) -> None:
    storage.put_many(KEYS, [[value(number)] for number in range(20)])
    wanted = {"as put": list(range(20)), "backwards": list(range(20))[::-1], "every third": list(range(0, 20, 3)),
              "with misses": [3, 50, 4, 51, 5], "twice": [1, 2, 1, 2, 2]}[order]  # fmt: skip
    buffers = [bytearray(len(value(number))) for number in wanted]
    lock, seen = threading.Lock(), []

    def arrived(positions: Any) -> None:
        right = [bytes(buffers[position]) == value(wanted[position]) for position in positions]
        with lock:
            seen.extend(zip(positions, right, strict=True))

    keys = [f"key{number}" for number in wanted]
    sizes = storage.get_each(keys, [in_pieces(buffer, pieces) for buffer in buffers], arrived).tolist()
    assert sizes == [len(value(number)) if number < 20 else -1 for number in wanted]
    assert sorted(seen) == [(position, True) for position, number in enumerate(wanted) if number < 20]


def test_what_is_asked_of_each_value_may_fail(storage: Storage) -> None:
    def fail(positions: Any) -> None:
        raise StorageError(f"{positions}")

    with pytest.raises(StorageError):
        storage.put_each(KEYS, [[value(number)] for number in range(20)], fail)
    assert not storage.exists_many(KEYS).any()
    assert storage.stats().get("reserved_bytes", 0) == 0
    storage.put_many(KEYS, [[value(number)] for number in range(20)])
    with pytest.raises(StorageError):
        storage.get_each(KEYS, [[bytearray(len(value(number)))] for number in range(20)], fail)
    assert storage.exists_many(KEYS).all()
    if isinstance(storage, FileStorage):
        assert not list((storage.folder.root / "tmp").iterdir())


def test_values_of_another_length_do_not_move_their_neighbours(storage: Storage) -> None:
    """Parts that are longer or shorter than the value end a run: the one behind it still gets its own bytes."""
    storage.put_many(KEYS, [[value(number)] for number in range(20)])
    rooms = [len(value(number)) + (number % 4 == 1) * 5 - (number % 4 == 2) * 3 for number in range(20)]
    buffers = [bytearray(room) for room in rooms]
    told: list[int] = []
    sizes = storage.get_each(KEYS, [[buffer] for buffer in buffers], lambda positions: told.extend(positions))
    assert sizes.tolist() == [len(value(number)) for number in range(20)]
    assert sorted(told) == list(range(20))
    for number in range(20):
        if rooms[number] == len(value(number)):
            assert buffers[number] == value(number), number


# ---- pages -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("page_bytes", [32, 96, 4096, 65_600, 786_432])
@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_pages_of_any_size_and_number_of_pieces(storage: Storage, page_bytes: int, pieces: int) -> None:
    host = HostPages(14, page_bytes, pieces)
    names, pages = digests(7), np.arange(7, dtype=np.int32)
    written = host.fill(pages, seed=1)
    space = namespace(num_layers=1, num_heads=1, page_size=1, head_bytes=page_bytes // 2)
    store = page_store(storage, host, namespace=space)
    assert store.page_bytes == page_bytes
    assert store.set_pages(names, pages).all()
    assert store.get_pages(names, pages + 7).all()
    np.testing.assert_array_equal(host.read(pages + 7), written)
    assert store.counters.hits == 7


def damaged(folder: Path, number: int, change: Callable[[bytearray], None]) -> tuple[list[bool], Any, dict[str, int]]:
    """Five pages in one segment, one changed: flags of a get, the counters, and those of the store.

    Every flag that is set has been compared."""
    host = HostPages(10)
    names, pages = digests(5), np.arange(5, dtype=np.int32)
    written = host.fill(pages, seed=3)
    with FileStorage(folder) as storage:
        store = page_store(storage, host)
        store.set_pages(names, pages)
        (path,) = (folder / "segments").glob("??/*")
        place = storage.folder.find(store.keys(names))[number]
        assert place is not None
        data = bytearray(path.read_bytes())
        stored = data[place.entry.offset : place.entry.offset + place.entry.num_bytes]
        change(stored)
        data[place.entry.offset : place.entry.offset + place.entry.num_bytes] = stored
        path.write_bytes(data)  # another process, or the disk
        flags = store.get_pages(names, pages + 5)
        np.testing.assert_array_equal(host.read(pages[flags] + 5), written[flags])
        again = store.get_pages(names, pages + 5)
        assert (flags == again).all()
        return flags.tolist(), store.counters, dict(storage.stats())


PLACES = [*range(HEADER_BYTES), 64, 65, 64 + 2047, 64 + 2048, 64 + 4000, 64 + 4095]


@pytest.mark.parametrize("at", PLACES)
def test_one_bit_anywhere(tmp_path: Path, at: int) -> None:
    """In each byte of the header, and at the ends of both pieces: that page alone is a miss, counted, and removed."""
    def flip(stored: bytearray) -> None:
        stored[at] ^= 1 << at % 8

    flags, seen, _ = damaged(tmp_path, at % 5, flip)
    assert flags == [number != at % 5 for number in range(5)]
    assert (seen.corrupt + seen.foreign, seen.removed, seen.hits) == (1, 1, 8)


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 64 + 2048, 64 + 4095])
def test_a_page_that_was_cut_off_by_zeros(tmp_path: Path, length: int) -> None:
    def cut(stored: bytearray) -> None:
        stored[length:] = bytes(len(stored) - length)

    flags, seen, _ = damaged(tmp_path, 2, cut)
    assert flags == [True, True, False, True, True]
    assert (seen.corrupt, seen.removed) == (1, 1)


def test_a_page_in_the_place_of_another(tmp_path: Path) -> None:
    """Whole and right, but not the one that was asked for."""
    host, other = HostPages(1), HostPages(1)
    other.fill(np.zeros(1, np.int32), seed=9)
    kept: list[bytes] = []
    with MemoryStorage() as elsewhere:
        store = page_store(elsewhere, other)
        store.set_pages(digests(1, seed=8), np.zeros(1, np.int32))
        (key,) = store.keys(digests(1, seed=8))
        buffer = bytearray(HEADER_BYTES + host.data.nbytes)
        elsewhere.get_many([key], [[buffer]])
        kept.append(bytes(buffer))

    def swap(stored: bytearray) -> None:
        stored[:] = kept[0]

    flags, seen, _ = damaged(tmp_path, 4, swap)
    assert flags == [True, True, True, True, False]
    assert (seen.foreign, seen.corrupt, seen.removed) == (1, 0, 1)


@pytest.mark.parametrize("kept", [0, 3 * 4160 - 1, 3 * 4160, 3 * 4160 + 64, 5 * 4160 - 1])
def test_a_file_that_was_cut_while_it_is_known(tmp_path: Path, kept: int) -> None:
    """Of one run, the pages before the cut are served; ``short`` is counted; what is behind it is no page."""
    host = HostPages(10)
    names, pages = digests(5), np.arange(5, dtype=np.int32)
    written = host.fill(pages, seed=3)
    with FileStorage(tmp_path) as storage:
        store = page_store(storage, host)
        store.set_pages(names, pages)
        (path,) = (tmp_path / "segments").glob("??/*")
        os.truncate(path, path.stat().st_size - 5 * 4160 + kept)
        flags = store.get_pages(names, pages + 5)
        assert flags.tolist() == [number < kept // 4160 for number in range(5)]
        np.testing.assert_array_equal(host.read(pages + 5)[flags], written[flags])
        assert storage.stats()["short"] == 1


def test_pages_of_the_format_before_are_misses() -> None:
    """Version 1 under the very key, as its writer would have made it: one XXH3 over header and payload."""
    payload = bytes(range(256)) * 16
    storage = MemoryStorage()
    store = SealedStore(storage)
    assert store.put(["key"], [byte_views([payload])], None).all()
    buffer = bytearray(HEADER_BYTES + len(payload))
    storage.get_many(["key"], [[buffer]])
    assert (buffer[8], buffer[12]) == (2, 2)
    buffer[8] = buffer[12] = 1
    buffer[56:64] = xxhash.xxh3_64_digest(bytes(buffer[:56]) + payload)[::-1]
    storage.delete_many(["key"])
    storage.put_many(["key"], [[buffer]])
    assert not store.get(["key"], [byte_views([bytearray(len(payload))], writable=True)], None).any()
    assert (store.counters.corrupt + store.counters.foreign, store.counters.removed) == (1, 1)


def test_the_sum_is_as_the_envelope_says() -> None:
    payload = bytes(range(256)) * 16
    storage = MemoryStorage()
    for key, pieces in (("one", [payload]), ("two", [payload[:1000], payload[1000:]])):
        SealedStore(storage).put([key], [byte_views(pieces)], None)
        buffer = bytearray(HEADER_BYTES + len(payload))
        storage.get_many([key], [[buffer]])
        seed = xxhash.xxh3_64_intdigest(buffer[:56])
        assert int.from_bytes(buffer[56:64], "little") == xxhash.xxh3_64_intdigest(payload, seed)


def test_segments_whose_values_begin_anywhere_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of before the alignment."""
    with monkeypatch.context() as patch, FileStorage(tmp_path) as storage:
        patch.setattr(segment, "ALIGNMENT", 1)
        storage.put_many(KEYS[:2], [[value(5)], [value(6)]])
    with FileStorage(tmp_path) as storage:
        place = storage.folder.find(KEYS[:1])[0]
        assert place is not None
        assert place.entry.offset == 64 + 2 * 24 + 8
        buffers = [bytearray(len(value(5))), bytearray(len(value(6)))]
        storage.get_many(KEYS[:2], [[buffer] for buffer in buffers])
        assert buffers == [value(5), value(6)]


# ---- the compiled loops ----------------------------------------------------------------------------------------------
def test_only_flat_views_of_bytes_are_taken_as_they_are() -> None:
    good = memoryview(bytearray(10))
    assert batch.flat_sizes([[good], [good[:3], good[3:]], []], True) == [10, 10, 0]
    strange: list[Any] = [bytes(10), good[::2], good.cast("b"), good.cast("B", (2, 5)), memoryview(np.zeros(3, "<i4"))]
    for part in strange:
        assert batch.flat_sizes([[good], [part]], False) is None, part
    assert batch.flat_sizes([[memoryview(b"read-only")]], False) == [9]
    assert batch.flat_sizes([[memoryview(b"read-only")]], True) is None
    assert batch.flat_sizes([(good,)], False) is None
    flat = flat_parts([[good], [bytes(4), np.zeros(3, "<i4")]])
    assert flat.sizes == [10, 16]
    assert flat_parts(flat) is flat
    with pytest.raises(InvalidArgumentError, match="read-only"):
        flat_parts(flat, writable=True)


def test_runs_end_where_they_must() -> None:
    reads = [(64, 10, 0), (74, 10, 1), (84, 10, 2), (100, 10, 3), (110, 10, 4), (110, 10, 5)]
    assert batch.runs(reads, [10] * 6, 100) == [(64, 30, [0, 1, 2]), (100, 20, [3, 4]), (110, 10, [5])]
    assert batch.runs(reads[:3], [10, 11, 10], 100) == [(64, 21, [0, 1]), (84, 10, [2])]
    assert batch.runs(reads[:3], [10] * 3, 20) == [(64, 20, [0, 1]), (84, 10, [2])]
    assert batch.runs(reads[:2], [10] * 2, 1) == [(64, 10, [0]), (74, 10, [1])]
    assert batch.runs([], [], 1) == []


@pytest.mark.parametrize("pieces", [1, 2])
def test_slices_are_the_same_as_lists(pieces: int) -> None:
    memory, rows = memoryview(bytearray(np.random.default_rng(0).bytes(64))), memoryview(bytearray(b"abcdef"))
    starts = np.array([[0, 40], [8, 32], [16, 48]], np.int64)[:, :pieces]
    lists = [[memory[at : at + 8] for at in row] for row in starts.tolist()]
    sliced, listed = batch.FlatParts.of_slices(memory, starts, 8), flat_parts(lists, writable=True)
    assert list(sliced) == list(listed) == lists
    assert sliced.sizes == listed.sizes == [8 * pieces] * 3
    for made in (sliced.behind(rows, 2), listed.behind(rows, 2)):
        assert list(made) == [[rows[2 * at : 2 * at + 2], *lists[at]] for at in range(3)]
        assert made.sizes == [2 + 8 * pieces] * 3
        assert batch.gather(made, [2, 0]) == [*made[2], *made[0]]
        assert made.writable
        for outside in (3, -1):
            with pytest.raises(IndexError):
                batch.gather(made, [outside])
        with pytest.raises(ValueError, match="already"):
            made.behind(rows, 2)
    frozen = batch.FlatParts.of_slices(memory.toreadonly(), starts, 8)
    assert not frozen.writable
    with pytest.raises(InvalidArgumentError, match="read-only"):
        flat_parts(frozen, writable=True)
    with pytest.raises(ValueError, match="2 sizes"):
        batch.FlatParts([[]], [1, 2], writable=True)


def test_where_no_thread_can_be_had_the_caller_does_it_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that has returned or raised leaves no task behind: it would fill memory that belongs to somebody else."""
    keys, values = [f"key{i}" for i in range(4)], [bytes([i + 1]) * 5000 for i in range(4)]
    with FileStorage(tmp_path, segment_bytes=5000, num_threads=3) as storage:
        assert storage.put_many(keys[:1], [[values[0]]]).all()  # one segment: no thread yet
        gate = threading.Event()
        busy = storage._pool.submit(lambda: gate.wait(60))  # the only thread there will be

        def refuse(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", refuse)
        assert storage.put_many(keys, [[value] for value in values]).all()
        buffers = [bytearray(5000) for _ in keys]
        assert storage.get_many(keys, [[buffer] for buffer in buffers]).tolist() == [5000] * 4
        assert buffers == values
        for buffer in buffers:
            buffer[:] = bytes(5000)
        gate.set()
        assert busy.result(10)
        assert storage._pool.submit(lambda: True).result(10)  # whatever was left has been done before this
        assert not any(map(any, buffers))


def test_a_pool_without_any_thread_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    pool = DaemonPool(2, "pool")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(StorageError, match="pool_0 cannot be started"):
            pool.submit(lambda: 1)
    assert pool.submit(lambda: 2).result(10) == 2
    pool.shutdown()


def test_an_interrupt_waits_for_those_who_move_bytes() -> None:
    ended: list[int] = []

    def task() -> None:
        if threading.current_thread() is threading.main_thread():
            assert started.wait(10)
            return
        started.set()
        time.sleep(0.3)  # the main thread waits by now
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.3)
        ended.append(1)

    started, pool = threading.Event(), DaemonPool(1, "pool")
    with pytest.raises(KeyboardInterrupt):
        pool.run_all([task, task])
    assert ended
    pool.shutdown()


def test_an_interrupt_while_tasks_are_handed_out_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    ended: list[int] = []
    started, pool = threading.Event(), DaemonPool(3, "pool")

    def task() -> None:
        begun.append(1)
        started.set()
        ended.append(1)

    def submit(call: Callable[[], Any]) -> Any:
        DaemonPool.submit(pool, call)
        assert started.wait(10)
        raise KeyboardInterrupt

    monkeypatch.setattr(pool, "submit", submit)
    with pytest.raises(KeyboardInterrupt):
        pool.run_all([task] * 100_000)
    left = len(begun)
    pool.shutdown()
    assert left < 100_000
    assert len(begun) - left <= 1  # the one that was running when all others were taken off
    assert len(ended) == len(begun)
