"""transfer/choose.py with timers that are formulas: what is measured, what is kept, what is looked up."""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from radixkv.errors import InvalidArgumentError
from radixkv.transfer import choose
from radixkv.transfer.choose import (
    DEFAULT_ENGINE_BYTES,
    ENVIRONMENT,
    MARGIN_ENVIRONMENT,
    Chooser,
    Direction,
    PathName,
    cache_folder,
)

DEVICE = "NVIDIA H200, driver 570.1"
CROSSOVER = 32 << 10


class FakeTimer:
    """A kernel at 20 GB/s; an engine at 50 GB/s and a fixed time a run that makes them equal at ``crossover`` bytes."""

    def __init__(self, crossover: int = CROSSOVER) -> None:
        self.calls: list[tuple[PathName, Direction, int, int]] = []
        self.fixed = crossover * (1 / 20e9 - 1 / 50e9)

    def __call__(self, path: PathName, direction: Direction, run_bytes: int, num_runs: int) -> float:
        self.calls.append((path, direction, run_bytes, num_runs))
        if path == "kernel":
            return num_runs * run_bytes / 20e9
        # device to device the engine is hopeless
        return num_runs * (self.fixed + run_bytes / 50e9) * (100 if direction == "device_to_device" else 1)


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.delenv(MARGIN_ENVIRONMENT, raising=False)


def tuned(folder: Path, **options: Any) -> Chooser:
    chooser = Chooser(DEVICE, folder=folder, **options)
    assert chooser.tune(FakeTimer())
    return chooser


