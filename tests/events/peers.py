"""How the peers read KV events: their message types as msgspec decodes them, and a subscriber that asks for replays.

Field names and order are the wire format (sglang 0.5: srt/disaggregation/kv_events.py, vLLM 0.1x: distributed/
kv_events.py); nothing of radixkv is used here.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec
import zmq

END = (-1).to_bytes(8, "big", signed=True)


class _Event(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, tag=True, forbid_unknown_fields=True):
    pass


class BlockRemoved(_Event):
    block_hashes: list[int]
    medium: str | None = None


class AllBlocksCleared(_Event):
    pass


class SGLang:
    class BlockStored(_Event, tag="BlockStored"):
        block_hashes: list[int]
        parent_block_hash: int | None
        token_ids: list[int]
        block_size: int
        lora_id: int | None
        medium: str | None = None

    class Batch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, forbid_unknown_fields=True):
        ts: float
        events: list[SGLang.BlockStored | BlockRemoved | AllBlocksCleared]
        attn_dp_rank: int | None = None


class VLLM:
    class BlockStored(_Event, tag="BlockStored"):
        block_hashes: list[int]
        parent_block_hash: int | None
        token_ids: list[int]
        block_size: int
        lora_id: int | None
        medium: str | None
        lora_name: str | None

    class Batch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, forbid_unknown_fields=True):
        ts: float
        events: list[VLLM.BlockStored | BlockRemoved | AllBlocksCleared]
        data_parallel_rank: int | None = None


class Subscriber:
    """Receives batches in order, and fills gaps from the replay socket."""

    def __init__(
        self, endpoint: str, replay: str | None = None, topic: str = "", batch: Any = SGLang.Batch, hwm: int = 0
    ) -> None:
        self.context = zmq.Context()
        self.sub = self.context.socket(zmq.SUB)
        self.sub.setsockopt(zmq.RCVTIMEO, 10_000)
        self.sub.setsockopt(zmq.RCVHWM, hwm)
        self.sub.subscribe(topic.encode())
        self.sub.connect(endpoint)
        self.replay = None
        if replay:
            self.replay = self.context.socket(zmq.DEALER)
            self.replay.setsockopt(zmq.RCVTIMEO, 10_000)
            self.replay.setsockopt(zmq.RCVHWM, hwm)
            self.replay.connect(replay)
        self.decoder = msgspec.msgpack.Decoder(batch)
        self.batches: dict[int, Any] = {}
        self.gaps: list[tuple[int, int]] = []

    def receive(self) -> int:
        """One message; returns its sequence number."""
        _, number, payload = self.sub.recv_multipart()
        seq = int.from_bytes(number, "big")
        last = max(self.batches, default=-1)
        if seq > last + 1:
            self.gaps.append((last + 1, seq))
        self.batches[seq] = self.decoder.decode(payload)
        return seq

    def receive_up_to(self, seq: int) -> None:
        while self.receive() < seq:
            pass

    def ask(self, first: int) -> list[int]:
        """Request a replay; the sequence numbers that came."""
        self.replay.send_multipart([b"", first.to_bytes(8, "big")])
        came = []
        while True:
            empty, number, payload = self.replay.recv_multipart()
            assert empty == b""
            if number == END:
                assert payload == b""
                return came
            came.append(int.from_bytes(number, "big"))
            self.batches[came[-1]] = self.decoder.decode(payload)

    def close(self) -> None:
        self.context.destroy(linger=0)


def joined(subscriber: Subscriber, publish: Any, patience_s: float = 10.0) -> int:
    """Publish until the subscriber has joined (PUB drops what it has no subscriber for); the last number published."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        last = publish()
        if subscriber.sub.poll(20):
            subscriber.receive_up_to(last)
            subscriber.gaps.clear()
            return last
    raise AssertionError("the subscriber never joined")
