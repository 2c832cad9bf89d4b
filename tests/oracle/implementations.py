"""The trees that the suites of this folder run against, and why one is missing if it is."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Any

from radixkv.tree.reference import ReferenceTree

__all__ = ["NAMES", "implementations", "missing"]

NAMES = ("reference", "core")


@cache
def implementations() -> dict[str, Any]:
    """Name -> class of the implementations that exist here."""
    found: dict[str, Any] = {"reference": ReferenceTree}
    if importlib.util.find_spec("radixkv.tree.core") is not None:
        # A core that is there but does not import is a failure, not a reason to skip.
        found["core"] = importlib.import_module("radixkv.tree.core").RadixTree
    return found


def missing(name: str) -> str:
    """Why an implementation is not among them; "" if it is."""
    if name in implementations():
        return ""
    return f"radixkv.tree.{name} is not built (python setup.py build_ext --inplace)"
