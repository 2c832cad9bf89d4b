/* Copies of many contiguous runs, by threads and with streaming stores. No Python, no allocation that a caller sees.
 *
 * A copy is a nest of loops (radixkv/transfer/loops.py). The address of run (i, j, ..) is
 *     base + loops[0].src[i] + loops[1].src[j] + ..   modulo 2**64,   and so for dst; run_bytes are contiguous there.
 * Runs that follow each other on both sides are merged while walking.
 *
 * Threads: any number of threads may copy at once; each works on its own job, and the helpers of the one pool join
 * whichever job has work left. The pool starts at the first job that wants helpers, grows to the largest number wanted,
 * and stays until rkv_leaf_copy_shutdown. A child of fork has no helpers and starts its own.
 * Source and destination must not overlap. */
#ifndef RKV_COPY_H
#define RKV_COPY_H
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

enum { RKV_COPY_MAX_LOOPS = 5, RKV_COPY_MAX_THREADS = 64 };

/* How bytes are stored. AUTO streams when the copy is larger than the caches it would flush. */
enum { RKV_COPY_AUTO = 0, RKV_COPY_CACHED = 1, RKV_COPY_STREAM = 2 };

typedef struct rkv_copy_loop {
    const uint64_t *src, *dst; /* offset of each step */
    uint64_t count;
} rkv_copy_loop;

/* How many layers are complete, for readers that wait for them. Zeroed by init; one copy in its life reports to it. */
typedef struct rkv_copy_progress {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    uint64_t layers_done; /* atomic; all bytes of the layers below it are in place */
    int failed;           /* atomic; no more layers will come */
} rkv_copy_progress;

/* What a wait for a layer has come to. */
enum { RKV_PROGRESS_TIMEOUT = 0, RKV_PROGRESS_DONE = 1, RKV_PROGRESS_FAILED = 2 };

typedef struct rkv_copy_job {
    uint64_t src_base, dst_base, run_bytes;
    rkv_copy_loop loops[RKV_COPY_MAX_LOOPS]; /* outermost first */
    uint32_t num_loops;
    uint32_t num_threads;       /* 1 .. RKV_COPY_MAX_THREADS, the calling thread is one of them */
    uint32_t steps_per_layer;   /* entries of loops[0] a layer; 0: any order, progress jumps at the end */
    uint32_t num_layers;
    int store;                  /* RKV_COPY_AUTO, _CACHED or _STREAM */
    rkv_copy_progress *progress; /* or NULL */
} rkv_copy_job;

/* Run a job to its end. 0, or ENOMEM with nothing copied and its progress as it was. Fewer helpers than wanted (no
 * threads to be had) is no error. */
int rkv_leaf_copy(const rkv_copy_job *job);

/* The threads that this job is worth, 1 .. most: waking one costs as much as copying some 100 KiB. */
uint32_t rkv_leaf_copy_threads(const rkv_copy_job *job, uint32_t most);

/* Stop and join the helpers. Not while a copy runs. The next copy starts new ones. */
void rkv_leaf_copy_shutdown(void);

/* Helpers that are alive in this process. */
uint32_t rkv_leaf_copy_helpers(void);

/* "avx512", "avx2", "sse2" or "memcpy": what copies with streaming stores; at first the widest of this machine. */
const char *rkv_leaf_copy_lanes(void);

/* Take others from now on, for tests and comparisons. 0 if this machine has no such lanes, and nothing changes. */
int rkv_leaf_copy_use_lanes(const char *name);

/* 0 or an errno. Destroy after the last waiter has left. */
int rkv_leaf_progress_init(rkv_copy_progress *progress);
void rkv_leaf_progress_destroy(rkv_copy_progress *progress);

/* Say that layers_done layers are in place, unless more were already, and wake who waits. */
void rkv_leaf_progress_advance(rkv_copy_progress *progress, uint64_t layers_done);

/* Say that the layers which are not done will never be, and wake who waits. */
void rkv_leaf_progress_fail(rkv_copy_progress *progress);

/* Wait until more than ``layer`` layers are done, at most timeout_ns. Returns: RKV_PROGRESS_*; a layer that came before
 * the failure is DONE. */
int rkv_leaf_progress_wait(rkv_copy_progress *progress, uint64_t layer, uint64_t timeout_ns);

/* layers_done with acquire order: what was copied is readable. */
uint64_t rkv_leaf_progress_load(const rkv_copy_progress *progress);

#endif
