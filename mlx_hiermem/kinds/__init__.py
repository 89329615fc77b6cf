"""Kinds of memory: what a block is, and what it does to a layer of the anchor. One file each.

A file in here that does not begin with an underscore is a kind of its name, and holds ``KIND``, an
object of :class:`~mlx_hiermem.kinds._kind.Kind`. docs/extending.md shows how to write another one.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._kind import Kind

#: All kinds there are.
NAMES = tuple(sorted(one.name for one in iter_modules(__path__) if not one.name.startswith("_")))


def find(name: str) -> Kind:
    """The kind of a name, one of ``NAMES``."""
    return import_module(f"{__name__}.{name}").KIND
