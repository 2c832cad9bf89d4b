"""GpuTransfer with its real parts (kernels, copy engine, events) on a CuPy that simulates; streams are queues."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radixkv.errors import DeviceUnavailableError, InvalidArgumentError, StateError, TransferError
from radixkv.pool.layout import KVGeometry, KVView, Layout, view_of_layout
from radixkv.transfer import choose, gpu, pick
from radixkv.transfer.choose import Chooser, PathName
from radixkv.transfer.cpu import CpuTransfer, Progress
from radixkv.transfer.engine import CopyEngine, CudaRuntime
from radixkv.transfer.gpu import GpuTransfer, device_key
from radixkv.transfer.plan import plan_copy, reach_of
from radixkv.transfer.progress import CudaProgress
from radixkv.transfer.reference import copy_views

from .fake_cupy import FakeCupy

STREAM, COMPUTE = 0x57, 0x99
GEOMETRY = KVGeometry(kind="mha", num_layers=4, num_heads=2, head_bytes=32, page_size=4)
SLOTS = 40
IDS = [5, 1, 7, 8], [2, 0, 6, 7]
PATHS: tuple[PathName, ...] = ("kernel", "engine")


class BatchDriver:
    """A libcuda with batched copies on the fake's streams; ``calls``: copies of each."""

    def __init__(self, cupy: FakeCupy) -> None:
        self.cupy, self.cuMemcpyBatchAsync_v2 = cupy, cupy.batched_copies

    @property
    def calls(self) -> list[int]:
        assert {stream for what, _, stream in self._batches} <= {STREAM}
        return [count for _, count, _ in self._batches]

    @property
    def _batches(self) -> list[Any]:
        return [entry for entry in self.cupy.log if entry[0] == "batch"]


class Rig:
    """A host pool of known bytes, a poisoned device pool, and a transfer that is told its path."""

    def __init__(self, cupy: FakeCupy, path: PathName | None, folder: Path) -> None:
        self.cupy, self.driver = cupy, BatchDriver(cupy)
        half = GEOMETRY.num_layers * SLOTS * GEOMETRY.row_bytes
        self.host = np.random.default_rng(2).integers(0, 256, (2, half), dtype=np.uint8)
        self.device = np.full_like(self.host, 0xEE)
        self.host_view = self._view("page_first_direct", self.host, "cpu")
        self.device_view = self._view("layer_first", self.device, "cuda:0")
        self.transfer = GpuTransfer(
            GEOMETRY,
            stream=STREAM,
            engine=CopyEngine(0, CudaRuntime(0, self.driver)),
            chooser=Chooser("fake", folder=folder, override=path),
        )

    def _view(self, layout: Layout, memory: Any, device: str) -> KVView:
        view = view_of_layout(layout, GEOMETRY, SLOTS, [half.ctypes.data for half in memory], device)
        for base in map(int, view.bases.flat):
            for address in (base, base + reach_of(GEOMETRY, view) - 1):
                self.cupy.known[address] = (0 if device != "cpu" else -1, address)
        return view

    def expected(self, layers: range | None = None) -> Any:
        want = np.full_like(self.device, 0xEE)
        view = view_of_layout("layer_first", GEOMETRY, SLOTS, [half.ctypes.data for half in want])
        copy_views(plan_copy(GEOMETRY, self.host_view, view, *IDS, layers))
        return want

    def load_back(self, progress: CudaProgress | None = None, **options: Any) -> None:
        self.transfer.load_back(self.host_view, self.device_view, *IDS, progress, **options)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)  # type: ignore[arg-type]
    monkeypatch.delenv(choose.ENVIRONMENT, raising=False)
    return fake


@pytest.fixture(params=PATHS)
def rig(request: pytest.FixtureRequest, cupy: FakeCupy, tmp_path: Path) -> Rig:
    return Rig(cupy, request.param, tmp_path)


def test_a_reader_on_the_host_sees_each_layer_when_its_event_has_passed(rig: Rig) -> None:
    progress = rig.transfer.make_progress()
    rig.load_back()  # what is uploaded once is
    rig.device[:] = 0xEE
    rig.cupy.lazy = True
    rig.load_back(progress)
    assert progress.layers_done == 0
    assert not progress.wait(0, timeout_s=0.01)
    for layer in range(4):
        assert progress.wait(layer)
        assert progress.layers_done == layer + 1
        assert (rig.device == rig.expected(range(layer + 1))).all()
    assert (rig.device == rig.expected()).all()
    assert progress.wait(3, timeout_s=0)
    assert sum(rig.transfer.copies.values()) == 2


def test_a_stream_waits_for_its_layer(rig: Rig) -> None:
    """A model that reads each layer right behind wait_on_stream, on a stream that runs ahead of the copies."""
    progress = rig.transfer.make_progress(compute_stream=lambda: COMPUTE)
    rig.load_back()
    rig.device[:] = 0xEE
    rig.cupy.lazy = True
    rig.load_back(progress)
    seen: list[bool] = []
    for layer in range(4):
        progress.wait_until(layer)
        rig.cupy._on(
            COMPUTE, lambda layer=layer: seen.append(bool((rig.device == rig.expected(range(layer + 1))).all()))
        )
    while rig.cupy._queues[COMPUTE]:
        rig.cupy._step(COMPUTE)  # only as far as it asks for
    assert seen == [True] * 4


