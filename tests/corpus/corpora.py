"""What the tests of whole corpora share: documents, a tiny BERT, and counting tokens."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_hiermem.corpus.folder import Corpus
from tests.tiny import random_texts

#: The end-of-text of the tiny model's tokenizer.
EOT = 256

# Bytes by their tokens in it: ids are in the order of the letters that stand for bytes, which are
# the printable characters of Latin-1 themselves, then U+0100 and on for the other bytes in order.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = np.array(_PRINTABLE + [byte for byte in range(256) if byte not in _PRINTABLE])


def make_documents(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Distinct documents of 1 to some hundred tokens, with fields for views."""
    texts = random_texts(count, seed)
    return [
        {
            "text": " ".join([f"{number}.", text] + [text + "."] * (number % 9)),
            "questions": [text[::-1], text[: len(text) // 2]],
            "title": text.split()[0],
        }
        for number, text in enumerate(texts)
    ]


def write_jsonl(path: Path, documents: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


def make_tiny_bert(folder: Path, seed: int = 0, layers: int = 2, width: int = 24) -> Path:
    """A random BERT in the Hugging Face layout with a WordPiece tokenizer of letters."""
    import string

    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True)
    letters = [*string.ascii_lowercase, *string.digits, "."]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    vocabulary += [f"##{letter}" for letter in letters]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=4, intermediate_size=2 * width, max_position_embeddings=64,
        initializer_range=0.3,
    )  # fmt: skip
    BertModel(config).eval().save_pretrained(folder)
    return folder


def pieces_of(tokens: np.ndarray) -> list[bytes]:
    """What stands between the end-of-text tokens of packed sequences, filling left out."""
    return [
        bytes(_BYTES[piece].tolist())
        for row in tokens
        for piece in np.split(row, np.flatnonzero(row == EOT) + 1)
        for piece in [piece[piece != EOT]]
        if len(piece)
    ]


def text_of(tokens: np.ndarray) -> bytes:
    """The text of a window, without its end-of-text."""
    return bytes(_BYTES[tokens[tokens != EOT]].tolist())


def count_tokens(corpus: Corpus) -> Counter[int]:
    """How often each byte comes in the whole corpus, and how many documents end."""
    found: Counter[int] = Counter()
    for split in corpus.splits.values():
        tokens, _ = split.take(np.arange(len(split)))
        found.update(_BYTES[tokens[tokens != EOT]].tolist())
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a corpus and its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
