"""L1: KV in host memory. ``HostPagePool``: pages of plain bytes, all that replay needs. ``HostKVCache``: the host tier
of an engine, in one of the four layouts, on an arena that may be page-locked, with a state a page (``states.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentTypeError, InvalidArgumentError, PageOwnershipError, StateError
from ..types import PageIds
from .arena import MAX_PIN_CHUNK_BYTES, Arena, ArenaConfig, Kernel
from .arrays import Library, describe
from .foreign import EnginePool, view_of_engine_pool
from .layout import LAYOUTS, Kind, KVGeometry, KVView, Layout, view_of_layout
from .memory import DEFAULT_HEADROOM_BYTES, require_host_memory
from .pinning import Registrar, cuda_registrar, numa_node_of
from .states import HostSlots, MemoryStateInt

__all__ = ["HostKVCache", "HostPagePool", "HostPoolConfig", "MHATokenToKVPoolHost", "MLATokenToKVPoolHost"]
__all__ += ["copy_pages", "host_slots"]

PageBytes = npt.NDArray[np.uint8]

_BEYOND = 2.0**63
"""Bytes and slots that no machine has: they are refused for that, whatever is asked beyond."""

_RESERVED, _PROTECTED = MemoryStateInt.RESERVED, MemoryStateInt.PROTECTED
_WRITTEN = (MemoryStateInt.PROTECTED, MemoryStateInt.SYNCED, MemoryStateInt.BACKUP)


class HostPagePool:
    """``num_pages`` pages of ``page_bytes`` bytes in one array, ``data``: uint8 [num_pages, page_bytes], C order.

    Memory is taken from the system as pages are first written. Raises: MemoryError if it cannot even be reserved.
    """

    def __init__(self, num_pages: int, page_bytes: int) -> None:
        if num_pages < 0 or page_bytes < 1:
            raise InvalidArgumentError(f"a pool of {num_pages} pages of {page_bytes} bytes")
        self.num_pages = num_pages
        self.page_bytes = page_bytes
        self.data: PageBytes = np.empty((num_pages, page_bytes), np.uint8)
        # One item a page: numpy then moves a page by memcpy where it would move single bytes.
        self.pages = self.data.view(np.dtype((np.void, page_bytes)))[:, 0] if num_pages else self.data[:, 0]

    def gather(self, page_ids: PageIds) -> PageBytes:
        """Read pages: a new uint8 array [len(page_ids), page_bytes], a copy."""
        if not len(page_ids):
            return np.zeros((0, self.page_bytes), np.uint8)
        return self.pages[page_ids].view(np.uint8).reshape(len(page_ids), self.page_bytes)

    def scatter(self, page_ids: PageIds, page_bytes: PageBytes) -> None:
        """Write pages: row i of a C-contiguous uint8 [len(page_ids), page_bytes] goes to page_ids[i]."""
        if page_bytes.shape != (len(page_ids), self.page_bytes):
            raise InvalidArgumentError(f"{page_bytes.shape} bytes for {len(page_ids)} pages of {self.page_bytes}")
        if len(page_ids):
            self.pages[page_ids] = np.ascontiguousarray(page_bytes).view(self.pages.dtype)[:, 0]


def copy_pages(src: HostPagePool, src_ids: PageIds, dst: HostPagePool, dst_ids: PageIds) -> None:
    """Copy page src_ids[i] of ``src`` to page dst_ids[i] of ``dst``, page by page with memcpy.

    Raises: InvalidArgumentError if the numbers of ids or the page sizes differ.
    """
    if len(src_ids) != len(dst_ids) or src.page_bytes != dst.page_bytes:
        raise InvalidArgumentError(
            f"copy of {len(src_ids)} pages of {src.page_bytes} bytes to {len(dst_ids)} pages of {dst.page_bytes} bytes"
        )
    if len(src_ids):
        dst.pages[dst_ids] = src.pages[src_ids]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPoolConfig:
    """Where a host pool's memory comes from.

    Args:
        arena: huge pages, population, NUMA node (by default that of the device pool's GPU).
        headroom_bytes: left free for the machine, 10 GiB by default; the pool is refused if it would take more.
        registrar: page-locks the memory; by default CUDA's, if the device pool is on a GPU, else none.
        pin_chunk_bytes: at most 64 GiB; smaller chunks only serve tests and drivers that cannot lock so much at once.
        root: of the file system with proc and sys, for the limits.
    """

    arena: ArenaConfig = field(default_factory=ArenaConfig)
    headroom_bytes: int = DEFAULT_HEADROOM_BYTES
    registrar: Registrar | None = None
    pin_chunk_bytes: int = MAX_PIN_CHUNK_BYTES
    root: Path = Path("/")


class HostKVCache(HostSlots):
    """A host pool of ``num_slots`` slots. Thread-safe: one lock about every change of state.

    Args:
        geometry: the device pool's; page_size is the unit of allocation.
        num_slots: S, one or more whole pages.
        layout: one of ``LAYOUTS``.
        registrar: page-locks all of the memory now, if given.
        library: what ``alloc`` returns: "numpy" int64 arrays, or "torch" tensors.
        kernel: the arena's system calls.
    Raises: HostMemoryError if there is too little memory, PageLockError; nothing is kept then.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        num_slots: int,
        layout: Layout,
        *,
        registrar: Registrar | None = None,
        config: HostPoolConfig | None = None,
        library: Library = "numpy",
        kernel: Kernel | None = None,
    ) -> None:
        config = config or HostPoolConfig()
        if layout not in LAYOUTS:
            raise InvalidArgumentError(f"unknown layout {layout!r}; one of {', '.join(LAYOUTS)}")
        if num_slots < 1 or num_slots % geometry.page_size:
            raise InvalidArgumentError(f"{num_slots} slots are not one or more whole pages of {geometry.page_size}")
        num_bytes = num_slots * geometry.token_bytes
        arena = config.arena
        memory = require_host_memory(
            num_bytes, config.headroom_bytes, config.root, arena.huge_pages in ("auto", "hugetlb")
        )
        if (
            num_bytes + config.headroom_bytes > memory.available_bytes
        ):  # it fits into reserved huge pages, and only there
            arena = replace(arena, huge_pages="hugetlb")
        super().__init__(num_slots // geometry.page_size, geometry.page_size, library)
        self.geometry, self.layout = geometry, layout
        self.layer_num, self.head_num = geometry.num_layers, geometry.num_heads
        self.arena = Arena(num_bytes, arena, kernel)
        try:
            if registrar is not None:
                self.arena.pin(registrar, config.pin_chunk_bytes)
        except BaseException:
            self.arena.close()
            raise
        self._kv: PageBytes | None = self._shaped(self.arena.data)
        bases = [self.arena.address + half * num_bytes // geometry.halves for half in range(geometry.halves)]
        seams = self.arena.boundaries
        self._view = view_of_layout(layout, geometry, num_slots, bases, boundaries=seams, owner=self.arena)

    def alloc_pages(self, num_pages: int, for_copy: bool = False) -> PageIds | None:
        """As of HostSlots. Raises: StateError once the pool is closed."""
        if self._kv is None or self.arena.closed:
            raise StateError("the host pool is closed")
        with self.lock:  # HostSlots.alloc_pages, without the call: it is made for every backup
            return self._allocator.alloc(num_pages, _PROTECTED if for_copy else _RESERVED)

    # ---- memory ------------------------------------------------------------------------------------------------------
    def _shaped(self, data: PageBytes) -> PageBytes:
        """The arena's bytes in the dimensions of the layout, K and V outside."""
        g = self.geometry
        inner = {
            "layer_first": (g.num_layers, self.num_pages, g.page_size, g.num_heads, g.head_bytes),
            "page_first": (self.num_pages, g.page_size, g.num_layers, g.num_heads, g.head_bytes),
            "page_first_direct": (self.num_pages, g.num_layers, g.page_size, g.num_heads, g.head_bytes),
            "page_head": (self.num_pages, g.num_heads, g.page_size, g.num_layers, g.head_bytes),
        }[self.layout]
        return data.reshape(g.halves, *inner)

    @property
    def kv_buffer(self) -> PageBytes:
        """All bytes: uint8 [halves, ...the layout's dimensions..., D]. The pool cannot be closed while it lives."""
        if self._kv is None or self.arena.closed:  # in a child of fork, a page-locked one is
            raise StateError("the host pool is closed")
        return self._kv

    @property
    def k_buffer(self) -> PageBytes:
        """K's half, or MLA's only one."""
        return self._half(0)

    @property
    def v_buffer(self) -> PageBytes:
        """V's half. Raises: InvalidArgumentError for MLA."""
        if self.geometry.halves == 1:
            raise InvalidArgumentError("MLA has no values apart")
        return self._half(1)

    def _half(self, half: int) -> PageBytes:
        buffer: PageBytes = self.kv_buffer[half]
        return buffer

    @property
    def pinned(self) -> bool:
        """Whether the memory is page-locked."""
        return self.arena.pinned

    @property
    def page_dims(self) -> str:
        """The letters of a flat page, outermost first: two pools exchange flat pages only if these are equal."""
        inner = {
            "layer_first": "L P H D", "page_first": "P L H D", "page_first_direct": "L P H D", "page_head": "H P L D",
        }[self.layout]  # fmt: skip
        return f"K {inner}" if self.geometry.kind == "mha" else inner

    def view(self) -> KVView:
        """Where each byte lies. Until ``close``; copies over a view that is older than that raise StateError."""
        if self._kv is None or self.arena.closed:  # in a child of fork, a page-locked one is
            raise StateError("the host pool is closed")
        return self._view

    def get_size_per_token(self) -> int:
        """Bytes of one token, all layers and halves."""
        return self.geometry.token_bytes

    size_per_token = property(get_size_per_token)

    def close(self) -> None:
        """Unlock and release the memory. A second call does nothing.

        Raises (call it again then): StateError if a copy is in flight (a page is PROTECTED), and nothing changes;
            StateError if a view of kv_buffer lives, PageLockError: the pool is of no use after either.
        """
        with self.lock:
            busy = np.flatnonzero(self._state == MemoryStateInt.PROTECTED)
        if busy.size and not self.arena.closed:
            raise StateError(f"host pool closed while {busy.size} pages have a copy in flight, the first is {busy[0]}")
        self._kv = None
        self.arena.close()

    # ---- pages as bytes, for storage ---------------------------------------------------------------------------------
    def get_flat_data_page(self, index: int) -> PageBytes:
        """Read a page: a new uint8 [page_bytes] in the order of ``page_dims``. Args: index: its first slot."""
        page: PageBytes = self.get_flat_data_pages(index + self._offsets)[0]
        return page

    def get_dummy_flat_data_page(self) -> PageBytes:
        """Zeros uint8 [page_bytes], to receive a page from storage."""
        return np.zeros(self.geometry.page_bytes, np.uint8)

    def set_from_flat_data_page(self, index: int, data_page: Any) -> None:
        """Write a page: page_bytes bytes in the order of ``page_dims`` (a buffer, or an array or tensor of any dtype).

        Raises: ArgumentTypeError for anything else; as ``set_from_flat_data_pages``.
        """
        self.set_from_flat_data_pages(index + self._offsets, _flat_bytes(data_page)[None])

    def get_flat_data_pages(self, indices: Any) -> PageBytes:
        """Read pages that have been written: a new uint8 [pages, page_bytes]. Args: indices: slots of whole pages.

        Raises: StateError for pages that are IDLE or RESERVED: they hold nothing yet.
        """
        pages = self._accessible(indices, "be read", *_WRITTEN)
        rows: PageBytes = self._by_page()[pages].reshape(pages.size, self.geometry.page_bytes)
        return rows

    def set_from_flat_data_pages(self, indices: Any, data_pages: PageBytes) -> None:
        """Write pages: row i of uint8 [pages, page_bytes]. Raises: StateError for pages that are not RESERVED."""
        pages = self._accessible(indices, "be written", MemoryStateInt.RESERVED)
        if data_pages.shape != (pages.size, self.geometry.page_bytes) or data_pages.dtype != np.uint8:
            raise InvalidArgumentError(
                f"{data_pages.shape} of {data_pages.dtype} for {pages.size} pages of {self.geometry.page_bytes} bytes"
            )
        by_page = self._by_page()
        by_page[pages] = data_pages.reshape(pages.size, *by_page.shape[1:])

    def _by_page(self) -> PageBytes:
        """All bytes with the dimension of pages outermost: a view."""
        by_page: PageBytes = np.moveaxis(self.kv_buffer, 2 if self.layout == "layer_first" else 1, 0)
        return by_page

    def page_buffer(self, index: int) -> list[tuple[int, int]]:
        """Where a page lies, for zero copy: (address, bytes) of each contiguous piece; in this order they are its
        flat bytes.

        Args: index: its first slot. Valid as long as the page is allocated.
        """
        page = int(self._accessible(index + self._offsets, "be used", MemoryStateInt.RESERVED, *_WRITTEN)[0])
        g, view = self.geometry, self.view()
        if self.layout == "layer_first":
            return [(int(base) + page * view.page_stride, g.page_size * g.row_bytes) for base in view.bases.reshape(-1)]
        return [(int(base) + page * view.page_stride, g.page_bytes // g.halves) for base in view.bases[:, 0]]

    def page_pieces(self, page_ids: PageIds) -> tuple[npt.NDArray[np.int64], int]:
        """``page_buffer`` for many pages at once, 100 times as fast a page.

        Returns: int64 [len(page_ids), pieces], where in ``arena.data`` each contiguous piece begins, and the bytes of
        each. Raises: StateError for pages that are IDLE, PageOwnershipError.
        """
        pages = np.asarray(page_ids, np.int64)
        outside = (pages < 0) | (pages >= self.num_pages)
        if outside.any():
            raise PageOwnershipError(f"host page {pages[outside][0]} is not of this pool of {self.num_pages}")
        self._check(pages, "be used", (MemoryStateInt.RESERVED, *_WRITTEN))
        g, view = self.geometry, self.view()
        apart = self.layout == "layer_first"
        bases = view.bases.reshape(-1) if apart else view.bases[:, 0]
        starts = bases.astype(np.int64) - self.arena.address
        piece_bytes = g.page_size * g.row_bytes if apart else g.page_bytes // g.halves
        return starts[None, :] + pages[:, None] * view.page_stride, piece_bytes

    def get_buffer_meta(self, keys: Sequence[str], indices: Any) -> tuple[list[str], list[int], list[int]]:
        """Keys, addresses and bytes of every contiguous piece of these pages.

        layer_first: key_LAYER_k and key_LAYER_v for each layer, as in SGLang; else key_k and key_v. MLA: only _k.
        """
        pages = self._accessible(indices, "be used", MemoryStateInt.RESERVED, *_WRITTEN)
        if len(keys) != pages.size:
            raise InvalidArgumentError(f"{len(keys)} keys for {pages.size} pages")
        names, addresses, sizes = [], [], []
        apart = self.layout == "layer_first"
        halves = "kv"[: self.geometry.halves]
        suffixes = [f"_{layer}_{half}" for layer in range(self.layer_num) for half in halves]
        for key, page in zip(keys, pages.tolist(), strict=True):
            pieces = self.page_buffer(page * self.page_size)
            if apart:  # by half, then layer; the keys go by layer, then half
                pieces = [pieces[half * self.layer_num + layer] for layer in range(self.layer_num)
                          for half in range(len(halves))]  # fmt: skip
            names += [key + suffix for suffix in (suffixes if apart else [f"_{half}" for half in halves])]
            addresses += [address for address, _ in pieces]
            sizes += [num_bytes for _, num_bytes in pieces]
        return names, addresses, sizes


# ---- sized by a device pool ------------------------------------------------------------------------------------------
def host_slots(geometry: KVGeometry, device_slots: int, ratio: float = 0.0, num_bytes: int = 0) -> int:
    """Slots of a host pool, whole pages: as many as ``num_bytes`` hold if that is above 0, else ratio * device_slots.

    Raises: InvalidArgumentError with the numbers if it is not even a page, or one is negative or not finite.
    """
    if num_bytes < 0 or not 0 <= ratio < math.inf:
        raise InvalidArgumentError(f"a host pool of {num_bytes:,} bytes, or {ratio} times {device_slots} device slots")
    wanted = num_bytes // geometry.token_bytes if num_bytes > 0 else int(min(device_slots * ratio, _BEYOND))
    slots = wanted - wanted % geometry.page_size
    if slots < 1:
        asked = f"{num_bytes:,} bytes" if num_bytes > 0 else f"{ratio} times {device_slots} device slots"
        raise InvalidArgumentError(
            f"{asked} hold {max(0, wanted)} tokens of {geometry.token_bytes} bytes: no page of {geometry.page_size}"
        )
    return slots


class _HostPoolOfDevice(HostKVCache):
    """A host pool with the constructor of SGLang's.

    Args:
        device_pool: an engine's, or radixkv's; see ``foreign.view_of_engine_pool``.
        host_to_device_ratio: slots a device slot, if host_size is 0.
        host_size: GB (10**9 bytes), or 0.
        page_size, layout: see HostKVCache.
        pin_memory: page-lock, if the device pool is on a GPU or ``config`` has a registrar.
        device: must be "cpu".
    Raises: HostMemoryError, PageLockError, DeviceUnavailableError; InvalidArgumentError, UnsupportedLayoutError
        (ValueErrors) for other kinds of pools.
    """

    _kind: Kind

    def __init__(
        self,
        device_pool: Any,
        host_to_device_ratio: float,
        host_size: float,
        page_size: int,
        layout: Layout,
        pin_memory: bool = True,
        device: str = "cpu",
        *,
        config: HostPoolConfig | None = None,
        kernel: Kernel | None = None,
    ) -> None:
        config = config or HostPoolConfig()
        found = view_of_engine_pool(device_pool, page_size=page_size)
        if found.geometry.kind != self._kind:
            raise InvalidArgumentError(f"a device pool of kind {found.geometry.kind} for {type(self).__name__}")
        if str(device) != "cpu":
            raise InvalidArgumentError(f"a host pool on device {device!r}")
        self.device_pool, self.device, self.pin_memory = device_pool, "cpu", pin_memory
        self.dtype = getattr(device_pool, "store_dtype", None)
        self.start_layer = getattr(device_pool, "start_layer", None) or 0
        self.end_layer = self.start_layer + found.geometry.num_layers - 1
        if not 0 <= host_size < math.inf:
            raise InvalidArgumentError(f"a host pool of {host_size} GB")
        device_slots = int(getattr(device_pool, "size", found.view.num_slots))
        registrar = config.registrar
        if found.view.device != "cpu":
            if pin_memory and registrar is None:
                registrar = cuda_registrar()
            if config.arena.numa_node is None:
                node = numa_node_of(found.view.device, root=config.root)
                config = replace(config, arena=replace(config.arena, numa_node=node))
        super().__init__(
            found.geometry,
            host_slots(found.geometry, device_slots, host_to_device_ratio, int(min(host_size * 1e9, _BEYOND))),
            layout,
            registrar=registrar if pin_memory else None,
            config=config,
            library="torch" if _is_torch(found) else "numpy",
            kernel=kernel,
        )
        self.head_dim = found.geometry.head_bytes // describe(found.arrays[0]).item_bytes


class MHATokenToKVPoolHost(_HostPoolOfDevice):
    """The host pool of a device pool of keys and values."""

    _kind = "mha"


class MLATokenToKVPoolHost(_HostPoolOfDevice):
    """The host pool of a device pool of latent rows."""

    _kind = "mla"


def _flat_bytes(data: Any) -> PageBytes:
    """uint8 [bytes] of a buffer, or of an array or tensor of any dtype and shape; a copy if it is not contiguous."""
    if hasattr(data, "detach"):  # numpy has not all of torch's dtypes: by bytes
        import torch

        data = data.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    if isinstance(data, np.ndarray):
        return np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    try:
        return np.frombuffer(data, np.uint8)
    except TypeError as error:
        raise ArgumentTypeError(f"a page is a buffer, an array or a tensor, not {type(data).__name__}") from error


def _is_torch(pool: EnginePool) -> bool:
    return type(pool.arrays[0]).__module__.partition(".")[0] == "torch"
