"""The mover for GPUs, on streams that only write down what is asked of them. On a GPU: test_on_gpu.py."""

from __future__ import annotations

import contextlib
import sys
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from radixkv.controller import CudaMover, mover_cuda
from radixkv.controller.mover_cuda import CupyStreams, GpuTransfers, current_stream
from radixkv.errors import DeviceUnavailableError, TransferError
from radixkv.pool.layout import KVView
from radixkv.transfer.cpu import Progress
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


class FakeProgress:
    """A CudaProgress whose events are those of FakeStreams."""

    def __init__(self, streams: FakeStreams) -> None:
        self.streams, self.issued = streams, Progress(GEOMETRY.num_layers)
        self.events: list[Any] = []
        self.fail = self.issued.fail

    @property
    def error(self) -> BaseException | None:
        return self.issued.error

    def record(self, stream: int) -> None:
        self.events.append(self.streams.record(stream))
        self.issued.advance(len(self.events))

    def wait_on_stream(self, layer: int, stream: int, timeout_s: float | None = None) -> bool:
        if not self.issued.wait(layer, timeout_s):
            return False
        self.streams.wait(stream, self.events[layer])
        return True


class FakeTransfer:
    """Copies on one stream, in the log. ``gate``: it stops after each layer."""

    def __init__(self, streams: FakeStreams, stream: int) -> None:
        self.streams, self.stream, self.log = streams, stream, streams.log
        self.gate = threading.Event()
        self.gate.set()

    def copy(self, plan: CopyPlan) -> None:
        self.log.append(("copy", self.stream, plan.src_pages.tolist(), plan.dst_pages.tolist()))

    def load_back(self, host: Any, device: Any, host_pages: Any, device_pages: Any, progress: FakeProgress) -> None:
        progress.issued.begin(GEOMETRY.num_layers)
        for layer in range(GEOMETRY.num_layers):
            self.log.append(("copy layer", self.stream, layer))
            progress.record(self.stream)
            assert self.gate.wait(30)

    def make_progress(self) -> FakeProgress:
        return FakeProgress(self.streams)


def views() -> tuple[KVView, KVView]:
    memory = np.zeros((2, 8, GEOMETRY.page_bytes), np.uint8)
    device = staging_view(GEOMETRY, memory[0].ctypes.data, 8, "cuda:0")
    return device, staging_view(GEOMETRY, memory[1].ctypes.data, 8)


def make() -> tuple[CudaMover, FakeStreams, FakeTransfer]:
    """A mover, its streams, and what loads."""
    streams = FakeStreams()
    transfers: list[FakeTransfer] = []

    def transfer_on(stream: int) -> FakeTransfer:
        transfers.append(FakeTransfer(streams, stream))
        return transfers[-1]

    mover = CudaMover(GEOMETRY, *views(), lambda: COMPUTE, streams=streams, transfer_on=transfer_on)
    return mover, streams, transfers[1]


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
    mover, streams, loader = make()
    loader.gate.clear()
    progress = mover.new_progress()
    ticket = mover.load(ids(3), ids(1), progress)
    assert progress.wait(0, 30.0)  # layer 0 is on the load stream
    assert not progress.wait(1, 0.0)  # layer 1 is not: the compute stream must not go on
    assert streams.log[-1] == ("wait", COMPUTE, progress.events.events[0])
    loader.gate.set()
    assert progress.wait(1, 30.0)
    assert ("wait", COMPUTE, progress.events.events[1]) in streams.log
    assert ticket.wait(30)
    assert streams.log[:2] == [("record", COMPUTE, "e0 of 7"), ("wait", LOAD, "e0 of 7")]
    mover.close()


def test_a_load_that_fails_wakes_who_waits() -> None:
    mover, streams, loader = make()
    streams.broken = True
    progress = mover.new_progress()

    def refuse(*_: Any) -> None:
        raise TransferError("no kernel")

    loader.load_back = refuse  # type: ignore[method-assign]
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


