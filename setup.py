"""Build: every Cython and C object is compiled once and linked twice.

The same objects become
  * the Python extensions ``radixkv.tree.core``, ``.page_hash``, ``.prefix_index``, ``radixkv.transfer.cpu``, ..., and
  * ``radixkv/lib/libradixkv.so.1``, the Python-free plugin. It is linked with ``--gc-sections -z defs`` and only
    ``rkv_*`` exported, so the link fails if any exported function can reach a Python symbol.

Where nvcc is, ``radixkv/lib`` also gets the GPU half: ``radixkv_kernels.fatbin`` (kernels/ for sm_80, sm_90, sm_100,
and PTX for what comes later), which CuPy loads, and ``libradixkv_cuda.so.1``, the C launcher with that fatbin inside.

Environment:
  RKV_CFLAGS / RKV_LDFLAGS  appended to every compile / link (gcov)
  RKV_NVCC                  the nvcc to use; empty: build no GPU half. Unset: the one on PATH, if there is one
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
from setuptools.modified import newer_group

ROOT = Path(__file__).parent.resolve()
VERSION = "0.1.0"
SONAME = "libradixkv.so.1"
CUDA_SONAME = "libradixkv_cuda.so.1"
FATBIN = "radixkv_kernels.fatbin"
NVCC = os.environ.get("RKV_NVCC", shutil.which("nvcc") or "")
GENCODE = [
    *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90, 100)),
    "-gencode=arch=compute_90,code=compute_90",
]
OBJECTS_ONLY = os.environ.get("RKV_OBJECTS_ONLY") == "1"

CFLAGS = ["-std=gnu11", "-O3", "-g1", "-ffunction-sections", "-fdata-sections", "-fvisibility=hidden", "-pthread"]
CFLAGS += ["-Wno-sign-compare"]  # Cython compares a range() over an enum's constant as int
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

MODULES = ["radixkv.tree.core", "radixkv.tree.page_hash", "radixkv.tree.prefix_index", "radixkv.transfer.cpu"]
MODULES += ["radixkv.hicache.slots", "radixkv.pool.page_ops", "radixkv.storage.batch"]
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
            if NVCC:
                self.build_cuda()

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

    def build_cuda(self) -> None:
        """The fatbin, and the C launcher around it; rebuilt only when a source is newer."""
        fatbin, target, scratch = self._lib_dir() / FATBIN, self._lib_dir() / CUDA_SONAME, Path(self.build_temp)
        kernels = [str(p) for p in (ROOT / "kernels").glob("*.[ch]*")]
        sources = ["csrc/cuda/plan.c", "csrc/cuda/launch.c"]
        depends = [*kernels, *sources, "csrc/cuda/internal.h", "csrc/cuda/export.map", "setup.py"]
        depends.append("csrc/include/radixkv/radixkv_cuda.h")
        if not self.force and fatbin.exists() and not newer_group(depends, str(target)):
            return
        flags = ["-std=c++17", "-O3", "-fatbin", *GENCODE]
        if "--compress-mode" in subprocess.run([NVCC, "--help"], check=True, capture_output=True, text=True).stdout:
            flags.append("--compress-mode=size")  # 129 instead of 873 KB
        subprocess.run([NVCC, *flags, "kernels/all.cu", "-o", str(fatbin)], check=True)
        stub = scratch / "rkv_cuda_fatbin.S"
        stub.write_text(
            ".section .rodata\n.balign 16\n.globl rkv_cuda_fatbin\n.hidden rkv_cuda_fatbin\nrkv_cuda_fatbin:\n"
            f'.incbin "{fatbin.resolve()}"\n.section .note.GNU-stack,"",@progbits\n'
        )
        command = [self.compiler.compiler_so[0], "-shared", "-std=gnu11", "-O2", "-g1", "-fPIC", "-fvisibility=hidden"]
        command += ["-DRKV_BUILDING", "-Icsrc/include", "-Ikernels"]
        command += [*sources, str(stub), "-o", str(target), f"-Wl,-soname,{CUDA_SONAME}", "-pthread", "-ldl"]
        subprocess.run([*command, "-Wl,--version-script=csrc/cuda/export.map", "-Wl,-z,defs"], check=True)

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
        cuda = [str(lib / name) for name in (CUDA_SONAME, FATBIN) if NVCC]
        return [*super().get_outputs(), str(lib / SONAME), str(lib / "pkgconfig" / "radixkv.pc"), *cuda]

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
