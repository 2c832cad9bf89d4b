"""``python -m bench.callgrind``: see run.py."""

from .run import main

main()
