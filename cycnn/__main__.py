"""``python -m cycnn``: see :mod:`cycnn.cli`."""

import sys

from .cli import main

sys.exit(main())
