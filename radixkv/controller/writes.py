"""L3: device to host: write-through, one operation a node, and write-back, within an eviction."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..errors import GroupError
from ..tree.base import EvictResult
from ..types import ROOT, BackupRequest, PageIds
from .base import Outcome, Ticket
from .config import WRITING
from .context import Context, Where
from .drains import Drains
from .operations import FAILED, OVERDUE, RUNNING, SUCCEEDED, Stage, WriteOp, copy_status

__all__ = ["Writes"]


class Writes:
    """Backups in flight, in the order in which they began."""

    def __init__(self, context: Context, drains: Drains) -> None:
        self.context, self.drains = context, drains
        self.operations: list[WriteOp] = []
        self.backed_up: Callable[[int], None] = lambda node: None
        """Is told of each node that has got its host copy; an eviction tells at its end."""
        self._written_back: list[int] = []
        self._waited_for = 0  # the last operation that an eviction has waited for
        self._freed: list[PageIds] = []
        """Device pages that an eviction has freed so far."""

    # ---- write-through -----------------------------------------------------------------------------------------------
    def begin(self, node: int) -> int:
        """See Controller.backup."""
        if node == ROOT or not self.context.ledger.has_host:
            return 0
        pages = self.context.tree.begin_write(node, WRITING)
        return 0 if pages is None else self._begin(node, pages)

    def begin_due(self, node: int, min_hits: int) -> None:
        """Begin what a path is due for."""
        due = iter(self.context.tree.begin_writes(node, min_hits, WRITING))
        try:
            for part, pages in due:
                self._begin(part, pages)
        finally:  # if one raises, none stays locked
            for part, _ in due:
                self._refuse(part)

    def _begin(self, node: int, pages: PageIds) -> int:
        """Begin the copy of a node that the tree has locked and marked for it, or undo that. Returns: tokens."""
        context, config = self.context, self.context.config
        num_pages = len(pages)
        host_pages = None
        try:
            if len(self.operations) < config.max_writes:
                host_pages = context.reserve_host(num_pages, True)
        finally:
            if host_pages is None:
                self._refuse(node)
        if host_pages is None:
            return 0
        ticket = context.begin_backup(pages, host_pages)
        timeout_s, op_id = config.write_timeout_s, context.next_op_id()
        self.operations.append(WriteOp(op_id, context.clock(), timeout_s, node, pages, host_pages, ticket))
        return num_pages * context.page_size

    def _refuse(self, node: int) -> None:
        self.context.tree.mark(node, clear=WRITING)
        self.context.tree.unlock(node)
        self.context.counts["refused_backups"] += 1

    def settle(self, op: WriteOp, status: int) -> bool:
        """The copy has ended on all ranks, or is overdue. Returns: whether the node has its host copy now."""
        context, tree = self.context, self.context.tree
        num_pages = len(op.host_pages)
        tree.mark(op.node, clear=WRITING, num_pages=num_pages)
        if status == SUCCEEDED:
            op.to(Stage.DONE)
            tree.set_host(op.node, op.host_pages)
            context.ledger.end_write(op.device_pages, op.host_pages)
            context.counts["backups"] += 1
            context.counts["backup_tokens"] += num_pages * context.page_size
            context.finished("backup", "done", num_pages, op.ticket.seconds, op.started_s)
        else:
            op.to(Stage.FAILED)
            context.counts["backup_failures"] += 1
            if status == OVERDUE:  # on some rank it still writes these
                self.drains.add("backup", op.ticket, host_pages=op.host_pages)
            else:
                context.ledger.free_host(op.host_pages)
            context.finished("backup", "failed", 0, op.ticket.seconds, op.started_s)
        self.operations.remove(op)
        tree.unlock(op.node)  # LockError: somebody has undone this lock besides his own; the rest is as it should be
        if status == SUCCEEDED:
            self.backed_up(op.node)
        return status == SUCCEEDED

    def settle_ended(self) -> None:
        """For an eviction that falls short, as these lock their nodes: wait for those in flight, copy_timeout_s in all
        and for each once, and settle them. A scheduler whose batch is full evicts, but does not poll. Collective.

        Raises: GroupError.
        """
        context, end_s = self.context, time.monotonic() + self.context.copy_wait_s
        operations = list(self.operations)
        for op in operations:
            if op.op_id > self._waited_for:
                op.ticket.wait(max(0.0, end_s - time.monotonic()))
        self._waited_for = operations[-1].op_id
        now_s = context.clock()
        agreed = context.agree(Where.EVICT, [op.status(now_s) for op in operations])
        for op, status in zip(operations, agreed, strict=True):
            if status != RUNNING:
                self.settle(op, status)

    # ---- write-back --------------------------------------------------------------------------------------------------
    def evict(self, num_tokens: int) -> int:
        """Evict with write-back, in rounds: a node can leave only after its children have.

        1. The tree frees what has a host copy, and names what needs one, children first.
        2. Host room for each, one eviction of the host for all.  3. One copy; wait; agree.
        4. Each node gets its host copy, or is dropped.  5. Only now may copies go on to storage: what storage reads
        cannot be dropped, nor can what is above it.
        """
        try:
            return self._evict_in_rounds(num_tokens)
        finally:
            freed, self._freed = self._freed, []
            self.context.free_device(freed)
            nodes, self._written_back = self._written_back, []
            for node in nodes:
                self.backed_up(node)

    def _evict_in_rounds(self, num_tokens: int) -> int:
        context, freed = self.context, 0
        while freed < num_tokens:
            result = context.tree.evict(num_tokens - freed, backup=True)
            freed += self._left_device(result)
            if not result.to_backup:
                break
            moved = self._write_back(result.to_backup)
            freed += moved
            if not moved:
                break
        return freed

    def _write_back(self, requests: list[BackupRequest]) -> int:
        """Settle a list of nodes that the tree wants to have copied. Returns: device tokens freed."""
        context = self.context
        started_s = context.clock()
        rooms = self._find_room(requests)
        chosen = [(request.page_ids, room) for request, room in zip(requests, rooms, strict=True) if room is not None]
        if not chosen:
            return sum(self._finish(request, None) for request in requests)
        device_pages, host_pages = (context.join(pages) for pages in zip(*chosen, strict=True))
        ticket = context.begin_backup(device_pages, host_pages)
        if not ticket.wait(context.copy_wait_s):
            ticket.cancel()
        status, broken = RUNNING, None
        try:
            status = context.agree(Where.WRITE_BACK, [copy_status(ticket)])[0]
        except GroupError as error:
            broken = error
        arrived = status == SUCCEEDED
        freed = sum(
            self._finish(request, room if arrived else None) for request, room in zip(requests, rooms, strict=True)
        )
        if status == RUNNING:  # on some rank it still writes these; that it reads device pages does no harm
            self.drains.add("write_back", ticket, host_pages=host_pages)
        elif status == FAILED:
            context.ledger.free_host(host_pages)
        self._count_write_back(ticket, len(host_pages), arrived, started_s)
        if broken is not None:
            raise broken
        return freed

    def _finish(self, request: BackupRequest, host_pages: PageIds | None) -> int:
        """Settle one node, with its host copy or without. Returns: device tokens freed."""
        context = self.context
        result = context.tree.finish_backup(request.node, host_pages)
        if host_pages is not None:
            context.ledger.end_write(request.page_ids, host_pages)
            self._written_back.append(request.node)
        elif len(result.page_ids):
            context.counts["dropped_nodes"] += 1
            context.counts["dropped_tokens"] += result.num_tokens
            context.finished("write_back", "dropped", len(result.page_ids), 0.0, context.clock())
        return self._left_device(result)

    def _left_device(self, result: EvictResult) -> int:
        """Pages of a result are no longer in the tree; those of the device are freed at the end. Returns: device
        tokens."""
        self._freed.append(result.page_ids)
        return self.context.left_device(result.page_ids, result.host_page_ids)

    def _count_write_back(self, ticket: Ticket, num_pages: int, arrived: bool, started_s: float) -> None:
        context = self.context
        if arrived:
            context.counts["write_backs"] += 1
            context.counts["write_back_tokens"] += num_pages * context.page_size
        else:
            context.counts["backup_failures"] += 1
        outcome: Outcome = "done" if arrived else "failed"
        context.finished("write_back", outcome, num_pages if arrived else 0, ticket.seconds, started_s)

    def _find_room(self, requests: list[BackupRequest]) -> list[PageIds | None]:
        """Host pages for each request; each evicts once for itself, as a backup does."""
        return [self.context.reserve_host(len(request.page_ids), for_copy=True) for request in requests]
