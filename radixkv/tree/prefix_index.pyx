"""L1: PrefixIndex, who holds which prefix: the C ABI rkv_index_* and the class over it. The contract is index_base.py.

The state and the algorithms are in the index_*.pxd beside this file, drawings first: index_state (what there is, lock order), index_arena,
index_directory, index_sets, index_nodes, index_insert, index_remove, index_find, index_check.
"""

cimport cython
cimport numpy as cnp
from cpython.buffer cimport PyBUF_FORMAT, PyBUF_STRIDES, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer
from cpython.dict cimport PyDict_SetItem
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.long cimport PyLong_AsLongLong, PyLong_AsUnsignedLongLong, PyLong_Check
from libc.stdlib cimport free, malloc

from .index_state cimport *
from .index_nodes cimport *
from .index_insert cimport index_insert
from .index_sets cimport list_workers
from .index_remove cimport evict, index_clear, index_remove, lock_shards, unlock_shards
from .index_find cimport index_find, node_of
from .index_check cimport check_all, dump_shard, shard_bytes

from ..errors import AllocationError, ArgumentTypeError, HandleError, IntegrityError, InvalidArgumentError
from .index_base import IndexStats, PathNode, PrefixIndexBase

cnp.import_array()

cdef enum:
    ALL_SHARDS = 0x1ffffffff
    NUM_MUTEXES = 66        # the parts', index.evicting and index.registering
    STACK = 64              # holders of one find that need no heap

# ---------------------------------------------------------------------------------------------- the C ABI: no Python below

cdef void release_parts(Index *index) noexcept nogil:
    """The directory's, and the registry's blocks."""
    cdef uint32_t i
    for i in range(NUM_BLOCKS):
        if index.blocks[i] != NULL:
            resize(index, index.blocks[i], BLOCK_IDS, 0)
    for i in range(NUM_PARTS):
        if index.parts[i].places != NULL:
            resize(index, index.parts[i].places, <uint64_t>index.parts[i].capacity * 5, 0)


cdef void release_table(Index *index, Table *t) noexcept nogil:
    if t.slots != NULL:
        resize(index, t.slots, (<uint64_t>t.mask + 1) * 4, 0)


cdef void release_shard(Index *index, Shard *s) noexcept nogil:
    cdef uint32_t k
    release_table(index, &s.heads)
    release_table(index, &s.waits)
    release_table(index, &s.by_members)
    for k in range(NUM_CHUNKS):
        if s.chunk_keys[k] != NULL:
            resize(index, s.chunk_keys[k], <uint64_t>chunk_pages(k) * 12, 0)
    if s.nodes != NULL:
        resize(index, s.nodes, s.max_nodes * sizeof(Node), 0)
    if s.heap != NULL:
        resize(index, s.heap, s.max_heap * sizeof(HeapEntry), 0)
    if s.sets != NULL:
        resize(index, s.sets, s.max_sets * sizeof(HolderSet), 0)
    if s.members != NULL:
        resize(index, s.members, s.max_members * sizeof(Member), 0)
    if s.workers != NULL:
        resize(index, s.workers, (<uint64_t>s.worker_mask + 1) * sizeof(Worker), 0)


cdef rkv_mutex *mutex_of(Index *index, uint32_t i) noexcept nogil:
    """All NUM_MUTEXES by number."""
    if i < NUM_PARTS:
        return &index.parts[i].mutex
    return &index.evicting if i == NUM_PARTS else &index.registering


cdef void release_locks(Index *index, uint32_t mutexes, uint32_t rwlocks) noexcept nogil:
    """Destroy the first so many of each."""
    cdef uint32_t i
    for i in range(mutexes):
        rkv_mutex_destroy(mutex_of(index, i))
    for i in range(rwlocks):
        rkv_rwlock_destroy(&index.shards[i].lock)


