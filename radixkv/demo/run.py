"""L6: runs the demo: two processes one after the other with only a folder between them, and judges what they report.

Each claim is a check with a name; the demo has failed if one of them has. The controls turn it round: where something
was spoiled, the comparison must have failed, or it would prove nothing elsewhere. A claim that the run had no occasion
to show, as with one user and one turn, is neither: it is not shown, with the reason, and the demo says so at its end.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple, TypeAlias

from .. import __version__
from ..errors import RadixKVError
from .config import DemoConfig

__all__ = ["TIERS", "Check", "DemoError", "flip_in_files", "run_demo"]

TIERS = ("device", "host", "storage", "computed")
MODULE = "radixkv.demo.process"
DEADLINE_S = 60.0
"""For a process to end once it has said so."""

Report = dict[str, Any]
Verdict: TypeAlias = Literal["ok", "FAILED", "not shown"]
Progress = Callable[[str, dict[str, Any]], None]
"""Told of each line of a process: its phase, and the line."""


class DemoError(RadixKVError, RuntimeError):
    """A process of the demo gave up, or died; the message has its last words."""


class Check(NamedTuple):
    """One claim: what it says, whether it holds, and the figures. shown: False: there was no occasion to see it, and
    ``detail`` says why and what would give one; it has not passed then."""

    name: str
    passed: bool
    detail: str
    shown: bool = True

    @property
    def verdict(self) -> Verdict:
        """ok, FAILED or not shown."""
        return "ok" if self.passed else "FAILED" if self.shown else "not shown"


def run_demo(config: DemoConfig, folder: Path, progress: Progress | None = None) -> Report:
    """Run both phases and judge them.

    Args:
        folder: for the storage tier; its sub-folder ``kv`` is made anew.
    Returns: everything about the run. ``verdict``: that of the worst of its checks: FAILED, not shown, or ok.
    Raises: DemoError, OSError.
    """
    progress = progress or (lambda phase, line: None)
    store = folder / "kv"
    shutil.rmtree(store, ignore_errors=True)
    store.mkdir(parents=True)
    begin = time.perf_counter()
    users = [chr(ord("a") + i % 26) + (str(i // 26) if i >= 26 else "") for i in range(config.users)]
    before = _phase(config, store, "before", 0, config.turns_before, {user: [] for user in users}, progress)
    spoiled = _spoil(store, before)
    history = before["end"]["history"]
    after = _phase(config, store, "after", config.turns_before, config.turns_after, history, progress)
    phases = {"before": before, "after": after}
    checks = list(_checks(phases, spoiled))
    return {
        "radixkv": __version__,
        "config": asdict(config) | {name: before["ready"][name] for name in ("device_tokens", "host_tokens")},
        "model": before["ready"]["model"],
        "device": before["ready"]["device"],
        "host_is_page_locked": before["ready"]["pinned"],
        "token_bytes": before["ready"]["token_bytes"],
        "wall_s": time.perf_counter() - begin,
        "phases": phases,
        "spoiled": spoiled,
        "tokens": {name: _tokens(phase["requests"]) for name, phase in phases.items()},
        "first_token_s": _first_token(before["requests"] + after["requests"]),
        "checks": [check._asdict() | {"verdict": check.verdict} for check in checks],
        "verdict": worst(checks),
    }


def worst(checks: Sequence[Check]) -> Verdict:
    """The verdict on all of them."""
    found = {check.verdict for check in checks}
    return "FAILED" if "FAILED" in found else "not shown" if "not shown" in found else "ok"


# ---- the processes ---------------------------------------------------------------------------------------------------
def _phase(config: DemoConfig, store: Path, name: str, first_turn: int, turns: int, history: dict[str, Any],
           progress: Progress) -> dict[str, Any]:  # fmt: skip
    """Run one process to its end. Returns: its lines, by kind."""
    plan = {"config": asdict(config), "folder": str(store), "name": name, "first_turn": first_turn, "turns": turns,
            "history": history}  # fmt: skip
    found: dict[str, Any] = {"requests": [], "controls": []}
    begin = time.perf_counter()
    for line in _lines(json.dumps(plan)):
        progress(name, line)
        kind = line.pop("kind")
        if kind in ("request", "control"):
            found[kind + "s"].append(line)
        else:
            found[kind] = line
    found["wall_s"] = time.perf_counter() - begin
    return found


def _lines(plan: str) -> Iterator[dict[str, Any]]:
    """Start a process and yield what it says. Raises: DemoError if it fails or says no end."""
    command = [sys.executable, "-m", MODULE]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with tempfile.TemporaryFile("w+") as words:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words, text=True, env=environment
        )
        assert process.stdin is not None
        assert process.stdout is not None
        kind = None
        try:
            with contextlib.suppress(BrokenPipeError):  # it has died; its last words tell more
                process.stdin.write(plan)
                process.stdin.close()
            for text in process.stdout:
                line = json.loads(text)
                kind = line["kind"]
                if kind == "error":
                    raise DemoError(line["message"])
                yield line
            code = process.wait(DEADLINE_S)
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            process.stdout.close()
        if code or kind != "end":
            words.seek(0)
            raise DemoError(f"a process of the demo ended with {code}:\n{words.read()[-4000:]}")


def _spoil(store: Path, before: dict[str, Any]) -> dict[str, Any]:
    """Flip one bit of one page in the files that the first process left."""
    page = before["page"]
    path = flip_in_files(store, bytes.fromhex(page["sample"])) if page["sample"] else None
    return {"user": page["user"], "page": page["page"], "file": None if path is None else str(path.relative_to(store))}


def flip_in_files(folder: Path, sample: bytes) -> Path | None:
    """Find bytes in the files of a folder and flip a bit of the first. Returns: the file; None if no file has them."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size):
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
            at = content.find(sample)
            if at >= 0:
                content[at] ^= 1
                return path
    return None


