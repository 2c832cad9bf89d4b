"""check_integrity: every invariant, verified from scratch."""

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.string cimport memset
from radixkv.tree._abi cimport (
    RKV_ERR_INTEGRITY, RKV_ERR_NO_MEMORY, RKV_OK, Entry, before, child_hash, fail, rkv_status, rkv_tier_check,
)
from radixkv.tree._memory cimport reallocate
from radixkv.tree._nodes cimport (
    DEVICE, HASHED, HEAP_ROOT, HOST, LIVE, LOADING, NO_INDEX, NUM_ORDERS, OP_HEAD, ORDER_MASK, ORDER_SHIFT, PENDING, ROOT_NODE,
    Node, Order, Tree, entry_of, find_child, host_evictable, is_gone, is_protected, is_root, marks_of, wanted_order,
)
from radixkv.tree._store cimport (
    ADD_OK, NO_UNIT, NUM_BINS, PageSet, bin_of, is_edge, pageset_add, pageset_count, pageset_has, pageset_release, unit_key,
)


cdef struct Audit:
    uint64_t *seen                  # a bit a unit of the store
    uint64_t nodes
    uint64_t roots
    uint64_t units
    int64_t evictable
    int64_t protected_
    int64_t pending
    int64_t loading
    int64_t host_pages
    int64_t host_evictable
    uint64_t device_pages
    uint64_t pins
    uint64_t ordered


cdef inline bint mark_units(const Tree *t, Audit *a, uint32_t first, uint64_t length) noexcept nogil:
    """Mark units as accounted for. False: beyond the store, or marked already."""
    cdef uint64_t k
    if first + length > t.store.top:
        return False
    for k in range(first, first + length):
        if (a.seen[k >> 6] >> (k & 63)) & 1:
            return False
        a.seen[k >> 6] |= <uint64_t>1 << (k & 63)
    a.units += length
    return True


cdef inline rkv_status broken(const char *what, uint32_t i) noexcept nogil:
    return fail(RKV_ERR_INTEGRITY, b"node index %u: %s", i, what)


cdef inline rkv_status check_state(const Tree *t, uint32_t i) noexcept nogil:
    """Flags and reference counts of one node against each other and its parent."""
    cdef const Node *n = &t.nodes[i]
    cdef const Node *p = &t.nodes[n.parent]
    if not p.flags & LIVE:
        return broken(b"its parent is not in the tree", i)
    if n.num_pages == 0 or n.end_page != p.end_page + n.num_pages or n.root != p.root:
        return broken(b"length, path or root does not follow from its parent", i)
    if not n.flags & (DEVICE | HOST):
        return broken(b"it is on no tier", i)
    if n.flags & DEVICE and not p.flags & DEVICE:
        return broken(b"it is on the device and its parent is not", i)
    if not n.flags & DEVICE and (n.lock_ref or n.own_locks or n.pin_ref or n.flags & (LOADING | PENDING)):
        return broken(b"it is host-only and locked, pinned, loading or pending", i)
    if marks_of(p) and p.flags & ROOT_NODE:
        return broken(b"its root has marks", i)
    if n.host_ref and not n.flags & HOST:
        return broken(b"host_ref without host pages", i)
    if n.flags & PENDING and n.flags & (HOST | LOADING):
        return broken(b"backup pending with a host copy, or while loading", i)
    if n.flags & LOADING and not n.flags & HOST:
        return broken(b"loading without host pages", i)
    if n.flags & OP_HEAD and not n.flags & (LOADING | PENDING):
        return broken(b"it heads an operation that is not in flight", i)
    if n.flags & HASHED and not p.flags & HASHED:
        return broken(b"it is hashed and its parent is not", i)
    if n.pin_slot and (n.pin_slot > t.num_pins or t.pins[n.pin_slot - 1].node != i):
        return broken(b"its pin is not in the pin heap", i)
    return RKV_OK


