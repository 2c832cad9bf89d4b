#include "radixkv/radixkv.h"
static const rkv_api table = { .struct_size = sizeof(rkv_api), .abi_version = RKV_ABI_VERSION };
const rkv_api *rkv_get_api(uint32_t v) { return v == RKV_ABI_VERSION ? &table : 0; }
