"""``python -m mlx_hiermem``: the same as the ``mlx_hiermem`` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
