"""Nodes, and what finds and orders them: the node pool, the child table, the eviction orders, the namespaces.

    handle = generation << 32 | index         index 0 is nobody; RKV_ROOT is 0
    child table: open addressing over (hash of parent index and first page) -> node index, confirmed by comparing tokens
    orders: three 4-ary heaps; a node is in at most one
        HARD  may lose its device pages now
        SOFT  may be backed up now: its device children are all pending
        HOST  a host-only leaf, may leave the tree
"""

from libc.stdint cimport INT64_MAX, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset
from radixkv.tree._abi cimport (
    RKV_OK, Entry, RKV_POLICY_FIFO, RKV_POLICY_FILO, RKV_POLICY_LFU, RKV_POLICY_MRU, RKV_POLICY_PRIORITY, RKV_POLICY_SLRU,
    before, child_hash, first_of_four, mix, prefetch, rkv_allocator, rkv_event, rkv_node, rkv_page_hash_fn, rkv_rwlock,
)
from radixkv.tree._memory cimport drop, grow, reallocate, resident
from radixkv.tree._store cimport (
    NO_UNIT, PageSet, Store, pageset_memory, store_alloc, store_free, store_memory, unit_key,
)

cdef enum:
    LIVE = 1                # the slot holds a node (or a root)
    ROOT_NODE = 2           # the root of a namespace: no pages, always there
    DEVICE = 4              # has device pages
    HOST = 8                # has host pages
    LOADING = 16            # device pages are being filled
    PENDING = 32            # backup requested
    OP_HEAD = 64            # the handle by which the load or backup is finished (the others are split-off parts)
    HASHED = 128            # page digests are in the store
    ORDER_SHIFT = 8         # which heap: 0 none, else NUM + 1
    ORDER_MASK = 3 << 8
    MARK_SHIFT = 24         # the caller's marks: the highest byte
    MAX_MARKS = 255

cdef enum:
    HARD = 0
    SOFT = 1
    HOST_LEAF = 2
    NUM_ORDERS = 3
    HEAP_ROOT = 3           # children of p: 4p - 8 .. 4p - 5, so that siblings share a cache line
    NO_INDEX = 0


cdef struct Node:                   # two cache lines: a walk needs the first only
    uint32_t start                  # first unit in the store
    uint32_t num_pages
    uint32_t parent                 # index
    uint32_t first_child
    uint32_t next_sibling           # in the free list: the next free slot
    uint32_t prev_sibling
    uint32_t flags
    uint32_t end_page               # pages from the root to this node's end
    uint64_t access
    uint32_t hit_count
    uint32_t num_device_children    # pending ones too
    uint32_t num_gone_children      # of those, the ones that are as good as gone; see is_gone()
    uint32_t lock_ref               # locks of this node and of all below
    uint32_t pin_ref                # pins and loads in this node's subtree, itself included
    int32_t priority
    # ---- second line
    uint64_t created
    uint32_t key_hash               # of (parent, first page): its place in the child table
    uint32_t generation
    uint32_t root                   # index of the namespace's root
    uint32_t own_locks              # locks of this very node
    uint32_t host_ref
    uint32_t sub_host_ref           # descendants with host_ref > 0
    uint32_t op_pages_above         # OP_HEAD: pages of its load or backup that splits moved into nodes above
    uint32_t pin_slot               # place in the pin heap + 1, or 0
    uint32_t spare[6]


cdef struct Order:
    Entry *entries                  # from HEAP_ROOT on
    uint64_t capacity
    uint32_t end                    # one past the last entry; HEAP_ROOT when empty
    uint32_t touched                # highest end so far: what is resident


cdef struct Slot:                   # of the child table
    uint32_t key_hash
    uint32_t node                   # 0: empty


cdef struct Namespace:
    uint8_t *name                   # encoded; NULL for the default one
    uint64_t name_bytes
    uint64_t hash_
    uint32_t root                   # 0: free record, next_free links on
    uint32_t next_free


cdef struct Pin:
    int64_t until_ns
    uint32_t node


