"""csrc/src/copy*.c by themselves, driven by copy_stress.c: as they ship, under ASan + UBSan, and under TSan."""

from __future__ import annotations

from pathlib import Path

import pytest

from .test_sanitizers import _run_sanitized
from .toolchain import HERE, INCLUDE, ROOT, STRICT, compile_flavour, library, run, tool

SOURCES = ROOT / "csrc" / "src"
DRIVER = HERE / "copy_stress.c"


@pytest.mark.parametrize("optimised", ["-O1", "-O3"])
def test_random_nests_threads_and_forks(tmp_path: Path, optimised: str) -> None:
    program = tmp_path / "copy_stress"
    flags = ["-std=c11", *STRICT, optimised, "-g", f"-I{SOURCES}", f"-I{INCLUDE}", "-pthread"]
    sources = [DRIVER, *sorted(SOURCES.glob("copy*.c")), library(), f"-Wl,-rpath,{library().parent}"]
    run([tool("gcc"), *flags, *sources, "-o", program])
    assert "4 threads, 400 copies each" in run([program, "4", "400", "1"]).stdout


def test_a_copy_makes_no_system_call_while_there_are_helpers_enough(tmp_path: Path) -> None:
    program = tmp_path / "copy_signals"
    flags = ["-std=gnu11", *STRICT, "-O1", "-g", f"-I{SOURCES}", f"-I{INCLUDE}", "-pthread"]
    sources = [HERE / "copy_signals.c", *sorted(SOURCES.glob("copy*.c")), library(), f"-Wl,-rpath,{library().parent}"]
    run([tool("gcc"), *flags, *sources, "-o", program])
    assert run([program]).stdout == "ok\n"


@pytest.mark.parametrize("flavour", ["asan", "tsan"])
def test_sanitized(tmp_path: Path, flavour: str) -> None:
    program = compile_flavour(flavour, DRIVER, tmp_path / "program", f"-I{SOURCES}")
    assert "4 threads, 150 copies each" in _run_sanitized(program, "4", "150", "3")
