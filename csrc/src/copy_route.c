/* See copy_route.h. A call takes O(pages) before the copy, and no allocation up to FEW_PAGES. */
#include "copy_route.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { FEW_PAGES = 128 };

static inline int64_t id_at(rkv_copy_ids list, uint64_t i)
{
    return list.bits == 32 ? ((const int32_t *)list.ids)[i] : ((const int64_t *)list.ids)[i];
}

/* What a call works on: both tables of the page loop, and a set of destination ids. */
struct scratch {
    uint64_t *src, *dst;
    uint32_t *slots; /* open addressing: 1 + the place of an id in dst's list; 0: empty */
    uint32_t slots_log2;
};

/* Ids to offsets from slot 0. Returns: whether each id is of the pool; *rising: whether each is above the one before. */
static int offsets(rkv_copy_ids list, uint64_t num_pages, uint64_t pool_pages, uint64_t stride, uint64_t *out, int *rising)
{
    uint64_t before = 0, outside = 0, turns = 0;
    for (uint64_t i = 0; i < num_pages; i++) {
        uint64_t id = (uint64_t)id_at(list, i); /* a negative one is beyond any pool */
        outside |= id >= pool_pages;
        turns |= id < before;
        before = id + 1;
        out[i] = id * stride;
    }
    *rising = !turns;
    return !outside;
}

/* The slot of an id, or the empty one where it belongs. */
static uint32_t *slot_of(const struct scratch *s, rkv_copy_ids dst, int64_t id)
{
    uint32_t mask = (1u << s->slots_log2) - 1;
    uint32_t at = (uint32_t)((uint64_t)id * 0x9E3779B97F4A7C15u >> (64 - s->slots_log2));
    while (s->slots[at] && id_at(dst, s->slots[at] - 1) != id) {
        at = (at + 1) & mask;
    }
    return &s->slots[at];
}

/* Whether no destination is given twice and, in one pool, none is a source. */
static int disjoint(const rkv_copy_route *route, struct scratch *s, rkv_copy_ids src, rkv_copy_ids dst, uint64_t num_pages)
{
    memset(s->slots, 0, sizeof *s->slots << s->slots_log2);
    for (uint64_t i = 0; i < num_pages; i++) {
        uint32_t *slot = slot_of(s, dst, id_at(dst, i));
        if (*slot) {
            return 0;
        }
        *slot = (uint32_t)i + 1;
    }
    for (uint64_t i = 0; route->one_pool && i < num_pages; i++) {
        if (*slot_of(s, dst, id_at(src, i))) {
            return 0;
        }
    }
    return 1;
}

static int run(const rkv_copy_route *route, struct scratch *s, rkv_copy_ids src, rkv_copy_ids dst, uint64_t num_pages,
               rkv_copy_progress *progress)
{
    rkv_copy_job job = route->job;
    int src_rising, dst_rising;
    if (!offsets(src, num_pages, route->src_num_pages, route->src_page_stride, s->src, &src_rising) ||
        !offsets(dst, num_pages, route->dst_num_pages, route->dst_page_stride, s->dst, &dst_rising)) {
        return RKV_ROUTE_REFUSED;
    }
    if ((!dst_rising || route->one_pool) && !disjoint(route, s, src, dst, num_pages)) {
        return RKV_ROUTE_REFUSED;
    }
    job.loops[route->hole] = (rkv_copy_loop){s->src, s->dst, num_pages};
    job.num_threads = rkv_leaf_copy_threads(&job, job.num_threads);
    job.progress = progress;
    return rkv_leaf_copy(&job);
}

int rkv_leaf_route_copy(const rkv_copy_route *route, rkv_copy_ids src, rkv_copy_ids dst, uint64_t num_pages,
                        rkv_copy_progress *progress)
{
    uint64_t src_table[FEW_PAGES], dst_table[FEW_PAGES];
    uint32_t few_slots[2 * FEW_PAGES];
    struct scratch s = {src_table, dst_table, few_slots, 4};
    if (num_pages > route->dst_num_pages) { /* one of them comes twice */
        return RKV_ROUTE_REFUSED;
    }
    if (num_pages > UINT32_MAX / 4) {
        return ENOMEM;
    }
    while (((uint64_t)1 << s.slots_log2) < 2 * num_pages) {
        s.slots_log2++;
    }
    if (num_pages <= FEW_PAGES) {
        return run(route, &s, src, dst, num_pages, progress);
    }
    uint64_t *memory = malloc(2 * num_pages * sizeof *memory + (sizeof *s.slots << s.slots_log2));
    if (!memory) {
        return ENOMEM;
    }
    s.src = memory;
    s.dst = memory + num_pages;
    s.slots = (uint32_t *)(memory + 2 * num_pages);
    int status = run(route, &s, src, dst, num_pages, progress);
    free(memory);
    return status;
}
