"""A copy as a nest of loops over contiguous runs: what the CPU path walks and the copy engine enumerates.

A plan is halves x layers x pages x tokens x heads, D bytes each. Two steps make it short:
1. merge: a loop whose steps are the run's own length on both sides only makes the run longer. page_first_direct to itself: a
   page's L * P * H * D bytes are one run; layer_first to page_first: H * D; anything with page_head on one side: D.
2. order: the loops that are left go by falling destination stride, so that writes move forward through memory.
Consecutive page ids on both sides are merged by whoever walks (``expand`` here, copy.c there): they depend on the ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .plan import CopyPlan

__all__ = ["Loops", "Runs", "expand", "loops_of"]

Table = npt.NDArray[np.uint64]


class _Loop(NamedTuple):
    """One loop: what step i adds to the address on each side."""

    src: Table
    dst: Table

    def lengthens(self, run_bytes: int) -> bool:
        """Whether its steps follow each other without a gap on both sides."""
        steps = np.arange(len(self.src), dtype=np.uint64) * np.uint64(run_bytes)
        return bool(np.array_equal(self.src, steps) and np.array_equal(self.dst, steps))

    @property
    def dst_stride(self) -> int:
        """The typical distance of two steps, to order loops by."""
        return int(np.median(np.abs(np.diff(self.dst).astype(np.int64))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Loops:
    """Addresses of run (i, j, ..): src_base + src[0][i] + src[1][j] + .. modulo 2**64, and so for dst; run_bytes from there.

    Attributes:
        src, dst: uint64 offset tables, outermost loop first; the k-th of both have one length.
        run_bytes: contiguous on both sides.
        steps_per_layer: 0, or: the first loop goes through the layers in order, with so many entries for each (its halves).
    """

    src_base: int
    dst_base: int
    src: tuple[Table, ...]
    dst: tuple[Table, ...]
    run_bytes: int
    steps_per_layer: int

    @property
    def num_runs(self) -> int:
        """Runs before consecutive ones are merged."""
        count = 1
        for table in self.src:
            count *= len(table)
        return count


class Runs(NamedTuple):
    """A list of copies: uint64 [n] each."""

    src: Table
    dst: Table
    num_bytes: Table


def loops_of(plan: CopyPlan, outer_layers: bool = False) -> Loops:
    """Merge and order the loops of a plan.

    Args:
        outer_layers: finish layer after layer, for a reader that waits for them; else by destination address alone.
    """
    g = plan.geometry
    src_base, dst_base, by_layer = _base_loops(plan, outer_layers)
    inner = [
        _strided(g.num_heads, plan.src.head_stride, plan.dst.head_stride),
        _strided(g.page_size, plan.src.token_stride, plan.dst.token_stride),
        _Loop(_times(plan.src_pages, plan.src.page_stride), _times(plan.dst_pages, plan.dst.page_stride)),
    ]
    first = by_layer[:1] if outer_layers else []
    rest = [loop for loop in [*inner, *by_layer[len(first) :]] if len(loop.src) != 1]
    run_bytes = g.head_bytes
    if len(plan.src_pages) == 1:
        src_base = src_base + int(inner[2].src[0])
        dst_base = dst_base + int(inner[2].dst[0])
    while mergeable := [loop for loop in rest if len(loop.src) and loop.lengthens(run_bytes)]:
        run_bytes *= len(mergeable[0].src)
        rest = [loop for loop in rest if loop is not mergeable[0]]
    rest.sort(key=lambda loop: loop.dst_stride if len(loop.src) else 0, reverse=True)
    return Loops(
        src_base=src_base % 2**64,
        dst_base=dst_base % 2**64,
        src=tuple(loop.src for loop in [*first, *rest]),
        dst=tuple(loop.dst for loop in [*first, *rest]),
        run_bytes=run_bytes,
        steps_per_layer=g.halves if outer_layers else 0,
    )


def expand(loops: Loops) -> Runs:
    """Every run of the nest in walking order, those that follow each other on both sides merged into one."""
    src = np.array([loops.src_base], np.uint64)
    dst = np.array([loops.dst_base], np.uint64)
    for src_table, dst_table in zip(loops.src, loops.dst, strict=True):
        src = (src[:, None] + src_table[None, :]).ravel()
        dst = (dst[:, None] + dst_table[None, :]).ravel()
    step = np.uint64(loops.run_bytes)
    starts_new = np.ones(len(src), np.bool_)
    starts_new[1:] = (src[1:] != src[:-1] + step) | (dst[1:] != dst[:-1] + step)
    first = np.flatnonzero(starts_new)
    lengths = np.diff(np.append(first, len(src))).astype(np.uint64) * step
    return Runs(src[first], dst[first], lengths)


def _base_loops(plan: CopyPlan, outer_layers: bool) -> tuple[int, int, list[_Loop]]:
    """The loops over bases: one of layers and one of halves where that is what they are, else one over all of them.

    Separate tensors (a list a layer, K and V apart) are at any distance: only a table of all of them says where.
    """
    part = slice(plan.layers.start, plan.layers.stop)
    src, dst = plan.src.bases[:, part], plan.dst.bases[:, part]  # [halves, layers]
    src_base, dst_base = int(src[0, 0]), int(dst[0, 0])
    src, dst = src - src[0, 0], dst - dst[0, 0]
    if outer_layers:
        return src_base, dst_base, [_Loop(src.T.ravel(), dst.T.ravel())]
    if all(np.array_equal(side, side[:, :1] + side[:1, :]) for side in (src, dst)):
        halves, layers = _Loop(src[:, 0].copy(), dst[:, 0].copy()), _Loop(src[0].copy(), dst[0].copy())
        return src_base, dst_base, [halves, layers]
    return src_base, dst_base, [_Loop(src.ravel(), dst.ravel())]


def _strided(count: int, src_stride: int, dst_stride: int) -> _Loop:
    steps = np.arange(count, dtype=np.int64)
    return _Loop(_times(steps, src_stride), _times(steps, dst_stride))


def _times(ids: npt.NDArray[np.integer], stride: int) -> Table:
    table: Table = (ids.astype(np.int64) * stride).astype(np.uint64)
    return table
