"""Build: every Cython and C object is compiled once and linked twice.

The same objects become
  * the Python extensions ``radixkv.tree.core``, ``radixkv.tree.prefix_index`` and ``radixkv.transfer.cpu``, and
  * ``radixkv/lib/libradixkv.so.1``, the Python-free plugin. It is linked with ``--gc-sections -z defs`` and only
    ``rkv_*`` exported, so the link fails if any exported function can reach a Python symbol.

Environment:
  RKV_CFLAGS / RKV_LDFLAGS  appended to every compile / link (gcov)
  RKV_OBJECTS_ONLY=1        compile and stop: csrc/tools/build_objects.py links test programs from the objects
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = "0.1.0"
SONAME = "libradixkv.so.1"
OBJECTS_ONLY = os.environ.get("RKV_OBJECTS_ONLY") == "1"

CFLAGS = ["-std=gnu11", "-O3", "-g1", "-ffunction-sections", "-fdata-sections", "-fvisibility=hidden", "-pthread"]
CFLAGS += ["-include", "csrc/src/glibc_floor.h"]
CFLAGS += shlex.split(os.environ.get("RKV_CFLAGS", ""))
LDFLAGS = ["-pthread", "-Wl,--gc-sections", *shlex.split(os.environ.get("RKV_LDFLAGS", ""))]
MACROS: list[tuple[str, str | None]] = [("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"), ("RKV_BUILDING", None)]

# -z defs proves the plugin free of Python only if generated code has no reason to raise: hence these directives.
DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "initializedcheck": False,
    "cdivision": True,
    "embedsignature": True,
}

MODULES = ["radixkv.tree.core", "radixkv.tree.prefix_index", "radixkv.transfer.cpu"]
LEAVES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "src").glob("*.c"))


class BuildExt(build_ext):
    """Compile all objects once; link each extension from the whole set; then link the plugin from the same set."""

    _objects: list[str] | None = None

    def build_extensions(self) -> None:
        sources = [str(Path(s)) for ext in self.extensions for s in ext.sources] + LEAVES
        self._objects = self.compiler.compile(
            sources,
            output_dir=self.build_temp,
            macros=MACROS,
            include_dirs=["csrc/include", "csrc/src", numpy.get_include(), *self.include_dirs],
            extra_preargs=CFLAGS,
            depends=[str(p) for p in (ROOT / "csrc").rglob("*.h")] + sources,
        )
        if not OBJECTS_ONLY:
            super().build_extensions()
            self.link_plugin()

    def build_extension(self, ext: Extension) -> None:
        assert self._objects is not None
        init = f"PyInit_{ext.name.rpartition('.')[2]}"
        export_map = Path(self.build_temp) / f"{ext.name}.map"
        export_map.write_text(f"{{ global: {init}; local: *; }};\n")
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            self._objects, target, extra_preargs=LDFLAGS, extra_postargs=[f"-Wl,--version-script={export_map}"]
        )

    def link_plugin(self) -> None:
        lib = self._lib_dir()
        (lib / "pkgconfig").mkdir(parents=True, exist_ok=True)
        assert self._objects is not None
        command = [
            *shlex.split(os.environ.get("LDSHARED", "")),
        ] or [self.compiler.compiler_so[0], "-shared"]
        command += [*self._objects, *LDFLAGS, "-o", str(lib / SONAME), f"-Wl,-soname,{SONAME}"]
        command += ["-Wl,--version-script=csrc/src/export.map", "-Wl,-z,defs"]
        subprocess.run(command, check=True)
        self._write_pkgconfig(lib, includedir="${prefix}/include")

    def copy_extensions_to_source(self) -> None:
        """In-place and editable builds: setuptools copies only the extensions, so bring the plugin along."""
        if OBJECTS_ONLY:
            return
        super().copy_extensions_to_source()
        lib = ROOT / "radixkv" / "lib"
        shutil.copytree(self._lib_dir(), lib, dirs_exist_ok=True)
        self._write_pkgconfig(lib, includedir="${prefix}/../csrc/include")

    def get_outputs(self) -> list[str]:
        lib = self._lib_dir()
        return [*super().get_outputs(), str(lib / SONAME), str(lib / "pkgconfig" / "radixkv.pc")]

    def _write_pkgconfig(self, lib: Path, includedir: str) -> None:
        """Relative to the file itself, so that wheels can be installed anywhere."""
        text = (ROOT / "csrc" / "src" / "radixkv.pc.in").read_text()
        text = text.replace("@VERSION@", VERSION).replace("@INCLUDEDIR@", includedir)
        (lib / "pkgconfig" / "radixkv.pc").write_text(text)

    def _lib_dir(self) -> Path:
        return Path(self.build_lib) / "radixkv" / "lib"


setup(
    cmdclass={"build_ext": BuildExt},
    ext_modules=cythonize(
        [Extension(name, [name.replace(".", "/") + ".pyx"]) for name in MODULES],
        compiler_directives=DIRECTIVES,
        build_dir="build/cython",
        include_path=["."],
    ),
)
