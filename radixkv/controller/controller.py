"""L3: the controller, which moves KV between the device, the host and storage, and keeps the tree true to it.

    owner thread:  Controller -> tree, pools        workers:  Mover (copies), StorageEdge (storage calls)
                        |  starts an operation  ------------>  moves bytes, nothing else
                        |  poll()  <------------------------   done, failed, how far

An operation owns its pages from its start until it is settled, and is settled by the owner thread only: in ``poll``
(or ``finish_prefetch``, or an eviction under write_back), after all ranks of the group agree that it has ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import InvalidArgumentError, StateError, StorageError
from ..key import NamespacePart
from ..tree.base import BaseRadixTree, InsertResult, MatchResult, Tokens
from ..tree.tokens import read_tokens
from ..types import PageIds
from .agree import LocalGroup, compare_ranks
from .base import (
    Attribution,
    ControllerStats,
    DevicePages,
    Group,
    Listener,
    Load,
    Mover,
    Polled,
    PrefetchStatus,
    StorageEdge,
)
from .check import check_integrity
from .config import ControllerConfig
from .context import Context, Where
from .drains import Drains
from .giveway import GiveWay
from .hashes import PathHashes
from .in_flight import InFlight, PrefetchInFlight, collect, look_at
from .layers import LayerCounter
from .ledger import Ledger
from .loads import Loads
from .policy import WritePolicies
from .prefetches import Prefetches
from .room import Room
from .settle import Settler
from .stores import Stores
from .workers import StorageWorkers
from .writes import Writes

__all__ = ["Controller"]


class Controller:
    """Moves KV between tiers. Not thread-safe: one thread, the owner, calls every method.

    In a group every rank makes the same calls in the same order with the same arguments; then every rank has the same
    tree. Which collectives run follows from what has been agreed before, never from a rank's own state: one in each
    poll, one in finish_prefetch while the prefetch is in flight, one a round of an eviction that writes back, one in
    reset, attach_storage, all_can and the constructor (two if ranks differ; one more with a storage), and one in an
    eviction that falls short while backups are in flight.

    Args:
        tree: empty; nobody else changes it from now on.
        device: hands out device pages.
        host: the host tier (a HostKVCache), empty; None: there is none, and so no storage.
        mover: copies between them; may be None without a host.
        storage: a PageStore; see attach_storage.
        group: None for one rank.
        listener: is told what happened.
        alike: what else all ranks must have the same, by name; compared by its repr.
        clock: seconds; only differences count.
    Raises: InvalidArgumentError if things do not fit together, or ranks differ in what all must have the same (page
        size, capacities, kind of KV, layers, settings, ``alike``): it names what, and who has what. GroupError.
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
        alike: Mapping[str, object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        config = config or ControllerConfig()
        if host is not None and mover is None:
            raise InvalidArgumentError("a host tier without a mover")
        if host is not None and host.page_size != tree.page_size:
            raise InvalidArgumentError(f"pages of {tree.page_size} tokens in the tree, of {host.page_size} on the host")
        if len(tree):
            raise InvalidArgumentError(f"the tree has {len(tree)} nodes already")
        self.config, self._closed, self._storage = config, False, None
        self._hanging: list[tuple[StorageEdge, Any]] = []  # closed, and not ended in time; and its storage
        geometry = getattr(host, "geometry", None)
        page_bytes = geometry.page_bytes if geometry is not None else 0
        shared = config.share_storage
        if shared is None:
            shared = geometry is not None and geometry.kind == "mla"
        self._context = context = Context(
            tree, Ledger(device, host), mover, group or LocalGroup(), config, listener, clock, page_bytes
        )
        self.layer_counter = LayerCounter(geometry.num_layers if geometry is not None else 1, config.copy_timeout_s)
        hashes = PathHashes(tree)
        self._drains = Drains(context)
        self._writes = Writes(context, self._drains)
        self._room = Room(context, self._writes)
        self._loads = Loads(context, self._room, self.layer_counter)
        self._stores = Stores(context, self._drains, hashes, shared)
        self._prefetches = Prefetches(context, self._drains, hashes)
        context.give_back = self._prefetches.give_back
        self._room.give_way = GiveWay(context, self._stores, self._prefetches, self._drains).evict
        self._policy = WritePolicies(context, self._writes, self._stores)
        self._writes.backed_up = self._policy.backed_up
        self._stores.back_up = self._writes.begin
        self._settler = Settler(context, self._writes, self._loads, self._stores, self._prefetches, self._drains)
        self._compare_ranks(geometry, alike or {})
        if storage is not None:
            self.attach_storage(storage)

    def _compare_ranks(self, geometry: Any, alike: Mapping[str, object]) -> None:
        """Raise InvalidArgumentError unless all ranks are alike."""
        context = self._context
        ledger = context.ledger
        mine: dict[str, object] = {
            "page size": context.page_size, "device pages": ledger.device.capacity,
            "host pages": ledger.host.num_pages if ledger.has_host else 0, "eviction policy": context.tree.policy,
        }  # fmt: skip
        if geometry is not None:
            mine |= {"kind of KV": geometry.kind, "layers": geometry.num_layers}
        mine |= {**context.config.settings(), **alike}
        compare_ranks(lambda values: context.agree(Where.MAKE, values), context.group.rank, context.group.size, mine)

    @property
    def tree(self) -> BaseRadixTree:
        """The tree; read it as you like, change it through the controller."""
        return self._context.tree

    @property
    def threads_ended(self) -> bool:
        """Whether all threads ended in time of every storage that was detached, or was there at ``close``."""
        return not self._hanging

    def hangs(self, storage: Any) -> bool:
        """Whether a thread of this Storage, which was detached or is being closed, had not ended in time."""
        return any(getattr(held, "storage", held) is storage for _, held in self._hanging)

    @property
    def storage(self) -> Any | None:
        """What attach_storage was given."""
        return self._storage

    @property
    def draining_device_pages(self) -> int:
        """Device pages of before a reset that a copy may still write; poll frees them when it has ended."""
        return self._drains.num_device_pages

    # ---- a request, step by step -------------------------------------------------------------------------------------
    def match(self, tokens: Tokens, extra_key: NamespacePart = None, cache_salt: NamespacePart = None) -> MatchResult:
        """Find the longest cached prefix, as tree.match.

        If the result has loading_tokens, start_loads, and wait for ``layer_counter.latest`` before reading: it raises
        if these pages did not arrive.
        """
        return self.tree.match(tokens, extra_key, cache_salt)

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
        result = self._context.tree.insert(tokens, page_ids, match, extra_key, cache_salt, priority)
        host_pages = result.adopted_host_page_ids
        if len(host_pages):
            first = result.prefix_tokens // self._context.page_size
            device_pages = read_tokens(page_ids, "page_ids")[first : first + len(host_pages)]
            self._context.ledger.adopted(device_pages, host_pages)
        if backup:
            self._policy.start_due(result.node)
        return result

    def hit(self, node: int) -> None:
        """Start what the write policy asks for this node, as if it were hit once more (the tree counts hits in insert
        only)."""
        self._policy.hit(node)

    def lock(self, node: int) -> int:
        """Lock the path of a node, as tree.lock. Returns the change of evictable tokens (<= 0)."""
        return self.tree.lock(node)

    def unlock(self, node: int) -> int:
        """Undo one lock, as tree.unlock. Returns the change of evictable tokens (>= 0)."""
        return self.tree.unlock(node)

    # ---- room --------------------------------------------------------------------------------------------------------
    def evict(self, num_tokens: int) -> int:
        """Free device pages to the DevicePages, leaf first in policy order.

        write_back: nodes without a host copy are copied first, which waits for the copies (copy_timeout_s at most);
        those that find no room on the host or whose copy fails are dropped and counted.
        Returns: tokens freed. Fewer than asked for is an answer. Raises: GroupError.
        """
        return self._room.evict(num_tokens)

    def evict_host(self, num_tokens: int) -> int:
        """Free host pages of host-only leaves that nobody reads. Returns: tokens freed."""
        return self._context.evict_host(num_tokens)

    def alloc_pages(self, num_pages: int) -> PageIds | None:
        """Take device pages, after one eviction of what is missing. None: there are too few."""
        return self._room.alloc(num_pages)

    # ---- copies between device and host ------------------------------------------------------------------------------
    def backup(self, node: int) -> int:
        """Start to copy a node to the host; it is locked until that is settled.

        Returns: tokens; 0 if there is nothing to do (host-only, on the host, in flight, loading or pending), no room
        on the host after one evict_host, or too many writes in flight.
        """
        return self._writes.begin(node)

    def load(self, node: int, quota_tokens: int | None = None) -> Load | None:
        """Give the host-only tail of a node's path device pages, and queue its copy; start_loads starts it.

        From now on it matches as on the device (loading). Evicts once if there are too few pages.
        Args: quota_tokens: at most this many, less what protecting the path makes unevictable; see load_policy.
        Returns: None if nothing is host-only, the tail is shorter than load_back_threshold, exceeds the quota, costs
        more than computing it, or finds no room.
        """
        return self._loads.begin(node, quota_tokens)

    def cancel_load(self, load: Load) -> bool:
        """Take back a load that has not been started. Returns: False if it has been (it will end by itself).

        Raises: LockError if somebody has locked one of its nodes, or loaded below it; what is below that has been taken
            back, the rest stays queued.
        """
        return self._loads.cancel(load)

    def start_loads(self) -> int:
        """Start all queued loads as one copy. Returns: its index for ``layer_counter.set_consumer``; -1 if none was
        queued."""
        return self._loads.start()

    # ---- storage -----------------------------------------------------------------------------------------------------
    def store(self, node: int) -> int | None:
        """Start to write a node's host pages to storage.

        Returns: an operation id; None if there is nothing to do (no storage, no host copy, stored, in flight), too many
        are in flight, storage is left alone after failures, or the node above is not stored: it follows that then.
        """
        return self._stores.begin(node)

    def prefetch(
        self,
        req_id: str,
        tokens: Tokens,
        last_host_node: int,
        extra_key: NamespacePart = None,
        cache_salt: NamespacePart = None,
    ) -> bool:
        """Look for the pages that follow a node's path in storage, and bring them to the host.

        Host pages that are free are taken at once, and given back once storage has said that it has fewer (by the next
        poll, or an eviction of one rank): until then other copies to the host may have to evict in their place. Else
        pages are evicted only for what storage has. Device pages are never taken.
        Args:
            req_id: names it; one prefetch at a time for each.
            tokens: those *after* the path of last_host_node; a tail shorter than a page is ignored.
            last_host_node: of the request's match; its host copy is kept meanwhile. ROOT: from the beginning.
            extra_key, cache_salt: the namespace, read for ROOT only (a node knows its own).
        Returns: False if it was refused: no storage, fewer tokens than the threshold, capacity, too many in flight, a
        prefetch of this req_id in flight, or storage is left alone after failures.
        """
        return self._prefetches.begin(req_id, tokens, last_host_node, extra_key, cache_salt)

    def prefetch_progress(self, req_id: str) -> PrefetchStatus:
        """How far a prefetch is, on this rank. No collective."""
        return self._prefetches.progress(req_id)

    def can_terminate(self, req_id: str) -> bool:
        """Whether the policy would let finish_prefetch settle it now, as far as this rank sees. No collective."""
        op = self._prefetches.operations.get(req_id)
        return op is None or self._prefetches.may_end(op)

    def finish_prefetch(self, req_id: str) -> bool:
        """Settle a prefetch if the policy allows and all ranks agree: what has arrived everywhere enters the tree.

        Returns: False: keep waiting (by policy). True: settled, revoked, or never begun. Raises: GroupError.
        """
        return self._prefetches.finish(req_id)

    def stop_prefetch(self, req_id: str) -> None:
        """Read no further; what has arrived stays, and the next finish_prefetch settles it, whatever the policy."""
        self._prefetches.stop(req_id)

    def cancel_prefetch(self, req_id: str) -> None:
        """Give a prefetch up; nothing of it enters the tree. Its pages return once no worker writes them."""
        self._prefetches.cancel(req_id)

    def attribute(self, req_id: str, num_tokens: int, match: MatchResult, loaded_tokens: int = 0) -> Attribution:
        """Account for a request's prompt, once: what was on the device, came from the host, from storage by a prefetch
        of this req_id, and is computed.

        Args: match: made before load; loaded_tokens: of the Load, 0 without one.
        """
        return self.account(req_id, num_tokens, match.num_tokens, loaded_tokens)

    def account(self, req_id: str, num_tokens: int, device_tokens: int, loaded_tokens: int) -> Attribution:
        """attribute, for who has no match at hand: so many tokens were on the device, so many were loaded."""
        from_storage = min(self._prefetches.brought.pop(req_id, 0), loaded_tokens)
        from_host, computed = loaded_tokens - from_storage, num_tokens - device_tokens - loaded_tokens
        split = Attribution(device_tokens, from_host, from_storage, computed)
        counts = self._context.counts
        counts["device_tokens"] += device_tokens
        counts["host_tokens"] += from_host
        counts["storage_tokens"] += from_storage
        counts["computed_tokens"] += computed
        counts["requests"] += 1
        if self._context.listener is not None:
            self._context.listener.attributed(split)
        return split

    def forget_request(self, req_id: str) -> None:
        """A request has ended: what a prefetch brought for it is nobody's any more."""
        self._prefetches.brought.pop(req_id, None)

    # ---- settling ----------------------------------------------------------------------------------------------------
    def poll(self) -> Polled:
        """Settle what has ended on all ranks, in the order in which it began. Call it once a scheduler step.

        Raises: GroupError if a rank is gone or ranks have diverged; nothing has been settled then.
        """
        return self._settler.poll()

    def attach_storage(self, storage: Any) -> None:
        """Use a PageStore from now on, on all ranks or none. Collective, within the group's deadline.

        Args: storage: a PageStore; or a function that makes one, which is called here: where it raises, the other ranks
            hear of it. (A rank that makes it before this call, and fails, must not leave the others waiting.)
        Raises: StateError if there is one, InvalidArgumentError without a host; what making it raises; StorageError if
            another rank cannot; GroupError. Nothing is attached then, and what was made is the caller's to close.
        """
        if self._storage is not None:
            raise StateError("there is a storage already: detach it first")
        if not self._context.ledger.has_host:
            raise InvalidArgumentError("storage is behind the host tier, and there is none")
        try:
            if callable(storage):
                storage = storage()
            edge = storage if hasattr(storage, "look_up") else StorageWorkers(storage, self.config)
            self._stores.use(edge)  # asks it what it has lost
        except Exception:
            self._stores.use(None)
            self._context.agree(Where.ATTACH, [0])
            raise
        try:
            together = self._context.agree(Where.ATTACH, [1])[0]
        except BaseException:
            self._stores.use(None)
            raise
        if not together:
            self._stores.use(None)
            raise StorageError("another rank cannot use its storage, so none does")
        self._storage, self._prefetches.edge = storage, edge
        self._prefetches.backoff.reset()

    def all_can(self, can: bool) -> bool:
        """Whether all ranks can do what is about to be done alike. Collective. Raises: GroupError."""
        return bool(self._context.agree(Where.ATTACH, [int(can)])[0])

    def detach_storage(self) -> Any | None:
        """Cancel what uses storage, end its workers, and forget what was stored. Returns: the PageStore, or None."""
        storage, edge = self._storage, self._stores.edge
        if edge is None:
            return None
        self._prefetches.give_up()
        self._stores.give_up()
        self._storage = self._prefetches.edge = None
        self._stores.use(None)
        if not edge.close(self.config.close_timeout_s):
            self._hanging.append((edge, storage))
        self._stores.forget_stored()
        self._settler.settle_drains()
        return storage

    def reset(self) -> None:
        """Cancel everything and drop the tree: all its pages of both tiers are free afterwards, but those that
        something still in flight after settle_timeout_s reads or writes; these are freed by the poll that sees it end.

        Raises: GroupError if a rank is gone; this rank's tree is dropped all the same.
        """
        self._settler.reset()

    def close(self) -> bool:
        """Cancel everything and end all threads. The tree stays as it is; nothing else may be called afterwards. A
        second call only waits for what had not ended. No collective.

        Returns: whether all threads have ended, those of a storage that was detached too. If not, a call to storage or
            a copy hangs after close_timeout_s, and may still read or write pages: the memory of the pools must not be
            released, nor the storage closed.
        """
        first, self._closed = not self._closed, True
        if first and self._stores.edge is not None:
            self._hanging.append((self._stores.edge, self._storage))
        self._hanging = [hanging for hanging in self._hanging if not hanging[0].close(self.config.close_timeout_s)]
        copies_ended = not self._context.ledger.has_host or self._context.mover.close(self.config.close_timeout_s)
        return copies_ended and not self._hanging

    # ---- inspection --------------------------------------------------------------------------------------------------
    def in_flight(self) -> InFlight:
        """The operations that have begun and are not settled, one by one. ``stats`` has how many, and is cheaper."""
        return collect(self._writes, self._loads, self._stores, self._prefetches)

    def prefetch_in_flight(self, req_id: str) -> PrefetchInFlight | None:
        """One of them; None if there is none. O(1)."""
        op = self._prefetches.operations.get(req_id)
        return None if op is None else look_at(op)

    @property
    def prefetch_capacity_tokens(self) -> int:
        """How much prefetches in flight may have asked for together before another one is refused."""
        return self._prefetches.capacity_tokens

    def stats(self) -> ControllerStats:
        """Counters, and what is in flight."""
        counts = {name: value for name, value in self._context.counts.items() if name in ControllerStats._fields}
        return ControllerStats(
            **counts,
            writes_in_flight=len(self._writes.operations),
            queued_loads=len(self._loads.queued),
            loads_in_flight=self._loads.num_in_flight,
            stores_in_flight=len(self._stores.operations),
            prefetches_in_flight=len(self._prefetches.operations),
            prefetch_tokens_in_flight=self._prefetches.tokens_in_flight,
            prefetch_capacity_tokens=self._prefetches.capacity_tokens if self._stores.edge is not None else 0,
            stuck_pages=self._drains.num_pages,
            backing_off=self._stores.backoff.active or self._prefetches.backoff.active,
        )

    def check_integrity(self, held_page_ids: PageIds | None = None) -> None:
        """Verify from scratch that tree, pools, states, locks and operations agree. O(tree + pools).

        Args: held_page_ids: device pages that the caller holds; None: device pages are not added up.
        Raises: IntegrityError that names what is wrong.
        """
        check_integrity(self._context, self._writes, self._loads, self._stores, self._prefetches, self._drains,
                        held_page_ids)
