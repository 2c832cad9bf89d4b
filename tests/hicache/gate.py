"""What tests do without the original: skip by name, or fail where CI says that everything must be there."""

from __future__ import annotations

import os

import pytest

from .original.install import OriginalAbsent, installed


def original_or_skip() -> None:
    """Install the original if need be; else skip, or fail under RADIXKV_REQUIRE_TOOLS=1."""
    pytest.importorskip("torch", reason="the original runs on torch")
    try:
        installed()
    except OriginalAbsent as error:
        if os.environ.get("RADIXKV_REQUIRE_TOOLS") == "1":
            pytest.fail(f"{error}, and RADIXKV_REQUIRE_TOOLS=1")
        pytest.skip(str(error))
