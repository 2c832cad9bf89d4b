"""L1: reads an engine's own device pool: which tensors hold its KV, and the view that describes them. Copies nothing.

The dimensions of a tensor are written as letters, outermost first: L layers, K halves (of size 2: K, then V), N pages,
P slots a page, S slots, H heads, D elements of one head of one token; (K D): K's D elements, then V's, in one
dimension; (K H): K's heads, then V's. Strides come from the tensor, so a permuted tensor is written in the order of its
*shape*: the two orders of heads and slots that engines call NHD and HND need no letters of their own.

    engine                                       dims of one layer
    SGLang MHATokenToKVPool                      S H D        k_buffer, v_buffer apart; a list, or one tensor L S H D
    SGLang MLATokenToKVPool                      S H D        kv_buffer, H = 1
    vLLM FlashAttention, earlier                 K N P H D
    vLLM FlashInfer, Triton, FlashAttention      N K P H D
    vLLM CPU, earlier                            K N H P D
    vLLM CPU, and from 0.29 on other backends    N H P (K D)  K and V in one row
    heads outside of slots, contiguous           N K H P D
    vLLM MLA                                     N P D
    K and V apart, by pages                      N P H D, N H P D
    only with ``dims``                           L anywhere; N (K H) P D
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import InvalidArgumentError, UnsupportedLayoutError
from .arrays import Array, Buffer, describe
from .layout import Kind, KVGeometry, KVView

__all__ = ["MHA_DIMS", "MLA_DIMS", "EnginePool", "view_of_engine_pool", "view_of_tensors"]

MHA_DIMS = ("K N P H D", "N K P H D", "K N H P D", "N K H P D", "N H P (K D)")
"""Of one layer's tensor that holds both K and V."""
_HALF_DIMS = ("S H D", "N P H D", "N H P D")
"""Of one layer's tensor that holds K alone, or V alone."""
MLA_DIMS = ("N P D", "S H D", "S D")
"""Of one layer's latent tensor."""