cdef bint make_locks(Index *index) noexcept nogil:
    """All or none. False: the system refused one."""
    cdef uint32_t mutexes = 0, rwlocks = 0
    while mutexes < NUM_MUTEXES and rkv_mutex_init(mutex_of(index, mutexes)) == 0:
        mutexes += 1
    while mutexes == NUM_MUTEXES and rwlocks < NUM_SHARDS and rkv_rwlock_init(&index.shards[rwlocks].lock) == 0:
        rwlocks += 1
    if rwlocks == NUM_SHARDS:
        return True
    release_locks(index, mutexes, rwlocks)
    return False


cdef public rkv_status rkv_index_create(const rkv_index_config *callers, rkv_index **out) noexcept nogil:
    cdef rkv_index_config config
    cdef rkv_allocator allocator
    cdef Index *index
    cdef uint32_t i, generation
    if out != NULL:
        out[0] = NULL
    if out == NULL or (callers != NULL and callers.struct_size < RKV_INDEX_CONFIG_SIZE_V1):
        return rkv_leaf_fail(RKV_ERR_ARGUMENT, "rkv_index_create: out is NULL or config.struct_size too small")
    memset(&config, 0, sizeof(config))
    if callers != NULL:
        rkv_read_struct(&config, sizeof(config), callers, callers.struct_size)
    allocator.reallocate = rkv_leaf_reallocate
    allocator.ctx = NULL
    if config.allocator.reallocate != NULL:
        allocator = config.allocator
    index = <Index *>allocator.reallocate(allocator.ctx, NULL, 0, sizeof(Index))
    if index == NULL:
        return rkv_leaf_fail(RKV_ERR_NO_MEMORY, "no memory for an index")
    memset(index, 0, sizeof(Index))
    index.allocator = allocator
    index.max_pages = config.max_pages
    generation = <uint32_t>mix(rkv_unique_id(index)) & GEN_MASK
    for i in range(NUM_SHARDS):
        index.shards[i].id = i
        index.shards[i].oldest = ~<uint64_t>0
        index.shards[i].first_generation = generation
    if not make_locks(index):
        allocator.reallocate(allocator.ctx, index, sizeof(Index), 0)
        return rkv_leaf_fail(RKV_ERR_NO_MEMORY, "the system has no locks left for an index")
    out[0] = <rkv_index *>index
    return RKV_OK


cdef public void rkv_index_destroy(rkv_index *handle) noexcept nogil:
    cdef Index *index = <Index *>handle
    cdef rkv_allocator allocator
    cdef uint32_t i
    if index == NULL:
        return
    allocator = index.allocator
    for i in range(NUM_SHARDS):
        release_shard(index, &index.shards[i])
    release_parts(index)
    release_locks(index, NUM_MUTEXES, NUM_SHARDS)
    allocator.reallocate(allocator.ctx, index, sizeof(Index), 0)


cdef rkv_status check_keys(rkv_index *index, uint32_t worker, const uint64_t *page_keys, size_t num_pages) noexcept nogil:
    if index == NULL or (page_keys == NULL and num_pages):
        return rkv_leaf_fail(RKV_ERR_ARGUMENT, "index or page_keys is NULL")
    if worker >= RKV_INDEX_MAX_WORKERS:
        return rkv_leaf_fail(RKV_ERR_ARGUMENT, "worker %u is not below %u", worker, RKV_INDEX_MAX_WORKERS)
    if num_pages > POS_MASK:
        return rkv_leaf_fail(RKV_ERR_ARGUMENT, "%zu page keys in one call, at most %u", num_pages, <uint32_t>POS_MASK)
    return RKV_OK


cdef public rkv_status rkv_index_insert(
    rkv_index *index, uint32_t worker, const uint64_t *page_keys, size_t num_pages, const uint64_t *parent_key,
    uint64_t *num_added
) noexcept nogil:
    cdef uint64_t added = 0
    cdef rkv_status status = check_keys(index, worker, page_keys, num_pages)
    if status == RKV_OK:
        status = index_insert(<Index *>index, worker, page_keys, <uint32_t>num_pages, parent_key, &added)
    if status == RKV_OK:
        evict(<Index *>index)
    if num_added != NULL:
        num_added[0] = added
    return status


