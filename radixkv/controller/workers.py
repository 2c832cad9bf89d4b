"""L3: the threads in front of a PageStore. They touch host pages and storage, never the tree.

    look-ups and fetches  --> reader thread      a look-up goes before a fetch: somebody waits for it sooner
    stores                --> writer thread

Queues are bounded by the controller (max_prefetches, max_stores); what is cancelled leaves the queue at once. A call to
storage has a deadline, a job is cancelled between two calls.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, Literal, Protocol

import numpy as np

from ..errors import StateError
from ..types import PageIds
from .base import BoolArray, Digests
from .config import ControllerConfig

__all__ = ["Job", "PageStoreLike", "StorageWorkers", "work_on"]


class PageStoreLike(Protocol):
    """What is needed of a PageStore."""

    def set_pages(
        self, digests: Any, host_pages: Any, *, salt: bytes = b"", timeout_s: float | None = None
    ) -> BoolArray: ...

    def get_pages(
        self, digests: Any, host_pages: Any, *, salt: bytes = b"", timeout_s: float | None = None
    ) -> BoolArray: ...

    def count_prefix(self, digests: Any, *, salt: bytes = b"", timeout_s: float | None = None) -> int: ...


class Job:
    """One task of a worker. A StorageJob. Written by one worker, read by any thread."""

    def __init__(
        self, kind: Literal["look_up", "fetch", "store"], digests: Digests, host_pages: PageIds | None, salt: bytes
    ) -> None:
        self.kind, self.digests, self.host_pages, self.salt = kind, digests, host_pages, salt
        self.pages = 0
        self.seconds = 0.0
        self.error: BaseException | None = None
        self.cancelled = False
        self._ended = threading.Event()
        self.queue: _Queue | None = None

    def done(self) -> bool:
        return self._ended.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        return self._ended.wait(timeout_s)

    def cancel(self) -> bool:
        self.cancelled = True
        if self.queue is not None and self.queue.remove(self):
            self.end()
        return self.done()

    def end(self, error: BaseException | None = None) -> None:
        """By its worker: it touches nothing any more."""
        self.error = self.error or error
        self._ended.set()


class _Queue:
    """Jobs that wait for one worker; the urgent ones first."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self._urgent: deque[Job] = deque()
        self._others: deque[Job] = deque()
        self.closed = False

    def put(self, job: Job) -> None:
        with self.changed:
            if self.closed:
                job.end(StateError("storage is detached"))
                return
            job.queue = self
            (self._urgent if job.kind == "look_up" else self._others).append(job)
            self.changed.notify()

    def take(self) -> Job | None:
        """The next job, which is begun by that; None once closed."""
        with self.changed:
            while not (self._urgent or self._others or self.closed):
                self.changed.wait()
            if self.closed:
                return None
            return (self._urgent or self._others).popleft()

    def remove(self, job: Job) -> bool:
        """Whether it was still waiting."""
        with self.changed:
            for jobs in (self._urgent, self._others):
                if job in jobs:
                    jobs.remove(job)
                    return True
            return False

    def close(self) -> list[Job]:
        """Returns: the jobs that waited."""
        with self.changed:
            self.closed = True
            left = [*self._urgent, *self._others]
            self._urgent.clear()
            self._others.clear()
            self.changed.notify_all()
            return left


class StorageWorkers:
    """A StorageEdge over a PageStore: one thread reads, one writes, each started with the first job.

    Args: store: its methods may be called on any thread; they may raise anything, which ends the job.
    """

    def __init__(self, store: PageStoreLike, config: ControllerConfig) -> None:
        self._store, self._config = store, config
        self._queues = {"read": _Queue(), "write": _Queue()}
        self._threads: dict[str, threading.Thread] = {}
        self._running: dict[str, Job | None] = {"read": None, "write": None}

    # ---- StorageEdge -------------------------------------------------------------------------------------------------
    def look_up(self, digests: Digests, salt: bytes) -> Job:
        """Count the leading pages that exist."""
        return self._put("read", Job("look_up", digests, None, salt))

    def fetch(self, digests: Digests, host_pages: PageIds, salt: bytes) -> Job:
        """Read pages until one is missing."""
        return self._put("read", Job("fetch", digests, host_pages, salt))

    def store(self, digests: Digests, host_pages: PageIds, salt: bytes) -> Job:
        """Write pages until one fails."""
        return self._put("write", Job("store", digests, host_pages, salt))

    def close(self, timeout_s: float) -> bool:
        """Cancel everything, end the threads. Returns: whether all have ended; what hangs in a call is left behind."""
        end_s = time.monotonic() + timeout_s
        for name, queue in self._queues.items():
            for job in queue.close():
                job.cancelled = True
                job.end()
            running = self._running[name]
            if running is not None:
                running.cancelled = True
        for thread in self._threads.values():
            thread.join(max(0.0, end_s - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads.values())

    # ---- threads -----------------------------------------------------------------------------------------------------
    def _put(self, name: str, job: Job) -> Job:
        if name not in self._threads and not self._queues[name].closed:
            thread = threading.Thread(target=self._work, args=(name,), name=f"radixkv-storage-{name}", daemon=True)
            self._threads[name] = thread
            thread.start()
        self._queues[name].put(job)
        return job

    def _work(self, name: str) -> None:
        queue = self._queues[name]
        while (job := queue.take()) is not None:
            self._running[name] = job
            if queue.closed:
                job.cancelled = True
            error: BaseException | None = None
            try:
                self._run(job)
            except Exception as raised:  # whatever a backend raises is the failure of this job alone
                error = raised
            self._running[name] = None
            job.end(error)

    def _run(self, job: Job) -> None:
        for _ in work_on(job, self._store, self._config):
            pass


def work_on(job: Job, store: PageStoreLike, config: ControllerConfig) -> Iterator[None]:
    """Do a job, a call to storage a step, until it is done, fails or is cancelled; ``end`` it afterwards."""
    while not job.cancelled:
        began_s = time.perf_counter()
        try:
            more = _one_call(job, store, config)
        finally:
            job.seconds += time.perf_counter() - began_s
        if not more:
            return
        yield


def _one_call(job: Job, store: PageStoreLike, config: ControllerConfig) -> bool:
    """Returns: whether there is more to do."""
    if job.host_pages is None:
        job.pages = store.count_prefix(job.digests, salt=job.salt, timeout_s=config.storage_timeout_s)
        return False
    call = store.get_pages if job.kind == "fetch" else store.set_pages
    part = slice(job.pages, job.pages + config.storage_batch_pages)
    flags = call(job.digests[part], job.host_pages[part], salt=job.salt, timeout_s=config.storage_timeout_s)
    done = len(flags) if flags.all() else int(np.argmin(flags))
    job.pages += done
    return done == len(flags) and job.pages < len(job.host_pages)
