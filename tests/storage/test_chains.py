"""Chains in the file backend: room is made at their ends, so that all that is left can be reached from their start."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radixkv.storage.base import Deadline
from radixkv.storage.file import FileStorage
from radixkv.storage.folder import Want
from radixkv.storage.segment import encode_index

from .test_file import ROOT, disk_bytes, get, put, segments, value

SIZE = 1000
SEGMENT = 4096
"""On disk, of one or two values."""


def put_chain(storage: FileStorage, keys: Sequence[str], after: str = "") -> list[bool]:
    flags: list[bool] = storage.put_each(keys, [[value(key, SIZE)] for key in keys], after=after).tolist()
    return flags


def present(storage: FileStorage, *keys: str) -> list[bool]:
    flags: list[bool] = storage.exists_many(keys).tolist()
    return flags


def names(path: tuple[int, ...]) -> list[str]:
    """Keys of a path in a tree, from the root on: each says which path leads to it."""
    return ["p" + "".join(f"-{step}" for step in path[: end + 1]) for end in range(len(path))]


def before(key: str) -> str | None:
    return key.rpartition("-")[0] if key.count("-") > 1 else None


def assert_closed(storage: FileStorage) -> int:
    """Each value is there with all before it. Returns: values."""
    storage.stats()  # news of others
    there = set(storage.folder.view.places)
    orphans = sorted(key for key in there if (previous := before(key)) is not None and previous not in there)
    assert not orphans, f"{orphans[:5]} of {len(there)} without what comes before"
    assert all(get(storage, *sorted(there), size=SIZE))
    return len(there)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def storage(folder: Path) -> Iterator[FileStorage]:
    made = FileStorage(folder, max_bytes=4 * SEGMENT, segment_bytes=2 * SIZE)
    yield made
    made.close()


# ---- what goes -------------------------------------------------------------------------------------------------------
def test_a_prefix_that_nobody_reads_outlives_the_suffixes_that_come_and_go(folder: Path) -> None:
    """Served from the device all the time, it is never touched here; yet it is what a restart needs."""
    with FileStorage(folder, max_bytes=8 * SEGMENT, segment_bytes=2 * SIZE) as storage:
        system = [f"s{page}" for page in range(6)]
        assert all(put_chain(storage, system))
        for chat in range(40):
            assert all(put_chain(storage, [f"chat{chat}-{page}" for page in range(2)], after=system[-1]))
        assert storage.stats()["evicted_segments"] == 40 - (8 - 3)
    with FileStorage(folder, max_bytes=8 * SEGMENT) as storage:
        assert present(storage, *system) == [True] * 6
        assert [present(storage, f"chat{chat}-0") for chat in range(34, 40)] == [[False]] + [[True]] * 5
        for at in range(8):
            put(storage, f"other{at}")  # what it read at its start holds, too
        assert present(storage, *system[:2]) == [False, False], "without followers it is as any other"


def test_of_leaves_the_least_recently_used_goes_first(storage: FileStorage) -> None:
    for key in ("a", "b", "c"):
        put_chain(storage, [key], after="")
    put_chain(storage, ["a1"], after="a")
    get(storage, "b", size=SIZE)
    put(storage, "new")
    assert present(storage, "a", "a1", "b", "c", "new") == [True, True, True, False, True]
    put(storage, "newer")
    assert present(storage, "a", "a1", "b") == [True, False, True]
    put(storage, "newest")  # "a" counts as used when its follower was
    assert present(storage, "a", "b") == [False, True]


def test_what_is_being_written_keeps_what_comes_before_it(folder: Path) -> None:
    """Room for the follower must not be that of its predecessor, whoever makes it."""
    with FileStorage(folder, max_bytes=3 * SEGMENT) as mine, FileStorage(folder, max_bytes=3 * SEGMENT) as theirs:
        put_chain(mine, ["first"])
        put(mine, "x", "y", size=SIZE)
        drafts = mine.folder.reserve([Want(SIZE, "first", ["second"])], Deadline(None, ""))
        assert drafts[0] is not None
        assert put(theirs, "z") == [True]
        assert put(theirs, "big", size=2 * SEGMENT) == [False]  # it waits for nobody, and breaks no chain
        assert present(mine, "first", "x", "z") == [True, False, True], "what is refused has cost nobody its place"
        assert theirs.stats()["refused"] == 1
        mine.folder.give_up([draft for draft in drafts if draft], Deadline(None, ""))
        put(mine, "told")
        assert put(theirs, "big", size=2 * SEGMENT) == [True]
        assert present(mine, "first") == [False]
        assert disk_bytes(folder) <= 3 * SEGMENT


def test_a_follower_does_not_take_the_room_of_what_it_follows(storage: FileStorage) -> None:
    put_chain(storage, ["oldest"])
    for key in "abc":
        put(storage, key)
    assert put_chain(storage, ["follower"], after="oldest") == [True]
    assert present(storage, "oldest", "a", "b", "c") == [True, False, True, True]


def test_a_chain_longer_than_the_budget_keeps_its_beginning(storage: FileStorage, folder: Path) -> None:
    keys = [f"k{page}" for page in range(20)]
    assert put_chain(storage, keys) == [True] * 8 + [False] * 12
    assert storage.stats()["refused"] + storage.stats()["gaps"] == 12
    assert put_chain(storage, ["k8"], after="k7") == [False]
    assert present(storage, *keys) == [True] * 8 + [False] * 12
    assert put(storage, "other") == [True]
    assert present(storage, *keys[:8]) == [True] * 6 + [False] * 2
    assert disk_bytes(folder) <= 4 * SEGMENT


def test_a_prompt_longer_than_the_budget_is_written_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tail is asked for at every hit, at once and node by node: nothing is written or removed for it again."""
    written: list[int] = []
    pwritev = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda *call: (written.append(pwritev(*call)), written[-1])[1])
    prompt = [f"k{page}" for page in range(64)]
    with FileStorage(folder, max_bytes=8 * SEGMENT, segment_bytes=2 * SIZE) as storage:
        assert put_chain(storage, prompt) == [True] * 16 + [False] * 48
        assert (storage.stats()["refused"], storage.stats()["gaps"]) == (48, 0), "all of it for want of room"
        once = sum(written)
        assert once <= 8 * SEGMENT
        for _ in range(20):
            assert put_chain(storage, prompt) == [True] * 16 + [False] * 48
            for page in range(16, 20):  # as the controller would, a node at a time
                assert put_chain(storage, prompt[page : page + 1], after=prompt[page - 1]) == [False]
        assert sum(written) == once
        assert storage.stats()["evicted_segments"] == 0 == storage.lost()
        assert storage.stats()["gaps"] == 20 * 3, "of nodes after one that is not there"
        assert put(storage, "other") == [True]  # and it keeps nobody out: its end makes room, as any other's
        assert present(storage, *prompt[:16], "other") == [True] * 14 + [False] * 2 + [True]
        assert put_chain(storage, prompt[14:], after=prompt[13]) == [True] * 2 + [False] * 48  # once: "other" is older
        assert put_chain(storage, prompt[14:], after=prompt[13]) == [True] * 2 + [False] * 48
        assert sum(written) <= once + 2 * SEGMENT
        assert present(storage, "other") == [False]
    assert disk_bytes(folder) <= 8 * SEGMENT