cdef public rkv_status rkv_index_remove(
    rkv_index *index, uint32_t worker, const uint64_t *page_keys, size_t num_pages, uint64_t *num_removed
) noexcept nogil:
    cdef uint64_t removed = 0
    cdef rkv_status status = check_keys(index, worker, page_keys, num_pages)
    if status == RKV_OK:
        status = index_remove(<Index *>index, worker, page_keys, <uint32_t>num_pages, &removed)
    if num_removed != NULL:
        num_removed[0] = removed
    return status


cdef rkv_status clear(rkv_index *index, uint32_t worker, bint forget_id, uint64_t *num_removed) noexcept nogil:
    cdef uint64_t removed = 0
    cdef rkv_status status = check_keys(index, worker, NULL, 0)
    if status == RKV_OK:
        index_clear(<Index *>index, worker, forget_id, &removed)
    if num_removed != NULL:
        num_removed[0] = removed
    return status


cdef public rkv_status rkv_index_clear_worker(rkv_index *index, uint32_t worker, uint64_t *num_removed) noexcept nogil:
    return clear(index, worker, False, num_removed)


cdef public rkv_status rkv_index_remove_worker(rkv_index *index, uint32_t worker, uint64_t *num_removed) noexcept nogil:
    return clear(index, worker, True, num_removed)


cdef public rkv_status rkv_index_find(
    rkv_index *index, const uint64_t *page_keys, size_t num_pages, rkv_index_hit *callers
) noexcept nogil:
    cdef rkv_index_hit own
    cdef rkv_index_hit *hit = callers       # 12 ns of 42 less than with a copy
    cdef rkv_status status = check_keys(index, 0, page_keys, num_pages)
    if status != RKV_OK:
        return status
    if callers == NULL or callers.struct_size < RKV_INDEX_HIT_SIZE_V1:
        return rkv_leaf_fail(RKV_ERR_ARGUMENT, "hit is NULL or its struct_size too small")
    if callers.struct_size < sizeof(own):
        rkv_read_struct(&own, sizeof(own), callers, callers.struct_size)
        hit = &own
    if hit.max_workers and (hit.workers == NULL or hit.pages == NULL):
        return rkv_leaf_fail(RKV_ERR_ARGUMENT, "workers or pages is NULL, with room for %zu", hit.max_workers)
    if hit.nodes != NULL and hit.max_holders and hit.holders == NULL:
        return rkv_leaf_fail(RKV_ERR_ARGUMENT, "holders is NULL, with room for %zu", hit.max_holders)
    status = index_find(<Index *>index, page_keys, <uint32_t>num_pages, hit, True)
    if hit == &own:
        rkv_write_struct(callers, callers.struct_size, hit, sizeof(own))
    if status == RKV_ERR_CAPACITY:
        return rkv_leaf_fail(
            status, "%zu of %zu workers, %zu of %zu nodes, %zu of %zu holders fit", hit.max_workers, hit.num_workers,
            hit.max_nodes, hit.num_nodes, hit.max_holders, hit.num_holders)
    return status


cdef rkv_status access_word(rkv_index *handle, rkv_node node, uint64_t *word, bint write) noexcept nogil:
    """Share the shard's lock and read or write the word."""
    cdef uint32_t id = <uint32_t>(node >> 32) & 0x3f
    cdef Shard *s
    cdef Node *x = NULL
    if handle == NULL or word == NULL:
        return rkv_leaf_fail(RKV_ERR_ARGUMENT, "index or word is NULL")
    if id < ORPHANS:                    # an orphan's handle is never given out
        s = &(<Index *>handle).shards[id]
        rkv_lock_shared(&s.lock)
        x = node_of(s, node)
        if x != NULL and write:
            rkv_store(&x.word, word[0])
        elif x != NULL:
            word[0] = rkv_load(&x.word)
        rkv_unlock(&s.lock)
    if x == NULL:
        return rkv_leaf_fail(RKV_ERR_HANDLE, "node 0x%016llx has left the index, or is another's", <unsigned long long>node)
    return RKV_OK


