"""Kernel or copy engine: measured once a device, kept on disk.

A copy engine costs no SM but a fixed time a run; a kernel moves short runs well and takes SMs from the model. Which is
faster depends on the direction, the bytes of a run and the number of runs, so a table of those is measured and read:

    choose(direction, run_bytes, num_runs)
        1. an override (argument, else $RADIXKV_TRANSFER) decides
        2. else the nearest point of the table (in powers of two) decides; the engine wins if it takes at most
           1 + margin times what the kernel takes
        3. else, untuned: the engine from DEFAULT_ENGINE_BYTES a run up
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args

from ..errors import InvalidArgumentError

__all__ = [
    "DEFAULT_ENGINE_BYTES",
    "DEFAULT_MARGIN",
    "ENVIRONMENT",
    "MARGIN_ENVIRONMENT",
    "Chooser",
    "Direction",
    "PathName",
    "Timer",
    "cache_folder",
]

PathName: TypeAlias = Literal["kernel", "engine"]
Direction: TypeAlias = Literal["device_to_host", "host_to_device", "device_to_device"]
Timer: TypeAlias = Callable[[PathName, Direction, int, int], float]
"""timer(path, direction, run_bytes, num_runs): seconds of one such copy, set-up left out."""

ENVIRONMENT = "RADIXKV_TRANSFER"
DEFAULT_ENGINE_BYTES = 28 << 10
"""Where the batched engine of an H100 comes to speed, as published: 6.7 GB/s at 24 KiB, 39.9 at 28 KiB."""

MARGIN_ENVIRONMENT = "RADIXKV_TRANSFER_MARGIN"
DEFAULT_MARGIN = 0.1
"""How much longer the engine may take: a kernel's 4 SMs are 3 % of an H100 for that time, and its reads and writes pass
through the L2 cache that the model uses. Up: more copies leave the SMs alone. Down, to 0: the faster path always."""

RUN_BYTES = tuple(1 << bits for bits in range(9, 23))
"""512 B .. 4 MiB."""
NUM_RUNS = (1, 16, 256, 4096)
MAX_BYTES = 256 << 20
"""Points of the table that would move more are not measured: the one below in num_runs stands for them."""

FORMAT = 1
_log = logging.getLogger("radixkv.transfer")
_Point: TypeAlias = tuple[Direction, int, int]


def cache_folder() -> Path:
    """Where measurements are kept: $RADIXKV_CACHE_DIR, else radixkv in the platform's cache folder."""
    if given := os.environ.get("RADIXKV_CACHE_DIR"):
        return Path(given)
    if sys.platform == "darwin":
        base = _home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or _home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache")
    return base / "radixkv"


