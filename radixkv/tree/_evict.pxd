"""Protection, eviction, the traffic between the tiers, and deletion."""

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from radixkv.tree._abi cimport (
    RKV_ERR_ARGUMENT, RKV_ERR_LOCK, RKV_ERR_NO_MEMORY, RKV_ERR_STATE, RKV_EVENT_CLEARED, RKV_EVENT_REMOVED,
    RKV_MEDIUM_DEVICE, RKV_MEDIUM_HOST, RKV_OK, Entry, before, fail, prefetch, rkv_allocator, rkv_backup, rkv_event, rkv_freed, rkv_node,
    rkv_status,
)
from radixkv.tree._events cimport emit, push_event
from radixkv.tree._memory cimport drop, grow, reallocate
from radixkv.tree._nodes cimport (
    DEVICE, HARD, HEAP_ROOT, HOST, HOST_LEAF, LIVE, LOADING, MARK_SHIFT, NO_INDEX, NUM_ORDERS, OP_HEAD, ORDER_MASK, ORDER_SHIFT, PENDING,
    ROOT_NODE, SOFT, Namespace, Node, Order, Pin, Slot, Tree, child_changed, drop_root_if_empty, handle_of, host_evictable, is_gone,
    is_protected, is_root, node_give, order_remove, pin_place, pin_remove, refresh, refresh_if_ordered, set_pending, table_remove,
    unlink_child,
)
from radixkv.tree._store cimport (
    NO_UNIT, pageset_release, pageset_remove, store_free, store_release, unit_key,
)
from radixkv.tree._walk cimport claim, gain_device, gain_host_path


# ---- results ---------------------------------------------------------------------------------------------------------

cdef inline void freed_begin(Tree *t, rkv_freed *out) noexcept nogil:
    if out.allocator_.reallocate == NULL:
        out.allocator_ = t.allocator
    out.num_tokens = 0
    out.num_pages = out.num_host_pages = out.num_backups = out.num_backup_pages = 0


cdef inline bint freed_reserve(rkv_freed *out, uint64_t pages, uint64_t host_pages, uint64_t backups,
                               uint64_t backup_pages) noexcept nogil:
    """Room for so many more of each. False: no memory; what is there stays."""
    cdef rkv_allocator *a = &out.allocator_
    return (grow(a, <void **>&out.page_ids, &out.capacity_[0], out.num_pages + pages, 4, 16)
            and grow(a, <void **>&out.host_page_ids, &out.capacity_[1], out.num_host_pages + host_pages, 4, 16)
            and grow(a, <void **>&out.backups, &out.capacity_[2], out.num_backups + backups, sizeof(rkv_backup), 4)
            and grow(a, <void **>&out.backup_page_ids, &out.capacity_[3], out.num_backup_pages + backup_pages, 4, 16))


cdef inline void freed_release(rkv_freed *out) noexcept nogil:
    if out.allocator_.reallocate == NULL:
        return
    drop(&out.allocator_, <void **>&out.page_ids, &out.capacity_[0], 4)
    drop(&out.allocator_, <void **>&out.host_page_ids, &out.capacity_[1], 4)
    drop(&out.allocator_, <void **>&out.backups, &out.capacity_[2], sizeof(rkv_backup))
    drop(&out.allocator_, <void **>&out.backup_page_ids, &out.capacity_[3], 4)
    out.num_tokens = 0
    out.num_pages = out.num_host_pages = out.num_backups = out.num_backup_pages = 0


# ---- protection ------------------------------------------------------------------------------------------------------

cdef inline int64_t protect_path(Tree *t, uint32_t i, int lock, int pin) noexcept nogil:
    """Add to lock_ref and pin_ref from node i up to the root; the change of evictable pages."""
    cdef Node *n
    cdef int64_t delta = 0
    cdef bint was
    while not is_root(t, i):
        n = &t.nodes[i]
        was = is_protected(n)
        n.lock_ref += lock
        n.pin_ref += pin
        if is_protected(n) != was:
            if was:
                delta += n.num_pages
            else:
                delta -= n.num_pages
            refresh(t, i)
        i = n.parent
    t.evictable += delta
    t.protected_ -= delta
    return delta


