/* Launches through the driver, which is found at run time: nothing here is linked against CUDA. */
#include "internal.h"

#include <dlfcn.h>
#include <inttypes.h>
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
typedef struct CUevent_st *CUevent;

enum {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_INVALID_VALUE = 1,
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CUDA_ERROR_NO_DEVICE = 100,
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209,
};

/* Of cuPointerGetAttribute. */
enum { POINTER_ON_DEVICE = 3, RANGE_START = 11, RANGE_BYTES = 12 };

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
    X(pointer_attribute, "cuPointerGetAttribute", (void *, int, CUdeviceptr)) \
    X(upload, "cuMemcpyHtoDAsync_v2", (CUdeviceptr, const void *, size_t, CUstream)) \
    X(host_allocate, "cuMemHostAlloc", (void **, size_t, unsigned int)) \
    X(host_release, "cuMemFreeHost", (void *)) \
    X(event_create, "cuEventCreate", (CUevent *, unsigned int)) \
    X(event_destroy, "cuEventDestroy_v2", (CUevent)) \
    X(event_record, "cuEventRecord", (CUevent, CUstream)) \
    X(event_query, "cuEventQuery", (CUevent)) \
    X(event_wait, "cuEventSynchronize", (CUevent)) \
    X(stream_wait, "cuStreamSynchronize", (CUstream)) \
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

enum { MAX_SLOTS = 16, MAX_FUNCTIONS = 32, EVENT_DISABLE_TIMING = 2 };
#define MIN_SLOT_BYTES ((size_t)64 << 10)

/* Page-locked memory that one upload reads: from pageable memory the caller would wait for the stream. It may be written
 * again once its event has passed. */
typedef struct slot {
    void *host;
    size_t capacity;
    CUevent event; /* behind the last upload */
    uint64_t turn; /* of the last upload; 0: none yet */
    int taken;     /* by a thread, between take_slot and give_slot */
} slot;

struct rkv_cuda {
    CUdevice device;
    CUcontext context;
    CUmodule module;
    pthread_mutex_t mutex; /* about all below */
    pthread_cond_t given;  /* a slot came back from a thread */
    slot slots[MAX_SLOTS];
    uint32_t num_slots, num_functions;
    uint64_t turns;
    struct {
        char name[sizeof((rkv_cuda_launch){0}.kernel)];
        CUfunction function;
    } functions[MAX_FUNCTIONS];
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
    pthread_mutex_init(&cuda->mutex, NULL);
    pthread_cond_init(&cuda->given, NULL);
    *out = cuda;
    return RKV_CUDA_OK;
}

void rkv_cuda_close(rkv_cuda *cuda)
{
    if (cuda == NULL) return;
    CUcontext popped;
    if (driver.context_push(cuda->context) == CUDA_SUCCESS) {
        for (uint32_t i = 0; i < cuda->num_slots; i++) {
            slot *one = &cuda->slots[i];
            if (one->turn) driver.event_wait(one->event);
            if (one->host) driver.host_release(one->host);
            driver.event_destroy(one->event);
        }
        driver.module_unload(cuda->module);
        driver.context_pop(&popped);
    }
    driver.context_release(cuda->device);
    pthread_cond_destroy(&cuda->given);
    pthread_mutex_destroy(&cuda->mutex);
    free(cuda);
}

/* -------------------------------------------------------------------------------------------------------- staging */

/* Under the mutex: an idle slot (the first that is large enough, else any), a new one, or the one that will be
 * idle first, and is waited for. NULL: threads have all of them. */
