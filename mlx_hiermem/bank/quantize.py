"""Writing a bank in fewer bits: each row of each matrix is packed by MLX, group by group.

A quantised block is a block like any other: one row of a level file, one read. See ``quantization``
for the modes, and docs/format.md for the bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..arrays import real_number
from ..config import MemoryConfig
from ..errors import FormatError
from ..quantization import Quantization
from .checksums import CHECKSUMS
from .files import hash_file
from .fill import check_block
from .layout import CONFIG, GENERIC, level_of
from .manifest import check_sha256
from .reader import BlockReader
from .slots import GENERIC_KEY, Key
from .stored import StoredLayout
from .writer import write_bank

_MLX = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# Rows are packed in pieces of about this many numbers.
_CHUNK_NUMBERS = 1 << 24


def quantize_bank(
    source: Path,
    target: Path,
    bits: int,
    mode: str | None = None,
    group_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the bank in ``source`` again, quantised, into the folder ``target``.

    Files that route (tree, encoder) are copied, and so is ``blocked.json``.

    Args:
        source: a memory folder.
        target: a folder that may exist, but holds no bank.
        bits: 8 or 4 (``affine`` has 2, 3, 5 and 6 too).
        mode: "affine", "mxfp4", "nvfp4" or "mxfp8"; None: see ``Quantization.choose``.
        group_size: numbers that share a scale; None: the one of the mode that fits.
        progress: called with (bytes in all, bytes read since the call before).

    Returns:
        ``{"quantization", "revision", "bytes_before", "bytes", "error"}``: bytes of all blocks
        before and after, and the root mean square of what packing changed over that of the numbers.

    Raises:
        ConfigError: the widths of the rows fit no such quantisation.
        FormatError: the bank is quantised already, is not what its manifest and its checksums say,
            holds NaN, or cannot be read or written.
    """
    reader = BlockReader(source)
    try:
        config = reader.config
        if config.quantization is not None:
            raise FormatError(
                f"{source}: is quantised already ({config.packing}); quantise the bank that it was "
                "made from"
            )
        packing = Quantization.choose(config.row_widths(), bits, mode, group_size)
        packed = replace(config, quantization=packing.to_dict())
        target.mkdir(parents=True, exist_ok=True)
        for name in reader.manifest.files:
            if level_of(name) is None and name not in (CONFIG, GENERIC, CHECKSUMS):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(reader.real_path(name), target / name)
                # The new manifest must not vouch for a file that the old one does not know.
                check_sha256(source / name, hash_file(target, name)[1], reader.manifest.files[name])
        total = sum(
            config.block_bytes(level) * config.clusters(level) for level in config.memory_levels
        )
        packer = Packer(config, packing)
        layout = StoredLayout(config)

        def stored(level: int, key: Key) -> np.ndarray:
            block = reader.stored(level, key if isinstance(key, int) else None)
            raw = block.view(np.uint8)
            check_block(reader, layout, level, key, [memoryview(raw)], raw)
            return block

        def rows(level: int) -> Iterator[np.ndarray]:
            step = max(1, _CHUNK_NUMBERS // config.block_size(level))
            for first in range(0, config.clusters(level), step):
                count = min(step, config.clusters(level) - first)
                blocks = [stored(level, first + row) for row in range(count)]
                where = f"{source}: level {level}, from block {first} on"
                yield packer.pack(np.stack(blocks), where)
                if progress is not None:
                    progress(total, count * config.block_bytes(level))

        generic = [
            packer.pack(stored(level, GENERIC_KEY)[None], f"{source}: the generic memory")[0]
            for level in config.memory_levels
        ]
        levels = {level: rows(level) for level in config.memory_levels}
        revision = write_bank(target, packed, levels, np.concatenate(generic))
    finally:
        reader.close()
    return {
        "quantization": packing.to_dict(),
        "revision": revision,
        "bytes_before": total,
        "bytes": sum(
            packed.block_bytes(level) * packed.clusters(level) for level in packed.memory_levels
        ),
        "error": packer.error,
    }


class Packer:
    """Packs blocks of a bank's config, and keeps count of the error."""

    def __init__(self, config: MemoryConfig, packing: Quantization) -> None:
        self._config = config
        self._packing = packing
        self._widths = [(width, len(list(same))) for width, same in groupby(config.row_widths())]
        self._squares = self._errors = 0.0

    @property
    def error(self) -> float:
        """Root mean square of the errors over that of the numbers."""
        return (self._errors / self._squares) ** 0.5 if self._squares else 0.0

    def pack(self, blocks: np.ndarray, where: str) -> np.ndarray:
        """Stored blocks (n, s_l) as stored blocks (n, bytes) uint8 of the quantised bank."""
        numbers = mx.array(blocks)
        if self._config.dtype == "bfloat16":
            numbers = numbers.view(mx.bfloat16)
        options = self._options
        parts: list[list[np.ndarray]] = [[], [], []]
        start, rank = 0, blocks.shape[1] // sum(self._config.row_widths())
        for width, count in self._widths:
            size = count * rank * width
            # (n, size) -> (n * count * rank, width)
            matrices = numbers[:, start : start + size].reshape(-1, width)
            rows = len(matrices)
            if matrices.size % 32:
                # MLX on a CPU packs nvfp4 by 32 numbers: a row more, and its groups are even.
                matrices = mx.concatenate([matrices, matrices[-1:]])
            packed = mx.quantize(matrices, **options)
            # As a fetch will give it: in the bank's dtype.
            again = mx.dequantize(*packed, **options, dtype=matrices.dtype)[:rows]
            again, exact = again.astype(mx.float32), matrices[:rows].astype(mx.float32)
            self._squares += real_number(mx.square(exact).sum())
            errors = real_number(mx.square(exact - again).sum())
            if not np.isfinite(errors):
                raise FormatError(
                    f"{where}: holds numbers too large for {self._packing}; try another mode"
                )
            self._errors += errors
            for part, array in enumerate(packed):
                raw = np.array(array[:rows].view(mx.uint8))
                parts[part].append(raw.reshape(len(blocks), -1))
            start += size
        # Each part of all matrices, one part behind the other.
        return np.concatenate([raw for part in parts for raw in part], axis=1)

    @property
    def _options(self) -> dict[str, Any]:
        packing = self._packing
        return {"group_size": packing.group_size, "bits": packing.bits, "mode": packing.mode}
