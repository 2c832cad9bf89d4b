"""Host pools for the tests of every transfer path: known bytes in the source, poison in the destination, guards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from radixkv.pool.layout import KVGeometry, KVView, Layout, view_of_layout
from radixkv.transfer.plan import staging_view

POISON = 0xA5
GUARD = 64
"""Bytes before and after each block that nobody may touch."""

Bytes = npt.NDArray[np.uint8]


@dataclass
class HostPool:
    """One pool in one layout: ``blocks`` are the halves' bytes, inside ``whole``, which has guards around each."""

    geometry: KVGeometry
    layout: Layout
    num_pages: int
    whole: Bytes
    blocks: list[Bytes]
    view: KVView

    @classmethod
    def make(
        cls, geometry: KVGeometry, layout: Layout, num_pages: int, seed: int | None = None, shift: int = 0
    ) -> HostPool:
        """A pool of random bytes (of ``seed``) or of poison (None), blocks ``shift`` bytes off a 64-byte boundary."""
        g = geometry
        block_bytes = num_pages * g.page_size * g.num_layers * g.row_bytes
        step = -(-(block_bytes + 2 * GUARD) // 64) * 64 + shift
        storage = np.full(g.halves * step + 128, POISON, np.uint8)
        start = -storage.ctypes.data % 64 + shift
        whole = storage[start : start + g.halves * step]
        blocks = [whole[half * step + GUARD : half * step + GUARD + block_bytes] for half in range(g.halves)]
        if seed is not None:
            rng = np.random.default_rng(seed)
            for block in blocks:
                block[:] = rng.integers(0, 256, block_bytes, np.uint8)
        addresses = [whole.ctypes.data + half * step + GUARD for half in range(g.halves)]
        view = view_of_layout(layout, g, num_pages * g.page_size, addresses)
        return cls(g, layout, num_pages, whole, blocks, view)

    def twin(self) -> HostPool:
        """A pool of the same shape and bytes, elsewhere."""
        other = HostPool.make(self.geometry, self.layout, self.num_pages)
        for mine, theirs in zip(self.blocks, other.blocks, strict=True):
            theirs[:] = mine
        return other


def staging(geometry: KVGeometry, num_pages: int) -> tuple[Bytes, KVView]:
    """A poisoned staging buffer uint8 [num_pages, page_bytes] and its view."""
    buffer = np.full((max(1, num_pages), geometry.page_bytes), POISON, np.uint8)
    return buffer[:num_pages], staging_view(geometry, buffer.ctypes.data, num_pages)
