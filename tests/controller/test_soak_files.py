"""The random run of the whole stack on real files: 100,000 steps, processes that end in every way, and it can fail."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from radixkv.controller import operations
from radixkv.errors import PageOwnershipError
from radixkv.pool.slots import SlotAllocator
from radixkv.storage import sealed
from radixkv.storage.folder import Folder
from radixkv.storage.journal import Journal
from radixkv.storage.namespace import PageNamespace
from radixkv.storage.view import View

from .planted import free_twice, leak
from .soak import main
from .soak_files import ThreadedFileSoak, soak_beside_the_killed, soak_on_files

STEPS = 2500
SEEDS = range(200, 240)


def test_a_hundred_thousand_steps(tmp_path: Path) -> None:
    """No wrong byte, no page lost or freed twice, rest at each end; and all that may go wrong has."""
    total: Counter[str] = Counter()
    for seed in SEEDS:
        total.update(soak_on_files(seed, STEPS, tmp_path / str(seed)))
    assert len(SEEDS) * STEPS >= 100_000
    at_least = {"served": 10_000, "hits": 500, "stored": 1000, "lives": 200, "corrupt": 10, "misses": 20, "errors": 10}
    assert {name: total[name] for name, least in at_least.items() if total[name] < least} == {}
    assert {kind for kind in ("flip", "cut", "hole", "swap", "delete") if not total[kind]} == set()
    for what in ("open E", "write ENOSPC", "pread EIO", "rename E", "dead at pwritev", "dead at rename", "dead at f"):
        assert any(name.startswith(what) for name in total), f"never: {what}; {total}"


@pytest.mark.parametrize("seed", range(2))
def test_killed_beside_it(seed: int, tmp_path: Path) -> None:
    assert soak_beside_the_killed(seed, tmp_path)["served"] > 0


def test_with_the_threads_of_earnest(tmp_path: Path) -> None:
    served = 0
    for seed in range(2):
        soak = ThreadedFileSoak(seed, tmp_path / str(seed))
        soak.run(1500)
        served += soak.served_pages
    assert served > 100


def test_a_seed_names_a_run(tmp_path: Path) -> None:
    for seed in (3, 4):  # two processes, and one
        runs = [soak_on_files(seed, 1500, tmp_path / f"{seed}-{again}") for again in range(2)]
        assert runs[0] == runs[1]


# ---- the run can fail ------------------------------------------------------------------------------------------------
def not_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes from storage is served as it is."""
    monkeypatch.setattr(sealed.Check, "verdicts", lambda self, sizes: {})


def another_models_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = PageNamespace.digest
    monkeypatch.setattr(
        PageNamespace, "digest", lambda self, salt=b"": digest(type(self)(**_fields(self) | {"model": "any"}), salt)
    )


def _fields(namespace: PageNamespace) -> dict[str, Any]:
    return {name: getattr(namespace, name) for name in namespace.__dataclass_fields__}


def device_pages_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    leak(monkeypatch, SlotAllocator)


def freed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    free_twice(monkeypatch, SlotAllocator)


def stores_never_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails stays in flight."""
    status = operations.StoreOp.status

    def never(self: Any, now_s: float) -> int:
        failed = self.job.done() and self.job.pages < len(self.host_pages)
        return operations.RUNNING if failed else status(self, now_s)

    monkeypatch.setattr(operations.StoreOp, "status", never)


def no_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Folder, "_make_room", lambda self, num_bytes: True)


def files_stay_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Journal, "leave", lambda self: None)


def room_stays_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of segments that are in their place: for nothing, but it counts as one that comes after."""
    release = View.release
    monkeypatch.setattr(View, "release", lambda self, name: None if name in self.segments else release(self, name))


def leaves_without_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that become one again."""
    unfollow = View.unfollow

    def forgets(self: View, key: str, used_ns: int = 0) -> None:
        for place in self.copies_of(key):
            place.segment.ordered = True
        unfollow(self, key, used_ns)

    monkeypatch.setattr(View, "unfollow", forgets)


DEFECTS = [
    not_verified, another_models_pages, device_pages_leak, freed_twice, stores_never_end, no_budget, files_stay_open,
    room_stays_reserved, leaves_without_a_turn,
]  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_a_defect_is_found(defect: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    defect(monkeypatch)
    for seed in SEEDS:
        try:
            soak_on_files(seed, STEPS, tmp_path / str(seed))
        except Exception:  # some check of some layer, whichever comes first
            return
    pytest.fail("nobody noticed")


def test_what_fails_says_how_to_repeat_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["soak", "--files", "--seed", "7", "--steps", "600", "--steps-each", "300"]
    monkeypatch.setattr("sys.argv", command)
    main()
    assert "600 steps, seeds 7 .. 8" in capsys.readouterr().out
    freed_twice(monkeypatch)
    with pytest.raises(PageOwnershipError):
        main()
    again = "again: python -m tests.controller.soak --seed 7 --steps 300 --steps-each 300 --tree core --files"
    assert again in capsys.readouterr().err
