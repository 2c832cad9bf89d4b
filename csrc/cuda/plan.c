/* From a copy to a launch: checks, vector width, units. The C twin of radixkv/transfer/launch.py (its copy family);
 * tests/kernels/test_c_launcher.py compares their parameters byte for byte. */
#include "internal.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_UNITS = 0x7fffffff, MAX_GRID = 1 << 16, DEFAULT_BLOCKS = 4, THREADS = 512, WIDEST_VECTOR = 16 };

#define MAX_STRIDE ((uint64_t)1 << 48) /* more than an address space; products with 2^31 pages are checked */

/* --------------------------------------------------------------------------------------------------------- errors */

static __thread char last_error[256];

rkv_cuda_status rkv_cuda_fail(rkv_cuda_status status, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return status;
}

const char *rkv_cuda_last_error(void)
{
    return last_error;
}

const char *rkv_cuda_status_string(rkv_cuda_status status)
{
    static const char *const strings[] = {
        "ok",
        "invalid argument",
        "page or layer out of range",
        "pages overlap",
        "no CUDA driver",
        "no such GPU",
        "no kernels for this GPU",
        "the CUDA driver failed",
        "out of memory",
        "memory that the GPU cannot reach",
    };
    return status <= 0 && status > RKV_CUDA_STATUS_END ? strings[-status] : "unknown status";
}

/* --------------------------------------------------------------------------------------------------------- checks */

static int64_t id_at(const void *pages, uint64_t i, uint32_t index_bits)
{
    return index_bits == 32 ? ((const int32_t *)pages)[i] : ((const int64_t *)pages)[i];
}

int64_t rkv_cuda_first_of_run(const void *pages, uint64_t num_pages, uint32_t index_bits)
{
    const int64_t first = num_pages ? id_at(pages, 0, index_bits) : -1;
    for (uint64_t i = 1; i < num_pages; i++) {
        if (id_at(pages, i, index_bits) != first + (int64_t)i) return -1;
    }
    return first;
}

/* Strides of a view with the number of parts at each, rising; those of one part left out. */
typedef struct dims {
    int count;
    struct {
        uint64_t stride, count;
    } dim[5];
} dims;

static void add_dim(dims *all, uint64_t stride, uint64_t count)
{
    if (count <= 1) return;
    int at = all->count++;
    for (; at > 0 && all->dim[at - 1].stride > stride; at--) all->dim[at] = all->dim[at - 1];
    all->dim[at].stride = stride;
    all->dim[at].count = count;
}

static dims dims_of(const rkv_cuda_geometry *g, const rkv_cuda_view *view)
{
    dims all = {0};
    add_dim(&all, view->page_stride, view->num_pages);
    add_dim(&all, view->token_stride, g->page_size);
    add_dim(&all, view->head_stride, g->num_heads);
    return all;
}

/* The first dimension whose step is not beyond all that the smaller ones reach (or is beyond any memory), and in *extent
 * what these reach; -1 if there is none: then no two parts share a byte. */
static int nest(const dims *all, uint64_t part_bytes, uint64_t *extent)
{
    *extent = part_bytes;
    for (int i = 0; i < all->count; i++) {
        if (all->dim[i].stride < *extent || all->dim[i].stride > MAX_STRIDE / all->dim[i].count) return i;
        *extent += (all->dim[i].count - 1) * all->dim[i].stride;
    }
    return -1;
}

static rkv_cuda_status check_geometry(const rkv_cuda_geometry *g)
{
    if (g == NULL || g->struct_size < RKV_CUDA_GEOMETRY_SIZE_V1) {
        return rkv_cuda_fail(RKV_CUDA_ERR_ARGUMENT, "no geometry, or a small one");
    }
    if (g->halves < 1 || g->halves > 2) return rkv_cuda_fail(RKV_CUDA_ERR_ARGUMENT, "%u halves", g->halves);
    if (!g->num_layers || !g->num_heads || !g->head_bytes || !g->page_size) {
        return rkv_cuda_fail(RKV_CUDA_ERR_ARGUMENT,
                             "%u layers, %u heads, %u head bytes, %u tokens a page: all at least 1", g->num_layers,
                             g->num_heads, g->head_bytes, g->page_size);
    }
    if (g->halves == 1 && g->num_heads != 1) {
        return rkv_cuda_fail(RKV_CUDA_ERR_ARGUMENT, "one half (MLA) has one head, not %u", g->num_heads);
    }
    /* so that no run and no count of units overflows below */
    const uint64_t token = (uint64_t)g->num_heads * g->head_bytes;
    if (token > MAX_UNITS / g->page_size || token * g->page_size > MAX_UNITS / g->num_layers) {
        return rkv_cuda_fail(RKV_CUDA_ERR_ARGUMENT, "a page of 2 GiB a half or more");
    }
    return RKV_CUDA_OK;
}

