"""L2: values in a Mooncake store: the memory of many machines as one, by RDMA or TCP, straight from and to host pages.

Server:   apt-get install libibverbs1
          pip install radixkv[mooncake]     (mooncake-transfer-engine-non-cuda; 46 MB)
          mooncake_master --rpc_address 127.0.0.1 --rpc_port 50051
          mooncake_client --host 127.0.0.1 --master_server_address 127.0.0.1:50051 --metadata_server P2PHANDSHAKE \\
              --protocol tcp --global_segment_size 4GB       (a process that only lends memory; any number of them)

    MooncakeStorage(master="127.0.0.1:50051", segment_bytes=4 << 30)

Values live in the segments that clients lend, this one too with ``segment_bytes`` above 0, and go with the client that
lent them. The master evicts by itself from 90 % on, single values, and does not tell: ``lost`` is 0. Looking
values up is all that touch_many does. Register the host pool's arena (``register``): parts elsewhere (the
64-byte headers) are copied through registered slabs.

Deadlines: look-ups and deletes leave in time. Mooncake itself moves the bytes of a put or a get, which therefore waits
until Mooncake gives up: ``timeout_s`` of this store, which it sets as MC_RPC_TIMEOUT_MS, MC_TCP_PROGRESS_TIMEOUT_SEC
and the like, unless they are set. They hold for the whole process, from the first store on.

stats: refused (no room in the store, or strays larger than a slab), failed (transfers that failed), late.
"""

from __future__ import annotations

import os
import queue
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

import numpy as np

from ..errors import InvalidArgumentError, StorageError, StorageTimeoutError
from .base import (
    MISS,
    BoolArray,
    Buffer,
    Deadline,
    IntArray,
    Parts,
    Storage,
    byte_views,
    check_keys,
    check_pairs,
    require_package,
)
from .memories import Memories, address_of
from .threads import DaemonPool

__all__ = ["MooncakeStorage"]

NOT_FOUND, RPC_FAIL, RPC_TIMEOUT = -704, -900, -901
"""Of Mooncake's ErrorCode."""
BATCH_BYTES, BATCH_KEYS, BATCH_PIECES = 64 << 20, 1024, 1024
"""Of one call of Mooncake's. Its TCP transport fails what has more pieces than its queue to a peer holds (2,048)."""
MOST_PIECES = 128
"""Of a value; one that lies in more is copied through a slab."""


class _Slab:
    """Registered memory that parts are copied through, for the length of one batch."""

    def __init__(self, num_bytes: int) -> None:
        data: Buffer = np.zeros(num_bytes, np.uint8)
        self.view, self.address = memoryview(data), address_of(data)
        self.used = 0
        self.borrowed: list[tuple[int, memoryview]] = []

    def lend(self, view: memoryview) -> int | None:
        """An address for the bytes of a part; None if there is no room."""
        if self.used + len(view) > len(self.view):
            return None
        at, self.used = self.used, self.used + len(view)
        self.borrowed.append((at, view))
        return self.address + at

    def fill(self) -> None:
        """Copy the parts into the slab."""
        for at, view in self.borrowed:
            self.view[at : at + len(view)] = view

    def spill(self) -> None:
        """Copy the slab into the parts."""
        for at, view in self.borrowed:
            view[:] = self.view[at : at + len(view)]

    def empty(self) -> None:
        self.used = 0
        self.borrowed.clear()


class _Batch:
    """Values of one call of Mooncake's: their positions, and where their parts lie."""

    def __init__(self) -> None:
        self.positions: list[int] = []
        self.addresses: list[list[int]] = []
        self.sizes: list[list[int]] = []
        self._bytes = self._pieces = 0

    def add(self, position: int, pieces: Sequence[tuple[int, int]]) -> None:
        self.positions.append(position)
        self.addresses.append([address for address, _ in pieces])
        self.sizes.append([size for _, size in pieces])
        self._bytes += sum(self.sizes[-1])
        self._pieces += len(pieces)

    def full(self) -> bool:
        """Whether it should go before more is added."""
        return (
            len(self.positions) >= BATCH_KEYS
            or self._pieces + MOST_PIECES > BATCH_PIECES
            or self._bytes >= BATCH_BYTES
        )


