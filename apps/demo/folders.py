"""What visitors are told of an error: no folder of the machine."""

from __future__ import annotations

import re
from collections.abc import Sequence


def without_folders(text: str, private: Sequence[str]) -> str:
    """An error's text without the folders that it names; the names of files stay.

    Args:
        private: folders that it may name, which may have spaces in them.
    """
    for folder in sorted(private, key=len, reverse=True):
        text = text.replace(f"{folder}/", "").replace(folder, "the bank")
    return re.sub(r"(?<![\w.])/(?:[^\s/:]+/)*(?=[^\s/:])", "", text)
