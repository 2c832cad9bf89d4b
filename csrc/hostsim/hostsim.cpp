/* Runs the kernels of kernels/ on a CPU, block after block. Build (tests/kernels/simulator.py does):
 *
 *   g++ -std=c++20 -O1 -shared -fPIC -pthread -DRKV_HOST_SIM -Icsrc/hostsim -Ikernels csrc/hostsim/hostsim.cpp
 *
 * Modes
 *   LOOP    the threads of a block are a loop: fast, refuses __syncthreads
 *   FIBRE   a stack for each thread of a block, switched at __syncthreads; finds divergent barriers
 *   THREAD  a real thread for each thread of a block, for TSan
 * A seed other than 0 shuffles the order of the threads in every block, and of the blocks.
 *
 * rkv_sim_launch takes its arguments as cuLaunchKernel does: an array of pointers to each argument. */
#include "all.cu"

#include <algorithm>
#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <ucontext.h>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#else
extern "C" unsigned char __start_rkv_shared[], __stop_rkv_shared[];
#endif

namespace hostsim {

thread_local dim3 thread_index, block_index;
dim3 block_dim, grid_dim;

namespace {

enum Mode { LOOP = 0, FIBRE = 1, THREAD = 2 };

int mode = LOOP;
std::mt19937 random_order;
bool shuffled = false;
std::string failure; /* the first rule that the running launch broke */

void fail(const std::string &what)
{
    if (failure.empty()) failure = what;
}

/* ------------------------------------------------------------------------------------------------- bulk copies */

struct Copy {
    void *to;
    const void *from;
    uint32_t bytes;
};

struct Barrier {
    uint32_t completed = 0; /* phases */
    std::deque<Copy> loads; /* one a phase: each load arrives once */
};

std::map<uint64_t *, Barrier> barriers;
std::deque<Copy> stores;
bool published = false;

void perform(const Copy &copy)
{
    std::memcpy(copy.to, copy.from, copy.bytes);
}

void check_bulk(const void *global, const void *shared, uint32_t bytes)
{
    const bool aligned = ((uintptr_t)global | (uintptr_t)shared | bytes) % 16 == 0;
    if (!aligned || bytes == 0) {
        fail("a bulk copy of " + std::to_string(bytes) + " bytes that is not of aligned 16-byte units");
    }
}

/* Shared memory starts as rubbish, and no bulk copy outlives its block. */
void begin_block()
{
    barriers.clear();
    stores.clear();
    published = false;
#if !defined(__SANITIZE_ADDRESS__)
    std::memset(__start_rkv_shared, 0xA5, (size_t)(__stop_rkv_shared - __start_rkv_shared));
#endif
}

void end_block()
{
    if (!stores.empty()) fail(std::to_string(stores.size()) + " bulk stores were not waited for");
    for (auto &[address, barrier] : barriers) {
        if (!barrier.loads.empty()) fail(std::to_string(barrier.loads.size()) + " bulk loads were not waited for");
    }
}

/* ------------------------------------------------------------------------------------------------------ fibres */

struct Fibre {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    dim3 index;
    bool done;
    void *fake_stack; /* ASan's */
};

constexpr size_t STACK_BYTES = 128 << 10;
std::vector<Fibre> fibres;
Fibre *current = nullptr;
ucontext_t scheduler;
#if defined(__SANITIZE_ADDRESS__)
const void *scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
#endif
const std::function<void()> *body = nullptr;

void leave_fibre(bool finished)
{
    Fibre &fibre = *current;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(finished ? nullptr : &fibre.fake_stack, scheduler_stack, scheduler_stack_bytes);
#else
    (void)finished;
#endif
    swapcontext(&fibre.context, &scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fibre.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

void enter_fibre(Fibre &fibre)
{
    current = &fibre;
    thread_index = fibre.index;
#if defined(__SANITIZE_ADDRESS__)
    void *fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, fibre.stack.get(), STACK_BYTES);
#endif
    swapcontext(&scheduler, &fibre.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void fibre_main()
{
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
    (*body)();
    current->done = true;
    leave_fibre(true);
}

void run_fibres(const std::vector<unsigned> &order, const std::function<void()> &f)
{
    body = &f;
    if (fibres.size() < order.size()) fibres.resize(order.size());
    for (unsigned i : order) {
        Fibre &fibre = fibres[i];
        if (!fibre.stack) fibre.stack = std::make_unique<char[]>(STACK_BYTES);
        fibre.index = dim3{i, 1, 1};
        fibre.index.y = fibre.index.z = 0;
        fibre.done = false;
        fibre.fake_stack = nullptr;
        getcontext(&fibre.context);
        fibre.context.uc_stack.ss_sp = fibre.stack.get();
        fibre.context.uc_stack.ss_size = STACK_BYTES;
        fibre.context.uc_link = nullptr;
        makecontext(&fibre.context, fibre_main, 0);
    }
    for (size_t running = order.size(); running;) {
        size_t waiting = 0;
        for (unsigned i : order) {
            if (fibres[i].done) continue;
            enter_fibre(fibres[i]);
            waiting += !fibres[i].done;
        }
        if (waiting && waiting != running) {
            fail("divergent __syncthreads: " + std::to_string(waiting) + " of " + std::to_string(running) + " threads");
        }
        running = waiting;
    }
}

/* ----------------------------------------------------------------------------------------------------- threads */

std::barrier<> *thread_barrier = nullptr;

void run_threads(const std::vector<unsigned> &order, const std::function<void()> &f)
{
    std::barrier<> gate((std::ptrdiff_t)order.size());
    thread_barrier = &gate;
    const dim3 block = block_index;
    std::vector<std::thread> threads;
    for (unsigned i : order) {
        threads.emplace_back([&f, &gate, block, i] {
            block_index = block;
            thread_index.x = i;
            thread_index.y = thread_index.z = 0;
            f();
            gate.arrive_and_drop();
        });
    }
    for (std::thread &thread : threads) thread.join();
}

/* ------------------------------------------------------------------------------------------------------ launch */

std::vector<unsigned> order_of(unsigned count)
{
    std::vector<unsigned> order(count);
    for (unsigned i = 0; i < count; i++) order[i] = i;
    if (shuffled) std::shuffle(order.begin(), order.end(), random_order);
    return order;
}

void run(const std::function<void()> &f)
{
    for (unsigned block : order_of(grid_dim.x)) {
        block_index.x = block;
        block_index.y = block_index.z = 0;
        begin_block();
        const std::vector<unsigned> order = order_of(block_dim.x);
        if (mode == FIBRE) {
            run_fibres(order, f);
        } else if (mode == THREAD) {
            run_threads(order, f);
        } else {
            for (unsigned i : order) {
                thread_index.x = i;
                thread_index.y = thread_index.z = 0;
                f();
            }
        }
        end_block();
    }
}

template <class Params>
std::function<void(void **)> caller(void (*kernel)(Params))
{
    return [kernel](void **args) {
        std::remove_const_t<Params> params;
        std::memcpy(&params, args[0], sizeof params);
        run([&] { kernel(params); });
    };
}

#define HOSTSIM_ENTRY(name, ...) {#name, caller(name)},
const std::map<std::string, std::function<void(void **)>> kernels = {
    RKV_COPY_KERNELS(HOSTSIM_ENTRY)
    RKV_RELAYOUT_KERNELS(HOSTSIM_ENTRY)
    RKV_BULK_KERNELS(HOSTSIM_ENTRY)
};

} // namespace

void sync_threads()
{
    if (mode == FIBRE) {
        leave_fibre(false);
    } else if (mode == THREAD) {
        thread_barrier->arrive_and_wait();
    } else {
        fail("__syncthreads in LOOP mode");
    }
}

void barrier_init(uint64_t *barrier)
{
    *barrier = 0;
    barriers[barrier] = Barrier{};
    published = false;
}

void barrier_publish()
{
    published = true;
}

/* Everything that this phase waits for happens now, and no sooner. */
void barrier_wait(uint64_t *address, uint32_t parity)
{
    Barrier &barrier = barriers[address];
    if ((barrier.completed & 1) != parity) return; /* the phase before: over already */
    if (barrier.loads.empty()) {
        fail("a wait that nothing will end");
        return;
    }
    perform(barrier.loads.front());
    barrier.loads.pop_front();
    barrier.completed++;
}

void bulk_load(void *shared, const void *global, uint32_t bytes, uint64_t *address)
{
    check_bulk(global, shared, bytes);
    if (!published || !barriers.count(address)) fail("a bulk load on a barrier that is not published");
    Barrier &barrier = barriers[address];
    if (!barrier.loads.empty()) fail("two bulk loads in one phase of a barrier");
    barrier.loads.push_back(Copy{shared, global, bytes});
}

void bulk_store(void *global, const void *shared, uint32_t bytes)
{
    check_bulk(global, shared, bytes);
    stores.push_back(Copy{global, (void *)shared, bytes});
}

void bulk_wait_read(unsigned keep)
{
    while (stores.size() > keep) {
        perform(stores.front());
        stores.pop_front();
    }
}

} // namespace hostsim

/* Returns NULL, or what was wrong (valid until the next launch). args: as for cuLaunchKernel. */
extern "C" const char *rkv_sim_launch(const char *name, unsigned grid, unsigned block, void **args, int mode,
                                      unsigned seed)
{
    hostsim::failure.clear();
    const auto found = hostsim::kernels.find(name);
    if (found == hostsim::kernels.end()) {
        hostsim::failure = std::string("no kernel ") + name;
        return hostsim::failure.c_str();
    }
    hostsim::mode = mode;
    hostsim::shuffled = seed != 0;
    hostsim::random_order.seed(seed);
    hostsim::grid_dim = dim3{grid, 1, 1};
    hostsim::block_dim = dim3{block, 1, 1};
    found->second(args);
    return hostsim::failure.empty() ? nullptr : hostsim::failure.c_str();
}
