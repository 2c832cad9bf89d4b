"""pool/page_ops.pyx: what it refuses leaves every table as it was."""

from __future__ import annotations

import numpy as np
import pytest

from radixkv.errors import ArgumentTypeError, PageOwnershipError
from radixkv.pool import page_ops

IDS = np.array([3, 0, 2], np.int32)


def test_move_checks_all_pages_before_it_changes_one() -> None:
    states = np.array([1, 1, 2, 1], np.uint8)
    assert page_ops.move(states, IDS, 1 << 1, 4) == 2
    assert states.tolist() == [1, 1, 2, 1]
    assert page_ops.move(states, IDS, 1 << 1 | 1 << 2, 4) == -1
    assert states.tolist() == [4, 1, 4, 4]
    assert page_ops.find_not(states, np.array([1], np.int64), 1 << 4) == 0


@pytest.mark.parametrize("ids", [[4], [-1], [0, 2**40]])
def test_pages_outside_are_refused(ids: list[int]) -> None:
    states = np.ones(4, np.uint8)
    with pytest.raises(PageOwnershipError, match="not of this pool"):
        page_ops.move(states, np.array(ids), 1 << 1, 2)
    assert states.tolist() == [1] * 4


def test_a_page_given_twice_leaves_the_marks() -> None:
    in_use, stack = np.array([1, 1, 1, 0], np.bool_), np.zeros(4, np.int32)
    for ids, word in (([0, 2, 0], "given twice"), ([0, 3], "freed twice")):
        with pytest.raises(PageOwnershipError, match=word):
            page_ops.give_back(ids, in_use, stack, 0)
        assert in_use.tolist() == [True, True, True, False]
    assert page_ops.give_back([2, 0], in_use, stack, 1) == 2
    assert (in_use.tolist(), stack[1:3].tolist()) == ([False, True, False, False], [2, 0])
    assert page_ops.take(stack, 3, 2, 3, 1, in_use).tolist() == [2, 0, 3]
    assert in_use.all()


def test_pairs() -> None:
    table = np.full(4, -1, np.int32)
    assert page_ops.set_pairs(table, np.array([1, 7], np.int32), np.array([5, 6], np.int32)) == 7
    assert (table == -1).all()
    assert page_ops.set_pairs(table, IDS, np.array([9, 8, 7], np.int32)) == -1
    assert page_ops.pairs_of(table, np.array([0, 1, 2, 9], np.int32)).tolist() == [8, 7]
    page_ops.clear_pairs(table, np.array([0, 1, 9], np.int32))
    assert table.tolist() == [-1, -1, 7, 9]
    with pytest.raises(ArgumentTypeError):
        page_ops.set_pairs(table, IDS, np.zeros(2, np.int32))
    with pytest.raises(PageOwnershipError):
        page_ops.set_pairs(table, np.array([-1], np.int32), np.zeros(1, np.int32))


def test_tables_must_be_what_they_are_said_to_be() -> None:
    for states in (np.zeros(4, np.int32), np.zeros(8, np.uint8)[::2], np.zeros((2, 2), np.uint8)):
        with pytest.raises(ArgumentTypeError):
            page_ops.move(states, IDS, 1, 1)  # type: ignore[arg-type]


def test_values_move_all_or_none_and_are_forgotten() -> None:
    table, states = np.array([2, -1, 0, 1], np.int32), np.array([3, 3, 1], np.uint8)
    assert page_ops.move_values(table, np.arange(4, dtype=np.int32), states, 1 << 3, 4) == -1  # page 2 is in state 1
    assert (table.tolist(), states.tolist()) == ([2, -1, 0, 1], [3, 3, 1])
    assert page_ops.move_values(table, np.array([1, 2, 3, 9], np.int32), states, 1 << 3, 4) == 2
    assert (table.tolist(), states.tolist()) == ([2, -1, -1, -1], [4, 4, 1])
    with pytest.raises(PageOwnershipError):
        page_ops.move_values(np.array([7], np.int32), np.array([0], np.int32), states, 1 << 3, 4)


def test_pages_are_taken_with_a_mark_of_the_owner() -> None:
    in_use, stack = np.zeros(4, np.uint8), np.zeros(4, np.int32)
    assert page_ops.take(stack, 0, 0, 0, 3, in_use, 2).tolist() == [0, 1, 2]
    with pytest.raises(PageOwnershipError, match="given twice"):
        page_ops.give_back([1, 1], in_use, stack, 0)
    with pytest.raises(PageOwnershipError, match="freed twice"):
        page_ops.give_back([2, 3], in_use, stack, 0)
    assert in_use.tolist() == [2, 2, 2, 0]
    assert page_ops.give_back([1], in_use, stack, 0) == 1
    assert in_use.tolist() == [2, 0, 2, 0]
