"""launches_of: parameters mirror params.h, choices follow the alignments, and the arithmetic holds at its ends."""

from __future__ import annotations

import ctypes
import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from radixkv.errors import InvalidArgumentError
from radixkv.pool.layout import KVGeometry, KVView, view_of_layout
from radixkv.transfer import launch
from radixkv.transfer.launch import CopyParams, Div, RelayoutParams, Side, Walk, first_of_run, launches_of
from radixkv.transfer.plan import CopyPlan, plan_copy

from ..abi.toolchain import run, tool
from .cases import Case, plan_of
from .simulator import KERNELS

SRC, DST = [1 << 40, 2 << 40], [3 << 40, 4 << 40]
STRUCTS: dict[str, type[ctypes.Structure]] = {
    "rkv_div": Div, "rkv_side": Side, "rkv_copy_params": CopyParams, "rkv_walk": Walk,
    "rkv_relayout_params": RelayoutParams,
}  # fmt: skip


def plan(**changes: Any) -> CopyPlan:
    case = Case(**changes)
    return plan_of(case, SRC[: case.geometry.halves], DST[: case.geometry.halves])


@pytest.mark.parametrize(("compiler", "standard"), [("gcc", "c99"), ("g++", "c++17")])
def test_python_mirrors_every_offset_of_params_h(tmp_path: Path, compiler: str, standard: str) -> None:
    fields = [(name, field[0]) for name, struct in STRUCTS.items() for field in struct._fields_]
    prints = [f'printf("%zu ", offsetof({struct}, {field}));' for struct, field in fields]
    prints += [f'printf("%zu ", sizeof({struct}));' for struct in STRUCTS]
    source = tmp_path / ("probe.c" if compiler == "gcc" else "probe.cpp")
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <params.h>\n"
        "int main(void) {\n" + "\n".join(prints) + "\nreturn 0; }\n"
    )
    run([tool(compiler), f"-std={standard}", "-Wall", "-Wextra", "-pedantic", "-Werror", f"-I{KERNELS}", source,
         "-o", tmp_path / "probe"])  # fmt: skip
    said = [int(word) for word in run([tmp_path / "probe"]).stdout.split()]
    mirrored = [getattr(STRUCTS[struct], field).offset for struct, field in fields]
    assert said == mirrored + [ctypes.sizeof(struct) for struct in STRUCTS.values()]


def test_constants_are_those_of_params_h() -> None:
    text = (KERNELS / "params.h").read_text()
    values = {name: int(value) for name, value in re.findall(r"#define RKV_(\w+) (\d+)u", text)}
    assert values["COPY_VECS_IN_FLIGHT"] == launch.VECS_IN_FLIGHT
    assert values["TILE_BYTES"] == launch.TILE_BYTES
    assert values["BULK_SLOT_BYTES"] == launch.BULK_SLOT_BYTES
    in_flight = launch.RELAYOUT_BLOCK * values["RELAYOUT_VECS_IN_FLIGHT"] * max(launch.VECTOR_BYTES)
    assert in_flight == launch.TILE_BYTES, "with the widest vectors a whole tile is in flight"
    ring = values["BULK_SLOTS"] * (launch.BULK_SLOT_BYTES + 16 + 8)
    assert values["BULK_AHEAD"] < values["BULK_SLOTS"]
    assert ring <= 48 << 10, "what a kernel has of shared memory without asking for more"


@given(divisor=st.integers(1, 2**31 - 1), n=st.integers(0, 2**31 - 1))
def test_division_by_multiplication(divisor: int, n: int) -> None:
    for divisor_, n_ in itertools.product((divisor, 1, 2, 3, 2**31 - 1), (n, divisor - 1, divisor, 2**31 - 1)):
        div = Div.by(divisor_)
        assert 0 < div.magic < 2**32
        assert (n_ * div.magic) >> div.shift == n_ // divisor_
        assert n_ * div.magic < 2**64


