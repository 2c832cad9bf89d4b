/* What plan.c and launch.c of libradixkv_cuda share. */
#ifndef RKV_CUDA_INTERNAL_H
#define RKV_CUDA_INTERNAL_H

#include <radixkv/radixkv_cuda.h>

#include "params.h"

/* The kernels (rkv_cuda_fatbin.S, written by setup.py). */
extern const unsigned char rkv_cuda_fatbin[];

/* Remember the message of this thread's failure. Returns: status. */
rkv_cuda_status rkv_cuda_fail(rkv_cuda_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Everything about a copy that can be checked without a GPU. */
rkv_cuda_status rkv_cuda_check(const rkv_cuda_copy *copy);

/* The launch for the pages from first_page on, of a copy that was checked. */
void rkv_cuda_plan_checked(const rkv_cuda_copy *copy, uint64_t first_page, rkv_cuda_launch *out);

/* The first id of a run of consecutive ids, which no kernel need read; -1 if they are none. */
int64_t rkv_cuda_first_of_run(const void *pages, uint64_t num_pages, uint32_t index_bits);

#endif