cdef public rkv_status rkv_index_get_word(rkv_index *index, rkv_node node, uint64_t *word) noexcept nogil:
    return access_word(index, node, word, False)


cdef public rkv_status rkv_index_set_word(rkv_index *index, rkv_node node, uint64_t word) noexcept nogil:
    return access_word(index, node, &word, True)


cdef public rkv_status rkv_index_workers(
    rkv_index *index, uint32_t *workers, size_t max_workers, size_t *num_workers
) noexcept nogil:
    if index == NULL or num_workers == NULL or (workers == NULL and max_workers):
        return rkv_leaf_fail(RKV_ERR_ARGUMENT, "index, workers or num_workers is NULL")
    num_workers[0] = list_workers(<Index *>index, workers, max_workers)
    if num_workers[0] > max_workers:
        return rkv_leaf_fail(RKV_ERR_CAPACITY, "room for %zu of %zu workers", max_workers, num_workers[0])
    return RKV_OK


cdef public rkv_status rkv_index_get_stats(rkv_index *handle, rkv_index_stats *callers) noexcept nogil:
    cdef Index *index = <Index *>handle
    cdef rkv_index_stats out
    cdef uint32_t i
    if handle == NULL or callers == NULL or callers.struct_size < RKV_INDEX_STATS_SIZE_V1:
        return rkv_leaf_fail(RKV_ERR_ARGUMENT, "index or out is NULL, or out.struct_size too small")
    memset(&out, 0, sizeof(out))
    out.memory_bytes = sizeof(Index)
    lock_shards(index, ALL_SHARDS, False)
    for i in range(NUM_SHARDS):
        out.pages += index.shards[i].pages
        out.entries += index.shards[i].entries
        out.nodes += index.shards[i].live_nodes
        out.memory_bytes += shard_bytes(&index.shards[i])
    out.orphan_pages = index.shards[ORPHANS].pages
    out.evicted_pages = rkv_load(&index.evicted)
    out.workers = rkv_load(&index.num_workers)
    for i in range(NUM_PARTS):
        rkv_mutex_lock(&index.parts[i].mutex)
        out.memory_bytes += <uint64_t>index.parts[i].capacity * 5
        rkv_mutex_unlock(&index.parts[i].mutex)
    rkv_mutex_lock(&index.registering)
    for i in range(NUM_BLOCKS):
        out.memory_bytes += BLOCK_IDS if index.blocks[i] != NULL else 0
    rkv_mutex_unlock(&index.registering)
    unlock_shards(index, ALL_SHARDS)
    rkv_write_struct(callers, callers.struct_size, &out, sizeof(out))
    return RKV_OK


cdef public rkv_status rkv_index_dump(
    rkv_index *handle, rkv_index_page *pages, size_t max_pages, uint32_t *holders, size_t max_holders, size_t *num_pages,
    size_t *num_holders
) noexcept nogil:
    cdef Index *index = <Index *>handle
    cdef uint32_t i
    if handle == NULL or num_pages == NULL or num_holders == NULL:
        return rkv_leaf_fail(RKV_ERR_ARGUMENT, "index, num_pages or num_holders is NULL")
    if (pages == NULL and max_pages) or (holders == NULL and max_holders):
        return rkv_leaf_fail(RKV_ERR_ARGUMENT, "a buffer is NULL")
    num_pages[0] = 0
    num_holders[0] = 0
    lock_shards(index, ALL_SHARDS, False)
    for i in range(NUM_SHARDS):
        dump_shard(&index.shards[i], pages, max_pages, holders, max_holders, num_pages, num_holders)
    unlock_shards(index, ALL_SHARDS)
    if num_pages[0] > max_pages or num_holders[0] > max_holders:
        return rkv_leaf_fail(RKV_ERR_CAPACITY, "room for %zu of %zu pages, %zu of %zu holders", max_pages, num_pages[0],
                             max_holders, num_holders[0])
    return RKV_OK


