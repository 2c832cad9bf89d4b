"""L6: Prometheus metrics. Everything is read when Prometheus asks: counters that the parts keep anyway cost a request
nothing. Only durations need to be told as they happen, once an operation, to a ``MetricsListener``.

    listener = MetricsListener()
    controller = Controller(..., listener=listener)
    registry.register(MetricsCollector(controller=controller, listener=listener, labels={"tp_rank": "0"}))

Where another process answers Prometheus (PROMETHEUS_MULTIPROC_DIR), a collector is not seen: see ``MetricsMirror``.

Names are SGLang's where it has the thing (with ``radixkv:`` for ``sglang:``), so that its dashboards need one edit.
Units are tokens, bytes, seconds, pages. A counter's name ends in _total. Labels have few values each, all known here:
no request, no key, no tenant. All metrics, with type, unit and labels: docs/observability.md.
"""

from __future__ import annotations

import bisect
import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal

from .controller.base import Attribution, ControllerStats, Finished, Kind, Outcome
from .errors import InvalidArgumentError, RadixKVError, StateError
from .extras import require
from .types import TreeStats

__all__ = ["DURATION_BUCKETS_S", "Histogram", "MetricsCollector", "MetricsListener", "MetricsMirror"]
__all__ += ["serve_metrics"]

DURATION_BUCKETS_S = (
    0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.007, 0.008, 0.009, 0.01, 0.02, 0.03,
    0.04, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0,
)  # fmt: skip
"""Upper bounds. From 1 ms to 1 s SGLang's for loads; a copy of a few pages is below, a slow store above."""

_KINDS: tuple[Kind, ...] = ("backup", "write_back", "load", "store", "prefetch")
_HISTOGRAMS: Mapping[Kind, tuple[str, str]] = {
    "backup": ("hicache_backup_duration_seconds", "Copying a node to the host at a hit"),
    "write_back": ("hicache_write_back_duration_seconds", "Copying a node to the host at its eviction"),
    "load": ("load_back_duration_seconds", "Copying a load to the device; of a batch of loads its share"),
    "store": ("storage_backup_duration_seconds", "Writing a node to storage"),
    "prefetch": ("prefetch_duration_seconds", "Reading a request's pages from storage"),
}
_OUTCOMES: Mapping[Kind, tuple[Outcome, ...]] = {
    "backup": ("done", "failed", "cancelled"),
    "write_back": ("done", "failed", "dropped"),
    "load": ("done", "failed", "cancelled"),
    "store": ("done", "partial", "failed", "revoked", "cancelled"),
    "prefetch": ("done", "partial", "timeout", "failed", "revoked", "cancelled"),
}
_NO_OUTCOMES = {(kind, outcome): 0 for kind, outcomes in _OUTCOMES.items() for outcome in outcomes}
"""Shown from the start: Prometheus sees no increase in a series that begins with 1."""
_LATENCY = ("operation_latency_seconds", "From an operation's start until it was settled")
_EVICTION = ("eviction_duration_seconds", "Making room on the device, write-backs that this waited for included")

_USED, _NOW = ("used_bytes", "value_bytes"), ("values", "segments", "reserved_bytes")
"""Of Storage.stats: how much is used, by backend, and what else is no counter."""

