"""The page store: where keys and page ids live, and which page ids the tree owns.

A node's pages are one extent of *units*, one unit a page, and four arrays run in parallel over the units:

    unit        0    1    2    3    4    5    6    7   ... top
    keys       [P tokens each                            ]     4 * P bytes a unit
    device     [one int32 page id each                   ]     4
    host       [one int32 page id each, touched only when a node has a host copy]
    digests    [digest_bytes each, only once asked for   ]

so that a split copies nothing:  [ node: start 2, 5 pages ]  ->  [ upper: start 2, 2 pages ][ node: start 4, 3 pages ].

Free extents are kept in bins by size (two-level segregated fit) and merge with their free neighbours. Their book-keeping
lies inside them: device[first] = device[last] = length, keys[first][0..1] = next and previous in the bin. The bitmap ``edges``
has a bit set at the first and last unit of each free extent, which is all that merging needs to know. A free extent of a
single unit with page_size 1 has no room for links: such a sliver is in no bin and comes back when a neighbour is freed.
"""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from radixkv.tree._abi cimport ctz64, log2_32, popcount64, rkv_allocator
from radixkv.tree._memory cimport drop, grow, reallocate, resident

cdef enum:
    NUM_BINS = 288          # 64 exact sizes, then 8 bins for each power of two up to 2**32
    BIN_WORDS = 5
    NO_UNIT = 0xffffffff
    MAX_UNITS = 0x7fffffff
    FIT_TRIES = 6           # extents looked at in a bin whose members may be a little too small
    IDS_A_CHUNK = 32768     # page ids a chunk of an ownership set (4 KiB of bits)
    WORDS_A_CHUNK = 512


cdef struct Store:
    const rkv_allocator *allocator
    uint32_t page_size
    uint32_t digest_bytes
    bint digests_on
    uint64_t key_capacity           # in units, for each array its own: growth may fail between two of them
    uint64_t device_capacity
    uint64_t host_capacity
    uint64_t digest_capacity
    uint64_t edge_capacity          # in words
    int32_t *keys
    int32_t *device
    int32_t *host
    uint8_t *digests
    uint64_t *edges
    uint32_t top                    # first unit never handed out, or handed back
    uint32_t touched                # highest top so far: what is resident
    uint32_t host_touched
    uint32_t digest_touched
    uint32_t bins[NUM_BINS]
    uint64_t bin_map[BIN_WORDS]


cdef inline void store_init(Store *s, const rkv_allocator *allocator, uint32_t page_size,
                            uint32_t digest_bytes) noexcept nogil:
    memset(s, 0, sizeof(Store))
    memset(s.bins, 0xff, sizeof(s.bins))
    s.allocator = allocator
    s.page_size = page_size
    s.digest_bytes = digest_bytes


cdef inline void store_release(Store *s) noexcept nogil:
    drop(s.allocator, <void **>&s.keys, &s.key_capacity, 4 * <size_t>s.page_size)
    drop(s.allocator, <void **>&s.device, &s.device_capacity, 4)
    drop(s.allocator, <void **>&s.host, &s.host_capacity, 4)
    drop(s.allocator, <void **>&s.digests, &s.digest_capacity, s.digest_bytes)
    drop(s.allocator, <void **>&s.edges, &s.edge_capacity, 8)
    s.top = s.touched = s.host_touched = s.digest_touched = 0
    memset(s.bins, 0xff, sizeof(s.bins))
    memset(s.bin_map, 0, sizeof(s.bin_map))


cdef inline int32_t *unit_key(const Store *s, uint32_t unit) noexcept nogil:
    return s.keys + <size_t>unit * s.page_size


cdef inline uint8_t *unit_digest(const Store *s, uint32_t unit) noexcept nogil:
    return s.digests + <size_t>unit * s.digest_bytes


# ---- free extents ----------------------------------------------------------------------------------------------------

cdef inline bint is_edge(const Store *s, uint32_t unit) noexcept nogil:
    return (s.edges[unit >> 6] >> (unit & 63)) & 1


cdef inline void set_edges(Store *s, uint32_t first, uint32_t length) noexcept nogil:
    cdef uint32_t last = first + length - 1
    s.edges[first >> 6] |= <uint64_t>1 << (first & 63)
    s.edges[last >> 6] |= <uint64_t>1 << (last & 63)


cdef inline void clear_edges(Store *s, uint32_t first, uint32_t length) noexcept nogil:
    cdef uint32_t last = first + length - 1
    s.edges[first >> 6] &= ~(<uint64_t>1 << (first & 63))
    s.edges[last >> 6] &= ~(<uint64_t>1 << (last & 63))


cdef inline uint32_t bin_of(uint32_t length) noexcept nogil:
    """The bin that an extent of this length is kept in: all its members are at least the bin's lower bound."""
    cdef int log
    if length < 64:
        return length
    log = log2_32(length)
    return 64 + (log - 6) * 8 + ((length >> (log - 3)) & 7)


