"""The contract of base.py: events, page keys and digests."""

from __future__ import annotations

import numpy as np
import pytest

from radixkv.key import encode_namespace
from radixkv.types import ROOT
from tests.oracle.kit import Kit, plain_event

MASK = 2**64 - 1


def chain(namespace: bytes, tokens: list[int], page_size: int) -> list[int]:
    """The default page digests, written from the text of base.py alone."""

    def mix(x: int) -> int:
        x ^= x >> 32
        x = x * 0xD6E8FEB86659FD93 & MASK
        x ^= x >> 32
        x = x * 0xD6E8FEB86659FD93 & MASK
        return x ^ x >> 32

    h = 0x9E3779B97F4A7C15
    for byte in namespace:
        h = (h ^ byte) * 0x100000001B3 & MASK
    parent = mix(h)
    keys = []
    for page in range(len(tokens) // page_size):
        h = parent
        run = [token % 2**32 for token in tokens[page * page_size : (page + 1) * page_size]] + [0] * (page_size % 2)
        for low, high in zip(run[::2], run[1::2], strict=True):
            h = (h ^ (low + (high << 32))) * 0x9FB21C651E98DF25 & MASK
            h ^= h >> 29
        parent = mix(h)
        keys.append(parent)
    return keys


def test_known_digests(tree_class) -> None:
    """Numbers, not code: a chain that changes breaks every index and event consumer that stored keys of the old one."""
    tree = tree_class(2)
    node = tree.insert([1, 2, 3, 4], [0, 1]).node
    assert tree.page_keys(node).tolist() == [7113961563012791986, 15136950862836148185]
    assert tree.page_digests(node).tobytes().hex() == "62b9de59a528feb2" + "d211409c59e427d9"


@pytest.mark.parametrize("name", [(None, None), ("", None), ("lora", 7), (b"\x00\xff", "é")])
def test_page_keys_follow_the_documented_chain(kit: Kit, name) -> None:
    rng = np.random.default_rng(5)
    tokens = rng.integers(-(2**31), 2**31, 5 * kit.page_size).tolist()
    expected = chain(encode_namespace(*name), tokens, kit.page_size)
    node = kit.tree.insert(tokens, [0, 1, 2, 3, 4], None, *name).node
    keys = kit.tree.page_keys(node)
    assert (keys.dtype, keys.tolist()) == (np.uint64, expected)
    upper = kit.tree.split_at(node, 2 * kit.page_size)  # a split divides them
    assert kit.tree.page_keys(upper).tolist() == expected[:2]
    assert kit.tree.page_keys(node).tolist() == expected[2:]
    digests = kit.tree.page_digests(node)
    assert (digests.dtype, digests.shape) == (np.uint8, (3, 8))
    assert [int.from_bytes(row.tobytes(), "big") for row in digests] == expected[2:]
    more = tokens[: 3 * kit.page_size] + [1] * (2 * kit.page_size)
    below = kit.tree.insert_host(more, [5, 6, 7, 8, 9], None, *name).node
    assert kit.tree.page_keys(below).tolist() == chain(encode_namespace(*name), more, kit.page_size)[3:]


def test_page_keys_do_not_depend_on_how_the_tree_grew(make) -> None:
    one, two = make(), make(events=True)
    one.insert("abcdef", [1, 2, 3, 4, 5, 6])
    two.insert("ab", [1, 2])
    two.insert_host("abcdx", [1, 2, 3, 4, 5])
    two.insert("abcdef", [1, 2, 3, 4, 5, 6])
    whole = one.tree.page_keys(one.node("abcdef")).tolist()
    parts = [key for path in ("ab", "abcd", "abcdef") for key in two.tree.page_keys(two.node(path)).tolist()]
    assert parts == whole


def test_page_keys_of_root(kit: Kit) -> None:
    assert kit.tree.page_keys(ROOT).tolist() == []
    assert kit.tree.page_keys(ROOT).dtype == np.uint64
    assert kit.tree.page_digests(ROOT).shape == (0, 8)


# --------------------------------------------------------------------------------------------------------------- events


class Listener:
    """Reads events as letters: ("+", "ab", "device") is page b of prefix ab stored on the device."""

    def __init__(self, kit: Kit) -> None:
        self.kit = kit
        self.names: dict[int | None, str] = {None: ""}

    def heard(self, limit: int | None = None) -> list[tuple[str, str, str]]:
        heard = []
        for event in self.kit.tree.take_events(limit):
            if event.kind == "cleared":
                assert plain_event(event)[2:] == (None, None, None)
                heard.append(("cleared", "", ""))
                continue
            if event.kind == "stored":
                assert event.tokens.dtype == np.int32
                assert len(event.tokens) == self.kit.page_size
                self.names[event.key] = self.names[event.parent_key] + self.kit.letters(event.tokens)
            else:
                assert event.tokens is None
                assert self.names[event.parent_key] == self.names[event.key][:-1]
            heard.append(({"stored": "+", "removed": "-"}[event.kind], self.names[event.key], event.medium))
        return heard


@pytest.fixture
def ear(make) -> Listener:
    return Listener(make(events=True))


def stored(*paths: str, medium: str = "device") -> list[tuple[str, str, str]]:
    return [("+", path, medium) for path in paths]


def removed(*paths: str, medium: str = "device") -> list[tuple[str, str, str]]:
    return [("-", path, medium) for path in paths]


def test_no_events_unless_asked_for(kit: Kit) -> None:
    kit.insert("ab", [1, 2])
    kit.evict(2)
    kit.tree.reset()
    assert kit.tree.take_events() == []
    assert kit.tree.stats()[-2:] == (0, 0)


def test_insert_stores_each_new_page_in_key_order(ear: Listener) -> None:
    kit = ear.kit
    kit.insert("abc", [1, 2, 3])
    assert ear.heard() == stored("a", "ab", "abc")
    kit.insert("abc", [1, 2, 3])
    kit.insert("ab", [1, 2])  # a split is no change
    kit.match("a")
    assert ear.heard() == []
    kit.insert("abx", [1, 2, 4])
    assert ear.heard() == stored("abx")


def test_the_parent_key_of_a_first_page_is_none(ear: Listener) -> None:
    kit = ear.kit
    kit.insert("ab", [1, 2], extra_key="x")
    first, second = kit.tree.take_events()
    keys = chain(encode_namespace("x"), kit.key("ab").tolist(), kit.page_size)
    assert plain_event(first) == ("stored", keys[0], None, kit.key("a").tolist(), "device")
    assert plain_event(second) == ("stored", keys[1], keys[0], kit.key("b").tolist(), "device")
    kit.evict(1)
    second, first = kit.tree.take_events()
    assert plain_event(second) == ("removed", keys[1], keys[0], None, "device")
    assert plain_event(first) == ("removed", keys[0], None, None, "device")


def test_evict_removes_children_before_parents(ear: Listener) -> None:
    kit = ear.kit
    kit.insert("ab", [1, 2])
    kit.insert("abcd", [1, 2, 3, 4])
    ear.heard()
    kit.evict(9)
    assert ear.heard() == removed("abcd", "abc", "ab", "a")


def test_each_tier_has_its_own_events(ear: Listener) -> None:
    kit = ear.kit
    node = kit.insert("ab", [1, 2]).node
    ear.heard()
    kit.tree.set_host(node, [11, 12])
    assert ear.heard() == stored("a", "ab", medium="host")
    kit.evict(2)
    assert ear.heard() == removed("ab", "a")
    kit.insert("abc", [5, 6, 7])
    assert ear.heard() == stored("a", "ab", "abc")  # adopted, then new
    kit.evict(9)
    assert ear.heard() == removed("abc", "ab", "a")
    kit.tree.set_device(node, [1, 2])
    assert ear.heard() == stored("a", "ab")
    kit.evict(9)
    ear.heard()
    kit.evict_host(9)
    assert ear.heard() == removed("ab", "a", medium="host")


def test_insert_host_stores_on_the_host(ear: Listener) -> None:
    kit = ear.kit
    kit.insert("a", [1])
    ear.heard()
    kit.insert_host("abc", [90, 12, 13])
    assert ear.heard() == stored("ab", "abc", medium="host")


def test_set_host_over_a_split_stores_parents_first(ear: Listener) -> None:
    kit = ear.kit
    node = kit.insert("abcd", [1, 2, 3, 4]).node
    kit.match("ab")
    ear.heard()
    kit.tree.set_host(node, [11, 12, 13, 14])
    assert ear.heard() == stored("a", "ab", "abc", "abcd", medium="host")


@pytest.mark.parametrize("cut", [False, True])
def test_finish_backup_stores_on_the_host_then_leaves_the_device(ear: Listener, cut: bool) -> None:
    kit = ear.kit
    node = kit.insert("abc", [1, 2, 3]).node
    kit.evict(3, backup=True)
    if cut:
        kit.match("a")
    ear.heard()
    kit.tree.finish_backup(node, [11, 12, 13])
    assert ear.heard() == stored("a", "ab", "abc", medium="host") + removed("abc", "ab", "a")


def test_a_dropped_backup(ear: Listener) -> None:
    kit = ear.kit
    node = kit.insert("ab", [1, 2]).node
    kit.evict(3, backup=True)
    assert ear.heard() == stored("a", "ab")  # marking is no change
    kit.tree.finish_backup(node, None)
    assert ear.heard() == removed("ab", "a")


def test_a_failed_load(ear: Listener) -> None:
    kit = ear.kit
    node = kit.insert_host("abc", [11, 12, 13]).node
    kit.tree.set_device(node, [1, 2, 3], loading=True)
    kit.match("a")
    ear.heard()
    kit.tree.finish_load(node, success=False)
    assert ear.heard() == removed("abc", "ab", "a")


def test_a_node_that_leaves_both_tiers_leaves_the_device_first(ear: Listener) -> None:
    kit = ear.kit
    kit.insert("ab", [1, 2])
    kit.insert("abc", [1, 2, 3])
    kit.tree.set_host(kit.node("abc"), [11, 12, 13][2:])
    kit.tree.set_host(kit.node("ab"), [11, 12])
    ear.heard()
    kit.tree.delete(kit.node("ab"))
    assert ear.heard() == (
        removed("abc") + removed("abc", medium="host") + removed("ab", "a") + removed("ab", "a", medium="host")
    )


def test_host_only_descendants_leave_before_their_ancestor(ear: Listener) -> None:
    kit = ear.kit
    kit.insert("a", [1])
    kit.insert_host("abc", [90, 12, 13])
    ear.heard()
    kit.evict(1)
    assert ear.heard() == removed("abc", "ab", medium="host") + removed("a")


def test_reset_is_one_event(ear: Listener) -> None:
    kit = ear.kit
    kit.insert("ab", [1, 2])
    kit.tree.reset()
    assert kit.tree.stats().queued_events == 1
    assert ear.heard() == [("cleared", "", "")]
    kit.insert("a", [1])
    assert ear.heard() == stored("a")


def test_delete_namespace_removes(ear: Listener) -> None:
    kit = ear.kit
    kit.insert("ab", [1, 2], extra_key="x")
    ear.heard()
    kit.tree.delete_namespace("x")
    assert ear.heard() == removed("ab", "a")


def test_take_events_in_batches(ear: Listener) -> None:
    kit = ear.kit
    kit.insert("abcde", [1, 2, 3, 4, 5])
    assert kit.tree.stats().queued_events == 5
    assert kit.tree.take_events(0) == []
    assert ear.heard(2) == stored("a", "ab")
    assert kit.tree.stats().queued_events == 3
    assert ear.heard(2**40) == stored("abc", "abcd", "abcde")
    assert ear.heard() == []


def queue(kit: Kit) -> tuple[int, int]:
    """(queued, dropped) events."""
    stats = kit.tree.stats()
    return stats.queued_events, stats.dropped_events


def test_a_full_queue_drops_and_counts(make) -> None:
    kit = make(events=True, max_events=3)
    ear = Listener(kit)
    kit.insert("abcde", [1, 2, 3, 4, 5])
    assert queue(kit) == (3, 2)
    assert ear.heard(1) == stored("a")
    kit.insert("x", [6])
    kit.insert("y", [7])
    assert queue(kit) == (3, 3)
    assert ear.heard() == stored("ab", "abc", "x")
    kit.insert("pqrst", [10, 11, 12, 13, 14])
    kit.tree.reset()  # what it drops from the queue is not counted; the counter goes on, so that a gap stays visible
    assert queue(kit) == (1, 5)
    assert ear.heard() == [("cleared", "", "")]


def test_a_refused_operation_says_nothing(ear: Listener) -> None:
    kit = ear.kit
    kit.insert("ab", [1, 2])
    ear.heard()
    with pytest.raises(ValueError, match="2"):
        kit.insert("xy", [3, 2])
    assert ear.heard() == []
