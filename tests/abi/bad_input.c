/* Every misuse that the header or the contract (radixkv/tree/base.py) defines, from C: each is refused with the right status and
 * words of its own, and the tree is exactly as it was. */
#include "check.h"

#include <limits.h>

enum { PAGE = 4 };

/* The tree under test and what is in it:
 *
 *   default namespace   A: 0..15, device pages 0..3          B: 0..7 shared with A, then 108..115, pages 12, 13
 *                       H: 200..207, host pages 0, 1 only    h: below H, 208..211, host page 2 only
 *                       C: 300..307, device 20, 21 and host 10, 11
 *                       L: 400..403, loading: device 22, host 12
 *                       P: 500..503, device 23, backup pending
 *   namespace "other"   O: 0..3, device 24
 */
static rkv_tree *tree, *foreign;
static rkv_node shared, a, b, host_only, below_host, both, loading, pending, other, stale, foreign_node;
static rkv_match match_of_b, foreign_match, stale_match;
static int refusals;

static int32_t tokens_from(int32_t first, int32_t *tokens, int count)
{
    int i;
    for (i = 0; i < count; i++) {
        tokens[i] = first + i;
    }
    return first;
}

static rkv_node put(rkv_tree *into, const char *ns, const int32_t *tokens, size_t num_tokens, const int32_t *page_ids)
{
    rkv_key key = key_of(ns, tokens, num_tokens);
    rkv_insert inserted;
    int32_t duplicates[16];
    RKV_INIT(&inserted);
    CHECK(rkv_tree_insert(into, &key, page_ids, num_tokens / PAGE, NULL, 0, duplicates, &inserted) == RKV_OK);
    return inserted.node;
}

static rkv_node put_host(const int32_t *tokens, size_t num_tokens, const int32_t *host_page_ids)
{
    rkv_key key = key_of(NULL, tokens, num_tokens);
    rkv_insert inserted;
    int32_t duplicates[16];
    RKV_INIT(&inserted);
    CHECK(rkv_tree_insert_host(tree, &key, host_page_ids, num_tokens / PAGE, NULL, 0, duplicates, &inserted) == RKV_OK);
    return inserted.node;
}

static rkv_match look_up(rkv_tree *in, const int32_t *tokens, size_t num_tokens)
{
    rkv_key key = key_of(NULL, tokens, num_tokens);
    rkv_match match;
    RKV_INIT(&match);
    CHECK(rkv_tree_match(in, &key, NULL, &match) == RKV_OK);
    return match;
}

static rkv_tree *create(uint32_t flags)
{
    rkv_tree_config config;
    rkv_tree *created = NULL;
    RKV_INIT(&config);
    config.page_size = PAGE;
    config.flags = flags;
    CHECK(rkv_tree_create(&config, &created) == RKV_OK && created != NULL);
    return created;
}

static void build(void)
{
    int32_t tokens[16], ids[4] = {0, 1, 2, 3}, b_ids[4] = {0, 1, 12, 13}, host_ids[3] = {0, 1, 2}, c_ids[2] = {20, 21};
    int32_t c_host[2] = {10, 11}, l_host = 12, l_id = 22, p_id = 23, o_id = 24, gone_id = 30;
    rkv_freed freed;
    RKV_INIT(&freed);
    tree = create(RKV_TREE_EVENTS);
    foreign = create(0);
    tokens_from(500, tokens, 4);
    pending = put(tree, NULL, tokens, 4, &p_id);
    CHECK(rkv_tree_evict(tree, PAGE, 1, &freed) == RKV_OK && freed.num_backups == 1 && freed.backups[0].node == pending);
    tokens_from(0, tokens, 16);
    a = put(tree, NULL, tokens, 16, ids);
    foreign_node = put(foreign, NULL, tokens, 16, ids);
    foreign_match = look_up(foreign, tokens, 16);
    tokens_from(108, tokens + 8, 8);
    b = put(tree, NULL, tokens, 16, b_ids);
    match_of_b = look_up(tree, tokens, 16);
    shared = look_up(tree, tokens, 8).device_node;
    tokens_from(200, tokens, 12);
    host_only = put_host(tokens, 8, host_ids);
    tokens_from(200, tokens, 12);
    below_host = put_host(tokens, 12, host_ids);
    tokens_from(300, tokens, 8);
    both = put(tree, NULL, tokens, 8, c_ids);
    CHECK(rkv_tree_set_host(tree, both, c_host, 2) == RKV_OK);
    tokens_from(400, tokens, 4);
    loading = put_host(tokens, 4, &l_host);
    CHECK(rkv_tree_set_device(tree, loading, &l_id, 1, 1) == RKV_OK);
    tokens_from(0, tokens, 4);
    other = put(tree, "other", tokens, 4, &o_id);
    tokens_from(600, tokens, 4);
    stale = put(tree, NULL, tokens, 4, &gone_id);
    stale_match = look_up(tree, tokens, 4);
    CHECK(rkv_tree_delete(tree, stale, &freed) == RKV_OK && freed.num_pages == 1 && freed.page_ids[0] == gone_id);
    rkv_freed_release(&freed);
    check_integrity(tree);
}

/* A failure whose words no other call can have: what rkv_last_error says after a refusal must be of that refusal. */
static const char *mark_last_error(void)
{
    static char mark[256];
    rkv_tree_config config;
    rkv_tree *none;
    RKV_INIT(&config);
    config.page_size = -7654321;
    CHECK(rkv_tree_create(&config, &none) == RKV_ERR_ARGUMENT);
    snprintf(mark, sizeof mark, "%s", rkv_last_error());
    return mark;
}

