"""L0: optional packages, imported where they are used; one that is missing gives an error that names the extra."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from .errors import MissingExtraError

__all__ = ["check_installed", "require"]


def check_installed(module: str, purpose: str, extra: str) -> None:
    """Find a top-level package without importing it, which may take seconds. Raises: MissingExtraError."""
    if importlib.util.find_spec(module) is None:
        raise MissingExtraError(f"{purpose} needs {module}: pip install 'radixkv[{extra}]'")


def require(module: str, purpose: str, extra: str) -> Any:
    """Import an optional module. Raises: MissingExtraError, which says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtraError(f"{purpose} needs {package}: pip install 'radixkv[{extra}]' ({error})") from error
