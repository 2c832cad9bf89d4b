"""A library of the future for a host of today: structs that grew, and node slots that run out of handles."""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path

import numpy as np

from .toolchain import HERE, INCLUDE, ROOT, STRICT, missing, run, tool

STRUCTS = ("rkv_index_config", "rkv_index_hit", "rkv_index_stats")


def test_an_old_host_is_served(tmp_path: Path) -> None:
    generated = ROOT / "build" / "cython" / "radixkv" / "tree" / "prefix_index.c"
    if not generated.exists():
        missing(f"{generated} is not there: build from source")
    header = (INCLUDE / "radixkv" / "radixkv.h").read_text()
    for name in STRUCTS:
        header, grown = re.subn(rf"(\n}} {name};)", r"\n    uint64_t later[4];\1", header)
        assert grown == 1
    source, fewer = re.subn(r"(GEN_MASK = )0x3ffffff\b(?=,|\n)", r"\g<1>0x3f", generated.read_text())
    assert fewer >= 1
    (tmp_path / "radixkv").mkdir()
    (tmp_path / "radixkv" / "radixkv.h").write_text(header)
    (tmp_path / "prefix_index.c").write_text(source)
    gcc, internals = tool("gcc"), ROOT / "csrc" / "src"
    library = [tmp_path / "prefix_index.c", *(internals / f"{name}.c" for name in ("compare", "memory", "status"))]
    includes = [f"-I{path}" for path in (tmp_path, internals, sysconfig.get_path("include"), np.get_include())]
    flags = [
        "-std=gnu11",
        "-w",
        "-O1",
        "-ffunction-sections",
        "-fdata-sections",
        "-DRKV_BUILDING",
        "-fvisibility=hidden",
    ]
    objects = [tmp_path / f"{path.stem}.o" for path in library]
    for path, target in zip(library, objects, strict=True):
        run([gcc, *flags, *includes, "-c", path, "-o", target])
    program = tmp_path / "old_host"
    host = ["-std=c11", *STRICT, "-O1", f"-I{INCLUDE}", HERE / "old_host.c"]
    run([gcc, *host, *objects, "-pthread", "-Wl,--gc-sections", "-o", program])
    assert run([program]).stdout == "an old host is served\n"
