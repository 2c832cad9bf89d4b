"""One implementation, one workload, one fresh process: times and memory, as one JSON object on stdout.

``python -m bench.tree_worker '{"peer": "radixkv", "workload": "trace", "quick": false}'``. bench_tree.py starts
these in alternation, so no tree ever runs in memory that another one has touched.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from . import floor, measure, peers, workloads
from .peers.base import TreePeer


def replay(peer: type[TreePeer], workload: workloads.Workload, save: Path | None = None) -> dict[str, Any]:
    """Run a workload through a fresh tree: match with page ids, evict if there is no room, insert.

    All keys and rows are built and touched first. Between the timed calls the driver does what an engine does to its
    page table: writes the matched ids and the newly allocated ones.

    Returns: times (totals in s, percentiles in us), memory (bytes), counts. Raises: RuntimeError if an unbounded run
    does not find exactly what it must.
    """
    place = workloads.layout(workload)
    page_size, n = workload.page_size, len(workload.tokens)
    keys = [peer.key(tokens) for tokens in workload.tokens]
    pages = [len(tokens) // page_size for tokens in workload.tokens]
    rows = [
        peer.row(np.zeros(p, np.int32), tokens, int(hit) * page_size, page_size)
        for p, tokens, hit in zip(pages, workload.tokens, place.hit_pages, strict=True)
    ]
    capacity = workload.capacity_pages or place.num_pages
    free, num_free = np.arange(capacity - 1, -1, -1, dtype=np.int32), capacity
    match_ns, insert_ns, evict_ns = np.ones(n, np.int64), np.ones(n, np.int64), []
    hits = np.ones(n, np.int64)
    warm_up(peer, page_size, evicts=workload.capacity_pages is not None)
    tree = peer(page_size)
    clock = time.perf_counter_ns
    measure.settle()
    gc.freeze()
    before, preempted = measure.memory(), measure.preemptions()
    for index in range(n):
        key, row = keys[index], rows[index]
        start = clock()
        match = tree.match(key)
        match_ns[index] = clock() - start
        hit = tree.num_tokens(match)
        hits[index] = hit
        new = pages[index] - hit // page_size
        if new > num_free:
            start = clock()
            evicted = tree.evict((new - num_free) * page_size)
            evict_ns.append(clock() - start)
            ids = tree.evicted_page_ids(evicted)
            free[num_free : num_free + len(ids)] = ids
            num_free += len(ids)
            if new > num_free:
                raise RuntimeError(
                    f"{peer.name}: request {index} needs {new} pages, {num_free} are free after eviction"
                )
        num_free -= new
        tree.write_prefix(row, match)
        tree.write_ids(row, hit // page_size, free[num_free : num_free + new])
        start = clock()
        tree.insert(key, row, match)
        insert_ns[index] = clock() - start
    match = evicted = None
    after, preempted = measure.memory(), measure.preemptions() - preempted
    measure.settle()
    settled = measure.memory()
    expected = int(place.hit_pages.sum()) * page_size
    if workload.capacity_pages is None and int(hits.sum()) != expected:
        raise RuntimeError(f"{peer.name}: found {int(hits.sum()):,} tokens of the {expected:,} that were there")
    cached = tree.cached_tokens()
    if cached is None:
        cached = (capacity - num_free) * page_size
    elif cached != (capacity - num_free) * page_size:
        given = (capacity - num_free) * page_size
        raise RuntimeError(f"{peer.name}: the tree says {cached:,} cached tokens, {given:,} were given to it")
    if save is not None:
        save_content(tree, save)
    own = tree.memory_bytes()
    return {
        "version": peer.version(),
        "requests": n,
        "hit_tokens": int(hits.sum()),
        "cached_tokens": cached,
        "total_s": (float(match_ns.sum() + insert_ns.sum()) + sum(evict_ns)) / 1e9,
        "match_s": float(match_ns.sum()) / 1e9,
        "insert_s": float(insert_ns.sum()) / 1e9,
        "evict_s": sum(evict_ns) / 1e9,
        "match": measure.percentiles(match_ns)._asdict(),
        "insert": measure.percentiles(insert_ns)._asdict(),
        "evict": measure.percentiles(evict_ns)._asdict(),
        "preemptions": preempted,
        "rss_bytes": after.resident - before.resident,
        "rss_settled_bytes": settled.resident - before.resident,
        "own_memory_bytes": own,
    }


def warm_up(peer: type[TreePeer], page_size: int, evicts: bool) -> None:
    """Fault the code in, not memory: a tree of two pages, dropped again."""
    tree = peer(page_size)
    tokens = np.arange(2 * page_size, dtype=np.int32)
    key, row = peer.key(tokens), peer.row(np.arange(2, dtype=np.int32), tokens, 0, page_size)
    tree.insert(key, row, tree.match(key))
    tree.write_prefix(row, tree.match(key))
    tree.num_tokens(tree.match(key))
    if evicts:
        tree.evicted_page_ids(tree.evict(page_size))


def save_content(tree: Any, path: Path) -> None:
    """Write what radixkv's tree holds, parents first, so that ``fresh`` can build it again."""
    nodes = tree.tree.dump()
    handles = {info.node: index for index, info in enumerate(nodes)}
    np.savez(
        path,
        parent=np.array([handles.get(info.parent, -1) for info in nodes], np.int64),
        lengths=np.array([len(info.tokens) for info in nodes], np.int64),
        tokens=np.concatenate([info.tokens for info in nodes]),
        page_ids=np.concatenate([info.page_ids for info in nodes]),
    )


