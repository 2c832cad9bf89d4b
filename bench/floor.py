"""memcmp and memcpy of exactly the bytes that a tree must touch, through floor.c (compiled when first needed)."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .workloads import Layout, Workload

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "bench"


@cache
def library() -> ctypes.CDLL:
    """Compile floor.c with the machine's C compiler ($CC, else cc) and load it. Raises: OSError, CalledProcessError."""
    source, target = Path(__file__).with_name("floor.c"), BUILD / "libfloor.so"
    if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        command = [os.environ.get("CC", "cc"), "-O2", "-std=gnu11", "-shared", "-fPIC", "-o", str(partial), str(source)]
        subprocess.run(command, check=True)
        partial.replace(target)
    lib = ctypes.CDLL(str(target))
    lib.floor_run.restype = ctypes.c_int64
    for function in (lib.floor_memcmp_ns, lib.floor_memcpy_ns):
        function.restype = ctypes.c_double
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 4
    return lib


class Primitives(NamedTuple):
    """ns for one call on ``num_bytes``: hot = the same two buffers again, cold = walking 256 MiB of each."""

    num_bytes: int
    memcmp_hot_ns: float
    memcmp_cold_ns: float
    memcpy_hot_ns: float
    memcpy_cold_ns: float


def primitives(num_bytes: int, cold_bytes: int = 256 << 20) -> Primitives:
    """Time memcmp (of equal contents) and memcpy, hot and cold; each the best of 5 (the machine is shared)."""
    lib = library()
    count = max(1, cold_bytes // num_bytes)
    a = np.ones(count * num_bytes, np.uint8)
    b = np.ones(count * num_bytes, np.uint8)
    results = []
    for function in (lib.floor_memcmp_ns, lib.floor_memcpy_ns):
        for places in (1, count):
            repeats = max(1, 20_000_000 // (num_bytes * places)) if places == 1 else 1
            args = (a.ctypes.data, b.ctypes.data, num_bytes, num_bytes, places, repeats)
            function(*args)
            results.append(min(function(*args) for _ in range(5)))
    return Primitives(num_bytes, *results)


class FloorRun(NamedTuple):
    """ns for each request."""

    match_ns: npt.NDArray[np.int64]
    insert_ns: npt.NDArray[np.int64]


MEMORY = {
    "floor": "fresh memory",
    "floor-huge": "fresh memory, huge pages asked for",
    "floor-touched": "memory written before",
}
"""Kinds of arena. Touched is below what an honest tree can do: page faults are part of storing new tokens."""


def _arena(num_values: int, kind: str) -> npt.NDArray[np.int32]:
    """An int32 arena in a mapping of its own: numpy would ask for huge pages by itself."""
    mapping = mmap.mmap(-1, max(1, num_values) * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if kind == "floor-huge":
        mapping.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(mapping, np.int32)
    if kind == "floor-touched":
        array.fill(-1)
    return array


def run(workload: Workload, layout: Layout, kind: str) -> FloorRun:
    """Replay an unbounded workload as memcmp and memcpy.

    Args:
        layout: which pages of which request are where (``workloads.layout``).
        kind: the arena's memory, one of ``MEMORY``.
    """
    n, page_size = len(workload.tokens), workload.page_size
    arena, arena_ids = _arena(layout.num_pages * page_size, kind), _arena(layout.num_pages, kind)
    num_pages = np.array([len(t) // page_size for t in workload.tokens], np.int64)
    pointers = (ctypes.c_void_p * n)(*(t.ctypes.data for t in workload.tokens))
    ids = np.arange(int(num_pages.max()), dtype=np.int32)
    out = FloorRun(np.zeros(n, np.int64), np.zeros(n, np.int64))
    arrays = (
        num_pages,
        layout.first_segment,
        layout.segment_start,
        layout.segment_pages,
        layout.tail_start,
        arena,
        arena_ids,
        ids,
        np.zeros_like(ids),
        *out,
    )
    differing = library().floor_run(
        ctypes.c_int64(n), ctypes.c_int64(page_size), pointers, *(ctypes.c_void_p(a.ctypes.data) for a in arrays)
    )
    if differing:
        raise RuntimeError(f"floor: {differing} segments differ from what was stored; the layout is wrong")
    return out
