"""The header compiles as strict C and C++ and is complete: the table holds every function, in the header's order."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import header
from .toolchain import INCLUDE, STRICT, run, tool


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("standard", ["c99", "c11"])
def test_header_is_strict_c(tmp_path: Path, compiler: str, standard: str) -> None:
    source = tmp_path / "user.c"
    source.write_text('#include <radixkv/radixkv.h>\n#include "radixkv/radixkv.h"\nint main(void) { return RKV_OK; }\n')
    run([tool(compiler), f"-std={standard}", *STRICT, f"-I{INCLUDE}", "-fsyntax-only", source])


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_header_is_strict_cpp(tmp_path: Path, compiler: str) -> None:
    source = tmp_path / "user.cpp"
    source.write_text("#include <radixkv/radixkv.h>\nint main() { rkv_match m; RKV_INIT(&m); return RKV_OK; }\n")
    run([tool(compiler), "-std=c++17", *STRICT, f"-I{INCLUDE}", "-fsyntax-only", source])


def test_header_needs_nothing_but_the_c_standard() -> None:
    includes = [line for line in header.HEADER.read_text().splitlines() if line.startswith("#include")]
    assert includes == ["#include <stddef.h>", "#include <stdint.h>"]


def test_the_table_holds_every_function_in_the_order_of_the_header() -> None:
    functions = header.functions()
    assert len(functions) == len(set(functions))
    assert functions[-1] == "rkv_get_api", "the function that returns the table is the last of the header"
    assert [f"rkv_{field}" for field in header.table()] == functions[:-1]


def test_a_table_entry_has_the_type_of_its_function(tmp_path: Path) -> None:
    source = tmp_path / "types.c"
    checks = [
        f'CHECK(__typeof__(&rkv_{field}), __typeof__(((rkv_api *)0)->{field}), "{field}");' for field in header.table()
    ]
    assert len(checks) > 30
    check = "#define CHECK(a, b, name) _Static_assert(__builtin_types_compatible_p(a, b), name)\n"
    source.write_text("#include <radixkv/radixkv.h>\n" + check + "\n".join(checks) + "\n")
    run([tool("gcc"), "-std=gnu11", f"-I{INCLUDE}", "-fsyntax-only", source])


def test_every_struct_that_crosses_the_border_begins_with_its_size() -> None:
    # plain values inside another struct or an array, whose layout can only change with the ABI version
    bare = {"rkv_allocator", "rkv_backup", "rkv_event", "rkv_index_node", "rkv_index_page"}
    assert {struct.name for struct in header.structs() if struct.fields[0] != "struct_size"} == bare


def test_every_function_is_explained() -> None:
    """A comment stands before each group of declarations, and each creator names its destroyer."""
    text = header.HEADER.read_text()
    for creator, destroyer in [
        (f, f.replace("_create", "_destroy")) for f in header.functions() if f.endswith("_create")
    ]:
        assert destroyer in header.functions()
        comment = text[: text.index(f" {creator}(")].rpartition("/*")[2]
        assert destroyer in comment
