/* Copies of many runs; the contract is copy.h, the threads are copy_pool.c.
 *
 * A job is cut into chunks of about CHUNK_BYTES. A thread that takes a chunk walks its runs in batches:
 *
 *     walk -> [ run run run ... run | ahead ]      1. fill the batch: addresses only, neighbours merged
 *                 ^ copied            ^ prefetched  2. copy all but the last ``ahead`` runs, prefetching so far on
 *     keep the last ``ahead`` as the first of the next batch
 *
 * so that the reads of a short run are on their way long before its turn, across the ends of all loops. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "copy.h"
#include "copy_pool.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum {
    CHUNK_BYTES = 256 << 10,  /* what a thread takes at a time: small against a copy, large against taking it */
    PIECE_BYTES = 256 << 10,  /* longer runs are cut, so that threads can share one */
    RUN_COST_BYTES = 64,      /* a run takes as long as so many more bytes */
    STREAM_BYTES = 2 << 20,   /* smaller copies stay in the cache: who asked for them reads them next */
    STREAM_RUN = 64,          /* shorter runs fill no line */
    BATCH = 128,
    AHEAD_BYTES = 4 << 10,    /* how far in front of the copy its reads are started */
    MAX_AHEAD = 32,
    PREFETCH_BYTES = 1 << 10, /* of one run; further in, the machine's own prefetcher has caught on */
};

struct run {
    const char *src;
    char *dst;
    size_t bytes;
};

static inline void prefetch_run(const struct run *run)
{
    const char *end = run->src + (run->bytes < PREFETCH_BYTES ? run->bytes : PREFETCH_BYTES);
    for (const char *p = run->src; p < end; p += 64) {
        __builtin_prefetch(p, 0, 2); /* into L2: into L1 too few are under way at a time, half the speed at 128 bytes */
    }
}

#if defined(__x86_64__)
#define LANES_NAME(x) avx512_##x
#define LANES_TARGET __attribute__((target("avx512f")))
#define LANES_VECTOR __m512i
#define LANES_LOAD(p) _mm512_loadu_si512((const void *)(p))
#define LANES_STREAM(p, v) _mm512_stream_si512((void *)(p), v)
#define LANES_WIDTH 64
#include "copy_lanes.h"

#define LANES_NAME(x) avx2_##x
#define LANES_TARGET __attribute__((target("avx2")))
#define LANES_VECTOR __m256i
#define LANES_LOAD(p) _mm256_loadu_si256((const void *)(p))
#define LANES_STREAM(p, v) _mm256_stream_si256((void *)(p), v)
#define LANES_WIDTH 32
#include "copy_lanes.h"

#define LANES_NAME(x) sse2_##x
#define LANES_TARGET
#define LANES_VECTOR __m128i
#define LANES_LOAD(p) _mm_loadu_si128((const void *)(p))
#define LANES_STREAM(p, v) _mm_stream_si128((void *)(p), v)
#define LANES_WIDTH 16
#include "copy_lanes.h"
#endif

/* Ordinary stores: short runs, and copies that fit in the cache. */
static void cached_runs(const struct run *runs, size_t num, size_t known, size_t ahead)
{
    for (size_t i = 0; i < num; i++) {
        if (i + ahead < known) {
            prefetch_run(&runs[i + ahead]);
        }
        switch (runs[i].bytes) { /* the sizes of a head or a scale: not worth a call */
        case 8: memcpy(runs[i].dst, runs[i].src, 8); break;
        case 16: memcpy(runs[i].dst, runs[i].src, 16); break;
        case 32: memcpy(runs[i].dst, runs[i].src, 32); break;
        case 64: memcpy(runs[i].dst, runs[i].src, 64); break;
        default: memcpy(runs[i].dst, runs[i].src, runs[i].bytes);
        }
    }
}

typedef void (*copier)(const struct run *runs, size_t num, size_t known, size_t ahead);

static int always(void) { return 1; }
#if defined(__x86_64__)
static int has_avx512(void) { return __builtin_cpu_supports("avx512f") != 0; }
static int has_avx2(void) { return __builtin_cpu_supports("avx2") != 0; }
#endif

/* Widest first. */
static const struct lanes {
    const char *name;
    copier stream;
    int (*present)(void);
} all_lanes[] = {
#if defined(__x86_64__)
    {"avx512", avx512_stream, has_avx512},
    {"avx2", avx2_stream, has_avx2},
    {"sse2", sse2_stream, always},
#endif
    {"memcpy", cached_runs, always},
};

