"""Documents of a unit made ready: tokens, windows, and the texts that windows are routed by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from .sources import Document, Unit, read_unit
from .views import field_names, view_texts
from .windows import Windower

# Documents that are tokenised at a time, and characters after which a batch ends earlier.
_BATCH, _BATCH_CHARACTERS = 256, 1 << 20


@dataclass(frozen=True)
class Prepared:
    """A document, ready to be embedded.

    Attributes:
        tokens: with the end-of-text.
        texts: the distinct texts of all its views.
        rows_window, rows_text: (M,) for each vector row its window and its text.
        key: a number that stands for its text.
        done: the share of the unit that is read.
    """

    tokens: np.ndarray
    texts: list[str]
    rows_window: list[int]
    rows_text: list[int]
    key: int
    done: float


def prepare(
    unit: Unit, windower: Windower, text_field: str, views: Sequence[str]
) -> Iterator[list[Prepared | None]]:
    """The documents of a unit in batches; None for one of which no token is left.

    Raises:
        InputError: what is there is no document.
    """
    batch: list[Document] = []
    characters = 0
    for document in read_unit(unit, text_field, field_names(views)):
        batch.append(document)
        characters += len(document.text)
        if len(batch) == _BATCH or characters >= _BATCH_CHARACTERS:
            yield _prepare_batch(batch, windower, views)
            batch, characters = [], 0
    if batch:
        yield _prepare_batch(batch, windower, views)


def _prepare_batch(
    batch: list[Document], windower: Windower, views: Sequence[str]
) -> list[Prepared | None]:
    prepared: list[Prepared | None] = []
    windowed = windower([document.text for document in batch])
    for document, found in zip(batch, windowed, strict=True):
        if found is None:
            prepared.append(None)
            continue
        if (found.tokens[:-1] == windower.end_of_text).any():
            raise InputError(
                f"{document.where()}: the tokenizer makes its end-of-text token of what the text "
                "spells out; take that out of the text"
            )
        texts: dict[str, int] = {}
        rows_window, rows_text = [], []
        for window, text in enumerate(found.texts):
            mine = view_texts(views, text, document.fields)
            if not mine:
                raise InputError(
                    f"{document.where()}: none of the views {','.join(views)} finds a text in this "
                    "document; add text to --views"
                )
            for one in mine:
                rows_window.append(window)
                rows_text.append(texts.setdefault(one, len(texts)))
        digest = hashlib.blake2b(document.text.encode(), digest_size=8).digest()
        key = int.from_bytes(digest, "little")
        prepared.append(
            Prepared(found.tokens, list(texts), rows_window, rows_text, key, document.done)
        )
    return prepared
