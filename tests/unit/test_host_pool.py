"""pool/host.py and pool/states.py: every layout's bytes lie where its view says, sizes have limits, states are kept."""

from __future__ import annotations

import ctypes
import itertools
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from radixkv.errors import (
    ArgumentTypeError,
    DeviceUnavailableError,
    HostMemoryError,
    IntegrityError,
    InvalidArgumentError,
    PageLockError,
    PageOwnershipError,
    StateError,
    UnsupportedLayoutError,
)
from radixkv.pool import host
from radixkv.pool.arena import ArenaConfig, Kernel
from radixkv.pool.device import MHATokenToKVPool, MLATokenToKVPool
from radixkv.pool.host import HostKVCache, HostPoolConfig, MHATokenToKVPoolHost, MLATokenToKVPoolHost, host_slots
from radixkv.pool.layout import LAYOUTS, KVGeometry, Layout
from radixkv.pool.states import HostSlots, MemoryStateInt

IDLE, RESERVED, PROTECTED, SYNCED, BACKUP = MemoryStateInt

L, P, H, D, PAGES = 3, 4, 2, 6, 5
S = PAGES * P
MHA = KVGeometry(kind="mha", num_layers=L, num_heads=H, head_bytes=D, page_size=P)
MLA = KVGeometry(kind="mla", num_layers=L, num_heads=1, head_bytes=10, page_size=P)
PLAIN = HostPoolConfig(arena=ArenaConfig(huge_pages="none"), headroom_bytes=0)


def pool_of(geometry: KVGeometry, layout: Layout = "layer_first", **options: Any) -> HostKVCache:
    return HostKVCache(geometry, S, layout, **({"config": PLAIN} | options))


class FakeRegistrar:
    name = "fake"

    def __init__(self, fail: bool = False) -> None:
        self.locked: dict[int, int] = {}
        self.fail = fail

    def register(self, address: int, num_bytes: int) -> None:
        if self.fail and self.locked:
            raise RuntimeError("no more")
        self.locked[address] = num_bytes

    def unregister(self, address: int) -> None:
        del self.locked[address]


# ---- bytes -----------------------------------------------------------------------------------------------------------
CASES = [(geometry, layout) for geometry in (MHA, MLA) for layout in LAYOUTS]
IDS = [f"{geometry.kind}-{layout}" for geometry, layout in CASES]


@pytest.mark.parametrize(("geometry", "layout"), CASES, ids=IDS)
def test_every_head_has_its_own_place_within_the_arena(geometry: KVGeometry, layout: Layout) -> None:
    pool = pool_of(geometry, layout)
    view = pool.view()
    data = pool.arena.data
    assert (view.num_slots, view.device, data.size) == (S, "cpu", S * geometry.token_bytes)
    written = np.zeros(data.size, np.uint8)
    for half, layer, slot, head in itertools.product(
        range(geometry.halves), range(L), range(S), range(geometry.num_heads)
    ):
        at = int(view.bases[half, layer]) - pool.arena.address
        at += slot // P * view.page_stride + slot % P * view.token_stride + head * view.head_stride
        written[at : at + geometry.head_bytes] += 1
    assert (written == 1).all()


@pytest.mark.parametrize(("geometry", "layout"), CASES, ids=IDS)
def test_a_flat_page_is_the_bytes_of_its_slots_in_the_order_of_page_dims(geometry: KVGeometry, layout: Layout) -> None:
    pool = pool_of(geometry, layout)
    pool.arena.data[:] = np.random.default_rng(1).integers(0, 256, pool.arena.data.size, np.uint8)
    pool.update_prefetch(pool.alloc(S))
    view, page = pool.view(), 3
    letters = pool.page_dims.split()
    sizes = {"K": geometry.halves, "L": L, "P": P, "H": geometry.num_heads}
    flat = b""
    for place in itertools.product(*(range(sizes[letter]) for letter in letters[:-1])):
        at = dict(zip(letters, place, strict=False))
        where = int(view.bases[at.get("K", 0), at["L"]]) + page * view.page_stride
        where += at["P"] * view.token_stride + at["H"] * view.head_stride
        flat += ctypes.string_at(where, geometry.head_bytes)
    assert pool.get_flat_data_page(page * P).tobytes() == flat
    assert len(flat) == geometry.page_bytes


