/* radixkv.h -- the C ABI of radixkv, version 1. The only header that an engine or a gateway includes.
 *
 * libradixkv.so.1 needs libc and nothing else (no Python). Two ways in:
 *   - link it (pkg-config radixkv, or radixkv.get_library_path()) and call the functions below by name;
 *   - dlopen it, look up rkv_get_api, and call through the table that it returns. The table also comes from Python as a
 *     PyCapsule named "radixkv._C_API" (radixkv.tree.core._C_API), for engines that live in one process with Python.
 *
 * RULES THAT HOLD EVERYWHERE
 *   Units      num_tokens are tokens, num_pages are pages of page_size tokens, ids are int32 page ids >= 0, *_ns are
 *              nanoseconds, *_bytes are bytes. A tail of a key that is shorter than a page is ignored.
 *   Status     Functions return RKV_OK (0) or a negative rkv_status. A call that fails leaves the object as it was, and its
 *              outputs undefined. rkv_last_error() then says in words, with the numbers, what was wrong.
 *   Structs    Structs that cross this border begin with struct_size. The caller sets it to sizeof(struct) before the
 *              call, for inputs and outputs alike (RKV_INIT does). Structs and the table grow only at their end, and a library takes
 *              the shorter structs of every host built against an earlier header of its ABI version. The few that are elements of an
 *              array or part of another struct (rkv_allocator, rkv_backup, rkv_event, rkv_index_node, rkv_index_page) have no
 *              struct_size and never change within a version.
 *   Ownership  Inputs are copied, never kept. Outputs go to buffers of the caller, but for rkv_freed, which the library
 *              grows and rkv_freed_release frees. The tree never calls the engine's allocator: what leaves the tree is
 *              returned, and belongs to the caller from then on.
 *   Handles    An rkv_node is an index and a generation. It names the END of its node: the tokens from the root to there
 *              never change while it is alive. When the node is gone every use is RKV_ERR_HANDLE, never a wild read. A handle of
 *              another tree is refused likewise (save for a chance of about 2^-32: handles carry a per-tree salt).
 *   Threads    Every rkv_tree_* function may run beside every other, on the same tree, from any thread, but for
 *              rkv_tree_destroy, which must come last. Inside is a reader-writer lock: peek, peek_many, stats, node_*, nodes,
 *              due, path, host_path and check_integrity share it; all others exclude. rkv_freed and buffers belong to one thread at a time.
 *              rkv_index_*: see there. A page-hash callback and an allocator are called under the lock: they must not call back
 *              into the same tree.
 *   Memory     Allocation failure is RKV_ERR_NO_MEMORY and leaves the tree as it was.
 */
#ifndef RADIXKV_RADIXKV_H
#define RADIXKV_RADIXKV_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(RKV_BUILDING) && defined(__GNUC__)
#define RKV_API __attribute__((visibility("default")))
#else
#define RKV_API
#endif

#define RKV_ABI_VERSION 1u

/* Zero a struct and set its struct_size: rkv_match m; RKV_INIT(&m); */
#define RKV_INIT(p)                                                                                                   \
    do {                                                                                                              \
        unsigned char *rkv_init_bytes_ = (unsigned char *)(p);                                                        \
        size_t rkv_init_i_;                                                                                           \
        for (rkv_init_i_ = 0; rkv_init_i_ < sizeof *(p); rkv_init_i_++) rkv_init_bytes_[rkv_init_i_] = 0;             \
        (p)->struct_size = (uint32_t)sizeof *(p);                                                                     \
    } while (0)

/* ---------------------------------------------------------------------------------------------------------- status */

typedef int32_t rkv_status;

enum {
    RKV_OK = 0,
    RKV_ERR_ARGUMENT = -1,  /* a NULL, a negative count, a wrong length, a struct_size that is too small */
    RKV_ERR_HANDLE = -2,    /* stale or foreign node handle, or a match of another tree */
    RKV_ERR_LOCK = -3,      /* unlock without lock, release without protect, deleting what is in use */
    RKV_ERR_STATE = -4,     /* node in the wrong state, e.g. locking a host-only node */
    RKV_ERR_OWNERSHIP = -5, /* a page id that is owned elsewhere in the tree, or twice in one call */
    RKV_ERR_NO_MEMORY = -6, /* the library's own bookkeeping could not grow */
    RKV_ERR_INTEGRITY = -7, /* check_integrity found a broken invariant */
    RKV_ERR_CAPACITY = -8,  /* the caller's buffer is too small; the count output says what is needed */
    RKV_STATUS_END = -9     /* no status is this low */
};

/* A constant English string for a status, never NULL ("unknown status" for others). Never freed. Any thread. */
RKV_API const char *rkv_status_string(rkv_status status);

