"""L3: host to storage, one operation a node."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from ..errors import HandleError
from ..types import ROOT
from .backoff import BackOff
from .base import Outcome, StorageEdge, StorageJob
from .config import STORED, STORING
from .context import Context
from .drains import Drains
from .hashes import PathHashes
from .operations import Stage, StoreOp, read_pages_status
from .workers import EndedJob

__all__ = ["Stores"]

KEPT_SURE = 1 << 16
"""Nodes known to be in storage since it lost something; beyond, they are looked for again."""
KEPT_WAITING = 1 << 12
"""Nodes that wait for another one to be stored first; beyond, the oldest wait for their next hit."""


_STAGES: dict[Outcome, Stage] = {
    "done": Stage.DONE, "partial": Stage.PARTIAL, "failed": Stage.FAILED, "revoked": Stage.REVOKED,
}  # fmt: skip
_COUNTS: dict[Outcome, str] = {
    "done": "stores", "partial": "partial_stores", "failed": "store_failures", "revoked": "store_gaps",
}  # fmt: skip


class Stores:
    """Storage backups in flight, in the order in which they began. Args: for_all: rank 0 stores for all ranks.

    A node marked STORED is not stored again, but storage may lose pages: its budget is full, another process clears it.
    What it has lost it cannot say for free, only how much (``Storage.lost``). So when that number changes all marks are
    doubted: the next time that a marked node is due it is looked for and what is missing stored again, once until the
    next doubt. That costs nothing as long as nothing is lost, and one look-up a hit node every recheck_stored_s else.
    Looking counts as use in storage: what is hit on the device is not what storage should make room of.

    Pages are of no use in storage without those before them. So a node waits until the one above is stored, or being
    stored; and if storage turns out not to have that any more, its mark is cleared, all marks are doubted, and the node
    waits for it.
    """

    def __init__(self, context: Context, drains: Drains, hashes: PathHashes, for_all: bool) -> None:
        self.context, self.drains, self.hashes, self.for_all = context, drains, hashes, for_all
        self.edge: StorageEdge | None = None
        self.operations: list[StoreOp] = []
        self.backoff = BackOff(context.config, context.clock)
        self.back_up: Callable[[int], int] = lambda node: 0
        """Begins to copy a node to the host, if it may."""
        self._waiting: dict[int, dict[int, None]] = {}  # nodes, by the one that is to be stored first
        self._has_gap = False
        self._sure: set[int] | None = None
        """Nodes whose mark is no older than the last doubt; None: there was none, so all."""
        self._seen_lost, self._no_doubt_until_s = 0, 0.0

    def use(self, edge: StorageEdge | None) -> None:
        """Store there from now on, if anywhere."""
        self.edge, self._sure, self._no_doubt_until_s = edge, None, 0.0
        self._has_gap = False
        self._waiting.clear()
        self._seen_lost = 0 if edge is None else edge.lost()
        self.backoff.reset()

    # ---- marks that may be wrong -------------------------------------------------------------------------------------
    def has_lost(self) -> bool:
        """Whether storage has lost values since the last doubt, as far as this rank sees, and it is time to act."""
        if self.edge is None or not (self._has_gap or self.edge.lost() != self._seen_lost):
            return False
        return self.context.clock() >= self._no_doubt_until_s

    def doubt(self) -> None:
        """Trust no mark any more, on all ranks."""
        if self.edge is not None:
            self._sure, self._seen_lost, self._has_gap = set(), self.edge.lost(), False
            self._no_doubt_until_s = self.context.clock() + self.context.config.recheck_stored_s
            self.context.counts["stored_doubts"] += 1

    def _now_sure(self, node: int, num_pages: int) -> None:
        """The last pages of a node's path, whole nodes, have just been stored or found."""
        if self._sure is None:
            return
        if len(self._sure) >= KEPT_SURE:  # of nodes long gone, too
            self._sure.clear()
        while num_pages > 0:
            self._sure.add(node)
            info = self.context.tree.node_info(node)
            num_pages -= len(info.tokens) // self.context.page_size
            node = info.parent

    def due(self, node: int, hits: int) -> list[int]:
        """Nodes of a path to be stored: hit so often, on the host, not in flight, and not known to be in storage."""
        tree = self.context.tree
        if self._sure is None:
            return list(tree.due(node, "storage", hits, STORED | STORING))
        return [part for part in tree.due(node, "storage", hits, STORING) if part not in self._sure]

    # ---- operations --------------------------------------------------------------------------------------------------
    def begin(self, node: int) -> int | None:
        """See Controller.store."""
        context, tree, edge = self.context, self.context.tree, self.edge
        if edge is None or node == ROOT:
            return None
        info = tree.node_info(node)
        again = bool(info.marks & STORED)
        sure = self._sure is None or node in self._sure
        if info.host_page_ids is None or info.marks & STORING or (again and sure):
            return None
        if not self._may_follow(node, info.parent):
            return None
        if len(self.operations) >= context.config.max_stores or self.backoff.active:
            context.counts["refused_stores"] += 1
            return None
        pages = info.host_page_ids
        job: StorageJob
        if self.for_all and context.group.rank:
            job = EndedJob(len(pages))  # rank 0 stores for all
        else:
            job = context.begin_job(
                lambda: edge.store(self.hashes.own(node), pages, info.namespace, again, self.hashes.before(node))
            )
        tree.protect_host(node)
        tree.mark(node, set=STORING, clear=STORED)
        op = StoreOp(context.next_op_id(), context.clock(), node, pages, job)
        self.operations.append(op)
        return op.op_id

    def _may_follow(self, node: int, parent: int) -> bool:
        """Whether what comes before a node is in storage, as far as its mark says, or on its way. If not, it waits."""
        if parent == ROOT:
            return True
        above = self.context.tree.node_info(parent)
        if above.marks & (STORED | STORING):
            return True
        self._wait(node, parent)
        if above.host_page_ids is None:  # under write_back it may stay on the device for as long as it is in use
            self.back_up(parent)
        return False

    def _wait(self, node: int, parent: int) -> None:
        while len(self._waiting) >= KEPT_WAITING:
            del self._waiting[next(iter(self._waiting))]
        nodes = self._waiting.setdefault(parent, {})
        if len(nodes) < KEPT_WAITING:
            nodes[node] = None

    def settle(self, op: StoreOp, status: int) -> Outcome:
        """The workers of all ranks have ended. Returns: how."""
        context, counts = self.context, self.context.counts
        stored, success = read_pages_status(status)
        self.operations.remove(op)
        self.context.tree.release_host(op.node)
        self._mark(op.node, op.num_pages, stored)
        outcome: Outcome = "done" if stored == op.num_pages else "partial" if stored else "failed"
        if success and not stored:
            outcome = "revoked"
            self._meet_gap(op.node, op.num_pages)
        else:
            self.backoff.result(outcome == "done")
        op.to(_STAGES[outcome])
        counts[_COUNTS[outcome]] += 1
        counts["store_tokens"] += stored * context.page_size
        context.finished("store", outcome, stored, op.job.seconds, op.started_s)
        if outcome == "done":
            for node in self._waiting.pop(op.node, ()):
                with contextlib.suppress(HandleError):  # evicted meanwhile
                    self.begin(node)
        return outcome

    def _meet_gap(self, node: int, num_pages: int) -> None:
        """Storage, of some rank, does not have the page before these: the node above is to be stored first."""
        tree, page_size = self.context.tree, self.context.page_size
        self._has_gap = True
        while True:
            info = tree.node_info(node)
            num_pages -= len(info.tokens) // page_size
            if info.parent == ROOT:
                return
            self._wait(node, info.parent)
            if num_pages <= 0:
                break
            node = info.parent
        tree.mark(info.parent, clear=STORED)
        if self._sure is not None:
            self._sure.discard(info.parent)

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
        self._now_sure(top, stored)

    def give_up(self) -> None:
        """Cancel all; what a worker still reads stays protected until it has ended."""
        for op in self.operations:
            op.job.cancel()
            op.to(Stage.CANCELLED)
            self.context.tree.mark(op.node, clear=STORING, num_pages=op.num_pages)
            self.context.finished("store", "cancelled", 0, op.job.seconds, op.started_s)
            self.drains.add("store", op.job, host_pages=op.host_pages, node=op.node)
        self.operations.clear()
        self._waiting.clear()

    def forget(self) -> None:
        """The tree is dropped."""
        self.operations.clear()
        self._waiting.clear()
        if self._sure is not None:
            self._sure.clear()

    def forget_stored(self) -> None:
        """Storage has gone: nothing of the tree is in it."""
        tree = self.context.tree
        for node in tree:
            tree.mark(node, clear=STORED)