static CUresult find_slot(rkv_cuda *cuda, size_t bytes, slot **found)
{
    slot *idle = NULL, *oldest = NULL;
    for (uint32_t i = 0; i < cuda->num_slots; i++) {
        slot *one = &cuda->slots[i];
        if (one->taken) continue;
        if (oldest == NULL || one->turn < oldest->turn) oldest = one;
        if (one->turn && driver.event_query(one->event) != CUDA_SUCCESS) continue;
        if (idle == NULL || (idle->capacity < bytes && one->capacity >= bytes)) idle = one;
    }
    CUresult result = CUDA_SUCCESS;
    if (idle == NULL && cuda->num_slots < MAX_SLOTS) {
        slot *one = &cuda->slots[cuda->num_slots];
        result = driver.event_create(&one->event, EVENT_DISABLE_TIMING);
        if (result == CUDA_SUCCESS) {
            cuda->num_slots++;
            idle = one;
        }
    } else if (idle == NULL && oldest != NULL) {
        result = driver.event_wait(oldest->event);
        idle = oldest;
    }
    *found = result == CUDA_SUCCESS ? idle : NULL;
    return result;
}

/* A slot for this thread, of `bytes` and more; waits while other threads have all of them. */
static rkv_cuda_status take_slot(rkv_cuda *cuda, size_t bytes, slot **taken)
{
    size_t capacity = MIN_SLOT_BYTES;
    while (capacity < bytes) capacity *= 2;
    const char *call = "cuEvent";
    pthread_mutex_lock(&cuda->mutex);
    CUresult result;
    while ((result = find_slot(cuda, bytes, taken)) == CUDA_SUCCESS && *taken == NULL) {
        pthread_cond_wait(&cuda->given, &cuda->mutex);
    }
    slot *one = *taken;
    if (one != NULL && one->capacity < bytes) {
        call = "cuMemHostAlloc";
        if (one->host != NULL) driver.host_release(one->host);
        one->host = NULL;
        one->capacity = 0;
        result = driver.host_allocate(&one->host, capacity, 0);
        if (result == CUDA_SUCCESS) one->capacity = capacity;
    }
    if (one != NULL && result == CUDA_SUCCESS) one->taken = 1;
    pthread_mutex_unlock(&cuda->mutex);
    return result == CUDA_SUCCESS ? RKV_CUDA_OK : failed(call, result);
}

/* The slot is anybody's again; its event was recorded if used is set. */
static void give_slot(rkv_cuda *cuda, slot *one, int used)
{
    pthread_mutex_lock(&cuda->mutex);
    if (used) one->turn = ++cuda->turns;
    one->taken = 0;
    pthread_cond_signal(&cuda->given);
    pthread_mutex_unlock(&cuda->mutex);
}

/* The function of a kernel, which the driver is asked for once. */
static CUresult find_function(rkv_cuda *cuda, const char *name, CUfunction *function)
{
    CUresult result = CUDA_SUCCESS;
    uint32_t i = 0;
    pthread_mutex_lock(&cuda->mutex);
    while (i < cuda->num_functions && strcmp(cuda->functions[i].name, name) != 0) i++;
    if (i < cuda->num_functions) {
        *function = cuda->functions[i].function;
    } else {
        result = driver.module_function(function, cuda->module, name);
        if (result == CUDA_SUCCESS && i < MAX_FUNCTIONS) {
            snprintf(cuda->functions[i].name, sizeof cuda->functions[i].name, "%s", name);
            cuda->functions[i].function = *function;
            cuda->num_functions++;
        }
    }
    pthread_mutex_unlock(&cuda->mutex);
    return result;
}

/* ----------------------------------------------------------------------------------------------------------- copy */

/* Both tables of bases and the page ids that kernels must read, one after the other: what a copy uploads. */
typedef struct tables {
    unsigned char *bytes;
    size_t bases_bytes, pages_bytes; /* of one side each */
    size_t src_pages, dst_pages;     /* offsets; 0: a run, not uploaded */
    size_t size;
} tables;

static void size_tables(const rkv_cuda_copy *copy, tables *t)
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
}

static void fill_tables(const rkv_cuda_copy *copy, const tables *t)
{
    memcpy(t->bytes, copy->src->bases, t->bases_bytes);
    memcpy(t->bytes + t->bases_bytes, copy->dst->bases, t->bases_bytes);
    if (t->src_pages) memcpy(t->bytes + t->src_pages, copy->src_pages, t->pages_bytes);
    if (t->dst_pages) memcpy(t->bytes + t->dst_pages, copy->dst_pages, t->pages_bytes);
}

