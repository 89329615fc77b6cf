"""Writing an anchor as mlx-lm writes one, but as a stream: no tensor is held as a whole.

``model.safetensors``, or shards of at most 5 GiB, with an index beside; each header is written
first, because all shapes are known, then the numbers in chunks of rows. ``config.json`` comes last:
a folder without it is not a model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mlx_hiermem.bank.dtypes import SAFETENSORS, STORAGE, all_finite, from_storage, to_storage
from mlx_hiermem.errors import FormatError, InputError
from mlx_hiermem.files import AtomicFile

from .openlm.weights import DTYPES, Target

#: Bytes of a file, as mlx-lm has it; a larger tensor gets a file of its own.
SHARD = 5 << 30
# Bytes, in float32, of the rows that are read at a time: with what a conversion needs beside them
# far less than two chunks of 64 MiB.
_CHUNK = 1 << 24
INDEX, CONFIG = "model.safetensors.index.json", "config.json"


def write_anchor(
    folder: Path,
    targets: Sequence[Target],
    config: Mapping[str, Any],
    dtype: str | None = None,
    progress: Callable[[int], None] | None = None,
    *,
    shard: int = SHARD,
) -> list[str]:
    """Write the weights and ``config.json`` of an anchor.

    Args:
        folder: exists; files of these names in it are replaced.
        targets: all weights of the model, with their sources open.
        config: what ``config.json`` says.
        dtype: of all weights; None: each keeps its own.
        progress: called with the bytes written since the call before.
        shard: bytes of a file at most.

    Returns:
        Names of the files, the config last.

    Raises:
        InputError: ``dtype`` is none that weights may have.
        FormatError: a number is not finite (also: too large for ``dtype``), a tensor has a dtype
            that is no weight's, or a file cannot be read or written.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: known are {', '.join(DTYPES)}")
    for target in targets:
        for part in target.parts:
            if part.tensor.dtype not in DTYPES:
                raise FormatError(
                    f"{part.tensor.where} is stored as {part.tensor.dtype}; expected "
                    f"{', '.join(DTYPES)}; save the checkpoint again in one of them"
                )
    shards = _shards(targets, dtype, shard)
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    for name, one in zip(names, shards, strict=True):
        _write_shard(folder, name, one, dtype, progress)
    index = {
        "metadata": {
            "total_size": sum(nbytes_of(target, dtype) for target in targets),
            "total_parameters": sum(math.prod(target.shape) for target in targets),
        },
        "weight_map": dict(
            sorted(
                (target.name, name)
                for name, one in zip(names, shards, strict=True)
                for target in one
            )
        ),
    }
    _write_json(folder, INDEX, index)
    _write_json(folder, CONFIG, dict(sorted(config.items())))
    return [*names, INDEX, CONFIG]


def nbytes_of(target: Target, dtype: str | None = None) -> int:
    """Bytes of a tensor as it is written."""
    return math.prod(target.shape) * STORAGE[dtype or target.dtype].itemsize


def _shards(targets: Sequence[Target], dtype: str | None, limit: int) -> list[list[Target]]:
    shards: list[list[Target]] = [[]]
    size = 0
    for target in targets:
        nbytes = nbytes_of(target, dtype)
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(target)
        size += nbytes
    # The widest numbers first, so that all of them lie at multiples of their size.
    return [
        sorted(one, key=lambda target: -STORAGE[dtype or target.dtype].itemsize) for one in shards
    ]


def _write_shard(
    folder: Path,
    name: str,
    targets: Sequence[Target],
    dtype: str | None,
    progress: Callable[[int], None] | None,
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    ends = [0]
    for target in targets:
        ends.append(ends[-1] + nbytes_of(target, dtype))
    for target, (start, end) in zip(targets, pairwise(ends), strict=True):
        header[target.name] = {
            "dtype": SAFETENSORS[dtype or target.dtype],
            "shape": list(target.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with AtomicFile(folder, name) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for target in targets:
            for chunk in _chunks(target, dtype or target.dtype):
                # Not memoryview.cast, which refuses an array without numbers.
                file.write(memoryview(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8)))
                if progress is not None:
                    progress(chunk.nbytes)


def _chunks(target: Target, dtype: str) -> Iterator[np.ndarray]:
    """The numbers of a tensor as storage arrays of ``dtype``, some rows at a time; all finite."""
    row = max(1, math.prod(target.shape[1:]))
    rows = max(1, _CHUNK // (4 * row))
    for part in target.parts:
        source = part.tensor
        for first in range(part.first, part.first + part.count, rows):
            count = min(rows, part.first + part.count - first)
            chunk = source.read(first, count)
            if chunk.size and not all_finite(chunk, source.dtype):
                raise FormatError(
                    f"{source.where} has numbers that are not finite in rows {first} to "
                    f"{first + count - 1}; train or save the model again"
                )
            if source.dtype != dtype:
                chunk = to_storage(from_storage(chunk, source.dtype), dtype)
                if chunk.size and not all_finite(chunk, dtype):
                    raise FormatError(
                        f"{source.where} has numbers too large for {dtype} in rows {first} to "
                        f"{first + count - 1}; choose another --dtype"
                    )
            yield chunk


def _write_json(folder: Path, name: str, value: Mapping[str, Any]) -> None:
    with AtomicFile(folder, name) as file:
        file.write((json.dumps(value, indent=4) + "\n").encode())
