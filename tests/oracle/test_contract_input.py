"""What the tree does with input of every kind: the types it reads, and the bad ones it refuses without a change."""

from __future__ import annotations

import array
import ctypes
from collections import deque
from typing import Any

import numpy as np
import pytest

from radixkv.errors import (
    ArgumentTypeError,
    HandleError,
    InvalidArgumentError,
    TokenRangeError,
)
from radixkv.types import ROOT
from tests.oracle.kit import Kit

# ---------------------------------------------------------------------------------------------------------- token types

VALUES = {"int32": np.int32, "uint32": np.uint32, "int64": np.int64, "uint64": np.uint64}


def strided(values: np.ndarray) -> np.ndarray:
    wide = np.zeros((len(values), 3), dtype=values.dtype)
    wide[:, 1] = values
    return wide[:, 1]


def reversed_view(values: np.ndarray) -> np.ndarray:
    return values[::-1].copy()[::-1]


def read_only(values: np.ndarray) -> np.ndarray:
    values = values.copy()
    values.flags.writeable = False
    return values


def unaligned(values: np.ndarray) -> np.ndarray:
    raw = np.zeros(values.nbytes + 1, dtype=np.uint8)
    raw[1:] = np.frombuffer(values.tobytes(), dtype=np.uint8)
    return raw[1:].view(values.dtype)


READERS: dict[str, Any] = {
    "list": lambda v: v.tolist(),
    "tuple": lambda v: tuple(v.tolist()),
    "list of numpy ints": list,
    "numpy": lambda v: v,
    "numpy strided": strided,
    "numpy reversed": reversed_view,
    "numpy broadcast": lambda v: np.broadcast_to(v[None, :], (2, len(v)))[1],
    "numpy read-only": read_only,
    "numpy unaligned": unaligned,
    "memoryview": lambda v: memoryview(v),
    "memoryview strided": lambda v: memoryview(np.repeat(v, 2))[::2],
    "memoryview of bytes, cast": lambda v: memoryview(v.tobytes()).cast({4: "i", 8: "q"}[v.itemsize]),
    "array": lambda v: array.array({"int32": "i", "uint32": "I", "int64": "q",
    "uint64": "Q"}[v.dtype.name], v.tolist()),
    "array of long": lambda v: array.array("l", v.tolist()),
    "ctypes": lambda v: (ctypes.c_int64 * len(v))(*v.tolist()),
}


@pytest.mark.parametrize("dtype", VALUES)
@pytest.mark.parametrize("reader", READERS)
def test_tokens_and_ids_of_every_type(kit: Kit, reader: str, dtype: str) -> None:
    read = READERS[reader]
    key = kit.key("abc").astype(dtype)
    ids = np.array([5, 2**31 - 1, 0], dtype=dtype)
    kit.tree.insert(read(key), read(ids))
    assert kit.shape() == {"abc": ([5, 2**31 - 1, 0], None)}
    assert kit.tree.match(read(key)).num_tokens == 3 * kit.page_size
    assert kit.tree.peek(read(key)).page_ids().tolist() == [5, 2**31 - 1, 0]
    assert kit.tree.peek_many([read(key), key.tolist()]).tolist() == [[3 * kit.page_size, 0]] * 2
    kit.tree.set_host(kit.node("abc"), read(ids))
    assert kit.shape() == {"abc": ([5, 2**31 - 1, 0], [5, 2**31 - 1, 0])}
    kit.tree.check_integrity(4, read(np.array([7], dtype=dtype)), 3, read(np.array([], dtype=dtype)))


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_torch_tensors(kit: Kit, dtype: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    key = torch.tensor(kit.key("ab").tolist(), dtype=getattr(torch, dtype))
    wide = torch.stack([key, key + 1], dim=1)
    assert not wide[:, 0].is_contiguous()
    kit.tree.insert(key, torch.tensor([1, 2], dtype=getattr(torch, dtype)))
    for tensor in (key, wide[:, 0]):
        assert kit.tree.match(tensor).page_ids().tolist() == [1, 2]


def test_torch_tensors_that_are_refused(kit: Kit) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.bool, torch.float32, torch.float64, torch.bfloat16):
        kit.refuses(ArgumentTypeError, kit.tree.match, torch.zeros(4, dtype=dtype))
    kit.refuses(ArgumentTypeError, kit.tree.match, torch.zeros((2, 2), dtype=torch.int32))
    kit.refuses(ArgumentTypeError, kit.tree.match, torch.tensor(5))
    kit.refuses(ArgumentTypeError, kit.tree.match, torch.zeros(4, dtype=torch.int32, device="meta"))
    kit.refuses(TokenRangeError, kit.tree.match, torch.tensor([2**31], dtype=torch.int64))


