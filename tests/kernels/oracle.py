"""What a copy must leave behind, from the offset formulas of the layouts alone, one token at a time.

The formulas are written out here as in the design of the layouts: byte offset of (token t, layer l, head h) in one
half, ``item`` is H * D. They share no code with radixkv.pool.layout, whose views the kernels are given.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from radixkv.pool.layout import KVGeometry

Bytes = npt.NDArray[np.uint8]


def offset_of(layout: str, g: KVGeometry, num_slots: int, layer: int, slot: int, head: int) -> int:
    """Byte offset of D bytes within a half's block."""
    item, page, token = g.num_heads * g.head_bytes, slot // g.page_size, slot % g.page_size
    inner = head * g.head_bytes
    if layout == "layer_first":
        return layer * num_slots * item + slot * item + inner
    if layout == "page_first":
        return slot * g.num_layers * item + layer * item + inner
    if layout == "page_first_direct":
        return (
            page * g.num_layers * g.page_size * item + layer * g.page_size * item + token * item + inner
        )
    assert layout == "page_head", layout
    row = g.num_layers * item
    return (
        page * g.page_size * row
        + (row // g.num_heads) * head * g.page_size
        + token * (row // g.num_heads)
        + layer * g.head_bytes
    )


def cells_of(layout: str, g: KVGeometry, num_slots: int, layers: range, pages: list[int]) -> npt.NDArray[np.int64]:
    """Offsets of every cell of some pages: [len(layers) * n * P * H], in (layer, page, token, head) order."""

    def walk() -> Iterator[int]:
        for layer in layers:
            for page in pages:
                for token in range(g.page_size):
                    for head in range(g.num_heads):
                        yield offset_of(layout, g, num_slots, layer, page * g.page_size + token, head)

    return np.fromiter(walk(), dtype=np.int64)


def expect_copy(
    g: KVGeometry,
    src: tuple[str, int, Bytes],
    dst: tuple[str, int, Bytes],
    src_pages: list[int],
    dst_pages: list[int],
    layers: range,
) -> Bytes:
    """What the destination holds afterwards.

    Args:
        src, dst: (layout, slots, uint8 [halves, bytes of a half]) of each side before the copy.
    Returns: a new array like dst's: the copied cells, and every other byte as it was.
    """
    expected = dst[2].copy()
    span = np.arange(g.head_bytes)
    come_from = cells_of(src[0], g, src[1], layers, src_pages)[:, None] + span
    go_to = cells_of(dst[0], g, dst[1], layers, dst_pages)[:, None] + span
    for half in range(g.halves):
        expected[half][go_to] = src[2][half][come_from]
    return expected
