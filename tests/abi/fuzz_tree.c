/* Operations on a tree, decoded from bytes: the target of libFuzzer, and of random_driver.c for the sanitizers and valgrind.
 *
 * The program plays an engine with two small pools. It knows which pages are free, and what each page in use holds: the hash
 * of the tokens from the root to that page. So it can tell at any time
 *   - that tree + free = capacity on both tiers (check_integrity with the free lists),
 *   - that a page which comes out of the tree was in it, and one that a match names holds just that prefix,
 *   - that a call that fails, also for want of memory, has taken and given nothing.
 * Handles, counts and page ids are wrong now and then; whether that is an error is for the library to say, and for the
 * invariants to judge. */
#include "failing_allocator.h"

enum { CAPACITY = 40, MAX_KEY_PAGES = 10, MAX_PAGE = 4, NUM_HANDLES = 24, NUM_MATCHES = 6, NUM_BACKUPS = CAPACITY + 2, MAX_OPS = 400 };

typedef struct pool {
    int32_t free_ids[CAPACITY];
    int num_free;
    uint8_t is_free[CAPACITY];
    uint64_t content[CAPACITY]; /* of pages that the tree owns */
} pool;

typedef struct kept_match {
    rkv_match match;
    const void *ns;
    size_t ns_bytes;
    uint64_t end;               /* hash of the whole hit */
    uint64_t pages[MAX_KEY_PAGES * 2];
} kept_match;

typedef struct backup {
    rkv_node node;
    int num_pages;
    int32_t page_ids[CAPACITY];
} backup;

typedef struct engine {
    const uint8_t *input;
    size_t left;
    failing_allocator memory;
    rkv_tree *tree;
    int page_size;
    uint32_t digest_bytes;      /* 0: the library's own digests */
    pool device, host;
    rkv_node handles[NUM_HANDLES];
    int next_handle;
    kept_match matches[NUM_MATCHES];
    int next_match;
    rkv_node locked[256];
    int num_locked;
    backup backups[NUM_BACKUPS];
    int num_backups;
    rkv_freed freed;
} engine;

/* A key as the input describes it, with the hash of each prefix. */
typedef struct prompt {
    rkv_key key;
    int32_t tokens[(MAX_KEY_PAGES + 1) * MAX_PAGE];
    uint64_t content[MAX_KEY_PAGES];
    int num_pages;
} prompt;

static const char *const tenants[] = {NULL, "", "a", "tenant-b"};

static unsigned take(engine *e)
{
    if (e->left == 0) {
        return 0;
    }
    e->left--;
    return *e->input++;
}

/* 1 in 8 of the time. */
static int rarely(engine *e)
{
    return take(e) % 8 == 7;
}

/* ---- pools ---- */

static void fill_pool(pool *p)
{
    int32_t id;
    p->num_free = CAPACITY;
    for (id = 0; id < CAPACITY; id++) {
        p->free_ids[id] = CAPACITY - 1 - id;
        p->is_free[id] = 1;
    }
}

static int32_t allocate(pool *p)
{
    int32_t id = p->free_ids[--p->num_free];
    p->is_free[id] = 0;
    return id;
}

static void give_back(pool *p, int32_t id)
{
    CHECK(id >= 0 && id < CAPACITY);
    CHECK(!p->is_free[id]); /* freed twice */
    p->is_free[id] = 1;
    p->free_ids[p->num_free++] = id;
}

static void give_back_all(pool *p, const int32_t *ids, int count)
{
    int i;
    for (i = count; i-- > 0;) {
        give_back(p, ids[i]);
    }
}

static void allocate_all(pool *p, int32_t *ids, int count)
{
    int i;
    for (i = 0; i < count; i++) {
        ids[i] = allocate(p);
    }
}

static void keep_handle(engine *e, rkv_node node)
{
    e->handles[e->next_handle++ % NUM_HANDLES] = node;
}

/* Mostly one that was valid once; now and then a mangled one. */
static rkv_node any_handle(engine *e)
{
    unsigned choice = take(e);
    rkv_node node = e->handles[choice % NUM_HANDLES];
    return choice < 240 ? node : node ^ 1ull << choice % 64;
}

