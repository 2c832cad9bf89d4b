"""L1: what the reference tree is made of: nodes, handles, policies, page digests and the result objects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from ..errors import HandleError
from ..types import ROOT, BackupRequest, PageIds

PageTokens = tuple[int, ...]


# ---------------------------------------------------------------------------------------------------------------- nodes


@dataclass(slots=True, eq=False, repr=False)
class Node:
    """An edge run of whole pages and what hangs below its end. A root is a node without tokens, parent and pages."""

    handle: int
    namespace: bytes
    parent: Node | None
    tokens: tuple[int, ...]
    pages: list[int] | None = None  # on the device: one id a page
    host_pages: list[int] | None = None  # on the host: one id a page
    children: dict[PageTokens, Node] = field(default_factory=dict)  # by first page
    lock_ref: int = 0  # locks of this node and of every node below
    host_ref: int = 0
    hit_count: int = 0
    priority: int = 0
    access_time: int = 0
    created_time: int = 0
    pin_until: int | None = None
    pin_ref: int = 0  # pins and loads of this node and of every node below
    # A job is a load or a backup in flight. It is known by the handle of its lowest node; parts that were split off
    # that node since lie above it in one chain, job_pages_above pages in all.
    loading: bool = False
    pending: bool = False
    is_job_part: bool = False
    job_pages_above: int = 0
    digests: list[int] | None = None  # of its own pages; computed when first asked for
    marks: int = 0  # the caller's

    @property
    def is_root(self) -> bool:
        return self.parent is None

    @property
    def on_device(self) -> bool:
        return self.pages is not None

    @property
    def is_protected(self) -> bool:
        return self.lock_ref > 0 or self.pin_ref > 0

    def has_device_child(self) -> bool:
        return any(child.on_device for child in self.children.values())


def path_up(node: Node) -> Iterator[Node]:
    """The nodes from ``node`` up to, but without, the root."""
    while node.parent is not None:
        yield node
        node = node.parent


def path_down(node: Node | None) -> list[Node]:
    """The nodes from below the root down to ``node``; none for None."""
    return [] if node is None else list(path_up(node))[::-1]


def path_tokens(node: Node) -> tuple[int, ...]:
    """All tokens from the root to the end of ``node``."""
    runs = [part.tokens for part in path_up(node)]
    return tuple(token for run in reversed(runs) for token in run)


def parent_of(node: Node) -> Node:
    """The parent of a node that is no root."""
    assert node.parent is not None
    return node.parent


def path_length(node: Node) -> int:
    return sum(len(part.tokens) for part in path_up(node))


def subtree(node: Node, in_order: bool = False) -> list[Node]:
    """``node`` and everything below, depth first, parents before children (reversed: children before parents).

    in_order: siblings ordered by their tokens.
    """
    found, stack = [], [node]
    while stack:
        node = stack.pop()
        found.append(node)
        children = node.children
        stack.extend([children[page] for page in sorted(children, reverse=True)] if in_order else children.values())
    return found


def below(node: Node) -> list[Node]:
    """Everything below ``node``, without it."""
    return subtree(node)[1:] if node.children else []


# -------------------------------------------------------------------------------------------------------------- handles


class HandleTable:
    """Hands out 64-bit names of nodes: slot index + 1 in the low half, a 32-bit generation in the high half.

    The generation counts the nodes that the tree ever made, from a start of the tree's own, so a slot used again has a
    new name, and a handle of another tree is as good as never one of this tree.
    """

    def __init__(self, tree_id: int) -> None:
        self._slots: list[Node | None] = []
        self._free: list[int] = []
        self._generation = mix(tree_id) & 0xFFFFFFFF

    def issue(self, node: Node) -> None:
        index = self._free.pop() if self._free else len(self._slots)
        if index == len(self._slots):
            self._slots.append(None)
        self._generation = (self._generation + 1) & 0xFFFFFFFF
        node.handle = self._generation << 32 | (index + 1)
        self._slots[index] = node

    def find(self, number: int) -> Node:
        """Raises: HandleError."""
        index = (number & 0xFFFFFFFF) - 1
        node = self._slots[index] if 0 <= index < len(self._slots) else None
        if node is None or node.handle != number:
            raise HandleError(f"node {number:#x} is stale or of another tree ({len(self)} nodes here)")
        return node

    def holds(self, node: Node) -> bool:
        index = (node.handle & 0xFFFFFFFF) - 1
        return 0 <= index < len(self._slots) and self._slots[index] is node

    def retire(self, node: Node) -> None:
        index = (node.handle & 0xFFFFFFFF) - 1
        self._slots[index] = None
        self._free.append(index)

    def retire_all(self) -> None:
        for node in list(self.nodes()):
            self.retire(node)

    def nodes(self) -> Iterator[Node]:
        return (node for node in self._slots if node is not None)

    def __len__(self) -> int:
        return len(self._slots) - len(self._free)


# ------------------------------------------------------------------------------------------------------------- policies

POLICY_KEYS: dict[str, Callable[[Node], tuple[int, ...]]] = {
    "lru": lambda node: (node.access_time,),
    "lfu": lambda node: (node.hit_count, node.access_time),
    "fifo": lambda node: (node.created_time,),
    "mru": lambda node: (-node.access_time,),
    "filo": lambda node: (-node.created_time,),
    "priority": lambda node: (node.priority, node.access_time),
    "slru": lambda node: (int(node.hit_count >= 2), node.access_time),
}
"""What leaves first has the smallest key; of two equal ones, the younger leaves first."""


# -------------------------------------------------------------------------------------------------------------- digests

_MASK = 0xFFFFFFFFFFFFFFFF


def mix(x: int) -> int:
    for _ in range(2):
        x ^= x >> 32
        x = x * 0xD6E8FEB86659FD93 & _MASK
    return x ^ x >> 32


def namespace_digest(namespace: bytes) -> int:
    """The parent of a prefix's first page."""
    h = 0x9E3779B97F4A7C15
    for byte in namespace:
        h = (h ^ byte) * 0x100000001B3 & _MASK
    return mix(h)


