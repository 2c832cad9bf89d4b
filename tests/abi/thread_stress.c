/* Threads doing all at once what the header says may run at once, for the thread sanitizer: thread_stress THREADS OPS SEED.
 *
 * The threads share nothing of their own but node handles (relaxed atomics, which order nothing), so that no lock of this test
 * hides a race of the library. Each draws page ids from a range of its own and never uses one twice: at the end, pages put in
 * minus duplicates minus pages that came out must be what the tree holds. */
#include "check.h"

#include <pthread.h>

enum { PAGE = 4, MAX_THREADS = 16, MAX_KEY_PAGES = 12, SHARED_HANDLES = 64, IDS_A_THREAD = 1 << 20 };

typedef struct worker {
    pthread_t thread;
    int index;
    int num_ops;
    uint64_t random;
    int32_t next_id[2];       /* device, host */
    int64_t pages_in[2];      /* that belong to the tree since a call of this thread */
    int64_t pages_out[2];
    rkv_node locked[16];
    int num_locked;
} worker;

static rkv_tree *tree;
static rkv_node handles[SHARED_HANDLES];

static unsigned pick(worker *w, unsigned below)
{
    return (unsigned)(next_random(&w->random) >> 33) % below;
}

static rkv_node any_handle(worker *w)
{
    return __atomic_load_n(&handles[pick(w, SHARED_HANDLES)], __ATOMIC_RELAXED);
}

static void keep_handle(worker *w, rkv_node node)
{
    __atomic_store_n(&handles[pick(w, SHARED_HANDLES)], node, __ATOMIC_RELAXED);
}

/* Another thread may have taken the node away or changed it: all that is an answer. */
static void check_status(rkv_status status)
{
    CHECK(status == RKV_OK || status == RKV_ERR_HANDLE || status == RKV_ERR_STATE || status == RKV_ERR_LOCK || status == RKV_ERR_ARGUMENT);
    CHECK(status == RKV_OK || rkv_last_error()[0] != 0);
}

static rkv_key random_key(worker *w, int32_t *tokens)
{
    size_t num_pages = pick(w, MAX_KEY_PAGES + 1), i;
    for (i = 0; i < num_pages * PAGE; i++) {
        tokens[i] = i % PAGE == 0 ? (int32_t)pick(w, 2) : 7;
    }
    return key_of(pick(w, 4) == 0 ? "tenant" : NULL, tokens, num_pages * PAGE);
}

static void fresh_ids(worker *w, int tier, int32_t *ids, size_t count)
{
    size_t i;
    CHECK(w->next_id[tier] + (int32_t)count <= (w->index + 1) * IDS_A_THREAD);
    for (i = 0; i < count; i++) {
        ids[i] = w->next_id[tier]++;
    }
}

static void count_freed(worker *w, rkv_status status, const rkv_freed *freed)
{
    check_status(status);
    if (status == RKV_OK) {
        w->pages_out[0] += (int64_t)freed->num_pages;
        w->pages_out[1] += (int64_t)freed->num_host_pages;
    }
}

static void insert(worker *w, int host)
{
    int32_t tokens[MAX_KEY_PAGES * PAGE], ids[MAX_KEY_PAGES], duplicates[MAX_KEY_PAGES];
    rkv_key key = random_key(w, tokens);
    size_t num_pages = key.num_tokens / PAGE;
    rkv_match hint;
    rkv_insert out;
    int hinted = pick(w, 3) == 0;
    RKV_INIT(&out);
    RKV_INIT(&hint);
    if (hinted) {
        CHECK(rkv_tree_match(tree, &key, NULL, &hint) == RKV_OK); /* may be stale a moment later */
    }
    fresh_ids(w, host, ids, num_pages);
    CHECK((host ? rkv_tree_insert_host : rkv_tree_insert)(tree, &key, ids, num_pages, hinted ? &hint : NULL, (int32_t)pick(w, 3),
                                                         duplicates, &out) == RKV_OK);
    w->pages_in[host] += (int64_t)(num_pages - out.num_duplicates);
    keep_handle(w, out.node);
}

static void look_up(worker *w)
{
    int32_t tokens[MAX_KEY_PAGES * PAGE], page_ids[MAX_KEY_PAGES * 2], more[PAGE] = {1, 7, 7, 7};
    rkv_key keys[2];
    rkv_match match[2], longer;
    keys[0] = keys[1] = random_key(w, tokens);
    RKV_INIT(&match[0]);
    RKV_INIT(&longer);
    match[1] = match[0];
    CHECK(rkv_tree_peek(tree, keys, page_ids, match) == RKV_OK);
    CHECK(rkv_tree_peek_many(tree, keys, 2, match) == RKV_OK);
    CHECK(match[0].num_tokens == match[1].num_tokens && match[0].host_node == match[1].host_node); /* one moment, one answer */
    CHECK(rkv_tree_match(tree, keys, page_ids, match) == RKV_OK);
    CHECK(match[0].num_tokens + match[0].host_num_tokens <= (int64_t)keys[0].num_tokens);
    keys[1].tokens = more;
    keys[1].num_tokens = PAGE;
    check_status(rkv_tree_match_extend(tree, match, &keys[1], page_ids, &longer));
    keep_handle(w, match[0].device_node);
    keep_handle(w, match[0].host_node);
}

