/* Runs the fuzz target on random bytes, for compilers without libFuzzer: random_driver SEED RUNS MAX_BYTES.
 * The seed of the current run is printed if it dies, so that `random_driver THAT 1 MAX_BYTES` runs it again. */
#include "check.h"

#include <signal.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static uint64_t current;

static void died(int signal_number)
{
    fprintf(stderr, "random_driver: died of signal %d in the run of seed %llu\n", signal_number, (unsigned long long)current);
    signal(signal_number, SIG_DFL);
    raise(signal_number);
}

int main(int argc, char **argv)
{
    uint64_t seed, last;
    size_t max_bytes, size, i;
    uint8_t *data;
    CHECK(argc == 4);
    seed = strtoull(argv[1], NULL, 10);
    last = seed + strtoull(argv[2], NULL, 10);
    max_bytes = strtoull(argv[3], NULL, 10);
    data = room(max_bytes, 1);
    signal(SIGABRT, died);
    signal(SIGSEGV, died);
    for (current = seed; current < last; current++) {
        uint64_t state = (current + 1) * 0x9e3779b97f4a7c15ull;
        size = 16 + next_random(&state) % (max_bytes - 16);
        for (i = 0; i < size; i++) {
            data[i] = (uint8_t)(next_random(&state) >> 32);
        }
        LLVMFuzzerTestOneInput(data, size);
    }
    free(data);
    printf("%llu runs from seed %llu\n", (unsigned long long)(last - seed), (unsigned long long)seed);
    return 0;
}
