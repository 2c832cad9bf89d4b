"""The defects of the original, and those that users of such systems report: radixkv has none of them.

The scenarios are in defects.py. Each is also run on the original, which has the defect: that a scenario fails there is
the proof that it would fail here without the fix. What a CPU or one process can't show is tested elsewhere: copies that
race the forward pass (tests/controller/test_mover_cuda.py), MLA stored once for all ranks
(tests/controller/test_group.py::test_of_mla_rank_0_stores_for_all).
"""

from __future__ import annotations

import pytest

from radixkv.hicache import MHATokenToKVPoolHost
from radixkv.pool.host import HostPoolConfig

from . import sides
from .defects import PAGE, Scenario, calls_of, fetch, forget, load, scenario, store
from .gate import original_or_skip
from .original.kit import A, B, end_of, expected, put, settled
from .sides import Setup, Side, make_original, make_ours, wait_for

SCENARIOS = [pytest.param(one, id=one.name) for one in scenario.found]


@pytest.mark.parametrize("one", SCENARIOS)
def test_radixkv_does_not_have(one: Scenario) -> None:
    with make_ours(one.setup(), **one.control) as side:
        one.run(side)
        side.settle()
        side.cache.check_integrity()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@pytest.mark.parametrize("one", SCENARIOS)
def test_the_original_has(one: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    original_or_skip()
    monkeypatch.setattr(sides, "SETTLE_S", 3.0)
    with make_original(one.setup(), poll_s=0.01) as side, pytest.raises(one.fails_with):
        one.run(side)


# ---- what the original is too simple to do wrong ---------------------------------------------------------------------
def ours(**options: object) -> Side:
    defaults: dict[str, object] = {"device_tokens": 16 * PAGE, "host_ratio": 2.0, "prefetch_threshold": PAGE}
    return make_ours(Setup(**{**defaults, **options}))  # type: ignore[arg-type]


def test_reset_waits_for_nothing_that_is_queued() -> None:
    """Storage hangs in one call and more are queued: a reset returns meanwhile, and none of them is made later."""
    chats = [[start] * 2 * PAGE for start in range(1, 9)]
    with ours(device_tokens=32 * PAGE, storage=True) as side:
        for chat in chats:
            put(side, chat)
        settled(side)
        with side.valve.hold("set"):
            for chat in chats:
                assert side.cache.write_backup_storage(end_of(side, chat)) is not None
            assert len(side.cache.ongoing_backup) == len(chats)
            wait_for(lambda: side.valve.calls["set"] == 1, lambda: "no store has begun")
            side.cache.reset()
            assert not side.cache.ongoing_backup
        side.settle()
        side.cache.check_hicache_events()
        assert side.valve.calls["set"] == 1
        assert side.host_free_tokens() == side.host_tokens()


def test_insert_frees_no_slot_that_a_load_writes_to() -> None:
    """A prompt is computed again while its load is under way: the load's slots stay its own until it has ended."""
    with ours(device_tokens=12 * PAGE) as side:
        put(side, A)
        settled(side)
        side.cache.evict(len(A))
        with side.valve.hold("load"):
            loading = side.cache.load_back(side.cache.match_prefix(A).last_host_node)
            side.cache.ready_to_load_host_cache()
            assert put(side, A) == len(A)
            side.cache.evict(side.setup.device_tokens)
            rest = side.allocator.alloc(side.allocator.available_size())
            assert not set(rest.tolist()) & set(loading.tolist())
            side.write(rest, expected(side, B * 2))
        settled(side)
        assert (side.device_rows(loading) == expected(side, A)).all()
        assert (side.device_rows(rest) == expected(side, B * 2)).all()


def test_request_that_is_aborted_while_its_load_runs_leaks_nothing() -> None:
    with ours() as side:
        put(side, A)
        settled(side)
        side.cache.evict(len(A))
        with side.valve.hold("load"):
            slots, node = side.cache.init_load_back(side.cache.match_prefix(A).last_host_node, len(A))
            side.cache.inc_lock_ref(node)
            side.cache.ready_to_load_host_cache()
            side.cache.dec_lock_ref(node)  # the abort
            assert len(slots) == len(A)
            side.cache.evict(len(A))
            assert side.allocator.available_size() == side.setup.device_tokens - len(A)
        settled(side)
        side.cache.evict(len(A))
        assert side.allocator.available_size() == side.setup.device_tokens
        side.cache.evict_host(side.host_tokens())
        assert side.host_free_tokens() == side.host_tokens()


def test_pages_that_have_not_arrived_are_not_served() -> None:
    """best_effort ends a prefetch in the middle of a read: nothing of what is still being written can be matched."""
    with ours(storage=True, prefetch_policy="best_effort") as side:
        store(side, A)
        forget(side)
        with side.valve.hold("get"):
            side.cache.prefetch_from_storage("r", side.cache.root_node, A, None)
            sides.wait_for(lambda: _get_began(side), lambda: "no read has begun")
            assert side.cache.check_prefetch_progress("r")
            assert side.cache.match_prefix(A).host_hit_length == 0
        settled(side)
        settled(side)
        assert side.host_free_tokens() == side.host_tokens()


def _get_began(side: Side) -> bool:
    side.cache.check_hicache_events()
    return bool(side.valve.calls["get"])


def test_host_pool_is_exact_and_is_made_in_one_piece() -> None:
    """Not a power of two, and not page by page: one of 1,000 times as many pages takes no more calls."""

    def calls(tokens: int) -> int:
        with ours(device_tokens=tokens) as side:
            return calls_of(lambda: MHATokenToKVPoolHost(
                side.device_pool, 3.0, 0, PAGE, "layer_first", config=HostPoolConfig(headroom_bytes=0)
            ))  # fmt: skip

    calls(10 * PAGE)  # what is called once in a process
    assert calls(10_000 * PAGE) < 1.2 * calls(10 * PAGE)
    tokens = 1_000 * PAGE
    with ours(device_tokens=tokens, host_ratio=3.0) as side:
        pool = side.cache.token_to_kv_pool_host
        assert pool.size == 3 * tokens
        assert pool.kv_buffer.nbytes == 3 * tokens * pool.size_per_token


def test_restart_of_the_memory_serves_from_storage() -> None:
    """The way of all of these scenarios, when nothing goes wrong."""
    with ours(storage=True) as side:
        store(side, A)
        forget(side)
        assert fetch(side, A) == len(A)
        slots = load(side, A)
        assert (side.device_rows(slots) == expected(side, A)).all()
        assert end_of(side, A).lock_ref == 0
