"""HiRadixCache on 2 and 4 ranks, real processes over gloo: the same scheduler, each rank with delays and failures of
its own. Identical trees, every byte verified, nothing hangs; a rank that is gone is an error within its deadline."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.controller.kit import launch

if not importlib.util.find_spec("torch"):
    pytest.skip("torch is not installed", allow_module_level=True)

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