static void refused(rkv_status wanted, rkv_status got, const char *call, int line, const picture *before, const char *mark)
{
    picture after = take_picture(tree);
    if (got != wanted || rkv_last_error()[0] == 0 || strcmp(mark, rkv_last_error()) == 0 || !same_picture(before, &after)) {
        fprintf(stderr, "bad_input.c:%d: %s: got %s, want %s; last error: %s; the tree has %s\n", line, call, rkv_status_string(got),
                rkv_status_string(wanted), rkv_last_error(), same_picture(before, &after) ? "not changed" : "changed");
        abort();
    }
    check_integrity(tree);
    drop_picture(&after);
    refusals++;
}

#define REFUSED(status, call)                                                                                         \
    do {                                                                                                              \
        picture before_ = take_picture(tree);                                                                         \
        const char *mark_ = mark_last_error();                                                                        \
        refused(status, call, #call, __LINE__, &before_, mark_);                                                      \
        drop_picture(&before_);                                                                                       \
    } while (0)

/* All handles that name nothing of this tree. */
#define REFUSED_HANDLES(call)                                                                                         \
    do {                                                                                                              \
        const rkv_node bad_[] = {stale, foreign_node, 1, 2, UINT64_MAX, UINT64_MAX - 1, a ^ 1ull << 63, (uint32_t)a, a >> 32};  \
        size_t bad_i_;                                                                                                \
        for (bad_i_ = 0; bad_i_ < sizeof bad_ / sizeof *bad_; bad_i_++) {                                             \
            rkv_node node = bad_[bad_i_];                                                                             \
            REFUSED(RKV_ERR_HANDLE, call);                                                                            \
        }                                                                                                             \
    } while (0)

/* A struct_size that the struct cannot have had: 0, only itself, one byte short of what it was in the first header. */
#define REFUSED_SIZES_OF(variable, first_bytes, call)                                                                 \
    do {                                                                                                              \
        const uint32_t sizes_[] = {0, 4, (uint32_t)(first_bytes) - 1};                                                \
        size_t size_i_;                                                                                               \
        for (size_i_ = 0; size_i_ < 3; size_i_++) {                                                                   \
            (variable).struct_size = sizes_[size_i_];                                                                 \
            REFUSED(RKV_ERR_ARGUMENT, call);                                                                          \
        }                                                                                                             \
        (variable).struct_size = (uint32_t)sizeof(variable);                                                          \
    } while (0)

#define REFUSED_SIZES(variable, call) REFUSED_SIZES_OF(variable, sizeof(variable), call)

static void never_called(void *ctx, const rkv_page_run *run)
{
    (void)ctx;
    (void)run;
}

static void test_create(void)
{
    rkv_tree_config config;
    rkv_tree *created = NULL;
    struct { rkv_tree_config config; char newer[64]; } longer;
    const int32_t page_sizes[] = {0, -1, 65537, INT_MIN, INT_MAX}, policies[] = {-1, RKV_POLICY_END, 1000, INT_MIN};
    const uint32_t digests[] = {0, 7, 65, UINT32_MAX}, flags[] = {2, 0x80000000u, 3};
    size_t i;
    RKV_INIT(&config);
    config.page_size = PAGE;
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_create(&config, NULL));
    REFUSED_SIZES(config, rkv_tree_create(&config, &created));
    for (i = 0; i < sizeof page_sizes / sizeof *page_sizes; i++) {
        config.page_size = page_sizes[i];
        REFUSED(RKV_ERR_ARGUMENT, rkv_tree_create(&config, &created));
    }
    config.page_size = PAGE;
    for (i = 0; i < sizeof policies / sizeof *policies; i++) {
        config.policy = policies[i];
        REFUSED(RKV_ERR_ARGUMENT, rkv_tree_create(&config, &created));
    }
    config.policy = 0;
    for (i = 0; i < sizeof flags / sizeof *flags; i++) {
        config.flags = flags[i];
        REFUSED(RKV_ERR_ARGUMENT, rkv_tree_create(&config, &created));
    }
    config.flags = 0;
    config.page_hash = never_called;
    for (i = 0; i < sizeof digests / sizeof *digests; i++) {
        config.digest_bytes = digests[i];
        REFUSED(RKV_ERR_ARGUMENT, rkv_tree_create(&config, &created));
    }
    /* what is allowed at the edges: no config, the largest page, a config of a newer header, destroying nothing */
    CHECK(rkv_tree_create(NULL, &created) == RKV_OK);
    rkv_tree_destroy(created);
    RKV_INIT(&config);
    config.page_size = 65536;
    CHECK(rkv_tree_create(&config, &created) == RKV_OK);
    rkv_tree_destroy(created);
    RKV_INIT(&longer.config);
    memset(longer.newer, 0, sizeof longer.newer);
    longer.config.page_size = PAGE;
    longer.config.struct_size = sizeof longer;
    CHECK(rkv_tree_create(&longer.config, &created) == RKV_OK);
    rkv_tree_destroy(created);
    rkv_tree_destroy(NULL);
}

