"""L5: nodes of the tree, seen as an engine knows them. A view is a handle; it holds nothing and looks when asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..types import ROOT, NodeInfo

if TYPE_CHECKING:
    from ..pool.arrays import Array
    from .radix_cache import RadixCache

__all__ = ["TreeNode"]


class TreeNode:
    """One node. Two views of one node are equal, and hash alike.

    A view names the *end* of its node: if the node is split, the view is of the lower part, as there. Once the node has
    left the tree, everything but comparing raises HandleError.

    The root is of all namespaces: its lock_ref is 1, its key and value are empty.
    """

    __slots__ = ("__weakref__", "_cache", "id")

    id: int
    """The tree's 64-bit handle; 0 for the root. Not used again while the cache lives, over resets too."""

    def __init__(self, cache: RadixCache, handle: int) -> None:
        self._cache = cache
        self.id = handle

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TreeNode) and self.id == other.id and self._cache is other._cache

    def __hash__(self) -> int:
        return hash(self.id)

    def __lt__(self, other: TreeNode) -> bool:
        return self.last_access_time < other.last_access_time

    def __repr__(self) -> str:
        return "TreeNode(root)" if self.id == ROOT else f"TreeNode({self.id:#x})"

    @property
    def _info(self) -> NodeInfo:
        return self._cache.node_info(self.id)

    # ---- structure ---------------------------------------------------------------------------------------------------
    @property
    def children(self) -> dict[Any, TreeNode]:
        """Children by their first page: its token if page_size is 1, else a tuple; of other namespaces than the default
        by (namespace, that). One walk over the whole tree, which all views share until the tree changes."""
        return self._cache.children_of(self.id)

    @property
    def parent(self) -> TreeNode | None:
        """None for the root."""
        return None if self.id == ROOT else self._cache.view(self._info.parent)

    @property
    def key(self) -> list[int]:
        """The node's own tokens."""
        return [] if self.id == ROOT else self._info.tokens.tolist()

    # ---- tiers -------------------------------------------------------------------------------------------------------
    @property
    def value(self) -> Array | None:
        """int64 device slots, one a token; None if it is not on the device."""
        if self.id == ROOT:
            return self._cache.indices.none
        pages = self._info.page_ids
        return None if pages is None else self._cache.indices.of_pages(pages)

    @property
    def host_value(self) -> Array | None:
        """int64 host slots, one a token; None if there is no finished host copy."""
        pages = None if self.id == ROOT else self._info.host_page_ids
        return None if pages is None else self._cache.host_indices.of_pages(pages)

    @property
    def evicted(self) -> bool:
        """Not on the device."""
        return self.id != ROOT and self._info.page_ids is None

    @property
    def backuped(self) -> bool:
        """Has a host copy: from the moment that the copy is complete, not from its start."""
        return self.id != ROOT and self._info.host_page_ids is not None

    @property
    def loading(self) -> bool:
        """Its device pages are being filled from the host."""
        return self.id != ROOT and self._info.loading

    @property
    def hash_value(self) -> list[str] | None:
        """The page hashes (hex) of the node if all of it is in storage, else None."""
        return self._cache.stored_hashes(self.id)

    @property
    def backuped_storage(self) -> bool:
        """All of it is in storage."""
        return self._cache.is_stored(self.id)

    def get_last_hash_value(self) -> str | None:
        """The page hash (hex) at the end of the node, whether it is in storage or not (what follows may be); None for
        the root, and in a cache without storage."""
        return self._cache.last_hash(self.id)

    # ---- counters ----------------------------------------------------------------------------------------------------
    @property
    def lock_ref(self) -> int:
        """Locks of this node and of all below it."""
        return 1 if self.id == ROOT else self._info.lock_ref

    @property
    def host_ref_counter(self) -> int:
        """Who keeps its host copy."""
        return 0 if self.id == ROOT else self._info.host_ref

    @property
    def hit_count(self) -> int:
        """Insertions that went through it, the first included."""
        return 0 if self.id == ROOT else self._info.hit_count

    @property
    def last_access_time(self) -> int:
        """When a match or an insertion last went through it, in ticks of the tree's own clock."""
        return 0 if self.id == ROOT else self._info.access_time

    def protect_host(self) -> None:
        """Keep the host copy from eviction. Raises: StateError if there is none. The root: nothing."""
        self._cache.tree.protect_host(self.id)

    def release_host(self) -> None:
        """Undo one protect_host. Raises: LockError (a RuntimeError) if there is none to undo."""
        self._cache.tree.release_host(self.id)