# ---- what came of it -------------------------------------------------------------------------------------------------
def _tokens(requests: list[dict[str, Any]]) -> dict[str, int]:
    """Prompt tokens by where they came from."""
    return {tier: sum(request["tokens"][f"{tier}_tokens"] for request in requests) for tier in TIERS}


def _first_token(requests: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Median seconds to the first token, with the cache and recomputed from nothing, by the lowest tier asked."""
    groups: dict[str, list[dict[str, Any]]] = {"nothing": [], "device": [], "host": [], "storage": []}
    for request in requests:
        lowest = [tier for tier in ("device", "host", "storage") if request["tokens"][f"{tier}_tokens"]]
        groups[lowest[-1] if lowest else "nothing"].append(request)
    return {
        tier: {
            "requests": len(group),
            "cached": median(request["cached_first_token_s"] for request in group),
            "recomputed": median(request["first_token_s"] for request in group),
        }
        for tier, group in groups.items() if group
    }  # fmt: skip


def _checks(phases: dict[str, dict[str, Any]], spoiled: dict[str, Any]) -> Iterator[Check]:
    before, after = phases["before"], phases["after"]
    requests = before["requests"] + after["requests"]
    rows, wrong = sum(r["rows"] for r in requests), sum(r["wrong_rows"] for r in requests)
    most = max(r["max_difference"] for r in requests)
    differ = f", {wrong} differ by up to {most:g}" if wrong else ""
    yield Check("logits: the bits of recomputation", not wrong, f"{rows:,} rows of {len(requests)} requests{differ}")
    pages, bad = sum(r["pages"] for r in requests), sum(len(r["wrong_pages"]) for r in requests)
    yield Check(
        "KV: the fingerprints of recomputation", not bad, f"{pages:,} pages" + (f", {bad} wrong" if bad else "")
    )
    accounted = all(sum(r["tokens"].values()) == r["prompt_tokens"] for r in requests)
    yield Check("every prompt token accounted for", accounted, f"{sum(r['prompt_tokens'] for r in requests):,} tokens")
    total = _tokens(requests)
    for tier in TIERS[:-1]:
        name = f"prefixes from {tier}"
        if total[tier]:
            yield Check(name, True, f"{total[tier]:,} tokens")
        else:
            yield Check(name, False, _why_nothing_from(tier, phases), shown=False)
    first, cramped = after["requests"][0]["tokens"], _cramped(after)
    restarted = before["ready"]["pid"] != after["ready"]["pid"]
    elsewhere = first["device_tokens"] + first["host_tokens"]
    if restarted and not elsewhere and not first["storage_tokens"] and cramped:
        yield Check("the first prefix after the restart", False, cramped, shown=False)
    else:
        yield Check(
            "the first prefix after the restart",
            restarted and first["storage_tokens"] > 0 and not elsewhere,
            f"{first['storage_tokens']:,} tokens, all from storage, in process {after['ready']['pid']}",
        )
    yield _file_check(after, spoiled, cramped)
    yield from _control_checks(after, cramped)


def _cramped(phase: dict[str, Any]) -> str:
    """Why the host cannot hold what the checks look for; "" if it can."""
    host, longest = phase["ready"]["host_tokens"], phase["ready"]["longest_tokens"]
    if host >= longest:
        return ""
    return f"a conversation may have {longest:,} tokens, and the host holds {host:,}: more --host-tokens"


def _why_nothing_from(tier: str, phases: dict[str, dict[str, Any]]) -> str:
    """Why no prefix came from a tier, and what would make one."""
    before, after = phases["before"], phases["after"]
    ready = after["ready"]
    if tier == "device":
        if len(before["requests"]) == len(after["requests"]) == 1:
            return "each process served one request: --users 2 or --turns 2"
        return f"what the device ({ready['device_tokens']:,} tokens) held was not asked for again: more --device-tokens"
    evicted = sum(phase["counters"]["controller"]["device_evicted_tokens"] for phase in (before, after))
    if tier == "host" and not evicted:
        return f"nothing had to leave the device ({ready['device_tokens']:,} tokens): more --users"
    return _cramped(after) or f"nothing that was asked for again was on the {tier} only: more --users"


def _file_check(after: dict[str, Any], spoiled: dict[str, Any], cramped: str) -> Check:
    name, corrupt = "a bit flipped in a file: a miss", after["counters"]["storage"]["corrupt"]
    whose = [request for request in after["requests"] if request["user"] == spoiled["user"]]
    right = all(request["right"] for request in whose)
    if right and cramped and (spoiled["file"] is None or not corrupt):
        return Check(name, False, cramped, shown=False)
    detail = f"page {spoiled['page']} of {spoiled['user']}: {corrupt} corrupt, and computed again"
    return Check(name, spoiled["file"] is not None and corrupt > 0 and right, detail)


def _control_checks(after: dict[str, Any], cramped: str) -> Iterator[Check]:
    names = [
        "control: host KV as it is passes", "control: bits flipped on the host are seen",
        "control: host pages exchanged are seen",
    ]  # fmt: skip
    controls = {control["control"]: control for control in after["controls"]}
    if not controls:
        yield from (Check(name, False, cramped or "no prefix was on the host", shown=not cramped) for name in names)
        return
    sound, flipped, moved = controls["control"], controls["flipped"], controls["exchanged"]
    host = sound["tokens"]["host_tokens"]
    yield Check(names[0], sound["right"] and host > 0, f"{host:,} tokens from the host")
    seen = flipped["wrong_rows"] > 0 and len(flipped["wrong_pages"]) > 0
    yield Check(names[1], seen, _seen(flipped))
    yield Check(names[2], len(moved["wrong_pages"]) >= 2, _seen(moved))


def _seen(control: dict[str, Any]) -> str:
    same, wrong = "; same answer" if control["same_answer"] else "", len(control["wrong_pages"])
    pages = "1 page differs" if wrong == 1 else f"{wrong} pages differ"
    return f"{control['wrong_rows']} of {control['rows']} rows, {pages}{same}"