cdef struct Tree:
    rkv_rwlock lock
    rkv_allocator allocator
    uint64_t id_
    uint32_t salt                   # first generation of every slot
    uint64_t hash_seed              # keys the child table and the namespaces
    uint32_t page_size
    int32_t policy
    bint events_on
    Store store
    PageSet device_ids
    PageSet host_ids
    # node pool
    Node *nodes
    uint64_t node_capacity
    uint32_t *heap_pos              # place of each node in its order
    uint64_t heap_pos_capacity
    uint32_t node_end               # slots ever used
    uint32_t free_node              # free list
    uint32_t num_free_nodes
    uint32_t num_nodes              # live, roots excluded
    Order orders[NUM_ORDERS]
    # child table
    Slot *table
    uint64_t table_capacity         # a power of two
    uint64_t table_used
    # namespaces
    Namespace *spaces
    uint64_t space_capacity
    uint32_t space_end
    uint32_t free_space
    uint32_t num_spaces
    uint32_t default_root
    uint32_t *space_table           # record index + 1, open addressing by hash
    uint64_t space_table_capacity
    uint64_t name_memory
    # pins: binary heap by time
    Pin *pins
    uint64_t pin_capacity
    uint32_t num_pins
    # counters, in pages
    int64_t evictable
    int64_t protected_
    int64_t pending
    int64_t loading
    int64_t host_pages
    int64_t host_evictable
    uint64_t clock
    # events
    rkv_event *events
    uint64_t event_capacity
    int32_t *event_tokens
    uint64_t event_token_capacity   # in events
    uint64_t event_start
    uint64_t event_end
    uint64_t max_events
    uint64_t dropped_events
    # hashing
    rkv_page_hash_fn page_hash
    void *page_hash_ctx
    uint32_t *path                  # scratch for walking down a path
    uint64_t path_capacity


# ---- handles ---------------------------------------------------------------------------------------------------------

cdef inline rkv_node handle_of(const Tree *t, uint32_t i) noexcept nogil:
    if t.nodes[i].flags & ROOT_NODE:
        return 0
    return <uint64_t>t.nodes[i].generation << 32 | i


cdef inline uint32_t index_of(const Tree *t, rkv_node handle) noexcept nogil:
    """The index of a live handle, or NO_INDEX."""
    cdef uint32_t i = <uint32_t>handle
    if i == NO_INDEX or i >= t.node_end or not t.nodes[i].flags & LIVE or t.nodes[i].flags & ROOT_NODE:
        return NO_INDEX
    return i if t.nodes[i].generation == <uint32_t>(handle >> 32) else NO_INDEX


cdef inline bint is_root(const Tree *t, uint32_t i) noexcept nogil:
    return (t.nodes[i].flags & ROOT_NODE) != 0


cdef inline bint is_protected(const Node *n) noexcept nogil:
    return n.lock_ref != 0 or n.pin_ref != 0


cdef inline bint is_gone(const Node *n) noexcept nogil:
    """As good as gone for the parent: its backup is pending, and so is that of everything below it on the device."""
    return (n.flags & PENDING) != 0 and n.num_device_children == n.num_gone_children


cdef inline uint32_t marks_of(const Node *n) noexcept nogil:
    return n.flags >> MARK_SHIFT


cdef inline int64_t host_evictable(const Node *n) noexcept nogil:
    """The node's pages if evict_host could free them, asked for everything: it is host-only, and nobody holds it or what is below."""
    return n.num_pages if (n.flags & (DEVICE | HOST)) == HOST and n.host_ref == 0 and n.sub_host_ref == 0 else 0


# ---- eviction orders -------------------------------------------------------------------------------------------------

cdef inline Entry entry_of(const Tree *t, uint32_t i) noexcept nogil:
    """A node's place in its order. No two candidates are equal: a stamp is on the nodes of one path only (splits included), as is a
    time of creation, and of a path at most one node is a candidate of each tier. So "ties: the younger first" needs no code."""
    cdef const Node *n = &t.nodes[i]
    cdef Entry e
    e.major = 0
    e.minor = n.access
    e.node = i
    if t.policy == RKV_POLICY_LFU:
        e.major = n.hit_count
    elif t.policy == RKV_POLICY_FIFO:
        e.minor = n.created
    elif t.policy == RKV_POLICY_MRU:
        e.minor = ~n.access
    elif t.policy == RKV_POLICY_FILO:
        e.minor = ~n.created
    elif t.policy == RKV_POLICY_PRIORITY:
        e.major = <uint32_t>n.priority ^ <uint32_t>0x80000000
    elif t.policy == RKV_POLICY_SLRU:
        e.major = 1 if n.hit_count >= 2 else 0
    return e


