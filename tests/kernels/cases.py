"""A case of a copy, and the one body that does it on a backend and holds it against the oracle."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from radixkv.pool.layout import LAYOUTS, Kind, KVGeometry, Layout, view_of_layout
from radixkv.transfer.launch import Launch
from radixkv.transfer.plan import CopyPlan, Ids, plan_copy

from .backends import POISON, Backend
from .oracle import Bytes, expect_copy

DIRECTIONS = {"backup": ("device", "host"), "load_back": ("host", "device"), "device": ("device", "device")}
PATTERNS = ("empty", "single", "random", "reversed", "contiguous")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One copy. Pools have a few pages more than are copied, and each side a number of its own."""

    src: Layout = "layer_first"
    dst: Layout = "page_first"
    kind: Kind = "mha"
    direction: str = "backup"
    layers: int = 3
    heads: int = 2
    head_bytes: int = 16
    page_size: int = 4
    pages: int = 5
    pattern: str = "random"
    src_dtype: str = "int64"
    dst_dtype: str = "int64"
    only: tuple[int, int] | None = None  # layers [start, stop) of the copy; None: all
    shift: int = 0  # bytes by which both sides are off a 256-byte boundary
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def geometry(self) -> KVGeometry:
        return KVGeometry(
            kind=self.kind,
            num_layers=self.layers,
            num_heads=self.heads if self.kind == "mha" else 1,
            head_bytes=self.head_bytes,
            page_size=self.page_size,
        )

    @property
    def layer_range(self) -> range:
        return range(*self.only) if self.only else range(self.layers)

    @property
    def count(self) -> int:
        return {"empty": 0, "single": 1}.get(self.pattern, self.pages)

    def ids(self, rng: np.random.Generator) -> tuple[Ids, Ids]:
        """Page ids of both sides, distinct on each."""
        n = self.count
        sizes = (self.pages + 3, self.pages + 2)
        if self.pattern == "contiguous":
            both = [np.arange(n) + 2, np.arange(n) + 1]
        elif self.pattern == "reversed":
            both = [np.arange(n)[::-1] + 1, np.arange(n)]
        else:
            both = [rng.permutation(size)[:n] for size in sizes]
        return both[0].astype(self.src_dtype), both[1].astype(self.dst_dtype)


def check(backend: Backend, case: Case) -> list[Launch]:
    """Do it; fail unless each byte of the destination is what the oracle says, and each of the source as it was."""
    g = case.geometry
    rng = np.random.default_rng(zlib.crc32(repr(case).encode()))
    src_ids, dst_ids = case.ids(rng)
    src_slots, dst_slots = (case.pages + 3) * g.page_size, (case.pages + 2) * g.page_size
    half = g.num_layers * g.row_bytes
    content = rng.integers(0, 256, (g.halves, src_slots * half), dtype=np.uint8)
    poison = np.full((g.halves, dst_slots * half), POISON, dtype=np.uint8)
    tiers = DIRECTIONS[case.direction]
    src = backend.place(content, tiers[0], case.shift)
    dst = backend.place(poison, tiers[1], case.shift)
    plan = plan_copy(
        g,
        view_of_layout(case.src, g, src_slots, src.addresses, src.device),
        view_of_layout(case.dst, g, dst_slots, dst.addresses, dst.device),
        src_ids,
        dst_ids,
        case.layer_range,
    )
    launches = backend.run(plan, **case.options)
    expected = expect_copy(
        g,
        (case.src, src_slots, content),
        (case.dst, dst_slots, poison),
        src_ids.tolist(),
        dst_ids.tolist(),
        case.layer_range,
    )
    same(dst.read(), expected, "destination")
    same(src.read(), content, "source")
    return launches


def same(found: Bytes, expected: Bytes, what: str) -> None:
    wrong = np.argwhere(found != expected)
    assert not len(wrong), f"{len(wrong)} of {found.size} bytes of the {what} differ, first at [half, byte] {wrong[0]}"


def plan_of(case: Case, src_addresses: list[int], dst_addresses: list[int]) -> CopyPlan:
    """The plan of a case over addresses that are never read."""
    g = case.geometry
    src_ids, dst_ids = case.ids(np.random.default_rng(1))
    src_slots, dst_slots = (case.pages + 3) * g.page_size, (case.pages + 2) * g.page_size
    return plan_copy(
        g,
        view_of_layout(case.src, g, src_slots, src_addresses),
        view_of_layout(case.dst, g, dst_slots, dst_addresses),
        src_ids,
        dst_ids,
        case.layer_range,
    )


def few(family: str) -> list[Case]:
    """A few of each path through the kernels of a family, small enough for a thread per thread."""
    options = {"family": family, "ctas": 2}
    found = [Case(src=src, dst=dst, options=options) for src in LAYOUTS for dst in LAYOUTS]
    for dtype in ("int32", "int64"):
        for pattern in ("contiguous", "random"):
            for kind in ("mha", "mla"):
                found.append(
                    Case(kind=kind, src_dtype=dtype, dst_dtype=dtype, pattern=pattern, head_bytes=4112, options=options)
                )
    if family != "bulk":
        for shift in (1, 2, 4, 8):
            found.append(Case(shift=shift, head_bytes=40, options=options))
    return found
