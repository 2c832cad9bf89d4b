"""radixkv.transfer.cuda with no GPU: what it says is missing, and what it does on a CuPy that simulates."""

from __future__ import annotations

import ctypes
import importlib
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radixkv.errors import DeviceUnavailableError, InvalidArgumentError, TransferError
from radixkv.pool.layout import KVGeometry, view_of_layout
from radixkv.transfer import cuda, staging
from radixkv.transfer.cuda import CudaKernels
from radixkv.transfer.launch import launches_of, layer_launches
from radixkv.transfer.plan import CopyPlan, plan_copy, reach_of

from .fake_cupy import FakeCupy
from .oracle import Bytes, expect_copy

STREAM = 0x57
GEOMETRY = KVGeometry(kind="mha", num_layers=3, num_heads=2, head_bytes=32, page_size=4)
SLOTS = 32
HALF = GEOMETRY.num_layers * SLOTS * GEOMETRY.row_bytes


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)  # type: ignore[arg-type]
    return fake


class Pools:
    """A device pool and a host pool, page-locked or not, as the fake sees them."""

    def __init__(self, cupy: FakeCupy, locked: bool = True) -> None:
        rng = np.random.default_rng(3)
        self.device = rng.integers(0, 256, (2, HALF), dtype=np.uint8)
        self.host = np.full((2, HALF), 0xEE, dtype=np.uint8)
        self.views = {}
        for name, layout, memory, device in (
            ("cuda:0", "layer_first", self.device, 0), ("cpu", "page_head", self.host, -1)
        ):  # fmt: skip
            addresses = [int(half.ctypes.data) for half in memory]
            view = view_of_layout(layout, GEOMETRY, SLOTS, addresses, name)  # type: ignore[arg-type]
            for base in map(int, view.bases.flat):
                for address in (base, base + reach_of(GEOMETRY, view) - 1):
                    if device == 0 or locked:
                        cupy.known[address] = (device, address)
            self.views[name] = view

    def backup(self, src_pages: list[int], dst_pages: list[int]) -> CopyPlan:
        return plan_copy(GEOMETRY, self.views["cuda:0"], self.views["cpu"], src_pages, dst_pages)

    def expected(self, src_pages: list[int], dst_pages: list[int]) -> Bytes:
        src, dst = ("layer_first", SLOTS, self.device), ("page_head", SLOTS, np.full_like(self.host, 0xEE))
        return expect_copy(GEOMETRY, src, dst, src_pages, dst_pages, range(3))


def test_a_copy_goes_on_the_callers_stream_in_order(cupy: FakeCupy) -> None:
    pools = Pools(cupy)
    src, dst = [5, 1, 7], [2, 0, 6]
    kernels = CudaKernels()
    [launch] = kernels.run(pools.backup(src, dst), stream=STREAM)
    assert (pools.host == pools.expected(src, dst)).all()
    assert cupy.log.index(("streamSynchronize",)) < cupy.log.index(("launch", launch.kernel, STREAM))
    ordered = [entry for entry in cupy.log if entry[-1] == STREAM]
    assert ordered == [
        ("memcpyAsync", 32 + 24, STREAM),  # three ids of 8 bytes, on a 16-byte boundary; three more
        ("launch", launch.kernel, STREAM),
        ("eventRecord", STREAM),
    ]
    assert cupy.allocated == 2 + 2, "the two tables of bases, and a slot for page ids, stay"
    kernels.close()
    assert cupy.allocated == 0


def test_what_is_uploaded_once_stays(cupy: FakeCupy) -> None:
    pools, kernels = Pools(cupy), CudaKernels()
    kernels.run(pools.backup([5, 1, 7], [2, 0, 6]), stream=STREAM)
    cupy.log.clear()
    kernels.run(pools.backup([3, 6, 0], [1, 4, 7]), stream=STREAM)
    assert [entry[0] for entry in cupy.log] == ["memcpyAsync", "launch", "eventRecord"]


@pytest.mark.parametrize("call", ["malloc", "memcpy", "hostAlloc", "memcpyAsync", "launchKernel", "eventRecord"])
def test_what_cuda_refuses_leaves_nothing_behind(cupy: FakeCupy, call: str) -> None:
    pools, kernels = Pools(cupy), CudaKernels()
    cupy.failing = call
    with pytest.raises(TransferError, match=r"rkv_\w+ of 2 pages on cuda:0: (cudaError of|CUDA_ERROR)"):
        kernels.run(pools.backup([5, 1], [2, 0]), stream=STREAM)
    kernels.close()
    assert cupy.allocated == 0
    cupy.failing = ""
    kernels.run(pools.backup([5, 1], [2, 0]), stream=STREAM)
    assert (pools.host == pools.expected([5, 1], [2, 0])).all()


