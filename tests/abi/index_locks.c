/* The locks that an index makes and takes. One thread, so they need not lock: the functions below stand before libc's.
 *
 * 1. rkv_index_create when the system refuses a lock, each in turn: it says so, *out is NULL, and all that was made is unmade.
 * 2. An insert that changes nothing excludes nobody. */
#define _XOPEN_SOURCE 700 /* pthread_rwlock_t */
#include "check.h"

#include <errno.h>
#include <pthread.h>

static int calls_until_failure, made, unmade, blocks, exclusive, shared;

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

int pthread_rwlock_wrlock(pthread_rwlock_t *lock)
{
    (void)lock;
    exclusive++;
    return 0;
}

int pthread_rwlock_rdlock(pthread_rwlock_t *lock)
{
    (void)lock;
    shared++;
    return 0;
}

int pthread_rwlock_unlock(pthread_rwlock_t *lock)
{
    (void)lock;
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

static int refuse_each_lock(void)
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
    return locks;
}

/* Insert, and say how many exclusive locks that took. */
static int excluded_by(rkv_index *idx, uint32_t id, const uint64_t *keys, size_t count, const uint64_t *parent, uint64_t wanted)
{
    uint64_t added = 99;
    exclusive = shared = 0;
    CHECK(rkv_index_insert(idx, id, keys, count, parent, &added) == RKV_OK && added == wanted);
    return exclusive;
}

static void insert_again(uint64_t max_pages)
{
    const uint64_t prompt[6] = {1, 2, 3, 4, 5, 6}, other[4] = {1, 2, 30, 40}, strange = 100, orphans[2] = {101, 102};
    uint64_t removed;
    rkv_index_config config;
    rkv_index *idx;
    RKV_INIT(&config);
    config.max_pages = max_pages;
    CHECK(rkv_index_create(&config, &idx) == RKV_OK);
    CHECK(excluded_by(idx, 1, prompt, 6, NULL, 6) > 0 && excluded_by(idx, 1, other, 4, NULL, 2) > 0);
    CHECK(excluded_by(idx, 2, prompt, 3, NULL, 3) > 0);
    CHECK(excluded_by(idx, 1, prompt, 6, NULL, 0) == 0 && shared == 1);
    CHECK(excluded_by(idx, 1, other, 4, NULL, 0) == 0);
    CHECK(excluded_by(idx, 1, prompt, 4, NULL, 0) == 0); /* ends inside a run */
    CHECK(excluded_by(idx, 1, prompt + 2, 3, prompt + 1, 0) == 0); /* starts behind a branch */
    CHECK(excluded_by(idx, 1, prompt + 4, 2, prompt + 3, 0) == 0); /* and inside a run */
    CHECK(excluded_by(idx, 2, prompt, 3, NULL, 0) == 0);
    CHECK(excluded_by(idx, 2, prompt, 4, NULL, 1) > 0); /* one page that it did not hold */
    CHECK(rkv_index_remove(idx, 1, prompt + 1, 1, &removed) == RKV_OK && removed == 1);
    CHECK(excluded_by(idx, 1, prompt, 6, NULL, 1) > 0); /* a gap */
    CHECK(excluded_by(idx, 1, orphans, 2, &strange, 2) > 0 && excluded_by(idx, 1, orphans + 1, 1, orphans, 0) == 0);
    CHECK(rkv_index_check_integrity(idx, NULL, 0) == RKV_OK);
    rkv_index_destroy(idx);
}

int main(void)
{
    int locks = refuse_each_lock();
    insert_again(0);
    insert_again(1000);
    printf("%d locks refused, none left behind\n", locks);
    return 0;
}