cdef inline rkv_status lock(Tree *t, uint32_t i, int64_t *delta) noexcept nogil:
    if not t.nodes[i].flags & DEVICE:
        return fail(RKV_ERR_STATE, b"lock: node %#llx has no device pages", <unsigned long long>handle_of(t, i))
    t.nodes[i].own_locks += 1
    delta[0] = protect_path(t, i, 1, 0) * t.page_size
    return RKV_OK


cdef inline rkv_status unlock(Tree *t, uint32_t i, int64_t *delta) noexcept nogil:
    """Only a lock of this very node: taking one of a node below would leave its owner with a lock that cannot be undone."""
    if not t.nodes[i].flags & DEVICE:
        return fail(RKV_ERR_STATE, b"unlock: node %#llx has no device pages", <unsigned long long>handle_of(t, i))
    if t.nodes[i].own_locks == 0:
        return fail(RKV_ERR_LOCK, b"unlock: node %#llx is not locked itself (%u locks of nodes below)",
                    <unsigned long long>handle_of(t, i), t.nodes[i].lock_ref)
    t.nodes[i].own_locks -= 1
    delta[0] = protect_path(t, i, -1, 0) * t.page_size
    return RKV_OK


cdef inline void count_host_ref(Tree *t, uint32_t i, int change) noexcept nogil:
    """A node's host_ref went from or to 0: its ancestors keep count of such descendants."""
    cdef Node *n
    i = t.nodes[i].parent
    while not is_root(t, i):
        n = &t.nodes[i]
        t.host_evictable -= host_evictable(n)
        n.sub_host_ref += change
        t.host_evictable += host_evictable(n)
        refresh(t, i)
        i = n.parent


cdef inline rkv_status protect_host(Tree *t, uint32_t i) noexcept nogil:
    cdef Node *n = &t.nodes[i]
    if not n.flags & HOST:
        return fail(RKV_ERR_STATE, b"protect_host: node %#llx has no host pages", <unsigned long long>handle_of(t, i))
    t.host_evictable -= host_evictable(n)
    n.host_ref += 1
    if n.host_ref == 1:
        refresh(t, i)
        count_host_ref(t, i, 1)
    return RKV_OK


cdef inline rkv_status release_host(Tree *t, uint32_t i) noexcept nogil:
    cdef Node *n = &t.nodes[i]
    if n.host_ref == 0:
        return fail(RKV_ERR_LOCK, b"release_host: node %#llx has host_ref 0", <unsigned long long>handle_of(t, i))
    n.host_ref -= 1
    t.host_evictable += host_evictable(n)
    if n.host_ref == 0:
        refresh(t, i)
        count_host_ref(t, i, -1)
    return RKV_OK


cdef inline int64_t unpin(Tree *t, uint32_t i) noexcept nogil:
    if t.nodes[i].pin_slot == 0:
        return 0
    pin_remove(t, i)
    return protect_path(t, i, 0, -1)


cdef inline rkv_status pin(Tree *t, uint32_t i, int64_t until_ns, int64_t *delta) noexcept nogil:
    cdef Pin p
    cdef uint32_t slot = t.nodes[i].pin_slot
    if not t.nodes[i].flags & DEVICE:
        return fail(RKV_ERR_STATE, b"pin: node %#llx has no device pages", <unsigned long long>handle_of(t, i))
    p.until_ns = until_ns
    p.node = i
    delta[0] = 0
    if slot:
        pin_place(t, slot - 1, p)
        return RKV_OK
    if not grow(&t.allocator, <void **>&t.pins, &t.pin_capacity, <uint64_t>t.num_pins + 1, sizeof(Pin), 8):
        return fail(RKV_ERR_NO_MEMORY, b"pin: no memory for %u pins", t.num_pins + 1)
    t.num_pins += 1
    pin_place(t, t.num_pins - 1, p)
    delta[0] = protect_path(t, i, 0, 1) * t.page_size
    return RKV_OK


cdef inline uint64_t expire(Tree *t, int64_t now_ns) noexcept nogil:
    cdef uint64_t removed = 0
    while t.num_pins and t.pins[0].until_ns <= now_ns:
        unpin(t, t.pins[0].node)
        removed += 1
    return removed


