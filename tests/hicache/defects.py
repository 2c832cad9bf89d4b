"""What must not come back: scenarios over the API that both caches have, each of which the original fails.

test_defects.py runs them: radixkv passes every one, and the original fails every one with ``fails_with``, which shows
that the scenario can fail. ``also``: tests of radixkv that look at the same defect from inside.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from radixkv.errors import StorageError

from . import content
from .engine import Request
from .original.kit import PAGE, A, B, C, end_of, expected, put, settled, wrong_kv
from .sides import Setup, Side, wait_for


@dataclass(frozen=True)
class Scenario:
    """One defect. options: of Setup; control: of radixkv's ControllerConfig."""

    name: str
    run: Callable[[Side], None]
    options: dict[str, Any]
    control: dict[str, Any]
    fails_with: tuple[type[BaseException], ...]
    also: tuple[str, ...] = ()

    def setup(self) -> Setup:
        return Setup(**{"device_tokens": 16 * PAGE, "host_ratio": 2.0, "prefetch_threshold": PAGE, **self.options})


@dataclass
class _Scenarios:
    found: list[Scenario] = field(default_factory=list)

    def __call__(
        self,
        *,
        control: dict[str, Any] | None = None,
        fails_with: tuple[type[BaseException], ...] = (AssertionError,),
        also: tuple[str, ...] = (),
        **options: Any,
    ) -> Callable[[Callable[[Side], None]], Callable[[Side], None]]:
        def add(run: Callable[[Side], None]) -> Callable[[Side], None]:
            variants = options.get("kind", "mha")
            for kind in [variants] if isinstance(variants, str) else variants:
                name = run.__name__ if isinstance(variants, str) else f"{run.__name__}-{kind}"
                chosen = {**options, "kind": kind}
                self.found.append(Scenario(name, run, chosen, control or {}, fails_with, also))
            return run

        return add


scenario = _Scenarios()


# ---- parts -----------------------------------------------------------------------------------------------------------
def drained(side: Side) -> None:
    """Everything that follows from what was started has happened, and the cache knows."""
    for _ in range(3):
        settled(side)


