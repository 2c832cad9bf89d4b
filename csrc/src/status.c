/* Statuses in words. */
#include "status.h"

#include <stdarg.h>
#include <stdio.h>

static __thread char last_error[256];

rkv_status rkv_leaf_fail(rkv_status status, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return status;
}

const char *rkv_last_error(void)
{
    return last_error;
}

const char *rkv_status_string(rkv_status status)
{
    switch (status) {
    case RKV_OK: return "ok";
    case RKV_ERR_ARGUMENT: return "invalid argument";
    case RKV_ERR_HANDLE: return "stale or foreign handle";
    case RKV_ERR_LOCK: return "lock count violated";
    case RKV_ERR_STATE: return "node in the wrong state";
    case RKV_ERR_OWNERSHIP: return "page id owned twice";
    case RKV_ERR_NO_MEMORY: return "out of memory";
    case RKV_ERR_INTEGRITY: return "integrity violated";
    case RKV_ERR_CAPACITY: return "buffer too small";
    default: return "unknown status";
    }
}

const char *rkv_version(void)
{
    return "0.1.0";
}