static prompt take_prompt(engine *e)
{
    prompt p;
    const char *tenant = tenants[take(e) % 4 * (take(e) % 3 == 0)];
    uint64_t hash = hash_bytes(0xcbf29ce484222325ull, tenant, tenant != NULL ? strlen(tenant) : 0);
    int i, num_tokens;
    p.num_pages = (int)(take(e) % (MAX_KEY_PAGES + 1));
    for (i = 0; i < (MAX_KEY_PAGES + 1) * e->page_size; i += e->page_size) {
        unsigned kind = i < p.num_pages * e->page_size ? take(e) : 0; /* few kinds, so that prefixes are shared */
        int j;
        for (j = 0; j < e->page_size; j++) {
            p.tokens[i + j] = (int32_t)(kind % 3) - 1 + (j + 1 == e->page_size) * (int32_t)(kind / 3 % 2);
        }
    }
    for (i = 0; i < p.num_pages; i++) {
        p.content[i] = hash = hash_bytes(hash, p.tokens + i * e->page_size, (size_t)e->page_size * 4);
    }
    num_tokens = p.num_pages * e->page_size + (int)(take(e) % (unsigned)e->page_size);
    p.key = key_of(tenant, NULL, (size_t)num_tokens);
    return p;
}

/* ---- after each call ---- */

static void check_status(engine *e, rkv_status status)
{
    CHECK(status <= RKV_OK && status > RKV_STATUS_END && status != RKV_ERR_INTEGRITY);
    CHECK(status != RKV_ERR_NO_MEMORY || e->memory.failures > 0);
    CHECK(status == RKV_OK || rkv_last_error()[0] != 0);
}

/* Pages that came out of the tree are ours again. */
static void collect(engine *e)
{
    uint64_t i;
    for (i = 0; i < e->freed.num_pages; i++) {
        give_back(&e->device, e->freed.page_ids[i]);
    }
    for (i = 0; i < e->freed.num_host_pages; i++) {
        give_back(&e->host, e->freed.host_page_ids[i]);
    }
}

static void check_books(engine *e)
{
    rkv_tier_check device, host;
    rkv_tree_stats stats;
    char message[256] = "";
    RKV_INIT(&device);
    RKV_INIT(&host);
    RKV_INIT(&stats);
    device.capacity_pages = host.capacity_pages = CAPACITY;
    device.free_page_ids = e->device.free_ids;
    device.num_free_pages = (uint64_t)e->device.num_free;
    host.free_page_ids = e->host.free_ids;
    host.num_free_pages = (uint64_t)e->host.num_free;
    if (rkv_tree_check_integrity(e->tree, &device, &host, message, sizeof message) != RKV_OK) {
        fprintf(stderr, "check_integrity: %s\n", message);
        abort();
    }
    CHECK(rkv_tree_get_stats(e->tree, &stats) == RKV_OK);
    CHECK(stats.evictable_tokens + stats.protected_tokens == (int64_t)(CAPACITY - e->device.num_free) * e->page_size);
    CHECK(stats.host_tokens == (int64_t)(CAPACITY - e->host.num_free) * e->page_size);
    CHECK(stats.host_evictable_tokens >= 0 && stats.host_evictable_tokens <= stats.host_tokens);
    CHECK(stats.loading_tokens >= 0 && stats.loading_tokens <= stats.protected_tokens);
}

/* The page ids of a hit: in use, and holding the right prefix. */
static void check_hit(engine *e, const rkv_match *match, const int32_t *page_ids, const uint64_t *content, int num_pages)
{
    int on_device = (int)match->num_tokens / e->page_size, on_host = (int)match->host_num_tokens / e->page_size, i;
    CHECK(match->num_tokens % e->page_size == 0 && match->host_num_tokens % e->page_size == 0);
    CHECK(match->num_tokens >= 0 && match->host_num_tokens >= 0 && on_device + on_host <= num_pages);
    CHECK((match->device_node == RKV_ROOT) == (on_device == 0));
    CHECK(match->loading_tokens >= 0 && match->loading_tokens <= match->num_tokens && match->loading_tokens % e->page_size == 0);
    CHECK(on_host > 0 || match->host_node == match->device_node);
    for (i = 0; i < on_device + on_host; i++) {
        const pool *p = i < on_device ? &e->device : &e->host;
        CHECK(page_ids[i] >= 0 && page_ids[i] < CAPACITY && !p->is_free[page_ids[i]]);
        CHECK(p->content[page_ids[i]] == content[i]);
    }
}

