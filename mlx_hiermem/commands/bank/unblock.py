"""``mlx_hiermem bank unblock``: undo ``bank block``."""

from __future__ import annotations

import argparse
from typing import Any

from . import block
from .block import add_arguments, to_text

__all__ = ["add_arguments", "report", "to_text"]


def report(args: argparse.Namespace) -> dict[str, Any]:
    """As that of ``bank block``."""
    return block.report(args, block=False)
