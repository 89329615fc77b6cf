"""Hugging Face models of the architectures that mlx-lm has, through ``mlx_lm.convert``.

Notable:
- mlx-lm sees a folder of links that holds data files only, and a ``config.json`` in which the keys
  of transformers 5 also stand in the words that mlx-lm's models read. Code is neither run nor
  copied.
- Weights keep the dtype they are stored in, whatever the config says, unless another is asked for.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_hiermem.bank.dtypes import all_finite
from mlx_hiermem.bank.files import find
from mlx_hiermem.bank.parts import Part
from mlx_hiermem.errors import FormatError, HierMemError, InputError, one_line
from mlx_hiermem.folders import OTHERS, WEIGHTS, Originals, anchor_files
from mlx_hiermem.models import find_model
from mlx_hiermem.quantization import MODES
from mlx_hiermem.shapes import shown

from .openlm.weights import DTYPES
from .sources import open_source
from .sources.tables import read_table
from .tokenizer import NEEDED, copy_tokenizer, tokenizer_files

_CONFIG = "config.json"
_LIMIT = 1 << 26
# Numbers that are looked at together.
_CHUNK = 1 << 22


def convert_huggingface(
    path_or_repo: str | Path,
    folder: Path,
    *,
    dtype: str | None = None,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str | None = None,
    revision: str | None = None,
    tokenizer: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Write a model with ``config.json``, ``model*.safetensors`` and its tokenizer.

    Args:
        path_or_repo: a folder, or a repository of the Hub.
        folder: to write into; exists, and has no model yet.
        dtype: of the weights; None: as they are stored.
        quantize: the anchor's matrices, as mlx-lm does it; ``q_bits``, ``q_group_size`` and
            ``q_mode`` are its own options, with its defaults.
        revision: of the repository.
        tokenizer: a folder with a tokenizer, for a model without one.
        progress: called with the bytes written since the call before.

    Returns:
        Names of the files that were written.

    Raises:
        InputError: an option is out of range.
        ConfigError: there is no such model, or its config cannot be used.
        FormatError: it is damaged, has no safetensors, or mlx-lm cannot convert it.
    """
    _check_options(dtype, quantize, q_bits, q_group_size, q_mode)
    source = find_model(path_or_repo, revision, Part(levels=()))  # a bank is not wanted
    files = Originals(source, anchor_files(source))
    config, weights = inspect(source)
    check_finite(source, weights)
    has_tokenizer = bool(tokenizer_files(source))
    if dtype is None and not quantize and is_mlx(source, weights):
        names = files.names
        for name in names:
            find(source, name)
            files.copy(name, folder, progress)
        if not has_tokenizer and tokenizer is not None:
            names += copy_tokenizer(tokenizer, folder)
        return names
    if quantize and config.get("quantization", config.get("quantization_config")):
        raise InputError(f"{source}: is quantised already; give the model that it was made of")
    if not has_tokenizer and tokenizer is None:
        raise InputError(
            f"{source}: has no tokenizer ({', '.join(NEEDED)}); give the folder of one with "
            "--tokenizer"
        )
    options: dict[str, Any] = {
        "dtype": dtype, "quantize": quantize, "q_bits": q_bits, "q_group_size": q_group_size,
        "q_mode": q_mode or "affine",
    }  # fmt: skip
    with _staged(source, folder, weights, None if has_tokenizer else tokenizer) as (stage, out):
        _run(source, stage, out, options)
        names = anchor_files(out)
        for name in sorted(names, key=lambda name: name == _CONFIG):  # the config last
            size = (out / name).stat().st_size
            os.replace(out / name, folder / name)
            if progress is not None:
                progress(size)
    return names


