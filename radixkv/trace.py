"""L1: traces in Mooncake's format, one JSON object a line, and the token ids that they stand for.

    {"timestamp": 0, "input_length": 1300, "output_length": 80, "hash_ids": [0, 14, 15]}

``timestamp`` is in milliseconds, the lengths in tokens, and ``hash_ids`` names each block of the prompt: equal ids are
equal blocks at an equal prefix, and the last block is cut to ``input_length``. Other keys are ignored.

Source: kvcache-ai/Mooncake, FAST25-release/traces (block size 512).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from .errors import RadixKVError

__all__ = [
    "DEFAULT_BLOCK_TOKENS",
    "DEFAULT_VOCABULARY",
    "BlockTrie",
    "TraceError",
    "TraceRequest",
    "TraceSummary",
    "expand_blocks",
    "expand_prompt",
    "expand_response",
    "iter_trace",
    "read_trace",
    "summarize",
    "write_trace",
]

DEFAULT_BLOCK_TOKENS = 512
DEFAULT_VOCABULARY = 2**31 - 1
"""As many ids as int32 has: then even the first tokens of two blocks practically never agree (at a real model's 128k
they agree once in 128k pairs of siblings, and a tree of page size 1 would see hits that the trace does not have)."""

Tokens = npt.NDArray[np.int32]
_MAX_ID = 2**63 - 1
_RESPONSE_SALT = np.uint64(0xA5A5_5A5A_C3C3_3C3C)


class TraceError(RadixKVError, ValueError):
    """A trace that cannot be read; the message begins with ``file:line:``."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request. ``timestamp`` in ms, the lengths in tokens, an id a block of the prompt (the last may be cut)."""

    timestamp: int | float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """What an unbounded cache would make of the prompts of a trace.

    ``hit_blocks`` and ``unique_blocks`` count cut blocks whole. ``hit_tokens`` sums floor(common prefix / page) * page
    over the requests, ``cached_tokens`` is what such a cache holds in the end, both in whole pages.
    """

    requests: int
    input_tokens: int
    output_tokens: int
    blocks: int
    unique_blocks: int
    hit_blocks: int
    hit_tokens: int
    cached_tokens: int


# ---- reading and writing ---------------------------------------------------------------------------------------------
def read_trace(path: str, block_tokens: int = DEFAULT_BLOCK_TOKENS, limit: int | None = None) -> list[TraceRequest]:
    """Read a trace, in file order; at most ``limit`` requests. ``-`` is standard input. Errors as iter_trace."""
    requests: list[TraceRequest] = []
    if limit is not None and limit <= 0:
        return requests
    if path == "-":
        source = iter_trace(sys.stdin.buffer, "<stdin>", block_tokens)
        return _take(source, limit)
    with open(path, "rb") as lines:
        return _take(iter_trace(lines, path, block_tokens), limit)


def _take(source: Iterator[TraceRequest], limit: int | None) -> list[TraceRequest]:
    requests = []
    for request in source:
        requests.append(request)
        if len(requests) == limit:
            break
    return requests


