"""The transfer paths on a GPU, beside a contiguous cudaMemcpyAsync of as many bytes of that memory in the same run.

    python -m bench.bench_kernels [--quick] [--json FILE]

One line a kernel family, direction, layout, page size, row, page order and quota of blocks: GB/s of the kernel, of the
copy engine, and of the path that the chooser picks (it is tuned first, in this run), each with its ratio to the
contiguous copy. Then the aims (AIMS), each with its verdict, and what others have published (PUBLISHED). Device to
device counts a byte once, here and for cudaMemcpyAsync. Without a GPU it says what is missing. Pools
hold random bytes and are larger than the L2 cache; a page of each copy is compared afterwards. Times are of the GPU:
the stream is busy with something else while Python puts a copy on it, and how long that takes is call_ms in the JSON.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from radixkv.errors import DeviceUnavailableError, InvalidArgumentError
from radixkv.pool.layout import KVGeometry, KVView, Layout, contiguous_dims, view_of_layout
from radixkv.transfer.choose import Chooser, PathName
from radixkv.transfer.cuda import CudaKernels
from radixkv.transfer.engine import CopyEngine
from radixkv.transfer.gpu import (
    CudaTimer,
    device_key,
    layer_runs_of,
    layer_shape_of,
    runs_of,
    shape_of,
)
from radixkv.transfer.launch import DEFAULT_CTAS, LOCAL_CTAS, Family, Launch
from radixkv.transfer.plan import CopyPlan, plan_copy

from . import report

SEED = 20261121
LAYERS = 8
BUSY_BYTES = 64 << 20
"""Of the copy that keeps the stream busy meanwhile: 1.2 ms of PCIe gen 5."""
AIM_BYTES = 16 << 10
AIMS = {"backup": 0.95, "load_back": 0.95, "gather": 0.85}
"""Ratio to the contiguous copy. Host and device: of the path that the chooser picks, with at most 4 blocks, from 16
contiguous KiB a page and layer up (page_first and page_head have a row or a head). Device and device: of the best line
of a shape."""

PUBLISHED = (
    # what, GB/s, where; rows are a token's bytes of one layer and half
    ("sgl_kernel's transfer a layer, layer_first to layer_first, H20, 8192 rows of 656 B", 28.40,
     "https://github.com/sgl-project/sglang/pull/37231"),
    ("sgl_kernel's transfer a layer, layer_first to page_first, H20, 8192 rows of 656 B", 19.56,
     "https://github.com/sgl-project/sglang/pull/37231"),
    ("SGLang's register kernel, 2 CTAs, host (page_first) to device, by layer, GB300, 32768 rows of 512 B", 97.0,
     "https://github.com/sgl-project/sglang/pull/40278"),
    ("SGLang's TMA kernel, 4 CTAs, the same", 192.0, "https://github.com/sgl-project/sglang/pull/40278"),
    ("SGLang's register kernel, 2 blocks, host to device, AMD CDNA", 24.0,
     "https://github.com/sgl-project/sglang/pull/37635"),
    ("SGLang's register kernel, 8 blocks, host to device, AMD CDNA", 55.0,
     "https://github.com/sgl-project/sglang/pull/37635"),
)  # fmt: skip
"""Figures of others, on their machines: a scale, not a comparison. None was found for an H100 or H200."""

DIRECTIONS = {"backup": ("device", "host"), "load_back": ("host", "device"), "gather": ("device", "device")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One line. ``rows``: bytes of one token, layer and half; a page is page_size rows in each layer and half."""

    direction: str
    family: Family
    layout: Layout  # of the side that is not layer_first: the host, or the gathered pages
    page_size: int
    row_bytes: int
    order: str  # random or contiguous page ids
    ctas: int
    kind: str = "mha"
    tokens: int = 0  # that move; 0: half of the pool's
    layers: int = LAYERS  # that move, of LAYERS


