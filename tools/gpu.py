"""Everything that wants a GPU, in one command, on a machine with CUDA, CuPy and pytest but no package registry.

    python3 tools/gpu.py [--steps build,tests,nvrtc,sanitizer,bench] [--quick] [--json FILE]

Uses the Python that runs it, and installs nothing. Builds in place, then
    tests      tests/kernels with the cuda backend, kernels from the fatbin; no GPU is a failure here
    nvrtc      the copies again, kernels compiled at run time
    sanitizer  compute-sanitizer on each family: memcheck, racecheck, synccheck
    bench      bench/bench_kernels.py
and writes bench/results/gpu-<device>-<date>.json: device, driver, date, commit; command, exit status and last lines of
each step; the lines of the benchmark. Exit status 1 if a step failed. RADIXKV_COMMIT names the commit where there is no
git.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

NEEDED = ("cupy", "numpy", "pytest", "hypothesis", "Cython", "setuptools")
STEPS = ("build", "tests", "nvrtc", "sanitizer", "bench")
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


def commands(step: str, quick: bool, bench_json: Path) -> list[tuple[list[str], dict[str, str]]]:
    """What a step runs: (command, additions to the environment)."""
    python = [sys.executable]
    pytest = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if step == "build":
        return [([*python, "setup.py", "-q", "build_ext", "--inplace"], {})]
    if step == "tests":
        return [([*pytest, "tests/kernels"], REQUIRE)]
    if step == "nvrtc":
        return [([*pytest, "tests/kernels/test_copy.py", "-k", "cuda"], REQUIRE | {"RADIXKV_TEST_NVRTC": "1"})]
    if step == "sanitizer":
        check = ["compute-sanitizer", "--error-exitcode", "9", "--tool"]
        return [
            ([*check, tool, *python, "-m", "tests.kernels.on_gpu", *families], {})
            for tool, families in (
                ("memcheck", ("copy", "relayout", "bulk")),
                ("racecheck", ("relayout", "bulk")),
                ("synccheck", ("relayout", "bulk")),
            )
        ]
    assert step == "bench", step
    return [([*python, "-m", "bench.bench_kernels", "--json", str(bench_json), *["--quick"] * quick], {})]


def run(command: list[str], more: dict[str, str]) -> dict[str, Any]:
    """Run to the end, output shown as it comes. Returns: what goes into the result file."""
    shown = " ".join(command)
    print(f"== {' '.join(f'{k}={v}' for k, v in more.items())} {shown}", flush=True)
    start = time.monotonic()
    lines: list[str] = []
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except OSError as error:
        return {"command": shown, "exit_status": None, "seconds": 0.0, "tail": [str(error)]}
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        lines = [*lines[1 - TAIL_LINES :], line.rstrip("\n")]
    status = process.wait()
    return {"command": shown, "exit_status": status, "seconds": time.monotonic() - start, "tail": lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default=",".join(STEPS), help="comma-separated, in the order given")
    parser.add_argument("--quick", action="store_true", help="the short benchmark")
    parser.add_argument("--json", type=Path, help="where the result goes")
    options = parser.parse_args()
    steps = options.steps.split(",")
    if unknown := set(steps) - set(STEPS):
        parser.error(f"no such step: {', '.join(sorted(unknown))}")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        sys.exit(f"{sys.executable} has no {', '.join(missing)}; install them, or run this with a Python that has them")
    found = device()
    if found is None:
        sys.exit("there is no GPU that nvidia-smi can name")
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    commit = os.environ.get("RADIXKV_COMMIT") or first_line(["git", "rev-parse", "HEAD"])
    result: dict[str, Any] = {"device": found[0], "driver": found[1], "date": date, "commit": commit, "steps": {}}
    with tempfile.TemporaryDirectory() as folder:
        bench_json = Path(folder) / "bench.json"
        for step in steps:
            result["steps"][step] = [run(*each) for each in commands(step, options.quick, bench_json)]
        if bench_json.exists():
            result["bench"] = json.loads(bench_json.read_text())
    name = f"gpu-{re.sub(r'[^A-Za-z0-9]+', '-', found[0])}-{date[:10]}.json"
    path = options.json or ROOT / "bench" / "results" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    failed = [step for step, runs in result["steps"].items() if any(each["exit_status"] != 0 for each in runs)]
    print(f"{path}: {', '.join(failed) + ' failed' if failed else 'all steps passed'}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
