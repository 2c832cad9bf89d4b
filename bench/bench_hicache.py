"""HiRadixCache beside the original it stands in for (SGLang's, 0.5.0rc0): bookkeeping time of a multi-turn workload.

``python -m bench.bench_hicache [--quick] [--rounds 3] [--sides original,radixkv] [--json FILE]``. Users take turns;
each turn's prompt is the whole chat so far plus new tokens, and the device pool holds a part of all chats, so prefixes
are evicted to the host and loaded back. Both sides get the same Python lists, in one process, in alternation. Only
calls of the cache are timed; of these, calls into the device allocator (the engine's) are taken off, and transfers move
nothing and are waited for outside of the timed part. The original runs under the shims of tests/hicache/original.

Of several rounds each call counts with its median, as all rounds make the same calls. ``--clock cpu`` takes the CPU
time of the calling thread, without waits for the threads that copy (a write-back waits for them inside of evict and
load_back); reading that clock takes longer than the wall's, which weighs on small calls.

One request: match_prefix (with its indices), inc_lock_ref, init_load_back + ready_to_load_host_cache if there is a host
hit, evict if there is no room, insert, dec_lock_ref, check_hicache_events. At the end, with copies in flight, one
reset: milliseconds of the wall, as what it may wait for are threads (the original waits for its own to end, which look
once a second, here too).
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import measure, report
from .peers.base import single_threaded_torch

SEED = 11
PAGE_SIZE = 16
OPERATIONS = ("match", "load_back", "evict", "insert", "lock", "unlock", "events")
GATED = ("match", "load_back", "evict", "insert")
CLOCKS = {"wall": time.perf_counter_ns, "cpu": time.thread_time_ns}
LIMIT = 0.2
"""Our time's share of the original's."""
RESET_MS = 10.0
"""Of our reset."""


class Workload(NamedTuple):
    """users x turns; device_tokens hold a part of users * (shared + turns * turn_tokens)."""

    users: int
    turns: int
    shared_tokens: int
    turn_tokens: int
    device_tokens: int
    host_ratio: float
    write_policy: str

    def describe(self) -> str:
        return (
            f"{self.users} users x {self.turns} turns of {self.turn_tokens} tokens after {self.shared_tokens} shared, "
            f"device {self.device_tokens:,}, host {self.host_ratio} x, {self.write_policy}, page {PAGE_SIZE}"
        )


FULL = [Workload(200, 8, 1024, 256, 163_840, 3.0, policy) for policy in ("write_through", "write_back")]
QUICK = [Workload(24, 4, 256, 128, 8_192, 3.0, "write_through")]


def prompts(workload: Workload) -> list[list[int]]:
    """One list a request, round-robin over the users."""
    rng = np.random.default_rng(SEED)
    shared = rng.integers(0, 128_000, workload.shared_tokens).tolist()
    total = workload.turns * workload.turn_tokens
    chats = [shared + rng.integers(0, 128_000, total).tolist() for _ in range(workload.users)]
    ends = [workload.shared_tokens + (turn + 1) * workload.turn_tokens for turn in range(workload.turns)]
    return [chat[:end] for end in ends for chat in chats]


class Stopwatch:
    """Times calls of the cache, without what they spend in the allocator."""

    ALLOCATOR = (
        "alloc",
        "free",
        "alloc_extend",
        "alloc_decode",
        "available_size",
        "free_group_begin",
        "free_group_end",
    )

    def __init__(self, allocator: Any, clock: Callable[[], int]) -> None:
        self.times: dict[str, list[int]] = defaultdict(list)
        self._clock = clock
        self._inside = 0
        for name in self.ALLOCATOR:
            setattr(allocator, name, self._taken_off(getattr(allocator, name)))

    def _taken_off(self, method: Any) -> Any:
        clock = self._clock

        def timed(*arguments: Any) -> Any:
            start = clock()
            try:
                return method(*arguments)
            finally:
                self._inside += clock() - start

        return timed

    def __call__(self, operation: str, function: Any, *arguments: Any) -> Any:
        """Call and remember how long it took, in ns."""
        clock = self._clock
        self._inside = 0
        start = clock()
        result = function(*arguments)
        self.times[operation].append(clock() - start - self._inside)
        return result


def replay(side: Any, requests: Sequence[list[int]], clock: Callable[[], int] = time.perf_counter_ns) -> dict[str, Any]:
    """Run the workload through a fresh cache. Returns: ns by operation, and what was found where."""
    torch = single_threaded_torch()
    cache, allocator = side.cache, side.allocator
    watch = Stopwatch(allocator, clock)
    found = {"device": 0, "host": 0, "loaded": 0}
    gc.collect()
    gc.disable()
    try:
        for tokens in requests:
            key = tokens[: len(tokens) // PAGE_SIZE * PAGE_SIZE]
            match = watch("match", cache.match_prefix, key)
            node, prefix = match.last_device_node, match.device_indices
            found["device"] += len(prefix)
            found["host"] += match.host_hit_length
            if match.host_hit_length:
                loaded, node = watch(
                    "load_back", lambda match=match: load(cache, match.last_host_node, match.host_hit_length)
                )
                side.settle(flush=False)
                prefix = torch.cat([prefix, loaded])
                found["loaded"] += len(loaded)
            watch("lock", cache.inc_lock_ref, node)
            new = len(key) - len(prefix)
            if allocator.available_size() < new:
                watch("evict", cache.evict, new)
            slots = allocator.alloc(new)
            if slots is None:
                raise RuntimeError(
                    f"{side.name}: {new} tokens wanted, {allocator.available_size()} free after eviction"
                )
            row = torch.cat([prefix, slots])
            present = watch("insert", cache.insert, key, row)
            allocator.free(row[len(prefix) : present])
            side.settle(flush=False)
            watch("unlock", cache.dec_lock_ref, node)
            watch("events", cache.check_hicache_events)
    finally:
        gc.enable()
    times = {name: np.array(watch.times[name], np.int64) for name in OPERATIONS}
    return {"times": times, "found": found, "reset_ms": time_reset(cache)}


def time_reset(cache: Any) -> float:
    """Milliseconds of the wall."""
    start = time.perf_counter_ns()
    cache.reset()
    return (time.perf_counter_ns() - start) / 1e6


def load(cache: Any, node: Any, hit: int) -> Any:
    """Queue a load and start it."""
    loaded = cache.init_load_back(node, hit)
    cache.ready_to_load_host_cache()
    return loaded


def make(name: str, workload: Workload) -> Any:
    """A fresh side."""
    from tests.hicache import sides

    setup = sides.Setup(
        page_size=PAGE_SIZE, write_policy=workload.write_policy, device_tokens=workload.device_tokens,
        host_ratio=workload.host_ratio, requests=1,
    )  # fmt: skip
    if name == "original":
        return sides.make_original(setup, copies=False, poll_s=None)
    return sides.make_ours(setup, copies=False)


def present(names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Those sides that can be had, and why others can't."""
    from tests.hicache.original.install import OriginalAbsent, installed

    absent = {}
    if "original" in names:
        try:
            installed()
        except OriginalAbsent as error:
            absent["original"] = str(error)
    return [name for name in names if name not in absent], absent