/* What the last failing call of THIS thread was about, with its numbers; "" before any. Valid until the next failure in
 * this thread. */
RKV_API const char *rkv_last_error(void);

/* "major.minor.patch" of the library. Never freed. */
RKV_API const char *rkv_version(void);

/* --------------------------------------------------------------------------------------------------------- memory */

/* One function for all of a tree's memory: like realloc(ptr, new_bytes), with old_bytes passed in.
 * Called from any thread that uses the tree, and from several at once: it must be thread-safe, and outlive the tree and every rkv_freed
 * that the tree has filled. ptr NULL: allocate. new_bytes 0: free, returns NULL. Failure: returns NULL and ptr stays valid. Results are aligned to 16 bytes.
 * NULL in a config: the default, malloc for small blocks and mmap/mremap for large ones (so growth copies nothing and
 * untouched memory costs nothing). */
typedef void *(*rkv_realloc_fn)(void *ctx, void *ptr, size_t old_bytes, size_t new_bytes);

typedef struct rkv_allocator {
    rkv_realloc_fn reallocate;
    void *ctx;
} rkv_allocator;

/* ----------------------------------------------------------------------------------------------------------- tree */

typedef struct rkv_tree rkv_tree;

typedef uint64_t rkv_node;

/* The root of every namespace: always locked, holds no tokens, never freed. */
#define RKV_ROOT ((rkv_node)0)

/* Eviction order, smallest first; ties: the younger node first. */
enum {
    RKV_POLICY_LRU = 0,      /* access */
    RKV_POLICY_LFU = 1,      /* (hits, access) */
    RKV_POLICY_FIFO = 2,     /* created */
    RKV_POLICY_MRU = 3,      /* -access */
    RKV_POLICY_FILO = 4,     /* -created */
    RKV_POLICY_PRIORITY = 5, /* (priority, access) */
    RKV_POLICY_SLRU = 6,     /* (hits >= 2, access) */
    RKV_POLICY_END = 7
};

enum { RKV_TREE_EVENTS = 1u /* record KV events; see rkv_tree_take_events */ };

/* Input of a page-hash callback: a run of pages of one prefix. */
typedef struct rkv_page_run {
    uint32_t struct_size;
    int32_t page_size;          /* tokens a page */
    const void *ns;             /* encoded namespace, ns_bytes long: mix it in where parent is NULL, or tenants share keys */
    size_t ns_bytes;
    const uint8_t *parent;      /* digest of the page before the run; NULL at the start of a prefix */
    const int32_t *tokens;      /* num_pages * page_size */
    size_t num_pages;
    uint8_t *digests;           /* OUT: num_pages * digest_bytes, chained: digest i is the parent of digest i + 1 */
} rkv_page_run;

typedef void (*rkv_page_hash_fn)(void *ctx, const rkv_page_run *run);

typedef struct rkv_tree_config {
    uint32_t struct_size;
    int32_t page_size;          /* 1 .. 65,536 tokens */
    int32_t policy;             /* RKV_POLICY_* */
    uint32_t flags;             /* RKV_TREE_* */
    uint64_t max_events;        /* bound of the event queue; 0 = 1,048,576 */
    rkv_page_hash_fn page_hash; /* NULL: a 64-bit chain of radixkv's own, for look-up only, not cryptographic */
    void *page_hash_ctx;
    uint32_t digest_bytes;      /* 8 .. 64, with page_hash only */
    uint32_t reserved;
    rkv_allocator allocator;    /* reallocate NULL: the default */
} rkv_tree_config;

/* Create a tree; config NULL is page_size 16 and lru. Destroy with rkv_tree_destroy (NULL is allowed there). */
RKV_API rkv_status rkv_tree_create(const rkv_tree_config *config, rkv_tree **out);
RKV_API void rkv_tree_destroy(rkv_tree *tree);

/* What a caller looks up or inserts. ns: the namespace (a LoRA adapter, a tenant salt ...) as opaque bytes, NULL and 0 for the default. */
typedef struct rkv_key {
    uint32_t struct_size;
    uint32_t reserved;
    const void *ns;
    size_t ns_bytes;
    const int32_t *tokens;
    size_t num_tokens;
} rkv_key;

/* A look-up's answer, and the hint for insert and match_extend. A plain value: copy it, keep it, drop it. */
typedef struct rkv_match {
    uint32_t struct_size;
    uint32_t reserved;
    uint64_t tree_id;           /* which tree */
    uint64_t namespace_id;      /* which namespace (a hash of its bytes) */
    int64_t num_tokens;         /* of the hit, with pages on the device */
    int64_t host_num_tokens;    /* of the hit beyond num_tokens, with pages on the host only */
    rkv_node device_node;       /* end of the device part, or RKV_ROOT */
    rkv_node host_node;         /* end of the whole hit; equal to device_node if host_num_tokens is 0 */
    int64_t loading_tokens;     /* of num_tokens, those whose load is not finished: wait for it before using them */
} rkv_match;