def test_a_tail_that_cannot_fit_does_not_drive_others_out(folder: Path) -> None:
    """What could be removed is less than what is asked for: nothing is."""
    with FileStorage(folder, max_bytes=8 * SEGMENT, segment_bytes=4 * SEGMENT) as storage:
        head = [f"k{page}" for page in range(6)]
        for page, key in enumerate(head):
            assert put_chain(storage, [key], after=head[page - 1] if page else "") == [True]
        assert put(storage, "a") == put(storage, "b") == [True]
        big = [[value("tail", 3 * SEGMENT)]]
        for _ in range(3):
            assert storage.put_each(["tail"], big, after=head[-1]).tolist() == [False]
        assert storage.stats()["evicted_segments"] == 0
        assert present(storage, *head, "a", "b") == [True] * 8
        assert storage.put_each(["tail"], [[value("tail", 2 * SEGMENT - 500)]], after=head[-1]).tolist() == [True]
        assert present(storage, *head, "a", "b") == [True] * 6 + [False] * 2


def test_values_without_what_comes_before_are_not_taken(folder: Path) -> None:
    storage = FileStorage(folder)
    assert put_chain(storage, ["b", "c"], after="a") == [False, False]
    assert storage.stats()["gaps"] == 2
    assert put_chain(storage, ["a"]) == [True]
    assert put_chain(storage, ["b", "c"], after="a") == [True, True]
    storage.delete_many(["b"])
    assert put_chain(storage, ["d"], after="c") == [True]  # "c" is there; what it needs comes back
    assert put_chain(storage, ["a", "b", "c", "d", "e"]) == [True] * 5
    assert present(storage, *"abcde") == [True] * 5
    storage.close()


