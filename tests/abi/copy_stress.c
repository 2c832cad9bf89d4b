/* The copier of csrc/src/copy.h by itself, for the sanitizers: copy_stress THREADS COPIES SEED.
 *
 * 1. Random nests of loops against a naive walk of the same nest, with heap blocks of exactly the bytes that may be touched, so
 *    that a byte too far is an error; every set of lanes this machine has.
 * 2. THREADS threads copying at once through the shared helpers, with a reader a thread that follows the layers.
 * 3. A layer is reported before the next is written.
 * 4. Routes: random page ids, right and wrong, against a naive copy and naive rules.
 * 5. A failure wakes who waits.
 * 6. Children of fork that copy while other threads are at it. */
#define _GNU_SOURCE
#include "copy_route.h"
#include "check.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAX_THREADS = 16, MAX_STEPS = 7, LAYERS = 5 };

typedef struct nest {
    uint64_t src_table[RKV_COPY_MAX_LOOPS][MAX_STEPS], dst_table[RKV_COPY_MAX_LOOPS][MAX_STEPS];
    unsigned char *src, *dst, *expected;
    size_t num_bytes;
    rkv_copy_job job;
} nest;

static unsigned below(uint64_t *random, unsigned limit) { return (unsigned)(next_random(random) >> 33) % limit; }

static void shuffle(uint64_t *random, uint64_t *table, uint64_t count)
{
    for (uint64_t i = count; i-- > 1;) {
        uint64_t j = below(random, (unsigned)i + 1), kept = table[i];
        table[i] = table[j];
        table[j] = kept;
    }
}

/* A nest in which each run has bytes of its own on both sides, filling both blocks: step i of a loop is i times all that the
 * loops inside it cover, in another order of the loops on each side, and some loops shuffled. */
static void make_nest(nest *n, uint64_t *random, unsigned max_run)
{
    rkv_copy_job *job = &n->job;
    uint32_t order[RKV_COPY_MAX_LOOPS];
    uint64_t extent;
    memset(n, 0, sizeof *n);
    job->num_loops = below(random, RKV_COPY_MAX_LOOPS + 1);
    switch (below(random, 4)) {
    case 0: job->run_bytes = 64u * (1 + below(random, 4)); break;
    case 1: job->run_bytes = 8u << below(random, 4); break; /* sizes with copiers of their own */
    default: job->run_bytes = 1 + below(random, max_run);
    }
    if (below(random, 100) == 0) { /* longer than the pieces that threads share */
        job->num_loops = below(random, 2);
        job->run_bytes = 500000 + below(random, 100000);
    }
    for (uint32_t k = 0; k < job->num_loops; k++) {
        order[k] = k;
        job->loops[k].count = 1 + below(random, MAX_STEPS);
        job->loops[k].src = n->src_table[k];
        job->loops[k].dst = n->dst_table[k];
    }
    if (job->num_loops && below(random, 2)) { /* the first loop is layers, of one or two steps each */
        job->steps_per_layer = 1 + below(random, 2);
        job->num_layers = LAYERS / job->steps_per_layer;
        job->loops[0].count = (uint64_t)job->num_layers * job->steps_per_layer;
    } else {
        job->num_layers = 1;
    }
    for (int side = 0; side < 2; side++) {
        extent = job->run_bytes;
        for (uint32_t left = job->num_loops; left-- > 0;) {
            uint32_t at = side && below(random, 2) ? below(random, left + 1) : left, k = order[at];
            uint64_t *table = side ? n->dst_table[k] : n->src_table[k];
            for (uint64_t i = 0; i < job->loops[k].count; i++) {
                table[i] = i * extent;
            }
            if (below(random, 2)) {
                shuffle(random, table, job->loops[k].count);
            }
            extent *= job->loops[k].count;
            order[at] = order[left];
        }
        for (uint32_t k = 0; k < job->num_loops; k++) {
            order[k] = k;
        }
    }
    n->num_bytes = extent;
    n->src = malloc(extent);
    n->dst = malloc(extent);
    n->expected = malloc(extent);
    CHECK(n->src && n->dst && n->expected);
    for (size_t i = 0; i < extent; i++) {
        n->src[i] = (unsigned char)(next_random(random) >> 40);
    }
    memset(n->dst, 0xa5, extent);
    memset(n->expected, 0xa5, extent);
    job->src_base = (uint64_t)(uintptr_t)n->src;
    job->dst_base = (uint64_t)(uintptr_t)n->dst;
    job->num_threads = 1 + below(random, 4);
    job->store = (int)below(random, 3);
}

