"""L3: check_integrity: tree, pools, states, locks, marks and operations, added up from scratch."""

from __future__ import annotations

from collections import Counter

import numpy as np

from ..errors import IntegrityError
from ..pool.states import MemoryStateInt
from ..types import ROOT, NodeInfo, PageIds
from .config import STORING, WRITING
from .context import Context
from .drains import Drains
from .loads import Loads
from .operations import Stage
from .prefetches import Prefetches
from .stores import Stores
from .writes import Writes

__all__ = ["check_integrity"]

_RESERVED, _PROTECTED = MemoryStateInt.RESERVED, MemoryStateInt.PROTECTED
_SYNCED, _BACKUP = MemoryStateInt.SYNCED, MemoryStateInt.BACKUP


def check_integrity(
    context: Context, writes: Writes, loads: Loads, stores: Stores, prefetches: Prefetches, drains: Drains,
    held_page_ids: PageIds | None,
) -> None:  # fmt: skip
    """See Controller.check_integrity."""
    ledger, tree = context.ledger, context.tree
    drained = [op for op in drains.operations if op.node == ROOT]
    host_owned = [op.host_pages for op in writes.operations]
    host_owned += [op.host_pages for op in prefetches.operations.values()]
    host_owned += [op.host_pages for op in drained]
    _check_pages(context, held_page_ids, [op.device_pages for op in drained], host_owned)
    nodes = tree.dump()
    if ledger.has_host:
        ledger.host.check_integrity()
        _check_states(context, nodes, writes, prefetches, drains)
    else:
        _require(not any(info.host_page_ids is not None for info in nodes), "host pages without a host tier")
    _check_nodes(nodes, writes, loads, stores, prefetches, drains)
    asked = sum(len(op.tokens) for op in prefetches.operations.values())
    _require(asked == prefetches.tokens_in_flight, f"prefetches ask for {asked}, not {prefetches.tokens_in_flight}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise IntegrityError(message)


def _check_pages(
    context: Context, held: PageIds | None, device_owned: list[PageIds], host_owned: list[PageIds]
) -> None:  # fmt: skip
    """Each page is the tree's, an operation's, the caller's, or free: once."""
    ledger = context.ledger
    arguments: dict[str, object] = {}
    free_ids = getattr(ledger.device, "free_ids", None)
    if held is not None and free_ids is not None:
        arguments["capacity"] = ledger.device.capacity
        arguments["free_page_ids"] = np.concatenate([free_ids(), held, *device_owned]).astype(np.int32)
    if ledger.has_host:
        arguments["host_capacity"] = ledger.host.num_pages
        arguments["free_host_page_ids"] = np.concatenate([ledger.host.free_page_ids(), *host_owned]).astype(np.int32)
    context.tree.check_integrity(**arguments)  # type: ignore[arg-type]


def _check_states(
    context: Context, nodes: list[NodeInfo], writes: Writes, prefetches: Prefetches, drains: Drains
) -> None:
    """Every host page is in the state that its place implies, and the pairs are those of the tree."""
    ledger = context.ledger
    expected = np.full(ledger.host.num_pages, MemoryStateInt.IDLE, np.uint8)
    pairs: dict[int, int] = {}
    for info in nodes:
        if info.host_page_ids is None:
            continue
        if info.page_ids is None:
            expected[info.host_page_ids] = _BACKUP
        elif info.loading:
            expected[info.host_page_ids] = _PROTECTED
        else:
            expected[info.host_page_ids] = _SYNCED
            pairs.update(zip(info.page_ids.tolist(), info.host_page_ids.tolist(), strict=True))
    for write in writes.operations:
        expected[write.host_pages] = _PROTECTED
    for fetch in prefetches.operations.values():
        expected[fetch.host_pages] = _RESERVED
    states = ledger.host.states_of(slice(None))
    for drain in drains.operations:
        if drain.node == ROOT:  # as its operation left them
            expected[drain.host_pages] = states[drain.host_pages]
    wrong = np.flatnonzero(states != expected)
    if wrong.size:
        page = int(wrong[0])
        is_, must = MemoryStateInt(states[page]).name, MemoryStateInt(expected[page]).name
        raise IntegrityError(f"host page {page} is {is_}, and must be {must}")
    backups = int((states == _BACKUP).sum())
    drained = sum(int((states[op.host_pages] == _BACKUP).sum()) for op in drains.operations if op.node == ROOT)
    _require(ledger.backup_pages == backups, f"{backups} ({drained} draining) backups, counted {ledger.backup_pages}")
    _require(ledger.pairs() == pairs, "pairs of device and host pages are not those of the tree")


def _check_nodes(
    nodes: list[NodeInfo], writes: Writes, loads: Loads, stores: Stores, prefetches: Prefetches, drains: Drains
) -> None:
    """Host references, marks and loading nodes are those of the operations in flight."""
    all_loads = [*loads.queued, *(op for batch in loads.batches for op in batch.loads)]
    all_loads += [broken.op for broken in loads.broken]
    refs = Counter(part.node for op in all_loads for part in op.parts)
    refs.update(op.node for op in stores.operations)
    refs.update(op.node for op in prefetches.operations.values() if op.keeps_host)
    refs.update(op.node for op in drains.operations if op.node != ROOT)
    for info in nodes:
        refs_here = refs[info.node]
        _require(info.host_ref >= refs_here, f"node {info.node:#x} has host_ref {info.host_ref}, not {refs_here}")
        _require(not info.backup_pending, f"node {info.node:#x} is pending outside of an eviction")
    counted = {
        "loading": (sum(len(info.tokens) for info in nodes if info.loading), [op.num_pages for op in all_loads]),
        "being written": (sum(len(info.tokens) for info in nodes if info.marks & WRITING),
                          [len(op.host_pages) for op in writes.operations]),
        "being stored": (sum(len(info.tokens) for info in nodes if info.marks & STORING),
                         [op.num_pages for op in stores.operations]),
    }  # fmt: skip
    page_size = loads.context.page_size
    for what, (tokens, pages) in counted.items():
        _require(tokens == sum(pages) * page_size, f"{tokens} tokens are {what}, operations know {sum(pages)} pages")
    for op in prefetches.operations.values():
        _require(op.stage in (Stage.LOOKING_UP, Stage.FETCHING, Stage.FETCHED), f"prefetch {op.req_id} is {op.stage}")


