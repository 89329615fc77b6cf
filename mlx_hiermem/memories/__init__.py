"""What a memory block is and what it does to a layer of the anchor."""

from .attach import MemoryModel, attach, detach
from .start import GENERIC, start_block

__all__ = ["GENERIC", "MemoryModel", "attach", "detach", "start_block"]
