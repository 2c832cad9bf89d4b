"""Shared by the tests of the controller: a whole stack in plain memory, and movers and storage edges that do what a test
says, when it says so."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from radixkv import RadixTree
from radixkv.controller import Controller, ControllerConfig, Polled
from radixkv.controller.mover_cpu import CpuProgress, CpuTicket
from radixkv.pool.arena import ArenaConfig
from radixkv.pool.host import HostKVCache, HostPoolConfig
from radixkv.pool.layout import KVGeometry, KVView
from radixkv.pool.slots import SlotAllocator
from radixkv.transfer.cpu import CpuTransfer
from radixkv.transfer.plan import staging_view
from radixkv.types import ROOT, PageIds

GEOMETRY = KVGeometry(kind="mha", num_layers=2, num_heads=1, head_bytes=16, page_size=4)
P = GEOMETRY.page_size


def content_of(tokens: Any, num_pages: int | None = None) -> np.ndarray[Any, Any]:
    """What the pages of a prompt hold: uint8 [pages, page_bytes], each a function of all tokens up to its end."""
    tokens = np.asarray(tokens, np.int64)
    pages = len(tokens) // P if num_pages is None else num_pages
    rows = np.zeros((pages, GEOMETRY.page_bytes), np.uint8)
    state = np.uint64(88172645463325252)
    with np.errstate(over="ignore"):
        for page in range(pages):
            for token in tokens[page * P : (page + 1) * P]:
                state = (state ^ np.uint64(token & 0xFFFFFFFF)) * np.uint64(0x9E3779B97F4A7C15)
                state ^= state >> np.uint64(29)
            words = np.arange(GEOMETRY.page_bytes // 8, dtype=np.uint64) * np.uint64(0xD6E8FEB86659FD93) + state
            rows[page] = (words ^ (words >> np.uint64(31))).view(np.uint8)
    return rows


class DeviceMemory(SlotAllocator):
    """Device pages and their bytes: ``data`` uint8 [pages, page_bytes]. ``refuse``: allocations that fail, by count."""

    def __init__(self, num_pages: int) -> None:
        super().__init__(num_pages)
        self.data = np.zeros((num_pages, GEOMETRY.page_bytes), np.uint8)
        self.refuse = 0

    def view(self) -> KVView:
        return staging_view(GEOMETRY, self.data.ctypes.data, len(self.data))

    def alloc(self, num_pages: int) -> PageIds | None:
        if self.refuse:
            self.refuse -= 1
            return None
        return super().alloc(num_pages)


def host_cache(num_pages: int) -> HostKVCache:
    """A host pool that does not mind how little memory the machine has."""
    config = HostPoolConfig(headroom_bytes=0, arena=ArenaConfig(huge_pages="none"))
    return HostKVCache(GEOMETRY, num_pages * P, "page_first", config=config)


class ScriptedMover:
    """A Mover that copies when told: ``step()`` runs the oldest copy, or makes it fail."""

    def __init__(self, device_view: KVView, host_view: KVView) -> None:
        self._transfer = CpuTransfer(GEOMETRY, 1)
        self._device, self._host = device_view, host_view
        self.waiting: list[tuple[str, CpuTicket]] = []
        self.instant = False
        self.fail: Callable[[str], BaseException | None] = lambda kind: None

    def backup(self, device_pages: PageIds, host_pages: PageIds) -> CpuTicket:
        def copy() -> None:
            self._raise("backup")
            self._transfer.backup(self._device, self._host, device_pages, host_pages)

        return self._put("backup", CpuTicket(copy))

    def load(self, host_pages: PageIds, device_pages: PageIds, progress: Any) -> CpuTicket:
        def copy() -> None:
            self._raise("load")
            self._transfer.load_back(self._host, self._device, host_pages, device_pages, progress.layers)

        return self._put("load", CpuTicket(copy, progress.fail))

    def new_progress(self) -> CpuProgress:
        return CpuProgress(GEOMETRY.num_layers)

    def _raise(self, kind: str) -> None:
        error = self.fail(kind)
        if error is not None:
            raise error

    def _put(self, kind: str, ticket: CpuTicket) -> CpuTicket:
        if self.instant:
            ticket.run()
        else:
            self.waiting.append((kind, ticket))
        return ticket

    def step(self, kind: str | None = None) -> bool:
        """Run the oldest copy (of a kind). Returns: whether there was one."""
        for at, (name, ticket) in enumerate(self.waiting):
            if kind in (None, name):
                del self.waiting[at]
                ticket.run()
                return True
        return False

    def run(self) -> None:
        """Run all copies."""
        while self.step():
            pass

    def close(self) -> None:
        for _, ticket in self.waiting:
            ticket.cancel()


class Stack:
    """Tree, pools, a mover and a controller; the test is the engine."""

    def __init__(
        self, device_pages: int = 32, host_pages: int = 64, *, tree: Any = None, mover: Any = None, storage: Any = None,
        group: Any = None, listener: Any = None, clock: Callable[[], float] | None = None, **config: Any,
    ) -> None:  # fmt: skip
        self.device = DeviceMemory(device_pages)
        self.host = host_cache(host_pages)
        self.tree = tree if tree is not None else RadixTree(P)
        self.mover = mover or ScriptedMover(self.device.view(), self.host.view())
        more = {} if clock is None else {"clock": clock}
        self.controller = Controller(
            self.tree, self.device, self.host, self.mover, storage=storage, group=group, listener=listener,
            config=ControllerConfig(**{"write_policy": "write_through"} | config), **more,
        )  # fmt: skip

    def compute(self, tokens: Any, **more: Any) -> int:
        """Do what an engine does for a prompt that is not cached: take pages, fill them, insert. Returns the node."""
        tokens = np.asarray(tokens, np.int32)
        pages = self.controller.alloc_pages(len(tokens) // P)
        assert pages is not None, f"no room for {len(tokens)} tokens"
        self.device.data[pages] = content_of(tokens)
        result = self.controller.insert(tokens, pages, **more)
        self.device.free(result.duplicate_page_ids)
        return result.node

    def settle(self, limit: int = 100) -> list[Polled]:
        """Let everything that waits end, and poll until nothing is in flight."""
        polls = []
        for _ in range(limit):
            if isinstance(self.mover, ScriptedMover):
                self.mover.run()
            polls.append(self.controller.poll())
            stats = self.controller.stats()
            if not (stats.writes_in_flight or stats.stores_in_flight or self.controller._loads.batches):
                return polls
        raise AssertionError(f"does not quiesce: {self.controller.stats()}")

    def serve(self, tokens: Any) -> int:
        """Match, and check every byte of what is on the device. Returns: tokens that were."""
        match = self.controller.match(tokens)
        pages = match.page_ids()
        assert np.array_equal(self.device.data[pages], content_of(tokens, len(pages))), "wrong bytes"
        return match.num_tokens

    def check(self, held: PageIds | None = None) -> None:
        """Everything adds up."""
        self.controller.check_integrity(np.zeros(0, np.int32) if held is None else held)

    def close(self) -> None:
        self.controller.close()


def prompt(seed: int, pages: int) -> np.ndarray[Any, Any]:
    """Tokens, of whole pages."""
    return np.random.default_rng(seed).integers(0, 1000, pages * P).astype(np.int32)


__all__ = ["GEOMETRY", "ROOT", "DeviceMemory", "P", "ScriptedMover", "Stack", "content_of", "ctypes", "host_cache", "prompt"]
