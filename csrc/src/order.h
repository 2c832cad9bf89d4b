#ifndef RKV_ORDER_H
#define RKV_ORDER_H
#include <stdint.h>

/* An entry of an eviction order: smallest (major, minor) leaves first. */
typedef struct rkv_order_entry {
    uint64_t minor;
    uint32_t major;
    uint32_t node;
} rkv_order_entry;

/* a before b, without a branch: which of two random keys is smaller is what no branch predictor knows. */
static inline uint32_t rkv_order_before(const rkv_order_entry *a, const rkv_order_entry *b)
{
    return (uint32_t)(a->major < b->major) | ((uint32_t)(a->major == b->major) & (uint32_t)(a->minor < b->minor));
}

/* The place, 0 .. 3, of the first of four siblings. */
static inline uint32_t rkv_order_first_of_four(const rkv_order_entry *siblings)
{
    uint32_t low = rkv_order_before(&siblings[1], &siblings[0]);
    uint32_t high = 2 + rkv_order_before(&siblings[3], &siblings[2]);
    uint32_t take_high = 0u - rkv_order_before(&siblings[high], &siblings[low]);
    return (high & take_high) | (low & ~take_high);
}

#endif
