"""transfer/cpu.pyx and csrc/src/copy*.c: every byte where the oracle puts it, from many threads, after fork."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from radixkv.errors import ArgumentTypeError, InvalidArgumentError, PageOwnershipError
from radixkv.pool.layout import LAYOUTS, KVGeometry, KVView, Layout
from radixkv.transfer import cpu
from radixkv.transfer.cpu import CpuTransfer, Progress
from radixkv.transfer.loops import loops_of
from radixkv.transfer.plan import plan_copy
from radixkv.transfer.reference import copy_views

from .transfer_kit import INDICES, PAGES, POISON, SHAPES, HostPool, geometry, on_device, shape_name, staging

STORES: tuple[Any, ...] = tuple(cpu.STORES)
PAIRS = [(src, dst) for src in LAYOUTS for dst in LAYOUTS]


def expected_of(src: HostPool, dst: HostPool, src_pages: Any, dst_pages: Any, layers: range | None = None) -> HostPool:
    """What ``dst`` must become, by the oracle."""
    twin = dst.twin()
    copy_views(plan_copy(src.geometry, src.view, twin.view, src_pages, dst_pages, layers))
    return twin


def same(a: HostPool, b: HostPool) -> bool:
    """All blocks alike, and the guards of ``a`` untouched."""
    inside = np.zeros(len(a.whole), np.bool_)
    for block in a.blocks:
        at = block.ctypes.data - a.whole.ctypes.data
        inside[at : at + len(block)] = True
    guards = a.whole[~inside]
    return bool((guards == POISON).all()) and all(np.array_equal(x, y) for x, y in zip(a.blocks, b.blocks, strict=True))


@pytest.mark.parametrize("g", SHAPES, ids=shape_name)
@pytest.mark.parametrize(("src_layout", "dst_layout"), PAIRS)
def test_every_pair_of_layouts_and_every_shape(src_layout: Layout, dst_layout: Layout, g: KVGeometry) -> None:
    src = HostPool.make(g, src_layout, PAGES, seed=1)
    want = expected_of(src, HostPool.make(g, dst_layout, PAGES), *INDICES["random"])
    for store in STORES:
        dst = HostPool.make(g, dst_layout, PAGES)
        transfer = CpuTransfer(g, num_threads=3, store=store)
        transfer.copy(transfer.plan(src.view, dst.view, *INDICES["random"]))
        assert same(dst, want)
        dst = HostPool.make(g, dst_layout, PAGES)
        transfer.load_back(src.view, dst.view, *INDICES["random"], Progress(g.num_layers))
        assert same(dst, want)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("name", INDICES)
def test_every_kind_of_indices(name: str, dtype: Any, store: Any) -> None:
    g = geometry(head_bytes=72, page_size=5)
    src_pages, dst_pages = (np.array(ids, dtype) for ids in INDICES[name])
    for src_layout, dst_layout in PAIRS:
        src, dst = HostPool.make(g, src_layout, PAGES, seed=2), HostPool.make(g, dst_layout, PAGES)
        want = expected_of(src, dst, src_pages, dst_pages)
        CpuTransfer(g, num_threads=2, store=store).backup(src.view, dst.view, src_pages, dst_pages)
        assert same(dst, want)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("shift", [0, 1, 8, 16, 33, 63])
def test_any_alignment(shift: int, store: Any) -> None:
    g = geometry("mla", layers=2, head_bytes=331, page_size=2)
    for other in (0, 7):
        src = HostPool.make(g, "layer_first", PAGES, seed=3, shift=shift)
        dst = HostPool.make(g, "page_first", PAGES, shift=other)
        want = expected_of(src, dst, *INDICES["runs"])
        CpuTransfer(g, store=store).backup(src.view, dst.view, *INDICES["runs"])
        assert same(dst, want)
        CpuTransfer(g, store=store).backup(want.view, src.view, *INDICES["runs"])
        assert same(src, expected_of(want, src, *INDICES["runs"]))


@pytest.mark.parametrize("run_bytes", [255 << 10, 256 << 10, (256 << 10) + 1, 600_001, 1 << 20])
def test_long_runs_are_shared_by_threads(run_bytes: int) -> None:
    """Runs around and above the pieces that they are cut into, in a copy large enough to stream."""
    g = geometry("mla", layers=1, head_bytes=run_bytes, page_size=1)
    src, dst = HostPool.make(g, "layer_first", 5, seed=4), HostPool.make(g, "layer_first", 5)
    CpuTransfer(g, num_threads=4).backup(src.view, dst.view, [0, 1, 4], [3, 4, 0])
    assert all(np.array_equal(dst.blocks[0].reshape(5, -1)[b], src.blocks[0].reshape(5, -1)[a])
               for a, b in ((0, 3), (1, 4), (4, 0)))  # fmt: skip
    assert (dst.blocks[0].reshape(5, -1)[1:3] == POISON).all()


def test_a_large_copy_in_many_chunks() -> None:
    g = geometry("mha", layers=9, heads=4, head_bytes=128, page_size=16)
    src, dst = HostPool.make(g, "layer_first", 40, seed=5), HostPool.make(g, "page_head", 40)
    rng = np.random.default_rng(6)
    src_pages, dst_pages = rng.permutation(40)[:31], rng.permutation(40)[:31]
    CpuTransfer(g, num_threads=5).backup(src.view, dst.view, src_pages, dst_pages)
    back = HostPool.make(g, "layer_first", 40)
    progress = Progress(9)
    CpuTransfer(g, num_threads=5).load_back(dst.view, back.view, dst_pages, src_pages, progress)
    assert progress.layers_done == 9
    for block, given_block in zip(back.blocks, src.blocks, strict=True):
        pages, given_pages = (b.reshape(9, 40, -1) for b in (block, given_block))
        assert np.array_equal(pages[:, src_pages], given_pages[:, src_pages])
        untouched = np.setdiff1d(np.arange(40), src_pages)
        assert (pages[:, untouched] == POISON).all()


def test_load_one_layer_at_a_time() -> None:
    g = geometry(layers=5)
    src, dst = HostPool.make(g, "page_first", PAGES, seed=7), HostPool.make(g, "layer_first", PAGES)
    transfer = CpuTransfer(g)
    for layer in (3, 0):
        want = expected_of(src, dst, *INDICES["random"], range(layer, layer + 1))
        transfer.load_layer(src.view, dst.view, *INDICES["random"], layer)
        assert same(dst, want)
    plan = transfer.plan(src.view, dst.view, *INDICES["random"])
    for layer in range(5):
        transfer.copy(plan.layer(layer))
    assert same(dst, expected_of(src, HostPool.make(g, "layer_first", PAGES), *INDICES["random"]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_move_gather_and_scatter(layout: Layout) -> None:
    g = geometry(head_bytes=40, page_size=3)
    transfer = CpuTransfer(g, num_threads=2)
    pool = HostPool.make(g, layout, PAGES, seed=8)
    before = pool.twin()
    buffer, view = staging(g, 3)
    transfer.gather(pool.view, np.array([5, 0, 2], np.int32), view)
    transfer.move(pool.view, [5, 0], [1, 4])
    assert same(pool, expected_of(before, before, [5, 0], [1, 4]))
    other = HostPool.make(g, layout, PAGES)
    transfer.scatter(view, other.view, np.array([5, 0, 2]))
    want = expected_of(before, HostPool.make(g, layout, PAGES), [5, 0, 2], [5, 0, 2])
    assert same(other, want)
    transfer.gather(pool.view, [1], view)
    assert np.array_equal(buffer[0], staged(transfer, pool.view, 1))


def staged(transfer: CpuTransfer, pool: KVView, page: int) -> Any:
    buffer, view = staging(transfer.geometry, 1)
    copy_views(plan_copy(transfer.geometry, pool, view, [page], [0]))
    return buffer[0]


def test_separate_tensors_a_layer() -> None:
    g = geometry(layers=4, head_bytes=64)
    blocks = [np.random.default_rng(i).integers(0, 256, PAGES * g.page_size * g.row_bytes, np.uint8) for i in range(8)]
    addresses = [block.ctypes.data for block in blocks]
    # K and V of a layer at another distance in each layer
    bases = np.array(addresses[::2] + addresses[::-2], np.uint64).reshape(2, 4)
    device = KVView(
        bases=bases,
        page_stride=g.page_size * g.row_bytes,
        token_stride=g.row_bytes,
        head_stride=g.head_bytes,
        num_slots=PAGES * g.page_size,
    )
    for layout in LAYOUTS:
        for progress in (None, Progress(4)):
            host, want = HostPool.make(g, layout, PAGES), HostPool.make(g, layout, PAGES)
            plan = plan_copy(g, device, host.view, *INDICES["runs"])
            CpuTransfer(g, num_threads=2).copy(plan, progress)
            copy_views(plan_copy(g, device, want.view, *INDICES["runs"]))
            assert same(host, want)


@given(st.data())
def test_random_geometries(data: st.DataObject) -> None:
    kind: Any = data.draw(st.sampled_from(["mha", "mla"]))
    g = geometry(
        kind,
        layers=data.draw(st.integers(1, 5)),
        heads=data.draw(st.integers(1, 4)),
        head_bytes=data.draw(st.one_of(st.integers(1, 80), st.sampled_from([64, 128, 256, 320, 1000]))),
        page_size=data.draw(st.integers(1, 6)),
    )
    layout = st.sampled_from(LAYOUTS)
    shift = st.integers(0, 63)
    src = HostPool.make(g, data.draw(layout), 7, seed=9, shift=data.draw(shift))
    dst = HostPool.make(g, data.draw(layout), 5, shift=data.draw(shift))
    dst_pages = data.draw(st.lists(st.integers(0, 4), unique=True))
    src_pages = data.draw(st.lists(st.integers(0, 6), min_size=len(dst_pages), max_size=len(dst_pages)))
    first = data.draw(st.integers(0, g.num_layers - 1))
    layers = range(first, data.draw(st.integers(first + 1, g.num_layers)))
    want = expected_of(src, dst, src_pages, dst_pages, layers)
    transfer = CpuTransfer(g, num_threads=data.draw(st.integers(1, 4)), store=data.draw(st.sampled_from(STORES)))
    progress = Progress(len(layers)) if data.draw(st.booleans()) else None
    transfer.copy(transfer.plan(src.view, dst.view, src_pages, dst_pages, layers), progress)
    assert same(dst, want)
    assert progress is None or progress.layers_done == len(layers)


# ---- threads ----
def test_many_threads_copy_at_once() -> None:
    """Each with pools of its own, through one transfer: shared helpers mix up no jobs."""
    g = geometry("mha", layers=4, heads=2, head_bytes=128, page_size=16)
    transfer = CpuTransfer(g, num_threads=3)
    jobs = []
    for i in range(6):
        src, dst = HostPool.make(g, LAYOUTS[i % 4], 24, seed=20 + i), HostPool.make(g, LAYOUTS[i % 3], 24)
        order = np.random.default_rng(i)
        jobs.append((src, dst, order.permutation(24), order.permutation(24)))
    start = threading.Barrier(len(jobs))
    failed: list[BaseException] = []

    def copy(src: HostPool, dst: HostPool, src_pages: Any, dst_pages: Any) -> None:
        try:
            start.wait()
            for _ in range(15):
                transfer.backup(src.view, dst.view, src_pages, dst_pages)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=copy, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for src, dst, src_pages, dst_pages in jobs:
        buffers = []
        for pool, pages in ((src, src_pages), (dst, dst_pages)):
            buffer, view = staging(g, 24)
            CpuTransfer(g, num_threads=1).gather(pool.view, pages, view)
            buffers.append(buffer)
        assert np.array_equal(*buffers)


def test_a_reader_follows_the_layers() -> None:
    """A layer that is reported is in place, while the rest is still moving."""
    g = geometry("mha", layers=12, heads=1, head_bytes=1024, page_size=16)
    src, dst = HostPool.make(g, "page_first", 40, seed=10), HostPool.make(g, "layer_first", 40)
    pages = np.random.default_rng(11).permutation(40)
    progress = Progress(12)
    right = []

    def read() -> None:
        given_layers = [block.reshape(40, 16, 12, 1024) for block in src.blocks]
        for layer in range(12):
            assert progress.wait(layer)
            assert progress.layers_done > layer
            got = [block.reshape(12, 40, 16, 1024)[layer][pages] for block in dst.blocks]
            right.append(all(np.array_equal(g, s[:, :, layer]) for g, s in zip(got, given_layers, strict=True)))

    reader = threading.Thread(target=read)
    reader.start()
    CpuTransfer(g, num_threads=3).load_back(src.view, dst.view, np.arange(40), pages, progress)
    reader.join()
    assert right == [True] * 12


def test_progress_before_and_after() -> None:
    progress = Progress(3)
    assert (progress.num_layers, progress.layers_done) == (3, 0)
    assert progress.wait(0, 0) is False
    assert progress.wait(2, 0.15) is False  # longer than one slice of waiting
    assert progress.wait(0, -1) is False
    for layer in (-1, 3):
        with pytest.raises(InvalidArgumentError, match=f"layer {layer} is not of 0 .. 2"):
            progress.wait(layer)
    with pytest.raises(InvalidArgumentError, match="progress over 0 layers"):
        Progress(0)
    g = geometry()
    pool, other = HostPool.make(g, "page_first", 2, seed=1), HostPool.make(g, "page_first", 2)
    CpuTransfer(g).load_back(pool.view, other.view, [], [], progress)
    assert progress.wait(2)  # an empty copy has everything in place
    with pytest.raises(InvalidArgumentError, match="progress over 3 layers for a copy of 1"):
        CpuTransfer(g).copy(plan_copy(g, pool.view, other.view, [0], [0], range(1)), Progress(3))


def test_helpers_live_until_shutdown() -> None:
    cpu.shutdown()
    assert cpu.num_helpers() == 0
    g = geometry("mla", layers=1, head_bytes=300_000, page_size=1)
    src, dst = HostPool.make(g, "layer_first", 8, seed=1), HostPool.make(g, "layer_first", 8)
    CpuTransfer(g, num_threads=1).backup(src.view, dst.view, np.arange(8), np.arange(8))
    assert cpu.num_helpers() == 0
    for threads, helpers in ((3, 2), (2, 2), (5, 4)):
        CpuTransfer(g, num_threads=threads).backup(src.view, dst.view, np.arange(8), np.arange(8))
        assert cpu.num_helpers() == helpers
    cpu.shutdown()
    cpu.shutdown()
    assert cpu.num_helpers() == 0
    CpuTransfer(g, num_threads=3).backup(dst.view, src.view, np.arange(8), np.arange(8)[::-1].copy())
    assert cpu.num_helpers() == 2


FORK = """
import os, sys, threading
import numpy as np
from radixkv.transfer import cpu
from tests.unit.transfer_kit import HostPool, geometry

