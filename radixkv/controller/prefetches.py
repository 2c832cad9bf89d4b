"""L3: storage to host, ahead of a request.

    prefetch()          pages that are free are taken ahead, and a worker looks up and reads at once: a scheduler whose
                        batch is full does not poll until the request is due. Nothing is evicted for that: with too
                        little free only the look-up begins
    poll(): looked up   too few on all ranks together: revoked (failed, if storage did not answer on one of them). Pages
                        that no rank needs are free. With none taken ahead they are taken now, by an eviction if need
                        be, and the fetch begins
    poll(): fetched     agreed how many pages have arrived everywhere; they wait for finish_prefetch
    finish_prefetch()   by its policy, or because all is there: what has arrived enters the tree
    poll(): abandoned   nobody has finished or cancelled it for long: the same if all is there, else it is cancelled
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import numpy as np

from ..errors import HandleError, InvalidArgumentError
from ..key import NamespacePart, encode_namespace
from ..tree.tokens import read_tokens
from ..types import ROOT, PageIds
from .backoff import BackOff
from .base import Outcome, PrefetchStatus, StorageEdge
from .config import STORED
from .context import Context, Where
from .drains import Drains
from .hashes import PathHashes
from .ledger import NO_PAGES
from .operations import RUNNING, PrefetchOp, Stage, progress_value, read_pages_status

__all__ = ["Prefetches"]

KEPT_RESULTS = 4096
"""Requests of which it is remembered how much a prefetch brought, until they are accounted for."""

_STATES: dict[Stage, Any] = {
    Stage.LOOKING_UP: "looking_up", Stage.FETCHING: "fetching", Stage.FETCHED: "fetched",
}  # fmt: skip


class Prefetches:
    """Prefetches by request, oldest first."""

    def __init__(self, context: Context, drains: Drains, hashes: PathHashes) -> None:
        self.context, self.drains, self.hashes = context, drains, hashes
        self.edge: StorageEdge | None = None
        self.operations: dict[str, PrefetchOp] = {}
        self.backoff = BackOff(context.config, context.clock)
        self.tokens_in_flight = 0
        self.is_settling = False
        """While poll goes through them."""
        self.brought: dict[str, int] = {}
        """Tokens that finished prefetches have put into the tree, by request."""

    @property
    def running(self) -> list[PrefetchOp]:
        """Those that are not known to have ended everywhere."""
        return [op for op in self.operations.values() if op.stage is not Stage.FETCHED]

    @property
    def capacity_tokens(self) -> int:
        """How much all together may ask for."""
        context, config = self.context, self.context.config
        host = context.ledger.host.size
        beyond = host - context.ledger.device.capacity * context.page_size
        return max(0, int(config.prefetch_capacity_fraction * beyond), int(config.prefetch_capacity_floor * host))

    @property
    def least_pages(self) -> int:
        """Fewer are not worth it."""
        return -(-max(self.context.config.prefetch_threshold, 1) // self.context.page_size)

    # ---- begin -------------------------------------------------------------------------------------------------------
    def begin(
        self, req_id: str, tokens: Any, node: int, extra_key: NamespacePart, cache_salt: NamespacePart
    ) -> bool:  # fmt: skip
        """See Controller.prefetch."""
        context, config, tree = self.context, self.context.config, self.context.tree
        if self.edge is None or req_id in self.operations:
            return False
        page_size = context.page_size
        given = read_tokens(tokens)
        num_pages = len(given) // page_size
        wanted = num_pages * page_size
        if (
            wanted < max(config.prefetch_threshold, 1) or self.backoff.active
            or len(self.running) >= config.max_prefetches
            or self.tokens_in_flight >= self.capacity_tokens
        ):  # fmt: skip
            context.counts["refused_prefetches"] += 1
            return False
        salt = encode_namespace(extra_key, cache_salt)
        keeps_host = False
        if node != ROOT:
            info = tree.node_info(node)
            if info.namespace != salt:
                raise InvalidArgumentError(f"node {node:#x} is of namespace {info.namespace!r}, not {salt!r}")
            keeps_host = info.host_page_ids is not None
        own = given[:wanted]
        digests = self.hashes.following(node, own, salt)
        if keeps_host:
            tree.protect_host(node)
        edge, least = self.edge, self.least_pages
        ahead = context.ledger.reserve(num_pages)  # all ranks or none: their pools are equal
        if ahead is None:
            job = context.begin_job(lambda: edge.look_up(digests, salt))
        else:
            job = context.begin_job(lambda: edge.bring(digests, ahead, salt, least))
        self.operations[req_id] = PrefetchOp(
            context.next_op_id(), context.clock(), req_id, node, keeps_host, own, digests, salt, extra_key, cache_salt,
            job, NO_PAGES if ahead is None else ahead,
        )  # fmt: skip
        self.tokens_in_flight += wanted
        context.counts["prefetches"] += 1
        return True

    # ---- workers have ended ------------------------------------------------------------------------------------------
    def settle(self, op: PrefetchOp, status: int) -> None:
        """The workers of all ranks have ended a look-up, or a fetch."""
        pages, success = read_pages_status(status)
        if op.stage is Stage.LOOKING_UP:
            self._looked_up(op, pages, success)
            return
        op.to(Stage.FETCHED)
        self._count(op, pages)
        self._judge(op, success)
        rest, op.host_pages, op.num_pages = op.host_pages[pages:], op.host_pages[:pages], pages
        self.context.ledger.free_host(rest)

    def _judge(self, op: PrefetchOp, complete: bool) -> None:
        """Storage has brought all that it said it had and has not lost since, or failed."""
        if op.stopped:
            return
        op.failed = not complete
        self.backoff.result(complete)
        self.context.counts["prefetch_failures"] += not complete

    def _count(self, op: PrefetchOp, pages: int) -> None:
        """It takes no more than these of what all may take together."""
        self.tokens_in_flight += pages * self.context.page_size - op.counted_tokens
        op.counted_tokens = pages * self.context.page_size

    def _looked_up(self, op: PrefetchOp, pages: int, success: bool) -> bool:
        """Returns: False if that was the end of it."""
        if not success:
            self._judge(op, False)
        worth = self._trim(op, pages) if op.is_ahead else self._begin_fetch(op, pages)
        if not worth:
            op.to(Stage.REVOKED if success else Stage.FAILED)
            self._remove(op, "revoked" if success else "failed", 0)
            self.context.counts["prefetch_revoked"] += success
        return worth

    def _trim(self, op: PrefetchOp, pages: int) -> bool:
        """Give back what was taken ahead and is not needed, nor written by some rank. Returns: False if it is not worth
        it."""
        self.context.ledger.free_host(op.host_pages[op.reach :])
        op.host_pages = op.host_pages[: op.reach]
        if pages < self.least_pages:
            op.job.cancel()
            if op.reach:  # another rank has found more, and may be reading it
                self.drains.add("prefetch", op.job, host_pages=op.host_pages)
            return False
        op.to(Stage.FETCHING)
        op.num_pages = pages
        self._count(op, op.reach)
        return True

    def _begin_fetch(self, op: PrefetchOp, pages: int) -> bool:
        """Take room for what storage has, or for as much as there is. Returns: False if it is not worth it, or nobody
        wants it any more."""
        context = self.context
        room: PageIds | None = None
        if pages >= self.least_pages and not op.stopped:
            room = context.reserve_host(pages)
            if room is None:
                pages = min(pages, context.ledger.host.available_size() // context.page_size)
                room = context.ledger.reserve(pages) if pages >= self.least_pages else None
        if room is None:
            return False
        op.to(Stage.FETCHING)
        op.host_pages, op.num_pages, op.late_s = room, pages, context.clock()
        self._count(op, pages)
        edge, pages_there = self.edge, room
        assert edge is not None
        op.job = context.begin_job(lambda: edge.fetch(op.digests[:pages], pages_there, op.salt))
        return True

    def give_back(self) -> None:
        """Return what was taken ahead and is known not to be needed, without waiting for a poll: only if there is
        nobody to agree with."""
        if self.context.group.size > 1 or self.is_settling:
            return
        for op in [op for op in self.operations.values() if op.is_ahead]:
            status = op.status(0.0)
            if status != RUNNING:
                op.reach = op.job.reach
                self._looked_up(op, *read_pages_status(status))

    # ---- ended by the caller -----------------------------------------------------------------------------------------
    def may_end(self, op: PrefetchOp) -> bool:
        """Whether the policy would end it, as far as this rank sees."""
        reading = op.stage is Stage.FETCHING or op.is_ahead
        if op.stage is Stage.FETCHED or op.stopped or (reading and op.job.done()):
            return True
        config = self.context.config
        if config.prefetch_policy != "wait_complete" and self._is_late(op):
            return False
        if config.prefetch_policy == "best_effort":
            return True
        limit_s = config.prefetch_deadline_s
        if config.prefetch_policy == "timeout":
            limit_s = config.prefetch_timeout_base_s + config.prefetch_timeout_per_ki_s * len(op.tokens) / 1024
        return self.context.clock() - op.started_s >= limit_s

    def _is_late(self, op: PrefetchOp) -> bool:
        """Whether its fetch began in this moment, so to speak, as room had to be made for it: in the round, that is, in
        which its request is due. It gets as long as that has waited, but no longer than to compute would take."""
        if op.stage is not Stage.FETCHING or op.late_s is None:
            return False
        compute_s = op.num_pages * self.context.page_size * self.context.config.compute_ns_per_token * 1e-9
        return self.context.clock() - op.late_s < min(op.late_s - op.started_s, compute_s)

    def finish(self, req_id: str) -> bool:
        """See Controller.finish_prefetch."""
        op = self.operations.get(req_id)
        if op is None:
            return True
        pages, ended = op.num_pages, True
        if op.stage is not Stage.FETCHED:
            ahead = op.is_ahead
            reading = ahead or op.stage is Stage.FETCHING
            may_end, done = self.may_end(op), reading and op.job.done()
            # read last: the worker goes on meanwhile, and what has ended must be seen with all of its pages
            progress = progress_value(op.job) if reading else int(op.job.error is None)
            mine = [may_end, progress, done]
            if ahead:
                mine += [op.status(0.0), -op.job.reach]
            agreed = self.context.agree(Where.FINISH_PREFETCH, [int(value) for value in mine])
            if ahead and agreed[3] != RUNNING:
                op.reach = -agreed[4]
                if not self._looked_up(op, *read_pages_status(agreed[3])):
                    return True
            if not agreed[0]:
                return False
            pages, ended = agreed[1] // 2, bool(agreed[2])
            failed = not agreed[1] % 2
            if failed or ended:
                self._judge(op, not failed)
            op.job.cancel()
        op.to(Stage.DONE)
        self._settle_pages(op, pages, ended)
        return True

    def num_overdue(self, now_s: float) -> int:
        """How many, from the oldest on, nobody has ended for ``prefetch_abandon_s``."""
        limit_s = self.context.config.prefetch_abandon_s
        return sum(1 for _ in takewhile(lambda op: now_s - op.started_s >= limit_s, self.operations.values()))

    def abandon(self, ops: Sequence[PrefetchOp]) -> None:
        """End those of ``ops`` that are still there: they are overdue on all ranks."""
        for op in ops:
            if self.operations.get(op.req_id) is not op:
                continue
            self.context.counts["prefetch_abandoned"] += 1
            if op.stage is Stage.FETCHED:
                op.to(Stage.DONE)
                self._settle_pages(op, op.num_pages, True)
            else:
                self._give_up(op)

    def stop(self, req_id: str) -> None:
        """See Controller.stop_prefetch."""
        op = self.operations.get(req_id)
        if op is not None:
            op.stopped = True
            op.job.cancel()

    def cancel(self, req_id: str) -> None:
        """See Controller.cancel_prefetch."""
        op = self.operations.get(req_id)
        if op is not None:
            self._give_up(op)

    def give_up(self) -> None:
        """Cancel all."""
        for op in list(self.operations.values()):
            self._give_up(op)

    def forget(self) -> None:
        """The tree is dropped; the pages have been taken over."""
        self.operations.clear()
        self.brought.clear()
        self.tokens_in_flight = 0

    def _give_up(self, op: PrefetchOp) -> None:
        fetched = op.stage is Stage.FETCHED
        op.job.cancel()
        op.to(Stage.CANCELLED)
        if fetched:
            self.context.ledger.free_host(op.host_pages)
        elif len(op.host_pages):
            self.drains.add("prefetch", op.job, host_pages=op.host_pages)
        self._remove(op, "cancelled", 0)
        self.context.counts["prefetch_cancelled"] += 1

    def _settle_pages(self, op: PrefetchOp, pages: int, ended: bool) -> None:
        """The first pages enter the tree; the rest is freed, once no worker writes it."""
        context = self.context
        arrived, rest = op.host_pages[:pages], op.host_pages[pages:]
        if not ended and len(rest):
            self.drains.add("prefetch", op.job, host_pages=rest)
        else:
            context.ledger.free_host(rest)
        new_tokens = self._insert(op, arrived) if pages else 0
        self.brought[op.req_id] = self.brought.get(op.req_id, 0) + new_tokens
        while len(self.brought) > KEPT_RESULTS:
            del self.brought[next(iter(self.brought))]
        context.counts["prefetch_tokens"] += new_tokens
        context.counts["prefetch_late_tokens"] += pages * context.page_size - new_tokens
        self._remove(op, self._outcome(op, pages), pages)

    def _outcome(self, op: PrefetchOp, pages: int) -> Outcome:
        if op.failed:
            return "failed"
        if op.num_pages and pages == op.num_pages:
            return "done"
        return "partial" if self.context.config.prefetch_policy == "best_effort" else "timeout"

    def _insert(self, op: PrefetchOp, pages: PageIds) -> int:
        """Put pages below their node. Returns: tokens that were not in the tree yet.

        The tree takes ids for the whole path: for the part that it has, ids that no pool hands out come back as
        duplicates.
        """
        context, tree = self.context, self.context.tree
        try:
            above = self.hashes.path_tokens(op.node) if op.node != ROOT else op.tokens[:0]
        except HandleError:  # evicted meanwhile
            context.ledger.free_host(pages)
            return 0
        known = len(above) // context.page_size
        first_unused = context.ledger.host.num_pages
        ids = np.concatenate([np.arange(first_unused, first_unused + known, dtype=np.int32), pages])
        tokens = np.concatenate([above, op.tokens[: len(pages) * context.page_size]])
        result = tree.insert_host(tokens, ids, extra_key=op.extra_key, cache_salt=op.cache_salt)
        late = result.prefix_tokens // context.page_size - known
        context.ledger.free_host(pages[:late])
        new = pages[late:]
        if len(new):
            context.ledger.fetched(new)
            tree.mark(result.node, set=STORED)
        return len(new) * context.page_size

    def _remove(self, op: PrefetchOp, outcome: Outcome, pages: int) -> None:
        """It has ended: release what it kept."""
        del self.operations[op.req_id]
        self.tokens_in_flight -= op.counted_tokens
        if op.keeps_host:
            self.context.tree.release_host(op.node)
        self.context.finished("prefetch", outcome, pages, op.job.seconds, op.started_s)

    # ---- asked -------------------------------------------------------------------------------------------------------
    def progress(self, req_id: str) -> PrefetchStatus:
        """See Controller.prefetch_progress."""
        op = self.operations.get(req_id)
        if op is None:
            return PrefetchStatus("unknown")
        page_size, stage, found = self.context.page_size, op.stage, op.num_pages
        if op.is_ahead and op.job.found is not None:
            stage, found = Stage.FETCHING, op.job.reach
        fetched = op.num_pages if stage is Stage.FETCHED else op.job.pages if stage is Stage.FETCHING else 0
        return PrefetchStatus(
            _STATES[stage], len(op.tokens), found * page_size, fetched * page_size, self.context.clock() - op.started_s
        )


