"""L5: RadixCache, the prefix cache of one tier, as SGLang's schedulers call it.

A request's life here: match_prefix, inc_lock_ref, (the engine computes), cache_unfinished_req after each chunk, and
cache_finished_req at the end, which gives back its row, its duplicates and its lock.

Pages are page ids in the tree and slots outside of it: ``indices.py`` is the border.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import InvalidArgumentError
from ..pool.arrays import Array, Library
from ..tree.base import BaseRadixTree, InsertResult
from ..tree.base import MatchResult as TreeMatch
from ..tree.core import RadixTree
from ..types import ROOT, NodeInfo, PageIds, Policy
from .base import BasePrefixCache, MatchResult, Request
from .events import to_engine_event
from .indices import AllocatorPages, Indices, NumberedPages
from .node import TreeNode

__all__ = ["RadixCache"]


class RadixCache(BasePrefixCache):
    """A prefix cache over an engine's device pool. Not thread-safe: one scheduler thread calls it.

    Args:
        req_to_token_pool: the engine's, or ours; None where no requests are cached.
        token_to_kv_pool_allocator: the engine's, or ours: alloc(n), free(slots), available_size(), device. None: a tree
            that only remembers keys; values are not looked at then, and slots mean nothing.
        page_size: P, tokens a page; the allocator's.
        disable: find nothing, keep nothing, and free what a finished request held.
        enable_kv_cache_events: record events for ``take_events``.
        eviction_policy: one of radixkv.POLICIES.
        max_kv_cache_events: bound of the event queue; beyond it events are dropped and counted.
    """

    def __init__(
        self,
        req_to_token_pool: Any,
        token_to_kv_pool_allocator: Any,
        page_size: int,
        disable: bool = False,
        enable_kv_cache_events: bool = False,
        *,
        eviction_policy: Policy = "lru",
        max_kv_cache_events: int = 1 << 20,
    ) -> None:
        tree = RadixTree(page_size, eviction_policy, events=enable_kv_cache_events, max_events=max_kv_cache_events)
        self._set_up(req_to_token_pool, token_to_kv_pool_allocator, tree, disable, enable_kv_cache_events)
        self.reset()

    def _set_up(self, req_to_token_pool: Any, allocator: Any, tree: BaseRadixTree, disable: bool, events: bool) -> None:
        theirs = getattr(allocator, "page_size", tree.page_size)
        if theirs != tree.page_size:  # it frees whole pages of its own: also the part that the cache keeps
            raise InvalidArgumentError(f"pages of {tree.page_size} tokens in the cache, of {theirs} in the allocator")
        self.req_to_token_pool, self.token_to_kv_pool_allocator = req_to_token_pool, allocator
        self.page_size, self.disable, self.enable_kv_cache_events = tree.page_size, disable, events
        self.device = "cpu" if allocator is None else allocator.device
        self.tree = tree
        self._ops: Any = tree  # what matches, inserts and locks: the tree, or a controller
        self.indices = Indices(tree.page_size, self.device, _library_of(allocator))
        self.host_indices = Indices(tree.page_size, "cpu", self.indices.library)
        self._numbered = NumberedPages() if allocator is None else None
        self._pages = None if allocator is None else AllocatorPages(allocator, self.indices, _capacity(allocator, tree))
        self._children: dict[int, dict[Any, TreeNode]] | None = None
        self.root_node = TreeNode(self, ROOT)
        self._nothing = MatchResult(self.indices.none, self.root_node, self.root_node, 0)

    # ---- a request ---------------------------------------------------------------------------------------------------
    def match_prefix(self, key: Any, **kwargs: Any) -> MatchResult:
        """Find the longest cached prefix, in whole pages; see MatchResult.

        Args:
            key: tokens: a list of ints, or anything that ``tree.base.Tokens`` names.
            kwargs: extra_key and cache_salt, the namespace; others (``rid``) are of no interest here.
        Modifies: access times; may split the node that the hit ends in.
        """
        if self.disable or len(key) == 0:
            return self._nothing
        self._children = None
        return self._result(self._ops.match(key, kwargs.get("extra_key"), kwargs.get("cache_salt")))

    def _result(self, found: TreeMatch) -> MatchResult:
        node, beyond = found.device_node, found.host_num_tokens
        if node == ROOT:
            at, indices = self.root_node, self.indices.none
        else:
            at, indices = TreeNode(self, node), self.indices.of_pages(found.page_ids())
        return MatchResult(indices, at, TreeNode(self, found.host_node) if beyond else at, beyond)

    def insert(self, key: Any, value: Any = None, **kwargs: Any) -> int:
        """Insert tokens with their slots, in whole pages (what is beyond is ignored).

        Returns: how many leading tokens were on the device already. Their slots of ``value`` stay the caller's, who
        frees them; the others belong to the cache now, also those that an evicted node has taken up again.
        Args: value: slots, one a token; must be None only for a cache without an allocator. kwargs: as match_prefix.
        Raises (nothing has changed then): InvalidArgumentError; PageOwnershipError for a slot that the cache has
            elsewhere.
        """
        if self.disable:
            return 0
        num_pages = len(key) // self.page_size
        if self._numbered is not None:
            pages = self._numbered.alloc(num_pages)
        elif value is None:
            raise InvalidArgumentError(f"no slots for {len(key)} tokens: only a cache without an allocator needs none")
        else:
            pages = self.indices.pages(value, num_pages)
        inserted = self._insert(key, pages, kwargs.get("extra_key"), kwargs.get("cache_salt"))
        if self._numbered is not None:
            self._numbered.free(inserted.duplicate_page_ids)
        return inserted.prefix_tokens

    def _insert(self, key: Any, pages: PageIds, extra_key: Any, cache_salt: Any) -> InsertResult:
        self._children = None
        result: InsertResult = self._ops.insert(key, pages, None, extra_key, cache_salt)
        return result

    def cache_finished_req(self, req: Request, **_: Any) -> None:
        """Cache what a finished request has computed, and take back its row, its lock, and slots that nobody needs:
        those of a last page that is not full, and those of pages that the cache had already."""
        token_ids = req.origin_input_ids + req.output_ids
        del token_ids[-1:]  # of the last token no KV was computed
        row = self.req_to_token_pool.req_to_token[req.req_pool_idx, : len(token_ids)]
        if self.disable:
            self.token_to_kv_pool_allocator.free(row)
            self.req_to_token_pool.free(req.req_pool_idx)
            return
        aligned = len(token_ids) // self.page_size * self.page_size
        pages = self.indices.pages(row[:aligned])
        self._attribute(req, True)  # first: it may raise for a request that is none, and nothing has changed then
        inserted = self._insert(token_ids, pages, *_namespace(req))
        self._free_pages(inserted.duplicate_page_ids)
        if aligned < len(token_ids):
            self.token_to_kv_pool_allocator.free(row[aligned:])
        self.req_to_token_pool.free(req.req_pool_idx)
        self.dec_lock_ref(req.last_node)

    def cache_unfinished_req(self, req: Request, **_: Any) -> None:
        """Cache what a request has computed so far, and let it go on from there.

        Its lock moves to the node that its whole pages end at. Where the cache had a page already, the request's row
        gets the cache's slots and its own are freed; prefix_indices becomes the row.
        """
        if self.disable:
            return
        token_ids = req.fill_ids
        row = self.req_to_token_pool.req_to_token[req.req_pool_idx, : len(token_ids)]
        pages = self.indices.pages(row, len(token_ids) // self.page_size)
        namespace = _namespace(req)
        self._attribute(req, False)
        inserted = self._insert(token_ids, pages, *namespace)
        node = inserted.node
        prefix = self.indices.copy(row)
        if len(inserted.duplicate_page_ids):
            node = self._adopt(req, prefix, pages, self._ops.match(token_ids, *namespace))
        # the new lock first: in between nothing may become evictable
        last_node, req.last_node = req.last_node, self.view(node)
        self.inc_lock_ref(req.last_node)
        self.dec_lock_ref(last_node)
        req.prefix_indices = prefix

    def _attribute(self, req: Request, finished: bool) -> None:
        """Account for where its prompt came from; one tier needs no accounts."""

    def _adopt(self, req: Request, prefix: Array, mine: PageIds, found: TreeMatch) -> int:
        """Go over from the request's own pages to the cache's where they differ. Returns: the node that it uses now.

        From the *first* page that differs the row is written anew. (SGLang starts at len(prefix_indices), which may lie
        inside of that page: the row then keeps slots of a page that has been freed.)
        """
        theirs = found.page_ids()
        differ = np.flatnonzero(mine[: len(theirs)] != theirs)
        if len(differ):
            size = self.page_size
            start, end = int(differ[0]) * size, len(theirs) * size
            prefix[start:end] = self.indices.of_pages(theirs[differ[0] :])
            self.req_to_token_pool.write((req.req_pool_idx, slice(start, end)), prefix[start:end])
            self._free_pages(mine[differ])
        return found.device_node

    def _free_pages(self, page_ids: PageIds) -> None:
        if self._pages is not None:
            self._pages.free(page_ids)
        elif self._numbered is not None:
            self._numbered.free(page_ids)

    # ---- room --------------------------------------------------------------------------------------------------------
    def evict(self, num_tokens: int) -> int:
        """Free device slots, whole leaves in policy order, until num_tokens are freed. Returns: how many were."""
        if self.disable:
            return 0
        self._children = None
        freed = self.tree.evict(max(0, num_tokens))
        self._free_pages(freed.page_ids)
        return freed.num_tokens

    def inc_lock_ref(self, node: TreeNode) -> int:
        """Protect the path of a node. Returns: the change of evictable_size (<= 0).

        Raises: StateError if the node is not on the device; HandleError if it has left the tree.
        """
        return 0 if self.disable else int(self._ops.lock(node.id))

    def dec_lock_ref(self, node: TreeNode, swa_uuid_for_lock: str | None = None) -> int:
        """Undo one inc_lock_ref of this very node. Returns: the change of evictable_size (>= 0).

        Raises: LockError if it has no lock of its own to undo.
        """
        return 0 if self.disable else int(self._ops.unlock(node.id))

    def reset(self) -> None:
        """Forget everything. The allocator is not told: engines clear it, and their row pool, next to this call."""
        self._children = None
        self.tree.reset()
        if self._numbered is not None:
            self._numbered.clear()

    # ---- looking -----------------------------------------------------------------------------------------------------
    def evictable_size(self) -> int:
        """Tokens on the device that evict could free."""
        return self.tree.stats().evictable_tokens

    def protected_size(self) -> int:
        """Tokens on the device that are locked, or being loaded."""
        return self.tree.stats().protected_tokens

    def total_size(self) -> int:
        """Tokens on the device."""
        stats = self.tree.stats()
        return stats.evictable_tokens + stats.protected_tokens

    def all_values_flatten(self) -> Array:
        """The device slots of all nodes, node by node, parents first."""
        pages = [info.page_ids for info in self.tree.dump() if info.page_ids is not None]
        return self.indices.of_pages(np.concatenate([np.zeros(0, np.int32), *pages]))

    def get_height(self, node: TreeNode) -> int:
        """Nodes from the root to this one; 0 for the root."""
        height = 0
        while node.id != ROOT:
            parent = node.parent
            assert parent is not None
            node, height = parent, height + 1
        return height

    def pretty_print(self) -> None:
        """Print the tree: for each node, indented by its depth, its length, its first tokens and its locks."""
        depth = {ROOT: 0}
        print("", 0, [], "r=1")
        for info in self.tree.dump():
            depth[info.node] = depth[info.parent] + 1
            print(" " * 2 * depth[info.node], len(info.tokens), info.tokens[:10].tolist(), f"r={info.lock_ref}")
        print(f"#tokens: {self.total_size()}")

    def take_events(self) -> list[Any]:
        """The events since the last call, oldest first; [] without enable_kv_cache_events. One event a page."""
        return [to_engine_event(event) for event in self.tree.take_events()] if self.enable_kv_cache_events else []

    # ---- for views ---------------------------------------------------------------------------------------------------
    def view(self, handle: int) -> TreeNode:
        """The view of a node."""
        return TreeNode(self, handle) if handle != ROOT else self.root_node

    def node_info(self, handle: int) -> NodeInfo:
        """A snapshot of a node."""
        return self.tree.node_info(handle)

    def children_of(self, handle: int) -> dict[Any, TreeNode]:
        """See TreeNode.children."""
        if self._children is None:
            self._children = {ROOT: {}}
            for info in self.tree.dump():
                self._children[info.node] = {}
                first = tuple(info.tokens[: self.page_size].tolist())
                key: Any = first[0] if self.page_size == 1 else first
                key = (info.namespace, key) if info.parent == ROOT and info.namespace else key
                self._children[info.parent][key] = self.view(info.node)
        if handle not in self._children:
            self.tree.node_info(handle)  # raises HandleError: it has left the tree
        return self._children[handle]

    def is_stored(self, handle: int) -> bool:
        """See TreeNode.backuped_storage."""
        return False

    def stored_hashes(self, handle: int) -> list[str] | None:
        """See TreeNode.hash_value."""
        return None

    def last_hash(self, handle: int) -> str | None:
        """See TreeNode.get_last_hash_value."""
        return None


def _namespace(req: Request) -> tuple[Any, Any]:
    return getattr(req, "extra_key", None), getattr(req, "cache_salt", None)


def _library_of(allocator: Any) -> Library | None:
    """Of one of our own pools, the library of its buffers; else None: torch, if it is there."""
    get_kvcache = getattr(allocator, "get_kvcache", None)
    found = None if get_kvcache is None else getattr(get_kvcache(), "library", None)
    return "numpy" if found == "numpy" else None


def _capacity(allocator: Any, tree: BaseRadixTree) -> int:
    size = getattr(allocator, "size", None)
    return int(allocator.available_size() if size is None else size) // tree.page_size
