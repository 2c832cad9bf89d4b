"""Slots and page ids, and the allocators between which they travel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from radixkv.errors import ArgumentTypeError, InvalidArgumentError, PageOwnershipError, TokenRangeError
from radixkv.hicache import PagedTokenToKVPoolAllocator, ReqToTokenPool
from radixkv.hicache.indices import AllocatorPages, Indices, NumberedPages
from radixkv.hicache.slots import Tensors, pages_of, slots_of, tokens_of


@pytest.mark.parametrize("page_size", [1, 2, 3, 16, 64, 1000])
@pytest.mark.parametrize("count", [0, 1, 2, 17])
def test_pages_to_slots_and_back(page_size: int, count: int) -> None:
    pages = np.random.default_rng(count).permutation(count + 3)[:count].astype(np.int32)
    slots = slots_of(pages, page_size)
    assert slots.dtype == np.int64
    assert slots.tolist() == [page * page_size + at for page in pages.tolist() for at in range(page_size)]
    for given in (slots, slots.astype(np.int32)):
        back = pages_of(given, page_size)
        assert (back.dtype, back.tolist()) == (np.int32, pages.tolist())


def test_slots_of_the_largest_pages() -> None:
    pages = np.array([2**31 - 1, 0], np.int32)
    assert slots_of(pages, 65_536)[0] == (2**31 - 1) * 65_536
    assert pages_of(slots_of(pages, 65_536), 65_536).tolist() == pages.tolist()
    assert pages_of(np.array([2**31 - 1]), 1).tolist() == [2**31 - 1]


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("wrong", [-1, -(2**40), 2**31 * 4, 2**62])
def test_slots_that_no_page_has(page_size: int, wrong: int) -> None:
    slots = np.concatenate([slots_of(np.array([7, 3], np.int32), page_size), wrong + np.arange(page_size)])
    at = 2 * page_size
    with pytest.raises(InvalidArgumentError, match=f"slot {wrong} at position {at} "):
        pages_of(slots, page_size)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_the_first_slot_that_is_out_of_place_is_named(dtype: Any) -> None:
    good = slots_of(np.array([5, 2, 9], np.int32), 4).astype(dtype)
    for at in range(len(good)):
        bad = good.copy()
        bad[at] += 1
        with pytest.raises(InvalidArgumentError, match=rf"slot \d+ at position {at} ") as caught:
            pages_of(bad, 4)
        assert f"slot {bad[at]} " in str(caught.value) or at % 4 == 0
    with pytest.raises(InvalidArgumentError, match="11 slots are no whole pages of 4"):
        pages_of(good[:11], 4)
    descending = good[::-1].copy()
    with pytest.raises(InvalidArgumentError, match="ascending"):
        pages_of(descending, 4)


def test_slots_of_wrong_types() -> None:
    for wrong in (np.zeros(4), np.zeros(4, np.int16), np.zeros((2, 2), np.int64)):
        with pytest.raises(ArgumentTypeError):
            pages_of(wrong, 1)
    assert pages_of(np.arange(8)[::2], 1).tolist() == [0, 2, 4, 6]
    assert pages_of(np.zeros(0), 4).tolist() == []


@pytest.fixture
def tensors() -> Tensors:
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if exchange is None:
        pytest.skip(f"torch {torch.__version__} has no DLPack exchange API")
    return Tensors(torch.Tensor, exchange)


@pytest.mark.parametrize("count", [0, 1, 3, 1000])
def test_tensors_of_slots_own_their_memory(tensors: Tensors, count: int) -> None:
    pages = np.random.default_rng(count).permutation(count).astype(np.int32)
    made = [tensors.slots_of(pages, 4) for _ in range(50)]
    for tensor in made:
        assert (type(tensor), tensor.dtype) == (torch.Tensor, torch.int64)
        assert tensor.is_contiguous()
        assert tensor.tolist() == slots_of(pages, 4).tolist()
        tensor += 4  # it is nobody else's
    kept = made[0][: 4 * count // 2]  # a view keeps the memory, the others go
    expected = (slots_of(pages, 4) + 4)[: 4 * count // 2].tolist()
    del made, tensor
    others = [tensors.slots_of(pages, 4) for _ in range(50)]
    assert kept.tolist() == expected
    for given in (others[0], others[0].int(), others[0][8:] if count > 2 else others[0]):
        assert tensors.pages_of(given, 4).tolist() == (given[::4] // 4).tolist()


def test_what_is_no_run_of_slots_in_memory_is_left_to_others(tensors: Tensors) -> None:
    slots = torch.arange(16)

    class Other(torch.Tensor):
        pass

    odd = [slots[::2], slots.view(4, 4), slots.float(), slots.to(torch.int16), slots[0], slots.numpy(), slots.tolist()]
    for given in (*odd, slots.as_subclass(Other), None):
        assert tensors.pages_of(given, 4) is None
    assert tensors.pages_of(slots[4:12], 4, 1).tolist() == [1]
    assert tensors.pages_of(slots[:1].expand(1), 1).tolist() == [0]
    with pytest.raises(InvalidArgumentError, match="slot 1 at position 0 "):
        tensors.pages_of(slots[1:5], 4)
    with pytest.raises(InvalidArgumentError, match="5 slots are no whole pages of 4"):
        tensors.pages_of(slots[:5], 4)
    with pytest.raises(ValueError, match="PyCapsule"):
        Tensors(torch.Tensor, tensors_of_another_name())


def tensors_of_another_name() -> Any:
    return torch.arange(2).__dlpack__()


def test_an_older_torch_does_without_the_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [Indices(4)]
    monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__", raising=False)
    both.append(Indices(4))
    slots = torch.tensor([8, 9, 10, 11, 0, 1, 2, 3])
    for indices in both:
        for given in (slots, slots.int(), torch.stack([slots, slots], 1)[:, 0], slots.numpy(), slots.tolist()):
            assert indices.pages(given).tolist() == [2, 0]
        assert indices.of_pages(np.array([2, 0], np.int32)).equal(slots)
        assert (len(indices.none), indices.none.dtype) == (0, torch.int64)


def test_tokens_are_read_once() -> None:
    assert tokens_of([1, 2, 2**31 - 1, -5]).tolist() == [1, 2, 2**31 - 1, -5]
    assert tokens_of((1, 2)).dtype == np.int32
    array = np.array([1, 2])
    assert tokens_of(array) is array
    assert tokens_of(torch.tensor([3, 4])).tolist() == [3, 4]
    assert tokens_of([]).tolist() == []
    with pytest.raises(TokenRangeError):
        tokens_of([2**31])
    with pytest.raises(ArgumentTypeError):
        tokens_of("abc")


@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_indices_of_a_library(library: Any) -> None:
    indices = Indices(4, "cpu", library)
    slots = indices.of_pages(np.array([3, 1], np.int32))
    assert type(slots).__module__.partition(".")[0] == library
    assert slots.tolist() == [12, 13, 14, 15, 4, 5, 6, 7]
    assert str(slots.dtype).endswith("int64")
    assert len(indices.none) == 0
    for given in (slots, slots.tolist(), tuple(slots.tolist())):
        assert indices.pages(given).tolist() == [3, 1]
        assert indices.pages(given, 1).tolist() == [3]
    with pytest.raises(InvalidArgumentError, match="8 slots for 12 tokens in pages of 4"):
        indices.pages(slots, 3)
    copy = indices.copy(slots)
    copy[0] = 99
    assert slots[0] == 12
    assert indices.pages([]).tolist() == []


def test_strided_slots_are_read_too() -> None:
    both = torch.stack([torch.arange(8), torch.zeros(8, dtype=torch.int64)], dim=1)
    assert Indices(4).pages(both[:, 0]).tolist() == [0, 1]


class OnAGpu:
    """A tensor that says it is not on the CPU; only whole pages' first slots may be copied from it."""

    is_cpu = False

    def __init__(self, slots: torch.Tensor) -> None:
        self.slots = slots
        self.copied = 0

    def __len__(self) -> int:
        return len(self.slots)

    def __getitem__(self, at: slice) -> OnAGpu:
        part = OnAGpu(self.slots[at])
        self.part = part
        return part

    def cpu(self) -> torch.Tensor:
        self.copied = len(self.slots)
        return self.slots.contiguous()


