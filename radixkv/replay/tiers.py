"""L5: replays a trace through three tiers: the controller moves pages between device, host and a storage folder, on its
threads, and every byte of every hit is checked. The folder survives: a second replay begins with what the first left.

A request:

    1. match           device part | host part
    2. prefetch        what only storage has of the rest comes to the host; match again
    3. lock, load      the host part gets device pages, which the controller's mover fills
    4. make room       pages for the new part; the controller evicts
    5. verify          the bytes of all hit pages, whichever tier they came from
    6. compute         write the bytes of the new pages (a model would)
    7. insert          which starts backups to the host, and from there to storage
    8. unlock, settle  wait until nothing is in flight, so that a run gives the same figures each time

Hits are counted by where the pages were when the request came, and only if they were used.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ..controller import Controller, ControllerConfig, CpuMover, Load
from ..errors import IntegrityError, InvalidArgumentError, RadixKVError
from ..pool.host import HostKVCache, HostPoolConfig
from ..pool.layout import KVGeometry, KVView
from ..storage import PageNamespace, PageStore, create_storage, host_page_parts
from ..transfer.cpu import CpuTransfer
from ..tree.base import BaseRadixTree, MatchResult
from ..types import ROOT, PageIds
from .content import page_seeds
from .replay import BaseReplay, Counters, ReplayConfig

__all__ = ["TierConfig", "TierCounters", "TierReplay"]

_T = TypeVar("_T")
PATIENCE_S = 60.0
"""For copies and storage calls: far beyond what they take, so that a hang is an error."""
POLL_S = 0.00005


@dataclass(frozen=True, slots=True, kw_only=True)
class TierConfig(ReplayConfig):
    """How to replay through three tiers.

    Args: as ReplayConfig, and
        storage: the folder of the storage tier, made if need be; it keeps what it has.
        storage_bytes: at most, on disk; None: no limit.
    """

    storage: str
    storage_bytes: int | None = None

    def __post_init__(self) -> None:
        ReplayConfig.__post_init__(self)
        if self.host_pages < 1:
            raise InvalidArgumentError("storage is behind the host tier, which has no pages")
        if self.storage_bytes is not None and self.storage_bytes < 1:
            raise InvalidArgumentError(f"storage_bytes must be at least 1, not {self.storage_bytes}")


@dataclass(slots=True)
class TierCounters(Counters):
    """As Counters, and what came from storage: tokens used, and tokens that were brought to the host."""

    storage_hit_tokens: int = 0
    prefetched_tokens: int = 0
    stored_tokens: int = 0


class TierReplay(BaseReplay):
    """Drives a controller. ``tree_class`` is any implementation of BaseRadixTree.

    Attributes: as of BaseReplay, and ``host`` (HostKVCache), ``controller``, ``store`` (PageStore). ``close`` it.
    """

    tiers = ("device", "host", "storage")

    def __init__(self, tree_class: Callable[..., BaseRadixTree], config: TierConfig) -> None:
        super().__init__(tree_class, config, ("match", "prefetch", "load_back", "alloc", "insert", "lock", "settle"))
        self.counters: TierCounters = TierCounters()
        size, token_bytes = config.page_size, config.bytes_per_token
        geometry = KVGeometry(kind="mla", num_layers=1, num_heads=1, head_bytes=token_bytes, page_size=size)
        pool = HostPoolConfig(headroom_bytes=0)
        self.host = HostKVCache(geometry, config.host_pages * size, "page_first_direct", config=pool)
        device = KVView(
            bases=np.array([[self.device.data.ctypes.data]], np.uint64), page_stride=size * token_bytes,
            token_stride=token_bytes, head_stride=token_bytes, num_slots=config.device_pages * size,
            owner=self.device.data,
        )  # fmt: skip
        self._storage = create_storage("file", path=config.storage, max_bytes=config.storage_bytes)
        namespace = PageNamespace.of_geometry(geometry, self.host.page_dims, model="radixkv replay", dtype="uint8")
        self.store = PageStore(self._storage, namespace, host_page_parts(self.host))
        control = ControllerConfig(
            write_policy=config.write_policy, store_after_backup=True, prefetch_policy="wait_complete",
            prefetch_threshold=size, load_back_threshold=0, prefetch_capacity_floor=1.0,
        )  # fmt: skip
        mover = CpuMover(CpuTransfer(geometry), device, self.host.view())
        self.controller = Controller(
            self.tree, self.device_slots, self.host, mover, storage=self.store, config=control
        )  # fmt: skip

    # ---- a request ---------------------------------------------------------------------------------------------------
    def _serve(self, index: int, prompt: npt.NDArray[np.int32], key: npt.NDArray[np.int32]) -> None:
        """Steps 1 to 8 of a request."""
        config, counters = self.config, self.counters
        match, known = self._find(str(index), prompt)
        held, hit_ids = self._load(match)
        num_device, num_hit = match.num_tokens // config.page_size, len(hit_ids)
        used = num_hit * config.page_size
        counters.device_hit_tokens += match.num_tokens
        counters.host_hit_tokens += max(match.num_tokens, min(known, used)) - match.num_tokens
        counters.storage_hit_tokens += used - max(match.num_tokens, min(known, used))
        page_ids = np.concatenate([hit_ids, self._room(len(key) // config.page_size - num_hit)])
        seeds = page_seeds(key, config.page_size)
        if config.verify:
            self._verify(index, seeds[:num_hit], hit_ids, num_device, known // config.page_size)
        self._write(seeds[num_hit:], page_ids[num_hit:])
        result = self._timed("insert", self.controller.insert, key, page_ids)
        counters.duplicate_pages += len(result.duplicate_page_ids)
        self.device_slots.free(result.duplicate_page_ids)
        if held != ROOT:
            self._timed("lock", self.controller.unlock, held)
        self._timed("settle", self._settle)

    def _find(self, rid: str, prompt: npt.NDArray[np.int32]) -> tuple[MatchResult, int]:
        """Match, prefetch, match again. Returns: the match, and how many of its tokens were there without storage."""
        match = self._timed("match", self.controller.match, prompt)
        known = match.num_tokens + match.host_num_tokens
        if self._timed("prefetch", self._prefetch, rid, prompt[known:], match.host_node):
            match = self._timed("match", self.controller.match, prompt)
            self.counters.prefetched_tokens += max(0, match.num_tokens + match.host_num_tokens - known)
        return match, known

    def _prefetch(self, rid: str, rest: npt.NDArray[np.int32], node: int) -> bool:
        """Bring what storage has to the host. Returns: whether it was asked."""
        if not self.controller.prefetch(rid, rest, node):
            return False
        self._until(lambda: self.controller.finish_prefetch(rid) or None, f"prefetch of {len(rest)} tokens")
        return True

    def _load(self, match: MatchResult) -> tuple[int, PageIds]:
        """Lock the hit, and load what is on the host. Returns: the locked node, and the device pages of the hit."""
        held, device_ids = match.device_node, match.page_ids()
        if held != ROOT:
            self._timed("lock", self.controller.lock, held)
        if not match.host_num_tokens:
            return held, device_ids
        load: Load | None = self._timed("load_back", self._load_now, match.host_node)
        if load is None:
            return held, device_ids
        self.controller.lock(load.node)
        if held != ROOT:
            self.controller.unlock(held)
        self.counters.loaded_back_tokens += load.num_tokens
        return load.node, np.concatenate([device_ids, load.page_ids])

    def _load_now(self, node: int) -> Load | None:
        load = self.controller.load(node)
        if load is not None:
            index = self.controller.start_loads()
            if not self.controller.layer_counter.wait(0, PATIENCE_S, index):
                raise RadixKVError(f"a load of {load.num_tokens} tokens takes more than {PATIENCE_S:.0f} s")
        return load

    def _room(self, num_pages: int) -> PageIds:
        """Device pages; the controller evicts."""
        wanted = f"{num_pages} device pages of {self.config.device_pages}"
        return self._timed("alloc", self._until, lambda: self.controller.alloc_pages(num_pages), wanted)

    def _settle(self) -> None:
        """Wait until nothing is in flight."""

        def settled() -> bool | None:
            self.controller.poll()
            stats = self.controller.stats()
            return not (stats.writes_in_flight or stats.loads_in_flight or stats.stores_in_flight) or None

        self._until(settled, "end of all copies")

    def _until(self, ask: Callable[[], _T | None], what: str) -> _T:
        """Ask until there is an answer; settles what ends meanwhile."""
        end_s = time.monotonic() + PATIENCE_S
        while (answer := ask()) is None:
            if time.monotonic() > end_s:
                raise RadixKVError(f"request {self.counters.requests - 1}: no {what} within {PATIENCE_S:.0f} s")
            time.sleep(POLL_S)
            self.controller.poll()
        return answer

    # ---- the end -----------------------------------------------------------------------------------------------------
    def check_integrity(self) -> None:
        """Between two requests: tree + free = capacity on both tiers, nothing protected. Raises: IntegrityError."""
        self.device_slots.check_integrity()
        self.controller.check_integrity(np.zeros(0, np.int32))
        stats = self.tree.stats()
        if stats.protected_tokens or stats.pending_tokens:
            raise IntegrityError(
                f"no request runs, yet {stats.protected_tokens} tokens are protected and {stats.pending_tokens} pending"
            )
        done = self.controller.stats()
        counters = self.counters
        counters.evicted_tokens, counters.dropped_tokens = done.device_evicted_tokens, done.dropped_tokens
        counters.backed_up_tokens = done.backup_tokens + done.write_back_tokens
        counters.stored_tokens = done.store_tokens

    def more_figures(self) -> dict[str, Any]:
        """Counters of the storage tier and of the controller."""
        return {
            "storage": dataclasses.asdict(self.store.counters) | {"backend": dict(self._storage.stats())},
            "controller": self.controller.stats()._asdict(),
        }

    def close(self) -> None:
        """End all threads, and give memory and folder back."""
        self.controller.close()
        self._storage.close()
        self.host.clear()  # pages of copies that were cancelled
        self.host.close()
