/* Included before every source (setup.py). glibc 2.34 moved the pthread functions into libc and gave each a second version; the
 * code is the same. A binary that asks for the first version runs on every glibc since 2.17, which is what wheels promise.
 * Older systems keep these functions in libpthread, which Python has loaded and which radixkv.pc names for others. */
#if defined(__gnu_linux__) && !defined(__SANITIZE_THREAD__) && (defined(__x86_64__) || defined(__aarch64__))
#ifdef __x86_64__
#define RKV_FIRST_VERSION "GLIBC_2.2.5"
#define RKV_SETCLOCK_VERSION "GLIBC_2.3.3"
#else
#define RKV_FIRST_VERSION "GLIBC_2.17"
#define RKV_SETCLOCK_VERSION "GLIBC_2.17"
#endif
#define RKV_FLOOR_AT(name, version) __asm__(".symver " #name "," #name "@" version)
#define RKV_FLOOR(name) RKV_FLOOR_AT(name, RKV_FIRST_VERSION)
RKV_FLOOR(pthread_create);
RKV_FLOOR(pthread_join);
RKV_FLOOR(pthread_once);
RKV_FLOOR(pthread_sigmask);
RKV_FLOOR(pthread_condattr_init);
RKV_FLOOR(pthread_condattr_destroy);
RKV_FLOOR_AT(pthread_condattr_setclock, RKV_SETCLOCK_VERSION);
RKV_FLOOR(pthread_rwlock_init);
RKV_FLOOR(pthread_rwlock_destroy);
RKV_FLOOR(pthread_rwlock_rdlock);
RKV_FLOOR(pthread_rwlock_tryrdlock);
RKV_FLOOR(pthread_rwlock_wrlock);
RKV_FLOOR(pthread_rwlock_trywrlock);
RKV_FLOOR(pthread_rwlock_unlock);
RKV_FLOOR(pthread_rwlockattr_init);
RKV_FLOOR(pthread_rwlockattr_destroy);
RKV_FLOOR(pthread_rwlockattr_setkind_np);
#undef RKV_FLOOR
#undef RKV_FLOOR_AT
#undef RKV_SETCLOCK_VERSION
#undef RKV_FIRST_VERSION
#endif
