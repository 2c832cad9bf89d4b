"""HiRadixCache on 2 and 4 ranks, real processes over gloo: the same scheduler, each rank with delays and failures of
its own. Identical trees, every byte verified, nothing hangs; a rank that is gone is an error within its deadline."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from radixkv.errors import StateError, StorageError
from radixkv.storage import MemoryStorage
from tests.controller.kit import ThreadGroup, launch, on_ranks

if not importlib.util.find_spec("torch"):
    pytest.skip("torch is not installed", allow_module_level=True)

from radixkv.hicache import HiRadixCache

from .kit import hiradix_cache, take

MODULE = "tests.hicache.rank"


ALL_POLICIES = list(range(9))
"""Seeds: three write policies by three prefetch policies."""


def check_served(results: list[dict[str, Any]], compared: int) -> dict[str, Any]:
    """All ranks have agreed on the same things (each has compared the sequences, and its tree, after every step).
    Returns: the figures of one."""
    served = [result["serve"] for result in results if result]
    for place in ("POLL", "FINISH_PREFETCH", "WRITE_BACK", "RESET"):
        assert len({figures.get(place, 0) for figures in served}) == 1, f"{place}: {served}"
    assert served[0]["compared"] > compared
    return served[0]


def check_told(results: list[dict[str, Any]], scenarios: list[str]) -> None:
    """Whoever is left was told within the deadline of 1.5 s (the machine may be busy), and could close."""
    for rank, result in enumerate(results):
        for scenario in scenarios if result else ():
            told = result[scenario]
            assert f"rank {rank}" in told["error"], told
            assert told["seconds"] < 5.0, told
            assert told["after_s"] < 5.0, told


def test_two_ranks_serve_alike_under_all_policies_and_notice_a_lost_one(tmp_path: Path) -> None:
    lost = ["starve", "hang", "exit"]
    results = launch(
        tmp_path, 2, MODULE, scenarios=["serve", *lost], seeds=ALL_POLICIES, requests=7, lost_seed=2, deadline_s=240
    )
    figures = check_served(results, 100)
    for name in ("WRITE_BACK", "FINISH_PREFETCH", "host", "stores", "store failures", "failed", "prefetched"):
        assert figures[name] > 0, f"{name}: {figures}"
    assert results[1] == {}  # dead
    check_told(results, lost)


def test_four_ranks_serve_alike(tmp_path: Path) -> None:
    """write_back, write_through and write_through_selective, with another rank in trouble each time."""
    results = launch(
        tmp_path, 4, MODULE, scenarios=["serve", "exit"], seeds=[2, 3, 7], requests=6, lost_seed=0, deadline_s=240
    )
    check_served(results, 30)
    assert results[3] == {}
    check_told(results, ["exit"])


# ---- ranks that are threads ------------------------------------------------------------------------------------------
def cache_of(group: ThreadGroup, **more: Any) -> HiRadixCache:
    """A rank's cache; from now on it agrees with the others."""
    cache = hiradix_cache(load_back_threshold=1, **more)
    cache.cache_controller.core._context.group = group
    return cache


class NeverEnds:
    """A copy that does not."""

    error = None
    seconds = 0.0

    def done(self) -> bool:
        return False

    cancel = done

    def wait(self, timeout_s: float | None = None) -> bool:
        return False


def test_who_waits_too_long_does_so_on_all_ranks() -> None:
    """The clock of one rank must not decide how often it polls."""

    def run(group: ThreadGroup) -> None:
        cache = cache_of(group, copy_timeout_s=60.0)
        if group.rank:
            cache.config = replace(cache.config, control=replace(cache.config.control, copy_timeout_s=0.05))
        cache.cache_controller.core._context.mover.backup = lambda *pages: NeverEnds()
        cache.insert(list(range(16)), take(cache, 16))
        with pytest.raises(StateError, match="1 copies to the host are in flight"):
            cache.writing_check(write_back=True)
        assert not cache.check_hicache_events()  # they still agree

    on_ranks(2, run)


def test_storage_is_attached_on_all_ranks_or_on_none() -> None:
    def run(group: ThreadGroup) -> None:
        cache = cache_of(group)
        broken = MemoryStorage()
        if group.rank:
            broken.register = fails  # type: ignore[method-assign]
        with pytest.raises(StorageError, match="no such device" if group.rank else "another rank cannot use"):
            cache.attach_storage_backend(broken)
        assert not cache.enable_storage
        cache.attach_storage_backend(MemoryStorage())
        assert cache.enable_storage
        with pytest.raises(StateError):
            cache.attach_storage_backend(MemoryStorage())
        assert cache.enable_storage
        cache.close()

    on_ranks(2, run)


def fails(memory: Any) -> None:
    raise StorageError("no such device")
