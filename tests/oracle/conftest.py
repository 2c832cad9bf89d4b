"""Fixtures: every test of the contract runs for each implementation and page size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from .implementations import implementations
from .kit import Kit


@pytest.fixture(params=sorted(implementations(), reverse=True))
def tree_class(request: pytest.FixtureRequest) -> Any:
    return implementations()[request.param]


@pytest.fixture(params=[16, 1, 7, 64])
def page_size(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def make(tree_class: Any, page_size: int) -> Iterator[Callable[..., Kit]]:
    """make(policy, **options): a new Kit. Whatever the test did, its trees must be sound at the end."""
    kits: list[Kit] = []

    def create(policy: str = "lru", **options: Any) -> Kit:
        kits.append(Kit(tree_class, page_size, policy, **options))
        return kits[-1]

    yield create
    for kit in kits:
        kit.tree.check_integrity()


@pytest.fixture
def kit(make: Callable[..., Kit]) -> Kit:
    """A tree with policy lru and no events."""
    return make()
