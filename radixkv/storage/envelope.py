"""L2: the 64 bytes before every stored page, in every backend: what makes a wrong page a miss.

Little endian:

    offset  bytes
     0       8     magic "RKVPAGE\\x1a"
     8       2     format version, 1
    10       2     bytes of this header, 64
    12       1     checksum: 1 = XXH3, 64 bits, seed 0
    13       3     0
    16       8     payload bytes
    24      16     fingerprint of the key: XXH3, 128 bits, of its UTF-8, in the canonical byte order of XXH128
    40      16     0
    56       8     checksum of bytes 0 .. 55 and the payload

The header is a part of its own, so nothing copies the payload: parts of the host pool's own memory follow it. A stored
page is thus 64 bytes longer than a page. The sums guard against accidents (torn, flipped, truncated, swapped), not
against someone who can write to the store: who can, can store wrong KV.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .base import Buffer, IntArray, require_package

__all__ = ["FORMAT_VERSION", "HEADER_BYTES", "Headers", "Verdict", "seal", "verify"]

HEADER_BYTES = 64
FORMAT_VERSION = 1
MAGIC = b"RKVPAGE\x1a"
XXH3_64 = 1

HEADER = np.dtype([
    ("magic", "V8"), ("version", "<u2"), ("header_bytes", "<u2"), ("checksum", "u1"), ("zeros", "V3"),
    ("payload_bytes", "<u8"), ("key", "V16"), ("more_zeros", "V16"), ("sum", "<u8"),
])  # fmt: skip
assert HEADER.itemsize == HEADER_BYTES
SUM_OFFSET = 56

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


def _headers(keys: Sequence[str], payload_bytes: IntArray) -> Headers:
    """All but the sums: a new uint8 [len(keys), 64]."""
    fingerprint = _xxhash().xxh3_128_digest
    first = np.zeros(1, HEADER)
    first["magic"], first["version"], first["header_bytes"] = np.void(MAGIC), FORMAT_VERSION, HEADER_BYTES
    first["checksum"] = XXH3_64
    headers = np.repeat(first, len(keys))
    headers["payload_bytes"] = payload_bytes
    headers["key"] = np.frombuffer(b"".join([fingerprint(key.encode()) for key in keys]), "V16")
    return headers.view(np.uint8).reshape(len(keys), HEADER_BYTES)


def _sums(headers: Headers, payloads: Iterable[Sequence[Buffer]]) -> list[int]:
    """The checksum of each header and its payload. XXH3 releases the GIL."""
    new, covered, sums = _xxhash().xxh3_64, memoryview(headers[:, :SUM_OFFSET].tobytes()), []
    for at, parts in zip(range(0, len(covered), SUM_OFFSET), payloads, strict=True):
        state = new(covered[at : at + SUM_OFFSET])
        for part in parts:
            state.update(part)
        sums.append(state.intdigest())
    return sums


def seal(keys: Sequence[str], payloads: Sequence[Sequence[Buffer]], payload_bytes: IntArray) -> Headers:
    """The headers of pages: a new uint8 [len(keys), 64]. Args: payload_bytes: of each payload, int64 [len(keys)]."""
    headers = _headers(keys, payload_bytes)
    headers.view(HEADER)["sum"][:, 0] = np.array(_sums(headers, payloads), np.uint64)
    return headers


def verify(headers: Headers, keys: Sequence[str], payloads: Sequence[Sequence[Buffer]], payload_bytes: IntArray,
           sizes: IntArray) -> dict[int, Verdict]:  # fmt: skip
    """Judge pages that were read: the positions of those that are wrong, and what is wrong with them.

    Args:
        headers: uint8 [len(keys), 64].
        payload_bytes: int64 [len(keys)], what is expected. sizes: the same, of the stored values, header included.
    """
    expected = _headers(keys, payload_bytes)
    whole = sizes == HEADER_BYTES + payload_bytes
    ours = (headers[:, :SUM_OFFSET] == expected[:, :SUM_OFFSET]).all(axis=1)
    right = (headers[:, : len(MAGIC)] == np.frombuffer(MAGIC, np.uint8)).all(axis=1)
    at = np.flatnonzero(whole & right)  # of those that are not whole the payload is not all there
    sums = _sums(headers[at], payloads if len(at) == len(keys) else [payloads[index] for index in at.tolist()])
    right[at] = headers.view(HEADER)["sum"][at, 0] == np.array(sums, np.uint64)
    return {
        index: Verdict.SHORT if not whole[index] else Verdict.FOREIGN if right[index] else Verdict.CORRUPT
        for index in np.flatnonzero(~(whole & right & ours)).tolist()
    }
