/* rkv_bulk_{mha,mla}_{i32,i64}: rkv_copy by the bulk copy engine of sm_90 and later. Same parameters and units; a
 * vector is 16 bytes, a chunk at most RKV_BULK_SLOT_BYTES, and every address a multiple of 16.
 *
 * One thread a block drives a ring of slots in shared memory. Most of them are being filled while the others drain: a load
 * takes a round trip of the link, a store only its own time.
 *
 *     slot    0     1     2     3     4     5     6     7     8     9     10
 *             draining (stores)       filling (loads)                            then round
 *
 *     grid      any number of blocks
 *     block     32 threads, of which the first works */
#include "layouts.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#error "bulk.cu is for sm_90 and later"
#endif

struct rkv_bulk_unit {
    uint64_t src, dst;
    uint32_t bytes;
};

/* Copy n of this block: the halves of a unit follow each other. */
template <int HALVES, class Index>
__device__ __forceinline__ rkv_bulk_unit rkv_bulk_locate(const rkv_copy_params &p, uint32_t n)
{
    uint32_t unit = blockIdx.x + n / HALVES * gridDim.x;
    const uint32_t chunk = rkv_split(unit, p.chunks);
    const uint32_t head = rkv_split(unit, p.heads);
    const uint32_t token = rkv_split(unit, p.tokens);
    const uint32_t row = n % HALVES * p.base_pitch + p.first_layer + rkv_split(unit, p.layers);
    const uint32_t first = chunk * p.chunk_vecs;
    const uint64_t skip = (uint64_t)first * 16;
    rkv_bulk_unit found;
    found.src = rkv_base(p.src, row) + (uint64_t)rkv_offset(p.src, rkv_page<Index>(p.src, unit), token, head) + skip;
    found.dst = rkv_base(p.dst, row) + (uint64_t)rkv_offset(p.dst, rkv_page<Index>(p.dst, unit), token, head) + skip;
    found.bytes = (p.run_vecs - first < p.chunk_vecs ? p.run_vecs - first : p.chunk_vecs) * 16;
    return found;
}

/* Where the copy in a slot goes. */
struct rkv_bulk_target {
    uint64_t dst;
    uint32_t bytes;
};

template <int HALVES, class Index>
__device__ __forceinline__ void rkv_bulk(const rkv_copy_params &p, unsigned char *ring, uint64_t *filled,
                                         rkv_bulk_target *targets)
{
    constexpr uint32_t SLOTS = RKV_BULK_SLOTS, AHEAD = RKV_BULK_AHEAD, DRAINING = SLOTS - AHEAD;
    if (threadIdx.x || blockIdx.x >= p.num_units) return;
#pragma unroll 1
    for (uint32_t slot = 0; slot < SLOTS; slot++) rkv_barrier_init(filled + slot);
    rkv_barrier_publish();

    /* Units of this block; one 32-bit division a launch. */
    const uint32_t units = (p.num_units - blockIdx.x + gridDim.x - 1) / gridDim.x;
    const uint32_t copies = units * HALVES;
    uint32_t loaded = 0;
#pragma unroll 1
    for (uint32_t n = 0; n < copies; n++) {
        /* The slot of copy `loaded` held copy loaded - SLOTS = n - DRAINING - 1 at most; DRAINING stores are newer. */
#pragma unroll 1
        for (; loaded < copies && loaded < n + AHEAD; loaded++) {
            if (loaded >= SLOTS) rkv_bulk_wait_read<DRAINING>();
            const rkv_bulk_unit unit = rkv_bulk_locate<HALVES, Index>(p, loaded);
            const uint32_t slot = loaded % SLOTS;
            targets[slot].dst = unit.dst;
            targets[slot].bytes = unit.bytes;
            rkv_bulk_load(ring + slot * RKV_BULK_SLOT_BYTES, (const void *)unit.src, unit.bytes, filled + slot);
        }
        const uint32_t slot = n % SLOTS;
        rkv_barrier_wait(filled + slot, n / SLOTS & 1);
        rkv_bulk_store((void *)targets[slot].dst, ring + slot * RKV_BULK_SLOT_BYTES, targets[slot].bytes);
    }
    rkv_bulk_wait_all();
}

#define RKV_BULK_KERNELS(X) \
    X(rkv_bulk_mha_i32, 2, int32_t) X(rkv_bulk_mla_i32, 1, int32_t) \
    X(rkv_bulk_mha_i64, 2, int64_t) X(rkv_bulk_mla_i64, 1, int64_t)

#define RKV_BULK_KERNEL(name, halves, Index) \
    extern "C" __global__ void __launch_bounds__(32) name(const RKV_GRID_CONSTANT rkv_copy_params p) \
    { \
        __shared__ uint4 ring[RKV_BULK_SLOTS * RKV_BULK_SLOT_BYTES / sizeof(uint4)]; \
        __shared__ uint64_t filled[RKV_BULK_SLOTS]; \
        __shared__ rkv_bulk_target targets[RKV_BULK_SLOTS]; \
        rkv_bulk<halves, Index>(p, (unsigned char *)ring, filled, targets); \
    }
RKV_BULK_KERNELS(RKV_BULK_KERNEL)
