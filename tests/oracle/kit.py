"""A tree and the words to test it with: keys are written as letters, one page each.

The pages of two letters differ in their last token only, so a tree that compares less than whole pages fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from radixkv.types import NodeInfo

FILLER = 7  # the other tokens of a page


def lists(ids: Any) -> list[int] | None:
    return None if ids is None else np.asarray(ids).tolist()


def plain(info: NodeInfo) -> tuple[Any, ...]:
    """A NodeInfo that can be compared."""
    return tuple(value.tolist() if isinstance(value, np.ndarray) else value for value in info)


def plain_event(event: Any) -> tuple[Any, ...]:
    return (event.kind, event.key, event.parent_key, lists(event.tokens), event.medium)


class Kit:
    """One tree under test."""

    def __init__(self, cls: Callable[..., Any], page_size: int, policy: str = "lru", **options: Any) -> None:
        self.tree = cls(page_size, policy, **options)
        self.page_size = page_size

    # ---- letters -----------------------------------------------------------------------------------------------------
    def key(self, letters: str, tail: int = 0) -> np.ndarray:
        """One page a letter, then ``tail`` tokens more."""
        pages = np.full((len(letters), self.page_size), FILLER, dtype=np.int32)
        pages[:, -1] = [ord(letter) for letter in letters]
        return np.concatenate([pages.reshape(-1), np.full(tail, FILLER, dtype=np.int32)])

    def letters(self, tokens: np.ndarray) -> str:
        return "".join(map(chr, tokens.reshape(-1, self.page_size)[:, -1]))

    def pages(self, tokens: int) -> int:
        assert tokens % self.page_size == 0
        return tokens // self.page_size

    # ---- operations --------------------------------------------------------------------------------------------------
    def insert(self, letters: str, ids: list[int], **more: Any) -> Any:
        return self.tree.insert(self.key(letters), ids, **more)

    def insert_host(self, letters: str, ids: list[int], **more: Any) -> Any:
        return self.tree.insert_host(self.key(letters), ids, **more)

    def match(self, letters: str, **more: Any) -> Any:
        return self.tree.match(self.key(letters), **more)

    def peek(self, letters: str, **more: Any) -> Any:
        return self.tree.peek(self.key(letters), **more)

    def evict(self, pages: int, backup: bool = False) -> Any:
        return self.tree.evict(pages * self.page_size, backup)

    def evict_host(self, pages: int) -> Any:
        return self.tree.evict_host(pages * self.page_size)

    # ---- looking -----------------------------------------------------------------------------------------------------
    def paths(self) -> dict[int, str]:
        """Handle -> the letters of its path."""
        paths = {0: ""}
        for info in self.tree.dump():
            paths[info.node] = paths[info.parent] + self.letters(info.tokens)
        del paths[0]
        return paths

    def node(self, letters: str, namespace: bytes = b"") -> int:
        """The node whose path is exactly these letters."""
        paths = self.paths()
        found = [i.node for i in self.tree.dump() if paths[i.node] == letters and i.namespace == namespace]
        assert len(found) == 1, f"{letters!r} is not a node: {sorted(paths.values())}"
        return found[0]

    def info(self, letters: str) -> NodeInfo:
        return self.tree.node_info(self.node(letters))

    def shape(self) -> dict[str, tuple[list[int] | None, list[int] | None]]:
        """Path letters -> (device ids, host ids) of every node."""
        paths = self.paths()
        return {paths[info.node]: (lists(info.page_ids), lists(info.host_page_ids)) for info in self.tree.dump()}

    def counts(self) -> tuple[int, int, int, int]:
        """(evictable, protected, pending, host) in pages."""
        stats = self.tree.stats()
        tokens = (stats.evictable_tokens, stats.protected_tokens, stats.pending_tokens, stats.host_tokens)
        return tuple(map(self.pages, tokens))

    def snapshot(self) -> tuple[Any, ...]:
        return [plain(info) for info in self.tree.dump()], self.tree.stats()._replace(memory_bytes=0)

    def refuses(self, error: type[Exception], operation: Callable[..., Any], *args: Any, **more: Any) -> str:
        """The operation raises exactly this error and changes nothing. Returns the message."""
        before = self.snapshot()
        with pytest.raises(error) as caught:
            operation(*args, **more)
        assert type(caught.value) is error
        assert self.snapshot() == before
        self.tree.check_integrity()
        return str(caught.value)
