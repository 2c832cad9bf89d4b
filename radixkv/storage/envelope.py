"""L2: the 64 bytes before every stored page, in every backend: what makes a wrong page a miss.

Little endian:

    offset  bytes
     0       8     magic "RKVPAGE\\x1a"
     8       2     format version, 1
    10       2     bytes of this header, 64
    12       1     checksum: 1 = XXH3, 64 bits, seed 0
    13       3     0
    16       8     payload bytes
    24      16     fingerprint of the key: XXH3, 128 bits (low half first), of its UTF-8
    40       8     checksum of the payload
    48       8     0
    56       8     XXH3, 64 bits, of bytes 0 .. 55

The header is a part of its own, so nothing copies the payload: parts of the host pool's own memory follow it. A stored
page is thus 64 bytes longer than a page. The sums guard against accidents (torn, flipped, truncated, swapped), not
against someone who can write to the store: who can, can store wrong KV.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from .base import Buffer, require_package

__all__ = ["FORMAT_VERSION", "HEADER_BYTES", "Verdict", "seal", "verify"]

HEADER_BYTES = 64
FORMAT_VERSION = 1
MAGIC = b"RKVPAGE\x1a"
XXH3_64 = 1

HEADER = np.dtype([
    ("magic", "S8"), ("version", "<u2"), ("header_bytes", "<u2"), ("checksum", "u1"), ("zeros", "V3"),
    ("payload_bytes", "<u8"), ("key_low", "<u8"), ("key_high", "<u8"), ("payload_sum", "<u8"), ("more_zeros", "V8"),
    ("header_sum", "<u8"),
])  # fmt: skip
assert HEADER.itemsize == HEADER_BYTES

Headers = npt.NDArray[np.uint8]
_LOW = (1 << 64) - 1


class Verdict(Enum):
    """What ``verify`` says of a stored page."""

    GOOD = "good"
    SHORT = "short"
    """Of another length than a page, in storage or by its header."""
    FOREIGN = "foreign"
    """A whole page, but another key's or another format's."""
    CORRUPT = "corrupt"
    """Neither: torn, flipped, or no page at all."""


@cache
def _hashes() -> tuple[Callable[[Buffer], int], Callable[[], Any], Callable[[Buffer], int]]:
    """XXH3 of one buffer, XXH3 of many, XXH3-128 of one. They release the GIL."""
    xxhash = require_package("xxhash", "xxhash", "radixkv.storage")
    return xxhash.xxh3_64_intdigest, xxhash.xxh3_64, xxhash.xxh3_128_intdigest


def payload_sum(parts: Sequence[Buffer]) -> int:
    """XXH3, 64 bits, of the parts one after the other."""
    one, many, _ = _hashes()
    if len(parts) == 1:
        return one(parts[0])
    state = many()
    for part in parts:
        state.update(part)
    digest: int = state.intdigest()
    return digest


def seal(keys: Sequence[str], payloads: Sequence[Sequence[Buffer]], payload_bytes: int) -> Headers:
    """The headers of pages: a new uint8 [len(keys), 64]. Args: payload_bytes: of each payload."""
    one, _, fingerprint = _hashes()
    headers = np.zeros((len(keys), HEADER_BYTES), np.uint8)
    fields = headers.view(HEADER)[:, 0]
    fields["magic"], fields["version"], fields["header_bytes"] = MAGIC, FORMAT_VERSION, HEADER_BYTES
    fields["checksum"], fields["payload_bytes"] = XXH3_64, payload_bytes
    for index, (key, parts) in enumerate(zip(keys, payloads, strict=True)):
        digest = fingerprint(key.encode())
        fields["key_low"][index], fields["key_high"][index] = digest & _LOW, digest >> 64
        fields["payload_sum"][index] = payload_sum(parts)
        fields["header_sum"][index] = one(headers[index, :56])
    return headers


def verify(header: npt.NDArray[np.uint8], key: str, parts: Sequence[Buffer], payload_bytes: int, size: int) -> Verdict:
    """Judge a page that was read. Args: header: uint8 [64]; size: bytes of the stored value, header included."""
    one, _, fingerprint = _hashes()
    if size < HEADER_BYTES:
        return Verdict.SHORT
    fields = header.view(HEADER)[0]
    if fields["magic"] != MAGIC or int(fields["header_sum"]) != one(header[:56]):
        return Verdict.CORRUPT
    format_is_ours = (int(fields["version"]), int(fields["header_bytes"]), int(fields["checksum"])) == (
        FORMAT_VERSION, HEADER_BYTES, XXH3_64)  # fmt: skip
    digest = fingerprint(key.encode())
    if not format_is_ours or (int(fields["key_low"]), int(fields["key_high"])) != (digest & _LOW, digest >> 64):
        return Verdict.FOREIGN
    if int(fields["payload_bytes"]) != payload_bytes or size != HEADER_BYTES + payload_bytes:
        return Verdict.SHORT
    return Verdict.GOOD if payload_sum(parts) == int(fields["payload_sum"]) else Verdict.CORRUPT
