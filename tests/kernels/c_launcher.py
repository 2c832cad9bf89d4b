"""libradixkv_cuda through ctypes: its structs, a build for tests, and a run against a fake driver.

    python -m tests.kernels.c_launcher LIBRARY        with a fake libcuda.so.1 on LD_LIBRARY_PATH; says "done" last
"""

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

from radixkv.pool.layout import KVGeometry, KVView
from radixkv.transfer.plan import CopyPlan

from .cases import Case, plan_of, same
from .oracle import expect_copy
from .simulator import KERNELS, ROOT

OK, ARGUMENT, RANGE, OVERLAP, NO_DRIVER, NO_DEVICE, NO_KERNELS, DRIVER, NO_MEMORY, UNREACHABLE = range(0, -10, -1)


class Geometry(c.Structure):
    _fields_ = tuple(
        (name, c.c_uint32) for name in ("struct_size", "halves", "num_layers", "num_heads", "head_bytes", "page_size")
    )


class View(c.Structure):
    _fields_ = (
        ("struct_size", c.c_uint32),
        ("reserved", c.c_uint32),
        ("bases", c.c_void_p),
        ("num_pages", c.c_uint64),
        ("page_stride", c.c_uint64),
        ("token_stride", c.c_uint64),
        ("head_stride", c.c_uint64),
    )


class Copy(c.Structure):
    _fields_ = (
        ("struct_size", c.c_uint32),
        ("index_bits", c.c_uint32),
        ("geometry", c.POINTER(Geometry)),
        ("src", c.POINTER(View)),
        ("dst", c.POINTER(View)),
        ("src_pages", c.c_void_p),
        ("dst_pages", c.c_void_p),
        ("num_pages", c.c_uint64),
        ("first_layer", c.c_uint32),
        ("num_layers", c.c_uint32),
        ("max_blocks", c.c_uint32),
        ("reserved", c.c_uint32),
    )


class Launch(c.Structure):
    _fields_ = (
        ("struct_size", c.c_uint32),
        ("grid", c.c_uint32),
        ("block", c.c_uint32),
        ("params_bytes", c.c_uint32),
        ("num_pages", c.c_uint64),
        ("kernel", c.c_char * 48),
        ("params", c.c_ubyte * 192),
    )


LayerFn = c.CFUNCTYPE(None, c.c_uint32, c.c_void_p)


class Api(c.Structure):
    _fields_ = (
        ("struct_size", c.c_uint32),
        ("abi_version", c.c_uint32),
        ("status_string", c.CFUNCTYPE(c.c_char_p, c.c_int32)),
        ("last_error", c.CFUNCTYPE(c.c_char_p)),
        ("plan", c.CFUNCTYPE(c.c_int32, c.c_void_p, c.c_uint64, c.c_void_p)),
        ("open", c.CFUNCTYPE(c.c_int32, c.c_int32, c.c_void_p)),
        ("close", c.CFUNCTYPE(None, c.c_void_p)),
        ("copy_pages", c.CFUNCTYPE(c.c_int32, c.c_void_p, c.c_void_p, c.c_void_p)),
        ("copy_layers", c.CFUNCTYPE(c.c_int32, c.c_void_p, c.c_void_p, c.c_void_p, LayerFn, c.c_void_p)),
    )


def geometry_of(g: KVGeometry) -> Geometry:
    return Geometry(c.sizeof(Geometry), g.halves, g.num_layers, g.num_heads, g.head_bytes, g.page_size)


def view_of(view: KVView, page_size: int) -> View:
    """bases stay the KVView's: it must outlive this."""
    pages = view.num_slots // page_size
    strides = view.page_stride, view.token_stride, view.head_stride
    return View(c.sizeof(View), 0, view.bases.ctypes.data, pages, *strides)


def copy_of(plan: CopyPlan, max_blocks: int = 0) -> Copy:
    """The plan must outlive this; both of its lists have one dtype."""
    assert plan.src_pages.dtype == plan.dst_pages.dtype
    size = plan.geometry.page_size
    return Copy(
        struct_size=c.sizeof(Copy),
        index_bits=plan.src_pages.itemsize * 8,
        geometry=c.pointer(geometry_of(plan.geometry)),
        src=c.pointer(view_of(plan.src, size)),
        dst=c.pointer(view_of(plan.dst, size)),
        src_pages=plan.src_pages.ctypes.data,
        dst_pages=plan.dst_pages.ctypes.data,
        num_pages=plan.num_pages,
        first_layer=plan.layers.start,
        num_layers=len(plan.layers),
        max_blocks=max_blocks,
    )


