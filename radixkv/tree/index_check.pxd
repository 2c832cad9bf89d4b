"""Statistics, snapshots, and check_integrity: every invariant from scratch."""

from libc.stdio cimport snprintf

from .index_state cimport *
from .index_arena cimport *
from .index_directory cimport *
from .index_sets cimport *
from .index_nodes cimport *
from .index_insert cimport preorder, waiting

cdef struct Found:      # what a walk over all shards adds up
    uint64_t pages
    uint64_t entries


cdef inline uint64_t shard_bytes(Shard *s) noexcept nogil:
    """Memory in use: what the arrays' ends and the last chunk have never touched is not there yet."""
    cdef uint64_t total = 0
    cdef uint32_t k
    for k in range(NUM_CHUNKS):
        total += <uint64_t>s.touched[k] * 12
    total += <uint64_t>s.num_nodes * sizeof(Node) + <uint64_t>s.heap_size * sizeof(HeapEntry)
    total += <uint64_t>s.num_sets * sizeof(HolderSet) + <uint64_t>s.num_members * sizeof(Member)
    if s.heads.slots != NULL:
        total += (<uint64_t>s.heads.mask + 1) * 4
    if s.waits.slots != NULL:
        total += (<uint64_t>s.waits.mask + 1) * 4
    if s.by_members.slots != NULL:
        total += (<uint64_t>s.by_members.mask + 1) * 4
    if s.workers != NULL:
        total += (<uint64_t>s.worker_mask + 1) * sizeof(Worker)
    return total


cdef inline const char *check_nodes(Index *index, Shard *s, Found *found) noexcept nogil:
    """The forest: links both ways, runs, owners, heads, sets, directory; no leaf that nobody holds."""
    cdef uint32_t id = 0, child, prev, i, place, live = 0, heads = 0
    cdef uint64_t pages = 0, entries = 0
    cdef Node *x
    if s.nodes == NULL:
        return NULL
    while True:
        x = &s.nodes[id]
        prev = 0
        child = x.first_child
        while child:
            if child >= s.num_nodes or s.nodes[child].parent != id or s.nodes[child].prev_sibling != prev:
                return "a node's child does not point back to it"
            prev = child
            child = s.nodes[child].next_sibling
        if id:
            live += 1
            if x.num_pages == 0 or x.capacity < x.num_pages or x.keys != keys_at(s, x.pos):
                return "a node's run is not where it should be"
            if x.set >= s.num_sets or (x.set and s.sets[x.set].size == 0):
                return "a node's holder set is freed"
            if x.set == 0 and x.first_child == 0:
                return "a leaf that nobody holds"
            for i in range(x.capacity):
                if owners_at(s, x.pos)[i] != id:
                    return "an arena page of a node has another owner"
            for i in range(x.num_pages):
                place = place_of(index, x.keys[i])
                if place != (s.id << POS_BITS | (x.pos + i)):
                    return "the directory does not lead to a page"
            if s.heads.slots == NULL or child_at(s, x.parent, x.keys[0]) != id:
                return "a node is not among the heads"
            if s.id == ORPHANS and x.parent == 0:
                heads += 1
                if waiting(s, x.word) == 0 or s.waits.slots[table_slot(s, WAITS, id)] != id:
                    return "an orphan head does not wait"
                if place_of(index, x.word) != NOWHERE:
                    return "an orphan waits for a page that is known"
            if index.max_pages and x.first_child == 0 and not x.in_heap:
                return "a leaf is not in the heap"
            pages += x.num_pages
            entries += <uint64_t>x.num_pages * s.sets[x.set].size
        id = preorder(s, id, 0)
        if id == 0:
            break
    if live != s.live_nodes or s.heads.slots != NULL and s.heads.used != live:
        return "the number of nodes is wrong"
    if s.id == ORPHANS and (rkv_load(&index.orphan_heads) != heads or s.waits.slots != NULL and s.waits.used != heads):
        return "the number of orphan heads is wrong"
    if pages != s.pages or entries != s.entries:
        return "a shard's pages or entries are counted wrong"
    found.pages += pages
    found.entries += entries
    return NULL


cdef inline const char *check_sets(Shard *s) noexcept nogil:
    cdef uint32_t set, i, id, prev, nodes, at
    cdef uint64_t h, members = 0, linked = 0, sets = 0
    cdef Member *m
    if s.sets == NULL:
        return NULL
    for set in range(1, s.num_sets):
        if s.sets[set].size == 0:
            continue
        sets += 1
        m = members_of(s, set)
        h = 0
        for i in range(s.sets[set].size):
            members += 1
            h ^= mix(m[i].worker + <uint64_t>1)
            if m[i].set != set or (i and m[i - 1].worker >= m[i].worker):
                return "a holder set is out of order"
            if worker_of(s, m[i].worker) == NULL:
                return "a holder is not registered"
        if h != s.sets[set].hash or s.by_members.slots[table_slot(s, SETS, set)] != set:
            return "a holder set is not interned"
        nodes = 0
        prev = 0
        id = s.sets[set].first_node
        while id:
            nodes += 1
            if s.nodes[id].set != set or s.nodes[id].prev_in_set != prev or nodes > s.live_nodes:
                return "a holder set's list of nodes is broken"
            prev = id
            id = s.nodes[id].next_in_set
        if nodes == 0 or nodes != s.sets[set].num_nodes:
            return "a holder set counts its nodes wrong"
    if s.workers != NULL:
        for i in range(s.worker_mask + 1):
            if s.workers[i].id_plus_1:
                at = s.workers[i].first
                prev = 0
                while at:
                    linked += 1
                    if s.members[at].worker + 1 != s.workers[i].id_plus_1 or s.members[at].prev != prev or linked > members:
                        return "a worker's list of sets is broken"
                    prev = at
                    at = s.members[at].next
    if linked != members:
        return "a holder set is missing in a worker's list"
    if s.by_members.slots != NULL and s.by_members.used != sets:
        return "the number of holder sets is wrong"
    return NULL


