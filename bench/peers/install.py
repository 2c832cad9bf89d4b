"""Make ``build/peers/venv``: one environment in which radixkv and every peer run in one process.

``python bench/peers/install.py [--only-radixkv]`` is idempotent: pinned packages are installed once, radixkv
(editable, from this checkout) is rebuilt when its sources changed. A peer that cannot be installed is reported and
left out; the benchmarks then print it as absent.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ENVIRONMENT = ROOT / "build" / "peers" / "venv"

NEEDED = ("numpy==2.4.6", "cython==3.3.1", "setuptools==84.2.1", "rich==15.0.0", "xxhash==4.1.0")
"""For radixkv's own build, its storage, and for the reports."""

PEERS: dict[str, tuple[tuple[str, ...], ...]] = {
    # torch: this version only, it is the one that the Rust core was linked with and has a CPU build
    "sglang-rust, sglang-python": (("torch==2.13.0",), ("--no-deps", "sglang==0.5.23")),
    "dynamo": (("--no-deps", "ai-dynamo-runtime==1.6.1"),),
}
"""Peers -> arguments of ``pip install``, one tuple a call. --no-deps: their dependencies are for serving, nothing
here imports one."""


def python() -> Path:
    """The environment's interpreter."""
    return ENVIRONMENT / "bin" / "python"


def pip(*arguments: str) -> int:
    """Run the environment's pip; returns its exit status."""
    command = [str(python()), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def install(with_peers: bool = True) -> dict[str, str]:
    """Create or complete the environment. Returns: peers that could not be installed, with the pip call that failed.

    Raises: RuntimeError if radixkv itself or what it needs cannot be installed.
    """
    if not python().exists():
        venv.create(ENVIRONMENT, with_pip=True)
    if pip(*NEEDED):
        raise RuntimeError(f"pip could not install {', '.join(NEEDED)}")
    failed = {}
    for peer, calls in PEERS.items() if with_peers else ():
        for arguments in calls:
            if pip(*arguments):
                failed[peer] = "pip install " + " ".join(arguments)
                break
    if pip("--no-deps", "--no-build-isolation", "--editable", str(ROOT)):
        raise RuntimeError("radixkv could not be built in this checkout")
    return failed


def main() -> None:
    """Install, then say what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only-radixkv", action="store_true", help="no peers (they are about 1 GB)")
    options = parser.parse_args()
    failed = install(with_peers=not options.only_radixkv)
    for peer, call in failed.items():
        print(f"absent: {peer} ({call} failed)", file=sys.stderr)
    listing = (
        "from bench import peers; present, absent = peers.load_all(); "
        "[print(peer.version()) for peer in present.values()]; "
        "[print(f'absent: {one.name}: {one.reason}') for one in absent]"
    )
    subprocess.run([str(python()), "-c", listing], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
