/* csrc/src/copy_pool.c makes system calls about signals when it starts a helper, and not at each copy. This program's
 * pthread_sigmask is the one that it calls: it counts. */
#include <assert.h>
#include <signal.h>
#include <stdio.h>

#include "copy.h"
#include "copy_pool.h"

static int asked;

int pthread_sigmask(int how, const sigset_t *set, sigset_t *before)
{
    (void)how, (void)set, (void)before;
    asked++;
    return 0;
}

static void work(void *context, uint64_t chunk)
{
    __atomic_fetch_add((uint64_t *)context, chunk + 1, __ATOMIC_RELAXED);
}

int main(void)
{
    uint64_t sum = 0;
    rkv_leaf_pool_run(work, &sum, 10, 3);
    assert(sum == 55 && asked == 2 && rkv_leaf_copy_helpers() == 2);
    for (int i = 0; i < 100; i++) rkv_leaf_pool_run(work, &sum, 10, 2 + i % 2);
    assert(sum == 55 * 101 && asked == 2);
    rkv_leaf_pool_run(work, &sum, 10, 5);
    assert(asked == 4 && rkv_leaf_copy_helpers() == 4);
    rkv_leaf_copy_shutdown();
    puts("ok");
    return 0;
}