cdef inline void sift_up(Tree *t, Order *o, uint32_t p, Entry e) noexcept nogil:
    cdef uint32_t up
    while p > HEAP_ROOT:
        up = (p >> 2) + 2
        if not before(&e, &o.entries[up]):
            break
        o.entries[p] = o.entries[up]
        t.heap_pos[o.entries[p].node] = p
        p = up
    o.entries[p] = e
    t.heap_pos[e.node] = p


cdef inline uint32_t first_child(const Order *o, uint32_t child) noexcept nogil:
    """Of the siblings at child .. child + 3 (fewer at the end), the one that leaves first."""
    cdef uint32_t best = child, c
    if child + 4 <= o.end:
        return child + first_of_four(&o.entries[child])
    for c in range(child + 1, o.end):
        if before(&o.entries[c], &o.entries[best]):
            best = c
    return best


cdef inline void sift_down(Tree *t, Order *o, uint32_t p, Entry e) noexcept nogil:
    cdef uint32_t child, best
    while True:
        child = 4 * p - 8
        if child >= o.end:
            break
        best = first_child(o, child)
        if not before(&o.entries[best], &e):
            break
        o.entries[p] = o.entries[best]
        t.heap_pos[o.entries[p].node] = p
        p = best
    o.entries[p] = e
    t.heap_pos[e.node] = p


cdef inline void sift_from_top(Tree *t, Order *o, Entry e) noexcept nogil:
    """Fill the hole at the top with what was the last entry. That one almost always belongs near the bottom: so follow the
    smallest children all the way down first, without comparing with e, then let e rise. The next level's four cache lines are
    asked for before this level is compared, which is most of the cost in a heap larger than the cache."""
    cdef uint32_t p = HEAP_ROOT, child, best, c
    while True:
        child = 4 * p - 8
        if child >= o.end:
            break
        if 4 * child - 8 < o.end:
            for c in range(4):
                prefetch(&o.entries[4 * (child + c) - 8])
        best = first_child(o, child)
        o.entries[p] = o.entries[best]
        t.heap_pos[o.entries[p].node] = p
        p = best
    sift_up(t, o, p, e)


cdef inline void order_place(Tree *t, Order *o, uint32_t p, Entry e) noexcept nogil:
    """Put an entry at a hole, then up or down to where it belongs."""
    if p > HEAP_ROOT and before(&e, &o.entries[(p >> 2) + 2]):
        sift_up(t, o, p, e)
    else:
        sift_down(t, o, p, e)


cdef inline void order_remove(Tree *t, Order *o, uint32_t i) noexcept nogil:
    cdef uint32_t p = t.heap_pos[i]
    o.end -= 1
    if p == HEAP_ROOT and o.end > HEAP_ROOT:
        sift_from_top(t, o, o.entries[o.end])
    elif p != o.end:
        order_place(t, o, p, o.entries[o.end])


cdef inline uint32_t wanted_order(const Node *n) noexcept nogil:
    """1 + the order that a node belongs to by its state, or 0."""
    if n.flags & DEVICE:
        if n.flags & (PENDING | ROOT_NODE) or is_protected(n):
            return 0
        if not n.flags & HOST and n.sub_host_ref != 0:
            return 0
        if n.num_device_children == 0:
            return HARD + 1
        if not n.flags & HOST and n.num_gone_children == n.num_device_children:
            return SOFT + 1
        return 0
    if n.flags & HOST and n.first_child == NO_INDEX and n.host_ref == 0:
        return HOST_LEAF + 1
    return 0


cdef inline void refresh(Tree *t, uint32_t i) noexcept nogil:
    """After any change of a node's state: put it into the order it belongs to, at the right place."""
    cdef Node *n = &t.nodes[i]
    cdef uint32_t now = (n.flags & ORDER_MASK) >> ORDER_SHIFT
    cdef uint32_t wanted = wanted_order(n)
    cdef Order *o
    if now == 0 and wanted == 0:
        return
    if now != 0 and now != wanted:
        order_remove(t, &t.orders[now - 1], i)
    n.flags = (n.flags & ~<uint32_t>ORDER_MASK) | wanted << ORDER_SHIFT
    if wanted == 0:
        return
    o = &t.orders[wanted - 1]
    if now != wanted:
        o.end += 1
        if o.end > o.touched:
            o.touched = o.end
        sift_up(t, o, o.end - 1, entry_of(t, i))
    else:
        order_place(t, o, t.heap_pos[i], entry_of(t, i))


