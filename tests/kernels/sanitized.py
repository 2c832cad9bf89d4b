"""Copies on one build of the simulator, in a process of its own.

    python -m tests.kernels.sanitized LIBRARY MODE FAMILY...

For builds with a sanitizer, which must be preloaded, and for gcov, which writes its counts at exit. Says "done" last.
"""

from __future__ import annotations

import sys
from pathlib import Path

from .backends import HostSim
from .cases import check, few
from .simulator import FIBRE, LOOP, THREAD, Simulator

MODES = {"loop": LOOP, "fibre": FIBRE, "thread": THREAD}


def main(library: str, mode: str, *families: str) -> None:
    backend = HostSim(Simulator(Path(library), mode=MODES[mode], seed=11, block=32), guarded=False)
    for family in families:
        for case in few(family):
            check(backend, case)
    print("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
