"""What is installed is what is there: every package is named, and so is every file that is no Python."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = (".pyi", ".pyx", ".pxd", ".cu", ".cuh", ".h")


@pytest.fixture(scope="module")
def setuptools_table() -> Any:
    path = ROOT / "pyproject.toml"
    if not path.exists():
        pytest.skip("not run from a checkout: there is no pyproject.toml")
    return tomllib.loads(path.read_text())["tool"]["setuptools"]


def test_every_package_is_named(setuptools_table: Any) -> None:
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "radixkv").rglob("__init__.py")}
    assert found - set(setuptools_table["packages"]) == set()


def test_every_source_is_package_data(setuptools_table: Any) -> None:
    listed = [(Path(*name.split(".")), patterns) for name, patterns in setuptools_table["package-data"].items()]
    missing = []
    for path in (path.relative_to(ROOT) for path in (ROOT / "radixkv").rglob("*") if path.suffix in SOURCES):
        inside = [(path.relative_to(package), patterns) for package, patterns in listed if path.is_relative_to(package)]
        if not any(fnmatch(str(name), pattern) for name, patterns in inside for pattern in patterns):
            missing.append(str(path))
    assert missing == []
