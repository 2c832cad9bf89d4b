"""L5: puts a controller together for an engine's pools, under the names that engines touch."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from typing import Any

from ..controller import Controller, CpuMover, CudaMover, Group, LayerCounter, Mover, PrefetchInFlight, TorchGroup
from ..controller.mover_cuda import GpuTransfers
from ..errors import InvalidArgumentError, StateError
from ..pool.arrays import Array, canonical_dtype
from ..pool.foreign import EnginePool
from ..pool.host import HostKVCache
from ..storage import PageNamespace, PageStore, Storage, create_storage, host_page_parts
from ..storage.sglang_api import PluginStorage, is_plugin
from ..transfer.choose import PathName, cache_folder
from ..transfer.cpu import CpuTransfer
from ..tree.base import BaseRadixTree
from .config import HiCacheConfig
from .hashes import get_hash_str, hex_of
from .indices import AllocatorPages, Indices

__all__ = ["IO_BACKENDS", "HiCacheController", "LayerDoneCounter", "LoadCacheEvent", "PrefetchOperation"]
__all__ += ["backend_name", "storage_of"]

IO_BACKENDS: dict[str, PathName | None] = {"kernel": "kernel", "direct": "engine", "auto": None}
"""On a GPU: by kernels, by copy engines, or for each copy by what was measured to be faster (not known there)."""

FOLDER_VARIABLE = "SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"

_log = logging.getLogger("radixkv.hicache")


class LayerDoneCounter:
    """Which layers of which loads are in place, as engines ask for it: ``set_consumer(index)`` before a batch, with the
    index that ready_to_load_host_cache returned for it, then ``wait_until(layer)`` before each layer is read.

    Index 0 means that there is nothing to wait for, as engines have it by default; the first batch of loads is 1.
    """

    def __init__(self, layers: LayerCounter) -> None:
        self._layers = layers
        self._adopted = 0

    @property
    def num_layers(self) -> int:
        """Layers of the model's part here."""
        return self._layers.num_layers

    @property
    def consumer_index(self) -> int:
        """What set_consumer was given."""
        return self._layers.consumer_index + 1

    @property
    def producer_index(self) -> int:
        """The index of the last batch of loads; 0 if there was none."""
        return self._layers.latest + 1

    def next_producer(self) -> int:
        """The index that the next batch of loads will have."""
        return self._layers.next_producer() + 1

    def set_consumer(self, index: int) -> None:
        """Choose the batch of loads that ``wait_until`` waits for. 0 or below: none, but what a request has adopted."""
        if self._adopted:
            arrived = self._layers.outcome(self._adopted - 1)
            if arrived is not None:  # if it has not, it is being loaded again, or has been dropped
                self._adopted = 0 if arrived or not self._layers.in_flight else self._layers.latest + 1
        self._layers.set_consumer(max(index, self._adopted, 0) - 1)

    def adopt(self) -> None:
        """A running request has gone over to pages that are being loaded for another one (it had computed the same, and
        the cache keeps one of the two): until they are there, whatever is computed next waits for them."""
        self._adopted = self._layers.latest + 1

    def wait_until(self, threshold: int) -> None:
        """Wait until layer ``threshold`` (counted from 0) is in place. On a GPU the current stream waits, not the
        caller. Raises: LoadError if the batch, or one it depends on, failed."""
        self._layers.wait_until(threshold)


class LoadCacheEvent:
    """What wakes the thread that loads, where there is one. Here loads begin at once, so it is never left set."""

    __slots__ = ("_start",)

    def __init__(self, start: Callable[[], int]) -> None:
        self._start = start

    def set(self) -> None:
        """Start the queued loads, as ready_to_load_host_cache."""
        self._start()

    def is_set(self) -> bool:
        """False."""
        return False

    def clear(self) -> None:
        """Nothing."""


class PrefetchOperation:
    """A prefetch in flight, looked at from outside: a handle. Once it is settled, revoked or cancelled, nothing has
    been completed, and it has no hashes and no host slots: what it brought is in the tree."""

    __slots__ = ("_controller", "_host_indices", "_tokens", "id", "request_id", "start_time")

    id: int
    """Of the operation; the same on all ranks."""
    start_time: float
    """Seconds of the controller's clock (``HiCacheConfig.clock``, time.monotonic)."""

    def __init__(self, controller: Controller, request_id: str, begun: PrefetchInFlight, host_indices: Indices) -> None:
        self._controller, self._host_indices, self.request_id = controller, host_indices, request_id
        self.id, self.start_time, self._tokens = begun.op_id, begun.started_s, begun.tokens

    @property
    def _now(self) -> PrefetchInFlight | None:
        """What is known of it; None if it has ended, also if there is another one of the same request."""
        found = self._controller.prefetch_in_flight(self.request_id)
        return found if found is not None and found.op_id == self.id else None

    @property
    def token_ids(self) -> list[int]:
        """The tokens that were asked for, whole pages."""
        tokens: list[int] = self._tokens.tolist()
        return tokens

    @property
    def hash_value(self) -> list[str]:
        """The hashes (hex) of the pages that are brought; none before storage has said which it has."""
        now = self._now
        return [] if now is None else hex_of(now.digests)

    @property
    def host_indices(self) -> Array:
        """int64 host slots that it fills; none before storage has said which pages it has."""
        now = self._now
        return self._host_indices.none if now is None else self._host_indices.of_pages(now.host_page_ids)

    @property
    def completed_tokens(self) -> int:
        """Tokens that have arrived, on this rank."""
        return self._controller.prefetch_progress(self.request_id).fetched_tokens if self._now else 0

    def is_done(self) -> bool:
        """Whether all that will come is here (or it was revoked, cancelled or settled)."""
        now = self._now
        if now is None or now.stopped:
            return True
        return self._controller.prefetch_progress(self.request_id).state == "fetched"

    def mark_done(self) -> None:
        """Read no further: the next check_prefetch_progress ends it, and what has come enters the tree. (To give it up:
        HiRadixCache.cancel_prefetch.)"""
        if self._now is not None:
            self._controller.stop_prefetch(self.request_id)


