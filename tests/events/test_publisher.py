"""Events over real sockets: order, gaps, replay, subscribers that are slow or leave, and a bounded end."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import radixkv
from radixkv.errors import EndpointError, InvalidArgumentError, RadixKVError, StateError
from radixkv.events import EventConfig, EventPublisher
from radixkv.tree.reference import ReferenceTree
from radixkv.types import Event

from . import peers
from .peers import END, Subscriber, joined

PAGE = 4
LOCAL = "tcp://127.0.0.1:*"


def event(key: int, pages: int = 1) -> list[Event]:
    return [Event("stored", key + i, key + i - 1, np.full(PAGE, i, np.int32), "device") for i in range(pages)]


@pytest.fixture
def opened() -> Iterator[Callable[..., Any]]:
    """Make publishers and subscribers that are closed at the end."""
    made: list[Any] = []

    def make(kind: Callable[..., Any], *args: Any, **options: Any) -> Any:
        made.append(kind(*args, **options))
        return made[-1]

    yield make
    for thing in reversed(made):
        thing.close()


def publisher(opened: Any, **options: Any) -> EventPublisher:
    options = {"endpoint": LOCAL, "replay_endpoint": LOCAL} | options
    return opened(EventPublisher, PAGE, EventConfig(**options), clock=lambda: 1234.5)


def subscriber(opened: Any, source: EventPublisher, **options: Any) -> Subscriber:
    return opened(Subscriber, source.endpoint, source.replay_endpoint, **options)


def test_a_trees_events_arrive_in_order(opened: Any) -> None:
    source = publisher(opened, topic="kv@worker-1@llama", data_parallel_rank=3)
    reader = subscriber(opened, source, topic="kv@")
    last = joined(reader, lambda: source.publish(event(1)))
    tree = radixkv.RadixTree(page_size=PAGE, events=True)
    for i in range(20):
        tree.insert([i] * PAGE + [0] * PAGE, [2 * i, 2 * i + 1])
        assert source.drain(tree) == 2
    assert source.drain(tree) == 0
    reader.receive_up_to(last + 20)
    assert reader.gaps == []
    batches = [reader.batches[number] for number in range(last + 1, last + 21)]
    assert [batch.events[0].token_ids for batch in batches] == [[i] * PAGE + [0] * PAGE for i in range(20)]
    assert {(batch.ts, batch.attn_dp_rank) for batch in batches} == {(1234.5, 3)}


def test_the_dialect_of_vllm(opened: Any) -> None:
    source = publisher(opened, dialect="vllm")
    reader = subscriber(opened, source, batch=peers.VLLM.Batch)
    last = joined(reader, lambda: source.publish(event(1 << 63)))
    assert reader.batches[last].events[0].block_hashes == [1 << 63]
    assert reader.batches[last].data_parallel_rank == 0


def test_who_joins_late_replays_from_the_start(opened: Any) -> None:
    source = publisher(opened)
    for i in range(50):
        assert source.publish(event(i)) == i
    reader = subscriber(opened, source)
    assert reader.ask(0) == list(range(50))  # all that was published before the request, sent or not
    assert [reader.batches[i].events[0].block_hashes for i in range(50)] == [[i] for i in range(50)]
    assert reader.ask(48) == [48, 49]
    assert reader.ask(50) == []
    assert source.stats().replays == 3


def test_a_gap_is_seen_and_filled(opened: Any) -> None:
    source = publisher(opened)
    reader = subscriber(opened, source)
    last = joined(reader, lambda: source.publish(event(1)))
    reader.sub.disconnect(source.endpoint)
    for i in range(10):  # lost on the wire: nobody is connected
        source.publish(event(100 + i))
    assert reader.ask(last + 1) == list(range(last + 1, last + 11))
    for seq in range(last + 1, last + 11):
        del reader.batches[seq]
    reader.sub.connect(source.endpoint)
    newest = 0
    while not reader.sub.poll(20):
        newest = source.publish(event(1))
    reader.receive_up_to(newest)
    assert reader.gaps[0][0] == last + 1
    for first, end in reader.gaps:
        assert set(range(first, end)) <= set(reader.ask(first))
    assert sorted(reader.batches) == list(range(min(reader.batches), newest + 1))


def test_what_is_kept_for_replay_is_bounded(opened: Any) -> None:
    by_number = publisher(opened, replay_batches=10)
    by_bytes = publisher(opened, replay_bytes=5_000)
    for i in range(60):
        for source in (by_number, by_bytes):
            source.publish(event(i, pages=20))
    reader, other = subscriber(opened, by_number), subscriber(opened, by_bytes)
    assert reader.ask(0) == list(range(50, 60))
    came = other.ask(0)
    assert 1 < len(came) < 60
    assert came == list(range(60 - len(came), 60))
    assert by_bytes.stats().kept_bytes <= 5_000
    assert by_number.stats().kept_batches == 10


def test_without_a_replay_endpoint_nothing_is_kept(opened: Any) -> None:
    source = publisher(opened, replay_endpoint=None)
    reader = subscriber(opened, source)
    joined(reader, lambda: source.publish(event(1)))
    assert source.stats().kept_batches == 0


def test_a_subscriber_that_does_not_read_holds_nobody_up(opened: Any) -> None:
    source = publisher(opened, high_water_mark=10, queue_batches=100_000)
    slow = subscriber(opened, source, hwm=1)
    first = joined(slow, lambda: source.publish(event(1))) + 1
    quick = subscriber(opened, source)
    batch = event(1, pages=2000)
    longest = 0.0
    for _ in range(600):  # 25 MB: more than the buffers of a connection
        begin = time.perf_counter()
        last = source.publish(batch)
        longest = max(longest, time.perf_counter() - begin)
    assert longest < 1.0  # a wait for the subscriber would have no end
    assert quick.ask(last) == [last]  # so everything has been sent
    assert source.stats().queued_batches == source.stats().dropped_batches == 0
    slow.receive()
    while not slow.gaps:  # what was lost is lost for the slow one only, and it can tell
        newest = source.publish(event(1))
        while slow.sub.poll(50):
            slow.receive()
    assert slow.gaps[0][0] > first
    assert 1 <= source.stats().slow_subscribers < 600, "once for each time that it falls behind"
    assert set(range(*slow.gaps[0])) <= set(quick.ask(slow.gaps[0][0]))
    assert max(slow.batches) <= newest


def test_a_full_queue_leaves_a_hole_in_the_numbers(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = publisher(opened, queue_batches=5)
    reader = subscriber(opened, source)
    last = joined(reader, lambda: source.publish(event(1)))
    monkeypatch.setattr(source, "_notify", lambda: None)  # the thread sleeps on
    for i in range(8):
        assert source.publish(event(i)) == last + 1 + i
    assert source.stats().dropped_batches == 3
    monkeypatch.undo()
    source._notify()
    reader.receive_up_to(last + 5)
    newest = source.publish(event(9))
    assert newest == last + 9
    reader.receive_up_to(newest)
    assert reader.gaps == [(last + 6, last + 9)]
    assert reader.ask(last + 6) == [newest]  # lost for good, and that is plain


def test_when_the_tree_has_dropped_events_all_is_sent_anew(opened: Any) -> None:
    source = publisher(opened)
    reader = subscriber(opened, source)
    tree = radixkv.RadixTree(page_size=PAGE, events=True, max_events=10)
    for i in range(8):
        tree.insert([i] * PAGE, [i])
    assert source.drain(tree) == 8
    for i in range(8, 30):
        tree.insert([i] * PAGE, [i])
    assert source.drain(tree) == 31
    tree.insert([99] * PAGE, [99])
    assert source.drain(tree) == 1
    assert reader.ask(0) == [0, 1, 2]
    assert reader.batches[1].events[0] == peers.AllBlocksCleared()
    assert sorted(e.token_ids[0] for e in reader.batches[1].events[1:]) == list(range(30))
    assert reader.batches[2].events[0].token_ids == [99] * PAGE
    assert source.stats().snapshots == 1


def test_after_a_full_queue_all_is_sent_anew(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was dropped would be missing for good: also what has been removed since, which would seem to be there."""
    source = publisher(opened, queue_batches=2)
    reader = subscriber(opened, source)
    tree = radixkv.RadixTree(page_size=PAGE, events=True)
    monkeypatch.setattr(source, "_notify", lambda: None)  # the thread sleeps on
    for i in range(5):
        tree.insert([i] * PAGE, [i])
        source.drain(tree)
    assert (source.stats().dropped_batches, source.stats().snapshots) == (1, 0)
    monkeypatch.undo()
    source._notify()
    assert reader.ask(0)[:2] == [0, 1]
    assert source.drain(tree) == 6
    tree.insert([99] * PAGE, [99])
    assert source.drain(tree) == 1
    assert reader.ask(3) == [3, 4]
    assert reader.batches[3].events[0] == peers.AllBlocksCleared()
    assert sorted(e.token_ids[0] for e in reader.batches[3].events[1:]) == list(range(5))
    assert (source.stats().dropped_batches, source.stats().snapshots) == (1, 1)


