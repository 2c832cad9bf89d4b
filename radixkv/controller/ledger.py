"""L3: every page that changes hands goes through here: allocation, the states of host pages, and freeing, once.

    device page --host_of--> host page     for pages that both tiers hold (SYNCED); the tree knows it by node, and what
                                           an eviction returns are device pages only

    write:  RESERVED -> PROTECTED -> SYNCED, paired       load:  BACKUP -> PROTECTED -> SYNCED, paired
    device page freed: SYNCED -> BACKUP, unpaired         prefetch:  RESERVED -> BACKUP
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from ..pool.page_ops import set_pairs
from ..pool.states import HostSlots, MemoryStateInt
from ..types import PageIds
from .base import DevicePages

__all__ = ["NO_PAGES", "Ledger"]

_RESERVED, _PROTECTED = MemoryStateInt.RESERVED, MemoryStateInt.PROTECTED
_SYNCED, _BACKUP = MemoryStateInt.SYNCED, MemoryStateInt.BACKUP

NO_PAGES: PageIds = np.zeros(0, np.int32)


class Ledger:
    """The pages of both tiers. All page ids are int32 arrays; every method is O(pages of the call).

    Args:
        host: None: there is no host tier, and only the methods for the device may be called.
    """

    def __init__(self, device: DevicePages, host: HostSlots | None) -> None:
        self.device, self._host = device, host
        self._host_of: PageIds = np.full(device.capacity if host is not None else 0, -1, np.int32)
        self.backup_pages = 0
        """Host pages whose device copy is gone."""
        self._held: npt.NDArray[np.bool_] | None = None
        self._left: list[PageIds] = []

    # ---- device ------------------------------------------------------------------------------------------------------
    def alloc_device(self, num_pages: int) -> PageIds | None:
        """Take device pages; None if there are too few."""
        return self.device.alloc(num_pages)

    def left_device(self, pages: PageIds) -> None:
        """Device pages have left the tree: their host copies are backups now."""
        if self._host is not None and len(pages):
            self.unpair(pages)

    def unpair(self, pages: PageIds) -> None:
        """The host copies of these device pages, where they have one, are backups now."""
        self.backup_pages += self.host.move_values(self._host_of, pages, _BACKUP, "become a backup", _SYNCED)

    # ---- host --------------------------------------------------------------------------------------------------------
    @property
    def host(self) -> HostSlots:
        """The host pool."""
        assert self._host is not None, "there is no host tier"
        return self._host

    @property
    def has_host(self) -> bool:
        return self._host is not None

    def reserve(self, num_pages: int, for_copy: bool = False) -> PageIds | None:
        """Take host pages, for bytes that come from storage, or by a copy from the device; None if there are too
        few."""
        assert self._host is not None, "there is no host tier"
        return self._host.alloc_pages(num_pages, for_copy)

    def end_write(self, device_pages: PageIds, pages: PageIds) -> None:
        """The copy is done: both tiers hold the bytes."""
        self.host.move_pages(pages, _SYNCED, "complete a copy", _PROTECTED)
        self._pair(device_pages, pages)

    def begin_load(self, pages: PageIds) -> None:
        """Backups will be read by a copy to the device."""
        self.host.move_pages(pages, _PROTECTED, "be loaded", _BACKUP)
        self.backup_pages -= len(pages)

    def end_load(self, device_pages: PageIds, pages: PageIds) -> None:
        """The copy is done: both tiers hold the bytes."""
        self.end_write(device_pages, pages)

    def undo_load(self, pages: PageIds) -> None:
        """The copy has failed or never began: they are backups still."""
        self.host.move_pages(pages, _BACKUP, "abort a copy", _PROTECTED)
        self.backup_pages += len(pages)

    def adopted(self, device_pages: PageIds, pages: PageIds) -> None:
        """Backups got device copies that were computed again."""
        self.host.move_pages(pages, _SYNCED, "be synced", _BACKUP)
        self.backup_pages -= len(pages)
        self._pair(device_pages, pages)

    def fetched(self, pages: PageIds) -> None:
        """Storage has filled reserved pages, and they are in the tree."""
        self.host.move_pages(pages, _BACKUP, "become a backup", _RESERVED)
        self.backup_pages += len(pages)

    def free_host(self, pages: PageIds) -> None:
        """Host pages that nobody reads or writes; their device copies, if any, have been freed before."""
        if self._held is not None:
            held = self._held[pages]
            if held.any():
                self._left.append(pages[held])
                pages = pages[~held]
        if not len(pages):
            return
        host = self.host
        with host.lock:
            states = host.states_of(pages)
            self.backup_pages -= int((states == _BACKUP).sum())
            protected = pages[states == _PROTECTED]
            if len(protected):  # of a copy that failed, or was given up and has ended
                host.move_pages(protected, _RESERVED, "abort a copy", _PROTECTED)
            host.free_pages(pages)

    @contextmanager
    def holding(self, pages: PageIds) -> Iterator[list[PageIds]]:
        """Until the end ``free_host`` keeps these back. Yields: what it has kept, the caller's to free."""
        self._held, self._left = np.zeros(self.host.num_pages, np.bool_), []
        self._held[pages] = True
        try:
            yield self._left
        finally:
            self._held = None

    @property
    def is_holding(self) -> bool:
        """Whether pages are held: not all that leaves the tree is free then."""
        return self._held is not None

    def forget_pairs(self) -> None:
        """The tree was dropped."""
        self._host_of[:] = -1

    def pairs(self) -> dict[int, int]:
        """Device page -> host page, of all pairs. For check_integrity."""
        at = np.flatnonzero(self._host_of >= 0)
        return dict(zip(at.tolist(), self._host_of[at].tolist(), strict=True))

    def _pair(self, device_pages: PageIds, pages: PageIds) -> None:
        top = set_pairs(self._host_of, device_pages, pages)
        if top >= 0:  # an engine's pages may be numbered from anywhere
            size = max(top + 1, 2 * len(self._host_of))
            self._host_of = np.concatenate([self._host_of, np.full(size - len(self._host_of), -1, np.int32)])
            set_pairs(self._host_of, device_pages, pages)
