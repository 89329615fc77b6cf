"""Views: the texts that a window is assigned by.

A block knows only what was trained into it, so a question has to land where its document was
trained. Routed by its whole text alone a document often lands elsewhere than a question about it;
with views it is packed under each distinct leaf that one of its views lands in (not in the paper).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ..errors import InputError

#: Words of the view ``prefix``: about as many as a question has.
PREFIX_WORDS = 8

_FIELD = "field:"

# A sentence ends with its sign and what closes a quotation, before white space; in scripts without
# spaces the sign alone ends it. A blank line ends it too.
_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|(?<=[。！？])|\s*\n\s*\n\s*")


def sentences(text: str) -> list[str]:
    """The sentences of a text, none of them empty."""
    found, start = [], 0
    for match in _END.finditer(text):
        closing = match.group().rstrip() if match.group().strip() else ""
        found.append((text[start : match.start()] + closing).strip())
        start = match.end()
    found.append(text[start:].strip())
    return [sentence for sentence in found if sentence]


def _prefix(text: str) -> list[str]:
    return [" ".join(text.split(None, PREFIX_WORDS)[:PREFIX_WORDS])]


#: Name -> what makes the texts of a view from the text of a window.
VIEWS = {
    "text": lambda text: [text],
    "prefix": _prefix,
    "first-sentence": lambda text: sentences(text)[:1],
    "sentences": sentences,
}


def check_views(views: Sequence[str]) -> None:
    """Raise InputError unless each name is that of a view."""
    known = f"{', '.join(VIEWS)} and {_FIELD}NAME"
    if not views:
        raise InputError(f"--views: none is given; known are {known}")
    for view in views:
        if view not in VIEWS and not (view.startswith(_FIELD) and len(view) > len(_FIELD)):
            raise InputError(f"--views: {view!r} is none; known are {known}")


def field_names(views: Sequence[str]) -> list[str]:
    """The fields that ``field:NAME`` views take."""
    return [view.removeprefix(_FIELD) for view in views if view.startswith(_FIELD)]


def view_texts(views: Sequence[str], text: str, fields: Mapping[str, Sequence[str]]) -> list[str]:
    """The distinct texts of all views of a window, in the order of ``views``.

    Args:
        text: of the window.
        fields: of its document, by name.

    Returns:
        At least one text, unless the window has words and none of its views does.
    """
    found: dict[str, None] = {}
    for view in views:
        texts: Sequence[str]
        if view in VIEWS:
            texts = VIEWS[view](text)
        else:
            texts = fields.get(view.removeprefix(_FIELD), ())
        found.update(dict.fromkeys(one for one in texts if one.strip()))
    # A window of blanks, in the midst of a document, has to go somewhere too.
    return list(found) if found or text.strip() else [text]
