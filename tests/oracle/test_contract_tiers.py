"""The contract of base.py, sentence by sentence: eviction, backup, load-back and host copies."""

from __future__ import annotations

import pytest

from radixkv.errors import (
    HandleError,
    InvalidArgumentError,
    LockError,
    PageOwnershipError,
    StateError,
)
from radixkv.types import POLICIES, ROOT
from tests.oracle.kit import Kit

ORDERS = {
    "lru": "bacd",  # access b 6, a 8, c 9, d 10
    "lfu": "dacb",  # hits d 1, a 2 and c 2 by access, b 3
    "fifo": "abcd",
    "mru": "dcab",
    "filo": "dcba",
    "priority": "bdca",  # b 0 and d 0 by access, c 3, a 5
    "slru": "dbac",  # d below two hits, the others by access
}
IDS = {"a": 1, "b": 2, "c": 3, "d": 4}


def scripted(make, policy: str) -> Kit:
    """Four siblings that no two policies order alike."""
    kit = make(policy)
    for letter in "abcd":
        kit.insert(letter, [IDS[letter]])  # ticks 1 .. 4
    kit.insert("b", [2])
    kit.insert("b", [2])
    kit.match("a")
    kit.insert("a", [1], priority=5)
    kit.insert("c", [3], priority=3)
    kit.match("d")  # tick 10
    return kit


def order(ids: list[int]) -> str:
    return "".join("?abcd"[page] for page in ids)


# ---------------------------------------------------------------------------------------------------------------- evict


def test_the_orders_are_all_different() -> None:
    assert set(ORDERS) == set(POLICIES)
    assert len(set(ORDERS.values())) == len(POLICIES)


@pytest.mark.parametrize("policy", POLICIES)
def test_evict_follows_the_policy(make, policy: str) -> None:
    kit = scripted(make, policy)
    gone = kit.evict(4)
    assert order(gone.page_ids.tolist()) == ORDERS[policy]
    assert (kit.pages(gone.num_tokens), gone.host_page_ids.tolist(), gone.to_backup) == (4, [], [])
    assert len(kit.tree) == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_evict_one_by_one_follows_the_policy(make, policy: str) -> None:
    kit = scripted(make, policy)
    assert order([int(kit.evict(1).page_ids[0]) for _ in range(4)]) == ORDERS[policy]


@pytest.mark.parametrize("policy", POLICIES)
def test_backup_follows_the_policy(make, policy: str) -> None:
    kit = scripted(make, policy)
    out = kit.evict(4, backup=True)
    assert order([int(request.page_ids[0]) for request in out.to_backup]) == ORDERS[policy]
    assert (out.num_tokens, out.page_ids.tolist()) == (0, [])