/* Find the longest cached prefix, stamp its path as used now, and split the node where the hit ends, so that device_node's
 * path is exactly num_tokens long (and host_node's num_tokens + host_num_tokens).
 * page_ids: NULL, or room for key->num_tokens / page_size ids: the device page ids, and right behind them the host page ids. */
RKV_API rkv_status rkv_tree_match(rkv_tree *tree, const rkv_key *key, int32_t *page_ids, rkv_match *out);

/* As match, but read-only. The nodes named are those that HOLD the last token of each part; their paths may be longer. */
RKV_API rkv_status rkv_tree_peek(rkv_tree *tree, const rkv_key *key, int32_t *page_ids, rkv_match *out);

/* num_keys peeks under one lock; out has num_keys entries, each with its struct_size set. */
RKV_API rkv_status rkv_tree_peek_many(rkv_tree *tree, const rkv_key *keys, size_t num_keys, rkv_match *out);

/* Go on from the end of an earlier match: more->tokens are those AFTER it, more->ns its namespace. The answer is for the whole key;
 * page_ids needs room for (prior->num_tokens + prior->host_num_tokens + more->num_tokens) / page_size ids.
 * RKV_ERR_HANDLE if prior's end has left the tree. */
RKV_API rkv_status rkv_tree_match_extend(rkv_tree *tree, const rkv_match *prior, const rkv_key *more, int32_t *page_ids,
                                         rkv_match *out);

typedef struct rkv_insert {
    uint32_t struct_size;
    uint32_t reserved;
    int64_t prefix_tokens;      /* insert: had device pages before. insert_host: were in the tree, on either tier */
    rkv_node node;              /* path is exactly the key; RKV_ROOT for an empty key */
    uint64_t num_duplicates;    /* ids written to duplicates */
} rkv_insert;

/* Insert a key with its device pages. The tree owns all ids from then on, but for the duplicates, which stay the caller's: the ids that
 * differ from the tree's at positions it had pages for already. num_pages must be key->num_tokens / page_size.
 * hint: NULL or an earlier match of a prefix of this key; verified, a stale one costs a full walk, one of another namespace or
 * longer than the key is RKV_ERR_ARGUMENT. duplicates: room for num_pages ids (NULL if num_pages is 0). */
RKV_API rkv_status rkv_tree_insert(rkv_tree *tree, const rkv_key *key, const int32_t *page_ids, size_t num_pages,
                                   const rkv_match *hint, int32_t priority, int32_t *duplicates, rkv_insert *out);

/* Insert pages that are on the host only (prefetched). Nodes that exist stay as they are and their positions' ids are duplicates,
 * unless equal to the tree's host ids. */
RKV_API rkv_status rkv_tree_insert_host(rkv_tree *tree, const rkv_key *key, const int32_t *host_page_ids,
                                        size_t num_pages, const rkv_match *hint, int32_t priority, int32_t *duplicates,
                                        rkv_insert *out);

/* Lock / unlock the path from node to the root. *delta (may be NULL): change of evictable tokens, <= 0 / >= 0. */
RKV_API rkv_status rkv_tree_lock(rkv_tree *tree, rkv_node node, int64_t *delta);
RKV_API rkv_status rkv_tree_unlock(rkv_tree *tree, rkv_node node, int64_t *delta);

/* Keep / give up this one node's host pages (no effect on the path). */
RKV_API rkv_status rkv_tree_protect_host(rkv_tree *tree, rkv_node node);
RKV_API rkv_status rkv_tree_release_host(rkv_tree *tree, rkv_node node);

/* Pin: protect the node, and so its path, until rkv_tree_expire is told a time >= until_ns. Pinning again replaces the time.
 * The clock is the caller's. unpin without pin: RKV_OK, *delta 0. */
RKV_API rkv_status rkv_tree_pin(rkv_tree *tree, rkv_node node, int64_t until_ns, int64_t *delta);
RKV_API rkv_status rkv_tree_unpin(rkv_tree *tree, rkv_node node, int64_t *delta);
RKV_API rkv_status rkv_tree_expire(rkv_tree *tree, int64_t now_ns, uint64_t *num_removed);

typedef struct rkv_backup {
    rkv_node node;              /* pass it to rkv_tree_finish_backup */
    uint64_t first_page;        /* its device pages: backup_page_ids[first_page .. first_page + num_pages) */
    uint64_t num_pages;
} rkv_backup;