cdef public rkv_status rkv_index_check_integrity(rkv_index *handle, char *message, size_t max_bytes) noexcept nogil:
    cdef Index *index = <Index *>handle
    cdef const char *broken
    cdef size_t i = 0
    if handle == NULL:
        return rkv_leaf_fail(RKV_ERR_ARGUMENT, "index is NULL")
    rkv_mutex_lock(&index.evicting)
    lock_shards(index, ALL_SHARDS, False)
    broken = check_all(index)
    unlock_shards(index, ALL_SHARDS)
    rkv_mutex_unlock(&index.evicting)
    if message != NULL and max_bytes:
        while broken != NULL and broken[i] and i + 1 < max_bytes:
            message[i] = broken[i]
            i += 1
        message[i] = 0
    return RKV_OK if broken == NULL else rkv_leaf_fail(RKV_ERR_INTEGRITY, "%s", broken)


# ------------------------------------------------------------------------------------------------------------- Python

cdef object failure(rkv_status status):
    """The exception for a status, with rkv_last_error's words."""
    cdef str text = (<bytes>rkv_last_error()).decode()
    if status == RKV_ERR_HANDLE:
        return HandleError(text)
    if status == RKV_ERR_NO_MEMORY:
        return AllocationError(text)
    if status == RKV_ERR_INTEGRITY:
        return IntegrityError(text)
    return InvalidArgumentError(text)


cdef struct Keys:           # borrowed or converted page keys, until release_keys
    const uint64_t *data
    uint32_t n
    void *owned
    Py_buffer view
    bint viewed


cdef int parse_key(object value, uint64_t *out) except -1:
    """One key from an int in -2**63 .. 2**64 - 1; negative ones are int64 bit patterns."""
    if not PyLong_Check(value) or isinstance(value, bool):
        try:
            value = value.__index__() if not isinstance(value, bool) else None
        except AttributeError:
            value = None
        if value is None:
            raise ArgumentTypeError("a page key must be an int")
    if value >= 0:
        if value >> 64:
            raise InvalidArgumentError(f"page key {value} does not fit 64 bits")
        out[0] = PyLong_AsUnsignedLongLong(value)
    else:
        if value < -(1 << 63):
            raise InvalidArgumentError(f"page key {value} does not fit 64 bits")
        out[0] = <uint64_t>PyLong_AsLongLong(value)
    return 0


cdef int keys_from_sequence(object keys, Keys *out) except -1:
    cdef list items = list(keys)
    cdef Py_ssize_t i, n = len(items)
    if n == 0:
        return 0
    if n > POS_MASK:
        raise InvalidArgumentError(f"{n} page keys in one call, at most {POS_MASK}")
    out.owned = malloc(<size_t>n * 8)
    if out.owned == NULL:
        raise AllocationError(f"no memory for {n} page keys")
    for i in range(n):
        parse_key(items[i], (<uint64_t *>out.owned) + i)
    out.data = <const uint64_t *>out.owned
    out.n = <uint32_t>n
    return 0


cdef int keys_from_buffer(object keys, Keys *out) except -1:
    cdef Py_ssize_t i, n
    cdef bytes code
    try:
        PyObject_GetBuffer(keys, &out.view, PyBUF_FORMAT | PyBUF_STRIDES)
    except (BufferError, ValueError) as error:
        raise ArgumentTypeError(f"page_keys: {error}") from None
    out.viewed = True
    code = out.view.format if out.view.format != NULL else b"B"
    if out.view.ndim != 1 or out.view.itemsize != 8 or code.lstrip(b"@=<") not in (b"Q", b"q", b"L", b"l"):
        raise ArgumentTypeError(f"page_keys must be one-dimensional uint64 or int64, got {out.view.ndim}d '{code.decode()}'")
    n = out.view.shape[0]
    if n > POS_MASK:
        raise InvalidArgumentError(f"{n} page keys in one call, at most {POS_MASK}")
    out.n = <uint32_t>n
    if out.view.strides[0] == 8 and (<size_t>out.view.buf & 7) == 0:
        out.data = <const uint64_t *>out.view.buf
        return 0
    out.owned = malloc(<size_t>n * 8 + 1)
    if out.owned == NULL:
        raise AllocationError(f"no memory for {n} page keys")
    for i in range(n):
        memcpy((<uint64_t *>out.owned) + i, <char *>out.view.buf + i * out.view.strides[0], 8)
    out.data = <const uint64_t *>out.owned
    return 0


