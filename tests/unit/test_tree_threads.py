"""Python threads on one RadixTree: nothing torn, nothing lost, nobody waits for ever."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from radixkv import HandleError, RadixTree
from radixkv.tree.core import page_hash_capsule

from .test_page_hash import ADDRESS

PAGE = 4
WAIT_SECONDS = 60.0


def run_all(*workers: Callable[[], None]) -> None:
    """Run workers as daemon threads; the first error, or one that does not end, fails the test."""
    errors: list[BaseException] = []

    def guarded(worker: Callable[[], None]) -> None:
        try:
            worker()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(worker,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_SECONDS)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"


def test_snapshots_are_of_one_moment() -> None:
    """While one thread splits, resets and inserts, what another sees of a node fits together: page k has tokens k."""
    tree = RadixTree(PAGE)
    pages = 64
    tokens = np.repeat(np.arange(pages, dtype=np.int32), PAGE)
    done, failed = threading.Event(), threading.Event()
    seen = 0

    def change() -> None:
        rng = np.random.default_rng(7)
        try:
            while seen <= 2_000 and not failed.is_set():
                tree.insert(tokens, np.arange(pages, dtype=np.int32))
                for _ in range(4):
                    tree.match(tokens[: PAGE * int(rng.integers(1, pages))])
                tree.reset()
        finally:
            done.set()

    def look() -> None:
        try:
            look_until_done()
        finally:
            failed.set()

    def look_until_done() -> None:
        nonlocal seen
        while not done.is_set():
            infos = tree.dump()
            covered = 0
            for info in infos:  # one path: each node goes on where the one before it ended
                assert info.page_ids is not None
                assert (info.tokens[::PAGE] == info.page_ids).all()
                assert info.page_ids[0] == covered
                covered += len(info.page_ids)
            assert covered in (0, pages)
            seen += len(infos)
            for info in infos:
                try:
                    again = tree.node_info(info.node)
                except HandleError:
                    continue
                assert again.page_ids is not None
                assert (again.tokens[::PAGE] == again.page_ids).all()
                try:
                    keys = tree.page_keys(info.node)
                except HandleError:
                    continue
                assert len(keys) <= len(info.page_ids)

    run_all(change, look)
    assert seen > 2_000
    tree.check_integrity()


def test_no_call_waits_for_the_lock_with_the_gil() -> None:
    """A Python page-hash callback needs the GIL under the tree's lock: who held it while waiting would not end."""
    tree = RadixTree(PAGE, events=True, page_hash=page_hash_capsule(ADDRESS, digest_bytes=32))
    done = threading.Event()

    rounds = 0

    def insert() -> None:
        try:
            k = 0
            while rounds < 20:
                k += 1
                tokens = np.full(PAGE * 8, k, dtype=np.int32)
                tree.insert(tokens, np.arange(8, dtype=np.int32))
                tree.evict(PAGE * 8)
        finally:
            done.set()

    probe = np.arange(PAGE * 2, dtype=np.int32)
    calls: list[Callable[[], object]] = [
        tree.dump,
        tree.to_dot,
        tree.stats,
        tree.check_integrity,
        tree.take_events,
        lambda: list(tree),
        lambda: len(tree),
        lambda: tree.match(probe),
        lambda: tree.peek(probe),
        lambda: tree.peek_many([probe, probe]),
        lambda: tree.match_extend(tree.match(probe[:0]), probe),
        lambda: tree.insert(probe[:0], []),
        lambda: tree.insert_host(probe[:0], []),
        lambda: tree.evict(0),
        lambda: tree.evict_host(0),
        lambda: tree.expire(0),
        lambda: tree.delete_namespace("nobody"),
        lambda: tree.lock(0),
        lambda: tree.unpin(0),
        lambda: tree.page_keys(0),
    ]
    stale = tree.insert(np.full(PAGE, -5, dtype=np.int32), [1000]).node
    tree.delete(stale)
    methods = ("lock", "unlock", "node_info", "page_keys", "page_digests", "delete", "protect_host", "release_host")
    for method in methods:
        calls.append(lambda method=method: getattr(tree, method)(stale))
    calls += [
        lambda: tree.pin(stale, 1),
        lambda: tree.finish_backup(stale, None),
        lambda: tree.set_host(stale, [1]),
        lambda: tree.set_device(stale, [1]),
        lambda: tree.finish_load(stale),
        lambda: tree.split_at(stale, PAGE),
    ]

    def call_everything() -> None:
        nonlocal rounds
        while not done.is_set():
            rounds += 1
            for call in calls:
                with contextlib.suppress(HandleError):
                    call()

    run_all(insert, call_everything)
    tree.check_integrity()


@pytest.fixture(autouse=True)
def many_switches() -> Iterator[None]:
    """Let threads take turns a hundred times as often as usual."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.parametrize("policy", ["lru", "slru"])
def test_pages_are_conserved(policy: str) -> None:
    """Four threads match, lock, insert, free duplicates and evict from one pool: no page is lost or owned twice."""
    tree = RadixTree(PAGE, policy)
    capacity = 400
    free = list(range(capacity))
    guard = threading.Lock()

    def take(pages: int) -> list[int]:
        with guard:
            if len(free) < pages:
                free.extend(tree.evict((pages - len(free)) * PAGE).page_ids.tolist())
            if len(free) < pages:
                return []
            return [free.pop() for _ in range(pages)]

    def serve(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(800):
            pages = int(rng.integers(1, 12))
            tokens = np.repeat(rng.integers(0, 3, pages).astype(np.int32), PAGE)
            match = tree.match(tokens)
            try:
                tree.lock(match.device_node)
            except HandleError:  # evicted between the two calls
                continue
            have = match.page_ids().tolist()
            new = take(pages - len(have))
            if len(new) == pages - len(have):
                result = tree.insert(tokens, have + new, match=match)
                with guard:
                    free.extend(result.duplicate_page_ids.tolist())
            tree.unlock(match.device_node)

    run_all(*(lambda seed=seed: serve(seed) for seed in range(4)))
    tree.check_integrity(capacity, free)
    assert tree.stats().protected_tokens == 0


def test_the_capsule_of_a_tree_reaches_the_same_tree_and_keeps_it_alive() -> None:
    tree = RadixTree(PAGE)
    tree.insert(np.arange(PAGE, dtype=np.int32), [3])
    capsule = tree.capsule
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    assert pointer(capsule, b"radixkv.tree") == pointer(tree.capsule, b"radixkv.tree") != 0
    other = RadixTree(PAGE)
    assert pointer(other.capsule, b"radixkv.tree") != pointer(capsule, b"radixkv.tree")
    del tree
    assert pointer(capsule, b"radixkv.tree")