static const struct lanes *chosen_lanes; /* atomic; NULL: not looked for yet */

static const struct lanes *lanes(void)
{
    const struct lanes *found = __atomic_load_n(&chosen_lanes, __ATOMIC_RELAXED);
    if (!found) {
        found = all_lanes;
        while (!found->present()) {
            found++;
        }
        __atomic_store_n(&chosen_lanes, found, __ATOMIC_RELAXED);
    }
    return found;
}

const char *rkv_leaf_copy_lanes(void) { return lanes()->name; }

int rkv_leaf_copy_use_lanes(const char *name)
{
    for (size_t i = 0; i < sizeof all_lanes / sizeof all_lanes[0]; i++) {
        if (strcmp(all_lanes[i].name, name) == 0 && all_lanes[i].present()) {
            __atomic_store_n(&chosen_lanes, &all_lanes[i], __ATOMIC_RELAXED);
            return 1;
        }
    }
    return 0;
}

/* ---- walking ---- */

struct tile;

struct work {
    const rkv_copy_job *job;
    const struct tile *tile; /* or NULL */
    int small;               /* by copy_small */
    copier copy;
    uint64_t pieces_per_run, num_steps; /* a step is one piece of one run */
    uint64_t chunk_steps, chunks_per_layer, steps_per_layer;
    uint64_t *chunks_left;              /* [num_layers], atomic; NULL without progress */
    uint64_t next_layer;                /* under the progress' mutex */
    size_t ahead;
};

struct walker {
    const rkv_copy_job *job;
    uint64_t at[RKV_COPY_MAX_LOOPS]; /* position in each loop */
    uint64_t src, dst;               /* of the run at that position */
    uint64_t piece, pieces_per_run, left;
};

static void locate(struct walker *w)
{
    const rkv_copy_job *job = w->job;
    w->src = job->src_base;
    w->dst = job->dst_base;
    for (uint32_t k = 0; k < job->num_loops; k++) {
        w->src += job->loops[k].src[w->at[k]];
        w->dst += job->loops[k].dst[w->at[k]];
    }
}

static void start_at(struct walker *w, const struct work *work, uint64_t first, uint64_t count)
{
    uint64_t index = first / work->pieces_per_run;
    w->job = work->job;
    w->piece = first % work->pieces_per_run;
    w->pieces_per_run = work->pieces_per_run;
    w->left = count;
    for (uint32_t k = work->job->num_loops; k-- > 0;) {
        w->at[k] = index % work->job->loops[k].count;
        index /= work->job->loops[k].count;
    }
    locate(w);
}

/* Go to the next run: the innermost loop takes a step, a loop that ends starts over and hands the step to the one
 * around it. */
static inline void advance(struct walker *w)
{
    const rkv_copy_job *job = w->job;
    uint32_t k = job->num_loops;
    while (k-- > 0) {
        const rkv_copy_loop *loop = &job->loops[k];
        uint64_t i = w->at[k];
        if (i + 1 < loop->count) {
            w->at[k] = i + 1;
            w->src += loop->src[i + 1] - loop->src[i];
            w->dst += loop->dst[i + 1] - loop->dst[i];
            return;
        }
        w->at[k] = 0;
        w->src += loop->src[0] - loop->src[i];
        w->dst += loop->dst[0] - loop->dst[i];
    }
}

/* Append to runs[num ..] up to BATCH. Returns the new number. */
static size_t fill(struct walker *w, struct run *runs, size_t num)
{
    const uint64_t run_bytes = w->job->run_bytes;
    size_t fresh = num; /* runs before it are prefetched, and no longer grow */
    while (w->left) {
        uint64_t offset = w->piece * PIECE_BYTES, bytes = run_bytes - offset;
        bytes = bytes < PIECE_BYTES || w->pieces_per_run == 1 ? bytes : PIECE_BYTES;
        const char *src = (const char *)(uintptr_t)(w->src + offset);
        char *dst = (char *)(uintptr_t)(w->dst + offset);
        struct run *last = num > fresh ? &runs[num - 1] : NULL;
        if (last && src == last->src + last->bytes && dst == last->dst + last->bytes) {
            last->bytes += bytes;
        } else if (num == BATCH) {
            break;
        } else {
            runs[num++] = (struct run){src, dst, bytes};
        }
        w->left--;
        if (++w->piece == w->pieces_per_run) {
            w->piece = 0;
            advance(w);
        }
    }
    return num;
}

