"""The contract of the multi-holder index (radixkv/tree/index_base.py), over the reference and the fast one."""

from __future__ import annotations

import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from radixkv.errors import ArgumentTypeError, HandleError, InvalidArgumentError
from radixkv.tree.index_base import PrefixIndexBase
from radixkv.tree.prefix_index import PrefixIndex
from radixkv.tree.reference_index import ReferencePrefixIndex

BIG = (1 << 64) - 1


@pytest.fixture(params=[ReferencePrefixIndex, PrefixIndex], ids=["reference", "fast"])
def make(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return request.param


@pytest.fixture
def index(make: Callable[..., Any]) -> Any:
    ix = make()
    yield ix
    ix.check_integrity()


def unchanged(index: Any, call: Callable[[], object], error: type[Exception]) -> None:
    """The call raises, and no page, holder or worker is other than before."""
    before = index.dump(), index.workers(), index.stats()[:4]
    with pytest.raises(error):
        call()
    index.check_integrity()
    assert (index.dump(), index.workers(), index.stats()[:4]) == before


# ----------------------------------------------------------------------------------------------------------- find


def test_implements_the_base(index: Any) -> None:
    assert isinstance(index, PrefixIndexBase)


def test_nothing_is_found_in_an_empty_index(index: Any) -> None:
    assert index.find([]) == {}
    assert index.find([1, 2]) == {}
    assert index.find([1], nodes=True) == ({}, [])
    assert index.stats()[:5] == (0, 0, 0, 0, 0)
    assert index.dump() == {}
    assert index.workers() == []


def test_counts_are_leading_pages(index: Any) -> None:
    assert index.insert(7, [1, 2, 3]) == 3
    assert index.insert(8, [1, 2, 4]) == 3
    assert index.insert(8, [1, 2, 4]) == 0
    assert index.find([1, 2, 3, 9]) == {7: 3, 8: 2}
    assert index.find([1, 2, 4]) == {7: 2, 8: 3}
    assert index.find([1]) == {7: 1, 8: 1}
    assert index.find([2, 3]) == {}  # known, but not at the start of a prefix
    assert index.find([9, 1]) == {}
    assert index.stats()[:4] == (4, 6, 0, 2)


def test_a_key_out_of_its_chain_ends_the_walk(index: Any) -> None:
    index.insert(1, [1, 2, 3])
    assert index.find([1, 3]) == {1: 1}
    assert index.find([1, 2, 1]) == {1: 2}
    assert index.find([1, 1]) == {1: 1}


def test_every_64_bit_value_is_a_key(index: Any) -> None:
    assert index.insert(0, [0, BIG, 1 << 63]) == 3
    assert index.find([0, -1, -(1 << 63)]) == {0: 3}
    assert index.find(np.array([0, -1, -(1 << 63)], dtype=np.int64)) == {0: 3}
    assert set(index.dump()) == {0, BIG, 1 << 63}


@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        lambda k: array.array("Q", k),
        lambda k: array.array("q", k),
        lambda k: np.array(k, dtype=np.uint64),
        lambda k: np.array(k, dtype=np.int64),
        lambda k: memoryview(np.array(k, dtype=np.uint64)),
        lambda k: np.repeat(np.array(k, dtype=np.uint64), 3)[::3],
        lambda k: np.array(k[::-1], dtype=np.uint64)[::-1],
        lambda k: np.frombuffer(b"x" + np.array(k, dtype=np.uint64).tobytes(), dtype=np.uint8)[1:].view(np.uint64),
        lambda k: [np.uint64(x) for x in k],
    ],
    ids=[
        "list",
        "tuple",
        "arrayQ",
        "arrayq",
        "uint64",
        "int64",
        "memoryview",
        "strided",
        "reversed",
        "unaligned",
        "numpy-scalars",
    ],
)
def test_key_types(index: Any, convert: Callable[[list[int]], Any]) -> None:
    index.insert(1, convert([5, 6, 7]))
    assert index.find([5, 6, 7]) == {1: 3}
    assert index.find(convert([5, 6, 8])) == {1: 2}
    assert index.remove(1, convert([7])) == 1


