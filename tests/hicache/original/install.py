"""Put ``sglang==0.5.0rc0`` into ``build/peers/sglang-0.5.0rc0``: ``python -m tests.hicache.original.install``.

Without its dependencies, by pip from whatever index pip is set up with, checked against the hash of the wheel.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

VERSION = "0.5.0rc0"
WHEEL_SHA256 = "1447a4b4a20e06b4a226b2696c060b4e1e0e1b4cdb933b0083104d0b94e50c64"
FOLDER = Path(__file__).resolve().parents[3] / "build" / "peers" / f"sglang-{VERSION}"
PROOF = f"sglang-{VERSION}.dist-info/RECORD"
"""pip writes it last."""


class OriginalAbsent(Exception):
    """The wheel is not here and could not be fetched; the text says why."""


def installed() -> Path:
    """The folder with the wheel's content, installed now if need be. Raises: OriginalAbsent with pip's last words."""
    if (FOLDER / PROOF).is_file():
        return FOLDER
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER.parent) as beside:  # a run that is cut off leaves no half of it
        wanted = Path(beside) / "requirements.txt"
        wanted.write_text(f"sglang=={VERSION} --hash=sha256:{WHEEL_SHA256}\n")
        target = Path(beside) / "installed"
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--retries", "1", "install"]
        strict = ["--no-deps", "--no-compile", "--only-binary=:all:", "--require-hashes"]
        command = [*pip, *strict, "--target", str(target), "-r", str(wanted)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OriginalAbsent(f"pip could not install sglang=={VERSION}: {done.stderr.strip()[-400:]}")
        try:
            target.rename(FOLDER)
        except OSError:  # another process was faster, or a run of old left a half
            if not (FOLDER / PROOF).is_file():
                shutil.rmtree(FOLDER)
                target.rename(FOLDER)
    return FOLDER


if __name__ == "__main__":
    print(installed())