cdef inline bint has_links(const Store *s, uint32_t length) noexcept nogil:
    return s.page_size > 1 or length > 1


cdef inline void bin_push(Store *s, uint32_t first, uint32_t length) noexcept nogil:
    cdef uint32_t b
    cdef uint32_t *link
    s.device[first] = <int32_t>length
    s.device[first + length - 1] = <int32_t>length
    set_edges(s, first, length)
    if not has_links(s, length):
        return
    b = bin_of(length)
    link = <uint32_t *>unit_key(s, first)
    link[0] = s.bins[b]
    link[1] = NO_UNIT
    if s.bins[b] != NO_UNIT:
        (<uint32_t *>unit_key(s, s.bins[b]))[1] = first
    s.bins[b] = first
    s.bin_map[b >> 6] |= <uint64_t>1 << (b & 63)


cdef inline void bin_pull(Store *s, uint32_t first, uint32_t length) noexcept nogil:
    cdef uint32_t b, next_, previous
    clear_edges(s, first, length)
    if not has_links(s, length):
        return
    b = bin_of(length)
    next_ = (<uint32_t *>unit_key(s, first))[0]
    previous = (<uint32_t *>unit_key(s, first))[1]
    if next_ != NO_UNIT:
        (<uint32_t *>unit_key(s, next_))[1] = previous
    if previous != NO_UNIT:
        (<uint32_t *>unit_key(s, previous))[0] = next_
    else:
        s.bins[b] = next_
        if next_ == NO_UNIT:
            s.bin_map[b >> 6] &= ~(<uint64_t>1 << (b & 63))


cdef inline uint32_t find_free(const Store *s, uint32_t length) noexcept nogil:
    """A free extent of at least ``length`` units, or NO_UNIT. A few tries in its own bin, then any of the first larger bin."""
    cdef uint32_t b = bin_of(length), first, word
    cdef uint64_t bits
    cdef int tries = FIT_TRIES
    first = s.bins[b]
    while first != NO_UNIT and tries > 0:
        if <uint32_t>s.device[first] >= length:
            return first
        first = (<uint32_t *>unit_key(s, first))[0]
        tries -= 1
    b += 1
    word = b >> 6
    if word >= BIN_WORDS:
        return NO_UNIT
    bits = s.bin_map[word] & (~<uint64_t>0 << (b & 63))
    while bits == 0:
        word += 1
        if word == BIN_WORDS:
            return NO_UNIT
        bits = s.bin_map[word]
    return s.bins[word * 64 + ctz64(bits)]


# ---- allocation ------------------------------------------------------------------------------------------------------

cdef inline bint store_reserve(Store *s, uint64_t units) noexcept nogil:
    """Make the arrays reach ``units`` units. False: no memory (or beyond MAX_UNITS)."""
    cdef uint64_t words = s.edge_capacity
    if units > MAX_UNITS:
        return False
    if not grow(s.allocator, <void **>&s.keys, &s.key_capacity, units, 4 * <size_t>s.page_size, 64):
        return False
    if not grow(s.allocator, <void **>&s.device, &s.device_capacity, units, 4, 64):
        return False
    if not grow(s.allocator, <void **>&s.host, &s.host_capacity, units, 4, 64):
        return False
    if s.digests_on and not grow(s.allocator, <void **>&s.digests, &s.digest_capacity, units, s.digest_bytes, 64):
        return False
    if not grow(s.allocator, <void **>&s.edges, &s.edge_capacity, (units >> 6) + 1, 8, 8):
        return False
    if s.edge_capacity > words:
        memset(s.edges + words, 0, (s.edge_capacity - words) * 8)
    return True


cdef inline uint32_t store_alloc(Store *s, uint32_t length) noexcept nogil:
    """An extent of ``length`` > 0 units: its first unit, or NO_UNIT if there is no memory (and nothing has changed)."""
    cdef uint32_t first = find_free(s, length)
    cdef uint32_t found
    if first != NO_UNIT:
        found = <uint32_t>s.device[first]
        bin_pull(s, first, found)
        if found > length:
            bin_push(s, first + length, found - length)
        return first
    if not store_reserve(s, <uint64_t>s.top + length):
        return NO_UNIT
    first = s.top
    s.top += length
    if s.top > s.touched:
        s.touched = s.top
    return first


cdef inline void store_free(Store *s, uint32_t first, uint32_t length) noexcept nogil:
    """Give an extent (or any part of one) back; it merges with free neighbours, and with the untouched end of the store."""
    cdef uint32_t other
    if first > 0 and is_edge(s, first - 1):
        other = <uint32_t>s.device[first - 1]
        bin_pull(s, first - other, other)
        first -= other
        length += other
    if first + length < s.top and is_edge(s, first + length):
        other = <uint32_t>s.device[first + length]
        bin_pull(s, first + length, other)
        length += other
    if first + length == s.top:
        s.top = first
    else:
        bin_push(s, first, length)


