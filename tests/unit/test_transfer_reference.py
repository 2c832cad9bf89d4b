"""transfer/reference.py against itself said in two ways, and against numpy's own indexing; plan.py and loops.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radixkv.errors import ArgumentTypeError, InvalidArgumentError, PageOwnershipError, RadixKVError
from radixkv.pool.layout import LAYOUTS, KVGeometry, KVView, Layout, view_of_layout
from radixkv.transfer.loops import expand, loops_of
from radixkv.transfer.plan import pages_of_slots, plan_copy, staging_view
from radixkv.transfer.reference import address_of, copy_layouts, copy_views, offset_of

from .transfer_kit import INDICES, PAGES, SHAPES, HostPool, geometry, shape_name

# Axes of a block as an array, outermost first: how kernels.md draws each layout.
AXES: dict[Layout, str] = {
    "layer_first": "LSTHD",
    "page_first": "STLHD",
    "page_first_direct": "SLTHD",
    "page_head": "SHTLD",
}


def as_array(pool: HostPool, half: int) -> Any:
    """A block with axes page, layer, token, head, byte."""
    g = pool.geometry
    size = {"S": pool.num_pages, "L": g.num_layers, "T": g.page_size, "H": g.num_heads, "D": g.head_bytes}
    axes = AXES[pool.layout]
    return pool.blocks[half].reshape([size[axis] for axis in axes]).transpose([axes.index(axis) for axis in "SLTHD"])


@pytest.mark.parametrize("g", SHAPES, ids=shape_name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_offsets_are_those_of_an_array_with_the_layouts_axes(layout: Layout, g: KVGeometry) -> None:
    pool = HostPool.make(g, layout, 2, seed=1)
    array = as_array(pool, 0)
    rng = np.random.default_rng(2)
    for _ in range(50):
        page, layer, token, head = (int(rng.integers(n)) for n in (2, g.num_layers, g.page_size, g.num_heads))
        slot = page * g.page_size + token
        offset = offset_of(layout, g, 2 * g.page_size, layer, slot, head)
        assert np.array_equal(pool.blocks[0][offset : offset + g.head_bytes], array[page, layer, token, head])
        assert address_of(g, pool.view, 0, layer, slot, head) == pool.blocks[0].ctypes.data + offset


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("dst_layout", LAYOUTS)
@pytest.mark.parametrize("src_layout", LAYOUTS)
def test_both_oracles_and_numpy_agree(src_layout: Layout, dst_layout: Layout, name: str) -> None:
    g = geometry()
    src_pages, dst_pages = INDICES[name]
    src = HostPool.make(g, src_layout, PAGES, seed=3)
    by_formula, by_view, by_numpy = (HostPool.make(g, dst_layout, PAGES) for _ in range(3))
    copy_layouts(g, src_layout, src.blocks, dst_layout, by_formula.blocks, src_pages, dst_pages)
    copy_views(plan_copy(g, src.view, by_view.view, src_pages, dst_pages))
    for half in range(g.halves):
        as_array(by_numpy, half)[dst_pages] = as_array(src, half)[src_pages]
    assert np.array_equal(by_formula.whole, by_numpy.whole)
    assert np.array_equal(by_view.whole, by_numpy.whole)
    assert (name == "empty") == np.array_equal(by_view.whole, HostPool.make(g, dst_layout, PAGES).whole)


def test_only_the_layers_of_the_plan_move() -> None:
    g = geometry(layers=4)
    src, dst = HostPool.make(g, "page_head", 2, seed=4), HostPool.make(g, "layer_first", 2)
    copy_views(plan_copy(g, src.view, dst.view, [0, 1], [1, 0], range(1, 3)))
    expected = HostPool.make(g, "layer_first", 2)
    for half in range(2):
        as_array(expected, half)[[1, 0], 1:3] = as_array(src, half)[:, 1:3]
    assert np.array_equal(dst.whole, expected.whole)
    copy_views(plan_copy(g, src.view, dst.view, [0, 1], [1, 0]).layer(3))
    for half in range(2):
        as_array(expected, half)[[1, 0], 3] = as_array(src, half)[:, 3]
    assert np.array_equal(dst.whole, expected.whole)


def test_a_staging_page_is_one_object() -> None:
    g = geometry(layers=2, heads=3, page_size=4)
    src = HostPool.make(g, "page_first", 5, seed=5)
    buffer = np.zeros((2, g.page_bytes), np.uint8)
    copy_views(plan_copy(g, src.view, staging_view(g, buffer.ctypes.data, 2), [4, 1], [0, 1]))
    for row, page in enumerate((4, 1)):
        halves = [np.ascontiguousarray(as_array(src, half)[page]).ravel() for half in range(2)]
        assert np.array_equal(buffer[row], np.concatenate(halves))


# ---- loops ----
@pytest.mark.parametrize("outer_layers", [False, True])
@pytest.mark.parametrize("g", SHAPES, ids=shape_name)
def test_loops_cover_every_byte_once_and_pair_it_rightly(g: KVGeometry, outer_layers: bool) -> None:
    for src_layout in LAYOUTS:
        for dst_layout in LAYOUTS:
            src, dst = HostPool.make(g, src_layout, PAGES), HostPool.make(g, dst_layout, PAGES)
            plan = plan_copy(g, src.view, dst.view, *INDICES["runs"])
            loops = loops_of(plan, outer_layers)
            runs = expand(loops)
            assert int(runs.num_bytes.sum()) == plan.total_bytes == loops.num_runs * loops.run_bytes
            assert len(loops.src) <= 5
            where = {}
            for half in range(g.halves):
                for layer in range(g.num_layers):
                    for src_page, dst_page in zip(*INDICES["runs"], strict=True):
                        a = address_of(g, src.view, half, layer, src_page * g.page_size, 0)
                        b = address_of(g, dst.view, half, layer, dst_page * g.page_size, 0)
                        where[b] = a
            starts = np.sort(runs.dst)
            order = np.argsort(runs.dst)
            for b, a in where.items():
                run = order[np.searchsorted(starts, np.uint64(b), side="right") - 1]
                assert int(runs.src[run]) + b - int(runs.dst[run]) == a
                assert b + g.head_bytes <= int(runs.dst[run]) + int(runs.num_bytes[run])


@pytest.mark.parametrize(("src", "dst", "run_bytes"), [
    ("layer_first", "layer_first", 4 * 2 * 24),
    ("layer_first", "page_first", 2 * 24),
    ("layer_first", "page_first_direct", 4 * 2 * 24),
    ("page_first_direct", "page_first_direct", 3 * 4 * 2 * 24),
    ("page_first", "page_first", 3 * 4 * 2 * 24),
    ("page_head", "page_head", 3 * 4 * 2 * 24),
    ("page_head", "page_first", 24),
    ("layer_first", "page_head", 24),
])  # fmt: skip
def test_runs_are_as_long_as_both_layouts_allow(src: Layout, dst: Layout, run_bytes: int) -> None:
    g = geometry()
    a, b = HostPool.make(g, src, PAGES), HostPool.make(g, dst, PAGES)
    assert loops_of(plan_copy(g, a.view, b.view, *INDICES["random"])).run_bytes == run_bytes
    assert loops_of(plan_copy(g, b.view, a.view, *INDICES["random"])).run_bytes == run_bytes


@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_layers_come_one_after_the_other_for_a_reader(kind: Any) -> None:
    g = geometry(kind, layers=4)
    a, b = HostPool.make(g, "page_first", PAGES), HostPool.make(g, "page_first_direct", PAGES)
    loops = loops_of(plan_copy(g, a.view, b.view, *INDICES["random"], range(1, 4)), outer_layers=True)
    assert loops.steps_per_layer == g.halves
    bases = np.uint64(loops.src_base) + loops.src[0], np.uint64(loops.dst_base) + loops.dst[0]
    for table, view in zip(bases, (a.view, b.view), strict=True):
        assert np.array_equal(table.reshape(3, g.halves), view.bases[:, 1:].T)
    assert loops_of(plan_copy(g, a.view, b.view, [0], [0])).steps_per_layer == 0


def test_consecutive_pages_are_one_run_and_sorting_finds_them() -> None:
    g = geometry(layers=2)
    a, b = HostPool.make(g, "layer_first", PAGES), HostPool.make(g, "layer_first", PAGES)
    plan = plan_copy(g, a.view, b.view, *INDICES["contiguous"])
    page = g.page_size * g.row_bytes
    assert expand(loops_of(plan)).num_bytes.tolist() == [4 * page] * (g.halves * 2)
    backwards = plan_copy(g, a.view, b.view, [5, 4, 3], [2, 1, 0])
    assert expand(loops_of(backwards)).num_bytes.tolist() == [page] * (g.halves * 2 * 3)
    assert expand(loops_of(backwards, sort_pages=True)).num_bytes.tolist() == [3 * page] * (g.halves * 2)


@settings(max_examples=200)
@given(st.data())
def test_no_run_spans_a_boundary(data: st.DataObject) -> None:
    """Chunks of page-locked memory on either side: the same bytes in the same order, in more runs."""
    g = geometry("mla", layers=2, head_bytes=8, page_size=2)
    a, b = HostPool.make(g, data.draw(st.sampled_from(LAYOUTS)), PAGES), HostPool.make(g, "layer_first", PAGES)
    ids = data.draw(st.sampled_from([INDICES[name] for name in INDICES]))

    def seams(pool: HostPool) -> tuple[int, ...]:
        size = len(pool.blocks[0])
        places = st.lists(st.integers(-9, size + 9), max_size=6, unique=True)
        return tuple(int(pool.view.bases.min()) + at for at in sorted(data.draw(places)))

    src, dst = (replace(pool.view, boundaries=seams(pool)) for pool in (a, b))
    whole = expand(loops_of(plan_copy(g, a.view, b.view, *ids), sort_pages=True))
    cut = expand(loops_of(plan_copy(g, src, dst, *ids), sort_pages=True))

    def bytes_of(runs: Any) -> list[tuple[int, int]]:
        return [(s + i, d + i) for s, d, n in zip(*(part.tolist() for part in runs), strict=True) for i in range(n)]

    assert bytes_of(cut) == bytes_of(whole)
    for starts, boundaries in ((cut.src, src.boundaries), (cut.dst, dst.boundaries)):
        for start, size in zip(starts.tolist(), cut.num_bytes.tolist(), strict=True):
            assert size > 0
            assert not any(start < seam < start + size for seam in boundaries)
    seams_of = {side: set(view.boundaries) for side, view in (("src", src), ("dst", dst))}
    for i in range(1, len(cut.src)):  # cut nowhere else
        follows = cut.src[i] == cut.src[i - 1] + cut.num_bytes[i - 1] and cut.dst[i] == (
            cut.dst[i - 1] + cut.num_bytes[i - 1]
        )
        assert not follows or int(cut.src[i]) in seams_of["src"] or int(cut.dst[i]) in seams_of["dst"]


def test_short_runs_stay_within_a_page_that_shares_their_lines() -> None:
    """Load back of 16-byte rows: pages outside layers; a line and more: layers outside, writes go forward."""
    for head_bytes, lengths in ((16, [4, 8, 3]), (64, [8, 4, 3])):
        g = geometry("mla", layers=8, head_bytes=head_bytes, page_size=3)
        host, device = HostPool.make(g, "page_first", PAGES), HostPool.make(g, "layer_first", PAGES)
        loops = loops_of(plan_copy(g, host.view, device.view, *INDICES["random"]))
        assert [len(table) for table in loops.src] == lengths


def test_separate_tensors_a_layer_are_covered() -> None:
    g = geometry(layers=3)
    rng = np.random.default_rng(6)
    tensors = [rng.integers(0, 256, PAGES * g.page_size * g.row_bytes, np.uint8) for _ in range(2 * 3)]
    bases = np.array([t.ctypes.data for t in tensors], np.uint64).reshape(2, 3)
    device = KVView(
        bases=bases,
        page_stride=g.page_size * g.row_bytes,
        token_stride=g.row_bytes,
        head_stride=g.head_bytes,
        num_slots=PAGES * g.page_size,
    )
    for layout in LAYOUTS:
        host, expected = HostPool.make(g, layout, PAGES), HostPool.make(g, layout, PAGES)
        plan = plan_copy(g, device, host.view, *INDICES["random"])
        for outer in (False, True):
            assert int(expand(loops_of(plan, outer)).num_bytes.sum()) == plan.total_bytes
        copy_views(plan)
        for half in range(2):
            for layer in range(3):
                pages = tensors[half * 3 + layer].reshape(PAGES, g.page_size, g.num_heads, g.head_bytes)
                as_array(expected, half)[INDICES["random"][1], layer] = pages[INDICES["random"][0]]
        assert np.array_equal(host.whole, expected.whole)


# ---- what is refused ----
def views(g: KVGeometry) -> tuple[KVView, KVView]:
    return (
        view_of_layout("layer_first", g, 8 * g.page_size, [1 << 20, 1 << 24]),
        view_of_layout("page_first", g, 6 * g.page_size, [1 << 28, 1 << 29]),
    )


@pytest.mark.parametrize(("src_pages", "dst_pages", "error", "words"), [
    ([0, 1], [1], InvalidArgumentError, "2 source pages for 1 destination"),
    ([8], [0], InvalidArgumentError, "src_pages has page 8, and the pool has 8"),
    ([0], [6], InvalidArgumentError, "dst_pages has page 6, and the pool has 6"),
    ([-1], [0], InvalidArgumentError, "src_pages has page -1"),
    ([0], [-(2**40)], InvalidArgumentError, "dst_pages has page -1099511627776"),
    ([0, 1], [3, 3], PageOwnershipError, "destination page 3 is given twice"),
    (np.zeros(1), [0], ArgumentTypeError, "not 1-d float64"),
    (np.zeros(1, np.uint64), [0], ArgumentTypeError, "not 1-d uint64"),
    (np.zeros((1, 1), np.int32), [0], ArgumentTypeError, "not 2-d int32"),
    (np.zeros(0, np.float32), [], ArgumentTypeError, "not 1-d float32"),
    ([True], [0], ArgumentTypeError, "not 1-d bool"),
])  # fmt: skip
def test_pages_are_checked(src_pages: Any, dst_pages: Any, error: type[RadixKVError], words: str) -> None:
    g = geometry()
    with pytest.raises(error, match=words):
        plan_copy(g, *views(g), src_pages, dst_pages)


def test_pages_that_numpy_cannot_read_are_refused_by_type() -> None:
    """As on a GPU, where waiting for them is the caller's choice."""
    torch = pytest.importorskip("torch")
    g = geometry()
    for ids, words in (
        (torch.empty(1, dtype=torch.int64, device="meta"), "in host memory, not a Tensor on meta"),
        (torch.zeros(1, requires_grad=True), "not a Tensor on cpu"),
        ([[1], [2, 3]], "not a list"),
    ):
        with pytest.raises(ArgumentTypeError, match=f"src_pages is a 1-d array of int32 or int64 .*{words}"):
            plan_copy(g, *views(g), ids, [0])
        with pytest.raises(ArgumentTypeError, match="slots is a 1-d array"):
            pages_of_slots(ids, 4)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_both_widths_of_ids_are_kept(dtype: Any) -> None:
    g = geometry()
    plan = plan_copy(g, *views(g), np.array([7, 0], dtype), np.array([[5, 9], [4, 9]], dtype)[:, 0])
    assert plan.src_pages.dtype == plan.dst_pages.dtype == dtype
    assert plan.dst_pages.flags.c_contiguous
    assert plan.total_bytes == 2 * g.page_bytes


