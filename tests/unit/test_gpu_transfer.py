"""transfer/gpu.py without a GPU: which path gets which copy, and what the timer asks of a device, by fakes."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from radixkv.errors import InvalidArgumentError, TransferError
from radixkv.pool.layout import LAYOUTS, KVGeometry, KVView, Layout
from radixkv.transfer import choose, gpu
from radixkv.transfer.choose import Chooser
from radixkv.transfer.engine import CopyEngine, LayerRuns
from radixkv.transfer.gpu import CudaTimer, GpuTransfer, device_key, shape_of
from radixkv.transfer.loops import Runs, expand, loops_of
from radixkv.transfer.plan import CopyPlan, plan_copy
from radixkv.transfer.reference import copy_views

from .transfer_kit import INDICES, PAGES, SHAPES, HostPool, geometry, on_device, shape_name

BIG = geometry("mla", layers=2, head_bytes=4096, page_size=16)  # 64 KiB a page and layer
SMALL = geometry("mha", layers=2, heads=2, head_bytes=24, page_size=4)


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(choose.ENVIRONMENT, raising=False)


@dataclass
class FakePath:
    """Copies at once, with the oracle, as if all memory were the host's."""

    plans: list[tuple[CopyPlan, int]] = field(default_factory=list)
    copies: bool = True

    def run(self, plan: CopyPlan, *, stream: int = 0, ctas: int = 4, runs: Any = None) -> None:
        self.plans.append((plan, stream))
        if self.copies:
            here = [on_device(view, "cpu") for view in (plan.src, plan.dst)]
            copy_views(plan_copy(plan.geometry, *here, plan.src_pages, plan.dst_pages, plan.layers))


    def run_layers(
        self, plan: CopyPlan, *, stream: int = 0, ctas: int = 4, after_layer: Any = None, runs: Any = None
    ) -> None:
        for layer in plan.layers:
            self.run(plan.layer(layer), stream=stream, ctas=ctas)
            if after_layer is not None:
                after_layer(layer)


def transfer_of(g: Any, folder: Path, **options: Any) -> tuple[GpuTransfer, FakePath, FakePath]:
    kernels, engine = FakePath(), FakePath()
    chooser = Chooser("fake", folder=folder, **options)
    return GpuTransfer(g, 0, stream=7, kernels=kernels, engine=engine, chooser=chooser), kernels, engine


def test_long_runs_go_to_the_engine_and_short_ones_to_the_kernels(tmp_path: Path) -> None:
    for g, wanted in ((BIG, "engine"), (SMALL, "kernel")):
        transfer, kernels, engine = transfer_of(g, tmp_path)
        src, dst, want = (HostPool.make(g, "layer_first", PAGES, seed) for seed in (1, None, None))
        copy_views(plan_copy(g, src.view, want.view, *INDICES["random"]))
        transfer.backup(on_device(src.view), dst.view, *INDICES["random"])
        assert np.array_equal(dst.whole, want.whole)
        assert transfer.copies == {"kernel": int(wanted == "kernel"), "engine": int(wanted == "engine")}
        assert [stream for _, stream in kernels.plans + engine.plans] == [7]


def test_consecutive_pages_count_as_one_run(tmp_path: Path) -> None:
    """8 KiB pages: alone below the crossover, four in a row above it."""
    g = geometry("mla", layers=1, head_bytes=8192, page_size=1)
    transfer, _, _ = transfer_of(g, tmp_path)
    src, dst = HostPool.make(g, "layer_first", PAGES, seed=1), HostPool.make(g, "layer_first", PAGES)
    transfer.backup(on_device(src.view), dst.view, *INDICES["random"])
    assert transfer.copies == {"kernel": 1, "engine": 0}
    transfer.backup(on_device(src.view), dst.view, *INDICES["contiguous"])
    assert transfer.copies == {"kernel": 1, "engine": 1}


def test_an_override_decides(tmp_path: Path) -> None:
    transfer, _, engine = transfer_of(SMALL, tmp_path, override="engine")
    src, dst = HostPool.make(SMALL, "page_first", PAGES, seed=1), HostPool.make(SMALL, "layer_first", PAGES)
    transfer.load_layer(src.view, on_device(dst.view), *INDICES["random"], 1)
    assert len(engine.plans) == 1


