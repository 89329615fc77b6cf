"""Language models with hierarchical memories, fetched once per context, in MLX.

The public API. Each name is imported when it is first used, so that ``import mlx_hiermem``
loads neither MLX nor mlx-lm.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .bank.store import MemoryBank
    from .config import MemoryConfig
    from .engine import MemoryLM
    from .loading import load
    from .routing.encoder import Encoder
    from .routing.tree import ClusterPath, ClusterTree

_HOME = {
    "load": "loading",
    "MemoryLM": "engine",
    "MemoryConfig": "config",
    "MemoryBank": "bank.store",
    "ClusterTree": "routing.tree",
    "ClusterPath": "routing.tree",
    "Encoder": "routing.encoder",
}

__all__ = [
    "ClusterPath",
    "ClusterTree",
    "Encoder",
    "MemoryBank",
    "MemoryConfig",
    "MemoryLM",
    "__version__",
    "load",
]


if not TYPE_CHECKING:  # to type checkers it would be any name at all

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
