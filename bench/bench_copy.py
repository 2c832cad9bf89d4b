"""The CPU path beside memcpy, by contiguous run: each pair of layouts that has runs of that length.

``python -m bench.bench_copy [--quick] [--rounds 15] [--threads 1,2] [--json FILE]``. The machine may be shared: each
copy runs between two memcpys of the same bytes by the same number of threads in blocks of all bytes / threads, and the
figure is the median over rounds of copy / mean of both, in bytes a second.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from radixkv.pool.layout import LAYOUTS, KVGeometry, Layout, view_of_layout
from radixkv.transfer import cpu
from radixkv.transfer.loops import loops_of

from . import report

SEED = 7
POOL_BYTES = 512 << 20
"""Of each side: far beyond the last-level cache. Each copy moves a random quarter of its pages."""
HUGE_PAGE = 2 << 20
SHIFT = 1 << 10
"""Of memcpy's destination: with both sides at one place in their 4 KiB pages it ran a third slower."""

CALL_PAGES = 16
CALL_US = 5.0
"""What a prepared call may take beside its copy: a controller has 50 us for all of a backup or load."""

# Contiguous run, and the share of memcpy's speed to reach with it.
TARGETS = {"64 KiB": 0.8, "1 MiB": 0.8, "16 KiB": 0.7, "1 KiB": 0.6, "128 B": 0.4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kind of copy. Its pages are scattered at random on both sides."""

    run: str
    what: str
    src: Layout
    dst: Layout
    kind: str = "mla"
    layers: int
    heads: int = 1
    head_bytes: int
    page_size: int


FLAT: dict[str, Any] = {"src": "layer_first", "dst": "layer_first"}


def _pair(run: str, layout: Layout, **shape: Any) -> tuple[Case, Case]:
    """Backup to a host layout and load back from it."""
    return (
        Case(run=run, what=f"backup to {layout}", src="layer_first", dst=layout, **shape),
        Case(run=run, what=f"load back from {layout}", src=layout, dst="layer_first", **shape),
    )


CASES = (
    Case(run="1 MiB", what="pages of one layer", **FLAT, layers=1, head_bytes=65536, page_size=16),
    Case(run="64 KiB", what="pages of 4 layers", **FLAT, layers=4, head_bytes=4096, page_size=16),
    *_pair("64 KiB", "page_first_direct", layers=16, head_bytes=1024, page_size=64),
    *_pair("16 KiB", "page_first_direct", layers=32, head_bytes=1024, page_size=16),
    *_pair("4 KiB", "page_first", layers=32, head_bytes=4096, page_size=16),
    *_pair("1 KiB", "page_first", layers=32, head_bytes=1024, page_size=16),
    Case(run="1 KiB", what="single tokens", **FLAT, layers=4, head_bytes=1024, page_size=1),
    *_pair("128 B", "page_head", kind="mha", layers=32, heads=8, head_bytes=128, page_size=16),
    *_pair("128 B", "page_first", layers=32, head_bytes=128, page_size=16),
    Case(run="128 B", what="single tokens", **FLAT, layers=4, head_bytes=128, page_size=1),
    *_pair("64 B", "page_first", layers=32, head_bytes=64, page_size=16),
    *_pair("32 B", "page_first", layers=32, head_bytes=32, page_size=16),
    *_pair("16 B", "page_first", layers=32, head_bytes=16, page_size=16),
    *_pair("8 B", "page_first", layers=32, head_bytes=8, page_size=16),
)


def arena(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Memory on a huge-page boundary (a pool's arena is laid out like this)."""
    storage = np.empty(num_bytes + HUGE_PAGE, np.uint8)
    start = -storage.ctypes.data % HUGE_PAGE
    block = storage[start : start + num_bytes]
    block[:] = 1  # touched
    return block


class Memcpy:
    """libc's memcpy by ``threads`` threads, each one block of the whole."""

    def __init__(self, src: npt.NDArray[np.uint8], dst: npt.NDArray[np.uint8], threads: int) -> None:
        self.src, self.dst, self.threads = src.ctypes.data, dst.ctypes.data + SHIFT, threads
        self.memcpy = ctypes.CDLL(None).memcpy  # a CDLL's functions run without the GIL
        self.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        self.memcpy.restype = ctypes.c_void_p
        self.others = ThreadPoolExecutor(max(1, threads - 1))

    def __call__(self, num_bytes: int) -> None:
        step = num_bytes // self.threads
        parts = [self.others.submit(self.memcpy, self.dst + i * step, self.src + i * step, step)
                 for i in range(1, self.threads)]  # fmt: skip
        self.memcpy(self.dst, self.src, step)
        for part in parts:
            part.result()


def prepare(case: Case, src: Any, dst: Any, threads: int, share: int) -> tuple[Callable[[], None], int]:
    """The copy of a case, ready to run, and its bytes."""
    g = KVGeometry(kind=case.kind, num_layers=case.layers, num_heads=case.heads, head_bytes=case.head_bytes,
                   page_size=case.page_size)  # type: ignore[arg-type]  # fmt: skip
    num_pages = len(src) // g.page_bytes
    half = num_pages * g.page_bytes // g.halves
    views = [view_of_layout(layout, g, num_pages * g.page_size, [a.ctypes.data + i * half for i in range(g.halves)])
             for layout, a in ((case.src, src), (case.dst, dst))]  # fmt: skip
    rng = np.random.default_rng(SEED)
    count = num_pages // share
    ids = [rng.permutation(num_pages)[:count] for _ in range(2)]
    transfer = cpu.CpuTransfer(g, num_threads=threads)
    plan = transfer.plan(views[0], views[1], ids[0], ids[1])
    return lambda: transfer.copy(plan), plan.total_bytes


def seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure_case(case: Case, src: Any, dst: Any, memcpy: Memcpy, rounds: int, share: int) -> dict[str, Any]:
    """Alternate memcpy and the copy. Returns: medians, GB/s (1e9) and the ratio of neighbours."""
    copy, num_bytes = prepare(case, src, dst, memcpy.threads, share)
    copy()
    before = seconds(lambda: memcpy(num_bytes))
    ratios, ours, theirs = [], [], [before]
    for _ in range(rounds):
        taken = seconds(copy)
        after = seconds(lambda: memcpy(num_bytes))
        ratios.append((before + after) / 2 / taken)
        ours.append(taken)
        theirs.append(after)
        before = after
    return {
        "run": case.run,
        "what": case.what,
        "threads": memcpy.threads,
        "bytes": num_bytes,
        "ratio": statistics.median(ratios),
        "ratio_of_best": min(theirs) / min(ours),
        "gb_s": num_bytes / statistics.median(ours) / 1e9,
        "memcpy_gb_s": num_bytes / statistics.median(theirs) / 1e9,
    }


def least_us(function: Callable[[], None], repeats: int = 500) -> float:
    """The least of many: a few microseconds, which whoever shares the machine only adds to."""
    return min(seconds(function) for _ in range(repeats)) * 1e6


def measure_call(kind: str, layout: Layout, back: bool) -> dict[str, Any]:
    """What one call for CALL_PAGES pages of 32 layers costs beside the copy itself, in the cache, on one thread.

    The copy itself is the same nest of loops, made before, less what such a call takes with nothing to do.
    """
    g = KVGeometry(kind=kind, num_layers=32, num_heads=2 if kind == "mha" else 1, head_bytes=16,
                   page_size=16)  # type: ignore[arg-type]  # fmt: skip
    num_pages = 4 * CALL_PAGES
    half = num_pages * g.page_bytes // g.halves
    pools = [np.ones(num_pages * g.page_bytes, np.uint8) for _ in range(2)]
    views = [view_of_layout(name, g, num_pages * g.page_size, [pool.ctypes.data + i * half for i in range(g.halves)])
             for name, pool in (("layer_first", pools[0]), (layout, pools[1]))]  # fmt: skip
    src, dst = views[::-1] if back else views
    rng = np.random.default_rng(SEED)
    ids = [rng.permutation(num_pages)[:CALL_PAGES] for _ in range(2)]
    transfer = cpu.CpuTransfer(g, num_threads=1)
    route = transfer.route(src, dst)

    def loops_only(ids: list[Any], followed: bool) -> float:
        loops = loops_of(transfer.plan(src, dst, *ids), outer_layers=followed)
        return least_us(lambda: cpu.run_loops(loops, g.num_layers, 1, "auto"))

    nothing = [ids[0][:0], ids[1][:0]]
    copy, followed = (loops_only(ids, by_layer) - loops_only(nothing, by_layer) for by_layer in (False, True))
    return {
        "what": f"{kind}, {'load back from' if back else 'backup to'} {layout}",
        "copy_us": copy,
        "plan_us": least_us(lambda: transfer.backup(src, dst, *ids)) - copy,
        "route_us": least_us(lambda: route.copy(*ids)) - copy,
        "followed_route_us": least_us(lambda: route.copy(*ids, cpu.Progress(g.num_layers))) - followed,
    }


def shortfall(row: dict[str, Any]) -> report.Check:
    """report's checks are upper limits: memcpy's time over ours, as how many times as long a copy takes."""
    what = f"copy {row['run']}, {row['what']}, {row['threads']} threads: time / memcpy's"
    return report.Check(what, 1 / row["ratio"], 1 / TARGETS[row["run"]], "x")


def main() -> None:
    """Command line. See report.conclude for the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small pools, 3 rounds: shows that everything runs")
    parser.add_argument("--rounds", type=int, help="alternating rounds (15; 3 with --quick)")
    parser.add_argument("--threads", help="comma-separated (1 and all cores of this process)")
    parser.add_argument("--only", default="", help="cases whose run or name contains this, or: calls")
    parser.add_argument("--json", type=Path, default=report.DEFAULT_FOLDER / "copy.json", help="where the result goes")
    report.add_check_option(parser)
    options = parser.parse_args()
    rounds = options.rounds or (3 if options.quick else 15)
    cores = len(os.sched_getaffinity(0))
    threads = [int(n) for n in options.threads.split(",")] if options.threads else sorted({1, cores})
    pool_bytes = POOL_BYTES // (8 if options.quick else 1)
    src, dst = arena(pool_bytes), arena(pool_bytes)
    rows = []
    for count in threads:
        memcpy = Memcpy(src, dst, count)
        for case in CASES:
            if options.only in f"{case.run}, {case.what}":
                print(f"{count} threads: {case.run}, {case.what}", file=sys.stderr)
                rows.append(measure_case(case, src, dst, memcpy, rounds, share=4))
    calls = [measure_call(kind, layout, back) for kind in ("mha", "mla") for layout in LAYOUTS
             for back in (False, True)] if "calls".startswith(options.only) else []  # fmt: skip
    checks = [shortfall(row) for row in rows if row["run"] in TARGETS]
    checks += [report.Check(f"call beside the copy, {call['what']}", call["route_us"], CALL_US, "us") for call in calls]
    result = report.header(seed=SEED, rounds=rounds, quick=options.quick, pool_bytes=pool_bytes, lanes=cpu.lanes())
    result |= {"copies": rows, "calls": calls, "checks": report.checks_as_dicts(checks)}
    report.write_json(result, options.json)
    report.table(
        f"Copies on the CPU, {cpu.lanes()}, beside memcpy",
        ("run, copy", "threads", "GB/s", "memcpy GB/s", "ratio", "of best", "aim"),
        [(f"{r['run']}, {r['what']}", str(r["threads"]), report.number(r["gb_s"]), report.number(r["memcpy_gb_s"]),
          report.number(r["ratio"]), report.number(r["ratio_of_best"]), report.number(TARGETS.get(r["run"])))
         for r in rows],
    )  # fmt: skip
    report.table(
        f"A call for {CALL_PAGES} pages of 32 layers beside its copy, us",
        ("call", "copy", "plan_copy", "route", "route, followed"),
        [(c["what"], *(report.number(c[f"{name}_us"]) for name in ("copy", "plan", "route", "followed_route")))
         for c in calls],
    )  # fmt: skip
    report.conclude(checks, options.check)


if __name__ == "__main__":
    main()
