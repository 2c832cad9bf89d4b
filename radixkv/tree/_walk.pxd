"""Looking a key up, and adding one: match, peek, insert, on both tiers. Steps 2 and 6 of a request's life."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy
from radixkv.tree._abi cimport (
    RKV_ERR_ARGUMENT, RKV_ERR_HANDLE, RKV_ERR_NO_MEMORY, RKV_ERR_OWNERSHIP, RKV_EVENT_STORED, RKV_MEDIUM_DEVICE,
    MATCH_LOADING_SIZE, RKV_MEDIUM_HOST, RKV_OK, child_hash, common_prefix, fail, prefetch, rkv_insert, rkv_key, rkv_match,
    rkv_node, rkv_status,
)
from radixkv.tree._events cimport emit, hash_node
from radixkv.tree._nodes cimport (
    DEVICE, HASHED, HOST, LOADING, NO_INDEX, PENDING, Namespace, Node, Tree, add_root, child_changed, drop_root_if_empty,
    find_child, find_root, handle_of, hash_name, host_evictable, index_of, is_protected, is_root, link_child, marks_of, node_take,
    nodes_reserve, refresh, refresh_if_ordered, split, table_insert,
)
from radixkv.tree._store cimport (
    ADD_NEGATIVE, ADD_NO_MEMORY, ADD_OK, NO_UNIT, PageSet, pageset_add, pageset_remove, store_alloc, store_free, touch_host,
    unit_key,
)


cdef enum:
    FIRST_LOOK = 128                # tokens compared before the next node's are asked for


cdef struct Walk:
    uint32_t root                   # NO_INDEX: the namespace does not exist
    uint32_t base                   # page of the key at which the caller's tokens begin (match_extend)
    uint32_t node                   # the node in which the walk ended; root if nothing matched
    uint32_t inside                 # pages of that node that matched (num_pages: all of it)
    uint32_t pages                  # pages matched in all
    uint32_t device_node            # likewise for the part on the device
    uint32_t device_inside
    uint32_t device_pages


# ---- walking ---------------------------------------------------------------------------------------------------------

cdef inline void prefetch_ids(const Tree *t, const Node *n) noexcept nogil:
    """The first cache lines of a node's ids: they are collected after the walk, and a long run prefetches itself."""
    prefetch(&t.store.device[n.start])
    prefetch(&t.store.device[n.start + 16])


cdef inline uint64_t common_tokens(const Tree *t, const Node *n, const int32_t *key, uint64_t num_tokens) noexcept nogil:
    """common_prefix of a node's run and the key; half way, ask for the run of the first child, whose node has arrived by then."""
    cdef const int32_t *run = unit_key(&t.store, n.start)
    cdef uint64_t first = num_tokens if num_tokens < FIRST_LOOK else FIRST_LOOK
    cdef uint64_t same = common_prefix(run, key, first)
    cdef const int32_t *next_run
    if same < first:
        return same
    if n.first_child != NO_INDEX:
        next_run = unit_key(&t.store, t.nodes[n.first_child].start)
        prefetch(next_run)
        prefetch(next_run + 16)
    return first + common_prefix(run + first, key + first, num_tokens - first)


