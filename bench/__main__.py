"""``python -m bench``: see run.py."""

from .run import main

main()
