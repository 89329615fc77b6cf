"""What a bank in PyTorch is: what its memory_config.json says, the rest read off names and shapes.

Nothing is guessed where two answers fit: then the message says what to write into the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_hiermem import kinds
from mlx_hiermem.errors import ConfigError, FormatError
from mlx_hiermem.shapes import AnchorShape, shown

from ..sources import SourceTensor
from .keys import Place

CONFIG = "memory_config.json"
_KEYS: dict[str, type | tuple[type, ...]] = {
    "kind": str, "branching": int, "levels": int, "ranks": list, "layers": list,
    "transposed": list, "encoder": dict, "alpha": (int, float),
}  # fmt: skip
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Described:
    """What a ``memory_config.json`` says; what it does not say is None."""

    path: Path | None = None
    kind: str | None = None
    branching: int | None = None
    levels: int | None = None
    ranks: tuple[int, ...] | None = None
    layers: tuple[int, ...] | None = None
    transposed: frozenset[str] = frozenset()
    encoder: Mapping[str, Any] | None = field(default=None)


def read_description(path: Path | None) -> Described:
    """Read a ``memory_config.json``; None: nothing is said.

    Raises:
        ConfigError: it is missing, no JSON object, or has unknown keys or values.
    """
    if path is None:
        return Described()
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
        values = json.loads(data.decode("utf-8")) if len(data) <= _MOST_BYTES else None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({str(error)[:80]})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object of at most {_MOST_BYTES} bytes")
    values = {key: value for key, value in values.items() if value is not None}
    for key, value in values.items():
        if key not in _KEYS:
            raise ConfigError(
                f"{path}: unknown key {shown(key)}; known keys are {', '.join(sorted(_KEYS))}"
            )
        if not isinstance(value, _KEYS[key]) or isinstance(value, bool):
            raise ConfigError(f"{path}: {key} is {shown(value)}, a value of the wrong type")
    for key in ("ranks", "layers"):
        if any(type(one) is not int or one < 0 for one in values.get(key, ())):
            raise ConfigError(
                f"{path}: {key} is {shown(values[key])}; expected a list of integers >= 0"
            )
    kind = values.get("kind")
    if kind is not None and kind not in kinds.NAMES:
        raise ConfigError(f"{path}: kind is {shown(kind)}; known are {', '.join(kinds.NAMES)}")
    if values.pop("alpha", 2) != 2:
        raise ConfigError(
            f"{path}: alpha is not 2, which memories have here; multiply each B by alpha / 2"
        )
    transposed = values.pop("transposed", [])
    known = {name for one in ([kind] if kind else kinds.NAMES) for name in kinds.find(one).matrices}
    if any(not isinstance(name, str) or name not in known for name in transposed):
        raise ConfigError(
            f"{path}: transposed is {shown(transposed)}; expected names of matrices, of "
            f"{', '.join(sorted(known))}"
        )
    for key in ("ranks", "layers"):
        if key in values:
            values[key] = tuple(values[key])
    return Described(path, transposed=frozenset(transposed), **values)


@dataclass(frozen=True)
class Entry:
    """A tensor of a memory: what its key says, and of which level-1 subtree its file is.

    ``subtree`` is None where the file holds the whole bank.
    """

    place: Place
    tensor: SourceTensor
    subtree: int | None = None


def find_kind(described: Described, entries: Iterable[Entry], where: str) -> str:
    """The kind whose matrices the keys name.

    Raises:
        FormatError: they fit none, or not the one that was told.
    """
    found = {entry.place.matrix for entry in entries}
    fitting = [name for name in kinds.NAMES if found <= set(kinds.find(name).matrices)]
    if described.kind is not None:
        matrices = kinds.find(described.kind).matrices
        if other := sorted(found - set(matrices)):
            raise FormatError(
                f"{where}: has matrices {', '.join(other)[:120]}, but kind {described.kind} has "
                f"{', '.join(matrices)}; correct kind in {CONFIG}, or rename with --key-map"
            )
        return described.kind
    if len(fitting) != 1:
        raise FormatError(
            f"{where}: matrices {', '.join(sorted(found))[:120]} are those of no one kind of "
            f"memory; write kind into {CONFIG} ({', '.join(kinds.NAMES)}), or use --key-map"
        )
    return fitting[0]


def find_branching(
    described: Described, entries: Sequence[Entry], tree: int | None, where: str
) -> int:
    """k: told, or the tree's, or the root of how many clusters a level has.

    Raises:
        FormatError: levels do not agree, or nothing tells.
    """
    if described.branching is not None:
        return described.branching
    if tree is not None:
        return tree
    roots = set()
    clusters: dict[int, int] = {}
    for entry in entries:
        place, shape = entry.place, entry.tensor.shape
        if place.cluster is not None or not shape:
            count = (place.cluster or 0) + 1
        elif entry.subtree is None:
            count = shape[0]
        elif place.level == 1:
            count = entry.subtree + 1
        else:  # k^(l-1) of the level's k^l clusters; maybe not all subtrees are there
            root = round(shape[0] ** (1 / (place.level - 1)))
            count = shape[0] * root
        clusters[place.level] = max(count, clusters.get(place.level, 0))
    if any(entry.subtree is not None for entry in entries) and len(clusters) > 1:
        clusters.pop(1, None)  # the deeper ones tell also where the last subtree is missing
    for level, count in clusters.items():
        root = round(count ** (1 / level))
        roots.add(root if root**level == count else 0)
    if len(roots) != 1 or min(roots) < 2:
        raise FormatError(
            f"{where}: levels have {shown(clusters)} clusters, which are no powers of one "
            f"branching; is a part missing? else write branching into {CONFIG}"
        )
    return roots.pop()


def find_layers(
    described: Described, entries: Iterable[Entry], shape: AnchorShape, where: str
) -> tuple[int, ...]:
    """The anchor's layers with memory, ascending: told, or named by keys, or all.

    Raises:
        FormatError: a stacked tensor has another number of layers than all, and nobody tells
            which.
    """
    if described.layers is not None:
        return described.layers
    entries = list(entries)
    named = {entry.place.layer for entry in entries if entry.place.layer is not None}
    if named:
        return tuple(sorted(named))
    every = shape.num_hidden_layers
    axis = 0 if entries[0].place.generic else 1
    found = entries[0].tensor.shape[axis : axis + 1]
    if found != (every,):
        raise FormatError(
            f"{where}: {entries[0].tensor.name} is {entries[0].tensor.shape}, the anchor has "
            f"{every} layers; write into {CONFIG} which layers have memory, as layers: [0, 1, ...]"
        )
    return tuple(range(every))


def find_ranks(
    described: Described, entries: Iterable[Entry], levels: int | None, where: str
) -> tuple[int, ...]:
    """(r1, ..., rp): told, or read off the shapes; a level without tensors has rank 0.

    Args:
        levels: of the tree, if there is one.

    Raises:
        FormatError: two tensors of a level have different ranks.
    """
    if described.ranks is not None:
        return described.ranks
    found: dict[int, int] = {}
    for entry in entries:
        place, shape = entry.place, entry.tensor.shape
        if place.generic or len(shape) < 2:
            continue
        rank = shape[-1] if place.matrix in described.transposed else shape[-2]
        if found.setdefault(place.level, rank) != rank:
            raise FormatError(
                f"{entry.tensor.where}: is {shape}, a rank of {rank}, but another tensor of level "
                f"{place.level} has rank {found[place.level]}; if a matrix lies the other way, "
                f"name it as transposed in {CONFIG}"
            )
    depth = max([*found, levels or 0, described.levels or 0])
    if depth > 61:
        raise FormatError(f"{where}: names level {depth}; expected fewer levels")
    return tuple(found.get(level, 0) for level in range(1, depth + 1))
