"""insert: find out, claim, reserve, then change what cannot fail any more.

    0. under the shared lock: if the worker holds the whole chain already, as most workers do that say again what they hold, stamp it
       and be done. Else the exclusive lock from here on, and from the start
    1. the chain's shard is locked, and the part of the chain that is known there is walked
    2. the new keys are written to the arena and claimed in the directory. A claim that meets a known key finds a contradiction, or an
       orphan that the key before it joins. Only from here on can other shards be affected, so the orphans are locked if there are any
    3. memory for everything below is reserved; failure takes the claims back
    4. the known part gains the holder (splits at its two ends at most); the new part becomes nodes, or the tail of a run that only
       this worker holds; orphans that wait for a new key are moved below it
    5. neighbours that became equal are joined
"""

from .index_state cimport *
from .index_arena cimport *
from .index_directory cimport *
from .index_sets cimport *
from .index_nodes cimport *

cdef struct Insert:
    Index *index
    Shard *s
    Shard *orphans          # NULL: not needed. s itself if the chain is an orphan
    const uint64_t *keys
    const uint64_t *parent
    uint32_t n
    uint32_t worker
    uint32_t start          # where the walk starts: node and pages consumed in it
    uint32_t start_offset
    uint32_t node           # where it ends
    uint32_t offset
    uint32_t known          # keys that are known there
    uint32_t base           # arena position of keys[known]
    uint32_t slack          # pages owned behind the last key's
    bint behind             # base is right behind the run of `node`
    bint head               # the chain starts an orphan head
    bint made_head
    uint32_t copies         # arena position of the orphans to be moved
    uint32_t num_copies
    uint64_t now
    uint64_t added


cdef inline uint32_t waiting(Shard *orphans, uint64_t key) noexcept nogil:
    """An orphan head whose missing parent is key; 0: none."""
    cdef uint32_t i, id
    if orphans == NULL or orphans.waits.slots == NULL:
        return 0
    i = <uint32_t>(mix(key) >> 8) & orphans.waits.mask
    while True:
        id = orphans.waits.slots[i]
        if id == 0 or orphans.nodes[id].word == key:
            return id
        i = (i + 1) & orphans.waits.mask


cdef inline uint32_t preorder(Shard *s, uint32_t id, uint32_t top) noexcept nogil:
    """The node after id in the subtree of top; 0 at its end."""
    if s.nodes[id].first_child:
        return s.nodes[id].first_child
    while id != top:
        if s.nodes[id].next_sibling:
            return s.nodes[id].next_sibling
        id = s.nodes[id].parent
    return 0


cdef inline void want_set(Shard *s, uint64_t size) noexcept nogil:
    s.want_sets += 1
    s.want_members += <uint64_t>1 << room_log2(size)


cdef inline void walk(Insert *op) noexcept nogil:
    """Step 1: as far as the chain is known; counts the holder sets that may be needed."""
    cdef Shard *s = op.s
    cdef uint32_t x = op.start, k = op.start_offset, i = 0, c, last = 0
    while i < op.n:
        if k == s.nodes[x].num_pages:
            c = child_at(s, x, op.keys[i])
            if c == 0 or (op.head and x == 0 and s.nodes[c].word != op.parent[0]):
                break
            x = c
            k = 0
        c = common(s.nodes[x].keys + k, op.keys + i, minimum(s.nodes[x].num_pages - k, op.n - i))
        if c == 0:
            break
        if (last == 0 or s.nodes[x].set != last) and not holds(s, s.nodes[x].set, op.worker):
            want_set(s, <uint64_t>s.sets[s.nodes[x].set].size + 1)
        last = s.nodes[x].set
        k += c
        i += c
    op.node = x
    op.offset = k
    op.known = i


cdef inline bint grows(Insert *op) noexcept nogil:
    """Whether the new keys may be appended to the run that the known part ends with: a leaf of this worker alone."""
    cdef Node *x = &op.s.nodes[op.node]
    return (op.node != 0 and op.offset == x.num_pages and x.first_child == 0 and op.s.sets[x.set].size == 1
            and holds(op.s, x.set, op.worker))