/* Bytes [first, end) that are known to be of one allocation. */
typedef struct range {
    uint64_t first, end;
} range;

/* Whether kernels may use the memory at an address, and the allocation (or page-locked chunk) around it; an empty range if
 * the driver does not tell. */
static rkv_cuda_status find_range(const char *side, uint64_t address, range *around)
{
    CUdeviceptr there = 0, start = 0;
    size_t bytes = 0;
    const CUresult result = driver.pointer_attribute(&there, POINTER_ON_DEVICE, address);
    *around = (range){0, 0};
    if (result == CUDA_ERROR_INVALID_VALUE) {
        return rkv_cuda_fail(RKV_CUDA_ERR_UNREACHABLE,
                             "%s: 0x%" PRIx64 " is memory that the driver does not know; page-lock host pools first", side,
                             address);
    }
    if (result != CUDA_SUCCESS) return failed("cuPointerGetAttribute", result);
    if (there != address) {
        return rkv_cuda_fail(RKV_CUDA_ERR_UNREACHABLE, "%s: 0x%" PRIx64 " is at 0x%llx on the device", side, address, there);
    }
    if (driver.pointer_attribute(&start, RANGE_START, address) == CUDA_SUCCESS &&
        driver.pointer_attribute(&bytes, RANGE_BYTES, address) == CUDA_SUCCESS && start <= address &&
        bytes > address - start) {
        *around = (range){start, start + bytes};
    }
    return RKV_CUDA_OK;
}

/* Every byte that the copy may touch on one side: from chunk to chunk, or first and last byte of each base where the
 * driver does not tell chunks. One contiguous pool costs three calls of the driver. */
static rkv_cuda_status check_reachable(const char *side, const rkv_cuda_copy *copy, const rkv_cuda_view *view)
{
    const rkv_cuda_geometry *g = copy->geometry;
    const uint64_t reach = rkv_cuda_reach(g, view);
    range known = {0, 0};
    for (uint32_t half = 0; half < g->halves; half++) {
        for (uint32_t layer = 0; layer < copy->num_layers; layer++) {
            const uint64_t first = view->bases[(uint64_t)half * g->num_layers + copy->first_layer + layer];
            const uint64_t last = first + reach - 1;
            for (uint64_t at = first;;) {
                if (at < known.first || at >= known.end) {
                    const rkv_cuda_status status = find_range(side, at, &known);
                    if (status != RKV_CUDA_OK) return status;
                }
                if (at == last || known.end > last) break;
                at = known.end > at ? known.end : last;
            }
        }
    }
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
        CUresult result = find_function(cuda, plan.kernel, &function);
        if (result != CUDA_SUCCESS) return failed(plan.kernel, result);
        void *arguments[] = {&params};
        result = driver.launch(function, plan.grid, 1, 1, plan.block, 1, 1, 0, stream, arguments, NULL);
        if (result != CUDA_SUCCESS) return failed("cuLaunchKernel", result);
    }
    return RKV_CUDA_OK;
}

/* Who follows a copy layer by layer; by_layer 0: nobody, all layers in one go. */
typedef struct follower {
    int by_layer;
    rkv_cuda_layer_fn after_layer;
    void *user;
} follower;

static rkv_cuda_status launch_layers(rkv_cuda *cuda, const rkv_cuda_copy *copy, const tables *t, CUdeviceptr at,
                                     CUstream stream, const follower *f)
{
    if (!f->by_layer) return launch_all(cuda, copy, t, at, stream);
    rkv_cuda_status status = RKV_CUDA_OK;
    rkv_cuda_copy part = *copy;
    part.num_layers = 1;
    for (uint32_t i = 0; i < copy->num_layers && status == RKV_CUDA_OK; i++) {
        part.first_layer = copy->first_layer + i;
        status = launch_all(cuda, &part, t, at, stream);
        if (status == RKV_CUDA_OK && f->after_layer != NULL) f->after_layer(part.first_layer, f->user);
    }
    return status;
}

