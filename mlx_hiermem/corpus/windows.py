"""Documents to tokens, cut into windows; a window keeps its text, which is what is embedded.

A document is its tokens and one end-of-text token; a window is ``window`` tokens of it (the
paper's 2,048), the last one shorter. Notable: the text of a window is cut out of the document by
the tokens' places in it, not decoded; special tokens that a text spells out are taken for plain
text, so that no document can end another.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, FormatError
from ..files import AtomicFile
from .info import token_dtype

#: A longer text is tokenised in pieces, cut at white space: a tokenizer's working memory is many
#: times the text's.
_MAX_PIECE = 1 << 20

#: The files that a tokenizer may consist of.
_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja",
)  # fmt: skip


@dataclass(frozen=True)
class Windowed:
    """A document cut into windows.

    Attributes:
        tokens: (n,) uint16 or uint32, the end-of-text token at the end.
        texts: the text of each window; window i is ``tokens[i * window : (i + 1) * window]``.
    """

    tokens: np.ndarray
    texts: list[str]


class Windower:
    """Tokenises and cuts documents.

    Args:
        folder: of the tokenizer.
        window: tokens of a window.
        end_of_text: the id of the token at each document's end.

    Raises:
        FormatError: the tokenizer cannot be loaded.
    """

    def __init__(self, folder: str | Path, window: int, end_of_text: int) -> None:
        self.window = window
        self.end_of_text = end_of_text
        tokenizer = load_tokenizer(folder)
        self.vocab_size = vocabulary(tokenizer)
        self.dtype = token_dtype(self.vocab_size)
        self._slow: Any = None
        self._fast: Any = None
        if tokenizer.is_fast:
            from tokenizers import Tokenizer

            # A copy: transformers sets these options anew with each call of its own.
            self._fast = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            self._fast.no_truncation()
            self._fast.no_padding()
            self._fast.encode_special_tokens = True
        else:
            self._slow = tokenizer

    def __call__(self, texts: Sequence[str]) -> list[Windowed | None]:
        """Cut each text; None for one of which no token is left."""
        pieces = [list(_pieces(text)) for text in texts]
        flat = [piece for text in pieces for piece in text]
        if self._fast is not None:
            encodings = iter(self._fast.encode_batch(flat, add_special_tokens=False))
        else:
            encodings = iter([self._slow.encode(piece, add_special_tokens=False) for piece in flat])
        return [
            self._cut(text, [(piece, next(encodings)) for piece in mine])
            for text, mine in zip(texts, pieces, strict=True)
        ]

    def _cut(self, text: str, encoded: list[tuple[str, Any]]) -> Windowed | None:
        ids = [found if self._fast is None else found.ids for _, found in encoded]
        count = sum(map(len, ids))
        if not count or not text.strip():
            return None
        tokens = np.empty(count + 1, self.dtype)
        at = 0
        for found in ids:
            tokens[at : at + len(found)] = found
            at += len(found)
        tokens[count] = self.end_of_text
        if count < self.window:
            return Windowed(tokens, [text])
        bounds = range(0, count, self.window)
        if self._fast is None:
            texts = [
                self._slow.decode(tokens[start : min(start + self.window, count)])
                for start in bounds
            ]
        else:
            places = _places(encoded)  # (count, 2)
            windows = (places[start : start + self.window] for start in bounds)
            texts = [text[int(w[:, 0].min()) : int(w[:, 1].max())] for w in windows]
        if count % self.window == 0:
            # The last window is the end-of-text alone: it belongs where the one before it does.
            texts.append(texts[-1])
        return Windowed(tokens, texts)


def _pieces(text: str) -> Iterator[str]:
    """The text, or pieces of at most ``_MAX_PIECE`` characters that start at white space."""
    start = 0
    while len(text) - start > _MAX_PIECE:
        end = start + _MAX_PIECE
        at = max(text.rfind(space, start + 1, end) for space in (" ", "\n"))
        end = at if at > start else end
        yield text[start:end]
        start = end
    yield text[start:] if start else text


def _places(encoded: list[tuple[str, Any]]) -> np.ndarray:
    """(count, 2) int64: where each token's characters start and end in the document."""
    places, before = [], 0
    for piece, found in encoded:
        places.append(np.asarray(found.offsets, np.int64).reshape(-1, 2) + before)
        before += len(piece)
    return np.concatenate(places)


# ---- the tokenizer's files -------------------------------------------------------------


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a folder, which needs no ``config.json``.

    Raises:
        FormatError: it is missing or damaged.
    """
    from ..anchors import load_anchor_tokenizer

    # Of a folder without config.json transformers would ask for one.
    return load_anchor_tokenizer(folder, {"model_type": "openlm"})


def vocabulary(tokenizer: Any) -> int:
    """One more than the largest id."""
    return 1 + max(tokenizer.get_vocab().values())


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files into ``target``, which is made.

    Raises:
        ConfigError: there are none.
        FormatError: one cannot be read or written.
    """
    names = [name for name in _FILES if (source / name).is_file()]
    if not {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"} & set(names):
        raise ConfigError(
            f"{source}: holds no tokenizer; expected tokenizer.json or tokenizer.model; name a "
            "folder that has one with --tokenizer"
        )
    copy_files(source, target, names)


def copy_files(source: Path, target: Path, names: Sequence[str]) -> None:
    """Copy files by name, each whole or not at all."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        try:
            data = (source / name).read_bytes()
        except OSError as error:
            raise FormatError(f"{source / name}: cannot be read ({error.strerror})") from None
        with AtomicFile(target, name) as file:
            file.write(data)


def find_end_of_text(folder: Path, tokenizer: Any) -> int:
    """The id of the token that ends a text: the tokenizer's, else that of ``config.json``.

    Raises:
        ConfigError: neither names one.
    """
    found = tokenizer.eos_token_id
    if found is None:
        try:
            found = json.loads((folder / "config.json").read_text("utf-8")).get("eos_token_id")
        except (OSError, ValueError, RecursionError, AttributeError):
            found = None
        found = found[0] if isinstance(found, list) and found else found
    if type(found) is not int or not 0 <= found < vocabulary(tokenizer):
        raise ConfigError(
            f"{folder}: the tokenizer names no end-of-text token; set eos_token in its "
            "tokenizer_config.json"
        )
    return found
