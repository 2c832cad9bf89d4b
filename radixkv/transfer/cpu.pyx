"""The CPU path: host memory to host memory, with threads and streaming stores. The copying is in csrc/src/copy.c.

Used where there is no GPU, by engines that run on the CPU, and for moves between host pools. Addresses may have any
alignment.

    copy(plan)                  any plan: its loops are made for it
    route(src, dst).copy(ids)   views checked and loops made once; a call checks ids and goes to C (csrc/src/copy_route.c)
"""

cimport numpy as cnp
from libc.stdint cimport int64_t, uint32_t, uint64_t

from operator import index
from time import monotonic

import numpy as np

from ..errors import AllocationError, ArgumentTypeError, InvalidArgumentError, StateError, TransferError
from ..pool.memory import usable_cpus
from .base import Transfer
from .loops import loops_of
from .plan import overlap_of, plan_copy

cnp.import_array()

SLICE_BYTES = 4 << 20
"""What ``copy_until`` copies between two looks at the clock: about a millisecond."""

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
    enum: RKV_PROGRESS_DONE
    enum: RKV_PROGRESS_FAILED
    int rkv_leaf_copy(const rkv_copy_job *job)
    uint32_t rkv_leaf_copy_threads(const rkv_copy_job *job, uint32_t most)
    void rkv_leaf_copy_shutdown()
    uint32_t rkv_leaf_copy_helpers()
    const char *rkv_leaf_copy_lanes()
    int rkv_leaf_copy_use_lanes(const char *name)
    int rkv_leaf_progress_init(rkv_copy_progress *progress)
    void rkv_leaf_progress_destroy(rkv_copy_progress *progress)
    void rkv_leaf_progress_advance(rkv_copy_progress *progress, uint64_t layers_done)
    void rkv_leaf_progress_fail(rkv_copy_progress *progress)
    int rkv_leaf_progress_wait(rkv_copy_progress *progress, uint64_t layer, uint64_t timeout_ns)
    uint64_t rkv_leaf_progress_load(const rkv_copy_progress *progress)

cdef extern from "copy_route.h" nogil:
    enum: RKV_ROUTE_REFUSED
    ctypedef struct rkv_copy_ids:
        const void *ids
        uint32_t bits
    ctypedef struct rkv_copy_route:
        rkv_copy_job job
        uint32_t hole
        int one_pool
        uint64_t src_num_pages, dst_num_pages, src_page_stride, dst_page_stride
    int rkv_leaf_route_copy(
        const rkv_copy_route *route, rkv_copy_ids src, rkv_copy_ids dst, uint64_t num_pages, rkv_copy_progress *progress)

cdef enum:
    SIGNAL_NS = 100000000  # how long a wait is deaf to Ctrl-C
    MAX_WAIT_S = 1000000000

STORES = {"auto": 0, "cached": 1, "stream": 2}


