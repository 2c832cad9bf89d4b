"""The binary layout is frozen: layout.txt records every struct, field, constant and table slot of 64-bit builds.

A change here breaks hosts that were compiled earlier. Fields may only be added at the end of a struct that begins with
struct_size; record that with ``python -m tests.abi.test_layout``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from . import header
from .toolchain import HERE, INCLUDE, run, tool

RECORD = HERE / "layout.txt"


def test_layout_is_the_recorded_one(tmp_path: Path) -> None:
    recorded, actual = RECORD.read_text().splitlines(), measure(tmp_path)
    # sizes and _END sentinels move when something is added; nothing else ever may
    frozen = [line for line in recorded if " sizeof " not in line and "_END " not in line]
    broken = sorted(set(frozen) - set(actual))
    assert not broken, f"gone or moved, so that hosts built earlier would break: {broken}"
    assert actual == recorded, "the layout has grown: record it with `python -m tests.abi.test_layout`"


def measure(folder: Path) -> list[str]:
    """Compile and run a program that prints every size, offset and constant."""
    prints = []
    for name, fields in header.structs():
        prints.append(f'printf("{name} sizeof %zu\\n", sizeof({name}));')
        for field in fields:
            place = f"offsetof({name}, {field}), sizeof((({name} *)0)->{field})"
            prints.append(f'printf("{name}.{field} at %zu size %zu\\n", {place});')
    constants = ["RKV_ABI_VERSION", "RKV_ROOT", *header.enumerators()]
    prints += [f'printf("{name} = %lld\\n", (long long){name});' for name in constants]
    source, program = folder / "layout.c", folder / "layout"
    source.write_text(
        "#include <radixkv/radixkv.h>\n#include <stdio.h>\nint main(void) {\n" + "\n".join(prints) + "\nreturn 0; }\n"
    )
    run([tool("gcc"), "-std=c11", f"-I{INCLUDE}", source, "-o", program])
    return run([program]).stdout.splitlines()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        RECORD.write_text("\n".join(measure(Path(scratch))) + "\n")
