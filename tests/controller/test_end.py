"""Reset, close, detach: nothing waits, nothing is left behind, whatever is in flight. And the real threads."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from radixkv.controller.lanes import CopyLane, CopyTicket, PageLane
from radixkv.controller.workers import StorageWorkers
from radixkv.errors import GroupError, LoadError, StateError, StorageError, TransferError
from radixkv.storage import MemoryStorage, Storage
from radixkv.storage.file import FileStorage
from radixkv.storage.sealed import Prefix

from .kit import GEOMETRY, ROOT, P, ScriptedEdge, Stack, ThreadGroup, content_of, page_store, prompt

QUICK_S = 1.0
"""What takes milliseconds, on a machine that does other things too."""


def timed(call: Any, *arguments: Any) -> float:
    began_s = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - began_s


def everything_in_flight(**options: Any) -> Stack:
    """A copy each way, a queued load, a store, and prefetches at every stage."""
    stack = Stack(storage=True, prefetch_policy="wait_complete", host_pages=200, **options)
    assert stack.edge is not None
    for seed in (1, 2, 3, 4, 5):
        node = stack.compute(prompt(seed, 4))
        stack.settle()
        stack.controller.store(node)
        stack.settle()
    stack.controller.reset()
    for seed in (3, 4, 5):
        stack.compute(prompt(seed, 4))
        stack.settle()
    stack.controller.evict(10**6)
    for name in ("looking up", "fetching", "fetched"):
        stack.controller.prefetch(name, prompt(1 if name == "fetching" else 2, 4), ROOT)
        if name != "looking up":
            stack.edge.run()
            stack.controller.poll()
            stack.edge.step()
    stack.edge.run()
    stack.controller.poll()
    stack.mover.begins = bool(options.get("settle_timeout_s") == 0.0)
    stack.controller.load(stack.controller.match(prompt(3, 4)).host_node)
    stack.controller.start_loads()
    stack.controller.load(stack.controller.match(prompt(4, 4)).host_node)
    stack.controller.store(stack.controller.match(prompt(5, 4)).host_node)
    stack.edge.step("store")
    stack.compute(prompt(6, 4))
    stats = stack.controller.stats()
    assert (stats.writes_in_flight, stats.loads_in_flight, stats.queued_loads, stats.stores_in_flight) == (1, 2, 1, 1)
    assert stats.prefetches_in_flight >= 2
    stack.check()
    return stack


# ---- reset -----------------------------------------------------------------------------------------------------------
def test_reset_with_everything_in_flight_leaves_nothing_behind() -> None:
    stack = everything_in_flight()
    assert timed(stack.controller.reset) < QUICK_S
    assert stack.device.available == stack.device.capacity
    stats = stack.controller.stats()
    assert [value for name, value in stats._asdict().items() if name.endswith("_in_flight")] == [0] * 5
    stack.check()
    stack.edge.run()
    stack.controller.poll()
    assert stack.host.available_size() == stack.host.size
    stack.check()
    assert stack.serve(prompt(6, 4)) == 0
    stack.compute(prompt(6, 4))
    stack.settle()
    stack.check()


def test_reset_does_not_wait_for_what_is_stuck_but_keeps_its_pages() -> None:
    stack = everything_in_flight(settle_timeout_s=0.0)
    assert timed(stack.controller.reset) < QUICK_S
    stats = stack.controller.stats()
    assert stats.stuck_pages > 0
    assert stack.device.available == stack.device.capacity - 4  # the load still writes there
    stack.check()
    stack.controller.reset()  # and once more
    stack.check()
    stack.mover.run()
    stack.edge.run()
    stack.controller.poll()
    assert stack.controller.stats().stuck_pages == 0
    assert stack.device.available == stack.device.capacity
    assert stack.host.available_size() == stack.host.size
    stack.check()


def test_reset_while_two_storages_read_the_same_pages() -> None:
    """The one that was detached hangs in a call, and so does the next: the pages return once, after both."""
    stack = Stack(storage=True)
    node = stack.compute(prompt(1, 4))
    stack.settle()
    first, second = stack.edge, ScriptedEdge(page_store(stack.host), stack.config, stack.host)
    first.close = lambda timeout_s: False
    for edge in (first, second):
        edge.begins = True
        if edge is second:
            stack.controller.detach_storage()
            stack.controller.attach_storage(edge)
        assert stack.controller.store(node) is not None
        edge.step("store")
    stack.check()
    stack.controller.reset()
    for edge in (first, second):
        assert stack.controller.stats().stuck_pages == 4
        assert stack.host.available_size() == stack.host.size - 4 * P
        stack.check()
        stack.controller.reset()  # and once more
        edge.run()
        stack.controller.poll()
    assert stack.controller.stats().stuck_pages == 0
    assert stack.host.available_size() == stack.host.size
    stack.check()


def test_reset_without_the_other_rank_drops_everything_here() -> None:
    group, lost = ThreadGroup.make(2)
    lost.leave()
    stack = Stack(storage=True)
    stack.controller._context.group = group  # they have parted since
    stack.compute(prompt(1, 4))
    stack.controller.store(stack.controller.match(prompt(1, 4)).device_node)
    with pytest.raises(GroupError, match="another rank is gone"):
        stack.controller.reset()
    assert stack.device.available == stack.device.capacity
    assert stack.host.available_size() == stack.host.size
    stack.check()


def test_who_waits_for_a_load_is_woken_by_reset() -> None:
    stack = Stack()
    stack.compute(prompt(1, 3))
    stack.settle()
    stack.controller.evict(3 * P)
    stack.controller.load(stack.controller.match(prompt(1, 3)).host_node)
    index = stack.controller.start_loads()
    told: list[BaseException] = []

    def forward() -> None:
        try:
            stack.controller.layer_counter.wait(0, 30.0, index)
        except LoadError as error:
            told.append(error)

    thread = threading.Thread(target=forward)
    thread.start()
    stack.controller.reset()
    thread.join(10)
    assert len(told) == 1


def test_detach_with_everything_in_flight() -> None:
    stack = everything_in_flight()
    assert timed(stack.controller.detach_storage) < QUICK_S
    stack.check()
    stack.settle()
    assert stack.controller.stats().prefetches_in_flight == 0
    stack.check()


# ---- threads ---------------------------------------------------------------------------------------------------------
class Gated(Storage):
    """A storage whose calls wait for a gate."""

    name = "gated"

    def __init__(self) -> None:
        self.inner, self.gate, self.inside = MemoryStorage(), threading.Event(), threading.Event()
        self.gate.set()

    def _enter(self) -> None:
        self.inside.set()
        assert self.gate.wait(60)

    def put_many(self, keys: Any, parts: Any, *, timeout_s: float | None = None) -> Any:
        self._enter()
        return self.inner.put_many(keys, parts)

    def get_many(self, keys: Any, parts: Any, *, timeout_s: float | None = None) -> Any:
        self._enter()
        return self.inner.get_many(keys, parts)

    def exists_many(self, keys: Any, *, timeout_s: float | None = None) -> Any:
        return self.inner.exists_many(keys)

    def delete_many(self, keys: Any, *, timeout_s: float | None = None) -> None:
        self.inner.delete_many(keys)

    def clear(self, *, timeout_s: float | None = None) -> None:
        self.inner.clear()

    def close(self) -> None:
        self.gate.set()


def until(condition: Any, stack: Stack) -> None:
    """Poll until something holds."""
    end_s = time.monotonic() + 30
    while not condition():
        stack.controller.poll()
        assert time.monotonic() < end_s, stack.controller.stats()


def test_the_whole_way_with_threads_and_files_and_a_restart(tmp_path: Any) -> None:
    tokens = prompt(1, 12)
    storage = FileStorage(tmp_path)
    stack = Stack(threads=True, storage=storage, store_after_backup=True)
    stack.compute(tokens)
    until(lambda: stack.controller.stats().stores == 1, stack)
    stack.check()
    assert stack.controller.close()
    storage.close()
    ours = {"radixkv-write", "radixkv-load", "radixkv-look_up", "radixkv-fetch", "radixkv-store"}
    assert not ours & {thread.name for thread in threading.enumerate()}

    storage = FileStorage(tmp_path)
    again = Stack(threads=True, storage=storage, prefetch_policy="wait_complete")
    assert again.controller.prefetch("r", tokens, ROOT)
    until(lambda: again.controller.finish_prefetch("r"), again)
    match = again.controller.match(tokens)
    load = again.controller.load(match.host_node)
    assert load is not None
    again.controller.layer_counter.set_consumer(again.controller.start_loads())
    for layer in range(GEOMETRY.num_layers):
        again.controller.layer_counter.wait_until(layer)
    assert np.array_equal(again.device.data[load.page_ids], content_of(tokens))
    until(lambda: again.controller.stats().loads == 1, again)
    again.check()
    again.controller.close()
    storage.close()


def test_reset_and_close_while_storage_hangs() -> None:
    storage = Gated()
    stack = Stack(threads=True, storage=storage, store_after_backup=True, close_timeout_s=0.05)
    stack.compute(prompt(1, 6))
    storage.gate.clear()
    storage.inside.clear()
    until(lambda: stack.controller.stats().stores_in_flight == 1, stack)
    assert storage.inside.wait(30)
    assert timed(stack.controller.reset) < QUICK_S
    assert stack.controller.stats().stuck_pages == 6  # storage still reads them
    assert stack.host.available_size() == stack.host.size - 6 * P
    stack.check()
    assert timed(stack.controller.close) < QUICK_S
    assert not stack.controller.close()  # a thread is still in storage: the host pool must stay
    storage.gate.set()
    until(lambda: stack.controller.stats().stuck_pages == 0, stack)
    assert stack.host.available_size() == stack.host.size
    stack.check()
    stack.controller.close()


def test_close_ends_what_waits_and_waits_for_what_runs() -> None:
    began, go = threading.Event(), threading.Event()

    def copy() -> None:
        began.set()
        assert go.wait(30)

    lane = CopyLane("radixkv-test")
    running, waiting = CopyTicket(copy), CopyTicket(lambda: None)
    lane.put(running)
    lane.put(waiting)
    assert began.wait(30)
    assert not running.cancel()
    closer = threading.Thread(target=lane.close)
    closer.start()
    assert waiting.wait(30)
    assert isinstance(waiting.error, StateError)
    assert not running.done()
    go.set()
    closer.join(30)
    assert running.done()
    assert running.error is None
    late = CopyTicket(lambda: None)
    lane.put(late)
    assert isinstance(late.error, StateError)
    lane.close()


def test_a_ticket_that_was_cancelled_never_runs() -> None:
    told: list[BaseException] = []
    ticket = CopyTicket(lambda: pytest.fail("it ran"), told.append)
    assert ticket.cancel()
    assert not ticket.cancel()
    ticket.run()
    assert ticket.done()
    assert told == [ticket.error]


def test_storage_jobs_end_however_the_backend_fails() -> None:
    class Broken:
        def lost(self) -> int:
            return 0

        def set_pages(self, *_: Any, **__: Any) -> Any:
            raise StorageError("no connection")

        def get_pages(self, *_: Any, **__: Any) -> Any:
            raise ZeroDivisionError("a defect of the backend")

        def find_prefix(self, *_: Any, **__: Any) -> Prefix:
            return Prefix(2, True)

    workers = StorageWorkers(Broken(), Stack().config)
    digests, pages = np.zeros((4, 32), np.uint8), np.arange(4, dtype=np.int32)
    jobs = [workers.store(digests, pages, b""), workers.fetch(digests, pages, b""), workers.look_up(digests, b"")]
    assert all(job.wait(30) for job in jobs)
    assert [type(job.error) for job in jobs] == [StorageError, ZeroDivisionError, type(None)]
    assert jobs[2].pages == 2
    assert workers.close(5.0)
    late = workers.look_up(digests, b"")
    assert isinstance(late.error, StateError)


def test_jobs_take_turns_and_look_ups_do_not_wait_for_them() -> None:
    storage = Gated()
    stack = Stack(host_pages=64)
    workers = StorageWorkers(page_store(stack.host, storage), stack.config)
    pages = stack.host.alloc_pages(8)
    assert pages is not None
    digests = np.random.default_rng(0).integers(0, 256, (8, 32), np.uint8)
    assert workers.store(digests, pages, b"").wait(30)
    storage.gate.clear()
    storage.inside.clear()
    long = workers.fetch(digests, pages, b"")  # four calls
    assert storage.inside.wait(30)
    short, unwanted = workers.fetch(digests[:2], pages[:2], b""), workers.fetch(digests, pages, b"")
    assert workers.look_up(digests, b"").wait(30)
    assert unwanted.cancel()
    assert unwanted.done()
    assert not long.cancel()  # it ends after its call
    storage.gate.set()
    assert short.wait(30)
    assert long.wait(30)
    assert (long.pages, short.pages, unwanted.pages) == (2, 2, 0)
    again = workers.fetch(digests, pages, b"")
    assert again.wait(30)
    assert (again.pages, again.error) == (8, None)
    assert workers.close(5.0)


def test_page_tickets_are_one_copy_and_a_bad_one_takes_no_other_along() -> None:
    copies: list[list[int]] = []

    def copy(src: np.ndarray, dst: np.ndarray, marks: list[str]) -> None:
        assert marks == ["computed"]
        copies.append(src.tolist())
        if 9 in src:
            raise StateError("page 9")

    lane = PageLane("radixkv-test", copy, lambda: "computed")
    good, bad, gone = (lane.take_on(np.array([page], np.int32), np.array([page], np.int32)) for page in (1, 9, 3))
    assert copies == []
    assert gone.cancel()
    assert bad.wait(30)
    assert good.wait(30)
    assert copies == [[1, 9], [1], [9]]
    assert (good.error, str(bad.error)) == (None, "page 9")
    waiting = lane.take_on(np.array([1], np.int32), np.array([1], np.int32))
    lane.close()
    assert isinstance(waiting.error, StateError)


# ---- whatever breaks, nothing hangs ----------------------------------------------------------------------------------
def test_a_callback_that_raises_takes_no_thread_along() -> None:
    def tell(error: BaseException) -> None:
        raise KeyError("a defect of who is told")

    def copy() -> None:
        raise OSError("a broken link")

    lane = CopyLane("radixkv-test")
    untold, cancelled, fine = CopyTicket(copy, tell), CopyTicket(copy, tell), CopyTicket(lambda: None)
    lane.put(untold)
    assert untold.wait(30)
    assert isinstance(untold.error, TransferError)
    assert "a broken link" in str(untold.error)
    assert "a defect of who is told" in str(untold.error)
    assert cancelled.cancel()
    assert cancelled.wait(0)
    lane.put(fine)  # the same thread
    assert fine.wait(30)
    assert fine.error is None
    lane.close()


def test_no_kind_of_exception_ends_a_thread() -> None:
    """A panic of a Rust library is a BaseException, and a signal handler of an engine may raise SystemExit anywhere."""

    def panic(*_: Any, **__: Any) -> Any:
        raise SystemExit("a panic")

    lane, pages = CopyLane("radixkv-test"), PageLane("radixkv-test", panic)
    tickets = [CopyTicket(panic), CopyTicket(lambda: None)]
    for ticket in tickets:
        lane.put(ticket)
    one = np.zeros(1, np.int32)
    together = [pages.take_on(one, one), pages.take_on(one, one)]
    shapeless = pages.take_on(np.zeros((1, 1), np.int32), one)  # cannot be put together with the others
    for ticket in (*tickets, *together, shapeless):
        assert ticket.wait(30)
    assert isinstance(tickets[0].error, SystemExit)
    assert tickets[1].error is None
    assert all(ticket.error is not None for ticket in (*together, shapeless))
    lane.close()
    pages.close()

    class Panics:
        find_prefix = set_pages = get_pages = panic

    workers = StorageWorkers(Panics(), Stack().config)
    jobs = [workers.look_up(np.zeros((4, 32), np.uint8), b"") for _ in range(2)]
    assert all(job.wait(30) for job in jobs)
    assert [type(job.error) for job in jobs] == [SystemExit, SystemExit]
    assert workers.close(5.0)


class NoThreads:
    """While it is on, no thread of ours starts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.on, self.refused, self._start = True, 0, threading.Thread.start
        monkeypatch.setattr(threading.Thread, "start", lambda thread: self.start(thread))

    def start(self, thread: threading.Thread) -> None:
        if self.on and thread.name.startswith("radixkv-"):
            self.refused += 1
            raise RuntimeError("can't start new thread")
        self._start(thread)


