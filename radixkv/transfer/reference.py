"""The oracle of every copy: slow, in host memory, written to be read. Tests hold all paths to it.

Two ways to say where a byte is, which must agree: the offset formulas of the four layouts (``offset_of``,
``copy_layouts``), and the bases and strides of a KVView (``address_of``, ``copy_views``).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import InvalidArgumentError
from ..pool.layout import KVGeometry, KVView, Layout
from .plan import CopyPlan

__all__ = ["address_of", "copy_layouts", "copy_views", "offset_of"]

Bytes: TypeAlias = npt.NDArray[np.uint8]


def offset_of(layout: Layout, g: KVGeometry, num_slots: int, layer: int, slot: int, head: int) -> int:
    """Byte offset of one head of one token of one layer, in the block of one half that has ``num_slots`` slots."""
    item, heads, head_bytes = g.row_bytes, g.num_heads, g.head_bytes
    page, token = divmod(slot, g.page_size)
    token_bytes = g.num_layers * item  # pd of page_head: one token, all layers
    match layout:
        case "layer_first":  # [layer, slot, head]
            return layer * num_slots * item + slot * item + head * head_bytes
        case "page_first":  # [slot, layer, head]
            return slot * token_bytes + layer * item + head * head_bytes
        case "page_first_direct":  # [page, layer, token, head]
            page_bytes = g.num_layers * g.page_size * item
            return page * page_bytes + layer * g.page_size * item + token * item + head * head_bytes
        case "page_head":  # [page, head, token, layer]
            page_bytes = g.page_size * token_bytes
            of_head = token_bytes // heads
            return page * page_bytes + of_head * head * g.page_size + token * of_head + layer * item // heads
    raise InvalidArgumentError(f"unknown layout {layout!r}")


def copy_layouts(
    g: KVGeometry,
    src_layout: Layout,
    src: Sequence[Bytes],
    dst_layout: Layout,
    dst: Sequence[Bytes],
    src_pages: Sequence[int],
    dst_pages: Sequence[int],
    layers: range | None = None,
) -> None:
    """Copy pages between two pools of known layouts, head by head.

    Args:
        src, dst: one uint8 block a half, [num_slots * L * H * D]. Modifies: dst.
        layers: all, if None.
    """
    src_slots, dst_slots = (len(blocks[0]) // (g.num_layers * g.row_bytes) for blocks in (src, dst))
    for half in range(g.halves):
        for layer in range(g.num_layers) if layers is None else layers:
            for src_page, dst_page in zip(src_pages, dst_pages, strict=True):
                for token in range(g.page_size):
                    src_slot, dst_slot = src_page * g.page_size + token, dst_page * g.page_size + token
                    for head in range(g.num_heads):
                        a = offset_of(src_layout, g, src_slots, layer, src_slot, head)
                        b = offset_of(dst_layout, g, dst_slots, layer, dst_slot, head)
                        dst[half][b : b + g.head_bytes] = src[half][a : a + g.head_bytes]


def address_of(g: KVGeometry, view: KVView, half: int, layer: int, slot: int, head: int) -> int:
    """The address of one head of one token of one layer and half."""
    page, token = divmod(slot, g.page_size)
    inside = page * view.page_stride + token * view.token_stride + head * view.head_stride
    return int(view.bases[half, layer]) + inside


def copy_views(plan: CopyPlan) -> None:
    """Run a plan head by head. Raises: InvalidArgumentError if a view is not in host memory."""
    plan.require_device("cpu")
    g = plan.geometry
    for half in range(g.halves):
        for layer in plan.layers:
            for src_page, dst_page in zip(plan.src_pages.tolist(), plan.dst_pages.tolist(), strict=True):
                for token in range(g.page_size):
                    for head in range(g.num_heads):
                        a = address_of(g, plan.src, half, layer, src_page * g.page_size + token, head)
                        b = address_of(g, plan.dst, half, layer, dst_page * g.page_size + token, head)
                        ctypes.memmove(b, a, g.head_bytes)
