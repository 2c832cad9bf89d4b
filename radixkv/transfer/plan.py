"""What a copy is: pages of one view to pages of another, checked once, before anything moves.

Every path (CPU, kernels, copy engine) takes a ``CopyPlan``, so every path refuses the same mistakes in the same words.

    src pages:  [ 7 ][ 2 ][ 3 ]          page i of src_pages, of each layer in ``layers`` and of each half,
                  |    |    |            goes to page i of dst_pages
    dst pages:  [ 0 ][ 9 ][ 4 ]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentTypeError, InvalidArgumentError, PageOwnershipError
from ..pool.layout import KVGeometry, KVView

__all__ = ["CopyPlan", "Ids", "Overlap", "overlap_of", "pages_of_slots", "plan_copy", "reach_of", "staging_view"]

Overlap: TypeAlias = Literal["none", "pages", "bytes"]
Ids: TypeAlias = npt.NDArray[np.int32] | npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyPlan:
    """A copy that was found sound. Made by ``plan_copy``; the views' memory must outlive it.

    Attributes:
        geometry: of both sides.
        src, dst: the two views.
        src_pages, dst_pages: int32 or int64 [n], C order, in host memory; in range, the destinations distinct.
        layers: which layers move, of both sides; step 1.
    """

    geometry: KVGeometry
    src: KVView
    dst: KVView
    src_pages: Ids
    dst_pages: Ids
    layers: range

    @property
    def num_pages(self) -> int:
        return len(self.src_pages)

    @property
    def total_bytes(self) -> int:
        """Bytes that move."""
        g = self.geometry
        return self.num_pages * g.page_size * g.row_bytes * g.halves * len(self.layers)

    def layer(self, layer: int) -> CopyPlan:
        """The same copy of one of its layers. O(1), nothing is checked again but the layer."""
        if layer not in self.layers:
            raise InvalidArgumentError(f"layer {layer} is not of {self.layers.start} .. {self.layers.stop - 1}")
        return replace(self, layers=range(layer, layer + 1))

    def require_device(self, device: str) -> None:
        """Raises: InvalidArgumentError unless both views are on ``device``."""
        for side, view in (("src", self.src), ("dst", self.dst)):
            if view.device != device:
                raise InvalidArgumentError(f"{side} is on {view.device}, and this path copies on {device}")


def plan_copy(
    geometry: KVGeometry,
    src: KVView,
    dst: KVView,
    src_pages: Ids | Sequence[int],
    dst_pages: Ids | Sequence[int],
    layers: range | None = None,
) -> CopyPlan:
    """Check a copy of whole pages; every layer, or those of ``layers``.

    Args:
        src_pages, dst_pages: int32 or int64 [n] page ids (slot // page_size).
        layers: start and stop within 0 .. L, step 1, not empty.
    Raises:
        ArgumentTypeError: ids that are no one-dimensional int32 or int64; bases that are no uint64.
        InvalidArgumentError: lengths differ; an id or layer out of range; a view of another shape than the geometry, or
            whose strides fold onto themselves; source and destination bytes that overlap.
        PageOwnershipError: a destination page is given twice.
    """
    layers = range(geometry.num_layers) if layers is None else layers
    if layers.step != 1 or not 0 <= layers.start < layers.stop <= geometry.num_layers:
        raise InvalidArgumentError(f"{layers} is no run of the {geometry.num_layers} layers")
    _check_view("src", geometry, src)
    _check_view("dst", geometry, dst)
    _check_apart("dst", geometry, dst)
    src_ids = _check_ids("src_pages", src_pages, src.num_slots // geometry.page_size)
    dst_ids = _check_ids("dst_pages", dst_pages, dst.num_slots // geometry.page_size)
    if len(src_ids) != len(dst_ids):
        raise InvalidArgumentError(f"{len(src_ids)} source pages for {len(dst_ids)} destination pages")
    ordered = np.sort(dst_ids)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if twice.size:
        raise PageOwnershipError(f"destination page {twice[0]} is given twice")
    plan = CopyPlan(geometry=geometry, src=src, dst=dst, src_pages=src_ids, dst_pages=dst_ids, layers=layers)
    _check_overlap(plan)
    return plan


def pages_of_slots(slots: Ids, page_size: int) -> npt.NDArray[np.int64]:
    """Page ids of slot indices that cover whole pages, in order: [7*P, 7*P+1, ..., 2*P, ...] -> [7, 2].

    Returns: a new int64 array [len(slots) // page_size].
    Raises: InvalidArgumentError if they do not.
    """
    ids = _integers("slots", slots).astype(np.int64)
    if len(ids) % page_size:
        raise InvalidArgumentError(f"{len(ids)} slots are no whole pages of {page_size}")
    rows = ids.reshape(-1, page_size)
    wrong = (rows[:, :1] % page_size != 0) | (rows != rows[:, :1] + np.arange(page_size))
    if wrong.any():
        at = int(np.flatnonzero(wrong.any(axis=1))[0])
        raise InvalidArgumentError(
            f"slots {at * page_size} .. {(at + 1) * page_size - 1} are no page: {rows[at][:4]} ..."
        )
    pages: npt.NDArray[np.int64] = rows[:, 0] // page_size
    return pages


def staging_view(geometry: KVGeometry, address: int, num_pages: int, device: str = "cpu") -> KVView:
    """The view of a staging buffer for storage: uint8 [num_pages, halves, L, P, H, D], so one page is one object.

    Args:
        address: of the buffer, num_pages * geometry.page_bytes bytes long.
    """
    g = geometry
    layer_bytes = g.page_size * g.row_bytes
    steps = np.arange(g.halves * g.num_layers, dtype=np.uint64) * np.uint64(layer_bytes)
    return KVView(
        bases=(np.uint64(address) + steps).reshape(g.halves, g.num_layers),
        page_stride=g.page_bytes,
        token_stride=g.row_bytes,
        head_stride=g.head_bytes,
        num_slots=num_pages * g.page_size,
        device=device,
    )


def _check_view(side: str, g: KVGeometry, view: KVView) -> None:
    """Shape, dtype, and strides that keep each (page, token, head) to bytes of its own."""
    if view.bases.dtype != np.uint64:
        raise ArgumentTypeError(f"bases of {side} are {view.bases.dtype}, not uint64")
    if view.bases.shape != (g.halves, g.num_layers):
        raise InvalidArgumentError(f"bases of {side} are {view.bases.shape}, not {(g.halves, g.num_layers)}")
    if view.num_slots < 0 or view.num_slots % g.page_size:
        raise InvalidArgumentError(f"{view.num_slots} slots of {side} are no whole pages of {g.page_size}")
    if view.num_slots and not view.bases.all():
        raise InvalidArgumentError(f"a base of {side} is NULL")
    counts = (view.num_slots // g.page_size, g.page_size, g.num_heads)
    strides = (view.page_stride, view.token_stride, view.head_stride)
    if not _nests([dim for dim in zip(strides, counts, strict=True) if dim[1] > 1], g.head_bytes):
        raise InvalidArgumentError(
            f"{side} folds onto itself: page, token and head strides {strides} for {counts} of {g.head_bytes} bytes"
        )


def _check_apart(side: str, g: KVGeometry, view: KVView) -> None:
    """No byte is of two layers or halves: whoever writes last would win. Exact; csrc/cuda/plan.c does the same.

    1. Halves and layers at even distances are two more dimensions: done if all five nest. 2. Bases in order, each
    beyond the reach of the one before: done. 3. Else each pair within reach is solved.
    """
    if not view.num_slots or view.bases.size == 1:
        return
    dims = [(view.page_stride, view.num_slots // g.page_size), (view.token_stride, g.page_size)]
    dims = sorted((stride, count) for stride, count in [*dims, (view.head_stride, g.num_heads)] if count > 1)
    bases = view.bases
    half, layer = int(bases[-1, 0]) - int(bases[0, 0]), int(bases[0, min(1, g.num_layers - 1)]) - int(bases[0, 0])
    halves = np.arange(g.halves, dtype=np.uint64) * np.uint64(half % 2**64)
    layers = np.arange(g.num_layers, dtype=np.uint64) * np.uint64(layer % 2**64)
    if np.array_equal(bases - bases[0, 0], halves[:, None] + layers):
        both = ((abs(half), g.halves), (abs(layer), g.num_layers))
        if _nests([*dims, *(dim for dim in both if dim[1] > 1)], g.head_bytes):
            return
    ordered = np.sort(bases, axis=None)
    reach = min(g.head_bytes + sum((count - 1) * stride for stride, count in dims), 2**62)
    for apart in range(1, len(ordered)):
        distance = np.minimum(ordered[apart:] - ordered[:-apart], np.uint64(2**62)).astype(np.int64)
        if int(distance.min()) >= reach:
            return
        hit = np.flatnonzero(_touch(distance, dims, g.head_bytes))
        if hit.size:
            a, b = int(ordered[hit[0]]), int(ordered[hit[0] + apart])
            raise InvalidArgumentError(f"two layers or halves of {side} overlap: those at {a:#x} and {b:#x}")


def _nests(dims: list[tuple[int, int]], part_bytes: int) -> bool:
    """Whether every step is beyond all that the smaller ones reach: then no two parts share a byte."""
    extent = part_bytes
    for stride, count in sorted(dims):
        if stride < extent:
            return False
        extent += (count - 1) * stride
    return True


def _touch(distance: npt.NDArray[np.int64], dims: list[tuple[int, int]], part_bytes: int) -> npt.NDArray[np.bool_]:
    """Whether two grids of parts share a byte, the second ``distance`` bytes from the first: exact, for dims that nest.

    The inner dimensions reach less far than a step of the outermost, so only the two nearest multiples of it can do.
    """
    if not dims:
        return np.abs(distance) < part_bytes
    (stride, count), inner = dims[-1], dims[:-1]
    nearest = distance // stride
    found = np.zeros(len(distance), np.bool_)
    for steps in (nearest, nearest + 1):
        found |= (np.abs(steps) < count) & _touch(distance - steps * stride, inner, part_bytes)
    return found


def _integers(name: str, given: Any) -> Ids:
    try:
        ids = np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:  # in a GPU's memory, ragged, with a gradient
        where = getattr(given, "device", None)
        kind = type(given).__name__ + ("" if where is None else f" on {where}")
        raise ArgumentTypeError(
            f"{name} is a 1-d array of int32 or int64 in host memory, not a {kind} ({error})"
        ) from error
    if ids.size == 0 and not isinstance(given, np.ndarray):
        ids = ids.astype(np.int64)
    if ids.ndim != 1 or ids.dtype not in (np.int32, np.int64):
        raise ArgumentTypeError(f"{name} is a 1-d array of int32 or int64, not {ids.ndim}-d {ids.dtype}")
    contiguous: Ids = np.ascontiguousarray(ids)
    return contiguous


def _check_ids(name: str, given: Any, num_pages: int) -> Ids:
    ids = _integers(name, given)
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= num_pages):
        wrong = ids[(ids < 0) | (ids >= num_pages)][0]
        raise InvalidArgumentError(f"{name} has page {wrong}, and the pool has {num_pages}")
    return ids


def reach_of(geometry: KVGeometry, view: KVView) -> int:
    """Bytes from a base of a checked view to the end of all that lies behind it."""
    g = geometry
    last = (view.num_slots // g.page_size - 1) * view.page_stride + (g.page_size - 1) * view.token_stride
    return last + (g.num_heads - 1) * view.head_stride + g.head_bytes


def _extent(g: KVGeometry, view: KVView, layers: range) -> tuple[int, int]:
    """First and one past last address that a view may reach in these layers."""
    bases = view.bases[:, layers.start : layers.stop]
    return int(bases.min()), int(bases.max()) + reach_of(g, view)


def overlap_of(plan: CopyPlan) -> Overlap:
    """How the two views of a plan may share bytes, whatever its pages.

    Returns: "none": their addresses are apart; "pages": they are one pool, equal page ids are equal bytes; "bytes": the
    views reach into each other in some other way.
    """
    g, src, dst = plan.geometry, plan.src, plan.dst
    if src.device != dst.device:
        return "none"
    (src_first, src_end), (dst_first, dst_end) = (_extent(g, view, plan.layers) for view in (src, dst))
    if src_end <= dst_first or dst_end <= src_first:
        return "none"
    same = (src.page_stride, src.token_stride, src.head_stride) == (dst.page_stride, dst.token_stride, dst.head_stride)
    part = slice(plan.layers.start, plan.layers.stop)
    return "pages" if same and np.array_equal(src.bases[:, part], dst.bases[:, part]) else "bytes"


def _check_overlap(plan: CopyPlan) -> None:
    """No byte is both read and written: threads copy in any order. Raises: InvalidArgumentError.

    1. Address ranges of the two pools apart: done. 2. The same view: pages must differ. 3. Else run by run.
    """
    overlap = overlap_of(plan) if plan.num_pages else "none"
    if overlap == "none":
        return
    if overlap == "pages":
        both = np.intersect1d(plan.src_pages, plan.dst_pages)
        if both.size:
            raise InvalidArgumentError(f"page {both[0]} is both source and destination within one pool")
        return
    from .loops import expand, loops_of  # which describe a plan, and so import this module

    runs = expand(loops_of(plan))
    order = np.argsort(runs.dst)
    starts, ends = runs.dst[order], (runs.dst + runs.num_bytes)[order]
    # dst runs are disjoint: of those that start before a src run ends, only the last can reach into it
    at = np.searchsorted(starts, runs.src + runs.num_bytes, side="left").astype(np.int64) - 1
    hit = (at >= 0) & (ends[np.maximum(at, 0)] > runs.src)
    if hit.any():
        i = int(np.flatnonzero(hit)[0])
        raise InvalidArgumentError(
            f"source bytes {int(runs.src[i]):#x} + {int(runs.num_bytes[i])} are written by the same copy"
        )
