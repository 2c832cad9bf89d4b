"""rkv_index_* with an allocator that fails: at every site, one at a time, the call says so and the index is as it was.

Through ctypes on libradixkv.so.1, as the allocator is the C caller's to give. The allocator also proves that each
block is resized and freed with the size that it has, and that destroy frees them all.
"""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import radixkv

OK, NO_MEMORY = 0, -6
REALLOC = c.CFUNCTYPE(c.c_void_p, c.c_void_p, c.c_void_p, c.c_size_t, c.c_size_t)


class Allocator(c.Structure):
    _fields_ = (("reallocate", REALLOC), ("ctx", c.c_void_p))


class Config(c.Structure):
    _fields_ = (
        ("struct_size", c.c_uint32),
        ("reserved", c.c_uint32),
        ("max_pages", c.c_uint64),
        ("allocator", Allocator),
    )


class Page(c.Structure):
    _fields_ = (
        ("key", c.c_uint64),
        ("parent_key", c.c_uint64),
        ("has_parent", c.c_uint32),
        ("orphan", c.c_uint32),
        ("first_holder", c.c_uint64),
        ("num_holders", c.c_uint64),
    )


@pytest.fixture(scope="module")
def lib() -> c.CDLL:
    return c.CDLL(str(Path(radixkv.__file__).parent / "lib" / "libradixkv.so.1"))


class Memory:
    """malloc with books; fails at the fail_at-th allocation or growth from when it was set (0: never)."""

    def __init__(self) -> None:
        libc = c.CDLL(None)
        libc.malloc.restype = libc.realloc.restype = c.c_void_p
        libc.malloc.argtypes, libc.realloc.argtypes, libc.free.argtypes = (
            [c.c_size_t],
            [c.c_void_p, c.c_size_t],
            [c.c_void_p],
        )
        self.libc, self.sizes, self.fail_at, self.wrong = libc, {}, 0, []
        self.function = REALLOC(self.reallocate)

    def reallocate(self, _ctx: int, ptr: int | None, old: int, new: int) -> int | None:
        if (self.sizes.get(ptr) if ptr else 0) != old:
            self.wrong.append((ptr, old, new))
        if new == 0:
            self.sizes.pop(ptr, None)
            self.libc.free(ptr)
            return None
        if self.fail_at:
            self.fail_at -= 1
            if self.fail_at == 0:
                return None
        self.sizes.pop(ptr, None)
        block = self.libc.realloc(ptr, new) if ptr else self.libc.malloc(new)
        c.memset(block + old, 0xA5, max(new - old, 0))  # never zeroed: nothing may count on it
        self.sizes[block] = new
        return block


class Index:
    def __init__(self, lib: c.CDLL, max_pages: int) -> None:
        self.lib, self.memory, self.handle = lib, Memory(), c.c_void_p()
        self.config = Config(c.sizeof(Config), 0, max_pages, Allocator(self.memory.function, None))
        self.status = lib.rkv_index_create(c.byref(self.config), c.byref(self.handle))

    def insert(self, worker: int, keys: list[int], parent: int | None = None) -> int:
        at = None if parent is None else c.byref(c.c_uint64(parent))
        return self.lib.rkv_index_insert(
            self.handle, c.c_uint32(worker), (c.c_uint64 * len(keys))(*keys), c.c_size_t(len(keys)), at, None
        )

    def remove(self, worker: int, keys: list[int]) -> int:
        return self.lib.rkv_index_remove(
            self.handle, c.c_uint32(worker), (c.c_uint64 * len(keys))(*keys), c.c_size_t(len(keys)), None
        )

    def clear_worker(self, worker: int) -> int:
        return self.lib.rkv_index_clear_worker(self.handle, c.c_uint32(worker), None)

    def remove_worker(self, worker: int) -> int:
        return self.lib.rkv_index_remove_worker(self.handle, c.c_uint32(worker), None)

    def content(self) -> tuple[Any, ...]:
        message = c.create_string_buffer(200)
        assert self.lib.rkv_index_check_integrity(self.handle, message, c.c_size_t(200)) == OK, message.value
        n, h, w = c.c_size_t(), c.c_size_t(), c.c_size_t()
        self.lib.rkv_index_dump(self.handle, None, c.c_size_t(0), None, c.c_size_t(0), c.byref(n), c.byref(h))
        pages, holders = (Page * (n.value + 1))(), (c.c_uint32 * (h.value + 1))()
        args = (c.c_size_t(n.value), holders, c.c_size_t(h.value), c.byref(n), c.byref(h))
        assert self.lib.rkv_index_dump(self.handle, pages, *args) == OK
        ids = (c.c_uint32 * 4096)()
        assert self.lib.rkv_index_workers(self.handle, ids, c.c_size_t(4096), c.byref(w)) == OK
        rows = sorted(
            (
                p.key,
                p.has_parent,
                p.parent_key,
                p.orphan,
                tuple(holders[p.first_holder : p.first_holder + p.num_holders]),
            )
            for p in pages[: n.value]
        )
        return rows, ids[: w.value]

    def close(self) -> None:
        self.lib.rkv_index_destroy(self.handle)
        assert self.memory.wrong == []
        assert self.memory.sizes == {}


