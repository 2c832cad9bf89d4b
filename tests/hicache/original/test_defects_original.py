"""What the original does wrong, each shown on the original itself: the reasons behind rules.py and test_defects.py.

Not reproduced here, because they need a GPU or are of later releases: copies that race the forward pass, pinned pools
that are slow to allocate or rounded up, inserts that free the target of a running copy.
"""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import Any

import pytest
import torch

from .. import content
from ..engine import Request
from ..gate import original_or_skip
from ..sides import LAYERS, wait_for
from .kit import PAGE, A, B, end_of, expected, make, put, settled, stored, wrong_kv

chain = partial(content.chain, page_size=PAGE)


@pytest.fixture(scope="module", autouse=True)
def _original() -> None:
    original_or_skip()


# ---- named in the design's list --------------------------------------------------------------------------------------
def test_child_is_stored_under_the_keys_of_another_prefix() -> None:
    """A child backed up before its parent's ack chains from nothing; a prompt that begins with it is given its KV."""
    page = B[:PAGE]
    with make(storage=True) as side:
        put(side, A)
        settled(side)
        with side.world.valve.hold("set"):
            put(side, A)  # the second hit: A goes to storage, and is held there
            put(side, A + page)
            wait_for(side.controller.write_queue.idle, lambda: "a copy to the host is under way")
            put(side, A + page)
        settled(side)
        assert chain(A + page)[-1] not in stored(side), "what follows A is not under its own key"
        assert chain(page)[0] in stored(side), "but under that of a prompt that begins with it"
        side.cache.evict(16 * PAGE)
        side.cache.evict_host(32 * PAGE)
        side.cache.prefetch_from_storage("r", side.cache.root_node, page, None)
        side.settle()
        assert side.cache.check_prefetch_progress("r")
        assert side.cache.match_prefix(page).host_hit_length == PAGE
        served = side.host_rows(end_of(side, page).host_value)
        assert (served == expected(side, A + page)[-PAGE:]).all(), "what was computed after A begins another prompt"


def test_pages_of_one_fetch_all_get_the_bytes_of_the_last() -> None:
    with make(storage=True) as side:
        put(side, A)
        settled(side)
        put(side, A)
        settled(side)
        side.cache.evict(16 * PAGE)
        side.cache.evict_host(32 * PAGE)
        side.cache.prefetch_from_storage("r", side.cache.root_node, A, None)
        side.settle()
        assert side.cache.check_prefetch_progress("r")
        served = side.host_rows(end_of(side, A).host_value)
        last = expected(side, A)[-PAGE:]
        assert all((served[start : start + PAGE] == last).all() for start in range(0, len(A), PAGE))


def test_split_during_a_backup_gives_the_lower_node_all_hashes() -> None:
    with make(storage=True) as side:
        put(side, A)
        settled(side)
        with side.world.valve.hold("set"):
            put(side, A)
            side.cache.match_prefix(A[: 2 * PAGE])
        settled(side)
        lower = end_of(side, A)
        assert (len(lower.key), len(lower.hash_value)) == (2 * PAGE, 4)
        assert lower.parent.hash_value is None


def test_node_is_stored_again_while_its_first_backup_runs() -> None:
    with make(storage=True) as side:
        put(side, A)
        settled(side)
        with side.world.valve.hold("set"):
            put(side, A)
            put(side, A)
            put(side, A)
            assert len(side.cache.ongoing_backup) == 3
            assert end_of(side, A).host_ref_counter == 3


def test_wait_complete_ends_before_the_storage_has_answered() -> None:
    with make(storage=True, prefetch_policy="wait_complete") as side:
        put(side, A)
        settled(side)
        put(side, A)
        settled(side)
        side.cache.evict(16 * PAGE)
        side.cache.evict_host(32 * PAGE)
        with side.world.valve.hold("exists"):
            side.cache.prefetch_from_storage("r", side.cache.root_node, A, None)
            assert side.cache.check_prefetch_progress("r"), "0 of 0 pages counts as complete"
        side.settle()
        assert side.cache.match_prefix(A).host_hit_length == 0, "all of it is in storage, and nothing came"