/* The pages of a node's path from the root, as far as they are on each tier (-1 where not). Returns their number. */
static int path_pages(engine *e, rkv_node node, int32_t *page_ids, int32_t *host_page_ids, int *own_pages)
{
    rkv_node_info info;
    int end;
    RKV_INIT(&info);
    *own_pages = 0;
    if (node == RKV_ROOT || rkv_tree_node_info(e->tree, node, &info) != RKV_OK) {
        return 0;
    }
    *own_pages = (int)info.num_tokens / e->page_size;
    end = (int)info.path_tokens / e->page_size;
    CHECK(end <= CAPACITY * 2);
    memset(page_ids, 0xff, sizeof *page_ids * CAPACITY * 2);
    memset(host_page_ids, 0xff, sizeof *host_page_ids * CAPACITY * 2);
    for (; node != RKV_ROOT; node = info.parent) {
        int first;
        CHECK(rkv_tree_node_info(e->tree, node, &info) == RKV_OK);
        first = (int)(info.path_tokens - info.num_tokens) / e->page_size;
        CHECK(rkv_tree_node_data(e->tree, node, (size_t)info.num_tokens / (size_t)e->page_size, NULL, page_ids + first,
                                 host_page_ids + first) == RKV_OK);
    }
    return end;
}

/* ---- operations ---- */

static void op_insert(engine *e, int host)
{
    prompt p = take_prompt(e);
    pool *from = host ? &e->host : &e->device;
    int32_t ids[MAX_KEY_PAGES + 1], duplicates[MAX_KEY_PAGES + 1], ours = -1;
    const rkv_match *hint = take(e) % 3 == 0 ? &e->matches[take(e) % NUM_MATCHES].match : NULL;
    int priority = (int)(take(e) % 4) - 1, num_ids = p.num_pages, position = -1, i;
    uint64_t d;
    rkv_insert out;
    rkv_status status;
    RKV_INIT(&out);
    p.key.tokens = p.tokens;
    if (p.num_pages > from->num_free) {
        return;
    }
    allocate_all(from, ids, p.num_pages);
    if (p.num_pages > 0 && rarely(e)) { /* an id that is owned, or free, or no id at all, in place of ours */
        position = (int)(take(e) % (unsigned)p.num_pages);
        ours = ids[position];
        ids[position] = (int32_t)(take(e) % (CAPACITY + 1)) - 1;
        position = ids[position] == ours ? -1 : position;
    }
    if (rarely(e)) {
        num_ids = (int)(take(e) % (MAX_KEY_PAGES + 2));
    }
    status = (host ? rkv_tree_insert_host : rkv_tree_insert)(e->tree, &p.key, ids, (size_t)num_ids,
                                                            hint != NULL && hint->struct_size != 0 ? hint : NULL, priority, duplicates,
                                                            &out);
    check_status(e, status);
    if (position >= 0) {
        int32_t other = ids[position];
        ids[position] = ours;
        if (status == RKV_OK) {
            /* it went well: the stranger was free and is the tree's now, was the tree's own at that place, or is a duplicate */
            int is_duplicate = 0;
            CHECK(other >= 0 && other < CAPACITY);
            for (d = 0; d < out.num_duplicates; d++) {
                is_duplicate |= duplicates[d] == other;
            }
            if (!is_duplicate && from->is_free[other]) {
                for (i = 0; from->free_ids[i] != other; i++) {
                }
                from->free_ids[i] = from->free_ids[--from->num_free];
                from->is_free[other] = 0;
                from->content[other] = p.content[position];
            }
            for (d = 0; d < out.num_duplicates; d++) {
                duplicates[d] = duplicates[d] == other ? ours : duplicates[d];
            }
            if (!is_duplicate) {
                give_back(from, ours);
            }
        }
    }
    if (status != RKV_OK) {
        give_back_all(from, ids, p.num_pages);
        return;
    }
    CHECK(num_ids == p.num_pages && out.num_duplicates <= (uint64_t)p.num_pages);
    CHECK(out.prefix_tokens >= 0 && out.prefix_tokens <= p.num_pages * e->page_size);
    for (i = 0, d = 0; i < p.num_pages; i++) {
        if (d < out.num_duplicates && duplicates[d] == ids[i]) { /* duplicates come in key order */
            give_back(from, ids[i]);
            d++;
        } else if (i != position) {
            from->content[ids[i]] = p.content[i];
        }
    }
    CHECK(d == out.num_duplicates);
    keep_handle(e, out.node);
}

