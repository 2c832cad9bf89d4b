"""remove, clear_worker, remove_worker, and eviction."""

from .index_state cimport *
from .index_arena cimport *
from .index_directory cimport *
from .index_sets cimport *
from .index_nodes cimport *
from .index_insert cimport relabel, want_set

cdef struct Stretch:
    Shard *s
    uint32_t node
    uint32_t first      # pages first .. last - 1 of the node's run
    uint32_t last
    uint32_t length     # keys consumed


cdef inline void lock_shards(Index *index, uint64_t mask, bint exclusive) noexcept nogil:
    cdef uint32_t i
    for i in range(NUM_SHARDS):
        if mask >> i & 1:
            if exclusive:
                rkv_lock_exclusive(&index.shards[i].lock)
            else:
                rkv_lock_shared(&index.shards[i].lock)


cdef inline void unlock_shards(Index *index, uint64_t mask) noexcept nogil:
    cdef uint32_t i
    for i in range(NUM_SHARDS):
        if mask >> i & 1:
            rkv_unlock(&index.shards[i].lock)


cdef inline uint64_t shards_of(Index *index, const uint64_t *keys, uint32_t n) noexcept nogil:
    cdef uint64_t mask = 0
    cdef uint32_t i, place
    for i in range(n):
        place = place_of(index, keys[i])
        if place != NOWHERE:
            mask |= <uint64_t>1 << (place >> POS_BITS)
    return mask


cdef inline bint next_stretch(
    Index *index, uint64_t mask, const uint64_t *keys, uint32_t n, Stretch *out
) noexcept nogil:
    """The keys' next pages that lie side by side in one node, in rising or falling order. False: keys[0] is unknown (length 1),
    or in a shard that is not locked: then it became known after the locks were taken, so after this removal."""
    cdef uint32_t place = place_of(index, keys[0]), at, i = 1
    cdef Node *x
    out.length = 1
    if place == NOWHERE or not mask >> (place >> POS_BITS) & 1:
        return False
    out.s = &index.shards[place >> POS_BITS]
    out.node = owners_at(out.s, place & POS_MASK)[0]
    x = &out.s.nodes[out.node]
    at = (place & POS_MASK) - x.pos
    out.first = at
    out.last = at + 1
    if n > 1 and at and keys[1] == x.keys[at - 1]:
        while i < n and i <= at and keys[i] == x.keys[at - i]:
            i += 1
        out.first = at + 1 - i
    else:
        i = common(x.keys + at, keys, minimum(x.num_pages - at, n))
        out.last = at + i
    out.length = i
    return True


cdef inline void drop_stretch(Index *index, Stretch *t, uint32_t worker) noexcept nogil:
    """The worker holds the stretch no more. Cuts a tail that nobody else holds; else splits the stretch off and takes it out of that."""
    cdef Shard *s = t.s
    cdef uint32_t id = t.node
    cdef Node *x = &s.nodes[id]
    if x.first_child == 0 and t.last == x.num_pages and t.first and s.sets[x.set].size == 1:
        cut(index, s, id, t.first)
        return
    if t.last < x.num_pages:
        id = split(index, s, id, t.last)
    if t.first:
        split(index, s, id, t.first)
    relabel(s, id, worker, False)
    settle(index, s, id)


cdef inline rkv_status index_remove(
    Index *index, uint32_t worker, const uint64_t *keys, uint32_t n, uint64_t *removed
) noexcept nogil:
    """1. lock every shard that the keys are in; 2. reserve; 3. change."""
    cdef uint64_t mask = 0, found
    cdef uint32_t i = 0
    cdef Stretch t
    cdef bint enough = True
    removed[0] = 0
    found = shards_of(index, keys, n)
    while True:
        mask |= found
        lock_shards(index, mask, True)
        found = shards_of(index, keys, n)
        if found & ~mask == 0:
            break
        unlock_shards(index, mask)
    for i in range(NUM_SHARDS):
        if mask >> i & 1:
            index.shards[i].want_nodes = 0
            index.shards[i].want_sets = 0
            index.shards[i].want_members = 0
    i = 0
    while i < n:
        if next_stretch(index, mask, keys + i, n - i, &t) and holds(t.s, t.s.nodes[t.node].set, worker):
            t.s.want_nodes += 2
            want_set(t.s, t.s.sets[t.s.nodes[t.node].set].size)
        i += t.length
    for i in range(NUM_SHARDS):
        if mask >> i & 1 and index.shards[i].want_nodes:
            enough = enough and reserve_nodes(index, &index.shards[i], index.shards[i].want_nodes)
            enough = enough and reserve_sets(
                index, &index.shards[i], index.shards[i].want_sets, index.shards[i].want_members)
    i = 0
    while enough and i < n:
        if next_stretch(index, mask, keys + i, n - i, &t) and holds(t.s, t.s.nodes[t.node].set, worker):
            removed[0] += t.last - t.first
            drop_stretch(index, &t, worker)
        i += t.length
    unlock_shards(index, mask)
    if not enough:
        return rkv_leaf_fail(RKV_ERR_NO_MEMORY, "no memory to remove %u pages", n)
    return RKV_OK


