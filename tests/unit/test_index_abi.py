"""Bad input to rkv_index_* from C, and the capacity protocol of find, through ctypes on libradixkv.so.1."""

from __future__ import annotations

import ctypes as c
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import radixkv

OK, ARGUMENT, HANDLE, CAPACITY = 0, -1, -2, -8
KEYS = (c.c_uint64 * 4)(1, 2, 3, 4)


class Hit(c.Structure):
    _fields_ = (
        ("struct_size", c.c_uint32),
        ("reserved", c.c_uint32),
        ("workers", c.POINTER(c.c_uint32)),
        ("pages", c.POINTER(c.c_uint32)),
        ("max_workers", c.c_size_t),
        ("num_workers", c.c_size_t),
        ("nodes", c.c_void_p),
        ("max_nodes", c.c_size_t),
        ("num_nodes", c.c_size_t),
        ("holders", c.POINTER(c.c_uint32)),
        ("max_holders", c.c_size_t),
        ("num_holders", c.c_size_t),
    )


@pytest.fixture(scope="module")
def lib() -> c.CDLL:
    return c.CDLL(str(Path(radixkv.__file__).parent / "lib" / "libradixkv.so.1"))


@pytest.fixture
def index(lib: c.CDLL) -> Iterator[Any]:
    handle = c.c_void_p()
    assert lib.rkv_index_create(None, c.byref(handle)) == OK
    for worker in range(3):
        assert lib.rkv_index_insert(handle, worker, KEYS, c.c_size_t(4 - worker), None, None) == OK
    yield handle
    lib.rkv_index_destroy(handle)


def hit(workers: int) -> Hit:
    out = Hit(struct_size=c.sizeof(Hit), max_workers=workers)
    out.workers, out.pages = (c.c_uint32 * 8)(), (c.c_uint32 * 8)()
    return out


def test_bad_arguments(lib: c.CDLL, index: Any) -> None:
    n, four = c.c_size_t(), c.c_size_t(4)
    small = Hit(struct_size=8)
    assert lib.rkv_index_create(None, None) == ARGUMENT
    assert lib.rkv_index_insert(None, 0, KEYS, four, None, None) == ARGUMENT
    assert lib.rkv_index_insert(index, 0, None, four, None, None) == ARGUMENT
    assert lib.rkv_index_insert(index, 1 << 20, KEYS, four, None, None) == ARGUMENT
    assert lib.rkv_index_insert(index, 0, KEYS, c.c_size_t(1 << 40), None, None) == ARGUMENT
    assert lib.rkv_index_remove(index, 0, None, four, None) == ARGUMENT
    assert lib.rkv_index_clear_worker(None, 0, None) == ARGUMENT
    assert lib.rkv_index_remove_worker(index, 1 << 20, None) == ARGUMENT
    assert lib.rkv_index_find(index, KEYS, four, None) == ARGUMENT
    assert lib.rkv_index_find(index, KEYS, four, c.byref(small)) == ARGUMENT
    assert lib.rkv_index_find(index, KEYS, four, c.byref(Hit(struct_size=c.sizeof(Hit), max_workers=1))) == ARGUMENT
    assert lib.rkv_index_get_stats(index, c.byref((c.c_uint32 * 4)(8))) == ARGUMENT
    assert lib.rkv_index_workers(index, None, c.c_size_t(3), c.byref(n)) == ARGUMENT
    assert lib.rkv_index_dump(index, None, c.c_size_t(1), None, c.c_size_t(0), c.byref(n), c.byref(n)) == ARGUMENT
    assert lib.rkv_index_get_word(index, c.c_uint64(5), None) == ARGUMENT
    assert lib.rkv_index_get_word(index, c.c_uint64(5), c.byref(c.c_uint64())) == HANDLE
    assert lib.rkv_index_set_word(index, c.c_uint64(0xFF << 32 | 1), c.c_uint64(1)) == HANDLE
    assert lib.rkv_index_check_integrity(None, None, c.c_size_t(0)) == ARGUMENT
    lib.rkv_index_destroy(None)
    assert lib.rkv_index_check_integrity(index, None, c.c_size_t(0)) == OK


def test_find_says_how_much_room_it_needs(lib: c.CDLL, index: Any) -> None:
    short, enough = hit(2), hit(3)
    assert lib.rkv_index_find(index, KEYS, c.c_size_t(4), c.byref(short)) == CAPACITY
    assert short.num_workers == 3
    assert lib.rkv_index_find(index, KEYS, c.c_size_t(4), c.byref(enough)) == OK
    assert dict(zip(enough.workers[:3], enough.pages[:3], strict=True)) == {0: 4, 1: 3, 2: 2}
    n, ids = c.c_size_t(), (c.c_uint32 * 3)()
    assert lib.rkv_index_workers(index, ids, c.c_size_t(2), c.byref(n)) == CAPACITY
    assert n.value == 3


def test_a_handle_dies_with_its_index() -> None:
    """The next index is often at the same address; its nodes must not answer to the handles of the one before."""
    stale: list[int] = []
    for _ in range(50):
        index = radixkv.PrefixIndex()
        index.insert(1, [1, 2, 3])
        for handle in stale:
            with pytest.raises(radixkv.HandleError):
                index.set_word(handle, 77)
        stale.append(index.find([1], nodes=True)[1][0].node)
        del index
    assert len(set(stale)) == len(stale)


def test_thousands_of_workers_are_counted_and_listed_at_once() -> None:
    """Each in many shards. Counting them anew for each of them took 15 times what this allows."""
    index, rng = radixkv.PrefixIndex(), np.random.default_rng(3)
    workers = sorted({int(w) for w in rng.integers(0, 2**20, 3000)} | {0, 1023, 1024, 2**20 - 1})
    for worker in workers:
        for key in rng.integers(0, 2**63, 4):
            index.insert(worker, [int(key)])
    taken = []
    for _ in range(5):
        start = time.process_time_ns()
        assert index.workers() == workers
        assert index.stats().workers == len(workers)
        taken.append(time.process_time_ns() - start)
    assert min(taken) < 50e6
    index.check_integrity()
    for worker in workers[::2]:
        index.remove_worker(worker)
    assert index.workers() == workers[1::2]
    assert index.stats().workers == len(workers[1::2])
    index.check_integrity()
