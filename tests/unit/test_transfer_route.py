"""CpuTransfer.route: moves what the general path moves, refuses what it refuses, in the same words."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radixkv.errors import InvalidArgumentError, PageOwnershipError, RadixKVError
from radixkv.pool.layout import LAYOUTS, KVGeometry, KVView, Layout
from radixkv.transfer import cpu
from radixkv.transfer.base import PlannedRoute, Transfer
from radixkv.transfer.cpu import CpuTransfer, Progress
from radixkv.transfer.plan import CopyPlan, plan_copy
from radixkv.transfer.reference import copy_views

from .transfer_kit import INDICES, PAGES, SHAPES, HostPool, geometry, on_device, shape_name

PAIRS = [(src, dst) for src in LAYOUTS for dst in LAYOUTS]


def expected_of(src: HostPool, dst: HostPool, ids: Any, layers: range | None = None) -> Any:
    twin = dst.twin()
    copy_views(plan_copy(src.geometry, src.view, twin.view, *ids, layers))
    return [block.copy() for block in twin.blocks]


def holds(pool: HostPool, expected: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(pool.blocks, expected, strict=True))


@pytest.mark.parametrize("g", SHAPES, ids=shape_name)
def test_every_pair_of_layouts_both_ways(g: KVGeometry) -> None:
    """Backup and load back, with and without a reader, int32 and int64, through one route each."""
    for src_layout, dst_layout in PAIRS:
        src = HostPool.make(g, src_layout, PAGES, seed=1)
        dst = HostPool.make(g, dst_layout, PAGES)
        route = CpuTransfer(g, num_threads=2).route(src.view, dst.view)
        for name in ("random", "contiguous", "single"):
            for dtype in (np.int32, np.int64):
                ids = [np.array(side, dtype) for side in INDICES[name]]
                expected = expected_of(src, dst, ids)
                route.copy(*ids)
                assert holds(dst, expected)
                for block in src.blocks:
                    block ^= 0x5A
                expected = expected_of(src, dst, ids)
                progress = Progress(g.num_layers)
                route.copy(*ids, progress)
                assert progress.layers_done == g.num_layers
                assert holds(dst, expected)


@pytest.mark.parametrize("name", INDICES)
def test_every_kind_of_indices(name: str) -> None:
    g = geometry(head_bytes=72, page_size=5)
    for src_layout, dst_layout in PAIRS:
        src, dst = HostPool.make(g, src_layout, PAGES, seed=2), HostPool.make(g, dst_layout, PAGES)
        expected = expected_of(src, dst, INDICES[name])
        ids = [np.array(side, np.int64) for side in INDICES[name]]
        CpuTransfer(g).route(src.view, dst.view).copy(*ids)
        assert holds(dst, expected)


def test_many_pages_that_fit_no_stack() -> None:
    g = geometry("mla", layers=2, head_bytes=8, page_size=1)
    src, dst = HostPool.make(g, "layer_first", 3000, seed=3), HostPool.make(g, "page_first", 3000)
    rng = np.random.default_rng(4)
    route = CpuTransfer(g).route(src.view, dst.view)
    for count in (127, 128, 129, 2999):
        ids = [rng.permutation(3000)[:count] for _ in range(2)]
        expected = expected_of(src, dst, ids)
        route.copy(*ids)
        assert holds(dst, expected)
        twice = ids[1].copy()
        twice[-1] = twice[0]
        with pytest.raises(PageOwnershipError, match=f"destination page {twice[0]} is given twice"):
            route.copy(ids[0], twice)
    with pytest.raises(PageOwnershipError):
        route.copy(np.zeros(3001, np.int64), np.arange(3001) % 3000)
    assert holds(dst, expected)


def outcome(call: Any) -> Any:
    """None, or the type and words of what was raised."""
    try:
        call()
    except RadixKVError as error:
        return type(error), str(error)
    return None


WILD = st.one_of(st.integers(0, 5), st.sampled_from([-1, 6, 7, 8, -(2**31), 2**31 - 1]))


@st.composite
def page_lists(draw: st.DrawFn) -> tuple[Any, Any]:
    """Mostly right, sometimes wrong in length, range, repetition, dtype, dimension or layout in memory."""
    n = draw(st.integers(0, 6))
    tame = draw(st.booleans())
    src = draw(st.lists(st.integers(0, 5) if tame else WILD, min_size=n, max_size=n))
    dst = draw(st.lists(st.integers(0, 5), unique=True, min_size=n, max_size=n)) if tame else draw(
        st.lists(WILD, min_size=n, max_size=draw(st.sampled_from([n, n + 1]))))  # fmt: skip

    def form(ids: list[int]) -> Any:
        dtypes: list[Any] = ["list", np.int32, np.int64, np.int32, np.int64, np.longlong, ">i8", np.int16, np.uint32]
        dtype = draw(st.sampled_from(dtypes))
        if dtype == "list":
            return ids
        array = np.array(ids, np.int64).astype(dtype)
        return draw(st.sampled_from([array, array, array, np.repeat(array, 2)[::2], array[:, None], array[::-1]]))

    return form(src), form(dst)


VIEWS = ["apart", "one pool", "one memory", "interleaved", "another device", "broken"]


@settings(max_examples=400, deadline=None)
@given(
    ids=page_lists(),
    views=st.sampled_from(VIEWS),
    src_layout=st.sampled_from(LAYOUTS),
    dst_layout=st.sampled_from(LAYOUTS),
    kind=st.sampled_from(["mha", "mla"]),
    layers=st.sampled_from([None, None, range(1, 3), range(1), range(2, 5), range(0, 3, 2), range(1, 1)]),
    followed=st.booleans(),
)
def test_both_paths_agree(
    ids: tuple[Any, Any], views: str, src_layout: Layout, dst_layout: Layout, kind: Any, layers: Any, followed: bool
) -> None:
    """The general path (plan, then copy) and a route, on pools of equal bytes: the same bytes or the same error."""
    g = geometry(kind, layers=3, head_bytes=8, page_size=2)

    def result(prepared: bool) -> tuple[Any, Any]:
        src, dst = HostPool.make(g, src_layout, PAGES, seed=5), HostPool.make(g, dst_layout, PAGES)
        a, b = _views(views, src, dst)
        transfer = CpuTransfer(g, num_threads=2)
        progress = Progress(len(layers or range(3))) if followed and len(layers or range(3)) else None

        def general() -> None:
            transfer.copy(transfer.plan(a, b, *ids, layers), progress)

        def by_route() -> None:
            transfer.route(a, b, layers).copy(*ids, progress)

        raised = outcome(by_route if prepared else general)
        return raised, [dst.whole.copy(), src.whole.copy()]

    (general, there), (prepared, here) = result(False), result(True)
    if views == "another device":  # a route is refused before it sees ids
        assert general is not None
        assert prepared is not None
    elif general and prepared:  # addresses differ from pool to pool
        assert general[0] is prepared[0]
        assert _without_addresses(general[1]) == _without_addresses(prepared[1])
    else:
        assert general == prepared
    for a, b in zip(there, here, strict=True):
        assert np.array_equal(a, b)


def _without_addresses(words: str) -> str:
    return " ".join("0x" if word.startswith("0x") else word for word in words.split())


def _views(views: str, src: HostPool, dst: HostPool) -> tuple[KVView, KVView]:
    if views == "one pool":
        return dst.view, dst.view
    if views == "one memory":  # a page on: other bytes, but for the pages that meet
        on = np.uint64(dst.view.page_stride)
        return replace(dst.view, num_slots=dst.view.num_slots - 2), replace(
            dst.view, bases=dst.view.bases + on, num_slots=dst.view.num_slots - 2
        )
    if views == "interleaved":  # even and odd pages of one pool
        g = dst.geometry
        half = replace(dst.view, page_stride=2 * dst.view.page_stride, num_slots=dst.num_pages // 2 * g.page_size)
        return half, replace(half, bases=half.bases + np.uint64(dst.view.page_stride))
    if views == "another device":
        return src.view, on_device(dst.view)
    if views == "broken":
        return src.view, replace(dst.view, bases=dst.view.bases[:, :1].repeat(dst.geometry.num_layers, axis=1))
    return src.view, dst.view


def test_views_are_checked_when_the_route_is_made() -> None:
    g = geometry()
    src, dst = HostPool.make(g, "layer_first", PAGES), HostPool.make(g, "page_first", PAGES)
    transfer = CpuTransfer(g)
    with pytest.raises(InvalidArgumentError, match="src is on cuda:0"):
        transfer.route(on_device(src.view), dst.view)
    with pytest.raises(InvalidArgumentError, match="is no run of the 3 layers"):
        transfer.route(src.view, dst.view, range(4))
    with pytest.raises(InvalidArgumentError, match="dst folds onto itself"):
        transfer.route(src.view, replace(dst.view, token_stride=1))
    route = transfer.route(src.view, dst.view, range(1, 3))
    assert (route.src, route.dst, route.layers) == (src.view, dst.view, range(1, 3))


def test_a_copy_until_a_moment_goes_on_from_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    g = geometry("mha", layers=2, heads=1, head_bytes=8, page_size=4)
    monkeypatch.setattr(cpu, "SLICE_BYTES", 3 * g.page_bytes)
    src, dst = HostPool.make(g, "layer_first", 10, seed=6), HostPool.make(g, "page_first", 10)
    route = CpuTransfer(g, num_threads=1).route(src.view, dst.view)
    pages = np.arange(10, dtype=np.int32)
    expected = expected_of(src, dst, [pages, pages[::-1].copy()])
    backwards = pages[::-1].copy()
    assert [route.copy_until(pages[at:], backwards[at:], 0.0) for at in (0, 3, 6, 9)] == [3, 3, 3, 1]
    assert holds(dst, expected)
    assert route.copy_until(pages, backwards) == 10
    with pytest.raises(InvalidArgumentError):
        route.copy_until(pages, backwards[1:], 0.0)


def test_one_route_by_many_threads() -> None:
    g = geometry("mha", layers=4, heads=2, head_bytes=64, page_size=16)
    src, dst = HostPool.make(g, "layer_first", 40, seed=6), HostPool.make(g, "page_first", 40)
    route = CpuTransfer(g, num_threads=3).route(src.view, dst.view)
    order = np.random.default_rng(7)
    from_pages, to_pages = (np.array_split(order.permutation(40), 5) for _ in range(2))
    expected = expected_of(src, dst, [np.concatenate(from_pages), np.concatenate(to_pages)])
    failed: list[BaseException] = []
    start = threading.Barrier(5)

    def copy(src_pages: Any, dst_pages: Any) -> None:
        try:
            start.wait()
            for _ in range(20):
                route.copy(src_pages, dst_pages)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=copy, args=ids) for ids in zip(from_pages, to_pages, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert holds(dst, expected)


def test_a_transfer_without_a_route_of_its_own_plans_each_copy() -> None:
    class Recording(Transfer):
        def __init__(self, g: KVGeometry) -> None:
            super().__init__(g)
            self.plans: list[CopyPlan] = []

        def copy(self, plan: CopyPlan) -> None:
            self.plans.append(plan)

        def load_back(self, *_: Any, **__: Any) -> None:
            raise NotImplementedError

    g = geometry()
    src, dst = HostPool.make(g, "layer_first", PAGES), HostPool.make(g, "page_first", PAGES)
    transfer = Recording(g)
    route = transfer.route(src.view, dst.view, range(1, 2))
    assert isinstance(route, PlannedRoute)
    route.copy([0, 1], [2, 3])
    with pytest.raises(PageOwnershipError):
        route.copy([0, 1], [2, 2])
    [plan] = transfer.plans
    assert (plan.src_pages.tolist(), plan.dst_pages.tolist(), plan.layers) == ([0, 1], [2, 3], range(1, 2))
    with pytest.raises(InvalidArgumentError):
        transfer.route(src.view, replace(dst.view, page_stride=0))
