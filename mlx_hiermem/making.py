"""Making a model folder with a fresh bank: an anchor's files, and memories that have no effect yet.

Notable: no weight is loaded. Whether an anchor can have the memory is tried on its network as
``config.json`` describes it, whose random weights are never computed. Only for a tree whose encoder
is made of an anchor's embeddings these are loaded, to be compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import mlx.nn as nn

from .anchors import get_model_classes
from .bank.files import find
from .bank.fresh import FreshBank, write_fresh_bank
from .bank.manifest import check_sha256
from .bank.parts import Part
from .config import AnchorShape, MemoryConfig, placement
from .errors import ConfigError, InputError, one_line
from .folders import Originals, anchor_files, check_new, copy_file, model_folder
from .memories import attach
from .models import find_model
from .tree_source import check_embeddings, check_tree, open_routing

#: Called with (what, bytes in all, bytes done since the call before).
Progress = Callable[[str, int, int], None]

DEFAULT_BRANCHING = 16


@dataclass(frozen=True)
class Made:
    """What was made: the model folder, the config of its memories, and the bank that was written.

    ``has_tree``: whether it can be routed already.
    """

    folder: Path
    config: MemoryConfig
    bank: FreshBank
    has_tree: bool


def make_model(
    model: str | Path,
    out: str | Path,
    ranks: Sequence[int],
    *,
    kind: str = "ffn",
    layers: str = "uniform",
    branching: int | None = None,
    dtype: str = "bfloat16",
    tree: str | Path | None = None,
    revision: str | None = None,
    fresh_memory: bool = False,
    progress: Progress | None = None,
) -> Made:
    """Write a model folder: an anchor, and a bank of zeros (see ``bank.fresh``).

    Args:
        model: model folder, name of a model that ships, or Hub repository.
        out: the folder to write; must be new.
        ranks: the memory config, one rank per level.
        kind, dtype: see :class:`MemoryConfig`.
        layers: which have memory; see ``config.placement``.
        branching: k; by default the tree's, else 16.
        tree: a corpus or memory folder, whose tree and encoder go into the bank.
        revision: of the Hub repository.
        fresh_memory: leave a bank behind that the model has.

    Raises:
        InputError: ``out`` exists, the model has a bank, or the tree is of another shape.
        ConfigError: there is no such model, memory config or tree, or the anchor cannot have it.
        FormatError: something is damaged, or cannot be written.
    """
    check_new(Path(out).expanduser())
    folder = find_model(model, revision, Part(levels=()))  # its bank is not wanted
    if (folder / "memory").exists() and not fresh_memory:
        raise InputError(
            f"{model}: has a memory bank already; go on from it with `mlx_hiermem train --model "
            f"{model}`, or give --fresh-memory to leave it behind"
        )
    files = Originals(folder, anchor_files(folder))
    anchor, shape = build_anchor(folder)
    if not any(name.endswith(".safetensors") for name in files.names):
        raise ConfigError(
            f"{folder}: no model*.safetensors; convert the model with mlx_lm.convert first"
        )
    routing = None if tree is None else open_routing(Path(tree).expanduser())
    if routing is not None:
        check_tree(routing, len(ranks), branching)
        branching = routing.tree.branching
    config = MemoryConfig(
        ranks=tuple(ranks),
        kind=kind,
        branching=DEFAULT_BRANCHING if branching is None else branching,
        layers=placement(layers, shape.num_hidden_layers),
        dtype=dtype,
        base_anchor={**_base(model, folder), "shape": asdict(shape)},
    )
    if routing is not None:
        config = replace(config, encoder=routing.encoder)
    try:
        attach(anchor, config)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from None
    if routing is not None:
        check_embeddings(routing, folder)
    with model_folder(out) as made:
        memory = made / "memory"
        if routing is not None:
            for name, entry in routing.files.items():
                copied = copy_file(find(routing.folder, name), memory, name)
                if entry is not None:
                    check_sha256(routing.folder / name, copied.sha256, entry)
        bank = write_fresh_bank(memory, config, _about(progress, "checksums"))
        tell = _about(progress, "anchor")
        for name in files.names:
            files.copy(name, made, tell and (lambda count: tell(files.bytes, count)))
    return Made(Path(out).expanduser(), config, bank, routing is not None)


def _about(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    return progress and (lambda total, count: progress(what, total, count))


# ---- the anchor ------------------------------------------------------------------------


def build_anchor(folder: Path) -> tuple[nn.Module, AnchorShape]:
    """The network of an anchor, whose random weights are lazy and never computed; its shape."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); expected a model folder"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); fetch it again") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ConfigError(f"{path}: no model_type; expected the config.json of an mlx-lm model")
    try:
        # Before anything is built in a size that is absurd. Of a model that sees as well, the
        # config may leave sizes to the defaults of mlx-lm's arguments.
        if "text_config" not in config:
            AnchorShape.of(config)
        network, arguments = get_model_classes(config)
        args = arguments.from_dict(config)
        AnchorShape.of(args)
        anchor = network(args)
        return anchor, AnchorShape.of(anchor)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except Exception as error:  # a wrong value in config.json may fail anywhere in mlx-lm
        reason = one_line(f"{type(error).__name__}: {error}", 300)
        raise ConfigError(
            f"{path}: the anchor cannot be built ({reason}); fetch or convert it again"
        ) from error


def _base(model: str | Path, folder: Path) -> dict[str, str]:
    """Name of the anchor for the record, and its commit if it is of the Hub."""
    if Path(model).expanduser().is_dir():
        return {"name": folder.resolve().name}
    found = {"name": str(model)}
    if re.fullmatch("[0-9a-f]{40}", folder.name):
        found["revision"] = folder.name
    return found