cdef inline void refresh_if_ordered(Tree *t, uint32_t i) noexcept nogil:
    if t.nodes[i].flags & ORDER_MASK:
        refresh(t, i)


# ---- child table -----------------------------------------------------------------------------------------------------

cdef inline uint32_t find_child(const Tree *t, uint32_t parent, const int32_t *tokens, uint32_t key_hash) noexcept nogil:
    """The child of ``parent`` that begins with this page, or NO_INDEX."""
    cdef uint64_t mask = t.table_capacity - 1, place = key_hash & mask
    cdef uint32_t i
    if t.table_capacity == 0:
        return NO_INDEX
    while True:
        i = t.table[place].node
        if i == NO_INDEX:
            return NO_INDEX
        if t.table[place].key_hash == key_hash and t.nodes[i].parent == parent and memcmp(
                unit_key(&t.store, t.nodes[i].start), tokens, 4 * <size_t>t.page_size) == 0:
            return i
        place = (place + 1) & mask


cdef inline uint64_t table_place(const Tree *t, uint32_t i) noexcept nogil:
    cdef uint64_t mask = t.table_capacity - 1, place = t.nodes[i].key_hash & mask
    while t.table[place].node != i:
        place = (place + 1) & mask
    return place


cdef inline void table_insert(Tree *t, uint32_t i) noexcept nogil:
    cdef uint64_t mask = t.table_capacity - 1, place = t.nodes[i].key_hash & mask
    while t.table[place].node != NO_INDEX:
        place = (place + 1) & mask
    t.table[place].node = i
    t.table[place].key_hash = t.nodes[i].key_hash
    t.table_used += 1


cdef inline void table_remove(Tree *t, uint32_t i) noexcept nogil:
    """Take an entry out and close the gap: later entries of the run move back if that is no further than their own place."""
    cdef uint64_t mask = t.table_capacity - 1, gap = table_place(t, i), at = gap, home
    while True:
        at = (at + 1) & mask
        if t.table[at].node == NO_INDEX:
            break
        home = t.table[at].key_hash & mask
        if ((at - home) & mask) >= ((at - gap) & mask):
            t.table[gap] = t.table[at]
            gap = at
    t.table[gap].node = NO_INDEX
    t.table_used -= 1


cdef inline bint table_reserve(Tree *t, uint64_t more) noexcept nogil:
    """Keep the load at most 3/4 after ``more`` insertions. False: no memory."""
    cdef uint64_t capacity = t.table_capacity if t.table_capacity else 64
    cdef uint64_t old, place, mask
    cdef Slot *table
    while (t.table_used + more) * 4 > capacity * 3:
        capacity *= 2
    if capacity == t.table_capacity:
        return True
    table = <Slot *>reallocate(&t.allocator, NULL, 0, capacity * sizeof(Slot))
    if table == NULL:
        return False
    memset(table, 0, capacity * sizeof(Slot))
    mask = capacity - 1
    for old in range(t.table_capacity):
        if t.table[old].node != NO_INDEX:
            place = t.table[old].key_hash & mask
            while table[place].node != NO_INDEX:
                place = (place + 1) & mask
            table[place] = t.table[old]
    if t.table != NULL:
        reallocate(&t.allocator, t.table, t.table_capacity * sizeof(Slot), 0)
    t.table = table
    t.table_capacity = capacity
    return True


# ---- node pool and links ---------------------------------------------------------------------------------------------

cdef inline bint nodes_reserve(Tree *t, uint32_t more) noexcept nogil:
    """Make sure that ``more`` nodes can be taken, found and ordered. False: no memory."""
    cdef uint64_t needed = <uint64_t>t.node_end + more
    cdef int k
    if more > t.num_free_nodes:
        if needed > <uint64_t>0xfffffff0:
            return False
        if not grow(&t.allocator, <void **>&t.nodes, &t.node_capacity, needed, sizeof(Node), 32):
            return False
        if not grow(&t.allocator, <void **>&t.heap_pos, &t.heap_pos_capacity, needed, 4, 32):
            return False
        for k in range(NUM_ORDERS):
            if not grow(&t.allocator, <void **>&t.orders[k].entries, &t.orders[k].capacity, needed + HEAP_ROOT,
                        sizeof(Entry), 32):
                return False
    return table_reserve(t, more)


