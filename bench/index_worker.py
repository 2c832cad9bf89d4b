"""One index in one fresh process: fill, find, threads, memory, removal, as one JSON object on stdout.

``python -m bench.index_worker '{"peer": "radixkv", "scenario": "all", "entries": 1000000}'``. Sequences are 128 random
page keys. *all*: each is held by 8 workers; *one*: by one of 8; *prefix*: by one of 8, and the first 16 pages are the
same in all. An entry is a (page, holder). *remove*: workers with 1,000, 10,000 and 100,000 pages of their own are
removed.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import measure
from .peers.indexes import INDEX_PEERS, IndexPeer

SEED = 17
WORKERS = 8
SEQUENCE_PAGES = 128
PREFIX_PAGES = 16  # shared by all sequences of the scenario "prefix": the system prompt


def random_sequences(rng: np.random.Generator, count: int, prefix_pages: int) -> np.ndarray:
    """Page keys, uint64 [count, 128], the first ``prefix_pages`` the same in all, whatever the generator."""
    sequences = rng.integers(1, 2**63, (count, SEQUENCE_PAGES), np.uint64)
    sequences[:, :prefix_pages] = np.random.default_rng(SEED).integers(1, 2**63, prefix_pages, np.uint64)
    return sequences


def fill_and_find(
    peer: type[IndexPeer], holders: int, entries: int, finds: int, threads: list[int], prefix_pages: int = 0
) -> dict[str, Any]:
    """Insert ``entries`` / (128 * holders) sequences for ``holders`` workers each, then find random ones.

    Returns: insert and find percentiles (us, 128 pages a call), memory (bytes), throughput (calls/s) by number of
    threads.
    Raises: RuntimeError if a find does not answer exactly what was inserted.
    """
    rng = np.random.default_rng(SEED)
    count = max(WORKERS, entries // (SEQUENCE_PAGES * holders))
    sequences = random_sequences(rng, count, prefix_pages)
    stored = [peer.stored(sequence) for sequence in sequences]
    workers = [range(WORKERS) if holders == WORKERS else (i % WORKERS,) for i in range(count)]
    order = rng.permutation(count)
    keys = [peer.key(sequences[i]) for i in order]
    again = [(workers[i][0], stored[i]) for i in order]
    first_pages = [peer.key(sequences[i, :1]) for i in rng.permutation(count)]
    misses = [peer.key(sequence) for sequence in rng.integers(1, 2**63, (min(count, 1_000), SEQUENCE_PAGES), np.uint64)]
    insert_ns = np.ones(count * holders, np.int64)
    find_ns = np.ones(finds, np.int64)
    warm = peer()
    warm.insert(0, stored[0])
    warm.find(keys[0])
    index = peer()
    clock = time.perf_counter_ns
    measure.settle()
    gc.freeze()
    before = measure.memory()
    at = 0
    for sequence, who in zip(stored, workers, strict=True):
        for worker in who:
            start = clock()
            index.insert(worker, sequence)
            insert_ns[at] = clock() - start
            at += 1
    after = measure.memory()
    measure.settle()
    settled = measure.memory()
    for i in range(0, count, max(1, count // 100)):
        found = peer.holders(index.find(peer.key(sequences[i])))
        expected = dict.fromkeys(range(WORKERS), prefix_pages) if prefix_pages else {}
        expected |= dict.fromkeys(workers[i], SEQUENCE_PAGES)
        if found != expected:
            raise RuntimeError(f"{peer.name}: sequence {i}: found {found}, expected {expected}")
    held = at * (SEQUENCE_PAGES - prefix_pages) + WORKERS * prefix_pages
    result: dict[str, Any] = {"version": peer.version(), "entries": held, "sequences": count}
    for what, choices in (("find", keys), ("find_1_page", first_pages), ("find_miss", misses)):
        for i in range(finds):
            key = choices[i % len(choices)]
            start = clock()
            index.find(key)
            find_ns[i] = clock() - start
        result[what] = measure.percentiles(find_ns)._asdict()
    return {
        **result,
        "insert": measure.percentiles(insert_ns)._asdict(),
        "rss_bytes": after.resident - before.resident,
        "rss_settled_bytes": settled.resident - before.resident,
        "own_memory_bytes": index.memory_bytes(),
        "threads": {
            str(n): throughput(peer, index, list(zip(keys, again, strict=True)), n, finds, prefix_pages)
            for n in threads
        },
    }


def throughput(
    peer: type[IndexPeer],
    index: IndexPeer,
    known: list[tuple[Any, tuple[int, Any]]],
    num_threads: int,
    finds: int,
    prefix_pages: int = 0,
) -> dict[str, float]:
    """Calls a second, all threads together: finds alone, inserts alone (new sequences), both mixed half and half, and
    finds mixed with inserts of what the worker holds already. ``known``: for find, and (worker, for insert)."""
    keys = [key for key, _ in known]
    rng = np.random.default_rng(SEED + num_threads)
    new = [peer.stored(s) for s in random_sequences(rng, max(finds // 4, num_threads), prefix_pages)]
    share = len(new) // (2 * num_threads)

    def find_some(number: int) -> int:
        for i in range(finds // num_threads):
            index.find(keys[(i * num_threads + number) % len(keys)])
        return finds // num_threads

    def insert_some(number: int, offset: int = 0) -> int:
        for i in range(share):
            index.insert(number % WORKERS, new[offset + number * share + i])
        return share

    def mixed(number: int) -> int:
        for i in range(share):
            index.find(keys[(i * num_threads + number) % len(keys)])
            index.insert(number % WORKERS, new[len(new) // 2 + number * share + i])
        return 2 * share

    def again(number: int) -> int:
        for i in range(share):
            key, (worker, sequence) = known[(i * num_threads + number) % len(known)]
            index.find(key)
            index.insert(worker, sequence)
        return 2 * share

    return {
        name: together(function, num_threads)
        for name, function in (
            ("find_per_s", find_some),
            ("insert_per_s", insert_some),
            ("mixed_per_s", mixed),
            ("again_per_s", again),
        )
    }


def together(function: Any, num_threads: int) -> float:
    """Run function(thread number) -> calls made, in each of some threads at once; calls a second."""
    made: list[int] = []
    barrier = threading.Barrier(num_threads + 1)

    def body(number: int) -> None:
        barrier.wait()
        made.append(function(number))

    running = [threading.Thread(target=body, args=(number,)) for number in range(num_threads)]
    for thread in running:
        thread.start()
    barrier.wait()
    start = time.perf_counter()
    for thread in running:
        thread.join()
    taken = time.perf_counter() - start
    if len(made) != num_threads:
        raise RuntimeError(f"{num_threads - len(made)} of {num_threads} threads died")
    return sum(made) / taken


def removal(peer: type[IndexPeer], entries: int, repeats: int = 7) -> dict[str, Any]:
    """us of remove_worker, median of some repeats, half of the pages shared with another worker.

    Returns: remove_us by pages held in an index of ``entries``, and small_us for 10,000 held in one of entries / 10.
    """
    held = (1_000, 10_000, 100_000)
    large, small = removal_times(peer, entries, held, repeats), removal_times(peer, entries // 10, held[1:2], repeats)
    return {"version": peer.version(), "remove_us": large, "small_us": small["10000"]}


def removal_times(peer: type[IndexPeer], entries: int, held: Sequence[int], repeats: int) -> dict[str, float]:
    """Pages held -> median us to remove a worker that holds them, in an index of about ``entries``."""
    rng = np.random.default_rng(SEED)
    index = peer()
    for sequence in rng.integers(1, 2**63, (entries // SEQUENCE_PAGES, SEQUENCE_PAGES), np.uint64):
        index.insert(0, peer.stored(sequence))
    taken: dict[str, float] = {}
    for pages in held:
        stored = [peer.stored(s) for s in rng.integers(1, 2**63, (pages // SEQUENCE_PAGES, SEQUENCE_PAGES), np.uint64)]
        waits = peer.key(rng.integers(1, 2**63, 1, np.uint64))
        times = []
        for _ in range(repeats):
            for i, one in enumerate(stored):
                index.insert(1, one)
                if i % 2:
                    index.insert(0, one)
            start = time.perf_counter_ns()
            index.remove_worker(1)
            index.find(waits)  # Dynamo's removal is a message to its thread: a find waits until it is done
            times.append((time.perf_counter_ns() - start) / 1e3)
        taken[str(pages)] = statistics.median(times)
    return taken


def main() -> None:
    """Do one job, a JSON object in argv[1]: peer, scenario (all, one, prefix, remove), entries, finds, threads."""
    job = json.loads(sys.argv[1])
    peer, entries = INDEX_PEERS[job["peer"]], job["entries"]
    if job["scenario"] == "remove":
        result = removal(peer, entries)
    else:
        holders = WORKERS if job["scenario"] == "all" else 1
        prefix_pages = PREFIX_PAGES if job["scenario"] == "prefix" else 0
        result = fill_and_find(peer, holders, entries, job["finds"], job["threads"], prefix_pages)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
