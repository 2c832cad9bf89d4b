"""Where header and plugin are said to be."""

from __future__ import annotations

from pathlib import Path

import pytest

import radixkv
from radixkv import paths


def test_the_folder_of_the_header_is_the_one_to_pass_to_a_compiler() -> None:
    assert (Path(radixkv.get_include()) / "radixkv" / "radixkv.h").is_file()


def test_the_plugin_is_named_by_its_soname() -> None:
    assert Path(radixkv.get_library_path()).name == "libradixkv.so.1"


def test_an_installed_header_goes_before_that_of_a_source_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "radixkv"
    for folder in (package / "include", tmp_path / "csrc" / "include"):
        (folder / "radixkv").mkdir(parents=True)
        (folder / "radixkv" / "radixkv.h").touch()
    monkeypatch.setattr(paths, "_PACKAGE", package)
    assert paths.get_include() == str(package / "include")
    (package / "include" / "radixkv" / "radixkv.h").unlink()
    assert paths.get_include() == str(tmp_path / "csrc" / "include")


def test_what_is_not_there_is_an_error_that_says_where_it_was_sought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "_PACKAGE", tmp_path)
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "lib")):
        paths.get_library_path()
