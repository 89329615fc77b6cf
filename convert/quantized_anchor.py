"""Quantising an anchor with mlx-lm, after it was written as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_hiermem.anchors import get_model_classes
from mlx_hiermem.errors import ConfigError, one_line
from mlx_hiermem.files import AtomicFile
from mlx_hiermem.quantization import Quantization

from .request import DEFAULT_BITS, Request

_PLAIN = ".anchor"


@contextmanager
def quantized(folder: Path, request: Request) -> Iterator[Path]:
    """Where to write an anchor as it is; on leaving it is in ``folder``, quantised if so asked.

    Raises:
        ConfigError: mlx-lm cannot quantise it so.
    """
    if not request.packs_anchor:
        yield folder
        return
    plain = folder / _PLAIN
    shutil.rmtree(plain, ignore_errors=True)
    plain.mkdir()
    try:
        yield plain
        quantize_anchor(plain, folder, request)
    finally:
        shutil.rmtree(plain, ignore_errors=True)


def quantize_anchor(source: Path, target: Path, request: Request) -> None:
    """Quantise the model in ``source`` into ``target``, as ``mlx_lm.convert -q`` does.

    Raises:
        ConfigError: a width fits no group, or the mode is unknown.
    """
    from mlx_lm.utils import load_model, quantize_model, save_model

    model, config = load_model(source, lazy=True, get_model_classes=get_model_classes)
    packing = Quantization.choose(
        (config["hidden_size"],), request.q_bits or DEFAULT_BITS, request.q_mode,
        request.q_group_size,
    )  # fmt: skip
    try:
        model, config = quantize_model(
            model, config, packing.group_size, packing.bits, mode=packing.mode
        )
        save_model(target, model, donate_model=True)
    except ValueError as error:
        raise ConfigError(
            f"--quantize: the anchor cannot be quantised ({one_line(error)}); "
            "try another --q-group-size, or --quantize bank"
        ) from None
    with AtomicFile(target, "config.json") as file:
        file.write((json.dumps(config, indent=4, sort_keys=True) + "\n").encode())
