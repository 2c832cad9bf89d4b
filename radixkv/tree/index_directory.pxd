"""The directory: page key -> place (shard and position), in 64 parts with a mutex each.

A slot is 8 bits of the key's hash and a 32-bit place; the key itself stands in the arena, and is compared there. Linear probing;
the part is rebuilt at 80 % (tombstones included) to 53 %: 6 to 9 bytes a page.
"""

from .index_state cimport *
from .index_arena cimport *


cdef enum:
    AHEAD = 16      # slots, or keys

cdef inline uint64_t key_of(Index *index, uint32_t place) noexcept nogil:
    return keys_at(&index.shards[place >> POS_BITS], place & POS_MASK)[0]


cdef inline void prefetch_key(Index *index, uint32_t place) noexcept nogil:
    rkv_prefetch(keys_at(&index.shards[place >> POS_BITS], place & POS_MASK))


cdef inline void prefetch_slot(Index *index, uint64_t key) noexcept nogil:
    """Ask for a key's slot, both its cache lines. Takes no mutex: an address that is not right (any more) costs nothing but a line."""
    cdef uint64_t h = mix(key)
    cdef Part *part = &index.parts[h >> 58]
    cdef uint64_t capacity = rkv_load(&part.hint_capacity), places = rkv_load(&part.hint_places)
    cdef uint64_t slot = <uint64_t><uint32_t>(h >> 24) * capacity >> 32
    rkv_prefetch(<const void *><size_t>(places + capacity * 4 + slot))
    rkv_prefetch(<const void *><size_t>(places + slot * 4))


cdef inline void prefetch_ahead(Index *index, const uint64_t *keys, uint32_t i, uint32_t n) noexcept nogil:
    """In a loop over keys, at i: ask for what comes AHEAD keys later, and at first for all up to there."""
    cdef uint32_t j
    if i == 0:
        for j in range(minimum(AHEAD, n)):
            prefetch_slot(index, keys[j])
    if i + AHEAD < n:
        prefetch_slot(index, keys[i + AHEAD])


cdef inline Part *part_of(Index *index, uint64_t h) noexcept nogil:
    return &index.parts[h >> 58]


cdef inline uint32_t first_slot(Part *part, uint64_t h) noexcept nogil:
    return <uint32_t>(<uint64_t><uint32_t>(h >> 24) * part.capacity >> 32)


cdef inline uint8_t tag_of(uint64_t h) noexcept nogil:
    cdef uint8_t tag = <uint8_t>h
    return tag if tag > 1 else tag + 2


cdef inline uint32_t slot_of(Index *index, Part *part, uint64_t key, uint64_t h) noexcept nogil:
    """The slot of a key, or NOWHERE. The part is locked."""
    cdef uint32_t i
    cdef uint8_t tag = tag_of(h)
    if part.capacity == 0:
        return NOWHERE
    i = first_slot(part, h)
    while part.tags[i]:
        if part.tags[i] == tag and key_of(index, part.places[i]) == key:
            return i
        i += 1
        if i == part.capacity:
            i = 0
    return NOWHERE


cdef inline void put(Part *part, uint64_t h, uint32_t place) noexcept nogil:
    cdef uint32_t i = first_slot(part, h)
    while part.tags[i] > 1:
        i += 1
        if i == part.capacity:
            i = 0
    part.used += part.tags[i] == 0
    part.tags[i] = tag_of(h)
    part.places[i] = place
    part.live += 1


cdef inline bint rebuild(Index *index, Part *part) noexcept nogil:
    """Make room for one more."""
    cdef Part fresh
    cdef uint32_t i
    cdef void *block
    fresh = part[0]
    fresh.capacity = (part.live * <uint64_t>15 // 8 + 31) & ~<uint32_t>15
    fresh.live = 0
    fresh.used = 0
    block = resize(index, NULL, 0, <uint64_t>fresh.capacity * 5)
    if block == NULL:
        return False
    fresh.places = <uint32_t *>block
    fresh.tags = <uint8_t *>block + <uint64_t>fresh.capacity * 4
    memset(fresh.tags, 0, fresh.capacity)
    for i in range(part.capacity):
        if i + AHEAD < part.capacity and part.tags[i + AHEAD] > 1:
            prefetch_key(index, part.places[i + AHEAD])     # half of insert's time without this
        if part.tags[i] > 1:
            put(&fresh, mix(key_of(index, part.places[i])), part.places[i])
    if part.places != NULL:
        resize(index, part.places, <uint64_t>part.capacity * 5, 0)
    part.places = fresh.places
    part.tags = fresh.tags
    part.capacity = fresh.capacity
    part.live = fresh.live
    part.used = fresh.used
    rkv_store(&part.hint_places, <uint64_t><size_t>part.places)
    rkv_store(&part.hint_capacity, part.capacity)
    return True


cdef inline uint32_t place_of(Index *index, uint64_t key) noexcept nogil:
    """Where a key is; NOWHERE: unknown. A hint, unless the shard that it names is locked."""
    cdef uint64_t h = mix(key)
    cdef Part *part = part_of(index, h)
    cdef uint32_t i, place = NOWHERE
    rkv_mutex_lock(&part.mutex)
    i = slot_of(index, part, key, h)
    if i != NOWHERE:
        place = part.places[i]
    rkv_mutex_unlock(&part.mutex)
    return place


cdef inline rkv_status claim(Index *index, uint64_t key, uint32_t place, uint32_t *known) noexcept nogil:
    """Enter a key that is not there: *known NOWHERE. Else *known is where it is. Its shard is locked, its key written."""
    cdef uint64_t h = mix(key)
    cdef Part *part = part_of(index, h)
    cdef uint32_t i
    cdef rkv_status status = RKV_OK
    rkv_mutex_lock(&part.mutex)
    i = slot_of(index, part, key, h)
    if i != NOWHERE:
        known[0] = part.places[i]
    else:
        known[0] = NOWHERE
        if (part.used + 1) * <uint64_t>5 > part.capacity * <uint64_t>4 and not rebuild(index, part):
            status = RKV_ERR_NO_MEMORY
        else:
            put(part, h, place)
    rkv_mutex_unlock(&part.mutex)
    return status


cdef inline void move_place(Index *index, uint64_t key, uint32_t place) noexcept nogil:
    """A known key is elsewhere now (written there already). Both shards are locked."""
    cdef uint64_t h = mix(key)
    cdef Part *part = part_of(index, h)
    rkv_mutex_lock(&part.mutex)
    part.places[slot_of(index, part, key, h)] = place
    rkv_mutex_unlock(&part.mutex)


cdef inline void forget(Index *index, uint64_t key) noexcept nogil:
    """Take a known key out. Tombstones at the end of their cluster become empty."""
    cdef uint64_t h = mix(key)
    cdef Part *part = part_of(index, h)
    cdef uint32_t i, after
    rkv_mutex_lock(&part.mutex)
    i = slot_of(index, part, key, h)
    part.tags[i] = 1
    part.live -= 1
    after = i + 1 if i + 1 < part.capacity else 0
    if part.tags[after] == 0:
        while part.tags[i] == 1:
            part.tags[i] = 0
            part.used -= 1
            i = i - 1 if i else part.capacity - 1
    rkv_mutex_unlock(&part.mutex)
