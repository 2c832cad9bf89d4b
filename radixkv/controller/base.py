"""L3: what the controller asks of those around it, and the plain values that it hands out. No logic.

Who may call what: the owner thread calls the controller, the tree and the device pages. A mover and a storage edge
take work from the owner thread and do it on threads (or a GPU) of their own; they touch bytes only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from ..types import PageIds

__all__ = ["Attribution", "BoolArray", "ControllerStats", "DevicePages", "Digests", "Finished", "Group", "Kind"]
__all__ += ["LayerProgress", "Listener", "Load", "Mover", "Outcome", "Polled", "PrefetchStatus"]
__all__ += ["StorageEdge", "StorageJob", "Ticket"]

Digests: TypeAlias = npt.NDArray[np.uint8]
"""uint8 [pages, 32]: the page hashes of consecutive pages, each chained to all before it."""
BoolArray: TypeAlias = npt.NDArray[np.bool_]
Kind: TypeAlias = Literal["backup", "write_back", "load", "store", "prefetch"]
Outcome: TypeAlias = Literal["done", "partial", "failed", "cancelled", "revoked", "dropped", "timeout"]
"""partial: of a store, some pages; of a prefetch, what had come when best_effort ended it. timeout: of a prefetch, its
deadline ended it before all had come. failed: nothing, or, of a prefetch, less than storage had said. revoked: of a
prefetch, storage had too little; of a store, it did not have what comes before. dropped: of a write_back, no room on
the host."""


# ---- asked of others -------------------------------------------------------------------------------------------------
class DevicePages(Protocol):
    """The device's pages, by number. ``SlotAllocator`` is one; a facade adapts the engine's allocator."""

    @property
    def capacity(self) -> int:
        """Pages of the pool."""
        ...

    @property
    def available(self) -> int:
        """Pages that ``alloc`` could give now."""
        ...

    def alloc(self, num_pages: int) -> PageIds | None:
        """Take pages: int32 ids; None, and nothing changes, if there are fewer."""
        ...

    def free(self, page_ids: PageIds) -> None:
        """Give pages back."""
        ...


class Ticket(Protocol):
    """One copy that a mover has taken on. Any thread."""

    @property
    def error(self) -> BaseException | None:
        """Why the copy failed; None while it runs and after success."""
        ...

    @property
    def seconds(self) -> float:
        """How long the bytes moved, queueing apart; 0 until it is done."""
        ...

    def done(self) -> bool:
        """Whether it has ended: succeeded, failed or cancelled. No byte moves any more then."""
        ...

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for ``done``. Returns: whether it is."""
        ...

    def cancel(self) -> bool:
        """Ask that it does not start. Returns: True if it never started and will not (it is done then, with an
        error)."""
        ...


class LayerProgress(Protocol):
    """How far one batch of loads is, layer by layer. Any thread."""

    @property
    def error(self) -> BaseException | None:
        """Why the batch failed."""
        ...

    def wait(self, layer: int, timeout_s: float | None = None) -> bool:
        """Wait until a layer is in place, or (on a device) make the current stream wait for it.

        Returns: True; False after the timeout. Raises: TransferError if the batch has failed (see ``error``).
        """
        ...

    def fail(self, error: BaseException) -> object:
        """Wake all who wait: no further layer will come."""
        ...


class Mover(Protocol):
    """Copies pages between the device and the host, in the order of the calls for each direction. Page ids int32."""

    def backup(self, device_pages: PageIds, host_pages: PageIds) -> Ticket:
        """Copy to the host, after what computes on the device now. The pages stay as they are until it is done.

        It may begin only with ``flush``, or when somebody waits for its ticket, and may be done together with others.
        """
        ...

    def flush(self) -> None:
        """Begin the backups that wait for it."""
        ...

    def load(self, host_pages: PageIds, device_pages: PageIds, progress: Any) -> Ticket:
        """Copy to the device, layer by layer. ``progress``: of ``new_progress``, told of each layer and of failure."""
        ...

    def new_progress(self) -> LayerProgress:
        """For one call of ``load``."""
        ...

    def close(self, timeout_s: float | None = None) -> bool:
        """Cancel what has not started, wait for what has, end the threads. A second call only waits.

        Returns: whether all have ended in time (None: however long it takes); if not, bytes may still be moved.
        """
        ...


class Group(Protocol):
    """The ranks that must decide alike."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def min(self, values: Sequence[int]) -> list[int]:
        """The element-wise minimum over the ranks (int64; as many values on each). Collective.

        Raises: GroupError within the group's deadline if a rank does not take part.
        """
        ...


class StorageJob(Protocol):
    """One task of a storage worker. Any thread."""

    @property
    def pages(self) -> int:
        """Leading pages that are finished: found, read or written. Only grows."""
        ...

    @property
    def found(self) -> int | None:
        """Of ``bring``: leading pages that exist; None before the look-up has answered."""
        ...

    @property
    def reach(self) -> int:
        """Leading host pages that it may still write, or has written. Never grows; final with ``found``."""
        ...

    @property
    def error(self) -> BaseException | None:
        """Why it ended early; a miss is none."""
        ...

    @property
    def seconds(self) -> float:
        """How long storage calls took."""
        ...

    def done(self) -> bool:
        """Whether it has ended: its pages are not touched any more."""
        ...

    def cancel(self) -> bool:
        """Ask that no further batch begins. Returns: ``done``."""
        ...

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for ``done``. Returns: whether it is."""
        ...