class MooncakeStorage(Storage):
    """Values as objects of a Mooncake store.

    Args:
        master: host:port of mooncake_master.
        hostname: of this machine, as others reach it.
        metadata: of the transfer engine: P2PHANDSHAKE, or the URL of a metadata server.
        protocol, devices: "tcp", or "rdma" with its devices.
        segment_bytes: memory lent to the store by this process.
        slab_bytes: of each of the 4 slabs for parts outside of registered memory.
        prefix: of all keys. timeout_s: see the top. setup_retries: of finding the master.
    Raises: StorageError if the package (or libibverbs1) is missing, or the master cannot be reached.
    """

    name = "mooncake"

    def __init__(
        self,
        *,
        master: str = "127.0.0.1:50051",
        hostname: str = "127.0.0.1",
        metadata: str = "P2PHANDSHAKE",
        protocol: str = "tcp",
        devices: str = "",
        segment_bytes: int = 0,
        slab_bytes: int = 8 << 20,
        prefix: str = "radixkv.",
        timeout_s: float = 5.0,
        setup_retries: int = 1,
    ) -> None:
        if not timeout_s > 0 or segment_bytes < 0 or slab_bytes < 1:
            raise InvalidArgumentError(f"timeout_s {timeout_s}, segment_bytes {segment_bytes}, slab_bytes {slab_bytes}")
        check_keys([prefix])
        _set_timeouts(timeout_s, setup_retries)
        package = "radixkv[mooncake], and apt-get install libibverbs1"
        module = require_package("mooncake.store", package, "radixkv.storage.mooncake")
        self.prefix, self.timeout_s = prefix, timeout_s
        self._store: Any = module.MooncakeDistributedStore()
        code = self._store.setup(hostname, metadata, segment_bytes, 16 << 20, protocol, devices, master)
        if code:
            raise StorageError(f"mooncake: no store at {master} ({protocol}), error {code}: no mooncake_master?")
        self._closed = False
        self._lock = threading.Lock()
        self._counters = {"refused": 0, "failed": 0, "late": 0}
        self._memories = Memories(self._add_memory, self._remove_memory)
        self._slabs: queue.SimpleQueue[_Slab] = queue.SimpleQueue()
        for _ in range(4):
            slab = _Slab(slab_bytes)
            self._memories.register(slab.view)
            self._slabs.put(slab)
        self._pool = DaemonPool(2, "radixkv-mooncake")

    # ---- memory ------------------------------------------------------------------------------------------------------
    def register(self, memory: Buffer) -> None:
        """Raises: StorageError if Mooncake refuses it, InvalidArgumentError if it overlaps registered memory."""
        self._memories.register(memory)

    def unregister(self, memory: Buffer) -> None:
        self._memories.unregister(memory)

    def _add_memory(self, address: int, num_bytes: int) -> None:
        if code := self._store.register_buffer(address, num_bytes):
            raise StorageError(f"mooncake: {num_bytes} bytes at {address:#x} cannot be registered, error {code}")

    def _remove_memory(self, address: int, num_bytes: int, _: object) -> None:
        self._store.unregister_buffer(address)

    # ---- values ------------------------------------------------------------------------------------------------------
    def put_many(self, keys: Sequence[str], parts: Sequence[Parts], *, timeout_s: float | None = None) -> BoolArray:
        check_pairs(keys, parts)
        deadline = self._begin(timeout_s, "put_many")
        views = [byte_views(pieces) for pieces in parts]
        flags = np.zeros(len(keys), np.bool_)

        def put(batch: _Batch, slab: _Slab) -> None:
            slab.fill()
            names = [self.prefix + keys[index] for index in batch.positions]
            codes = self._store.batch_put_from_multi_buffers(names, batch.addresses, batch.sizes)
            self._check(codes)
            # 0 also says "there already", of one that another put began and never ended
            there = self._store.batch_is_exist(names)
            self._check(there)
            flags[batch.positions] = [code == 0 and seen == 1 for code, seen in zip(codes, there, strict=True)]

        self._in_batches(keys, views, put, deadline)
        self._count("refused", int((~flags).sum()))
        return flags

    def get_many(self, keys: Sequence[str], parts: Sequence[Parts], *, timeout_s: float | None = None) -> IntArray:
        check_pairs(keys, parts)
        deadline = self._begin(timeout_s, "get_many")
        views = [byte_views(pieces, writable=True) for pieces in parts]
        found = np.full(len(keys), MISS, np.int64)

        def get(batch: _Batch, slab: _Slab) -> None:
            names = [self.prefix + keys[index] for index in batch.positions]
            codes = self._store.batch_get_into_multi_buffers(names, batch.addresses, batch.sizes)
            self._check(codes)
            slab.spill()
            found[batch.positions] = [self._size(*row) for row in zip(names, codes, batch.sizes, strict=True)]

        self._in_batches(keys, views, get, deadline)
        return found

    def _size(self, name: str, code: int, sizes: Sequence[int]) -> int:
        """What a get reports. Mooncake has no code of its own for a value of another length than its parts."""
        if code >= 0 or code == NOT_FOUND:
            return max(code, MISS)
        size: int = self._store.get_size(name)
        if size < 0 or size == sum(sizes):
            self._count("failed")
            return MISS
        return size

    def _in_batches(self, keys: Sequence[str], views: Sequence[list[memoryview]],
                    function: Callable[[_Batch, _Slab], None], deadline: Deadline) -> None:  # fmt: skip
        """Call ``function`` for batches of values, each with a slab that its strays are lent from."""
        rest, again = _first_of_each(keys, range(len(keys)))
        while rest or again:
            if not rest:  # Mooncake fills the parts of only one, if a key comes twice in a call
                rest, again = _first_of_each(keys, again)
            try:
                slab = self._slabs.get(timeout=deadline.remaining_s())
            except queue.Empty:
                raise StorageTimeoutError(f"{deadline.what}: no slab within {deadline.timeout_s} s") from None
            try:
                batch, rest = self._gather(views, rest, slab)
                if batch.positions:
                    function(batch, slab)
            finally:
                slab.empty()
                self._slabs.put(slab)

    def _gather(self, views: Sequence[list[memoryview]], rest: list[int], slab: _Slab) -> tuple[_Batch, list[int]]:
        """As many values as fit in a batch, and those that are left. One whose strays fit in no slab is left out."""
        batch = _Batch()
        for done, index in enumerate(rest):
            if batch.full():
                return batch, rest[done:]
            pieces = self._pieces(views[index], slab)
            if pieces is not None:
                batch.add(index, pieces)
            elif batch.positions:
                return batch, rest[done:]
            else:
                slab.empty()
        return batch, []

    def _pieces(self, views: Sequence[memoryview], slab: _Slab) -> list[tuple[int, int]] | None:
        """(address, bytes) of registered memory with the bytes of these parts; None if the slab has no room."""
        pieces: list[tuple[int, int]] = []
        through_slab = len(views) > MOST_PIECES
        for view in filter(len, views):
            address = address_of(view)
            if through_slab or not self._memories.holds(address, len(view)):
                lent = slab.lend(view)
                if lent is None:
                    return None
                address = lent
            if pieces and sum(pieces[-1]) == address:
                pieces[-1] = (pieces[-1][0], pieces[-1][1] + len(view))
            else:
                pieces.append((address, len(view)))
        return pieces

    # ---- names -------------------------------------------------------------------------------------------------------
    def exists_many(self, keys: Sequence[str], *, timeout_s: float | None = None) -> BoolArray:
        check_keys(keys)
        names = [self.prefix + key for key in keys]
        codes = self._ask("exists_many", lambda: self._store.batch_is_exist(names), timeout_s) if names else []
        return np.array([code == 1 for code in codes], np.bool_)

    def delete_many(self, keys: Sequence[str], *, timeout_s: float | None = None) -> None:
        check_keys(keys)
        names = [self.prefix + key for key in keys]
        if names:  # force: look-ups and gets leave leases of seconds on what they found
            self._ask("delete_many", lambda: self._store.batch_remove(names, True), timeout_s)

    def clear(self, *, timeout_s: float | None = None) -> None:
        pattern = f"^{re.escape(self.prefix)}.*"
        self._ask("clear", lambda: [min(0, self._store.remove_by_regex(pattern, True))], timeout_s)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._pool.shutdown()
            self._memories.clear()
            self._store.close()

    def stats(self) -> Mapping[str, int]:
        with self._lock:
            return dict(self._counters)

    # ---- calls -------------------------------------------------------------------------------------------------------
    def _begin(self, timeout_s: float | None, what: str) -> Deadline:
        deadline = Deadline(self.timeout_s if timeout_s is None else timeout_s, f"mooncake: {what}")
        if self._closed:
            raise StorageError("mooncake: the storage is closed")
        return deadline

    def _ask(self, what: str, function: Callable[[], list[int]], timeout_s: float | None) -> list[int]:
        """A call that touches no memory of ours, left at the deadline."""
        deadline = self._begin(timeout_s, what)
        future = self._pool.submit(function)
        try:
            codes = future.result(deadline.remaining_s())
        except FutureTimeout as error:
            future.cancel()
            self._count("late")
            raise StorageTimeoutError(f"{deadline.what} did not end within {deadline.timeout_s} s") from error
        self._check(codes)
        return codes

    def _check(self, codes: Sequence[int]) -> None:
        if RPC_TIMEOUT in codes:
            self._count("late")
            raise StorageTimeoutError("mooncake: the master does not answer")
        if RPC_FAIL in codes:
            raise StorageError("mooncake: the master cannot be reached")

    def _count(self, name: str, more: int = 1) -> None:
        with self._lock:
            self._counters[name] += more


def _first_of_each(keys: Sequence[str], positions: Iterable[int]) -> tuple[list[int], list[int]]:
    """Positions of keys that did not come before, and the others."""
    first: dict[str, int] = {}
    others = [index for index in positions if first.setdefault(keys[index], index) != index]
    return list(first.values()), others


def _set_timeouts(timeout_s: float, setup_retries: int) -> None:
    """Mooncake reads them when its first client is made."""
    wanted = {
        "MC_RPC_TIMEOUT_MS": max(1, round(1000 * timeout_s)),
        "MC_RPC_CONNECT_TIMEOUT_MS": max(1, round(500 * timeout_s)),
        "MC_TCP_PROGRESS_TIMEOUT_SEC": max(1, round(timeout_s)),
        "MC_STORE_CLIENT_SETUP_RETRIES": setup_retries,
        "MC_LOG_LEVEL": "ERROR",
    }
    for name, value in wanted.items():
        os.environ.setdefault(name, str(value))
