"""The contract of base.py, sentence by sentence: marks, the nodes of a path, what is due, what loads, and what the host
could free."""

from __future__ import annotations

from typing import Any

import pytest

from radixkv import RadixTree
from radixkv.errors import ArgumentTypeError, HandleError, InvalidArgumentError
from radixkv.types import ROOT
from tests.oracle.kit import Kit


def chain(kit: Kit, *ends: str, host: bool = False) -> None:
    """Nodes that end at these prefixes of one key, shortest first, with pages 1, 2, ... (host: host-only ones)."""
    for end in ends:
        ids = list(range(1, len(end) + 1))
        kit.insert_host(end, ids) if host else kit.insert(end, ids)


def named(kit: Kit, nodes: list[int]) -> list[str]:
    paths = kit.paths()
    return [paths[node] for node in nodes]


def marks(kit: Kit) -> dict[str, int]:
    return {path: kit.info(path).marks for path in kit.shape()}


# ---------------------------------------------------------------------------------------------------------------- marks


def test_a_new_node_has_no_marks_and_mark_sets_and_clears(kit: Kit) -> None:
    chain(kit, "ab", "abc")
    assert marks(kit) == {"ab": 0, "abc": 0}
    node = kit.node("abc")
    assert kit.tree.mark(node, set=5) is None
    kit.tree.mark(node, 2, 1)
    assert marks(kit) == {"ab": 0, "abc": 6}
    kit.tree.mark(node)
    assert marks(kit) == {"ab": 0, "abc": 6}
    kit.tree.mark(node, set=255)
    kit.tree.mark(node, clear=127)
    assert marks(kit) == {"ab": 0, "abc": 128}


def test_a_split_copies_the_marks_to_both_parts(kit: Kit) -> None:
    kit.insert("abcd", [1, 2, 3, 4])
    kit.tree.mark(kit.node("abcd"), set=0x81)
    kit.match("ab")
    kit.tree.split_at(kit.node("abcd"), kit.page_size)
    assert marks(kit) == {"ab": 0x81, "abc": 0x81, "abcd": 0x81}
    kit.tree.mark(kit.node("abc"), clear=0x80)
    assert marks(kit) == {"ab": 0x81, "abc": 1, "abcd": 0x81}


def test_nothing_but_mark_changes_marks(kit: Kit) -> None:
    kit.insert("ab", [1, 2])
    node = kit.node("ab")
    kit.tree.mark(node, set=7)
    kit.tree.lock(node)
    kit.tree.unlock(node)
    kit.tree.set_host(node, [8, 9])
    kit.evict(2)  # host-only
    kit.tree.protect_host(node)
    kit.tree.release_host(node)
    kit.tree.set_device(node, [3, 4], loading=True)
    kit.tree.finish_load(node, success=False)
    kit.insert("abc", [5, 6, 7])  # adopted
    kit.match("ab")
    assert marks(kit) == {"ab": 7, "abc": 0}
    pending = kit.evict(1, backup=True).to_backup[0].node
    kit.tree.mark(pending, set=1)
    kit.tree.finish_backup(pending, [10])
    assert marks(kit) == {"ab": 7, "abc": 1}


def test_marks_leave_with_the_node(kit: Kit) -> None:
    kit.insert("a", [1])
    kit.tree.mark(kit.node("a"), set=255)
    kit.evict(1)
    kit.insert("a", [1])
    assert marks(kit) == {"a": 0}
    kit.tree.mark(kit.node("a"), set=255)
    kit.tree.reset()
    kit.insert("a", [1])
    assert marks(kit) == {"a": 0}


def test_a_mark_for_pages_covers_what_a_node_was_split_into(kit: Kit) -> None:
    kit.insert("abcde", [1, 2, 3, 4, 5])
    node = kit.node("abcde")
    kit.match("abc")
    kit.match("ab")
    kit.insert("abcxy", [1, 2, 3, 6, 7])
    kit.tree.mark(node, set=1, num_pages=5)
    assert marks(kit) == {"ab": 1, "abc": 1, "abcde": 1, "abcxy": 0}
    kit.tree.mark(node, set=2, clear=1, num_pages=3)
    assert marks(kit) == {"ab": 1, "abc": 2, "abcde": 2, "abcxy": 0}
    kit.tree.mark(node, clear=2, num_pages=2)
    assert marks(kit) == {"ab": 1, "abc": 2, "abcde": 0, "abcxy": 0}


