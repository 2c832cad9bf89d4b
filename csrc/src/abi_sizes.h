/* How long each struct was in ABI version 1, the least struct_size that a function accepts.
 *
 * Frozen: a struct that grows gets no new number here, else hosts built before it would be refused. Functions read at most
 * min(struct_size, sizeof) bytes, what the caller does not have being 0, and write at most as many back. The assertions hold
 * when a struct has grown; they fail if a field of version 1 moved. */
#ifndef RKV_ABI_SIZES_H
#define RKV_ABI_SIZES_H
#include "radixkv/radixkv.h"

#include <stddef.h>
#include <string.h>

#define RKV_ENDS(type, last_of_v1, size)                                                                              \
    _Static_assert(offsetof(type, last_of_v1) + sizeof(((type *)0)->last_of_v1) == (size), "version 1 of " #type " is frozen")

#define RKV_INDEX_CONFIG_SIZE_V1 32u
#define RKV_INDEX_HIT_SIZE_V1 88u
#define RKV_INDEX_STATS_SIZE_V1 64u
#if defined(__LP64__)
RKV_ENDS(rkv_index_config, allocator, RKV_INDEX_CONFIG_SIZE_V1);
RKV_ENDS(rkv_index_hit, num_holders, RKV_INDEX_HIT_SIZE_V1);
RKV_ENDS(rkv_index_stats, evicted_pages, RKV_INDEX_STATS_SIZE_V1);
#endif

/* Copy a struct in from the caller: what it does not have is 0. */
static inline void rkv_read_struct(void *ours, size_t our_bytes, const void *callers, uint32_t their_bytes)
{
    memset(ours, 0, our_bytes);
    memcpy(ours, callers, their_bytes < our_bytes ? their_bytes : our_bytes);
}

/* Copy a struct out to the caller, but for its struct_size. */
static inline void rkv_write_struct(void *callers, uint32_t their_bytes, const void *ours, size_t our_bytes)
{
    size_t bytes = their_bytes < our_bytes ? their_bytes : our_bytes;
    memcpy((char *)callers + sizeof(uint32_t), (const char *)ours + sizeof(uint32_t), bytes - sizeof(uint32_t));
}

#endif