def test_a_ring_of_values_does_not_keep_others_out(storage: FileStorage, folder: Path) -> None:
    """Nobody should put such; but room is found all the same."""
    put(storage, "a")
    for first, second in [("a", "b"), ("b", "c")]:
        put_chain(storage, [second], after=first)
    storage.delete_many(["a"])
    put_chain(storage, ["a"], after="c")
    put_chain(storage, ["a1"], after="a")
    for number in range(10):
        assert put(storage, f"n{number}", size=2 * SEGMENT) == [True]
    assert present(storage, *"abc") != [True] * 3
    assert disk_bytes(folder) <= 4 * SEGMENT


def test_copies_of_a_value_are_one_for_those_after_it(folder: Path) -> None:
    """Two processes write the same prompt at the same time; each knows of the other's copy what the folder says."""
    with FileStorage(folder) as mine, FileStorage(folder) as theirs:
        stores = (mine, theirs)
        drafts = [s.folder.reserve([Want(SIZE + 200, "", ["a"])], Deadline(None, ""))[0] for s in stores]
        for store, draft in zip(stores, drafts, strict=True):
            assert draft is not None
            entries = _write(draft.temporary, "a")
            draft.final.parent.mkdir(exist_ok=True)
            draft.temporary.rename(draft.final)
            assert store.folder.publish([(draft, entries)], [], Deadline(None, "")) == []
        assert put_chain(mine, ["b"], after="a") == [True]
        for store in stores:
            assert store.stats()["segments"] == 3
            assert sorted(s.followers for s in store.folder.view.segments.values()) == [0, 1, 1]
        first = next(iter(mine.folder.view.segments.values()))
        mine.folder.path(first.name).unlink()
        for store in stores:
            store.folder.forget(store.folder.view.segments[first.name])
            assert get(store, "a", "b", size=SIZE) == [True, True]  # the other copy
            assert store.lost() == 0
        mine.delete_many(["a"])
        assert present(mine, "a") == present(theirs, "a") == [False]


def _write(path: Path, key: str) -> dict[str, Any]:
    data = value(key, SIZE)
    index, entries, _ = encode_index([key], [len(data)])
    path.write_bytes(index + data)
    return {key: entries[0]}


def test_touching_counts_as_use_for_others_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radixkv.storage.folder.TOUCH_NS", 0)
    with FileStorage(folder, max_bytes=3 * SEGMENT) as mine, FileStorage(folder, max_bytes=3 * SEGMENT) as theirs:
        for key in "abc":
            put(mine, key)
        assert mine.touch_many(["a", "none"]).tolist() == [True, False]
        put(theirs, "d")
        assert present(mine, *"abcd") == [True, False, True, True]


