"""Checks that need a GPU, as plain functions: test_on_gpu.py runs them under pytest, on_gpu.py without.

Each takes a ``Gpu`` and an empty folder, returns its figures, raises ``Absent`` where the machine lacks something that
is not radixkv's to bring, and fails by AssertionError or whatever it meets. Bytes are random, destinations poisoned.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from radixkv.errors import TransferError
from radixkv.pool.layout import LAYOUTS, KVGeometry, KVView, Layout, view_of_layout
from radixkv.transfer.choose import RUN_BYTES, Chooser, PathName
from radixkv.transfer.gpu import GpuTransfer
from radixkv.transfer.pick import transfer_for
from radixkv.transfer.plan import plan_copy
from radixkv.transfer.progress import CudaProgress

POISON = 0xEE
SPIN = r"""
extern "C" __global__ void spin(unsigned long long ns)
{
    unsigned long long start, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
    do {
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    } while (now - start < ns);
}
"""

Bytes = npt.NDArray[np.uint8]
Figures = dict[str, Any]


class Absent(Exception):
    """What a check needs and this machine does not have."""


class Gpu:
    """GPU 0 through CuPy's runtime: memory by address, streams, a kernel that does nothing for a while."""

    def __init__(self) -> None:
        self.cupy: Any = importlib.import_module("cupy")
        self.runtime: Any = self.cupy.cuda.runtime
        self._held: list[tuple[Any, int]] = []
        self._spin: Any = None
        self.sms = int(self.runtime.getDeviceProperties(0)["multiProcessorCount"])

    def device(self, num_bytes: int) -> int:
        address = int(self.runtime.malloc(num_bytes))
        self._held.append((self.runtime.free, address))
        return address

    def host(self, num_bytes: int) -> int:
        """Page-locked."""
        address = int(self.runtime.hostAlloc(num_bytes, 0))
        self._held.append((self.runtime.freeHost, address))
        return address

    def free(self) -> None:
        self.runtime.deviceSynchronize()
        while self._held:
            free, address = self._held.pop()
            free(address)

    def stream(self) -> Any:
        return self.cupy.cuda.Stream(non_blocking=True)

    def copy(self, dst: int, src: int, num_bytes: int, stream: Any) -> None:
        self.runtime.memcpyAsync(dst, src, num_bytes, self.runtime.memcpyDefault, stream.ptr)

    def write(self, address: int, content: Bytes) -> None:
        self.runtime.memcpy(address, content.ctypes.data, content.nbytes, self.runtime.memcpyDefault)
        self.runtime.deviceSynchronize()

    def read(self, address: int, num_bytes: int) -> Bytes:
        found = np.empty(num_bytes, np.uint8)
        self.runtime.memcpy(found.ctypes.data, address, num_bytes, self.runtime.memcpyDefault)
        return found

    def spin(self, stream: Any, ns: int, blocks: int = 1) -> None:
        """Keep ``blocks`` blocks of 128 threads busy for a time, on a stream."""
        if self._spin is None:
            self._spin = self.cupy.RawKernel(SPIN, "spin")
            self._spin.compile()
        with stream:
            self._spin((blocks,), (128,), (np.uint64(ns),))

    def event(self, stream: Any) -> Any:
        event = self.cupy.cuda.Event()
        event.record(stream)
        return event

    def ms(self, start: Any, end: Any) -> float:
        end.synchronize()
        return float(self.cupy.cuda.get_elapsed_time(start, end))