/* Pages that left the tree. RKV_INIT it once, reuse it for any number of calls (each call replaces the content), then
 * rkv_freed_release. The arrays belong to the library; do not free or resize them. They come from the allocator of the first tree that
 * fills the struct, whichever trees fill it later: release it before that allocator goes. */
typedef struct rkv_freed {
    uint32_t struct_size;
    uint32_t reserved;
    int64_t num_tokens;         /* device tokens freed (evict_host: host tokens) */
    int32_t *page_ids;
    uint64_t num_pages;
    int32_t *host_page_ids;
    uint64_t num_host_pages;
    rkv_backup *backups;
    uint64_t num_backups;
    int32_t *backup_page_ids;
    uint64_t num_backup_pages;
    uint64_t capacity_[4];      /* the library's */
    rkv_allocator allocator_;   /* the library's */
} rkv_freed;

RKV_API void rkv_freed_release(rkv_freed *freed);

/* Free device pages, whole leaves in policy order, until num_tokens are freed; fewer is an answer, and so is none. A node with a host
 * copy becomes host-only; one without is deleted with its host-only descendants, or with backup != 0 marked pending and listed
 * in out->backups, children first: copy each to the host, then call finish_backup in the order of the list. Nodes with a host copy
 * that only wait for these count as freed when it stops, and leave in a further call. */
RKV_API rkv_status rkv_tree_evict(rkv_tree *tree, int64_t num_tokens, int32_t backup, rkv_freed *out);

/* host_page_ids NULL: there was no room, drop the node. See radixkv/tree/base.py for what happens if it was locked meanwhile. */
RKV_API rkv_status rkv_tree_finish_backup(rkv_tree *tree, rkv_node node, const int32_t *host_page_ids, size_t num_pages,
                                          rkv_freed *out);

/* Free host pages of host-only leaves with no host_ref, in policy order. */
RKV_API rkv_status rkv_tree_evict_host(rkv_tree *tree, int64_t num_tokens, rkv_freed *out);

/* A write-through is done: the last num_pages pages of node's path have a host copy now. */
RKV_API rkv_status rkv_tree_set_host(rkv_tree *tree, rkv_node node, const int32_t *host_page_ids, size_t num_pages);

/* Load back: give a host-only node device pages; loading != 0 protects it until finish_load. */
RKV_API rkv_status rkv_tree_set_device(rkv_tree *tree, rkv_node node, const int32_t *page_ids, size_t num_pages,
                                       int32_t loading);
RKV_API rkv_status rkv_tree_finish_load(rkv_tree *tree, rkv_node node, int32_t success, rkv_freed *out);

/* Split off the first num_tokens of the node's own run as a new upper node; the handle stays with the rest. */
RKV_API rkv_status rkv_tree_split_at(rkv_tree *tree, rkv_node node, int64_t num_tokens, rkv_node *upper);

/* Delete a subtree / a namespace / everything. The first two refuse (RKV_ERR_LOCK) what is in use; reset does not ask. */
RKV_API rkv_status rkv_tree_delete(rkv_tree *tree, rkv_node node, rkv_freed *out);
RKV_API rkv_status rkv_tree_delete_namespace(rkv_tree *tree, const void *ns, size_t ns_bytes, rkv_freed *out);
RKV_API rkv_status rkv_tree_reset(rkv_tree *tree, rkv_freed *out);

enum { RKV_EVENT_STORED = 0, RKV_EVENT_REMOVED = 1, RKV_EVENT_CLEARED = 2 };
enum { RKV_MEDIUM_DEVICE = 0, RKV_MEDIUM_HOST = 1 };

/* A page entered or left a tier. Keys: first 8 digest bytes, big-endian. */
typedef struct rkv_event {
    int32_t kind;
    int32_t medium;
    int32_t has_parent;         /* 0: the first page of a prefix, or no page at all (cleared) */
    int32_t has_tokens;         /* 1 for stored: the page's tokens are in the tokens buffer */
    uint64_t key;
    uint64_t parent_key;
} rkv_event;

/* Drain up to max_events, oldest first. tokens: room for max_events * page_size, tokens of event i start at i * page_size. */
RKV_API rkv_status rkv_tree_take_events(rkv_tree *tree, rkv_event *events, int32_t *tokens, size_t max_events,
                                        size_t *num_events);

/* Keys / digests of the node's own pages; *num_pages is always set to the number of pages. max_pages 0: count only. */
RKV_API rkv_status rkv_tree_page_keys(rkv_tree *tree, rkv_node node, uint64_t *keys, size_t max_pages, size_t *num_pages);
RKV_API rkv_status rkv_tree_page_digests(rkv_tree *tree, rkv_node node, uint8_t *digests, size_t max_pages,
                                         size_t *num_pages);

