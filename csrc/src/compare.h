#ifndef RKV_COMPARE_H
#define RKV_COMPARE_H
#include <stddef.h>
#include <stdint.h>

/* Number of leading tokens that a[0..n) and b[0..n) share. */
size_t rkv_leaf_common_prefix(const int32_t *a, const int32_t *b, size_t n);

#endif
