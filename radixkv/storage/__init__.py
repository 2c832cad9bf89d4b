"""L2: KV pages outside of this process: files, Redis, S3, Mooncake, NIXL, or any class by module path.

``base.py`` is the contract of a backend (a blob store), ``pages.py`` what the controller uses: pages of a host pool
under keys that say all their bytes depend on, in an envelope (``envelope.py``) that makes a wrong page a miss.
"""

from __future__ import annotations

from .base import Storage
from .memory import MemoryStorage
from .namespace import PageNamespace
from .pages import PageStore, host_page_parts
from .registry import create_storage
from .sealed import PageCounters, SealedStore

__all__ = ["MemoryStorage", "PageCounters", "PageNamespace", "PageStore", "Storage", "create_storage"]
__all__ += ["SealedStore", "host_page_parts"]