cdef inline bint place_new(Insert *op) noexcept nogil:
    """Step 2a: arena pages for the new keys, behind the run that grows if possible; with slack in proportion if it has to begin anew."""
    cdef Shard *s = op.s
    cdef Node *x = &s.nodes[op.node]
    cdef uint32_t pages = op.n - op.known, room, slack = 0
    op.behind = False
    op.slack = 0
    if grows(op):
        slack = minimum(MAX_SLACK, 2 * x.num_pages + 6)
        room = x.capacity - x.num_pages
        if room < pages:
            room += take_behind(s, x.pos + x.capacity, pages - room + slack)
        if room < pages:
            room += take_behind(s, x.pos + x.capacity, pages - room)
        if room >= pages:
            own(s, x.pos + x.num_pages, room, op.node)
            x.capacity = x.num_pages + room
            op.behind = True
            op.base = x.pos + x.num_pages
            op.slack = room - pages
    if not op.behind:
        op.base = take_pages(op.index, s, pages + slack)
        op.slack = slack
        if op.base == NO_PAGES and slack:
            op.base = take_pages(op.index, s, pages)
            op.slack = 0
        if op.base == NO_PAGES:
            return False
    memcpy(keys_at(s, op.base), op.keys + op.known, <size_t>pages * 8)
    own(s, op.base, pages, 0)
    return True


cdef inline void unplace(Insert *op) noexcept nogil:
    """Take back step 2."""
    cdef uint32_t pages = op.n - op.known, i
    cdef uint32_t *owners = owners_at(op.s, op.base)
    for i in range(pages):
        if owners[i] == CLAIMED:
            forget(op.index, op.keys[op.known + i])
    if op.behind:
        own(op.s, op.base, pages, op.node)
    else:
        free_pages(op.s, op.base, pages + op.slack)


cdef inline bint follows(Insert *op, uint32_t place, uint32_t j) noexcept nogil:
    """Whether the known orphan keys[j] (at place) is the child of keys[j - 1], where keys[j - 1] is new or such an orphan, too."""
    cdef Shard *s = op.orphans
    cdef uint32_t id = owners_at(s, place & POS_MASK)[0], offset
    cdef Node *x
    if id == CLAIMED or j == op.known:
        return False
    x = &s.nodes[id]
    offset = (place & POS_MASK) - x.pos
    if offset:
        return x.keys[offset - 1] == op.keys[j - 1]
    if x.parent:
        x = &s.nodes[x.parent]
        return x.keys[x.num_pages - 1] == op.keys[j - 1]
    return x.word == op.keys[j - 1]


cdef inline rkv_status contradiction(Insert *op, uint64_t key) noexcept nogil:
    return rkv_leaf_fail(
        RKV_ERR_ARGUMENT, "page key 0x%016llx is known under another parent, or is its own ancestor; nothing was inserted",
        <unsigned long long>key)


