"""bench/bench_hicache.py runs, both caches find the same prefixes in it, and it measures what it says."""

from __future__ import annotations

import time

import pytest

from bench import bench_hicache

from .gate import original_or_skip

TINY = bench_hicache.Workload(6, 3, 64, 48, 512, 4.0, "write_through")


def test_both_caches_find_the_same() -> None:
    original_or_skip()
    result = bench_hicache.compare(TINY, ["original", "radixkv"], 1, time.perf_counter_ns)
    assert result["same_hits"]
    assert result["found"]["original"][0]["loaded"] > 0
    assert all(result["ratios"][name] > 0 for name in (*bench_hicache.GATED, "whole workload"))


def test_time_in_the_allocator_is_taken_off() -> None:
    class Allocator:
        """Takes its time; its clock goes on by what it is told."""

        now = 0

        def alloc(self, tokens: int) -> None:
            self.now += 1_000 * tokens

        free = alloc_extend = alloc_decode = available_size = free_group_begin = free_group_end = alloc

    allocator = Allocator()
    watch = bench_hicache.Stopwatch(allocator, lambda: allocator.now)

    def call() -> None:
        allocator.now += 7
        allocator.alloc(3)
        allocator.free(2)

    watch("insert", call)
    assert watch.times["insert"] == [7]


def test_a_side_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from .original import install

    def absent() -> None:
        raise install.OriginalAbsent("no index")

    monkeypatch.setattr(install, "installed", absent)
    assert bench_hicache.present(["original", "radixkv"]) == (["radixkv"], {"original": "no index"})
