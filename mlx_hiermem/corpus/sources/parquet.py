"""Parquet files, one row group per unit (extra ``parquet``: pyarrow).

A file of one row group is one unit; it is still read in batches of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from ...errors import ConfigError, InputError, one_line
from .document import Document, Unit, document_of

_ROWS = 256


def row_groups(path: str) -> list[int]:
    """Bytes of each row group, from the file's footer."""
    file = _open(path)
    with file:
        return [
            file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)
        ]


def read_parquet(unit: Unit, text_field: str, fields: Sequence[str]) -> Iterator[Document]:
    """The rows of the unit's row groups; only the columns that are asked for are read."""
    import pyarrow as pa

    file = _open(unit.path)
    with file:
        names = file.schema_arrow.names
        if text_field not in names:
            raise InputError(
                f'{unit.path}: no column "{text_field}"; columns are {", ".join(names)[:200]}; '
                "name one with --text-field"
            )
        columns = [name for name in dict.fromkeys((text_field, *fields)) if name in names]
        counts = [file.metadata.row_group(i).num_rows for i in range(unit.end)]
        row, total = sum(counts[: unit.begin]), max(1, sum(counts[unit.begin :]))
        first = row
        groups = list(range(unit.begin, unit.end))
        batches = file.iter_batches(_ROWS, row_groups=groups, columns=columns, use_threads=False)
        try:
            for batch in batches:
                for record in batch.to_pylist():
                    row += 1
                    where = partial("{}: row {}".format, unit.path, row)
                    done = min((row - first) / total, 1.0)
                    yield document_of(record, text_field, fields, done, where)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise _damaged(unit.path, error) from None


def _open(path: str) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError(
            f"{path}: reading Parquet needs pyarrow; run pip install 'mlx-hiermem[parquet]'"
        ) from None
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def _damaged(path: str, error: Exception) -> InputError:
    reason = one_line(error)
    return InputError(f"{path}: not a readable Parquet file ({reason}); get the file again")
