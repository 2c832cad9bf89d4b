"""Peers: other systems' prefix trees behind one small interface (base.py), loaded by name.

A peer that cannot be had on this machine is an ``Absent`` with the reason; reports print it, nothing drops it silently.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from .base import Absent, TreePeer

__all__ = ["TREE_PEERS", "Absent", "TreePeer", "load", "load_all"]

TREE_PEERS: dict[str, str] = {
    "radixkv": "radixkv_tree",
    "sglang-rust": "sglang_rust",
    "sglang-python": "sglang_python",
    "dynamo": "dynamo",
}
"""Name on the command line and in reports -> module of this package with a class ``Peer``."""


def load(name: str) -> type[TreePeer] | Absent:
    """Load one peer's adapter class, or say why it cannot be had.

    Raises: KeyError for a name that is no peer at all.
    """
    module = TREE_PEERS[name]
    try:
        peer: type[TreePeer] = importlib.import_module(f"{__name__}.{module}").Peer
        peer.probe()
    except (ImportError, OSError, AttributeError, TypeError) as error:
        return Absent(name, f"{type(error).__name__}: {error}")
    return peer


def load_all(names: Sequence[str] = tuple(TREE_PEERS)) -> tuple[dict[str, type[TreePeer]], list[Absent]]:
    """Load several peers: those that work, and those that do not, with reasons."""
    present: dict[str, type[TreePeer]] = {}
    absent: list[Absent] = []
    for name in names:
        peer = load(name)
        if isinstance(peer, Absent):
            absent.append(peer)
        else:
            present[name] = peer
    return present, absent
