"""L2: what several processes on one folder tell each other: a lock, and a log of small lines that all of them follow.

    lock       flock'ed for microseconds, around every decision about room and every line; never during reads and writes
               of values. The kernel frees it when its holder dies.
    journal    lines, appended under the lock:
                   R name bytes owner after
                                         room for a segment was reserved, whose values are of use only after that key
                                         ("." if none): the segment with it must stay
                   P name bytes          it was published: the file is in its place
                   X name                it was given up
                   D name                it was removed
                   K key                 one value was deleted
                   E                     the log goes on in a new file of the same name
                   N number              first of each file: one more than in the file before
    owners/    an empty file a process, flock'ed as long as it lives: who is dead, and whose reservations are void

The folder is the truth and the journal only news: a process that starts reads the folder, then follows the journal from
where it ended before. It is cut when a process starts alone, and replaced when it has grown past 4 MiB. Who was idle
while it was replaced twice has missed a file: the numbers tell, and the folder is read anew.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import StorageError, StorageTimeoutError
from .base import Deadline

__all__ = ["Journal", "Line"]

LONGEST_WAIT_S = 10.0
"""For the lock without a deadline: it is held for microseconds, so its holder was stopped by someone."""

_MAX_BYTES = 4 << 20
_OWNER = re.compile(r"[0-9a-f]{16}")


_journals: weakref.WeakSet[Journal] = weakref.WeakSet()


def _let_go() -> None:
    """In a forked child: its copies of files would keep a dead parent's locks."""
    for journal in _journals:
        with contextlib.suppress(OSError):
            journal.close_files()


os.register_at_fork(after_in_child=_let_go)


class Line(NamedTuple):
    """One line of the journal. Fields that a kind does not have are "" and 0."""

    kind: str
    name: str
    num_bytes: int = 0
    owner: str = ""
    after: str = ""

    def encode(self) -> bytes:
        """With its newline."""
        more = {"R": f" {self.num_bytes} {self.owner} {self.after or '.'}", "P": f" {self.num_bytes}"}
        return f"{self.kind} {self.name}{more.get(self.kind, '')}\n".encode("ascii")

    @classmethod
    def decode(cls, text: bytes) -> Line | None:
        """None for a line that is damaged or unknown."""
        fields = text.decode("ascii", "replace").split(" ")
        if len(fields) != {"R": 5, "P": 3, "X": 2, "D": 2, "K": 2}.get(fields[0]):
            return None
        if len(fields) > 2 and not fields[2].isdecimal():
            return None
        kind, name, num_bytes, owner, after = (*fields, *("0", "", ".")[len(fields) - 2 :])
        return cls(kind, name, int(num_bytes), owner, "" if after == "." else after)


