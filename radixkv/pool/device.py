"""L1: radixkv's own device pools, with the attributes and methods that engines know of theirs (SGLang's KVCache
classes).

One buffer a layer and half, layer_first: k_buffer[l], v_buffer[l] of [size + page_size, H, head_dim], or kv_buffer[l]
of [size + page_size, 1, row] for MLA. The extra page takes the padding: engines write dummy tokens to slot 0. On a
GPU with torch or CuPy, in plain memory with torch or numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ..errors import ArgumentTypeError, InvalidArgumentError
from .arrays import (
    ITEM_BYTES,
    Array,
    Library,
    allocate,
    canonical_dtype,
    choose_library,
    describe,
    parse_device,
    storage_dtype,
    to_library,
)
from .foreign import EnginePool, view_of_engine_pool
from .layout import KVGeometry, KVView

__all__ = ["DevicePool", "LayerCounter", "MHATokenToKVPool", "MLATokenToKVPool"]

_GIB = 1024**3


class LayerCounter(Protocol):
    """What a load in progress offers to the model: a layer's buffers may be read once this returns."""

    def wait_until(self, layer: int) -> None: ...


class DevicePool:
    """The KV of ``size`` tokens (and one page of padding) on one device. Zeroed at first.

    Args:
        size: tokens, a multiple of page_size. Slots are 0 .. size + page_size - 1.
        page_size: P.
        dtype: of the KV: bf16, fp16, fp32, fp8 (e4m3fn, e5m2), by any name of these or a torch or numpy dtype; "uint8"
            for packed rows, whose width in bytes then stands for head_dim.
        geometry: of the tokens.
        layer_num: layers of this rank; ``start_layer`` is the model's number of the first.
        device: "cpu", "cuda" or "cuda:N".
        library: "torch", "cupy" or "numpy"; by default torch, or what there is without it.
    Raises: InvalidArgumentError; DeviceUnavailableError with what is missing for a GPU; MemoryError, or the library's
        error if the device has too little memory.
    """

    def __init__(
        self, size: int, dtype: Any, geometry: KVGeometry, device: Any, start_layer: int | None, library: Library | None
    ) -> None:
        if size < geometry.page_size or size % geometry.page_size:
            raise InvalidArgumentError(f"{size} tokens are not one or more whole pages of {geometry.page_size}")
        self.size = size
        self.page_size = geometry.page_size
        self.dtype = dtype
        self.dtype_name = canonical_dtype(dtype)
        self.device = parse_device(device)
        self.library = choose_library(self.device, library)
        self.store_dtype_name = storage_dtype(self.dtype_name, self.library)
        self.geometry = geometry
        self.layer_num = geometry.num_layers
        self.start_layer = start_layer or 0
        self.end_layer = self.start_layer + self.layer_num - 1
        self.layer_transfer_counter: LayerCounter | None = None
        self._recognized: EnginePool | None = None

    @property
    def store_dtype(self) -> Any:
        """The library's dtype of the buffers' elements."""
        return self._all_buffers()[0].dtype

    @property
    def mem_usage(self) -> float:
        """GiB of all buffers."""
        return sum(self._buffer_bytes()) / _GIB

    def view(self) -> KVView:
        """Where each byte lies. Keeps the buffers alive, beyond the pool."""
        return self.recognized().view

    def recognized(self) -> EnginePool:
        """The pool as any engine's pool is read; the same each time."""
        if self._recognized is None:
            self._recognized = view_of_engine_pool(self)
        return self._recognized

    def register_layer_transfer_counter(self, layer_transfer_counter: LayerCounter) -> None:
        """Let get_key_buffer and its like wait until a layer has been loaded."""
        self.layer_transfer_counter = layer_transfer_counter

    def get_contiguous_buf_infos(self) -> tuple[list[int], list[int], list[int]]:
        """Addresses, bytes, and bytes a page of each buffer: all of K, then all of V."""
        addresses = [describe(buffer).address for buffer in self._all_buffers()]
        page_bytes = self.page_size * self.geometry.row_bytes
        return addresses, self._buffer_bytes(), [page_bytes] * len(addresses)

    def maybe_get_custom_mem_pool(self) -> None:
        """None: the buffers are in the library's usual memory."""

    def get_cpu_copy(self, indices: Array) -> list[list[Array]]:
        """Copy tokens to host memory: [halves][L] arrays of [len(indices), H, head_dim]. Waits for the copy."""
        return [[_to_host(buffer[indices]) for buffer in half] for half in self._halves()]

    def load_cpu_copy(self, kv_cache_cpu: list[list[Array]], indices: Array) -> None:
        """Write back what ``get_cpu_copy`` returned, to these slots."""
        for half, saved in zip(self._halves(), kv_cache_cpu, strict=True):
            for buffer, rows in zip(half, saved, strict=True):
                buffer[indices] = self._from_host(rows)

    def move_kv_cache(self, tgt_loc: Array, src_loc: Array) -> None:
        """Copy tokens to other slots, in all layers: src_loc[i] to tgt_loc[i], as if all were read first."""
        for buffer in self._all_buffers():
            buffer[tgt_loc] = buffer[src_loc]

    def _halves(self) -> list[list[Array]]:
        raise NotImplementedError

    def _all_buffers(self) -> list[Array]:
        return [buffer for half in self._halves() for buffer in half]

    def _buffer_bytes(self) -> list[int]:
        return [int(buffer.nbytes) for buffer in self._all_buffers()]

    def _buffers(self) -> list[Array]:
        """One zeroed buffer a layer."""
        g = self.geometry
        shape = (self.size + self.page_size, g.num_heads, g.head_bytes // ITEM_BYTES[self.dtype_name])
        return [allocate(shape, self.store_dtype_name, self.device, self.library) for _ in range(self.layer_num)]

    def _addresses(self, buffers: Sequence[Array]) -> Array:
        """uint64 addresses, on the device where the library is torch."""
        return to_library(np.array([describe(b).address for b in buffers], np.uint64), buffers[0])

    def _index(self, layer_id: int) -> int:
        """The place of a model's layer in the buffers, once it may be read."""
        at = self._place(layer_id)
        if self.layer_transfer_counter is not None:
            self.layer_transfer_counter.wait_until(at)
        return at

    def _place(self, layer_id: int) -> int:
        if not self.start_layer <= layer_id <= self.end_layer:
            raise InvalidArgumentError(f"layer {layer_id} is not of {self.start_layer} .. {self.end_layer}")
        return layer_id - self.start_layer

    def _typed(self, buffer: Array) -> Array:
        """A buffer under the KV's own dtype, where the library has it."""
        return buffer.view(self._own_dtype()) if self._stored_otherwise() else buffer

    def _stored_otherwise(self) -> bool:
        return self.library == "torch" and self.store_dtype_name != self.dtype_name

    def _own_dtype(self) -> Any:
        import torch

        return getattr(torch, self.dtype_name)

    def _storable(self, rows: Array, scale: Any = None) -> Array:
        """Rows in the dtype of the buffers, scaled by 1 / scale if they must be converted.

        Raises: ArgumentTypeError where the library cannot convert (numpy and CuPy know neither bf16 nor fp8).
        """
        name = canonical_dtype(rows.dtype) if self.library == "torch" else np.dtype(rows.dtype).name
        if self.library != "torch":
            if name == self.store_dtype_name:
                return rows
            if self.store_dtype_name != self.dtype_name or self.dtype_name == "uint8":
                raise ArgumentTypeError(f"{self.library} cannot convert {name} to {self.dtype_name}: pass its bytes")
            return (rows if scale is None else rows / scale).astype(self.store_dtype_name)
        if name not in (self.dtype_name, self.store_dtype_name):
            if self.dtype_name == "uint8":
                raise ArgumentTypeError(f"{name} is no packed row of bytes")
            rows = (rows if scale is None else rows / scale).to(self._own_dtype())
        return rows.view(self.store_dtype) if rows.dtype != self.store_dtype else rows

    def _from_host(self, rows: Array) -> Array:
        if self.library == "torch":
            return rows.to(self.device)
        if self.library == "cupy":
            import cupy  # type: ignore[import-not-found, unused-ignore]

            return cupy.asarray(rows)
        return rows


class MHATokenToKVPool(DevicePool):
    """Keys and values of multi-head (or grouped-query) attention: k_buffer and v_buffer, lists of one buffer a layer.

    Args: as of DevicePool, and
        head_num: H, heads of this rank.
        head_dim: elements of a head (bytes, for packed rows).
        enable_memory_saver: taken for the engines' sake; must be False.
    """

    def __init__(
        self,
        size: int,
        page_size: int,
        dtype: Any,
        head_num: int,
        head_dim: int,
        layer_num: int,
        device: Any = "cpu",
        enable_memory_saver: bool = False,
        start_layer: int | None = None,
        end_layer: int | None = None,
        *,
        library: Library | None = None,
    ) -> None:
        _check_unused(enable_memory_saver, start_layer, end_layer, layer_num)
        item = ITEM_BYTES[canonical_dtype(dtype)]
        geometry = KVGeometry(
            kind="mha", num_layers=layer_num, num_heads=head_num, head_bytes=head_dim * item, page_size=page_size
        )
        super().__init__(size, dtype, geometry, device, start_layer, library)
        self.head_num, self.head_dim = head_num, head_dim
        self.k_buffer = self._buffers()
        self.v_buffer = self._buffers()
        self.k_data_ptrs, self.v_data_ptrs = self._addresses(self.k_buffer), self._addresses(self.v_buffer)

    def _halves(self) -> list[list[Array]]:
        return [self.k_buffer, self.v_buffer]

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """Bytes of all K buffers, and of all V buffers."""
        sizes = self._buffer_bytes()
        return sum(sizes[: self.layer_num]), sum(sizes[self.layer_num :])

    def get_key_buffer(self, layer_id: int) -> Array:
        """K of a layer, [size + page_size, H, head_dim]; waits until it has been loaded."""
        return self._typed(self.k_buffer[self._index(layer_id)])

    def get_value_buffer(self, layer_id: int) -> Array:
        """V of a layer; waits until it has been loaded."""
        return self._typed(self.v_buffer[self._index(layer_id)])

    def get_kv_buffer(self, layer_id: int) -> tuple[Array, Array]:
        """K and V of a layer."""
        return self.get_key_buffer(layer_id), self.get_value_buffer(layer_id)

    def set_kv_buffer(
        self, layer: Any, loc: Array, cache_k: Array, cache_v: Array, k_scale: Any = None, v_scale: Any = None,
        layer_id_override: int | None = None,
    ) -> None:  # fmt: skip
        """Write the K and V of tokens: row i goes to slot loc[i] of the layer ``layer.layer_id`` (or the int
        ``layer``), or of ``layer_id_override``.

        Rows of another dtype are divided by their scale and converted.
        Raises (nothing is written): InvalidArgumentError for rows that are not [len(loc), H, head_dim].
        """
        at = self._place(getattr(layer, "layer_id", layer) if layer_id_override is None else layer_id_override)
        k, v = self._storable(cache_k, k_scale), self._storable(cache_v, v_scale)
        _check_rows("cache_k", k, (len(loc), self.head_num, self.head_dim))
        _check_rows("cache_v", v, (len(loc), self.head_num, self.head_dim))
        self.k_buffer[at][loc], self.v_buffer[at][loc] = k, v


class MLATokenToKVPool(DevicePool):
    """Latent rows of multi-head latent attention: kv_buffer, a list of one buffer [size + page_size, 1, row] a layer.

    Args: as of DevicePool, and
        kv_lora_rank, qk_rope_head_dim: elements of the latent and of the rotary part; a row is both.
    """

    def __init__(
        self,
        size: int,
        page_size: int,
        dtype: Any,
        kv_lora_rank: int,
        qk_rope_head_dim: int,
        layer_num: int,
        device: Any = "cpu",
        enable_memory_saver: bool = False,
        start_layer: int | None = None,
        end_layer: int | None = None,
        *,
        library: Library | None = None,
    ) -> None:
        _check_unused(enable_memory_saver, start_layer, end_layer, layer_num)
        self.kv_lora_rank, self.qk_rope_head_dim = kv_lora_rank, qk_rope_head_dim
        item = ITEM_BYTES[canonical_dtype(dtype)]
        row = (kv_lora_rank + qk_rope_head_dim) * item
        geometry = KVGeometry(kind="mla", num_layers=layer_num, num_heads=1, head_bytes=row, page_size=page_size)
        super().__init__(size, dtype, geometry, device, start_layer, library)
        self.kv_buffer = self._buffers()
        self.data_ptrs = self._addresses(self.kv_buffer)

    def _halves(self) -> list[list[Array]]:
        return [self.kv_buffer]

    def get_kv_size_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(self._buffer_bytes())

    def get_key_buffer(self, layer_id: int) -> Array:
        """The whole rows of a layer, [size + page_size, 1, row]; waits until they have been loaded."""
        return self._typed(self.kv_buffer[self._index(layer_id)])

    def get_value_buffer(self, layer_id: int) -> Array:
        """The latent part of a layer's rows; waits until they have been loaded."""
        return self.get_key_buffer(layer_id)[..., : self.kv_lora_rank]

    def get_kv_buffer(self, layer_id: int) -> tuple[Array, Array]:
        """The rows, and their latent part."""
        return self.get_key_buffer(layer_id), self.get_value_buffer(layer_id)

    def set_kv_buffer(self, layer: Any, loc: Array, cache_k: Array, cache_v: Array | None = None) -> None:
        """Write whole rows of tokens: row i goes to slot loc[i]. ``cache_v`` is a part of them, and not read."""
        at = self._place(getattr(layer, "layer_id", layer))
        self.kv_buffer[at][loc] = self._storable(cache_k)

    def set_mla_kv_buffer(self, layer: Any, loc: Array, cache_k_nope: Array, cache_k_rope: Array) -> None:
        """Write the two parts of rows: the latent [n, 1, kv_lora_rank] and the rotary [n, 1, qk_rope_head_dim].

        Raises (nothing is written): InvalidArgumentError for others.
        """
        buffer = self.kv_buffer[self._place(getattr(layer, "layer_id", layer))]
        nope, rope = self._storable(cache_k_nope), self._storable(cache_k_rope)
        _check_rows("cache_k_nope", nope, (len(loc), 1, self.kv_lora_rank))
        _check_rows("cache_k_rope", rope, (len(loc), 1, self.qk_rope_head_dim))
        buffer[loc, :, : self.kv_lora_rank] = nope
        buffer[loc, :, self.kv_lora_rank :] = rope


def _check_unused(enable_memory_saver: bool, start_layer: int | None, end_layer: int | None, layer_num: int) -> None:
    if enable_memory_saver:
        raise InvalidArgumentError("enable_memory_saver is SGLang's torch_memory_saver, which these pools do not use")
    if end_layer is not None and end_layer - (start_layer or 0) not in (layer_num - 1, layer_num):
        raise InvalidArgumentError(f"layers {start_layer} .. {end_layer} are not {layer_num}")


def _check_rows(name: str, rows: Array, shape: tuple[int, ...]) -> None:
    if tuple(rows.shape) != shape:
        raise InvalidArgumentError(f"{name} is {tuple(rows.shape)}, not {shape}")


def _to_host(array: Array) -> Array:
    """A copy in host memory; waits for the device."""
    if hasattr(array, "cpu"):
        return array.cpu()
    return array.get() if hasattr(array, "get") else array
