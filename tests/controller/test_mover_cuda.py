"""The mover for GPUs, on streams that only write down what is asked of them. On a GPU: tests/kernels/on_gpu.py."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from radixkv.controller import CudaMover
from radixkv.controller.mover_cuda import CudaProgress, CupyStreams, current_stream
from radixkv.errors import DeviceUnavailableError, TransferError
from radixkv.pool.layout import KVView
from radixkv.transfer.plan import CopyPlan, staging_view

from .kit import GEOMETRY

COMPUTE, WRITE, LOAD = 7, 100, 101


class FakeStreams:
    """A log. ``broken``: events fail."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.made = 0
        self.broken = False

    def new(self) -> int:
        self.made += 1
        return WRITE - 1 + self.made

    def record(self, stream: int) -> Any:
        event = f"e{len(self.log)} of {stream}"
        self.log.append(("record", stream, event))
        return event

    def wait(self, stream: int, event: Any) -> None:
        self.log.append(("wait", stream, event))

    def finish(self, event: Any) -> None:
        if self.broken:
            raise TransferError("an illegal address")
        self.log.append(("finish", event))


class FakeCopies:
    def __init__(self, log: list[tuple[Any, ...]]) -> None:
        self.log = log
        self.gate = threading.Event()
        self.gate.set()

    def copy(self, plan: CopyPlan, stream: int) -> None:
        self.log.append(("copy", stream, plan.src_pages.tolist(), plan.dst_pages.tolist()))

    def copy_layers(self, plan: CopyPlan, stream: int, after_layer: Callable[[int], None]) -> None:
        for layer in plan.layers:
            self.log.append(("copy layer", stream, layer))
            after_layer(layer)
            assert self.gate.wait(30)


def views() -> tuple[KVView, KVView]:
    memory = np.zeros((2, 8, GEOMETRY.page_bytes), np.uint8)
    device = staging_view(GEOMETRY, memory[0].ctypes.data, 8, "cuda:0")
    return device, staging_view(GEOMETRY, memory[1].ctypes.data, 8)


def make() -> tuple[CudaMover, FakeStreams, FakeCopies]:
    streams = FakeStreams()
    copies = FakeCopies(streams.log)
    return CudaMover(GEOMETRY, *views(), lambda: COMPUTE, streams=streams, copies=copies), streams, copies


def ids(*pages: int) -> Any:
    return np.array(pages, np.int32)


def test_a_backup_waits_for_what_computes() -> None:
    mover, streams, _ = make()
    ticket = mover.backup(ids(1, 2), ids(3, 4))
    assert ticket.wait(30)
    assert ticket.error is None
    computed, written = "e0 of 7", "e3 of 100"
    assert streams.log == [
        ("record", COMPUTE, computed), ("wait", WRITE, computed), ("copy", WRITE, [1, 2], [3, 4]),
        ("record", WRITE, written), ("finish", written),
    ]  # fmt: skip
    mover.close()


def test_each_layer_that_computes_waits_for_its_load() -> None:
    mover, streams, copies = make()
    copies.gate.clear()
    progress = mover.new_progress()
    ticket = mover.load(ids(3), ids(1), progress)
    assert progress.wait(0, 30.0)  # layer 0 is on the load stream
    assert not progress.wait(1, 0.0)  # layer 1 is not: the compute stream must not go on
    assert streams.log[-1] == ("wait", COMPUTE, progress.events[0])
    copies.gate.set()
    assert progress.wait(1, 30.0)
    assert ("wait", COMPUTE, progress.events[1]) in streams.log
    assert ticket.wait(30)
    assert streams.log[:2] == [("record", COMPUTE, "e0 of 7"), ("wait", LOAD, "e0 of 7")]
    mover.close()


def test_a_load_that_fails_wakes_who_waits() -> None:
    mover, streams, _ = make()
    streams.broken = True
    progress = mover.new_progress()

    def refuse(*_: Any) -> None:
        raise TransferError("no kernel")

    mover._copies = SimpleNamespace(copy_layers=refuse, copy=lambda plan, stream: None)
    ticket = mover.load(ids(3), ids(1), progress)
    with pytest.raises(TransferError):
        progress.wait(1, 30.0)
    assert ticket.wait(30)
    assert str(ticket.error) == "no kernel"
    assert progress.error is ticket.error
    failed = mover.backup(ids(1), ids(1))
    assert failed.wait(30)
    assert "illegal address" in str(failed.error)
    mover.close()


def test_a_cancelled_load_wakes_who_waits() -> None:
    streams = FakeStreams()
    progress = CudaProgress(2, streams, lambda: COMPUTE)
    progress.fail(TransferError("cancelled"))
    with pytest.raises(TransferError):
        progress.wait(0)


def test_it_needs_a_gpu_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    _, host = views()
    with pytest.raises(DeviceUnavailableError, match="the device pool is on cpu"):
        CudaMover(GEOMETRY, host, host)
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceUnavailableError, match="CuPy"):
        CudaMover(GEOMETRY, *views())


class FakeCupy:
    """Just enough of CuPy's streams and events."""

    class CUDARuntimeError(RuntimeError):
        pass

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.devices: list[int] = []
        self.cuda = SimpleNamespace(
            Device=self._device, Stream=self._stream, ExternalStream=lambda ptr, device: SimpleNamespace(
                ptr=ptr, wait_event=lambda event: self.log.append(("wait", ptr, event))
            ),
            Event=self._event, runtime=SimpleNamespace(CUDARuntimeError=self.CUDARuntimeError),
            get_current_stream=lambda: SimpleNamespace(ptr=55),
        )  # fmt: skip

    def _device(self, number: int) -> Any:
        import contextlib

        self.devices.append(number)
        return contextlib.nullcontext()

    def _stream(self, non_blocking: bool) -> Any:
        assert non_blocking
        return SimpleNamespace(ptr=40 + len(self.log))

    def _event(self, disable_timing: bool) -> Any:
        def fail() -> None:
            raise self.CUDARuntimeError("an illegal address")

        return SimpleNamespace(record=lambda stream: self.log.append(("record", stream.ptr)), synchronize=fail)


def test_streams_by_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    streams = CupyStreams(3)
    stream = streams.new()
    event = streams.record(stream)
    streams.wait(9, event)
    assert cupy.log == [("record", stream), ("wait", 9, event)]
    assert set(cupy.devices) == {3}
    with pytest.raises(TransferError, match="cuda:3 failed: an illegal address"):
        streams.finish(event)


def test_the_current_stream_is_torchs_or_cupys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", FakeCupy())
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert current_stream(0) == 55
    cuda = SimpleNamespace(current_stream=lambda device: SimpleNamespace(cuda_stream=66 + device))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert current_stream(1) == 67
