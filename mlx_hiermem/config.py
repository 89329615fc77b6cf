"""MemoryConfig: everything that describes a memory bank, in one flat dataclass.

It is what ``memory/config.json`` holds. Reading one imports no MLX, so that the command line
can do so without loading a backend; only sizes need the kind's own file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from . import kinds
from .errors import ConfigError
from .quantization import Quantization
from .shapes import MAX_SIZE, AnchorShape, shown

__all__ = ["KINDS", "PLACEMENTS", "Added", "AnchorShape", "MemoryConfig", "placement"]

#: Of a bank without added memories, and of one with them.
FORMAT_VERSION, ADDED_VERSION = 1, 2

#: Bytes of one number in each dtype that a bank may be stored in.
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

#: Kinds of encoder: what turns a text into the vector that is routed.
ENCODER_TYPES = ("embeddings", "bert")

# k^p is below 2^62, so there are fewer levels.
_MAX_LEVELS = 61
# The config of a bank is a few hundred bytes.
_MOST_BYTES = 1 << 24

_ADDED_NAME = re.compile("[a-z0-9-]{1,32}")


#: Kinds of memory, one file each in ``kinds/``.
KINDS = kinds.NAMES

#: Where in the depth of an anchor the layers with memory are (section 3 of the paper).
PLACEMENTS = ("uniform", "early", "middle", "late")


def placement(where: str, layers: int) -> tuple[int, ...] | None:
    """The layers with memory, for an anchor of so many layers.

    Args:
        where: ``uniform`` (all of them, None in a config), ``early``, ``middle`` or ``late`` (the
            first, the middle or the last half; the paper does not say how many it takes), or
            indices such as ``0,3,5``.

    Raises:
        ConfigError: it is none of these.
    """
    if where == "uniform":
        return None
    if where in PLACEMENTS:
        count = -(-layers // 2)
        first = {"early": 0, "middle": (layers - count) // 2, "late": layers - count}[where]
        return tuple(range(first, first + count))
    pieces = [piece.strip() for piece in where.split(",")]
    if not all(piece.isascii() and piece.isdigit() and len(piece) < 6 for piece in pieces):
        raise ConfigError(
            f"layers {shown(where)}: expected one of {', '.join(PLACEMENTS)}, or indices such as "
            "0,3,5"
        )
    return tuple(int(piece) for piece in pieces)


@dataclass(frozen=True)
class Added:
    """A memory that was added to a bank: level-1 clusters behind those of the tree.

    Attributes:
        name: of it; letters, digits and hyphens.
        roots: its level-1 clusters; each has a subtree of k children per cluster, as all have.

    Raises:
        ConfigError: the name or the number cannot be.
    """

    name: str
    roots: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _ADDED_NAME.fullmatch(self.name):
            raise ConfigError(
                f"added memory: name is {shown(self.name)}; expected 1 to 32 of a-z, 0-9 and -"
            )
        if type(self.roots) is not int or not 1 <= self.roots < MAX_SIZE:
            raise ConfigError(
                f"added memory {self.name}: roots is {shown(self.roots)}; expected an integer >= 1"
            )

    @classmethod
    def of(cls, value: Any) -> Added:
        """One from what a JSON file holds."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping) or set(value) != {"name", "roots"}:
            raise ConfigError(
                f"memory config: added holds {shown(value)}; expected objects with name and roots"
            )
        return cls(**value)


