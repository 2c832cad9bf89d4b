"""The dimensions of a copy, for every path: what issue 3 lists, in a covering array.

Each of the 16 pairs of layouts meets each value of every other parameter, and any two values of two other parameters
meet in some case. Three at a time are met by the hypothesis tests, at random.
"""

from __future__ import annotations

import itertools
from typing import Any

from radixkv.pool.layout import LAYOUTS

from .covering import Case

PARAMETERS: dict[str, list[Any]] = {
    "layouts": list(itertools.product(LAYOUTS, LAYOUTS)),
    "kind": ["mha", "mla"],
    "item_bytes": [1, 2, 4],
    "page_size": [1, 16, 64, 7],
    "head_dim": [8, 33, 65, 512],
    "heads": [1, 2],
    "layers": [1, 80],
    "pattern": ["empty", "single", "random", "reversed", "contiguous"],
    "ids": ["int32", "int64"],
}
"""Rows of 8 bytes (8 x 1 x 1) to 4 KiB (512 x 4 x 2), odd ones (33, 65) and odd multiples of 2 and 4."""

MAX_LAYER_PAGES_BYTES = 80 * 64 * 66
"""Of one page of one half: 80 layers of 64 tokens are of short rows, so that no case takes long."""


def row_bytes(case: Case) -> int:
    return int(case["head_dim"] * case["item_bytes"] * case["heads"])


def allowed(case: Case) -> bool:
    """MLA has one head; no page is too large."""
    if case["kind"] == "mla" and case["heads"] != 1:
        return False
    return bool(case["layers"] * case["page_size"] * row_bytes(case) <= MAX_LAYER_PAGES_BYTES)


IMPOSSIBLE = {frozenset((("kind", "mla"), ("heads", 2)))}


def name(case: Case) -> str:
    """For the name of a test."""
    parts = [*case["layouts"], *(f"{value}" for key, value in case.items() if key != "layouts")]
    return "-".join(parts)
