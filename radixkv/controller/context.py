"""L3: what the parts of a controller share: the things it puts together, its counters, and how ranks agree."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Literal

import numpy as np

from ..errors import GroupError
from ..tree.base import BaseRadixTree
from ..types import PageIds
from .base import Finished, Group, Kind, LayerProgress, Listener, Mover, Outcome, StorageJob, Ticket
from .config import ControllerConfig
from .lanes import FailedProgress, FailedTicket
from .ledger import NO_PAGES, Ledger
from .workers import EndedJob

__all__ = ["HEADER", "Context", "Where"]

HEADER = 10
"""Values at the front of each vector that ranks agree on: where a rank is, and the counts of its tree, both ways."""


class Where(IntEnum):
    """Where ranks meet; a rank that is elsewhere has made other calls."""

    MAKE = 1
    POLL = 2
    FINISH_PREFETCH = 3
    WRITE_BACK = 4
    RESET = 5
    ATTACH = 6
    EVICT = 7


class Context:
    """Shared by Writes, Loads, Stores, Prefetches and Drains. See Controller for the arguments."""

    def __init__(
        self,
        tree: BaseRadixTree,
        ledger: Ledger,
        mover: Mover | None,
        group: Group,
        config: ControllerConfig,
        listener: Listener | None,
        clock: Callable[[], float],
        page_bytes: int,
    ) -> None:
        self.tree, self.ledger, self.group, self.config = tree, ledger, group, config
        self.listener, self.clock, self.page_bytes = listener, clock, page_bytes
        self._mover = mover
        self.page_size = tree.page_size
        self.counts: Counter[str] = Counter()
        """By the names of ControllerStats."""
        self.copy_wait_s = min(config.copy_timeout_s, getattr(group, "timeout_s", math.inf) / 2)
        """How long a rank may wait for a copy before it meets the others, who wait for it meanwhile."""
        self.last_op_id = 0
        self.give_back: Callable[[], None] = lambda: None
        """Called before host pages are evicted: may free some that were taken ahead."""

    @property
    def mover(self) -> Mover:
        assert self._mover is not None, "there is no host tier"
        return self._mover

    def begin_backup(self, device_pages: PageIds, host_pages: PageIds) -> Ticket:
        """Ask for a copy to the host. A mover that refuses is a copy that failed: ranks must not part here."""
        assert self._mover is not None, "there is no host tier"
        try:
            return self._mover.backup(device_pages, host_pages)
        except Exception as error:
            return FailedTicket(error)

    def flush_backups(self) -> None:
        """Let the backups begin that a mover has put off; see Mover."""
        if self._mover is not None:
            self._mover.flush()

    def new_progress(self) -> LayerProgress:
        """For one begin_load."""
        try:
            return self.mover.new_progress()
        except Exception as error:
            return FailedProgress(error)

    def begin_load(self, host_pages: PageIds, device_pages: PageIds, progress: LayerProgress) -> Ticket:
        """Ask for a copy to the device, likewise."""
        if isinstance(progress, FailedProgress):
            return FailedTicket(progress.error)
        try:
            return self.mover.load(host_pages, device_pages, progress)
        except Exception as error:
            progress.fail(error)
            return FailedTicket(error)

    @staticmethod
    def begin_job(begin: Callable[[], StorageJob]) -> StorageJob:
        """Ask for a storage job, likewise."""
        try:
            return begin()
        except Exception as error:
            return EndedJob(error=error)

    def next_op_id(self) -> int:
        """The same on all ranks, as all begin the same operations."""
        self.last_op_id += 1
        return self.last_op_id

    def agree(self, where: Where, values: Sequence[int]) -> list[int]:
        """The element-wise minimum over the ranks, after a check that they are at the same place with the same tree.

        Raises: GroupError.
        """
        if self.group.size == 1:
            return list(values)
        here = self.last_op_id * 16 + where
        tree = self.tree.stats()
        mine = [tree.nodes, tree.evictable_tokens, tree.protected_tokens, tree.host_tokens]
        low, high, *agreed = self.group.min([here, -here, *mine, *(-number for number in mine), *values])
        lows, highs, agreed = agreed[: len(mine)], agreed[len(mine) : 2 * len(mine)], agreed[2 * len(mine) :]
        if low != -high:
            raise GroupError(
                f"rank {self.group.rank} is at {where.name} after {self.last_op_id} operations, others at "
                f"{Where(low % 16).name} after {low // 16} and {Where(-high % 16).name} after {-high // 16}: "
                "they have made different calls"
            )
        if any(least != -most for least, most in zip(lows, highs, strict=True)):
            ranges = [f"{least} .. {-most}" for least, most in zip(lows, highs, strict=True)]
            raise GroupError(
                f"rank {self.group.rank} is at {where.name} with another tree than others (nodes, evictable, protected "
                f"and host tokens): {mine}, in the group {', '.join(ranges)}; an allocation may have failed on one rank"
            )
        return agreed

    def finished(
        self, kind: Kind, outcome: Outcome, num_pages: int, seconds: float, started_s: float
    ) -> None:
        """Tell the listener."""
        if self.listener is not None:
            tokens, num_bytes = num_pages * self.page_size, num_pages * self.page_bytes
            self.listener.finished(Finished(kind, outcome, tokens, num_bytes, seconds, self.clock() - started_s))

    # ---- eviction that copies nothing --------------------------------------------------------------------------------
    def evicted_from_device(self, pages: PageIds, dropped_host_pages: PageIds = NO_PAGES) -> int:
        """Pages that an eviction has returned: to the pools. Returns: device tokens."""
        tokens = self.left_device(pages, dropped_host_pages)
        self.free_device([pages])
        return tokens

    def left_device(self, pages: PageIds, dropped_host_pages: PageIds = NO_PAGES) -> int:
        """As evicted_from_device, but device pages are not free until ``free_device``. Returns: device tokens."""
        self.ledger.left_device(pages)
        tokens = len(pages) * self.page_size
        self._count_evicted("device", tokens)
        if len(dropped_host_pages):
            self.ledger.free_host(dropped_host_pages)
            self._count_evicted("host", len(dropped_host_pages) * self.page_size)
        return tokens

    def free_device(self, parts: Sequence[PageIds]) -> None:
        """Give device pages back that have left the tree."""
        pages = self.join([part for part in parts if len(part)])
        if len(pages):
            self.ledger.device.free(pages)

    def evict_host(self, num_tokens: int) -> int:
        """Free host pages of host-only leaves. Returns: tokens."""
        if not self.ledger.has_host:
            return 0
        result = self.tree.evict_host(num_tokens)
        self.ledger.free_host(result.host_page_ids)
        self._count_evicted("host", result.num_tokens)
        return result.num_tokens

    def reserve_host(self, num_pages: int, for_copy: bool = False) -> PageIds | None:
        """Take host pages, after one eviction if there are too few."""
        pages = self.ledger.reserve(num_pages, for_copy)
        if pages is None and not self.ledger.is_holding:
            self.give_back()
            pages = self.ledger.reserve(num_pages, for_copy)
            if pages is None:
                self.evict_host(num_pages * self.page_size)
                pages = self.ledger.reserve(num_pages, for_copy)
        return pages

    def _count_evicted(self, tier: Literal["device", "host"], num_tokens: int) -> None:
        if num_tokens:
            self.counts[f"{tier}_evicted_tokens"] += num_tokens
            if self.listener is not None:
                self.listener.evicted(tier, num_tokens)

    # ---- arrays ------------------------------------------------------------------------------------------------------
    @staticmethod
    def join(parts: Sequence[PageIds]) -> PageIds:
        """One array; that of a single part is not copied."""
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else NO_PAGES