_ELSEWHERE = (
    "k_scale_buffer", "v_scale_buffer", "kv_scale_buffer", "index_k_buffer", "index_k_with_scale_buffer",
    "label_buffer", "full_kv_pool", "swa_kv_pool",
)  # fmt: skip
"""Attributes of pools that keep a part of a token's KV in another place: copying only the rows would lose it,
silently."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePool:
    """An engine's device pool as radixkv sees it. ``arrays``, the view's owner, keeps the engine's tensors alive."""

    geometry: KVGeometry
    view: KVView
    dims: str
    arrays: tuple[Array, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Dim:
    size: int
    stride: int


# ---- what engines hand over ------------------------------------------------------------------------------------------
def view_of_engine_pool(pool: Any, *, page_size: int | None = None) -> EnginePool:
    """Recognise a device pool by its attributes: k_buffer and v_buffer (MHA), or kv_buffer (MLA).

    Args:
        pool: SGLang's, radixkv's own, or any object with these attributes: a list of one tensor a layer, or one
        tensor [L, ...].
        page_size: P; by default the pool's attribute ``page_size``.
    Raises: UnsupportedLayoutError with what was found.
    """
    apart = [name for name in _ELSEWHERE if getattr(pool, name, None) is not None]
    if apart:
        raise UnsupportedLayoutError(
            f"{type(pool).__name__} keeps a part of its KV in {', '.join(apart)}, outside of the rows that are copied"
        )
    page_size = getattr(pool, "page_size", None) if page_size is None else page_size
    num_layers = getattr(pool, "layer_num", None)
    k, v, kv = (getattr(pool, name, None) for name in ("k_buffer", "v_buffer", "kv_buffer"))
    if k is not None and v is not None:
        num_heads = getattr(pool, "head_num", None)
        return view_of_tensors(k, v, page_size=page_size, num_heads=num_heads, num_layers=num_layers)
    if kv is not None:
        return view_of_tensors(kv, kind="mla", page_size=page_size, num_layers=num_layers)
    raise UnsupportedLayoutError(f"{type(pool).__name__} has neither k_buffer and v_buffer (MHA) nor kv_buffer (MLA)")


def view_of_tensors(
    tensors: Any,
    values: Any = None,
    *,
    kind: Kind = "mha",
    page_size: int | None = None,
    num_heads: int | None = None,
    num_layers: int | None = None,
    dims: str | None = None,
) -> EnginePool:
    """Describe KV tensors: one a layer (list, tuple, dict in layer order), or one for all layers.

    Args:
        tensors: K and V together, or K alone, or the latent of MLA.
        values: V, if it is apart.
        kind: "mha" or "mla".
        page_size: P. Must be the tensors' own where they have pages, unless their slots are evenly spaced over all
            pages.
        num_heads: H, if known: it tells K N P H D from K N H P D.
        num_layers: L, if known: it tells one layer's tensor from one for all layers.
        dims: the letters of one tensor (with L, if it holds all layers). By default those of the table above that fit,
            if it is exactly one.
    Raises: UnsupportedLayoutError with the shapes and strides found; InvalidArgumentError for wrong letters.
    """
    apart = values is not None
    if page_size is not None and page_size < 1:
        raise InvalidArgumentError(f"page_size is {page_size}, and must be at least 1")
    if apart and kind == "mla":
        raise InvalidArgumentError("MLA has one buffer, no values apart")
    groups = [_as_list(tensors), *([_as_list(values)] if apart else [])]
    arrays = tuple(array for group in groups for array in group)
    candidates = (_HALF_DIMS if apart else MHA_DIMS) if kind == "mha" else MLA_DIMS
    known = {"K": 2, "P": page_size, "H": 1 if kind == "mla" else num_heads, "L": num_layers}
    alone = not isinstance(tensors, (Mapping, Sequence))
    split = [_layers(group, dims or _guess(group, candidates, known, alone)) for group in groups]
    halves, letters = [layers for layers, _ in split], split[0][1]
    found = len(halves[0])
    if any(len(layers) != found for layers in halves) or num_layers not in (None, found):
        raise UnsupportedLayoutError(f"{' and '.join(str(len(layers)) for layers in halves)} layers of {num_layers}")
    parts = [_split(layer, letters.removeprefix("L "), kind, apart) for layers in halves for layer in layers]
    return _pool(parts, found, kind, page_size, letters, arrays)


def _as_list(tensors: Any) -> list[Array]:
    """The tensors of a dict, a sequence, or a tensor alone."""
    if isinstance(tensors, Mapping):
        return list(tensors.values())
    return list(tensors) if isinstance(tensors, Sequence) else [tensors]


# ---- letters ---------------------------------------------------------------------------------------------------------
def _guess(group: list[Array], candidates: tuple[str, ...], known: dict[str, int | None], alone: bool) -> str:
    """The only letters that a tensor's shape can be read with; with L only if it came alone, not in a list.

    Raises: UnsupportedLayoutError for none or several.
    """
    if not group:
        raise UnsupportedLayoutError("no tensors: a pool of no layers")
    first, num_layers = describe(group[0]), known["L"]
    one_each = candidates if num_layers in (None, len(group)) else ()
    all_in_one = tuple(f"L {letters}" for letters in candidates) if alone else ()
    fitting = [letters for letters in (*one_each, *all_in_one) if _fits(first, letters, known)]
    # MLA with pages of one slot: [N, 1, D] and [S, 1, D] are the same
    if len(fitting) == 1 or (fitting and candidates is MLA_DIMS and known["P"] == 1 and first.shape[1] == 1):
        return fitting[0]
    which = f"may be any of: {', '.join(fitting)}" if fitting else f"is none of: {', '.join((*one_each, *all_in_one))}"
    hints = ", ".join(f"{letter} = {size}" for letter, size in known.items() if size is not None)
    raise UnsupportedLayoutError(
        f"{_shown(first)} {which} (known: {hints}); say which with page_size=, num_heads=, num_layers= or dims="
    )


def _layers(group: list[Array], dims: str) -> tuple[list[Buffer], str]:
    """One buffer a layer, and their letters; those of a tensor that holds all layers begin with "L "."""
    if not group:
        raise UnsupportedLayoutError("no tensors: a pool of no layers")
    buffers = [describe(array) for array in group]
    if len({(b.shape, b.strides, b.item_bytes, b.device) for b in buffers}) > 1:
        raise UnsupportedLayoutError(f"layers differ: {'; '.join(sorted({_shown(b) for b in buffers}))}")
    first, order = buffers[0], _letters(dims)
    sizes = _dims_of(first, dims)
    if "L" not in sizes:
        return buffers, dims
    if len(group) > 1:
        raise InvalidArgumentError(f"{dims!r} holds all layers, and {len(group)} tensors were given")
    at = order.index("L")
    shape, strides = first.shape[:at] + first.shape[at + 1 :], first.strides[:at] + first.strides[at + 1 :]
    layer = first._replace(shape=shape, strides=strides)
    bases = [first.address + i * sizes["L"].stride for i in range(sizes["L"].size)]
    return [layer._replace(address=base) for base in bases], " ".join(["L", *order[:at], *order[at + 1 :]])


def _letters(dims: str) -> list[str]:
    """One entry a dimension: "N H (K D)" has three."""
    return re.findall(r"\([^)]*\)|\S+", dims)


def _fits(buffer: Buffer, dims: str, known: dict[str, int | None]) -> bool:
    """Whether a tensor's shape can be read with these letters."""
    if len(_letters(dims)) != len(buffer.shape):
        return False
    if "(K D)" in dims and (buffer.shape[-1] % 2 or known["P"] is None or known["H"] is None):
        return False  # a tensor of K alone has as many dimensions: only sizes can tell
    sizes = dict(zip(_letters(dims), buffer.shape, strict=True))
    return all(size is None or sizes.get(letter, size) == size for letter, size in known.items())


def _dims_of(buffer: Buffer, dims: str) -> dict[str, _Dim]:
    """Size and stride of each letter. Raises: InvalidArgumentError if the letters are wrong for this tensor."""
    order = _letters(dims)
    flat = dims.replace("(K D)", "K D").replace("(K H)", "K H").split()
    if len(set(flat)) != len(flat) or not set(flat) <= set("LKNPSHD") or "D" not in flat:
        raise InvalidArgumentError(f"dims {dims!r}: letters are L, K, N, P, S, H, D, once each, and D is needed")
    if ("S" in flat) == ("N" in flat) or ("N" in flat) != ("P" in flat):
        raise InvalidArgumentError(f"dims {dims!r} need S, or N and P")
    if len(order) != len(buffer.shape):
        raise UnsupportedLayoutError(f"{_shown(buffer)} has not the dimensions {dims!r}")
    found: dict[str, _Dim] = {}
    for letter, size, stride in zip(order, buffer.shape, buffer.strides, strict=True):
        if len(letter) == 1:
            found[letter] = _Dim(size, stride)
        elif size % 2:
            raise UnsupportedLayoutError(f"{_shown(buffer)}: {size} in {letter} are not K and V of one size")
        else:
            found["K"], found[letter[3]] = _Dim(2, size // 2 * stride), _Dim(size // 2, stride)
    if "K" in found and found["K"].size != 2:
        raise UnsupportedLayoutError(f"{_shown(buffer)}: dimension K of {dims!r} has {found['K'].size} halves, not 2")
    return found


# ---- addresses -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer, or one half of it: bases (K and V, if it has both), and what the address formula needs, in bytes."""

    bases: tuple[int, ...]
    head_bytes: int
    heads: _Dim
    slots: _Dim
    pages: _Dim | None
    shown: str
    device: str


def _split(buffer: Buffer, dims: str, kind: Kind, apart: bool) -> _Layer:
    """Check one layer's tensor and find its bases."""
    sizes = _dims_of(buffer, dims)
    if ("K" in sizes) != (kind == "mha" and not apart):
        raise InvalidArgumentError(f"dims {dims!r} for {kind} with K and V {'apart' if apart else 'together'}")
    row = sizes["D"]
    if row.size < 1 or (row.size > 1 and row.stride != buffer.item_bytes):
        raise UnsupportedLayoutError(f"{_shown(buffer)}, {dims}: a head's elements are not contiguous")
    head_bytes = row.size * buffer.item_bytes
    outer = sorted((d for letter, d in sizes.items() if letter != "D" and d.size > 1), key=lambda d: d.stride)
    taken = head_bytes
    for dim in outer:  # innermost first: each step must clear all that lies within it
        if dim.stride < taken:
            raise UnsupportedLayoutError(f"{_shown(buffer)}, {dims}: elements share memory (a stride below {taken})")
        taken = dim.stride * (dim.size - 1) + taken
    halves = [0, sizes["K"].stride] if "K" in sizes else [0]
    heads = sizes.get("H", _Dim(1, head_bytes))
    if heads.size == 1:
        heads = _Dim(1, head_bytes)  # torch gives dimensions of size 1 any stride
    bases = tuple(buffer.address + step for step in halves)
    return _Layer(
        bases, head_bytes, heads, sizes["P" if "P" in sizes else "S"], sizes.get("N"), _shown(buffer), buffer.device
    )


def _pool(
    parts: list[_Layer], num_layers: int, kind: Kind, page_size: int | None, dims: str, arrays: tuple[Array, ...]
) -> EnginePool:
    """Put the layers of one pool together; parts: of K, then of V if that is apart."""
    first = parts[0]
    odd = _unlike(parts)
    if odd:
        raise UnsupportedLayoutError(f"layers, or K and V, differ: {first.shown}; {odd[0].shown}")
    if kind == "mla" and first.heads.size != 1:
        raise UnsupportedLayoutError(f"{first.shown}: MLA keeps one latent row a token, not {first.heads.size}")
    slots, pages = first.slots, first.pages
    if pages is None:
        size = 1 if page_size is None else page_size
        num_slots, page_stride = slots.size, size * slots.stride
    else:
        size, num_slots, page_stride = slots.size, slots.size * pages.size, pages.stride
        if page_size not in (None, size):
            if pages.size > 1 and page_stride != size * slots.stride:
                raise UnsupportedLayoutError(f"{first.shown}, {dims}: pages of {size} slots, not of {page_size}")
            size, page_stride = page_size or size, (page_size or size) * slots.stride
    geometry = KVGeometry(
        kind=kind, num_layers=num_layers, num_heads=first.heads.size, head_bytes=first.head_bytes, page_size=size
    )
    table = [p.bases for p in parts]
    bases = np.array(table, np.uint64).T if len(first.bases) == 2 else np.array(table, np.uint64)[:, 0]
    bases = np.ascontiguousarray(bases.reshape(geometry.halves, num_layers))
    if np.unique(bases).size != bases.size:
        raise UnsupportedLayoutError(f"{first.shown}, {dims}: two layers or halves begin at one address")
    view = KVView(
        bases=bases,
        page_stride=page_stride,
        token_stride=slots.stride,
        head_stride=first.heads.stride,
        num_slots=num_slots // size * size,  # a rest that is no page is nobody's
        device=first.device,
        owner=arrays,
    )
    return EnginePool(geometry=geometry, view=view, dims=dims, arrays=arrays)


def _unlike(parts: list[_Layer]) -> list[_Layer]:
    """The layers that are not built like the first."""
    first = parts[0]
    wanted = (first.head_bytes, first.heads, first.slots, first.pages, first.device)
    return [p for p in parts if (p.head_bytes, p.heads, p.slots, p.pages, p.device) != wanted]


def _shown(buffer: Buffer) -> str:
    return (
        f"shape {list(buffer.shape)}, strides {list(buffer.strides)} bytes, "
        f"{buffer.item_bytes}-byte elements on {buffer.device}"
    )
