"""What the stand-in of the Hub holds: repositories, their commits, the files of these."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

#: The one token that may do everything.
TOKEN = "hf_test"


@dataclass(frozen=True)
class File:
    """A file of a commit; ``large`` ones lie in the storage."""

    data: bytes
    large: bool
    claim: int | None = None  # the size that lists give, if it is not the true one

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """git's name of it: of a large file's pointer."""
        data = self.data
        if self.large:
            data = (
                "version https://git-lfs.github.com/spec/v1\n"
                f"oid sha256:{self.sha256}\nsize {len(self.data)}\n"
            ).encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def size(self) -> int:
        return len(self.data) if self.claim is None else self.claim


@dataclass
class Repo:
    """Commits (40 hex digits -> its files by name), branches and tags (name -> commit)."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Mapping[str, File]) -> str:
        text = f"{self.refs.get(branch)} {sorted((n, f.oid) for n, f in files.items())}"
        name = hashlib.sha1(text.encode()).hexdigest()
        self.commits[name] = dict(files)
        self.refs[branch] = name
        return name

    def find(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


def is_large(name: str, size: int) -> bool:
    """Whether a file goes to the storage."""
    return name.endswith(".safetensors") or size > 10_000_000