def test_evicting_an_unbacked_node_loses_its_host_only_children() -> None:
    with make(write_policy="write_through_selective") as side:
        put(side, A)
        put(side, A + B)
        assert side.cache.write_backup(end_of(side, A + B)) == len(B)
        settled(side)
        side.cache.evict(len(B))
        assert side.cache.match_prefix(A + B).host_hit_length == len(B)
        side.cache.evict(len(A))
        assert not side.cache.root_node.children
        assert side.host_free_tokens() == side.host_tokens() - len(B), "slots of no node, never free again"


def test_write_back_with_a_full_host_asserts() -> None:
    with make(write_policy="write_back", device_tokens=4 * PAGE, host_ratio=1.25) as side:
        put(side, A)
        side.cache.evict(len(A))
        end_of(side, A).protect_host()  # as a running storage operation does
        put(side, B)
        with pytest.raises(AssertionError):
            side.cache.evict(len(B))


def test_reset_takes_a_second_and_leaves_operations_behind() -> None:
    with make(poll_s=None, storage=True) as side:
        put(side, A)
        start = time.monotonic()
        side.cache.reset()
        assert time.monotonic() - start > 0.5
        assert side.cache.ongoing_write_through, "an operation on a node that is gone"


def test_reset_counts_prefetches_that_are_gone() -> None:
    with make(storage=True) as side:
        with side.world.valve.hold("exists"):
            side.cache.prefetch_from_storage("r", side.cache.root_node, A, None)
        side.cache.reset()
        assert side.cache.ongoing_prefetch
        assert side.controller.prefetch_tokens_occupied == len(A)


@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_page_first_loads_lose_the_layer(kind: str) -> None:
    """The calls for layer 0, 1, 2 name one and the same source: each layer gets the KV of layer 0."""
    with make(layout="page_first", kind=kind) as side:
        put(side, A)
        settled(side)
        assert not wrong_kv(side, A, "host")
        side.cache.evict(len(A))
        host = side.cache.token_to_kv_pool_host
        globals_of = host.load_to_device_per_layer.__globals__
        name = "transfer_kv_per_layer_pf_lf" if kind == "mha" else "transfer_kv_per_layer_mla_pf_lf"
        transfer, sources = globals_of[name], []

        def recorded(**arguments: Any) -> None:
            sources.append({k: v for k, v in arguments.items() if not k.startswith("dst") and torch.is_tensor(v)})
            transfer(**arguments)

        globals_of[name] = recorded
        match = side.cache.match_prefix(A)
        side.cache.init_load_back(match.last_host_node, match.host_hit_length)
        side.cache.ready_to_load_host_cache()
        settled(side)
        assert len(sources) == LAYERS
        pointers = {tuple(one.data_ptr() for name, one in s.items() if name != "src_indices") for s in sources}
        assert len(pointers) == 1
        halves = 1 if kind == "mla" else 2
        assert wrong_kv(side, A, "device") == tuple(p for p in range(halves * LAYERS) if p % LAYERS)


def test_evict_walks_the_whole_tree() -> None:
    def looks(leaves: int) -> int:
        """Nodes looked at in order to evict one page."""
        with make(device_tokens=64 * PAGE, write_policy="write_through_selective") as side:
            for leaf in range(leaves):
                put(side, [5_000 + leaf, *A[1:PAGE]])
            node_class = type(side.cache.root_node)
            seen: list[int] = []
            evicted = node_class.evicted
            node_class.evicted = property(lambda node: seen.append(1) or evicted.fget(node))
            side.cache.evict(PAGE)
            return len(seen)

    assert looks(40) > 3 * looks(10)


def test_load_acks_are_not_agreed_between_ranks() -> None:
    with make(storage=True) as side:
        calls: list[str] = []
        side.cache.tp_world_size = 2
        torch_shim = side.world.module("torch")
        torch_shim.distributed = Recorder(calls)  # type: ignore[attr-defined]
        for check in ("writing_check", "loading_check", "check_revoked_prefetch", "check_backup_progress"):
            calls.clear()
            getattr(side.cache, check)()
            assert len(calls) == (check != "loading_check"), check


