/* Every misuse of rkv_index_*: refused with the right status, and the index is as it was. */
#include "check.h"

enum { ROOM = 64 };

static rkv_index *idx;
static int refusals;

typedef struct index_picture {
    size_t num_pages, num_holders;
    rkv_index_page pages[ROOM];
    uint32_t holders[ROOM];
    uint64_t word;
} index_picture;

static index_picture take_index_picture(rkv_node node)
{
    index_picture taken;
    memset(&taken, 0, sizeof taken);
    CHECK(rkv_index_dump(idx, taken.pages, ROOM, taken.holders, ROOM, &taken.num_pages, &taken.num_holders) == RKV_OK);
    CHECK(rkv_index_get_word(idx, node, &taken.word) == RKV_OK);
    return taken;
}

#define REFUSED(wanted, call)                                                                                         \
    do {                                                                                                              \
        index_picture before_ = take_index_picture(node), after_;                                                     \
        rkv_status got_ = (call);                                                                                     \
        CHECK(got_ == (wanted));                                                                                      \
        CHECK(rkv_last_error()[0] != 0);                                                                              \
        after_ = take_index_picture(node);                                                                            \
        CHECK(memcmp(&before_, &after_, sizeof before_) == 0);                                                        \
        CHECK(rkv_index_check_integrity(idx, NULL, 0) == RKV_OK);                                                     \
        refusals++;                                                                                                   \
    } while (0)