@pytest.mark.parametrize("layers", [range(0), range(3, 3), range(4), range(-1, 2), range(0, 3, 2), range(2, 1)])
def test_layers_are_checked(layers: range) -> None:
    g = geometry()
    with pytest.raises(InvalidArgumentError, match="is no run of the 3 layers"):
        plan_copy(g, *views(g), [0], [0], layers)
    with pytest.raises(InvalidArgumentError, match=r"layer 3 is not of 0 \.\. 2"):
        plan_copy(g, *views(g), [0], [0]).layer(3)


@pytest.mark.parametrize(("change", "error", "words"), [
    ({"bases": np.ones((2, 2), np.uint64)}, InvalidArgumentError, r"bases of dst are \(2, 2\), not \(2, 3\)"),
    ({"bases": np.ones((2, 3), np.int64)}, ArgumentTypeError, "bases of dst are int64"),
    ({"bases": np.zeros((2, 3), np.uint64)}, InvalidArgumentError, "a base of dst is NULL"),
    ({"bases": np.full((2, 3), 1 << 28, np.uint64)}, InvalidArgumentError, "of dst overlap: those at 0x1.* and 0x1"),
    ({"num_slots": 7}, InvalidArgumentError, "7 slots of dst are no whole pages of 4"),
    ({"num_slots": -4}, InvalidArgumentError, "-4 slots of dst"),
    ({"head_stride": 8}, InvalidArgumentError, "dst folds onto itself"),
    ({"token_stride": 47}, InvalidArgumentError, "dst folds onto itself"),
    ({"page_stride": 0}, InvalidArgumentError, "dst folds onto itself"),
    ({"page_stride": -4096}, InvalidArgumentError, "dst folds onto itself"),
])  # fmt: skip
def test_views_are_checked(change: dict[str, Any], error: type[RadixKVError], words: str) -> None:
    g = geometry()
    src, dst = views(g)
    with pytest.raises(error, match=words):
        plan_copy(g, src, replace(dst, **change), [0], [0])


