"""L3: room on the device: evictions, and allocations that may evict once."""

from __future__ import annotations

from collections.abc import Callable

from ..types import PageIds
from .context import Context
from .writes import Writes

__all__ = ["Room"]


class Room:
    """Evicts by the write policy."""

    def __init__(self, context: Context, writes: Writes) -> None:
        self.context, self.writes = context, writes
        self.give_way: Callable[[int, Callable[[int], int]], int] = lambda num_tokens, evict: 0
        """See GiveWay.evict."""

    def evict(self, num_tokens: int) -> int:
        """See Controller.evict."""
        context = self.context
        if context.listener is None:
            return self._make_room(num_tokens)
        began_s = context.clock()
        tokens = self._make_room(num_tokens)
        if tokens:
            context.listener.made_room(tokens, context.clock() - began_s)
        return tokens

    def _make_room(self, num_tokens: int) -> int:
        context = self.context
        context.flush_backups()  # what they lock would stay
        freed = self._evict(num_tokens)
        if freed < num_tokens and context.ledger.has_host and context.tree.stats().evictable_tokens:
            freed += self.give_way(num_tokens - freed, self._evict)
        return freed

    def _evict(self, num_tokens: int) -> int:
        context = self.context
        if context.config.write_policy == "write_back" and context.ledger.has_host:
            return self.writes.evict(num_tokens)
        result = context.tree.evict(num_tokens)
        return context.evicted_from_device(result.page_ids, result.host_page_ids)

    def alloc(self, num_pages: int) -> PageIds | None:
        """Take device pages, after one eviction of what is missing."""
        ledger = self.context.ledger
        pages = ledger.alloc_device(num_pages)
        if pages is None:
            missing = num_pages - ledger.device.available
            self.evict((missing if missing > 0 else num_pages) * self.context.page_size)
            pages = ledger.alloc_device(num_pages)
        return pages

    def alloc_for_load(self, num_pages: int) -> PageIds | None:
        """As alloc, but evicts as much as is asked for, as engines know it: the request goes on to compute more."""
        ledger = self.context.ledger
        pages = ledger.alloc_device(num_pages)
        if pages is None:
            self.evict(num_pages * self.context.page_size)
            pages = ledger.alloc_device(num_pages)
        return pages