@pytest.mark.parametrize("policy", POLICIES)
def test_evict_host_follows_the_policy(make, policy: str) -> None:
    kit = scripted(make, policy)
    for letter, page in IDS.items():
        kit.tree.set_host(kit.node(letter), [page])
    assert order(kit.evict(4).page_ids.tolist()) == ORDERS[policy]
    gone = kit.evict_host(4)
    assert order(gone.host_page_ids.tolist()) == ORDERS[policy]
    assert (kit.pages(gone.num_tokens), gone.page_ids.tolist()) == (4, [])
    assert len(kit.tree) == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_namespaces_share_one_order(make, policy: str) -> None:
    kit = make(policy)
    for at, name in enumerate(("x", None, "y", None, "x")):
        kit.insert("pqrst"[at], [at], extra_key=name)
    expected = list(range(5))
    assert kit.evict(5).page_ids.tolist() == (expected[::-1] if policy in ("mru", "filo") else expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_parent_joins_the_order_when_it_becomes_a_leaf(make, policy: str) -> None:
    """p has two children; x is used between them, then p."""
    kit = make(policy)
    kit.insert("p", [1])  # tick 1
    kit.insert("pa", [1, 2])  # 2: p has hits 2
    kit.insert("x", [3])  # 3
    kit.insert("pb", [1, 4])  # 4: p has hits 3
    expected = {
        "lru": [2, 3, 4, 1], "lfu": [2, 3, 4, 1], "fifo": [2, 3, 4, 1], "priority": [2, 3, 4, 1],
        "slru": [2, 3, 4, 1], "mru": [4, 3, 2, 1], "filo": [4, 3, 2, 1],
    }  # fmt: skip
    assert kit.evict(4).page_ids.tolist() == expected[policy]


def test_fifo_takes_an_old_parent_before_a_younger_leaf(make) -> None:
    kit = make("fifo")
    kit.insert("p", [1])
    kit.insert("pa", [1, 2])
    kit.insert("x", [3])
    assert kit.evict(3).page_ids.tolist() == [2, 1, 3]


def test_evict_takes_whole_leaves_until_enough(kit: Kit) -> None:
    kit.insert("abc", [1, 2, 3])
    kit.insert("xyz", [4, 5, 6])
    gone = kit.tree.evict(1)  # one token
    assert (kit.pages(gone.num_tokens), gone.page_ids.tolist()) == (3, [1, 2, 3])
    assert kit.evict(4).page_ids.tolist() == [4, 5, 6]  # fewer than asked for is an answer
    assert kit.evict(1).page_ids.tolist() == []


def test_evict_nothing(kit: Kit) -> None:
    kit.insert("a", [1])
    for backup in (False, True):
        gone = kit.tree.evict(0, backup)
        assert (gone.num_tokens, gone.page_ids.tolist(), gone.host_page_ids.tolist(), gone.to_backup) == (0, [], [], [])
    assert kit.evict_host(5).host_page_ids.tolist() == []
    assert kit.shape() == {"a": ([1], None)}


def test_evict_of_more_than_exists(kit: Kit) -> None:
    kit.insert("ab", [1, 2])
    assert kit.pages(kit.tree.evict(2**62).num_tokens) == 2
    assert kit.tree.evict_host(2**62).num_tokens == 0


def test_evict_of_a_negative_number(kit: Kit) -> None:
    kit.insert("a", [1])
    kit.refuses(InvalidArgumentError, kit.tree.evict, -1)
    kit.refuses(InvalidArgumentError, kit.tree.evict, -1, True)
    kit.refuses(InvalidArgumentError, kit.tree.evict_host, -1)


def test_evict_leaves_what_is_locked_or_pinned(kit: Kit) -> None:
    kit.insert("ab", [1, 2])
    kit.insert("abc", [1, 2, 3])
    kit.insert("x", [4])
    kit.insert("y", [5])
    kit.tree.lock(kit.node("ab"))
    kit.tree.pin(kit.node("x"), 9)
    assert kit.evict(9).page_ids.tolist() == [3, 5]
    assert set(kit.shape()) == {"ab", "x"}


def test_a_node_with_a_host_copy_becomes_host_only(kit: Kit) -> None:
    node = kit.insert("ab", [1, 2]).node
    kit.tree.set_host(node, [11, 12])
    gone = kit.evict(1)
    assert (gone.page_ids.tolist(), gone.host_page_ids.tolist()) == ([1, 2], [])
    assert kit.shape() == {"ab": (None, [11, 12])}
    assert kit.node("ab") == node
    assert kit.counts() == (0, 0, 0, 2)


def test_a_node_without_a_host_copy_takes_its_host_only_descendants_along(kit: Kit) -> None:
    kit.insert("a", [1])
    kit.insert_host("ab", [90, 12])
    kit.insert_host("abc", [90, 12, 13])
    kit.insert_host("ax", [90, 14])
    gone = kit.evict(1)
    assert (kit.pages(gone.num_tokens), gone.page_ids.tolist()) == (1, [1])
    assert sorted(gone.host_page_ids.tolist()) == [12, 13, 14]
    assert len(kit.tree) == 0


def test_a_host_protected_descendant_keeps_its_ancestor(kit: Kit) -> None:
    kit.insert("a", [1])
    kit.insert_host("abc", [90, 12, 13])
    kit.insert("x", [2])
    kit.tree.protect_host(kit.node("abc"))
    for backup in (False, True):  # the same candidates in both modes
        out = kit.evict(9, backup)
        assert 1 not in out.page_ids.tolist()
        assert all(1 not in request.page_ids.tolist() for request in out.to_backup)
    assert set(kit.shape()) == {"a", "abc"}
    kit.tree.release_host(kit.node("abc"))
    assert kit.evict(9).page_ids.tolist() == [1]


def test_a_host_protected_descendant_does_not_keep_an_ancestor_with_a_host_copy(kit: Kit) -> None:
    kit.insert("a", [1])
    kit.tree.set_host(kit.node("a"), [11])
    kit.insert_host("ab", [11, 12])
    kit.tree.protect_host(kit.node("ab"))
    kit.tree.protect_host(kit.node("a"))
    assert kit.evict(1).page_ids.tolist() == [1]
    assert kit.shape() == {"a": (None, [11]), "ab": (None, [12])}


def test_evict_does_not_count_host_pages(kit: Kit) -> None:
    kit.insert("a", [1])
    kit.insert_host("abcde", [90, 12, 13, 14, 15])
    kit.insert("x", [2])
    gone = kit.evict(2)
    assert (kit.pages(gone.num_tokens), gone.page_ids.tolist()) == (2, [1, 2])


def test_an_evicted_page_frees_its_place_for_the_parent_only_if_no_other_child_is_on_the_device(kit: Kit) -> None:
    kit.insert("p", [1])
    kit.insert("pa", [1, 2])
    kit.insert("pb", [1, 3])
    kit.tree.lock(kit.node("pb"))
    assert kit.evict(9).page_ids.tolist() == [2]


# ----------------------------------------------------------------------------------------------------------- evict_host


def test_evict_host_takes_host_only_leaves_only(kit: Kit) -> None:
    kit.insert("a", [1])
    kit.tree.set_host(kit.node("a"), [11])
    kit.insert_host("abc", [11, 12, 13])
    kit.insert_host("abcd", [11, 12, 13, 14])
    kit.insert_host("x", [15])
    kit.tree.protect_host(kit.node("x"))
    gone = kit.evict_host(9)
    assert gone.host_page_ids.tolist() == [14, 12, 13]  # a parent joins when its children are gone
    assert (kit.pages(gone.num_tokens), gone.page_ids.tolist(), gone.to_backup) == (3, [], [])
    assert kit.shape() == {"a": ([1], [11]), "x": (None, [15])}


def test_evict_host_stops_when_there_is_enough(kit: Kit) -> None:
    kit.insert_host("ab", [1, 2])
    kit.insert_host("xy", [3, 4])
    assert kit.tree.evict_host(1).host_page_ids.tolist() == [1, 2]
    assert kit.shape() == {"xy": (None, [3, 4])}


# --------------------------------------------------------------------------------------------- evict(backup=True)


def requests(out) -> list[tuple[int, list[int]]]:
    return [(request.node, request.page_ids.tolist()) for request in out.to_backup]


def test_backup_marks_and_lists_a_node_without_host_copy(kit: Kit) -> None:
    node = kit.insert("ab", [1, 2]).node
    out = kit.evict(2, backup=True)
    assert requests(out) == [(node, [1, 2])]
    assert (out.num_tokens, out.page_ids.tolist(), out.host_page_ids.tolist()) == (0, [], [])
    assert kit.info("ab").backup_pending
    assert kit.shape() == {"ab": ([1, 2], None)}
    assert kit.counts() == (2, 0, 2, 0)
    assert requests(kit.evict(2, backup=True)) == []  # not twice
    assert kit.evict(2).page_ids.tolist() == []  # nor taken away under the copy


def test_backup_frees_what_has_a_host_copy_already(kit: Kit) -> None:
    kit.insert("a", [1])
    kit.tree.set_host(kit.node("a"), [11])
    kit.insert("b", [2])
    kit.insert("c", [3])
    out = kit.evict(2, backup=True)
    assert (kit.pages(out.num_tokens), out.page_ids.tolist()) == (1, [1])
    assert requests(out) == [(kit.node("b"), [2])]  # freed + newly pending >= asked


def test_pending_of_an_earlier_call_does_not_count(kit: Kit) -> None:
    for at, letter in enumerate("abc"):
        kit.insert(letter, [at])
    assert [ids for _, ids in requests(kit.evict(1, backup=True))] == [[0]]
    assert [ids for _, ids in requests(kit.evict(1, backup=True))] == [[1]]
    assert kit.counts() == (3, 0, 2, 0)


def test_a_chain_is_listed_children_first(kit: Kit) -> None:
    kit.insert("a", [1])
    kit.insert("ab", [1, 2])
    kit.insert("abc", [1, 2, 3])
    kit.insert("abx", [1, 2, 4])
    out = kit.evict(9, backup=True)
    assert [ids for _, ids in requests(out)] == [[3], [4], [2], [1]]
    for request in out.to_backup:
        done = kit.tree.finish_backup(request.node, [10 + int(request.page_ids[0])])
        assert done.page_ids.tolist() == request.page_ids.tolist()
    assert kit.shape() == {"a": (None, [11]), "ab": (None, [12]), "abc": (None, [13]), "abx": (None, [14])}


def test_a_parent_waits_for_a_child_that_stays(kit: Kit) -> None:
    kit.insert("a", [1])
    kit.insert("ab", [1, 2])
    kit.insert("ac", [1, 3])
    kit.tree.lock(kit.node("ac"))
    assert [ids for _, ids in requests(kit.evict(9, backup=True))] == [[2]]


def test_a_parent_with_a_host_copy_waits_until_its_pending_children_have_left(kit: Kit) -> None:
    kit.insert("a", [1])
    kit.tree.set_host(kit.node("a"), [11])
    kit.insert("ab", [1, 2])
    out = kit.evict(9, backup=True)
    assert (requests(out), out.page_ids.tolist()) == ([(kit.node("ab"), [2])], [])
    kit.tree.finish_backup(kit.node("ab"), [12])
    assert kit.evict(9, backup=True).page_ids.tolist() == [1]


def held_back(kit: Kit) -> None:
    """[a | 1 | 11] -- [b | 2 | 12] -- [c | 3 | -], older than [x | 9 | -]."""
    kit.insert("a", [1])
    kit.insert("ab", [1, 2])
    kit.tree.set_host(kit.node("ab"), [11, 12])
    kit.insert("abc", [1, 2, 3])
    kit.insert("x", [9])


@pytest.mark.parametrize("asked", [2, 3])
def test_what_a_pending_child_holds_back_counts_when_to_stop(kit: Kit, asked: int) -> None:
    """a and b wait for c alone: x, which is younger, need not go for them."""
    held_back(kit)
    out = kit.evict(asked, backup=True)
    assert (out.page_ids.tolist(), [ids for _, ids in requests(out)]) == ([], [[3]])
    kit.tree.finish_backup(kit.node("abc"), [13])
    assert kit.evict(asked - 1, backup=True).page_ids.tolist() == [2, 1][: asked - 1]


def test_what_is_held_back_by_more_than_pending_children_does_not_count(kit: Kit) -> None:
    """a and b with one more each: a child that stays, a lock, a sibling, or no host copy."""
    held_back(kit)
    kit.insert("aby", [1, 2, 4])
    kit.tree.lock(kit.node("aby"))
    assert [ids for _, ids in requests(kit.evict(2, backup=True))] == [[3], [9]]


def test_above_a_node_that_is_held_back_only_single_children_count(kit: Kit) -> None:
    held_back(kit)
    kit.insert("az", [1, 5])
    kit.match("abc")
    kit.match("x")
    kit.match("az")
    assert [ids for _, ids in requests(kit.evict(3, backup=True))] == [[3], [9]]  # c, b held back, x; not a, nor az


def test_locked_or_unbacked_nodes_are_not_held_back(kit: Kit) -> None:
    held_back(kit)
    kit.tree.lock(kit.node("a"))
    assert [ids for _, ids in requests(kit.evict(3, backup=True))] == [[3], [9]]  # c, b held back, x


def test_a_parent_of_both_a_pending_and_a_freed_child(kit: Kit) -> None:
    kit.insert("a", [1])
    kit.insert("ab", [1, 2])
    kit.tree.set_host(kit.node("ab"), [12])
    kit.insert("ac", [1, 3])
    out = kit.evict(9, backup=True)
    assert out.page_ids.tolist() == [2]
    assert [ids for _, ids in requests(out)] == [[3], [1]]


def test_a_pending_child_with_a_new_child_of_its_own_is_not_gone(kit: Kit) -> None:
    kit.insert("a", [1])
    kit.insert("ab", [1, 2])
    (child,) = requests(kit.evict(1, backup=True))
    assert child[1] == [2]
    kit.insert("abc", [1, 2, 3])
    kit.tree.lock(kit.node("abc"))
    assert requests(kit.evict(9, backup=True)) == []  # neither a nor ab may be listed: abc is there
    kit.tree.unlock(kit.node("abc"))
    assert [ids for _, ids in requests(kit.evict(9, backup=True))] == [[3], [1]]


def test_a_grandchild_that_leaves_opens_the_way_through_a_pending_parent(kit: Kit) -> None:
    kit.insert("a", [1])
    kit.insert("ab", [1, 2])
    kit.evict(1, backup=True)
    kit.insert("abc", [1, 2, 3])
    kit.tree.set_host(kit.node("abc"), [13])
    out = kit.evict(9, backup=True)
    assert out.page_ids.tolist() == [3]
    assert [ids for _, ids in requests(out)] == [[1]]


@pytest.mark.parametrize("policy", POLICIES)
def test_one_order_over_leaves_and_parents_of_pending_ones(make, policy: str) -> None:
    kit = make(policy)
    kit.insert("p", [1])  # tick 1
    kit.insert("x", [2])  # 2
    kit.insert("pa", [1, 3])  # 3: p is used at 3, hits 2
    kit.insert("y", [4])  # 4
    expected = {
        "lru": [2, 3, 1, 4], "fifo": [2, 3, 1, 4], "lfu": [2, 3, 4, 1], "priority": [2, 3, 1, 4],
        "slru": [2, 3, 4, 1], "mru": [4, 3, 1, 2], "filo": [4, 3, 2, 1],
    }  # fmt: skip
    assert [ids[0] for _, ids in requests(kit.evict(9, backup=True))] == expected[policy]


def test_without_backup_a_parent_waits_for_its_pending_child(kit: Kit) -> None:
    kit.insert("a", [1])
    kit.insert("ab", [1, 2])
    (request,) = requests(kit.evict(1, backup=True))
    assert kit.evict(9).page_ids.tolist() == []
    kit.tree.finish_backup(request[0], None)
    assert kit.evict(9).page_ids.tolist() == [1]


def test_pending_nodes_still_match_and_lock(kit: Kit) -> None:
    node = kit.insert("ab", [1, 2]).node
    kit.evict(2, backup=True)
    assert kit.match("ab").page_ids().tolist() == [1, 2]
    assert kit.pages(kit.tree.lock(node)) == -2
    assert kit.counts() == (0, 2, 2, 0)
    assert kit.insert("abc", [1, 2, 3]).duplicate_page_ids.tolist() == []
    assert kit.info("ab").hit_count == 2


# -------------------------------------------------------------------------------------------------------- finish_backup


def pending(kit: Kit, letters: str, ids: list[int]) -> int:
    node = kit.insert(letters, ids).node
    (request,) = kit.evict(len(kit.key(letters)) // kit.page_size, backup=True).to_backup
    assert request.node == node
    return node


def test_finish_backup_moves_the_node_to_the_host(kit: Kit) -> None:
    node = pending(kit, "ab", [1, 2])
    done = kit.tree.finish_backup(node, [11, 12])
    assert (kit.pages(done.num_tokens), done.page_ids.tolist(), done.host_page_ids.tolist()) == (2, [1, 2], [])
    assert done.to_backup == []
    assert kit.shape() == {"ab": (None, [11, 12])}
    assert not kit.info("ab").backup_pending
    assert kit.counts() == (0, 0, 0, 2)


@pytest.mark.parametrize("protect", ["lock", "pin"])
def test_a_node_protected_meanwhile_keeps_both_copies(kit: Kit, protect: str) -> None:
    node = pending(kit, "ab", [1, 2])
    kit.tree.lock(node) if protect == "lock" else kit.tree.pin(node, 9)
    done = kit.tree.finish_backup(node, [11, 12])
    assert (done.num_tokens, done.page_ids.tolist()) == (0, [])
    assert kit.shape() == {"ab": ([1, 2], [11, 12])}
    assert kit.counts() == (0, 2, 0, 2)
    kit.tree.unlock(node) if protect == "lock" else kit.tree.unpin(node)
    assert kit.evict(2).page_ids.tolist() == [1, 2]


def test_a_node_with_a_child_inserted_meanwhile_keeps_both_copies(kit: Kit) -> None:
    node = pending(kit, "ab", [1, 2])
    kit.insert("abc", [1, 2, 3])
    assert kit.tree.finish_backup(node, [11, 12]).page_ids.tolist() == []
    assert kit.shape() == {"ab": ([1, 2], [11, 12]), "abc": ([3], None)}
    assert kit.evict(9).page_ids.tolist() == [3, 1, 2]


def test_no_room_drops_the_node_with_its_host_only_descendants(kit: Kit) -> None:
    node = pending(kit, "ab", [1, 2])
    kit.insert_host("abcd", [90, 91, 13, 14])
    done = kit.tree.finish_backup(node, None)
    assert (kit.pages(done.num_tokens), done.page_ids.tolist()) == (2, [1, 2])
    assert done.host_page_ids.tolist() == [13, 14]
    assert kit.shape() == {}
    assert kit.tree.stats().namespaces == 0


@pytest.mark.parametrize("reason", ["lock", "pin", "child", "host_ref"])
def test_no_room_but_in_use_leaves_the_node_as_it_was(kit: Kit, reason: str) -> None:
    node = pending(kit, "ab", [1, 2])
    if reason == "lock":
        kit.tree.lock(node)
    elif reason == "pin":
        kit.tree.pin(node, 9)
    elif reason == "child":
        kit.insert("abc", [1, 2, 3])
    else:
        kit.tree.protect_host(kit.insert_host("abcd", [90, 91, 13, 14]).node)
    done = kit.tree.finish_backup(node, None)
    assert (done.num_tokens, done.page_ids.tolist(), done.host_page_ids.tolist()) == (0, [], [])
    assert kit.shape()["ab"] == ([1, 2], None)
    assert not kit.info("ab").backup_pending
    kit.refuses(StateError, kit.tree.finish_backup, node, None)


def test_a_pending_node_split_meanwhile_is_settled_as_one(kit: Kit) -> None:
    node = pending(kit, "abcde", [1, 2, 3, 4, 5])
    kit.match("abc")
    kit.match("a")
    kit.tree.split_at(node, kit.page_size)
    assert all(kit.info(path).backup_pending for path in ("a", "abc", "abcd", "abcde"))
    assert kit.counts() == (5, 0, 5, 0)
    for part in ("a", "abc", "abcd"):
        kit.refuses(StateError, kit.tree.finish_backup, kit.node(part), [11])
        kit.refuses(StateError, kit.tree.finish_backup, kit.node(part), None)
    kit.refuses(InvalidArgumentError, kit.tree.finish_backup, node, [15])
    done = kit.tree.finish_backup(node, [11, 12, 13, 14, 15])
    assert done.page_ids.tolist() == [5, 4, 2, 3, 1]  # the lower part first
    assert kit.shape() == {
        "a": (None, [11]), "abc": (None, [12, 13]), "abcd": (None, [14]), "abcde": (None, [15])
    }  # fmt: skip
    assert kit.counts() == (0, 0, 0, 5)


def test_parts_are_settled_each_by_its_own_use(kit: Kit) -> None:
    node = pending(kit, "abcd", [1, 2, 3, 4])
    kit.tree.lock(kit.match("ab").device_node)
    assert kit.tree.finish_backup(node, [11, 12, 13, 14]).page_ids.tolist() == [3, 4]
    assert kit.shape() == {"ab": ([1, 2], [11, 12]), "abcd": (None, [13, 14])}


def test_parts_with_a_branch_between_them(kit: Kit) -> None:
    node = pending(kit, "abcd", [1, 2, 3, 4])
    kit.insert("abx", [1, 2, 5])
    done = kit.tree.finish_backup(node, [11, 12, 13, 14])
    assert done.page_ids.tolist() == [3, 4]  # ab has a device child and stays
    assert kit.shape() == {"ab": ([1, 2], [11, 12]), "abcd": (None, [13, 14]), "abx": ([5], None)}


def test_parts_are_dropped_the_lower_first(kit: Kit) -> None:
    node = pending(kit, "abcd", [1, 2, 3, 4])
    kit.match("ab")
    done = kit.tree.finish_backup(node, None)
    assert done.page_ids.tolist() == [3, 4, 1, 2]
    assert kit.shape() == {}


def test_of_parts_only_the_unused_are_dropped(kit: Kit) -> None:
    node = pending(kit, "abcd", [1, 2, 3, 4])
    kit.tree.lock(kit.match("ab").device_node)
    assert kit.tree.finish_backup(node, None).page_ids.tolist() == [3, 4]
    assert kit.shape() == {"ab": ([1, 2], None)}
    assert not kit.info("ab").backup_pending


def test_a_locked_lower_part_keeps_the_upper_ones(kit: Kit) -> None:
    node = pending(kit, "abcd", [1, 2, 3, 4])
    kit.match("ab")
    kit.tree.lock(node)
    assert kit.tree.finish_backup(node, None).page_ids.tolist() == []
    assert kit.shape() == {"ab": ([1, 2], None), "abcd": ([3, 4], None)}
    assert kit.counts() == (0, 4, 0, 0)


def test_finish_backup_in_another_order_loses_nothing(kit: Kit) -> None:
    kit.insert("a", [1])
    kit.insert("ab", [1, 2])
    child, parent = kit.evict(2, backup=True).to_backup
    assert kit.tree.finish_backup(parent.node, [11]).page_ids.tolist() == []  # its child is still there
    assert kit.tree.finish_backup(child.node, [12]).page_ids.tolist() == [2]
    assert kit.shape() == {"a": ([1], [11]), "ab": (None, [12])}


def test_finish_backup_refusals(kit: Kit) -> None:
    kit.insert_host("h", [13])
    other = kit.insert("q", [9]).node
    kit.tree.lock(other)
    kit.refuses(StateError, kit.tree.finish_backup, other, [11])
    kit.refuses(StateError, kit.tree.finish_backup, kit.node("h"), None)
    node = pending(kit, "ab", [1, 2])
    for ids in ([], [11], [11, 12, 14]):
        kit.refuses(InvalidArgumentError, kit.tree.finish_backup, node, ids)
    kit.refuses(InvalidArgumentError, kit.tree.finish_backup, node, [11, -1])
    kit.refuses(PageOwnershipError, kit.tree.finish_backup, node, [11, 13])
    kit.refuses(PageOwnershipError, kit.tree.finish_backup, node, [11, 11])
    kit.refuses(InvalidArgumentError, kit.tree.finish_backup, ROOT, [])
    kit.tree.finish_backup(node, [11, 12])
    kit.refuses(StateError, kit.tree.finish_backup, node, [11, 12])  # twice
    kit.evict_host(1)
    kit.evict_host(9)
    kit.refuses(HandleError, kit.tree.finish_backup, node, None)  # gone


# ------------------------------------------------------------------------------------------------------------- set_host


def test_set_host_gives_a_host_copy(kit: Kit) -> None:
    node = kit.insert("ab", [1, 2]).node
    kit.tree.set_host(node, [12, 11])
    assert kit.shape() == {"ab": ([1, 2], [12, 11])}
    assert kit.counts() == (2, 0, 0, 2)


def test_set_host_covers_ancestors_that_were_split_off(kit: Kit) -> None:
    node = kit.insert("abcdef", [1, 2, 3, 4, 5, 6]).node
    kit.match("abcd")
    kit.match("a")
    kit.tree.set_host(node, [12, 13, 14, 15, 16])
    assert kit.shape() == {"a": ([1], None), "abcd": ([2, 3, 4], [12, 13, 14]), "abcdef": ([5, 6], [15, 16])}
    kit.tree.set_host(kit.node("a"), [11])
    assert kit.counts() == (6, 0, 0, 6)


def test_set_host_of_the_whole_path(kit: Kit) -> None:
    node = kit.insert("abc", [1, 2, 3]).node
    kit.match("a")
    kit.tree.set_host(node, [11, 12, 13])
    assert kit.shape() == {"a": ([1], [11]), "abc": ([2, 3], [12, 13])}


def test_set_host_must_end_at_a_node_boundary(kit: Kit) -> None:
    node = kit.insert("abcd", [1, 2, 3, 4]).node
    kit.match("ab")
    for ids in ([], [14], [12, 13, 14], [10, 11, 12, 13, 14]):
        kit.refuses(InvalidArgumentError, kit.tree.set_host, node, ids)
    kit.refuses(InvalidArgumentError, kit.tree.set_host, node, [13, -1])
    kit.refuses(InvalidArgumentError, kit.tree.set_host, ROOT, [13])


def test_set_host_where_it_cannot_be(kit: Kit) -> None:
    node = kit.insert("ab", [1, 2]).node
    kit.tree.split_at(node, kit.page_size)
    kit.tree.set_host(kit.node("a"), [11])
    kit.refuses(StateError, kit.tree.set_host, node, [21, 22])  # a has one already
    kit.refuses(StateError, kit.tree.set_host, kit.node("a"), [21])
    host_only = kit.insert_host("h", [13]).node
    kit.refuses(StateError, kit.tree.set_host, host_only, [23])
    kit.tree.lock(node)
    waiting = pending(kit, "p", [3])
    kit.refuses(StateError, kit.tree.set_host, waiting, [23])
    kit.refuses(PageOwnershipError, kit.tree.set_host, node, [11])
    kit.tree.finish_backup(waiting, None)
    kit.insert("xy", [5, 6])
    kit.refuses(PageOwnershipError, kit.tree.set_host, kit.node("xy"), [23, 23])


# ------------------------------------------------------------------------------------------- set_device and finish_load


def test_set_device_loads_back(kit: Kit) -> None:
    node = kit.insert_host("ab", [11, 12]).node
    kit.tree.set_device(node, [1, 2])
    assert kit.shape() == {"ab": ([1, 2], [11, 12])}
    assert (kit.counts(), kit.info("ab").hit_count, kit.info("ab").loading) == ((2, 0, 0, 2), 0, False)


def test_set_device_from_the_top_down(kit: Kit) -> None:
    kit.insert("a", [1])
    kit.insert_host("ab", [90, 12])
    node = kit.insert_host("abc", [90, 12, 13]).node
    kit.refuses(StateError, kit.tree.set_device, node, [3])
    kit.tree.set_device(kit.node("ab"), [2])
    kit.tree.set_device(node, [3])
    assert kit.match("abc").page_ids().tolist() == [1, 2, 3]


def test_set_device_refusals(kit: Kit) -> None:
    kit.insert("a", [1])
    node = kit.insert_host("xyz", [11, 12, 13]).node
    for ids in ([], [2, 3], [2, 3, 4, 5], [2, 3, -4]):
        kit.refuses(InvalidArgumentError, kit.tree.set_device, node, ids)
    kit.refuses(PageOwnershipError, kit.tree.set_device, node, [1, 2, 3])
    kit.refuses(PageOwnershipError, kit.tree.set_device, node, [2, 3, 3])
    kit.refuses(StateError, kit.tree.set_device, kit.node("a"), [2])
    kit.refuses(InvalidArgumentError, kit.tree.set_device, ROOT, [])


def test_loading_protects_the_path(kit: Kit) -> None:
    kit.insert("a", [1])
    node = kit.insert_host("abc", [90, 12, 13]).node
    kit.tree.set_device(node, [2, 3], loading=True)
    assert kit.info("abc").loading
    assert kit.counts() == (0, 3, 0, 2)
    assert kit.evict(9).num_tokens == 0
    assert kit.match("abc").page_ids().tolist() == [1, 2, 3]
    done = kit.tree.finish_load(node)
    assert (done.num_tokens, done.page_ids.tolist()) == (0, [])
    assert not kit.info("abc").loading
    assert kit.counts() == (3, 0, 0, 2)
    assert kit.evict(9).page_ids.tolist() == [2, 3, 1]


def test_a_failed_load_returns_the_pages(kit: Kit) -> None:
    kit.insert("a", [1])
    node = kit.insert_host("abc", [90, 12, 13]).node
    kit.tree.set_device(node, [2, 3], loading=True)
    gone = kit.tree.finish_load(node, success=False)
    assert (kit.pages(gone.num_tokens), gone.page_ids.tolist(), gone.host_page_ids.tolist()) == (2, [2, 3], [])
    assert kit.shape() == {"a": ([1], None), "abc": (None, [12, 13])}
    assert kit.counts() == (1, 0, 0, 2)
    kit.refuses(StateError, kit.tree.finish_load, node)


@pytest.mark.parametrize("success", [True, False])
def test_a_loading_node_split_meanwhile_is_settled_as_one(kit: Kit, success: bool) -> None:
    node = kit.insert_host("abcde", [11, 12, 13, 14, 15]).node
    kit.tree.set_device(node, [1, 2, 3, 4, 5], loading=True)
    kit.match("abc")
    kit.match("a")
    kit.tree.split_at(node, kit.page_size)
    assert all(kit.info(path).loading for path in ("a", "abc", "abcd", "abcde"))
    assert kit.counts() == (0, 5, 0, 5)
    for part in ("a", "abc", "abcd"):
        kit.refuses(StateError, kit.tree.finish_load, kit.node(part))
    gone = kit.tree.finish_load(node, success)
    assert not any(info.loading for info in kit.tree.dump())
    if success:
        assert (gone.page_ids.tolist(), kit.counts()) == ([], (5, 0, 0, 5))
    else:
        assert (gone.page_ids.tolist(), kit.counts()) == ([5, 4, 2, 3, 1], (0, 0, 0, 5))


@pytest.mark.parametrize("use", ["lock lower", "lock upper", "child", "branch"])
def test_a_load_that_somebody_uses_cannot_fail(kit: Kit, use: str) -> None:
    node = kit.insert_host("abcd", [11, 12, 13, 14]).node
    kit.tree.set_device(node, [1, 2, 3, 4], loading=True)
    upper = kit.match("ab").device_node
    if use.startswith("lock"):
        kit.tree.lock(node if use == "lock lower" else upper)
    else:
        kit.insert("abcdx" if use == "child" else "abx", [1, 2, 3, 4, 5] if use == "child" else [1, 2, 5])
    kit.refuses(LockError, kit.tree.finish_load, node, success=False)
    kit.tree.finish_load(node)


def test_a_failed_load_overrides_pins(kit: Kit) -> None:
    kit.insert("a", [1])
    node = kit.insert_host("ab", [90, 12]).node
    kit.tree.set_device(node, [2], loading=True)
    kit.tree.pin(node, 9)
    assert kit.tree.finish_load(node, success=False).page_ids.tolist() == [2]
    assert kit.counts() == (1, 0, 0, 1)
    assert kit.tree.stats().pinned_nodes == 0


def test_loads_one_below_the_other(kit: Kit) -> None:
    upper = kit.insert_host("a", [11]).node
    lower = kit.insert_host("ab", [11, 12]).node
    kit.tree.set_device(upper, [1], loading=True)
    kit.tree.set_device(lower, [2], loading=True)
    kit.refuses(LockError, kit.tree.finish_load, upper, success=False)
    kit.tree.finish_load(upper)
    assert kit.counts() == (0, 2, 0, 2)  # still above a load
    assert kit.tree.finish_load(lower, success=False).page_ids.tolist() == [2]
    assert kit.counts() == (1, 0, 0, 2)


def test_a_loading_node_is_not_a_candidate_for_backup(kit: Kit) -> None:
    node = kit.insert_host("a", [11]).node
    kit.tree.set_device(node, [1], loading=True)
    out = kit.evict(9, backup=True)
    assert (out.to_backup, out.page_ids.tolist()) == ([], [])


def test_finish_load_refusals(kit: Kit) -> None:
    node = kit.insert("a", [1]).node
    kit.refuses(StateError, kit.tree.finish_load, node)
    kit.refuses(StateError, kit.tree.finish_load, kit.insert_host("h", [5]).node)
    kit.refuses(InvalidArgumentError, kit.tree.finish_load, ROOT)
    kit.tree.set_device(kit.node("h"), [6])
    kit.refuses(StateError, kit.tree.finish_load, kit.node("h"))


# --------------------------------------------------------------------------------------------------------- conservation


def test_no_page_is_lost_on_a_long_round(kit: Kit) -> None:
    """Device ids 0 .. 19, host ids 0 .. 19; at each step the tree and the free ones make up all."""
    free, free_host = set(range(20)), set(range(20))

    def check() -> None:
        kit.tree.check_integrity(20, sorted(free), 20, sorted(free_host))

    def take(pool: set[int], count: int) -> list[int]:
        return [pool.pop() for _ in range(count)]

    def put(out) -> None:
        free.update(out.page_ids.tolist())
        free_host.update(out.host_page_ids.tolist())
        check()

    for letters in ("abcd", "abxy", "abcdef", "q"):
        ids = take(free, len(letters))
        free.update(kit.insert(letters, ids).duplicate_page_ids.tolist())
        # ids that equal the tree's cannot come from the free ones
        check()
    kit.tree.set_host(kit.node("q"), take(free_host, 1))
    put(kit.evict(1))
    out = kit.evict(4, backup=True)
    put(out)
    for at, request in enumerate(out.to_backup):
        put(kit.tree.finish_backup(request.node, take(free_host, len(request.page_ids)) if at % 2 == 0 else None))
    ids = take(free_host, 8)
    free_host.update(kit.insert_host("abcdefgh", ids).duplicate_host_page_ids.tolist())
    check()
    put(kit.evict(20))
    put(kit.evict_host(1))
    put(kit.tree.delete_namespace())
    put(kit.tree.reset())
    assert (len(free), len(free_host)) == (20, 20)
