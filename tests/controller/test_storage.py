"""Host to storage, and storage to host ahead of a request."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radixkv import RadixTree
from radixkv.controller import STORED, STORING
from radixkv.controller.hashes import PathHashes
from radixkv.controller.workers import Job
from radixkv.errors import InvalidArgumentError, StateError
from radixkv.key import encode_namespace
from radixkv.storage import MemoryStorage
from radixkv.storage.file import FileStorage
from radixkv.tree.page_hash import namespace_digest, sha256_chain, sha256_page_hash
from radixkv.tree.reference import ReferenceTree

from .kit import ROOT, P, ScriptedEdge, Stack, content_of, page_store, prompt
from .soak import Unreliable


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def make(storage: Any = True, **options: Any) -> Stack:
    options = {"write_through_threshold_storage": 1, "prefetch_policy": "wait_complete"} | options
    return Stack(storage=storage, **options)


def stored(tokens: Any, *, host_pages: int = 64, **options: Any) -> Stack:
    """Prompts are in storage and nowhere else."""
    stack = make(store_after_backup=True, host_pages=host_pages, **options)
    for each in tokens if isinstance(tokens, list) else [tokens]:
        stack.compute(each)
        stack.settle()
    stack.controller.reset()
    stack.check()
    return stack


def keys_of(stack: Stack, tokens: Any, salt: bytes = b"") -> list[bool]:
    """Which pages of a prompt are in storage."""
    assert stack.edge is not None
    keys = stack.edge.pages.keys(sha256_chain(tokens, P, namespace_digest(salt)), salt)
    return stack.edge.pages.storage.exists_many(keys).tolist()


def prefetched(stack: Stack, tokens: Any, node: int = ROOT, **namespace: Any) -> bool:
    """Prefetch to the end. Returns: whether it was begun."""
    begun = stack.controller.prefetch("req", tokens, node, **namespace)
    for _ in range(3):
        if stack.edge is not None:
            stack.edge.run()
        stack.controller.poll()
    assert stack.controller.finish_prefetch("req")
    stack.check()
    return begun


# ---- stores ----------------------------------------------------------------------------------------------------------
def test_hits_drive_a_node_to_the_host_and_then_to_storage() -> None:
    stack = make(write_through_threshold_storage=3)
    for hit in range(1, 5):
        stack.compute(prompt(1, 3))
        assert stack.controller.stats().stores_in_flight == (hit == 3)
        stack.check()
        stack.settle()
    assert keys_of(stack, prompt(1, 3)) == [True] * 3
    assert stack.controller.stats().stores == 1
    assert [info.marks for info in stack.tree.dump()] == [STORED]


@pytest.mark.parametrize("tree", ["with digests of its own", "hashed by path"])
def test_a_child_has_the_hashes_of_its_whole_path_and_is_stored_after_its_parent(tree: str) -> None:
    stack = make(tree=ReferenceTree(P)) if tree == "hashed by path" else make()
    tokens = prompt(1, 6)
    parent = stack.compute(tokens[: 3 * P])
    child = stack.compute(tokens)
    stack.settle()
    assert stack.controller.store(child) is None  # of no use there without its parent
    stack.settle()
    assert keys_of(stack, tokens) == [False] * 6
    assert stack.controller.store(parent) is not None
    stack.settle()  # the child follows by itself
    assert keys_of(stack, tokens) == [True] * 6
    assert {info.marks for info in stack.tree.dump()} == {STORED}
    stack.check()


def test_a_split_while_it_is_stored_leaves_each_part_its_own_hashes() -> None:
    stack = make()
    tokens = prompt(1, 5)
    node = stack.compute(tokens)
    stack.settle()
    stack.controller.store(node)
    stack.compute(np.concatenate([tokens[: 2 * P], prompt(2, 1)]))
    upper = stack.tree.node_info(node).parent
    assert stack.tree.node_info(upper).marks == STORING
    assert stack.controller.store(upper) is None  # in flight
    stack.check()
    stack.settle()
    assert keys_of(stack, tokens) == [True] * 5
    assert stack.tree.node_info(upper).marks == stack.tree.node_info(node).marks == STORED
    stack.check()


def test_a_partial_store_splits_the_node() -> None:
    stack = make(storage_batch_pages=1)
    tokens = prompt(1, 5)
    node = stack.compute(tokens)
    stack.settle()
    stack.controller.store(node)
    assert stack.edge is not None
    for _ in range(2):
        stack.edge.step()
    stack.edge.waiting[0][0].cancel()
    stack.edge.run()
    stack.controller.poll()
    upper = stack.tree.node_info(node).parent
    marks = {len(info.tokens) // P: info.marks for info in stack.tree.dump()}
    assert marks == {2: STORED, 3: 0}
    assert stack.controller.store(upper) is None
    assert stack.controller.stats().partial_stores == 1
    stack.check()
    assert stack.controller.store(node) is not None
    stack.settle()
    assert keys_of(stack, tokens) == [True] * 5


def test_a_partial_store_of_a_node_that_was_split_meanwhile() -> None:
    stack = make(storage_batch_pages=1)
    tokens = prompt(1, 6)
    node = stack.compute(tokens)
    stack.settle()
    stack.controller.store(node)
    stack.compute(np.concatenate([tokens[: 2 * P], prompt(2, 1)]))
    assert stack.edge is not None
    for _ in range(2):  # exactly the upper part
        stack.edge.step("store")
    next(job for job, _ in stack.edge.waiting if job.kind == "store").cancel()
    stack.settle()
    marks = {info.path_tokens // P: info.marks for info in stack.tree.dump() if info.path_tokens != 3 * P}
    assert marks == {2: STORED, 6: 0}
    stack.check()


def test_a_store_that_fails_is_not_visible_as_stored() -> None:
    storage = Unreliable(MemoryStorage(), np.random.default_rng(0))
    storage.chance = 1.0
    stack = make(storage)
    node = stack.compute(prompt(1, 3))
    stack.settle()
    stack.controller.store(node)
    stack.settle()
    assert stack.tree.node_info(node).marks == 0
    assert stack.controller.stats().store_failures == 1
    storage.chance = 0.0
    assert stack.controller.store(node) is not None
    stack.settle()
    assert stack.tree.node_info(node).marks == STORED
    stack.check()


def test_host_pages_are_not_evicted_while_storage_reads_them() -> None:
    stack = make()
    node = stack.compute(prompt(1, 3))
    stack.settle()
    stack.controller.store(node)
    stack.controller.evict(3 * P)
    assert stack.controller.evict_host(3 * P) == 0
    stack.settle()
    assert stack.controller.evict_host(3 * P) == 3 * P
    stack.check()


def test_stores_in_flight_are_bounded() -> None:
    stack = make(max_stores=2)
    nodes = [stack.compute(prompt(seed, 1)) for seed in range(4)]
    stack.settle()
    assert [stack.controller.store(node) is not None for node in nodes] == [True, True, False, False]
    assert stack.controller.stats().refused_stores == 2
    stack.settle()
    stack.check()


def test_storage_is_left_alone_after_failures_and_tried_again() -> None:
    clock = Clock()
    stack = make(clock=clock, backoff_failures=2, backoff_base_s=1.0, backoff_max_s=2.0)
    assert stack.edge is not None
    pages = stack.edge.pages
    set_pages = pages.set_pages
    node = stack.compute(prompt(1, 3))
    stack.settle()

    def attempt() -> bool:
        begun = stack.controller.store(node) is not None
        stack.settle()
        return begun

    pages.set_pages = lambda digests, *rest, **more: np.zeros(len(digests), np.bool_)  # type: ignore[method-assign]
    assert [attempt() for _ in range(3)] == [True, True, False]
    assert stack.controller.stats().backing_off
    for wait_s in (1.0, 2.0, 2.0):  # doubled, but no more than the most
        clock.now_s += wait_s - 0.01
        assert not attempt()
        clock.now_s += 0.01
        stack.controller.poll()
        assert attempt()
    pages.set_pages = set_pages  # type: ignore[method-assign]
    clock.now_s += 2.0
    stack.controller.poll()
    assert attempt()
    assert not stack.controller.stats().backing_off
    assert stack.tree.node_info(node).marks == STORED


@pytest.mark.parametrize("page_hash", [sha256_page_hash, lambda: None])
def test_a_namespace_is_in_the_digests_themselves(page_hash: Any) -> None:
    """Of backup and prefetch alike, whether the tree keeps SHA-256 digests or the controller hashes paths."""
    stack = make(tree=RadixTree(P, page_hash=page_hash()))
    tokens, name = prompt(1, 4), encode_namespace(None, "a")
    pages = stack.controller.alloc_pages(4)
    assert pages is not None
    stack.device.data[pages] = content_of(tokens, salt=name)
    top = stack.controller.insert(tokens[: 2 * P], pages[:2], cache_salt="a").node
    node = stack.controller.insert(tokens, pages, cache_salt="a").node
    wanted = sha256_chain(tokens, P, hashlib.sha256(hashlib.sha256(name).digest() + b"n").digest())
    hashes = PathHashes(stack.tree)
    assert np.array_equal(np.concatenate([hashes.own(top), hashes.own(node)]), wanted)
    assert np.array_equal(hashes.following(ROOT, tokens, name), wanted)
    assert np.array_equal(hashes.following(top, tokens[2 * P :], name), wanted[2:])
    assert np.array_equal(hashes.following(ROOT, tokens, b""), sha256_chain(tokens, P))
    stack.settle()
    for each in (top, node):
        stack.controller.store(each)
    stack.settle()
    stack.controller.reset()
    prefetched(stack, tokens, cache_salt="a")  # from the root: the chain begins with the namespace's digest
    found = stack.controller.match(tokens, cache_salt="a")
    assert found.host_num_tokens == 4 * P
    stack.check()


def test_namespaces_are_apart_in_storage() -> None:
    stack = make()
    tokens = prompt(1, 3)
    pages = stack.controller.alloc_pages(3)
    assert pages is not None
    stack.device.data[pages] = content_of(tokens, salt=b"a")
    node = stack.controller.insert(tokens, pages, cache_salt="a").node
    stack.settle()
    stack.controller.store(node)
    stack.settle()
    assert keys_of(stack, tokens) == [False] * 3
    assert keys_of(stack, tokens, stack.tree.node_info(node).namespace) == [True] * 3
    stack.controller.reset()
    prefetched(stack, tokens, cache_salt="b")
    assert len(stack.tree) == 0
    prefetched(stack, tokens, cache_salt="a")
    assert stack.controller.match(tokens, cache_salt="a").host_num_tokens == 3 * P
    with pytest.raises(InvalidArgumentError, match="namespace"):
        stack.controller.prefetch("r", tokens, stack.controller.match(tokens, cache_salt="a").host_node)
    stack.check()


# ---- prefetch --------------------------------------------------------------------------------------------------------
def test_a_prefetched_prompt_is_served() -> None:
    tokens = prompt(1, 6)
    stack = stored(tokens)
    assert prefetched(stack, tokens)
    match = stack.controller.match(tokens)
    assert match.host_num_tokens == 6 * P
    assert stack.controller.store(match.host_node) is None  # that is where it comes from
    load = stack.controller.load(match.host_node)
    assert load is not None
    stack.controller.start_loads()
    stack.settle()
    assert stack.serve(tokens) == 6 * P
    assert stack.controller.attribute("req", 7 * P, match, load.num_tokens) == (0, 0, 6 * P, P)
    assert stack.controller.attribute("req", 7 * P, match, load.num_tokens) == (0, 6 * P, 0, P)  # accounted for once
    stack.check()


def test_what_is_missing_is_prefetched_below_what_is_there() -> None:
    tokens = prompt(1, 6)
    stack = stored(tokens)
    stack.compute(tokens[: 2 * P], backup=False)  # on the device only
    match = stack.controller.match(tokens)
    assert prefetched(stack, tokens[match.num_tokens :], match.host_node)
    match = stack.controller.match(tokens)
    assert (match.num_tokens, match.host_num_tokens) == (2 * P, 4 * P)
    stack.check()


def test_a_miss_takes_nothing_from_anybody() -> None:
    stack = make(device_pages=4, host_pages=4, prefetch_capacity_floor=1.0)
    stack.compute(prompt(1, 4))
    stack.settle()
    stack.controller.evict(4 * P)
    stack.compute(prompt(2, 4), backup=False)
    before = [info._replace(access_time=0) for info in stack.tree.dump()]
    assert prefetched(stack, prompt(3, 4))
    assert repr([info._replace(access_time=0) for info in stack.tree.dump()]) == repr(before)
    stats = stack.controller.stats()
    assert (stats.prefetch_revoked, stats.host_evicted_tokens, stats.device_evicted_tokens) == (1, 0, 4 * P)


def test_below_the_threshold_it_is_refused_or_revoked() -> None:
    tokens = prompt(1, 6)
    stack = stored(tokens[: 3 * P], prefetch_threshold=4 * P)
    assert not stack.controller.prefetch("short", tokens[: 4 * P - 1], ROOT)
    assert prefetched(stack, tokens)  # storage has less
    stats = stack.controller.stats()
    assert (stats.refused_prefetches, stats.prefetch_revoked) == (1, 1)
    assert stack.host.available_size() == stack.host.size


def test_the_first_miss_ends_a_prefetch() -> None:
    tokens = prompt(1, 6)
    stack = stored(tokens)
    assert stack.edge is not None
    keys = stack.edge.pages.keys(sha256_chain(tokens, P))
    stack.edge.pages.storage.delete_many(keys[3:4])
    prefetched(stack, tokens)
    assert stack.controller.match(tokens).host_num_tokens == 3 * P


def test_host_room_is_made_once_and_only_for_what_storage_has() -> None:
    tokens = prompt(1, 4)
    stack = stored(tokens, host_pages=6)
    stack.compute(prompt(2, 4))
    stack.settle()
    stack.controller.evict(4 * P)
    assert prefetched(stack, tokens)
    stats = stack.controller.stats()
    assert stats.host_evicted_tokens == 4 * P
    assert stack.controller.match(tokens).host_num_tokens == 4 * P


def test_as_much_is_fetched_as_the_host_has_room_for() -> None:
    tokens = prompt(1, 6)
    stack = stored(tokens)
    others = stack.host.alloc(60 * P)
    stack.controller.prefetch("req", tokens, ROOT)
    stack.edge.run()
    stack.controller.poll()
    stack.host.free(others)
    stack.edge.run()
    stack.controller.finish_prefetch("req")
    stack.check()
    assert stack.controller.match(tokens).host_num_tokens == 4 * P
    assert stack.controller.stats().prefetch_revoked == 0


def test_capacity_is_never_negative_and_bounds_what_is_asked_for() -> None:
    assert make(device_pages=32, host_pages=32).controller._prefetches.capacity_tokens == int(0.05 * 32 * P)
    assert make(device_pages=32, host_pages=4).controller._prefetches.capacity_tokens == 0
    stack = make(device_pages=4, host_pages=14)
    assert stack.controller._prefetches.capacity_tokens == int(0.8 * 10 * P)
    assert stack.controller.prefetch("a", prompt(1, 8), ROOT)
    assert not stack.controller.prefetch("a", prompt(1, 8), ROOT)  # it is in flight
    assert not stack.controller.prefetch("b", prompt(2, 8), ROOT)
    stack.controller.cancel_prefetch("a")
    assert stack.controller.prefetch("b", prompt(2, 8), ROOT)
    stack.check()


def test_prefetches_in_flight_are_bounded() -> None:
    stack = make(max_prefetches=2, host_pages=256)
    assert [stack.controller.prefetch(str(n), prompt(n, 1), ROOT) for n in range(3)] == [True, True, False]


# ---- when it ends ----------------------------------------------------------------------------------------------------
def half_fetched(policy: str, clock: Any = None, **options: Any) -> Stack:
    """Two of six pages have arrived."""
    stack = stored(prompt(1, 6), prefetch_policy=policy, **({"clock": clock} if clock else {}), **options)
    assert stack.controller.prefetch("req", prompt(1, 6), ROOT)
    assert stack.edge is not None
    stack.edge.step("fetch")  # the look-up
    stack.controller.poll()
    stack.edge.step("fetch")
    status = stack.controller.prefetch_progress("req")
    assert (status.state, status.found_tokens, status.fetched_tokens) == ("fetching", 6 * P, 2 * P)
    return stack


def test_best_effort_takes_what_has_arrived() -> None:
    stack = half_fetched("best_effort")
    assert stack.controller.can_terminate("req")
    assert stack.controller.finish_prefetch("req")
    assert stack.controller.match(prompt(1, 6)).host_num_tokens == 2 * P
    assert stack.controller.stats().stuck_pages == 4  # a call may still write into them
    stack.check()
    stack.settle()
    assert stack.host.available_size() == stack.host.size - 2 * P
    stack.check()


def test_a_fetch_that_ends_while_it_is_asked_for_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker may end between any two questions: whoever hears that it has ended must see all of its pages."""
    stack = half_fetched("wait_complete")
    edge = stack.edge
    assert edge is not None
    job, done = edge.waiting[0][0], Job.done

    def ends_now(asked: Job) -> bool:
        if asked is job:
            monkeypatch.undo()
            edge.run()
        return done(asked)

    monkeypatch.setattr(Job, "done", ends_now)
    assert stack.controller.finish_prefetch("req")
    assert stack.controller.match(prompt(1, 6)).host_num_tokens == 6 * P
    assert stack.controller.stats().prefetch_failures == 0
    stack.check()


