"""The forest of one shard: nodes, their links, splits, joins, and the heap of leaves."""

from .index_state cimport *
from .index_arena cimport *
from .index_directory cimport *
from .index_sets cimport *


cdef inline uint32_t common(const uint64_t *a, const uint64_t *b, uint32_t n) noexcept nogil:
    """Leading keys that a and b share."""
    return <uint32_t>(rkv_leaf_common_prefix(<const int32_t *>a, <const int32_t *>b, <size_t>n * 2) // 2)


cdef inline uint32_t child_at(Shard *s, uint32_t parent, uint64_t key) noexcept nogil:
    """The child of a node (0: of the root) whose run starts with key; 0: none."""
    cdef uint32_t i, id
    if s.heads.slots == NULL:
        return 0
    i = <uint32_t>(mix(key) >> 8) & s.heads.mask
    while True:
        id = s.heads.slots[i]
        if id == 0:
            return 0
        if s.nodes[id].keys[0] == key:
            return id if s.nodes[id].parent == parent else 0
        i = (i + 1) & s.heads.mask


# -------------------------------------------------------------------------------------------------- heap, max_pages only

cdef inline void publish_oldest(Shard *s) noexcept nogil:
    rkv_store(&s.oldest, s.heap[0].stamp if s.heap_size else ~<uint64_t>0)


cdef inline void sift_up(Shard *s, uint32_t i) noexcept nogil:
    cdef HeapEntry e = s.heap[i]
    while i and s.heap[(i - 1) // 2].stamp > e.stamp:
        s.heap[i] = s.heap[(i - 1) // 2]
        i = (i - 1) // 2
    s.heap[i] = e


cdef inline void sift_down(Shard *s, uint32_t i) noexcept nogil:
    cdef HeapEntry e = s.heap[i]
    cdef uint32_t child
    while True:
        child = 2 * i + 1
        if child >= s.heap_size:
            break
        if child + 1 < s.heap_size and s.heap[child + 1].stamp < s.heap[child].stamp:
            child += 1
        if s.heap[child].stamp >= e.stamp:
            break
        s.heap[i] = s.heap[child]
        i = child
    s.heap[i] = e


cdef inline void heap_put(Index *index, Shard *s, uint32_t id) noexcept nogil:
    """A node became a leaf. Each node slot has at most one entry, so room for max_nodes entries is always enough."""
    if index.max_pages and not s.nodes[id].in_heap:
        s.nodes[id].in_heap = 1
        s.heap[s.heap_size].stamp = rkv_load(&s.nodes[id].stamp)
        s.heap[s.heap_size].node = id
        s.heap_size += 1
        sift_up(s, s.heap_size - 1)
        publish_oldest(s)


cdef inline void heap_pop(Shard *s) noexcept nogil:
    s.nodes[s.heap[0].node].in_heap = 0
    s.heap_size -= 1
    if s.heap_size:
        s.heap[0] = s.heap[s.heap_size]
        sift_down(s, 0)


cdef inline uint32_t oldest_leaf(Shard *s) noexcept nogil:
    """The leaf with the smallest stamp, 0 if there is none. Entries go stale (found again, freed, or with children now) and are
    put right only here, when they come to the top: a find only stamps."""
    cdef uint32_t id
    cdef uint64_t stamp
    while s.heap_size:
        id = s.heap[0].node
        if s.nodes[id].num_pages == 0 or s.nodes[id].first_child:
            heap_pop(s)
            continue
        stamp = rkv_load(&s.nodes[id].stamp)
        if stamp == s.heap[0].stamp:
            break
        s.heap[0].stamp = stamp
        sift_down(s, 0)
    publish_oldest(s)
    return s.heap[0].node if s.heap_size else 0


# -------------------------------------------------------------------------------------------------------------- nodes

cdef inline bint reserve_nodes(Index *index, Shard *s, uint64_t more) noexcept nogil:
    cdef void *block
    cdef uint32_t wanted
    if <uint64_t>s.num_nodes + more > s.max_nodes:
        wanted = grown(s.num_nodes, more + 1, 16)
        if index.max_pages:
            block = resize(index, s.heap, s.max_heap * sizeof(HeapEntry), wanted * sizeof(HeapEntry))
            if block == NULL:
                return False
            s.heap = <HeapEntry *>block
            s.max_heap = wanted
        block = resize(index, s.nodes, s.max_nodes * sizeof(Node), wanted * sizeof(Node))
        if block == NULL:
            return False
        s.nodes = <Node *>block
        s.max_nodes = wanted
        if s.num_nodes == 0:
            memset(s.nodes, 0, sizeof(Node))
            s.num_nodes = 1
    return table_reserve(index, s, HEADS, more)


cdef inline void join_set(Shard *s, uint32_t id, uint32_t set) noexcept nogil:
    cdef Node *x = &s.nodes[id]
    x.set = set
    s.entries += <uint64_t>x.num_pages * s.sets[set].size
    if set == 0:
        return
    x.prev_in_set = 0
    x.next_in_set = s.sets[set].first_node
    if x.next_in_set:
        s.nodes[x.next_in_set].prev_in_set = id
    s.sets[set].first_node = id
    s.sets[set].num_nodes += 1


cdef inline void leave_set(Shard *s, uint32_t id) noexcept nogil:
    """The node is in no set then; a set without nodes is freed."""
    cdef Node *x = &s.nodes[id]
    cdef uint32_t set = x.set
    s.entries -= <uint64_t>x.num_pages * s.sets[set].size
    x.set = 0
    if set == 0:
        return
    if x.prev_in_set:
        s.nodes[x.prev_in_set].next_in_set = x.next_in_set
    else:
        s.sets[set].first_node = x.next_in_set
    if x.next_in_set:
        s.nodes[x.next_in_set].prev_in_set = x.prev_in_set
    s.sets[set].num_nodes -= 1
    if s.sets[set].num_nodes == 0:
        free_set(s, set)


cdef inline void link_child(Shard *s, uint32_t parent, uint32_t id) noexcept nogil:
    cdef Node *x = &s.nodes[id]
    x.parent = parent
    x.prev_sibling = 0
    x.next_sibling = s.nodes[parent].first_child
    if x.next_sibling:
        s.nodes[x.next_sibling].prev_sibling = id
    s.nodes[parent].first_child = id


cdef inline void unlink_child(Shard *s, uint32_t id) noexcept nogil:
    cdef Node *x = &s.nodes[id]
    if x.prev_sibling:
        s.nodes[x.prev_sibling].next_sibling = x.next_sibling
    else:
        s.nodes[x.parent].first_child = x.next_sibling
    if x.next_sibling:
        s.nodes[x.next_sibling].prev_sibling = x.prev_sibling


cdef inline uint32_t new_node(Index *index, Shard *s, uint32_t pos, uint32_t pages, uint32_t capacity) noexcept nogil:
    """A node over an extent that holds its keys; not linked, no holders, not among the heads. Reserved before."""
    cdef uint32_t id
    cdef Node *x
    if s.free_node:
        id = s.free_node
        x = &s.nodes[id]
        s.free_node = x.next_sibling
    else:
        id = s.num_nodes
        s.num_nodes += 1
        x = &s.nodes[id]
        memset(x, 0, sizeof(Node))
        x.generation = s.first_generation
    x.keys = keys_at(s, pos)
    x.word = 0
    x.stamp = 0
    x.pos = pos
    x.num_pages = pages
    x.capacity = capacity
    x.parent = 0
    x.first_child = 0
    x.next_sibling = 0
    x.prev_sibling = 0
    x.set = 0
    own(s, pos, capacity, id)
    s.live_nodes += 1
    return id


cdef inline void free_node(Shard *s, uint32_t id) noexcept nogil:
    """The slot only: links, heads, set and pages are the caller's. The generation makes its handles stale; a slot that has had them all
    is never used again (72 bytes for 67 million uses), else its first handle would be good once more."""
    cdef Node *x = &s.nodes[id]
    x.num_pages = 0
    x.generation = (x.generation + 1) & GEN_MASK
    if x.generation != s.first_generation:
        x.next_sibling = s.free_node
        s.free_node = id
    s.live_nodes -= 1


cdef inline uint32_t split(Index *index, Shard *s, uint32_t id, uint32_t pages) noexcept nogil:
    """Split off the first `pages` pages as a new node, which is returned; the id, and so the handle, stays with the rest.

        parent                    parent
          |                         |
         id [k0 k1 | k2 k3]  ->   upper [k0 k1]      both: same holders, word and stamp
          |                         |
        children                   id [k2 k3]
                                    |
                                  children
    """
    cdef uint32_t upper
    cdef Node *x
    cdef Node *u
    upper = new_node(index, s, s.nodes[id].pos, pages, pages)
    x = &s.nodes[id]
    u = &s.nodes[upper]
    u.word = x.word
    u.stamp = rkv_load(&x.stamp)
    s.heads.slots[table_slot(s, HEADS, id)] = upper
    if s.id == ORPHANS and x.parent == 0:
        s.waits.slots[table_slot(s, WAITS, id)] = upper
        x.word = 0
    unlink_child(s, id)
    link_child(s, x.parent, upper)
    s.entries -= <uint64_t>pages * s.sets[x.set].size
    x.keys += pages
    x.pos += pages
    x.num_pages -= pages
    x.capacity -= pages
    link_child(s, upper, id)
    table_put(s, HEADS, id)
    join_set(s, upper, x.set)
    return upper


cdef inline bint join(Shard *s, uint32_t upper) noexcept nogil:
    """Undo a split: append `upper`'s only child to it if nothing tells them apart and they are neighbours in the arena. The child's id
    stays. Returns whether it was done."""
    cdef uint32_t id = s.nodes[upper].first_child
    cdef Node *u = &s.nodes[upper]
    cdef Node *x = &s.nodes[id]
    if upper == 0 or id == 0 or x.next_sibling or u.set != x.set or u.word != x.word:
        return False
    if u.pos + u.num_pages != x.pos or u.capacity != u.num_pages or chunk_of(u.pos) != chunk_of(x.pos):
        return False
    table_take(s, HEADS, id)
    s.heads.slots[table_slot(s, HEADS, upper)] = id
    if s.id == ORPHANS and u.parent == 0:
        s.waits.slots[table_slot(s, WAITS, upper)] = id
    s.entries += <uint64_t>u.num_pages * s.sets[x.set].size
    x.keys = u.keys
    x.pos = u.pos
    x.num_pages += u.num_pages
    x.capacity += u.num_pages
    own(s, u.pos, u.num_pages, id)
    if rkv_load(&u.stamp) > rkv_load(&x.stamp):
        rkv_store(&x.stamp, rkv_load(&u.stamp))
    unlink_child(s, id)
    unlink_child(s, upper)
    link_child(s, u.parent, id)
    leave_set(s, upper)
    free_node(s, upper)
    return True


cdef inline void forget_pages(Index *index, Shard *s, uint32_t id, uint32_t first) noexcept nogil:
    """Pages first.. of a node's run are known no more."""
    cdef uint32_t i
    cdef Node *x = &s.nodes[id]
    for i in range(first, x.num_pages):
        prefetch_ahead(index, x.keys + first, i - first, x.num_pages - first)
        forget(index, x.keys[i])
    s.pages -= x.num_pages - first
    rkv_add(&index.pages, <uint64_t>0 - (x.num_pages - first))


cdef inline void cut(Index *index, Shard *s, uint32_t id, uint32_t pages) noexcept nogil:
    """Forget all but the first `pages` (>= 1) pages of a leaf, and give its slack back."""
    cdef Node *x = &s.nodes[id]
    forget_pages(index, s, id, pages)
    s.entries -= <uint64_t>(x.num_pages - pages) * s.sets[x.set].size
    free_pages(s, x.pos + pages, x.capacity - pages)
    x.num_pages = pages
    x.capacity = pages


cdef inline void drop_node(Index *index, Shard *s, uint32_t id) noexcept nogil:
    """Take a leaf out of the forest and free it, but for the directory's entries of its pages."""
    cdef Node *x = &s.nodes[id]
    table_take(s, HEADS, id)
    if s.id == ORPHANS and x.parent == 0:
        table_take(s, WAITS, id)
        rkv_add(&index.orphan_heads, ~<uint64_t>0)
    unlink_child(s, id)
    leave_set(s, id)
    free_pages(s, x.pos, x.capacity)
    free_node(s, id)


cdef inline void settle(Index *index, Shard *s, uint32_t id) noexcept nogil:
    """After a node lost holders: free it and its ancestors as long as they are leaves that nobody holds; what is left at the end is put
    in order (joined with its only child, or its parent with it; a new leaf enters the heap)."""
    cdef uint32_t parent
    while id and s.nodes[id].set == 0 and s.nodes[id].first_child == 0:
        parent = s.nodes[id].parent
        forget_pages(index, s, id, 0)
        drop_node(index, s, id)
        id = parent
    if id == 0:
        return
    if s.nodes[id].first_child == 0:
        heap_put(index, s, id)
    parent = s.nodes[id].parent
    join(s, id)
    join(s, parent)
