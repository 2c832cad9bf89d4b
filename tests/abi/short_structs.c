/* A host built against the first header of ABI version 1: its rkv_match, rkv_node_info and rkv_tree_stats end where they ended then.
 * The library writes not a byte behind them, and takes them in arrays by the caller's stride. */
#include "check.h"

enum { POISON = 0xA5 };

static int untouched(const void *start, size_t bytes)
{
    const unsigned char *byte = start;
    size_t i;
    for (i = 0; i < bytes; i++) {
        if (byte[i] != POISON) {
            return 0;
        }
    }
    return 1;
}

/* A struct of the old length: poison all around, and the length of then. */
static void make_short(void *object, size_t bytes, uint32_t short_size)
{
    memset(object, POISON, bytes);
    memcpy(object, &short_size, sizeof short_size);
}

#define SHORT(object, old_bytes) make_short(&(object), sizeof(object), old_bytes)
#define BEHIND(object, old_bytes) untouched((const char *)&(object) + (old_bytes), sizeof(object) - (old_bytes))

int main(void)
{
    int32_t tokens[32], page_ids[2] = {1, 2}, duplicates[2];
    unsigned char many[2 * MATCH_V1 + sizeof(rkv_match)];
    uint32_t old_size = MATCH_V1;
    rkv_tree *tree;
    rkv_key key, keys[2];
    rkv_insert inserted;
    rkv_match match, longer;
    rkv_node_info info;
    rkv_tree_stats stats;
    int i;
    RKV_INIT(&inserted);
    RKV_INIT(&longer);
    for (i = 0; i < 32; i++) {
        tokens[i] = i;
    }
    key = key_of(NULL, tokens, 32);
    CHECK(rkv_tree_create(NULL, &tree) == RKV_OK);
    CHECK(rkv_tree_insert(tree, &key, page_ids, 2, NULL, 0, duplicates, &inserted) == RKV_OK);
    CHECK(rkv_tree_mark(tree, inserted.node, 0xff, 0, 0) == RKV_OK);

    CHECK(sizeof match > MATCH_V1 && sizeof info > NODE_INFO_V1 && sizeof stats > TREE_STATS_V1); /* else this tests nothing */
    SHORT(match, MATCH_V1);
    CHECK(rkv_tree_match(tree, &key, page_ids, &match) == RKV_OK && match.num_tokens == 32 && BEHIND(match, MATCH_V1));
    CHECK(match.struct_size == MATCH_V1);
    CHECK(rkv_tree_insert(tree, &key, page_ids, 2, &match, 0, duplicates, &inserted) == RKV_OK && inserted.prefix_tokens == 32);
    CHECK(rkv_tree_match_extend(tree, &match, &key, NULL, &longer) == RKV_OK && longer.num_tokens == 32);
    SHORT(match, MATCH_V1);
    CHECK(rkv_tree_peek(tree, &key, page_ids, &match) == RKV_OK && match.num_tokens == 32 && BEHIND(match, MATCH_V1));
    SHORT(match, MATCH_V1 - 1);
    CHECK(rkv_tree_peek(tree, &key, page_ids, &match) == RKV_ERR_ARGUMENT && BEHIND(match, 4));

    keys[0] = keys[1] = key;
    make_short(many, sizeof many, MATCH_V1);
    memcpy(many + MATCH_V1, &old_size, sizeof old_size);
    CHECK(rkv_tree_peek_many(tree, keys, 2, (rkv_match *)(void *)many) == RKV_OK);
    memcpy(&match, many + MATCH_V1, MATCH_V1);
    CHECK(match.num_tokens == 32 && match.host_node == inserted.node && untouched(many + 2 * MATCH_V1, sizeof many - 2 * MATCH_V1));

    SHORT(info, NODE_INFO_V1);
    CHECK(rkv_tree_node_info(tree, inserted.node, &info) == RKV_OK && info.num_tokens == 32 && BEHIND(info, NODE_INFO_V1));
    SHORT(info, NODE_INFO_V1 - 1);
    CHECK(rkv_tree_node_info(tree, inserted.node, &info) == RKV_ERR_ARGUMENT);
    SHORT(stats, TREE_STATS_V1);
    CHECK(rkv_tree_get_stats(tree, &stats) == RKV_OK && stats.nodes == 1 && BEHIND(stats, TREE_STATS_V1));
    SHORT(stats, TREE_STATS_V1 - 1);
    CHECK(rkv_tree_get_stats(tree, &stats) == RKV_ERR_ARGUMENT);
    rkv_tree_destroy(tree);
    puts("nothing is written behind short structs");
    return 0;
}