def test_failures_count_however_early_a_prefetch_is_ended() -> None:
    """best_effort ends them before a poll sees why they ended."""
    stack = stored(prompt(8, 4), prefetch_policy="best_effort", backoff_failures=3, backoff_base_s=1e6)
    assert stack.edge is not None
    pages = stack.edge.pages
    pages.get_pages = lambda digests, *rest, **more: np.zeros(len(digests), np.bool_)  # type: ignore[method-assign]
    assert stack.controller.prefetch("fetch", prompt(8, 4), ROOT)
    stack.edge.run()
    stack.controller.poll()
    stack.edge.run()
    assert stack.controller.finish_prefetch("fetch")
    assert stack.controller.stats().prefetch_failures == 1

    def broken(*rest: Any, **more: Any) -> int:
        raise RuntimeError("not of storage")

    pages.find_prefix = broken  # type: ignore[method-assign]
    for number in range(2):
        assert stack.controller.prefetch(f"r{number}", prompt(number, 4), ROOT)
        stack.edge.run()
        assert stack.controller.finish_prefetch(f"r{number}")
    assert stack.controller.stats().prefetch_failures == 3
    assert stack.controller.stats().backing_off
    assert not stack.controller.prefetch("r", prompt(9, 4), ROOT)
    stack.check()


