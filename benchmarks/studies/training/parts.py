"""What runs of a training study share: routed corpora, and anchors that were trained for them.

Each is made once, by a process of its own, and kept in the work folder under a name that says what
it is made of. All need MLX, so nothing here is imported by the process that hands out the runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import repeat
from pathlib import Path

import mlx.core as mx
import numpy as np

from apps.atlas.corpus import documents, fact_documents
from apps.atlas.facts import facts as all_facts
from apps.atlas.recipe import Recipe, save_weights
from mlx_hiermem import load
from mlx_hiermem.anchors import openlm
from mlx_hiermem.corpus.packed import PackedCorpus, pack
from mlx_hiermem.engine import MemoryLM
from mlx_hiermem.evaluation.facts import CONTROL_FILE, QUESTIONS_FILE, load_control
from mlx_hiermem.evaluation.questions import Question, read_questions
from mlx_hiermem.memories import detach
from mlx_hiermem.models import find_model
from mlx_hiermem.routing.embeddings import EmbeddingEncoder, embedding_table
from mlx_hiermem.routing.encoder import Encoder
from mlx_hiermem.routing.grow import grow
from mlx_hiermem.routing.tree import ClusterTree
from mlx_hiermem.training.config import TrainConfig
from mlx_hiermem.training.trainer import Trainer

from .routes import Way, find_encoder, routed_texts
from .task import Anchor, Task
from .trained_encoder import of_vectors, train_encoder


@dataclass(frozen=True)
class Routed:
    """A corpus packed under the leaves of a tree, and where each fact was trained.

    Attributes:
        encoder, tree: route the questions.
        corpus: the sequences.
        leaves: for each fact the leaves of its documents.
    """

    encoder: Encoder
    tree: ClusterTree
    corpus: PackedCorpus
    leaves: list[list[int]]


class Parts:
    """The shared parts in a work folder; makes what is not there yet.

    Args:
        work: the folder.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self.recipe = Recipe()

    @cached_property
    def lm(self) -> MemoryLM:
        """The atlas that ships: its tokenizer, its encoder, its tree."""
        return load("atlas")

    @cached_property
    def questions(self) -> tuple[list[Question], list[str]]:
        """The held-out questions, in the order of the facts, and the names of the buckets."""
        return read_questions(find_model("atlas") / QUESTIONS_FILE)

    # ---- anchors -----------------------------------------------------------------------

    def anchor(self, wanted: Anchor | None, seed: int) -> openlm.Model:
        """An anchor for one run, which may change it."""
        if wanted is None:
            return detach(load_control(self.lm, find_model("atlas") / CONTROL_FILE).model)
        model = self._fresh(wanted, seed)
        if wanted.steps:
            model.load_weights(str(self.make_anchor(wanted, seed, lambda: None)))
        return model

    def make_anchor(self, wanted: Anchor, seed: int, done: Callable[[], object]) -> Path:
        """Train an anchor bare, unless it is there: on the corpus in its shuffled order, as the
        atlas's was.

        Args:
            done: called for each step.

        Returns:
            The file of its weights.
        """
        sizes = "-".join(f"{name}{value}" for name, value in asdict(wanted).items())
        file = self.work / f"anchor-{sizes}-seed{seed}.safetensors"
        if file.exists():
            for _ in range(wanted.steps):
                done()
            return file
        model = self._fresh(wanted, seed)
        settings = self.recipe.anchor_training(wanted.steps, seed)
        trainer = Trainer(model, self.mixed(), settings)
        for _ in range(wanted.steps):
            trainer.step()
            done()
        trainer.settle()
        with _whole(file) as path:
            save_weights(model, path)
        return file

    def _fresh(self, wanted: Anchor, seed: int) -> openlm.Model:
        mx.random.seed(seed)
        model = openlm.Model(self.shape(wanted))
        openlm.init_weights(model)
        mx.eval(model.parameters())
        return model

    def shape(self, wanted: Anchor) -> openlm.ModelArgs:
        """The atlas's anchor with other sizes; heads keep their width."""
        own = self.recipe.anchor
        return replace(
            own,
            hidden_size=wanted.hidden,
            intermediate_size=wanted.ffn,
            num_hidden_layers=wanted.layers,
            num_attention_heads=max(1, wanted.hidden // own.head_dim),
        )

    # ---- corpora -----------------------------------------------------------------------

    def mixed(self) -> PackedCorpus:
        """The corpus in its shuffled order: clusters play no part."""
        return self._packed("mixed", repeat(0))

    def routed(self, way: Way) -> Routed:
        """The corpus under a tree, each document where its way of routing brings it."""
        encoder = self._encoder(way.encoder)
        tree = self._tree(way, encoder)
        path = self.work / f"{way.name}-leaves.npz"
        if not path.exists():
            found = list(documents(self.recipe.corpus))
            texts = routed_texts(way.views, found)
            distinct = sorted(set(texts))
            ids, _ = tree.assign(encoder.encode(distinct))
            leaf = dict(zip(distinct, ids[:, -1].tolist(), strict=True))
            with _whole(path) as partial:
                np.savez(
                    partial,
                    leaves=[leaf[text] for text in texts],
                    facts=[one.fact_index for one in found],
                )
        with np.load(path) as arrays:
            of_document, of_fact = arrays["leaves"], arrays["facts"]
        corpus = self._packed(way.name, of_document.tolist())
        # Pairs (fact, leaf), each once, in order.
        pairs = np.unique(np.stack([of_fact, of_document], axis=1), axis=0)
        starts = np.searchsorted(pairs[:, 0], np.arange(1, len(all_facts())))
        leaves = [part.tolist() for part in np.split(pairs[:, 1], starts)]
        return Routed(encoder, tree, corpus, leaves)

    def _encoder(self, name: str) -> Encoder:
        if name != "trained":
            return find_encoder(name, self.lm)
        start = find_encoder("sif", self.lm)
        assert isinstance(start, EmbeddingEncoder)
        path = self.work / "encoder-trained.npy"
        if not path.exists():
            views = [
                [(one.prompt, one.text) for one in fact_documents(i)]
                for i in range(len(all_facts()))
            ]
            with _whole(path) as partial, partial.open("wb") as file:
                np.save(file, train_encoder(start, embedding_table(self.lm.model.anchor), views))
        return of_vectors(np.load(path), start)

    def _tree(self, way: Way, encoder: Encoder) -> ClusterTree:
        if way == Way():
            assert self.lm.tree is not None
            return self.lm.tree
        path = self.work / f"{way.name}.safetensors"
        if not path.exists():
            views = [one for i in range(len(all_facts())) for one in fact_documents(i)]
            vectors = encoder.encode(sorted(set(routed_texts(way.views, views))))
            vectors = vectors[np.random.default_rng(0).permutation(len(vectors))]
            with _whole(path) as partial:
                grow(lambda: [vectors], way.branching, way.levels, seed=0).save(partial)
        return ClusterTree.load(path)

    def _packed(self, name: str, leaves: Iterable[int]) -> PackedCorpus:
        """The packed corpus, from the work folder if it is there."""
        path = self.work / f"{name}-corpus.npz"
        if not path.exists():
            encode = self.lm.tokenizer.encode
            pairs = (
                (encode(document.text, add_special_tokens=False), leaf)
                for document, leaf in zip(documents(self.recipe.corpus), leaves, strict=False)
            )
            packed = pack(pairs, self.recipe.sequence_length, end_of_text=0)
            with _whole(path) as partial:
                np.savez(partial, tokens=packed.tokens, leaves=packed.leaves)
        with np.load(path) as arrays:
            return PackedCorpus(arrays["tokens"], arrays["leaves"], 0)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A name to write a file under that gets its own when it is whole."""
    # Two processes may make the same; the extension stays, since some savers add their own.
    partial = path.with_name(f"partial-{os.getpid()}-{path.name}")
    yield partial
    partial.replace(path)


def settings(task: Task, recipe: Recipe, generic: bool = False) -> TrainConfig:
    """The settings of a run of memories.

    Args:
        generic: of the generic memory alone, on an anchor that stays as it is.
    """
    if task.regime == "anchor":
        own = recipe.anchor_training(task.steps, task.seed)
        return replace(own, learning_rate=task.rate, final_learning_rate=task.rate / 10)
    return TrainConfig(
        "frozen" if generic else task.regime,
        iters=task.steps,
        batch_size=recipe.batch_size,
        learning_rate=task.rate,
        final_learning_rate=task.rate / 10,
        anchor_share=1.0 if task.regime == "scratch" else recipe.anchor_share,
        warmup_steps=min(50, task.steps // 2),
        weight_decay=1e-3,
        generic_probability=1.0 if generic else None,
        seed=task.seed,
    )
