"""The contract of base.py, sentence by sentence: look-up, growth, protection and structure.

One suite for every implementation (see implementations.py), at page sizes 1, 7, 16 and 64. The tiers, eviction, events
and bad input have files of their own beside this one.
"""

from __future__ import annotations

import numpy as np
import pytest

from radixkv.errors import (
    HandleError,
    InvalidArgumentError,
    LockError,
    PageOwnershipError,
    StateError,
)
from radixkv.key import encode_namespace
from radixkv.types import POLICIES, ROOT
from tests.oracle.kit import Kit, lists, plain

# ------------------------------------------------------------------------------------------------------------- creation


def test_an_empty_tree(kit: Kit) -> None:
    assert len(kit.tree) == 0
    assert list(kit.tree) == []
    assert kit.tree.dump() == []
    assert set(kit.tree.stats()._replace(memory_bytes=0)) == {0}
    kit.tree.check_integrity(0, [], 0, [])


def test_attributes(make) -> None:
    for policy in POLICIES:
        kit = make(policy)
        assert kit.tree.policy == policy
        assert kit.tree.page_size == kit.page_size


# ---------------------------------------------------------------------------------------------------------------- match


def test_match_in_an_empty_tree_is_root_and_creates_nothing(kit: Kit) -> None:
    for hit in (kit.match("abc"), kit.peek("abc"), kit.match("abc", extra_key="lora"), kit.match("")):
        assert (hit.num_tokens, hit.host_num_tokens, hit.device_node, hit.host_node) == (0, 0, ROOT, ROOT)
        assert hit.page_ids().tolist() == hit.host_page_ids().tolist() == []
        assert hit.page_ids().dtype == hit.host_page_ids().dtype == np.int32
    assert kit.tree.stats().namespaces == 0


def test_match_of_a_whole_key(kit: Kit) -> None:
    inserted = kit.insert("abc", [10, 11, 12])
    hit = kit.match("abc")
    assert kit.pages(hit.num_tokens) == 3
    assert hit.host_num_tokens == 0
    assert hit.device_node == hit.host_node == inserted.node
    assert hit.page_ids().tolist() == [10, 11, 12]
    assert kit.shape() == {"abc": ([10, 11, 12], None)}


def test_match_ignores_tokens_after_the_last_whole_page(kit: Kit) -> None:
    kit.insert("ab", [1, 2])
    for tail in range(min(kit.page_size, 9)):
        assert kit.pages(kit.tree.match(kit.key("ab", tail)).num_tokens) == 2
        assert kit.pages(kit.tree.match(kit.key("a", tail)).num_tokens) == 1


def test_match_goes_beyond_neither_key_nor_tree(kit: Kit) -> None:
    kit.insert("ab", [1, 2])
    assert kit.match("abcd").page_ids().tolist() == [1, 2]
    assert kit.shape() == {"ab": ([1, 2], None)}  # the hit ends at a boundary: nothing to split


def test_match_splits_where_it_ends(kit: Kit) -> None:
    lower = kit.insert("abcd", [1, 2, 3, 4]).node
    hit = kit.match("abx")
    assert hit.page_ids().tolist() == [1, 2]
    assert kit.shape() == {"ab": ([1, 2], None), "abcd": ([3, 4], None)}
    assert hit.device_node == kit.node("ab")
    assert kit.node("abcd") == lower  # the old handle stays with the lower part
    assert kit.tree.node_info(hit.device_node).path_tokens == hit.num_tokens


def test_match_splits_a_key_that_ends_inside(kit: Kit) -> None:
    kit.insert("abcd", [1, 2, 3, 4])
    assert kit.tree.node_info(kit.match("abc").device_node).path_tokens == 3 * kit.page_size
    assert kit.tree.node_info(kit.match("a").device_node).path_tokens == kit.page_size
    assert kit.shape() == {"a": ([1], None), "abc": ([2, 3], None), "abcd": ([4], None)}


