"""L3: the controller, and the movers, storage workers and groups that it is put together with."""

from __future__ import annotations

from .agree import LocalGroup, TorchGroup
from .base import (
    Attribution,
    ControllerStats,
    DevicePages,
    Finished,
    Group,
    LayerProgress,
    Listener,
    Load,
    Mover,
    Polled,
    PrefetchStatus,
    Ticket,
)
from .config import STORED, STORING, WRITING, ControllerConfig
from .controller import Controller
from .in_flight import InFlight, LoadInFlight, PrefetchInFlight
from .layers import LayerCounter
from .mover_cpu import CpuMover
from .mover_cuda import CudaMover

__all__ = [
    "STORED",
    "STORING",
    "WRITING",
    "Attribution",
    "Controller",
    "ControllerConfig",
    "ControllerStats",
    "CpuMover",
    "CudaMover",
    "DevicePages",
    "Finished",
    "Group",
    "InFlight",
    "LayerCounter",
    "LayerProgress",
    "Listener",
    "Load",
    "LoadInFlight",
    "LocalGroup",
    "Mover",
    "Polled",
    "PrefetchInFlight",
    "PrefetchStatus",
    "Ticket",
    "TorchGroup",
]