class Recorder:
    """torch.distributed that counts."""

    ReduceOp = torch.distributed.ReduceOp

    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def all_reduce(self, tensor: Any, **options: Any) -> None:
        self._calls.append("all_reduce")


# ---- reported by users of this class of system -----------------------------------------------------------------------
def test_load_back_evicts_the_host_pages_that_it_loads() -> None:
    """write_back: making room for a load backs others up, and their room on the host is taken from the load itself."""
    with make(write_policy="write_back", device_tokens=4 * PAGE, host_ratio=1.25) as side:
        put(side, A)
        side.cache.evict(len(A))
        put(side, B)
        match = side.cache.match_prefix(A)
        assert match.host_hit_length == len(A)
        loaded = side.cache.load_back(match.last_host_node)
        assert loaded is not None
        side.cache.ready_to_load_host_cache()
        settled(side)
        assert side.cache.match_prefix(A).host_hit_length + len(side.cache.match_prefix(A).device_indices) == 0
        assert (side.device_rows(loaded) != expected(side, A)).any(), "the request got B's KV for A"


def test_store_that_was_cut_off_stays_visible_and_kills_the_fetch_thread() -> None:
    with make(storage=True) as side:
        assert side.storage_folder is not None
        for key in chain(A):
            (side.storage_folder / f"{key}.bin").write_bytes(b"torn")
        died: list[Any] = []
        original_hook, threading.excepthook = threading.excepthook, died.append
        try:
            side.cache.prefetch_from_storage("r", side.cache.root_node, A, None)
            wait_for(lambda: bool(died), lambda: "the fetch thread lives")
        finally:
            threading.excepthook = original_hook
        assert "prefetch_io_aux_func" in died[0].thread.name
        assert not side.cache.check_prefetch_progress("r"), "wait_complete: it waits for ever"


def test_aborted_prefetch_keeps_its_pages() -> None:
    """No call gives a prefetch up; a request that is aborted while it waits leaves pages taken and a node protected."""
    with make(storage=True) as side:
        put(side, A)
        settled(side)
        put(side, A)
        settled(side)
        side.cache.evict(16 * PAGE)
        side.cache.evict_host(32 * PAGE)
        side.cache.prefetch_from_storage("r", side.cache.root_node, A, None)
        settled(side)
        assert side.host_free_tokens() == side.host_tokens() - len(A)
        assert side.cache.root_node.host_ref_counter == 1
        assert not [name for name in dir(side.cache) if "abort" in name or "cancel" in name]


@pytest.mark.parametrize("fails", [False, True], ids=["slow", "failed"])
def test_write_back_waits_for_ever(fails: bool) -> None:
    """evict waits for its copies without a deadline; after a failed one, for an ack that cannot come."""
    with make(write_policy="write_back") as side:
        put(side, A)
        valve = side.world.valve
        with valve.fail("backup", OSError("no device")) if fails else valve.hold("backup"):
            evicting = threading.Thread(target=side.cache.evict, args=(len(A),), daemon=True)
            evicting.start()
            wait_for(lambda: valve.calls["backup"] == 1, lambda: "no copy has begun")
            if fails:
                side.settle()
            evicting.join(0.2)
            assert evicting.is_alive()
        if fails:
            side.controller.ack_write_queue.put(end_of(side, A).id)  # what the original never does
        evicting.join(10)
        assert not evicting.is_alive()


def test_prefetch_of_what_is_not_stored_evicts_from_the_host() -> None:
    with make(storage=True, host_ratio=1.25, device_tokens=4 * PAGE) as side:
        put(side, A)
        settled(side)
        side.cache.evict(len(A))
        assert side.cache.match_prefix(A).host_hit_length == len(A)
        side.cache.prefetch_from_storage("r", side.cache.root_node, B, None)
        settled(side)
        assert side.world.valve.calls["get"] == 0
        assert side.cache.match_prefix(A).host_hit_length == 0


