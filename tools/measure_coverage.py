"""Line coverage of everything that ships: .py (coverage.py), and .pyx, .pxd and .c (gcov), in one table.

    python tools/measure_coverage.py [pytest arguments]

Works on a copy of the tree in build/coverage, compiled there with --coverage and -O0, so that the real build stays as
it is. gcov counts lines of the generated C; Cython writes before each piece of C which line it comes from, and that
maps the counts back. Unlike line tracing this sees nogil functions, and what the C programs of tests/abi run, at
little cost.

Fails if a kind of file is below its MINIMUM. Lines that need a failing malloc inside CPython, or an invariant of the
tree broken (all of _check.pxd that speaks), are the known rest; the table names every missed line.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build" / "coverage" / "tree"

# .c: what is missed are calls of the system that fail, of few lines in all; two of them more or less are a whole point
MINIMUM = {".py": 95.0, ".pyx": 95.0, ".pxd": 95.0, ".c": 93.0}

# other builds, other processes, or far too slow when every line counts
LEFT_OUT = [f"tests/abi/test_{name}.py" for name in ("sanitizers", "fuzz", "hosts", "header")]
LEFT_OUT += [f"tests/kernels/test_{name}.py" for name in ("sanitizers", "gates", "coverage")]

Counts = dict[str, dict[int, int]]
"""Path relative to the tree, then line number, then how often it ran."""


def copy_tree() -> None:
    """What git knows, and new files that it does not ignore."""
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    shutil.rmtree(COPY, ignore_errors=True)
    for name in filter(None, listing.stdout.split("\0")):
        if (ROOT / name).is_file():
            (COPY / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, COPY / name)


def run_tests(arguments: list[str]) -> None:
    python = [sys.executable]
    flags = {"RKV_CFLAGS": "-O0 --coverage -fprofile-update=atomic", "RKV_LDFLAGS": "--coverage"}
    environment = os.environ | {"PYTHONPATH": str(COPY), "COVERAGE_FILE": str(COPY / ".coverage")}
    subprocess.run([*python, "setup.py", "-q", "build_ext", "--inplace"], cwd=COPY, env=os.environ | flags, check=True)
    (COPY / ".coveragerc").write_text(
        "[run]\nsource = radixkv\nparallel = true\npatch = subprocess\n"
        "[report]\nexclude_also =\n    if TYPE_CHECKING:\n    @abstractmethod\n    @overload\n    \\.\\.\\.$\n"
        "    class \\w+\\(Protocol\\)\n"
    )
    left_out = [f"--ignore={path}" for path in LEFT_OUT]
    tests = [*python, "-m", "coverage", "run", "-m", "pytest", "-q", "-p", "no:cacheprovider", *left_out, *arguments]
    subprocess.run(tests, cwd=COPY, env=environment, check=True)
    subprocess.run([*python, "-m", "coverage", "combine", "-q"], cwd=COPY, env=environment, check=True)
    to_json = [*python, "-m", "coverage", "json", "-q", "-o", "coverage.json"]
    subprocess.run(to_json, cwd=COPY, env=environment, check=True)


def python_counts() -> Counts:
    report = json.loads((COPY / "coverage.json").read_text())
    return {
        name: dict.fromkeys(file["executed_lines"], 1) | dict.fromkeys(file["missing_lines"], 0)
        for name, file in report["files"].items()
        if not name.startswith("..")
    }


def c_counts() -> Counts:
    """gcov's counts of .c files, those of generated ones mapped to the Cython source."""
    counts: Counts = defaultdict(lambda: defaultdict(int))
    data = [str(path.relative_to(COPY)) for path in (COPY / "build").rglob("*.gcda")]
    if not data:
        raise SystemExit("no .gcda file: nothing compiled with --coverage has run")
    listing = subprocess.run(
        ["gcov", "--json-format", "--stdout", *data], cwd=COPY, check=True, capture_output=True, text=True
    ).stdout
    for report in map(json.loads, filter(None, listing.splitlines())):
        for file in report["files"]:
            name = os.path.normpath(file["file"])
            origin = cython_lines(COPY / name) if name.startswith("build/cython/") else None
            for line in file["lines"]:
                place = (name, line["line_number"]) if origin is None else origin.get(line["line_number"])
                if place is not None and (COPY / place[0]).is_file() and not place[0].startswith("/"):
                    counts[place[0]][place[1]] += line["count"]
    ours = {name: lines for name, lines in counts.items() if name.startswith(("radixkv/", "csrc/"))}
    return {name: declarations_removed(name, lines) for name, lines in ours.items()}