static void op_match(engine *e, int peek_only)
{
    prompt p = take_prompt(e);
    int32_t page_ids[MAX_KEY_PAGES + 1];
    rkv_match peeked, match;
    kept_match *kept;
    rkv_status status;
    int hit;
    RKV_INIT(&peeked);
    RKV_INIT(&match);
    p.key.tokens = p.tokens;
    status = rkv_tree_peek(e->tree, &p.key, page_ids, &peeked);
    check_status(e, status);
    if (status == RKV_OK) {
        check_hit(e, &peeked, page_ids, p.content, p.num_pages);
    }
    if (peek_only) {
        rkv_match many[2];
        rkv_key keys[2];
        many[0] = many[1] = match;
        keys[0] = keys[1] = p.key;
        CHECK(rkv_tree_peek_many(e->tree, keys, 2, many) == RKV_OK && memcmp(&many[1], &peeked, sizeof peeked) == 0);
        return;
    }
    status = rkv_tree_match(e->tree, &p.key, page_ids, &match);
    check_status(e, status);
    if (status != RKV_OK) {
        return;
    }
    check_hit(e, &match, page_ids, p.content, p.num_pages);
    CHECK(match.num_tokens == peeked.num_tokens && match.host_num_tokens == peeked.host_num_tokens);
    keep_handle(e, match.device_node);
    keep_handle(e, match.host_node);
    kept = &e->matches[e->next_match++ % NUM_MATCHES];
    kept->match = match;
    kept->ns = p.key.ns;
    kept->ns_bytes = p.key.ns_bytes;
    hit = (int)(match.num_tokens + match.host_num_tokens) / e->page_size;
    kept->end = hit > 0 ? p.content[hit - 1] : hash_bytes(0xcbf29ce484222325ull, p.key.ns, p.key.ns_bytes);
    memcpy(kept->pages, p.content, sizeof p.content);
}

static void op_extend(engine *e)
{
    kept_match kept = e->matches[take(e) % NUM_MATCHES];
    prompt p = take_prompt(e);
    int32_t page_ids[MAX_KEY_PAGES * 2];
    int before = (int)(kept.match.num_tokens + kept.match.host_num_tokens) / e->page_size, i;
    uint64_t hash = kept.end;
    rkv_match match;
    rkv_status status;
    RKV_INIT(&match);
    if (kept.match.struct_size == 0 || before + p.num_pages > MAX_KEY_PAGES * 2) {
        return;
    }
    p.key.tokens = p.tokens;
    if (!rarely(e)) {
        p.key.ns = kept.ns;
        p.key.ns_bytes = kept.ns_bytes;
    }
    status = rkv_tree_match_extend(e->tree, &kept.match, &p.key, page_ids, &match);
    check_status(e, status);
    if (status != RKV_OK) {
        return;
    }
    for (i = 0; i < p.num_pages; i++) {
        kept.pages[before + i] = hash = hash_bytes(hash, p.tokens + i * e->page_size, (size_t)e->page_size * 4);
    }
    check_hit(e, &match, page_ids, kept.pages, before + p.num_pages);
    CHECK(match.num_tokens + match.host_num_tokens >= before * e->page_size);
    keep_handle(e, match.device_node);
    keep_handle(e, match.host_node);
}

static void op_lock(engine *e)
{
    rkv_node node = any_handle(e);
    int64_t delta = 0;
    rkv_status status;
    if (e->num_locked == 256) {
        return;
    }
    status = rkv_tree_lock(e->tree, node, &delta);
    check_status(e, status);
    if (status == RKV_OK) {
        CHECK(delta <= 0 && delta % e->page_size == 0);
        e->locked[e->num_locked++] = node;
    }
}