def calls_of(function: Callable[[], object]) -> int:
    """Functions, of Python and of C, that a call calls in all, on this thread."""
    count = 0

    def seen(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def copied(side: Side, key: list[int]) -> bool:
    """Whether the cache knows by now that the copy of a key's last node to the host is done: it unlocks the node."""
    side.cache.check_hicache_events()
    return end_of(side, key).lock_ref == 0


def store(side: Side, key: list[int]) -> None:
    """Insert twice: to the host, then to storage."""
    for _ in range(2):
        put(side, key)
        drained(side)
    assert end_of(side, key).backuped_storage


def forget(side: Side) -> None:
    """Nothing is on the device or on the host any more."""
    side.cache.evict(side.setup.device_tokens)
    side.cache.evict_host(side.host_tokens())
    assert side.host_free_tokens() == side.host_tokens()


def fetch(side: Side, key: list[int], rid: str = "r") -> int:
    """Prefetch a whole key. Returns: tokens of it that are on the host now."""
    side.cache.prefetch_from_storage(rid, side.cache.root_node, key, None)
    drained(side)
    wait_for(lambda: bool(side.cache.check_prefetch_progress(rid)), lambda: "the prefetch goes on", 5.0)
    return int(side.cache.match_prefix(key).host_hit_length)


def load(side: Side, key: list[int]) -> Any:
    """Load a key back and wait for it. Returns: its slots, or None."""
    match = side.cache.match_prefix(key)
    slots = side.cache.load_back(match.last_host_node)
    side.cache.ready_to_load_host_cache()
    settled(side)
    return slots


def kept_host_tokens(side: Side) -> int:
    """Host slots that nodes hold."""
    total, todo = 0, list(side.cache.root_node.children.values())
    while todo:
        node = todo.pop()
        total += len(node.key) if node.backuped else 0
        todo += node.children.values()
    return total


# ---- the design's list -----------------------------------------------------------------------------------------------
@scenario(storage=True, also=("tests/controller/test_storage.py::test_a_child_stored_before_its_parent",))
def child_stored_before_its_parents_ack_has_its_own_keys(side: Side) -> None:
    page = B[:PAGE]
    put(side, A)
    drained(side)
    with side.valve.hold("set"):
        put(side, A)
        put(side, A + page)
        side.begin_copies()
        wait_for(lambda: copied(side, A + page), lambda: "no second copy")
        put(side, A + page)
    drained(side)
    put(side, A + page)  # radixkv stores it now at the latest
    drained(side)
    forget(side)
    assert fetch(side, page) == 0, "what was computed after A is served as the beginning of another prompt"
    assert fetch(side, A + page, "again") == len(A) + PAGE
    assert not wrong_kv(side, A + page, "host")


@scenario(storage=True, also=("tests/controller/test_storage.py::test_a_split_while_it_is_stored",))
def split_during_a_store_leaves_each_part_its_own_hashes(side: Side) -> None:
    put(side, A)
    drained(side)
    with side.valve.hold("set"):
        put(side, A)
        side.cache.match_prefix(A[: 2 * PAGE])
    drained(side)
    lower = end_of(side, A)
    assert lower.parent.hash_value == content.chain(A, PAGE)[:2]
    assert lower.hash_value == content.chain(A, PAGE)[2:]


@scenario(storage=True)
def node_is_not_stored_again_while_its_store_runs(side: Side) -> None:
    put(side, A)
    drained(side)
    with side.valve.hold("set"):
        for _ in range(3):
            put(side, A)
        assert end_of(side, A).host_ref_counter == 1
    drained(side)
    assert side.valve.calls["set"] <= 4, "more calls than pages"


@scenario(storage=True, prefetch_policy="wait_complete")
def wait_complete_waits_for_the_look_up(side: Side) -> None:
    store(side, A[:PAGE])
    forget(side)
    with side.valve.hold("exists"):
        side.cache.prefetch_from_storage("r", side.cache.root_node, A[:PAGE], None)
        side.cache.check_hicache_events()
        assert not side.cache.check_prefetch_progress("r"), "the storage has not even answered"
    drained(side)
    assert side.cache.check_prefetch_progress("r")
    assert side.cache.match_prefix(A[:PAGE]).host_hit_length == PAGE


@scenario(write_policy="write_through_selective", also=("tests/controller/test_backup.py::test_evicting_an_unbacked",))
def evicting_an_unbacked_node_frees_the_host_slots_below_it(side: Side) -> None:
    put(side, A)
    put(side, A + B)
    assert side.cache.write_backup(end_of(side, A + B)) == len(B)
    settled(side)
    side.cache.evict(len(B))
    assert side.cache.match_prefix(A + B).host_hit_length == len(B)
    side.cache.evict(len(A))
    assert side.host_free_tokens() + kept_host_tokens(side) == side.host_tokens()


@scenario(write_policy="write_back", device_tokens=4 * PAGE, host_ratio=1.25)
def write_back_with_a_full_host_drops(side: Side) -> None:
    put(side, A)
    side.cache.evict(len(A))
    end_of(side, A).protect_host()
    put(side, B)
    side.cache.evict(len(B))
    assert side.allocator.available_size() == side.setup.device_tokens
    assert not side.cache.match_prefix(B).host_hit_length
    assert side.cache.match_prefix(A).host_hit_length == len(A)


@scenario(storage=True)
def reset_ends_no_thread(side: Side) -> None:
    """The original ends its threads and makes new ones, each of which looks once a second whether it is to end;
    bench/bench_hicache.py has the time."""
    put(side, A)
    put(side, A)
    threads = set(threading.enumerate())
    side.cache.reset()
    assert set(threading.enumerate()) == threads


@scenario(storage=True)
def reset_leaves_no_operation_behind(side: Side) -> None:
    put(side, A)
    put(side, A)
    side.cache.reset()
    cache = side.cache
    left = cache.ongoing_write_through, cache.ongoing_load_back, cache.ongoing_prefetch, cache.ongoing_backup
    assert [len(one) for one in left] == [0, 0, 0, 0]


@scenario(storage=True)
def reset_forgets_prefetches(side: Side) -> None:
    store(side, A[:PAGE])
    with side.valve.hold("exists"):
        side.cache.prefetch_from_storage("r", side.cache.root_node, A[:PAGE], None)
    side.settle()
    side.cache.reset()
    side.allocator.clear()
    assert side.cache.check_prefetch_progress("r")
    assert not side.cache.match_prefix(A[:PAGE]).host_hit_length
    assert side.host_free_tokens() == side.host_tokens()


@scenario(layout="page_first", kind=("mha", "mla"))
def page_first_loads_every_layer(side: Side) -> None:
    put(side, A)
    settled(side)
    side.cache.evict(len(A))
    assert load(side, A) is not None
    assert not wrong_kv(side, A, "device")


@scenario(write_policy="write_through_selective", device_tokens=4096 * PAGE, host_ratio=1.01)
def evict_does_not_walk_the_tree(side: Side) -> None:
    """What evicting one leaf of 50 calls, and of 3,000; bench/callgrind counts what compiled code does inside."""

    def grow(leaves: range) -> None:
        for leaf in leaves:
            slots = side.allocator.alloc(PAGE)
            side.cache.insert([100_000 + leaf, *A[1:PAGE]], slots)

    grow(range(65))
    few = calls_of(lambda: side.cache.evict(PAGE))
    grow(range(100, 3_100))
    assert calls_of(lambda: side.cache.evict(PAGE)) <= 2 * few


@scenario()
def load_is_not_over_while_another_rank_still_loads(side: Side) -> None:
    put(side, A)
    settled(side)
    side.cache.evict(len(A))
    side.cache.load_back(side.cache.match_prefix(A).last_host_node)
    side.cache.ready_to_load_host_cache()
    side.settle()
    with side.lagging_rank():
        side.cache.check_hicache_events()
        assert end_of(side, A).loading
    side.cache.check_hicache_events()
    assert not end_of(side, A).loading


# ---- reported by users of this class of system -----------------------------------------------------------------------
@scenario(write_policy="write_back", device_tokens=4 * PAGE, host_ratio=1.25)
def load_back_keeps_the_host_pages_that_it_reads(side: Side) -> None:
    put(side, A)
    side.cache.evict(len(A))
    put(side, B)
    slots = load(side, A)
    assert slots is not None
    assert (side.device_rows(slots) == expected(side, A)).all(), "the request got other KV"
    assert not wrong_kv(side, A, "device")


@scenario(storage=True, fails_with=(AssertionError, TimeoutError))
def store_that_fails_is_not_visible(side: Side) -> None:
    put(side, A[:PAGE])
    drained(side)
    with side.valve.fail("set", StorageError("no room")):
        put(side, A[:PAGE])
        drained(side)
    assert not end_of(side, A[:PAGE]).backuped_storage
    forget(side)
    assert fetch(side, A[:PAGE]) == 0
    side.advance(60.0)  # longer than any pause after failures
    store(side, A[:PAGE])
    forget(side)
    assert fetch(side, A[:PAGE], "again") == PAGE


@scenario(storage=True, fails_with=(AssertionError, TimeoutError))
def torn_values_are_misses(side: Side) -> None:
    store(side, A[:PAGE])
    forget(side)
    side.tear_storage()
    assert fetch(side, A[:PAGE]) == 0
    side.advance(60.0)
    store(side, B[:PAGE])
    forget(side)
    assert fetch(side, B[:PAGE], "next") == PAGE, "the storage path goes on"


@scenario(storage=True, fails_with=(AttributeError,))
def prefetch_of_an_aborted_request_gives_everything_back(side: Side) -> None:
    store(side, A[:PAGE])
    forget(side)
    side.cache.prefetch_from_storage("r", side.cache.root_node, A[:PAGE], None)
    drained(side)
    side.cache.cancel_prefetch("r")
    drained(side)
    assert side.host_free_tokens() == side.host_tokens()
    assert side.cache.root_node.host_ref_counter == 0


def _evict_elsewhere(side: Side, tokens: int) -> threading.Thread:
    thread = threading.Thread(target=side.cache.evict, args=(tokens,), daemon=True)
    thread.start()
    return thread


@scenario(write_policy="write_back", control={"copy_timeout_s": 0.1})
def write_back_has_a_deadline(side: Side) -> None:
    put(side, A)
    with side.valve.hold("backup"):
        evicting = _evict_elsewhere(side, len(A))
        evicting.join(2.0)
        returned = not evicting.is_alive()
    evicting.join(10.0)
    assert returned, "evict waits for a copy that does not come"
    drained(side)
    assert side.host_free_tokens() + kept_host_tokens(side) == side.host_tokens()


@scenario(write_policy="write_back", control={"copy_timeout_s": 0.1})
def write_back_that_fails_does_not_wait(side: Side) -> None:
    put(side, A)
    with side.valve.fail("backup", OSError("no device")):
        evicting = _evict_elsewhere(side, len(A))
        evicting.join(2.0)
        returned = not evicting.is_alive()
    if not returned:  # what the original never gets
        side.cache.cache_controller.ack_write_queue.put(end_of(side, A).id)
        evicting.join(10.0)
    assert returned, "evict waits for an ack that cannot come"
    assert side.allocator.available_size() == side.setup.device_tokens
    assert side.host_free_tokens() == side.host_tokens()


@scenario(storage=True, device_tokens=4 * PAGE, host_ratio=1.25)
def prefetch_of_a_miss_evicts_nothing(side: Side) -> None:
    put(side, A)
    settled(side)
    side.cache.evict(len(A))
    side.cache.prefetch_from_storage("r", side.cache.root_node, B, None)
    drained(side)
    assert side.cache.match_prefix(A).host_hit_length == len(A)


# ---- found while comparing -------------------------------------------------------------------------------------------
@scenario(storage=True)
def page_is_not_stored_before_its_copy_to_the_host_is_there(side: Side) -> None:
    key = A[:PAGE]
    with side.valve.hold("backup"):
        put(side, key)
        put(side, key)
        wait_for(lambda: not side.storing(), lambda: "a store that does not end")
    drained(side)
    put(side, key)
    drained(side)
    forget(side)
    assert fetch(side, key) == PAGE
    assert not wrong_kv(side, key, "host")


@scenario()
def copy_that_failed_is_no_copy(side: Side) -> None:
    with side.valve.fail("backup", OSError("no device")):
        put(side, A)
        settled(side)
    assert not end_of(side, A).backuped
    assert end_of(side, A).lock_ref == 0
    assert side.host_free_tokens() == side.host_tokens()
    put(side, A)
    settled(side)
    assert not wrong_kv(side, A, "host")


@scenario(storage=True)
def every_page_of_a_fetch_has_its_own_bytes(side: Side) -> None:
    store(side, A)
    forget(side)
    assert fetch(side, A) == len(A)
    assert not wrong_kv(side, A, "host")


@scenario()
def row_of_a_request_names_no_page_that_was_freed(side: Side) -> None:
    prompt, half = A[: 2 * PAGE], PAGE + PAGE // 2

    def begin(rid: str) -> Request:
        request = Request(rid, 0, prompt, side.req_to_token_pool.alloc(1)[0], torch.empty(0, dtype=torch.int64),
                          side.cache.root_node)  # fmt: skip
        slots = side.allocator.alloc(2 * PAGE)
        side.write(slots, expected(side, prompt))
        side.req_to_token_pool.write((request.req_pool_idx, slice(0, 2 * PAGE)), slots.int())
        return request

    def cache(request: Request, tokens: int) -> None:
        request.fill_ids = prompt[:tokens]
        side.cache.cache_unfinished_req(request)

    one, two = begin("one"), begin("two")
    cache(two, half)
    cache(one, 2 * PAGE)
    cache(two, 2 * PAGE)
    row = side.req_to_token_pool.req_to_token[two.req_pool_idx, : 2 * PAGE].long()
    assert (row == side.cache.match_prefix(prompt).device_indices).all()


@scenario(fails_with=(TypeError,))
def all_values_flatten_after_an_eviction(side: Side) -> None:
    put(side, A)
    put(side, B)
    put(side, C)
    settled(side)
    side.cache.evict(len(A))
    assert len(side.cache.all_values_flatten()) == len(B) + len(C)
