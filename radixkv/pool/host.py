"""L1: pages of bytes in plain host memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import InvalidArgumentError
from ..types import PageIds

__all__ = ["HostPagePool", "copy_pages"]

PageBytes = npt.NDArray[np.uint8]


class HostPagePool:
    """``num_pages`` pages of ``page_bytes`` bytes in one array, ``data``: uint8 [num_pages, page_bytes], C order.

    Memory is taken from the system as pages are first written. Raises: MemoryError if it cannot even be reserved.
    """

    def __init__(self, num_pages: int, page_bytes: int) -> None:
        if num_pages < 0 or page_bytes < 1:
            raise InvalidArgumentError(f"a pool of {num_pages} pages of {page_bytes} bytes")
        self.num_pages = num_pages
        self.page_bytes = page_bytes
        self.data: PageBytes = np.empty((num_pages, page_bytes), np.uint8)
        # One item a page: numpy then moves a page by memcpy where it would move single bytes.
        self.pages = self.data.view(np.dtype((np.void, page_bytes)))[:, 0] if num_pages else self.data[:, 0]

    def gather(self, page_ids: PageIds) -> PageBytes:
        """Read pages: a new uint8 array [len(page_ids), page_bytes], a copy."""
        if not len(page_ids):
            return np.zeros((0, self.page_bytes), np.uint8)
        return self.pages[page_ids].view(np.uint8).reshape(len(page_ids), self.page_bytes)

    def scatter(self, page_ids: PageIds, page_bytes: PageBytes) -> None:
        """Write pages: row i of a C-contiguous uint8 [len(page_ids), page_bytes] goes to page_ids[i]."""
        if page_bytes.shape != (len(page_ids), self.page_bytes):
            raise InvalidArgumentError(f"{page_bytes.shape} bytes for {len(page_ids)} pages of {self.page_bytes}")
        if len(page_ids):
            self.pages[page_ids] = np.ascontiguousarray(page_bytes).view(self.pages.dtype)[:, 0]


def copy_pages(src: HostPagePool, src_ids: PageIds, dst: HostPagePool, dst_ids: PageIds) -> None:
    """Copy page src_ids[i] of ``src`` to page dst_ids[i] of ``dst``, page by page with memcpy.

    Raises: InvalidArgumentError if the numbers of ids or the page sizes differ.
    """
    if len(src_ids) != len(dst_ids) or src.page_bytes != dst.page_bytes:
        raise InvalidArgumentError(
            f"copy of {len(src_ids)} pages of {src.page_bytes} bytes to {len(dst_ids)} pages of {dst.page_bytes} bytes"
        )
    if len(src_ids):
        dst.pages[dst_ids] = src.pages[src_ids]
