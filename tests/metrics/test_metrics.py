"""What Prometheus reads: parsed again by its own parser, and compared with the parts' counters."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

import radixkv
from radixkv.controller.base import Attribution, ControllerStats, Finished, Kind
from radixkv.errors import InvalidArgumentError, StateError, StorageError
from radixkv.metrics import (
    DURATION_BUCKETS_S,
    Histogram,
    MetricsCollector,
    MetricsListener,
    MetricsMirror,
    serve_metrics,
)
from radixkv.pool.host import HostKVCache, HostPoolConfig
from radixkv.pool.layout import KVGeometry
from radixkv.storage.breaker import Breaker, BreakerConfig
from radixkv.storage.file import FileStorage
from radixkv.storage.memory import MemoryStorage
from radixkv.storage.namespace import PageNamespace
from radixkv.storage.pages import PageStore, host_page_parts
from radixkv.storage.sealed import PageCounters

GEOMETRY = KVGeometry(kind="mha", num_layers=2, num_heads=2, head_bytes=16, page_size=4)


class FakeController:
    def __init__(self, stats: ControllerStats) -> None:
        self.now = stats

    def stats(self) -> ControllerStats:
        return self.now


def parsed(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(name, labels) -> value, of every sample."""
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.name.startswith("radixkv:")
        assert family.documentation
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in found, f"{key} twice"
            found[key] = sample.value
    return found


def scrape(**parts: Any) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    registry = CollectorRegistry()
    registry.register(MetricsCollector(**parts))
    return parsed(generate_latest(registry).decode())


def value(samples: Any, name: str, **labels: str) -> float:
    return samples["radixkv:" + name, tuple(sorted(labels.items()))]


def numbered() -> ControllerStats:
    """Another power of two in every counter, so that sums tell their parts."""
    return ControllerStats(**{name: 1 << i for i, name in enumerate(ControllerStats._fields)})


def test_hits_by_tier_and_what_was_computed() -> None:
    stats = ControllerStats(device_tokens=500, host_tokens=300, storage_tokens=150, computed_tokens=50)
    samples = scrape(controller=FakeController(stats))
    assert value(samples, "prompt_tokens_total") == 1000
    by_tier = {tier: value(samples, "cached_tokens_total", cache_source=tier) for tier in ("device", "host", "storage")}
    assert by_tier == {"device": 500, "host": 300, "storage": 150}
    assert value(samples, "computed_tokens_total") == 50
    assert value(samples, "cache_hit_rate") == 0.95
    assert value(scrape(controller=FakeController(ControllerStats())), "cache_hit_rate") == 0


NOT_SHOWN = {
    "load_batches": "load_back_duration_seconds counts batches",
    "dropped_nodes": "hicache_dropped_tokens says how much",
    "partial_stores": "operation_outcomes",
    "polls": "no figure anybody acts on",
}


def test_no_counter_of_the_controller_is_forgotten() -> None:
    stats = numbered()
    shown = scrape(controller=FakeController(stats)).values()
    for name, number in stats._asdict().items():
        in_some_sample = any(int(total) & number for total in shown)
        assert in_some_sample != (name in NOT_SHOWN), name


def test_the_names_that_dashboards_of_sglang_know() -> None:
    stats = numbered()
    samples = scrape(controller=FakeController(stats))
    for name, expected in {
        "evicted_tokens_total": stats.device_evicted_tokens,
        "load_back_tokens_total": stats.load_tokens,
        "hicache_backup_tokens_total": stats.backup_tokens + stats.write_back_tokens,
        "hicache_dropped_tokens_total": stats.dropped_tokens,
        "prefetched_tokens_total": stats.prefetch_tokens,
        "backuped_tokens_total": stats.store_tokens,
    }.items():
        assert value(samples, name) == expected


