"""Anchors: ``openlm`` is the paper's; every other architecture comes from mlx-lm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import _get_classes
from mlx_lm.utils import load_model as _load_model

from ..errors import ConfigError, FormatError
from . import openlm


def get_model_classes(config: dict[str, Any]) -> tuple[type[nn.Module], type]:
    """Model and argument class for a ``config.json``: what mlx-lm's ``load_model`` asks for."""
    if config.get("model_type") == "openlm":
        return openlm.Model, openlm.ModelArgs
    return _get_classes(config)


def load_anchor(folder: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Load the anchor of a model folder and its ``config.json``.

    On MLX's CPU backend half-precision products are some sixty times slower than float32, so
    there half-precision weights are widened to float32; other backends keep the stored dtype.

    Raises:
        ConfigError, FormatError: the config or the weights are missing, damaged or do not fit.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder}: no config.json; expected a model folder (config.json, model*.safetensors, "
            "tokenizer files, memory/)"
        )
    try:
        model, config = _load_model(folder, lazy=False, get_model_classes=get_model_classes)
    except (ValueError, TypeError, KeyError, RuntimeError, FileNotFoundError) as error:
        reason = " ".join(str(error).split())
        raise FormatError(
            f"{folder}: the anchor cannot be loaded ({reason}); fetch or convert it again"
        ) from error
    if mx.default_device() == mx.cpu:
        model.set_dtype(mx.float32)
    model.eval()
    return model, config
