"""What ``corpus.json`` says: how a corpus was made, and which shards hold its sequences.

Notable: the revision is the sha256 over the rest of the table, which in turn holds the sha256 of
every shard, of the tree and of the tokenizer; so two corpora of one revision are the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError
from ..files import AtomicFile

INFO = "corpus.json"
FORMAT_VERSION = 1

#: The splits that a corpus may have; each is a folder of shards.
SPLITS = ("train", "validation")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")
_SHA256 = re.compile("[0-9a-f]{64}")


def _wrong(found: str) -> FormatError:
    return FormatError(f"{INFO}: {found}")


def _integer(what: str, value: Any, low: int, high: float = 2**62) -> None:
    if type(value) is not int or not low <= value < high:
        raise _wrong(f"{what} is {str(value)[:40]!r}; expected an integer from {low} on")


def _sha256(what: str, value: Any) -> None:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise _wrong(f"{what} is {str(value)[:80]!r}; expected a sha256 of 64 hex digits")


def _keys(what: str, value: Any, kind: type) -> dict[str, Any]:
    """``value`` as arguments of the dataclass ``kind``: an object with exactly its fields."""
    if not isinstance(value, Mapping):
        raise _wrong(f"{what} is {str(value)[:40]!r}; expected an object")
    known = {entry.name for entry in fields(kind)}
    if set(value) != known:
        unknown, missing = sorted(set(value) - known), sorted(known - set(value))
        found = f"unknown key {unknown[0]!r}" if unknown else f"no key {missing[0]!r}"
        raise _wrong(f"{what} has {found[:80]}; expected exactly {', '.join(sorted(known))}")
    return dict(value)


@dataclass(frozen=True)
class ShardInfo:
    """One shard of a split: two .npy files in the split's folder.

    Attributes:
        tokens: file name of the tokens, (sequences, T) uint16 or uint32.
        leaves: file name of the leaves, (sequences,) int64.
        sequences: how many sequences it holds.
        tokens_sha256: of the file of tokens.
        leaves_sha256: of the file of leaves.
    """

    tokens: str
    leaves: str
    sequences: int
    tokens_sha256: str
    leaves_sha256: str

    def __post_init__(self) -> None:
        for name in (self.tokens, self.leaves):
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise _wrong(
                    f"a shard's file is {str(name)[:80]!r}; expected a plain file name without "
                    "a folder"
                )
        _integer(f"sequences of {self.tokens}", self.sequences, 1)
        _sha256(f"tokens_sha256 of {self.tokens}", self.tokens_sha256)
        _sha256(f"leaves_sha256 of {self.leaves}", self.leaves_sha256)


@dataclass(frozen=True)
class SplitInfo:
    """What a split holds.

    Attributes:
        documents: documents in it.
        tokens: tokens of these documents, end-of-text included, each document counted once (views
            may pack a document more than once).
        sequences: packed sequences.
        fill: share of the sequences' tokens that are not filling.
        shards: in order; sequence i of the split is in the shard where the counts reach it.
    """

    documents: int
    tokens: int
    sequences: int
    fill: float
    shards: tuple[ShardInfo, ...]

    def __post_init__(self) -> None:
        _integer("documents of a split", self.documents, 1)
        _integer("tokens of a split", self.tokens, 1)
        _integer("sequences of a split", self.sequences, 1)
        if type(self.fill) not in (int, float) or not 0 < self.fill <= 1:
            raise _wrong(f"fill of a split is {str(self.fill)[:40]!r}; expected 0 to 1")
        total = sum(shard.sequences for shard in self.shards)
        if total != self.sequences:
            raise _wrong(f"a split of {self.sequences} sequences lists shards of {total}")
        names = [name for shard in self.shards for name in (shard.tokens, shard.leaves)]
        if len(set(names)) != len(names):
            raise _wrong("a split lists a file twice")

    @classmethod
    def from_dict(cls, what: str, values: Any) -> SplitInfo:
        values = _keys(what, values, cls)
        if not isinstance(values["shards"], Sequence) or isinstance(values["shards"], str):
            raise _wrong(f"shards of {what} is not a list")
        shards = (ShardInfo(**_keys(f"a shard of {what}", s, ShardInfo)) for s in values["shards"])
        return cls(**{**values, "shards": tuple(shards)})


def _check_tokenizer(table: Any) -> None:
    if not isinstance(table, Mapping) or set(table) != {"sha256", "vocab_size", "end_of_text"}:
        raise _wrong(
            f"tokenizer is {str(table)[:80]}; expected an object of sha256, vocab_size and "
            "end_of_text"
        )
    _sha256("sha256 of the tokenizer", table["sha256"])
    _integer("vocab_size of the tokenizer", table["vocab_size"], 1, 2**32)
    _integer("end_of_text of the tokenizer", table["end_of_text"], 0)
    if table["end_of_text"] >= table["vocab_size"]:
        raise _wrong(
            f"end_of_text is {table['end_of_text']}, but the tokenizer has {table['vocab_size']} "
            "ids"
        )


@dataclass(frozen=True)
class CorpusInfo:
    """The table of ``corpus.json``.

    Attributes:
        tokenizer: ``{"sha256": of its folder, "vocab_size": one more than the largest id,
            "end_of_text": id of the token at each document's end}``.
        sequence_length: T, tokens of a sequence.
        window: tokens of a window, a multiple of T: what is embedded and assigned.
        seed: of the tree, the splits and the order of the sequences.
        views: names of the views that a window is assigned by; empty: by its whole text alone.
        branching: k of the tree.
        levels: p of the tree.
        encoder: the entry ``encoder`` of a memory's config.
        tree_sha256: of ``routing/tree.safetensors``.
        source: what was read, and its ``fingerprint``.
        splits: by name; ``train`` is always there.
        embedding_sha256: for the encoder type "embeddings" the sha256 of the table's float32 bytes,
            else None.
        format_version: of the folder.

    Raises:
        FormatError: a value cannot be right.
    """

    tokenizer: Mapping[str, Any]
    sequence_length: int
    window: int
    seed: int
    views: tuple[str, ...]
    branching: int
    levels: int
    encoder: Mapping[str, Any]
    tree_sha256: str
    source: Mapping[str, Any]
    splits: Mapping[str, SplitInfo]
    embedding_sha256: str | None = None
    format_version: int = field(default=FORMAT_VERSION)

    def __post_init__(self) -> None:
        if type(self.format_version) is not int or self.format_version != FORMAT_VERSION:
            raise _wrong(
                f"format_version is {str(self.format_version)[:40]!r}; this version of mlx_hiermem "
                f"reads {FORMAT_VERSION}; update mlx_hiermem or run cluster again"
            )
        _check_tokenizer(self.tokenizer)
        _integer("sequence_length", self.sequence_length, 2)
        _integer("window", self.window, 2)
        if self.window % self.sequence_length:
            raise _wrong(
                f"window is {self.window}, not a multiple of sequence_length {self.sequence_length}"
            )
        _integer("seed", self.seed, 0)
        _integer("branching", self.branching, 2)
        _integer("levels", self.levels, 1, 64)
        if self.leaves >= 2**62:
            raise _wrong(f"{self.branching}^{self.levels} clusters cannot be numbered")
        if not isinstance(self.views, tuple) or not all(isinstance(v, str) for v in self.views):
            raise _wrong(f"views is {str(self.views)[:80]!r}; expected a list of strings")
        if not isinstance(self.encoder, Mapping) or not isinstance(self.encoder.get("type"), str):
            raise _wrong(f"encoder is {str(self.encoder)[:80]!r}; expected an object with a type")
        _sha256("tree_sha256", self.tree_sha256)
        if self.encoder["type"] == "embeddings":
            _sha256("embedding_sha256", self.embedding_sha256)
        elif self.embedding_sha256 is not None:
            raise _wrong(f"embedding_sha256 is given for an encoder of type {self.encoder['type']}")
        if not isinstance(self.source, Mapping) or not isinstance(
            self.source.get("fingerprint"), str
        ):
            raise _wrong(f"source is {str(self.source)[:80]!r}; expected one with a fingerprint")
        if "train" not in self.splits or not set(self.splits) <= set(SPLITS):
            raise _wrong(
                f"splits are {', '.join(map(str, self.splits))[:80] or 'none'}; expected train, "
                "and validation at most beside it"
            )

    @property
    def leaves(self) -> int:
        """k^p, clusters of the deepest level."""
        return self.branching**self.levels

    @property
    def token_dtype(self) -> np.dtype:
        """The dtype of the shards' tokens."""
        return token_dtype(self.tokenizer["vocab_size"])

    @property
    def revision(self) -> str:
        """The sha256 (hex) over all of the table but itself, as JSON with sorted keys."""
        text = json.dumps(self._table(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """A mapping that ``from_dict`` and JSON take, with the revision."""
        return {"revision": self.revision, **self._table()}

    def _table(self) -> dict[str, Any]:
        # Through JSON, so that what is written and what is hashed is what will be read.
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: Any) -> CorpusInfo:
        """Build from a mapping, the revision included.

        Raises:
            FormatError: naming the key that is unknown, missing or wrong.
        """
        if not isinstance(values, Mapping):
            raise _wrong("not a JSON object")
        values = dict(values)
        if "revision" not in values:
            raise _wrong("no key 'revision'; run cluster again")
        revision = values.pop("revision")
        version = values.get("format_version", FORMAT_VERSION)
        if version == FORMAT_VERSION:  # of another version the keys may differ too
            values = _keys("the table", values, cls)
            if not isinstance(values["splits"], Mapping):
                raise _wrong("splits is not an object")
            values["splits"] = {
                name: SplitInfo.from_dict(f"split {str(name)[:40]}", split)
                for name, split in values["splits"].items()
            }
            if isinstance(values["views"], list):
                values["views"] = tuple(values["views"])
            info = cls(**values)
        else:
            raise _wrong(
                f"format_version is {str(version)[:40]!r}; this version of mlx_hiermem reads "
                f"{FORMAT_VERSION}; update mlx_hiermem or run cluster again"
            )
        if revision != info.revision:
            raise _wrong(
                f"revision is {str(revision)[:64]!r}, but its table gives {info.revision!r}; it "
                "was changed by hand: copy it again or run cluster again"
            )
        return info

    def save(self, folder: str | Path) -> None:
        """Write ``corpus.json`` into ``folder``, whole or not at all.

        It goes in last: a folder without it is not a corpus yet.
        """
        with AtomicFile(Path(folder), INFO) as file:
            file.write((json.dumps(self.to_dict(), indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder: str | Path) -> CorpusInfo:
        """Read ``corpus.json`` of ``folder``; the shards are not looked at.

        Raises:
            FormatError: it is missing or is not such a table.
        """
        path = Path(folder) / INFO
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            if not path.parent.is_dir():
                found = f"{folder}: no such folder; expected a corpus"
            else:
                found = f"{path}: no such file; the folder is not a corpus, or not to its end"
            raise FormatError(
                f"{found}: make it with `mlx_hiermem cluster --data DOCUMENTS --out FOLDER`"
            ) from None
        except OSError as error:
            raise FormatError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise FormatError(
                f"{path}: not valid JSON ({str(error)[:80]}); copy it again or run cluster again"
            ) from None
        except FormatError as error:
            raise FormatError(f"{path.parent}/{error}") from None


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype that tokens are stored in: uint16 where all ids fit, else uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
