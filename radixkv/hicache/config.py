"""L5: settings of HiRadixCache that engines have no arguments for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..controller import ControllerConfig, Listener
from ..errors import InvalidArgumentError
from ..pool.host import HostPoolConfig
from ..types import Policy

__all__ = ["MODEL_VARIABLE", "HiCacheConfig"]

MODEL_VARIABLE = "RADIXKV_MODEL"


@dataclass(frozen=True, slots=True, kw_only=True)
class HiCacheConfig:
    """Of a group each rank has its own host_pool, first_head, storage_options, events, page_hashes, copy_threads,
    listener and clock; all else must be the same on all ranks, which the constructor compares.

    Args:
        control: thresholds, policies, limits and deadlines of the controller. write_policy and prefetch_policy are
            HiRadixCache's own arguments, whatever is said here.
        host_pool: where the host tier's memory comes from, and how much is left free for the machine (10 GiB).
        model: name and revision of what computes the KV; part of every key in storage, which two models may share.
            "" with a storage backend: $RADIXKV_MODEL, and if that is not set an error.
        model_extra: whatever else the KV depends on: rotary scaling, adapters.
        first_head: the model's number of this rank's first KV head; None: rank times heads, and only engines of as many
            ranks share pages (give it to share with others, and where heads are replicated over ranks).
        storage_options: keyword arguments of the storage backend.
        eviction_policy: one of radixkv.POLICIES.
        enable_kv_cache_events, max_kv_cache_events: see RadixCache. Events name the tier ("GPU", "CPU").
        page_hashes: keep the SHA-256 of each page in the tree; None: if there is a storage backend from the start.
            Without, a storage that is attached later costs a hash of the whole path for each store.
        group_timeout_s: how long ranks wait for one another.
        copy_threads: of copies between host memory and a pool on the CPU; None: all cores of this process, <= 16.
        listener: is told what happened (metrics).
        clock: seconds; only differences count.
    """

    control: ControllerConfig = field(default_factory=ControllerConfig)
    host_pool: HostPoolConfig = field(default_factory=HostPoolConfig)
    model: str = ""
    model_extra: str = ""
    first_head: int | None = None
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    eviction_policy: Policy = "lru"
    enable_kv_cache_events: bool = False
    max_kv_cache_events: int = 1 << 20
    page_hashes: bool | None = None
    group_timeout_s: float = 30.0
    copy_threads: int | None = None
    listener: Listener | None = None
    clock: Callable[[], float] = time.monotonic

    def alike(self) -> dict[str, object]:
        """What all ranks must have the same, besides ``control``."""
        model = self.model or os.environ.get(MODEL_VARIABLE, "")
        return {"model": model, "model_extra": self.model_extra, "group_timeout_s": float(self.group_timeout_s)}

    def model_name(self) -> str:
        """The model. Raises: InvalidArgumentError if nobody has said it."""
        name = self.model or os.environ.get(MODEL_VARIABLE, "")
        if not name:
            raise InvalidArgumentError(
                f"a storage backend needs the model's name, as KV of two models must not share keys: "
                f"HiCacheConfig(model=...) or ${MODEL_VARIABLE}"
            )
        return name
