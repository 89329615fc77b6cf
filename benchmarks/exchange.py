"""What a step of data-parallel training exchanges, for the paper's set-ups: arithmetic, not timing.

``python -m benchmarks.exchange [--json FILE]``. For each set-up and batch: the rows that a batch is
expected to fetch when its sequences are spread evenly over the leaves, and the bytes of float32
gradients that each process sends in a ring's all-reduce, 2 (n - 1) / n of them with n processes;
against plain data-parallel, which would exchange the anchor and the whole bank.
"""

from __future__ import annotations

from mlx_hiermem.anchors.openlm import PRESETS, Model
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.training.trainer import parameter_count

from .harness import Row, main

NAME = "exchange"
#: Anchor, ranks, and sequences of a batch (the paper's, for each set-up).
SETUPS = (("160M", (256, 64, 16, 0), 1024), ("1.4B", (768, 256, 16, 0), 2048))
PROCESSES = (2, 4, 8)


def distinct(clusters: int, sequences: int) -> float:
    """Clusters expected among sequences that are spread evenly over them."""
    return clusters * (1 - (1 - 1 / clusters) ** sequences)


def measure(smoke: bool) -> list[Row]:
    """All rows; the arithmetic is the same with ``smoke``."""
    rows = []
    for name, ranks, sequences in SETUPS:
        args = PRESETS[name]
        config = MemoryConfig(ranks=ranks)
        anchor = parameter_count(Model(args))  # made, never evaluated: no memory is taken
        fetched, words = 0.0, []
        for level in config.memory_levels:
            count = distinct(config.clusters(level), sequences)
            fetched += count * config.block_size(level, args)
            words.append(f"{count:,.0f} of {config.clusters(level):,}")
        bank = config.bank_size(args)
        key, about = f"exchange.{name}", f"{sequences} sequences; rows {', '.join(words)}"
        rows += [
            Row(f"{key}.fetched_rows_gb", 4 * fetched / 1e9, "", about),
            Row(f"{key}.anchor_gb", 4 * anchor / 1e9, "", f"{anchor:,} parameters"),
            Row(f"{key}.plain_gb", 4 * (anchor + bank) / 1e9, "", f"anchor and bank of {bank:,}"),
            Row(f"{key}.share_of_plain", (fetched + anchor) / (bank + anchor), "", ""),
        ]
        for n in PROCESSES:
            sent = 2 * (n - 1) / n * 4 * (fetched + anchor) / 1e9
            rows.append(Row(f"{key}.sent_gb_{n}", sent, "", f"by each of {n} processes"))
    return rows


if __name__ == "__main__":
    raise SystemExit(main(NAME, measure))
