"""L0: where the header and the plugin of this installation are, for those who compile or dlopen against it."""

from __future__ import annotations

from pathlib import Path

__all__ = ["get_include", "get_library_path"]

_PACKAGE = Path(__file__).resolve().parent


def get_include() -> str:
    """Find the folder to pass as ``-I``: ``#include <radixkv/radixkv.h>`` works with it.

    Raises: FileNotFoundError if this installation has no header.
    """
    # in a wheel the header is inside the package; in a source tree (editable install) it is in csrc
    return str(_find("radixkv/radixkv.h", _PACKAGE / "include", _PACKAGE.parent / "csrc" / "include"))


def get_library_path() -> str:
    """Find the Python-free plugin ``libradixkv.so.1``, to dlopen or to link; ``pkgconfig/radixkv.pc`` is beside it.

    Raises: FileNotFoundError if the plugin has not been built.
    """
    name = "libradixkv.so.1"
    return str(_find(name, _PACKAGE / "lib") / name)


def _find(name: str, *folders: Path) -> Path:
    """The first folder that holds ``name``."""
    for folder in folders:
        if (folder / name).is_file():
            return folder
    raise FileNotFoundError(f"{name} is in none of {', '.join(map(str, folders))}; build it with `make build`")
