"""L1: the invariants of the reference tree, checked from scratch: each is one ``_require`` with the numbers in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import IntegrityError
from ..types import ROOT
from .reference_node import Node, namespace_digest, page_digest, path_up

if TYPE_CHECKING:
    from .reference import ReferenceTree


def check_tree(
    tree: ReferenceTree, capacity: int | None, free: list[int], host_capacity: int | None, free_host: list[int]
) -> None:
    """Raises: IntegrityError naming the first broken invariant."""
    nodes = _check_structure(tree)
    for node in nodes:
        _check_runs(node, tree.page_size)
        _check_counts(node)
        _check_times(node, tree._clock)
        _check_digests(node, tree.page_size)
    _check_jobs(nodes, tree.page_size)
    device = [page for node in nodes for page in node.pages or []]
    host = [page for node in nodes for page in node.host_pages or []]
    _check_tier("device", device, tree._device_ids, capacity, free)
    _check_tier("host", host, tree._host_ids, host_capacity, free_host)
    queued = len(tree._events or ())
    _require(queued <= tree._max_events, f"{queued} events are queued, the bound is {tree._max_events}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise IntegrityError(message)


def _check_structure(tree: ReferenceTree) -> list[Node]:
    """Links both ways, child keys, namespaces and handles. Returns all nodes, roots excluded."""
    nodes: list[Node] = []
    seen: set[int] = set()
    for namespace, root in tree._roots.items():
        _require(root.is_root and root.handle == ROOT and not root.tokens and root.namespace == namespace,
                 f"the root of namespace {namespace!r} is not a root")
        _require(bool(root.children), f"namespace {namespace!r} is empty but not freed")
        _require(root.pages is None and root.host_pages is None, f"the root of namespace {namespace!r} has pages")
        stack = [root]
        while stack:
            parent = stack.pop()
            for page, node in parent.children.items():
                _require(id(node) not in seen, f"node {node.handle:#x} is reached twice")
                seen.add(id(node))
                _require(node.parent is parent, f"node {node.handle:#x} does not point to its parent")
                _require(node.tokens[: tree.page_size] == page, f"node {node.handle:#x} is not filed by its first page")
                _require(node.namespace == namespace, f"node {node.handle:#x} is of another namespace than its root")
                nodes.append(node)
                stack.append(node)
    named = list(tree._handles.nodes())
    _require(len(named) == len(nodes) == len(tree._handles), f"{len(named)} handles are alive for {len(nodes)} nodes")
    for node in nodes:
        _require(tree._handles.holds(node), f"handle {node.handle:#x} names another node")
    return nodes


def _check_runs(node: Node, page_size: int) -> None:
    name = f"node {node.handle:#x}"
    pages, odd = divmod(len(node.tokens), page_size)
    _require(pages > 0 and odd == 0, f"{name} has {len(node.tokens)} tokens, page_size is {page_size}")
    _require(node.pages is not None or node.host_pages is not None, f"{name} is on neither tier")
    for tier, ids in (("device", node.pages), ("host", node.host_pages)):
        _require(ids is None or len(ids) == pages, f"{name} has {len(ids or [])} {tier} page ids for {pages} pages")
    parent = node.parent
    assert parent is not None
    closed = node.pages is None or parent.is_root or parent.pages is not None
    _require(closed, f"{name} is on the device below a host-only parent")


def _check_counts(node: Node) -> None:
    name = f"node {node.handle:#x}"
    children = node.children.values()
    locks = sum(child.lock_ref for child in children)
    _require(node.lock_ref >= locks, f"{name} has lock_ref {node.lock_ref}, its children {locks}")
    _require(node.lock_ref == 0 or node.on_device, f"{name} is host-only with lock_ref {node.lock_ref}")
    _require(node.host_ref >= 0, f"{name} has host_ref {node.host_ref}")
    _require(node.host_ref == 0 or node.host_pages is not None, f"{name} has host_ref {node.host_ref} and no host copy")
    own = int(node.pin_until is not None) + int(node.loading and not node.is_job_part)
    pins = own + sum(child.pin_ref for child in children)
    _require(node.pin_ref == pins, f"{name} has pin_ref {node.pin_ref}, but {pins} pins and loads on it or below")
    _require(own == 0 or node.on_device, f"{name} is pinned or loading, but host-only")
    _require(node.hit_count >= 0, f"{name} has hit_count {node.hit_count}")
    _require(0 <= node.marks <= 255, f"{name} has marks {node.marks:#x}")


def _check_times(node: Node, clock: int) -> None:
    name = f"node {node.handle:#x}"
    _require(0 < node.created_time <= node.access_time <= clock,
             f"{name} was created at {node.created_time}, used at {node.access_time}, now is {clock}")
    parent = node.parent
    assert parent is not None
    if not parent.is_root:
        used = parent.access_time
        _require(used >= node.access_time, f"{name} was used at {node.access_time}, its parent at {used}")
        _require(parent.priority >= node.priority, f"{name} has priority {node.priority}, its parent {parent.priority}")


def _check_digests(node: Node, page_size: int) -> None:
    if node.digests is None:
        return
    parent = node.parent
    assert parent is not None
    if parent.is_root:
        digest = namespace_digest(node.namespace)
    else:
        _require(bool(parent.digests), f"node {node.handle:#x} has digests, its parent has none")
        assert parent.digests is not None
        digest = parent.digests[-1]
    expected = []
    for at in range(0, len(node.tokens), page_size):
        digest = page_digest(digest, node.tokens[at : at + page_size])
        expected.append(digest)
    _require(node.digests == expected, f"node {node.handle:#x} has digests that are not those of its tokens")


def _check_jobs(nodes: list[Node], page_size: int) -> None:
    """Every part of a job belongs to exactly one job, and a job's parts are a chain right above its node."""
    claimed: set[int] = set()
    for node in nodes:
        name = f"node {node.handle:#x}"
        _require(not (node.loading and node.pending), f"{name} is loading and pending at once")
        on_host = node.host_pages is not None
        _require(not node.pending or (node.on_device and not on_host), f"{name} is pending, but not only on the device")
        _require(not node.loading or (node.on_device and on_host), f"{name} is loading, but not on both tiers")
        _require(not node.is_job_part or node.loading or node.pending, f"{name} is part of no job")
        _require(node.job_pages_above == 0 or ((node.loading or node.pending) and not node.is_job_part),
                 f"{name} has {node.job_pages_above} pages above in a job that it does not have")
        above = node.job_pages_above * page_size
        for part in list(path_up(node))[1:]:
            if above <= 0:
                break
            _require(part.is_job_part and part.loading == node.loading and part.pending == node.pending,
                     f"node {part.handle:#x} is not part of the job of {name} below it")
            _require(part.handle not in claimed, f"node {part.handle:#x} is part of two jobs")
            claimed.add(part.handle)
            above -= len(part.tokens)
        _require(above == 0, f"the job of {name} ends inside a node, {-above} tokens off")
    for node in nodes:
        claim = not node.is_job_part or node.handle in claimed
        _require(claim, f"node {node.handle:#x} is part of a job that no node below has")


def _check_tier(tier: str, ids: list[int], owned: set[int], capacity: int | None, free: list[int]) -> None:
    distinct = set(ids)
    _require(len(distinct) == len(ids), f"{len(ids) - len(distinct)} {tier} page ids are owned twice")
    _require(distinct == owned, f"the nodes own {len(distinct)} {tier} page ids, the books say {len(owned)}")
    _require(min([*ids, *free], default=0) >= 0, f"a {tier} page id is negative")
    _require(len(set(free)) == len(free), f"{len(free) - len(set(free))} free {tier} page ids are free twice")
    both = distinct.intersection(free)
    _require(not both, f"{len(both)} {tier} page ids are in the tree and free, the first is {min(both, default=0)}")
    if capacity is not None:
        total = f"{len(ids)} pages in the tree + {len(free)} free"
        _require(len(ids) + len(free) == capacity, f"{tier}: {total} != capacity {capacity}")