KEPT_OBSERVATIONS = 1 << 16
"""Durations that wait for a MetricsMirror's update."""


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
        self.eviction = Histogram(bounds)
        self.observed: deque[tuple[str, str, float]] | None = None
        """For a mirror: (name of the histogram, kind or "", seconds)."""

    def finished(self, event: Finished) -> None:
        """An operation has ended. One that never moved a byte (refused, cancelled early) has no duration."""
        key = (event.kind, event.outcome)
        self.outcomes[key] = self.outcomes.get(key, 0) + 1
        self.latencies[event.kind].observe(event.latency_s)
        if self.observed is not None:
            self.observed.append((_LATENCY[0], event.kind, event.latency_s))
        if event.num_bytes:
            self.num_bytes[event.kind] += event.num_bytes
            self.durations[event.kind].observe(event.seconds)
            if self.observed is not None:
                self.observed.append((_HISTOGRAMS[event.kind][0], "", event.seconds))

    def evicted(self, tier: Literal["device", "host"], num_tokens: int) -> None:
        """Tokens have left a tier."""
        self.evictions[tier] += 1

    def made_room(self, num_tokens: int, seconds: float) -> None:
        """An eviction for device tokens has ended."""
        self.eviction.observe(seconds)
        if self.observed is not None:
            self.observed.append((_EVICTION[0], "", seconds))

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
        self._controller, self.listener, self._tree = controller, listener, tree
        self._host, self._store, self._publisher = host, store, publisher
        self.labels, self.prefix = dict(labels or {}), prefix

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
        if self.listener is not None:
            yield from self._of_durations(self.listener)
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
        yield self._counter("attributed_requests", "Requests whose prompts are counted here", stats.requests)
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
        text = "Operations that ended well; of prefetches, that began"
        yield self._by("counter", "operations", text, "kind", begun.items())
        yield self._by("counter", "operation_failures", "Operations that failed", "kind", failed.items())
        text = "Operations not begun: no room, no capacity, storage left alone"
        yield self._by("counter", "refused_operations", text, "kind", refused.items())
        yield self._counter("broken_loads", "Loads that failed for good: off the host", stats.broken_loads)
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
        text = "Tokens in flight beyond which prefetches are refused; 0 without storage"
        yield self._gauge("prefetch_capacity_tokens", text, stats.prefetch_capacity_tokens)
        yield self._gauge("stuck_pages", "Pages of operations given up that still run", stats.stuck_pages)

    def _of_durations(self, listener: MetricsListener) -> Iterator[Any]:
        core = self._families
        shown = [(_HISTOGRAMS[kind], listener.durations[kind]) for kind in _KINDS] + [(_EVICTION, listener.eviction)]
        for (name, text), durations in shown:
            family = core.HistogramMetricFamily(self.prefix + name, text, labels=list(self.labels))
            family.add_metric(list(self.labels.values()), durations.buckets(), durations.total)
            yield family
        name, text = _LATENCY
        family = core.HistogramMetricFamily(self.prefix + name, text, labels=[*self.labels, "kind"])
        for kind, latency in listener.latencies.items():
            family.add_metric([*self.labels.values(), kind], latency.buckets(), latency.total)
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
            f"{self.prefix}operation_outcomes", "How operations ended", labels=[*self.labels, "kind", "outcome"]
        )
        for (kind, outcome), count in sorted((_NO_OUTCOMES | listener.outcomes.copy()).items()):
            family.add_metric([*self.labels.values(), kind, outcome], count)
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
        breaker = getattr(store, "breaker", None)
        if breaker is not None:
            yield self._gauge("storage_breaker_open", "1 while calls are refused after failures in a row", breaker.open)
            yield self._counter("storage_breaker_opened", "Times that it opened", breaker.times_opened)
        yield from self._of_backend(store.storage)

    def _of_backend(self, storage: Any) -> Iterator[Any]:
        """What the backend itself knows. One that cannot say it now is not shown; the rest is."""
        try:
            stats, lost = dict(storage.stats()), storage.lost()
        except (RadixKVError, OSError):
            return
        yield self._counter("storage_lost_values", "Values that have gone, as far as the backend knows", lost)
        for name in _USED:
            if name in stats:
                yield self._gauge("storage_used_bytes", "Bytes that the backend holds", stats.pop(name))
        budget = getattr(getattr(storage, "folder", storage), "max_bytes", None)
        if budget is not None:
            yield self._gauge("storage_budget_bytes", "Bytes that the backend may hold", budget)
        now = {name: stats.pop(name) for name in _NOW if name in stats}
        for name, text in (("values", "Values that the backend holds"), ("segments", "Files that the values are in"),
                           ("reserved_bytes", "Bytes that are being written")):  # fmt: skip
            if name in now:
                yield self._gauge(f"storage_{name}", text, now[name])
        yield self._by("counter", "storage_backend_events", "Counters of the backend", "event", stats.items())

    def _of_events(self, stats: Any) -> Iterator[Any]:
        for name in ("batches", "events", "dropped_batches", "snapshots", "replays", "short_replays", "bad_requests",
                     "slow_subscribers"):
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
        family = make(self.prefix + name, text, labels=[*self.labels, *more])
        for values, value in samples:
            family.add_metric([*self.labels.values(), *values], float(value))
        return family


