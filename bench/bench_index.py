"""PrefixIndex beside Dynamo's RadixTree: find, insert, memory, threads, removal of a worker.

``python -m bench.bench_index [--quick] [--rounds 3] [--json FILE]``. Every measurement is a fresh process
(index_worker.py), the implementations alternate.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import report
from .bench_tree import medians, number, say
from .index_worker import PREFIX_PAGES, SEED, SEQUENCE_PAGES, WORKERS
from .peers.indexes import load_all

OURS = "radixkv"
SCENARIOS = {
    "all": f"every sequence held by {WORKERS} workers",
    "one": f"every sequence held by one of {WORKERS} workers",
    "prefix": f"every sequence held by one of {WORKERS} workers, the first {PREFIX_PAGES} pages the same in all",
}
THREADS = (1, 4, 8)


def run_worker(job: dict[str, Any]) -> dict[str, Any]:
    """Run index_worker.py once. Raises: RuntimeError with its stderr."""
    command = [sys.executable, "-m", "bench.index_worker", json.dumps(job)]
    done = subprocess.run(command, cwd=report.ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{job['peer']}, {job['scenario']}: {done.stderr.strip()[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run(rounds: int, quick: bool) -> dict[str, Any]:
    """Every scenario and implementation, ``rounds`` times in alternation; the result as it is written to JSON."""
    present, absent = load_all()
    for one in absent:
        say(f"absent: {one.name}: {one.reason}")
    entries = 100_000 if quick else 1_000_000
    result = report.header(
        seed=SEED,
        rounds=rounds,
        quick=quick,
        entries=entries,
        sequence_pages=SEQUENCE_PAGES,
        versions={name: peer.version() for name, peer in present.items()},
        absent={one.name: one.reason for one in absent},
    )
    for scenario in (*SCENARIOS, "remove"):
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in present}
        failed: dict[str, str] = {}
        for turn in range(rounds):
            for name in list(present)[turn % 2 :] + list(present)[: turn % 2]:
                if name in failed:
                    continue
                say(f"index, {scenario}, round {turn + 1} of {rounds}: {name}")
                finds = (1_000 if quick else 5_000) if name != OURS else 20_000
                job = {"peer": name, "scenario": scenario, "entries": entries, "finds": finds, "threads": THREADS}
                try:
                    runs[name].append(run_worker(job))
                except RuntimeError as error:
                    failed[name] = str(error)
        result[scenario] = {
            name: {"absent": failed[name]} if name in failed else {**medians(found), "runs": found}
            for name, found in runs.items()
        }
    result["checks"] = report.checks_as_dicts(checks(result))
    return result


def checks(result: dict[str, Any]) -> list[report.Check]:
    """Figures against the targets."""
    found = []
    for scenario, words in SCENARIOS.items():
        run_of = result.get(scenario, {}).get(OURS, {})
        reason = run_of.get("absent", "not run")[-80:]
        if "find" not in run_of:
            found.append(report.Check(f"find of 128 pages, {words}", None, 2, "us", reason))
            found.append(report.Check(f"memory, {words}", None, 30, "B/entry", reason))
            continue
        p99, own = run_of["find"]["p99_us"], run_of["own_memory_bytes"]
        found.append(
            report.Check(f"find of 128 pages, {words}: p50", run_of["find"]["p50_us"], 2, "us", f"p99 {p99:.2f} us")
        )
        found.append(
            report.Check(
                f"process memory a (page, holder), {words}",
                run_of["rss_bytes"] / run_of["entries"],
                30,
                "B",
                f"memory_bytes says {own / run_of['entries']:.2f}",
            )
        )
    removal = result.get("remove", {}).get(OURS, {})
    removed = removal.get("remove_us")
    by_size = removed["10000"] / removal["small_us"] if removed else None
    by_held = removed["100000"] / removed["10000"] / 10 if removed else None
    what = "remove_worker, 10,000 pages held: index 10 times as large"
    found.append(report.Check(what, by_size, 2, "ratio", "what it does not hold costs nothing = 1, but for caches"))
    what = "remove_worker, us a page: 100,000 held / 10,000 held"
    found.append(report.Check(what, by_held, None, "ratio", "proportional = 1, but for caches"))
    return found


def print_result(result: dict[str, Any]) -> None:
    """Print everything as tables."""
    for scenario, words in SCENARIOS.items():
        rows, threads, missing = [], [], []
        for name, run_of in result.get(scenario, {}).items():
            if "absent" in run_of:
                missing.append(f"absent: {name}: {run_of['absent']}")
                continue
            times = [
                number(run_of[op][f"{p}_us"])
                for op in ("find", "find_1_page", "find_miss", "insert")
                for p in ("p50", "p99")
            ]
            rows.append(
                (name, *times, *(number(run_of[m] / run_of["entries"]) for m in ("rss_bytes", "rss_settled_bytes")))
            )
            for count, rates in run_of["threads"].items():
                threads.append(
                    (
                        name,
                        count,
                        *(
                            f"{rates[rate]:,.0f}"
                            for rate in ("find_per_s", "insert_per_s", "mixed_per_s", "again_per_s")
                        ),
                    )
                )
        columns = ("", "find us", "p99", "1 page", "p99", "miss", "p99", "insert us", "p99", "RSS B/entry", "settled")
        report.table(f"{words}: {result['entries']:,} entries, sequences of {SEQUENCE_PAGES} pages", columns, rows)
        report.table(
            "calls a second, 128 pages each", ("", "threads", "find", "insert", "both", "find + re-insert"), threads
        )
        for line in missing:
            print(line)
    rows = [
        (name, *(f"{us:,.0f}" for us in run_of["remove_us"].values()))
        for name, run_of in result.get("remove", {}).items()
        if "remove_us" in run_of
    ]
    report.table("remove_worker, us, by pages held", ("", "1,000", "10,000", "100,000"), rows)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line; returns the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100,000 entries, one round")
    parser.add_argument("--rounds", type=int, help="alternating rounds (3; 1 with --quick)")
    parser.add_argument("--json", type=Path, default=report.DEFAULT_FOLDER / "index.json", help="where the result goes")
    report.add_check_option(parser)
    options = parser.parse_args(arguments)
    result = run(options.rounds or (1 if options.quick else 3), options.quick)
    report.write_json(result, options.json)
    print_result(result)
    report.conclude(checks(result), options.check)
    return result


if __name__ == "__main__":
    main()
