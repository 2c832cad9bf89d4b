/* One source, three compilers: nvcc, NVRTC (through CuPy), and g++ with the host simulator (-DRKV_HOST_SIM).
 *
 * The few instructions that C++ cannot say are here and nowhere else: streaming loads and stores of each vector width,
 * and the sm_90 bulk copies with their barriers. The simulator has its own versions (csrc/hostsim/hostsim.h). */
#ifndef RADIXKV_KERNELS_DEVICE_CUH
#define RADIXKV_KERNELS_DEVICE_CUH

#include "params.h"

#if defined(RKV_HOST_SIM)
#include "hostsim.h"
#else

#define RKV_GRID_CONSTANT __grid_constant__

/* Loads: read-only for the whole launch, read once: past L1. volatile keeps a batch of loads together, ahead of the
 * stores. */
__device__ __forceinline__ uint4 rkv_load(const uint4 *p)
{
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

__device__ __forceinline__ uint2 rkv_load(const uint2 *p)
{
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}

__device__ __forceinline__ uint32_t rkv_load(const uint32_t *p)
{
    uint32_t v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}

__device__ __forceinline__ uint16_t rkv_load(const uint16_t *p)
{
    uint16_t v;
    asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(v) : "l"(p));
    return v;
}

__device__ __forceinline__ uint8_t rkv_load(const uint8_t *p)
{
    uint32_t v;
    asm volatile("ld.global.nc.L1::no_allocate.u8 %0, [%1];" : "=r"(v) : "l"(p));
    return (uint8_t)v;
}

/* Stores: streaming, since nobody reads them back in this launch. */
__device__ __forceinline__ void rkv_store(uint4 *p, uint4 v)
{
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};"
                 :: "l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

__device__ __forceinline__ void rkv_store(uint2 *p, uint2 v)
{
    asm volatile("st.global.cs.v2.u32 [%0], {%1, %2};" :: "l"(p), "r"(v.x), "r"(v.y) : "memory");
}

__device__ __forceinline__ void rkv_store(uint32_t *p, uint32_t v)
{
    asm volatile("st.global.cs.u32 [%0], %1;" :: "l"(p), "r"(v) : "memory");
}

__device__ __forceinline__ void rkv_store(uint16_t *p, uint16_t v)
{
    asm volatile("st.global.cs.u16 [%0], %1;" :: "l"(p), "h"(v) : "memory");
}

__device__ __forceinline__ void rkv_store(uint8_t *p, uint8_t v)
{
    asm volatile("st.global.cs.u8 [%0], %1;" :: "l"(p), "r"((uint32_t)v) : "memory");
}

#if __CUDA_ARCH__ >= 900

__device__ __forceinline__ uint32_t rkv_shared(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* A barrier that one thread arrives at, once a phase, and that bulk loads complete. */
__device__ __forceinline__ void rkv_barrier_init(uint64_t *barrier)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(rkv_shared(barrier)) : "memory");
}

/* Make barriers that this thread initialised known to the copy engine. */
__device__ __forceinline__ void rkv_barrier_publish()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void rkv_barrier_wait(uint64_t *barrier, uint32_t parity)
{
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}" :: "r"(rkv_shared(barrier)), "r"(parity) : "memory");
}

/* global -> shared, asynchronous. bytes and both addresses: multiples of 16. Arrives at the barrier, which completes
 * with the last byte. */
__device__ __forceinline__ void rkv_bulk_load(void *shared, const void *global, uint32_t bytes, uint64_t *barrier)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(rkv_shared(barrier)), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(rkv_shared(shared)), "l"(global), "r"(bytes), "r"(rkv_shared(barrier)) : "memory");
}

/* shared -> global, asynchronous, a group of its own. */
__device__ __forceinline__ void rkv_bulk_store(void *global, const void *shared, uint32_t bytes)
{
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
                 :: "l"(global), "r"(rkv_shared(shared)), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/* Until all but the newest KEEP stores have read shared memory. */
template <int KEEP>
__device__ __forceinline__ void rkv_bulk_wait_read()
{
    asm volatile("cp.async.bulk.wait_group.read %0;" :: "n"(KEEP) : "memory");
}

/* Until every store is written. */
__device__ __forceinline__ void rkv_bulk_wait_all()
{
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

#endif /* sm_90 */
#endif /* RKV_HOST_SIM */
#endif