def test_a_replay_client_that_does_not_read_costs_nothing(opened: Any) -> None:
    source = publisher(opened, replay_batches=2_000)
    for i in range(2_000):
        source.publish(event(i, pages=30))
    rude = subscriber(opened, source, hwm=1)
    for _ in range(30):
        rude.replay.send_multipart([b"", (0).to_bytes(8, "big")])
    polite = subscriber(opened, source)
    assert polite.ask(1_990) == list(range(1_990, 2_000))
    while source.stats().replays < 32:
        polite.ask(1_999)
    assert source.stats().short_replays > 0


@pytest.mark.parametrize(
    "request_frames", [[b"\0" * 8], [b"", b"\0" * 7], [b"", b""], [b"x", b"\0" * 8], [b"", b"", b""]]
)
def test_a_request_of_another_form_is_ignored(opened: Any, request_frames: list[bytes]) -> None:
    source = publisher(opened)
    reader = subscriber(opened, source)
    reader.replay.send_multipart(request_frames)
    source.publish(event(1))
    assert reader.ask(0) == [0]
    assert (source.stats().bad_requests, source.stats().replays) == (1, 1)


def test_a_replay_of_what_is_gone_begins_with_the_first_that_is_kept(opened: Any) -> None:
    """As of SGLang and vLLM: no error on the wire, but numbers that do not follow, then the end mark."""
    source = publisher(opened, replay_batches=3)
    for i in range(10):
        source.publish(event(i))
    reader = subscriber(opened, source)
    frames = []
    reader.replay.send_multipart([b"", (2).to_bytes(8, "big")])
    while not frames or frames[-1][1:] != [END, b""]:
        frames.append(reader.replay.recv_multipart())
    assert [int.from_bytes(number, "big", signed=True) for _, number, _ in frames] == [7, 8, 9, -1]
    assert {empty for empty, _, _ in frames} == {b""}
    assert reader.ask(10) == []
    assert reader.ask(2**63) == []
    assert source.stats().short_replays == 0


