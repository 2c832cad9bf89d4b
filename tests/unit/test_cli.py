"""The command ``radixkv``: exit codes, one-line errors, tables, JSON, PNG, Ctrl-C, missing extras."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from radixkv import __version__
from radixkv.cli import main
from radixkv.replay.replay import Replay
from radixkv.trace import read_trace, summarize

from .support import BEST_TREE, TREES

every_tree = pytest.mark.parametrize("tree", TREES)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("trace") / "w.jsonl"
    assert main(["workload", "--requests", "150", "--seed", "5", "--max-input-tokens", "9k", "-o", str(path)]) == 0
    return str(path)


def refused(argv: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """Run a command that must fail; its one line on standard error."""
    capsys.readouterr()
    try:
        found = main(argv)
    except SystemExit as stop:  # argparse
        found = stop.code  # type: ignore[assignment]
    captured = capsys.readouterr()
    assert found == code, captured.err
    assert captured.out == ""
    assert captured.err.startswith("radixkv")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


# ---- replay ----------------------------------------------------------------------------------------------------------
@every_tree
def test_replay_reports_what_it_did(trace: str, tree: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.json"
    assert main(["replay", trace, "--tree", tree, "--json", str(out)]) == 0
    expected = summarize(read_trace(trace))
    report = json.loads(out.read_text())
    assert report["hit_tokens"] == report["counters"]["device_hit_tokens"] == expected.hit_tokens
    assert report["tree"]["cached_tokens"] == expected.cached_tokens
    assert report["counters"]["verified_pages"] == expected.hit_tokens // 16
    assert report["finished"] is True
    captured = capsys.readouterr()
    for text in (
        "w.jsonl: 150 requests",
        f"{expected.hit_tokens:,}",
        f"{100 * expected.hit_tokens / expected.input_tokens:.2f} %",
        "tokens a second in the tree",
        "tree memory a cached token",
        f"{expected.hit_tokens // 16:,} of 256 bytes",
    ):
        assert text in captured.out
    assert re.search(r"match +150 ", captured.out)
    assert "evict" not in captured.out  # nothing was evicted, so there is no such row
    assert captured.err == ""  # no bar: standard error is not a terminal


@every_tree
def test_replay_options_reach_the_run(trace: str, tree: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--device-tokens 20k --host-tokens 30k --policy slru --json - --page-size 8 --write-policy write_through"
    argv = ["replay", trace, "--tree", tree, *options.split()]
    argv += ["--bytes-per-token", "4", "--limit", "90", "--no-verify", "--output-tokens"]
    assert main(argv) == 0
    report = json.loads(capsys.readouterr().out)  # JSON alone: no table
    assert report["config"] == {
        "tree": tree, "device_pages": 2500, "host_pages": 3750, "page_size": 8, "policy": "slru",
        "write_policy": "write_through", "bytes_per_token": 4, "verify": False, "output_tokens": True,
        "block_tokens": 512,
    }  # fmt: skip
    assert report["counters"]["requests"] == 90
    assert report["counters"]["evicted_tokens"] > 0
    assert report["counters"]["verified_pages"] == 0
    assert report["latency"]["evict"]["count"] > 0


def test_replay_shows_both_tiers(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", trace, "--tree", BEST_TREE, "--device-tokens", "10000", "--host-tokens", "0.05M"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"device +10,000 +[\d,]+ +\d+\.\d\d %", out)
    assert re.search(r"host +50,000 +[\d,]+ +\d+\.\d\d %", out)
    for row in ("evict", "backup", "load back", "tokens loaded back", "tokens backed up"):
        assert row in out


def test_requests_that_cannot_fit_are_shown(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", trace, "--tree", BEST_TREE, "--device-tokens", "2000", "--host-tokens", "0"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"requests too long for the device +[1-9]", out)
    assert re.search(r"host +none", out)


def test_wrong_bytes_end_with_exit_code_1(
    trace: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = Replay.serve

    def corrupt(self: Replay, request: Any) -> None:
        serve(self, request)
        self.device.data[:, 5] ^= 1

    monkeypatch.setattr(Replay, "serve", corrupt)
    message = refused(["replay", trace, "--tree", BEST_TREE], capsys, code=1)
    assert re.search(r"CHECK FAILED: request \d+: page 0 .* byte 5 of 256", message)


def test_a_lost_page_ends_with_exit_code_1(
    trace: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = Replay.serve

    def leak(self: Replay, request: Any) -> None:
        serve(self, request)
        if self.counters.requests == 10:
            self.device_slots.alloc(1)

    monkeypatch.setattr(Replay, "serve", leak)
    assert "CHECK FAILED" in refused(["replay", trace, "--tree", BEST_TREE, "--limit", "20"], capsys, code=1)


def test_ctrl_c_prints_what_it_has(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = Replay.serve

    def interrupted(self: Replay, request: Any) -> None:
        if self.counters.requests == 41:
            os.kill(os.getpid(), signal.SIGINT)
        serve(self, request)

    monkeypatch.setattr(Replay, "serve", interrupted)
    before = signal.getsignal(signal.SIGINT)
    out = tmp_path / "r.json"
    assert main(["replay", trace, "--tree", BEST_TREE, "--json", str(out)]) == 130
    assert signal.getsignal(signal.SIGINT) is before
    captured = capsys.readouterr()
    assert "42 requests (interrupted)" in captured.out
    assert captured.err == "radixkv: interrupted after 42 of 150 requests\n"
    report = json.loads(out.read_text())
    assert report["finished"] is False
    assert report["hit_tokens"] == summarize(read_trace(trace, limit=42)).hit_tokens


def test_a_second_ctrl_c_stops_at_once(
    trace: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Replay, request: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr(Replay, "serve", interrupted)
    assert refused(["replay", trace, "--tree", BEST_TREE], capsys, code=130) == "radixkv: interrupted\n"


def test_a_bar_on_a_terminal(trace: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes the stream for a terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["replay", trace, "--tree", BEST_TREE]) == 0
    bar = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert "150/150" in bar
    assert re.search(r"M tokens, \d+\.\d % hit", bar)


def test_replay_reads_standard_input(
    trace: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(trace).read_bytes())))
    assert main(["replay", "-", "--tree", BEST_TREE, "--limit", "30", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["counters"]["requests"] == 30


# ---- mistakes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("command", ["replay", "plan"])
def test_missing_file(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "none.jsonl")
    assert refused([command, path], capsys) == f"radixkv: {path}: No such file or directory\n"
    assert "Is a directory" in refused([command, str(tmp_path)], capsys)


@pytest.mark.parametrize("command", ["replay", "plan"])
def test_broken_and_empty_traces(command: str, trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = Path(trace).read_text().splitlines()
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join([*lines[:3], lines[3][:50]]))
    assert f"{broken}:4: not a JSON object" in refused([command, str(broken)], capsys)
    broken.write_text("\n\n")
    assert "no requests" in refused([command, str(broken)], capsys)
    assert "blocks of 100" in refused([command, trace, "--block-size", "100"], capsys)


@pytest.mark.parametrize(("options", "words"), [
    (["--device-tokens", "-5"], "--device-tokens: '-5'"),
    (["--device-tokens", "many"], "--device-tokens: 'many'"),
    (["--device-tokens", "1.5"], "whole number"),
    (["--device-tokens", "15"], "less than one page of 16"),
    (["--device-tokens", "0"], "at least one page"),
    (["--host-tokens", "8"], "--host-tokens 8 is less than one page"),
    (["--page-size", "0"], "at least 1"),
    (["--page-size", "70000"], "page_size"),
    (["--bytes-per-token", "0"], "at least 1"),
    (["--limit", "0"], "at least 1"),
    (["--policy", "best"], "best"),
    (["--tree", "oak"], "oak"),
    (["--write-policy", "never"], "never"),
    (["--bytes-per-token", "100G"], "GiB"),
    (["--json", "/nowhere/at/all.json"], "/nowhere/at/all.json"),
    (["--frobnicate"], "--frobnicate"),
])  # fmt: skip
def test_bad_options_of_replay(options: list[str], words: str, trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in refused(["replay", trace, "--tree", "reference", *options], capsys)


def test_pools_that_cannot_be_had(
    trace: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise MemoryError("12 GiB")

    monkeypatch.setattr(Replay, "__init__", refuse)
    assert refused(["replay", trace, "--tree", "reference"], capsys) == "radixkv: out of memory: 12 GiB\n"


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "COMMAND" in refused([], capsys)
    assert "prune" in refused(["prune"], capsys)


@pytest.mark.parametrize(("options", "words"), [
    (["--kind", "spam"], "spam"), (["--requests", "-1"], "-1"), (["--rate", "0"], "above 0"),
    (["--seed", "x"], "--seed"),
    (["--mix", "chat"], "chat=0.5"), (["--mix", "chat=-1"], "share of -1"), (["--mix", "oak=1"], "oak"),
    (["--kind", "chat", "--mix", "chat=1"], "mix"), (["--max-input-tokens", "5"], "max_input_tokens=5"),
    (["-o", "/nowhere/at/all.jsonl"], "/nowhere/at/all.jsonl"),
])  # fmt: skip
def test_bad_options_of_workload(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in refused(["workload", *options], capsys)


@pytest.mark.parametrize(("missing", "argv"), [
    ("rich", ["replay", "TRACE"]), ("rich", ["plan", "TRACE"]), ("rich", ["workload"]),
    ("matplotlib", ["plan", "TRACE"]),
])  # fmt: skip
def test_missing_extras_are_named(
    missing: str, argv: list[str], trace: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)  # type: ignore[arg-type]
    message = refused([trace if word == "TRACE" else word for word in argv], capsys)
    assert f"needs {missing}: pip install 'radixkv[cli]'" in message


def test_tree_that_is_not_built(
    trace: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "radixkv.tree.core", None)  # type: ignore[arg-type]
    message = refused(["replay", trace, "--tree", "core"], capsys)
    assert "'core' cannot be loaded" in message
    assert "--tree reference" in message


def test_the_command_line_loads_no_extra_before_it_is_needed() -> None:
    code = "import sys, radixkv.cli; print([m for m in ('rich', 'matplotlib', 'torch', 'cupy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ---- workload --------------------------------------------------------------------------------------------------------
def test_workload_to_standard_output_and_file_are_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["workload", "--kind", "agent", "--requests", "40", "--seed", "9"]
    assert main(argv) == 0
    captured = capsys.readouterr()
    path = tmp_path / "w.jsonl"
    assert main([*argv, "-o", str(path)]) == 0
    assert path.read_text() == captured.out
    requests = read_trace(str(path))
    assert len(requests) == 40
    summary = summarize(requests, 1)
    assert f"{100 * summary.hit_tokens / summary.input_tokens:.2f} %" in captured.err
    assert "workload agent, seed 9" in captured.err


def test_workload_mix_and_block_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["workload", "--mix", "documents=1, chat=0", "--requests", "5", "--block-size", "128"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(len(row["hash_ids"]) == -(-row["input_length"] // 128) for row in rows)


def test_a_closed_pipe_is_quiet() -> None:
    code = "import sys; from radixkv.cli import main; sys.exit(main(['workload', '--requests', '3000']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


# ---- plan ------------------------------------------------------------------------------------------------------------
def test_plan_tables_json_and_png(trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png, out = tmp_path / "p.png", tmp_path / "p.json"
    argv = [
        "plan",
        trace,
        "--png",
        str(png),
        "--json",
        str(out),
        "--bytes-per-token",
        "1048576",
        "--device-tokens",
        "20000",
    ]
    assert main(argv) == 0
    figures = json.loads(out.read_text())
    summary = summarize(read_trace(trace))
    assert figures["unbounded"]["hit_blocks"] == summary.hit_blocks
    assert figures["blocks"] == summary.blocks
    assert len(figures["curve"]) == 16
    assert figures["curve"][-1]["lru_hit_tokens"] == figures["unbounded"]["hit_tokens"]
    captured = capsys.readouterr()
    for row in figures["curve"]:
        assert f"{row['capacity_tokens']:,} " in captured.out
        assert f"{100 * row['lru_hit_rate']:.2f} %" in captured.out
        assert f"{100 * row['clairvoyant_hit_rate']:.2f} %" in captured.out
    [knee] = [row for row in figures["knees"] if row["share"] == 0.9]
    gib = knee["capacity_bytes"] / 2**30
    assert re.search(rf"90 % +{100 * knee['lru_hit_rate']:.2f} % +{knee['capacity_tokens']:,} +{gib:.1f}", captured.out)
    assert f"{gib - 20000 / 1024:.1f} .. {gib:.1f}" in captured.out
    assert f"picture: {png}" in captured.err
    header = png.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", header[16:]) == (1440, 810)


def test_plan_without_a_picture(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # type: ignore[arg-type]
    assert main(["plan", trace, "--no-png", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes_per_token"] == 131_072
    assert list(tmp_path.iterdir()) == []


def test_plan_of_a_trace_that_never_repeats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(
        "".join(
            json.dumps({"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": [k]}) + "\n"
            for k in range(4)
        )
    )
    assert main(["plan", str(path), "--png", str(tmp_path / "p.png")]) == 0
    assert "0.00 %" in capsys.readouterr().out


def test_plan_refuses_what_it_cannot_write(trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "/nowhere/p.png" in refused(["plan", trace, "--png", "/nowhere/p.png"], capsys)
    assert str(tmp_path) in refused(["plan", trace, "--png", str(tmp_path)], capsys)


# ---- help ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("argv", [["--help"], ["replay", "--help"], ["workload", "--help"], ["plan", "--help"]])
def test_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(argv)
    out = capsys.readouterr().out
    assert "usage: radixkv" in out
    if argv[0] == "plan":
        assert "2 * layers * kv_heads * head_dim * itemsize" in " ".join(out.split())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"radixkv {__version__}\n"
