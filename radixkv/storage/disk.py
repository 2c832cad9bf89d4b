"""L2: what the file backend asks of the file system beyond reading and writing."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

__all__ = ["FULL", "MORE_ROOM_HELPS", "allocate", "fsync_folder"]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No room on the disk."""

MORE_ROOM_HELPS = (errno.ENOSPC, errno.EDQUOT)
"""Of these: not EFBIG, the file's own limit."""


@cache
def _fallocate() -> Callable[[int, int, int, int], int]:
    function: Callable[[int, int, int, int], int] = ctypes.CDLL(None, use_errno=True).fallocate
    function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]  # type: ignore[attr-defined]
    return function


def allocate(fd: int, num_bytes: int) -> None:
    """Take the blocks of a file at once: a quarter faster on ext4, and a full disk shows before anything is written.

    Not os.posix_fallocate, which writes to every block where the file system cannot. Raises: OSError for a full disk;
    any other failure costs nothing but the speed.
    """
    if _fallocate()(fd, 0, 0, num_bytes) != 0 and (code := ctypes.get_errno()) in FULL:
        raise OSError(code, os.strerror(code))


def fsync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