/* Under the mutex. */
static void publish(rkv_copy_progress *progress, uint64_t layers_done)
{
    if (layers_done > rkv_leaf_progress_load(progress)) {
        __atomic_store_n(&progress->layers_done, layers_done, __ATOMIC_RELEASE);
        pthread_cond_broadcast(&progress->changed);
    }
}

#include "copy_small.h"

static void report(struct work *work, uint64_t layer)
{
    rkv_copy_progress *progress = work->job->progress;
    if (__atomic_sub_fetch(&work->chunks_left[layer], 1, __ATOMIC_ACQ_REL)) {
        return;
    }
    pthread_mutex_lock(&progress->mutex);
    while (work->next_layer < work->job->num_layers &&
           __atomic_load_n(&work->chunks_left[work->next_layer], __ATOMIC_ACQUIRE) == 0) {
        work->next_layer++;
    }
    publish(progress, work->next_layer);
    pthread_mutex_unlock(&progress->mutex);
}

static void copy_batches(const struct work *work, struct walker *walker)
{
    struct run runs[BATCH];
    size_t num = 0;
    do {
        num = fill(walker, runs, num);
        size_t keep = walker->left ? (work->ahead < num ? work->ahead : num - 1) : 0;
        work->copy(runs, num - keep, num, work->ahead);
        memmove(runs, runs + num - keep, keep * sizeof runs[0]);
        num = keep;
    } while (num || walker->left);
}

static void do_chunk(void *context, uint64_t chunk)
{
    struct work *work = context;
    struct walker walker;
    uint64_t layer = chunk / work->chunks_per_layer;
    uint64_t begin = chunk % work->chunks_per_layer * work->chunk_steps;
    uint64_t count = work->steps_per_layer - begin;
    count = count < work->chunk_steps ? count : work->chunk_steps;
    start_at(&walker, work, layer * work->steps_per_layer + begin, count);
    if (work->tile) {
        copy_tiles(work->tile, work->copy, &walker);
    } else if (work->small) {
        copy_small(&walker);
    } else {
        copy_batches(work, &walker);
    }
#if defined(__x86_64__)
    _mm_sfence(); /* streaming stores are weakly ordered: what follows must not overtake them */
#endif
    if (work->chunks_left) {
        report(work, layer);
    }
}

static uint64_t count_runs(const rkv_copy_job *job)
{
    uint64_t num_runs = 1;
    for (uint32_t k = 0; k < job->num_loops; k++) {
        num_runs *= job->loops[k].count;
    }
    return num_runs;
}

uint32_t rkv_leaf_copy_threads(const rkv_copy_job *job, uint32_t most)
{
    uint64_t worth = 1 + count_runs(job) * (job->run_bytes + RUN_COST_BYTES) / CHUNK_BYTES;
    return worth < most ? (uint32_t)worth : most;
}

/* Share out the steps of work->job. 0 or ENOMEM. */
static int run_work(struct work *work)
{
    const rkv_copy_job *job = work->job;
    const uint64_t num_runs = count_runs(job), layers = job->steps_per_layer ? job->num_layers : 1;
    work->pieces_per_run = (job->run_bytes + PIECE_BYTES - 1) / PIECE_BYTES;
    work->num_steps = num_runs * work->pieces_per_run;
    work->steps_per_layer = work->num_steps / layers;
    const uint64_t step_bytes = job->run_bytes < PIECE_BYTES ? job->run_bytes : PIECE_BYTES;
    work->chunk_steps = (CHUNK_BYTES + step_bytes - 1) / step_bytes;
    work->chunks_per_layer = (work->steps_per_layer + work->chunk_steps - 1) / work->chunk_steps;
    work->ahead = AHEAD_BYTES / job->run_bytes;
    work->ahead = work->ahead < 1 ? 1 : work->ahead > MAX_AHEAD ? MAX_AHEAD : work->ahead;
    if (job->progress && job->steps_per_layer) {
        work->chunks_left = malloc(layers * sizeof(uint64_t));
        if (!work->chunks_left) {
            return ENOMEM;
        }
        for (uint64_t i = 0; i < layers; i++) {
            work->chunks_left[i] = work->chunks_per_layer;
        }
    }
    rkv_leaf_pool_run(do_chunk, work, layers * work->chunks_per_layer, job->num_threads);
    free(work->chunks_left);
    return 0;
}

