"""L1: where a token's KV lies. Shapes, strides, and the four layouts of a host pool.

Dimension letters, defined once: L layers, P slots a page (page_size), S slots of a pool, H heads (of this rank), D
bytes of one head of one token (head_dim * itemsize; a packed row of quantised KV counts whole). A *row* is H * D
bytes: one token, one layer, one half.
Halves: K and V for MHA, one latent buffer for MLA.

Any layout is, for each half, a base address for each layer and three strides in bytes:

    address(half, layer, slot, head) = bases[half, layer]
        + (slot // P) * page_stride + (slot % P) * token_stride + head * head_stride

and D contiguous bytes from there. ``item`` = H * D:

    layout               layer step      page_stride     token_stride    head_stride
    layer_first          S * item        P * item        item            D
    page_first           item            P * L * item    L * item        D
    page_first_direct    P * item        L * P * item    item            D
    page_head            D               P * L * item    L * D           P * L * D

K and V are separate outer halves of a host pool (all of K, then all of V).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import InvalidArgumentError

__all__ = ["LAYOUTS", "KVGeometry", "KVView", "Kind", "Layout", "contiguous_dims", "view_of_layout"]

Layout: TypeAlias = Literal["layer_first", "page_first", "page_first_direct", "page_head"]
Kind: TypeAlias = Literal["mha", "mla"]

LAYOUTS: tuple[Layout, ...] = ("layer_first", "page_first", "page_first_direct", "page_head")


@dataclass(frozen=True, slots=True, kw_only=True)
class KVGeometry:
    """What one token's KV is made of.

    Args:
        kind: "mha" has two halves (K, V), "mla" one.
        num_layers: L.
        num_heads: H, heads of this rank; 1 for MLA.
        head_bytes: D, bytes of one head of one token: head_dim * itemsize, or the whole packed row of quantised KV.
        page_size: P, slots a page.
    """

    kind: Kind
    num_layers: int
    num_heads: int
    head_bytes: int
    page_size: int

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "head_bytes", "page_size"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"{name} is {getattr(self, name)}, and must be at least 1")
        if self.kind not in ("mha", "mla"):
            raise InvalidArgumentError(f"kind is {self.kind!r}, not mha or mla")
        if self.kind == "mla" and self.num_heads != 1:
            raise InvalidArgumentError(f"MLA keeps one latent row a token, not {self.num_heads} heads")

    @property
    def halves(self) -> int:
        """2 for MHA (K, V), 1 for MLA."""
        return 2 if self.kind == "mha" else 1

    @property
    def row_bytes(self) -> int:
        """H * D: one token, one layer, one half."""
        return self.num_heads * self.head_bytes

    @property
    def token_bytes(self) -> int:
        """All of one token's KV: halves * L * H * D."""
        return self.halves * self.num_layers * self.row_bytes

    @property
    def page_bytes(self) -> int:
        """All of one page's KV."""
        return self.page_size * self.token_bytes


@dataclass(frozen=True, slots=True, kw_only=True, weakref_slot=True)
class KVView:
    """One tier's memory as the copies see it; see the module's docstring for the address formula.

    Args:
        bases: uint64 [halves, L], addresses of slot 0, head 0.
        page_stride, token_stride, head_stride: bytes.
        num_slots: S; a slot index is in 0 .. S - 1.
        device: "cpu", or "cuda:N".
        boundaries: addresses, rising, that no one copy of a driver may span: where a chunk of page-locked memory ends
            and the next begins. () for memory in one piece.
        owner: whatever keeps the memory: tensors, arrays, an Arena. It lives as long as the view, and every plan and
            route over it. None: the caller sees to that.
    """

    bases: npt.NDArray[np.uint64]
    page_stride: int
    token_stride: int
    head_stride: int
    num_slots: int
    device: str = "cpu"
    boundaries: tuple[int, ...] = ()
    owner: Any = field(default=None, compare=False, repr=False)

    def hold(self) -> object:
        """Keep an owner that can be closed (an Arena) open as long as what is returned lives.

        Raises: StateError if it is closed already.
        """
        hold = getattr(self.owner, "hold", None)
        return self.owner if hold is None else hold()


def view_of_layout(
    layout: Layout,
    geometry: KVGeometry,
    num_slots: int,
    half_bases: list[int],
    device: str = "cpu",
    boundaries: tuple[int, ...] = (),
    owner: Any = None,
) -> KVView:
    """The view of one contiguous block a half, in one of the four layouts.

    Args:
        num_slots: S, a multiple of page_size.
        half_bases: the address of each half's block (halves of them), each num_slots * L * H * D bytes long.
        device, boundaries, owner: of the view.
    Raises: InvalidArgumentError for an unknown layout, a partial page, or a wrong number of blocks.
    """
    g = geometry
    item, steps = g.row_bytes, g.num_layers * g.row_bytes
    if num_slots % g.page_size:
        raise InvalidArgumentError(f"{num_slots} slots are no whole pages of {g.page_size}")
    if len(half_bases) != g.halves:
        raise InvalidArgumentError(f"{len(half_bases)} blocks for {g.halves} halves of {g.kind}")
    strides: dict[Layout, tuple[int, int, int, int]] = {
        "layer_first": (num_slots * item, g.page_size * item, item, g.head_bytes),
        "page_first": (item, g.page_size * steps, steps, g.head_bytes),
        "page_first_direct": (g.page_size * item, g.page_size * steps, item, g.head_bytes),
        "page_head": (
            g.head_bytes,
            g.page_size * steps,
            g.num_layers * g.head_bytes,
            g.page_size * g.num_layers * g.head_bytes,
        ),
    }
    if layout not in strides:
        raise InvalidArgumentError(f"unknown layout {layout!r}; one of {', '.join(LAYOUTS)}")
    layer_step, page_stride, token_stride, head_stride = strides[layout]
    layers = np.arange(g.num_layers, dtype=np.uint64) * np.uint64(layer_step)
    bases = np.array(half_bases, dtype=np.uint64)[:, None] + layers[None, :]
    return KVView(
        bases=bases,
        page_stride=page_stride,
        token_stride=token_stride,
        head_stride=head_stride,
        num_slots=num_slots,
        device=device,
        boundaries=boundaries,
        owner=owner,
    )


def contiguous_dims(geometry: KVGeometry, a: KVView, b: KVView) -> tuple[int, int, int]:
    """How far a copy between two views coalesces: (run_bytes, runs a token, tokens to walk a page).

        on both sides                               run_bytes   runs a token   tokens a page
        heads apart, on one side or both            D           H              P
        heads together                              H * D       1              P
        tokens of a page follow each other, too     P * H * D   1              1
    """
    g = geometry
    if not (a.head_stride == b.head_stride == g.head_bytes or g.num_heads == 1):
        return g.head_bytes, g.num_heads, g.page_size
    if not (a.token_stride == b.token_stride == g.row_bytes or g.page_size == 1):
        return g.row_bytes, 1, g.page_size
    return g.page_size * g.row_bytes, 1, 1
