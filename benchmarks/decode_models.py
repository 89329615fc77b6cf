"""What the decoding benchmark compares: a model folder with a bank, a wider anchor, LoRA adapters.

Their numbers are random, which takes as long. The bank has the paper's ranks, so its blocks have
the paper's size, but only two children to a cluster: 96 MB for the 160M anchor in place of 9.2 GB.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model

from mlx_hiermem.anchors import get_model_classes, openlm
from mlx_hiermem.backend import backend_name

from . import fetch_bank

#: The paper's anchors, and the ranks of the memories that it gives them.
RANKS = {"160M": (256, 64, 16, 0), "410M": (512, 128, 32, 0), "1.4B": (768, 256, 16, 0)}
ADAPTERS = ("adapter-0", "adapter-1")


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        anchor: its sizes.
        ranks: of the memory.
        encoder: what routes, as ``fetch_bank.write_model`` takes it.
        tokens: that are decoded in a round, of one sequence.
        batch_tokens: the same in a batch, of each sequence.
        batch: sequences of a batch.
        prompt: tokens of the prompt whose prefill is timed.
        rounds: of decoding; others are half as many.
    """

    anchor: openlm.ModelArgs
    ranks: tuple[int, ...]
    encoder: dict[str, object]
    tokens: int = 8
    batch_tokens: int = 4
    batch: int = 8
    prompt: int = 512
    rounds: int = 31

    @property
    def widening(self) -> int:
        """R: rows that a fetched memory adds to each layer."""
        return sum(self.ranks)


def options(parser: argparse.ArgumentParser) -> None:
    """The options of a benchmark that writes such a model."""
    parser.add_argument(
        "--anchor",
        choices=list(RANKS),
        default="160M",
        help="the paper's anchor (default: 160M)",
    )
    parser.add_argument(
        "--folder", type=Path, help="where to write the model (default: the temporary folder)"
    )


def sizes(anchor: str, smoke: bool) -> Sizes:
    """The sizes for an anchor on this machine: on a GPU longer rounds, which are shorter there."""
    encoder = {"type": "bert", "model": "encoder", "max_length": 256, "width": 384, "layers": 6}
    if smoke:
        encoder |= {"width": 32, "layers": 1}
        small = fetch_bank.SMOKE
        return Sizes(small, (8, 4, 2, 0), encoder, tokens=2, batch_tokens=2, prompt=8, rounds=2)
    found = Sizes(openlm.PRESETS[anchor], RANKS[anchor], encoder)
    if backend_name() == "cpu":
        return found
    return replace(found, tokens=64, batch_tokens=32, prompt=2048)


def write_model(folder: Path, sizes: Sizes) -> None:
    """Write a model folder with its bank, and beside it the LoRA adapters (``ADAPTERS``)."""
    branching = 2
    encoder = {key: sizes.encoder[key] for key in ("type", "model", "max_length")}
    config = fetch_bank.make_config(sizes.anchor, sizes.ranks, branching, encoder=encoder)
    levels = len(sizes.ranks)
    fetch_bank.write_model(folder, sizes.anchor, dict(sizes.encoder), levels, branching)
    fetch_bank.write_random_bank(folder / "memory", config, "bank")
    rank = lora_rank(sizes.anchor, config.fetch_size())
    for seed, name in enumerate(ADAPTERS):
        write_adapter(folder.parent / name, sizes.anchor, rank, seed)


def dense(sizes: Sizes, dtype: mx.Dtype) -> openlm.Model:
    """The anchor with each FFN wider by R: as many parameters as the anchor and a memory."""
    args = sizes.anchor
    mx.random.seed(1)
    model = openlm.Model(replace(args, intermediate_size=args.intermediate_size + sizes.widening))
    openlm.init_weights(model)
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


def twin(anchor: nn.Module) -> openlm.Model:
    """The anchor without memories, on the very same weights."""
    model = openlm.Model(anchor.args)
    model.update(anchor.parameters())
    return model


def parameters(model: nn.Module) -> int:
    """How many numbers a model has."""
    return sum(value.size for _, value in tree_flatten(model.parameters()))


def read_per_token(model: openlm.Model) -> int:
    """How many of them one token reads: of input embeddings that are no head, only a row."""
    if model.args.tie_word_embeddings:
        return parameters(model)
    table = model.model.embed_tokens.weight
    return parameters(model) - table.size + table.shape[1]


# ---- LoRA adapters of mlx-lm -----------------------------------------------------------


def _lora_arrays(args: openlm.ModelArgs, rank: int) -> Iterator[tuple[str, mx.array]]:
    """Names and arrays of an adapter on all matrices of all layers, mlx-lm's default; lazy."""
    model = openlm.Model(args)
    linear_to_lora_layers(model, args.num_hidden_layers, _lora_parameters(rank))
    for name, value in tree_flatten(model.parameters()):
        if name.endswith((".lora_a", ".lora_b")):
            yield name, value


def _lora_parameters(rank: int) -> dict[str, float]:
    return {"rank": rank, "scale": 2.0, "dropout": 0.0}


def lora_size(args: openlm.ModelArgs, rank: int) -> int:
    """Parameters of an adapter of a rank."""
    return sum(value.size for _, value in _lora_arrays(args, rank))


def lora_rank(args: openlm.ModelArgs, size: int) -> int:
    """The largest rank whose adapter has no more than ``size`` parameters, but at least 1."""
    return max(1, size // lora_size(args, 1))


def write_adapter(folder: Path, args: openlm.ModelArgs, rank: int, seed: int) -> None:
    """Write a random adapter in bfloat16, as mlx-lm's ``lora`` command leaves one."""
    mx.random.seed(seed)
    folder.mkdir(parents=True)
    weights = {
        name: (0.02 * mx.random.normal(value.shape)).astype(mx.bfloat16)
        for name, value in _lora_arrays(args, rank)
    }
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {
        "fine_tune_type": "lora",
        "num_layers": args.num_hidden_layers,
        "lora_parameters": _lora_parameters(rank),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")


def load_with_adapter(folder: Path, adapter: Path, dtype: mx.Dtype) -> nn.Module:
    """What ``mlx_lm.utils.load(folder, adapter_path=adapter)`` does but for the tokenizer, which
    stays the same; its ``load`` itself takes no architecture of somebody else's.

    Args:
        dtype: that is computed in; where it is the stored one nothing is converted.
    """
    model, _ = load_model(folder, lazy=True, get_model_classes=get_model_classes)
    model = load_adapters(model, str(adapter))
    model.eval()
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model
