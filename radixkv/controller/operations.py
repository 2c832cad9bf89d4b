"""L3: the operations of a controller as state machines: one record a kind, and the moves that are legal. No threads, no
clock, no tree: who owns which pages, and at which stage.

    write     COPYING -> DONE | FAILED                        device -> host; the node is locked
    load      QUEUED -> COPYING -> DONE | FAILED              host -> device; the nodes are loading
                 |         ^ |
                 |         +-+  failed, and in use: copied again, some times; then BROKEN -> FAILED once nobody uses it
                 +-> CANCELLED
    store     STORING -> DONE | PARTIAL | FAILED | REVOKED    host -> storage; the node's host pages are protected
    prefetch  LOOKING_UP -> REVOKED | FETCHING                storage -> host; the last host node is protected. With
                                                              pages taken ahead the worker goes on by itself; the stage
                                                              says what is agreed
              FETCHING -> FETCHED -> DONE                     FETCHED: agreed that no more comes
              each -> DONE (ended by its policy), FAILED
    any       -> CANCELLED: given up. What a worker may still touch becomes a Drain, which owns it until the worker has
              ended on every rank: DRAINING -> DONE

``status`` is what a rank says of an operation; the least over the ranks counts: 0 it runs, 1 it runs but is overdue, 2
failed, 3 succeeded; of storage, see ``pages_status``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import StateError
from ..key import NamespacePart
from ..types import PageIds
from .base import Digests, Kind, StorageJob, Ticket

__all__ = ["FAILED", "OVERDUE", "RUNNING", "SUCCEEDED", "DrainOp", "LoadBatch", "LoadOp", "LoadPart", "Operation"]
__all__ += ["PrefetchOp", "Stage", "StoreOp", "WriteOp", "copy_status", "pages_status", "progress_value"]
__all__ += ["read_pages_status"]

RUNNING, OVERDUE, FAILED, SUCCEEDED = range(4)


class Stage(Enum):
    """Where an operation is; see the drawing at the top."""

    QUEUED = auto()
    COPYING = auto()
    BROKEN = auto()
    STORING = auto()
    LOOKING_UP = auto()
    FETCHING = auto()
    FETCHED = auto()
    DRAINING = auto()
    DONE = auto()
    PARTIAL = auto()
    FAILED = auto()
    REVOKED = auto()
    CANCELLED = auto()


_FINAL = frozenset({Stage.DONE, Stage.PARTIAL, Stage.FAILED, Stage.REVOKED, Stage.CANCELLED})


class Operation:
    """One operation. Its stage changes by ``to`` only, which refuses what the drawing does not have.

    Args: op_id: the same on all ranks. started_s: of the controller's clock.
    """

    __slots__ = ("op_id", "stage", "started_s")
    FIRST: ClassVar[Stage]
    MOVES: ClassVar[dict[Stage, frozenset[Stage]]]

    def __init__(self, op_id: int, started_s: float) -> None:
        self.op_id, self.started_s, self.stage = op_id, started_s, self.FIRST

    def to(self, stage: Stage) -> None:
        """Raises: StateError for an illegal move."""
        if stage not in self.MOVES.get(self.stage, ()):
            raise StateError(f"{type(self).__name__} {self.op_id} cannot go from {self.stage.name} to {stage.name}")
        self.stage = stage

    @property
    def ended(self) -> bool:
        """Whether its stage is final."""
        return self.stage in _FINAL


def _moves(**moves: str) -> dict[Stage, frozenset[Stage]]:
    return {Stage[source]: frozenset(Stage[name] for name in to.split()) for source, to in moves.items()}


# ---- device <-> host -------------------------------------------------------------------------------------------------
class WriteOp(Operation):
    """A node is copied to the host. Owns ``host_pages``; ``device_pages`` are the tree's, locked.

    Its time runs from the first poll that sees it, which begins the copies that wait: an engine that polls only when a
    request comes may have left it waiting for as long as nobody came.
    """

    __slots__ = ("deadline_s", "device_pages", "host_pages", "node", "ticket", "timeout_s")
    FIRST = Stage.COPYING
    MOVES = _moves(COPYING="DONE FAILED CANCELLED")

    def __init__(
        self, op_id: int, started_s: float, timeout_s: float, node: int, device_pages: PageIds, host_pages: PageIds,
        ticket: Ticket,
    ) -> None:  # fmt: skip
        self.op_id, self.started_s, self.stage = op_id, started_s, Stage.COPYING
        self.timeout_s = timeout_s
        self.deadline_s: float | None = None
        self.node, self.device_pages, self.host_pages, self.ticket = node, device_pages, host_pages, ticket

    def status(self, now_s: float) -> int:
        """As copy_status; when the time is up it is cancelled, or overdue if it cannot be."""
        status = copy_status(self.ticket)
        if status != RUNNING:
            return status
        if self.deadline_s is None:
            self.deadline_s = now_s + self.timeout_s
        elif now_s >= self.deadline_s:
            return FAILED if self.ticket.cancel() else OVERDUE
        return RUNNING


class LoadPart(NamedTuple):
    """One node of a load. The tree owns both tiers' pages; the node is loading and its host copy protected."""

    node: int
    device_pages: PageIds
    host_pages: PageIds


class LoadOp(Operation):
    """The host-only tail of one path comes back; ``parts`` root side first."""

    __slots__ = ("parts",)
    FIRST = Stage.QUEUED
    MOVES = _moves(
        QUEUED="COPYING CANCELLED", COPYING="COPYING BROKEN DONE FAILED CANCELLED", BROKEN="FAILED CANCELLED"
    )

    def __init__(self, op_id: int, started_s: float, parts: list[LoadPart]) -> None:
        super().__init__(op_id, started_s)
        self.parts = parts

    @property
    def num_pages(self) -> int:
        """Of all parts that are left."""
        return sum(len(part.device_pages) for part in self.parts)


