"""Where a model is: a folder, a model that ships with the package, or a Hub repository."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ConfigError

if TYPE_CHECKING:
    from .bank.parts import Part

_ASSETS = Path(__file__).parent / "assets"
_CHECKPOINTS = (".pt", ".pth", ".bin", ".ckpt")


def shipped_models() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(path.parent.name for path in _ASSETS.glob("*/config.json"))


def is_shipped(folder: Path) -> bool:
    """Whether a folder is of a model that ships, and so belongs to the package."""
    return _ASSETS.resolve() in folder.resolve().parents


def find_model(
    path_or_repo: str | Path, revision: str | None = None, part: Part | None = None
) -> Path:
    """The folder of a model.

    Args:
        path_or_repo: a folder; else the name of a model that ships; else a Hub repository
            (``owner/name``), which is downloaded, or taken from the local cache.
        revision: branch, tag or commit of the repository.
        part: which of the repository's level files are wanted; None: all. A folder is what it is.

    Returns:
        The folder. That of a repository has the commit, 40 hex digits, as its name: to be pinned
        as ``revision``.

    Raises:
        ConfigError: there is no such model, or the Hub does not give it.
        FormatError, PathError: the bank of the repository is damaged, or has no such part.
    """
    name = str(path_or_repo)
    folder = Path(name).expanduser()
    # Of os.path, as a name may be too long for the system. Path("") would be the folder we are in.
    if name and os.path.isdir(folder):
        return folder
    if name in shipped_models():
        return _ASSETS / name
    if os.path.isfile(folder):
        raise ConfigError(f"{name}: is a file; {_of_file(folder)}")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ConfigError(
            f"{name[:200] or repr(name)}: no such folder; give a model folder, one of the shipped "
            f"models ({', '.join(shipped_models()) or 'none'}), or a Hub repository (owner/name)"
            f"{_close(folder)}"
        )
    from .hub import download  # imports the Hub's client, which folders can do without

    return download(name, revision, part).folder


def _of_file(file: Path) -> str:
    """What to give in place of a file."""
    if file.suffix.lower() in _CHECKPOINTS:
        return (
            "expected a model folder; make one of this checkpoint with `mlx_hiermem convert "
            f"--model {file} --mlx-path FOLDER`"
        )
    if (file.parent / "config.json").is_file():
        return f"expected a model folder; give the folder that it is in, {file.parent}"
    return "expected a model folder, with config.json, model*.safetensors and a tokenizer"


def _close(folder: Path) -> str:
    """What may have been meant by the name of a folder that is not there."""
    try:
        found = [path.name for path in folder.parent.iterdir() if path.is_dir()]
    except OSError:
        found = []
    names = get_close_matches(folder.name, [*found, *shipped_models()], 1, 0.75)
    if not names:
        return ""
    return f"; did you mean {folder.with_name(names[0]) if names[0] in found else names[0]}?"