class Gpu(Protocol):
    """What the benchmark needs of a device. Addresses are numbers; times are seconds."""

    name: str
    device: str

    def allocate(self, tier: str, content: npt.NDArray[np.uint8], num_bytes: int) -> int:
        """num_bytes of "device" or page-locked "host" memory, filled with repeats of ``content``."""
        ...

    def free(self) -> None:
        """Free all that was allocated."""
        ...

    def read(self, tier: str, address: int, num_bytes: int) -> npt.NDArray[np.uint8]: ...

    def memcpy(self, to: int, come: int, num_bytes: int) -> None:
        """cudaMemcpyAsync on the benchmark's stream."""
        ...

    def copy(self, plan: CopyPlan, family: Family, ctas: int, by_layer: bool) -> list[Launch]:
        """The kernels, on the benchmark's stream; by_layer: a launch for each layer."""
        ...

    def engine(self, plan: CopyPlan, by_layer: bool) -> Callable[[], object] | None:
        """The copy engine, runs expanded: a call puts the copy on the stream. None for too many runs."""
        ...

    def pick(self, plan: CopyPlan, by_layer: bool) -> PathName:
        """The path that a tuned chooser picks."""
        ...

    def seconds(self, function: Callable[[], object], repeats: int) -> tuple[float, float]:
        """Medians of single runs after two that do not count: between two events on the stream, and of the call."""
        ...


