"""What the original imports and a CPU does not have; ``__init__.py`` lists each with its reason."""

from __future__ import annotations

import ctypes
import itertools
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch


class Clock:
    """Strictly ascending seconds; ``advance`` lets time pass."""

    def __init__(self) -> None:
        self._ticks = itertools.count(1)
        self._passed = 1_000.0

    def monotonic(self) -> float:
        return self._passed + next(self._ticks) * 1e-7

    def advance(self, seconds: float) -> None:
        self._passed += seconds


class Valve:
    """What every copy and every storage call passes before it acts.

    ``hold("backup")`` makes such calls wait until its block is left; ``fail`` makes them raise; a ``jitter`` seed
    delays each at random. Kinds: backup, load, set, get, exists.
    """

    HELD_S = 30.0

    def __init__(self, jitter: int | None = None) -> None:
        self._open = {kind: threading.Event() for kind in ("backup", "load", "set", "get", "exists")}
        for event in self._open.values():
            event.set()
        self._random = None if jitter is None else random.Random(jitter)
        self._failing: dict[str, Exception] = {}
        self.calls: dict[str, int] = dict.fromkeys(self._open, 0)
        """Calls that have begun, of each kind."""

    def shut(self, kind: str) -> None:
        self._open[kind].clear()

    def open(self, kind: str) -> None:
        self._open[kind].set()

    @contextmanager
    def hold(self, kind: str) -> Any:
        self.shut(kind)
        try:
            yield
        finally:
            self.open(kind)

    @contextmanager
    def fail(self, kind: str, error: Exception) -> Any:
        self._failing[kind] = error
        try:
            yield
        finally:
            del self._failing[kind]

    def passes(self, kind: str, until_s: float | None) -> bool:
        """As a call, for those who wait until then (of time.monotonic) only. Returns: whether they have passed."""
        opened = self._open[kind]
        if until_s is not None and not (opened.is_set() or opened.wait(max(0.0, until_s - time.monotonic()))):
            return False
        self(kind)
        return True

    def __call__(self, kind: str) -> None:
        self.calls[kind] += 1
        if not self._open[kind].wait(self.HELD_S):
            raise TimeoutError(f"a {kind} was held for {self.HELD_S} s")
        if self._random is not None:
            time.sleep(self._random.choice((0.0, 0.0, 0.0002, 0.002)))
        if kind in self._failing:
            raise self._failing[kind]


def module(name: str, **names: Any) -> ModuleType:
    """A module of these names."""
    made = ModuleType(name)
    made.__dict__.update(names)
    return made


# ---- torch -----------------------------------------------------------------------------------------------------------
class _Stream:
    def synchronize(self) -> None: ...