def test_the_path_is_chosen_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    choose_one = rig.transfer.chooser.choose
    monkeypatch.setattr(rig.transfer.chooser, "choose", lambda *shape: asked.append(shape) or choose_one(*shape))
    rig.load_back()
    # pages 5, 1, (7, 8) to 2, 0, (6, 7): page_first_direct keeps a layer's pages apart, so four runs a half
    assert asked == [("host_to_device", 4 * 64, 8)]
    kernel = rig.transfer.copies["kernel"]
    launched = [entry for entry in rig.cupy.log if entry[0] == "launch"]
    assert (len(launched), rig.driver.calls) == ((4, []) if kernel else (0, [8] * 4))


def test_launches_are_worked_out_once(cupy: FakeCupy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from radixkv.transfer import launch

    asked: list[int] = []
    one = launch.launches_of
    monkeypatch.setattr(launch, "launches_of", lambda plan, **options: asked.append(1) or one(plan, **options))
    Rig(cupy, "kernel", tmp_path).load_back()
    assert len(asked) == 1
    assert len([entry for entry in cupy.log if entry[0] == "launch"]) == 4


def test_the_engine_expands_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    from radixkv.transfer import engine

    expansions: list[int] = []
    expand = engine.expand
    for module in (engine, gpu):
        monkeypatch.setattr(module, "expand", lambda loops: expansions.append(1) or expand(loops))
    rig.load_back()
    assert len(expansions) == 1
    rig.transfer.backup(rig.device_view, rig.host_view, *IDS)
    assert len(expansions) == 2


def test_a_quota_reaches_the_kernels(cupy: FakeCupy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(cupy, "kernel", tmp_path)
    grids: list[int] = []
    launch = cupy.cuda.driver.launchKernel
    monkeypatch.setattr(cupy.cuda.driver, "launchKernel", lambda f, x, *rest: grids.append(x) or launch(f, x, *rest))
    monkeypatch.setattr(rig.transfer, "ctas", 1)
    rig.load_back()
    assert grids == [1] * 4
    rig.transfer.load_back(rig.host_view, rig.device_view, range_(10), range_(10), ctas=3)
    assert max(grids) <= 3
    monkeypatch.setattr(rig.transfer, "local_ctas", 2)
    quotas: list[int] = []
    monkeypatch.setattr(rig.transfer.paths["kernel"], "run", lambda plan, *, ctas, **_: quotas.append(ctas))
    rig.transfer.move(rig.device_view, [0], [1])
    assert quotas == [2], "within the device another quota holds"
    with pytest.raises(InvalidArgumentError, match="a quota of 0 blocks"):
        GpuTransfer(GEOMETRY, ctas=0)


def range_(n: int) -> list[int]:
    return list(range(n))


def test_whoever_waits_for_a_copy_that_failed_is_told(rig: Rig) -> None:
    progress = rig.transfer.make_progress()
    found: list[BaseException] = []

    def wait() -> None:
        try:
            progress.wait(3)
        except TransferError as error:
            found.append(error)

    reader = threading.Thread(target=wait)
    reader.start()
    rig.cupy.failing = "eventRecord"
    with pytest.raises(TransferError):
        rig.load_back(progress)
    reader.join(10)
    assert "the copy failed after 0 of 4 layers" in str(found[0])
    with pytest.raises(TransferError, match="the copy failed"):
        progress.wait_on_stream(0, COMPUTE)
    assert isinstance(progress.error, TransferError)
    assert not progress.fail(RuntimeError("again"))
    refused = rig.transfer.make_progress()
    with pytest.raises(InvalidArgumentError, match="page 99"):
        rig.transfer.load_back(rig.host_view, rig.device_view, [99], [0], refused)
    with pytest.raises(TransferError, match="page 99"):
        refused.wait(0)


def test_mistakes_with_progress(rig: Rig) -> None:
    with pytest.raises(InvalidArgumentError, match="progress over 3 layers for a copy of 4"):
        rig.load_back(rig.transfer.make_progress(3))
    progress = rig.transfer.make_progress()
    for layer in (-1, 4):
        with pytest.raises(InvalidArgumentError, match=f"layer {layer} is not of 0 .. 3"):
            progress.wait(layer)
    rig.load_back(progress)
    for _ in range(2):
        with pytest.raises(StateError, match=r"this one had its own \(4 layers begun\)"):
            rig.load_back(progress)
    assert progress.wait(3), "the copy that it is of is not to suffer for that"
    assert not progress.fail(RuntimeError("too late"))
    with pytest.raises(StateError, match="all 4 layers have been recorded"):
        progress.record(STREAM)
    with pytest.raises(InvalidArgumentError, match="progress over 0 layers"):
        CudaProgress(0)


def test_another_number_of_layers_fails_whoever_waits(rig: Rig) -> None:
    progress = rig.transfer.make_progress(3)
    with pytest.raises(InvalidArgumentError, match="progress over 3 layers for a copy of 4"):
        rig.load_back(progress)
    for wait in (lambda: progress.wait(0, timeout_s=1), lambda: progress.wait_on_stream(2, COMPUTE)):
        with pytest.raises(TransferError, match="progress over 3 layers"):
            wait()


def test_no_pages_complete_at_once(rig: Rig) -> None:
    progress = rig.transfer.make_progress()
    rig.transfer.load_back(rig.host_view, rig.device_view, [], [], progress)
    assert progress.layers_done == 4
    assert rig.transfer.copies == {"kernel": 0, "engine": 0}


def test_a_device_that_fails_while_somebody_waits(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = rig.transfer.make_progress()
    rig.load_back(progress)
    monkeypatch.setattr(rig.cupy.cuda.runtime, "eventQuery", lambda event: 700)
    with pytest.raises(TransferError, match="layer 1 of 4 will not arrive: CUDA error 700"):
        progress.wait(1, timeout_s=1)


# ---- transfer_for ----
@pytest.fixture
def cached(cupy: FakeCupy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    monkeypatch.setenv("RADIXKV_CACHE_DIR", str(tmp_path))
    return cupy


def test_a_pool_in_host_memory_gets_the_cpu_path(cached: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted in ("auto", "engine", "kernel"):
        monkeypatch.setenv(choose.ENVIRONMENT, wanted)
        transfer = pick.transfer_for(GEOMETRY, "cpu", num_threads=2)
        assert isinstance(transfer, CpuTransfer)
        assert transfer.num_threads == 2
        assert isinstance(transfer.make_progress(), Progress)


def test_a_pool_on_a_gpu_gets_the_gpu_path(cached: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    transfer = pick.transfer_for(GEOMETRY, "cuda", stream=STREAM, ctas=2)
    assert isinstance(transfer, GpuTransfer)
    assert (transfer.device, transfer.stream, transfer.ctas) == (0, STREAM, 2)
    assert transfer.chooser.device == device_key(0, 2)
    assert (transfer.chooser.override, transfer.chooser.tuned) == (None, False)
    monkeypatch.setenv(choose.ENVIRONMENT, "engine")
    for wanted, override in ((None, "engine"), ("kernel", "kernel"), ("auto", None)):
        transfer = pick.transfer_for(GEOMETRY, "cuda:0", path=wanted)  # type: ignore[arg-type]
        assert isinstance(transfer, GpuTransfer)
        assert transfer.chooser.override == override


def test_it_measures_if_it_may_and_nobody_has(cached: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[Any] = []

    class Timer:
        def __init__(self, device: int, paths: Any, *, quota: Any) -> None:
            timed.append((device, sorted(paths), quota("host_to_device"), quota("device_to_device")))

        def __enter__(self) -> Timer:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def seconds(self, path: PathName, *shape: object) -> float:
            return 1.0 if path == "kernel" else 2.0

    monkeypatch.setattr(gpu, "CudaTimer", Timer)
    for _ in range(2):
        transfer = pick.transfer_for(GEOMETRY, "cuda:0", tune=True)
        assert isinstance(transfer, GpuTransfer)
        assert transfer.chooser.tuned
        assert transfer.chooser.choose("host_to_device", 4 << 20, 1) == "kernel"
    assert timed == [(0, ["engine", "kernel"], 4, 32)]
    pick.transfer_for(GEOMETRY, "cuda:0", tune=True, path="kernel", ctas=7)
    assert len(timed) == 1, "an override needs no measurement"


def test_what_is_missing_is_said(cached: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgumentError, match="path is 'dma'; one of auto, kernel, engine"):
        pick.transfer_for(GEOMETRY, "cpu", path="dma")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="device 'tpu'"):
        pick.transfer_for(GEOMETRY, "tpu")
    with pytest.raises(DeviceUnavailableError, match=r"no copies for the pool on cuda:3: there is no GPU 3"):
        pick.transfer_for(GEOMETRY, "cuda:3")
    monkeypatch.setenv(choose.ENVIRONMENT, "dma")
    with pytest.raises(InvalidArgumentError, match=r"\$RADIXKV_TRANSFER is 'dma'"):
        pick.transfer_for(GEOMETRY, "cpu")
    monkeypatch.delenv(choose.ENVIRONMENT)
    monkeypatch.setitem(sys.modules, "cupy", None)  # type: ignore[arg-type]
    with pytest.raises(DeviceUnavailableError, match=r"no copies for the pool on cuda:0: CuPy .* pip install"):
        pick.transfer_for(GEOMETRY, "cuda:0")
    with pytest.raises(DeviceUnavailableError, match="CUDA events need CuPy"):
        CudaProgress(1)


def test_the_layers_of_a_part_of_the_layers(rig: Rig) -> None:
    """copy_layers goes through the plan's layers by their own numbers, whatever the first."""
    plan = rig.transfer.plan(rig.host_view, rig.device_view, *IDS, range(1, 3))
    seen: list[int] = []
    rig.transfer.copy_layers(plan, seen.append)
    assert seen == [1, 2]
    assert (rig.device == rig.expected(range(1, 3))).all()
    assert replace(plan).layers == range(1, 3)
