"""L3: what is left of operations that were given up: pages that a worker may still touch, until it does not."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..types import ROOT, PageIds
from .base import Kind, StorageJob, Ticket
from .context import Context
from .ledger import NO_PAGES
from .operations import DrainOp, Stage

__all__ = ["AllOf", "Drains"]


class AllOf:
    """Several works as one Ticket, where they touch the same pages: it has ended when all of them have."""

    error = None
    seconds = 0.0

    def __init__(self, works: Sequence[Ticket | StorageJob]) -> None:
        self._works = works

    def done(self) -> bool:
        return all(work.done() for work in self._works)

    def wait(self, timeout_s: float | None = None) -> bool:
        end_s = None if timeout_s is None else time.monotonic() + timeout_s
        return all(work.wait(None if end_s is None else max(0.0, end_s - time.monotonic())) for work in self._works)

    def cancel(self) -> bool:
        ended = [work.cancel() for work in self._works]
        return all(ended)


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
    def num_device_pages(self) -> int:
        """Device pages that a copy may still write."""
        return sum(len(op.device_pages) for op in self.operations)

    @property
    def num_pages(self) -> int:
        """Pages that are stuck."""
        return sum(len(op.device_pages) + len(op.host_pages) for op in self.operations if op.node == ROOT)