@pytest.mark.parametrize(("geometry", "layout"), CASES, ids=IDS)
def test_a_flat_page_written_to_another_page_is_read_back_and_touches_no_other(
    geometry: KVGeometry, layout: Layout
) -> None:
    pool = pool_of(geometry, layout)
    slots = pool.alloc(S)
    pool.arena.data[:] = 0xAA
    rows = np.random.default_rng(2).integers(0, 256, (2, geometry.page_bytes), np.uint8)
    pool.set_from_flat_data_pages(np.concatenate([slots[4 * P :], slots[P : 2 * P]]), rows)
    pool.set_from_flat_data_page(2 * P, rows[0].tobytes())
    pool.update_prefetch(slots)
    assert np.array_equal(pool.get_flat_data_pages(slots[P : 2 * P]), rows[1:])
    assert np.array_equal(pool.get_flat_data_page(4 * P), rows[0])
    assert np.array_equal(pool.get_flat_data_page(2 * P), rows[0])
    for page in (0, 3):
        assert (pool.get_flat_data_page(page * P) == 0xAA).all()
    assert pool.get_dummy_flat_data_page().shape == (geometry.page_bytes,)
    assert not pool.get_dummy_flat_data_page().any()


@pytest.mark.parametrize(("geometry", "layout"), CASES, ids=IDS)
def test_the_pieces_of_a_page_are_its_flat_bytes(geometry: KVGeometry, layout: Layout) -> None:
    pool = pool_of(geometry, layout)
    pool.arena.data[:] = np.random.default_rng(3).integers(0, 256, pool.arena.data.size, np.uint8)
    pool.update_prefetch(pool.alloc(S))
    pieces = pool.page_buffer(2 * P)
    assert b"".join(ctypes.string_at(*piece) for piece in pieces) == pool.get_flat_data_page(2 * P).tobytes()
    assert len(pieces) == geometry.halves * (L if layout == "layer_first" else 1)


@pytest.mark.parametrize(("geometry", "layout"), CASES, ids=IDS)
def test_buffer_meta_names_every_piece(geometry: KVGeometry, layout: Layout) -> None:
    pool = pool_of(geometry, layout)
    slots = pool.alloc(S)
    names, addresses, sizes = pool.get_buffer_meta(["a", "b"], np.concatenate([slots[:P], slots[3 * P : 4 * P]]))
    view = pool.view()
    halves = "kv"[: geometry.halves]
    if layout == "layer_first":
        assert names == [f"{key}_{layer}_{half}" for key in "ab" for layer in range(L) for half in halves]
        assert addresses[halves.index("k") + len(halves)] == view.bases[0, 1]
        assert addresses[-1] == view.bases[-1, L - 1] + 3 * view.page_stride
    else:
        assert names == [f"{key}_{half}" for key in "ab" for half in halves]
        assert addresses[-1] == view.bases[-1, 0] + 3 * view.page_stride
    assert sum(sizes) == 2 * geometry.page_bytes
    with pytest.raises(InvalidArgumentError, match="1 keys for 2 pages"):
        pool.get_buffer_meta(["a"], slots[: 2 * P])


def test_buffers_and_sizes() -> None:
    pool = pool_of(MHA, "page_first")
    assert pool.kv_buffer.shape == (2, PAGES, P, L, H, D)
    pool.v_buffer[:] = 1
    assert pool.k_buffer.max() == 0
    assert pool.arena.data[-1] == 1
    assert pool.size_per_token == pool.get_size_per_token() == 2 * L * H * D
    with pytest.raises(InvalidArgumentError, match="no values apart"):
        _ = pool_of(MLA).v_buffer