def test_what_was_passed_in_is_copied(kit: Kit) -> None:
    key, ids = kit.key("ab"), np.array([1, 2], dtype=np.int32)
    kit.tree.insert(key, ids)
    key[:] = 0
    ids[:] = 0
    assert kit.match("ab").page_ids().tolist() == [1, 2]
    kit.tree.check_integrity(2, [])


def test_tokens_of_the_whole_int32_range(kit: Kit) -> None:
    extremes = [-(2**31), 2**31 - 1, -1, 0]
    for at, token in enumerate(extremes):
        kit.tree.insert([token] * kit.page_size, [at])
    for at, token in enumerate(extremes):
        for key in ([token] * kit.page_size, np.full(kit.page_size, token, dtype=np.int64)):
            assert kit.tree.match(key).page_ids().tolist() == [at]


@pytest.mark.parametrize("sequence", [list, tuple])
def test_runs_of_ints_between_odd_items(kit: Kit, sequence: Any) -> None:
    """Ints of one digit are read in runs: what is none may stand before, between and after them."""
    values = [2**31 - 1, 5, 0, -1, 2**30, 7, -(2**30) + 1, 2**30 - 1, -(2**31), 3, 4, np.int64(9)]
    page = kit.page_size
    for at in range(len(values)):
        key = sequence((values[at:] + values[:at]) * page)
        kit.tree.insert(key, np.arange(at * len(values), (at + 1) * len(values)))
        exact = np.array([int(value) for value in key], np.int64)
        assert kit.tree.peek(exact).num_tokens == len(key)


