"""Is this installation whole? Uses the tree, the header and the plugin as a stranger would: smoke.py HOST_C

Imports nothing but the standard library, numpy and radixkv, which must come from an installed package.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata, resources
from pathlib import Path

import numpy as np

import radixkv


def use_the_tree() -> None:
    tree = radixkv.RadixTree(page_size=4)
    tokens = np.arange(16, dtype=np.int32)
    tree.insert(tokens, np.arange(4, dtype=np.int32))
    match = tree.match(tokens)
    assert match.num_tokens == 16, match.num_tokens
    tree.lock(match.device_node)
    assert tree.evict(100).num_tokens == 0
    tree.unlock(match.device_node)
    assert sorted(tree.evict(100).page_ids) == [0, 1, 2, 3]
    tree.check_integrity()


def load_the_plugin() -> None:
    plugin = ctypes.CDLL(radixkv.get_library_path())
    plugin.rkv_get_api.restype = ctypes.c_void_p
    assert plugin.rkv_get_api(1), "the plugin has no table"


def ask_pkg_config() -> None:
    """Where there is a pkg-config, it finds the header of this installation."""
    if shutil.which("pkg-config"):
        environment = os.environ | {"PKG_CONFIG_PATH": str(Path(radixkv.get_library_path()).parent / "pkgconfig")}
        command = ["pkg-config", "--variable=includedir", "radixkv"]
        said = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        assert Path(said.strip()).resolve() == Path(radixkv.get_include()).resolve(), said


def compile_a_host(source: Path, folder: Path) -> str:
    library = Path(radixkv.get_library_path())
    command = [os.environ.get("CC", "cc"), "-std=c99", "-Wall", "-Werror", f"-I{radixkv.get_include()}", str(source)]
    command += [str(library), f"-Wl,-rpath,{library.parent}", "-pthread", "-o", str(folder / "host")]
    subprocess.run(command, check=True)
    return subprocess.run([folder / "host"], check=True, capture_output=True, text=True).stdout


def main() -> None:
    package = Path(radixkv.__file__).parent
    assert "site-packages" in package.parts, f"{package} is not an installation"
    assert metadata.version("radixkv") == radixkv.__version__
    for name in ["py.typed", "tree/core.pyi", "lib/pkgconfig/radixkv.pc", "include/radixkv/radixkv.h"]:
        found = resources.files("radixkv").joinpath(name)
        assert found.is_file(), f"{name} is not in the package"
    assert {"torch", "cupy"}.isdisjoint(sys.modules), "importing radixkv must not import an accelerator library"
    use_the_tree()
    load_the_plugin()
    ask_pkg_config()
    with tempfile.TemporaryDirectory() as folder:
        print(compile_a_host(Path(sys.argv[1]), Path(folder)), end="")
    print(f"radixkv {radixkv.__version__} works from {package}")


if __name__ == "__main__":
    main()
