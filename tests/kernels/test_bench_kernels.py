"""The benchmark of the kernels, on a simulated device: what it measures is what it says. No timing is asserted."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from bench import bench_kernels
from bench.bench_kernels import DIRECTIONS, Case, cases, geometry_of, measure, run
from radixkv.transfer import choose, engine
from radixkv.transfer import gpu as gpu_path
from radixkv.transfer.choose import PathName
from radixkv.transfer.launch import LOCAL_CTAS, Family, Launch
from radixkv.transfer.plan import CopyPlan

from .fake_cupy import FakeCupy
from .simulator import ROOT, Simulator, plain


class SimulatedGpu:
    """Host memory for both tiers; each run of a function takes one second more than the last."""

    name, device = "simulator", "cuda:0"

    def __init__(self, sim: Simulator, broken: bool = False) -> None:
        self._sim, self._broken = sim, broken
        self.held: dict[int, npt.NDArray[np.uint8]] = {}
        self.copied: list[int] = []
        self.layers: list[range] = []
        self.engine_runs: list[bool] = []
        self._clock = 0.0

    def allocate(self, tier: str, content: npt.NDArray[np.uint8], num_bytes: int) -> int:
        whole = np.empty(num_bytes + 256, dtype=np.uint8)
        start = -whole.ctypes.data % 256
        memory = whole[start : start + num_bytes]
        memory[:] = np.resize(content, num_bytes)
        self.held[int(memory.ctypes.data)] = memory
        return int(memory.ctypes.data)

    def free(self) -> None:
        self.held.clear()

    def read(self, tier: str, address: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        for base, memory in self.held.items():
            if base <= address < base + len(memory):
                return memory[address - base : address - base + num_bytes].copy()
        raise AssertionError(f"{address:#x} was never allocated")

    def memcpy(self, to: int, come: int, num_bytes: int) -> None:
        assert num_bytes <= min(len(self.held[to]), len(self.held[come]))
        self.copied.append(num_bytes)

    def copy(self, plan: CopyPlan, family: Family, ctas: int, by_layer: bool) -> list[Launch]:
        assert "cuda:0" in (plan.src.device, plan.dst.device)
        parts = [plan.layer(layer) for layer in plan.layers] if by_layer else [plan]
        self.layers += [part.layers for part in parts]
        launches = [launch for part in parts for launch in self._sim.run(part, family=family, ctas=ctas)]
        if self._broken:
            for memory in self.held.values():
                memory[:] = np.roll(memory, 1)
                memory[::2] ^= 1
        return launches

    def engine(self, plan: CopyPlan, by_layer: bool) -> Callable[[], object] | None:
        return lambda: self.engine_runs.append(by_layer)

    def pick(self, plan: CopyPlan, by_layer: bool) -> PathName:
        return "engine" if by_layer else "kernel"

    def seconds(self, function: Callable[[], object], repeats: int) -> tuple[float, float]:
        function()
        self._clock += 1
        return self._clock, 0.001


@pytest.mark.parametrize("case", list(cases(quick=True, sms=2)), ids=str)
def test_a_line_says_what_was_measured(case: Case) -> None:
    gpu = SimulatedGpu(plain())
    pool = 4 * geometry_of(case).page_bytes
    line = measure(gpu, case, pool, repeats=1)
    assert case.family in line["kernel"]
    assert line["blocks"] <= case.ctas
    assert line["bytes"] == pool // 2
    # contiguous before (1 s) and after, the kernel between (2 s): the faster contiguous run is the limit
    assert (line["gb_per_s"], line["memcpy_gb_per_s"]) == (pool / 2 / 2 / 1e9, pool / 2 / 1e9)
    assert line["ratio"] == 0.5
    assert gpu.copied == [pool // 4] * 4, "both halves, before and after"
    by_layer = [range(i, i + 1) for i in range(bench_kernels.LAYERS)] * 2
    assert gpu.layers == (by_layer if case.direction == "load_back" else [range(bench_kernels.LAYERS)] * 2)
    assert not gpu.held
    by_layer = case.direction == "load_back"
    if case.family == "copy" and case.ctas == (LOCAL_CTAS if case.direction == "gather" else 4):
        assert gpu.engine_runs == [by_layer]
        assert (line["engine_gb_per_s"], line["engine_call_ms"]) == (pool / 2 / 3 / 1e9, 1.0)
        assert (line["picked"], line["picked_ratio"]) == (("engine", 1 / 3) if by_layer else ("kernel", 0.5))
    else:
        assert not gpu.engine_runs
        assert "picked" not in line


def test_aims_get_verdicts(capsys: pytest.CaptureFixture[str]) -> None:
    def line(direction: str, ratio: float, page_bytes: int = 16384, **more: object) -> dict[str, object]:
        shape = {"layout": "page_first", "page_size": page_bytes // 1024, "row_bytes": 1024, "order": "random"}
        of_line = {"kind": "mha", "family": "copy", "ctas": 4, "ratio": ratio, "tokens": 0, "layers": 8}
        return {"direction": direction, "contiguous_bytes_a_page_and_layer": page_bytes, **shape, **of_line, **more}

    lines = [
        line("backup", 0.5, picked="engine", picked_ratio=0.96),
        line("backup", 0.99, ctas=16),  # more SMs than the aim allows: no verdict
        line("load_back", 0.94, picked="kernel", picked_ratio=0.94),
        line("load_back", 0.94, page_bytes=8192, picked="kernel", picked_ratio=0.94),  # below 16 KiB: no aim
        line("backup", 0.5, page_bytes=65536, picked="engine", picked_ratio=None),
        line("gather", 0.2),
        line("gather", 0.86, ctas=264),
        line("gather", 0.9) | {"refused": "no"},
    ]
    found = {(one["direction"], one["page_size"]): one for one in bench_kernels.verdicts(lines)}
    assert {key: one["verdict"] for key, one in found.items()} == {
        ("backup", 16): "met", ("load_back", 16): "MISSED", ("backup", 64): "not measured", ("gather", 16): "met",
    }  # fmt: skip
    assert found["backup", 16]["kernel_ratio"] == 0.5
    assert found["gather", 16]["by"] == "copy, 264 CTAs"
    bench_kernels.print_verdicts(list(found.values()))
    said = capsys.readouterr().out
    assert said.count("https://") == len(bench_kernels.PUBLISHED)


def test_aims_go_by_what_is_contiguous_on_both_sides() -> None:
    """16 KiB a page and layer are one run in page_first_direct, rows in page_first, heads in page_head."""
    shape = {"direction": "backup", "family": "copy", "page_size": 16, "row_bytes": 1024, "order": "random", "ctas": 4}
    found = {}
    for layout in ("layer_first", "page_first_direct", "page_first", "page_head"):
        case = Case(layout=layout, **shape)  # type: ignore[arg-type]
        [line] = run(SimulatedGpu(plain()), iter([case]), 4 * geometry_of(case).page_bytes, repeats=1)
        found[layout] = line["contiguous_bytes_a_page_and_layer"], len(bench_kernels.verdicts([line]))
    assert found == {
        "layer_first": (16384, 1), "page_first_direct": (16384, 1), "page_first": (1024, 0), "page_head": (128, 0),
    }  # fmt: skip


def test_the_shapes_that_others_have_published_are_measured() -> None:
    mine = [c for c in cases(quick=False, sms=132) if c.tokens]
    assert mine == list(bench_kernels.published_cases())
    assert {(c.kind, c.direction, c.row_bytes, c.tokens, c.layers) for c in mine} == {
        ("mla", "backup", 656, 8192, 1), ("mha", "load_back", 512, 32768, 8),
    }  # fmt: skip
    assert {(c.layout, c.ctas) for c in mine if c.family == "copy"} >= {
        ("layer_first", 4), ("page_first", 4), ("page_first", 2),
    }  # fmt: skip
    for case in mine:
        small = replace(case, tokens=3 * case.page_size)
        gpu = SimulatedGpu(plain())
        [line] = run(gpu, iter([small]), 0, repeats=1)
        assert line["bytes"] == small.tokens * case.row_bytes * case.layers * (2 if case.kind == "mha" else 1)


def test_a_wrong_copy_is_no_figure() -> None:
    [case] = [c for c in cases(quick=True, sms=1) if c.family == "copy" and c.direction == "backup"]
    with pytest.raises(AssertionError, match="differs"):
        measure(SimulatedGpu(plain(), broken=True), case, 4 * geometry_of(case).page_bytes, repeats=1)


def test_the_full_run_covers_what_the_design_asks_for() -> None:
    full = list(cases(quick=False, sms=132))
    assert len(set(full)) == len(full)
    for direction in DIRECTIONS:
        mine = [c for c in full if c.direction == direction and not c.tokens]
        assert {c.family for c in mine} == {"copy", "relayout", "bulk"}
        assert {c.page_size for c in mine} == {1, 4, 16, 64}
        assert {c.row_bytes for c in mine} == {128, 256, 512, 1024, 2048, 4096}
        assert {c.order for c in mine} == {"random", "contiguous"}
        assert {c.kind for c in mine} == {"mha", "mla"}
    assert {c.ctas for c in full if c.direction != "gather"} == {1, 2, 4, 8, 16}
    assert {c.ctas for c in full if c.direction == "gather"} == {4, LOCAL_CTAS, 264}


def test_a_family_that_cannot_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    options = {"layout": "page_head", "page_size": 2, "row_bytes": 64, "order": "random", "ctas": 1}
    case = Case(direction="backup", family="bulk", **options)  # type: ignore[arg-type]
    [line] = run(SimulatedGpu(plain()), iter([case]), 4 * geometry_of(case).page_bytes, repeats=1)
    assert "multiples of 16" in line["refused"]
    assert "multiples of 16" in capsys.readouterr().out


def test_without_cupy_it_is_skipped_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; sys.modules['cupy'] = None; sys.argv[1:] = []; from bench import bench_kernels as b; b.main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("skipped: CuPy cannot be imported")


def test_the_real_device_class_runs_on_a_simulated_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call that the benchmark makes of CuPy, tuning included, and right bytes behind it."""
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(engine, "_find_batch", lambda driver: (fake.batched_copies, "cuMemcpyBatchAsync_v2"))
    monkeypatch.setattr(choose, "RUN_BYTES", (512, 1024))
    monkeypatch.setattr(choose, "NUM_RUNS", (1, 16))
    monkeypatch.setattr(gpu_path.CudaTimer.__init__, "__defaults__", (64 << 10,))
    monkeypatch.setattr(bench_kernels, "BUSY_BYTES", 4096)
    gpu = bench_kernels.CudaGpu()
    assert (gpu.name, gpu.sms) == ("Fake 100", 8)
    assert gpu._chooser.tuned
    for direction in DIRECTIONS:
        options = {"layout": "page_first_direct", "page_size": 16, "row_bytes": 1024, "order": "random"}
        options["ctas"] = LOCAL_CTAS if direction == "gather" else 4
        case = Case(direction=direction, family="copy", **options)  # type: ignore[arg-type]
        [line] = run(gpu, iter([case]), 4 * geometry_of(case).page_bytes, repeats=1)
        assert line["engine_ratio"] > 0
        assert line["picked"] in ("kernel", "engine")
    assert {entry[0] for entry in fake.log} >= {"launch", "batch", "memcpyAsync", "hostAlloc"}