# ---- losing pages ----------------------------------------------------------------------------------------------------

cdef inline void append_device(Tree *t, rkv_freed *out, const Node *n) noexcept nogil:
    memcpy(out.page_ids + out.num_pages, t.store.device + n.start, 4 * <size_t>n.num_pages)
    out.num_pages += n.num_pages
    pageset_remove(&t.device_ids, t.store.device + n.start, n.num_pages)


cdef inline void append_host(Tree *t, rkv_freed *out, const Node *n) noexcept nogil:
    memcpy(out.host_page_ids + out.num_host_pages, t.store.host + n.start, 4 * <size_t>n.num_pages)
    out.num_host_pages += n.num_pages
    pageset_remove(&t.host_ids, t.store.host + n.start, n.num_pages)
    t.host_pages -= n.num_pages


cdef inline void forget_device(Tree *t, rkv_freed *out, uint32_t i) noexcept nogil:
    """A node's device pages go to the result; it keeps, or is about to lose, the rest. Room was reserved."""
    cdef Node *n = &t.nodes[i]
    emit(t, RKV_EVENT_REMOVED, RKV_MEDIUM_DEVICE, i)
    append_device(t, out, n)
    out.num_tokens += <int64_t>n.num_pages * t.page_size
    if is_protected(n):
        t.protected_ -= n.num_pages
    else:
        t.evictable -= n.num_pages


cdef inline void lose_device(Tree *t, rkv_freed *out, uint32_t i) noexcept nogil:
    """[device, host]  ->  [host], backup finished if one was pending: in one step, so that the parent never looks less gone than it is."""
    cdef Node *n = &t.nodes[i]
    cdef bint was_gone = is_gone(n)
    if n.flags & PENDING:
        t.pending -= n.num_pages
    forget_device(t, out, i)
    n.flags &= ~<uint32_t>(DEVICE | PENDING | OP_HEAD)
    t.host_evictable += host_evictable(n)
    refresh(t, i)
    child_changed(t, n.parent, -1, -1 if was_gone else 0)


cdef inline void delete_leaf(Tree *t, rkv_freed *out, uint32_t i) noexcept nogil:
    """Take a childless node without pin or lock out of the tree; its pages of both tiers go to the result."""
    cdef Node *n = &t.nodes[i]
    cdef uint32_t parent = n.parent
    cdef bint was_device = (n.flags & DEVICE) != 0, was_gone = is_gone(n)
    t.host_evictable -= host_evictable(n)
    if n.flags & PENDING:
        t.pending -= n.num_pages
    if was_device:
        forget_device(t, out, i)
    if n.flags & HOST:
        emit(t, RKV_EVENT_REMOVED, RKV_MEDIUM_HOST, i)
        append_host(t, out, n)
    if n.flags & ORDER_MASK:
        order_remove(t, &t.orders[((n.flags & ORDER_MASK) >> ORDER_SHIFT) - 1], i)
    table_remove(t, i)
    unlink_child(t, i)
    store_free(&t.store, n.start, n.num_pages)
    node_give(t, i)
    t.num_nodes -= 1
    if was_device:
        child_changed(t, parent, -1, -1 if was_gone else 0)
    else:
        refresh(t, parent)


cdef inline uint32_t first_leaf(const Tree *t, uint32_t i) noexcept nogil:
    while t.nodes[i].first_child != NO_INDEX:
        i = t.nodes[i].first_child
    return i


cdef inline uint32_t next_after(const Tree *t, uint32_t i, uint32_t top) noexcept nogil:
    """The node after i in a pre-order walk of top's subtree, or NO_INDEX."""
    if t.nodes[i].first_child != NO_INDEX:
        return t.nodes[i].first_child
    while i != top:
        if t.nodes[i].next_sibling != NO_INDEX:
            return t.nodes[i].next_sibling
        i = t.nodes[i].parent
    return NO_INDEX