def test_without_threads_operations_fail_and_work_again_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = NoThreads(monkeypatch)
    stack = Stack(threads=True, storage=MemoryStorage(), store_after_backup=True, backoff_failures=100)
    tokens = prompt(1, 4)
    node = stack.compute(tokens)  # begins a backup, which raises nothing
    stack.controller.poll()
    until(lambda: stack.controller.stats().backup_failures == 1, stack)
    assert threads.refused == 1
    assert stack.tree.node_info(node).lock_ref == 0
    assert stack.host.available_size() == stack.host.size
    stack.check()
    assert stack.controller.prefetch("r", prompt(2, 4), ROOT)
    until(lambda: stack.controller.stats().prefetches_in_flight == 0, stack)
    assert stack.controller.stats().prefetch_failures == 1
    stack.check()

    threads.on = False
    assert stack.controller.backup(node) == 4 * P
    until(lambda: stack.controller.stats().stores == 1, stack)
    assert stack.controller.evict(4 * P) == 4 * P
    threads.on = True
    load = stack.controller.load(stack.controller.match(tokens).host_node)  # a thread of its own
    assert load is not None
    index = stack.controller.start_loads()
    with pytest.raises(LoadError, match="can't start new thread"):
        stack.controller.layer_counter.wait(0, 30.0, index)
    stack.controller.poll()
    assert stack.controller.match(tokens).host_num_tokens == 4 * P
    stack.check()
    threads.on = False
    load = stack.controller.load(stack.controller.match(tokens).host_node)
    assert load is not None
    assert stack.controller.layer_counter.wait(0, 30.0, stack.controller.start_loads())
    until(lambda: stack.controller.stats().loads == 1, stack)
    assert stack.serve(tokens) == 4 * P
    stack.check()
    assert stack.controller.close()


