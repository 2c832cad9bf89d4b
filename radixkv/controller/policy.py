"""L3: what is copied to the next tier, and when: the write policies."""

from __future__ import annotations

import contextlib

from ..errors import HandleError
from ..types import ROOT
from .context import Context
from .stores import Stores
from .writes import Writes

__all__ = ["WritePolicies"]


class WritePolicies:
    """Starts backups and stores of nodes that have been hit often enough."""

    def __init__(self, context: Context, writes: Writes, stores: Stores) -> None:
        self.context, self.writes, self.stores = context, writes, stores
        self._on_hits = context.config.write_policy != "write_back" and context.ledger.has_host
        """Whether hits are what sends nodes to the host."""
        self._hits = context.config.hits_to_host, context.config.hits_to_storage

    @property
    def hits_to_host(self) -> int:
        """Hits from which a node is copied to the host, now."""
        config = self.context.config
        if not config.adaptive_thresholds:
            return self._hits[0]
        return self._adapted(self._hits[0], len(self.writes.operations), config.max_writes)

    @property
    def hits_to_storage(self) -> int:
        """Hits from which a node goes to storage, now."""
        config = self.context.config
        if not config.adaptive_thresholds:
            return self._hits[1]
        return self._adapted(self._hits[1], len(self.stores.operations), config.max_stores)

    def _adapted(self, threshold: int, in_flight: int, limit: int) -> int:
        """A threshold under pressure. All of it follows from agreed state."""
        config = self.context.config
        if in_flight >= config.busy_fraction * limit:
            threshold *= 2
        host = self.context.ledger.host
        to_be_had = host.available_size() + self.context.tree.stats().host_evictable_tokens
        if to_be_had < config.low_host_fraction * host.size:
            threshold *= 2
        return threshold

    def start_due(self, node: int) -> None:
        """A path has been hit: start what its nodes are due for."""
        if node == ROOT or not self._on_hits:
            return
        self.writes.begin_due(node, self.hits_to_host)
        if self.stores.edge is not None:
            for part in self.stores.due(node, self.hits_to_storage):
                self.stores.begin(part)

    def hit(self, node: int) -> None:
        """See Controller.hit."""
        if node == ROOT or not self._on_hits:
            return
        info = self.context.tree.node_info(node)
        if info.host_page_ids is None:
            if info.hit_count + 1 >= self.hits_to_host:
                self.writes.begin(node)
        elif self.stores.edge is not None and info.hit_count + 1 >= self.hits_to_storage:
            self.stores.begin(node)

    def backed_up(self, node: int) -> None:
        """A node has got its host copy (and may have lost it again, within an eviction)."""
        if self.context.config.store_after_backup and self.stores.edge is not None:
            with contextlib.suppress(HandleError):
                for part in self.stores.due(node, 0):
                    self.stores.begin(part)
