"""L2: KV events, so that routers know which prefix is where: the tree's events over ZeroMQ, in the words and bytes that
SGLang and vLLM publish.

    PUB      [topic][sequence number, 8 bytes big-endian][payload]                      from 0, one more each batch
    ROUTER   <- [identity][""][first sequence number wanted]
             -> [identity][""][sequence number][payload] for each batch kept from there on, then [..][""][-1][""]
    payload  msgpack: [time, [event, ...], data-parallel rank]
    event    ["BlockStored", hashes, parent hash, tokens, block size, LoRA id, medium (, LoRA name)]
             ["BlockRemoved", hashes, medium]    ["AllBlocksCleared"]

A block is a page, its hash the tree's page key (64 bits of a chain over the whole prefix). Pages that follow each other
share an event. What could not be sent leaves a hole in the sequence numbers, never a silent loss: a subscriber that
sees one asks for a replay, and starts from nothing if the hole is not in it. A replay has no way to refuse: one of
batches that are kept no longer begins with the first that is, whose number says so.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from .errors import EndpointError, InvalidArgumentError, StateError
from .extras import require
from .tree.base import BaseRadixTree
from .types import Event, Medium, PageIds

__all__ = ["DIALECTS", "Dialect", "EventConfig", "EventPublisher", "PublisherStats", "offset_endpoint", "snapshot"]
__all__ += ["wire_events"]

WireEvent: TypeAlias = list[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """What differs between the peers.

    media: the name of each tier. signed: hashes are int64 (else uint64). lora_name: BlockStored ends with one.
    """

    media: Mapping[Medium, str]
    signed: bool
    lora_name: bool


DIALECTS: Mapping[str, Dialect] = {
    "sglang": Dialect(media={"device": "GPU", "host": "CPU_TIER1"}, signed=True, lora_name=False),
    "vllm": Dialect(media={"device": "GPU", "host": "CPU"}, signed=False, lora_name=True),
}


# ---- from the tree's events to theirs --------------------------------------------------------------------------------
def wire_events(events: Iterable[Event], page_size: int, dialect: Dialect) -> list[WireEvent]:
    """Translate events in order; a chain of stored pages, and a run of removed ones, of one medium become one event."""
    out: list[WireEvent] = []
    chain: list[Event] = []
    for event in events:
        if chain and not _continues(chain[-1], event):
            out.append(_merged(chain, page_size, dialect))
            chain = []
        chain.append(event)
    if chain:
        out.append(_merged(chain, page_size, dialect))
    return out


def _continues(last: Event, event: Event) -> bool:
    if event.kind != last.kind or event.medium != last.medium or event.kind == "cleared":
        return False
    return event.kind == "removed" or event.parent_key == last.key


def _merged(chain: list[Event], page_size: int, dialect: Dialect) -> WireEvent:
    first = chain[0]
    if first.kind == "cleared":
        return ["AllBlocksCleared"]
    assert first.medium is not None
    hashes = [_hash(event.key, dialect) for event in chain]
    medium = dialect.media[first.medium]
    if first.kind == "removed":
        return ["BlockRemoved", hashes, medium]
    parent = None if first.parent_key is None else _hash(first.parent_key, dialect)
    tokens = np.concatenate([event.tokens for event in chain if event.tokens is not None]).tolist()
    return ["BlockStored", hashes, parent, tokens, page_size, None, medium, *([None] if dialect.lora_name else [])]


def _hash(key: int, dialect: Dialect) -> int:
    return key - (1 << 64) if dialect.signed and key >= 1 << 63 else key


def snapshot(tree: BaseRadixTree) -> list[Event]:
    """What a tree holds now, as events that build it from nothing: "cleared", then parents before children. O(tree)."""
    events = [Event("cleared", 0, None, None, None)]
    last_key: dict[int, int] = {}
    for info in tree.dump():
        keys = tree.page_keys(info.node).tolist()
        parents = [last_key.get(info.parent), *keys[:-1]]
        last_key[info.node] = keys[-1]
        tiers: tuple[tuple[Medium, PageIds | None], ...] = (("device", info.page_ids), ("host", info.host_page_ids))
        for medium in (medium for medium, page_ids in tiers if page_ids is not None):
            for i, (key, parent) in enumerate(zip(keys, parents, strict=True)):
                tokens = info.tokens[i * tree.page_size : (i + 1) * tree.page_size]
                events.append(Event("stored", key, parent, tokens, medium))
    return events


# ---- the publisher ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class EventConfig:
    """Where and how events are published; unknown settings raise.

    Args:
        endpoint: of the PUB socket, ``tcp://*:5557`` as the peers' default. Bound if it has a ``*`` or ``::``, or is
            ipc or inproc; else connected (several workers may then share one subscriber). The port of a data-parallel
            rank is this plus the rank.
        replay_endpoint: of the ROUTER socket, always bound, offset likewise; None: no replay.
        topic: the first frame; subscribers filter by its beginning.
        dialect: a name in ``DIALECTS``.
        data_parallel_rank: >= 0, the last field of each batch.
        replay_batches, replay_bytes: what is kept for replay, >= 0. 10,000 as the peers; 64 MiB bound it for long ones.
        queue_batches: batches that wait for the publisher's thread, >= 1; beyond it new ones are dropped. A batch costs
            tens of us to send, so ten thousand are a stall of a second.
        high_water_mark: messages that wait for one subscriber, >= 1; beyond it that one loses messages. 100,000 as the
            peers.
    """

    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    topic: str = ""
    dialect: str = "sglang"
    data_parallel_rank: int = 0
    replay_batches: int = 10_000
    replay_bytes: int = 64 << 20
    queue_batches: int = 10_000
    high_water_mark: int = 100_000

    def __post_init__(self) -> None:
        if self.dialect not in DIALECTS:
            raise InvalidArgumentError(f"unknown dialect {self.dialect!r}; one of {', '.join(DIALECTS)}")
        lowest = {"data_parallel_rank": 0, "replay_batches": 0, "replay_bytes": 0}
        for name in (*lowest, "queue_batches", "high_water_mark"):
            if getattr(self, name) < lowest.get(name, 1):
                raise InvalidArgumentError(f"{name} is {getattr(self, name)}, and must be >= {lowest.get(name, 1)}")


class PublisherStats(NamedTuple):
    """Counters: batches and events sent, batches dropped because the queue was full, snapshots sent because the tree
    had dropped events or the queue was full, replays asked for and, of these, cut short (a client that does not read),
    requests of another form. slow_subscribers: times that one had high_water_mark batches before it and began to lose
    some; counted anew once it has caught up. What waits, and what is kept."""

    batches: int
    events: int
    dropped_batches: int
    snapshots: int
    replays: int
    short_replays: int
    bad_requests: int
    slow_subscribers: int
    queued_batches: int
    kept_batches: int
    kept_bytes: int


class EventPublisher:
    """Publishes the events of one tree. ``publish`` and ``drain`` are for one thread; they never wait for a subscriber.

    Args:
        page_size: of the tree.
        context: a zmq.Context to share (inproc endpoints need one); None: one of its own.
        clock: the time of a batch, seconds since 1970.
    Attributes: ``endpoint`` and ``replay_endpoint``: as bound, with the port that a ``*`` became.
    Raises: MissingExtraError without pyzmq and msgspec; EndpointError (an OSError) if an endpoint cannot be had;
        nothing stays open then.
    """

    def __init__(
        self,
        page_size: int,
        config: EventConfig | None = None,
        *,
        context: Any = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._zmq = require("zmq", "publishing KV events", "events")
        self._encode = require("msgspec", "publishing KV events", "events").msgpack.encode
        self.config = config or EventConfig()
        self.page_size, self._clock = page_size, clock
        self._dialect = DIALECTS[self.config.dialect]
        self._topic = self.config.topic.encode()
        self._queue: deque[tuple[int, float, Sequence[Event]]] = deque()
        self._kept: deque[tuple[int, bytes]] = deque()
        self._kept_bytes = self._next = self._dropped = self._snapshots = self._tree_dropped = 0
        self._sent = self._sent_events = self._replays = self._short_replays = self._bad_requests = self._slow = 0
        self._has_hole = False
        """A batch was dropped, and no snapshot has been queued since."""
        self._closing: float | None = None
        self._closes = threading.RLock()
        self._error: BaseException | None = None
        self._own_context = context is None
        self._context = self._zmq.Context() if context is None else context
        try:
            self._open_sockets()
        except BaseException:
            self._context.destroy(linger=0) if self._own_context else None
            raise
        self._thread = threading.Thread(target=self._run, name="radixkv-events", daemon=True)
        self._thread.start()

    def _open_sockets(self) -> None:
        zmq, config, rank = self._zmq, self.config, self.config.data_parallel_rank
        with contextlib.ExitStack() as undo:
            self._pub = undo.enter_context(self._context.socket(zmq.PUB))
            self._pub.setsockopt(zmq.SNDHWM, config.high_water_mark)
            self._pub.setsockopt(zmq.XPUB_NODROP, 1)  # see _send
            endpoint = offset_endpoint(config.endpoint, rank)
            binds = "*" in endpoint or "::" in endpoint or endpoint.startswith(("ipc://", "inproc://"))
            self._open(self._pub.bind if binds else self._pub.connect, "endpoint", endpoint)
            self.endpoint: str = self._pub.getsockopt_string(zmq.LAST_ENDPOINT)
            self.replay_endpoint: str | None = None
            self._replay: Any = None
            if config.replay_endpoint is not None:
                self._replay = undo.enter_context(self._context.socket(zmq.ROUTER))
                self._replay.setsockopt(zmq.SNDHWM, config.replay_batches + 1)  # a whole replay fits
                self._replay.setsockopt(zmq.ROUTER_MANDATORY, 1)  # and one that does not is an error, no silence
                self._open(self._replay.bind, "replay_endpoint", offset_endpoint(config.replay_endpoint, rank))
                self.replay_endpoint = self._replay.getsockopt_string(zmq.LAST_ENDPOINT)
            name = f"inproc://radixkv-events-{id(self)}"
            self._woken = undo.enter_context(self._context.socket(zmq.PAIR))
            self._woken.bind(name)
            self._wake = undo.enter_context(self._context.socket(zmq.PAIR))
            self._wake.connect(name)
            undo.pop_all()

    def _open(self, how: Callable[[str], object], name: str, endpoint: str) -> None:
        """Bind or connect. Raises: EndpointError."""
        zmq, rank = self._zmq, self.config.data_parallel_rank
        what = f"cannot {how.__name__} the event publisher's {name} {endpoint!r} (rank {rank})"
        port = endpoint.rpartition(":")[2]
        if endpoint.startswith("tcp://") and port.isdecimal() and int(port) > 65_535:  # libzmq takes it modulo 65,536
            raise EndpointError(zmq.EINVAL, f"{what}: there is no port {port}")
        try:
            how(endpoint)
        except zmq.ZMQError as error:
            raise EndpointError(error.errno, f"{what}: {zmq.strerror(error.errno)}") from error

    # ---- the owner's side --------------------------------------------------------------------------------------------
    def publish(self, events: Sequence[Event]) -> int | None:
        """Queue one batch. Returns: its sequence number; None for no events.

        With a full queue it is dropped and counted; its number is used up, which tells subscribers.
        Raises: StateError after ``close``, or if the publisher's thread has died of an error.
        """
        if self._closing is not None or self._error is not None:
            raise StateError(f"the event publisher is closed{f': {self._error!r}' if self._error else ''}")
        if not events:
            return None
        number, self._next = self._next, self._next + 1
        if len(self._queue) >= self.config.queue_batches:
            self._dropped += 1
            self._has_hole = True
        else:
            self._queue.append((number, self._clock(), events))
            if len(self._queue) == 1:  # with more, the thread is at work and looks again before it sleeps
                self._notify()
        return number

    def drain(self, tree: BaseRadixTree, max_events: int = 4096) -> int:
        """Publish what a tree has queued, in batches. Returns: events published.

        If the tree has dropped events since the last call, or a batch was dropped as the queue was full, what the tree
        queued is of no use: a snapshot is published in its place, as soon as there is room for it.
        Raises: InvalidArgumentError for a tree that records no events, or has pages of another size; as publish.
        """
        if not tree.events:
            raise InvalidArgumentError(
                "the tree records no events, and subscribers would see an empty cache: make it with events=True, "
                "a cache with enable_kv_cache_events=True"
            )
        if tree.page_size != self.page_size:
            raise InvalidArgumentError(
                f"pages of {tree.page_size} tokens in the tree, of {self.page_size} in the publisher"
            )
        if self._has_hole or tree.stats().dropped_events != self._tree_dropped:
            tree.take_events()
            self._tree_dropped = tree.stats().dropped_events
            self._has_hole = len(self._queue) >= self.config.queue_batches
            if self._has_hole:  # it would be dropped, too
                return 0
            self._snapshots += 1
            events = snapshot(tree)
            self.publish(events)
            return len(events)
        count = 0
        while events := tree.take_events(max_events):
            self.publish(events)
            count += len(events)
        return count

    def stats(self) -> PublisherStats:
        """Counters; any thread."""
        return PublisherStats(
            self._sent, self._sent_events, self._dropped, self._snapshots, self._replays, self._short_replays,
            self._bad_requests, self._slow, len(self._queue), len(self._kept), self._kept_bytes,
        )  # fmt: skip

    def close(self, timeout_s: float = 1.0) -> bool:
        """Send what is queued, for ``timeout_s`` at most, and close the sockets. A second call does nothing, but
        wait for the first one on another thread.

        Returns: whether all was handed to the sockets in time.
        """
        with self._closes:
            if self._closing is None:
                self._closing = time.monotonic() + timeout_s
                self._notify()
                self._thread.join(timeout_s + 1.0)  # the thread keeps the deadline; the second is for a busy machine
                self._wake.close(linger=0)
                if self._own_context and not self._thread.is_alive():
                    self._context.term()  # waits while sockets linger, which is bounded
            return not self._queue

    def __enter__(self) -> EventPublisher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _notify(self) -> None:
        with contextlib.suppress(self._zmq.Again):  # so many wake-ups wait already that one more says nothing
            self._wake.send(b"", self._zmq.DONTWAIT)

    # ---- the thread's side -------------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            poller = self._zmq.Poller()
            for socket in (self._woken, self._replay):
                if socket is not None:
                    poller.register(socket, self._zmq.POLLIN)
            while self._closing is None:
                ready = dict(poller.poll())
                if self._woken in ready:
                    self._woken.recv()
                if self._replay in ready:
                    self._answer()
                self._send_queued()
            self._send_queued()
        except Exception as error:  # for the owner, whose next publish raises it
            self._error = error
        finally:
            linger_s = 0.0 if self._closing is None else max(0.0, self._closing - time.monotonic())
            for socket in (self._pub, self._replay, self._woken):
                if socket is not None:
                    socket.close(linger=int(linger_s * 1000))

    def _send_queued(self) -> None:
        while self._queue and (self._closing is None or time.monotonic() < self._closing):
            number, now, events = self._queue[0]
            wire = wire_events(events, self.page_size, self._dialect)
            payload = self._encode([now, wire, self.config.data_parallel_rank])
            self._send([self._topic, number.to_bytes(8, "big"), payload])
            self._keep(number, payload)
            self._sent += 1
            self._sent_events += len(events)
            self._queue.popleft()

    def _send(self, frames: list[bytes]) -> None:
        """Send to all subscribers; never waits. One whose queue is full loses it.

        PUB drops without a word. With XPUB_NODROP it refuses at the first full queue; then it is told to drop after
        all, and leaves that subscriber out until its queue is half empty.
        """
        zmq = self._zmq
        try:
            self._pub.send_multipart(frames, zmq.DONTWAIT)
        except zmq.Again:
            self._slow += 1
            self._pub.setsockopt(zmq.XPUB_NODROP, 0)
            self._pub.send_multipart(frames, zmq.DONTWAIT)
            self._pub.setsockopt(zmq.XPUB_NODROP, 1)

    def _keep(self, number: int, payload: bytes) -> None:
        if self._replay is None:
            return
        self._kept.append((number, payload))
        self._kept_bytes += len(payload)
        while len(self._kept) > self.config.replay_batches or self._kept_bytes > self.config.replay_bytes:
            self._kept_bytes -= len(self._kept.popleft()[1])

    def _answer(self) -> None:
        """Serve one replay request. One of another form is not answered, as by the peers, but counted."""
        frames = self._replay.recv_multipart()
        if len(frames) != 3 or frames[1] != b"" or len(frames[2]) != 8:
            self._bad_requests += 1
            return
        first = int.from_bytes(frames[2], "big")
        self._send_queued()  # what was published before the request belongs to the answer
        self._replays += 1
        wanted = [(number.to_bytes(8, "big"), payload) for number, payload in self._kept if number >= first]
        try:
            for frame in (*wanted, ((-1).to_bytes(8, "big", signed=True), b"")):
                self._replay.send_multipart([frames[0], b"", *frame], self._zmq.DONTWAIT)
        except self._zmq.ZMQError:  # the client has gone, or does not read; it sees no end, and may ask again
            self._short_replays += 1


def offset_endpoint(endpoint: str, rank: int) -> str:
    """The endpoint of a data-parallel rank, as the peers choose it: port + rank for tcp, else a suffix.

    ``tcp://*:5557`` and rank 2: ``tcp://*:5559``. A port of ``*`` stays.
    """
    if rank == 0:
        return endpoint
    base, _, port = endpoint.rpartition(":")
    if endpoint.startswith("tcp://"):
        return f"{base}:{int(port) + rank}" if port.isdecimal() else endpoint
    return f"{endpoint}_dp{rank}"