class Journal:
    """The lock, the log and the owners of one folder, as one process sees them.

    ``news`` may be called by one thread at a time (the caller's lock); all that appends needs ``exclusive``.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.owner = root, os.urandom(8).hex()
        (root / "owners").mkdir(exist_ok=True)
        self._turn = threading.Lock()
        self._lock_fd = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._owner_fd = self._log_fd = -1
        self._seen, self._ended, self._number = 0, False, 0
        self.missed = False
        """Whether ``news`` has skipped a whole file: what is in the folder must be looked up. Whoever did clears it."""
        _journals.add(self)

    def join(self) -> bool:
        """Register this process, and begin at the end of the log; under ``exclusive``. Returns: is it alone?"""
        others = [path.name for path in (self.root / "owners").iterdir() if self.alive(path.name)]
        self._owner_fd = os.open(self.root / "owners" / self.owner, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._owner_fd, fcntl.LOCK_EX)
        if not others:
            self.replace([])
        else:
            self._open()
        return not others

    def leave(self) -> None:
        """Close everything. The lock of this process's owner file goes with it."""
        with contextlib.suppress(OSError):
            os.unlink(self.root / "owners" / self.owner)
        self.close_files()

    def close_files(self) -> None:
        """And so give back the locks, unless another process has the same open files."""
        fds = {self._owner_fd, self._log_fd, self._lock_fd} - {-1}
        self._owner_fd = self._log_fd = self._lock_fd = -1  # first: a child forked meanwhile must not close them
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)

    def alive(self, owner: str) -> bool:
        """Whether the process that registered under this name lives. Removes the file of a dead one."""
        if owner == self.owner:
            return True
        path = self.root / "owners" / owner
        if not _OWNER.fullmatch(owner):
            return False
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        else:
            with contextlib.suppress(FileNotFoundError):  # it left just now, by itself
                os.unlink(path)
            return False
        finally:
            os.close(fd)

    # ---- the lock ----------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def exclusive(self, deadline: Deadline) -> Iterator[None]:
        """Hold the folder's lock. Raises: StorageTimeoutError; StorageError if it is the folder's no more; OSError."""
        left = deadline.remaining_s()
        end = time.monotonic() + (LONGEST_WAIT_S if left is None else left)
        if not self._turn.acquire(timeout=max(0.0, end - time.monotonic())):
            raise StorageTimeoutError(f"{self.root}: another thread kept the folder's lock")
        try:
            self._lock_file(end)
            try:
                self._check_lock()
                yield
            finally:
                fcntl.flock(self._lock_fd, fcntl.LOCK_UN)
        finally:
            self._turn.release()

    def _check_lock(self) -> None:
        """Someone may have emptied the folder: others have another lock then, and do not learn what is put here."""
        try:
            same = os.path.samestat(os.fstat(self._lock_fd), os.stat(self.root / "lock"))
        except FileNotFoundError:
            same = False
        if not same:
            raise StorageError(f"{self.root} was removed or replaced under this process: attach the storage again")

    def _lock_file(self, end: float) -> None:
        pause = 0.0002
        while True:
            try:
                return fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() + pause > end:
                    raise StorageTimeoutError(f"{self.root}: another process kept the folder's lock") from None
            time.sleep(pause)
            pause = min(2 * pause, 0.01)

    # ---- the log -----------------------------------------------------------------------------------------------------
    def _open(self) -> None:
        if self._log_fd >= 0:
            os.close(self._log_fd)
        self._log_fd = os.open(self.root / "journal", os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._seen, self._ended = 0, False

    def news(self) -> list[Line]:
        """Lines that were appended since the last call; if files were ``missed``, those of the newest only."""
        lines: list[Line] = []
        while (size := os.fstat(self._log_fd).st_size) > self._seen:
            data = os.pread(self._log_fd, size - self._seen, self._seen)
            text = data[: data.rfind(b"\n") + 1]
            for row in text.splitlines():
                if row == b"E":
                    self._ended = True
                elif row.startswith(b"N ") and row[2:].isdigit():
                    self._begin_file(int(row[2:]))
                elif line := Line.decode(row):
                    lines.append(line)
            self._seen += len(text)
            if not text:
                break
        if self._ended and os.fstat(self._log_fd).st_ino != os.stat(self.root / "journal").st_ino:
            self._open()
            newer = self.news()
            return newer if self.missed else lines + newer
        return lines

    def _begin_file(self, number: int) -> None:
        self.missed |= self._number not in (0, number - 1)
        self._number = number

    def append(self, lines: list[Line]) -> None:
        """Write lines at the end, all or none; under ``exclusive``, after ``news``. Raises: OSError."""
        size = os.fstat(self._log_fd).st_size
        data = b"\n" * (size > self._seen) + b"".join(line.encode() for line in lines)  # a torn line before: end it
        try:
            written = os.write(self._log_fd, data)
            if written < len(data):
                raise OSError(errno.ENOSPC, "the journal took only a part")
        except OSError:
            os.ftruncate(self._log_fd, size)
            raise
        self._seen = size + len(data)

    @property
    def due(self) -> bool:
        """Whether it should be replaced: it has grown, or whoever replaced it died over that."""
        return self._ended or self._seen > _MAX_BYTES

    def replace(self, lines: list[Line]) -> None:
        """Go on in a new file that begins with ``lines``; under ``exclusive``, after ``news``. Raises: OSError."""
        new = self.root / f"journal.{self.owner}"
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            data = b"".join([b"N %d\n" % (self._number + 1), *(line.encode() for line in lines)])
            if os.write(fd, data) < len(data):
                raise OSError(errno.ENOSPC, "the new journal took only a part")
        finally:
            os.close(fd)
        if self._log_fd >= 0:
            os.write(self._log_fd, b"E\n")  # before the new one is in place: who reads it early looks again
        os.rename(new, self.root / "journal")
        self._open()
        self._seen, self._number = os.fstat(self._log_fd).st_size, self._number + 1
