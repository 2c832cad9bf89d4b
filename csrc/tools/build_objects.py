"""Compile the core with a sanitizer's flags and archive it for C test programs: ``build_objects.py asan|tsan|fuzz``.

The library proper is linked with --gc-sections, so that nothing of Python is left in it. Sanitizers and libFuzzer keep
tables of all globals and branches, and those keep the Python-facing half alive. So here it stays, and its undefined
Python symbols are satisfied by weak stubs that trap: a C program that reached one would die.

Prints the path of the archive. Does nothing if the archive is newer than every source.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

COMMON = ["-O1", "-g", "-fno-omit-frame-pointer"]
ASAN = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAVOURS: dict[str, tuple[str, list[str], list[str]]] = {
    # name: compiler, flags of the core, flags of the program that links it
    "asan": ("gcc", [*COMMON, *ASAN], [*COMMON, *ASAN]),
    "tsan": ("gcc", [*COMMON, "-fsanitize=thread"], [*COMMON, "-fsanitize=thread"]),
    "fuzz": (
        "clang",
        [*COMMON, *ASAN, "-fsanitize=fuzzer-no-link", "-fno-sanitize=function"],
        [*COMMON, *ASAN, "-fsanitize=fuzzer"],
    ),
}


def sources() -> list[Path]:
    trees = [(ROOT / "radixkv", "*.p[yx][xd]"), (ROOT / "csrc" / "src", "*.[ch]"), (ROOT / "csrc" / "include", "*.h")]
    found = [path for folder, pattern in trees for path in folder.rglob(pattern)]
    return [*found, ROOT / "setup.py", Path(__file__)]


def build(flavour: str) -> Path:
    """The archive of a flavour, compiled if it is not there or is older than a source."""
    compiler, flags, _ = FLAVOURS[flavour]
    folder = ROOT / "build" / flavour
    archive = folder / "libradixkv.a"
    if archive.exists() and archive.stat().st_mtime > max(path.stat().st_mtime for path in sources()):
        return archive
    environment = os.environ | {"CC": compiler, "RKV_CFLAGS": " ".join(flags), "RKV_OBJECTS_ONLY": "1"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", str(folder), "--build-lib", str(folder)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=sys.stderr)
    objects = sorted(str(path) for path in folder.rglob("*.o") if path.name != "stubs.o")
    stubs = folder / "stubs.c"
    lines = [f"__attribute__((weak)) void {name}(void) {{ __builtin_trap(); }}\n" for name in _python_symbols(objects)]
    stubs.write_text("".join(lines))
    subprocess.run([compiler, "-w", "-fno-builtin", "-c", str(stubs), "-o", str(stubs.with_suffix(".o"))], check=True)
    archive.unlink(missing_ok=True)
    subprocess.run(["ar", "rcs", str(archive), *objects, str(stubs.with_suffix(".o"))], check=True)
    return archive


def _python_symbols(objects: list[str]) -> list[str]:
    listing = subprocess.run(["nm", "-u", *objects], check=True, capture_output=True, text=True).stdout
    names = {line.split()[-1] for line in listing.splitlines() if line.startswith(" ")}
    return sorted(name for name in names if name.startswith(("Py", "_Py")))


if __name__ == "__main__":
    print(build(sys.argv[1]))
