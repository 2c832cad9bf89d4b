"""Gates that need a compiler and no GPU: registers, spills, instructions, and NVRTC."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from radixkv.transfer.cuda import kernel_source

from ..abi.toolchain import missing
from . import gates

RECORDED = json.loads(gates.RECORD.read_text())

Compiled = tuple[Path, dict[str, gates.Resources]]

COPIES = {f"rkv_copy_{kind}_v{v}_i{i}" for kind in ("mha", "mla") for v in (16, 8, 4, 2, 1) for i in (32, 64)}
RELAYOUTS = {f"rkv_relayout_v{v}_i{i}" for v in (16, 8, 4, 2, 1) for i in (32, 64)}
BULKS = {f"rkv_bulk_{kind}_i{i}" for kind in ("mha", "mla") for i in (32, 64)}


def kernels_of(arch: str) -> set[str]:
    return COPIES | RELAYOUTS | (BULKS if arch != "sm_80" else set())


@pytest.fixture(scope="module", params=gates.ARCHS)
def arch(request: pytest.FixtureRequest) -> str:
    if gates.nvcc_release() is None:
        missing("nvcc is not installed (pip install radixkv[gates])")
    return str(request.param)


@pytest.fixture(scope="module")
def compiled(arch: str, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    cubin = tmp_path_factory.mktemp(arch) / "all.cubin"
    return cubin, gates.compile_cubin(arch, cubin)


@pytest.fixture(scope="module")
def code(compiled: Compiled) -> dict[str, list[str]]:
    if gates.find_nvdisasm() is None:
        missing("nvdisasm is not installed (pip install radixkv[gates])")
    return gates.disassemble(compiled[0])


def test_every_kernel_compiles(arch: str, compiled: Compiled) -> None:
    assert set(compiled[1]) == kernels_of(arch)


def test_no_stack_and_no_spills(compiled: Compiled) -> None:
    wrong = {name: r for name, r in compiled[1].items() if r.stack or r.spill_stores or r.spill_loads}
    assert not wrong


def test_registers_stay_within_the_record(arch: str, compiled: Compiled) -> None:
    release = gates.nvcc_release()
    if release not in RECORDED:
        missing(f"registers are recorded for nvcc {', '.join(RECORDED)}, and this is {release}")
    recorded = RECORDED[release][arch]
    assert set(recorded) == kernels_of(arch)
    more = {name: (r.registers, recorded[name]) for name, r in compiled[1].items() if r.registers > recorded[name]}
    assert not more, f"(registers, recorded): {more}"


def test_512_threads_fit_an_sm_twice(compiled: Compiled) -> None:
    """65,536 registers an SM: at most 64 a thread leaves room for two blocks of 512."""
    assert {name: r.registers for name, r in compiled[1].items() if r.registers > 64} == {}


def test_no_local_memory_and_no_calls(arch: str, code: dict[str, list[str]]) -> None:
    assert set(code) == kernels_of(arch)
    assert banned(code) == set()


def banned(code: dict[str, list[str]]) -> set[tuple[str, str]]:
    """Local memory, and calls of subroutines with their returns."""
    return {(name, op) for name, ops in code.items() for op in ops if op.startswith(("LDL", "STL", "CALL", "RET"))}


def test_a_division_and_local_memory_would_be_seen(arch: str, tmp_path: Path) -> None:
    if gates.find_nvdisasm() is None:
        missing("nvdisasm is not installed (pip install radixkv[gates])")
    source = tmp_path / "bad.cu"
    source.write_text(
        'extern "C" __global__ void divides(long long *p) { p[0] = p[1] / p[2]; }\n'
        'extern "C" __global__ void indexes(int *p, int at) {\n'
        "    int a[64];\n    for (int i = 0; i < 64; i++) a[i * at % 64] = p[i];\n    p[0] = a[p[1]];\n}\n"
    )
    resources = gates.compile_cubin(arch, tmp_path / "bad.cubin", source)
    assert resources["indexes"].stack > 0
    seen = {(name, op.split(".")[0]) for name, op in banned(gates.disassemble(tmp_path / "bad.cubin"))}
    assert {("divides", "CALL"), ("indexes", "LDL"), ("indexes", "STL")} <= seen


@pytest.mark.parametrize("name", sorted(COPIES))
def test_a_copy_issues_its_loads_before_its_stores(code: dict[str, list[str]], name: str) -> None:
    """Eight loads of the vector's width, past L1, then eight streaming stores; 128 bits in the 16-byte variants."""
    width = {"v16": ".128", "v8": ".64", "v4": "", "v2": ".U16", "v1": ".U8"}[name.split("_")[3]]
    loads = [i for i, op in enumerate(code[name]) if op == f"LDG.E.NA{width}.CONSTANT"]
    stores = [i for i, op in enumerate(code[name]) if op == f"STG.E.EF{width}"]
    assert (len(loads), len(stores)) == (8, 8)
    assert max(loads) < min(stores)


