"""pool/slots.py and pool/host.py: no page lost or handed out twice; bytes land where they should."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from radixkv.errors import ArgumentTypeError, IntegrityError, InvalidArgumentError, PageOwnershipError
from radixkv.pool.host import HostPagePool, copy_pages
from radixkv.pool.slots import SlotAllocator


# ---- the allocator ---------------------------------------------------------------------------------------------------
def test_fresh_ids_are_contiguous() -> None:
    slots = SlotAllocator(10)
    first, second = slots.alloc(3), slots.alloc(4)
    assert first is not None
    assert second is not None
    assert first.dtype == np.int32
    assert (first.tolist(), second.tolist()) == ([0, 1, 2], [3, 4, 5, 6])
    assert (slots.available, slots.used) == (3, 7)


def test_contiguous_first_then_freed_runs_in_their_order() -> None:
    slots = SlotAllocator(10)
    slots.alloc(8)
    slots.free([2, 3, 4])
    assert slots.alloc(2).tolist() == [8, 9]  # a fresh run is still long enough
    assert slots.alloc(3).tolist() == [2, 3, 4]


def test_the_fresh_run_is_kept_for_shorter_calls() -> None:
    slots = SlotAllocator(10)
    slots.alloc(8)
    slots.free([0, 1, 2, 3])
    assert slots.alloc(3).tolist() == [1, 2, 3]
    assert slots.alloc(2).tolist() == [8, 9]


def test_everything_can_be_allocated() -> None:
    slots = SlotAllocator(10)
    slots.alloc(7)
    slots.free([5, 1, 3])
    assert sorted(slots.alloc(6).tolist()) == [1, 3, 5, 7, 8, 9]
    assert slots.available == 0
    slots.check_integrity()


def test_none_when_short_and_nothing_changes() -> None:
    slots = SlotAllocator(4)
    slots.alloc(2)
    assert slots.alloc(3) is None
    assert slots.available == 2
    assert slots.alloc(2).tolist() == [2, 3]
    assert slots.alloc(0).tolist() == []


@pytest.mark.parametrize(("ids", "word"), [
    ([1, 6], "freed twice"), ([5], "freed twice"), ([2, 3, 2], "given twice"),
    ([7, 8], "not of this pool"), ([-1], "not of this pool"), ([2**40], "not of this pool"),
])  # fmt: skip
def test_wrong_frees_are_refused_whole(ids: list[int], word: str) -> None:
    slots = SlotAllocator(8)
    slots.alloc(6)
    slots.free([5])
    before = sorted(slots.free_ids().tolist())
    with pytest.raises(PageOwnershipError, match=word):
        slots.free(ids)
    assert sorted(slots.free_ids().tolist()) == before
    slots.check_integrity()


def test_free_takes_ids_of_any_integer_type_and_nothing_else() -> None:
    slots = SlotAllocator(8)
    slots.alloc(8)
    slots.free(np.array([0], np.uint64))
    slots.free((1, 2))
    slots.free(np.array([3, 4, 5], np.int32)[::2])
    slots.free([])
    assert sorted(slots.free_ids().tolist()) == [0, 1, 2, 3, 5]
    for wrong in ([0.5], [[4]], [True], ["4"]):
        with pytest.raises(ArgumentTypeError):
            slots.free(wrong)


@pytest.mark.parametrize("capacity", [-1, 2**31])
def test_bad_capacity(capacity: int) -> None:
    with pytest.raises(InvalidArgumentError):
        SlotAllocator(capacity)


def test_negative_alloc() -> None:
    with pytest.raises(InvalidArgumentError):
        SlotAllocator(3).alloc(-1)


def test_empty_pool() -> None:
    slots = SlotAllocator(0)
    assert slots.alloc(1) is None
    assert slots.alloc(0).tolist() == []
    with pytest.raises(PageOwnershipError):
        slots.free([0])
    slots.check_integrity()


def corrupt_stack(slots: SlotAllocator) -> None:
    slots._stack[0] = slots._stack[1]


def corrupt_mark(slots: SlotAllocator) -> None:
    slots.states[0] = 0


def corrupt_counter(slots: SlotAllocator) -> None:
    slots._stack_len -= 1


def corrupt_fresh(slots: SlotAllocator) -> None:
    slots._fresh = 9


@pytest.mark.parametrize("corrupt", [corrupt_stack, corrupt_mark, corrupt_counter, corrupt_fresh])
def test_integrity_check_can_fail(corrupt: object) -> None:
    slots = SlotAllocator(8)
    slots.alloc(6)
    slots.free([2, 4])
    slots.check_integrity()
    corrupt(slots)
    with pytest.raises(IntegrityError):
        slots.check_integrity()


class SlotMachine(RuleBasedStateMachine):
    """Beside a set that always tells the truth."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = SlotAllocator(12)
        self.used: list[int] = []

    @rule(count=st.integers(0, 14))
    def alloc(self, count: int) -> None:
        ids = self.slots.alloc(count)
        if count > 12 - len(self.used):
            assert ids is None
            return
        assert ids is not None
        taken = ids.tolist()
        assert len(taken) == len(set(taken)) == count
        assert not set(taken) & set(self.used)
        assert set(taken) <= set(range(12))
        self.used += taken

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        some = data.draw(st.lists(st.sampled_from(self.used), unique=True))
        self.slots.free(some)
        self.used = [page for page in self.used if page not in some]

    @rule(data=st.data())
    def free_wrongly(self, data: st.DataObject) -> None:
        idle = sorted(set(range(-2, 15)) - set(self.used))
        good = data.draw(st.lists(st.sampled_from(self.used), unique=True)) if self.used else []
        with pytest.raises(PageOwnershipError):
            self.slots.free(data.draw(st.permutations([*good, data.draw(st.sampled_from(idle))])))

    @invariant()
    def sound(self) -> None:
        self.slots.check_integrity()
        assert self.slots.used == len(self.used)
        assert sorted(self.slots.free_ids().tolist()) == sorted(set(range(12)) - set(self.used))


