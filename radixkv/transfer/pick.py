"""The one place that picks a path for a pool: ``transfer_for``.

device of the pool   $RADIXKV_TRANSFER        path
cpu                  any                      CpuTransfer
cuda:N               unset, auto              GpuTransfer, kernel or engine a copy, as measured
cuda:N               kernel, engine           GpuTransfer, always that one
"""

from __future__ import annotations

import logging
import os
from typing import Any, Literal, TypeAlias, get_args

from ..errors import DeviceUnavailableError, InvalidArgumentError
from ..pool.arrays import parse_device
from ..pool.layout import KVGeometry
from .base import Transfer
from .choose import ENVIRONMENT
from .gpu import GpuTransfer
from .launch import DEFAULT_CTAS, LOCAL_CTAS

__all__ = ["Wanted", "transfer_for"]

Wanted: TypeAlias = Literal["auto", "kernel", "engine"]
_log = logging.getLogger("radixkv.transfer")


def transfer_for(
    geometry: KVGeometry,
    device: Any,
    *,
    stream: int = 0,
    ctas: int = DEFAULT_CTAS,
    local_ctas: int = LOCAL_CTAS,
    path: Wanted | None = None,
    tune: bool = False,
    num_threads: int | None = None,
) -> Transfer:
    """Make the transfer of a pool.

    Args:
        geometry: of the pool and of whatever it exchanges pages with.
        device: the device pool's: "cpu", "cuda", "cuda:N", or a torch.device.
        stream, ctas, local_ctas: of a GpuTransfer; see there.
        path: None: $RADIXKV_TRANSFER, else "auto".
        tune: where there is no measurement of this device yet, measure now, and keep it on disk: takes seconds, and
            768 MiB of memory for a while. Without it, and without a measurement, published figures decide.
        num_threads: of a CpuTransfer.
    Raises: InvalidArgumentError for a device or path that there is not; DeviceUnavailableError that says what is
        missing for a GPU, and what to do.
    """
    wanted = _wanted(path)
    name = parse_device(device)
    if name == "cpu":
        from .cpu import CpuTransfer

        return CpuTransfer(geometry, num_threads)
    try:
        number = int(name.removeprefix("cuda:"))
        transfer = GpuTransfer(geometry, number, stream=stream, ctas=ctas, local_ctas=local_ctas)
    except DeviceUnavailableError as error:
        raise DeviceUnavailableError(f"no copies for the pool on {name}: {error}") from error
    transfer.chooser.override = None if wanted == "auto" else wanted
    if tune and wanted == "auto":
        measured = transfer.tune()
        _log.info("transfer_tuned=%s device=%r path=%s", measured, transfer.chooser.device, transfer.chooser.path)
    return transfer


def _wanted(path: str | None) -> Wanted:
    given, source = (path, "path") if path is not None else (os.environ.get(ENVIRONMENT) or "auto", f"${ENVIRONMENT}")
    for name in get_args(Wanted):
        if given == name:
            return name  # type: ignore[no-any-return]
    raise InvalidArgumentError(f"{source} is {given!r}; one of {', '.join(get_args(Wanted))}")