static void test_match(void)
{
    int32_t tokens[16], ids[16];
    rkv_key key, keys[2];
    rkv_match match, matches[2];
    tokens_from(0, tokens, 16);
    key = key_of(NULL, tokens, 16);
    RKV_INIT(&match);
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_match(NULL, &key, ids, &match));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_match(tree, NULL, ids, &match));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_match(tree, &key, ids, NULL));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_peek(NULL, &key, ids, &match));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_peek(tree, NULL, ids, &match));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_peek(tree, &key, ids, NULL));
    REFUSED_SIZES(key, rkv_tree_match(tree, &key, ids, &match));
    REFUSED_SIZES_OF(match, MATCH_V1, rkv_tree_match(tree, &key, ids, &match));
    REFUSED_SIZES(key, rkv_tree_peek(tree, &key, ids, &match));
    REFUSED_SIZES_OF(match, MATCH_V1, rkv_tree_peek(tree, &key, ids, &match));
    key.tokens = NULL;
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_match(tree, &key, ids, &match));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_peek(tree, &key, ids, &match));
    key.num_tokens = 0;
    CHECK(rkv_tree_match(tree, &key, ids, &match) == RKV_OK && match.num_tokens == 0 && match.device_node == RKV_ROOT);
    key = key_of(NULL, tokens, PAGE - 1);
    CHECK(rkv_tree_match(tree, &key, ids, &match) == RKV_OK && match.num_tokens == 0 && match.device_node == RKV_ROOT);
    key = key_of(NULL, tokens, 16);
    key.ns_bytes = 5;
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_match(tree, &key, ids, &match));
    key = key_of("nobody", tokens, 16);
    CHECK(rkv_tree_match(tree, &key, ids, &match) == RKV_OK && match.num_tokens == 0 && match.host_node == RKV_ROOT);

    keys[0] = keys[1] = key_of(NULL, tokens, 16);
    RKV_INIT(&matches[0]);
    matches[1] = matches[0];
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_peek_many(NULL, keys, 2, matches));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_peek_many(tree, NULL, 2, matches));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_peek_many(tree, keys, 2, NULL));
    REFUSED_SIZES(keys[1], rkv_tree_peek_many(tree, keys, 2, matches));
    REFUSED_SIZES_OF(matches[1], MATCH_V1, rkv_tree_peek_many(tree, keys, 2, matches));
    CHECK(rkv_tree_peek_many(tree, NULL, 0, NULL) == RKV_OK);
}

static void test_match_extend(void)
{
    int32_t tokens[16], ids[16];
    rkv_match prior = match_of_b, match, inside;
    rkv_key key, more;
    RKV_INIT(&match);
    tokens_from(116, tokens, 4);
    more = key_of(NULL, tokens, 4);
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_match_extend(NULL, &prior, &more, ids, &match));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_match_extend(tree, NULL, &more, ids, &match));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_match_extend(tree, &prior, NULL, ids, &match));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_match_extend(tree, &prior, &more, ids, NULL));
    REFUSED_SIZES_OF(prior, MATCH_V1, rkv_tree_match_extend(tree, &prior, &more, ids, &match));
    REFUSED_SIZES(more, rkv_tree_match_extend(tree, &prior, &more, ids, &match));
    REFUSED_SIZES_OF(match, MATCH_V1, rkv_tree_match_extend(tree, &prior, &more, ids, &match));
    REFUSED(RKV_ERR_HANDLE, rkv_tree_match_extend(tree, &foreign_match, &more, ids, &match));
    REFUSED(RKV_ERR_HANDLE, rkv_tree_match_extend(tree, &stale_match, &more, ids, &match));
    prior.num_tokens = -4;
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_match_extend(tree, &prior, &more, ids, &match));
    prior = match_of_b;
    more.ns = "other";
    more.ns_bytes = 5;
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_match_extend(tree, &prior, &more, ids, &match));
    /* the same with a namespace_id that claims to be that one's: the node's own namespace is what counts */
    CHECK(rkv_tree_peek(tree, &more, NULL, &match) == RKV_OK && match.namespace_id != prior.namespace_id);
    prior.namespace_id = match.namespace_id;
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_match_extend(tree, &prior, &more, ids, &match));
    prior = match_of_b;
    more = key_of(NULL, NULL, 4);
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_match_extend(tree, &prior, &more, ids, &match));
    /* a peek that ends inside a node names a node whose path is longer than the hit */
    tokens_from(300, tokens, 4);
    key = key_of(NULL, tokens, 4);
    RKV_INIT(&inside);
    CHECK(rkv_tree_peek(tree, &key, NULL, &inside) == RKV_OK && inside.num_tokens == 4 && inside.device_node == both);
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_match_extend(tree, &inside, &key, ids, &match));
}

