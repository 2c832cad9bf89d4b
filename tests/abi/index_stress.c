/* Threads on one prefix index: index_stress THREADS OPS SEED MAX_PAGES.
 *
 * Each thread speaks for three workers of its own, so it knows at any moment what these hold, whatever the others do: every
 * find must say exactly that of them. The prompts branch, so that threads split and join each other's nodes all the time:
 *
 *     pages 0..7 shared by four prompts, 8..11 by two, 12..23 a prompt's own
 *
 * With a bound (MAX_PAGES > 0) the index drops pages by itself: then a find may say less than that, and never more.
 */
#include "check.h"

#include <pthread.h>

enum { PROMPTS = 24, LENGTH = 24, PAGES = PROMPTS / 4 * 8 + PROMPTS / 2 * 4 + PROMPTS * 12, OWN = 3, MAX_THREADS = 16 };

typedef struct worker {
    pthread_t thread;
    uint32_t first_id;
    int num_ops;
    uint64_t random;
    unsigned char held[OWN][PAGES];
} worker;

static rkv_index *idx;
static uint32_t num_ids;
static int bounded;

static unsigned pick(worker *w, unsigned below)
{
    return (unsigned)(next_random(&w->random) >> 33) % below;
}

/* Which page of all is page i of a prompt? */
static int page_of(int prompt, int i)
{
    if (i < 8) {
        return prompt / 4 * 8 + i;
    }
    if (i < 12) {
        return PROMPTS / 4 * 8 + prompt / 2 * 4 + i - 8;
    }
    return PROMPTS / 4 * 8 + PROMPTS / 2 * 4 + prompt * 12 + i - 12;
}

static void make_keys(int prompt, uint64_t *keys)
{
    int i;
    for (i = 0; i < LENGTH; i++) {
        keys[i] = (uint64_t)(page_of(prompt, i) + 1) * 0x9e3779b97f4a7c15ull;
    }
}

static void insert(worker *w, int own)
{
    uint64_t keys[LENGTH], added = 0, expected = 0;
    int prompt = (int)pick(w, PROMPTS), first = pick(w, 3) == 0 ? (int)pick(w, LENGTH) : 0, i;
    int last = first + (int)pick(w, (unsigned)(LENGTH - first) + 1);
    make_keys(prompt, keys);
    for (i = first; i < last; i++) {
        expected += !w->held[own][page_of(prompt, i)];
        w->held[own][page_of(prompt, i)] = 1;
    }
    CHECK(rkv_index_insert(idx, w->first_id + (uint32_t)own, keys + first, (size_t)(last - first), first > 0 ? keys + first - 1 : NULL,
                           &added) == RKV_OK);
    CHECK(added == expected || (bounded && added > expected));
}

static void remove_some(worker *w, int own)
{
    uint64_t keys[LENGTH], chosen[LENGTH], removed = 0, expected = 0;
    int prompt = (int)pick(w, PROMPTS), first = (int)pick(w, LENGTH), i, count = 0;
    make_keys(prompt, keys);
    for (i = first; i < LENGTH; i++) {
        if (pick(w, 3) == 0) {
            chosen[count++] = keys[i];
            expected += w->held[own][page_of(prompt, i)];
            w->held[own][page_of(prompt, i)] = 0;
        }
    }
    CHECK(rkv_index_remove(idx, w->first_id + (uint32_t)own, chosen, (size_t)count, &removed) == RKV_OK);
    CHECK(removed == expected || (bounded && removed < expected));
}

static void clear(worker *w, int own)
{
    uint64_t removed = 0, expected = 0;
    int i;
    for (i = 0; i < PAGES; i++) {
        expected += w->held[own][i];
    }
    memset(w->held[own], 0, sizeof w->held[own]);
    CHECK((pick(w, 2) ? rkv_index_clear_worker : rkv_index_remove_worker)(idx, w->first_id + (uint32_t)own, &removed) == RKV_OK);
    CHECK(removed == expected || (bounded && removed < expected));
}

