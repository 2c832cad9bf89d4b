"""L6: serves one chat request after another: a real model on the slots of a device pool, prefixes from HiRadixCache.

The calls are those of an engine's scheduler, in its order; ``tests/hicache`` has one that batches, chunks and retracts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..controller import Attribution, ControllerConfig
from ..engines.models import ChatModel
from ..engines.transformers import PagedRunner, Slots, page_fingerprints
from ..errors import IntegrityError, RadixKVError
from ..hicache import HiCacheConfig, HiRadixCache, PagedTokenToKVPoolAllocator, ReqToTokenPool
from ..metrics import MetricsListener
from ..pool.host import HostPoolConfig
from .config import DemoConfig

__all__ = ["ChatServer", "Served"]

Tokens = npt.NDArray[np.int32]
PATIENCE_S = 30.0
"""For storage and copies: far beyond what they take, so that a hang is an error."""
POLL_S = 0.0005


class Served(NamedTuple):
    """One request, served.

    tokens: the prompt and the answer but its last token: those whose KV was found or computed. attribution: where the
    prompt's were. logits: [n, vocabulary] of the last n tokens, those that were computed. fingerprints: of all whole
    pages, as the model saw them. first_token_s: since the request's arrival, waiting for storage and loads included.
    """

    tokens: Tokens
    prompt_tokens: int
    attribution: Attribution
    logits: Any
    fingerprints: list[str]
    answer: list[int]
    first_token_s: float


@dataclass(slots=True, eq=False)
class _Request:
    """What the cache reads of a request, and writes to it (hicache.base.Request)."""

    rid: str
    origin_input_ids: list[int]
    output_ids: list[int] = field(default_factory=list)
    fill_ids: list[int] = field(default_factory=list)
    req_pool_idx: int = 0
    prefix_indices: Any = ()
    last_node: Any = None


class ChatServer:
    """One model, one cache, one request at a time.

    Args:
        folder: of the storage tier; survives the process.
    """

    def __init__(self, chat_model: ChatModel, config: DemoConfig, folder: Path) -> None:
        self.model, self.config = chat_model, config
        self.runner = PagedRunner(chat_model.model, config.page_size, config.chunk_tokens)
        self.pool = self.runner.new_pool(config.device_tokens)
        self.allocator = PagedTokenToKVPoolAllocator(
            config.device_tokens, config.page_size, self.pool.dtype, self.pool.device, self.pool
        )
        self.rows = ReqToTokenPool(1, self.runner.max_tokens, self.pool.device)
        self.listener = MetricsListener()
        control = ControllerConfig(
            write_policy="write_through", store_after_backup=True, prefetch_threshold=config.page_size,
            load_back_threshold=config.page_size, prefetch_capacity_floor=1.0,
        )  # fmt: skip
        self.cache: Any = HiRadixCache(
            self.rows, self.allocator, None, config.page_size,
            hicache_ratio=config.host_tokens / config.device_tokens, hicache_size=0,
            hicache_write_policy="write_through", hicache_io_backend="direct",
            hicache_mem_layout="page_first_direct", hicache_storage_backend="file",
            hicache_storage_prefetch_policy="wait_complete",
            config=HiCacheConfig(
                control=control, host_pool=HostPoolConfig(headroom_bytes=0), model=self.runner.identity(),
                storage_options={"path": str(folder)}, listener=self.listener,
            ),
        )  # fmt: skip

    @property
    def device_name(self) -> str:
        """Where the model computes, for people."""
        device = self.runner.device
        return "CPU" if device.type == "cpu" else f"{device}: {torch.cuda.get_device_name(device)}"

    # ---- one request -------------------------------------------------------------------------------------------------
    def serve(self, rid: str, prompt: Tokens, answer_tokens: int) -> Served:
        """Serve one request to its end.

        Raises: RadixKVError if it does not fit on the device, or a tier does not answer in time.
        """
        arrival = time.perf_counter()
        req = _Request(rid, prompt.tolist())
        self._prefetch(req)
        cached, attribution = self._load(req)
        slots = self._extend_row(req, cached, len(prompt))
        counter = self.cache.cache_controller.layer_done_counter
        counter.set_consumer(self.cache.ready_to_load_host_cache())
        rows = [self.runner.prefill(self.pool, slots, prompt, cached)]
        req.output_ids.append(self._choose(rows[-1]))
        first_token_s = time.perf_counter() - arrival
        counter.set_consumer(0)
        req.fill_ids = list(req.origin_input_ids)
        self.cache.cache_unfinished_req(req)
        while len(req.output_ids) < answer_tokens and req.output_ids[-1] not in self.model.end_tokens:
            rows.append(self._decode(req))
            req.output_ids.append(self._choose(rows[-1]))
        tokens = np.array((req.origin_input_ids + req.output_ids)[:-1], np.int32)
        whole = len(tokens) // self.config.page_size * self.config.page_size
        fingerprints = page_fingerprints(self.pool, self._row(req)[:whole].long())
        self.cache.cache_finished_req(req)
        self.cache.check_hicache_events()
        return Served(tokens, len(prompt), attribution, torch.cat(rows), fingerprints, req.output_ids, first_token_s)

    def _match(self, req: _Request) -> Any:
        """What the cache has of the prompt; at least its last token is left to compute."""
        return self.cache.match_prefix(rid=req.rid, key=req.origin_input_ids[:-1])

    def _prefetch(self, req: _Request) -> None:
        """Bring what only storage has to the host, and wait for it, as the policy of this server is."""
        found = self._match(req)
        rest = req.origin_input_ids[len(found.device_indices) + found.host_hit_length : -1]
        self.cache.prefetch_from_storage(
            req.rid, found.last_host_node, rest, found.last_host_node.get_last_hash_value()
        )
        self._until(
            lambda: self.cache.check_prefetch_progress(req.rid), f"prefetch of {len(rest)} tokens for {req.rid}"
        )

    def _load(self, req: _Request) -> tuple[int, Attribution]:
        """Lock the prefix, and queue the load of what is on the host. Returns: its tokens, and where they were."""
        found = self._match(req)
        req.prefix_indices, req.last_node = found.device_indices, found.last_device_node
        self.cache.inc_lock_ref(req.last_node)
        loaded = req.prefix_indices[:0]
        if found.host_hit_length:
            matched_node = req.last_node
            loaded, req.last_node = self.cache.init_load_back(found.last_host_node, found.host_hit_length)
            req.prefix_indices = torch.cat([req.prefix_indices, loaded])
            self.cache.inc_lock_ref(req.last_node)
            self.cache.dec_lock_ref(matched_node)
        attribution = self.cache.attribute(req.rid, len(req.origin_input_ids), found, len(loaded))
        return len(req.prefix_indices), attribution

    def _extend_row(self, req: _Request, cached: int, length: int) -> Slots:
        """Give the request a row with the slots of its prefix, and new ones for the rest. Returns: all of them."""
        (req.req_pool_idx,) = self.rows.alloc(1) or [-1]
        if req.req_pool_idx < 0:
            raise RadixKVError("the server serves one request at a time")
        slots = torch.cat([req.prefix_indices, self._alloc(_whole_pages(length - cached, self.config.page_size))])
        self.rows.write((req.req_pool_idx, slice(0, len(slots))), slots.int())
        return slots

    def _decode(self, req: _Request) -> Any:
        """Compute the last token of the answer so far. Returns: its logits [1, vocabulary]."""
        tokens = np.array(req.origin_input_ids + req.output_ids, np.int32)
        new = len(tokens) - 1
        if new % self.config.page_size == 0:
            slots = self._alloc(self.config.page_size)
            self.rows.write((req.req_pool_idx, slice(new, new + len(slots))), slots.int())
        return self.runner.forward(self.pool, self._row(req)[: len(tokens)].long(), tokens, new)

    def _row(self, req: _Request) -> Any:
        return self.rows.req_to_token[req.req_pool_idx]

    def _alloc(self, num_tokens: int) -> Slots:
        """Slots of whole pages; evicts what is missing, and waits for copies in flight that hold pages."""

        def take() -> Any:
            short = num_tokens - self.allocator.available_size()
            if short > 0:
                self.cache.evict(short)
            return self.allocator.alloc(num_tokens)

        return self._until(take, f"room for {num_tokens} tokens on a device of {self.config.device_tokens}")

    def _choose(self, rows: Any) -> int:
        """Greedy: the text token with the largest logit."""
        return int(rows[-1, : self.model.text_tokens].argmax())

    # ---- the whole ---------------------------------------------------------------------------------------------------
    def settle(self) -> None:
        """Wait until every copy and every write to storage has ended."""

        def settled() -> bool:
            self.cache.check_hicache_events()
            stats = self.cache.cache_controller.core.stats()
            return not (stats.writes_in_flight or stats.loads_in_flight or stats.stores_in_flight)

        self._until(settled, "end of all copies")

    def check_integrity(self) -> None:
        """Between two requests: everything agrees, and no slot is lost. Raises: IntegrityError."""
        self.cache.check_integrity()
        self.allocator.check_integrity()
        held = self.allocator.available_size() + self.cache.evictable_size()
        if held != self.config.device_tokens or self.cache.protected_size():
            raise IntegrityError(
                f"{held} of {self.config.device_tokens} tokens are free or evictable, {self.cache.protected_size()} "
                "protected, and no request runs"
            )

    def close(self) -> None:
        """End all threads and give the host memory back."""
        self.cache.close()

    def _until(self, ask: Callable[[], Any], what: str) -> Any:
        """Ask until the answer is no None and no False; settles what ends meanwhile."""
        end_s = time.monotonic() + PATIENCE_S
        while (answer := ask()) is None or answer is False:
            if time.monotonic() > end_s:
                raise RadixKVError(f"no {what} within {PATIENCE_S:.0f} s")
            time.sleep(POLL_S)
            self.cache.check_hicache_events()
        return answer


def _whole_pages(num_tokens: int, page_size: int) -> int:
    return -(-num_tokens // page_size) * page_size
