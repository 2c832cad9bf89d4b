"""The contract of a transfer path: one ``copy`` of a checked plan, and the copies a cache asks for by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ..pool.layout import KVGeometry, KVView
from .plan import CopyPlan, Ids, plan_copy

__all__ = ["Pages", "PlannedRoute", "ProgressLike", "Route", "Transfer"]

Pages = Ids | Sequence[int]


class ProgressLike(Protocol):
    """How far a load back is, for a reader that follows it layer by layer."""

    @property
    def layers_done(self) -> int:
        """Layers that are complete; they complete in order."""
        ...

    def wait(self, layer: int, timeout_s: float | None = None) -> bool:
        """Wait until ``layer`` is in place. Returns: whether it is (False after the timeout).

        Raises: TransferError if the load has failed and the layer will never be.
        """
        ...


class Route(Protocol):
    """Copies between two views that have been checked; made by ``Transfer.route``."""

    def copy(self, src_pages: Pages, dst_pages: Pages) -> None:
        """Copy page i of ``src_pages`` to page i of ``dst_pages``. Raises: what ``plan_copy`` raises for page ids."""


class PlannedRoute:
    """A route that plans each copy anew: for transfers that have nothing faster."""

    def __init__(self, transfer: Transfer, src: KVView, dst: KVView, layers: range | None) -> None:
        none = np.empty(0, np.int64)
        plan = transfer.plan(src, dst, none, none, layers)
        self.src, self.dst, self.layers = plan.src, plan.dst, plan.layers
        self._transfer = transfer

    def copy(self, src_pages: Pages, dst_pages: Pages) -> None:
        """Check and run one copy."""
        self._transfer.copy(self._transfer.plan(self.src, self.dst, src_pages, dst_pages, self.layers))


class Transfer(ABC):
    """Copies pages between views of one geometry.

    Every method checks its arguments before anything moves, and raises what ``plan_copy`` raises; pages are int32 or
    int64 page ids in order: the i-th source page goes to the i-th destination page.
    """

    def __init__(self, geometry: KVGeometry) -> None:
        self.geometry = geometry

    @abstractmethod
    def copy(self, plan: CopyPlan) -> None:
        """Run one checked copy. Raises: InvalidArgumentError if a view is on a device this path does not reach."""

    @abstractmethod
    def load_back(
        self, host: KVView, device: KVView, host_pages: Pages, device_pages: Pages, progress: Any = None
    ) -> None:
        """Copy all layers of pages from the host to the device, layer by layer where somebody follows ``progress``.

        Args:
            progress: of ``make_progress``, or None.
        """

    def make_progress(self, num_layers: int | None = None) -> ProgressLike:
        """What ``load_back`` of this path reports to.

        Args:
            num_layers: of the copy; None: all of the geometry.
        """
        from .cpu import Progress  # which imports this module

        return Progress(self.geometry.num_layers if num_layers is None else num_layers)

    def plan(
        self, src: KVView, dst: KVView, src_pages: Pages, dst_pages: Pages, layers: range | None = None
    ) -> CopyPlan:
        """Check a copy; for a plan that is run layer by layer (``plan.layer(l)``) check once."""
        return plan_copy(self.geometry, src, dst, src_pages, dst_pages, layers)

    def route(self, src: KVView, dst: KVView, layers: range | None = None) -> Route:
        """Prepare copies between two views: they are checked now. Raises: what ``plan`` raises for them."""
        return PlannedRoute(self, src, dst, layers)

    def backup(self, device: KVView, host: KVView, device_pages: Pages, host_pages: Pages) -> None:
        """Copy all layers of pages from the device to the host."""
        self.copy(self.plan(device, host, device_pages, host_pages))

    def load_layer(self, host: KVView, device: KVView, host_pages: Pages, device_pages: Pages, layer: int) -> None:
        """Copy one layer of pages from the host to the device."""
        self.copy(self.plan(host, device, host_pages, device_pages, range(layer, layer + 1)))

    def move(self, pool: KVView, src_pages: Pages, dst_pages: Pages) -> None:
        """Copy pages within one pool (to defragment it); no page may be both source and destination."""
        self.copy(self.plan(pool, pool, src_pages, dst_pages))

    def gather(self, pool: KVView, pages: Pages, staging: KVView) -> None:
        """Copy pages to the first len(pages) pages of a staging buffer (``staging_view``), in order."""
        self.copy(self.plan(pool, staging, pages, np.arange(len(pages))))

    def scatter(self, staging: KVView, pool: KVView, pages: Pages) -> None:
        """Copy the first len(pages) pages of a staging buffer to pages of a pool: the inverse of ``gather``."""
        self.copy(self.plan(staging, pool, np.arange(len(pages)), pages))