cdef inline uint32_t node_take(Tree *t) noexcept nogil:
    """A zeroed live slot; nodes_reserve has made sure that there is one."""
    cdef uint32_t i, generation
    if t.num_free_nodes:
        i = t.free_node
        t.free_node = t.nodes[i].next_sibling
        t.num_free_nodes -= 1
        generation = t.nodes[i].generation
    else:
        i = t.node_end
        t.node_end += 1
        generation = t.salt
    memset(&t.nodes[i], 0, sizeof(Node))
    t.nodes[i].generation = generation
    t.nodes[i].flags = LIVE
    return i


cdef inline void node_give(Tree *t, uint32_t i) noexcept nogil:
    """Return a slot. Its handles are stale from now on; a slot whose generations are used up is never taken again."""
    t.nodes[i].flags = 0
    t.nodes[i].generation += 1
    if t.nodes[i].generation == t.salt:
        return
    t.nodes[i].next_sibling = t.free_node
    t.free_node = i
    t.num_free_nodes += 1


cdef inline void link_child(Tree *t, uint32_t parent, uint32_t i) noexcept nogil:
    cdef Node *n = &t.nodes[i]
    n.parent = parent
    n.prev_sibling = NO_INDEX
    n.next_sibling = t.nodes[parent].first_child
    if n.next_sibling != NO_INDEX:
        t.nodes[n.next_sibling].prev_sibling = i
    t.nodes[parent].first_child = i


cdef inline void unlink_child(Tree *t, uint32_t i) noexcept nogil:
    cdef Node *n = &t.nodes[i]
    if n.prev_sibling != NO_INDEX:
        t.nodes[n.prev_sibling].next_sibling = n.next_sibling
    else:
        t.nodes[n.parent].first_child = n.next_sibling
    if n.next_sibling != NO_INDEX:
        t.nodes[n.next_sibling].prev_sibling = n.prev_sibling


cdef inline void child_changed(Tree *t, uint32_t parent, int on_device, int gone) noexcept nogil:
    """A child of ``parent`` came to or left the device, or became gone or not: carry it up for as long as it matters."""
    cdef Node *n
    cdef bint was
    while True:
        n = &t.nodes[parent]
        was = is_gone(n)
        n.num_device_children += on_device
        n.num_gone_children += gone
        refresh(t, parent)
        if is_gone(n) == was:
            return
        on_device = 0
        gone = -1 if was else 1
        parent = n.parent


cdef inline void set_pending(Tree *t, uint32_t i, bint pending) noexcept nogil:
    cdef Node *n = &t.nodes[i]
    cdef bint was = is_gone(n)
    if pending:
        n.flags |= PENDING
        t.pending += n.num_pages
    else:
        n.flags &= ~<uint32_t>(PENDING | OP_HEAD)
        t.pending -= n.num_pages
    refresh(t, i)
    if is_gone(n) != was:
        child_changed(t, n.parent, 0, 1 if pending else -1)


