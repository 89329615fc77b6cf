"""Models on the Hub: which files of a repository are wanted, and how they come.

Notable:
- Only data comes: files are chosen by name from the repository's own list, and neither code nor
  pickles are among the names.
- Everything of one download comes from one commit, also when the branch moves meanwhile.
- Level files come last. Where they are in the cache, all that belongs to them is too, so that
  the cache can be used without asking the Hub.
- The work is ``huggingface_hub``'s: its cache, its resumed connections, its progress bars.
"""

from __future__ import annotations

import errno
import glob
import json
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bank.layout import CONFIG, GENERIC, expected_files
from .bank.manifest import MANIFEST, read_manifest
from .config import MemoryConfig
from .errors import ConfigError, HierMemError, one_line

if TYPE_CHECKING:
    from .bank.parts import Part

_MEMORY = "memory"
#: What tells which other files there are.
_FIRST = (CONFIG, f"{_MEMORY}/{CONFIG}", f"{_MEMORY}/{MANIFEST}")
#: How the names of files end that hold data and nothing that could be run.
_DATA = (
    ".json", ".jsonl", ".jsonl.gz", ".safetensors", ".jinja", ".txt", ".model", ".tiktoken",
)  # fmt: skip
_COMMIT = re.compile("[0-9a-f]{40}")
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class Found:
    """A repository, or a part of it, in the local cache.

    Attributes:
        folder: the model folder.
        commit: the commit that it is of, 40 hex digits: as ``revision`` it names the same again.
    """

    folder: Path
    commit: str


def download(repo: str, revision: str | None = None, part: Part | None = None) -> Found:
    """The model folder of a Hub repository, downloaded as far as it is not in the cache.

    Without a network, or with ``HF_HUB_OFFLINE=1``, what is in the cache is used. A commit that
    is in the cache is used without asking the Hub.

    Args:
        repo: ``owner/name``.
        revision: branch, tag or commit; None: the main branch.
        part: which level files are wanted; None: all.

    Raises:
        ConfigError: the repository, the revision or a file of it cannot be had, or there is no
            space for it.
        ConfigError, FormatError, PathError: its bank is damaged or has no such part.
    """
    with explained(repo, revision), progress_bars(False):
        folder = _snapshot(repo, revision)
    missing = _missing(folder, part)
    if missing:
        with explained(repo, revision, missing), progress_bars():
            _fetch(repo, folder, part)
        missing = _missing(folder, part)
    if missing:
        raise ConfigError(
            f"{repo}: commit {folder.name} has no {_some(missing)}; ask for the levels and "
            "subtrees that it has, or for another revision"
        )
    return Found(folder, folder.name)


def _snapshot(repo: str, revision: str | None) -> Path:
    """The folder of a revision in the cache, with what tells which files there are."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    options: dict[str, Any] = {"allow_patterns": list(_FIRST)}
    if revision is not None and _COMMIT.fullmatch(revision):
        try:
            found = snapshot_download(repo, revision=revision, local_files_only=True, **options)
            return Path(found)
        except LocalEntryNotFoundError:
            # Fails at once where there is no network; the download would try for half a minute.
            HfApi().model_info(repo, revision=revision)
    return Path(snapshot_download(repo, revision=revision, **options))


def _fetch(repo: str, folder: Path, part: Part | None) -> None:
    """Download what is wanted and not there into the snapshot ``folder``."""
    from huggingface_hub import HfApi, snapshot_download

    commit = folder.name
    info = HfApi().model_info(repo, revision=commit, files_metadata=True)
    files = {file.rfilename: file for file in info.siblings or ()}

    def bring(names: Iterable[str]) -> None:
        patterns = [glob.escape(name) for name in names if name in files]
        if patterns:
            snapshot_download(repo, revision=commit, allow_patterns=patterns)

    bring(name for name in _FIRST if not (folder / name).is_file())
    anchor = [name for name in files if is_anchor_file(name)]
    others, levels = _memory_files(folder, part)
    _check_space(repo, folder, [files[n] for n in (*anchor, *others, *levels) if n in files])
    bring((*anchor, *others))
    bring(levels)


def is_anchor_file(name: str) -> bool:
    """Whether ``name`` in a model folder is a data file of the anchor or of its evaluation."""
    folder, _, base = name.rpartition("/")
    if folder not in ("", "evaluation") or base.startswith(".") or not base.endswith(_DATA):
        return False
    # Other weights in the root are copies in formats that MLX does not read, or adapters.
    return folder != "" or not base.endswith(".safetensors") or base.startswith("model")


def is_data(name: str) -> bool:
    """Whether a file of a memory folder is data, by its name; nothing else is downloaded."""
    return name.endswith((*_DATA, ".md"))


def memory_files(memory: Path, part: Part | None) -> tuple[list[str], list[str]]:
    """Names of the files in a memory folder, of which only config and manifest need to be there.

    Returns:
        The files that every part needs, and the level files of ``part`` (None: all).

    Raises:
        ConfigError, FormatError, PathError: config or manifest are damaged; there is no such part.
    """
    config = MemoryConfig.load(memory / CONFIG)
    try:
        levels = [name for name in expected_files(config) if name not in (CONFIG, GENERIC)]
    except ConfigError as error:
        raise ConfigError(f"{memory / CONFIG}: {error}") from None
    listed = read_manifest(memory).files
    others = [name for name in listed if name not in set(levels) and is_data(name)]
    if part is not None:
        part.check(config)
        wanted = set(part.files(config))
        levels = [name for name in levels if name in wanted]
    return [*others, MANIFEST], levels


def _memory_files(folder: Path, part: Part | None) -> tuple[list[str], list[str]]:
    # As memory_files, relative to the model folder; nothing where there is no bank.
    memory = folder / _MEMORY
    if not (memory / CONFIG).is_file():
        return [], []
    if not (memory / MANIFEST).is_file():
        return [f"{_MEMORY}/{MANIFEST}"], []
    others, levels = memory_files(memory, part)
    return [f"{_MEMORY}/{name}" for name in others], [f"{_MEMORY}/{name}" for name in levels]


def _missing(folder: Path, part: Part | None) -> list[str]:
    """What is known to be wanted and is not in the snapshot."""
    others, levels = _memory_files(folder, part)
    names = [CONFIG, *_weights(folder), *others, *levels]
    return [name for name in names if not (folder / name).is_file()]


def _weights(folder: Path) -> list[str]:
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        names = {name for name in index["weight_map"].values() if is_anchor_file(name)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        names = {
            path.name for path in folder.glob("model*.safetensors")
        }  # no index, or no good one
    return sorted(names) or ["model.safetensors"]


def _check_space(repo: str, folder: Path, files: Sequence[Any]) -> None:
    """Raise ConfigError if the files that are not in the cache yet do not fit on its disk."""
    home = folder.parents[1]  # .../models--owner--name/snapshots/<commit>
    need = 0
    for file in files:
        blob = file.blob_id if file.lfs is None else file.lfs.sha256
        if not (folder / file.rfilename).is_file() and not (home / "blobs" / str(blob)).is_file():
            need += file.size or 0
    try:
        free = shutil.disk_usage(home).free
    except OSError:
        return  # the download will say what is wrong with the folder
    if need > free:
        raise ConfigError(
            f"{repo}: {need:,} bytes to download, but {home} has {free:,} free; free some space, "
            "set HF_HOME to a folder on a larger disk, or ask for fewer levels or subtrees"
        )


@contextmanager
def progress_bars(shown: bool = True) -> Iterator[None]:
    """Let the Hub's client show its progress bars only where ``shown`` and somebody may look."""
    from huggingface_hub import constants, utils

    if shown and sys.stderr.isatty():
        yield
    elif utils.are_progress_bars_disabled() or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None:
        yield  # somebody has decided
    else:
        utils.disable_progress_bars()
        try:
            yield
        finally:
            utils.enable_progress_bars()


