"""A small engine: the scheduler's calls of SGLang 0.5.0rc0 in its order, over a pool whose bytes tell what they are.

Each token's KV is a function of all tokens up to it, of the layer and of the half: a page that is not the one that was
computed for this very prefix is seen at once, whatever went wrong before.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

torch.set_num_threads(1)  # these tensors are tiny: threads would only wait for each other

OUTPUT = 1000
"""Output tokens are numbered from here, so that no two requests share any by accident."""


# ---- bytes that tell what they are -----------------------------------------------------------------------------------
def fingerprints(tokens: Sequence[int]) -> np.ndarray:
    """uint64 [n]: of each token, what stands for all tokens up to it."""
    with np.errstate(over="ignore"):
        at = np.arange(1, len(tokens) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (np.asarray(tokens, np.uint64) + at) * np.uint64(0xD6E8FEB86659FD93)
        mixed ^= mixed >> np.uint64(32)
        return np.cumsum(mixed * np.uint64(0xD6E8FEB86659FD93), dtype=np.uint64)


def rows_of(tokens: Sequence[int], first: int, layer: int, half: int, row_bytes: int) -> torch.Tensor:
    """uint8 [n - first, row_bytes]: the KV of tokens[first:] in one layer and half."""
    with np.errstate(over="ignore"):
        words = fingerprints(tokens)[first:] * np.uint64(2 * layer + half + 3)
    repeated = np.repeat(words[:, None], -(-row_bytes // 8), axis=1) + np.arange(-(-row_bytes // 8), dtype=np.uint64)
    return torch.from_numpy(np.ascontiguousarray(repeated.view(np.uint8)[:, :row_bytes]))


class Bytes:
    """The buffers of a device pool as bytes: [halves][layers] uint8 [slots, row_bytes]."""

    def __init__(self, pool: Any) -> None:
        halves = [pool.kv_buffer] if hasattr(pool, "kv_buffer") else [pool.k_buffer, pool.v_buffer]
        self.halves = [[_as_bytes(buffer) for buffer in half] for half in halves]
        self.row_bytes = self.halves[0][0].shape[1]

    def write(self, tokens: Sequence[int], first: int, slots: Any) -> None:
        """Compute the KV of tokens[first:] into slots."""
        for half, layers in enumerate(self.halves):
            for layer, buffer in enumerate(layers):
                buffer[torch.as_tensor(slots).long()] = rows_of(tokens, first, layer, half, self.row_bytes)

    def check(self, tokens: Sequence[int], slots: Any, layers: Sequence[int] | None = None) -> None:
        """The slots hold the KV of exactly these tokens."""
        slots = torch.as_tensor(slots).long()
        assert len(slots) == len(tokens)
        for half, buffers in enumerate(self.halves):
            for layer in layers if layers is not None else range(len(buffers)):
                wanted, found = rows_of(tokens, 0, layer, half, self.row_bytes), buffers[layer][slots]
                if torch.equal(wanted, found):
                    continue
                wrong = (found != wanted).any(dim=1).nonzero()
                raise AssertionError(
                    f"layer {layer}, half {half}: {len(wrong)} of {len(tokens)} tokens hold other bytes, "
                    f"from token {int(wrong[0])} in slot {int(slots[wrong[0]])}"
                )


def _as_bytes(buffer: Any) -> torch.Tensor:
    tensor = torch.from_numpy(buffer) if isinstance(buffer, np.ndarray) else buffer
    return tensor.view(torch.uint8).reshape(tensor.shape[0], -1)


# ---- requests --------------------------------------------------------------------------------------------------------
@dataclass(eq=False)
class Req:
    """What a scheduler knows of a request."""

    rid: str
    origin_input_ids: list[int]
    max_new_tokens: int = 4
    extra_key: str | None = None
    output_ids: list[int] = field(default_factory=list)
    fill_ids: list[int] = field(default_factory=list)
    req_pool_idx: int | None = None
    prefix_indices: Any = ()
    last_node: Any = None
    last_host_node: Any = None
    host_hit_length: int = 0
    loaded: int = 0
    chunked: bool = False
    prefetch_done: bool = True

    @property
    def seqlen(self) -> int:
        return len(self.origin_input_ids) + len(self.output_ids)


class OutOfMemoryError(Exception):
    """The pool is too small for what runs."""


class Engine:
    """Runs requests. ``step`` is one round of the scheduler; all bytes that a forward pass reads are verified."""

    def __init__(self, cache: Any, *, chunk: int | None = None, max_running: int = 4, pool: Any = None) -> None:
        self.cache, self.chunk, self.max_running = cache, chunk, max_running
        self.rows, self.allocator = cache.req_to_token_pool, cache.token_to_kv_pool_allocator
        self.page_size = cache.page_size
        self.pool = pool if pool is not None else self.allocator.get_kvcache()
        self.bytes = Bytes(self.pool)
        self.total = self.allocator.available_size()
        self.hierarchical = hasattr(cache, "cache_controller")
        self.storage = getattr(cache, "enable_storage", False)
        self.waiting: list[Req] = []
        self.running: list[Req] = []
        self.chunked: Req | None = None
        self.finished: list[Req] = []
        self.next_output = OUTPUT
        self.retracted = 0
        self.reserve = 1.0
        """Share of the tokens still to come that a request must find room for before it starts."""
        self.tokens = {"device": 0, "host": 0, "computed": 0}

    # ---- entry -------------------------------------------------------------------------------------------------------
    def submit(self, req: Req) -> Req:
        """Queue a request; with storage, ask for what storage may have of it."""
        if self.storage:
            self.init_next_round_input(req)
            last_hash = req.last_host_node.get_last_hash_value()
            matched = len(req.prefix_indices) + req.host_hit_length
            if matched == 0 or last_hash is not None:
                self.cache.prefetch_from_storage(req.rid, req.last_host_node, req.fill_ids[matched:], last_hash)
        self.waiting.append(req)
        return req

    def run(self, *requests: Req, limit: int = 10_000) -> None:
        """Run until nothing is left to do."""
        for req in requests:
            self.submit(req)
        for _ in range(limit):
            if not (self.waiting or self.running or self.chunked):
                return
            self.step()
        raise AssertionError(f"{len(self.waiting)} waiting and {len(self.running)} running after {limit} rounds")

    def step(self) -> None:
        """One round: a batch of prompts if there is one, else one token of all that run."""
        batch = self.prefill_batch()
        if batch:
            self.prefill(batch)
        elif self.running:
            self.decode()

    # ---- prompts -----------------------------------------------------------------------------------------------------
    def init_next_round_input(self, req: Req) -> None:
        req.fill_ids = req.origin_input_ids + req.output_ids
        found = self.cache.match_prefix(rid=req.rid, key=req.fill_ids[: len(req.fill_ids) - 1], extra_key=req.extra_key)
        req.prefix_indices, req.last_node, req.last_host_node, req.host_hit_length = found

    def prefill_batch(self) -> list[Req]:
        """Who computes a prompt (or the next chunk of one) now; they are locked, and their loads are queued."""
        if self.chunked is not None:
            self.cache.cache_unfinished_req(self.chunked)
            self.rows.free(self.chunked.req_pool_idx)  # it gets another row with its next chunk
            self.check_row(self.chunked)
        if self.hierarchical:
            self.cache.check_hicache_events()
        batch: list[Req] = []
        budget = self.budget([])
        if self.chunked is not None:
            req, self.chunked = self.chunked, None
            req.fill_ids = req.origin_input_ids + req.output_ids
            self.cut(req)
            batch.append(req)
            budget = self.budget(batch)
        for req in list(self.waiting):
            if self.chunked is not None or len(self.running) + len(batch) >= self.max_running:
                break
            if self.storage and not self.cache.check_prefetch_progress(req.rid):
                continue
            self.init_next_round_input(req)
            if not self.admit(req, budget):
                break
            self.waiting.remove(req)
            batch.append(req)
            budget = self.budget(batch)
        if not batch and not self.running and self.waiting and not self.storage and not self.copies_hold_memory():
            raise OutOfMemoryError(f"{self.waiting[0].seqlen} tokens, and {budget} are free or evictable")
        return batch

    def copies_hold_memory(self) -> bool:
        """Whether pages are locked by copies that a busy machine has not made yet; if so, settles those that are."""
        core = getattr(getattr(self.cache, "cache_controller", None), "core", None)
        if core is None:
            return False
        stats = core.stats()
        if not stats.writes_in_flight and stats.loads_in_flight <= stats.queued_loads:
            return False
        time.sleep(0.0005)
        self.cache.check_hicache_events()
        return True

    def budget(self, batch: list[Req]) -> int:
        """Tokens that are free or could be, less those that who runs and who is in the batch will need."""
        size = self.allocator.available_size() + self.cache.evictable_size()
        size -= sum(len(r.fill_ids) - len(r.prefix_indices) + 2 * self.page_size for r in batch)
        size -= sum(self.page_size + self.to_come(r) for r in self.running) + sum(map(self.to_come, batch))
        return int(size)

    def to_come(self, req: Req) -> int:
        return int(self.reserve * max(0, req.max_new_tokens - len(req.output_ids)))

    def admit(self, req: Req, budget: int) -> bool:
        """PrefillAdder.add_one_req: lock, load what is on the host, lock where that ends."""
        need = len(req.fill_ids) - len(req.prefix_indices) + self.to_come(req) + self.page_size
        if need >= budget:
            return False
        last_node = req.last_node
        before = self.cache.evictable_size()
        delta = self.cache.inc_lock_ref(last_node)
        assert self.cache.evictable_size() == before + delta <= before
        try:
            if need >= budget + delta:
                return False
            if req.host_hit_length > 0:
                loaded, req.last_node = self.cache.init_load_back(req.last_host_node, req.host_hit_length)
                req.prefix_indices = torch.cat([torch.as_tensor(req.prefix_indices), torch.as_tensor(loaded)])
                req.loaded += len(loaded)
                self.tokens["host"] += len(loaded)
                self.tokens["device"] -= len(loaded)
            self.tokens["device"] += len(req.prefix_indices)
            self.tokens["computed"] += len(req.fill_ids) - len(req.prefix_indices)
            self.cut(req)
            self.cache.inc_lock_ref(req.last_node)
        finally:
            self.cache.dec_lock_ref(last_node)
        return True

    def cut(self, req: Req) -> None:
        """Chunked prefill: the tokens that this round computes."""
        req.chunked = self.chunk is not None and len(req.fill_ids) - len(req.prefix_indices) > self.chunk
        if req.chunked:
            assert self.chunk is not None
            req.fill_ids = req.fill_ids[: len(req.prefix_indices) + self.chunk]
            self.chunked = req

    def prefill(self, batch: list[Req]) -> None:
        consumer = self.cache.ready_to_load_host_cache() if self.hierarchical else -1
        rows = self.rows.alloc(len(batch))
        assert rows is not None
        for req, row in zip(batch, rows, strict=True):
            req.req_pool_idx = row
            before, after = len(req.prefix_indices), len(req.fill_ids)
            slots = self.extend(req, before, after)
            self.rows.write((row, slice(0, before)), _int32(req.prefix_indices))
            self.rows.write((row, slice(before, after)), _int32(slots))
        if self.hierarchical:
            self.cache.cache_controller.layer_done_counter.set_consumer(consumer)
        self.forward([(req, len(req.prefix_indices)) for req in batch])
        for req in batch:
            if req.chunked:
                continue
            self.output(req)
            if self.is_finished(req):
                self.finish(req)
            else:
                self.cache.cache_unfinished_req(req)
                self.check_row(req)
                self.running.append(req)

    # ---- tokens ------------------------------------------------------------------------------------------------------
    def decode(self) -> None:
        """One more token for all that run; who has no room is sent back to the queue."""
        while not self.make_room(len(self.running) * self.page_size):
            if len(self.running) > 1:
                self.retract(self.running[-1])
            elif not self.copies_hold_memory():
                raise OutOfMemoryError("no room for one request")
        if self.hierarchical:
            self.cache.cache_controller.layer_done_counter.set_consumer(0)
        lengths = [req.seqlen for req in self.running]
        last = [int(self.row(req)[length - 2]) for req, length in zip(self.running, lengths, strict=True)]
        if self.page_size == 1:
            slots = self.allocator.alloc(len(lengths))
        else:
            slots = self.allocator.alloc_decode(torch.tensor(lengths), torch.tensor(last))
        assert slots is not None
        for req, length, slot in zip(self.running, lengths, slots, strict=True):
            req.fill_ids = req.origin_input_ids + req.output_ids
            self.rows.write((req.req_pool_idx, slice(length - 1, length)), _int32(slot.reshape(1)))
        self.forward([(req, length - 1) for req, length in zip(self.running, lengths, strict=True)])
        for req in list(self.running):
            self.output(req)
            if self.is_finished(req):
                self.running.remove(req)
                self.finish(req)

    def forward(self, batch: list[tuple[Req, int]]) -> None:
        """The model: layer by layer it reads all that is there, and writes what is new."""
        for layer in range(len(self.bytes.halves[0])):
            counter = getattr(self.pool, "layer_transfer_counter", None)
            if counter is not None:
                counter.wait_until(layer)
            for req, first in batch:
                if len(req.output_ids) % 4 < 2:  # of four tokens in a row two are enough
                    self.bytes.check(req.fill_ids[:first], self.row(req)[:first], [layer])
        for req, first in batch:
            self.bytes.write(req.fill_ids, first, self.row(req)[first : len(req.fill_ids)])

    def output(self, req: Req) -> None:
        req.output_ids.append(self.next_output)
        self.next_output += 1

    def is_finished(self, req: Req) -> bool:
        return len(req.output_ids) >= req.max_new_tokens

    def finish(self, req: Req) -> None:
        self.cache.cache_finished_req(req)
        req.req_pool_idx = None
        self.finished.append(req)

    def retract(self, req: Req) -> None:
        """Take a request's memory away; it starts again from what the cache has of it."""
        self.retracted += 1
        self.running.remove(req)
        cached = len(req.prefix_indices) // self.page_size * self.page_size
        self.allocator.free(self.row(req)[cached : req.seqlen - 1])
        self.rows.free(req.req_pool_idx)
        self.cache.dec_lock_ref(req.last_node)
        req.req_pool_idx, req.prefix_indices, req.last_node, req.last_host_node = None, (), None, None
        self.submit(req)

    # ---- memory ------------------------------------------------------------------------------------------------------
    def row(self, req: Req) -> Any:
        return self.rows.req_to_token[req.req_pool_idx]

    def extend(self, req: Req, before: int, after: int) -> Any:
        need = after - before if self.page_size == 1 else after - before + self.page_size
        while not self.make_room(need):
            if not self.copies_hold_memory():
                raise OutOfMemoryError(f"{need} tokens")
        if self.page_size == 1:
            slots = self.allocator.alloc(after - before)
        else:
            last = int(req.prefix_indices[-1]) if before else -1
            slots = self.allocator.alloc_extend(
                torch.tensor([before]), torch.tensor([after]), torch.tensor([last]), after - before
            )
        assert slots is not None
        return slots

    def make_room(self, num_tokens: int) -> bool:
        if self.allocator.available_size() < num_tokens:
            self.cache.evict(num_tokens)
        return bool(self.allocator.available_size() >= num_tokens)

    # ---- checks ------------------------------------------------------------------------------------------------------
    def check_row(self, req: Req) -> None:
        """After cache_unfinished_req: prefix_indices are the row, and hold what they should."""
        assert torch.as_tensor(req.prefix_indices).tolist() == self.row(req)[: len(req.fill_ids)].tolist()
        assert str(req.prefix_indices.dtype).endswith("int64")
        self.bytes.check(req.fill_ids, req.prefix_indices)
        assert req.last_node.lock_ref > 0

    def check_memory(self) -> None:
        """Every slot is free, in the tree, or a running request's own."""
        mine = 0
        for req in [*self.running, *([self.chunked] if self.chunked else [])]:
            length = len(req.fill_ids)
            cached = len(req.prefix_indices) // self.page_size * self.page_size
            mine += -(-length // self.page_size) * self.page_size - cached
        available, cached = self.allocator.available_size(), self.cache.total_size()
        assert available + cached + mine == self.total, f"{available=} {cached=} {mine=} of {self.total}"
        assert self.cache.evictable_size() + self.cache.protected_size() == cached

    def check_idle(self) -> None:
        """As the scheduler's own check when nothing runs: no memory and no rows are lost, and nothing is locked."""
        assert not self.running
        assert self.chunked is None
        assert self.allocator.available_size() + self.cache.evictable_size() == self.total - self.cache.protected_size()
        assert len(self.rows.free_slots) == self.rows.size


def _int32(slots: Any) -> Any:
    return torch.as_tensor(slots).to(torch.int32)