def test_devices_are_checked() -> None:
    g = geometry()
    src, dst = views(g)
    plan = plan_copy(g, src, replace(dst, device="cuda:1"), [0], [0])
    with pytest.raises(InvalidArgumentError, match="dst is on cuda:1, and this path copies on cpu"):
        copy_views(plan)


def test_bytes_that_are_read_and_written_are_refused() -> None:
    g = geometry("mla", layers=1, head_bytes=16, page_size=4)
    pool = view_of_layout("layer_first", g, 8 * 4, [1 << 20])
    plan_copy(g, pool, pool, [0, 1], [2, 3])
    with pytest.raises(InvalidArgumentError, match="page 1 is both source and destination"):
        plan_copy(g, pool, pool, [0, 1], [1, 3])
    # the same bytes seen from half a page further on: found run by run
    shifted = replace(pool, bases=pool.bases + np.uint64(32))
    plan_copy(g, pool, shifted, [0, 1], [4, 5])
    for src_pages, dst_pages in (([0], [0]), ([1], [0]), ([5, 2, 1], [7, 0, 4])):
        with pytest.raises(InvalidArgumentError, match="are written by the same copy"):
            plan_copy(g, pool, shifted, src_pages, dst_pages)
    with pytest.raises(InvalidArgumentError, match="are written by the same copy"):
        plan_copy(g, shifted, pool, [0], [1])


