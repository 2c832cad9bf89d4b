"""Two caches, one script: after each step what they saw and hold must be equal, or a rule must say why not."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .engine import Engine, Step, script
from .original.install import FOLDER
from .sides import Factory, Setup, Side


class Difference(NamedTuple):
    """One value that is not equal; ``where`` is a path such as ``state.nodes.12 +16.locks``."""

    where: str
    first: Any
    second: Any

    def __str__(self) -> str:
        return f"{self.where}: {self.first!r} / {self.second!r}"


class Context(NamedTuple):
    """Where a difference was seen. ``before``: state of the first side before the step; ``used``: rules so far."""

    setup: Setup
    step: Step
    before: dict[str, Any]
    first: dict[str, Any]
    second: dict[str, Any]
    used: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A difference that is right.

    Attributes:
        name, reason: what it is, and why radixkv does otherwise.
        shown_by: the test (of original/test_defects_original.py or test_differences.py) that shows the original do it.
        explains: does it account for this difference?
        stops: the caches hold different things from here on, so the run ends.
    """

    name: str
    reason: str
    shown_by: str
    explains: Callable[[Difference, Context], bool]
    stops: bool = False


class Mismatch(AssertionError):
    """The two sides differ and no rule says why."""


@dataclass
class Report:
    """What a run did: steps until its end, counts of what happened, rules that were used."""

    steps: int = 0
    ended_by: str | None = None
    rules: dict[str, int] = field(default_factory=dict)
    loaded: int = 0
    evicted: int = 0
    fetched: int = 0
    out_of_memory: int = 0


def differences(first: Any, second: Any, where: str = "") -> list[Difference]:
    """All of them, by path."""
    if isinstance(first, dict) and isinstance(second, dict):
        found = []
        for key in sorted(first.keys() | second.keys(), key=str):
            path = f"{where}.{key}" if where else str(key)
            if key in first and key in second:
                found += differences(first[key], second[key], path)
            else:
                found.append(Difference(path, first.get(key, "absent"), second.get(key, "absent")))
        return found
    return [] if first == second else [Difference(where, first, second)]


def look(engine: Engine, step: Step) -> dict[str, Any]:
    """Run a step; what it saw and the state after it, or what the original itself raised."""
    try:
        return {"seen": engine.do(step), "state": named(engine.state())}
    except Exception as error:
        if traceback.extract_tb(error.__traceback__)[-1].filename.startswith(str(FOLDER)):
            return {"raised": f"{type(error).__name__}: {error}"}
        raise


def named(state: dict[str, Any]) -> dict[str, Any]:
    """Nodes by a name that a person can read: start, length and mark."""
    nodes = {f"{n['start']}+{n['tokens']}#{mark:x}": n for mark, n in state["nodes"].items()}
    return {**state, "nodes": nodes}


def run(setup: Setup, seed: int, steps: int, first: Factory, second: Factory, rules: Sequence[Rule] = ()) -> Report:
    """Drive both sides through a script. Raises: Mismatch with seed, step and the differences."""
    report = Report()
    with first(setup) as one, second(setup) as other:
        engines = Engine(one, seed), Engine(other, seed)
        before: dict[str, Any] = named(engines[0].state())
        for number, step in enumerate(script(seed, steps, setup)):
            views = [look(engine, step) for engine in engines]
            context = Context(setup, step, before, views[0], views[1], frozenset(report.rules))
            if _explain(context, differences(*views), rules, report, f"{setup}, seed {seed}, step {number}"):
                break
            _check_own(other, views[1], f"{setup}, seed {seed}, step {number} {step.name}")
            _count(report, views[0])
            if "raised" in views[0]:
                report.ended_by = views[0]["raised"]
                break
            before = views[0]["state"]
    return report


def _explain(context: Context, found: list[Difference], rules: Sequence[Rule], report: Report, place: str) -> bool:
    """Find a rule for every difference. Returns: does one of them end the run?"""
    ends = False
    for difference in found:
        rule = next((rule for rule in rules if rule.explains(difference, context)), None)
        if rule is None:
            shown = "\n  ".join(str(one) for one in found[:12])
            raise Mismatch(
                f"{place} {context.step.name}: {len(found)} differences, the first without a rule is {difference.where}"
                f"\n  {shown}\n  seen: {context.first.get('seen')} / {context.second.get('seen')}"
            )
        report.rules[rule.name] = report.rules.get(rule.name, 0) + 1
        if rule.stops:
            report.ended_by = rule.name
            ends = True
    return ends


def _check_own(side: Side, view: dict[str, Any], place: str) -> None:
    """What holds for radixkv whatever the original does: nothing lost, nothing wrong."""
    if side.name == "original" or "raised" in view:
        return
    state, seen = view["state"], view["seen"]
    assert not state["device_lost"], f"{place}: {state['device_lost']} device tokens are neither free nor held"
    assert not state["host_lost"], f"{place}: {state['host_lost']} host tokens are neither free nor held"
    assert not state["wrong_kv"], f"{place}: wrong KV {state['wrong_kv']}"
    assert not state["wrong_rows"], f"{place}: requests read wrong KV {state['wrong_rows']}"
    assert not seen.get("wrong_kv"), f"{place}: wrong KV was served, planes {seen['wrong_kv']}"
    foreign = [name for name, node in state["nodes"].items() if node["own_keys"] is False]
    assert not foreign, f"{place}: {foreign} are stored under keys that are not theirs"


def _count(report: Report, view: dict[str, Any]) -> None:
    report.steps += 1
    seen = view.get("seen") or {}
    report.loaded += seen.get("loaded") or 0
    report.evicted += seen.get("freed") or 0
    report.fetched += seen.get("fetched") or 0
    report.out_of_memory += "out_of_memory" in seen