def test_wait_complete_waits_for_the_look_up_and_for_every_page() -> None:
    stack = stored(prompt(1, 6))
    stack.controller.prefetch("req", prompt(1, 6), ROOT)
    assert not stack.controller.finish_prefetch("req")  # storage has not answered yet
    stack.controller.poll()
    assert not stack.controller.finish_prefetch("req")
    assert stack.edge is not None
    stack.edge.step()
    assert not stack.controller.finish_prefetch("req")  # it has now
    stack.controller.poll()
    assert not stack.controller.finish_prefetch("req")
    stack.edge.step()
    assert not stack.controller.finish_prefetch("req")
    stack.edge.run()
    assert stack.controller.finish_prefetch("req")  # without a poll in between
    assert stack.controller.match(prompt(1, 6)).host_num_tokens == 6 * P
    stack.check()


def test_a_timeout_ends_what_has_not_arrived() -> None:
    clock = Clock()
    options = {"prefetch_timeout_base_s": 1.0, "prefetch_timeout_per_ki_s": 1024 / (6 * P)}
    stack = half_fetched("timeout", clock, **options)
    clock.now_s += 1.99
    assert not stack.controller.finish_prefetch("req")
    clock.now_s += 0.02
    assert stack.controller.can_terminate("req")
    assert stack.controller.finish_prefetch("req")
    assert stack.controller.match(prompt(1, 6)).host_num_tokens == 2 * P
    stack.settle()
    stack.check()


