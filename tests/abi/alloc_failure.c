/* Fail the 1st, the 2nd, the 3rd ... request for memory of a script that uses every operation, until the script runs through.
 *
 * After each failure: the status is RKV_ERR_NO_MEMORY, the tree is exactly as it was and sound, and the same call succeeds
 * when it is made again. What is answered later, and what the tree holds at the end, is as in a run with no failure, and
 * nothing has leaked.
 *
 * Two answers are no failures though a request failed: an evict that had freed something already says how much, and a call
 * whose event found no room in the queue succeeds and counts a dropped event.
 *
 * The script starts with a varying number of plain inserts, so that tables grow in the middle of ever different operations. */
#include "failing_allocator.h"

enum { PAGE = 3, PROMPTS = 24, MAX_PAGES = 8, MAX_STEPS = 2000 };

enum op {
    CREATE, FILL, INSERT, INSERT_HINTED, INSERT_HOST, MATCH, EXTEND, PEEK, PEEK_MANY, LOCK, UNLOCK, PROTECT, RELEASE, PIN, UNPIN,
    EXPIRE, EVICT, EVICT_BACKUP, FINISH_BACKUP, EVICT_HOST, SET_HOST, SET_DEVICE, FINISH_LOAD, SPLIT, DELETE, DELETE_NAMESPACE,
    TAKE_EVENTS, PAGE_KEYS, PAGE_DIGESTS, NODES, INFO, STATS, CHECK_INTEGRITY, RESET, NUM_OPS
};

typedef struct step {
    enum op op;
    int prompt;
} step;

typedef struct run {
    failing_allocator memory;
    rkv_tree *tree;
    rkv_freed freed;
    rkv_freed backups;          /* of the last evict with backup */
    int32_t next_page, next_host_page;
    uint64_t seen;              /* hash of what the operations answered */
    uint64_t seen_events;
    int dropped_event;          /* from here on the events are not those of a run without failure */
    int evicted_less;           /* from here on nothing is, but all must stay sound */
} run;

static step script[MAX_STEPS];
static int num_steps, with_events;
static rkv_status expected[MAX_STEPS];
static uint64_t requests_after[MAX_STEPS];
static uint64_t seen_after[MAX_STEPS];
static uint64_t seen_events_after[MAX_STEPS];
static uint64_t dropped_events, partial_evictions;
static uint64_t failures_in[NUM_OPS];

/* Prompts come in groups of four that share two pages; every sixth is of another tenant. */
static size_t make_prompt(int prompt, int32_t *tokens)
{
    size_t num_tokens = (size_t)(2 + 1 + prompt % 3 * 2) * PAGE, i;
    for (i = 0; i < num_tokens; i++) {
        tokens[i] = (int32_t)(i < 2 * PAGE ? prompt / 4 * 1000 + (int)i : prompt * 1000 + 500 + (int)i);
    }
    return num_tokens;
}

static const char *tenant_of(int prompt)
{
    return prompt % 6 == 5 ? "tenant" : NULL;
}

static rkv_match peek(run *r, int prompt)
{
    int32_t tokens[MAX_PAGES * PAGE];
    rkv_key key = key_of(tenant_of(prompt), tokens, make_prompt(prompt, tokens));
    rkv_match match;
    RKV_INIT(&match);
    CHECK(rkv_tree_peek(r->tree, &key, NULL, &match) == RKV_OK);
    return match;
}

static rkv_node_info info_of(run *r, rkv_node node)
{
    rkv_node_info info;
    RKV_INIT(&info);
    if (node != RKV_ROOT) {
        CHECK(rkv_tree_node_info(r->tree, node, &info) == RKV_OK);
    }
    return info;
}

static void see(run *r, uint64_t value)
{
    r->seen = hash_bytes(r->seen, &value, sizeof value);
}

static void see_freed(run *r, const rkv_freed *freed)
{
    see(r, (uint64_t)freed->num_tokens);
    r->seen = hash_bytes(r->seen, freed->page_ids, (size_t)freed->num_pages * 4);
    r->seen = hash_bytes(r->seen, freed->host_page_ids, (size_t)freed->num_host_pages * 4);
    r->seen = hash_bytes(r->seen, freed->backup_page_ids, (size_t)freed->num_backup_pages * 4);
}