def compare(workload: Workload, names: Sequence[str], rounds: int, clock: Callable[[], int]) -> dict[str, Any]:
    """All sides, ``rounds`` times in rotating order. Returns: times by side, and ratios."""
    requests = prompts(workload)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in [*names[turn % len(names) :], *names[: turn % len(names)]]:
            print(f"{workload.write_policy}, round {turn + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            with make(name, workload) as side:
                runs[name].append(replay(side, requests, clock))
    hits = {name: [run["found"] for run in runs[name]] for name in names}
    distinct = {tuple(sorted(found.items())) for each in hits.values() for found in each}
    times = {name: settled_times(runs[name]) for name in names}
    return {
        "notes": workload.describe(),
        "found": hits,
        "same_hits": len(distinct) == 1,
        "sides": {
            name: summary(times[name]) | {"reset_ms": float(np.median([run["reset_ms"] for run in runs[name]]))}
            for name in names
        },
        "ratios": ratios(times["radixkv"], times["original"]) if len(names) == 2 else {},
    }


def settled_times(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Operation -> ns of each call: the median over the rounds, call by call, as all rounds make the same calls.

    A call that was interrupted in one round does not count then; what is slow every time does.
    """
    return {name: np.median([run["times"][name] for run in runs], axis=0) for name in OPERATIONS}


def summary(times: dict[str, Any]) -> dict[str, Any]:
    """Operation -> p50, p99, mean (us) and calls, None if there were none; "total_ms"."""
    out: dict[str, Any] = {
        name: measure.percentiles(times[name])._asdict() if len(times[name]) else None for name in OPERATIONS
    }
    out["total_ms"] = sum(float(times[name].sum()) for name in OPERATIONS) / 1e6
    return out


def ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float | None]:
    """Our summed time over the original's, of each operation and of all."""

    def share(names: Sequence[str]) -> float | None:
        beside = sum(float(theirs[name].sum()) for name in names)
        return sum(float(ours[name].sum()) for name in names) / beside if beside else None

    return {**{name: share([name]) for name in OPERATIONS}, "whole workload": share(OPERATIONS)}


def checks(result: dict[str, Any]) -> list[report.Check]:
    """Every gated ratio beside its limit."""
    found = []
    for name, workload in result["workloads"].items():
        for operation in (*GATED, "whole workload"):
            ratio = workload["ratios"].get(operation)
            note = "" if workload["same_hits"] else "the sides found different prefixes"
            found.append(report.Check(f"hicache {name}: {operation}", ratio, LIMIT, "x the original", note))
        for side, times in workload["sides"].items():
            limit = RESET_MS if side == "radixkv" else None
            found.append(report.Check(f"hicache {name}: reset, {side}", times["reset_ms"], limit, "ms"))
    return found


def print_result(result: dict[str, Any]) -> None:
    """Tables: a row a side, us a call."""
    for name, workload in result["workloads"].items():
        rows = []
        for side, times in workload["sides"].items():
            row = [side, report.number(times["total_ms"], 1)]
            for operation in OPERATIONS:
                one = times[operation]
                row.append("-" if one is None else f"{one['p50_us']:.1f} / {one['p99_us']:.0f}")
            rows.append(row)
        report.table(f"{name}: {workload['notes']}", ("", "total ms", *(f"{o} p50/p99 us" for o in OPERATIONS)), rows)
        print("found:", {side: found[0] for side, found in workload["found"].items()})


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line; returns the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small and once: does it run, not how fast")
    parser.add_argument("--rounds", type=int, help="alternating rounds (3; 1 with --quick)")
    parser.add_argument("--sides", default="original,radixkv", help="comma-separated")
    parser.add_argument(
        "--json", type=Path, default=report.DEFAULT_FOLDER / "hicache.json", help="where the result goes"
    )
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="of the calling thread, or of the wall")
    report.add_check_option(parser)
    options = parser.parse_args(arguments)
    rounds = options.rounds or (1 if options.quick else 3)
    names, absent = present(options.sides.split(","))
    for name, reason in absent.items():
        print(f"absent: {name}: {reason}", file=sys.stderr, flush=True)
    result = report.header(seed=SEED, rounds=rounds, quick=options.quick, clock=options.clock, absent=absent)
    result["workloads"] = {
        w.write_policy: compare(w, names, rounds, CLOCKS[options.clock]) for w in (QUICK if options.quick else FULL)
    }
    result["checks"] = report.checks_as_dicts(checks(result))
    report.write_json(result, options.json)
    print_result(result)
    report.conclude(checks(result), options.check)
    return result


if __name__ == "__main__":
    main()
