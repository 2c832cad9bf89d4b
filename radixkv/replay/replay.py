"""L5: replays a trace through tree, slot allocators and byte pools of two tiers, and checks every byte of every hit.

A request, as in the life of a request of the architecture page:

    1. match           device part | host part | new part            of the prompt's whole pages
    2. protect         lock the device path, protect_host the host leaf
    3. make room       evict (with backup to the host tier) until host part + new part fit on the device
    4. load back       host part: copy host -> device, set_device, finish_load; lock moves to the end of the whole hit
    5. verify          the bytes of all hit pages, on both tiers, against what their prefix demands
    6. compute         write the bytes of the new pages (a model would)
    7. insert          with the match as hint; duplicates return to the allocator
    8. write through   if that is the policy: copy the new pages to the host, set_host
    9. unlock

Requests are served one after another, in file order. The device tier is simulated in host memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import IntegrityError, InvalidArgumentError, RadixKVError
from ..pool.host import HostPagePool, copy_pages
from ..pool.slots import SlotAllocator
from ..trace import DEFAULT_BLOCK_TOKENS, TraceRequest, expand_prompt, expand_response
from ..tree.base import BaseRadixTree, MatchResult
from ..types import ROOT, BackupRequest, PageIds, Policy
from .content import page_bytes, page_seeds

__all__ = ["BaseReplay", "Counters", "Replay", "ReplayConfig", "VerificationError"]

_T = TypeVar("_T")
_VERIFY_BYTES = 8 << 20  # bytes generated, written or compared at a time: bounds the memory of long prompts


class VerificationError(RadixKVError):
    """A hit returned bytes other than those that its prefix demands. The message names request, page and byte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayConfig:
    """How to replay.

    Args:
        device_pages: capacity of the device tier, pages, >= 1.
        host_pages: capacity of the host tier, pages; 0 = no host tier.
        page_size: tokens a page.
        policy: eviction order of the tree.
        write_policy: write_back copies a node to the host when it is evicted, write_through when it is inserted.
        bytes_per_token: bytes a token in the pools; 16 is small enough that a whole trace fits.
        verify: compare the bytes of every hit. Bytes are written either way.
        output_tokens: also insert the response of each request (unique tokens: a trace does not name them).
        block_tokens: tokens a block of the trace.
    """

    device_pages: int
    host_pages: int = 0
    page_size: int = 16
    policy: Policy = "lru"
    write_policy: Literal["write_back", "write_through"] = "write_back"
    bytes_per_token: int = 16
    verify: bool = True
    output_tokens: bool = False
    block_tokens: int = DEFAULT_BLOCK_TOKENS

    def __post_init__(self) -> None:
        for name in ("device_pages", "page_size", "bytes_per_token", "block_tokens"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.host_pages < 0:
            raise InvalidArgumentError(f"host_pages must be at least 0, not {self.host_pages}")
        if self.write_policy not in ("write_back", "write_through"):
            raise InvalidArgumentError(f"write_policy must be write_back or write_through, not {self.write_policy!r}")


@dataclass(slots=True)
class Counters:
    """What happened so far. Tokens are prompt tokens; hits are counted at match time, in whole pages."""

    requests: int = 0
    prompt_tokens: int = 0
    device_hit_tokens: int = 0
    host_hit_tokens: int = 0
    uncached_requests: int = 0
    verified_pages: int = 0
    written_pages: int = 0
    evicted_tokens: int = 0
    backed_up_tokens: int = 0
    loaded_back_tokens: int = 0
    dropped_tokens: int = 0
    duplicate_pages: int = 0


class BaseReplay:
    """What every replay has: a tree, a device pool of plain bytes, counters, and the verifier.

    Attributes: ``tree``; ``device`` (pool) and ``device_slots`` (allocator); ``counters``; ``latencies_ns``: per kind
        of call, the time of each one, the call alone; ``tiers``: those that hits are counted for.
    """

    tiers: tuple[str, ...] = ("device", "host")
    counters: Counters

    def __init__(self, tree_class: Callable[..., BaseRadixTree], config: ReplayConfig, kinds: Sequence[str]) -> None:
        self.config = config
        self.tree = tree_class(page_size=config.page_size, policy=config.policy)
        self.device = HostPagePool(config.device_pages, config.page_size * config.bytes_per_token)
        self.device_slots = SlotAllocator(config.device_pages)
        self.latencies_ns: dict[str, list[int]] = {kind: [] for kind in kinds}

    # ---- the run -----------------------------------------------------------------------------------------------------
    def run(
        self,
        requests: Sequence[TraceRequest],
        progress: Callable[[Counters], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> bool:
        """Serve requests in order, then check the integrity of tree and pools.

        Args:
            progress: called after each request.
            should_stop: asked before each request, so that a stop leaves no request half served.
        Returns: True if all were served, False if stopped.
        Raises: VerificationError, IntegrityError.
        """
        finished = True
        for request in requests:
            if should_stop is not None and should_stop():
                finished = False
                break
            self.serve(request)
            if progress is not None:
                progress(self.counters)
        self.check_integrity()
        return finished

    def serve(self, request: TraceRequest) -> None:
        """Serve one request. One that is longer than the whole device is counted and served uncached."""
        config, counters = self.config, self.counters
        index = counters.requests
        prompt = expand_prompt(request, config.block_tokens)
        key = prompt
        if config.output_tokens:
            key = np.concatenate([prompt, expand_response(index, request.output_length)])
        counters.requests += 1
        counters.prompt_tokens += len(prompt)
        if len(key) // config.page_size > config.device_pages:
            counters.uncached_requests += 1
            return
        self._serve(index, prompt, key)

    def _serve(self, index: int, prompt: npt.NDArray[np.int32], key: npt.NDArray[np.int32]) -> None:
        """Serve request number ``index``: find its prompt, and cache the key, which is the prompt and its answer."""
        raise NotImplementedError

    def check_integrity(self) -> None:
        """Between two requests. Raises: IntegrityError."""
        raise NotImplementedError

    def more_figures(self) -> dict[str, Any]:
        """What the report says beyond what every replay has."""
        return {}

    def _timed(self, kind: str, call: Callable[..., _T], *args: object) -> _T:
        begin = time.perf_counter_ns()
        result = call(*args)
        self.latencies_ns[kind].append(time.perf_counter_ns() - begin)
        return result

    # ---- bytes -------------------------------------------------------------------------------------------------------
    def _write(self, seeds: npt.NDArray[np.uint64], page_ids: PageIds) -> None:
        for chunk in self._chunks(len(page_ids)):
            self.device.scatter(page_ids[chunk], page_bytes(seeds[chunk], self.device.page_bytes))
        self.counters.written_pages += len(page_ids)

    def _verify(
        self, request: int, seeds: npt.NDArray[np.uint64], page_ids: PageIds, num_device: int, num_known: int = 2**31
    ) -> None:
        """Compare hit pages byte for byte. The first ``num_device`` were on the device, those up to ``num_known`` on
        the host, the rest in storage."""
        for chunk in self._chunks(len(page_ids)):
            expected = page_bytes(seeds[chunk], self.device.page_bytes)
            found = self.device.gather(page_ids[chunk])
            if not np.array_equal(expected, found):
                row, byte = np.argwhere(expected != found)[0]
                page = chunk.start + int(row)
                origin = "loaded back from the host" if page < num_known else "read from storage"
                origin = "on the device" if page < num_device else origin
                raise VerificationError(
                    f"request {request}: page {page} of its prompt (device page {page_ids[page]}, {origin}) is wrong "
                    f"at byte {byte} of {self.device.page_bytes}: {found[row, byte]:#04x}, "
                    f"expected {expected[row, byte]:#04x}"
                )
        self.counters.verified_pages += len(page_ids)

    def _chunks(self, num_pages: int) -> list[slice]:
        step = max(1, _VERIFY_BYTES // self.device.page_bytes)
        return [slice(at, min(at + step, num_pages)) for at in range(0, num_pages, step)]

    # ---- the end ----------------------------------------------------------------------------------------------------
    def cached_tokens(self) -> int:
        """Tokens in the tree, on either tier, each counted once."""
        stats = self.tree.stats()
        device_tokens = stats.evictable_tokens + stats.protected_tokens
        if not stats.host_tokens:
            return device_tokens
        host_only = 0
        for node in self.tree:
            info = self.tree.node_info(node)
            host_only += 0 if info.page_ids is not None else len(info.tokens)
        return device_tokens + host_only


class Replay(BaseReplay):
    """Drives one tree over two tiers. ``tree_class`` is any implementation of BaseRadixTree.

    Attributes: as of BaseReplay, and ``host`` (pool) and ``host_slots`` (allocator).
    """

    def __init__(self, tree_class: Callable[..., BaseRadixTree], config: ReplayConfig) -> None:
        kinds = ("match", "insert", "evict", "lock", "backup", "evict_host", "load_back")
        super().__init__(tree_class, config, kinds)
        self.host = HostPagePool(config.host_pages, self.device.page_bytes)
        self.host_slots = SlotAllocator(config.host_pages)
        self.counters = Counters()

    def _serve(self, index: int, prompt: npt.NDArray[np.int32], key: npt.NDArray[np.int32]) -> None:
        """Steps 1 to 9 of a request."""
        config, counters = self.config, self.counters
        match, device_ids, host_ids = self._timed("match", self._match, prompt)
        counters.device_hit_tokens += match.num_tokens
        counters.host_hit_tokens += match.host_num_tokens
        held = match.device_node
        if held != ROOT:
            self._timed("lock", self.tree.lock, held)
        num_hit = len(device_ids) + len(host_ids)
        fresh = self._make_room(match, len(key) // config.page_size - len(device_ids))
        if len(host_ids):
            held = self._load_back(match, host_ids, fresh[: len(host_ids)])
        page_ids = np.concatenate([device_ids, fresh])
        seeds = page_seeds(key, config.page_size)
        if config.verify:
            self._verify(index, seeds[:num_hit], page_ids[:num_hit], len(device_ids))
        self._write(seeds[num_hit:], page_ids[num_hit:])
        result = self._timed("insert", self.tree.insert, key, page_ids, match)
        counters.duplicate_pages += len(result.duplicate_page_ids)
        self.device_slots.free(result.duplicate_page_ids)
        if config.write_policy == "write_through":
            self._write_through(result.node, page_ids[num_hit:])
        if held != ROOT:
            self._timed("lock", self.tree.unlock, held)

    def _match(self, prompt: npt.NDArray[np.int32]) -> tuple[MatchResult, PageIds, PageIds]:
        match = self.tree.match(prompt)
        return match, match.page_ids(), match.host_page_ids()

    # ---- room on the device ------------------------------------------------------------------------------------------
    def _make_room(self, match: MatchResult, num_pages: int) -> PageIds:
        """Allocate device pages, evicting what is needed; the hit is protected meanwhile on both tiers."""
        if match.host_num_tokens:
            self.tree.protect_host(match.host_node)
        while self.device_slots.available < num_pages:
            before = self.device_slots.available
            self._evict((num_pages - before) * self.config.page_size)
            if self.device_slots.available == before:
                raise RadixKVError(
                    f"request {self.counters.requests - 1}: need {num_pages} device pages, {before} free, and the "
                    f"tree, which has {self.tree.stats().evictable_tokens} evictable tokens, gave up none"
                )
        if match.host_num_tokens:
            self.tree.release_host(match.host_node)
        page_ids = self.device_slots.alloc(num_pages)
        assert page_ids is not None
        return page_ids

    def _evict(self, num_tokens: int) -> None:
        """One round. It may free less: a node with a host copy waits until its children have been backed up."""
        backup = self.config.write_policy == "write_back" and self.config.host_pages > 0
        result = self._timed("evict", self.tree.evict, num_tokens, backup)
        self.counters.evicted_tokens += result.num_tokens
        self.device_slots.free(result.page_ids)
        self.host_slots.free(result.host_page_ids)
        for request in result.to_backup:
            self._back_up(request)

    def _back_up(self, request: BackupRequest) -> None:
        """Copy one node to the host, then let its device pages go; drop it if the host has no room."""
        host_ids = self._alloc_host(len(request.page_ids))
        num_tokens = len(request.page_ids) * self.config.page_size
        if host_ids is None:
            self.counters.dropped_tokens += num_tokens
        else:
            copy_pages(self.device, request.page_ids, self.host, host_ids)
            self.counters.backed_up_tokens += num_tokens
        result = self._timed("backup", self.tree.finish_backup, request.node, host_ids)
        self.counters.evicted_tokens += result.num_tokens
        self.device_slots.free(result.page_ids)
        self.host_slots.free(result.host_page_ids)

    def _alloc_host(self, num_pages: int) -> PageIds | None:
        """Host pages, evicting from the host tier; None if it has no room for them."""
        short = num_pages - self.host_slots.available
        if short > 0 and num_pages <= self.config.host_pages:
            result = self._timed("evict_host", self.tree.evict_host, short * self.config.page_size)
            self.host_slots.free(result.host_page_ids)
        return self.host_slots.alloc(num_pages)

    # ---- between the tiers -------------------------------------------------------------------------------------------
    def _load_back(self, match: MatchResult, host_ids: PageIds, device_ids: PageIds) -> int:
        """Bring the host part of a hit to the device; the lock moves to its last node, which is returned."""
        begin = time.perf_counter_ns()
        nodes = []
        node = match.host_node
        while node != match.device_node:
            info = self.tree.node_info(node)
            nodes.append((node, len(info.tokens) // self.config.page_size))
            node = info.parent
        done = 0
        for node, num_pages in reversed(nodes):  # parents first
            self.tree.set_device(node, device_ids[done : done + num_pages], loading=True)
            done += num_pages
        in_tree = time.perf_counter_ns() - begin
        copy_pages(self.host, host_ids, self.device, device_ids)
        begin = time.perf_counter_ns()
        for node, _ in reversed(nodes):
            self.tree.finish_load(node)
        self.tree.lock(match.host_node)
        if match.device_node != ROOT:
            self.tree.unlock(match.device_node)
        self.latencies_ns["load_back"].append(in_tree + time.perf_counter_ns() - begin)
        self.counters.loaded_back_tokens += match.host_num_tokens
        return match.host_node

    def _write_through(self, node: int, page_ids: PageIds) -> None:
        """Copy new pages, the last ones of the node's path, to the host; skip it if the host has no room."""
        if not len(page_ids) or not self.config.host_pages:
            return
        num_tokens = len(page_ids) * self.config.page_size
        host_ids = self._alloc_host(len(page_ids))
        if host_ids is None:
            self.counters.dropped_tokens += num_tokens
            return
        copy_pages(self.device, page_ids, self.host, host_ids)
        self._timed("backup", self.tree.set_host, node, host_ids)
        self.counters.backed_up_tokens += num_tokens

    # ---- the end -----------------------------------------------------------------------------------------------------
    def check_integrity(self) -> None:
        """Between two requests: tree + free = capacity on both tiers, nothing protected. Raises: IntegrityError."""
        self.device_slots.check_integrity()
        self.host_slots.check_integrity()
        self.tree.check_integrity(
            capacity=self.config.device_pages,
            free_page_ids=self.device_slots.free_ids(),
            host_capacity=self.config.host_pages,
            free_host_page_ids=self.host_slots.free_ids(),
        )
        stats = self.tree.stats()
        if stats.protected_tokens or stats.pending_tokens:
            raise IntegrityError(
                f"no request runs, yet {stats.protected_tokens} tokens are protected and {stats.pending_tokens} pending"
            )
