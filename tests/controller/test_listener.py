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

    def made_room(self, num_tokens: int, seconds: float) -> None:
        assert seconds >= 0
        self.heard.append(("room", num_tokens // P))

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
    assert ear.take() == [("device", 3), ("room", 3), ("host", 3)]
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
    assert heard[-1] == ("room", 5)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Broken:
    """A look-up that storage has not answered."""

    pages, seconds, error = 0, 0.0, OSError("dead")

    def done(self) -> bool:
        return True


def ended_prefetch(clock: Clock, ear: Ear, policy: str, until: str, **more: Any) -> list[Any]:
    """What is heard of a prefetch of four pages, of which two have come when it is asked for."""
    stack = Stack(storage=True, listener=ear, store_after_backup=True, prefetch_policy=policy, clock=clock, **more)
    stack.compute(prompt(1, 4))
    stack.settle()
    stack.controller.reset()
    ear.take()
    stack.controller.prefetch("r", prompt(1, 4), ROOT)
    if until == "dead":
        stack.controller._prefetches.operations["r"].job = Broken()
    if until != "look-up":
        stack.edge.run()
        stack.controller.poll()
    if until == "lost":
        stack.edge.pages.storage.clear()
        stack.edge.run()
        stack.controller.poll()
    clock.now_s += 1000.0
    stack.controller.finish_prefetch("r")
    stack.settle()
    stack.check()
    return [heard for heard in ear.take() if heard[0] == "prefetch"]


def test_how_a_prefetch_ended() -> None:
    clock, ear = Clock(), Ear()
    for policy, late in (("best_effort", "partial"), ("timeout", "timeout"), ("wait_complete", "timeout")):
        assert ended_prefetch(clock, ear, policy, "look-up", prefetch_abandon_s=1e9) == [("prefetch", late, 0)]
        assert ended_prefetch(clock, ear, policy, "found", prefetch_abandon_s=1e9) == [("prefetch", late, 0)]
        assert ended_prefetch(clock, ear, policy, "lost", prefetch_abandon_s=1e9) == [("prefetch", "failed", 0)]
        assert ended_prefetch(clock, ear, policy, "dead", prefetch_abandon_s=1e9) == [("prefetch", "failed", 0)]


def test_a_batch_of_loads_is_shared_out() -> None:
    """Bytes by seconds is the bandwidth: a batch's copy is not counted once for each of its loads."""
    heard: list[Finished] = []
    ear = Ear()
    stack = Stack(listener=ear)
    for number, pages in ((1, 3), (2, 1)):
        stack.compute(prompt(number, pages))
    stack.settle()
    stack.controller.evict(4 * P)
    for number, pages in ((1, 3), (2, 1)):
        assert stack.controller.load(stack.controller.match(prompt(number, pages)).host_node) is not None
    stack.controller.start_loads()
    (batch,) = stack.controller._loads.batches
    ear.finished = heard.append  # type: ignore[method-assign]
    stack.settle()
    assert [event.num_tokens // P for event in heard] == [3, 1]
    assert [event.seconds for event in heard] == [batch.ticket.seconds * 0.75, batch.ticket.seconds * 0.25]
    assert batch.ticket.seconds > 0


def test_a_fetch_that_brings_less_than_was_found_has_failed() -> None:
    stack = Stack(storage=True, store_after_backup=True, prefetch_policy="wait_complete")
    stack.compute(prompt(1, 4))
    stack.settle()
    stack.controller.reset()
    stack.controller.prefetch("r", prompt(1, 4), ROOT)
    stack.edge.run()
    stack.controller.poll()
    stack.edge.pages.storage.clear()
    stack.settle()
    assert stack.controller.finish_prefetch("r")
    assert stack.controller.stats().prefetch_failures == 1
    assert stack.host.available_size() == stack.host.size
    stack.check()