# ---- anything, restarts and crashes included -------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_left_can_be_reached(folder: Path, seed: int) -> None:
    """Prompts of a random tree, put and read through two views with a budget below the traffic, with restarts."""
    random = np.random.default_rng(seed)
    budget = 12 * SEGMENT

    def open_one() -> FileStorage:
        return FileStorage(folder, max_bytes=budget, segment_bytes=int(random.integers(1, 4)) * SIZE, num_threads=1)

    stores = [open_one(), open_one()]
    gaps = evicted = 0
    for step in range(250):
        which = int(random.integers(2))
        store = stores[which]
        path = tuple(np.minimum(random.geometric(0.5, random.integers(1, 12)), 4).tolist())
        keys = names(path)
        start = sum(present(store, *keys[:-1])) if random.random() < 0.9 else int(random.integers(len(path)))
        if random.random() < 0.7:
            flags = put_chain(store, keys[start:], after=keys[start - 1] if start else "")
            assert flags == sorted(flags, reverse=True), "a chain is taken from its beginning on"
        else:
            get(store, *keys, size=SIZE)
        if random.random() < 0.03:
            gaps, evicted = gaps + store.stats()["gaps"], evicted + store.stats()["evicted_segments"]
            store.close()
            stores[which] = open_one()
        if step % 10 == 0:
            assert disk_bytes(folder) <= budget
            assert min(assert_closed(each) for each in stores) >= min(step, 6)
    gaps += sum(store.stats()["gaps"] for store in stores)
    evicted += sum(store.stats()["evicted_segments"] for store in stores)
    assert gaps > 0
    assert evicted > 50
    for store in stores:
        store.close()
    with FileStorage(folder) as store:
        assert assert_closed(store) > 5


WRITER = """
import sys
from pathlib import Path
import numpy as np
from radixkv.storage.file import FileStorage
from tests.storage.test_chains import SEGMENT, SIZE, names, put_chain

random = np.random.default_rng(int(sys.argv[2]))
with FileStorage(Path(sys.argv[1]), max_bytes=40 * SEGMENT, segment_bytes=2 * SIZE) as storage:
    print("ready", flush=True)
    for _ in range(int(sys.argv[3])):
        put_chain(storage, names(tuple(np.minimum(random.geometric(0.5, random.integers(1, 16)), 4).tolist())))
    print(storage.stats()["evicted_segments"])
"""