def page_digest(parent: int, tokens: PageTokens) -> int:
    h = parent
    for at in range(0, len(tokens), 2):
        low = tokens[at] & 0xFFFFFFFF
        high = tokens[at + 1] & 0xFFFFFFFF if at + 1 < len(tokens) else 0
        h = (h ^ (low | high << 32)) * 0x9FB21C651E98DF25 & _MASK
        h ^= h >> 29
    return mix(h)


# -------------------------------------------------------------------------------------------------------------- results


def id_array(ids: Iterable[int]) -> PageIds:
    return np.array(list(ids), dtype=np.int32)


class MatchResult:
    """See base.MatchResult. ``tree_id`` and ``namespace`` let insert and match_extend know whose it is."""

    __slots__ = (
        "_host_ids", "_ids", "device_node", "host_node", "host_num_tokens", "loading_tokens", "namespace",
        "num_tokens", "tree_id",
    )  # fmt: skip

    def __init__(self, tree_id: int, namespace: bytes) -> None:
        self.tree_id = tree_id
        self.namespace = namespace
        self.num_tokens = 0
        self.host_num_tokens = 0
        self.loading_tokens = 0
        self.device_node = ROOT
        self.host_node = ROOT
        self._ids: list[int] = []
        self._host_ids: list[int] = []

    def page_ids(self) -> PageIds:
        return id_array(self._ids)

    def host_page_ids(self) -> PageIds:
        return id_array(self._host_ids)

    def extend(self, node: Node, used: int, page_size: int) -> None:
        """Append the first ``used`` tokens of the path's next node. No node on the device follows a host-only one."""
        self.host_node = node.handle
        if node.pages is not None:
            self.device_node = node.handle
            self.num_tokens += used
            self.loading_tokens += used if node.loading else 0
            self._ids += node.pages[: used // page_size]
        else:
            assert node.host_pages is not None
            self.host_num_tokens += used
            self._host_ids += node.host_pages[: used // page_size]

    def __repr__(self) -> str:
        return f"MatchResult(num_tokens={self.num_tokens}, host_num_tokens={self.host_num_tokens}, " \
               f"device_node={self.device_node:#x}, host_node={self.host_node:#x})"


class InsertResult:
    """See base.InsertResult."""

    __slots__ = ("adopted_host_page_ids", "duplicate_page_ids", "node", "prefix_tokens")

    def __init__(self, prefix_tokens: int, node: int, duplicates: list[int], adopted: list[int]) -> None:
        self.prefix_tokens = prefix_tokens
        self.node = node
        self.duplicate_page_ids = id_array(duplicates)
        self.adopted_host_page_ids = id_array(adopted)

    def __repr__(self) -> str:
        return f"InsertResult(prefix_tokens={self.prefix_tokens}, node={self.node:#x}, " \
               f"duplicates={self.duplicate_page_ids})"


class InsertHostResult:
    """See base.InsertHostResult."""

    __slots__ = ("duplicate_host_page_ids", "node", "prefix_tokens")

    def __init__(self, prefix_tokens: int, node: int, duplicates: list[int]) -> None:
        self.prefix_tokens = prefix_tokens
        self.node = node
        self.duplicate_host_page_ids = id_array(duplicates)

    def __repr__(self) -> str:
        return f"InsertHostResult(prefix_tokens={self.prefix_tokens}, node={self.node:#x}, " \
               f"duplicates={self.duplicate_host_page_ids})"


class EvictResult:
    """See base.EvictResult."""

    __slots__ = ("host_page_ids", "num_tokens", "page_ids", "to_backup")

    def __init__(
        self, num_tokens: int, page_ids: list[int], host_page_ids: list[int], to_backup: list[BackupRequest]
    ) -> None:
        self.num_tokens = num_tokens
        self.page_ids = id_array(page_ids)
        self.host_page_ids = id_array(host_page_ids)
        self.to_backup = to_backup

    def __repr__(self) -> str:
        return f"EvictResult(num_tokens={self.num_tokens}, page_ids={self.page_ids}, " \
               f"host_page_ids={self.host_page_ids}, to_backup={self.to_backup})"


class Departures:
    """Collects the pages that leave during one operation."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.page_ids: list[int] = []
        self.host_page_ids: list[int] = []
        self.to_backup: list[BackupRequest] = []

    @property
    def device_tokens(self) -> int:
        return self.page_size * len(self.page_ids)

    @property
    def host_tokens(self) -> int:
        return self.page_size * len(self.host_page_ids)

    @property
    def backup_tokens(self) -> int:
        return self.page_size * sum(len(request.page_ids) for request in self.to_backup)

    def result(self, num_tokens: int | None = None) -> EvictResult:
        counted = self.device_tokens if num_tokens is None else num_tokens
        return EvictResult(counted, self.page_ids, self.host_page_ids, self.to_backup)