class Library:
    def __init__(self, path: Path) -> None:
        self._library = c.CDLL(str(path))
        self._library.rkv_cuda_last_error.restype = c.c_char_p
        self._library.rkv_cuda_status_string.restype = c.c_char_p
        self._library.rkv_cuda_close.argtypes = (c.c_void_p,)
        self._library.rkv_cuda_copy_pages.argtypes = (c.c_void_p, c.c_void_p, c.c_void_p)
        self._library.rkv_cuda_plan.argtypes = (c.c_void_p, c.c_uint64, c.c_void_p)
        self._library.rkv_cuda_copy_layers.argtypes = (c.c_void_p, c.c_void_p, c.c_void_p, LayerFn, c.c_void_p)
        self._library.rkv_cuda_get_api.restype = c.POINTER(Api)
        self.close = self._library.rkv_cuda_close

    def plan(self, copy: Copy | None, first: int = 0) -> tuple[int, Launch]:
        launch = Launch(struct_size=c.sizeof(Launch))
        given = c.byref(copy) if copy is not None else None
        return int(self._library.rkv_cuda_plan(given, first, c.byref(launch))), launch

    def open(self, device: int) -> tuple[int, Any]:
        handle = c.c_void_p()
        return int(self._library.rkv_cuda_open(device, c.byref(handle))), handle

    def copy_pages(self, handle: Any, copy: Copy) -> int:
        return int(self._library.rkv_cuda_copy_pages(handle, c.byref(copy), None))

    def copy_layers(self, handle: Any, copy: Copy, after_layer: Callable[[int], None] | None) -> int:
        call = LayerFn() if after_layer is None else LayerFn(lambda layer, _: after_layer(layer))
        return int(self._library.rkv_cuda_copy_layers(handle, c.byref(copy), None, call, None))

    def api(self, version: int) -> Api | None:
        table = self._library.rkv_cuda_get_api(version)
        return table.contents if table else None

    def error(self) -> str:
        return str(self._library.rkv_cuda_last_error().decode())

    def status_string(self, status: int) -> str:
        return str(self._library.rkv_cuda_status_string(status).decode())