@pytest.mark.parametrize(("ids", "first"), [([], None), ([4], 4), ([4, 5, 6], 4), ([4, 6, 5], None), ([6, 5, 4], None),
                                            ([4, 6], None), ([4, 6, 5, 7], None)])  # fmt: skip
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_first_of_run(ids: list[int], first: int | None, dtype: type) -> None:
    assert first_of_run(np.array(ids, dtype=dtype)) == first


def test_runs_coalesce_as_far_as_both_layouts_allow() -> None:
    def runs(src: str, dst: str) -> tuple[int, int, int]:
        [found] = launches_of(plan(src=src, dst=dst, head_bytes=32, page_size=4, heads=2), family="copy")
        params = found.params
        assert isinstance(params, CopyParams)
        vector = int(found.kernel.split("_v")[1].split("_")[0])
        return params.run_vecs * vector, params.heads.divisor, params.tokens.divisor

    assert runs("layer_first", "layer_first") == (4 * 64, 1, 1)
    assert runs("layer_first", "page_first_direct") == (4 * 64, 1, 1)
    assert runs("layer_first", "page_first") == (64, 1, 4)
    assert runs("page_head", "page_first") == (32, 2, 4)


def test_packed_rows_use_vectors_wider_than_a_head() -> None:
    """A head of 33 bytes, eight of them together: rows of 264 bytes move 8 at a time."""
    [found] = launches_of(plan(head_bytes=33, heads=8))
    assert "_v8_" in found.kernel


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("half", [0, 1])
def test_every_base_of_every_layer_counts(side: int, half: int, layer: int) -> None:
    """Alignment is never read off the first pair only."""
    g = KVGeometry(kind="mha", num_layers=3, num_heads=1, head_bytes=64, page_size=2)
    views = [view_of_layout("layer_first", g, 8, addresses) for addresses in (SRC, DST)]
    bases = views[side].bases.copy()
    bases[half, layer] = int(bases[half, layer]) + (4 if layer else -4)  # outwards: layers must not overlap
    views[side] = replace(views[side], bases=bases)
    [found] = launches_of(plan_copy(g, views[0], views[1], [1, 0], [0, 2]))
    assert "_v4_" in found.kernel
    only = range(1, 2)
    [found] = launches_of(plan_copy(g, views[0], views[1], [1, 0], [0, 2], only))
    assert "_v16_" in found.kernel, "a layer that is not copied does not count"


@pytest.mark.parametrize(("stride", "expected"), [("page_stride", 2), ("token_stride", 2), ("head_stride", 2)])
def test_every_stride_counts(stride: str, expected: int) -> None:
    g = KVGeometry(kind="mla", num_layers=1, num_heads=1, head_bytes=64, page_size=2)
    view = KVView(bases=np.array([[1 << 40]], dtype=np.uint64), page_stride=1024, token_stride=256, head_stride=64,
                  num_slots=8)  # fmt: skip
    other = replace(view, bases=view.bases + np.uint64(1 << 40))
    [found] = launches_of(plan_copy(g, view, other, [0], [1]))
    assert "_v16_" in found.kernel
    odd = replace(other, **{stride: getattr(other, stride) + 2})
    [found] = launches_of(plan_copy(g, view, odd, [0], [1]))
    # one head a token: its stride is never stepped by
    assert f"_v{16 if stride == 'head_stride' else expected}_" in found.kernel


def test_a_vector_that_is_misaligned_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="vectors of 16 bytes: bases, strides and runs allow 8 at most"):
        launches_of(plan(head_bytes=8, dst="page_head"), vector_bytes=16)
    with pytest.raises(InvalidArgumentError, match="vectors of 3 bytes"):
        launches_of(plan(), vector_bytes=3)


def test_bulk_takes_multiples_of_16_only() -> None:
    with pytest.raises(InvalidArgumentError, match="bulk copies take multiples of 16 bytes"):
        launches_of(plan(head_bytes=24, dst="page_head"), family="bulk")


