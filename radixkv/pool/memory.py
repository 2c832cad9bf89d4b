"""L1: how much host memory a pool may take: what the machine has free, and what its cgroup (container) still allows.

A container's limit does not show in MemAvailable, and a pool that is populated beyond it is not refused but killed.
So the limits of the own cgroup and all above it count, version 1 and 2, less what is in use; page cache that the
kernel can drop is no use. memory.high of version 2 is a limit, too: beyond it the kernel reclaims, and slows down
whoever allocates, without an end if the memory is locked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import HostMemoryError

__all__ = ["DEFAULT_HEADROOM_BYTES", "HostMemory", "host_memory", "read_text", "require_host_memory"]
__all__ += ["usable_cpus"]

DEFAULT_HEADROOM_BYTES = 10 * 1024**3
"""Left free for the rest of the machine, as SGLang does: the engine, the page cache and the tokenizer live there
too."""

_UNLIMITED = 1 << 60  # version 1 says "no limit" with a number near 2**63
_GB = 1e9


class HostMemory(NamedTuple):
    """Free host memory, in bytes. available_bytes is the least of MemAvailable and what the cgroups allow.

    cgroup_limit_bytes, cgroup_used_bytes: of the cgroup that allows least; None without a limit. hugetlb_free_bytes:
    in the pool of reserved huge pages, which MemAvailable does not count. source: what set available_bytes.
    """

    available_bytes: int
    mem_available_bytes: int
    cgroup_limit_bytes: int | None
    cgroup_used_bytes: int | None
    hugetlb_free_bytes: int
    source: str


def read_text(path: Path) -> str | None:
    """The text of a file of /proc or /sys; None if it is not there or not ours to read."""
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None


def usable_cpus() -> int:
    """CPUs that this process may use; where the system does not say (macOS, Windows), all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def host_memory(root: Path = Path("/")) -> HostMemory:
    """Measure free host memory. Args: root: of the file system that holds proc and sys."""
    fields = _fields(read_text(root / "proc/meminfo") or "")
    free = fields.get("MemAvailable", -1) * 1024
    if free < 0:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    huge = fields.get("HugePages_Free", 0) * fields.get("Hugepagesize", 0) * 1024
    best = HostMemory(free, free, None, None, huge, "MemAvailable of the machine")
    least: tuple[int, int] | None = None
    for folder, limit, used in _cgroups(root):
        if least is None or limit - used < least[0] - least[1]:
            least = (limit, used)
            best = best._replace(cgroup_limit_bytes=limit, cgroup_used_bytes=used)
            allowed = max(0, limit - used)
            if allowed < free:
                best = best._replace(available_bytes=allowed, source=f"memory limit of the cgroup {folder}")
    return best


def require_host_memory(
    num_bytes: int, headroom_bytes: int = DEFAULT_HEADROOM_BYTES, root: Path = Path("/"), huge_pages: bool = True
) -> HostMemory:
    """Check that a pool of ``num_bytes`` leaves ``headroom_bytes`` free, or fits into reserved huge pages.

    These need no headroom, and memory limits of cgroups do not count them. Then the pool must not take other pages.
    Returns: what was measured. Raises: HostMemoryError with the numbers.
    """
    memory = host_memory(root)
    if huge_pages and num_bytes <= memory.hugetlb_free_bytes:
        return memory
    if num_bytes + headroom_bytes > memory.available_bytes:
        usable = max(0, memory.available_bytes - headroom_bytes)
        raise HostMemoryError(
            f"a host pool of {num_bytes / _GB:.2f} GB is asked for, and {usable / _GB:.2f} GB can be had: "
            f"{memory.available_bytes / _GB:.2f} GB are free ({memory.source}), of which {headroom_bytes / _GB:.2f} GB "
            "are left to the machine (headroom_bytes). Ask for a smaller pool, or set less headroom"
        )
    return memory


def _fields(text: str) -> dict[str, int]:
    """The numbers of a file of lines "name: value ..." or "name value"."""
    words = [line.replace(":", " ").split() for line in text.splitlines()]
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdigit()}


def _cgroups(root: Path) -> Iterator[tuple[str, int, int]]:
    """(name, limit, bytes in use) of each cgroup above this process that limits memory."""
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:  # version 2, alone or beside version 1
            for mount in ("sys/fs/cgroup", "sys/fs/cgroup/unified"):
                yield from _walk(root / mount, path, ("memory.max", "memory.high"), "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.usage_in_bytes", "total_inactive_file")
            yield from _walk(root / "sys/fs/cgroup/memory", path, ("memory.limit_in_bytes",), *names)


def _walk(
    mount: Path, path: str, limit_names: tuple[str, ...], used_name: str, cache_name: str
) -> Iterator[tuple[str, int, int]]:
    """The limits of a cgroup and of those above it. In a container the path may not exist: then its mount is the
    cgroup."""
    folder = mount / path.strip("/")
    for place in (folder, *folder.parents):
        found = [(read_text(place / name) or "").strip() for name in limit_names]
        limits = [int(text) for text in found if text.isdigit() and int(text) < _UNLIMITED]
        used = (read_text(place / used_name) or "").strip()
        if limits and used.isdigit():
            cache = _fields(read_text(place / "memory.stat") or "").get(cache_name, 0)
            yield str(place), min(limits), max(0, int(used) - cache)
        if place == mount:
            return