def test_load_back_goes_layer_by_layer(tmp_path: Path) -> None:
    transfer, kernels, _ = transfer_of(SMALL, tmp_path)
    src, dst, want = (HostPool.make(SMALL, "page_head", PAGES, seed) for seed in (2, None, None))
    copy_views(plan_copy(SMALL, src.view, want.view, *INDICES["runs"]))
    transfer.load_back(src.view, on_device(dst.view), *INDICES["runs"])
    assert np.array_equal(dst.whole, want.whole)
    assert [plan.layers for plan, _ in kernels.plans] == [range(1), range(1, 2)]


def test_empty_copies_ask_nobody(tmp_path: Path) -> None:
    transfer, kernels, engine = transfer_of(SMALL, tmp_path)
    pool = HostPool.make(SMALL, "page_head", PAGES)
    transfer.move(on_device(pool.view), [], [])
    assert not kernels.plans + engine.plans
    assert transfer.copies == {"kernel": 0, "engine": 0}


def test_the_shape_of_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    g = geometry("mla", layers=3, head_bytes=100, page_size=2)
    a, b = HostPool.make(g, "layer_first", PAGES), HostPool.make(g, "layer_first", PAGES)
    there = on_device(b.view)
    assert shape_of(plan_copy(g, a.view, there, *INDICES["random"])) == ("host_to_device", 200, 12)
    assert shape_of(plan_copy(g, there, a.view, *INDICES["contiguous"])) == ("device_to_host", 800, 3)
    assert shape_of(plan_copy(g, there, there, [0, 1], [4, 5])) == ("device_to_device", 400, 3)
    monkeypatch.setattr(gpu, "EXACT_RUNS", 11)
    assert shape_of(plan_copy(g, there, a.view, *INDICES["contiguous"])) == ("device_to_host", 200, 12)
    with pytest.raises(InvalidArgumentError, match="neither side is on a GPU"):
        shape_of(plan_copy(g, a.view, b.view, [0], [0]))


@pytest.mark.parametrize("g", SHAPES, ids=shape_name)
def test_the_engine_goes_layer_by_layer(g: KVGeometry) -> None:
    """Every pair of layouts: after each layer its bytes, and no others, are in place."""
    for layouts in itertools.product(LAYOUTS, LAYOUTS):
        check_layer_by_layer(g, *layouts)


def check_layer_by_layer(g: KVGeometry, src_layout: Layout, dst_layout: Layout) -> None:
    src = HostPool.make(g, src_layout, PAGES, seed=1)
    dst, want = HostPool.make(g, dst_layout, PAGES), HostPool.make(g, dst_layout, PAGES)
    plan = plan_copy(g, src.view, on_device(dst.view), *INDICES["runs"])
    engine, last = CopyEngine(0, MemmoveRuntime(), max_batch=50), g.num_layers - 1

    def check(layer: int) -> None:
        copy_views(plan_copy(g, src.view, want.view, *INDICES["runs"], range(layer, layer + 1)))
        if layer in (0, 1, last):
            assert np.array_equal(dst.whole, want.whole), (src_layout, dst_layout, layer)

    work = engine.run_layers(plan, stream=7, after_layer=check)
    assert work.num_bytes == plan.total_bytes
    assert work.copies == LayerRuns(plan).runs_a_layer * g.num_layers
    alone = [engine.run(plan.layer(layer), stream=7).copies for layer in (0, last)]
    assert LayerRuns(plan).runs_a_layer >= max(alone), "by itself, a layer's halves may be merged, too"


class MemmoveRuntime:
    """Copies at once, batches too."""

    def check(self, geometry: KVGeometry, view: KVView) -> None:
        pass

    def copy(self, src: int, dst: int, num_bytes: int, stream: int) -> None:
        ctypes.memmove(dst, src, num_bytes)

    def copy_batch(self, runs: Runs, stream: int) -> bool:
        for run in zip(*(part.tolist() for part in runs), strict=True):
            self.copy(*run, stream)
        return True


# ---- the timer ----
class FakeError(Exception):
    pass


