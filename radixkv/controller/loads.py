"""L3: host to device: loads wait in a queue, are started as one batch, and complete layer by layer."""

from __future__ import annotations

from typing import NamedTuple

from ..errors import LoadError, LockError
from ..types import ROOT, PageIds
from .base import Load
from .context import Context
from .drains import Drains
from .layers import LayerCounter
from .operations import SUCCEEDED, LoadBatch, LoadOp, LoadPart, Stage
from .room import Room

__all__ = ["Loads"]

SMOOTHING = 0.25
"""Weight of a new measurement of a load's speed."""


class _HostNode(NamedTuple):
    """A node of a host-only tail."""

    node: int
    parent: int
    host_pages: PageIds


class Loads:
    """Queued loads, and the batches in flight in the order in which they began."""

    def __init__(self, context: Context, drains: Drains, room: Room, layers: LayerCounter) -> None:
        self.context, self.drains, self.room, self.layers = context, drains, room, layers
        self.queued: list[LoadOp] = []
        self.batches: list[LoadBatch] = []
        self.ns_per_token = context.config.load_ns_per_token
        """What loads cost, on the slowest rank; agreed in poll."""
        self.measured_ns_per_token = self.ns_per_token
        """What they cost here."""

    # ---- begin -------------------------------------------------------------------------------------------------------
    def begin(self, node: int, quota_tokens: int | None) -> Load | None:
        """See Controller.load.

        1. The path above is locked and the tail's host pages are protected: no eviction that makes room takes them.
        2. How much of the tail is worth it, and fits.  3. Room on the device.
        4. The nodes become loading, which protects the path in place of the lock.
        """
        context, tree = self.context, self.context.tree
        nodes = tree.host_path(node) if node != ROOT and context.ledger.has_host else []
        if not nodes:
            return None
        tail = [self._host_node(part) for part in nodes]
        above = tail[0].parent
        delta = tree.lock(above)
        try:
            tail = self._worth_it(tail, None if quota_tokens is None else quota_tokens + delta)
            for part in tail:
                tree.protect_host(part.node)
            loaded = self._take(tail) if tail else None
            if loaded is None:
                context.counts["refused_loads"] += 1
                for part in tail:
                    tree.release_host(part.node)
        finally:
            tree.unlock(above)
        return loaded

    def _host_node(self, node: int) -> _HostNode:
        parent, pages = self.context.tree.host_pages(node)
        assert pages is not None
        return _HostNode(node, parent, pages)

    def _worth_it(self, tail: list[_HostNode], room_tokens: int | None) -> list[_HostNode]:
        """The nodes of the tail that are to be loaded, by threshold, quota, load policy and cost; [] if none."""
        config = self.context.config
        total = sum(len(part.host_pages) for part in tail) * self.context.page_size
        if room_tokens is not None and total > room_tokens:
            if config.load_policy == "all":
                return []
            tail = self._cut(tail, max(0, room_tokens) // self.context.page_size)
            total = sum(len(part.host_pages) for part in tail) * self.context.page_size
        if total < config.load_back_threshold or not total:
            return []
        if config.load_policy == "cost":
            load_ns = config.load_base_ns + total * self.ns_per_token
            if load_ns > total * config.compute_ns_per_token:
                return []
        return tail

    def _cut(self, tail: list[_HostNode], room_pages: int) -> list[_HostNode]:
        """The longest prefix of the tail that fits; a node is split for it."""
        kept: list[_HostNode] = []
        for part in tail:
            if len(part.host_pages) > room_pages:
                if room_pages:
                    upper = self.context.tree.split_at(part.node, room_pages * self.context.page_size)
                    kept.append(_HostNode(upper, part.parent, part.host_pages[:room_pages]))
                break
            kept.append(part)
            room_pages -= len(part.host_pages)
        return kept

    def _take(self, tail: list[_HostNode]) -> Load | None:
        """Give the nodes device pages; None, and nothing has changed, if there are too few."""
        context, tree = self.context, self.context.tree
        pages = self.room.alloc_for_load(sum(len(part.host_pages) for part in tail))
        if pages is None:
            return None
        parts, at = [], 0
        for node, _, host_pages in tail:
            own = pages[at : at + len(host_pages)]
            tree.set_device(node, own, loading=True)
            parts.append(LoadPart(node, own, host_pages))
            at += len(own)
        context.ledger.begin_load(context.join([part.host_pages for part in parts]))
        op = LoadOp(context.next_op_id(), context.clock(), parts)
        self.queued.append(op)
        return Load(op.op_id, pages, len(pages) * context.page_size, tail[-1].node)

    def cancel(self, load: Load) -> bool:
        """See Controller.cancel_load."""
        op = next((op for op in self.queued if op.op_id == load.op_id), None)
        if op is None:
            return False
        left = self._undo(op)
        if left:
            raise LockError(f"{len(left)} nodes of load {load.op_id} are locked, or have loads below them")
        op.to(Stage.CANCELLED)
        self.queued.remove(op)
        self.context.finished("load", "cancelled", 0, 0.0, op.started_s)
        return True

    def start(self) -> int:
        """See Controller.start_loads."""
        self.context.flush_backups()
        loads, self.queued = self.queued, []
        return self._copy(loads) if loads else -1

    def _copy(self, loads: list[LoadOp]) -> int:
        """Begin one batch."""
        context = self.context
        for op in loads:
            op.to(Stage.COPYING)
        parts = [part for op in loads for part in op.parts]
        host_pages = context.join([part.host_pages for part in parts])
        device_pages = context.join([part.device_pages for part in parts])
        progress = context.mover.new_progress()
        index = self.layers.begin(progress)
        ticket = context.begin_load(host_pages, device_pages, progress)
        self.batches.append(LoadBatch(index, loads, ticket, len(host_pages)))
        context.counts["load_batches"] += 1
        return index

    # ---- settle ------------------------------------------------------------------------------------------------------
    def settle(self, batch: LoadBatch, status: int) -> int:
        """The batch has ended on all ranks. What failed and is in use is copied again. Returns: loads settled."""
        self.batches.remove(batch)
        if status == SUCCEEDED:
            self.layers.settle(batch.index)
            self._measure(batch)
            for op in batch.loads:
                self._finish(op, batch.ticket.seconds * op.num_pages / batch.num_pages)
            return len(batch.loads)
        error = batch.ticket.error or LoadError("the copy failed on another rank")
        self.layers.settle(batch.index, error)
        again: list[LoadOp] = []
        for op in reversed(batch.loads):  # a later one may be below an earlier one
            left = self._undo(op)
            self.context.counts["load_failures"] += 1
            self.context.finished("load", "failed", 0, batch.ticket.seconds, op.started_s)
            if left:
                op.parts = left
                again.insert(0, op)
            else:
                op.to(Stage.FAILED)
        if again:
            self._copy(again)
        return len(batch.loads) - len(again)

    def _finish(self, op: LoadOp, seconds: float) -> None:
        context = self.context
        op.to(Stage.DONE)
        for part in op.parts:
            context.tree.finish_load(part.node, True)
            context.tree.release_host(part.node)
            context.ledger.end_load(part.device_pages, part.host_pages)
        context.counts["loads"] += 1
        context.counts["load_tokens"] += op.num_pages * context.page_size
        context.finished("load", "done", op.num_pages, seconds, op.started_s)

    def _undo(self, op: LoadOp) -> list[LoadPart]:
        """Make nodes host-only again, leaf first, and free their device pages. Returns: those that are in use."""
        context = self.context
        left = list(op.parts)
        while left:
            part = left[-1]
            try:
                result = context.tree.finish_load(part.node, False)
            except LockError:
                break
            context.tree.release_host(part.node)
            context.ledger.undo_load(part.host_pages)
            context.ledger.device.free(result.page_ids)
            left.pop()
        op.parts = left
        return left

    def _measure(self, batch: LoadBatch) -> None:
        if batch.ticket.seconds:
            ns = batch.ticket.seconds * 1e9 / (batch.num_pages * self.context.page_size)
            self.measured_ns_per_token += int(SMOOTHING * (ns - self.measured_ns_per_token))
            if self.context.group.size == 1:
                self.ns_per_token = self.measured_ns_per_token
