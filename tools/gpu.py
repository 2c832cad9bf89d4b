"""Everything that wants a GPU, in one command, on a machine with CUDA, PyTorch, CuPy and numpy but no package registry.

    python3 tools/gpu.py [--steps build,checks,stack,demo,overlap,...] [--quick] [--budget SECONDS]
                         [--wheels FOLDER] [--json FILE]

Uses the Python that runs it, and installs nothing into it. Builds in place, then
    checks     tests/kernels/gpu_checks.py: batched copies, pools of torch and CuPy, page-locked host pools, end to end
               with a racing reader, overlap from event times, tuning; needs no pytest
    tests      the other tests that use a GPU, kernels from the fatbin; no GPU is a failure here
    paths      the copies again through GpuTransfer, forced to the kernels, then to the copy engine
    nvrtc      the copies again, kernels compiled at run time
    sanitizer  compute-sanitizer on each family: memcheck, racecheck, synccheck
    stack      the whole stack's random runs over the mover for GPUs, every byte that is served checked
    cache      the same through HiRadixCache over engine pools of both kinds, by both io backends
    demo       radixkv demo --device cuda: a real model through all tiers and a restart, logits compared bit by bit
    overlap    bench/bench_overlap.py: load_back under compute, layer by layer; time to first token
    bench      bench/bench_kernels.py
and writes gpu-<device>-<time>.json to $OUT if that is set, else to bench/results, again after each step: device,
driver, date, commit; command, exit status and last lines of each step; figures of the checks, lines of the benchmark.
Exit status 1 if a step failed or had no time. RADIXKV_COMMIT names the commit where there is no git.

What is missing:
    CuPy, numpy               nothing can run, and it says so
    Cython, setuptools        nothing can be built: it says so, unless radixkv has been built in place for this Python
    pytest, hypothesis        checks, sanitizer and bench run, the others are "not run" in the result
    torch                     its check is "absent" in the result; cache, demo and overlap are "not run"
    transformers, rich        demo is "not run"
    compute-sanitizer, nvcc   that step fails; without nvcc all kernels are compiled at run time
--wheels (default .whl, if it is there): a folder of wheels for this Python, unpacked in front of the path of the
steps: what it lacks, or has too old. Where a command may take 10 minutes, two do: `--budget 570 --steps
build,checks,stack,cache,demo,overlap,tests,paths` and `--budget 570 --steps build,nvrtc,sanitizer,bench`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

NEEDED = ("cupy", "numpy")
TO_BUILD = {"Cython": 3, "setuptools": 77}
"""And the first major version that does."""
TO_TEST = ("pytest", "hypothesis")
STEPS = ("build", "checks", "stack", "cache", "demo", "overlap", "tests", "paths", "nvrtc", "sanitizer", "bench")
NEEDS = {
    "tests": TO_TEST, "paths": TO_TEST, "nvrtc": TO_TEST, "demo": ("torch", "transformers", "rich"),
    "overlap": ("torch",), "cache": ("torch",),
}  # fmt: skip
REQUIRE = {"RADIXKV_REQUIRE_GPU": "1"}
TAIL_LINES = 40


def first_line(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def device() -> tuple[str, str] | None:
    """Name and driver of GPU 0, or None."""
    line = first_line(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    parts = [part.strip() for part in (line or "").split(",")]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def commands(step: str, quick: bool, folder: Path) -> list[tuple[list[str], dict[str, str]]]:
    """What a step runs: (command, additions to the environment). Figures go to <step>.json in the folder."""
    python = [sys.executable]
    pytest = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    copies = [*pytest, "tests/kernels/test_copy.py", "-k", "cuda"]
    result = str(folder / f"{step}.json")
    if step == "build":
        return [([*python, "setup.py", "-q", "build_ext", "--inplace"], {})]
    if step == "checks":
        return [([*python, "-m", "tests.kernels.on_gpu", "--checks", "--json", result], REQUIRE)]
    if step == "stack":
        soak = [*python, "-m", "tests.controller.soak", "--seed", "1", "--steps", "10000" if quick else "50000"]
        paths = ("kernel", "engine")
        return [([*soak, "--cuda", path, "--json", str(folder / f"{step}-{path}.json")], {}) for path in paths]
    if step == "cache":
        soak = [*python, "-m", "tests.hicache.soak", "--seed", "1", "--steps", "5000" if quick else "20000"]
        paths = ("kernel", "direct")
        return [([*soak, "--cuda", path, "--json", str(folder / f"{step}-{path}.json")], {}) for path in paths]
    if step == "demo":
        demo = [*python, "-m", "radixkv", "demo", "--device", "cuda"]
        return [([*demo, "--dir", str(folder / "demo"), "--json", result], {})]
    if step == "overlap":
        bench = [*python, "-m", "bench.bench_overlap", "--device", "cuda", "--check", "--json", result]
        return [([*bench, *["--quick"] * quick], {})]
    if step == "tests":
        return [
            ([*pytest, "tests/kernels", "-k", "cuda or cupy and not on_a_gpu"], REQUIRE),
            ([*pytest, "tests/controller/test_on_gpu.py", "-k", "on_a_gpu"], REQUIRE),
        ]
    if step == "paths":
        return [(copies, REQUIRE | {"RADIXKV_TEST_PATH": path}) for path in ("kernel", "engine")]
    if step == "nvrtc":
        return [(copies, REQUIRE | {"RADIXKV_TEST_NVRTC": "1"})]
    if step == "sanitizer":
        check = ["compute-sanitizer", "--error-exitcode", "9", "--tool"]
        return [
            ([*check, tool, *python, "-m", "tests.kernels.on_gpu", *families], more)
            for tool, families, more in (
                ("memcheck", ("copy", "relayout", "bulk"), {}),
                ("memcheck", ("copy",), {"RADIXKV_TEST_PATH": "kernel"}),
                ("racecheck", ("relayout", "bulk"), {}),
                ("synccheck", ("relayout", "bulk"), {}),
            )
        ]
    assert step == "bench", step
    return [([*python, "-m", "bench.bench_kernels", "--json", result, *["--quick"] * quick], {})]


def run(command: list[str], more: dict[str, str], limit_s: float | None = None) -> dict[str, Any]:
    """Run to the end, or for limit_s seconds, output shown as it comes. Returns: what goes into the result file."""
    shown = " ".join([*(f"{name}={value}" for name, value in more.items()), *command])
    print(f"== {shown}", flush=True)
    start = time.monotonic()
    lines: list[str] = []
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return {"command": shown, "exit_status": None, "seconds": 0.0, "tail": [str(error)]}
    assert process.stdout is not None
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # it and its children: a session of their own

    timer = threading.Timer(limit_s, stop) if limit_s is not None else None
    if timer is not None:
        timer.start()
    for line in process.stdout:
        print(line, end="", flush=True)
        lines = [*lines[1 - TAIL_LINES :], line.rstrip("\n")]
    status = process.wait()
    if timer is not None:
        timer.cancel()
    ended = {"command": shown, "exit_status": status, "seconds": time.monotonic() - start, "tail": lines}
    return ended | ({"stopped_after_s": limit_s} if stopped.is_set() else {})


def lacking(names: Sequence[str]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def unfit_to_build() -> list[str]:
    """What a build needs and this Python lacks, or has too old."""
    missing = lacking(list(TO_BUILD))
    for name, major in TO_BUILD.items():
        if name not in missing and int(importlib.metadata.version(name).partition(".")[0]) < major:
            missing.append(f"{name}>={major}")
    return missing


def add_wheels(folder: Path, target: Path) -> None:
    """Put the wheels of a folder on the path of this process and of the steps, before what is installed."""
    wheels = sorted(str(path) for path in folder.glob("*.whl"))
    if not wheels:
        return
    options = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *options, *wheels], check=True)
    sys.path.insert(0, str(target))
    earlier = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{target}{os.pathsep}{earlier}" if earlier else str(target)
    importlib.invalidate_caches()


def why_not(step: str) -> str | None:
    """Why a step cannot run here; None: it can."""
    if missing := lacking(NEEDS.get(step, ())):
        return f"no {', '.join(missing)}"
    if step == "build" and (missing := unfit_to_build()):
        if list((ROOT / "radixkv" / "tree").glob(f"core*{sysconfig.get_config_var('EXT_SUFFIX')}")):
            return f"no {', '.join(missing)}, and it has been built before"
        sys.exit(
            f"{sys.executable} has no {', '.join(missing)}, and radixkv is not built for it: bring a folder of wheels "
            f"(pip download --no-deps --only-binary=:all: -d .whl {' '.join(missing)})"
        )
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default=",".join(STEPS), help="comma-separated, in the order given")
    parser.add_argument("--quick", action="store_true", help="the short benchmark")
    parser.add_argument("--budget", type=float, help="seconds for everything; what does not fit is stopped or not run")
    parser.add_argument("--wheels", type=Path, default=ROOT / ".whl", help="a folder of wheels for what is missing")
    parser.add_argument("--json", type=Path, help="where the result goes")
    options = parser.parse_args()
    begun = time.monotonic()
    steps = options.steps.split(",")
    if unknown := set(steps) - set(STEPS):
        parser.error(f"no such step: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as folder:
        add_wheels(options.wheels, Path(folder) / "site")
        if missing := lacking(NEEDED):
            sys.exit(
                f"{sys.executable} has no {', '.join(missing)}; install them, or run this with a Python that has them"
            )
        found = device()
        if found is None:
            sys.exit("there is no GPU that nvidia-smi can name")
        now = time.gmtime()
        commit = os.environ.get("RADIXKV_COMMIT") or first_line(["git", "rev-parse", "HEAD"])
        result: dict[str, Any] = {"device": found[0], "driver": found[1], "commit": commit}
        result |= {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", now), "python": sys.version, "steps": {}, "not_run": {}}
        name = f"gpu-{re.sub(r'[^A-Za-z0-9]+', '-', found[0])}-{time.strftime('%Y-%m-%d-%H%M%S', now)}.json"
        path = options.json or Path(os.environ.get("OUT") or ROOT / "bench" / "results") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for step in steps:
            if reason := why_not(step):
                result["not_run"][step] = reason
                continue
            runs = result["steps"].setdefault(step, [])
            for command, more in commands(step, options.quick, Path(folder)):
                left = None if options.budget is None else options.budget - (time.monotonic() - begun)
                if left is not None and left <= 0:
                    runs.append({"command": " ".join(command), "exit_status": None, "seconds": 0.0,
                                 "tail": ["no time was left"]})  # fmt: skip
                    continue
                runs.append(run(command, more, left))
            figures = Path(folder) / f"{step}.json"
            if figures.exists():
                result[step] = json.loads(figures.read_text())
            elif parts := sorted(Path(folder).glob(f"{step}-*.json")):
                result[step] = {part.stem.partition("-")[2]: json.loads(part.read_text()) for part in parts}
            path.write_text(json.dumps(result, indent=1) + "\n")
    failed = [step for step, runs in result["steps"].items() if any(each["exit_status"] != 0 for each in runs)]
    for step, reason in result["not_run"].items():
        print(f"{step} was not run: {reason}")
    print(f"{path}: {', '.join(failed) + ' failed' if failed else 'all steps that were run passed'}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
