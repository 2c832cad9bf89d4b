"""Loads the original's modules, unmodified, into a private set that ``sys.modules`` never sees."""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from .install import installed
from .shims import Clock, Valve, shims

REAL = {
    f"sglang.srt.{name}"
    for name in ("constants", "managers.cache_controller", "torch_memory_saver_adapter")
} | {
    f"sglang.srt.mem_cache.{name}"
    for name in ("allocator", "base_prefix_cache", "hicache_storage", "hiradix_cache", "memory_pool",
                 "memory_pool_host", "radix_cache")
}  # fmt: skip
"""The only modules that are ever read from the wheel."""

HIRADIX, RADIX = "sglang.srt.mem_cache.hiradix_cache", "sglang.srt.mem_cache.radix_cache"
CONTROLLER, STORAGE = "sglang.srt.managers.cache_controller", "sglang.srt.mem_cache.hicache_storage"
ALLOCATOR, POOL = "sglang.srt.mem_cache.allocator", "sglang.srt.mem_cache.memory_pool"


class World:
    """One private copy of the original: its own classes, clock and valve.

    Args:
        jitter: seed of random delays in its copies and storage calls; None: none.
        poll_s: how long its threads sleep at most when they look for work; None: a second, as in the original.
        copies: False: transfers between the tiers return at once and move nothing.
    """

    def __init__(self, jitter: int | None = None, poll_s: float | None = 0.01, copies: bool = True) -> None:
        self.clock, self.valve = Clock(), Valve(jitter)
        self._folder = installed()
        self._loaded: dict[str, ModuleType] = shims(self.valve, self.clock, poll_s, copies)
        self._private = {name.partition(".")[0] for name in self._loaded} | {"sglang", "torch_memory_saver"}
        self._builtins = {**vars(builtins), "__import__": self._import}

    def module(self, name: str) -> ModuleType:
        """A module of the original or a shim. Raises: ModuleNotFoundError for what is neither."""
        if name not in self._loaded:
            if name not in REAL:
                raise ModuleNotFoundError(f"the test peer has no {name}: neither in REAL nor a shim")
            path = self._folder / (name.replace(".", "/") + ".py")
            made = ModuleType(name)
            made.__file__ = str(path)
            made.__dict__["__builtins__"] = self._builtins
            self._loaded[name] = made
            try:
                exec(compile(path.read_text(), str(path), "exec"), made.__dict__)
            except BaseException:
                del self._loaded[name]
                raise
            if name == STORAGE:
                self._put_valve(made)
        return self._loaded[name]

    def _import(
        self,
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        """What an import statement of the original gets."""
        if level or name.partition(".")[0] not in self._private:
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        return self.module(name if fromlist else name.partition(".")[0])

    def _put_valve(self, storage: ModuleType) -> None:
        """Let every call of the file storage pass the valve."""
        file, valve = storage.HiCacheFile, self.valve
        for kind in ("set", "get", "exists"):
            method = getattr(file, kind)

            def passed(self: Any, *args: Any, _kind: str = kind, _method: Any = method, **options: Any) -> Any:
                valve(_kind)
                return _method(self, *args, **options)

            setattr(file, kind, passed)
