"""HiRadixCache on 2 and 4 ranks, real processes over gloo: the same scheduler, each rank with delays and failures of
its own. Identical trees, every byte verified, nothing hangs; a rank that is gone is an error within its deadline."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.controller.kit import launch

if not importlib.util.find_spec("torch"):
    pytest.skip("torch is not installed", allow_module_level=True)

MODULE = "tests.hicache.rank"


def test_two_ranks_serve_alike_and_notice_a_lost_one(tmp_path: Path) -> None:
    results = launch(tmp_path, 2, MODULE, scenarios=["serve", "hang", "exit"], seeds=[1, 3], requests=25)
    served = [result["serve"] for result in results if result]
    for figures in served:
        assert figures["compared"] > 20
        assert min(figures["host"], figures["stores"], figures["lost"], figures["failed"]) > 0, figures
    assert results[1] == {}  # dead
    for scenario in ("hang", "exit"):
        told = results[0][scenario]
        assert "rank 0" in told["error"], told
        assert told["seconds"] < 5.0, told  # the deadline is 1.5 s; the machine may be busy
        assert told["after_s"] < 5.0, told


def test_four_ranks_serve_alike(tmp_path: Path) -> None:
    results = launch(tmp_path, 4, MODULE, scenarios=["serve", "exit"], seeds=[4], requests=15)
    assert all(result["serve"]["compared"] > 10 for result in results[:3])
    assert results[3] == {}
    assert all("rank" in result["exit"]["error"] for result in results[:3])
