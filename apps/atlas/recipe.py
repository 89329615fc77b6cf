"""The recipe of the atlas: its sizes and settings, and the stages that make it.

Each stage reads what the stages before it left in the work folder and leaves files of its own, so a
build that was stopped goes on where it was, and stages that do not need each other run side by side
(``build.py``). The held-out wordings are read by no stage here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import load_tokenizer
from tqdm import trange

from mlx_hiermem.anchors import openlm
from mlx_hiermem.arrays import load_arrays
from mlx_hiermem.config import AnchorShape, MemoryConfig
from mlx_hiermem.corpus.packed import PackedCorpus, pack
from mlx_hiermem.memories import GENERIC, MemoryModel, attach
from mlx_hiermem.routing.embeddings import EmbeddingEncoder, embedding_table
from mlx_hiermem.routing.grow import grow
from mlx_hiermem.routing.tree import ClusterTree
from mlx_hiermem.training.config import TrainConfig
from mlx_hiermem.training.rows import BankRows
from mlx_hiermem.training.trainer import Trainer

from .corpus import CorpusConfig, Document, documents, fact_documents
from .facts import facts
from .tokenizer import train_tokenizer


@dataclass(frozen=True)
class Recipe:
    """Every setting of the atlas. Steps are optimizer steps of ``batch_size`` sequences."""

    seed: int = 0
    vocab_size: int = 1536
    sequence_length: int = 64
    batch_size: int = 32
    branching: int = 16
    ranks: tuple[int, ...] = (16, 64)
    layers: tuple[int, ...] = (2, 3)  # late: the best placement for facts (the paper, table 9)
    anchor: openlm.ModelArgs = field(
        default_factory=lambda: openlm.ModelArgs(
            hidden_size=64,
            num_hidden_layers=4,
            intermediate_size=192,
            num_attention_heads=4,
            head_dim=16,
            vocab_size=1536,
            tie_word_embeddings=True,
            max_position_embeddings=256,
        )
    )
    anchor_steps: int = 1200
    anchor_rate: float = 4e-3
    memory_steps: int = 2400
    memory_rate: float = 1e-2
    anchor_share: float = 0.1  # the anchor's learning rate in co-training, as a share of the bank's
    sif_a: float = 1e-5  # share of the tokens at which a token of the encoder weighs one half
    components: int = 8  # common components that the encoder takes out
    ordinary_words: int = 20_000

    @property
    def corpus(self) -> CorpusConfig:
        return CorpusConfig(seed=self.seed)

    def anchor_training(self, steps: int, seed: int) -> TrainConfig:
        """Settings of a run of the bare anchor (appendix A of the paper, at this size)."""
        return TrainConfig(
            "anchor",
            iters=steps,
            batch_size=self.batch_size,
            learning_rate=self.anchor_rate,
            final_learning_rate=self.anchor_rate / 100,
            warmup_steps=min(100, steps // 10),
            weight_decay=0.05,
            seed=seed,
        )

    def memory_training(self, generic: bool) -> TrainConfig:
        """Settings of the co-training, and of the run of the generic memory that follows it."""
        return TrainConfig(
            "frozen" if generic else "cotrain",
            iters=self.memory_steps,
            batch_size=self.batch_size,
            learning_rate=self.memory_rate,
            final_learning_rate=self.memory_rate / 10,
            anchor_share=self.anchor_share,
            warmup_steps=50,
            weight_decay=1e-3,
            generic_probability=1.0 if generic else None,
            seed=self.seed + 2,
        )


def stage_tokenizer(recipe: Recipe, work: Path) -> None:
    """Train the tokenizer: ``tokenizer/``."""
    train_tokenizer(
        (document.text for document in documents(recipe.corpus)),
        work / "tokenizer",
        recipe.vocab_size,
        recipe.seed,
        max_length=recipe.anchor.max_position_embeddings,
    )


def stage_anchor(recipe: Recipe, work: Path) -> None:
    """Train the bare anchor on the corpus: ``anchor.safetensors``."""
    mx.random.seed(recipe.seed)
    model = openlm.Model(recipe.anchor)
    openlm.init_weights(model)
    settings = recipe.anchor_training(recipe.anchor_steps, recipe.seed)
    _train(Trainer(model, _mixed_corpus(recipe, work), settings))
    save_weights(model, work / "anchor.safetensors")


def stage_tree(recipe: Recipe, work: Path) -> None:
    """Fit the encoder on the corpus, grow the tree on the facts' prompts: ``memory/``.

    The tree is grown on each distinct prompt once, so that clusters hold about as many facts,
    not about as many documents: what a block has to learn is the facts.
    """
    from wordfreq import get_frequency_dict

    words = dict(islice(get_frequency_dict("en").items(), recipe.ordinary_words))
    encoder = EmbeddingEncoder.fit(
        embedding_table(load_anchor_weights(recipe, work / "anchor.safetensors")),
        _tokenizer(work),
        (document.text for document in documents(recipe.corpus)),
        a=recipe.sif_a,
        components=recipe.components,
        extra_counts=words,
        seed=recipe.seed,
    )
    prompts = [document.prompt for i in range(len(facts())) for document in fact_documents(i)]
    vectors = encoder.encode(prompts)
    vectors = vectors[np.random.default_rng(recipe.seed).permutation(len(vectors))]
    tree = grow(lambda: [vectors], recipe.branching, len(recipe.ranks), seed=recipe.seed)
    folder = work / "memory"
    folder.mkdir(parents=True, exist_ok=True)
    encoder.save(folder)
    ClusterTree(tree.centroids, encoder.to_config()).save(folder / "tree.safetensors")


def stage_cotrain(recipe: Recipe, work: Path) -> None:
    """Train anchor, bank and generic memory together: ``cotrained/``.

    The token embeddings stay as they are: the encoder is made of them, so routes would change.
    """
    model = memory_model(recipe, load_anchor_weights(recipe, work / "anchor.safetensors"))
    model.anchor.model.embed_tokens.freeze()
    trainer = Trainer(model, clustered_corpus(recipe, work), recipe.memory_training(generic=False))
    _train(trainer)
    folder = work / "cotrained"
    folder.mkdir(exist_ok=True)
    levels = {
        f"level{level}": mx.array(
            np.stack(list(trainer.memory_rows.values(level, range(model.config.clusters(level)))))
        )
        for level in model.config.memory_levels
    }
    mx.save_safetensors(str(folder / "bank.safetensors"), levels)
    _save_generic(trainer, folder / "generic.safetensors")
    save_weights(model.anchor, folder / "anchor.safetensors")


def stage_generic(recipe: Recipe, work: Path) -> None:
    """Train the generic memory on, alone, for as many steps again: ``generic.safetensors``.

    In co-training it is used by one sequence in k + 1. That would be a weak control.
    """
    folder = work / "cotrained"
    model = memory_model(recipe, load_anchor_weights(recipe, folder / "anchor.safetensors"))
    stored, start = load_arrays(folder / "generic.safetensors")["generic"], 0
    generic = {}
    for level in model.config.memory_levels:
        size = model.config.block_size(level)
        generic[level] = np.array(stored[start : start + size])
        start += size
    # No cluster's row is touched: every sequence uses the generic memory.
    rows = BankRows(model.config, lambda level, cluster: generic[level])
    trainer = Trainer(
        model, clustered_corpus(recipe, work), recipe.memory_training(generic=True), rows
    )
    _train(trainer)
    _save_generic(trainer, work / "generic.safetensors")


def _save_generic(trainer: Trainer, path: Path) -> None:
    """Write the generic memory, the blocks of the levels one behind the other."""
    levels = trainer.model.config.memory_levels
    generic = np.concatenate(
        [next(trainer.memory_rows.values(level, [GENERIC])) for level in levels]
    )
    mx.save_safetensors(str(path), {"generic": mx.array(generic)})


def _train(trainer: Trainer) -> None:
    """Do all steps; the weights are in the model and in the rows then."""
    with trange(trainer.config.iters, desc=trainer.config.regime, unit="step") as bar:
        for _ in bar:
            bar.set_postfix_str(f"loss {trainer.step().loss:.3f}", refresh=False)
    trainer.settle()


def stage_control(recipe: Recipe, work: Path) -> None:
    """The second control: a bare anchor that saw as many tokens as anchor and memory together.

    It is trained in one run of its own, with one schedule, rather than by going on from the
    anchor, whose learning rate had come to its end: that would be a weaker control.
    """
    mx.random.seed(recipe.seed)
    model = openlm.Model(recipe.anchor)
    openlm.init_weights(model)
    steps = recipe.anchor_steps + recipe.memory_steps
    settings = recipe.anchor_training(steps, recipe.seed)
    _train(Trainer(model, _mixed_corpus(recipe, work), settings))
    save_weights(model, work / "anchor_same_tokens.safetensors")


#: Stage -> (what it does, the file it leaves, the stages it needs).
STAGES: dict[str, tuple[Callable[[Recipe, Path], None], str, tuple[str, ...]]] = {
    "tokenizer": (stage_tokenizer, "tokenizer/tokenizer_config.json", ()),
    "anchor": (stage_anchor, "anchor.safetensors", ("tokenizer",)),
    "control": (stage_control, "anchor_same_tokens.safetensors", ("tokenizer",)),
    "tree": (stage_tree, "memory/tree.safetensors", ("anchor",)),
    "cotrain": (stage_cotrain, "cotrained/anchor.safetensors", ("tree",)),
    "generic": (stage_generic, "generic.safetensors", ("cotrain",)),
}


# ---- what stages share --------------------------------------------------------------------


def memory_config(recipe: Recipe) -> MemoryConfig:
    """The memory config of the atlas."""
    return MemoryConfig(
        ranks=recipe.ranks,
        branching=recipe.branching,
        layers=recipe.layers,
        encoder={"type": "embeddings", "lowercase": True, "file": "encoder.safetensors"},
        base_anchor={"name": "atlas", "shape": asdict(AnchorShape.of(recipe.anchor))},
    )


def memory_model(recipe: Recipe, anchor: openlm.Model) -> MemoryModel:
    """An anchor of the recipe with memories attached."""
    return attach(anchor, memory_config(recipe))


def save_weights(model: openlm.Model, path: Path) -> None:
    """Write a model's weights."""
    mx.save_safetensors(str(path), dict(tree_flatten(model.parameters())), {"format": "mlx"})


