"""L3: what is left of operations that were given up: pages that a worker may still touch, until it does not."""

from __future__ import annotations

from ..types import ROOT, PageIds
from .base import Kind, StorageJob, Ticket
from .context import Context
from .ledger import NO_PAGES
from .operations import DrainOp, Stage

__all__ = ["Drains"]


class Drains:
    """The operations that drain, oldest first."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.operations: list[DrainOp] = []

    def add(
        self,
        kind: Kind,
        work: Ticket | StorageJob,
        device_pages: PageIds = NO_PAGES,
        host_pages: PageIds = NO_PAGES,
        node: int = ROOT,
    ) -> None:
        """Take over what a given-up operation owned. A single rank whose work has ended frees it now."""
        context = self.context
        op = DrainOp(context.next_op_id(), context.clock(), kind, work, device_pages, host_pages, node)
        self.operations.append(op)
        if context.group.size == 1 and work.done():
            self.settle(op)

    def settle(self, op: DrainOp) -> None:
        """Nobody touches its pages any more, on any rank."""
        op.to(Stage.DONE)
        self.operations.remove(op)
        ledger = self.context.ledger
        if op.node != ROOT:
            self.context.tree.release_host(op.node)
            return
        if len(op.device_pages):
            ledger.device.free(op.device_pages)
        ledger.free_host(op.host_pages)

    @property
    def num_pages(self) -> int:
        """Pages that are stuck."""
        return sum(len(op.device_pages) + len(op.host_pages) for op in self.operations if op.node == ROOT)
