"""Says in the report which implementations the suites of this folder did not see."""

from __future__ import annotations

import inspect

import pytest

from radixkv.tree.base import BaseRadixTree

from .implementations import NAMES, implementations, missing


@pytest.mark.parametrize("name", NAMES)
def test_it_was_under_test(name: str) -> None:
    if missing(name):
        pytest.skip(missing(name))
    tree = implementations()[name](page_size=4)
    assert isinstance(tree, BaseRadixTree)  # an extension type may be registered
    for method in BaseRadixTree.__abstractmethods__:
        assert callable(getattr(tree, method))


def test_the_reference_documents_the_parameters_of_the_contract() -> None:
    reference = implementations()["reference"]
    for method in BaseRadixTree.__abstractmethods__:
        contract = inspect.signature(getattr(BaseRadixTree, method)).parameters.values()
        ours = inspect.signature(getattr(reference, method)).parameters.values()
        assert [(p.name, p.default) for p in contract] == [(p.name, p.default) for p in ours], method
