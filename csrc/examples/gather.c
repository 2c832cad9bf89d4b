/* Gathers scattered KV pages of a host pool into a contiguous one on the GPU's stream, from C99. Build and run:
 *
 *   cc -std=c99 gather.c -I<include> <lib>/libradixkv_cuda.so.1 -Wl,-rpath,<lib> && ./a.out
 *
 * with <include> from radixkv.get_include() and <lib> the folder of radixkv.get_library_path(). Nothing of CUDA is
 * needed to build it. Without a GPU it says what is missing, and that is no failure.
 *
 * Both pools are page-locked host memory here, for they come from cuMemHostAlloc, which dlopen finds. */
#define _POSIX_C_SOURCE 200809L
#include <radixkv/radixkv_cuda.h>

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LAYERS = 2, HEADS = 2, HEAD_BYTES = 128, PAGE = 4, POOL_PAGES = 8, GATHERED = 3 };
enum { ROW = HEADS * HEAD_BYTES, LAYER_BYTES = POOL_PAGES * PAGE * ROW, HALF_BYTES = LAYERS * LAYER_BYTES };

typedef int (*host_alloc_fn)(void **, size_t, unsigned int);
typedef int (*synchronize_fn)(void *);

/* Stop at the first surprise, and say what the library says. */
static void expect(int fine, const char *what)
{
    if (!fine) {
        fprintf(stderr, "gather.c: %s (last error: %s)\n", what, rkv_cuda_last_error());
        exit(1);
    }
}

/* A pool in layer_first order: all layers of K, then all of V. */
static rkv_cuda_view view_of(unsigned char *pool, uint64_t *bases)
{
    rkv_cuda_view view;
    int i;
    for (i = 0; i < 2 * LAYERS; i++) bases[i] = (uint64_t)(uintptr_t)pool + (uint64_t)i * LAYER_BYTES;
    memset(&view, 0, sizeof view);
    view.struct_size = sizeof view;
    view.bases = bases;
    view.num_pages = POOL_PAGES;
    view.page_stride = PAGE * ROW;
    view.token_stride = ROW;
    view.head_stride = HEAD_BYTES;
    return view;
}

static void *symbol(const char *name)
{
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    void *found = driver == NULL ? NULL : dlsym(driver, name);
    expect(found != NULL, name);
    return found;
}

static unsigned char *page_locked(size_t bytes)
{
    void *memory = NULL;
    host_alloc_fn host_alloc;
    *(void **)&host_alloc = symbol("cuMemHostAlloc");
    expect(host_alloc(&memory, bytes, 3) == 0, "cuMemHostAlloc"); /* portable, mapped */
    return memory;
}

/* A GPU of which this thread holds the context: rkv_cuda_open keeps it, cuMemHostAlloc wants it current. */
static void make_current(void)
{
    int (*retain)(void **, int), (*push)(void *);
    void *context = NULL;
    *(void **)&retain = symbol("cuDevicePrimaryCtxRetain");
    *(void **)&push = symbol("cuCtxPushCurrent_v2");
    expect(retain(&context, 0) == 0 && push(context) == 0, "the context of GPU 0");
}

int main(void)
{
    const int32_t scattered[GATHERED] = {6, 1, 3}, contiguous[GATHERED] = {0, 1, 2};
    uint64_t src_bases[2 * LAYERS], dst_bases[2 * LAYERS];
    rkv_cuda_geometry geometry;
    rkv_cuda_view src, dst;
    rkv_cuda_copy copy;
    rkv_cuda *cuda = NULL;
    synchronize_fn synchronize;
    unsigned char *from, *to;
    int i, part;
    const rkv_cuda_status status = rkv_cuda_open(0, &cuda);
    if (status == RKV_CUDA_ERR_NO_DRIVER || status == RKV_CUDA_ERR_NO_DEVICE) {
        printf("%s: %s\n", rkv_cuda_status_string(status), rkv_cuda_last_error());
        return 0;
    }
    expect(status == RKV_CUDA_OK, rkv_cuda_status_string(status));

    make_current();
    from = page_locked(2 * HALF_BYTES);
    to = page_locked(2 * HALF_BYTES);
    for (i = 0; i < 2 * HALF_BYTES; i++) from[i] = (unsigned char)(i / 7 % 251);
    memset(to, 0xEE, 2 * HALF_BYTES);
    src = view_of(from, src_bases);
    dst = view_of(to, dst_bases);

    memset(&geometry, 0, sizeof geometry);
    geometry.struct_size = sizeof geometry;
    geometry.halves = 2;
    geometry.num_layers = LAYERS;
    geometry.num_heads = HEADS;
    geometry.head_bytes = HEAD_BYTES;
    geometry.page_size = PAGE;
    memset(&copy, 0, sizeof copy);
    copy.struct_size = sizeof copy;
    copy.index_bits = 32;
    copy.geometry = &geometry;
    copy.src = &src;
    copy.dst = &dst;
    copy.src_pages = scattered;
    copy.dst_pages = contiguous;
    copy.num_pages = GATHERED;
    copy.num_layers = LAYERS;
    expect(rkv_cuda_copy_pages(cuda, &copy, NULL) == RKV_CUDA_OK, "copy");
    *(void **)&synchronize = symbol("cuStreamSynchronize");
    expect(synchronize(NULL) == 0, "cuStreamSynchronize");

    for (part = 0; part < 2 * LAYERS; part++) {
        for (i = 0; i < GATHERED; i++) {
            const unsigned char *got = to + part * LAYER_BYTES + i * PAGE * ROW;
            expect(memcmp(got, from + part * LAYER_BYTES + scattered[i] * PAGE * ROW, PAGE * ROW) == 0,
                   "a page differs");
        }
        expect(to[part * LAYER_BYTES + GATHERED * PAGE * ROW] == 0xEE, "a byte beyond the pages was written");
    }
    /* a page id that the pool does not have is refused before anything is launched */
    copy.src_pages = contiguous;
    src.num_pages = 2;
    expect(rkv_cuda_copy_pages(cuda, &copy, NULL) == RKV_CUDA_ERR_RANGE, "out of range");
    printf("gathered %d pages of %d layers; refused: %s\n", GATHERED, LAYERS, rkv_cuda_last_error());
    rkv_cuda_close(cuda);
    return 0;
}
