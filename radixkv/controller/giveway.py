"""L3: evictions go before storage. What counts as evictable can be evicted, whatever storage does meanwhile.

    [a | 1 | -] -- [b | - | 6]      b is being stored: page 6 must stay as it is, so b cannot leave the tree,
                                    nor a, which has no host copy, and would take b along

a counts as evictable (nobody uses it), and a scheduler has planned with that. To wait for storage would stop the
engine, for as long as a server hangs; to lock a while b is stored would take back what was promised when it was not.
So an eviction that falls short does without the protection: whoever is still there afterwards is protected again, and
a store whose node has gone is given up; a drain keeps the pages that its worker may still read.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import HandleError
from ..types import ROOT, PageIds
from .base import StorageJob, Ticket
from .context import Context
from .drains import AllOf, Drains
from .operations import DrainOp, Stage, StoreOp
from .prefetches import Prefetches
from .stores import Stores

__all__ = ["GiveWay"]


class GiveWay:
    """Evicts in spite of stores, prefetches and drains that protect host copies. All follows from agreed state."""

    def __init__(self, context: Context, stores: Stores, prefetches: Prefetches, drains: Drains) -> None:
        self.context, self.stores, self.prefetches, self.drains = context, stores, prefetches, drains

    def evict(self, num_tokens: int, evict: Callable[[int], int]) -> int:
        """Call ``evict`` with nothing protected by storage. Returns: device tokens freed. Raises: as ``evict``.

        1. Room on the host for what is written back, while all is protected still.  2. Nothing is: but host pages that
        are being read are not freed.  3. Who is left is protected again; for the pages of who is not there are drains.
        """
        context = self.context
        reading: list[StoreOp | DrainOp] = [*self.stores.operations]
        reading += [op for op in self.drains.operations if op.node != ROOT]
        waiting = [op for op in self.prefetches.operations.values() if op.keeps_host]
        if not (reading or waiting):
            return 0
        if context.config.write_policy == "write_back":
            context.evict_host(max(0, num_tokens - context.ledger.host.available_size()))
        for holder in (*reading, *waiting):
            context.tree.release_host(holder.node)
        pages = context.join([op.host_pages for op in reading])
        left: list[PageIds] = []
        try:
            with context.ledger.holding(pages) as left:
                return evict(num_tokens)
        finally:
            for fetch in waiting:
                fetch.keeps_host = self._protect(fetch.node)
            self._end([op for op in reading if not self._protect(op.node)], left)

    def _protect(self, node: int) -> bool:
        """Returns: False if it has left the tree."""
        try:
            self.context.tree.protect_host(node)
        except HandleError:
            return False
        return True

    def _end(self, gone: list[StoreOp | DrainOp], left: list[PageIds]) -> None:
        """Operations whose node has left the tree (as a whole: what was split from it is above, and has a host copy,
        so it is no root of what an eviction drops). ``left``: their host pages."""
        works: list[Ticket | StorageJob] = []
        for op in gone:
            if isinstance(op, StoreOp):
                works.append(op.job)
                op.job.cancel()
                op.to(Stage.CANCELLED)
                self.stores.operations.remove(op)
                self.context.finished("store", "cancelled", 0, op.job.seconds, op.started_s)
            else:
                works.append(op.work)
                op.to(Stage.DONE)
                self.drains.operations.remove(op)
        if left:  # one drain: two storages may read the same pages, one of them detached
            self.drains.add("store", AllOf(works), host_pages=np.unique(np.concatenate(left)))
