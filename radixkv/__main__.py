"""``python -m radixkv`` is the command ``radixkv``."""

import sys

from .cli import main

sys.exit(main())