@pytest.mark.parametrize("dtype", ["uint8", "bfloat16", "float8_e4m3fn"])
def test_a_page_may_be_a_tensor(dtype: str) -> None:
    """As engines hand it over, of any dtype and strides."""
    torch = pytest.importorskip("torch")
    pool = pool_of(MHA)
    slots = pool.alloc(2 * P)
    row = np.random.default_rng(3).integers(0, 256, MHA.page_bytes, np.uint8)
    tensor = torch.from_numpy(row.copy()).view(getattr(torch, dtype))
    pool.set_from_flat_data_page(0, tensor.reshape(2, -1))
    pool.set_from_flat_data_page(P, torch.from_numpy(row).reshape(2, -1).T)
    pool.update_prefetch(slots)
    assert np.array_equal(pool.get_flat_data_page(0), row)
    assert np.array_equal(pool.get_flat_data_page(P), row.reshape(2, -1).T.reshape(-1))


def test_wrong_pages_of_bytes() -> None:
    pool = pool_of(MHA)
    slots = pool.alloc(P)
    size = MHA.page_bytes
    for rows in (np.zeros((1, 5), np.uint8), np.zeros((1, size), np.int8), np.zeros((2, size), np.uint8)):
        with pytest.raises(InvalidArgumentError, match="for 1 pages of"):
            pool.set_from_flat_data_pages(slots, rows)
    for wrong in (None, 5, "text", [1, 2]):
        with pytest.raises(ArgumentTypeError, match="a buffer, an array or a tensor, not"):
            pool.set_from_flat_data_page(0, wrong)
    with pytest.raises(StateError, match="host page 1 is IDLE, and must be RESERVED to be written"):
        pool.set_from_flat_data_page(P, bytes(MHA.page_bytes))
    with pytest.raises(StateError, match="page 0 is RESERVED, and must be PROTECTED or SYNCED or BACKUP to be read"):
        pool.get_flat_data_page(0)
    with pytest.raises(StateError, match="host page 1 is IDLE"):
        pool.page_buffer(P)
    with pytest.raises(InvalidArgumentError, match="whole pages"):
        pool.get_flat_data_page(1)


# ---- size ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("options", "slots"), [
    ({"ratio": 2.0}, 200), ({"ratio": 0.5}, 48), ({"ratio": 2.0, "num_bytes": 72 * 41}, 40), ({"num_bytes": 72 * 4}, 4),
])  # fmt: skip
def test_sizes_by_ratio_or_bytes_are_whole_pages(options: dict[str, Any], slots: int) -> None:
    assert MHA.token_bytes == 72
    assert host_slots(MHA, 100, **options) == slots


@pytest.mark.parametrize(("options", "match"), [
    ({"ratio": 0.03}, "0.03 times 100 device slots hold 3 tokens of 72 bytes: no page of 4"),
    ({"num_bytes": 287}, "287 bytes hold 3 tokens"), ({}, "0.0 times"), ({"ratio": -1.0}, "-1.0 times 100 device"),
    ({"ratio": float("nan")}, "nan times"), ({"ratio": float("inf")}, "inf times"),
    ({"ratio": 2.0, "num_bytes": -1}, "of -1 bytes"),
])  # fmt: skip
def test_less_than_a_page_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidArgumentError, match=match):
        host_slots(MHA, 100, **options)