def test_a_look_up_that_never_answers_is_ended_by_the_timeout() -> None:
    clock = Clock()
    stack = stored(prompt(1, 6), prefetch_policy="timeout", clock=clock)
    stack.controller.prefetch("req", prompt(1, 6), ROOT)
    assert not stack.controller.finish_prefetch("req")
    clock.now_s += 10
    assert stack.controller.finish_prefetch("req")
    assert stack.controller.stats().prefetches_in_flight == 0
    stack.edge.run()
    stack.check()


def test_wait_complete_does_not_wait_for_ever() -> None:
    clock = Clock()
    stack = half_fetched("wait_complete", clock, prefetch_deadline_s=7.0)
    clock.now_s += 6.9
    assert not stack.controller.finish_prefetch("req")
    clock.now_s += 0.2
    assert stack.controller.finish_prefetch("req")
    assert stack.controller.match(prompt(1, 6)).host_num_tokens == 2 * P
    stack.settle()
    stack.check()


@pytest.mark.parametrize("steps", range(8))
def test_a_cancel_at_any_point_frees_every_page_once(steps: int) -> None:
    stack = stored(prompt(1, 6))
    stack.compute(prompt(1, 2))
    stack.settle()
    node = stack.controller.match(prompt(1, 6)).host_node
    stack.controller.prefetch("req", prompt(1, 6)[2 * P :], node)
    assert stack.edge is not None
    for _ in range(steps):
        if not stack.edge.step():
            stack.controller.poll()
    stack.controller.cancel_prefetch("req")
    stack.check()
    assert stack.controller.finish_prefetch("req")
    assert stack.controller.prefetch_progress("req").state == "unknown"
    stack.settle()
    assert stack.host.available_size() == stack.host.size - 2 * P
    assert stack.tree.node_info(node).host_ref == 0
    stack.check()


