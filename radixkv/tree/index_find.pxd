"""find: one shared lock, one head look-up and one comparison a node, one pass over the holders where they change."""

from .index_state cimport *
from .index_arena cimport *
from .index_sets cimport *
from .index_nodes cimport *


cdef inline rkv_node handle_of(Shard *s, uint32_t id) noexcept nogil:
    return <uint64_t>s.nodes[id].generation << 38 | <uint64_t>s.id << 32 | id


cdef inline Node *node_of(Shard *s, rkv_node handle) noexcept nogil:
    """NULL: stale or never given out. The shard is locked."""
    cdef uint32_t id = <uint32_t>handle
    if id == 0 or id >= s.num_nodes or s.nodes[id].num_pages == 0 or s.nodes[id].generation != handle >> 38:
        return NULL
    return &s.nodes[id]


cdef inline void first_holders(Shard *s, uint32_t set, rkv_index_hit *hit) noexcept nogil:
    cdef Member *m = members_of(s, set)
    cdef uint32_t i
    for i in range(s.sets[set].size):
        hit.workers[i] = m[i].worker
        hit.pages[i] = 0
    hit.num_workers = s.sets[set].size


cdef inline uint32_t drop_out(Shard *s, uint32_t set, rkv_index_hit *hit, uint32_t pages, uint32_t active) noexcept nogil:
    """Workers that still count (pages[i] == 0) but do not hold this node end with `pages`. Returns how many still count."""
    cdef Member *m = members_of(s, set)
    cdef uint32_t i, j = 0, size = s.sets[set].size
    for i in range(<uint32_t>hit.num_workers):
        if hit.pages[i] == 0:
            while j < size and m[j].worker < hit.workers[i]:
                j += 1
            if j == size or m[j].worker != hit.workers[i]:
                hit.pages[i] = pages
                active -= 1
    return active


cdef inline bint add_path_node(Shard *s, uint32_t id, uint32_t first, uint32_t pages, rkv_index_hit *hit) noexcept nogil:
    """False: a buffer is too small; both counts still rise, so that they say what is needed."""
    cdef uint32_t i, set = s.nodes[id].set, size = s.sets[set].size
    cdef Member *m = members_of(s, set)
    cdef rkv_index_node *out
    cdef bint fits = hit.num_nodes < hit.max_nodes and hit.num_holders + size <= hit.max_holders
    if fits:
        out = &hit.nodes[hit.num_nodes]
        out.node = handle_of(s, id)
        out.word = rkv_load(&s.nodes[id].word)
        out.first_page = first
        out.num_pages = pages
        out.first_holder = hit.num_holders
        out.num_holders = size
        for i in range(size):
            hit.holders[hit.num_holders + i] = m[i].worker
    hit.num_nodes += 1
    hit.num_holders += size
    return fits


cdef inline rkv_status find_locked(
    Index *index, Shard *s, const uint64_t *keys, uint32_t n, rkv_index_hit *hit
) noexcept nogil:
    cdef uint32_t x = 0, i = 0, c, set = 0, active = 0, j
    cdef uint64_t now = rkv_add(&index.clock, 1) if index.max_pages else 0
    cdef Node *node
    cdef bint fits = True
    while i < n:
        x = child_at(s, x, keys[i])
        if x == 0:
            break
        node = &s.nodes[x]
        c = common(node.keys, keys + i, minimum(node.num_pages, n - i))
        if i == 0:
            active = s.sets[node.set].size
            hit.num_workers = active
            if active > hit.max_workers:
                fits = False
                if hit.nodes == NULL:
                    break
            else:
                first_holders(s, node.set, hit)
        elif active and node.set != set and hit.num_workers <= hit.max_workers:
            active = drop_out(s, node.set, hit, i, active)
        if active == 0 and hit.nodes == NULL:
            break
        set = node.set
        if now:
            rkv_store(&node.stamp, now)
        if hit.nodes != NULL and not add_path_node(s, x, i, c, hit):
            fits = False
        i += c
        if c < node.num_pages:
            break
    if not fits:
        return RKV_ERR_CAPACITY
    for j in range(<uint32_t>hit.num_workers if active else 0):
        if hit.pages[j] == 0:
            hit.pages[j] = i
    return RKV_OK


cdef inline rkv_status index_find(
    Index *index, const uint64_t *keys, uint32_t n, rkv_index_hit *hit, bint wait
) noexcept nogil:
    """wait False: RKV_ERR_LOCK_BUSY (1) instead of blocking."""
    cdef Shard *s
    cdef rkv_status status
    hit.num_workers = 0
    hit.num_nodes = 0
    hit.num_holders = 0
    if n == 0:
        return RKV_OK
    s = shard_of(index, keys[0])
    if not wait:
        if not rkv_try_lock_shared(&s.lock):
            return 1
    else:
        rkv_lock_shared(&s.lock)
    status = find_locked(index, s, keys, n, hit)
    rkv_unlock(&s.lock)
    return status