static void test_insert(void)
{
    int32_t tokens[20], ids[5] = {40, 41, 42, 43, 44}, duplicates[5];
    int32_t negative[4] = {40, 41, 42, -1}, twice[4] = {40, 41, 42, 40}, owned[4] = {40, 41, 42, 20};
    int32_t owned_duplicate[4] = {12, 1, 2, 3}; /* at a place that the tree has pages for: page 12 is B's */
    rkv_key key;
    rkv_insert out;
    rkv_match hint;
    RKV_INIT(&out);
    tokens_from(700, tokens, 20);
    key = key_of(NULL, tokens, 16);
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_insert(NULL, &key, ids, 4, NULL, 0, duplicates, &out));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_insert(tree, NULL, ids, 4, NULL, 0, duplicates, &out));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_insert(tree, &key, NULL, 4, NULL, 0, duplicates, &out));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_insert(tree, &key, ids, 4, NULL, 0, NULL, &out));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_insert(tree, &key, ids, 4, NULL, 0, duplicates, NULL));
    REFUSED_SIZES(key, rkv_tree_insert(tree, &key, ids, 4, NULL, 0, duplicates, &out));
    REFUSED_SIZES(out, rkv_tree_insert(tree, &key, ids, 4, NULL, 0, duplicates, &out));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_insert(tree, &key, ids, 0, NULL, 0, duplicates, &out));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_insert(tree, &key, ids, 3, NULL, 0, duplicates, &out));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_insert(tree, &key, ids, 5, NULL, 0, duplicates, &out));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_insert(tree, &key, ids, SIZE_MAX, NULL, 0, duplicates, &out));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_insert(tree, &key, negative, 4, NULL, 0, duplicates, &out));
    REFUSED(RKV_ERR_OWNERSHIP, rkv_tree_insert(tree, &key, twice, 4, NULL, 0, duplicates, &out));
    REFUSED(RKV_ERR_OWNERSHIP, rkv_tree_insert(tree, &key, owned, 4, NULL, 0, duplicates, &out));
    tokens_from(0, tokens, 16);
    REFUSED(RKV_ERR_OWNERSHIP, rkv_tree_insert(tree, &key, owned_duplicate, 4, NULL, 0, duplicates, &out));

    /* hints: too long, of another namespace, of another tree, too short a struct; a stale one is only slow */
    REFUSED(RKV_ERR_ARGUMENT, (key.num_tokens = 8, rkv_tree_insert(tree, &key, ids, 2, &match_of_b, 0, duplicates, &out)));
    key = key_of("other", tokens, 16);
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_insert(tree, &key, ids, 4, &match_of_b, 0, duplicates, &out));
    key = key_of(NULL, tokens, 16);
    REFUSED(RKV_ERR_HANDLE, rkv_tree_insert(tree, &key, ids, 4, &foreign_match, 0, duplicates, &out));
    hint = match_of_b;
    REFUSED_SIZES_OF(hint, MATCH_V1, rkv_tree_insert(tree, &key, ids, 4, &hint, 0, duplicates, &out));
    key = key_of(NULL, tokens, 3);
    CHECK(rkv_tree_insert(tree, &key, NULL, 0, NULL, 0, NULL, &out) == RKV_OK && out.node == RKV_ROOT);
}

static void test_insert_host(void)
{
    int32_t tokens[16], ids[4] = {50, 51, 52, 53}, duplicates[4];
    int32_t negative[4] = {50, 51, 52, INT_MIN}, twice[4] = {50, 51, 51, 53}, owned[4] = {50, 51, 52, 10};
    rkv_key key;
    rkv_insert out;
    RKV_INIT(&out);
    tokens_from(700, tokens, 16);
    key = key_of(NULL, tokens, 16);
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_insert_host(NULL, &key, ids, 4, NULL, 0, duplicates, &out));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_insert_host(tree, NULL, ids, 4, NULL, 0, duplicates, &out));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_insert_host(tree, &key, NULL, 4, NULL, 0, duplicates, &out));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_insert_host(tree, &key, ids, 4, NULL, 0, NULL, &out));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_insert_host(tree, &key, ids, 4, NULL, 0, duplicates, NULL));
    REFUSED_SIZES(out, rkv_tree_insert_host(tree, &key, ids, 4, NULL, 0, duplicates, &out));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_insert_host(tree, &key, ids, 3, NULL, 0, duplicates, &out));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_insert_host(tree, &key, negative, 4, NULL, 0, duplicates, &out));
    REFUSED(RKV_ERR_OWNERSHIP, rkv_tree_insert_host(tree, &key, twice, 4, NULL, 0, duplicates, &out));
    REFUSED(RKV_ERR_OWNERSHIP, rkv_tree_insert_host(tree, &key, owned, 4, NULL, 0, duplicates, &out));
    REFUSED(RKV_ERR_HANDLE, rkv_tree_insert_host(tree, &key, ids, 4, &foreign_match, 0, duplicates, &out));
    key.num_tokens = 8;
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_insert_host(tree, &key, ids, 2, &match_of_b, 0, duplicates, &out));
}

static void test_locks(void)
{
    int64_t delta;
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_lock(NULL, a, &delta));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_unlock(NULL, a, &delta));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_protect_host(NULL, both));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_release_host(NULL, both));
    REFUSED_HANDLES(rkv_tree_lock(tree, node, &delta));
    REFUSED_HANDLES(rkv_tree_unlock(tree, node, &delta));
    REFUSED_HANDLES(rkv_tree_protect_host(tree, node));
    REFUSED_HANDLES(rkv_tree_release_host(tree, node));
    REFUSED(RKV_ERR_LOCK, rkv_tree_unlock(tree, a, &delta));
    REFUSED(RKV_ERR_LOCK, rkv_tree_unlock(tree, a, NULL));
    REFUSED(RKV_ERR_STATE, rkv_tree_lock(tree, host_only, &delta));
    REFUSED(RKV_ERR_STATE, rkv_tree_unlock(tree, host_only, &delta));
    REFUSED(RKV_ERR_STATE, rkv_tree_protect_host(tree, a));
    REFUSED(RKV_ERR_LOCK, rkv_tree_release_host(tree, both));
    CHECK(rkv_tree_lock(tree, RKV_ROOT, &delta) == RKV_OK && delta == 0);
    CHECK(rkv_tree_protect_host(tree, RKV_ROOT) == RKV_OK);

    /* a lock on the shared part is not a lock on A: the ancestor's count may not be taken by the child's unlock */
    CHECK(rkv_tree_lock(tree, shared, NULL) == RKV_OK);
    REFUSED(RKV_ERR_LOCK, rkv_tree_unlock(tree, a, &delta));
    CHECK(rkv_tree_unlock(tree, shared, NULL) == RKV_OK);
}