static rkv_status do_create(run *r)
{
    rkv_tree_config config;
    RKV_INIT(&config);
    config.page_size = PAGE;
    config.flags = with_events ? RKV_TREE_EVENTS : 0; /* without, page digests are made only when asked for */
    config.allocator.reallocate = failing_reallocate;
    config.allocator.ctx = &r->memory;
    return rkv_tree_create(&config, &r->tree);
}

static rkv_status do_insert(run *r, step s, int host)
{
    int32_t tokens[MAX_PAGES * PAGE], ids[MAX_PAGES], duplicates[MAX_PAGES];
    rkv_key key = key_of(tenant_of(s.prompt), tokens, make_prompt(s.prompt, tokens));
    size_t num_pages = key.num_tokens / PAGE, i;
    int32_t *next = host ? &r->next_host_page : &r->next_page;
    rkv_match hint;
    rkv_insert out;
    rkv_status status;
    RKV_INIT(&out);
    for (i = 0; i < num_pages; i++) {
        ids[i] = *next + (int32_t)i;
    }
    if (s.op == INSERT_HINTED) {
        hint = peek(r, s.prompt);
    }
    status = (host ? rkv_tree_insert_host : rkv_tree_insert)(r->tree, &key, ids, num_pages, s.op == INSERT_HINTED ? &hint : NULL,
                                                            s.prompt, duplicates, &out);
    if (status == RKV_OK) {
        *next += 1000; /* far apart, so that books of page ids grow too */
        see(r, (uint64_t)out.prefix_tokens);
        r->seen = hash_bytes(r->seen, duplicates, (size_t)out.num_duplicates * 4);
    }
    return status;
}

static rkv_status do_match(run *r, step s)
{
    int32_t tokens[MAX_PAGES * PAGE], ids[MAX_PAGES];
    rkv_key key = key_of(tenant_of(s.prompt), tokens, make_prompt(s.prompt, tokens));
    rkv_match match, prior;
    rkv_status status;
    RKV_INIT(&match);
    if (s.op == MATCH || s.op == PEEK) {
        key.num_tokens -= PAGE; /* ends inside a node, so that match splits it */
        status = (s.op == MATCH ? rkv_tree_match : rkv_tree_peek)(r->tree, &key, ids, &match);
    } else if (s.op == PEEK_MANY) {
        status = rkv_tree_peek_many(r->tree, &key, 1, &match);
    } else {
        prior = peek(r, s.prompt);
        if (info_of(r, prior.host_node).path_tokens != prior.num_tokens + prior.host_num_tokens) {
            return RKV_OK;
        }
        key.num_tokens = PAGE;
        status = rkv_tree_match_extend(r->tree, &prior, &key, ids, &match);
    }
    if (status == RKV_OK) {
        see(r, (uint64_t)match.num_tokens);
        see(r, (uint64_t)match.host_num_tokens);
    }
    return status;
}

