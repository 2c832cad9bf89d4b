"""Everything that ``make bench`` shows: tree, index, copies, page hashes, controller, storage, callgrind; tables, JSON.

``python -m bench [--check] [--quick] [--rounds N] [--json FILE] [--only PART,...] [--install]``, the parts being those
of PARTS. Each part prints its aims, and the end says which of all were missed; only with ``--check`` is that an error.
Run it with the interpreter that ``bench/peers/install.py`` made (``--install`` makes it, then runs there); with any
other, what is missing is reported as absent. ``--quick`` takes about a minute and shows that everything runs, not how
fast it is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import report

PARTS = ("tree", "index", "copy", "page_hash", "controller", "hicache", "storage", "callgrind")


def run_part(part: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run one benchmark program, its tables going to stdout; returns its JSON, or {"failed": reason}."""
    result = folder / f"{part}.json"
    if part == "callgrind":
        command = [sys.executable, str(Path(__file__).with_name("callgrind") / "run.py")]
    else:
        command = [sys.executable, "-m", f"bench.bench_{part}", *["--quick"] * options.quick]
        command += ["--rounds", str(options.rounds)] if options.rounds else []
    done = subprocess.run([*command, "--json", str(result)], cwd=report.ROOT, check=False)
    if done.returncode or not result.exists():
        return {"failed": f"exit status {done.returncode} of {' '.join(command[1:])}"}
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def reexecute_with_peers() -> None:
    """Install the peers' environment and start again in it. Does not return."""
    root = report.ROOT
    subprocess.run([sys.executable, str(root / "bench" / "peers" / "install.py")], cwd=root, check=True)
    python = str(root / "build" / "peers" / "venv" / "bin" / "python")
    os.chdir(root)
    os.execv(python, [python, "-m", "bench", *(argument for argument in sys.argv[1:] if argument != "--install")])


def main() -> None:
    """Command line. Exit status 1 if a part could not run; with --check also unless every aim was met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small and once, about a minute")
    parser.add_argument("--rounds", type=int, help="alternating rounds (3; 1 with --quick)")
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated parts")
    parser.add_argument("--json", type=Path, default=report.DEFAULT_FOLDER / "bench.json", help="where the result goes")
    parser.add_argument("--install", action="store_true", help="make the environment with the peers and run in it")
    report.add_check_option(parser)
    options = parser.parse_args()
    if options.install:
        reexecute_with_peers()
    parts = options.only.split(",")
    unknown = set(parts) - set(PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    result = report.header(quick=options.quick)
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            result[part] = run_part(part, options, Path(folder))
    found = [check for part in parts for check in result[part].get("checks", [])]
    result["checks"] = found
    report.write_json(result, options.json)
    checks = [report.Check(*(check[field] for field in report.Check._fields)) for check in found]
    print(f"\n{options.json}: everything above, and what all parts say of their aims:")
    failed = [f"{part}: {result[part]['failed']}" for part in parts if "failed" in result[part]]
    report.conclude(checks, options.check and not failed)
    if failed:
        sys.exit("could not run: " + "; ".join(failed))


if __name__ == "__main__":
    main()
