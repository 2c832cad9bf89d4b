"""L5: what the bytes of a page must be, given the tokens before and in it. Stands in for the KV that a model computes.

As with real KV, the bytes of a page depend on its whole prefix: a page read at the wrong place, of another prefix, from
a stale slot or half copied does not verify. All is vectorised over the pages of a request:

    1. digest of each page:   d[p] = sum over i of mix(token[p, i] + (i + 1) * GOLDEN)      tokens, place in the page
    2. chain over the pages:  s[p] = mix(p + sum over q <= p of mix(d[q] + (q + 1) * ODD))  whole prefix, and position
    3. word k of page p:      w[p, k] = mix'(s[p] ^ key[k])                                 for each k a bijection

All arithmetic is modulo 2**64. By 3 two pages of different chain values differ in every 8-byte word.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["page_bytes", "page_seeds"]

_Words = npt.NDArray[np.uint64]
_GOLDEN = np.uint64(0x9E37_79B9_7F4A_7C15)
_ODD = np.uint64(0xD1B5_4A32_D192_ED03)
_WORD = np.uint64(0xFF51_AFD7_ED55_8CCD)


def page_seeds(tokens: npt.NDArray[np.int32], page_size: int) -> _Words:
    """The chain value of each whole page of a key, which stands for its prefix: uint64 [len(tokens) // page_size]."""
    num_pages = len(tokens) // page_size
    if num_pages == 0:
        return np.zeros(0, np.uint64)
    salted = tokens[: num_pages * page_size].astype(np.uint32).astype(np.uint64).reshape(num_pages, page_size)
    salted += np.arange(1, page_size + 1, dtype=np.uint64) * _GOLDEN
    digests = _mix(salted).sum(axis=1, dtype=np.uint64)
    positions = np.arange(num_pages, dtype=np.uint64)
    prefixes = np.cumsum(_mix(digests + (positions + np.uint64(1)) * _ODD), dtype=np.uint64)
    return _mix(prefixes + positions)


def page_bytes(seeds: _Words, bytes_per_page: int) -> npt.NDArray[np.uint8]:
    """Expand chain values to page contents: a new C-contiguous uint8 array [len(seeds), bytes_per_page]."""
    num_words = -(-bytes_per_page // 8)
    keys = _mix(np.arange(1, num_words + 1, dtype=np.uint64) * _GOLDEN)
    words = seeds[:, None] ^ keys
    words *= _WORD
    words ^= words >> np.uint64(32)
    return np.ascontiguousarray(words.view(np.uint8)[:, :bytes_per_page])


def _mix(x: _Words) -> _Words:
    """A bijection of 64 bits (xxHash's avalanche); overwrites its argument."""
    x ^= x >> np.uint64(33)
    x *= _WORD
    x ^= x >> np.uint64(33)
    x *= np.uint64(0xC4CE_B9FE_1A85_EC53)
    x ^= x >> np.uint64(33)
    return x