def test_from_a_gpu_one_slot_a_page_is_copied() -> None:
    there = OnAGpu(torch.from_numpy(slots_of(np.array([9, 4, 6], np.int32), 16)))
    assert Indices(16).pages(there).tolist() == [9, 4, 6]
    assert there.part.copied == 3
    assert Indices(16).pages(there, 2).tolist() == [9, 4]
    with pytest.raises(InvalidArgumentError, match="slot 145 does not begin a page of 16"):
        Indices(16).pages(OnAGpu(there.slots + 1))


def test_an_allocator_as_pages() -> None:
    allocator = PagedTokenToKVPoolAllocator(40, 4, torch.float16)
    indices = Indices(4)
    pages = AllocatorPages(allocator, indices, 10)
    assert (pages.capacity, pages.available) == (10, 10)
    taken = pages.alloc(7)
    assert taken is not None
    assert (taken.dtype, len(set(taken.tolist())), allocator.available_size()) == (np.int32, 7, 12)
    assert pages.alloc(4) is None
    allocator.free_group_begin()
    pages.free(taken)
    assert pages.available == 3, "a free group holds them back"
    allocator.free_group_end()
    assert pages.available == 10
    pages.free(taken[:0])


def test_pages_that_are_forgotten_do_not_reach_the_allocator() -> None:
    allocator = PagedTokenToKVPoolAllocator(40, 4, torch.float16)
    pages = AllocatorPages(allocator, Indices(4), 10)
    taken = pages.alloc(5)
    assert taken is not None
    with pages.forgetting(5) as left:
        pages.free(taken[:3])
        assert left() == 2
        pages.free(taken[3:])
        assert left() == 0
    assert pages.available == 5
    pages.free(taken)
    assert pages.available == 10


