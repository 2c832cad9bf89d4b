"""L6: Prometheus metrics. Everything is read when Prometheus asks: counters that the parts keep anyway cost a request
nothing. Only durations need to be told as they happen, once an operation, to a ``MetricsListener``.

    listener = MetricsListener()
    controller = Controller(..., listener=listener)
    registry.register(MetricsCollector(controller=controller, listener=listener, labels={"tp_rank": "0"}))

Names are SGLang's where it has the thing (with ``radixkv:`` for ``sglang:``), so that its dashboards need one edit.
Units are tokens, bytes, seconds, pages. A counter's name ends in _total.
"""

from __future__ import annotations

import bisect
import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal

from .controller.base import Attribution, ControllerStats, Finished, Kind, Outcome
from .errors import InvalidArgumentError
from .extras import require
from .types import TreeStats

__all__ = ["DURATION_BUCKETS_S", "Histogram", "MetricsCollector", "MetricsListener", "serve_metrics"]

DURATION_BUCKETS_S = (
    0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.007, 0.008, 0.009, 0.01, 0.02, 0.03,
    0.04, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0,
)  # fmt: skip
"""Upper bounds. From 1 ms to 1 s SGLang's for loads; a copy of a few pages is below, a slow store above."""

_KINDS: tuple[Kind, ...] = ("backup", "write_back", "load", "store", "prefetch")
_HISTOGRAMS: Mapping[Kind, tuple[str, str]] = {
    "backup": ("hicache_backup_duration_seconds", "Copying a node to the host at a hit"),
    "write_back": ("hicache_write_back_duration_seconds", "Copying a node to the host at its eviction"),
    "load": ("load_back_duration_seconds", "Copying a batch to the device"),
    "store": ("storage_backup_duration_seconds", "Writing a node to storage"),
    "prefetch": ("prefetch_duration_seconds", "Reading a request's pages from storage"),
}


class Histogram:
    """Counts by upper bound, and their sum. One thread observes, any reads; a reader may be one observation behind."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float] = DURATION_BUCKETS_S) -> None:
        if list(bounds) != sorted(set(bounds)) or not bounds:
            raise InvalidArgumentError(f"bounds of a histogram ascend: {bounds}")
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value; a bound belongs to the bucket below it."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, how many are no larger), as Prometheus wants it."""
        found, running = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            running += count
            found.append((bound, float(running)))
        return found


class MetricsListener:
    """What the controller tells as it happens; see ``controller.base.Listener``. A microsecond an operation.

    Args:
        recent: how many attributions to keep, the newest last, in ``requests``.
    """

    def __init__(self, recent: int = 1000, bounds: Sequence[float] = DURATION_BUCKETS_S) -> None:
        self.durations = {kind: Histogram(bounds) for kind in _KINDS}
        self.latencies = {kind: Histogram(bounds) for kind in _KINDS}
        self.outcomes: dict[tuple[Kind, Outcome], int] = {}
        self.num_bytes = dict.fromkeys(_KINDS, 0)
        self.requests: deque[Attribution] = deque(maxlen=recent)
        self.evictions = {"device": 0, "host": 0}

    def finished(self, event: Finished) -> None:
        """An operation has ended. One that never moved a byte (refused, cancelled early) has no duration."""
        key = (event.kind, event.outcome)
        self.outcomes[key] = self.outcomes.get(key, 0) + 1
        self.latencies[event.kind].observe(event.latency_s)
        if event.num_bytes:
            self.num_bytes[event.kind] += event.num_bytes
            self.durations[event.kind].observe(event.seconds)

    def evicted(self, tier: Literal["device", "host"], num_tokens: int) -> None:
        """Tokens have left a tier."""
        self.evictions[tier] += 1

    def attributed(self, attribution: Attribution) -> None:
        """A request's prompt has been accounted for."""
        self.requests.append(attribution)


