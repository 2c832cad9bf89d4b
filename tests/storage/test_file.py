"""The file backend: layout on disk, budget, crashes, full and broken disks, and several processes on one folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import mmap
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radixkv.errors import InvalidArgumentError, StorageError, StorageTimeoutError
from radixkv.storage import journal as journal_module
from radixkv.storage.base import Deadline
from radixkv.storage.file import FileStorage
from radixkv.storage.folder import Want

from .kit import PAGE_BYTES, HostPages, digests, ids, page_store

ROOT = Path(__file__).parents[2]
STORED = PAGE_BYTES + 64


def value(key: str, size: int = 1000) -> bytes:
    return np.random.default_rng(list(key.encode())).bytes(size)


def put(storage: FileStorage, *keys: str, size: int = 1000, **options: Any) -> list[bool]:
    flags: list[bool] = storage.put_many(list(keys), [[value(key, size)] for key in keys], **options).tolist()
    return flags


def get(storage: FileStorage, *keys: str, size: int = 1000) -> list[bool]:
    """Which values are there. Those that are must be right."""
    buffers = [bytearray(size) for _ in keys]
    sizes = storage.get_many(list(keys), [[buffer] for buffer in buffers]).tolist()
    for key, buffer, found in zip(keys, buffers, sizes, strict=True):
        assert found in (-1, size)
        assert found == -1 or buffer == value(key, size), key
    return [found == size for found in sizes]


def segments(folder: Path) -> list[Path]:
    return sorted((folder / "segments").glob("??/*"))


def disk_bytes(folder: Path) -> int:
    """Blocks of all segments, those being written too. Under the lock none comes or goes, but one may be renamed."""
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    sizes: dict[str, int] = {}
    for path in [*(folder / "tmp").glob("*-*"), *segments(folder)]:
        with contextlib.suppress(FileNotFoundError):
            sizes[path.name[-16:]] = -(-path.stat().st_size // 4096) * 4096
    os.close(fd)
    return sum(sizes.values())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def storage(folder: Path) -> Iterator[FileStorage]:
    made = FileStorage(folder)
    yield made
    made.close()


# ---- on disk ---------------------------------------------------------------------------------------------------------
def test_layout_of_a_segment(storage: FileStorage, folder: Path) -> None:
    """As segment.py draws it."""
    storage.put_many(["first", "second"], [[b"abc", b"de"], [b"fgh"]])
    (path,) = segments(folder)
    data = path.read_bytes()
    assert path.parent.name == path.name[:2]
    assert len(path.name) == 16
    magic, version, header_bytes, _, entries, key_bytes, file_bytes = struct.unpack_from("<8sHHIIIQ", data)
    assert (magic, version, header_bytes, entries, key_bytes) == (b"RKVSEG\0\x1a", 1, 64, 2, 11)
    assert file_bytes == len(data) == 128 + 8
    rows = [struct.unpack_from("<QQII", data, 64 + 24 * i)[:3] for i in range(2)]
    assert rows == [(128, 5, 5), (133, 3, 6)]
    assert data[112:128] == b"firstsecond" + bytes(5)
    assert data[128:] == b"abcdefgh"
    storage.delete_many(["first"])
    assert struct.unpack_from("<I", path.read_bytes(), 64 + 20) == (0,)


def test_batches_become_segments_of_bounded_size(folder: Path) -> None:
    with FileStorage(folder, segment_bytes=3000) as storage:
        assert all(put(storage, *"abcdefg"))
        assert put(storage, "large", size=10_000) == [True]
    sizes = sorted(path.stat().st_size for path in segments(folder))
    assert [size // 1000 for size in sizes] == [1, 3, 3, 10]


def test_the_folder_is_private(storage: FileStorage, folder: Path) -> None:
    put(storage, "a")
    modes = {path.stat().st_mode & 0o777 for path in [folder, *segments(folder), *(folder / "segments").iterdir()]}
    assert modes == {0o700, 0o600}


def test_a_put_with_fsync_syncs_each_segment_and_the_folder_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    with FileStorage(folder, fsync=True, segment_bytes=2000) as storage:
        put(storage, *"abcdef")
        files = [path for path in synced if "/store/tmp/" in path]
        shard = {str(path.parent) for path in segments(folder)}
        assert len(files) == 3
        assert len(shard) == 1
        assert synced.count(shard.pop()) == 1
        assert str(folder / "segments") in synced  # the shard is new
    synced.clear()
    with FileStorage(folder.parent / "other") as storage:
        put(storage, "a")
    assert not synced


def test_a_new_folder_is_made_by_two_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second comes just before the first has named the folder, and must not take its file for an orphan."""
    met, errors = threading.Event(), []

    def second() -> None:
        try:
            FileStorage(tmp_path / "store").close()
        except BaseException as error:
            errors.append(error)
        met.set()

    other = threading.Thread(target=second)
    rename, flock = Path.rename, fcntl.flock

    def pause(path: Path, target: Path) -> Path:
        if path.name.startswith("FORMAT.") and threading.current_thread() is not other:
            other.start()
            assert met.wait(20)  # it has done all it can: it is through, or waits for the lock
        return rename(path, target)

    def watch(fd: int, operation: int) -> None:
        try:
            flock(fd, operation)
        except BlockingIOError:
            if threading.current_thread() is other:
                met.set()
            raise

    monkeypatch.setattr(Path, "rename", pause)
    monkeypatch.setattr(journal_module.fcntl, "flock", watch)
    with FileStorage(tmp_path / "store") as storage:
        other.join()
        assert errors == []
        assert put(storage, "a") == get(storage, "a") == [True]
        assert storage.stats()["orphans"] == 0


def test_many_come_and_go_on_new_folders(tmp_path: Path) -> None:
    def use(folder: Path, name: str) -> list[bool]:
        with FileStorage(folder, num_threads=1) as storage:
            return put(storage, name)

    with ThreadPoolExecutor(6) as pool:
        for turn in range(30):
            users = [pool.submit(use, tmp_path / str(turn), f"k{number}") for number in range(6)]
            assert [user.result() for user in users] == [[True]] * 6
            with FileStorage(tmp_path / str(turn)) as storage:
                assert get(storage, *(f"k{number}" for number in range(6))) == [True] * 6