g = geometry("mla", layers=2, head_bytes=4096, page_size=16)
src, dst = HostPool.make(g, "layer_first", 16, seed=1), HostPool.make(g, "layer_first", 16)
transfer = cpu.CpuTransfer(g, num_threads=3)
pages = np.arange(16)
stop = threading.Event()
busy_src, busy_dst = src.twin(), dst.twin()
def busy():
    while not stop.is_set():
        transfer.backup(busy_src.view, busy_dst.view, pages, pages)
thread = threading.Thread(target=busy)
transfer.backup(src.view, dst.view, pages, pages)
thread.start()
for _ in range(20):                 # while another thread is in the middle of copies
    child = os.fork()
    if child == 0:
        ok = cpu.num_helpers() == 0
        dst.blocks[0][:] = 0
        transfer.backup(src.view, dst.view, pages, pages)
        ok = ok and cpu.num_helpers() == 2 and np.array_equal(src.blocks[0], dst.blocks[0])
        grandchild = os.fork()
        if grandchild == 0:
            dst.blocks[0][:] = 0
            transfer.backup(src.view, dst.view, pages, pages)
            os._exit(0 if np.array_equal(src.blocks[0], dst.blocks[0]) else 2)
        ok = ok and os.waitpid(grandchild, 0)[1] == 0
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    transfer.backup(src.view, dst.view, pages, pages)
stop.set()
thread.join()
assert np.array_equal(busy_src.blocks[0], busy_dst.blocks[0])
print("forked")
"""


def test_a_child_of_fork_starts_its_own_helpers() -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "forked\n"), done.stderr


# ---- what is refused ----
@pytest.mark.parametrize(("options", "words"), [
    ({"num_threads": 0}, "0 threads, and 1 .. 64"),
    ({"num_threads": 65}, "65 threads"),
    ({"store": "fast"}, "unknown store 'fast'; one of auto, cached, stream"),
])  # fmt: skip
def test_options_are_checked(options: Any, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        CpuTransfer(geometry(), **options)


def test_a_number_of_threads_is_an_int() -> None:
    for wrong in (1.5, 2.0, "2"):
        with pytest.raises(ArgumentTypeError, match="num_threads is an int, not"):
            CpuTransfer(geometry(), wrong)  # type: ignore[arg-type]
    assert CpuTransfer(geometry(), np.int64(2)).num_threads == 2  # type: ignore[arg-type]


def test_nothing_moves_when_an_argument_is_wrong() -> None:
    g = geometry()
    src, dst = HostPool.make(g, "layer_first", PAGES, seed=1), HostPool.make(g, "page_first", PAGES)
    before = dst.whole.copy()
    transfer = CpuTransfer(g)
    with pytest.raises(PageOwnershipError):
        transfer.backup(src.view, dst.view, [0, 1], [2, 2])
    with pytest.raises(InvalidArgumentError, match="has page 6"):
        transfer.backup(src.view, dst.view, [0, 6], [1, 2])
    with pytest.raises(InvalidArgumentError, match="src is on cuda:0, and this path copies on cpu"):
        transfer.backup(on_device(src.view), dst.view, [0], [1])
    with pytest.raises(InvalidArgumentError, match="dst is on cuda:0"):
        transfer.load_back(src.view, on_device(dst.view), [0], [1])
    with pytest.raises(InvalidArgumentError, match="both source and destination"):
        transfer.move(dst.view, [0, 1], [1, 2])
    with pytest.raises(InvalidArgumentError, match="range"):
        transfer.load_layer(src.view, dst.view, [0], [1], 3)
    with pytest.raises(InvalidArgumentError, match="dst_pages has page 2"):
        transfer.gather(src.view, [0, 1, 2], staging(g, 2)[1])
    assert np.array_equal(dst.whole, before)


def test_too_many_loops_are_refused() -> None:
    g = geometry()
    src, dst = HostPool.make(g, "layer_first", PAGES), HostPool.make(g, "page_head", PAGES)
    loops = loops_of(plan_copy(g, src.view, dst.view, *INDICES["random"]))
    six = replace(loops, src=loops.src + loops.src[:1], dst=loops.dst + loops.dst[:1])
    with pytest.raises(InvalidArgumentError, match="6 loops, at most 5"):
        cpu.run_loops(six, 3, 1, "auto")


@pytest.fixture
def lanes_restored() -> Iterator[None]:
    before = cpu.lanes()
    yield
    cpu.use_lanes(before)


@pytest.mark.usefixtures("lanes_restored")
@pytest.mark.parametrize("lanes", ["avx512", "avx2", "sse2", "memcpy"])
def test_every_set_of_lanes(lanes: Any) -> None:
    try:
        cpu.use_lanes(lanes)
    except InvalidArgumentError as error:
        pytest.skip(str(error))
    assert cpu.lanes() == lanes
    for g in SHAPES:
        for shift in (0, 3, 16, 40):
            src = HostPool.make(g, "layer_first", PAGES, seed=12, shift=shift)
            dst = HostPool.make(g, "page_first", PAGES, shift=shift // 3)
            want = expected_of(src, dst, *INDICES["runs"])
            CpuTransfer(g, num_threads=2, store="stream").backup(src.view, dst.view, *INDICES["runs"])
            assert same(dst, want)


@pytest.mark.usefixtures("lanes_restored")
def test_lanes_are_those_of_this_machine() -> None:
    with pytest.raises(InvalidArgumentError, match="no lanes 'neon' on this machine"):
        cpu.use_lanes("neon")
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    expected = (
        "avx512" if "avx512f" in flags else "avx2" if "avx2" in flags else "sse2" if "sse2" in flags else "memcpy"
    )
    assert cpu.lanes() == expected
