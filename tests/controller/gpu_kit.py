"""A stack for the controller's tests on a GPU: device pages in its memory, page-locked host pages, and a CudaMover.

Runs on CuPy alone, so that it does on a simulated one, too.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from radixkv.controller import CudaMover
from radixkv.controller.mover_cuda import GpuTransfers
from radixkv.pool.arena import ArenaConfig
from radixkv.pool.host import HostKVCache, HostPoolConfig
from radixkv.pool.layout import KVView
from radixkv.pool.pinning import cuda_registrar
from radixkv.pool.slots import SlotAllocator
from radixkv.transfer.choose import PathName
from radixkv.transfer.plan import staging_view
from radixkv.types import PageIds
from tests.kernels.gpu_checks import Gpu

from .kit import GEOMETRY, P


class GpuPages:
    """Pages in the memory of a GPU that are read and written by index like an array uint8 [pages, page_bytes].

    What is written goes over the stream that computes and is not waited for by the host: copies must wait for it. What
    is read comes over the same stream, which must have been made to wait for loads.
    """

    def __init__(self, gpu: Gpu, stream: Any, address: int, num_pages: int) -> None:
        self._gpu, self._stream, self.address, self._num_pages = gpu, stream, address, num_pages
        self._staged = gpu.host(num_pages * GEOMETRY.page_bytes)

    def __len__(self) -> int:
        return self._num_pages

    def __getitem__(self, pages: PageIds) -> np.ndarray[Any, Any]:
        size = GEOMETRY.page_bytes
        for place, page in enumerate(pages.tolist()):
            self._gpu.copy(self._staged + place * size, self.address + page * size, size, self._stream)
        self._stream.synchronize()
        return self._gpu.read(self._staged, len(pages) * size).reshape(-1, size)

    def __setitem__(self, pages: PageIds, rows: np.ndarray[Any, Any]) -> None:
        size = GEOMETRY.page_bytes
        self._stream.synchronize()  # what was staged before has gone
        content = np.ascontiguousarray(rows)
        if not len(pages):
            return
        self._gpu.runtime.memcpy(self._staged, content.ctypes.data, content.nbytes, self._gpu.runtime.memcpyDefault)
        for place, page in enumerate(pages.tolist()):
            self._gpu.copy(self.address + page * size, self._staged + place * size, size, self._stream)


class GpuMemory(SlotAllocator):
    """As DeviceMemory, on the GPU."""

    def __init__(self, gpu: Gpu, stream: Any, num_pages: int) -> None:
        super().__init__(num_pages)
        self.data = GpuPages(gpu, stream, gpu.device(num_pages * GEOMETRY.page_bytes), num_pages)
        self.refuse = 0

    def view(self) -> KVView:
        return staging_view(GEOMETRY, self.data.address, len(self.data), "cuda:0")

    def alloc(self, num_pages: int) -> PageIds | None:
        if self.refuse:
            self.refuse -= 1
            return None
        return super().alloc(num_pages)


class GpuStacks:
    """What a Stack needs of a GPU; the kernels are compiled once. Args: path: of every copy; None: the faster one."""

    def __init__(self, path: PathName | None) -> None:
        self._gpu = Gpu()
        self._compute = self._gpu.stream()
        self._transfers = GpuTransfers(GEOMETRY, 0, path)
        self._on: list[Any] = []
        self._caches: list[HostKVCache] = []

    def device_memory(self, num_pages: int) -> GpuMemory:
        return GpuMemory(self._gpu, self._compute, num_pages)

    def host_cache(self, num_pages: int) -> HostKVCache:
        """Page-locked."""
        config = HostPoolConfig(headroom_bytes=0, arena=ArenaConfig(huge_pages="none"))
        cache = HostKVCache(GEOMETRY, num_pages * P, "page_first", config=config, registrar=cuda_registrar())
        assert cache.pinned
        self._caches.append(cache)
        return cache

    def mover(self, device: GpuMemory, host: HostKVCache) -> CudaMover:
        return CudaMover(
            GEOMETRY, device.view(), host.view(), lambda: int(self._compute.ptr), transfer_on=self._transfer_on
        )

    def _transfer_on(self, stream: int) -> Any:
        self._on.append(self._transfers.on(stream))
        return self._on[-1]

    @property
    def copies(self) -> dict[str, int]:
        """Copies so far, by path."""
        total: Counter[str] = Counter()
        for transfer in self._on:
            total.update(transfer.copies)
        return dict(total)

    def free(self) -> None:
        """All memory that was handed out; nobody uses it any more."""
        self._gpu.free()
        while self._caches:
            self._caches.pop().close()