class MetricsCollector:
    """A collector for a ``prometheus_client`` registry. Each part is optional; what is not given is not shown.

    Args:
        controller: a Controller; its tree and, while one is attached, its storage are shown with it.
        tree, host, store, publisher: a tree, HostKVCache, PageStore, EventPublisher.
        listener: the one that the controller tells.
        labels: on every sample, e.g. ``{"tp_rank": "0"}``.
        prefix: before each name.
    Thread: ``collect`` runs on the thread that serves Prometheus, and only reads counters; a sample may be one step
        newer than another.
    Raises: MissingExtraError without prometheus_client.
    """

    def __init__(
        self,
        *,
        controller: Any = None,
        listener: MetricsListener | None = None,
        tree: Any = None,
        host: Any = None,
        store: Any = None,
        publisher: Any = None,
        labels: Mapping[str, str] | None = None,
        prefix: str = "radixkv:",
    ) -> None:
        self._families = require("prometheus_client.core", "metrics", "metrics")
        self._controller, self._listener, self._tree = controller, listener, tree
        self._host, self._store, self._publisher = host, store, publisher
        self._labels, self._prefix = dict(labels or {}), prefix

    def collect(self) -> Iterator[Any]:
        """Every metric family, as of now."""
        store = self._store if self._store is not None else getattr(self._controller, "storage", None)
        if self._controller is not None:
            stats = _undisturbed(self._controller.stats)
            yield from self._of_requests(stats)
            yield from self._of_operations(stats)
            breaker = getattr(store, "breaker", None)
            left_alone = stats.backing_off or (breaker is not None and breaker.open)
            yield self._gauge("storage_backing_off", "1 while storage is left alone after failures", left_alone)
        if self._listener is not None:
            yield from self._of_durations(self._listener)
        tree = self._tree if self._tree is not None else getattr(self._controller, "tree", None)
        if tree is not None:
            yield from self._of_tree(tree.stats())
        if self._host is not None:
            yield self._gauge("hicache_host_total_tokens", "Tokens that the host pool can hold", self._host.size)
            used = self._host.size - self._host.available_size()
            yield self._gauge("hicache_host_used_tokens", "Tokens of the host pool that are taken", used)
        if store is not None:
            yield from self._of_storage(store)
        if self._publisher is not None:
            yield from self._of_events(self._publisher.stats())

    # ---- the parts ---------------------------------------------------------------------------------------------------
    def _of_requests(self, stats: ControllerStats) -> Iterator[Any]:
        cached = {"device": stats.device_tokens, "host": stats.host_tokens, "storage": stats.storage_tokens}
        prompt = sum(cached.values()) + stats.computed_tokens
        yield self._counter("prompt_tokens", "Prompt tokens of attributed requests", prompt)
        yield self._by("counter", "cached_tokens", "Prompt tokens found in a cache", "cache_source", cached.items())
        yield self._counter("computed_tokens", "Prompt tokens that had to be computed", stats.computed_tokens)
        rate = sum(cached.values()) / prompt if prompt else 0.0
        yield self._gauge("cache_hit_rate", "Cached share of all prompt tokens so far", rate)

    def _of_operations(self, stats: ControllerStats) -> Iterator[Any]:
        for name, text, value in (
            ("evicted_tokens", "Tokens that left the device", stats.device_evicted_tokens),
            ("hicache_host_evicted_tokens", "Tokens that left the host", stats.host_evicted_tokens),
            ("hicache_dropped_tokens", "Tokens evicted with no room for them on the host", stats.dropped_tokens),
            ("hicache_backup_tokens", "Tokens copied to the host", stats.backup_tokens + stats.write_back_tokens),
            ("load_back_tokens", "Tokens loaded from the host to the device", stats.load_tokens),
            ("backuped_tokens", "Tokens written to storage", stats.store_tokens),
            ("prefetched_tokens", "Tokens read from storage into the tree", stats.prefetch_tokens),
            ("prefetched_late_tokens", "Tokens read from storage too late to be used", stats.prefetch_late_tokens),
        ):
            yield self._counter(name, text, value)
        begun = {"backup": stats.backups, "write_back": stats.write_backs, "load": stats.loads, "store": stats.stores,
                 "prefetch": stats.prefetches}  # fmt: skip
        failed = {"backup": stats.backup_failures, "load": stats.load_failures, "store": stats.store_failures,
                  "prefetch": stats.prefetch_failures}  # fmt: skip
        refused = {"backup": stats.refused_backups, "load": stats.refused_loads, "store": stats.refused_stores,
                   "prefetch": stats.refused_prefetches}  # fmt: skip
        yield self._by("counter", "operations", "Operations begun", "kind", begun.items())
        yield self._by("counter", "operation_failures", "Operations that failed", "kind", failed.items())
        text = "Operations not begun: no room, no capacity, storage left alone"
        yield self._by("counter", "refused_operations", text, "kind", refused.items())
        yield self._counter("prefetch_revoked", "Prefetches given up: storage had too little", stats.prefetch_revoked)
        yield self._counter("prefetch_cancelled", "Prefetches cancelled", stats.prefetch_cancelled)
        yield self._counter("prefetch_abandoned", "Prefetches that nobody ended", stats.prefetch_abandoned)
        yield self._counter("stored_doubts", "Times that storage had lost pages", stats.stored_doubts)
        yield self._counter("store_gaps", "Stores put off for want of what comes before", stats.store_gaps)
        queued = {"backup": stats.writes_in_flight, "load": stats.loads_in_flight, "store": stats.stores_in_flight,
                  "prefetch": stats.prefetches_in_flight}  # fmt: skip
        yield self._by("gauge", "queued_operations", "Operations in flight", "kind", queued.items())
        yield self._gauge("queued_loads", "Loads that no start_loads has started yet", stats.queued_loads)
        yield self._gauge("prefetch_tokens_in_flight", "Tokens asked for", stats.prefetch_tokens_in_flight)
        yield self._gauge("stuck_pages", "Pages of operations given up that still run", stats.stuck_pages)

    def _of_durations(self, listener: MetricsListener) -> Iterator[Any]:
        core = self._families
        for kind, (name, text) in _HISTOGRAMS.items():
            family = core.HistogramMetricFamily(self._prefix + name, text, labels=list(self._labels))
            durations = listener.durations[kind]
            family.add_metric(list(self._labels.values()), durations.buckets(), durations.total)
            yield family
        name, text = "operation_latency_seconds", "From an operation's start until it was settled"
        family = core.HistogramMetricFamily(self._prefix + name, text, labels=[*self._labels, "kind"])
        for kind, latency in listener.latencies.items():
            family.add_metric([*self._labels.values(), kind], latency.buckets(), latency.total)
        yield family
        moved = listener.num_bytes
        for name, text, value in (
            ("hicache_backup_bytes", "Bytes copied to the host", moved["backup"] + moved["write_back"]),
            ("load_back_bytes", "Bytes loaded to the device", moved["load"]),
            ("backuped_bytes", "Bytes written to storage", moved["store"]),
            ("prefetched_bytes", "Bytes read from storage", moved["prefetch"]),
        ):
            yield self._counter(name, text, value)
        family = core.CounterMetricFamily(
            f"{self._prefix}operation_outcomes", "How operations ended", labels=[*self._labels, "kind", "outcome"]
        )
        for (kind, outcome), count in sorted(listener.outcomes.copy().items()):
            family.add_metric([*self._labels.values(), kind, outcome], count)
        yield family
        yield self._by("counter", "evictions", "Evictions that freed something", "tier", listener.evictions.items())

    def _of_tree(self, stats: TreeStats) -> Iterator[Any]:
        for name, text, value in (
            ("kv_evictable_tokens", "Tokens on the device that may be evicted", stats.evictable_tokens),
            ("kv_protected_tokens", "Tokens on the device that are in use", stats.protected_tokens),
            ("hicache_host_tokens", "Tokens with a host copy", stats.host_tokens),
            ("radix_tree_nodes", "Nodes of the tree", stats.nodes),
            ("radix_tree_namespaces", "Namespaces of the tree", stats.namespaces),
            ("radix_tree_memory_bytes", "Memory of the tree itself", stats.memory_bytes + stats.digest_memory_bytes),
            ("kv_events_queued", "KV events that nobody has taken yet", stats.queued_events),
        ):
            yield self._gauge(name, text, value)
        yield self._counter("kv_events_dropped", "KV events that nobody took in time", stats.dropped_events)

    def _of_storage(self, store: Any) -> Iterator[Any]:
        counters = store.counters
        values = {field.name: getattr(counters, field.name) for field in fields(counters)}
        calls = {name: values.pop(name) for name in ("errors", "timeouts", "skipped")}
        for name, text in (("bytes_read", "Payload bytes of hits"), ("bytes_written", "Payload bytes stored")):
            yield self._counter(f"storage_{name}", text, values.pop(name))
        yield self._by("counter", "storage_pages", "Pages by what became of them", "result", values.items())
        yield self._by("counter", "storage_failed_calls", "Calls that failed as a whole", "reason", calls.items())

    def _of_events(self, stats: Any) -> Iterator[Any]:
        for name in ("batches", "events", "dropped_batches", "snapshots", "replays", "short_replays"):
            yield self._counter(
                f"kv_event_publisher_{name}", "KV events: " + name.replace("_", " "), getattr(stats, name)
            )
        yield self._gauge("kv_event_publisher_queued_batches", "Batches to be sent", stats.queued_batches)

    # ---- families ----------------------------------------------------------------------------------------------------
    def _counter(self, name: str, text: str, value: float) -> Any:
        return self._family("counter", name, text, (), [((), value)])

    def _gauge(self, name: str, text: str, value: float) -> Any:
        return self._family("gauge", name, text, (), [((), value)])

    def _by(self, kind: Literal["counter", "gauge"], name: str, text: str, label: str,
            values: Iterable[tuple[str, float]]) -> Any:  # fmt: skip
        return self._family(kind, name, text, (label,), [((which,), value) for which, value in values])

    def _family(self, kind: Literal["counter", "gauge"], name: str, text: str, more: tuple[str, ...],
                samples: Iterable[tuple[tuple[str, ...], float]]) -> Any:  # fmt: skip
        core = self._families
        make = core.CounterMetricFamily if kind == "counter" else core.GaugeMetricFamily
        family = make(self._prefix + name, text, labels=[*self._labels, *more])
        for values, value in samples:
            family.add_metric([*self._labels.values(), *values], float(value))
        return family


def _undisturbed(read: Callable[[], ControllerStats], tries: int = 100) -> ControllerStats:
    """Read what another thread changes: a container that grew while it was counted raises, and is counted again."""
    for _ in range(tries - 1):
        with contextlib.suppress(RuntimeError):
            return read()
    return read()


def serve_metrics(collector: MetricsCollector, port: int, address: str = "127.0.0.1") -> tuple[Any, Any]:
    """Serve one collector on ``http://address:port/metrics``, for an engine that has no registry of its own.

    Returns: the server, whose ``server_port`` says which one a port of 0 became and which ``shutdown`` ends, and its
    thread. Raises: OSError if the port is taken; MissingExtraError.
    """
    client = require("prometheus_client", "metrics", "metrics")
    registry = client.CollectorRegistry()
    registry.register(collector)
    server, thread = client.start_http_server(port, addr=address, registry=registry)
    return server, thread
