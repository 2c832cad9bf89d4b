"""The checks of gpu_checks.py: on a GPU all of them; without one, on a CuPy that simulates, all but the pools.

The second half proves the first ready to run, and that a copy which is not waited for fails it.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from radixkv.transfer import choose, engine, progress
from radixkv.transfer import gpu as gpu_path

from . import backends, gpu_checks, on_gpu
from .fake_cupy import FakeCupy
from .gpu_checks import CHECKS, Gpu

SIMULATED = [name for name in CHECKS if name not in ("torch pool", "CuPy pool")]


@pytest.mark.parametrize("name", CHECKS)
def test_on_a_gpu(name: str, tmp_path: Path) -> None:
    backends.backend("cuda")
    gpu = Gpu()
    try:
        print(json.dumps(CHECKS[name](gpu, tmp_path)))
    except gpu_checks.Absent as reason:
        pytest.skip(str(reason))
    finally:
        gpu.free()


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    """Streams are queues, and the driver has batched copies."""
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)  # type: ignore[arg-type]
    monkeypatch.delenv(choose.ENVIRONMENT, raising=False)
    batch = fake.batched_copies
    monkeypatch.setattr(engine, "_find_batch", lambda driver: (batch, "cuMemcpyBatchAsync_v2"))
    small = gpu_checks.KVGeometry(kind="mha", num_layers=3, num_heads=2, head_bytes=128, page_size=4)
    monkeypatch.setattr(gpu_checks, "GEOMETRY", small)
    monkeypatch.setattr(choose, "RUN_BYTES", (512, 1024))
    monkeypatch.setattr(choose, "NUM_RUNS", (1, 16))
    monkeypatch.setattr(gpu_path.CudaTimer.__init__, "__defaults__", (64 << 10,))
    fake.lazy = True
    return fake


def simulate(name: str, cupy: FakeCupy, folder: Path) -> dict[str, Any]:
    check = CHECKS[name]
    if name.startswith("end to end"):
        _, path, what = name.split(", ")
        mla = gpu_checks.KVGeometry(kind="mla", num_layers=3, num_heads=1, head_bytes=144, page_size=4)
        layout: Any = "page_first" if what == "MLA" else what
        check = gpu_checks.end_to_end(path, layout, mla if what == "MLA" else gpu_checks.GEOMETRY, pages=12)  # type: ignore[arg-type]
    gpu = Gpu()
    try:
        return check(gpu, folder)
    finally:
        gpu.free()


@pytest.mark.parametrize("name", SIMULATED)
def test_simulated(name: str, cupy: FakeCupy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from radixkv.pool import pinning

    monkeypatch.setattr(pinning, "_through_torch", lambda: "no torch here")
    assert simulate(name, cupy, tmp_path)


@pytest.mark.parametrize("path", ["kernel", "engine"])
def test_a_reader_that_does_not_wait_fails_the_end_to_end_check(
    path: str, cupy: FakeCupy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress.CudaProgress, "wait_on_stream", lambda self, layer, stream: None)
    with pytest.raises(AssertionError, match=r"the model read .* wrong bytes"):
        simulate(f"end to end, {path}, page_first", cupy, tmp_path)


def test_copies_that_wait_for_the_work_fail_the_overlap_check(
    cupy: FakeCupy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if both were on one stream."""
    streams = [cupy._stream()] * 2
    monkeypatch.setattr(Gpu, "stream", lambda self: streams.pop())
    with pytest.raises(AssertionError, match=r"layers arrived while the work ran|ms together"):
        simulate("overlap, engine", cupy, tmp_path)


def test_without_pytest_each_check_is_on_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class NoGpu:
        def free(self) -> None:
            pass

    def absent(gpu: Any, folder: Path) -> dict[str, Any]:
        raise gpu_checks.Absent("no torch")

    def broken(gpu: Any, folder: Path) -> dict[str, Any]:
        raise AssertionError("3 wrong bytes")

    checks = {"broken": broken, "absent": absent, "good": lambda gpu, folder: {"bytes": 7}}
    monkeypatch.setattr(on_gpu, "Gpu", NoGpu)
    monkeypatch.setattr(on_gpu, "CHECKS", checks)
    result = tmp_path / "checks.json"
    assert on_gpu.main("--checks", "--json", str(result)) == 1
    found = json.loads(result.read_text())
    assert found["broken"]["failed"] == "AssertionError: 3 wrong bytes"
    assert found["absent"]["absent"] == "no torch"
    assert found["good"]["bytes"] == 7
    del checks["broken"]
    assert on_gpu.main("--checks") == 0


def test_on_gpu_needs_no_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("on_gpu", "gpu_checks", "cases", "backends", "simulator", "oracle"):
        monkeypatch.delitem(sys.modules, f"tests.kernels.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "pytest", None)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "hypothesis", None)  # type: ignore[arg-type]
    assert importlib.import_module("tests.kernels.on_gpu").main is not None
