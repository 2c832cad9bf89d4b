"""replay/tiers.py: a trace through device, host and a storage folder; every byte checked, and the check can fail."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("xxhash")

from radixkv.cli import load_tree, main
from radixkv.errors import InvalidArgumentError
from radixkv.replay.replay import VerificationError
from radixkv.replay.report import replay_report
from radixkv.replay.tiers import TierConfig, TierReplay
from radixkv.trace import TraceRequest, summarize, write_trace

from .support import BEST_TREE, TREES, make_replay, workload

SMALL = {"device_pages": 1_500, "host_pages": 2_500}

Make = Callable[..., TierReplay]


@pytest.fixture(scope="module")
def requests() -> list[TraceRequest]:
    return workload(90)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Replays with a folder, one after the other; closed at the end."""
    made: list[TierReplay] = []

    def start(tree: str = BEST_TREE, folder: str = "kv", **options: Any) -> TierReplay:
        for replay in made:
            replay.close()
        config = TierConfig(**{"block_tokens": 64, "storage": str(tmp_path / folder)} | SMALL | options)
        made.append(TierReplay(load_tree(tree), config))
        return made[-1]

    yield start
    for replay in made:
        replay.close()


def run(replay: TierReplay, requests: list[TraceRequest]) -> dict[str, Any]:
    """Run, with check_integrity after every request; the report."""
    assert replay.run(requests, progress=lambda _: replay.check_integrity())
    assert not [info for info in replay.tree.dump() if info.lock_ref or info.host_ref]
    return replay_report(replay, trace="w", tree="core", finished=True, wall_s=1.0)


def hits(report: dict[str, Any]) -> tuple[int, ...]:
    return tuple(report["counters"][f"{tier}_hit_tokens"] for tier in ("device", "host", "storage"))


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("write_policy", ["write_back", "write_through"])
def test_nothing_is_computed_twice(make: Make, requests: list[TraceRequest], tree: str, write_policy: str) -> None:
    report = run(make(tree, write_policy=write_policy), requests)
    assert report["hit_tokens"] == sum(hits(report)) == summarize(requests, 16, 64).hit_tokens
    assert all(hits(report)), "each tier served"
    assert report["counters"]["verified_pages"] == report["hit_tokens"] // 16
    assert report["storage"]["corrupt"] == report["storage"]["errors"] == 0
    assert report["hit_rate"].keys() == {"device", "host", "storage", "total"}


