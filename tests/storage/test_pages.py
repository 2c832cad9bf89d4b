"""PageStore: what is wrong, short, torn or foreign is a miss, counted and removed; dead stores are left alone."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from radixkv.errors import InvalidArgumentError, PageOwnershipError, StateError, StorageError
from radixkv.key import encode_namespace
from radixkv.pool.host import HostKVCache, HostPoolConfig
from radixkv.pool.layout import LAYOUTS, KVGeometry, Layout
from radixkv.storage import MemoryStorage, PageNamespace, PageStore, host_page_parts
from radixkv.storage.breaker import BreakerConfig
from radixkv.storage.envelope import HEADER, HEADER_BYTES

from .faults import Damage, Faults, FaultyStorage, cut, dead, flip, torn
from .kit import PAGE_BYTES, HostPages, digests, ids, namespace, page_store


@pytest.fixture
def host() -> HostPages:
    return HostPages(16)


def test_pages_come_back_as_they_were(host: HostPages) -> None:
    store = page_store(MemoryStorage(), host)
    written = host.fill(ids(0, 5, 3), seed=1)
    names = digests(3)
    assert store.set_pages(names, ids(0, 5, 3)).tolist() == [True] * 3
    assert store.get_pages(names, ids(9, 10, 11)).tolist() == [True] * 3
    np.testing.assert_array_equal(host.read(ids(9, 10, 11)), written)
    seen = store.counters
    assert (seen.stored, seen.hits, seen.misses) == (3, 3, 0)
    assert (seen.bytes_written, seen.bytes_read) == (3 * PAGE_BYTES, 3 * PAGE_BYTES)


def test_empty_batches(host: HostPages) -> None:
    inner = FaultyStorage(MemoryStorage())
    store = page_store(inner, host)
    none = np.zeros((0, 32), np.uint8)
    assert store.set_pages(none, ids()).shape == store.get_pages(none, ids()).shape == (0,)
    assert store.count_prefix(none) == 0
    assert not inner.calls


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 200])
def test_count_prefix_stops_at_the_first_gap(host: HostPages, count: int) -> None:
    inner = FaultyStorage(MemoryStorage())
    store = page_store(inner, host)
    names = digests(300)
    stored = np.r_[:count, count + 1 : 300]
    store.set_pages(names[stored], np.zeros(len(stored), np.int32))
    assert store.count_prefix(names) == count
    assert inner.calls["exists_many"] <= 3


DAMAGES: list[tuple[Damage, str]] = [
    (flip(0), "corrupt"), (flip(9), "corrupt"), (flip(30), "corrupt"), (flip(60), "corrupt"),
    (flip(HEADER_BYTES), "corrupt"), (flip(HEADER_BYTES + PAGE_BYTES - 1), "corrupt"),
    (cut(0), "short"), (cut(HEADER_BYTES - 1), "short"), (cut(HEADER_BYTES), "short"),
    (cut(HEADER_BYTES + PAGE_BYTES - 1), "short"), (lambda value: value + b"x", "short"),
    (torn(0), "corrupt"), (torn(HEADER_BYTES + 100), "corrupt"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "kind"), DAMAGES)
def test_a_damaged_page_is_a_miss_counted_and_removed(host: HostPages, damage: Damage, kind: str) -> None:
    inner = FaultyStorage(MemoryStorage())
    store = page_store(inner, host)
    names = digests(2)
    host.fill(ids(0, 1), seed=2)
    store.set_pages(names, ids(0, 1))
    inner.faults.damage = damage
    assert not store.get_pages(names[:1], ids(2)).any()
    inner.faults.damage = None
    seen = store.counters
    assert (getattr(seen, kind), seen.misses, seen.removed, seen.hits) == (1, 1, 1, 0)
    assert inner.exists_many(store.keys(names)).tolist() == [False, True]  # only the wrong one went
    assert store.set_pages(names[:1], ids(0)).all()  # and can be stored again
    assert store.get_pages(names, ids(3, 4)).all()
    assert store.counters.errors == 0


def test_every_flipped_bit_of_a_page_is_seen(host: HostPages) -> None:
    inner = FaultyStorage(MemoryStorage())
    store = page_store(inner, host)
    names = digests(1)
    host.fill(ids(0), seed=3)
    total = HEADER_BYTES + PAGE_BYTES
    places = [*range(HEADER_BYTES), *np.random.default_rng(0).integers(HEADER_BYTES, total, 100).tolist()]
    for at in places:
        inner.faults.damage = None
        store.set_pages(names, ids(0))
        inner.faults.damage = flip(at)
        assert not store.get_pages(names, ids(1)).any(), at
    assert store.counters.removed == len(places)


def test_a_page_under_another_pages_key_is_foreign(host: HostPages) -> None:
    memory = MemoryStorage()
    store = page_store(memory, host)
    host.fill(ids(0), seed=4)
    mine, other = digests(2)[:1], digests(2)[1:]
    store.set_pages(mine, ids(0))
    value = np.zeros(HEADER_BYTES + PAGE_BYTES, np.uint8)
    memory.get_many(store.keys(mine), [[value]])
    memory.put_many(store.keys(other), [[value]])
    assert not store.get_pages(other, ids(1)).any()
    assert (store.counters.foreign, store.counters.removed) == (1, 1)


def test_another_format_version_is_foreign(host: HostPages) -> None:
    import xxhash

    memory = MemoryStorage()
    store = page_store(memory, host)
    store.set_pages(digests(1), ids(0))
    value = np.zeros(HEADER_BYTES + PAGE_BYTES, np.uint8)
    memory.get_many(store.keys(digests(1)), [[value]])
    header = value[:HEADER_BYTES].view(HEADER)
    header["version"] = 3
    header["sum"] = xxhash.xxh3_64_intdigest(value[64:], xxhash.xxh3_64_intdigest(value[:56]))
    memory.clear()
    memory.put_many(store.keys(digests(1)), [[value]])
    assert not store.get_pages(digests(1), ids(1)).any()
    assert store.counters.foreign == 1


CHANGES = [{"model": "tiny@2"}, {"dtype": "bfloat16"}, {"page_dims": "K L P H D"}, {"first_head": 2},
           {"first_layer": 2}, {"page_size": 8, "head_bytes": 64}, {"num_layers": 4, "num_heads": 1},
           {"hash_name": "fnv"}, {"extra": "yarn"}, {"kind": "mla", "num_layers": 4}]  # fmt: skip


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "+".join(changes))
def test_whatever_bytes_depend_on_is_in_the_key(host: HostPages, changes: dict[str, object]) -> None:
    memory = MemoryStorage()
    page_store(memory, host).set_pages(digests(1), ids(0))
    other = page_store(memory, host, namespace=namespace(**changes))
    assert other.count_prefix(digests(1)) == 0
    assert not other.get_pages(digests(1), ids(1)).any()
    assert page_store(memory, host, namespace=namespace()).count_prefix(digests(1)) == 1


def test_tenants_do_not_share(host: HostPages) -> None:
    store = page_store(MemoryStorage(), host)
    salts = [b"", encode_namespace("lora", None), encode_namespace(None, "lora"), encode_namespace("a", "b")]
    for salt in salts:
        assert not store.get_pages(digests(1), ids(0), salt=salt).any()
        store.set_pages(digests(1), ids(0), salt=salt)
    assert all(store.get_pages(digests(1), ids(1), salt=salt).all() for salt in salts)
    assert store.storage.stats()["values"] == len(salts)


def test_the_cache_of_salts_is_bounded(host: HostPages) -> None:
    store = page_store(MemoryStorage(), host)
    for number in range(3000):
        store.keys(digests(1), str(number).encode())
    assert len(store._prefixes) <= 1024


def test_keys_are_the_same_in_every_process() -> None:
    code = ("from tests.storage.kit import *\nfrom radixkv.storage import MemoryStorage\n"
            "print(page_store(MemoryStorage(), HostPages(1)).keys(digests(2), b'salt'))")  # fmt: skip
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           cwd=Path(__file__).parents[2], env={"PYTHONHASHSEED": seed}).stdout
            for seed in ("1", "2")]  # fmt: skip
    keys = page_store(MemoryStorage(), HostPages(1)).keys(digests(2), b"salt")
    assert runs == [f"{keys}\n"] * 2
    # written down: a change orphans every page that users have stored (the last one: envelope version 2)
    assert keys[0].startswith("d69a8c6d7d6dd02697702a279ef21632")


def test_bad_arguments(host: HostPages) -> None:
    store = page_store(MemoryStorage(), host)
    with pytest.raises(InvalidArgumentError, match="2 digests and 1 host pages"):
        store.set_pages(digests(2), ids(0))
    with pytest.raises(InvalidArgumentError, match="uint8"):
        store.set_pages(digests(2).astype(np.int32), ids(0, 1))
    with pytest.raises(InvalidArgumentError, match=r"has 4096 bytes, the namespace's 8192"):
        page_store(MemoryStorage(), host, namespace=namespace(num_layers=4)).set_pages(digests(1), ids(0))
    with pytest.raises(InvalidArgumentError, match="without a model"):
        namespace(model="")
    with pytest.raises(InvalidArgumentError, match="head_bytes is 0"):
        namespace(head_bytes=0)


def test_a_dead_store_is_soon_left_alone_and_tried_again_later(
    host: HostPages, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "radixkv.storage")
    now = [0.0]
    inner = FaultyStorage(MemoryStorage(), dead())
    config = BreakerConfig(failures=3, first_pause_s=1.0, longest_pause_s=4.0)
    store = page_store(inner, host, breaker=config, clock=lambda: now[0])
    for _ in range(10):
        assert not store.get_pages(digests(2), ids(0, 1)).any()
    assert (inner.calls["get_many"], store.counters.errors, store.counters.skipped) == (3, 3, 7)
    assert store.counters.misses == 20
    assert caplog.messages == ["storage=left_alone backend=faulty error='connection refused'"]  # once, and why
    now[0] += 1.0
    assert store.count_prefix(digests(2)) == 0  # the trial fails
    assert not store.set_pages(digests(2), ids(0, 1)).any()
    assert (store.counters.errors, store.counters.skipped) == (4, 8)
    now[0] += 2.0
    inner.faults = Faults()
    assert store.set_pages(digests(2), ids(0, 1)).all()
    assert store.get_pages(digests(2), ids(2, 3)).all()
    assert not store.breaker.open
    assert caplog.messages[1:] == ["storage=back backend=faulty"]


def test_only_one_trial_at_a_time(host: HostPages) -> None:
    now = [0.0]
    inner = FaultyStorage(MemoryStorage(), dead())
    config = BreakerConfig(failures=1, first_pause_s=1.0)
    store = page_store(inner, host, breaker=config, clock=lambda: now[0])
    store.count_prefix(digests(1))
    now[0] = 1.0
    gate = threading.Event()
    inner.faults = Faults(gate=gate)
    trial = threading.Thread(target=store.count_prefix, args=(digests(1),))
    trial.start()
    while inner.calls["exists_many"] < 2:
        trial.join(0.001)
    store.count_prefix(digests(1))  # returns at once
    assert (inner.calls["exists_many"], store.counters.skipped) == (2, 1)
    gate.set()
    trial.join()
    store.count_prefix(digests(1))
    assert inner.calls["exists_many"] == 3


def test_a_slow_store_costs_no_more_than_the_deadline(host: HostPages) -> None:
    inner = FaultyStorage(MemoryStorage(), Faults(gate=threading.Event()))
    store = page_store(inner, host)
    assert not store.get_pages(digests(1), ids(0), timeout_s=0.01).any()
    assert not store.set_pages(digests(1), ids(0), timeout_s=0.01).any()
    assert store.count_prefix(digests(1), timeout_s=0.01) == 0
    assert (store.counters.timeouts, store.counters.errors) == (3, 0)
    assert store.breaker.open


def test_an_error_that_is_not_of_storage_is_raised_and_leaves_the_breaker_usable(host: HostPages) -> None:
    now = [0.0]
    inner = FaultyStorage(MemoryStorage(), dead())
    store = page_store(inner, host, breaker=BreakerConfig(failures=1), clock=lambda: now[0])
    store.count_prefix(digests(1))
    now[0] = 100.0
    inner.faults = Faults(error=ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        store.count_prefix(digests(1))
    now[0] = 200.0
    inner.faults = Faults()
    assert store.set_pages(digests(1), ids(0)).all()


def test_lost_pages_are_flags(host: HostPages) -> None:
    inner = FaultyStorage(MemoryStorage(), Faults(lose=0.5))
    store = page_store(inner, host)
    stored = store.set_pages(digests(100), np.zeros(100, np.int32))
    assert 0 < stored.sum() < 100
    inner.faults.lose = 0
    np.testing.assert_array_equal(store.get_pages(digests(100), np.ones(100, np.int32)), stored)
    assert store.counters.refused == 100 - stored.sum()


def test_a_full_store_makes_room() -> None:
    host = HostPages(16)
    store = page_store(MemoryStorage(max_bytes=4 * (PAGE_BYTES + HEADER_BYTES)), host)
    for start in (0, 4):
        store.set_pages(digests(8)[start : start + 4], ids(0, 1, 2, 3))
    assert store.get_pages(digests(8), ids(*range(8, 16))).tolist() == [False] * 4 + [True] * 4


@pytest.mark.parametrize("kind", ["mha", "mla"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_of_a_host_pool(layout: Layout, kind: str) -> None:
    heads = 2 if kind == "mha" else 1
    geometry = KVGeometry(kind=kind, num_layers=3, num_heads=heads, head_bytes=16, page_size=4)  # type: ignore[arg-type]
    pool = HostKVCache(geometry, 8 * 4, layout, config=HostPoolConfig(headroom_bytes=0))
    spaces = PageNamespace.of_geometry(geometry, pool.page_dims, model="m", dtype="float16")
    assert spaces.page_bytes == geometry.page_bytes
    store = PageStore(MemoryStorage(), spaces, host_page_parts(pool))
    slots = pool.alloc(4 * 4)
    rows = np.random.default_rng(0).integers(0, 256, (4, geometry.page_bytes), np.uint8)
    pool.set_from_flat_data_pages(slots, rows)
    pool.update_prefetch(slots)
    pages = (slots[::4] // 4).astype(np.int32)
    assert store.set_pages(digests(4), pages).all()
    others = pool.alloc(4 * 4)
    assert store.get_pages(digests(4), (others[::4] // 4).astype(np.int32)).all()
    pool.update_prefetch(others)
    np.testing.assert_array_equal(pool.get_flat_data_pages(others), rows)
    starts, size = pool.page_pieces(pages)
    meta = [[(pool.arena.address + start, size) for start in row] for row in starts.tolist()]
    assert meta == [pool.page_buffer(int(page) * 4) for page in pages]
    pool.free(others)
    with pytest.raises(StateError, match="IDLE"):
        store.set_pages(digests(1), (others[:1] // 4).astype(np.int32))
    with pytest.raises(PageOwnershipError, match="host page 8 is not"):
        store.set_pages(digests(1), ids(8))
    pool.close()  # no view is left behind


def test_heads_of_a_rank() -> None:
    mha = KVGeometry(kind="mha", num_layers=1, num_heads=4, head_bytes=2, page_size=1)
    mla = KVGeometry(kind="mla", num_layers=1, num_heads=1, head_bytes=2, page_size=1)
    spaces = [PageNamespace.of_geometry(g, "x", model="m", dtype="d", tp_rank=r) for g in (mha, mla) for r in (0, 1)]
    assert [space.first_head for space in spaces] == [0, 4, 0, 0]
    assert len({space.digest() for space in spaces}) == 3  # MLA: every rank reads what rank 0 stored


def test_ranks_of_another_number_do_not_share_unless_they_say_which_heads_they_hold() -> None:
    """Of 4 KV heads, rank 2 of 4 holds head 2, and rank 2 of 8 head 1."""
    mha = KVGeometry(kind="mha", num_layers=1, num_heads=1, head_bytes=2, page_size=1)
    mla = KVGeometry(kind="mla", num_layers=1, num_heads=1, head_bytes=2, page_size=1)

    def digest(geometry: KVGeometry, rank: int, size: int, first_head: int | None = None) -> bytes:
        return PageNamespace.of_geometry(
            geometry, "x", model="m", dtype="d", tp_rank=rank, tp_size=size, first_head=first_head
        ).digest()

    assert digest(mha, 2, 4) != digest(mha, 2, 8)
    assert digest(mha, 2, 4, first_head=2) == digest(mha, 5, 8, first_head=2)
    assert digest(mla, 2, 4) == digest(mla, 5, 8)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, host: HostPages) -> None:
    from radixkv.storage import envelope

    monkeypatch.setitem(sys.modules, "xxhash", None)
    envelope._xxhash.cache_clear()
    with pytest.raises(StorageError, match=r"pip install 'radixkv\[storage\]'"):  # not only once a page is stored
        page_store(MemoryStorage(), host)
    envelope._xxhash.cache_clear()
