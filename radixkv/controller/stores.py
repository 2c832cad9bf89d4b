"""L3: host to storage, one operation a node."""

from __future__ import annotations

from ..types import ROOT
from .backoff import BackOff
from .base import Outcome, StorageEdge, StorageJob
from .config import STORED, STORING
from .context import Context
from .drains import Drains
from .hashes import PathHashes
from .operations import Stage, StoreOp, read_pages_status

__all__ = ["NothingToDo", "Stores"]


class NothingToDo:
    """The job of a rank for which another one stores."""

    error = None
    seconds = 0.0

    def __init__(self, pages: int) -> None:
        self.pages = pages

    def done(self) -> bool:
        return True

    def cancel(self) -> bool:
        return True

    def wait(self, timeout_s: float | None = None) -> bool:
        return True


class Stores:
    """Storage backups in flight, in the order in which they began. Args: for_all: rank 0 stores for all ranks."""

    def __init__(self, context: Context, drains: Drains, hashes: PathHashes, for_all: bool) -> None:
        self.context, self.drains, self.hashes, self.for_all = context, drains, hashes, for_all
        self.edge: StorageEdge | None = None
        self.operations: list[StoreOp] = []
        self.backoff = BackOff(context.config, context.clock)

    def begin(self, node: int) -> int | None:
        """See Controller.store."""
        context, tree, edge = self.context, self.context.tree, self.edge
        if edge is None or node == ROOT:
            return None
        info = tree.node_info(node)
        if info.host_page_ids is None or info.marks & (STORED | STORING):
            return None
        if len(self.operations) >= context.config.max_stores or self.backoff.active:
            context.counts["refused_stores"] += 1
            return None
        pages = info.host_page_ids
        job: StorageJob
        if self.for_all and context.group.rank:
            job = NothingToDo(len(pages))
        else:
            job = edge.store(self.hashes.own(node), pages, info.namespace)
        tree.protect_host(node)
        tree.mark(node, set=STORING)
        op = StoreOp(context.next_op_id(), context.clock(), node, pages, job)
        self.operations.append(op)
        return op.op_id

    def settle(self, op: StoreOp, status: int) -> bool:
        """The workers of all ranks have ended. Returns: whether the whole node is stored."""
        context, counts = self.context, self.context.counts
        stored, _ = read_pages_status(status)
        self.operations.remove(op)
        self.context.tree.release_host(op.node)
        self._mark(op.node, op.num_pages, stored)
        complete = stored == op.num_pages
        op.to(Stage.DONE if complete else Stage.PARTIAL if stored else Stage.FAILED)
        self.backoff.result(complete)
        counts["stores" if complete else "partial_stores" if stored else "store_failures"] += 1
        counts["store_tokens"] += stored * context.page_size
        outcome: Outcome = "done" if complete else "partial" if stored else "failed"
        context.finished("store", outcome, stored, op.job.seconds, op.started_s)
        return complete

    def _mark(self, node: int, num_pages: int, stored: int) -> None:
        """Of the last num_pages of the node's path the first ``stored`` are in storage; split where they end.

        [ 1 2 3 4 5 6 ]  3 of 6 stored      [ 1 2 3 | STORED ] -- [ 4 5 6 ]
        """
        tree, page_size = self.context.tree, self.context.page_size
        tree.mark(node, clear=STORING, num_pages=num_pages)
        if not stored:
            return
        left, top = num_pages - stored, node
        while left:
            info = tree.node_info(top)
            pages = len(info.tokens) // page_size
            if left < pages:
                top = tree.split_at(top, (pages - left) * page_size)
                left = 0
            else:
                top = info.parent
                left -= pages
        tree.mark(top, set=STORED, num_pages=stored)

    def give_up(self) -> None:
        """Cancel all; what a worker still reads stays protected until it has ended."""
        for op in self.operations:
            op.job.cancel()
            op.to(Stage.CANCELLED)
            self.context.tree.mark(op.node, clear=STORING, num_pages=op.num_pages)
            self.context.finished("store", "cancelled", 0, op.job.seconds, op.started_s)
            self.drains.add("store", op.job, host_pages=op.host_pages, node=op.node)
        self.operations.clear()

    def forget_stored(self) -> None:
        """Storage has gone: nothing of the tree is in it."""
        tree = self.context.tree
        for node in tree:
            tree.mark(node, clear=STORED)
