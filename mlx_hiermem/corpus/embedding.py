"""The map over units: documents -> tokens, windows, vectors (and leaves, where there is a tree).

What comes out depends on the unit alone: texts are given to the encoder in blocks that never reach
beyond a part, so that any worker, in any order, writes the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .part import Part, write_part
from .prefetch import prefetch
from .prepare import Prepared, prepare
from .sources import Unit
from .windows import Windower
from .workfolder import PartRecord, UnitRecord, WorkFolder, write_array

#: Texts that the encoder gets at a time; it sorts them by length.
BLOCK = 512

#: Tokens, or vectors, after which a part ends, since a part is held in memory; only a unit that
#: cannot be cut further has several.
PART_TOKENS, PART_ROWS = 4 << 20, 1 << 16

Report = Callable[[float], None]


@dataclass(frozen=True)
class EmbedTask:
    """What a worker has to know; it is sent to other processes.

    Attributes:
        out: the corpus folder.
        text_field, views, window: as in the config.
        end_of_text: token id.
        encoder: the encoder's config.
        assign: whether ``routing/`` holds the tree already: then leaves are kept, not vectors.
    """

    out: Path
    text_field: str
    views: tuple[str, ...]
    window: int
    end_of_text: int
    encoder: Mapping[str, Any]
    assign: bool


class UnitEmbedder:
    """Makes the parts of a unit. One per worker process."""

    def __init__(self, task: EmbedTask) -> None:
        from .encoders import open_encoder  # MLX, which the process may have to prepare for

        self.task = task
        self.work = WorkFolder(task.out)
        self.windower = Windower(self.work.tokenizer, task.window, task.end_of_text)
        self.encoder = open_encoder(self.work, task.encoder)
        self.tree = None
        if task.assign:
            from .trees import load_tree

            self.tree = load_tree(self.work.routing)

    def __call__(self, unit: Unit, report: Report | None = None) -> UnitRecord:
        """Embed a unit, unless that is done.

        Args:
            report: called with the share of the unit that is done.

        Raises:
            InputError: what is there is no document.
            FormatError: a part cannot be written.
        """
        record = self.work.record(unit.name)
        if record is not None:
            return record
        with self.work.attempt(unit.name) as folder:
            parts: list[PartRecord] = []
            empty, building = 0, _Building(self)
            batches = prepare(unit, self.windower, self.task.text_field, self.task.views)
            for batch in prefetch(batches):
                for document in batch:
                    if document is None:
                        empty += 1
                        continue
                    building.add(document)
                    while building.waiting >= BLOCK:
                        building.embed()
                        if report is not None:
                            report(document.done)
                    if building.full:
                        parts.append(building.write(folder, unit.name, len(parts)))
                        building = _Building(self)
            if building.documents:
                parts.append(building.write(folder, unit.name, len(parts)))
            record = UnitRecord(unit.name, tuple(parts), empty)
            self.work.write_record(folder, record)
        return record


class _Building:
    """A part in the making."""

    def __init__(self, embedder: UnitEmbedder) -> None:
        self.embedder = embedder
        self.documents = 0
        self._tokens: list[np.ndarray] = []
        self._lengths: list[int] = []
        self._documents: list[int] = []
        self._rows_window: list[int] = []
        self._rows_text: list[int] = []
        self._keys: list[int] = []
        self._texts: list[str] = []
        self._vectors: list[np.ndarray] = []
        self._texts_seen = 0
        self._tokens_seen = 0

    @property
    def waiting(self) -> int:
        """Texts that are not embedded yet."""
        return len(self._texts)

    @property
    def full(self) -> bool:
        return self._tokens_seen >= PART_TOKENS or len(self._rows_window) >= PART_ROWS

    def add(self, document: Prepared) -> None:
        window, windows = self.embedder.task.window, len(self._lengths)
        self._rows_window += [windows + row for row in document.rows_window]
        self._rows_text += [self._texts_seen + row for row in document.rows_text]
        self._texts += document.texts
        self._texts_seen += len(document.texts)
        self._tokens.append(document.tokens)
        whole, rest = divmod(len(document.tokens), window)
        lengths = [window] * whole + [rest] * bool(rest)
        self._lengths += lengths
        self._documents += [self.documents] * len(lengths)
        self._keys.append(document.key)
        self.documents += 1
        self._tokens_seen += len(document.tokens)

    def embed(self) -> None:
        """Embed the next block of texts."""
        texts, self._texts = self._texts[:BLOCK], self._texts[BLOCK:]
        self._vectors.append(self.embedder.encoder.encode(texts))

    def write(self, folder: Path, unit: str, number: int) -> PartRecord:
        while self.waiting:
            self.embed()
        vectors = np.concatenate(self._vectors)[self._rows_text]
        stem = f"{unit}-{number:03d}"
        if self.embedder.tree is not None:
            leaves = self.embedder.tree.assign(vectors)[0][:, -1]
            write_array(folder / f"{stem}.leaves.npy", leaves)
            vectors = vectors[:, :0]
        write_array(folder / f"{stem}.keys.npy", np.array(self._keys, np.uint64))
        part = Part(
            tokens=np.concatenate(self._tokens),
            starts=np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)]),
            documents=np.array(self._documents, np.int64),
            rows_window=np.array(self._rows_window, np.int64),
            vectors=vectors,
        )
        write_part(folder / f"{stem}.safetensors", part)
        return PartRecord(part.windows, len(vectors), self.documents, len(part.tokens))
