/* A libcuda.so.1 on the host simulator, for the C launcher: device memory is host memory, launches run in LOOP mode.
 *
 *     FAKE_CUDA_FAIL     "cuMemAllocAsync:2": that function returns that code
 *     FAKE_CUDA_DEVICES  how many GPUs there are; 1 if unset
 *     FAKE_CUDA_CHUNK    bytes of each page-locked chunk; 0: the driver tells no ranges; 1 MiB if unset
 *     FAKE_CUDA_HOLE     an address (decimal) whose chunk the driver does not know
 *     FAKE_CUDA_MOVED    an address (decimal) that lies elsewhere on the device
 *
 *     FAKE_CUDA_LAZY     if set, uploads, launches and frees happen when somebody waits for an event or the stream
 *
 * fake_cuda_balance() tells what is held: allocations, contexts retained and pushed, modules; and how many launches,
 * uploads and questions about pointers there were; page-locked memory and events held; how many functions were looked up,
 * and how often somebody waited for an event. */
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <string>

#include "../../kernels/params.h"

extern "C" {

const char *rkv_sim_launch(const char *name, unsigned grid, unsigned block, void **args, int mode, unsigned seed);

static long allocations, retained, pushed, modules, launches, uploads, asked, locked, events, lookups, waits;

/* The one stream: what is still to be done, and how much was ever put on it and done. */
static std::deque<std::function<void()>> stream;
static long put, done;
static int broken;

static void step(long until)
{
    for (; done < until; done++) {
        stream.front()();
        stream.pop_front();
    }
}

static void on_stream(std::function<void()> action)
{
    stream.push_back(action);
    put++;
    if (std::getenv("FAKE_CUDA_LAZY") == nullptr) step(put);
}

static int failing(const char *name)
{
    const char *wanted = std::getenv("FAKE_CUDA_FAIL");
    const size_t length = std::strlen(name);
    if (wanted == nullptr || std::strncmp(wanted, name, length) != 0 || wanted[length] != ':') return 0;
    return std::atoi(wanted + length + 1);
}

#define FAIL_OR(name) \
    if (const int code = failing(name)) return code

int cuInit(unsigned) { FAIL_OR("cuInit"); return 0; }

int cuGetErrorString(int code, const char **text)
{
    static std::string said;
    said = "fake error " + std::to_string(code);
    *text = said.c_str();
    return 0;
}

int cuDeviceGetCount(int *count)
{
    FAIL_OR("cuDeviceGetCount");
    const char *devices = std::getenv("FAKE_CUDA_DEVICES");
    *count = devices == nullptr ? 1 : std::atoi(devices);
    return 0;
}

int cuDeviceGet(int *device, int number) { FAIL_OR("cuDeviceGet"); *device = number; return 0; }

int cuDevicePrimaryCtxRetain(void **context, int)
{
    FAIL_OR("cuDevicePrimaryCtxRetain");
    *context = &retained;
    retained++;
    return 0;
}

int cuDevicePrimaryCtxRelease_v2(int) { retained--; return 0; }
int cuCtxPushCurrent_v2(void *) { FAIL_OR("cuCtxPushCurrent_v2"); pushed++; return 0; }
int cuCtxPopCurrent_v2(void **context) { *context = nullptr; pushed--; return 0; }

int cuModuleLoadData(void **module, const void *image)
{
    FAIL_OR("cuModuleLoadData");
    *module = const_cast<void *>(image);
    modules++;
    return 0;
}

int cuModuleUnload(void *) { modules--; return 0; }

int cuModuleGetFunction(void **function, void *, const char *name)
{
    FAIL_OR("cuModuleGetFunction");
    lookups++;
    static std::string names[64];
    for (std::string &known : names) {
        if (known.empty()) known = name;
        if (known == name) {
            *function = const_cast<char *>(known.c_str());
            return 0;
        }
    }
    return 500;
}

int cuMemAllocAsync(uint64_t *address, size_t bytes, void *)
{
    FAIL_OR("cuMemAllocAsync");
    *address = (uint64_t)std::malloc(bytes);
    allocations++;
    return 0;
}

int cuMemFreeAsync(uint64_t address, void *)
{
    on_stream([=] { std::free((void *)address); });
    allocations--;
    return 0;
}

int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *)
{
    FAIL_OR("cuMemcpyHtoDAsync_v2");
    on_stream([=] { std::memcpy((void *)to, from, bytes); });
    uploads++;
    return 0;
}

static uint64_t given(const char *name, uint64_t otherwise)
{
    const char *value = std::getenv(name);
    return value == nullptr ? otherwise : std::strtoull(value, nullptr, 10);
}

int cuPointerGetAttribute(void *data, int attribute, uint64_t address)
{
    FAIL_OR("cuPointerGetAttribute");
    asked++;
    const uint64_t chunk = given("FAKE_CUDA_CHUNK", 1 << 20), hole = given("FAKE_CUDA_HOLE", 0);
    if (hole && (chunk ? hole / chunk == address / chunk : hole == address)) return 1;
    if (attribute == 3) {
        *(uint64_t *)data = address + (address == given("FAKE_CUDA_MOVED", 0) ? 4096 : 0);
        return 0;
    }
    if (!chunk) return 1;
    if (attribute == 11) *(uint64_t *)data = address / chunk * chunk;
    else if (attribute == 12) *(size_t *)data = chunk;
    else return 1;
    return 0;
}

int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *, void **args, void **extra)
{
    FAIL_OR("cuLaunchKernel");
    if (gy * gz * by * bz != 1 || shared || extra) return 1;
    launches++;
    const rkv_copy_params params = *(const rkv_copy_params *)args[0];
    on_stream([=] {
        void *kept[] = {(void *)&params};
        broken |= rkv_sim_launch((const char *)function, gx, bx, kept, 0, 0) != nullptr;
    });
    return broken ? 719 : 0;
}

int cuMemHostAlloc(void **memory, size_t bytes, unsigned)
{
    FAIL_OR("cuMemHostAlloc");
    *memory = std::malloc(bytes);
    locked++;
    return *memory ? 0 : 2;
}

int cuMemFreeHost(void *memory) { std::free(memory); locked--; return 0; }
int cuStreamSynchronize(void *) { step(put); return 0; }

/* An event is how much was on the stream. */
int cuEventCreate(void **event, unsigned) { FAIL_OR("cuEventCreate"); *event = new long(0); events++; return 0; }
int cuEventDestroy_v2(void *event) { delete (long *)event; events--; return 0; }
int cuEventRecord(void *event, void *) { FAIL_OR("cuEventRecord"); *(long *)event = put; return 0; }
int cuEventQuery(void *event) { return done >= *(long *)event ? 0 : 600; }
int cuEventSynchronize(void *event) { waits++; step(*(long *)event); return 0; }

long fake_cuda_balance(int what)
{
    const long all[] = {allocations, retained, pushed, modules, launches, uploads, asked, locked, events, lookups, waits};
    return all[what];
}

}
