"""The radix tree: the C ABI's functions (no Python below the first line that says so), and the class RadixTree over them.

The parts, from the bottom up: _memory (blocks), _store (keys and page ids), _nodes (nodes, child table, eviction orders), _events,
_walk (match, insert), _evict (protection, eviction, tiers, deletion), _check (integrity). They are ``cdef inline`` functions in
.pxd files, so that everything becomes one object file without a Python symbol in it.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.pycapsule cimport PyCapsule_GetContext, PyCapsule_New, PyCapsule_SetContext
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport INT64_MAX, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

cimport numpy as cnp

from radixkv.tree._abi cimport *
from radixkv.tree._check cimport check_integrity
from radixkv.tree._evict cimport (
    delete_node, delete_root, evict, evict_host, expire, finish_backup, finish_load, freed_release, lock, mark, pin, protect_host,
    release_host, reset, set_device, set_host, unlock, unpin,
)
from radixkv.tree._events cimport ensure_hashed, page_key
from radixkv.tree._memory cimport drop, reallocate, resident
from radixkv.tree._nodes cimport (
    DEVICE, HEAP_ROOT, HOST, LIVE, LOADING, MAX_MARKS, NO_INDEX, NUM_ORDERS, PENDING, ROOT_NODE, Namespace, Node, Order, Pin, Slot,
    Tree, find_root, handle_of, hash_name, index_of, marks_of, nodes_reserve, split, tree_memory,
)
from radixkv.tree._store cimport MAX_UNITS, NO_UNIT, pageset_release, store_init, store_release, unit_digest, unit_key
from radixkv.tree._tokens cimport TokenView, read_tokens, release_tokens
from radixkv.tree._walk cimport (
    LIST_ALL, LIST_DUE_FOR_HOST, LIST_DUE_FOR_STORAGE, LIST_HOST_ONLY, insert, list_path, match, match_extend, peek,
)

# ======================================================================================================================
# The C ABI. Each function: check the arguments, take the lock, do the work in a part above, release. radixkv.h is the manual.
# ======================================================================================================================

cdef enum:
    MAX_PAGE_SIZE = 65536
    DEFAULT_MAX_EVENTS = 1 << 20
    KEPT_EVENT_TOKENS = 1 << 18     # a drained queue with room for more gives its memory back


cdef bint bad_key(const Tree *t, const rkv_key *key) noexcept nogil:
    if key == NULL or key.struct_size < KEY_SIZE or (key.ns == NULL and key.ns_bytes > 0) or \
            (key.tokens == NULL and key.num_tokens > 0) or key.num_tokens // t.page_size > MAX_UNITS:
        fail(RKV_ERR_ARGUMENT, b"a key with a NULL, a short struct_size or more than %d pages", <int>MAX_UNITS)
        return True
    return False


cdef bint bad_match(const rkv_match *m) noexcept nogil:
    if m == NULL or m.struct_size < MATCH_SIZE or m.num_tokens < 0 or m.host_num_tokens < 0 or \
            m.num_tokens > INT64_MAX - m.host_num_tokens:
        fail(RKV_ERR_ARGUMENT, b"a match that is NULL, has a short struct_size or negative counts")
        return True
    return False


cdef bint bad_out(const void *out, uint32_t struct_size, size_t needed) noexcept nogil:
    if out == NULL or struct_size < needed:
        fail(RKV_ERR_ARGUMENT, b"an output that is NULL or has a short struct_size (%u of %zu)", struct_size, needed)
        return True
    return False


cdef bint bad_freed(const rkv_freed *out) noexcept nogil:
    return bad_out(out, out.struct_size if out != NULL else 0, FREED_SIZE)


cdef bint bad_ids(const int32_t *ids, uint64_t n) noexcept nogil:
    if (ids == NULL and n > 0) or n > MAX_UNITS:
        fail(RKV_ERR_ARGUMENT, b"%llu page ids at %p", <unsigned long long>n, <const void *>ids)
        return True
    return False


cdef rkv_status no_tree() noexcept nogil:
    return fail(RKV_ERR_ARGUMENT, b"the tree is NULL")


cdef rkv_status bad_handle(const Tree *t, rkv_node node) noexcept nogil:
    return fail(RKV_ERR_HANDLE, b"node %#llx is stale or of another tree (%u nodes here)", <unsigned long long>node, t.num_nodes)


cdef rkv_status root_refused(const char *what) noexcept nogil:
    return fail(RKV_ERR_ARGUMENT, b"%s: not possible for the root", what)


cdef public rkv_status rkv_tree_create(const rkv_tree_config *config, rkv_tree **out) noexcept nogil:
    cdef rkv_tree_config c
    cdef Tree *t
    cdef int k
    if out == NULL:
        return fail(RKV_ERR_ARGUMENT, b"tree_create: out is NULL")
    out[0] = NULL
    memset(&c, 0, sizeof(c))
    c.page_size = 16
    if config != NULL:
        if config.struct_size < TREE_CONFIG_SIZE:
            return fail(RKV_ERR_ARGUMENT, b"tree_create: struct_size %u of %zu", config.struct_size, <size_t>TREE_CONFIG_SIZE)
        memcpy(&c, config, TREE_CONFIG_SIZE)
    if c.page_size < 1 or c.page_size > MAX_PAGE_SIZE:
        return fail(RKV_ERR_ARGUMENT, b"tree_create: page_size %d is not in 1..%d", c.page_size, <int>MAX_PAGE_SIZE)
    if c.policy < 0 or c.policy >= RKV_POLICY_END:
        return fail(RKV_ERR_ARGUMENT, b"tree_create: unknown policy %d", c.policy)
    if c.flags & ~<uint32_t>RKV_TREE_EVENTS:
        return fail(RKV_ERR_ARGUMENT, b"tree_create: unknown flags %#x", c.flags)
    if c.page_hash == NULL:
        c.digest_bytes = 8
    if c.digest_bytes < 8 or c.digest_bytes > 64:
        return fail(RKV_ERR_ARGUMENT, b"tree_create: digest_bytes %u is not in 8..64", c.digest_bytes)
    if c.allocator.reallocate == NULL:
        c.allocator.reallocate = rkv_leaf_reallocate
        c.allocator.ctx = NULL
    t = <Tree *>reallocate(&c.allocator, NULL, 0, sizeof(Tree))
    if t == NULL:
        return fail(RKV_ERR_NO_MEMORY, b"tree_create: no memory")
    memset(t, 0, sizeof(Tree))
    if rwlock_create(&t.lock) != 0:
        reallocate(&c.allocator, t, sizeof(Tree), 0)
        return fail(RKV_ERR_NO_MEMORY, b"tree_create: no lock")
    t.allocator = c.allocator
    t.id_ = unique_id(t)
    t.salt = <uint32_t>(mix(t.id_) >> 32)
    t.hash_seed = mix(t.id_ ^ process_secret())
    t.page_size = <uint32_t>c.page_size
    t.policy = c.policy
    t.events_on = (c.flags & RKV_TREE_EVENTS) != 0
    t.max_events = c.max_events if c.max_events else DEFAULT_MAX_EVENTS
    t.page_hash = c.page_hash
    t.page_hash_ctx = c.page_hash_ctx
    store_init(&t.store, &t.allocator, t.page_size, c.digest_bytes)
    t.store.digests_on = t.events_on
    t.device_ids.allocator = t.host_ids.allocator = &t.allocator
    t.node_end = 1
    t.free_space = NO_UNIT
    for k in range(NUM_ORDERS):
        t.orders[k].end = HEAP_ROOT
    out[0] = <rkv_tree *>t
    return RKV_OK


cdef public void rkv_tree_destroy(rkv_tree *tree) noexcept nogil:
    cdef Tree *t = <Tree *>tree
    cdef rkv_allocator a
    cdef uint32_t k
    if t == NULL:
        return
    a = t.allocator
    for k in range(t.space_end):
        if t.spaces[k].name != NULL:
            reallocate(&a, t.spaces[k].name, t.spaces[k].name_bytes, 0)
    for k in range(NUM_ORDERS):
        drop(&a, <void **>&t.orders[k].entries, &t.orders[k].capacity, sizeof(Entry))
    drop(&a, <void **>&t.spaces, &t.space_capacity, sizeof(Namespace))
    drop(&a, <void **>&t.space_table, &t.space_table_capacity, 4)
    drop(&a, <void **>&t.table, &t.table_capacity, sizeof(Slot))
    drop(&a, <void **>&t.nodes, &t.node_capacity, sizeof(Node))
    drop(&a, <void **>&t.heap_pos, &t.heap_pos_capacity, 4)
    drop(&a, <void **>&t.pins, &t.pin_capacity, sizeof(Pin))
    drop(&a, <void **>&t.events, &t.event_capacity, sizeof(rkv_event))
    drop(&a, <void **>&t.event_tokens, &t.event_token_capacity, 4 * <size_t>t.page_size)
    drop(&a, <void **>&t.path, &t.path_capacity, 4)
    store_release(&t.store)
    pageset_release(&t.device_ids)
    pageset_release(&t.host_ids)
    rwlock_destroy(&t.lock)
    reallocate(&a, t, sizeof(Tree), 0)


cdef public rkv_status rkv_tree_match(rkv_tree *tree, const rkv_key *key, int32_t *page_ids, rkv_match *out) noexcept nogil:
    cdef Tree *t = <Tree *>tree
    cdef rkv_status status
    if t == NULL:
        return no_tree()
    if bad_key(t, key) or bad_out(out, out.struct_size if out != NULL else 0, MATCH_SIZE):
        return RKV_ERR_ARGUMENT
    rwlock_write(&t.lock)
    status = match(t, key, page_ids, out)
    rwlock_release(&t.lock)
    return status


cdef public rkv_status rkv_tree_peek(rkv_tree *tree, const rkv_key *key, int32_t *page_ids, rkv_match *out) noexcept nogil:
    cdef Tree *t = <Tree *>tree
    if t == NULL:
        return no_tree()
    if bad_key(t, key) or bad_out(out, out.struct_size if out != NULL else 0, MATCH_SIZE):
        return RKV_ERR_ARGUMENT
    rwlock_read(&t.lock)
    peek(t, key, page_ids, out)
    rwlock_release(&t.lock)
    return RKV_OK


cdef const rkv_key *key_at(const rkv_key *keys, size_t k) noexcept nogil:
    """Element k of the caller's array, whose elements are as long as the caller's header says."""
    return <const rkv_key *>(<const char *>keys + k * keys.struct_size)


cdef rkv_match *match_at(rkv_match *matches, size_t k) noexcept nogil:
    return <rkv_match *>(<char *>matches + k * matches.struct_size)


cdef public rkv_status rkv_tree_peek_many(rkv_tree *tree, const rkv_key *keys, size_t num_keys, rkv_match *out) noexcept nogil:
    cdef Tree *t = <Tree *>tree
    cdef size_t k
    if t == NULL:
        return no_tree()
    if num_keys == 0:
        return RKV_OK
    if bad_key(t, keys) or bad_out(out, out.struct_size if out != NULL else 0, MATCH_SIZE):
        return RKV_ERR_ARGUMENT
    for k in range(num_keys):
        if bad_key(t, key_at(keys, k)) or bad_out(match_at(out, k), match_at(out, k).struct_size, MATCH_SIZE):
            return RKV_ERR_ARGUMENT
    rwlock_read(&t.lock)
    for k in range(num_keys):
        peek(t, key_at(keys, k), NULL, match_at(out, k))
    rwlock_release(&t.lock)
    return RKV_OK


cdef public rkv_status rkv_tree_match_extend(rkv_tree *tree, const rkv_match *prior, const rkv_key *more, int32_t *page_ids,
                                             rkv_match *out) noexcept nogil:
    cdef Tree *t = <Tree *>tree
    cdef rkv_status status
    if t == NULL:
        return no_tree()
    if bad_match(prior) or bad_key(t, more) or bad_out(out, out.struct_size if out != NULL else 0, MATCH_SIZE):
        return RKV_ERR_ARGUMENT
    rwlock_write(&t.lock)
    status = match_extend(t, prior, more, page_ids, out)
    rwlock_release(&t.lock)
    return status


cdef rkv_status insert_tier(Tree *t, const rkv_key *key, const int32_t *ids, size_t num_pages, const rkv_match *hint,
                            int32_t priority, uint32_t tier, int32_t *duplicates, uint64_t *num_adopted,
                            rkv_insert *out) noexcept nogil:
    cdef rkv_status status
    if t == NULL:
        return no_tree()
    if bad_key(t, key) or bad_ids(ids, num_pages) or (hint != NULL and bad_match(hint)) or \
            bad_out(out, out.struct_size if out != NULL else 0, INSERT_SIZE):
        return RKV_ERR_ARGUMENT
    if duplicates == NULL and num_pages > 0:
        return fail(RKV_ERR_ARGUMENT, b"insert: duplicates is NULL")
    rwlock_write(&t.lock)
    status = insert(t, key, ids, num_pages, hint, priority, tier, duplicates, num_adopted, out)
    rwlock_release(&t.lock)
    return status


cdef public rkv_status rkv_tree_insert(rkv_tree *tree, const rkv_key *key, const int32_t *page_ids, size_t num_pages,
                                       const rkv_match *hint, int32_t priority, int32_t *duplicates,
                                       rkv_insert *out) noexcept nogil:
    return insert_tier(<Tree *>tree, key, page_ids, num_pages, hint, priority, DEVICE, duplicates, NULL, out)


cdef public rkv_status rkv_tree_insert_host(rkv_tree *tree, const rkv_key *key, const int32_t *host_page_ids, size_t num_pages,
                                            const rkv_match *hint, int32_t priority, int32_t *duplicates,
                                            rkv_insert *out) noexcept nogil:
    return insert_tier(<Tree *>tree, key, host_page_ids, num_pages, hint, priority, HOST, duplicates, NULL, out)


cdef enum:
    OP_LOCK
    OP_UNLOCK
    OP_PROTECT_HOST
    OP_RELEASE_HOST
    OP_PIN
    OP_UNPIN


cdef rkv_status protect_locked(Tree *t, rkv_node node, int op, int64_t until_ns, int64_t *delta) noexcept nogil:
    """The six operations on one node that change who may be evicted; the caller has the lock."""
    cdef uint32_t i = index_of(t, node)
    delta[0] = 0
    if node == 0:
        return root_refused(b"pin") if op == OP_PIN else RKV_OK
    if i == NO_INDEX:
        return bad_handle(t, node)
    if op == OP_LOCK:
        return lock(t, i, delta)
    if op == OP_UNLOCK:
        return unlock(t, i, delta)
    if op == OP_PROTECT_HOST:
        return protect_host(t, i)
    if op == OP_RELEASE_HOST:
        return release_host(t, i)
    if op == OP_PIN:
        return pin(t, i, until_ns, delta)
    delta[0] = unpin(t, i) * t.page_size
    return RKV_OK


cdef rkv_status protect(Tree *t, rkv_node node, int op, int64_t until_ns, int64_t *delta) noexcept nogil:
    cdef rkv_status status
    cdef int64_t change = 0
    if t == NULL:
        return no_tree()
    rwlock_write(&t.lock)
    status = protect_locked(t, node, op, until_ns, &change)
    rwlock_release(&t.lock)
    if delta != NULL:
        delta[0] = change
    return status


cdef public rkv_status rkv_tree_lock(rkv_tree *tree, rkv_node node, int64_t *delta) noexcept nogil:
    return protect(<Tree *>tree, node, OP_LOCK, 0, delta)


cdef public rkv_status rkv_tree_unlock(rkv_tree *tree, rkv_node node, int64_t *delta) noexcept nogil:
    return protect(<Tree *>tree, node, OP_UNLOCK, 0, delta)


cdef public rkv_status rkv_tree_protect_host(rkv_tree *tree, rkv_node node) noexcept nogil:
    return protect(<Tree *>tree, node, OP_PROTECT_HOST, 0, NULL)


cdef public rkv_status rkv_tree_release_host(rkv_tree *tree, rkv_node node) noexcept nogil:
    return protect(<Tree *>tree, node, OP_RELEASE_HOST, 0, NULL)


cdef public rkv_status rkv_tree_pin(rkv_tree *tree, rkv_node node, int64_t until_ns, int64_t *delta) noexcept nogil:
    return protect(<Tree *>tree, node, OP_PIN, until_ns, delta)


cdef public rkv_status rkv_tree_unpin(rkv_tree *tree, rkv_node node, int64_t *delta) noexcept nogil:
    return protect(<Tree *>tree, node, OP_UNPIN, 0, delta)


cdef public rkv_status rkv_tree_expire(rkv_tree *tree, int64_t now_ns, uint64_t *num_removed) noexcept nogil:
    cdef Tree *t = <Tree *>tree
    cdef uint64_t removed
    if t == NULL:
        return no_tree()
    rwlock_write(&t.lock)
    removed = expire(t, now_ns)
    rwlock_release(&t.lock)
    if num_removed != NULL:
        num_removed[0] = removed
    return RKV_OK


cdef public void rkv_freed_release(rkv_freed *freed) noexcept nogil:
    if freed != NULL and freed.struct_size >= FREED_SIZE:
        freed_release(freed)


cdef public rkv_status rkv_tree_evict(rkv_tree *tree, int64_t num_tokens, int32_t backup, rkv_freed *out) noexcept nogil:
    cdef Tree *t = <Tree *>tree
    cdef rkv_status status
    if t == NULL:
        return no_tree()
    if bad_freed(out):
        return RKV_ERR_ARGUMENT
    rwlock_write(&t.lock)
    status = evict(t, num_tokens, backup != 0, out)
    rwlock_release(&t.lock)
    return status


cdef public rkv_status rkv_tree_evict_host(rkv_tree *tree, int64_t num_tokens, rkv_freed *out) noexcept nogil:
    cdef Tree *t = <Tree *>tree
    cdef rkv_status status
    if t == NULL:
        return no_tree()
    if bad_freed(out):
        return RKV_ERR_ARGUMENT
    rwlock_write(&t.lock)
    status = evict_host(t, num_tokens, out)
    rwlock_release(&t.lock)
    return status


cdef enum:
    OP_FINISH_BACKUP
    OP_SET_HOST
    OP_SET_DEVICE
    OP_FINISH_LOAD
    OP_DELETE


cdef rkv_status settle(Tree *t, rkv_node node, int op, const int32_t *ids, size_t num_pages, bint flag,
                       rkv_freed *out) noexcept nogil:
    """The operations on one node that move pages between the tiers or out of the tree."""
    cdef rkv_status status
    cdef uint32_t i
    if t == NULL:
        return no_tree()
    if bad_ids(ids, num_pages) and not (op == OP_FINISH_BACKUP and ids == NULL):
        return RKV_ERR_ARGUMENT
    if node == 0:
        return root_refused(b"finish_backup, set_host, set_device, finish_load or delete")
    rwlock_write(&t.lock)
    i = index_of(t, node)
    if i == NO_INDEX:
        status = bad_handle(t, node)
    elif op == OP_FINISH_BACKUP:
        status = finish_backup(t, i, ids, num_pages, out)
    elif op == OP_SET_HOST:
        status = set_host(t, i, ids, num_pages)
    elif op == OP_SET_DEVICE:
        status = set_device(t, i, ids, num_pages, flag)
    elif op == OP_FINISH_LOAD:
        status = finish_load(t, i, flag, out)
    else:
        status = delete_node(t, i, out)
    rwlock_release(&t.lock)
    return status


cdef public rkv_status rkv_tree_finish_backup(rkv_tree *tree, rkv_node node, const int32_t *host_page_ids, size_t num_pages,
                                              rkv_freed *out) noexcept nogil:
    if bad_freed(out):
        return RKV_ERR_ARGUMENT
    return settle(<Tree *>tree, node, OP_FINISH_BACKUP, host_page_ids, num_pages, False, out)


cdef public rkv_status rkv_tree_set_host(rkv_tree *tree, rkv_node node, const int32_t *host_page_ids,
                                         size_t num_pages) noexcept nogil:
    return settle(<Tree *>tree, node, OP_SET_HOST, host_page_ids, num_pages, False, NULL)


cdef public rkv_status rkv_tree_set_device(rkv_tree *tree, rkv_node node, const int32_t *page_ids, size_t num_pages,
                                           int32_t loading) noexcept nogil:
    return settle(<Tree *>tree, node, OP_SET_DEVICE, page_ids, num_pages, loading != 0, NULL)


cdef public rkv_status rkv_tree_finish_load(rkv_tree *tree, rkv_node node, int32_t success, rkv_freed *out) noexcept nogil:
    if bad_freed(out):
        return RKV_ERR_ARGUMENT
    return settle(<Tree *>tree, node, OP_FINISH_LOAD, NULL, 0, success != 0, out)


cdef public rkv_status rkv_tree_delete(rkv_tree *tree, rkv_node node, rkv_freed *out) noexcept nogil:
    if bad_freed(out):
        return RKV_ERR_ARGUMENT
    return settle(<Tree *>tree, node, OP_DELETE, NULL, 0, False, out)


cdef rkv_status mark_locked(Tree *t, rkv_node node, uint32_t set_, uint32_t clear, uint64_t num_pages) noexcept nogil:
    """The caller has the lock."""
    cdef uint32_t i = index_of(t, node)
    if set_ > MAX_MARKS or clear > MAX_MARKS:
        return fail(RKV_ERR_ARGUMENT, b"mark: set %#x or clear %#x is not in 0..%d", set_, clear, <int>MAX_MARKS)
    if set_ & clear:
        return fail(RKV_ERR_ARGUMENT, b"mark: set %#x and clear %#x share the bits %#x", set_, clear, set_ & clear)
    if node == 0:
        return root_refused(b"mark")
    if i == NO_INDEX:
        return bad_handle(t, node)
    return mark(t, i, set_, clear, num_pages)


cdef public rkv_status rkv_tree_mark(rkv_tree *tree, rkv_node node, uint32_t set_, uint32_t clear, size_t num_pages) noexcept nogil:
    cdef Tree *t = <Tree *>tree
    cdef rkv_status status
    if t == NULL:
        return no_tree()
    rwlock_write(&t.lock)
    status = mark_locked(t, node, set_, clear, num_pages)
    rwlock_release(&t.lock)
    return status


cdef rkv_status list_locked(const Tree *t, rkv_node node, int what, uint64_t min_hits, uint32_t without_marks, rkv_node *nodes,
                            size_t max_nodes, size_t *num_nodes) noexcept nogil:
    """The nodes of a path that a caller asks for; it has the lock, shared or not."""
    cdef uint32_t i = index_of(t, node)
    num_nodes[0] = 0
    if without_marks > MAX_MARKS:
        return fail(RKV_ERR_ARGUMENT, b"due: without_marks %#x is not in 0..%d", without_marks, <int>MAX_MARKS)
    if node == 0:
        return RKV_OK
    if i == NO_INDEX:
        return bad_handle(t, node)
    num_nodes[0] = list_path(t, i, what, min_hits, without_marks, nodes, max_nodes)
    if max_nodes > 0 and num_nodes[0] > max_nodes:
        return fail(RKV_ERR_CAPACITY, b"path, host_path, due: room for %zu of %zu nodes", max_nodes, num_nodes[0])
    return RKV_OK


cdef rkv_status list_nodes(Tree *t, rkv_node node, int what, uint64_t min_hits, uint32_t without_marks, rkv_node *nodes,
                           size_t max_nodes, size_t *num_nodes) noexcept nogil:
    cdef rkv_status status
    if t == NULL:
        return no_tree()
    if num_nodes == NULL or (nodes == NULL and max_nodes > 0):
        return fail(RKV_ERR_ARGUMENT, b"path, host_path, due: a NULL")
    rwlock_read(&t.lock)
    status = list_locked(t, node, what, min_hits, without_marks, nodes, max_nodes, num_nodes)
    rwlock_release(&t.lock)
    return status


cdef public rkv_status rkv_tree_due(rkv_tree *tree, rkv_node node, int32_t next_tier, uint32_t min_hits, uint32_t without_marks,
                                    rkv_node *nodes, size_t max_nodes, size_t *num_nodes) noexcept nogil:
    if next_tier != RKV_NEXT_HOST and next_tier != RKV_NEXT_STORAGE:
        return fail(RKV_ERR_ARGUMENT, b"due: unknown next_tier %d", next_tier)
    return list_nodes(<Tree *>tree, node, LIST_DUE_FOR_HOST if next_tier == RKV_NEXT_HOST else LIST_DUE_FOR_STORAGE, min_hits,
                      without_marks, nodes, max_nodes, num_nodes)


cdef public rkv_status rkv_tree_path(rkv_tree *tree, rkv_node node, rkv_node *nodes, size_t max_nodes,
                                     size_t *num_nodes) noexcept nogil:
    return list_nodes(<Tree *>tree, node, LIST_ALL, 0, 0, nodes, max_nodes, num_nodes)


cdef public rkv_status rkv_tree_host_path(rkv_tree *tree, rkv_node node, rkv_node *nodes, size_t max_nodes,
                                          size_t *num_nodes) noexcept nogil:
    return list_nodes(<Tree *>tree, node, LIST_HOST_ONLY, 0, 0, nodes, max_nodes, num_nodes)


cdef public rkv_status rkv_tree_split_at(rkv_tree *tree, rkv_node node, int64_t num_tokens, rkv_node *upper) noexcept nogil:
    cdef Tree *t = <Tree *>tree
    cdef rkv_status status = RKV_OK
    cdef uint32_t i
    if t == NULL:
        return no_tree()
    if upper == NULL:
        return fail(RKV_ERR_ARGUMENT, b"split_at: upper is NULL")
    if node == 0:
        return root_refused(b"split_at")
    rwlock_write(&t.lock)
    i = index_of(t, node)
    if i == NO_INDEX:
        status = bad_handle(t, node)
    elif num_tokens <= 0 or num_tokens % t.page_size or num_tokens >= <int64_t>t.nodes[i].num_pages * t.page_size:
        status = fail(RKV_ERR_ARGUMENT, b"split_at: %lld of the node's %llu tokens (page size %u)", <long long>num_tokens,
                      <unsigned long long>t.nodes[i].num_pages * t.page_size, t.page_size)
    elif not nodes_reserve(t, 1):
        status = fail(RKV_ERR_NO_MEMORY, b"split_at: no memory for a node")
    else:
        upper[0] = handle_of(t, split(t, i, <uint32_t>(num_tokens // t.page_size)))
    rwlock_release(&t.lock)
    return status


cdef public rkv_status rkv_tree_delete_namespace(rkv_tree *tree, const void *ns, size_t ns_bytes, rkv_freed *out) noexcept nogil:
    cdef Tree *t = <Tree *>tree
    cdef rkv_status status
    if t == NULL:
        return no_tree()
    if bad_freed(out):
        return RKV_ERR_ARGUMENT
    if ns == NULL and ns_bytes > 0:
        return fail(RKV_ERR_ARGUMENT, b"delete_namespace: ns is NULL")
    rwlock_write(&t.lock)
    status = delete_root(t, find_root(t, <const uint8_t *>ns, ns_bytes, hash_name(t, <const uint8_t *>ns, ns_bytes)), out)
    rwlock_release(&t.lock)
    return status


cdef public rkv_status rkv_tree_reset(rkv_tree *tree, rkv_freed *out) noexcept nogil:
    cdef Tree *t = <Tree *>tree
    cdef rkv_status status
    if t == NULL:
        return no_tree()
    if bad_freed(out):
        return RKV_ERR_ARGUMENT
    rwlock_write(&t.lock)
    status = reset(t, out)
    rwlock_release(&t.lock)
    return status


cdef public rkv_status rkv_tree_take_events(rkv_tree *tree, rkv_event *events, int32_t *tokens, size_t max_events,
                                            size_t *num_events) noexcept nogil:
    cdef Tree *t = <Tree *>tree
    cdef uint64_t n
    if t == NULL:
        return no_tree()
    if num_events == NULL or (max_events > 0 and (events == NULL or tokens == NULL)):
        return fail(RKV_ERR_ARGUMENT, b"take_events: a NULL")
    rwlock_write(&t.lock)
    n = t.event_end - t.event_start
    if n > max_events:
        n = max_events
    if n > 0:
        memcpy(events, t.events + t.event_start, n * sizeof(rkv_event))
        memcpy(tokens, t.event_tokens + t.event_start * t.page_size, n * 4 * t.page_size)
        t.event_start += n
        if t.event_start == t.event_end:
            t.event_start = t.event_end = 0
            if t.event_token_capacity * t.page_size > KEPT_EVENT_TOKENS:
                drop(&t.allocator, <void **>&t.events, &t.event_capacity, sizeof(rkv_event))
                drop(&t.allocator, <void **>&t.event_tokens, &t.event_token_capacity, 4 * <size_t>t.page_size)
    rwlock_release(&t.lock)
    num_events[0] = n
    return RKV_OK


cdef rkv_status copy_digests(Tree *t, rkv_node node, uint64_t *keys, uint8_t *digests, size_t max_pages,
                             size_t *num_pages) noexcept nogil:
    cdef rkv_status status = RKV_OK
    cdef uint32_t i, k
    cdef Node *n
    if t == NULL:
        return no_tree()
    if num_pages == NULL or (max_pages > 0 and keys == NULL and digests == NULL):
        return fail(RKV_ERR_ARGUMENT, b"page_keys, page_digests: a NULL")
    num_pages[0] = 0
    if node == 0:
        return RKV_OK
    rwlock_write(&t.lock)
    i = index_of(t, node)
    if i == NO_INDEX:
        status = bad_handle(t, node)
    else:
        n = &t.nodes[i]
        num_pages[0] = n.num_pages
        if max_pages > 0 and max_pages < n.num_pages:
            status = fail(RKV_ERR_CAPACITY, b"page_keys, page_digests: room for %zu of %u pages", max_pages, n.num_pages)
        elif max_pages > 0 and not ensure_hashed(t, i):
            status = fail(RKV_ERR_NO_MEMORY, b"page_keys, page_digests: no memory for digests")
        elif digests != NULL:
            if max_pages > 0:
                memcpy(digests, unit_digest(&t.store, n.start), <size_t>n.num_pages * t.store.digest_bytes)
        elif max_pages > 0:
            for k in range(n.num_pages):
                keys[k] = page_key(t, n.start + k)
    rwlock_release(&t.lock)
    return status


cdef public rkv_status rkv_tree_page_keys(rkv_tree *tree, rkv_node node, uint64_t *keys, size_t max_pages,
                                          size_t *num_pages) noexcept nogil:
    return copy_digests(<Tree *>tree, node, keys, NULL, max_pages, num_pages)


cdef public rkv_status rkv_tree_page_digests(rkv_tree *tree, rkv_node node, uint8_t *digests, size_t max_pages,
                                             size_t *num_pages) noexcept nogil:
    return copy_digests(<Tree *>tree, node, NULL, digests, max_pages, num_pages)


cdef void fill_info(const Tree *t, uint32_t i, rkv_node_info *out) noexcept nogil:
    cdef const Node *n = &t.nodes[i]
    cdef uint32_t child = n.first_child
    out.on_device = (n.flags & DEVICE) != 0
    out.on_host = (n.flags & HOST) != 0
    out.loading = (n.flags & LOADING) != 0
    out.backup_pending = (n.flags & PENDING) != 0
    out.pinned = n.pin_slot != 0
    out.pinned_until_ns = t.pins[n.pin_slot - 1].until_ns if n.pin_slot else 0
    out.priority = n.priority
    out.lock_ref = n.lock_ref
    out.host_ref = n.host_ref
    out.hit_count = n.hit_count
    out.parent = handle_of(t, n.parent)
    out.num_tokens = <int64_t>n.num_pages * t.page_size
    out.path_tokens = <int64_t>n.end_page * t.page_size
    out.access_time = n.access
    out.created_time = n.created
    out.ns_bytes = t.spaces[t.nodes[n.root].start].name_bytes
    if out.struct_size >= NODE_INFO_MARKS_SIZE:
        out.marks = marks_of(n)
        out.reserved = 0
    out.num_children = 0
    while child != NO_INDEX:
        out.num_children += 1
        child = t.nodes[child].next_sibling


cdef public rkv_status rkv_tree_node_info(rkv_tree *tree, rkv_node node, rkv_node_info *out) noexcept nogil:
    cdef Tree *t = <Tree *>tree
    cdef rkv_status status = RKV_OK
    cdef uint32_t i
    if t == NULL:
        return no_tree()
    if bad_out(out, out.struct_size if out != NULL else 0, NODE_INFO_SIZE):
        return RKV_ERR_ARGUMENT
    if node == 0:
        return root_refused(b"node_info")
    rwlock_read(&t.lock)
    i = index_of(t, node)
    if i == NO_INDEX:
        status = bad_handle(t, node)
    else:
        fill_info(t, i, out)
    rwlock_release(&t.lock)
    return status


cdef public rkv_status rkv_tree_node_data(rkv_tree *tree, rkv_node node, size_t max_pages, int32_t *tokens, int32_t *page_ids,
                                          int32_t *host_page_ids) noexcept nogil:
    cdef Tree *t = <Tree *>tree
    cdef rkv_status status = RKV_OK
    cdef uint32_t i
    cdef const Node *n
    if t == NULL:
        return no_tree()
    if node == 0:
        return root_refused(b"node_data")
    rwlock_read(&t.lock)
    i = index_of(t, node)
    if i == NO_INDEX:
        status = bad_handle(t, node)
    elif t.nodes[i].num_pages > max_pages:
        status = fail(RKV_ERR_CAPACITY, b"node_data: room for %zu of %u pages", max_pages, t.nodes[i].num_pages)
    else:
        n = &t.nodes[i]
        if tokens != NULL:
            memcpy(tokens, unit_key(&t.store, n.start), 4 * <size_t>n.num_pages * t.page_size)
        if page_ids != NULL and n.flags & DEVICE:
            memcpy(page_ids, t.store.device + n.start, 4 * <size_t>n.num_pages)
        if host_page_ids != NULL and n.flags & HOST:
            memcpy(host_page_ids, t.store.host + n.start, 4 * <size_t>n.num_pages)
    rwlock_release(&t.lock)
    return status


cdef public rkv_status rkv_tree_node_namespace(rkv_tree *tree, rkv_node node, void *ns, size_t max_bytes,
                                               size_t *ns_bytes) noexcept nogil:
    cdef Tree *t = <Tree *>tree
    cdef rkv_status status = RKV_OK
    cdef const Namespace *space
    cdef uint32_t i
    if t == NULL:
        return no_tree()
    if ns_bytes == NULL or (ns == NULL and max_bytes > 0):
        return fail(RKV_ERR_ARGUMENT, b"node_namespace: a NULL")
    if node == 0:
        return root_refused(b"node_namespace")
    rwlock_read(&t.lock)
    i = index_of(t, node)
    if i == NO_INDEX:
        status = bad_handle(t, node)
    else:
        space = &t.spaces[t.nodes[t.nodes[i].root].start]
        ns_bytes[0] = space.name_bytes
        if space.name_bytes > max_bytes:
            status = fail(RKV_ERR_CAPACITY, b"node_namespace: room for %zu of %llu bytes", max_bytes,
                          <unsigned long long>space.name_bytes)
        elif space.name_bytes > 0:
            memcpy(ns, space.name, space.name_bytes)
    rwlock_release(&t.lock)
    return status


cdef public rkv_status rkv_tree_nodes(rkv_tree *tree, rkv_node *nodes, size_t max_nodes, size_t *num_nodes) noexcept nogil:
    """Pre-order over every namespace."""
    cdef Tree *t = <Tree *>tree
    cdef rkv_status status = RKV_OK
    cdef uint32_t k, i
    cdef size_t n = 0
    if t == NULL:
        return no_tree()
    if num_nodes == NULL or (nodes == NULL and max_nodes > 0):
        return fail(RKV_ERR_ARGUMENT, b"nodes: a NULL")
    rwlock_read(&t.lock)
    num_nodes[0] = t.num_nodes
    if max_nodes > 0 and t.num_nodes > max_nodes:
        status = fail(RKV_ERR_CAPACITY, b"nodes: room for %zu of %u nodes", max_nodes, t.num_nodes)
    elif max_nodes > 0:
        for k in range(t.space_end):
            i = t.spaces[k].root
            if i == NO_INDEX:
                continue
            i = t.nodes[i].first_child
            while i != NO_INDEX:
                nodes[n] = handle_of(t, i)
                n += 1
                if t.nodes[i].first_child != NO_INDEX:
                    i = t.nodes[i].first_child
                    continue
                while not t.nodes[i].flags & ROOT_NODE and t.nodes[i].next_sibling == NO_INDEX:
                    i = t.nodes[i].parent
                i = NO_INDEX if t.nodes[i].flags & ROOT_NODE else t.nodes[i].next_sibling
    rwlock_release(&t.lock)
    return status


cdef public rkv_status rkv_tree_get_stats(rkv_tree *tree, rkv_tree_stats *out) noexcept nogil:
    cdef Tree *t = <Tree *>tree
    if t == NULL:
        return no_tree()
    if bad_out(out, out.struct_size if out != NULL else 0, TREE_STATS_SIZE):
        return RKV_ERR_ARGUMENT
    rwlock_read(&t.lock)
    out.page_size = t.page_size
    out.evictable_tokens = t.evictable * t.page_size
    out.protected_tokens = t.protected_ * t.page_size
    out.pending_tokens = t.pending * t.page_size
    out.host_tokens = t.host_pages * t.page_size
    out.nodes = t.num_nodes
    out.namespaces = t.num_spaces + (t.default_root != NO_INDEX)
    out.pinned_nodes = t.num_pins
    out.memory_bytes = tree_memory(t)
    out.digest_memory_bytes = resident(<uint64_t>t.store.digest_touched * t.store.digest_bytes)
    out.queued_events = t.event_end - t.event_start
    out.dropped_events = t.dropped_events
    if out.struct_size >= TREE_STATS_TIERS_SIZE:
        out.host_evictable_tokens = t.host_evictable * t.page_size
        out.loading_tokens = t.loading * t.page_size
    rwlock_release(&t.lock)
    return RKV_OK


cdef bint bad_tier(const rkv_tier_check *tier) noexcept nogil:
    if tier != NULL and (tier.struct_size < TIER_CHECK_SIZE or (
            tier.free_page_ids == NULL and tier.num_free_pages > 0)):
        fail(RKV_ERR_ARGUMENT, b"check_integrity: a tier with a NULL or a short struct_size")
        return True
    return False


cdef public rkv_status rkv_tree_check_integrity(rkv_tree *tree, const rkv_tier_check *device, const rkv_tier_check *host,
                                                char *message, size_t max_bytes) noexcept nogil:
    cdef Tree *t = <Tree *>tree
    cdef rkv_status status
    cdef const char *why
    cdef size_t k = 0
    if t == NULL:
        return no_tree()
    if bad_tier(device) or bad_tier(host):
        return RKV_ERR_ARGUMENT
    rwlock_read(&t.lock)
    status = check_integrity(t, device, host)
    rwlock_release(&t.lock)
    if message != NULL and max_bytes > 0:
        if status != RKV_OK:
            why = rkv_last_error()
            while k + 1 < max_bytes and why[k] != 0:
                message[k] = why[k]
                k += 1
        message[k] = 0
    return status


cdef struct SnapshotNode:
    rkv_node handle
    rkv_node_info info
    uint64_t first_page             # its tokens, device and host ids in the snapshot's arrays
    uint64_t first_name             # its namespace


cdef struct Snapshot:
    uint64_t num_nodes
    SnapshotNode *nodes
    int32_t *tokens
    int32_t *device
    int32_t *host
    uint8_t *names


cdef void release_snapshot(Snapshot *s) noexcept nogil:
    free(s.nodes)
    free(s.tokens)
    free(s.device)
    free(s.host)
    free(s.names)
    memset(s, 0, sizeof(Snapshot))


cdef bint snapshot_memory(const Tree *t, Snapshot *s, uint64_t nodes, uint64_t pages, uint64_t name_bytes) noexcept nogil:
    s.nodes = <SnapshotNode *>malloc((nodes + 1) * sizeof(SnapshotNode))
    s.tokens = <int32_t *>malloc((pages * t.page_size + 1) * 4)
    s.device = <int32_t *>malloc((pages + 1) * 4)
    s.host = <int32_t *>malloc((pages + 1) * 4)
    s.names = <uint8_t *>malloc(name_bytes + 1)
    return s.nodes != NULL and s.tokens != NULL and s.device != NULL and s.host != NULL and s.names != NULL


cdef uint64_t copy_node(const Tree *t, uint32_t i, Snapshot *s, uint64_t first_page, uint64_t first_name) noexcept nogil:
    """Append node i to a snapshot; returns the bytes of its namespace."""
    cdef const Node *n = &t.nodes[i]
    cdef const Namespace *space = &t.spaces[t.nodes[n.root].start]
    cdef SnapshotNode *out = &s.nodes[s.num_nodes]
    out.handle = handle_of(t, i)
    out.first_page = first_page
    out.first_name = first_name
    out.info.struct_size = sizeof(rkv_node_info)
    fill_info(t, i, &out.info)
    memcpy(s.tokens + first_page * t.page_size, unit_key(&t.store, n.start), 4 * <size_t>n.num_pages * t.page_size)
    if n.flags & DEVICE:
        memcpy(s.device + first_page, t.store.device + n.start, 4 * <size_t>n.num_pages)
    if n.flags & HOST:
        memcpy(s.host + first_page, t.store.host + n.start, 4 * <size_t>n.num_pages)
    if space.name_bytes:
        memcpy(s.names + first_name, space.name, space.name_bytes)
    s.num_nodes += 1
    return space.name_bytes


cdef rkv_status snapshot_locked(const Tree *t, uint32_t only, Snapshot *s) noexcept nogil:
    cdef uint32_t i, first = only if only else 1, end = only + 1 if only else t.node_end
    cdef uint64_t nodes = 0, pages = 0, name_bytes = 0, page = 0, name = 0
    for i in range(first, end):
        if (t.nodes[i].flags & (LIVE | ROOT_NODE)) == LIVE:
            nodes += 1
            pages += t.nodes[i].num_pages
            name_bytes += t.spaces[t.nodes[t.nodes[i].root].start].name_bytes
    if not snapshot_memory(t, s, nodes, pages, name_bytes):
        return fail(RKV_ERR_NO_MEMORY, b"dump: no memory for %llu nodes", <unsigned long long>nodes)
    for i in range(first, end):
        if (t.nodes[i].flags & (LIVE | ROOT_NODE)) == LIVE:
            name += copy_node(t, i, s, page, name)
            page += t.nodes[i].num_pages
    return RKV_OK


cdef rkv_status take_snapshot(Tree *t, rkv_node only, Snapshot *s) noexcept nogil:
    """Copy one node, or with 0 all of them, at one moment."""
    cdef rkv_status status
    cdef uint32_t i
    rwlock_read(&t.lock)
    i = index_of(t, only)
    status = bad_handle(t, only) if only != 0 and i == NO_INDEX else snapshot_locked(t, i, s)
    rwlock_release(&t.lock)
    return status


cdef rkv_status begin_write_locked(Tree *t, rkv_node node, uint32_t marks, int32_t **ids, uint64_t *num_pages) noexcept nogil:
    """ids: of malloc, NULL if the node lacks no host copy, or has one of the marks; the caller has the lock."""
    cdef uint32_t i = index_of(t, node)
    cdef const Node *n
    cdef int64_t delta
    cdef rkv_status status
    if node == 0:
        return root_refused(b"begin_write")
    if i == NO_INDEX:
        return bad_handle(t, node)
    n = &t.nodes[i]
    if (n.flags & (DEVICE | HOST | LOADING | PENDING)) != DEVICE or marks_of(n) & marks:
        return RKV_OK
    num_pages[0] = n.num_pages
    ids[0] = <int32_t *>malloc(4 * <size_t>n.num_pages + 1)
    if ids[0] == NULL:
        return fail(RKV_ERR_NO_MEMORY, b"begin_write: no memory for %u pages", n.num_pages)
    memcpy(ids[0], t.store.device + n.start, 4 * <size_t>n.num_pages)
    status = lock(t, i, &delta)
    return mark(t, i, marks, 0, 0) if status == RKV_OK else status


cdef rkv_status host_pages_locked(const Tree *t, rkv_node node, int32_t **ids, uint64_t *num_pages, rkv_node *parent) noexcept nogil:
    """ids: of malloc, NULL if the node has no host copy; the caller has the lock, shared or not."""
    cdef uint32_t i = index_of(t, node)
    cdef const Node *n
    if node == 0:
        return root_refused(b"host_pages")
    if i == NO_INDEX:
        return bad_handle(t, node)
    n = &t.nodes[i]
    parent[0] = 0 if t.nodes[n.parent].flags & ROOT_NODE else handle_of(t, n.parent)
    if n.flags & HOST:
        num_pages[0] = n.num_pages
        ids[0] = <int32_t *>malloc(4 * <size_t>n.num_pages + 1)
        if ids[0] == NULL:
            return fail(RKV_ERR_NO_MEMORY, b"host_pages: no memory for %u pages", n.num_pages)
        memcpy(ids[0], t.store.host + n.start, 4 * <size_t>n.num_pages)
    return RKV_OK


# ======================================================================================================================
# Python from here on. Nothing above can reach it: the plugin's link would fail.
# ======================================================================================================================

import operator

import numpy as np

from radixkv.errors import (
    AllocationError, ArgumentTypeError, HandleError, IntegrityError, InvalidArgumentError, LockError, PageOwnershipError,
    StateError, TokenRangeError,
)
from radixkv.key import encode_namespace
from radixkv.tree.base import BaseRadixTree
from radixkv.tree.render import in_dump_order, render_dot
from radixkv.types import POLICIES, BackupRequest, Event, NodeInfo, TreeStats

cnp.import_array()

ERRORS = {
    RKV_ERR_ARGUMENT: InvalidArgumentError,
    RKV_ERR_HANDLE: HandleError,
    RKV_ERR_LOCK: LockError,
    RKV_ERR_STATE: StateError,
    RKV_ERR_OWNERSHIP: PageOwnershipError,
    RKV_ERR_NO_MEMORY: AllocationError,
    RKV_ERR_INTEGRITY: IntegrityError,
    RKV_ERR_CAPACITY: InvalidArgumentError,
}
"""Status of the C ABI -> exception class."""

_C_API = PyCapsule_New(<void *>rkv_get_api(RKV_ABI_VERSION), b"radixkv._C_API", NULL)

# Short calls keep the GIL: whoever takes it in between may keep it for a whole switch interval (5 ms), and the tree is done in
# microseconds. But nobody waits for the tree's lock with the GIL in hand: they try it, and if it is taken they release the GIL first.
cdef enum:
    NOGIL_TOKENS = 65536            # calls about more tokens release it in any case
    NODES_AT_ONCE = 64              # of a path; a longer one takes a second walk
    PAGES_AT_ONCE = 256             # of an insert; more take a malloc


cdef int raise_status(rkv_status status) except -1:
    raise ERRORS[status](rkv_last_error().decode("utf-8", "replace"))


cdef object int32_array(const int32_t *ids, uint64_t n):
    """A new numpy array with a copy of n ids."""
    cdef cnp.npy_intp length = n
    cdef object array = cnp.PyArray_SimpleNew(1, &length, cnp.NPY_INT32)
    if n:
        memcpy(cnp.PyArray_DATA(array), ids, 4 * n)
    return array


cdef object NO_IDS = np.zeros(0, np.int32)
"""No page ids. Nobody can write to it, so one is enough."""
cdef object ZERO = 0


cdef int read_node(object node, rkv_node *out) except -1:
    try:
        out[0] = operator.index(node)
    except TypeError:
        raise ArgumentTypeError(f"a node handle is an int, not {type(node).__name__}") from None
    except OverflowError:
        raise HandleError(f"{node} is no node handle") from None
    return 0


cdef int64_t read_int64(object value, str name) except? -1:
    try:
        return operator.index(value)
    except TypeError:
        raise ArgumentTypeError(f"{name} is an int, not {type(value).__name__}") from None
    except OverflowError:
        raise InvalidArgumentError(f"{name} {value} does not fit 64 bits") from None


cdef uint32_t read_marks(object value, str name) except? 0xffffffff:
    cdef int64_t marks = read_int64(value, name)
    if not 0 <= marks <= MAX_MARKS:
        raise InvalidArgumentError(f"{name} is {marks}, outside 0 .. {MAX_MARKS}")
    return <uint32_t>marks


cdef list as_list(object keys):
    try:
        return list(keys)
    except TypeError:
        raise ArgumentTypeError(f"keys is a sequence of token sequences, not {type(keys).__name__}") from None


def page_hash_capsule(function, ctx=0, digest_bytes=8, owner=None):
    """Wrap the address of a C ``rkv_page_hash_fn`` for ``RadixTree(page_hash=...)``.

    Args:
        function, ctx: addresses as int; both must outlive every tree that uses them (see owner). A Python callback (ctypes) works, slowly.
        digest_bytes: 8 .. 64.
        owner: kept alive by the result, and so by every tree that uses it.
    Raises: InvalidArgumentError for a NULL function or a digest_bytes out of range; ArgumentTypeError for what is no int.
    """
    cdef int64_t size = read_int64(digest_bytes, "digest_bytes")
    cdef int64_t address = read_int64(function, "function"), context = read_int64(ctx, "ctx")
    cdef PageHash hash_ = PageHash.__new__(PageHash)
    if address == 0:
        raise InvalidArgumentError("the page hash function is NULL")
    if not 8 <= size <= 64:
        raise InvalidArgumentError(f"digest_bytes {size} is not in 8..64")
    hash_.function = <rkv_page_hash_fn><size_t>address
    hash_.ctx = <void *><size_t>context
    hash_.digest_bytes = <uint32_t>size
    hash_.owner = owner
    return hash_


cdef class PageHash:
    """A page-hash callback; made by page_hash_capsule only."""
    cdef rkv_page_hash_fn function
    cdef void *ctx
    cdef object owner
    cdef readonly uint32_t digest_bytes

    def __init__(self):
        raise ArgumentTypeError("made by page_hash_capsule")


cdef class MatchResult:
    """What a match found, as of the moment it was made; see base.MatchResult."""
    cdef rkv_match found
    cdef int32_t *ids
    cdef RadixTree tree
    cdef bytes namespace

    def __dealloc__(self):
        free(self.ids)

    @property
    def num_tokens(self):
        return self.found.num_tokens

    @property
    def host_num_tokens(self):
        return self.found.host_num_tokens

    @property
    def device_node(self):
        return self.found.device_node

    @property
    def host_node(self):
        return self.found.host_node

    @property
    def loading_tokens(self):
        return self.found.loading_tokens

    def page_ids(self):
        """A new int32 array: the device page ids of the hit, [num_tokens // page_size]."""
        return int32_array(self.ids, self.found.num_tokens // self.tree.c_page_size)

    def host_page_ids(self):
        """A new int32 array: the host page ids beyond them, [host_num_tokens // page_size]."""
        return int32_array(self.ids + self.found.num_tokens // self.tree.c_page_size,
                           self.found.host_num_tokens // self.tree.c_page_size)

    def __repr__(self):
        return (f"MatchResult(num_tokens={self.num_tokens}, host_num_tokens={self.host_num_tokens}, "
                f"device_node={self.device_node:#x}, host_node={self.host_node:#x})")


cdef struct PagesOut:               # what an insert says of page ids
    int32_t few[PAGES_AT_ONCE]
    int32_t *ids                    # few, or memory of malloc
    uint64_t num_adopted


cdef inline void release_pages(PagesOut *pages) noexcept:
    if pages.ids != pages.few:
        free(pages.ids)


cdef class InsertResult:
    """What insert did; see base.InsertResult."""
    cdef readonly int64_t prefix_tokens
    cdef readonly uint64_t node
    cdef readonly object duplicate_page_ids
    cdef readonly object adopted_host_page_ids

    def __repr__(self):
        return f"InsertResult(prefix_tokens={self.prefix_tokens}, node={self.node:#x}, duplicates={len(self.duplicate_page_ids)})"


cdef class InsertHostResult:
    """What insert_host did; see base.InsertHostResult."""
    cdef readonly int64_t prefix_tokens
    cdef readonly uint64_t node
    cdef readonly object duplicate_host_page_ids

    def __repr__(self):
        return (f"InsertHostResult(prefix_tokens={self.prefix_tokens}, node={self.node:#x}, "
                f"duplicates={len(self.duplicate_host_page_ids)})")


cdef class EvictResult:
    """Pages that left the tree; see base.EvictResult. The arrays are made at first use."""
    cdef rkv_freed freed
    cdef object _page_ids, _host_page_ids, _to_backup

    def __cinit__(self):
        self.freed.struct_size = sizeof(rkv_freed)

    def __dealloc__(self):
        rkv_freed_release(&self.freed)

    @property
    def num_tokens(self):
        return self.freed.num_tokens

    @property
    def page_ids(self):
        if self._page_ids is None:
            self._page_ids = int32_array(self.freed.page_ids, self.freed.num_pages)
        return self._page_ids

    @property
    def host_page_ids(self):
        if self._host_page_ids is None:
            self._host_page_ids = int32_array(self.freed.host_page_ids, self.freed.num_host_pages)
        return self._host_page_ids

    @property
    def to_backup(self):
        cdef uint64_t k
        cdef rkv_backup *b
        if self._to_backup is None:
            requests = []
            for k in range(self.freed.num_backups):
                b = &self.freed.backups[k]
                requests.append(BackupRequest(b.node, int32_array(self.freed.backup_page_ids + b.first_page, b.num_pages)))
            self._to_backup = requests
        return self._to_backup

    def __repr__(self):
        return (f"EvictResult(num_tokens={self.num_tokens}, pages={self.freed.num_pages}, "
                f"host_pages={self.freed.num_host_pages}, to_backup={self.freed.num_backups})")


cdef void release_capsule(object capsule) noexcept:
    Py_DECREF(<object>PyCapsule_GetContext(capsule))


cdef class RadixTree:
    """The compiled radix tree; the contract, arguments and errors are those of ``radixkv.tree.base.BaseRadixTree``.

    Args:
        page_size: tokens a page, 1 .. 65,536.
        policy: one of radixkv.POLICIES.
        events: record KV events; max_events bounds the queue.
        page_hash: None for the built-in 64-bit chain, or a ``page_hash_capsule``.
    """
    cdef rkv_tree *c
    cdef uint32_t c_page_size
    cdef bint release_gil           # a page-hash callback may need the GIL: never hold it while waiting for the tree's lock
    cdef readonly str policy
    cdef readonly bint events       # whether KV events are recorded
    cdef object page_hash
    cdef object __weakref__

    def __cinit__(self, page_size=16, policy="lru", *, events=False, max_events=DEFAULT_MAX_EVENTS, page_hash=None):
        cdef rkv_tree_config config
        cdef int64_t size = read_int64(page_size, "page_size"), most = read_int64(max_events, "max_events")
        if policy not in POLICIES:
            raise InvalidArgumentError(f"unknown policy {policy!r}; one of {', '.join(POLICIES)}")
        if not 1 <= size <= MAX_PAGE_SIZE:
            raise InvalidArgumentError(f"page_size {size} is not in 1..{MAX_PAGE_SIZE}")
        if most < 1:
            raise InvalidArgumentError(f"max_events {most} is less than 1")
        memset(&config, 0, sizeof(config))
        config.struct_size = sizeof(config)
        config.page_size = <int32_t>size
        config.policy = POLICIES.index(policy)
        config.flags = RKV_TREE_EVENTS if events else 0
        config.max_events = most
        if page_hash is not None:
            if not isinstance(page_hash, PageHash) or (<PageHash>page_hash).function == NULL:
                raise ArgumentTypeError("page_hash is None or made by page_hash_capsule")
            config.page_hash = (<PageHash>page_hash).function
            config.page_hash_ctx = (<PageHash>page_hash).ctx
            config.digest_bytes = (<PageHash>page_hash).digest_bytes
            self.release_gil = True
        cdef rkv_status status = rkv_tree_create(&config, &self.c)
        if status != RKV_OK:
            raise_status(status)
        self.c_page_size = <uint32_t>size
        self.policy = policy
        self.events = events
        self.page_hash = page_hash

    def __dealloc__(self):
        rkv_tree_destroy(self.c)

    @property
    def page_size(self):
        """Tokens a page."""
        return self.c_page_size

    @property
    def capsule(self):
        """A PyCapsule "radixkv.tree" with the rkv_tree * of this tree, for C code in this process (see _C_API); it keeps the tree alive."""
        cdef object capsule = PyCapsule_New(self.c, b"radixkv.tree", release_capsule)
        PyCapsule_SetContext(capsule, <void *>self)
        Py_INCREF(self)
        return capsule

    def __repr__(self):
        return f"RadixTree(page_size={self.c_page_size}, policy={self.policy!r}, nodes={len(self)})"

    def __bool__(self):
        return True                 # a tree is there, if it is empty too

    # ---- look-up ----

    cdef int make_key(self, rkv_key *key, TokenView *view, object tokens, bytes namespace) except -1:
        key.struct_size = sizeof(rkv_key)
        read_tokens(tokens, view)
        key.tokens = view.data
        key.num_tokens = view.n
        key.ns = NULL
        key.ns_bytes = 0
        if namespace is not None:
            key.ns = PyBytes_AS_STRING(namespace)
            key.ns_bytes = PyBytes_GET_SIZE(namespace)
        return 0

    cdef bint try_lock(self, int64_t num_tokens) noexcept nogil:
        """The tree's lock, if it is free and the call is short. True: the caller works with the GIL, and releases the lock."""
        return num_tokens <= NOGIL_TOKENS and not self.release_gil and rwlock_try_write(&(<Tree *>self.c).lock)

    cdef void release(self) noexcept nogil:
        rwlock_release(&(<Tree *>self.c).lock)

    cdef rkv_status find(self, const rkv_key *key, MatchResult result, bint read_only) noexcept nogil:
        if read_only:
            return rkv_tree_peek(self.c, key, result.ids, &result.found)
        return rkv_tree_match(self.c, key, result.ids, &result.found)

    cdef MatchResult look_up(self, object tokens, object extra_key, object cache_salt, bint read_only):
        cdef MatchResult result = MatchResult.__new__(MatchResult)
        cdef rkv_key key
        cdef TokenView view
        cdef rkv_status status
        view.owned = NULL
        view.has_buffer = False
        result.tree = self
        result.found.struct_size = sizeof(rkv_match)
        if extra_key is not None or cache_salt is not None:
            result.namespace = encode_namespace(extra_key, cache_salt)
        try:
            self.make_key(&key, &view, tokens, result.namespace)
            result.ids = <int32_t *>malloc(4 * (key.num_tokens // self.c_page_size + 1))
            if result.ids == NULL:
                raise AllocationError("no memory for the page ids of a match")
            if not read_only and self.try_lock(key.num_tokens):
                status = match(<Tree *>self.c, &key, result.ids, &result.found)
                self.release()
            else:
                with nogil:
                    status = self.find(&key, result, read_only)
        finally:
            release_tokens(&view)
        if status != RKV_OK:
            raise_status(status)
        return result

    def match(self, tokens, extra_key=None, cache_salt=None):
        """Find the longest cached prefix and stamp its path; see BaseRadixTree.match."""
        return self.look_up(tokens, extra_key, cache_salt, False)

    def peek(self, tokens, extra_key=None, cache_salt=None):
        """As match, but read-only; see BaseRadixTree.peek."""
        return self.look_up(tokens, extra_key, cache_salt, True)

    def peek_many(self, keys, extra_key=None, cache_salt=None):
        """Peek at many keys: int64 [len(keys), 2] of (num_tokens, host_num_tokens); see BaseRadixTree.peek_many."""
        cdef list held = as_list(keys)
        cdef size_t n = len(held), k, read = 0
        cdef rkv_key *c_keys = <rkv_key *>malloc((n + 1) * sizeof(rkv_key))
        cdef rkv_match *found = <rkv_match *>malloc((n + 1) * sizeof(rkv_match))
        cdef TokenView *views = <TokenView *>malloc((n + 1) * sizeof(TokenView))
        cdef bytes namespace = None
        cdef int64_t[:, ::1] out
        cdef rkv_status status
        try:
            if c_keys == NULL or found == NULL or views == NULL:
                raise AllocationError(f"no memory for {n} keys")
            if extra_key is not None or cache_salt is not None:
                namespace = encode_namespace(extra_key, cache_salt)
            for k in range(n):
                views[k].owned = NULL
                views[k].has_buffer = False
                read = k + 1
                self.make_key(&c_keys[k], &views[k], held[k], namespace)
                found[k].struct_size = sizeof(rkv_match)
            with nogil:
                status = rkv_tree_peek_many(self.c, c_keys, n, found)
            if status != RKV_OK:
                raise_status(status)
            result = np.empty((n, 2), dtype=np.int64)
            out = result
            for k in range(n):
                out[k, 0] = found[k].num_tokens
                out[k, 1] = found[k].host_num_tokens
            return result
        finally:
            for k in range(read):
                release_tokens(&views[k])
            free(views)
            free(found)
            free(c_keys)

    def match_extend(self, match, tokens):
        """Go on from an earlier match with the tokens after it; see BaseRadixTree.match_extend."""
        cdef MatchResult prior, result = MatchResult.__new__(MatchResult)
        cdef rkv_key key
        cdef TokenView view
        cdef rkv_status status
        prior = self.own_match(match)
        view.owned = NULL
        view.has_buffer = False
        result.tree = self
        result.namespace = prior.namespace
        result.found.struct_size = sizeof(rkv_match)
        try:
            self.make_key(&key, &view, tokens, result.namespace)
            result.ids = <int32_t *>malloc(
                4 * ((<size_t>(prior.found.num_tokens + prior.found.host_num_tokens) + key.num_tokens) // self.c_page_size + 1))
            if result.ids == NULL:
                raise AllocationError("no memory for the page ids of a match")
            with nogil:
                status = rkv_tree_match_extend(self.c, &prior.found, &key, result.ids, &result.found)
        finally:
            release_tokens(&view)
        if status != RKV_OK:
            raise_status(status)
        return result

    cdef MatchResult own_match(self, object match):
        if not isinstance(match, MatchResult):
            raise ArgumentTypeError(f"match is a MatchResult of this tree, not {type(match).__name__}")
        if (<MatchResult>match).tree is not self:
            raise HandleError("the match is of another tree")
        return <MatchResult>match

    # ---- growth ----

    cdef int add(self, object tokens, object page_ids, object match, object extra_key, object cache_salt, object priority, bint host,
                 rkv_insert *out, PagesOut *pages) except -1:
        """insert and insert_host. pages: release_pages must follow, also after an exception."""
        cdef rkv_key key
        cdef TokenView view, ids
        cdef const rkv_match *hint = NULL
        cdef bytes namespace = None
        cdef int64_t wanted = 0 if priority is ZERO else read_int64(priority, "priority")
        cdef rkv_status status
        if wanted < -0x80000000 or wanted > 0x7fffffff:
            raise InvalidArgumentError(f"priority is {wanted}, outside {-0x80000000} .. {0x7fffffff}")
        if match is not None:
            hint = &self.own_match(match).found
        if extra_key is not None or cache_salt is not None:
            namespace = encode_namespace(extra_key, cache_salt)
        out.struct_size = sizeof(rkv_insert)
        view.owned = ids.owned = NULL
        view.has_buffer = ids.has_buffer = False
        try:
            self.make_key(&key, &view, tokens, namespace)
            read_tokens(page_ids, &ids)
            if ids.n > PAGES_AT_ONCE:
                pages.ids = <int32_t *>malloc(4 * ids.n)
                if pages.ids == NULL:
                    raise AllocationError(f"no memory for {ids.n} page ids")
            if self.try_lock(key.num_tokens):
                status = insert(<Tree *>self.c, &key, ids.data, ids.n, hint, <int32_t>wanted, HOST if host else DEVICE, pages.ids,
                                &pages.num_adopted, out)
                self.release()
            else:
                with nogil:
                    status = insert_tier(<Tree *>self.c, &key, ids.data, ids.n, hint, <int32_t>wanted, HOST if host else DEVICE,
                                         pages.ids, &pages.num_adopted, out)
            if status != RKV_OK:
                raise_status(status)
            return 0
        finally:
            release_tokens(&view)
            release_tokens(&ids)

    def insert(self, tokens, page_ids, match=None, extra_key=None, cache_salt=None, priority=0):
        """Insert a key with its device pages; see BaseRadixTree.insert."""
        cdef rkv_insert out
        cdef PagesOut pages
        cdef InsertResult result = InsertResult.__new__(InsertResult)
        pages.ids = pages.few
        pages.num_adopted = 0
        try:
            self.add(tokens, page_ids, match, extra_key, cache_salt, priority, False, &out, &pages)
            result.prefix_tokens = out.prefix_tokens
            result.node = out.node
            result.duplicate_page_ids = int32_array(pages.ids, out.num_duplicates) if out.num_duplicates else NO_IDS
            result.adopted_host_page_ids = NO_IDS
            if pages.num_adopted:
                result.adopted_host_page_ids = int32_array(pages.ids + out.prefix_tokens // self.c_page_size, pages.num_adopted)
        finally:
            release_pages(&pages)
        return result

    def insert_host(self, tokens, host_page_ids, match=None, extra_key=None, cache_salt=None, priority=0):
        """Insert pages that are on the host only; see BaseRadixTree.insert_host."""
        cdef rkv_insert out
        cdef PagesOut pages
        cdef InsertHostResult result = InsertHostResult.__new__(InsertHostResult)
        pages.ids = pages.few
        pages.num_adopted = 0
        try:
            self.add(tokens, host_page_ids, match, extra_key, cache_salt, priority, True, &out, &pages)
            result.prefix_tokens = out.prefix_tokens
            result.node = out.node
            result.duplicate_host_page_ids = int32_array(pages.ids, out.num_duplicates) if out.num_duplicates else NO_IDS
        finally:
            release_pages(&pages)
        return result

    # ---- protection ----

    cdef object protect(self, object node, int op, int64_t until_ns=0):
        cdef rkv_node handle
        cdef int64_t delta
        cdef rkv_status status
        read_node(node, &handle)
        if self.try_lock(0):
            status = protect_locked(<Tree *>self.c, handle, op, until_ns, &delta)
            self.release()
        else:
            with nogil:
                status = protect(<Tree *>self.c, handle, op, until_ns, &delta)
        if status != RKV_OK:
            raise_status(status)
        return delta

    def lock(self, node):
        """Lock the path from node to the root; returns the change of evictable tokens (<= 0)."""
        return self.protect(node, OP_LOCK)

    def unlock(self, node):
        """Undo one lock; returns the change of evictable tokens (>= 0)."""
        return self.protect(node, OP_UNLOCK)

    def protect_host(self, node):
        """Keep this node's host pages: host_ref + 1."""
        self.protect(node, OP_PROTECT_HOST)

    def release_host(self, node):
        """Undo one protect_host."""
        self.protect(node, OP_RELEASE_HOST)

    def pin(self, node, until_ns):
        """Protect the node and its path until expire(now_ns >= until_ns); returns the change of evictable tokens (<= 0)."""
        return self.protect(node, OP_PIN, read_int64(until_ns, "until_ns"))

    def unpin(self, node):
        """Remove the pin, if any; returns the change of evictable tokens (>= 0)."""
        return self.protect(node, OP_UNPIN)

    def expire(self, now_ns):
        """Remove every pin whose time has come; returns how many."""
        cdef uint64_t removed
        cdef int64_t now = read_int64(now_ns, "now_ns")
        with nogil:
            rkv_tree_expire(self.c, now, &removed)
        return removed

    # ---- eviction and the two tiers ----

    def evict(self, num_tokens, backup=False):
        """Free device pages, whole leaves in policy order; see BaseRadixTree.evict."""
        cdef EvictResult result = EvictResult.__new__(EvictResult)
        cdef int64_t n = read_int64(num_tokens, "num_tokens")
        cdef int32_t with_backup = 1 if backup else 0
        cdef rkv_status status
        if self.try_lock(n):
            status = evict(<Tree *>self.c, n, with_backup, &result.freed)
            self.release()
        else:
            with nogil:
                status = rkv_tree_evict(self.c, n, with_backup, &result.freed)
        if status != RKV_OK:
            raise_status(status)
        return result

    def evict_host(self, num_tokens):
        """Free host pages of host-only leaves; see BaseRadixTree.evict_host."""
        cdef EvictResult result = EvictResult.__new__(EvictResult)
        cdef int64_t n = read_int64(num_tokens, "num_tokens")
        cdef rkv_status status
        with nogil:
            status = rkv_tree_evict_host(self.c, n, &result.freed)
        if status != RKV_OK:
            raise_status(status)
        return result

    cdef EvictResult settle(self, object node, int op, object page_ids, bint flag):
        cdef EvictResult result = EvictResult.__new__(EvictResult)
        cdef rkv_node handle
        cdef TokenView ids
        cdef rkv_status status
        read_node(node, &handle)
        ids.data = ids.owned = NULL
        ids.has_buffer = False
        ids.n = 0
        try:
            if page_ids is not None:
                read_tokens(page_ids, &ids)
                if ids.n == 0 and ids.data == NULL:
                    ids.data = <const int32_t *>&ids
            with nogil:
                status = settle(<Tree *>self.c, handle, op, ids.data, ids.n, flag, &result.freed)
        finally:
            release_tokens(&ids)
        if status != RKV_OK:
            raise_status(status)
        return result

    def finish_backup(self, node, host_page_ids):
        """Settle one entry of to_backup; host_page_ids None = no room. See BaseRadixTree.finish_backup."""
        return self.settle(node, OP_FINISH_BACKUP, host_page_ids, False)

    def set_host(self, node, host_page_ids):
        """Record a finished write-through for the last pages of the node's path; see BaseRadixTree.set_host."""
        if host_page_ids is None:
            raise ArgumentTypeError("host_page_ids is None")
        self.settle(node, OP_SET_HOST, host_page_ids, False)

    def set_device(self, node, page_ids, loading=False):
        """Load back: give a host-only node device pages; see BaseRadixTree.set_device."""
        if page_ids is None:
            raise ArgumentTypeError("page_ids is None")
        self.settle(node, OP_SET_DEVICE, page_ids, bool(loading))

    def finish_load(self, node, success=True):
        """End a load begun with set_device(loading=True); see BaseRadixTree.finish_load."""
        return self.settle(node, OP_FINISH_LOAD, None, bool(success))

    # ---- what a controller keeps on the tree, and asks of it ----

    def mark(self, node, set=0, clear=0, num_pages=None):
        """Set and clear the caller's marks of a node, or of the last pages of its path; see BaseRadixTree.mark."""
        cdef rkv_node handle
        cdef uint32_t on = read_marks(set, "set"), off = read_marks(clear, "clear")
        cdef int64_t pages = 0
        cdef rkv_status status
        read_node(node, &handle)
        if num_pages is not None:
            pages = read_int64(num_pages, "num_pages")
            if pages < 1:
                raise InvalidArgumentError(f"mark: num_pages is {pages}, less than 1")
        if self.try_lock(0):
            status = mark_locked(<Tree *>self.c, handle, on, off, pages)
            self.release()
        else:
            with nogil:
                status = rkv_tree_mark(self.c, handle, on, off, pages)
        if status != RKV_OK:
            raise_status(status)

    cdef void hold(self) noexcept:
        """The tree's lock, however long it takes; for calls that then go on with the GIL for a moment."""
        if not self.try_lock(0):
            with nogil:
                rwlock_write(&(<Tree *>self.c).lock)

    def begin_write(self, node, marks):
        """Lock and mark a node that lacks a host copy: its device pages, else None; see BaseRadixTree.begin_write."""
        cdef rkv_node handle
        cdef uint32_t mask = read_marks(marks, "marks")
        cdef int32_t *ids = NULL
        cdef uint64_t n = 0
        cdef rkv_status status
        read_node(node, &handle)
        self.hold()
        status = begin_write_locked(<Tree *>self.c, handle, mask, &ids, &n)
        self.release()
        try:
            if status != RKV_OK:
                raise_status(status)
            return None if ids == NULL else int32_array(ids, n)
        finally:
            free(ids)

    def begin_writes(self, node, min_hits, marks):
        """Lock and mark what is due for the host along a path: (node, device pages) each; see BaseRadixTree.begin_writes."""
        cdef rkv_node handle
        cdef rkv_node due[NODES_AT_ONCE]
        cdef uint32_t mask = read_marks(marks, "marks")
        cdef int64_t hits = read_int64(min_hits, "min_hits")
        cdef int32_t *ids[NODES_AT_ONCE]
        cdef uint64_t pages[NODES_AT_ONCE]
        cdef size_t n = 0, begun = 0, k
        cdef rkv_status status
        if hits < 0:
            raise InvalidArgumentError(f"min_hits is {hits}, less than 0")
        read_node(node, &handle)
        self.hold()
        status = list_locked(<Tree *>self.c, handle, LIST_DUE_FOR_HOST, hits, mask, due, NODES_AT_ONCE, &n)
        while status == RKV_OK and begun < n:
            ids[begun] = NULL
            status = begin_write_locked(<Tree *>self.c, due[begun], mask, &ids[begun], &pages[begun])
            begun += 1
        self.release()
        try:
            if status == RKV_ERR_CAPACITY:      # a deep path that is due as a whole: node by node
                return self.begin_one_by_one(handle, hits, mask)
            if status != RKV_OK:
                raise_status(status)
            return [(due[k], int32_array(ids[k], pages[k])) for k in range(begun)]
        except BaseException:       # no memory: all is as it was
            for k in range(begun):
                if ids[k] != NULL:
                    self.end_write(due[k], mask)
            raise
        finally:
            for k in range(begun):
                free(ids[k])

    cdef list begin_one_by_one(self, rkv_node node, int64_t min_hits, uint32_t marks):
        cdef list begun = []
        try:
            for part in self.due(node, "host", min_hits, marks):
                pages = self.begin_write(part, marks)
                if pages is not None:
                    begun.append((part, pages))
        except BaseException:
            for part, pages in begun:
                self.end_write(part, marks)
            raise
        return begun

    cdef end_write(self, object node, uint32_t marks):
        self.mark(node, clear=marks)
        self.unlock(node)

    def host_pages(self, node):
        """A node's parent and its host pages, None if it has none; see BaseRadixTree.host_pages."""
        cdef rkv_node handle, parent = 0
        cdef int32_t *ids = NULL
        cdef uint64_t n = 0
        cdef rkv_status status
        read_node(node, &handle)
        self.hold()
        status = host_pages_locked(<Tree *>self.c, handle, &ids, &n, &parent)
        self.release()
        try:
            if status != RKV_OK:
                raise_status(status)
            return parent, None if ids == NULL else int32_array(ids, n)
        finally:
            free(ids)

    cdef list nodes_of_path(self, object node, int what, uint64_t min_hits, uint32_t without_marks):
        cdef rkv_node small[NODES_AT_ONCE]
        cdef rkv_node *nodes = small
        cdef rkv_node *more
        cdef rkv_node handle
        cdef size_t room = NODES_AT_ONCE, n = 0, k
        cdef rkv_status status
        read_node(node, &handle)
        try:
            while True:
                if self.try_lock(0):
                    status = list_locked(<Tree *>self.c, handle, what, min_hits, without_marks, nodes, room, &n)
                    self.release()
                else:
                    with nogil:
                        status = list_nodes(<Tree *>self.c, handle, what, min_hits, without_marks, nodes, room, &n)
                if status == RKV_OK:
                    return [nodes[k] for k in range(n)]
                if status != RKV_ERR_CAPACITY:
                    raise_status(status)
                room = n + n // 4           # another thread may split some before the second try
                more = <rkv_node *>malloc(room * sizeof(rkv_node))
                if more == NULL:
                    raise AllocationError(f"no memory for the {n} nodes of a path")
                if nodes != small:
                    free(nodes)
                nodes = more
        finally:
            if nodes != small:
                free(nodes)

    def due(self, node, tier, min_hits, without_marks=0):
        """The nodes of a path that lack their copy in the next tier, root side first; see BaseRadixTree.due."""
        cdef int64_t hits = read_int64(min_hits, "min_hits")
        cdef uint32_t marks = read_marks(without_marks, "without_marks")
        if tier not in ("host", "storage"):
            raise InvalidArgumentError(f"due: tier is {tier!r}, not 'host' or 'storage'")
        if hits < 0:
            raise InvalidArgumentError(f"min_hits is {hits}, less than 0")
        return self.nodes_of_path(node, LIST_DUE_FOR_HOST if tier == "host" else LIST_DUE_FOR_STORAGE, hits, marks)

    def path(self, node):
        """The nodes of the path root -> node, root side first."""
        return self.nodes_of_path(node, LIST_ALL, 0, 0)

    def host_path(self, node):
        """The host-only tail of the path root -> node, root side first."""
        return self.nodes_of_path(node, LIST_HOST_ONLY, 0, 0)

    # ---- structure ----

    def split_at(self, node, num_tokens):
        """Split off the node's first num_tokens as a new upper node; returns its handle."""
        cdef rkv_node handle, upper = 0
        cdef int64_t n = read_int64(num_tokens, "num_tokens")
        cdef rkv_status status
        read_node(node, &handle)
        with nogil:
            status = rkv_tree_split_at(self.c, handle, n, &upper)
        if status != RKV_OK:
            raise_status(status)
        return upper

    def delete(self, node):
        """Delete a node with its subtree; see BaseRadixTree.delete."""
        return self.settle(node, OP_DELETE, None, False)

    def delete_namespace(self, extra_key=None, cache_salt=None):
        """Delete every node of a namespace; see BaseRadixTree.delete_namespace."""
        cdef EvictResult result = EvictResult.__new__(EvictResult)
        cdef bytes namespace = encode_namespace(extra_key, cache_salt)
        cdef const char *name = PyBytes_AS_STRING(namespace)
        cdef size_t n = PyBytes_GET_SIZE(namespace)
        cdef rkv_status status
        with nogil:
            status = rkv_tree_delete_namespace(self.c, name, n, &result.freed)
        if status != RKV_OK:
            raise_status(status)
        return result

    def reset(self):
        """Drop everything, locked or not; returns the pages of both tiers. See BaseRadixTree.reset."""
        cdef EvictResult result = EvictResult.__new__(EvictResult)
        cdef rkv_status status
        with nogil:
            status = rkv_tree_reset(self.c, &result.freed)
        if status != RKV_OK:
            raise_status(status)
        return result

    # ---- events, hashes, inspection ----

    def take_events(self, max_events=None):
        """Drain the event queue, oldest first: a list of Event."""
        cdef size_t capacity, n = 0, k
        cdef rkv_event *events = NULL
        cdef int32_t *tokens = NULL
        cdef rkv_status status
        cdef int64_t most = self.stats().queued_events
        if max_events is not None:
            if read_int64(max_events, "max_events") < 0:
                raise InvalidArgumentError(f"max_events is {max_events}, less than 0")
            most = min(most, read_int64(max_events, "max_events"))
        capacity = most
        try:
            events = <rkv_event *>malloc((capacity + 1) * sizeof(rkv_event))
            tokens = <int32_t *>malloc((capacity + 1) * 4 * self.c_page_size)
            if events == NULL or tokens == NULL:
                raise AllocationError(f"no memory for {capacity} events")
            with nogil:
                status = rkv_tree_take_events(self.c, events, tokens, capacity, &n)
            if status != RKV_OK:
                raise_status(status)
            result = []
            for k in range(n):
                result.append(self.make_event(&events[k], tokens + k * self.c_page_size))
            return result
        finally:
            free(events)
            free(tokens)

    cdef object make_event(self, const rkv_event *e, const int32_t *tokens):
        if e.kind == RKV_EVENT_CLEARED:
            return Event("cleared", 0, None, None, None)
        return Event(
            "stored" if e.kind == RKV_EVENT_STORED else "removed", e.key, e.parent_key if e.has_parent else None,
            int32_array(tokens, self.c_page_size) if e.has_tokens else None,
            "device" if e.medium == RKV_MEDIUM_DEVICE else "host")

    cdef size_t num_pages(self, rkv_node node) except? 0:
        cdef size_t n = 0
        cdef rkv_status status
        with nogil:
            status = rkv_tree_page_keys(self.c, node, NULL, 0, &n)
        if status != RKV_OK:
            raise_status(status)
        return n

    def page_keys(self, node):
        """The keys of the node's own pages: uint64 [pages]."""
        cdef rkv_node handle
        read_node(node, &handle)
        cdef size_t n = self.num_pages(handle)
        result = np.empty(n, dtype=np.uint64)
        cdef uint64_t[::1] out = result
        cdef rkv_status status
        if n:
            with nogil:
                status = rkv_tree_page_keys(self.c, handle, &out[0], n, &n)
            if status != RKV_OK:
                raise_status(status)
        return result[:n]           # another thread may have split the node since it was asked for its length

    def page_digests(self, node):
        """The digests of the node's own pages: uint8 [pages, digest_bytes]."""
        cdef rkv_node handle
        read_node(node, &handle)
        cdef size_t n = self.num_pages(handle)
        result = np.empty((n, 8 if self.page_hash is None else self.page_hash.digest_bytes), dtype=np.uint8)
        cdef uint8_t[:, ::1] out = result
        cdef rkv_status status
        if n:
            with nogil:
                status = rkv_tree_page_digests(self.c, handle, &out[0, 0], n, &n)
            if status != RKV_OK:
                raise_status(status)
        return result[:n]

    def node_info(self, node):
        """A snapshot of one node: a NodeInfo."""
        cdef rkv_node handle
        read_node(node, &handle)
        if handle == 0:
            raise InvalidArgumentError("node_info: not possible for the root")
        return self.snapshot(handle)[0]

    def dump(self):
        """Every node at one moment, parents first, siblings by their tokens, namespaces by their encoding: a list of NodeInfo."""
        return in_dump_order(self.snapshot(0))

    cdef list snapshot(self, rkv_node only):
        """One node (all, for ROOT), copied under one lock, then made into Python objects without it."""
        cdef Snapshot s
        cdef uint64_t k
        cdef rkv_status status
        memset(&s, 0, sizeof(s))
        try:
            with nogil:
                status = take_snapshot(<Tree *>self.c, only, &s)
            if status != RKV_OK:
                raise_status(status)
            return [self.make_info(&s, &s.nodes[k]) for k in range(s.num_nodes)]
        finally:
            release_snapshot(&s)

    cdef object make_info(self, const Snapshot *s, const SnapshotNode *n):
        cdef const rkv_node_info *info = &n.info
        cdef uint64_t pages = info.num_tokens // self.c_page_size
        return NodeInfo(
            n.handle, info.parent, (<const char *>s.names + n.first_name)[:info.ns_bytes],
            int32_array(s.tokens + n.first_page * self.c_page_size, info.num_tokens), info.path_tokens,
            int32_array(s.device + n.first_page, pages) if info.on_device else None,
            int32_array(s.host + n.first_page, pages) if info.on_host else None,
            info.lock_ref, info.host_ref, info.hit_count, info.priority, info.access_time, info.created_time,
            info.pinned_until_ns if info.pinned else None, bool(info.loading), bool(info.backup_pending), info.marks)

    def to_dot(self):
        """The tree as a Graphviz digraph."""
        return render_dot(self.dump())

    def __iter__(self):
        return iter([info.node for info in self.dump()])

    def __len__(self):
        return self.stats().nodes

    def stats(self):
        """Counters: a TreeStats."""
        cdef rkv_tree_stats s
        cdef rkv_status status
        s.struct_size = sizeof(s)
        with nogil:
            status = rkv_tree_get_stats(self.c, &s)
        if status != RKV_OK:
            raise_status(status)
        return TreeStats(
            s.evictable_tokens, s.protected_tokens, s.pending_tokens, s.host_tokens, s.nodes, s.namespaces, s.pinned_nodes,
            s.memory_bytes, s.digest_memory_bytes, s.queued_events, s.dropped_events, s.host_evictable_tokens, s.loading_tokens)

    def check_integrity(self, capacity=None, free_page_ids=None, host_capacity=None, free_host_page_ids=None):
        """Verify every invariant from scratch; see BaseRadixTree.check_integrity."""
        cdef rkv_tier_check device, host
        cdef TokenView device_ids, host_ids
        cdef rkv_status status
        device_ids.owned = host_ids.owned = NULL
        device_ids.has_buffer = host_ids.has_buffer = False
        try:
            fill_tier(&device, &device_ids, capacity, free_page_ids)
            fill_tier(&host, &host_ids, host_capacity, free_host_page_ids)
            with nogil:
                status = rkv_tree_check_integrity(self.c, &device, &host, NULL, 0)
        finally:
            release_tokens(&device_ids)
            release_tokens(&host_ids)
        if status != RKV_OK:
            raise_status(status)


cdef int fill_tier(rkv_tier_check *tier, TokenView *view, object capacity, object free_page_ids) except -1:
    tier.struct_size = sizeof(rkv_tier_check)
    tier.capacity_pages = -1
    tier.free_page_ids = NULL
    tier.num_free_pages = 0
    if capacity is None:
        if free_page_ids is not None:
            raise InvalidArgumentError("free page ids without the tier's capacity")
        return 0
    tier.capacity_pages = read_int64(capacity, "capacity")
    if tier.capacity_pages < 0:  # to the C function this means "do not check", which must be said with None here
        raise InvalidArgumentError(f"capacity is {tier.capacity_pages} pages, less than 0")
    read_tokens(() if free_page_ids is None else free_page_ids, view)
    tier.free_page_ids = view.data
    tier.num_free_pages = view.n
    return 0


BaseRadixTree.register(RadixTree)