static void test_pins(void)
{
    int64_t delta;
    uint64_t removed;
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_pin(NULL, a, 1, &delta));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_unpin(NULL, a, &delta));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_expire(NULL, 1, &removed));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_pin(tree, RKV_ROOT, 1, &delta));
    REFUSED(RKV_ERR_STATE, rkv_tree_pin(tree, host_only, 1, &delta));
    REFUSED_HANDLES(rkv_tree_pin(tree, node, 1, &delta));
    REFUSED_HANDLES(rkv_tree_unpin(tree, node, &delta));
    CHECK(rkv_tree_unpin(tree, a, &delta) == RKV_OK && delta == 0);
    CHECK(rkv_tree_expire(tree, INT64_MAX, &removed) == RKV_OK && removed == 0);
}

static void test_evict(void)
{
    rkv_freed freed;
    RKV_INIT(&freed);
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_evict(NULL, 1, 0, &freed));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_evict(tree, 1, 0, NULL));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_evict(tree, -1, 0, &freed));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_evict(tree, INT64_MIN, 1, &freed));
    REFUSED_SIZES(freed, rkv_tree_evict(tree, 1, 0, &freed));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_evict_host(NULL, 1, &freed));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_evict_host(tree, 1, NULL));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_evict_host(tree, -1, &freed));
    REFUSED_SIZES(freed, rkv_tree_evict_host(tree, 1, &freed));
    CHECK(rkv_tree_evict(tree, 0, 0, &freed) == RKV_OK && freed.num_tokens == 0 && freed.num_pages == 0);
    CHECK(rkv_tree_evict_host(tree, 0, &freed) == RKV_OK && freed.num_tokens == 0 && freed.num_host_pages == 0);
    rkv_freed_release(&freed);
    rkv_freed_release(&freed);
    rkv_freed_release(NULL);
}

static void test_finish_backup(void)
{
    int32_t ids[2] = {60, 61}, negative = -5, owned = 10;
    rkv_freed freed;
    RKV_INIT(&freed);
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_finish_backup(NULL, pending, ids, 1, &freed));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_finish_backup(tree, pending, ids, 1, NULL));
    REFUSED_SIZES(freed, rkv_tree_finish_backup(tree, pending, ids, 1, &freed));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_finish_backup(tree, pending, ids, 0, &freed));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_finish_backup(tree, pending, ids, 2, &freed));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_finish_backup(tree, pending, &negative, 1, &freed));
    REFUSED(RKV_ERR_OWNERSHIP, rkv_tree_finish_backup(tree, pending, &owned, 1, &freed));
    REFUSED(RKV_ERR_STATE, rkv_tree_finish_backup(tree, a, ids, 2, &freed));
    REFUSED(RKV_ERR_STATE, rkv_tree_finish_backup(tree, host_only, ids, 2, &freed));
    REFUSED_HANDLES(rkv_tree_finish_backup(tree, node, ids, 1, &freed));
    REFUSED_HANDLES(rkv_tree_finish_backup(tree, node, NULL, 0, &freed));
    rkv_freed_release(&freed);
}

static void test_two_tiers(void)
{
    int32_t ids[8] = {70, 71, 72, 73, 74, 75, 76, 77}, negative[2] = {70, -1}, twice[2] = {70, 70};
    int32_t owned_host[2] = {70, 10}, owned_device[2] = {70, 0};
    rkv_freed freed;
    RKV_INIT(&freed);
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_set_host(NULL, a, ids, 2));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_set_host(tree, a, NULL, 2));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_set_host(tree, a, ids, 0));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_set_host(tree, a, ids, 1));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_set_host(tree, a, ids, 3));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_set_host(tree, a, ids, 5));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_set_host(tree, a, ids, SIZE_MAX));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_set_host(tree, RKV_ROOT, ids, 1));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_set_host(tree, a, negative, 2));
    REFUSED(RKV_ERR_OWNERSHIP, rkv_tree_set_host(tree, a, twice, 2));
    REFUSED(RKV_ERR_OWNERSHIP, rkv_tree_set_host(tree, a, owned_host, 2));
    REFUSED(RKV_ERR_STATE, rkv_tree_set_host(tree, both, ids, 2));
    REFUSED(RKV_ERR_STATE, rkv_tree_set_host(tree, host_only, ids, 2));
    REFUSED(RKV_ERR_STATE, rkv_tree_set_host(tree, pending, ids, 1));
    REFUSED_HANDLES(rkv_tree_set_host(tree, node, ids, 2));

    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_set_device(NULL, host_only, ids, 2, 0));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_set_device(tree, host_only, NULL, 2, 0));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_set_device(tree, host_only, ids, 1, 0));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_set_device(tree, host_only, ids, 3, 0));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_set_device(tree, host_only, negative, 2, 0));
    REFUSED(RKV_ERR_OWNERSHIP, rkv_tree_set_device(tree, host_only, twice, 2, 0));
    REFUSED(RKV_ERR_OWNERSHIP, rkv_tree_set_device(tree, host_only, owned_device, 2, 1));
    REFUSED(RKV_ERR_STATE, rkv_tree_set_device(tree, a, ids, 2, 0));
    REFUSED(RKV_ERR_STATE, rkv_tree_set_device(tree, below_host, ids, 1, 0));
    REFUSED_HANDLES(rkv_tree_set_device(tree, node, ids, 2, 1));

    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_finish_load(NULL, loading, 1, &freed));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_finish_load(tree, loading, 1, NULL));
    REFUSED_SIZES(freed, rkv_tree_finish_load(tree, loading, 0, &freed));
    REFUSED(RKV_ERR_STATE, rkv_tree_finish_load(tree, a, 1, &freed));
    REFUSED(RKV_ERR_STATE, rkv_tree_finish_load(tree, host_only, 0, &freed));
    REFUSED_HANDLES(rkv_tree_finish_load(tree, node, 1, &freed));
    CHECK(rkv_tree_lock(tree, loading, NULL) == RKV_OK);
    REFUSED(RKV_ERR_LOCK, rkv_tree_finish_load(tree, loading, 0, &freed));
    CHECK(rkv_tree_unlock(tree, loading, NULL) == RKV_OK);
    rkv_freed_release(&freed);
}

