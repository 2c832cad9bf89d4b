"""The CPU path over the dimensions of a copy (tests/matrix.py): plan and route, there and back, followed or not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from radixkv.transfer.cpu import STORES, CpuTransfer, Progress
from radixkv.transfer.plan import plan_copy
from radixkv.transfer.reference import copy_views

from .. import matrix
from ..covering import absent, cover
from .transfer_kit import POISON, HostPool, geometry

PARAMETERS = matrix.PARAMETERS | {
    "way": ["plan", "route"], "store": list(STORES), "followed": [False, True], "threads": [1, 3], "shift": [0, 1, 8],
}  # fmt: skip
CASES = cover(PARAMETERS, matrix.allowed)
PAGES = 5
IDS: dict[str, tuple[list[int], list[int]]] = {
    "empty": ([], []), "single": ([3], [4]), "random": ([4, 0, 3], [2, 4, 0]), "reversed": ([4, 3, 2], [3, 2, 1]),
    "contiguous": ([1, 2, 3], [0, 1, 2]),
}  # fmt: skip


def test_every_two_values_meet() -> None:
    assert absent(PARAMETERS, CASES) == matrix.IMPOSSIBLE


@pytest.mark.parametrize("case", CASES, ids=matrix.name)
def test_the_matrix(case: dict[str, Any]) -> None:
    """There, then back into a poisoned pool: each byte is where the oracle puts it, or poison."""
    g = geometry(
        case["kind"], case["layers"], case["heads"], case["head_dim"] * case["item_bytes"], case["page_size"]
    )
    there = [np.array(side, case["ids"]) for side in IDS[case["pattern"]]]
    first, second = case["layouts"]
    pools = [HostPool.make(g, layout, PAGES, None, case["shift"]) for layout in (first, second, first)]
    for block in pools[0].blocks:
        block[:] = np.random.default_rng(1).integers(0, 256, len(block), np.uint8)
    for src, dst, ids in ((pools[0], pools[1], there), (pools[1], pools[2], there[::-1])):
        want, before = dst.twin(), src.whole.copy()
        copy_views(plan_copy(g, src.view, want.view, *ids))
        transfer = CpuTransfer(g, num_threads=case["threads"], store=case["store"])
        progress = Progress(g.num_layers) if case["followed"] else None
        if case["way"] == "route":
            transfer.route(src.view, dst.view).copy(*ids, progress)
        else:
            transfer.copy(transfer.plan(src.view, dst.view, *ids), progress)
        assert progress is None or progress.layers_done == g.num_layers
        outside = np.ones(len(dst.whole), np.bool_)
        for mine, theirs in zip(dst.blocks, want.blocks, strict=True):
            assert np.array_equal(mine, theirs)
            at = mine.ctypes.data - dst.whole.ctypes.data
            outside[at : at + len(mine)] = False
        assert (dst.whole[outside] == POISON).all()
        assert np.array_equal(src.whole, before)
