/* A C99 host that knows no radixkv at link time: it loads the plugin and calls through the table of rkv_get_api.
 *
 *   cc -std=c99 -I$(python -c 'import radixkv; print(radixkv.get_include())') host_dlopen.c -ldl
 *   ./a.out $(python -c 'import radixkv; print(radixkv.get_library_path())')
 */
#include <radixkv/radixkv.h>

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PAGE = 4, TOKENS = 16, PAGES = TOKENS / PAGE };

typedef const rkv_api *(*get_api_fn)(uint32_t);

static const rkv_api *api;

static void expect(int fine, const char *what)
{
    if (!fine) {
        fprintf(stderr, "host_dlopen.c: %s (last error: %s)\n", what, api != NULL ? api->last_error() : "");
        exit(1);
    }
}

/* Load the library and ask for the version of the table that this file was compiled against. */
static const rkv_api *load(const char *path)
{
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    get_api_fn get_api;
    void *symbol;
    if (library == NULL) {
        fprintf(stderr, "host_dlopen.c: %s\n", dlerror());
        exit(1);
    }
    symbol = dlsym(library, "rkv_get_api");
    memcpy(&get_api, &symbol, sizeof get_api); /* ISO C has no cast from an object to a function pointer */
    return get_api(RKV_ABI_VERSION);
}

/* Leading pages of a prompt that the only worker holds. */
static uint32_t ask_the_index(void)
{
    const uint64_t prompt[3] = {11, 22, 33};
    uint32_t worker, pages;
    rkv_index *index = NULL;
    rkv_index_hit hit;
    expect(api->index_create(NULL, &index) == RKV_OK, "create an index");
    expect(api->index_insert(index, 7, prompt, 2, NULL, NULL) == RKV_OK, "worker 7 holds two pages");
    RKV_INIT(&hit);
    hit.workers = &worker;
    hit.pages = &pages;
    hit.max_workers = 1;
    expect(api->index_find(index, prompt, 3, &hit) == RKV_OK && hit.num_workers == 1 && worker == 7, "find");
    api->index_destroy(index);
    return pages;
}

int main(int argc, char **argv)
{
    int32_t tokens[TOKENS], page_ids[PAGES] = {0, 1, 2, 3}, other_ids[PAGES] = {10, 11, 12, 13}, duplicates[PAGES];
    rkv_tree_config config;
    rkv_tree *tree = NULL;
    rkv_key key;
    rkv_insert inserted;
    rkv_freed freed;
    int64_t shared, duplicated, under_lock;
    int i;

    expect(argc == 2, "give the path of libradixkv.so.1");
    api = load(argv[1]);
    expect(api != NULL, "the library does not speak this version");
    expect(api->struct_size >= sizeof *api && api->abi_version == RKV_ABI_VERSION, "the table is shorter than this header's");

    RKV_INIT(&config);
    config.page_size = PAGE;
    expect(api->tree_create(&config, &tree) == RKV_OK, "create");

    for (i = 0; i < TOKENS; i++) {
        tokens[i] = i;
    }
    RKV_INIT(&key);
    key.tokens = tokens;
    key.num_tokens = TOKENS;
    RKV_INIT(&inserted);
    expect(api->tree_insert(tree, &key, page_ids, PAGES, NULL, 0, duplicates, &inserted) == RKV_OK, "insert the first");
    for (i = TOKENS / 2; i < TOKENS; i++) {
        tokens[i] = 100 + i;
    }
    expect(api->tree_insert(tree, &key, other_ids, PAGES, NULL, 0, duplicates, &inserted) == RKV_OK, "insert the second");
    shared = inserted.prefix_tokens;
    duplicated = (int64_t)inserted.num_duplicates;

    expect(api->tree_lock(tree, inserted.node, NULL) == RKV_OK, "lock");
    RKV_INIT(&freed);
    expect(api->tree_evict(tree, 1000, 0, &freed) == RKV_OK, "evict under a lock");
    under_lock = freed.num_tokens;
    expect(api->tree_unlock(tree, inserted.node, NULL) == RKV_OK, "unlock");
    expect(api->tree_unlock(tree, inserted.node, NULL) == RKV_ERR_LOCK, "one unlock too many is an error");
    expect(strlen(api->last_error()) > 0, "and the library says what was wrong");
    expect(api->tree_check_integrity(tree, NULL, NULL, NULL, 0) == RKV_OK, "check_integrity");
    expect(api->tree_evict(tree, 1000, 0, &freed) == RKV_OK && freed.num_tokens == TOKENS, "evict the rest");

    api->freed_release(&freed);
    api->tree_destroy(tree);
    printf("radixkv %s from dlopen: %d tokens shared, %d duplicates, %d evicted under a lock, unlock twice: %s, index: %u pages\n",
           api->version(), (int)shared, (int)duplicated, (int)under_lock, api->status_string(RKV_ERR_LOCK),
           (unsigned)ask_the_index());
    return 0;
}
