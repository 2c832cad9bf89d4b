"""L3: the threads in front of a PageStore. They touch host pages and storage, never the tree.

    look-ups -> one thread     fetches -> one thread (those that look first, too)     stores -> one thread
    A worker makes one call to storage for the job at the front, and puts it at the end of its queue if there is more to
    do: a long job does not keep short ones waiting, and what is cancelled leaves the queue at once. Stores are done one
    after the other: the pages of a node follow those of the node above.

Queues are bounded by the controller (max_prefetches, max_stores). A call to storage has a deadline.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from typing import Any, Literal, Protocol, TypeAlias, get_args

import numpy as np

from ..errors import StateError, StorageError
from ..storage.sealed import Prefix
from ..types import PageIds
from .base import BoolArray, Digests
from .config import ControllerConfig
from .lanes import start_thread

__all__ = ["EndedJob", "Job", "PageStoreLike", "StorageWorkers", "work_on"]

_log = logging.getLogger("radixkv.controller")

JobKind: TypeAlias = Literal["look_up", "fetch", "store"]


class PageStoreLike(Protocol):
    """What is needed of a PageStore."""

    def set_pages(
        self, digests: Any, host_pages: Any, *, salt: bytes = b"", timeout_s: float | None = None,
        after: bytes | None = None,
    ) -> BoolArray: ...  # fmt: skip

    def get_pages(
        self, digests: Any, host_pages: Any, *, salt: bytes = b"", timeout_s: float | None = None
    ) -> BoolArray: ...

    def find_prefix(
        self, digests: Any, *, salt: bytes = b"", timeout_s: float | None = None, touch: bool = False
    ) -> Prefix: ...

    def lost(self) -> int: ...


def let_go(error: BaseException | None) -> None:
    """Clear the frames that an error remembers: their views of host pages would keep the pool from being closed."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


class Job:
    """One task of a worker. A StorageJob. Written by one worker, read by any thread."""

    def __init__(
        self, kind: JobKind, digests: Digests, host_pages: PageIds | None, salt: bytes, look_first: bool = False,
        after: bytes = b"",
    ) -> None:  # fmt: skip
        self.kind, self.digests, self.host_pages, self.salt = kind, digests, host_pages, salt
        self.look_first, self.after = look_first, after
        self.least: int | None = None
        self.found: int | None = None
        self.lost_before: int | None = None
        self.pages = 0
        self.seconds = 0.0
        self.error: BaseException | None = None
        self.cancelled = False
        self._ended = threading.Event()
        self.worker: _Worker | None = None

    @classmethod
    def bring(cls, digests: Digests, host_pages: PageIds, salt: bytes, least: int) -> Job:
        """See StorageEdge.bring."""
        job = cls("fetch", digests, host_pages, salt)
        job.least = least
        return job

    @property
    def reach(self) -> int:
        if self.host_pages is None:
            return 0
        ended, found = self.done(), self.found  # in this order: what it has found is final when it has ended
        if self.least is None or (found is None and not ended):
            return len(self.host_pages)
        return found if found is not None and found >= self.least else 0

    def done(self) -> bool:
        return self._ended.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        return self._ended.wait(timeout_s)

    def cancel(self) -> bool:
        self.cancelled = True
        if self.worker is not None and self.worker.remove(self):
            self.end()
        return self.done()

    def end(self, error: BaseException | None = None) -> None:
        """By its worker: it touches nothing any more."""
        self.error = self.error or error
        self._ended.set()


class EndedJob:
    """One that never was a worker's; see StorageJob. Args: pages: of another rank that does it; error: why it could not
    even be asked for."""

    found = None
    reach = 0
    seconds = 0.0

    def __init__(self, pages: int = 0, error: BaseException | None = None) -> None:
        self.pages, self.error = pages, error

    def done(self) -> bool:
        return True

    def cancel(self) -> bool:
        return True

    def wait(self, timeout_s: float | None = None) -> bool:
        return True


