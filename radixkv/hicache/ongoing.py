"""L5: what is in flight, under the names by which engines look at it: mappings that look when asked.

    name                     key                    value
    ongoing_write_through    node.id                the node that is copied to the host
    ongoing_load_back        id of the last node    (the node above those that come back, the last of them)
    ongoing_prefetch         request id             (last host node, token ids, host slots, PrefetchOperation)
    ongoing_backup           operation id           the node that is written to storage
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ..controller import PrefetchInFlight
from .cache_controller import HiCacheController, LoadCacheEvent, PrefetchOperation

if TYPE_CHECKING:
    from ..tree.base import BaseRadixTree
    from .config import HiCacheConfig
    from .indices import Indices
    from .node import TreeNode

__all__ = ["Ongoing", "OngoingNames"]

K = TypeVar("K")
V = TypeVar("V")


class Ongoing(Mapping[K, V], Generic[K, V]):
    """The operations of one kind, by the key that engines use. Read-only, and always as of now.

    Args: begun: their records by key; value: what an engine sees of a record; find: one record, None if there is none,
        where engines ask for one of many.
    """

    __slots__ = ("_begun", "_find", "_value")

    def __init__(
        self,
        begun: Callable[[], dict[K, Any]],
        value: Callable[[K, Any], V],
        find: Callable[[Any], Any] | None = None,
    ) -> None:
        self._begun, self._value, self._find = begun, value, find or (lambda key: begun().get(key))

    def __getitem__(self, key: K) -> V:
        record = self._find(key)
        if record is None:
            raise KeyError(key)
        return self._value(key, record)

    def __contains__(self, key: object) -> bool:
        return self._find(key) is not None

    def __iter__(self) -> Iterator[K]:
        return iter(self._begun())

    def __len__(self) -> int:
        return len(self._begun())

    def __repr__(self) -> str:
        return f"Ongoing({list(self._begun())})"


class OngoingNames:
    """The part of HiRadixCache that shows what is in flight."""

    cache_controller: HiCacheController
    config: HiCacheConfig
    host_indices: Indices
    tree: BaseRadixTree
    view: Callable[[int], TreeNode]

    @property
    def tp_world_size(self) -> int:
        """Ranks that serve one model together."""
        return self.cache_controller.tp_world_size

    @property
    def prefetch_timeout(self) -> float:
        """Seconds after which the policy "timeout" ends a prefetch of few tokens; long ones get more, see
        ``ControllerConfig.prefetch_timeout_per_ki_s``."""
        return self.config.control.prefetch_timeout_base_s

    @property
    def load_cache_event(self) -> LoadCacheEvent:
        """See LoadCacheEvent."""
        return self.cache_controller.load_cache_event

    @property
    def ongoing_write_through(self) -> Ongoing[int, TreeNode]:
        """Copies to the host; those of an eviction (write_back) end before it returns, and are never here."""
        core = self.cache_controller.core
        return Ongoing(lambda: {node: node for node in core.in_flight().writes}, lambda node, _: self.view(node))

    @property
    def ongoing_load_back(self) -> Ongoing[int, tuple[TreeNode, TreeNode]]:
        """Loads, queued ones too."""
        core, tree = self.cache_controller.core, self.tree
        return Ongoing(
            lambda: core.in_flight().loads,
            lambda _, load: (self.view(tree.node_info(load.first).parent), self.view(load.last)),
        )

    @property
    def ongoing_prefetch(self) -> Ongoing[str, tuple[TreeNode, list[int], Any, PrefetchOperation]]:
        """Prefetches that no check_prefetch_progress has ended."""
        core = self.cache_controller.core
        return Ongoing(lambda: core.in_flight().prefetches, self._prefetch, core.prefetch_in_flight)

    @property
    def ongoing_backup(self) -> Ongoing[int, TreeNode]:
        """What is written to storage."""
        core = self.cache_controller.core
        return Ongoing(lambda: core.in_flight().stores, lambda _, node: self.view(node))

    def _prefetch(self, req_id: str, begun: PrefetchInFlight) -> tuple[TreeNode, list[int], Any, PrefetchOperation]:
        operation = PrefetchOperation(self.cache_controller.core, req_id, begun, self.host_indices)
        return self.view(begun.node), operation.token_ids, operation.host_indices, operation