cdef inline rkv_status claim_new(Insert *op) noexcept nogil:
    """Step 2b: enter all new keys; unplace() takes back what was entered if it fails."""
    cdef uint32_t j, known = NOWHERE, top, shard_bits = op.s.id << POS_BITS
    cdef uint32_t *owners = owners_at(op.s, op.base)
    cdef uint64_t missing = 0
    cdef rkv_status status
    for j in range(op.known, op.n):
        prefetch_ahead(op.index, op.keys + op.known, j - op.known, op.n - op.known)
        while True:
            status = claim(op.index, op.keys[j], shard_bits | (op.base + (j - op.known)), &known)
            if status != RKV_OK:
                return rkv_leaf_fail(status, "no memory for the directory of %u pages", op.n)
            if known == NOWHERE or known >> POS_BITS != ORPHANS or op.orphans != NULL:
                break
            op.orphans = &op.index.shards[ORPHANS]      # it may be gone by the time it is locked: claim again
            rkv_lock_exclusive(&op.orphans.lock)
        if known == NOWHERE:
            owners[j - op.known] = CLAIMED
        elif known >> POS_BITS != ORPHANS or not follows(op, known, j):
            return contradiction(op, op.keys[j])
    if op.orphans == NULL and rkv_load(&op.index.orphan_heads):
        op.orphans = &op.index.shards[ORPHANS]
        rkv_lock_exclusive(&op.orphans.lock)
    if op.orphans == op.s:              # an orphan chain may not run into the parent that it waits for
        top = op.node
        while top and op.s.nodes[top].parent:
            top = op.s.nodes[top].parent
        missing = op.s.nodes[top].word if top else op.parent[0]
        for j in range(op.known, op.n):
            if op.keys[j] == missing:
                return contradiction(op, missing)
    return RKV_OK


cdef inline bint reserve_insert(Insert *op) noexcept nogil:
    """Step 3."""
    cdef Shard *s = op.s
    cdef Shard *o = op.orphans
    cdef uint64_t others = 0, pages = 0, members
    cdef uint32_t j, i, id, at
    s.want_nodes += 4
    want_set(s, 1)
    op.num_copies = 0
    if o != NULL and o.waits.slots != NULL and op.known < op.n:
        for j in range(op.known, op.n):
            i = <uint32_t>(mix(op.keys[j]) >> 8) & o.waits.mask
            while o.waits.slots[i]:
                at = o.waits.slots[i]
                if o.nodes[at].word == op.keys[j]:
                    s.want_nodes += 4
                    id = at
                    while id:
                        members = o.sets[o.nodes[id].set].size
                        want_set(s, members)
                        want_set(s, members + 1)
                        if o != s:
                            s.want_nodes += 1
                            others += members
                            pages += o.nodes[id].num_pages
                        id = preorder(o, id, at)
                i = (i + 1) & o.waits.mask
    if not (reserve_nodes(op.index, s, s.want_nodes) and reserve_sets(op.index, s, s.want_sets, s.want_members)
            and reserve_worker(op.index, s, op.worker, others)):
        return False
    if op.head and not table_reserve(op.index, s, WAITS, 1):
        return False
    if pages > POS_MASK:
        return False
    if pages:
        op.copies = take_pages(op.index, s, <uint32_t>pages)
        if op.copies == NO_PAGES:
            return False
        op.num_copies = <uint32_t>pages
    return True


cdef inline void move_orphans(Insert *op, uint32_t head, uint32_t parent) noexcept nogil:
    """Copy the subtree of an orphan head below `parent` of the chain's shard, point the directory there, and drop the original. The
    copy of an orphan node is noted in its word, which is of no use for orphans but for the head's."""
    cdef Shard *s = op.s
    cdef Shard *o = op.orphans
    cdef Index *index = op.index
    cdef uint32_t id = head, copy, i, up
    cdef uint64_t missing = o.nodes[head].word
    cdef Node *x
    cdef bint top
    table_take(o, WAITS, head)
    while id:
        x = &o.nodes[id]
        memcpy(keys_at(s, op.copies), x.keys, <size_t>x.num_pages * 8)
        copy = new_node(index, s, op.copies, x.num_pages, x.num_pages)
        for i in range(x.num_pages):
            move_place(index, x.keys[i], s.id << POS_BITS | (op.copies + i))
        op.copies += x.num_pages
        op.num_copies -= x.num_pages
        s.pages += x.num_pages
        o.pages -= x.num_pages
        s.nodes[copy].stamp = x.stamp
        table_put(s, HEADS, copy)
        link_child(s, parent if id == head else <uint32_t>o.nodes[x.parent].word, copy)
        join_set(s, copy, copy_set(index, s, o, x.set))
        x.word = copy
        if x.first_child == 0:
            heap_put(index, s, copy)
        id = preorder(o, id, head)
    o.nodes[head].word = missing
    table_put(o, WAITS, head)
    id = head
    while True:
        while o.nodes[id].first_child:
            id = o.nodes[id].first_child
        up = o.nodes[id].parent
        top = id == head
        drop_node(index, o, id)
        if top:
            break
        id = up