class _Worker:
    """One thread and its queue; the thread is started with the first job."""

    def __init__(self, name: str, store: PageStoreLike, config: ControllerConfig) -> None:
        self._name, self._store, self._config = name, store, config
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Job, Iterator[None]]] = deque()
        self._running: Job | None = None
        self._logged: type[BaseException] | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def put(self, job: Job) -> None:
        """Do it after those that wait; end it with an error if the worker is closed."""
        job.worker = self
        error: StateError | None = StateError("storage is detached")
        with self._changed:
            if not self._closed:
                error = self._start()
                if error is None:
                    self._waiting.append((job, work_on(job, self._store, self._config)))
                    self._changed.notify()
                    return
        job.end(error)

    def _start(self) -> StateError | None:
        """Start the thread, under the lock, unless it runs. Returns: why that failed; the next job may fare better."""
        if self._thread is None:
            try:
                self._thread = start_thread(self._work, f"radixkv-{self._name}")
            except StateError as error:
                return error
        return None

    def remove(self, job: Job) -> bool:
        """Whether it was waiting, for its first call or between two; it is not any more."""
        with self._changed:
            for at, (other, _) in enumerate(self._waiting):
                if other is job:
                    del self._waiting[at]
                    return True
        return False

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    if self._closed:
                        return
                    self._changed.wait()
                job, work = self._waiting.popleft()
                self._running = job
            more, error = self._step(work)
            if error is not None and type(error) is not self._logged:  # a store's own errors are misses, and counted
                self._logged = type(error)
                _log.warning("worker=%s error=%r", self._name, error)
            with self._changed:
                self._running = None
                if more and not job.cancelled:
                    (self._waiting.appendleft if job.kind == "store" else self._waiting.append)((job, work))
                    continue
            job.end(error)

    @staticmethod
    def _step(work: Iterator[None]) -> tuple[bool, BaseException | None]:
        """Make one call to storage. Returns: whether there is more to do, and why it failed."""
        try:
            next(work)
        except StopIteration:
            return False, None
        except BaseException as error:  # a defect of a backend (a panic of Rust's is no Exception) ends this job alone
            let_go(error)
            return False, error
        return True, None

    def close(self) -> None:
        """End what waits; what runs ends after its call, and then the thread."""
        with self._changed:
            self._closed = True
            left = [job for job, _ in self._waiting]
            self._waiting.clear()
            if self._running is not None:
                self._running.cancelled = True
            self._changed.notify_all()
        for job in left:
            job.cancelled = True
            job.end()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread. Returns: whether it has ended."""
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()


class StorageWorkers:
    """A StorageEdge over a PageStore.

    Args: store: its methods may be called on any thread; they may raise anything, which ends the job.
    """

    def __init__(self, store: PageStoreLike, config: ControllerConfig) -> None:
        self._store = store
        self._workers = {kind: _Worker(kind, store, config) for kind in get_args(JobKind)}

    def look_up(self, digests: Digests, salt: bytes) -> Job:
        """Count the leading pages that exist."""
        return self._put(Job("look_up", digests, None, salt))

    def fetch(self, digests: Digests, host_pages: PageIds, salt: bytes) -> Job:
        """Read pages until one is missing."""
        return self._put(Job("fetch", digests, host_pages, salt))

    def bring(self, digests: Digests, host_pages: PageIds, salt: bytes, least: int) -> Job:
        """Count the leading pages that exist, and read these; none if there are fewer than ``least``."""
        return self._put(Job.bring(digests, host_pages, salt, least))

    def store(
        self, digests: Digests, host_pages: PageIds, salt: bytes, again: bool = False, after: bytes = b""
    ) -> Job:  # fmt: skip
        """Write pages until one fails, none if the page before them is not there; again: those from the first that is
        missing."""
        return self._put(Job("store", digests, host_pages, salt, again, after))

    def lost(self) -> int:
        """See Storage.lost."""
        return self._store.lost()

    def _put(self, job: Job) -> Job:
        self._workers[job.kind].put(job)
        return job

    def close(self, timeout_s: float) -> bool:
        """Cancel everything, end the threads. Returns: whether all have ended; what hangs in a call is left behind."""
        end_s = time.monotonic() + timeout_s
        for worker in self._workers.values():
            worker.close()
        ended = [worker.join(max(0.0, end_s - time.monotonic())) for worker in self._workers.values()]
        return all(ended)


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
        job.pages = _find(job, store, config, job.digests)
        return False
    if job.kind == "store":
        return _store(job, store, config, job.host_pages)
    if job.lost_before is None:
        job.lost_before = store.lost()
    if job.least is not None and job.found is None:
        job.found = _find(job, store, config, job.digests)
        return job.reach > 0  # what it has said it has is fetched, whether it has said all or not
    return _fetch(job, store, config, job.host_pages)


def _find(job: Job, store: PageStoreLike, config: ControllerConfig, digests: Digests, touch: bool = False) -> int:
    """How many leading pages are there; an error of the job if storage does not answer."""
    found, answered = store.find_prefix(digests, salt=job.salt, timeout_s=config.storage_timeout_s, touch=touch)
    if not answered:
        job.error = StorageError("storage did not answer a look-up")
    return found


def _fetch(job: Job, store: PageStoreLike, config: ControllerConfig, host_pages: PageIds) -> bool:
    end = job.reach
    part = slice(job.pages, min(job.pages + config.storage_batch_pages, end))
    flags = store.get_pages(job.digests[part], host_pages[part], salt=job.salt, timeout_s=config.storage_timeout_s)
    job.pages += _leading(flags)
    if not flags.all() and store.lost() == job.lost_before:
        job.error = StorageError(f"{job.pages} of {end} pages came, and storage has not lost any")
    return bool(flags.all()) and job.pages < end


def _store(job: Job, store: PageStoreLike, config: ControllerConfig, host_pages: PageIds) -> bool:
    if not job.pages and (job.look_first or job.after) and not _look(job, store, config):
        return False
    part = slice(job.pages, job.pages + config.storage_batch_pages)
    after = job.digests[job.pages - 1].tobytes() if job.pages else job.after
    flags = store.set_pages(
        job.digests[part], host_pages[part], salt=job.salt, timeout_s=config.storage_timeout_s, after=after
    )
    job.pages += _leading(flags)
    if not flags.all():
        job.error = StorageError(f"{job.pages} of {len(host_pages)} pages were stored")
    return bool(flags.all()) and job.pages < len(host_pages)


def _leading(flags: BoolArray) -> int:
    return len(flags) if flags.all() else int(np.argmin(flags))


def _look(job: Job, store: PageStoreLike, config: ControllerConfig) -> bool:
    """Look for the page before those of a store, and for what is there already. Returns: whether to go on: the former
    is there, and more is to be written. What is found counts as used: it is hit, though never read from storage."""
    wanted = job.digests if job.look_first else job.digests[:0]
    if job.after:
        wanted = np.concatenate([np.frombuffer(job.after, np.uint8)[None], wanted])
    found = _find(job, store, config, wanted, touch=True)
    job.look_first = False
    job.pages = max(0, found - bool(job.after))
    return job.error is None and found >= bool(job.after) and job.pages < len(job.digests)