def test_unusable_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot be used"):
        FileStorage(tmp_path / "file")
    FileStorage(tmp_path / "store").close()
    (tmp_path / "store" / "FORMAT").write_text("radixkv file storage 99\n")
    with pytest.raises(StorageError, match="storage 99"):
        FileStorage(tmp_path / "store")
    for options in ({"max_bytes": 0}, {"segment_bytes": 0}, {"num_threads": 0}):
        with pytest.raises(InvalidArgumentError, match="must be at least 1"):
            FileStorage(tmp_path / "x", **options)


# ---- damage ----------------------------------------------------------------------------------------------------------
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut in the header": lambda data: data[:40],
    "cut in the index": lambda data: data[:100],
    "cut in the values": lambda data: data[:-1],
    "longer": lambda data: data + b"x",
    "zeros": lambda data: bytes(len(data)),
    "header flipped": lambda data: data[:17] + bytes([data[17] ^ 1]) + data[18:],
    "another version": lambda data: data[:8] + b"\x02" + data[9:],
    "noise": lambda data: np.random.default_rng(0).bytes(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_torn_segment_is_dropped_at_start(folder: Path, damage: str) -> None:
    with FileStorage(folder) as storage:
        put(storage, "a", "b")
        torn = segments(folder)[0]
        put(storage, "c")
    torn.write_bytes(DAMAGES[damage](torn.read_bytes()))
    with FileStorage(folder) as storage:
        assert get(storage, "a", "b", "c") == [False, False, True]
        assert storage.stats()["torn"] == 1
        assert not torn.exists()
        assert put(storage, "a", "b") == [True, True]
        assert get(storage, "a", "b", "c") == [True] * 3


@pytest.mark.parametrize("at", [64, 72, 80, 84, 88 + 5, 112 + 1])
def test_a_damaged_index_entry_is_dropped_alone(folder: Path, at: int) -> None:
    """Its offset, size, key length or sum, the other's size, or its key."""
    with FileStorage(folder) as storage:
        put(storage, "aa", "bb")
        (path,) = segments(folder)
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)
    with FileStorage(folder) as storage:
        found = get(storage, "aa", "bb")
        assert sum(found) <= 1
        assert storage.stats()["torn"] == 2 - sum(found)
        assert storage.stats()["values"] == sum(found)


def test_flipped_and_torn_pages_are_misses(folder: Path) -> None:
    """Every page of a store is damaged in another place: none is served, all are removed, and can be stored again."""
    host = HostPages(40)
    names, pages = digests(20), np.arange(20, dtype=np.int32)
    host.fill(pages, seed=1)
    with FileStorage(folder, segment_bytes=STORED) as storage:
        page_store(storage, host).set_pages(names, pages)
    rng = np.random.default_rng(2)
    for path in segments(folder):
        data = bytearray(path.read_bytes())
        start = len(data) - STORED
        if rng.random() < 0.5:
            data[start + int(rng.integers(STORED))] ^= 1 << int(rng.integers(8))
        else:
            at = start + int(rng.integers(STORED - 1))
            data[at:] = bytes(len(data) - at)
        path.write_bytes(data)
    with FileStorage(folder) as storage:
        store = page_store(storage, host)
        assert store.count_prefix(names) == 20
        assert not store.get_pages(names, pages + 20).any()
        seen = store.counters
        assert seen.removed == seen.corrupt + seen.foreign == 20
        assert store.count_prefix(names) == 0
        assert not segments(folder)
        assert store.set_pages(names, pages).all()
        assert store.get_pages(names, pages + 20).all()


def test_a_segment_that_someone_removed_or_cut_is_a_miss(storage: FileStorage, folder: Path) -> None:
    put(storage, "a", "b")
    (path,) = segments(folder)
    os.truncate(path, path.stat().st_size - 1)
    assert get(storage, "a", "b") == [True, False]
    assert storage.stats()["short"] == 1
    path.unlink()
    assert get(storage, "a") == [False]
    assert storage.exists_many(["a"]).tolist() == [False]
    assert put(storage, "a", "b") == [True, True]
    assert get(storage, "a", "b") == [True, True]


def test_files_of_others_are_left_alone(folder: Path) -> None:
    FileStorage(folder).close()
    strange = [folder / "notes", folder / "segments" / "notes.txt", folder / "segments" / "ab" / "README"]
    for path in strange:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    with FileStorage(folder) as storage:
        put(storage, "a")
        storage.clear()
    assert all(path.exists() for path in strange)


# ---- budget ----------------------------------------------------------------------------------------------------------
def test_least_recently_used_goes_first_and_the_budget_holds(folder: Path) -> None:
    with FileStorage(folder, max_bytes=4 * 4096) as storage:
        for key in "abcd":
            put(storage, key)
        assert get(storage, "a") == [True]
        assert put(storage, "e", "f") == [True, True]  # one segment
        assert storage.exists_many(list("abcdef")).tolist() == [True, False, True, True, True, True]
        put(storage, "g")
        assert storage.exists_many(list("abcdefg")).tolist() == [True, False, False, True, True, True, True]
        assert disk_bytes(folder) <= 4 * 4096
        assert (storage.stats()["evicted_segments"], storage.stats()["evicted_values"]) == (2, 2)


def test_order_of_use_outlives_the_process(folder: Path) -> None:
    with FileStorage(folder) as storage:
        for key in "abcd":
            put(storage, key)
        get(storage, "b")
        get(storage, "a")
    with FileStorage(folder, max_bytes=4 * 4096) as storage:
        put(storage, "e")
        assert storage.exists_many(list("abcde")).tolist() == [True, True, False, True, True]
        put(storage, "f", "g", size=3000)  # needs two blocks
        assert storage.exists_many(list("abcdefg")).tolist() == [True, False, False, False, True, True, True]