cdef inline void adopt(Insert *op, uint64_t key, uint32_t parent) noexcept nogil:
    """The key, at the end of node `parent`, is known now: all orphans that wait for it join."""
    cdef uint32_t head
    cdef Shard *s = op.s
    while True:
        head = waiting(op.orphans, key)
        if head == 0:
            return
        if op.orphans != s:
            move_orphans(op, head, parent)
        else:
            table_take(s, WAITS, head)
            s.nodes[head].word = 0
            unlink_child(s, head)
            link_child(s, parent, head)
            rkv_add(&op.index.orphan_heads, ~<uint64_t>0)


cdef inline void relabel(Shard *s, uint32_t id, uint32_t worker, bint add) noexcept nogil:
    cdef uint32_t set = changed_set(s, s.nodes[id].set, worker, add)
    leave_set(s, id)
    join_set(s, id, set)


cdef inline void join_upwards(Shard *s, uint32_t id, uint32_t steps) noexcept nogil:
    """Step 5: the node with its only child, then ancestors with theirs, `steps` of them."""
    cdef uint32_t child = s.nodes[id].first_child, i
    if id == 0:
        return
    if join(s, id):
        id = child
    for i in range(steps):
        child = s.nodes[id].parent
        if child == 0:
            return
        if not join(s, child):
            id = child


cdef inline uint32_t add_run(Insert *op, uint32_t x, uint32_t idx) noexcept nogil:
    """Step 4b: keys[idx..], which are new, become the tail of x or a node below it, up to the first that an orphan waits for or that
    is an orphan itself. Returns the node that ends with them."""
    cdef Shard *s = op.s
    cdef uint32_t pos = op.base + (idx - op.known), length = 1, id
    cdef uint32_t *owners = owners_at(s, pos)
    cdef bint last
    while idx + length < op.n and owners[length] == CLAIMED and not waiting(op.orphans, op.keys[idx + length - 1]):
        length += 1
    last = idx + length == op.n
    if op.behind and x == op.node and idx == op.known:
        id = x
        s.nodes[x].num_pages += length
        s.entries += length
        own(s, pos, length, x)
        if not last:
            s.nodes[x].capacity = s.nodes[x].num_pages
    else:
        id = new_node(op.index, s, pos, length, length + op.slack if last else length)
        table_put(s, HEADS, id)
        link_child(s, x, id)
        join_set(s, id, changed_set(s, 0, op.worker, True))
        if op.head and x == 0:
            s.nodes[id].word = op.parent[0]
            table_put(s, WAITS, id)
            op.made_head = True
    if last:
        op.slack = 0
    s.pages += length
    rkv_add(&op.index.pages, length)
    op.added += length
    rkv_store(&s.nodes[id].stamp, op.now)
    return id


cdef inline void free_holes(Insert *op) noexcept nogil:
    """Arena pages that the new keys did not need: orphans in the middle of the chain had theirs."""
    cdef uint32_t i = 0, length, pages = op.n - op.known, pos
    while i < pages:
        pos = op.base + i
        length = 0
        while i + length < pages and owners_at(op.s, pos + length)[0] == 0:
            length += 1
        if length:
            free_pages(op.s, pos, length)
        i += length + 1
    if op.slack:
        free_pages(op.s, op.base + pages, op.slack)


