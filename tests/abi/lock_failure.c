/* rkv_index_create when the system refuses a lock, each in turn: it says so, *out is NULL, and all that was made is unmade.
 *
 * The pthread functions below stand before libc's. A zeroed lock is a valid one in glibc and musl. */
#define _XOPEN_SOURCE 700 /* pthread_rwlock_t */
#include "check.h"

#include <errno.h>
#include <pthread.h>

static int calls_until_failure, made, unmade, blocks;

static int make(void *lock, size_t bytes)
{
    if (calls_until_failure > 0 && --calls_until_failure == 0) {
        return EAGAIN;
    }
    memset(lock, 0, bytes);
    made++;
    return 0;
}

int pthread_mutex_init(pthread_mutex_t *lock, const pthread_mutexattr_t *attributes)
{
    (void)attributes;
    return make(lock, sizeof *lock);
}

int pthread_rwlock_init(pthread_rwlock_t *lock, const pthread_rwlockattr_t *attributes)
{
    (void)attributes;
    return make(lock, sizeof *lock);
}

int pthread_mutex_destroy(pthread_mutex_t *lock)
{
    memset(lock, 0xA5, sizeof *lock);
    unmade++;
    return 0;
}

int pthread_rwlock_destroy(pthread_rwlock_t *lock)
{
    memset(lock, 0xA5, sizeof *lock);
    unmade++;
    return 0;
}

static void *counted_realloc(void *ctx, void *ptr, size_t old_bytes, size_t new_bytes)
{
    (void)ctx;
    (void)old_bytes;
    blocks += (ptr == NULL) - (new_bytes == 0);
    if (new_bytes == 0) {
        free(ptr);
        return NULL;
    }
    return realloc(ptr, new_bytes);
}

int main(void)
{
    rkv_index_config config;
    rkv_index *idx;
    int locks, failed;
    RKV_INIT(&config);
    config.allocator.reallocate = counted_realloc;
    CHECK(rkv_index_create(&config, &idx) == RKV_OK);
    locks = made;
    rkv_index_destroy(idx);
    CHECK(locks > 90 && unmade == locks && blocks == 0);
    for (failed = 1; failed <= locks; failed++) {
        made = unmade = 0;
        calls_until_failure = failed;
        idx = (rkv_index *)&config;
        CHECK(rkv_index_create(&config, &idx) == RKV_ERR_NO_MEMORY);
        CHECK(idx == NULL && made == failed - 1 && unmade == made && blocks == 0);
    }
    printf("%d locks refused, none left behind\n", locks);
    return 0;
}
