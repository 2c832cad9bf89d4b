"""L3: poll and reset: what has ended on all ranks is settled, in the order in which it began."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..errors import GroupError
from ..types import ROOT, PageIds
from .base import Kind, Polled, StorageJob, Ticket
from .context import Context, Where
from .drains import AllOf, Drains
from .ledger import NO_PAGES
from .loads import Loads
from .operations import RUNNING, SUCCEEDED, DrainOp, LoadBatch, Operation, PrefetchOp, Stage, StoreOp, WriteOp
from .prefetches import Prefetches
from .stores import Stores
from .writes import Writes

__all__ = ["Settler"]

STORAGE_MOMENT_S = 0.01
"""How long reset waits for storage calls: what is stuck in one keeps its host pages until it returns."""


class Settler:
    """Knows all operations in flight."""

    def __init__(
        self,
        context: Context,
        writes: Writes,
        loads: Loads,
        stores: Stores,
        prefetches: Prefetches,
        drains: Drains,
    ) -> None:
        self.context, self.writes, self.loads, self.stores = context, writes, loads, stores
        self.prefetches, self.drains = prefetches, drains

    # ---- poll --------------------------------------------------------------------------------------------------------
    def poll(self) -> Polled:
        """See Controller.poll.

        1. Each rank says of each operation in flight whether it has ended, and how. The ranks have the same operations
           in the same order, so the vector has the same length.
        2. The minimum: ended where it has ended everywhere, as badly as anywhere.  3. Settle in order.
        4. The backups of this step begin, together.
        """
        try:
            self.prefetches.is_settling = True  # what is agreed of them must still be so when its turn comes
            return self._poll()
        finally:
            self.prefetches.is_settling = False
            self.context.flush_backups()

    def _poll(self) -> Polled:
        context = self.context
        context.counts["polls"] += 1
        in_flight = self._in_flight()
        backoffs = (self.stores.backoff, self.prefetches.backoff)
        prefetches = list(self.prefetches.operations.values())
        lost = self.stores.has_lost()
        idle = not (in_flight or prefetches or lost or self.loads.troubled)
        if context.group.size == 1 and idle and not any(backoff.active for backoff in backoffs):
            return Polled()
        now_s = context.clock()
        values = [int(backoff.may_end()) for backoff in backoffs]
        values += [-self.loads.measured_ns_per_token, -int(lost), self.prefetches.num_overdue(now_s)]
        values += [operation.status(now_s) for operation in in_flight]
        ahead = [op for op in prefetches if op.is_ahead]
        values += [-op.job.reach for op in ahead]  # after their status: it is final then
        agreed = context.agree(Where.POLL, values)
        for op, reach in zip(ahead, agreed[len(values) - len(ahead) :], strict=True):
            op.reach = -reach
        for backoff, may_end in zip(backoffs, agreed, strict=False):
            if may_end:
                backoff.end()
        self.loads.ns_per_token = -agreed[2]
        counted: dict[str, int] = {}
        for operation, status in zip(in_flight, agreed[5:], strict=False):
            if status != RUNNING:
                for name, number in self._settle(operation, status):
                    counted[name] = counted.get(name, 0) + number
        self.prefetches.abandon(prefetches[: agreed[4]])
        if agreed[3]:  # on some rank
            self.stores.doubt()
        self.loads.give_up()
        return Polled(**counted)

    def _in_flight(self) -> list[WriteOp | LoadBatch | StoreOp | PrefetchOp | DrainOp]:
        return [
            *self.writes.operations, *self.loads.batches, *self.stores.operations, *self.prefetches.running,
            *self.drains.operations,
        ]  # fmt: skip

    def _settle(self, op: WriteOp | LoadBatch | StoreOp | PrefetchOp | DrainOp, status: int) -> list[tuple[str, int]]:
        """Settle one operation. Returns: what to count, by the names of Polled."""
        if isinstance(op, WriteOp):
            arrived = self.writes.settle(op, status)
            return [("writes", 1), ("failed", int(not arrived))]
        if isinstance(op, LoadBatch):
            settled = self.loads.settle(op, status)
            return [("loads", settled), ("failed", len(op.loads) if status != SUCCEEDED else 0)]
        if isinstance(op, StoreOp):
            outcome = self.stores.settle(op, status)
            return [("stores", 1), ("failed", int(outcome in ("partial", "failed"))),
                    ("revoked", int(outcome == "revoked"))]  # fmt: skip
        if isinstance(op, PrefetchOp):
            fetching = op.stage is Stage.FETCHING
            self.prefetches.settle(op, status)
            return [("prefetches", int(fetching)), ("revoked", int(op.stage is Stage.REVOKED)),
                    ("failed", int(op.stage is Stage.FAILED))]  # fmt: skip
        self.drains.settle(op)
        return []

    def settle_drains(self) -> None:
        """Free what nobody touches any more, without waiting for a poll: only if there is nobody to agree with."""
        if self.context.group.size == 1:
            for op in list(self.drains.operations):
                if op.work.done():
                    self.drains.settle(op)

    # ---- reset -------------------------------------------------------------------------------------------------------
    def reset(self) -> None:
        """See Controller.reset.

        1. Cancel everything.  2. Wait for copies that run; agree on what has ended.
        3. Drop the tree. Its pages are free, but those that something still reads or writes: these drain.
        """
        context = self.context
        remains, broken = self._cancel_all(), None
        self._wait(remains)
        ended = [rest.work is None or rest.work.done() for rest in remains]
        try:
            ended = [bool(value) for value in context.agree(Where.RESET, [int(over) for over in ended])]
        except GroupError as error:  # there is nobody left to be like: everything here is dropped all the same
            broken = error
        self.loads.layers.reset()
        dropped = context.tree.reset()
        context.ledger.forget_pairs()
        free_device, free_host = [dropped.page_ids], [dropped.host_page_ids]
        kept_device, kept_host = [NO_PAGES], [NO_PAGES]
        reading: list[_Remains] = []
        for rest, over in zip(remains, ended, strict=True):
            if not over:
                assert rest.work is not None
                kept_device.append(rest.device_pages)
                kept_host.append(rest.host_pages)
                if rest.kind == "store":
                    reading.append(rest)
                else:
                    self.drains.add(rest.kind, rest.work, rest.device_pages, rest.host_pages)
            elif rest.owned:
                free_device.append(rest.device_pages)
                free_host.append(rest.host_pages)
        context.ledger.device.free(_without(free_device, kept_device))
        if context.ledger.has_host:
            context.ledger.free_host(_without(free_host, kept_host))
        if reading:  # two storages may read the same pages, one of them detached
            pages = np.unique(np.concatenate([rest.host_pages for rest in reading]))
            self.drains.add("store", AllOf([rest.work for rest in reading if rest.work]), host_pages=pages)
        if broken is not None:
            raise broken

    def _cancel_all(self) -> list[_Remains]:
        """End every operation, as far as the tree goes. Returns: what a worker may still touch."""
        context, remains = self.context, []
        for write in self.writes.operations:
            write.ticket.cancel()
            remains.append(_Remains("backup", write.ticket, NO_PAGES, write.host_pages, True))
        for batch in self.loads.batches:
            batch.ticket.cancel()
            pages = context.join([part.device_pages for op in batch.loads for part in op.parts])
            remains.append(_Remains("load", batch.ticket, pages, NO_PAGES, False))
        for store in self.stores.operations:
            store.job.cancel()
            remains.append(_Remains("store", store.job, NO_PAGES, store.host_pages, False))
        for fetch in self.prefetches.operations.values():
            fetch.job.cancel()
            work = fetch.job if fetch.stage is Stage.FETCHING or fetch.is_ahead else None
            remains.append(_Remains("prefetch", work, NO_PAGES, fetch.host_pages, True))
        for drain in self.drains.operations:
            drain.to(Stage.DONE)
            remains.append(
                _Remains(drain.kind, drain.work, drain.device_pages, drain.host_pages, drain.node == ROOT)
            )
        self._forget_operations()
        return remains

    def _forget_operations(self) -> None:
        loads = [*self.loads.queued, *(op for batch in self.loads.batches for op in batch.loads)]
        loads += [broken.op for broken in self.loads.broken]
        kinds: list[tuple[Kind, Sequence[Operation]]] = [
            ("backup", self.writes.operations), ("load", loads), ("store", self.stores.operations),
            ("prefetch", list(self.prefetches.operations.values())),
        ]  # fmt: skip
        for kind, operations in kinds:
            for op in operations:
                op.to(Stage.CANCELLED)
                self.context.finished(kind, "cancelled", 0, 0.0, op.started_s)
        self.context.counts["prefetch_cancelled"] += len(self.prefetches.operations)
        self.writes.operations.clear()
        self.loads.forget()
        self.stores.forget()
        self.drains.operations.clear()
        self.prefetches.forget()

    def _wait(self, remains: list[_Remains]) -> None:
        """Give what runs the time to end: copies settle_timeout_s, storage calls a moment."""
        now_s = time.monotonic()
        for rest in remains:
            copy = rest.kind in ("backup", "write_back", "load")
            limit_s = self.context.config.settle_timeout_s if copy else STORAGE_MOMENT_S
            if rest.work is not None:
                rest.work.wait(max(0.0, now_s + limit_s - time.monotonic()))


class _Remains(NamedTuple):
    """What is left of a cancelled operation. owned: its pages are not in the tree."""

    kind: Kind
    work: Ticket | StorageJob | None
    device_pages: PageIds
    host_pages: PageIds
    owned: bool


def _without(pages: list[PageIds], kept: list[PageIds]) -> PageIds:
    """All pages but those that are kept."""
    every, some = np.concatenate(pages), np.concatenate(kept)
    return every[~np.isin(every, some)] if len(some) else every
