/* A small pool of helper threads, shared by all copies of the process.
 *
 *     caller A: job A on its own stack -+            +- helper 1: takes chunks of job A
 *     caller B: job B                  -+-> jobs ->  +- helper 2: takes chunks of job B, then of A
 *
 * A caller puts its job in the list, works on it itself, takes it out, and waits for the helpers that are still inside:
 * so nothing depends on a helper ever waking up, and the job may live on the stack. Chunks are handed out by an atomic
 * counter. fork: the child has the calling thread alone, so it forgets helpers and jobs (those of other threads, which
 * are not there). */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "copy_pool.h"
#include "copy.h"

#include <signal.h>
#include <string.h>

struct job {
    struct job *next;
    rkv_pool_work work;
    void *context;
    uint64_t num_chunks, next_chunk; /* next_chunk: atomic */
    uint32_t wanted, inside;         /* helpers that may join, and that are at work; under the mutex */
};

static struct {
    pthread_mutex_t mutex;
    pthread_cond_t work, left; /* a job came; a helper left a job */
    struct job *jobs;
    pthread_t helpers[RKV_COPY_MAX_THREADS];
    uint32_t num_helpers;
    int stopping;
} pool = {.mutex = PTHREAD_MUTEX_INITIALIZER, .work = PTHREAD_COND_INITIALIZER, .left = PTHREAD_COND_INITIALIZER};

static void take_chunks(struct job *job)
{
    uint64_t chunk;
    while ((chunk = __atomic_fetch_add(&job->next_chunk, 1, __ATOMIC_RELAXED)) < job->num_chunks) {
        job->work(job->context, chunk);
    }
}

/* A job that a helper may join. Under the mutex. */
static struct job *open_job(void)
{
    struct job *job = pool.jobs;
    while (job && (job->wanted == 0 || __atomic_load_n(&job->next_chunk, __ATOMIC_RELAXED) >= job->num_chunks)) {
        job = job->next;
    }
    return job;
}

static void *help(void *unused)
{
    (void)unused;
    pthread_mutex_lock(&pool.mutex);
    while (!pool.stopping) {
        struct job *job = open_job();
        if (!job) {
            pthread_cond_wait(&pool.work, &pool.mutex);
            continue;
        }
        job->wanted--;
        job->inside++;
        pthread_mutex_unlock(&pool.mutex);
        take_chunks(job);
        pthread_mutex_lock(&pool.mutex);
        if (--job->inside == 0) {
            pthread_cond_broadcast(&pool.left);
        }
    }
    pthread_mutex_unlock(&pool.mutex);
    return NULL;
}

/* ---- fork ---- */
static void before_fork(void) { pthread_mutex_lock(&pool.mutex); }
static void after_fork_in_parent(void) { pthread_mutex_unlock(&pool.mutex); }

static void after_fork_in_child(void)
{
    pthread_mutex_init(&pool.mutex, NULL);
    pthread_cond_init(&pool.work, NULL);
    pthread_cond_init(&pool.left, NULL);
    pool.jobs = NULL;
    pool.num_helpers = 0;
    pool.stopping = 0;
}

static void watch_forks(void) { pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child); }

/* ---- jobs ---- */

/* Start helpers until there are ``wanted``, or no more threads to be had. Under the mutex. */
static void grow(uint32_t wanted)
{
    if (pool.num_helpers >= wanted) {
        return; /* nearly every copy: no system call */
    }
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* helpers inherit it: signals are for the threads of the program */
    while (pool.num_helpers < wanted && pthread_create(&pool.helpers[pool.num_helpers], NULL, help, NULL) == 0) {
        pool.num_helpers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void unlink_job(struct job *job)
{
    struct job **link = &pool.jobs;
    while (*link != job) {
        link = &(*link)->next;
    }
    *link = job->next;
}

void rkv_leaf_pool_run(rkv_pool_work work, void *context, uint64_t num_chunks, uint32_t num_threads)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    struct job job = {.work = work, .context = context, .num_chunks = num_chunks};
    uint64_t useful = num_threads < num_chunks ? num_threads : num_chunks;
    if (useful <= 1) {
        take_chunks(&job);
        return;
    }
    useful = useful < RKV_COPY_MAX_THREADS ? useful : RKV_COPY_MAX_THREADS;
    job.wanted = (uint32_t)useful - 1;
    pthread_once(&once, watch_forks);
    pthread_mutex_lock(&pool.mutex);
    if (!pool.stopping) {
        grow(job.wanted);
    }
    job.next = pool.jobs;
    pool.jobs = &job;
    for (uint32_t i = 0; i < job.wanted; i++) {
        pthread_cond_signal(&pool.work);
    }
    pthread_mutex_unlock(&pool.mutex);
    take_chunks(&job);
    pthread_mutex_lock(&pool.mutex);
    unlink_job(&job);
    while (job.inside) {
        pthread_cond_wait(&pool.left, &pool.mutex);
    }
    pthread_mutex_unlock(&pool.mutex);
}

void rkv_leaf_copy_shutdown(void)
{
    pthread_t helpers[RKV_COPY_MAX_THREADS];
    pthread_mutex_lock(&pool.mutex);
    uint32_t num_helpers = pool.num_helpers;
    memcpy(helpers, pool.helpers, sizeof helpers);
    pool.num_helpers = 0;
    pool.stopping = 1;
    pthread_cond_broadcast(&pool.work);
    pthread_mutex_unlock(&pool.mutex);
    for (uint32_t i = 0; i < num_helpers; i++) {
        pthread_join(helpers[i], NULL);
    }
    pthread_mutex_lock(&pool.mutex);
    pool.stopping = 0;
    pthread_mutex_unlock(&pool.mutex);
}

uint32_t rkv_leaf_copy_helpers(void)
{
    pthread_mutex_lock(&pool.mutex);
    uint32_t num_helpers = pool.num_helpers;
    pthread_mutex_unlock(&pool.mutex);
    return num_helpers;
}