class CudaGpu:
    """GPU 0 through CuPy."""

    def __init__(self) -> None:
        self._kernels = CudaKernels()
        import cupy

        self._cupy: Any = cupy
        self._runtime: Any = cupy.cuda.runtime
        self._stream: Any = cupy.cuda.Stream(non_blocking=True)
        self._held: list[tuple[str, int]] = []
        properties = self._runtime.getDeviceProperties(0)
        self.name = properties["name"].decode()
        self.device = "cuda:0"
        self.driver = self._runtime.driverGetVersion()
        self.sms = int(properties["multiProcessorCount"])
        self._engine = CopyEngine(0)
        self._busy = self._runtime.malloc(BUSY_BYTES), self._runtime.hostAlloc(BUSY_BYTES, 0)
        with tempfile.TemporaryDirectory() as folder:  # of this run, whatever was measured before
            self._chooser = Chooser(device_key(0), folder=Path(folder), override=None)
            self._chooser.override = None
            with CudaTimer(0, {"kernel": self._kernels, "engine": self._engine}) as timer:
                self._chooser.tune(timer.seconds)
        self._kernels.close()

    def allocate(self, tier: str, content: npt.NDArray[np.uint8], num_bytes: int) -> int:
        make = self._runtime.malloc if tier == "device" else lambda size: self._runtime.hostAlloc(size, 0)
        address = int(make(num_bytes))
        self._held.append((tier, address))
        for at in range(0, num_bytes, content.nbytes):
            part = min(content.nbytes, num_bytes - at)
            self._runtime.memcpy(address + at, content.ctypes.data, part, self._runtime.memcpyDefault)
        return address

    def free(self) -> None:
        self._stream.synchronize()
        while self._held:
            tier, address = self._held.pop()
            (self._runtime.free if tier == "device" else self._runtime.freeHost)(address)
        self._kernels.close()

    def read(self, tier: str, address: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        self._stream.synchronize()
        found = np.empty(num_bytes, dtype=np.uint8)
        self._runtime.memcpy(found.ctypes.data, address, num_bytes, self._runtime.memcpyDefault)
        return found

    def memcpy(self, to: int, come: int, num_bytes: int) -> None:
        self._runtime.memcpyAsync(to, come, num_bytes, self._runtime.memcpyDefault, self._stream.ptr)

    def copy(self, plan: CopyPlan, family: Family, ctas: int, by_layer: bool) -> list[Launch]:
        run = self._kernels.run_layers if by_layer else self._kernels.run
        return run(plan, stream=self._stream.ptr, family=family, ctas=ctas)

    def engine(self, plan: CopyPlan, by_layer: bool) -> Callable[[], object] | None:
        stream = self._stream.ptr
        if by_layer:
            layers = layer_runs_of(plan)
            return None if layers is None else lambda: self._engine.run_layers(plan, stream=stream, runs=layers)
        runs = runs_of(plan)
        return None if runs is None else lambda: self._engine.run(plan, stream=stream, runs=runs)

    def pick(self, plan: CopyPlan, by_layer: bool) -> PathName:
        return self._chooser.choose(*(layer_shape_of(plan, layer_runs_of(plan)) if by_layer else shape_of(plan)))

    def seconds(self, function: Callable[[], object], repeats: int) -> tuple[float, float]:
        times, calls = [], []
        for run in range(repeats + 2):
            start, end = self._cupy.cuda.Event(), self._cupy.cuda.Event()
            self._runtime.memcpyAsync(*self._busy, BUSY_BYTES, self._runtime.memcpyDefault, self._stream.ptr)
            start.record(self._stream)
            begun = time.perf_counter()
            function()
            call = time.perf_counter() - begun
            end.record(self._stream)
            end.synchronize()
            if run >= 2:
                times.append(self._cupy.cuda.get_elapsed_time(start, end) / 1e3)
                calls.append(call)
        return statistics.median(times), statistics.median(calls)


def cases(quick: bool, sms: int) -> Iterator[Case]:
    """Every family and direction; page sizes 1 .. 64, rows 128 B .. 4 KiB, quotas of 1 .. 16 blocks, one at a time."""
    base: dict[str, Any] = {"page_size": 16, "row_bytes": 1024, "order": "random"}
    quotas = {"backup": (4,), "load_back": (4,), "gather": (4, LOCAL_CTAS, 2 * sms)}
    layouts: tuple[Layout, ...] = ("page_first_direct",) if quick else ("page_first_direct", "page_first", "page_head")
    families: tuple[Family, ...] = ("copy", "relayout", "bulk")
    for direction, family, layout in itertools.product(DIRECTIONS, families, layouts):
        for ctas in quotas[direction]:
            yield Case(direction=direction, family=family, layout=layout, ctas=ctas, **base)
    if quick:
        return
    variants = [{"page_size": p} for p in (1, 4, 64)] + [{"row_bytes": r} for r in (128, 256, 512, 2048, 4096)]
    variants += [{"order": "contiguous"}]
    for direction, family, change in itertools.product(DIRECTIONS, ("copy", "bulk"), variants):
        for ctas in quotas[direction]:
            yield Case(direction=direction, family=family, layout="page_first_direct", ctas=ctas, **{**base, **change})
    for direction, family, ctas in itertools.product(("backup", "load_back"), ("copy", "bulk"), (1, 2, 8, 16)):
        yield Case(direction=direction, family=family, layout="page_first_direct", ctas=ctas, **base)
    for direction in DIRECTIONS:
        yield Case(direction=direction, family="copy", layout="page_first_direct", ctas=4, kind="mla", **base)
    yield from published_cases()


def published_cases() -> Iterator[Case]:
    """The shapes of PUBLISHED. H20: one layer of 8192 latent rows, backed up; the page size is not told, and no matter
    to a kernel that goes by rows: 64 as in its model. GB300: 8 layers, one by one, of 32768 tokens in pages of 128."""
    h20: dict[str, Any] = {"direction": "backup", "kind": "mla", "row_bytes": 656, "page_size": 64, "tokens": 8192}
    gb300: dict[str, Any] = {"direction": "load_back", "layout": "page_first", "row_bytes": 512, "page_size": 128}
    layouts: tuple[Layout, ...] = ("layer_first", "page_first")
    for layout, family in itertools.product(layouts, ("copy", "bulk")):
        yield Case(layout=layout, family=family, order="random", ctas=4, layers=1, **h20)
    for family, ctas in (("copy", 2), ("copy", 4), ("bulk", 4)):
        yield Case(family=family, order="random", ctas=ctas, tokens=32768, **gb300)


def geometry_of(case: Case) -> KVGeometry:
    heads = 8 if case.kind == "mha" else 1
    return KVGeometry(
        kind="mha" if case.kind == "mha" else "mla",
        num_layers=LAYERS,
        num_heads=heads,
        head_bytes=case.row_bytes // heads,
        page_size=case.page_size,
    )


def measure(gpu: Gpu, case: Case, pool_bytes: int, repeats: int) -> dict[str, Any]:
    """One line: half of the pages of a pool of pool_bytes, or case.tokens, move to a pool of the same size."""
    g = geometry_of(case)
    asked = -(-case.tokens // case.page_size)
    pages = max(2, asked, pool_bytes // g.page_bytes)
    half_bytes = pages * g.page_bytes // g.halves
    rng = np.random.default_rng(SEED)
    content = rng.integers(0, 256, min(1 << 24, half_bytes), dtype=np.uint8)
    poison = np.full_like(content, 0xEE)
    tiers = DIRECTIONS[case.direction]
    try:
        src_at = [gpu.allocate(tiers[0], content, half_bytes) for _ in range(g.halves)]
        dst_at = [gpu.allocate(tiers[1], poison, half_bytes) for _ in range(g.halves)]
        layouts: tuple[Layout, Layout] = ("layer_first", case.layout)
        if case.direction == "load_back":
            layouts = (case.layout, "layer_first")
        views = [
            view_of_layout(layout, g, pages * g.page_size, at, gpu.device if tier == "device" else "cpu")
            for layout, at, tier in zip(layouts, (src_at, dst_at), tiers, strict=True)
        ]
        count = asked or pages // 2
        ids = [rng.permutation(pages)[:count] if case.order == "random" else np.arange(count) for _ in range(2)]
        plan = plan_copy(g, *views, ids[0].astype(np.int32), ids[1].astype(np.int32), range(case.layers))
        return _time(gpu, case, plan, (src_at, dst_at), repeats)
    finally:
        gpu.free()


def _time(gpu: Gpu, case: Case, plan: CopyPlan, at: tuple[list[int], list[int]], repeats: int) -> dict[str, Any]:
    """Contiguous copies first and last, the better being the limit. load_back goes layer by layer, as engines do."""
    bytes_of_half = plan.total_bytes // plan.geometry.halves
    by_layer = case.direction == "load_back"

    def contiguous() -> None:
        for src, dst in zip(*at, strict=True):
            gpu.memcpy(dst, src, bytes_of_half)

    def kernels() -> list[Launch]:
        return gpu.copy(plan, case.family, case.ctas, by_layer=by_layer)

    unasked = LOCAL_CTAS if case.direction == "gather" else DEFAULT_CTAS  # the quota that the chooser was tuned for
    beside = case.family == "copy" and case.ctas == unasked  # the engine knows neither family nor quota
    engine = gpu.engine(plan, by_layer) if beside else None
    before, _ = gpu.seconds(contiguous, repeats)
    seconds, call = gpu.seconds(kernels, repeats)
    engine_seconds, engine_call = gpu.seconds(engine, repeats) if engine else (None, None)
    limit = min(before, gpu.seconds(contiguous, repeats)[0])
    launches = kernels()
    _check_first_page(gpu, case, plan)
    line = {
        "kernel": launches[0].kernel,
        "blocks": launches[0].grid,
        "bytes": plan.total_bytes,
        "contiguous_bytes_a_page_and_layer": contiguous_dims(plan.geometry, plan.src, plan.dst)[0],
        "gb_per_s": plan.total_bytes / seconds / 1e9,
        "call_ms": call * 1e3,
        "memcpy_gb_per_s": plan.total_bytes / limit / 1e9,
        "ratio": limit / seconds,
    }
    if engine_seconds is not None and engine_call is not None:
        line |= {
            "engine_gb_per_s": plan.total_bytes / engine_seconds / 1e9,
            "engine_call_ms": engine_call * 1e3,
            "engine_ratio": limit / engine_seconds,
        }
    if beside:
        path = gpu.pick(plan, by_layer)
        line |= {"picked": path, "picked_ratio": line.get("engine_ratio") if path == "engine" else line["ratio"]}
    return line


def verdicts(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The aims: for each shape that one speaks of, the ratio, the aim, and met, MISSED or not measured."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    shape_keys = ("direction", "layout", "page_size", "row_bytes", "order", "kind", "tokens", "layers")
    for line in lines:
        if "refused" in line:
            continue
        shape = tuple(line[key] for key in shape_keys)
        device = line["direction"] == "gather"
        if device:
            value, how = line["ratio"], f"{line['family']}, {line['ctas']} CTAs"
        elif "picked" in line and line["contiguous_bytes_a_page_and_layer"] >= AIM_BYTES:
            value, how = line["picked_ratio"], line["picked"]
        else:
            continue
        if shape in found and (value or 0) <= (found[shape]["ratio"] or 0):
            continue
        aim = AIMS[line["direction"]]
        verdict = "not measured" if value is None else "met" if value >= aim else "MISSED"
        found[shape] = dict(zip(shape_keys, shape, strict=True)) | {"ratio": value, "aim": aim, "verdict": verdict}
        found[shape] |= {"by": how} | ({} if device else {"kernel_ratio": line["ratio"]})
    return list(found.values())


def print_verdicts(found: list[dict[str, Any]]) -> None:
    for one in found:
        what = f"{one['direction']} {one['kind']} {one['layout']} page {one['page_size']} row {one['row_bytes']}"
        ratio = "-" if one["ratio"] is None else f"{one['ratio']:.3f}"
        own = f", the kernel's own {one['kernel_ratio']:.3f}" if "kernel_ratio" in one else ""
        print(f"{one['verdict']:13}{ratio:>6} of {one['aim']:.2f}  {what} {one['order']} ({one['by']}{own})")
    print("Published by others, on their machines:")
    for what, gb_per_s, source in PUBLISHED:
        print(f"{gb_per_s:9.1f} GB/s  {what}\n{'':17}{source}")


def conclude(found: list[dict[str, Any]], must_meet: bool) -> None:
    """As report.conclude; here more is better."""
    keys = ("direction", "kind", "layout", "page_size", "row_bytes", "order")
    report.summarize([
        (" ".join(f"{one[key]}" for key in keys), one["verdict"],
         "no figure" if one["ratio"] is None else f"{one['ratio']:.3f}, aim >= {one['aim']:.2f}")
        for one in found
    ], must_meet)  # fmt: skip


def _check_first_page(gpu: Gpu, case: Case, plan: CopyPlan) -> None:
    """Head 0 of each token of the first page, in the first and the last layer, of each half. Fails if it differs."""
    g = plan.geometry
    tiers = DIRECTIONS[case.direction]

    def head(view: KVView, tier: str, page: int, half: int, layer: int, token: int) -> npt.NDArray[np.uint8]:
        address = int(view.bases[half, layer]) + page * view.page_stride + token * view.token_stride
        return gpu.read(tier, address, g.head_bytes)

    for half, layer, token in itertools.product(range(g.halves), (0, plan.layers.stop - 1), range(g.page_size)):
        src = head(plan.src, tiers[0], int(plan.src_pages[0]), half, layer, token)
        dst = head(plan.dst, tiers[1], int(plan.dst_pages[0]), half, layer, token)
        assert (src == dst).all(), f"{case}: half {half}, layer {layer}, token {token} differs"


def run(gpu: Gpu, todo: Iterator[Case], pool_bytes: int, repeats: int) -> list[dict[str, Any]]:
    """Measure and print each case; a family that cannot do a case says so in its line."""
    lines = []
    print(f"{'direction':10}{'family':10}{'layout':19}{'page':>5}{'row':>6}{'order':>12}{'CTAs':>5}"
          f"{'memcpy':>9}{'kernel':>9}{'ratio':>7}{'engine':>9}{'ratio':>7}  picked")  # fmt: skip
    for case in todo:
        line: dict[str, Any] = {name: getattr(case, name) for name in Case.__dataclass_fields__}
        try:
            line |= measure(gpu, case, pool_bytes, repeats)
            figures = f"{line['memcpy_gb_per_s']:9.1f}{line['gb_per_s']:9.1f}{line['ratio']:7.2f}"
            if "engine_ratio" in line:
                figures += f"{line['engine_gb_per_s']:9.1f}{line['engine_ratio']:7.2f}"
            else:
                figures += f"{'-':>9}{'-':>7}"
            figures += f"  {line.get('picked', '-')}"
        except InvalidArgumentError as error:
            line["refused"] = str(error)
            figures = f"  {error}"
        print(f"{case.direction:10}{case.family:10}{case.layout:19}{case.page_size:5}{case.row_bytes:6}{case.order:>12}"
              f"{case.ctas:5}{figures}", flush=True)  # fmt: skip
        lines.append(line)
    return lines


def main() -> None:
    """Command line. See report.conclude for the exit status; without a GPU, --check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one line a family and direction")
    default = report.DEFAULT_FOLDER / "kernels.json"
    parser.add_argument("--json", type=Path, default=default, help="where the result goes")
    parser.add_argument("--pool-mib", type=int, default=512, help="size of each pool; above twice the L2 cache")
    report.add_check_option(parser)
    options = parser.parse_args()
    try:
        gpu = CudaGpu()
    except DeviceUnavailableError as error:
        print(f"skipped: {error}")
        sys.exit("--check: nothing was measured" if options.check else 0)
    result = report.header(quick=options.quick)
    result |= {"gpu": gpu.name, "driver": gpu.driver, "sms": gpu.sms, "seed": SEED}
    result["lines"] = run(gpu, cases(options.quick, gpu.sms), options.pool_mib << 20, repeats=9)
    result["verdicts"] = verdicts(result["lines"])
    result["published"] = [{"what": what, "gb_per_s": rate, "source": source} for what, rate, source in PUBLISHED]
    print_verdicts(result["verdicts"])
    report.write_json(result, options.json)
    print(options.json)
    conclude(result["verdicts"], options.check)


if __name__ == "__main__":
    main()