cdef inline void delete_below(Tree *t, rkv_freed *out, uint32_t top) noexcept nogil:
    """Delete all descendants of a node, leaves first. Never deeper than a loop."""
    cdef uint32_t i, parent
    while t.nodes[top].first_child != NO_INDEX:
        i = first_leaf(t, t.nodes[top].first_child)
        while i != top and t.nodes[i].first_child == NO_INDEX:
            parent = t.nodes[i].parent
            delete_leaf(t, out, i)
            i = parent


cdef inline void delete_subtree(Tree *t, rkv_freed *out, uint32_t i) noexcept nogil:
    cdef uint32_t root = t.nodes[i].root
    delete_below(t, out, i)
    delete_leaf(t, out, i)
    drop_root_if_empty(t, root)


cdef inline uint64_t host_pages_below(const Tree *t, uint32_t top) noexcept nogil:
    cdef uint64_t pages = 0
    cdef uint32_t i = next_after(t, top, top)
    while i != NO_INDEX:
        pages += t.nodes[i].num_pages
        i = next_after(t, i, top)
    return pages


# ---- evict -----------------------------------------------------------------------------------------------------------

cdef inline uint32_t first_in_order(const Tree *t, bint backup) noexcept nogil:
    """The next candidate: of the hard order, or with backup of both."""
    cdef const Order *hard = &t.orders[HARD]
    cdef const Order *soft = &t.orders[SOFT]
    cdef bint has_hard = hard.end > HEAP_ROOT
    if backup and soft.end > HEAP_ROOT and not (
            has_hard and before(&hard.entries[HEAP_ROOT], &soft.entries[HEAP_ROOT])):
        return soft.entries[HEAP_ROOT].node
    return hard.entries[HEAP_ROOT].node if has_hard else NO_INDEX


cdef inline bint list_backup(Tree *t, rkv_freed *out, uint32_t i) noexcept nogil:
    """Mark a node pending and list it. False: no memory."""
    cdef Node *n = &t.nodes[i]
    cdef rkv_backup *b
    if not freed_reserve(out, 0, 0, 1, n.num_pages):
        return False
    b = &out.backups[out.num_backups]
    b.node = handle_of(t, i)
    b.first_page = out.num_backup_pages
    b.num_pages = n.num_pages
    memcpy(out.backup_page_ids + out.num_backup_pages, t.store.device + n.start, 4 * <size_t>n.num_pages)
    out.num_backups += 1
    out.num_backup_pages += n.num_pages
    n.flags |= OP_HEAD
    n.op_pages_above = 0
    set_pending(t, i, True)
    return True


cdef inline int64_t held_back(const Tree *t, uint32_t i) noexcept nogil:
    """Pages above a node that has just become pending: those with a host copy that wait for nothing but such backups.

        [host copy] -- [host copy] -- [pending]         the two go as soon as the third has
    """
    cdef const Node *n = &t.nodes[i]
    cdef int64_t pages = 0
    while is_gone(n):
        n = &t.nodes[n.parent]
    if n.num_gone_children != n.num_device_children:
        return 0
    while n.flags & HOST and not n.flags & PENDING and not is_protected(n):
        pages += n.num_pages
        n = &t.nodes[n.parent]
        if n.num_device_children != 1:
            break
    return pages


cdef inline void prefetch_next(const Tree *t, const Order *o) noexcept nogil:
    """Ask for what evicting the next candidate will touch, while the caller is busy with this one: in a tree larger than the cache
    each of these lines would cost more than the whole operation. The top of the order, then its heirs, whose node must be there
    before the rest of theirs can be asked for."""
    cdef uint32_t c
    cdef const Node *n
    if o.end <= HEAP_ROOT:
        return
    n = &t.nodes[o.entries[HEAP_ROOT].node]
    prefetch(&t.table[n.key_hash & (t.table_capacity - 1)])
    prefetch(unit_key(&t.store, n.start))
    prefetch(&t.store.device[n.start])
    prefetch(&t.store.device[n.start + n.num_pages])
    prefetch(&t.nodes[n.parent])
    prefetch(&t.nodes[n.next_sibling])
    prefetch(&t.nodes[n.prev_sibling])
    prefetch(&o.entries[o.end - 1])
    for c in range(HEAP_ROOT + 1, HEAP_ROOT + 5):
        if c < o.end:
            prefetch(&t.nodes[o.entries[c].node])
            prefetch(<const char *>&t.nodes[o.entries[c].node] + 64)
            prefetch(&t.heap_pos[o.entries[c].node])


