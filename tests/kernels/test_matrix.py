"""Every kernel family over the dimensions of a copy (tests/matrix.py), on the simulator and on a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from .. import matrix
from ..covering import absent, cover
from . import backends
from .backends import Backend
from .cases import DIRECTIONS, Case, check

PARAMETERS = matrix.PARAMETERS | {"direction": list(DIRECTIONS), "family": ["copy", "relayout", "bulk"]}


def allowed(case: dict[str, Any]) -> bool:
    """Bulk copies take multiples of 16 bytes."""
    return matrix.allowed(case) and (case["family"] != "bulk" or case["head_dim"] * case["item_bytes"] % 16 == 0)


CASES = cover(PARAMETERS, allowed)


def test_every_two_values_meet() -> None:
    odd = {frozenset((("family", "bulk"), ("head_dim", size))) for size in (33, 65)}
    assert absent(PARAMETERS, CASES) == matrix.IMPOSSIBLE | odd


@pytest.mark.parametrize("name", ["hostsim", "cuda"])
@pytest.mark.parametrize("case", CASES, ids=matrix.name)
def test_the_matrix(name: str, case: dict[str, Any]) -> None:
    backend: Backend = backends.backend(name)
    src, dst = case["layouts"]
    check(backend, Case(
        src=src, dst=dst, kind=case["kind"], direction=case["direction"], layers=case["layers"], heads=case["heads"],
        head_bytes=case["head_dim"] * case["item_bytes"], page_size=case["page_size"], pages=3,
        pattern=case["pattern"], src_dtype=case["ids"], dst_dtype=case["ids"], options={"family": case["family"]},
    ))  # fmt: skip