def test_one_common_byte_is_an_overlap() -> None:
    g = geometry("mla", layers=1, head_bytes=16, page_size=1)
    pool = view_of_layout("layer_first", g, 4, [1 << 20])
    for distance, pages in ((63, ([3], [0])), (-63, ([0], [3]))):
        beside = replace(pool, bases=np.array([[(1 << 20) + distance]], np.uint64))
        with pytest.raises(InvalidArgumentError, match="are written by the same copy"):
            plan_copy(g, pool, beside, *pages)
        apart = replace(pool, bases=np.array([[(1 << 20) + (64 if distance > 0 else -64)]], np.uint64))
        assert plan_copy(g, pool, apart, *pages).num_pages == 1
    # the same numbers on another device are other bytes
    assert plan_copy(g, pool, replace(pool, device="cuda:0"), [1], [1]).num_pages == 1


def test_interleaved_pools_do_not_overlap() -> None:
    """Even slots one pool, odd slots the other: address ranges meet, bytes do not."""
    g = geometry("mla", layers=1, head_bytes=16, page_size=1)
    even = KVView(bases=np.array([[1 << 20]], np.uint64), page_stride=32, token_stride=16, head_stride=16, num_slots=8)
    odd = replace(even, bases=even.bases + np.uint64(16))
    assert plan_copy(g, even, odd, [0, 1, 2], [2, 1, 0]).num_pages == 3