def test_durations_bytes_and_outcomes() -> None:
    listener = MetricsListener()
    for seconds in (0.0015, 0.003, 0.07, 100.0):
        listener.finished(Finished("load", "done", 64, 4096, seconds, seconds + 1))
    listener.finished(Finished("prefetch", "revoked", 0, 0, 0.0, 0.2))
    listener.finished(Finished("backup", "done", 16, 1000, 0.001, 0.001))
    listener.finished(Finished("write_back", "dropped", 0, 0, 0.0, 0.0))
    listener.finished(Finished("write_back", "done", 16, 500, 0.001, 0.001))
    samples = scrape(listener=listener, labels={"tp_rank": "3"})
    le = {
        bound: value(samples, "load_back_duration_seconds_bucket", tp_rank="3", le=bound)
        for bound in ("0.001", "0.002", "0.003", "0.05", "0.1", "5.0", "+Inf")
    }
    assert le == {"0.001": 0, "0.002": 1, "0.003": 2, "0.05": 2, "0.1": 3, "5.0": 3, "+Inf": 4}
    assert value(samples, "load_back_duration_seconds_count", tp_rank="3") == 4
    assert value(samples, "load_back_duration_seconds_sum", tp_rank="3") == pytest.approx(100.0745)
    assert value(samples, "load_back_bytes_total", tp_rank="3") == 4 * 4096
    assert value(samples, "hicache_backup_bytes_total", tp_rank="3") == 1500
    assert value(samples, "prefetch_duration_seconds_count", tp_rank="3") == 0  # nothing was read
    assert value(samples, "operation_latency_seconds_count", tp_rank="3", kind="prefetch") == 1
    outcomes = {
        (dict(labels)["kind"], dict(labels)["outcome"]): count
        for (name, labels), count in samples.items() if name == "radixkv:operation_outcomes_total"
    }  # fmt: skip
    assert len(outcomes) == 20, "those that have not happened yet are there as 0"
    assert ("store", "revoked") in outcomes
    assert {key: count for key, count in outcomes.items() if count} == {
        ("load", "done"): 4, ("prefetch", "revoked"): 1, ("backup", "done"): 1, ("write_back", "dropped"): 1,
        ("write_back", "done"): 1,
    }  # fmt: skip


def test_the_newest_requests_are_kept() -> None:
    listener = MetricsListener(recent=3)
    for i in range(5):
        listener.attributed(Attribution(i, 0, 0, 10 - i))
    assert [request.device_tokens for request in listener.requests] == [2, 3, 4]


def test_tree_host_pool_storage_and_publisher() -> None:
    tree = radixkv.RadixTree(page_size=4, events=True, max_events=2)
    node = tree.insert(np.arange(12), [0, 1, 2]).node
    tree.lock(node)
    tree.insert([7] * 4, [3])
    host = HostKVCache(GEOMETRY, 32, "page_first", config=HostPoolConfig(headroom_bytes=0))
    host.alloc(12)
    name = PageNamespace.of_geometry(GEOMETRY, host.page_dims, model="m", dtype="float32")
    store = PageStore(MemoryStorage(), name, host_page_parts(host))
    digests = np.arange(3 * 32, dtype=np.uint8).reshape(3, 32)
    store.set_pages(digests[:2], np.array([0, 1], np.int32))
    store.get_pages(digests, np.array([0, 1, 2], np.int32))
    samples = scrape(tree=tree, host=host, store=store)
    assert value(samples, "kv_evictable_tokens") == 4
    assert value(samples, "kv_protected_tokens") == 12
    assert value(samples, "radix_tree_nodes") == 2
    assert value(samples, "kv_events_dropped_total") == tree.stats().dropped_events > 0
    assert value(samples, "hicache_host_total_tokens") == 32
    assert value(samples, "hicache_host_used_tokens") == 12
    results = {which: value(samples, "storage_pages_total", result=which) for which in ("stored", "hits", "misses")}
    assert results == {"stored": 2, "hits": 2, "misses": 1}
    assert value(samples, "storage_pages_total", result="corrupt") == 0
    assert value(samples, "storage_bytes_read_total") == 2 * GEOMETRY.page_bytes
    assert value(samples, "storage_failed_calls_total", reason="timeouts") == 0
    assert value(samples, "storage_values") == 2
    assert value(samples, "storage_backend_events_total", event="evicted") == 0
    host.close()


