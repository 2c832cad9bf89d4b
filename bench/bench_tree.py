"""The tree beside its peers and beside memcmp and memcpy: whole runs, single calls, eviction, memory.

``python -m bench.bench_tree [--quick] [--rounds 3] [--peers radixkv,sglang-rust] [--only replay,calls,evict] [--json
FILE]``.
The machine may be shared: implementations alternate, and the figures to read are ratios within a round. Whole runs
and memory come from fresh processes (tree_worker.py); single calls run in this one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import floor, measure, peers, report, workloads
from .peers.base import TreePeer

SEED = 5
OURS, RIVAL = "radixkv", "sglang-rust"
RUN_TARGETS = {"trace": 0.25, "growing": 0.15}
"""Our whole run's share of the Rust core's."""


# ---- whole runs and memory -------------------------------------------------------------------------------------------
def run_worker(job: dict[str, Any]) -> dict[str, Any]:
    """Run tree_worker.py once. Raises: RuntimeError with its stderr."""
    command = [sys.executable, "-m", "bench.tree_worker", json.dumps(job)]
    done = subprocess.run(command, cwd=report.ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{job['peer']} on {job.get('workload')}: {done.stderr.strip()[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def replays(names: Sequence[str], rounds: int, quick: bool) -> dict[str, Any]:
    """Every workload through every implementation, ``rounds`` times in rotating order.

    Returns: workload -> implementation -> medians of tree_worker's fields, with ``runs``; a workload that is absent,
    or a run that failed, -> {"absent": reason}.
    """
    results: dict[str, Any] = {}
    for workload in workloads.NAMES:
        try:
            size = workloads.build(workload, quick)
        except workloads.WorkloadAbsent as absent:
            results[workload] = {"absent": str(absent)}
            continue
        bounded = size.capacity_pages is not None
        runners = [n for n in names if n != "dynamo"] if bounded else [*names, *floor.MEMORY]
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in runners}
        failed: dict[str, str] = {}
        for turn in range(rounds):
            for name in runners[turn % len(runners) :] + runners[: turn % len(runners)]:
                if name in failed:
                    continue
                say(f"{workload}, round {turn + 1} of {rounds}: {name}")
                try:
                    runs[name].append(run_worker({"peer": name, "workload": workload, "quick": quick}))
                except RuntimeError as error:
                    failed[name] = str(error)
        results[workload] = {"notes": size.notes}
        for name in runners:
            results[workload][name] = (
                {"absent": failed[name]} if name in failed else {**medians(runs[name]), "runs": runs[name]}
            )
        if bounded and "dynamo" in names:
            results[workload]["dynamo"] = {"absent": "Dynamo's RadixTree evicts nothing by itself"}
    return results


def medians(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of every number in dicts of one shape, nested ones too; other values from the first."""
    out: dict[str, Any] = {}
    for name, value in runs[0].items():
        if isinstance(value, dict):
            out[name] = medians([run[name] for run in runs])
        elif isinstance(value, (int, float)):
            out[name] = statistics.median(run[name] for run in runs)
        else:
            out[name] = value
    return out


def paired_ratio(results: dict[str, Any], workload: str, name: str, beside: str) -> float | None:
    """Median over rounds of name's total time / beside's in the same round; None if one is missing."""
    both = [results.get(workload, {}).get(which, {}).get("runs") for which in (name, beside)]
    if not all(both):
        return None
    return statistics.median(float(a["total_s"] / b["total_s"]) for a, b in zip(*both, strict=True))


def best_ratio(results: dict[str, Any], workload: str, name: str, beside: str) -> float | None:
    """name's shortest total time / beside's shortest: the ratio where neither was disturbed; None if one is missing."""
    both = [results.get(workload, {}).get(which, {}).get("runs") for which in (name, beside)]
    if not all(both):
        return None
    ours, theirs = (min(float(run["total_s"]) for run in runs) for runs in both)
    return ours / theirs


