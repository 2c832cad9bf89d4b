"""radixkv: the KV-cache layer that LLM engines and gateways link instead of writing it themselves."""

from .errors import (
    AllocationError,
    ArgumentTypeError,
    DeviceUnavailableError,
    HandleError,
    HostMemoryError,
    IntegrityError,
    InvalidArgumentError,
    LockError,
    MissingExtraError,
    PageLockError,
    PageOwnershipError,
    RadixKVError,
    StateError,
    TokenRangeError,
    TransferError,
    UnsupportedLayoutError,
)
from .paths import get_include, get_library_path
from .tree.base import BaseRadixTree
from .tree.core import RadixTree, page_hash_capsule
from .tree.prefix_index import PrefixIndex
from .tree.reference import ReferenceTree
from .types import POLICIES, ROOT, BackupRequest, Event, NodeInfo, TreeStats

__version__ = "0.1.0"

__all__ = [
    "POLICIES",
    "ROOT",
    "AllocationError",
    "ArgumentTypeError",
    "BackupRequest",
    "BaseRadixTree",
    "DeviceUnavailableError",
    "Event",
    "HandleError",
    "HostMemoryError",
    "IntegrityError",
    "InvalidArgumentError",
    "LockError",
    "MissingExtraError",
    "NodeInfo",
    "PageLockError",
    "PageOwnershipError",
    "PrefixIndex",
    "RadixKVError",
    "RadixTree",
    "ReferenceTree",
    "StateError",
    "TokenRangeError",
    "TransferError",
    "TreeStats",
    "UnsupportedLayoutError",
    "__version__",
    "get_include",
    "get_library_path",
    "page_hash_capsule",
]