def test_one_list_of_pages_may_be_a_run_and_the_other_not(cupy: FakeCupy) -> None:
    for src, dst in (([3, 4, 5], [6, 1, 0]), ([6, 1, 0], [3, 4, 5])):
        pools = Pools(cupy)
        CudaKernels().run(pools.backup(src, dst), stream=STREAM)
        assert (pools.host == pools.expected(src, dst)).all()


def test_runs_of_pages_need_no_upload(cupy: FakeCupy) -> None:
    pools, kernels = Pools(cupy), CudaKernels()
    src, dst = [3, 4, 5], [1, 2, 3]
    kernels.run(pools.backup(src, dst), stream=STREAM)
    assert [entry[0] for entry in cupy.log if entry[-1] == STREAM] == ["launch"]
    assert (pools.host == pools.expected(src, dst)).all()


def test_layer_after_layer_uploads_once(cupy: FakeCupy) -> None:
    """A load back: after each layer its event, and then it is there."""
    pools, kernels = Pools(cupy), CudaKernels()
    src, dst = [5, 1, 7], [2, 0, 6]
    whole = pools.expected(src, dst)
    seen: list[int] = []

    def after(layer: int) -> None:
        sides = ("layer_first", SLOTS, pools.device), ("page_head", SLOTS, np.full_like(pools.host, 0xEE))
        done = expect_copy(GEOMETRY, *sides, src, dst, range(layer + 1))
        assert (pools.host == done).all()
        cupy.log.append(("event", layer))
        seen.append(layer)

    launches = kernels.run_layers(pools.backup(src, dst), stream=STREAM, after_layer=after)
    assert (pools.host == whole).all()
    assert (seen, len(launches)) == ([0, 1, 2], 3)
    names = [entry[0] for entry in cupy.log if entry[-1] == STREAM or entry[0] == "event"]
    assert names == ["memcpyAsync", *["launch", "event"] * 3, "eventRecord"]
    seen.clear()
    assert kernels.run_layers(pools.backup([], []), stream=STREAM, after_layer=seen.append) == []
    assert seen == [0, 1, 2], "whoever waits for the layers of no pages must not wait for ever"


