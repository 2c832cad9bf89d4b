/* What a transfer kernel is told, by value: plain C, the same bytes for nvcc, NVRTC, the host simulator, the C launcher
 * and radixkv/transfer/launch.py (which mirrors these structs; tests/kernels/test_launch.py compares every offset).
 *
 * Dimension letters as in radixkv/pool/layout.py: L layers, P tokens a page, H heads, D bytes of one head of one token.
 *
 *     address(half, layer, page, token, head) = bases[half * base_pitch + layer]
 *         + page * page_stride + token * token_stride + head * head_stride
 */
#ifndef RADIXKV_KERNELS_PARAMS_H
#define RADIXKV_KERNELS_PARAMS_H

#if defined(__CUDACC_RTC__)
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef int int32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;
#else
#include <stdint.h>
#endif

/* n / divisor for n < 2^31, without dividing: (n * magic) >> shift, magic = floor(2^shift / divisor) + 1,
 * shift = 31 + ceil(log2(divisor)). (Granlund and Montgomery, 1994, theorem 4.2.) */
typedef struct rkv_div {
    uint32_t divisor;
    uint32_t magic;
    uint32_t shift;
} rkv_div;

/* One side of a copy. Addresses are uint64, so that the struct is the same on every compiler. */
typedef struct rkv_side {
    uint64_t bases;       /* -> uint64 [halves][base_pitch], readable by the kernel */
    uint64_t pages;       /* -> int32 or int64 [num_pages], page ids; 0: page i is first_page + i */
    int64_t first_page;
    int64_t page_stride;  /* bytes, all three */
    int64_t token_stride;
    int64_t head_stride;
} rkv_side;

/* rkv_copy_* and rkv_bulk_*. A unit is one chunk of one run: (page, layer, token, head, chunk), the last fastest; each
 * unit copies its chunk of every half. */
typedef struct rkv_copy_params {
    rkv_side src, dst;
    uint32_t num_units;   /* pages * layers * tokens * heads * chunks, < 2^31 */
    uint32_t base_pitch;  /* L of the tables of bases */
    uint32_t first_layer; /* of the copy */
    uint32_t run_vecs;    /* vectors that are contiguous on both sides */
    uint32_t chunk_vecs;  /* vectors a unit, at most; of rkv_copy_*: lanes * (8 / halves) or fewer */
    uint32_t lanes_log2;  /* threads that share a unit: 1, 2, 4 .. 32 */
    rkv_div chunks;       /* chunks a run */
    rkv_div heads;        /* runs a token: H, or 1 where the heads lie together on both sides */
    rkv_div tokens;       /* runs a page: P, or 1 where the tokens lie together too */
    rkv_div layers;       /* layers of the copy */
} rkv_copy_params;

/* How a side orders the cells of a tile, fastest first: dims[i] is RKV_LAYER, RKV_TOKEN or RKV_HEAD. */
enum { RKV_LAYER = 0, RKV_TOKEN = 1, RKV_HEAD = 2 };

typedef struct rkv_walk {
    uint32_t dims[3];
    rkv_div first;  /* the tile's extent along dims[0] */
    rkv_div second; /* the tile's extent along dims[1] */
} rkv_walk;

/* rkv_relayout_*. A cell is D bytes; a tile is tile[0] x tile[1] x tile[2] cells (layer, token, head) of one page and
 * half, kept in shared memory between the walk in the source's order and the walk in the destination's. */
typedef struct rkv_relayout_params {
    rkv_side src, dst;
    uint32_t num_tiles;    /* pages * halves * blocks of layers, tokens and heads, < 2^31 */
    uint32_t base_pitch;
    uint32_t first_layer;
    uint32_t cell_vecs;    /* D in vectors */
    uint32_t tile_vecs;    /* tile[0] * tile[1] * tile[2] * cell_vecs, at most RKV_TILE_BYTES */
    uint32_t extent[3];    /* layers of the copy, P, H */
    uint32_t tile[3];
    uint32_t tile_step[3]; /* cells from one layer, token, head of a tile to the next, in shared memory */
    rkv_div vecs;          /* cell_vecs */
    rkv_div blocks[3];     /* tiles along each dimension */
    rkv_div halves;
    rkv_walk src_walk, dst_walk;
} rkv_relayout_params;

#define RKV_TILE_BYTES 32768u
#define RKV_COPY_VECS_IN_FLIGHT 8u /* vectors a thread holds between loads and stores, over all halves */
#define RKV_RELAYOUT_VECS_IN_FLIGHT 4u /* vectors a thread holds between loads and shared memory */
#define RKV_BULK_SLOTS 11u
#define RKV_BULK_AHEAD 8u /* slots being filled; the others drain */
#define RKV_BULK_SLOT_BYTES 4096u

#endif
