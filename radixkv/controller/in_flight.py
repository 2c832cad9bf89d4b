"""L3: what is in flight, for those who look on: snapshots that no operation knows of."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..types import PageIds
from .base import Digests
from .loads import Loads
from .operations import PrefetchOp
from .prefetches import Prefetches
from .stores import Stores
from .writes import Writes

__all__ = ["InFlight", "LoadInFlight", "PrefetchInFlight", "collect", "look_at"]


class LoadInFlight(NamedTuple):
    """A load that is queued or under way: the first and the last node of the tail that it brings back."""

    first: int
    last: int


class PrefetchInFlight(NamedTuple):
    """A prefetch that nobody has settled.

    tokens: int32, those that were asked for, whole pages. digests, host_page_ids: of the pages that storage has and
    that there was room for; none before the look-up has answered. started_s: of the controller's clock. stopped: see
    Controller.stop_prefetch.
    """

    op_id: int
    node: int
    tokens: npt.NDArray[np.int32]
    digests: Digests
    host_page_ids: PageIds
    started_s: float
    stopped: bool


class InFlight(NamedTuple):
    """Operations that have begun and are not settled, oldest first in each kind. What was given up is not here.

    writes: nodes. loads: by their last node. stores: nodes by operation id. prefetches: by request.
    """

    writes: list[int]
    loads: dict[int, LoadInFlight]
    stores: dict[int, int]
    prefetches: dict[str, PrefetchInFlight]


def collect(writes: Writes, loads: Loads, stores: Stores, prefetches: Prefetches) -> InFlight:
    """Look at all operations now. O(operations)."""
    begun = [broken.op for broken in loads.broken]
    begun += [*(op for batch in loads.batches for op in batch.loads), *loads.queued]
    return InFlight(
        writes=[op.node for op in writes.operations],
        loads={op.parts[-1].node: LoadInFlight(op.parts[0].node, op.parts[-1].node) for op in begun},
        stores={op.op_id: op.node for op in stores.operations},
        prefetches={req_id: look_at(op) for req_id, op in prefetches.operations.items()},
    )


def look_at(op: PrefetchOp) -> PrefetchInFlight:
    """One prefetch now."""
    return PrefetchInFlight(
        op.op_id, op.node, op.tokens, op.digests[: op.num_pages], op.host_pages[: op.num_pages], op.started_s,
        op.stopped,
    )