cdef inline rkv_status evict(Tree *t, int64_t num_tokens, bint backup, rkv_freed *out) noexcept nogil:
    """Whole leaves in policy order. If memory for the answer runs out after the first leaf, what was freed is the answer."""
    cdef uint32_t i
    cdef Node *n
    cdef bint fits
    cdef int64_t held = 0
    if num_tokens < 0:
        return fail(RKV_ERR_ARGUMENT, b"evict: num_tokens is %lld, less than 0", <long long>num_tokens)
    freed_begin(t, out)
    while out.num_tokens + (<int64_t>out.num_backup_pages + held) * t.page_size < num_tokens:
        i = first_in_order(t, backup)
        if i == NO_INDEX:
            break
        n = &t.nodes[i]
        if n.flags & HOST:
            fits = freed_reserve(out, n.num_pages, 0, 0, 0)
            if fits:
                lose_device(t, out, i)
        elif backup:
            fits = list_backup(t, out, i)
            if fits:
                held += held_back(t, i)
        else:
            fits = freed_reserve(out, n.num_pages, host_pages_below(t, i) if n.first_child != NO_INDEX else 0, 0, 0)
            if fits:
                delete_subtree(t, out, i)
        if not fits:
            if out.num_tokens == 0 and out.num_backups == 0:
                return fail(RKV_ERR_NO_MEMORY, b"evict: no memory for the list of freed pages")
            break
        prefetch_next(t, &t.orders[HARD])
    return RKV_OK


cdef inline rkv_status evict_host(Tree *t, int64_t num_tokens, rkv_freed *out) noexcept nogil:
    cdef uint32_t i, root
    cdef Node *n
    if num_tokens < 0:
        return fail(RKV_ERR_ARGUMENT, b"evict_host: num_tokens is %lld, less than 0", <long long>num_tokens)
    freed_begin(t, out)
    while <int64_t>out.num_host_pages * t.page_size < num_tokens and t.orders[HOST_LEAF].end > HEAP_ROOT:
        i = t.orders[HOST_LEAF].entries[HEAP_ROOT].node
        n = &t.nodes[i]
        if not freed_reserve(out, 0, n.num_pages, 0, 0):
            if out.num_host_pages == 0:
                return fail(RKV_ERR_NO_MEMORY, b"evict_host: no memory for the list of freed pages")
            break
        root = n.root
        delete_leaf(t, out, i)
        drop_root_if_empty(t, root)
    out.num_tokens = <int64_t>out.num_host_pages * t.page_size
    return RKV_OK


# ---- backup and load -------------------------------------------------------------------------------------------------

cdef inline rkv_status find_operation(const Tree *t, uint32_t i, uint32_t kind, const char *what) noexcept nogil:
    """Is i the head of an operation in flight of this kind?"""
    if not t.nodes[i].flags & kind:
        return fail(RKV_ERR_STATE, b"%s: node %#llx has nothing in flight", what, <unsigned long long>handle_of(t, i))
    if not t.nodes[i].flags & OP_HEAD:
        return fail(RKV_ERR_STATE, b"%s: node %#llx was split off a node in flight; finish it through that node's handle", what,
                    <unsigned long long>handle_of(t, i))
    return RKV_OK


cdef inline bint may_leave(const Node *n) noexcept nogil:
    """May a node whose backup found no room be dropped, with its host-only descendants?"""
    return n.num_device_children == 0 and not is_protected(n) and n.sub_host_ref == 0


