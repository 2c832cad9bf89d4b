"""The fast index beside the reference: the same calls, the same answers, the same content, after every step.

Keys are drawn from a fixed forest ("the truth": chained hashes allow no other), and now and then at random, which
contradicts. ``run`` is the long form: ``python tests/oracle/test_index_side_by_side.py SEED OPERATIONS``.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from radixkv.errors import HandleError, RadixKVError
from radixkv.tree.prefix_index import PrefixIndex
from radixkv.tree.reference_index import ReferencePrefixIndex


def answer(index: Any, name: str, *args: Any) -> Any:
    """What a call returns, or the type of what it raises."""
    try:
        return getattr(index, name)(*args)
    except RadixKVError as error:
        return type(error)


class Pair:
    """Both indexes, and the truth that keys are drawn from."""

    def __init__(self, seed: int, num_keys: int, max_pages: int | None = None, branch: float = 0.3) -> None:
        self.random = random.Random(seed)
        self.fast = PrefixIndex(max_pages)
        self.slow = ReferencePrefixIndex()  # never evicts by itself: it is told what the fast one evicted
        self.max_pages = max_pages
        self.keys = [self.random.getrandbits(64) if i % 3 else i for i in range(num_keys)]
        self.parent: dict[int, int | None] = {}
        for i, key in enumerate(self.keys):  # mostly long runs: the parent is the key before
            on_run = i and self.random.random() > branch
            self.parent[key] = self.keys[i - 1] if on_run else self.random.choice([None, *self.keys[:i]])
        self.words: dict[int, int] = {}

    def path(self, i: int) -> list[int]:
        """From the root to the i-th key."""
        key: int | None = self.keys[i]
        out = []
        while key is not None:
            out.append(key)
            key = self.parent[key]
        return out[::-1]

    def both(self, name: str, *args: Any) -> Any:
        got, expected = answer(self.fast, name, *args), answer(self.slow, name, *args)
        if self.max_pages is not None and name == "insert":
            self.adopt_evictions()
        assert got == expected, (name, args)
        return got

    def adopt_evictions(self) -> None:
        """Pages that only the reference knows have been evicted: leaves, or the dumps would differ afterwards."""
        evicted = self.slow.dump().keys() - self.fast.dump().keys()
        for worker in self.slow.workers():
            self.slow.remove(worker, list(evicted))
        assert not evicted or self.fast.stats().pages <= (self.max_pages or 0)

    def find(self, keys: list[int]) -> None:
        counts, nodes = self.fast.find(np.array(keys, dtype=np.uint64), nodes=True)
        expected, pages = self.slow.find(keys, nodes=True)
        assert counts == expected == self.fast.find(keys)
        assert [(n.first_page + i, n.holders) for n in nodes for i in range(n.num_pages)] == [
            (p.first_page, p.holders) for p in pages
        ]
        for n in nodes:
            assert self.fast.get_word(n.node) == n.word
        if nodes and self.random.random() < 0.3:
            word = self.random.randrange(3)
            node = self.random.choice(nodes).node
            self.fast.set_word(node, word)
            self.words[node] = word

    def check_words(self) -> None:
        """A handle has the word that it was given, or is stale; it never comes to mean another node."""
        for node, word in list(self.words.items()):
            try:
                assert self.fast.get_word(node) == word
            except HandleError:
                del self.words[node]

    def check(self) -> None:
        self.fast.check_integrity()
        self.slow.check_integrity()
        assert self.fast.dump() == self.slow.dump()
        assert self.fast.stats()[:4] == self.slow.stats()[:4]
        assert self.fast.workers() == self.slow.workers()
        self.check_words()

    def step(self, workers: int) -> None:
        """One random operation."""
        r = self.random
        worker, path = r.randrange(workers), self.path(r.randrange(len(self.keys)))
        first = r.randrange(len(path))
        what = r.choices(
            ["insert", "orphan", "remove", "scatter", "wrong", "clear_worker", "remove_worker", "find"],
            [30, 25, 20, 15, 5, 1, 1, 20],
        )[0]
        if what == "insert":
            self.both("insert", worker, path)
        elif what == "orphan":
            self.both("insert", worker, path[first : first + r.choice([1, 2, 100])], self.parent[path[first]])
        elif what == "remove":
            part = path[first : first + r.choice([1, 3, 100])]
            self.both("remove", worker, part if r.random() < 0.5 else part[::-1])
        elif what == "scatter":
            self.both("remove", worker, r.choices(self.keys, k=r.randrange(12)))
        elif what == "wrong":
            self.both("insert", worker, r.choices(self.keys, k=r.randrange(5)), r.choice([None, *self.keys]))
        elif what == "find":
            self.find(path + r.choices(self.keys, k=r.randrange(2)))
        else:
            self.both(what, worker)


def run(seed: int, operations: int, *, check_every: int = 1) -> None:
    """A seeded run over several worlds, small and large, bounded and not. The seed names every choice."""
    choose = random.Random(seed)
    done = 0
    while done < operations:
        num_keys, workers = choose.choice([5, 20, 60, 200]), choose.choice([1, 2, 5, 20])
        bound = choose.choice([None, None, num_keys // 2 + 1])
        pair = Pair(choose.getrandbits(64), num_keys, bound, branch=choose.choice([0.05, 0.3, 0.8]))
        for i in range(min(400, operations - done)):
            pair.step(workers)
            done += 1
            if i % check_every == 0:
                pair.check()
        pair.check()


@pytest.mark.parametrize("seed", range(12))
def test_seeded_runs(seed: int) -> None:
    run(seed, 400)


workers = st.integers(0, 3)
NUM_KEYS = 24
places = st.integers(0, NUM_KEYS - 1)


class SideBySide(RuleBasedStateMachine):
    @initialize(
        seed=st.integers(0, 1 << 32), bound=st.sampled_from([None, None, 6]), branch=st.sampled_from([0.1, 0.5])
    )
    def start(self, seed: int, bound: int | None, branch: float) -> None:
        self.pair = Pair(seed, NUM_KEYS, bound, branch)

    @rule(worker=workers, place=places)
    def insert(self, worker: int, place: int) -> None:
        self.pair.both("insert", worker, self.pair.path(place))

    @rule(worker=workers, place=places, first=places, count=st.integers(1, 8))
    def insert_below(self, worker: int, place: int, first: int, count: int) -> None:
        path = self.pair.path(place)
        first %= len(path)
        self.pair.both("insert", worker, path[first : first + count], self.pair.parent[path[first]])

    @rule(worker=workers, chain=st.lists(places, max_size=4), parent=st.none() | places)
    def insert_anything(self, worker: int, chain: list[int], parent: int | None) -> None:
        keys = self.pair.keys
        self.pair.both("insert", worker, [keys[i] for i in chain], None if parent is None else keys[parent])

    @rule(worker=workers, pages=st.lists(places, max_size=8))
    def remove(self, worker: int, pages: list[int]) -> None:
        self.pair.both("remove", worker, [self.pair.keys[i] for i in pages])

    @rule(worker=workers, place=places, first=places, backwards=st.booleans())
    def remove_tail(self, worker: int, place: int, first: int, backwards: bool) -> None:
        tail = self.pair.path(place)[first:]
        self.pair.both("remove", worker, tail[::-1] if backwards else tail)

    @rule(worker=workers)
    def clear_worker(self, worker: int) -> None:
        self.pair.both("clear_worker", worker)

    @rule(worker=workers)
    def remove_worker(self, worker: int) -> None:
        self.pair.both("remove_worker", worker)

    @rule(place=places, tail=st.lists(places, max_size=2))
    def find(self, place: int, tail: list[int]) -> None:
        self.pair.find(self.pair.path(place) + [self.pair.keys[i] for i in tail])

    @invariant()
    def agree(self) -> None:
        if hasattr(self, "pair"):
            self.pair.check()


TestSideBySide = SideBySide.TestCase
TestSideBySide.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]), check_every=20)