def test_a_backend_that_says_nothing_spoils_no_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise StorageError("the journal is gone")

    monkeypatch.setattr(MemoryStorage, "stats", refuse)
    host = HostKVCache(GEOMETRY, 32, "page_first", config=HostPoolConfig(headroom_bytes=0))
    name = PageNamespace.of_geometry(GEOMETRY, host.page_dims, model="m", dtype="float32")
    store = PageStore(MemoryStorage(), name, host_page_parts(host))
    assert value(scrape(store=store), "storage_pages_total", result="hits") == 0
    host.close()


def test_a_store_left_alone_by_its_breaker_shows() -> None:
    """Also where the controller has seen no failure: to it, the pages of a dead store are misses."""

    class Idle:
        storage: Any = None

        def stats(self) -> ControllerStats:
            return ControllerStats()

    class Left:
        counters = PageCounters()
        breaker = Breaker(BreakerConfig(failures=1))
        storage = MemoryStorage()

    controller = Idle()
    assert value(scrape(controller=controller), "storage_backing_off") == 0
    controller.storage = Left()
    assert value(scrape(controller=controller), "storage_backing_off") == 0
    Left.breaker.failed()
    samples = scrape(controller=controller)
    assert value(samples, "storage_backing_off") == 1
    assert value(samples, "storage_breaker_open") == value(samples, "storage_breaker_opened_total") == 1
    Left.breaker.failed()  # a trial
    Left.breaker.succeeded()
    Left.breaker.failed()
    assert value(scrape(controller=controller), "storage_breaker_opened_total") == 2


def test_the_budget_of_a_backend(tmp_path: Path) -> None:
    memory = MemoryStorage(max_bytes=100)
    host = HostKVCache(GEOMETRY, 32, "page_first", config=HostPoolConfig(headroom_bytes=0))
    name = PageNamespace.of_geometry(GEOMETRY, host.page_dims, model="m", dtype="float32")
    for key in ("a", "b", "c"):
        memory.put_many([key], [[memoryview(bytes(40))]])
    samples = scrape(store=PageStore(memory, name, host_page_parts(host)))
    assert value(samples, "storage_used_bytes") == 80
    assert value(samples, "storage_budget_bytes") == 100
    assert value(samples, "storage_values") == 2
    assert value(samples, "storage_lost_values_total") == 1
    assert value(samples, "storage_backend_events_total", event="evicted") == 1
    with FileStorage(tmp_path, max_bytes=1 << 20) as files:
        files.put_many(["a"], [[memoryview(bytes(40))]])
        samples = scrape(store=PageStore(files, name, host_page_parts(host)))
        assert 40 <= value(samples, "storage_used_bytes") < 1 << 20
        assert value(samples, "storage_budget_bytes") == 1 << 20
        assert value(samples, "storage_backend_events_total", event="no_room") == 0
    host.close()


