/* Locks and relaxed atomics for the Cython modules, which have no syntax for them. Header only: each is one instruction or one
 * libc call. pthread locks, because every race detector understands them. */
#ifndef RKV_SYNC_H
#define RKV_SYNC_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#ifdef __linux__
#include <sys/auxv.h>
#endif

typedef pthread_rwlock_t rkv_rwlock;
typedef pthread_mutex_t rkv_mutex;

/* Waiting writers go before new readers, so that a stream of finds cannot starve an insert. 0 or an errno. */
static inline int rkv_rwlock_init(rkv_rwlock *lock)
{
    pthread_rwlockattr_t attributes;
    int error = pthread_rwlockattr_init(&attributes);
    if (error == 0) {
#ifdef __GLIBC__
        pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
#endif
        error = pthread_rwlock_init(lock, &attributes);
        pthread_rwlockattr_destroy(&attributes);
    }
    return error;
}

static inline void rkv_rwlock_destroy(rkv_rwlock *lock) { pthread_rwlock_destroy(lock); }
static inline void rkv_lock_shared(rkv_rwlock *lock) { pthread_rwlock_rdlock(lock); }
static inline int rkv_try_lock_shared(rkv_rwlock *lock) { return pthread_rwlock_tryrdlock(lock) == 0; }
static inline void rkv_lock_exclusive(rkv_rwlock *lock) { pthread_rwlock_wrlock(lock); }
static inline int rkv_try_lock_exclusive(rkv_rwlock *lock) { return pthread_rwlock_trywrlock(lock) == 0; }
static inline void rkv_unlock(rkv_rwlock *lock) { pthread_rwlock_unlock(lock); }

static inline int rkv_mutex_init(rkv_mutex *mutex) { return pthread_mutex_init(mutex, NULL); }
static inline void rkv_mutex_destroy(rkv_mutex *mutex) { pthread_mutex_destroy(mutex); }
static inline void rkv_mutex_lock(rkv_mutex *mutex) { pthread_mutex_lock(mutex); }
static inline void rkv_mutex_unlock(rkv_mutex *mutex) { pthread_mutex_unlock(mutex); }

static inline uint64_t rkv_load(const uint64_t *word) { return __atomic_load_n(word, __ATOMIC_RELAXED); }
static inline void rkv_store(uint64_t *word, uint64_t value) { __atomic_store_n(word, value, __ATOMIC_RELAXED); }
static inline uint64_t rkv_add(uint64_t *word, uint64_t value) { return __atomic_add_fetch(word, value, __ATOMIC_RELAXED); }

/* A number that no other object of this process has had (from this copy of the library: the address tells copies apart). */
static inline uint64_t rkv_unique_id(const void *address)
{
    static uint64_t counter;
    uint64_t serial = rkv_add(&counter, 1);
    return (serial << 48 | serial >> 16) ^ (uint64_t)(uintptr_t)address * 0x9e3779b97f4a7c15ull;
}

/* A number that nobody outside this process knows: the system's random bytes for it. */
static inline uint64_t rkv_process_secret(void)
{
    uint64_t secret = 0;
#ifdef AT_RANDOM
    const void *bytes = (const void *)(uintptr_t)getauxval(AT_RANDOM);
    if (bytes != NULL) {
        memcpy(&secret, bytes, sizeof secret);
    }
#endif
    return secret;
}

/* x != 0 */
static inline int rkv_log2(uint64_t x) { return 63 - __builtin_clzll(x); }
static inline int rkv_lowest_bit(uint64_t x) { return __builtin_ctzll(x); }
static inline int rkv_count_bits(uint64_t x) { return __builtin_popcountll(x); }

/* Ask for a cache line; any address will do. As volatile assembly, because gcc takes a function that does nothing but __builtin_prefetch for
 * one without effect, and drops the calls to it. */
static inline void rkv_prefetch(const void *p)
{
#if defined(__x86_64__)
    __asm__ volatile("prefetcht0 %0" : : "m"(*(const char *)p));
#elif defined(__aarch64__)
    __asm__ volatile("prfm pldl1keep, %0" : : "Q"(*(const char *)p));
#else
    __builtin_prefetch(p);
#endif
}

#endif
