"""L2: values in files of one folder: the embedded default. Survives the process; several processes may share it.

A batch becomes one or more *segments* (segment.py), files of up to ``segment_bytes`` with an index in front, because
creating a file costs as much as writing 64 KiB to 1 MiB: with one file a value, batches of 64 KiB ran at 3 to 9 % of
sequential I/O (bench/bench_storage.py). A segment is written to a temporary file and renamed into its place, so it is
whole or not there. Values are evicted with their segment, least recently used first, but never before what was put
after them in a chain (folder.py).

Durability: see FileStorage's fsync. Whatever a crash of the machine leaves half written is found by the sums of the
index and of the envelope, and is a miss.

stats: segments, values, used_bytes (on disk), reserved_bytes (being written); and counters: evicted_segments,
evicted_values, orphans (left by processes that died), torn (segments and entries), refused (no room within max_bytes),
gaps (values of a chain not taken, as the one before is not there), no_room (the disk is full, and that leaves went did
not help), io_errors (EIO, permissions, ...; a value that the disk cannot read is removed), short (values shorter than
their index says).
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ..errors import InvalidArgumentError, StorageError
from .base import (
    MISS,
    BoolArray,
    Deadline,
    FlatParts,
    IntArray,
    Parts,
    Positions,
    Storage,
    check_keys,
    check_pairs,
    flat_parts,
)
from .batch import by_segment, copy_at, gather, runs
from .disk import FULL, MORE_ROOM_HELPS, allocate, fsync_folder
from .folder import BLOCK_BYTES, Draft, Folder, Want
from .segment import encode_index
from .threads import DaemonPool
from .vectors import CHUNK_BYTES, rest, vectors
from .view import Segment

__all__ = ["FileStorage"]



_Run: TypeAlias = tuple[int, int, list[int]]
"""Values that are read with one scatter list: offset in their segment, bytes of their parts, positions in the call."""


def _nothing(positions: Positions) -> None:
    """For calls that have nothing to do with each value."""


class _Get(NamedTuple):
    """A call of get_each: the parts to fill; for each key the value's bytes by the index, and once it has been read."""

    parts: FlatParts
    found: list[int]
    sizes: list[int]
    arrived: Callable[[Positions], None]
    deadline: Deadline
    bad: list[int]
    """Positions of values that the disk cannot read."""


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

    name = "file"
    run_bytes = 512 << 10
    """Of values read or written by one system call: no more than a core's own cache keeps until they are hashed."""

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int | None = None, fsync: bool = False,
                 segment_bytes: int = 8 << 20, num_threads: int = 4) -> None:  # fmt: skip
        for what, value in (("max_bytes", max_bytes), ("segment_bytes", segment_bytes), ("num_threads", num_threads)):
            if value is not None and value < 1:
                raise InvalidArgumentError(f"{what} is {value}, and must be at least 1")
        self.fsync, self.segment_bytes = fsync, segment_bytes
        try:
            self.folder = Folder(Path(path).absolute(), max_bytes, Deadline(None, "opening the folder"))
            try:
                for made in (self.folder.root / "segments", self.folder.root, self.folder.root.parent) if fsync else ():
                    fsync_folder(made)
            except OSError:
                self.folder.close()
                raise
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(f"{path} cannot be used: {error}") from error
        self._segments = self.folder.root / "segments"
        self._pool = DaemonPool(num_threads - 1, "radixkv-file")
        self._pid: int | None = os.getpid()

    # ---- put ---------------------------------------------------------------------------------------------------------
    def put_many(self, keys: Sequence[str], parts: Sequence[Parts], *, timeout_s: float | None = None) -> BoolArray:
        return self.put_each(keys, parts, timeout_s=timeout_s)

    def put_each(self, keys: Sequence[str], parts: Sequence[Parts], prepare: Callable[[Positions], None] | None = None,
                 *, after: str | None = None, timeout_s: float | None = None) -> BoolArray:  # fmt: skip
        check_pairs(keys, parts)
        check_keys([after] if after else [])
        deadline = self._begin(timeout_s, "put_many")
        flags = np.array([place is not None for place in self.folder.find(keys, touch=True)], np.bool_)
        before = dict(zip(reversed(keys), reversed([after, *keys[:-1]]), strict=True)) if after is not None else None
        new = {key: index for index, key in enumerate(keys) if not flags[index]}  # each key once
        if new:
            flat = flat_parts(parts)
            values = {key: _Value(index, flat[index], flat.sizes[index]) for key, index in new.items()}
            batches = [
                _Batch(some, values, before[some[0]] if before else "")
                for some in _split(values, before, self.segment_bytes)
            ]
            stored = self._put(batches, prepare or _nothing, deadline)
            if flags.any():  # what was there may have gone for the others
                flags &= np.array([place is not None for place in self.folder.find(keys)], np.bool_)
            flags |= np.fromiter((key in stored for key in keys), np.bool_, len(keys))
        return flags

    def _put(self, batches: Sequence[_Batch], prepare: Callable[[Positions], None], deadline: Deadline) -> set[str]:
        """Write segments; returns the keys that are stored."""
        try:
            drafts = self.folder.reserve([Want(b.file_bytes, b.after, b.entries.keys()) for b in batches], deadline)
        except StorageError:
            raise
        except OSError as error:
            self._count(error)
            return set()
        pairs = [(draft, batch) for draft, batch in zip(drafts, batches, strict=True) if draft is not None]
        try:
            tasks = [partial(self._write, draft, batch, prepare, deadline) for draft, batch in pairs]
            failures = self._pool.run_all(tasks)
            self._place(pairs, failures, deadline)
        except BaseException:
            self._abandon([draft for draft, _ in pairs])
            raise
        done = [pair for pair, failure in zip(pairs, failures, strict=True) if failure is None]
        failed = [draft for (draft, _), failure in zip(pairs, failures, strict=True) if failure is not None]
        for failure in filter(None, failures):
            self._count(failure)
        return self._publish(done, failed, deadline)

    def _write(self, draft: Draft, batch: _Batch, prepare: Callable[[Positions], None],
               deadline: Deadline) -> OSError | None:  # fmt: skip
        """Write a segment, not yet in its place; if the disk is full, once more with room made there. Returns what went
        wrong. Raises: StorageError."""
        error = self._write_once(draft, batch, prepare, deadline)
        if error is not None and error.errno in MORE_ROOM_HELPS:
            _remove([draft])
            if self._free(draft.num_bytes, deadline):
                error = self._write_once(draft, batch, prepare, deadline)
        return error

    def _free(self, num_bytes: int, deadline: Deadline) -> bool:
        """Whether a full disk has so much more room now. Raises: StorageError."""
        try:
            return self.folder.free(num_bytes, deadline)
        except StorageError:
            raise
        except OSError as error:
            self._count(error)
            return False

    def _write_once(self, draft: Draft, batch: _Batch, prepare: Callable[[Positions], None],
                    deadline: Deadline) -> OSError | None:  # fmt: skip
        try:
            fd = os.open(draft.temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                allocate(fd, batch.file_bytes)
                at = 0
                for positions, views in batch.runs(self.run_bytes):
                    prepare(positions)
                    at += self._write_all(fd, views, at, deadline)
                if self.fsync:
                    os.fsync(fd)
            finally:
                os.close(fd)
        except StorageError:
            raise
        except OSError as error:
            return OSError(*error.args)  # the frames of the one raised hold views, and the caller's hold it: a cycle
        return None

    def _place(self, pairs: Sequence[tuple[Draft, _Batch]], failures: list[OSError | None],
               deadline: Deadline) -> None:  # fmt: skip
        """Rename segments into their places, in their order: whenever the process dies, chains are whole."""
        missing: set[str] = set()
        for index, (draft, batch) in enumerate(pairs):
            reachable = draft.after not in missing  # if not, publish will refuse it
            if failures[index] is None and reachable:
                failure = self._rename(draft)
                if failure is not None and failure.errno in MORE_ROOM_HELPS and self._free(BLOCK_BYTES, deadline):
                    failure = self._rename(draft)  # its folder had no room for the name
                failures[index] = failure
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
                    fsync_folder(draft.final.parent.parent)
        except OSError as error:
            return OSError(*error.args)  # see _write
        return None

    def _publish(self, done: Sequence[tuple[Draft, _Batch]], failed: Sequence[Draft], deadline: Deadline) -> set[str]:
        try:
            if self.fsync and done:
                fsync_folder(done[0][0].final.parent)
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
        return self.get_each(keys, parts, _nothing, timeout_s=timeout_s)

    def get_each(self, keys: Sequence[str], parts: Sequence[Parts], arrived: Callable[[Positions], None], *,
                 timeout_s: float | None = None) -> IntArray:  # fmt: skip
        check_pairs(keys, parts)
        deadline = self._begin(timeout_s, "get_many")
        flat = flat_parts(parts, writable=True)
        get = _Get(flat, [MISS] * len(keys), [MISS] * len(keys), arrived, deadline, [])
        tasks = []
        for segment, reads in by_segment(self.folder.find(keys, touch=True), get.found).items():
            joined = runs(reads, flat.sizes, self.run_bytes)
            tasks += [partial(self._read, segment, share, get) for share in _shares(joined)]
        self._pool.run_all(tasks)
        if get.bad:
            self._remove_bad([keys[position] for position in get.bad], deadline)
        return np.array(get.sizes, np.int64)

    def _remove_bad(self, keys: Sequence[str], deadline: Deadline) -> None:
        """Else they would be there for all but who reads them, and never be written anew."""
        try:
            with contextlib.suppress(StorageError):  # the next get finds them again
                self.folder.delete(keys, deadline)
        except OSError as error:
            self._count(error)

    def _read(self, segment: Segment, runs: Sequence[_Run], get: _Get) -> None:
        """Read values of one segment into their parts, and note their sizes. Raises: StorageTimeoutError."""
        used = False
        try:
            fd = os.open(f"{self._segments}/{segment.name[:2]}/{segment.name}", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return self.folder.forget(segment)  # evicted by another process
        except OSError as error:
            if error.errno == errno.EIO:
                get.bad.extend(position for _, _, positions in runs for position in positions)
            self.folder.unused(segment)
            return self._count(error)
        try:
            for run in runs:
                try:
                    done = self._read_sound(fd, run, get)
                except StorageError:
                    raise
                except OSError as error:
                    self._count(error)
                    break
                get.arrived(done)
                used = used or bool(done)
            if used:
                self.folder.touched(segment, fd)
            else:
                self.folder.unused(segment)
        finally:
            os.close(fd)

    def _read_sound(self, fd: int, run: _Run, get: _Get) -> list[int]:
        """As _read_run. Where the disk cannot read, those values that it can; the others are noted and counted."""
        offset, _, positions = run
        try:
            return self._read_run(fd, run, get)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            if len(positions) == 1:
                self._count(error)
                get.bad.extend(positions)
                return []
        done = []
        for position in positions:  # each but the last fills its parts: see runs
            num_bytes = get.parts.sizes[position]
            done += self._read_sound(fd, (offset, num_bytes, [position]), get)
            offset += num_bytes
        return done

    def _read_run(self, fd: int, run: _Run, get: _Get) -> list[int]:
        """Read values that follow each other in the file; returns the positions of those that were read."""
        offset, num_bytes, positions = run
        got = self._read_all(fd, gather(get.parts, positions), offset, get.deadline)
        done = positions if got == num_bytes else self._whole(positions, got, get)
        copy_at(done, get.found, get.sizes)
        return done

    def _whole(self, positions: list[int], got: int, get: _Get) -> list[int]:
        """The positions of the values that are in the first ``got`` bytes of a run."""
        for index, position in enumerate(positions):
            wanted = min(get.found[position], get.parts.sizes[position])
            if got < wanted:
                self.folder.count("short")
                return positions[:index]
            got -= wanted
        return positions

    # ---- how bytes move; NixlStorage does it otherwise ---------------------------------------------------------------
    def _write_all(self, fd: int, views: Sequence[memoryview], at: int, deadline: Deadline) -> int:
        """Write views to a place in a new file; returns their bytes. Raises: OSError, StorageTimeoutError."""
        start = at
        for vector, num_bytes in vectors(views):
            while num_bytes:
                deadline.remaining_s()
                done = os.pwritev(fd, vector, at)
                at += done
                num_bytes -= done
                vector = rest(vector, done) if num_bytes else []
        return at - start

    def _read_all(self, fd: int, views: Sequence[memoryview], at: int, deadline: Deadline) -> int:
        """Bytes read into views; fewer than they have at the end of the file. Raises: OSError, StorageTimeoutError."""
        start = at
        for vector, num_bytes in vectors(views):
            while num_bytes:
                deadline.remaining_s()
                done = os.preadv(fd, vector, at)
                if not done:
                    return at - start
                at += done
                num_bytes -= done
                vector = rest(vector, done) if num_bytes else []
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

    def _count(self, error: OSError) -> None:
        self.folder.count("no_room" if error.errno in FULL else "io_errors")


class _Value(NamedTuple):
    """A value to write: its position in the call, its parts, and their bytes."""

    position: int
    views: list[memoryview]
    num_bytes: int


class _Batch:
    """What goes into one segment. after: the key that it comes after, "" if none."""

    def __init__(self, keys: list[str], values: Mapping[str, _Value], after: str) -> None:
        self.after = after
        self._values = [values[key] for key in keys]
        self._index, entries, self.file_bytes = encode_index(keys, [value.num_bytes for value in self._values], after)
        self.entries = dict(zip(keys, entries, strict=True))

    def runs(self, most_bytes: int) -> Iterator[tuple[list[int], list[memoryview]]]:
        """Positions of values, and all bytes to write with them; no more than ``most_bytes`` unless it is one value."""
        positions: list[int] = []
        views, num_bytes = [memoryview(self._index)], 0
        for value in self._values:
            if positions and num_bytes + value.num_bytes > most_bytes:
                yield positions, views
                positions, views, num_bytes = [], [], 0
            positions.append(value.position)
            views += value.views
            num_bytes += value.num_bytes
        yield positions, views


def _split(values: Mapping[str, _Value], before: Mapping[str, str] | None, most_bytes: int) -> Iterator[list[str]]:
    """Keys by segment: as many as fit, and of a chain, a run of it. Args: before: of a chain, the key before each."""
    batch: list[str] = []
    size = 0
    for key, value in values.items():
        if batch and (size + value.num_bytes > most_bytes or (before is not None and before[key] != batch[-1])):
            yield batch
            batch, size = [], 0
        batch.append(key)
        size += value.num_bytes
    yield batch


def _shares(runs: Iterable[_Run]) -> Iterator[list[_Run]]:
    """Split the runs of a segment so that threads share them."""
    share: list[_Run] = []
    num_bytes = 0
    for run in runs:
        share.append(run)
        num_bytes += run[1]
        if num_bytes >= CHUNK_BYTES:
            yield share
            share, num_bytes = [], 0
    if share:
        yield share


def _remove(drafts: Sequence[Draft]) -> None:
    for draft in drafts:
        for path in (draft.temporary, draft.final):
            try:
                path.unlink(missing_ok=True)
            except OSError:
                continue  # an orphan, for the next process that starts