/* By tiles, if the job has some. Not inlined: a tile is 40 KiB of stack. */
static __attribute__((noinline)) int run_tiles(const rkv_copy_job *job, int *done)
{
    struct tile tile;
    make_tile(&tile, job);
    if (!(*done = tile.steps > 0)) {
        return 0;
    }
    return run_work(&(struct work){.job = &tile.outer, .tile = &tile, .copy = lanes()->stream});
}

int rkv_leaf_copy(const rkv_copy_job *job)
{
    const uint64_t total = count_runs(job) * job->run_bytes;
    int error = 0, done = total == 0;
    if (!done) {
        const int stream = job->store == RKV_COPY_STREAM || (job->store == RKV_COPY_AUTO && total >= STREAM_BYTES);
        if (stream && is_small(job) && job->run_bytes < STREAM_RUN) {
            error = run_tiles(job, &done);
        }
        if (!done) {
            struct work work = {.job = job, .small = !stream && is_small(job)};
            work.copy = stream && job->run_bytes >= STREAM_RUN ? lanes()->stream : cached_runs;
            error = run_work(&work);
        }
    }
    if (!error && job->progress) {
        rkv_leaf_progress_advance(job->progress, job->num_layers);
    }
    return error;
}

/* ---- progress ---- */

int rkv_leaf_progress_init(rkv_copy_progress *progress)
{
    pthread_condattr_t attributes;
    int error = pthread_condattr_init(&attributes);
    if (error) {
        return error;
    }
    progress->layers_done = 0;
    progress->failed = 0;
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    error = pthread_cond_init(&progress->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    if (error) {
        return error;
    }
    error = pthread_mutex_init(&progress->mutex, NULL);
    if (error) {
        pthread_cond_destroy(&progress->changed);
    }
    return error;
}

void rkv_leaf_progress_destroy(rkv_copy_progress *progress)
{
    pthread_cond_destroy(&progress->changed);
    pthread_mutex_destroy(&progress->mutex);
}

uint64_t rkv_leaf_progress_load(const rkv_copy_progress *progress)
{
    return __atomic_load_n(&progress->layers_done, __ATOMIC_ACQUIRE);
}

void rkv_leaf_progress_advance(rkv_copy_progress *progress, uint64_t layers_done)
{
    pthread_mutex_lock(&progress->mutex);
    publish(progress, layers_done);
    pthread_mutex_unlock(&progress->mutex);
}

void rkv_leaf_progress_fail(rkv_copy_progress *progress)
{
    pthread_mutex_lock(&progress->mutex);
    __atomic_store_n(&progress->failed, 1, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&progress->changed);
    pthread_mutex_unlock(&progress->mutex);
}

static int reached(const rkv_copy_progress *progress, uint64_t layer)
{
    const int failed = __atomic_load_n(&progress->failed, __ATOMIC_ACQUIRE); /* first: what came before it counts */
    if (rkv_leaf_progress_load(progress) > layer) {
        return RKV_PROGRESS_DONE;
    }
    return failed ? RKV_PROGRESS_FAILED : RKV_PROGRESS_TIMEOUT;
}

int rkv_leaf_progress_wait(rkv_copy_progress *progress, uint64_t layer, uint64_t timeout_ns)
{
    struct timespec until;
    int error = 0, found = reached(progress, layer);
    if (found || !timeout_ns) {
        return found;
    }
    clock_gettime(CLOCK_MONOTONIC, &until);
    uint64_t nanoseconds = (uint64_t)until.tv_nsec + timeout_ns % 1000000000u;
    until.tv_sec += (time_t)(timeout_ns / 1000000000u + nanoseconds / 1000000000u);
    until.tv_nsec = (long)(nanoseconds % 1000000000u);
    pthread_mutex_lock(&progress->mutex);
    while (!(found = reached(progress, layer)) && error == 0) {
        error = pthread_cond_timedwait(&progress->changed, &progress->mutex, &until);
    }
    pthread_mutex_unlock(&progress->mutex);
    return found;
}
