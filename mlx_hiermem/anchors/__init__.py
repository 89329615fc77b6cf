"""Anchors: ``openlm`` is the paper's; every other architecture comes from mlx-lm.

mlx-lm is imported where it is needed: that takes seconds, which converting does without.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import ConfigError, FormatError, one_line
from ..shapes import AnchorShape, shown
from .claims import check_counts, count_tensors
from .openlm_args import check_kinds, check_numbers
from .rope import older_keys

#: What no weight is stored as: they are floating-point, or quantised and packed in uint32 (with
#: scales in uint8 in some modes).
_WRONG_DTYPES = (
    mx.bool_, mx.int8, mx.int16, mx.int32, mx.int64, mx.uint16, mx.uint64, mx.complex64,
)  # fmt: skip


def get_model_classes(config: dict[str, Any]) -> tuple[type[nn.Module], type[Any]]:
    """Model and argument class for a ``config.json``: what mlx-lm's ``load_model`` asks for.

    Keys that only transformers 5 writes are added to it in the words that the model reads.
    """
    if config.get("model_type") == "openlm":
        from . import openlm

        return openlm.Model, openlm.ModelArgs
    from mlx_lm.utils import _get_classes

    model, arguments = _get_classes(config)
    config.update(older_keys(config, arguments))
    if isinstance(inner := config.get("text_config"), dict):  # of a model that sees as well
        inner.update(older_keys(inner))
    return model, arguments


def load_anchor(folder: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Load the anchor of a model folder and its ``config.json``.

    On MLX's CPU backend half-precision products are some sixty times slower than float32, so
    there half-precision weights are widened to float32; other backends keep the stored dtype.

    Raises:
        ConfigError, FormatError: the config or the weights are missing, damaged or do not fit.
    """
    from mlx_lm.utils import load_model

    folder = Path(folder)
    _check_config(folder)
    try:
        model, config = load_model(folder, lazy=False, get_model_classes=get_model_classes)
    except Exception as error:  # a wrong value in config.json may fail anywhere in mlx-lm
        reason = one_line(f"{type(error).__name__}: {error}", 300)
        raise FormatError(
            f"{folder}: the anchor cannot be loaded ({reason}); fetch or convert it again"
        ) from error
    for name, array in tree_flatten(model.parameters()):
        if array.dtype in _WRONG_DTYPES:
            raise FormatError(
                f"{folder}: the anchor's {name} is stored as {array.dtype}; expected "
                "floating-point or quantised weights; fetch or convert it again"
            )
    if mx.default_device() == mx.cpu:
        model.set_dtype(mx.float32)
    model.eval()
    return model, config


def check_runs(model: nn.Module) -> None:
    """Compute with one token: a wrong value of ``config.json`` may show only there.

    Args:
        model: with memories attached.

    Raises:
        ConfigError: it fails.
    """
    try:
        logits = model(mx.array([[0]]), cache=model.make_cache())
        mx.eval(logits)
    except Exception as error:  # anything, in whatever the architecture is
        reason = one_line(f"{type(error).__name__}: {error}")
        raise ConfigError(
            f"the anchor cannot compute with its config.json ({reason}); fetch or convert it again"
        ) from error
    if logits.ndim != 3 or logits.shape[:2] != (1, 1) or not logits.size:
        raise ConfigError(f"the anchor gives {logits.shape}, no logits; fetch or convert it again")


def compute_dtype(model: nn.Module) -> mx.Dtype:
    """The dtype of a model's activations: that of its norms, which are never quantised."""
    arrays = [array for _, array in tree_flatten(model.layers[0].parameters())]
    floating = [array for array in arrays if mx.issubdtype(array.dtype, mx.floating)]
    gains = [array for array in floating if array.ndim == 1]
    if not floating:  # no gains, and quantised without floating-point scales: MLX unpacks to
        return mx.bfloat16
    # Where norms have no gains: the matrices, or the scales of quantised ones.
    return (gains or floating)[0].dtype


def context_length(config: Mapping[str, Any]) -> int | None:
    """The longest context in tokens, prompt and answer together, that a ``config.json`` tells; of a
    model that sees as well it is that of its text model."""
    length = config.get("max_position_embeddings")
    inner = config.get("text_config")
    if length is None and isinstance(inner, dict):
        length = inner.get("max_position_embeddings")
    return length


def _check_config(folder: Path) -> None:
    """Raise ConfigError where the values of ``config.json`` that everyone needs are wrong, and
    FormatError where the weights are damaged."""
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"{folder}: no config.json; expected a model folder (config.json, model*.safetensors, "
            "tokenizer files, memory/)"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); fetch it again") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ConfigError(f"{path}: no model_type; expected the config.json of an mlx-lm model")
    length = context_length(config)
    if length is not None and (type(length) is not int or length < 2):
        raise ConfigError(
            f"{path}: max_position_embeddings is {shown(length)}; expected the longest context in "
            "tokens, or no such key"
        )
    try:
        tensors = count_tensors(folder)
        if tensors is not None:
            check_counts(config, tensors)
        if config["model_type"] == "openlm":
            AnchorShape.of(config)
            check_kinds(config)
            check_numbers(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def load_anchor_tokenizer(folder: str | Path, config: dict[str, Any]) -> Any:
    """mlx-lm's tokenizer wrapper for the tokenizer of a model folder.

    Args:
        config: the anchor's ``config.json``; ``eos_token_id`` in it ends an answer.

    Raises:
        FormatError: the tokenizer is missing or damaged.
    """
    from mlx_lm.utils import load_tokenizer

    # transformers would warn about long texts on stderr; the engine refuses them by itself.
    options: dict[str, Any] = {"trust_remote_code": False, "model_max_length": 1 << 60}
    if config.get("model_type") == "openlm":
        from transformers import PretrainedConfig

        # transformers does not know the architecture, and would warn about that on each load.
        options["config"] = PretrainedConfig()
    try:
        tokenizer = load_tokenizer(Path(folder), options, eos_token_ids=config.get("eos_token_id"))
        # mlx-lm's table of what the tokens are written as; it would fail when one is drawn.
        written = getattr(tokenizer.detokenizer, "tokenmap", [])
        if None in written:
            raise ValueError(f"no token has the id {written.index(None)}")
        return tokenizer
    except Exception as error:  # the tokenizers library raises bare Exceptions
        reason = one_line(error)
        raise FormatError(
            f"{folder}: the tokenizer cannot be loaded ({reason}); fetch or convert the model again"
        ) from error
