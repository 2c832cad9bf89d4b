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
from radixkv.errors import InvalidArgumentError

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
    verdicts = {check["name"]: check["verdict"] for check in report["checks"]}
    assert verdicts.pop("prefixes from host") == report["verdict"] == "not shown"  # two short chats fit on the device
    assert set(verdicts.values()) == {"ok"}, report["checks"]
    assert len(verdicts) == 10
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
    assert (text.count("not shown"), text.count("FAILED")) == (1, 0)
    assert "not shown   prefixes from host" in text
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
        "before": {
            "ready": {"pid": 1}, "requests": [request(), request()],
            "counters": {"controller": {"device_evicted_tokens": 16}},
        },
        "after": {
            "ready": {"pid": 2, "device_tokens": 160, "host_tokens": 160, "longest_tokens": 150},
            "requests": [request(tokens=stored), request()], "controls": controls,
            "counters": {"storage": {"corrupt": 1}, "controller": {"device_evicted_tokens": 0}},
        },
    }  # fmt: skip


SPOILED = {"user": "a", "page": 3, "file": "x"}


def failed(found: dict[str, Any], spoiled: dict[str, Any] = SPOILED, verdict: str = "FAILED") -> list[str]:
    return [check.name for check in run_module._checks(found, spoiled) if check.verdict == verdict]


def test_all_as_it_should_be() -> None:
    assert failed(phases()) == failed(phases(), verdict="not shown") == []
    assert run_module.worst(list(run_module._checks(phases(), SPOILED))) == "ok"


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


def without(tier: str) -> dict[str, Any]:
    """What was found in a tier was computed."""
    found = phases()
    for line in found["before"]["requests"] + found["after"]["requests"]:
        line["tokens"] = copy.copy(line["tokens"])
        line["tokens"]["computed_tokens"] += line["tokens"][f"{tier}_tokens"]
        line["tokens"][f"{tier}_tokens"] = 0
    return found


@pytest.mark.parametrize(("tier", "why"), [
    ("device", "held was not asked for again"), ("host", "nothing that was asked for again was on the host only"),
    ("storage", "nothing that was asked for again was on the storage only"),
])  # fmt: skip
def test_a_tier_that_served_nothing_was_not_shown(tier: str, why: str) -> None:
    found = without(tier)
    checks = list(run_module._checks(found, SPOILED))
    (absent,) = [check for check in checks if check.verdict == "not shown"]
    assert absent.name == f"prefixes from {tier}"
    assert why in absent.detail
    assert "more --" in absent.detail
    # that nothing came from storage after a restart is a fault of its own, as the host has room for all
    assert run_module.worst(checks) == ("FAILED" if tier == "storage" else "not shown")


def test_why_nothing_was_shown() -> None:
    """One user and one turn: no device. All fits on the device: no host."""
    found = without("device")
    for phase in found.values():
        del phase["requests"][1:]
    (check,) = [check for check in run_module._checks(found, SPOILED) if check.name == "prefixes from device"]
    assert check.detail == "each process served one request: --users 2 or --turns 2"
    found = without("host")
    found["before"]["counters"]["controller"]["device_evicted_tokens"] = 0
    (check,) = [check for check in run_module._checks(found, SPOILED) if check.name == "prefixes from host"]
    assert check.detail == "nothing had to leave the device (160 tokens): more --users"


def test_a_host_smaller_than_a_conversation_excuses_what_is_absent_and_nothing_that_is_wrong() -> None:
    found = without("storage")
    found["after"]["ready"]["host_tokens"] = 16
    found["after"]["controls"] = []
    found["after"]["counters"]["storage"]["corrupt"] = 0
    assert failed(found, SPOILED | {"file": None}) == []
    absent = failed(found, SPOILED | {"file": None}, "not shown")
    assert absent == [
        "prefixes from storage", "the first prefix after the restart", "a bit flipped in a file: a miss",
        "control: host KV as it is passes", "control: bits flipped on the host are seen",
        "control: host pages exchanged are seen",
    ]  # fmt: skip
    found["after"]["requests"][0].update(right=False, wrong_rows=1)
    assert failed(found) == ["logits: the bits of recomputation", "a bit flipped in a file: a miss"]
    found["after"]["ready"]["host_tokens"] = 160
    assert set(absent[1:]) <= set(failed(found)), "with room on the host there is no excuse"