int main(void)
{
    const uint64_t prompt[4] = {11, 22, 33, 44}, cycle[2] = {99, 99}, strange = 55;
    uint32_t workers[4], pages[4], holders[ROOM];
    rkv_index_node nodes[4];
    rkv_index_page dumped[1];
    rkv_index_config config;
    rkv_index_stats stats;
    rkv_index_hit hit;
    rkv_index *other = NULL, *refused;
    rkv_node node = 0, stale;
    uint64_t word;
    size_t count, num_holders;

    RKV_INIT(&config);
    RKV_INIT(&stats);
    CHECK(rkv_index_create(&config, &idx) == RKV_OK && rkv_index_create(NULL, &other) == RKV_OK);
    CHECK(rkv_index_insert(idx, 1, prompt, 3, NULL, NULL) == RKV_OK && rkv_index_insert(idx, 2, prompt, 2, NULL, NULL) == RKV_OK);
    CHECK(rkv_index_insert(idx, 3, prompt + 3, 1, &strange, NULL) == RKV_OK); /* an orphan: its parent is not known */
    RKV_INIT(&hit);
    hit.workers = workers;
    hit.pages = pages;
    hit.max_workers = 4;
    hit.nodes = nodes;
    hit.max_nodes = 4;
    hit.holders = holders;
    hit.max_holders = ROOM;
    CHECK(rkv_index_find(idx, prompt, 4, &hit) == RKV_OK && hit.num_workers == 2 && hit.num_nodes >= 1);
    node = nodes[0].node;
    CHECK(rkv_index_set_word(idx, node, 4711) == RKV_OK);

    REFUSED(RKV_ERR_ARGUMENT, rkv_index_create(&config, NULL));
    config.struct_size -= 1;
    refused = other;
    REFUSED(RKV_ERR_ARGUMENT, rkv_index_create(&config, &refused));
    CHECK(refused == NULL);
    REFUSED(RKV_ERR_ARGUMENT, rkv_index_insert(NULL, 1, prompt, 3, NULL, NULL));
    REFUSED(RKV_ERR_ARGUMENT, rkv_index_insert(idx, 1, NULL, 3, NULL, NULL));
    REFUSED(RKV_ERR_ARGUMENT, rkv_index_insert(idx, RKV_INDEX_MAX_WORKERS, prompt, 3, NULL, NULL));
    REFUSED(RKV_ERR_ARGUMENT, rkv_index_insert(idx, UINT32_MAX, prompt, 3, NULL, NULL));
    REFUSED(RKV_ERR_ARGUMENT, rkv_index_insert(idx, 1, prompt, SIZE_MAX, NULL, NULL));
    REFUSED(RKV_ERR_ARGUMENT, rkv_index_insert(idx, 1, prompt + 1, 1, prompt + 2, NULL)); /* known under another parent */
    REFUSED(RKV_ERR_ARGUMENT, rkv_index_insert(idx, 1, prompt + 1, 1, NULL, NULL));
    REFUSED(RKV_ERR_ARGUMENT, rkv_index_insert(idx, 1, prompt, 1, prompt, NULL)); /* its own parent */
    REFUSED(RKV_ERR_ARGUMENT, rkv_index_insert(idx, 1, cycle, 2, NULL, NULL));
    REFUSED(RKV_ERR_ARGUMENT, rkv_index_remove(NULL, 1, prompt, 3, NULL));
    REFUSED(RKV_ERR_ARGUMENT, rkv_index_remove(idx, 1, NULL, 3, NULL));
    REFUSED(RKV_ERR_ARGUMENT, rkv_index_remove(idx, RKV_INDEX_MAX_WORKERS, prompt, 3, NULL));
    REFUSED(RKV_ERR_ARGUMENT, rkv_index_clear_worker(NULL, 1, NULL));
    REFUSED(RKV_ERR_ARGUMENT, rkv_index_clear_worker(idx, RKV_INDEX_MAX_WORKERS, NULL));
    REFUSED(RKV_ERR_ARGUMENT, rkv_index_remove_worker(NULL, 1, NULL));
    REFUSED(RKV_ERR_ARGUMENT, rkv_index_remove_worker(idx, RKV_INDEX_MAX_WORKERS, NULL));
    CHECK(rkv_index_clear_worker(idx, 77, &word) == RKV_OK && word == 0); /* nobody holds nothing */
    CHECK(rkv_index_remove(idx, 2, &strange, 1, &word) == RKV_OK && word == 0);

    REFUSED(RKV_ERR_ARGUMENT, rkv_index_find(NULL, prompt, 4, &hit));
    REFUSED(RKV_ERR_ARGUMENT, rkv_index_find(idx, NULL, 4, &hit));
    REFUSED(RKV_ERR_ARGUMENT, rkv_index_find(idx, prompt, 4, NULL));
    hit.struct_size -= 1;
    REFUSED(RKV_ERR_ARGUMENT, rkv_index_find(idx, prompt, 4, &hit));
    hit.struct_size += 1;
    hit.workers = NULL;
    REFUSED(RKV_ERR_ARGUMENT, rkv_index_find(idx, prompt, 4, &hit));
    hit.workers = workers;
    hit.max_workers = 1;
    REFUSED(RKV_ERR_CAPACITY, rkv_index_find(idx, prompt, 4, &hit));
    CHECK(hit.num_workers >= 2);
    hit.max_workers = 4;
    hit.holders = NULL; /* but room for some */
    REFUSED(RKV_ERR_ARGUMENT, rkv_index_find(idx, prompt, 4, &hit));
    hit.nodes = NULL; /* no path, so no holders either: nothing is wrong */
    CHECK(rkv_index_find(idx, prompt, 4, &hit) == RKV_OK && hit.num_holders == 0);
    hit.nodes = nodes;
    hit.holders = holders;
    hit.max_nodes = 1;
    REFUSED(RKV_ERR_CAPACITY, rkv_index_find(idx, prompt, 4, &hit));
    CHECK(hit.num_nodes >= 2);

    REFUSED(RKV_ERR_ARGUMENT, rkv_index_get_word(NULL, node, &word));
    REFUSED(RKV_ERR_ARGUMENT, rkv_index_get_word(idx, node, NULL));
    REFUSED(RKV_ERR_ARGUMENT, rkv_index_set_word(NULL, node, 1));
    REFUSED(RKV_ERR_HANDLE, rkv_index_get_word(idx, 0, &word));
    REFUSED(RKV_ERR_HANDLE, rkv_index_set_word(idx, UINT64_MAX, 1));
    CHECK(rkv_index_get_word(other, node, &word) == RKV_ERR_HANDLE);
    hit.max_nodes = 4;
    CHECK(rkv_index_find(idx, prompt, 4, &hit) == RKV_OK && hit.num_nodes == 2);
    stale = nodes[1].node; /* the third page, which only worker 1 holds */
    CHECK(rkv_index_remove(idx, 1, prompt + 2, 1, NULL) == RKV_OK);
    REFUSED(RKV_ERR_HANDLE, rkv_index_set_word(idx, stale == node ? stale + 1 : stale, 1));

    REFUSED(RKV_ERR_ARGUMENT, rkv_index_workers(NULL, workers, 4, &count));
    REFUSED(RKV_ERR_ARGUMENT, rkv_index_workers(idx, NULL, 4, &count));
    REFUSED(RKV_ERR_ARGUMENT, rkv_index_workers(idx, workers, 4, NULL));
    REFUSED(RKV_ERR_CAPACITY, rkv_index_workers(idx, workers, 1, &count));
    CHECK(count == 3);
    REFUSED(RKV_ERR_ARGUMENT, rkv_index_get_stats(NULL, &stats));
    REFUSED(RKV_ERR_ARGUMENT, rkv_index_get_stats(idx, NULL));
    stats.struct_size -= 1;
    REFUSED(RKV_ERR_ARGUMENT, rkv_index_get_stats(idx, &stats));
    REFUSED(RKV_ERR_ARGUMENT, rkv_index_dump(NULL, dumped, 1, holders, ROOM, &count, &num_holders));
    REFUSED(RKV_ERR_ARGUMENT, rkv_index_dump(idx, NULL, 1, holders, ROOM, &count, &num_holders));
    REFUSED(RKV_ERR_ARGUMENT, rkv_index_dump(idx, dumped, 1, NULL, ROOM, &count, &num_holders));
    REFUSED(RKV_ERR_ARGUMENT, rkv_index_dump(idx, dumped, 1, holders, ROOM, NULL, &num_holders));
    REFUSED(RKV_ERR_CAPACITY, rkv_index_dump(idx, dumped, 1, holders, ROOM, &count, &num_holders));
    CHECK(count > 1);
    REFUSED(RKV_ERR_ARGUMENT, rkv_index_check_integrity(NULL, NULL, 0));

    rkv_index_destroy(NULL);
    rkv_index_destroy(other);
    rkv_index_destroy(idx);
    printf("%d misuses of the index refused\n", refusals);
    return 0;
}
