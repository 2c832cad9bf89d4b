"""L2: one file of the file backend: the values of a batch, with their index in front. Written once, then only read.

    0      header, 64 bytes:  magic "RKVSEG\\0\\x1a", version u16, header bytes u16, u32 0, entries u32, key bytes u32,
                              file bytes u64, 16 zeros, 8 zeros, XXH3-64 of bytes 0 .. 55 as u64
    64     entries, 24 bytes each:  offset u64, bytes u64, key bytes u32, sum u32
    ...    the keys, one after the other, ASCII; the first may be ``KEY<AFTER``: all of them are of no use without AFTER
    ...    zeros up to a multiple of 64
    ...    the values, one after the other, as they were given

All little endian. ``sum`` is of the entry and its key, and never 0; 0 says that the value was deleted, and is the only
thing ever written into a published segment. A segment whose header is wrong or whose length is not that of the header
was torn by a crash and is dropped as a whole; an entry with a wrong sum alone is. Values have no sums here: that is the
envelope's matter.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .base import require_package

__all__ = ["Entry", "TornSegmentError", "encode_index", "kill_entry", "read_index"]

MAGIC = b"RKVSEG\0\x1a"
VERSION = 1
HEADER = np.dtype([
    ("magic", "V8"), ("version", "<u2"), ("header_bytes", "<u2"), ("zeros", "V4"), ("entries", "<u4"),
    ("key_bytes", "<u4"), ("file_bytes", "<u8"), ("more_zeros", "V24"), ("sum", "<u8"),
])  # fmt: skip
ENTRY = np.dtype([("offset", "<u8"), ("num_bytes", "<u8"), ("key_bytes", "<u4"), ("sum", "<u4")])
HEADER_BYTES, ENTRY_BYTES, SUM_OFFSET = 64, 24, 20
ALIGNMENT = 64
"""Of the first value in its file, and so of all if their lengths are multiples too: the kernel copies whole cache lines
then, a quarter faster."""
assert (HEADER.itemsize, ENTRY.itemsize) == (HEADER_BYTES, ENTRY_BYTES)

AFTER = "<"
"""Between a segment's first key and the one it comes after; no character of keys."""

_FIRST_READ = 16384
"""Bytes of a segment that are read at first: header and index of about 130 values."""


class TornSegmentError(Exception):
    """The file is no whole segment."""


class Entry(NamedTuple):
    """A value in a segment: its place in the index, and its bytes in the file."""

    number: int
    offset: int
    num_bytes: int


@cache
def _sum64() -> Callable[..., int]:
    function: Callable[..., int] = require_package("xxhash", "'radixkv[storage]'", "radixkv.storage").xxh3_64_intdigest
    return function


def _entry_sum(key: bytes, offset: int, num_bytes: int) -> int:
    return _sum64()(key, (offset * 0x9E3779B97F4A7C15 + num_bytes) & 0xFFFFFFFFFFFFFFFF) & 0xFFFFFFFF | 1


def encode_index(keys: Sequence[str], sizes: Sequence[int], after: str = "") -> tuple[bytes, list[Entry], int]:
    """What comes before the values: (header, entries, keys, zeros as bytes; the entries; bytes of the whole file).

    Args: after: the key that the segment comes after, "" if none.
    """
    names = [key.encode("ascii") for key in keys]
    if after:
        names[0] += (AFTER + after).encode("ascii")
    key_bytes = sum(map(len, names))
    end = HEADER_BYTES + ENTRY_BYTES * len(names) + key_bytes
    at = end + -end % ALIGNMENT
    zeros = bytes(at - end)
    entries, rows = [], []
    for number, (name, size) in enumerate(zip(names, sizes, strict=True)):
        rows.append((at, size, len(name), _entry_sum(name, at, size)))
        entries.append(Entry(number, at, size))
        at += size
    header = np.zeros(1, HEADER)
    header["magic"], header["version"], header["header_bytes"] = np.void(MAGIC), VERSION, HEADER_BYTES
    header["entries"], header["key_bytes"], header["file_bytes"] = len(names), key_bytes, at
    header["sum"] = _sum64()(header.tobytes()[:56])
    return b"".join([header.tobytes(), np.array(rows, ENTRY).tobytes(), *names, zeros]), entries, at


def read_index(fd: int) -> tuple[dict[str, Entry], str, int, int]:
    """The index of a segment: (live entries by key, the key that it comes after or "", number of damaged entries, bytes
    of the file).

    Raises: TornSegmentError, OSError.
    """
    head = os.pread(fd, _FIRST_READ, 0)
    fields = _checked_header(head, os.fstat(fd).st_size)
    count, end = int(fields["entries"]), int(fields["entries"]) * ENTRY_BYTES + HEADER_BYTES + int(fields["key_bytes"])
    while len(head) < end:
        more = os.pread(fd, end - len(head), len(head))
        if not more:
            raise TornSegmentError(f"the index ends after {len(head)} of {end} bytes")
        head += more
    rows = np.frombuffer(head, ENTRY, count, HEADER_BYTES)
    file_bytes = int(fields["file_bytes"])
    named, damaged = _live(rows, head, HEADER_BYTES + count * ENTRY_BYTES, file_bytes)
    first = next(iter(named), "")
    key, mark, after = first.partition(AFTER)
    entries = {key: named.pop(first), **named} if mark else named
    return entries, after, damaged, file_bytes


def _checked_header(head: bytes, file_bytes: int) -> np.void:
    if len(head) < HEADER_BYTES:
        raise TornSegmentError(f"{len(head)} bytes")
    fields: np.void = np.frombuffer(head, HEADER, 1)[0]
    if fields["magic"].tobytes() != MAGIC or int(fields["sum"]) != _sum64()(head[:56]):
        raise TornSegmentError("no header of a segment")
    if (int(fields["version"]), int(fields["header_bytes"])) != (VERSION, HEADER_BYTES):
        raise TornSegmentError(f"version {fields['version']}, not {VERSION}")
    if int(fields["file_bytes"]) != file_bytes:
        raise TornSegmentError(f"{file_bytes} bytes instead of {fields['file_bytes']}")
    return fields


def _live(rows: npt.NDArray[np.void], head: bytes, keys_at: int, file_bytes: int) -> tuple[dict[str, Entry], int]:
    entries, damaged = {}, 0
    for number, (offset, num_bytes, key_bytes, entry_sum) in enumerate(rows.tolist()):
        key = head[keys_at : keys_at + key_bytes]
        keys_at += key_bytes
        if entry_sum == 0:
            continue
        if entry_sum != _entry_sum(key, offset, num_bytes) or offset + num_bytes > file_bytes:
            damaged += 1
            continue
        entries[key.decode("ascii")] = Entry(number, offset, num_bytes)
    return entries, damaged


def kill_entry(fd: int, number: int) -> None:
    """Mark a value as deleted, in place: four bytes that lie in one sector. Raises: OSError."""
    os.pwrite(fd, bytes(4), HEADER_BYTES + ENTRY_BYTES * number + SUM_OFFSET)
