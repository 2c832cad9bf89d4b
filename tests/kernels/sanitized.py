"""Copies on one build of the simulator, in a process of its own.

    python -m tests.kernels.sanitized LIBRARY MODE FAMILY...

For builds with a sanitizer, which must be preloaded, and for gcov, which writes its counts at exit. Says "done" last.
"""

from __future__ import annotations

import sys
from pathlib import Path

from radixkv.pool.layout import LAYOUTS

from .backends import HostSim
from .cases import Case, check
from .simulator import FIBRE, LOOP, THREAD, Simulator

MODES = {"loop": LOOP, "fibre": FIBRE, "thread": THREAD}


def cases(family: str) -> list[Case]:
    """A few of each path through the kernels of a family, small enough for a thread per thread."""
    options = {"family": family, "ctas": 2}
    found = [Case(src=src, dst=dst, options=options) for src in LAYOUTS for dst in LAYOUTS]
    for dtype in ("int32", "int64"):
        for pattern in ("contiguous", "random"):
            for kind in ("mha", "mla"):
                found.append(
                    Case(kind=kind, src_dtype=dtype, dst_dtype=dtype, pattern=pattern, head_bytes=4112, options=options)
                )
    if family != "bulk":
        for shift in (1, 2, 4, 8):
            found.append(Case(shift=shift, head_bytes=40, options=options))
    return found


def main(library: str, mode: str, *families: str) -> None:
    backend = HostSim(Simulator(Path(library), mode=MODES[mode], seed=11, block=32), guarded=False)
    for family in families:
        for case in cases(family):
            check(backend, case)
    print("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
