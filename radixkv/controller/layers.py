"""L3: per-layer completion of loads. A model waits for layer l of the loads it depends on, not for all of their bytes.

    producers:  start_loads() -> 0, 1, 2, ...   one a batch; batches are copied in this order
    consumer:   set_consumer(i), then wait_until(0), wait_until(1), ... before each layer is read

Names follow SGLang's layer_done_counter. There three counters are reused in turn; here an index is never used again,
so a consumer that comes late or early never waits for somebody else's batch.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from ..errors import InvalidArgumentError, LoadError, TransferError
from .base import LayerProgress
from .lanes import FailedProgress

__all__ = ["LayerCounter"]

KEPT_FAILURES = 256
"""Failed batches that are remembered for consumers that come late."""


@dataclass(slots=True)
class _Batch:
    progress: LayerProgress
    oldest: int
    """The first batch that was not settled when this one began."""


class LayerCounter:
    """Which batches of loads are in flight, and how far they are. ``wait*`` may be called on any thread.

    A consumer of batch i depends on all batches up to i that were not settled when i began: its requests may have
    matched their pages. Batches are copied in order, so the last one says when; the failure of any of them raises.

    Args:
        num_layers: of the model.
        timeout_s: what wait_until waits at most; None: for ever.
    """

    def __init__(self, num_layers: int, timeout_s: float | None = None) -> None:
        self.num_layers, self.timeout_s = num_layers, timeout_s
        self.consumer_index = -1
        self._latest = -1
        self._lock = threading.Lock()
        self._batches: dict[int, _Batch] = {}
        self._failed: dict[int, BaseException] = {}

    @property
    def latest(self) -> int:
        """Index of the last batch begun; -1 if there was none."""
        return self._latest

    @property
    def in_flight(self) -> bool:
        """Whether some batch has not been settled."""
        return bool(self._batches)

    def outcome(self, index: int) -> bool | None:
        """Whether a batch succeeded; None until it has been settled."""
        with self._lock:
            return None if index in self._batches else index not in self._failed

    def next_producer(self) -> int:
        """The index that the next batch will have."""
        return self._latest + 1

    def set_consumer(self, index: int) -> None:
        """Choose the batch that ``wait_until`` waits for. -1: none."""
        self.consumer_index = index

    def wait_until(self, layer: int) -> None:
        """Wait until a layer of the consumer's batch, and of those before it, is in place. On a device the current
        stream waits, not the caller.

        Raises: LoadError if such a batch failed, or the time is up.
        """
        if self.consumer_index >= 0 and not self.wait(layer, self.timeout_s):
            raise LoadError(f"layer {layer} of load batch {self.consumer_index} is not there after {self.timeout_s} s")

    def wait(self, layer: int, timeout_s: float | None = None, index: int | None = None) -> bool:
        """As wait_until, for a batch by its index (None: the consumer's). Returns: False after the timeout.

        Raises: LoadError if such a batch failed; InvalidArgumentError for a layer or batch that there is not.
        """
        index = self.consumer_index if index is None else index
        if not 0 <= layer < self.num_layers:
            raise InvalidArgumentError(f"layer {layer} is not of 0 .. {self.num_layers - 1}")
        if index > self._latest:
            raise InvalidArgumentError(f"load batch {index} has not begun; the last one is {self._latest}")
        with self._lock:
            batch = self._batches.get(index)
            oldest = index if batch is None else batch.oldest
        try:
            there = batch is None or batch.progress.wait(layer, timeout_s)
        except TransferError:  # a layer that will never be
            there = False
        self._raise_failures(oldest, index)
        return there

    def _raise_failures(self, oldest: int, index: int) -> None:
        """Raise if one of the batches oldest .. index failed."""
        with self._lock:
            for number in range(max(0, oldest), index + 1):
                batch = self._batches.get(number)
                error = self._failed.get(number) if batch is None else batch.progress.error
                if error is not None:
                    raise LoadError(f"load batch {number}, which batch {index} depends on, failed: {error}") from error

    def reset(self) -> None:
        """Forget all batches: who waits for one that did not end gets a LoadError. Indices go on."""
        with self._lock:
            for index in list(self._batches):
                self._drop(index, LoadError("the cache was reset"))
        self.consumer_index = -1

    # ---- for the controller ------------------------------------------------------------------------------------------
    def begin(self, progress: LayerProgress) -> int:
        """Add a batch. Returns its index."""
        with self._lock:
            self._latest += 1
            oldest = min(self._batches, default=self._latest)
            self._batches[self._latest] = _Batch(progress, oldest)
            return self._latest

    def fail(self, index: int, error: BaseException) -> None:
        """A batch has failed (on some rank), but what it should have filled still matches: so do all who begin until it
        is settled."""
        with self._lock:
            self._batches[index].progress = FailedProgress(error)

    def settle(self, index: int, error: BaseException | None = None) -> None:
        """A batch has been settled (on all ranks, of which one may have failed): later ones do not depend on it."""
        with self._lock:
            self._drop(index, error)

    def _drop(self, index: int, error: BaseException | None) -> None:
        batch = self._batches.pop(index)
        error = batch.progress.error or error
        for number in range(batch.oldest, index):  # earlier ones end earlier: what fails of them has failed by now
            above = self._batches.get(number)
            error = error or (self._failed.get(number) if above is None else above.progress.error)
        if error is not None:
            self._failed[index] = error
            while len(self._failed) > KEPT_FAILURES:
                del self._failed[min(self._failed)]
