"""The original: SGLang's hierarchical cache of 2025-08, ``sglang==0.5.0rc0``, run unmodified on a CPU as a test peer.

``install.py`` puts the wheel, without its dependencies, into a folder of its own; ``world.py`` loads from there, each
time into a private set of modules that ``sys.modules`` never sees, so that nothing of it can reach the product and two
originals in one process share no class variable. Loaded as they are in the wheel: mem_cache/{hiradix_cache,
radix_cache, base_prefix_cache, allocator, memory_pool, memory_pool_host, hicache_storage}, managers/cache_controller,
torch_memory_saver_adapter, constants. Their threads (write, load, prefetch, backup) run.

Shims, the complete list (``shims.py``; what any other module of the wheel would import is never imported):

====================================== =================================== ============================================
name                                   why                                 what it does
====================================== =================================== ============================================
torch.cuda                             no GPU                              Stream, current_stream, set_stream,
                                                                           synchronize: nothing to wait for, as every
                                                                           copy is done when it returns
torch.empty, torch.zeros               pinned memory needs a driver        the real ones, ``pin_memory`` dropped; all
                                                                           else of torch is the real torch
triton, triton.language                not installed, needs a GPU          ``jit`` keeps the name of a kernel;
                                                                           alloc_extend and alloc_decode are plain loops
                                                                           with the same contract, any other raises
sgl_kernel.kvcacheio                   a compiled CUDA package             the nine transfer functions of 0.3.2 as row
                                                                           copies by address; the two page_first loads
                                                                           have no layer argument there, and read
                                                                           layer 0 here as there
psutil                                 not needed otherwise                64 GiB of memory available
sglang.srt.utils                       imports the whole server            is_cuda, is_npu: False; get_bool_env_var,
                                                                           next_power_of_2: their contract
sglang.srt.distributed                 imports vLLM-style parallel state   rank 0 of 1
sglang.srt.disaggregation.kv_events    needs msgspec, pyzmq, pydantic      three event classes with their fields
sglang.srt.layers.radix_attention      imports the model layers            an empty class, used in annotations
queue, threading                       its threads look for work once a    the real ones; a timed wait is at most
                                       second, and a reset waits for them  ``poll_s`` (None: as in the original)
time                                   reproducible orders of eviction     monotonic() is a clock of the test: it never
                                       and timeouts                        gives one time twice
====================================== =================================== ============================================

The copies and the file storage pass a ``Valve`` first: a test can hold them, delay them at random by seed, or let them
fail, and so choose the order of threads.
"""
