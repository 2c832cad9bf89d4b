"""L5: the page hashes that engines see: a SHA-256 chain over the tokens from the root, in hex."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import numpy as np

from ..controller.base import Digests
from ..controller.hashes import PathHashes
from ..tree.base import BaseRadixTree, Tokens
from ..tree.page_hash import sha256_chain, sha256_page_hash
from ..types import ROOT

__all__ = ["get_hash_str", "hex_of", "last_hash", "node_hashes", "page_hash_for"]


def get_hash_str(token_ids: Tokens, prior_hash: str | None = None) -> str:
    """The hash of one page: sha256(prior hash's bytes, if there is one, then each token as 4 bytes little endian)."""
    previous = bytes.fromhex(prior_hash) if prior_hash else None
    chain = sha256_chain(token_ids, max(1, len(token_ids)), previous)
    return str(chain[0].tobytes().hex()) if len(chain) else sha256(previous or b"").hexdigest()


def node_hashes(tree: BaseRadixTree, node: int) -> list[str]:
    """The hashes of a node's own pages, in hex."""
    digests = PathHashes(tree).own(node) if node != ROOT else np.zeros((0, 1), np.uint8)
    return hex_of(digests)


def hex_of(digests: Digests) -> list[str]:
    """Digests, uint8 [pages, 32], one a string in hex."""
    step, text = 2 * digests.shape[1], digests.tobytes().hex()
    return [text[at : at + step] for at in range(0, len(text), step)]


def last_hash(tree: BaseRadixTree, node: int) -> str | None:
    """The hash at a node's end, in hex; None for the root."""
    return None if node == ROOT else PathHashes(tree).own(node)[-1].tobytes().hex()


def page_hash_for(wanted: bool) -> Any:
    """The tree's ``page_hash`` argument: SHA-256 if it is to keep page hashes for storage."""
    return sha256_page_hash() if wanted else None
