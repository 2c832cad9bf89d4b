"""The index under many threads at once, then still: integrity, and the same content as the oracle given the same calls.

A worker's calls all come from one thread and never contradict the truth, so what it holds at the end does not depend
on the other threads. Which gaps and orphans are known in between does; a last worker that inserts everything from the
roots makes that equal, too.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from radixkv.errors import InvalidArgumentError
from radixkv.tree.prefix_index import PrefixIndex
from radixkv.tree.reference_index import ReferencePrefixIndex

THREADS = 6
STEPS = 400
STILL, LAST = 1000, 1001  # a worker that never changes while the threads run, and one that comes after them


class Truth:
    """A fixed forest of keys."""

    def __init__(self, seed: int, count: int) -> None:
        r = random.Random(seed)
        self.keys = [r.getrandbits(64) for _ in range(count)]
        self.parent: dict[int, int | None] = {}
        for i, key in enumerate(self.keys):
            self.parent[key] = self.keys[i - 1] if i and r.random() < 0.8 else r.choice([None, *self.keys[:i]])

    def path(self, key: int | None) -> list[int]:
        out = []
        while key is not None:
            out.append(key)
            key = self.parent[key]
        return out[::-1]


def calls_of(truth: Truth, worker: int, steps: int) -> list[tuple[Any, ...]]:
    """A worker's calls, by seed."""
    r = random.Random(worker)
    calls: list[tuple[Any, ...]] = []
    for _ in range(steps):
        path = truth.path(r.choice(truth.keys))
        first = r.randrange(len(path))
        kind = r.choices(["insert", "below", "remove", "clear_worker", "remove_worker"], [30, 30, 30, 1, 1])[0]
        if kind == "insert":
            calls.append(("insert", worker, path))
        elif kind == "below":
            calls.append(("insert", worker, path[first:], truth.parent[path[first]]))
        elif kind == "remove":
            calls.append(("remove", worker, path[first:] if r.random() < 0.5 else r.choices(truth.keys, k=8)))
        else:
            calls.append((kind, worker))
    return calls


def run_threads(*bodies: Callable[[], None]) -> None:
    """Run all at once; the first exception of any is raised here."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(bodies))

    def guarded(body: Callable[[], None]) -> None:
        try:
            start.wait()
            body()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(b,)) for b in bodies]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("seed", range(3))
def test_threads_then_equal_to_the_oracle(seed: int) -> None:
    truth = Truth(seed, 300)
    fast, slow = PrefixIndex(), ReferencePrefixIndex()
    still = [truth.path(k) for k in truth.keys[::7]]
    for index in (fast, slow):
        for path in still:
            index.insert(STILL, path)
    plans = [calls_of(truth, w, STEPS) for w in range(THREADS)]
    done = threading.Event()

    def change(plan: list[tuple[Any, ...]]) -> Callable[[], None]:
        def body() -> None:
            try:
                for name, *args in plan:
                    getattr(fast, name)(*args)
            finally:
                finished.release()

        return body

    finished = threading.Semaphore(0)

    def look() -> None:
        paths = [np.array(p, dtype=np.uint64) for p in still]
        rounds = 0
        while rounds == 0 or not done.is_set():
            rounds += 1
            for path in paths:
                counts, nodes = fast.find(path, nodes=True)
                assert counts[STILL] == len(path)  # whatever the others split and join around it
                assert sum(n.num_pages for n in nodes) == len(path)
                assert all(STILL in n.holders for n in nodes)
                assert fast.find(path)[STILL] == len(path)

    def wait() -> None:
        for _ in plans:
            finished.acquire()
        done.set()

    run_threads(*map(change, plans), look, look, wait)
    fast.check_integrity()
    for plan in plans:
        for name, *args in plan:
            getattr(slow, name)(*args)
    for index in (fast, slow):
        for key in truth.keys:
            index.insert(LAST, truth.path(key))
    fast.check_integrity()
    assert fast.dump() == slow.dump()
    assert fast.workers() == slow.workers()
    assert fast.stats()[:4] == slow.stats()[:4]


def test_orphans_and_their_parents_meet() -> None:
    """Half of the threads insert tails whose parents the other half inserts: no tail may be left an orphan."""
    chains = [list(range(i * 100, i * 100 + 12)) for i in range(1, 400)]
    fast = PrefixIndex()

    def fronts() -> None:
        for c in chains:
            fast.insert(0, c[:4])

    def middles() -> None:
        for c in chains:
            fast.insert(1, c[4:8], c[3])

    def tails() -> None:
        for c in chains:
            fast.insert(2, c[8:], c[7])

    run_threads(tails, middles, fronts)
    fast.check_integrity()
    assert fast.stats()[:3] == (12 * len(chains), 12 * len(chains), 0)


def test_bounded_under_threads() -> None:
    fast = PrefixIndex(max_pages=500)

    def fill(worker: int) -> Callable[[], None]:
        def body() -> None:
            r = random.Random(worker)
            for _ in range(300):
                first = r.randrange(200) * 100
                fast.insert(worker, list(range(first, first + r.randrange(1, 40))))
                fast.find([first, first + 1])

        return body

    run_threads(*(fill(w) for w in range(THREADS)))
    fast.check_integrity()
    assert 0 < fast.stats().pages <= 500
    assert fast.stats().evicted_pages > 0


def test_a_contradiction_between_threads_has_one_winner() -> None:
    """The same key under different parents at once: exactly one insert takes it, and nothing of the others is left."""
    fast = PrefixIndex()
    wins: list[int] = []

    def claim(worker: int) -> Callable[[], None]:
        def body() -> None:
            for i in range(200):
                root = (1 << 32) * (worker + 1) + i
                try:
                    fast.insert(worker, [root, *range(10**6 + 3 * i, 10**6 + 3 * i + 3)])
                    wins.append(i)
                except InvalidArgumentError:
                    pass

        return body

    run_threads(*(claim(w) for w in range(THREADS)))
    fast.check_integrity()
    assert len(wins) == len(set(wins))
    assert fast.stats().pages == 4 * len(wins)
    assert len(wins) > 0
