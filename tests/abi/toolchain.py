"""Compilers for the tests of this folder: find them, compile, run, and say what is missing.

A tool that is not installed skips the test that needs it, with its name; .ci/run installs all of them, and sets
RADIXKV_REQUIRE_TOOLS=1, with which a missing tool is a failure.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

import radixkv.paths

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
EXAMPLES = ROOT / "csrc" / "examples"
INCLUDE = Path(radixkv.paths.get_include())
STRICT = ["-Wall", "-Wextra", "-pedantic", "-Werror"]


def tool(name: str) -> str:
    """The path of a program, or skip the test."""
    path = shutil.which(name) or shutil.which(name, path=str(Path.home() / ".cargo" / "bin"))
    if path is None:
        missing(f"{name} is not installed")
    return path


def missing(reason: str) -> None:
    if os.environ.get("RADIXKV_REQUIRE_TOOLS") == "1":
        pytest.fail(f"{reason}, and RADIXKV_REQUIRE_TOOLS=1")
    pytest.skip(reason)


def library() -> Path:
    return Path(radixkv.paths.get_library_path())


def run(
    command: Sequence[str | Path], *, env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run to the end, output captured. Fails the test with both streams if the exit status is not 0."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words,
        env=os.environ | (env or {}),
        cwd=cwd,
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
    )
    if done.returncode != 0:
        streams = f"--- stdout\n{done.stdout[-8000:]}\n--- stderr\n{done.stderr[-8000:]}"
        pytest.fail(f"{' '.join(words)}\nexited with {done.returncode}\n{streams}", pytrace=False)
    return done


def compile_linked(source: Path, program: Path, *, standard: str = "c11", compiler: str = "gcc") -> Path:
    """Compile a C program against the header and link it with the plugin."""
    flags = [f"-std={standard}", *STRICT, "-O1", "-g", f"-I{INCLUDE}", "-pthread"]
    run([tool(compiler), *flags, source, library(), f"-Wl,-rpath,{library().parent}", "-o", program])
    return program


def compile_flavour(flavour: str, source: Path, program: Path, *flags: str) -> Path:
    """Compile a C program with a sanitizer, linked with the core compiled alike (csrc/tools/build_objects.py)."""
    builder = _builder()
    compiler, _, program_flags = builder.FLAVOURS[flavour]
    tool(compiler)
    archive = builder.build(flavour)
    command = [tool(compiler), "-std=c11", *STRICT, *program_flags, f"-I{INCLUDE}", *flags, source, archive]
    run([*command, "-pthread", "-o", program])
    return program


def _builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_objects", ROOT / "csrc" / "tools" / "build_objects.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