def test_mark_refuses_pages_that_do_not_end_at_a_node(kit: Kit) -> None:
    chain(kit, "ab", "abcde")
    node = kit.node("abcde")
    for pages in (1, 2, 4):
        message = kit.refuses(InvalidArgumentError, kit.tree.mark, node, 1, 0, pages)
        assert f"{pages} pages" in message
        assert f"{node:#x}" in message
    assert "6 pages" in kit.refuses(InvalidArgumentError, kit.tree.mark, node, 1, 0, 6)
    for pages in (0, -1, 1 << 62):
        kit.refuses(InvalidArgumentError, kit.tree.mark, node, 1, 0, pages)


def test_mark_refuses_what_is_no_mask_and_no_node(kit: Kit) -> None:
    kit.insert("ab", [1, 2])
    node = kit.node("ab")
    for masks in ((256, 0), (0, 256), (-1, 0), (0, -1), (1 << 40, 0), (1 << 70, 0)):
        kit.refuses(InvalidArgumentError, kit.tree.mark, node, *masks)
    assert "0x2" in kit.refuses(InvalidArgumentError, kit.tree.mark, node, 3, 6)
    for masks in (("1", 0), (0, None), (1.0, 0)):
        kit.refuses(ArgumentTypeError, kit.tree.mark, node, *masks)
    kit.refuses(InvalidArgumentError, kit.tree.mark, ROOT, 1)
    kit.refuses(HandleError, kit.tree.mark, node + 1, 1)
    kit.refuses(ArgumentTypeError, kit.tree.mark, "node", 1)


def test_the_root_of_another_path_is_not_marked(kit: Kit) -> None:
    kit.insert("ab", [1, 2])
    kit.insert("ab", [3, 4], extra_key="x")
    for info in kit.tree.dump():
        if info.namespace:
            kit.tree.mark(info.node, set=4, num_pages=2)
    assert [(info.namespace == b"", info.marks) for info in kit.tree.dump()] == [(True, 0), (False, 4)]


def test_marks_show_in_to_dot(kit: Kit) -> None:
    kit.insert("a", [1])
    assert "marks" not in kit.tree.to_dot()
    kit.tree.mark(kit.node("a"), set=0x0A)
    assert "marks 0x0a" in kit.tree.to_dot()


# ---------------------------------------------------------------------------------------------------------------- paths


def test_path_is_the_nodes_root_side_first(kit: Kit) -> None:
    chain(kit, "a", "abc", "abcd")
    kit.insert("ax", [1, 9])
    assert named(kit, kit.tree.path(kit.node("abcd"))) == ["a", "abc", "abcd"]
    assert named(kit, kit.tree.path(kit.node("ax"))) == ["a", "ax"]
    assert named(kit, kit.tree.path(kit.node("a"))) == ["a"]
    assert kit.tree.path(ROOT) == []
    assert kit.tree.host_path(kit.node("abcd")) == kit.tree.host_path(ROOT) == []


def test_host_path_is_the_host_only_tail(kit: Kit) -> None:
    chain(kit, "a", "ab", "abc", "abcd")
    for end in ("a", "ab", "abc", "abcd"):
        kit.tree.set_host(kit.node(end), [len(end)])
    kit.evict(2)
    assert named(kit, kit.tree.host_path(kit.node("abcd"))) == ["abc", "abcd"]
    assert named(kit, kit.tree.host_path(kit.node("abc"))) == ["abc"]
    assert kit.tree.host_path(kit.node("ab")) == []
    kit.evict(2)
    assert named(kit, kit.tree.host_path(kit.node("abcd"))) == ["a", "ab", "abc", "abcd"]
    assert kit.tree.host_path(kit.node("abcd")) == kit.tree.path(kit.node("abcd"))


@pytest.mark.parametrize("depth", [63, 64, 65, 300])
def test_a_path_of_any_depth(make, depth: int) -> None:
    kit = make()
    letters = "".join(chr(ord("a") + at % 26) for at in range(depth))
    kit.insert(letters, list(range(depth)))
    node = kit.node(letters)
    for _ in range(depth - 1):  # cut the upper part of the last node off, again and again
        kit.tree.split_at(node, kit.page_size)
    path = kit.tree.path(node)
    assert [kit.pages(kit.tree.node_info(part).path_tokens) for part in path] == list(range(1, depth + 1))
    assert kit.tree.due(node, "host", 1) == path
    assert kit.tree.due(node, "host", 2) == []
    kit.tree.mark(node, set=1, num_pages=depth - 1)
    assert kit.tree.due(node, "host", 1, without_marks=1) == path[:1]
    kit.tree.set_host(node, list(range(depth)))
    kit.evict(depth)
    assert kit.tree.host_path(node) == path
    assert kit.tree.due(node, "storage", 1) == path