class HiCacheController:
    """The controller, its mover, its group and its storage, for one device pool and one host pool.

    Args: storage: the backend that will be attached, by name, if any; all ranks must mean the same.

    Attributes (those that engines touch): layer_done_counter, load_cache_event, write_policy, io_backend,
    mem_pool_host, mem_pool_device, mem_pool_device_allocator, page_size, and the properties. ``core`` is the
    controller itself.
    """

    get_hash_str = staticmethod(get_hash_str)

    def __init__(
        self,
        tree: BaseRadixTree,
        device_pages: AllocatorPages,
        device_pool: Any,
        found: EnginePool,
        host_pool: HostKVCache,
        tp_group: Any,
        io_backend: str,
        config: HiCacheConfig,
        storage: str = "none",
    ) -> None:
        if io_backend not in IO_BACKENDS:
            raise InvalidArgumentError(f"io backend {io_backend!r} is none of {', '.join(IO_BACKENDS)}")
        self.mem_pool_device_allocator, self.mem_pool_device = device_pages.allocator, device_pool
        self.mem_pool_host, self.page_size, self.io_backend = host_pool, tree.page_size, io_backend
        self.write_policy = config.control.write_policy
        self._config = config
        self._group = group_of(tp_group, found.view.device, config.group_timeout_s)
        self._own_storage: Storage | None = None
        self._leaving: list[tuple[Storage, bool]] = []
        """What was detached and is not parted from yet, and whether it was made here."""
        self._closed = False
        mover = mover_of(found, host_pool, io_backend, config)
        try:
            self.core = Controller(
                tree, device_pages, host_pool, mover, group=self._group, config=config.control,
                listener=config.listener, alike=config.alike() | {"storage": storage}, clock=config.clock,
            )  # fmt: skip
        except BaseException:
            mover.close()
            raise
        self.layer_done_counter = LayerDoneCounter(self.core.layer_counter)
        self.load_cache_event = LoadCacheEvent(self.start_loads)
        self._loads_in_flight = False
        register = getattr(device_pool, "register_layer_transfer_counter", None)
        if register is not None:
            register(self.layer_done_counter)

    @property
    def enable_storage(self) -> bool:
        """Whether there is a storage backend now."""
        return self.core.storage is not None

    @property
    def storage_backend(self) -> Storage | None:
        """The storage backend."""
        store = self.core.storage
        return None if store is None else store.storage

    @property
    def storage_backend_type(self) -> str | None:
        """The name of the storage backend."""
        storage = self.storage_backend
        return None if storage is None else storage.name

    @property
    def tp_world_size(self) -> int:
        """Ranks that serve one model together."""
        return self._group.size if self._group else 1

    # ---- prefetches, in tokens ---------------------------------------------------------------------------------------
    @property
    def prefetch_threshold(self) -> int:
        """Below which a prefetch is not worth it; at least a page."""
        return max(self._config.control.prefetch_threshold, self.page_size)

    @property
    def prefetch_tokens_occupied(self) -> int:
        """What the prefetches in flight have asked for."""
        return self.core.stats().prefetch_tokens_in_flight

    @property
    def prefetch_capacity_limit(self) -> int:
        """How much that may be before another one is refused."""
        return self.core.prefetch_capacity_tokens

    def prefetch_rate_limit_check(self) -> bool:
        """Whether there is room for another prefetch below that limit."""
        return self.prefetch_tokens_occupied < self.prefetch_capacity_limit

    # ---- loads -------------------------------------------------------------------------------------------------------
    def start_loads(self) -> int:
        """Start the queued loads.

        Returns: what ``layer_done_counter.set_consumer`` takes for what is computed next: the batch that has just
            begun, else the last one that is still on its way (its pages match), else 0.
        """
        index = self.core.start_loads()
        if index < 0 and self._loads_in_flight:
            self._loads_in_flight = self.core.stats().loads_in_flight > 0
            index = self.core.layer_counter.latest if self._loads_in_flight else -1
        elif index >= 0:
            self._loads_in_flight = True
        return index + 1

    def adopt_loading(self) -> None:
        """See LayerDoneCounter.adopt."""
        self.start_loads()
        self.layer_done_counter.adopt()

    # ---- storage -----------------------------------------------------------------------------------------------------
    def attach_storage(self, backend: Any) -> None:
        """Use a storage backend from now on: a name, a Storage, or an engine's HiCacheStorage. All ranks or none.

        Raises: StateError if there is one; InvalidArgumentError; StorageError if it cannot be reached, from here or
            from another rank; GroupError.
        """
        if self.enable_storage:
            raise StateError("there is a storage already: detach it first")
        with contextlib.ExitStack() as undo:
            self.core.attach_storage(lambda: self._make_store(backend, undo))
            undo.pop_all()
        _log.info("storage=attached backend=%s", self.storage_backend_type)

    def _make_store(self, backend: Any, undo: contextlib.ExitStack) -> PageStore:
        """Open a storage backend. Args: undo: gets what closes it again."""
        config, host = self._config, self.mem_pool_host
        namespace = PageNamespace.of_geometry(
            host.geometry, host.page_dims, model=config.model_name(), dtype=_dtype_of(self.mem_pool_device),
            tp_rank=self._group.rank if self._group else 0, tp_size=self._group.size if self._group else 1,
            first_layer=getattr(host, "start_layer", 0),
            first_head=config.first_head, extra=config.model_extra,
        )  # fmt: skip
        storage, own = storage_of(backend, config)
        if own:
            undo.callback(storage.close)
        storage.register(host.arena.data)
        undo.callback(storage.unregister, host.arena.data)
        self._own_storage = storage if own else None
        undo.callback(setattr, self, "_own_storage", None)
        return PageStore(storage, namespace, host_page_parts(host))

    def detach_storage(self) -> None:
        """Go on without storage. What is stored stays; a backend that was made here is closed."""
        store = self.core.detach_storage()
        if store is not None:
            _log.info("storage=detached backend=%s", store.storage.name)
            self._part_from(store.storage)

    def _part_from(self, storage: Storage) -> None:
        """Forget the host pool's memory there, and close it if it was made here; unless a call hangs in it: closing it
        could hang, too, and what it moves bytes by needs the memory."""
        self._leaving.append((storage, self._own_storage is not None))
        self._own_storage = None
        self._part_from_ended()

    def _part_from_ended(self) -> None:
        for leaving in list(self._leaving):
            storage, own = leaving
            if self.core.hangs(storage):
                _log.warning("storage=hangs backend=%s", storage.name)
                continue
            self._leaving.remove(leaving)
            storage.unregister(self.mem_pool_host.arena.data)
            if own:
                storage.close()

    def close(self) -> bool:
        """End all threads. Returns: whether they have ended; if not, something hangs, see Controller.close."""
        storage = None if self._closed else self.storage_backend
        ended = self._closed = self.core.close()
        if storage is not None and ended:
            self._part_from(storage)
        else:
            self._part_from_ended()
        return ended


