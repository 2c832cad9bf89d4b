"""The file backend beside sequential I/O of the same bytes, and the other backends beside each other.

``python -m bench.bench_storage [--quick] [--rounds 9] [--folder DIR] [--backends redis,nixl,...] [--json FILE]``

64 MiB a call, as 64 pages of 1 MiB and as 1,024 pages of 64 KiB, from and to host pools, each page in two pieces (K and
V). The machine's own figure is one file written (or read) from beginning to end with one system call a page, by one
thread, on the same disk: in the page cache, and with an fsync at the end; from and to the very pages of the host pools
that ours uses, which lie one behind the other and on page boundaries there. Ours runs between two of those. ``store``
is the backend alone: index, rename, journal; ``pages`` is PageStore over it: checksums, envelope, and verification of
what comes back. The figure is the median over rounds of (mean of both neighbours) / ours. What is dirty is written back
before each timed part, and the store is emptied; before each read the pages that it fills are overwritten.

``hashed`` is that same sequential read with one call of XXH3 a page behind each system call, and nothing else: what a
verified get on one core is measured against. Its ratio to the plain read is what one core can reach.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from radixkv.pool.host import HostKVCache, HostPoolConfig
from radixkv.pool.layout import KVGeometry
from radixkv.storage import PageNamespace, PageStore, Storage, host_page_parts
from radixkv.storage.file import FileStorage

from . import report

SEED = 11
TOTAL_BYTES = 64 << 20
TARGET = 0.7
"""Of sequential I/O."""
SHAPES = {"64 x 1 MiB": 1 << 20, "1,024 x 64 KiB": 64 << 10}
Bytes = npt.NDArray[np.uint8]


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


class Raw:
    """One file, one system call a page."""

    def __init__(self, folder: Path, pages: Bytes) -> None:
        self.path, self.pages = folder / "raw", [memoryview(page) for page in pages]

    def write(self, fsync: bool) -> None:
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for page in self.pages:
            os.write(fd, page)
        if fsync:
            os.fsync(fd)
        os.close(fd)

    def read(self) -> None:
        fd = os.open(self.path, os.O_RDONLY)
        for page in self.pages:
            os.readv(fd, [page])
        os.close(fd)

    def read_hashed(self) -> None:
        fd = os.open(self.path, os.O_RDONLY)
        for page in self.pages:
            os.readv(fd, [page])
            xxhash.xxh3_64_intdigest(page)
        os.close(fd)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        os.sync()


class Pages:
    """Host pages in two halves, and their digests."""

    def __init__(self, page_bytes: int) -> None:
        count = TOTAL_BYTES // page_bytes
        rng = np.random.default_rng(SEED)
        self.count, self.page_bytes = count, page_bytes
        geometry = KVGeometry(kind="mha", num_layers=1, num_heads=1, head_bytes=page_bytes // 32, page_size=16)
        self.pools = [HostKVCache(geometry, count * 16, "page_first", config=HostPoolConfig(headroom_bytes=0))
                      for _ in range(2)]  # fmt: skip
        for pool in self.pools:
            pool.alloc(count * 16)
        self.source, self.target = (pool.arena.data.reshape(count, page_bytes) for pool in self.pools)
        self.source[:] = rng.integers(0, 256, (count, page_bytes), np.uint8)
        self.digests = rng.integers(0, 256, (count, 32), np.uint8)
        self.ids = np.arange(count, dtype=np.int32)
        self.keys = [digest.tobytes().hex() for digest in self.digests]
        self.namespace = PageNamespace.of_geometry(geometry, self.pools[0].page_dims, model="bench", dtype="uint8")

    def calls(self, storage: Storage, layer: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Put all and get all, through the backend alone or through PageStore."""
        source, target = (host_page_parts(pool) for pool in self.pools)
        if layer == "store":
            given, room = ([parts(page) for page in range(self.count)] for parts in (source, target))
            return (lambda: storage.put_many(self.keys, given)), (lambda: storage.get_many(self.keys, room))
        puts, gets = (PageStore(storage, self.namespace, parts) for parts in (source, target))
        return (
            lambda: puts.set_pages(self.digests, self.ids),
            lambda: gets.get_pages(self.digests, self.ids),
        )


def measure(folder: Path, shape: str, layer: str, fsync: bool, rounds: int) -> dict[str, Any]:
    """Alternate sequential I/O and the file backend: a new folder each round."""
    pages = Pages(SHAPES[shape])
    written, read = Raw(folder, pages.source), Raw(folder, pages.target)
    times: dict[str, list[float]] = {name: [] for name in ("raw_put", "put", "raw_get", "get", "raw_hashed", "hashed")}
    ratios: dict[str, list[float]] = {"put": [], "get": [], "hashed": []}
    with FileStorage(folder / "store", fsync=fsync) as storage:
        put, get = pages.calls(storage, layer)
        put()  # the first puts make the folders
        for _ in range(rounds):
            written.remove()
            before = seconds(lambda: written.write(fsync))
            storage.clear()
            written.remove()
            taken = seconds(put)
            os.sync()
            written.remove()
            after = seconds(lambda: written.write(fsync))
            _note(times, ratios, "put", taken, before, after)
            os.sync()
            pages.target[:] = 1
            before = seconds(read.read)
            pages.target[:] = 1
            taken = seconds(get)
            assert (pages.target == pages.source).all(), "wrong bytes"
            pages.target[:] = 1
            after = seconds(read.read)
            _note(times, ratios, "get", taken, before, after)
            pages.target[:] = 1
            hashed = seconds(read.read_hashed)
            pages.target[:] = 1
            _note(times, ratios, "hashed", hashed, after, seconds(read.read))
    shutil.rmtree(folder / "store")
    mib = TOTAL_BYTES / (1 << 20)
    return {
        "shape": shape, "layer": layer, "fsync": fsync, "rounds": rounds,
        **{f"{name}_ratio": statistics.median(values) for name, values in ratios.items()},
        **{f"{name}_ratio_of_best": min(times[f"raw_{name}"]) / min(times[name]) for name in ratios},
        **{f"{name}_mib_s": mib / statistics.median(values) for name, values in times.items()},
        "get_ratio_of_hashed": statistics.median(h / g for h, g in zip(times["hashed"], times["get"], strict=True)),
    }  # fmt: skip


