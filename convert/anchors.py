"""Which kind of anchor a path or a repository holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mlx_hiermem.bank.parts import Part
from mlx_hiermem.errors import FormatError
from mlx_hiermem.models import find_model, shipped_models

from .anchor import Anchor
from .bank.description import Entry
from .bank.gather import open_checkpoints, sort_tensors
from .openlm.anchor import OpenLMAnchor
from .request import Request
from .sources import KeyMap, Source


def open_anchor(
    request: Request, key_map: KeyMap | None, stack: ExitStack
) -> tuple[Anchor, Sequence[Entry], list[Source], list[str]]:
    """Open what ``--model`` names.

    Returns:
        The anchor, the tensors of a memory that its checkpoint holds too, what is open, and the
        names that were left out on purpose.

    Raises:
        ConfigError, FormatError, InputError: it cannot be opened, or is no anchor.
    """
    path = Path(request.model).expanduser()
    if not path.exists() or str(request.model) in shipped_models():
        path = find_model(request.model, request.revision, Part(levels=()))
    config = _config(path)
    if config is not None and not _is_openlm(config):
        from .huggingface_anchor import HuggingFaceAnchor  # imports mlx-lm, which takes seconds

        return HuggingFaceAnchor(path, config, request), [], [], []
    opened = open_checkpoints(path, stack)
    if len(opened) > 1:
        raise FormatError(
            f"{path}: holds checkpoints of subtrees; give the anchor as --model, and this folder "
            "as --bank"
        )
    found = sort_tensors(opened, key_map, request.ignore)
    anchor = OpenLMAnchor(path, found.others, request)
    return anchor, found.memory, [source for source, _ in opened], list(found.left_out)


def _config(path: Path) -> dict[str, Any] | None:
    """The config.json of a folder; None where there is none."""
    where = path / "config.json"
    if not path.is_dir() or not where.is_file():
        return None
    try:
        found = json.loads(where.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not valid JSON ({str(error)[:80]})") from None
    if not isinstance(found, dict):
        raise FormatError(f"{where}: expected a JSON object")
    return found


def _is_openlm(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of one of OpenLM's wrappers, and not of our own model."""
    return config.get("model_type") == "openlm" and "hidden_size" not in config