cdef inline uint32_t split(Tree *t, uint32_t i, uint32_t pages) noexcept nogil:
    """Cut node i after ``pages`` pages; cannot fail: nodes_reserve(1) went before. Returns the new upper node.

        parent                     parent
          |                          |
        [i: a b c d e]     ->      [upper: a b]         lock_ref, pin_ref, hits, priority, times, flags, marks copied
          |     |                    |
        kids   kids                [i: c d e]           the handle, host_ref, the pin, the operation's head
                                     |     |
                                   kids   kids
    """
    cdef uint32_t u = node_take(t)
    cdef Node *n = &t.nodes[i]
    cdef Node *up = &t.nodes[u]
    cdef uint64_t place = table_place(t, i)
    up.start = n.start
    up.num_pages = pages
    up.key_hash = n.key_hash
    up.end_page = n.end_page - (n.num_pages - pages)
    up.lock_ref = n.lock_ref
    up.pin_ref = n.pin_ref
    up.sub_host_ref = n.sub_host_ref + (1 if n.host_ref else 0)
    up.hit_count = n.hit_count
    up.priority = n.priority
    up.root = n.root
    up.access = n.access
    up.created = n.created
    up.flags = n.flags & ~<uint32_t>(OP_HEAD | ORDER_MASK)
    up.num_device_children = 1 if n.flags & DEVICE else 0
    up.num_gone_children = 1 if is_gone(n) else 0
    # take i's place among its siblings and in the table
    up.parent = n.parent
    up.prev_sibling = n.prev_sibling
    up.next_sibling = n.next_sibling
    if up.prev_sibling != NO_INDEX:
        t.nodes[up.prev_sibling].next_sibling = u
    else:
        t.nodes[up.parent].first_child = u
    if up.next_sibling != NO_INDEX:
        t.nodes[up.next_sibling].prev_sibling = u
    up.first_child = i
    t.table[place].node = u
    # what is left of i hangs below
    n.start += pages
    n.num_pages -= pages
    n.parent = u
    n.prev_sibling = n.next_sibling = NO_INDEX
    n.key_hash = child_hash(t.hash_seed, u, unit_key(&t.store, n.start), t.page_size)
    if n.flags & OP_HEAD:
        n.op_pages_above += pages
    table_insert(t, i)
    t.num_nodes += 1
    return u


# ---- namespaces ------------------------------------------------------------------------------------------------------

cdef inline uint64_t hash_name(const Tree *t, const uint8_t *name, uint64_t n) noexcept nogil:
    cdef uint64_t h = mix(t.hash_seed ^ n), word, i = 0
    while i + 8 <= n:
        memcpy(&word, name + i, 8)
        h = mix(h ^ word) + t.hash_seed
        i += 8
    if i < n:
        word = 0
        memcpy(&word, name + i, n - i)
        h = mix(h ^ word) + t.hash_seed
    return mix(h)


cdef inline uint32_t find_root(const Tree *t, const uint8_t *name, uint64_t n, uint64_t hash_) noexcept nogil:
    cdef uint64_t mask = t.space_table_capacity - 1, place = hash_ & mask
    cdef const Namespace *s
    if n == 0:
        return t.default_root
    if t.space_table_capacity == 0:
        return NO_INDEX
    while t.space_table[place] != 0:
        s = &t.spaces[t.space_table[place] - 1]
        if s.hash_ == hash_ and s.name_bytes == n and memcmp(s.name, name, n) == 0:
            return s.root
        place = (place + 1) & mask
    return NO_INDEX


cdef inline bint space_table_reserve(Tree *t) noexcept nogil:
    cdef uint64_t capacity = t.space_table_capacity if t.space_table_capacity else 16
    cdef uint64_t mask, place
    cdef uint32_t k
    cdef uint32_t *table
    while (<uint64_t>t.num_spaces + 1) * 4 > capacity * 3:
        capacity *= 2
    if capacity == t.space_table_capacity:
        return True
    table = <uint32_t *>reallocate(&t.allocator, NULL, 0, capacity * 4)
    if table == NULL:
        return False
    memset(table, 0, capacity * 4)
    mask = capacity - 1
    for k in range(t.space_end):
        if t.spaces[k].root != NO_INDEX and t.spaces[k].name_bytes > 0:  # the default namespace is not in the table
            place = t.spaces[k].hash_ & mask
            while table[place] != 0:
                place = (place + 1) & mask
            table[place] = k + 1
    if t.space_table != NULL:
        reallocate(&t.allocator, t.space_table, t.space_table_capacity * 4, 0)
    t.space_table = table
    t.space_table_capacity = capacity
    return True


cdef inline uint32_t add_root(Tree *t, const uint8_t *name, uint64_t n, uint64_t hash_) noexcept nogil:
    """Make a namespace; nodes_reserve has a slot for its root. NO_INDEX: no memory."""
    cdef uint32_t k, r
    cdef uint64_t mask, place
    cdef uint8_t *copy = NULL
    cdef Namespace *s
    if t.free_space == NO_UNIT and not grow(&t.allocator, <void **>&t.spaces, &t.space_capacity,
                                            <uint64_t>t.space_end + 1, sizeof(Namespace), 4):
        return NO_INDEX
    if n > 0:
        if not space_table_reserve(t):
            return NO_INDEX
        copy = <uint8_t *>reallocate(&t.allocator, NULL, 0, n)
        if copy == NULL:
            return NO_INDEX
        memcpy(copy, name, n)
    if t.free_space != NO_UNIT:
        k = t.free_space
        t.free_space = t.spaces[k].next_free
    else:
        k = t.space_end
        t.space_end += 1
    r = node_take(t)
    t.nodes[r].flags |= ROOT_NODE | DEVICE | HASHED
    t.nodes[r].root = r
    t.nodes[r].start = k
    s = &t.spaces[k]
    s.name = copy
    s.name_bytes = n
    s.hash_ = hash_
    s.root = r
    t.name_memory += n
    if n > 0:
        mask = t.space_table_capacity - 1
        place = hash_ & mask
        while t.space_table[place] != 0:
            place = (place + 1) & mask
        t.space_table[place] = k + 1
        t.num_spaces += 1
    else:
        t.default_root = r
    return r