@dataclass(frozen=True)
class MemoryConfig:
    """Shape, placement and storage of a memory bank (the paper's *memory config*).

    Attributes:
        ranks: size multiplier of a block at each level, (r1, ..., rp); 0 means that the
            level has no memory (section 2 of the paper; for FFN the added inner width).
        kind: what a block does to a layer; one of ``KINDS``.
        branching: k, children of each cluster.
        levels: p, depth of the cluster tree. Defaults to ``len(ranks)``.
        layers: indices of the anchor's layers that have memory; ``None`` means all.
        encoder: what routes a text, ``{"type": ..., ...}``; see ``routing/encoder.py``.
        dtype: dtype of the stored blocks.
        quantization: how blocks are quantised, ``{"mode", "bits", "group_size"}`` (see
            ``quantization.py``); ``None``: not at all. ``dtype`` is then that of affine scales.
        base_anchor: ``{"name": ..., "revision": ..., "shape": {...}}`` of the anchor that the
            bank was trained with; ``shape`` holds the fields of :class:`AnchorShape`.
        added: memories that were added to the bank, in their order (docs/adding.md).
        format_version: version of the folder format (docs/format.md): 2 with added memories, else
            1; it follows from them where it is not given.

    Raises:
        ConfigError: a value is unknown or contradicts another one.
    """

    ranks: tuple[int, ...]
    kind: str = "ffn"
    branching: int = 16
    levels: int = 0
    layers: tuple[int, ...] | None = None
    encoder: Mapping[str, Any] = field(default_factory=lambda: {"type": "bert"})
    dtype: str = "bfloat16"
    quantization: Mapping[str, Any] | None = None
    base_anchor: Mapping[str, Any] | None = None
    added: tuple[Added, ...] = ()
    format_version: int = 0

    def __post_init__(self) -> None:
        def integers(name: str, low: int) -> None:
            value = getattr(self, name)
            if (
                isinstance(value, str)
                or not isinstance(value, Sequence)
                or any(isinstance(v, bool) or not isinstance(v, int) or v < low for v in value)
                or any(v >= MAX_SIZE for v in value)
            ):
                raise ConfigError(
                    f"memory config: {name} is {shown(value)}; expected a list of integers >= "
                    f"{low} and below {MAX_SIZE}"
                )
            object.__setattr__(self, name, tuple(value))

        self._check_version()
        integers("ranks", 0)
        if not any(self.ranks):
            raise ConfigError(
                f"memory config: ranks is {shown(list(self.ranks))}; at least one level needs a "
                "rank > 0"
            )
        if self.levels == 0:
            object.__setattr__(self, "levels", len(self.ranks))
        if type(self.levels) is not int or self.levels != len(self.ranks):
            raise ConfigError(
                f"memory config: levels is {shown(self.levels)} but ranks has {len(self.ranks)} "
                "entries; give one rank for each level"
            )
        k = self.branching
        if isinstance(k, bool) or not isinstance(k, int) or k < 2:
            raise ConfigError(f"memory config: branching is {shown(k)}; expected an integer >= 2")
        if (
            self.levels > _MAX_LEVELS
            or max(k, self.roots) >= 2**62
            or self.clusters(self.levels) >= 2**62
        ):
            raise ConfigError(
                f"memory config: {shown(k)}^{self.levels} clusters cannot be numbered; "
                "use fewer levels or a smaller branching"
            )
        self._one_of("kind", KINDS)
        self._one_of("dtype", DTYPE_BYTES)
        if not isinstance(self.encoder, Mapping) or self.encoder.get("type") not in ENCODER_TYPES:
            raise ConfigError(
                f"memory config: encoder is {shown(self.encoder)}; expected an object whose type "
                f"is one of {', '.join(ENCODER_TYPES)}"
            )
        if self.quantization is not None:
            try:
                Quantization.of(self.quantization)
            except ConfigError as error:
                raise ConfigError(f"memory config: {error}") from None
        if self.layers is not None:
            integers("layers", 0)
            if not self.layers or list(self.layers) != sorted(set(self.layers)):
                raise ConfigError(
                    f"memory config: layers is {shown(list(self.layers))}; expected ascending "
                    "layer indices without repeats, or null for all layers"
                )
        if self.base_anchor is not None:
            if not isinstance(self.base_anchor, Mapping) or "shape" not in self.base_anchor:
                raise ConfigError(
                    "memory config: base_anchor has no shape; expected an object with name, shape"
                )
            self._check_layers(AnchorShape.of(self.base_anchor["shape"]))
            if self.packing is not None:
                for width in set(self.row_widths()):
                    self.packing.check(width)

    def _check_version(self) -> None:
        """Check ``added`` and ``format_version``, which have to agree."""
        if isinstance(self.added, str | Mapping) or not isinstance(self.added, Sequence):
            raise ConfigError(f"memory config: added is {shown(self.added)}; expected a list")
        added = tuple(map(Added.of, self.added))
        names = [one.name for one in added]
        if len(set(names)) < len(names):
            raise ConfigError(f"memory config: added names {shown(names)}; each may be there once")
        object.__setattr__(self, "added", added)
        wanted, version = ADDED_VERSION if added else FORMAT_VERSION, self.format_version
        if type(version) is not int or version not in (0, FORMAT_VERSION, ADDED_VERSION):
            raise _unknown_version(version)
        if version not in (0, wanted):
            raise ConfigError(
                f"memory config: format_version is {version}, but with {len(added)} added memories "
                f"it is {wanted}; get the file again"
            )
        object.__setattr__(self, "format_version", wanted)

    def _one_of(self, name: str, known: Collection[str]) -> None:
        value = getattr(self, name)
        if not isinstance(value, str) or value not in known:
            raise ConfigError(
                f"memory config: {name} is {shown(value)}; known are {', '.join(sorted(known))}"
            )

    def _check_layers(self, anchor: AnchorShape) -> None:
        if self.layers is not None and self.layers[-1] >= anchor.num_hidden_layers:
            raise ConfigError(
                f"memory config: layers names layer {self.layers[-1]}, but the anchor has "
                f"{anchor.num_hidden_layers} layers (0 to {anchor.num_hidden_layers - 1})"
            )

    # ---- sizes -----------------------------------------------------------------------

    def anchor_shape(self, anchor: Any = None) -> AnchorShape:
        """The shape of ``anchor``, or of the base anchor when none is given."""
        if anchor is None:
            if self.base_anchor is None:
                raise ConfigError(
                    "memory config: base_anchor is null, so sizes are unknown; pass the anchor"
                )
            anchor = self.base_anchor["shape"]
        return AnchorShape.of(anchor)

    def memory_layers(self, anchor: Any = None) -> tuple[int, ...]:
        """Indices of the anchor's layers that have memory."""
        shape = self.anchor_shape(anchor)
        self._check_layers(shape)
        return tuple(range(shape.num_hidden_layers)) if self.layers is None else self.layers

    def clusters(self, level: int) -> int:
        """Clusters of ``level`` (levels count from 1): roots * k^(l-1); k^l if none was added."""
        return self.roots * self.branching ** (level - 1)

    @property
    def roots(self) -> int:
        """Clusters of level 1: the k of the tree, and those of the added memories."""
        return self.branching + sum(one.roots for one in self.added)

    def added_roots(self) -> dict[str, range]:
        """Name -> the level-1 clusters of each added memory."""
        found, first = {}, self.branching
        for one in self.added:
            found[one.name] = range(first, first + one.roots)
            first += one.roots
        return found

    def with_added(self, added: Sequence[Added]) -> MemoryConfig:
        """The same with other added memories."""
        return replace(self, added=tuple(added), format_version=0)

    @property
    def memory_levels(self) -> tuple[int, ...]:
        """The levels that have memory (rank > 0), counted from 1."""
        return tuple(level for level, rank in enumerate(self.ranks, 1) if rank)

    def row_widths(self, anchor: Any = None) -> tuple[int, ...]:
        """Widths of the matrices of one block, layer after layer: each is (rank, width)."""
        per_layer = kinds.find(self.kind).row_widths(self.anchor_shape(anchor))
        return per_layer * len(self.memory_layers(anchor))

    def block_size(self, level: int, anchor: Any = None) -> int:
        """s_l: numbers in one block of ``level``."""
        return self.ranks[level - 1] * sum(self.row_widths(anchor))

    def fetch_size(self, anchor: Any = None) -> int:
        """Numbers in one fetched memory: the sum of s_l over the levels."""
        return sum(self.ranks) * sum(self.row_widths(anchor))

    def bank_size(self, anchor: Any = None) -> int:
        """Numbers in the whole bank: the sum of s_l times the clusters of the level. The generic
        memory is not counted."""
        return sum(
            self.block_size(level, anchor) * self.clusters(level) for level in self.memory_levels
        )

    @property
    def packing(self) -> Quantization | None:
        """The checked ``quantization``."""
        return None if self.quantization is None else Quantization.of(self.quantization)

    def row_parts(self, anchor: Any = None) -> list[tuple[int, ...]]:
        """For each matrix of a block the bytes of one row, part by part (one if not quantised)."""
        size, packing = DTYPE_BYTES[self.dtype], self.packing
        if packing is None:
            return [(width * size,) for width in self.row_widths(anchor)]
        return [packing.row_bytes(width, size) for width in self.row_widths(anchor)]

    def block_bytes(self, level: int, anchor: Any = None) -> int:
        """Bytes of one stored block of ``level``."""
        return self.ranks[level - 1] * sum(map(sum, self.row_parts(anchor)))

    @property
    def stored_dtype(self) -> str:
        """Dtype of the tensors in the files: ``dtype``, or "uint8" in a quantised bank."""
        return self.dtype if self.quantization is None else "uint8"

    def stored_size(self, level: int) -> int:
        """Elements of ``stored_dtype`` in one stored block of ``level``."""
        if self.quantization is None:
            return self.block_size(level)
        return self.block_bytes(level)

    # ---- files -----------------------------------------------------------------------

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MemoryConfig:
        """Build from a mapping; unknown and missing keys are named in a ConfigError."""
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"memory config: expected a JSON object, found {type(values).__name__}"
            )
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            names = ", ".join(unknown)
            plain = names.isprintable() and len(names) <= 80
            raise ConfigError(
                f"memory config: unknown key {names if plain else shown(names)}; known keys are "
                f"{', '.join(sorted(known))}"
            )
        if "ranks" not in values:
            raise ConfigError("memory config: ranks is missing; give one rank for each level")
        if values.get("format_version") == 0:  # which here would stand for none given
            raise _unknown_version(values["format_version"])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """A mapping that ``from_dict`` and JSON take; without ``added`` where nothing was added."""
        values = asdict(self)
        if not self.added:
            del values["added"]
        return values

    @classmethod
    def load(cls, path: str | Path) -> MemoryConfig:
        """Read ``memory/config.json``; errors name the file."""
        path = Path(path)
        try:
            with open(path, "rb") as file:
                data = file.read(_MOST_BYTES + 1)
            if len(data) > _MOST_BYTES:
                raise ConfigError(f"more than {_MOST_BYTES} bytes; expected a few hundred")
            return cls.from_dict(json.loads(data.decode("utf-8")))
        except FileNotFoundError:
            raise ConfigError(
                f"{path}: no such file; expected the config.json of a memory folder"
            ) from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not valid JSON ({error}); write it again") from None
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write ``memory/config.json``, whole or not at all."""
        from .files import AtomicFile  # which loads NumPy, and the help of a command does not

        path = Path(path)
        with AtomicFile(path.parent, path.name) as file:
            file.write((json.dumps(self.to_dict(), indent=2) + "\n").encode())


def _unknown_version(version: Any) -> ConfigError:
    return ConfigError(
        f"memory config: format_version is {shown(version)}; this version of mlx_hiermem reads "
        f"{FORMAT_VERSION} and {ADDED_VERSION}; update mlx_hiermem or convert the bank"
    )
