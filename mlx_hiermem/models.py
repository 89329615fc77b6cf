"""Where a model is: a folder, a model that ships with the package, or a Hub repository."""

from __future__ import annotations

from pathlib import Path

from .errors import ConfigError

_ASSETS = Path(__file__).parent / "assets"


def shipped_models() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(path.parent.name for path in _ASSETS.glob("*/config.json"))


def find_model(path_or_repo: str | Path, revision: str | None = None) -> Path:
    """The folder of a model.

    Args:
        path_or_repo: a folder; else the name of a model that ships; else a Hub repository
            (``owner/name``), which is downloaded, or taken from the local cache.
        revision: branch, tag or commit of the repository.

    Raises:
        ConfigError: there is no such model.
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
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=[
                    "*.json",
                    "model*.safetensors",
                    "tokenizer*",
                    "*.jinja",
                    "*.txt",
                    "memory/*",
                    "evaluation/*",
                ],
            )
        )
    except Exception as error:  # the Hub client raises errors of several HTTP libraries
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{name}: no such folder, and the Hub does not give it ({reason}); check the name and "
            "the network"
        ) from error