static void op_unlock(engine *e)
{
    int which;
    int64_t delta = 0;
    rkv_status status;
    if (e->num_locked == 0 || rarely(e)) {
        /* may take away a lock that is on our list: then the unlock from the list is what fails */
        check_status(e, rkv_tree_unlock(e->tree, any_handle(e), &delta));
        return;
    }
    which = (int)(take(e) % (unsigned)e->num_locked);
    status = rkv_tree_unlock(e->tree, e->locked[which], &delta);
    check_status(e, status);
    CHECK(status != RKV_OK || (delta >= 0 && delta % e->page_size == 0));
    if (status != RKV_ERR_NO_MEMORY) {
        e->locked[which] = e->locked[--e->num_locked];
    }
}

static void op_protect(engine *e)
{
    rkv_node node = any_handle(e);
    int64_t delta, now = take(e);
    uint64_t removed;
    switch (take(e) % 5) {
    case 0: check_status(e, rkv_tree_protect_host(e->tree, node)); break;
    case 1: check_status(e, rkv_tree_release_host(e->tree, node)); break;
    case 2: check_status(e, rkv_tree_pin(e->tree, node, now, &delta)); break;
    case 3: check_status(e, rkv_tree_unpin(e->tree, node, &delta)); break;
    default: check_status(e, rkv_tree_expire(e->tree, now, &removed));
    }
}

static void op_evict(engine *e)
{
    int64_t num_tokens = (int64_t)(take(e) % (CAPACITY + 8)) * e->page_size - (rarely(e) ? 5 : 0);
    int with_backup = take(e) % 2;
    uint64_t i, j;
    rkv_status status = rkv_tree_evict(e->tree, num_tokens, with_backup, &e->freed);
    check_status(e, status);
    if (status != RKV_OK) {
        return;
    }
    CHECK(num_tokens >= 0 && e->freed.num_tokens == (int64_t)e->freed.num_pages * e->page_size);
    CHECK(with_backup || e->freed.num_backups == 0);
    collect(e);
    for (i = 0; i < e->freed.num_backups; i++) {
        const rkv_backup *listed = &e->freed.backups[i];
        backup *b = &e->backups[e->num_backups];
        CHECK(e->num_backups < NUM_BACKUPS && listed->num_pages > 0 && listed->num_pages <= CAPACITY);
        CHECK(listed->first_page + listed->num_pages <= e->freed.num_backup_pages);
        e->num_backups++;
        b->node = listed->node;
        b->num_pages = (int)listed->num_pages;
        for (j = 0; j < listed->num_pages; j++) {
            b->page_ids[j] = e->freed.backup_page_ids[listed->first_page + j];
            CHECK(!e->device.is_free[b->page_ids[j]]);
        }
        keep_handle(e, b->node);
    }
}

/* The oldest of the list is settled; or, wrongly, another node. */
static void op_finish_backup(engine *e)
{
    int32_t ids[CAPACITY];
    int count, right = e->num_backups > 0 && !rarely(e), i;
    backup b = e->backups[0];
    rkv_status status;
    if (!right) {
        b.node = any_handle(e);
        b.num_pages = (int)(take(e) % 4);
        for (i = 0; i < e->num_backups; i++) {
            if (e->backups[i].node == b.node) {
                return;
            }
        }
    }
    count = b.num_pages;
    if (count > e->host.num_free || take(e) % 4 == 0) { /* no room */
        status = rkv_tree_finish_backup(e->tree, b.node, NULL, 0, &e->freed);
        count = 0;
    } else {
        allocate_all(&e->host, ids, count);
        status = rkv_tree_finish_backup(e->tree, b.node, ids, (size_t)count, &e->freed);
    }
    check_status(e, status);
    if (status != RKV_OK) {
        give_back_all(&e->host, ids, count);
    } else {
        CHECK(right); /* every pending node is on the list under the handle that evict gave */
        for (i = 0; i < count; i++) {
            e->host.content[ids[i]] = e->device.content[b.page_ids[i]];
        }
        collect(e);
    }
    if (right && status != RKV_ERR_NO_MEMORY) {
        CHECK(status == RKV_OK || status == RKV_ERR_HANDLE); /* it may have been reset away */
        memmove(e->backups, e->backups + 1, sizeof *e->backups * (size_t)--e->num_backups);
    }
}

