"""Pack documents by cluster into sequences of one length, each with the leaf of its cluster path.

Documents of one leaf follow each other with an end-of-text token between them, and the sequences of
all leaves are shuffled together (section 3 of the paper). A document that fits into one sequence is
never cut, since its end would then be learned without the beginning that names it: it starts the
next sequence, and the room left is filled up with end-of-text tokens. Longer documents are cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import TrainingError


@dataclass(frozen=True)
class PackedCorpus:
    """Packed sequences and the leaf that each belongs to.

    Attributes:
        tokens: (N, T) int32.
        leaves: (N,) int64, cluster ids at the deepest level; shallower ids follow from nesting.
        end_of_text: the token between documents.
    """

    tokens: np.ndarray
    leaves: np.ndarray
    end_of_text: int

    def __len__(self) -> int:
        return len(self.tokens)

    def batches(self, batch_size: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Endless batches ((B, T) tokens, (B,) leaves), shuffled anew in each pass.

        A batch may span the end of one pass and the start of the next, so each sequence is seen
        exactly once per pass.
        """
        rng = np.random.default_rng(seed)
        order = np.empty(0, dtype=np.int64)
        while True:
            while len(order) < batch_size:
                order = np.concatenate([order, rng.permutation(len(self))])
            chosen, order = order[:batch_size], order[batch_size:]
            yield self.tokens[chosen], self.leaves[chosen]


def pack(
    documents: Iterable[tuple[Sequence[int], int]], length: int, end_of_text: int
) -> PackedCorpus:
    """Pack (tokens, leaf) pairs into sequences of ``length`` tokens.

    Args:
        documents: tokens without an end-of-text token, and the leaf's cluster id.
        length: T, tokens of a sequence.
        end_of_text: token id put after each document.

    Raises:
        TrainingError: there is no document, or ``length`` is too short to predict anything.
    """
    if length < 2:
        raise TrainingError(f"sequence length {length}: expected at least 2 tokens")
    packers: dict[int, list[list[int]]] = {}
    for tokens, leaf in documents:
        sequences = packers.setdefault(int(leaf), [[]])
        text = [*tokens, end_of_text]
        if len(sequences[-1]) + len(text) > length and sequences[-1]:
            sequences.append([])
        while len(text) > length:
            sequences[-1].extend(text[:length])
            sequences.append([])
            text = text[length:]
        sequences[-1].extend(text)
    if not packers:
        raise TrainingError("the corpus has no documents; give at least one with text in it")
    leaves = [leaf for leaf in sorted(packers) for sequence in packers[leaf] if sequence]
    sequences = [sequence for leaf in sorted(packers) for sequence in packers[leaf] if sequence]
    tokens = np.full((len(sequences), length), end_of_text, dtype=np.int32)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = sequence
    return PackedCorpus(tokens, np.asarray(leaves, dtype=np.int64), end_of_text)