/* Strides that keep each (page, token, head) to bytes of its own: each is at least what all smaller ones span. */
static rkv_cuda_status check_view(const char *side, const rkv_cuda_geometry *g, const rkv_cuda_view *view)
{
    if (view == NULL || view->struct_size < RKV_CUDA_VIEW_SIZE_V1 || view->bases == NULL) {
        return rkv_cuda_fail(RKV_CUDA_ERR_ARGUMENT, "no %s view, a small one, or one without bases", side);
    }
    if (view->num_pages > MAX_UNITS) {
        return rkv_cuda_fail(RKV_CUDA_ERR_ARGUMENT, "%s has %" PRIu64 " pages", side, view->num_pages);
    }
    for (uint64_t i = 0; view->num_pages && i < (uint64_t)g->halves * g->num_layers; i++) {
        if (!view->bases[i]) return rkv_cuda_fail(RKV_CUDA_ERR_ARGUMENT, "base %" PRIu64 " of %s is NULL", i, side);
    }
    dims all = dims_of(g, view);
    uint64_t extent;
    const int fold = nest(&all, g->head_bytes, &extent);
    if (fold >= 0) {
        return rkv_cuda_fail(RKV_CUDA_ERR_ARGUMENT,
                             "%s: a stride of %" PRIu64 " for %" PRIu64 " parts of %" PRIu64 " bytes", side,
                             all.dim[fold].stride, all.dim[fold].count, extent);
    }
    for (uint64_t i = 0; view->num_pages && i < (uint64_t)g->halves * g->num_layers; i++) {
        if (view->bases[i] > UINT64_MAX - extent) {
            return rkv_cuda_fail(RKV_CUDA_ERR_ARGUMENT, "base %" PRIu64 " of %s reaches beyond the last address", i, side);
        }
    }
    return RKV_CUDA_OK;
}

/* Whether two grids of parts share a byte, the second `distance` bytes from the first. Exact for dims that nest: the inner
 * ones reach less far than a step of the outermost, so only the two nearest multiples of it can do. */
static int touch(int64_t distance, const dims *all, int outermost, uint64_t part_bytes)
{
    if (outermost < 0) return distance < (int64_t)part_bytes && -distance < (int64_t)part_bytes;
    const int64_t stride = (int64_t)all->dim[outermost].stride, count = (int64_t)all->dim[outermost].count;
    int64_t steps = distance / stride;
    steps -= distance % stride < 0; /* towards minus infinity */
    for (int64_t last = steps + 1; steps <= last; steps++) {
        if (steps < count && -steps < count && touch(distance - steps * stride, all, outermost - 1, part_bytes)) return 1;
    }
    return 0;
}

/* Whether the halves and layers lie at even distances, which makes them two more dimensions. */
static int even(const rkv_cuda_geometry *g, const uint64_t *bases, dims *all)
{
    const uint64_t half = g->halves > 1 ? bases[g->num_layers] - bases[0] : 0;
    const uint64_t layer = g->num_layers > 1 ? bases[1] - bases[0] : 0;
    for (uint32_t i = 0; i < g->halves; i++) {
        for (uint32_t j = 0; j < g->num_layers; j++) {
            if (bases[(uint64_t)i * g->num_layers + j] != bases[0] + i * half + j * layer) return 0;
        }
    }
    add_dim(all, half < -half ? half : -half, g->halves);
    add_dim(all, layer < -layer ? layer : -layer, g->num_layers);
    return 1;
}