typedef struct rkv_node_info {
    uint32_t struct_size;
    int32_t on_device;          /* has device pages */
    int32_t on_host;            /* has host pages */
    int32_t loading;
    int32_t backup_pending;
    int32_t pinned;
    int32_t priority;
    uint32_t lock_ref;
    uint32_t host_ref;
    uint32_t hit_count;
    rkv_node parent;
    int64_t num_tokens;         /* of its own run */
    int64_t path_tokens;        /* from the root to its end */
    int64_t pinned_until_ns;
    uint64_t access_time;
    uint64_t created_time;
    uint64_t num_children;
    uint64_t ns_bytes;
    uint32_t marks;             /* the caller's; see rkv_tree_mark */
    uint32_t reserved;
} rkv_node_info;

RKV_API rkv_status rkv_tree_node_info(rkv_tree *tree, rkv_node node, rkv_node_info *out);

/* Copy a node's content; each pointer may be NULL. tokens: max_pages * page_size; ids: max_pages (untouched if the node has none on that
 * tier). RKV_ERR_CAPACITY if the node has more than max_pages. */
RKV_API rkv_status rkv_tree_node_data(rkv_tree *tree, rkv_node node, size_t max_pages, int32_t *tokens, int32_t *page_ids,
                                      int32_t *host_page_ids);

/* Copy the encoded namespace of a node; *ns_bytes is always set. */
RKV_API rkv_status rkv_tree_node_namespace(rkv_tree *tree, rkv_node node, void *ns, size_t max_bytes, size_t *ns_bytes);

/* All handles, parents before their children; *num_nodes is always set to the total. */
RKV_API rkv_status rkv_tree_nodes(rkv_tree *tree, rkv_node *nodes, size_t max_nodes, size_t *num_nodes);

typedef struct rkv_tree_stats {
    uint32_t struct_size;
    uint32_t page_size;
    int64_t evictable_tokens;   /* evictable + protected = all device tokens */
    int64_t protected_tokens;
    int64_t pending_tokens;     /* backup requested, not finished; counted in one of the two above too */
    int64_t host_tokens;        /* every token with a host copy */
    uint64_t nodes;             /* roots excluded */
    uint64_t namespaces;
    uint64_t pinned_nodes;
    uint64_t memory_bytes;      /* resident memory of the tree, digests apart */
    uint64_t digest_memory_bytes;
    uint64_t queued_events;
    uint64_t dropped_events;
    int64_t host_evictable_tokens; /* of host_tokens, what rkv_tree_evict_host could free now, asked for everything */
    int64_t loading_tokens;     /* load not finished; counted in protected_tokens too */
} rkv_tree_stats;

RKV_API rkv_status rkv_tree_get_stats(rkv_tree *tree, rkv_tree_stats *out);

/* The slots of one tier outside the tree, for the law tree + free = capacity. */
typedef struct rkv_tier_check {
    uint32_t struct_size;
    uint32_t reserved;
    int64_t capacity_pages;     /* < 0: do not check this tier */
    const int32_t *free_page_ids;
    uint64_t num_free_pages;
} rkv_tier_check;

/* Verify every invariant from scratch, O(tree). device, host: NULL or the tier's free slots. message: NULL or room for max_bytes, gets
 * the first broken invariant. Returns RKV_OK, RKV_ERR_INTEGRITY, or RKV_ERR_NO_MEMORY. */
RKV_API rkv_status rkv_tree_check_integrity(rkv_tree *tree, const rkv_tier_check *device, const rkv_tier_check *host,
                                            char *message, size_t max_bytes);

/* ---------------------------------------------------------------------------------------------------------- index */

/* rkv_index: who holds which prefix, for up to thousands of workers. What routers ask for every request.
 *
 *   Keys       A page key is 64 bits and names a page TOGETHER with everything before it (a chained hash), so a key has one place. Every
 *              value is a key, 0 too. Workers are integers below RKV_INDEX_MAX_WORKERS.
 *   Meaning    radixkv/tree/index_base.py is the contract: gaps, orphans, contradictions, eviction. All of it holds here.
 *   Threads    Every rkv_index_* function may run beside every other on the same index, but for rkv_index_destroy, which must
 *              come last. Chains are spread over 32 shards by their first key, each with a reader-writer lock of its own; orphans
 *              have a 33rd. find and the words share one shard's lock, and so does an insert of what the worker holds already;
 *              any other insert excludes one (two when it joins orphans); remove those that its keys are in; clear_worker and
 *              remove_worker one after the other; get_stats and dump share all, workers none. Calls that touch one shard are
 *              atomic; clear_worker and remove_worker are atomic a shard. An allocator is called under locks and by many
 *              threads at once: it must be thread-safe and must not call back into the index.
 *   Limit      If all chains begin with one page (one system prompt), they are all in one shard: inserts that change something
 *              then go one at a time. Fix: several indexes, chosen by a page behind the common ones.
 *   Handles    As the tree's, but for orphans, which have none until they are found. A handle of another index, one that is destroyed
 *              included, is refused save for a chance of about 2^-26 (a random start of 26-bit generations; none comes twice).
 *   Growth     rkv_index_config, _hit and _stats may grow at their end. rkv_index_node and rkv_index_page never do: they come in arrays.
 *   Failure    A call that fails leaves every page, holder and word as it was. */