static void op_evict_host(engine *e)
{
    int64_t wanted = (int64_t)(take(e) % CAPACITY) * e->page_size;
    rkv_tree_stats stats;
    rkv_status status;
    RKV_INIT(&stats);
    CHECK(rkv_tree_get_stats(e->tree, &stats) == RKV_OK);
    status = rkv_tree_evict_host(e->tree, wanted, &e->freed);
    check_status(e, status);
    if (status == RKV_OK) {
        CHECK(e->freed.num_tokens <= stats.host_evictable_tokens);
        CHECK(e->memory.failures > 0 || e->freed.num_tokens >= (wanted < stats.host_evictable_tokens ? wanted : stats.host_evictable_tokens));
        CHECK(e->freed.num_pages == 0 && e->freed.num_tokens == (int64_t)e->freed.num_host_pages * e->page_size);
        collect(e);
    }
}

/* Copy a node's pages to the other tier. */
static void op_copy(engine *e, int to_host)
{
    rkv_node node = any_handle(e);
    int32_t page_ids[CAPACITY * 2], host_page_ids[CAPACITY * 2], ids[CAPACITY];
    int count, end = path_pages(e, node, page_ids, host_page_ids, &count), i;
    pool *to = to_host ? &e->host : &e->device;
    rkv_status status;
    if (rarely(e)) {
        count = (int)(take(e) % 6);
    }
    if (count > to->num_free) {
        return;
    }
    allocate_all(to, ids, count);
    status = to_host ? rkv_tree_set_host(e->tree, node, ids, (size_t)count)
                     : rkv_tree_set_device(e->tree, node, ids, (size_t)count, take(e) % 2);
    check_status(e, status);
    if (status != RKV_OK) {
        give_back_all(to, ids, count);
        return;
    }
    CHECK(count > 0 && count <= end);
    for (i = 0; i < count; i++) {
        int32_t source = (to_host ? page_ids : host_page_ids)[end - count + i];
        CHECK(source >= 0);
        to->content[ids[i]] = (to_host ? &e->device : &e->host)->content[source];
    }
}

static void op_finish_load(engine *e)
{
    rkv_status status = rkv_tree_finish_load(e->tree, any_handle(e), take(e) % 3 > 0, &e->freed);
    check_status(e, status);
    if (status == RKV_OK) {
        collect(e);
    }
}

static void op_split(engine *e)
{
    rkv_node upper;
    rkv_status status = rkv_tree_split_at(e->tree, any_handle(e), (int64_t)(take(e) % 12) * e->page_size - (rarely(e) ? 1 : 0), &upper);
    check_status(e, status);
    if (status == RKV_OK) {
        keep_handle(e, upper);
    }
}

static void op_delete(engine *e)
{
    const char *tenant = tenants[take(e) % 4];
    rkv_status status;
    switch (take(e) % 16) {
    case 0:
        status = rkv_tree_reset(e->tree, &e->freed);
        e->num_backups = status == RKV_OK ? e->num_backups > 0 : e->num_backups; /* one to find that it is stale now */
        break;
    case 1:
    case 2:
        status = rkv_tree_delete_namespace(e->tree, tenant, tenant != NULL ? strlen(tenant) : 0, &e->freed);
        break;
    default: status = rkv_tree_delete(e->tree, any_handle(e), &e->freed);
    }
    check_status(e, status);
    if (status == RKV_OK) {
        collect(e);
    }
}

/* Each page's digest is that of its whole prefix, whatever splits and joins there were. */
static void check_digests(engine *e, rkv_node node)
{
    int32_t page_ids[CAPACITY * 2], host_page_ids[CAPACITY * 2];
    uint8_t digests[CAPACITY * 64];
    int own, end = path_pages(e, node, page_ids, host_page_ids, &own), i;
    size_t count;
    if (e->digest_bytes == 0 || end == 0 || rkv_tree_page_digests(e->tree, node, digests, CAPACITY, &count) != RKV_OK) {
        return;
    }
    CHECK(count == (size_t)own);
    for (i = 0; i < own; i++) {
        int32_t id = page_ids[end - own + i], host_id = host_page_ids[end - own + i];
        uint64_t expected = id >= 0 ? e->device.content[id] : e->host.content[host_id];
        CHECK(memcmp(digests + (size_t)i * e->digest_bytes, &expected, sizeof expected) == 0);
        CHECK(e->digest_bytes == 8 || digests[(size_t)(i + 1) * e->digest_bytes - 1] == e->digest_bytes - 1);
    }
}

