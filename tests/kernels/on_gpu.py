"""The cases of sanitized.py on a GPU, for compute-sanitizer: python -m tests.kernels.on_gpu FAMILY...

Says "done" last.
"""

from __future__ import annotations

import sys

from .backends import Cuda
from .cases import check
from .sanitized import cases


def main(*families: str) -> None:
    backend = Cuda(guarded=False)
    for family in families:
        for case in cases(family):
            check(backend, case)
    print("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
