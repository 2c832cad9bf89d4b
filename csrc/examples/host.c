/* A C99 host that links the plugin. Build and run:
 *
 *   cc -std=c99 host.c $(pkg-config --cflags --libs radixkv) -Wl,-rpath,$(pkg-config --variable=libdir radixkv) && ./a.out
 *
 * with PKG_CONFIG_PATH naming the folder lib/pkgconfig beside the path that radixkv.get_library_path() returns.
 *
 * The engine has 16 device pages of 4 tokens. Two prompts share their first 8 tokens. */
#include <radixkv/radixkv.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PAGE = 4, CAPACITY = 16, TOKENS = 16, PAGES = TOKENS / PAGE };

/* Stop at the first surprise, and say what the library says. */
static void expect(int fine, const char *what)
{
    if (!fine) {
        fprintf(stderr, "host.c: %s (last error: %s)\n", what, rkv_last_error());
        exit(1);
    }
}

static rkv_key make_key(const int32_t *tokens, size_t num_tokens)
{
    rkv_key key;
    RKV_INIT(&key);
    key.tokens = tokens;
    key.num_tokens = num_tokens;
    return key;
}

/* The tree's pages and the ones that are free must be all there are. */
static void check_pages(rkv_tree *tree, const int32_t *free_page_ids, uint64_t num_free_pages)
{
    char message[256];
    rkv_tier_check device;
    RKV_INIT(&device);
    device.capacity_pages = CAPACITY;
    device.free_page_ids = free_page_ids;
    device.num_free_pages = num_free_pages;
    if (rkv_tree_check_integrity(tree, &device, NULL, message, sizeof message) != RKV_OK) {
        expect(0, message);
    }
}

/* Which worker holds how much of a prompt? Page keys are hashes chained over the prompt, such as those of rkv_event. */
static void ask_the_index(uint32_t *pages_of_first, uint32_t *pages_of_second)
{
    const uint64_t prompt[4] = {11, 22, 33, 44};
    uint32_t workers[8], pages[8];
    uint64_t changed;
    rkv_index *index = NULL;
    rkv_index_hit hit;
    expect(rkv_index_create(NULL, &index) == RKV_OK, "create an index");
    expect(rkv_index_insert(index, 7, prompt, 3, NULL, &changed) == RKV_OK && changed == 3, "worker 7 holds three pages");
    expect(rkv_index_insert(index, 9, prompt, 2, NULL, &changed) == RKV_OK && changed == 2, "worker 9 holds two");
    RKV_INIT(&hit);
    hit.workers = workers;
    hit.pages = pages;
    hit.max_workers = 8;
    expect(rkv_index_find(index, prompt, 4, &hit) == RKV_OK && hit.num_workers == 2, "find");
    expect(workers[0] == 7 && workers[1] == 9, "both workers are found, in ascending order");
    *pages_of_first = pages[0];
    *pages_of_second = pages[1];
    expect(rkv_index_remove(index, 7, prompt, 1, &changed) == RKV_OK && changed == 1, "worker 7 drops its first page");
    expect(rkv_index_find(index, prompt, 4, &hit) == RKV_OK && hit.num_workers == 1, "what follows a gap does not count");
    expect(rkv_index_insert(index, 7, prompt + 1, 1, prompt + 3, NULL) == RKV_ERR_ARGUMENT, "a page has one parent");
    expect(rkv_index_check_integrity(index, NULL, 0) == RKV_OK, "the index is sound");
    rkv_index_destroy(index);
}