def test_unknown_families_and_empty_quotas_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="unknown kernel family 'fast'"):
        launches_of(plan(), family="fast")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="a quota of 0 blocks"):
        launches_of(plan(), ctas=0)


def test_a_head_that_fits_no_tile_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="does not fit a tile"):
        launches_of(plan(head_bytes=launch.TILE_BYTES + 16), family="relayout")


def test_auto_stages_where_only_short_runs_are_shared() -> None:
    def kernel(**changes: Any) -> str:
        [found] = launches_of(plan(**changes))
        return found.kernel

    assert "relayout" in kernel(src="layer_first", dst="page_head", head_bytes=32, layers=8, heads=4)
    assert "copy" in kernel(src="layer_first", dst="page_head", head_bytes=128, layers=8, heads=4)
    assert "copy" in kernel(src="layer_first", dst="page_first_direct", head_bytes=32, layers=8, heads=4)
    # one layer alone leaves page_head nothing that is contiguous
    assert "copy" in kernel(src="page_head", dst="layer_first", head_bytes=32, layers=8, heads=4, only=(2, 3))


def test_tiles_make_both_sides_contiguous() -> None:
    [found] = launches_of(plan(src="layer_first", dst="page_head", head_bytes=32, layers=80, heads=8, page_size=16),
                          family="relayout")  # fmt: skip
    params = found.params
    assert isinstance(params, RelayoutParams)
    layers, tokens, heads = params.tile
    assert layers * tokens * heads * 32 <= launch.TILE_BYTES
    assert heads == 8, "the source reads whole rows"
    assert layers >= 16, "the destination writes half a KiB and more at a time"


def test_work_beyond_31_bits_is_split_over_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    from .backends import HostSim
    from .cases import check
    from .simulator import plain

    for family in ("copy", "relayout"):
        monkeypatch.setattr(launch, "MAX_UNITS", 200 if family == "copy" else 30)
        for pattern in ("random", "contiguous"):
            found = check(HostSim(plain()), Case(pages=40, pattern=pattern, options={"family": family}))
            assert len(found) > 1
            assert sum(part.num_pages for part in found) == 40
        monkeypatch.setattr(launch, "MAX_UNITS", 1)
        with pytest.raises(InvalidArgumentError, match="at most 1"):
            launches_of(plan(layers=5), family=family)  # type: ignore[arg-type]


def test_a_block_of_bulk_copies_can_count_what_it_has_to_do() -> None:
    """It counts halves of units in 32 bits, some ahead of the one that is stored; one block may have all units."""
    ids = np.arange(3, dtype=np.int64)
    g = KVGeometry(kind="mha", num_layers=1, num_heads=1, head_bytes=16, page_size=1 << 28)
    views = [view_of_layout(layout, g, 3 << 28, at) for layout, at in (("layer_first", [1 << 40, 1 << 42]),
             ("layer_first", [1 << 44, 1 << 46]))]  # type: ignore[arg-type]  # fmt: skip
    views[1] = replace(views[1], token_stride=32, page_stride=32 << 28)
    found = launches_of(plan_copy(g, *views, ids, ids), family="bulk", ctas=1)
    assert sum(part.num_pages for part in found) == 3
    for part in found:
        assert isinstance(part.params, CopyParams)
        assert part.params.num_units * g.halves + 64 < 2**32 / 2
    assert len(launches_of(plan_copy(g, *views, ids, ids), family="copy")) == 1


def test_binding_leaves_the_launch_as_it_was() -> None:
    [found] = launches_of(plan())
    bound = found.bind(launch.Addresses(src_bases=1, dst_bases=2, src_pages=3, dst_pages=0))
    assert (bound.src.bases, bound.dst.bases, bound.src.pages, bound.dst.pages) == (1, 2, 3, 0)
    assert (found.params.src.bases, found.params.src.pages) == (0, 0)
