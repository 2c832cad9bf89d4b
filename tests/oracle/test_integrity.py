"""check_integrity of the reference finds planted corruption, each kind by its message; capacity, for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from radixkv.errors import ArgumentTypeError, IntegrityError, InvalidArgumentError
from radixkv.tree.reference import ReferenceTree
from radixkv.tree.reference_node import Node
from tests.oracle.kit import Kit


def grown() -> Kit:
    """A tree with something of everything: namespaces, both tiers, locks, pins, a split load and a split backup."""
    kit = Kit(ReferenceTree, 2, events=True)
    kit.insert("ab", [1, 2])
    kit.insert("abcd", [1, 2, 3, 4], priority=2)
    kit.insert("abx", [1, 2, 5])
    kit.tree.set_host(kit.node("abcd"), [13, 14])
    kit.insert_host("abcde", [90, 91, 13, 14, 15])
    kit.tree.protect_host(kit.node("abcde"))
    kit.tree.lock(kit.node("abx"))
    kit.insert("p", [6], extra_key="x")
    kit.tree.pin(kit.node("p", b"s\x01" + bytes(7) + b"xn"), 50)
    kit.insert_host("lmn", [16, 17, 18])
    kit.tree.set_device(kit.node("lmn"), [7, 8, 9], loading=True)
    kit.match("l")
    kit.insert("qrs", [10, 11, 12])
    kit.insert("wv", [20, 21])
    kit.tree.lock(kit.node("wv"))
    kit.tree.pin(kit.node("abcd"), 60)
    assert [request.page_ids.tolist() for request in kit.evict(1, backup=True).to_backup] == [[10, 11, 12]]
    kit.match("q")
    kit.tree.check_integrity(14, [], 6, [])
    return kit


def at(kit: Kit, letters: str) -> Node:
    return kit.tree._node(kit.node(letters))


def add(field: str, change: int, letters: str = "abcd") -> Callable[[Kit], None]:
    def corrupt(kit: Kit) -> None:
        node = at(kit, letters)
        setattr(node, field, getattr(node, field) + change)

    return corrupt


def put(field: str, value: Any, letters: str = "abcd") -> Callable[[Kit], None]:
    return lambda kit: setattr(at(kit, letters), field, value)


def empty_root(kit: Kit) -> None:
    kit.tree._roots[b"empty"] = Node(0, b"empty", None, ())


def wrong_root(kit: Kit) -> None:
    kit.tree._roots[b"other"] = kit.tree._roots.pop(b"")


def root_with_pages(kit: Kit) -> None:
    kit.tree._roots[b""].pages = []


def wrong_parent(kit: Kit) -> None:
    at(kit, "abx").parent = at(kit, "abcd")


def wrong_child_key(kit: Kit) -> None:
    children = at(kit, "ab").children
    first, second = children
    children[first], children[second] = children[second], children[first]


def reached_twice(kit: Kit) -> None:
    at(kit, "abcd").children[(1, 2)] = at(kit, "abx")


def lost_handle(kit: Kit) -> None:
    kit.tree._handles.retire(at(kit, "abx"))


def leaked_handle(kit: Kit) -> None:
    kit.tree._handles.issue(Node(0, b"", None, (1, 2)))


def swapped_handles(kit: Kit) -> None:
    one, two = at(kit, "abx"), at(kit, "abcd")
    one.handle, two.handle = two.handle, one.handle


def unlinked(kit: Kit) -> None:
    del at(kit, "ab").children[at(kit, "abx").tokens]


def page_twice(kit: Kit) -> None:
    at(kit, "abx").pages[0] = 1


def page_not_in_the_books(kit: Kit) -> None:
    at(kit, "abx").pages[0] = 77


def books_with_a_page_too_many(kit: Kit) -> None:
    kit.tree._device_ids.add(77)


def host_page_twice(kit: Kit) -> None:
    at(kit, "abcd").host_pages[0] = 15


def negative_page(kit: Kit) -> None:
    at(kit, "abx").pages[0] = -1
    kit.tree._device_ids ^= {-1, 5}


def host_book_lost(kit: Kit) -> None:
    kit.tree._host_ids.discard(15)


def host_only_locked(kit: Kit) -> None:
    for letters in ("abcde", "abcd", "ab"):
        at(kit, letters).lock_ref += 1


def pinned_host_only(kit: Kit) -> None:
    at(kit, "abcde").pin_until = 5
    for letters in ("abcde", "abcd", "ab"):
        at(kit, letters).pin_ref += 1


def device_below_host_only(kit: Kit) -> None:
    kit.tree.unpin(kit.node("abcd"))
    kit.tree._device_ids.add(77)
    at(kit, "abcde").pages = [77]
    node = at(kit, "abcd")
    kit.tree._device_ids -= set(node.pages)
    node.pages = None


def loading_and_pending(kit: Kit) -> None:
    at(kit, "qrs").loading = True
    for letters in ("q", "qrs"):
        at(kit, letters).pin_ref += 1


def cut_inside_a_page(kit: Kit) -> None:
    at(kit, "abcd").tokens = at(kit, "abcd").tokens[:3]


def wrong_digest(kit: Kit) -> None:
    at(kit, "abcd").digests[-1] ^= 1


def digests_below_none(kit: Kit) -> None:
    at(kit, "ab").digests = None


def too_many_events(kit: Kit) -> None:
    kit.tree._max_events = 2


def clock_back(kit: Kit) -> None:
    kit.tree._clock -= 1


CORRUPTIONS: list[tuple[Callable[[Kit], None], str]] = [
    (empty_root, "empty but not freed"),
    (wrong_root, "is not a root"),
    (root_with_pages, "has pages"),
    (wrong_parent, "does not point to its parent"),
    (wrong_child_key, "not filed by its first page"),
    (reached_twice, "does not point to its parent|reached twice"),
    (put("namespace", b"other", "abx"), "another namespace"),
    (lost_handle, "handles are alive"),
    (leaked_handle, "handles are alive"),
    (swapped_handles, "names another node"),
    (unlinked, "handles are alive"),
    (put("tokens", (7, 98, 7, 99), "abcd"), "not filed by its first page"),
    (cut_inside_a_page, "has 3 tokens"),
    (put("pages", None, "abx"), "on neither tier"),
    (put("pages", [3], "abcd"), "1 device page ids for 2 pages"),
    (put("host_pages", [13, 14, 15], "abcd"), "3 host page ids for 2 pages"),
    (device_below_host_only, "below a host-only parent"),
    (add("lock_ref", +1, "abx"), "its children"),
    (add("lock_ref", -1, "ab"), "its children"),
    (host_only_locked, "host-only with lock_ref"),
    (add("host_ref", -2, "abcde"), "has host_ref -1"),
    (add("host_ref", +1, "abx"), "no host copy"),
    (add("pin_ref", +1, "ab"), "pins and loads on it or below"),
    (add("pin_ref", -1, "lmn"), "pins and loads on it or below"),
    (put("pin_until", None, "abcd"), "pins and loads on it or below"),
    (put("pin_until", 3, "abx"), "pins and loads on it or below"),
    (pinned_host_only, "but host-only"),
    (put("hit_count", -1), "hit_count"),
    (put("created_time", 0), "was created at 0"),
    (put("created_time", 99), "was created at 99"),
    (put("access_time", 99), "used at 99"),
    (clock_back, "now is"),
    (put("access_time", 1, "ab"), "its parent at 1"),
    (put("priority", 7, "abx"), "has priority 7"),
    (wrong_digest, "digests"),
    (digests_below_none, "its parent has none"),
    (loading_and_pending, "loading and pending at once"),
    (put("pending", True, "abcd"), "pending, but not only on the device"),
    (put("is_job_part", True, "abx"), "part of no job"),
    (put("job_pages_above", 1, "abx"), "a job that it does not have"),
    (put("job_pages_above", 0, "qrs"), "is part of a job that no node below has"),
    (put("job_pages_above", 2, "qrs"), "ends inside a node"),
    (put("is_job_part", False, "q"), "is not part of the job"),
    (put("pending", False, "q"), "part of no job"),
    (page_twice, "owned twice"),
    (page_not_in_the_books, "the books say"),
    (books_with_a_page_too_many, "the books say"),
    (host_page_twice, "owned twice"),
    (host_book_lost, "the books say"),
    (negative_page, "is negative"),
    (too_many_events, "events are queued"),
]


@pytest.mark.parametrize("number", range(len(CORRUPTIONS)))
def test_planted_corruption_is_found(number: int) -> None:
    corrupt, message = CORRUPTIONS[number]
    kit = grown()
    corrupt(kit)
    with pytest.raises(IntegrityError, match=message):
        kit.tree.check_integrity()


def test_free_pages_and_capacity(make: Callable[..., Kit]) -> None:
    kit = make()
    tree = kit.tree
    kit.insert("ab", [1, 3])
    kit.insert_host("x", [2])
    for good in (
        (), (5, [0, 2, 4]), (2, []), (2,), (None, None, 4, [0, 1, 3]), (5, [0, 2, 4], 4, [0, 1, 3]),
        (5, [100, 200, 300]), (None, None, 1, None),
    ):  # fmt: skip
        tree.check_integrity(*good)
    for bad in (
        (5, [0, 2]), (5, [0, 2, 4, 6]), (5,), (0, []), (5, [0, 2, -4]), (5, [0, 2, 3]), (5, [0, 2, 2]),
        (None, None, 4, [0, 1]), (None, None, 4, [0, 1, 2]), (None, None, 5, [0, 1, 3, 3]),
        (5, [0, 2, 4], 4, []),
    ):  # fmt: skip
        with pytest.raises(IntegrityError):
            tree.check_integrity(*bad)
    for pair in ((None, [0]), (None, []), (None, None, None, [0])):
        with pytest.raises(InvalidArgumentError):
            tree.check_integrity(*pair)
    with pytest.raises(InvalidArgumentError):
        tree.check_integrity(-1)
    with pytest.raises(ArgumentTypeError):
        tree.check_integrity("5")
