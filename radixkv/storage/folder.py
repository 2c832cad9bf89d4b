"""L2: the folder of the file backend: which value is in which segment, whose turn it is to go, how much room is left.

    root/FORMAT               what this folder is
    root/lock journal owners/ see journal.py
    root/segments/xx/NAME     published segments (segment.py); xx: the first two digits of the name
    root/tmp/OWNER-NAME       segments being written

Life of a segment: ``reserve`` (room is found under the lock, others are removed for it) -> written to tmp -> renamed
into its place -> ``publish`` (others are told) -> ... -> removed: least recently used first, when room is needed. The
time of last use is the file's mtime, set every few seconds at most, so that it outlives processes and is common to all.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..errors import StorageError
from .base import Deadline
from .journal import Journal, Line
from .segment import Entry, TornSegmentError, kill_entry, read_index

__all__ = ["Draft", "Folder", "Place", "Segment"]

FORMAT = "radixkv file storage 1\n"
BLOCK_BYTES = 4096
TOUCH_NS = 5_000_000_000
"""Recency on disk is at most this old. Within a process it is exact."""

COUNTERS = ("evicted_segments", "evicted_values", "orphans", "torn", "short", "refused", "no_room", "io_errors")
"""What they count is in file.py."""

_NAME = re.compile(r"[0-9a-f]{16}")


@dataclass(slots=True, eq=False)
class Segment:
    """A published segment, as this process knows it. num_bytes: on disk, whole blocks."""

    name: str
    num_bytes: int
    used_ns: int
    disk_ns: int
    keys: list[str] = field(default_factory=list)


class Place(NamedTuple):
    """Where a value is."""

    segment: Segment
    entry: Entry


class Draft(NamedTuple):
    """A segment for which room was reserved. num_bytes: whole blocks."""

    name: str
    num_bytes: int
    temporary: Path
    final: Path


def whole_blocks(num_bytes: int) -> int:
    """Bytes on disk of a file."""
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES


class Folder:
    """One process's view of a folder. Thread-safe.

    ``_lock`` guards the view and is never held over a wait; ``journal.exclusive`` comes before it.
    """

    def __init__(self, root: Path, max_bytes: int | None, deadline: Deadline) -> None:
        self.root, self.max_bytes = root, max_bytes
        self.counters = dict.fromkeys(COUNTERS, 0)
        self._lock = threading.RLock()
        self._segments: dict[str, Segment] = {}
        self._places: dict[str, Place] = {}
        self._reserved: dict[str, Line] = {}
        self._void: list[Line] = []
        self._unread: dict[str, Line] = {}
        self._order: list[tuple[int, str]] = []
        self._bytes, self._closed = 0, False
        self.lost = 0
        """Values that have left the view, whoever removed them."""
        self._make()
        self.journal = Journal(root)
        try:
            self._start(deadline)
        except BaseException:
            self.journal.leave()
            raise

    # ---- start and end -----------------------------------------------------------------------------------------------
    def _make(self) -> None:
        for name in ("", "segments", "tmp"):
            (self.root / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        if (self.root / "FORMAT").exists():
            self._check_format()  # of another kind of folder not even the lock is touched

    def _check_format(self) -> None:
        """Raise StorageError if this is another kind of folder; in a new one say which it is, under ``exclusive``: for
        whoever starts meanwhile, an unfinished file of a process that has not joined is an orphan."""
        marker = self.root / "FORMAT"
        if not marker.exists():
            temporary = self.root / f"tmp/FORMAT.{os.urandom(8).hex()}"
            temporary.write_text(FORMAT)
            with contextlib.suppress(FileNotFoundError):  # a process that made it already took this for an orphan
                temporary.rename(marker)
        if (found := marker.read_text()) != FORMAT:
            raise StorageError(f"{self.root} holds {found[:40]!r}, not {FORMAT!r}")

    def _start(self, deadline: Deadline) -> None:
        with self.journal.exclusive(deadline):
            self._check_format()
            self.journal.join()
            with self._lock:
                for line in self.journal.news():  # of what was before, only unfinished reservations matter
                    self._note_reservation(line)
            self._remove_orphans()
        self._scan()
        with self.journal.exclusive(deadline), self._lock:
            self._follow()
            self._settle_dead()
            self._make_room(0)

    def _remove_orphans(self) -> None:
        for path in (self.root / "tmp").iterdir():
            if not self.journal.alive(path.name.partition("-")[0]):
                path.unlink(missing_ok=True)
                self.counters["orphans"] += 1

    def _scan(self) -> None:
        for path in self._paths():
            self._read(path.name)

    def _paths(self) -> Iterator[Path]:
        """Of the segments in the folder."""
        return (path for path in (self.root / "segments").glob("??/*") if _NAME.fullmatch(path.name))

    def close(self) -> None:
        """Write down recency, and leave."""
        with self._lock:
            for segment in self._segments.values():
                if segment.used_ns > segment.disk_ns:
                    with contextlib.suppress(OSError):
                        os.utime(self.path(segment.name), ns=(segment.used_ns, segment.used_ns))
            self._closed = True
            self.journal.leave()

    # ---- the view ----------------------------------------------------------------------------------------------------
    def path(self, name: str) -> Path:
        """Of a published segment."""
        return self.root / "segments" / name[:2] / name

    def stats(self) -> dict[str, int]:
        """Counters, and what is there now."""
        with self._lock:
            if not self._closed:
                self._follow()
                self._read_new()
            now = {"segments": len(self._segments), "values": len(self._places), "used_bytes": self._bytes,
                   "reserved_bytes": sum(line.num_bytes for line in self._reserved.values())}  # fmt: skip
            return self.counters | now

    def count(self, name: str, more: int = 1) -> None:
        """Add to a counter."""
        with self._lock:
            self.counters[name] += more

    def find(self, keys: Iterable[str], touch: bool = False) -> list[Place | None]:
        """Where values are, news of other processes included. Raises: StorageError if the journal is unreadable."""
        with self._lock:
            self._follow()
            self._read_new()
            found = [self._places.get(key) for key in keys]
            if touch:
                now = time.time_ns()
                for place in found:
                    if place is not None:
                        place.segment.used_ns = now
            return found

    def _follow(self) -> None:
        try:
            lines = self.journal.news()
        except OSError as error:
            raise StorageError(f"{self.root}: {error}") from error
        if self.journal.missed:
            self._look_again()
        for line in lines:
            self._note_reservation(line)
            if line.kind == "P" and line.name not in self._segments and _NAME.fullmatch(line.name):
                self._unread[line.name] = line
            elif line.kind == "D":
                self._unread.pop(line.name, None)
                self._drop(line.name)
            elif line.kind == "K":
                self._read_new()  # it may be in one of them
                self._forget_key(line.name)

    def _look_again(self) -> None:
        """News were missed: what is in the folder counts. Values that others deleted may be found once more."""
        self.journal.missed = False
        self._reserved.clear()  # the newest file of the journal begins with those that still count
        there = {path.name for path in self._paths()}
        for name in self._segments.keys() - there:
            self._drop(name)
        self._unread.update((name, Line("P", name)) for name in there - self._segments.keys())

    def _note_reservation(self, line: Line) -> None:
        if line.kind == "R" and _NAME.fullmatch(line.name):
            self._reserved[line.name] = line
        elif line.kind in "PX":
            self._reserved.pop(line.name, None)

    def _read_new(self) -> None:
        while self._unread:
            self._read(self._unread.popitem()[0])

    def _read(self, name: str) -> None:
        """Take a segment that is on disk into the view. One that is torn is removed."""
        path = self.path(name)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return  # removed meanwhile
        except OSError:
            return self._add_unreadable(path)
        try:
            entries, damaged, file_bytes = read_index(fd)
            used_ns = os.fstat(fd).st_mtime_ns
        except TornSegmentError:
            self.count("torn")
            try:
                path.unlink(missing_ok=True)
            except OSError:
                self._add_unreadable(path)
        except OSError:
            self._add_unreadable(path)
        else:
            self.count("torn", damaged)
            self._add(Segment(name, whole_blocks(file_bytes), used_ns, used_ns), entries)
        finally:
            os.close(fd)

    def _add_unreadable(self, path: Path) -> None:
        """It takes room, so it counts and goes in its turn; what is in it is not known until the next start."""
        self.count("io_errors")
        with contextlib.suppress(OSError):  # removed meanwhile
            found = os.stat(path)
            self._add(Segment(path.name, whole_blocks(found.st_size), found.st_mtime_ns, found.st_mtime_ns), {})

    def _add(self, segment: Segment, entries: Mapping[str, Entry]) -> None:
        with self._lock:
            if segment.name in self._segments:
                return
            self._unread.pop(segment.name, None)
            self._segments[segment.name] = segment
            self._bytes += segment.num_bytes
            segment.keys = list(entries)
            self._places.update((key, Place(segment, entry)) for key, entry in entries.items())
            heapq.heappush(self._order, (segment.used_ns, segment.name))
            if len(self._order) > 2 * len(self._segments) + 100:  # of segments that have left
                self._order = [(segment.used_ns, name) for name, segment in self._segments.items()]
                heapq.heapify(self._order)

    def _drop(self, name: str) -> int:
        """Out of the view. Returns: its values."""
        segment = self._segments.pop(name, None)
        if segment is None:
            return 0
        self._bytes -= segment.num_bytes
        for key in segment.keys:
            if (place := self._places.get(key)) is not None and place.segment is segment:
                del self._places[key]
                self.lost += 1
        return len(segment.keys)

    def _forget_key(self, key: str) -> None:
        place = self._places.pop(key, None)
        if place is not None:
            place.segment.keys.remove(key)
            self.lost += 1

    def forget(self, segment: Segment) -> None:
        """Someone removed its file."""
        with self._lock:
            if self._segments.get(segment.name) is segment:
                self._drop(segment.name)

    def touched(self, segment: Segment, fd: int) -> None:
        """Write the time of last use to disk, if what is there is old. Args: fd: of the segment."""
        if segment.used_ns - segment.disk_ns > TOUCH_NS:
            segment.disk_ns = segment.used_ns
            with contextlib.suppress(OSError):
                os.utime(fd, ns=(segment.used_ns, segment.used_ns))

    # ---- writing -----------------------------------------------------------------------------------------------------
    def reserve(self, sizes: Sequence[int], deadline: Deadline) -> list[Draft | None]:
        """Room for segments of these bytes, others removed if need be; None for those that there is no room for.

        All of a call lie in one shard, so that one fsync of the folder does for all. Raises: StorageError, OSError.
        """
        shard, drafts = os.urandom(1).hex(), list[Draft | None]()
        with self._exclusive(deadline):
            lines = []
            for size in sizes:
                num_bytes = whole_blocks(size)
                if not self._make_room(num_bytes):
                    drafts.append(None)
                    continue
                name = shard + os.urandom(7).hex()
                line = Line("R", name, num_bytes, self.journal.owner)
                self._reserved[name] = line
                lines.append(line)
                temporary = self.root / "tmp" / f"{self.journal.owner}-{name}"
                drafts.append(Draft(name, num_bytes, temporary, self.path(name)))
            try:
                self.journal.append(lines)
            except OSError:
                for line in lines:
                    del self._reserved[line.name]
                raise
        return drafts

    def publish(self, written: Sequence[tuple[Draft, Mapping[str, Entry]]], given_up: Sequence[Draft],
                deadline: Deadline) -> None:  # fmt: skip
        """Tell everyone of segments that are in their place, and return the room of those that failed.

        Raises: StorageError, OSError; none is published then, and the caller removes the files and gives all up.
        """
        now = time.time_ns()
        with self._lock:
            self._void += [Line("X", draft.name) for draft in given_up]
        with self._exclusive(deadline):
            self.journal.append([Line("P", draft.name, draft.num_bytes) for draft, _ in written])
            for draft, entries in written:
                del self._reserved[draft.name]
                self._add(Segment(draft.name, draft.num_bytes, now, now), entries)

    def give_up(self, drafts: Sequence[Draft], deadline: Deadline) -> None:
        """Return the room of segments that failed; told when the lock can be had next."""
        with contextlib.suppress(StorageError, OSError):
            self.publish([], drafts, deadline)

    def delete(self, keys: Iterable[str], deadline: Deadline) -> None:
        """Remove values; a segment without any goes with its last one. Raises: StorageError."""
        with self._exclusive(deadline):
            for key in keys:
                place = self._places.get(key)
                if place is None:
                    continue
                if len(place.segment.keys) == 1:
                    self._remove(place.segment)
                    continue
                self._kill(place)
                self._forget_key(key)
                self._tell(Line("K", key))

    def _kill(self, place: Place) -> None:
        try:
            fd = os.open(self.path(place.segment.name), os.O_WRONLY | os.O_CLOEXEC)
            try:
                kill_entry(fd, place.entry.number)
            finally:
                os.close(fd)
        except FileNotFoundError:
            pass
        except OSError:
            self.count("io_errors")

    def clear(self, deadline: Deadline) -> None:
        """Remove every published segment."""
        with self._exclusive(deadline):
            for segment in list(self._segments.values()):
                self._remove(segment)

    # ---- room; all below under ``_exclusive`` ------------------------------------------------------------------------
    @contextlib.contextmanager
    def _exclusive(self, deadline: Deadline) -> Iterator[None]:
        with self.journal.exclusive(deadline), self._lock:
            self._follow()
            self._read_new()
            if self.journal.due:
                with contextlib.suppress(OSError):  # a full disk: later
                    self.journal.replace(list(self._reserved.values()))
            if self._void and self._tell(*self._void):
                for line in self._void:
                    self._reserved.pop(line.name, None)
                self._void.clear()
            yield

    def _make_room(self, num_bytes: int) -> bool:
        """Remove the least recently used until num_bytes fit. False: they cannot."""
        if self.max_bytes is None:
            return True
        if num_bytes > self.max_bytes:
            return False
        if self._over(num_bytes):
            self._settle_dead()
        while self._over(num_bytes):
            segment = self._oldest()
            if segment is None:
                return False
            values = len(segment.keys)
            if self._remove(segment):
                self.counters["evicted_segments"] += 1
                self.counters["evicted_values"] += values
        return True

    def _over(self, num_bytes: int) -> bool:
        reserved = sum(line.num_bytes for line in self._reserved.values())
        return self.max_bytes is not None and self._bytes + reserved + num_bytes > self.max_bytes

    def _oldest(self) -> Segment | None:
        while self._order:
            used_ns, name = heapq.heappop(self._order)
            segment = self._segments.get(name)
            if segment is None:
                continue
            try:
                segment.used_ns = max(segment.used_ns, os.stat(self.path(name)).st_mtime_ns)  # others use it, too
            except FileNotFoundError:
                self._drop(name)
                continue
            if segment.used_ns == used_ns:
                return segment
            heapq.heappush(self._order, (segment.used_ns, name))
        return None

    def _remove(self, segment: Segment) -> bool:
        try:
            os.unlink(self.path(segment.name))
        except FileNotFoundError:
            pass
        except OSError:
            self.counters["io_errors"] += 1
            return False
        self._drop(segment.name)
        self._tell(Line("D", segment.name))
        return True

    def _tell(self, *lines: Line) -> bool:
        """Whether the journal took it. If not, the others find the files gone."""
        try:
            self.journal.append(list(lines))
        except OSError:
            self.counters["io_errors"] += 1
            return False
        return True

    def _settle_dead(self) -> None:
        """End the reservations of processes that died."""
        for name, line in list(self._reserved.items()):
            if self.journal.alive(line.owner):
                continue
            del self._reserved[name]
            (self.root / "tmp" / f"{line.owner}-{name}").unlink(missing_ok=True)
            if name not in self._segments:
                self._read(name)  # it died between the rename and telling
            published = self._segments.get(name)
            self._tell(Line("X", name) if published is None else Line("P", name, published.num_bytes))
            self.counters["orphans"] += 1