cdef inline int get_keys(object keys, Keys *out) except -1:
    """Fast path: contiguous numpy uint64 or int64. On an exception nothing is held."""
    cdef cnp.ndarray a
    out.owned = NULL
    out.viewed = False
    out.n = 0
    out.data = NULL
    if cnp.PyArray_CheckExact(keys):
        a = <cnp.ndarray>keys
        if (
            (cnp.PyArray_TYPE(a) == cnp.NPY_UINT64 or cnp.PyArray_TYPE(a) == cnp.NPY_INT64) and cnp.PyArray_NDIM(a) == 1
            and cnp.PyArray_ISCARRAY_RO(a) and cnp.PyArray_DIM(a, 0) <= POS_MASK
        ):
            out.data = <const uint64_t *>cnp.PyArray_DATA(a)
            out.n = <uint32_t>cnp.PyArray_DIM(a, 0)
            return 0
    try:
        if isinstance(keys, (str, bytes, bytearray)) or keys is None:
            raise ArgumentTypeError(f"page_keys must be integers, got {type(keys).__name__}")
        if PyObject_CheckBuffer(keys):
            keys_from_buffer(keys, out)
        elif isinstance(keys, (list, tuple)):
            keys_from_sequence(keys, out)
        else:
            raise ArgumentTypeError(f"page_keys must be a uint64 buffer or a list of ints, got {type(keys).__name__}")
    except BaseException:
        release_keys(out)
        raise
    return 0


cdef inline void release_keys(Keys *keys) noexcept:
    if keys.viewed:
        PyBuffer_Release(&keys.view)
    free(keys.owned)


cdef inline uint32_t get_worker(object worker) except? NOWHERE:
    if not PyLong_Check(worker) or isinstance(worker, bool):
        if isinstance(worker, bool) or not hasattr(worker, "__index__"):
            raise ArgumentTypeError(f"worker must be an int, got {type(worker).__name__}")
        worker = worker.__index__()
    if worker < 0 or worker >= RKV_INDEX_MAX_WORKERS:
        raise InvalidArgumentError(f"worker {worker} is not in 0 .. {RKV_INDEX_MAX_WORKERS - 1}")
    return <uint32_t>worker


cdef struct Buffers:        # of a find that does not fit the stack
    void *block
    size_t bytes


cdef int make_room(rkv_index_hit *hit, Buffers *room, bint nodes) except -1:
    """Buffers for what the last try said, and a little more as others insert meanwhile."""
    cdef size_t w = hit.num_workers + 16, p = (hit.num_nodes + 16) if nodes else 0, h = (hit.num_holders + 64) if nodes else 0
    free(room.block)
    room.block = malloc(p * sizeof(rkv_index_node) + (2 * w + h) * 4)
    if room.block == NULL:
        raise AllocationError(f"no memory for {w} holders")
    hit.nodes = <rkv_index_node *>room.block if nodes else NULL
    hit.max_nodes = p
    hit.workers = <uint32_t *>(<char *>room.block + p * sizeof(rkv_index_node))
    hit.pages = hit.workers + w
    hit.max_workers = w
    hit.holders = hit.pages + w
    hit.max_holders = h
    return 0


