"""mover_cpu.py: who waits for a copy does it, in order, as long as he has time; what is left is the thread's."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from radixkv.controller.lanes import PageTicket
from radixkv.controller.mover_cpu import SharedLane
from radixkv.errors import StateError
from radixkv.types import PageIds


class Copies:
    """A lane over a copy that writes down which thread copied what. ``at_most``: pages that who waits has time for."""

    def __init__(self) -> None:
        self.done: list[tuple[bool, list[int]]] = []
        self.at_most, self.bad = 1 << 20, -1
        self.copied = threading.Event()
        self.lane = SharedLane("radixkv-test", lambda src, dst, marks: self._copy(src), self._copy_until)

    def _copy(self, src: PageIds) -> None:
        if self.bad in src:
            raise StateError(f"page {self.bad}")
        self.done.append((threading.current_thread().name == "radixkv-test", src.tolist()))
        self.copied.set()

    def _copy_until(self, src: PageIds, dst: PageIds, until_s: float | None) -> int:
        self._copy(src[: self.at_most])
        return min(self.at_most, len(src))

    def take_on(self, *pages: int) -> PageTicket:
        ids = np.array(pages, np.int32)
        return self.lane.take_on(ids, ids)


@pytest.fixture
def copies() -> Any:
    made = Copies()
    yield made
    made.lane.close()


def test_who_waits_copies_what_is_before_it_too(copies: Copies) -> None:
    first, second = copies.take_on(1, 2), copies.take_on(3)
    assert second.wait()
    assert first.done()
    assert copies.done == [(False, [1, 2, 3])]
    assert copies.lane._thread is None  # nobody was woken
    assert first.wait(0)


def test_who_has_no_time_leaves_it_to_the_thread(copies: Copies) -> None:
    ticket = copies.take_on(1)
    ticket.wait(0)
    assert copies.copied.wait(30)
    assert ticket.wait(30)
    assert copies.done == [(True, [1])]


def test_the_thread_does_what_is_left_at_the_deadline(copies: Copies) -> None:
    copies.at_most = 2
    first, second, third = copies.take_on(1), copies.take_on(2, 3, 4), copies.take_on(5)
    assert second.wait(30)
    assert third.wait(30)
    assert copies.done[0] == (False, [1, 2])
    assert all(by_thread for by_thread, _ in copies.done[1:])
    assert [page for _, pages in copies.done for page in pages] == [1, 2, 3, 4, 5]
    assert [ticket.error for ticket in (first, second, third)] == [None] * 3
    assert not second.cancel()


def test_a_bad_one_takes_no_other_along(copies: Copies) -> None:
    copies.bad = 9
    good, bad, gone = copies.take_on(1), copies.take_on(9), copies.take_on(3)
    assert gone.cancel()
    assert bad.wait(30)
    assert good.wait(30)
    assert (good.error, str(bad.error)) == (None, "page 9")
    assert copies.done == [(True, [1])]
    alone = copies.take_on(9)
    assert alone.wait()
    assert str(alone.error) == "page 9"


def test_nor_if_time_is_up_before_it(copies: Copies) -> None:
    copies.at_most, copies.bad = 2, 9
    tickets = copies.take_on(1), copies.take_on(2, 3), copies.take_on(9), copies.take_on(4)
    assert all(ticket.wait(30) for ticket in tickets)
    assert [str(ticket.error) for ticket in tickets] == ["None", "None", "page 9", "None"]
    assert [pages for _, pages in copies.done] == [[1, 2], [3], [4]]


def test_what_is_left_ends_with_the_lane(copies: Copies) -> None:
    copies.at_most = 1
    held = copies.lane._copying
    with held:  # the thread cannot begin
        ticket = copies.take_on(1, 2)
        assert not ticket.wait(0.01)
        closer = threading.Thread(target=copies.lane.close)
        closer.start()
        assert ticket.wait(30)
    closer.join(30)
    assert isinstance(ticket.error, StateError)
    assert copies.done == []


def test_while_the_thread_copies_one_waits_for_it() -> None:
    began, go = threading.Event(), threading.Event()

    def copy(*_: Any) -> None:
        began.set()
        assert go.wait(30)

    lane = SharedLane("radixkv-test", copy, lambda *_: pytest.fail("two copy at once"))
    ids = np.array([1], np.int32)
    first = lane.take_on(ids, ids)
    lane.flush()
    assert began.wait(30)
    second = lane.take_on(ids, ids)
    began_s = time.monotonic()
    assert not second.wait(0.02)
    assert time.monotonic() - began_s < 10
    go.set()
    assert second.wait(30)
    assert first.done()
    lane.close()
