/* rkv_copy_{mha,mla}_v{16,8,4,2,1}_{i32,i64}: pages from any layout to any layout, for any range of layers.
 *
 * Load back (host to device, one layer), backup (device to host, all layers), gather, scatter and defragmentation
 * (device to device) differ in their parameters only.
 *
 *     grid      any number of blocks: the quota of SMs that the copy may take
 *     block     a multiple of 32, at most 512 threads
 *     unit      (page, layer, token, head, chunk); 2^lanes_log2 neighbouring threads copy one, then step by the grid
 *
 * A thread holds RKV_COPY_VECS_IN_FLIGHT vectors: it issues the loads of a whole unit, K and V, then finds its next
 * unit (whose page ids thereby arrive behind the data), then stores. */
#include "layouts.cuh"

template <int HALVES>
struct rkv_place {
    uint64_t src[HALVES], dst[HALVES]; /* addresses of the unit's first byte */
    uint32_t vecs;                     /* of this unit, in each half */
};

template <int HALVES, class Vec, class Index>
__device__ __forceinline__ rkv_place<HALVES> rkv_locate(const rkv_copy_params &p, uint32_t unit)
{
    const uint32_t chunk = rkv_split(unit, p.chunks);
    const uint32_t head = rkv_split(unit, p.heads);
    const uint32_t token = rkv_split(unit, p.tokens);
    const uint32_t layer = rkv_split(unit, p.layers) + p.first_layer;
    const uint32_t first = chunk * p.chunk_vecs;
    const int64_t skip = (int64_t)first * (int64_t)sizeof(Vec);
    const int64_t src = rkv_offset(p.src, rkv_page<Index>(p.src, unit), token, head) + skip;
    const int64_t dst = rkv_offset(p.dst, rkv_page<Index>(p.dst, unit), token, head) + skip;
    rkv_place<HALVES> place;
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
        place.src[half] = rkv_base(p.src, half * p.base_pitch + layer) + (uint64_t)src;
        place.dst[half] = rkv_base(p.dst, half * p.base_pitch + layer) + (uint64_t)dst;
    }
    place.vecs = p.run_vecs - first < p.chunk_vecs ? p.run_vecs - first : p.chunk_vecs;
    return place;
}

template <int HALVES, class Vec, class Index>
__device__ __forceinline__ void rkv_copy(const rkv_copy_params &p)
{
    constexpr int DEPTH = RKV_COPY_VECS_IN_FLIGHT / HALVES;
    const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
    const uint32_t step = (gridDim.x * blockDim.x) >> p.lanes_log2;
    const uint32_t lane = thread & ((1u << p.lanes_log2) - 1);
    uint32_t unit = thread >> p.lanes_log2;
    if (unit >= p.num_units) return;
    rkv_place<HALVES> place = rkv_locate<HALVES, Vec, Index>(p, unit);
    for (;;) {
        Vec held[HALVES][DEPTH];
#pragma unroll
        for (int i = 0; i < DEPTH; i++) {
            const uint32_t at = lane + ((uint32_t)i << p.lanes_log2);
#pragma unroll
            for (int half = 0; half < HALVES; half++) {
                if (at < place.vecs) held[half][i] = rkv_load((const Vec *)place.src[half] + at);
            }
        }
        const rkv_place<HALVES> here = place;
        unit += step;
        if (unit < p.num_units) place = rkv_locate<HALVES, Vec, Index>(p, unit);
#pragma unroll
        for (int i = 0; i < DEPTH; i++) {
            const uint32_t at = lane + ((uint32_t)i << p.lanes_log2);
#pragma unroll
            for (int half = 0; half < HALVES; half++) {
                if (at < here.vecs) rkv_store((Vec *)here.dst[half] + at, held[half][i]);
            }
        }
        if (unit >= p.num_units) return;
    }
}

#define RKV_COPY_KERNELS_OF(X, bits, Index) \
    X(rkv_copy_mha_v16_i##bits, 2, uint4, Index) X(rkv_copy_mla_v16_i##bits, 1, uint4, Index) \
    X(rkv_copy_mha_v8_i##bits, 2, uint2, Index) X(rkv_copy_mla_v8_i##bits, 1, uint2, Index) \
    X(rkv_copy_mha_v4_i##bits, 2, uint32_t, Index) X(rkv_copy_mla_v4_i##bits, 1, uint32_t, Index) \
    X(rkv_copy_mha_v2_i##bits, 2, uint16_t, Index) X(rkv_copy_mla_v2_i##bits, 1, uint16_t, Index) \
    X(rkv_copy_mha_v1_i##bits, 2, uint8_t, Index) X(rkv_copy_mla_v1_i##bits, 1, uint8_t, Index)
#define RKV_COPY_KERNELS(X) RKV_COPY_KERNELS_OF(X, 32, int32_t) RKV_COPY_KERNELS_OF(X, 64, int64_t)

#define RKV_COPY_KERNEL(name, halves, Vec, Index) \
    extern "C" __global__ void __launch_bounds__(512) name(const RKV_GRID_CONSTANT rkv_copy_params p) \
    { \
        rkv_copy<halves, Vec, Index>(p); \
    }
RKV_COPY_KERNELS(RKV_COPY_KERNEL)
