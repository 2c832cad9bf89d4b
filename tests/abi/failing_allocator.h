/* An rkv_allocator that counts what is alive, checks that sizes are told truly, always moves, and fails when asked to. */
#ifndef RKV_TESTS_FAILING_ALLOCATOR_H
#define RKV_TESTS_FAILING_ALLOCATOR_H

#include "check.h"

typedef struct failing_allocator {
    int64_t live_bytes;
    uint64_t requests;    /* of memory, since the start, while armed */
    uint64_t fail_at;     /* the request that fails, counted from 1; 0: none */
    uint64_t failures;
    uint64_t one_in;      /* 0, or fail one request in this many, at random */
    uint64_t random;      /* state, not 0 */
    int armed;
} failing_allocator;

enum { BLOCK_HEADER = 16 };

MAYBE_UNUSED static int must_fail(failing_allocator *allocator)
{
    if (!allocator->armed) {
        return 0;
    }
    allocator->requests++;
    if (allocator->requests == allocator->fail_at ||
        (allocator->one_in != 0 && next_random(&allocator->random) % allocator->one_in == 0)) {
        allocator->failures++;
        return 1;
    }
    return 0;
}

MAYBE_UNUSED static void *failing_reallocate(void *ctx, void *ptr, size_t old_bytes, size_t new_bytes)
{
    failing_allocator *allocator = ctx;
    unsigned char *old = ptr, *block = NULL;
    size_t told = 0;
    if (old != NULL) {
        memcpy(&told, old - BLOCK_HEADER, sizeof told);
        CHECK(told == old_bytes);
    }
    if (new_bytes > 0) {
        if (must_fail(allocator)) {
            return NULL;
        }
        block = malloc(BLOCK_HEADER + new_bytes);
        CHECK(block != NULL);
        memcpy(block, &new_bytes, sizeof new_bytes);
        block += BLOCK_HEADER;
        memset(block, 0xa5, new_bytes);
        if (old != NULL) {
            memcpy(block, old, old_bytes < new_bytes ? old_bytes : new_bytes);
        }
        allocator->live_bytes += (int64_t)new_bytes;
    }
    if (old != NULL) {
        memset(old, 0x5a, old_bytes);
        allocator->live_bytes -= (int64_t)old_bytes;
        free(old - BLOCK_HEADER);
    }
    return block;
}

#endif
