"""Converting a bank against copying its files, and the memory that it takes.

A made-up checkpoint of PyTorch with the sizes of the paper's 160M anchor (a small vocabulary) and a
bank of 4 GB is converted by the whole command, with every number checked and hashed and everything
synced to the disk; ``cp`` copies the same files, without any of that. A bank twice as large shows
that the peak of memory does not follow the size.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlx_hiermem.bank.dtypes import to_storage
from mlx_hiermem.bank.layout import shards
from mlx_hiermem.cli import main as command
from mlx_hiermem.config import AnchorShape, MemoryConfig
from mlx_hiermem.convert.scattered import ScatteredFile
from mlx_hiermem.errors import HierMemError

from .harness import Row, in_fresh_process, interleave, main, ratio

SHAPE = AnchorShape(35, 512, 2048, 12, 32)
#: Memory configs of 4 GB, and of 8 GB with blocks of the same size at the first two levels.
RANKS, TWICE = (112, 28, 7, 0), (112, 28, 16, 0)
SMOKE_SHAPE = AnchorShape(4, 64, 128, 4, 16)
SMOKE_RANKS, SMOKE_TWICE = (8, 4, 1), (8, 4, 2)
VOCABULARY = 1024
#: What a Python process with MLX takes, and buffers, before shards count (the issue's allowance).
ALLOWANCE = 300e6
FORMATS = ("safetensors", "pt")


def options(parser: argparse.ArgumentParser) -> None:
    """Arguments of this script."""
    parser.add_argument("--folder", type=Path, help="where to write (default: temporary files)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--format", default=FORMATS[0], help=f"of the checkpoint: {', '.join(FORMATS)}"
    )


def measure(args: argparse.Namespace) -> Sequence[Row]:
    """The rows of this benchmark."""
    if args.format not in FORMATS:
        raise HierMemError(f"--format {args.format!r}: expected one of {', '.join(FORMATS)}")
    shape = SMOKE_SHAPE if args.smoke else SHAPE
    one, two = (SMOKE_RANKS, SMOKE_TWICE) if args.smoke else (RANKS, TWICE)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        source, nbytes = make_checkpoint(folder / "one", shape, one, args.format)
        rows = times(folder, source, nbytes, 1 if args.smoke else args.rounds)
        first = peak(folder, source, shape, one)
        shutil.rmtree(folder / "one")
        source, _ = make_checkpoint(folder / "two", shape, two, args.format)
        second = peak(folder, source, shape, two)
    shard = largest_shard(shape, one)
    about = f"{args.format}; peak {first / 1e6:.0f} MB, largest shard {shard / 1e6:.0f} MB"
    rows.append(Row("convert.peak_shards", (first - ALLOWANCE) / shard, "<= 2", about))
    about = f"peak {second / 1e6:.0f} MB for a bank twice as large, {first / 1e6:.0f} MB before"
    rows.append(Row("convert.peak_twice_vs_once", second / first, "<= 1.1", about))
    return rows


def times(folder: Path, source: Path, nbytes: int, rounds: int) -> list[Row]:
    """The whole command against ``cp``, and against ``cp`` with ``sync``."""
    out = folder / "out"

    def clear() -> None:
        shutil.rmtree(out, ignore_errors=True)
        os.sync()  # nothing of the task before is still being written

    def run(*words: object) -> None:
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
        if done.returncode:
            raise HierMemError(f"{words[0]} ended with {done.returncode}: {done.stderr[-300:]}")

    def copy_synced() -> None:
        run("cp", "-r", source, out)
        os.sync()

    found = interleave(
        {
            "convert": lambda: run(sys.executable, "-m", "mlx_hiermem", *arguments(source, out)),
            "cp": lambda: run("cp", "-r", source, out),
            "cp and sync": copy_synced,
        },
        rounds,
        warmup=0,
        before=clear,
    )
    clear()
    about = f"{nbytes / 1e9:.2f} GB"
    return [
        ratio("convert.time_vs_cp", found, "convert", "cp", "<= 3", about),
        ratio("convert.time_vs_cp_sync", found, "convert", "cp and sync", "", about),
    ]


def arguments(source: Path, out: Path) -> list[str]:
    """Arguments of the command that converts a checkpoint of :func:`make_checkpoint`."""
    checkpoint = source / "epoch_1.pt" if (source / "epoch_1.pt").exists() else source
    return [
        "convert", "--model", str(checkpoint), "--model-config", str(source / "model.json"),
        "--memory-config", str(source / "memory_config.json"), "--mlx-path", str(out),
    ]  # fmt: skip


def peak(folder: Path, source: Path, shape: AnchorShape, ranks: Sequence[int]) -> int:
    """The largest resident memory of a conversion, in bytes; what it wrote is looked at."""
    out = folder / "out"
    found = in_fresh_process(run_command, words=arguments(source, out)).peak
    config = MemoryConfig.load(out / "memory" / "config.json")
    assert config.ranks == tuple(ranks) and config.anchor_shape() == shape
    shutil.rmtree(out)
    return found


def run_command(words: list[str]) -> int:
    """``mlx_hiermem`` with these arguments, in a process of its own."""
    code = command(words)
    if code:
        raise HierMemError(f"the command ended with {code}")
    return code


def largest_shard(shape: AnchorShape, ranks: Sequence[int]) -> int:
    """Bytes of the largest level file."""
    config = _config(shape, ranks)
    return max(
        shard.rows * config.block_bytes(level)
        for level in config.memory_levels
        for shard in shards(config, level)
    )


def _config(shape: AnchorShape, ranks: Sequence[int]) -> MemoryConfig:
    base = {"name": "made up", "shape": vars(shape)}
    return MemoryConfig(ranks=tuple(ranks), base_anchor=base)


# ---- the checkpoint --------------------------------------------------------------------


def make_checkpoint(
    folder: Path, shape: AnchorShape, ranks: Sequence[int], format: str
) -> tuple[Path, int]:
    """Write anchor and bank as one state dict (layout 1) in bfloat16; its folder and its bytes."""
    folder.mkdir()
    tensors = {**_anchor(shape), **_bank(shape, ranks)}
    some = np.random.default_rng(0).standard_normal(1 << 22, np.float32) * np.float32(0.02)
    numbers = to_storage(some, "bfloat16")
    files = {"anchor": [], "memory": []}
    for name in tensors:
        files["memory" if name.startswith("memory") else "anchor"].append(name)
    for part, names in files.items():
        chosen = {name: ("bfloat16", tensors[name]) for name in names}
        with ScatteredFile(folder, f"{part}.safetensors", chosen) as out:
            for name in names:
                _, *row = tensors[name]
                for first in range(tensors[name][0]):
                    size = int(np.prod(row, dtype=np.int64))
                    out.put(name, first, np.resize(numbers, size)[None])
    width = shape.head_dim * shape.num_attention_heads
    config = {
        "hidden_dim": shape.hidden_size, "n_layers": shape.num_hidden_layers,
        "n_heads": shape.num_attention_heads, "seq_len": 2048, "vocab_size": VOCABULARY,
        "post_embed_norm": False, "weight_tying": True, "model_norm": "gain_only_layer_norm",
        "qk_norm": True, "head_dim": width // shape.num_attention_heads, "rope_theta": 100000,
    }  # fmt: skip
    (folder / "model.json").write_text(json.dumps(config))
    described = {"kind": "ffn", "branching": 16, "ranks": list(ranks)}
    (folder / "memory_config.json").write_text(json.dumps(described))
    if format == "pt":
        _as_torch(folder)
    return folder, sum(path.stat().st_size for path in folder.iterdir())


def _anchor(shape: AnchorShape) -> dict[str, tuple[int, ...]]:
    d, f, width = shape.hidden_size, shape.intermediate_size, shape.attention_width
    found: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (VOCABULARY, d)}
    for n in range(shape.num_hidden_layers):
        layer = {
            "attention.in_proj": (3 * width, d),
            "attention.out_proj": (d, width),
            "attention.q_norm": (width,),
            "attention.k_norm": (width,),
            "feed_forward.w12": (2 * f, d),
            "feed_forward.w3": (d, f),
            "attention_norm": (d,),
            "ffn_norm": (d,),
        }
        found |= {f"layers.{n}.{name}.weight": size for name, size in layer.items()}
    return {**found, "norm.weight": (d,)}


def _bank(shape: AnchorShape, ranks: Sequence[int]) -> dict[str, tuple[int, ...]]:
    L, d, found = shape.num_hidden_layers, shape.hidden_size, {}
    for matrix in ("w1", "w2", "w3"):
        for level, rank in enumerate(ranks, 1):
            if rank:
                found[f"memory.level{level}.{matrix}"] = (16**level, L, rank, d)
        found[f"memory.generic.{matrix}"] = (L, sum(ranks), d)
    return found


def _as_torch(folder: Path) -> None:
    """Put what the safetensors files hold into one file of ``torch.save``."""
    import torch
    from safetensors.torch import load_file

    state = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)  # mapped, not read
    torch.save({"epoch": 1, "name": "made up", "state_dict": state}, folder / "epoch_1.pt")
    for path in folder.glob("*.safetensors"):
        path.unlink()


if __name__ == "__main__":
    raise SystemExit(main("convert", measure, options=options))