def fresh(path: Path, page_size: int) -> dict[str, Any]:
    """Build a new radixkv tree with the saved content, node by node; returns its memory in bytes."""
    peer = peers.load("radixkv")
    assert not isinstance(peer, peers.Absent)
    with np.load(path) as data:
        parent, lengths, tokens, page_ids = (data[name] for name in ("parent", "lengths", "tokens", "page_ids"))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    keys: list[Any] = []
    rows: list[Any] = []
    for index, above in enumerate(parent):
        own = slice(starts[index], starts[index + 1])
        own_pages = slice(starts[index] // page_size, starts[index + 1] // page_size)
        keys.append(tokens[own] if above < 0 else np.concatenate([keys[above], tokens[own]]))
        rows.append(page_ids[own_pages] if above < 0 else np.concatenate([rows[above], page_ids[own_pages]]))
    warm_up(peer, page_size, evicts=False)
    tree: Any = peer(page_size)
    measure.settle()
    before = measure.memory()
    for key, row in zip(keys, rows, strict=True):
        tree.tree.insert(key, row)
    after = measure.memory()
    return {
        "cached_tokens": tree.cached_tokens(),
        "nodes": len(parent),
        "rss_bytes": after.resident - before.resident,
        "own_memory_bytes": tree.memory_bytes(),
    }


def run_floor(workload: workloads.Workload, kind: str) -> dict[str, Any]:
    """The workload as memcmp and memcpy alone; the same fields as ``replay`` where they mean something."""
    place = workloads.layout(workload)
    floor.library()
    result = floor.run(workload, place, kind)
    return {
        "version": f"memcmp + memcpy, {floor.MEMORY[kind]}",
        "requests": len(workload.tokens),
        "hit_tokens": int(place.hit_pages.sum()) * workload.page_size,
        "cached_tokens": place.num_pages * workload.page_size,
        "total_s": float(result.match_ns.sum() + result.insert_ns.sum()) / 1e9,
        "match_s": float(result.match_ns.sum()) / 1e9,
        "insert_s": float(result.insert_ns.sum()) / 1e9,
        "match": measure.percentiles(result.match_ns)._asdict(),
        "insert": measure.percentiles(result.insert_ns)._asdict(),
    }


def main() -> None:
    """Do one job, described by a JSON object in argv[1]: peer (or fresh, or a kind of floor), workload, quick,
    content (a path)."""
    job = json.loads(sys.argv[1])
    name, content = job["peer"], Path(job["content"]) if job.get("content") else None
    if name == "fresh":
        assert content is not None
        result = fresh(content, workloads.PAGE_SIZE)
    elif name in floor.MEMORY:
        result = run_floor(workloads.build(job["workload"], job["quick"]), name)
    else:
        peer = peers.load(name)
        if isinstance(peer, peers.Absent):
            raise SystemExit(f"{name} is absent: {peer.reason}")
        result = replay(peer, workloads.build(job["workload"], job["quick"]), content)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