@pytest.mark.parametrize("kind", ["load", "backup"])
def test_a_copy_that_fails_half_way_has_ended_when_its_ticket_says_so(kind: str) -> None:
    """Its pages are free then: what is on the stream already would write them under their next owner."""
    mover, streams, loader = make()
    copier = loader if kind == "load" else mover._writer

    def half(*_: Any) -> None:
        streams.log.append(("copy layer", copier.stream, 0))
        raise TransferError("layer 1 has no kernel")

    copier.load_back = copier.copy = half  # type: ignore[method-assign,union-attr]
    ticket = mover.load(ids(3), ids(1), mover.new_progress()) if kind == "load" else mover.backup(ids(1), ids(3))
    assert ticket.wait(30)
    assert str(ticket.error) == "layer 1 has no kernel"
    begun, recorded, finished = streams.log[-3:]
    assert begun == ("copy layer", copier.stream, 0)
    assert (recorded[:2], finished) == (("record", copier.stream), ("finish", recorded[2]))
    mover.close()


def test_a_cancelled_load_wakes_who_waits() -> None:
    mover, _, _ = make()
    progress = mover.new_progress()
    progress.fail(TransferError("cancelled"))
    with pytest.raises(TransferError):
        progress.wait(0)


def test_both_streams_share_what_was_compiled_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    def transfer(geometry: Any, device: int, **options: Any) -> Any:
        made.append(options)
        return SimpleNamespace(paths={"kernel": "k", "engine": "e"}, chooser="c")

    monkeypatch.setattr(mover_cuda, "GpuTransfer", transfer)
    transfers = GpuTransfers(GEOMETRY, 0)
    transfers.on(1)
    transfers.on(2)
    assert made == [
        {"stream": 1, "chooser": None}, {"stream": 2, "kernels": "k", "engine": "e", "chooser": "c"}
    ]  # fmt: skip
    monkeypatch.setattr(mover_cuda, "device_key", lambda device: f"GPU {device}")
    GpuTransfers(GEOMETRY, 0, "engine").on(3)
    assert made[-1]["chooser"].choose("device_to_host", 1 << 20, 1) == "engine"


def test_it_needs_a_gpu_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    _, host = views()
    with pytest.raises(DeviceUnavailableError, match="the device pool is on cpu"):
        CudaMover(GEOMETRY, host, host)
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceUnavailableError, match="CuPy"):
        CudaMover(GEOMETRY, *views())


class Broken(RuntimeError):
    pass


def fake_cupy(log: list[Any]) -> Any:
    """Just enough of CuPy's streams and events, which fail when they are waited for."""

    def refuse(*_: Any) -> None:
        raise Broken("an illegal address")

    runtime = SimpleNamespace(
        CUDARuntimeError=Broken, eventSynchronize=refuse,
        eventRecord=lambda event, stream: log.append(("record", event, stream)),
        streamWaitEvent=lambda stream, event: log.append(("wait", stream, event)),
    )  # fmt: skip
    cuda = SimpleNamespace(
        runtime=runtime, Device=lambda number: contextlib.nullcontext(log.append(("device", number))),
        Stream=lambda non_blocking: SimpleNamespace(ptr=40), Event=lambda disable_timing: SimpleNamespace(ptr=50),
        get_current_stream=lambda: SimpleNamespace(ptr=55),
    )  # fmt: skip
    return SimpleNamespace(cuda=cuda)


def test_streams_by_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []
    cupy = fake_cupy(log)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    streams = CupyStreams(3)
    stream = streams.new()
    event = streams.record(stream)
    streams.wait(9, event)
    assert log == [("device", 3), ("device", 3), ("record", 50, 40), ("wait", 9, 50)]
    with pytest.raises(TransferError, match="cuda:3 failed: an illegal address"):
        streams.finish(event)
    cupy.cuda.runtime.eventRecord = cupy.cuda.runtime.eventSynchronize
    with pytest.raises(TransferError, match="no event"):
        streams.record(stream)


def test_the_current_stream_is_torchs_or_cupys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy([]))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert current_stream(0) == 55
    cuda = SimpleNamespace(current_stream=lambda device: SimpleNamespace(cuda_stream=66 + device))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert current_stream(1) == 67