@pytest.mark.parametrize("name", sorted(RELAYOUTS))
def test_a_relayout_has_four_loads_in_flight(code: dict[str, list[str]], name: str) -> None:
    """Loads go out in fours: the first tile's, the rest of a tile's, the next tile's. The next tile's are on their way
    before this one's first store, and nothing but the way into shared memory waits for them."""
    width = {"v16": ".128", "v8": ".64", "v4": "", "v2": ".U16", "v1": ".U8"}[name.split("_")[2]]
    loads = [i for i, op in enumerate(code[name]) if op.startswith("LDG") and f"NA{width}.CONSTANT" in op]
    staged = [i for i, op in enumerate(code[name]) if op == f"STS{width}"]
    stored = [i for i, op in enumerate(code[name]) if op == f"STG.E.EF{width}"]
    full, empty = [i for i, op in enumerate(code[name]) if op.startswith("BAR.")]
    assert (len(loads), len(staged), len(stored)) == (12, 4, 1)
    assert max(loads[:4]) < min(staged)
    assert max(loads[:8]) < full
    assert full < min(loads[8:])
    assert max(loads[8:]) < stored[0] < empty


def test_bulk_kernels_use_the_copy_engine(arch: str, code: dict[str, list[str]]) -> None:
    for name in sorted(BULKS & kernels_of(arch)):
        engine = {op.split(".")[0] + "." + op.split(".")[1] for op in code[name] if op.startswith("UBLKCP")}
        assert engine == {"UBLKCP.S", "UBLKCP.G"}, name
        assert [op for op in code[name] if op.startswith("STG")] == [], name


@pytest.mark.parametrize("arch_name", gates.ARCHS)
def test_nvrtc_compiles_the_same_source_without_a_driver(arch_name: str) -> None:
    libraries = gates.packaged("*/lib/libnvrtc.so.*")
    if not libraries:
        missing("NVRTC is not installed (pip install radixkv[gates])")
    cubin = gates.compile_with_nvrtc(libraries[0], kernel_source(), arch_name)
    assert cubin.startswith(b"\x7fELF")
    assert [name for name in kernels_of(arch_name) if name.encode() not in cubin] == []


def test_cupys_nvrtc_compiles_it_too() -> None:
    try:
        nvrtc = importlib.import_module("cupy").cuda.nvrtc
        nvrtc.getVersion()
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"no NVRTC through CuPy: {error}")
    program = nvrtc.createProgram(kernel_source(), "radixkv.cu", [], [])
    nvrtc.compileProgram(program, ("--gpu-architecture=sm_90", "-std=c++17"))
    assert nvrtc.getCUBIN(program).startswith(b"\x7fELF")


def test_the_flat_source_has_each_file_once() -> None:
    source = kernel_source()
    includes = [line for line in source.splitlines() if line.startswith("#include")]
    assert includes == ["#include <stdint.h>", '#include "hostsim.h"']
    for guard in ("params.h", "device.cuh", "layouts.cuh"):
        macro = f"RADIXKV_KERNELS_{guard.replace('.', '_').upper()}"
        assert source.count(f"#define {macro}\n") == 1