def test_a_prefix_that_has_gone_takes_the_prefetch_with_it() -> None:
    tokens = prompt(1, 6)
    stack = stored(tokens)
    node = stack.compute(tokens[: 2 * P], backup=False)  # on the device only: nothing keeps it
    stack.controller.prefetch("req", tokens[2 * P :], node)
    stack.edge.run()
    stack.controller.poll()
    stack.edge.run()
    stack.controller.evict(2 * P)
    assert stack.controller.finish_prefetch("req")
    assert len(stack.tree) == 0
    assert stack.host.available_size() == stack.host.size
    stack.check()


def test_what_was_computed_meanwhile_is_not_taken_from_storage() -> None:
    tokens = prompt(1, 6)
    stack = stored(tokens)
    stack.controller.prefetch("req", tokens, ROOT)
    stack.edge.run()
    stack.controller.poll()
    stack.edge.run()
    stack.compute(tokens[: 4 * P], backup=False)
    assert stack.controller.finish_prefetch("req")
    match = stack.controller.match(tokens)
    assert (match.num_tokens, match.host_num_tokens) == (4 * P, 2 * P)
    stats = stack.controller.stats()
    assert (stats.prefetch_tokens, stats.prefetch_late_tokens) == (2 * P, 4 * P)
    stack.check()