def writer(folder: Path, seed: int, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(folder), str(seed), str(count)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_processes_that_share_a_budget_leave_whole_chains(folder: Path) -> None:
    running = [writer(folder, seed, 300) for seed in range(2)]
    evicted = [int(process.communicate(timeout=120)[0].split()[-1]) for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert min(evicted) > 20
    with FileStorage(folder) as storage:
        assert storage.stats()["used_bytes"] == disk_bytes(folder) <= 40 * SEGMENT
        assert assert_closed(storage) > 20


def test_kill_9_leaves_whole_chains(folder: Path) -> None:
    for seed in range(4):
        process = writer(folder, seed, 10**9)
        assert process.stdout is not None
        process.stdout.readline()
        seen = 0
        end = time.monotonic() + 60
        while seen < 30 and time.monotonic() < end:  # it is at work
            seen = len(segments(folder))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        with FileStorage(folder, max_bytes=40 * SEGMENT) as storage:
            assert assert_closed(storage) > 20
            assert disk_bytes(folder) <= 40 * SEGMENT


def test_a_segment_that_fails_takes_those_after_it_along(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FileStorage(folder, segment_bytes=SIZE) as storage:
        write = FileStorage._write

        def fail(self: FileStorage, draft: Any, batch: Any, *more: Any) -> Any:
            return OSError(5, "as told") if "p-1-1-1" in batch.entries else write(self, draft, batch, *more)

        monkeypatch.setattr(FileStorage, "_write", fail)
        renamed = []
        rename = os.rename
        monkeypatch.setattr(os, "rename", lambda *paths: (renamed.append(paths), rename(*paths))[1])
        assert put_chain(storage, names((1, 1, 1, 1, 1))) == [True, True, False, False, False]
        assert len({final for _, final in renamed}) == 2, "not even for a moment"
        assert len(segments(folder)) == 2
        assert list((folder / "tmp").iterdir()) == []
        assert (storage.stats()["io_errors"], storage.stats()["reserved_bytes"]) == (1, 2 * 4096)
        put(storage, "next")
        assert storage.stats()["reserved_bytes"] == 0


# ---- reservations of the dead ----------------------------------------------------------------------------------------
def test_what_the_dead_have_reserved_ends_without_any_want_of_room(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    with FileStorage(folder) as storage:
        code = (
            "import os, sys\n"
            "from pathlib import Path\n"
            "from radixkv.storage.base import Deadline\n"
            "from radixkv.storage.folder import Folder, Want\n"
            "folder = Folder(Path(sys.argv[1]), None, Deadline(None, ''))\n"
            "folder.reserve([Want(5000, '', ['k'])], Deadline(None, ''))[0].temporary.write_bytes(b'half')\n"
            "os._exit(9)\n"
        )
        assert subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT).returncode == 9
        put(storage, "a")
        assert (storage.stats()["reserved_bytes"], len(list((folder / "tmp").iterdir()))) == (8192, 1)
        monkeypatch.setattr(storage.folder, "_settle_at_s", 0.0)  # time has passed
        put(storage, "b")
        assert (storage.stats()["reserved_bytes"], list((folder / "tmp").iterdir())) == (0, [])


@pytest.mark.parametrize("when", ["before the rename", "after it"])
@pytest.mark.parametrize("room", [True, False])
def test_one_that_is_taken_for_dead_does_not_fail(
    folder: Path, monkeypatch: pytest.MonkeyPatch, when: str, room: bool
) -> None:  # fmt: skip
    """As on a network file system that has lost its locks."""
    with FileStorage(folder, max_bytes=2 * SEGMENT) as mine, FileStorage(folder, max_bytes=2 * SEGMENT) as theirs:
        place = FileStorage._place

        def taken_for_dead(*arguments: Any) -> None:
            if when == "after it":
                place(*arguments)
            with monkeypatch.context() as patch:
                patch.setattr(theirs.folder.journal, "alive", lambda owner: owner == theirs.folder.journal.owner)
                patch.setattr(theirs.folder, "_settle_at_s", 0.0)
                put(theirs, "x", "y" if room else "z", size=SIZE if room else SEGMENT - 200)
            if when != "after it":
                place(*arguments)

        steps = {mine: taken_for_dead, theirs: place}
        monkeypatch.setattr(FileStorage, "_place", lambda self, *more: steps[self](self, *more))
        flags = put(mine, "a")
        steps[mine] = place
        assert flags == present(theirs, "a") == present(mine, "a")
        assert disk_bytes(folder) <= 2 * SEGMENT
        if when == "before the rename":
            assert flags == [False]
        if room and when == "after it":
            assert flags == [True]
        assert put(mine, "later") == [True]


def test_threads_that_put_chains_at_once(folder: Path) -> None:
    with FileStorage(folder, max_bytes=20 * SEGMENT, segment_bytes=2 * SIZE) as storage:
        def work(seed: int) -> None:
            random = np.random.default_rng(seed)
            for _ in range(60):
                put_chain(storage, names(tuple(np.minimum(random.geometric(0.5, random.integers(1, 10)), 4).tolist())))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert assert_closed(storage) > 10
        assert disk_bytes(folder) <= 20 * SEGMENT
        assert storage.stats()["reserved_bytes"] == 0


def test_a_leaf_that_cannot_be_removed_keeps_no_other(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was a leaf before something came after it, and is one again: it stands in the order once."""
    max_bytes = storage.folder.max_bytes
    assert max_bytes is not None
    put_chain(storage, ["a"])
    kept = storage.folder.path(storage.folder.view.places["a"].segment.name)
    for number in range(3):
        put_chain(storage, [f"b{number}"], after="a")
        storage.delete_many([f"b{number}"])
    for number in range(max_bytes // SEGMENT - 1):
        assert put_chain(storage, [f"c{number}"]) == [True]
    unlink = os.unlink

    def refuse(path: Path) -> None:
        if path == kept:
            raise PermissionError(errno.EPERM, "immutable")
        unlink(path)

    monkeypatch.setattr(os, "unlink", refuse)
    assert put_chain(storage, ["d"]) == [True]
    assert present(storage, "a", "c0", "d") == [True, False, True]
