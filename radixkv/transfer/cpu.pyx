"""The CPU path: host memory to host memory, with threads and streaming stores. The copying is in csrc/src/copy.c.

Used where there is no GPU, by engines that run on the CPU, and for moves between host pools. Addresses may have any
alignment.
"""

cimport numpy as cnp
from libc.stdint cimport int64_t, uint32_t, uint64_t

import os

from ..errors import AllocationError, InvalidArgumentError
from .base import Transfer
from .loops import loops_of

cnp.import_array()

cdef extern from "copy.h" nogil:
    enum: RKV_COPY_MAX_LOOPS
    enum: RKV_COPY_MAX_THREADS
    ctypedef struct rkv_copy_loop:
        const uint64_t *src
        const uint64_t *dst
        uint64_t count
    ctypedef struct rkv_copy_progress:
        pass
    ctypedef struct rkv_copy_job:
        uint64_t src_base, dst_base, run_bytes
        rkv_copy_loop loops[5]
        uint32_t num_loops, num_threads, steps_per_layer, num_layers
        int store
        rkv_copy_progress *progress
    int rkv_leaf_copy(const rkv_copy_job *job)
    void rkv_leaf_copy_shutdown()
    uint32_t rkv_leaf_copy_helpers()
    const char *rkv_leaf_copy_lanes()
    int rkv_leaf_copy_use_lanes(const char *name)
    int rkv_leaf_progress_init(rkv_copy_progress *progress)
    void rkv_leaf_progress_destroy(rkv_copy_progress *progress)
    int rkv_leaf_progress_wait(rkv_copy_progress *progress, uint64_t layer, uint64_t timeout_ns)
    uint64_t rkv_leaf_progress_load(const rkv_copy_progress *progress)

cdef enum:
    SIGNAL_NS = 100000000  # how long a wait is deaf to Ctrl-C

STORES = {"auto": 0, "cached": 1, "stream": 2}


cdef class Progress:
    """Counts the layers of one load back that are in place, and wakes those who wait for them.

    Args:
        num_layers: of the copy that reports here.
    Thread: one copy may report to it; any number of threads may read and wait.
    """
    cdef rkv_copy_progress state
    cdef bint ready
    cdef readonly int num_layers

    def __cinit__(self, int num_layers):
        if num_layers < 1:
            raise InvalidArgumentError(f"progress over {num_layers} layers")
        self.num_layers = num_layers
        if rkv_leaf_progress_init(&self.state):
            raise AllocationError("no memory for a lock")
        self.ready = True

    def __dealloc__(self):
        if self.ready:
            rkv_leaf_progress_destroy(&self.state)

    @property
    def layers_done(self):
        """Layers that are complete: all their bytes are in place. They complete in order."""
        return rkv_leaf_progress_load(&self.state)

    def wait(self, int layer, timeout_s=None):
        """Wait until ``layer`` (counted from the first of the copy) is in place.

        Returns: True; False if it is not after timeout_s seconds (None: no limit).
        Raises: InvalidArgumentError for a layer that the copy does not have.
        """
        if not 0 <= layer < self.num_layers:
            raise InvalidArgumentError(f"layer {layer} is not of 0 .. {self.num_layers - 1}")
        cdef uint64_t left = 0 if timeout_s is None else <uint64_t>(max(0.0, timeout_s) * 1e9)
        cdef uint64_t slice_ns
        cdef bint endless = timeout_s is None, done
        while True:
            slice_ns = SIGNAL_NS if endless or left > SIGNAL_NS else left
            with nogil:
                done = rkv_leaf_progress_wait(&self.state, layer, slice_ns)
            if done:
                return True
            if not endless:
                left -= slice_ns
                if left == 0:
                    return False
            # back in Python between two slices: pending signals are handled here

    def wait_until(self, int layer):
        """``wait`` without a limit: a device pool's layer_transfer_counter, for layers counted from 0."""
        self.wait(layer)


