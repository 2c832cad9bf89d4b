"""L2: values in files of one folder: the embedded default. Survives the process; several processes may share it.

A batch becomes one or more *segments* (segment.py), files of up to ``segment_bytes`` with an index in front, because
creating a file costs as much as writing 64 KiB to 1 MiB: with one file a value, batches of 64 KiB ran at 3 to 9 % of
sequential I/O (bench/bench_storage.py). A segment is written to a temporary file and renamed into its place, so it is
whole or not there. Values are evicted with their segment, least recently used first, but never before what was put
after them in a chain (folder.py).

Durability: see FileConfig.fsync. Whatever a crash of the machine leaves half written is found by the sums of the index
and of the envelope, and is a miss.

stats: segments, values, used_bytes (on disk), reserved_bytes (being written); and counters: evicted_segments,
evicted_values, orphans (left by processes that died), torn (segments and entries), refused (no room within max_bytes),
gaps (values of a chain not taken, as the one before is not there), no_room (the disk is full), io_errors (EIO,
permissions, ...), short (values shorter than their index says).
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ..errors import InvalidArgumentError, StorageError
from .base import MISS, BoolArray, Deadline, IntArray, Parts, Storage, byte_views, check_keys, check_pairs
from .folder import AFTER, Draft, Folder, Segment, Want
from .segment import Entry, encode_index
from .threads import DaemonPool

__all__ = ["FileStorage"]

T = TypeVar("T")

CHUNK_BYTES = 4 << 20
"""Bytes a system call at most: between two of them the deadline is looked at."""
CHUNK_PARTS = 1024
"""IOV_MAX of Linux."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Read(NamedTuple):
    """One value to read: its position in the call, where it is, the parts to fill, and their bytes."""

    position: int
    entry: Entry
    views: list[memoryview]
    room: int


