"""What a memory block is and what it does to a layer of the anchor."""

from .attach import MemoryModel, attach, detach

__all__ = ["MemoryModel", "attach", "detach"]