class CpuTransfer(Transfer):
    """Copies in host memory.

    Args:
        geometry: of every view it is given.
        num_threads: at most this many work on a copy, the caller included; None: the cores this process may use, <= 16.
        store: "auto" uses streaming stores for copies of 2 MiB and more in runs of 64 bytes and more, so that they do
            not flush the caches; "cached" and "stream" decide for all.
    Thread: any number of threads may use one object at once; the GIL is released while copying.
    """

    def __init__(self, geometry, num_threads=None, store="auto"):
        super().__init__(geometry)
        if num_threads is None:
            num_threads = min(16, len(os.sched_getaffinity(0)))
        if not 1 <= num_threads <= RKV_COPY_MAX_THREADS:
            raise InvalidArgumentError(f"{num_threads} threads, and 1 .. {RKV_COPY_MAX_THREADS} are possible")
        if store not in STORES:
            raise InvalidArgumentError(f"unknown store {store!r}; one of {', '.join(STORES)}")
        self.num_threads = num_threads
        self.store = store

    def copy(self, plan, progress=None):
        """Run one checked copy, on this thread and the helpers.

        Args:
            progress: a Progress of len(plan.layers), told of each layer as it completes; the copy then goes by layers.
        Raises: InvalidArgumentError if a view is not on the cpu; AllocationError, with nothing copied.
        """
        plan.require_device("cpu")
        if progress is not None and progress.num_layers != len(plan.layers):
            raise InvalidArgumentError(f"progress over {progress.num_layers} layers for a copy of {len(plan.layers)}")
        loops = loops_of(plan, outer_layers=progress is not None)
        run_loops(loops, len(plan.layers), self.num_threads, self.store, progress)

    def load_back(self, host, device, host_pages, device_pages, progress=None):
        """Copy all layers of pages from the host to the device, layer by layer if somebody follows ``progress``."""
        self.copy(self.plan(host, device, host_pages, device_pages), progress)


def run_loops(loops, int num_layers, int num_threads, str store, Progress progress=None):
    """Run a nest of loops (loops.Loops) as it is: addresses are taken on trust."""
    cdef rkv_copy_job job
    cdef int error, k
    cdef const uint64_t[::1] src, dst
    if len(loops.src) > RKV_COPY_MAX_LOOPS:
        raise InvalidArgumentError(f"{len(loops.src)} loops, at most {RKV_COPY_MAX_LOOPS}")
    job.src_base = loops.src_base
    job.dst_base = loops.dst_base
    job.run_bytes = loops.run_bytes
    job.num_loops = len(loops.src)
    job.num_threads = num_threads
    job.steps_per_layer = loops.steps_per_layer
    job.num_layers = num_layers
    job.store = STORES[store]
    job.progress = NULL if progress is None else &progress.state
    for k in range(job.num_loops):
        src, dst = loops.src[k], loops.dst[k]  # kept alive by ``loops``
        job.loops[k].count = src.shape[0]
        job.loops[k].src = &src[0] if src.shape[0] else NULL
        job.loops[k].dst = &dst[0] if dst.shape[0] else NULL
    with nogil:
        error = rkv_leaf_copy(&job)
    if error:
        raise AllocationError(f"no memory to count {num_layers} layers")


def num_helpers():
    """Helper threads of this process that are alive now."""
    return rkv_leaf_copy_helpers()


def shutdown():
    """Stop and join the helpers; the next copy starts new ones. Not while another thread copies."""
    with nogil:
        rkv_leaf_copy_shutdown()


def lanes():
    """What copies with streaming stores: "avx512", "avx2", "sse2", or "memcpy" where there are no such stores."""
    return rkv_leaf_copy_lanes().decode()


def use_lanes(name):
    """Take others than the widest, in the whole process: for tests and comparisons.

    Raises: InvalidArgumentError if this machine does not have them.
    """
    if not rkv_leaf_copy_use_lanes(name.encode()):
        raise InvalidArgumentError(f"no lanes {name!r} on this machine")