def test_what_others_use_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radixkv.storage.folder.TOUCH_NS", 0)
    with FileStorage(folder, max_bytes=3 * 4096) as one, FileStorage(folder, max_bytes=3 * 4096) as other:
        for key in "abc":
            put(one, key)
        assert get(other, "a") == [True]
        put(one, "d")
        assert one.exists_many(list("abcd")).tolist() == [True, False, True, True]


def test_a_smaller_budget_at_start(folder: Path) -> None:
    with FileStorage(folder) as storage:
        for key in "abcdefgh":
            put(storage, key)
    with FileStorage(folder, max_bytes=3 * 4096) as storage:
        assert disk_bytes(folder) == 3 * 4096
        assert storage.exists_many(list("abcdefgh")).tolist() == [False] * 5 + [True] * 3


def test_what_can_never_fit_is_refused_and_evicts_nothing(folder: Path) -> None:
    with FileStorage(folder, max_bytes=3 * 4096, segment_bytes=1000) as storage:
        put(storage, "a")
        assert put(storage, "large", size=20_000) == [False]
        assert storage.stats()["refused"] == 1
        assert get(storage, "a") == [True]
        flags = put(storage, *"bcdefg")  # a batch larger than the budget: what is being written is not evicted for it
        assert sum(flags) == 3
        assert disk_bytes(folder) <= 3 * 4096


def test_a_value_that_is_put_again_is_used(folder: Path) -> None:
    with FileStorage(folder, max_bytes=3 * 4096) as storage:
        for key in "abcab":
            put(storage, key)
        put(storage, "d")
        assert storage.exists_many(list("abcd")).tolist() == [True, True, False, True]


# ---- a disk that fails -----------------------------------------------------------------------------------------------
def failing(monkeypatch: pytest.MonkeyPatch, name: str, code: int, below: str) -> list[int]:
    """os.NAME raises for files whose path has ``below`` in it; the list says how often."""
    real, calls = getattr(os, name), []

    def fail(first: Any, *arguments: Any, **options: Any) -> Any:
        path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
        if below in path:
            calls.append(code)
            raise OSError(code, os.strerror(code))
        return real(first, *arguments, **options)

    monkeypatch.setattr(os, name, fail)
    return calls


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("name", ["open", "pwritev", "fsync", "rename"])
def test_a_write_that_fails_is_false_and_counted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    with FileStorage(folder, fsync=True, max_bytes=1 << 20) as storage:
        put(storage, "before")
        with monkeypatch.context() as patch:
            calls = failing(patch, name, code, "/store/tmp/")
            assert put(storage, "a", "b") == [False, False]
            assert calls
        counter = "no_room" if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "io_errors"
        assert storage.stats()[counter] == 1
        assert storage.stats()["reserved_bytes"] == 0
        assert not list((folder / "tmp").iterdir())
        gone = code in (errno.ENOSPC, errno.EDQUOT)  # room was made on the disk: there it did not help
        assert get(storage, "before", "a") == [not gone, False]
        assert put(storage, "a", "b") == [True, True]
        assert get(storage, "before", "a", "b") == [not gone, True, True]


