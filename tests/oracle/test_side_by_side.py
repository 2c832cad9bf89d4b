"""The reference and the core, driven by hypothesis through every operation (driver.py), compared after each.

Without the core the reference runs beside itself: that tests the driver, the reference's integrity, and the law that
no page is lost. Then the driver is turned on trees that are broken on purpose, because a comparison that cannot fail
proves nothing.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from radixkv.errors import RadixKVError
from radixkv.tree.reference import ReferenceTree
from radixkv.types import POLICIES
from tests.oracle import fuzz
from tests.oracle.driver import WEIGHTS, Driver
from tests.oracle.implementations import implementations

PARTNERS = [("reference", name) for name in implementations() if name != "reference"] or [("reference", "reference")]


class Drawn:
    """Choices drawn from hypothesis."""

    def __init__(self, data: st.DataObject) -> None:
        self._draw = data.draw

    def below(self, n: int) -> int:
        return 0 if n == 1 else self._draw(st.integers(0, n - 1))


def machine(ours: Any, theirs: Any, policy: str) -> type[RuleBasedStateMachine]:
    """A state machine with one rule for each operation of the driver."""

    class SideBySide(RuleBasedStateMachine):
        @initialize(page_size=st.sampled_from([1, 2, 7, 64]), events=st.booleans(), pages=st.sampled_from([40, 8]),
                    max_events=st.sampled_from([1 << 20, 3]))
        def start(self, page_size: int, events: bool, pages: int, max_events: int) -> None:
            self.driver = Driver(ours, theirs, page_size, policy, events=events, pages=pages, host_pages=pages,
                                 letters=2, longest=6, max_events=max_events)

        @invariant()
        def agree(self) -> None:
            if hasattr(self, "driver"):
                self.driver.check()

        def teardown(self) -> None:
            if hasattr(self, "driver"):
                self.driver.finish()

    def operation(name: str) -> Any:
        def take(self: Any, data: st.DataObject) -> None:
            self.driver.step(name, Drawn(data))

        take.__name__ = name
        return rule(data=st.data())(take)

    for name in WEIGHTS:
        setattr(SideBySide, name, operation(name))
    return SideBySide


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("names", PARTNERS, ids="+".join)
def test_side_by_side(names: tuple[str, str], policy: str) -> None:
    ours, theirs = (implementations()[name] for name in names)
    run_state_machine_as_test(machine(ours, theirs, policy), settings=settings(
        max_examples=25, stateful_step_count=40, deadline=None, print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    ))  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("names", PARTNERS, ids="+".join)
def test_a_short_seeded_run(names: tuple[str, str], policy: str) -> None:
    counts = fuzz.run(3000, 1234, names, policy, episode=1000)
    # A run in which an operation never came to its end has not tested it.
    for name in ("match_extend", "insert", "insert_host", "finish_backup", "finish_load", "set_host", "set_device"):
        assert counts[name] > sum(n for error, n in counts.items() if error.startswith(f"{name} ")), name


# ------------------------------------------------------------------------------------------------- the driver can fail


class LosesAPage(ReferenceTree):
    def evict(self, num_tokens: int, backup: bool = False) -> Any:
        out = super().evict(num_tokens, backup)
        out.page_ids = out.page_ids[:-1] if len(out.page_ids) > 3 else out.page_ids
        return out


class EvictsInAnotherOrder(ReferenceTree):
    def _queue_entry(self, node: Any) -> Any:
        key, *rest = super()._queue_entry(node)
        return ((-key[0], *key[1:]), *rest)


class ForgetsToStampOnExtend(ReferenceTree):
    def match_extend(self, match: Any, tokens: Any) -> Any:
        out = super().match_extend(match, tokens)
        if out.num_tokens:
            self._node(out.device_node).access_time -= 1
        return out


class DropsTheLockOnSplit(ReferenceTree):
    def _split(self, node: Any, at: int) -> Any:
        upper = super()._split(node, at)
        upper.lock_ref = 0
        return upper


class TakesHostProtectedDescendants(ReferenceTree):
    def _may_leave_device(self, node: Any, backup: bool) -> bool:
        if node.is_root or not node.on_device or node.is_protected or node.pending or backup:
            return super()._may_leave_device(node, backup)
        return not node.has_device_child()


class DuplicatesWhatIsEqual(ReferenceTree):
    def insert(self, tokens: Any, page_ids: Any, *args: Any, **more: Any) -> Any:
        out = super().insert(tokens, page_ids, *args, **more)
        if out.prefix_tokens and not len(out.duplicate_page_ids):
            out.duplicate_page_ids = out.duplicate_page_ids.__class__((1,), dtype="int32")
        return out


class CountsAdoptionAsAHit(ReferenceTree):
    def _enter_device(self, node: Any, ids: list[int]) -> None:
        super()._enter_device(node, ids)
        node.hit_count += node.host_pages is not None


class SettlesTheLowerPartOnly(ReferenceTree):
    def _job_parts(self, node: Any) -> Any:
        return super()._job_parts(node)[-1:]


class SaysNothingOnAdoption(ReferenceTree):
    def _emit_stored(self, node: Any, medium: Any) -> None:
        if medium == "host" or node.host_pages is None:
            super()._emit_stored(node, medium)


class LetsAnyoneUnlock(ReferenceTree):
    def unlock(self, node: int) -> int:
        try:
            return super().unlock(node)
        except RadixKVError:
            target = self._node(node)
            if target is not None and target.lock_ref:
                target.lock_ref -= 1
                return 0
            raise


class KeepsAPinOfTheDead(ReferenceTree):
    def _unpin(self, node: Any) -> int:
        return 0 if node.parent.is_root and node.pin_until is not None else super()._unpin(node)


class ForgetsMarksOnSplit(ReferenceTree):
    def _split(self, node: Any, at: int) -> Any:
        upper = super()._split(node, at)
        upper.marks = 0
        return upper


class MarksTheNodeOnly(ReferenceTree):
    def mark(self, node: int, set: int = 0, clear: int = 0, num_pages: int | None = None) -> None:
        before = [(part, part.marks) for part in self._handles.nodes() if part.handle != node]
        super().mark(node, set, clear, num_pages)
        for part, marks in before:
            part.marks = marks


class IsDueWhilePending(ReferenceTree):
    def due(self, node: int, tier: Any, min_hits: int, without_marks: int = 0) -> list[int]:
        hidden = [part for part in self._handles.nodes() if part.pending]
        for part in hidden:
            part.pending = False
        found = super().due(node, tier, min_hits, without_marks)
        for part in hidden:
            part.pending = True
        return found


class ForgetsWhatIsLoading(ReferenceTree):
    def _describe(self, namespace: bytes, steps: Any) -> Any:
        out = super()._describe(namespace, steps)
        out.loading_tokens = 0
        return out


class DropsOneEventTooMany(ReferenceTree):
    def _emit(self, event: Any) -> None:
        if len(self._events or ()) + 1 < self._max_events:
            super()._emit(event)
        else:
            self._dropped_events += 1


class AcceptsAStrangersId(ReferenceTree):
    def _check_owner(self, ids: Any, present: Any, owned: Any, what: str) -> None:
        super()._check_owner(ids, [], set(), what)


BROKEN = [
    LosesAPage, EvictsInAnotherOrder, ForgetsToStampOnExtend, DropsTheLockOnSplit, TakesHostProtectedDescendants,
    DuplicatesWhatIsEqual, CountsAdoptionAsAHit, SettlesTheLowerPartOnly, SaysNothingOnAdoption, LetsAnyoneUnlock,
    KeepsAPinOfTheDead, AcceptsAStrangersId, ForgetsMarksOnSplit, MarksTheNodeOnly, IsDueWhilePending,
    ForgetsWhatIsLoading, DropsOneEventTooMany,
]  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN, ids=lambda cls: cls.__name__)
def test_the_driver_finds_a_broken_tree(broken: Any) -> None:
    dice = fuzz.Dice(7)
    wheel = [name for name, weight in WEIGHTS.items() for _ in range(weight)]

    def drive() -> None:
        for _ in range(6):
            driver = Driver(ReferenceTree, broken, 2, "lru", events=True, pages=40, host_pages=40, max_events=40)
            for _ in range(1000):
                driver.step(wheel[dice.below(len(wheel))], dice)
                driver.check()
            driver.finish()

    with pytest.raises((AssertionError, RadixKVError)):
        drive()


def test_a_failure_is_told_with_seed_step_and_log(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setitem(implementations(), "broken", LosesAPage)
    with pytest.raises(AssertionError):
        fuzz.run(5000, 99, ("reference", "broken"), "lru", 2)
    told = capsys.readouterr().err
    assert "seed 99, step " in told
    assert " insert(key " in told
