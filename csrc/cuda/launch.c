/* Launches through the driver, which is found at run time: nothing here is linked against CUDA. */
#include "internal.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* glibc 2.34 moved these into libc under a second version; asking for the first keeps older systems (see
 * csrc/src/glibc_floor.h). */
#if defined(__gnu_linux__) && (defined(__x86_64__) || defined(__aarch64__))
#ifdef __x86_64__
#define FIRST_VERSION "GLIBC_2.2.5"
#else
#define FIRST_VERSION "GLIBC_2.17"
#endif
__asm__(".symver dlopen,dlopen@" FIRST_VERSION);
__asm__(".symver dlsym,dlsym@" FIRST_VERSION);
__asm__(".symver dlerror,dlerror@" FIRST_VERSION);
__asm__(".symver pthread_once,pthread_once@" FIRST_VERSION);
#endif

/* ----------------------------------------------------------------------------------------------------- the driver */

typedef int CUresult;
typedef int CUdevice;
typedef unsigned long long CUdeviceptr;
typedef struct CUctx_st *CUcontext;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUstream_st *CUstream;

enum { CUDA_SUCCESS = 0, CUDA_ERROR_OUT_OF_MEMORY = 2, CUDA_ERROR_NO_DEVICE = 100, CUDA_ERROR_NO_BINARY_FOR_GPU = 209 };

/* Field, name of the symbol, arguments. cuMemAllocAsync came with CUDA 11.2: an older driver is too old. */
#define DRIVER_FUNCTIONS(X) \
    X(init, "cuInit", (unsigned int)) \
    X(get_error_string, "cuGetErrorString", (CUresult, const char **)) \
    X(device_count, "cuDeviceGetCount", (int *)) \
    X(device_get, "cuDeviceGet", (CUdevice *, int)) \
    X(context_retain, "cuDevicePrimaryCtxRetain", (CUcontext *, CUdevice)) \
    X(context_release, "cuDevicePrimaryCtxRelease_v2", (CUdevice)) \
    X(context_push, "cuCtxPushCurrent_v2", (CUcontext)) \
    X(context_pop, "cuCtxPopCurrent_v2", (CUcontext *)) \
    X(module_load, "cuModuleLoadData", (CUmodule *, const void *)) \
    X(module_unload, "cuModuleUnload", (CUmodule)) \
    X(module_function, "cuModuleGetFunction", (CUfunction *, CUmodule, const char *)) \
    X(allocate, "cuMemAllocAsync", (CUdeviceptr *, size_t, CUstream)) \
    X(release, "cuMemFreeAsync", (CUdeviceptr, CUstream)) \
    X(upload, "cuMemcpyHtoDAsync_v2", (CUdeviceptr, const void *, size_t, CUstream)) \
    X(launch, "cuLaunchKernel", \
      (CUfunction, unsigned int, unsigned int, unsigned int, unsigned int, unsigned int, unsigned int, unsigned int, \
       CUstream, void **, void **))

#define DRIVER_FIELD(field, symbol, arguments) CUresult(*field) arguments;
static struct {
    DRIVER_FUNCTIONS(DRIVER_FIELD)
} driver;

static pthread_once_t driver_once = PTHREAD_ONCE_INIT;
static rkv_cuda_status driver_status;
static char driver_error[256]; /* why there is none; written once */

static const char *driver_says(CUresult result)
{
    const char *text = NULL;
    return driver.get_error_string(result, &text) == CUDA_SUCCESS && text != NULL ? text : "unknown error";
}

static void load_driver(void)
{
    driver_status = RKV_CUDA_ERR_NO_DRIVER;
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL); /* kept for the life of the process */
    if (library == NULL) {
        snprintf(driver_error, sizeof driver_error, "%s", dlerror());
        return;
    }
