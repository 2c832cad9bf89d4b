"""Every binary that a wheel carries, not the plugin alone, runs on the glibc that the wheel promises."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import radixkv

from .toolchain import run, tool

PACKAGE = Path(radixkv.__file__).parent
BINARIES = sorted(path for path in PACKAGE.rglob("*.so*") if path.is_file())
PROMISED = (2, 17)


def test_the_extensions_and_the_plugin_are_among_them() -> None:
    assert {"core", "page_hash", "prefix_index", "cpu", "libradixkv"} <= {path.name.split(".")[0] for path in BINARIES}


@pytest.mark.parametrize("path", BINARIES, ids=lambda path: path.name.split(".")[0])
def test_no_symbol_is_newer_than_promised(path: Path) -> None:
    symbols = run([tool("nm"), "-D", "--undefined-only", path]).stdout
    versions = [tuple(map(int, found.split("."))) for found in re.findall(r"@GLIBC_([\d.]+)", symbols)]
    assert versions
    assert max(versions) <= PROMISED, [line for line in symbols.splitlines() if "GLIBC_2.3" in line]