@pytest.fixture
def everything(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """All parts that a collector can show, with a sample in every family."""
    pytest.importorskip("zmq")
    pytest.importorskip("msgspec")
    from radixkv.events import EventConfig, EventPublisher

    host = HostKVCache(GEOMETRY, 32, "page_first", config=HostPoolConfig(headroom_bytes=0))
    name = PageNamespace.of_geometry(GEOMETRY, host.page_dims, model="m", dtype="float32")
    listener = MetricsListener()
    for kind in get_args(Kind):
        listener.finished(Finished(kind, "done", 64, 4096, 0.003, 0.02))
    listener.made_room(64, 0.0007)
    files = FileStorage(tmp_path, max_bytes=1 << 20)
    publisher = EventPublisher(4, EventConfig(endpoint="tcp://127.0.0.1:*"))
    yield {
        "controller": FakeController(numbered()), "listener": listener, "tree": radixkv.RadixTree(page_size=4),
        "host": host, "store": PageStore(files, name, host_page_parts(host)), "publisher": publisher,
    }  # fmt: skip
    publisher.close()
    files.close()
    host.close()


ROW = re.compile(r"^\| `(\w+)` \| (counter|gauge|histogram) \| ([\w -]+) \| (.*?) \| .+ \|$", re.MULTILINE)


def test_the_documentation_lists_what_there_is(everything: dict[str, Any]) -> None:
    """Every metric with its type, unit and labels; and no other."""
    text = (Path(__file__).parents[2] / "docs" / "observability.md").read_text()
    listed = {}
    for name, kind, unit, labels in ROW.findall(text):
        assert name not in listed, name
        listed[name] = (kind, set(re.findall(r"`(\w+)`", labels)))
        assert name.endswith("_total") == (kind == "counter"), name
        if unit in ("tokens", "bytes", "seconds", "pages"):
            assert re.search(rf"_{unit}(_|$)", name), f"{name} is in {unit}, and does not say so"
    there = {}
    for family in MetricsCollector(**everything, labels={"tp_rank": "0"}).collect():
        name = family.name.removeprefix("radixkv:") + ("_total" if family.type == "counter" else "")
        assert name not in there, f"{name} twice"
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert "tp_rank" in labels, name
        there[name] = (family.type, labels - {"tp_rank"})
    assert listed == there


def test_labels_have_few_values(everything: dict[str, Any]) -> None:
    """None is a request, a key, a tenant: a label's values are those of the code."""
    series: dict[str, int] = {}
    for name, _ in scrape(**everything):
        series[name] = series.get(name, 0) + 1
    assert all(number <= 20 for name, number in series.items() if not name.endswith("_bucket")), series
    assert sum(series.values()) < 500


def test_how_long_evictions_take() -> None:
    listener = MetricsListener()
    listener.made_room(100, 0.004)
    samples = scrape(listener=listener)
    assert value(samples, "eviction_duration_seconds_count") == 1
    assert value(samples, "eviction_duration_seconds_bucket", le="0.003") == 0
    assert value(samples, "eviction_duration_seconds_bucket", le="0.004") == 1


# ---- other processes -------------------------------------------------------------------------------------------------
def test_a_mirror_shows_what_the_collector_shows(everything: dict[str, Any]) -> None:
    listener = everything["listener"] = MetricsListener()
    collector = MetricsCollector(**everything, labels={"tp_rank": "1"})
    registry = CollectorRegistry()
    mirror = MetricsMirror(collector, registry)
    with pytest.raises(StateError, match="mirror"):
        MetricsMirror(collector, CollectorRegistry())
    for round_ in range(3):
        listener.finished(Finished("load", "done", 64, 4096, 0.002 * round_, 0.003))
        listener.finished(Finished("prefetch", "timeout", 0, 0, 0.0, 3.0))
        listener.made_room(64, 0.0007)
        everything["controller"].now = ControllerStats(device_tokens=10 * round_, writes_in_flight=3 - round_)
        mirror.update()
        wanted = CollectorRegistry()
        wanted.register(collector)
        shown = parsed(generate_latest(registry).decode())
        shown = {key: number for key, number in shown.items() if not key[0].endswith("_created")}
        counted = parsed(generate_latest(wanted).decode())
        assert shown.keys() == counted.keys()
        for key, number in counted.items():
            assert shown[key] == pytest.approx(number), key


CHILD = """
import sys
from prometheus_client import CollectorRegistry
from radixkv.controller.base import ControllerStats, Finished
from radixkv.metrics import MetricsCollector, MetricsListener, MetricsMirror

rank = int(sys.argv[1])
listener = MetricsListener()

class Controller:
    def stats(self):
        return ControllerStats(device_tokens=100 * (rank + 1), writes_in_flight=rank)

collector = MetricsCollector(controller=Controller(), listener=listener, labels={"tp_rank": str(rank)})
mirror = MetricsMirror(collector, CollectorRegistry())
for _ in range(rank + 1):
    listener.finished(Finished("load", "done", 64, 4096, 0.003, 0.02))
    mirror.update()
"""


def test_processes_that_another_one_answers_for(tmp_path: Path) -> None:
    """As SGLang serves: schedulers write to a folder, the HTTP server reads it."""
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    ranks = [
        subprocess.Popen([sys.executable, "-c", CHILD, str(rank)], env=environment, stderr=subprocess.PIPE)
        for rank in (0, 1)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors.decode()[-2000:]
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))
    samples = parsed(generate_latest(registry).decode())
    for rank, tokens in (("0", 100), ("1", 200)):
        assert value(samples, "cached_tokens_total", cache_source="device", tp_rank=rank) == tokens
        assert value(samples, "queued_operations", kind="backup", tp_rank=rank) == int(rank)
        assert value(samples, "load_back_duration_seconds_count", tp_rank=rank) == int(rank) + 1
        assert value(samples, "load_back_duration_seconds_bucket", tp_rank=rank, le="0.002") == 0


