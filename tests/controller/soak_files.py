"""The random run on files: the storage lives in a real folder, on a machine that goes wrong, and processes end in every
way and start again on what they find there.

    ended in order      everything comes to rest, all is closed
    stopped             closed with everything in flight
    killed              between two steps, at any system call of the storage, in the middle of a write

`python -m tests.controller.soak_files FOLDER SEED` runs until it is killed, and says so after each hundred steps.

A new process has nothing but the folder: a new FileStorage, PageStore, controller, tree and pools; sometimes it serves
another model, which must find nothing.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from radixkv.errors import StorageError
from radixkv.storage import Storage
from radixkv.storage.file import FileStorage
from radixkv.storage.folder import Folder

from .disk import Crash, Disk, Process
from .soak import Soak, ThreadedSoak, Unreliable

MODELS = ("a", "a", "a", "b")


class Lives:
    """What becomes of a storage in files while processes come and go: a part of Soaks, of both kinds.

    Args: disk: shared by all that run on its folder. place: among these.
    """

    disk: Disk
    process: Process
    random: np.random.Generator
    now_s: float

    def settle_in(self, disk: Disk, place: int) -> None:
        self.disk, self.place, self.lives = disk, place, 0
        self.found: Counter[str] = Counter()
        self.files = {
            "max_bytes": int(self.random.integers(30, 100)) << 12 if self.random.integers(2) else None,
            "segment_bytes": int(self.random.choice([1000, 4096, 8 << 20])), "fsync": not self.random.integers(8),
            "num_threads": 1,
        }  # fmt: skip
        self.clean = False
        """Whether the process before left in order, with nothing of it lost."""

    def new_process(self, seed: int) -> FileStorage:
        """Open the folder, on a machine that may go wrong meanwhile."""
        self.lives += 1
        troubled = not self.random.integers(4)
        while True:
            self.process = Process(np.random.default_rng([seed, self.place, self.lives]), lambda: self.now_s)
            self.disk.running = self.process
            self.process.chance = 0.1 * troubled
            try:
                storage = FileStorage(self.disk.root, **self.files)
                break
            except StorageError:
                assert troubled, "a folder cannot be opened that nothing is wrong with"
                self.process.bury()
                troubled, self.lives = False, self.lives + 1
        self.process.chance = 0.0
        return storage

    def count(self, pages: Any) -> None:
        """Keep the counters of a life that ends."""
        self.found.update({name: value for name, value in vars_of(pages.counters).items() if value})


class Promised:
    """A storage whose calls raise StorageErrors, and nothing else: ``broken`` has what else they raised."""

    def __init__(self, inner: Storage) -> None:
        self._inner = inner
        self.broken: list[str] = []

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not name.endswith(("_many", "_each")):
            return value

        def call(*arguments: Any, **more: Any) -> Any:
            try:
                return value(*arguments, **more)
            except StorageError:
                raise
            except Exception as error:
                self.broken.append(f"{name}: {error!r}")
                raise

        return call


def vars_of(counters: Any) -> dict[str, int]:
    return {name: getattr(counters, name) for name in counters.__slots__}


class FileSoak(Lives, Soak):
    """A Soak on a Disk, which must be installed.

    Args: model: of all its lives; None: now and then another one. alone: nobody else uses the folder.
    """

    storage: Any

    def __init__(self, seed: int, disk: Disk, *, place: int = 0, tree: str = "core", alone: bool = True) -> None:
        self.disk, self.place, self.alone = disk, place, alone
        self.now_s = 0.0
        super().__init__(seed, tree)

    def start(self) -> None:
        if not hasattr(self, "files"):
            self.settle_in(self.disk, self.place)
            self.settings |= {  # more of what happens is to reach storage, and to come back
                "prefetch_policy": str(self.random.choice(["wait_complete"] * 2 + ["timeout", "best_effort"])),
                "store_after_backup": bool(self.random.integers(8)), "write_through_threshold_storage": 1,
                "write_through_threshold": [None, 1, 1][int(self.random.integers(3))],
            }  # fmt: skip
            self.host_pages = int(self.random.integers(8, 40))
        self.model = str(self.random.choice(MODELS))
        self.storage = Unreliable(
            Promised(self.new_process(self.seed)), np.random.default_rng([self.seed, self.lives])  # type: ignore[arg-type]
        )
        super().start()

    def act(self, action: Any) -> None:
        self.disk.running = self.process
        try:
            action(self)
        except Crash:
            assert self.process.dead
        if self.process.dead:
            self.done["died"] += 1
            self.kill()
        self.check_view(self.storage.inner.folder)

    def change_trouble(self) -> None:
        super().change_trouble()
        self.process.chance = float(self.random.choice([0.0, 0.0, 0.02, 0.2])) if self.trouble else 0.0

    def kill(self) -> None:
        """It is gone, as it stands. Another one starts."""
        self.count(self.stack.pages)
        self.process.bury()
        self.trouble = 0.0
        self.start()

    def die_soon(self) -> None:
        self.process.dies_in = int(self.random.integers(1, 60))

    def stop(self) -> None:
        """It is told to end, and closes all with everything in flight."""
        self.count(self.stack.pages)
        self.stack.close()
        self.storage.close()
        self.start()

    def restart(self) -> None:
        self.finish()
        self.stop()

    def damage(self) -> None:
        self.disk.damage()

    def finish(self) -> None:
        self.process.chance, self.process.dies_in = 0.0, 0
        super().finish()

    def check(self) -> None:
        super().check()
        assert not self.storage.inner.broken, self.storage.inner.broken
        if self.alone and self.files["max_bytes"] is not None and not self.process.chance:
            used = self.disk.used_bytes()
            assert used <= self.files["max_bytes"], f"{used} bytes on disk, with a budget of {self.files['max_bytes']}"

    def check_view(self, folder: Folder) -> None:
        """Between calls no room of ours is reserved, but what the others will be told of at the next one, and each leaf
        has its turn: else the tier would take less and less."""
        view, given_up = folder.view, {line.name for line in folder._void}
        ours = {name for name, line in view.reserved.items() if line.owner == folder.journal.owner}
        assert ours <= given_up, f"room stays reserved for {sorted(ours - given_up)}"
        leaves = {name for name, segment in view.segments.items() if not segment.followers}
        leaves -= {name for _, name in view._order}
        assert not leaves, f"leaves that cannot go: {sorted(leaves)}"

    def end(self) -> None:
        self.disk.running = self.process
        super().end()
        self.count(self.stack.pages)
        self.storage.close()
        assert not self.process.fds, f"{len(self.process.fds)} files are still open"

    ACTIONS = (
        *((action, weight) for action, weight in Soak.ACTIONS if action not in (Soak.restart, Soak.evict_host)),
        (Soak.evict_host, 1.5), (restart, 0.1), (stop, 0.15), (kill, 0.1), (die_soon, 0.25), (damage, 0.3),
    )  # fmt: skip


def run_together(soaks: list[FileSoak], steps: int, seed: int) -> None:
    """Several processes on one folder, a step of one at a time. Args: steps: in all."""
    turns = np.random.default_rng([seed, 5])
    for soak in soaks:
        soak.alone = len(soaks) == 1
    weights = np.array([weight for _, weight in FileSoak.ACTIONS])
    actions = turns.choice(len(weights), steps, p=weights / weights.sum())
    for turn, action in zip(turns.integers(len(soaks), size=steps), actions, strict=True):
        soak = soaks[turn]
        soak.at += 1
        try:
            soak.act(FileSoak.ACTIONS[action][0])
        except BaseException as error:
            error.add_note(f"process {soak.place} of seed {seed}, at its step {soak.at}; settings {soak.settings}")
            raise
    for soak in soaks:
        soak.end()


def soak_on_files(seed: int, steps: int, root: Path, tree: str = "core") -> Counter[str]:
    """One run; of each third seed two processes share the folder. Returns: what was found and what went wrong."""
    disk = Disk(root, seed)
    with disk.installed():
        if seed % 3 == 0:
            soaks = [FileSoak(seed, disk, place=number, tree=tree) for number in range(2)]
            run_together(soaks, steps, seed)
        else:
            soaks = [FileSoak(seed, disk, tree=tree)]
            soaks[0].run(steps)
    total = Counter(disk.faults)
    for soak in soaks:
        total.update(soak.found)
        total.update({"served": soak.served_pages, "lives": soak.lives})
    return total


class ThreadedFileSoak(Lives, ThreadedSoak):
    """A ThreadedSoak on a folder: storage calls are made by the workers' threads. Nothing is injected."""

    storage: Any

    def __init__(self, seed: int, root: Path, gpu: Any = None) -> None:
        self.root = root
        super().__init__(seed, gpu)

    def start(self) -> None:
        storage: Storage = FileStorage(self.root / "kv", max_bytes=400_000 if self.seed % 2 else None)
        self.storage = Unreliable(storage, np.random.default_rng([self.seed, 1]))
        super().start()

    def restart(self) -> None:
        self.finish()
        self.stack.close()
        self.storage.close()
        self.start()

    def end(self) -> None:
        super().end()
        self.storage.close()

    ACTIONS = (
        *((action, weight) for action, weight in ThreadedSoak.ACTIONS if action is not Soak.restart), (restart, 0.2),
    )  # fmt: skip


