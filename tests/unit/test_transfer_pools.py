"""The CPU path between the pools that engines use: through every host layout and back, the KV is the same."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from radixkv.pool.device import MHATokenToKVPool, MLATokenToKVPool
from radixkv.pool.host import HostKVCache, HostPoolConfig
from radixkv.pool.layout import LAYOUTS, Layout
from radixkv.transfer.cpu import CpuTransfer, Progress
from radixkv.transfer.plan import pages_of_slots

PAGES, PAGE_SIZE, LAYERS = 12, 16, 5


def device_pool(kind: str) -> Any:
    size = PAGES * PAGE_SIZE
    if kind == "mha":
        return MHATokenToKVPool(size, PAGE_SIZE, "float16", 4, 64, LAYERS, library="numpy")
    return MLATokenToKVPool(size, PAGE_SIZE, "float16", 128, 64, LAYERS, library="numpy")


def buffers(pool: Any, kind: str) -> list[Any]:
    return [*pool.k_buffer, *pool.v_buffer] if kind == "mha" else list(pool.kv_buffer)


@pytest.mark.parametrize("kind", ["mha", "mla"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back(layout: Layout, kind: str) -> None:
    rng = np.random.default_rng(1)
    source, target = device_pool(kind), device_pool(kind)
    for buffer in buffers(source, kind):
        buffer.view(np.uint8)[:] = rng.integers(0, 256, buffer.view(np.uint8).shape, np.uint8)
    for buffer in buffers(target, kind):
        buffer.view(np.uint8)[:] = 0xA5
    host = HostKVCache(source.geometry, 10 * PAGE_SIZE, layout, config=HostPoolConfig(headroom_bytes=0))
    transfer = CpuTransfer(source.geometry, num_threads=2)
    pages, other_pages, host_pages = (rng.permutation(n)[:7] for n in (PAGES, PAGES, 10))
    slots = (pages[:, None] * PAGE_SIZE + np.arange(PAGE_SIZE)).ravel()
    transfer.backup(source.view(), host.view(), pages_of_slots(slots, PAGE_SIZE), host_pages)

    progress = Progress(LAYERS)
    target.register_layer_transfer_counter(progress)
    args = (host.view(), target.view(), host_pages, other_pages, progress)
    loading = threading.Thread(target=transfer.load_back, args=args)
    loading.start()
    kept = np.setdiff1d(np.arange(PAGES), other_pages)
    for layer in range(LAYERS):
        target.get_key_buffer(layer)  # waits for the layer
        for ours, given in zip(buffers(target, kind)[layer::LAYERS], buffers(source, kind)[layer::LAYERS], strict=True):
            ours, given = (b.view(np.uint8).reshape(-1, PAGE_SIZE, b.view(np.uint8)[0].size) for b in (ours, given))
            assert np.array_equal(ours[other_pages], given[pages])
            assert (ours[kept] == 0xA5).all()
    loading.join()
