/* What plan.c and launch.c of libradixkv_cuda share. */
#ifndef RKV_CUDA_INTERNAL_H
#define RKV_CUDA_INTERNAL_H

#include <radixkv/radixkv_cuda.h>

#include "params.h"

/* How long each struct was in ABI version 1, the least struct_size that a function accepts. Frozen: a struct that grows
 * gets no new number here, else hosts built before it would be refused. What comes after version 1 may be read only where
 * struct_size says that the caller has it. The assertions hold when a struct has grown, and fail if a field has moved. */
#define RKV_CUDA_GEOMETRY_SIZE_V1 24u
#define RKV_CUDA_VIEW_SIZE_V1 48u
#define RKV_CUDA_COPY_SIZE_V1 72u
#define RKV_CUDA_LAUNCH_SIZE_V1 264u
#define RKV_CUDA_ENDS(type, last_of_v1, size) \
    _Static_assert(offsetof(type, last_of_v1) + sizeof(((type *)0)->last_of_v1) == (size), "version 1 of " #type " is frozen")
#if defined(__LP64__)
RKV_CUDA_ENDS(rkv_cuda_geometry, page_size, RKV_CUDA_GEOMETRY_SIZE_V1);
RKV_CUDA_ENDS(rkv_cuda_view, head_stride, RKV_CUDA_VIEW_SIZE_V1);
RKV_CUDA_ENDS(rkv_cuda_copy, reserved, RKV_CUDA_COPY_SIZE_V1);
RKV_CUDA_ENDS(rkv_cuda_launch, params, RKV_CUDA_LAUNCH_SIZE_V1);
#endif

/* The kernels (rkv_cuda_fatbin.S, written by setup.py). */
extern const unsigned char rkv_cuda_fatbin[];

/* Remember the message of this thread's failure. Returns: status. */
rkv_cuda_status rkv_cuda_fail(rkv_cuda_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Everything about a copy that can be checked without a GPU. */
rkv_cuda_status rkv_cuda_check(const rkv_cuda_copy *copy);

/* Bytes from a base of a view to the end of what it reaches. The view was checked, and has pages. */
uint64_t rkv_cuda_reach(const rkv_cuda_geometry *geometry, const rkv_cuda_view *view);

/* The launch for the pages from first_page on, of a copy that was checked. */
void rkv_cuda_plan_checked(const rkv_cuda_copy *copy, uint64_t first_page, rkv_cuda_launch *out);

/* The first id of a run of consecutive ids, which no kernel need read; -1 if they are none. */
int64_t rkv_cuda_first_of_run(const void *pages, uint64_t num_pages, uint32_t index_bits);

#endif
