"""The public names of the original's classes (sglang 0.5.0rc0), as data: what ours have too, and what they
deliberately have not, and why. ``test_surface.py`` checks the first against ours, and both against the original's
source.

A name that starts with an underscore is nobody else's business, and not here. A class's own names only, not those of
its base.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

__all__ = ["CLASSES", "Names"]


class Names(NamedTuple):
    """One class of the original: its file below sglang/srt, the names that ours has, and why it has not the others."""

    file: str
    kept: str
    left_out: Mapping[str, str] = MappingProxyType({})


THREADS = "a thread, queue, stream or buffer between them; the controller's parts and their ends are in stats()"
HALF = "half of an operation, on bare slots: the other half is the tree's, and Controller does both"
COUNTING = "counts what only the copying side may count"
TREE = "how a dict of Python nodes is kept; the tree is not one"
POINTERS = "for its own copy kernels; ours read a KVView"
DEVICE_POOL = "of the device pool, which is host.device_pool"
BOOKS = "its bookkeeping; get_state() and available_size() say what is in it"
STREAMS = "for its own streams and memory savers; an engine that needs them brings its own pool"

_HICACHE, _RADIX, _BASE = (f"mem_cache/{name}.py" for name in ("hiradix_cache", "radix_cache", "base_prefix_cache"))
_CONTROLLER, _HOST = "managers/cache_controller.py", "mem_cache/memory_pool_host.py"
_STORAGE, _ALLOCATOR, _POOL = (f"mem_cache/{name}.py" for name in ("hicache_storage", "allocator", "memory_pool"))


def _all(names: str, why: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), why)


CLASSES: dict[str, Names] = {
    "BasePrefixCache": Names(
        _BASE,
        "cache_finished_req cache_unfinished_req check_hicache_events dec_lock_ref evict evictable_size "
        "full_evictable_size full_protected_size inc_lock_ref init_load_back match_prefix pretty_print protected_size "
        "ready_to_load_host_cache reset swa_evictable_size swa_protected_size take_events total_size",
    ),
    "MatchResult": Names(_BASE, "device_indices host_hit_length last_device_node last_host_node"),
    "RadixCache": Names(
        _RADIX,
        "all_values_flatten cache_finished_req cache_unfinished_req dec_lock_ref device disable enable_kv_cache_events "
        "evict evictable_size inc_lock_ref insert match_prefix page_size pretty_print protected_size req_to_token_pool "
        "reset root_node take_events token_to_kv_pool_allocator total_size",
        _all("get_child_key_fn key_match_fn", TREE)
        | _all("evictable_size_ protected_size_", "the counters behind evictable_size() and protected_size()")
        | _all("kv_event_queue", "take_events() empties it; the tree bounds it and counts what it drops"),
    ),
    "TreeNode": Names(
        _RADIX,
        "backuped backuped_storage children evicted get_last_hash_value hash_value hit_count host_ref_counter "
        "host_value id key last_access_time loading lock_ref parent protect_host release_host value",
        _all("counter", "where the next id comes from: ours is the tree's handle"),
    ),
    "HiRadixCache": Names(
        _HICACHE,
        "cache_controller can_terminate_prefetch check_backup_progress check_hicache_events check_prefetch_progress "
        "check_revoked_prefetch enable_storage evict evict_host evictable_size get_height inc_hit_count init_load_back "
        "kv_cache load_back load_back_threshold load_cache_event loading_check match_prefix ongoing_backup "
        "ongoing_load_back ongoing_prefetch ongoing_write_through prefetch_from_storage prefetch_stop_policy "
        "prefetch_threshold prefetch_timeout ready_to_load_host_cache reset token_to_kv_pool_host tp_group "
        "tp_world_size write_backup write_backup_storage write_through_threshold write_through_threshold_storage "
        "writing_check",
        _all("evictable_size_", "the counter behind evictable_size()"),
    ),
    "HiCacheController": Names(
        _CONTROLLER,
        "enable_storage get_hash_str io_backend layer_done_counter load_cache_event mem_pool_device "
        "mem_pool_device_allocator mem_pool_host page_size prefetch_capacity_limit prefetch_rate_limit_check "
        "prefetch_threshold prefetch_tokens_occupied storage_backend storage_backend_type tp_world_size write_policy",
        _all("write load evict_device evict_host prefetch terminate_prefetch write_storage move_indices", HALF)
        | _all("generic_page_transfer mooncake_page_transfer generic_page_backup mooncake_page_backup", HALF)
        | _all("reset", "the cache's reset does both: a controller reset alone would leave pages to nobody")
        | _all("is_mooncake_backend", "storage_backend_type says so; no backend is a special case here")
        | _all(
            "write_thread_func_direct load_thread_func_layer_by_layer prefetch_io_aux_func prefetch_thread_func "
            "backup_thread_func ack_backup_queue ack_load_queue ack_write_queue backup_queue backup_thread load_buffer "
            "load_queue load_stream load_thread prefetch_buffer prefetch_queue prefetch_revoke_queue prefetch_thread "
            "stop_event write_buffer write_queue write_stream write_thread",
            THREADS,
        )
        | _all("prefetch_tp_group backup_tp_group", "one group will do: no collective runs on a worker's thread"),
    ),
    "LayerDoneCounter": Names(
        _CONTROLLER,
        "consumer_index next_producer num_layers producer_index set_consumer wait_until",
        _all("update_producer increment reset", COUNTING)
        | _all("conditions counters num_counters", "three counters used in turn; here no index is used again"),
    ),
    "StorageOperation": Names(
        _CONTROLLER,
        "completed_tokens hash_value host_indices id token_ids",
        _all("counter", "where the next id comes from")
        | _all("last_hash", "hashes are those of the path from the root, whatever the caller says"),
    ),
    "PrefetchOperation": Names(
        _CONTROLLER, "completed_tokens is_done mark_done request_id start_time", _all("increment", COUNTING)
    ),
    "HostKVCache": Names(
        _HOST,
        "alloc available_size clear complete_io device device_pool dtype end_layer free get_dummy_flat_data_page "
        "get_flat_data_page get_size_per_token get_state is_backup is_protected is_reserved is_synced kv_buffer layout "
        "lock page_size pin_memory protect_load protect_write set_from_flat_data_page size size_per_token start_layer "
        "update_backup update_prefetch update_synced",
        _all("load_to_device_per_layer backup_from_device_all_layer", "a mover's copies (radixkv.transfer), in batches")
        | _all("init_kv_buffer", "the constructor does it")
        | _all("debug free_slots mem_state", BOOKS),
    ),
    "MHATokenToKVPoolHost": Names(
        _HOST,
        "device_pool get_buffer_meta get_dummy_flat_data_page get_flat_data_page get_size_per_token head_dim head_num "
        "k_buffer layer_num set_from_flat_data_page v_buffer",
        _all("load_to_device_per_layer backup_from_device_all_layer init_kv_buffer", "see HostKVCache")
        | _all("k_data_ptrs k_data_refs v_data_ptrs v_data_refs layout_dim token_stride_size", POINTERS),
    ),
    "MLATokenToKVPoolHost": Names(
        _HOST,
        "device_pool get_buffer_meta get_dummy_flat_data_page get_flat_data_page get_size_per_token layer_num "
        "set_from_flat_data_page",
        _all("load_to_device_per_layer backup_from_device_all_layer init_kv_buffer", "see HostKVCache")
        | _all("data_ptrs data_refs layout_dim token_stride_size", POINTERS)
        | _all("kv_lora_rank qk_rope_head_dim", DEVICE_POOL),
    ),
    "MemoryStateInt": Names(_HOST, "BACKUP IDLE PROTECTED RESERVED SYNCED"),
    "HiCacheStorage": Names(_STORAGE, "batch_get batch_set exists get set"),
    "BaseTokenToKVPoolAllocator": Names(
        _ALLOCATOR,
        "alloc alloc_decode alloc_extend available_size backup_state clear debug_print device dtype free "
        "free_group_begin free_group_end free_pages get_cpu_copy get_kvcache is_not_in_free_group load_cpu_copy "
        "merge_and_sort_free page_size release_pages restore_state size",
        _all("free_group", "a list that is swapped; is_not_in_free_group says whether one is open"),
    ),
    "TokenToKVPoolAllocator": Names(
        _ALLOCATOR,
        "alloc available_size clear free free_pages get_cpu_copy is_not_in_free_group load_cpu_copy release_pages",
        _all("free_group", "as above"),
    ),
    "PagedTokenToKVPoolAllocator": Names(
        _ALLOCATOR,
        "alloc alloc_decode alloc_extend clear free free_pages get_cpu_copy is_not_in_free_group load_cpu_copy "
        "num_pages release_pages",
        _all("free_group", "as above") | _all("debug_mode ret_values", "for its kernels; ours always checks"),
    ),
    "ReqToTokenPool": Names(
        _POOL, "alloc available_size clear device free free_slots max_context_len req_to_token size write"
    ),
    "KVCache": Names(
        _POOL,
        "device dtype end_layer get_cpu_copy get_key_buffer get_kv_buffer get_value_buffer layer_num "
        "layer_transfer_counter load_cpu_copy mem_usage page_size register_layer_transfer_counter set_kv_buffer size "
        "start_layer store_dtype",
        _all("memory_saver_adapter", STREAMS)
        | _all("cpu_offloading_chunk_size", "get_cpu_copy needs no chunks: nothing is staged"),
    ),
    "MHATokenToKVPool": Names(
        _POOL,
        "get_contiguous_buf_infos get_cpu_copy get_key_buffer get_kv_buffer get_kv_size_bytes get_value_buffer "
        "head_dim head_num k_buffer k_data_ptrs layer_transfer_counter load_cpu_copy maybe_get_custom_mem_pool "
        "mem_usage move_kv_cache set_kv_buffer v_buffer v_data_ptrs",
        _all("alt_stream device_module custom_mem_pool enable_custom_mem_pool", STREAMS)
        | _all("data_ptrs data_strides", POINTERS),
    ),
    "MLATokenToKVPool": Names(
        _POOL,
        "data_ptrs get_contiguous_buf_infos get_cpu_copy get_key_buffer get_kv_buffer get_kv_size_bytes "
        "get_value_buffer kv_buffer kv_lora_rank layer_transfer_counter load_cpu_copy maybe_get_custom_mem_pool "
        "mem_usage qk_rope_head_dim set_kv_buffer set_mla_kv_buffer",
        _all("custom_mem_pool enable_custom_mem_pool", STREAMS),
    ),
}
