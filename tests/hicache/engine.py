"""A small engine over one cache: chats with shared prefixes, and single calls, each a step that a seed decides.

Two engines that are given the same script do the same as long as their caches answer the same, so what they see can be
compared step by step. The calls and their order are those of SGLang's scheduler of 2025-08 (match, lock, load back,
evict, allocate, cache the unfinished and the finished request, retract), and below them every call of the API alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from . import content
from .sides import Setup, Side

NONE = torch.empty(0, dtype=torch.int64)


class Step(NamedTuple):
    """What to do; all choices of it come from its own seed."""

    name: str
    seed: int


WEIGHTS = {
    "start": 20, "go_on": 7, "decode": 10, "finish": 14, "unfinished": 3, "abort": 2, "insert": 10, "match": 6,
    "lock": 4, "unlock": 5, "evict": 10, "evict_host": 2, "write_backup": 3, "load": 6, "ready": 5, "poll": 20,
    "reset": 0.4,
}  # fmt: skip
STORAGE_WEIGHTS = {"prefetch": 14, "progress": 14, "forget": 6, "time": 3}


def script(seed: int, length: int, setup: Setup) -> list[Step]:
    """The steps of a seed; a shorter script is the beginning of a longer one."""
    rng = random.Random(f"script {seed}")
    weights = {**WEIGHTS, **(STORAGE_WEIGHTS if setup.storage else {})}
    names, shares = list(weights), list(weights.values())
    return [Step(rng.choices(names, shares)[0], rng.getrandbits(48)) for _ in range(length)]


@dataclass(eq=False)
class Request:
    """With the attributes that cache_finished_req and cache_unfinished_req read."""

    rid: str
    chat: int
    origin_input_ids: list[int]
    req_pool_idx: int
    prefix_indices: Any
    last_node: Any
    fill_ids: list[int] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)
    kv_tokens: int = 0
    """Tokens that have slots in req_to_token, and KV."""
    last_mark: int = content.START
    """Of the last of them, see content.py."""

    def tokens(self) -> list[int]:
        return self.origin_input_ids + self.output_ids


class Engine:
    """One cache in use. ``do`` runs a step and returns what it saw; ``state`` is the whole cache."""

    def __init__(self, side: Side, seed: int) -> None:
        self.side, self.cache, self.setup = side, side.cache, side.setup
        self.page = self.setup.page_size
        self.unit = max(self.page, 8)
        rng = random.Random(f"chats {seed}")
        shared = self._tokens(rng, self.unit * 2 + 3)
        self.chats = [[], shared, shared, shared + self._tokens(rng, self.unit), self._tokens(rng, self.unit * 4)]
        self.live: list[Request] = []
        self.locks: list[Any] = []
        self.prefetches: list[tuple[str, int]] = []
        self.unstarted = False
        """Loads are queued and not started: their slots hold nothing yet."""
        self._planes, self._width = len(side.planes()), side.planes()[0].shape[1]
        self._requests = 0

    # ---- steps -----------------------------------------------------------------------------------------------------
    def do(self, step: Step) -> dict[str, Any]:
        """Run a step, wait until what it started is done. Returns: what an observer may compare.

        With storage the cache is told of the end of everything after each step: prefetches take another number of
        looks in the two caches. Without it, only in steps of their own, so that operations overlap.
        """
        seen: dict[str, Any] = getattr(self, f"_do_{step.name}")(random.Random(step.seed)) or {}
        self.side.settle()
        if self.setup.storage:
            self._drain()
        return seen

    def _drain(self) -> None:
        for _ in range(4):  # look-up, fetch; write, store
            self.cache.check_hicache_events()
            self.side.settle()
        self.cache.check_hicache_events()

    def _do_start(self, rng: random.Random) -> dict[str, Any]:
        """A chat goes on: find its prefix, load it back, compute the rest."""
        chat = rng.randrange(len(self.chats))
        history = self.chats[chat]
        if rng.random() < 0.25:  # ask again: another branch of the same chat
            history = history[: rng.randrange(len(history) + 1)]
        prompt = history + self._tokens(rng, rng.randint(1, self.unit * 4))
        quota = rng.choice([None, None, None, self.unit * 2, 0])
        load, chunked = rng.random() < 0.85, rng.random() < 0.3
        if self.req_to_token.available_size() == 0 or len(prompt) + self.unit * 8 > self.setup.context_tokens:
            return {"refused": "full"}
        match = self.cache.match_prefix(key=prompt[:-1])
        seen: dict[str, Any] = {"device": len(match.device_indices), "host": match.host_hit_length}
        prefix, node = match.device_indices, match.last_device_node
        if load and match.host_hit_length:
            self.cache.inc_lock_ref(node)
            loaded, last = self.cache.init_load_back(match.last_host_node, match.host_hit_length, quota)
            self.cache.dec_lock_ref(node)
            prefix, node = torch.cat([prefix, loaded]), last
            seen["loaded"] = len(loaded)
            self.unstarted |= len(loaded) > 0
        seen["lock"] = self.cache.inc_lock_ref(node)
        self._requests += 1
        request = Request(f"r{self._requests}", chat, prompt, self.req_to_token.alloc(1)[0], prefix, node)
        self.req_to_token.write((request.req_pool_idx, slice(0, len(prefix))), prefix)
        request.kv_tokens = len(prefix)
        if len(prefix):
            request.last_mark = int(content.prefix_marks(prompt[: len(prefix)])[-1])
        self._do_ready(rng)
        self.side.settle()
        seen["wrong_kv"] = self._wrong(prompt, prefix)
        whole = len(prompt)
        upto = rng.randint(len(prefix) + 1, whole) if chunked and whole > len(prefix) + 1 else whole
        seen |= self._compute(request, upto, cache=rng.random() < 0.85)
        return seen

    def _do_go_on(self, rng: random.Random) -> dict[str, Any]:
        """The next chunk of a prompt."""
        waiting = [r for r in self.live if r.kv_tokens < len(r.origin_input_ids)]
        if not waiting:
            return {"refused": "none"}
        request = rng.choice(waiting)
        upto = rng.randint(request.kv_tokens + 1, len(request.origin_input_ids))
        return self._compute(request, upto, cache=rng.random() < 0.85)

    def _compute(self, request: Request, upto: int, cache: bool) -> dict[str, Any]:
        """Prefill up to token ``upto``; without room the request is given up."""
        slots = self._extend(request, upto)
        if slots is None:
            self._release(request)
            return {"out_of_memory": upto}
        self._write(request, slots, upto)
        if request not in self.live:
            self.live.append(request)
        if cache:
            request.fill_ids = request.tokens()[:upto]
            self.cache.cache_unfinished_req(request)
        if upto == len(request.origin_input_ids):
            request.output_ids.append(7)
        return {"prefix": len(request.prefix_indices), "free": self._free_tokens()}

    def _do_decode(self, rng: random.Random) -> dict[str, Any]:
        """Some tokens for every request that decodes."""
        done = 0
        for _ in range(rng.randint(1, min(self.unit, 20))):
            for request in [r for r in self.live if r.output_ids]:
                if request.kv_tokens + 2 > self.setup.context_tokens:
                    continue
                slots = self._extend(request, request.kv_tokens + 1, decode=True)
                if slots is None:
                    return {"out_of_memory": done}
                self._write(request, slots, request.kv_tokens + 1)
                request.output_ids.append((request.output_ids[-1] * 31 + request.kv_tokens) % 32_000)
                done += 1
        return {"tokens": done}

    def _do_finish(self, rng: random.Random) -> dict[str, Any]:
        able = [r for r in self.live if r.output_ids]
        if not able:
            return {"refused": "none"}
        request = rng.choice(able)
        self.live.remove(request)
        self.cache.cache_finished_req(request)
        if rng.random() < 0.8 and len(request.tokens()) < self.setup.device_tokens // 2:
            self.chats[request.chat] = request.tokens()
        return {"tokens": len(request.tokens()), "free": self._free_tokens()}

    def _do_unfinished(self, rng: random.Random) -> dict[str, Any]:
        if not self.live:
            return {"refused": "none"}
        request = rng.choice(self.live)
        request.fill_ids = request.tokens()[: request.kv_tokens]
        self.cache.cache_unfinished_req(request)
        return {
            "prefix": len(request.prefix_indices),
            "wrong_kv": self._wrong(request.fill_ids, request.prefix_indices),
        }

    def _do_abort(self, rng: random.Random) -> dict[str, Any]:
        if not self.live:
            return {"refused": "none"}
        self._release(rng.choice(self.live))
        return {}

    def _do_insert(self, rng: random.Random) -> dict[str, Any]:
        """A caller without requests: new KV for a key, and its duplicates given back."""
        key = self._some_key(rng)
        key = key[: len(key) // self.page * self.page]
        slots = self._allocate(len(key))
        if slots is None:
            return {"out_of_memory": len(key)}
        self.side.write(slots, self._rows(content.prefix_marks(key)))
        present = self.cache.insert(key, slots.clone())
        self.allocator.free(slots[:present])
        return {"key": len(key), "present": present}

    def _do_match(self, rng: random.Random) -> dict[str, Any]:
        key = self._some_key(rng)
        match = self.cache.match_prefix(key)
        device, host = match.last_device_node, match.last_host_node
        return {
            "device": len(match.device_indices),
            "host": match.host_hit_length,
            "heights": (self.cache.get_height(device), self.cache.get_height(host)),
            "wrong_kv": self._wrong(key, match.device_indices) if not self.unstarted else (),
        }

    def _do_lock(self, rng: random.Random) -> dict[str, Any]:
        if len(self.locks) > 3:
            return {"refused": "many"}
        node = self.cache.match_prefix(self._some_key(rng)).last_device_node
        self.locks.append(node)
        return {"delta": self.cache.inc_lock_ref(node)}

    def _do_unlock(self, rng: random.Random) -> dict[str, Any]:
        if not self.locks:
            return {"refused": "none"}
        return {"delta": self.cache.dec_lock_ref(self.locks.pop(rng.randrange(len(self.locks))))}

    def _do_evict(self, rng: random.Random) -> dict[str, Any]:
        before = self.allocator.available_size()
        self.cache.evict(rng.choice([1, self.page, self.unit * 4, self.setup.device_tokens // 2]))
        return {"freed": self.allocator.available_size() - before}

    def _do_evict_host(self, rng: random.Random) -> dict[str, Any]:
        before = self.side.host_free_tokens()
        self.cache.evict_host(rng.choice([1, self.page, self.unit * 4, self.setup.device_tokens]))
        return {"freed": self.side.host_free_tokens() - before}

    def _do_write_backup(self, rng: random.Random) -> dict[str, Any]:
        """A node by hand, as inc_hit_count would: never under write_back, and not below what has no copy."""
        node = self.cache.match_prefix(self._some_key(rng)).last_device_node
        root = self.cache.root_node
        if self.setup.write_policy == "write_back" or node == root or self.side.has_copy(node):
            return {"refused": "none"}
        if node.parent != root and not self.side.has_copy(node.parent):
            return {"refused": "parent"}
        return {"written": self.cache.write_backup(node)}

    def _do_load(self, rng: random.Random) -> dict[str, Any]:
        key = self._some_key(rng)
        match = self.cache.match_prefix(key)
        if not match.host_hit_length:
            return {"refused": "none"}
        quota = rng.choice([None, None, self.unit, self.setup.device_tokens])
        indices = self.cache.load_back(match.last_host_node, quota)
        self.unstarted |= indices is not None
        return {"host": match.host_hit_length, "loaded": None if indices is None else len(indices)}

    def _do_ready(self, rng: random.Random) -> dict[str, Any]:
        self.cache.ready_to_load_host_cache()
        self.unstarted = False
        return {}

    def _do_poll(self, rng: random.Random) -> dict[str, Any]:
        self.cache.check_hicache_events()
        return {}

    def _do_reset(self, rng: random.Random) -> dict[str, Any]:
        """As SGLang's flush_cache: only when nothing runs."""
        self._do_ready(rng)
        for request in list(self.live):
            self._release(request)
        while self.locks:
            self.cache.dec_lock_ref(self.locks.pop())
        self.side.settle()
        self.cache.check_hicache_events()
        for rid, _ in self.prefetches:
            self.cache.check_prefetch_progress(rid)
        self.prefetches = []
        self.cache.reset()
        self.req_to_token.clear()
        self.allocator.clear()
        return {"free": self._free_tokens()}

    # ---- storage ---------------------------------------------------------------------------------------------------
    def _do_prefetch(self, rng: random.Random) -> dict[str, Any]:
        if len(self.prefetches) > 3:
            return {"refused": "many"}
        key = rng.choice(self.chats)
        match = self.cache.match_prefix(key)
        matched = len(match.device_indices) + match.host_hit_length
        if matched and not match.last_host_node.backuped_storage:
            return {"refused": "not stored"}
        last_hash = match.last_host_node.get_last_hash_value()
        self._requests += 1
        self.prefetches.append((f"p{self._requests}", matched))
        self.cache.prefetch_from_storage(f"p{self._requests}", match.last_host_node, key[matched:], last_hash)
        return {"matched": matched, "asked": len(key) - matched}

    def _do_forget(self, rng: random.Random) -> dict[str, Any]:
        """Memory is lost, storage is not."""
        self.cache.evict(self.setup.device_tokens)
        self.side.settle()
        self.cache.evict_host(self.side.host_tokens())
        return {"device_free": self._free_tokens(), "host_free": self.side.host_free_tokens()}

    def _do_progress(self, rng: random.Random) -> dict[str, Any]:
        if not self.prefetches:
            return {"refused": "none"}
        index = rng.randrange(len(self.prefetches))
        before = self._host_tokens()
        done = self.cache.check_prefetch_progress(self.prefetches[index][0])
        if done:
            del self.prefetches[index]
        return {"done": done, "fetched": self._host_tokens() - before}

    def _do_time(self, rng: random.Random) -> dict[str, Any]:
        self.side.advance(rng.choice([0.1, 1.0, 5.0]))
        return {}

    # ---- state -----------------------------------------------------------------------------------------------------
    def state(self) -> dict[str, Any]:
        """Sizes, free counts, tokens lost (neither free nor held), every node, and where its KV is wrong."""
        cache, setup = self.cache, self.setup
        nodes: dict[int, dict[str, Any]] = {}
        wrong: dict[str, set[int]] = {"device": set(), "host": set()}
        for mark, record, node, marks in self._nodes():
            nodes[mark] = record
            rows = self._rows(marks)
            if record["device"] and not (record["loading"] and self.unstarted):
                wrong["device"] |= self._different(self.side.device_rows(node.value), rows)
            if record["arrived"]:
                wrong["host"] |= self._different(self.side.host_rows(node.host_value), rows)
        device_free, host_free, total = self._free_tokens(), self.side.host_free_tokens(), cache.total_size()
        held = sum(self._own_pages(r) for r in self.live) * self.page
        on_host = sum(record["tokens"] for record in nodes.values() if record["arrived"])
        return {
            "evictable": cache.evictable_size(),
            "protected": cache.protected_size(),
            "total": total,
            "device_free": device_free,
            "host_free": host_free,
            "requests_free": self.req_to_token.available_size(),
            "device_lost": setup.device_tokens - device_free - total - held,
            "host_lost": self.side.host_tokens() - host_free - on_host - self.side.in_flight_host_tokens(),
            "wrong_rows": {} if self.unstarted else {r.rid: bad for r in self.live if (bad := self._wrong_row(r))},
            "wrong_kv": {tier: tuple(sorted(planes)) for tier, planes in wrong.items() if planes},
            "nodes": nodes,
        }

    def _nodes(self) -> Iterator[tuple[int, dict[str, Any], Any, np.ndarray]]:
        """(mark of its path, record, node, marks of its own tokens) of every node but the root."""
        todo = [(child, 0, content.START, "") for child in self.cache.root_node.children.values()]
        while todo:
            node, start, above, last_hash = todo.pop()
            tokens = list(node.key)
            marks = content.prefix_marks(tokens, above)
            keys = content.chain(tokens, self.page, last_hash) if self.setup.storage else [""]
            stored = node.backuped_storage
            record = {
                "start": start,
                "tokens": len(tokens),
                "above": f"{above:x}",
                "device": not node.evicted,
                "host": self.side.has_copy(node),
                "arrived": node.backuped,
                "locks": node.lock_ref,
                "hits": node.hit_count,
                "loading": node.loading,
                "host_refs": node.host_ref_counter,
                "stored": stored,
                "own_keys": list(node.hash_value) == keys if stored else None,
            }
            mark = int(marks[-1])
            yield mark, record, node, marks
            todo += [(child, start + len(tokens), mark, keys[-1]) for child in node.children.values()]

    # ---- parts -----------------------------------------------------------------------------------------------------
    @property
    def allocator(self) -> Any:
        return self.side.allocator

    @property
    def req_to_token(self) -> Any:
        return self.side.req_to_token_pool

    def _tokens(self, rng: random.Random, count: int) -> list[int]:
        return [rng.randrange(1, 32_000) for _ in range(count)]

    def _some_key(self, rng: random.Random) -> list[int]:
        """A chat's tokens, cut and continued or not."""
        key = rng.choice(self.chats)
        if rng.random() < 0.4:
            key = key[: rng.randrange(len(key) + 1)]
        if rng.random() < 0.3:
            key = key + self._tokens(rng, rng.randint(1, self.unit * 3))
        return key

    def _make_room(self, tokens: int) -> None:
        if self.allocator.available_size() < tokens:
            self.cache.evict(tokens)
            self.side.settle()

    def _allocate(self, tokens: int) -> torch.Tensor | None:
        """Whole pages, int64 slots; evicts."""
        if not tokens:
            return NONE
        self._make_room(tokens)
        slots = self.allocator.alloc(tokens)
        return None if slots is None else slots.to(torch.int64)

    def _extend(self, request: Request, upto: int, decode: bool = False) -> torch.Tensor | None:
        """Slots for the tokens from kv_tokens to ``upto``."""
        have, grow = request.kv_tokens, upto - request.kv_tokens
        if self.page == 1:
            return self._allocate(grow)
        self._make_room(grow + self.page)
        last = (
            self.req_to_token.req_to_token[request.req_pool_idx, have - 1 : have].to(torch.int64) if have else NONE - 1
        )
        last = last if len(last) else torch.tensor([-1])
        if decode:
            slots = self.allocator.alloc_decode(torch.tensor([upto]), last)
        else:
            slots = self.allocator.alloc_extend(torch.tensor([have]), torch.tensor([upto]), last, grow)
        return None if slots is None else slots.to(torch.int64)

    def _write(self, request: Request, slots: torch.Tensor, upto: int) -> None:
        """What the model does: KV of the tokens from kv_tokens to ``upto``."""
        have = request.kv_tokens
        marks = content.prefix_marks(request.tokens()[have:upto], request.last_mark)
        self.side.write(slots, self._rows(marks))
        self.req_to_token.write((request.req_pool_idx, slice(have, upto)), slots.to(torch.int32))
        request.kv_tokens, request.last_mark = upto, int(marks[-1])

    def _release(self, request: Request) -> None:
        """Give a request up, as a retraction does: what the tree does not hold is freed, the lock is given back."""
        start = len(request.prefix_indices) // self.page * self.page
        slots = self.req_to_token.req_to_token[request.req_pool_idx, start : request.kv_tokens].to(torch.int64)
        self.allocator.free(slots)
        self.req_to_token.free(request.req_pool_idx)
        self.cache.dec_lock_ref(request.last_node)
        if request in self.live:
            self.live.remove(request)

    def _own_pages(self, request: Request) -> int:
        """Pages that only this request holds."""
        return -(-request.kv_tokens // self.page) - len(request.prefix_indices) // self.page

    def _host_tokens(self) -> int:
        """Tokens with a copy on the host."""
        return sum(record["tokens"] for _, record, _, _ in self._nodes() if record["host"])

    def _free_tokens(self) -> int:
        return int(self.allocator.available_size())

    def _rows(self, marks: np.ndarray) -> np.ndarray:
        return content.rows(marks, self._planes, self._width)

    def _wrong(self, tokens: list[int], slots: torch.Tensor) -> tuple[int, ...]:
        """Planes in which the KV of the first len(slots) tokens is not what was written."""
        if not len(slots):
            return ()
        expected = self._rows(content.prefix_marks(tokens[: len(slots)]))
        return tuple(sorted(self._different(self.side.device_rows(slots.to(torch.int64)), expected)))

    def _wrong_row(self, request: Request) -> tuple[int, ...]:
        """Planes in which a request would read wrong KV: what its row of req_to_token leads to."""
        row = self.req_to_token.req_to_token[request.req_pool_idx, : request.kv_tokens]
        return self._wrong(request.tokens(), row)

    @staticmethod
    def _different(found: np.ndarray, expected: np.ndarray) -> set[int]:
        return {int(plane) for plane in np.flatnonzero((found != expected).any(axis=(0, 2)))}
