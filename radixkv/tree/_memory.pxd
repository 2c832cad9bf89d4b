"""Growable blocks: every byte that the tree owns is reached through grow() and drop(), so every failure has one place."""

from libc.stdint cimport uint64_t
from radixkv.tree._abi cimport rkv_allocator


cdef inline void *reallocate(const rkv_allocator *a, void *ptr, size_t old_bytes, size_t new_bytes) noexcept nogil:
    return a.reallocate(a.ctx, ptr, old_bytes, new_bytes)


cdef inline bint grow(const rkv_allocator *a, void **block, uint64_t *capacity, uint64_t needed, size_t item_bytes,
                      uint64_t least) noexcept nogil:
    """Make room for ``needed`` items; doubles, so that growing is amortised. False: no memory, and nothing has changed."""
    cdef uint64_t wanted = capacity[0] * 2
    cdef void *moved
    if needed <= capacity[0]:
        return True
    if wanted < needed:
        wanted = needed
    if wanted < least:
        wanted = least
    moved = reallocate(a, block[0], capacity[0] * item_bytes, wanted * item_bytes)
    if moved == NULL:
        return False
    block[0] = moved
    capacity[0] = wanted
    return True


cdef inline void drop(const rkv_allocator *a, void **block, uint64_t *capacity, size_t item_bytes) noexcept nogil:
    if block[0] != NULL:
        reallocate(a, block[0], capacity[0] * item_bytes, 0)
    block[0] = NULL
    capacity[0] = 0


cdef inline uint64_t resident(uint64_t bytes) noexcept nogil:
    """Bytes of memory that ``bytes`` touched at the start of a block really take: whole system pages once it is a mapping."""
    return bytes if bytes < 65536 else (bytes + 4095) & ~<uint64_t>4095