def _undisturbed(read: Callable[[], ControllerStats], tries: int = 100) -> ControllerStats:
    """Read what another thread changes: a container that grew while it was counted raises, and is counted again."""
    for _ in range(tries - 1):
        with contextlib.suppress(RuntimeError):
            return read()
    return read()


class MetricsMirror:
    """The same metrics as Counters, Gauges and Histograms of prometheus_client, brought up to date by ``update``.

    For its multiprocess mode, in which the process that answers Prometheus (SGLang's HTTP server) reads what others
    have written to PROMETHEUS_MULTIPROC_DIR, and knows nothing of their collectors. Where one process does both, the
    collector alone is right.

    Args:
        collector: of this process. Its labels must tell processes apart (tp_rank, dp_rank): counters of equal labels
            add up, of gauges of equal labels the latest stands.
        registry: to register with; None: prometheus_client.REGISTRY. Histograms count what ends from now on.
    Raises: ValueError (of prometheus_client) if the registry has the names already; StateError if the collector's
        listener has a mirror.
    """

    def __init__(self, collector: MetricsCollector, registry: Any = None) -> None:
        self._client = require("prometheus_client", "metrics", "metrics")
        self._collector = collector
        self._registry = self._client.REGISTRY if registry is None else registry
        self._metrics: dict[str, Any] = {}
        self._histograms: dict[tuple[str, str], Any] = {}
        self._before: dict[tuple[str, tuple[str, ...]], float] = {}
        self._observed: deque[tuple[str, str, float]] = deque(maxlen=KEPT_OBSERVATIONS)
        listener = collector.listener
        if listener is not None:
            if listener.observed is not None:
                raise StateError("this listener has a mirror already, which takes its durations")
            self._make_histograms(listener.eviction.bounds)
            listener.observed = self._observed

    def _make_histograms(self, bounds: Sequence[float]) -> None:
        labels = self._collector.labels
        for name, text in (*_HISTOGRAMS.values(), _EVICTION, _LATENCY):
            kinds: tuple[str, ...] = _KINDS if name == _LATENCY[0] else ("",)
            histogram = self._client.Histogram(
                self._collector.prefix + name, text, [*labels, *(["kind"] if kinds[0] else [])],
                registry=self._registry, buckets=bounds,
            )  # fmt: skip
            for kind in kinds:
                own = [*labels.values(), *([kind] if kind else [])]
                self._histograms[name, kind] = histogram.labels(*own) if own else histogram

    def update(self) -> None:
        """Bring all up to date: about a millisecond, and what the storage backend takes to say how it is. Call it every
        second or so, from one thread; not the scheduler's, if the backend is on a slow disk.

        Beyond 65,536 durations since the last time the oldest are lost, and only to the histograms.
        """
        for family in self._collector.collect():
            for sample in family.samples if family.type != "histogram" else ():
                values = tuple(sample.labels.values())
                metric = self._metric(family, list(sample.labels))
                child = metric.labels(*values) if values else metric
                if family.type == "gauge":
                    child.set(sample.value)
                    continue
                before = self._before.get((family.name, values), 0.0)
                self._before[family.name, values] = sample.value
                child.inc(sample.value - before if sample.value >= before else sample.value)  # below: it began anew
        while self._observed:
            name, kind, seconds = self._observed.popleft()
            self._histograms[name, kind].observe(seconds)

    def _metric(self, family: Any, labels: list[str]) -> Any:
        metric = self._metrics.get(family.name)
        if metric is None:
            client, name, text = self._client, family.name, family.documentation
            if family.type == "gauge":
                metric = client.Gauge(name, text, labels, registry=self._registry, multiprocess_mode="mostrecent")
            else:
                metric = client.Counter(name, text, labels, registry=self._registry)
            self._metrics[name] = metric
        return metric


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
