"""The parts that need no stack: operations, settings, back-off, groups of one, the ledger."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from radixkv.controller import ControllerConfig, ControllerStats
from radixkv.controller.backoff import BackOff
from radixkv.controller.lanes import FailedTicket
from radixkv.controller.ledger import Ledger
from radixkv.controller.operations import (
    OVERDUE,
    DrainOp,
    LoadOp,
    Operation,
    PrefetchOp,
    Stage,
    StoreOp,
    WriteOp,
    copy_status,
    pages_status,
    read_pages_status,
)
from radixkv.errors import InvalidArgumentError, StateError
from radixkv.pool.slots import SlotAllocator
from radixkv.pool.states import HostSlots, MemoryStateInt

MACHINES: list[type[Operation]] = [WriteOp, LoadOp, StoreOp, PrefetchOp, DrainOp]


# ---- operations ------------------------------------------------------------------------------------------------------
def at(machine: type[Operation], stage: Stage) -> Operation:
    """An operation of a kind, at a stage."""
    op = machine.__new__(machine)
    op.op_id, op.started_s, op.stage = 7, 0.0, stage
    return op


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.__name__)
def test_what_the_table_does_not_have_is_refused(machine: type[Operation]) -> None:
    for source, target in itertools.product(Stage, Stage):
        op = at(machine, source)
        if target in machine.MOVES.get(source, ()):
            op.to(target)
            assert op.stage is target
        else:
            with pytest.raises(StateError, match=f"{machine.__name__} 7 cannot go from {source.name} to {target.name}"):
                op.to(target)
            assert op.stage is source


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.__name__)
def test_every_stage_leads_to_an_end_and_no_end_leads_on(machine: type[Operation]) -> None:
    for source, targets in machine.MOVES.items():
        assert not at(machine, source).ended
        assert any(at(machine, target).ended for target in targets)
        assert all(target in machine.MOVES or at(machine, target).ended for target in targets)
    reached, waiting = set(), {machine.FIRST}
    while waiting:
        stage = waiting.pop()
        reached.add(stage)
        waiting |= set(machine.MOVES.get(stage, ())) - reached
    assert reached >= set(machine.MOVES)


class Work:
    seconds = 0.0

    def __init__(self, done: bool, error: BaseException | None = None, pages: int = 0) -> None:
        self._done, self.error, self.pages = done, error, pages

    def done(self) -> bool:
        return self._done

    def cancel(self) -> bool:
        return self._done

    def wait(self, timeout_s: float | None = None) -> bool:
        return self._done


def test_the_least_status_is_what_all_ranks_can_stand_for() -> None:
    running, failed, good = (copy_status(work) for work in (Work(False), Work(True, OSError()), Work(True)))
    assert 0 == running < OVERDUE < failed < good
    assert copy_status(FailedTicket(OSError())) == failed
    assert pages_status(Work(False, pages=9)) == running
    statuses = [pages_status(Work(True, error, pages)) for pages in range(4) for error in (OSError(), None)]
    assert statuses == sorted(set(statuses))
    assert [read_pages_status(status) for status in statuses] == [(p, ok) for p in range(4) for ok in (False, True)]


# ---- settings --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("wrong", [
    {"write_policy": "write_sometimes"}, {"prefetch_policy": "hope"}, {"load_policy": ""}, {"max_writes": 0},
    {"write_through_threshold": 0}, {"busy_fraction": 1.5}, {"storage_timeout_s": 0}, {"prefetch_threshold": -1},
])  # fmt: skip
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(wrong))):
        ControllerConfig(**wrong)


def test_settings_that_do_not_exist_are_refused() -> None:
    with pytest.raises(TypeError):
        ControllerConfig(write_polizy="write_back")  # type: ignore[call-arg]


def test_every_setting_is_documented() -> None:
    text = ControllerConfig.__doc__ or ""
    assert [name for name in ControllerConfig.__dataclass_fields__ if name not in text] == []


def test_thresholds_follow_the_policy_unless_they_are_set() -> None:
    assert ControllerConfig(write_policy="write_through").hits_to_host == 1
    assert ControllerConfig(write_policy="write_through_selective").hits_to_storage == 3
    config = ControllerConfig(write_through_threshold=5, write_through_threshold_storage=7)
    assert (config.hits_to_host, config.hits_to_storage) == (5, 7)


def test_equal_settings_have_equal_fingerprints() -> None:
    whole, real = ControllerConfig(copy_timeout_s=10).settings(), ControllerConfig(copy_timeout_s=10.0).settings()
    assert repr(whole) == repr(real)
    assert whole != ControllerConfig(max_writes=9).settings()


def test_every_counter_is_a_field() -> None:
    assert all(value == 0 for value in ControllerStats())


# ---- back-off --------------------------------------------------------------------------------------------------------
def test_back_off_doubles_up_to_its_most_and_ends_with_a_success() -> None:
    now_s = [0.0]
    backoff = BackOff(ControllerConfig(backoff_failures=2, backoff_base_s=1, backoff_max_s=3), lambda: now_s[0])
    backoff.result(False)
    assert not backoff.active
    for wait_s in (1, 2, 3, 3):
        backoff.result(False)
        assert backoff.active
        now_s[0] += wait_s - 0.5
        assert not backoff.may_end()
        now_s[0] += 0.5
        assert backoff.may_end()
        backoff.end()
    backoff.result(True)
    backoff.result(False)
    assert not backoff.active


# ---- ledger ----------------------------------------------------------------------------------------------------------
def ids(*pages: int) -> Any:
    return np.array(pages, np.int32)


def test_host_pages_follow_the_drawing() -> None:
    host = HostSlots(8, 4)
    ledger = Ledger(SlotAllocator(8), host)
    device, pages = ledger.alloc_device(3), ledger.reserve(3, for_copy=True)
    assert device is not None
    assert pages is not None
    with pytest.raises(StateError):
        host.free_pages(pages)  # under a copy
    ledger.end_write(device, pages)
    ledger.left_device(device[:2])  # not the third
    ledger.device.free(device[:2])
    assert host.states_of(pages).tolist() == [MemoryStateInt.BACKUP] * 2 + [MemoryStateInt.SYNCED]
    assert ledger.backup_pages == 2
    assert ledger.pairs() == {int(device[2]): int(pages[2])}
    again = ledger.alloc_device(2)
    assert again is not None
    ledger.begin_load(pages[:2])
    ledger.end_load(again, pages[:2])
    assert ledger.backup_pages == 0
    left = np.concatenate([again, device[2:]])
    ledger.left_device(left)
    ledger.device.free(left)
    ledger.free_host(pages)
    assert (ledger.backup_pages, host.available_size(), ledger.device.available) == (0, 32, 8)
    host.check_integrity()
