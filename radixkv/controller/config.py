"""L3: what a caller may set of a controller, and the marks that it keeps on the tree's nodes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

from ..errors import InvalidArgumentError

__all__ = ["STORED", "STORING", "WRITING", "ControllerConfig", "LoadPolicy", "PrefetchPolicy", "WritePolicy"]

WritePolicy: TypeAlias = Literal["write_through", "write_through_selective", "write_back"]
LoadPolicy: TypeAlias = Literal["all", "longest_prefix", "cost"]
PrefetchPolicy: TypeAlias = Literal["best_effort", "wait_complete", "timeout"]

WRITING = 1
"""Mark of a node that a copy from the device to the host is in flight for."""
STORED = 2
"""Mark of a node all of whose pages are in storage."""
STORING = 4
"""Mark of a node that is being written to storage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerConfig:
    """Settings of a controller; unknown ones and values out of range raise. All ranks of a group need the same.

    Args:
        write_policy: when a node is copied to the host. write_through: at its first hit (its creation);
            write_through_selective: at its third; write_back: when it is evicted from the device.
        write_through_threshold: hits, >= 1; None: 1 for write_through, else 3.
        write_through_threshold_storage: hits, >= 1, from which a node with a host copy goes to storage; None: as above.
        adaptive_thresholds: both thresholds are doubled while copies in flight reach ``busy_fraction`` of their limit,
            and doubled while the host has less than ``low_host_fraction`` free or evictable. Off, as engines know it.
        busy_fraction: 0 .. 1 of max_writes (max_stores). Half: late enough to be no noise, early enough to act.
        low_host_fraction: 0 .. 1 of the host pool. A tenth: beyond that each backup evicts what was just backed up.
        store_after_backup: send a node to storage as soon as its host copy is done, not at its next hit. Also the only
            way to storage under write_back, where hits do not count. Off, as engines know it.
        load_policy: what a load does with a host-only tail that exceeds its quota. all: nothing; longest_prefix: as
            many pages as fit; cost: as longest_prefix, and only if loading is cheaper than to compute again.
        load_back_threshold: tokens, >= 0; shorter tails are computed again. 10, as engines know it.
        load_attempts: copies of a load, >= 1, that may fail in a row, before its nodes leave the host and are computed
            again. 3: once may be an accident, and each one fails the requests that wait for it.
        compute_ns_per_token: for "cost" and late prefetches: ns to compute a token. 50 us: 20,000 tokens a second.
        load_base_ns, load_ns_per_token: for "cost": what a load costs, until loads have been measured. 100 us and 2 us.
        prefetch_policy: when finish_prefetch ends one that has not all of its pages. best_effort: at once (but a fetch
            that could begin only now, as room had to be made on the host, gets as long as its request has waited
            till then, and no longer than compute_ns_per_token says that it saves; timeout the same);
            wait_complete: never (but see prefetch_deadline_s); timeout: after prefetch_timeout_base_s + its share of
            prefetch_timeout_per_ki_s.
        prefetch_threshold: tokens, >= 0; fewer (asked for, or in storage) are not worth a trip to storage. 256.
        prefetch_timeout_base_s: seconds, >= 0. 3, as engines know it.
        prefetch_timeout_per_ki_s: seconds more for each 1,024 tokens asked for. 0.25: 4,096 tokens a second.
        prefetch_capacity_fraction: of (host - device) tokens, that all prefetches together may ask for. 0.8.
        prefetch_capacity_floor: fraction of the host pool that they may ask for in any case, as the former is 0 for a
            host pool no larger than the device's. 0.05.
        max_prefetches, max_writes, max_stores: operations in flight, >= 1, beyond which new ones are refused. They
            bound every queue, and the vector that ranks agree on (two numbers a prefetch, one for each other). 1,024,
            256, 256. Prefetches are bounded by tokens first, and those that have arrived and wait for their request
            are not counted here.
        backoff_failures: storage calls in a row that failed, >= 1, before storage is left alone. 3: one is an accident.
        backoff_base_s, backoff_max_s: seconds without prefetches and stores, doubled by each failure that follows. 0.5
            and 30: less than a restart of a server, more than a retry storm.
        storage_batch_pages: pages a storage call, >= 1: what a cancel waits for. 32.
        storage_timeout_s: seconds a storage call may take, > 0. 5.
        copy_timeout_s: seconds, > 0, that an eviction waits for its write-back, or for backups that lock what it
            needs, and a model for a layer of a load. 10: a copy takes milliseconds.
        evict_awaits_backups: an eviction that falls short while backups lock nodes waits for these and settles them.
            On: a scheduler whose batch is full evicts, but does not poll. Off: they wait for poll.
        write_timeout_s: seconds, > 0, from the first poll that sees a backup, the mover's queue included, until it is
            given up and its node unlocked. 30: so long a queue means that the link is not what it was.
        prefetch_deadline_s: seconds, > 0, after which wait_complete waits no more. 60: a backend that keeps its own
            deadlines has answered by then.
        prefetch_abandon_s: seconds, > 0, after which poll ends a prefetch that nobody has finished or cancelled: if it
            has arrived it enters the tree, where it can be evicted; else it is cancelled. 300: its request has waited
            longer than anyone does, or is forgotten.
        recheck_stored_s: seconds, >= 0, at least between two times that stored pages are doubted because storage has
            lost some (its budget): a node that is hit then is looked for there once, and what is missing is stored
            again. 10: with a full budget something is lost all the time.
        settle_timeout_s: seconds, >= 0, that reset waits for the copies that run. 1. What is then still in flight keeps
            its pages until it ends.
        close_timeout_s: seconds, >= 0, that close waits for the calls to each storage, and for copies. 5.
        share_storage: every rank would store the same bytes (MLA), so rank 0 does for all; None: as the host pool says.
    """

    write_policy: WritePolicy = "write_through_selective"
    write_through_threshold: int | None = None
    write_through_threshold_storage: int | None = None
    adaptive_thresholds: bool = False
    busy_fraction: float = 0.5
    low_host_fraction: float = 0.1
    store_after_backup: bool = False
    load_policy: LoadPolicy = "all"
    load_back_threshold: int = 10
    load_attempts: int = 3
    compute_ns_per_token: int = 50_000
    load_base_ns: int = 100_000
    load_ns_per_token: int = 2_000
    prefetch_policy: PrefetchPolicy = "best_effort"
    prefetch_threshold: int = 256
    prefetch_timeout_base_s: float = 3.0
    prefetch_timeout_per_ki_s: float = 0.25
    prefetch_capacity_fraction: float = 0.8
    prefetch_capacity_floor: float = 0.05
    max_prefetches: int = 1024
    max_writes: int = 256
    max_stores: int = 256
    backoff_failures: int = 3
    backoff_base_s: float = 0.5
    backoff_max_s: float = 30.0
    storage_batch_pages: int = 32
    storage_timeout_s: float = 5.0
    copy_timeout_s: float = 10.0
    evict_awaits_backups: bool = True
    write_timeout_s: float = 30.0
    prefetch_deadline_s: float = 60.0
    prefetch_abandon_s: float = 300.0
    recheck_stored_s: float = 10.0
    settle_timeout_s: float = 1.0
    close_timeout_s: float = 5.0
    share_storage: bool | None = None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise InvalidArgumentError(f"{name} is {getattr(self, name)!r}, not one of {', '.join(choices)}")
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InvalidArgumentError(f"{name} is {value}, and must be {low} .. {high}")

    @property
    def hits_to_host(self) -> int:
        """Hits from which a node is copied to the host."""
        return self.write_through_threshold or self._default_threshold

    @property
    def hits_to_storage(self) -> int:
        """Hits from which a node with a host copy goes to storage."""
        return self.write_through_threshold_storage or self._default_threshold

    @property
    def _default_threshold(self) -> int:
        return 1 if self.write_policy == "write_through" else 3

    def settings(self) -> dict[str, Any]:
        """By name, such that equal ones have the same repr: ranks compare them."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


_CHOICES: dict[str, tuple[str, ...]] = {
    "write_policy": get_args(WritePolicy), "load_policy": get_args(LoadPolicy),
    "prefetch_policy": get_args(PrefetchPolicy),
}  # fmt: skip

_ANY = float("inf")
_TINY = 1e-6
_RANGES: dict[str, tuple[float, float]] = {
    "write_through_threshold": (1, _ANY), "write_through_threshold_storage": (1, _ANY), "busy_fraction": (0, 1),
    "low_host_fraction": (0, 1), "load_back_threshold": (0, _ANY), "load_attempts": (1, _ANY),
    "compute_ns_per_token": (0, _ANY),
    "load_base_ns": (0, _ANY), "load_ns_per_token": (0, _ANY), "prefetch_threshold": (0, _ANY),
    "prefetch_timeout_base_s": (0, _ANY), "prefetch_timeout_per_ki_s": (0, _ANY),
    "prefetch_capacity_fraction": (0, _ANY), "prefetch_capacity_floor": (0, 1), "max_prefetches": (1, _ANY),
    "max_writes": (1, _ANY), "max_stores": (1, _ANY), "backoff_failures": (1, _ANY), "backoff_base_s": (0, _ANY),
    "backoff_max_s": (0, _ANY), "storage_batch_pages": (1, _ANY), "storage_timeout_s": (_TINY, _ANY),
    "copy_timeout_s": (_TINY, _ANY), "write_timeout_s": (_TINY, _ANY), "prefetch_deadline_s": (_TINY, _ANY),
    "prefetch_abandon_s": (_TINY, _ANY), "recheck_stored_s": (0, _ANY),
    "settle_timeout_s": (0, _ANY), "close_timeout_s": (0, _ANY),
}  # fmt: skip