def test_a_page_that_was_in_no_file() -> None:
    assert failed(phases(), SPOILED | {"file": None}) == ["a bit flipped in a file: a miss"]


# ---- processes and the command line ----------------------------------------------------------------------------------
def test_a_process_that_gives_up_says_why(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match=r"^unknown model 'gpt-9'; one of random, smollm2$"):
        run_demo(DemoConfig(model="gpt-9"), tmp_path)


def test_what_does_not_fit_is_said_at_once(tmp_path: Path) -> None:
    """Not after 30 seconds of waiting for room."""
    with pytest.raises(DemoError, match=r"^device_tokens is 16: a conversation may have \d+ tokens, which needs \d+$"):
        run_demo(DemoConfig(device_tokens=16), tmp_path)
    with pytest.raises(InvalidArgumentError, match="device_tokens is 100: not whole pages of 16, as 96 or 112 would"):
        DemoConfig(device_tokens=100)


def test_a_host_for_one_page_is_no_crash(tmp_path: Path) -> None:
    report = run_demo(DemoConfig(users=1, turns_before=1, turns_after=1, answer_tokens=1, host_tokens=16), tmp_path)
    assert report["verdict"] == "not shown", report["checks"]
    shown = {check["name"]: check["verdict"] for check in report["checks"]}
    assert shown["logits: the bits of recomputation"] == "ok"
    assert shown["control: bits flipped on the host are seen"] == "not shown"


def test_a_process_that_dies_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "MODULE", "radixkv")  # asks for a command, and ends
    with pytest.raises(DemoError, match="ended with 2"):
        run_demo(DemoConfig(), tmp_path)
    monkeypatch.setattr(run_module, "MODULE", "radixkv.demo.nothing")
    with pytest.raises(DemoError, match=r"ended with 1:\n.*No module named"):
        run_demo(DemoConfig(), tmp_path)


@pytest.mark.parametrize(("verdict", "code"), [("ok", 0), ("FAILED", 1), ("not shown", 3)])
def test_the_exit_code_is_the_verdict(
    report: dict[str, Any], verdict: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    shown = copy.deepcopy(report)
    for check in shown["checks"]:
        check["verdict"] = "ok"
    for check in shown["checks"][:2]:
        check |= {"verdict": verdict, "detail": "because"}
    asked: list[DemoConfig] = []

    def fake(config: DemoConfig, folder: Path, progress: Any) -> dict[str, Any]:
        asked.append(config)
        return shown

    monkeypatch.setattr(cli, "run_demo", fake)
    out = tmp_path / "report.json"
    found = cli.main(["demo", "--users", "3", "--turns", "2", "--host-tokens", "1600", "--json", str(out)])
    captured = capsys.readouterr()
    assert found == code
    assert asked == [DemoConfig(users=3, turns_before=2, turns_after=2, host_tokens=1600)]
    assert json.loads(out.read_text())["model"] == "random Llama"
    assert ("FAILED" in captured.out, "not shown" in captured.out) == (verdict == "FAILED", verdict == "not shown")
    one, other = "logits: the bits of recomputation", "KV: the fingerprints of recomputation"
    assert captured.err.splitlines()[-1:] == {
        "ok": [], "FAILED": [f"radixkv: CHECK FAILED: {one}; {other}"],
        "not shown": [f"radixkv: all that ran is right, but NOT SHOWN: {one}, {other} (because)"],
    }[verdict]  # fmt: skip


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