typedef struct rkv_index rkv_index;

#define RKV_INDEX_MAX_WORKERS 1048576u

typedef struct rkv_index_config {
    uint32_t struct_size;
    uint32_t reserved;
    uint64_t max_pages;         /* 0: no bound. Else least-recently-found leaf pages are evicted beyond it */
    rkv_allocator allocator;    /* reallocate NULL: the default */
} rkv_index_config;

/* Create an index; config NULL is no bound. Destroy with rkv_index_destroy (NULL is allowed there). *out is NULL on failure:
 * RKV_ERR_ARGUMENT, or RKV_ERR_NO_MEMORY (of the allocator, or of the system for a lock). */
RKV_API rkv_status rkv_index_create(const rkv_index_config *config, rkv_index **out);
RKV_API void rkv_index_destroy(rkv_index *index);

/* The worker holds these pages, each one the child of the one before it; the first is the child of *parent_key, or starts a prefix if that is
 * NULL. An unknown parent keeps them as orphans until it is known. *num_added (may be NULL): pages that it did not
 * hold before. RKV_ERR_ARGUMENT if a key is known under another parent (or is its own ancestor). num_pages 0 registers the id. */
RKV_API rkv_status rkv_index_insert(rkv_index *index, uint32_t worker, const uint64_t *page_keys, size_t num_pages,
                                    const uint64_t *parent_key, uint64_t *num_added);

/* The worker no longer holds exactly these pages, in any order; those that it does not hold are skipped. */
RKV_API rkv_status rkv_index_remove(rkv_index *index, uint32_t worker, const uint64_t *page_keys, size_t num_pages,
                                    uint64_t *num_removed);

/* Drop all that a worker holds / and its id too. Cost: proportional to what it held. Never needs memory. */
RKV_API rkv_status rkv_index_clear_worker(rkv_index *index, uint32_t worker, uint64_t *num_removed);
RKV_API rkv_status rkv_index_remove_worker(rkv_index *index, uint32_t worker, uint64_t *num_removed);

/* One node of a found path: a run of pages with the same holders. */
typedef struct rkv_index_node {
    rkv_node node;              /* handle, for the word */
    uint64_t word;              /* the caller's; 0 at first */
    uint64_t first_page;        /* its pages on this path: page_keys[first_page .. first_page + num_pages) */
    uint64_t num_pages;
    uint64_t first_holder;      /* its holders, ascending: hit.holders[first_holder .. first_holder + num_holders) */
    uint64_t num_holders;
} rkv_index_node;

/* The answer of a find; the buffers are the caller's. nodes NULL: no path wanted, and holders is not looked at. A buffer that is NULL with
 * room for some is RKV_ERR_ARGUMENT. */
typedef struct rkv_index_hit {
    uint32_t struct_size;
    uint32_t reserved;
    uint32_t *workers;          /* ascending */
    uint32_t *pages;            /* leading pages that workers[i] holds without a gap, >= 1 */
    size_t max_workers;
    size_t num_workers;
    rkv_index_node *nodes;
    size_t max_nodes;
    size_t num_nodes;
    uint32_t *holders;
    size_t max_holders;
    size_t num_holders;
} rkv_index_hit;

/* Who holds how much of this prefix. RKV_ERR_CAPACITY: a buffer is too small, and the num_* are upper bounds of what is needed
 * now (another thread may make it more). Without nodes the walk ends where the last worker drops out. */
RKV_API rkv_status rkv_index_find(rkv_index *index, const uint64_t *page_keys, size_t num_pages, rkv_index_hit *hit);

/* The caller's 64 bits of a node. Split: both parts get a copy, the handle stays with the LOWER part. Nodes join only if their
 * words are equal; the lower one's handle stays. */
RKV_API rkv_status rkv_index_get_word(rkv_index *index, rkv_node node, uint64_t *word);
RKV_API rkv_status rkv_index_set_word(rkv_index *index, rkv_node node, uint64_t word);

/* Registered ids, ascending; *num_workers is always set to the total. RKV_ERR_CAPACITY if there are more than max_workers. */
RKV_API rkv_status rkv_index_workers(rkv_index *index, uint32_t *workers, size_t max_workers, size_t *num_workers);

