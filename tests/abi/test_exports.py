"""The plugin holds the header's functions and nothing else, needs libc alone, and is found by those who look for it."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import radixkv
import radixkv.paths
from radixkv.tree import core

from . import header
from .toolchain import library, run, tool

# symbols of a newer glibc keep the wheel off older systems
GLIBC_FLOOR = (2, 17)


def _nm(*flags: str) -> list[list[str]]:
    return [line.split() for line in run([tool("nm"), "-D", *flags, library()]).stdout.splitlines()]


def _readelf(pattern: str) -> list[str]:
    return re.findall(pattern, run([tool("readelf"), "-d", library()]).stdout)


def test_exports_are_the_functions_of_the_header() -> None:
    exported = {words[-1].partition("@")[0] for words in _nm("--defined-only") if words[1] != "A"}
    assert exported == set(header.functions())


def test_nothing_of_python_is_needed() -> None:
    strong = {words[-1] for words in _nm("--undefined-only") if words[0] == "U"}
    assert strong, "a library that needs nothing at all has lost its code"
    assert [name for name in strong if name.startswith(("Py", "_Py"))] == []
    assert [name for name in strong if "@GLIBC_" not in name] == [], "only libc is linked"


def test_needs_libc_alone_and_has_a_soname() -> None:
    needed = _readelf(r"\(NEEDED\).*\[(.*)\]")
    # the dynamic loader is a part of libc: it offers the thread-local storage behind rkv_last_error
    assert [name for name in needed if not name.startswith("ld-linux")] == ["libc.so.6"]
    assert _readelf(r"\(SONAME\).*\[(.*)\]") == ["libradixkv.so.1"]
    assert _readelf(r"\((?:RPATH|RUNPATH)\)") == []


def test_glibc_floor() -> None:
    versions = {
        tuple(map(int, version.split(".")))
        for words in _nm("-u")
        for version in re.findall(r"@GLIBC_([\d.]+)", words[-1])
    }
    assert max(versions) <= GLIBC_FLOOR, f"needs glibc {max(versions)}"


class _Api(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("abi_version", ctypes.c_uint32),
        *[(name, ctypes.c_void_p) for name in header.table()],
    )


def _table_of_the_capsule() -> _Api:
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return _Api.from_address(get_pointer(core._C_API, b"radixkv._C_API"))


def _table_of_the_plugin(version: int) -> _Api | None:
    plugin = ctypes.CDLL(radixkv.get_library_path())
    plugin.rkv_get_api.restype, plugin.rkv_get_api.argtypes = ctypes.c_void_p, [ctypes.c_uint32]
    address = plugin.rkv_get_api(version)
    return _Api.from_address(address) if address else None


def test_plugin_and_capsule_give_the_same_whole_table() -> None:
    plugin, capsule = _table_of_the_plugin(1), _table_of_the_capsule()
    assert plugin is not None
    for table in (plugin, capsule):
        assert (table.struct_size, table.abi_version) == (ctypes.sizeof(_Api), 1)
        assert [name for name in header.table() if not getattr(table, name)] == []
    # one table for the process of the engine, one inside Python: two copies of the code
    assert plugin.tree_create != capsule.tree_create


def test_table_entries_are_the_exported_functions() -> None:
    plugin, table = ctypes.CDLL(radixkv.get_library_path()), _table_of_the_plugin(1)
    for name in header.table():
        exported = ctypes.cast(getattr(plugin, f"rkv_{name}"), ctypes.c_void_p).value
        assert getattr(table, name) == exported, name


def test_unknown_abi_versions_have_no_table() -> None:
    assert [_table_of_the_plugin(version) for version in (0, 2, 0xFFFFFFFF)] == [None, None, None]


def test_a_tree_of_the_capsule_works_beside_python() -> None:
    """An engine in the process takes the table from Python and calls it with no Python between."""
    table = _table_of_the_capsule()
    tree = ctypes.c_void_p()
    create = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))(table.tree_create)
    check = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_void_p] * 4, ctypes.c_size_t)(table.tree_check_integrity)
    destroy = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(table.tree_destroy)
    assert create(None, ctypes.byref(tree)) == 0
    assert check(tree, None, None, None, 0) == 0
    destroy(tree)


def test_versions_agree() -> None:
    plugin = ctypes.CDLL(radixkv.get_library_path())
    plugin.rkv_version.restype = ctypes.c_char_p
    assert plugin.rkv_version().decode() == radixkv.__version__


def test_paths_name_real_files() -> None:
    assert (Path(radixkv.get_include()) / "radixkv" / "radixkv.h").is_file()
    assert Path(radixkv.get_library_path()).is_file()


def test_pkg_config_file_is_relocatable() -> None:
    folder = library().parent
    assert str(folder) not in (folder / "pkgconfig" / "radixkv.pc").read_text()
    config = [tool("pkg-config"), "radixkv"]
    env = {"PKG_CONFIG_PATH": str(folder / "pkgconfig")}
    include = run([*config, "--variable=includedir"], env=env).stdout.strip()
    assert Path(include).resolve() == Path(radixkv.get_include()).resolve()
    assert Path(run([*config, "--variable=libdir"], env=env).stdout.strip()).resolve() == folder.resolve()
    assert run([*config, "--modversion"], env=env).stdout.strip() == radixkv.__version__