static void walk(nest *n, uint32_t k, uint64_t src, uint64_t dst)
{
    if (k == RKV_COPY_MAX_LOOPS || k >= n->job.num_loops) {
        memcpy(n->expected + dst, n->src + src, n->job.run_bytes);
        return;
    }
    for (uint64_t i = 0; i < n->job.loops[k].count; i++) {
        walk(n, k + 1, src + n->src_table[k][i], dst + n->dst_table[k][i]);
    }
}

static void free_nest(nest *n)
{
    free(n->src);
    free(n->dst);
    free(n->expected);
}

/* ---- a reader that follows the layers ---- */
typedef struct reader {
    const nest *n;
    rkv_copy_progress progress;
    uint64_t sum; /* of the bytes that it saw in place */
} reader;

static uint64_t sum_of_layer(const nest *n, uint32_t layer, const unsigned char *block)
{
    uint64_t sum = 0, index[RKV_COPY_MAX_LOOPS] = {0};
    const rkv_copy_job *job = &n->job;
    for (uint32_t step = 0; step < job->steps_per_layer; step++) {
        memset(index, 0, sizeof index);
        index[0] = (uint64_t)layer * job->steps_per_layer + step;
        for (;;) {
            uint64_t at = 0;
            uint32_t k = job->num_loops;
            for (uint32_t i = 0; i < job->num_loops; i++) {
                at += n->dst_table[i][index[i]];
            }
            for (uint64_t i = 0; i < job->run_bytes; i++) {
                sum += block[at + i];
            }
            while (k-- > 1 && ++index[k] == job->loops[k].count) {
                index[k] = 0;
            }
            if (k == 0 || job->num_loops == 1) {
                break;
            }
        }
    }
    return sum;
}

static void *follow(void *context)
{
    reader *r = context;
    for (uint32_t layer = 0; layer < r->n->job.num_layers; layer++) {
        while (rkv_leaf_progress_wait(&r->progress, layer, 1000000) != RKV_PROGRESS_DONE) {
        }
        if (r->n->job.steps_per_layer) {
            r->sum += sum_of_layer(r->n, layer, r->n->dst);
        }
    }
    return NULL;
}

static void copy_and_check(nest *n, uint64_t *random)
{
    reader r = {.n = n};
    pthread_t thread;
    int followed = below(random, 2) == 0;
    uint64_t expected_sum = 0;
    walk(n, 0, 0, 0);
    if (followed) {
        CHECK(rkv_leaf_progress_init(&r.progress) == 0);
        n->job.progress = &r.progress;
        CHECK(pthread_create(&thread, NULL, follow, &r) == 0);
    }
    CHECK(rkv_leaf_copy(&n->job) == 0);
    if (followed) {
        CHECK(rkv_leaf_progress_load(&r.progress) == n->job.num_layers);
        CHECK(pthread_join(thread, NULL) == 0);
        for (uint32_t layer = 0; n->job.steps_per_layer && layer < n->job.num_layers; layer++) {
            expected_sum += sum_of_layer(n, layer, n->expected);
        }
        CHECK(r.sum == expected_sum);
        CHECK(!rkv_leaf_progress_wait(&r.progress, n->job.num_layers, 1000));
        rkv_leaf_progress_destroy(&r.progress);
    }
    CHECK(memcmp(n->dst, n->expected, n->num_bytes) == 0);
}

typedef struct worker {
    pthread_t thread;
    uint64_t random;
    int num_copies;
} worker;

static void *work(void *context)
{
    worker *w = context;
    for (int i = 0; i < w->num_copies; i++) {
        nest n;
        make_nest(&n, &w->random, i % 50 ? 300 : 4000);
        copy_and_check(&n, &w->random);
        free_nest(&n);
    }
    return NULL;
}

/* ---- a layer is reported as soon as it is in place: the last one is write-protected, and the fault looks ---- */
#if !defined(__SANITIZE_THREAD__)
static struct {
    rkv_copy_progress progress;
    char *last;
    size_t num_bytes;
    uint64_t done_before; /* layers_done when the first byte of the last layer was about to be written */
    volatile sig_atomic_t faults;
} guarded;

static void on_fault(int signal)
{
    (void)signal;
    guarded.done_before = rkv_leaf_progress_load(&guarded.progress);
    guarded.faults++;
    mprotect(guarded.last, guarded.num_bytes, PROT_READ | PROT_WRITE);
}