typedef struct rkv_index_stats {
    uint32_t struct_size;
    uint32_t reserved;
    uint64_t pages;             /* known: held, or with held descendants */
    uint64_t entries;           /* (page, holder) pairs */
    uint64_t orphan_pages;      /* of pages: not joined to a root */
    uint64_t workers;
    uint64_t nodes;
    uint64_t memory_bytes;      /* in use by the index */
    uint64_t evicted_pages;     /* so far, because of max_pages */
} rkv_index_stats;

RKV_API rkv_status rkv_index_get_stats(rkv_index *index, rkv_index_stats *out);

typedef struct rkv_index_page {
    uint64_t key;
    uint64_t parent_key;        /* if has_parent */
    uint32_t has_parent;
    uint32_t orphan;            /* not joined to a root */
    uint64_t first_holder;
    uint64_t num_holders;
} rkv_index_page;

/* Every known page, parents before children, as one snapshot. Both num_* are always set; RKV_ERR_CAPACITY as in find. */
RKV_API rkv_status rkv_index_dump(rkv_index *index, rkv_index_page *pages, size_t max_pages, uint32_t *holders,
                                  size_t max_holders, size_t *num_pages, size_t *num_holders);

/* Verify every invariant from scratch, O(index), beside which only find runs. message: NULL or room for max_bytes. */
RKV_API rkv_status rkv_index_check_integrity(rkv_index *index, char *message, size_t max_bytes);

/* ------------------------------------------------------------------------------------------ a controller of tiers */

/* Marks: a byte a node that is the caller's, for what the tree has no word for (a copy is in flight, a copy is in storage ...). 0 for a
 * new node, copied to both parts by a split, changed by nothing but this. First clear, then set; masks are 0 .. 255 and share no bit.
 * num_pages 0: this node alone; else the nodes that hold the last num_pages pages of its path, whole nodes only (it was split while the
 * copy ran). */
RKV_API rkv_status rkv_tree_mark(rkv_tree *tree, rkv_node node, uint32_t set, uint32_t clear, size_t num_pages);

enum { RKV_NEXT_HOST = 0, RKV_NEXT_STORAGE = 1 };

/* The nodes of the path root -> node that lack a copy in the next tier, root side first, of those with hit_count >= min_hits and none of
 * the marks without_marks. RKV_NEXT_HOST: on the device, no host copy, neither loading nor pending. RKV_NEXT_STORAGE: with a host copy
 * (what is in storage only the caller's marks tell). *num_nodes is always set to the total; max_nodes 0: count only;
 * RKV_ERR_CAPACITY if there are more than max_nodes. RKV_ROOT: none. */
RKV_API rkv_status rkv_tree_due(rkv_tree *tree, rkv_node node, int32_t next_tier, uint32_t min_hits, uint32_t without_marks,
                                rkv_node *nodes, size_t max_nodes, size_t *num_nodes);

/* The nodes of the path root -> node, root side first / those of them that are host-only (always its tail). As rkv_tree_due. */
RKV_API rkv_status rkv_tree_path(rkv_tree *tree, rkv_node node, rkv_node *nodes, size_t max_nodes, size_t *num_nodes);
RKV_API rkv_status rkv_tree_host_path(rkv_tree *tree, rkv_node node, rkv_node *nodes, size_t max_nodes, size_t *num_nodes);

/* ---------------------------------------------------------------------------------------------------------- table */