cdef inline uint64_t clear_set(Index *index, Shard *s, uint32_t set, uint32_t worker) noexcept nogil:
    """Take the worker out of one of its sets, so of all its nodes. Needs no memory: the set itself shrinks, unless the result exists already
    (or is empty); then its nodes move there one by one. Returns pages dropped."""
    cdef uint64_t removed = 0
    cdef uint32_t id, after, target
    if shrink_set(s, set, worker):
        id = s.sets[set].first_node
        while id:
            removed += s.nodes[id].num_pages
            id = s.nodes[id].next_in_set
        s.entries -= removed
        return removed
    target = known_set(s, set, worker, False) if s.sets[set].size > 1 else 0
    while s.sets[set].size:             # it is freed with its last node; joins on the way may take some, too
        id = s.sets[set].first_node
        removed += s.nodes[id].num_pages
        after = s.nodes[id].parent
        leave_set(s, id)
        join_set(s, id, target)
        if target == 0:
            settle(index, s, id)
        else:
            join(s, id)
            join(s, after)
    return removed


cdef inline uint64_t clear_shard(Index *index, Shard *s, uint32_t id, bint forget_id) noexcept nogil:
    cdef Worker *worker = worker_of(s, id)
    cdef uint64_t removed = 0
    if worker == NULL:
        return 0
    while worker.first:
        removed += clear_set(index, s, s.members[worker.first].set, id)
    if forget_id:
        forget_worker(index, s, worker)
    return removed


cdef inline void index_clear(Index *index, uint32_t worker, bint forget_id, uint64_t *removed) noexcept nogil:
    """The orphans first, which are in the last shard: an insert of another worker may move them to a shard that has its turn later,
    and nothing moves the other way."""
    cdef uint32_t i = NUM_SHARDS
    cdef bint known
    removed[0] = 0
    while i > 0:
        i -= 1
        rkv_lock_shared(&index.shards[i].lock)
        known = worker_of(&index.shards[i], worker) != NULL
        rkv_unlock(&index.shards[i].lock)
        if known:
            rkv_lock_exclusive(&index.shards[i].lock)
            removed[0] += clear_shard(index, &index.shards[i], worker, forget_id)
            rkv_unlock(&index.shards[i].lock)


cdef inline void evict_from(Index *index, Shard *s) noexcept nogil:
    """Evict (part of) the shard's oldest leaf, unless another shard's is older: then do nothing but tell so in s.oldest."""
    cdef uint32_t id = oldest_leaf(s), i, parent, pages
    cdef uint64_t excess = rkv_load(&index.pages)
    if id == 0 or excess <= index.max_pages:
        return
    for i in range(NUM_SHARDS):
        if rkv_load(&index.shards[i].oldest) < s.heap[0].stamp:
            return
    excess -= index.max_pages
    pages = s.nodes[id].num_pages
    if excess < pages:
        rkv_add(&index.evicted, excess)
        cut(index, s, id, pages - <uint32_t>excess)
        return
    rkv_add(&index.evicted, pages)
    parent = s.nodes[id].parent
    forget_pages(index, s, id, 0)
    drop_node(index, s, id)
    settle(index, s, parent)
    oldest_leaf(s)


cdef inline void evict(Index *index) noexcept nogil:
    """Shards publish a lower bound of their oldest leaf's stamp. The smallest is locked and its bound made exact; if it is the smallest
    still, it is evicted from. Each round either evicts or raises a bound."""
    cdef uint32_t i, best
    if index.max_pages == 0 or rkv_load(&index.pages) <= index.max_pages:
        return
    rkv_mutex_lock(&index.evicting)
    while rkv_load(&index.pages) > index.max_pages:
        best = 0
        for i in range(NUM_SHARDS):
            if rkv_load(&index.shards[i].oldest) < rkv_load(&index.shards[best].oldest):
                best = i
        if rkv_load(&index.shards[best].oldest) == ~<uint64_t>0:
            break
        rkv_lock_exclusive(&index.shards[best].lock)
        evict_from(index, &index.shards[best])
        rkv_unlock(&index.shards[best].lock)
    rkv_mutex_unlock(&index.evicting)