static int by_address(const void *a, const void *b)
{
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

/* No byte of a destination is of two layers or halves: whoever writes last would win. Exact; _check_apart of
 * radixkv/transfer/plan.py has the same three steps. */
static rkv_cuda_status check_apart(const char *side, const rkv_cuda_geometry *g, const rkv_cuda_view *view)
{
    const uint64_t count = (uint64_t)g->halves * g->num_layers;
    if (!view->num_pages || count == 1) return RKV_CUDA_OK;
    const dims all = dims_of(g, view);
    dims with_layers = all;
    uint64_t reach, extent;
    nest(&all, g->head_bytes, &reach); /* check_view has seen that it nests */
    if (even(g, view->bases, &with_layers) && nest(&with_layers, g->head_bytes, &extent) < 0) return RKV_CUDA_OK;
    uint64_t *ordered = malloc(count * sizeof *ordered);
    if (ordered == NULL) return rkv_cuda_fail(RKV_CUDA_ERR_NO_MEMORY, "no memory for %" PRIu64 " bases", count);
    memcpy(ordered, view->bases, count * sizeof *ordered);
    qsort(ordered, count, sizeof *ordered, by_address);
    rkv_cuda_status status = RKV_CUDA_OK;
    int near = 1;
    for (uint64_t apart = 1; near && apart < count && status == RKV_CUDA_OK; apart++) {
        near = 0;
        for (uint64_t i = 0; i + apart < count && status == RKV_CUDA_OK; i++) {
            const uint64_t distance = ordered[i + apart] - ordered[i];
            if (distance >= reach) continue;
            near = 1;
            if (!touch((int64_t)distance, &all, all.count - 1, g->head_bytes)) continue;
            status = rkv_cuda_fail(RKV_CUDA_ERR_OVERLAP,
                                   "two layers or halves of %s overlap: those at 0x%" PRIx64 " and 0x%" PRIx64, side,
                                   ordered[i], ordered[i + apart]);
        }
    }
    free(ordered);
    return status;
}

static rkv_cuda_status check_ids(const char *side, const rkv_cuda_copy *copy, const void *pages, uint64_t pool_pages)
{
    if (pages == NULL) return rkv_cuda_fail(RKV_CUDA_ERR_ARGUMENT, "no %s pages", side);
    for (uint64_t i = 0; i < copy->num_pages; i++) {
        const int64_t id = id_at(pages, i, copy->index_bits);
        if (id < 0 || (uint64_t)id >= pool_pages) {
            return rkv_cuda_fail(RKV_CUDA_ERR_RANGE, "%s page %" PRId64 " at %" PRIu64 ", and the pool has %" PRIu64,
                                 side, id, i, pool_pages);
        }
    }
    return RKV_CUDA_OK;
}

uint64_t rkv_cuda_reach(const rkv_cuda_geometry *g, const rkv_cuda_view *view)
{
    return (view->num_pages - 1) * view->page_stride + (g->page_size - 1) * view->token_stride +
           (g->num_heads - 1) * view->head_stride + g->head_bytes;
}

/* First and one past the last address of the layers of the copy. */
static void reach(const rkv_cuda_copy *copy, const rkv_cuda_view *view, uint64_t *first, uint64_t *end)
{
    const rkv_cuda_geometry *g = copy->geometry;
    uint64_t low = UINT64_MAX, high = 0;
    for (uint32_t half = 0; half < g->halves; half++) {
        for (uint32_t layer = 0; layer < copy->num_layers; layer++) {
            const uint64_t base = view->bases[(uint64_t)half * g->num_layers + copy->first_layer + layer];
            low = base < low ? base : low;
            high = base > high ? base : high;
        }
    }
    *first = low;
    *end = high + rkv_cuda_reach(g, view);
}

static int same_view(const rkv_cuda_copy *copy)
{
    const rkv_cuda_geometry *g = copy->geometry;
    const rkv_cuda_view *a = copy->src, *b = copy->dst;
    return a->page_stride == b->page_stride && a->token_stride == b->token_stride && a->head_stride == b->head_stride &&
           memcmp(a->bases, b->bases, (size_t)g->halves * g->num_layers * sizeof *a->bases) == 0;
}

/* No page is written twice; within one pool none is both read and written; two views that reach into each other are
 * refused. A bit for each page that is written, so that it takes O(pages). */
static rkv_cuda_status check_overlap(const rkv_cuda_copy *copy)
{
    unsigned char *written = calloc((size_t)(copy->dst->num_pages / 8 + 1), 1);
    if (written == NULL) {
        return rkv_cuda_fail(RKV_CUDA_ERR_NO_MEMORY, "no memory for %" PRIu64 " bits", copy->dst->num_pages);
    }
    rkv_cuda_status status = RKV_CUDA_OK;
    for (uint64_t i = 0; i < copy->num_pages && status == RKV_CUDA_OK; i++) {
        const uint64_t id = (uint64_t)id_at(copy->dst_pages, i, copy->index_bits);
        if (written[id / 8] >> (id % 8) & 1) {
            status = rkv_cuda_fail(RKV_CUDA_ERR_OVERLAP, "destination page %" PRIu64 " is given twice", id);
        }
        written[id / 8] |= (unsigned char)(1u << (id % 8));
    }
    uint64_t src_first, src_end, dst_first, dst_end;
    reach(copy, copy->src, &src_first, &src_end);
    reach(copy, copy->dst, &dst_first, &dst_end);
    if (status == RKV_CUDA_OK && src_first < dst_end && dst_first < src_end) {
        if (!same_view(copy)) {
            status = rkv_cuda_fail(RKV_CUDA_ERR_OVERLAP, "source and destination are two views of one memory");
        }
        for (uint64_t i = 0; i < copy->num_pages && status == RKV_CUDA_OK; i++) {
            const uint64_t id = (uint64_t)id_at(copy->src_pages, i, copy->index_bits);
            if (id < copy->dst->num_pages && written[id / 8] >> (id % 8) & 1) {
                status = rkv_cuda_fail(RKV_CUDA_ERR_OVERLAP, "page %" PRIu64 " is both source and destination", id);
            }
        }
    }
    free(written);
    return status;
}

rkv_cuda_status rkv_cuda_check(const rkv_cuda_copy *copy)
{
    if (copy == NULL || copy->struct_size < RKV_CUDA_COPY_SIZE_V1) {
        return rkv_cuda_fail(RKV_CUDA_ERR_ARGUMENT, "no copy, or a small one");
    }
    if (copy->index_bits != 32 && copy->index_bits != 64) {
        return rkv_cuda_fail(RKV_CUDA_ERR_ARGUMENT, "page ids of %u bits", copy->index_bits);
    }
    rkv_cuda_status status = check_geometry(copy->geometry);
    if (status == RKV_CUDA_OK) status = check_view("src", copy->geometry, copy->src);
    if (status == RKV_CUDA_OK) status = check_view("dst", copy->geometry, copy->dst);
    if (status == RKV_CUDA_OK) status = check_apart("dst", copy->geometry, copy->dst);
    if (status != RKV_CUDA_OK) return status;
    const uint32_t layers = copy->geometry->num_layers;
    if (!copy->num_layers || copy->first_layer >= layers || copy->num_layers > layers - copy->first_layer) {
        return rkv_cuda_fail(RKV_CUDA_ERR_RANGE, "%u layers from %u on, of %u", copy->num_layers, copy->first_layer,
                             layers);
    }
    if (!copy->num_pages) return RKV_CUDA_OK;
    status = check_ids("source", copy, copy->src_pages, copy->src->num_pages);
    if (status == RKV_CUDA_OK) status = check_ids("destination", copy, copy->dst_pages, copy->dst->num_pages);
    return status == RKV_CUDA_OK ? check_overlap(copy) : status;
}

/* ----------------------------------------------------------------------------------------------------------- plan */

static uint32_t ceil_log2(uint64_t n)
{
    uint32_t log = 0;
    while (((uint64_t)1 << log) < n) log++;
    return log;
}

static rkv_div divide_by(uint64_t divisor)
{
    rkv_div div;
    div.divisor = (uint32_t)divisor;
    div.shift = 31 + ceil_log2(divisor);
    div.magic = (uint32_t)(((uint64_t)1 << div.shift) / divisor + 1);
    return div;
}

/* What is contiguous on both sides: bytes a run, runs a token, runs a page. */
typedef struct runs {
    uint64_t bytes, a_token, a_page;
} runs;

static runs coalesce(const rkv_cuda_geometry *g, const rkv_cuda_view *a, const rkv_cuda_view *b)
{
    const uint64_t head = g->head_bytes, row = head * g->num_heads;
    if (g->num_heads > 1 && (a->head_stride != head || b->head_stride != head)) {
        return (runs){head, g->num_heads, g->page_size};
    }
    if (g->page_size > 1 && (a->token_stride != row || b->token_stride != row)) return (runs){row, 1, g->page_size};
    return (runs){row * g->page_size, 1, 1};
}

/* The widest vector that divides the run, and every base and stride that the copy steps by. */
static uint64_t vector_bytes(const rkv_cuda_copy *copy, runs run)
{
    const rkv_cuda_geometry *g = copy->geometry;
    const rkv_cuda_view *const sides[2] = {copy->src, copy->dst};
    uint64_t bits = run.bytes | WIDEST_VECTOR;
    for (int side = 0; side < 2; side++) {
        const rkv_cuda_view *view = sides[side];
        for (uint32_t half = 0; half < g->halves; half++) {
            for (uint32_t layer = 0; layer < copy->num_layers; layer++) {
                bits |= view->bases[(uint64_t)half * g->num_layers + copy->first_layer + layer];
            }
        }
        if (view->num_pages > 1) bits |= view->page_stride;
        if (run.a_page > 1) bits |= view->token_stride;
        if (run.a_token > 1) bits |= view->head_stride;
    }
    return bits & (~bits + 1);
}

static rkv_side plan_side(const rkv_cuda_view *view, int64_t run, uint64_t first_page)
{
    rkv_side side;
    side.bases = side.pages = 0;
    side.first_page = run < 0 ? 0 : run + (int64_t)first_page;
    side.page_stride = (int64_t)view->page_stride;
    side.token_stride = (int64_t)view->token_stride;
    side.head_stride = (int64_t)view->head_stride;
    return side;
}

void rkv_cuda_plan_checked(const rkv_cuda_copy *copy, uint64_t first_page, rkv_cuda_launch *out)
{
    const rkv_cuda_geometry *g = copy->geometry;
    const runs run = coalesce(g, copy->src, copy->dst);
    const uint64_t vector = vector_bytes(copy, run), run_vecs = run.bytes / vector;
    const uint32_t log2 = ceil_log2(run_vecs), lanes_log2 = log2 < 5 ? log2 : 5;
    uint64_t chunk_vecs = (uint64_t)(RKV_COPY_VECS_IN_FLIGHT / g->halves) << lanes_log2;
    if (chunk_vecs > run_vecs) chunk_vecs = run_vecs;
    const uint64_t chunks = (run_vecs + chunk_vecs - 1) / chunk_vecs;
    const uint64_t units_a_page = chunks * run.a_token * run.a_page * copy->num_layers; /* below 2^31: check_geometry */
    uint64_t pages = copy->num_pages - first_page;
    if (pages > MAX_UNITS / units_a_page) pages = MAX_UNITS / units_a_page;
    const uint64_t units = pages * units_a_page, units_a_block = THREADS >> lanes_log2;
    const uint64_t blocks = (units + units_a_block - 1) / units_a_block;
    uint64_t quota = copy->max_blocks ? copy->max_blocks : DEFAULT_BLOCKS;
    if (quota > MAX_GRID) quota = MAX_GRID; /* kernels count threads in 32 bits */

    rkv_copy_params params;
    memset(&params, 0, sizeof params);
    params.src =
        plan_side(copy->src, rkv_cuda_first_of_run(copy->src_pages, copy->num_pages, copy->index_bits), first_page);
    params.dst =
        plan_side(copy->dst, rkv_cuda_first_of_run(copy->dst_pages, copy->num_pages, copy->index_bits), first_page);
    params.num_units = (uint32_t)units;
    params.base_pitch = g->num_layers;
    params.first_layer = copy->first_layer;
    params.run_vecs = (uint32_t)run_vecs;
    params.chunk_vecs = (uint32_t)chunk_vecs;
    params.lanes_log2 = lanes_log2;
    params.chunks = divide_by(chunks);
    params.heads = divide_by(run.a_token);
    params.tokens = divide_by(run.a_page);
    params.layers = divide_by(copy->num_layers);

    out->grid = (uint32_t)(blocks < quota ? blocks : quota);
    out->block = THREADS;
    out->params_bytes = sizeof params;
    out->num_pages = pages;
    snprintf(out->kernel, sizeof out->kernel, "rkv_copy_%s_v%u_i%u", g->halves == 2 ? "mha" : "mla", (unsigned)vector,
             copy->index_bits);
    memcpy(out->params, &params, sizeof params);
}

_Static_assert(sizeof(rkv_copy_params) <= RKV_CUDA_PARAMS_BYTES, "rkv_cuda_launch has no room for the parameters");

rkv_cuda_status rkv_cuda_plan(const rkv_cuda_copy *copy, uint64_t first_page, rkv_cuda_launch *out)
{
    if (out == NULL || out->struct_size < RKV_CUDA_LAUNCH_SIZE_V1) {
        return rkv_cuda_fail(RKV_CUDA_ERR_ARGUMENT, "no launch, or a small one");
    }
    const rkv_cuda_status status = rkv_cuda_check(copy);
    if (status != RKV_CUDA_OK) return status;
    out->num_pages = 0;
    if (first_page < copy->num_pages) rkv_cuda_plan_checked(copy, first_page, out);
    return RKV_CUDA_OK;
}
