"""The keys of a memory bank in a PyTorch checkpoint (docs/convert.md lists them).

No bank of the paper was published, so the names are ours: three layouts, and the generic memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_NUMBER = r"\d{1,9}"
_KEY = re.compile(
    rf"(?:model\.)?(?:layers\.(?P<outer>{_NUMBER})\.)?memory\."
    rf"(?:level(?P<level>{_NUMBER})(?:\.(?P<cluster>{_NUMBER}))?"
    rf"|generic(?:\.level(?P<part>{_NUMBER}))?)"
    rf"(?:\.layers\.(?P<inner>{_NUMBER}))?\.(?P<matrix>[A-Za-z]\w{{0,63}})",
    re.ASCII,
)


@dataclass(frozen=True)
class Place:
    """What a key says of its tensor.

    Attributes:
        level: counted from 1; 0 for the generic memory of all levels joined.
        generic: of the generic memory.
        cluster: the one cluster that it is of; None: of all, along the first axis.
        layer: the one layer of the anchor that it is of; None: of all with memory, along an axis.
        matrix: name of the matrix, one of the kind's ``matrices``.
    """

    level: int
    generic: bool
    cluster: int | None
    layer: int | None
    matrix: str

    @property
    def layout(self) -> str:
        """What docs/convert.md calls the layout."""
        if self.cluster is not None:
            return "per cluster"
        return "stacked" if self.layer is None else "per layer"


def parse(key: str) -> Place | None:
    """The place of a key; None if it is no key of a memory."""
    found = _KEY.fullmatch(key)
    if found is None:
        return None
    number = {
        name: None if found[name] is None else int(found[name])
        for name in ("outer", "inner", "level", "cluster", "part")
    }
    stated = number["level"]
    generic = stated is None
    if number["outer"] is not None and number["inner"] is not None:
        return None
    # Of a cluster, each layer has a tensor of its own; of a whole level, only in front.
    if not generic and (number["cluster"] is None) != (number["inner"] is None):
        return None
    layer = number["inner"] if number["outer"] is None else number["outer"]
    level = number["part"] or 0 if stated is None else stated
    if level == 0 and (not generic or number["part"] == 0):
        return None
    if number["cluster"] is not None and number["outer"] is not None:
        return None
    return Place(level, generic, number["cluster"], layer, found["matrix"])


def is_memory_key(key: str) -> bool:
    """Whether a key is one of a memory."""
    return parse(key) is not None
