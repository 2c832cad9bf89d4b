"""The demo as a whole: two real processes once, and the judgement of what processes report."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from radixkv import cli
from radixkv.demo import run as run_module
from radixkv.demo.chats import SYSTEM_PROMPT, conversations, question
from radixkv.demo.config import DemoConfig
from radixkv.demo.present import demo_tables, request_line
from radixkv.demo.run import DemoError, run_demo

SMALL = DemoConfig(users=2, turns_before=1, turns_after=1, answer_tokens=3)


@pytest.fixture(scope="module")
def lines() -> list[tuple[str, dict[str, Any]]]:
    """What the progress of ``report`` was told."""
    return []


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, lines: list[Any]) -> dict[str, Any]:
    """The report of a real run: two processes of the random model, with few and short turns."""
    return run_demo(SMALL, tmp_path_factory.mktemp("demo"), lambda phase, line: lines.append((phase, dict(line))))


def test_two_processes(report: dict[str, Any], lines: list[Any]) -> None:
    passed = {check["name"]: check["passed"] for check in report["checks"]}
    passed.pop("prefixes from host")  # two short chats fit on the device
    assert all(passed.values()), report["checks"]
    assert len(passed) == 10
    before, after = (report["phases"][name] for name in ("before", "after"))
    assert len(before["requests"]) == len(after["requests"]) == 2
    assert before["ready"]["pid"] != after["ready"]["pid"]
    assert report["tokens"]["before"]["storage"] == 0 < report["tokens"]["after"]["storage"]
    assert before["requests"][1]["tokens"]["device_tokens"] > 400  # the system prompt, which both share
    assert after["counters"]["storage"]["corrupt"] == 1
    assert [control["right"] for control in after["controls"]] == [True, False, False]
    assert [line["kind"] for phase, line in lines if phase == "before"] == [
        "ready", "request", "request", "counters", "page", "end",
    ]  # fmt: skip
    json.dumps(report)


def test_the_report_for_people(report: dict[str, Any]) -> None:
    out = io.StringIO()
    console = Console(file=out, width=110)
    for table in demo_tables(report):
        console.print(table)
    text = out.getvalue()
    for expected in ("random Llama", "before the restart", "times faster", "logits: the bits of recomputation"):
        assert expected in text
    assert text.count("ok ") == sum(check["passed"] for check in report["checks"])
    assert request_line(report["phases"]["after"]["requests"][0]).startswith("a, turn 1: ")
    assert request_line(report["phases"]["after"]["controls"][0]).startswith("control: control: ")


# ---- judgement -------------------------------------------------------------------------------------------------------
def request(**changes: Any) -> dict[str, Any]:
    tokens = {"device_tokens": 40, "host_tokens": 30, "storage_tokens": 20, "computed_tokens": 10}
    return {
        "user": "a", "turn": 0, "prompt_tokens": 100, "tokens": tokens, "rows": 10, "wrong_rows": 0,
        "max_difference": 0.0, "pages": 6, "wrong_pages": [], "right": True, "same_answer": True,
        "cached_first_token_s": 0.1, "first_token_s": 0.4,
    } | changes  # fmt: skip


def phases() -> dict[str, Any]:
    """Lines of two processes in which everything is as it should be."""
    stored = {"device_tokens": 0, "host_tokens": 0, "storage_tokens": 90, "computed_tokens": 10}
    controls = [
        request(control="control"),
        request(control="flipped", wrong_rows=10, wrong_pages=[3], right=False),
        request(control="exchanged", wrong_rows=0, wrong_pages=[3, 4], right=False),
    ]
    return {
        "before": {"ready": {"pid": 1}, "requests": [request(), request()]},
        "after": {
            "ready": {"pid": 2}, "requests": [request(tokens=stored), request()], "controls": controls,
            "counters": {"storage": {"corrupt": 1}},
        },
    }  # fmt: skip


SPOILED = {"user": "a", "page": 3, "file": "x"}


def failed(found: dict[str, Any], spoiled: dict[str, Any] = SPOILED) -> list[str]:
    return [check.name for check in run_module._checks(found, spoiled) if not check.passed]


def test_all_as_it_should_be() -> None:
    assert failed(phases()) == []


FAULTS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda p: p["before"]["requests"][1].update(wrong_rows=1), "logits: the bits of recomputation"),
    (lambda p: p["before"]["requests"][1].update(wrong_pages=[5]), "KV: the fingerprints of recomputation"),
    (lambda p: p["before"]["requests"][1].update(prompt_tokens=101), "every prompt token accounted for"),
    (lambda p: p["after"]["ready"].update(pid=1), "the first prefix after the restart"),
    (lambda p: p["after"]["requests"].reverse(), "the first prefix after the restart"),
    (lambda p: p["after"]["counters"]["storage"].update(corrupt=0), "a bit flipped in a file: a miss"),
    (lambda p: p["after"]["requests"][0].update(right=False), "a bit flipped in a file: a miss"),
    (lambda p: p["after"]["controls"][0].update(right=False), "control: host KV as it is passes"),
    (lambda p: p["after"]["controls"][1].update(wrong_rows=0), "control: bits flipped on the host are seen"),
    (lambda p: p["after"]["controls"][1].update(wrong_pages=[]), "control: bits flipped on the host are seen"),
    (lambda p: p["after"]["controls"][2].update(wrong_pages=[3]), "control: host pages exchanged are seen"),
]


@pytest.mark.parametrize(("fault", "name"), FAULTS)
def test_each_check_can_fail(fault: Callable[[dict[str, Any]], Any], name: str) -> None:
    found = phases()
    fault(found)
    assert failed(found) == [name]


@pytest.mark.parametrize("tier", ["device", "host", "storage"])
def test_each_tier_must_have_served(tier: str) -> None:
    found = phases()
    for line in found["before"]["requests"] + found["after"]["requests"]:
        line["tokens"] = copy.copy(line["tokens"])
        line["tokens"]["computed_tokens"] += line["tokens"][f"{tier}_tokens"]
        line["tokens"][f"{tier}_tokens"] = 0
    assert f"prefixes from {tier}" in failed(found)


def test_a_page_that_was_in_no_file() -> None:
    assert failed(phases(), SPOILED | {"file": None}) == ["a bit flipped in a file: a miss"]


# ---- processes and the command line ----------------------------------------------------------------------------------
def test_a_process_that_gives_up_says_why(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match=r"^unknown model 'gpt-9'; one of random, smollm2$"):
        run_demo(DemoConfig(model="gpt-9"), tmp_path)


def test_a_process_that_dies_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "MODULE", "radixkv")  # asks for a command, and ends
    with pytest.raises(DemoError, match="ended with 2"):
        run_demo(DemoConfig(), tmp_path)
    monkeypatch.setattr(run_module, "MODULE", "radixkv.demo.nothing")
    with pytest.raises(DemoError, match=r"ended with 1:\n.*No module named"):
        run_demo(DemoConfig(), tmp_path)


@pytest.mark.parametrize("good", [True, False])
def test_the_exit_code_is_the_verdict(
    report: dict[str, Any], good: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    shown = copy.deepcopy(report)
    for check in shown["checks"]:
        check["passed"] = True
    shown["checks"][0]["passed"] = good
    asked: list[DemoConfig] = []

    def fake(config: DemoConfig, folder: Path, progress: Any) -> dict[str, Any]:
        asked.append(config)
        return shown

    monkeypatch.setattr(cli, "run_demo", fake)
    out = tmp_path / "report.json"
    code = cli.main(["demo", "--users", "3", "--turns", "2", "--host-tokens", "1600", "--json", str(out)])
    captured = capsys.readouterr()
    assert code == (0 if good else 1)
    assert asked == [DemoConfig(users=3, turns_before=2, turns_after=2, host_tokens=1600)]
    assert json.loads(out.read_text())["model"] == "random Llama"
    assert ("FAILED" in captured.out) != good
    assert ("radixkv: CHECK FAILED: logits: the bits of recomputation" in captured.err) != good


def test_json_instead_of_tables(report: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(cli, "run_demo", lambda *_: report)
    cli.main(["demo", "--json", "-"])
    assert json.loads(capsys.readouterr().out)["checks"] == report["checks"]


def test_users_say_the_same_each_time() -> None:
    assert question("a", 1, 0) == question("a", 1, 0)
    assert len({question(user, turn, 0) for user in "abcd" for turn in range(7)}) == 28
    (chat,) = conversations({"a": []})
    assert chat.messages == [{"role": "system", "content": SYSTEM_PROMPT}]
    chat.ask("?")
    chat.answer("!")
    assert conversations({"a": chat.messages})[0].messages == chat.messages
