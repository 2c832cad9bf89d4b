"""covering.py: every pair that can be is there, and matrix.py's dimensions are those of the issue."""

from __future__ import annotations

from . import matrix
from .covering import absent, cover, pairs_of


def test_every_pair_is_covered() -> None:
    parameters = {"a": [1, 2, 3], "b": "xyz", "c": [True, False], "d": range(4)}
    cases = cover(parameters, lambda _: True)
    assert not absent(parameters, cases)
    assert len(cases) < 3 * 3 * 2 * 4 / 3
    assert cases == cover(parameters, lambda _: True)
    assert all(list(case) == list(parameters) for case in cases)


def test_pairs_that_cannot_be_are_left_out_and_told() -> None:
    parameters = {"a": [1, 2], "b": [1, 2], "c": [1, 2, 3]}
    cases = cover(parameters, lambda case: case["a"] <= case["b"])
    assert absent(parameters, cases) == {frozenset((("a", 2), ("b", 1)))}
    assert all(case["a"] <= case["b"] for case in cases)
    assert len(pairs_of(cases[0])) == 3


def test_the_dimensions_of_the_issue() -> None:
    p = matrix.PARAMETERS
    assert len(p["layouts"]) == 16
    assert (p["kind"], p["item_bytes"], p["layers"]) == (["mha", "mla"], [1, 2, 4], [1, 80])
    assert {1, 16, 64} < set(p["page_size"])
    assert any(size % 2 and size > 1 for size in p["page_size"])
    assert p["pattern"] == ["empty", "single", "random", "reversed", "contiguous"]
    cases = cover(p, matrix.allowed)
    rows = [matrix.row_bytes(case) for case in cases]
    assert (min(rows), max(rows)) == (8, 4096)
    assert any(row % 2 for row in rows)
    assert absent(p, cases) == matrix.IMPOSSIBLE