cdef inline rkv_status check_children(const Tree *t, uint32_t i) noexcept nogil:
    """Sibling links, and the sums that a node keeps over its children."""
    cdef const Node *n = &t.nodes[i]
    cdef const Node *c
    cdef uint32_t k = n.first_child, previous = NO_INDEX, on_device = 0, gone = 0, pins = 0, host_refs = 0, locks = 0
    while k != NO_INDEX:
        c = &t.nodes[k]
        if c.parent != i or c.prev_sibling != previous or not c.flags & LIVE:
            return broken(b"its list of children is broken", i)
        on_device += (c.flags & DEVICE) != 0
        gone += is_gone(c)
        pins += c.pin_ref
        locks += c.lock_ref
        host_refs += c.sub_host_ref + (c.host_ref > 0)
        previous = k
        k = c.next_sibling
    if n.num_device_children != on_device or n.num_gone_children != gone:
        return broken(b"its counts of device children are wrong", i)
    if n.flags & ROOT_NODE:
        return RKV_OK
    pins += n.pin_slot > 0
    pins += (n.flags & (LOADING | OP_HEAD)) == (LOADING | OP_HEAD)
    if n.lock_ref != locks + n.own_locks:
        return broken(b"its lock_ref is not its own locks and those of its children", i)
    if n.pin_ref != pins or n.sub_host_ref != host_refs:
        return broken(b"its counts of pins or protected host copies are wrong", i)
    return RKV_OK


cdef inline rkv_status check_pages(const Tree *t, Audit *a, uint32_t i) noexcept nogil:
    """Its extent, its place in the child table, the owners of its page ids."""
    cdef const Node *n = &t.nodes[i]
    cdef uint64_t k
    if not mark_units(t, a, n.start, n.num_pages):
        return broken(b"its pages overlap others in the store", i)
    if n.key_hash != child_hash(t.hash_seed, n.parent, unit_key(&t.store, n.start), t.page_size) or \
            find_child(t, n.parent, unit_key(&t.store, n.start), n.key_hash) != i:
        return broken(b"the child table does not find it", i)
    for k in range(n.start, <uint64_t>n.start + n.num_pages):
        if n.flags & DEVICE and (t.store.device[k] < 0 or not pageset_has(&t.device_ids, t.store.device[k])):
            return broken(b"a device page id is not recorded as owned", i)
        if n.flags & HOST and (t.store.host[k] < 0 or not pageset_has(&t.host_ids, t.store.host[k])):
            return broken(b"a host page id is not recorded as owned", i)
    return RKV_OK


cdef inline rkv_status check_order(const Tree *t, Audit *a, uint32_t i) noexcept nogil:
    cdef uint32_t now = (t.nodes[i].flags & ORDER_MASK) >> ORDER_SHIFT
    cdef const Order *o
    cdef Entry e
    if now != wanted_order(&t.nodes[i]):
        return broken(b"it is in the wrong eviction order", i)
    if now:
        a.ordered += 1
        o = &t.orders[now - 1]
        e = entry_of(t, i)
        if t.heap_pos[i] < HEAP_ROOT or t.heap_pos[i] >= o.end or o.entries[t.heap_pos[i]].node != i or \
                o.entries[t.heap_pos[i]].major != e.major or o.entries[t.heap_pos[i]].minor != e.minor:
            return broken(b"its entry in the eviction order is stale", i)
    return RKV_OK