class FileStorage(Storage):
    """Values in segments below ``path``. Not for use in a forked child: make a new one there.

    Args:
        path: the folder, made if need be (mode 0700: KV is as private as the prompts). Local disk, or a network file
            system with flock.
        max_bytes: on disk, of all processes that share the folder; None for no limit.
        fsync: False (default): a put that returned True survives the end of the process, and no crash of the machine
            makes it wrong, but recent values may be lost then. True: it survives a crash of the machine too.
        segment_bytes: of values in a segment, at most; the unit of eviction. A longer value has a segment of its own.
        num_threads: that read and write segments of a batch at the same time, the caller's included.
    Raises: StorageError if the folder cannot be used.
    """

    name, chained = "file", True

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int | None = None, fsync: bool = False,
                 segment_bytes: int = 8 << 20, num_threads: int = 4) -> None:  # fmt: skip
        for what, value in (("max_bytes", max_bytes), ("segment_bytes", segment_bytes), ("num_threads", num_threads)):
            if value is not None and value < 1:
                raise InvalidArgumentError(f"{what} is {value}, and must be at least 1")
        self.fsync, self.segment_bytes = fsync, segment_bytes
        try:
            self.folder = Folder(Path(path).absolute(), max_bytes, Deadline(None, "opening the folder"))
            if fsync:
                for made in (self.folder.root / "segments", self.folder.root, self.folder.root.parent):
                    _fsync_folder(made)
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(f"{path} cannot be used: {error}") from error
        self._num_helpers = num_threads - 1
        self._pool = DaemonPool(max(1, self._num_helpers), "radixkv-file")
        self._pid: int | None = os.getpid()

    # ---- put ---------------------------------------------------------------------------------------------------------
    def put_many(self, keys: Sequence[str], parts: Sequence[Parts], *, timeout_s: float | None = None) -> BoolArray:
        check_pairs(keys, parts)
        return self._put_new(keys, parts, None, self._begin(timeout_s, "put_many"))

    def put_chain(self, keys: Sequence[str], parts: Sequence[Parts], *, after: str | None = None,
                  timeout_s: float | None = None) -> BoolArray:  # fmt: skip
        check_pairs(keys, parts)
        check_keys([] if after is None else [after])
        before: dict[str, str] = {}
        for key, previous in zip(keys, ["" if after is None else after, *keys], strict=False):
            before.setdefault(key, previous)
        return self._put_new(keys, parts, before, self._begin(timeout_s, "put_chain"))

    def _put_new(self, keys: Sequence[str], parts: Sequence[Parts], before: Mapping[str, str] | None,
                 deadline: Deadline) -> BoolArray:  # fmt: skip
        """Put what is not there. Args: before: of a chain, the key before each."""
        flags = np.array([place is not None for place in self.folder.find(keys, touch=True)], np.bool_)
        views = {key: byte_views(parts[index]) for index, key in enumerate(keys) if not flags[index]}  # each key once
        if views:
            stored = self._put(views, before, deadline)
            flags |= np.fromiter((key in stored for key in keys), np.bool_, len(keys))
        return flags

    def _put(self, values: Mapping[str, list[memoryview]], before: Mapping[str, str] | None,
             deadline: Deadline) -> set[str]:  # fmt: skip
        """Write values as segments; returns the keys that are stored."""
        batches = [_Batch(keys, values, before[keys[0]] if before else "") for keys in self._split(values, before)]
        try:
            drafts = self.folder.reserve([Want(b.file_bytes, b.after, b.entries.keys()) for b in batches], deadline)
        except StorageError:
            raise
        except OSError as error:
            self._count(error)
            return set()
        pairs = [(draft, batch) for draft, batch in zip(drafts, batches, strict=True) if draft is not None]
        try:
            failures = self._run([partial(self._write, draft, batch, deadline) for draft, batch in pairs])
            self._place(pairs, failures)
        except BaseException:
            self._abandon([draft for draft, _ in pairs])
            raise
        done = [pair for pair, failure in zip(pairs, failures, strict=True) if failure is None]
        failed = [draft for (draft, _), failure in zip(pairs, failures, strict=True) if failure is not None]
        for failure in filter(None, failures):
            self._count(failure)
        return self._publish(done, failed, deadline)

    def _split(self, values: Mapping[str, list[memoryview]], before: Mapping[str, str] | None) -> Iterable[list[str]]:
        """Keys by segment: as many as fit, and of a chain, a run of it."""
        batch: list[str] = []
        size = 0
        for key, views in values.items():
            more = sum(map(len, views))
            if batch and (size + more > self.segment_bytes or (before is not None and before[key] != batch[-1])):
                yield batch
                batch, size = [], 0
            batch.append(key)
            size += more
        yield batch

    def _write(self, draft: Draft, batch: _Batch, deadline: Deadline) -> OSError | None:
        """Write a segment, not yet in its place. Returns what went wrong. Raises: StorageTimeoutError."""
        try:
            fd = os.open(draft.temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                _allocate(fd, batch.file_bytes)
                self._write_all(fd, batch.views, deadline)
                if self.fsync:
                    os.fsync(fd)
            finally:
                os.close(fd)
        except StorageError:
            raise
        except OSError as error:
            return error
        return None

    def _place(self, pairs: Sequence[tuple[Draft, _Batch]], failures: list[OSError | None]) -> None:
        """Rename segments into their places, in their order: whenever the process dies, chains are whole."""
        missing: set[str] = set()
        for index, (draft, batch) in enumerate(pairs):
            reachable = draft.after not in missing  # if not, publish will refuse it
            if failures[index] is None and reachable:
                failures[index] = self._rename(draft)
            if failures[index] is not None or not reachable:
                missing.update(batch.entries)

    def _rename(self, draft: Draft) -> OSError | None:
        try:
            try:
                os.rename(draft.temporary, draft.final)
            except FileNotFoundError:
                draft.final.parent.mkdir(mode=0o700, exist_ok=True)
                os.rename(draft.temporary, draft.final)
                if self.fsync:
                    _fsync_folder(draft.final.parent.parent)
        except OSError as error:
            return error
        return None

    def _publish(self, done: Sequence[tuple[Draft, _Batch]], failed: Sequence[Draft], deadline: Deadline) -> set[str]:
        try:
            if self.fsync and done:
                _fsync_folder(done[0][0].final.parent)
            _remove(failed)
            lost = self.folder.publish([(draft, batch.entries) for draft, batch in done], failed, deadline)
            _remove(lost)
        except StorageError:
            self._abandon([draft for draft, _ in done])
            raise
        except OSError as error:
            self._abandon([draft for draft, _ in done])
            self._count(error)
            return set()
        return {key for draft, batch in done if draft not in lost for key in batch.entries}

    def _abandon(self, drafts: Sequence[Draft]) -> None:
        _remove(drafts)
        self.folder.give_up(drafts, Deadline(1.0, "giving up"))

    # ---- get ---------------------------------------------------------------------------------------------------------
    def get_many(self, keys: Sequence[str], parts: Sequence[Parts], *, timeout_s: float | None = None) -> IntArray:
        check_pairs(keys, parts)
        deadline = self._begin(timeout_s, "get_many")
        sizes = np.full(len(keys), MISS, np.int64)
        views = [byte_views(pieces, writable=True) for pieces in parts]
        by_segment: dict[Segment, list[_Read]] = {}
        for index, place in enumerate(self.folder.find(keys, touch=True)):
            if place is not None:
                read = _Read(index, place.entry, views[index], sum(map(len, views[index])))
                by_segment.setdefault(place.segment, []).append(read)
        tasks = []
        for segment, reads in by_segment.items():
            reads.sort(key=lambda read: read.entry.offset)
            tasks += [partial(self._read, segment, some, sizes, deadline) for some in _in_chunks(reads)]
        self._run(tasks)
        return sizes

    def _read(self, segment: Segment, reads: list[_Read], sizes: IntArray, deadline: Deadline) -> None:
        """Read values of one segment into their parts, and note their sizes. Raises: StorageTimeoutError."""
        try:
            fd = os.open(self.folder.path(segment.name), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return self.folder.forget(segment)  # evicted by another process
        except OSError as error:
            return self._count(error)
        try:
            self.folder.touched(segment, fd)
            for run in _adjacent(reads):
                self._read_run(fd, run, sizes, deadline)
        except StorageError:
            raise
        except OSError as error:
            self._count(error)
        finally:
            os.close(fd)

    def _read_run(self, fd: int, run: list[_Read], sizes: IntArray, deadline: Deadline) -> None:
        """Read values that follow each other in the file with one gather list."""
        got = self._read_all(fd, [view for read in run for view in read.views], run[0].entry.offset, deadline)
        for read in run:
            wanted = min(read.entry.num_bytes, read.room)
            if got < wanted:
                self.folder.count("short")
                break
            sizes[read.position] = read.entry.num_bytes
            got -= wanted

    # ---- how bytes move; NixlStorage does it otherwise ---------------------------------------------------------------
    def _write_all(self, fd: int, views: Sequence[memoryview], deadline: Deadline) -> None:
        """Write views from the beginning of a new file. Raises: OSError, StorageTimeoutError."""
        at = 0
        for vector in _vectors(views):
            while vector:
                deadline.remaining_s()
                done = os.pwritev(fd, vector, at)
                at += done
                vector = _rest(vector, done)

    def _read_all(self, fd: int, views: Sequence[memoryview], at: int, deadline: Deadline) -> int:
        """Bytes read into views; fewer than they have at the end of the file. Raises: OSError, StorageTimeoutError."""
        start = at
        for vector in _vectors(views):
            while vector:
                deadline.remaining_s()
                done = os.preadv(fd, vector, at)
                if not done:
                    return at - start
                at += done
                vector = _rest(vector, done)
        return at - start

    # ---- the rest ----------------------------------------------------------------------------------------------------
    def exists_many(self, keys: Sequence[str], *, timeout_s: float | None = None) -> BoolArray:
        check_keys(keys)
        self._begin(timeout_s, "exists_many")
        return np.array([place is not None for place in self.folder.find(keys)], np.bool_)

    def touch_many(self, keys: Sequence[str], *, timeout_s: float | None = None) -> BoolArray:
        check_keys(keys)
        self._begin(timeout_s, "touch_many")
        return np.array(self.folder.touch(keys), np.bool_)

    def delete_many(self, keys: Sequence[str], *, timeout_s: float | None = None) -> None:
        check_keys(keys)
        self._guard(self.folder.delete, keys, self._begin(timeout_s, "delete_many"))

    def clear(self, *, timeout_s: float | None = None) -> None:
        self._guard(self.folder.clear, self._begin(timeout_s, "clear"))

    def close(self) -> None:
        if self._pid is None:
            return
        forked, self._pid = self._pid != os.getpid(), None
        if not forked:  # the parent's threads are not here, and its owner file is not ours
            self._pool.shutdown()
            self.folder.close()

    def stats(self) -> Mapping[str, int]:
        return self.folder.stats()

    def lost(self) -> int:
        return self.folder.lost

    def _begin(self, timeout_s: float | None, what: str) -> Deadline:
        if self._pid != os.getpid():
            closed = self._pid is None
            raise StorageError("the storage is closed" if closed else "a file storage cannot be used in a forked child")
        return Deadline(timeout_s, f"{self.folder.root}: {what}")

    def _guard(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            function(*arguments)
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(f"{self.folder.root}: {error}") from error

    def _run(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """Run tasks, and wait for all of them, whatever happens. Raises: one of their errors.

        The caller works too, and waits only for helpers that are inside a task: on a busy machine they come late.
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

        helpers = [self._pool.submit(work) for _ in range(min(self._num_helpers, len(tasks) - 1))]
        work()
        for helper in helpers:
            if not helper.cancel():
                helper.result()
        if errors:
            raise errors[0]
        return [results[index] for index in range(len(tasks))]

    def _count(self, error: OSError) -> None:
        self.folder.count("no_room" if error.errno in _FULL else "io_errors")


class _Batch:
    """What goes into one segment: entries, and all of its bytes as views. after: the key that it comes after, or ""."""

    def __init__(self, keys: list[str], values: Mapping[str, list[memoryview]], after: str) -> None:
        self.after = after
        names = [keys[0] + AFTER + after, *keys[1:]] if after else keys
        index, entries, self.file_bytes = encode_index(names, [sum(map(len, values[key])) for key in keys])
        self.entries = dict(zip(keys, entries, strict=True))
        self.views = [memoryview(index), *(view for key in keys for view in values[key])]


def _in_chunks(reads: list[_Read]) -> Iterable[list[_Read]]:
    """Split reads of a segment so that threads share them and a deadline is seen."""
    chunk: list[_Read] = []
    num_bytes = 0
    for read in reads:
        if num_bytes >= CHUNK_BYTES:
            yield chunk
            chunk, num_bytes = [], 0
        chunk.append(read)
        num_bytes += read.entry.num_bytes
    yield chunk


def _adjacent(reads: list[_Read]) -> Iterable[list[_Read]]:
    """Split reads where one does not begin where the one before it ended, in the file and in its parts."""
    run: list[_Read] = []
    end = -1
    for read in reads:
        if run and read.entry.offset != end:
            yield run
            run = []
        run.append(read)
        end = read.entry.offset + read.entry.num_bytes if read.room == read.entry.num_bytes else -1
    yield run


def _vectors(views: Sequence[memoryview]) -> Iterable[list[memoryview]]:
    """Lists of views, each for one system call. A view longer than a chunk is cut."""
    vector: list[memoryview] = []
    num_bytes = 0
    for view in views:
        for start in range(0, len(view), CHUNK_BYTES):
            piece = view[start : start + CHUNK_BYTES]
            if vector and (len(vector) == CHUNK_PARTS or num_bytes + len(piece) > CHUNK_BYTES):
                yield vector
                vector, num_bytes = [], 0
            vector.append(piece)
            num_bytes += len(piece)
    if vector:
        yield vector


def _rest(vector: list[memoryview], done: int) -> list[memoryview]:
    """What is left of a vector after ``done`` bytes."""
    for index, view in enumerate(vector):
        if done < len(view):
            return [view[done:], *vector[index + 1 :]]
        done -= len(view)
    return []


@cache
def _fallocate() -> Callable[[int, int, int, int], int]:
    function: Callable[[int, int, int, int], int] = ctypes.CDLL(None, use_errno=True).fallocate
    function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]  # type: ignore[attr-defined]
    return function


def _allocate(fd: int, num_bytes: int) -> None:
    """Take the blocks of a file at once: a quarter faster on ext4, and a full disk shows before anything is written.

    Not os.posix_fallocate, which writes to every block where the file system cannot. Raises: OSError for a full disk;
    any other failure costs nothing but the speed.
    """
    if _fallocate()(fd, 0, 0, num_bytes) != 0 and (code := ctypes.get_errno()) in _FULL:
        raise OSError(code, os.strerror(code))


def _fsync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(drafts: Sequence[Draft]) -> None:
    for draft in drafts:
        for path in (draft.temporary, draft.final):
            try:
                path.unlink(missing_ok=True)
            except OSError:
                continue  # an orphan, for the next process that starts