static void test_structure(void)
{
    const int64_t splits[] = {0, 8, 12, 3, 5, -4, INT64_MIN, INT64_MAX - 3};
    rkv_node upper;
    rkv_freed freed;
    size_t i;
    RKV_INIT(&freed);
    for (i = 0; i < sizeof splits / sizeof *splits; i++) {
        REFUSED(RKV_ERR_ARGUMENT, rkv_tree_split_at(tree, a, splits[i], &upper));
    }
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_split_at(NULL, a, 4, &upper));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_split_at(tree, RKV_ROOT, 4, &upper));
    REFUSED_HANDLES(rkv_tree_split_at(tree, node, 4, &upper));

    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_delete(NULL, a, &freed));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_delete(tree, a, NULL));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_delete(tree, RKV_ROOT, &freed));
    REFUSED_SIZES(freed, rkv_tree_delete(tree, a, &freed));
    REFUSED_HANDLES(rkv_tree_delete(tree, node, &freed));
    REFUSED(RKV_ERR_LOCK, rkv_tree_delete(tree, loading, &freed));
    REFUSED(RKV_ERR_LOCK, rkv_tree_delete(tree, pending, &freed));
    CHECK(rkv_tree_lock(tree, b, NULL) == RKV_OK && rkv_tree_protect_host(tree, below_host) == RKV_OK);
    REFUSED(RKV_ERR_LOCK, rkv_tree_delete(tree, b, &freed));
    REFUSED(RKV_ERR_LOCK, rkv_tree_delete(tree, shared, &freed));
    REFUSED(RKV_ERR_LOCK, rkv_tree_delete(tree, host_only, &freed));
    REFUSED(RKV_ERR_LOCK, rkv_tree_delete_namespace(tree, NULL, 0, &freed));
    CHECK(rkv_tree_unlock(tree, b, NULL) == RKV_OK && rkv_tree_release_host(tree, below_host) == RKV_OK);

    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_delete_namespace(NULL, "other", 5, &freed));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_delete_namespace(tree, "other", 5, NULL));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_delete_namespace(tree, NULL, 5, &freed));
    CHECK(rkv_tree_delete_namespace(tree, "nobody", 6, &freed) == RKV_OK && freed.num_pages == 0 && freed.num_host_pages == 0);
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_reset(NULL, &freed));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_reset(tree, NULL));
    REFUSED_SIZES(freed, rkv_tree_reset(tree, &freed));
    rkv_freed_release(&freed);
}