cdef inline rkv_status check_nodes(const Tree *t, Audit *a) noexcept nogil:
    cdef uint32_t i
    cdef const Node *n
    cdef rkv_status status = RKV_OK
    for i in range(1, t.node_end):
        n = &t.nodes[i]
        if not n.flags & LIVE:
            continue
        if n.flags & ROOT_NODE:
            a.roots += 1
            if t.spaces[n.start].root != i or n.first_child == NO_INDEX:
                return broken(b"a root without its namespace, or an empty one", i)
        else:
            a.nodes += 1
            a.pins += n.pin_slot > 0
            if n.flags & DEVICE:
                a.device_pages += n.num_pages
                if is_protected(n):
                    a.protected_ += n.num_pages
                else:
                    a.evictable += n.num_pages
            if n.flags & PENDING:
                a.pending += n.num_pages
            if n.flags & LOADING:
                a.loading += n.num_pages
            if n.flags & HOST:
                a.host_pages += n.num_pages
            a.host_evictable += host_evictable(n)   # of a sub_host_ref that check_children verifies
            status = check_state(t, i)
            if status == RKV_OK:
                status = check_pages(t, a, i)
            if status == RKV_OK:
                status = check_order(t, a, i)
        if status == RKV_OK:
            status = check_children(t, i)
        if status != RKV_OK:
            return status
    return RKV_OK


cdef inline rkv_status check_free_extents(const Tree *t, Audit *a) noexcept nogil:
    cdef uint32_t b, first, length
    cdef uint64_t k
    for b in range(NUM_BINS):
        first = t.store.bins[b]
        while first != NO_UNIT:
            length = <uint32_t>t.store.device[first]
            if length == 0 or bin_of(length) != b or not mark_units(t, a, first, length):
                return fail(RKV_ERR_INTEGRITY, b"store: free extent at unit %u overlaps or is in the wrong bin", first)
            if not is_edge(&t.store, first) or not is_edge(&t.store, first + length - 1) or \
                    <uint32_t>t.store.device[first + length - 1] != length:
                return fail(RKV_ERR_INTEGRITY, b"store: free extent at unit %u has broken edges", first)
            first = (<uint32_t *>unit_key(&t.store, first))[0]
    if a.units == t.store.top:
        return RKV_OK
    for k in range(t.store.top):
        if not (a.seen[k >> 6] >> (k & 63)) & 1:
            if t.page_size > 1 or not is_edge(&t.store, <uint32_t>k) or t.store.device[k] != 1:
                return fail(RKV_ERR_INTEGRITY, b"store: unit %llu is lost", <unsigned long long>k)
    return RKV_OK


cdef inline rkv_status check_totals(const Tree *t, const Audit *a) noexcept nogil:
    cdef uint32_t k, p, ordered = 0, free_nodes = 0, i
    cdef const Order *o
    for k in range(NUM_ORDERS):
        o = &t.orders[k]
        ordered += o.end - HEAP_ROOT
        for p in range(HEAP_ROOT + 1, o.end):
            if before(&o.entries[p], &o.entries[(p >> 2) + 2]):
                return fail(RKV_ERR_INTEGRITY, b"eviction order %u is out of order at %u", k, p)
    if ordered != a.ordered:
        return fail(RKV_ERR_INTEGRITY, b"eviction orders hold %u entries for %llu nodes", ordered, <unsigned long long>a.ordered)
    i = t.free_node
    for k in range(t.num_free_nodes):
        if i == NO_INDEX or i >= t.node_end or t.nodes[i].flags & LIVE:
            return fail(RKV_ERR_INTEGRITY, b"the list of free nodes is broken")
        free_nodes += 1
        i = t.nodes[i].next_sibling
    if a.nodes != t.num_nodes or t.table_used != t.num_nodes or a.pins != t.num_pins:
        return fail(RKV_ERR_INTEGRITY, b"%llu nodes and %llu pins found, %u and %u counted, %llu in the child table",
                    <unsigned long long>a.nodes, <unsigned long long>a.pins, t.num_nodes, t.num_pins,
                    <unsigned long long>t.table_used)
    if a.roots != <uint64_t>t.num_spaces + (t.default_root != NO_INDEX):
        return fail(RKV_ERR_INTEGRITY, b"%llu roots for %u namespaces", <unsigned long long>a.roots, t.num_spaces)
    if a.loading != t.loading or a.host_evictable != t.host_evictable:
        return fail(RKV_ERR_INTEGRITY, b"pages loading %lld, evictable on the host %lld, but %lld, %lld counted",
                    <long long>a.loading, <long long>a.host_evictable, <long long>t.loading, <long long>t.host_evictable)
    if a.evictable != t.evictable or a.protected_ != t.protected_ or a.pending != t.pending or a.host_pages != t.host_pages:
        return fail(RKV_ERR_INTEGRITY,
                    b"pages evictable %lld, protected %lld, pending %lld, host %lld, but %lld, %lld, %lld, %lld counted",
                    <long long>a.evictable, <long long>a.protected_, <long long>a.pending, <long long>a.host_pages,
                    <long long>t.evictable, <long long>t.protected_, <long long>t.pending, <long long>t.host_pages)
    if a.device_pages != t.device_ids.size or t.device_ids.size != pageset_count(&t.device_ids):
        return fail(RKV_ERR_INTEGRITY, b"%llu device pages, %llu ids owned: an id is owned twice or not at all",
                    <unsigned long long>a.device_pages, <unsigned long long>t.device_ids.size)
    if <uint64_t>a.host_pages != t.host_ids.size or t.host_ids.size != pageset_count(&t.host_ids):
        return fail(RKV_ERR_INTEGRITY, b"%lld host pages, %llu ids owned: an id is owned twice or not at all",
                    <long long>a.host_pages, <unsigned long long>t.host_ids.size)
    return RKV_OK


