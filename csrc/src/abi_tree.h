#ifndef RKV_ABI_TREE_H
#define RKV_ABI_TREE_H
#include "radixkv/radixkv.h"

#include <stddef.h>

/* How long each struct was in ABI version 1: up to its last field of then. A host built against that header passes no less; one built
 * against a later one passes more. When a struct grows, these stay, and the new fields are read and written only if struct_size covers them.
 * Structs that are elements of an array or a part of another (rkv_allocator, rkv_backup, rkv_event) never change within a version. */
#define RKV_SIZE_THROUGH(type, field) (offsetof(type, field) + sizeof(((type *)0)->field))

enum {
    RKV_TREE_CONFIG_SIZE_V1 = RKV_SIZE_THROUGH(rkv_tree_config, allocator),
    RKV_KEY_SIZE_V1 = RKV_SIZE_THROUGH(rkv_key, num_tokens),
    RKV_MATCH_SIZE_V1 = RKV_SIZE_THROUGH(rkv_match, host_node),
    RKV_INSERT_SIZE_V1 = RKV_SIZE_THROUGH(rkv_insert, num_duplicates),
    RKV_FREED_SIZE_V1 = RKV_SIZE_THROUGH(rkv_freed, allocator_),
    RKV_NODE_INFO_SIZE_V1 = RKV_SIZE_THROUGH(rkv_node_info, ns_bytes),
    RKV_TREE_STATS_SIZE_V1 = RKV_SIZE_THROUGH(rkv_tree_stats, dropped_events),
    RKV_TIER_CHECK_SIZE_V1 = RKV_SIZE_THROUGH(rkv_tier_check, num_free_pages)
};

/* What has been added since, and how long a caller's struct must be to get it. */
enum {
    RKV_MATCH_LOADING_SIZE = RKV_SIZE_THROUGH(rkv_match, loading_tokens),
    RKV_NODE_INFO_MARKS_SIZE = RKV_SIZE_THROUGH(rkv_node_info, reserved),
    RKV_TREE_STATS_TIERS_SIZE = RKV_SIZE_THROUGH(rkv_tree_stats, loading_tokens)
};

#endif