TestSlotMachine = SlotMachine.TestCase
TestSlotMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


# ---- the pools -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("page_bytes", [1, 3, 8, 256])
def test_scatter_gather_and_copy_touch_exactly_their_pages(page_bytes: int) -> None:
    rng = np.random.default_rng(1)
    a, b = HostPagePool(9, page_bytes), HostPagePool(7, page_bytes)
    a.data[:] = rng.integers(0, 256, a.data.shape)
    b.data[:] = 0xEE
    rows = rng.integers(0, 256, (3, page_bytes)).astype(np.uint8)
    before = a.data.copy()
    a.scatter(np.array([8, 0, 5], np.int32), rows)
    expected = before.copy()
    expected[[8, 0, 5]] = rows
    assert np.array_equal(a.data, expected)
    assert np.array_equal(a.gather(np.array([5, 8], np.int32)), rows[[2, 0]])
    copy_pages(a, np.array([5, 1], np.int32), b, np.array([0, 6], np.int32))
    assert np.array_equal(b.data[[0, 6]], expected[[5, 1]])
    assert (b.data[1:6] == 0xEE).all()
    assert np.array_equal(a.data, expected)


def test_gather_is_a_copy() -> None:
    pool = HostPagePool(2, 4)
    pool.data[:] = 1
    rows = pool.gather(np.array([1], np.int32))
    rows[:] = 9
    assert (pool.data == 1).all()


def test_scatter_takes_rows_of_any_layout() -> None:
    pool = HostPagePool(4, 6)
    pool.data[:] = 0
    wide = np.arange(48, dtype=np.uint8).reshape(4, 12)
    pool.scatter(np.arange(4, dtype=np.int32), wide[:, ::2])
    assert np.array_equal(pool.data, wide[:, ::2])


def test_no_pages_is_fine() -> None:
    none = np.zeros(0, np.int32)
    pool, empty = HostPagePool(2, 4), HostPagePool(0, 4)
    copy_pages(pool, none, empty, none)
    pool.scatter(none, np.zeros((0, 4), np.uint8))
    assert pool.gather(none).shape == empty.gather(none).shape == (0, 4)


def test_mismatches_are_errors() -> None:
    pool, other = HostPagePool(4, 8), HostPagePool(4, 16)
    one, two = np.array([0], np.int32), np.array([0, 1], np.int32)
    with pytest.raises(InvalidArgumentError):
        copy_pages(pool, one, pool, two)
    with pytest.raises(InvalidArgumentError):
        copy_pages(pool, one, other, one)
    with pytest.raises(InvalidArgumentError):
        pool.scatter(two, np.zeros((1, 8), np.uint8))
    with pytest.raises(IndexError):
        pool.gather(np.array([4], np.int32))
    for pages, size in ((-1, 8), (4, 0)):
        with pytest.raises(InvalidArgumentError):
            HostPagePool(pages, size)