def churn_memory(quick: bool) -> dict[str, Any]:
    """Memory of radixkv's tree after churn, and of a fresh tree with the same content, both in fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        content = str(Path(folder) / "content.npz")
        churned = run_worker({"peer": OURS, "workload": "churn", "quick": quick, "content": content})
        fresh = run_worker({"peer": "fresh", "content": content})
    return {"churned": churned, "fresh": fresh}


# ---- single calls ----------------------------------------------------------------------------------------------------
def calls(present: dict[str, type[TreePeer]], rounds: int, page_size: int = workloads.PAGE_SIZE) -> dict[str, Any]:
    """ns of single calls, median over alternating rounds: a 1-page miss and hit, an 8,192-token hit in one node
    (without and with page ids), each input type; and memcmp / memcpy of the same 32 KiB."""
    rng = np.random.default_rng(SEED)
    long, short, other = (rng.integers(0, workloads.VOCABULARY, n, np.int32) for n in (8_192, page_size, page_size))
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in present}
    hot: list[floor.Primitives] = []
    probes: dict[str, list[tuple[str, Callable[[Any], Any], Any]]] = {}
    for name, peer in present.items():
        one, big = (tree_of_one(peer, tokens, page_size, peer.key) for tokens in (short, long))
        probes[name] = [
            ("miss_1_page", one.find, peer.key(other)),
            ("hit_1_page", one.find, peer.key(short)),
            ("hit_1_page_with_ids", one.match, peer.key(short)),
            ("hit_8192", big.find, peer.key(long)),
            ("hit_8192_with_ids", big.match, peer.key(long)),
        ]
        for kind, convert in peer.INPUT_TYPES.items():  # a tree each: some compare only like with like
            probes[name].append((f"hit_8192 {kind}", tree_of_one(peer, long, page_size, convert).find, convert(long)))
    for turn in range(rounds):
        say(f"single calls, round {turn + 1} of {rounds}")
        hot.append(floor.primitives(long.nbytes))
        for name, calls_of_one in probes.items():
            slow = name == "dynamo"
            for what, function, key in calls_of_one:
                taken = measure.time_call(function, key, batch=10 if slow else 200, samples=15 if slow else 40)
                samples[name].setdefault(what, []).append(taken)
    out: dict[str, Any] = {
        name: {what: statistics.median(times) for what, times in found.items()} for name, found in samples.items()
    }
    out["memory"] = medians([one._asdict() for one in hot])
    return out


def tree_of_one(
    peer: type[TreePeer], tokens: workloads.Tokens, page_size: int, convert: Callable[[Any], Any]
) -> TreePeer:
    """A tree that holds one node with ``tokens``."""
    tree, key = peer(page_size), convert(tokens)
    tree.insert(
        key, peer.row(np.arange(len(tokens) // page_size, dtype=np.int32), tokens, 0, page_size), tree.match(key)
    )
    return tree


# ---- eviction --------------------------------------------------------------------------------------------------------
class EvictCase(NamedTuple):
    """One tree to evict from. ``order``: how its leaves were last touched; random = the next victim is anywhere in
    memory, sequential = victims lie one behind the other, as they were inserted."""

    name: str
    policy: str
    leaves: int
    order: str


def evict_one(
    peer: type[TreePeer], case: EvictCase, samples: int, warm_up: int = 0, page_size: int = workloads.PAGE_SIZE
) -> Any:
    """evict(1 token) in a tree of one-page leaves; the leaf is replaced after each (not timed), so the size stays.

    The first ``warm_up`` evictions are not counted: they touch an order for the first time since it was filled, which a
    cache at its capacity, evicting for ever, does once.

    Returns: percentiles (us). Raises: RuntimeError if a call did not free exactly one page.
    """
    rng = np.random.default_rng(SEED)
    tree = peer(page_size, case.policy)
    tokens = rng.integers(0, workloads.VOCABULARY, (case.leaves + samples + warm_up, page_size), np.int32)
    tokens[:, 0] = np.arange(len(tokens))  # no two alike

    def add(index: int, page: np.ndarray[Any, Any]) -> None:
        key = peer.key(tokens[index])
        tree.insert(key, peer.row(page, tokens[index], 0, page_size), tree.match(key))

    for index in range(case.leaves):
        add(index, np.array([index], np.int32))
    if case.order == "random":
        for index in rng.permutation(case.leaves):
            tree.find(peer.key(tokens[index]))
    times = np.zeros(samples + warm_up, np.int64)
    clock = time.perf_counter_ns
    for index in range(samples + warm_up):
        start = clock()
        evicted = tree.evict(1)
        times[index] = clock() - start
        page = tree.evicted_page_ids(evicted)
        if len(page) != 1:
            raise RuntimeError(f"{case}: evict(1) freed {len(page)} pages")
        add(case.leaves + index, page)
    return measure.percentiles(times[warm_up:])


def evict_cases(present: dict[str, type[TreePeer]], quick: bool) -> list[EvictCase]:
    """Ours: all policies at both ends, lru also between and sequentially. Peers: lru, 1,000 and 20,000 leaves."""
    large = 20_000 if quick else 200_000
    cases = []
    for name, peer in present.items():
        if name == OURS:
            cases += [EvictCase(name, "lru", n, order) for order in ("random", "sequential") for n in (1_000, large)]
            cases += [EvictCase(name, "lru", 20_000, "random")] * (not quick)
            cases += [EvictCase(name, p, n, "random") for p in peer.POLICIES if p != "lru" for n in (1_000, large)]
        else:
            cases += [EvictCase(name, "lru", n, "random") for n in (1_000, 20_000)]
    return cases


def evictions(present: dict[str, type[TreePeer]], rounds: int, quick: bool) -> list[dict[str, Any]]:
    """Each case with its median percentiles (us) over alternating rounds."""
    cases = evict_cases(present, quick)
    samples: list[list[Any]] = [[] for _ in cases]
    for turn in range(rounds):
        for case, found in zip(cases, samples, strict=True):
            say(
                f"evict, round {turn + 1} of {rounds}: {case.name}, {case.policy}, {case.leaves:,} leaves, {case.order}"
            )
            samples_and_warm_up = (5_000, 10_000) if case.name == OURS else (100, 0)
            found.append(evict_one(present[case.name], case, *samples_and_warm_up)._asdict())
    return [{**case._asdict(), **medians(found)} for case, found in zip(cases, samples, strict=True)]


# ---- targets ---------------------------------------------------------------------------------------------------------
def checks(result: dict[str, Any]) -> list[report.Check]:
    """Figures against the targets; ``value`` None where a part was not run."""
    found: list[report.Check] = []
    runs = result.get("replay", {})
    for workload, limit in RUN_TARGETS.items():
        ratio, above = paired_ratio(runs, workload, OURS, RIVAL), paired_ratio(runs, workload, OURS, "floor")
        best = best_ratio(runs, workload, OURS, RIVAL)
        note = "" if best is None else f"shortest / shortest {best:.3f}; "
        note += "" if above is None else f"{above:.2f} x the floor in fresh memory"
        found.append(report.Check(f"{workload}: whole run / {RIVAL}", ratio, limit, "ratio", note))
    found += call_checks(result.get("calls", {})) + evict_checks(result.get("evict", []))
    for workload in RUN_TARGETS:
        found += memory_checks(workload, runs.get(workload, {}).get(OURS, {}))
    found += churn_checks(result.get("churn_memory"))
    return found


def call_checks(result: dict[str, Any]) -> list[report.Check]:
    """The 8,192-token hit against memcmp, and the overhead of a call."""
    ours, memory = result.get(OURS, {}), result.get("memory")
    limit = 2 * memory["memcmp_hot_ns"] + 600 if memory else None
    note = f"2 x {memory['memcmp_hot_ns']:,.0f} ns + 600 ns" if memory else ""
    return [
        report.Check("8,192-token hit, match", ours.get("hit_8192"), limit, "ns", note),
        report.Check("8,192-token hit, match + page_ids", ours.get("hit_8192_with_ids"), limit, "ns", note),
        report.Check("call overhead of match: 1-page miss", ours.get("miss_1_page"), 500, "ns"),
        report.Check(
            "call overhead of match: 1-page hit", ours.get("hit_1_page"), 500, "ns", "the page's compare included"
        ),
    ]


def evict_checks(result: list[dict[str, Any]]) -> list[report.Check]:
    """evict(1), lru: the same cost at both ends, and at most 2 us."""
    found = []
    for order in ("random", "sequential"):
        ends = [c for c in result if (c["name"], c["policy"], c["order"]) == (OURS, "lru", order)]
        if not ends:
            found.append(report.Check(f"evict(1), lru, {order}", None, 2, "us", "not run"))
            continue
        small, large = (pick(ends, key=lambda case: case["leaves"]) for pick in (min, max))
        ratio = large["p50_us"] / small["p50_us"]
        found.append(report.Check(f"evict(1), lru, {order}: p50 at {large['leaves']:,} / 1,000", ratio, 2, "ratio"))
        for case in (small, large):
            what = f"evict(1), lru, {order}: p50 at {case['leaves']:,}"
            found.append(report.Check(what, case["p50_us"], 2, "us", f"p99 {case['p99_us']:.2f} us"))
    return found


def memory_checks(workload: str, run: dict[str, Any]) -> list[report.Check]:
    """Bytes a cached token from the process, and how far memory_bytes is from that."""
    if "rss_bytes" not in run:
        return [report.Check(f"{workload}: memory", None, 5.0, "B/token", run.get("absent", "not run")[:60])]
    tokens, own = run["cached_tokens"], run["own_memory_bytes"]
    return [
        report.Check(
            f"{workload}: process memory",
            run["rss_bytes"] / tokens,
            5.0,
            "B/token",
            f"memory_bytes says {own / tokens:.2f}, settled {run['rss_settled_bytes'] / tokens:.2f}",
        ),
        report.Check(f"{workload}: |memory_bytes / process - 1|", abs(own / run["rss_bytes"] - 1), 0.10, "ratio"),
    ]


def churn_checks(result: dict[str, Any] | None) -> list[report.Check]:
    """Memory after churn against a fresh tree of the same content."""
    if result is None:
        return [report.Check("memory after churn / fresh", None, 1.3, "ratio", "not run")]
    churned, fresh = result["churned"], result["fresh"]
    return [
        report.Check(
            f"memory after churn / fresh, {kind}",
            churned[key] / fresh[key],
            1.3,
            "ratio",
            f"{churned[key] / churned['cached_tokens']:.2f} B/token of {churned['cached_tokens']:,}",
        )
        for kind, key in (("process", "rss_bytes"), ("memory_bytes", "own_memory_bytes"))
    ]


# ---- output ----------------------------------------------------------------------------------------------------------
def print_result(result: dict[str, Any]) -> None:
    """Print everything as tables, ratios first."""
    for workload, found in result.get("replay", {}).items():
        if "absent" in found:
            print(f"{workload}: SKIPPED, {found['absent']}")
            continue
        rows, missing = [], []
        for name, run in found.items():
            if name == "notes":
                continue
            if "absent" in run:
                missing.append(f"  absent: {name}: {run['absent']}")
                continue
            ratio = paired_ratio(result["replay"], workload, name, RIVAL)
            per_token = None if run.get("rss_bytes") is None else run["rss_bytes"] / run["cached_tokens"]
            settled = None if run.get("rss_bytes") is None else run["rss_settled_bytes"] / run["cached_tokens"]
            rows.append(
                (
                    name,
                    number(run["total_s"] * 1e3, 1),
                    number(ratio, 3),
                    *[
                        number(run.get(op, {}).get(f"{p}_us"))
                        for op in ("match", "insert", "evict")
                        for p in ("p50", "p99")
                    ],
                    number(per_token),
                    number(settled),
                    number(run.get("preemptions"), 0),
                )
            )
        report.table(
            f"{workload}: {found['notes']}",
            (
                "",
                "total ms",
                f"/ {RIVAL}",
                "match p50 us",
                "p99",
                "insert p50",
                "p99",
                "evict p50",
                "p99",
                "RSS B/token",
                "settled",
                "preempted",
            ),
            rows,
        )
        for line in missing:
            print(line)
    print_calls(result.get("calls"))
    rows = [
        (c["name"], c["policy"], f"{c['leaves']:,}", c["order"], number(c["p50_us"]), number(c["p99_us"]))
        for c in result.get("evict", [])
    ]
    if rows:
        columns = ("", "policy", "leaves", "touched", "p50 us", "p99 us")
        report.table("evict(1 token) in a tree of one-page leaves", columns, rows)


def print_calls(found: dict[str, Any] | None) -> None:
    """Print the single calls."""
    if not found:
        return
    columns = ("miss_1_page", "hit_1_page", "hit_1_page_with_ids", "hit_8192", "hit_8192_with_ids")
    rows = [(name, *(number(times[c], 0) for c in columns)) for name, times in found.items() if name != "memory"]
    report.table("single calls, ns", ("", *columns), rows)
    rows = [
        (f"{name}: {what.removeprefix('hit_8192 ')}", number(ns, 0))
        for name, times in found.items()
        if name != "memory"
        for what, ns in times.items()
        if what.startswith("hit_8192 ")
    ]
    report.table("8,192-token hit by input type, ns (the first of each is in use)", ("", "ns"), rows)
    report.table("the machine, 32 KiB, ns", tuple(found["memory"]), [[number(v, 0) for v in found["memory"].values()]])


number = report.number


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def run(names: Sequence[str], rounds: int, quick: bool, only: Sequence[str]) -> dict[str, Any]:
    """All parts in ``only`` (replay, calls, evict); the result as it is written to JSON."""
    present, absent = peers.load_all(names)
    for one in absent:
        say(f"absent: {one.name}: {one.reason}")
    result = report.header(
        seed=SEED,
        rounds=rounds,
        quick=quick,
        page_size=workloads.PAGE_SIZE,
        versions={name: peer.version() for name, peer in present.items()},
        absent={one.name: one.reason for one in absent},
    )
    if "replay" in only:
        result["replay"] = replays(list(present), rounds, quick)
        if OURS in present:
            result["churn_memory"] = churn_memory(quick)
    if "calls" in only:
        result["calls"] = calls(present, rounds)
    if "evict" in only:
        result["evict"] = evictions({n: p for n, p in present.items() if p.POLICIES}, rounds, quick)
    result["checks"] = report.checks_as_dicts(checks(result))
    return result


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line; returns the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small workloads, one round: does it run, not how fast")
    parser.add_argument("--rounds", type=int, help="alternating rounds (3; 1 with --quick)")
    parser.add_argument("--peers", default=",".join(peers.TREE_PEERS), help="comma-separated names")
    parser.add_argument("--only", default="replay,calls,evict", help="comma-separated parts")
    parser.add_argument("--json", type=Path, default=report.DEFAULT_FOLDER / "tree.json", help="where the result goes")
    report.add_check_option(parser)
    options = parser.parse_args(arguments)
    rounds = options.rounds or (1 if options.quick else 3)
    result = run(options.peers.split(","), rounds, options.quick, options.only.split(","))
    report.write_json(result, options.json)
    print_result(result)
    report.conclude(checks(result), options.check)
    return result


if __name__ == "__main__":
    main()