cdef inline rkv_status finish_backup(Tree *t, uint32_t i, const int32_t *ids, uint64_t num_ids, rkv_freed *out) noexcept nogil:
    """Settle the node and the parts that splits moved above it, from the bottom up.

        [upper part: pages 0..1]        ids of the original node, in key order:  0 1 | 2 3 4
               |                                                                       |
        [i, the head: pages 2..4]       first i with 2 3 4, then the part above with 0 1
    """
    cdef Node *n = &t.nodes[i]
    cdef uint64_t left = <uint64_t>n.num_pages + n.op_pages_above, host_pages = 0
    cdef uint32_t up, root = n.root
    cdef rkv_status status = find_operation(t, i, PENDING, b"finish_backup")
    if status != RKV_OK:
        return status
    if ids != NULL and num_ids != left:
        return fail(RKV_ERR_ARGUMENT, b"finish_backup: %llu host page ids for %llu pages", <unsigned long long>num_ids,
                    <unsigned long long>left)
    freed_begin(t, out)
    if ids == NULL and may_leave(n):
        up = i
        while t.nodes[up].end_page - t.nodes[up].num_pages + left > n.end_page:
            up = t.nodes[up].parent
        host_pages = host_pages_below(t, up)
    if not freed_reserve(out, left, host_pages, 0, 0):
        return fail(RKV_ERR_NO_MEMORY, b"finish_backup: no memory for the list of freed pages")
    if ids != NULL:
        status = claim(&t.host_ids, ids, num_ids, b"finish_backup")
        if status != RKV_OK:
            return status
        gain_host_path(t, i, ids, num_ids)
    while left > 0:
        n = &t.nodes[i]
        left -= n.num_pages
        up = n.parent
        n.op_pages_above = 0
        if ids != NULL and n.num_device_children == 0 and not is_protected(n):
            lose_device(t, out, i)
        elif ids == NULL and may_leave(n):
            delete_below(t, out, i)
            delete_leaf(t, out, i)
        else:
            set_pending(t, i, False)
        i = up
    drop_root_if_empty(t, root)
    return RKV_OK


cdef inline rkv_status above_last_pages(const Tree *t, uint32_t i, uint64_t pages, const char *what, uint32_t *above) noexcept nogil:
    """The node above those that hold exactly the last ``pages`` pages of the path to node i."""
    cdef uint64_t covered = 0
    above[0] = i
    while covered < pages and not is_root(t, above[0]):
        covered += t.nodes[above[0]].num_pages
        above[0] = t.nodes[above[0]].parent
    if pages == 0 or covered != pages:
        return fail(RKV_ERR_ARGUMENT, b"%s: %llu pages above the end of node %#llx do not begin at a node boundary (the next one: %llu)",
                    what, <unsigned long long>pages, <unsigned long long>handle_of(t, i), <unsigned long long>covered)
    return RKV_OK


cdef inline rkv_status mark(Tree *t, uint32_t i, uint32_t set_, uint32_t clear, uint64_t num_pages) noexcept nogil:
    """num_pages 0: node i alone."""
    cdef uint32_t above = t.nodes[i].parent
    cdef rkv_status status = RKV_OK
    if num_pages:
        status = above_last_pages(t, i, num_pages, b"mark", &above)
    if status != RKV_OK:
        return status
    while i != above:
        t.nodes[i].flags = (t.nodes[i].flags & ~(clear << MARK_SHIFT)) | set_ << MARK_SHIFT
        i = t.nodes[i].parent
    return RKV_OK


cdef inline rkv_status set_host(Tree *t, uint32_t i, const int32_t *ids, uint64_t num_ids) noexcept nogil:
    cdef uint32_t k = i, above = NO_INDEX, culprit = NO_INDEX
    cdef const char *state
    cdef rkv_status status = above_last_pages(t, i, num_ids, b"set_host", &above)
    if status != RKV_OK:
        return status
    while k != above:
        if not t.nodes[k].flags & DEVICE or t.nodes[k].flags & (HOST | PENDING):
            culprit = k
        k = t.nodes[k].parent
    if culprit != NO_INDEX:
        state = (b"pending" if t.nodes[culprit].flags & PENDING else
                 b"on the host already" if t.nodes[culprit].flags & DEVICE else b"host-only")
        return fail(RKV_ERR_STATE, b"set_host: node %#llx, covered by the %llu host pages, is %s",
                    <unsigned long long>handle_of(t, culprit), <unsigned long long>num_ids, state)
    status = claim(&t.host_ids, ids, num_ids, b"set_host")
    if status != RKV_OK:
        return status
    gain_host_path(t, i, ids, num_ids)
    return RKV_OK