# ------------------------------------------------------------------------------------------------------------------ due


def test_due_for_the_host(kit: Kit) -> None:
    chain(kit, "a", "ab", "abc", "abcd")  # hits 4 3 2 1
    node = kit.node("abcd")
    assert named(kit, kit.tree.due(node, "host", 1)) == ["a", "ab", "abc", "abcd"]
    assert named(kit, kit.tree.due(node, "host", 3)) == ["a", "ab"]
    assert kit.tree.due(node, "host", 5) == kit.tree.due(node, "host", 1 << 40) == []
    assert named(kit, kit.tree.due(kit.node("ab"), "host", 0)) == ["a", "ab"]
    kit.tree.set_host(kit.node("ab"), [2])
    kit.tree.mark(kit.node("a"), set=1)
    assert named(kit, kit.tree.due(node, "host", 1)) == ["a", "abc", "abcd"]
    assert named(kit, kit.tree.due(node, "host", 1, without_marks=1)) == ["abc", "abcd"]
    assert named(kit, kit.tree.due(node, "host", 1, 2)) == ["a", "abc", "abcd"]
    kit.evict(1, backup=True)  # abcd is pending
    assert named(kit, kit.tree.due(node, "host", 1, 255)) == ["abc"]


def test_what_is_on_the_host_only_or_loading_is_not_due_for_the_host(kit: Kit) -> None:
    chain(kit, "a", "ab")
    for end in ("a", "ab"):
        kit.tree.set_host(kit.node(end), [len(end)])
    kit.evict(2)
    assert kit.tree.due(kit.node("ab"), "host", 0) == []
    kit.tree.set_device(kit.node("a"), [7], loading=True)
    assert kit.tree.due(kit.node("ab"), "host", 0) == []
    assert named(kit, kit.tree.due(kit.node("ab"), "storage", 0)) == ["a", "ab"]


def test_due_for_the_storage(kit: Kit) -> None:
    chain(kit, "a", "ab", "abc")
    node = kit.node("abc")
    assert kit.tree.due(node, "storage", 0) == []
    kit.tree.set_host(kit.node("a"), [1])
    kit.tree.set_host(node, [3])
    assert named(kit, kit.tree.due(node, "storage", 1)) == ["a", "abc"]
    assert named(kit, kit.tree.due(node, "storage", 2)) == ["a"]
    kit.tree.mark(kit.node("a"), set=6)
    assert named(kit, kit.tree.due(node, "storage", 1, 2)) == named(kit, kit.tree.due(node, "storage", 1, 6)) == ["abc"]
    assert named(kit, kit.tree.due(node, "storage", 1, 1)) == ["a", "abc"]
    kit.insert_host("abcd", [11, 12, 13, 14])  # prefetched: no hit yet
    assert named(kit, kit.tree.due(kit.node("abcd"), "storage", 0, 2)) == ["abc", "abcd"]
    assert named(kit, kit.tree.due(kit.node("abcd"), "storage", 1, 2)) == ["abc"]


def test_what_asks_refuses_and_changes_nothing(kit: Kit) -> None:
    chain(kit, "a", "ab")
    node = kit.node("ab")
    before = kit.snapshot()
    kit.tree.path(node), kit.tree.host_path(node), kit.tree.due(node, "host", 0)
    assert kit.snapshot() == before
    assert kit.tree.due(ROOT, "host", 0) == kit.tree.due(ROOT, "storage", 0) == []
    kit.refuses(InvalidArgumentError, kit.tree.due, node, "device", 0)
    kit.refuses(InvalidArgumentError, kit.tree.due, node, None, 0)
    kit.refuses(InvalidArgumentError, kit.tree.due, node, "host", -1)
    kit.refuses(InvalidArgumentError, kit.tree.due, node, "host", 0, 256)
    kit.refuses(InvalidArgumentError, kit.tree.due, node, "host", 0, -1)
    kit.refuses(ArgumentTypeError, kit.tree.due, node, "host", "1")
    for ask in (kit.tree.path, kit.tree.host_path, lambda wrong: kit.tree.due(wrong, "host", 0)):
        kit.refuses(HandleError, ask, node ^ 1 << 32)
        kit.refuses(HandleError, ask, 1 << 70)
        kit.refuses(ArgumentTypeError, ask, None)
    kit.tree.delete(node)
    kit.refuses(HandleError, kit.tree.path, node)


