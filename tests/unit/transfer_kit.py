"""Host pools for the tests of every transfer path: known bytes in the source, poison in the destination, guards."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from radixkv.pool.layout import Kind, KVGeometry, KVView, Layout, view_of_layout
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


def geometry(
    kind: Kind = "mha", layers: int = 3, heads: int = 2, head_bytes: int = 24, page_size: int = 4
) -> KVGeometry:
    """A geometry with short names; one head for MLA."""
    return KVGeometry(
        kind=kind,
        num_layers=layers,
        num_heads=heads if kind == "mha" else 1,
        head_bytes=head_bytes,
        page_size=page_size,
    )


SHAPES = (
    # both kinds, page sizes 1, 16, 64 and odd ones, rows from 8 bytes to 4 KiB and odd multiples, 1 layer and 80
    geometry(),
    geometry("mla", layers=1, head_bytes=8, page_size=1),
    geometry("mha", layers=1, heads=1, head_bytes=8, page_size=16),
    geometry("mla", layers=80, head_bytes=72, page_size=1),
    geometry("mha", layers=80, heads=2, head_bytes=8, page_size=3),
    geometry("mla", layers=5, head_bytes=576, page_size=64),
    geometry("mha", layers=2, heads=8, head_bytes=128, page_size=16),
    geometry("mha", layers=3, heads=3, head_bytes=40, page_size=7),
    geometry("mha", layers=2, heads=4, head_bytes=4096, page_size=2),
    geometry("mla", layers=3, head_bytes=1, page_size=5),
    geometry("mla", layers=2, head_bytes=656, page_size=64),
)


def shape_name(g: KVGeometry) -> str:
    """For the name of a test."""
    return f"{g.kind}-L{g.num_layers}-H{g.num_heads}-D{g.head_bytes}-P{g.page_size}"


PAGES = 6
INDICES: dict[str, tuple[list[int], list[int]]] = {
    "empty": ([], []),
    "single": ([3], [5]),
    "random": ([4, 0, 3, 1], [2, 5, 0, 3]),
    "reversed": ([5, 4, 3, 2, 1, 0], [5, 4, 3, 2, 1, 0]),
    "contiguous": ([1, 2, 3, 4], [0, 1, 2, 3]),
    "runs": ([0, 1, 4, 5, 2], [3, 4, 0, 1, 5]),
    "begins as a run": ([0, 1, 4, 2], [0, 1, 2, 5]),
    "gathered twice": ([2, 2, 2], [0, 4, 1]),
}
"""Source and destination pages of pools of PAGES pages."""


def on_device(view: KVView, device: str = "cuda:0") -> KVView:
    """Host memory that passes for a GPU's, for fake runtimes."""
    return replace(view, device=device)
