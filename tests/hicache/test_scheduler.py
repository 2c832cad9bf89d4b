"""Requests through a small engine: every byte that a forward pass reads is that of its own prefix, no slot is lost."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from radixkv.storage import MemoryStorage

from .kit import hiradix_cache, radix_cache, settle
from .scheduler import Engine, Req

LAYOUTS = ["layer_first", "page_first", "page_first_direct", "page_head"]
POLICIES = ["write_through", "write_through_selective", "write_back"]


def chat(engine: Engine, seed: int, requests: int, unit: int, every_step: Any = lambda: None) -> None:
    """Random chats that share prefixes, branch, and go on with what was answered."""
    rng = random.Random(seed)
    shared = [rng.randrange(1, 30_000) for _ in range(4 * unit)]
    chats = [[rng.randrange(1, 30_000) for _ in range(6 * unit)] for _ in range(6)] + [shared, shared[:unit]]
    for number in range(requests):
        at = rng.randrange(len(chats))
        history = chats[at][: rng.randrange(1, len(chats[at]) + 1)] if rng.random() < 0.3 else chats[at]
        prompt = history + [rng.randrange(1, 30_000) for _ in range(rng.randrange(1, 2 * unit))]
        req = engine.submit(Req(f"r{number}", prompt, rng.randrange(1, 12)))
        for _ in range(rng.randrange(5)):
            engine.step()
            engine.check_memory()
            every_step()
        for done in engine.finished:
            if done.rid == req.rid or rng.random() < 0.1:
                answered = done.origin_input_ids + done.output_ids
                chats[rng.randrange(len(chats))] = answered if len(answered) < 10 * unit else shared
        engine.finished.clear()
    engine.run()
    engine.check_memory()
    engine.check_idle()


@pytest.mark.parametrize("chunk", [None, 7, 40])
@pytest.mark.parametrize(("page_size", "size"), [(1, 300), (16, 640), (64, 2048)])
def test_one_tier(page_size: int, size: int, chunk: int | None) -> None:
    for kind in ("mha", "mla"):
        engine = Engine(radix_cache(size, page_size, kind), chunk=chunk)
        chat(engine, page_size, 40, max(page_size, 8))
        assert engine.cache.protected_size() == 0
        assert engine.tokens["device"] > 0


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("page_size", "size"), [(1, 300), (16, 640), (64, 2048)])
@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_two_tiers(kind: str, page_size: int, size: int, policy: str) -> None:
    for layout, io_backend in zip(LAYOUTS, ["kernel", "direct"] * 2, strict=True):
        with hiradix_cache(
            size, page_size, kind, policy=policy, layout=layout, io_backend=io_backend, host=3.0, load_back_threshold=1
        ) as cache:
            engine = Engine(cache, chunk=5 * page_size)
            chat(engine, 7, 30, max(page_size, 8))
            settle(cache)
            cache.check_integrity()
            assert cache.protected_size() == 0
            assert engine.tokens["host"] > 0, "nothing ever came back from the host"


def test_a_host_smaller_than_the_device() -> None:
    for policy in POLICIES:
        with hiradix_cache(640, 16, policy=policy, host=0.4, load_back_threshold=1) as cache:
            engine = Engine(cache)
            chat(engine, 3, 25, 16, cache.check_integrity)
            settle(cache)
            cache.check_integrity()


def wait_in_a_full_batch(engine: Engine, prompts: list[list[int]]) -> None:
    """Requests wait for one that runs, and nobody polls; what storage has of them comes all the same, and is served in
    the first round that has room for them."""
    core = engine.cache.cache_controller.core
    engine.submit(Req("busy", [9] * 20, 12))
    while not engine.running:
        engine.step()
    waiting = [engine.submit(Req(f"w{at}", prompt, 3)) for at, prompt in enumerate(prompts)]
    polls, deadline = core.stats().polls, time.monotonic() + 30
    for _ in range(5):
        engine.step()
    while any(core.prefetch_progress(req.rid).fetched_tokens < 80 for req in waiting):
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    assert core.stats().polls == polls
    assert len(engine.waiting) == 3
    computed = engine.tokens["computed"]
    engine.run(limit=10**6)
    assert engine.tokens["computed"] - computed == 3 * (90 - 80), "less was brought than storage had the time for"
    engine.finished.clear()


@pytest.mark.parametrize("prefetch", ["best_effort", "wait_complete", "timeout"])
@pytest.mark.parametrize("backend", ["memory", "file"])
def test_three_tiers(backend: str, prefetch: str, tmp_path: Path) -> None:
    """With a second life of the process in between: what the first stored, the second finds."""
    from dataclasses import replace

    from .kit import CONFIG

    storage: Any = MemoryStorage() if backend == "memory" else "file"
    config = replace(CONFIG, storage_options={"path": tmp_path} if backend == "file" else {})
    prompts = [[rng * 1000 + at for at in range(90)] for rng in range(1, 4)]
    found = []
    for life in range(2):
        with hiradix_cache(
            640, 16, policy="write_through", host=3.0, storage=storage, prefetch=prefetch, config=config,
            load_back_threshold=1, prefetch_threshold=16, write_through_threshold_storage=1,
        ) as cache:  # fmt: skip
            engine = Engine(cache, max_running=1)
            for turn in range(2):
                if life and not turn:
                    wait_in_a_full_batch(engine, prompts)
                engine.run(*[Req(f"p{life}{turn}{at}", prompt, 3) for at, prompt in enumerate(prompts)], limit=10**6)
                settle(cache)
            chat(engine, life, 25, 16)
            settle(cache)
            cache.check_integrity()
            found.append(cache.cache_controller.core.stats())
    assert found[0].stores > 0
    assert found[1].prefetch_tokens >= 3 * 80


def test_requests_are_given_up_and_start_again() -> None:
    """Too little memory for all that run: some are retracted, and finish later with what the cache kept of them."""
    for page_size in (1, 4):
        with hiradix_cache(80, page_size, host=4.0, load_back_threshold=1) as cache:
            engine = Engine(cache)
            engine.reserve = 0.0
            engine.run(*[Req(f"{n}", [n + 1] * 10, 18) for n in range(4)])
            assert engine.retracted
            assert len(engine.finished) == 4
            settle(cache)
            engine.check_memory()
            engine.check_idle()
            cache.check_integrity()


def test_freeing_in_groups() -> None:
    """As an engine does around a batch of results: what is freed in a group comes back at its end."""
    cache = radix_cache(640, 16)
    engine = Engine(cache)
    finish = engine.finish

    def grouped(req: Req) -> None:
        cache.token_to_kv_pool_allocator.free_group_begin()
        finish(req)
        cache.token_to_kv_pool_allocator.free_group_end()

    engine.finish = grouped  # type: ignore[method-assign]
    chat(engine, 5, 40, 16)


def test_an_engine_that_resets_between_jobs() -> None:
    with hiradix_cache(640, 16, host=2.0, load_back_threshold=1) as cache:
        for job in range(3):
            engine = Engine(cache)
            chat(engine, job, 15, 16)
            cache.reset()
            cache.req_to_token_pool.clear()
            cache.token_to_kv_pool_allocator.clear()
            cache.check_integrity()
            assert cache.token_to_kv_pool_host.available_size() == cache.token_to_kv_pool_host.size


def test_the_engine_would_see_a_wrong_page() -> None:
    """The check can fail: one byte of one page of what is cached, and the next request that reads it says so."""
    cache = radix_cache(640, 16)
    engine = Engine(cache)
    prompt = list(range(40))
    engine.run(Req("a", prompt, 2))
    slots = cache.match_prefix(prompt).device_indices
    engine.bytes.halves[1][2][slots[20]] ^= 1
    with pytest.raises(AssertionError, match="layer 2, half 1: 1 of 32 tokens hold other bytes, from token 20"):
        engine.run(Req("b", prompt, 2))


def test_pages_of_the_host_are_verified_too() -> None:
    with hiradix_cache(640, 16, load_back_threshold=1) as cache:
        engine = Engine(cache)
        prompt = list(range(40))
        engine.run(Req("a", prompt, 2))
        settle(cache)
        cache.evict(640)
        cache.token_to_kv_pool_host.kv_buffer[0, 1] ^= 1
        with pytest.raises(AssertionError, match="layer 1, half 0"):
            engine.run(Req("b", prompt, 2))