/* Every function above, in one struct. struct_size tells how much of it this library has. */
typedef struct rkv_api {
    uint32_t struct_size;
    uint32_t abi_version;
    const char *(*status_string)(rkv_status);
    const char *(*last_error)(void);
    const char *(*version)(void);
    rkv_status (*tree_create)(const rkv_tree_config *, rkv_tree **);
    void (*tree_destroy)(rkv_tree *);
    rkv_status (*tree_match)(rkv_tree *, const rkv_key *, int32_t *, rkv_match *);
    rkv_status (*tree_peek)(rkv_tree *, const rkv_key *, int32_t *, rkv_match *);
    rkv_status (*tree_peek_many)(rkv_tree *, const rkv_key *, size_t, rkv_match *);
    rkv_status (*tree_match_extend)(rkv_tree *, const rkv_match *, const rkv_key *, int32_t *, rkv_match *);
    rkv_status (*tree_insert)(rkv_tree *, const rkv_key *, const int32_t *, size_t, const rkv_match *, int32_t, int32_t *,
                              rkv_insert *);
    rkv_status (*tree_insert_host)(rkv_tree *, const rkv_key *, const int32_t *, size_t, const rkv_match *, int32_t,
                                   int32_t *, rkv_insert *);
    rkv_status (*tree_lock)(rkv_tree *, rkv_node, int64_t *);
    rkv_status (*tree_unlock)(rkv_tree *, rkv_node, int64_t *);
    rkv_status (*tree_protect_host)(rkv_tree *, rkv_node);
    rkv_status (*tree_release_host)(rkv_tree *, rkv_node);
    rkv_status (*tree_pin)(rkv_tree *, rkv_node, int64_t, int64_t *);
    rkv_status (*tree_unpin)(rkv_tree *, rkv_node, int64_t *);
    rkv_status (*tree_expire)(rkv_tree *, int64_t, uint64_t *);
    void (*freed_release)(rkv_freed *);
    rkv_status (*tree_evict)(rkv_tree *, int64_t, int32_t, rkv_freed *);
    rkv_status (*tree_finish_backup)(rkv_tree *, rkv_node, const int32_t *, size_t, rkv_freed *);
    rkv_status (*tree_evict_host)(rkv_tree *, int64_t, rkv_freed *);
    rkv_status (*tree_set_host)(rkv_tree *, rkv_node, const int32_t *, size_t);
    rkv_status (*tree_set_device)(rkv_tree *, rkv_node, const int32_t *, size_t, int32_t);
    rkv_status (*tree_finish_load)(rkv_tree *, rkv_node, int32_t, rkv_freed *);
    rkv_status (*tree_split_at)(rkv_tree *, rkv_node, int64_t, rkv_node *);
    rkv_status (*tree_delete)(rkv_tree *, rkv_node, rkv_freed *);
    rkv_status (*tree_delete_namespace)(rkv_tree *, const void *, size_t, rkv_freed *);
    rkv_status (*tree_reset)(rkv_tree *, rkv_freed *);
    rkv_status (*tree_take_events)(rkv_tree *, rkv_event *, int32_t *, size_t, size_t *);
    rkv_status (*tree_page_keys)(rkv_tree *, rkv_node, uint64_t *, size_t, size_t *);
    rkv_status (*tree_page_digests)(rkv_tree *, rkv_node, uint8_t *, size_t, size_t *);
    rkv_status (*tree_node_info)(rkv_tree *, rkv_node, rkv_node_info *);
    rkv_status (*tree_node_data)(rkv_tree *, rkv_node, size_t, int32_t *, int32_t *, int32_t *);
    rkv_status (*tree_node_namespace)(rkv_tree *, rkv_node, void *, size_t, size_t *);
    rkv_status (*tree_nodes)(rkv_tree *, rkv_node *, size_t, size_t *);
    rkv_status (*tree_get_stats)(rkv_tree *, rkv_tree_stats *);
    rkv_status (*tree_check_integrity)(rkv_tree *, const rkv_tier_check *, const rkv_tier_check *, char *, size_t);
    rkv_status (*index_create)(const rkv_index_config *, rkv_index **);
    void (*index_destroy)(rkv_index *);
    rkv_status (*index_insert)(rkv_index *, uint32_t, const uint64_t *, size_t, const uint64_t *, uint64_t *);
    rkv_status (*index_remove)(rkv_index *, uint32_t, const uint64_t *, size_t, uint64_t *);
    rkv_status (*index_clear_worker)(rkv_index *, uint32_t, uint64_t *);
    rkv_status (*index_remove_worker)(rkv_index *, uint32_t, uint64_t *);
    rkv_status (*index_find)(rkv_index *, const uint64_t *, size_t, rkv_index_hit *);
    rkv_status (*index_get_word)(rkv_index *, rkv_node, uint64_t *);
    rkv_status (*index_set_word)(rkv_index *, rkv_node, uint64_t);
    rkv_status (*index_workers)(rkv_index *, uint32_t *, size_t, size_t *);
    rkv_status (*index_get_stats)(rkv_index *, rkv_index_stats *);
    rkv_status (*index_dump)(rkv_index *, rkv_index_page *, size_t, uint32_t *, size_t, size_t *, size_t *);
    rkv_status (*index_check_integrity)(rkv_index *, char *, size_t);
    rkv_status (*tree_mark)(rkv_tree *, rkv_node, uint32_t, uint32_t, size_t);
    rkv_status (*tree_due)(rkv_tree *, rkv_node, int32_t, uint32_t, uint32_t, rkv_node *, size_t, size_t *);
    rkv_status (*tree_path)(rkv_tree *, rkv_node, rkv_node *, size_t, size_t *);
    rkv_status (*tree_host_path)(rkv_tree *, rkv_node, rkv_node *, size_t, size_t *);
} rkv_api;

/* The table for an ABI version, or NULL if this library does not speak it. Never freed. */
RKV_API const rkv_api *rkv_get_api(uint32_t abi_version);

#ifdef __cplusplus
}
#endif
#endif