def inspect(source: Path) -> tuple[dict[str, Any], list[str]]:
    """The ``config.json`` of a model folder, and the names of its weights.

    Raises:
        FormatError: one of them is missing, damaged, or a link out of the folder.
    """
    if not (source / _CONFIG).is_file():
        raise FormatError(f"{source}: no config.json; expected the folder of a Hugging Face model")
    config = read_table(source / _CONFIG, _LIMIT)
    if not isinstance(config.get("model_type"), str):
        raise FormatError(
            f"{source / _CONFIG}: model_type is {shown(config.get('model_type'))}; expected the "
            "name of an architecture"
        )
    weights = sorted(path.name for path in source.glob(WEIGHTS[0]))
    if not weights:
        raise FormatError(
            f"{source}: no model*.safetensors; pickled weights (.bin) are not read: save the model "
            "again with transformers' save_pretrained"
        )
    for name in weights:
        find(source, name)
    return config, weights


def is_mlx(source: Path, weights: list[str]) -> bool:
    """Whether all weights of a folder were written by MLX."""
    for name in weights:
        with open_source(source / name) as opened:
            if opened.extras.get("format") != "mlx":
                return False
    return True


def check_finite(source: Path, weights: list[str]) -> None:
    """Raise FormatError where a floating-point tensor has a NaN or an infinite number."""
    for name in weights:
        with open_source(source / name) as opened:
            for tensor in opened.tensors.values():
                if tensor.dtype not in DTYPES or 0 in tensor.shape or not tensor.shape:
                    continue
                rows = max(1, _CHUNK * tensor.shape[0] // max(1, tensor.nbytes))
                for first in range(0, tensor.shape[0], rows):
                    count = min(rows, tensor.shape[0] - first)
                    if not all_finite(tensor.read(first, count), tensor.dtype):
                        raise FormatError(
                            f"{tensor.where} has numbers that are not finite in rows {first} to "
                            f"{first + count - 1}; train or save the model again"
                        )


def _check_options(
    dtype: str | None, quantize: bool, bits: int | None, group: int | None, mode: str | None
) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype {shown(dtype)}: known are {', '.join(DTYPES)}")
    if not quantize:
        return
    mode = mode or "affine"
    if mode not in MODES:
        raise InputError(f"--q-mode {shown(mode)}: known are {', '.join(MODES)}")
    for option, value, known in zip(
        ("--q-bits", "--q-group-size"), (bits, group), MODES[mode], strict=True
    ):
        if value is not None and value not in known:
            raise InputError(
                f"{option} {shown(value)}: {mode} has {', '.join(map(str, sorted(known)))}"
            )


@contextmanager
def _staged(
    source: Path, folder: Path, weights: list[str], tokenizer: Path | None
) -> Iterator[tuple[Path, Path]]:
    """Two hidden folders in ``folder``: links to the data of a model, and where to convert to."""
    from mlx_hiermem.anchors import get_model_classes

    work = folder / ".mlx-lm"
    shutil.rmtree(work, ignore_errors=True)
    stage = work / "source"
    try:
        stage.mkdir(parents=True)
        names = {path.name for pattern in OTHERS for path in source.glob(pattern)}
        names |= set(tokenizer_files(source))
        for name in sorted((names | set(weights)) - {_CONFIG}):
            if not name.startswith(".") and (source / name).is_file():
                (stage / name).symlink_to(find(source, name))
        if tokenizer is not None:
            copy_tokenizer(tokenizer, stage)
        config, _ = inspect(source)
        config.pop("torch_dtype", None)
        if isinstance(inner := config.get("text_config"), dict):
            inner.pop("dtype", None)
        try:
            get_model_classes(config)
        except HierMemError as error:
            raise type(error)(f"{source}: {error}") from None
        except Exception as error:
            raise _failed(source, error) from None
        (stage / _CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
        yield stage, work / "out"
    except OSError as error:
        raise FormatError(
            f"{folder}: cannot be written ({error.strerror or error}); check the folder and free "
            "space"
        ) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _run(source: Path, stage: Path, out: Path, options: dict[str, Any]) -> None:
    from mlx_lm import convert

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it tells of its steps
            convert(str(stage), str(out), trust_remote_code=False, **options)
    except Exception as error:  # code of any architecture, on files of anybody
        raise _failed(source, error) from error


def _failed(source: Path, error: Exception) -> FormatError:
    reason = one_line(f"{type(error).__name__}: {error}", 300)
    return FormatError(
        f"{source}: mlx-lm cannot convert it ({reason}); check that mlx-lm has this architecture "
        "and that the files are whole"
    )