cdef inline void apply_insert(Insert *op) noexcept nogil:
    """Steps 4 and 5."""
    cdef Shard *s = op.s
    cdef uint32_t x = op.start, k = op.start_offset, idx = 0, c, touched = 1
    register_worker(op.index, s, op.worker)
    while True:
        while idx < op.n:                                               # 4a. known: gains the holder
            if k == s.nodes[x].num_pages:
                c = child_at(s, x, op.keys[idx])
                if c == 0 or (op.head and x == 0 and s.nodes[c].word != op.parent[0]):
                    break
                x = c
                k = 0
            c = common(s.nodes[x].keys + k, op.keys + idx, minimum(s.nodes[x].num_pages - k, op.n - idx))
            if c == 0:
                break
            if not holds(s, s.nodes[x].set, op.worker):
                if k:
                    split(op.index, s, x, k)
                    k = 0
                if c < s.nodes[x].num_pages:
                    x = split(op.index, s, x, c)
                relabel(s, x, op.worker, True)
                op.added += c
            k += c
            idx += c
            touched += 1
            rkv_store(&s.nodes[x].stamp, op.now)
        if idx == op.n:
            break
        if x and k < s.nodes[x].num_pages:
            x = split(op.index, s, x, k)
        c = idx
        x = add_run(op, x, idx)                                         # 4b. new
        k = s.nodes[x].num_pages
        while idx < op.n and owners_at(s, op.base + (idx - op.known))[0] == x:
            idx += 1
        touched += 1
        adopt(op, op.keys[idx - 1], x)                                  # 4c. and who waited for it
    if op.known < op.n:
        free_holes(op)
        if s.nodes[x].first_child == 0:
            heap_put(op.index, s, x)
    if x:
        join_upwards(s, x, touched)


cdef inline rkv_status insert_locked(Insert *op) noexcept nogil:
    cdef Shard *s = op.s
    cdef rkv_status status
    s.want_nodes = 0
    s.want_sets = 0
    s.want_members = 0
    op.known = 0
    op.node = 0
    op.offset = 0
    if s.nodes != NULL:
        walk(op)
    elif not (reserve_nodes(op.index, s, 1) and reserve_sets(op.index, s, 1, 1)):
        return rkv_leaf_fail(RKV_ERR_NO_MEMORY, "no memory for the first chain of a shard")
    if op.known < op.n:
        if not place_new(op):
            return rkv_leaf_fail(RKV_ERR_NO_MEMORY, "no memory for %u page keys", op.n - op.known)
        status = claim_new(op)
        if status != RKV_OK:
            unplace(op)
            return status
    if not reserve_insert(op):
        if op.known < op.n:
            unplace(op)
        return rkv_leaf_fail(RKV_ERR_NO_MEMORY, "no memory for the nodes and holders of %u pages", op.n)
    apply_insert(op)
    return RKV_OK


cdef inline bint stands(
    Shard *s, uint32_t worker, const uint64_t *keys, uint32_t n, uint32_t x, uint32_t k, uint64_t now
) noexcept nogil:
    """Whether the worker holds keys[0..n), a chain that starts behind k pages of node x (0, 0: at a root). now: stamp it; 0: don't."""
    cdef uint32_t i = 0, c, last = NOWHERE
    while i < n:
        if k == s.nodes[x].num_pages:
            x = child_at(s, x, keys[i])
            if x == 0:
                return False
            k = 0
        c = common(s.nodes[x].keys + k, keys + i, minimum(s.nodes[x].num_pages - k, n - i))
        if c == 0 or s.nodes[x].set != last and not holds(s, s.nodes[x].set, worker):
            return False
        last = s.nodes[x].set
        k += c
        i += c
        if now:
            rkv_store(&s.nodes[x].stamp, now)
    return True


