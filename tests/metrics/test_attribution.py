"""Where prompts came from, counted by the calls that a scheduler makes anyway."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from radixkv.controller import Attribution
from radixkv.hicache import attribution as module
from radixkv.hicache.attribution import Attributions
from radixkv.metrics import MetricsListener
from radixkv.storage import MemoryStorage

from ..hicache.kit import CONFIG, hiradix_cache, settle, take
from ..hicache.scheduler import Engine, Req

MANY = 10**6
LONG = list(range(64))


@pytest.fixture
def make() -> Iterator[Any]:
    made: list[Any] = []

    def cache(*args: Any, **more: Any) -> Any:
        made.append(hiradix_cache(*args, **{"load_back_threshold": 1, "prefetch_threshold": 4, **more}))
        return made[-1]

    yield cache
    for one in made:
        one.close()


def counted(cache: Any) -> Attribution:
    """What all requests together have."""
    stats = cache.cache_controller.core.stats()
    return Attribution(stats.device_tokens, stats.host_tokens, stats.storage_tokens, stats.computed_tokens)


def on_host(cache: Any, *keys: list[int]) -> None:
    for key in keys:
        slots = take(cache, len(key))
        cache.token_to_kv_pool_allocator.free(slots[: cache.insert(key, slots)])
        settle(cache)
    cache.evict(MANY)
    assert cache.total_size() == 0


class Life:
    """One request, step by step, as a scheduler takes it."""

    def __init__(self, cache: Any, rid: str | None, prompt: list[int]) -> None:
        self.cache = cache
        self.req: Any = SimpleNamespace(
            rid=rid, origin_input_ids=list(prompt), output_ids=[], fill_ids=[], req_pool_idx=None, prefix_indices=(),
            last_node=None, last_host_node=None, host_hit_length=0,
        )  # fmt: skip

    def match(self) -> Life:
        req = self.req
        req.fill_ids = req.origin_input_ids + req.output_ids
        found = self.cache.match_prefix(rid=req.rid, key=req.fill_ids[:-1])
        req.prefix_indices, req.last_node, req.last_host_node, req.host_hit_length = found
        return self

    def load(self) -> Life:
        req = self.req
        if req.host_hit_length:
            slots, req.last_node = self.cache.init_load_back(req.last_host_node, req.host_hit_length)
            req.prefix_indices = torch.cat([req.prefix_indices, slots])
        return self

    def prefill(self, end: int | None = None) -> Life:
        """Lock, and compute up to ``end`` tokens; cache them."""
        self.begin(end)
        self.cache.cache_unfinished_req(self.req)
        return self

    def begin(self, end: int | None = None) -> Life:
        req, cache = self.req, self.cache
        if req.req_pool_idx is None:
            cache.inc_lock_ref(req.last_node)
            (req.req_pool_idx,) = cache.req_to_token_pool.alloc(1)
        cache.ready_to_load_host_cache()
        settle(cache)
        whole = req.origin_input_ids + req.output_ids
        before, after = len(req.prefix_indices), len(whole) if end is None else end
        slots = torch.cat([torch.as_tensor(req.prefix_indices).long(), take(cache, -(-(after - before) // 4) * 4)])
        cache.req_to_token_pool.write((req.req_pool_idx, slice(0, len(slots))), slots.int())
        req.fill_ids = whole[:after]
        return self

    def finish(self) -> Life:
        self.req.output_ids = self.req.output_ids or [99]
        self.cache.cache_finished_req(self.req)
        return self

    @property
    def split(self) -> Attribution | None:
        return self.cache.attribution(self.req.rid)


def test_a_request_that_is_computed_and_one_that_finds_it(make: Any) -> None:
    cache = make()
    first = Life(cache, "a", LONG).match()
    assert first.split is None
    first.prefill()
    assert first.split == counted(cache) == (0, 0, 0, 64)
    first.finish()
    assert first.split == counted(cache) == (0, 0, 0, 64)
    second = Life(cache, "b", [*LONG, 7, 7, 7]).match().begin().finish()  # one token: finished without unfinished
    assert second.split == (64, 0, 0, 3)
    assert counted(cache) == (64, 0, 0, 67)


def test_matched_again_at_every_step(make: Any) -> None:
    cache = make()
    on_host(cache, LONG[:32])
    waiting = Life(cache, "a", LONG)
    for _ in range(50):
        waiting.match()
    assert counted(cache) == (0, 0, 0, 0)
    waiting.load().prefill().finish()
    assert waiting.split == counted(cache) == (0, 32, 0, 32)


def test_loaded_and_sent_back_to_the_queue(make: Any) -> None:
    """The batch was full after its load had been queued: the next match finds it on the device, but it was loaded."""
    cache = make()
    on_host(cache, LONG[:32])
    waiting = Life(cache, "a", LONG).match().load()
    assert waiting.match().req.host_hit_length == 0
    waiting.prefill().finish()
    assert waiting.split == counted(cache) == (0, 32, 0, 32)


def test_two_of_a_step_share_one_load(make: Any) -> None:
    """The one that asked for the load has it, whoever comes to an end first; the other one found it on the device."""
    cache = make()
    on_host(cache, LONG[:32])
    first = Life(cache, "a", LONG).match().load()
    second = Life(cache, "b", [*LONG[:32], 5, 5, 5, 5, 5]).match().load()
    second.prefill()
    first.prefill()
    assert second.split == (32, 0, 0, 5)
    assert first.split == (0, 32, 0, 32)


def test_aborted_after_its_load(make: Any) -> None:
    """The tokens are those of the first request that uses them."""
    cache = make()
    on_host(cache, LONG[:32])
    Life(cache, "gone", LONG).match().load()
    cache.ready_to_load_host_cache()
    settle(cache)
    other = Life(cache, "b", LONG).match().prefill().finish()
    assert other.split == counted(cache) == (0, 32, 0, 32)
    again = Life(cache, "c", LONG[:33]).match().prefill().finish()
    assert again.split == (32, 0, 0, 1)


def test_chunks_are_counted_once_and_when_the_prompt_is_there(make: Any) -> None:
    cache = make()
    on_host(cache, LONG[:16])
    life = Life(cache, "a", LONG).match().load()
    for end in (24, 40, 56):
        life.prefill(end)
        assert life.split is None
    assert counted(cache) == (0, 0, 0, 0)
    life.prefill()
    assert life.split == counted(cache) == (0, 16, 0, 48)
    life.finish()
    assert counted(cache) == (0, 16, 0, 48)


def test_aborted_between_chunks(make: Any) -> None:
    cache = make()
    life = Life(cache, "a", LONG).match().prefill(24)
    life.req.origin_input_ids = LONG[:24]  # all that was computed
    life.finish()
    assert life.split == counted(cache) == (0, 0, 0, 24)


def test_retracted_and_loaded_again(make: Any) -> None:
    cache = make(128)
    on_host(cache, LONG[:32])
    life = Life(cache, "a", LONG).match().load().prefill()
    settle(cache)
    req = life.req
    cache.req_to_token_pool.free(req.req_pool_idx)
    cache.dec_lock_ref(req.last_node)
    req.req_pool_idx, req.output_ids, req.prefix_indices, req.last_node = None, [50, 51], (), None
    settle(cache)
    cache.evict(MANY)
    life.match().load()
    assert len(req.prefix_indices) == 64
    life.prefill()
    life.finish()
    assert life.split == counted(cache) == (0, 32, 0, 32)
    cache.evict(MANY)
    assert Life(cache, "b", LONG).match().prefill().split == (0, 0, 0, 64), "not loaded, so computed"


def test_what_storage_brought(make: Any) -> None:
    cache = make(256, storage=MemoryStorage(), prefetch="wait_complete", store_after_backup=True)
    on_host(cache, LONG[:32])
    settle(cache)
    cache.evict_host(MANY)
    life = Life(cache, "a", LONG).match()
    assert life.req.host_hit_length == 0
    assert cache.prefetch_from_storage("a", life.req.last_host_node, LONG[:-1]) is not None
    deadline = time.monotonic() + 20
    while not cache.check_prefetch_progress("a"):
        cache.check_hicache_events()
        assert time.monotonic() < deadline
    life.match().match().load().prefill().finish()
    assert life.split == counted(cache) == (0, 0, 32, 32)


def test_a_load_that_failed_is_none(make: Any) -> None:
    cache = make()
    on_host(cache, LONG[:32])
    Life(cache, "a", LONG).match().load()
    (handle,) = cache._attributions.loads
    core = cache.cache_controller.core
    (load,) = core._loads.queued
    core.cancel_load(load)
    cache._drop_failed_loads()
    assert cache._attributions.loads == {}
    assert cache.view(handle).evicted


def test_an_engine_that_says_it_itself(make: Any) -> None:
    cache = make()
    on_host(cache, LONG[:32])
    life = Life(cache, "a", LONG).match()
    found = cache.match_prefix(LONG)
    life.load()
    assert cache.attribute("a", 64, found, 32) == (0, 32, 0, 32)
    life.prefill().finish()
    assert life.split == counted(cache) == (0, 32, 0, 32)
    late = Life(cache, "b", LONG).match().prefill()
    assert cache.attribute("b", 64, found, 0) == late.split == (60, 0, 0, 4)
    assert counted(cache) == (60, 32, 0, 36)


def test_a_request_without_a_name_is_not_counted(make: Any) -> None:
    cache = make()
    Life(cache, None, LONG).match().prefill().finish()
    life = Life(cache, "x", [3] * 16)
    del life.req.rid
    life.req.prefix_indices, life.req.last_node = (), cache.root_node
    life.begin().finish()
    assert counted(cache) == (0, 0, 0, 0)


def test_the_listener_is_told_once_a_request(make: Any) -> None:
    from dataclasses import replace

    listener = MetricsListener()
    cache = make(config=replace(CONFIG, listener=listener))
    Life(cache, "a", LONG).match().prefill(16).prefill().finish()
    assert list(listener.requests) == [(0, 0, 0, 64)]


@pytest.mark.parametrize("storage", [False, True])
def test_an_engine_with_chunks_and_retractions(make: Any, storage: bool) -> None:
    """Of every request the four add up to its prompt, and all requests to the counters."""
    cache = make(
        192, storage=MemoryStorage() if storage else None, prefetch="wait_complete", store_after_backup=storage,
    )  # fmt: skip
    engine = Engine(cache, chunk=24, max_running=8)
    engine.reserve = 0.1  # so that some are retracted
    rng = np.random.default_rng(5)
    requests = []
    for number in range(60):
        shared = [int(rng.integers(0, 4))] * int(rng.integers(1, 40))
        prompt = shared + rng.integers(10, 12, int(rng.integers(1, 24))).tolist()
        requests.append(Req(f"r{number}", prompt, max_new_tokens=int(rng.integers(1, 24))))
    for at in range(0, 60, 6):
        engine.run(*requests[at : at + 6])
    assert engine.retracted > 0
    splits = [cache.attribution(req.rid) for req in requests]
    for req, split in zip(requests, splits, strict=True):
        assert split is not None
        assert sum(split) == len(req.origin_input_ids)
        assert min(split) >= 0
    assert counted(cache) == tuple(map(sum, zip(*splits, strict=True)))
    assert counted(cache).device_tokens > 0
    assert counted(cache).host_tokens > 0
    assert cache._attributions._running == {}


# ---- bounds ----------------------------------------------------------------------------------------------------------
class Counts:
    def account(self, req_id: Any, num_tokens: int, device_tokens: int, loaded_tokens: int) -> Attribution:
        return Attribution(device_tokens, loaded_tokens, 0, num_tokens - device_tokens - loaded_tokens)

    def forget_request(self, req_id: Any) -> None:
        pass


def request(rid: str) -> Any:
    node = SimpleNamespace(id=1)
    return SimpleNamespace(rid=rid, origin_input_ids=LONG, fill_ids=LONG, prefix_indices=(), last_node=node)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KEPT_REQUESTS", "KEPT_FINISHED", "KEPT_LOADS"):
        monkeypatch.setattr(module, name, 10)
    kept = Attributions(Counts())
    for number in range(100):
        kept.cached(request(f"never finished {number}"), False)
        kept.cached(request(f"finished {number}"), True)
        kept.note_load(number, 4)
    assert (len(kept._running), len(kept._finished), len(kept.loads)) == (9, 10, 10)
    assert kept.of("never finished 99") == kept.of("finished 99") == (0, 0, 0, 64)
    assert kept.of("finished 1") is None
    kept.reset()
    assert not kept._running
    assert not kept.loads


def test_a_call_costs_about_a_microsecond() -> None:
    kept = Attributions(Counts())
    requests = [request(str(number)) for number in range(1000)]

    def a_round() -> float:
        begin = time.perf_counter()
        for req in requests:
            kept.cached(req, False)
            kept.cached(req, False)
            kept.cached(req, True)
        return (time.perf_counter() - begin) / 3000

    best = min(a_round() for _ in range(5))
    print(f"{best * 1e6:.2f} us a call")
    assert best < 20e-6  # a microsecond, on a machine that may be busy
