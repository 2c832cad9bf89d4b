"""Clocks, percentiles and the process's memory. Times are ns unless a name says otherwise."""

from __future__ import annotations

import ctypes
import gc
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class Percentiles(NamedTuple):
    """Of one kind of operation, in microseconds."""

    p50_us: float | None
    p99_us: float | None
    mean_us: float | None
    calls: int


def percentiles(times_ns: npt.NDArray[np.int64] | Sequence[int]) -> Percentiles:
    """p50, p99 and mean of single times in ns; None for none."""
    times = np.asarray(times_ns, np.float64) / 1e3
    if not len(times):
        return Percentiles(None, None, None, 0)
    return Percentiles(
        float(np.percentile(times, 50)), float(np.percentile(times, 99)), float(times.mean()), len(times)
    )


def time_each(function: Callable[[], Any], count: int) -> npt.NDArray[np.int64]:
    """ns of each of ``count`` calls, the clock's own cost (about 50 ns) included."""
    clock = time.perf_counter_ns
    times = np.zeros(count, np.int64)
    for index in range(count):
        start = clock()
        function()
        times[index] = clock() - start
    return times


def time_call(function: Callable[[Any], Any], argument: Any, batch: int = 200, samples: int = 60) -> float:
    """Median ns of ``function(argument)``: batches in a bare loop, the loop's own cost taken off."""
    clock = time.perf_counter_ns
    calls, empties = [], []
    for _ in range(samples):
        start = clock()
        for _ in repeat(None, batch):
            function(argument)
        middle = clock()
        for _ in repeat(None, batch):
            pass
        calls.append((middle - start) / batch)
        empties.append((clock() - middle) / batch)
    return statistics.median(calls) - statistics.median(empties)


class Memory(NamedTuple):
    """Of this process, bytes."""

    resident: int
    anonymous: int


def memory() -> Memory:
    """Read smaps_rollup (Linux): everything resident, and the private anonymous part of it."""
    fields = {}
    with open("/proc/self/smaps_rollup") as lines:
        for line in lines:
            name, _, rest = line.partition(":")
            if rest.endswith("kB\n"):
                fields[name] = int(rest.split()[0]) * 1024
    return Memory(fields["Rss"], fields["Anonymous"])


def settle() -> None:
    """Collect garbage and give free heap pages back to the system, so that a later difference is what is really
    held."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def preemptions() -> int:
    """How often this process was taken off its core so far (involuntary context switches, all threads)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
