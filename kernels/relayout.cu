/* rkv_relayout_v{16,8,4,2,1}_{i32,i64}: pages between two layouts that share only short runs (heads apart on one side,
 * tokens apart on the other, as layer_first and page_head), staged through shared memory.
 *
 *     source walk            shared tile                destination walk
 *     reads whole sectors    [cells in source order]    writes whole sectors
 *
 *     grid      any number of blocks
 *     block     at most 512 threads, any number
 *     tile      (page, half, block of layers, of tokens, of heads); a block copies one tile, then steps by the grid
 *
 * Tiles at the rim are cut: cells beyond the extent are neither read nor written. With 16-byte vectors and 512 threads a
 * whole tile is under way at once, and the next one's loads are issued before this one is written: the link is never idle. */
#include "layouts.cuh"

struct rkv_cell {
    uint32_t at[3]; /* layer, token, head within the tile */
};

/* The cell that comes n-th in a walk. */
__device__ __forceinline__ rkv_cell rkv_nth_cell(const rkv_walk &walk, uint32_t n)
{
    const uint32_t first = rkv_split(n, walk.first);
    const uint32_t second = rkv_split(n, walk.second);
    rkv_cell cell;
#pragma unroll
    for (uint32_t dim = 0; dim < 3; dim++) {
        cell.at[dim] = walk.dims[0] == dim ? first : walk.dims[1] == dim ? second : n;
    }
    return cell;
}

struct rkv_tile {
    int64_t src_page, dst_page;
    uint32_t row;      /* half * base_pitch + first layer of the tile */
    uint32_t begin[3]; /* layer, token, head of its first cell */
};

template <class Index>
__device__ __forceinline__ rkv_tile rkv_nth_tile(const rkv_relayout_params &p, uint32_t n)
{
    rkv_tile tile;
    tile.begin[RKV_HEAD] = rkv_split(n, p.blocks[RKV_HEAD]) * p.tile[RKV_HEAD];
    tile.begin[RKV_TOKEN] = rkv_split(n, p.blocks[RKV_TOKEN]) * p.tile[RKV_TOKEN];
    tile.begin[RKV_LAYER] = rkv_split(n, p.blocks[RKV_LAYER]) * p.tile[RKV_LAYER];
    tile.row = rkv_split(n, p.halves) * p.base_pitch + p.first_layer + tile.begin[RKV_LAYER];
    tile.src_page = rkv_page<Index>(p.src, n);
    tile.dst_page = rkv_page<Index>(p.dst, n);
    return tile;
}

/* Where vector n of a walk lies on one side; 0 beyond the rim. staged: its place in the tile. */
__device__ __forceinline__ uint64_t rkv_find(const rkv_relayout_params &p, const rkv_side &side, const rkv_walk &walk,
                                             const rkv_tile &tile, int64_t page, uint32_t n, uint32_t vec_bytes,
                                             uint32_t &staged)
{
    const uint32_t vec = rkv_split(n, p.vecs);
    const rkv_cell cell = rkv_nth_cell(walk, n);
    bool inside = true;
    staged = 0;
#pragma unroll
    for (uint32_t dim = 0; dim < 3; dim++) {
        inside = inside && tile.begin[dim] + cell.at[dim] < p.extent[dim];
        staged += cell.at[dim] * p.tile_step[dim];
    }
    staged = staged * p.cell_vecs + vec;
    if (!inside) return 0;
    const uint32_t token = tile.begin[RKV_TOKEN] + cell.at[RKV_TOKEN], head = tile.begin[RKV_HEAD] + cell.at[RKV_HEAD];
    return rkv_base(side, tile.row + cell.at[RKV_LAYER]) + (uint64_t)rkv_offset(side, page, token, head) +
           vec * vec_bytes;
}

/* The vectors that one thread has under way. In the source's walk a vector's place in shared memory is its number. */
template <class Vec>
struct rkv_flight {
    static constexpr uint32_t DEPTH = RKV_RELAYOUT_VECS_IN_FLIGHT;
    Vec held[DEPTH];