@pytest.mark.parametrize("host_size", [-5, float("nan"), float("inf")])
def test_a_size_that_is_none_is_refused(host_size: float) -> None:
    """Not taken for "by ratio"."""
    device = MHATokenToKVPool(S, P, "fp16", H, D // 2, L, library="numpy")
    with pytest.raises(InvalidArgumentError, match=f"a host pool of {host_size} GB"):
        MHATokenToKVPoolHost(device, 2.0, host_size, P, "page_first", config=PLAIN)


def small_machine(root: Path, free_kb: int) -> HostPoolConfig:
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text(f"MemAvailable: {free_kb} kB\n")
    return HostPoolConfig(arena=ArenaConfig(huge_pages="none"), headroom_bytes=1000, root=root)


def test_a_pool_that_would_take_the_headroom_is_refused_before_anything_is_mapped(tmp_path: Path) -> None:
    config = small_machine(tmp_path, 2)  # 2,048 bytes; the pool has 1,440
    kernel = SimpleNamespace(map=lambda *_: pytest.fail("mapped"))
    with pytest.raises(HostMemoryError, match="headroom"):
        pool_of(MHA, config=config, kernel=kernel)


def test_a_pool_that_just_fits_is_made(tmp_path: Path) -> None:
    assert pool_of(MHA, config=small_machine(tmp_path, 3)).available_size() == S


def test_a_pool_that_fits_into_reserved_huge_pages_only_takes_nothing_else(tmp_path: Path) -> None:
    config = small_machine(tmp_path, 1)
    (tmp_path / "proc/meminfo").write_text("MemAvailable: 1 kB\nHugePages_Free: 1\nHugepagesize: 2048 kB\n")
    with pytest.raises(HostMemoryError, match="headroom_bytes"):
        pool_of(MHA, config=config)  # told to take plain pages
    asked = []

    class NoHugePages(Kernel):
        def map(self, num_bytes: int, flags: int) -> Any:
            asked.append(flags)
            raise OSError(12, "Cannot allocate memory")

    with pytest.raises(HostMemoryError, match="hugetlb: Cannot allocate memory"):
        pool_of(MHA, config=HostPoolConfig(headroom_bytes=1000, root=tmp_path), kernel=NoHugePages())
    assert asked == [0x40000]


@pytest.mark.parametrize(("num_slots", "layout", "match"), [
    (0, "layer_first", "0 slots"), (6, "layer_first", "6 slots"), (8, "heads_first", "unknown layout"),
])  # fmt: skip
def test_wrong_shapes(num_slots: int, layout: Any, match: str) -> None:
    with pytest.raises(InvalidArgumentError, match=match):
        HostKVCache(MHA, num_slots, layout, config=PLAIN)
    with pytest.raises(InvalidArgumentError, match="0 host pages"):
        HostSlots(0, 4)


# ---- beside a device pool --------------------------------------------------------------------------------------------
def test_the_host_pool_of_a_device_pool() -> None:
    device = MHATokenToKVPool(S, P, "fp16", H, 3, L, start_layer=4, library="numpy")
    pool = MHATokenToKVPoolHost(device, 2.0, 0, P, "page_head", config=PLAIN)
    assert (pool.size, pool.layer_num, pool.head_num, pool.head_dim) == (2 * S, L, H, 3)
    assert pool.geometry == device.geometry
    assert (pool.start_layer, pool.end_layer, pool.pinned, pool.device_pool) == (4, 6, False, device)
    assert isinstance(pool.alloc(P), np.ndarray)
    by_bytes = MHATokenToKVPoolHost(device, 2.0, 1e-5, P, "layer_first", config=PLAIN)
    assert by_bytes.size == 10_000 // 72 // P * P


def test_tensors_beside_a_torch_pool() -> None:
    torch = pytest.importorskip("torch")
    device = MLATokenToKVPool(S, P, torch.bfloat16, 4, 1, L)
    pool = MLATokenToKVPoolHost(device, 1.0, 0, P, "page_first_direct", config=PLAIN)
    slots = pool.alloc(2 * P)
    assert (slots.dtype, slots.tolist()) == (torch.int64, list(range(2 * P)))
    assert (pool.dtype, pool.head_dim) == (torch.bfloat16, 5)
    assert pool.free(slots) == 2 * P


def test_other_pools_are_refused_as_value_errors() -> None:
    mla = MLATokenToKVPool(S, P, "fp16", 4, 1, L, library="numpy")
    with pytest.raises(InvalidArgumentError, match="kind mla for MHATokenToKVPoolHost"):
        MHATokenToKVPoolHost(mla, 2.0, 0, P, "layer_first", config=PLAIN)
    with pytest.raises(InvalidArgumentError, match="device 'cuda'"):
        MLATokenToKVPoolHost(mla, 2.0, 0, P, "layer_first", device="cuda", config=PLAIN)
    with pytest.raises(UnsupportedLayoutError):
        MLATokenToKVPoolHost(object(), 2.0, 0, P, "layer_first", config=PLAIN)


def test_memory_is_locked_when_there_is_something_to_lock_it_with() -> None:
    device = MLATokenToKVPool(S, P, "fp16", 4, 1, L, library="numpy")
    registrar = FakeRegistrar()
    config = HostPoolConfig(arena=PLAIN.arena, headroom_bytes=0, registrar=registrar)
    pool = MLATokenToKVPoolHost(device, 1.0, 0, P, "layer_first", config=config)
    assert pool.pinned
    assert sum(registrar.locked.values()) >= S * pool.size_per_token
    pool.close()
    assert not registrar.locked
    assert not MLATokenToKVPoolHost(device, 1.0, 0, P, "layer_first", False, config=config).pinned


def test_a_pool_on_a_gpu_asks_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    interface = {"shape": (S, 1, 5), "typestr": "<f2", "data": (4096, False)}
    device = SimpleNamespace(
        kv_buffer=[SimpleNamespace(__cuda_array_interface__=interface, device=SimpleNamespace(id=0))], size=S - P
    )
    registrar = FakeRegistrar()
    monkeypatch.setattr(host, "cuda_registrar", lambda: registrar)
    asked = []
    monkeypatch.setattr(host, "numa_node_of", lambda device, root: asked.append(device) or 0)
    pool = MLATokenToKVPoolHost(device, 1.0, 0, P, "layer_first", config=PLAIN)
    assert (pool.pinned, pool.size) == (True, S - P)
    assert (asked, pool.arena.config.numa_node) == (["cuda:0"], 0)

    def missing() -> Any:
        raise DeviceUnavailableError("page-locking needs CUDA")

    monkeypatch.setattr(host, "cuda_registrar", missing)
    with pytest.raises(DeviceUnavailableError):
        MLATokenToKVPoolHost(device, 1.0, 0, P, "layer_first", config=PLAIN)


def test_the_view_of_a_locked_pool_says_where_its_chunks_meet() -> None:
    geometry = KVGeometry(kind="mla", num_layers=2, num_heads=1, head_bytes=1000, page_size=P)
    config = HostPoolConfig(arena=PLAIN.arena, headroom_bytes=0, pin_chunk_bytes=4096)
    pool = pool_of(geometry, registrar=FakeRegistrar(), config=config)
    count = len(pool.arena.registered)
    assert count > 2
    assert pool.view().boundaries == tuple(pool.arena.address + 4096 * i for i in range(1, count))
    assert pool_of(geometry, registrar=FakeRegistrar()).view().boundaries == ()
    assert pool_of(geometry).view().boundaries == ()


def test_a_pool_that_cannot_be_locked_is_not_made_and_leaves_nothing_locked() -> None:
    registrar = FakeRegistrar(fail=True)
    config = HostPoolConfig(arena=PLAIN.arena, headroom_bytes=0, pin_chunk_bytes=4096)
    geometry = KVGeometry(kind="mla", num_layers=2, num_heads=1, head_bytes=1000, page_size=P)
    maps = []

    class Recorder(Kernel):
        def map(self, num_bytes: int, flags: int) -> Any:
            maps.append(super().map(num_bytes, flags))
            return maps[-1]

    with pytest.raises(PageLockError, match="1 before it unlocked"):
        pool_of(geometry, registrar=registrar, config=config, kernel=Recorder())
    assert not registrar.locked
    assert [mapping.closed for mapping in maps] == [True]


def test_close() -> None:
    pool = pool_of(MHA)
    kept = pool.kv_buffer[0, 1]
    with pytest.raises(StateError, match="drop every view"):
        pool.close()
    del kept
    pool.close()
    pool.close()
    assert pool.arena.closed
    for use in (lambda: pool.kv_buffer, pool.view):
        with pytest.raises(StateError, match="closed"):
            use()


def test_a_pool_with_copies_in_flight_is_not_closed() -> None:
    """They would write to memory that is gone."""
    pool = pool_of(MHA)
    slots = pool.alloc(2 * P)
    pool.protect_write(slots)
    with pytest.raises(StateError, match="2 pages have a copy in flight, the first is 0"):
        pool.close()
    pool.complete_io(slots)
    assert pool.get_flat_data_pages(slots).shape == (2, MHA.page_bytes), "nothing has changed"
    pool.close()


# ---- slots and states ------------------------------------------------------------------------------------------------
def test_alloc_and_free() -> None:
    slots = HostSlots(PAGES, P)
    first = slots.alloc(2 * P)
    assert (first.dtype, first.tolist()) == (np.int64, list(range(2 * P)))
    assert slots.available_size() == S - 2 * P
    assert slots.alloc(S) is None
    assert slots.alloc(0).size == 0
    assert slots.free(first[P:]) == P
    assert slots.free([]) == 0
    assert slots.available_size() == S - P
    slots.check_integrity()
    slots.clear()
    assert slots.available_size() == slots.size == S
    for need in (-P, 3):
        with pytest.raises(InvalidArgumentError, match="whole pages"):
            slots.alloc(need)


@pytest.mark.parametrize(("indices", "error", "match"), [
    ([0, 1, 2], InvalidArgumentError, "3 slots are no whole pages"),
    ([0, 1, 3, 2], InvalidArgumentError, "ascending"), ([1, 2, 3, 4], InvalidArgumentError, "whole pages"),
    ([20, 21, 22, 23], PageOwnershipError, "host page 5 is not of this pool of 5"),
    ([-4, -3, -2, -1], PageOwnershipError, "host page -1"),
    ([8, 9, 10, 11], PageOwnershipError, "page 2 is freed twice"),
    ([0, 1, 2, 3, 0, 1, 2, 3], PageOwnershipError, "page 0 is given twice"),
    ([0.0, 1.0, 2.0, 3.0], ArgumentTypeError, "1-d array of integers"), ([[0, 1, 2, 3]], ArgumentTypeError, "2-d"),
])  # fmt: skip
def test_wrong_frees_change_nothing(indices: Any, error: type[Exception], match: str) -> None:
    slots = HostSlots(PAGES, P)
    slots.alloc(2 * P)
    with pytest.raises(error, match=match):
        slots.free(indices)
    assert slots.available_size() == S - 2 * P
    slots.check_integrity()


def test_the_life_of_a_page() -> None:
    slots = HostSlots(PAGES, P)
    page = slots.alloc(P)
    assert slots.is_reserved(page)
    slots.protect_write(page)
    assert slots.is_protected(page)
    with pytest.raises(StateError, match="host page 0 is freed while a copy is in flight"):
        slots.free(page)
    slots.complete_io(page)
    assert slots.is_synced(page)
    slots.update_backup(page)
    assert slots.is_backup(page)
    slots.protect_load(page)
    slots.abort_io(page, BACKUP)
    slots.update_synced(page)
    assert slots.get_state(page) is SYNCED
    slots.free(page)
    other = slots.alloc(P)
    slots.update_prefetch(other)
    assert slots.is_backup(other)


ALLOWED = {
    "protect_write": ({RESERVED}, PROTECTED), "protect_load": ({BACKUP}, PROTECTED),
    "complete_io": ({PROTECTED}, SYNCED),
    "update_backup": ({SYNCED}, BACKUP), "update_prefetch": ({RESERVED}, BACKUP),
    "update_synced": ({RESERVED, SYNCED, BACKUP}, SYNCED),
}  # fmt: skip


@pytest.mark.parametrize("name", ALLOWED)
@pytest.mark.parametrize("state", MemoryStateInt)
def test_every_transition_from_every_state(name: str, state: MemoryStateInt) -> None:
    slots = HostSlots(PAGES, P)
    pages = slots.alloc(2 * P)
    slots._state[0] = state
    slots._state[1] = min(ALLOWED[name][0])
    before = slots._state.copy()
    if state in ALLOWED[name][0]:
        getattr(slots, name)(pages)
        assert slots.get_state(pages) is ALLOWED[name][1]
    else:
        with pytest.raises(StateError, match=f"host page 0 is {state.name}, and must be"):
            getattr(slots, name)(pages)
        assert np.array_equal(slots._state, before)


def test_states_of_several_pages_and_of_none() -> None:
    slots = HostSlots(PAGES, P)
    pages = slots.alloc(2 * P)
    slots.protect_write(pages[P:])
    with pytest.raises(StateError, match="host page 0 is RESERVED, and page 1 is PROTECTED"):
        slots.get_state(pages)
    with pytest.raises(InvalidArgumentError, match="no pages"):
        slots.get_state([])
    with pytest.raises(InvalidArgumentError, match="leaves RESERVED or BACKUP"):
        slots.abort_io(pages[P:], SYNCED)
    slots.abort_io(pages[P:], RESERVED)
    assert slots.is_reserved(pages)


def test_check_integrity_finds_a_state_without_its_page() -> None:
    for page, state, match in ((0, IDLE, "page 0 is allocated and IDLE"), (3, BACKUP, "page 3 is free and BACKUP")):
        slots = HostSlots(PAGES, P)
        slots.alloc(2 * P)
        slots._state[page] = state
        with pytest.raises(IntegrityError, match=match):
            slots.check_integrity()


def test_threads_share_the_pages() -> None:
    slots = HostSlots(64, P)
    start, taken = threading.Barrier(4), []

    def work() -> None:
        start.wait()
        for _ in range(200):
            mine = slots.alloc(4 * P)
            slots.protect_write(mine)
            slots.complete_io(mine)
            slots.free(mine)
        taken.append(slots.alloc(16 * P))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(np.concatenate(taken).tolist()) == list(range(64 * P))
    slots.check_integrity()


class Model(RuleBasedStateMachine):
    """Against a dict of page -> state."""

    @initialize(page_size=st.sampled_from([1, 3, 4]))
    def begin(self, page_size: int) -> None:
        self.slots = HostSlots(8, page_size)
        self.page_size = page_size
        self.states: dict[int, MemoryStateInt] = {}

    def of(self, pages: list[int]) -> np.ndarray[Any, Any]:
        return (np.array(pages, np.int64)[:, None] * self.page_size + np.arange(self.page_size)).reshape(-1)

    @rule(pages=st.integers(0, 5))
    def alloc(self, pages: int) -> None:
        slots = self.slots.alloc(pages * self.page_size)
        if pages > 8 - len(self.states):
            assert slots is None
            return
        new = (slots[:: self.page_size] // self.page_size).tolist()
        assert len(set(new)) == pages
        assert not set(new) & set(self.states)
        self.states |= dict.fromkeys(new, RESERVED)

    @rule(data=st.data(), name=st.sampled_from(["free", *ALLOWED]))
    def change(self, data: st.DataObject, name: str) -> None:
        pages = data.draw(st.lists(st.integers(0, 7), unique=True, max_size=4))
        allowed, to = ALLOWED.get(name, ({RESERVED, SYNCED, BACKUP}, IDLE))
        if {self.states.get(page, IDLE) for page in pages} <= allowed:
            getattr(self.slots, name)(self.of(pages))
            for page in pages:
                self.states[page] = to
                if to is IDLE:
                    del self.states[page]
        else:
            with pytest.raises((StateError, PageOwnershipError)):
                getattr(self.slots, name)(self.of(pages))

    @precondition(lambda self: self.states)
    @rule()
    def clear(self) -> None:
        self.slots.clear()
        self.states = {}

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "slots"):
            for page in range(8):
                assert self.slots.get_state(self.of([page])) is self.states.get(page, IDLE)
            self.slots.check_integrity()


Model.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestModel = Model.TestCase