cdef inline rkv_status check_tier(const Tree *t, const PageSet *owned, const rkv_tier_check *tier, const char *name) noexcept nogil:
    """tree + free = capacity, and no id on both sides."""
    cdef PageSet free_ids
    cdef uint64_t k, added = 0, both = 0
    cdef int32_t first = 0
    cdef rkv_status status = RKV_OK
    if tier == NULL or tier.capacity_pages < 0:
        return RKV_OK
    memset(&free_ids, 0, sizeof(PageSet))
    free_ids.allocator = owned.allocator
    for k in range(tier.num_free_pages):
        if tier.free_page_ids[k] >= 0 and pageset_has(owned, tier.free_page_ids[k]):
            first = tier.free_page_ids[k] if both == 0 or tier.free_page_ids[k] < first else first
            both += 1
    if both:
        status = fail(RKV_ERR_INTEGRITY, b"%llu %s page ids are in the tree and free, the first is %d", <unsigned long long>both, name,
                      first)
    if status == RKV_OK and pageset_add(&free_ids, tier.free_page_ids, tier.num_free_pages, &added) != ADD_OK:
        status = fail(RKV_ERR_INTEGRITY, b"%s page %d is free twice, or negative", name, tier.free_page_ids[added])
    if status == RKV_OK and owned.size + tier.num_free_pages != <uint64_t>tier.capacity_pages:
        status = fail(RKV_ERR_INTEGRITY, b"%s: %llu pages in the tree + %llu free != capacity %lld", name,
                      <unsigned long long>owned.size, <unsigned long long>tier.num_free_pages, <long long>tier.capacity_pages)
    pageset_release(&free_ids)
    return status


cdef inline rkv_status check_integrity(const Tree *t, const rkv_tier_check *device, const rkv_tier_check *host) noexcept nogil:
    cdef Audit a
    cdef size_t bytes = (<size_t>t.store.top // 64 + 1) * 8
    cdef rkv_status status
    memset(&a, 0, sizeof(Audit))
    a.seen = <uint64_t *>reallocate(&t.allocator, NULL, 0, bytes)
    if a.seen == NULL:
        return fail(RKV_ERR_NO_MEMORY, b"check_integrity: no memory")
    memset(a.seen, 0, bytes)
    status = check_nodes(t, &a)
    if status == RKV_OK:
        status = check_free_extents(t, &a)
    if status == RKV_OK:
        status = check_totals(t, &a)
    if status == RKV_OK:
        status = check_tier(t, &t.device_ids, device, b"device")
    if status == RKV_OK:
        status = check_tier(t, &t.host_ids, host, b"host")
    reallocate(&t.allocator, a.seen, bytes, 0)
    return status