class Pools:
    """A device pool (layer_first) and a page-locked host pool, of one geometry and size, by address."""

    def __init__(self, gpu: Gpu, g: KVGeometry, pages: int, layout: Layout) -> None:
        self.gpu, self.g, self.pages = gpu, g, pages
        self.half_bytes = pages * g.page_bytes // g.halves
        self.device_at = [gpu.device(self.half_bytes) for _ in range(g.halves)]
        self.host_at = [gpu.host(self.half_bytes) for _ in range(g.halves)]
        slots = pages * g.page_size
        self.device: KVView = view_of_layout("layer_first", g, slots, self.device_at, "cuda:0")
        self.host: KVView = view_of_layout(layout, g, slots, self.host_at)
        self.content = np.random.default_rng(pages).integers(0, 256, (g.halves, self.half_bytes), dtype=np.uint8)
        self.clobber(self.host_at)
        for address, half in zip(self.device_at, self.content, strict=True):
            gpu.write(address, half)

    def clobber(self, addresses: list[int]) -> None:
        for address in addresses:
            self.gpu.write(address, np.full(self.half_bytes, POISON, np.uint8))

    def ids(self, seed: int, count: int | None = None) -> npt.NDArray[np.int64]:
        return np.random.default_rng(seed).permutation(self.pages)[: count or self.pages // 2]

    def by_page(self, halves: Bytes) -> Bytes:
        """[halves, layers, pages, bytes] of what a layer_first pool holds."""
        return halves.reshape(self.g.halves, self.g.num_layers, self.pages, -1)

    def expected(self, device_pages: npt.NDArray[np.int64]) -> Bytes:
        """The device pool after these pages came back, and the others were clobbered."""
        want = np.full_like(self.content, POISON)
        self.by_page(want)[:, :, device_pages] = self.by_page(self.content)[:, :, device_pages]
        return want

    def read(self) -> Bytes:
        return np.stack([self.gpu.read(address, self.half_bytes) for address in self.device_at])


def forced(gpu: Gpu, g: KVGeometry, path: PathName, stream: Any, folder: Path) -> GpuTransfer:
    """A transfer that takes one path."""
    return GpuTransfer(g, stream=stream.ptr, chooser=Chooser("checks", folder=folder, override=path))


GEOMETRY = KVGeometry(kind="mha", num_layers=8, num_heads=8, head_bytes=256, page_size=16)


def end_to_end(path: PathName, layout: Layout, g: KVGeometry = GEOMETRY, pages: int = 64) -> Callable[..., Figures]:
    """pool -> backup -> clobber -> load_back layer by layer, with a model that reads each layer as soon as it may."""

    def check(gpu: Gpu, folder: Path) -> Figures:
        pools, load, compute = Pools(gpu, g, pages, layout), gpu.stream(), gpu.stream()
        transfer = forced(gpu, g, path, load, folder)
        device_pages, host_pages = pools.ids(1), pools.ids(2)
        transfer.backup(pools.device, pools.host, device_pages, host_pages)
        load.synchronize()
        pools.clobber(pools.device_at)
        seen_at = [gpu.device(pools.half_bytes) for _ in range(g.halves)]
        early_at = gpu.device(pools.half_bytes)
        layer_bytes = pools.half_bytes // g.num_layers
        progress = transfer.make_progress()
        gpu.spin(load, 50_000_000)  # the load has 50 ms of work before it: a reader that does not wait is too early
        transfer.load_back(pools.host, pools.device, host_pages, device_pages, progress)
        gpu.copy(early_at, pools.device_at[0], layer_bytes, compute)
        early = progress.layers_done
        for layer in range(g.num_layers):
            progress.wait_on_stream(layer, compute.ptr)
            for seen, address in zip(seen_at, pools.device_at, strict=True):
                gpu.copy(seen + layer * layer_bytes, address + layer * layer_bytes, layer_bytes, compute)
        compute.synchronize()
        assert progress.wait(g.num_layers - 1)
        assert progress.layers_done == g.num_layers
        want = pools.expected(device_pages)
        seen = np.stack([gpu.read(address, pools.half_bytes) for address in seen_at])
        assert np.array_equal(seen, want), f"the model read {int((seen != want).sum())} wrong bytes of {want.size}"
        assert np.array_equal(pools.read(), want)
        assert early == 0
        too_early = gpu.read(early_at, layer_bytes)
        assert (too_early == POISON).all(), "a reader that did not wait found the layer: this check cannot fail"
        assert transfer.copies[path] == 2
        return {"bytes": plan_copy(g, pools.host, pools.device, host_pages, device_pages).total_bytes}

    return check


def check_batches(gpu: Gpu, folder: Path) -> Figures:
    """cuMemcpyBatchAsync: there, used, one call for many copies, right; and single copies give the same."""
    from radixkv.transfer.engine import CopyEngine, CudaRuntime

    pools, stream = Pools(gpu, GEOMETRY, 64, "page_first_direct"), gpu.stream()
    runtime = CudaRuntime(0)
    version = gpu.runtime.driverGetVersion()
    pages = pools.ids(3), pools.ids(4)
    out = plan_copy(GEOMETRY, pools.device, pools.host, *pages)
    home = plan_copy(GEOMETRY, pools.host, pools.device, *pages[::-1])
    figures: Figures = {"driver": version, "has_batch": runtime.has_batch}
    for batched in (True, False):
        if not batched:
            runtime._batch = None
        work = CopyEngine(0, runtime).run(out, stream=stream.ptr)
        stream.synchronize()
        pools.clobber(pools.device_at)
        back = CopyEngine(0, runtime).run(home, stream=stream.ptr)
        stream.synchronize()
        want = pools.expected(pages[0])
        assert np.array_equal(pools.read(), want)
        pools.content = want
        pools.clobber(pools.host_at)
        figures["batched" if batched else "single"] = {"backup": tuple(work), "load_back": tuple(back)}
        if batched and version >= 12080:
            assert runtime.has_batch, "a driver of CUDA 12.8 or later refused batches"
            assert work.calls < work.copies
    return figures


def check_tune(gpu: Gpu, folder: Path) -> Figures:
    """transfer_for measures once, keeps it, and reads it again; every path of every copy is then what was faster."""
    before = os.environ.get("RADIXKV_CACHE_DIR")
    os.environ["RADIXKV_CACHE_DIR"] = str(folder)
    try:
        start = time.monotonic()
        transfer = transfer_for(GEOMETRY, "cuda:0", path="auto", tune=True)
        seconds = time.monotonic() - start
        assert isinstance(transfer, GpuTransfer)
        assert transfer.chooser.tuned
        assert transfer.chooser.path.is_file()
        again = transfer_for(GEOMETRY, "cuda:0", path="auto")
        assert isinstance(again, GpuTransfer)
        assert again.chooser.tuned
        assert again.chooser._table == transfer.chooser._table
        assert not again.tune()
    finally:
        os.environ.pop("RADIXKV_CACHE_DIR")
        if before is not None:
            os.environ["RADIXKV_CACHE_DIR"] = before
    choices = {
        f"{direction}, {runs} runs": {str(size): again.chooser.choose(direction, size, runs) for size in RUN_BYTES}
        for direction in ("device_to_host", "host_to_device", "device_to_device")
        for runs in (16, 4096)
    }
    times = [[*point, taken["kernel"], taken["engine"]] for point, taken in again.chooser._table.items()]
    return {"tune_seconds": seconds, "choices": choices, "times": times}


def check_overlap(gpu: Gpu, folder: Path, path: PathName) -> Figures:
    """A load back and work of the same length beside it take less together than one after the other, by event times."""
    g = replace(GEOMETRY, num_layers=16)
    pools, load, compute = Pools(gpu, g, 512, "page_first_direct"), gpu.stream(), gpu.stream()
    transfer = forced(gpu, g, path, load, folder)
    host_pages, device_pages = pools.ids(5), pools.ids(6)

    def load_back(progress: CudaProgress | None = None) -> None:
        transfer.load_back(pools.host, pools.device, host_pages, device_pages, progress)

    def timed(*, copies: bool, work_ns: int) -> tuple[float, float, float, CudaProgress, Any]:
        """ms until the copy, the work, and both have ended."""
        load.synchronize()
        compute.synchronize()
        progress = transfer.make_progress(timing=True)
        gpu.spin(load, 5_000_000)  # Python puts everything on the streams meanwhile
        start = gpu.event(load)
        gpu.runtime.streamWaitEvent(compute.ptr, start.ptr)
        if work_ns:
            gpu.spin(compute, work_ns, gpu.sms)
        work_end = gpu.event(compute)
        if copies:
            load_back(progress)
        load_end = gpu.event(load)
        took = gpu.ms(start, load_end), gpu.ms(start, work_end)
        return *took, max(took), progress, start

    load_back()
    load.synchronize()
    gpu.spin(compute, 1000)
    copy_ms = min(timed(copies=True, work_ns=0)[0] for _ in range(3))
    work_ms = timed(copies=False, work_ns=int(copy_ms * 1e6))[1]
    load_ms, busy_ms, both_ms, progress, start = timed(copies=True, work_ns=int(copy_ms * 1e6))
    layers_ms = [gpu.ms(start, event) for event in progress.events]
    assert layers_ms == sorted(layers_ms)
    during = sum(ms < busy_ms for ms in layers_ms)
    assert during >= g.num_layers // 2, f"{during} of {g.num_layers} layers arrived while the work ran: {layers_ms}"
    assert both_ms < 0.8 * (copy_ms + work_ms), f"{both_ms} ms together; alone {copy_ms} and {work_ms}"
    return {
        "copy_ms": copy_ms,
        "work_ms": work_ms,
        "both_ms": both_ms,
        "copy_beside_work_ms": load_ms,
        "layers_ms": layers_ms,
        "gb_per_s": pools.half_bytes / copy_ms / 1e6,  # half of the pages of two halves
    }


SMALL_CHUNK = 384 << 10
"""Runs of ``check_locked_pool`` are 512 KiB long."""


def check_locked_pool(gpu: Gpu, folder: Path) -> Figures:
    """HostKVCache locks its arena, in one chunk and in several; a copy across two chunks is right or refused."""
    from radixkv.pool.host import HostKVCache, HostPoolConfig
    from radixkv.pool.pinning import cuda_registrar

    registrar = cuda_registrar()
    figures: Figures = {"registrar": registrar.name}
    for chunk_bytes in (64 << 30, SMALL_CHUNK):
        g, pages = GEOMETRY, 16
        pools, stream = Pools(gpu, g, pages, "layer_first"), gpu.stream()
        slots = pages * g.page_size
        config = HostPoolConfig(pin_chunk_bytes=chunk_bytes, headroom_bytes=1 << 30)
        cache = HostKVCache(g, slots, "layer_first", registrar=registrar, config=config)
        try:
            assert cache.pinned
            for path in ("kernel", "engine"):
                transfer = forced(gpu, g, path, stream, folder)
                every = np.arange(pages)
                key = f"{path}, {-(-slots * g.token_bytes // chunk_bytes)} chunks"
                try:
                    transfer.backup(pools.device, cache.view(), every, every)
                    stream.synchronize()
                    pools.clobber(pools.device_at)
                    transfer.load_back(cache.view(), pools.device, every, every)
                    stream.synchronize()
                except TransferError as error:
                    gpu.runtime.deviceSynchronize()
                    assert chunk_bytes == SMALL_CHUNK, "one chunk must work"
                    figures[key] = str(error)
                    continue
                assert np.array_equal(pools.read(), pools.content)
                figures[key] = "right"
        finally:
            cache.close()
    return figures


def check_pool(gpu: Gpu, folder: Path, library: str) -> Figures:
    """radixkv's device pool as torch tensors or CuPy arrays, its host pool, and transfer_for: there and back."""
    from radixkv.pool.device import MHATokenToKVPool, MLATokenToKVPool
    from radixkv.pool.host import MHATokenToKVPoolHost, MLATokenToKVPoolHost

    try:
        importlib.import_module(library)
    except ImportError as error:
        raise Absent(f"{library} cannot be imported: {error}") from error
    where: Any = {"device": "cuda:0", "library": library}
    copies = {}
    for kind in ("mha", "mla"):
        for layout in LAYOUTS:
            pool: Any
            host: Any
            if kind == "mha":
                pool = MHATokenToKVPool(1024, 16, "float16", 4, 32, 3, **where)
                host = MHATokenToKVPoolHost(pool, 2.0, 0, 16, layout)
            else:
                pool = MLATokenToKVPool(1024, 16, "float16", 512, 64, 3, **where)
                host = MLATokenToKVPoolHost(pool, 2.0, 0, 16, layout)
            try:
                stream = gpu.stream()
                transfer = transfer_for(pool.geometry, pool.device, stream=stream.ptr)
                assert isinstance(transfer, GpuTransfer)
                assert host.pinned
                buffers = _bytes_of(pool, library)
                rng = np.random.default_rng(7)
                content = [rng.integers(0, 256, tuple(b.shape), dtype=np.uint8) for b in buffers]
                for buffer, data in zip(buffers, content, strict=True):
                    _fill(buffer, data, library)
                device_pages, host_pages = rng.permutation(64)[:20] + 1, rng.permutation(128)[:20]
                gpu.runtime.deviceSynchronize()
                transfer.backup(pool.view(), host.view(), device_pages, host_pages)
                stream.synchronize()
                for buffer in buffers:
                    buffer[...] = POISON
                gpu.runtime.deviceSynchronize()
                progress = transfer.make_progress()
                transfer.load_back(host.view(), pool.view(), host_pages, device_pages, progress)
                pool.register_layer_transfer_counter(progress)
                kept = np.zeros(content[0].shape[0], bool)
                kept[(device_pages[:, None] * 16 + np.arange(16)).ravel()] = True
                for layer in range(3):
                    pool.get_key_buffer(layer)  # waits for the layer
                    for half in range(len(buffers) // 3):
                        at = half * 3 + layer
                        found = _fetch(buffers[at])
                        assert (found[kept] == content[at][kept]).all(), (kind, layout, layer, half)
                        assert (found[~kept] == POISON).all(), (kind, layout, layer, half)
                copies[f"{kind} {layout}"] = dict(transfer.copies)
            finally:
                host.close()
    return {"copies": copies}


def _bytes_of(pool: Any, library: str) -> list[Any]:
    """uint8 views of a pool's buffers: all of K, then all of V."""
    dtype = importlib.import_module(library).uint8
    return [buffer.view(dtype) for buffer in pool._all_buffers()]


def _fill(buffer: Any, data: Bytes, library: str) -> None:
    if library == "torch":
        buffer.copy_(importlib.import_module("torch").from_numpy(data))
    else:
        buffer.set(data)


def _fetch(buffer: Any) -> Bytes:
    return np.asarray(buffer.cpu() if hasattr(buffer, "cpu") else buffer.get())


CHECKS: dict[str, Callable[[Gpu, Path], Figures]] = {
    "batched copies": check_batches,
    **{f"end to end, kernel, {layout}": end_to_end("kernel", layout) for layout in LAYOUTS},
    **{f"end to end, engine, {layout}": end_to_end("engine", layout) for layout in LAYOUTS},
    "end to end, kernel, MLA": end_to_end(
        "kernel",
        "page_first",
        KVGeometry(kind="mla", num_layers=5, num_heads=1, head_bytes=1152, page_size=64),
    ),
    "page-locked pool": check_locked_pool,
    "torch pool": lambda gpu, folder: check_pool(gpu, folder, "torch"),
    "CuPy pool": lambda gpu, folder: check_pool(gpu, folder, "cupy"),
    "overlap, engine": lambda gpu, folder: check_overlap(gpu, folder, "engine"),
    "overlap, kernel": lambda gpu, folder: check_overlap(gpu, folder, "kernel"),
    "tuning": check_tune,
}