/* Operations on the node where the hit of a prompt ends; what is impossible there fails alike in every run. */
static rkv_status do_node(run *r, step s)
{
    rkv_match match = peek(r, s.prompt);
    rkv_node node = s.op == SET_DEVICE || s.op == FINISH_LOAD || s.op == PROTECT || s.op == RELEASE ? match.host_node : match.device_node;
    rkv_node_info info = info_of(r, node);
    size_t num_pages = (size_t)info.num_tokens / PAGE, i, count;
    int32_t ids[MAX_PAGES] = {0};
    uint64_t keys[MAX_PAGES];
    uint8_t digests[MAX_PAGES * 8];
    rkv_node upper;
    rkv_status status = RKV_OK;
    for (i = 0; i < num_pages; i++) {
        ids[i] = (s.op == SET_DEVICE ? r->next_page : r->next_host_page) + (int32_t)i;
    }
    switch (s.op) {
    case LOCK: return rkv_tree_lock(r->tree, node, NULL);
    case UNLOCK: return rkv_tree_unlock(r->tree, node, NULL);
    case PROTECT: return rkv_tree_protect_host(r->tree, node);
    case RELEASE: return rkv_tree_release_host(r->tree, node);
    case PIN: return rkv_tree_pin(r->tree, node, 1000 + s.prompt, NULL);
    case UNPIN: return rkv_tree_unpin(r->tree, node, NULL);
    case SPLIT: return rkv_tree_split_at(r->tree, node, PAGE, &upper);
    case PAGE_KEYS: return rkv_tree_page_keys(r->tree, node, keys, MAX_PAGES, &count);
    case PAGE_DIGESTS: return rkv_tree_page_digests(r->tree, node, digests, MAX_PAGES, &count);
    case INFO: return rkv_tree_node_data(r->tree, node, MAX_PAGES, NULL, ids, NULL);
    case DELETE: status = rkv_tree_delete(r->tree, node, &r->freed); break;
    case FINISH_LOAD: status = rkv_tree_finish_load(r->tree, node, s.prompt % 2, &r->freed); break;
    case SET_HOST: status = rkv_tree_set_host(r->tree, node, ids, num_pages); break;
    case SET_DEVICE: status = rkv_tree_set_device(r->tree, node, ids, num_pages, s.prompt % 3 != 0); break;
    default: CHECK(0);
    }
    if (status == RKV_OK && s.op == SET_HOST) {
        r->next_host_page += 1000;
    } else if (status == RKV_OK && s.op == SET_DEVICE) {
        r->next_page += 1000;
    } else if (status == RKV_OK) {
        see_freed(r, &r->freed);
    }
    return status;
}

/* One entry of the last evict(backup): the prompt says which. */
static rkv_status do_finish_backup(run *r, step s)
{
    int32_t ids[MAX_PAGES];
    const rkv_backup *backup = &r->backups.backups[s.prompt / 2];
    rkv_status status;
    uint64_t i;
    if ((uint64_t)s.prompt / 2 >= r->backups.num_backups) {
        return RKV_OK;
    }
    for (i = 0; i < backup->num_pages; i++) {
        ids[i] = r->next_host_page + (int32_t)i;
    }
    status = rkv_tree_finish_backup(r->tree, backup->node, s.prompt % 5 == 0 ? NULL : ids, (size_t)backup->num_pages, &r->freed);
    if (status == RKV_OK) {
        r->next_host_page += 1000;
        see_freed(r, &r->freed);
    }
    return status;
}

static rkv_status do_tree(run *r, step s)
{
    rkv_event events[7];
    int32_t tokens[7 * PAGE];
    rkv_node nodes[256];
    rkv_tree_stats stats;
    rkv_freed *freed = s.op == EVICT_BACKUP ? &r->backups : &r->freed;
    uint64_t removed;
    size_t count, i;
    rkv_status status;
    RKV_INIT(&stats);
    switch (s.op) {
    case EXPIRE: return rkv_tree_expire(r->tree, 1000 + s.prompt, &removed);
    case NODES: return rkv_tree_nodes(r->tree, nodes, 256, &count);
    case STATS: return rkv_tree_get_stats(r->tree, &stats);
    case CHECK_INTEGRITY: return rkv_tree_check_integrity(r->tree, NULL, NULL, NULL, 0);
    case TAKE_EVENTS:
        status = rkv_tree_take_events(r->tree, events, tokens, 7, &count);
        for (i = 0; status == RKV_OK && i < count; i++) {
            r->seen_events = hash_bytes(r->seen_events, &events[i], sizeof events[i]);
        }
        return status;
    case EVICT: status = rkv_tree_evict(r->tree, s.prompt * PAGE, 0, freed); break;
    case EVICT_BACKUP: status = rkv_tree_evict(r->tree, s.prompt * PAGE, 1, freed); break;
    case EVICT_HOST: status = rkv_tree_evict_host(r->tree, s.prompt * PAGE, freed); break;
    case DELETE_NAMESPACE: status = rkv_tree_delete_namespace(r->tree, "tenant", 6, freed); break;
    case RESET: status = rkv_tree_reset(r->tree, freed); break;
    default: CHECK(0); return RKV_OK;
    }
    if (status == RKV_OK) {
        see_freed(r, freed);
    }
    return status;
}

