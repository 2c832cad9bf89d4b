"""Hash tables over ids, interned holder sets, and who is in which.

A set is an ascending run of members. Equal sets are one set, so a node's holders are one 32-bit id, two nodes with the same holders
compare in one instruction, and removing a worker touches its sets and their nodes, not the index.
"""

from .index_state cimport *

cdef enum Kind:
    HEADS
    WAITS
    SETS


cdef inline Table *table_of(Shard *s, Kind kind) noexcept nogil:
    return &s.heads if kind == HEADS else (&s.waits if kind == WAITS else &s.by_members)


cdef inline uint64_t hash_of(Shard *s, Kind kind, uint32_t id) noexcept nogil:
    return mix(s.nodes[id].keys[0] if kind == HEADS else (s.nodes[id].word if kind == WAITS else s.sets[id].hash)) >> 8


cdef inline void table_put(Shard *s, Kind kind, uint32_t id) noexcept nogil:
    cdef Table *t = table_of(s, kind)
    cdef uint32_t i = <uint32_t>hash_of(s, kind, id) & t.mask
    while t.slots[i]:
        i = (i + 1) & t.mask
    t.slots[i] = id
    t.used += 1


cdef inline uint32_t table_slot(Shard *s, Kind kind, uint32_t id) noexcept nogil:
    cdef Table *t = table_of(s, kind)
    cdef uint32_t i = <uint32_t>hash_of(s, kind, id) & t.mask
    while t.slots[i] != id:
        i = (i + 1) & t.mask
    return i


cdef inline void table_take(Shard *s, Kind kind, uint32_t id) noexcept nogil:
    """Remove an id that is there, and shift back what probed past it."""
    cdef Table *t = table_of(s, kind)
    cdef uint32_t hole = table_slot(s, kind, id), i = hole, home
    while True:
        i = (i + 1) & t.mask
        if t.slots[i] == 0:
            break
        home = <uint32_t>hash_of(s, kind, t.slots[i]) & t.mask
        if ((i - home) & t.mask) >= ((i - hole) & t.mask):
            t.slots[hole] = t.slots[i]
            hole = i
    t.slots[hole] = 0
    t.used -= 1


cdef inline bint table_reserve(Index *index, Shard *s, Kind kind, uint64_t more) noexcept nogil:
    """Room for `more` ids at a load of 2/3."""
    cdef Table *t = table_of(s, kind)
    cdef Table old = t[0]
    cdef uint64_t size = <uint64_t>t.mask + 1 if t.slots != NULL else 0, wanted = size or 16
    cdef uint32_t *slots
    cdef uint64_t i
    while (t.used + more) * 3 >= wanted * 2:
        wanted *= 2
    if wanted == size:
        return True
    slots = <uint32_t *>resize(index, NULL, 0, wanted * 4)
    if slots == NULL:
        return False
    memset(slots, 0, wanted * 4)
    t.slots = slots
    t.mask = <uint32_t>(wanted - 1)
    t.used = 0
    for i in range(size):
        if old.slots[i]:
            table_put(s, kind, old.slots[i])
    if size:
        resize(index, old.slots, size * 4, 0)
    return True


# ------------------------------------------------------------------------------------------------------------ workers

cdef inline Worker *worker_of(Shard *s, uint32_t id) noexcept nogil:
    """NULL if the id is not registered in this shard."""
    cdef uint32_t i
    if s.workers == NULL:
        return NULL
    i = <uint32_t>mix(id) & s.worker_mask
    while s.workers[i].id_plus_1:
        if s.workers[i].id_plus_1 == id + 1:
            return &s.workers[i]
        i = (i + 1) & s.worker_mask
    return NULL