static void test_marks_and_paths(void)
{
    const uint32_t masks[] = {256, 0x100u, 0x80000000u, UINT32_MAX};
    rkv_node nodes[4];
    size_t count, i;
    for (i = 0; i < sizeof masks / sizeof *masks; i++) {
        REFUSED(RKV_ERR_ARGUMENT, rkv_tree_mark(tree, a, masks[i], 0, 0));
        REFUSED(RKV_ERR_ARGUMENT, rkv_tree_mark(tree, a, 0, masks[i], 0));
        REFUSED(RKV_ERR_ARGUMENT, rkv_tree_due(tree, a, RKV_NEXT_HOST, 0, masks[i], nodes, 4, &count));
    }
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_mark(tree, a, 3, 2, 0));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_mark(tree, a, 1, 0, 1)); /* inside the node */
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_mark(tree, a, 1, 0, 3)); /* inside its parent */
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_mark(tree, a, 1, 0, 5)); /* above the root */
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_mark(tree, a, 1, 0, SIZE_MAX));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_mark(NULL, a, 1, 0, 0));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_mark(tree, RKV_ROOT, 1, 0, 0));
    REFUSED_HANDLES(rkv_tree_mark(tree, node, 1, 0, 0));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_due(tree, a, -1, 0, 0, nodes, 4, &count));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_due(tree, a, 2, 0, 0, nodes, 4, &count));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_due(NULL, a, RKV_NEXT_HOST, 0, 0, nodes, 4, &count));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_due(tree, a, RKV_NEXT_HOST, 0, 0, NULL, 4, &count));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_due(tree, a, RKV_NEXT_HOST, 0, 0, nodes, 4, NULL));
    REFUSED(RKV_ERR_CAPACITY, rkv_tree_due(tree, a, RKV_NEXT_HOST, 0, 0, nodes, 1, &count));
    CHECK(count == 2);
    REFUSED_HANDLES(rkv_tree_due(tree, node, RKV_NEXT_STORAGE, 0, 0, nodes, 4, &count));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_path(NULL, a, nodes, 4, &count));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_path(tree, a, NULL, 4, &count));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_path(tree, a, nodes, 4, NULL));
    REFUSED(RKV_ERR_CAPACITY, rkv_tree_path(tree, a, nodes, 1, &count));
    CHECK(count == 2);
    REFUSED_HANDLES(rkv_tree_path(tree, node, nodes, 4, &count));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_host_path(NULL, a, nodes, 4, &count));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_host_path(tree, a, NULL, 4, &count));
    REFUSED(RKV_ERR_CAPACITY, rkv_tree_host_path(tree, below_host, nodes, 1, &count));
    CHECK(count == 2);
    REFUSED_HANDLES(rkv_tree_host_path(tree, node, nodes, 4, &count));

    /* what is not refused: a count, the root, the right answers */
    CHECK(rkv_tree_path(tree, a, NULL, 0, &count) == RKV_OK && count == 2);
    CHECK(rkv_tree_path(tree, a, nodes, 4, &count) == RKV_OK && count == 2 && nodes[0] == shared && nodes[1] == a);
    CHECK(rkv_tree_host_path(tree, below_host, nodes, 4, &count) == RKV_OK && count == 2 && nodes[0] == host_only && nodes[1] == below_host);
    CHECK(rkv_tree_host_path(tree, a, nodes, 4, &count) == RKV_OK && count == 0);
    CHECK(rkv_tree_path(tree, RKV_ROOT, nodes, 4, &count) == RKV_OK && count == 0);
    CHECK(rkv_tree_due(tree, RKV_ROOT, RKV_NEXT_HOST, 0, 0, nodes, 4, &count) == RKV_OK && count == 0);
    CHECK(rkv_tree_due(tree, both, RKV_NEXT_HOST, 0, 0, nodes, 4, &count) == RKV_OK && count == 0);
    CHECK(rkv_tree_due(tree, both, RKV_NEXT_STORAGE, 1, 0, nodes, 4, &count) == RKV_OK && count == 1 && nodes[0] == both);
    CHECK(rkv_tree_due(tree, loading, RKV_NEXT_HOST, 0, 0, nodes, 4, &count) == RKV_OK && count == 0);
    CHECK(rkv_tree_due(tree, pending, RKV_NEXT_HOST, 0, 0, nodes, 4, &count) == RKV_OK && count == 0);
    CHECK(rkv_tree_mark(tree, a, 0x82, 0, 4) == RKV_OK);
    CHECK(rkv_tree_due(tree, b, RKV_NEXT_HOST, 0, 2, nodes, 4, &count) == RKV_OK && count == 1 && nodes[0] == b);
    CHECK(rkv_tree_mark(tree, a, 0, 0x82, 4) == RKV_OK);
    check_integrity(tree);
}

static void test_inspection(void)
{
    rkv_event events[4];
    rkv_node_info info;
    rkv_tree_stats stats;
    rkv_node nodes[2];
    int32_t tokens[16], ids[4];
    uint64_t keys[4];
    uint8_t digests[4 * 8];
    char ns[8];
    size_t count;
    RKV_INIT(&info);
    RKV_INIT(&stats);
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_take_events(NULL, events, tokens, 4, &count));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_take_events(tree, NULL, tokens, 4, &count));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_take_events(tree, events, NULL, 4, &count));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_take_events(tree, events, tokens, 4, NULL));
    CHECK(rkv_tree_take_events(tree, NULL, NULL, 0, &count) == RKV_OK && count == 0);

    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_page_keys(NULL, a, keys, 4, &count));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_page_keys(tree, a, NULL, 4, &count));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_page_keys(tree, a, keys, 4, NULL));
    REFUSED(RKV_ERR_CAPACITY, (count = 99, rkv_tree_page_keys(tree, a, keys, 1, &count)));
    CHECK(count == 2);
    CHECK(rkv_tree_page_keys(tree, a, NULL, 0, &count) == RKV_OK && count == 2);
    CHECK(rkv_tree_page_keys(tree, RKV_ROOT, NULL, 0, &count) == RKV_OK && count == 0);
    REFUSED_HANDLES(rkv_tree_page_keys(tree, node, keys, 4, &count));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_page_digests(tree, a, NULL, 4, &count));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_page_digests(tree, a, digests, 4, NULL));
    REFUSED(RKV_ERR_CAPACITY, (count = 99, rkv_tree_page_digests(tree, a, digests, 1, &count)));
    CHECK(count == 2);
    REFUSED_HANDLES(rkv_tree_page_digests(tree, node, digests, 4, &count));

    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_node_info(NULL, a, &info));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_node_info(tree, a, NULL));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_node_info(tree, RKV_ROOT, &info));
    REFUSED_SIZES_OF(info, NODE_INFO_V1, rkv_tree_node_info(tree, a, &info));
    REFUSED_HANDLES(rkv_tree_node_info(tree, node, &info));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_node_data(NULL, a, 4, tokens, ids, NULL));
    REFUSED(RKV_ERR_CAPACITY, rkv_tree_node_data(tree, a, 1, tokens, ids, NULL));
    REFUSED_HANDLES(rkv_tree_node_data(tree, node, 4, tokens, ids, ids));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_node_namespace(NULL, other, ns, sizeof ns, &count));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_node_namespace(tree, other, ns, sizeof ns, NULL));
    REFUSED(RKV_ERR_CAPACITY, (count = 99, rkv_tree_node_namespace(tree, other, ns, 4, &count)));
    CHECK(count == 5);
    REFUSED_HANDLES(rkv_tree_node_namespace(tree, node, ns, sizeof ns, &count));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_nodes(NULL, nodes, 2, &count));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_nodes(tree, nodes, 2, NULL));
    REFUSED(RKV_ERR_CAPACITY, (count = 0, rkv_tree_nodes(tree, nodes, 2, &count)));
    CHECK(rkv_tree_get_stats(tree, &stats) == RKV_OK && count == stats.nodes);
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_get_stats(NULL, &stats));
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_get_stats(tree, NULL));
    REFUSED_SIZES_OF(stats, TREE_STATS_V1, rkv_tree_get_stats(tree, &stats));
}

