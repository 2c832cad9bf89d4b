"""trace.py: what is read, refused (and with which line number), and expanded."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from radixkv.errors import RadixKVError
from radixkv.trace import (
    BlockTrie,
    TraceError,
    TraceRequest,
    expand_blocks,
    expand_prompt,
    expand_response,
    iter_trace,
    read_trace,
    summarize,
    write_trace,
)

from .support import real_trace

GOOD = {"timestamp": 5, "input_length": 1300, "output_length": 8, "hash_ids": [0, 14, 15]}


def line(**changes: object) -> str:
    return json.dumps({key: value for key, value in (GOOD | changes).items() if value is not ...})


def error_of(text: str | bytes) -> str:
    with pytest.raises(TraceError) as caught:
        list(iter_trace([line(), "", text], "t.jsonl"))
    assert str(caught.value).startswith("t.jsonl:3: ")
    assert isinstance(caught.value, RadixKVError)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- reading ---------------------------------------------------------------------------------------------------------
def test_reads_in_file_order_and_tolerates_blank_lines_and_other_keys() -> None:
    lines = ["\n", line(timestamp=9), "  \n", line(timestamp=2, kind="chat"), ""]
    assert list(iter_trace(lines)) == [
        TraceRequest(9, 1300, 8, (0, 14, 15)),
        TraceRequest(2, 1300, 8, (0, 14, 15)),
    ]


def test_bytes_and_text_lines_read_alike() -> None:
    assert list(iter_trace([line().encode()])) == list(iter_trace([line()]))


@pytest.mark.parametrize("cut", [1, 20, 40, -1])
def test_truncated_line(cut: int) -> None:
    assert "cut off" in error_of(line()[:cut])


@pytest.mark.parametrize("text", [b"\xff\xfe{}", "nonsense", "{'timestamp': 0}", "[" * 100_000])
def test_not_json(text: str | bytes) -> None:
    assert "not a JSON object" in error_of(text)


@pytest.mark.parametrize("text", ["[1, 2]", "3", "null", '"x"'])
def test_not_an_object(text: str) -> None:
    assert "expected a JSON object" in error_of(text)


@pytest.mark.parametrize("key", list(GOOD))
def test_missing_key(key: str) -> None:
    assert f'"{key}" is missing' in error_of(line(**{key: ...}))


@pytest.mark.parametrize("key", ["input_length", "output_length"])
@pytest.mark.parametrize(("value", "word"), [(-1, "negative"), (2**31, "too large"), (1.5, "whole"), ("7", "whole"),
                                             (True, "whole"), (None, "whole")])  # fmt: skip
def test_bad_length(key: str, value: object, word: str) -> None:
    message = error_of(line(**{key: value}))
    assert key in message
    assert word in message


@pytest.mark.parametrize("value", [-1, "0", None, True, float("nan"), float("inf"), [0]])
def test_bad_timestamp(value: object) -> None:
    assert "timestamp" in error_of(line(timestamp=value))


@pytest.mark.parametrize(("ids", "count"), [([0, 1], "2 hash_ids"), ([0, 1, 2, 3], "4 hash_ids"), ([], "0 hash_ids")])
def test_wrong_number_of_ids(ids: list[int], count: str) -> None:
    message = error_of(line(hash_ids=ids))
    assert count in message
    assert "3 blocks of 512" in message


@pytest.mark.parametrize("ids", [[0, 1, -2], [0, 1, 2.0], [0, 1, "2"], [0, 1, True], [0, 1, 2**63], "012", {"0": 1}])
def test_bad_ids(ids: object) -> None:
    assert "hash_ids" in error_of(line(hash_ids=ids))


def test_block_size_is_a_parameter() -> None:
    [request] = iter_trace([line(hash_ids=list(range(21)))], block_tokens=64)
    assert len(request.hash_ids) == 21
    with pytest.raises(TraceError, match="11 blocks of 128"):
        list(iter_trace([line()], block_tokens=128))


def test_empty_prompt_is_a_request() -> None:
    [request] = iter_trace([line(input_length=0, hash_ids=[])])
    assert expand_prompt(request).shape == (0,)


def test_limit_stops_before_a_later_fault(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(line() + "\n" + line() + "\n{broken\n")
    assert len(read_trace(str(path), limit=2)) == 2
    assert read_trace(str(path), limit=0) == []
    with pytest.raises(TraceError, match=r"t\.jsonl:3: "):
        read_trace(str(path))


@given(st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 99), st.integers(0, 10**6), st.randoms()), max_size=5))
def test_write_then_read(rows: list[tuple[int, int, int, object]]) -> None:
    requests = [TraceRequest(t, n, o, tuple(range(-(-n // 7)))) for t, n, o, _ in rows]
    out = io.StringIO()
    assert write_trace(out, requests) == len(requests)
    assert list(iter_trace(out.getvalue().splitlines(), block_tokens=7)) == requests


# ---- tokens ----------------------------------------------------------------------------------------------------------
def splitmix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    return (value ^ value >> 27) * 0x94D049BB133111EB % 2**64


@pytest.mark.parametrize(("block_tokens", "vocabulary"), [(512, 2**31 - 1), (7, 1000), (1, 2)])
def test_expansion_is_the_documented_function(block_tokens: int, vocabulary: int) -> None:
    ids = [0, 3, 3, 2**40, 2**63 - 1]
    found = expand_blocks(ids, block_tokens, vocabulary)
    assert found.dtype == np.int32
    positions = [(h * block_tokens + i) % 2**64 for h in ids for i in range(block_tokens)]
    assert found.tolist() == [(splitmix(p) >> 33) * vocabulary >> 31 for p in positions]


def test_equal_ids_give_equal_tokens_and_the_last_block_is_cut() -> None:
    long = expand_prompt(TraceRequest(0, 1300, 0, (4, 9, 4)))
    short = expand_prompt(TraceRequest(0, 700, 0, (4, 9)))
    assert len(long) == 1300
    assert np.array_equal(long[:700], short)
    assert np.array_equal(long[:276], long[1024:])
    assert not np.array_equal(long[:512], long[512:1024])


def test_blocks_differ_from_their_first_tokens_on() -> None:
    """Two blocks that began alike would give a tree hits that the trace does not have."""
    heads = np.concatenate(
        [expand_blocks(range(at, at + 2000), 512).reshape(-1, 512)[:, :2] for at in range(0, 200_000, 2000)]
    ).astype(np.int64)
    assert len(np.unique((heads[:, 0] << 31) + heads[:, 1])) == 200_000
    assert 200_000 - len(np.unique(heads[:, 0])) < 50  # about 9 pairs by chance, among all 2 * 10**10
    assert heads.min() >= 0


def test_small_vocabulary_is_respected_and_used() -> None:
    tokens = expand_blocks(range(1000), 512, 128_000)
    assert tokens.min() >= 0
    assert tokens.max() < 128_000
    assert len(np.unique(tokens)) > 125_000


def test_responses_are_unique_to_their_request() -> None:
    responses = np.stack([expand_response(i, 64) for i in range(1000)])
    assert len(np.unique(responses[:, :2], axis=0)) == 1000
    assert np.array_equal(expand_response(7, 9), responses[7, :9])
    prompts = expand_blocks(range(1000), 64).reshape(-1, 64)
    assert not set(map(tuple, responses[:, :2].tolist())) & set(map(tuple, prompts[:, :2].tolist()))


# ---- prefixes --------------------------------------------------------------------------------------------------------
def test_trie_numbers_prefixes_not_blocks() -> None:
    trie = BlockTrie()
    assert trie.add([5, 6, 6]) == [0, 1, 2]
    assert trie.add([6, 5]) == [3, 4]
    assert trie.add([5, 6, 7]) == [0, 1, 5]
    assert len(trie) == 6


def summary_of_tokens(requests: list[TraceRequest], page_size: int, block_tokens: int) -> tuple[int, int]:
    """hit and cached tokens, the slow way: sets of token prefixes."""
    seen: set[tuple[int, ...]] = set()
    hit = 0
    for request in requests:
        tokens = expand_prompt(request, block_tokens).tolist()
        prefixes = [tuple(tokens[:end]) for end in range(page_size, len(tokens) + 1, page_size)]
        hit += page_size * sum(1 for _ in itertools.takewhile(seen.__contains__, prefixes))
        seen.update(prefixes)
    return hit, page_size * len(seen)


@given(st.data(), st.sampled_from([1, 2, 3, 4, 5, 8]))
def test_summary_agrees_with_sets_of_prefixes(data: st.DataObject, page_size: int) -> None:
    block_tokens = 4
    requests = []
    for _ in range(data.draw(st.integers(1, 8))):
        ids = data.draw(st.lists(st.integers(0, 2), max_size=4))
        cut = data.draw(st.integers(0, 3)) if ids else 0
        requests.append(TraceRequest(0, len(ids) * block_tokens - cut, 1, tuple(ids)))
    summary = summarize(requests, page_size, block_tokens)
    assert (summary.hit_tokens, summary.cached_tokens) == summary_of_tokens(requests, page_size, block_tokens)
    assert summary.blocks == summary.hit_blocks + summary.unique_blocks


def test_summary_of_the_conversation_trace() -> None:
    requests = read_trace(str(real_trace()))
    everything = summarize(requests)
    assert everything.requests == 12_031
    assert everything.input_tokens == 144_793_823
    assert (everything.blocks, everything.unique_blocks, everything.hit_blocks) == (288_500, 182_790, 105_710)
    assert (everything.hit_tokens, everything.cached_tokens) == (54_097_552, 90_606_656)
    first = summarize(requests[:2000])
    assert (first.hit_tokens, first.input_tokens, first.cached_tokens) == (8_070_832, 27_441_774, 19_356_288)