#define DRIVER_LOOKUP(field, symbol, arguments) \
    *(void **)&driver.field = dlsym(library, symbol); \
    if (driver.field == NULL) { \
        snprintf(driver_error, sizeof driver_error, "the driver has no %s: it is older than CUDA 11.2", symbol); \
        return; \
    }
    DRIVER_FUNCTIONS(DRIVER_LOOKUP)
    const CUresult result = driver.init(0);
    if (result != CUDA_SUCCESS) {
        driver_status = result == CUDA_ERROR_NO_DEVICE ? RKV_CUDA_ERR_NO_DEVICE : RKV_CUDA_ERR_NO_DRIVER;
        snprintf(driver_error, sizeof driver_error, "cuInit: %s", driver_says(result));
        return;
    }
    driver_status = RKV_CUDA_OK;
}

static rkv_cuda_status failed(const char *call, CUresult result)
{
    const rkv_cuda_status status = result == CUDA_ERROR_OUT_OF_MEMORY       ? RKV_CUDA_ERR_NO_MEMORY
                                   : result == CUDA_ERROR_NO_BINARY_FOR_GPU ? RKV_CUDA_ERR_NO_KERNELS
                                                                            : RKV_CUDA_ERR_DRIVER;
    return rkv_cuda_fail(status, "%s: %s", call, driver_says(result));
}

/* ------------------------------------------------------------------------------------------------------------ GPU */

struct rkv_cuda {
    CUdevice device;
    CUcontext context;
    CUmodule module;
};

/* The step that failed has left its message; undo what came before. */
static rkv_cuda_status open_device(rkv_cuda *cuda, int32_t number)
{
    CUresult result = driver.device_get(&cuda->device, number);
    if (result != CUDA_SUCCESS) return failed("cuDeviceGet", result);
    result = driver.context_retain(&cuda->context, cuda->device);
    if (result != CUDA_SUCCESS) return failed("cuDevicePrimaryCtxRetain", result);
    const char *call = "cuCtxPushCurrent";
    result = driver.context_push(cuda->context);
    if (result == CUDA_SUCCESS) {
        call = "cuModuleLoadData";
        result = driver.module_load(&cuda->module, rkv_cuda_fatbin);
        CUcontext popped;
        driver.context_pop(&popped);
    }
    if (result == CUDA_SUCCESS) return RKV_CUDA_OK;
    driver.context_release(cuda->device);
    return failed(call, result);
}

rkv_cuda_status rkv_cuda_open(int32_t device, rkv_cuda **out)
{
    if (out == NULL) return rkv_cuda_fail(RKV_CUDA_ERR_ARGUMENT, "out is NULL");
    *out = NULL;
    pthread_once(&driver_once, load_driver);
    if (driver_status != RKV_CUDA_OK) return rkv_cuda_fail(driver_status, "%s", driver_error);
    int count = 0;
    const CUresult result = driver.device_count(&count);
    if (result != CUDA_SUCCESS) return failed("cuDeviceGetCount", result);
    if (device < 0 || device >= count) return rkv_cuda_fail(RKV_CUDA_ERR_NO_DEVICE, "GPU %d of %d", (int)device, count);
    rkv_cuda *cuda = calloc(1, sizeof *cuda);
    if (cuda == NULL) return rkv_cuda_fail(RKV_CUDA_ERR_NO_MEMORY, "no memory for a handle");
    const rkv_cuda_status status = open_device(cuda, device);
    if (status != RKV_CUDA_OK) {
        free(cuda);
        return status;
    }
    *out = cuda;
    return RKV_CUDA_OK;
}

void rkv_cuda_close(rkv_cuda *cuda)
{
    if (cuda == NULL) return;
    CUcontext popped;
    if (driver.context_push(cuda->context) == CUDA_SUCCESS) {
        driver.module_unload(cuda->module);
        driver.context_pop(&popped);
    }
    driver.context_release(cuda->device);
    free(cuda);
}

/* ----------------------------------------------------------------------------------------------------------- copy */

/* Both tables of bases and the page ids that kernels must read, one after the other: what a copy uploads. */
typedef struct tables {
    unsigned char *bytes;
    size_t bases_bytes, pages_bytes; /* of one side each */
    size_t src_pages, dst_pages;     /* offsets; 0: a run, not uploaded */
    size_t size;
} tables;