static void lock_or_unlock(worker *w)
{
    rkv_node node = any_handle(w);
    int64_t delta;
    if (w->num_locked < 16 && pick(w, 2) == 0) {
        rkv_status status = rkv_tree_lock(tree, node, &delta);
        check_status(status);
        if (status == RKV_OK) {
            CHECK(delta <= 0);
            w->locked[w->num_locked++] = node;
        }
    } else if (w->num_locked > 0) {
        /* what is locked stays: nobody can have taken it away, nor the lock */
        CHECK(rkv_tree_unlock(tree, w->locked[--w->num_locked], &delta) == RKV_OK && delta >= 0);
    }
}

static void evict(worker *w, rkv_freed *freed)
{
    rkv_node nodes[32];
    size_t num_pages[32];
    int32_t ids[MAX_KEY_PAGES];
    uint64_t count, i;
    rkv_status status;
    if (pick(w, 3) == 0) {
        count_freed(w, rkv_tree_evict_host(tree, (int64_t)pick(w, 40), freed), freed);
        return;
    }
    status = rkv_tree_evict(tree, (int64_t)pick(w, 60), (int32_t)pick(w, 2), freed);
    CHECK(status == RKV_OK);
    count_freed(w, status, freed);
    count = freed->num_backups;
    for (i = 0; i < count; i++) { /* those that do not fit our list are given up at once, which frees into another object */
        CHECK(freed->backups[i].num_pages <= MAX_KEY_PAGES);
        if (i < 32) {
            nodes[i] = freed->backups[i].node;
            num_pages[i] = (size_t)freed->backups[i].num_pages;
        }
    }
    CHECK(count <= 32);
    for (i = 0; i < count; i++) {
        if (pick(w, 3) == 0) {
            status = rkv_tree_finish_backup(tree, nodes[i], NULL, 0, freed);
        } else {
            fresh_ids(w, 1, ids, num_pages[i]);
            status = rkv_tree_finish_backup(tree, nodes[i], ids, num_pages[i], freed);
            w->pages_in[1] += (int64_t)num_pages[i];
        }
        CHECK(status == RKV_OK); /* only this thread knows that it is pending, and nothing else may delete it */
        count_freed(w, status, freed);
    }
}

static void two_tiers(worker *w, rkv_freed *freed)
{
    rkv_node node = any_handle(w);
    rkv_node_info info;
    int32_t ids[MAX_KEY_PAGES];
    size_t num_pages;
    rkv_status status;
    RKV_INIT(&info);
    status = rkv_tree_node_info(tree, node, &info);
    check_status(status);
    num_pages = (size_t)info.num_tokens / PAGE;
    if (status != RKV_OK || num_pages == 0) {
        return;
    }
    if (info.on_device) {
        fresh_ids(w, 1, ids, num_pages);
        status = rkv_tree_set_host(tree, node, ids, num_pages);
        w->pages_in[1] += status == RKV_OK ? (int64_t)num_pages : 0;
        check_status(status);
    } else {
        fresh_ids(w, 0, ids, num_pages);
        status = rkv_tree_set_device(tree, node, ids, num_pages, 1);
        w->pages_in[0] += status == RKV_OK ? (int64_t)num_pages : 0;
        check_status(status);
        if (status == RKV_OK) {
            status = rkv_tree_finish_load(tree, node, (int32_t)pick(w, 2), freed);
            count_freed(w, status, freed);
            if (status == RKV_ERR_LOCK) { /* somebody uses it already */
                count_freed(w, rkv_tree_finish_load(tree, node, 1, freed), freed);
            }
        }
    }
}