/* Upload the tables and launch, in the GPU's context. */
static rkv_cuda_status upload_and_launch(rkv_cuda *cuda, const rkv_cuda_copy *copy, CUstream stream, const follower *f)
{
    tables t;
    slot *staged;
    size_tables(copy, &t);
    rkv_cuda_status status = take_slot(cuda, t.size, &staged);
    if (status != RKV_CUDA_OK) return status;
    t.bytes = staged->host;
    fill_tables(copy, &t);
    CUdeviceptr at = 0;
    const char *call = "cuMemAllocAsync";
    CUresult result = driver.allocate(&at, t.size, stream);
    if (result != CUDA_SUCCESS) {
        give_slot(cuda, staged, 0);
        return failed(call, result);
    }
    call = "cuMemcpyHtoDAsync";
    result = driver.upload(at, t.bytes, t.size, stream);
    if (result != CUDA_SUCCESS) {
        give_slot(cuda, staged, 0);
    } else {
        call = "cuEventRecord";
        result = driver.event_record(staged->event, stream);
        if (result != CUDA_SUCCESS) driver.stream_wait(stream); /* nothing else tells when the slot has been read */
        give_slot(cuda, staged, result == CUDA_SUCCESS);
        if (result == CUDA_SUCCESS) status = launch_layers(cuda, copy, &t, at, stream, f);
    }
    driver.release(at, stream); /* in stream order: after the kernels */
    return result == CUDA_SUCCESS ? status : failed(call, result);
}

static rkv_cuda_status put(rkv_cuda *cuda, const rkv_cuda_copy *callers, CUstream stream, const follower *f)
{
    if (cuda == NULL) return rkv_cuda_fail(RKV_CUDA_ERR_ARGUMENT, "cuda is NULL");
    rkv_cuda_status status = rkv_cuda_check(callers);
    if (status != RKV_CUDA_OK || (!callers->num_pages && !f->by_layer)) return status;
    rkv_cuda_copy copy; /* what an older caller does not have is 0 */
    memset(&copy, 0, sizeof copy);
    memcpy(&copy, callers, callers->struct_size < sizeof copy ? callers->struct_size : sizeof copy);
    const CUresult result = driver.context_push(cuda->context);
    if (result != CUDA_SUCCESS) return failed("cuCtxPushCurrent", result);
    if (!copy.num_pages) {
        for (uint32_t i = 0; f->after_layer != NULL && i < copy.num_layers; i++) {
            f->after_layer(copy.first_layer + i, f->user);
        }
    } else {
        status = check_reachable("src", &copy, copy.src);
        if (status == RKV_CUDA_OK) status = check_reachable("dst", &copy, copy.dst);
        if (status == RKV_CUDA_OK) status = upload_and_launch(cuda, &copy, stream, f);
    }
    CUcontext popped;
    driver.context_pop(&popped);
    return status;
}

rkv_cuda_status rkv_cuda_copy_pages(rkv_cuda *cuda, const rkv_cuda_copy *copy, void *stream)
{
    return put(cuda, copy, stream, &(follower){0});
}

rkv_cuda_status rkv_cuda_copy_layers(rkv_cuda *cuda, const rkv_cuda_copy *copy, void *stream, rkv_cuda_layer_fn after_layer,
                                     void *user)
{
    return put(cuda, copy, stream, &(follower){1, after_layer, user});
}

/* ---------------------------------------------------------------------------------------------------------- table */

static const rkv_cuda_api api = {
    .struct_size = sizeof(rkv_cuda_api),
    .abi_version = RKV_CUDA_ABI_VERSION,
    .status_string = rkv_cuda_status_string,
    .last_error = rkv_cuda_last_error,
    .plan = rkv_cuda_plan,
    .open = rkv_cuda_open,
    .close = rkv_cuda_close,
    .copy_pages = rkv_cuda_copy_pages,
    .copy_layers = rkv_cuda_copy_layers,
};

const rkv_cuda_api *rkv_cuda_get_api(uint32_t abi_version)
{
    return abi_version == RKV_CUDA_ABI_VERSION ? &api : NULL;
}