    /* Issue the loads of vectors at, at + blockDim.x, .. of a tile. */
    __device__ __forceinline__ void load(const rkv_relayout_params &p, const rkv_tile &tile, uint32_t at)
    {
#pragma unroll
        for (uint32_t i = 0; i < DEPTH; i++) {
            const uint32_t vec = at + i * blockDim.x;
            held[i] = Vec();
            if (vec < p.tile_vecs) {
                uint32_t staged;
                const uint64_t from = rkv_find(p, p.src, p.src_walk, tile, tile.src_page, vec, sizeof(Vec), staged);
                if (from) held[i] = rkv_load((const Vec *)from);
            }
        }
    }

    /* Into the tile; cells beyond the rim are zero there, and nobody reads them. */
    __device__ __forceinline__ void stage(const rkv_relayout_params &p, Vec *staging, uint32_t at) const
    {
#pragma unroll
        for (uint32_t i = 0; i < DEPTH; i++) {
            if (at + i * blockDim.x < p.tile_vecs) staging[at + i * blockDim.x] = held[i];
        }
    }
};

template <class Vec, class Index>
__device__ __forceinline__ void rkv_relayout(const rkv_relayout_params &p, Vec *staging)
{
    const uint32_t step = RKV_RELAYOUT_VECS_IN_FLIGHT * blockDim.x;
    uint32_t n = blockIdx.x;
    if (n >= p.num_tiles) return;
    rkv_tile tile = rkv_nth_tile<Index>(p, n);
    rkv_flight<Vec> flight;
    flight.load(p, tile, threadIdx.x);
    for (;;) {
        /* 1. what is under way arrives; the rest of the tile, if vectors are narrow */
        for (uint32_t at = threadIdx.x;;) {
            flight.stage(p, staging, at);
            at += step;
            if (at >= p.tile_vecs) break;
            flight.load(p, tile, at);
        }
        __syncthreads();
        /* 2. the next tile's loads travel while this tile is written */
        const rkv_tile here = tile;
        n += gridDim.x;
        if (n < p.num_tiles) {
            tile = rkv_nth_tile<Index>(p, n);
            flight.load(p, tile, threadIdx.x);
        }
        for (uint32_t vec = threadIdx.x; vec < p.tile_vecs; vec += blockDim.x) {
            uint32_t staged;
            const uint64_t to = rkv_find(p, p.dst, p.dst_walk, here, here.dst_page, vec, sizeof(Vec), staged);
            if (to) rkv_store((Vec *)to, staging[staged]);
        }
        if (n >= p.num_tiles) return;
        __syncthreads(); /* the next tile overwrites this one */
    }
}

#define RKV_RELAYOUT_KERNELS_OF(X, bits, Index) \
    X(rkv_relayout_v16_i##bits, uint4, Index) X(rkv_relayout_v8_i##bits, uint2, Index) \
    X(rkv_relayout_v4_i##bits, uint32_t, Index) X(rkv_relayout_v2_i##bits, uint16_t, Index) \
    X(rkv_relayout_v1_i##bits, uint8_t, Index)
#define RKV_RELAYOUT_KERNELS(X) RKV_RELAYOUT_KERNELS_OF(X, 32, int32_t) RKV_RELAYOUT_KERNELS_OF(X, 64, int64_t)

#define RKV_RELAYOUT_KERNEL(name, Vec, Index) \
    extern "C" __global__ void __launch_bounds__(512, 2) name(const RKV_GRID_CONSTANT rkv_relayout_params p) \
    { \
        __shared__ Vec staging[RKV_TILE_BYTES / sizeof(Vec)]; \
        rkv_relayout<Vec, Index>(p, staging); \
    }
RKV_RELAYOUT_KERNELS(RKV_RELAYOUT_KERNEL)
