"""Count instructions per matched token, inserted token and evicted leaf, and compare with baseline.json.

``python bench/callgrind/run.py [--check | --update] [--library PATH] [--json FILE]``. Counts depend on compiler,
libc, valgrind and the vector extensions that valgrind offers; ``--check`` fails above +3 % when all of these equal
the baseline's, and otherwise says what differs and passes. Needs valgrind and a C compiler ($CC, else cc); the
Python standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
BASELINE = Path(__file__).with_name("baseline.json")
LIBRARY = ROOT / "radixkv" / "lib" / "libradixkv.so.1"
ALLOWED_RISE = 0.03
OPERATIONS = {
    "match": "instructions_per_matched_token",
    "insert": "instructions_per_inserted_token",
    "evict": "instructions_per_evicted_leaf",
}
"""The counted function of driver.c, and the figure that comes of it. The order is that of the driver's output."""


def output(*command: str) -> str:
    """stdout of a command. Raises: CalledProcessError, OSError."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def versions(library: Path) -> dict[str, str]:
    """What must be equal for two counts to be comparable."""
    comment = re.findall(r"\]\s+(\S.*)", output("readelf", "-p", ".comment", str(library)))
    flags = set(re.findall(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[0].split())
    return {
        "compiler": "; ".join(sorted(set(comment))),
        "libc": " ".join(platform.libc_ver()),
        "valgrind": output("valgrind", "--version"),
        # valgrind hides what it cannot run, so of the vector extensions only these matter
        "machine": " ".join([platform.machine(), *sorted(flags & {"avx2", "avx", "sse4_2"})]),
    }


def build_driver(folder: Path, library: Path) -> Path:
    """Compile driver.c against the library; returns the program."""
    program = folder / "driver"
    command = [
        os.environ.get("CC", "cc"),
        "-std=c99",
        "-O2",
        "-g",
        "-Wall",
        "-Wextra",
        "-Werror",
        f"-I{ROOT / 'csrc' / 'include'}",
        str(Path(__file__).with_name("driver.c")),
        str(library),
        f"-Wl,-rpath,{library.parent}",
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True)
    return program


def count(program: Path, folder: Path, operation: str) -> int:
    """Instructions inside counted_<operation>, callees included, over one run of the driver."""
    result = folder / f"callgrind.{operation}"
    output(
        "valgrind",
        "--tool=callgrind",
        "--collect-atstart=no",
        f"--toggle-collect=counted_{operation}",
        f"--callgrind-out-file={result}",
        str(program),
    )
    totals = re.search(r"^(?:totals|summary): (\d+)", result.read_text(), re.M)
    if totals is None or int(totals[1]) == 0:
        raise RuntimeError(f"callgrind counted nothing in counted_{operation}")
    return int(totals[1])


def measure(library: Path) -> dict[str, Any]:
    """Build, run natively once, run under callgrind once an operation. Returns versions, units (what was divided by)
    and counts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = build_driver(folder, library)
        units = dict(zip(OPERATIONS, map(int, output(str(program)).split()), strict=True))
        counts = {
            figure: round(count(program, folder, operation) / units[operation], 4)
            for operation, figure in OPERATIONS.items()
        }
    return {"versions": versions(library), "units": units, "counts": counts}


def compare(result: dict[str, Any], baseline: dict[str, Any]) -> list[str]:
    """Lines that say what rose above what is allowed; prints every figure beside its baseline."""
    different = [
        f"{name}: baseline {old!r}, here {result['versions'].get(name)!r}"
        for name, old in baseline["versions"].items()
        if result["versions"].get(name) != old
    ]
    if result["units"] != baseline["units"]:
        different.append(f"the driver's work: baseline {baseline['units']}, here {result['units']}")
    risen = []
    for figure, now in result["counts"].items():
        was = baseline["counts"].get(figure)
        change = f"{now / was - 1:+.2%} of {was}" if was else "no baseline"
        print(f"{figure}: {now} ({change})")
        if was and now > was * (1 + ALLOWED_RISE):
            risen.append(f"{figure} rose from {was} to {now}, more than {ALLOWED_RISE:.0%}")
    if different:
        print("not gated, because the counts are not comparable:", *different, sep="\n  ")
        return []
    return risen


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help=f"fail if a count is more than {ALLOWED_RISE:.0%} above the baseline"
    )
    parser.add_argument("--update", action="store_true", help="make this the baseline")
    parser.add_argument("--library", type=Path, default=LIBRARY, help="the libradixkv.so.1 to count")
    parser.add_argument("--json", type=Path, help="write versions and counts here")
    options = parser.parse_args()
    if shutil.which("valgrind") is None:
        print("callgrind: valgrind is not installed, so nothing was counted and nothing is gated")
        sys.exit(0 if options.check else 1)
    if not options.library.exists():
        sys.exit(f"callgrind: no library at {options.library}; build it first (setup.py build_ext --inplace)")
    result = measure(options.library.resolve())
    print(*(f"{name}: {value}" for name, value in result["versions"].items()), sep="\n")
    risen: list[str] = []
    if BASELINE.exists() and not options.update:
        risen = compare(result, json.loads(BASELINE.read_text()))
    else:
        print(*(f"{name}: {value}" for name, value in result["counts"].items()), sep="\n")
    for path in [options.json] * bool(options.json) + [BASELINE] * options.update:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    if options.check and risen:
        sys.exit("callgrind: " + "; ".join(risen))


if __name__ == "__main__":
    main()
