"""CorpusConfig: everything that decides what a corpus holds; its defaults are the paper's."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from .views import check_views, field_names

#: The encoder of the paper.
DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"

#: The word for the encoder that is made of the anchor's own token embeddings.
EMBEDDINGS = "embeddings"

DEFAULT_BRANCHING, DEFAULT_LEVELS = 16, 4

_WINDOW = 2048
_MOST_CLUSTERS = 1 << 24


def _words(text: str, **more: Any) -> dict[str, Any]:
    return {"help": text, **more}


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """What a corpus is made of, and how.

    Raises:
        InputError: a value is out of range, or values contradict each other.
    """

    data: tuple[str, ...] = field(
        default=(),
        metadata=_words(
            "documents: files, folders or patterns of .txt (blank lines between documents), "
            ".jsonl, .jsonl.gz, .parquet",
            split=False,
            metavar="PATH",
        ),
    )
    dataset: str | None = field(
        default=None,
        metadata=_words("in their place a Hugging Face dataset by its name", metavar="NAME"),
    )
    dataset_config: str | None = field(default=None, metadata=_words("of the dataset"))
    dataset_split: str = field(default="train", metadata=_words("of the dataset"))
    dataset_revision: str | None = field(default=None, metadata=_words("of the dataset"))
    text_field: str = field(default="text", metadata=_words("the field that holds the text"))
    model: str | None = field(
        default=None,
        metadata=_words(
            "the anchor: model folder, name of a model that ships, or repository; its tokenizer "
            "is taken",
            metavar="PATH_OR_REPO",
        ),
    )
    tokenizer: Path | None = field(
        default=None,
        metadata=_words("folder of a tokenizer, where there is no anchor yet", metavar="FOLDER"),
    )
    sequence_length: int = field(default=2048, metadata=_words("tokens of a packed sequence"))
    window: int = field(
        default=_WINDOW,
        metadata=_words(
            "tokens of a document that are embedded and assigned together; a multiple of the "
            "sequence length",
            default="2048, or the largest multiple of the sequence length up to it",
        ),
    )
    views: tuple[str, ...] = field(
        default=("text",),
        metadata=_words(
            "what a window is assigned by, and packed under: text, prefix, first-sentence, "
            "sentences, field:NAME"
        ),
    )
    encoder: str | None = field(
        default=None,
        metadata=_words(
            "BERT folder or repository, or `embeddings`: the anchor's own (needs --model)",
            default=f"that of --tree, else {DEFAULT_ENCODER}",
            metavar="NAME",
        ),
    )
    encoder_max_length: int | None = field(
        default=None,
        metadata=_words(
            "tokens after which a BERT encoder cuts a text",
            default="256, or the most that the encoder takes",
        ),
    )
    tree: Path | None = field(
        default=None,
        metadata=_words(
            "assign by this tree instead of growing one: routing/ of a corpus, or memory/ of a "
            "model",
            metavar="FOLDER",
        ),
    )
    branching: int | None = field(
        default=None, metadata=_words("children of each cluster", default=str(DEFAULT_BRANCHING))
    )
    levels: int | None = field(
        default=None, metadata=_words("depth of the tree", default=str(DEFAULT_LEVELS))
    )
    tree_samples: int = field(
        default=1_000_000, metadata=_words("vectors that the tree is grown on, at most")
    )
    validation: float = field(
        default=0.01, metadata=_words("share of the documents that is kept for validation")
    )
    seed: int = field(
        default=0, metadata=_words("of the tree, the split and the order of the sequences")
    )

    def __post_init__(self) -> None:
        if bool(self.data) == (self.dataset is not None):
            problem = "both are given" if self.data else "neither is given"
            raise InputError(f"--data and --dataset: {problem}; give the documents by one of them")
        if (self.model is None) == (self.tokenizer is None):
            problem = "neither is given" if self.model is None else "both are given"
            raise InputError(
                f"--model and --tokenizer: {problem}; give one of them, the anchor or a folder "
                "with its tokenizer"
            )
        if self.encoder == EMBEDDINGS and self.model is None:
            raise InputError("--encoder embeddings: needs the anchor's embeddings; give --model")
        lows = {
            "sequence_length": 2, "window": 2, "encoder_max_length": 3, "branching": 2,
            "levels": 1, "tree_samples": 1, "seed": 0,
        }  # fmt: skip
        for name, low in lows.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise InputError(f"{_flag(name)} is {value}; expected at least {low}")
        if self.window % self.sequence_length:
            raise InputError(
                f"--window is {self.window}; expected a multiple of --sequence-length "
                f"{self.sequence_length}"
            )
        if not 0 <= self.validation < 1:
            raise InputError(f"--validation is {self.validation}; expected 0 up to, not with, 1")
        check_views(self.views)
        if self.tree is not None:
            return
        k, p = self.branching or DEFAULT_BRANCHING, self.levels or DEFAULT_LEVELS
        if k**p > _MOST_CLUSTERS:
            raise InputError(
                f"--branching {k} --levels {p}: {k}^{p} clusters are too many to grow; give fewer"
            )
        if self.tree_samples < k**p:
            raise InputError(
                f"--tree-samples is {self.tree_samples}, fewer than the {k**p} clusters of {p} "
                f"levels of {k}; give more"
            )

    @classmethod
    def defaults(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The default of the window depends on the sequence length."""
        length = given.get("sequence_length", _WINDOW)
        return {"window": length * max(1, _WINDOW // length) if length > 0 else _WINDOW}

    @property
    def fields(self) -> list[str]:
        """Fields of a document, besides its text, that views take."""
        return field_names(self.views)

    @property
    def dataset_options(self) -> dict[str, Any]:
        """How the dataset is opened."""
        return {
            "config": self.dataset_config,
            "split": self.dataset_split,
            "revision": self.dataset_revision,
        }


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
