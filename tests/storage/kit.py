"""Pages, digests and namespaces for the storage tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from radixkv.storage import PageNamespace, PageStore, Storage
from radixkv.types import PageIds

PAGE_BYTES = 4096


def namespace(**changes: Any) -> PageNamespace:
    """One of pages of PAGE_BYTES bytes."""
    fields: dict[str, Any] = {
        "model": "tiny@1", "dtype": "float16", "kind": "mha", "page_dims": "K P L H D", "page_size": 16,
        "head_bytes": 32, "num_layers": 2, "num_heads": 2,
    }  # fmt: skip
    made = PageNamespace(**(fields | changes))
    return made


class HostPages:
    """``num_pages`` host pages in ``pieces`` pieces each, K of all pages first, as in a page_first pool."""

    def __init__(self, num_pages: int, page_bytes: int = PAGE_BYTES, pieces: int = 2) -> None:
        self.data = np.zeros((pieces, num_pages, page_bytes // pieces), np.uint8)

    def parts(self, page: int) -> list[memoryview]:
        return [memoryview(half[page]) for half in self.data]

    def fill(self, pages: PageIds, seed: int) -> npt.NDArray[np.uint8]:
        """Random bytes; returns them, [pages, page_bytes]."""
        shape = (len(self.data), len(pages), self.data.shape[2])
        self.data[:, pages] = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
        return self.read(pages)

    def read(self, pages: PageIds) -> npt.NDArray[np.uint8]:
        return np.moveaxis(self.data[:, pages], 0, 1).reshape(len(pages), -1)


def digests(count: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 32), np.uint8)


def ids(*pages: int) -> PageIds:
    return np.array(pages, np.int32)


def page_store(storage: Storage, host: HostPages, **options: Any) -> PageStore:
    return PageStore(storage, options.pop("namespace", namespace()), host.parts, **options)