def test_wrong_bytes_in_storage_are_a_miss() -> None:
    tokens = prompt(1, 6)
    stack = stored(tokens, storage_batch_pages=1)
    storage = stack.edge.pages.storage
    key = stack.edge.pages.keys(sha256_chain(tokens, P))[3]
    value = bytearray(storage._values[key]) if hasattr(storage, "_values") else None
    assert value is not None, "MemoryStorage keeps its values elsewhere now"
    value[-1] ^= 1
    storage._values[key] = bytes(value)
    prefetched(stack, tokens)
    assert stack.controller.match(tokens).host_num_tokens == 3 * P
    assert stack.edge.pages.counters.corrupt == 1


# ---- attach and detach -----------------------------------------------------------------------------------------------
def test_storage_comes_and_goes() -> None:
    stack = make(storage=None)
    node = stack.compute(prompt(1, 3))
    stack.settle()
    assert stack.controller.store(node) is None
    assert not stack.controller.prefetch("r", prompt(2, 3), ROOT)
    assert stack.controller.detach_storage() is None
    edge = ScriptedEdge(page_store(stack.host), stack.config, stack.host)
    stack.controller.attach_storage(edge)
    with pytest.raises(StateError):
        stack.controller.attach_storage(edge)
    stack.controller.store(node)
    stack.controller.prefetch("r", prompt(2, 3), ROOT)
    stack.check()
    assert stack.controller.detach_storage() is edge
    stack.check()
    assert stack.controller.stats().stuck_pages == 0
    assert (stack.tree.node_info(node).marks, stack.tree.node_info(node).host_ref) == (0, 0)
    stack.controller.attach_storage(ScriptedEdge(page_store(stack.host), stack.config, stack.host))
    assert stack.controller.store(node) is not None  # the new one does not have it


# ---- what nobody ends, and what storage loses ------------------------------------------------------------------------
@pytest.mark.parametrize("stage", ["looking up", "fetching", "fetched"])
def test_a_prefetch_that_nobody_ends_is_ended_by_poll(stage: str) -> None:
    clock = Clock()
    tokens = prompt(1, 6)
    stack = stored(tokens, clock=clock, prefetch_abandon_s=10.0)
    assert stack.edge is not None
    assert stack.controller.prefetch("forgotten", tokens, ROOT)
    if stage != "looking up":
        stack.edge.step()
        stack.controller.poll()
    if stage == "fetched":
        stack.edge.run()
        stack.controller.poll()
        assert stack.controller.prefetch_progress("forgotten").state == "fetched"
    clock.now_s = 9.9
    stack.controller.poll()
    assert stack.controller.stats().prefetches_in_flight == 1
    clock.now_s = 10.0
    stack.controller.poll()
    stack.settle()
    stack.check()
    stats = stack.controller.stats()
    assert (stats.prefetches_in_flight, stats.prefetch_tokens_in_flight, stats.prefetch_abandoned) == (0, 0, 1)
    assert stack.controller.finish_prefetch("forgotten")  # its owner comes after all
    assert stack.controller.evict_host(10**6) == (6 * P if stage == "fetched" else 0)
    assert stack.host.available_size() == stack.host.size
    assert stack.controller.prefetch("forgotten", tokens, ROOT)


