/* The CUDA subset that kernels/ uses, on a CPU. Tests only; included by kernels/device.cuh under -DRKV_HOST_SIM.
 *
 * A simulated launch runs one block after another, so a function-local static is a block's shared memory. Loads and
 * stores are plain dereferences of types with CUDA's alignment: ASan sees what lies out of bounds, UBSan what is
 * misaligned. Bulk copies happen as late as the rules allow (a load at its barrier's wait, a store when somebody waits
 * for it to have read), so a missing wait shows as wrong bytes. */
#ifndef RADIXKV_HOSTSIM_H
#define RADIXKV_HOSTSIM_H

#include <cstdint>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define RKV_GRID_CONSTANT

/* All shared memory in one section, which the simulator poisons before each block. Not under ASan, which puts its red
 * zones around ordinary statics only. */
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static
#else
#define __shared__ static __attribute__((section("rkv_shared")))
#endif

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

struct alignas(8) uint2 {
    uint32_t x, y;
};

namespace hostsim {

extern thread_local dim3 thread_index, block_index;
extern dim3 block_dim, grid_dim;

void sync_threads();
void barrier_init(uint64_t *barrier);
void barrier_publish();
void barrier_wait(uint64_t *barrier, uint32_t parity);
void bulk_load(void *shared, const void *global, uint32_t bytes, uint64_t *barrier);
void bulk_store(void *global, const void *shared, uint32_t bytes);
void bulk_wait_read(unsigned keep);

} // namespace hostsim

#define threadIdx hostsim::thread_index
#define blockIdx hostsim::block_index
#define blockDim hostsim::block_dim
#define gridDim hostsim::grid_dim
#define __syncthreads() hostsim::sync_threads()

template <class Vec>
inline Vec rkv_load(const Vec *p)
{
    return *p;
}

template <class Vec>
inline void rkv_store(Vec *p, Vec v)
{
    *p = v;
}

inline void rkv_barrier_init(uint64_t *barrier) { hostsim::barrier_init(barrier); }
inline void rkv_barrier_publish() { hostsim::barrier_publish(); }
inline void rkv_barrier_wait(uint64_t *barrier, uint32_t parity) { hostsim::barrier_wait(barrier, parity); }

inline void rkv_bulk_load(void *shared, const void *global, uint32_t bytes, uint64_t *barrier)
{
    hostsim::bulk_load(shared, global, bytes, barrier);
}

inline void rkv_bulk_store(void *global, const void *shared, uint32_t bytes)
{
    hostsim::bulk_store(global, shared, bytes);
}

template <int KEEP>
inline void rkv_bulk_wait_read()
{
    hostsim::bulk_wait_read(KEEP);
}

inline void rkv_bulk_wait_all() { hostsim::bulk_wait_read(0); }

#endif
