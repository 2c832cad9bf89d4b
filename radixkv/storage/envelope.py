"""L2: the 64 bytes before every stored page, in every backend: what makes a wrong page a miss.

Little endian:

    offset  bytes
     0       8     magic "RKVPAGE\\x1a"
     8       2     format version, 2
    10       2     bytes of this header, 64
    12       1     checksum: 2 = XXH3, 64 bits, seeded with that of bytes 0 .. 55 (whose seed is 0)
    13       3     0
    16       8     payload bytes
    24      16     fingerprint of the key: XXH3, 128 bits, of its UTF-8, in the canonical byte order of XXH128
    40      16     0
    56       8     checksum of the payload, and by its seed of bytes 0 .. 55

Version 1 had one XXH3 over both, at twice the calls a page; its pages have other keys, and are not found.

The header is a part of its own, so nothing copies the payload: parts of the host pool's own memory follow it. A stored
page is thus 64 bytes longer than a page. The sums guard against accidents (torn, flipped, truncated, swapped), not
against someone who can write to the store: who can, can store wrong KV.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .base import FlatParts, IntArray, Positions, byte_views, require_package
from .batch import sums

__all__ = ["FORMAT_VERSION", "HEADER_BYTES", "Check", "Headers", "Seal", "Verdict"]

HEADER_BYTES = 64
FORMAT_VERSION = 2
MAGIC = b"RKVPAGE\x1a"
XXH3_64_SEEDED = 2

HEADER = np.dtype([
    ("magic", "V8"), ("version", "<u2"), ("header_bytes", "<u2"), ("checksum", "u1"), ("zeros", "V3"),
    ("payload_bytes", "<u8"), ("key", "V16"), ("more_zeros", "V16"), ("sum", "<u8"),
])  # fmt: skip
assert HEADER.itemsize == HEADER_BYTES
SUM_OFFSET, SUM_BYTES = 56, 8

Headers: TypeAlias = npt.NDArray[np.uint8]


class Verdict(Enum):
    """What is wrong with a stored page."""

    SHORT = "short"
    """Of another length than a page."""
    FOREIGN = "foreign"
    """Whole and right, but another key's or another format's."""
    CORRUPT = "corrupt"
    """Neither: torn, flipped, or no page at all."""


@cache
def _xxhash() -> Any:
    return require_package("xxhash", "'radixkv[storage]'", "radixkv.storage")


def require_checksum() -> None:
    """Raises: StorageError if the checksum's package is missing. Asked once a store, before any page depends on it."""
    _xxhash()


def _headers(keys: Sequence[str], payload_bytes: Sequence[int]) -> Headers:
    """All but the sums: a new uint8 [len(keys), 64]."""
    fingerprint = _xxhash().xxh3_128_digest
    first = np.zeros(1, HEADER)
    first["magic"], first["version"], first["header_bytes"] = np.void(MAGIC), FORMAT_VERSION, HEADER_BYTES
    first["checksum"] = XXH3_64_SEEDED
    headers = np.repeat(first, len(keys))
    headers["payload_bytes"] = payload_bytes
    headers["key"] = np.frombuffer(b"".join([fingerprint(key.encode()) for key in keys]), "V16")
    return headers.view(np.uint8).reshape(len(keys), HEADER_BYTES)


class _Enveloped:
    """Pages with their headers. Thread-safe as far as threads work on different pages."""

    def __init__(self, headers: Headers, payloads: FlatParts) -> None:
        self._headers, self._payloads = headers, payloads
        self._digests = [b""] * len(payloads)  # big endian
        self._rows = byte_views([headers])[0]  # slices of one view: an array's row costs ten times as much

    def parts(self) -> FlatParts:
        """Header and pieces of each page, for a storage to read or fill."""
        return self._payloads.behind(self._rows, HEADER_BYTES)

    def hash_at(self, positions: Positions) -> None:
        """Hash these pages. XXH3 releases the GIL."""
        sums(_xxhash(), self._rows, HEADER_BYTES, SUM_OFFSET, self._payloads, positions, self._digests)


class Seal(_Enveloped):
    """Pages to be stored: all of each header but its sum is there at once."""

    def __init__(self, keys: Sequence[str], payloads: FlatParts) -> None:
        super().__init__(_headers(keys, payloads.sizes), payloads)

    def prepare(self, positions: Positions) -> None:
        """Write the sums of these pages into their headers."""
        self.hash_at(positions)
        for position in positions:
            end = HEADER_BYTES * (position + 1)
            self._rows[end - SUM_BYTES : end] = self._digests[position][::-1]


class Check(_Enveloped):
    """Pages to be read, and what is wrong with them."""

    def __init__(self, keys: Sequence[str], payloads: FlatParts) -> None:
        super().__init__(np.zeros((len(keys), HEADER_BYTES), np.uint8), payloads)
        self._keys = keys

    def arrived(self, positions: Positions) -> None:
        """Hash these pages, which have been read: the sooner, the more of them is in the processor's cache."""
        self.hash_at(positions)

    def verdicts(self, sizes: IntArray) -> dict[int, Verdict]:
        """Judge the pages that were found: the positions of those that are wrong, and what is wrong with them.

        Args: sizes: int64 [pages], bytes of the stored values, header included; negative: not found.
        """
        headers, digests = self._headers, self._digests
        whole = sizes == HEADER_BYTES + np.array(self._payloads.sizes)  # of others the payload is not all there
        if b"" in digests:
            self.arrived([position for position in np.flatnonzero(whole).tolist() if not digests[position]])
            digests = [digest or bytes(SUM_BYTES) for digest in digests]
        actual = np.frombuffer(b"".join(digests), ">u8")
        expected = _headers(self._keys, self._payloads.sizes)
        words, wanted = headers.view(np.uint64), expected.view(np.uint64)
        ours = (words[:, : SUM_OFFSET // 8] == wanted[:, : SUM_OFFSET // 8]).all(axis=1)
        right = (words[:, 0] == np.frombuffer(MAGIC, np.uint64)) & (headers.view(HEADER)["sum"][:, 0] == actual)
        wrong = (sizes >= 0) & ~(whole & right & ours)
        return {
            index: Verdict.SHORT if not whole[index] else Verdict.FOREIGN if right[index] else Verdict.CORRUPT
            for index in np.flatnonzero(wrong).tolist()
        }
