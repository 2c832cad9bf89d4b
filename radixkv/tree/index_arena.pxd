"""The arena of one shard: page keys in chunks that never move, and beside each key the node that owns it.

    chunk k          |<------------------------ 1024 << k pages ------------------------>|
    chunk_keys[k]    | a run, and its slack     | free: next, prev ...         | a run   |
    chunk_owners[k]  | 7 7 7 7 7 7 7 7 7 7 7 7 7| FREE+n   (stale)     FREE+n  | 9 9 9 9 |

Free extents are joined with their neighbours, whose size stands in owner[] at both their ends (boundary tags).
"""

from .index_state cimport *


cdef inline uint32_t chunk_of(uint32_t pos) noexcept nogil:
    return <uint32_t>rkv_log2((pos >> CHUNK_LOG2) + 1)


cdef inline uint32_t chunk_base(uint32_t k) noexcept nogil:
    return ((<uint32_t>1 << k) - 1) << CHUNK_LOG2


cdef inline uint32_t chunk_pages(uint32_t k) noexcept nogil:
    return <uint32_t>1 << (k + CHUNK_LOG2)


cdef inline uint64_t *keys_at(Shard *s, uint32_t pos) noexcept nogil:
    cdef uint32_t k = chunk_of(pos)
    return s.chunk_keys[k] + (pos - chunk_base(k))


cdef inline uint32_t *owners_at(Shard *s, uint32_t pos) noexcept nogil:
    cdef uint32_t k = chunk_of(pos)
    return s.chunk_owners[k] + (pos - chunk_base(k))


cdef inline void own(Shard *s, uint32_t pos, uint32_t pages, uint32_t node) noexcept nogil:
    cdef uint32_t *owners
    cdef uint32_t i
    if pages:
        owners = owners_at(s, pos)
        for i in range(pages):
            owners[i] = node


cdef inline void link_extent(Shard *s, uint32_t pos, uint32_t pages) noexcept nogil:
    cdef uint32_t c = <uint32_t>rkv_log2(pages)
    cdef uint32_t *owners = owners_at(s, pos)
    cdef uint32_t after = s.extents[c]
    owners[0] = FREE | pages
    owners[pages - 1] = FREE | pages
    keys_at(s, pos)[0] = after          # low half next, high half prev, both position + 1
    if after:
        keys_at(s, after - 1)[0] = (keys_at(s, after - 1)[0] & <uint64_t>0xffffffffULL) | (<uint64_t>(pos + 1) << 32)
    s.extents[c] = pos + 1
    s.classes |= <uint32_t>1 << c


cdef inline void unlink_extent(Shard *s, uint32_t pos, uint32_t pages) noexcept nogil:
    cdef uint32_t c = <uint32_t>rkv_log2(pages)
    cdef uint64_t link = keys_at(s, pos)[0]
    cdef uint32_t after = <uint32_t>link, before = <uint32_t>(link >> 32)
    if before:
        keys_at(s, before - 1)[0] = (keys_at(s, before - 1)[0] & <uint64_t>0xffffffff00000000ULL) | after
    else:
        s.extents[c] = after
        if after == 0:
            s.classes &= ~(<uint32_t>1 << c)
    if after:
        keys_at(s, after - 1)[0] = (keys_at(s, after - 1)[0] & <uint64_t>0xffffffffULL) | (<uint64_t>before << 32)


cdef inline void free_pages(Shard *s, uint32_t pos, uint32_t pages) noexcept nogil:
    """Give an extent back, joined with free neighbours in its chunk."""
    cdef uint32_t k, n
    cdef uint32_t *owners
    if pages == 0:
        return
    k = chunk_of(pos)
    owners = owners_at(s, pos)
    if pos + pages < chunk_base(k) + chunk_pages(k) and owners[pages] & FREE:
        n = owners[pages] & ~<uint32_t>FREE
        unlink_extent(s, pos + pages, n)
        pages += n
    if pos > chunk_base(k) and (owners - 1)[0] & FREE:
        n = (owners - 1)[0] & ~<uint32_t>FREE
        unlink_extent(s, pos - n, n)
        pos -= n
        pages += n
    link_extent(s, pos, pages)


cdef inline uint32_t cut_extent(Shard *s, uint32_t pos, uint32_t size, uint32_t pages) noexcept nogil:
    cdef uint32_t k = chunk_of(pos)
    unlink_extent(s, pos, size)
    if pos + pages - chunk_base(k) > s.touched[k]:
        s.touched[k] = pos + pages - chunk_base(k)
    if size > pages:
        link_extent(s, pos + pages, size - pages)
    own(s, pos, pages, CLAIMED)
    return pos


cdef inline bint new_chunk(Index *index, Shard *s, uint32_t pages) noexcept nogil:
    """Add the smallest chunk not there yet that takes `pages`, as one free extent."""
    cdef uint32_t k
    cdef uint64_t *block
    for k in range(NUM_CHUNKS):
        if s.chunk_keys[k] == NULL and chunk_pages(k) >= pages:
            block = <uint64_t *>resize(index, NULL, 0, <uint64_t>chunk_pages(k) * 12)
            if block == NULL:
                return False
            s.chunk_keys[k] = block
            s.chunk_owners[k] = <uint32_t *>(block + chunk_pages(k))
            link_extent(s, chunk_base(k), chunk_pages(k))
            return True
    return False


cdef inline uint32_t take_pages(Index *index, Shard *s, uint32_t pages) noexcept nogil:
    """The position of `pages` pages, owned by CLAIMED; NO_PAGES: no memory. First fit in the class, then any larger class."""
    cdef uint32_t c = <uint32_t>rkv_log2(pages), at, size, tries = 0, larger
    if c >= NUM_CLASSES:
        return NO_PAGES
    at = s.extents[c]
    while at and tries < 8:
        size = owners_at(s, at - 1)[0] & ~<uint32_t>FREE
        if size >= pages:
            return cut_extent(s, at - 1, size, pages)
        at = <uint32_t>keys_at(s, at - 1)[0]
        tries += 1
    larger = (s.classes >> c >> 1) << c << 1
    if larger == 0:
        if not new_chunk(index, s, pages):
            return NO_PAGES
        larger = (s.classes >> c) << c       # the new chunk, in front of its class
        if (larger >> c) & 1 and (owners_at(s, s.extents[c] - 1)[0] & ~<uint32_t>FREE) < pages:
            larger &= ~(<uint32_t>1 << c)
    at = s.extents[rkv_lowest_bit(larger)] - 1
    return cut_extent(s, at, owners_at(s, at)[0] & ~<uint32_t>FREE, pages)


cdef inline uint32_t take_behind(Shard *s, uint32_t pos, uint32_t pages) noexcept nogil:
    """Take `pages` pages exactly at pos if they are free; else 0. Returns the pages taken."""
    cdef uint32_t k, size
    if pos == 0:
        return 0
    k = chunk_of(pos - 1)
    if pos >= chunk_base(k) + chunk_pages(k) or not owners_at(s, pos)[0] & FREE:
        return 0
    size = owners_at(s, pos)[0] & ~<uint32_t>FREE
    if size < pages:
        return 0
    cut_extent(s, pos, size, pages)
    return pages
