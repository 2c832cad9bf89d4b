"""Defects that more than one random run must notice, planted in whatever hands out pages."""

from __future__ import annotations

from typing import Any

import pytest

__all__ = ["free_twice", "leak"]


def leak(monkeypatch: pytest.MonkeyPatch, owner: type) -> None:
    """Of the pages that are freed together one in four is forgotten."""
    free: Any = owner.free  # type: ignore[attr-defined]
    monkeypatch.setattr(owner, "free", lambda self, pages: free(self, pages[: len(pages) - len(pages) // 4]))


def free_twice(monkeypatch: pytest.MonkeyPatch, owner: type) -> None:
    """The first of the pages that are freed together is freed again."""
    free: Any = owner.free  # type: ignore[attr-defined]

    def twice(self: Any, pages: Any) -> None:
        free(self, pages)
        free(self, pages[:1])

    monkeypatch.setattr(owner, "free", twice)
