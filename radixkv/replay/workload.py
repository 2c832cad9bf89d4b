"""L5: generates traces, by seed: what a serving fleet sees, in the format of ``trace.py``.

Sessions arrive as a Poisson process. A session is one user, one agent run or one reader; its requests have prompts that
share prefixes with its own earlier ones (history) and with other sessions (system prompts, documents):

    system      one of a few long system prompts, then a short question that is never asked again
    chat        a short system prompt shared by a group, then turns: history + response + next message; users think
    agent       tool definitions shared by all runs of an agent, then bursts of turns with long tool results and
                hardly a pause; sometimes a run goes back to an earlier turn and tries another branch
    documents   one of many long documents, the popular ones read often, then a few short questions
    mixed       all four, in settable shares

Only ``random.Random.random`` and arithmetic decide, one generator a session: the same arguments give the same trace,
byte for byte (where exp, log and cos agree to the last bit), and asking for more requests only appends.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from ..errors import InvalidArgumentError
from ..trace import DEFAULT_BLOCK_TOKENS, TraceRequest

__all__ = ["DEFAULT_MIX", "KINDS", "WorkloadConfig", "generate"]

KINDS = ("chat", "agent", "documents", "system", "mixed")
DEFAULT_MIX: Mapping[str, float] = {"chat": 0.45, "agent": 0.2, "documents": 0.2, "system": 0.15}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadConfig:
    """What to generate.

    Args:
        kind: one of KINDS.
        requests: how many, >= 0.
        seed: any int.
        mix: shares of sessions by kind for "mixed"; need not sum to 1.
        sessions_per_s: arrival rate of sessions; more sessions at a time = more distance between the turns of one.
        max_input_tokens: a session ends rather than send a longer prompt.
        block_tokens: tokens a block.
    """

    kind: str = "mixed"
    requests: int = 1000
    seed: int = 0
    mix: Mapping[str, float] | None = None
    sessions_per_s: float = 1.0
    max_input_tokens: int = 131_072
    block_tokens: int = DEFAULT_BLOCK_TOKENS

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidArgumentError(f"kind must be one of {', '.join(KINDS)}, not {self.kind!r}")
        if self.mix is not None and self.kind != "mixed":
            raise InvalidArgumentError(f"mix is for kind mixed, not {self.kind}")
        if self.requests < 0:
            raise InvalidArgumentError(f"requests must be at least 0, not {self.requests}")
        for name in ("max_input_tokens", "block_tokens"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not (math.isfinite(self.sessions_per_s) and self.sessions_per_s > 0):
            raise InvalidArgumentError(f"sessions_per_s must be above 0, not {self.sessions_per_s}")
        for kind, share in self.shares().items():
            if kind not in KINDS or kind == "mixed":
                raise InvalidArgumentError(f"mix names an unknown kind: {kind!r}")
            if not (math.isfinite(share) and share >= 0):
                raise InvalidArgumentError(f"mix has a share of {share} for {kind}; shares are 0 or more")
        if sum(self.shares().values()) <= 0:
            raise InvalidArgumentError("mix has no share above 0")

    def shares(self) -> Mapping[str, float]:
        """Shares of sessions by kind."""
        if self.kind != "mixed":
            return {self.kind: 1.0}
        return DEFAULT_MIX if self.mix is None else self.mix


@dataclass(frozen=True, slots=True)
class _Turn:
    """A request that a session sends ``pause_s`` after its previous one (the first: after its arrival)."""

    pause_s: float
    prompt: _Text
    output_tokens: int


class _Text:
    """A growing text: whole blocks by id, and the pieces of the last, unfinished one. Copies share the past."""

    __slots__ = ("blocks", "length", "pieces")

    def __init__(self, blocks: tuple[int, ...] = (), pieces: tuple[tuple[str, int, int], ...] = (), length: int = 0):
        self.blocks, self.pieces, self.length = blocks, pieces, length

    def then(self, ids: _BlockIds, name: str, tokens: int) -> _Text:
        """This text followed by ``tokens`` tokens of the content called ``name``: equal names are equal contents."""
        blocks, pieces = list(self.blocks), list(self.pieces)
        room = ids.block_tokens - self.length % ids.block_tokens
        at = 0
        while tokens - at >= room:
            parent = blocks[-1] if blocks else -1
            blocks.append(ids.number(parent, (*pieces, (name, at, room))))
            pieces = []
            at += room
            room = ids.block_tokens
        if at < tokens:
            pieces.append((name, at, tokens - at))
        return _Text(tuple(blocks), tuple(pieces), self.length + tokens)

    def hash_ids(self, ids: _BlockIds) -> tuple[int, ...]:
        if not self.pieces:
            return self.blocks
        return (*self.blocks, ids.number(self.blocks[-1] if self.blocks else -1, self.pieces))


class _BlockIds:
    """Equal blocks at equal prefixes get equal ids, counted up from 0 in order of first use."""

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self._numbers: dict[tuple[int, tuple[tuple[str, int, int], ...]], int] = {}

    def number(self, parent: int, pieces: tuple[tuple[str, int, int], ...]) -> int:
        return self._numbers.setdefault((parent, pieces), len(self._numbers))


# ---- distributions, from random() alone ------------------------------------------------------------------------------
def _exponential(rng: random.Random, mean: float) -> float:
    return -mean * math.log(1.0 - rng.random())


def _lognormal(rng: random.Random, median: float, sigma: float, low: int, high: int) -> int:
    """Whole tokens, clipped to low .. high. Box-Muller."""
    normal = math.sqrt(-2.0 * math.log(1.0 - rng.random())) * math.cos(2.0 * math.pi * rng.random())
    return max(low, min(high, round(median * math.exp(sigma * normal))))


def _popular(rng: random.Random, count: int) -> int:
    """0 .. count - 1, about as Zipf: item k is drawn in proportion to log((k + 2) / (k + 1))."""
    return min(count - 1, int((count + 1) ** rng.random()) - 1)


def _shared(config: WorkloadConfig, name: str, median: float, sigma: float, low: int, high: int) -> int:
    """The length of a shared text: a fact of its name and the seed, the same in every session."""
    return _lognormal(random.Random(f"{config.seed}/{name}"), median, sigma, low, high)


# ---- sessions --------------------------------------------------------------------------------------------------------
def _system(config: WorkloadConfig, ids: _BlockIds, rng: random.Random, session: str) -> Iterator[_Turn]:
    name = f"system prompt {_popular(rng, 12)}"
    prompt = _Text().then(ids, name, _shared(config, name, 3000, 0.6, 500, 12_000))
    question = prompt.then(ids, f"{session} question", _lognormal(rng, 200, 0.9, 8, 4000))
    yield _Turn(0.0, question, _lognormal(rng, 250, 0.7, 1, 2000))


def _chat(config: WorkloadConfig, ids: _BlockIds, rng: random.Random, session: str) -> Iterator[_Turn]:
    name = f"assistant {_popular(rng, 6)}"
    text = _Text().then(ids, name, _shared(config, name, 800, 0.5, 200, 3000))
    pause_s = 0.0
    turn = 0
    while True:
        text = text.then(ids, f"{session} message {turn}", _lognormal(rng, 150, 1.2, 4, 16_000))
        output = _lognormal(rng, 350, 0.8, 1, 2000)
        yield _Turn(pause_s, text, output)
        if rng.random() < 1 / 7:  # seven turns on average
            return
        text = text.then(ids, f"{session} response {turn}", output)
        pause_s = output / 50 + 5 + _exponential(rng, 40)  # written at 50 tokens a second, read, answered
        turn += 1


def _agent(config: WorkloadConfig, ids: _BlockIds, rng: random.Random, session: str) -> Iterator[_Turn]:
    name = f"tools {_popular(rng, 4)}"
    text = _Text().then(ids, name, _shared(config, name, 6000, 0.4, 2000, 16_000))
    text = text.then(ids, f"{session} task", _lognormal(rng, 400, 0.8, 30, 6000))
    turns = 3 + int(_exponential(rng, 15))
    past = [text]
    pause_s = 0.0
    for turn in range(turns):
        output = _lognormal(rng, 120, 0.8, 10, 3000)
        yield _Turn(pause_s, text, output)
        tool_s = 0.2 + _exponential(rng, 2.0)
        if len(past) > 2 and rng.random() < 0.08:  # a dead end: back to an earlier state, another branch from there
            keep = 1 + int(rng.random() * (len(past) - 1))
            del past[keep:]
            text = past[-1].then(ids, f"{session} retry {turn}", _lognormal(rng, 120, 0.8, 10, 3000))
        else:
            text = text.then(ids, f"{session} call {turn}", output)
            text = text.then(ids, f"{session} result {turn}", _lognormal(rng, 600, 1.3, 20, 24_000))
        past.append(text)
        pause_s = output / 50 + tool_s
        if rng.random() < 0.05:  # a person is asked, and the burst ends
            pause_s += 20 + _exponential(rng, 120)


def _documents(config: WorkloadConfig, ids: _BlockIds, rng: random.Random, session: str) -> Iterator[_Turn]:
    name = f"document {_popular(rng, 60)}"
    document = _Text().then(ids, "reader", 180).then(ids, name, _shared(config, name, 16_000, 0.7, 2000, 100_000))
    pause_s = 0.0
    for question in range(1 + int(_exponential(rng, 2.0))):
        text = document.then(ids, f"{session} question {question}", _lognormal(rng, 40, 0.7, 5, 500))
        output = _lognormal(rng, 220, 0.7, 1, 1500)
        yield _Turn(pause_s, text, output)
        pause_s = output / 50 + 10 + _exponential(rng, 60)


_Session = Callable[[WorkloadConfig, _BlockIds, random.Random, str], Iterator[_Turn]]
_SESSIONS: dict[str, _Session] = {"system": _system, "chat": _chat, "agent": _agent, "documents": _documents}


# ---- the clock -------------------------------------------------------------------------------------------------------
def generate(config: WorkloadConfig) -> Iterator[TraceRequest]:
    """Yield ``config.requests`` requests in order of time; timestamps in whole ms, the first is 0."""
    ids = _BlockIds(config.block_tokens)
    arrivals = random.Random(f"{config.seed}/arrivals")
    pending: list[tuple[float, int, Iterator[_Turn], _Turn]] = []  # the next turn of each session, by time
    arrival_s = 0.0
    started = sent = barren = 0
    while sent < config.requests:
        while not pending or arrival_s <= pending[0][0]:
            turns = _start(config, ids, arrivals, started)
            _schedule(pending, config, arrival_s, started, turns)
            started += 1
            arrival_s += _exponential(arrivals, 1 / config.sessions_per_s)
            barren = 0 if pending else barren + 1
            if barren == 5000:
                raise InvalidArgumentError(
                    f"max_input_tokens={config.max_input_tokens} is less than the prompts of kind {config.kind} need"
                )
        now_s, session, turns, turn = heapq.heappop(pending)
        yield TraceRequest(int(now_s * 1000), turn.prompt.length, turn.output_tokens, turn.prompt.hash_ids(ids))
        sent += 1
        _schedule(pending, config, now_s, session, turns)


def _start(config: WorkloadConfig, ids: _BlockIds, arrivals: random.Random, session: int) -> Iterator[_Turn]:
    shares = config.shares()
    point = arrivals.random() * sum(shares.values())
    chosen = next(kind for kind, share in shares.items() if share > 0)
    for kind, share in shares.items():
        if point < share:
            chosen = kind
            break
        point -= share
    rng = random.Random(f"{config.seed}/{chosen}/{session}")
    return _SESSIONS[chosen](config, ids, rng, f"session {session}")


def _schedule(
    pending: list[tuple[float, int, Iterator[_Turn], _Turn]],
    config: WorkloadConfig,
    now_s: float,
    session: int,
    turns: Iterator[_Turn],
) -> None:
    turn = next(turns, None)
    if turn is not None and turn.prompt.length <= config.max_input_tokens:
        heapq.heappush(pending, (now_s + turn.pause_s, session, turns, turn))