cdef inline rkv_status set_device(Tree *t, uint32_t i, const int32_t *ids, uint64_t num_ids, bint loading) noexcept nogil:
    cdef Node *n = &t.nodes[i]
    cdef rkv_status status
    if n.flags & DEVICE:
        return fail(RKV_ERR_STATE, b"set_device: node %#llx has device pages", <unsigned long long>handle_of(t, i))
    if not t.nodes[n.parent].flags & DEVICE:
        return fail(RKV_ERR_STATE, b"set_device: the parent %#llx of node %#llx is host-only",
                    <unsigned long long>handle_of(t, n.parent), <unsigned long long>handle_of(t, i))
    if num_ids != n.num_pages:
        return fail(RKV_ERR_ARGUMENT, b"set_device: %llu page ids for %u pages", <unsigned long long>num_ids, n.num_pages)
    status = claim(&t.device_ids, ids, num_ids, b"set_device")
    if status != RKV_OK:
        return status
    gain_device(t, i, ids)
    if loading:
        n.flags |= LOADING | OP_HEAD
        n.op_pages_above = 0
        t.loading += n.num_pages
        protect_path(t, i, 0, 1)
    return RKV_OK


cdef inline rkv_status check_unused(const Tree *t, uint32_t i, uint64_t left) noexcept nogil:
    """A failed load: nobody may hold its pages, and nothing else may hang on them."""
    cdef const Node *n
    cdef uint32_t below = 0
    cdef rkv_node head = handle_of(t, i)
    while left > 0:
        n = &t.nodes[i]
        if n.lock_ref or n.num_device_children != below:
            return fail(RKV_ERR_LOCK,
                        b"finish_load: the load of node %#llx failed, but its part %#llx has %u locks and %u children on the device",
                        <unsigned long long>head, <unsigned long long>handle_of(t, i), n.lock_ref, n.num_device_children - below)
        left -= n.num_pages
        below = 1
        i = n.parent
    return RKV_OK


cdef inline rkv_status finish_load(Tree *t, uint32_t i, bint success, rkv_freed *out) noexcept nogil:
    cdef uint64_t pages = <uint64_t>t.nodes[i].num_pages + t.nodes[i].op_pages_above, left = pages
    cdef uint32_t k = i
    cdef rkv_status status = find_operation(t, i, LOADING, b"finish_load")
    if status == RKV_OK and not success:
        status = check_unused(t, i, pages)
    if status != RKV_OK:
        return status
    freed_begin(t, out)
    if not success and not freed_reserve(out, pages, 0, 0, 0):
        return fail(RKV_ERR_NO_MEMORY, b"finish_load: no memory for the list of freed pages")
    t.nodes[i].op_pages_above = 0
    while left > 0:
        t.nodes[k].flags &= ~<uint32_t>(LOADING | OP_HEAD)
        t.loading -= t.nodes[k].num_pages
        left -= t.nodes[k].num_pages
        k = t.nodes[k].parent
    protect_path(t, i, 0, -1)
    left = 0 if success else pages
    while left > 0:
        left -= t.nodes[i].num_pages
        unpin(t, i)
        lose_device(t, out, i)
        i = t.nodes[i].parent
    return RKV_OK


# ---- deletion --------------------------------------------------------------------------------------------------------

cdef inline void drop_pins(Tree *t, uint32_t top, uint32_t pins) noexcept nogil:
    """Remove all pins of a subtree in one walk over it and one up from it; what else protects a node there is known to be nothing."""
    cdef uint32_t i = top
    cdef Node *n
    while i != NO_INDEX:
        n = &t.nodes[i]
        if n.pin_slot:
            pin_remove(t, i)
        if n.pin_ref:
            t.protected_ -= n.num_pages
            t.evictable += n.num_pages
            n.pin_ref = 0
        i = next_after(t, i, top)
    if not is_root(t, top):
        protect_path(t, t.nodes[top].parent, 0, -<int>pins)