def soak_beside_the_killed(seed: int, root: Path, kills: int = 2, rounds: int = 8) -> Counter[str]:
    """A run beside another process on its folder, which is killed with SIGKILL, and another one after it.

    Args: rounds: of 100 steps of each, until it is killed. Where that strikes is nobody's choice, so a seed does not
        name a run. Returns: as soak_on_files.
    """
    disk = Disk(root, seed)
    total: Counter[str] = Counter()
    with disk.installed():
        soak = FileSoak(seed, disk, alone=False)
        for kill in range(kills):
            command = [sys.executable, "-m", __name__, str(root), str(1000 * (seed + 1) + kill)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as other:
                assert other.stdout is not None
                for _ in range(rounds):
                    assert other.stdout.readline(), "the other process has failed by itself"
                    soak.steps(100)
                other.kill()
            assert other.returncode == -9
        soak.steps(100 * rounds)
        soak.end()
    total.update(disk.faults)
    total.update(soak.found)
    total.update({"served": soak.served_pages, "lives": soak.lives})
    return total


def main() -> None:
    root, seed = Path(sys.argv[1]), int(sys.argv[2])
    disk = Disk(root, seed)
    with disk.installed():
        soak = FileSoak(seed, disk, alone=False)
        while True:
            soak.steps(100)
            print(soak.at, flush=True)


if __name__ == "__main__":
    main()
