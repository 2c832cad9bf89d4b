"""Tree, pools, controller and the mover for GPUs together: on a GPU, and on a CuPy that simulates one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radixkv import RadixTree
from radixkv.controller import Controller, ControllerConfig, CudaMover, mover_cuda
from radixkv.controller.mover_cuda import GpuTransfers
from radixkv.pool.layout import KVGeometry
from radixkv.pool.slots import SlotAllocator
from radixkv.pool.states import HostSlots
from radixkv.transfer import engine
from tests.kernels import backends
from tests.kernels.fake_cupy import FakeCupy
from tests.kernels.gpu_checks import GEOMETRY, Gpu, Pools

from .gpu_kit import GpuStacks
from .soak import ThreadedSoak

WAIT_S = 30.0


def there_and_back(gpu: Gpu, path: str, g: KVGeometry, simulated: bool) -> None:
    """Prompts are backed up, evicted, and loaded back under a model that reads each layer as soon as it may."""
    pools = Pools(gpu, g, 48, "page_first_direct")
    compute = gpu.stream()
    device, host = SlotAllocator(pools.pages), HostSlots(pools.pages, g.page_size)
    host.geometry = g  # type: ignore[attr-defined]
    mover = CudaMover(
        g, pools.device, pools.host, lambda: int(compute.ptr), transfer_on=GpuTransfers(g, 0, path).on  # type: ignore[arg-type]
    )
    controller = Controller(
        RadixTree(g.page_size), device, host, mover, config=ControllerConfig(write_policy="write_through")
    )
    prompts = [np.arange(16 * g.page_size, dtype=np.int32) + 10_000 * number for number in range(2)]
    pages = [device.alloc(16) for _ in prompts]
    for tokens, own in zip(prompts, pages, strict=True):
        assert own is not None
        controller.insert(tokens, own)
    for op in controller._writes.operations:
        assert op.ticket.wait(WAIT_S)
    assert controller.poll().writes == 2
    assert controller.stats().backup_failures == 0
    assert controller.evict(10**6) == 32 * g.page_size
    pools.clobber(pools.device_at)
    device.alloc(5)  # other pages than before
    loads = [controller.load(controller.match(tokens).host_node) for tokens in prompts]
    seen_at = [gpu.device(pools.half_bytes) for _ in range(g.halves)]
    layer_bytes = pools.half_bytes // g.num_layers
    controller.layer_counter.set_consumer(controller.start_loads())
    if simulated:  # whose reader would not wait for a copy that is not on its stream yet
        assert controller._loads.batches[0].ticket.wait(WAIT_S)
    for layer in range(g.num_layers):
        controller.layer_counter.wait_until(layer)  # makes the compute stream wait
        for seen, address in zip(seen_at, pools.device_at, strict=True):
            gpu.copy(seen + layer * layer_bytes, address + layer * layer_bytes, layer_bytes, compute)
    compute.synchronize()
    found = pools.by_page(np.stack([gpu.read(address, pools.half_bytes) for address in seen_at]))
    written = pools.by_page(pools.content)
    for own, load in zip(pages, loads, strict=True):
        assert load is not None
        assert np.array_equal(found[:, :, load.page_ids], written[:, :, own]), "the model read wrong bytes"
    assert controller._loads.batches[0].ticket.wait(WAIT_S)
    assert controller.poll().loads == 2
    controller.check_integrity()
    controller.reset()
    assert controller.close()


@pytest.mark.parametrize("path", ["kernel", "engine"])
def test_on_a_gpu(path: str) -> None:
    backends.backend("cuda")
    gpu = Gpu()
    try:
        there_and_back(gpu, path, GEOMETRY, False)
    finally:
        gpu.free()


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setenv("RADIXKV_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(engine, "_find_batch", lambda driver: (fake.batched_copies, "cuMemcpyBatchAsync_v2"))
    return fake


@pytest.mark.parametrize("path", ["kernel", "engine"])
def test_simulated(path: str, fake: FakeCupy) -> None:
    gpu: Any = Gpu()
    try:
        there_and_back(gpu, path, KVGeometry(kind="mha", num_layers=3, num_heads=2, head_bytes=128, page_size=4), True)
    finally:
        gpu.free()


def soak(path: Any, seeds: range, steps: int) -> dict[str, int]:
    """The stack's random runs, with copies over the mover for GPUs. Returns: copies by path."""
    stacks = GpuStacks(path)
    served = 0
    for seed in seeds:
        run = ThreadedSoak(seed, stacks)
        try:
            run.run(steps)
        finally:
            run.stack.close()
        served += run.served_pages
    stacks.free()
    assert served > 0
    return stacks.copies


@pytest.mark.parametrize("path", ["kernel", "engine"])
def test_random_runs_on_a_gpu(path: str) -> None:
    backends.backend("cuda")
    assert soak(path, range(3), 2000)[path] > 0


@pytest.mark.parametrize("path", ["kernel", "engine"])
@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
def test_random_runs_simulated(path: str, lazy: bool, fake: FakeCupy) -> None:
    """lazy: nothing that is put on a stream happens before somebody waits for it."""
    fake.lazy = lazy
    assert soak(path, range(2), 600)[path] > 0


@pytest.mark.parametrize("what", ["backups", "loads"])
def test_random_runs_see_a_copy_that_nobody_waits_for(
    what: str, fake: FakeCupy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """backups: the copy does not wait for what computes; loads: what computes does not wait for the copy."""
    fake.lazy = True
    if what == "backups":
        monkeypatch.setattr(mover_cuda.CupyStreams, "wait", lambda *_: None)
    else:
        monkeypatch.setattr(mover_cuda.StreamProgress, "wait", lambda *_: True)
        monkeypatch.setattr(mover_cuda.CupyStreams, "finish", lambda *_: None)
    with pytest.raises(AssertionError, match="wrong bytes are served"):
        soak("engine", range(80), 600)  # ends with the first; which run it is depends on the threads
