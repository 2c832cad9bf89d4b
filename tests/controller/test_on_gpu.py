"""Tree, pools, controller and the mover for GPUs together: on a GPU, and on a CuPy that simulates one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radixkv import RadixTree
from radixkv.controller import Controller, ControllerConfig, CudaMover
from radixkv.controller.mover_cuda import GpuTransfers
from radixkv.pool.layout import KVGeometry
from radixkv.pool.slots import SlotAllocator
from radixkv.pool.states import HostSlots
from tests.kernels import backends
from tests.kernels.fake_cupy import FakeCupy
from tests.kernels.gpu_checks import GEOMETRY, Gpu, Pools

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
    if simulated:  # whose streams are not for two threads at once
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


@pytest.mark.parametrize("path", ["kernel", "engine"])
def test_simulated(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from radixkv.transfer import engine

    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setenv("RADIXKV_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(engine, "_find_batch", lambda driver: (fake.batched_copies, "cuMemcpyBatchAsync_v2"))
    gpu: Any = Gpu()
    try:
        there_and_back(gpu, path, KVGeometry(kind="mha", num_layers=3, num_heads=2, head_bytes=128, page_size=4), True)
    finally:
        gpu.free()
