"""libradixkv_cuda.so.1: its header, its planner beside Python's, its checks, and its launches on a fake driver."""

from __future__ import annotations

import ctypes as c
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radixkv.errors import InvalidArgumentError
from radixkv.pool.layout import LAYOUTS
from radixkv.transfer.launch import MAX_GRID, launches_of
from radixkv.transfer.plan import plan_copy

from ..abi.toolchain import EXAMPLES, INCLUDE, STRICT, library, run, tool
from . import c_launcher, simulator
from .c_launcher import ARGUMENT, NO_DEVICE, NO_DRIVER, OK, OVERLAP, RANGE, Copy, Launch, Library, copy_of
from .cases import Case, plan_of
from .simulator import ROOT

HEADER = INCLUDE / "radixkv" / "radixkv_cuda.h"
SHIPPED = library().parent / "libradixkv_cuda.so.1"
GLIBC_FLOOR = (2, 17)


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tool("gcc")
    return c_launcher.build(tmp_path_factory.mktemp("launcher"))


@pytest.fixture(scope="module")
def lib(launcher: Path) -> Library:
    return Library(launcher)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a fake libcuda.so.1."""
    folder = tmp_path_factory.mktemp("driver")
    sim = simulator.build()
    source = Path(__file__).with_name("fake_driver.cpp")
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", f"-Wl,-rpath,{sim.parent}"]
    run([tool("g++"), *flags, source, sim, "-Wl,-soname,libcuda.so.1", "-o", folder / "libcuda.so.1"])
    return folder


def functions() -> list[str]:
    return re.findall(r"^RKV_CUDA_API\b[^;(]*?\b(rkv_cuda_\w+)\(", HEADER.read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize(("compiler", "standard"), [("gcc", "c99"), ("clang", "c99"), ("g++", "c++17"),
                                                    ("clang++", "c++17")])  # fmt: skip
def test_the_header_is_strict(tmp_path: Path, compiler: str, standard: str) -> None:
    source = tmp_path / ("user.cpp" if "++" in compiler else "user.c")
    source.write_text(
        "#include <radixkv/radixkv_cuda.h>\n#include <radixkv/radixkv.h>\n"
        "int main(void) { rkv_cuda_launch plan; RKV_INIT(&plan); return RKV_CUDA_OK; }\n"
    )
    run([tool(compiler), f"-std={standard}", *STRICT, f"-I{INCLUDE}", "-fsyntax-only", source])


def test_ctypes_mirrors_the_header(tmp_path: Path) -> None:
    structs = {"geometry": c_launcher.Geometry, "view": c_launcher.View, "copy": Copy, "launch": Launch,
               "api": c_launcher.Api}  # fmt: skip
    fields = [(name, field[0]) for name, struct in structs.items() for field in struct._fields_]
    prints = [f'printf("%zu ", offsetof(rkv_cuda_{name}, {field}));' for name, field in fields]
    prints += [f'printf("%zu ", sizeof(rkv_cuda_{name}));' for name in structs]
    source = tmp_path / "probe.c"
    source.write_text(
        "#include <radixkv/radixkv_cuda.h>\n#include <stdio.h>\n"
        "int main(void) {\n" + "\n".join(prints) + "\nreturn 0; }\n"
    )
    run([tool("gcc"), "-std=c99", *STRICT, f"-I{INCLUDE}", source, "-o", tmp_path / "probe"])
    said = [int(word) for word in run([tmp_path / "probe"]).stdout.split()]
    offsets = [getattr(structs[name], field).offset for name, field in fields]
    assert said == offsets + [c.sizeof(struct) for struct in structs.values()]


def test_the_shipped_library_exports_the_header_and_needs_libc_alone() -> None:
    if not SHIPPED.exists():
        pytest.skip("built without nvcc: there is no libradixkv_cuda.so.1")
    defined = run([tool("nm"), "-D", "--defined-only", SHIPPED]).stdout.splitlines()
    assert {line.split()[-1] for line in defined} == set(functions())
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run([tool("readelf"), "-d", SHIPPED]).stdout)
    assert [name for name in needed if not name.startswith("ld-linux")] == ["libc.so.6"]
    undefined = run([tool("nm"), "-D", "--undefined-only", SHIPPED]).stdout
    assert not re.search(r"\bcu[A-Z]", undefined)
    versions = {tuple(map(int, found.split("."))) for found in re.findall(r"@GLIBC_([\d.]+)", undefined)}
    assert max(versions) <= GLIBC_FLOOR


def test_the_export_map_is_the_header() -> None:
    text = (ROOT / "csrc" / "cuda" / "export.map").read_text()
    exported = re.findall(r"^\s+(rkv_cuda_\w+);", text, flags=re.MULTILINE)
    assert exported == sorted(functions())
    assert len(exported) == 8


def test_the_table_is_the_header(lib: Library) -> None:
    table = lib.api(1)
    assert table is not None
    assert (table.struct_size, table.abi_version) == (c.sizeof(c_launcher.Api), 1)
    assert [name for name, _ in table._fields_[2:]] == [
        name.removeprefix("rkv_cuda_") for name in functions() if name != "rkv_cuda_get_api"
    ]
    for name in table._fields_[2:]:
        function = getattr(table, name[0])
        exported = getattr(lib._library, f"rkv_cuda_{name[0]}")
        assert c.cast(function, c.c_void_p).value == c.cast(exported, c.c_void_p).value
    assert (lib.api(0), lib.api(2)) == (None, None)


def test_a_library_whose_structs_have_grown_serves_an_old_host(tmp_path: Path) -> None:
    """Built against a header of the future; called with the structs of today."""
    include, header = tmp_path / "include" / "radixkv", HEADER.read_text()
    for name in ("geometry", "view", "copy", "launch"):
        header, grown = re.subn(rf"(\n}} rkv_cuda_{name};)", r"\n    uint64_t later[4];\1", header)
        assert grown == 1
    include.mkdir(parents=True)
    (include / "radixkv_cuda.h").write_text(header)
    future = Library(c_launcher.build(tmp_path, f"-I{include.parent}"))
    plan = case_plan(Case())
    copy = copy_of(plan)
    guarded = (c.c_ubyte * (c.sizeof(Launch) + 64))(*[0xEE] * (c.sizeof(Launch) + 64))
    launch = Launch.from_buffer(guarded)
    launch.struct_size = c.sizeof(Launch)
    assert future._library.rkv_cuda_plan(c.byref(copy), 0, c.byref(launch)) == OK, future.error()
    assert launch.num_pages == plan.num_pages
    assert bytes(guarded[c.sizeof(Launch) :]) == b"\xee" * 64
    _set("copy.struct_size", 71)(copy)
    assert future.plan(copy)[0] == ARGUMENT


def test_every_status_has_a_string(lib: Library) -> None:
    codes = dict(re.findall(r"(RKV_CUDA_(?:OK|ERR\w+|STATUS_END)) = (-?\d+)", HEADER.read_text()))
    strings = {lib.status_string(int(code)) for name, code in codes.items() if name != "RKV_CUDA_STATUS_END"}
    assert len(strings) == len(codes) - 1
    assert "unknown status" not in strings
    assert {lib.status_string(code) for code in (1, int(codes["RKV_CUDA_STATUS_END"]), -1000)} == {"unknown status"}


SRC, DST = [1 << 40, 2 << 40], [3 << 40, 4 << 40]


def case_plan(case: Case) -> Any:
    addresses = [[a + case.shift for a in side[: case.geometry.halves]] for side in (SRC, DST)]
    return plan_of(case, *addresses)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from(["int32", "int64"]),
    ctas=st.integers(1, 9) | st.just(2**32 - 1),
    case=st.builds(
        Case, src=st.sampled_from(LAYOUTS), dst=st.sampled_from(LAYOUTS), kind=st.sampled_from(["mha", "mla"]),
        layers=st.integers(1, 90), heads=st.integers(1, 9), head_bytes=st.integers(1, 4096),
        page_size=st.integers(1, 64), pages=st.integers(1, 50), shift=st.integers(0, 33),
        pattern=st.sampled_from(["single", "random", "reversed", "contiguous"]),
    ),
)  # fmt: skip
def test_both_planners_agree_byte_for_byte(lib: Library, case: Case, dtype: str, ctas: int) -> None:
    plan = case_plan(replace(case, src_dtype=dtype, dst_dtype=dtype))
    [expected] = launches_of(plan, family="copy", ctas=ctas)
    status, found = lib.plan(copy_of(plan, ctas))
    assert status == OK, lib.error()
    assert (found.kernel.decode(), found.grid, found.block) == (expected.kernel, expected.grid, expected.block)
    assert found.num_pages == expected.num_pages
    assert bytes(found.params)[: found.params_bytes] == bytes(expected.params)


def test_a_grid_has_an_end_in_both_planners(lib: Library) -> None:
    """2^27 units of 17 .. 31 vectors: 2^23 blocks would make 2^32 threads, and a step of 0 that never ends."""
    case = Case(kind="mla", heads=1, head_bytes=31, layers=80, page_size=64, pages=40_000, pattern="reversed")
    plan = case_plan(case)
    for family in ("copy", "relayout"):
        for launched in launches_of(plan, family=family, ctas=2**32 - 1):  # type: ignore[arg-type]
            assert launched.grid == MAX_GRID
    assert lib.plan(copy_of(plan, 2**32 - 1))[1].grid == MAX_GRID


def test_a_plan_of_no_more_pages(lib: Library) -> None:
    plan = case_plan(Case(pages=5))
    for first, left in ((0, 5), (2, 3), (5, 0), (9, 0)):
        status, found = lib.plan(copy_of(plan), first)
        assert (status, found.num_pages) == (OK, left)
    assert lib.plan(copy_of(case_plan(Case(pattern="empty"))))[1].num_pages == 0


def _set(field: str, value: Any) -> Callable[[Copy], None]:
    """Change a field given as "copy.num_pages", "geometry.halves", "src.bases" ..."""
    part, name = field.split(".")

    def change(copy: Copy) -> None:
        setattr(copy if part == "copy" else getattr(copy, part).contents, name, value)

    return change


IDS = {name: np.array(ids, dtype=np.int64) for name, ids in {
    "negative": [0, -1, 2, 3, 4], "beyond": [0, 1, 8, 3, 4], "twice": [0, 1, 2, 1, 4],
}.items()}  # fmt: skip

WRONG = [
    (_set("copy.struct_size", 8), ARGUMENT, "no copy, or a small one"),
    (_set("copy.index_bits", 16), ARGUMENT, "page ids of 16 bits"),
    (_set("copy.geometry", None), ARGUMENT, "no geometry"),
    (_set("copy.src", None), ARGUMENT, "no src view"),
    (_set("copy.dst_pages", None), ARGUMENT, "no destination pages"),
    (_set("geometry.struct_size", 4), ARGUMENT, "no geometry, or a small one"),
    (_set("geometry.halves", 3), ARGUMENT, "3 halves"),
    (_set("geometry.halves", 1), ARGUMENT, "one half (MLA) has one head, not 2"),
    (_set("geometry.page_size", 0), ARGUMENT, "all at least 1"),
    (_set("geometry.head_bytes", 1 << 31), ARGUMENT, "2 GiB"),
    (_set("src.bases", None), ARGUMENT, "without bases"),
    (_set("src.struct_size", 1), ARGUMENT, "no src view, a small one"),
    (_set("copy.struct_size", 71), ARGUMENT, "no copy, or a small one"),
    (_set("src.token_stride", 8), ARGUMENT, "a stride of 8"),
    (_set("dst.page_stride", 1 << 60), ARGUMENT, "a stride of"),
    (_set("dst.num_pages", 1 << 40), ARGUMENT, "dst has"),
    (_set("copy.num_layers", 4), RANGE, "4 layers from 0 on, of 3"),
    (_set("copy.num_layers", 0), RANGE, "0 layers"),
    (_set("copy.first_layer", 3), RANGE, "3 layers from 3 on, of 3"),
    (_set("copy.src_pages", IDS["negative"].ctypes.data), RANGE, "source page -1 at 1, and the pool has 8"),
    (_set("copy.src_pages", IDS["beyond"].ctypes.data), RANGE, "source page 8 at 2, and the pool has 8"),
    (_set("copy.dst_pages", IDS["twice"].ctypes.data), OVERLAP, "destination page 1 is given twice"),
]


@pytest.mark.parametrize(("change", "status", "said"), WRONG, ids=[said for _, _, said in WRONG])
def test_wrong_arguments_are_refused(
    lib: Library, change: Callable[[Copy], None], status: int, said: str
) -> None:
    plan = case_plan(Case())
    copy = copy_of(plan)
    assert lib.plan(copy)[0] == OK
    change(copy)
    assert lib.plan(copy)[0] == status
    assert said in lib.error()


def test_no_copy_and_no_launch(lib: Library) -> None:
    assert lib.plan(None)[0] == ARGUMENT
    copy = copy_of(case_plan(Case()))
    assert lib._library.rkv_cuda_plan(c.byref(copy), 0, None) == ARGUMENT
    assert lib._library.rkv_cuda_open(0, None) == ARGUMENT
    assert lib._library.rkv_cuda_copy_pages(None, c.byref(copy), None) == ARGUMENT
    lib.close(None)


def test_a_null_base_and_memory_that_overlaps(lib: Library) -> None:
    plan = case_plan(Case())
    bases = plan.src.bases.copy()
    bases[1, 2] = 0
    assert lib.plan(copy_of(replace(plan, src=replace(plan.src, bases=bases))))[0] == ARGUMENT
    assert lib.error() == "base 5 of src is NULL"
    apart = replace(plan, dst=plan.src, src_pages=np.array([1, 2]), dst_pages=np.array([3, 0]))
    assert lib.plan(copy_of(apart))[0] == OK
    within = replace(apart, dst_pages=np.array([3, 2]))
    assert lib.plan(copy_of(within))[0] == OVERLAP
    assert lib.error() == "page 2 is both source and destination"
    shifted = replace(plan.src, bases=plan.src.bases + np.uint64(64))
    assert lib.plan(copy_of(replace(apart, dst=shifted)))[0] == OVERLAP
    assert "two views of one memory" in lib.error()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data(), case=st.builds(
    Case, src=st.sampled_from(LAYOUTS), dst=st.sampled_from(LAYOUTS), kind=st.sampled_from(["mha", "mla"]),
    layers=st.integers(1, 4), heads=st.integers(1, 3), head_bytes=st.integers(1, 9), page_size=st.integers(1, 3),
    pages=st.integers(1, 3), pattern=st.just("contiguous"),
))  # fmt: skip
def test_layers_that_overlap_are_refused_in_the_same_words(lib: Library, data: st.DataObject, case: Case) -> None:
    """One base of the destination is moved by a little: both planners say yes, or both no, and in which words."""
    plan = case_plan(case)
    bases = plan.dst.bases.copy()
    half, layer = data.draw(st.integers(0, bases.shape[0] - 1)), data.draw(st.integers(0, bases.shape[1] - 1))
    other = data.draw(st.integers(0, bases.shape[1] - 1))
    bases[half, layer] = int(bases[0, other]) + data.draw(st.integers(-200, 200))
    dst = replace(plan.dst, bases=bases)
    status, _ = lib.plan(copy_of(replace(plan, dst=dst)))
    said = None
    try:
        plan_copy(plan.geometry, plan.src, dst, plan.src_pages, plan.dst_pages)
    except InvalidArgumentError as error:
        said = str(error)
    assert (status, lib.error()) == (OVERLAP, said) if said else status == OK
    assert said is None or "two layers or halves of dst overlap: those at 0x" in said


def test_copies_and_failures_on_a_fake_driver(launcher: Path, driver: Path) -> None:
    env = os.environ | {"LD_LIBRARY_PATH": str(driver)}
    command = [sys.executable, "-m", "tests.kernels.c_launcher", str(launcher)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr[-4000:]


@pytest.fixture(scope="module")
def gather(launcher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("gather") / "gather"
    link = [launcher, f"-Wl,-rpath,{launcher.parent}", "-ldl"]
    run([tool("gcc"), "-std=c99", *STRICT, f"-I{INCLUDE}", EXAMPLES / "gather.c", *link, "-o", program])
    return program


def test_the_example_gathers_pages_on_a_fake_driver(gather: Path, driver: Path) -> None:
    said = run([gather], env={"LD_LIBRARY_PATH": str(driver)}).stdout
    assert said == "gathered 3 pages of 2 layers; refused: source page 2 at 2, and the pool has 2\n"


@pytest.mark.parametrize(("env", "status", "said"), [
    ({"FAKE_CUDA_FAIL": "cuInit:100"}, NO_DEVICE, "cuInit: fake error 100"),
    ({"FAKE_CUDA_FAIL": "cuInit:803"}, NO_DRIVER, "cuInit: fake error 803"),
    ({"FAKE_CUDA_DEVICES": "0"}, NO_DEVICE, "GPU 0 of 0"),
])  # fmt: skip
def test_the_example_without_a_gpu(
    gather: Path, lib: Library, driver: Path, env: dict[str, str], status: int, said: str
) -> None:
    assert run([gather], env=env | {"LD_LIBRARY_PATH": str(driver)}).stdout == f"{lib.status_string(status)}: {said}\n"


def test_the_example_without_a_driver(gather: Path, lib: Library, tmp_path: Path) -> None:
    """A library that is no driver stands in front of any that there is."""
    (tmp_path / "empty.c").write_text("int nothing;\n")
    fake = tmp_path / "libcuda.so.1"
    run([tool("gcc"), "-shared", "-fPIC", tmp_path / "empty.c", "-Wl,-soname,libcuda.so.1", "-o", fake])
    said = run([gather], env={"LD_LIBRARY_PATH": str(tmp_path)}).stdout
    assert said == f"{lib.status_string(NO_DRIVER)}: the driver has no cuInit: it is older than CUDA 11.2\n"


def test_the_example_with_the_shipped_library(tmp_path: Path) -> None:
    """On this machine as it is: it gathers, or says what is missing; both are no failure."""
    if not SHIPPED.exists():
        pytest.skip("built without nvcc: there is no libradixkv_cuda.so.1")
    flags = ["-std=c99", *STRICT, f"-I{INCLUDE}"]
    link = [SHIPPED, f"-Wl,-rpath,{SHIPPED.parent}", "-ldl"]
    run([tool("gcc"), *flags, EXAMPLES / "gather.c", *link, "-o", tmp_path / "gather"])
    said = run([tmp_path / "gather"]).stdout
    without = () if os.environ.get("RADIXKV_REQUIRE_GPU") == "1" else ("no CUDA driver: ", "no such GPU: ")
    assert said.startswith(("gathered 3 pages", *without))
