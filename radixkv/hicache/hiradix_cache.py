"""L5: HiRadixCache: RadixCache with a host tier, and storage behind it, as SGLang's schedulers call it.

    scheduler step                       here                                   the controller
    check_hicache_events()               what has ended                         poll
    check_prefetch_progress(rid)         False: leave the request for later     finish_prefetch
    match_prefix(key)                    device part, and how much more         match
    init_load_back(node, n)              slots for what is on the host          load
    ready_to_load_host_cache()           an index for the batch                 start_loads
    layer_done_counter.wait_until(l)     before the model reads layer l         layer_counter
    cache_(un)finished_req(req)          insert, which starts backups           insert
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from ..controller import STORED, Attribution, Polled
from ..errors import HandleError, StateError
from ..pool.arrays import Array
from ..pool.foreign import view_of_engine_pool
from ..pool.host import HostKVCache, MHATokenToKVPoolHost, MLATokenToKVPoolHost
from ..pool.layout import Layout
from ..tree.base import MatchResult as TreeMatch
from ..tree.core import RadixTree
from ..types import ROOT, PageIds
from .attribution import Attributions
from .base import MatchResult, Request
from .cache_controller import HiCacheController, PrefetchOperation, backend_name
from .config import HiCacheConfig
from .hashes import last_hash, node_hashes, page_hash_for
from .node import TreeNode
from .ongoing import OngoingNames
from .radix_cache import RadixCache
from .slots import tokens_of

__all__ = ["HiRadixCache"]

_log = logging.getLogger("radixkv.hicache")

POLL_S = 0.0005
"""Between two looks of a call that waits for copies."""


class HiRadixCache(OngoingNames, RadixCache):
    """A prefix cache over an engine's device pool, a host pool of its own, and storage. One scheduler thread calls it.

    Args:
        req_to_token_pool, token_to_kv_pool_allocator: as RadixCache; the allocator's get_kvcache() is the device pool.
        tp_cache_group: the torch process group of the ranks that serve one model together; None: one rank. All ranks
            make the same calls in the same order.
        page_size: P, tokens a page.
        hicache_ratio: host slots a device slot, if hicache_size is 0.
        hicache_size: GB (10**9 bytes) of host memory, or 0.
        hicache_write_policy: write_through, write_through_selective or write_back.
        hicache_io_backend: kernel, direct (copy engines), or auto (whichever was measured to be faster, for each copy).
            On a CPU all are the same.
        hicache_mem_layout: layer_first, page_first, page_first_direct or page_head. page_first with direct becomes
            layer_first, with a warning.
        hicache_storage_backend: None, a name (file, redis, s3, mooncake, nixl, memory, module:Class), a Storage, or an
            engine's own HiCacheStorage (closed with the cache). The model's name and options: ``config``.
        hicache_storage_prefetch_policy: best_effort, wait_complete or timeout.
        config: everything else.
    Raises: InvalidArgumentError or UnsupportedLayoutError (both ValueErrors) for a pool or a setting that is not known,
        HostMemoryError, PageLockError, StorageError, GroupError; nothing is kept then.
    """

    def __init__(
        self,
        req_to_token_pool: Any,
        token_to_kv_pool_allocator: Any,
        tp_cache_group: Any,
        page_size: int,
        hicache_ratio: float,
        hicache_size: float,
        hicache_write_policy: str,
        hicache_io_backend: str,
        hicache_mem_layout: str,
        hicache_storage_backend: Any = None,
        hicache_storage_prefetch_policy: str | None = "best_effort",
        *,
        config: HiCacheConfig | None = None,
    ) -> None:
        config = config or HiCacheConfig()
        control = replace(
            config.control,
            write_policy=cast(Any, hicache_write_policy),
            prefetch_policy=cast(Any, hicache_storage_prefetch_policy or "best_effort"),
        )
        self.config = config = replace(config, control=control)
        if hicache_io_backend == "direct" and hicache_mem_layout == "page_first":
            _log.warning("mem_layout=layer_first reason=%r", "page_first is not for the direct io backend")
            hicache_mem_layout = "layer_first"
        self.kv_cache = token_to_kv_pool_allocator.get_kvcache()
        self.tp_group = tp_cache_group
        found = view_of_engine_pool(self.kv_cache, page_size=page_size)
        hashed = config.page_hashes if config.page_hashes is not None else hicache_storage_backend is not None
        tree = RadixTree(
            page_size, config.eviction_policy, events=config.enable_kv_cache_events,
            max_events=config.max_kv_cache_events, page_hash=page_hash_for(hashed),
        )  # fmt: skip
        self._set_up(req_to_token_pool, token_to_kv_pool_allocator, tree, False, config.enable_kv_cache_events)
        kind = MHATokenToKVPoolHost if found.geometry.kind == "mha" else MLATokenToKVPoolHost
        self.token_to_kv_pool_host: HostKVCache = kind(
            self.kv_cache, hicache_ratio, hicache_size, page_size, cast(Layout, hicache_mem_layout),
            config=config.host_pool,
        )  # fmt: skip
        assert self._pages is not None
        try:
            self.cache_controller = HiCacheController(
                tree, self._pages, self.kv_cache, found, self.token_to_kv_pool_host, tp_cache_group,
                hicache_io_backend, config, backend_name(hicache_storage_backend),
            )  # fmt: skip
        except BaseException:
            self.token_to_kv_pool_host.close()
            raise
        self._ops = self._core = self.cache_controller.core
        self._attributions = Attributions(self._core)
        try:
            if hicache_storage_backend is not None:
                self.attach_storage_backend(hicache_storage_backend)
        except BaseException:
            self.close()
            raise

    # ---- settings, under the names that engines know -----------------------------------------------------------------
    @property
    def enable_storage(self) -> bool:
        """Whether there is a storage backend now."""
        return self.cache_controller.enable_storage

    @property
    def prefetch_stop_policy(self) -> str:
        """best_effort, wait_complete or timeout."""
        return self.config.control.prefetch_policy

    @property
    def prefetch_threshold(self) -> int:
        """Tokens below which a prefetch is not worth it."""
        return self.config.control.prefetch_threshold

    @property
    def load_back_threshold(self) -> int:
        """Tokens below which a load is not worth it."""
        return self.config.control.load_back_threshold

    @property
    def write_through_threshold(self) -> int:
        """Hits from which a node is copied to the host."""
        return self.config.control.hits_to_host

    @property
    def write_through_threshold_storage(self) -> int:
        """Hits from which a node with a host copy goes to storage."""
        return self.config.control.hits_to_storage

    # ---- a request ---------------------------------------------------------------------------------------------------

    def _adopt(self, req: Any, prefix: Array, mine: PageIds, found: TreeMatch) -> int:
        if found.loading_tokens:
            self.cache_controller.adopt_loading()
        return super()._adopt(req, prefix, mine, found)

    # ---- device and host ---------------------------------------------------------------------------------------------
    def evict(self, num_tokens: int) -> int:
        """Free device slots, whole leaves in policy order; what has a host copy stays there.

        write_back: what has none is copied first, and this waits for it.
        Returns: tokens freed. Raises: GroupError.
        """
        self._children = None
        return self._core.evict(max(0, num_tokens))

    def evict_host(self, num_tokens: int) -> int:
        """Free host slots of leaves that are on the host only and that nobody reads. Returns: tokens freed."""
        self._children = None
        return self._core.evict_host(max(0, num_tokens))

    def write_backup(self, node: TreeNode, write_back: bool = False) -> int:
        """Start to copy a node to the host. It is locked until check_hicache_events sees the end of it.

        Returns: tokens; 0 if there is no room, nothing to do, or a copy of it in flight. write_back changes nothing:
            an eviction does its own copies.
        """
        self._children = None
        return self._core.backup(node.id)

    def write_backup_storage(self, node: TreeNode) -> int | None:
        """Start to write a node's host copy to storage. Returns: a number for it; None if there is nothing to do."""
        self._children = None
        return self._core.store(node.id)

    def inc_hit_count(self, node: TreeNode) -> None:
        """Start what the write policy asks for a node that is hit once more. (insert does so by itself.)"""
        self._children = None
        self._core.hit(node.id)

    def load_back(self, node: TreeNode, mem_quota: int | None = None) -> Array | None:
        """Queue the load of all of a node's path that is on the host only; ready_to_load_host_cache starts it.

        From now on it matches, and is protected. Makes room by one eviction.
        Args: mem_quota: tokens that it may take, less those that locking the path above makes unevictable.
        Returns: int64 slots; None if it is too little, too much, or finds no room.
        """
        self._children = None
        load = self._core.load(node.id, mem_quota)
        if load is None:
            return None
        self._attributions.note_load(load.node, load.num_tokens)
        return self.indices.of_pages(load.page_ids)

    def init_load_back(
        self, last_node: TreeNode, host_hit_length: int, mem_quota: int | None = None
    ) -> tuple[Array, TreeNode]:
        """load_back for a request. host_hit_length is not needed.

        Returns: the slots (none, if it does not load), and the node that the request's prefix ends at now.
        """
        self._children = None
        load = self._core.load(last_node.id, mem_quota)
        if load is not None:
            view = self.view(load.node)
            self._attributions.note_load(load.node, load.num_tokens, view)
            return self.indices.of_pages(load.page_ids), view
        tail = self.tree.host_path(last_node.id) if last_node.id != ROOT else []
        return self.indices.none, self.view(self.tree.node_info(tail[0]).parent) if tail else last_node

    def ready_to_load_host_cache(self) -> int:
        """Start the queued loads.

        Returns: what ``layer_done_counter.set_consumer`` takes for the batch that is computed next; 0 if it has nothing
            to wait for.
        """
        return self.cache_controller.start_loads()

    # ---- what has ended ----------------------------------------------------------------------------------------------
    def check_hicache_events(self) -> Polled:
        """Settle what has ended on all ranks: copies, storage calls, look-ups. Once a scheduler step.

        Returns: how many of each. Raises: GroupError.
        """
        self._children = None
        polled = self._core.poll()
        if polled.failed and self._attributions.loads:
            self._drop_failed_loads()
        return polled

    def _drop_failed_loads(self) -> None:
        """What did not arrive came from nowhere."""
        loads = self._attributions.loads
        for handle in list(loads):
            try:
                arrived = self.tree.node_info(handle).page_ids is not None
            except HandleError:
                arrived = False
            if not arrived:
                del loads[handle]

    def writing_check(self, write_back: bool = False) -> None:
        """check_hicache_events. Args: write_back: until no copy to the host is in flight. Raises: StateError if that
        takes longer than control.copy_timeout_s."""
        self.check_hicache_events()
        if write_back:
            self._wait(lambda: self._core.stats().writes_in_flight, "copies to the host are in flight")

    def loading_check(self) -> None:
        """check_hicache_events."""
        self.check_hicache_events()

    def check_revoked_prefetch(self) -> None:
        """check_hicache_events."""
        self.check_hicache_events()

    def check_backup_progress(self) -> None:
        """check_hicache_events."""
        self.check_hicache_events()

    def _wait(self, left: Callable[[], int], what: str) -> None:
        """Poll until nothing is left. What is left follows from agreed state, so all ranks poll as often."""
        end_s = time.monotonic() + self.config.control.copy_timeout_s
        while left():
            if not self._core.all_can(time.monotonic() <= end_s):  # else a rank would poll once more, alone
                raise StateError(f"{left()} {what} after {self.config.control.copy_timeout_s} s")
            time.sleep(POLL_S)
            self._core.poll()

    # ---- storage -----------------------------------------------------------------------------------------------------
    def prefetch_from_storage(
        self,
        req_id: str,
        last_host_node: TreeNode,
        new_input_tokens: Any,
        last_hash: str | None = None,
        **kwargs: Any,
    ) -> PrefetchOperation | None:
        """Bring what storage has of a request's further tokens to the host, in the background.

        Args:
            last_host_node: of the request's match; new_input_tokens: those after it.
            last_hash: not needed: hashes are always those of the path from the root.
            kwargs: extra_key and cache_salt of the request.
        Returns: None if it was refused: too few tokens, no storage, too much in flight, storage is failing.
        """
        begun = self._core.prefetch(
            req_id, tokens_of(new_input_tokens), last_host_node.id, kwargs.get("extra_key"), kwargs.get("cache_salt")
        )
        shown = self._core.prefetch_in_flight(req_id) if begun else None
        return None if shown is None else PrefetchOperation(self._core, req_id, shown, self.host_indices)

    def can_terminate_prefetch(self, operation: PrefetchOperation) -> bool:
        """Whether the policy would let check_prefetch_progress end it now, as far as this rank sees."""
        return self._core.can_terminate(operation.request_id)

    def check_prefetch_progress(self, req_id: str) -> bool:
        """End a prefetch if its policy allows: what has arrived on all ranks can be matched from now on.

        Returns: False: let the request wait. True: there is nothing (more) to wait for. Raises: GroupError.
        """
        self._children = None
        return self._core.finish_prefetch(req_id)

    def cancel_prefetch(self, req_id: str) -> None:
        """Give a prefetch up, as its request was aborted. There may be none."""
        self._core.cancel_prefetch(req_id)

    def attach_storage_backend(self, backend: Any) -> None:
        """Use a storage backend from now on; see the constructor. Raises: StateError if there is one."""
        self.cache_controller.attach_storage(backend)

    def detach_storage_backend(self) -> None:
        """Cancel what uses storage and go on without."""
        self.cache_controller.detach_storage()

    # ---- the end -----------------------------------------------------------------------------------------------------
    def reset(self) -> None:
        """Cancel everything and forget everything; all host slots are free afterwards, but those that a storage call
        still reads or writes.

        As there, the device slots are the engine's business: it clears its allocator next to this call. So this waits
        for every copy that writes to the device. Raises: StateError if one does not end within control.copy_timeout_s:
            everything is forgotten, but the allocator must not be cleared before this has been called again and
            returned.
        """
        assert self._pages is not None
        self._children = None
        with self._pages.forgetting(self.total_size() // self.page_size + self._core.draining_device_pages) as left:
            self._core.reset()
            self._attributions.reset()
            self._wait(left, "device pages are being written")

    def close(self) -> bool:
        """End all threads and give the host memory back; nothing else may be called afterwards, but close.

        Returns: whether the memory is back. It is kept while a copy or a call to storage hangs (after
        control.close_timeout_s); then this may be called again.
        """
        if not self.cache_controller.close():
            _log.warning("host_memory=kept reason=%r", "a copy or a call to storage has not ended: close again then")
            return False
        self.token_to_kv_pool_host.clear()  # pages of copies that were cancelled
        self.token_to_kv_pool_host.close()
        return True

    def __enter__(self) -> HiRadixCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- looking -----------------------------------------------------------------------------------------------------
    def attribute(self, req_id: str, num_tokens: int, match: MatchResult, loaded_tokens: int = 0) -> Attribution:
        """Account for a request's prompt: how many of its tokens were on the device, came from the host or from
        storage, and are computed.

        For who never calls cache_unfinished_req and cache_finished_req with the request, or does after this: these
        account for what has a rid by themselves, and only once.
        Args: match: made before init_load_back; loaded_tokens: how many slots that returned.
        """
        return self._attributions.explicit(req_id, num_tokens, len(match.device_indices), loaded_tokens)

    def attribution(self, req_id: str) -> Attribution | None:
        """Where a request's prompt came from; the four add up to its length.

        From the cache_unfinished_req or cache_finished_req on that ended its prefill; of the last 4,096 that have
        finished, too. None: not known (yet).
        """
        return self._attributions.of(req_id)

    def _attribute(self, req: Request, finished: bool) -> None:
        self._attributions.cached(req, finished)

    def check_integrity(self) -> None:
        """Verify from scratch that tree, pools, states, locks and operations agree. Raises: IntegrityError."""
        self._core.check_integrity()

    def is_stored(self, handle: int) -> bool:
        """See TreeNode.backuped_storage."""
        return handle != ROOT and bool(self.tree.node_info(handle).marks & STORED)

    def stored_hashes(self, handle: int) -> list[str] | None:
        """See TreeNode.hash_value."""
        return node_hashes(self.tree, handle) if self.is_stored(handle) else None

    def last_hash(self, handle: int) -> str | None:
        """See TreeNode.get_last_hash_value."""
        return last_hash(self.tree, handle) if self.enable_storage else None