class SmallDisk:
    """The folder's disk has room for so many segments of one block each, and for what is being written. The rest is
    others'."""

    def __init__(self, folder: Path, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.blocks, self.real = folder, blocks, os.pwritev
        monkeypatch.setattr(os, "pwritev", self.pwritev)

    def pwritev(self, fd: int, *arguments: Any) -> int:
        if len(segments(self.folder)) >= self.blocks:
            raise OSError(errno.ENOSPC, "full")
        return self.real(fd, *arguments)


@pytest.mark.parametrize("max_bytes", [None, 1 << 30])
def test_a_disk_that_is_full_below_the_budget_makes_room(
    folder: Path, monkeypatch: pytest.MonkeyPatch, max_bytes: int | None
) -> None:
    """The least recently used goes, one for each, and no more; with no budget too."""
    with FileStorage(folder, max_bytes=max_bytes) as storage:
        for key in "abcd":
            assert put(storage, key) == [True]
        assert get(storage, "a") == [True]
        SmallDisk(folder, 4, monkeypatch)
        assert put(storage, "e") == [True]
        assert get(storage, *"abcde") == [True, False, True, True, True]
        assert put(storage, "f") == [True]
        stats = storage.stats()
        names = ("evicted_segments", "evicted_values", "no_room", "io_errors", "segments", "reserved_bytes")
        assert [stats[name] for name in names] == [2, 2, 0, 0, 4, 0]
        assert not list((folder / "tmp").iterdir())


def test_a_full_disk_evicts_nothing_that_would_not_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wanted is more than all that can go: the beginning of its own chain cannot."""
    with FileStorage(folder, segment_bytes=1000) as storage:
        assert storage.put_each(["a", "b"], [[value("a")], [value("b")]], after="").all()
        SmallDisk(folder, 2, monkeypatch)
        assert put(storage, "large", size=20_000) == [False]
        assert storage.put_each(["c"], [[value("c")]], after="b").tolist() == [False]
        assert (storage.stats()["no_room"], storage.stats()["evicted_segments"]) == (2, 0)
        assert get(storage, "a", "b") == [True, True]
        assert put(storage, "other") == [True]  # of another chain: the leaf goes, and not what it came after
        assert get(storage, "a", "b", "other") == [True, False, True]


@pytest.mark.parametrize("kind", ["R", "P"])
def test_a_disk_without_room_for_the_journal_makes_room(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Nothing could ever be reserved or published again."""
    with FileStorage(folder) as storage, FileStorage(folder) as other:
        for key in "abc":
            assert put(storage, key) == [True]
        append = journal_module.Journal.append

        def full(self: Any, lines: list[Any]) -> None:
            if len(segments(folder)) >= 3 + (kind == "P") and any(line.kind == kind for line in lines):
                raise OSError(errno.ENOSPC, "full")
            append(self, lines)

        monkeypatch.setattr(journal_module.Journal, "append", full)
        assert put(storage, "d") == [True]
        for each in (storage, other):
            assert get(each, *"abcd") == [False, True, True, True]
            assert each.stats()["reserved_bytes"] == 0


def test_a_disk_without_room_for_a_name_makes_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of a new shard takes a block."""
    with FileStorage(folder) as storage:
        assert put(storage, "a") == [True]
        rename = os.rename

        def full(*arguments: Any) -> None:
            if segments(folder):
                raise OSError(errno.ENOSPC, "full")
            rename(*arguments)

        monkeypatch.setattr(os, "rename", full)
        assert put(storage, "b") == [True]
        assert get(storage, "a", "b") == [False, True]


def test_one_segment_that_fails_takes_no_other_with_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FileStorage(folder, segment_bytes=1000) as storage:
        real, left = os.pwritev, [2]

        def fail(*arguments: Any) -> int:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.EIO, "second")
            return real(*arguments)

        monkeypatch.setattr(os, "pwritev", fail)
        flags = put(storage, *"abcd")
        monkeypatch.undo()
        assert sum(flags) == 3
        assert get(storage, *"abcd") == flags


@pytest.mark.parametrize("name", ["open", "preadv"])
@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_read_that_fails_is_a_miss_and_counted(
    storage: FileStorage, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    put(storage, "a")
    with monkeypatch.context() as patch:
        failing(patch, name, code, "/store/segments/")
        assert get(storage, "a") == [False]
        assert storage.stats()["io_errors"] == 1
    bad = code == errno.EIO  # a sector stays bad: the value has gone, and the next store writes it anew
    assert storage.exists_many(["a"]).tolist() == [not bad]
    assert len(segments(storage.folder.root)) == (not bad)
    assert put(storage, "a") == [True]
    assert get(storage, "a") == [True]


def test_a_bad_sector_costs_only_the_values_on_it(
    storage: FileStorage, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values that are read with one system call; who shares the folder is told, and it is so at the next start too."""
    assert all(put(storage, *"abcd"))
    bad = storage.folder.view.places["b"].entry.offset + 100
    real = os.preadv

    def preadv(fd: int, views: Any, at: int) -> int:
        if at <= bad < at + sum(map(len, views)):
            raise OSError(errno.EIO, "bad sector")
        return real(fd, views, at)

    with FileStorage(folder) as other:
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", preadv)
            assert get(storage, *"abcd") == [True, False, True, True]
        assert storage.stats()["io_errors"] == 1
        for each in (storage, other):
            assert each.exists_many(list("abcd")).tolist() == [True, False, True, True]
        with FileStorage(folder) as later:
            assert later.exists_many(list("abcd")).tolist() == [True, False, True, True]
        assert put(storage, "b") == [True]
        assert get(other, *"abcd") == [True] * 4


@pytest.mark.parametrize("name", ["open", "preadv"])
def test_a_read_that_fails_is_no_use(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What cannot be read would keep out what can: each get, a miss, would make it the last to go."""
    with FileStorage(folder, max_bytes=3 * 4096) as storage:
        for key in "abc":
            put(storage, key)
        with monkeypatch.context() as patch:
            failing(patch, name, errno.EACCES, "/store/segments/")
            assert get(storage, "a") == [False]
            assert get(storage, "a") == [False]
        put(storage, "d")
        assert storage.exists_many(list("abcd")).tolist() == [False, True, True, True]


@pytest.mark.parametrize("name", ["write", "fstat"])
def test_a_journal_that_fails(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with FileStorage(folder, max_bytes=1 << 20) as storage:
        put(storage, "a")
        with monkeypatch.context() as patch:
            failing(patch, name, errno.EIO, "/store/journal")
            if name == "write":
                assert put(storage, "b") == [False]
                assert storage.stats()["io_errors"] >= 1
            else:
                with pytest.raises(StorageError, match="Input/output"):
                    put(storage, "b")
        assert put(storage, "b") == [True]
        assert get(storage, "a", "b") == [True, True]
        assert storage.stats()["reserved_bytes"] == 0


def test_publishing_that_fails_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FileStorage(folder, max_bytes=1 << 20) as storage, FileStorage(folder, max_bytes=1 << 20) as other:
        append = journal_module.Journal.append

        def fail(self: Any, lines: list[Any]) -> None:
            if any(line.kind == "P" for line in lines):
                raise OSError(errno.ENOSPC, "full")
            append(self, lines)

        with monkeypatch.context() as patch:
            patch.setattr(journal_module.Journal, "append", fail)
            assert put(storage, "a") == [False]
        assert not segments(folder)
        assert (storage.stats()["no_room"], storage.stats()["reserved_bytes"]) == (1, 0)
        assert put(other, "a") == [True]
        assert other.stats()["reserved_bytes"] == 0
        assert get(storage, "a") == [True]


def test_a_really_full_disk(tmp_path: Path) -> None:
    """A tmpfs of 1 MiB if it can be mounted, else a process that may write files of 300 KiB at most."""
    code = """
import resource, signal, sys
from tests.storage.test_file import *
storage = FileStorage(sys.argv[1], segment_bytes=200_000)
if sys.argv[2] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
stored = {key: put(storage, key, size=160_000)[0] for key in "abcdefgh"}
full = sys.argv[2] == "mounted"  # with a limit on files, that others go is no help
assert all(stored.values()) == full, stored
assert storage.stats()["no_room"] == 8 - sum(stored.values()), storage.stats()
there = get(storage, *stored, size=160_000)
assert there == [False] * 2 * full + [full] * (8 - 2 * full), there
assert storage.stats()["evicted_segments"] == 2 * full, storage.stats()
assert put(storage, "small", size=10) == [True]
storage.clear()
assert put(storage, "again", size=1000) == [True]
storage.close()
print(sum(there))
"""
    target = tmp_path / "disk"
    target.mkdir()
    mounted = os.geteuid() == 0 and not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(target)], capture_output=True, check=False
    ).returncode
    try:
        run = [sys.executable, "-c", code, str(target / "store"), "mounted" if mounted else "limit"]
        done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) == (6 if mounted else 0)
    finally:
        if mounted:
            subprocess.run(["umount", str(target)], check=True)


# ---- deadlines -------------------------------------------------------------------------------------------------------
def test_a_slow_disk_ends_at_the_deadline_and_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FileStorage(folder, max_bytes=1 << 30) as storage:
        put(storage, "a", size=10 << 20)
        slow: dict[str, Any] = {name: getattr(os, name) for name in ("pwritev", "preadv")}
        for name, real in slow.items():
            monkeypatch.setattr(os, name, lambda *args, real=real: (time.sleep(0.06), real(*args))[1])
        start = time.monotonic()
        with pytest.raises(StorageTimeoutError, match=r"put_many did not end within 0.1 s"):
            put(storage, "b", size=20 << 20, timeout_s=0.1)
        with pytest.raises(StorageTimeoutError, match="get_many"):
            storage.get_many(["a", "a"], [[bytearray(10 << 20)], [bytearray(10 << 20)]], timeout_s=0.05)
        assert time.monotonic() - start < 2
        monkeypatch.undo()
        assert not list((folder / "tmp").iterdir())
        assert len(segments(folder)) == 1
        assert storage.stats()["reserved_bytes"] == 0
        assert put(storage, "b", size=20 << 20) == [True]


def test_a_lock_that_a_stopped_process_holds_delays_writers_only(folder: Path) -> None:
    with FileStorage(folder, max_bytes=1 << 20) as storage:
        put(storage, "a")
        fd = os.open(folder / "lock", os.O_RDWR)
        fcntl.flock(fd, fcntl.LOCK_EX)
        start = time.monotonic()
        with pytest.raises(StorageTimeoutError, match="another process kept"):
            put(storage, "b", timeout_s=0.1)
        assert get(storage, "a") == [True]
        assert storage.exists_many(["a", "b"], timeout_s=1).tolist() == [True, False]
        assert time.monotonic() - start < 5
        os.close(fd)
        assert put(storage, "b") == [True]


# ---- several processes -----------------------------------------------------------------------------------------------
WRITER = """
import sys
from tests.storage.test_file import *
seed, folder = int(sys.argv[1]), Path(sys.argv[2])
storage = FileStorage(folder, max_bytes=int(sys.argv[3]), segment_bytes=3 * STORED, num_threads=2)
host = HostPages(16)
store = page_store(storage, host)
rng = np.random.default_rng(seed)
print("ready", flush=True)
for turn in range(int(sys.argv[4])):
    which = rng.integers(0, 60, 8)
    names = np.concatenate([digests(1, seed=int(w)) for w in which])
    if rng.random() < 0.6:
        for i, w in enumerate(which):
            host.fill(ids(i), seed=int(w))
        store.set_pages(names, np.arange(8, dtype=np.int32))
    else:
        good = store.get_pages(names, np.arange(8, 16, dtype=np.int32))
        for i, w in enumerate(which):
            if good[i]:
                expected = np.random.default_rng(int(w)).integers(0, 256, (2, 1, PAGE_BYTES // 2), np.uint8)
                assert (host.read(ids(8 + i))[0] == expected.reshape(-1)).all(), "WRONG PAGE"
    if rng.random() < 0.05:
        storage.delete_many(store.keys(names)[:2])
seen = store.counters
print(seen.hits, seen.corrupt + seen.foreign + seen.short, seen.errors + seen.timeouts, flush=True)
storage.close()
"""


def start_writer(seed: int, folder: Path, max_bytes: int, turns: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(seed), str(folder), str(max_bytes), str(turns)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_that_share_a_folder_and_its_budget(folder: Path) -> None:
    budget = 30 * 4096
    writers = [start_writer(seed, folder, budget, 150) for seed in range(3)]
    most = 0
    while any(writer.poll() is None for writer in writers):
        most = max(most, disk_bytes(folder) if (folder / "tmp").exists() else 0)
        time.sleep(0.002)
    hits = 0
    for writer in writers:
        out, err = writer.communicate()
        assert writer.returncode == 0, err
        found, wrong, failed = map(int, out.split()[1:])
        assert (wrong, failed) == (0, 0)
        hits += found
    assert hits > 0
    assert 0 < most <= budget
    with FileStorage(folder) as storage:
        assert storage.stats()["torn"] == storage.stats()["orphans"] == 0
        assert storage.stats()["used_bytes"] == disk_bytes(folder) <= budget
        assert not list((folder / "tmp").iterdir())


def test_kill_9_during_writes(folder: Path) -> None:
    """Writers are killed at random moments; one that lives goes on; nothing wrong is read, nothing is left behind."""
    budget, rng = 40 * 4096, np.random.default_rng(0)
    with FileStorage(folder, max_bytes=budget) as watcher:
        for seed in range(5):
            writer = start_writer(seed, folder, budget, 1_000_000)
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            time.sleep(float(rng.uniform(0.02, 0.25)))  # a moment that nobody chose
            writer.send_signal(signal.SIGKILL)
            _, err = writer.communicate()
            assert "WRONG PAGE" not in err
            put(watcher, f"mine{seed}")
            assert disk_bytes(folder) <= budget
        for number in range(60):  # over the budget: the room of the dead is found
            assert put(watcher, f"more{number}") == [True]
        assert watcher.stats()["reserved_bytes"] == 0
        assert disk_bytes(folder) <= budget
        assert get(watcher, "more59") == [True]
    host = HostPages(120)
    with FileStorage(folder, max_bytes=budget) as storage:
        assert storage.stats()["torn"] == 0
        assert not list((folder / "tmp").iterdir())
        store = page_store(storage, host)
        names = np.concatenate([digests(1, seed=number) for number in range(60)])
        flags = store.get_pages(names, np.arange(60, dtype=np.int32))
        assert store.counters.hits == flags.sum()
        assert store.counters.corrupt + store.counters.foreign + store.counters.short == 0
        for number in np.flatnonzero(flags).tolist():
            expected = np.random.default_rng(number).integers(0, 256, (2, 1, PAGE_BYTES // 2), np.uint8)
            np.testing.assert_array_equal(host.read(ids(number))[0], expected.reshape(-1))


DIES = """
import sys
from tests.storage.test_file import *
storage = FileStorage(sys.argv[1], max_bytes=6 * 4096)
die = lambda *args, **options: os.kill(os.getpid(), signal.SIGKILL)
place, name = sys.argv[2].rsplit(".", 1)
import radixkv.storage.folder, radixkv.storage.file
setattr(eval(place), name, die)
put(storage, "dead")
"""


@pytest.mark.parametrize(("place", "survives"), [
    ("os.pwritev", False), ("os.rename", False), ("radixkv.storage.folder.Folder.publish", True),
])  # fmt: skip
def test_a_process_that_dies_in_the_middle_of_a_put(folder: Path, place: str, survives: bool) -> None:
    """Before, or after its segment is in place: whoever lives takes over what it reserved."""
    with FileStorage(folder, max_bytes=6 * 4096) as storage:
        put(storage, "a")
        command = [sys.executable, "-c", DIES, str(folder), place]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert storage.stats()["reserved_bytes"] == 4096
        flags = [put(storage, f"more{number}")[0] for number in range(4 if survives else 5)]
        assert flags == [True] * len(flags)
        put(storage, "last")  # only now its room is needed
        assert storage.stats()["reserved_bytes"] == 0
        assert storage.stats()["orphans"] == 1
        assert get(storage, "dead") == [survives]
        assert disk_bytes(folder) <= 6 * 4096
        assert not list((folder / "tmp").iterdir())


def test_one_that_leaves_while_another_looks_who_lives(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leaving, real = FileStorage(folder), fcntl.flock

    def flock(fd: int, operation: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").endswith(leaving.folder.journal.owner):
            monkeypatch.undo()
            leaving.close()
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with FileStorage(folder) as storage:
        assert put(storage, "a") == [True]


def test_orphans_are_removed_at_start(folder: Path) -> None:
    FileStorage(folder).close()
    subprocess.run([sys.executable, "-c", DIES, str(folder), "os.rename"], cwd=ROOT, capture_output=True, check=False)
    assert len(list((folder / "tmp").iterdir())) == 1
    with FileStorage(folder) as storage:
        assert storage.stats()["orphans"] == 1
        assert not list((folder / "tmp").iterdir())
        assert len(list((folder / "owners").iterdir())) == 1


def test_news_outlive_a_new_journal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "_MAX_BYTES", 400)
    with FileStorage(folder) as one, FileStorage(folder) as other:
        inodes = set()  # a number is used again, but not at once
        for number in range(50):
            inodes.add((folder / "journal").stat().st_ino)
            put(one if number % 2 else other, f"k{number}")
            assert get(other if number % 2 else one, f"k{number}") == [True]
        assert len(inodes) > 1
        assert (folder / "journal").stat().st_size < 2000
        one.delete_many(["k3"])
        assert get(other, "k3") == [False]


def test_who_slept_through_several_journals_reads_the_folder_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else values stay unseen, room is counted wrong, and reservations stay for ever."""
    monkeypatch.setattr(journal_module, "_MAX_BYTES", 400)
    budget = 10 * 4096
    with FileStorage(folder, max_bytes=budget) as idle, FileStorage(folder, max_bytes=budget) as busy:
        put(idle, "before")
        for number in range(40):
            put(busy, f"k{number}")
        names = [f"k{number}" for number in range(40)]
        assert idle.exists_many(names).tolist() == busy.exists_many(names).tolist() == [False] * 30 + [True] * 10
        for name in ("segments", "values", "used_bytes", "reserved_bytes"):
            assert idle.stats()[name] == busy.stats()[name], name
        for number in range(40, 52):
            assert put(idle, f"k{number}") == [True]
            assert disk_bytes(folder) <= budget
        assert get(busy, "k51", "before") == [True, False]


def test_whoever_comes_next_ends_a_replacement_that_was_cut_short(folder: Path) -> None:
    with FileStorage(folder) as one, FileStorage(folder) as other:
        put(one, "a")
        with (folder / "journal").open("ab") as journal:  # as if it had died before the rename
            journal.write(b"E\n")
        assert get(other, "a") == [True]
        put(other, "b")
        put(one, "c")
        assert get(one, "a", "b", "c") == get(other, "a", "b", "c") == [True] * 3


def test_damaged_lines_of_the_journal_are_skipped(folder: Path) -> None:
    with FileStorage(folder, max_bytes=1 << 20) as one, FileStorage(folder, max_bytes=1 << 20) as other:
        put(one, "a")
        with (folder / "journal").open("ab") as journal:
            journal.write(b"\xff\xfe\nP nonsense\nR ../../etc x y\nP ../../../etc/passwd 4096\nD\nQ x\nR half")
        assert get(other, "a") == [True]
        put(one, "b")
        assert get(other, "a", "b") == [True, True]
        assert one.stats()["reserved_bytes"] == other.stats()["reserved_bytes"] == 0


def test_a_forked_child_is_refused(storage: FileStorage) -> None:
    put(storage, "a")
    child = os.fork()
    if child == 0:
        try:
            storage.exists_many(["a"])
        except StorageError:
            storage.close()
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert get(storage, "a") == [True]
    assert put(storage, "b") == [True]


def test_a_changed_model_finds_nothing(folder: Path) -> None:
    from .kit import namespace

    host = HostPages(4)
    host.fill(ids(0), seed=1)
    with FileStorage(folder) as storage:
        page_store(storage, host).set_pages(digests(1), ids(0))
    with FileStorage(folder) as storage:
        changed = page_store(storage, host, namespace=namespace(model="tiny@2"))
        assert changed.count_prefix(digests(1)) == 0
        assert not changed.get_pages(digests(1), ids(1)).any()
        assert page_store(storage, host).get_pages(digests(1), ids(1)).all()


def test_threads_that_write_and_evict(folder: Path) -> None:
    with FileStorage(folder, max_bytes=20 * 4096, segment_bytes=2500) as storage:
        errors: list[BaseException] = []

        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            try:
                for _ in range(60):
                    keys = [f"k{i}" for i in rng.integers(0, 50, 5)]
                    put(storage, *keys) if rng.random() < 0.5 else get(storage, *keys)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert storage.stats()["used_bytes"] == disk_bytes(folder) <= 20 * 4096
        assert storage.stats()["reserved_bytes"] == 0


def test_the_benchmark_measures_what_it_says(tmp_path: Path) -> None:
    from bench import bench_storage

    row = bench_storage.measure(tmp_path, "64 x 1 MiB", "pages", False, 1)
    assert row["put_ratio"] > 0
    assert row["get_mib_s"] > 0
    assert len(bench_storage.checks_of([row])) == 2
    assert not list(tmp_path.glob("store"))


def test_eviction_that_the_disk_refuses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FileStorage(folder, max_bytes=2 * 4096) as storage:
        put(storage, "a")
        put(storage, "b")
        with monkeypatch.context() as patch:
            failing(patch, "unlink", errno.EROFS, "/store/segments/")
            assert put(storage, "c") == [False]
        assert storage.stats()["io_errors"] == 2
        assert get(storage, "a", "b", "c") == [True, True, False]


def test_a_delete_that_the_disk_refuses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is gone for all who live; the next start finds it again."""
    with FileStorage(folder) as storage, FileStorage(folder) as other:
        put(storage, "a", "b")
        with monkeypatch.context() as patch:
            failing(patch, "open", errno.EROFS, "/store/segments/")
            storage.delete_many(["a"])
        assert storage.stats()["io_errors"] == 1
        assert get(storage, "a", "b") == get(other, "a", "b") == [False, True]
        segments(folder)[0].unlink()
        storage.delete_many(["b"])
        assert get(other, "b") == [False]


def test_an_index_longer_than_the_first_read(folder: Path) -> None:
    keys = [f"{number:0200d}" for number in range(300)]
    with FileStorage(folder) as storage:
        put(storage, *keys, size=10)
        assert len(segments(folder)) == 1
    with FileStorage(folder) as storage:
        assert all(get(storage, *keys, size=10))
        assert storage.stats()["torn"] == 0


def test_a_segment_that_cannot_be_read_at_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FileStorage(folder) as storage:
        put(storage, "a")
    for name in ("open", "pread"):
        with monkeypatch.context() as patch:
            failing(patch, name, errno.EIO, "/store/segments/")
            with FileStorage(folder) as storage:
                assert get(storage, "a") == [False]
                assert storage.stats()["io_errors"] == 1
                assert len(segments(folder)) == 1  # it may be whole
    with FileStorage(folder) as storage:
        assert get(storage, "a") == [True]


def test_many_that_start_at_once(folder: Path) -> None:
    """As the ranks of a group do, in a folder that is not there yet."""
    with ThreadPoolExecutor(8) as pool:
        stores = list(pool.map(lambda _: FileStorage(folder), range(8)))
    for number, storage in enumerate(stores):
        assert put(storage, f"k{number}") == [True]
    assert all(all(get(storage, *(f"k{number}" for number in range(8)))) for storage in stores)
    for storage in stores:
        storage.close()
    assert not list((folder / "owners").iterdir())


def test_the_order_of_eviction_does_not_grow_with_time(storage: FileStorage) -> None:
    for number in range(300):
        put(storage, f"k{number}", size=1)
        storage.clear()
    assert len(storage.folder.view._order) < 200


def test_a_segment_that_cannot_be_read_at_start_counts_against_the_budget(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many open files, for a moment: what nobody knows would stay on disk beside a whole budget of others."""
    with FileStorage(folder, max_bytes=6 * 4096) as storage:
        for number in range(6):
            assert put(storage, f"old{number}") == [True]
    with monkeypatch.context() as patch:
        real = os.open

        def fails(path: Any, *arguments: Any, **more: Any) -> int:
            if "segments" in str(path):
                raise OSError(errno.EMFILE, "too many open files")
            return real(path, *arguments, **more)

        patch.setattr(os, "open", fails)
        storage = FileStorage(folder, max_bytes=6 * 4096)
    with storage:
        assert storage.stats()["io_errors"] == 6
        assert storage.stats()["used_bytes"] == 6 * 4096
        for number in range(8):
            assert put(storage, f"new{number}") == [True]
            assert disk_bytes(folder) <= 6 * 4096
        assert get(storage, "new7") == [True]


@pytest.mark.parametrize(("call", "errors"), [
    ("pwritev", [OSError(errno.ENOSPC, "full")]), ("pwritev", [StorageTimeoutError("late")]),
    ("rename", [FileNotFoundError(errno.ENOENT, "the shard's first"), OSError(errno.EIO, "and then")]),
])  # fmt: skip
def test_a_put_that_fails_lets_go_of_the_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: str, errors: list[Exception]
) -> None:
    """Without waiting for the garbage collector: a host pool whose bytes somebody still sees cannot be closed."""

    def fails(*_: Any) -> None:
        error = next(coming)
        raise type(error)(*error.args)

    coming = iter(errors)
    memory = mmap.mmap(-1, 4096)
    gc.disable()
    try:
        with FileStorage(folder) as storage:
            monkeypatch.setattr(os, call, fails)
            with contextlib.suppress(StorageTimeoutError):
                storage.put_many(["a"], [[memoryview(memory)[:100]]])
            memory.close()  # BufferError: exported pointers exist
    finally:
        gc.enable()


def test_a_torn_segment_that_cannot_be_removed_keeps_nobody_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FileStorage(folder) as storage:
        put(storage, "torn")
    (torn,) = (folder / "segments").glob("??/*")
    os.truncate(torn, 100)
    unlink = Path.unlink

    def refused(path: Path, missing_ok: bool = False) -> None:
        if path == torn:
            raise PermissionError(errno.EACCES, "another user's", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)
    with FileStorage(folder, max_bytes=2 * 4096) as storage:
        assert {name: storage.stats()[name] for name in ("torn", "io_errors", "used_bytes")} == {
            "torn": 1, "io_errors": 1, "used_bytes": 4096,
        }  # fmt: skip
        assert put(storage, "a") == [True]
        assert get(storage, "a") == [True]


def test_a_full_disk_does_not_cut_the_journal_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a new journal would be taken for the whole: what it does not name is forgotten."""
    log, line = journal_module.Journal(tmp_path), journal_module.Line
    with log.exclusive(Deadline(30.0, "test")):
        log.join()
        before = (tmp_path / "journal").read_bytes()
        write = os.write
        monkeypatch.setattr(journal_module.os, "write", lambda fd, data: write(fd, data[: len(data) // 2]))
        with pytest.raises(OSError, match="only a part"):
            log.replace([line("R", "a" * 32, 100, "b" * 16), line("R", "c" * 32, 100, "d" * 16)])
        monkeypatch.undo()
        assert (tmp_path / "journal").read_bytes() == before
        log.replace([])
    log.leave()


@pytest.mark.parametrize("call", ["stat", "open"])
def test_a_put_that_fails_while_room_is_made_reserves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Of the leaf to go (ESTALE), or of another process's owner file (EMFILE)."""
    with FileStorage(folder, max_bytes=4 * 4096, segment_bytes=1000) as storage, FileStorage(folder) as other:
        for number in range(4):
            assert put(storage, f"old{number}") == [True]
        other.folder.reserve([Want(1, "", ["z"])], Deadline(1.0, "test"))
        with monkeypatch.context() as patch:
            failing(patch, call, errno.ESTALE, "/segments/" if call == "stat" else "/owners/")
            for number in range(6):
                put(storage, f"b{number}", f"c{number}")
        assert storage.stats()["reserved_bytes"] == 4096, "of the other one"
        assert len(storage.folder.view.reserved) == 1
        for number in range(6):
            assert put(storage, f"new{number}") == [True], "a leaf that could not be looked at once goes later"
            assert disk_bytes(folder) <= 4 * 4096


def test_a_folder_that_was_emptied_under_a_process(folder: Path) -> None:
    """rm -rf FOLDER/*, and another process starts: with two locks neither would know what the other one writes."""
    with FileStorage(folder, max_bytes=4 * 4096) as storage:
        assert put(storage, "a", "b") == [True] * 2
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        with pytest.raises(StorageError, match="removed or replaced"):
            put(storage, "c")
        with FileStorage(folder, max_bytes=4 * 4096) as other:
            for number in range(6):
                with pytest.raises(StorageError, match="removed or replaced"):
                    put(storage, f"c{number}")
                assert put(other, f"d{number}") == [True]
                assert disk_bytes(folder) <= 4 * 4096
            assert get(storage, "a", "b") == [False] * 2


@pytest.mark.parametrize("restarted", [True, False])
def test_a_clock_that_was_ahead(folder: Path, monkeypatch: pytest.MonkeyPatch, restarted: bool) -> None:
    """What was used in the future is not used last for a year: what is new would go first all the time."""
    real, year_ns = time.time_ns, 365 * 86400 * 10**9
    with monkeypatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: real() + year_ns)
        storage = FileStorage(folder, max_bytes=4 * 4096)
        for number in range(4):
            assert put(storage, f"old{number}") == [True]
        for path in segments(folder):
            os.utime(path, ns=(real() + year_ns,) * 2)  # the kernel's clock was ahead, too
    if restarted:
        storage.close()
        storage = FileStorage(folder, max_bytes=4 * 4096)
    with storage:
        for number in range(8):
            assert put(storage, f"new{number}") == [True]
        assert get(storage, *(f"new{number}" for number in range(4, 8))) == [True] * 4
    assert all(path.stat().st_mtime_ns <= real() + year_ns / 2 for path in segments(folder)) or not restarted


def test_a_child_of_one_that_was_killed_keeps_no_lock(folder: Path) -> None:
    """Forked, not spawned, while its parent was in the middle of a put."""
    ours, theirs = os.pipe()
    if not (parent := os.fork()):
        storage = FileStorage(folder, max_bytes=8 << 20)
        storage.folder.reserve([Want(4 << 20, "", ["x"])], Deadline(1.0, "test"))
        with storage.folder.journal.exclusive(Deadline(1.0, "test")):
            if not (child := os.fork()):
                os.close(theirs)
                time.sleep(60)
                os._exit(0)
            os.write(theirs, str(child).encode())
            os.kill(os.getpid(), signal.SIGKILL)
    child = int(os.read(ours, 20))
    os.waitpid(parent, 0)
    os.close(ours)
    os.close(theirs)
    try:
        began = time.monotonic()
        with FileStorage(folder, max_bytes=8 << 20) as storage:
            assert time.monotonic() - began < 5
            assert storage.stats()["reserved_bytes"] == 0
            assert put(storage, "a") == [True]
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_start_that_fails_leaves_no_file_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        failing(patch, "fsync", errno.EIO, "/store")
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(StorageError):
            FileStorage(folder, fsync=True)
        assert len(os.listdir("/proc/self/fd")) == before
    assert not list((folder / "owners").iterdir())


def test_what_a_put_makes_room_of_is_not_said_to_be_there(folder: Path) -> None:
    with FileStorage(folder, max_bytes=4 * 4096, segment_bytes=1000) as storage:
        assert put(storage, "a", "b") == [True] * 2
        flags = put(storage, "a", "c", "d", "e", "f")
        assert flags == storage.exists_many(["a", "c", "d", "e", "f"]).tolist() == [False, True, True, True, True]
