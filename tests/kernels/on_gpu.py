"""What a GPU must show, without pytest: for compute-sanitizer, and for machines that have CUDA, CuPy and numpy alone.

    python -m tests.kernels.on_gpu FAMILY...             the cases of a family (copy, relayout, bulk), then "done"
    python -m tests.kernels.on_gpu --checks [--json FILE] every check of gpu_checks.py: its figures, or why it failed
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from .backends import Cuda
from .cases import check, few
from .gpu_checks import CHECKS, Absent, Gpu


def run_checks() -> dict[str, dict[str, Any]]:
    """Name of each check to its figures; "failed" with the error where it failed, "absent" with what is missing."""
    found: dict[str, dict[str, Any]] = {}
    gpu = Gpu()
    for name, function in CHECKS.items():
        start = time.monotonic()
        try:
            with tempfile.TemporaryDirectory() as folder:
                line = function(gpu, Path(folder))
        except Absent as reason:
            line = {"absent": str(reason)}
        except Exception as error:  # each check is on its own; the exit status tells
            line = {"failed": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        finally:
            gpu.free()
        found[name] = line | {"seconds": round(time.monotonic() - start, 3)}
        print(name, {key: value for key, value in found[name].items() if key != "traceback"}, flush=True)
    return found


def main(*words: str) -> int:
    if "--checks" in words:
        found = run_checks()
        if "--json" in words:
            Path(words[words.index("--json") + 1]).write_text(json.dumps(found, indent=1) + "\n")
        return int(any("failed" in line for line in found.values()))
    backend = Cuda(guarded=False)
    for family in words:
        for case in few(family):
            check(backend, case)
    print("done")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