def test_another_process_would_find_everything(make: Make, requests: list[TraceRequest]) -> None:
    run(make(write_policy="write_through"), requests)
    whole_pages = sum(request.input_length // 16 * 16 for request in requests)
    report = run(make(), requests)
    assert report["hit_tokens"] == whole_pages
    assert report["counters"]["written_pages"] == 0
    assert hits(report)[2] > 0


def test_two_very_different_programs_count_alike(requests: list[TraceRequest], make: Make) -> None:
    """With a host that holds everything, nothing comes from storage, and as much is found as over two tiers. How much
    of it on the device differs a little: the controller makes room for what it loads and for what is new in two steps,
    of whole leaves each."""
    ample = {"device_pages": 1_500, "host_pages": 40_000}
    two = make_replay(BEST_TREE, **ample)
    two.run(requests)
    report = run(make(**ample), requests)
    device, host, storage = hits(report)
    assert device + host == two.counters.device_hit_tokens + two.counters.host_hit_tokens
    assert device == pytest.approx(two.counters.device_hit_tokens, rel=0.05)
    assert storage == 0 < report["counters"]["stored_tokens"]


def test_a_run_gives_the_same_figures_each_time(make: Make, requests: list[TraceRequest]) -> None:
    first, second = (run(make(folder=folder), requests)["counters"] for folder in ("a", "b"))
    assert first == second


def test_a_budget_of_the_folder_is_kept(make: Make, requests: list[TraceRequest], tmp_path: Path) -> None:
    replay = make(storage_bytes=1_000_000)
    report = run(replay, requests)
    backend = report["storage"]["backend"]
    assert backend["evicted_values"] > 0
    assert sum(path.stat().st_size for path in (tmp_path / "kv").rglob("*") if path.is_file()) <= 1_000_000
    assert report["hit_tokens"] < summarize(requests, 16, 64).hit_tokens


def test_damaged_files_are_misses(make: Make, requests: list[TraceRequest], tmp_path: Path) -> None:
    run(make(write_policy="write_through"), requests)
    make(folder="other")  # closes the first
    for path in (tmp_path / "kv").rglob("*"):
        if path.is_file() and path.stat().st_size > 4_000:
            content = np.memmap(path, np.uint8, mode="r+")
            content[2_000::20_000] ^= 1
    report = run(make(), requests)
    wrong = sum(report["storage"][name] for name in ("corrupt", "foreign", "short"))
    assert wrong > 0
    assert report["counters"]["written_pages"] > 0  # computed again
    assert report["counters"]["verified_pages"] == report["hit_tokens"] // 16


@pytest.mark.parametrize("tier", ["on the device", "loaded back from the host", "read from storage"])
def test_one_wrong_byte_is_found_on_each_tier(make: Make, requests: list[TraceRequest], tier: str) -> None:
    replay = make()
    for request in requests[:60]:
        replay.serve(request)
    if tier == "on the device":
        replay.device.data[:, 70] ^= 1
    elif tier == "loaded back from the host":
        replay.controller.evict(10**9)
        replay.host.kv_buffer.reshape(replay.host.num_pages, -1)[:, 70] ^= 1
    else:
        get_pages = replay.store.get_pages

        def spoiled(digests: Any, host_pages: Any, **options: Any) -> Any:
            found = get_pages(digests, host_pages, **options)
            replay.host.kv_buffer.reshape(replay.host.num_pages, -1)[host_pages, 70] ^= 1
            return found

        replay.store.get_pages = spoiled  # type: ignore[method-assign]
    with pytest.raises(VerificationError, match=f"{tier}.* is wrong at byte 70 of 256"):
        replay.run(requests[55:] + requests)


def test_a_request_longer_than_the_device_is_served_uncached(make: Make, requests: list[TraceRequest]) -> None:
    report = run(make(device_pages=100), requests)
    assert report["counters"]["uncached_requests"] > 0


def test_settings_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="behind the host tier"):
        TierConfig(device_pages=5, host_pages=0, storage=str(tmp_path))
    with pytest.raises(InvalidArgumentError, match="storage_bytes"):
        TierConfig(device_pages=5, host_pages=5, storage=str(tmp_path), storage_bytes=0)


# ---- the command line ------------------------------------------------------------------------------------------------
def test_the_command(requests: list[TraceRequest], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "w.jsonl"
    with trace.open("w") as out:
        write_trace(out, requests)
    argv = ["replay", str(trace), "--block-size", "64", "--device-tokens", "24k", "--host-tokens", "40k"]
    argv += ["--storage", str(tmp_path / "kv"), "--storage-bytes", "1G"]
    assert main([*argv, "--json", str(tmp_path / "r.json")]) == 0
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "r.json").read_text())
    for text in (
        f"{report['counters']['storage_hit_tokens']:,}", "1,000,000,000 bytes", "time in the controller",
        "tokens written to storage", "pages read, missing, wrong", "prefetch",
    ):  # fmt: skip
        assert text in shown
    assert report["config"]["storage_bytes"] == 10**9
    assert report["controller"]["store_tokens"] == report["counters"]["stored_tokens"] > 0
    assert main([*argv, "--json", "-"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["hit_rate"]["storage"] > report["hit_rate"]["storage"]


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "w.jsonl"
    with trace.open("w") as out:
        write_trace(out, workload(5))
    for options, words in (
        (["--storage-bytes", "1M"], "--storage-bytes without --storage"),
        (["--storage", str(tmp_path / "kv"), "--host-tokens", "0"], "behind the host tier"),
        (["--storage", str(trace)], "cannot be used"),
    ):
        assert main(["replay", str(trace), "--block-size", "64", *options]) == 2
        captured = capsys.readouterr()
        assert words in captured.err
        assert captured.out == ""


def test_two_tiers_report_what_they_did_before(requests: list[TraceRequest]) -> None:
    replay = make_replay(BEST_TREE, device_pages=1_500, host_pages=1_200)
    replay.run(requests)
    report = replay_report(replay, trace="w", tree="core", finished=True, wall_s=1.0)
    assert report["hit_rate"].keys() == {"device", "host", "total"}
    assert not {"storage", "controller"} & report.keys()
    assert "storage" not in report["config"]
    assert "storage_hit_tokens" not in dataclasses.asdict(replay.counters)
