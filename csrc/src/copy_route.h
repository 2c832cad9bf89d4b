/* A copy between two views that were checked once: each call gives page ids only.
 *
 *     prepared:   job.loops  halves x layers x [ hole ] x tokens x heads       tables, as loops.py makes them
 *     a call:                                   ^ src id * page stride, dst id * page stride of each page */
#ifndef RKV_COPY_ROUTE_H
#define RKV_COPY_ROUTE_H
#include "copy.h"

/* One side's page ids: int32 or int64, in any order. */
typedef struct rkv_copy_ids {
    const void *ids;
    uint32_t bits; /* 32 or 64 */
} rkv_copy_ids;

typedef struct rkv_copy_route {
    rkv_copy_job job;   /* all but its progress and the tables of loop ``hole`` */
    uint32_t hole;
    int one_pool;       /* both sides are the same memory: no page may be read and written */
    uint64_t src_num_pages, dst_num_pages;
    uint64_t src_page_stride, dst_page_stride;
} rkv_copy_route;

/* The ids break a rule: one is not of its pool, a destination is given twice, or a page is both source and destination. */
enum { RKV_ROUTE_REFUSED = -1 };

/* Copy page i of src to page i of dst, for num_pages of them. 0; RKV_ROUTE_REFUSED or ENOMEM with nothing copied and
 * progress (NULL: none) as it was. Threads: any number at once through one route. */
int rkv_leaf_route_copy(const rkv_copy_route *route, rkv_copy_ids src, rkv_copy_ids dst, uint64_t num_pages,
                        rkv_copy_progress *progress);

#endif