cdef inline void count_worker(Index *index, uint32_t id, int shards) noexcept nogil:
    """One shard more (1) or less (-1) knows the worker. Its block is reserved."""
    cdef uint8_t *count
    rkv_mutex_lock(&index.registering)
    count = index.blocks[id // BLOCK_IDS] + id % BLOCK_IDS
    rkv_add(&index.num_workers, -<uint64_t>(count[0] == 1) if shards < 0 else count[0] == 0)
    count[0] += shards
    rkv_mutex_unlock(&index.registering)


cdef inline size_t list_workers(Index *index, uint32_t *ids, size_t max_ids) noexcept nogil:
    """The registered ids, ascending, as many as fit. Returns how many there are."""
    cdef uint32_t b, i
    cdef size_t total = 0
    rkv_mutex_lock(&index.registering)
    for b in range(NUM_BLOCKS):
        for i in range(BLOCK_IDS if index.blocks[b] != NULL else 0):
            if index.blocks[b][i]:
                if total < max_ids:
                    ids[total] = b * BLOCK_IDS + i
                total += 1
    rkv_mutex_unlock(&index.registering)
    return total


cdef inline void register_worker(Index *index, Shard *s, uint32_t id) noexcept nogil:
    """Reserved before."""
    cdef uint32_t i
    if worker_of(s, id) == NULL:
        i = <uint32_t>mix(id) & s.worker_mask
        while s.workers[i].id_plus_1:
            i = (i + 1) & s.worker_mask
        s.workers[i].id_plus_1 = id + 1
        s.workers[i].first = 0
        s.num_workers += 1
        count_worker(index, id, 1)


cdef inline void forget_worker(Index *index, Shard *s, Worker *worker) noexcept nogil:
    """Take a worker that holds nothing out of the table; shift back what probed past it."""
    cdef uint32_t hole = <uint32_t>(worker - s.workers), i = hole, home
    count_worker(index, worker.id_plus_1 - 1, -1)
    while True:
        i = (i + 1) & s.worker_mask
        if s.workers[i].id_plus_1 == 0:
            break
        home = <uint32_t>mix(s.workers[i].id_plus_1 - 1) & s.worker_mask
        if ((i - home) & s.worker_mask) >= ((i - hole) & s.worker_mask):
            s.workers[hole] = s.workers[i]
            hole = i
    s.workers[hole].id_plus_1 = 0
    s.num_workers -= 1


cdef inline bint reserve_workers(Index *index, Shard *s, uint64_t more) noexcept nogil:
    cdef Worker *old = s.workers
    cdef uint64_t size = <uint64_t>s.worker_mask + 1 if old != NULL else 0, wanted = size or 8, i
    cdef uint32_t j
    cdef Worker *fresh
    while (s.num_workers + more) * 3 >= wanted * 2:
        wanted *= 2
    if wanted == size:
        return True
    fresh = <Worker *>resize(index, NULL, 0, wanted * sizeof(Worker))
    if fresh == NULL:
        return False
    memset(fresh, 0, wanted * sizeof(Worker))
    s.workers = fresh
    s.worker_mask = <uint32_t>(wanted - 1)
    for i in range(size):
        if old[i].id_plus_1:
            j = <uint32_t>mix(old[i].id_plus_1 - 1) & s.worker_mask
            while fresh[j].id_plus_1:
                j = (j + 1) & s.worker_mask
            fresh[j] = old[i]
    if size:
        resize(index, old, size * sizeof(Worker), 0)
    return True


cdef inline bint reserve_block(Index *index, uint32_t id) noexcept nogil:
    """Room in the registry for a worker."""
    cdef uint8_t **block = &index.blocks[id // BLOCK_IDS]
    cdef bint there
    rkv_mutex_lock(&index.registering)
    if block[0] == NULL:
        block[0] = <uint8_t *>resize(index, NULL, 0, BLOCK_IDS)
        if block[0] != NULL:
            memset(block[0], 0, BLOCK_IDS)
    there = block[0] != NULL
    rkv_mutex_unlock(&index.registering)
    return there


cdef inline bint reserve_worker(Index *index, Shard *s, uint32_t id, uint64_t others) noexcept nogil:
    """Room to register a worker, and `others` that another shard knows."""
    return reserve_workers(index, s, 1 + others) and (worker_of(s, id) != NULL or reserve_block(index, id))


# --------------------------------------------------------------------------------------------------------------- sets

cdef inline uint32_t room_log2(uint64_t size) noexcept nogil:
    return 0 if size <= 1 else <uint32_t>rkv_log2(size - 1) + 1


cdef inline Member *members_of(Shard *s, uint32_t set) noexcept nogil:
    return s.members + s.sets[set].first


cdef inline bint holds(Shard *s, uint32_t set, uint32_t worker) noexcept nogil:
    cdef Member *m = members_of(s, set)
    cdef uint32_t low = 0, high = s.sets[set].size, mid
    while low < high:
        mid = (low + high) // 2
        if m[mid].worker < worker:
            low = mid + 1
        else:
            high = mid
    return low < s.sets[set].size and m[low].worker == worker


cdef inline bint reserve_sets(Index *index, Shard *s, uint64_t sets, uint64_t members) noexcept nogil:
    """Room for `sets` new sets whose rooms add up to `members`; the workers apart."""
    cdef void *block
    cdef uint32_t wanted
    if <uint64_t>s.num_sets + sets > s.max_sets:
        wanted = grown(s.num_sets, sets + 1, 16)
        block = resize(index, s.sets, s.max_sets * sizeof(HolderSet), wanted * sizeof(HolderSet))
        if block == NULL:
            return False
        s.sets = <HolderSet *>block
        s.max_sets = wanted
        if s.num_sets == 0:
            memset(s.sets, 0, sizeof(HolderSet))
            s.num_sets = 1
    if <uint64_t>s.num_members + members > s.max_members:
        wanted = grown(s.num_members, members + 1, 32)
        block = resize(index, s.members, s.max_members * sizeof(Member), wanted * sizeof(Member))
        if block == NULL:
            return False
        s.members = <Member *>block
        s.max_members = wanted
        if s.num_members == 0:
            s.num_members = 1
    return table_reserve(index, s, SETS, sets)


cdef inline void link_member(Shard *s, uint32_t at, uint32_t set) noexcept nogil:
    cdef Member *m = s.members + at
    cdef Worker *worker = worker_of(s, m.worker)
    m.set = set
    m.prev = 0
    m.next = worker.first
    if m.next:
        s.members[m.next].prev = at
    worker.first = at


cdef inline void unlink_member(Shard *s, uint32_t at) noexcept nogil:
    cdef Member *m = s.members + at
    if m.prev:
        s.members[m.prev].next = m.next
    else:
        worker_of(s, m.worker).first = m.next
    if m.next:
        s.members[m.next].prev = m.prev


cdef inline bint same_set(Shard *s, uint32_t set, Member *base, uint32_t size, uint32_t worker, bint add) noexcept nogil:
    """set == base + worker (add), or base - worker. base without / with the worker, respectively."""
    cdef Member *m = members_of(s, set)
    cdef uint32_t i, j = 0
    cdef bint seen = False
    if s.sets[set].size != (size + 1 if add else size - 1):
        return False
    for i in range(size):
        if add and not seen and base[i].worker > worker:
            if m[j].worker != worker:
                return False
            seen = True
            j += 1
        if not add and base[i].worker == worker:
            continue
        if m[j].worker != base[i].worker:
            return False
        j += 1
    return not add or seen or m[j].worker == worker


cdef inline uint32_t known_set(Shard *s, uint32_t base, uint32_t worker, bint add) noexcept nogil:
    """The interned set base +- worker; 0: there is none. base 0: the empty set."""
    cdef uint64_t h
    cdef uint32_t i
    if s.by_members.slots == NULL:
        return 0
    h = s.sets[base].hash ^ mix(worker + <uint64_t>1)
    i = <uint32_t>(mix(h) >> 8) & s.by_members.mask
    while s.by_members.slots[i]:
        if s.sets[s.by_members.slots[i]].hash == h and same_set(
            s, s.by_members.slots[i], members_of(s, base), s.sets[base].size, worker, add
        ):
            return s.by_members.slots[i]
        i = (i + 1) & s.by_members.mask
    return 0


cdef inline uint32_t new_set(Shard *s, uint32_t size) noexcept nogil:
    """A set slot and room for its members, which the caller fills, then enter_set. Reserved before."""
    cdef uint32_t set, room = room_log2(size)
    if s.free_set:
        set = s.free_set
        s.free_set = s.sets[set].first
    else:
        set = s.num_sets
        s.num_sets += 1
    memset(&s.sets[set], 0, sizeof(HolderSet))
    s.sets[set].size = size
    s.sets[set].room_log2 = room
    if s.free_members[room]:
        s.sets[set].first = s.free_members[room]
        s.free_members[room] = s.members[s.sets[set].first].next
    else:
        s.sets[set].first = s.num_members
        s.num_members += <uint32_t>1 << room
    return set


cdef inline void enter_set(Shard *s, uint32_t set) noexcept nogil:
    cdef uint32_t i
    cdef Member *m = members_of(s, set)
    s.sets[set].hash = 0
    for i in range(s.sets[set].size):
        s.sets[set].hash ^= mix(m[i].worker + <uint64_t>1)
        link_member(s, s.sets[set].first + i, set)
    table_put(s, SETS, set)


cdef inline void free_set(Shard *s, uint32_t set) noexcept nogil:
    cdef uint32_t i, first = s.sets[set].first, room = s.sets[set].room_log2
    for i in range(s.sets[set].size):
        unlink_member(s, first + i)
    table_take(s, SETS, set)
    s.members[first].next = s.free_members[room]
    s.free_members[room] = first
    s.sets[set].size = 0
    s.sets[set].first = s.free_set
    s.free_set = set


cdef inline uint32_t changed_set(Shard *s, uint32_t base, uint32_t worker, bint add) noexcept nogil:
    """The set base +- worker, interned; made if need be (reserved before). 0: the empty set."""
    cdef uint32_t set, i, j = 0, size = s.sets[base].size
    cdef Member *m
    cdef Member *b
    if not add and size == 1:
        return 0
    set = known_set(s, base, worker, add)
    if set:
        return set
    set = new_set(s, size + 1 if add else size - 1)
    m = members_of(s, set)
    b = members_of(s, base)
    for i in range(size):
        if add and j == i and b[i].worker > worker:
            m[j].worker = worker
            j += 1
        if add or b[i].worker != worker:
            m[j].worker = b[i].worker
            j += 1
    if add and j == size:
        m[j].worker = worker
    enter_set(s, set)
    return set


cdef inline uint32_t copy_set(Index *index, Shard *s, Shard *other, uint32_t base) noexcept nogil:
    """The set of s that has the members of another shard's set; its workers are registered, too. All reserved before."""
    cdef uint64_t h = other.sets[base].hash
    cdef uint32_t i = <uint32_t>(mix(h) >> 8) & s.by_members.mask, j, set, size = other.sets[base].size
    cdef Member *from_ = members_of(other, base)
    if base == 0:
        return 0
    while s.by_members.slots[i]:
        set = s.by_members.slots[i]
        if s.sets[set].hash == h and s.sets[set].size == size:
            j = 0
            while j < size and members_of(s, set)[j].worker == from_[j].worker:
                j += 1
            if j == size:
                return set
        i = (i + 1) & s.by_members.mask
    set = new_set(s, size)
    for j in range(size):
        register_worker(index, s, from_[j].worker)
        members_of(s, set)[j].worker = from_[j].worker
    enter_set(s, set)
    return set


cdef inline bint shrink_set(Shard *s, uint32_t set, uint32_t worker) noexcept nogil:
    """Take the worker out of the set itself, so of all its nodes at once; needs no memory. The result is not interned yet and not
    empty. False if another set has these members already (nothing done)."""
    cdef uint32_t first = s.sets[set].first, size = s.sets[set].size, i, at
    if size == 1 or known_set(s, set, worker, False):
        return False
    table_take(s, SETS, set)
    i = first
    while s.members[i].worker != worker:
        i += 1
    unlink_member(s, i)
    for at in range(i + 1, first + size):       # the links of those behind move along
        s.members[at - 1] = s.members[at]
        if s.members[at].prev:
            s.members[s.members[at].prev].next = at - 1
        else:
            worker_of(s, s.members[at].worker).first = at - 1
        if s.members[at].next:
            s.members[s.members[at].next].prev = at - 1
    s.sets[set].size = size - 1
    s.sets[set].hash ^= mix(worker + <uint64_t>1)
    table_put(s, SETS, set)
    return True
