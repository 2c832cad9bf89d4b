"""From a checked copy to kernel launches: which kernel, which grid, and the parameters of kernels/params.h.

    CopyPlan --launches_of--> [Launch] --bind(addresses)--> params, ready for cuLaunchKernel or the host simulator

Three families, each for any two views:
    copy      lanes move vectors straight across; a unit is a chunk of a run that is contiguous on both sides
    relayout  tiles through shared memory, for layouts that share only short runs
    bulk      copy by the bulk engine of sm_90, where everything is a multiple of 16 bytes
Nothing here touches a device: addresses are numbers.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

import numpy as np

from ..errors import InvalidArgumentError
from ..pool.layout import KVView, contiguous_dims
from .plan import CopyPlan, Ids

__all__ = [
    "BULK_SLOT_BYTES",
    "DEFAULT_CTAS",
    "LOCAL_CTAS",
    "TILE_BYTES",
    "VECTOR_BYTES",
    "Addresses",
    "CopyParams",
    "Family",
    "Launch",
    "RelayoutParams",
    "common_ids",
    "first_of_run",
    "launches_of",
    "layer_launches",
    "vector_bytes_of",
]

Family: TypeAlias = Literal["auto", "copy", "relayout", "bulk"]

VECTOR_BYTES = (16, 8, 4, 2, 1)
VECS_IN_FLIGHT = 8  # RKV_COPY_VECS_IN_FLIGHT: a thread's registers between loads and stores, over both halves
TILE_BYTES = 32768  # RKV_TILE_BYTES
RELAYOUT_BLOCK = 512  # threads: with 4 vectors of 16 bytes each, a whole tile is in flight
BULK_SLOT_BYTES = 4096  # RKV_BULK_SLOT_BYTES
MAX_UNITS = 2**31 - 1  # what rkv_split can divide
MAX_GRID = 1 << 16  # far beyond any GPU; kernels count threads in 32 bits, and 2^23 blocks of 512 make a step of 0
DEFAULT_CTAS = 4  # of a copy over the link to the host
LOCAL_CTAS = 32  # of a copy within the device, whose memory needs more bytes in flight (docs/kernels.md)
REQUEST_BYTES = 128  # what one request of an SM carries: runs shorter than this waste the rest

_LAYER, _TOKEN, _HEAD = range(3)
_Triple: TypeAlias = tuple[int, int, int]


class Div(ctypes.Structure):
    """rkv_div: n // divisor for n < 2**31 by a multiplication."""

    _fields_ = (("divisor", ctypes.c_uint32), ("magic", ctypes.c_uint32), ("shift", ctypes.c_uint32))

    @classmethod
    def by(cls, divisor: int) -> Div:
        shift = 31 + (divisor - 1).bit_length()
        return cls(divisor, (1 << shift) // divisor + 1, shift)


class Side(ctypes.Structure):
    """rkv_side."""

    _fields_ = (
        ("bases", ctypes.c_uint64),
        ("pages", ctypes.c_uint64),
        ("first_page", ctypes.c_int64),
        ("page_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
    )


class CopyParams(ctypes.Structure):
    """rkv_copy_params."""

    _fields_ = (
        ("src", Side),
        ("dst", Side),
        ("num_units", ctypes.c_uint32),
        ("base_pitch", ctypes.c_uint32),
        ("first_layer", ctypes.c_uint32),
        ("run_vecs", ctypes.c_uint32),
        ("chunk_vecs", ctypes.c_uint32),
        ("lanes_log2", ctypes.c_uint32),
        ("chunks", Div),
        ("heads", Div),
        ("tokens", Div),
        ("layers", Div),
    )


class Walk(ctypes.Structure):
    """rkv_walk."""

    _fields_ = (("dims", ctypes.c_uint32 * 3), ("first", Div), ("second", Div))


class RelayoutParams(ctypes.Structure):
    """rkv_relayout_params."""

    _fields_ = (
        ("src", Side),
        ("dst", Side),
        ("num_tiles", ctypes.c_uint32),
        ("base_pitch", ctypes.c_uint32),
        ("first_layer", ctypes.c_uint32),
        ("cell_vecs", ctypes.c_uint32),
        ("tile_vecs", ctypes.c_uint32),
        ("extent", ctypes.c_uint32 * 3),
        ("tile", ctypes.c_uint32 * 3),
        ("tile_step", ctypes.c_uint32 * 3),
        ("vecs", Div),
        ("blocks", Div * 3),
        ("halves", Div),
        ("src_walk", Walk),
        ("dst_walk", Walk),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where a backend put the tables of one plan, as the kernels will read them.

    Args:
        src_bases, dst_bases: of uint64 [halves, L].
        src_pages, dst_pages: of the ids of ``common_ids``, [num_pages]; 0 where ``first_of_run`` finds a run.
    """

    src_bases: int
    dst_bases: int
    src_pages: int
    dst_pages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One kernel launch, all but the addresses of its tables.

    Attributes:
        kernel: the extern "C" name.
        grid, block: blocks, and threads a block; both one-dimensional.
        params: with bases and pages still 0.
        first_page, num_pages: the part of the plan's page lists that this launch copies.
        index_bytes: 4 or 8, of a page id.
    """

    kernel: str
    grid: int
    block: int
    params: CopyParams | RelayoutParams
    first_page: int
    num_pages: int
    index_bytes: int

    def bind(self, addresses: Addresses) -> CopyParams | RelayoutParams:
        """A copy of the parameters with the tables' addresses in them."""
        bound = type(self.params).from_buffer_copy(self.params)
        skip = self.first_page * self.index_bytes
        for side, bases, pages in (
            (bound.src, addresses.src_bases, addresses.src_pages),
            (bound.dst, addresses.dst_bases, addresses.dst_pages),
        ):
            side.bases = bases
            side.pages = pages + skip if pages else 0
        return bound

    def of_layer(self, layer: int) -> Launch:
        """The launch of one layer, for another one."""
        params = type(self.params).from_buffer_copy(self.params)
        params.first_layer = layer
        return replace(self, params=params)


def common_ids(plan: CopyPlan) -> tuple[Ids, Ids]:
    """Both page lists in one dtype, the wider of the two; the kernels take one."""
    if plan.src_pages.dtype == plan.dst_pages.dtype:
        return plan.src_pages, plan.dst_pages
    return plan.src_pages.astype(np.int64), plan.dst_pages.astype(np.int64)


def first_of_run(ids: Ids) -> int | None:
    """The first id if they are first, first + 1, .., so that no kernel need read them; else None. O(n)."""
    if not len(ids) or int(ids[-1]) - int(ids[0]) != len(ids) - 1:
        return None
    return int(ids[0]) if bool((ids[1:] > ids[:-1]).all()) else None


def vector_bytes_of(plan: CopyPlan, run_bytes: int, runs_a_token: int, runs_a_page: int) -> int:
    """The widest vector in bytes that divides the run, and every base and stride that the copy steps by."""
    bits = run_bytes
    part = slice(plan.layers.start, plan.layers.stop)
    for view in (plan.src, plan.dst):
        bits |= int(np.bitwise_or.reduce(view.bases[:, part], axis=None))
        if view.num_slots > plan.geometry.page_size:
            bits |= view.page_stride
        if runs_a_page > 1:
            bits |= view.token_stride
        if runs_a_token > 1:
            bits |= view.head_stride
    return min(VECTOR_BYTES[0], bits & -bits)


def launches_of(
    plan: CopyPlan, *, family: Family = "auto", ctas: int = DEFAULT_CTAS, vector_bytes: int | None = None
) -> list[Launch]:
    """The launches that do a plan, in any order; none for no pages.

    Args:
        family: "auto" takes relayout where the layouts share less than 128 contiguous bytes and tiles have longer runs
            on both sides, else copy. bulk is never taken unasked.
        ctas: quota of blocks, so that the copy leaves the other SMs to the model.
        vector_bytes: narrower than what the alignment allows, for measurements; None: the widest.
    Raises: InvalidArgumentError for a family that cannot do this plan, a vector that is misaligned, no quota.
    """
    if family not in get_args(Family):
        raise InvalidArgumentError(f"unknown kernel family {family!r}; one of {', '.join(get_args(Family))}")
    if ctas < 1:
        raise InvalidArgumentError(f"a quota of {ctas} blocks copies nothing")
    if not plan.num_pages:
        return []
    if family == "auto":
        family = "relayout" if _staging_pays(plan) else "copy"
    if family == "relayout":
        return _relayout_launches(plan, ctas, vector_bytes)
    return _copy_launches(plan, family == "bulk", ctas, vector_bytes)


def layer_launches(plan: CopyPlan, *, family: Family = "auto", ctas: int = DEFAULT_CTAS) -> list[list[Launch]]:
    """``launches_of`` each layer of a plan by itself.

    Layers differ in their bases alone, so that one layer's launches serve all where bases are aligned alike, as those
    of a pool are.
    """
    if not plan.num_pages:
        return [[] for _ in plan.layers]
    first = launches_of(plan.layer(plan.layers.start), family=family, ctas=ctas)
    part = slice(plan.layers.start, plan.layers.stop)
    shifts = [view.bases[:, part] % np.uint64(VECTOR_BYTES[0]) for view in (plan.src, plan.dst)]
    if all((shift == shift[:, :1]).all() for shift in shifts):
        return [first, *([launch.of_layer(layer) for launch in first] for layer in plan.layers[1:])]
    rest = (launches_of(plan.layer(layer), family=family, ctas=ctas) for layer in plan.layers[1:])
    return [first, *rest]


def _choose_vector(plan: CopyPlan, dims: _Triple, asked: int | None) -> int:
    widest = vector_bytes_of(plan, *dims)
    if asked is None:
        return widest
    if asked not in VECTOR_BYTES or asked > widest:
        raise InvalidArgumentError(f"vectors of {asked} bytes: bases, strides and runs allow {widest} at most")
    return asked


def _copy_launches(plan: CopyPlan, bulk: bool, ctas: int, asked: int | None) -> list[Launch]:
    """One launch, or several over parts of the pages where units would not fit 31 bits."""
    g = plan.geometry
    dims = contiguous_dims(g, plan.src, plan.dst)
    run_bytes, heads, tokens = dims
    vector = _choose_vector(plan, dims, asked)
    if bulk and vector != 16:
        raise InvalidArgumentError(f"bulk copies take multiples of 16 bytes; bases, strides and runs allow {vector}")
    run_vecs = run_bytes // vector
    # As many lanes as a run has vectors, so that neighbouring lanes read neighbouring bytes.
    lanes_log2 = min(5, (run_vecs - 1).bit_length())
    chunk_vecs = BULK_SLOT_BYTES // vector if bulk else (VECS_IN_FLIGHT // g.halves) << lanes_log2
    chunk_vecs = min(chunk_vecs, run_vecs)
    chunks = -(-run_vecs // chunk_vecs)
    units_a_page = chunks * heads * tokens * len(plan.layers)
    if units_a_page > MAX_UNITS:
        raise InvalidArgumentError(f"a page of {units_a_page} units; at most {MAX_UNITS}")
    src_ids, dst_ids = common_ids(plan)
    bits = src_ids.itemsize * 8
    kernel = f"rkv_bulk_{g.kind}_i{bits}" if bulk else f"rkv_copy_{g.kind}_v{vector}_i{bits}"
    block = 32 if bulk else 512
    units_a_block = 1 if bulk else block >> lanes_log2
    launches = []
    for first, count in _parts(plan.num_pages, units_a_page):
        units = count * units_a_page
        params = CopyParams(
            src=_side(plan.src, src_ids, first),
            dst=_side(plan.dst, dst_ids, first),
            num_units=units,
            base_pitch=g.num_layers,
            first_layer=plan.layers.start,
            run_vecs=run_vecs,
            chunk_vecs=chunk_vecs,
            lanes_log2=lanes_log2,
            chunks=Div.by(chunks),
            heads=Div.by(heads),
            tokens=Div.by(tokens),
            layers=Div.by(len(plan.layers)),
        )
        grid = min(ctas, MAX_GRID, -(-units // units_a_block))
        launches.append(_launch(kernel, grid, block, params, first, count, src_ids.itemsize))
    return launches


def _launch(
    kernel: str, grid: int, block: int, params: CopyParams | RelayoutParams, first: int, count: int, index_bytes: int
) -> Launch:
    return Launch(
        kernel=kernel,
        grid=grid,
        block=block,
        params=params,
        first_page=first,
        num_pages=count,
        index_bytes=index_bytes,
    )


def _parts(num_pages: int, units_a_page: int) -> list[tuple[int, int]]:
    """(first page, pages) of each launch."""
    most = MAX_UNITS // units_a_page
    return [(first, min(most, num_pages - first)) for first in range(0, num_pages, most)]


def _side(view: KVView, ids: Ids, first: int) -> Side:
    run = first_of_run(ids)
    return Side(
        first_page=0 if run is None else run + first,
        page_stride=view.page_stride,
        token_stride=view.token_stride,
        head_stride=view.head_stride,
    )


# ------------------------------------------------------------------------------------------------------------ relayout


@dataclass(frozen=True, slots=True)
class _Tile:
    """What one block of threads stages: cells along (layer, token, head), and each side's order, fastest first."""

    cells: _Triple
    src_order: _Triple
    dst_order: _Triple
    src_run: int  # cells that are contiguous on the source within a tile
    dst_run: int


def _steps(plan: CopyPlan, view: KVView) -> _Triple:
    """Bytes from one layer, token, head to the next; layers without one step count as far apart."""
    part = view.bases[:, plan.layers.start : plan.layers.stop].astype(np.int64)
    apart = np.diff(part, axis=1)
    layer = int(apart.flat[0]) if apart.size and (apart == apart.flat[0]).all() else 0
    return (layer if layer > 0 else 2**62, view.token_stride, view.head_stride)


def _order(steps: _Triple, extent: _Triple) -> _Triple:
    """Dimensions by rising step; those of extent 1 last, for their step means nothing."""
    a, b, c = sorted(range(3), key=lambda dim: (extent[dim] == 1, steps[dim], dim))
    return a, b, c


def _run(cells: list[int], steps: _Triple, extent: _Triple, order: _Triple, cell_bytes: int) -> int:
    """Cells that follow each other in memory, of a tile of ``cells``, in a side's order."""
    run = 1
    for dim in order:
        if extent[dim] > 1 and steps[dim] != run * cell_bytes:
            break
        run *= cells[dim]
        if cells[dim] < extent[dim]:
            break
    return run


def _tile_of(plan: CopyPlan) -> _Tile:
    """Grow a tile until shared memory is full: each time for the side whose run is shorter, along its fastest dimension
    that is not whole yet."""
    g = plan.geometry
    most = TILE_BYTES // g.head_bytes
    if not most:
        raise InvalidArgumentError(f"a head of {g.head_bytes} bytes does not fit a tile of {TILE_BYTES}")
    extent = (len(plan.layers), g.page_size, g.num_heads)
    steps = (_steps(plan, plan.src), _steps(plan, plan.dst))
    orders = (_order(steps[0], extent), _order(steps[1], extent))
    cells = [1, 1, 1]

    def run(side: int) -> int:
        return _run(cells, steps[side], extent, orders[side], g.head_bytes)

    while True:
        for side in sorted((0, 1), key=run):
            unfinished = [dim for dim in orders[side] if cells[dim] < extent[dim]]
            if not unfinished:
                continue
            dim = unfinished[0]
            others = cells[0] * cells[1] * cells[2] // cells[dim]
            wider = min(2 * cells[dim], extent[dim], most // others)
            if wider > cells[dim]:
                cells[dim] = wider
                break
        else:
            return _Tile((cells[0], cells[1], cells[2]), orders[0], orders[1], run(0), run(1))


def _staging_pays(plan: CopyPlan) -> bool:
    run_bytes, _, _ = contiguous_dims(plan.geometry, plan.src, plan.dst)
    if run_bytes >= REQUEST_BYTES:
        return False
    tile = _tile_of(plan)
    return min(tile.src_run, tile.dst_run) * plan.geometry.head_bytes >= 2 * run_bytes


def _walk(order: _Triple, cells: _Triple) -> Walk:
    dims = (ctypes.c_uint32 * 3)(*order)
    return Walk(dims=dims, first=Div.by(cells[order[0]]), second=Div.by(cells[order[1]]))


def _relayout_launches(plan: CopyPlan, ctas: int, asked: int | None) -> list[Launch]:
    g = plan.geometry
    tile = _tile_of(plan)
    vector = _choose_vector(plan, (g.head_bytes, g.num_heads, g.page_size), asked)
    cell_vecs = g.head_bytes // vector
    extent = (len(plan.layers), g.page_size, g.num_heads)
    blocks = [-(-whole // part) for whole, part in zip(extent, tile.cells, strict=True)]
    step = [0, 0, 0]
    cells = 1
    for dim in tile.src_order:
        step[dim] = cells
        cells *= tile.cells[dim]
    tiles_a_page = g.halves * blocks[0] * blocks[1] * blocks[2]
    if tiles_a_page > MAX_UNITS:
        raise InvalidArgumentError(f"a page of {tiles_a_page} tiles; at most {MAX_UNITS}")
    src_ids, dst_ids = common_ids(plan)
    triple = ctypes.c_uint32 * 3
    launches = []
    for first, count in _parts(plan.num_pages, tiles_a_page):
        params = RelayoutParams(
            src=_side(plan.src, src_ids, first),
            dst=_side(plan.dst, dst_ids, first),
            num_tiles=count * tiles_a_page,
            base_pitch=g.num_layers,
            first_layer=plan.layers.start,
            cell_vecs=cell_vecs,
            tile_vecs=cells * cell_vecs,
            extent=triple(*extent),
            tile=triple(*tile.cells),
            tile_step=triple(*step),
            vecs=Div.by(cell_vecs),
            blocks=(Div * 3)(*(Div.by(count) for count in blocks)),
            halves=Div.by(g.halves),
            src_walk=_walk(tile.src_order, tile.cells),
            dst_walk=_walk(tile.dst_order, tile.cells),
        )
        kernel = f"rkv_relayout_v{vector}_i{src_ids.itemsize * 8}"
        grid = min(ctas, MAX_GRID, params.num_tiles)
        launches.append(_launch(kernel, grid, RELAYOUT_BLOCK, params, first, count, src_ids.itemsize))
    return launches
