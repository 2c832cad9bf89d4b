#ifndef RKV_STATUS_H
#define RKV_STATUS_H
#include "radixkv/radixkv.h"

/* Record what went wrong, in words, for rkv_last_error of this thread; returns status. printf's format rules. */
rkv_status rkv_leaf_fail(rkv_status status, const char *format, ...)
#ifdef __GNUC__
    __attribute__((format(printf, 2, 3), cold))
#endif
    ;

#endif