@cython.final
cdef class PrefixIndex:
    """Who holds which prefix: a compressed, sharded radix forest. See PrefixIndexBase for the contract of every method.

    Args:
        max_pages: bound of known pages, >= 1; beyond it the least-recently-found leaf pages are evicted. None: no bound.
    """

    cdef rkv_index *handle
    cdef object max_pages_
    cdef object __weakref__

    def __cinit__(self, max_pages=None):
        cdef rkv_index_config config
        cdef rkv_status status
        memset(&config, 0, sizeof(config))
        config.struct_size = sizeof(config)
        if max_pages is not None:
            if not isinstance(max_pages, int) or isinstance(max_pages, bool):
                raise ArgumentTypeError(f"max_pages must be an int or None, got {type(max_pages).__name__}")
            if max_pages < 1 or max_pages >> 40:
                raise InvalidArgumentError(f"max_pages must be in 1 .. 2**40 - 1, got {max_pages}")
            config.max_pages = max_pages
        self.max_pages_ = max_pages
        status = rkv_index_create(&config, &self.handle)
        if status != RKV_OK:
            raise failure(status)

    def __dealloc__(self):
        rkv_index_destroy(self.handle)

    @property
    def max_pages(self):
        """The bound of known pages; None: no bound."""
        return self.max_pages_

    def insert(self, worker, page_keys, parent_key=None):
        """Record that the worker holds a chain of pages, the first one below parent_key (None: at a root).

        Args: worker 0 .. 2**20 - 1; page_keys one-dimensional, 64-bit. Returns: pages that it did not hold before.
        Raises InvalidArgumentError on a contradiction, ArgumentTypeError, AllocationError; nothing is changed then.
        """
        cdef Keys keys
        cdef uint32_t id = get_worker(worker)
        cdef uint64_t parent = 0, added = 0
        cdef const uint64_t *parent_at = NULL
        cdef rkv_status status
        if parent_key is not None:
            parse_key(parent_key, &parent)
            parent_at = &parent
        get_keys(page_keys, &keys)
        with nogil:
            status = rkv_index_insert(self.handle, id, keys.data, keys.n, parent_at, &added)
        release_keys(&keys)
        if status != RKV_OK:
            raise failure(status)
        return added

    def remove(self, worker, page_keys):
        """Record that the worker no longer holds exactly these pages, in any order. Returns: pages that it held."""
        cdef Keys keys
        cdef uint32_t id = get_worker(worker)
        cdef uint64_t removed = 0
        cdef rkv_status status
        get_keys(page_keys, &keys)
        with nogil:
            status = rkv_index_remove(self.handle, id, keys.data, keys.n, &removed)
        release_keys(&keys)
        if status != RKV_OK:
            raise failure(status)
        return removed

    def clear_worker(self, worker):
        """Drop all that the worker holds, not its id. Returns: pages. Costs what it held."""
        cdef uint32_t id = get_worker(worker)
        cdef uint64_t removed = 0
        with nogil:
            rkv_index_clear_worker(self.handle, id, &removed)
        return removed

    def remove_worker(self, worker):
        """Drop all that the worker holds, and its id. Returns: pages. Costs what it held."""
        cdef uint32_t id = get_worker(worker)
        cdef uint64_t removed = 0
        with nogil:
            rkv_index_remove_worker(self.handle, id, &removed)
        return removed

    def find(self, page_keys, nodes=False):
        """Tell who holds how many leading pages without a gap: {worker: pages}, zeros left out.

        nodes=True: a tuple of that and the whole known path as PathNodes, root first.
        """
        cdef Keys keys
        cdef rkv_index_hit hit
        cdef uint32_t workers[STACK]
        cdef uint32_t pages[STACK]
        cdef Buffers room
        cdef rkv_status status
        cdef bint path = bool(nodes)
        cdef size_t i
        cdef dict out
        room.block = NULL
        get_keys(page_keys, &keys)
        try:
            hit.struct_size = sizeof(hit)
            hit.workers = workers
            hit.pages = pages
            hit.max_workers = STACK
            hit.nodes = NULL
            if path:
                hit.num_workers = STACK
                hit.num_nodes = 16
                hit.num_holders = STACK
                make_room(&hit, &room, True)
            status = index_find(<Index *>self.handle, keys.data, keys.n, &hit, False)
            while status != RKV_OK:         # busy, or more holders than fit
                if status == RKV_ERR_CAPACITY:
                    make_room(&hit, &room, path)
                with nogil:
                    status = index_find(<Index *>self.handle, keys.data, keys.n, &hit, True)
            out = {}
            for i in range(hit.num_workers):
                PyDict_SetItem(out, hit.workers[i], hit.pages[i])
            if not path:
                return out
            return out, [
                PathNode(
                    hit.nodes[i].node, hit.nodes[i].first_page, hit.nodes[i].num_pages,
                    tuple([hit.holders[hit.nodes[i].first_holder + j] for j in range(hit.nodes[i].num_holders)]),
                    hit.nodes[i].word)
                for i in range(hit.num_nodes)
            ]
        finally:
            release_keys(&keys)
            free(room.block)

    def get_word(self, node):
        """The caller's 64 bits of a node. Raises HandleError if it is gone."""
        cdef uint64_t word = 0
        cdef rkv_node handle
        cdef rkv_status status
        parse_key(node, &handle)
        with nogil:
            status = rkv_index_get_word(self.handle, handle, &word)
        if status != RKV_OK:
            raise failure(status)
        return word

    def set_word(self, node, word):
        """Set the caller's 64 bits of a node. Raises HandleError if it is gone."""
        cdef uint64_t value
        cdef rkv_node handle
        cdef rkv_status status
        parse_key(node, &handle)
        parse_key(word, &value)
        with nogil:
            status = rkv_index_set_word(self.handle, handle, value)
        if status != RKV_OK:
            raise failure(status)

    def workers(self):
        """Registered worker ids, ascending."""
        cdef size_t n = rkv_load(&(<Index *>self.handle).num_workers), room
        cdef uint32_t *ids = NULL
        cdef rkv_status status = RKV_ERR_CAPACITY
        try:
            while status == RKV_ERR_CAPACITY:
                free(ids)
                room = n + 64
                ids = <uint32_t *>malloc(room * 4)
                if ids == NULL:
                    raise AllocationError(f"no memory for {room} worker ids")
                with nogil:
                    status = rkv_index_workers(self.handle, ids, room, &n)
            return [ids[i] for i in range(n)]
        finally:
            free(ids)

    def stats(self):
        """Counters as IndexStats, one snapshot."""
        cdef rkv_index_stats s
        s.struct_size = sizeof(s)
        with nogil:
            rkv_index_get_stats(self.handle, &s)
        return IndexStats(s.pages, s.entries, s.orphan_pages, s.workers, s.nodes, s.memory_bytes, s.evicted_pages)

    def dump(self):
        """Every known page, one snapshot: {key: (parent key or None, holders ascending)}."""
        cdef size_t num_pages = 0, num_holders = 0, room_pages, room_holders, i
        cdef rkv_index_page *pages = NULL
        cdef uint32_t *holders = NULL
        cdef rkv_status status = RKV_ERR_CAPACITY
        try:
            while status == RKV_ERR_CAPACITY:
                free(pages)
                free(holders)
                room_pages = num_pages + 64
                room_holders = num_holders + 64
                pages = <rkv_index_page *>malloc(room_pages * sizeof(rkv_index_page))
                holders = <uint32_t *>malloc(room_holders * 4)
                if pages == NULL or holders == NULL:
                    raise AllocationError(f"no memory to dump {room_pages} pages")
                with nogil:
                    status = rkv_index_dump(
                        self.handle, pages, room_pages, holders, room_holders, &num_pages, &num_holders)
            return {
                pages[i].key: (
                    pages[i].parent_key if pages[i].has_parent else None,
                    tuple([holders[pages[i].first_holder + j] for j in range(pages[i].num_holders)]),
                )
                for i in range(num_pages)
            }
        finally:
            free(pages)
            free(holders)

    def check_integrity(self):
        """Verify every invariant from scratch, O(index). Raises IntegrityError."""
        cdef rkv_status status
        with nogil:
            status = rkv_index_check_integrity(self.handle, NULL, 0)
        if status != RKV_OK:
            raise failure(status)

    def __repr__(self):
        return f"PrefixIndex(max_pages={self.max_pages_}, {self.stats()})"


PrefixIndexBase.register(PrefixIndex)
