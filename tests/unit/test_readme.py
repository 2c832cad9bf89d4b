"""What the README shows runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

README = (Path(__file__).parents[2] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_python_snippets_run() -> None:
    tree_block, index_block = blocks("python")
    names: dict[str, object] = {}
    exec(tree_block, names)
    assert names["tree"].stats().evictable_tokens == 640  # type: ignore[attr-defined]
    names["keys"] = np.arange(128, dtype=np.uint64)
    exec(index_block, names)
    assert names["index"].find(names["keys"]) == {3: 128}  # type: ignore[attr-defined]


def test_no_placeholder_is_left() -> None:
    assert "@@" not in README


def test_links_and_pictures_are_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (Path(__file__).parents[2] / target).exists(), target
