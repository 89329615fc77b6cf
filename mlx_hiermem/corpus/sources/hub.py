"""A Hugging Face dataset by its name, one shard per unit (extra ``datasets``).

It is streamed: nothing is downloaded beforehand. No code of a dataset's repository is ever run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from ...errors import ConfigError, InputError, one_line
from .document import Document, Unit, document_of


def shards(name: str, options: Mapping[str, Any]) -> int:
    """How many shards the dataset streams in."""
    return max(1, _load(name, options).num_shards)


def read_shard(unit: Unit, text_field: str, fields: Sequence[str]) -> Iterator[Document]:
    """The rows of shard ``unit.begin`` of ``unit.end``."""
    dataset = _load(unit.path, unit.options)
    place = f"dataset {unit.path}, shard {unit.begin} of {unit.end}"
    if dataset.num_shards != unit.end:
        raise InputError(
            f"dataset {unit.path}: has {dataset.num_shards} shards, had {unit.end} before; give a "
            "revision with --dataset-revision, and begin anew"
        )
    rows = iter(dataset.shard(unit.end, unit.begin))
    row = 0
    while True:
        where = partial("{}: row {}".format, place, row + 1)
        try:
            record = next(rows, None)
        except Exception as error:  # the readers of all formats and the Hub client, of any kind
            raise _failed(where(), error) from None
        if record is None:
            return
        row += 1
        yield document_of(record, text_field, fields, 0.0, where)


def _load(name: str, options: Mapping[str, Any]) -> Any:
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"dataset {name}: needs the datasets library; run pip install 'mlx-hiermem[datasets]'"
        ) from None
    try:
        return datasets.load_dataset(
            name,
            options.get("config"),
            split=options.get("split") or "train",
            revision=options.get("revision"),
            streaming=True,
        )
    except Exception as error:  # the Hub client and the library raise many kinds
        raise _failed(f"dataset {name}", error) from None


def _failed(where: str, error: Exception) -> InputError:
    reason = one_line(error, 300) or type(error).__name__
    return InputError(f"{where}: cannot be read ({reason}); check its name, split and the network")