@given(st.data())
def test_the_overlap_check_is_exact(data: st.DataObject) -> None:
    g = geometry("mla", layers=1, head_bytes=data.draw(st.integers(1, 9)), page_size=data.draw(st.integers(1, 3)))
    strides = st.integers(g.page_size * g.head_bytes, g.page_size * g.head_bytes + 8)

    def view() -> KVView:
        return KVView(
            bases=np.array([[1000 + data.draw(st.integers(0, 60))]], np.uint64),
            page_stride=data.draw(strides),
            token_stride=g.head_bytes,
            head_stride=g.head_bytes,
            num_slots=5 * g.page_size,
        )

    src, dst = view(), view()
    ids = st.lists(st.integers(0, 4), min_size=2, max_size=2, unique=True)
    src_pages, dst_pages = data.draw(ids), data.draw(ids)
    read, written = (
        {address_of(g, v, 0, 0, p * g.page_size + t, 0) + i
         for p in pages for t in range(g.page_size) for i in range(g.head_bytes)}
        for v, pages in ((src, src_pages), (dst, dst_pages))
    )  # fmt: skip
    if read & written:
        with pytest.raises(InvalidArgumentError):
            plan_copy(g, src, dst, src_pages, dst_pages)
    else:
        assert plan_copy(g, src, dst, src_pages, dst_pages).num_pages == 2


