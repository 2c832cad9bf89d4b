"""Every kernel, for every pair of layouts, in one test body over the host simulator and a GPU, against the oracle."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from radixkv.pool.layout import LAYOUTS, Kind, Layout
from radixkv.transfer.launch import VECTOR_BYTES, Family

from . import backends, simulator
from .backends import Backend
from .cases import DIRECTIONS, PATTERNS, Case, check

PAIRS = list(itertools.product(LAYOUTS, LAYOUTS))
KINDS: tuple[Kind, ...] = ("mha", "mla")
FAMILIES: tuple[Family, ...] = ("copy", "relayout", "bulk")


@pytest.fixture(params=["hostsim", "cuda"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return backends.backend(request.param)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("src", "dst"), PAIRS)
def test_every_pair_of_layouts(
    backend: Backend, src: Layout, dst: Layout, kind: Kind, direction: str, family: Family
) -> None:
    """All layers, then each layer alone, in every direction and family."""
    case = Case(src=src, dst=dst, kind=kind, direction=direction, options={"family": family})
    [launch] = check(backend, case)
    assert launch.kernel.startswith(f"rkv_{family}")
    check(backend, replace(case, only=(1, 2)))


@pytest.mark.parametrize("page_size", [1, 7, 16, 64])
@pytest.mark.parametrize("layers", [1, 80])
@pytest.mark.parametrize("family", ["copy", "relayout"])
@pytest.mark.parametrize(("src", "dst"), PAIRS)
def test_page_sizes_and_layers(
    backend: Backend, src: Layout, dst: Layout, family: Family, layers: int, page_size: int
) -> None:
    case = Case(src=src, dst=dst, layers=layers, page_size=page_size, head_bytes=8, pages=2)
    check(backend, replace(case, options={"family": family}))


@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize(
    ("heads", "head_dim"), [(1, 8), (1, 33), (3, 5), (8, 128), (4, 256), (5, 72), (32, 128), (8, 1)]
)
@pytest.mark.parametrize("family", ["copy", "relayout"])
@pytest.mark.parametrize(("src", "dst"), [("layer_first", "page_first"), ("page_head", "layer_first"),
                                          ("page_first_direct", "page_first_direct")])  # fmt: skip
def test_rows(
    backend: Backend, src: Layout, dst: Layout, family: Family, heads: int, head_dim: int, itemsize: int
) -> None:
    """Rows of 8 bytes to 16 KiB, powers of two and odd, of every item width."""
    case = Case(src=src, dst=dst, heads=heads, head_bytes=head_dim * itemsize, pages=3, layers=2, page_size=3)
    check(backend, replace(case, options={"family": family}))
    check(backend, replace(case, kind="mla", head_bytes=heads * head_dim * itemsize, options={"family": "copy"}))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtypes", [("int32", "int32"), ("int64", "int64"), ("int32", "int64"), ("int64", "int32")])
@pytest.mark.parametrize("family", FAMILIES)
def test_page_lists(backend: Backend, family: Family, dtypes: tuple[str, str], pattern: str) -> None:
    case = Case(pattern=pattern, src_dtype=dtypes[0], dst_dtype=dtypes[1], pages=9, options={"family": family})
    launches = check(backend, case)
    assert len(launches) == (0 if pattern == "empty" else 1)
    if launches:
        bits = 32 if dtypes == ("int32", "int32") else 64
        assert launches[0].kernel.endswith(f"_i{bits}")


@pytest.mark.parametrize("shift", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("family", ["copy", "relayout"])
def test_the_vector_is_as_wide_as_the_bases_allow(backend: Backend, family: Family, shift: int) -> None:
    launches = check(backend, Case(shift=shift, head_bytes=64, options={"family": family}))
    assert f"_v{shift or 16}_" in launches[0].kernel


@pytest.mark.parametrize("vector_bytes", VECTOR_BYTES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("family", ["copy", "relayout"])
def test_every_vector_width(backend: Backend, family: Family, dtype: str, kind: Kind, vector_bytes: int) -> None:
    """Each kernel of the two families by name, over runs longer than what a unit or a tile holds."""
    options = {"family": family, "vector_bytes": vector_bytes}
    case = Case(kind=kind, src_dtype=dtype, dst_dtype=dtype, head_bytes=1040, dst="page_first_direct", options=options)
    [launch] = check(backend, case)
    assert f"_v{vector_bytes}_i{dtype[3:]}" in launch.kernel


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_bytes", [16, 4096, 4112, 20480])
def test_bulk_rings_go_round(backend: Backend, kind: Kind, head_bytes: int) -> None:
    """Runs below, at and above a slot, and more of them than the ring has slots."""
    case = Case(kind=kind, head_bytes=head_bytes, heads=1, layers=2, pages=7, options={"family": "bulk", "ctas": 2})
    check(backend, case)


@pytest.mark.parametrize("ctas", [1, 2, 3, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_quota_copies_everything(backend: Backend, family: Family, ctas: int) -> None:
    [launch] = check(backend, Case(pages=40, layers=6, head_bytes=256, options={"family": family, "ctas": ctas}))
    assert launch.grid <= ctas


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("mode", [simulator.LOOP, simulator.FIBRE])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_result_depends_on_the_order_of_threads(family: Family, mode: int, seed: int) -> None:
    mode = simulator.FIBRE if family == "relayout" else mode
    shuffled = backends.HostSim(simulator.Simulator(simulator.build(), mode=mode, seed=seed, block=96))
    check(shuffled, Case(head_bytes=176, options={"family": family}))
    check(shuffled, Case(src="page_head", head_bytes=48, kind="mla", options={"family": family}))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    case=st.builds(
        Case,
        src=st.sampled_from(LAYOUTS),
        dst=st.sampled_from(LAYOUTS),
        kind=st.sampled_from(KINDS),
        direction=st.sampled_from(list(DIRECTIONS)),
        layers=st.integers(1, 9),
        heads=st.integers(1, 6),
        head_bytes=st.integers(1, 200),
        page_size=st.integers(1, 9),
        pages=st.integers(1, 6),
        pattern=st.sampled_from(PATTERNS),
        src_dtype=st.sampled_from(["int32", "int64"]),
        dst_dtype=st.sampled_from(["int32", "int64"]),
        shift=st.integers(0, 17),
        options=st.builds(
            dict, family=st.sampled_from(["auto", "copy", "relayout"]), ctas=st.integers(1, 5)
        ),
    )
)
@pytest.mark.parametrize("name", ["hostsim", "cuda"])
def test_any_copy(name: str, case: Case) -> None:
    check(backends.backend(name), case)


def test_a_copy_within_one_pool(backend: Backend) -> None:
    """Defragmentation: source and destination pages of one view."""
    from radixkv.pool.layout import KVGeometry, view_of_layout
    from radixkv.transfer.plan import plan_copy

    g = KVGeometry(kind="mha", num_layers=2, num_heads=2, head_bytes=64, page_size=4)
    content = np.random.default_rng(5).integers(0, 256, (2, 10 * 4 * 2 * 128), dtype=np.uint8)
    block = backend.place(content, "device")
    view = view_of_layout("layer_first", g, 40, block.addresses, block.device)
    backend.run(plan_copy(g, view, view, [9, 3, 7], [0, 1, 2]))
    pages = content.reshape(2, 2, 10, -1).copy()
    pages[:, :, [0, 1, 2]] = pages[:, :, [9, 3, 7]]
    assert (block.read() == pages.reshape(2, -1)).all()
