"""L2: worker threads that do not keep the process from ending.

Those of concurrent.futures are joined at exit: one inside a plug-in that never returns keeps the engine for ever.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from ..errors import StorageError

__all__ = ["DaemonPool"]

T = TypeVar("T")


class DaemonPool:
    """Up to ``num_threads`` daemon threads, each started when a call finds the others busy. Thread-safe."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._num_threads, self._name = num_threads, name
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Run a call on a thread. Raises: StorageError after shutdown or without any thread; it is never run then."""
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise StorageError(f"{self._name}: the storage is closed")
            if not self._idle.acquire(blocking=False) and len(self._threads) < self._num_threads:
                self._start_thread()
            self._calls.put((future, call))
        return future

    def _start_thread(self) -> None:
        name = f"{self._name}_{len(self._threads)}"
        thread = threading.Thread(target=_work, args=(self._calls, self._idle), name=name, daemon=True)
        self._threads.append(thread)  # first: an interrupt may come while it starts, and it is there then
        try:
            thread.start()
        except (RuntimeError, MemoryError) as error:
            self._threads.pop()
            if not self._threads:
                raise StorageError(f"thread {name} cannot be started: {error}") from error

    def run_all(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """Run tasks, and wait for all of them, whatever happens. Raises: one of their errors.

        The caller works too, and waits only for threads that are inside a task: on a busy machine they come late. Where
        no thread can be had it does all by itself.
        """
        results: dict[int, T] = {}
        errors: list[BaseException] = []
        todo = deque(enumerate(tasks))

        def work() -> None:
            with suppress(IndexError):
                while True:
                    index, task = todo.popleft()
                    try:
                        results[index] = task()
                    except BaseException as error:
                        errors.append(error)

        helpers: list[Future[None]] = []
        try:
            with suppress(StorageError):
                for _ in range(min(self._num_threads, len(tasks) - 1)):
                    helpers.append(self.submit(work))
            work()
        finally:
            todo.clear()  # there is something left only if who calls was interrupted
            for helper in helpers:
                while not (helper.cancel() or helper.done()):
                    try:
                        helper.result()
                    except BaseException as error:  # SIGINT, in the main thread: memory is the caller's only afterwards
                        errors.append(error)
        if errors:
            try:
                raise errors[0]
            finally:
                errors.clear()  # else the error and this frame hold each other, and views of the caller's memory
        return [results[index] for index in range(len(tasks))]

    def shutdown(self, wait: bool = True) -> None:
        """Cancel the calls that have not begun. Args: wait: until the threads have ended."""
        with self._lock:
            closed, self._closed = self._closed, True
            threads = list(self._threads)
        while not closed:
            try:
                waiting = self._calls.get_nowait()
            except queue.Empty:
                break
            if waiting is not None:
                waiting[0].cancel()
        if not closed:
            for _ in threads:
                self._calls.put(None)
        if wait:
            for thread in threads:
                thread.join()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.shutdown(wait=False)


def _work(calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None], idle: threading.Semaphore) -> None:
    while (waiting := calls.get()) is not None:
        future, call = waiting
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
        del waiting, future, call  # buffers are not kept until the next call
        idle.release()
