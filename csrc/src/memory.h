#ifndef RKV_MEMORY_H
#define RKV_MEMORY_H
#include "radixkv/radixkv.h"

/* The default rkv_allocator function: malloc below RKV_LARGE_BYTES, mmap/mremap from there on. */
void *rkv_leaf_reallocate(void *ctx, void *ptr, size_t old_bytes, size_t new_bytes);

#endif