def test_page_ids_under_way_are_not_overwritten(cupy: FakeCupy) -> None:
    """On streams that do nothing until they are waited for, more copies than the ring has slots."""
    kernels, rng = CudaKernels(), np.random.default_rng(1)
    pools = [Pools(cupy) for _ in range(3 * staging.MAX_SLOTS)]
    ids = [[rng.permutation(SLOTS // 4)[:3].tolist() for _ in range(2)] for _ in pools]
    for pool in pools:
        kernels.run(pool.backup([0], [0]), stream=STREAM)  # tables of bases are uploaded, and waited for
        pool.host[:] = 0xEE
    cupy.lazy = True
    for i, (pool, (src, dst)) in enumerate(zip(pools, ids, strict=True)):
        kernels.run(pool.backup(src, dst), stream=STREAM + i % 3)
    assert len(kernels._uploads) == staging.MAX_SLOTS
    assert kernels._uploads.waits == 2 * staging.MAX_SLOTS
    assert (pools[-1].host == 0xEE).all(), "nobody has waited for the last ones"
    cupy.finish()
    for pool, (src, dst) in zip(pools, ids, strict=True):
        assert (pool.host == pool.expected(src, dst)).all()
    kernels.close()
    assert cupy.allocated == 0


def test_slots_grow_and_are_used_again(cupy: FakeCupy) -> None:
    ring, ids = staging.UploadRing(cupy.cuda.runtime), np.arange(100_000)[::-1].copy()
    for count in (10, 20_000, 100_000, 5, 100_000):
        with ring.upload([ids[:count], ids[:3]], STREAM) as (first, second):
            for address, wanted in ((first, ids[:count]), (second, ids[:3])):
                assert address % 16 == 0
                read = np.frombuffer(ctypes.string_at(address, wanted.nbytes), np.int64)
                assert (read == wanted).all()
    assert len(ring) == 1
    assert ring.waits == 0
    assert cupy.allocated == 2
    with ring.upload([], STREAM) as none:
        assert none == []


def test_layers_with_bases_of_their_own_alignment_get_their_own_vectors(cupy: FakeCupy) -> None:
    pools = Pools(cupy)
    plan = pools.backup([5, 1, 7], [2, 0, 6])
    assert {launch.kernel for [launch] in layer_launches(plan)} == {launches_of(plan.layer(0))[0].kernel}
    bases = plan.src.bases.copy()
    bases[:, 1] += np.uint64(4)
    shifted = replace(plan, src=replace(plan.src, bases=bases))
    for layer, launches in zip(plan.layers, layer_launches(shifted), strict=True):
        [got], [wanted] = launches, launches_of(shifted.layer(layer))
        assert (got.kernel, bytes(got.params)) == (wanted.kernel, bytes(wanted.params))
    for layer, launches in zip(plan.layers, layer_launches(plan), strict=True):
        [got], [wanted] = launches, launches_of(plan.layer(layer))
        assert (got, bytes(got.params)) == (replace(wanted, params=got.params), bytes(wanted.params))


def test_no_pages_launch_nothing(cupy: FakeCupy) -> None:
    assert CudaKernels().run(Pools(cupy).backup([], []), stream=STREAM) == []
    assert cupy.log == []


def test_a_full_table_cache_drops_the_oldest(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "CACHED_TABLES", 2)
    kernels, pools = CudaKernels(), [Pools(cupy) for _ in range(2)]
    for pool in (*pools, pools[0]):
        kernels.run(pool.backup([5, 6], [2, 3]))  # runs: no ids are uploaded
        assert (pool.host == pool.expected([5, 6], [2, 3])).all()
        assert cupy.allocated == 2


def test_a_prebuilt_fatbin_is_preferred(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pools = Pools(cupy)

    def loaded_as(prebuilt: bool) -> list[str]:
        cupy.log.clear()
        CudaKernels(prebuilt=prebuilt).run(pools.backup([5, 1], [2, 0]))
        [options] = [entry[1] for entry in cupy.log if entry[0] == "RawModule"]
        return list(options)

    compiled = ["backend", "code", "options"]
    assert loaded_as(prebuilt=False) == compiled
    (tmp_path / "lib").mkdir()
    (tmp_path / "kernels").symlink_to(cuda.kernel_folder())
    monkeypatch.setattr(cuda, "_PACKAGE", tmp_path)
    assert loaded_as(prebuilt=True) == compiled, "there is none yet"
    (tmp_path / "lib" / cuda.FATBIN).write_bytes(b"")
    assert loaded_as(prebuilt=True) == ["path"]


def refused(cupy: FakeCupy, plan: CopyPlan, **options: Any) -> str:
    with pytest.raises(InvalidArgumentError) as error:
        CudaKernels().run(plan, **options)
    assert not [entry for entry in cupy.log if entry[0] == "launch"]
    return str(error.value)


def test_pageable_host_memory_is_refused(cupy: FakeCupy) -> None:
    said = refused(cupy, Pools(cupy, locked=False).backup([5, 1], [2, 0]))
    assert "page-lock host pools first" in said
    assert "the driver does not know" in said


def test_a_pool_of_which_the_last_byte_is_not_locked_is_refused(cupy: FakeCupy) -> None:
    pools = Pools(cupy)
    view = pools.views["cpu"]
    del cupy.known[int(view.bases[1, 2]) + reach_of(GEOMETRY, view) - 1]
    assert "the driver does not know" in refused(cupy, pools.backup([5, 1], [2, 0]))


def test_a_chunk_in_the_middle_that_is_not_locked_is_refused(cupy: FakeCupy) -> None:
    pools = Pools(cupy)
    view = pools.views["cpu"]
    seam = int(view.bases[0, 0]) + 4096
    pools.views["cpu"] = replace(view, boundaries=(seam,))
    assert f"address {seam:#x} is memory that the driver does not know" in refused(cupy, pools.backup([5, 1], [2, 0]))


def test_memory_that_was_mapped_anew_is_checked_anew(cupy: FakeCupy) -> None:
    """The same addresses, no longer locked, come with another view; the old one is not asked about twice."""
    pools = Pools(cupy)
    kernels = CudaKernels()
    kernels.run(pools.backup([5, 1], [2, 0]), stream=STREAM)
    for base in map(int, pools.views["cpu"].bases.flat):
        cupy.known.pop(base)
    kernels.run(pools.backup([5, 1], [2, 0]), stream=STREAM)
    pools.views["cpu"] = replace(pools.views["cpu"])
    with pytest.raises(InvalidArgumentError, match="the driver does not know"):
        kernels.run(pools.backup([5, 1], [2, 0]), stream=STREAM)


def test_a_pool_that_was_copied_once_is_not_kept(cupy: FakeCupy) -> None:
    class Tensor:
        pass

    owner = Tensor()
    pools, kernels = Pools(cupy), CudaKernels()
    pools.views["cuda:0"] = replace(pools.views["cuda:0"], owner=owner)
    plan = pools.backup([5, 1], [2, 0])
    kernels.run(plan, stream=STREAM)
    gone = weakref.ref(owner)
    del pools, owner
    assert gone() is not None, "the plan keeps it"
    del plan
    assert gone() is None


def test_a_view_that_says_the_other_tier_is_refused(cupy: FakeCupy) -> None:
    pools = Pools(cupy)
    for address, (device, _) in list(cupy.known.items()):
        cupy.known[address] = (0 if device < 0 else -1, address)
    assert "is in host memory, and its view says cuda:0" in refused(cupy, pools.backup([5, 1], [2, 0]))
    for address in cupy.known:
        cupy.known[address] = (0, address)
    assert "is on cuda:0, and its view says cpu" in refused(cupy, pools.backup([5, 1], [2, 0]))


def test_host_memory_mapped_elsewhere_is_refused(cupy: FakeCupy) -> None:
    pools = Pools(cupy)
    for base in map(int, pools.views["cpu"].bases.flat):
        cupy.known[base] = (-1, base + 4096)
    assert "another address on the device" in refused(cupy, pools.backup([5, 1], [2, 0]))


def test_memory_of_another_gpu_is_refused(cupy: FakeCupy) -> None:
    pools = Pools(cupy)
    for base in map(int, pools.views["cuda:0"].bases.flat):
        cupy.known[base] = (1, base)
    assert "is on cuda:1, not cuda:0" in refused(cupy, pools.backup([5, 1], [2, 0]))


def test_views_of_another_device_are_refused(cupy: FakeCupy) -> None:
    pools = Pools(cupy)
    host = pools.views["cpu"]
    other = view_of_layout("layer_first", GEOMETRY, SLOTS, [int(h.ctypes.data) for h in pools.device], "cuda:1")
    assert "src is on cuda:1" in refused(cupy, plan_copy(GEOMETRY, other, host, [1], [2]))
    assert "neither side is on cuda:0" in refused(cupy, plan_copy(GEOMETRY, host, host, [1], [2]))


def test_bulk_needs_sm_90(monkeypatch: pytest.MonkeyPatch) -> None:
    old = FakeCupy(capability="80")
    monkeypatch.setitem(sys.modules, "cupy", old)  # type: ignore[arg-type]
    pools = Pools(old)
    assert "sm_80" in refused(old, pools.backup([5, 1], [2, 0]), family="bulk")
    CudaKernels().run(pools.backup([5, 1], [2, 0]), family="copy")
    assert (pools.host == pools.expected([5, 1], [2, 0])).all()


def test_without_a_driver_a_gpu_or_that_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for fake, device, said in (
        (FakeCupy(driver=False), 0, "no NVIDIA driver that CuPy can use: cudaErrorInsufficientDriver"),
        (FakeCupy(gpus=0), 0, "there is no GPU 0: the driver shows 0"),
        (FakeCupy(gpus=2), 2, "there is no GPU 2: the driver shows 2"),
    ):
        monkeypatch.setitem(sys.modules, "cupy", fake)  # type: ignore[arg-type]
        with pytest.raises(DeviceUnavailableError, match=said):
            CudaKernels(device)


def test_kernels_that_cannot_be_compiled(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**options: Any) -> Any:
        raise RuntimeError("no libnvrtc.so")

    monkeypatch.setattr(cupy, "RawModule", broken)
    with pytest.raises(DeviceUnavailableError, match=r"kernel rkv_\w+ for sm_90: no libnvrtc\.so"):
        CudaKernels().run(Pools(cupy).backup([5, 1], [2, 0]))
    assert not [entry for entry in cupy.log if entry[-1] == STREAM]


def test_without_cupy_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)  # type: ignore[arg-type]
    with pytest.raises(DeviceUnavailableError, match=r"pip install 'radixkv\[cuda13\]'"):
        CudaKernels()


def test_importing_the_module_imports_no_cupy() -> None:
    code = "import sys, radixkv.transfer.cuda; sys.exit(any(m in sys.modules for m in ('cupy', 'torch')))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_installation_without_sources_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda, "_PACKAGE", tmp_path / "radixkv")
    with pytest.raises(DeviceUnavailableError, match=r"no CUDA sources"):
        cuda.kernel_folder()


def test_the_real_cupy_has_what_is_called() -> None:
    """Names and argument counts, where CuPy can be imported; it needs no GPU for that."""
    try:
        real = importlib.import_module("cupy")
    except ImportError as error:
        pytest.skip(f"CuPy cannot be imported: {error}")
    fake = FakeCupy()
    assert [n for n in vars(fake.cuda.runtime) if not hasattr(real.cuda.runtime, n)] == []
    with pytest.raises(TypeError, match="exactly 11 positional arguments"):
        real.cuda.driver.launchKernel()