@dataclass(slots=True, eq=False)
class LoadBatch:
    """Loads that are copied together. ``index``: of the layer counter."""

    index: int
    loads: list[LoadOp]
    ticket: Ticket
    num_pages: int

    def status(self, now_s: float) -> int:
        return copy_status(self.ticket)


def copy_status(ticket: Ticket) -> int:
    """RUNNING, FAILED or SUCCEEDED."""
    if not ticket.done():
        return RUNNING
    return SUCCEEDED if ticket.error is None else FAILED


# ---- storage ---------------------------------------------------------------------------------------------------------
class StoreOp(Operation):
    """A node's host pages are written to storage. They are the tree's, protected."""

    __slots__ = ("host_pages", "job", "node")
    FIRST = Stage.STORING
    MOVES = _moves(STORING="DONE PARTIAL FAILED REVOKED CANCELLED")

    def __init__(self, op_id: int, started_s: float, node: int, host_pages: PageIds, job: StorageJob) -> None:
        super().__init__(op_id, started_s)
        self.node, self.host_pages, self.job = node, host_pages, job

    @property
    def num_pages(self) -> int:
        """Of the node when it began."""
        return len(self.host_pages)

    def status(self, now_s: float) -> int:
        return pages_status(self.job)


class PrefetchOp(Operation):
    """Pages of a request are looked for in storage, and brought to the host. Owns ``host_pages``."""

    __slots__ = (
        "cache_salt", "counted_tokens", "digests", "extra_key", "failed", "host_pages", "job", "keeps_host", "late_s",
        "node", "num_pages", "reach", "req_id", "salt", "stopped", "tokens",
    )  # fmt: skip
    FIRST = Stage.LOOKING_UP
    MOVES = _moves(
        LOOKING_UP="REVOKED FETCHING DONE FAILED CANCELLED",
        FETCHING="FETCHED DONE FAILED CANCELLED",
        FETCHED="DONE FAILED CANCELLED",
    )

    def __init__(
        self, op_id: int, started_s: float, req_id: str, node: int, keeps_host: bool, tokens: npt.NDArray[np.int32],
        digests: Digests, salt: bytes, extra_key: NamespacePart, cache_salt: NamespacePart, job: StorageJob,
        host_pages: PageIds,
    ) -> None:  # fmt: skip
        super().__init__(op_id, started_s)
        self.req_id, self.node, self.keeps_host, self.tokens, self.digests = req_id, node, keeps_host, tokens, digests
        self.salt, self.extra_key, self.cache_salt, self.job = salt, extra_key, cache_salt, job
        self.host_pages = host_pages
        self.reach = len(host_pages)
        """Leading pages that a worker of any rank may write."""
        self.counted_tokens = len(tokens)
        """Of what prefetches may take together: what is asked for, then what is known to exist, then what is here."""
        self.late_s: float | None = None
        """When its fetch began, if that had to wait for room."""
        self.num_pages = 0
        """Pages that are known to exist (FETCHING), that have arrived on all ranks (FETCHED)."""
        self.stopped = False
        """Nobody wants more than has come: what is missing is no failure."""
        self.failed = False
        """Storage failed, or brought less than it had said, on some rank."""

    @property
    def is_ahead(self) -> bool:
        """Whether it has its pages, and what storage has is not agreed yet."""
        return self.stage is Stage.LOOKING_UP and len(self.host_pages) > 0

    def status(self, now_s: float) -> int:
        """As pages_status: of the look-up, then of the fetch."""
        if not self.is_ahead:
            return pages_status(self.job)
        ended, found = self.job.done(), self.job.found  # in this order: it is final then
        if found is None:
            return FAILED_LOOK_UP + (self.job.error is None) if ended else RUNNING  # without: it was cancelled
        return FAILED_LOOK_UP + 2 * found + (found > 0 or self.job.error is None)


FAILED_LOOK_UP = 1
"""The pages_status of no page, and an error."""


def pages_status(job: StorageJob) -> int:
    """RUNNING, or 1 + 2 * pages + (1 without an error)."""
    return 1 + progress_value(job) if job.done() else RUNNING


def progress_value(job: StorageJob) -> int:
    """2 * pages + (1 without an error)."""
    return 2 * job.pages + (job.error is None)


def read_pages_status(status: int) -> tuple[int, bool]:
    """The pages, and whether there was no error, of a status that is not RUNNING."""
    return (status - 1) // 2, bool((status - 1) % 2)


# ---- given up --------------------------------------------------------------------------------------------------------
class DrainOp(Operation):
    """What is left of an operation that was given up: its pages, until nobody touches them any more.

    Args:
        kind: what it was.
        work: the copy or job that may still run.
        device_pages, host_pages: what it may touch; freed at its end if node is ROOT.
        node: else the host pages are the tree's, and this node's host copy is released at its end.
    """

    __slots__ = ("device_pages", "host_pages", "kind", "node", "work")
    FIRST = Stage.DRAINING
    MOVES = _moves(DRAINING="DONE")

    def __init__(
        self, op_id: int, started_s: float, kind: Kind, work: Ticket | StorageJob, device_pages: PageIds,
        host_pages: PageIds, node: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(op_id, started_s)
        self.kind, self.work, self.device_pages, self.host_pages, self.node = kind, work, device_pages, host_pages, node

    def status(self, now_s: float) -> int:
        return SUCCEEDED if self.work.done() else RUNNING
