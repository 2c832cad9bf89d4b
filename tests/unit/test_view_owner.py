"""Views, plans and routes keep the memory that they are over: alive, and open while a copy runs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from radixkv.errors import StateError
from radixkv.pool.arena import Arena, ArenaConfig
from radixkv.pool.device import MHATokenToKVPool, MLATokenToKVPool
from radixkv.pool.foreign import view_of_tensors
from radixkv.pool.host import HostKVCache, HostPoolConfig
from radixkv.pool.layout import KVGeometry, view_of_layout
from radixkv.transfer.base import PlannedRoute
from radixkv.transfer.cpu import CpuTransfer, Progress
from radixkv.transfer.plan import plan_copy, staging_view

GEOMETRY = KVGeometry(kind="mha", num_layers=2, num_heads=2, head_bytes=64, page_size=4)
CONFIG = HostPoolConfig(headroom_bytes=0, arena=ArenaConfig(huge_pages="none"))
IDS = np.array([3, 0]), np.array([1, 2])


def host_pool() -> HostKVCache:
    return HostKVCache(GEOMETRY, 64, "page_first", config=CONFIG)


def device_pool(library: Any = "numpy") -> MHATokenToKVPool:
    return MHATokenToKVPool(64, 4, "float32", 2, 16, 2, library=library)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_view_keeps_the_buffers_of_a_device_pool(library: Any) -> None:
    if library == "torch":
        pytest.importorskip("torch", reason="no torch")
    pool, host = device_pool(library), host_pool()
    pool.k_buffer[0][12:16] = 7
    route = CpuTransfer(GEOMETRY, 1).route(pool.view(), host.view())
    plan = plan_copy(GEOMETRY, pool.view(), host.view(), *IDS)
    gone = weakref.ref(pool.k_buffer[0])
    del pool
    gc.collect()
    assert gone() is not None, "the route reads it"
    route.copy(*IDS)
    assert (host.k_buffer[1, :, 0].view(np.float32) == 7).all()
    del route
    assert gone() is not None, "the plan reads it"
    CpuTransfer(GEOMETRY, 1).copy(plan)
    del plan
    gc.collect()
    assert gone() is None, "nothing else keeps it"


def test_an_engines_tensors_and_a_staging_buffer_are_kept() -> None:
    buffers = [np.zeros((8, 1, 16), np.float32) for _ in range(3)]
    gone = [weakref.ref(buffer) for buffer in buffers]
    view = view_of_tensors(buffers, kind="mla", page_size=4).view
    del buffers
    assert all(ref() is not None for ref in gone)
    del view
    assert all(ref() is None for ref in gone)
    buffer = np.zeros((2, GEOMETRY.page_bytes), np.uint8)
    last = weakref.ref(buffer)
    staged = staging_view(GEOMETRY, buffer.ctypes.data, 2, owner=buffer)
    del buffer
    assert last() is not None
    assert "owner" not in repr(staged)


def test_a_view_keeps_the_arena_of_a_host_pool_that_is_dropped() -> None:
    host, device = host_pool(), device_pool()
    host.kv_buffer[:] = 9
    arena = weakref.ref(host.arena)
    route = CpuTransfer(GEOMETRY, 1).route(host.view(), device.view())
    del host
    gc.collect()
    assert arena() is not None
    route.copy(*IDS)
    assert (device.k_buffer[0][4:8].view(np.uint8) == 9).all()
    del route
    gc.collect()
    assert arena() is None


def test_what_is_over_a_closed_pool_refuses_to_copy() -> None:
    host, device = host_pool(), device_pool()
    transfer = CpuTransfer(GEOMETRY, 1)
    up, down = transfer.route(host.view(), device.view()), transfer.route(device.view(), host.view())
    planned = PlannedRoute(transfer, device.view(), host.view(), None)
    view, plan = host.view(), plan_copy(GEOMETRY, device.view(), host.view(), *IDS)
    up.copy(*IDS)
    host.close()
    progress = Progress(2)
    calls: list[Callable[[], object]] = [
        lambda: up.copy(*IDS), lambda: down.copy(*IDS), lambda: down.copy([3, 0], [1, 2]), lambda: planned.copy(*IDS),
        lambda: up.copy(*IDS, progress), lambda: transfer.copy(plan), lambda: transfer.route(view, device.view()),
        lambda: transfer.backup(device.view(), view, *IDS), host.view,
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(StateError, match="is closed"):
            call()
    assert isinstance(progress.error, StateError), "whoever waits is told"


def test_an_arena_is_not_closed_under_a_copy() -> None:
    """Whoever closes it in the middle of a copy (here: while page ids are read) is told, and may do it later."""
    geometry = KVGeometry(kind="mla", num_layers=1, num_heads=1, head_bytes=64, page_size=1)
    arena = Arena(4096, ArenaConfig(huge_pages="none"))
    target = np.zeros(4096, np.uint8)
    src = view_of_layout("layer_first", geometry, 8, [arena.address], owner=arena)
    dst = view_of_layout("layer_first", geometry, 8, [target.ctypes.data], owner=target)
    tried = []

    class Ids:
        def __array__(self, *_: object, **__: object) -> Any:
            with pytest.raises(StateError, match="the arena is in use"):
                arena.close()
            tried.append(True)
            return np.arange(2)

    for route in (CpuTransfer(geometry, 1).route(src, dst), CpuTransfer(geometry, 1).route(dst, src)):
        route.copy(Ids(), [0, 1])  # type: ignore[arg-type]
    assert len(tried) == 2
    held = src.hold()
    with pytest.raises(StateError, match="the arena is in use"):
        arena.close()
    del held
    arena.close()
    with pytest.raises(StateError, match="the arena is closed"):
        src.hold()


def test_an_arena_that_another_thread_is_closing_is_closed() -> None:
    arena = Arena(4096, ArenaConfig(huge_pages="none"))
    assert arena._map is not None
    arena._map.close()  # between the two steps of close
    with pytest.raises(StateError, match="the arena is closed"):
        arena.hold()


def test_two_views_of_one_shape_have_their_own_owners() -> None:
    pool = MLATokenToKVPool(8, 4, "float32", 12, 4, 1, library="numpy")
    view = pool.view()
    assert view.owner == (pool.kv_buffer[0],) or view.owner[0] is pool.kv_buffer[0]
    assert weakref.ref(view)() is view
