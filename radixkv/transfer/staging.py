"""Small uploads that do not make the caller wait: page-locked buffers with their place on the device, used in turn.

    ids -> [page-locked | device | event] --memcpyAsync--> kernels read the device's half -> event recorded behind them

An upload from pageable memory may block until the driver has read it, behind all that the stream still has to do. A
slot is used again once its event has passed; only when all ``MAX_SLOTS`` are under way does an upload wait for one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["MAX_SLOTS", "MIN_SLOT_BYTES", "UploadRing"]

MAX_SLOTS = 16
MIN_SLOT_BYTES = 64 << 10
"""8192 page ids of 8 bytes; larger ones are powers of two."""

DISABLE_TIMING = 2  # cudaEventDisableTiming


@dataclass(slots=True)
class _Slot:
    event: int
    host: int = 0
    device: int = 0
    capacity: int = 0


class UploadRing:
    """At most ``max_slots`` buffers of one GPU, each as large as the largest upload it ever had. Not thread-safe.

    Args:
        runtime: CuPy's; calls are made with the GPU current.
    Attributes:
        waits: uploads that found every slot under way.
    """

    def __init__(self, runtime: Any, max_slots: int = MAX_SLOTS) -> None:
        self._runtime, self._max_slots = runtime, max_slots
        self._slots: list[_Slot] = []  # the longest unused first
        self.waits = 0

    def __len__(self) -> int:
        return len(self._slots)

    @contextmanager
    def upload(self, arrays: Sequence[npt.NDArray[Any]], stream: int) -> Iterator[list[int]]:
        """Put arrays on a stream; what is launched inside the block may read them at the addresses it is given.

        Raises: CuPy's CUDARuntimeError; nothing is lost then.
        """
        if not arrays:
            yield []
            return
        sizes = [-(-array.nbytes // 16) * 16 for array in arrays]
        slot = self._free_slot(sum(sizes))
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        for start, array in zip(starts, arrays, strict=True):
            ctypes.memmove(slot.host + start, np.ascontiguousarray(array).ctypes.data, array.nbytes)
        to_device = self._runtime.memcpyHostToDevice
        self._slots.remove(slot)
        try:
            self._runtime.memcpyAsync(slot.device, slot.host, starts[-1] + arrays[-1].nbytes, to_device, stream)
            yield [slot.device + start for start in starts]
        finally:
            self._give_back(slot, stream)

    def _give_back(self, slot: _Slot, stream: int) -> None:
        """Behind whatever was launched, the whole block or a part of it."""
        try:
            self._runtime.eventRecord(slot.event, stream)
        except BaseException:
            self._release(slot)  # freeing waits for whoever reads it
            raise
        self._slots.append(slot)

    def _free_slot(self, num_bytes: int) -> _Slot:
        idle = [slot for slot in self._slots if self._runtime.eventQuery(slot.event) == 0]
        large = [slot for slot in idle if slot.capacity >= num_bytes]
        if large:
            return large[0]
        if not idle and len(self._slots) >= self._max_slots:
            self.waits += 1
            self._runtime.eventSynchronize(self._slots[0].event)
            idle = [self._slots[0]]
        if not idle:
            idle = [_Slot(self._runtime.eventCreateWithFlags(DISABLE_TIMING))]
            self._slots.append(idle[0])
        slot = idle[0]
        if slot.capacity < num_bytes:
            self._grow(slot, max(MIN_SLOT_BYTES, 1 << (num_bytes - 1).bit_length()))
        return slot

    def _grow(self, slot: _Slot, capacity: int) -> None:
        self._free_memory(slot)
        slot.device = int(self._runtime.malloc(capacity))
        slot.host = int(self._runtime.hostAlloc(capacity, 0))
        slot.capacity = capacity

    def _free_memory(self, slot: _Slot) -> None:
        slot.capacity = 0
        if slot.device:
            self._runtime.free(slot.device)
            slot.device = 0
        if slot.host:
            self._runtime.freeHost(slot.host)
            slot.host = 0

    def _release(self, slot: _Slot) -> None:
        self._free_memory(slot)
        self._runtime.eventDestroy(slot.event)

    def close(self) -> None:
        """Free everything; freeing waits for the device. The ring may be used again."""
        while self._slots:
            self._release(self._slots.pop())