def spread(start: int, count: int) -> list[int]:
    return [(start + i) * 0x9E3779B97F4A7C15 % (1 << 64) for i in range(count)]


A, B, C = spread(0, 3000), spread(10_000, 40), spread(20_000, 60)
CALLS: list[tuple[Any, ...]] = [
    ("insert", 1, []),
    ("insert", 1, B),
    ("insert", 2, B[:20]),  # a split, and new sets
    ("insert", 3, C[30:], C[29]),  # orphans, that a later insert moves to another shard
    ("insert", 4, [C[50], 77], C[49]),  # a split and a branch among them
    ("insert", 5, [88, 89], 87),
    ("insert", 5, [87], 86),  # orphans that join orphans
    ("insert", 6, C),
    *(("insert", 300 + w, [201, 202][: w % 3], 200) for w in range(30)),
    ("insert", 2, [199, 200]),  # orphans of many workers move to a shard that knows none of these
    ("remove", 1, B[5:10]),
    ("remove", 6, [*C[::3], *B]),
    ("insert", 1, B),
    ("insert", 1, [91, 92]),
    *(("insert", 1, [93 + i], 92 + i) for i in range(6)),  # a run that grows, with slack
    *(("insert", 100 + w, B[: w % 7 + 1]) for w in range(40)),  # sets and worker tables that grow
    ("insert", 7, A),  # chunks, and the directory
    ("insert", 7, [*A[:1500], *spread(30_000, 3)]),
    ("remove", 7, A[100:2900:5]),
    ("clear_worker", 1),
    ("remove_worker", 6),
    ("insert", 7, A),
]


@pytest.fixture
def build(lib: c.CDLL) -> Iterator[Callable[[int, int], Index]]:
    made: list[Index] = []

    def make(max_pages: int, calls: int) -> Index:
        index = Index(lib, max_pages)
        made.append(index)
        assert index.status == OK
        for name, *args in CALLS[:calls]:
            assert getattr(index, name)(*args) == OK
        return index

    yield make
    for index in made:
        index.close()


@pytest.mark.parametrize("max_pages", [0, 2500], ids=["unbounded", "bounded"])
@pytest.mark.parametrize("call", range(len(CALLS)))
def test_every_allocation_of_a_call_may_fail(build: Callable[[int, int], Index], max_pages: int, call: int) -> None:
    name, *args = CALLS[call]
    expected = build(max_pages, call + 1).content()
    before = build(max_pages, call).content()
    for n in range(1, 500):
        index = build(max_pages, call)
        index.memory.fail_at = n
        status = getattr(index, name)(*args)
        if index.memory.fail_at:  # it needed fewer than n allocations
            assert status == OK
            index.memory.fail_at = 0
            assert index.content() == expected
            return
        assert status == NO_MEMORY
        assert index.content() == before
        assert getattr(index, name)(*args) == OK  # nothing is broken: with memory it works
        assert index.content() == expected
    pytest.fail("more allocations than anyone would believe")


def test_the_calls_reach_the_allocator(build: Callable[[int, int], Index]) -> None:
    """The test above proves little where calls need no memory: count the sites that it fails."""
    sites = 0
    for call, (name, *args) in enumerate(CALLS):
        index = build(2500, call)
        index.memory.fail_at = 1000
        getattr(index, name)(*args)
        sites += 1000 - index.memory.fail_at
    assert sites > 60


def test_create_may_fail(lib: c.CDLL) -> None:
    memory = Memory()
    memory.fail_at = 1
    config, handle = Config(c.sizeof(Config), 0, 0, Allocator(memory.function, None)), c.c_void_p()
    assert lib.rkv_index_create(c.byref(config), c.byref(handle)) == NO_MEMORY
    assert memory.sizes == {}
