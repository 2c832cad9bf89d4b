"""The random run of the whole stack through HiRadixCache, on real files; and it can fail."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from radixkv.controller import hashes, operations
from radixkv.controller.base import Digests
from radixkv.controller.hashes import PathHashes
from radixkv.hicache import RadixCache
from radixkv.hicache.cache_controller import LayerDoneCounter
from radixkv.hicache.indices import AllocatorPages
from radixkv.storage import sealed
from radixkv.storage.namespace import PageNamespace
from radixkv.tree.page_hash import sha256_chain
from tests.controller.planted import free_twice, leak

from .soak import CacheSoak, soak_cache

STEPS = 2500
SEEDS = range(300, 316)


def test_no_wrong_byte_and_no_lost_slot(tmp_path: Path) -> None:
    """Rest at each end; and all that may go wrong has."""
    total: Counter[str] = Counter()
    for seed in SEEDS:
        total.update(soak_cache(seed, STEPS, tmp_path / str(seed)))
    at_least = {"served": 50_000, "finished": 300, "hits": 150, "stored": 1000, "lives": 100, "died": 10,
                "retracted": 50, "misses": 1, "errors": 10, "load errors": 1}  # fmt: skip
    assert {name: total[name] for name, least in at_least.items() if total[name] < least} == {}
    for what in ("flip", "cut", "open E", "write ENOSPC", "pread EIO", "rename E", "dead at "):
        assert any(name.startswith(what) for name in total), f"never: {what}; {total}"


def test_with_the_threads_of_earnest(tmp_path: Path) -> None:
    served = [soak_cache(seed, 1500, tmp_path / str(seed), threads=True)["served"] for seed in range(3)]
    assert sum(served) > 3000


def test_a_seed_names_a_run(tmp_path: Path) -> None:
    runs = [soak_cache(5, 1000, tmp_path / str(again)) for again in range(2)]
    assert runs[0] == runs[1]


def test_it_has_everything(tmp_path: Path) -> None:
    """Over some seeds all kinds of pools, layouts and policies are there."""
    from tests.controller.disk import Disk

    soaks = [CacheSoak(seed, Disk(tmp_path, seed)) for seed in SEEDS]
    assert {soak.kind for soak in soaks} == {"mha", "mla"}
    assert {soak.page_size for soak in soaks} == {1, 2, 4}
    assert {len({str(soak.settings[name]) for soak in soaks}) for name in ("policy", "prefetch", "by_name")} == {3, 2}
    assert len({soak.settings["layout"] for soak in soaks}) == 4


# ---- the run can fail ------------------------------------------------------------------------------------------------
def not_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes from storage is served as it is."""
    monkeypatch.setattr(sealed.Check, "verdicts", lambda self, sizes: {})


def tenants_share_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both guards are gone: the salt in the key, and the namespace at the head of the chain."""
    digest = PageNamespace.digest
    monkeypatch.setattr(PageNamespace, "digest", lambda self, salt=b"": digest(self))

    def own(self: PathHashes, node: int) -> Digests:
        tree = self._tree
        chain: Digests = sha256_chain(self.path_tokens(node), tree.page_size, None)
        return chain[-(len(tree.node_info(node).tokens) // tree.page_size) :]

    monkeypatch.setattr(PathHashes, "own", own)
    monkeypatch.setattr(hashes, "namespace_digest", lambda namespace: None)


def slots_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    leak(monkeypatch, AllocatorPages)


def freed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    free_twice(monkeypatch, AllocatorPages)


def rows_keep_freed_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a request had computed beside others is freed, and its row still names it."""
    adopt = RadixCache._adopt

    def forget(self: Any, req: Any, prefix: Any, mine: Any, found: Any) -> int:
        row = self.req_to_token_pool.req_to_token[req.req_pool_idx].clone()
        node = adopt(self, req, prefix, mine, found)
        self.req_to_token_pool.req_to_token[req.req_pool_idx] = row
        prefix[:] = row[: len(prefix)]
        return node

    monkeypatch.setattr(RadixCache, "_adopt", forget)


def failed_loads_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerDoneCounter, "wait_until", lambda self, threshold: None)


def backups_never_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations.WriteOp, "status", lambda self, now_s: operations.RUNNING)


def copies_not_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations.WriteOp, "status", lambda self, now_s: operations.SUCCEEDED)


DEFECTS = [
    not_verified, tenants_share_keys, slots_leak, freed_twice, rows_keep_freed_slots, failed_loads_are_served,
    backups_never_end, copies_not_awaited,
]  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_a_defect_is_found(defect: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    defect(monkeypatch)
    for seed in SEEDS:
        try:
            soak_cache(seed, STEPS, tmp_path / str(seed))
        except Exception:  # some check of some layer, whichever comes first
            return
    pytest.fail("nobody noticed")