static rkv_cuda_status make_tables(const rkv_cuda_copy *copy, tables *t)
{
    memset(t, 0, sizeof *t);
    t->bases_bytes = (size_t)copy->geometry->halves * copy->geometry->num_layers * sizeof *copy->src->bases;
    t->pages_bytes = (size_t)copy->num_pages * (copy->index_bits / 8);
    t->size = 2 * t->bases_bytes;
    if (rkv_cuda_first_of_run(copy->src_pages, copy->num_pages, copy->index_bits) < 0) {
        t->src_pages = t->size;
        t->size += (t->pages_bytes + 7) / 8 * 8;
    }
    if (rkv_cuda_first_of_run(copy->dst_pages, copy->num_pages, copy->index_bits) < 0) {
        t->dst_pages = t->size;
        t->size += (t->pages_bytes + 7) / 8 * 8;
    }
    t->bytes = calloc(1, t->size);
    if (t->bytes == NULL) return rkv_cuda_fail(RKV_CUDA_ERR_NO_MEMORY, "no memory for %zu bytes of page ids", t->size);
    memcpy(t->bytes, copy->src->bases, t->bases_bytes);
    memcpy(t->bytes + t->bases_bytes, copy->dst->bases, t->bases_bytes);
    if (t->src_pages) memcpy(t->bytes + t->src_pages, copy->src_pages, t->pages_bytes);
    if (t->dst_pages) memcpy(t->bytes + t->dst_pages, copy->dst_pages, t->pages_bytes);
    return RKV_CUDA_OK;
}

/* Launch after launch over the pages, with the tables at `at` on the device. */
static rkv_cuda_status launch_all(rkv_cuda *cuda, const rkv_cuda_copy *copy, const tables *t, CUdeviceptr at,
                                  CUstream stream)
{
    rkv_cuda_launch plan;
    memset(&plan, 0, sizeof plan);
    plan.struct_size = sizeof plan;
    for (uint64_t done = 0; done < copy->num_pages; done += plan.num_pages) {
        rkv_cuda_plan_checked(copy, done, &plan);
        rkv_copy_params params;
        memcpy(&params, plan.params, sizeof params);
        const size_t skip = (size_t)done * (copy->index_bits / 8);
        params.src.bases = at;
        params.dst.bases = at + t->bases_bytes;
        params.src.pages = t->src_pages ? at + t->src_pages + skip : 0;
        params.dst.pages = t->dst_pages ? at + t->dst_pages + skip : 0;
        CUfunction function;
        CUresult result = driver.module_function(&function, cuda->module, plan.kernel);
        if (result != CUDA_SUCCESS) return failed(plan.kernel, result);
        void *arguments[] = {&params};
        result = driver.launch(function, plan.grid, 1, 1, plan.block, 1, 1, 0, stream, arguments, NULL);
        if (result != CUDA_SUCCESS) return failed("cuLaunchKernel", result);
    }
    return RKV_CUDA_OK;
}

rkv_cuda_status rkv_cuda_copy_pages(rkv_cuda *cuda, const rkv_cuda_copy *copy, void *stream)
{
    if (cuda == NULL) return rkv_cuda_fail(RKV_CUDA_ERR_ARGUMENT, "cuda is NULL");
    rkv_cuda_status status = rkv_cuda_check(copy);
    if (status != RKV_CUDA_OK || !copy->num_pages) return status;
    tables t;
    status = make_tables(copy, &t);
    if (status != RKV_CUDA_OK) return status;
    CUdeviceptr at = 0;
    CUcontext popped;
    const char *call = "cuCtxPushCurrent";
    CUresult result = driver.context_push(cuda->context);
    if (result == CUDA_SUCCESS) {
        call = "cuMemAllocAsync";
        result = driver.allocate(&at, t.size, stream);
        if (result == CUDA_SUCCESS) {
            call = "cuMemcpyHtoDAsync"; /* from pageable memory: the driver has read it all when it returns */
            result = driver.upload(at, t.bytes, t.size, stream);
            if (result == CUDA_SUCCESS) status = launch_all(cuda, copy, &t, at, stream);
            driver.release(at, stream); /* in stream order: after the kernels */
        }
        driver.context_pop(&popped);
    }
    free(t.bytes);
    return result == CUDA_SUCCESS ? status : failed(call, result);
}