MARKER = re.compile(r'^\s*/\* "([^"]+)":(\d+)$')
BOUNDARY = re.compile(r"^(?:\}|static |/\*)|/\* function exit code \*/|/\* Python wrapper \*/|/\* \"\(tree|/\* \"View")


def cython_lines(path: Path) -> dict[int, tuple[str, int]]:
    """Line of generated C -> (Cython source, line), from the comments that Cython writes before each statement."""
    mapping = {}
    place: tuple[str, int] | None = None
    package = path.relative_to(COPY / "build" / "cython").parent
    for number, text in enumerate(path.read_text(errors="replace").splitlines(), 1):
        marker = MARKER.match(text)
        if marker:
            beside = package / marker[1]  # what a relative cimport brings is named without its package
            place = (str(beside) if (COPY / beside).is_file() else marker[1], int(marker[2]))
        elif BOUNDARY.search(text):
            place = None
        elif place is not None:
            mapping[number] = place
    return mapping


DECLARATION = re.compile(
    r"^\s*cdef\s+[^=(]*$|^\s*(?:from|cimport|import|ctypedef|cdef\s+(?:extern|struct|enum|class))\b"
)


def declarations_removed(name: str, lines: dict[int, int]) -> dict[int, int]:
    """Without lines that only declare: C gives some of them code, and no run need reach it."""
    if not name.endswith((".pyx", ".pxd")):
        return lines
    text = ["", *(COPY / name).read_text().splitlines()]
    docstrings = _docstring_lines(text)
    return {n: c for n, c in lines.items() if not DECLARATION.match(text[n]) and n not in docstrings}


def _docstring_lines(text: list[str]) -> set[int]:
    inside, found = False, set()
    for number, line in enumerate(text):
        quotes = line.count('"""')
        if inside or quotes:
            found.add(number)
        inside ^= quotes % 2 == 1
    return found


def ranges(numbers: list[int]) -> str:
    """1-3,7"""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def report(counts: Counts) -> bool:
    """Print the table; is every kind of file at its minimum?"""
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    print(f"{'file':<44}{'lines':>7}{'missed':>8}{'%':>8}  missed lines")
    for name in sorted(counts):
        lines = counts[name]
        missed = sorted(number for number, count in lines.items() if count == 0)
        suffix = Path(name).suffix
        totals[suffix][0] += len(lines)
        totals[suffix][1] += len(missed)
        print(f"{name:<44}{len(lines):>7}{len(missed):>8}{_percent(len(lines), len(missed)):>8.1f}  {ranges(missed)}")
    fine = True
    for suffix, minimum in MINIMUM.items():
        lines_of_kind, missed_of_kind = totals[suffix]
        percent = _percent(lines_of_kind, missed_of_kind)
        enough = lines_of_kind > 0 and percent >= minimum
        fine &= enough
        verdict = "" if enough else f"  BELOW {minimum} %"
        print(f"{'all ' + suffix:<44}{lines_of_kind:>7}{missed_of_kind:>8}{percent:>8.1f}{verdict}")
    return fine


def _percent(lines: int, missed: int) -> float:
    return 100.0 * (lines - missed) / lines if lines else 100.0


def main() -> int:
    copy_tree()
    run_tests(sys.argv[1:])
    return 0 if report(python_counts() | c_counts()) else 1


if __name__ == "__main__":
    sys.exit(main())