# ---- layers of the destination that share bytes ----
SHARED: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    # geometry, address of each layer (MLA: one half)
    "by one byte": ({"head_bytes": 16, "page_size": 4}, (0, 8 * 4 * 16 - 1)),
    "half a row": ({"head_bytes": 16, "page_size": 4}, (0, 8)),
    "a row beyond a page": ({"head_bytes": 16, "page_size": 4}, (0, 5 * 16)),
    "the outer two": ({"head_bytes": 16, "page_size": 4}, (0, 1 << 20, 16)),
    "backwards": ({"head_bytes": 16, "page_size": 4}, (1 << 20, (1 << 20) - 100)),
}


@pytest.mark.parametrize("what", SHARED)
def test_layers_of_the_destination_that_overlap_in_part_are_refused(what: str) -> None:
    shape, places = SHARED[what]
    g = geometry("mla", layers=len(places), **shape)
    src = view_of_layout("page_first", g, 8 * 4, [1 << 40])
    bases = np.array([places], np.uint64) + np.uint64(1 << 30)
    dst = replace(view_of_layout("layer_first", g, 8 * 4, [1 << 30]), bases=bases)
    with pytest.raises(InvalidArgumentError, match="two layers or halves of dst overlap: those at 0x"):
        plan_copy(g, src, dst, [0], [0])
    plan_copy(g, dst, src, [0], [0])  # what is only read may be anywhere


def test_a_value_half_on_top_of_the_key_half_is_refused() -> None:
    g = geometry("mha", layers=2, heads=1, head_bytes=64, page_size=2)
    src = view_of_layout("layer_first", g, 8, [1 << 40, 1 << 41])
    size = 8 * 64 * 2
    for layout in LAYOUTS:
        plan_copy(g, src, view_of_layout(layout, g, 8, [1 << 30, (1 << 30) + size]), [0], [0])
        plan_copy(g, src, view_of_layout(layout, g, 8, [(1 << 30) + size, 1 << 30]), [0], [0])
        with pytest.raises(InvalidArgumentError, match="two layers or halves of dst overlap"):
            plan_copy(g, src, view_of_layout(layout, g, 8, [1 << 30, (1 << 30) + size - 1]), [0], [0])