class StorageEdge(Protocol):
    """Workers in front of a PageStore. Every call returns at once."""

    def look_up(self, digests: Digests, salt: bytes) -> StorageJob:
        """Count the leading pages that exist."""
        ...

    def fetch(self, digests: Digests, host_pages: PageIds, salt: bytes) -> StorageJob:
        """Read pages until one is missing."""
        ...

    def bring(self, digests: Digests, host_pages: PageIds, salt: bytes, least: int) -> StorageJob:
        """Count the leading pages that exist, and read these; none if there are fewer than ``least``."""
        ...

    def store(
        self, digests: Digests, host_pages: PageIds, salt: bytes, again: bool = False, after: bytes = b""
    ) -> StorageJob:  # fmt: skip
        """Write pages until one fails, which is an error. Args: again: most are there, so look first; after: the digest
        of the page before them (b"": there is none): if it is not there, nothing is written, which is no error."""
        ...

    def lost(self) -> int:
        """See Storage.lost."""
        ...

    def close(self, timeout_s: float) -> bool:
        """Cancel everything, end the threads. Returns: whether all have ended; what hangs in a call is left behind."""
        ...


class Listener(Protocol):
    """Is told what happened, on the owner thread, after the fact. For metrics; must not call the controller."""

    def finished(self, event: Finished) -> None:
        """An operation has ended, however it did."""
        ...

    def evicted(self, tier: Literal["device", "host"], num_tokens: int) -> None:
        """Tokens have left a tier."""
        ...

    def made_room(self, num_tokens: int, seconds: float) -> None:
        """One eviction for device tokens has freed so many, write-backs that it waited for included."""
        ...

    def attributed(self, attribution: Attribution) -> None:
        """A request's tokens have been accounted for."""
        ...


# ---- handed out ------------------------------------------------------------------------------------------------------
class Finished(NamedTuple):
    """How one operation ended. num_tokens, num_bytes: what arrived. seconds: of copying (of a batch of loads, its share
    by tokens), or in storage calls, on this rank. latency_s: from its start until it was settled."""

    kind: Kind
    outcome: Outcome
    num_tokens: int
    num_bytes: int
    seconds: float
    latency_s: float


class Load(NamedTuple):
    """A load that waits for start_loads, or runs.

    page_ids: int32, the device pages of the host-only tail of ``node``'s path, in key order; they may be read once the
    batch's layer counter says so. node: the last node loaded; that of the call, unless a quota cut the tail.
    """

    op_id: int
    page_ids: PageIds
    num_tokens: int
    node: int


class Polled(NamedTuple):
    """What one poll has settled, in operations. revoked: prefetches of which storage had too little, stores of which it
    did not have what comes before."""

    writes: int = 0
    loads: int = 0
    stores: int = 0
    prefetches: int = 0
    revoked: int = 0
    failed: int = 0

    def __bool__(self) -> bool:
        return any(self)


class PrefetchStatus(NamedTuple):
    """How far a prefetch is, on this rank. state: "unknown" (never begun, revoked, or settled), "looking_up",
    "fetching", "fetched" (agreed: every page that will come is here)."""

    state: Literal["unknown", "looking_up", "fetching", "fetched"]
    asked_tokens: int = 0
    found_tokens: int = 0
    fetched_tokens: int = 0
    seconds: float = 0.0


class Attribution(NamedTuple):
    """Where the prompt tokens of one request came from; they add up to its length."""

    device_tokens: int
    host_tokens: int
    storage_tokens: int
    computed_tokens: int


class ControllerStats(NamedTuple):
    """Counters since the controller was made (reset does not clear them), and what is in flight now.

    dropped_*: evicted under write_back with no room on the host, or because the copy failed. refused_*: not begun for
    want of room or capacity, or while storage is left alone; refused_loads: tails left on the host, for that or because
    they are too short, beyond the quota, or too dear. broken_loads: with nodes that failed load_attempts times, and
    leave the host. stored_doubts: times that storage had lost values, so that marks were doubted. store_gaps: stores
    put off, as storage did not have what comes before. prefetch_failures: look-ups and fetches that failed, or brought
    less than was found and not lost; prefetch_abandoned: ended by poll, as nobody else did; prefetch_late_tokens:
    fetched, but in the tree by then. The plain *_tokens and requests add up what ``attribute`` was told. stuck_pages:
    kept by operations that were given up but still run. prefetch_capacity_tokens: as many in flight refuse another
    prefetch.
    """

    backups: int = 0
    backup_tokens: int = 0
    backup_failures: int = 0
    refused_backups: int = 0
    write_backs: int = 0
    write_back_tokens: int = 0
    dropped_nodes: int = 0
    dropped_tokens: int = 0
    loads: int = 0
    load_tokens: int = 0
    load_failures: int = 0
    broken_loads: int = 0
    load_batches: int = 0
    refused_loads: int = 0
    stores: int = 0
    store_tokens: int = 0
    partial_stores: int = 0
    store_failures: int = 0
    refused_stores: int = 0
    stored_doubts: int = 0
    store_gaps: int = 0
    prefetches: int = 0
    prefetch_tokens: int = 0
    prefetch_late_tokens: int = 0
    prefetch_revoked: int = 0
    prefetch_failures: int = 0
    prefetch_cancelled: int = 0
    prefetch_abandoned: int = 0
    refused_prefetches: int = 0
    device_evicted_tokens: int = 0
    host_evicted_tokens: int = 0
    polls: int = 0
    device_tokens: int = 0
    host_tokens: int = 0
    storage_tokens: int = 0
    computed_tokens: int = 0
    requests: int = 0
    writes_in_flight: int = 0
    queued_loads: int = 0
    loads_in_flight: int = 0
    stores_in_flight: int = 0
    prefetches_in_flight: int = 0
    prefetch_tokens_in_flight: int = 0
    prefetch_capacity_tokens: int = 0
    stuck_pages: int = 0
    backing_off: bool = False