/* What mark, path, host_path and due say of a node agrees with what node_info says of each node of its path. */
static void op_path(engine *e, rkv_node node)
{
    rkv_node path[CAPACITY * 2], tail[CAPACITY * 2], due[2][CAPACITY * 2], parent = RKV_ROOT;
    uint32_t set = take(e), clear = take(e), hits = take(e) % 4, without = take(e) % 4;
    size_t num_path = 0, num_tail = 0, num_due[2] = {0, 0}, at_tail = 0, at_due[2] = {0, 0}, i;
    check_status(e, rkv_tree_mark(e->tree, node, set, clear & ~set, take(e) % 6));
    if (rkv_tree_path(e->tree, node, path, CAPACITY * 2, &num_path) != RKV_OK) {
        CHECK(rkv_tree_host_path(e->tree, node, tail, CAPACITY * 2, &num_tail) == RKV_ERR_HANDLE);
        return;
    }
    CHECK(rkv_tree_host_path(e->tree, node, tail, CAPACITY * 2, &num_tail) == RKV_OK);
    CHECK(rkv_tree_due(e->tree, node, RKV_NEXT_HOST, hits, without, due[0], CAPACITY * 2, &num_due[0]) == RKV_OK);
    CHECK(rkv_tree_due(e->tree, node, RKV_NEXT_STORAGE, hits, without, due[1], CAPACITY * 2, &num_due[1]) == RKV_OK);
    CHECK(num_path > 0 ? path[num_path - 1] == node : node == RKV_ROOT);
    for (i = 0; i < num_path; i++) {
        rkv_node_info info;
        int is_due;
        RKV_INIT(&info);
        CHECK(rkv_tree_node_info(e->tree, path[i], &info) == RKV_OK && info.parent == parent);
        CHECK(info.on_device || tail[at_tail] == path[i]);
        at_tail += !info.on_device;
        is_due = info.hit_count >= hits && (info.marks & without) == 0;
        if (is_due && info.on_device && !info.on_host && !info.loading && !info.backup_pending) {
            CHECK(due[0][at_due[0]++] == path[i]);
        }
        if (is_due && info.on_host) {
            CHECK(due[1][at_due[1]++] == path[i]);
        }
        parent = path[i];
    }
    CHECK(at_tail == num_tail && at_due[0] == num_due[0] && at_due[1] == num_due[1]);
}

static void op_inspect(engine *e)
{
    rkv_event events[8];
    rkv_node nodes[CAPACITY * 2], node = any_handle(e);
    int32_t tokens[MAX_KEY_PAGES * 2 * MAX_PAGE], page_ids[CAPACITY * 2], host_page_ids[CAPACITY * 2];
    uint64_t keys[CAPACITY];
    uint8_t digests[CAPACITY * 64];
    char ns[16];
    size_t count = 0, room_for = take(e) % 8, i;
    check_status(e, rkv_tree_page_keys(e->tree, node, keys, room_for, &count));
    check_status(e, rkv_tree_page_digests(e->tree, node, digests, room_for, &count));
    check_digests(e, node);
    check_status(e, rkv_tree_node_data(e->tree, node, room_for, tokens, page_ids, host_page_ids));
    check_status(e, rkv_tree_node_namespace(e->tree, node, ns, room_for, &count));
    check_status(e, rkv_tree_nodes(e->tree, nodes, CAPACITY * 2, &count));
    CHECK(count <= CAPACITY * 2);
    if (count > 0) {
        keep_handle(e, nodes[take(e) % count]);
    }
    if (rkv_tree_take_events(e->tree, events, tokens, room_for, &count) == RKV_OK) {
        CHECK(count <= room_for);
        for (i = 0; i < count; i++) {
            CHECK(events[i].kind >= RKV_EVENT_STORED && events[i].kind <= RKV_EVENT_CLEARED);
            CHECK(events[i].has_tokens == (events[i].kind == RKV_EVENT_STORED));
        }
    }
    op_path(e, any_handle(e));
}

