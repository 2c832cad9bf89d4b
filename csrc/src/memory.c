/* The default allocator. Blocks of LARGE bytes and more are mappings of their own: mremap grows them without copying, pages that
 * nobody has touched cost nothing, and freeing one gives it back to the system at once. */
#define _GNU_SOURCE
#include "memory.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { LARGE = 64 * 1024, GRAIN = 4096 };

static size_t mapping_bytes(size_t bytes)
{
    return (bytes + GRAIN - 1) & ~(size_t)(GRAIN - 1);
}

static void *map(size_t bytes)
{
    void *block = mmap(NULL, mapping_bytes(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return block == MAP_FAILED ? NULL : block;
}

static void release(void *ptr, size_t bytes)
{
    if (ptr == NULL) {
        return;
    }
    if (bytes >= LARGE) {
        munmap(ptr, mapping_bytes(bytes));
    } else {
        free(ptr);
    }
}

/* Between the two kinds, or without mremap: a new block and a copy. */
static void *move(void *ptr, size_t old_bytes, size_t new_bytes)
{
    void *block = new_bytes >= LARGE ? map(new_bytes) : malloc(new_bytes);
    if (block != NULL && ptr != NULL) {
        memcpy(block, ptr, old_bytes < new_bytes ? old_bytes : new_bytes);
        release(ptr, old_bytes);
    }
    return block;
}

void *rkv_leaf_reallocate(void *ctx, void *ptr, size_t old_bytes, size_t new_bytes)
{
    (void)ctx;
    if (new_bytes == 0) {
        release(ptr, old_bytes);
        return NULL;
    }
    if (ptr == NULL) {
        return move(NULL, 0, new_bytes);
    }
    if (old_bytes < LARGE && new_bytes < LARGE) {
        return realloc(ptr, new_bytes);
    }
#ifdef MREMAP_MAYMOVE
    if (old_bytes >= LARGE && new_bytes >= LARGE) {
        void *block = mremap(ptr, mapping_bytes(old_bytes), mapping_bytes(new_bytes), MREMAP_MAYMOVE);
        return block == MAP_FAILED ? NULL : block;
    }
#endif
    return move(ptr, old_bytes, new_bytes);
}
