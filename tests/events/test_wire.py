"""The tree's events in the peers' words."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

import radixkv
from radixkv.events import DIALECTS, offset_endpoint, snapshot, wire_events
from radixkv.types import Event

from . import peers

PAGE = 4


def tree(**options: Any) -> radixkv.RadixTree:
    return radixkv.RadixTree(page_size=PAGE, events=True, **options)


def decoded(events: list[Event], dialect: str = "sglang") -> list[Any]:
    batch = {"sglang": peers.SGLang.Batch, "vllm": peers.VLLM.Batch}[dialect]
    payload = msgspec.msgpack.encode([1.5, wire_events(events, PAGE, DIALECTS[dialect]), 3])
    got = msgspec.msgpack.decode(payload, type=batch)
    assert got.ts == 1.5
    return got.events


def signed(key: int) -> int:
    return int(np.array([key], np.uint64).view(np.int64)[0])


def test_a_node_is_one_chain_of_blocks() -> None:
    t = tree()
    node = t.insert(np.arange(12), [5, 6, 7]).node
    keys = t.page_keys(node).tolist()
    (stored,) = decoded(t.take_events())
    assert stored.block_hashes == [signed(key) for key in keys]
    assert (stored.parent_block_hash, stored.block_size, stored.lora_id, stored.medium) == (None, PAGE, None, "GPU")
    assert stored.token_ids == list(range(12))
    child = t.insert([*range(12), *range(90, 98)], [5, 6, 7, 8, 9]).node
    (stored,) = decoded(t.take_events())
    assert stored.parent_block_hash == signed(keys[-1])
    assert stored.block_hashes == [signed(key) for key in t.page_keys(child).tolist()]
    assert stored.token_ids == list(range(90, 98))


def test_two_chains_are_two_events() -> None:
    t = tree()
    t.insert([1, 1, 1, 1, 2, 2, 2, 2], [0, 1])
    t.insert([1, 1, 1, 1, 3, 3, 3, 3], [0, 2])
    t.insert([4, 4, 4, 4], [3])
    found = decoded(t.take_events())
    assert [event.token_ids for event in found] == [[1] * 4 + [2] * 4, [3] * 4, [4] * 4]
    assert found[1].parent_block_hash == found[0].block_hashes[0]


def test_tiers_and_removal() -> None:
    t = tree()
    node = t.insert(np.arange(8), [0, 1]).node
    hashes = [signed(key) for key in t.page_keys(node).tolist()]
    t.set_host(node, [7, 8])
    t.evict(8)
    t.evict_host(8)
    stored, on_host, removed, gone = decoded(t.take_events())
    assert (stored.medium, on_host.medium, removed.medium, gone.medium) == ("GPU", "CPU_TIER1", "GPU", "CPU_TIER1")
    assert on_host.block_hashes == stored.block_hashes == hashes
    assert removed.block_hashes == gone.block_hashes == hashes[::-1]  # children before parents
    assert isinstance(removed, peers.BlockRemoved)


def test_reset_clears() -> None:
    t = tree()
    t.insert([1, 2, 3, 4], [0])
    t.reset()
    assert decoded(t.take_events()) == [peers.AllBlocksCleared()]


def test_vllm_has_unsigned_hashes_and_a_lora_name() -> None:
    t = tree()
    for first in range(40):  # among so many keys some have the top bit
        t.insert([first] * PAGE, [first])
    events = t.take_events()
    assert any(event.key >= 1 << 63 for event in events)
    found = decoded(events, "vllm")
    assert [event.block_hashes for event in found] == [[event.key] for event in events]
    assert {(event.medium, event.lora_name) for event in found} == {("GPU", None)}
    assert [event.block_hashes for event in decoded(events)] == [[signed(event.key)] for event in events]


def test_negative_tokens_and_a_snapshot_of_everything() -> None:
    t = tree()
    node = t.insert([-1, 2**31 - 1, -(2**31), 0, 5, 5, 5, 5], [0, 1]).node
    t.insert([9] * PAGE, [2], extra_key="lora-7")
    t.set_host(node, [3, 4])
    t.insert_host([-1, 2**31 - 1, -(2**31), 0, 5, 5, 5, 5, 6, 6, 6, 6], [3, 4, 5])
    live = replayed(t.take_events())
    again = replayed(snapshot(t))
    assert live == again
    assert {medium for medium, _ in again} == {"GPU", "CPU_TIER1"}
    assert len(again) == 6


def replayed(events: list[Event]) -> dict[tuple[str, int], tuple[int | None, tuple[int, ...]]]:
    """What an indexer would hold: (medium, hash) -> (parent, tokens)."""
    held: dict[tuple[str, int], tuple[int | None, tuple[int, ...]]] = {}
    for event in decoded(events):
        if isinstance(event, peers.AllBlocksCleared):
            held.clear()
        elif isinstance(event, peers.BlockRemoved):
            for key in event.block_hashes:
                del held[event.medium, key]
        else:
            parent = event.parent_block_hash
            for i, key in enumerate(event.block_hashes):
                held[event.medium, key] = parent, tuple(event.token_ids[i * PAGE : (i + 1) * PAGE])
                parent = key
    return held


def test_an_indexer_that_reads_the_wire_knows_the_tree() -> None:
    rng = np.random.default_rng(7)
    t = tree()
    free = list(range(60))
    host = list(range(60))
    events: list[Event] = []
    for _ in range(300):
        key = rng.integers(0, 3, PAGE * int(rng.integers(1, 5)))
        hit = t.match(key)
        need = len(key) // PAGE - hit.num_tokens // PAGE
        if len(free) < need:
            result = t.evict(need * PAGE, backup=True)
            free += result.page_ids.tolist()
            host += result.host_page_ids.tolist()
            for request in result.to_backup:
                ids = [host.pop() for _ in request.page_ids] if len(host) >= len(request.page_ids) else None
                done = t.finish_backup(request.node, ids)
                free += done.page_ids.tolist()
                host += done.host_page_ids.tolist()
        if len(free) >= need:
            hit = t.match(key)
            need = len(key) // PAGE - hit.num_tokens // PAGE
            fresh = [free.pop() for _ in range(need)]
            free += t.insert(key, [*hit.page_ids().tolist(), *fresh]).duplicate_page_ids.tolist()
        if rng.random() < 0.2:
            host += t.evict_host(2 * PAGE).host_page_ids.tolist()
        events += t.take_events()
    assert any(event.kind == "removed" and event.medium == "host" for event in events)
    assert replayed(events) == replayed(snapshot(t))


@pytest.mark.parametrize(
    ("endpoint", "rank", "expected"),
    [
        ("tcp://*:5557", 0, "tcp://*:5557"),
        ("tcp://*:5557", 2, "tcp://*:5559"),
        ("tcp://[::]:5557", 1, "tcp://[::]:5558"),
        ("tcp://127.0.0.1:*", 3, "tcp://127.0.0.1:*"),
        ("inproc://cache", 1, "inproc://cache_dp1"),
        ("ipc:///tmp/kv", 1, "ipc:///tmp/kv_dp1"),
    ],
)
def test_each_rank_has_an_endpoint_of_its_own(endpoint: str, rank: int, expected: str) -> None:
    assert offset_endpoint(endpoint, rank) == expected