# ---- errors ----------------------------------------------------------------------------


@contextmanager
def explained(
    repo: str, revision: str | None, missing: Sequence[str] = (), upload: bool = False
) -> Iterator[None]:
    """Turn what the Hub client raises into a ConfigError of one line.

    Args:
        repo, revision: what was asked for.
        missing: files that the cache lacks, to be named.
        upload: whether something was sent, not fetched.
    """
    try:
        yield
    except HierMemError:
        raise
    except Exception as error:  # the client raises errors of its own and of its HTTP library
        reason, action = _explain(repo, revision, error)
        if upload:
            where = f"{repo}: "
        elif missing:
            where = f"{repo}: {_some(missing)} not in the cache, and "
        else:
            where = f"{repo}: no such folder, and "
        raise ConfigError(f"{where}{reason}; {action}") from error


def _explain(repo: str, revision: str | None, error: BaseException) -> tuple[str, str]:
    """What is wrong, and what to do."""
    from huggingface_hub import constants, errors

    while isinstance(error, (errors.LocalEntryNotFoundError, RuntimeError)) and error.__cause__:
        error = error.__cause__  # what the client says of itself is less than what happened
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    text = one_line(getattr(error, "server_message", None) or error)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the Hub may not be asked (HF_HUB_OFFLINE is set)", (
            "unset it, or give a repository, revision and part that were downloaded before"
        )
    if isinstance(error, errors.HFValidationError):
        return "it is no name of a Hub repository", "give owner/name: letters, digits, -, _ and ."
    if isinstance(error, errors.GatedRepoError):
        return "the Hub gives it to those who accepted its terms", (
            f"accept them at {constants.ENDPOINT}/{repo} and {_LOG_IN}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the Hub has no revision {revision!r} of it", "give a branch, tag or commit of it"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the Hub has no such repository, or not for you", (
            f"check the name; if it is private, {_LOG_IN}"
        )
    if status in (401, 403):
        return f"the Hub refuses ({status}: {text})", f"{_LOG_IN} to a token that may do this"
    if status in (409, 412):
        return f"the Hub refuses ({status}: {text})", (
            "somebody else has changed it meanwhile, look at it and try again"
        )
    if status is not None:
        return f"the Hub answers {status} ({text})", "try again later"
    if isinstance(error, OSError) and error.errno in (
        errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS,
    ):  # fmt: skip
        return f"{error.filename or constants.HF_HUB_CACHE} cannot be used ({error.strerror})", (
            "free some space, or set HF_HOME to a folder that can be written"
        )
    return f"the Hub cannot be reached ({type(error).__name__}: {text})", (
        "check the network, and HF_ENDPOINT if it is set; what is complete is not sent again"
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more files" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