def build(folder: Path, *flags: str) -> Path:
    """The launcher with an empty fatbin, which needs no nvcc."""
    library, stub = folder / "libradixkv_cuda.so.1", folder / "stub.c"
    stub.write_text("const unsigned char rkv_cuda_fatbin[16] = {0};\n")
    sources = [ROOT / "csrc" / "cuda" / "plan.c", ROOT / "csrc" / "cuda" / "launch.c", stub]
    command = ["gcc", "-std=gnu11", "-O1", "-g", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-DRKV_BUILDING"]
    command += [*flags, f"-I{ROOT / 'csrc' / 'include'}", f"-I{KERNELS}", *map(str, sources), "-o", str(library)]
    subprocess.run([*command, "-pthread", "-ldl", "-Wl,-soname,libradixkv_cuda.so.1"], check=True)
    return library


def main(path: str) -> None:
    """Copies through the fake driver, then every failure that it can have: nothing is ever left behind."""
    library = Library(Path(path))
    status, handle = library.open(0)
    assert status == OK, library.error()
    fake: Any = c.CDLL("libcuda.so.1")

    def held() -> list[int]:
        return [fake.fake_cuda_balance(what) for what in range(4)]

    at_rest = [0, 1, 0, 1]
    assert held() == at_rest
    for case in (
        Case(pattern="random"), Case(pattern="contiguous", kind="mla"), Case(dst="page_head", only=(1, 3)),
        Case(pattern="reversed", src_dtype="int32", dst_dtype="int32", head_bytes=9), Case(pattern="empty"),
    ):  # fmt: skip
        _check(library, handle, case)
        assert held() == at_rest
    small = Case()
    memory = _memory(small)
    plan = plan_of(small, *memory[2:])
    _check_layers(library, handle, fake)
    _check_reach(library, handle, fake)
    assert held() == at_rest
    for name, code, expected in (
        ("cuCtxPushCurrent_v2", 201, DRIVER), ("cuMemAllocAsync", 2, NO_MEMORY), ("cuMemcpyHtoDAsync_v2", 700, DRIVER),
        ("cuLaunchKernel", 719, DRIVER), ("cuEventRecord", 700, DRIVER), ("cuPointerGetAttribute", 700, DRIVER),
    ):  # fmt: skip
        os.environ["FAKE_CUDA_FAIL"] = f"{name}:{code}"
        assert library.copy_pages(handle, copy_of(plan)) == expected, name
        assert f"fake error {code}" in library.error()
        assert held() == at_rest, name
    for name, code, expected in (
        ("cuDeviceGetCount", 3, DRIVER), ("cuDeviceGet", 101, DRIVER), ("cuDevicePrimaryCtxRetain", 2, NO_MEMORY),
        ("cuCtxPushCurrent_v2", 201, DRIVER), ("cuModuleLoadData", 209, NO_KERNELS),
    ):  # fmt: skip
        os.environ["FAKE_CUDA_FAIL"] = f"{name}:{code}"
        status, other = library.open(0)
        assert (status, other.value) == (expected, None), name
        assert f"fake error {code}" in library.error()
        assert held() == at_rest, name
    del os.environ["FAKE_CUDA_FAIL"]
    _check_first_use(library, fake, plan)
    _check_staging(library, handle, fake)
    assert library.open(1)[0] == NO_DEVICE
    assert library.error() == "GPU 1 of 1"
    assert library.open(-1)[0] == NO_DEVICE
    library.close(handle)
    assert held() == [0, 0, 0, 0]
    assert [fake.fake_cuda_balance(what) for what in (7, 8)] == [0, 0], "page-locked memory and events"
    print("done")


def _memory(case: Case) -> tuple[Any, Any, list[int], list[int]]:
    g = case.geometry
    half = g.num_layers * g.row_bytes * g.page_size
    src = np.random.default_rng(2).integers(0, 256, (g.halves, (case.pages + 3) * half), dtype=np.uint8)
    dst = np.full((g.halves, (case.pages + 2) * half), 0xEE, dtype=np.uint8)
    return src, dst, [int(h.ctypes.data) for h in src], [int(h.ctypes.data) for h in dst]


def _check_layers(library: Library, handle: Any, fake: Any) -> None:
    """One upload for all layers; each is in place when its call comes, and none after it."""
    _follow_layers(library, handle, fake, Case(layers=5, only=(1, 4)))
    _follow_layers(library, handle, fake, Case(kind="mla", dst="page_head", pattern="contiguous"))
    case = Case(kind="mla", only=(1, 3))
    memory = _memory(case)
    plan, empty = (plan_of(replace(case, pattern=pattern), *memory[2:]) for pattern in ("random", "empty"))
    assert library.copy_layers(handle, copy_of(plan), None) == OK
    calls: list[int] = []
    assert library.copy_layers(handle, copy_of(empty), calls.append) == OK
    assert calls == [1, 2]
    calls.clear()
    os.environ["FAKE_CUDA_FAIL"] = "cuLaunchKernel:719"
    assert library.copy_layers(handle, copy_of(plan), calls.append) == DRIVER
    assert calls == []
    del os.environ["FAKE_CUDA_FAIL"]


def _follow_layers(library: Library, handle: Any, fake: Any, case: Case) -> None:
    src, dst, src_at, dst_at = _memory(case)
    plan = plan_of(case, src_at, dst_at)
    g = case.geometry
    sizes = ((case.pages + 3) * g.page_size, (case.pages + 2) * g.page_size)
    lists = plan.src_pages.tolist(), plan.dst_pages.tolist()
    before = dst.copy()
    seen = []

    def after(layer: int) -> None:
        done = range(case.layer_range.start, layer + 1)
        expected = expect_copy(g, (case.src, sizes[0], src), (case.dst, sizes[1], before), *lists, done)
        seen.append((layer, bool((dst == expected).all()), fake.fake_cuda_balance(2)))

    uploads = fake.fake_cuda_balance(5)
    assert library.copy_layers(handle, copy_of(plan), after) == OK, library.error()
    assert fake.fake_cuda_balance(5) == uploads + 1
    assert seen == [(layer, True, 1) for layer in case.layer_range]  # with the context current


def _check_first_use(library: Library, fake: Any, plan: CopyPlan) -> None:
    """What a handle asks the driver for once: a failure leaves nothing behind, and it is asked again."""
    status, handle = library.open(0)
    assert status == OK
    before = [fake.fake_cuda_balance(what) for what in (0, 2, 7, 8)]
    for name, code, expected in (
        ("cuEventCreate", 2, NO_MEMORY), ("cuMemHostAlloc", 2, NO_MEMORY), ("cuModuleGetFunction", 500, DRIVER)
    ):  # fmt: skip
        os.environ["FAKE_CUDA_FAIL"] = f"{name}:{code}"
        assert library.copy_pages(handle, copy_of(plan)) == expected, name
        assert f"fake error {code}" in library.error()
    del os.environ["FAKE_CUDA_FAIL"]
    lookups = fake.fake_cuda_balance(9)
    for _ in range(3):
        assert library.copy_pages(handle, copy_of(plan)) == OK
    assert fake.fake_cuda_balance(9) == lookups + 1, "a function is looked up once"
    assert fake.fake_cuda_balance(7) == before[2] + 1, "a copy that is done gives its slot to the next"
    library.close(handle)
    assert [fake.fake_cuda_balance(what) for what in (0, 2, 7, 8)] == before


def _check_staging(library: Library, handle: Any, fake: Any) -> None:
    """Copies on a stream that does nothing before somebody waits: each must find its own page ids, however many are
    under way. Reused too early, a slot would give the ids of another copy."""
    case = Case(pages=8)
    g, copies = case.geometry, 40
    src, dst, src_at, _ = _memory(case)
    targets = [dst.copy() for _ in range(copies)]
    rng = np.random.default_rng(5)
    plans = []
    for target in targets:
        plan = plan_of(case, src_at, [int(half.ctypes.data) for half in target])
        ids = rng.permutation(case.pages)
        plans.append(replace(plan, src_pages=plan.src_pages[ids], dst_pages=plan.dst_pages[ids[::-1]].copy()))
    os.environ["FAKE_CUDA_LAZY"] = "1"
    waits = fake.fake_cuda_balance(10)
    for plan in plans:
        assert library.copy_pages(handle, copy_of(plan)) == OK, library.error()
    assert fake.fake_cuda_balance(7) <= 16
    assert fake.fake_cuda_balance(10) - waits == copies - 16, "only a full ring waits"
    assert (targets[-1] == dst).all(), "nobody has waited for the last"
    fake.cuStreamSynchronize(None)
    del os.environ["FAKE_CUDA_LAZY"]
    for plan, target in zip(plans, targets, strict=True):
        sizes = ((case.pages + 3) * g.page_size, (case.pages + 2) * g.page_size)
        lists = plan.src_pages.tolist(), plan.dst_pages.tolist()
        expected = expect_copy(g, (case.src, sizes[0], src), (case.dst, sizes[1], dst), *lists, case.layer_range)
        assert (target == expected).all()


def _check_reach(library: Library, handle: Any, fake: Any) -> None:
    """Memory that the driver does not know, in the first chunk, one in the middle and the last, on each side."""
    case = Case(pages=40, head_bytes=512, dst="layer_first")
    memory = _memory(case)
    plan = plan_of(case, *memory[2:])
    for chunk in ("65536", "4096", "0", "1048576"):
        os.environ["FAKE_CUDA_CHUNK"] = chunk
        launches, asked = fake.fake_cuda_balance(4), fake.fake_cuda_balance(6)
        assert library.copy_pages(handle, copy_of(plan)) == OK, library.error()
        if chunk == "1048576":  # a pool in one or two chunks is three questions a chunk, not some for each layer
            assert fake.fake_cuda_balance(6) - asked <= 2 * 2 * 2 * 3
        assert fake.fake_cuda_balance(4) == launches + 1
        for side, view in (("src", plan.src), ("dst", plan.dst)):
            first = int(view.bases.min())
            last = int(view.bases.max()) + (view.num_slots // case.page_size) * view.page_stride - 1
            middle = [(first + last) // 2] if chunk != "0" else []
            for address in (first, last, *middle):
                os.environ["FAKE_CUDA_HOLE"] = str(address)
                launches = fake.fake_cuda_balance(4)
                assert library.copy_pages(handle, copy_of(plan)) == UNREACHABLE
                either = side if chunk == "0" else "src|dst"  # both may lie in one chunk
                said = rf"({either}): 0x[0-9a-f]+ is memory that the driver does not know; page-lock host pools first"
                assert re.fullmatch(said, library.error())
                assert fake.fake_cuda_balance(4) == launches
            del os.environ["FAKE_CUDA_HOLE"]
            os.environ["FAKE_CUDA_MOVED"] = str(first)
            assert library.copy_pages(handle, copy_of(plan)) == UNREACHABLE
            assert library.error() == f"{side}: {first:#x} is at {first + 4096:#x} on the device"
            del os.environ["FAKE_CUDA_MOVED"]
    del os.environ["FAKE_CUDA_CHUNK"]


def _check(library: Library, handle: Any, case: Case) -> None:
    src, dst, src_at, dst_at = _memory(case)
    plan = plan_of(case, src_at, dst_at)
    g = case.geometry
    sizes = ((case.pages + 3) * g.page_size, (case.pages + 2) * g.page_size)
    lists = plan.src_pages.tolist(), plan.dst_pages.tolist()
    expected = expect_copy(g, (case.src, sizes[0], src), (case.dst, sizes[1], dst), *lists, case.layer_range)
    status = library.copy_pages(handle, copy_of(plan))
    assert status == OK, library.error()
    same(dst, expected, "destination")


if __name__ == "__main__":
    main(*sys.argv[1:])
