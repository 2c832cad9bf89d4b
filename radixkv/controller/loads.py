"""L3: host to device: loads wait in a queue, are started as one batch, and complete layer by layer."""

from __future__ import annotations

from itertools import takewhile
from typing import NamedTuple

from ..errors import HandleError, LoadError, LockError
from ..types import ROOT, PageIds
from .base import Load
from .context import Context
from .layers import LayerCounter
from .operations import SUCCEEDED, LoadBatch, LoadOp, LoadPart, Stage
from .room import Room

__all__ = ["Loads"]

SMOOTHING = 0.25
"""Weight of a new measurement of a load's speed."""
KEPT_FAILURES = 4096
"""Nodes of which it is remembered that their loads failed."""


class _HostNode(NamedTuple):
    """A node of a host-only tail."""

    node: int
    parent: int
    host_pages: PageIds


class _Broken(NamedTuple):
    """A load that is copied no more, and waits for those who use its nodes. batch, error: its last one's."""

    op: LoadOp
    batch: int
    error: BaseException


class Loads:
    """Queued loads, and the batches in flight in the order in which they began."""

    def __init__(self, context: Context, room: Room, layers: LayerCounter) -> None:
        self.context, self.room, self.layers = context, room, layers
        self.queued: list[LoadOp] = []
        self.batches: list[LoadBatch] = []
        self.broken: list[_Broken] = []
        self._failures: dict[int, int] = {}
        """Copies in a row that failed, by node."""
        self._bad: list[int] = []
        """Nodes that have failed too often, and are to leave the host."""
        self.ns_per_token = context.config.load_ns_per_token
        """What loads cost, on the slowest rank; agreed in poll."""
        self.measured_ns_per_token = self.ns_per_token
        """What they cost here."""

    @property
    def num_in_flight(self) -> int:
        """Loads that are queued, being copied, or broken."""
        return len(self.queued) + sum(len(batch.loads) for batch in self.batches) + len(self.broken)

    def forget(self) -> None:
        """The tree is dropped."""
        self.queued.clear()
        self.batches.clear()
        self.broken.clear()
        self._failures.clear()
        self._bad.clear()

    # ---- begin -------------------------------------------------------------------------------------------------------
    def begin(self, node: int, quota_tokens: int | None) -> Load | None:
        """See Controller.load.

        1. The path above is locked and the tail's host pages are protected: no eviction that makes room takes them.
        2. How much of the tail is worth it, and fits.  3. Room on the device.
        4. The nodes become loading, which protects the path in place of the lock.
        """
        context, tree = self.context, self.context.tree
        nodes = tree.host_path(node) if node != ROOT and context.ledger.has_host else []
        if self._failures:
            nodes = list(takewhile(lambda part: not self._is_bad(part), nodes))
        if not nodes:
            return None
        tail = [self._host_node(part) for part in nodes]
        above = tail[0].parent
        delta = tree.lock(above)
        loaded: Load | None = None
        try:
            tail = self._worth_it(tail, None if quota_tokens is None else quota_tokens + delta)
            for part in tail:
                tree.protect_host(part.node)
            try:
                loaded = self._take(tail) if tail else None
            finally:  # also if an eviction raises that a rank is gone
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
        # a copy: the caller may turn his pages into slots in place, and these are where the bytes will go
        return Load(op.op_id, pages.copy(), len(pages) * context.page_size, tail[-1].node)

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
        progress = context.new_progress()
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
        again: list[LoadOp] = []
        broken: list[_Broken] = []
        for op in reversed(batch.loads):  # a later one may be below an earlier one
            self._count_failure(op)
            left = self._undo(op)
            self.context.counts["load_failures"] += 1
            self.context.finished("load", "failed", 0, batch.ticket.seconds, op.started_s)
            if not left:
                op.to(Stage.FAILED)
            elif any(self._is_bad(part.node) for part in left):
                op.to(Stage.BROKEN)
                broken.insert(0, _Broken(op, batch.index, error))
            else:
                again.insert(0, op)
        if broken:
            self.broken += broken
            self.layers.fail(batch.index, error)
        else:
            self.layers.settle(batch.index, error)
        if again:
            self._copy(again)
        return len(batch.loads) - len(again)

    def _finish(self, op: LoadOp, seconds: float) -> None:
        context = self.context
        op.to(Stage.DONE)
        for part in op.parts:
            context.tree.finish_load(part.node, True)
            self._failures.pop(part.node, None)
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

    # ---- what fails again and again ----------------------------------------------------------------------------------
    def _is_bad(self, node: int) -> bool:
        return self._failures.get(node, 0) >= self.context.config.load_attempts

    def _count_failure(self, op: LoadOp) -> None:
        if len(self._failures) >= KEPT_FAILURES:  # of nodes long gone, too
            self._failures.clear()
        for part in op.parts:
            self._failures[part.node] = self._failures.get(part.node, 0) + 1
        if any(self._is_bad(part.node) for part in op.parts):
            self.context.counts["broken_loads"] += 1
            self._bad += [part.node for part in op.parts if self._is_bad(part.node)]

    @property
    def troubled(self) -> bool:
        """Whether there is something for ``give_up``."""
        return bool(self.broken or self._bad)

    def give_up(self) -> None:
        """Undo broken loads that nobody uses any more, and drop what cannot be loaded from the host.

        Whoever has locked such nodes waited for them, and was told; who comes later is told, too, until they are gone.
        All of it follows from the tree, so ranks do the same.
        """
        for broken in list(self.broken):
            self._clear_below(broken.op)
            if not self._undo(broken.op):
                broken.op.to(Stage.FAILED)
                self.broken.remove(broken)
                if all(other.batch != broken.batch for other in self.broken):
                    self.layers.settle(broken.batch, broken.error)
        self._bad = [node for node in self._bad if not self._drop(node)]

    def _clear_below(self, op: LoadOp) -> None:
        """Evict what has been computed below a broken load; where somebody holds it, nothing happens."""
        tree, nodes, node, left = self.context.tree, set(), op.parts[-1].node, op.num_pages
        if tree.node_info(node).lock_ref:  # it cannot be undone yet, and this is a walk over the whole tree
            return
        while left > 0:
            info = tree.node_info(node)
            nodes.add(node)
            node, left = info.parent, left - len(info.tokens) // self.context.page_size
        for info in tree.dump():
            if info.parent in nodes and info.node not in nodes and info.page_ids is not None:
                self._delete(info.node)

    def _drop(self, node: int) -> bool:
        """Take a node that cannot be loaded off the host, with what is below. Returns: False if it is in use."""
        try:
            if self.context.tree.node_info(node).page_ids is not None:  # loading still, or computed again
                return False
        except HandleError:
            self._failures.pop(node, None)
            return True
        return self._delete(node)

    def _delete(self, node: int) -> bool:
        """Returns: False if somebody uses it, or what is below."""
        try:
            result = self.context.tree.delete(node)
        except LockError:
            return False
        self.context.evicted_from_device(result.page_ids, result.host_page_ids)
        self._failures.pop(node, None)
        return True

    def _measure(self, batch: LoadBatch) -> None:
        if batch.ticket.seconds:
            ns = batch.ticket.seconds * 1e9 / (batch.num_pages * self.context.page_size)
            self.measured_ns_per_token += int(SMOOTHING * (ns - self.measured_ns_per_token))
            if self.context.group.size == 1:
                self.ns_per_token = self.measured_ns_per_token
