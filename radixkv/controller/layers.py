"""L3: per-layer completion of loads. A model waits for layer l of the loads it depends on, not for all of their bytes.

    producers:  start_loads() -> 0, 1, 2, ...   one a batch; batches are copied in this order
    consumer:   set_consumer(i), then wait_until(0), wait_until(1), ... before each layer is read

Names follow SGLang's layer_done_counter. There three counters are reused in turn; here an index is never used again,
so a consumer that comes late or early never waits for somebody else's batch.
"""

from __future__ import annotations

from .base import LayerProgress

__all__ = ["LayerCounter"]


class LayerCounter:
    """Which batches of loads are in flight, and how far they are. ``wait*`` may be called on any thread.

    A consumer of batch i depends on all batches up to i that were not settled when i began: its requests may have
    matched their pages. Batches are copied in order, so the last one says when; the failure of any of them raises.
    """

    def __init__(self, num_layers: int, timeout_s: float | None = None) -> None:
        raise NotImplementedError

    @property
    def num_layers(self) -> int: ...

    @property
    def latest(self) -> int:
        """Index of the last batch begun; -1 if there was none."""
        raise NotImplementedError

    def next_producer(self) -> int:
        """The index that the next batch will have."""
        raise NotImplementedError

    def set_consumer(self, index: int) -> None:
        """Choose the batch that ``wait_until`` waits for. -1: none."""
        raise NotImplementedError

    def wait_until(self, layer: int) -> None:
        """Wait until a layer of the consumer's batch, and of those before it, is in place. On a device the current
        stream waits, not the caller.

        Raises: LoadError if such a batch failed, or the time is up.
        """
        raise NotImplementedError

    def wait(self, layer: int, timeout_s: float | None = None, index: int | None = None) -> bool:
        """As wait_until, for a batch by its index (None: the consumer's). Returns: False after the timeout.

        Raises: LoadError if such a batch failed.
        """
        raise NotImplementedError

    def reset(self) -> None:
        """Forget all batches: who waits for one that did not end gets a LoadError. Indices go on."""
        raise NotImplementedError

    # ---- for the controller ------------------------------------------------------------------------------------------
    def begin(self, progress: LayerProgress) -> int:
        """Add a batch. Returns its index."""
        raise NotImplementedError

    def settle(self, index: int) -> None:
        """A batch has been settled: batches that begin from now on do not depend on it."""
        raise NotImplementedError