def test_close_sends_what_is_queued_and_ends_in_time(opened: Any) -> None:
    source = publisher(opened)
    reader = subscriber(opened, source)
    last = joined(reader, lambda: source.publish(event(1)))
    for i in range(500):
        source.publish(event(i))
    assert source.close(timeout_s=10)
    reader.receive_up_to(last + 500)
    assert reader.gaps == []
    assert source.close()
    with pytest.raises(StateError, match="closed"):
        source.publish(event(1))


def test_close_is_bounded_by_its_deadline(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = publisher(opened)
    slow = subscriber(opened, source, hwm=1)
    joined(slow, lambda: source.publish(event(1)))
    monkeypatch.setattr(source, "_notify", lambda: None)
    for i in range(3_000):
        source.publish(event(i, pages=100))  # some seconds of work
    monkeypatch.undo()
    begin = time.monotonic()
    source.close(timeout_s=0.2)
    assert time.monotonic() - begin < 5
    assert not source._thread.is_alive()


def test_an_error_of_the_thread_reaches_the_owner(opened: Any) -> None:
    source = publisher(opened)
    source.publish([Event("stored", 1, None, None, "device")])  # no tokens: the tree never sends such a one
    source._thread.join(10)
    with pytest.raises(StateError, match="ValueError"):
        source.publish(event(1))


def test_an_endpoint_in_use(opened: Any) -> None:
    source = publisher(opened)
    taken = source.endpoint.replace("127.0.0.1", "*")
    with pytest.raises(EndpointError, match=rf"bind .* endpoint '{re.escape(taken)}' .* in use") as raised:
        EventPublisher(PAGE, EventConfig(endpoint=taken))
    assert isinstance(raised.value, RadixKVError)
    assert raised.value.errno == errno.EADDRINUSE
    with pytest.raises(EndpointError, match=r"replay_endpoint .* \(rank 0\): .* in use"):
        EventPublisher(PAGE, EventConfig(endpoint=LOCAL, replay_endpoint=source.replay_endpoint))


@pytest.mark.parametrize(
    "endpoint",
    ["", "*:5557", "tcp://*", "tcp://*:99999", "tpc://*:1", "tcp://*.no.such.host.invalid:1", "ipc:///no/such/folder/*"],
)
def test_an_endpoint_that_is_none(endpoint: str) -> None:
    with pytest.raises(EndpointError, match=f"{re.escape(repr(endpoint))}.*: .+"):
        EventPublisher(PAGE, EventConfig(endpoint=endpoint))
    with pytest.raises(EndpointError, match=f"replay_endpoint {re.escape(repr(endpoint))}"):
        EventPublisher(PAGE, EventConfig(endpoint=LOCAL, replay_endpoint=endpoint))


def test_an_endpoint_is_free_again_after_close_and_after_a_failure(opened: Any) -> None:
    source = publisher(opened)
    source.close()
    mine = source.endpoint.replace("127.0.0.1", "*")
    with pytest.raises(EndpointError):
        EventPublisher(PAGE, EventConfig(endpoint=mine, replay_endpoint="tpc://*:1"))
    again = publisher(opened, endpoint=mine)
    assert again.endpoint.rpartition(":")[2] == mine.rpartition(":")[2]


def test_a_tree_that_records_nothing_is_an_error(opened: Any) -> None:
    source = publisher(opened)
    for tree in (radixkv.RadixTree(page_size=PAGE), ReferenceTree(page_size=PAGE)):
        tree.insert([1] * PAGE, [0])
        with pytest.raises(InvalidArgumentError, match=r"records no events.*events=True"):
            source.drain(tree)
    with pytest.raises(InvalidArgumentError, match="pages of 8 tokens in the tree, of 4"):
        source.drain(radixkv.RadixTree(page_size=8, events=True))
    assert source.drain(ReferenceTree(page_size=PAGE, events=True)) == 0


def test_closed_twice_from_two_threads(opened: Any) -> None:
    source = publisher(opened)
    for _ in range(10):
        source.publish(event(1))
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: source.close(10), range(4)))
    assert source.close()
    assert not source._thread.is_alive()


def test_nothing_is_no_batch(opened: Any) -> None:
    source = publisher(opened)
    assert source.publish([]) is None
    assert source.publish(event(1)) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"dialect": "dynamo"},
        {"data_parallel_rank": -1},
        {"queue_batches": 0},
        {"high_water_mark": 0},
        {"replay_bytes": -1},
    ],
)
def test_settings_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(options))):
        EventConfig(**options)