static rkv_status perform(run *r, step s)
{
    switch (s.op) {
    case CREATE: return do_create(r);
    case FILL:
    case INSERT:
    case INSERT_HINTED: return do_insert(r, s, 0);
    case INSERT_HOST: return do_insert(r, s, 1);
    case MATCH:
    case EXTEND:
    case PEEK:
    case PEEK_MANY: return do_match(r, s);
    case FINISH_BACKUP: return do_finish_backup(r, s);
    case EXPIRE:
    case NODES:
    case STATS:
    case CHECK_INTEGRITY:
    case TAKE_EVENTS:
    case EVICT:
    case EVICT_BACKUP:
    case EVICT_HOST:
    case DELETE_NAMESPACE:
    case RESET: return do_tree(r, s);
    default: return do_node(r, s);
    }
}

static void say(enum op op, int first, int count, int stride)
{
    int i;
    for (i = 0; i < count; i++) {
        CHECK(num_steps < MAX_STEPS);
        script[num_steps].op = op;
        script[num_steps++].prompt = first + i * stride;
    }
}

static void write_script(int fill)
{
    num_steps = 0;
    say(CREATE, 0, 1, 0);
    say(FILL, 1000, fill, 1);
    say(INSERT, 0, PROMPTS, 1);
    say(MATCH, 0, PROMPTS / 2, 2);
    say(LOCK, 1, 6, 4);
    say(PIN, 2, 6, 3);
    say(INSERT_HINTED, 0, PROMPTS, 1);
    say(PAGE_KEYS, 0, 8, 3);
    say(PAGE_DIGESTS, 1, 8, 3);
    say(SET_HOST, 0, 10, 2);
    say(TAKE_EVENTS, 0, 3, 0);
    say(EVICT_BACKUP, 20, 1, 0);
    say(SPLIT, 0, 12, 2);
    say(PEEK, 0, 4, 1);
    say(FINISH_BACKUP, 0, PROMPTS, 1);
    say(PROTECT, 0, 6, 4);
    say(EVICT, 30, 1, 0);
    say(INSERT_HOST, 0, PROMPTS, 1);
    say(SET_DEVICE, 0, PROMPTS, 1);
    say(MATCH, 1, PROMPTS / 2, 2);
    say(FINISH_LOAD, 0, PROMPTS, 1);
    say(PEEK_MANY, 0, 4, 1);
    say(EXTEND, 0, PROMPTS, 1);
    say(UNLOCK, 1, 6, 4);
    say(RELEASE, 0, 6, 4);
    say(EXPIRE, 6, 1, 0);
    say(UNPIN, 2, 6, 3);
    say(NODES, 0, 1, 0);
    say(INFO, 0, 4, 1);
    say(STATS, 0, 1, 0);
    say(CHECK_INTEGRITY, 0, 1, 0);
    say(EVICT, 15, 2, 10);
    say(EVICT_HOST, 12, 2, 10);
    say(INSERT, 0, PROMPTS / 2, 2);
    say(DELETE, 0, 6, 4);
    say(DELETE_NAMESPACE, 0, 1, 0);
    say(INSERT, 3, PROMPTS / 3, 3);
    say(RESET, 0, 1, 0);
    say(TAKE_EVENTS, 0, 1, 0);
    say(INSERT, 0, 8, 1);
}

/* One step in which a request for memory fails, and then the same again. Returns the status in the end. */
static rkv_status fail_step(run *r, int index)
{
    step s = script[index];
    picture before, after;
    uint64_t seen = r->seen;
    rkv_status status;
    if (r->tree != NULL) {
        before = take_picture(r->tree);
    }
    r->memory.armed = 1;
    status = perform(r, s);
    r->memory.armed = 0;
    CHECK(r->memory.failures == 1);
    failures_in[s.op]++;
    if (status == RKV_OK && s.op != CREATE) {
        after = take_picture(r->tree);
        if (after.stats.dropped_events > before.stats.dropped_events) {
            CHECK(expected[index] == RKV_OK && after.stats.dropped_events == before.stats.dropped_events + 1);
            r->dropped_event = 1;
            dropped_events++;
        } else {
            CHECK((s.op == EVICT || s.op == EVICT_BACKUP || s.op == EVICT_HOST) && !same_picture(&before, &after));
            r->evicted_less = 1;
            partial_evictions++;
        }
        drop_picture(&before);
        drop_picture(&after);
        return status;
    }
    CHECK(status == RKV_ERR_NO_MEMORY);
    CHECK(rkv_last_error()[0] != 0);
    CHECK(r->seen == seen);
    if (s.op == CREATE) {
        r->tree = NULL;
        CHECK(r->memory.live_bytes == 0);
    } else {
        after = take_picture(r->tree);
        CHECK(same_picture(&before, &after));
        check_integrity(r->tree);
        drop_picture(&before);
        drop_picture(&after);
    }
    return perform(r, s);
}

