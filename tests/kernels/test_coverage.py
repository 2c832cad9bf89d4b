"""Line coverage of the kernel sources under the simulator, all templates of a line taken together: at least 95 %."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from pathlib import Path

from ..abi.toolchain import run, tool
from .simulator import KERNELS, build
from .test_sanitizers import simulate

MINIMUM = 95.0


def covered(counts: Path) -> dict[str, dict[int, int]]:
    """File of kernels/, then line, then how often it ran."""
    data = [path for path in counts.iterdir() if path.suffix == ".gcda"]
    assert data, "nothing that was compiled with --coverage has run"
    run([tool("gcov"), "--json-format", *data], cwd=counts)
    lines: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for report in counts.glob("*.gcov.json.gz"):
        for file in json.loads(gzip.decompress(report.read_bytes()))["files"]:
            path = Path(file["file"])
            if path.resolve().parent == KERNELS:
                for line in file["lines"]:
                    lines[path.name][line["line_number"]] += line["count"]
    return lines


def test_every_line_of_the_kernels_runs(tmp_path: Path) -> None:
    library = build("gcov", KERNELS, tmp_path)
    done = simulate("gcov", library, "fibre", "copy", "relayout", "bulk")
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr[-6000:]
    lines = covered(tmp_path)
    assert {"copy.cu", "relayout.cu", "bulk.cu", "layouts.cuh"} <= set(lines)
    missed = {name: [line for line, count in counts.items() if not count] for name, counts in lines.items()}
    total = sum(map(len, lines.values()))
    percent = 100 * (1 - sum(map(len, missed.values())) / total)
    print(f"kernels: {percent:.1f} % of {total} lines under the simulator; missed: {missed}")
    assert percent >= MINIMUM, missed
