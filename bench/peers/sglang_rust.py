"""SGLang's Rust tree core (the ``RustUnifiedTreeCoreBinding`` of its wheel), called without SGLang's Python above it.

The extension is loaded by path, with torch imported first (it links libtorch) and without importing the ``sglang``
package, whose many other dependencies are for serving. What its API means, as read from the wheel's
rust_tree_core/adapter.py and unified_radix_cache.py, which drive it in production:

* keys are any buffer of int64 (``array('q')``, numpy); values are torch int64 tensors with one *slot* a token
* ``match_prefix`` splits at the end of the hit and stamps the path; it returns node ids and lengths, no slots.
  ``collect_full_device_indices(node, root)`` concatenates the slots of a path: that is what ``page_ids()`` is here
* ``insert`` is the one-step form of begin_insert / end_insert; ``prev_prefix_len`` says how much of the value is the
  tree's own already, so nothing is handed back as duplicate
* eviction is a walk: ``evict_device_start(component, n)``, then ``evict_device_next_node`` / ``evict_device_leaf``
  until the budget is met, then ``evict_device_end``. Component 0 is FULL. The running tracker is the caller's.

This is kinder to it than production: SGLang wraps every call in dataclass conversions that are left out here.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from array import array
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import numpy as np

from .base import PageIds, Tokens, TreePeer, single_threaded_torch, slots

FULL = 0
"""The component type of ordinary attention KV."""

_EXTENSION = "sglang/srt/mem_cache/rust_tree_core/mem_cache."


def find_extension() -> str:
    """Path of the tree core's shared object in the installed wheel. Raises: ImportError if there is none."""
    try:
        files = importlib.metadata.distribution("sglang").files or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError("the sglang wheel is not installed (bench/peers/install.py does it)") from error
    for file in files:
        if str(file).startswith(_EXTENSION) and str(file).endswith(".so"):
            return str(file.locate())
    raise ImportError("this sglang wheel holds no Rust tree core")


_module: ModuleType | None = None


def load_extension() -> ModuleType:
    """Load the extension once, torch first. Raises: ImportError, OSError."""
    global _module
    if _module is None:
        single_threaded_torch()  # its libraries must be resident before the extension is opened
        spec = importlib.util.spec_from_file_location("mem_cache", find_extension())
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        _module = module
    return _module


class _Match(NamedTuple):
    num_tokens: int
    slots: Any


class Peer(TreePeer):
    """``array('q')`` keys, torch int64 slots (int64 numpy keys measured the same within noise)."""

    name = "sglang-rust"
    POLICIES = ("lru", "lfu", "fifo", "mru", "filo", "priority", "slru")
    INPUT_TYPES: ClassVar[dict[str, Callable[[Tokens], Any]]] = {
        "array('q')": lambda t: array("q", t.astype(np.int64).tobytes()),
        "numpy int64": lambda t: t.astype(np.int64),
    }

    @classmethod
    def probe(cls) -> None:
        load_extension()

    @classmethod
    def version(cls) -> str:
        return (
            f"sglang {importlib.metadata.version('sglang')} Rust tree core, torch {importlib.metadata.version('torch')}"
        )

    def __init__(self, page_size: int, policy: str = "lru") -> None:
        self._torch = single_threaded_torch()
        module = load_extension()
        init = module.TreeCoreInitParamsBinding(eviction_policy=policy, page_size=page_size, device="cpu")
        self._tree = module.RustUnifiedTreeCoreBinding(init, [FULL])
        self._root = self._tree.root_node_handle(None)
        self._match_params = module.MatchParamsBinding
        self._insert_params = module.InsertParamsBinding
        self._page_size = page_size

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
        return int(self._tree.total_size()[0])

    def match(self, key: Any) -> _Match:
        tree = self._tree
        found = tree.match_prefix(self._match_params(key=key))
        return _Match(found.device_prefix_len, tree.collect_full_device_indices(found.last_device_node_id, self._root))

    def find(self, key: Any) -> Any:
        return self._tree.match_prefix(self._match_params(key=key))

    def insert(self, key: Any, row: Any, match: _Match) -> None:
        # A key that ends inside a page is cut by the tree, the value is not.
        self._tree.insert(self._insert_params(key=key, value=row, prev_prefix_len=match.num_tokens))

    def evict(self, num_tokens: int) -> list[Any]:
        tree = self._tree
        freed: list[Any] = []
        tracker = {FULL: 0}
        tree.evict_device_start(FULL, num_tokens)
        while True:
            step = tree.evict_device_next_node(FULL, tracker)
            self._count(step, tracker, freed)
            if step.node_id is not None:
                self._count(tree.evict_device_leaf(step.node_id), tracker, freed)
            elif not step.made_progress:
                break
        tree.evict_device_end(FULL)
        return freed

    @staticmethod
    def _count(step: Any, tracker: dict[int, int], freed: list[Any]) -> None:
        for component, delta in step.tracker.items():
            tracker[component] += delta
        for tensors in step.new_device_frees.values():
            freed.extend(tensors)