def test_mla_is_stored_once_per_rank() -> None:
    with make(storage=True, kind="mla") as side:
        backend = side.controller.storage_backend
        keys = set()
        for rank in (0, 1):
            backend.__class__.__init__.__globals__["get_tensor_model_parallel_rank"] = lambda rank=rank: rank
            backend.__class__.__init__.__globals__["get_tensor_model_parallel_world_size"] = lambda: 2
            keys.add(type(backend)(str(side.storage_folder))._get_suffixed_key("key"))
        assert len(keys) == 2


# ---- found while comparing -------------------------------------------------------------------------------------------
def test_row_keeps_slots_of_a_page_that_was_freed() -> None:
    """Two requests compute one prompt in chunks that end inside of a page. The second gives its page back for the
    first one's, and its row goes on naming the slots of the freed one."""
    with make() as side:
        prompt, half = A[: 2 * PAGE], PAGE + PAGE // 2

        def begin(rid: str) -> Request:
            nothing = side.allocator.alloc(0)
            request = Request(rid, 0, prompt, side.req_to_token_pool.alloc(1)[0], nothing, side.cache.root_node)
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
        row = side.req_to_token_pool.req_to_token[two.req_pool_idx]
        freed = int(row[PAGE]) // PAGE
        cache(two, 2 * PAGE)
        assert freed in side.allocator.release_pages
        assert (row[PAGE:half] // PAGE == freed).all()
        assert (row[half : 2 * PAGE] // PAGE != freed).all()


def test_page_is_stored_before_its_copy_to_the_host_has_arrived() -> None:
    """A hit on a node whose copy to the host still runs sends it to storage: whatever the host page held is stored."""
    with make(storage=True) as side:
        side.cache.token_to_kv_pool_host.kv_buffer.fill_(-1.0)
        with side.world.valve.hold("backup"):
            put(side, A)
            put(side, A)
            wait_for(lambda: len(stored(side)) == 4, lambda: f"{len(stored(side))} pages are stored")
        settled(side)
        assert side.storage_folder is not None
        stale = (side.storage_folder / f"{chain(A)[0]}.bin").read_bytes()
        assert (torch.frombuffer(bytearray(stale), dtype=torch.float32) == -1.0).all()


def test_failed_copy_leaves_a_copy_that_never_was() -> None:
    """The node counts as backed up, its device pages stay locked, and an eviction would leave only garbage."""
    with make() as side:
        with side.world.valve.fail("backup", OSError("no device")):
            put(side, A)
            settled(side)
        node = end_of(side, A)
        assert node.backuped
        assert node.lock_ref == 1
        assert side.cache.evictable_size() == 0


def test_fetched_pages_are_counted_before_their_bytes_arrive() -> None:
    with make(storage=True, prefetch_policy="best_effort") as side:
        put(side, A)
        settled(side)
        put(side, A)
        settled(side)
        side.cache.evict(16 * PAGE)
        side.cache.evict_host(32 * PAGE)
        side.cache.token_to_kv_pool_host.kv_buffer.fill_(-1.0)
        host, arrive = side.cache.token_to_kv_pool_host, threading.Event()
        put_page = host.set_from_flat_data_page
        host.set_from_flat_data_page = lambda *args: arrive.wait(10) and put_page(*args)
        side.cache.prefetch_from_storage("r", side.cache.root_node, A, None)
        operation = side.cache.ongoing_prefetch["r"][3]
        wait_for(lambda: operation.completed_tokens == len(A), lambda: f"{operation.completed_tokens} tokens")
        assert side.cache.check_prefetch_progress("r")
        assert side.cache.match_prefix(A).host_hit_length == len(A)
        assert wrong_kv(side, A, "host"), "a match before the bytes"
        arrive.set()
        side.settle()


def test_all_values_flatten_fails_after_an_eviction() -> None:
    with make() as side:
        put(side, A)
        put(side, B)
        settled(side)
        side.cache.evict(len(A))
        with pytest.raises(TypeError):
            side.cache.all_values_flatten()