def test_the_measured_crossover_decides(tmp_path: Path) -> None:
    chooser = tuned(tmp_path)
    for direction in ("device_to_host", "host_to_device"):
        for num_runs in (1, 3, 100, 5_000, 10**6):
            assert chooser.choose(direction, CROSSOVER // 2, num_runs) == "kernel"
            assert chooser.choose(direction, 2 * CROSSOVER, num_runs) == "engine"
            assert chooser.choose(direction, 1, num_runs) == "kernel"
            assert chooser.choose(direction, 1 << 40, num_runs) == "engine"
        assert chooser.choose("device_to_device", 1 << 22, 1) == "kernel"


def test_the_nearest_point_stands_for_a_copy(tmp_path: Path) -> None:
    chooser = tuned(tmp_path)
    # 32 KiB ties and goes to the engine; the border between it and 16 KiB is half way in powers of two
    assert chooser.choose("device_to_host", 23_200, 16) == "engine"
    assert chooser.choose("device_to_host", 23_100, 16) == "kernel"


def test_copies_larger_than_any_measured_go_by_the_nearest_that_was(tmp_path: Path) -> None:
    chooser = Chooser(DEVICE, folder=tmp_path)
    chooser.tune(FakeTimer(crossover=64 << 20))
    assert chooser.choose("device_to_host", 4 << 20, 4096) == "kernel"  # untuned, it would be the engine


def test_a_tie_spares_the_sms(tmp_path: Path) -> None:
    chooser = Chooser(DEVICE, folder=tmp_path)
    chooser.tune(lambda *_: 1.0)
    assert chooser.choose("device_to_host", 512, 1) == "engine"


def test_the_engine_may_be_slower_by_the_margin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Chooser(DEVICE, folder=tmp_path).tune(lambda path, *_: 1.0 if path == "kernel" else 1.08)
    shape = "device_to_host", 512, 1
    assert Chooser(DEVICE, folder=tmp_path).choose(*shape) == "engine"
    assert Chooser(DEVICE, folder=tmp_path, margin=0.05).choose(*shape) == "kernel"
    assert Chooser(DEVICE, folder=tmp_path, margin=0).choose(*shape) == "kernel"
    monkeypatch.setenv(MARGIN_ENVIRONMENT, "0.07")
    assert Chooser(DEVICE, folder=tmp_path).choose(*shape) == "kernel"
    assert Chooser(DEVICE, folder=tmp_path, margin=0.5).choose(*shape) == "engine"
    for text in ("-1", "much", "nan"):
        monkeypatch.setenv(MARGIN_ENVIRONMENT, text)
        with pytest.raises(InvalidArgumentError, match=r"\$RADIXKV_TRANSFER_MARGIN is .*; a number of 0 or more"):
            Chooser(DEVICE, folder=tmp_path)
    with pytest.raises(InvalidArgumentError, match=r"margin is -0\.1"):
        Chooser(DEVICE, folder=tmp_path, margin=-0.1)


def test_paths_take_turns_and_the_median_counts(tmp_path: Path) -> None:
    timer = FakeTimer()
    spikes = iter([10.0])

    def spiky(path: PathName, direction: Direction, run_bytes: int, num_runs: int) -> float:
        taken = timer(path, direction, run_bytes, num_runs)
        return taken + next(spikes, 0.0)

    chooser = Chooser(DEVICE, folder=tmp_path)
    assert chooser.tune(spiky, repeats=3)
    assert [path for path, *_ in timer.calls[:6]] == ["kernel", "engine"] * 3
    assert len(set(timer.calls[:6])) == 2
    # the kernel's first time was spoilt, at the smallest copy: a mean would give it to the engine
    assert chooser.choose("device_to_host", 512, 1) == "kernel"
    assert {direction for _, direction, *_ in timer.calls} == set(get_args(Direction))
    assert max(size * count for *_, size, count in timer.calls) <= choose.MAX_BYTES


def test_measured_once(tmp_path: Path) -> None:
    tuned(tmp_path)
    again = Chooser(DEVICE, folder=tmp_path)
    timer = FakeTimer()
    assert again.tuned
    assert not again.tune(timer)
    assert not timer.calls
    assert again.choose("host_to_device", 2 * CROSSOVER, 16) == "engine"
    assert again.caches_ignored == 0
    other = FakeTimer(crossover=1 << 20)
    assert again.tune(other, again=True)
    assert Chooser(DEVICE, folder=tmp_path).choose("host_to_device", 2 * CROSSOVER, 16) == "kernel"


def test_another_device_measures_anew(tmp_path: Path) -> None:
    tuned(tmp_path)
    other = Chooser("NVIDIA H100, driver 570.1", folder=tmp_path)
    assert not other.tuned
    assert other.caches_ignored == 0
    assert other.tune(FakeTimer(crossover=1 << 20))
    assert Chooser(DEVICE, folder=tmp_path).choose("host_to_device", 2 * CROSSOVER, 16) == "engine"
    assert len(list(tmp_path.iterdir())) == 2


def test_untuned_goes_by_the_published_figure(tmp_path: Path) -> None:
    chooser = Chooser(DEVICE, folder=tmp_path)
    assert not chooser.tuned
    assert chooser.choose("device_to_host", DEFAULT_ENGINE_BYTES - 1, 100) == "kernel"
    assert chooser.choose("device_to_host", DEFAULT_ENGINE_BYTES, 100) == "engine"


def change(key: str, value: Any) -> Callable[[str], str]:
    return lambda text: json.dumps(json.loads(text) | {key: value})


SPOILERS: dict[str, Callable[[str], str]] = {
    "cut short": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "no table": lambda text: "[1, 2]",
    "null": lambda text: "null",
    "a key is missing": lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "rows"}),
    "another format": change("format", 0),
    "another version": change("version", "0.0.0"),
    "another device of the same hash": change("device", "GeForce 256"),
    "rows of another shape": change("rows", [[1, 2]]),
    "rows of another type": change("rows", 5),
    "a time that is text": lambda text: text.replace("]", ', "x"]', 1),
    "points are missing": lambda text: json.dumps(json.loads(text) | {"rows": json.loads(text)["rows"][:-1]}),
    "a negative time": lambda text: json.dumps(
        json.loads(text) | {"rows": [[*r[:4], -1.0] for r in json.loads(text)["rows"]]}
    ),
    "a time that is no number": lambda text: json.dumps(
        json.loads(text) | {"rows": [[*r[:4], float("nan")] for r in json.loads(text)["rows"]]}
    ),
    "direction of another type": lambda text: json.dumps(
        json.loads(text) | {"rows": [[["x"], *r[1:]] for r in json.loads(text)["rows"]]}
    ),
}


