"""How often names occur in a training corpus, counted with their aliases.

The paper's figure 1 sorts the elements into buckets by that. A name counts wherever it stands as a
word of its own, in any case of its letters, whatever it means there: "lead" the verb counts too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..corpus.info import INFO
from ..corpus.sources import find_files, find_units, read_unit
from ..errors import InputError

_WORD = re.compile(r"\w+")
#: Bytes of a file that are read as one piece, and sequences of a corpus folder likewise.
_UNIT, _SEQUENCES = 64 << 20, 256


def corpus_texts(data: Sequence[str], text_field: str = "text") -> Iterator[str]:
    """Stream the texts of a corpus, with a progress bar.

    Args:
        data: files (.txt, .jsonl, .jsonl.gz, .parquet), folders of such, patterns, or corpus
            folders that ``cluster`` wrote. Of a corpus folder the training sequences are read, as
            they are trained on: a document that has several views stands in several of them, and
            one that was cut between two loses the word that it was cut in.
        text_field: of .jsonl and .parquet.

    Raises:
        InputError: nothing is there, or it is no text; the text names the file and the line.
        FormatError: a corpus folder is damaged.
    """
    folders = [Path(name).expanduser() for name in data if _is_corpus(name)]
    for folder in folders:
        yield from _sequences(folder)
    files = find_files([name for name in data if not _is_corpus(name)])
    units = find_units(files, _UNIT)
    if not folders and not units:
        raise InputError("the corpus is empty; name files, folders, or a corpus folder")
    total = sum(unit.size for unit in units)
    with tqdm(total=total, unit="B", unit_scale=True, desc="count", disable=None) as bar:
        for unit in units:
            begin = bar.n
            for document in read_unit(unit, text_field):
                yield document.text
                bar.update(begin + int(document.done * unit.size) - bar.n)
            bar.update(begin + unit.size - bar.n)


def _is_corpus(name: str) -> bool:
    return (Path(name).expanduser() / INFO).is_file()


def _sequences(folder: Path) -> Iterator[str]:
    """The training sequences of a corpus folder, as text."""
    from ..corpus.folder import Corpus
    from ..corpus.windows import load_tokenizer

    corpus = Corpus.open(folder)
    tokenizer, sequences = load_tokenizer(corpus.tokenizer_folder), corpus.train
    with tqdm(total=len(sequences), unit="sequence", desc="count", disable=None) as bar:
        for start in range(0, len(sequences), _SEQUENCES):
            numbers = np.arange(start, min(start + _SEQUENCES, len(sequences)))
            tokens, _ = sequences.take(numbers)
            for row in tokens.tolist():
                # With the end-of-text tokens, so that no two documents grow together.
                yield tokenizer.decode(row)
            bar.update(len(numbers))


def count_names(texts: Iterable[str], names: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """How often each name stands in the texts.

    Args:
        names: name -> its aliases; all of them single words.

    Returns:
        Name -> occurrences of it and of its aliases, in the order of ``names``.

    Raises:
        InputError: a name is no single word, or stands for two.
    """
    words: dict[str, str] = {}
    for name, aliases in names.items():
        for word in (name, *aliases):
            if not _WORD.fullmatch(word):
                raise InputError(f"name {word[:40]!r}: expected a single word")
            if words.setdefault(word.lower(), name) != name:
                raise InputError(f"name {word!r} stands for {words[word.lower()]} and {name}")
    found: Counter[str] = Counter()
    for text in texts:
        found.update(word for word in _WORD.findall(text.lower()) if word in words)
    counts = dict.fromkeys(names, 0)
    for word, count in found.items():
        counts[words[word]] += count
    return counts


def buckets(counts: Sequence[int], number: int) -> np.ndarray:
    """Which of ``number`` buckets of one size (up to one) each count is in, (N,) int64.

    Bucket 0 holds the most frequent; of equal counts the earlier comes first.
    """
    order = np.argsort(-np.asarray(counts, np.int64), kind="stable")
    edges = [round(i * len(order) / number) for i in range(number + 1)]
    found = np.empty(len(order), np.int64)
    for bucket in range(number):
        found[order[edges[bucket] : edges[bucket + 1]]] = bucket
    return found
