"""L0: optional packages, imported where they are used; one that is missing gives an error that names the extra."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import MissingExtraError

__all__ = ["require"]


def require(module: str, purpose: str, extra: str) -> Any:
    """Import an optional module. Raises: MissingExtraError, which says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtraError(f"{purpose} needs {package}: pip install 'radixkv[{extra}]' ({error})") from error