def test_only_overdue_prefetches_are_ended() -> None:
    clock = Clock()
    stack = stored([prompt(1, 3), prompt(2, 3)], clock=clock, prefetch_abandon_s=10.0)
    stack.controller.prefetch("old", prompt(1, 3), ROOT)
    clock.now_s = 5.0
    stack.controller.prefetch("young", prompt(2, 3), ROOT)
    clock.now_s = 12.0
    stack.controller.poll()
    assert stack.controller.prefetch_progress("old").state == "unknown"
    assert stack.controller.prefetch_progress("young").state != "unknown"
    stack.check()


def puts_of(stack: Stack) -> list[int]:
    """Pages of each put from now on."""
    assert stack.edge is not None
    put_many, puts = stack.edge.pages.storage.put_many, []

    def count(keys: Any, *arguments: Any, **more: Any) -> Any:
        puts.append(len(keys))
        return put_many(keys, *arguments, **more)

    stack.edge.pages.storage.put_many = count
    return puts


def test_what_storage_has_lost_is_stored_again_when_it_is_hit() -> None:
    clock = Clock()
    stack = make(clock=clock, recheck_stored_s=5.0, storage_batch_pages=8)
    tokens, others = prompt(1, 6), prompt(2, 3)
    for each in (tokens, others, tokens, others):
        stack.compute(each)
        stack.settle()
    assert keys_of(stack, tokens) == [True] * 6
    assert stack.edge is not None
    keys = stack.edge.pages.keys(sha256_chain(tokens, P))
    stack.edge.pages.storage.delete_many(keys[4:])  # as a budget would
    puts = puts_of(stack)
    stack.controller.poll()
    assert stack.controller.stats().stored_doubts == 1
    for _ in range(3):  # found missing by the first hit; from then on known again
        for each in (tokens, others):
            stack.compute(each)
            stack.settle()
    assert keys_of(stack, tokens) == [True] * 6
    assert puts == [2], "only what was missing is written, once"
    assert {info.marks for info in stack.tree.dump()} == {STORED}
    stack.edge.pages.storage.delete_many(keys[:1])  # too soon
    stack.controller.poll()
    stack.compute(tokens)
    stack.settle()
    assert keys_of(stack, tokens)[0] is False
    clock.now_s = 5.0
    stack.controller.poll()
    stack.compute(tokens)
    stack.settle()
    assert keys_of(stack, tokens) == [True] * 6
    stack.check()


def test_a_file_storage_that_evicts_gets_hot_pages_back(tmp_path: Path) -> None:
    """Its budget holds two prompts of three, each a file of its own; one of them is served all the time."""
    with FileStorage(tmp_path, max_bytes=2 * 8192) as storage:
        stack = make(storage=storage, recheck_stored_s=0.0, storage_batch_pages=64)
        hot = prompt(1, 16)
        for seed in [1, 1, 2, 2, 3, 3, 1]:
            stack.compute(prompt(seed, 16))
            stack.settle()
        assert storage.stats()["evicted_values"] > 0
        assert keys_of(stack, hot) == [True] * 16
        stack.controller.reset()
        assert prefetched(stack, hot)
        assert stack.controller.match(hot).host_num_tokens == 16 * P
        stack.check()


def test_without_losses_marks_are_trusted() -> None:
    stack = make()
    for _ in range(2):
        stack.compute(prompt(1, 3))
        stack.settle()
    puts = puts_of(stack)
    stack.edge.pages.find_prefix = None  # type: ignore[method-assign, assignment]
    for _ in range(3):
        stack.compute(prompt(1, 3))
        stack.settle()
    assert (puts, stack.controller.stats().stored_doubts) == ([], 0)
