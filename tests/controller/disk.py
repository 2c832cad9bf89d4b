"""A folder of FileStorage on a machine that goes wrong: system calls that fail or do a part, processes that die at any
of them, and files that are damaged behind everybody's back. The folder is real, and so is all that does not fail."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import radixkv.storage.file  # the modules that are given another kernel
from radixkv.storage.folder import BLOCK_BYTES

ERRORS = {
    "open": (errno.EMFILE, errno.EIO, errno.EACCES), "pwritev": (errno.ENOSPC, errno.EIO), "write": (errno.ENOSPC,),
    "preadv": (errno.EIO,), "pread": (errno.EIO,), "fsync": (errno.EIO,), "rename": (errno.ENOSPC, errno.EIO),
    "unlink": (errno.EIO, errno.EACCES), "fstat": (errno.EIO,), "pwrite": (errno.ENOSPC,),
    "utime": (errno.EACCES,), "ftruncate": (errno.EIO,), "stat": (errno.EIO, errno.ESTALE),
}  # fmt: skip
"""The system calls that fail, and how."""

START_NS = 1_000_000_000_000_000_000


class Crash(BaseException):
    """The process is dead: nothing that it would have done afterwards happens."""


class Process:
    """One process on a folder, as its kernel sees it.

    chance: of each system call to fail. dies_in: system calls until it dies; 0: it does not. clock: seconds.
    """

    def __init__(self, random: np.random.Generator, clock: Callable[[], float]) -> None:
        self.random, self.clock = random, clock
        self.chance, self.dies_in, self.dead = 0.0, 0, False
        self.fds: set[int] = set()

    def now_ns(self) -> int:
        return START_NS + int(self.clock() * 1e9)

    def bury(self) -> None:
        """As the kernel does after kill -9: files are closed, and with them go the locks."""
        self.dead = True
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()


class Disk:
    """A folder. ``running`` is the process whose calls come now; ``faults`` counts what went wrong, by name.

    One at a time: it stands between radixkv.storage's modules and ``os`` from ``install`` to ``remove``.
    """

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.random = root, np.random.default_rng([seed, 77])
        self.running: Process | None = None
        self.faults: Counter[str] = Counter()
        self.kept: set[Path] = set()
        """Files whose removal was refused: what a failed write leaves then is outside of every budget until the next
        process starts."""
        self._replaced: list[tuple[Any, str, Any]] = []

    @contextlib.contextmanager
    def installed(self) -> Iterator[Disk]:
        kernel, clock = _Kernel(self), _Clock(self)
        for name, module in list(sys.modules.items()):
            if name.startswith("radixkv.storage.") and getattr(module, "os", None) is os:
                self._replace(module, "os", kernel)
                if getattr(module, "time", None) is time:
                    self._replace(module, "time", clock)
        assert any(module is radixkv.storage.file for module, _, _ in self._replaced)
        unlink = Path.unlink

        def unlink_if_alive(path: Path, missing_ok: bool = False) -> None:
            process = self.running
            if process is not None and path.is_relative_to(self.root):
                if process.dead:
                    raise Crash
                if process.chance and process.random.random() < process.chance:
                    self.faults["unlink EACCES"] += 1
                    self.kept.add(path)
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            unlink(path, missing_ok)

        self._replace(Path, "unlink", unlink_if_alive)
        try:
            yield self
        finally:
            for module, name, was in self._replaced:
                setattr(module, name, was)
            self._replaced.clear()

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self._replaced.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    # ---- behind everybody's back -------------------------------------------------------------------------------------
    def segments(self) -> list[Path]:
        return sorted((self.root / "segments").glob("??/*"))

    def used_bytes(self) -> int:
        """On disk, in whole blocks; what processes that died were writing among them. Without ``kept``."""
        used = 0
        for path in {*self.segments(), *(self.root / "tmp").iterdir()} - self.kept:
            with contextlib.suppress(FileNotFoundError):  # threads are at work
                used += -(-path.stat().st_size // BLOCK_BYTES) * BLOCK_BYTES
        return used

    def damage(self) -> None:
        """One segment, and nobody is told: a bit flips, its end is lost or never was written, it holds another one's
        bytes, or is gone."""
        with contextlib.suppress(FileNotFoundError):  # a thread has just removed it
            self._damage()

    def _damage(self) -> None:
        paths = self.segments()
        if not paths:
            return
        path = paths[int(self.random.integers(len(paths)))]
        kind = str(self.random.choice(["flip", "flip", "flip", "cut", "hole", "swap", "delete"]))
        self.faults[kind] += 1
        if kind == "delete":
            os.unlink(path)
            return
        before, data = path.stat(), bytearray(path.read_bytes())
        at = int(self.random.integers(len(data))) if data else 0
        if kind == "flip" and data:
            data[at] ^= 1 << int(self.random.integers(8))
        elif kind == "cut":
            del data[at:]
        elif kind == "hole":
            data[at:] = bytes(len(data) - at)
        elif kind == "swap":
            data = bytearray(paths[int(self.random.integers(len(paths)))].read_bytes())
        with path.open("r+b") as file:  # in place: who has it open sees it, too
            file.write(data)
            file.truncate()
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


class _Kernel:
    """``os``, for the modules of radixkv.storage."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    def __getattr__(self, name: str) -> Any:
        value = self._call(name) if name in ERRORS else getattr(os, name)
        setattr(self, name, value)
        return value

    def urandom(self, size: int) -> bytes:
        process = self._disk.running
        return os.urandom(size) if process is None else process.random.bytes(size)

    def close(self, fd: int) -> None:
        process = self._disk.running
        if process is not None:
            if process.dead:  # bury closes it
                return
            process.fds.discard(fd)
        os.close(fd)

    def _call(self, name: str) -> Callable[..., Any]:
        real, errors = getattr(os, name), ERRORS[name]

        def call(*arguments: Any, **more: Any) -> Any:
            process = self._disk.running
            if process is None:
                return real(*arguments, **more)
            if process.dies_in or process.dead:
                self._count_down(process, name, arguments)
            if process.chance and process.random.random() < process.chance:
                if name in ("pwritev", "preadv") and process.random.random() < 0.5:
                    self._disk.faults["part"] += 1
                    return real(arguments[0], _a_part(arguments[1], process.random), *arguments[2:])
                error = errors[int(process.random.integers(len(errors)))]
                self._disk.faults[f"{name} {errno.errorcode[error]}"] += 1
                raise OSError(error, os.strerror(error))
            result = real(*arguments, **more)
            if name == "open":
                process.fds.add(result)
            elif name in ("rename", "pwrite"):  # times are those of the run, so that a seed names it
                with contextlib.suppress(OSError):
                    os.utime(arguments[name == "rename"], ns=(process.now_ns(), process.now_ns()))
            return result

        return call

    def _count_down(self, process: Process, name: str, arguments: tuple[Any, ...]) -> None:
        """Die before this call, or in the middle of it."""
        process.dies_in -= not process.dead
        if process.dies_in and not process.dead:
            return
        if not process.dead:
            self._disk.faults[f"dead at {name}"] += 1
            if name == "pwritev":
                os.pwritev(arguments[0], _a_part(arguments[1], process.random), *arguments[2:])
            elif name == "write":
                os.write(arguments[0], arguments[1][: int(process.random.integers(len(arguments[1]) + 1))])
            process.dead = True
        raise Crash


class _Clock:
    """``time``, for the modules of radixkv.storage."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def time_ns(self) -> int:
        process = self._disk.running
        return time.time_ns() if process is None else process.now_ns()


def _a_part(views: Any, random: np.random.Generator) -> list[memoryview]:
    """Some of the first bytes."""
    first = memoryview(views[0]).cast("B")
    return [first[: 1 + int(random.integers(max(1, len(first))))]]
