"""The state of rkv_index, and the memory that all of it comes from.

    rkv_index
      parts[64]    THE DIRECTORY: page key -> where the page is (shard and position), 5 bytes a slot, a mutex a part
      shards[33]   32 by the first key of a chain, and one for ORPHANS; a reader-writer lock each
        arena      page keys of all runs, in chunks that never move, and beside each key the node that owns it
        nodes      runs of pages with the same holders, linked as a forest under node 0 (parent, first child, siblings)
        heads      (parent node, first key) -> node: how find goes down
        waits      orphans only: missing parent key -> the heads that wait for it
        sets       holder sets, interned: equal sets are one set; each links the nodes that have it
        members    the (worker, set) pairs of all sets; linked by worker, so that a worker's sets and nodes are at hand
        heap       leaves by the time they were found last, with max_pages only
    registry     for each worker id, how many shards know it, so that ids are counted and listed without a look at the shards

Locks are taken in this order: shards ascending (ORPHANS last), then one directory part or the registry; the GIL never inside them.
What a shard holds changes under its exclusive lock only, and so do the directory's entries that point into it. Hence a look-up in the
directory is a hint until that shard is locked and the look-up repeated. A reader of the directory confirms a key in the arena
of a shard that it has not locked: that is sound, because a key is written before its entry appears and kept until it is gone.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memmove, memset


cdef extern from "radixkv/radixkv.h" nogil:
    ctypedef int32_t rkv_status
    ctypedef uint64_t rkv_node
    ctypedef struct rkv_index:
        pass
    enum:
        RKV_OK
        RKV_ERR_ARGUMENT
        RKV_ERR_HANDLE
        RKV_ERR_NO_MEMORY
        RKV_ERR_INTEGRITY
        RKV_ERR_CAPACITY
    uint32_t RKV_INDEX_MAX_WORKERS
    ctypedef void *(*rkv_realloc_fn)(void *ctx, void *ptr, size_t old_bytes, size_t new_bytes) noexcept nogil
    ctypedef struct rkv_allocator:
        rkv_realloc_fn reallocate
        void *ctx
    ctypedef struct rkv_index_config:
        uint32_t struct_size
        uint64_t max_pages
        rkv_allocator allocator
    ctypedef struct rkv_index_node:
        rkv_node node
        uint64_t word
        uint64_t first_page
        uint64_t num_pages
        uint64_t first_holder
        uint64_t num_holders
    ctypedef struct rkv_index_hit:
        uint32_t struct_size
        uint32_t *workers
        uint32_t *pages
        size_t max_workers
        size_t num_workers
        rkv_index_node *nodes
        size_t max_nodes
        size_t num_nodes
        uint32_t *holders
        size_t max_holders
        size_t num_holders
    ctypedef struct rkv_index_stats:
        uint32_t struct_size
        uint64_t pages
        uint64_t entries
        uint64_t orphan_pages
        uint64_t workers
        uint64_t nodes
        uint64_t memory_bytes
        uint64_t evicted_pages
    ctypedef struct rkv_index_page:
        uint64_t key
        uint64_t parent_key
        uint32_t has_parent
        uint32_t orphan
        uint64_t first_holder
        uint64_t num_holders
    const char *rkv_last_error()

cdef extern from "status.h" nogil:
    rkv_status rkv_leaf_fail(rkv_status status, const char *format, ...)

cdef extern from "abi_sizes.h" nogil:
    uint32_t RKV_INDEX_CONFIG_SIZE_V1
    uint32_t RKV_INDEX_HIT_SIZE_V1
    uint32_t RKV_INDEX_STATS_SIZE_V1
    void rkv_read_struct(void *ours, size_t our_bytes, const void *callers, uint32_t their_bytes)
    void rkv_write_struct(void *callers, uint32_t their_bytes, const void *ours, size_t our_bytes)

cdef extern from "memory.h" nogil:
    void *rkv_leaf_reallocate(void *ctx, void *ptr, size_t old_bytes, size_t new_bytes)

cdef extern from "compare.h" nogil:
    size_t rkv_leaf_common_prefix(const int32_t *a, const int32_t *b, size_t n)

cdef extern from "sync.h" nogil:
    ctypedef struct rkv_rwlock:
        pass
    ctypedef struct rkv_mutex:
        pass
    int rkv_rwlock_init(rkv_rwlock *lock)
    void rkv_rwlock_destroy(rkv_rwlock *lock)
    void rkv_lock_shared(rkv_rwlock *lock)
    int rkv_try_lock_shared(rkv_rwlock *lock)
    void rkv_lock_exclusive(rkv_rwlock *lock)
    void rkv_unlock(rkv_rwlock *lock)
    int rkv_mutex_init(rkv_mutex *mutex)
    void rkv_mutex_destroy(rkv_mutex *mutex)
    void rkv_mutex_lock(rkv_mutex *mutex)
    void rkv_mutex_unlock(rkv_mutex *mutex)
    uint64_t rkv_load(const uint64_t *word)
    void rkv_store(uint64_t *word, uint64_t value)
    uint64_t rkv_add(uint64_t *word, uint64_t value)
    uint64_t rkv_unique_id(const void *address)
    int rkv_log2(uint64_t x)
    int rkv_lowest_bit(uint64_t x)
    void rkv_prefetch(const void *p)


cdef enum:
    ORPHANS = 32            # the shard of chains whose parent is unknown
    NUM_SHARDS = 33
    NUM_PARTS = 64
    NUM_CHUNKS = 16         # chunk k of an arena has 1024 << k pages
    CHUNK_LOG2 = 10
    NUM_CLASSES = 27        # free extents by log2 of their pages
    POS_BITS = 26           # a place is shard << POS_BITS | position
    POS_MASK = 0x3ffffff
    FREE = 0x80000000       # in owner[]: the first and last page of a free extent, with its pages
    CLAIMED = 0x7fffffff    # in owner[]: in the directory for an insert that goes on, no node yet
    NOWHERE = 0xffffffff
    NO_PAGES = 0xffffffff
    MAX_SLACK = 64          # pages kept behind a run that grows
    GEN_MASK = 0x3ffffff
    NUM_BLOCKS = 1024       # of the registry: RKV_INDEX_MAX_WORKERS / BLOCK_IDS
    BLOCK_IDS = 1024

cdef struct Node:
    uint64_t *keys          # its run, in the arena at pos
    uint64_t word           # the caller's. A head among the orphans: the missing parent's key
    uint64_t stamp          # clock of the last find; atomic, as find holds a shared lock
    uint32_t pos
    uint32_t num_pages      # 0: a free slot
    uint32_t capacity       # pages that it owns in the arena, >= num_pages
    uint32_t parent         # 0: a root (node 0 has no pages)
    uint32_t first_child
    uint32_t next_sibling   # a free slot: the next one
    uint32_t prev_sibling
    uint32_t set            # its holders; 0: none, a gap
    uint32_t next_in_set
    uint32_t prev_in_set
    uint32_t generation
    uint32_t in_heap

cdef struct Member:
    uint32_t worker
    uint32_t set
    uint32_t next           # the worker's next member; 0: none
    uint32_t prev

cdef struct HolderSet:
    uint64_t hash           # xor of the hashes of its workers
    uint32_t first          # its members, ascending by worker. A free slot: the next one
    uint32_t size           # 0: a free slot
    uint32_t room_log2
    uint32_t num_nodes
    uint32_t first_node
    uint32_t unused

cdef struct Worker:
    uint32_t id_plus_1      # 0: a free slot
    uint32_t first          # its first member; 0: none

cdef struct HeapEntry:
    uint64_t stamp          # <= the node's
    uint32_t node
    uint32_t unused

cdef struct Table:          # open addressing over node or set ids, 0: empty; backward shift on removal
    uint32_t *slots
    uint32_t mask           # slots NULL: 0
    uint32_t used

cdef struct Part:
    rkv_mutex mutex
    uint8_t *tags           # 0 empty, 1 tombstone, else 8 bits of the hash
    uint32_t *places
    uint32_t capacity
    uint32_t live
    uint32_t used           # live and tombstones
    uint32_t unused
    uint64_t hint_places    # atomic: places and capacity for whoever prefetches without the mutex. May be old, and not of a pair
    uint64_t hint_capacity

cdef struct Shard:
    rkv_rwlock lock
    uint32_t id
    uint32_t first_generation           # of every node slot; differs from index to index
    uint32_t num_nodes      # slots ever used, node 0 included
    uint32_t max_nodes
    uint32_t free_node
    uint32_t live_nodes     # node 0 excluded
    Node *nodes
    Table heads
    Table waits
    uint64_t *chunk_keys[NUM_CHUNKS]
    uint32_t *chunk_owners[NUM_CHUNKS]
    uint32_t touched[NUM_CHUNKS]        # pages of the chunk ever used: the rest costs no memory yet
    uint32_t extents[NUM_CLASSES]       # first free extent of the class, position + 1
    uint32_t classes                    # bit c: extents[c] is not empty
    uint32_t num_sets                   # slots ever used, set 0 included
    uint32_t max_sets
    uint32_t free_set
    HolderSet *sets
    Table by_members
    Member *members
    uint32_t num_members                # ever used, member 0 included
    uint32_t max_members
    uint32_t free_members[32]           # by log2 of the room; linked through Member.next
    Worker *workers
    uint32_t worker_mask                # workers NULL: 0
    uint32_t num_workers
    HeapEntry *heap
    uint32_t heap_size
    uint32_t max_heap
    uint64_t pages
    uint64_t entries
    uint64_t oldest         # atomic: no leaf of this shard has a smaller stamp; all ones: no leaf
    uint64_t want_nodes     # of the operation that goes on, see index_insert and index_remove
    uint64_t want_sets
    uint64_t want_members

cdef struct Index:
    rkv_allocator allocator
    uint64_t memory_bytes   # atomic
    uint64_t max_pages      # 0: no bound
    uint64_t pages          # atomic
    uint64_t evicted        # atomic
    uint64_t clock          # atomic
    uint64_t orphan_heads   # atomic; changes under the orphans' lock. Those being inserted count already
    rkv_mutex registering   # the registry's
    uint64_t num_workers    # atomic; ids whose count is not 0
    uint8_t *blocks[NUM_BLOCKS]     # counts of BLOCK_IDS worker ids each; NULL: none of them was ever registered
    rkv_mutex evicting      # taken before any shard: evictions go one by one, so that none frees more than it must
    Part parts[NUM_PARTS]
    Shard shards[NUM_SHARDS]


cdef inline uint64_t mix(uint64_t x) noexcept nogil:
    """A permutation of 64 bits (MurmurHash3's finaliser): keys may be small integers in tests, and each field below wants other bits."""
    x ^= x >> 33
    x *= <uint64_t>0xff51afd7ed558ccdULL
    x ^= x >> 33
    x *= <uint64_t>0xc4ceb9fe1a85ec53ULL
    x ^= x >> 33
    return x


cdef inline uint32_t minimum(uint64_t a, uint64_t b) noexcept nogil:
    return <uint32_t>(a if a < b else b)


cdef inline void *resize(Index *index, void *block, uint64_t old_bytes, uint64_t new_bytes) noexcept nogil:
    """realloc by the index's allocator, counted. NULL: no memory (block is as it was), or new_bytes is 0."""
    cdef void *moved = index.allocator.reallocate(index.allocator.ctx, block, old_bytes, new_bytes)
    if moved != NULL or new_bytes == 0:
        rkv_add(&index.memory_bytes, new_bytes - old_bytes)
    return moved


cdef inline Shard *shard_of(Index *index, uint64_t root_key) noexcept nogil:
    """The shard of the chains that start with this key."""
    return &index.shards[(mix(root_key) >> 3) % ORPHANS]


cdef inline uint32_t grown(uint64_t used, uint64_t more, uint64_t least) noexcept nogil:
    """The new capacity of an array that must take `more` items: half as much again, at least."""
    cdef uint64_t wanted = used + more
    if wanted < used + (used >> 1):
        wanted = used + (used >> 1)
    return <uint32_t>(wanted if wanted > least else least)
