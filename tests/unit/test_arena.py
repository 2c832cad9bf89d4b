"""pool/arena.py, pool/memory.py, pool/pinning.py: what is not to be had is replaced or undone; limits count; nothing
leaks."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from radixkv.errors import DeviceUnavailableError, HostMemoryError, InvalidArgumentError, PageLockError, StateError
from radixkv.pool import pinning
from radixkv.pool.arena import Arena, ArenaConfig, Kernel, online_nodes
from radixkv.pool.memory import host_memory, require_host_memory, usable_cpus
from radixkv.pool.pinning import CudaRegistrar, cuda_registrar, numa_node_of

MIB = 1024**2
GB = 10**9
HUGETLB, HUGE_ADVICE, POPULATE = 0x40000, 14, 23


class FakeKernel(Kernel):
    """Real plain memory behind scripted answers; records every call."""

    def __init__(
        self, hugetlb: bool = True, transparent: str | None = "always [madvise] never", nodes: str = "0"
    ) -> None:
        super().__init__()
        self.hugetlb, self.transparent, self.nodes = hugetlb, transparent, nodes
        self.calls: list[tuple[Any, ...]] = []
        self.maps: list[mmap.mmap] = []
        self.advice: dict[int, int] = {}  # errno by advice
        self.fail_hugetlb_populate = False
        self.meminfo = "MemTotal: 1 kB\nHugepagesize:    2048 kB\n"
        self.bind_errno = 0
        self.threads: set[int] = set()
        self.lock = threading.Lock()

    def map(self, num_bytes: int, flags: int) -> mmap.mmap:
        self.calls.append(("map", num_bytes, flags))
        if flags == HUGETLB and not self.hugetlb:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        self.maps.append(super().map(num_bytes, 0))
        return self.maps[-1]

    def madvise(self, address: int, num_bytes: int, advice: int) -> int:
        with self.lock:
            self.calls.append(("madvise", address, num_bytes, advice))
            self.threads.add(threading.get_ident())
        if advice == POPULATE and self.fail_hugetlb_populate and len(self.maps) == 1:
            return errno.EFAULT
        return self.advice.get(advice, 0)

    def touch(self, address: int, num_bytes: int) -> None:
        with self.lock:
            self.calls.append(("touch", address, num_bytes))
        super().touch(address, num_bytes)

    def prefer_node(self, address: int, num_bytes: int, node: int) -> int:
        self.calls.append(("bind", address, num_bytes, node))
        return self.bind_errno

    def read(self, path: Path) -> str | None:
        name = str(path)
        if name == "/proc/meminfo":
            return self.meminfo
        if "transparent" in name:
            return self.transparent if name.endswith("enabled") else str(4 * MIB)
        return self.nodes if "node" in name else super().read(path)

    def of(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]


# ---- kinds of pages --------------------------------------------------------------------------------------------------
def test_a_real_arena_is_zeroed_writable_memory_at_its_address() -> None:
    with Arena(3 * mmap.PAGESIZE + 1) as arena:
        data = arena.data
        assert data.shape == (3 * mmap.PAGESIZE + 1,)
        assert not data.any()
        data[-1] = 7
        assert ctypes.string_at(arena.address + len(data) - 1, 1) == b"\x07"
        assert arena.report.mapped_bytes >= len(data)
        assert arena.report.pages in ("hugetlb", "transparent", "plain")
        assert arena.report.populated_by in ("madvise", "touch")
        assert 0 <= arena.huge_bytes() <= arena.report.mapped_bytes
        del data
    assert arena.closed


def test_reserved_huge_pages_come_first() -> None:
    kernel = FakeKernel()
    with Arena(3 * MIB, kernel=kernel) as arena:
        assert (arena.report.pages, arena.report.mapped_bytes, arena.report.notes) == ("hugetlb", 4 * MIB, [])
        assert kernel.of("map") == [(4 * MIB, HUGETLB)]
        assert arena.data.size == 3 * MIB


def test_then_transparent_ones_then_plain_ones_with_the_reasons() -> None:
    kernel = FakeKernel(hugetlb=False)
    with Arena(3 * MIB, kernel=kernel) as arena:
        assert (arena.report.pages, arena.report.notes) == ("transparent", ["hugetlb: Cannot allocate memory"])
        assert kernel.of("madvise")[0] == (arena.address, 4 * MIB, HUGE_ADVICE)
    for off in ("always madvise [never]", None):
        kernel = FakeKernel(hugetlb=False, transparent=off)
        with Arena(2 * MIB, kernel=kernel) as arena:
            assert (arena.report.pages, arena.report.mapped_bytes) == ("plain", 2 * MIB)
            assert arena.report.notes[1] == "transparent: transparent huge pages are off"
    kernel = FakeKernel(hugetlb=False)
    kernel.advice[HUGE_ADVICE] = errno.EINVAL
    with Arena(3 * MIB, kernel=kernel) as arena:
        assert arena.report.pages == "plain"
        assert kernel.maps[0].closed


def test_huge_pages_that_run_out_while_being_populated_are_given_up_for_others() -> None:
    kernel = FakeKernel()
    kernel.fail_hugetlb_populate = True
    with Arena(5 * MIB, kernel=kernel) as arena:
        assert arena.report.pages == "transparent"
        assert arena.report.notes == ["hugetlb: Bad address"]
        assert [mapping.closed for mapping in kernel.maps] == [True, False]


def test_what_was_asked_for_and_is_not_to_be_had_raises() -> None:
    with pytest.raises(HostMemoryError, match="5 bytes of host memory: hugetlb: Cannot allocate"):
        Arena(5, ArenaConfig(huge_pages="hugetlb"), FakeKernel(hugetlb=False))
    with pytest.raises(HostMemoryError, match="transparent huge pages are off"):
        Arena(5, ArenaConfig(huge_pages="transparent"), FakeKernel(transparent="always madvise [never]"))
    kernel = FakeKernel()
    kernel.advice[POPULATE] = errno.ENOMEM
    with pytest.raises(HostMemoryError, match="plain: Cannot allocate memory"):
        Arena(3 * MIB, kernel=kernel)
    assert len(kernel.maps) == 3
    assert all(mapping.closed for mapping in kernel.maps)


def test_a_small_arena_does_not_take_a_reserved_huge_page_unless_told() -> None:
    with Arena(2 * MIB - 1, kernel=FakeKernel()) as arena:
        assert arena.report.pages == "transparent"
        assert arena.report.notes == ["hugetlb: 2,097,151 bytes would waste a page of 2,097,152"]
    with Arena(5, ArenaConfig(huge_pages="hugetlb"), FakeKernel()) as arena:
        assert arena.report.mapped_bytes == 2 * MIB


def test_a_kernel_without_huge_pages() -> None:
    kernel = FakeKernel(transparent=None)
    kernel.meminfo = "MemTotal: 1 kB\n"
    with Arena(3 * MIB, kernel=kernel) as arena:
        assert arena.report.notes[0] == "hugetlb: this kernel has no huge pages"
        assert arena.report.pages == "plain"


def test_no_huge_pages_if_none_are_wanted() -> None:
    kernel = FakeKernel()
    with Arena(5, ArenaConfig(huge_pages="none"), kernel) as arena:
        assert (arena.report.pages, kernel.of("map")) == ("plain", [(mmap.PAGESIZE, 0)])


def test_wrong_arguments() -> None:
    for options in ({"huge_pages": "1G"}, {"populate_threads": -1}):
        with pytest.raises(InvalidArgumentError, match=next(iter(options))):
            ArenaConfig(**options)  # type: ignore[arg-type]
    for num_bytes in (0, -1):
        with pytest.raises(InvalidArgumentError, match="an arena of"):
            Arena(num_bytes)


# ---- population and locality -----------------------------------------------------------------------------------------
def covered(ranges: list[tuple[int, int]], arena: Arena) -> bool:
    """Whether ranges (address, bytes) tile the arena without gap or overlap."""
    at = arena.address
    for address, num_bytes in sorted(ranges):
        if address != at:
            return False
        at += num_bytes
    return at == arena.address + arena.report.mapped_bytes


def test_all_of_it_is_populated_in_shares() -> None:
    kernel = FakeKernel()
    with Arena(150 * MIB, ArenaConfig(populate_threads=3), kernel) as arena:
        shares = [call[:2] for call in kernel.of("madvise") if call[2] == POPULATE]
        assert len(shares) == 3
        assert covered(shares, arena)
        assert (arena.report.populated_by, arena.report.populate_threads) == ("madvise", 3)
        assert threading.get_ident() not in kernel.threads  # not by the caller's thread


def test_an_old_kernel_is_populated_by_touching() -> None:
    kernel = FakeKernel()
    kernel.advice[POPULATE] = errno.EINVAL
    with Arena(70 * MIB, ArenaConfig(huge_pages="none", populate_threads=2), kernel) as arena:
        assert arena.report.populated_by == "touch"
        assert covered(kernel.of("touch"), arena)


def test_population_can_be_left_to_the_first_touch() -> None:
    kernel = FakeKernel()
    with Arena(5 * MIB, ArenaConfig(populate=False), kernel) as arena:
        assert (arena.report.populated_by, kernel.of("madvise"), kernel.of("touch")) == ("nobody", [], [])


def test_the_node_is_preferred_before_population_where_there_is_more_than_one() -> None:
    kernel = FakeKernel(nodes="0-1,3\n")
    with Arena(5 * MIB, ArenaConfig(numa_node=3), kernel) as arena:
        assert arena.report.numa_node == 3
        assert kernel.of("bind") == [(arena.address, 6 * MIB, 3)]
        names = [call[0] for call in kernel.calls]
        assert names.index("bind") < names.index("madvise")
    kernel = FakeKernel(nodes="0")
    with Arena(5, ArenaConfig(numa_node=0), kernel) as arena:
        assert (arena.report.numa_node, kernel.of("bind")) == (None, [])
    with pytest.raises(InvalidArgumentError, match=r"node 2 is none of \[0, 1\]"):
        Arena(5, ArenaConfig(numa_node=2), FakeKernel(nodes="0-1"))


def test_memory_that_cannot_be_bound_is_used_all_the_same() -> None:
    kernel = FakeKernel(nodes="0-1")
    kernel.bind_errno = errno.EPERM
    with Arena(3 * MIB, ArenaConfig(numa_node=1), kernel) as arena:
        assert arena.report.numa_node is None
        assert arena.report.notes == ["NUMA node 1: Operation not permitted"]


@pytest.mark.parametrize(("text", "nodes"), [
    ("0\n", [0]), ("0-3", [0, 1, 2, 3]), ("0,2-3", [0, 2, 3]), (None, [0]),
])  # fmt: skip
def test_online_nodes(text: str | None, nodes: list[int]) -> None:
    assert online_nodes(lambda _path: text) == nodes


def test_the_real_system_calls_answer_with_errno() -> None:
    kernel = Kernel()
    with Arena(mmap.PAGESIZE, ArenaConfig(huge_pages="none")) as arena:
        assert kernel.madvise(arena.address, mmap.PAGESIZE, 9999) == errno.EINVAL
        if sys.platform == "linux":
            assert kernel.prefer_node(arena.address, mmap.PAGESIZE, 0) in (0, errno.ENOSYS, errno.EPERM)
        ctypes.memset(arena.address, 1, mmap.PAGESIZE)
        kernel.touch(arena.address, mmap.PAGESIZE)
        assert not arena.data.any()


# ---- page-locking ----------------------------------------------------------------------------------------------------
class FakeRegistrar:
    """Keeps what is locked; fails at the n-th register, or at unregister of some addresses."""

    name = "fake"

    def __init__(self, fail_at: int | None = None, error: BaseException | None = None) -> None:
        self.locked: dict[int, int] = {}
        self.order: list[int] = []
        self.fail_at, self.error = fail_at, error or RuntimeError("out of lockable memory")
        self.stuck: set[int] = set()
        self.count = 0

    def register(self, address: int, num_bytes: int) -> None:
        if self.count == self.fail_at:
            raise self.error
        self.count += 1
        assert address not in self.locked
        self.locked[address] = num_bytes

    def unregister(self, address: int) -> None:
        if address in self.stuck:
            raise RuntimeError("stuck")
        self.order.append(address)
        del self.locked[address]


CHUNK = 2 * mmap.PAGESIZE


def small(pages: int = 7) -> Arena:
    return Arena(pages * mmap.PAGESIZE, ArenaConfig(huge_pages="none"))


def test_cpus_where_the_system_does_not_say_which(monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_cpus() >= 1
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert usable_cpus() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cpus() == 1


def flags_of(arena: Arena) -> set[str]:
    """The VmFlags of the mapping that the arena begins in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name = line.partition(" ")[0]
        if "-" in name and not name.endswith(":"):
            first, last = (int(part, 16) for part in name.split("-"))
            inside = first <= arena.address < last
        elif inside and name == "VmFlags:":
            return set(line.split()[1:])
    pytest.skip("this kernel's smaps has no VmFlags")