cdef inline bint nothing_new(Index *index, uint32_t worker, const uint64_t *keys, uint32_t n, const uint64_t *parent) noexcept nogil:
    """Step 0. False: the exclusive lock must find out."""
    cdef uint32_t place = 0, x = 0, k = 0
    cdef Shard *s
    cdef bint held
    if n == 0:
        return False
    if parent == NULL:
        s = shard_of(index, keys[0])
    else:
        place = place_of(index, parent[0])
        if place == NOWHERE:
            return False
        s = &index.shards[place >> POS_BITS]
    rkv_lock_shared(&s.lock)
    held = s.nodes != NULL
    if held and parent != NULL:         # it may have moved before the lock was there
        place = place_of(index, parent[0])
        held = place != NOWHERE and place >> POS_BITS == s.id
        if held:
            x = owners_at(s, place & POS_MASK)[0]
            k = (place & POS_MASK) - s.nodes[x].pos + 1
    held = held and stands(s, worker, keys, n, x, k, 0)
    if held and index.max_pages:
        stands(s, worker, keys, n, x, k, rkv_add(&index.clock, 1))
    rkv_unlock(&s.lock)
    return held


cdef inline rkv_status insert_once(
    Index *index, uint32_t worker, const uint64_t *keys, uint32_t n, const uint64_t *parent, uint64_t *added, bint *head
) noexcept nogil:
    """*head: the parent was unknown."""
    cdef Insert op
    cdef uint32_t place, again
    cdef rkv_status status = RKV_OK
    memset(&op, 0, sizeof(op))
    op.index = index
    op.keys = keys
    op.parent = parent
    op.n = n
    op.worker = worker
    added[0] = 0
    while True:
        place = place_of(index, parent[0]) if parent != NULL else NOWHERE
        if parent == NULL:
            op.s = shard_of(index, keys[0]) if n else &index.shards[worker % ORPHANS]
        else:
            op.s = &index.shards[place >> POS_BITS if place != NOWHERE else ORPHANS]
        rkv_lock_exclusive(&op.s.lock)
        if parent == NULL or n == 0:
            break
        # The parent must still be where it was. If it was unknown: announce that a chain waits for it, THEN look again. Whoever
        # enters the parent looks for announcements after it did, so one of the two sees the other.
        op.head = place == NOWHERE
        if op.head:
            rkv_add(&index.orphan_heads, 1)
        again = place_of(index, parent[0])
        if (again == NOWHERE) == op.head and (op.head or again >> POS_BITS == op.s.id):
            place = again
            break
        if op.head:
            rkv_add(&index.orphan_heads, ~<uint64_t>0)
        rkv_unlock(&op.s.lock)
    if n == 0:
        if reserve_worker(index, op.s, worker, 0):
            register_worker(index, op.s, worker)
        else:
            status = rkv_leaf_fail(RKV_ERR_NO_MEMORY, "no memory to register worker %u", worker)
        rkv_unlock(&op.s.lock)
        return status
    if op.s.id == ORPHANS:
        op.orphans = op.s
    if place != NOWHERE:
        op.start = owners_at(op.s, place & POS_MASK)[0]
        op.start_offset = (place & POS_MASK) - op.s.nodes[op.start].pos + 1
    if index.max_pages:
        op.now = rkv_add(&index.clock, 1)
    status = insert_locked(&op)
    if op.head and not op.made_head:
        rkv_add(&index.orphan_heads, ~<uint64_t>0)
    if op.orphans != NULL and op.orphans != op.s:
        rkv_unlock(&op.orphans.lock)
    rkv_unlock(&op.s.lock)
    added[0] = op.added
    head[0] = op.head
    return status


cdef inline rkv_status index_insert(
    Index *index, uint32_t worker, const uint64_t *keys, uint32_t n, const uint64_t *parent, uint64_t *added
) noexcept nogil:
    """Again if the parent was unknown, but the keys were not: then another worker has just entered both, the parent first."""
    cdef bint head = False
    cdef rkv_status status
    added[0] = 0
    if nothing_new(index, worker, keys, n, parent):
        return RKV_OK
    status = insert_once(index, worker, keys, n, parent, added, &head)
    while status == RKV_ERR_ARGUMENT and head and place_of(index, parent[0]) != NOWHERE:
        head = False
        status = insert_once(index, worker, keys, n, parent, added, &head)
    return status
