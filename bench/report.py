"""What every benchmark hands over: machine, versions, figures, and checks against targets; as JSON and as tables."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_FOLDER = ROOT / "build" / "bench"


class Check(NamedTuple):
    """A figure beside its aim, an upper limit; None: it has none. ``value`` None: it could not be measured, ``note``
    says why."""

    what: str
    value: float | None
    limit: float | None
    unit: str
    note: str = ""

    @property
    def verdict(self) -> str:
        """met, MISSED, not measured, or no aim."""
        if self.value is None:
            return "not measured"
        if self.limit is None:
            return "no aim"
        return "met" if self.value <= self.limit else "MISSED"


def _first_line(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""


def _cpu_model() -> str:
    with open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def machine() -> dict[str, Any]:
    """The machine and the tools: what a reader needs to judge an absolute figure."""
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()),
        "compiler": _first_line([os.environ.get("CC", "cc"), "--version"]),
        "python": platform.python_version(),
        "transparent_hugepage": huge.read_text().strip() if huge.exists() else None,
    }


def header(**more: Any) -> dict[str, Any]:
    """The head of a result file: date (UTC), commit, machine, and ``more`` (seed, rounds, ...)."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _first_line(["git", "rev-parse", "HEAD"]),
        "changed_files": len(_lines(["git", "status", "--porcelain"])),
        "machine": machine(),
        **more,
    }


def _lines(command: Sequence[str]) -> list[str]:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return done.stdout.splitlines()


def write_json(result: dict[str, Any], path: Path) -> None:
    """Write a result file, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def checks_as_dicts(checks: Iterable[Check]) -> list[dict[str, Any]]:
    """Checks for a result file."""
    return [{**check._asdict(), "verdict": check.verdict} for check in checks]


def number(value: float | None, digits: int = 2) -> str:
    """A figure for a table; a dash for None."""
    return "-" if value is None else f"{value:,.{digits}f}"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table, with rich if it is installed."""
    rows = [list(row) for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        _plain_table(title, columns, rows)
        return
    shown = Table(title=title, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        shown.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        shown.add_row(*row)
    console = Console()
    # Piped into a file there is no width to fit in.
    (console if console.is_terminal else Console(width=160)).print(shown)


def _plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(str(row[i])) for row in [columns, *rows]) for i in range(len(columns))]
    print(title)
    for row in [columns, *rows]:
        print(
            "  ".join(
                str(cell).ljust(width) if i == 0 else str(cell).rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        )


def print_checks(checks: Iterable[Check]) -> None:
    """Print a line for each figure: measured, aim, verdict."""
    table(
        "Aims",
        ("figure", "measured", "aim", "unit", "verdict", "note"),
        [(c.what, number(c.value, 3), "" if c.limit is None else "<= " + number(c.limit, 3), c.unit, c.verdict, c.note)
         for c in checks],
    )  # fmt: skip


def add_check_option(parser: argparse.ArgumentParser) -> None:
    """The option that ``conclude`` goes by."""
    parser.add_argument("--check", action="store_true", help="exit with 1 unless every aim was measured and met")


def conclude(checks: Sequence[Check], must_meet: bool) -> None:
    """End a benchmark: a line for each figure, then one for each aim that was missed or not measured, and how many were
    met. The result must have been written by now.

    Raises: SystemExit with a text (status 1) if ``must_meet``, and an aim was missed or not measured.
    """
    print_checks(checks)
    summarize([(c.what, c.verdict, _figures(c)) for c in checks], must_meet)


def summarize(verdicts: Sequence[tuple[str, str, str]], must_meet: bool) -> None:
    """What ``conclude`` ends with, of (aim, verdict, figures)."""
    aims = [one for one in verdicts if one[1] != "no aim"]
    wrong = [one for one in aims if one[1] != "met"]
    for what, verdict, figures in wrong:
        print(f"{verdict.upper()}: {what}: {figures}")
    met = len(aims) - len(wrong)
    missed = sum(verdict == "MISSED" for _, verdict, _ in wrong)
    print(f"{met} of {len(aims)} aims met, {missed} MISSED, {len(wrong) - missed} not measured" if aims else "no aims")
    if must_meet and wrong:
        sys.exit(f"--check: {len(wrong)} of {len(aims)} aims are not met")


def _figures(check: Check) -> str:
    if check.value is None:
        return check.note or "no figure"
    return f"{number(check.value, 3)}, aim <= {number(check.limit, 3)} {check.unit}"