@pytest.mark.parametrize("how", ["close", "del"])
def test_a_child_of_fork_neither_unlocks_nor_unmaps(how: str) -> None:
    """What the child maps may lie where the arena was: unmapping would take it away."""
    code = f"""
import ctypes, gc, mmap, os
from radixkv.pool.arena import Arena, ArenaConfig
class Fake:
    name, calls = "fake", []
    def register(self, address, num_bytes): pass
    def unregister(self, address): self.calls.append(address)
fake = Fake()
arena = Arena(64 << 20, ArenaConfig(huge_pages="none"))
arena.pin(fake)
first = arena.address
if (child := os.fork()) == 0:
    map_at = ctypes.CDLL(None).mmap
    map_at.restype = ctypes.c_void_p
    map_at.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    mine = map_at(first, 1 << 20, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    closed = arena.closed
    if {how!r} == "close":
        arena.close()
    del arena
    gc.collect()
    ctypes.memset(mine, 1, 1 << 20)
    os._exit(0 if mine == first and closed and not fake.calls else 9)
assert os.waitpid(child, 0)[1] == 0, "the child"
assert arena.pinned
arena.close()
assert fake.calls == [first]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_child_of_fork_does_not_get_locked_memory() -> None:
    """dc: do not copy on fork."""
    with small() as arena:
        assert "dc" not in flags_of(arena)
        arena.pin(FakeRegistrar(), CHUNK)
        assert "dc" in flags_of(arena)
        arena.unpin()
        assert "dc" not in flags_of(arena)
        with pytest.raises(PageLockError):
            arena.pin(FakeRegistrar(fail_at=2), CHUNK)
        assert "dc" not in flags_of(arena)


def test_memory_that_children_get_all_the_same_is_noted() -> None:
    class Old(Kernel):
        def madvise(self, address: int, num_bytes: int, advice: int) -> int:
            return errno.EINVAL if advice == 10 else super().madvise(address, num_bytes, advice)

    with Arena(3 * CHUNK, ArenaConfig(huge_pages="none"), Old()) as arena:
        arena.pin(FakeRegistrar(), CHUNK)
        assert arena.pinned
        assert "children of fork get the locked memory: Invalid argument" in arena.report.notes


def test_all_of_it_is_locked_in_chunks() -> None:
    registrar = FakeRegistrar()
    with small() as arena:
        arena.pin(registrar, CHUNK)
        assert arena.pinned
        assert [num_bytes for _, num_bytes in arena.registered] == [CHUNK, CHUNK, CHUNK, mmap.PAGESIZE]
        assert covered(arena.registered, arena)
        assert dict(arena.registered) == registrar.locked
        assert arena.boundaries == tuple(arena.address + CHUNK * i for i in (1, 2, 3))
        with pytest.raises(StateError, match="4 chunks are page-locked already"):
            arena.pin(registrar)
        arena.unpin()
        assert not arena.pinned
        assert not registrar.locked
        assert registrar.order == sorted(registrar.order, reverse=True)
        arena.pin(registrar)  # one chunk will do
        assert len(arena.registered) == 1
    assert not registrar.locked


@pytest.mark.parametrize("fail_at", range(4))
def test_a_chunk_that_fails_takes_the_others_back(fail_at: int) -> None:
    registrar = FakeRegistrar(fail_at)
    with small() as arena:
        message = rf"chunk {fail_at + 1} of 4 .*out of lockable memory; {fail_at} before it unlocked"
        with pytest.raises(PageLockError, match=message):
            arena.pin(registrar, CHUNK)
        assert (registrar.locked, arena.registered) == ({}, [])
        assert len(registrar.order) == fail_at
        registrar.fail_at = None
        arena.pin(registrar, CHUNK)  # the memory itself is as it was
        assert len(registrar.locked) == 4


def test_an_interrupt_takes_the_others_back_and_goes_on_as_itself() -> None:
    registrar = FakeRegistrar(2, KeyboardInterrupt())
    with small() as arena:
        with pytest.raises(KeyboardInterrupt):
            arena.pin(registrar, CHUNK)
        assert not registrar.locked


def test_a_chunk_that_cannot_be_taken_back_is_told_and_kept_in_the_books() -> None:
    registrar = FakeRegistrar(3)
    arena = small()
    registrar.stuck = {arena.address + CHUNK}
    with pytest.raises(PageLockError, match=r"unlocking the 3 before it failed, too: 0x[0-9a-f]+: stuck"):
        arena.pin(registrar, CHUNK)
    assert arena.registered == [(arena.address + CHUNK, CHUNK)]
    with pytest.raises(PageLockError, match="1 chunks cannot be unlocked"):
        arena.close()
    assert not arena.closed
    registrar.stuck = set()
    arena.close()
    assert arena.closed
    assert not registrar.locked


def test_chunk_sizes() -> None:
    with small() as arena:
        for wrong in (0, mmap.PAGESIZE - 1, 64 * 1024**3 + 1):
            with pytest.raises(InvalidArgumentError, match="chunks of"):
                arena.pin(FakeRegistrar(), wrong)
        arena.pin(FakeRegistrar(), CHUNK + 100)  # rounded down to whole pages
        assert arena.registered[0][1] == CHUNK


# ---- the end ---------------------------------------------------------------------------------------------------------
def test_an_arena_in_use_stays() -> None:
    registrar = FakeRegistrar()
    arena = small()
    arena.pin(registrar, CHUNK)
    view = arena.data[5:]
    with pytest.raises(StateError, match="drop every view"):
        arena.close()
    view[0] = 3  # still mapped
    assert not registrar.locked
    del view
    arena.close()
    arena.close()
    for use in (lambda: arena.data, lambda: arena.pin(registrar)):
        with pytest.raises(StateError, match="closed"):
            use()


def test_an_arena_that_is_dropped_is_unlocked() -> None:
    registrar = FakeRegistrar()
    arena = small()
    arena.pin(registrar, CHUNK)
    data = arena.data
    del arena
    gc.collect()
    assert not registrar.locked
    data[:] = 1  # the memory lives as long as its views


# ---- how much there is -----------------------------------------------------------------------------------------------
def machine(root: Path, files: dict[str, Any]) -> Path:
    for name, value in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")
    return root


MEMINFO = "MemTotal:  200 kB\nMemAvailable:  97656250 kB\nHugePages_Free:  0\nHugepagesize:  2048 kB"  # 100 GB
V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/memory"


def test_no_limit_but_the_machine(tmp_path: Path) -> None:
    memory = host_memory(machine(tmp_path, {"proc/meminfo": MEMINFO}))
    assert memory.available_bytes == memory.mem_available_bytes == 100 * GB
    assert (memory.cgroup_limit_bytes, memory.source) == (None, "MemAvailable of the machine")


@pytest.mark.parametrize("path", ["/pod/box", "/elsewhere/on/the/host"])
def test_version_2_limits_count_less_what_is_used_without_cache(tmp_path: Path, path: str) -> None:
    root = machine(tmp_path, {
        "proc/meminfo": MEMINFO, "proc/self/cgroup": f"0::{path}",
        f"{V2}/memory.max": "max", f"{V2}/memory.current": 0,
        "sys/fs/memory.max": 1, "sys/fs/memory.current": 0,  # above the mount: not a cgroup
        f"{V2}/pod/memory.max": 40 * GB, f"{V2}/pod/memory.current": 30 * GB,
        f"{V2}/pod/memory.stat": f"anon 1\ninactive_file {5 * GB}\nactive_file 9",
        f"{V2}/pod/box/memory.max": 50 * GB, f"{V2}/pod/box/memory.current": 1 * GB,
    })  # fmt: skip
    memory = host_memory(root)
    if path == "/pod/box":  # the pod allows less than the box in it
        assert memory[0] == 15 * GB
        assert (memory.cgroup_limit_bytes, memory.cgroup_used_bytes) == (40 * GB, 25 * GB)
        assert memory.source.endswith("cgroup/pod")
    else:
        assert memory.available_bytes == 100 * GB


def test_version_1_limits(tmp_path: Path) -> None:
    root = machine(tmp_path, {
        "proc/meminfo": MEMINFO, "proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/docker/ab\n0::/",
        f"{V1}/memory.limit_in_bytes": 9223372036854771712, f"{V1}/memory.usage_in_bytes": 1,
        f"{V1}/docker/ab/memory.limit_in_bytes": 20 * GB, f"{V1}/docker/ab/memory.usage_in_bytes": 12 * GB,
        f"{V1}/docker/ab/memory.stat": f"total_inactive_file {2 * GB}",
    })  # fmt: skip
    memory = host_memory(root)
    assert (memory.available_bytes, memory.cgroup_limit_bytes) == (10 * GB, 20 * GB)
    assert memory.mem_available_bytes == 100 * GB


def test_in_a_container_the_mount_is_the_cgroup(tmp_path: Path) -> None:
    root = machine(tmp_path, {
        "proc/meminfo": MEMINFO, "proc/self/cgroup": "4:memory:/docker/not/visible/here",
        f"{V1}/memory.limit_in_bytes": 8 * GB, f"{V1}/memory.usage_in_bytes": 9 * GB,
    })  # fmt: skip
    assert host_memory(root).available_bytes == 0


def test_a_cgroup_that_allows_more_than_there_is_changes_nothing(tmp_path: Path) -> None:
    root = machine(tmp_path, {
        "proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/", f"{V2}/memory.max": 900 * GB, f"{V2}/memory.current": GB,
    })  # fmt: skip
    memory = host_memory(root)
    assert (memory.available_bytes, memory.cgroup_limit_bytes) == (100 * GB, 900 * GB)
    assert memory.source == "MemAvailable of the machine"


def test_the_headroom_is_kept_and_the_message_has_the_numbers(tmp_path: Path) -> None:
    root = machine(tmp_path, {"proc/meminfo": MEMINFO})
    assert require_host_memory(90 * GB, 10 * GB, root).available_bytes == 100 * GB
    match = r"95\.00 GB is asked for, and 90\.00 GB can be had: 100\.00 GB are free \(MemAvailable .*10\.00 GB are left"
    with pytest.raises(HostMemoryError, match=match):
        require_host_memory(95 * GB, 10 * GB, root)
    with pytest.raises(HostMemoryError, match=r"and 89\.26 GB can be had"):
        require_host_memory(90 * GB, root=root)  # 10 GiB by default


def test_reserved_huge_pages_need_no_headroom(tmp_path: Path) -> None:
    text = "MemAvailable:  1000 kB\nHugePages_Free:  1024\nHugepagesize:  2048 kB"
    root = machine(tmp_path, {
        "proc/meminfo": text, "proc/self/cgroup": "0::/", f"{V2}/memory.max": 1000, f"{V2}/memory.current": 0,
    })  # fmt: skip
    assert host_memory(root).hugetlb_free_bytes == 2 * 1024**3
    require_host_memory(2 * 1024**3, 10 * GB, root)
    for num_bytes, huge_pages in ((2 * 1024**3 + 1, True), (1024**3, False)):
        with pytest.raises(HostMemoryError):
            require_host_memory(num_bytes, 10 * GB, root, huge_pages)


def test_this_machine_has_memory() -> None:
    assert 0 < host_memory().available_bytes <= host_memory().mem_available_bytes + 1024**3


# ---- CUDA's half -----------------------------------------------------------------------------------------------------
class FakeRuntime:
    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.calls: list[tuple[Any, ...]] = []

    def cudaHostRegister(self, *arguments: int) -> int:
        self.calls.append(arguments)
        return self.code

    def cudaHostUnregister(self, *arguments: int) -> int:
        self.calls.append(arguments)
        return self.code


def test_the_registrar_calls_the_runtime_and_reports_its_code() -> None:
    runtime = FakeRuntime()
    registrar = CudaRegistrar(runtime, "fake")
    registrar.register(4096, 8192)
    registrar.unregister(4096)
    assert runtime.calls == [(4096, 8192, 3), (4096,)]
    runtime.code = 712
    with pytest.raises(PageLockError, match=r"cudaHostRegister\('0x1000', .*through fake failed: CUDA error 712"):
        registrar.register(4096, 8192)
    with pytest.raises(PageLockError, match="cudaHostUnregister"):
        registrar.unregister(4096)


def test_torch_then_cupy_then_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    class CudaError(RuntimeError):
        status = 2

    def register(_address: int, _num_bytes: int, _flags: int) -> None:
        raise CudaError

    runtime = SimpleNamespace(
        getDeviceCount=lambda: 1, hostRegister=register, hostUnregister=lambda _address: None,
        CUDARuntimeError=CudaError
    )
    fake_torch = SimpleNamespace(
        cuda=SimpleNamespace(is_available=lambda: True, cudart=FakeRuntime), __version__="2.9"
    )
    monkeypatch.setitem(sys.modules, "torch", fake_torch)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    monkeypatch.setattr(pinning, "_LIBRARIES", ("libcudart.so.none",))
    assert cuda_registrar().name == "torch"
    fake_torch.cuda.is_available = lambda: False
    through_cupy = cuda_registrar()
    assert through_cupy.name == "cupy"
    through_cupy.unregister(4096)
    with pytest.raises(PageLockError, match="CUDA error 2"):
        through_cupy.register(4096, 1)
    runtime.getDeviceCount = lambda: 0
    match = r"torch 2\.9 sees no GPU; cupy sees no GPU; no libcudart is found"
    with pytest.raises(DeviceUnavailableError, match=match):
        cuda_registrar()
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceUnavailableError, match=r"torch cannot be loaded .*; cupy cannot be loaded"):
        cuda_registrar()


def test_libcudart_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 1

    class Library(SimpleNamespace):
        def cudaGetDeviceCount(self, where: Any) -> int:
            where._obj.value = count
            return 0 if count else 100

    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "cupy", None)
    library = Library(cudaHostRegister=SimpleNamespace(), cudaHostUnregister=SimpleNamespace())
    monkeypatch.setattr(pinning.ctypes, "CDLL", lambda _name: library)
    assert cuda_registrar().name == "libcudart.so.13"
    assert library.cudaHostRegister.argtypes[1] is ctypes.c_size_t
    count = 0
    with pytest.raises(DeviceUnavailableError, match=r"libcudart\.so\.13 sees no GPU \(CUDA error 100\)"):
        cuda_registrar()


def test_an_arena_takes_no_numpy_dtype_but_bytes() -> None:
    with small(1) as arena:
        assert arena.data.dtype == np.uint8


@pytest.mark.parametrize(("text", "node"), [("1\n", 1), ("-1\n", None), (None, None)])
def test_the_node_of_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, node: int | None
) -> None:
    codes = {"init": 0, "id": 0}

    def bus_id(name: Any, _length: int, number: int) -> int:
        name.value = f"0000:{16 * number:02X}AB".encode()
        return codes["id"]

    driver = SimpleNamespace(cuInit=lambda _flags: codes["init"], cuDeviceGetPCIBusId=bus_id)
    monkeypatch.setattr(pinning.ctypes, "CDLL", lambda _name: driver)
    if text is not None:
        machine(tmp_path, {"sys/bus/pci/devices/0000:30ab/numa_node": text.strip()})
    assert numa_node_of("cuda:3", tmp_path) == node
    for name in codes:
        codes[name] = 100
        assert numa_node_of("cuda:3", tmp_path) is None
        codes[name] = 0


def test_no_driver_no_node(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_name: str) -> Any:
        raise OSError("libcuda.so.1: no such file")

    monkeypatch.setattr(pinning.ctypes, "CDLL", missing)
    assert numa_node_of("cuda:0") is None
