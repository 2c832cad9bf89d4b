"""L3: the controller, which moves KV between the device, the host and storage, and keeps the tree true to it.

    owner thread:  Controller -> tree, pools        workers:  Mover (copies), StorageEdge (storage calls)
                        |  starts an operation  ------------>  moves bytes, nothing else
                        |  poll()  <------------------------   done, failed, how far

An operation owns its pages from its start until it is settled, and is settled by the owner thread only: in ``poll``
(or ``finish_prefetch``, or an eviction under write_back), after all ranks of the group agree that it has ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ..key import NamespacePart
from ..tree.base import BaseRadixTree, InsertResult, MatchResult, Tokens
from ..types import PageIds
from .base import Attribution, ControllerStats, DevicePages, Group, Listener, Load, Mover, Polled, PrefetchStatus
from .config import ControllerConfig
from .layers import LayerCounter

__all__ = ["Controller"]


class Controller:
    """Moves KV between tiers. Not thread-safe: one thread, the owner, calls every method.

    In a group every rank makes the same calls in the same order with the same arguments; then every rank has the same
    tree. Which collectives run follows from what has been agreed before, never from a rank's own state: one in each
    poll, one in finish_prefetch while the prefetch is in flight, one a round of an eviction that writes back, one in
    reset, attach_storage and the constructor.

    Args:
        tree: empty; nobody else changes it from now on.
        device: hands out device pages.
        host: the host tier (a HostKVCache), empty; None: there is none, and so no storage.
        mover: copies between them; may be None without a host.
        storage: a PageStore; see attach_storage.
        group: None for one rank.
        listener: is told what happened.
        clock: seconds; only differences count.
    Raises: InvalidArgumentError if things do not fit together, or ranks differ in page size, capacities or settings.
    """

    layer_counter: LayerCounter
    """How far the loads are, layer by layer; see start_loads."""
    config: ControllerConfig

    def __init__(
        self,
        tree: BaseRadixTree,
        device: DevicePages,
        host: Any | None = None,
        mover: Mover | None = None,
        *,
        storage: Any | None = None,
        group: Group | None = None,
        config: ControllerConfig | None = None,
        listener: Listener | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        raise NotImplementedError

    # ---- a request, step by step -------------------------------------------------------------------------------------
    def match(self, tokens: Tokens, extra_key: NamespacePart = None, cache_salt: NamespacePart = None) -> MatchResult:
        """Find the longest cached prefix, as tree.match; a hit ends before pages whose load has failed.

        If the result has loading_tokens, wait for ``layer_counter.latest`` before reading.
        """
        raise NotImplementedError

    def insert(
        self,
        tokens: Tokens,
        page_ids: Tokens,
        match: MatchResult | None = None,
        extra_key: NamespacePart = None,
        cache_salt: NamespacePart = None,
        priority: int = 0,
        backup: bool = True,
    ) -> InsertResult:
        """Insert computed pages, as tree.insert, then start what the write policy asks for along the path.

        The caller frees the duplicates. Args: backup: False: start nothing. Raises: as tree.insert; nothing has
        changed then.
        """
        raise NotImplementedError

    def hit(self, node: int) -> None:
        """Start what the write policy asks for this node, as if it were hit once more (the tree counts hits in insert
        only)."""
        raise NotImplementedError

    def lock(self, node: int) -> int:
        """Lock the path of a node, as tree.lock. Returns the change of evictable tokens (<= 0)."""
        raise NotImplementedError

    def unlock(self, node: int) -> int:
        """Undo one lock, as tree.unlock. Returns the change of evictable tokens (>= 0)."""
        raise NotImplementedError

    # ---- room --------------------------------------------------------------------------------------------------------
    def evict(self, num_tokens: int) -> int:
        """Free device pages to the DevicePages, leaf first in policy order.

        write_back: nodes without a host copy are copied first, which waits for the copies (copy_timeout_s at most);
        those that find no room on the host or whose copy fails are dropped and counted.
        Returns: tokens freed. Fewer than asked for is an answer. Raises: GroupError.
        """
        raise NotImplementedError

    def evict_host(self, num_tokens: int) -> int:
        """Free host pages of host-only leaves that nobody reads. Returns: tokens freed."""
        raise NotImplementedError

    def alloc_pages(self, num_pages: int) -> PageIds | None:
        """Take device pages, after one eviction of what is missing. None: there are too few."""
        raise NotImplementedError

    # ---- copies between device and host ------------------------------------------------------------------------------
    def backup(self, node: int) -> int:
        """Start to copy a node to the host; it is locked until that is settled.

        Returns: tokens; 0 if there is nothing to do (host-only, on the host, in flight, loading or pending), no room
        on the host after one evict_host, or too many writes in flight.
        """
        raise NotImplementedError

    def load(self, node: int, quota_tokens: int | None = None) -> Load | None:
        """Give the host-only tail of a node's path device pages, and queue its copy; start_loads starts it.

        From now on it matches as on the device (loading). Evicts once if there are too few pages.
        Args: quota_tokens: at most this many, less what protecting the path makes unevictable; see load_policy.
        Returns: None if nothing is host-only, the tail is shorter than load_back_threshold, exceeds the quota, costs
        more than computing it, or finds no room.
        """
        raise NotImplementedError

    def cancel_load(self, load: Load) -> bool:
        """Take back a load that has not been started. Returns: False if it has been (it will end by itself).

        Raises: LockError if somebody has locked its nodes, or loaded below them.
        """
        raise NotImplementedError

    def start_loads(self) -> int:
        """Start all queued loads as one copy. Returns: its index for ``layer_counter.set_consumer``; -1 if none was
        queued."""
        raise NotImplementedError

    # ---- storage -----------------------------------------------------------------------------------------------------
    def store(self, node: int) -> int | None:
        """Start to write a node's host pages to storage.

        Returns: an operation id; None if there is nothing to do (no storage, no host copy, stored, in flight), too many
        are in flight, or storage is left alone after failures.
        """
        raise NotImplementedError

    def prefetch(
        self,
        req_id: str,
        tokens: Tokens,
        last_host_node: int,
        extra_key: NamespacePart = None,
        cache_salt: NamespacePart = None,
    ) -> bool:
        """Look for the pages that follow a node's path in storage, and bring them to the host.

        Host pages are taken only once storage has said how many it has; device pages never.
        Args:
            req_id: names it; one prefetch at a time for each.
            tokens: those *after* the path of last_host_node; a tail shorter than a page is ignored.
            last_host_node: of the request's match; its host copy is kept meanwhile. ROOT: from the beginning.
            extra_key, cache_salt: the namespace, read for ROOT only (a node knows its own).
        Returns: False if it was refused: no storage, fewer tokens than the threshold, capacity, too many in flight, a
        prefetch of this req_id in flight, or storage is left alone after failures.
        """
        raise NotImplementedError

    def prefetch_progress(self, req_id: str) -> PrefetchStatus:
        """How far a prefetch is, on this rank. No collective."""
        raise NotImplementedError

    def can_terminate(self, req_id: str) -> bool:
        """Whether the policy would let finish_prefetch settle it now, as far as this rank sees. No collective."""
        raise NotImplementedError

    def finish_prefetch(self, req_id: str) -> bool:
        """Settle a prefetch if the policy allows and all ranks agree: what has arrived everywhere enters the tree.

        Returns: False: keep waiting (by policy). True: settled, revoked, or never begun. Raises: GroupError.
        """
        raise NotImplementedError

    def cancel_prefetch(self, req_id: str) -> None:
        """Give a prefetch up; nothing of it enters the tree. Its pages return once no worker writes them."""
        raise NotImplementedError

    def attribute(self, req_id: str, num_tokens: int, match: MatchResult, loaded_tokens: int = 0) -> Attribution:
        """Account for a request's prompt, once: what was on the device, came from the host, from storage by a prefetch
        of this req_id, and is computed.

        Args: match: made before load; loaded_tokens: of the Load, 0 without one.
        """
        raise NotImplementedError

    # ---- settling ----------------------------------------------------------------------------------------------------
    def poll(self) -> Polled:
        """Settle what has ended on all ranks, in the order in which it began. Call it once a scheduler step.

        Raises: GroupError if a rank is gone or ranks have diverged; nothing has been settled then.
        """
        raise NotImplementedError

    def attach_storage(self, storage: Any) -> None:
        """Use a PageStore from now on. Raises: StateError if there is one, InvalidArgumentError without a host."""
        raise NotImplementedError

    def detach_storage(self) -> Any | None:
        """Cancel what uses storage, end its workers, and forget what was stored. Returns: the PageStore, or None."""
        raise NotImplementedError

    def reset(self) -> None:
        """Cancel everything and drop the tree: all its pages of both tiers are free afterwards, but those that
        something still in flight after settle_timeout_s reads or writes; these are freed by the poll that sees it end.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Cancel everything and end all threads. The tree stays as it is; nothing else may be called afterwards. A
        second call does nothing. No collective."""
        raise NotImplementedError

    # ---- inspection --------------------------------------------------------------------------------------------------
    def stats(self) -> ControllerStats:
        """Counters, and what is in flight."""
        raise NotImplementedError

    def check_integrity(self, held_page_ids: PageIds | None = None) -> None:
        """Verify from scratch that tree, pools, states, locks and operations agree. O(tree + pools).

        Args: held_page_ids: device pages that the caller holds; None: device pages are not added up.
        Raises: IntegrityError that names what is wrong.
        """
        raise NotImplementedError