@pytest.mark.parametrize(
    "keys",
    [
        None,
        "ab",
        b"12345678",
        5,
        {1, 2},
        [1.5],
        ["a"],
        [None],
        [True],
        np.array([1.0]),
        np.array([[1]], dtype=np.uint64),
        np.array([1], dtype=np.int32),
        np.array([1], dtype=">u8"),
        array.array("i", [1]),
    ],
    ids=repr,
)
def test_wrong_key_types(index: Any, keys: Any) -> None:
    index.insert(1, [1])
    unchanged(index, lambda: index.insert(1, keys), ArgumentTypeError)
    unchanged(index, lambda: index.remove(1, keys), ArgumentTypeError)
    unchanged(index, lambda: index.find(keys), ArgumentTypeError)


@pytest.mark.parametrize("keys", [[1 << 64], [-(1 << 63) - 1], [1, 10**30]], ids=repr)
def test_keys_out_of_range(index: Any, keys: Any) -> None:
    unchanged(index, lambda: index.insert(1, keys), InvalidArgumentError)
    unchanged(index, lambda: index.insert(1, [1], keys[-1]), InvalidArgumentError)
    unchanged(index, lambda: index.find(keys), InvalidArgumentError)


@pytest.mark.parametrize(
    ("worker", "error"),
    [
        (-1, InvalidArgumentError),
        (1 << 20, InvalidArgumentError),
        (1 << 70, InvalidArgumentError),
        ("a", ArgumentTypeError),
        (1.0, ArgumentTypeError),
        (True, ArgumentTypeError),
        (None, ArgumentTypeError),
    ],
)
def test_wrong_workers(index: Any, worker: Any, error: type[Exception]) -> None:
    unchanged(index, lambda: index.insert(worker, [1]), error)
    unchanged(index, lambda: index.remove(worker, [1]), error)
    unchanged(index, lambda: index.clear_worker(worker), error)
    unchanged(index, lambda: index.remove_worker(worker), error)