# ------------------------------------------------------------------------------------------------------ what is loading


def loaded(kit: Kit) -> Kit:
    """abcd, of which bc is being loaded and d was inserted below it."""
    kit.insert("a", [1])
    kit.insert_host("abc", [1, 2, 3])
    kit.tree.set_device(kit.node("abc"), [2, 3], loading=True)
    kit.insert("abcd", [1, 2, 3, 4])
    return kit


def test_a_match_counts_what_is_loading(kit: Kit) -> None:
    loaded(kit)
    hits = {"a": 0, "abcd": 2, "abcdx": 2, "x": 0, "": 0}
    for key, pages in hits.items():
        assert kit.pages(kit.match(key).loading_tokens) == kit.pages(kit.peek(key).loading_tokens) == pages, key
    assert kit.pages(kit.peek("ab").loading_tokens) == 1  # peek ends inside the node
    assert kit.pages(kit.tree.stats().loading_tokens) == 2
    hit = kit.match("ab")  # match splits it
    assert kit.pages(hit.loading_tokens) == 1
    assert kit.pages(kit.tree.match_extend(hit, kit.key("cd")).loading_tokens) == 2
    assert kit.pages(kit.tree.stats().loading_tokens) == 2
    kit.tree.finish_load(kit.node("abc"))
    assert kit.match("abcd").loading_tokens == kit.tree.stats().loading_tokens == 0
    assert kit.pages(hit.loading_tokens) == 1  # a snapshot


def test_a_failed_load_is_no_longer_loading(kit: Kit) -> None:
    kit.insert_host("ab", [1, 2])
    kit.tree.set_device(kit.node("ab"), [5, 6], loading=True)
    kit.match("a")
    kit.tree.finish_load(kit.node("ab"), success=False)
    assert kit.tree.stats().loading_tokens == kit.match("ab").loading_tokens == 0
    kit.tree.set_device(kit.node("a"), [5])
    assert kit.tree.stats().loading_tokens == kit.match("ab").loading_tokens == 0
    kit.tree.set_device(kit.node("ab"), [6], loading=True)
    kit.tree.reset()
    assert kit.tree.stats().loading_tokens == 0


# ------------------------------------------------------------------------------------------- what could leave the host


def host_free(kit: Kit) -> int:
    return kit.pages(kit.tree.stats().host_evictable_tokens)


def test_host_evictable_is_what_evict_host_would_free(kit: Kit) -> None:
    chain(kit, "ab", "abc")
    assert host_free(kit) == 0
    kit.tree.set_host(kit.node("abc"), [3])
    assert host_free(kit) == 0  # it is on the device too
    kit.evict(1)
    assert host_free(kit) == 1
    kit.tree.set_host(kit.node("ab"), [1, 2])
    kit.evict(2)
    kit.insert_host("abcde", [11, 12, 13, 14, 15])
    kit.insert_host("xy", [21, 22])
    assert host_free(kit) == 7
    kit.match("abcd")
    assert host_free(kit) == 7
    kit.tree.protect_host(kit.node("abcd"))
    kit.tree.protect_host(kit.node("abcd"))
    assert host_free(kit) == 3  # e, and xy: what is above a protected node stays for its sake
    kit.tree.release_host(kit.node("abcd"))
    assert host_free(kit) == 3
    kit.tree.set_device(kit.node("ab"), [1, 2])
    assert host_free(kit) == 3
    kit.tree.release_host(kit.node("abcd"))
    assert host_free(kit) == 5
    assert kit.pages(kit.evict_host(100).num_tokens) == 5
    assert host_free(kit) == 0
    kit.evict(2)
    assert host_free(kit) == 2
    kit.tree.delete(kit.node("ab"))
    assert host_free(kit) == 0


