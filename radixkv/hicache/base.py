"""L5: what a scheduler calls of any prefix cache, and what it hands in. Names are those of SGLang (2025-08)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from ..pool.arrays import Array
    from .node import TreeNode

__all__ = ["BasePrefixCache", "MatchResult", "Request"]


class MatchResult(NamedTuple):
    """What match_prefix found; a snapshot that later changes of the tree do not touch.

    device_indices: int64 slots on the pool's device of the tokens that are there.
    last_device_node: the node that these tokens end at; the root for none.
    last_host_node: the node that the whole hit ends at; last_device_node if nothing more is on the host.
    host_hit_length: tokens beyond device_indices that are on the host.
    """

    device_indices: Array
    last_device_node: TreeNode
    last_host_node: TreeNode
    host_hit_length: int = 0


class Request(Protocol):
    """What cache_finished_req and cache_unfinished_req read of an engine's request, and the last two that they set.

    Optional: ``extra_key`` and ``cache_salt``, the namespace of its tokens; ``rid``, by which HiRadixCache counts once
    where its prompt came from.
    """

    origin_input_ids: list[int]
    output_ids: list[int]
    fill_ids: list[int]
    req_pool_idx: int
    prefix_indices: Array
    last_node: TreeNode


class BasePrefixCache(ABC):
    """The part that every cache has, and what stands for the rest where a cache has no such thing."""

    disable: bool

    @abstractmethod
    def reset(self) -> None: ...

    @abstractmethod
    def match_prefix(self, key: Any, **kwargs: Any) -> MatchResult: ...

    @abstractmethod
    def cache_finished_req(self, req: Request, **kwargs: Any) -> None: ...

    @abstractmethod
    def cache_unfinished_req(self, req: Request, **kwargs: Any) -> None: ...

    @abstractmethod
    def evict(self, num_tokens: int) -> int: ...

    @abstractmethod
    def inc_lock_ref(self, node: TreeNode) -> int: ...

    @abstractmethod
    def dec_lock_ref(self, node: TreeNode, swa_uuid_for_lock: str | None = None) -> int: ...

    def evictable_size(self) -> int:
        return 0

    def full_evictable_size(self) -> int:
        return 0

    def swa_evictable_size(self) -> int:
        return 0

    def protected_size(self) -> int:
        return 0

    def full_protected_size(self) -> int:
        return 0

    def swa_protected_size(self) -> int:
        return 0

    def total_size(self) -> int:
        raise NotImplementedError

    def pretty_print(self) -> None:
        raise NotImplementedError

    def init_load_back(self, last_host_node: TreeNode, host_hit_length: int, mem_quota: int | None = None) -> Any:
        raise NotImplementedError

    def ready_to_load_host_cache(self) -> int:
        raise NotImplementedError

    def check_hicache_events(self) -> Any:
        raise NotImplementedError

    def take_events(self) -> list[Any]:
        return []