cdef class Progress:
    """Counts the layers of one load back that are in place, and wakes those who wait for them.

        new --begin--> running --advance--> ... --> all layers done
         |                +--fail--> failed: layers that were done stay done, the others raise
         +-------fail-------^

    Args:
        num_layers: of the copy that reports here.
    Thread: one copy in its life reports to it (a copy of ``CpuTransfer`` does so by itself, and fails it if it raises);
        any number of threads may read, wait and fail it.
    """
    cdef rkv_copy_progress state
    cdef bint ready, used
    cdef readonly int num_layers
    cdef readonly object error  # what ``fail`` was given, or None

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

    def begin(self, int num_layers):
        """Take this progress for a copy of ``num_layers``, which then calls ``advance`` or ``fail``.

        Raises: StateError if a copy has taken it or it has failed; InvalidArgumentError for another number of layers, and
            it fails with that.
        """
        if self.used:
            raise StateError(f"a progress is of one copy, and this one had its own ({self.layers_done} layers done)")
        if num_layers != self.num_layers:
            error = InvalidArgumentError(f"progress over {self.num_layers} layers for a copy of {num_layers}")
            self.fail(error)
            raise error
        self.used = True

    def advance(self, int layers_done):
        """Say that the first ``layers_done`` layers are in place. Never goes back."""
        if not 0 <= layers_done <= self.num_layers:
            raise InvalidArgumentError(f"{layers_done} layers done of {self.num_layers}")
        rkv_leaf_progress_advance(&self.state, layers_done)

    def fail(self, error):
        """Say that the remaining layers will never come: who waits for one, now or later, gets ``error``.

        Args:
            error: an exception.
        Returns: whether that is news: False if all layers are done or it has failed already.
        """
        if not isinstance(error, BaseException):
            raise InvalidArgumentError(f"a load fails with an exception, not {error!r}")
        if self.error is not None or self.layers_done >= self.num_layers:
            return False
        self.error, self.used = error, True
        rkv_leaf_progress_fail(&self.state)
        return True

    def wait(self, int layer, timeout_s=None):
        """Wait until ``layer`` (counted from the first of the copy) is in place.

        Returns: True; False if it is not after timeout_s seconds (None: no limit).
        Raises: TransferError, caused by the error of ``fail``, if it will never be; InvalidArgumentError for a layer that
            the copy does not have.
        """
        if not 0 <= layer < self.num_layers:
            raise InvalidArgumentError(f"layer {layer} is not of 0 .. {self.num_layers - 1}")
        if rkv_leaf_progress_load(&self.state) > <uint64_t>layer:
            return True
        cdef uint64_t left = 0 if timeout_s is None else <uint64_t>(min(max(0.0, timeout_s), MAX_WAIT_S) * 1e9)
        cdef uint64_t slice_ns
        cdef bint endless = timeout_s is None
        cdef int found
        while True:
            slice_ns = SIGNAL_NS if endless or left > SIGNAL_NS else left
            with nogil:
                found = rkv_leaf_progress_wait(&self.state, layer, slice_ns)
            if found == RKV_PROGRESS_DONE:
                return True
            if found == RKV_PROGRESS_FAILED:
                raise TransferError(f"layer {layer} will not be loaded: {self.error!r}") from self.error
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
            num_threads = min(16, usable_cpus())
        try:
            num_threads = index(num_threads)
        except TypeError as error:
            raise ArgumentTypeError(f"num_threads is an int, not {num_threads!r}") from error
        if not 1 <= num_threads <= RKV_COPY_MAX_THREADS:
            raise InvalidArgumentError(f"{num_threads} threads, and 1 .. {RKV_COPY_MAX_THREADS} are possible")
        if store not in STORES:
            raise InvalidArgumentError(f"unknown store {store!r}; one of {', '.join(STORES)}")
        self.num_threads = num_threads
        self.store = store

    def copy(self, plan, progress=None):
        """Run one checked copy, on this thread and the helpers.

        Args:
            progress: a new Progress of len(plan.layers), told of each layer as it completes; the copy then goes by layers.
        Raises: InvalidArgumentError if a view is not on the cpu; StateError for a progress that had a copy, or memory that
            was closed; AllocationError, with nothing copied. A progress that was taken fails with whatever is raised.
        """
        if progress is None:
            self._run(plan, None)
            return
        progress.begin(len(plan.layers))
        try:
            self._run(plan, progress)
        except BaseException as error:
            progress.fail(error)
            raise

    def _run(self, plan, progress):
        held = plan.src.hold(), plan.dst.hold()  # nobody closes them meanwhile
        plan.require_device("cpu")
        loops = loops_of(plan, outer_layers=progress is not None)
        run_loops(loops, len(plan.layers), self.num_threads, self.store, progress)

    def load_back(self, host, device, host_pages, device_pages, progress=None):
        """Copy all layers of pages from the host to the device, layer by layer if somebody follows ``progress``.

        Raises: as ``copy`` and ``plan``; the progress fails in either case, so that nobody waits for ever.
        """
        if progress is None:
            self._run(self.plan(host, device, host_pages, device_pages), None)
            return
        progress.begin(self.geometry.num_layers)
        try:
            self._run(self.plan(host, device, host_pages, device_pages), progress)
        except BaseException as error:
            progress.fail(error)
            raise

    def route(self, src, dst, layers=None):
        """Prepare copies between two views: they are checked now, and only page ids at each copy.

        Raises: what ``plan`` raises for the views and the layers; InvalidArgumentError if one is not on the cpu.
        """
        return CpuRoute(self, src, dst, layers)