def torch_shim() -> ModuleType:
    """torch with a CUDA that has nothing to wait for, and no pinned memory."""

    class Torch(ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    def unpinned(make: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *sizes, pin_memory=False, **options: make(*sizes, **options)

    made = Torch("torch")
    made.empty, made.zeros = unpinned(torch.empty), unpinned(torch.zeros)  # type: ignore[attr-defined]
    stream = _Stream()
    made.cuda = SimpleNamespace(  # type: ignore[attr-defined]
        Stream=_Stream, current_stream=lambda: stream, set_stream=lambda stream: None, synchronize=lambda: None
    )
    return made


# ---- triton ----------------------------------------------------------------------------------------------------------
def _alloc_extend(prefix_lens: Any, seq_lens: Any, last_loc: Any, free_pages: Any, out: Any, returned: Any,
                  _upper: int, page_size: int, _most: int) -> None:  # fmt: skip
    """Slots of the tokens by which each request grows: the rest of its last page, then free pages in order."""
    taken = at = 0
    available = free_pages.tolist()
    for before, after, last in zip(prefix_lens.tolist(), seq_lens.tolist(), last_loc.tolist(), strict=True):
        pages_before, pages_after = -(-before // page_size), -(-after // page_size)
        rest = min(after, pages_before * page_size) - before
        slots = [last + 1 + i for i in range(rest)]
        for page in available[taken : taken + pages_after - pages_before]:
            slots += range(page * page_size, (page + 1) * page_size)
        slots = slots[: after - before]
        out[at : at + len(slots)] = torch.tensor(slots, dtype=out.dtype)
        at += after - before
        taken += pages_after - pages_before
    returned.fill_((taken << 32) | at)


def _alloc_decode(seq_lens: Any, last_loc: Any, free_pages: Any, out: Any, returned: Any, _upper: int,
                  page_size: int) -> None:  # fmt: skip
    """One slot a request: the next of its last page, or the first of a free page."""
    taken = 0
    available = free_pages.tolist()
    for index, (after, last) in enumerate(zip(seq_lens.tolist(), last_loc.tolist(), strict=True)):
        if (after - 1) % page_size:
            out[index] = last + 1
        else:
            out[index] = available[taken] * page_size if taken < len(available) else -1
            taken += 1
    returned.fill_(taken)


class _Kernel:
    """``kernel[grid](arguments)``."""

    KNOWN: ClassVar[dict[str, Callable[..., None]]] = {
        "alloc_extend_kernel": _alloc_extend,
        "alloc_decode_kernel": _alloc_decode,
    }

    def __init__(self, function: Callable[..., Any]) -> None:
        self._name = function.__name__

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        if self._name not in self.KNOWN:
            raise NotImplementedError(f"the shim has no Triton kernel {self._name}")
        return self.KNOWN[self._name]


def triton_shim() -> ModuleType:
    language = module("triton.language", constexpr=int)
    return module("triton", jit=_Kernel, cdiv=lambda a, b: -(-a // b), language=language)


# ---- sgl_kernel ------------------------------------------------------------------------------------------------------
def _rows(address: int, indices: np.ndarray, stride: int) -> np.ndarray:
    """uint8 [up to the largest index, stride] over memory."""
    count = int(indices.max(initial=-1) + 1) * stride
    return np.frombuffer((ctypes.c_uint8 * count).from_address(address), np.uint8).reshape(-1, stride)


def _copy(source: int, source_stride: int, at: Any, target: int, target_stride: int, to: Any, size: int) -> None:
    at, to = at.numpy(), to.numpy()
    if at.size:
        _rows(target, to, target_stride)[to, :size] = _rows(source, at, source_stride)[at, :size]


TRANSFERS = [f"transfer_kv_{name}" for name in (
    "all_layer", "all_layer_mla", "all_layer_lf_pf", "all_layer_mla_lf_pf", "per_layer", "per_layer_mla",
    "per_layer_pf_lf", "per_layer_mla_pf_lf", "direct",
)]  # fmt: skip


def kernel_shim(valve: Valve, copies: bool) -> ModuleType:
    """The transfer functions of sgl-kernel 0.3.2; without ``copies`` they return at once (benchmarks).

    ``item_size`` bytes a token, layer and half; indices are slots.

    lf: one buffer a layer, [slots, item]. pf: [slots, L, item], ``layout_dim`` = L * item bytes.
    """

    def all_layer(halves: Sequence[tuple[Any, Any]], src_indices: Any, dst_indices: Any, item: int) -> None:
        valve("backup")
        for src_layers, dst_layers in halves:
            for source, target in zip(src_layers.tolist(), dst_layers.tolist(), strict=True):
                _copy(source, item, src_indices, target, item, dst_indices, item)

    def all_layer_pf(
        halves: Sequence[tuple[Any, Any]], src_indices: Any, dst_indices: Any, item: int, dim: int
    ) -> None:
        valve("backup")
        for src_layers, dst in halves:
            for layer, source in enumerate(src_layers.tolist()):
                _copy(source, item, src_indices, dst.data_ptr() + layer * item, dim, dst_indices, item)

    def per_layer(
        halves: Sequence[tuple[Any, Any]], src_indices: Any, dst_indices: Any, item: int, stride: int
    ) -> None:
        valve("load")
        for src, dst in halves:  # a page_first source is given whole and without a layer: its layer 0 is read
            _copy(src.data_ptr(), stride, src_indices, dst.data_ptr(), item, dst_indices, item)

    def direct(*, src_layers: Any, dst_layers: Any, src_indices: Any, dst_indices: Any, page_size: int) -> None:
        valve("load" if len(src_layers) <= 2 else "backup")
        for source, target in zip(src_layers, dst_layers, strict=True):
            target[dst_indices] = source[src_indices]

    if not copies:
        return module("sgl_kernel.kvcacheio", **dict.fromkeys(TRANSFERS, lambda **arguments: None))
    return module(
        "sgl_kernel.kvcacheio",
        transfer_kv_all_layer=lambda *, src_k_layers, dst_k_layers, src_v_layers, dst_v_layers, src_indices,
        dst_indices, item_size, num_layers: all_layer(
            [(src_k_layers, dst_k_layers), (src_v_layers, dst_v_layers)], src_indices, dst_indices, item_size),
        transfer_kv_all_layer_mla=lambda *, src_layers, dst_layers, src_indices, dst_indices, item_size, num_layers:
        all_layer([(src_layers, dst_layers)], src_indices, dst_indices, item_size),
        transfer_kv_all_layer_lf_pf=lambda *, src_k_layers, dst_k, src_v_layers, dst_v, src_indices, dst_indices,
        item_size, dst_layout_dim, num_layers: all_layer_pf(
            [(src_k_layers, dst_k), (src_v_layers, dst_v)], src_indices, dst_indices, item_size, dst_layout_dim),
        transfer_kv_all_layer_mla_lf_pf=lambda *, src_layers, dst, src_indices, dst_indices, item_size,
        dst_layout_dim, num_layers: all_layer_pf(
            [(src_layers, dst)], src_indices, dst_indices, item_size, dst_layout_dim),
        transfer_kv_per_layer=lambda *, src_k, dst_k, src_v, dst_v, src_indices, dst_indices, item_size: per_layer(
            [(src_k, dst_k), (src_v, dst_v)], src_indices, dst_indices, item_size, item_size),
        transfer_kv_per_layer_mla=lambda *, src, dst, src_indices, dst_indices, item_size: per_layer(
            [(src, dst)], src_indices, dst_indices, item_size, item_size),
        transfer_kv_per_layer_pf_lf=lambda *, src_k, dst_k, src_v, dst_v, src_indices, dst_indices, item_size,
        src_layout_dim: per_layer(
            [(src_k, dst_k), (src_v, dst_v)], src_indices, dst_indices, item_size, src_layout_dim),
        transfer_kv_per_layer_mla_pf_lf=lambda *, src, dst, src_indices, dst_indices, item_size, src_layout_dim:
        per_layer([(src, dst)], src_indices, dst_indices, item_size, src_layout_dim),
        transfer_kv_direct=direct,
    )  # fmt: skip


# ---- the rest --------------------------------------------------------------------------------------------------------
class BlockStored(NamedTuple):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None


class BlockRemoved(NamedTuple):
    block_hashes: list[int]


class AllBlocksCleared(NamedTuple):
    pass


def waiting_shims(poll_s: float | None) -> dict[str, ModuleType]:
    """queue and threading, timed waits no longer than ``poll_s``."""

    def at_most(timeout: float | None) -> float | None:
        return timeout if poll_s is None or timeout is None else min(timeout, poll_s)

    class Tracked:
        """A queue that knows which threads have taken an item and not yet come back for the next."""

        def __init__(self, maxsize: int = 0) -> None:
            super().__init__(maxsize)  # type: ignore[call-arg]
            self.busy: set[int] = set()

        def get(self, block: bool = True, timeout: float | None = None) -> Any:
            self.busy.discard(threading.get_ident())
            return super().get(block, at_most(timeout))  # type: ignore[misc]

        def _get(self) -> Any:
            self.busy.add(threading.get_ident())
            return super()._get()  # type: ignore[misc]

        def idle(self) -> bool:
            return self.empty() and not self.busy  # type: ignore[attr-defined]

    class Queue(Tracked, queue.Queue):  # type: ignore[type-arg]
        pass

    class PriorityQueue(Tracked, queue.PriorityQueue):  # type: ignore[type-arg]
        pass

    class Event(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            return super().wait(at_most(timeout))

    names = {name: getattr(threading, name) for name in ("Condition", "Lock", "RLock", "Thread")}
    return {
        "queue": module("queue", Queue=Queue, PriorityQueue=PriorityQueue, Empty=queue.Empty, Full=queue.Full),
        "threading": module("threading", Event=Event, **names),
    }


def shims(valve: Valve, clock: Clock, poll_s: float | None, copies: bool = True) -> dict[str, ModuleType]:
    """Every shim by the name under which the original imports it."""
    memory = SimpleNamespace(available=64 * 1024**3)
    return {
        "torch": torch_shim(),
        "triton": (triton := triton_shim()),
        "triton.language": triton.language,
        "sgl_kernel": module("sgl_kernel"),
        "sgl_kernel.kvcacheio": kernel_shim(valve, copies),
        "psutil": module("psutil", virtual_memory=lambda: memory),
        "time": module("time", monotonic=clock.monotonic, sleep=time.sleep),
        "sglang.srt.utils": module(
            "sglang.srt.utils",
            is_cuda=lambda: False,
            is_npu=lambda: False,
            get_bool_env_var=lambda name, default="false": os.getenv(name, default).lower() in ("true", "1"),
            next_power_of_2=lambda n: 1 << (n - 1).bit_length() if n > 0 else 1,
        ),
        "sglang.srt.distributed": module(
            "sglang.srt.distributed",
            get_tensor_model_parallel_rank=lambda: 0,
            get_tensor_model_parallel_world_size=lambda: 1,
        ),
        "sglang.srt.disaggregation.kv_events": module(
            "kv_events", BlockStored=BlockStored, BlockRemoved=BlockRemoved, AllBlocksCleared=AllBlocksCleared
        ),
        "sglang.srt.layers.radix_attention": module("radix_attention", RadixAttention=type("RadixAttention", (), {})),
        **waiting_shims(poll_s),
    }