BAD_TOKENS: dict[str, Any] = {
    "None": None, "str": "abcd", "bytes": b"abcdefgh", "bytearray": bytearray(8), "int": 5, "float": 1.5,
    "float list": [1.0, 2.0], "bool list": [True, False], "str list": ["1"], "None list": [None],
    "nested list": [[1, 2], [3, 4]],
    "set": {1, 2}, "dict": {1: 2}, "range": range(64), "deque": deque([1, 2]), "iterator": iter([1, 2]),
    "object": object(),
    "one float among ints": [1, 2, 3.0], "tuple with None": (1, None), "list with a bool": [1, True],
    "int8": np.zeros(64, np.int8), "uint8": np.zeros(64, np.uint8), "int16": np.zeros(64, np.int16),
    "uint16": np.zeros(64, np.uint16), "float32": np.zeros(64, np.float32), "float64": np.zeros(64),
    "bool": np.zeros(64, bool), "complex": np.zeros(64, complex), "object array": np.array([1, 2], dtype=object),
    "str array": np.array(["a", "b"]), "datetime": np.zeros(4, "datetime64[s]"), "timedelta": np.zeros(4,
    "timedelta64[s]"),
    "record": np.zeros(4, [("x", "i4")]), "other byte order": np.zeros(4, np.dtype(np.int32).newbyteorder()),
    "two dimensions": np.zeros((2, 64), np.int32), "no dimension": np.array(5), "numpy scalar": np.int64(5),
    "two-dimensional memoryview": memoryview(np.zeros((2, 64), np.int32)),
    "memoryview of bytes": memoryview(b"12345678"),
    "memoryview of doubles": memoryview(np.zeros(4)), "array of shorts": array.array("h", [1]),
    "array of floats": array.array("f", [1]),
    "array of bytes": array.array("b", [1]), "ctypes doubles": (ctypes.c_double * 2)(), "class": list,
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_types_without_a_meaning_are_refused_everywhere(kit: Kit, name: str) -> None:
    bad = BAD_TOKENS[name]
    tree = kit.tree
    node = kit.insert("a", [1]).node
    hosted = kit.insert_host("h", [1]).node
    hit = kit.match("a")
    for call, *args in (
        (tree.match, bad), (tree.peek, bad), (tree.peek_many, [bad]), (tree.match_extend, hit, bad),
        (tree.insert, bad, []), (tree.insert, kit.key("b"), bad), (tree.insert_host, bad, []),
        (tree.insert_host, kit.key("b"), bad), (tree.set_host, node, bad), (tree.set_device, hosted, bad),
        (tree.check_integrity, 5, bad), (tree.check_integrity, None, None, 5, bad),
    ):  # fmt: skip
        if bad is None and call == tree.check_integrity:
            continue  # None is the default there
        kit.refuses(ArgumentTypeError, call, *args)


BAD_VALUES: dict[str, Any] = {
    "list above": [2**31], "list below": [-(2**31) - 1], "list far above": [10**30], "list far below": [-(10**30)],
    "int64 above": np.array([1, 2**31]), "int64 below": np.array([-(2**31) - 1]),
    "uint32": np.array([2**31], np.uint32),
    "uint32 max": np.array([2**32 - 1], np.uint32), "uint64": np.array([2**63], np.uint64),
    "uint64 max": np.array([2**64 - 1], np.uint64),
    "strided": strided(np.array([0, 2**40])), "array": array.array("q", [2**31]),
    "unsigned array": array.array("I", [2**32 - 1]),
    "wraps to a small number": [2**32 + 5], "wraps, int64": np.array([2**32 + 5]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_VALUES)
def test_values_outside_int32_are_refused_everywhere(kit: Kit, name: str) -> None:
    bad = BAD_VALUES[name]
    tree = kit.tree
    node = kit.insert("a", [1]).node
    hit = kit.match("a")
    # Also in the tail that no page covers: the same key must not be good or bad depending on its length.
    for call, *args in (
        (tree.match, bad), (tree.peek, bad), (tree.peek_many, [kit.key("a"), bad]), (tree.match_extend, hit, bad),
        (tree.insert, bad, []), (tree.insert, kit.key("b"), bad), (tree.insert_host, bad, []),
        (tree.insert_host, kit.key("b"), bad), (tree.set_host, node, bad), (tree.check_integrity, 5, bad),
    ):  # fmt: skip
        kit.refuses(TokenRangeError, call, *args)


# -------------------------------------------------------------------------------------------------- lengths and numbers


def test_mismatched_lengths(kit: Kit) -> None:
    for letters, ids in (("ab", []), ("ab", [1]), ("ab", [1, 2, 3]), ("", [1])):
        message = kit.refuses(InvalidArgumentError, kit.insert, letters, ids)
        assert str(len(ids)) in message
        assert str(len(letters)) in message
        kit.refuses(InvalidArgumentError, kit.insert_host, letters, ids)
    slots = np.arange(2 * kit.page_size + 1)
    kit.refuses(InvalidArgumentError, kit.tree.insert, kit.key("ab"), slots)


def test_keys_shorter_than_a_page(kit: Kit) -> None:
    kit.insert("a", [1])
    for size in range(kit.page_size):
        key = kit.key("a")[:size]
        assert kit.tree.match(key).device_node == ROOT
        assert kit.tree.insert(key, []).node == ROOT
        assert kit.tree.insert_host(key, []).node == ROOT
        assert kit.tree.match_extend(kit.match("a"), key).num_tokens == kit.page_size
    assert len(kit.tree) == 1


@pytest.mark.parametrize("bad", [None, "5", 1.0, [1], b"1"])
def test_numbers_that_are_none(kit: Kit, bad: Any) -> None:
    node = kit.insert("ab", [1, 2]).node
    tree = kit.tree
    for call, *args in (
        (tree.evict, bad), (tree.evict_host, bad), (tree.pin, node, bad), (tree.expire, bad),
        (tree.split_at, node, bad),
        (tree.insert, kit.key("c"), [3], None, None, None, bad),
    ):  # fmt: skip
        kit.refuses(ArgumentTypeError, call, *args)


def test_numbers_out_of_range(kit: Kit) -> None:
    node = kit.insert("ab", [1, 2]).node
    for priority in (2**31, -(2**31) - 1, 2**80):
        kit.refuses(InvalidArgumentError, kit.insert, "c", [3], priority=priority)
        kit.refuses(InvalidArgumentError, kit.insert_host, "c", [3], priority=priority)
    for huge in (2**63, 2**80, -(2**80)):
        kit.refuses(InvalidArgumentError, kit.tree.evict, huge)
        kit.refuses(InvalidArgumentError, kit.tree.evict_host, huge)
        kit.refuses(InvalidArgumentError, kit.tree.split_at, node, huge)
        kit.refuses(InvalidArgumentError, kit.tree.pin, node, huge)
        kit.refuses(InvalidArgumentError, kit.tree.expire, huge)
    kit.refuses(InvalidArgumentError, kit.tree.take_events, -1)


def test_numpy_numbers_are_numbers(kit: Kit) -> None:
    node = kit.tree.insert(kit.key("ab"), [1, 2], priority=np.int32(4)).node
    kit.tree.pin(np.uint64(node), np.int64(5))
    assert kit.tree.expire(np.int64(5)) == 1
    assert kit.tree.lock(np.uint64(0)) == 0
    assert kit.tree.evict(np.int64(1)).page_ids.tolist() == [1, 2]


@pytest.mark.parametrize("bad", [1.0, True, ["a"], ("a", "b"), object(), bytearray(b"a"), np.int64(3)])
def test_namespaces_of_a_wrong_type(kit: Kit, bad: Any) -> None:
    kit.insert("a", [1])
    tree, key = kit.tree, kit.key("a")
    for namespace in ({"extra_key": bad}, {"cache_salt": bad}, {"extra_key": "x", "cache_salt": bad}):
        kit.refuses(ArgumentTypeError, tree.match, key, **namespace)
        kit.refuses(ArgumentTypeError, tree.peek, key, **namespace)
        kit.refuses(ArgumentTypeError, tree.peek_many, [key], **namespace)
        kit.refuses(ArgumentTypeError, tree.insert, key, [2], **namespace)
        kit.refuses(ArgumentTypeError, tree.insert_host, key, [2], **namespace)
        kit.refuses(ArgumentTypeError, tree.delete_namespace, **namespace)


@pytest.mark.parametrize("bad", [5, "match", object(), (0, 0, 0, 0)])
def test_matches_of_a_wrong_type(kit: Kit, bad: Any) -> None:
    kit.refuses(ArgumentTypeError, kit.tree.match_extend, bad, kit.key("a"))
    kit.refuses(ArgumentTypeError, kit.insert, "a", [1], match=bad)
    kit.refuses(ArgumentTypeError, kit.insert_host, "a", [1], match=bad)
    kit.refuses(ArgumentTypeError, kit.tree.match_extend, None, kit.key("a"))


@pytest.mark.parametrize("bad", [None, 5, object()])
def test_keys_that_are_no_sequence(kit: Kit, bad: Any) -> None:
    kit.refuses(ArgumentTypeError, kit.tree.peek_many, bad)


# -------------------------------------------------------------------------------------------------------------- handles


def calls_with_a_handle(kit: Kit, node: Any) -> list[tuple[Any, ...]]:
    tree = kit.tree
    return [
        (tree.lock, node), (tree.unlock, node), (tree.protect_host, node), (tree.release_host, node),
        (tree.pin, node, 1),
        (tree.unpin, node), (tree.finish_backup, node, None), (tree.finish_backup, node, [1]),
        (tree.set_host, node, [1]),
        (tree.set_device, node, [1]), (tree.finish_load, node), (tree.split_at, node, kit.page_size),
        (tree.delete, node),
        (tree.page_keys, node), (tree.page_digests, node), (tree.node_info, node),
    ]  # fmt: skip


def test_stale_handles(kit: Kit) -> None:
    evicted = kit.insert("a", [1]).node
    kit.evict(1)
    deleted = kit.insert("b", [1]).node
    kit.tree.delete(deleted)
    pruned = kit.insert_host("c", [1]).node
    kit.evict_host(1)
    kit.insert("d", [1])
    for node in (evicted, deleted, pruned):
        for call, *args in calls_with_a_handle(kit, node):
            kit.refuses(HandleError, call, *args)


def test_foreign_handles(make) -> None:
    """The same operations on two trees: equal slots, but not equal handles."""
    one, two = make(), make()
    nodes = []
    for kit in (one, two):
        nodes.append([kit.insert(letter, [at]).node for at, letter in enumerate("abcdefgh")])
    assert not set(nodes[0]) & set(nodes[1])
    for node in nodes[1]:
        for call, *args in calls_with_a_handle(one, node):
            one.refuses(HandleError, call, *args)


@pytest.mark.parametrize("bad", [1, 2, -1, 2**32, 2**32 + 1, 2**63, 2**64 - 1, 2**64, 2**64 + 1, -(2**64), 10**40])
def test_handles_made_up(kit: Kit, bad: int) -> None:
    kit.insert("a", [1])
    for call, *args in calls_with_a_handle(kit, bad):
        kit.refuses(HandleError, call, *args)


def test_handles_with_one_bit_changed(kit: Kit) -> None:
    nodes = {kit.insert(letter, [at]).node for at, letter in enumerate("abcd")}
    for node in nodes:
        for bit in range(64):
            if node ^ 1 << bit not in nodes | {ROOT}:
                with pytest.raises(HandleError):
                    kit.tree.node_info(node ^ 1 << bit)


@pytest.mark.parametrize("bad", [None, 1.0, "1", b"1", [1], object()])
def test_handles_of_a_wrong_type(kit: Kit, bad: Any) -> None:
    kit.insert("a", [1])
    for call, *args in calls_with_a_handle(kit, bad):
        kit.refuses(ArgumentTypeError, call, *args)


# ------------------------------------------------------------------------------------------------------------- creation


def test_options_that_are_refused(tree_class: Any) -> None:
    for size in (0, -1, 65_537, 2**31, 2**80):
        with pytest.raises(InvalidArgumentError):
            tree_class(size)
    for size in (None, 1.0, "16"):
        with pytest.raises(ArgumentTypeError):
            tree_class(size)
    for policy in ("LRU", "", "random", None, 0, b"lru"):
        with pytest.raises(InvalidArgumentError):
            tree_class(16, policy)
    for bound in (0, -1):
        with pytest.raises(InvalidArgumentError):
            tree_class(16, events=True, max_events=bound)
    with pytest.raises(TypeError):
        tree_class(16, "lru", True)  # events and max_events are keywords
    with pytest.raises(TypeError):
        tree_class(16, unknown=1)


def test_the_largest_page(tree_class: Any) -> None:
    tree = tree_class(65_536)
    tree.insert(np.arange(3 * 65_536 - 1), [1, 2])
    assert tree.match(np.arange(2 * 65_536)).page_ids().tolist() == [1, 2]
    tree.check_integrity(2, [])
