"""What the controller costs beside the copies: python -m bench.bench_controller [--quick] [--json FILE]

A backup is asked for and settled, a load is asked for, started and settled, with a mover that is done at once, so that
the whole time is book-keeping: tree, pools, states, operations. Beside it, in the same run, the copy of the same pages
by the CPU path, and the same work by bare calls of tree and pools, which is what any controller has to do.
Target: 50 us a backup and a load. Seed 5; CPU time in the quietest of the rounds of 400 nodes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from radixkv import RadixTree
from radixkv.controller import Controller, ControllerConfig
from radixkv.pool.arena import ArenaConfig
from radixkv.pool.host import HostKVCache, HostPoolConfig
from radixkv.pool.layout import KVGeometry
from radixkv.pool.slots import SlotAllocator
from radixkv.transfer.cpu import CpuTransfer
from radixkv.transfer.plan import staging_view
from radixkv.tree.page_hash import sha256_page_hash

from . import report

SEED = 5
NODES = 400
PAGE_SIZE = 16
TARGET_US = 50.0
GEOMETRY = KVGeometry(kind="mha", num_layers=4, num_heads=2, head_bytes=64, page_size=PAGE_SIZE)


class Done:
    """A copy that took no time, and its own progress."""

    error = None
    seconds = 0.0

    def done(self) -> bool:
        return True

    def wait(self, *_: Any) -> bool:
        return True

    def cancel(self) -> bool:
        return False


class InstantMover:
    """Copies nothing."""

    def backup(self, *_: Any) -> Done:
        return Done()

    def flush(self) -> None:
        pass

    def load(self, *_: Any) -> Done:
        return Done()

    def new_progress(self) -> Done:
        return Done()

    def close(self, timeout_s: float | None = None) -> bool:
        return True


def microseconds(call: Callable[[], Any]) -> float:
    """Of one call, a node: CPU time of this thread, as the machine may be shared."""
    began_s = time.thread_time()
    call()
    return (time.thread_time() - began_s) / NODES * 1e6


def host_pool(num_pages: int) -> HostKVCache:
    config = HostPoolConfig(headroom_bytes=0, arena=ArenaConfig(huge_pages="none"))
    return HostKVCache(GEOMETRY, num_pages * PAGE_SIZE, "page_first", config=config)


def prompts(pages: int) -> list[Any]:
    random = np.random.default_rng(SEED)
    return [
        np.concatenate([[node], random.integers(0, 30_000, pages * PAGE_SIZE - 1)]).astype(np.int32)
        for node in range(NODES)
    ]


def one_round(pages: int, host: HostKVCache) -> dict[str, float]:
    """Every node is backed up, evicted and loaded."""
    device = SlotAllocator(NODES * pages)
    config = ControllerConfig(load_back_threshold=1, max_writes=NODES)
    controller = Controller(
        RadixTree(PAGE_SIZE, page_hash=sha256_page_hash()), device, host, InstantMover(), config=config
    )
    nodes = [
        controller.insert(tokens, device.alloc(pages), backup=False).node for tokens in prompts(pages)
    ]

    def settle() -> None:
        stats = controller.stats()
        while stats.writes_in_flight or stats.loads_in_flight:
            controller.poll()
            stats = controller.stats()

    def start_and_settle() -> None:
        controller.start_loads()
        settle()

    times = {"backup": microseconds(lambda: [controller.backup(node) for node in nodes])}
    times["backup, settled"] = microseconds(settle)
    controller.evict(NODES * pages * PAGE_SIZE)
    times["load"] = microseconds(lambda: [controller.load(node) for node in nodes])
    times["load, started and settled"] = microseconds(start_and_settle)
    controller.reset()
    controller.close()
    return times


def bare_calls(pages: int, host: HostKVCache) -> float:
    """What a backup takes of the tree and the host pool, a call each and nothing around it."""
    tree, device = RadixTree(PAGE_SIZE), SlotAllocator(NODES * pages)
    nodes = []
    for tokens in prompts(pages):
        ids = device.alloc(pages)
        assert ids is not None
        nodes.append(tree.insert(tokens, ids).node)

    def all_nodes() -> None:
        for node in nodes:
            tree.node_info(node)
            host_pages = host.alloc_pages(pages)
            assert host_pages is not None
            tree.lock(node)
            tree.set_host(node, host_pages)
            tree.unlock(node)

    taken = microseconds(all_nodes)
    host.clear()
    return taken


def copy_time(pages: int, host: HostKVCache) -> float:
    """One backup's copy by the CPU path, one thread."""
    memory = np.zeros((pages, GEOMETRY.page_bytes), np.uint8)
    route = CpuTransfer(GEOMETRY, 1).route(staging_view(GEOMETRY, memory.ctypes.data, pages), host.view())
    ids = np.arange(pages, dtype=np.int32)
    return microseconds(lambda: [route.copy(ids, ids) for _ in range(NODES)])


def checks(results: list[dict[str, Any]]) -> list[report.Check]:
    """Each operation against the aim."""
    return [
        report.Check(f"{what} of {row['tokens']:,} tokens, beside its copy", row[f"{what} in all"], TARGET_US, "us CPU")
        for row in results for what in ("backup", "load")
    ]  # fmt: skip


def main() -> None:
    """Command line. See report.conclude for the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="3 rounds")
    parser.add_argument("--pages", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--json", type=Path)
    report.add_check_option(parser)
    options = parser.parse_args()
    results = []
    num_rounds = 3 if options.quick else options.rounds
    for pages in options.pages:
        host = host_pool(NODES * pages)
        rounds = [one_round(pages, host) for _ in range(num_rounds + 1)][1:]
        row = {name: min(each[name] for each in rounds) for name in rounds[0]}
        row["backup in all"] = row["backup"] + row["backup, settled"]
        row["load in all"] = row["load"] + row["load, started and settled"]
        row["bare calls"] = min(bare_calls(pages, host) for _ in range(5))
        row["copy"] = min(copy_time(pages, host) for _ in range(5))
        results.append({"pages": pages, "tokens": pages * PAGE_SIZE, **row})
        host.close()
        print(f"{pages * PAGE_SIZE:6} tokens: " + ", ".join(f"{name} {value:.1f}" for name, value in row.items()), "us")
    found = checks(results)
    if options.json:
        result = report.header(seed=SEED, rounds=num_rounds, quick=options.quick, target_us=TARGET_US)
        report.write_json(result | {"results": results, "checks": report.checks_as_dicts(found)}, options.json)
    report.conclude(found, options.check)


if __name__ == "__main__":
    main()