cdef inline void touch_host(Store *s, uint32_t first, uint32_t length) noexcept nogil:
    if first + length > s.host_touched:
        s.host_touched = first + length


cdef inline uint64_t store_memory(const Store *s) noexcept nogil:
    return (resident(<uint64_t>s.touched * 4 * s.page_size) + resident(<uint64_t>s.touched * 4)
            + resident(<uint64_t>s.host_touched * 4) + resident(s.edge_capacity * 8))


# ---- ownership of page ids -------------------------------------------------------------------------------------------

cdef struct PageSet:
    const rkv_allocator *allocator
    uint64_t **chunks               # bits of IDS_A_CHUNK page ids each, or NULL
    uint64_t num_chunks             # length of chunks
    uint64_t live_chunks
    uint64_t size                   # page ids in the set


cdef inline void pageset_release(PageSet *p) noexcept nogil:
    cdef uint64_t c
    for c in range(p.num_chunks):
        if p.chunks[c] != NULL:
            reallocate(p.allocator, p.chunks[c], WORDS_A_CHUNK * 8, 0)
    drop(p.allocator, <void **>&p.chunks, &p.num_chunks, sizeof(void *))
    p.live_chunks = p.size = 0


cdef inline bint pageset_has(const PageSet *p, int32_t id_) noexcept nogil:
    cdef uint64_t c = <uint64_t>id_ // IDS_A_CHUNK
    if c >= p.num_chunks or p.chunks[c] == NULL:
        return False
    return (p.chunks[c][(id_ >> 6) & (WORDS_A_CHUNK - 1)] >> (id_ & 63)) & 1


cdef inline bint pageset_reserve(PageSet *p, int32_t id_) noexcept nogil:
    """Make sure that the chunk of an id exists. False: no memory."""
    cdef uint64_t c = <uint64_t>id_ // IDS_A_CHUNK, old = p.num_chunks
    cdef uint64_t *chunk
    if not grow(p.allocator, <void **>&p.chunks, &p.num_chunks, c + 1, sizeof(void *), 16):
        return False
    if p.num_chunks > old:
        memset(p.chunks + old, 0, (p.num_chunks - old) * sizeof(void *))
    if p.chunks[c] == NULL:
        chunk = <uint64_t *>reallocate(p.allocator, NULL, 0, WORDS_A_CHUNK * 8)
        if chunk == NULL:
            return False
        memset(chunk, 0, WORDS_A_CHUNK * 8)
        p.chunks[c] = chunk
        p.live_chunks += 1
    return True


cdef inline uint64_t pageset_remove(PageSet *p, const int32_t *ids, uint64_t n) noexcept nogil:
    cdef uint64_t i
    cdef int32_t id_
    for i in range(n):
        id_ = ids[i]
        p.chunks[<uint64_t>id_ // IDS_A_CHUNK][(id_ >> 6) & (WORDS_A_CHUNK - 1)] &= ~(<uint64_t>1 << (id_ & 63))
    p.size -= n
    return n


cdef enum:
    ADD_OK = 0
    ADD_NEGATIVE = 1
    ADD_OWNED = 2
    ADD_NO_MEMORY = 3


cdef inline int pageset_add(PageSet *p, const int32_t *ids, uint64_t n, uint64_t *added) noexcept nogil:
    """Add ids until one is negative, in the set already, or without memory; ``added`` grows by the ones that went in."""
    cdef uint64_t i, word, bit
    cdef uint64_t *chunk
    cdef int32_t id_
    cdef int verdict = ADD_OK
    for i in range(n):
        id_ = ids[i]
        if id_ < 0:
            verdict = ADD_NEGATIVE
            break
        if <uint64_t>id_ // IDS_A_CHUNK >= p.num_chunks or p.chunks[<uint64_t>id_ // IDS_A_CHUNK] == NULL:
            if not pageset_reserve(p, id_):
                verdict = ADD_NO_MEMORY
                break
        chunk = p.chunks[<uint64_t>id_ // IDS_A_CHUNK] + ((id_ >> 6) & (WORDS_A_CHUNK - 1))
        bit = <uint64_t>1 << (id_ & 63)
        word = chunk[0]
        if word & bit:
            verdict = ADD_OWNED
            break
        chunk[0] = word | bit
    else:
        i = n
    p.size += i
    added[0] += i
    return verdict


cdef inline uint64_t pageset_count(const PageSet *p) noexcept nogil:
    """Recount the bits (for check_integrity)."""
    cdef uint64_t c, w, total = 0
    for c in range(p.num_chunks):
        if p.chunks[c] != NULL:
            for w in range(WORDS_A_CHUNK):
                total += popcount64(p.chunks[c][w])
    return total


cdef inline uint64_t pageset_memory(const PageSet *p) noexcept nogil:
    return p.num_chunks * sizeof(void *) + p.live_chunks * (WORDS_A_CHUNK * 8)