cdef inline void drop_root_if_empty(Tree *t, uint32_t r) noexcept nogil:
    """Free a namespace that has no node left."""
    cdef uint32_t k = t.nodes[r].start
    cdef Namespace *s = &t.spaces[k]
    cdef uint64_t mask, gap, at, home
    if t.nodes[r].first_child != NO_INDEX:
        return
    if s.name_bytes > 0:
        mask = t.space_table_capacity - 1
        gap = s.hash_ & mask
        while t.space_table[gap] != k + 1:
            gap = (gap + 1) & mask
        at = gap
        while True:
            at = (at + 1) & mask
            if t.space_table[at] == 0:
                break
            home = t.spaces[t.space_table[at] - 1].hash_ & mask
            if ((at - home) & mask) >= ((at - gap) & mask):
                t.space_table[gap] = t.space_table[at]
                gap = at
        t.space_table[gap] = 0
        t.num_spaces -= 1
        t.name_memory -= s.name_bytes
        reallocate(&t.allocator, s.name, s.name_bytes, 0)
    else:
        t.default_root = NO_INDEX
    s.name = NULL
    s.root = NO_INDEX
    s.next_free = t.free_space
    t.free_space = k
    node_give(t, r)


# ---- pins ------------------------------------------------------------------------------------------------------------

cdef inline void pin_set(Tree *t, uint32_t p, Pin pin) noexcept nogil:
    t.pins[p] = pin
    t.nodes[pin.node].pin_slot = p + 1


cdef inline void pin_place(Tree *t, uint32_t p, Pin pin) noexcept nogil:
    """Put a pin at a hole of the heap, then up or down to where its time belongs."""
    cdef uint32_t c
    while p > 0 and pin.until_ns < t.pins[(p - 1) // 2].until_ns:
        pin_set(t, p, t.pins[(p - 1) // 2])
        p = (p - 1) // 2
    while True:
        c = 2 * p + 1
        if c >= t.num_pins:
            break
        if c + 1 < t.num_pins and t.pins[c + 1].until_ns < t.pins[c].until_ns:
            c += 1
        if pin.until_ns <= t.pins[c].until_ns:
            break
        pin_set(t, p, t.pins[c])
        p = c
    pin_set(t, p, pin)


cdef inline void pin_remove(Tree *t, uint32_t i) noexcept nogil:
    cdef uint32_t p = t.nodes[i].pin_slot - 1
    t.nodes[i].pin_slot = 0
    t.num_pins -= 1
    if p != t.num_pins:
        pin_place(t, p, t.pins[t.num_pins])


# ---- memory ----------------------------------------------------------------------------------------------------------

cdef inline uint64_t tree_memory(const Tree *t) noexcept nogil:
    cdef uint64_t total = sizeof(Tree) + store_memory(&t.store)
    cdef int k
    total += pageset_memory(&t.device_ids) + pageset_memory(&t.host_ids)
    total += resident(<uint64_t>t.node_end * sizeof(Node)) + resident(<uint64_t>t.node_end * 4)
    for k in range(NUM_ORDERS):
        total += resident(<uint64_t>t.orders[k].touched * sizeof(Entry))
    total += resident(t.table_capacity * sizeof(Slot)) + t.space_table_capacity * 4 + t.name_memory
    total += t.space_capacity * sizeof(Namespace) + t.pin_capacity * sizeof(Pin) + t.path_capacity * 4
    total += resident(t.event_capacity * sizeof(rkv_event))
    total += resident(t.event_token_capacity * 4 * t.page_size)
    return total