def _home() -> Path:
    """The user's home; a folder of temporary files for a user that has none (a container under any uid, no $HOME)."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"radixkv-{os.getuid() if hasattr(os, 'getuid') else 'user'}"


class Chooser:
    """Picks a path for each copy on one device. Not thread-safe while it tunes.

    Args:
        device: what the measurements are valid for: GPU model, driver version, and anything else that changes them
            (PCIe generation, SMs given to kernels).
        folder: None: ``cache_folder()``. A measurement in it that is of this device and version is used.
        override: always this path; None: $RADIXKV_TRANSFER if it is set and not "auto", else the table.
        margin: the engine wins if it takes at most 1 + margin times the kernel's time; None:
            $RADIXKV_TRANSFER_MARGIN if it is set, else DEFAULT_MARGIN.
    Attributes:
        caches_ignored: cache files that were there and could not be used, each with a log line.
        writes_failed: measurements that could not be kept, each with a log line.
    Raises: InvalidArgumentError for an override that is no path, a margin below 0.
    """

    def __init__(
        self,
        device: str,
        *,
        folder: Path | None = None,
        override: PathName | None = None,
        margin: float | None = None,
    ) -> None:
        self.device = device
        self.path = (folder or cache_folder()) / f"transfer-{hashlib.sha256(device.encode()).hexdigest()[:16]}.json"
        self.override = _override(override)
        self.margin = _margin(margin)
        self.caches_ignored = 0
        self.writes_failed = 0
        self._table: dict[_Point, dict[PathName, float]] = {}
        self._load()

    @property
    def tuned(self) -> bool:
        """Whether there is a table."""
        return bool(self._table)

    def choose(self, direction: Direction, run_bytes: int, num_runs: int) -> PathName:
        """The path for num_runs runs of run_bytes contiguous bytes. O(1)."""
        if self.override is not None:
            return self.override
        point = _nearest(direction, run_bytes, num_runs)
        if point not in self._table:
            return "engine" if run_bytes >= DEFAULT_ENGINE_BYTES else "kernel"
        seconds = self._table[point]
        return "engine" if seconds["engine"] <= seconds["kernel"] * (1 + self.margin) else "kernel"

    def tune(self, timer: Timer, *, repeats: int = 3, again: bool = False) -> bool:
        """Measure the table and keep it on disk. Nothing is measured if there is a table already.

        Args:
            timer: runs one copy. The median of ``repeats`` counts, paths taking turns.
            again: measure even so.
        Returns: whether it has measured.
        """
        if self._table and not again:
            return False
        table: dict[_Point, dict[PathName, float]] = {}
        for direction in get_args(Direction):
            for run_bytes in RUN_BYTES:
                for num_runs in NUM_RUNS:
                    if run_bytes * num_runs <= MAX_BYTES:
                        table[direction, run_bytes, num_runs] = _measure(timer, direction, run_bytes, num_runs, repeats)
        self._table = table
        self._save()
        return True

    def _load(self) -> None:
        try:
            text = self.path.read_text()
        except FileNotFoundError:
            return
        except (OSError, UnicodeDecodeError) as error:
            self._ignore(str(error))
            return
        try:
            self._table = _parse(json.loads(text), self.device)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._ignore(str(error) or type(error).__name__)

    def _ignore(self, reason: str) -> None:
        self.caches_ignored += 1
        _log.warning("transfer_cache=ignored path=%s reason=%r", self.path, reason)

    def _save(self) -> None:
        """Write beside the target, then rename: a reader sees the old file or the new one, never a part."""
        rows = [[*point, seconds["kernel"], seconds["engine"]] for point, seconds in self._table.items()]
        content = {"format": FORMAT, "version": _version(), "device": self.device, "rows": rows}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, prefix=self.path.name, delete=False) as partial:
                try:
                    json.dump(content, partial, indent=1)
                    partial.close()
                    os.replace(partial.name, self.path)
                except OSError:
                    os.unlink(partial.name)
                    raise
        except OSError as error:
            self.writes_failed += 1
            _log.warning("transfer_cache=not_kept path=%s reason=%r", self.path, str(error))


def _override(argument: str | None) -> PathName | None:
    given, source = argument, "override"
    if given is None:
        given, source = os.environ.get(ENVIRONMENT) or "auto", f"${ENVIRONMENT}"
        if given == "auto":
            return None
    if given not in get_args(PathName):
        raise InvalidArgumentError(f"{source} is {given!r}; one of {', '.join(get_args(PathName))}")
    return cast(PathName, given)


def _margin(argument: float | None) -> float:
    given, source = argument, "margin"
    if given is None:
        text, source = os.environ.get(MARGIN_ENVIRONMENT) or str(DEFAULT_MARGIN), f"${MARGIN_ENVIRONMENT}"
        try:
            given = float(text)
        except ValueError:
            raise InvalidArgumentError(f"{source} is {text!r}; a number of 0 or more") from None
    if not given >= 0:
        raise InvalidArgumentError(f"{source} is {given}; a number of 0 or more")
    return given


def _nearest(direction: Direction, run_bytes: int, num_runs: int) -> _Point:
    """The point that stands for a copy: nearest in powers of two, then fewer runs until it is in the table."""
    size = RUN_BYTES[max(0, min(len(RUN_BYTES) - 1, _log2(run_bytes) - _log2(RUN_BYTES[0])))]
    count = min(NUM_RUNS, key=lambda n: (abs(_log2(n) - _log2(num_runs)), n))
    while size * count > MAX_BYTES:
        count = NUM_RUNS[NUM_RUNS.index(count) - 1]
    return direction, size, count


def _log2(x: int) -> int:
    """The nearest power of two in geometric terms: 3 -> 2 (4), 5 -> 2 (4), 6 -> 3 (8)."""
    x = max(1, x)
    bits = x.bit_length() - 1
    return bits + (x * x > 1 << (2 * bits + 1))


def _measure(timer: Timer, direction: Direction, run_bytes: int, num_runs: int, repeats: int) -> dict[PathName, float]:
    taken: dict[PathName, list[float]] = {"kernel": [], "engine": []}
    for _ in range(repeats):
        for path, times in taken.items():
            times.append(timer(path, direction, run_bytes, num_runs))
    return {path: statistics.median(times) for path, times in taken.items()}


def _parse(content: Any, device: str) -> dict[_Point, dict[PathName, float]]:
    """The table of a cache file. Raises: ValueError, KeyError or TypeError for one that is of no use."""
    for name, wanted in (("format", FORMAT), ("version", _version()), ("device", device)):
        if content[name] != wanted:
            raise ValueError(f"{name} is {content[name]!r}, not {wanted!r}")
    table: dict[_Point, dict[PathName, float]] = {}
    for direction, run_bytes, num_runs, kernel, engine in content["rows"]:
        if not (float(kernel) > 0 and float(engine) > 0):
            raise ValueError(f"times {kernel!r} and {engine!r}")
        table[direction, int(run_bytes), int(num_runs)] = {"kernel": float(kernel), "engine": float(engine)}
    missing = {(d, b, n) for d in get_args(Direction) for b in RUN_BYTES for n in NUM_RUNS if b * n <= MAX_BYTES} - set(
        table
    )
    if missing:
        raise ValueError(f"{len(missing)} points are missing")
    return table


def _version() -> str:
    try:
        return importlib.metadata.version("radixkv")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
