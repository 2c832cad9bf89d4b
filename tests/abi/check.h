/* For the C test programs: CHECK, and a picture of a whole tree that can be compared with another.
 *
 * A picture has one record a page, sorted by the hash of everything from the root to that page, so that it depends on nothing
 * but what the tree holds. It is taken through the public functions, in the test's own memory. */
#ifndef RKV_TESTS_CHECK_H
#define RKV_TESTS_CHECK_H

#include <radixkv/radixkv.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__GNUC__)
#define MAYBE_UNUSED __attribute__((unused))
#else
#define MAYBE_UNUSED
#endif

#define CHECK(condition)                                                                                              \
    do {                                                                                                              \
        if (!(condition)) {                                                                                           \
            check_failed(__FILE__, __LINE__, #condition);                                                             \
        }                                                                                                             \
    } while (0)

/* How long the structs that have grown were in the first header of ABI version 1: what a host built against it passes. */
enum { MATCH_V1 = 56, NODE_INFO_V1 = 104, TREE_STATS_V1 = 96 };

MAYBE_UNUSED static void check_failed(const char *file, int line, const char *condition)
{
    fprintf(stderr, "%s:%d: not so: %s (last error: %s)\n", file, line, condition, rkv_last_error());
    abort();
}

MAYBE_UNUSED static void check_integrity(rkv_tree *tree)
{
    char message[512] = "";
    if (rkv_tree_check_integrity(tree, NULL, NULL, message, sizeof message) != RKV_OK) {
        fprintf(stderr, "check_integrity: %s (last error: %s)\n", message, rkv_last_error());
        abort();
    }
}

MAYBE_UNUSED static void *room(size_t count, size_t item_bytes)
{
    void *block = calloc(count + 1, item_bytes);
    CHECK(block != NULL);
    return block;
}

MAYBE_UNUSED static rkv_key key_of(const char *ns, const int32_t *tokens, size_t num_tokens)
{
    rkv_key key;
    RKV_INIT(&key);
    key.ns = ns;
    key.ns_bytes = ns != NULL ? strlen(ns) : 0;
    key.tokens = tokens;
    key.num_tokens = num_tokens;
    return key;
}

/* xorshift64*: seeded, so that a failing run can be run again. */
MAYBE_UNUSED static uint64_t next_random(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 0x2545f4914f6cdd1dull;
}

/* ---- pictures ---- */

typedef struct page_record {
    uint64_t key;       /* hash of namespace and tokens, from the root to the end of this page */
    rkv_node node;
    rkv_node parent;
    int32_t page_id;    /* -1: none */
    int32_t host_page_id;
    int32_t priority;
    uint32_t flags;     /* last page of its node, loading, backup_pending, pinned */
    uint32_t lock_ref;
    uint32_t host_ref;
    uint32_t hit_count;
    uint32_t page;      /* index in its node */
    uint32_t marks;
    uint32_t reserved;
    uint64_t access_time;
    uint64_t created_time;
    int64_t pinned_until_ns;
} page_record;

typedef struct picture {
    page_record *pages;
    size_t num_pages;
    rkv_tree_stats stats; /* memory_bytes left out: a failed call may keep what it had grown */
} picture;

MAYBE_UNUSED static uint64_t hash_bytes(uint64_t hash, const void *data, size_t bytes)
{
    const unsigned char *byte = data;
    size_t i;
    for (i = 0; i < bytes; i++) {
        hash = (hash ^ byte[i]) * 0x100000001b3ull;
    }
    return hash ^ hash >> 29;
}

MAYBE_UNUSED static int compare_records(const void *a, const void *b)
{
    uint64_t left = ((const page_record *)a)->key, right = ((const page_record *)b)->key;
    return left < right ? -1 : left > right;
}

typedef struct node_end {
    rkv_node node;
    uint64_t key;
} node_end;

MAYBE_UNUSED static int compare_ends(const void *a, const void *b)
{
    rkv_node left = ((const node_end *)a)->node, right = ((const node_end *)b)->node;
    return left < right ? -1 : left > right;
}

/* The hash at the end of a node's parent: the namespace's if it has none. ends is sorted by handle. */
MAYBE_UNUSED static uint64_t key_above(rkv_tree *tree, const rkv_node_info *info, rkv_node node, const node_end *ends, size_t num_ends)
{
    unsigned char ns[256];
    size_t ns_bytes;
    if (info->parent != RKV_ROOT) {
        node_end wanted;
        const node_end *found;
        wanted.node = info->parent;
        wanted.key = 0;
        found = bsearch(&wanted, ends, num_ends, sizeof *ends, compare_ends);
        CHECK(found != NULL && found->key != 0); /* parents come before their children */
        return found->key;
    }
    CHECK(rkv_tree_node_namespace(tree, node, ns, sizeof ns, &ns_bytes) == RKV_OK);
    return hash_bytes(0xcbf29ce484222325ull, ns, ns_bytes);
}

MAYBE_UNUSED static void add_node(rkv_tree *tree, rkv_node node, picture *out, node_end *ends, size_t num_ends)
{
    rkv_node_info info;
    size_t page_size = out->stats.page_size, num_pages, i;
    int32_t *tokens, *page_ids, *host_page_ids;
    node_end wanted, *end;
    uint64_t key;
    RKV_INIT(&info);
    CHECK(rkv_tree_node_info(tree, node, &info) == RKV_OK);
    num_pages = (size_t)info.num_tokens / page_size;
    CHECK(num_pages > 0 && num_pages * page_size == (size_t)info.num_tokens);
    tokens = room(num_pages * page_size, sizeof *tokens);
    page_ids = room(num_pages, sizeof *page_ids);
    host_page_ids = room(num_pages, sizeof *host_page_ids);
    CHECK(rkv_tree_node_data(tree, node, num_pages, tokens, page_ids, host_page_ids) == RKV_OK);
    key = key_above(tree, &info, node, ends, num_ends);
    for (i = 0; i < num_pages; i++) {
        page_record *record = &out->pages[out->num_pages++];
        key = hash_bytes(key, tokens + i * page_size, page_size * sizeof *tokens);
        memset(record, 0, sizeof *record);
        record->key = key;
        record->node = node;
        record->parent = info.parent;
        record->page_id = info.on_device ? page_ids[i] : -1;
        record->host_page_id = info.on_host ? host_page_ids[i] : -1;
        record->priority = info.priority;
        record->flags = (i + 1 == num_pages) | info.loading << 1 | info.backup_pending << 2 | info.pinned << 3;
        record->lock_ref = info.lock_ref;
        record->host_ref = info.host_ref;
        record->hit_count = info.hit_count;
        record->page = (uint32_t)i;
        record->marks = info.marks;
        record->access_time = info.access_time;
        record->created_time = info.created_time;
        record->pinned_until_ns = info.pinned ? info.pinned_until_ns : 0;
    }
    wanted.node = node;
    wanted.key = 0;
    end = bsearch(&wanted, ends, num_ends, sizeof *ends, compare_ends);
    CHECK(end != NULL);
    end->key = key;
    free(tokens);
    free(page_ids);
    free(host_page_ids);
}

/* Allocates; release with drop_picture. */
MAYBE_UNUSED static picture take_picture(rkv_tree *tree)
{
    picture out;
    rkv_node *nodes;
    node_end *ends;
    size_t num_nodes, i;
    memset(&out, 0, sizeof out);
    RKV_INIT(&out.stats);
    CHECK(rkv_tree_get_stats(tree, &out.stats) == RKV_OK);
    out.stats.memory_bytes = out.stats.digest_memory_bytes = 0;
    nodes = room((size_t)out.stats.nodes, sizeof *nodes);
    ends = room((size_t)out.stats.nodes, sizeof *ends);
    CHECK(rkv_tree_nodes(tree, nodes, (size_t)out.stats.nodes, &num_nodes) == RKV_OK);
    CHECK(num_nodes == out.stats.nodes);
    /* a page is on the device or on the host, so there are at most this many */
    out.pages = room((size_t)(out.stats.evictable_tokens + out.stats.protected_tokens + out.stats.host_tokens), sizeof *out.pages);
    for (i = 0; i < num_nodes; i++) {
        ends[i].node = nodes[i];
    }
    qsort(ends, num_nodes, sizeof *ends, compare_ends);
    for (i = 0; i < num_nodes; i++) {
        add_node(tree, nodes[i], &out, ends, num_nodes);
    }
    qsort(out.pages, out.num_pages, sizeof *out.pages, compare_records);
    free(nodes);
    free(ends);
    return out;
}

MAYBE_UNUSED static void drop_picture(picture *taken)
{
    free(taken->pages);
    taken->pages = NULL;
}

/* Two pictures of one tree: handles too must be the same. */
MAYBE_UNUSED static int same_picture(const picture *a, const picture *b)
{
    return memcmp(&a->stats, &b->stats, sizeof a->stats) == 0 && a->num_pages == b->num_pages &&
           memcmp(a->pages, b->pages, a->num_pages * sizeof *a->pages) == 0;
}

/* Two trees that hold the same: handles differ, because each tree has its own salt. */
MAYBE_UNUSED static int same_content(const picture *a, const picture *b)
{
    size_t i;
    if (memcmp(&a->stats, &b->stats, sizeof a->stats) != 0 || a->num_pages != b->num_pages) {
        return 0;
    }
    for (i = 0; i < a->num_pages; i++) {
        page_record left = a->pages[i], right = b->pages[i];
        left.node = right.node = left.parent = right.parent = 0;
        if (memcmp(&left, &right, sizeof left) != 0) {
            return 0;
        }
    }
    return 1;
}

#endif
