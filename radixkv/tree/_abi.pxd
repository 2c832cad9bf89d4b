"""What the C side offers: the types of the public header, and the leaves of csrc/src."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t


cdef extern from "radixkv/radixkv.h" nogil:
    ctypedef int32_t rkv_status
    ctypedef uint64_t rkv_node
    ctypedef struct rkv_tree:
        pass

    enum:
        RKV_ABI_VERSION
        RKV_OK
        RKV_ERR_ARGUMENT
        RKV_ERR_HANDLE
        RKV_ERR_LOCK
        RKV_ERR_STATE
        RKV_ERR_OWNERSHIP
        RKV_ERR_NO_MEMORY
        RKV_ERR_INTEGRITY
        RKV_ERR_CAPACITY
        RKV_POLICY_LRU
        RKV_POLICY_LFU
        RKV_POLICY_FIFO
        RKV_POLICY_MRU
        RKV_POLICY_FILO
        RKV_POLICY_PRIORITY
        RKV_POLICY_SLRU
        RKV_POLICY_END
        RKV_TREE_EVENTS
        RKV_EVENT_STORED
        RKV_EVENT_REMOVED
        RKV_EVENT_CLEARED
        RKV_MEDIUM_DEVICE
        RKV_MEDIUM_HOST
        RKV_NEXT_HOST
        RKV_NEXT_STORAGE

    ctypedef void *(*rkv_realloc_fn)(void *ctx, void *ptr, size_t old_bytes, size_t new_bytes) noexcept nogil

    ctypedef struct rkv_allocator:
        rkv_realloc_fn reallocate
        void *ctx

    ctypedef struct rkv_page_run:
        uint32_t struct_size
        int32_t page_size
        const void *ns
        size_t ns_bytes
        const uint8_t *parent
        const int32_t *tokens
        size_t num_pages
        uint8_t *digests

    ctypedef void (*rkv_page_hash_fn)(void *ctx, const rkv_page_run *run) noexcept nogil

    ctypedef struct rkv_tree_config:
        uint32_t struct_size
        int32_t page_size
        int32_t policy
        uint32_t flags
        uint64_t max_events
        rkv_page_hash_fn page_hash
        void *page_hash_ctx
        uint32_t digest_bytes
        rkv_allocator allocator

    ctypedef struct rkv_key:
        uint32_t struct_size
        const void *ns
        size_t ns_bytes
        const int32_t *tokens
        size_t num_tokens

    ctypedef struct rkv_match:
        uint32_t struct_size
        uint64_t tree_id
        uint64_t namespace_id
        int64_t num_tokens
        int64_t host_num_tokens
        rkv_node device_node
        rkv_node host_node
        int64_t loading_tokens

    ctypedef struct rkv_insert:
        uint32_t struct_size
        int64_t prefix_tokens
        rkv_node node
        uint64_t num_duplicates

    ctypedef struct rkv_backup:
        rkv_node node
        uint64_t first_page
        uint64_t num_pages

    ctypedef struct rkv_freed:
        uint32_t struct_size
        int64_t num_tokens
        int32_t *page_ids
        uint64_t num_pages
        int32_t *host_page_ids
        uint64_t num_host_pages
        rkv_backup *backups
        uint64_t num_backups
        int32_t *backup_page_ids
        uint64_t num_backup_pages
        uint64_t capacity_[4]
        rkv_allocator allocator_

    ctypedef struct rkv_event:
        int32_t kind
        int32_t medium
        int32_t has_parent
        int32_t has_tokens
        uint64_t key
        uint64_t parent_key

    ctypedef struct rkv_node_info:
        uint32_t struct_size
        int32_t on_device
        int32_t on_host
        int32_t loading
        int32_t backup_pending
        int32_t pinned
        int32_t priority
        uint32_t lock_ref
        uint32_t host_ref
        uint32_t hit_count
        rkv_node parent
        int64_t num_tokens
        int64_t path_tokens
        int64_t pinned_until_ns
        uint64_t access_time
        uint64_t created_time
        uint64_t num_children
        uint64_t ns_bytes
        uint32_t marks
        uint32_t reserved

    ctypedef struct rkv_tree_stats:
        uint32_t struct_size
        uint32_t page_size
        int64_t evictable_tokens
        int64_t protected_tokens
        int64_t pending_tokens
        int64_t host_tokens
        uint64_t nodes
        uint64_t namespaces
        uint64_t pinned_nodes
        uint64_t memory_bytes
        uint64_t digest_memory_bytes
        uint64_t queued_events
        uint64_t dropped_events
        int64_t host_evictable_tokens
        int64_t loading_tokens

    ctypedef struct rkv_tier_check:
        uint32_t struct_size
        int64_t capacity_pages
        const int32_t *free_page_ids
        uint64_t num_free_pages

    ctypedef struct rkv_api:
        pass
    const rkv_api *rkv_get_api(uint32_t abi_version)
    const char *rkv_last_error()
    const char *rkv_version()


cdef extern from "abi_tree.h" nogil:
    enum:
        TREE_CONFIG_SIZE "RKV_TREE_CONFIG_SIZE_V1"
        KEY_SIZE "RKV_KEY_SIZE_V1"
        MATCH_SIZE "RKV_MATCH_SIZE_V1"
        INSERT_SIZE "RKV_INSERT_SIZE_V1"
        FREED_SIZE "RKV_FREED_SIZE_V1"
        NODE_INFO_SIZE "RKV_NODE_INFO_SIZE_V1"
        TREE_STATS_SIZE "RKV_TREE_STATS_SIZE_V1"
        TIER_CHECK_SIZE "RKV_TIER_CHECK_SIZE_V1"
        MATCH_LOADING_SIZE "RKV_MATCH_LOADING_SIZE"
        NODE_INFO_MARKS_SIZE "RKV_NODE_INFO_MARKS_SIZE"
        TREE_STATS_TIERS_SIZE "RKV_TREE_STATS_TIERS_SIZE"


cdef extern from "status.h" nogil:
    rkv_status fail "rkv_leaf_fail"(rkv_status status, const char *format, ...)


cdef extern from "memory.h" nogil:
    void *rkv_leaf_reallocate(void *ctx, void *ptr, size_t old_bytes, size_t new_bytes)


cdef extern from "compare.h" nogil:
    size_t common_prefix "rkv_leaf_common_prefix"(const int32_t *a, const int32_t *b, size_t n)


cdef extern from "hash.h" nogil:
    uint64_t mix "rkv_leaf_mix"(uint64_t x)
    uint32_t child_hash "rkv_leaf_child_hash"(uint64_t seed, uint32_t parent, const int32_t *tokens, size_t page_size)
    uint64_t namespace_seed "rkv_leaf_namespace_seed"(const uint8_t *bytes, size_t n)
    uint64_t page_chain "rkv_leaf_page_chain"(uint64_t parent, const int32_t *tokens, size_t page_size)
    void store_be64 "rkv_leaf_store_be64"(uint8_t *out, uint64_t x)
    uint64_t load_be64 "rkv_leaf_load_be64"(const uint8_t *bytes)


cdef extern from "order.h" nogil:
    ctypedef struct Entry "rkv_order_entry":
        uint64_t minor
        uint32_t major
        uint32_t node
    bint before "rkv_order_before"(const Entry *a, const Entry *b)
    uint32_t first_of_four "rkv_order_first_of_four"(const Entry *siblings)


cdef extern from "sync.h" nogil:
    ctypedef struct rkv_rwlock:
        pass
    int rwlock_create "rkv_rwlock_init"(rkv_rwlock *lock)
    void rwlock_destroy "rkv_rwlock_destroy"(rkv_rwlock *lock)
    void rwlock_read "rkv_lock_shared"(rkv_rwlock *lock)
    void rwlock_write "rkv_lock_exclusive"(rkv_rwlock *lock)
    bint rwlock_try_write "rkv_try_lock_exclusive"(rkv_rwlock *lock)
    void rwlock_release "rkv_unlock"(rkv_rwlock *lock)
    uint64_t process_secret "rkv_process_secret"()
    uint64_t unique_id "rkv_unique_id"(const void *address)
    int ctz64 "rkv_lowest_bit"(uint64_t x)
    int log2_32 "rkv_log2"(uint64_t x)
    int popcount64 "rkv_count_bits"(uint64_t x)
    void prefetch "rkv_prefetch"(const void *p)
