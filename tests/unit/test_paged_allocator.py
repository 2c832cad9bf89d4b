"""pool/paged.py against a naive model: no slot in two hands, tokens of a request in consecutive places of its pages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from radixkv.errors import (
    ArgumentTypeError,
    IntegrityError,
    InvalidArgumentError,
    PageOwnershipError,
    RadixKVError,
    StateError,
)
from radixkv.pool.paged import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator

P = 4


def paged(pages: int = 8, page_size: int = P, **settings: Any) -> PagedTokenToKVPoolAllocator:
    return PagedTokenToKVPoolAllocator(pages * page_size, page_size, **settings)


def taken(slots: Any) -> list[int]:
    assert slots is not None
    return list(map(int, slots))


# ---- alloc and free --------------------------------------------------------------------------------------------------
def test_page_0_is_reserved_unless_told_otherwise() -> None:
    assert taken(paged().alloc(8)) == [4, 5, 6, 7, 8, 9, 10, 11]
    assert taken(paged(reserved_pages=0).alloc(4)) == [0, 1, 2, 3]
    assert taken(paged(1, reserved_pages=3).alloc(4)) == [12, 13, 14, 15]
    tokens = TokenToKVPoolAllocator(3)
    assert (tokens.page_size, taken(tokens.alloc(3))) == (1, [1, 2, 3])


def test_all_can_be_taken_and_no_more() -> None:
    pool = paged(3)
    assert pool.available_size() == 12
    assert pool.alloc(16) is None
    slots = pool.alloc(12)
    assert slots.dtype == np.int64
    assert (pool.available_size(), pool.used_size) == (0, 12)
    assert pool.alloc(4) is None
    assert taken(pool.alloc(0)) == []
    pool.free(slots)
    assert (pool.available_size(), pool.used_size) == (12, 0)
    pool.check_integrity()


def test_a_rest_of_the_size_that_is_no_page_is_left_out() -> None:
    assert PagedTokenToKVPoolAllocator(11, 4).available_size() == 8


def test_released_pages_wait_until_the_ready_ones_run_out_and_come_back_in_order() -> None:
    pool = paged(5)
    slots = pool.alloc(16)
    pool.free(slots[8:12])
    pool.free(slots[0:4])
    assert (pool.free_pages.tolist(), pool.release_pages.tolist()) == ([5], [3, 1])
    assert taken(pool.alloc(4)) == [20, 21, 22, 23]
    assert taken(pool.alloc(8)) == [4, 5, 6, 7, 12, 13, 14, 15]


def test_a_page_is_freed_whole_by_any_of_its_slots() -> None:
    pool = paged()
    slots = pool.alloc(12)
    pool.free(slots[[9, 2, 1]])
    assert pool.available_size() == 28
    with pytest.raises(PageOwnershipError, match="slot 4 is of page 1, which is not in use"):
        pool.free(slots[:1])
    pool.free(slots[4:8])
    pool.check_integrity()


@pytest.mark.parametrize(("slots", "match"), [
    ([4, 4], "slot 4 is given twice"), ([4, 5, 6, 7, 4, 5, 6, 7], "slot 4 is given twice"),
    ([0], "slot 0 is not of this pool: slots 4 .. 35"), ([3], "slot 3 is not"),
    ([0, 1, 2, 3], "slot 0 is not"), ([36, 37, 38, 39], "slot 36 is not"), ([12, 13, 14, 15], "slot 12 is of page 3"),
    ([36], "slot 36 is not"), ([-1], "slot -1 is not"), ([4, 12], "slot 12 is of page 3, which is not in use"),
])  # fmt: skip
def test_wrong_frees_are_refused_whole(slots: list[int], match: str) -> None:
    pool = paged()
    pool.alloc(8)
    for in_group in (False, True):
        if in_group:
            pool.free_group_begin()
        with pytest.raises(PageOwnershipError, match=match):
            pool.free(slots)
        assert pool.available_size() == 24
    pool.free_group_end()
    assert pool.available_size() == 24
    pool.check_integrity()


def test_negative_slots_are_not_those_of_the_last_page() -> None:
    pool = paged()
    pool.alloc(32)
    with pytest.raises(PageOwnershipError, match="slot -4 is not of this pool"):
        pool.free([-4, -3, -2, -1])
    assert pool.available_size() == 0


def test_wrong_arguments() -> None:
    for need in (-4, 3, 5):
        with pytest.raises(InvalidArgumentError, match=f"{need} tokens"):
            paged().alloc(need)
    for values in (np.zeros(1), np.zeros((1, 1), np.int64), ["4"], True):
        with pytest.raises(ArgumentTypeError, match="free_index is a 1-d array of integers"):
            paged().free(values)
    paged().free([])
    for size, page_size, reserved in ((-1, 4, 1), (4, 0, 1), (4, 4, -1)):
        with pytest.raises(InvalidArgumentError, match="tokens in pages of"):
            PagedTokenToKVPoolAllocator(size, page_size, reserved_pages=reserved)


# ---- extend and decode -----------------------------------------------------------------------------------------------
def test_extend_fills_the_last_page_then_new_ones() -> None:
    pool = paged()
    first = pool.alloc_extend([0, 0], [6, 3], [-1, -1], 9)
    assert taken(first) == [4, 5, 6, 7, 8, 9, 12, 13, 14]
    more = pool.alloc_extend([6, 3], [13, 4], [9, 14], 8)
    assert taken(more) == [10, 11, 16, 17, 18, 19, 20, 15]
    assert pool.available_size() == 3 * P
    pool.check_integrity()


def test_extend_by_nothing_and_of_nobody() -> None:
    pool = paged()
    assert taken(pool.alloc_extend([5], [5], [99], 0)) == []  # last_loc is not read
    assert taken(pool.alloc_extend([], [], [], 0)) == []
    assert pool.available_size() == 8 * P


def test_decode_takes_the_next_place_or_a_new_page() -> None:
    pool = paged()
    slots = pool.alloc_extend([0, 0], [3, 4], [-1, -1], 7)
    assert taken(pool.alloc_decode([4, 5], [slots[2], slots[6]])) == [7, 12]
    assert taken(pool.alloc_decode([5, 6], [7, 12])) == [16, 13]
    assert pool.available_size() == 4 * P


def test_a_call_that_lacks_pages_changes_nothing() -> None:
    pool = paged(2)
    pool.alloc_extend([0], [5], [-1], 5)
    assert pool.alloc_extend([5], [9], [8], 4) is None
    assert pool.alloc_decode([1], [-1]) is None
    assert taken(pool.alloc_extend([5], [8], [8], 3)) == [9, 10, 11]
    pool.check_integrity()


@pytest.mark.parametrize(("arguments", "error", "match"), [
    (([3], [2], [6], -1), InvalidArgumentError, "3 tokens cannot grow to 2"),
    (([-1], [2], [6], 3), InvalidArgumentError, "-1 tokens"),
    (([3], [5], [6], 3), InvalidArgumentError, "grow by 2 tokens, not by 3"),
    (([3], [5, 6], [6], 5), InvalidArgumentError, "1 prefix lengths, 2 lengths, 1 last"),
    (([3], [5], [7], 2), InvalidArgumentError, "slot 7 is not at the place of token 2"),
    (([3], [5], [34], 2), PageOwnershipError, "slot 34 is of page 8, which is not in use"),
    (([3], [5], [38], 2), PageOwnershipError, "slot 38 is not of this pool"),
    (([3, 3], [4, 4], [6, 6], 2), PageOwnershipError, "two requests would go on in one page"),
])  # fmt: skip
def test_contradictions_raise_and_change_nothing(arguments: Any, error: type[RadixKVError], match: str) -> None:
    pool = paged()
    pool.alloc_extend([0], [3], [-1], 3)
    with pytest.raises(error, match=match):
        pool.alloc_extend(*arguments)
    assert pool.available_size() == 28
    assert taken(pool.alloc_decode([4], [6])) == [7]


def test_decode_of_no_token_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="-1 tokens cannot grow to 0"):
        paged().alloc_decode([0], [-1])


# ---- groups and state ------------------------------------------------------------------------------------------------
def test_a_group_frees_at_its_end() -> None:
    pool = paged()
    slots = pool.alloc(12)
    pool.free_group_begin()
    assert not pool.is_not_in_free_group
    pool.free(slots[:2])
    pool.free(slots[2:6])  # the rest of page 1, and a part of page 2
    assert pool.available_size() == 20
    assert "grouped_slots=6" in pool.debug_print()
    with pytest.raises(PageOwnershipError, match="slot 6 is given twice in one free group"):
        pool.free(slots[2:3])
    pool.free_group_end()
    assert pool.is_not_in_free_group
    assert pool.available_size() == 28
    pool.check_integrity()
    with pytest.raises(StateError, match="without free_group_begin"):
        pool.free_group_end()


def test_groups_do_not_nest_and_an_empty_one_frees_nothing() -> None:
    pool = paged()
    pool.free_group_begin()
    with pytest.raises(StateError, match="open already and holds 0 slots"):
        pool.free_group_begin()
    pool.free_group_end()
    assert pool.available_size() == 32


def test_state_is_restored_as_a_whole() -> None:
    pool = paged()
    first = pool.alloc(8)
    pool.free(first[:4])
    state = pool.backup_state()
    second = pool.alloc(20)
    pool.free(first[4:])
    pool.restore_state(state)
    pool.check_integrity()
    assert pool.available_size() == 28
    pool.free(first[4:])  # in use again
    with pytest.raises(PageOwnershipError, match="not in use"):
        pool.free(second)  # free again
    assert sorted(taken(pool.alloc(32))) == list(range(4, 36))


def test_a_state_of_an_allocator_that_is_gone_is_refused() -> None:
    """The next allocator often lies at its address."""
    for _ in range(20):
        gone = paged()
        gone.alloc(8)
        state = gone.backup_state()
        del gone
        pool = paged()
        with pytest.raises(StateError, match="another allocator"):
            pool.restore_state(state)
        del pool


def test_states_of_others_and_of_the_past_are_refused() -> None:
    pool, other = paged(), paged()
    state = pool.backup_state()
    for wrong in (other, pool):
        if wrong is pool:
            pool.clear()
        with pytest.raises(StateError, match="another allocator"):
            wrong.restore_state(state)
    pool.free_group_begin()
    for call in (pool.backup_state, lambda: pool.restore_state(state)):
        with pytest.raises(StateError, match="open free group"):
            call()


def test_clear_frees_all_and_closes_the_group() -> None:
    pool = paged()
    slots = pool.alloc(8)
    pool.free_group_begin()
    pool.free(slots)
    pool.clear()
    assert pool.is_not_in_free_group
    assert taken(pool.alloc(32)) == list(range(4, 36))
    pool.check_integrity()


def corrupt_ready(pool: PagedTokenToKVPoolAllocator) -> None:
    pool._ready = pool._ready[::-1]


def corrupt_twice(pool: PagedTokenToKVPoolAllocator) -> None:
    pool._ready = np.array([1, 3, 4, 5, 6, 7, 8])


def corrupt_reserved(pool: PagedTokenToKVPoolAllocator) -> None:
    pool._ready = np.arange(9)


def corrupt_count(pool: PagedTokenToKVPoolAllocator) -> None:
    pool._num_released = 2


def corrupt_range(pool: PagedTokenToKVPoolAllocator) -> None:
    pool._ready = np.append(pool._ready, 9)


@pytest.mark.parametrize("corrupt", [corrupt_ready, corrupt_twice, corrupt_reserved, corrupt_count, corrupt_range])
def test_check_integrity_finds_each_kind_of_damage(corrupt: Any) -> None:
    pool = paged()
    pool.free(pool.alloc(8)[4:])
    pool.check_integrity()
    corrupt(pool)
    with pytest.raises(IntegrityError):
        pool.check_integrity()


# ---- the border ------------------------------------------------------------------------------------------------------
def test_tensors_in_tensors_out() -> None:
    torch = pytest.importorskip("torch")
    pool = paged(dtype=torch.bfloat16)
    slots = pool.alloc(4)
    assert (slots.dtype, slots.tolist()) == (torch.int64, [4, 5, 6, 7])
    more = pool.alloc_extend(torch.tensor([3]), torch.tensor([6], dtype=torch.int32), slots[2:3], 3)
    assert (type(more), more.tolist()) == (torch.Tensor, [7, 8, 9])
    assert pool.alloc_decode(torch.tensor([7]), more[-1:]).tolist() == [10]
    assert isinstance(pool.alloc_decode(np.array([8]), np.array([10])), np.ndarray)
    pool.free(torch.cat([slots, more[1:]]))
    assert pool.available_size() == 8 * P
    assert isinstance(paged(dtype=torch.bfloat16, library="numpy").alloc(4), np.ndarray)
    assert torch.is_tensor(paged(library="torch").alloc(4))


def test_the_pool_behind_it() -> None:
    calls: list[Any] = []
    kvcache = SimpleNamespace(get_cpu_copy=lambda indices: ("copy", indices), load_cpu_copy=lambda *a: calls.append(a))
    pool = paged(kvcache=kvcache)
    assert pool.get_kvcache() is kvcache
    assert pool.get_cpu_copy([4]) == ("copy", [4])
    pool.load_cpu_copy("copy", [5])
    assert calls == [("copy", [5])]


def test_what_is_freed_may_be_a_view_that_changes_before_the_group_ends() -> None:
    pool = paged()
    slots = pool.alloc(8)
    pool.free_group_begin()
    pool.free(slots[:4])
    slots[:] = 99
    pool.free_group_end()
    assert pool.release_pages.tolist() == [1]


# ---- against a naive model -------------------------------------------------------------------------------------------
class Model(RuleBasedStateMachine):
    """Requests grow, end and are restored; the model keeps each request's slots and derives all else from them."""

    @initialize(pages=st.integers(1, 12), page_size=st.sampled_from([1, 3, 4, 16]), reserved=st.integers(0, 2))
    def begin(self, pages: int, page_size: int, reserved: int) -> None:
        self.pages, self.page_size, self.reserved = pages, page_size, reserved
        self.pool = PagedTokenToKVPoolAllocator(pages * page_size, page_size, reserved_pages=reserved)
        self.requests: list[list[int]] = []
        self.held: list[list[int]] | None = None  # of an open group
        self.saved: Any = None

    def pages_of(self, slots: list[int]) -> set[int]:
        return {slot // self.page_size for slot in slots}

    def used_pages(self) -> set[int]:
        return set().union(*(self.pages_of(slots) for slots in [*self.requests, *(self.held or [])]))

    def grow(self, which: list[int], grown: list[int], slots: Any) -> None:
        """Check what a call returned, and take it over."""
        needed = sum(
            -(-(len(self.requests[i]) + more) // self.page_size) - -(-len(self.requests[i]) // self.page_size)
            for i, more in zip(which, grown, strict=True)
        )
        if needed > self.pages - len(self.used_pages()):
            assert slots is None
            return
        assert slots is not None
        assert slots.size == sum(grown)
        used, at = self.used_pages(), 0
        for i, more in zip(which, grown, strict=True):
            mine = self.requests[i]
            for slot in slots[at : at + more].tolist():
                if len(mine) % self.page_size:
                    assert slot == mine[-1] + 1
                else:
                    page = slot // self.page_size
                    assert slot % self.page_size == 0
                    assert page not in used
                    assert self.reserved <= page < self.reserved + self.pages
                    used.add(page)
                mine.append(slot)
            at += more

    @rule(data=st.data(), grown=st.lists(st.integers(0, 20), max_size=4), new=st.integers(0, 2))
    def extend(self, data: st.DataObject, grown: list[int], new: int) -> None:
        self.requests += [[] for _ in range(new)]
        count = min(len(grown), len(self.requests))
        which = data.draw(st.permutations(range(len(self.requests))))[:count]
        grown = grown[:count]
        before = [len(self.requests[i]) for i in which]
        after = [a + b for a, b in zip(before, grown, strict=True)]
        last = [self.requests[i][-1] if self.requests[i] else -1 for i in which]
        self.grow(which, grown, self.pool.alloc_extend(before, after, last, sum(grown)))

    @precondition(lambda self: self.requests)
    @rule()
    def decode(self) -> None:
        which = list(range(len(self.requests)))
        last = [slots[-1] if slots else -1 for slots in self.requests]
        lengths = [len(slots) + 1 for slots in self.requests]
        self.grow(which, [1] * len(which), self.pool.alloc_decode(lengths, last))

    @rule(pages=st.integers(0, 5))
    def alloc(self, pages: int) -> None:
        self.requests.append([])
        slots = self.pool.alloc(pages * self.page_size)
        self.grow([len(self.requests) - 1], [pages * self.page_size], slots)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        slots = self.requests.pop(data.draw(st.integers(0, len(self.requests) - 1)))
        self.pool.free(data.draw(st.permutations(slots)) if data.draw(st.booleans()) else slots)
        if self.held is not None:
            self.held.append(slots)

    @precondition(lambda self: self.held is None)
    @rule()
    def group(self) -> None:
        self.pool.free_group_begin()
        self.held = []

    @precondition(lambda self: self.held is not None)
    @rule()
    def ungroup(self) -> None:
        self.pool.free_group_end()
        self.held = None

    @precondition(lambda self: self.held is None)
    @rule()
    def save(self) -> None:
        self.saved = (self.pool.backup_state(), [list(slots) for slots in self.requests])

    @precondition(lambda self: self.held is None and self.saved)
    @rule()
    def restore(self) -> None:
        state, requests = self.saved
        self.pool.restore_state(state)
        self.requests = [list(slots) for slots in requests]

    @rule()
    def clear(self) -> None:
        self.pool.clear()
        self.requests, self.held, self.saved = [], None, None

    @rule(slot=st.integers(-2, 300))
    def free_what_is_free(self, slot: int) -> None:
        if slot // self.page_size not in self.used_pages():
            with pytest.raises(PageOwnershipError):
                self.pool.free([slot])

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "pool"):
            assert self.pool.available_size() == (self.pages - len(self.used_pages())) * self.page_size
            self.pool.check_integrity()


Model.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestModel = Model.TestCase
