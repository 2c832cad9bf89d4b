/* The helpers of copy.c: threads that join whichever job has chunks left. See copy.h for their life. */
#ifndef RKV_COPY_POOL_H
#define RKV_COPY_POOL_H
#include <stdint.h>

/* Call work(context, chunk) once for each chunk below num_chunks, from this thread and up to num_threads - 1 helpers at
 * once. Returns when all calls have returned. work must not call this again. */
typedef void (*rkv_pool_work)(void *context, uint64_t chunk);
void rkv_leaf_pool_run(rkv_pool_work work, void *context, uint64_t num_chunks, uint32_t num_threads);

#endif