def test_the_event_publisher() -> None:
    pytest.importorskip("zmq")
    pytest.importorskip("msgspec")
    from radixkv.events import EventConfig, EventPublisher

    tree = radixkv.RadixTree(page_size=4, events=True)
    tree.insert(np.arange(8), [0, 1])
    with EventPublisher(4, EventConfig(endpoint="tcp://127.0.0.1:*")) as publisher:
        publisher.drain(tree)
        deadline = time.monotonic() + 10
        while publisher.stats().batches < 1 and time.monotonic() < deadline:
            time.sleep(0.001)
        samples = scrape(publisher=publisher)
    assert value(samples, "kv_event_publisher_batches_total") == 1
    assert value(samples, "kv_event_publisher_events_total") == 2
    assert value(samples, "kv_event_publisher_dropped_batches_total") == 0


def test_served_over_http() -> None:
    controller = FakeController(ControllerStats(device_tokens=3))
    server, thread = serve_metrics(MetricsCollector(controller=controller), 0)
    try:
        for expected in (3, 8):
            controller.now = ControllerStats(device_tokens=expected)
            with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=10) as answer:
                samples = parsed(answer.read().decode())
            assert value(samples, "cached_tokens_total", cache_source="device") == expected
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def test_a_scrape_while_operations_finish() -> None:
    listener = MetricsListener()
    outcomes = ("done", "failed", "revoked", "partial", "dropped", "cancelled")
    stop = threading.Event()

    def work() -> None:
        i = 0
        while not stop.is_set():
            listener.finished(Finished("load", outcomes[i % 6], 1, 1, 0.001 * (i % 7), 0.1))
            i += 1
            if i % 5000 == 0:
                listener.outcomes.clear()  # so that keys are new again and again

    worker = threading.Thread(target=work)
    worker.start()
    counts = [value(scrape(listener=listener), "load_back_duration_seconds_count") for _ in range(30)]
    stop.set()
    worker.join(10)
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]


def test_counters_that_change_while_they_are_read() -> None:
    class Busy(FakeController):
        left = 5

        def stats(self) -> ControllerStats:
            self.left -= 1
            if self.left >= 0:
                raise RuntimeError("deque mutated during iteration")
            return self.now

    assert value(scrape(controller=Busy(ControllerStats(loads=3))), "operations_total", kind="load") == 3


def test_histograms_sort_by_upper_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for number in (0.5, 1.0, 1.5, 2.0, 3.0):
        histogram.observe(number)
    assert histogram.buckets() == [("1.0", 2), ("2.0", 4), ("+Inf", 5)]
    assert list(DURATION_BUCKETS_S) == sorted(DURATION_BUCKETS_S)
    for bounds in ((), (2.0, 1.0), (1.0, 1.0)):
        with pytest.raises(InvalidArgumentError, match="ascend"):
            Histogram(bounds)


def test_telling_costs_microseconds() -> None:
    listener = MetricsListener()
    event = Finished("load", "done", 64, 4096, 0.002, 0.003)
    best = min(_time(listener, event) for _ in range(5))
    assert best < 50e-6  # a microsecond, on a machine that may be busy


def _time(listener: MetricsListener, event: Finished) -> float:
    begin = time.perf_counter()
    for _ in range(1000):
        listener.finished(event)
    return (time.perf_counter() - begin) / 1000
