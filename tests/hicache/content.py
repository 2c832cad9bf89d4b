"""What KV must hold: a function of the whole prefix up to a token, so that a wrong slot, a stale one or one of another
prefix shows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

_PRIME = (1 << 61) - 1
_FACTOR = 0x1D2F3C4B5A69788F % _PRIME


START = 1


def chain(tokens: Sequence[int], page_size: int, last: str = "") -> list[str]:
    """Storage keys of the pages of a prompt, as the original defines them; ``last``: that of the page before."""
    keys, digest = [], bytes.fromhex(last)
    for start in range(0, len(tokens) // page_size * page_size, page_size):
        page = b"".join(token.to_bytes(4, "little") for token in tokens[start : start + page_size])
        digest = hashlib.sha256(digest + page).digest()
        keys.append(digest.hex())
    return keys


def prefix_marks(tokens: Sequence[int], last: int = START) -> np.ndarray:
    """uint64 [n]: a number for each token together with all before it. ``last``: that of the token before these."""
    marks = []
    for token in tokens:
        last = (last * _FACTOR + token + 1) % _PRIME
        marks.append(last)
    return np.array(marks, np.uint64)


def rows(marks: np.ndarray, planes: int, width: int) -> np.ndarray:
    """float32 [n, planes, width]: whole numbers below 2**23, another function of the mark in each element."""
    salts = np.arange(1, planes * width + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) | np.uint64(1)
    with np.errstate(over="ignore"):
        mixed = marks[:, None] * salts
    return (mixed >> np.uint64(41)).astype(np.float32).reshape(len(marks), planes, width)
