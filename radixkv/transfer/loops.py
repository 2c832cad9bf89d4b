"""A copy as a nest of loops over contiguous runs: what the CPU path walks and the copy engine enumerates.

A plan is halves x layers x pages x tokens x heads, D bytes each. Two steps make it short:
1. merge: a loop whose steps are the run's own length on both sides only makes the run longer. page_first_direct to
   itself: a page's L * P * H * D bytes are one run; layer_first to page_first: H * D; page_head on one side: D.
2. order: the loops that are left go by falling destination stride, so that writes move forward through memory. Runs
   shorter than a cache line go by the smaller of both strides: what shares a line with a run, on either side, follows
   soon. (Load back of 16 B runs from page_first, layer by layer, would read each line four times from memory.)
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
LINE_BYTES = 64
_Steps = npt.NDArray[np.signedinteger]


class _Loop(NamedTuple):
    """One loop: what step i adds to the address on each side; the distance of the first two there, to order by."""

    src: Table
    dst: Table
    src_stride: int
    dst_stride: int

    def order(self, run_bytes: int) -> tuple[int, int]:
        """What loops are sorted by, falling."""
        near, far = sorted((self.src_stride, self.dst_stride))
        return (near, far) if run_bytes < LINE_BYTES else (self.dst_stride, 0)

    def lengthens(self, run_bytes: int) -> bool:
        """Whether its steps follow each other without a gap on both sides."""
        for table in (self.src, self.dst):
            if len(table) < 2 or int(table[0]) or int(table[1]) != run_bytes:
                return False
        steps = np.arange(len(self.src), dtype=np.uint64) * np.uint64(run_bytes)
        return bool(np.array_equal(self.src, steps) and np.array_equal(self.dst, steps))


@dataclass(frozen=True, slots=True, kw_only=True)
class Loops:
    """Run (i, j, ..) is run_bytes from src_base + src[0][i] + src[1][j] + .. modulo 2**64, and so for dst.

    Attributes:
        src, dst: uint64 offset tables, outermost loop first; the k-th of both have one length.
        run_bytes: contiguous on both sides.
        steps_per_layer: 0, or: the first loop goes through the layers in order, with so many entries (halves) for each.
        src_boundaries, dst_boundaries: of the views; ``expand`` cuts there. Threads need not: host memory has no seams.
    """

    src_base: int
    dst_base: int
    src: tuple[Table, ...]
    dst: tuple[Table, ...]
    run_bytes: int
    steps_per_layer: int
    src_boundaries: tuple[int, ...] = ()
    dst_boundaries: tuple[int, ...] = ()

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


def loops_of(plan: CopyPlan, outer_layers: bool = False, sort_pages: bool = False) -> Loops:
    """Merge and order the loops of a plan.

    Args:
        outer_layers: finish layer after layer, for a reader that waits for them; else by destination address alone.
        sort_pages: go through pages by rising destination, so that more of them follow each other; else in their order.
    """
    g = plan.geometry
    src_pages, dst_pages = plan.src_pages, plan.dst_pages
    if sort_pages and (np.diff(dst_pages) < 0).any():
        order = np.argsort(dst_pages)
        src_pages, dst_pages = src_pages[order], dst_pages[order]
    src_base, dst_base, by_layer = _base_loops(plan, outer_layers)
    heads, tokens = np.arange(g.num_heads), np.arange(g.page_size)
    inner = [
        _strided(heads, heads, plan.src.head_stride, plan.dst.head_stride),
        _strided(tokens, tokens, plan.src.token_stride, plan.dst.token_stride),
        _strided(src_pages, dst_pages, plan.src.page_stride, plan.dst.page_stride),
    ]
    first = by_layer[:1] if outer_layers else []
    rest = [loop for loop in [*inner, *by_layer[len(first) :]] if len(loop.src) != 1]
    run_bytes = g.head_bytes
    if len(plan.src_pages) == 1:
        src_base = src_base + int(inner[2].src[0])
        dst_base = dst_base + int(inner[2].dst[0])
    while mergeable := [loop for loop in rest if loop.lengthens(run_bytes)]:
        run_bytes *= len(mergeable[0].src)
        rest = [loop for loop in rest if loop is not mergeable[0]]
    rest.sort(key=lambda loop: loop.order(run_bytes), reverse=True)
    return Loops(
        src_base=src_base % 2**64,
        dst_base=dst_base % 2**64,
        src=tuple(loop.src for loop in [*first, *rest]),
        dst=tuple(loop.dst for loop in [*first, *rest]),
        run_bytes=run_bytes,
        steps_per_layer=g.halves if outer_layers else 0,
        src_boundaries=plan.src.boundaries,
        dst_boundaries=plan.dst.boundaries,
    )


def expand(loops: Loops) -> Runs:
    """Every run of the nest in walking order, those that follow each other on both sides merged into one.

    No run spans a boundary of either side: one that would is cut there.
    """
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
    runs = Runs(src[first], dst[first], lengths)
    runs = _cut(runs, runs.src, loops.src_boundaries)
    return _cut(runs, runs.dst, loops.dst_boundaries)


def _cut(runs: Runs, starts: Table, boundaries: tuple[int, ...]) -> Runs:
    """Cut runs at the boundaries inside them; ``starts`` are their addresses on the side of the boundaries.

        [---- run ----|--------]    ->    [---- run ----][--------]
    """
    if not boundaries or not len(starts):
        return runs
    seams = np.array(boundaries, np.uint64)
    first = np.searchsorted(seams, starts, side="right")  # the first seam beyond the start
    seams_inside = np.searchsorted(seams, starts + runs.num_bytes, side="left") - first
    if not seams_inside.any():
        return runs
    # piece k of a run begins at its start (k = 0) or at its k-th seam, and ends where the next begins
    pieces = seams_inside + 1
    run = np.repeat(np.arange(len(starts)), pieces)
    k = np.arange(len(run)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begin = np.where(k == 0, starts[run], seams[np.maximum(first[run] + k - 1, 0)]) - starts[run]
    end = np.append(begin[1:], np.uint64(0))
    end[np.cumsum(pieces) - 1] = runs.num_bytes
    return Runs(runs.src[run] + begin, runs.dst[run] + begin, end - begin)


def _base_loops(plan: CopyPlan, outer_layers: bool) -> tuple[int, int, list[_Loop]]:
    """The loops over bases: one of layers and one of halves where that is what they are, else one over all of them.

    Separate tensors (a list a layer, K and V apart) are at any distance: only a table of all of them says where.
    """
    part = slice(plan.layers.start, plan.layers.stop)
    src, dst = plan.src.bases[:, part], plan.dst.bases[:, part]  # [halves, layers]
    src_base, dst_base = int(src[0, 0]), int(dst[0, 0])
    src, dst = src - src[0, 0], dst - dst[0, 0]
    if outer_layers:
        return src_base, dst_base, [_table(src.T.ravel(), dst.T.ravel())]
    if all((side == side[:, :1] + side[:1, :]).all() for side in (src, dst)):
        halves, layers = _table(src[:, 0].copy(), dst[:, 0].copy()), _table(src[0].copy(), dst[0].copy())
        return src_base, dst_base, [halves, layers]
    return src_base, dst_base, [_table(src.ravel(), dst.ravel())]


def _table(src: Table, dst: Table) -> _Loop:
    """A loop over any addresses."""
    src_stride, dst_stride = (abs(int(side[1]) - int(side[0])) if len(side) > 1 else 0 for side in (src, dst))
    return _Loop(src, dst, src_stride, dst_stride)


def _strided(src_steps: _Steps, dst_steps: _Steps, src_stride: int, dst_stride: int) -> _Loop:
    """A loop over multiples of a stride on each side."""
    return _Loop(_times(src_steps, src_stride), _times(dst_steps, dst_stride), src_stride, dst_stride)


def _times(steps: _Steps, stride: int) -> Table:
    table: Table = (steps.astype(np.int64, copy=False) * stride).view(np.uint64)
    return table