def backend_name(backend: Any) -> str:
    """What is meant, in a word that all ranks say alike."""
    if backend is None or isinstance(backend, str):
        return str(backend).lower()
    return type(backend).__name__


def storage_of(backend: Any, config: HiCacheConfig) -> tuple[Storage, bool]:
    """The storage that is meant, and whether it was made here.

    "file" and "nixl" (the same folder) without a path: $SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR, as engines' operators
    know it, else a folder of the user's cache.
    """
    if isinstance(backend, Storage):
        return backend, False
    if not isinstance(backend, str) and is_plugin(backend):
        return PluginStorage(backend), True
    options = dict(config.storage_options)
    if backend in ("file", "nixl"):
        options.setdefault("path", os.environ.get(FOLDER_VARIABLE) or cache_folder() / "kv")
    return create_storage(backend, **options), True


def group_of(tp_group: Any, device: str, timeout_s: float) -> Group | None:
    """The ranks of a torch process group; None for one rank."""
    if tp_group is None:
        return None
    import torch

    distributed = torch.distributed
    if distributed.get_world_size(group=tp_group) == 1:
        return None
    on_gpu = distributed.get_backend(tp_group) == "nccl"
    return TorchGroup(tp_group, timeout_s, device if on_gpu else "cpu")


def mover_of(found: EnginePool, host: HostKVCache, io_backend: str, config: HiCacheConfig) -> Mover:
    """What copies between the two pools. On a CPU both io backends are the same copy."""
    if found.view.device == "cpu":
        transfer = CpuTransfer(found.geometry, config.copy_threads)
        return CpuMover(transfer, found.view, host.view())
    transfers = GpuTransfers(found.geometry, int(found.view.device.partition(":")[2]), IO_BACKENDS[io_backend])
    return CudaMover(
        found.geometry, found.view, host.view(), config.compute_stream, fence=config.compute_fence,
        transfer_on=transfers.on,
    )  # fmt: skip


def _dtype_of(pool: Any) -> str:
    """The name of the KV's dtype, for the keys in storage."""
    dtype = getattr(pool, "dtype", None)
    try:
        return canonical_dtype(dtype)
    except InvalidArgumentError:
        return str(dtype)
