"""How far a load back on a GPU is: one CUDA event a layer, recorded on its stream behind that layer's copy."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable
from typing import Any

from ..errors import DeviceUnavailableError, InvalidArgumentError, StateError, TransferError

__all__ = ["CudaProgress"]

NOT_READY = 600  # cudaErrorNotReady
POLL_S = (20e-6, 1e-3)
"""First and longest pause between two looks at an event, where a wait has a limit."""


class CudaProgress:
    """Tells readers of one load back which layers are in place: the host (``wait``), or a stream (``wait_on_stream``).

    Args:
        num_layers: of the copy that reports here.
        device: number of the GPU.
        compute_stream: gives the stream that the model runs on, a cudaStream_t as a number (for torch:
            ``lambda: torch.cuda.current_stream().cuda_stream``); ``wait_until`` makes that one wait. None: the host.
        timing: keep times, so that ``events`` can be subtracted; else recording is cheaper.
    Attributes:
        events: CuPy events, one a layer.
        error: what ``fail`` was given, or None.
    Thread: one copy in its life reports to it; any number of threads may read, wait and fail it.
    Raises: DeviceUnavailableError without CuPy.
    """

    def __init__(
        self,
        num_layers: int,
        device: int = 0,
        *,
        compute_stream: Callable[[], int] | None = None,
        timing: bool = False,
    ) -> None:
        if num_layers < 1:
            raise InvalidArgumentError(f"progress over {num_layers} layers")
        try:
            cupy: Any = importlib.import_module("cupy")
        except ImportError as error:
            raise DeviceUnavailableError(f"CUDA events need CuPy (radixkv[cuda12] or [cuda13]): {error}") from error
        self.num_layers = num_layers
        self._runtime: Any = cupy.cuda.runtime
        self._compute_stream = compute_stream
        self._device: Any = cupy.cuda.Device(device)
        with self._device:
            self.events: list[Any] = [cupy.cuda.Event(disable_timing=not timing) for _ in range(num_layers)]
        self._changed = threading.Condition()
        self._recorded = 0
        self._done = 0
        self._used = False
        self.error: BaseException | None = None

    # ---- by the copy -------------------------------------------------------------------------------------------------
    def begin(self, num_layers: int) -> None:
        """Take this progress for a copy of ``num_layers``, which then calls ``record`` for each, or ``fail``.

        Raises: StateError if a copy has taken it or it has failed; InvalidArgumentError for another number of layers,
            and it fails with that.
        """
        with self._changed:
            if self._used:
                raise StateError(f"a progress is of one copy, and this one had its own ({self._recorded} layers begun)")
            if num_layers != self.num_layers:
                error = InvalidArgumentError(f"progress over {self.num_layers} layers for a copy of {num_layers}")
                self.fail(error)
                raise error
            self._used = True

    def record(self, stream: int) -> None:
        """The next layer's copy is on the stream, and nothing of a later one. Raises: TransferError."""
        if self._recorded == self.num_layers:
            raise StateError(f"all {self.num_layers} layers have been recorded")
        try:
            with self._device:
                self._runtime.eventRecord(self.events[self._recorded].ptr, stream)
        except self._runtime.CUDARuntimeError as error:
            raise TransferError(f"event behind layer {self._recorded} of {self.num_layers}: {error}") from error
        with self._changed:
            self._recorded += 1
            self._changed.notify_all()

    def fail(self, error: BaseException) -> bool:
        """Say that no further layer will come: who waits for one, now or later, gets a TransferError.

        Layers whose events are recorded still arrive. Returns: whether that is news: False if all are recorded, or it
        has failed already.
        """
        with self._changed:
            if self.error is not None or self._recorded == self.num_layers:
                return False
            self.error, self._used = error, True
            self._changed.notify_all()
            return True

    # ---- by readers --------------------------------------------------------------------------------------------------
    @property
    def layers_done(self) -> int:
        """Layers that are complete: all their bytes are in place. They complete in order."""
        with self._changed:
            while self._done < self._recorded and self._passed(self._done):
                self._done += 1
            return self._done

    def wait(self, layer: int, timeout_s: float | None = None) -> bool:
        """Make the host wait until ``layer`` (counted from the first of the copy) is in place.

        Returns: True; False if it is not after timeout_s seconds (None: no limit).
        Raises: InvalidArgumentError for a layer that the copy does not have; TransferError if the copy has failed.
        """
        limit = None if timeout_s is None else time.monotonic() + max(0.0, timeout_s)
        if not self._wait_recorded(layer, timeout_s):
            return False
        if limit is None:
            self._runtime.eventSynchronize(self.events[layer].ptr)
            return True
        pause = POLL_S[0]
        while not self._passed(layer):
            left = limit - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(pause, left))
            pause = min(2 * pause, POLL_S[1])
        return True

    def wait_on_stream(self, layer: int, stream: int, timeout_s: float | None = None) -> bool:
        """Make a stream wait until ``layer`` is in place; the host waits only until its copy is on its stream.

        Args:
            stream: a cudaStream_t as a number, of the same GPU.
        Returns: True; False if the copy is not on its stream after timeout_s seconds (None: no limit).
        Raises: as ``wait``.
        """
        if not self._wait_recorded(layer, timeout_s):
            return False
        self._runtime.streamWaitEvent(stream, self.events[layer].ptr)
        return True

    def wait_until(self, layer: int) -> None:
        """A device pool's layer_transfer_counter: the stream of ``compute_stream`` waits; without one, the host."""
        if self._compute_stream is None:
            self.wait(layer)
        else:
            self.wait_on_stream(layer, self._compute_stream())

    def _wait_recorded(self, layer: int, timeout_s: float | None) -> bool:
        if not 0 <= layer < self.num_layers:
            raise InvalidArgumentError(f"layer {layer} is not of 0 .. {self.num_layers - 1}")
        with self._changed:
            self._changed.wait_for(lambda: self._recorded > layer or self.error is not None, timeout_s)
            if self._recorded > layer:
                return True
            if self.error is not None:
                found = f"the copy failed after {self._recorded} of {self.num_layers} layers: {self.error!r}"
                raise TransferError(found) from self.error
            return False

    def _passed(self, layer: int) -> bool:
        status = int(self._runtime.eventQuery(self.events[layer].ptr))
        if status not in (0, NOT_READY):
            raise TransferError(f"layer {layer} of {self.num_layers} will not arrive: CUDA error {status}")
        return status == 0