cdef inline const char *check_arena(Shard *s) noexcept nogil:
    """Every page is free or some node's, and free neighbours are joined."""
    cdef uint32_t k, at, n, c, id, extents = 0, listed = 0
    cdef uint64_t used = 0, owned = 0
    cdef bint was_free
    for k in range(NUM_CHUNKS):
        if s.chunk_keys[k] == NULL:
            continue
        at = 0
        was_free = False
        while at < chunk_pages(k):
            n = s.chunk_owners[k][at]
            if n & FREE:
                n &= ~<uint32_t>FREE
                if was_free or n == 0 or at + n > chunk_pages(k) or s.chunk_owners[k][at + n - 1] != FREE | n:
                    return "free arena pages are not joined"
                was_free = True
                extents += 1
                at += n
            else:
                if n == 0 or n >= s.num_nodes or s.nodes[n].num_pages == 0:
                    return "an arena page is nobody's"
                was_free = False
                used += 1
                at += 1
    for c in range(NUM_CLASSES):
        if (s.extents[c] != 0) != (s.classes >> c & 1):
            return "a class of free extents is not marked"
        at = s.extents[c]
        while at:
            listed += 1
            if listed > extents or <uint32_t>rkv_log2(owners_at(s, at - 1)[0] & ~<uint32_t>FREE) != c:
                return "a list of free extents is broken"
            at = <uint32_t>keys_at(s, at - 1)[0]
    for id in range(1, s.num_nodes):
        if s.nodes[id].num_pages:
            owned += s.nodes[id].capacity
    if owned != used or listed != extents:
        return "arena pages are lost"
    return NULL


cdef inline const char *check_registry(Index *index) noexcept nogil:
    """Each worker's count is the number of shards that know it. All shards are locked."""
    cdef uint32_t b, i, j, known
    cdef uint64_t total = 0, counted = 0, workers = 0
    for j in range(NUM_SHARDS):
        total += index.shards[j].num_workers
    for b in range(NUM_BLOCKS):
        for i in range(BLOCK_IDS if index.blocks[b] != NULL else 0):
            if index.blocks[b][i]:
                known = 0
                for j in range(NUM_SHARDS):
                    known += worker_of(&index.shards[j], b * BLOCK_IDS + i) != NULL
                if known != index.blocks[b][i]:
                    return "the registry counts a worker's shards wrong"
                counted += known
                workers += 1
    if counted != total or workers != rkv_load(&index.num_workers):
        return "the registry lacks a worker, or counts them wrong"
    return NULL


cdef inline const char *check_all(Index *index) noexcept nogil:
    cdef Found found
    cdef const char *broken
    cdef uint32_t i, j
    cdef uint64_t live = 0, used
    found.pages = 0
    found.entries = 0
    for i in range(NUM_SHARDS):
        broken = check_nodes(index, &index.shards[i], &found)
        if broken == NULL:
            broken = check_sets(&index.shards[i])
        if broken == NULL:
            broken = check_arena(&index.shards[i])
        if broken != NULL:
            return broken
    for i in range(NUM_PARTS):
        used = 0
        for j in range(index.parts[i].capacity):
            used += index.parts[i].tags[j] != 0
        if used != index.parts[i].used:
            return "a part of the directory is counted wrong"
        live += index.parts[i].live
    broken = check_registry(index)
    if broken != NULL:
        return broken
    if live != found.pages:
        return "the directory has a page that no node has"
    if found.pages != rkv_load(&index.pages):
        return "the number of pages is wrong"
    return NULL


cdef inline void dump_shard(
    Shard *s, rkv_index_page *pages, size_t max_pages, uint32_t *holders, size_t max_holders, size_t *num_pages,
    size_t *num_holders
) noexcept nogil:
    cdef uint32_t id, i, j, size
    cdef Node *x
    cdef Node *p
    cdef rkv_index_page *out
    if s.nodes == NULL:
        return
    id = preorder(s, 0, 0)
    while id:
        x = &s.nodes[id]
        size = s.sets[x.set].size
        for i in range(x.num_pages):
            if num_pages[0] < max_pages:
                out = &pages[num_pages[0]]
                out.key = x.keys[i]
                out.orphan = s.id == ORPHANS
                out.has_parent = i > 0 or x.parent != 0 or s.id == ORPHANS
                out.parent_key = 0
                p = &s.nodes[x.parent]
                if i:
                    out.parent_key = x.keys[i - 1]
                elif x.parent:
                    out.parent_key = p.keys[p.num_pages - 1]
                elif s.id == ORPHANS:
                    out.parent_key = x.word
                out.first_holder = num_holders[0]
                out.num_holders = size
            num_pages[0] += 1
            for j in range(size):
                if num_holders[0] < max_holders:
                    holders[num_holders[0]] = members_of(s, x.set)[j].worker
                num_holders[0] += 1
        id = preorder(s, id, 0)