cdef inline void walk_down(Tree *t, Walk *w, const int32_t *tokens, uint64_t pages) noexcept nogil:
    """Go on from where ``w`` stands (at a node's end) for as long as the tree agrees with the key. Reads only.

    1. find the child that begins with the next page: the only one if there is one, else the table knows
    2. compare its whole run at once   3. stop inside it, or go on from its end
    """
    cdef uint32_t child, n
    cdef const int32_t *rest
    cdef uint64_t P = t.page_size
    cdef Node *node
    while w.pages < pages:
        rest = tokens + (w.pages - w.base) * P
        child = t.nodes[w.node].first_child
        if child == NO_INDEX:
            return
        if t.nodes[child].next_sibling != NO_INDEX:
            child = find_child(t, w.node, rest, child_hash(t.hash_seed, w.node, rest, P))
            if child == NO_INDEX:
                return
        node = &t.nodes[child]
        prefetch(&t.nodes[node.first_child])
        prefetch_ids(t, node)
        n = node.num_pages
        if pages - w.pages < n:
            n = <uint32_t>(pages - w.pages)
        n = <uint32_t>(common_tokens(t, node, rest, n * P) // P)
        if n == 0:
            return
        w.node = child
        w.inside = n
        w.pages += n
        if node.flags & DEVICE:
            w.device_node = child
            w.device_inside = n
            w.device_pages += n
        if n < node.num_pages:
            return


cdef inline void stand_at_root(Walk *w) noexcept nogil:
    w.node = w.device_node = w.root
    w.base = w.inside = w.pages = w.device_inside = w.device_pages = 0


cdef inline void stand_at(const Tree *t, Walk *w, uint32_t i) noexcept nogil:
    """Let a walk stand at the end of node i."""
    cdef uint32_t d = i
    w.base = 0
    w.node = i
    w.inside = t.nodes[i].num_pages
    w.pages = t.nodes[i].end_page
    while not t.nodes[d].flags & DEVICE:
        d = t.nodes[d].parent
    w.device_node = d
    w.device_inside = t.nodes[d].num_pages
    w.device_pages = t.nodes[d].end_page


cdef inline bint path_equals(const Tree *t, uint32_t i, const int32_t *tokens) noexcept nogil:
    """Do the tokens begin with the path to the end of node i? Compared from the end up."""
    cdef const Node *n
    while not is_root(t, i):
        n = &t.nodes[i]
        if memcmp(unit_key(&t.store, n.start), tokens + <uint64_t>(n.end_page - n.num_pages) * t.page_size,
                  4 * <size_t>n.num_pages * t.page_size) != 0:
            return False
        i = n.parent
    return True


cdef inline uint64_t namespace_id(const Tree *t, const rkv_key *key) noexcept nogil:
    return hash_name(t, <const uint8_t *>key.ns, key.ns_bytes)


cdef inline void walk(Tree *t, Walk *w, const rkv_key *key, uint64_t space) noexcept nogil:
    w.root = find_root(t, <const uint8_t *>key.ns, key.ns_bytes, space)
    stand_at_root(w)
    if w.root != NO_INDEX:
        walk_down(t, w, key.tokens, key.num_tokens // t.page_size)


cdef inline void collect_ids(const Tree *t, const Walk *w, int32_t *page_ids) noexcept nogil:
    """Copy the path's page ids to where their pages are in the key: the device part, and behind it the host part."""
    cdef uint32_t i = w.node, pages = w.inside, end = w.pages
    cdef const Node *n
    if w.root == NO_INDEX:
        return
    while not is_root(t, i):
        n = &t.nodes[i]
        end -= pages
        memcpy(page_ids + end, (t.store.device if n.flags & DEVICE else t.store.host) + n.start, 4 * <size_t>pages)
        i = n.parent
        pages = t.nodes[i].num_pages


cdef inline uint64_t loading_pages(const Tree *t, const Walk *w) noexcept nogil:
    """Pages of the device part that are still being filled; costs nothing while no load is in flight."""
    cdef uint32_t i = w.device_node, pages = w.device_inside
    cdef uint64_t found = 0
    if t.loading == 0 or w.device_pages == 0:
        return 0
    while not is_root(t, i):
        if t.nodes[i].flags & LOADING:
            found += pages
        i = t.nodes[i].parent
        pages = t.nodes[i].num_pages
    return found


cdef inline void fill_match(const Tree *t, const Walk *w, uint64_t space, rkv_match *out) noexcept nogil:
    out.tree_id = t.id_
    out.namespace_id = space
    out.num_tokens = <int64_t>w.device_pages * t.page_size
    out.host_num_tokens = <int64_t>(w.pages - w.device_pages) * t.page_size
    out.device_node = handle_of(t, w.device_node) if w.device_pages else 0
    out.host_node = handle_of(t, w.node) if w.pages else 0
    if out.struct_size >= MATCH_LOADING_SIZE:
        out.loading_tokens = <int64_t>loading_pages(t, w) * t.page_size


# ---- match -----------------------------------------------------------------------------------------------------------

cdef inline void split_ends(Tree *t, Walk *w) noexcept nogil:
    """Make the walk end at node ends: cut the node in which it stopped. nodes_reserve(1) went before.

    Only the last node of a walk can be entered in part, so device_node needs a cut only if it is that node.
    """
    cdef uint32_t upper
    if w.pages == 0 or w.inside == t.nodes[w.node].num_pages:
        return
    upper = split(t, w.node, w.inside)
    if w.device_node == w.node:
        w.device_node = upper
    w.node = upper


cdef inline void stamp(Tree *t, uint32_t i) noexcept nogil:
    """Used now: the whole path of node i."""
    while not is_root(t, i):
        t.nodes[i].access = t.clock
        refresh_if_ordered(t, i)
        i = t.nodes[i].parent


cdef inline rkv_status finish_match(Tree *t, Walk *w, uint64_t space, int32_t *page_ids, rkv_match *out) noexcept nogil:
    if w.pages and w.inside < t.nodes[w.node].num_pages and not nodes_reserve(t, 1):
        return fail(RKV_ERR_NO_MEMORY, b"match: no memory to split a node")
    t.clock += 1
    if w.pages:
        split_ends(t, w)
        stamp(t, w.node)
        if page_ids != NULL:
            collect_ids(t, w, page_ids)
    fill_match(t, w, space, out)
    return RKV_OK


cdef inline rkv_status match(Tree *t, const rkv_key *key, int32_t *page_ids, rkv_match *out) noexcept nogil:
    cdef Walk w
    cdef uint64_t space = namespace_id(t, key)
    walk(t, &w, key, space)
    return finish_match(t, &w, space, page_ids, out)


cdef inline void peek(Tree *t, const rkv_key *key, int32_t *page_ids, rkv_match *out) noexcept nogil:
    cdef Walk w
    cdef uint64_t space = namespace_id(t, key)
    walk(t, &w, key, space)
    if page_ids != NULL and w.pages:
        collect_ids(t, &w, page_ids)
    fill_match(t, &w, space, out)


cdef inline rkv_status match_extend(Tree *t, const rkv_match *prior, const rkv_key *more, int32_t *page_ids,
                                    rkv_match *out) noexcept nogil:
    """Stand at the end of the earlier hit and walk on with the tokens that follow it."""
    cdef Walk w
    cdef uint32_t i
    cdef uint64_t hit = <uint64_t>(prior.num_tokens + prior.host_num_tokens), space = namespace_id(t, more)
    if prior.tree_id != t.id_:
        return fail(RKV_ERR_HANDLE, b"match_extend: the match is of another tree")
    if prior.namespace_id != space:
        return fail(RKV_ERR_ARGUMENT, b"match_extend: the match is of another namespace")
    w.root = find_root(t, <const uint8_t *>more.ns, more.ns_bytes, space)
    stand_at_root(&w)
    if prior.host_node != 0:
        i = index_of(t, prior.host_node)
        if i == NO_INDEX:
            return fail(RKV_ERR_HANDLE, b"match_extend: the match's last node (%#llx) has left the tree; match again",
                        <unsigned long long>prior.host_node)
        if t.nodes[i].root != w.root:
            return fail(RKV_ERR_ARGUMENT, b"match_extend: the match is of another namespace")
        if t.nodes[i].end_page * <uint64_t>t.page_size != hit:
            return fail(RKV_ERR_ARGUMENT, b"match_extend: the match ends inside a node (%llu of %llu tokens): it is a peek's",
                        <unsigned long long>hit, <unsigned long long>t.nodes[i].end_page * t.page_size)
        stand_at(t, &w, i)
        w.base = w.pages
    if w.root != NO_INDEX:
        walk_down(t, &w, more.tokens, w.pages + more.num_tokens // t.page_size)
    return finish_match(t, &w, space, page_ids, out)


# ---- the nodes of a path ---------------------------------------------------------------------------------------------

cdef enum:
    LIST_ALL
    LIST_HOST_ONLY
    LIST_DUE_FOR_HOST
    LIST_DUE_FOR_STORAGE


cdef inline bint is_listed(const Node *n, int what, uint64_t min_hits, uint32_t without_marks) noexcept nogil:
    if what == LIST_ALL:
        return True
    if what == LIST_HOST_ONLY:
        return not n.flags & DEVICE
    if n.hit_count < min_hits or marks_of(n) & without_marks:
        return False
    if what == LIST_DUE_FOR_STORAGE:
        return (n.flags & HOST) != 0
    return (n.flags & (DEVICE | HOST | LOADING | PENDING)) == DEVICE


cdef inline uint64_t list_path(const Tree *t, uint32_t i, int what, uint64_t min_hits, uint32_t without_marks, rkv_node *nodes,
                               uint64_t room) noexcept nogil:
    """Write the listed nodes of the path to node i, root side first; returns how many there are. If they have no room, nothing is of use.

    The walk goes up and so writes them in the wrong order; they are turned round in place, which mostly is no work: none are due.
    """
    cdef uint64_t found = 0, k
    cdef rkv_node other
    while not is_root(t, i):
        if is_listed(&t.nodes[i], what, min_hits, without_marks):
            if found < room:
                nodes[found] = handle_of(t, i)
            found += 1
        elif what == LIST_HOST_ONLY:
            break
        i = t.nodes[i].parent
    if found <= room:
        for k in range(found // 2):
            other = nodes[k]
            nodes[k] = nodes[found - 1 - k]
            nodes[found - 1 - k] = other
    return found


# ---- going down a path -----------------------------------------------------------------------------------------------

cdef inline uint32_t turn_path(Tree *t, uint32_t i, uint32_t above) noexcept nogil:
    """Let the parent links from node i up to below ``above`` point down instead; returns the topmost of them (NO_INDEX if i is above).

    A tree knows the way up. To visit a path from its top takes memory, a second look-up, or this: turn the links on the way up, and
    turn them back on the way down.
    """
    cdef uint32_t below = NO_INDEX, up
    while i != above:
        up = t.nodes[i].parent
        t.nodes[i].parent = below
        below = i
        i = up
    return below


cdef inline uint32_t turn_back(Tree *t, uint32_t i, uint32_t *above) noexcept nogil:
    """Restore the parent link of node i of a turned path, and step down: returns the next node, or NO_INDEX after the last."""
    cdef uint32_t next_ = t.nodes[i].parent
    t.nodes[i].parent = above[0]
    above[0] = i
    return next_


# ---- gaining and losing pages ----------------------------------------------------------------------------------------

cdef inline void gain_device(Tree *t, uint32_t i, const int32_t *ids) noexcept nogil:
    """Give a host-only (or new) node device pages that have been claimed."""
    cdef Node *n = &t.nodes[i]
    memcpy(t.store.device + n.start, ids, 4 * <size_t>n.num_pages)
    t.host_evictable -= host_evictable(n)
    n.flags |= DEVICE
    if is_protected(n):
        t.protected_ += n.num_pages
    else:
        t.evictable += n.num_pages
    emit(t, RKV_EVENT_STORED, RKV_MEDIUM_DEVICE, i)
    refresh(t, i)
    child_changed(t, n.parent, 1, 0)


cdef inline void gain_host(Tree *t, uint32_t i, const int32_t *ids) noexcept nogil:
    """Give a node host pages that have been claimed."""
    cdef Node *n = &t.nodes[i]
    memcpy(t.store.host + n.start, ids, 4 * <size_t>n.num_pages)
    touch_host(&t.store, n.start, n.num_pages)
    n.flags |= HOST
    t.host_pages += n.num_pages
    t.host_evictable += host_evictable(n)
    emit(t, RKV_EVENT_STORED, RKV_MEDIUM_HOST, i)
    refresh(t, i)
    if not is_root(t, n.parent):
        refresh(t, n.parent)


cdef inline void gain_host_path(Tree *t, uint32_t i, const int32_t *ids, uint64_t num_ids) noexcept nogil:
    """Give the last num_ids pages of the path to node i (whole nodes, claimed) host pages, ancestors first."""
    cdef uint64_t at = 0, left = num_ids
    cdef uint32_t above = i, next_
    while left > 0:
        left -= t.nodes[above].num_pages
        above = t.nodes[above].parent
    i = turn_path(t, i, above)
    while i != NO_INDEX:
        next_ = turn_back(t, i, &above)
        gain_host(t, i, ids + at)
        at += t.nodes[i].num_pages
        i = next_


cdef inline rkv_status claim_failed(int verdict, const char *what, const int32_t *ids, uint64_t n, uint64_t at) noexcept nogil:
    """Say what is wrong with ids[at]."""
    cdef uint64_t k
    if verdict == ADD_NEGATIVE:
        return fail(RKV_ERR_ARGUMENT, b"%s: page id %d, at %llu of %llu, is negative", what, ids[at], <unsigned long long>at,
                    <unsigned long long>n)
    if verdict == ADD_NO_MEMORY:
        return fail(RKV_ERR_NO_MEMORY, b"%s: no memory to record the owner of page id %d", what, ids[at])
    for k in range(n):
        if ids[k] == ids[at] and k != at:
            return fail(RKV_ERR_OWNERSHIP, b"%s: page id %d appears twice in one call, again at %llu of %llu", what, ids[at],
                        <unsigned long long>(at if at > k else k), <unsigned long long>n)
    return fail(RKV_ERR_OWNERSHIP, b"%s: page id %d, at %llu of %llu, is owned by the tree elsewhere", what, ids[at],
                <unsigned long long>at, <unsigned long long>n)


cdef inline rkv_status claim(PageSet *set_, const int32_t *ids, uint64_t n, const char *what) noexcept nogil:
    """Record the tree as owner of ids: all or none."""
    cdef uint64_t added = 0
    cdef int verdict = pageset_add(set_, ids, n, &added)
    if verdict == ADD_OK:
        return RKV_OK
    pageset_remove(set_, ids, added)
    return claim_failed(verdict, what, ids, n, added)


# ---- insert ----------------------------------------------------------------------------------------------------------

cdef struct Adding:                 # one insert on its way: what goes in, and what was found
    const rkv_key *key
    const int32_t *ids
    uint64_t pages
    uint32_t tier                   # DEVICE or HOST
    int32_t priority
    Walk walk
    uint32_t tail                   # extent of the new node's pages, or NO_UNIT
    bint new_root
    uint64_t duplicates
    uint64_t prefix_pages


cdef inline bint takes_ids(const Adding *a, const Node *n) noexcept nogil:
    """Does a node of the path adopt the caller's pages? Only a host-only node in an insert of device pages."""
    return a.tier == DEVICE and not n.flags & DEVICE


cdef inline const int32_t *ids_of(const Tree *t, const Adding *a, const Node *n) noexcept nogil:
    """The node's own ids on the tier of the insert, or NULL."""
    if not n.flags & a.tier:
        return NULL
    return (t.store.device if a.tier == DEVICE else t.store.host) + n.start


cdef inline int claim_run(PageSet *set_, const int32_t *mine, const int32_t *ids, uint64_t n, uint64_t *claimed,
                          uint64_t limit, bint undo, const int32_t **culprit) noexcept nogil:
    """Claim (or, undoing, release) ids[k] where mine is NULL or mine[k] differs; stop when ``claimed`` reaches limit."""
    cdef uint64_t k, one
    cdef int verdict
    if mine != NULL and memcmp(mine, ids, 4 * n) == 0:
        return ADD_OK
    if mine == NULL:
        if undo:
            if limit - claimed[0] < n:
                n = limit - claimed[0]
            claimed[0] += pageset_remove(set_, ids, n)
            return ADD_OK
        one = 0
        verdict = pageset_add(set_, ids, n, &one)
        claimed[0] += one
        culprit[0] = ids + one
        return verdict
    for k in range(n):
        if mine[k] == ids[k]:
            continue
        if undo:
            if claimed[0] == limit:
                break
            claimed[0] += pageset_remove(set_, ids + k, 1)
            continue
        one = 0
        verdict = pageset_add(set_, ids + k, 1, &one)
        claimed[0] += one
        if verdict != ADD_OK:
            culprit[0] = ids + k
            return verdict
    return ADD_OK


cdef inline int claim_path(Tree *t, const Adding *a, uint64_t *claimed, uint64_t limit, bint undo,
                           const int32_t **culprit) noexcept nogil:
    """Claim every id of the call that is not the tree's at its own position: first the new tail, then the path upwards.

    Ids that will be duplicates are claimed too, for as long as the call is being checked: one that is owned elsewhere, or given
    twice, must not go back to the caller as free.
    """
    cdef PageSet *set_ = &t.device_ids if a.tier == DEVICE else &t.host_ids
    cdef uint32_t i = a.walk.node, pages = a.walk.inside, end = a.walk.pages
    cdef int verdict = ADD_OK
    cdef const Node *n
    if a.walk.pages < a.pages:
        verdict = claim_run(set_, NULL, a.ids + a.walk.pages, a.pages - a.walk.pages, claimed, limit, undo, culprit)
    while verdict == ADD_OK and end > 0:
        n = &t.nodes[i]
        end -= pages
        verdict = claim_run(set_, ids_of(t, a, n), a.ids + end, pages, claimed, limit, undo, culprit)
        i = n.parent
        pages = t.nodes[i].num_pages
    return verdict


cdef inline rkv_status claim_insert(Tree *t, const Adding *a) noexcept nogil:
    cdef uint64_t claimed = 0, undone = 0, at
    cdef const int32_t *culprit = a.ids
    cdef int verdict = claim_path(t, a, &claimed, 0, False, &culprit)
    if verdict == ADD_OK:
        return RKV_OK
    at = culprit - a.ids
    claim_path(t, a, &undone, claimed, True, &culprit)
    return claim_failed(verdict, b"insert" if a.tier == DEVICE else b"insert_host", a.ids, a.pages, at)


cdef inline rkv_status reserve_insert(Tree *t, Adding *a, uint64_t space) noexcept nogil:
    """Everything that can fail for lack of memory, before anything changes."""
    cdef Walk *w = &a.walk
    cdef uint32_t more = 0
    a.tail = NO_UNIT
    a.new_root = False
    if w.pages and w.inside < t.nodes[w.node].num_pages:
        more += 1
    if w.pages < a.pages:
        more += 1
    if w.root == NO_INDEX:
        more += 1
    if not nodes_reserve(t, more):
        return fail(RKV_ERR_NO_MEMORY, b"insert: no memory for %u more nodes", more)
    if w.pages < a.pages:
        a.tail = store_alloc(&t.store, <uint32_t>(a.pages - w.pages))
        if a.tail == NO_UNIT:
            return fail(RKV_ERR_NO_MEMORY, b"insert: no memory for %llu more pages",
                        <unsigned long long>(a.pages - w.pages))
    if w.root == NO_INDEX:
        w.root = add_root(t, <const uint8_t *>a.key.ns, a.key.ns_bytes, space)
        if w.root == NO_INDEX:
            store_free(&t.store, a.tail, <uint32_t>(a.pages - w.pages))
            return fail(RKV_ERR_NO_MEMORY, b"insert: no memory for a namespace")
        w.node = w.device_node = w.root
        a.new_root = True
    return RKV_OK


cdef inline void unreserve_insert(Tree *t, const Adding *a) noexcept nogil:
    if a.tail != NO_UNIT:
        store_free(&t.store, a.tail, <uint32_t>(a.pages - a.walk.pages))
    if a.new_root:
        drop_root_if_empty(t, a.walk.root)


cdef inline void count_run(Tree *t, Adding *a, const Node *n, uint32_t end, uint32_t pages) noexcept nogil:
    """Count, and release the claim on, the duplicates at one node of the path."""
    cdef PageSet *set_ = &t.device_ids if a.tier == DEVICE else &t.host_ids
    cdef const int32_t *mine = ids_of(t, a, n)
    cdef uint32_t k
    if mine == NULL:
        a.duplicates += pageset_remove(set_, a.ids + end, pages)
    elif memcmp(mine, a.ids + end, 4 * <size_t>pages) != 0:
        for k in range(pages):
            if mine[k] != a.ids[end + k]:
                a.duplicates += pageset_remove(set_, a.ids + end + k, 1)


cdef inline void update_path(Tree *t, Adding *a) noexcept nogil:
    """Walk up: stamp, raise priorities, count hits and duplicates; host-only nodes adopt the caller's pages afterwards, from the top."""
    cdef uint32_t i = a.walk.node, end = a.walk.pages, pages
    cdef Node *n
    while end > 0:
        n = &t.nodes[i]
        pages = n.num_pages
        end -= pages
        n.access = t.clock
        if a.priority > n.priority:
            n.priority = a.priority
        if not takes_ids(a, n):
            count_run(t, a, n, end, pages)
            if a.tier == DEVICE:
                a.prefix_pages += pages
                n.hit_count += n.hit_count != <uint32_t>-1
        refresh_if_ordered(t, i)
        i = n.parent


cdef inline void adopt_path(Tree *t, const Adding *a) noexcept nogil:
    """The host-only end of the path takes the caller's pages, ancestors first: the device stays closed under parent."""
    cdef uint32_t above = a.walk.node, i, next_
    while not t.nodes[above].flags & DEVICE:
        above = t.nodes[above].parent
    i = turn_path(t, a.walk.node, above)
    while i != NO_INDEX:
        next_ = turn_back(t, i, &above)
        gain_device(t, i, a.ids + t.nodes[i].end_page - t.nodes[i].num_pages)
        i = next_


cdef inline void write_adopted(const Tree *t, const Adding *a, int32_t *host_ids) noexcept nogil:
    """Copy out the host ids of the nodes that are about to adopt, each to where its page is in the key."""
    cdef uint32_t i = a.walk.node
    cdef const Node *n = &t.nodes[i]
    while not n.flags & DEVICE:
        memcpy(host_ids + (n.end_page - n.num_pages), t.store.host + n.start, 4 * <size_t>n.num_pages)
        i = n.parent
        n = &t.nodes[i]


cdef inline void write_duplicates(const Tree *t, const Adding *a, int32_t *duplicates) noexcept nogil:
    """Copy the duplicates out in key order, from the back; the tree still shows what it held before the insert."""
    cdef uint32_t i = a.walk.node, end = a.walk.pages, pages, k
    cdef uint64_t at = a.duplicates
    cdef const Node *n
    cdef const int32_t *mine
    while end > 0 and at > 0:
        n = &t.nodes[i]
        pages = n.num_pages
        end -= pages
        mine = ids_of(t, a, n)
        if not takes_ids(a, n):
            for k in range(pages, 0, -1):
                if mine == NULL or mine[k - 1] != a.ids[end + k - 1]:
                    at -= 1
                    duplicates[at] = a.ids[end + k - 1]
        i = n.parent


cdef inline void add_tail(Tree *t, Adding *a) noexcept nogil:
    """Hang what the tree did not know below the end of the walk, as one node."""
    cdef Walk *w = &a.walk
    cdef uint32_t i = node_take(t), pages = <uint32_t>(a.pages - w.pages)
    cdef Node *n = &t.nodes[i]
    cdef const int32_t *tokens = a.key.tokens + <uint64_t>w.pages * t.page_size
    n.start = a.tail
    n.num_pages = pages
    n.root = w.root
    n.end_page = <uint32_t>a.pages
    n.priority = a.priority
    n.access = n.created = t.clock
    n.hit_count = 1 if a.tier == DEVICE else 0
    memcpy(unit_key(&t.store, n.start), tokens, 4 * <size_t>pages * t.page_size)
    n.key_hash = child_hash(t.hash_seed, w.node, tokens, t.page_size)
    link_child(t, w.node, i)
    table_insert(t, i)
    t.num_nodes += 1
    if t.events_on:
        hash_node(t, i)
    if a.tier == DEVICE:
        gain_device(t, i, a.ids + w.pages)
    else:
        gain_host(t, i, a.ids + w.pages)
    w.node = i


cdef inline rkv_status check_hint(Tree *t, const Adding *a, const rkv_match *hint, uint64_t space) noexcept nogil:
    cdef uint64_t hit = <uint64_t>(hint.num_tokens + hint.host_num_tokens)
    if hint.tree_id != t.id_:
        return fail(RKV_ERR_HANDLE, b"insert: the match is of another tree")
    if hint.namespace_id != space:
        return fail(RKV_ERR_ARGUMENT, b"insert: the match is of another namespace")
    if hit > a.pages * t.page_size:
        return fail(RKV_ERR_ARGUMENT, b"insert: the match (%llu tokens) is longer than the key (%llu)",
                    <unsigned long long>hit, <unsigned long long>(a.pages * t.page_size))
    return RKV_OK


cdef inline void walk_from_hint(Tree *t, Adding *a, const rkv_match *hint, uint64_t space) noexcept nogil:
    """Start at the hint's end if it is alive, of this namespace, and the key really begins with its path; else at the root."""
    cdef Walk *w = &a.walk
    cdef uint32_t i = index_of(t, hint.host_node) if hint != NULL else NO_INDEX
    if i != NO_INDEX and t.nodes[i].end_page <= a.pages and \
            t.nodes[i].root == find_root(t, <const uint8_t *>a.key.ns, a.key.ns_bytes, space) and \
            path_equals(t, i, a.key.tokens):
        w.root = t.nodes[i].root
        stand_at(t, w, i)
        walk_down(t, w, a.key.tokens, a.pages)
    else:
        walk(t, w, a.key, space)


cdef inline rkv_status insert(Tree *t, const rkv_key *key, const int32_t *ids, uint64_t num_ids, const rkv_match *hint,
                              int32_t priority, uint32_t tier, int32_t *duplicates, uint64_t *num_adopted,
                              rkv_insert *out) noexcept nogil:
    """1. walk   2. reserve memory   3. claim the ids   4. split   5. path: stamps, hits, duplicates   6. adopt   7. tail

    num_adopted: NULL, or how many pages behind the prefix were adopted; their host ids are written behind the duplicates, each to
    where its page is in the key (a prefix has no more duplicates than pages).

          root                     root
           |                        |
        [a b c d]   + a b x y  ->  [a b]        upper part of the split
                                   /    \\
                               [c d]    [x y]   the tail
    """
    cdef Adding a
    cdef uint64_t space = namespace_id(t, key)
    cdef rkv_status status
    a.key = key
    a.ids = ids
    a.pages = key.num_tokens // t.page_size
    a.tier = tier
    a.priority = priority
    a.duplicates = a.prefix_pages = 0
    if num_ids != a.pages:
        return fail(RKV_ERR_ARGUMENT, b"insert: %llu page ids for %llu pages (%llu tokens, page size %u)",
                    <unsigned long long>num_ids, <unsigned long long>a.pages, <unsigned long long>key.num_tokens, t.page_size)
    if hint != NULL:
        status = check_hint(t, &a, hint, space)
        if status != RKV_OK:
            return status
    if a.pages == 0:
        t.clock += 1
        out.prefix_tokens = 0
        out.node = 0
        out.num_duplicates = 0
        return RKV_OK
    walk_from_hint(t, &a, hint, space)
    status = reserve_insert(t, &a, space)
    if status != RKV_OK:
        return status
    status = claim_insert(t, &a)
    if status != RKV_OK:
        unreserve_insert(t, &a)
        return status
    t.clock += 1
    split_ends(t, &a.walk)
    update_path(t, &a)
    if tier == HOST:
        a.prefix_pages = a.walk.pages
    if a.duplicates:
        write_duplicates(t, &a, duplicates)
    if tier == DEVICE:
        if num_adopted != NULL and a.walk.pages > a.prefix_pages:
            num_adopted[0] = a.walk.pages - a.prefix_pages
            write_adopted(t, &a, duplicates)
        adopt_path(t, &a)
    if a.walk.pages < a.pages:
        add_tail(t, &a)
    out.prefix_tokens = <int64_t>a.prefix_pages * t.page_size
    out.node = handle_of(t, a.walk.node)
    out.num_duplicates = a.duplicates
    return RKV_OK