def test_a_difference_in_the_middle_of_a_page_ends_the_hit_before_that_page(kit: Kit) -> None:
    kit.insert("abc", [1, 2, 3])
    for offset in {0, kit.page_size // 2, kit.page_size - 1}:
        key = kit.key("abc")
        key[kit.page_size + offset] += 1000
        assert kit.pages(kit.tree.peek(key).num_tokens) == 1
        key = kit.key("abc")
        key[offset] += 1000
        assert kit.tree.peek(key).num_tokens == 0


def test_match_stamps_its_path_and_nothing_else(kit: Kit) -> None:
    kit.insert("ab", [1, 2])  # tick 1
    kit.insert("abcd", [1, 2, 3, 4])  # 2
    kit.insert("x", [9])  # 3
    kit.match("abc")  # 4
    infos = {path: kit.info(path) for path in kit.shape()}
    times = {path: (info.access_time, info.created_time) for path, info in infos.items()}
    assert times == {"ab": (4, 1), "abc": (4, 2), "abcd": (2, 2), "x": (3, 3)}


def test_every_look_up_or_insert_is_one_tick_even_without_effect(kit: Kit) -> None:
    kit.match("a")  # 1
    kit.match("")  # 2
    kit.insert("", [])  # 3
    kit.insert_host("", [])  # 4
    nothing = kit.match("q", extra_key="nobody")  # 5
    kit.tree.match_extend(nothing, kit.key("z"))  # 6
    kit.peek("a")  # no tick
    kit.tree.peek_many([kit.key("a")])  # no tick
    kit.insert("a", [1])  # 7
    assert (kit.info("a").created_time, kit.info("a").access_time) == (7, 7)


def test_other_operations_neither_tick_nor_stamp(kit: Kit) -> None:
    kit.insert("ab", [1, 2])  # 1
    node = kit.node("ab")
    kit.tree.lock(node)
    kit.tree.unlock(node)
    kit.tree.pin(node, 5)
    kit.tree.unpin(node)
    kit.tree.expire(9)
    kit.tree.set_host(node, [7, 8])
    kit.tree.split_at(node, kit.page_size)
    kit.evict(1)
    kit.tree.set_device(node, [5])
    kit.tree.protect_host(node)
    kit.tree.release_host(node)
    kit.tree.page_keys(node)
    kit.evict_host(1)
    assert {(info.access_time, info.created_time) for info in kit.tree.dump()} == {(1, 1)}
    kit.insert("z", [3])
    assert kit.info("z").created_time == 2


def test_a_refused_operation_is_no_tick(kit: Kit) -> None:
    kit.refuses(InvalidArgumentError, kit.insert, "ab", [1])
    kit.refuses(PageOwnershipError, kit.insert, "ab", [1, 1])
    kit.insert("a", [1])
    assert kit.info("a").created_time == 1


def test_match_reports_the_host_part_beyond_the_device(kit: Kit) -> None:
    kit.insert("ab", [1, 2])
    kit.insert_host("abcd", [90, 91, 13, 14])
    hit = kit.match("abcdx")
    assert (kit.pages(hit.num_tokens), kit.pages(hit.host_num_tokens)) == (2, 2)
    assert hit.page_ids().tolist() == [1, 2]
    assert hit.host_page_ids().tolist() == [13, 14]
    assert (hit.device_node, hit.host_node) == (kit.node("ab"), kit.node("abcd"))


def test_host_ids_of_the_device_part_are_not_in_the_hit(kit: Kit) -> None:
    kit.insert("ab", [1, 2])
    kit.tree.set_host(kit.node("ab"), [11, 12])
    kit.insert_host("abc", [11, 12, 13])
    hit = kit.match("abc")
    assert hit.page_ids().tolist() == [1, 2]
    assert hit.host_page_ids().tolist() == [13]


def test_match_splits_a_host_only_node(kit: Kit) -> None:
    kit.insert_host("abc", [1, 2, 3])
    hit = kit.match("abx")
    assert (hit.num_tokens, kit.pages(hit.host_num_tokens)) == (0, 2)
    assert (hit.device_node, hit.host_node) == (ROOT, kit.node("ab"))
    assert kit.shape() == {"ab": (None, [1, 2]), "abc": (None, [3])}


def test_a_match_is_a_snapshot(kit: Kit) -> None:
    kit.insert("abc", [1, 2, 3])
    kit.insert_host("abcd", [90, 91, 92, 4])
    hit = kit.match("abcd")
    first = hit.page_ids()
    first[:] = 77  # a new array each time
    kit.tree.delete(kit.node("abc"))
    assert hit.page_ids().tolist() == [1, 2, 3]
    assert hit.host_page_ids().tolist() == [4]
    assert kit.pages(hit.num_tokens) == 3


# ----------------------------------------------------------------------------------------------------------------- peek


def test_peek_changes_nothing(kit: Kit) -> None:
    kit.insert("abcd", [1, 2, 3, 4])
    before = kit.snapshot()
    for letters in ("", "a", "abx", "abcd", "abcdz", "q"):
        kit.peek(letters)
        kit.peek(letters, extra_key=1)
    assert kit.snapshot() == before


def test_peek_names_the_node_that_holds_the_last_token(kit: Kit) -> None:
    node = kit.insert("abcd", [1, 2, 3, 4]).node
    hit = kit.peek("ab")
    assert (kit.pages(hit.num_tokens), hit.device_node, hit.host_node) == (2, node, node)
    assert hit.page_ids().tolist() == [1, 2]
    host = kit.insert_host("abcdef", [90, 91, 92, 93, 5, 6]).node
    hit = kit.peek("abcdex")
    assert (kit.pages(hit.num_tokens), kit.pages(hit.host_num_tokens)) == (4, 1)
    assert (hit.device_node, hit.host_node) == (node, host)
    assert hit.host_page_ids().tolist() == [5]


def test_peek_agrees_with_match(kit: Kit) -> None:
    kit.insert("abcd", [1, 2, 3, 4])
    kit.insert("abxy", [1, 2, 5, 6])
    kit.insert_host("abxyz", [90, 91, 92, 93, 7])
    for letters in ("a", "ab", "abc", "abxyz", "abxyzq", "abq", "q", ""):
        peeked, matched = kit.peek(letters), kit.match(letters)
        assert (peeked.num_tokens, peeked.host_num_tokens) == (matched.num_tokens, matched.host_num_tokens)
        assert peeked.page_ids().tolist() == matched.page_ids().tolist()
        assert peeked.host_page_ids().tolist() == matched.host_page_ids().tolist()


def test_peek_many(kit: Kit) -> None:
    kit.insert("ab", [1, 2], extra_key="x")
    kit.insert_host("abc", [90, 91, 13], extra_key="x")
    keys = [kit.key(letters) for letters in ("abc", "", "a", "zz", "abq")] + [kit.key("ab").tolist()]
    before = kit.snapshot()
    hits = kit.tree.peek_many(keys, extra_key="x")
    assert (hits.dtype, hits.shape) == (np.int64, (6, 2))
    assert (hits // kit.page_size).tolist() == [[2, 1], [0, 0], [1, 0], [0, 0], [2, 0], [2, 0]]
    assert kit.tree.peek_many(keys).tolist() == [[0, 0]] * 6
    assert kit.tree.peek_many([]).shape == (0, 2)
    assert kit.snapshot() == before


# --------------------------------------------------------------------------------------------------------- match_extend


def test_match_extend_is_the_match_of_the_longer_key(make) -> None:
    one, two = make(), make()
    for kit in (one, two):
        kit.insert("abcd", [1, 2, 3, 4])
        kit.insert("abcxyz", [1, 2, 3, 5, 6, 7])
        kit.insert_host("abcxyzq", [90, 91, 92, 93, 94, 95, 17])
    for start, more in (("ab", "c"), ("abc", "xq"), ("abcx", "yzq"), ("abcxyzq", "r"), ("", "ab"), ("ab", "")):
        hit = one.tree.match_extend(one.match(start), one.key(more, tail=one.page_size - 1))
        two.match(start)
        whole = two.match(start + more)
        assert (hit.num_tokens, hit.host_num_tokens) == (whole.num_tokens, whole.host_num_tokens)
        assert hit.page_ids().tolist() == whole.page_ids().tolist()
        assert hit.host_page_ids().tolist() == whole.host_page_ids().tolist()
        paths = one.paths() | {ROOT: ""}
        assert len(paths[hit.device_node]) == one.pages(hit.num_tokens)
        assert len(paths[hit.host_node]) == one.pages(hit.num_tokens + hit.host_num_tokens)
    ours, theirs = ([plain(info)[2:] for info in kit.tree.dump()] for kit in (one, two))
    assert ours == theirs  # stamps, too


def test_match_extend_takes_the_tokens_after_the_hit_not_after_the_key(kit: Kit) -> None:
    hit = kit.match("ab")
    assert hit.num_tokens == 0
    kit.insert("ab", [1, 2])
    assert kit.pages(kit.tree.match_extend(hit, kit.key("ab")).num_tokens) == 2


def test_match_extend_keeps_the_namespace(kit: Kit) -> None:
    kit.insert("ab", [1, 2], extra_key="x", cache_salt=3)
    kit.insert("ab", [3, 4])
    hit = kit.match("a", extra_key="x", cache_salt=3)
    assert kit.tree.match_extend(hit, kit.key("b")).page_ids().tolist() == [1, 2]
    nothing = kit.match("q", extra_key="x", cache_salt=3)
    assert kit.tree.match_extend(nothing, kit.key("ab")).page_ids().tolist() == [1, 2]


def test_match_extend_reads_the_prefix_afresh(kit: Kit) -> None:
    kit.insert("ab", [1, 2])
    hit = kit.match("ab")
    kit.tree.set_host(kit.node("ab"), [11, 12])
    kit.evict(2)
    now = kit.tree.match_extend(hit, kit.key("c"))
    assert (now.num_tokens, kit.pages(now.host_num_tokens)) == (0, 2)
    assert now.host_page_ids().tolist() == [11, 12]
    kit.insert("abc", [5, 6, 7])
    assert kit.tree.match_extend(now, kit.key("c")).page_ids().tolist() == [5, 6, 7]


def test_match_extend_after_splits_of_its_end(kit: Kit) -> None:
    kit.insert("abcd", [1, 2, 3, 4])
    hit = kit.match("abcd")
    kit.match("ab")
    kit.match("a")
    kit.insert("abcde", [1, 2, 3, 4, 5])
    assert kit.tree.match_extend(hit, kit.key("e")).page_ids().tolist() == [1, 2, 3, 4, 5]


def test_match_extend_of_a_lost_end_or_of_another_tree(kit: Kit, make) -> None:
    kit.insert("ab", [1, 2])
    hit = kit.match("ab")
    kit.evict(2)
    kit.refuses(HandleError, kit.tree.match_extend, hit, kit.key("c"))
    other = make()
    other.insert("ab", [1, 2])
    kit.refuses(HandleError, kit.tree.match_extend, other.match("ab"), kit.key("c"))
    kit.refuses(HandleError, kit.tree.match_extend, other.match("q"), kit.key("c"))  # even if it is empty


def test_match_extend_of_a_peek(kit: Kit) -> None:
    kit.insert("abcd", [1, 2, 3, 4])
    kit.refuses(InvalidArgumentError, kit.tree.match_extend, kit.peek("ab"), kit.key("c"))
    assert kit.pages(kit.tree.match_extend(kit.peek("abcd"), kit.key("e")).num_tokens) == 4
    assert kit.pages(kit.tree.match_extend(kit.peek("q"), kit.key("ab")).num_tokens) == 2


# --------------------------------------------------------------------------------------------------------------- insert


def test_insert_into_an_empty_tree(kit: Kit) -> None:
    result = kit.insert("abc", [5, 3, 4])
    assert result.prefix_tokens == 0
    assert result.duplicate_page_ids.tolist() == []
    assert result.duplicate_page_ids.dtype == np.int32
    assert result.node == kit.node("abc") != ROOT
    assert kit.shape() == {"abc": ([5, 3, 4], None)}
    info = kit.info("abc")
    assert (info.parent, info.path_tokens, info.hit_count) == (ROOT, 3 * kit.page_size, 1)
    assert (info.lock_ref, info.host_ref) == (0, 0)
    assert (info.pinned_until_ns, info.loading, info.backup_pending, info.priority) == (None, False, False, 0)
    assert info.tokens.tolist() == kit.key("abc").tolist()
    assert kit.counts() == (3, 0, 0, 0)


def test_insert_of_an_empty_key(kit: Kit) -> None:
    for tail in range(min(kit.page_size, 5)):
        result = kit.tree.insert(kit.key("", tail), [], extra_key="new")
        assert (result.prefix_tokens, result.node, result.duplicate_page_ids.tolist()) == (0, ROOT, [])
        result = kit.tree.insert_host(kit.key("", tail), [], extra_key="new")
        assert (result.prefix_tokens, result.node, result.duplicate_host_page_ids.tolist()) == (0, ROOT, [])
    assert kit.tree.stats().namespaces == 0
    kit.refuses(InvalidArgumentError, kit.insert, "", [1])


def test_insert_ignores_leftover_tokens(kit: Kit) -> None:
    tail = kit.page_size - 1
    result = kit.tree.insert(kit.key("ab", tail), [1, 2])
    assert kit.tree.node_info(result.node).path_tokens == 2 * kit.page_size
    kit.refuses(InvalidArgumentError, kit.tree.insert, kit.key("ab", tail), [1, 2, 3])


def test_insert_again_with_the_same_ids(kit: Kit) -> None:
    node = kit.insert("ab", [1, 2]).node
    result = kit.insert("ab", [1, 2])
    assert (kit.pages(result.prefix_tokens), result.node, result.duplicate_page_ids.tolist()) == (2, node, [])
    assert kit.info("ab").hit_count == 2


def test_insert_returns_the_duplicates(kit: Kit) -> None:
    kit.insert("abc", [1, 2, 3])
    result = kit.insert("abcd", [8, 2, 9, 4])
    assert result.duplicate_page_ids.tolist() == [8, 9]  # in key order; the equal id is none
    assert kit.pages(result.prefix_tokens) == 3
    assert kit.shape() == {"abc": ([1, 2, 3], None), "abcd": ([4], None)}
    assert kit.insert("ab", [2000, 1000]).duplicate_page_ids.tolist() == [2000, 1000]


def test_insert_that_diverges_splits(kit: Kit) -> None:
    old = kit.insert("abcd", [1, 2, 3, 4]).node
    result = kit.insert("abxy", [1, 2, 5, 6])
    assert kit.pages(result.prefix_tokens) == 2
    assert kit.shape() == {"ab": ([1, 2], None), "abcd": ([3, 4], None), "abxy": ([5, 6], None)}
    assert (kit.node("abcd"), kit.node("abxy")) == (old, result.node)
    assert {path: kit.info(path).hit_count for path in kit.shape()} == {"ab": 2, "abcd": 1, "abxy": 1}


def test_insert_of_a_prefix_splits(kit: Kit) -> None:
    old = kit.insert("abcd", [1, 2, 3, 4]).node
    result = kit.insert("ab", [1, 2])
    assert (kit.pages(result.prefix_tokens), result.node) == (2, kit.node("ab"))
    assert (kit.node("abcd"), kit.node("ab") != old) == (old, True)
    assert {path: kit.info(path).hit_count for path in kit.shape()} == {"ab": 2, "abcd": 1}


def test_hit_count_rises_in_insert_only(kit: Kit) -> None:
    kit.insert("ab", [1, 2])
    kit.match("ab")
    kit.peek("ab")
    kit.insert_host("ab", [1, 2])
    kit.tree.lock(kit.node("ab"))
    assert kit.info("ab").hit_count == 1
    kit.insert("abc", [1, 2, 3])
    assert (kit.info("ab").hit_count, kit.info("abc").hit_count) == (2, 1)


def test_insert_raises_the_priority_of_the_path(kit: Kit) -> None:
    kit.insert("ab", [1, 2], priority=3)
    kit.insert("abcd", [1, 2, 3, 4], priority=1)
    kit.insert("z", [9], priority=-5)
    assert {path: kit.info(path).priority for path in kit.shape()} == {"ab": 3, "abcd": 1, "z": -5}
    kit.insert("abcx", [1, 2, 3, 5], priority=2**31 - 1)
    kit.insert_host("z", [1], priority=-4)
    kit.insert("z", [9], priority=-(2**31))
    assert {path: kit.info(path).priority for path in kit.shape()} == {
        "ab": 2**31 - 1, "abc": 2**31 - 1, "abcd": 1, "abcx": 2**31 - 1, "z": -4,
    }  # fmt: skip


def test_insert_stamps_the_path(kit: Kit) -> None:
    kit.insert("abc", [1, 2, 3])
    kit.insert("abx", [1, 2, 4])
    times = {path: (kit.info(path).access_time, kit.info(path).created_time) for path in kit.shape()}
    assert times == {"ab": (2, 1), "abc": (1, 1), "abx": (2, 2)}


# ------------------------------------------------------------------------------------------------------------- adoption


def evicted(kit: Kit, letters: str, ids: list[int], host_ids: list[int]) -> int:
    """Insert a key, back it up and evict it: a host-only node that was once on the device."""
    node = kit.insert(letters, ids).node
    kit.tree.set_host(node, host_ids)
    assert kit.evict(len(ids)).page_ids.tolist() == ids
    return node


def test_an_evicted_node_adopts_the_callers_pages(kit: Kit) -> None:
    node = evicted(kit, "ab", [1, 2], [11, 12])
    result = kit.insert("ab", [5, 6])
    assert (result.prefix_tokens, result.node, result.duplicate_page_ids.tolist()) == (0, node, [])
    assert kit.shape() == {"ab": ([5, 6], [11, 12])}
    assert kit.info("ab").hit_count == 1  # re-adoption is no hit
    assert kit.counts() == (2, 0, 0, 2)


def test_a_partly_covered_evicted_node_is_split_first(kit: Kit) -> None:
    node = evicted(kit, "abcd", [1, 2, 3, 4], [11, 12, 13, 14])
    result = kit.insert("abxy", [5, 6, 7, 8])
    assert (result.prefix_tokens, result.duplicate_page_ids.tolist()) == (0, [])
    assert result.adopted_host_page_ids.tolist() == [11, 12]
    assert kit.shape() == {"ab": ([5, 6], [11, 12]), "abcd": (None, [13, 14]), "abxy": ([7, 8], None)}
    assert kit.node("abcd") == node
    assert {path: kit.info(path).hit_count for path in kit.shape()} == {"ab": 1, "abcd": 1, "abxy": 1}


def test_adoption_below_a_device_part(kit: Kit) -> None:
    kit.insert("a", [1])
    kit.insert_host("abc", [90, 12, 13])
    kit.insert_host("abcd", [91, 12, 13, 14])
    result = kit.insert("abcde", [8, 2, 3, 4, 5])
    assert (kit.pages(result.prefix_tokens), result.duplicate_page_ids.tolist()) == (1, [8])
    assert result.adopted_host_page_ids.tolist() == [12, 13, 14]
    assert kit.shape() == {
        "a": ([1], None), "abc": ([2, 3], [12, 13]), "abcd": ([4], [14]), "abcde": ([5], None)
    }  # fmt: skip
    assert {path: kit.info(path).hit_count for path in kit.shape()} == {"a": 2, "abc": 0, "abcd": 0, "abcde": 1}


# ------------------------------------------------------------------------------------------------------------ ownership


def test_an_id_that_is_owned_elsewhere_is_refused(kit: Kit) -> None:
    kit.insert("ab", [1, 2])
    message = kit.refuses(PageOwnershipError, kit.insert, "xy", [7, 2])
    assert "2" in message
    kit.refuses(PageOwnershipError, kit.insert, "ab", [2, 1])  # each is the tree's, at the other's place
    kit.refuses(PageOwnershipError, kit.insert, "ab", [2, 8])  # among the duplicates too
    kit.refuses(PageOwnershipError, kit.insert, "abc", [1, 2, 1])
    kit.refuses(PageOwnershipError, kit.insert, "ab", [1, 2], extra_key="other")


def test_an_id_twice_in_one_call_is_refused(kit: Kit) -> None:
    kit.insert("ab", [1, 2])
    kit.refuses(PageOwnershipError, kit.insert, "xy", [7, 7])
    kit.refuses(PageOwnershipError, kit.insert, "abc", [1, 7, 7])
    kit.refuses(PageOwnershipError, kit.insert, "ab", [7, 7])  # both would be duplicates
    kit.refuses(PageOwnershipError, kit.insert_host, "xy", [7, 7])


def test_a_refused_insert_splits_and_adopts_nothing(kit: Kit) -> None:
    evicted(kit, "abcd", [1, 2, 3, 4], [11, 12, 13, 14])
    kit.insert("z", [9])
    kit.refuses(PageOwnershipError, kit.insert, "abx", [1, 2, 9], priority=7)
    kit.refuses(PageOwnershipError, kit.insert_host, "abx", [21, 13, 23], priority=7)


def test_device_and_host_ids_are_two_spaces(kit: Kit) -> None:
    kit.insert("ab", [1, 2])
    kit.insert_host("xy", [1, 2])
    assert kit.shape() == {"ab": ([1, 2], None), "xy": (None, [1, 2])}
    kit.refuses(PageOwnershipError, kit.insert_host, "q", [2])
    kit.refuses(PageOwnershipError, kit.insert, "q", [2])


def test_ids_that_left_the_tree_may_come_back(kit: Kit) -> None:
    kit.insert("ab", [1, 2])
    kit.evict(2)
    kit.insert("xy", [2, 1])
    assert kit.shape() == {"xy": ([2, 1], None)}


def test_the_largest_and_smallest_ids(kit: Kit) -> None:
    kit.insert("ab", [2**31 - 1, 0])
    assert kit.match("ab").page_ids().tolist() == [2**31 - 1, 0]
    kit.refuses(InvalidArgumentError, kit.insert, "cd", [5, -1])
    kit.refuses(InvalidArgumentError, kit.insert_host, "cd", [5, -(2**31)])


# ---------------------------------------------------------------------------------------------------------- insert_host


def test_insert_host_creates_a_host_only_node(kit: Kit) -> None:
    result = kit.insert_host("abc", [1, 2, 3], priority=4)
    assert (result.prefix_tokens, result.node) == (0, kit.node("abc"))
    assert result.duplicate_host_page_ids.tolist() == []
    assert result.duplicate_host_page_ids.dtype == np.int32
    assert kit.shape() == {"abc": (None, [1, 2, 3])}
    assert (kit.info("abc").hit_count, kit.info("abc").priority, kit.info("abc").created_time) == (0, 4, 1)
    assert kit.counts() == (0, 0, 0, 3)


def test_insert_host_leaves_existing_nodes_as_they_are(kit: Kit) -> None:
    kit.insert("ab", [1, 2])
    kit.insert_host("abcd", [90, 91, 13, 14])
    result = kit.insert_host("abcdef", [90, 91, 13, 92, 15, 16])
    assert kit.pages(result.prefix_tokens) == 4  # on either tier
    assert result.duplicate_host_page_ids.tolist() == [90, 91, 92]  # 13 is the tree's own, at its place
    assert kit.shape() == {"ab": ([1, 2], None), "abcd": (None, [13, 14]), "abcdef": (None, [15, 16])}
    assert {path: kit.info(path).hit_count for path in kit.shape()} == {"ab": 1, "abcd": 0, "abcdef": 0}
    assert {path: kit.info(path).access_time for path in kit.shape()} == {"ab": 3, "abcd": 3, "abcdef": 3}


def test_insert_host_knows_the_host_copies_of_device_nodes(kit: Kit) -> None:
    kit.insert("ab", [1, 2])
    kit.tree.set_host(kit.node("ab"), [11, 12])
    assert kit.insert_host("abc", [11, 77, 13]).duplicate_host_page_ids.tolist() == [77]


def test_insert_host_splits_where_it_diverges_or_ends(kit: Kit) -> None:
    kit.insert("abcd", [1, 2, 3, 4])
    result = kit.insert_host("abx", [90, 91, 13])
    assert kit.pages(result.prefix_tokens) == 2
    assert kit.shape() == {"ab": ([1, 2], None), "abcd": ([3, 4], None), "abx": (None, [13])}
    result = kit.insert_host("a", [90])
    assert (kit.pages(result.prefix_tokens), result.node) == (1, kit.node("a"))
    assert set(kit.shape()) == {"a", "ab", "abcd", "abx"}


def test_insert_host_raises_priorities(kit: Kit) -> None:
    kit.insert("a", [1])
    kit.insert_host("ab", [90, 12], priority=6)
    assert (kit.info("a").priority, kit.info("ab").priority) == (6, 6)


def test_insert_host_ownership(kit: Kit) -> None:
    kit.insert_host("ab", [1, 2])
    kit.refuses(PageOwnershipError, kit.insert_host, "xy", [7, 2])
    kit.refuses(PageOwnershipError, kit.insert_host, "ab", [2, 1])
    kit.refuses(PageOwnershipError, kit.insert_host, "abc", [1, 2, 1])
    kit.insert("d", [5])
    kit.refuses(PageOwnershipError, kit.insert_host, "d", [1])  # would come back as a duplicate and be freed in use


# ---------------------------------------------------------------------------------------------------------------- hints


@pytest.mark.parametrize("host", [False, True])
def test_a_hint_changes_nothing_about_the_result(make, host: bool) -> None:
    one, two = make(), make()
    for kit in (one, two):
        kit.insert("abcd", [1, 2, 3, 4])
        kit.insert_host("abcdef", [90, 91, 92, 93, 15, 16])
    for letters, ids in (("abcd", [1, 2, 3, 4]), ("abcdefg", [20, 21, 22, 23, 24, 25, 26]), ("abz", [30, 31, 32]),
                         ("ab", [40, 41]), ("q", [50])):  # fmt: skip
        hint = one.match(letters)
        two.match(letters)
        ours = (one.insert_host if host else one.insert)(letters, ids, match=hint)
        theirs = (two.insert_host if host else two.insert)(letters, ids)
        names = ("duplicate_host_page_ids",) if host else ("duplicate_page_ids",)
        assert ours.prefix_tokens == theirs.prefix_tokens
        assert [lists(getattr(ours, n)) for n in names] == [lists(getattr(theirs, n)) for n in names]
        assert one.paths()[ours.node] == two.paths()[theirs.node] == letters
        assert [plain(i)[2:] for i in one.tree.dump()] == [plain(i)[2:] for i in two.tree.dump()]


def test_a_hint_from_peek_inside_a_node(kit: Kit) -> None:
    kit.insert("abcd", [1, 2, 3, 4])
    result = kit.insert("abxy", [1, 2, 5, 6], match=kit.peek("abx"))
    assert kit.pages(result.prefix_tokens) == 2
    assert kit.shape() == {"ab": ([1, 2], None), "abcd": ([3, 4], None), "abxy": ([5, 6], None)}


def test_a_hint_of_another_prefix_is_found_out(kit: Kit) -> None:
    kit.insert("abc", [1, 2, 3])
    result = kit.insert("xyz", [4, 5, 6], match=kit.match("ab"))
    assert result.prefix_tokens == 0
    assert set(kit.shape()) == {"ab", "abc", "xyz"}
    result = kit.insert("abq", [1, 2, 7], match=kit.match("xy"))
    assert kit.pages(result.prefix_tokens) == 2
    assert kit.match("xyz").page_ids().tolist() == [4, 5, 6]


def test_a_stale_hint_costs_a_walk_only(kit: Kit) -> None:
    kit.insert("ab", [1, 2])
    hint = kit.match("ab")
    kit.evict(2)
    assert kit.insert("abc", [1, 2, 3], match=hint).prefix_tokens == 0
    hint = kit.match("abc")
    kit.tree.reset()
    assert kit.insert("abc", [1, 2, 3], match=hint).prefix_tokens == 0
    assert kit.shape() == {"abc": ([1, 2, 3], None)}


def test_a_hint_whose_end_was_split_since(kit: Kit) -> None:
    kit.insert("abcd", [1, 2, 3, 4])
    hint = kit.match("abcd")
    kit.match("ab")
    kit.insert("abz", [1, 2, 9])
    result = kit.insert("abcde", [1, 2, 3, 4, 5], match=hint)
    assert kit.pages(result.prefix_tokens) == 4
    assert kit.match("abcde").page_ids().tolist() == [1, 2, 3, 4, 5]


def test_a_hint_whose_end_was_evicted_to_the_host_since(kit: Kit) -> None:
    node = kit.insert("ab", [1, 2]).node
    kit.tree.set_host(node, [11, 12])
    hint = kit.match("ab")
    kit.evict(2)
    result = kit.insert("abc", [5, 6, 7], match=hint)
    assert (result.prefix_tokens, kit.shape()) == (0, {"ab": ([5, 6], [11, 12]), "abc": ([7], None)})


def test_an_empty_hint_is_a_hint_for_its_namespace(kit: Kit) -> None:
    hint = kit.match("q", extra_key="x")
    kit.insert("ab", [1, 2], match=hint, extra_key="x")
    kit.refuses(InvalidArgumentError, kit.insert, "ab", [3, 4], match=hint)


@pytest.mark.parametrize("name", ["insert", "insert_host"])
def test_hints_that_are_refused(kit: Kit, make, name: str) -> None:
    insert = getattr(kit, name)
    kit.insert("abc", [1, 2, 3])
    kit.insert("abc", [4, 5, 6], extra_key="x")
    hint = kit.match("abc")
    kit.refuses(InvalidArgumentError, insert, "abcd", [20, 21, 22, 23], match=hint, extra_key="x")
    kit.refuses(InvalidArgumentError, insert, "abcd", [20, 21, 22, 23], match=kit.match("abc", extra_key="x"))
    kit.refuses(InvalidArgumentError, insert, "ab", [20, 21], match=hint)  # longer than the key
    kit.refuses(InvalidArgumentError, insert, "", [], match=hint)
    kit.refuses(InvalidArgumentError, kit.tree.insert, kit.key("ab", kit.page_size - 1), [20, 21], match=hint)
    other = make()
    other.insert("abc", [1, 2, 3])
    kit.refuses(HandleError, insert, "abcd", [20, 21, 22, 23], match=other.match("abc"))
    kit.refuses(HandleError, insert, "abcd", [20, 21, 22, 23], match=other.match("q"))


def test_a_hint_does_not_excuse_a_short_list_of_ids(kit: Kit) -> None:
    kit.insert("ab", [1, 2])
    kit.refuses(InvalidArgumentError, kit.insert, "abcd", [3, 4], match=kit.match("ab"))


# ----------------------------------------------------------------------------------------------------------- namespaces


NAMES = [(None, None), ("", None), (None, ""), (b"", None), (0, None), ("0", None), (b"0", None), ("a", "b"),
         ("ab", None), (None, "ab"), ("n", None), (1, 2), (12, None), (-1, None), (2**80, None),
         ("é", b"\xff")]  # fmt: skip


def test_namespaces_share_nothing(kit: Kit) -> None:
    for at, (extra, salt) in enumerate(NAMES):
        result = kit.insert("ab", [2 * at, 2 * at + 1], extra_key=extra, cache_salt=salt)
        assert result.prefix_tokens == 0
    assert kit.tree.stats().namespaces == len(NAMES)
    for at, (extra, salt) in enumerate(NAMES):
        assert kit.match("ab", extra_key=extra, cache_salt=salt).page_ids().tolist() == [2 * at, 2 * at + 1]
    assert [info.namespace for info in kit.tree.dump()] == sorted(encode_namespace(*name) for name in NAMES)


def test_an_emptied_namespace_is_freed(kit: Kit) -> None:
    def live() -> int:
        return kit.tree.stats().namespaces

    kit.insert("a", [1], extra_key="e")
    kit.insert_host("a", [1], extra_key="h")
    kit.insert("ab", [2, 3], extra_key="d")
    kit.insert("a", [4], extra_key="n")
    assert live() == 4
    kit.evict(1)
    assert live() == 3
    kit.evict_host(1)
    assert live() == 2
    kit.tree.delete(kit.node("ab", encode_namespace("d")))
    assert live() == 1
    kit.tree.delete_namespace("n")
    assert live() == 0
    kit.insert("a", [1], extra_key="e")
    kit.tree.reset()
    assert live() == 0


# ------------------------------------------------------------------------------------------------------ lock and unlock


def test_namespaces_that_come_and_go(kit: Kit) -> None:
    """The default one too: what is left of a namespace may not be found under the name of a later one."""
    kit.insert("a", [0])
    kit.insert("a", [1], extra_key="stays")
    kit.tree.delete_namespace()
    for name in range(100):
        kit.insert("a", [2], extra_key=name)
        if name % 7 == 3:
            kit.insert("a", [0])
        assert kit.peek("a", extra_key=name).page_ids().tolist() == [2]
        kit.tree.delete_namespace(name)
        assert kit.peek("a", extra_key=name).num_tokens == 0
        if name % 7 == 5:
            kit.tree.delete_namespace()
    assert kit.match("a", extra_key="stays").page_ids().tolist() == [1]


def test_lock_protects_the_path_and_says_how_much(kit: Kit) -> None:
    kit.insert("ab", [1, 2])
    kit.insert("abcd", [1, 2, 3, 4])
    kit.insert("abx", [1, 2, 5])
    assert kit.counts() == (5, 0, 0, 0)
    assert kit.pages(kit.tree.lock(kit.node("abcd"))) == -4
    assert kit.counts() == (1, 4, 0, 0)
    assert kit.pages(kit.tree.lock(kit.node("abx"))) == -1  # ab is protected already
    assert kit.tree.lock(kit.node("ab")) == 0
    assert {path: kit.info(path).lock_ref for path in kit.shape()} == {"ab": 3, "abcd": 1, "abx": 1}
    assert kit.tree.unlock(kit.node("ab")) == 0
    assert kit.pages(kit.tree.unlock(kit.node("abcd"))) == 2
    assert kit.pages(kit.tree.unlock(kit.node("abx"))) == 3
    assert kit.counts() == (5, 0, 0, 0)


def test_lock_counts(kit: Kit) -> None:
    node = kit.insert("a", [1]).node
    assert [kit.pages(kit.tree.lock(node)) for _ in range(3)] == [-1, 0, 0]
    assert [kit.pages(kit.tree.unlock(node)) for _ in range(3)] == [0, 0, 1]
    kit.refuses(LockError, kit.tree.unlock, node)


def test_root_is_always_locked(kit: Kit) -> None:
    assert kit.tree.lock(ROOT) == kit.tree.unlock(ROOT) == kit.tree.unlock(ROOT) == 0


def test_unlock_undoes_a_lock_of_that_very_node(kit: Kit) -> None:
    """Else a caller who unlocks the parent twice takes the lock of whoever holds the child."""
    kit.insert("a", [1])
    kit.insert("ab", [1, 2])
    kit.tree.lock(kit.node("ab"))
    kit.refuses(LockError, kit.tree.unlock, kit.node("a"))
    kit.tree.lock(kit.node("a"))
    kit.tree.unlock(kit.node("a"))
    kit.refuses(LockError, kit.tree.unlock, kit.node("a"))
    kit.tree.unlock(kit.node("ab"))


def test_a_split_leaves_the_lock_with_the_handle(kit: Kit) -> None:
    node = kit.insert("abcd", [1, 2, 3, 4]).node
    kit.tree.lock(node)
    upper = kit.match("ab").device_node
    assert (kit.info("ab").lock_ref, kit.info("abcd").lock_ref) == (1, 1)
    assert kit.counts() == (0, 4, 0, 0)
    kit.refuses(LockError, kit.tree.unlock, upper)
    assert kit.pages(kit.tree.unlock(node)) == 4
    assert (kit.info("ab").lock_ref, kit.info("abcd").lock_ref) == (0, 0)


def test_a_new_child_of_a_locked_node_is_not_locked(kit: Kit) -> None:
    kit.insert("ab", [1, 2])
    kit.tree.lock(kit.node("ab"))
    kit.insert("abc", [1, 2, 3])
    assert kit.counts() == (1, 2, 0, 0)
    assert kit.evict(9).page_ids.tolist() == [3]


def test_locking_a_host_only_node(kit: Kit) -> None:
    node = kit.insert_host("a", [1]).node
    kit.refuses(StateError, kit.tree.lock, node)
    kit.refuses(StateError, kit.tree.unlock, node)


def test_lock_through_peek_protects_at_least_the_hit(kit: Kit) -> None:
    kit.insert("abcd", [1, 2, 3, 4])
    kit.tree.lock(kit.peek("ab").device_node)
    assert kit.evict(4).num_tokens == 0


# --------------------------------------------------------------------------------------- protect_host, release_host


def test_protect_host_counts_for_one_node_only(kit: Kit) -> None:
    kit.insert_host("a", [1])
    node = kit.insert_host("ab", [1, 2]).node
    kit.tree.protect_host(node)
    kit.tree.protect_host(node)
    assert (kit.info("a").host_ref, kit.info("ab").host_ref) == (0, 2)
    assert kit.evict_host(9).num_tokens == 0
    kit.tree.release_host(node)
    assert kit.evict_host(9).num_tokens == 0
    kit.tree.release_host(node)
    kit.refuses(LockError, kit.tree.release_host, node)
    assert kit.evict_host(9).host_page_ids.tolist() == [2, 1]


def test_protect_host_needs_a_host_copy(kit: Kit) -> None:
    node = kit.insert("a", [1]).node
    kit.refuses(StateError, kit.tree.protect_host, node)
    kit.refuses(LockError, kit.tree.release_host, node)
    kit.tree.set_host(node, [5])
    kit.tree.protect_host(node)
    assert kit.info("a").host_ref == 1


def test_protect_host_of_root_is_nothing(kit: Kit) -> None:
    kit.tree.protect_host(ROOT)
    kit.tree.release_host(ROOT)
    kit.tree.release_host(ROOT)


def test_a_split_leaves_host_ref_below(kit: Kit) -> None:
    node = kit.insert_host("abcd", [1, 2, 3, 4]).node
    kit.tree.protect_host(node)
    kit.match("ab")
    assert (kit.info("ab").host_ref, kit.info("abcd").host_ref) == (0, 1)
    assert kit.evict_host(9).num_tokens == 0
    kit.tree.release_host(node)
    assert kit.evict_host(9).host_page_ids.tolist() == [3, 4, 1, 2]


# ----------------------------------------------------------------------------------------------------------------- pins


def test_pin_protects_the_path_until_its_time(kit: Kit) -> None:
    kit.insert("a", [1])
    kit.insert("ab", [1, 2])
    kit.insert("z", [9])
    assert kit.pages(kit.tree.pin(kit.node("ab"), 100)) == -2
    assert kit.counts() == (1, 2, 0, 0)
    assert (kit.info("ab").pinned_until_ns, kit.info("a").pinned_until_ns) == (100, None)
    assert kit.tree.stats().pinned_nodes == 1
    assert kit.evict(9).page_ids.tolist() == [9]
    assert kit.tree.expire(99) == 0
    assert kit.tree.expire(100) == 1
    assert kit.tree.expire(100) == 0
    assert kit.counts() == (2, 0, 0, 0)
    assert kit.tree.stats().pinned_nodes == 0
    assert kit.evict(9).page_ids.tolist() == [2, 1]


def test_a_second_pin_replaces_the_time(kit: Kit) -> None:
    node = kit.insert("a", [1]).node
    assert [kit.pages(kit.tree.pin(node, until)) for until in (50, 10, 30)] == [-1, 0, 0]
    assert kit.tree.stats().pinned_nodes == 1
    assert kit.tree.expire(29) == 0
    assert kit.tree.expire(30) == 1
    assert kit.counts() == (1, 0, 0, 0)


def test_unpin(kit: Kit) -> None:
    kit.insert("a", [1])
    kit.insert("ab", [1, 2])
    assert kit.tree.unpin(kit.node("ab")) == 0
    kit.tree.pin(kit.node("ab"), 5)
    kit.tree.pin(kit.node("a"), 5)
    assert kit.tree.unpin(kit.node("a")) == 0  # still above a pinned node
    assert kit.pages(kit.tree.unpin(kit.node("ab"))) == 2
    assert kit.tree.unpin(kit.node("ab")) == 0
    assert kit.tree.unpin(ROOT) == 0
    assert kit.tree.unpin(kit.insert_host("h", [1]).node) == 0


def test_expire_removes_all_that_are_due(kit: Kit) -> None:
    until = {"a": 5, "b": -7, "c": 2**63 - 1, "d": 6, "e": -(2**63)}
    for at, letter in enumerate(until):
        kit.tree.pin(kit.insert(letter, [at]).node, until[letter])
    assert kit.tree.expire(-(2**63)) == 1
    assert kit.tree.expire(5) == 2
    assert {path for path in kit.shape() if kit.info(path).pinned_until_ns is not None} == {"c", "d"}
    assert kit.tree.expire(2**63 - 1) == 2


def test_pins_and_locks_add_up(kit: Kit) -> None:
    node = kit.insert("ab", [1, 2]).node
    assert kit.pages(kit.tree.lock(node)) == -2
    assert kit.tree.pin(node, 5) == 0
    assert kit.tree.unlock(node) == 0
    assert kit.counts() == (0, 2, 0, 0)
    assert kit.pages(kit.tree.unpin(node)) == 2


def test_a_split_leaves_the_pin_below_and_protects_the_upper_part(kit: Kit) -> None:
    node = kit.insert("abcd", [1, 2, 3, 4]).node
    kit.tree.pin(node, 5)
    kit.match("ab")
    assert (kit.info("ab").pinned_until_ns, kit.info("abcd").pinned_until_ns) == (None, 5)
    assert kit.counts() == (0, 4, 0, 0)
    assert kit.tree.stats().pinned_nodes == 1
    assert kit.tree.unpin(kit.node("ab")) == 0
    assert kit.pages(kit.tree.unpin(node)) == 4


def test_pins_that_are_refused(kit: Kit) -> None:
    node = kit.insert("a", [1]).node
    kit.refuses(InvalidArgumentError, kit.tree.pin, ROOT, 5)
    kit.refuses(InvalidArgumentError, kit.tree.pin, node, 2**63)
    kit.refuses(InvalidArgumentError, kit.tree.pin, node, -(2**63) - 1)
    kit.refuses(InvalidArgumentError, kit.tree.expire, 2**63)
    kit.refuses(StateError, kit.tree.pin, kit.insert_host("h", [1]).node, 5)


# ------------------------------------------------------------------------------------------------------------- split_at


def test_split_at(kit: Kit) -> None:
    node = kit.insert("abcd", [1, 2, 3, 4], priority=3).node
    kit.insert("abcd", [1, 2, 3, 4])
    kit.tree.set_host(node, [11, 12, 13, 14])
    kit.tree.lock(node)
    kit.tree.protect_host(node)
    kit.tree.pin(node, 9)
    upper = kit.tree.split_at(node, kit.page_size)
    assert upper == kit.node("a")
    assert node == kit.node("abcd")
    assert kit.shape() == {"a": ([1], [11]), "abcd": ([2, 3, 4], [12, 13, 14])}
    above, under = kit.tree.node_info(upper), kit.tree.node_info(node)
    assert (above.parent, under.parent) == (ROOT, upper)
    for same in ("lock_ref", "hit_count", "priority", "access_time", "created_time", "loading", "backup_pending"):
        assert getattr(above, same) == getattr(under, same), same
    assert (above.hit_count, above.priority, above.access_time, above.created_time) == (2, 3, 2, 1)
    assert (above.host_ref, under.host_ref) == (0, 1)
    assert (above.pinned_until_ns, under.pinned_until_ns) == (None, 9)
    assert kit.counts() == (0, 4, 0, 4)


def test_split_at_keeps_the_children_below(kit: Kit) -> None:
    node = kit.insert("abcd", [1, 2, 3, 4]).node
    kit.insert("abcdx", [1, 2, 3, 4, 5])
    kit.insert("abcdy", [1, 2, 3, 4, 6])
    kit.tree.split_at(node, 2 * kit.page_size)
    assert kit.shape() == {
        "ab": ([1, 2], None), "abcd": ([3, 4], None), "abcdx": ([5], None), "abcdy": ([6], None)
    }  # fmt: skip


def test_split_at_where_it_cannot_be(kit: Kit) -> None:
    node = kit.insert("abc", [1, 2, 3]).node
    size = kit.page_size
    for at in (0, -size, 3 * size, 4 * size, 2**40):
        kit.refuses(InvalidArgumentError, kit.tree.split_at, node, at)
    if size > 1:
        kit.refuses(InvalidArgumentError, kit.tree.split_at, node, size + 1)
        kit.refuses(InvalidArgumentError, kit.tree.split_at, node, size - 1)
    kit.refuses(InvalidArgumentError, kit.tree.split_at, ROOT, size)


# --------------------------------------------------------------------------------------------------- delete, reset


def test_delete_returns_the_subtrees_pages_of_both_tiers(kit: Kit) -> None:
    kit.insert("a", [1])
    kit.insert("abc", [1, 2, 3])
    kit.tree.set_host(kit.node("abc"), [12, 13])
    kit.insert("abd", [1, 2, 4])
    kit.insert_host("abcz", [90, 91, 92, 14])
    gone = kit.tree.delete(kit.node("ab"))
    assert kit.pages(gone.num_tokens) == 3
    assert sorted(gone.page_ids.tolist()) == [2, 3, 4]
    assert gone.page_ids.tolist()[-1] == 2  # children left before their parent
    assert sorted(gone.host_page_ids.tolist()) == [12, 13, 14]
    assert gone.to_backup == []
    assert kit.shape() == {"a": ([1], None)}
    kit.tree.check_integrity(4, [2, 3, 4], 3, [12, 13, 14])


def test_delete_refuses_what_is_in_use(kit: Kit) -> None:
    kit.insert("ab", [1, 2])
    kit.insert("abc", [1, 2, 3])
    kit.insert("abd", [1, 2, 4])
    top = kit.node("ab")
    kit.tree.lock(kit.node("abc"))
    message = kit.refuses(LockError, kit.tree.delete, top)
    assert "2" in message  # abc and, through it, ab
    kit.tree.delete(kit.node("abd"))
    kit.tree.unlock(kit.node("abc"))
    kit.tree.set_host(kit.node("abc"), [13])
    kit.tree.protect_host(kit.node("abc"))
    assert "1" in kit.refuses(LockError, kit.tree.delete, top)
    kit.refuses(LockError, kit.tree.delete_namespace)
    kit.tree.release_host(kit.node("abc"))
    kit.tree.delete(top)
    assert len(kit.tree) == 0


def test_delete_refuses_loading_and_pending(kit: Kit) -> None:
    kit.insert_host("ab", [1, 2])
    kit.tree.set_device(kit.node("ab"), [1, 2], loading=True)
    kit.refuses(LockError, kit.tree.delete, kit.node("ab"))
    kit.tree.finish_load(kit.node("ab"))
    kit.insert("x", [3])
    (request,) = kit.evict(3, backup=True).to_backup
    kit.refuses(LockError, kit.tree.delete, request.node)
    kit.tree.finish_backup(request.node, None)
    assert set(kit.shape()) == {"ab"}


def test_delete_overrides_pins(kit: Kit) -> None:
    kit.insert("a", [1])
    kit.tree.pin(kit.insert("ab", [1, 2]).node, 99)
    kit.tree.delete(kit.node("ab"))
    assert kit.counts() == (1, 0, 0, 0)  # the path above is free again
    assert kit.tree.stats().pinned_nodes == 0
    assert kit.tree.expire(99) == 0


def test_delete_of_root(kit: Kit) -> None:
    kit.insert("a", [1])
    kit.refuses(InvalidArgumentError, kit.tree.delete, ROOT)


def test_delete_namespace(kit: Kit) -> None:
    kit.insert("ab", [1, 2], extra_key="x")
    kit.insert("ac", [1, 3], extra_key="x")
    kit.insert_host("d", [7], extra_key="x")
    kit.insert("ab", [4, 5])
    gone = kit.tree.delete_namespace("x")
    assert (sorted(gone.page_ids.tolist()), gone.host_page_ids.tolist()) == ([1, 2, 3], [7])
    assert kit.shape() == {"ab": ([4, 5], None)}
    for unknown in ("x", "y"):
        gone = kit.tree.delete_namespace(unknown)
        assert (gone.num_tokens, gone.page_ids.tolist(), gone.host_page_ids.tolist(), gone.to_backup) == (0, [], [], [])


def test_reset_drops_everything(kit: Kit) -> None:
    kit.insert("ab", [1, 2])
    kit.insert("abc", [1, 2, 3])
    kit.insert("q", [4], extra_key="x")
    kit.insert_host("h", [5])
    kit.tree.set_host(kit.node("ab"), [6, 7])
    kit.tree.protect_host(kit.node("h"))
    kit.tree.lock(kit.node("abc"))
    kit.tree.pin(kit.node("abc"), 9)
    handles = list(kit.tree)
    gone = kit.tree.reset()
    assert (kit.pages(gone.num_tokens), sorted(gone.page_ids.tolist())) == (4, [1, 2, 3, 4])
    assert sorted(gone.host_page_ids.tolist()) == [5, 6, 7]
    assert set(kit.tree.stats()._replace(memory_bytes=0)) == {0}
    for handle in handles:
        kit.refuses(HandleError, kit.tree.node_info, handle)
    kit.insert("ab", [1, 2])
    assert kit.info("ab").created_time == 1  # the clock restarts
    for handle in handles:
        kit.refuses(HandleError, kit.tree.lock, handle)
    assert kit.tree.expire(99) == 0


def test_reset_ends_backups_in_flight(kit: Kit) -> None:
    kit.insert("ab", [1, 2])
    (request,) = kit.evict(2, backup=True).to_backup
    assert sorted(kit.tree.reset().page_ids.tolist()) == [1, 2]
    kit.refuses(HandleError, kit.tree.finish_backup, request.node, [5, 6])


def test_reset_of_an_empty_tree(kit: Kit) -> None:
    gone = kit.tree.reset()
    assert (gone.num_tokens, gone.page_ids.tolist(), gone.host_page_ids.tolist()) == (0, [], [])


# ----------------------------------------------------------------------------------------------------------- inspection


def test_dump_is_ordered(kit: Kit) -> None:
    for at, extra in ((0, "z"), (10, None)):
        kit.insert("cx", [at, at + 1], extra_key=extra)
        kit.insert("ab", [at + 2, at + 3], extra_key=extra)
        kit.insert("cb", [at, at + 4], extra_key=extra)
        kit.insert("cba", [at, at + 4, at + 5], extra_key=extra)
    paths = kit.paths()
    listed = [(info.namespace, paths[info.node]) for info in kit.tree.dump()]
    order = ["ab", "c", "cb", "cba", "cx"]  # depth first
    assert listed == [(namespace, path) for namespace in (b"", encode_namespace("z")) for path in order]
    assert [info.node for info in kit.tree.dump()] == list(kit.tree)
    assert len(kit.tree) == 10


def test_dump_orders_tokens_as_numbers(kit: Kit) -> None:
    size = kit.page_size
    for at, token in enumerate((5, -1, 2**31 - 1, 0, -(2**31))):
        kit.tree.insert([token] * size, [at])
    assert [info.tokens[0] for info in kit.tree.dump()] == [-(2**31), -1, 0, 5, 2**31 - 1]


def test_node_info_of_root_is_refused(kit: Kit) -> None:
    kit.refuses(InvalidArgumentError, kit.tree.node_info, ROOT)


def test_infos_are_snapshots(kit: Kit) -> None:
    node = kit.insert("ab", [1, 2]).node
    info = kit.tree.node_info(node)
    info.tokens[:] = 0
    info.page_ids[:] = 0
    kit.match("a")
    assert (len(info.tokens), lists(info.page_ids)) == (2 * kit.page_size, [0, 0])
    assert kit.match("ab").page_ids().tolist() == [1, 2]
    assert kit.tree.node_info(node).parent == kit.node("a")


def test_iteration_survives_changes(kit: Kit) -> None:
    for at, letter in enumerate("abc"):
        kit.insert(letter, [at])
    for node in kit.tree:
        kit.tree.delete(node)
    assert len(kit.tree) == 0


def test_to_dot_has_a_box_and_an_edge_a_node(kit: Kit) -> None:
    kit.insert("abcd", [1, 2, 3, 4])
    kit.insert("abxy", [1, 2, 5, 6])
    kit.insert_host("z", [1], extra_key='quote " and \\')
    kit.tree.lock(kit.node("abxy"))
    dot = kit.tree.to_dot()
    assert dot.lstrip().startswith("digraph")
    assert dot.rstrip().endswith("}")
    assert dot.count("->") == 4
    assert dot.count("{") == dot.count("}")
    for word in ("device", "host", "lock", "hits"):
        assert word in dot


def test_handles_are_not_reused(kit: Kit) -> None:
    seen: set[int] = set()
    for _ in range(50):
        node = kit.insert("a", [1]).node
        assert node not in seen
        assert 0 < node < 2**64
        seen.add(node)
        kit.evict(1)
    for node in seen:
        kit.refuses(HandleError, kit.tree.node_info, node)


def test_a_deep_tree(make) -> None:
    """Nothing may recurse along the depth: a chain of more nodes than Python has stack."""
    kit = make(events=True)
    size, depth = kit.page_size, 1500
    key = np.arange(depth * size, dtype=np.int32)
    ids = np.arange(depth, dtype=np.int32)
    for pages in range(1, depth + 1):
        result = kit.tree.insert(key[: pages * size], ids[:pages]) if pages % 50 == 0 else None
    kit.tree.check_integrity()
    for at in range(depth - 1, 0, -1):
        kit.tree.match(key[: at * size])
    assert len(kit.tree) == depth
    kit.tree.check_integrity(depth, [])
    assert kit.pages(kit.tree.lock(result.node)) == -depth
    assert kit.pages(kit.tree.unlock(result.node)) == depth
    assert len(kit.tree.dump()) == depth
    assert kit.tree.to_dot().count("->") == depth
    assert len(kit.tree.page_keys(result.node)) == 1
    assert kit.evict(depth // 2).page_ids.tolist() == list(range(depth - 1, depth - 1 - depth // 2, -1))
    (top,) = [info.node for info in kit.tree.dump() if info.parent == ROOT]
    assert kit.pages(kit.tree.delete(top).num_tokens) == depth - depth // 2
