"""``mlx_hiermem bank push``: publish a model folder with its bank on the Hub, in one commit.

Notable: ``HfApi.upload_folder`` may cut a large folder into several commits, and who downloads
between two of them would get half a bank. So the files are one ``create_commit`` here; it is
refused where somebody else has committed since the push looked.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError, FormatError
from ..options import parse_numbers

if TYPE_CHECKING:
    from ...bank.manifest import FileEntry
    from ...bank.parts import Part

_CARD = "README.md"
#: What goes along with the anchor's data files.
_TEXTS = ("README", "LICENSE", "LICENCE", "NOTICE")
#: Hidden names that other programs leave, and that say nothing about the bank.
_HARMLESS = {".DS_Store", ".git", ".gitattributes", ".gitignore", ".cache", ".ipynb_checkpoints"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="FOLDER", help="model folder with a bank in memory/"
    )
    parser.add_argument(
        "--hf-path", required=True, metavar="OWNER/NAME", help="repository; made if need be"
    )
    parser.add_argument(
        "--private", action="store_true", help="only for a repository that is, or becomes, private"
    )
    parser.add_argument(
        "--revision", metavar="BRANCH", help="branch to commit to; made if need be (default: main)"
    )
    parser.add_argument(
        "--levels",
        type=parse_numbers,
        metavar="L,L",
        help="send the level files of these levels only, such as 1,2 (default: all)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="only check the folder and say what would be sent"
    )


def report(args: argparse.Namespace) -> dict[str, Any]:
    """What was sent, or would be.

    Returns:
        ``{"repo", "revision", "folder", "bank_revision", "bytes", "files": [{"file", "bytes"}],
        "left_out", "card", "dry_run"}`` and, if it is no dry run, ``"commit"``, ``"url"`` and
        ``"deleted"``. ``card``: whether a model card is made.

    Raises:
        ConfigError, FormatError, PathError: the folder is not a whole model with a bank, or the
            Hub refuses it.
    """
    from ...bank.manifest import read_manifest
    from ...bank.parts import Part
    from ...hub import explained, progress_bars

    folder = _model_folder(args.model)
    part = None if args.levels is None else Part.of(args.levels, None)
    names = _files(folder, part)
    _verify(folder / "memory")
    manifest = read_manifest(folder / "memory")
    card = None if _CARD in names else _card(folder, args.hf_path)
    found = {
        "repo": args.hf_path,
        "revision": args.revision or "main",
        "folder": str(folder),
        "bank_revision": manifest.revision,
        "bytes": sum((folder / name).stat().st_size for name in names),
        "files": [{"file": name, "bytes": (folder / name).stat().st_size} for name in names],
        "left_out": _left_out(folder, names),
        "card": card is not None,
        "dry_run": args.dry_run,
    }
    if args.dry_run:
        return found
    with explained(args.hf_path, args.revision, upload=True), progress_bars():
        return found | _send(args, folder, names, manifest.files, card)


def to_text(report: dict[str, Any]) -> str:
    """The report for people."""
    what = f"{len(report['files'])} files, {report['bytes']:,} bytes"
    where = f"{report['repo']} ({report['revision']})"
    lines = []
    if report["dry_run"]:
        lines += [f"{file['bytes']:>15,}  {file['file']}" for file in report["files"]]
        lines.append(f"{report['folder']}: {what} would be sent to {where}")
    else:
        lines.append(f"{report['url']}: {what}")
        if report["deleted"]:
            lines.append(f"{len(report['deleted'])} files of the bank that was there are gone")
    if report["card"]:
        lines.append(f"the folder has no {_CARD}: a short model card goes there if there is none")
    if report["left_out"]:
        lines.append(f"not sent: {', '.join(report['left_out'])}")
    if not report["dry_run"]:
        lines.append(f"commit {report['commit']}: --revision {report['commit']} pins it")
    return "\n".join(lines)


# ---- the folder ------------------------------------------------------------------------


def _model_folder(name: str) -> Path:
    from ...models import find_model, shipped_models

    folder = Path(name).expanduser()
    if not folder.is_dir() and name not in shipped_models():
        raise ConfigError(f"{name}: no such folder; give a model folder on this machine")
    folder = find_model(name)
    if not (folder / "memory").is_dir():
        raise ConfigError(f"{folder / 'memory'}: no such folder; expected a model with a bank")
    return folder


def _files(folder: Path, part: Part | None) -> list[str]:
    """Names of the files to send: data of the anchor, texts, and what the manifest lists.

    Raises:
        ConfigError, FormatError: something is missing, is not whole, or leads out of the folder.
    """
    from ...bank.files import find
    from ...bank.manifest import MANIFEST, read_manifest
    from ...hub import is_anchor_file, is_data, memory_files

    for path in [*folder.iterdir(), *(folder / "memory").rglob("*")]:
        inside = path.parent != folder
        hidden = path.name.startswith(".") and path.name not in _HARMLESS
        if path.name.endswith(".partial") or (inside and hidden):
            raise FormatError(
                f"{path}: a file of this name is left when writing was interrupted; let it come "
                "to its end, write the bank again, or remove it if it is not of the bank"
            )
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*"))]
    names = [name for name in names if is_anchor_file(name) or _is_text(name)]
    others, levels = memory_files(folder / "memory", part)
    names += [f"memory/{name}" for name in sorted([*others, *levels])]
    for name in names:
        find(folder, name)
    for name in read_manifest(folder / "memory").files:
        if not is_data(name):
            raise FormatError(
                f"{folder / 'memory' / name}: is listed in {MANIFEST}, but nobody would download a "
                "file of this type; a bank is .json and .safetensors files, write it without this"
            )
    for name in ("config.json", "tokenizer_config.json"):
        if name not in names:
            raise ConfigError(f"{folder / name}: no such file; expected a whole model folder")
    if not any(name.startswith("model") and name.endswith(".safetensors") for name in names):
        raise ConfigError(f"{folder}: no model*.safetensors; expected a whole model folder")
    return names


def _is_text(name: str) -> bool:
    return "/" not in name and name.split(".")[0].upper() in _TEXTS


def _verify(memory: Path) -> None:
    """Open the bank and read it once: what is published is what the manifest says."""
    from ...bank.store import MemoryBank
    from . import progress_bytes

    with MemoryBank.open(memory, tiers="disk") as bank:
        with progress_bytes(bank.bytes_on_disk, "verify") as bar:
            bank.verify(progress=bar.update)


def _left_out(folder: Path, names: list[str]) -> list[str]:
    """What lies in the model folder and is not sent, so that nobody is surprised."""
    sent = {name.split("/")[0] for name in names}
    return sorted(path.name for path in folder.iterdir() if path.name not in sent)


def _card(folder: Path, repo: str) -> bytes:
    """A short model card, for a folder without one."""
    from huggingface_hub import ModelCard, ModelCardData

    from ...config import MemoryConfig

    config = MemoryConfig.load(folder / "memory" / "config.json")
    base = str(dict(config.base_anchor or {}).get("name") or "")
    data = ModelCardData(
        library_name="mlx",
        pipeline_tag="text-generation",
        tags=["mlx", "mlx-hiermem", "hierarchical-memory"],
        base_model=base if base.count("/") == 1 and not base.startswith((".", "/", "~")) else None,
    )
    text = (
        f"# {repo.split('/')[-1]}\n\n"
        "A language model with a bank of hierarchical memories, in the format of mlx-hiermem:\n\n"
        f"    mlx_hiermem generate --model {repo} --prompt ...\n\n"
        f"- memories: {config.kind}, ranks {list(config.ranks)}, branching {config.branching}\n"
        f"- numbers: {config.bank_size():,} in the bank, {config.fetch_size():,} of them fetched "
        "for a context\n"
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")).encode()


# ---- the Hub ---------------------------------------------------------------------------


def _send(
    args: argparse.Namespace,
    folder: Path,
    names: list[str],
    listed: Mapping[str, FileEntry],
    card: bytes | None,
) -> dict[str, Any]:
    """Commit the files; ``{"commit", "url", "deleted", "card"}``."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, repo = HfApi(), args.hf_path
    api.create_repo(repo, private=args.private or None, exist_ok=True)
    if args.private and not api.model_info(repo).private:
        raise ConfigError(f"{repo}: is public, and --private was given; make it private first")
    if args.revision not in (None, "main"):
        api.create_branch(repo, branch=args.revision, exist_ok=True)
    info = api.model_info(repo, revision=args.revision, files_metadata=True)
    there = {file.rfilename: file for file in info.siblings or ()}
    if _CARD in there:
        card = None
    operations: list[Any] = [CommitOperationAdd(name, str(folder / name)) for name in names]
    if card is not None:
        operations.append(CommitOperationAdd(_CARD, card))
    deleted = _stale(repo, names, listed, there)
    operations += [CommitOperationDelete(name) for name in deleted]
    commit = api.create_commit(
        repo,
        operations,
        commit_message="Upload a model with its memory bank",
        revision=args.revision,
        parent_commit=info.sha,
    )
    return {
        "commit": commit.oid,
        "url": str(commit.repo_url),
        "deleted": deleted,
        "card": card is not None,
    }


def _stale(
    repo: str, names: list[str], listed: Mapping[str, FileEntry], there: dict[str, Any]
) -> list[str]:
    """Files of the bank that was there and that the new manifest does not list: they go.

    Raises:
        ConfigError: a level file that is not sent is there, but of another bank.
    """
    stale = []
    for name in sorted(there):
        if not name.startswith("memory/") or name in names:
            continue
        entry = listed.get(name.removeprefix("memory/"))
        if entry is None:
            stale.append(name)
        elif there[name].lfs is None or there[name].lfs.sha256 != entry.sha256:
            raise ConfigError(
                f"{repo}: its {name} is of another bank than the folder's; send that level too "
                "(--levels), or the whole bank"
            )
    return stale