cdef class CpuRoute:
    """Copies between two views that have been checked. Made by ``CpuTransfer.route``.

    It keeps the owners of both views alive, and open while it copies. Their tables of bases are read once, when it is made.
    Thread: any number of threads may use one object at once; the GIL is released while copying.
    """
    cdef rkv_copy_route plain, by_layer
    cdef object transfer, kept, hold_src, hold_dst
    cdef bint fast
    cdef int num_layers
    cdef readonly object src, dst, layers

    def __init__(self, transfer, src, dst, layers=None):
        cdef rkv_copy_route *prepared
        # A plan of no pages: all checks but those of ids, and loops with a hole where the page loop goes.
        empty = np.empty(0, np.int64)
        plan = plan_copy(transfer.geometry, src, dst, empty, empty, layers)
        plan.require_device("cpu")
        self.transfer, self.src, self.dst, self.layers = transfer, src, dst, plan.layers
        self.num_layers = len(plan.layers)
        self.hold_src, self.hold_dst = (getattr(view.owner, "hold", None) for view in (src, dst))
        self.kept = [loops_of(plan), loops_of(plan, outer_layers=True)]
        overlap = overlap_of(plan)
        self.fast = overlap != "bytes"  # else each copy is compared run by run, by plan_copy
        page_size = transfer.geometry.page_size
        for number, loops in enumerate(self.kept):
            prepared = &self.by_layer if number else &self.plain
            _fill_job(&prepared.job, loops)
            prepared.job.num_layers = self.num_layers
            prepared.job.num_threads = transfer.num_threads
            prepared.job.store = STORES[transfer.store]
            prepared.job.progress = NULL
            prepared.hole = [len(table) for table in loops.src].index(0)
            prepared.one_pool = overlap == "pages"
            prepared.src_num_pages = src.num_slots // page_size
            prepared.dst_num_pages = dst.num_slots // page_size
            prepared.src_page_stride = <uint64_t><int64_t>src.page_stride
            prepared.dst_page_stride = <uint64_t><int64_t>dst.page_stride

    def copy(self, src_pages, dst_pages, Progress progress=None):
        """Copy pages: the i-th source page to the i-th destination page, of each layer and half.

        Args:
            src_pages, dst_pages: int32 or int64 [n]; numpy arrays in C order are the fast way.
            progress: a new Progress of len(layers), told of each layer as it completes; the copy then goes by layers.
        Raises: what ``plan_copy`` raises for page ids and closed memory, with nothing copied; StateError for a progress that
            had a copy; AllocationError. A progress that was taken fails with whatever is raised.
        """
        if progress is None:
            self._copy(src_pages, dst_pages, None)
            return
        progress.begin(self.num_layers)
        try:
            self._copy(src_pages, dst_pages, progress)
        except BaseException as error:
            progress.fail(error)
            raise

    def copy_until(self, src_pages, dst_pages, until_s=None):
        """Copy pages from the first one on, in slices of 4 MiB (or a page), until ``time.monotonic()`` has reached until_s.

        Args: src_pages, dst_pages: as ``copy``, arrays; until_s: None: all of them.
        Returns: how many it has copied; at least a slice. Raises: as ``copy``, with earlier slices copied.
        """
        cdef Py_ssize_t total = len(src_pages), done = 0, step = max(1, SLICE_BYTES // self.transfer.geometry.page_bytes)
        if until_s is None or total <= step or total != len(dst_pages):
            self._copy(src_pages, dst_pages, None)
            return total
        while done < total:
            self._copy(src_pages[done:done + step], dst_pages[done:done + step], None)
            done = min(total, done + step)
            if monotonic() >= until_s:
                break
        return done

    cdef int _copy(self, src_pages, dst_pages, Progress progress) except -1:
        cdef rkv_copy_route *route = &self.plain if progress is None else &self.by_layer
        cdef rkv_copy_progress *state = NULL if progress is None else &progress.state
        cdef rkv_copy_ids src, dst
        cdef int64_t num_pages = _ids_of(src_pages, &src)
        cdef int status = RKV_ROUTE_REFUSED
        src_held = None if self.hold_src is None else self.hold_src()
        dst_held = None if self.hold_dst is None else self.hold_dst()
        if self.fast and num_pages >= 0 and _ids_of(dst_pages, &dst) == num_pages:
            with nogil:
                status = rkv_leaf_route_copy(route, src, dst, num_pages, state)
        if status == RKV_ROUTE_REFUSED:
            # not for the fast way (a list, another dtype, views that reach into each other), or wrong: this says how
            plan = plan_copy(self.transfer.geometry, self.src, self.dst, src_pages, dst_pages, self.layers)
            self.transfer._run(plan, progress)
        elif status:
            raise AllocationError(f"no memory to copy {num_pages} pages of {self.num_layers} layers")
        return 0


cdef int64_t _ids_of(ids, rkv_copy_ids *out):
    """The ids of an array that C can read as it is, and their number; -1 if it cannot."""
    if not cnp.PyArray_Check(ids):
        return -1
    cdef cnp.ndarray array = <cnp.ndarray>ids
    cdef int item = cnp.PyArray_ITEMSIZE(array)
    if (
        cnp.PyArray_NDIM(array) != 1 or not cnp.PyTypeNum_ISSIGNED(cnp.PyArray_TYPE(array))
        or not cnp.PyTypeNum_ISINTEGER(cnp.PyArray_TYPE(array)) or (item != 4 and item != 8)
        or not cnp.PyArray_ISCARRAY_RO(array)
    ):
        return -1
    out.ids = cnp.PyArray_DATA(array)
    out.bits = 8 * item
    return cnp.PyArray_SIZE(array)


cdef int _fill_job(rkv_copy_job *job, loops) except -1:
    """The loops of a job; its tables belong to ``loops``, which must outlive it."""
    cdef const uint64_t[::1] src, dst
    cdef uint32_t k
    if len(loops.src) > RKV_COPY_MAX_LOOPS:
        raise InvalidArgumentError(f"{len(loops.src)} loops, at most {RKV_COPY_MAX_LOOPS}")
    job.src_base = loops.src_base
    job.dst_base = loops.dst_base
    job.run_bytes = loops.run_bytes
    job.num_loops = len(loops.src)
    job.steps_per_layer = loops.steps_per_layer
    for k in range(job.num_loops):
        src, dst = loops.src[k], loops.dst[k]
        job.loops[k].count = src.shape[0]
        job.loops[k].src = &src[0] if src.shape[0] else NULL
        job.loops[k].dst = &dst[0] if dst.shape[0] else NULL
    return 0


def run_loops(loops, int num_layers, int num_threads, str store, Progress progress=None):
    """Run a nest of loops (loops.Loops) as it is: addresses are taken on trust."""
    cdef rkv_copy_job job
    cdef int error
    _fill_job(&job, loops)
    job.num_layers = num_layers
    job.num_threads = rkv_leaf_copy_threads(&job, num_threads)
    job.store = STORES[store]
    job.progress = NULL if progress is None else &progress.state
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