/* Digests of the engine's own, of a width that the input chooses: chained like those of a cryptographic hash. */
static void hash_pages(void *ctx, const rkv_page_run *run)
{
    engine *e = ctx;
    uint64_t hash = hash_bytes(0xcbf29ce484222325ull, run->ns, run->ns_bytes);
    size_t i, j;
    CHECK(run->struct_size == sizeof *run && run->page_size == e->page_size && run->num_pages > 0);
    if (run->parent != NULL) {
        memcpy(&hash, run->parent, sizeof hash);
    }
    for (i = 0; i < run->num_pages; i++) {
        hash = hash_bytes(hash, run->tokens + i * (size_t)e->page_size, (size_t)e->page_size * 4);
        memcpy(run->digests + i * e->digest_bytes, &hash, sizeof hash);
        for (j = sizeof hash; j < e->digest_bytes; j++) {
            run->digests[i * e->digest_bytes + j] = (uint8_t)j;
        }
    }
}

static void start(engine *e)
{
    static const uint32_t digest_widths[] = {0, 0, 8, 9, 32, 64};
    static const int page_sizes[] = {1, 2, 3, 4};
    rkv_tree_config config;
    RKV_INIT(&config);
    RKV_INIT(&e->freed);
    config.page_size = e->page_size = page_sizes[take(e) % 4];
    config.policy = (int32_t)(take(e) % RKV_POLICY_END);
    config.flags = take(e) % 2 ? RKV_TREE_EVENTS : 0;
    config.max_events = take(e) % 2 ? 16 : 0;
    config.allocator.reallocate = failing_reallocate;
    config.allocator.ctx = &e->memory;
    e->digest_bytes = digest_widths[take(e) % 6];
    if (e->digest_bytes > 0) {
        config.page_hash = hash_pages;
        config.page_hash_ctx = e;
        config.digest_bytes = e->digest_bytes;
    }
    e->memory.random = 88172645463325252ull + take(e);
    CHECK(rkv_tree_create(&config, &e->tree) == RKV_OK);
    fill_pool(&e->device);
    fill_pool(&e->host);
}

static void one_op(engine *e)
{
    switch (take(e) % 24) {
    case 0: case 1: case 2: case 3: op_insert(e, 0); break;
    case 4: op_insert(e, 1); break;
    case 5: case 6: op_match(e, 0); break;
    case 7: op_match(e, 1); break;
    case 8: op_extend(e); break;
    case 9: op_lock(e); break;
    case 10: case 11: op_unlock(e); break;
    case 12: op_protect(e); break;
    case 13: case 14: op_evict(e); break;
    case 15: case 16: op_finish_backup(e); break;
    case 17: op_evict_host(e); break;
    case 18: op_copy(e, 1); break;
    case 19: op_copy(e, 0); break;
    case 20: op_finish_load(e); break;
    case 21: op_split(e); break;
    case 22: op_delete(e); break;
    default: op_inspect(e);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    engine *e = room(1, sizeof *e);
    int op, failing = 0;
    e->input = data;
    e->left = size;
    start(e);
    for (op = 0; op < MAX_OPS && e->left > 0; op++) {
        if (failing == 0 && take(e) % 32 == 31) { /* memory is short for a while */
            e->memory.one_in = 2 + take(e) % 6;
            failing = 6;
        }
        e->memory.armed = failing > 0;
        e->memory.failures = 0;
        one_op(e);
        e->memory.armed = 0;
        failing -= failing > 0;
        if (op % 4 == 0) {
            check_books(e);
        }
    }
    check_books(e);
    CHECK(rkv_tree_reset(e->tree, &e->freed) == RKV_OK);
    collect(e);
    CHECK(e->device.num_free == CAPACITY && e->host.num_free == CAPACITY);
    check_books(e);
    rkv_tree_destroy(e->tree);
    rkv_freed_release(&e->freed);
    CHECK(e->memory.live_bytes == 0);
    free(e);
    return 0;
}
