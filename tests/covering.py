"""Fewer cases than the full product that still bring every two values together (a pairwise covering array)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Case = dict[str, Any]
Pair = tuple[tuple[str, Any], tuple[str, Any]]

TRIES = 30
"""Completions of each case that are compared; more of them give slightly fewer cases."""


def pairs_of(case: Case) -> set[Pair]:
    """Every two values of a case, each with its parameter's name, names in the order of the case."""
    return set(itertools.combinations(case.items(), 2))


def cover(parameters: Mapping[str, Sequence[Any]], allowed: Callable[[Case], bool], seed: int = 1) -> list[Case]:
    """Cases such that each pair of values of two parameters occurs in one, but for pairs that no allowed case has.

    Greedy: each case begins with a pair that is missing, and is the completion, of some random ones, that brings most
    others. The same list each time.

    Args:
        parameters: the values of each; they must be hashable.
        allowed: of a whole case. A pair counts as impossible when 40 times TRIES random completions were not allowed.
    """
    rng = random.Random(seed)
    cases: list[Case] = []
    wanted = {
        ((a, x), (b, y)): None  # a dict keeps the order
        for a, b in itertools.combinations(parameters, 2)
        for x, y in itertools.product(parameters[a], parameters[b])
    }
    while wanted:
        first = next(iter(wanted))
        best: Case | None = None
        gain = 0
        fitting = 0
        for _ in range(40 * TRIES):
            drawn = {name: rng.choice(values) for name, values in parameters.items()}
            case = {name: dict(first).get(name, value) for name, value in drawn.items()}
            if not allowed(case):
                continue
            new = sum(pair in wanted for pair in pairs_of(case))
            if new > gain:
                best, gain = case, new
            fitting += 1
            if fitting == TRIES:
                break
        if best is None:
            del wanted[first]
            continue
        cases.append(best)
        for pair in pairs_of(best):
            wanted.pop(pair, None)
    return cases


def absent(parameters: Mapping[str, Sequence[Any]], cases: Sequence[Case]) -> set[frozenset[tuple[str, Any]]]:
    """The pairs of values that are in none of the cases."""
    found = set().union(*map(pairs_of, cases))
    return {
        frozenset(((a, x), (b, y)))
        for a, b in itertools.combinations(parameters, 2)
        for x, y in itertools.product(parameters[a], parameters[b])
        if ((a, x), (b, y)) not in found
    }
