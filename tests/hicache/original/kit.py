"""Shared by the tests on the original: a small cache with storage or without, three keys, and looks into it."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import content
from ..sides import OriginalSide, Setup, make_original

PAGE = 16
A, B, C = ([first + i for i in range(4 * PAGE)] for first in (1_000, 2_000, 3_000))
"""Three keys of four pages that share nothing."""


def make(**options: Any) -> OriginalSide:
    poll_s = options.pop("poll_s", 0.01)
    defaults = {"device_tokens": 16 * PAGE, "host_ratio": 2.0, "prefetch_threshold": PAGE}
    return make_original(Setup(**{**defaults, **options}), poll_s=poll_s)


def expected(side: Any, key: list[int]) -> np.ndarray:
    """The KV of a key's tokens: float32 [n, planes, D]."""
    planes = side.planes()
    return content.rows(content.prefix_marks(key), len(planes), planes[0].shape[1])


def put(side: Any, key: list[int]) -> int:
    """Insert a key with its KV, give the duplicates back. Returns: tokens that were there."""
    slots = side.allocator.alloc(len(key))
    side.write(slots, expected(side, key))
    present = side.cache.insert(key, slots.clone())
    side.allocator.free(slots[:present])
    return int(present)


def settled(side: Any) -> None:
    """Everything done, and the cache has been told."""
    side.settle()
    side.cache.check_hicache_events()


def end_of(side: Any, key: list[int]) -> Any:
    return side.cache.match_prefix(key).last_host_node


def stored(side: OriginalSide) -> set[str]:
    assert side.storage_folder is not None
    return {path.stem for path in side.storage_folder.iterdir()}


def wrong_kv(side: Any, key: list[int], tier: str) -> tuple[int, ...]:
    """Planes of the node at the end of ``key`` whose bytes are not what was written."""
    node = end_of(side, key)
    rows = side.host_rows(node.host_value) if tier == "host" else side.device_rows(node.value)
    right = expected(side, key)[-len(rows) :]
    return tuple(plane for plane in range(rows.shape[1]) if (rows[:, plane] != right[:, plane]).any())
