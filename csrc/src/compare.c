/* Vectorised comparison of token runs. A C leaf, because Cython has no syntax for target_clones: the loader picks the
 * AVX-512, AVX2 or baseline clone, so that wheels stay baseline x86-64. */
#include "compare.h"

/* Not with a sanitizer, whose run-time is not up yet when the loader resolves a clone; nor with clang, which gives the resolver a
 * name of its own, so that nobody who includes compare.h finds the function. */
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define RKV_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define RKV_CLONES
#endif

enum { BLOCK = 64 }; /* tokens compared between two branches: 256 bytes, four cache lines */

RKV_CLONES size_t rkv_leaf_common_prefix(const int32_t *a, const int32_t *b, size_t n)
{
    size_t i = 0;
    for (; i + BLOCK <= n; i += BLOCK) {
        uint32_t differing = 0;
        for (size_t j = 0; j < BLOCK; j++) {
            differing |= (uint32_t)a[i + j] ^ (uint32_t)b[i + j];
        }
        if (differing) {
            break;
        }
    }
    while (i < n && a[i] == b[i]) {
        i++;
    }
    return i;
}
