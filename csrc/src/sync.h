#ifndef RKV_SYNC_H
#define RKV_SYNC_H
#include <pthread.h>
#include <stdint.h>

/* A reader-writer lock that lets waiting writers pass new readers: a router that peeks without pause must not starve inserts. */
typedef pthread_rwlock_t rkv_rwlock;

static inline int rkv_rwlock_create(rkv_rwlock *lock)
{
    pthread_rwlockattr_t attributes;
    if (pthread_rwlockattr_init(&attributes) != 0) {
        return -1;
    }
#ifdef __GLIBC__
    pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
#endif
    int failed = pthread_rwlock_init(lock, &attributes);
    pthread_rwlockattr_destroy(&attributes);
    return failed ? -1 : 0;
}

static inline void rkv_rwlock_destroy(rkv_rwlock *lock) { pthread_rwlock_destroy(lock); }
static inline void rkv_rwlock_read(rkv_rwlock *lock) { pthread_rwlock_rdlock(lock); }
static inline void rkv_rwlock_write(rkv_rwlock *lock) { pthread_rwlock_wrlock(lock); }
static inline void rkv_rwlock_release(rkv_rwlock *lock) { pthread_rwlock_unlock(lock); }

/* A number that no other tree of this process has had (of this copy of the library: the address tells copies apart). */
static inline uint64_t rkv_unique_id(const void *address)
{
    static uint64_t counter;
    uint64_t serial = __atomic_add_fetch(&counter, 1, __ATOMIC_RELAXED);
    return (serial << 48 | serial >> 16) ^ (uint64_t)(uintptr_t)address * 0x9e3779b97f4a7c15ull;
}

static inline int rkv_ctz64(uint64_t x) { return __builtin_ctzll(x); }
static inline int rkv_log2_32(uint32_t x) { return 31 - __builtin_clz(x); }
static inline int rkv_popcount64(uint64_t x) { return __builtin_popcountll(x); }
static inline void rkv_prefetch(const void *p) { __builtin_prefetch(p); }

#endif
