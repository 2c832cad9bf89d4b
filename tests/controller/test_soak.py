"""The random run of the whole stack: 100,000 steps over seeds, on files, on the reference tree. And it can fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radixkv.controller import LayerCounter
from radixkv.controller.ledger import Ledger
from radixkv.controller.loads import Loads
from radixkv.controller.operations import SUCCEEDED
from radixkv.controller.prefetches import Prefetches
from radixkv.controller.stores import Stores
from radixkv.controller.writes import Writes
from radixkv.storage.file import FileStorage
from radixkv.tree import page_hash

from .soak import Soak, ThreadedSoak

SEEDS = range(100, 136)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_wrong_byte_and_no_lost_page(seed: int) -> None:
    soak = Soak(seed)
    soak.run(2500)
    assert soak.served_pages > 100


@pytest.mark.parametrize("seed", range(8))
def test_on_files(seed: int, tmp_path: Path) -> None:
    storage = FileStorage(tmp_path, max_bytes=200_000 if seed % 2 else None, segment_bytes=8192)
    Soak(seed, storage=storage).run(1500)
    storage.close()


@pytest.mark.parametrize("seed", range(4))
def test_on_the_reference_tree(seed: int) -> None:
    Soak(seed, "reference").run(1000)


def test_with_the_threads_of_earnest() -> None:
    for seed in range(4):
        soak = ThreadedSoak(seed)
        soak.run(1500)
        assert soak.served_pages > 100


# ---- the run can fail ------------------------------------------------------------------------------------------------
def hash_from_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original's defect: pages hashed as if nothing came before them."""
    from radixkv.controller import hashes

    monkeypatch.setattr(
        hashes.PathHashes, "own",
        lambda self, node: page_hash.sha256_chain(self._tree.node_info(node).tokens, self._tree.page_size),
    )  # fmt: skip


def host_pages_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host pages of a failed copy leak."""
    monkeypatch.setattr(Ledger, "free_host", lambda self, pages: None)


def copies_not_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy counts as done when it has been asked for."""
    from radixkv.controller import operations

    monkeypatch.setattr(operations.WriteOp, "status", lambda self, now_s: operations.SUCCEEDED)


def loads_not_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    from radixkv.controller import operations

    monkeypatch.setattr(operations.LoadBatch, "status", lambda self, now_s: operations.SUCCEEDED)


def failures_count_as_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing wrong is served, but pages that were never fetched are."""
    settle = Prefetches._settle_pages
    monkeypatch.setattr(
        Prefetches, "_settle_pages",
        lambda self, op, pages, ended: settle(self, op, len(op.host_pages), ended),
    )  # fmt: skip


def store_not_protected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage reads host pages that may be freed."""
    begin = Stores.begin

    def unprotected(self: Any, node: int) -> Any:
        op = begin(self, node)
        if op is not None:
            self.context.tree.release_host(node)
        return op

    monkeypatch.setattr(Stores, "begin", unprotected)


def write_not_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Writes.begin

    def unlocked(self: Any, node: int) -> int:
        tokens = begin(self, node)
        if tokens:
            self.context.tree.unlock(node)
        return tokens

    monkeypatch.setattr(Writes, "begin", unlocked)


def failed_load_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    settle = Loads.settle
    monkeypatch.setattr(Loads, "settle", lambda self, batch, status: settle(self, batch, SUCCEEDED))


def freed_while_storage_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a prefetch did not bring is free, though a call to storage may still bring it."""
    settle = Prefetches._settle_pages
    monkeypatch.setattr(Prefetches, "_settle_pages", lambda self, op, pages, ended: settle(self, op, pages, True))


def drained_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    from radixkv.controller import operations

    monkeypatch.setattr(operations.DrainOp, "status", lambda self, now_s: operations.SUCCEEDED)


def failures_of_earlier_loads_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerCounter, "_raise_failures", lambda self, oldest, index: None)


DEFECTS = [
    hash_from_nothing, host_pages_not_kept, copies_not_awaited, loads_not_awaited, failures_count_as_stored,
    store_not_protected, write_not_locked, failed_load_is_kept, freed_while_storage_writes, drained_too_early,
    failures_of_earlier_loads_ignored,
]  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_a_defect_is_found(defect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    defect(monkeypatch)
    for seed in SEEDS:
        try:
            Soak(seed).run(2500)
        except Exception:  # some check of some layer, whichever comes first
            return
    pytest.fail("nobody noticed")


def test_a_seed_names_a_run() -> None:
    runs = []
    for _ in range(2):
        soak = Soak(3)
        soak.run(800)
        runs.append((soak.served_pages, dict(soak.done)))
    assert runs[0] == runs[1]
    assert np.sum(runs[0][0]) > 0
