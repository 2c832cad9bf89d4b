"""L1: one block of host memory for a pool: mapped, bound to a NUMA node, populated, page-locked; and all that undone.

    1 map        huge pages of the reserved pool (MAP_HUGETLB), else transparent ones (MADV_HUGEPAGE), else plain
    2 bind       to a NUMA node, where there is more than one (preferred, not forced)
    3 populate   every page is made resident now, by threads, so that no page fault falls into a copy
    4 pin        page-lock in chunks, all or none
    5 close      unlock, unmap

What was got, and why not more, is in ``report``. torch's pinned allocator would round a pool up to a power of two,
and fill it with one thread.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import sys
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import HostMemoryError, InvalidArgumentError, PageLockError, StateError
from .memory import read_text, usable_cpus
from .pinning import Registrar

__all__ = ["Arena", "ArenaConfig", "ArenaReport", "HugePages", "Kernel", "online_nodes"]

HugePages: TypeAlias = Literal["auto", "hugetlb", "transparent", "none"]

MIB, GIB = 1024**2, 1024**3
MAX_PIN_CHUNK_BYTES = 64 * GIB
"""cudaHostRegister of more in one call fails on some drivers."""

_MAP_HUGETLB = 0x40000
_MADV_DONTFORK, _MADV_DOFORK, _MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 10, 11, 14, 23
_MPOL_PREFERRED = 1
_MBIND = {"x86_64": 237, "aarch64": 235}
_POPULATE_BYTES = 64 * MIB  # of one system call: small enough to share out evenly
_TRANSPARENT = Path("/sys/kernel/mm/transparent_hugepage")


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaConfig:
    """How to get the memory.

    Args:
        huge_pages: "auto" takes the best there is; "hugetlb" and "transparent" raise if it is not to be had;
            "none" = plain pages.
        populate: make every page resident at once. Off: at the first touch, or when page-locked.
        populate_threads: 0 = one a CPU that this process may use, at most 8 (more do not help: the kernel zeroes pages
            at the speed of memory).
        numa_node: node to prefer, the GPU's for a pool that feeds one; None = leave it to the kernel.
    """

    huge_pages: HugePages = "auto"
    populate: bool = True
    populate_threads: int = 0
    numa_node: int | None = None

    def __post_init__(self) -> None:
        if self.huge_pages not in ("auto", "hugetlb", "transparent", "none"):
            raise InvalidArgumentError(f"huge_pages is {self.huge_pages!r}, not auto, hugetlb, transparent or none")
        if self.populate_threads < 0:
            raise InvalidArgumentError(f"populate_threads is {self.populate_threads}")


@dataclass(slots=True)
class ArenaReport:
    """What was got. pages: "hugetlb", "transparent" (asked for; the kernel may give less) or "plain". populated_by:
    "madvise", "touch" or "nobody". numa_node: bound to, or None. notes: why something better was not got."""

    mapped_bytes: int = 0
    pages: str = "plain"
    populated_by: str = "nobody"
    populate_threads: int = 0
    numa_node: int | None = None
    notes: list[str] = field(default_factory=list)


class Kernel:
    """The system calls that an arena makes. Tests put failing ones in their place."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)

    def map(self, num_bytes: int, flags: int) -> mmap.mmap:
        """Map private anonymous memory. Raises: OSError."""
        return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | flags)

    def madvise(self, address: int, num_bytes: int, advice: int) -> int:
        """0 or an errno. Releases the GIL."""
        madvise = self._libc.madvise
        done = madvise(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), ctypes.c_int(advice))
        return ctypes.get_errno() if done else 0

    def touch(self, address: int, num_bytes: int) -> None:
        """Write zeros. Releases the GIL."""
        ctypes.memset(address, 0, num_bytes)

    def prefer_node(self, address: int, num_bytes: int, node: int) -> int:
        """Bind future pages to a node, if it has room: 0 or an errno."""
        number = _MBIND.get(platform.machine())
        if number is None or sys.platform != "linux":
            return errno.ENOSYS
        words = node // 64 + 1
        mask = (ctypes.c_ulong * words)()
        mask[node // 64] = 1 << node % 64
        long = ctypes.c_long
        done = self._libc.syscall(
            long(number), ctypes.c_void_p(address), ctypes.c_ulong(num_bytes), long(_MPOL_PREFERRED), mask,
            ctypes.c_ulong(64 * words + 1), long(0),
        )  # fmt: skip
        return ctypes.get_errno() if done else 0

    def read(self, path: Path) -> str | None:
        """A file of /proc or /sys; None if it cannot be read."""
        return read_text(path)


class Arena:
    """``num_bytes`` of zeroed host memory at ``address``, until ``close``.

    Args:
        num_bytes: at least 1; rounded up to whole (huge) pages.
        kernel: the system calls.
    Raises: HostMemoryError if the system gives no memory of the kind asked for; nothing is kept then.
    """

    def __init__(self, num_bytes: int, config: ArenaConfig | None = None, kernel: Kernel | None = None) -> None:
        if num_bytes < 1:
            raise InvalidArgumentError(f"an arena of {num_bytes} bytes")
        self.num_bytes = num_bytes
        self.config = config or ArenaConfig()
        self.report = ArenaReport()
        self.registered: list[tuple[int, int]] = []
        """(address, bytes) of each page-locked chunk, ascending."""
        self._kernel = kernel or Kernel()
        self._registrar: Registrar | None = None
        self._map: mmap.mmap | None = self._get()
        self.address = _address(self._map)

    # ---- getting -----------------------------------------------------------------------------------------------------
    def _get(self) -> mmap.mmap:
        """Steps 1 to 3, with one kind of page after the other."""
        wanted = self.config.huge_pages
        kinds: Iterable[str] = {
            "auto": ("hugetlb", "transparent", "plain"), "hugetlb": ("hugetlb",), "transparent": ("transparent",),
            "none": ("plain",),
        }[wanted]  # fmt: skip
        for kind in kinds:
            try:
                return self._try(kind)
            except OSError as error:
                self.report.notes.append(f"{kind}: {error.strerror or error}")
        raise HostMemoryError(f"no {self.num_bytes:,} bytes of host memory: {'; '.join(self.report.notes)}")

    def _try(self, kind: str) -> mmap.mmap:
        """Map, bind and populate pages of one kind. Raises: OSError, and nothing is kept."""
        page_bytes = self._page_bytes(kind)
        mapped_bytes = -(-self.num_bytes // page_bytes) * page_bytes
        mapping = self._kernel.map(mapped_bytes, _MAP_HUGETLB if kind == "hugetlb" else 0)
        try:
            address = _address(mapping)
            if kind == "transparent":
                _raise_errno(self._kernel.madvise(address, mapped_bytes, _MADV_HUGEPAGE))
            node = self._bind(address, mapped_bytes)
            populated_by, threads = self._populate(address, mapped_bytes)
        except BaseException:
            mapping.close()
            raise
        notes = self.report.notes
        self.report = ArenaReport(mapped_bytes, kind, populated_by, threads, node, notes)
        return mapping

    def _page_bytes(self, kind: str) -> int:
        """The size of one page of a kind. Raises: OSError if there are none, or one would be mostly waste."""
        if kind == "plain":
            return mmap.PAGESIZE
        if kind == "transparent":
            setting = self._kernel.read(_TRANSPARENT / "enabled")
            if setting is None or "[never]" in setting:
                raise OSError(errno.EOPNOTSUPP, "transparent huge pages are off")
            return int(self._kernel.read(_TRANSPARENT / "hpage_pmd_size") or 2 * MIB)
        lines = (self._kernel.read(Path("/proc/meminfo")) or "").splitlines()
        sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith("Hugepagesize:")]
        if not sizes:
            raise OSError(errno.EOPNOTSUPP, "this kernel has no huge pages")
        if self.config.huge_pages == "auto" and self.num_bytes < sizes[0]:
            raise OSError(errno.EFBIG, f"{self.num_bytes:,} bytes would waste a page of {sizes[0]:,}")
        return sizes[0]

    def _bind(self, address: int, num_bytes: int) -> int | None:
        """Prefer the configured node. A failure costs locality only, and is noted."""
        node, online = self.config.numa_node, online_nodes(self._kernel.read)
        if node is None or len(online) < 2:
            return None
        if node not in online:
            raise InvalidArgumentError(f"NUMA node {node} is none of {online}")
        code = self._kernel.prefer_node(address, num_bytes, node)
        if code:
            self.report.notes.append(f"NUMA node {node}: {os.strerror(code)}")
            return None
        return node

    def _populate(self, address: int, num_bytes: int) -> tuple[str, int]:
        """Make all pages resident. Returns who did it, and the number of threads. Raises: OSError."""
        if not self.config.populate:
            return "nobody", 0
        parts = [(address + at, min(_POPULATE_BYTES, num_bytes - at)) for at in range(0, num_bytes, _POPULATE_BYTES)]
        threads = min(self.config.populate_threads or min(8, usable_cpus()), len(parts))

        def populate(part: tuple[int, int]) -> int:
            return self._kernel.madvise(*part, _MADV_POPULATE_WRITE)

        codes = set(_in_threads(populate, parts, threads)) - {0}
        if not codes:
            return "madvise", threads
        if codes != {errno.EINVAL}:  # EINVAL: a kernel before 5.14
            _raise_errno(max(codes - {errno.EINVAL}))
        _in_threads(lambda part: self._kernel.touch(*part), parts, threads)
        return "touch", threads

    # ---- using -------------------------------------------------------------------------------------------------------
    @property
    def closed(self) -> bool:
        """Whether the memory is gone."""
        return self._map is None

    @property
    def data(self) -> npt.NDArray[np.uint8]:
        """The memory as uint8 [num_bytes]. The arena cannot be closed while this, or a view of it, lives."""
        return np.frombuffer(self._mapped(), np.uint8, self.num_bytes)

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            raise StateError("the arena is closed")
        return self._map

    def huge_bytes(self) -> int:
        """Bytes that lie in huge pages now, by /proc/self/smaps (at most: a neighbour's may share the entry).
        O(mappings)."""
        end, inside, found = self.address + self.report.mapped_bytes, False, 0
        for line in (self._kernel.read(Path("/proc/self/smaps")) or "").splitlines():
            name, _, rest = line.partition(" ")
            if "-" in name and not name.endswith(":"):
                first, last = (int(part, 16) for part in name.split("-"))
                inside = first < end and last > self.address
            elif inside and name in ("AnonHugePages:", "Private_Hugetlb:"):
                found += int(rest.split()[0]) * 1024
        return min(found, self.report.mapped_bytes)

    # ---- page-locking ------------------------------------------------------------------------------------------------
    @property
    def pinned(self) -> bool:
        """Whether the memory is page-locked."""
        return bool(self.registered)

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Where one page-locked chunk ends and the next begins: no one CUDA copy may span such an address."""
        return tuple(address for address, _ in self.registered[1:])

    def pin(self, registrar: Registrar, chunk_bytes: int = MAX_PIN_CHUNK_BYTES) -> None:
        """Page-lock all of the memory, chunk by chunk; if one fails, those before it are unlocked again.

        A child of fork does not get the memory while it is locked (MADV_DONTFORK), and must not touch it: copy on write
        would move a page from under the device, or the kernel would copy all of it at the fork. There the arena is
        closed.

        Args: chunk_bytes: 1 page .. 64 GiB, rounded down to 2 MiB (or to pages, below that).
        Raises: PageLockError with the chunk and the cause; StateError if closed or pinned already.
        """
        self._mapped()
        if self.pinned:
            raise StateError(f"{len(self.registered)} chunks are page-locked already")
        if not mmap.PAGESIZE <= chunk_bytes <= MAX_PIN_CHUNK_BYTES:
            raise InvalidArgumentError(
                f"chunks of {chunk_bytes} bytes are not {mmap.PAGESIZE} .. {MAX_PIN_CHUNK_BYTES}"
            )
        unit = 2 * MIB if chunk_bytes >= 2 * MIB else mmap.PAGESIZE
        step = chunk_bytes // unit * unit
        total = self.report.mapped_bytes
        chunks = [(self.address + at, min(step, total - at)) for at in range(0, total, step)]
        self._registrar = registrar
        _locked.add(self)
        self._keep_from_children()
        for number, (address, num_bytes) in enumerate(chunks):
            try:
                registrar.register(address, num_bytes)
            except BaseException as error:
                left = self._unregister()
                if not isinstance(error, Exception):
                    raise
                undone = f"{number} before it unlocked"
                if left:
                    undone = f"unlocking the {number} before it failed, too: {left}"
                raise PageLockError(
                    f"chunk {number + 1} of {len(chunks)} ({num_bytes:,} bytes) cannot be page-locked: {error}; "
                    + undone
                ) from error
            self.registered.append((address, num_bytes))

    def unpin(self) -> None:
        """Unlock all chunks, the last first; those that fail stay in ``registered``.

        Raises: PageLockError with the causes.
        """
        left = self._unregister()
        if left:
            raise PageLockError(f"{len(self.registered)} chunks cannot be unlocked: {left}")

    def _unregister(self) -> str:
        """Unlock every chunk that lets itself be unlocked; returns what went wrong with the others."""
        causes, left = [], []
        registrar = self._registrar
        for address, num_bytes in reversed(self.registered):
            assert registrar is not None
            try:
                registrar.unregister(address)
            except Exception as error:  # the other chunks must be unlocked all the same; told to the caller
                causes.append(f"{address:#x}: {error}")
                left.append((address, num_bytes))
        self.registered = left[::-1]
        if not left and self._map is not None:
            _locked.discard(self)
            self._kernel.madvise(self.address, self.report.mapped_bytes, _MADV_DOFORK)
        return "; ".join(causes)

    def _leave_to_parent(self) -> None:
        """In a child of fork: the locks are not its own, and where the memory was something else may lie by now, which
        unmapping would take away. So the mapping is never closed here."""
        self.registered = []
        if self._map is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._map))
            self._map = None

    def _keep_from_children(self) -> None:
        """A failure is noted: everything works until the process forks."""
        code = self._kernel.madvise(self.address, self.report.mapped_bytes, _MADV_DONTFORK)
        if code:
            self.report.notes.append(f"children of fork get the locked memory: {os.strerror(code)}")

    # ---- the end -----------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Unlock and unmap. A second call does nothing.

        Raises: PageLockError if a chunk stays locked; StateError if a view of ``data`` lives. The memory is still there
            then, and close may be called again.
        """
        if self._map is None:
            return
        self.unpin()
        try:
            self._map.close()
        except BufferError as error:
            raise StateError(f"the arena is in use: {error}; drop every view of its data first") from error
        self._map = None

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Unmapping locked memory would leave the driver with ranges that are gone. The map closes with its last view.
        if getattr(self, "registered", None):
            self._unregister()


# ---- fork ------------------------------------------------------------------------------------------------------------
_locked: weakref.WeakSet[Arena] = weakref.WeakSet()
"""Page-locked arenas."""


def _after_fork_in_child() -> None:
    for arena in list(_locked):
        arena._leave_to_parent()
    _locked.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


# ---- helpers ---------------------------------------------------------------------------------------------------------
def online_nodes(read: Callable[[Path], str | None] = read_text) -> list[int]:
    """The NUMA nodes of this machine; [0] where the kernel does not say."""
    nodes: list[int] = []
    for part in (read(Path("/sys/devices/system/node/online")) or "0").strip().split(","):
        first, _, last = part.partition("-")
        nodes += range(int(first), int(last or first) + 1)
    return nodes


def _address(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def _raise_errno(code: int) -> None:
    if code:
        raise OSError(code, os.strerror(code))


def _in_threads(function: Callable[[tuple[int, int]], Any], parts: list[tuple[int, int]], threads: int) -> list[Any]:
    """Call a function that releases the GIL on every part."""
    if threads < 2:
        return [function(part) for part in parts]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, parts))