def iter_trace(
    lines: Iterable[bytes | str], name: str = "trace", block_tokens: int = DEFAULT_BLOCK_TOKENS
) -> Iterator[TraceRequest]:
    """Parse and validate lines; blank ones are skipped.

    Raises:
        TraceError: ``name:line: what is wrong``, for anything that is not JSON (a truncated line), a missing key, a
            wrong type, a negative value, or a number of hash_ids other than ceil(input_length / block_tokens).
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield _parse(line, block_tokens)
        except TraceError as error:
            raise TraceError(f"{name}:{number}: {error}") from None


def _parse(line: bytes | str, block_tokens: int) -> TraceRequest:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"not a JSON object, is the line cut off? ({error})") from None
    if not isinstance(record, dict):
        raise TraceError(f"expected a JSON object, found {type(record).__name__}")
    for key in ("timestamp", "input_length", "output_length", "hash_ids"):
        if key not in record:
            raise TraceError(f'the key "{key}" is missing')
    timestamp = record["timestamp"]
    if isinstance(timestamp, bool) or not isinstance(timestamp, int | float) or not math.isfinite(timestamp):
        raise TraceError(f'"timestamp" must be a number of milliseconds, not {timestamp!r}')
    if timestamp < 0:
        raise TraceError(f'"timestamp" is negative: {timestamp}')
    input_length = _count(record, "input_length")
    output_length = _count(record, "output_length")
    return TraceRequest(timestamp, input_length, output_length, _ids(record["hash_ids"], input_length, block_tokens))


def _count(record: dict[str, Any], key: str) -> int:
    value = record[key]
    if isinstance(value, bool) or not isinstance(value, int):
        raise TraceError(f'"{key}" must be a whole number of tokens, not {value!r}')
    if not 0 <= value <= 2**31 - 1:
        raise TraceError(f'"{key}" is {"negative" if value < 0 else "too large"}: {value}')
    return value


def _ids(value: object, input_length: int, block_tokens: int) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise TraceError(f'"hash_ids" must be a list, not {type(value).__name__}')
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item <= _MAX_ID:
            raise TraceError(f'"hash_ids" must hold whole numbers from 0 to 2**63 - 1, not {item!r}')
    expected = -(-input_length // block_tokens)
    if len(value) != expected:
        raise TraceError(
            f"{len(value)} hash_ids for an input_length of {input_length}, "
            f"which is {expected} blocks of {block_tokens} tokens"
        )
    return tuple(value)


def write_trace(out: IO[str], requests: Iterable[TraceRequest]) -> int:
    """Write requests to an open text file, one JSON object a line; returns how many."""
    written = 0
    for request in requests:
        record = {
            "timestamp": request.timestamp,
            "input_length": request.input_length,
            "output_length": request.output_length,
            "hash_ids": list(request.hash_ids),
        }
        out.write(json.dumps(record) + "\n")
        written += 1
    return written


# ---- tokens ----------------------------------------------------------------------------------------------------------
def expand_prompt(
    request: TraceRequest, block_tokens: int = DEFAULT_BLOCK_TOKENS, vocabulary: int = DEFAULT_VOCABULARY
) -> Tokens:
    """The prompt of a request: a new int32 array of input_length tokens."""
    return expand_blocks(request.hash_ids, block_tokens, vocabulary)[: request.input_length]


def expand_blocks(
    hash_ids: Iterable[int], block_tokens: int = DEFAULT_BLOCK_TOKENS, vocabulary: int = DEFAULT_VOCABULARY
) -> Tokens:
    """Expand block ids to int32 tokens below ``vocabulary``: token i of block h is a fixed mix of h * block_tokens + i.

    Equal ids give equal tokens; the mix is a bijection of 64 bits (the finalizer of splitmix64, its last shift left
    out), of which the upper 31 are scaled to the vocabulary.

    Returns: a new array of len(hash_ids) * block_tokens tokens.
    """
    blocks = np.array(tuple(hash_ids), dtype=np.uint64)
    ids = np.tile(np.arange(block_tokens, dtype=np.uint64), (len(blocks), 1))
    ids += blocks[:, None] * np.uint64(block_tokens)
    return _to_tokens(ids.reshape(-1), vocabulary)


def expand_response(request_index: int, output_length: int, vocabulary: int = DEFAULT_VOCABULARY) -> Tokens:
    """Tokens for a response, int32 [output_length]. A trace does not name them, so they are unique to the request."""
    ids: npt.NDArray[np.uint64] = np.arange(output_length, dtype=np.uint64) + np.uint64(request_index << 32)
    ids ^= _RESPONSE_SALT
    return _to_tokens(ids, vocabulary)


def _to_tokens(ids: npt.NDArray[np.uint64], vocabulary: int) -> Tokens:
    """Mix in place: ``ids`` is consumed. Kept to few passes, because a trace has 10**8 tokens and more."""
    ids += np.uint64(0x9E37_79B9_7F4A_7C15)
    ids ^= ids >> np.uint64(30)
    ids *= np.uint64(0xBF58_476D_1CE4_E5B9)
    ids ^= ids >> np.uint64(27)
    ids *= np.uint64(0x94D0_49BB_1331_11EB)
    ids >>= np.uint64(33)
    ids *= np.uint64(vocabulary)
    ids >>= np.uint64(31)
    return ids.astype(np.int32)


# ---- prefixes --------------------------------------------------------------------------------------------------------
class BlockTrie:
    """Numbers the prefixes of a trace: block k of two requests has one number exactly if their blocks 0 .. k are equal.

    Numbers count up from 0 in order of first use, so a number >= the size before the call was not there before.
    """

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, hash_ids: Iterable[int]) -> list[int]:
        """Add a path; returns the number of each block. The numbers of blocks that were there come first."""
        numbers = self._numbers
        parent = -1
        path = []
        for block in hash_ids:
            parent = numbers.setdefault((parent, block), len(numbers))
            path.append(parent)
        return path


def summarize(
    requests: Iterable[TraceRequest], page_size: int = 16, block_tokens: int = DEFAULT_BLOCK_TOKENS
) -> TraceSummary:
    """Count what an unbounded cache would hit and hold. One pass, no tokens: it checks a tree independently."""
    trie = BlockTrie()
    longest: list[int] = []  # per block number: the most tokens of it that any request had (a cut block may grow later)
    count = input_tokens = output_tokens = blocks = hit_blocks = hit_tokens = cached_tokens = 0
    for request in requests:
        count += 1
        input_tokens += request.input_length
        output_tokens += request.output_length
        known = len(trie)
        path = trie.add(request.hash_ids)
        longest.extend([0] * (len(trie) - known))
        blocks += len(path)
        hit_blocks += sum(number < known for number in path)
        common = _common_tokens(path, known, longest, request.input_length, block_tokens)
        hit = common // page_size * page_size
        hit_tokens += hit
        cached_tokens += request.input_length // page_size * page_size - hit
    return TraceSummary(count, input_tokens, output_tokens, blocks, len(trie), hit_blocks, hit_tokens, cached_tokens)


def _common_tokens(path: list[int], known: int, longest: list[int], input_length: int, block_tokens: int) -> int:
    """Tokens that this prompt shares with those before it; records in ``longest`` how far its own blocks reach."""
    common = 0
    for k, number in enumerate(path):
        tokens = min(block_tokens, input_length - k * block_tokens)
        if number < known and common == k * block_tokens:
            common += min(tokens, longest[number])
        longest[number] = max(longest[number], tokens)
    return common
