"""A tiny model serves through the whole stack: each request is judged, and each fault is seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from radixkv.demo import server as server_module
from radixkv.demo.config import DemoConfig
from radixkv.demo.run import flip_in_files
from radixkv.demo.server import ChatServer, Served
from radixkv.demo.verify import (
    Reference,
    Verdict,
    exchange_host_pages,
    flip_host_page,
    host_page_sample,
    host_pages_of,
)
from radixkv.engines.models import ChatModel
from radixkv.errors import InvalidArgumentError, RadixKVError

from ..engines.kit import random_tokens, tiny

CONFIG = DemoConfig(page_size=8, chunk_tokens=16, device_tokens=160, host_tokens=320)

Make = Callable[..., tuple[ChatServer, Reference]]


@pytest.fixture(scope="module")
def model() -> ChatModel:
    return tiny()


@pytest.fixture
def make(model: ChatModel, tmp_path: Path) -> Iterator[Make]:
    """Servers on one folder, each with a reference; closed at the end."""
    servers: list[ChatServer] = []

    def start(config: DemoConfig = CONFIG) -> tuple[ChatServer, Reference]:
        servers.append(ChatServer(model, config, tmp_path))
        return servers[-1], Reference(servers[-1].runner, model.text_tokens)

    yield start
    for server in servers:
        server.close()


def tiers(served: Served) -> tuple[int, ...]:
    assert sum(served.attribution) == served.prompt_tokens
    return tuple(served.attribution)


def test_device_host_and_storage_give_the_bits_of_recomputation(make: Make) -> None:
    server, reference = make()
    prompts = [random_tokens(100, seed) for seed in range(4)]
    verdicts: list[Verdict] = []
    for i, prompt in enumerate(prompts):
        served = server.serve(f"first-{i}", prompt, 6)
        assert tiers(served) == (0, 0, 0, 100)
        verdicts.append(reference.judge(served))
    again = server.serve("again", prompts[3], 6)
    assert tiers(again) == (96, 0, 0, 4)
    verdicts.append(reference.judge(again))
    server.settle()
    evicted = server.serve(
        "evicted", prompts[1], 6
    )  # of four prompts one and a bit fit on the device, three on the host
    assert tiers(evicted)[0] == 0
    assert tiers(evicted)[1] > 0
    verdicts.append(reference.judge(evicted))
    server.settle()
    server.cache.evict(10**6)
    server.cache.evict_host(10**6)
    stored = server.serve("stored", prompts[0], 6)
    assert tiers(stored) == (0, 0, 96, 4)
    verdicts.append(reference.judge(stored))
    longer = np.concatenate([stored.tokens, random_tokens(20, 9)])
    verdicts.append(reference.judge(server.serve("longer", longer, 6)))
    assert all(verdict.right for verdict in verdicts), verdicts
    assert {verdict.pages for verdict in verdicts} == {13, 16}
    assert verdicts[0].rows == 105
    server.settle()
    server.check_integrity()


def test_another_server_on_the_folder_has_what_the_first_left(make: Make) -> None:
    server, _ = make()
    prompt = random_tokens(90, 5)
    first = server.serve("a", prompt, 5)
    server.settle()
    server.close()
    server, reference = make()
    second = server.serve("a", prompt, 5)
    assert tiers(second) == (0, 0, 88, 2)
    assert second.answer == first.answer
    assert reference.judge(second).right


def test_metrics_of_a_real_run(make: Make) -> None:
    client = pytest.importorskip("prometheus_client")
    from prometheus_client.parser import text_string_to_metric_families

    from radixkv.metrics import MetricsCollector

    server, _ = make()
    core = server.cache.cache_controller.core
    attributions = []
    for name, seed in (("a", 1), ("b", 2), ("c", 3), ("a-again", 1), ("a-once-more", 1)):
        attributions.append(server.serve(name, random_tokens(100, seed), 3).attribution)
        server.settle()
    server.cache.evict(10**6)
    server.cache.evict_host(10**6)
    attributions.append(server.serve("b-again", random_tokens(100, 2), 3).attribution)
    server.settle()
    registry = client.CollectorRegistry()
    registry.register(
        MetricsCollector(controller=core, listener=server.listener, host=server.cache.token_to_kv_pool_host)
    )
    text = client.generate_latest(registry).decode()
    values = {
        (sample.name.removeprefix("radixkv:"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text) for sample in family.samples
    }  # fmt: skip
    for tier in ("device", "host", "storage"):
        expected = sum(getattr(attribution, f"{tier}_tokens") for attribution in attributions)
        assert values["cached_tokens_total", tier] == expected > 0
    assert values["prompt_tokens_total",] == 600
    token_bytes = server.pool.geometry.token_bytes
    stats = core.stats()
    assert values["hicache_backup_bytes_total",] == stats.backup_tokens * token_bytes > 0
    assert values["load_back_bytes_total",] == stats.load_tokens * token_bytes > 0
    assert values["backuped_bytes_total",] == values["storage_bytes_written_total",] > 0
    assert values["prefetched_bytes_total",] == values["storage_bytes_read_total",] == 96 * token_bytes
    assert values["hicache_backup_duration_seconds_count",] == stats.backups
    assert values["load_back_duration_seconds_sum",] > 0
    assert values["operation_outcomes_total", "prefetch", "done"] == 1
    assert values["evicted_tokens_total",] == stats.device_evicted_tokens > 0
    assert values["hicache_host_used_tokens",] == server.cache.tree.stats().host_tokens
    assert values["storage_pages_total", "corrupt"] == 0
    assert list(server.listener.requests) == attributions
    server.cache.detach_storage_backend()
    assert "storage_pages_total" not in client.generate_latest(registry).decode()


def on_host(server: ChatServer, prompt: np.ndarray) -> np.ndarray:
    server.serve("before", prompt, 1)
    server.settle()
    server.cache.evict(10**6)
    on_device, pages = host_pages_of(server.cache.tree, prompt)
    assert on_device == 0
    return pages


def test_flipped_bits_on_the_host_are_seen(make: Make) -> None:
    server, reference = make()
    server.cache.detach_storage_backend()
    prompt = random_tokens(100, 6)
    pages = on_host(server, prompt)
    assert flip_host_page(server.cache.token_to_kv_pool_host, int(pages[4])) > 0
    served = server.serve("a", prompt, 4)
    assert tiers(served) == (0, 96, 0, 4)
    verdict = reference.judge(served)
    assert not verdict.right
    assert verdict.wrong_rows == verdict.rows
    assert verdict.max_difference > 0
    assert 4 in verdict.wrong_pages
    assert not {0, 1, 2, 3, 5, 11} & set(verdict.wrong_pages)  # what came from the host in order is right


def test_exchanged_host_pages_are_seen(make: Make) -> None:
    server, reference = make()
    server.cache.detach_storage_backend()
    prompt = random_tokens(100, 7)
    pages = on_host(server, prompt)
    exchange_host_pages(server.cache.token_to_kv_pool_host, int(pages[2]), int(pages[7]))
    verdict = reference.judge(server.serve("a", prompt, 4))
    assert {2, 7} <= set(verdict.wrong_pages)
    assert not {3, 4, 5, 6} & set(verdict.wrong_pages)


def test_a_flipped_bit_in_a_file_is_a_miss(make: Make, tmp_path: Path) -> None:
    server, _ = make()
    prompt = random_tokens(100, 8)
    pages = on_host(server, prompt)
    sample = host_page_sample(server.cache.token_to_kv_pool_host, int(pages[5]))
    server.close()
    assert flip_in_files(tmp_path, sample) is not None
    assert flip_in_files(tmp_path, sample) is None  # it is another page now
    server, reference = make()
    served = server.serve("a", prompt, 4)
    assert tiers(served) == (0, 0, 40, 60)
    assert reference.judge(served).right
    assert server.cache.cache_controller.core.storage.counters.corrupt == 1


def test_what_does_not_fit_is_an_error(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "PATIENCE_S", 0.2)
    server, _ = make()
    with pytest.raises(RadixKVError, match="no room for 200 tokens on a device of 160"):
        server.serve("a", random_tokens(200, 1), 1)


def test_capacities_follow_from_the_chats() -> None:
    config = DemoConfig(page_size=16).sized(1000)
    assert (config.device_tokens, config.host_tokens) == (1024, 1840)
    assert DemoConfig(device_tokens=2048).sized(1000).device_tokens == 2048
    with pytest.raises(InvalidArgumentError, match="needs 1024"):
        DemoConfig(device_tokens=64).sized(1000)
    for options in ({"users": 0}, {"device_tokens": 20}, {"host_tokens": -16}):
        with pytest.raises(InvalidArgumentError, match=next(iter(options))):
            DemoConfig(**options)  # type: ignore[arg-type]