/* What was answered up to here is what a run without failure answered: no failed call has left a trace. */
static void check_seen(const run *r, int index, rkv_status status)
{
    if (r->evicted_less) {
        CHECK(status != RKV_ERR_NO_MEMORY && status != RKV_ERR_INTEGRITY);
        check_integrity(r->tree);
        return;
    }
    CHECK(status == expected[index]);
    if (r->seen != seen_after[index] || (!r->dropped_event && r->seen_events != seen_events_after[index])) {
        fprintf(stderr, "after the failure of request %d, step %d (operation %d, prompt %d) answers differently\n",
                (int)r->memory.fail_at, index, (int)script[index].op, script[index].prompt);
        abort();
    }
}

/* The whole script; the fail_at'th request fails (0: none). Returns what the tree holds at the end. */
static picture run_script(uint64_t fail_at, uint64_t *failures)
{
    run r;
    picture end;
    int index;
    memset(&r, 0, sizeof r);
    RKV_INIT(&r.freed);
    RKV_INIT(&r.backups);
    for (index = 0; index < num_steps; index++) {
        if (fail_at != 0 && fail_at <= requests_after[index] && (index == 0 || fail_at > requests_after[index - 1])) {
            r.memory.requests = index == 0 ? 0 : requests_after[index - 1];
            r.memory.fail_at = fail_at;
            check_seen(&r, index, fail_step(&r, index));
            continue;
        }
        r.memory.armed = fail_at == 0;
        if (fail_at == 0) {
            expected[index] = perform(&r, script[index]);
            requests_after[index] = r.memory.requests;
            seen_after[index] = r.seen;
            seen_events_after[index] = r.seen_events;
        } else {
            check_seen(&r, index, perform(&r, script[index]));
        }
        r.memory.armed = 0;
    }
    end = take_picture(r.tree);
    end.stats.dropped_events = end.stats.queued_events = 0; /* check_seen has judged the events */
    check_integrity(r.tree);
    rkv_tree_destroy(r.tree);
    rkv_freed_release(&r.freed);
    rkv_freed_release(&r.backups);
    CHECK(r.memory.live_bytes == 0);
    *failures = r.memory.failures;
    return end;
}

int main(int argc, char **argv)
{
    static const int fills[] = {0, 1, 2, 3, 5, 9, 14, 40, 90};
    int num_fills = argc > 1 ? atoi(argv[1]) : (int)(sizeof fills / sizeof *fills), i;
    uint64_t total = 0, ops = 0;
    CHECK(num_fills >= 1 && num_fills <= (int)(sizeof fills / sizeof *fills));
    for (i = 0; i < num_fills; i++) {
        uint64_t failures, fail_at;
        picture end, now;
        with_events = i % 3 != 2;
        write_script(fills[i]);
        end = run_script(0, &failures);
        for (fail_at = 1; fail_at <= requests_after[num_steps - 1]; fail_at++) {
            uint64_t partial_before = partial_evictions;
            now = run_script(fail_at, &failures);
            CHECK(failures == 1);
            CHECK(partial_evictions > partial_before || same_content(&end, &now));
            drop_picture(&now);
            total++;
        }
        drop_picture(&end);
    }
    for (i = 0; i < NUM_OPS; i++) {
        ops += failures_in[i] > 0;
    }
    CHECK(total >= 50);
    CHECK(dropped_events > 0 && dropped_events < total / 4 && partial_evictions < total / 10);
    printf("%d allocation failures in %d kinds of operation: %d dropped an event, %d evicted less, the others changed nothing; "
           "nothing leaked\n",
           (int)total, (int)ops, (int)dropped_events, (int)partial_evictions);
    return 0;
}