def load_anchor_weights(recipe: Recipe, path: Path) -> openlm.Model:
    """The anchor whose weights ``save_weights`` wrote."""
    model = openlm.Model(recipe.anchor)
    model.load_weights(str(path))
    return model


def load_routing(recipe: Recipe, work: Path) -> tuple[EmbeddingEncoder, ClusterTree]:
    """The encoder and the tree that ``stage_tree`` made."""
    table = embedding_table(load_anchor_weights(recipe, work / "anchor.safetensors"))
    encoder = EmbeddingEncoder.load(work / "memory", table, _tokenizer(work))
    return encoder, ClusterTree.load(work / "memory" / "tree.safetensors")


def trained_leaves(recipe: Recipe, work: Path) -> list[list[int]]:
    """For each fact the leaves that its documents were packed under."""
    encoder, tree = load_routing(recipe, work)
    leaves: list[set[int]] = [set() for _ in facts()]
    for document, leaf in _routed(recipe, encoder, tree):
        leaves[document.fact_index].add(leaf)
    return [sorted(found) for found in leaves]


def clustered_corpus(recipe: Recipe, work: Path) -> PackedCorpus:
    """The corpus packed by cluster: each document under the leaf of its prompt."""
    encoder, tree = load_routing(recipe, work)
    encode = _encode(work)
    return pack(
        ((encode(document.text), leaf) for document, leaf in _routed(recipe, encoder, tree)),
        recipe.sequence_length,
        end_of_text=0,
    )


def _routed(
    recipe: Recipe, encoder: EmbeddingEncoder, tree: ClusterTree
) -> Iterator[tuple[Document, int]]:
    """(document, leaf) pairs. A document is routed as a question about it is: by its prompt."""
    known: dict[str, int] = {}
    for document in documents(recipe.corpus):
        if document.prompt not in known:
            ids, _ = tree.assign(encoder.encode([document.prompt]))
            known[document.prompt] = int(ids[0, -1])
        yield document, known[document.prompt]


def _mixed_corpus(recipe: Recipe, work: Path) -> PackedCorpus:
    """The corpus in its shuffled order, for anchors: clusters play no part."""
    encode = _encode(work)
    return pack(
        ((encode(document.text), 0) for document in documents(recipe.corpus)),
        recipe.sequence_length,
        end_of_text=0,
    )


def _tokenizer(work: Path) -> Any:
    return load_tokenizer(work / "tokenizer")


def _encode(work: Path) -> Callable[[str], list[int]]:
    return partial(_tokenizer(work).encode, add_special_tokens=False)