static void check_reports_in_time(void)
{
    enum { LAYER_BYTES = 1 << 16 };
    uint64_t table[LAYERS];
    struct sigaction action = {.sa_handler = on_fault}, before;
    rkv_copy_job job = {.run_bytes = LAYER_BYTES, .num_loops = 1, .num_threads = 1, .steps_per_layer = 1, .num_layers = LAYERS};
    char *dst = mmap(NULL, LAYERS * LAYER_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *src = malloc(LAYERS * LAYER_BYTES);
    CHECK(dst != MAP_FAILED && src);
    memset(src, 3, LAYERS * LAYER_BYTES);
    for (uint64_t i = 0; i < LAYERS; i++) {
        table[i] = i * LAYER_BYTES;
    }
    job.src_base = (uint64_t)(uintptr_t)src;
    job.dst_base = (uint64_t)(uintptr_t)dst;
    job.loops[0] = (rkv_copy_loop){table, table, LAYERS};
    job.progress = &guarded.progress;
    guarded.last = dst + (LAYERS - 1) * LAYER_BYTES;
    guarded.num_bytes = LAYER_BYTES;
    CHECK(rkv_leaf_progress_init(&guarded.progress) == 0);
    CHECK(sigaction(SIGSEGV, &action, &before) == 0 && mprotect(guarded.last, LAYER_BYTES, PROT_READ) == 0);
    CHECK(rkv_leaf_copy(&job) == 0);
    CHECK(sigaction(SIGSEGV, &before, NULL) == 0);
    CHECK(guarded.faults == 1 && guarded.done_before == LAYERS - 1);
    CHECK(rkv_leaf_progress_load(&guarded.progress) == LAYERS && memcmp(src, dst, LAYERS * LAYER_BYTES) == 0);
    rkv_leaf_progress_destroy(&guarded.progress);
    free(src);
    munmap(dst, LAYERS * LAYER_BYTES);
}
#else
static void check_reports_in_time(void) {}
#endif

/* ---- routes: pages of PAGE_BYTES in two layers, two views of which may be one pool ---- */
enum { POOL_PAGES = 300, PAGE_BYTES = 24, POOL_BYTES = 2 * POOL_PAGES * PAGE_BYTES };

typedef struct page_ids {
    int64_t wide[POOL_PAGES + 1];
    int32_t narrow[POOL_PAGES + 1];
    uint64_t count;
} page_ids;

static void draw_ids(page_ids *ids, uint64_t *random, uint64_t count, uint64_t wrong)
{
    uint64_t table[POOL_PAGES + 1];
    for (uint64_t i = 0; i <= POOL_PAGES; i++) {
        table[i] = i % POOL_PAGES;
    }
    if (below(random, 3)) {
        shuffle(random, table, POOL_PAGES);
    }
    ids->count = count;
    for (uint64_t i = 0; i < count; i++) {
        ids->wide[i] = (int64_t)table[i];
    }
    if (wrong && count) {
        const int64_t choices[] = {-1, POOL_PAGES, INT32_MIN, INT32_MAX, ids->wide[0], ids->wide[count - 1]};
        ids->wide[below(random, (unsigned)count)] = choices[below(random, 6)];
    }
    for (uint64_t i = 0; i < count; i++) {
        ids->narrow[i] = (int32_t)ids->wide[i];
    }
}

static int allowed(const page_ids *src, const page_ids *dst, int one_pool)
{
    for (uint64_t i = 0; i < dst->count; i++) {
        if (src->wide[i] < 0 || src->wide[i] >= POOL_PAGES || dst->wide[i] < 0 || dst->wide[i] >= POOL_PAGES) {
            return 0;
        }
        for (uint64_t j = 0; j < dst->count; j++) {
            if ((j != i && dst->wide[i] == dst->wide[j]) || (one_pool && src->wide[j] == dst->wide[i])) {
                return 0;
            }
        }
    }
    return 1;
}

static void check_routes(uint64_t seed, int num_copies)
{
    static const uint64_t layers[2] = {0, POOL_PAGES * PAGE_BYTES};
    uint64_t random = seed;
    int refused = 0;
    unsigned char *a = malloc(POOL_BYTES), *b = malloc(POOL_BYTES), *expected = malloc(POOL_BYTES);
    page_ids *src = malloc(sizeof *src), *dst = malloc(sizeof *dst);
    CHECK(a && b && expected && src && dst);
    for (int n = 0; n < num_copies; n++) {
        int one_pool = below(&random, 4) == 0, hole = (int)below(&random, 2);
        uint64_t count = below(&random, 4) ? below(&random, 20) : below(&random, POOL_PAGES + 2);
        unsigned char *to = one_pool ? a : b;
        rkv_copy_route route = {.hole = (uint32_t)hole, .one_pool = one_pool, .src_num_pages = POOL_PAGES,
                                .dst_num_pages = POOL_PAGES, .src_page_stride = PAGE_BYTES, .dst_page_stride = PAGE_BYTES};
        rkv_copy_ids from_ids = {src->wide, 64}, to_ids = {dst->narrow, 32};
        rkv_copy_progress progress;
        draw_ids(src, &random, count, below(&random, 8) == 0);
        draw_ids(dst, &random, count, below(&random, 8) == 0);
        route.job = (rkv_copy_job){.src_base = (uint64_t)(uintptr_t)a, .dst_base = (uint64_t)(uintptr_t)to,
                                   .run_bytes = PAGE_BYTES, .num_loops = 2, .num_threads = 1 + below(&random, 3),
                                   .steps_per_layer = (uint32_t)hole, .num_layers = 2};
        route.job.loops[!hole] = (rkv_copy_loop){layers, layers, 2};
        for (int i = 0; i < POOL_BYTES; i++) {
            a[i] = (unsigned char)(next_random(&random) >> 40);
            b[i] = 0xa5;
        }
        memcpy(expected, to, POOL_BYTES);
        int fine = allowed(src, dst, one_pool);
        for (uint64_t i = 0; fine && i < count; i++) {
            for (int layer = 0; layer < 2; layer++) {
                memcpy(expected + layers[layer] + dst->wide[i] * PAGE_BYTES, a + layers[layer] + src->wide[i] * PAGE_BYTES,
                       PAGE_BYTES);
            }
        }
        CHECK(rkv_leaf_progress_init(&progress) == 0);
        int status = rkv_leaf_route_copy(&route, from_ids, to_ids, count, &progress);
        CHECK(status == (fine ? 0 : RKV_ROUTE_REFUSED));
        CHECK(rkv_leaf_progress_load(&progress) == (fine ? 2u : 0u));
        CHECK(memcmp(to, expected, POOL_BYTES) == 0);
        rkv_leaf_progress_destroy(&progress);
        refused += !fine;
    }
    CHECK(refused > num_copies / 20 && refused < num_copies);
    free(a), free(b), free(expected), free(src), free(dst);
}

static void *await_failure(void *context)
{
    CHECK(rkv_leaf_progress_wait(context, 1, 60000000000u) == RKV_PROGRESS_FAILED);
    return NULL;
}

static void check_failure(void)
{
    rkv_copy_progress progress;
    pthread_t threads[3];
    CHECK(rkv_leaf_progress_init(&progress) == 0);
    for (int i = 0; i < 3; i++) {
        CHECK(pthread_create(&threads[i], NULL, await_failure, &progress) == 0);
    }
    rkv_leaf_progress_advance(&progress, 1);
    rkv_leaf_progress_fail(&progress);
    for (int i = 0; i < 3; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
    }
    CHECK(rkv_leaf_progress_wait(&progress, 0, 0) == RKV_PROGRESS_DONE);
    CHECK(rkv_leaf_progress_wait(&progress, 1, 0) == RKV_PROGRESS_FAILED);
    rkv_leaf_progress_destroy(&progress);
}

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
enum { CHILDREN = 0 }; /* their allocators may be locked for ever in the child of a process with threads */
#else
enum { CHILDREN = 5 };
#endif

int main(int argc, char **argv)
{
    static const char *const names[] = {"avx512", "avx2", "sse2", "memcpy"};
    worker workers[MAX_THREADS];
    int num_threads = argc > 1 ? atoi(argv[1]) : 4, num_copies = argc > 2 ? atoi(argv[2]) : 400, num_lanes = 0;
    uint64_t seed = argc > 3 ? (uint64_t)atoll(argv[3]) : 1;
    CHECK(num_threads >= 1 && num_threads <= MAX_THREADS);
    CHECK(!rkv_leaf_copy_use_lanes("none"));
    for (unsigned i = 0; i < sizeof names / sizeof names[0]; i++) {
        worker alone = {.random = seed + i, .num_copies = num_copies};
        if (rkv_leaf_copy_use_lanes(names[i])) {
            CHECK(strcmp(rkv_leaf_copy_lanes(), names[i]) == 0);
            work(&alone);
            num_lanes++;
        }
    }
    check_reports_in_time();
    check_routes(seed, 2 * num_copies);
    check_failure();
    for (int i = 0; i < num_threads; i++) {
        workers[i] = (worker){.random = seed * 1000 + (uint64_t)i, .num_copies = num_copies};
        CHECK(pthread_create(&workers[i].thread, NULL, work, &workers[i]) == 0);
    }
    for (int i = 0; i < CHILDREN; i++) {
        int status;
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            worker alone = {.random = seed + 77, .num_copies = 20};
            CHECK(rkv_leaf_copy_helpers() == 0);
            work(&alone);
            rkv_leaf_copy_shutdown();
            _exit(0);
        }
        CHECK(waitpid(child, &status, 0) == child && status == 0);
    }
    for (int i = 0; i < num_threads; i++) {
        CHECK(pthread_join(workers[i].thread, NULL) == 0);
    }
    CHECK(rkv_leaf_copy_helpers() == 3); /* four threads a copy at most */
    rkv_leaf_copy_shutdown();
    CHECK(rkv_leaf_copy_helpers() == 0);
    printf("%d threads, %d copies each, %d kinds of lanes\n", num_threads, num_copies, num_lanes);
    return 0;
}
