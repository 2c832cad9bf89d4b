/* A host built before the structs of rkv_index_* grew, with a library in which they have (test_growth.py builds it), and in
 * which a node slot has only 64 generations. */
#include "check.h"

/* An old struct, and what the host keeps right behind it. */
typedef struct old_hit {
    rkv_index_hit hit;
    uint64_t behind[4];
} old_hit;

typedef struct old_stats {
    rkv_index_stats stats;
    uint64_t behind[4];
} old_stats;

static void check_structs(rkv_index *idx)
{
    const uint64_t prompt[2] = {5, 6};
    uint32_t workers[2], pages[2];
    old_hit found;
    old_stats counted;
    int i;
    memset(&found, 0xA5, sizeof found);
    memset(&counted, 0xA5, sizeof counted);
    RKV_INIT(&found.hit);
    RKV_INIT(&counted.stats);
    found.hit.workers = workers;
    found.hit.pages = pages;
    found.hit.max_workers = 1;
    CHECK(rkv_index_insert(idx, 1, prompt, 2, NULL, NULL) == RKV_OK && rkv_index_insert(idx, 2, prompt, 1, NULL, NULL) == RKV_OK);
    CHECK(rkv_index_find(idx, prompt, 2, &found.hit) == RKV_ERR_CAPACITY && found.hit.num_workers == 2);
    found.hit.max_workers = 2;
    CHECK(rkv_index_find(idx, prompt, 2, &found.hit) == RKV_OK && found.hit.num_workers == 2);
    CHECK(workers[0] == 1 && pages[0] == 2 && workers[1] == 2 && pages[1] == 1);
    CHECK(rkv_index_get_stats(idx, &counted.stats) == RKV_OK && counted.stats.entries == 3 && counted.stats.workers == 2);
    CHECK(found.hit.struct_size == sizeof found.hit && counted.stats.struct_size == sizeof counted.stats);
    for (i = 0; i < 4; i++) {
        CHECK(found.behind[i] == 0xA5A5A5A5A5A5A5A5ull && counted.behind[i] == 0xA5A5A5A5A5A5A5A5ull);
    }
}

/* Use one slot more often than it has generations: no handle of it may be good again. */
static void check_generations(rkv_index *idx)
{
    enum { TIMES = 300 };
    static rkv_node given[TIMES];
    const uint64_t page = 77;
    uint32_t worker, pages, holder;
    uint64_t word;
    rkv_index_node node;
    rkv_index_hit hit;
    int i, j;
    RKV_INIT(&hit);
    hit.workers = &worker;
    hit.pages = &pages;
    hit.nodes = &node;
    hit.holders = &holder;
    hit.max_workers = hit.max_nodes = hit.max_holders = 1;
    for (i = 0; i < TIMES; i++) {
        CHECK(rkv_index_insert(idx, 1, &page, 1, NULL, NULL) == RKV_OK);
        CHECK(rkv_index_find(idx, &page, 1, &hit) == RKV_OK && rkv_index_get_word(idx, node.node, &word) == RKV_OK);
        given[i] = node.node;
        for (j = 0; j < i; j++) {
            CHECK(rkv_index_get_word(idx, given[j], &word) == RKV_ERR_HANDLE);
        }
        CHECK(rkv_index_remove(idx, 1, &page, 1, NULL) == RKV_OK);
    }
}

int main(void)
{
    rkv_index_config config;
    rkv_index *idx = NULL;
    char message[256] = "";
    RKV_INIT(&config);
    config.max_pages = 1000;
    CHECK(rkv_index_create(&config, &idx) == RKV_OK);
    check_structs(idx);
    check_generations(idx);
    CHECK(rkv_index_check_integrity(idx, message, sizeof message) == RKV_OK);
    rkv_index_destroy(idx);
    printf("an old host is served\n");
    return 0;
}
