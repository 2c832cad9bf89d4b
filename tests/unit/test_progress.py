"""Progress: one copy in its life, waiters that never hang, whatever becomes of the copy."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from radixkv.errors import InvalidArgumentError, PageOwnershipError, StateError, TransferError
from radixkv.transfer.cpu import CpuTransfer, Progress
from radixkv.transfer.plan import plan_copy

from .transfer_kit import PAGES, HostPool, geometry, on_device

G = geometry(layers=4)


def pools() -> tuple[HostPool, HostPool]:
    return HostPool.make(G, "page_first", PAGES, seed=1), HostPool.make(G, "layer_first", PAGES)


class Waiter(threading.Thread):
    """Waits for one layer; keeps what came of it."""

    def __init__(self, progress: Progress, layer: int) -> None:
        super().__init__()
        self.progress, self.layer = progress, layer
        self.found: bool | BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.found = self.progress.wait(self.layer, 60)
        except BaseException as error:
            self.found = error

    def result(self) -> Any:
        self.join(60)
        assert not self.is_alive()
        return self.found


def test_a_failure_wakes_every_waiter_and_keeps_what_was_done() -> None:
    progress = Progress(4)
    waiters = [Waiter(progress, layer) for layer in (0, 1, 2, 3, 3, 3)]
    progress.begin(4)
    progress.advance(2)
    assert [waiter.result() for waiter in waiters[:2]] == [True, True]
    cause = OSError("the link is down")
    assert progress.fail(cause)
    for waiter in waiters[2:]:
        error = waiter.result()
        assert isinstance(error, TransferError)
        assert error.__cause__ is cause
        assert str(error) == f"layer {waiter.layer} will not be loaded: OSError('the link is down')"
    assert progress.layers_done == 2
    assert progress.wait(1) is True
    for wait in (lambda: progress.wait(2), lambda: progress.wait(3, 0), lambda: progress.wait_until(2)):
        with pytest.raises(TransferError, match="the link is down"):
            wait()
    assert not progress.fail(RuntimeError("another"))
    assert progress.error is cause


def test_what_is_done_cannot_fail() -> None:
    progress = Progress(2)
    progress.begin(2)
    progress.advance(2)
    assert not progress.fail(RuntimeError("too late"))
    assert progress.error is None
    assert progress.wait(1)


def test_layers_never_go_back() -> None:
    progress = Progress(3)
    progress.advance(2)
    progress.advance(1)
    assert progress.layers_done == 2
    for wrong in (-1, 4):
        with pytest.raises(InvalidArgumentError, match=f"{wrong} layers done of 3"):
            progress.advance(wrong)


def test_a_failure_is_an_exception() -> None:
    wrong: Any = "broken"
    with pytest.raises(InvalidArgumentError, match="fails with an exception, not 'broken'"):
        Progress(1).fail(wrong)


Load = Callable[[CpuTransfer, HostPool, HostPool, Progress], None]
LOADS: dict[str, Load] = {
    "load_back": lambda t, s, d, p: t.load_back(s.view, d.view, [0, 1], [1, 2], p),
    "copy": lambda t, s, d, p: t.copy(t.plan(s.view, d.view, [0, 1], [1, 2]), p),
    "route": lambda t, s, d, p: t.route(s.view, d.view).copy(np.array([0, 1]), np.array([1, 2]), p),
    "route, by lists": lambda t, s, d, p: t.route(s.view, d.view).copy([0, 1], [1, 2], p),
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_one_copy_in_its_life(load: Load) -> None:
    src, dst = pools()
    progress = Progress(4)
    load(CpuTransfer(G), src, dst, progress)
    assert progress.layers_done == 4
    before = dst.whole.copy()
    src.blocks[0][:] = 0
    with pytest.raises(StateError, match=r"a progress is of one copy, and this one had its own \(4 layers done\)"):
        load(CpuTransfer(G), src, dst, progress)
    assert np.array_equal(dst.whole, before)
    assert progress.error is None, "the first copy's readers are not disturbed"
    failed = Progress(4)
    failed.fail(RuntimeError("cancelled"))
    with pytest.raises(StateError):
        load(CpuTransfer(G), src, dst, failed)
    assert np.array_equal(dst.whole, before)


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_another_number_of_layers(load: Load) -> None:
    src, dst = pools()
    progress = Progress(3)
    with pytest.raises(InvalidArgumentError, match="progress over 3 layers for a copy of 4"):
        load(CpuTransfer(G), src, dst, progress)
    with pytest.raises(TransferError, match="progress over 3 layers"):
        progress.wait(0)
    assert (dst.whole == HostPool.make(G, "layer_first", PAGES).whole).all()


FAILING: dict[str, tuple[Load, type[Exception]]] = {
    "a page twice": (lambda t, s, d, p: t.load_back(s.view, d.view, [0, 1], [2, 2], p), PageOwnershipError),
    "a page that is not": (
        lambda t, s, d, p: t.route(s.view, d.view).copy(np.array([PAGES]), np.array([0]), p), InvalidArgumentError),
    "another device": (
        lambda t, s, d, p: t.copy(plan_copy(G, on_device(s.view), d.view, [0], [0]), p), InvalidArgumentError),
}  # fmt: skip


@pytest.mark.parametrize("what", FAILING)
def test_waiters_do_not_hang_when_the_load_fails(what: str) -> None:
    load, expected = FAILING[what]
    src, dst = pools()
    progress = Progress(4)
    waiters = [Waiter(progress, layer) for layer in range(4)]
    with pytest.raises(expected) as raised:
        load(CpuTransfer(G), src, dst, progress)
    for waiter in waiters:
        error = waiter.result()
        assert isinstance(error, TransferError)
        assert error.__cause__ is raised.value


def test_many_waiters_and_many_failures_at_once() -> None:
    """Whoever fails first is the one that all see."""
    for _ in range(30):
        progress = Progress(2)
        start = threading.Barrier(4)
        news: list[bool] = []

        def fail(number: int, progress: Progress = progress, start: Any = start, news: Any = news) -> None:
            start.wait()
            news.append(progress.fail(RuntimeError(str(number))))

        waiters = [Waiter(progress, 1) for _ in range(3)]
        threads = [threading.Thread(target=fail, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(news) == [False, False, False, True]
        assert {waiter.result().__cause__ for waiter in waiters} == {progress.error}