@pytest.mark.parametrize(
    ("bound", "error"),
    [(0, InvalidArgumentError), (-1, InvalidArgumentError), (1.5, ArgumentTypeError), (True, ArgumentTypeError)],
)
def test_wrong_bounds(make: Callable[..., Any], bound: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        make(max_pages=bound)


# -------------------------------------------------------------------------------------------------------- workers


def test_an_insert_without_keys_registers_the_worker(index: Any) -> None:
    assert index.insert(3, []) == 0
    assert index.insert(1_048_575, np.array([], dtype=np.uint64), parent_key=9) == 0
    assert index.workers() == [3, 1_048_575]
    assert index.dump() == {}


def test_clear_keeps_the_id_and_remove_does_not(index: Any) -> None:
    index.insert(1, [1, 2])
    index.insert(2, [1, 3])
    index.insert(2, [50], parent_key=49)  # an orphan counts, too
    assert index.clear_worker(2) == 3
    assert index.workers() == [1, 2]
    assert index.dump() == {1: (None, (1,)), 2: (1, (1,))}
    assert index.remove_worker(1) == 2
    assert index.workers() == [2]
    assert index.dump() == {}
    assert index.remove_worker(1) == 0
    assert index.clear_worker(1) == 0
    assert index.workers() == [2]


def test_removing_does_not_register(index: Any) -> None:
    assert index.remove(5, [1, 2]) == 0
    assert index.clear_worker(5) == 0
    assert index.workers() == []


@pytest.mark.parametrize("count", [9, 100, 1500])
def test_many_workers(index: Any, count: int) -> None:
    for w in range(count):
        index.insert(w * 7, [1, 2, 3][: 1 + w % 3])
    assert index.find([1, 2, 3]) == {w * 7: 1 + w % 3 for w in range(count)}
    counts, nodes = index.find([1, 2, 3], nodes=True)
    assert len(counts) == count
    assert nodes[0].holders == tuple(w * 7 for w in range(count))
    for w in range(0, count, 2):
        assert index.remove_worker(w * 7) == 1 + w % 3
    assert index.find([1, 2, 3]) == {w * 7: 1 + w % 3 for w in range(1, count, 2)}
    assert index.workers() == [w * 7 for w in range(1, count, 2)]


# ----------------------------------------------------------------------------------------------------------- gaps


def test_an_interior_page_leaves_a_gap_that_refills(index: Any) -> None:
    index.insert(1, [1, 2, 3, 4])
    assert index.remove(1, [2]) == 1
    assert index.find([1, 2, 3, 4]) == {1: 1}
    assert index.stats()[:2] == (4, 3)
    assert index.dump()[2] == (1, ())
    assert index.insert(1, [2], parent_key=1) == 1
    assert index.find([1, 2, 3, 4]) == {1: 4}


def test_a_gap_of_one_is_held_by_another(index: Any) -> None:
    index.insert(1, [1, 2, 3])
    index.insert(2, [1, 2, 3])
    index.remove(1, [2])
    assert index.find([1, 2, 3]) == {1: 1, 2: 3}
    index.remove(2, [1])
    assert index.find([1, 2, 3]) == {1: 1}
    index.remove(1, [1])
    assert index.find([1, 2, 3]) == {}
    assert index.find([1, 2, 3], nodes=True)[1][0].holders == ()
    index.insert(2, [1])
    assert index.find([1, 2, 3]) == {2: 3}


def test_gaps_are_forgotten_with_their_last_descendant(index: Any) -> None:
    index.insert(1, [1, 2, 3, 4])
    index.insert(1, [1, 2, 5])
    assert index.remove(1, [1, 2, 3]) == 3
    assert index.stats().pages == 5
    assert index.remove(1, [4]) == 1
    assert index.dump() == {1: (None, ()), 2: (1, ()), 5: (2, (1,))}
    assert index.remove(1, [5]) == 1
    assert index.dump() == {}
    assert index.insert(1, [3, 1]) == 2  # forgotten keys are free to come back elsewhere


@pytest.mark.parametrize(
    "order", [[1, 2, 3, 4, 5], [5, 4, 3, 2, 1], [3, 1, 5, 2, 4], [3, 3, 9, 4, 5, 2, 1, 1]], ids=repr
)
@pytest.mark.parametrize("at_once", [True, False])
def test_pages_are_removed_in_any_order(index: Any, order: list[int], at_once: bool) -> None:
    index.insert(1, [1, 2, 3, 4, 5])
    index.insert(2, [1, 2, 3])
    removed = index.remove(1, order) if at_once else sum(index.remove(1, [k]) for k in order)
    assert removed == 5
    assert index.dump() == {1: (None, (2,)), 2: (1, (2,)), 3: (2, (2,))}


def test_remove_reaches_over_chains(index: Any) -> None:
    for root in range(0, 1000, 10):
        index.insert(1, [root, root + 1, root + 2])
        index.insert(2, [root])
    assert index.remove(1, [k + d for k in range(0, 1000, 10) for d in (2, 1, 0)]) == 300
    assert index.stats()[:2] == (100, 100)


# -------------------------------------------------------------------------------------------------------- orphans


def test_orphans_are_kept_until_their_parent_is_known(index: Any) -> None:
    index.insert(1, [3, 4], parent_key=2)
    assert index.find([3, 4]) == {}
    assert index.find([1, 2, 3, 4]) == {}
    assert index.stats()[:3] == (2, 2, 2)
    assert index.dump()[3] == (2, (1,))
    index.insert(2, [1, 2])
    assert index.stats()[:3] == (4, 4, 0)
    assert index.find([1, 2, 3, 4]) == {2: 2}
    index.insert(1, [1, 2])
    assert index.find([1, 2, 3, 4]) == {1: 4, 2: 2}


def test_orphans_join_when_reinserted_from_the_root(index: Any) -> None:
    index.insert(1, [3, 4, 5], parent_key=2)
    index.insert(2, [7], parent_key=4)
    assert index.insert(2, [1, 2, 3, 4, 6]) == 5
    assert index.stats()[:3] == (7, 9, 0)
    assert index.find([1, 2, 3, 4, 7]) == {2: 5}
    assert index.dump()[5] == (4, (1,))


def test_orphans_wait_for_orphans(index: Any) -> None:
    index.insert(1, [30], parent_key=20)
    index.insert(1, [20], parent_key=10)
    index.insert(2, [31], parent_key=20)
    assert index.stats()[:3] == (3, 3, 3)
    index.insert(1, [5, 10])
    assert index.find([5, 10, 20, 30]) == {1: 4}
    assert index.find([5, 10, 20, 31]) == {1: 3}
    assert index.stats().orphan_pages == 0


def test_orphans_join_in_the_middle_of_a_run(index: Any) -> None:
    for i in range(10, 90, 10):
        index.insert(1, [i * 100, i * 100 + 1], parent_key=i)
    chain = list(range(100))
    assert index.insert(1, chain) == 100
    assert index.stats()[:3] == (116, 116, 0)
    assert index.find([*chain[:51], 5000, 5001, 5]) == {1: 53}
    assert index.find(chain) == {1: 100}


def test_orphans_of_many_workers_join(index: Any) -> None:
    """They bring their workers and holder sets along to where their parent is."""
    for root in range(0, 4000, 100):  # in as many places as there may be
        for w in range(60):
            index.insert(1000 + root + w, [root + 2, root + 3][: 1 + w % 2], parent_key=root + 1)
        index.insert(1, [root, root + 1])
        for w in range(60):
            assert index.insert(1000 + root + w, [root, root + 1]) == 2
        assert index.find([root, root + 1, root + 2, root + 3]) == {
            1: 2,
            **{1000 + root + w: 3 + w % 2 for w in range(60)},
        }
    assert index.stats().orphan_pages == 0


def test_orphans_can_be_removed(index: Any) -> None:
    index.insert(1, [3, 4, 5], parent_key=2)
    index.insert(2, [3], parent_key=2)
    assert index.remove(1, [4]) == 1
    assert index.remove(1, [3]) == 1
    assert index.dump() == {3: (2, (2,)), 4: (3, ()), 5: (4, (1,))}
    assert index.remove_worker(2) == 1
    assert index.insert(1, [1, 2]) == 2
    assert index.find([1, 2, 3, 4, 5]) == {1: 2}
    assert index.remove(1, [5]) == 1
    assert index.stats().pages == 2


def test_joined_pages_stay_joined(index: Any) -> None:
    index.insert(1, [3], parent_key=2)
    index.insert(2, [1, 2])
    index.remove_worker(2)
    assert index.dump() == {1: (None, ()), 2: (1, ()), 3: (2, (1,))}
    assert index.stats().orphan_pages == 0


# ------------------------------------------------------------------------------------------------- contradictions


@pytest.mark.parametrize(
    ("keys", "parent"),
    [
        ([2], None),  # under 1
        ([1], 9),  # a root
        ([3], 1),  # under 2
        ([1, 3], None),
        ([9, 2], None),
        ([9, 9], None),
        ([9, 8, 9], 3),
        ([3, 1], 2),
        ([9], 9),  # its own parent
        ([8, 9], 9),
        ([20], None),  # an orphan of 10
        ([20], 11),
        ([21], 10),
        ([7, 20], None),
        ([10], 21),  # would close a circle: 21 is below 10
        ([9, 10], 20),
        ([9, 10, 20], 21),
        ([6, 21], None),
    ],
    ids=repr,
)
def test_contradictions_change_nothing(index: Any, keys: list[int], parent: int | None) -> None:
    index.insert(1, [1, 2, 3])
    index.insert(2, [20, 21], parent_key=10)
    unchanged(index, lambda: index.insert(3, keys, parent), InvalidArgumentError)
    unchanged(index, lambda: index.insert(1, keys, parent), InvalidArgumentError)


def test_contradictions_far_into_a_chain_change_nothing(index: Any) -> None:
    index.insert(1, [1, 2, 3])
    index.insert(2, [1000, 1001], parent_key=999)
    unchanged(index, lambda: index.insert(2, [1, 2, *range(900, 1002), 3]), InvalidArgumentError)
    assert index.insert(2, [1, 2, *range(900, 1002)]) == 102


# ------------------------------------------------------------------------------------------------------ path, words


def test_nodes_cover_the_known_path(index: Any) -> None:
    index.insert(1, [1, 2, 3, 4])
    index.insert(2, [1, 2])
    index.remove(1, [3])
    counts, nodes = index.find([1, 2, 3, 4, 5], nodes=True)
    assert counts == {1: 2, 2: 2}
    pages = [(n.first_page + i, n.holders) for n in nodes for i in range(n.num_pages)]
    assert pages == [(0, (1, 2)), (1, (1, 2)), (2, ()), (3, (1,))]
    assert len({n.node for n in nodes}) == len(nodes)
    assert [n.word for n in nodes] == [0] * len(nodes)


def test_words_belong_to_the_caller(index: Any) -> None:
    index.insert(1, [1, 2, 3, 4])
    nodes = index.find([1, 2, 3, 4], nodes=True)[1]
    for n in nodes:
        index.set_word(n.node, 77)
    assert {index.get_word(n.node) for n in nodes} == {77}
    index.set_word(nodes[-1].node, BIG)
    assert index.find([1, 2, 3, 4], nodes=True)[1][-1].word == BIG
    index.set_word(nodes[-1].node, 77)
    index.insert(2, [1, 2])  # a split: both parts have the word, the old handle is the lower part's
    after = index.find([1, 2, 3, 4], nodes=True)[1]
    assert {n.word for n in after} == {77}
    assert after[-1].node == nodes[-1].node


def test_stale_handles_are_errors(index: Any) -> None:
    index.insert(1, [1, 2, 3])
    node = index.find([1, 2, 3], nodes=True)[1][-1].node
    index.remove(1, [3, 2, 1])
    with pytest.raises(HandleError):
        index.get_word(node)
    index.insert(1, [1, 2, 3])
    for bad in (node, 0, BIG, 1 << 40, 12345):
        with pytest.raises(HandleError):
            index.set_word(bad, 1)
    with pytest.raises(ArgumentTypeError):
        index.get_word("x")


# ---------------------------------------------------------------------------------------------------------- bound


def test_the_least_recently_found_chain_goes_first(make: Callable[..., Any]) -> None:
    index = make(max_pages=40)
    for root in (100, 200, 300, 400):
        index.insert(root, range_of(root, 10))
    index.find(range_of(100, 10))
    index.find(range_of(300, 10))
    index.insert(500, range_of(500, 5))  # evicts the tail of 200
    assert index.find(range_of(200, 10)) == {200: 5}
    index.insert(600, range_of(600, 15))  # 400, then half of 100
    assert [len(index.find(range_of(r, 10))) for r in (400,)] == [0]
    assert index.find(range_of(100, 10)) == {100: 5}
    assert index.find(range_of(300, 10)) == {300: 10}
    index.check_integrity()
    assert index.stats().pages == 40
    assert index.stats().evicted_pages == 20


def test_only_leaves_are_evicted(make: Callable[..., Any]) -> None:
    index = make(max_pages=10)
    index.insert(1, [1, 2, 3, 4])
    index.insert(1, [1, 2, 5, 6])
    for _ in range(3):
        index.find([1, 2, 5, 6])
    index.insert(2, range_of(50, 5))
    assert index.find([1, 2, 3, 4]) == {1: 3}
    assert index.find([1, 2, 5, 6]) == {1: 4}
    index.check_integrity()


def test_eviction_forgets_gaps_and_orphans(make: Callable[..., Any]) -> None:
    index = make(max_pages=6)
    index.insert(1, [3, 4], parent_key=2)
    index.insert(1, [11, 12, 13])
    index.remove(1, [11, 12])
    index.insert(1, [21, 22, 23])  # 8 known: the orphans are the oldest
    assert index.stats()[:3] == (6, 4, 0)
    index.insert(1, [31])  # 13 goes, and the gaps above it with it
    assert index.stats()[:3] == (4, 4, 0)
    index.check_integrity()


def test_a_chain_longer_than_the_bound_keeps_its_front(make: Callable[..., Any]) -> None:
    index = make(max_pages=5)
    index.insert(1, range_of(0, 20))
    assert index.find(range_of(0, 20)) == {1: 5}
    index.insert(1, range_of(100, 20))
    assert index.find(range_of(100, 20)) == {1: 5}
    assert index.stats().pages == 5
    index.check_integrity()


def range_of(first: int, count: int) -> list[int]:
    return list(range(first, first + count))
