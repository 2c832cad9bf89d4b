"""transfer/engine.py without a GPU: a fake driver that copies host memory and writes down what it was asked."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from radixkv.errors import DeviceUnavailableError, InvalidArgumentError, TransferError
from radixkv.pool.layout import LAYOUTS, KVGeometry, KVView, Layout
from radixkv.transfer import engine
from radixkv.transfer.engine import CopyEngine, CudaRuntime, batches_of
from radixkv.transfer.loops import Runs
from radixkv.transfer.plan import CopyPlan, plan_copy
from radixkv.transfer.reference import copy_views

from .transfer_kit import INDICES, PAGES, SHAPES, HostPool, geometry, on_device, shape_name

STREAM = 7


@dataclass
class FakeRuntime:
    """Copies at once. ``batched``: whether it has batched copies."""

    batched: bool = True
    calls: list[tuple[str, int, int, int]] = field(default_factory=list)  # what, runs, bytes, stream

    def check(self, geometry: KVGeometry, view: KVView) -> None:
        pass

    def copy(self, src: int, dst: int, num_bytes: int, stream: int) -> None:
        self.calls.append(("one", 1, num_bytes, stream))
        ctypes.memmove(dst, src, num_bytes)

    def copy_batch(self, runs: Runs, stream: int) -> bool:
        if not self.batched:
            return False
        assert all(part.dtype == np.uint64 and part.ndim == 1 for part in runs)
        self.calls.append(("batch", len(runs.src), int(runs.num_bytes.sum()), stream))
        for src, dst, num_bytes in zip(*(part.tolist() for part in runs), strict=True):
            ctypes.memmove(dst, src, num_bytes)
        return True


def plan_of(src: HostPool, dst: HostPool, name: str) -> CopyPlan:
    """Device to host."""
    return plan_copy(src.geometry, on_device(src.view), dst.view, *INDICES[name])


@pytest.mark.parametrize("batched", [True, False])
def test_no_copy_spans_two_chunks_of_page_locked_memory(batched: bool) -> None:
    """Contiguous pages, which are one run otherwise, and seams in the middle of rows."""
    g = geometry("mla", layers=1, head_bytes=100, page_size=4)
    src, dst, want = (HostPool.make(g, "layer_first", PAGES, seed) for seed in (1, None, None))
    copy_views(plan_copy(g, src.view, want.view, *INDICES["contiguous"]))
    base = int(dst.view.bases[0, 0])
    seams = tuple(base + at for at in (250, 800, 1000, 5000))
    seen: list[tuple[int, int]] = []

    class Recording(FakeRuntime):
        def copy(self, src: int, dst: int, num_bytes: int, stream: int) -> None:
            seen.append((dst, num_bytes))
            super().copy(src, dst, num_bytes, stream)

        def copy_batch(self, runs: Runs, stream: int) -> bool:
            if self.batched:
                seen.extend(zip(runs.dst.tolist(), runs.num_bytes.tolist(), strict=True))
            return super().copy_batch(runs, stream)

    plan = plan_copy(g, on_device(src.view), replace(dst.view, boundaries=seams), *INDICES["contiguous"])
    work = CopyEngine(0, Recording(batched)).run(plan, stream=STREAM)
    assert [(at - base, n) for at, n in seen] == [(0, 250), (250, 550), (800, 200), (1000, 600)]
    assert work.copies == 4
    assert np.array_equal(dst.whole, want.whole)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("g", SHAPES, ids=shape_name)
def test_every_byte_lands_for_every_pair_of_layouts(g: KVGeometry, batched: bool) -> None:
    for src_layout in LAYOUTS:
        for dst_layout in LAYOUTS:
            src = HostPool.make(g, src_layout, PAGES, seed=1)
            dst, want = HostPool.make(g, dst_layout, PAGES), HostPool.make(g, dst_layout, PAGES)
            runtime = FakeRuntime(batched)
            copy_views(plan_copy(g, src.view, want.view, *INDICES["runs"]))
            work = CopyEngine(0, runtime, max_batch=50).run(plan_of(src, dst, "runs"), stream=STREAM)
            assert np.array_equal(dst.whole, want.whole)
            assert work.calls == len(runtime.calls)
            assert work.copies == sum(runs for _, runs, _, _ in runtime.calls)
            assert work.num_bytes == sum(n for _, _, n, _ in runtime.calls) == plan_of(src, dst, "runs").total_bytes
            assert {stream for *_, stream in runtime.calls} == {STREAM}
            assert batched or all(what == "one" for what, *_ in runtime.calls)


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("empty", 0),
        ("single", 1),
        ("contiguous", 1),
        ("reversed", 1),
        ("runs", 2),
        ("random", 4),
        ("begins as a run", 3),
    ],
)
def test_consecutive_pages_go_as_one_copy(name: str, runs: int) -> None:
    g = geometry("mla", layers=2)
    src, dst = HostPool.make(g, "layer_first", PAGES, seed=2), HostPool.make(g, "layer_first", PAGES)
    if name == "reversed":  # on both sides: the same pages in rising order
        plan = plan_copy(g, on_device(src.view), dst.view, [5, 4, 3], [2, 1, 0])
    else:
        plan = plan_of(src, dst, name)
    runtime = FakeRuntime()
    work = CopyEngine(0, runtime).run(plan, stream=STREAM)
    assert work.copies == runs * 2
    assert work.calls == min(runs, 1)
    assert not runtime.calls or runtime.calls[0][0] == "batch"


def test_a_single_run_needs_no_batch() -> None:
    g = geometry("mla", layers=1)
    src, dst = HostPool.make(g, "layer_first", PAGES, seed=2), HostPool.make(g, "layer_first", PAGES)
    runtime = FakeRuntime()
    assert CopyEngine(0, runtime).run(plan_of(src, dst, "contiguous"), stream=STREAM).calls == 1
    assert [what for what, *_ in runtime.calls] == ["one"]


def test_batches_are_cut_and_complete() -> None:
    g = geometry("mha", layers=3, head_bytes=8)
    src, dst = HostPool.make(g, "page_head", PAGES), HostPool.make(g, "layer_first", PAGES)
    plan = plan_of(src, dst, "random")
    [whole] = batches_of(plan)
    parts = list(batches_of(plan, 7))
    assert [len(part.src) for part in parts[:-1]] == [7] * (len(parts) - 1)
    assert 1 <= len(parts[-1].src) <= 7
    for i in range(3):
        assert np.array_equal(np.concatenate([part[i] for part in parts]), whole[i])


@pytest.mark.parametrize("stream", engine.LEGACY_STREAMS)
def test_the_legacy_stream_takes_single_copies(stream: int) -> None:
    g = geometry(layers=2)
    src, dst = HostPool.make(g, "layer_first", PAGES, seed=3), HostPool.make(g, "page_first_direct", PAGES)
    runtime = FakeRuntime()
    work = CopyEngine(0, runtime).run(plan_of(src, dst, "random"), stream=stream)
    assert [what for what, *_ in runtime.calls] == ["one"] * work.copies
    assert work.copies == 2 * 2 * 4


def test_wrong_devices_are_refused_before_anything_is_queued() -> None:
    g = geometry()
    a, b = HostPool.make(g, "layer_first", 2), HostPool.make(g, "layer_first", 2)
    runtime = FakeRuntime()
    mine = CopyEngine(1, runtime)
    for src, dst, words in (
        (on_device(a.view), b.view, "src is on cuda:0, and this engine is of cuda:1"),
        (on_device(a.view, "cuda:1"), on_device(b.view), "dst is on cuda:0"),
        (a.view, b.view, "neither side is on cuda:1"),
    ):
        with pytest.raises(InvalidArgumentError, match=words):
            mine.run(plan_copy(g, src, dst, [0], [1]))
    assert not runtime.calls
    with pytest.raises(InvalidArgumentError, match="batches of 0 copies"):
        CopyEngine(0, runtime, max_batch=0)


# ---- CuPy's runtime and the driver's batched copy ----
class FakeError(Exception):
    pass


class FakeCupy(ModuleType):
    """As much of CuPy as the path touches; ``current`` is the device that its context manager has made current."""

    def __init__(self) -> None:
        super().__init__("cupy")
        self.current: list[int] = []
        self.asked: list[tuple[int, int, int, int, int]] = []
        self.fails = False
        self.cuda = SimpleNamespace(
            Device=self._device,
            runtime=SimpleNamespace(
                memcpyAsync=self._copy, memcpyDefault=4, CUDARuntimeError=FakeError,
                pointerGetAttributes=self._attributes,
            ),
        )

    @contextlib.contextmanager
    def _device(self, number: int) -> Iterator[None]:
        self.current.append(number)
        yield
        self.current.pop()

    def _attributes(self, address: int) -> Any:
        """Managed memory, which is of both tiers."""
        assert self.current == [3]
        return SimpleNamespace(type=3, device=3, devicePointer=address)

    def _copy(self, dst: int, src: int, num_bytes: int, kind: int, stream: int) -> None:
        assert self.current == [3]
        if self.fails:
            raise FakeError("cudaErrorIllegalAddress")
        self.asked.append((dst, src, num_bytes, kind, stream))
        ctypes.memmove(dst, src, num_bytes)


class FakeDriver:
    """cuMemcpyBatchAsync in the form of CUDA 12.8 (says what failed) or 13 (does not)."""

    def __init__(self, cupy: FakeCupy, name: str, error: int = 0) -> None:
        self.cupy, self.name, self.error, self.calls = cupy, name, error, 0
        setattr(self, name, self._batch)

    def _batch(self, *given: Any) -> int:
        assert self.cupy.current == [3]
        dsts, srcs, sizes, count, attributes, first, num_attributes, *failed, stream = given
        assert len(failed) == (self.name == "cuMemcpyBatchAsync")
        self.calls += 1
        assert stream.value == STREAM
        assert num_attributes.value == 1
        assert first._obj.value == 0
        said = attributes._obj
        assert (said.source_order, said.flags, said.source.type) == (1, 0, 0)
        if self.error:
            return self.error
        arrays = [(ctypes.c_uint64 * count.value).from_address(pointer.value) for pointer in (dsts, srcs, sizes)]
        for dst, src, size in zip(*arrays, strict=True):
            ctypes.memmove(dst, src, size)
        return 0


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    return fake


def backup_through(runtime: CudaRuntime, layout: Layout = "page_first") -> bool:
    """Run a copy of several runs; whether the bytes are right."""
    g = geometry(layers=2)
    src, dst, want = (HostPool.make(g, where, PAGES, seed) for where, seed in
                      (("layer_first", 4), (layout, None), (layout, None)))  # type: ignore[arg-type]  # fmt: skip
    plan = plan_copy(g, on_device(src.view, "cuda:3"), dst.view, *INDICES["random"])
    copy_views(plan_copy(g, src.view, want.view, *INDICES["random"]))
    CopyEngine(3, runtime).run(plan, stream=STREAM)
    return np.array_equal(dst.whole, want.whole)


@pytest.mark.parametrize("name", ["cuMemcpyBatchAsync", "cuMemcpyBatchAsync_v2"])
def test_the_drivers_batched_copy_is_called_in_both_forms(cupy: FakeCupy, name: str) -> None:
    driver = FakeDriver(cupy, name)
    runtime = CudaRuntime(3, driver)
    assert runtime.has_batch
    assert backup_through(runtime)
    assert driver.calls == 1
    assert not cupy.asked


def test_a_driver_without_batches_gets_single_copies(cupy: FakeCupy) -> None:
    runtime = CudaRuntime(3, SimpleNamespace())
    assert not runtime.has_batch
    assert backup_through(runtime)
    assert len(cupy.asked) == 2 * 2 * 4 * 4
    assert {(kind, stream) for *_, kind, stream in cupy.asked} == {(4, STREAM)}


def test_a_gpu_that_cannot_batch_is_asked_once(cupy: FakeCupy) -> None:
    driver = FakeDriver(cupy, "cuMemcpyBatchAsync_v2", error=engine.NOT_SUPPORTED)
    runtime = CudaRuntime(3, driver)
    assert backup_through(runtime)
    assert backup_through(runtime)
    assert driver.calls == 1
    assert not runtime.has_batch


def test_the_drivers_errors_are_raised(cupy: FakeCupy) -> None:
    runtime = CudaRuntime(3, FakeDriver(cupy, "cuMemcpyBatchAsync", error=700))
    with pytest.raises(TransferError, match=r"cuMemcpyBatchAsync of 64 copies on cuda:3: CUDA error 700"):
        backup_through(runtime)
    cupy.fails = True
    with pytest.raises(TransferError, match="on cuda:3: cudaErrorIllegalAddress"):
        backup_through(CudaRuntime(3, SimpleNamespace()))

    def broken(address: int) -> None:
        raise FakeError("cudaErrorIllegalAddress")

    cupy.cuda.runtime.pointerGetAttributes = broken
    with pytest.raises(TransferError, match="cuda:3 does not say what it reaches: cudaErrorIllegalAddress"):
        backup_through(CudaRuntime(3, SimpleNamespace()))


def test_the_attributes_are_laid_out_as_in_cuda_h() -> None:
    fields = {name: getattr(engine._Attributes, name).offset for name, *_ in engine._Attributes._fields_}
    assert fields == {"source_order": 0, "source": 4, "destination": 12, "flags": 20}
    assert ctypes.sizeof(engine._Attributes) == 24


def test_no_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceUnavailableError, match=r"the copy engine needs CuPy"):
        CopyEngine(0)


def test_a_driver_that_cannot_be_loaded_has_no_batches(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(engine.ctypes, "CDLL", missing)
    assert not CudaRuntime(3).has_batch
