"""What a listener is told, and what the counters say: of one life of a prompt."""

from __future__ import annotations

from typing import Any

from radixkv.controller import Attribution, Finished
from radixkv.errors import TransferError

from .kit import GEOMETRY, ROOT, P, Stack, prompt


class Ear:
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def finished(self, event: Finished) -> None:
        assert event.num_bytes == event.num_tokens * GEOMETRY.token_bytes
        assert event.seconds >= 0 <= event.latency_s
        self.heard.append((event.kind, event.outcome, event.num_tokens // P))

    def evicted(self, tier: str, num_tokens: int) -> None:
        self.heard.append((tier, num_tokens // P))

    def attributed(self, attribution: Attribution) -> None:
        self.heard.append(attribution)

    def take(self) -> list[Any]:
        heard, self.heard = self.heard, []
        return heard


def test_a_prompts_life() -> None:
    ear = Ear()
    stack = Stack(storage=True, listener=ear, store_after_backup=True)
    tokens = prompt(1, 3)
    stack.compute(tokens)
    stack.settle()
    assert ear.take() == [("backup", "done", 3), ("store", "done", 3)]
    stack.controller.evict(3 * P)
    stack.controller.evict_host(3 * P)
    assert ear.take() == [("device", 3), ("host", 3)]
    stack.controller.prefetch("r", tokens, ROOT)
    stack.edge.run()
    stack.controller.poll()
    stack.edge.run()
    stack.controller.poll()
    stack.controller.finish_prefetch("r")
    assert ear.take() == [("prefetch", "done", 3)]
    match = stack.controller.match(tokens)
    load = stack.controller.load(match.host_node)
    assert load is not None
    stack.controller.start_loads()
    stack.settle()
    stack.controller.attribute("r", 4 * P, match, load.num_tokens)
    assert ear.take() == [("load", "done", 3), Attribution(0, 0, 3 * P, P)]
    stats = stack.controller.stats()
    assert (stats.backup_tokens, stats.store_tokens, stats.prefetch_tokens, stats.load_tokens) == (3 * P,) * 4
    assert (stats.storage_tokens, stats.computed_tokens) == (3 * P, P)


def test_what_goes_wrong() -> None:
    ear = Ear()
    stack = Stack(storage=True, listener=ear, prefetch_policy="wait_complete")
    stack.mover.fail = lambda kind: TransferError("down")
    stack.compute(prompt(1, 3))
    stack.settle()
    stack.controller.prefetch("miss", prompt(2, 3), ROOT)
    stack.settle()
    stack.controller.poll()
    stack.controller.prefetch("given up", prompt(2, 3), ROOT)
    stack.controller.cancel_prefetch("given up")
    assert ear.take() == [("backup", "failed", 0), ("prefetch", "revoked", 0), ("prefetch", "cancelled", 0)]
    stack.compute(prompt(1, 3))
    stack.controller.reset()
    assert ear.take() == [("backup", "cancelled", 0)]


def test_drops_under_write_back() -> None:
    ear = Ear()
    stack = Stack(host_pages=2, write_policy="write_back", listener=ear)
    stack.mover.instant = True
    stack.compute(prompt(1, 3))
    stack.compute(prompt(2, 2))
    stack.controller.evict(5 * P)
    heard = ear.take()
    assert ("write_back", "dropped", 3) in heard
    assert ("write_back", "done", 2) in heard
    assert sum(entry[1] for entry in heard if entry[0] == "device") == 5


def test_a_fetch_that_brings_less_than_was_found_has_failed() -> None:
    stack = Stack(storage=True, store_after_backup=True, prefetch_policy="wait_complete")
    stack.compute(prompt(1, 4))
    stack.settle()
    stack.controller.reset()
    stack.controller.prefetch("r", prompt(1, 4), ROOT)
    stack.edge.step()
    stack.controller.poll()
    stack.edge.pages.storage.clear()
    stack.settle()
    assert stack.controller.finish_prefetch("r")
    assert stack.controller.stats().prefetch_failures == 1
    assert stack.host.available_size() == stack.host.size
    stack.check()
