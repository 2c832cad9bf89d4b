/* Runs of 8, 16, 32 or 64 bytes, included by copy.c: walking such runs one by one costs more than copying them.
 *
 * 1. Copies that stay in the cache: the innermost loop with its size known to the compiler (copy_small).
 * 2. Larger ones, of less than a line a run, whose innermost loops fill one block of the destination without a gap, in whatever order:
 *
 *        src   |a   |b   |c   |d        4 runs, far apart       the tile's offsets are made once a copy;
 *               \    |    |   /                                 the source of a later tile is prefetched meanwhile
 *        tile    [a b c d]              gathered in L1
 *                  |
 *        dst     [a b c d]              streamed as one run: no line is read before it is written */

enum {
    TILE_BYTES = 16 << 10,
    MIN_TILE_BYTES = 128,
    TILE_AHEAD_BYTES = 8 << 10,
    MAX_TILE_STEPS = TILE_BYTES / 8,
};

struct tile {
    rkv_copy_job outer;            /* the loops around it, each run a tile */
    uint32_t steps;                /* runs a tile; 0: there is none */
    uint32_t run_bytes, ahead;     /* tiles from the one that is copied to the one that is prefetched */
    uint32_t num_lines;            /* how many of the offsets below it takes to have every line of the source */
    uint64_t src[MAX_TILE_STEPS], lines[MAX_TILE_STEPS];
    uint32_t dst[MAX_TILE_STEPS];
};

/* Steps of equal length, from 0? */
static int is_even(const uint64_t *table, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++) {
        if (table[i] != i * (count > 1 ? table[1] : 0)) {
            return 0;
        }
    }
    return 1;
}

/* Whether the innermost num_loops fill a block of the destination. *bytes: its size. */
static int fills_block(const rkv_copy_job *job, uint32_t num_loops, uint64_t *bytes)
{
    const rkv_copy_loop *loops = &job->loops[job->num_loops - num_loops];
    uint32_t done = 0;
    *bytes = job->run_bytes;
    for (uint32_t turn = 0; turn < num_loops; turn++) { /* each finds the loop whose step is what is filled so far */
        for (uint32_t k = 0; k < num_loops; k++) {
            if (!(done >> k & 1) && (loops[k].count == 1 || loops[k].dst[1] == *bytes)) {
                done |= 1u << k;
                *bytes *= loops[k].count;
                break;
            }
        }
    }
    return done == (1u << num_loops) - 1;
}

/* The largest tile of a job. */
static void make_tile(struct tile *tile, const rkv_copy_job *job)
{
    uint32_t most = job->num_loops - (job->steps_per_layer != 0), found = 0;
    uint64_t bytes;
    tile->steps = 0;
    for (uint32_t n = 1; n <= most; n++) {
        const rkv_copy_loop *loop = &job->loops[job->num_loops - n];
        if (loop->count > MAX_TILE_STEPS || !is_even(loop->dst, loop->count)) {
            break;
        }
        if (fills_block(job, n, &bytes) && bytes >= MIN_TILE_BYTES && bytes <= TILE_BYTES) {
            found = n;
        }
    }
    if (!found) {
        return;
    }
    fills_block(job, found, &bytes);
    tile->outer = *job;
    tile->outer.num_loops -= found;
    tile->outer.run_bytes = bytes;
    tile->run_bytes = (uint32_t)job->run_bytes;
    tile->ahead = (uint32_t)(TILE_AHEAD_BYTES / bytes ? TILE_AHEAD_BYTES / bytes : 1);
    tile->steps = 1;
    tile->src[0] = tile->dst[0] = 0;
    for (uint32_t n = 1; n <= found; n++) { /* from the inside: each loop repeats what is inside it */
        const rkv_copy_loop *loop = &job->loops[job->num_loops - n];
        for (uint32_t i = (uint32_t)loop->count; i-- > 0;) {
            for (uint32_t j = 0; j < tile->steps; j++) {
                tile->src[i * tile->steps + j] = tile->src[j] + loop->src[i];
                tile->dst[i * tile->steps + j] = tile->dst[j] + (uint32_t)loop->dst[i];
            }
        }
        tile->steps *= (uint32_t)loop->count;
    }
    tile->num_lines = 0;
    for (uint32_t i = 0; i < tile->steps; i++) {
        const uint64_t line = tile->src[i];
        if (!i || line - tile->lines[tile->num_lines - 1] >= 64) {
            tile->lines[tile->num_lines++] = line;
        }
    }
}

static inline __attribute__((always_inline)) void gather(const struct tile *tile, char *buffer, const char *src, size_t bytes)
{
    for (uint32_t i = 0; i < tile->steps; i++) {
        memcpy(buffer + tile->dst[i], src + tile->src[i], bytes);
    }
}

static inline void prefetch_tile(const struct tile *tile, const char *src)
{
    for (uint32_t i = 0; i < tile->num_lines; i++) {
        __builtin_prefetch(src + tile->lines[i], 0, 2);
    }
}

static void copy_tiles(const struct tile *tile, copier stream, struct walker *w)
{
    char buffer[TILE_BYTES] __attribute__((aligned(64)));
    struct walker later = *w;
    for (uint32_t i = 0; i < tile->ahead && later.left; i++, later.left--) {
        advance(&later);
    }
    for (; w->left; w->left--) {
        const char *src = (const char *)(uintptr_t)w->src;
        const struct run run = {buffer, (char *)(uintptr_t)w->dst, tile->outer.run_bytes};
        if (later.left) {
            prefetch_tile(tile, (const char *)(uintptr_t)later.src);
            advance(&later);
            later.left--;
        }
        switch (tile->run_bytes) {
        case 8: gather(tile, buffer, src, 8); break;
        case 16: gather(tile, buffer, src, 16); break;
        default: gather(tile, buffer, src, 32);
        }
        stream(&run, 1, 1, 1);
        advance(w);
    }
}

/* ---- in the cache ---- */

static inline __attribute__((always_inline)) void copy_inner(struct walker *w, size_t bytes)
{
    const rkv_copy_job *job = w->job;
    const rkv_copy_loop *inner = &job->loops[job->num_loops - 1];
    uint64_t *at = &w->at[job->num_loops - 1];
    while (w->left) {
        const uint64_t first = *at, left = inner->count - first, num = left < w->left ? left : w->left;
        const uint64_t src = w->src - inner->src[first], dst = w->dst - inner->dst[first];
        for (uint64_t i = first; i < first + num; i++) {
            memcpy((char *)(uintptr_t)(dst + inner->dst[i]), (const char *)(uintptr_t)(src + inner->src[i]), bytes);
        }
        w->left -= num;
        *at = first + num - 1;
        w->src = src + inner->src[*at];
        w->dst = dst + inner->dst[*at];
        advance(w);
    }
}

static int is_small(const rkv_copy_job *job)
{
    const uint64_t bytes = job->run_bytes;
    return job->num_loops && (bytes == 8 || bytes == 16 || bytes == 32 || bytes == 64);
}

static void copy_small(struct walker *w)
{
    switch (w->job->run_bytes) {
    case 8: copy_inner(w, 8); break;
    case 16: copy_inner(w, 16); break;
    case 32: copy_inner(w, 32); break;
    default: copy_inner(w, 64);
    }
}
