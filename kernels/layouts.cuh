/* Where things lie: the one address formula that covers every layout, and division without dividing. */
#ifndef RADIXKV_KERNELS_LAYOUTS_CUH
#define RADIXKV_KERNELS_LAYOUTS_CUH

#include "device.cuh"

/* Returns n % d and leaves n / d in n; n < 2^31. */
__device__ __forceinline__ uint32_t rkv_split(uint32_t &n, const rkv_div &d)
{
    const uint32_t quotient = (uint32_t)(((uint64_t)n * d.magic) >> d.shift);
    const uint32_t rest = n - quotient * d.divisor;
    n = quotient;
    return rest;
}

/* The i-th page id of a side. */
template <class Index>
__device__ __forceinline__ int64_t rkv_page(const rkv_side &side, uint32_t i)
{
    return side.pages ? (int64_t)((const Index *)side.pages)[i] : side.first_page + i;
}

/* Offset in bytes of (page, token, head) from a base. */
__device__ __forceinline__ int64_t rkv_offset(const rkv_side &side, int64_t page, uint32_t token, uint32_t head)
{
    return page * side.page_stride + token * side.token_stride + head * side.head_stride;
}

/* Address of slot 0 of one half and layer; row = half * base_pitch + layer. */
__device__ __forceinline__ uint64_t rkv_base(const rkv_side &side, uint32_t row)
{
    return ((const uint64_t *)side.bases)[row];
}

#endif