static void inspect(worker *w)
{
    rkv_node node = any_handle(w), all[256], upper;
    int32_t tokens[MAX_KEY_PAGES * PAGE], ids[MAX_KEY_PAGES], host_ids[MAX_KEY_PAGES];
    rkv_event events[8];
    rkv_tree_stats stats;
    uint64_t keys[MAX_KEY_PAGES], removed;
    uint8_t digests[MAX_KEY_PAGES * 8];
    char ns[16];
    size_t count;
    rkv_status status;
    RKV_INIT(&stats);
    switch (pick(w, 11)) {
    case 9: check_status(rkv_tree_mark(tree, node, 1u << pick(w, 8), 0, pick(w, 3))); break;
    case 10:
        check_status(rkv_tree_path(tree, node, all, 256, &count));
        check_status(rkv_tree_host_path(tree, node, all, 256, &count));
        check_status(rkv_tree_due(tree, node, (int32_t)pick(w, 2), pick(w, 3), pick(w, 256), all, 256, &count));
        break;
    case 0: check_status(rkv_tree_node_data(tree, node, MAX_KEY_PAGES, tokens, ids, host_ids)); break;
    case 1: check_status(rkv_tree_node_namespace(tree, node, ns, sizeof ns, &count)); break;
    case 2: check_status(rkv_tree_page_keys(tree, node, keys, MAX_KEY_PAGES, &count)); break;
    case 3: check_status(rkv_tree_page_digests(tree, node, digests, MAX_KEY_PAGES, &count)); break;
    case 4:
        status = rkv_tree_nodes(tree, all, 256, &count);
        CHECK(status == RKV_OK || status == RKV_ERR_CAPACITY);
        break;
    case 5: CHECK(rkv_tree_get_stats(tree, &stats) == RKV_OK); break;
    case 6: CHECK(rkv_tree_take_events(tree, events, tokens, 8, &count) == RKV_OK); break;
    case 7: check_status(rkv_tree_split_at(tree, node, PAGE, &upper)); break;
    default: /* pins protect and let go, on a clock of 1,000 */
        check_status(rkv_tree_pin(tree, node, (int64_t)pick(w, 1000), NULL));
        CHECK(rkv_tree_expire(tree, (int64_t)pick(w, 1000), &removed) == RKV_OK);
        check_status(rkv_tree_unpin(tree, node, NULL));
    }
    if (pick(w, 16) == 0) {
        check_integrity(tree);
    }
}

static void *work(void *argument)
{
    worker *w = argument;
    rkv_freed freed;
    int op;
    RKV_INIT(&freed);
    for (op = 0; op < w->num_ops; op++) {
        switch (pick(w, 12)) {
        case 0: case 1: case 2: insert(w, 0); break;
        case 3: insert(w, 1); break;
        case 4: case 5: look_up(w); break;
        case 6: case 7: lock_or_unlock(w); break;
        case 8: evict(w, &freed); break;
        case 9: two_tiers(w, &freed); break;
        default: inspect(w);
        }
        if (pick(w, 400) == 0) {
            count_freed(w, rkv_tree_delete(tree, any_handle(w), &freed), &freed);
        }
    }
    while (w->num_locked > 0) {
        CHECK(rkv_tree_unlock(tree, w->locked[--w->num_locked], NULL) == RKV_OK);
    }
    rkv_freed_release(&freed);
    return NULL;
}

int main(int argc, char **argv)
{
    static worker workers[MAX_THREADS];
    rkv_tree_config config;
    rkv_tree_stats stats;
    int64_t pages[2] = {0, 0};
    int num_threads, i, tier;
    CHECK(argc == 4);
    num_threads = atoi(argv[1]);
    CHECK(num_threads > 0 && num_threads <= MAX_THREADS);
    RKV_INIT(&config);
    config.page_size = PAGE;
    config.flags = RKV_TREE_EVENTS;
    config.max_events = 1000;
    CHECK(rkv_tree_create(&config, &tree) == RKV_OK);
    for (i = 0; i < num_threads; i++) {
        workers[i].index = i;
        workers[i].num_ops = atoi(argv[2]);
        workers[i].random = (strtoull(argv[3], NULL, 10) + (uint64_t)i + 1) * 0x9e3779b97f4a7c15ull;
        workers[i].next_id[0] = workers[i].next_id[1] = i * IDS_A_THREAD;
        CHECK(pthread_create(&workers[i].thread, NULL, work, &workers[i]) == 0);
    }
    for (i = 0; i < num_threads; i++) {
        CHECK(pthread_join(workers[i].thread, NULL) == 0);
        for (tier = 0; tier < 2; tier++) {
            pages[tier] += workers[i].pages_in[tier] - workers[i].pages_out[tier];
        }
    }
    check_integrity(tree);
    RKV_INIT(&stats);
    CHECK(rkv_tree_get_stats(tree, &stats) == RKV_OK);
    CHECK(stats.evictable_tokens + stats.protected_tokens == pages[0] * PAGE);
    CHECK(stats.host_tokens == pages[1] * PAGE);
    CHECK(stats.pending_tokens == 0);
    rkv_tree_destroy(tree);
    printf("%d threads, %s operations each: no page lost\n", num_threads, argv[2]);
    return 0;
}