static void find(worker *w)
{
    uint64_t keys[LENGTH], word;
    uint32_t workers[MAX_THREADS * OWN], pages[MAX_THREADS * OWN], holders[LENGTH * MAX_THREADS * OWN];
    rkv_index_node nodes[LENGTH];
    rkv_index_hit hit;
    int prompt = (int)pick(w, PROMPTS), own, leading;
    size_t i;
    make_keys(prompt, keys);
    RKV_INIT(&hit);
    hit.workers = workers;
    hit.pages = pages;
    hit.max_workers = MAX_THREADS * OWN;
    if (pick(w, 4) == 0) {
        hit.nodes = nodes;
        hit.max_nodes = LENGTH;
        hit.holders = holders;
        hit.max_holders = sizeof holders / sizeof *holders;
    }
    CHECK(rkv_index_find(idx, keys, LENGTH, &hit) == RKV_OK);
    for (i = 0; i < hit.num_workers; i++) {
        CHECK(workers[i] < num_ids && pages[i] >= 1 && pages[i] <= LENGTH && (i == 0 || workers[i] > workers[i - 1]));
    }
    for (own = 0; own < OWN; own++) {
        uint32_t found = 0;
        for (leading = 0; leading < LENGTH && w->held[own][page_of(prompt, leading)]; leading++) {
        }
        for (i = 0; i < hit.num_workers; i++) {
            found = workers[i] == w->first_id + (uint32_t)own ? pages[i] : found;
        }
        CHECK(found == (uint32_t)leading || (bounded && found < (uint32_t)leading));
    }
    for (i = 0; hit.nodes != NULL && i < hit.num_nodes; i++) {
        rkv_status status = pick(w, 2) ? rkv_index_set_word(idx, nodes[i].node, pick(w, 3))
                                       : rkv_index_get_word(idx, nodes[i].node, &word);
        CHECK(status == RKV_OK || status == RKV_ERR_HANDLE); /* another thread may have joined or dropped it */
        CHECK(nodes[i].first_page + nodes[i].num_pages <= LENGTH && nodes[i].first_holder + nodes[i].num_holders <= hit.num_holders);
    }
}

static void inspect(worker *w)
{
    static const size_t room_for = PAGES;
    uint32_t ids[MAX_THREADS * OWN], *holders;
    rkv_index_page *pages;
    rkv_index_stats stats;
    size_t count, num_holders;
    char message[256] = "";
    RKV_INIT(&stats);
    switch (pick(w, 4)) {
    case 0: CHECK(rkv_index_workers(idx, ids, MAX_THREADS * OWN, &count) == RKV_OK && count <= num_ids); break;
    case 1:
        CHECK(rkv_index_get_stats(idx, &stats) == RKV_OK);
        CHECK(stats.pages <= PAGES && stats.entries <= (uint64_t)PAGES * num_ids && (bounded || stats.evicted_pages == 0));
        break;
    case 2:
        pages = room(room_for, sizeof *pages);
        holders = room(room_for * num_ids, sizeof *holders);
        CHECK(rkv_index_dump(idx, pages, room_for, holders, room_for * num_ids, &count, &num_holders) == RKV_OK);
        free(pages);
        free(holders);
        break;
    default:
        if (rkv_index_check_integrity(idx, message, sizeof message) != RKV_OK) {
            fprintf(stderr, "rkv_index_check_integrity: %s\n", message);
            abort();
        }
    }
}

static void *work(void *argument)
{
    worker *w = argument;
    int op;
    for (op = 0; op < w->num_ops; op++) {
        int own = (int)pick(w, OWN);
        unsigned choice = pick(w, 64);
        if (choice < 26) {
            find(w);
        } else if (choice < 44) {
            insert(w, own);
        } else if (choice < 60) {
            remove_some(w, own);
        } else if (choice < 62) {
            clear(w, own);
        } else {
            inspect(w);
        }
    }
    return NULL;
}

int main(int argc, char **argv)
{
    static worker workers[MAX_THREADS];
    rkv_index_config config;
    rkv_index_stats stats;
    uint64_t entries = 0;
    int num_threads, i, own, page;
    CHECK(argc == 5);
    num_threads = atoi(argv[1]);
    CHECK(num_threads > 0 && num_threads <= MAX_THREADS);
    RKV_INIT(&config);
    config.max_pages = strtoull(argv[4], NULL, 10);
    bounded = config.max_pages > 0;
    num_ids = (uint32_t)num_threads * OWN;
    CHECK(rkv_index_create(&config, &idx) == RKV_OK);
    for (i = 0; i < num_threads; i++) {
        workers[i].first_id = (uint32_t)i * OWN;
        workers[i].num_ops = atoi(argv[2]);
        workers[i].random = (strtoull(argv[3], NULL, 10) + (uint64_t)i + 1) * 0x9e3779b97f4a7c15ull;
        CHECK(pthread_create(&workers[i].thread, NULL, work, &workers[i]) == 0);
    }
    for (i = 0; i < num_threads; i++) {
        CHECK(pthread_join(workers[i].thread, NULL) == 0);
        for (own = 0; own < OWN; own++) {
            for (page = 0; page < PAGES; page++) {
                entries += workers[i].held[own][page];
            }
        }
    }
    CHECK(rkv_index_check_integrity(idx, NULL, 0) == RKV_OK);
    RKV_INIT(&stats);
    CHECK(rkv_index_get_stats(idx, &stats) == RKV_OK);
    CHECK(bounded ? stats.entries <= entries && stats.evicted_pages > 0 && stats.pages <= config.max_pages : stats.entries == entries);
    rkv_index_destroy(idx);
    printf("%d threads, %s operations each: every find was right\n", num_threads, argv[2]);
    return 0;
}
