/* radixkv_cuda.h -- copies of KV pages on an NVIDIA GPU, from C: device to host, host to device, within the device.
 *
 * libradixkv_cuda.so.1 holds the kernels and needs libc alone; it finds the driver (libcuda.so.1) at run time, with
 * dlopen. On a machine without one, rkv_cuda_open says so and everything else still works. It is built where nvcc is.
 *
 * RULES THAT HOLD EVERYWHERE
 *   Units      page ids count pages of page_size tokens; strides and sizes are bytes.
 *   Status     Functions return RKV_CUDA_OK (0) or a negative rkv_cuda_status. Arguments are checked before anything is
 *              launched. rkv_cuda_last_error() then says in words, with the numbers, what was wrong.
 *   Structs    begin with struct_size, which the caller sets to sizeof(struct). They and the table grow only at their end,
 *              and a library takes the shorter structs of every host built against an earlier header of its ABI version.
 *   Ownership  Inputs are copied during the call. The memory behind a view's bases must live until the stream has
 *              passed the copy; host memory there must be page-locked and have the same address on the device
 *              (cuMemHostAlloc and cuMemHostRegister give that on every 64-bit Linux). The driver is asked about it at
 *              each copy, for a kernel that meets other memory takes the context with it.
 *   Threads    Every function may be called from any thread. Copies on one stream happen in order. rkv_cuda_close
 *              comes last.
 */
#ifndef RADIXKV_RADIXKV_CUDA_H
#define RADIXKV_RADIXKV_CUDA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RKV_CUDA_ABI_VERSION 1u

#if defined(RKV_BUILDING) && defined(__GNUC__)
#define RKV_CUDA_API __attribute__((visibility("default")))
#else
#define RKV_CUDA_API
#endif

/* ---------------------------------------------------------------------------------------------------------- status */

typedef int32_t rkv_cuda_status;

enum {
    RKV_CUDA_OK = 0,
    RKV_CUDA_ERR_ARGUMENT = -1,  /* a NULL, a count or size out of bounds, a struct_size that is too small */
    RKV_CUDA_ERR_RANGE = -2,     /* a page id or a layer that the pool does not have */
    RKV_CUDA_ERR_OVERLAP = -3,   /* bytes are written twice, or both read and written */
    RKV_CUDA_ERR_NO_DRIVER = -4, /* libcuda.so.1 is not there, or too old */
    RKV_CUDA_ERR_NO_DEVICE = -5, /* no such GPU */
    RKV_CUDA_ERR_NO_KERNELS = -6,/* this build has no code for that GPU */
    RKV_CUDA_ERR_DRIVER = -7,    /* a call of the driver failed; the message names it */
    RKV_CUDA_ERR_NO_MEMORY = -8, /* host or device memory for ids and tables could not be had */
    RKV_CUDA_ERR_UNREACHABLE = -9, /* memory of a view that the GPU cannot reach at its address: page-lock it first */
    RKV_CUDA_STATUS_END = -10    /* no status is this low */
};

/* A constant English string for a status, never NULL ("unknown status" for others). Never freed. Any thread. */
RKV_CUDA_API const char *rkv_cuda_status_string(rkv_cuda_status status);

/* What the last failing call of THIS thread was about, with its numbers; "" before any. Valid until the next failure in
 * this thread. */
RKV_CUDA_API const char *rkv_cuda_last_error(void);

/* ------------------------------------------------------------------------------------------------------------ copy */

/* What one token's KV is made of. L, P, H, D are the dimension letters of radixkv. */
typedef struct rkv_cuda_geometry {
    uint32_t struct_size;
    uint32_t halves;     /* 2: K and V (MHA); 1: one latent row (MLA) */
    uint32_t num_layers; /* L */
    uint32_t num_heads;  /* H of this rank */
    uint32_t head_bytes; /* D: head_dim * item size, or the whole packed row of quantised KV */
    uint32_t page_size;  /* P; 1 makes page ids slot indices */
} rkv_cuda_geometry;

/* One pool. Address of (half, layer, page, token, head):
 *     bases[half * L + layer] + page * page_stride + token * token_stride + head * head_stride, and D bytes on. */
typedef struct rkv_cuda_view {
    uint32_t struct_size;
    uint32_t reserved;
    const uint64_t *bases; /* halves * L addresses, in host memory */
    uint64_t num_pages;
    uint64_t page_stride;
    uint64_t token_stride;
    uint64_t head_stride;
} rkv_cuda_view;