cdef inline rkv_status prepare_delete(Tree *t, uint32_t top, rkv_freed *out) noexcept nogil:
    """Refuse if anything in the subtree is in use; make room for all its pages; drop its pins."""
    cdef uint64_t in_use = 0, nodes = 0, pages = 0, host_pages = 0
    cdef uint32_t pins = 0
    cdef uint32_t i = top
    cdef const Node *n
    while i != NO_INDEX:
        n = &t.nodes[i]
        if not n.flags & ROOT_NODE:
            nodes += 1
            if n.lock_ref or n.host_ref or n.flags & (LOADING | PENDING):
                in_use += 1
            if n.flags & DEVICE:
                pages += n.num_pages
            if n.flags & HOST:
                host_pages += n.num_pages
            pins += n.pin_slot != 0
        i = next_after(t, i, top)
    if in_use:
        return fail(RKV_ERR_LOCK, b"delete: %llu of %llu nodes are locked, host-protected, loading or pending",
                    <unsigned long long>in_use, <unsigned long long>nodes)
    freed_begin(t, out)
    if not freed_reserve(out, pages, host_pages, 0, 0):
        return fail(RKV_ERR_NO_MEMORY, b"delete: no memory for the list of freed pages")
    if pins:
        drop_pins(t, top, pins)
    return RKV_OK


cdef inline rkv_status delete_node(Tree *t, uint32_t i, rkv_freed *out) noexcept nogil:
    cdef rkv_status status = prepare_delete(t, i, out)
    if status == RKV_OK:
        delete_subtree(t, out, i)
    return status


cdef inline rkv_status delete_root(Tree *t, uint32_t root, rkv_freed *out) noexcept nogil:
    cdef rkv_status status
    if root == NO_INDEX:
        freed_begin(t, out)
        return RKV_OK
    status = prepare_delete(t, root, out)
    if status == RKV_OK:
        delete_below(t, out, root)
        drop_root_if_empty(t, root)
    return status


cdef inline rkv_status reset(Tree *t, rkv_freed *out) noexcept nogil:
    """Give every page back and forget everything but the generations of the slots."""
    cdef uint32_t i, k
    cdef rkv_event *e
    freed_begin(t, out)
    if not freed_reserve(out, t.device_ids.size, t.host_ids.size, 0, 0):
        return fail(RKV_ERR_NO_MEMORY, b"reset: no memory for the list of freed pages")
    t.event_start = t.event_end = 0
    if t.events_on:
        e = push_event(t)
        if e == NULL:
            t.dropped_events -= 1
            return fail(RKV_ERR_NO_MEMORY, b"reset: no memory for an event")
        memset(e, 0, sizeof(rkv_event))
        e.kind = RKV_EVENT_CLEARED
    for i in range(1, t.node_end):
        if not t.nodes[i].flags & LIVE:
            continue
        if not t.nodes[i].flags & ROOT_NODE:
            if t.nodes[i].flags & DEVICE:
                append_device(t, out, &t.nodes[i])
            if t.nodes[i].flags & HOST:
                append_host(t, out, &t.nodes[i])
        node_give(t, i)
    out.num_tokens = <int64_t>out.num_pages * t.page_size
    for k in range(t.space_end):
        if t.spaces[k].name != NULL:
            reallocate(&t.allocator, t.spaces[k].name, t.spaces[k].name_bytes, 0)
    drop(&t.allocator, <void **>&t.spaces, &t.space_capacity, sizeof(Namespace))
    drop(&t.allocator, <void **>&t.space_table, &t.space_table_capacity, 4)
    drop(&t.allocator, <void **>&t.table, &t.table_capacity, sizeof(Slot))
    drop(&t.allocator, <void **>&t.pins, &t.pin_capacity, sizeof(Pin))
    store_release(&t.store)
    pageset_release(&t.device_ids)
    pageset_release(&t.host_ids)
    for k in range(NUM_ORDERS):
        t.orders[k].end = HEAP_ROOT
    t.space_end = t.num_spaces = t.default_root = t.num_nodes = t.num_pins = 0
    t.free_space = NO_UNIT
    t.table_used = t.name_memory = 0
    t.evictable = t.protected_ = t.pending = t.loading = t.host_pages = t.host_evictable = 0
    t.clock = 0
    return RKV_OK
