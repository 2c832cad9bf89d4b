/* Deterministic load on libradixkv.so for callgrind: growing conversations at page size 16, then eviction to the last leaf.
 *
 * The three counted_* functions wrap exactly one library call each; run.py starts one run for each with
 * --toggle-collect=counted_<operation>, so nothing else is counted. No valgrind header is needed.
 *
 * Prints "matched_tokens inserted_tokens evicted_leaves": what to divide by. Exit 1, with a line on stderr, on any error.
 */
#include <stdio.h>
#include <stdlib.h>

#include "radixkv/radixkv.h"

enum { PAGE = 16, USERS = 200, TURNS = 10, SHARED = 2000, STEP = 500, LONGEST = SHARED + TURNS * STEP, PAGES = LONGEST / PAGE };

#define COUNTED __attribute__((noinline, noclone, used))

COUNTED rkv_status counted_match(rkv_tree *tree, const rkv_key *key, int32_t *page_ids, rkv_match *out)
{
    rkv_status status = rkv_tree_match(tree, key, page_ids, out);
    __asm__ volatile("" ::: "memory"); /* no tail call: the toggle must see this function return */
    return status;
}

COUNTED rkv_status counted_insert(rkv_tree *tree, const rkv_key *key, const int32_t *page_ids, size_t num_pages,
                                  const rkv_match *hint, int32_t *duplicates, rkv_insert *out)
{
    rkv_status status = rkv_tree_insert(tree, key, page_ids, num_pages, hint, 0, duplicates, out);
    __asm__ volatile("" ::: "memory");
    return status;
}

COUNTED rkv_status counted_evict(rkv_tree *tree, rkv_freed *out)
{
    rkv_status status = rkv_tree_evict(tree, 1, 0, out);
    __asm__ volatile("" ::: "memory");
    return status;
}

static void must(rkv_status status, const char *what)
{
    if (status == RKV_OK) return;
    fprintf(stderr, "driver: %s: %s (%s)\n", what, rkv_status_string(status), rkv_last_error());
    exit(1);
}

/* The finaliser of splitmix64: tokens that depend on nothing but their place. */
static int32_t token(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return (int32_t)((x ^ (x >> 31)) % 128000u);
}

int main(void)
{
    static int32_t tokens[USERS][LONGEST], ids[PAGES], duplicates[PAGES];
    for (int user = 0; user < USERS; user++)
        for (int i = 0; i < LONGEST; i++)
            tokens[user][i] = token(i < SHARED ? (uint64_t)i : ((uint64_t)(user + 1) << 32) + (uint64_t)i);

    rkv_tree_config config;
    rkv_tree *tree = NULL;
    RKV_INIT(&config);
    config.page_size = PAGE;
    config.policy = RKV_POLICY_LRU;
    must(rkv_tree_create(&config, &tree), "create");

    int64_t matched_tokens = 0, inserted_tokens = 0, evicted_leaves = 0;
    int32_t next_id = 0;
    for (int turn = 1; turn <= TURNS; turn++)
        for (int user = 0; user < USERS; user++) {
            rkv_key key;
            rkv_match match;
            rkv_insert insert;
            RKV_INIT(&key);
            RKV_INIT(&match);
            RKV_INIT(&insert);
            key.tokens = tokens[user];
            key.num_tokens = (size_t)(SHARED + turn * STEP);
            size_t pages = key.num_tokens / PAGE;
            must(counted_match(tree, &key, ids, &match), "match");
            matched_tokens += match.num_tokens;
            for (size_t page = (size_t)match.num_tokens / PAGE; page < pages; page++) ids[page] = next_id++;
            must(counted_insert(tree, &key, ids, pages, &match, duplicates, &insert), "insert");
            inserted_tokens += (int64_t)(pages * PAGE) - insert.prefix_tokens;
        }

    rkv_freed freed;
    RKV_INIT(&freed);
    int64_t freed_tokens = 0;
    for (;;) {
        must(counted_evict(tree, &freed), "evict");
        if (freed.num_tokens == 0) break;
        freed_tokens += freed.num_tokens;
        evicted_leaves++;
    }
    if (freed_tokens != inserted_tokens) {
        fprintf(stderr, "driver: %lld tokens went in, %lld came out\n", (long long)inserted_tokens, (long long)freed_tokens);
        return 1;
    }
    rkv_freed_release(&freed);
    rkv_tree_destroy(tree);
    printf("%lld %lld %lld\n", (long long)matched_tokens, (long long)inserted_tokens, (long long)evicted_leaves);
    return 0;
}