@settings(max_examples=300)
@given(st.data())
def test_the_check_of_layers_is_exact(data: st.DataObject) -> None:
    """Against the sets of bytes themselves: two halves, some layers, at any places, evenly or not."""
    kind: Any = data.draw(st.sampled_from(["mha", "mla"]))
    g = geometry(kind, layers=data.draw(st.integers(1, 3)), heads=data.draw(st.integers(1, 2)),
                 head_bytes=data.draw(st.integers(1, 5)), page_size=data.draw(st.integers(1, 2)))  # fmt: skip
    head, spare = g.head_bytes, st.sampled_from([0, 0, 1, 4, 30])
    head_stride = head + data.draw(spare)
    token_stride = (g.num_heads - 1) * head_stride + head + data.draw(spare)
    page_stride = (g.page_size - 1) * token_stride + (g.num_heads - 1) * head_stride + head + data.draw(spare)
    strides = [head_stride, token_stride, page_stride]
    if data.draw(st.booleans()):  # heads outside tokens, as page_head has it
        strides = [(g.page_size - 1) * head_stride + head + 3, head_stride, 0]
        strides[2] = (g.num_heads - 1) * strides[0] + (g.page_size - 1) * strides[1] + head + data.draw(spare)
    places = st.integers(1000, 1300)
    if data.draw(st.booleans()):
        first, half, layer = data.draw(places), data.draw(st.integers(-90, 300)), data.draw(st.integers(-90, 90))
        bases = [[first + i * half + j * layer for j in range(g.num_layers)] for i in range(g.halves)]
    else:
        bases = data.draw(st.lists(st.lists(places, min_size=g.num_layers, max_size=g.num_layers), min_size=g.halves,
                                   max_size=g.halves))  # fmt: skip
    dst = KVView(bases=np.array(bases, np.uint64), page_stride=strides[2], token_stride=strides[1],
                 head_stride=strides[0], num_slots=3 * g.page_size)  # fmt: skip
    src = view_of_layout("layer_first", g, 3 * g.page_size, [(1 << 40) + (i << 30) for i in range(g.halves)])
    seen: set[int] = set()
    count = 0
    for half in range(g.halves):
        for layer in range(g.num_layers):
            taken = {address_of(g, dst, half, layer, slot, h) + i
                     for slot in range(3 * g.page_size) for h in range(g.num_heads) for i in range(head)}  # fmt: skip
            seen |= taken
            count += len(taken)
    if len(seen) < count:
        with pytest.raises(InvalidArgumentError, match="two layers or halves of dst overlap"):
            plan_copy(g, src, dst, [0], [0])
    else:
        assert plan_copy(g, src, dst, [0], [0]).num_pages == 1


def test_pages_of_slots() -> None:
    slots = np.array([12, 13, 14, 15, 0, 1, 2, 3], np.int32)
    assert pages_of_slots(slots, 4).tolist() == [3, 0]
    assert pages_of_slots(slots, 1).tolist() == slots.tolist()
    assert pages_of_slots(np.zeros(0, np.int64), 16).tolist() == []
    for wrong, words in (
        ([0, 1, 2], "no whole pages"),
        ([1, 2, 3, 4], "0 .. 3 are no page"),
        ([0, 1, 2, 3, 4, 5, 7, 6], "4 .. 7"),
    ):
        with pytest.raises(InvalidArgumentError, match=words):
            pages_of_slots(np.array(wrong), 4)


def test_unknown_layout() -> None:
    with pytest.raises(InvalidArgumentError, match="unknown layout 'rows'"):
        offset_of("rows", geometry(), 4, 0, 0, 0)  # type: ignore[arg-type]
