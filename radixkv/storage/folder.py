"""L2: the folder of the file backend on disk: room, publication, processes that share it and processes that died.

    root/FORMAT               what this folder is
    root/lock journal owners/ see journal.py
    root/segments/xx/NAME     published segments (segment.py); xx: the first two digits of the name
    root/tmp/OWNER-NAME       segments being written

Life of a segment: ``reserve`` (room is found under the lock, others are removed for it) -> written to tmp -> renamed
into its place -> ``publish`` (others are told) -> ... -> removed when room is needed. Which one goes is in view.py: the
leaf that was used least recently. The time of last use is the file's mtime, set every few seconds at most, so that it
outlives processes and is common to all.

What is refused has cost nobody its place: before anything is removed, it is known that enough can be. So a chain that
is longer than the budget keeps its beginning, and asking for its tail again and again writes and removes nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import StorageError
from .base import Deadline
from .disk import MORE_ROOM_HELPS
from .journal import Journal, Line
from .segment import Entry, TornSegmentError, kill_entry, read_index
from .view import Place, Segment, View

__all__ = ["Draft", "Folder", "Want"]

FORMAT = "radixkv file storage 1\n"
BLOCK_BYTES = 4096
TOUCH_NS = 5_000_000_000
"""Recency on disk is at most this old. Within a process it is exact."""

SETTLE_S = 10.0
"""Between two looks for processes that have died with reservations."""

COUNTERS = ("evicted_segments", "evicted_values", "orphans", "torn", "short", "refused", "gaps", "no_room", "io_errors")
"""What they count is in file.py."""

_NAME = re.compile(r"[0-9a-f]{16}")


class Want(NamedTuple):
    """A segment that room is asked for: bytes of its file, the key that it comes after ("": none), its own keys."""

    file_bytes: int
    after: str
    keys: Collection[str]


class Draft(NamedTuple):
    """A segment for which room was reserved. num_bytes: whole blocks."""

    name: str
    num_bytes: int
    after: str
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
        self.view = View()
        self._void: list[Line] = []
        self._unread: dict[str, Line] = {}
        self._closed, self._settle_at_s, self._last_ns = False, 0.0, 0
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
            for segment in self.view.segments.values():
                if segment.used_ns > segment.disk_ns:
                    with contextlib.suppress(OSError):
                        os.utime(self.path(segment.name), ns=(segment.used_ns, segment.used_ns))
            self._closed = True
            self.journal.leave()

    @property
    def lost(self) -> int:
        """Values that have left the view, whoever removed them."""
        return self.view.lost

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
            now = {"segments": len(self.view.segments), "values": len(self.view.places),
                   "used_bytes": self.view.num_bytes, "reserved_bytes": self.view.reserved_bytes()}  # fmt: skip
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
            found = [self.view.places.get(key) for key in keys]
            if touch:
                now = self._now_ns()
                for place in found:
                    if place is not None and place.segment.used_ns != now:
                        place.segment.before_ns, place.segment.used_ns = place.segment.used_ns, now
            return found

    def unused(self, segment: Segment) -> None:
        """What it was found for came to nothing, and was no use."""
        with self._lock:
            segment.used_ns = segment.before_ns

    def _now_ns(self) -> int:
        """The time of a use: after that of every use before it, whatever the clock does. Under the lock."""
        self._last_ns = max(self._last_ns + 1, time.time_ns())
        return self._last_ns

    def touch(self, keys: Iterable[str]) -> list[bool]:
        """Which values are there. They count as used now, for other processes too."""
        found = self.find(keys, touch=True)
        for segment in {place.segment for place in found if place is not None}:
            if segment.used_ns - segment.disk_ns > TOUCH_NS:
                self._write_use(segment, self.path(segment.name))
        return [place is not None for place in found]

    def _follow(self) -> None:
        try:
            lines = self.journal.news()
        except OSError as error:
            raise StorageError(f"{self.root}: {error}") from error
        if self.journal.missed:
            self._look_again()
        for line in lines:
            self._note_reservation(line)
            if line.kind == "P" and line.name not in self.view.segments and _NAME.fullmatch(line.name):
                self._unread[line.name] = line
            elif line.kind == "D":
                self._unread.pop(line.name, None)
                self.view.drop(line.name)
            elif line.kind == "K":
                self._read_new()  # it may be in one of them
                self.view.forget(line.name)

    def _look_again(self) -> None:
        """News were missed: what is in the folder counts. Values that others deleted may be found once more."""
        self.journal.missed = False
        for name in list(self.view.reserved):  # the newest file of the journal begins with those that still count
            self.view.release(name)
        there = {path.name for path in self._paths()}
        for name in self.view.segments.keys() - there:
            self.view.drop(name)
        self._unread.update((name, Line("P", name)) for name in there - self.view.segments.keys())

    def _note_reservation(self, line: Line) -> None:
        if line.kind == "R" and _NAME.fullmatch(line.name):
            self.view.hold(line)
        elif line.kind in "PX":
            self.view.release(line.name)

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
            entries, after, damaged, file_bytes = read_index(fd)
            found_ns = os.fstat(fd).st_mtime_ns
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
            used_ns = min(found_ns, time.time_ns())
            segment = Segment(name, whole_blocks(file_bytes), used_ns, used_ns, after)
            if found_ns > used_ns:  # by a clock that was wrong: it would stay until the time has come
                self._write_use(segment, fd)
            self.view.add(segment, entries)
        finally:
            os.close(fd)

    def _add_unreadable(self, path: Path) -> None:
        """It takes room, so it counts and goes in its turn; what is in it is not known until the next start."""
        self.count("io_errors")
        with contextlib.suppress(OSError):  # removed meanwhile
            found = os.stat(path)
            used_ns = min(found.st_mtime_ns, time.time_ns())
            self.view.add(Segment(path.name, whole_blocks(found.st_size), used_ns, used_ns), {})

    def forget(self, segment: Segment) -> None:
        """Someone removed its file."""
        with self._lock:
            if self.view.segments.get(segment.name) is segment:
                self.view.drop(segment.name)

    def touched(self, segment: Segment, fd: int) -> None:
        """Write the time of last use to disk, if what is there is old. Args: fd: of the segment."""
        if segment.used_ns - segment.disk_ns > TOUCH_NS:
            self._write_use(segment, fd)

    @staticmethod
    def _write_use(segment: Segment, file: int | Path) -> None:
        segment.disk_ns = segment.used_ns
        with contextlib.suppress(OSError):
            os.utime(file, ns=(segment.used_ns, segment.used_ns))

    # ---- writing -----------------------------------------------------------------------------------------------------
    def reserve(self, wants: Sequence[Want], deadline: Deadline) -> list[Draft | None]:
        """Room for segments, others removed if need be; None for those that there is no room for (counted as refused),
        or whose key before is neither there nor in a segment before them (counted as gaps).

        All of a call lie in one shard, so that one fsync of the folder does for all. Raises: StorageError, OSError.
        """
        shard, drafts = os.urandom(1).hex(), list[Draft | None]()
        with self._exclusive(deadline):
            lines: list[Line] = []
            promised: set[str] = set()
            refused: set[str] = set()
            try:
                for want in wants:
                    line = None if self._missing(want, promised, refused) else self._reserve(want, shard)
                    if line is None:
                        refused.update(want.keys)
                        drafts.append(None)
                        continue
                    lines.append(line)
                    promised.update(want.keys)
                    temporary = self.root / "tmp" / f"{self.journal.owner}-{line.name}"
                    drafts.append(Draft(line.name, line.num_bytes, want.after, temporary, self.path(line.name)))
                self._append(lines)
            except OSError:
                for line in lines:
                    self.view.release(line.name)
                raise
        return drafts

    def _missing(self, want: Want, promised: Collection[str], refused: Collection[str]) -> bool:
        """Whether what it comes after is not there. Counted as what that was, if it was in this call."""
        if not want.after or want.after in self.view.places or want.after in promised:
            return False
        self.counters["refused" if want.after in refused else "gaps"] += len(want.keys)
        return True

    def _reserve(self, want: Want, shard: str) -> Line | None:
        """The reservation is held before room is made: what it comes after does not go for it."""
        line = Line("R", shard + os.urandom(7).hex(), whole_blocks(want.file_bytes), self.journal.owner, want.after)
        self.view.hold(line._replace(num_bytes=0))
        fits = False
        try:
            fits = self._make_room(line.num_bytes)
        finally:
            if not fits:
                self.view.release(line.name)
        if fits:
            self.view.hold(line)
            return line
        self.counters["refused"] += len(want.keys)
        return None

    def publish(self, written: Sequence[tuple[Draft, Mapping[str, Entry]]], given_up: Sequence[Draft],
                deadline: Deadline) -> list[Draft]:  # fmt: skip
        """Tell everyone of segments that are in their place, and return the room of those that failed.

        Returns: those that could not be published: this process was taken for dead and their room is gone, or the value
            before theirs is. They are given up; the caller removes the files.
        Raises: StorageError, OSError; none is published then, and the caller removes the files and gives all up.
        """
        with self._lock:
            now = self._now_ns()
            self._void += [Line("X", draft.name) for draft in given_up]
        with self._exclusive(deadline):
            there, failed = list[tuple[Draft, Mapping[str, Entry]]](), list[Draft]()
            keys: set[str] = set()
            for draft, entries in written:
                if self._may_publish(draft, keys, len(entries)):
                    there.append((draft, entries))
                    keys.update(entries)
                else:
                    failed.append(draft)
            self._append([Line("P", draft.name, draft.num_bytes) for draft, _ in there])
            for draft, entries in there:
                self.view.add(Segment(draft.name, draft.num_bytes, now, now, draft.after), entries)
                self.view.release(draft.name)
            self._void += [Line("X", draft.name) for draft in failed]
        return failed

    def _may_publish(self, draft: Draft, keys: set[str], num_values: int) -> bool:
        if draft.after and draft.after not in self.view.places and draft.after not in keys:
            self.counters["gaps"] += num_values
            return False
        if draft.name in self.view.reserved or draft.name in self.view.segments:  # or others told of it
            return True
        self.view.hold(Line("R", draft.name, 0, self.journal.owner, draft.after))
        if draft.final.exists() and self._make_room(draft.num_bytes):
            self.view.hold(Line("R", draft.name, draft.num_bytes, self.journal.owner, draft.after))
            return True
        self.counters["refused"] += num_values
        return False

    def free(self, num_bytes: int, deadline: Deadline) -> bool:
        """Make room on a disk that is full, whatever the budget says: of leaves, as for the budget. Returns: whether so
        many bytes have gone; if they cannot, all stays. Raises: StorageError, OSError."""
        with self._exclusive(deadline):
            return self._free(num_bytes)

    def give_up(self, drafts: Sequence[Draft], deadline: Deadline) -> None:
        """Return the room of segments that failed; told when the lock can be had next."""
        with contextlib.suppress(StorageError, OSError):
            self.publish([], drafts, deadline)

    def delete(self, keys: Iterable[str], deadline: Deadline) -> None:
        """Remove values; a segment without any goes with its last one. Raises: StorageError."""
        with self._exclusive(deadline):
            for key in keys:
                for place in self.view.copies_of(key):
                    if len(place.segment.keys) == 1:
                        self._remove(place.segment)
                    else:
                        self._kill(place)
                if key in self.view.places:
                    self.view.forget(key)
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
            for segment in list(self.view.segments.values()):
                self._remove(segment)

    # ---- room; all below under ``_exclusive`` ------------------------------------------------------------------------
    @contextlib.contextmanager
    def _exclusive(self, deadline: Deadline) -> Iterator[None]:
        with self.journal.exclusive(deadline), self._lock:
            self._follow()
            self._read_new()
            if self.journal.due:
                with contextlib.suppress(OSError):  # a full disk: later
                    self.journal.replace(list(self.view.reserved.values()))
            if self._void and self._tell(*self._void):
                for line in self._void:
                    self.view.release(line.name)
                self._void.clear()
            if time.monotonic() >= self._settle_at_s:
                self._settle_dead()
            yield

    def _make_room(self, num_bytes: int) -> bool:
        """Remove leaves, the least recently used first, until num_bytes fit. False: they cannot, and all that there is
        stays: what is refused must not have cost others their place."""
        if self._over(num_bytes):
            self._settle_dead()
        over = self._over(num_bytes)
        if num_bytes and over and not self.view.can_free(over):
            return False
        return self._evict(over)

    def _evict(self, num_bytes: int) -> bool:
        """Remove leaves, the least recently used first, until there are so many bytes less."""
        goal = self.view.num_bytes - num_bytes
        kept: list[Segment] = []
        while self.view.num_bytes > goal:
            segment = self._oldest()
            if segment is None or segment in kept:
                break
            values = len(segment.keys)
            if self._remove(segment):
                self.counters["evicted_segments"] += 1
                self.counters["evicted_values"] += values
            else:
                kept.append(segment)
        for segment in kept:
            self.view.push(segment)
        return self.view.num_bytes <= goal

    def _free(self, num_bytes: int) -> bool:
        """Room on a disk that is full below the budget. False: so much cannot go, and all that there is stays."""
        return self.view.can_free(num_bytes) and self._evict(num_bytes)

    def _over(self, num_bytes: int) -> int:
        """Bytes that are too many with num_bytes more."""
        if self.max_bytes is None:
            return 0
        return max(0, self.view.num_bytes + self.view.reserved_bytes() + num_bytes - self.max_bytes)

    def _oldest(self) -> Segment | None:
        """The leaf that was used least recently, by whatever process; it leaves the order."""
        while (segment := self.view.pop_leaf()) is not None:
            try:
                used_ns = os.stat(self.path(segment.name)).st_mtime_ns
            except FileNotFoundError:
                self.view.drop(segment.name)
                continue
            except OSError:
                return segment  # its removal will tell
            if used_ns <= segment.used_ns or used_ns > time.time_ns():  # in the future nobody has used it
                return segment
            segment.used_ns = used_ns
            self.view.push(segment)
        return self.view.oldest_of_a_ring()

    def _remove(self, segment: Segment) -> bool:
        try:
            os.unlink(self.path(segment.name))
        except FileNotFoundError:
            pass
        except OSError:
            self.counters["io_errors"] += 1
            return False
        self.view.drop(segment.name)
        self._tell(Line("D", segment.name))
        return True

    def _append(self, lines: list[Line]) -> None:
        """To the journal, which a full disk must not stop for ever. Raises: OSError."""
        try:
            self.journal.append(lines)
        except OSError as error:
            if error.errno not in MORE_ROOM_HELPS or not self._free(BLOCK_BYTES):
                raise
            self.journal.append(lines)

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
        self._settle_at_s = time.monotonic() + SETTLE_S
        for name, line in list(self.view.reserved.items()):
            if self.journal.alive(line.owner):
                continue
            (self.root / "tmp" / f"{line.owner}-{name}").unlink(missing_ok=True)
            if name not in self.view.segments:
                self._read(name)  # it died between the rename and telling
            self.view.release(name)
            published = self.view.segments.get(name)
            self._tell(Line("X", name) if published is None else Line("P", name, published.num_bytes))
            self.counters["orphans"] += 1