def test_a_backup_that_ends_makes_host_pages_evictable(kit: Kit) -> None:
    kit.insert("abcd", [1, 2, 3, 4])
    kit.evict(4, backup=True)
    kit.match("ab")
    assert host_free(kit) == 0
    kit.tree.finish_backup(kit.node("abcd"), [5, 6, 7, 8])
    assert host_free(kit) == 4
    kit.tree.protect_host(kit.node("ab"))
    assert host_free(kit) == 2
    kit.tree.reset()
    assert host_free(kit) == 0


# ---- begin_write, host_pages -----------------------------------------------------------------------------------------
def test_begin_write_locks_and_marks_what_lacks_a_host_copy(kit: Kit) -> None:
    kit.insert("ab", [1, 2])
    node = kit.node("ab")
    pages = kit.tree.begin_write(node, 1)
    assert pages.tolist() == [1, 2]
    assert pages.dtype == "int32"
    assert (kit.info("ab").lock_ref, kit.info("ab").marks) == (1, 1)
    assert kit.tree.begin_write(node, 1) is None  # it has the mark
    kit.tree.mark(node, clear=1)
    kit.tree.set_host(node, [7, 8])
    assert kit.tree.begin_write(node, 1) is None  # it has a host copy
    assert (kit.info("ab").lock_ref, kit.info("ab").marks) == (1, 0)
    kit.tree.unlock(node)
    kit.tree.evict(2 * kit.page_size)
    assert kit.tree.begin_write(node, 1) is None  # it is not on the device
    with pytest.raises(InvalidArgumentError):
        kit.tree.begin_write(ROOT, 1)
    with pytest.raises(InvalidArgumentError):
        kit.tree.begin_write(node, 256)


def test_begin_writes_begins_what_is_due_on_a_path(kit: Kit) -> None:
    chain(kit, "ab", "abc", "abcd")
    kit.tree.set_host(kit.node("ab"), [7, 8])
    node = kit.node("abcd")
    assert kit.tree.begin_writes(node, 99, 1) == []
    begun = kit.tree.begin_writes(node, 1, 1)
    assert [part for part, _ in begun] == [kit.node("abc"), node]
    assert [pages.tolist() for _, pages in begun] == [[3], [4]]
    assert kit.tree.begin_writes(ROOT, 1, 1) == []
    assert [(kit.info(key).lock_ref, kit.info(key).marks) for key in ("ab", "abc", "abcd")] == [(2, 0), (2, 1), (1, 1)]
    assert kit.tree.begin_writes(node, 1, 1) == []  # all are marked
    with pytest.raises(InvalidArgumentError):
        kit.tree.begin_writes(node, -1, 1)


def test_begin_writes_of_a_path_deeper_than_it_takes_at_once(kit: Kit) -> None:
    key = "".join(chr(ord("a") + at % 26) for at in range(80))
    node = kit.insert(key, list(range(80))).node
    for left in range(79, 0, -1):
        node = kit.tree.split_at(node, left * kit.page_size)
    begun = kit.tree.begin_writes(kit.match(key).device_node, 1, 1)
    assert [pages.tolist() for _, pages in begun] == [[page] for page in range(80)]


def test_begin_writes_without_memory_leaves_all_as_it_was() -> None:
    class Failing(RadixTree):
        def begin_write(self, node: int, marks: int) -> Any:
            if self.node_info(node).page_ids[0] == 70:
                raise MemoryError("no memory for the pages")
            return super().begin_write(node, marks)

    tree, tokens = Failing(page_size=1), list(range(80))
    node = tree.insert(tokens, list(range(80))).node
    for left in range(79, 0, -1):
        node = tree.split_at(node, left)
    with pytest.raises(MemoryError):
        tree.begin_writes(tree.match(tokens).device_node, 1, 1)
    assert all(tree.node_info(part).marks == 0 for part in tree)
    assert tree.stats().evictable_tokens == 80


def test_host_pages_are_those_of_node_info(kit: Kit) -> None:
    chain(kit, "ab", "abc")
    above, node = kit.node("ab"), kit.node("abc")
    assert kit.tree.host_pages(node) == (above, None)
    kit.tree.set_host(node, [7, 8, 9])
    parent, pages = kit.tree.host_pages(node)
    assert (parent, pages.tolist()) == (above, [9])
    parent, pages = kit.tree.host_pages(above)
    assert (parent, pages.tolist()) == (ROOT, [7, 8])
    with pytest.raises(InvalidArgumentError):
        kit.tree.host_pages(ROOT)