@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS)
def test_a_cache_of_no_use_is_ignored_counted_and_replaced(
    tmp_path: Path, spoil: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    path = tuned(tmp_path).path
    good = path.read_text()
    path.write_text(spoil(good))
    with caplog.at_level(logging.WARNING, "radixkv.transfer"):
        chooser = Chooser(DEVICE, folder=tmp_path)
    assert chooser.caches_ignored == 1
    assert not chooser.tuned
    assert "transfer_cache=ignored" in caplog.text
    assert chooser.tune(FakeTimer())
    assert path.read_text() == good


def test_bytes_that_are_no_text_are_ignored(tmp_path: Path) -> None:
    path = tuned(tmp_path).path
    path.write_bytes(b"\xff\xfe\x00")
    assert Chooser(DEVICE, folder=tmp_path).caches_ignored == 1


def test_a_folder_in_the_files_place_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Chooser(DEVICE, folder=tmp_path).path.mkdir()
    chooser = Chooser(DEVICE, folder=tmp_path)
    assert chooser.caches_ignored == 1
    assert chooser.tune(FakeTimer())
    assert chooser.tuned  # for this process
    assert chooser.writes_failed == 1
    assert "transfer_cache=not_kept" in caplog.text
    assert [entry.name for entry in tmp_path.iterdir()] == [chooser.path.name]  # nothing half written stays


def test_a_cache_that_cannot_be_written_is_only_reported(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    chooser = Chooser(DEVICE, folder=blocker / "folder")
    assert chooser.tune(FakeTimer())
    assert chooser.writes_failed == 1
    assert chooser.choose("host_to_device", 2 * CROSSOVER, 16) == "engine"


def test_the_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that dies before the rename leaves the old file, and a reader never sees a part."""
    path = tuned(tmp_path).path
    before = path.read_text()

    def refuse(source: str, target: Path) -> None:
        assert json.loads(Path(source).read_text())["device"] == DEVICE  # complete before the rename
        assert path.read_text() == before
        raise OSError("no rename today")

    monkeypatch.setattr(os, "replace", refuse)
    chooser = Chooser(DEVICE, folder=tmp_path)
    assert chooser.tune(FakeTimer(1 << 20), again=True)
    assert chooser.writes_failed == 1
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_timer_that_fails_changes_nothing(tmp_path: Path) -> None:
    chooser = tuned(tmp_path)
    before = chooser.path.read_text()

    def broken(*_: Any) -> float:
        raise RuntimeError("no device")

    with pytest.raises(RuntimeError, match="no device"):
        chooser.tune(broken, again=True)
    assert chooser.path.read_text() == before
    assert chooser.choose("host_to_device", 2 * CROSSOVER, 16) == "engine"


@pytest.mark.parametrize("path", ["kernel", "engine"])
def test_overrides(tmp_path: Path, path: PathName, monkeypatch: pytest.MonkeyPatch) -> None:
    other: PathName = "engine" if path == "kernel" else "kernel"
    tuned(tmp_path)
    for size in (1, 1 << 30):
        assert Chooser(DEVICE, folder=tmp_path, override=path).choose("host_to_device", size, 1) == path
        monkeypatch.setenv(ENVIRONMENT, path)
        assert Chooser(DEVICE, folder=tmp_path).choose("host_to_device", size, 1) == path
        assert Chooser(DEVICE, folder=tmp_path, override=other).choose("host_to_device", size, 1) == other
    for off in ("auto", ""):
        monkeypatch.setenv(ENVIRONMENT, off)
        assert Chooser(DEVICE, folder=tmp_path).override is None


def test_unknown_overrides_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgumentError, match="override is 'dma'; one of kernel, engine"):
        Chooser(DEVICE, folder=tmp_path, override="dma")  # type: ignore[arg-type]
    monkeypatch.setenv(ENVIRONMENT, "tma")
    with pytest.raises(InvalidArgumentError, match=r"\$RADIXKV_TRANSFER is 'tma'"):
        Chooser(DEVICE, folder=tmp_path)


@pytest.mark.parametrize(("platform", "environment", "expected"), [
    ("linux", {}, "home/.cache/radixkv"),
    ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/radixkv"),
    ("darwin", {"XDG_CACHE_HOME": "/x"}, "home/Library/Caches/radixkv"),
    ("win32", {"LOCALAPPDATA": "/local"}, "/local/radixkv"),
    ("win32", {}, "home/AppData/Local/radixkv"),
    ("linux", {"RADIXKV_CACHE_DIR": "/mine", "XDG_CACHE_HOME": "/x"}, "/mine"),
])  # fmt: skip
def test_where_the_cache_is(
    monkeypatch: pytest.MonkeyPatch, platform: str, environment: dict[str, str], expected: str
) -> None:
    for name in ("RADIXKV_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(choose.sys, "platform", platform)
    monkeypatch.setattr(choose.Path, "home", lambda: Path("home"))
    assert cache_folder() == Path(expected)
    assert Chooser(DEVICE).path.parent == Path(expected)


def test_a_user_without_a_home_has_a_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("RADIXKV_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(choose.sys, "platform", "linux")
    monkeypatch.setattr(choose.Path, "home", homeless)
    monkeypatch.setattr(choose.tempfile, "gettempdir", lambda: str(tmp_path))
    assert Chooser(DEVICE).path.parent == tmp_path / f"radixkv-{os.getuid()}" / ".cache" / "radixkv"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/radixkv")


def test_the_cache_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    assert stat.S_IMODE(tuned(tmp_path / "new" / "folder").path.stat().st_mode) == 0o600
