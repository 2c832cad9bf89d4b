"""The original and radixkv side by side for as long as asked: ``python -m tests.hicache.compare --seeds 0:100``.

Every seed is a script under every page size and write policy; kind, layout, io backend, prefetch policy and the size of
the host pool go round with the seed. Prints what was compared and which rules were used; exit status 1 with the
differences if no rule explains them.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter
from typing import Any

from .rules import RULES
from .side_by_side import Mismatch, Report, run
from .sides import OriginalSide, Setup, make_original, make_ours

DEVICE_TOKENS = {1: 320, 16: 512, 64: 2048}
POLICIES = ("write_through", "write_through_selective", "write_back")
CASES = list(itertools.product(DEVICE_TOKENS, POLICIES))
KINDS = [
    (kind, layout, io_backend)
    for layout, io_backend in (("layer_first", "kernel"), ("page_first", "kernel"), ("layer_first", "direct"))
    for kind in ("mha", "mla")
]
PREFETCH = ("wait_complete", "best_effort", "timeout")


def setup_of(page_size: int, policy: str, seed: int, storage: bool) -> Setup:
    """The cache of a seed.

    With storage the host is large: in the original a prefetch near the limit of its capacity counts itself or does
    not, as its thread is quick or slow.
    """
    kind, layout, io_backend = KINDS[seed % len(KINDS)]
    return Setup(
        page_size=page_size, write_policy=policy, kind=kind, layout=layout, io_backend=io_backend,
        device_tokens=DEVICE_TOKENS[page_size], host_ratio=(2.0, 1.1, 4.0, 1.5)[seed // 6 % 4] + 2 * storage,
        storage=storage, prefetch_policy=PREFETCH[seed % 3], prefetch_threshold=2 * page_size,
    )  # fmt: skip


def original(setup: Setup) -> OriginalSide:
    """The original, with the one change that every comparison makes."""
    return make_original(setup).stamp_hits_only()


def compare(page_size: int, policy: str, seed: int, storage: bool, steps: int) -> Report:
    """One script on both. Raises: Mismatch, AssertionError."""
    return run(setup_of(page_size, policy, seed, storage), seed, steps, original, make_ours, RULES)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:20", help="first:end")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tiers", default="memory,storage", help="memory, storage or both")
    options = parser.parse_args()
    first, end = map(int, options.seeds.split(":"))
    totals: Counter[str] = Counter()
    used: Counter[str] = Counter()
    ends: Counter[Any] = Counter()
    for seed, tier, (page_size, policy) in itertools.product(range(first, end), options.tiers.split(","), CASES):
        try:
            report = compare(page_size, policy, seed, tier == "storage", options.steps)
        except (Mismatch, AssertionError) as error:
            totals["failed"] += 1
            print(error, flush=True)
            continue
        used.update(report.rules)
        ends[report.ended_by or "the end of the script"] += 1
        totals.update(runs=1, steps=report.steps, evicted=report.evicted, loaded=report.loaded, fetched=report.fetched)
    print(dict(totals))
    for title, counts in (("ended by", ends), ("rules, by differences that they explain", used)):
        print(title)
        for name, count in counts.most_common():
            print(f"  {count:8} {name}")
    sys.exit(totals["failed"] > 0)


if __name__ == "__main__":
    main()