def test_numbers_of_no_pool_stay_small() -> None:
    pages = NumberedPages()
    first, second = pages.alloc(5), pages.alloc(3)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(8))
    pages.free(first[1:4])
    again = pages.alloc(4)
    assert set(again.tolist()) == {1, 2, 3, 8}
    pages.free(second)
    one = pages.alloc(1)
    assert one.tolist()[0] in second.tolist()
    assert len(set(one.tolist() + pages.alloc(2).tolist())) == 3
    pages.clear()
    assert pages.alloc(2).tolist() == [0, 1]
    assert pages.alloc(0).tolist() == []


@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_rows_of_requests(library: Any) -> None:
    pool = ReqToTokenPool(3, 8, library=library)
    assert (pool.size, pool.max_context_len, pool.available_size()) == (3, 8, 3)
    assert tuple(pool.req_to_token.shape) == (3, 8)
    assert str(pool.req_to_token.dtype).endswith("int32")
    assert pool.alloc(4) is None
    rows = pool.alloc(2)
    assert rows == [0, 1]
    values = torch.tensor([7, 8]) if library == "torch" else np.array([7, 8])
    pool.write((1, slice(2, 4)), values)
    assert pool.req_to_token[1].tolist() == [0, 0, 7, 8, 0, 0, 0, 0]
    pool.free(0)
    assert pool.free_slots == [2, 0]
    for wrong in (0, 3, -1, [1, 1], [1, 2]):
        with pytest.raises(PageOwnershipError):
            pool.free(wrong)
    pool.free([1])
    assert pool.available_size() == 3
    assert pool.alloc(3) == [2, 0, 1]
    pool.clear()
    assert pool.alloc(1) == [0]


def test_rows_that_cannot_be() -> None:
    for wrong in ((0, 5), (5, 0)):
        with pytest.raises(InvalidArgumentError):
            ReqToTokenPool(*wrong)
    with pytest.raises(InvalidArgumentError, match="enable_memory_saver"):
        ReqToTokenPool(1, 1, "cpu", True)