int main(void)
{
    const int32_t first[TOKENS] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const int32_t second[TOKENS] = {0, 1, 2, 3, 4, 5, 6, 7, 108, 109, 110, 111, 112, 113, 114, 115};
    const int32_t first_pages[PAGES] = {0, 1, 2, 3}, second_pages[PAGES] = {10, 11, 12, 13};
    const int32_t free_pages[] = {4, 5, 6, 7, 8, 9, 10, 11, 14, 15};
    rkv_tree_config config;
    rkv_tree *tree = NULL;
    rkv_key key = make_key(first, TOKENS);
    rkv_insert inserted;
    rkv_match match;
    rkv_freed freed;
    rkv_tree_stats stats;
    rkv_event events[32];
    int32_t event_tokens[32 * PAGE], duplicates[PAGES], page_ids[PAGES];
    int64_t delta, shared, duplicated, under_lock, after;
    uint32_t pages_of_first, pages_of_second;
    size_t num_events;

    RKV_INIT(&config);
    config.page_size = PAGE;
    config.policy = RKV_POLICY_LRU;
    config.flags = RKV_TREE_EVENTS;
    expect(rkv_tree_create(&config, &tree) == RKV_OK, "create");

    /* 1. Two prompts: the second one's first two pages are in the tree already, so the engine keeps its own. */
    RKV_INIT(&inserted);
    expect(rkv_tree_insert(tree, &key, first_pages, PAGES, NULL, 0, duplicates, &inserted) == RKV_OK, "insert the first");
    expect(inserted.prefix_tokens == 0 && inserted.num_duplicates == 0, "the first prompt is new");
    key = make_key(second, TOKENS);
    expect(rkv_tree_insert(tree, &key, second_pages, PAGES, NULL, 0, duplicates, &inserted) == RKV_OK, "insert the second");
    shared = inserted.prefix_tokens;
    duplicated = (int64_t)inserted.num_duplicates;
    expect(duplicated == 2 && duplicates[0] == 10 && duplicates[1] == 11, "pages 10 and 11 stay with the engine");
    check_pages(tree, free_pages, 10);

    /* 2. Match the second prompt and lock its path while it is in use. */
    RKV_INIT(&match);
    expect(rkv_tree_match(tree, &key, page_ids, &match) == RKV_OK, "match");
    expect(match.num_tokens == TOKENS && match.host_num_tokens == 0, "all of the second prompt is cached");
    expect(page_ids[0] == 0 && page_ids[1] == 1 && page_ids[2] == 12 && page_ids[3] == 13, "the pages of the match");
    expect(rkv_tree_lock(tree, match.device_node, &delta) == RKV_OK && delta == -TOKENS, "lock");

    /* 3. Evict as much as can be had: only the first prompt's own tail is free to go. Then unlock, and all goes. */
    RKV_INIT(&freed);
    expect(rkv_tree_evict(tree, 1000, 0, &freed) == RKV_OK, "evict under a lock");
    under_lock = freed.num_tokens;
    expect(freed.num_pages == 2 && freed.page_ids[0] == 2 && freed.page_ids[1] == 3, "the pages freed under the lock");
    expect(rkv_tree_unlock(tree, match.device_node, &delta) == RKV_OK && delta == TOKENS, "unlock");
    expect(rkv_tree_unlock(tree, match.device_node, &delta) == RKV_ERR_LOCK, "one unlock too many is an error");
    expect(strlen(rkv_last_error()) > 0, "and the library says what was wrong");
    expect(rkv_tree_evict(tree, 1000, 0, &freed) == RKV_OK, "evict the rest");
    after = freed.num_tokens;
    expect(rkv_tree_lock(tree, match.device_node, &delta) == RKV_ERR_HANDLE, "a stale handle is an error");

    /* 4. What the tree says of itself, and the events: six pages stored, six removed. */
    RKV_INIT(&stats);
    expect(rkv_tree_get_stats(tree, &stats) == RKV_OK && stats.nodes == 0 && stats.evictable_tokens == 0, "an empty tree");
    expect(rkv_tree_take_events(tree, events, event_tokens, 32, &num_events) == RKV_OK, "take events");
    expect(num_events == 12 && events[0].kind == RKV_EVENT_STORED && events[0].has_parent == 0, "events");
    expect(event_tokens[PAGE] == 4 && events[1].parent_key == events[0].key, "the second page follows the first");
    expect(events[11].kind == RKV_EVENT_REMOVED && events[11].key == events[0].key, "the first page leaves last");

    rkv_freed_release(&freed);
    rkv_tree_destroy(tree);

    /* 5. A router asks who holds the prompt. */
    ask_the_index(&pages_of_first, &pages_of_second);
    printf("radixkv %s from C: %d tokens shared, %d duplicates, %d evicted under a lock, %d after, %d events, "
           "index: %u and %u pages\n",
           rkv_version(), (int)shared, (int)duplicated, (int)under_lock, (int)after, (int)num_events, (unsigned)pages_of_first,
           (unsigned)pages_of_second);
    return 0;
}
