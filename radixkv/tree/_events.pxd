"""Page digests and KV events."""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memmove
from radixkv.tree._abi cimport (
    RKV_EVENT_CLEARED, RKV_EVENT_STORED, load_be64, namespace_seed, page_chain, rkv_event, rkv_page_run, store_be64,
)
from radixkv.tree._memory cimport grow
from radixkv.tree._nodes cimport HASHED, LIVE, Namespace, Node, Tree, is_root
from radixkv.tree._store cimport store_reserve, unit_digest, unit_key


cdef inline void hash_node(Tree *t, uint32_t i) noexcept nogil:
    """Fill in the digests of a node's pages; its parent's are there and the store has room for digests."""
    cdef Node *n = &t.nodes[i]
    cdef Node *p = &t.nodes[n.parent]
    cdef const uint8_t *parent = NULL
    cdef Namespace *space = &t.spaces[t.nodes[n.root].start]
    cdef rkv_page_run run
    cdef uint64_t h
    cdef uint32_t k
    if not is_root(t, n.parent):
        parent = unit_digest(&t.store, p.start + p.num_pages - 1)
    if t.page_hash != NULL:
        run.struct_size = sizeof(rkv_page_run)
        run.page_size = <int32_t>t.page_size
        run.ns = space.name
        run.ns_bytes = space.name_bytes
        run.parent = parent
        run.tokens = unit_key(&t.store, n.start)
        run.num_pages = n.num_pages
        run.digests = unit_digest(&t.store, n.start)
        t.page_hash(t.page_hash_ctx, &run)
    else:
        h = load_be64(parent) if parent != NULL else namespace_seed(space.name, space.name_bytes)
        for k in range(n.num_pages):
            h = page_chain(h, unit_key(&t.store, n.start + k), t.page_size)
            store_be64(unit_digest(&t.store, n.start + k), h)
    if n.start + n.num_pages > t.store.digest_touched:
        t.store.digest_touched = n.start + n.num_pages
    n.flags |= HASHED


cdef inline bint ensure_hashed(Tree *t, uint32_t i) noexcept nogil:
    """Digests for a node and, before it, for the ancestors that lack them. False: no memory."""
    cdef uint64_t depth = 0
    cdef uint32_t k = i
    if not t.store.digests_on:
        t.store.digests_on = True
        if not store_reserve(&t.store, t.store.top):
            t.store.digests_on = False
            return False
    while not t.nodes[k].flags & HASHED:
        if not grow(&t.allocator, <void **>&t.path, &t.path_capacity, depth + 1, 4, 64):
            return False
        t.path[depth] = k
        depth += 1
        k = t.nodes[k].parent
    while depth > 0:
        depth -= 1
        hash_node(t, t.path[depth])
    return True


cdef inline uint64_t page_key(const Tree *t, uint32_t unit) noexcept nogil:
    return load_be64(unit_digest(&t.store, unit))


cdef inline rkv_event *push_event(Tree *t) noexcept nogil:
    """A place at the end of the queue, or NULL: the queue is at its bound, or there is no memory; then the event is counted as dropped."""
    cdef uint64_t queued = t.event_end - t.event_start, capacity
    if queued >= t.max_events:
        t.dropped_events += 1
        return NULL
    capacity = t.event_capacity if t.event_capacity < t.event_token_capacity else t.event_token_capacity
    if t.event_end == capacity:
        if t.event_start > capacity // 2:
            memmove(t.events, t.events + t.event_start, queued * sizeof(rkv_event))
            memmove(t.event_tokens, t.event_tokens + t.event_start * t.page_size, queued * 4 * t.page_size)
            t.event_start = 0
            t.event_end = queued
        elif not grow(&t.allocator, <void **>&t.events, &t.event_capacity, t.event_end + 1, sizeof(rkv_event), 64) or \
                not grow(&t.allocator, <void **>&t.event_tokens, &t.event_token_capacity, t.event_end + 1,
                         4 * <size_t>t.page_size, 64):
            t.dropped_events += 1
            return NULL
    t.event_end += 1
    return &t.events[t.event_end - 1]


cdef inline void emit_page(Tree *t, int32_t kind, int32_t medium, uint32_t i, uint32_t page) noexcept nogil:
    cdef Node *n = &t.nodes[i]
    cdef Node *p = &t.nodes[n.parent]
    cdef rkv_event *e = push_event(t)
    if e == NULL:
        return
    e.kind = kind
    e.medium = medium
    e.key = page_key(t, n.start + page)
    e.has_parent = page > 0 or not is_root(t, n.parent)
    e.parent_key = 0
    if page > 0:
        e.parent_key = page_key(t, n.start + page - 1)
    elif e.has_parent:
        e.parent_key = page_key(t, p.start + p.num_pages - 1)
    e.has_tokens = kind == RKV_EVENT_STORED
    if e.has_tokens:
        memcpy(t.event_tokens + (t.event_end - 1) * t.page_size, unit_key(&t.store, n.start + page), 4 * t.page_size)


cdef inline void emit(Tree *t, int32_t kind, int32_t medium, uint32_t i) noexcept nogil:
    """One event a page of a node: stored from the front, removed from the back."""
    cdef uint32_t k, pages = t.nodes[i].num_pages
    if not t.events_on:
        return
    for k in range(pages):
        emit_page(t, kind, medium, i, k if kind == RKV_EVENT_STORED else pages - 1 - k)
