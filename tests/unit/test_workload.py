"""replay/workload.py: deterministic, valid, and with the reuse that each kind is for."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from radixkv.errors import InvalidArgumentError
from radixkv.replay.workload import KINDS, WorkloadConfig, generate
from radixkv.trace import BlockTrie, TraceRequest, iter_trace, summarize, write_trace


def make(**options: Any) -> list[TraceRequest]:
    return list(generate(WorkloadConfig(**options)))


def text(requests: list[TraceRequest]) -> str:
    out = io.StringIO()
    write_trace(out, requests)
    return out.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_same_arguments_same_trace_and_more_requests_only_append(kind: str) -> None:
    long = make(kind=kind, requests=150, seed=7)
    assert make(kind=kind, requests=150, seed=7) == long
    assert make(kind=kind, requests=60, seed=7) == long[:60]
    assert make(kind=kind, requests=150, seed=8) != long


def test_trace_of_a_seed_never_changes() -> None:
    """Figures are quoted by seed. If this must change, say so where they are quoted."""
    digest = hashlib.sha256(text(make(requests=200, seed=1)).encode()).hexdigest()
    assert digest == "2acc2628c07fa2e04937848c00e16c47788296559c402dfe33cf455f2b72fdbe"


@pytest.mark.parametrize("block_tokens", [16, 100, 512])
@pytest.mark.parametrize("kind", KINDS)
def test_valid_trace(kind: str, block_tokens: int) -> None:
    requests = make(kind=kind, requests=200, seed=2, block_tokens=block_tokens, max_input_tokens=40_000)
    assert len(requests) == 200
    assert list(iter_trace(text(requests).splitlines(), block_tokens=block_tokens)) == requests
    assert requests[0].timestamp == 0
    assert all(a.timestamp <= b.timestamp for a, b in pairwise(requests))
    assert all(isinstance(r.timestamp, int) and 0 < r.input_length <= 40_000 and r.output_length > 0 for r in requests)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_ids_stand_at_equal_prefixes(kind: str) -> None:
    parents: dict[int, int] = {}
    requests = make(kind=kind, requests=300, seed=4)
    for request in requests:
        for parent, block in pairwise((-1, *request.hash_ids)):
            assert parents.setdefault(block, parent) == parent
    trie = BlockTrie()
    for request in requests:
        trie.add(request.hash_ids)
    assert len(trie) == len(parents)


def test_a_cut_block_is_of_one_length() -> None:
    """An id must not be reused when the text behind it goes on differently."""
    lengths: dict[int, set[int]] = {}
    for request in make(kind="chat", requests=400, seed=5):
        last = request.input_length - 512 * (len(request.hash_ids) - 1)
        lengths.setdefault(request.hash_ids[-1], set()).add(last)
        for block in request.hash_ids[:-1]:
            lengths.setdefault(block, set()).add(512)
    assert all(len(found) == 1 for found in lengths.values())


@pytest.mark.parametrize(("kind", "low", "high"), [("chat", 0.5, 0.85), ("agent", 0.8, 0.98), ("documents", 0.8, 0.99),
                                                   ("system", 0.7, 0.95), ("mixed", 0.75, 0.95)])  # fmt: skip
def test_share_of_reuse(kind: str, low: float, high: float) -> None:
    for seed in (0, 1):
        summary = summarize(make(kind=kind, requests=1500, seed=seed))
        assert low < summary.hit_tokens / summary.input_tokens < high


def leaves(requests: list[TraceRequest]) -> Counter[int]:
    """How many different blocks follow each block."""
    children = {pair for request in requests for pair in pairwise(request.hash_ids)}
    return Counter(parent for parent, _ in children)


def test_chat_history_grows() -> None:
    requests = make(kind="chat", requests=600, seed=1, sessions_per_s=0.0001)  # one session after another
    grown = sum(b.input_length > a.input_length and b.hash_ids[: len(a.hash_ids) - 1] == a.hash_ids[:-1]
                for a, b in pairwise(requests))  # fmt: skip
    assert grown > 300


def test_agents_branch_and_burst() -> None:
    requests = make(kind="agent", requests=600, seed=1, sessions_per_s=0.001)  # one after another
    back = sum(b.input_length < a.input_length and len(b.hash_ids) > 20 for a, b in pairwise(requests))
    assert back > 10  # retries from an earlier state, where a new session would begin shorter
    pauses = sorted(b.timestamp - a.timestamp for a, b in pairwise(requests))
    assert pauses[len(pauses) // 2] < 10_000
    assert any(b.input_length - a.input_length > 5000 for a, b in pairwise(requests))  # a long tool result


def test_documents_are_long_shared_and_asked_about_briefly() -> None:
    requests = make(kind="documents", requests=500, seed=1)
    readers = Counter(request.hash_ids[:-2] for request in requests if len(request.hash_ids) > 3)
    assert readers.most_common(1)[0][1] >= 20
    assert sum(request.input_length for request in requests) / 500 > 10_000


def test_system_prompts_are_few_and_shared() -> None:
    requests = make(kind="system", requests=500, seed=1)
    assert len({request.hash_ids[0] for request in requests}) <= 12
    assert max(leaves(requests).values()) > 50


def test_mix_sets_the_shares_of_sessions() -> None:
    only = make(kind="mixed", mix={"chat": 3, "agent": 0.0}, requests=80, seed=9)
    assert only == make(kind="mixed", mix={"chat": 1.0}, requests=80, seed=9)
    assert summarize(only).hit_tokens == summarize(make(kind="chat", requests=80, seed=9)).hit_tokens
    assert make(kind="mixed", mix={"agent": 1}, requests=80, seed=9) != only


def test_arrival_rate_sets_the_clock() -> None:
    slow = make(kind="system", requests=2000, seed=1, sessions_per_s=0.5)
    assert 3_000_000 < slow[-1].timestamp < 5_000_000  # 2000 sessions at one in two seconds
    gaps = [b.timestamp - a.timestamp for a, b in pairwise(slow)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert 0.8 < variance**0.5 / mean < 1.2  # Poisson: the deviation of the gaps is their mean


@pytest.mark.parametrize("options", [
    {"kind": "chats"}, {"requests": -1}, {"sessions_per_s": 0.0}, {"sessions_per_s": float("nan")},
    {"max_input_tokens": 0}, {"block_tokens": 0}, {"mix": {"chat": -1.0}}, {"mix": {"chat": 0.0}}, {"mix": {}},
    {"mix": {"mixed": 1.0}}, {"mix": {"chat": 1.0, "x": 1.0}}, {"kind": "chat", "mix": {"chat": 1.0}},
])  # fmt: skip
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError):
        WorkloadConfig(**options)


def test_a_limit_that_no_prompt_meets_is_said() -> None:
    with pytest.raises(InvalidArgumentError, match="max_input_tokens=10"):
        make(kind="documents", requests=5, max_input_tokens=10)


def test_no_requests() -> None:
    assert make(requests=0) == []