/* Page i of src_pages goes to page i of dst_pages, in each half and each layer of the range. */
typedef struct rkv_cuda_copy {
    uint32_t struct_size;
    uint32_t index_bits;   /* 32 or 64: the type of both lists of page ids, signed */
    const rkv_cuda_geometry *geometry;
    const rkv_cuda_view *src;
    const rkv_cuda_view *dst;
    const void *src_pages; /* num_pages ids each, in host memory */
    const void *dst_pages;
    uint64_t num_pages;
    uint32_t first_layer;
    uint32_t num_layers;
    uint32_t max_blocks;   /* quota of thread blocks, to leave the other SMs alone; 0: 4; at most 65,536 count */
    uint32_t reserved;
} rkv_cuda_copy;

enum { RKV_CUDA_KERNEL_NAME_BYTES = 48, RKV_CUDA_PARAMS_BYTES = 192 };

/* A launch as the planner made it: for engines that launch on their own, and for tests. Its tables are still NULL. */
typedef struct rkv_cuda_launch {
    uint32_t struct_size;
    uint32_t grid;          /* blocks */
    uint32_t block;         /* threads a block */
    uint32_t params_bytes;  /* of params that are used: the kernel's only argument, rkv_copy_params of params.h */
    uint64_t num_pages;     /* of the copy that this launch does */
    char kernel[RKV_CUDA_KERNEL_NAME_BYTES];
    unsigned char params[RKV_CUDA_PARAMS_BYTES];
} rkv_cuda_launch;

/* Check a copy and plan the launch that does its pages from first_page on. Needs no GPU. Most copies take one launch;
 * where out->num_pages is less than what was left, plan again from first_page + out->num_pages. No pages left:
 * out->num_pages is 0.
 * Errors: ARGUMENT, RANGE, OVERLAP, NO_MEMORY. */
RKV_CUDA_API rkv_cuda_status rkv_cuda_plan(const rkv_cuda_copy *copy, uint64_t first_page, rkv_cuda_launch *out);

/* A GPU with the kernels loaded. */
typedef struct rkv_cuda rkv_cuda;

/* Find the driver, retain the primary context of a GPU, load the kernels. Destroy with rkv_cuda_close (NULL is allowed
 * there).
 * Errors: ARGUMENT, NO_DRIVER, NO_DEVICE, NO_KERNELS, DRIVER, NO_MEMORY. */
RKV_CUDA_API rkv_cuda_status rkv_cuda_open(int32_t device, rkv_cuda **out);
RKV_CUDA_API void rkv_cuda_close(rkv_cuda *cuda);

/* Put a copy on a stream (a CUstream or cudaStream_t of that GPU; NULL: the legacy default stream) and return. The
 * context that is current in this thread is restored. No pages: nothing happens.
 * Errors: those of rkv_cuda_plan and UNREACHABLE, before any launch; DRIVER, NO_MEMORY. */
RKV_CUDA_API rkv_cuda_status rkv_cuda_copy_pages(rkv_cuda *cuda, const rkv_cuda_copy *copy, void *stream);

/* Called when the copy of a layer has been put on the stream, with the GPU's primary context current: the place to record
 * an event there (cuEventRecord). It may not call functions of this header with the same rkv_cuda. */
typedef void (*rkv_cuda_layer_fn)(uint32_t layer, void *user);

/* rkv_cuda_copy_pages layer by layer, first_layer first, for a model that follows the load: checked once, and tables and
 * page ids uploaded once for all layers. after_layer (NULL: none) is called in this thread, once for each layer that is on
 * the stream, also when there are no pages. If a launch fails, the layers before it are on the stream, and no more calls
 * are made.
 * Errors: those of rkv_cuda_copy_pages. */
RKV_CUDA_API rkv_cuda_status rkv_cuda_copy_layers(rkv_cuda *cuda, const rkv_cuda_copy *copy, void *stream,
                                                  rkv_cuda_layer_fn after_layer, void *user);

/* ----------------------------------------------------------------------------------------------------------- table */

/* Every function above, for hosts that dlopen the library. struct_size tells how much of it this library has. */
typedef struct rkv_cuda_api {
    uint32_t struct_size;
    uint32_t abi_version;
    const char *(*status_string)(rkv_cuda_status);
    const char *(*last_error)(void);
    rkv_cuda_status (*plan)(const rkv_cuda_copy *, uint64_t, rkv_cuda_launch *);
    rkv_cuda_status (*open)(int32_t, rkv_cuda **);
    void (*close)(rkv_cuda *);
    rkv_cuda_status (*copy_pages)(rkv_cuda *, const rkv_cuda_copy *, void *);
    rkv_cuda_status (*copy_layers)(rkv_cuda *, const rkv_cuda_copy *, void *, rkv_cuda_layer_fn, void *);
} rkv_cuda_api;

/* The table for an ABI version, or NULL if this library does not speak it. Never freed. */
RKV_CUDA_API const rkv_cuda_api *rkv_cuda_get_api(uint32_t abi_version);

#ifdef __cplusplus
}
#endif
#endif