static void test_check_integrity(void)
{
    int32_t free_ids[64], count = 0, id;
    const int32_t owned[] = {0, 1, 2, 3, 12, 13, 20, 21, 22, 23, 24};
    char message[256];
    rkv_tier_check tier;
    RKV_INIT(&tier);
    for (id = 0; id < 64; id++) {
        size_t i, ours = 0;
        for (i = 0; i < sizeof owned / sizeof *owned; i++) {
            ours |= owned[i] == id;
        }
        if (!ours) {
            free_ids[count++] = id;
        }
    }
    tier.capacity_pages = 64;
    tier.free_page_ids = free_ids;
    tier.num_free_pages = (uint64_t)count;
    CHECK(rkv_tree_check_integrity(tree, &tier, NULL, message, sizeof message) == RKV_OK);
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_check_integrity(NULL, NULL, NULL, message, sizeof message));
    REFUSED_SIZES(tier, rkv_tree_check_integrity(tree, &tier, NULL, message, sizeof message));
    REFUSED_SIZES(tier, rkv_tree_check_integrity(tree, NULL, &tier, message, sizeof message));
    tier.free_page_ids = NULL;
    REFUSED(RKV_ERR_ARGUMENT, rkv_tree_check_integrity(tree, &tier, NULL, message, sizeof message));
    tier.free_page_ids = free_ids;

    /* a lost page, a page too many, a page that is free and in use, one that is free twice: each is found and named */
    tier.capacity_pages = 65;
    REFUSED(RKV_ERR_INTEGRITY, (message[0] = 0, rkv_tree_check_integrity(tree, &tier, NULL, message, sizeof message)));
    CHECK(message[0] != 0);
    tier.capacity_pages = 63;
    REFUSED(RKV_ERR_INTEGRITY, rkv_tree_check_integrity(tree, &tier, NULL, message, sizeof message));
    tier.capacity_pages = 64;
    free_ids[5] = 20;
    REFUSED(RKV_ERR_INTEGRITY, rkv_tree_check_integrity(tree, &tier, NULL, NULL, 0));
    free_ids[5] = free_ids[6];
    REFUSED(RKV_ERR_INTEGRITY, rkv_tree_check_integrity(tree, &tier, NULL, message, sizeof message));
}

/* The same operations that were refused above succeed when they are asked for rightly, down to an empty tree. */
static void test_recovery(void)
{
    int32_t host_id = 60;
    rkv_freed freed;
    rkv_tree_stats stats;
    RKV_INIT(&freed);
    RKV_INIT(&stats);
    CHECK(rkv_tree_finish_load(tree, loading, 1, &freed) == RKV_OK && freed.num_pages == 0);
    CHECK(rkv_tree_finish_backup(tree, pending, &host_id, 1, &freed) == RKV_OK && freed.num_pages == 1 && freed.page_ids[0] == 23);
    CHECK(rkv_tree_evict(tree, INT64_MAX, 0, &freed) == RKV_OK && freed.num_tokens == 10 * PAGE);
    check_integrity(tree);
    CHECK(rkv_tree_evict_host(tree, INT64_MAX, &freed) == RKV_OK && freed.num_tokens == 7 * PAGE);
    CHECK(rkv_tree_get_stats(tree, &stats) == RKV_OK && stats.nodes == 0 && stats.host_tokens == 0 && stats.namespaces == 0);
    CHECK(rkv_tree_evict(tree, INT64_MAX, 1, &freed) == RKV_OK && freed.num_tokens == 0 && freed.num_backups == 0);
    check_integrity(tree);
    rkv_freed_release(&freed);
}

static void test_status_strings(void)
{
    int32_t status, lower;
    for (status = RKV_OK; status > RKV_STATUS_END; status--) {
        CHECK(strcmp(rkv_status_string(status), "unknown status") != 0);
        for (lower = status - 1; lower > RKV_STATUS_END; lower--) {
            CHECK(strcmp(rkv_status_string(status), rkv_status_string(lower)) != 0);
        }
    }
    CHECK(strcmp(rkv_status_string(RKV_STATUS_END), "unknown status") == 0);
    CHECK(strcmp(rkv_status_string(1), "unknown status") == 0);
    CHECK(strcmp(rkv_status_string(INT_MIN), "unknown status") == 0);
}

int main(void)
{
    CHECK(rkv_last_error()[0] == 0);
    build();
    test_create();
    test_match();
    test_match_extend();
    test_insert();
    test_insert_host();
    test_locks();
    test_pins();
    test_evict();
    test_finish_backup();
    test_two_tiers();
    test_structure();
    test_marks_and_paths();
    test_inspection();
    test_check_integrity();
    test_recovery();
    test_status_strings();
    rkv_tree_destroy(tree);
    rkv_tree_destroy(foreign);
    printf("%d misuses refused\n", refusals);
    return 0;
}
