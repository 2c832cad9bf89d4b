"""The simulator under ASan + UBSan and TSan: clean for the kernels as they are, and loud for each bug planted in them.

Bugs are planted in copies of the real sources, so that the proof holds for them and not for an example.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..abi.toolchain import run, tool
from .simulator import KERNELS, ROOT, build

PRELOAD = {"asan": ["libasan.so", "libubsan.so"], "tsan": ["libtsan.so"]}
OPTIONS = {
    # CPython keeps what it allocates
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:report_bugs=1",
}


def simulate(flavour: str, library: Path, mode: str, *families: str) -> subprocess.CompletedProcess[str]:
    """Run tests.kernels.sanitized with the runtime of a sanitizer in front."""
    names = PRELOAD.get(flavour, [])
    runtimes = [run([tool("g++"), f"-print-file-name={name}"]).stdout.strip() for name in names]
    prefix = _unrandomised() if flavour == "tsan" else []
    command = [*prefix, sys.executable, "-m", "tests.kernels.sanitized", str(library), mode, *families]
    env = os.environ | OPTIONS | ({"LD_PRELOAD": " ".join(runtimes)} if names else {})
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, errors="replace")


def _unrandomised() -> list[str]:
    """TSan knows the usual address space only; without randomisation it gets that. Containers may forbid to ask."""
    setarch = ["setarch", platform.machine(), "-R"]
    allowed = shutil.which("setarch") and subprocess.run([*setarch, "true"], capture_output=True).returncode == 0
    return setarch if allowed else []


def planted(folder: Path, file: str, before: str, after: str) -> Path:
    """A copy of the kernels with one change."""
    copy = folder / "kernels"
    shutil.copytree(KERNELS, copy, ignore=shutil.ignore_patterns("__pycache__"))
    text = (copy / file).read_text()
    assert text.count(before) == 1, f"{file} has {text.count(before)} of {before!r}"
    (copy / file).write_text(text.replace(before, after))
    return copy


@pytest.mark.parametrize(("flavour", "mode", "families"), [
    ("asan", "loop", ["copy", "bulk"]),
    ("asan", "fibre", ["copy", "relayout", "bulk"]),
    ("tsan", "thread", ["copy", "relayout", "bulk"]),
])  # fmt: skip
def test_the_kernels_are_clean(flavour: str, mode: str, families: list[str]) -> None:
    done = simulate(flavour, build(flavour), mode, *families)
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr[-6000:]


BOUND = "if (at < place.vecs) held[half][i] = rkv_load((const Vec *)place.src[half] + at);"
STORED = "if (at < here.vecs) rkv_store((Vec *)here.dst[half] + at, held[half][i]);"
STAGED = "if (at + i * blockDim.x < p.tile_vecs) staging[at + i * blockDim.x] = held[i];"
FULL = "        __syncthreads();\n        /* 2. the next"

# (what, file, code, bug, flavour, mode, family, what the sanitizer or the oracle says)
BUGS = [
    ("read out of bounds", "copy.cu", BOUND, BOUND.replace("+ at)", "+ at + 4)"), "asan", "loop", "copy",
     "AddressSanitizer: heap-buffer-overflow"),
    ("write out of bounds", "copy.cu", STORED, STORED.replace("+ at,", "+ at + 4,"), "asan", "loop", "copy",
     "AddressSanitizer: heap-buffer-overflow"),
    ("shared memory out of bounds", "relayout.cu", STAGED, STAGED.replace("blockDim.x]", "blockDim.x + 2048]"), "asan",
     "fibre", "relayout", "AddressSanitizer: global-buffer-overflow"),
    ("misaligned", "copy.cu", "const int64_t skip = (int64_t)first * (int64_t)sizeof(Vec);",
     "const int64_t skip = (int64_t)first * (int64_t)sizeof(Vec) + (chunk ? 1 : 0);", "asan", "loop", "copy",
     "misaligned address"),
    ("missing barrier before the stores", "relayout.cu", FULL, FULL.replace("__syncthreads();", ""), "tsan",
     "thread", "relayout", "ThreadSanitizer: data race"),
    ("missing barrier after the stores", "relayout.cu", "        __syncthreads(); /*", "        /*", "tsan",
     "thread", "relayout", "ThreadSanitizer: data race"),
    ("barrier that some threads skip", "relayout.cu", FULL, FULL.replace("__sync", "if (threadIdx.x < 16) __sync"),
     "asan", "fibre", "relayout",
     "divergent __syncthreads"),
    ("one byte too few", "copy.cu", BOUND, BOUND.replace("at < place.vecs", "at + 1 < place.vecs"), "quick", "loop",
     "copy", "bytes of the destination differ"),
    ("no wait for a bulk load", "bulk.cu", "        rkv_barrier_wait(filled + slot, n / SLOTS & 1);\n", "", "quick",
     "loop", "bulk", "bulk loads"),
    ("a bulk slot filled before it has drained", "bulk.cu", "rkv_bulk_wait_read<DRAINING>()",
     "rkv_bulk_wait_read<DRAINING + 1>()", "quick", "loop", "bulk", "bytes of the destination differ"),
    ("bulk stores left behind", "bulk.cu", "    rkv_bulk_wait_all();\n", "", "quick", "loop", "bulk",
     "bulk stores were not waited for"),
    ("bulk barriers not published", "bulk.cu", "    rkv_barrier_publish();\n", "", "quick", "loop", "bulk",
     "not published"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "code", "bug", "flavour", "mode", "family", "said"), [bug[1:] for bug in BUGS],
                         ids=[bug[0] for bug in BUGS])  # fmt: skip
def test_a_planted_bug_is_caught(
    tmp_path: Path, file: str, code: str, bug: str, flavour: str, mode: str, family: str, said: str
) -> None:
    library = build(flavour, planted(tmp_path, file, code, bug), tmp_path)
    done = simulate(flavour, library, mode, family)
    assert done.returncode != 0
    assert "done" not in done.stdout
    assert said in done.stderr, done.stderr[-6000:]
