"""Where a model is: a folder, a model that ships with the package, or a Hub repository."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ConfigError

if TYPE_CHECKING:
    from .bank.parts import Part

_ASSETS = Path(__file__).parent / "assets"


def shipped_models() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(path.parent.name for path in _ASSETS.glob("*/config.json"))


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
    if name and folder.is_dir():  # Path("") would be the folder we are in
        return folder
    if name in shipped_models():
        return _ASSETS / name
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ConfigError(
            f"{name or repr(name)}: no such folder; give a model folder, one of the shipped models "
            f"({', '.join(shipped_models()) or 'none'}), or a Hub repository (owner/name)"
        )
    from .hub import download  # imports the Hub's client, which folders can do without

    return download(name, revision, part).folder