def _note(times: dict[str, list[float]], ratios: dict[str, list[float]], name: str, taken: float, before: float,
          after: float) -> None:  # fmt: skip
    times[f"raw_{name}"] += [before, after]
    times[name].append(taken)
    ratios[name].append((before + after) / 2 / taken)


def measure_backend(name: str, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """PageStore over another backend, its server started as the tests do. Empty if it cannot be had."""
    with suppress(BaseException):  # pytest's skip is one; what is missing is left out
        from tests.storage.sites import SITES

        site = SITES[name](folder)
        try:
            return [_one_backend(site, shape, rounds) for shape in SHAPES]
        finally:
            site.stop()
    return []


def _one_backend(site: Any, shape: str, rounds: int) -> dict[str, Any]:
    pages = Pages(SHAPES[shape])
    puts, gets = [], []
    with site.open(timeout_s=60.0) if site.name in ("redis", "s3", "mooncake") else site.open() as storage:
        storage.register(pages.source)
        storage.register(pages.target)
        put, get = pages.calls(storage, "pages")
        for _ in range(rounds):
            storage.clear()
            puts.append(seconds(put))
            pages.target[:] = 1
            gets.append(seconds(get))
            assert (pages.target == pages.source).all(), "wrong bytes"
        storage.unregister(pages.source)
        storage.unregister(pages.target)
    mib = TOTAL_BYTES / (1 << 20)
    return {"backend": site.name, "shape": shape, "put_mib_s": mib / statistics.median(puts),
            "get_mib_s": mib / statistics.median(gets)}  # fmt: skip


def checks_of(rows: Sequence[dict[str, Any]]) -> list[report.Check]:
    """report's checks are upper limits: our time over that of sequential I/O."""
    return [
        report.Check(f"file {name}, {row['shape']}, {'fsync' if row['fsync'] else 'page cache'}, {row['layer']}: "
                     "time / sequential I/O's", 1 / row[f"{name}_ratio"], 1 / TARGET, "x")
        for row in rows for name in ("put", "get")
    ]  # fmt: skip


def show(rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> None:
    """Print the tables."""
    report.table(
        "The file backend beside sequential I/O, MiB/s; ratio = median of neighbours",
        ("pages", "durability", "layer", "put", "raw", "ratio", "of best", "get", "raw", "ratio", "of best",
         "hashed / raw", "get / hashed"),
        [(r["shape"], "fsync" if r["fsync"] else "page cache", r["layer"],
          *(report.number(r[f], 0 if f.endswith("mib_s") else 2) for name in ("put", "get")
            for f in (f"{name}_mib_s", f"raw_{name}_mib_s", f"{name}_ratio", f"{name}_ratio_of_best")),
          report.number(r["hashed_ratio"], 2), report.number(r["get_ratio_of_hashed"], 2))
         for r in rows],
    )  # fmt: skip
    if others:
        report.table("Backends, PageStore, MiB/s", ("backend", "pages", "put", "get"),
                     [(r["backend"], r["shape"], report.number(r["put_mib_s"], 0), report.number(r["get_mib_s"], 0))
                      for r in others])  # fmt: skip


def main() -> None:
    """Command line. See report.conclude for the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 rounds: shows that everything runs")
    parser.add_argument("--rounds", type=int, help="alternating rounds (9; 2 with --quick)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (a temporary folder)")
    parser.add_argument("--backends", default="", help="others to measure: memory,nixl,redis,mooncake,s3")
    parser.add_argument("--json", type=Path, default=report.DEFAULT_FOLDER / "storage.json", help="where it goes")
    report.add_check_option(parser)
    options = parser.parse_args()
    rounds = options.rounds or (2 if options.quick else 9)
    folder = Path(tempfile.mkdtemp(prefix="radixkv-bench-", dir=options.folder))
    try:
        rows = [measure(folder, shape, layer, fsync, rounds)
                for shape in SHAPES for fsync in (False, True) for layer in ("store", "pages")]  # fmt: skip
        others = []
        for name in filter(None, options.backends.split(",")):
            (folder / name).mkdir()
            others += measure_backend(name, folder / name, min(rounds, 5))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    checks = checks_of(rows)
    report.write_json(report.header(seed=SEED, rounds=rounds, rows=rows, backends=others,
                                    checks=report.checks_as_dicts(checks)), options.json)  # fmt: skip
    show(rows, others)
    report.conclude(checks, options.check)


if __name__ == "__main__":
    sys.exit(main())
