"""L3: the digests under which pages are stored: always those of the whole path from the root."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..tree.base import BaseRadixTree
from ..tree.page_hash import DIGEST_BYTES, namespace_digest, sha256_chain
from ..types import ROOT
from .base import Digests

__all__ = ["PathHashes"]


class PathHashes:
    """SHA-256 chains along the paths of a tree; another than the default namespace begins with a digest of its name.

    A tree made with ``sha256_page_hash()`` keeps them itself; of another one (its default chain is 64 bits, and no key
    for storage) the path is hashed anew each time. Costs O(path) then.
    """

    def __init__(self, tree: BaseRadixTree) -> None:
        self._tree = tree

    def own(self, node: int) -> Digests:
        """Digests of a node's own pages."""
        digests = self._tree.page_digests(node)
        if digests.shape[1] == DIGEST_BYTES:
            return digests
        start = namespace_digest(self._tree.node_info(node).namespace)
        chain: Digests = sha256_chain(self.path_tokens(node), self._tree.page_size, start)[-len(digests) :]
        return chain

    def before(self, node: int) -> bytes:
        """Digest of the page before a node's own, b"" if there is none."""
        parent = self._tree.node_info(node).parent
        return b"" if parent == ROOT else self.own(parent)[-1].tobytes()

    def following(self, node: int, tokens: npt.NDArray[np.int32], namespace: bytes) -> Digests:
        """Digests of whole pages of tokens that follow a node's path. Args: namespace: that of the node, or, for ROOT,
        of the tokens."""
        previous = namespace_digest(namespace) if node == ROOT else self.own(node)[-1].tobytes()
        return sha256_chain(tokens, self._tree.page_size, previous)

    def path_tokens(self, node: int) -> npt.NDArray[np.int32]:
        """All tokens from the root to a node's end: a new int32 array."""
        parts = [self._tree.node_info(part).tokens for part in self._tree.path(node)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)
