"""SGLang's Python RadixCache: the wheel's own mem_cache/radix_cache.py, unmodified, with the least that lets it
import on a CPU.

Loaded as they are, by path: radix_cache.py, base_prefix_cache.py, cache_init_params.py, evict_policy.py,
component_type.py; of utils.py the two definitions that radix_cache.py uses (``get_eviction_strategy`` with its table
and ``split_node_hash_value``), because the module's other imports need Triton kernels.

Stubs (the complete list; each exists in ``sys.modules`` only while these files are imported):

* sglang, sglang.srt, .srt.utils, .srt.observability, .srt.mem_cache, .srt.mem_cache.unified_cache: empty packages, so
  that no package's __init__ runs
* mem_cache.allocator.BaseTokenToKVPoolAllocator, mem_cache.memory_pool.ReqToTokenPool: empty classes (annotations only)
* mem_cache.events.KVCacheEventRecorder: its three record methods do nothing (events are off by default)
* mem_cache.events.KvEventLoraNames, LoRANameTable: empty classes
* observability.metrics_collector (four names), runtime_context (get_observability, get_parallel): unused, metrics
  are off
* utils.common.ceil_align: real arithmetic, unused by match, insert and evict

The allocator handed to it collects the freed segments.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import numpy as np

from .base import PageIds, Tokens, TreePeer, single_threaded_torch, slots

_PREFIX = "sglang.srt.mem_cache"


def _folder() -> Path:
    try:
        distribution = importlib.metadata.distribution("sglang")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError("the sglang wheel is not installed (bench/peers/install.py does it)") from error
    folder = Path(str(distribution.locate_file("sglang/srt/mem_cache")))
    if not (folder / "radix_cache.py").exists():
        raise ImportError("this sglang wheel holds no mem_cache/radix_cache.py")
    return folder


class _NoEvents:
    """Events are off in SGLang by default; then each of these is a call that returns at once, as here."""

    def __init__(self, **options: Any) -> None:
        self.enabled = False

    def record_store(self, node: Any) -> None: ...

    def record_remove(self, node: Any) -> None: ...

    def record_all_cleared(self) -> None: ...


def _stub(name: str, package: bool = False, **names: Any) -> None:
    module = ModuleType(name)
    if package:
        module.__path__ = []
    module.__dict__.update(names)
    sys.modules[name] = module


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _load_utils(path: Path, strategies: ModuleType) -> None:
    """Execute only the wanted definitions of utils.py."""
    wanted = {"get_eviction_strategy", "split_node_hash_value", "_EVICTION_POLICY_FACTORIES"}
    tree = ast.parse(path.read_text())
    picked: list[ast.stmt] = []
    for node in tree.body:
        names = [getattr(node, "name", None)]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
        if wanted.intersection(name for name in names if name):
            picked.append(node)
    if len(picked) != len(wanted):
        raise ImportError(f"mem_cache/utils.py: found {len(picked)} of {sorted(wanted)}")
    namespace: dict[str, Any] = dict(vars(strategies))
    exec("from typing import Any, Callable, List, Optional, Tuple", namespace)
    exec(compile(ast.Module(picked, []), str(path), "exec"), namespace)
    _stub(f"{_PREFIX}.utils", **{name: namespace[name] for name in wanted})


_modules: tuple[ModuleType, ModuleType, ModuleType] | None = None


def load_radix_cache() -> tuple[ModuleType, ModuleType, ModuleType]:
    """(radix_cache, base_prefix_cache, cache_init_params), loaded once; sys.modules is left as it was. Raises:
    ImportError."""
    global _modules
    if _modules is not None:
        return _modules
    folder = _folder()
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "sglang"}
    try:
        for package in ("sglang", "sglang.srt", _PREFIX, f"{_PREFIX}.unified_cache", "sglang.srt.observability"):
            _stub(package, package=True)
        empty = type("Empty", (), {})
        _stub("sglang.srt.utils", package=True)
        _stub("sglang.srt.utils.common", ceil_align=lambda value, align: -(-value // align) * align)
        _stub("sglang.srt.runtime_context", get_observability=None, get_parallel=None)
        collector = (
            "STAT_LOGGER_ROLE_RADIX_CACHE",
            "RadixCacheMetricsCollector",
            "radix_cache_metric_labels",
            "resolve_collector_class",
        )
        _stub("sglang.srt.observability.metrics_collector", **dict.fromkeys(collector))
        _stub(f"{_PREFIX}.allocator", BaseTokenToKVPoolAllocator=empty)
        _stub(f"{_PREFIX}.memory_pool", ReqToTokenPool=empty)
        _stub(f"{_PREFIX}.events", KVCacheEventRecorder=_NoEvents, KvEventLoraNames=empty, LoRANameTable=empty)
        _load(f"{_PREFIX}.unified_cache.component_type", folder / "unified_cache" / "component_type.py")
        strategies = _load(f"{_PREFIX}.evict_policy", folder / "evict_policy.py")
        _load_utils(folder / "utils.py", strategies)
        params = _load(f"{_PREFIX}.cache_init_params", folder / "cache_init_params.py")
        base = _load(f"{_PREFIX}.base_prefix_cache", folder / "base_prefix_cache.py")
        cache = _load(f"{_PREFIX}.radix_cache", folder / "radix_cache.py")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "sglang"]:
            del sys.modules[name]
        sys.modules.update(before)
    _modules = (cache, base, params)
    return _modules


class _Allocator:
    """Collects what eviction frees."""

    device = "cpu"

    def __init__(self) -> None:
        self.freed: list[Any] = []

    def free_segment(self, slots: Any, start_pos: int) -> None:
        self.freed.append(slots)


class _Match(NamedTuple):
    num_tokens: int
    slots: Any


class Peer(TreePeer):
    """``RadixKey`` over ``array('q')``, torch int64 slots."""

    name = "sglang-python"
    POLICIES = ("lru", "lfu", "fifo", "mru", "filo", "priority", "slru")
    INPUT_TYPES: ClassVar[dict[str, Callable[[Tokens], Any]]] = {
        "array('q')": lambda t: array("q", t.astype(np.int64).tobytes()),
        "list": lambda t: t.tolist(),
    }

    @classmethod
    def probe(cls) -> None:
        load_radix_cache()

    @classmethod
    def version(cls) -> str:
        return f"sglang {importlib.metadata.version('sglang')} RadixCache, Python {sys.version.split()[0]}"

    def __init__(self, page_size: int, policy: str = "lru") -> None:
        self._torch = single_threaded_torch()
        cache, base, params = load_radix_cache()
        self._allocator = _Allocator()
        self._cache = cache.RadixCache(
            params.CacheInitParams(
                disable=False,
                req_to_token_pool=None,
                token_to_kv_pool_allocator=self._allocator,
                page_size=page_size,
                eviction_policy=policy,
            )
        )
        self._key, self._page_size = cache.RadixKey, page_size
        self._match_params, self._insert_params, self._evict_params = (
            base.MatchPrefixParams,
            base.InsertParams,
            base.EvictParams,
        )

    @classmethod
    def row(cls, page_ids: PageIds, tokens: Tokens, num_cached_tokens: int, page_size: int) -> Any:
        import torch

        return torch.from_numpy(slots(page_ids, page_size))

    def write_ids(self, row: Any, first_page: int, page_ids: PageIds) -> None:
        first = first_page * self._page_size
        row.numpy()[first : first + len(page_ids) * self._page_size] = slots(page_ids, self._page_size)

    def write_prefix(self, row: Any, match: _Match) -> None:
        row[: match.num_tokens] = match.slots

    def num_tokens(self, match: _Match) -> int:
        return match.num_tokens

    def evicted_page_ids(self, evicted: list[Any]) -> PageIds:
        if not evicted:
            return np.empty(0, np.int32)
        slots = self._torch.cat(evicted).numpy()
        return (slots[:: self._page_size] // self._page_size).astype(np.int32)

    def cached_tokens(self) -> int:
        return int(self._cache.total_size())

    def match(self, key: Any) -> _Match:
        found = self._cache.match_prefix(self._match_params(key=self._key(key)))
        return _Match(found.device_prefix_len, self._cache.path_device_indices(found.last_device_node))

    def find(self, key: Any) -> Any:
        return self._cache.match_prefix(self._match_params(key=self._key(key)))

    def insert(self, key: Any, row: Any, match: _Match) -> None:
        self._cache.insert(self._insert_params(key=self._key(key), value=row))

    def evict(self, num_tokens: int) -> list[Any]:
        self._allocator.freed = []
        self._cache.evict(self._evict_params(num_tokens=num_tokens))
        return self._allocator.freed