class FakeCupy(ModuleType):
    """Events on a clock that each copy moves on; memory is numpy's."""

    def __init__(self) -> None:
        super().__init__("cupy")
        self.clock_ms, self.step_ms, self.allocations = 0.0, 2.0, 0
        self.fail_after = 100
        self.busy: list[tuple[int, int]] = []  # copies that keep the stream busy
        self.memory: dict[int, Any] = {}
        self.freed: list[str] = []
        properties = {"name": b"Fake 100", "multiProcessorCount": 8, "asyncEngineCount": 3}
        runtime = SimpleNamespace(
            malloc=lambda size: self._allocate(size, "device"),
            hostAlloc=lambda size, flags: self._allocate(size, "host"),
            free=lambda address: self._free(address, "device"),
            freeHost=lambda address: self._free(address, "host"),
            memcpyAsync=lambda to, come, size, kind, stream: self.busy.append((size, stream)),
            memcpyHostToDevice=1,
            CUDARuntimeError=FakeError,
            getDeviceProperties=lambda device: properties,
            driverGetVersion=lambda: 12080,
        )
        self.cuda = SimpleNamespace(
            runtime=runtime,
            Device=lambda number: contextlib.nullcontext(),
            Stream=lambda non_blocking: SimpleNamespace(ptr=99, synchronize=lambda: None),
            Event=self._event,
            get_elapsed_time=lambda start, end: end.at - start.at,
        )

    def _event(self) -> Any:
        event = SimpleNamespace(at=0.0, synchronize=lambda: None)
        event.record = lambda stream: setattr(event, "at", self.clock_ms)
        return event

    def _allocate(self, size: int, kind: str) -> int:
        self.allocations += 1
        if self.allocations > self.fail_after:
            raise FakeError("cudaErrorMemoryAllocation")
        block = np.zeros(size, np.uint8)
        self.memory[block.ctypes.data] = (kind, block)
        return block.ctypes.data

    def _free(self, address: int, kind: str) -> None:
        assert self.memory.pop(address)[0] == kind


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCupy]:
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    yield fake
    assert not fake.memory  # all scratch memory went back


class TimedPath(FakePath):
    def __init__(self, cupy: FakeCupy) -> None:
        super().__init__(copies=False)
        self.cupy = cupy

    def run(self, plan: CopyPlan, *, stream: int = 0, ctas: int = 4, runs: Any = None) -> None:
        super().run(plan, stream=stream)
        self.cupy.clock_ms += self.cupy.step_ms


def test_the_timer_times_the_second_of_two_copies(cupy: FakeCupy) -> None:
    path = TimedPath(cupy)
    with CudaTimer(0, {"kernel": path, "engine": path}, scratch_bytes=1 << 16) as timer:
        for direction, devices in (("device_to_host", ("cuda:0", "cpu")), ("host_to_device", ("cpu", "cuda:0")),
                                   ("device_to_device", ("cuda:0", "cuda:0"))):  # fmt: skip
            path.plans.clear()
            assert timer.seconds("kernel", direction, 512, 16) == pytest.approx(2e-3)  # type: ignore[arg-type]
            assert [stream for _, stream in path.plans] == [99, 99]
            assert cupy.busy.pop() == (1 << 16, 99)
            plan = path.plans[0][0]
            assert (plan.src.device, plan.dst.device) == devices
            assert int(plan.src.bases[0, 0]) != int(plan.dst.bases[0, 0])
            runs = expand(loops_of(plan, sort_pages=True))
            assert runs.num_bytes.tolist() == [512] * 16


def test_no_scratch_memory(cupy: FakeCupy) -> None:
    cupy.fail_after = 2
    with pytest.raises(TransferError, match="no scratch memory to time copies on cuda:0"):
        CudaTimer(0, {}).__enter__()


def test_tuning_measures_once(cupy: FakeCupy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "RUN_BYTES", (512, 1024))
    monkeypatch.setattr(choose, "NUM_RUNS", (1, 16))
    slow, fast = TimedPath(cupy), TimedPath(cupy)

    def run_slowly(plan: CopyPlan, **_: object) -> None:
        cupy.clock_ms += 50

    monkeypatch.setattr(slow, "run", run_slowly)
    chooser = Chooser(device_key(0), folder=tmp_path)
    transfer = GpuTransfer(SMALL, kernels=slow, engine=fast, chooser=chooser)
    assert transfer.tune()
    assert not transfer.tune()
    assert chooser.choose("device_to_host", 512, 1) == "engine"  # untuned, short runs go to the kernels
    assert transfer.tune(again=True)
    assert device_key(0) == "Fake 100, 8 SMs, 3 copy engines, driver 12080, 4/32 CTAs"
    assert device_key(0, 8) != device_key(0), "a measurement with another quota is another one"