def test_what_cannot_be_asked_for_has_failed() -> None:
    """An edge, or a mover, that raises: the tree has changed already, and the other ranks go on."""
    stack = Stack(storage=True)
    node = stack.compute(prompt(1, 4))
    stack.settle()

    def refuse(*_: Any) -> Any:
        raise MemoryError("no memory for a job")

    look_up, fetch, store, bring = stack.edge.look_up, stack.edge.fetch, stack.edge.store, stack.edge.bring
    stack.edge.store = refuse
    assert stack.controller.store(node) is not None
    assert stack.controller.poll().failed == 1
    stack.edge.store = store
    stack.controller.store(node)
    stack.settle()
    stack.controller.reset()

    stack.edge.bring = refuse
    assert stack.controller.prefetch("r", prompt(1, 4), ROOT)
    assert stack.controller.poll().failed == 1
    stack.edge.bring = bring
    others = stack.host.alloc(stack.host.size)
    stack.edge.look_up = refuse
    assert stack.controller.prefetch("r", prompt(1, 4), ROOT)
    assert stack.controller.poll().failed == 1
    stack.edge.look_up, stack.edge.fetch = look_up, refuse
    assert stack.controller.prefetch("r", prompt(1, 4), ROOT)
    stack.host.free(others)
    stack.settle()
    assert stack.controller.finish_prefetch("r")
    assert stack.controller.stats().prefetch_failures == 3
    assert stack.host.available_size() == stack.host.size
    stack.edge.fetch = fetch
    stack.check()

    stack.compute(prompt(1, 4))
    stack.settle()
    stack.controller.evict(4 * P)
    stack.mover.new_progress = refuse
    assert stack.controller.load(stack.controller.match(prompt(1, 4)).host_node)
    index = stack.controller.start_loads()
    with pytest.raises(LoadError, match="no memory for a job"):
        stack.controller.layer_counter.wait(0, 0.0, index)
    assert stack.controller.poll().failed == 1
    stack.check()


def test_a_copy_that_hangs_does_not_hold_close() -> None:
    """Whoever closes is told, and may ask again."""
    go, began = threading.Event(), threading.Event()

    class Hangs:
        def copy(self, *_: Any) -> None:
            began.set()
            go.wait()

    stack = Stack(threads=True, close_timeout_s=0.05)
    stack.compute(prompt(1, 3))
    stack.settle(10**6)
    stack.controller.evict(3 * P)
    stack.mover._to_device = Hangs()
    stack.controller.load(stack.controller.match(prompt(1, 3)).host_node)
    stack.controller.start_loads()
    assert began.wait(30)
    assert not stack.controller.close()
    go.set()
    stack.mover._loads._thread.join(30)
    assert stack.controller.close()
