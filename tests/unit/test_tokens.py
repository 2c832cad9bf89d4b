"""read_tokens and read_int, as far as the contract suite (tests/oracle) cannot see them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from radixkv import RadixTree
from radixkv.errors import ArgumentTypeError, InvalidArgumentError, TokenRangeError
from radixkv.tree.tokens import read_int, read_tokens


@pytest.mark.parametrize("make", [list, tuple, np.array, memoryview, lambda values: values.astype(np.int32)])
def test_the_result_is_a_new_int32_array(make: Callable[[np.ndarray], object]) -> None:
    read = read_tokens(make(np.array([1, -2])))
    assert (read.dtype, read.tolist()) == (np.int32, [1, -2])
    assert read.flags.owndata
    assert read.flags.c_contiguous


def test_messages_name_the_argument_and_the_place() -> None:
    with pytest.raises(TokenRangeError, match=r"page ids\[2\] is 4294967296, outside int32"):
        read_tokens([0, 1, 2**32], "page ids")
    with pytest.raises(TokenRangeError, match=r"tokens\[1\] is -2147483649"):
        read_tokens(np.array([0, -(2**31) - 1, 2**40]))
    with pytest.raises(ArgumentTypeError, match=r"tokens\[1\] is of type float"):
        read_tokens([1, 2.0])
    with pytest.raises(ArgumentTypeError, match="not int16"):
        read_tokens(np.zeros(3, np.int16))
    with pytest.raises(ArgumentTypeError, match="one dimension, not 2"):
        read_tokens(np.zeros((3, 3), np.int32))


def test_read_int() -> None:
    assert read_int(np.int8(5), "n", 0, 5) == 5
    with pytest.raises(InvalidArgumentError, match=r"n is 6, outside 0 \.\. 5"):
        read_int(6, "n", 0, 5)
    with pytest.raises(ArgumentTypeError, match="n must be an int, not str"):
        read_int("6", "n")


def test_a_list_that_changes_while_the_compiled_tree_reads_it() -> None:
    class Grows:
        def __index__(self) -> int:
            key.extend(range(10_000))
            return 1

    class Shrinks:
        def __index__(self) -> int:
            key.clear()
            return 1

    tree = RadixTree(1)
    key: list[object] = [1, Grows(), 3]
    tree.insert(key, [1, 2, 3])
    assert tree.match([1, 1, 3, 0]).num_tokens == 3
    key = [1, Shrinks(), 2]
    with pytest.raises(ArgumentTypeError, match="the list shrank"):
        tree.match(key)
