"""Long seeded runs of the driver: python -m tests.oracle.fuzz --ops 1000000 --seed 7 [--policy lru]

Results and events are compared at each step; dump, stats and check_integrity every --check steps. A run is a chain of
episodes, each with another policy, page size and pool size; at the end of one everything is let go and every page must
be back. A failure prints the seed, the step, and the last operations; the same arguments fail again at the same step.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter

import numpy as np

from radixkv.types import POLICIES
from tests.oracle.driver import WEIGHTS, Driver
from tests.oracle.implementations import NAMES, implementations, missing


class Dice:
    """Choices from a seeded generator, drawn in bulk."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._numbers: list[int] = []

    def below(self, n: int) -> int:
        if not self._numbers:
            self._numbers = self._rng.integers(0, 2**62, 1 << 14).tolist()
        return self._numbers.pop() % n


def new_driver(dice: Dice, trees: tuple[str, str], policy: str | None, page_size: int | None) -> Driver:
    ours, theirs = (implementations()[name] for name in trees)
    return Driver(
        ours, theirs,
        page_size or (1, 2, 3, 16, 64)[dice.below(5)],
        policy or POLICIES[dice.below(len(POLICIES))],
        events=dice.below(3) > 0,
        pages=(20, 60, 150)[dice.below(3)],
        host_pages=(10, 80, 250)[dice.below(3)],
        letters=(2, 3)[dice.below(2)],
        longest=(6, 9, 14)[dice.below(3)],
        max_events=(1 << 20, 1 << 20, 5, 1)[dice.below(4)],
    )  # fmt: skip


def run(ops: int, seed: int, trees: tuple[str, str], policy: str | None = None, page_size: int | None = None,
        check: int = 50, episode: int = 5000) -> Counter[str]:
    """Run; returns how often each method was called. Raises whatever went wrong, after printing how to see it again."""
    dice = Dice(seed)
    wheel = [name for name, weight in WEIGHTS.items() for _ in range(weight)]
    counts: Counter[str] = Counter()
    driver, name = None, "start"
    try:
        for step in range(ops):
            if step % episode == 0:
                if driver is not None:
                    name = "finish"
                    driver.finish()
                    counts += driver.counts + driver.errors
                driver = new_driver(dice, trees, policy, page_size)
            name = wheel[dice.below(len(wheel))]
            driver.step(name, dice)
            if step % check == 0:
                name = f"check after {name}"
                driver.check()
        driver.finish()
    except Exception:
        print(f"\nFAILED: seed {seed}, step {step} ({name}), trees {trees}", file=sys.stderr)
        print(f"page_size {driver.page_size}, policy {driver.a.policy}, events {driver.events}, "
              f"at most {driver.max_events}", file=sys.stderr)
        for line in driver.told():
            print("  ", line, file=sys.stderr)
        raise
    return counts + driver.counts + driver.errors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", type=int, default=100_000, help="operations of the driver")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: the time; printed")
    parser.add_argument("--policy", choices=POLICIES, help="default: another in each episode")
    parser.add_argument("--page-size", type=int, help="default: another in each episode")
    parser.add_argument("--check", type=int, default=50, help="steps between full comparisons")
    parser.add_argument("--episode", type=int, default=5000, help="steps of one pair of trees")
    parser.add_argument("--trees", nargs=2, choices=NAMES, default=list(NAMES), help="which two to compare")
    args = parser.parse_args()
    for name in args.trees:
        if missing(name):
            print(f"cannot run: {missing(name)}", file=sys.stderr)
            return 2
    print(f"seed {args.seed}, {args.ops} operations, {args.trees[0]} beside {args.trees[1]}", flush=True)
    start = time.perf_counter()
    try:
        counts = run(args.ops, args.seed, tuple(args.trees), args.policy, args.page_size, args.check, args.episode)
    except Exception:
        traceback.print_exc()
        return 1
    seconds = time.perf_counter() - start
    for name, count in sorted(counts.items()):
        print(f"  {name:40} {count:>10}")
    rate = f"{args.ops} operations in {seconds:.1f} s, {args.ops / seconds:.0f} a second"
    print(f"seed {args.seed}: {rate}: no difference")
    return 0


if __name__ == "__main__":
    sys.exit(main())
