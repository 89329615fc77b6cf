"""What stands in README.md and docs/*.md: blocks of code, and code within a line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

#: Programs that a line of a block may begin with.
PROGRAMS = (
    "mlx_hiermem", "python", "make", "pip", "hf", "curl", "mlx.launch", "cp", "cat", "mkdir",
    "gunzip", "for", "source",
)  # fmt: skip

_FENCE = re.compile(r"^( *)```([\w+-]*)[^\n]*\n(.*?)^\1```", re.S | re.M)
_INDENTED = re.compile(r"(?:^|\n)\n((?: {4}[^\n]*\n)+)")


def pages() -> list[str]:
    """README.md, CONTRIBUTING.md and the pages of docs/, as paths in the repository."""
    found = sorted((REPOSITORY / "docs").glob("*.md"))
    return ["README.md", "CONTRIBUTING.md", *(str(path.relative_to(REPOSITORY)) for path in found)]


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        page, line: where its first line is.
        language: what stands behind the fence; "" for none, "indented" without a fence.
    """

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_shell(self) -> bool:
        """Whether it is commands; without a language, it is if each line begins with a program."""
        if self.language in ("sh", "bash", "shell", "console"):
            return True
        words = [line.split()[:1] for line in self.text.splitlines() if line.strip()]
        return self.language in ("", "indented") and all(word[0] in PROGRAMS for word in words)

    @property
    def is_synopsis(self) -> bool:
        """Whether it shows what may be given, in brackets or dots, and not what to type."""
        return self.is_shell and re.search(r" \[[\w-]| \.\.\.$", self.text, re.M) is not None


def blocks(page: str) -> list[Block]:
    """The blocks of a page, in their order."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        indent = len(match[1])
        lines = [line[indent:] for line in match[3].splitlines(keepends=True)]
        found.append(Block(page, _line(text, match.start(3)), match[2], "".join(lines)))
    for match in _INDENTED.finditer(_without_fences(text)):
        lines = [line[4:] for line in match[1].splitlines(keepends=True)]
        found.append(Block(page, _line(text, match.start(1)), "indented", "".join(lines)))
    return sorted(found, key=lambda block: block.line)


def spans(page: str) -> Iterator[tuple[str, str]]:
    """Where each piece of code within a line stands, and the code."""
    text = _without_fences((REPOSITORY / page).read_text(encoding="utf-8"))
    for match in re.finditer(r"(?<!`)`([^`]+)`(?!`)", text):
        yield f"{page}:{_line(text, match.start())}", " ".join(match[1].split())


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return _without_fences((REPOSITORY / page).read_text(encoding="utf-8"))


def _without_fences(text: str) -> str:
    """The same lines, those of fenced blocks empty."""
    return _FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1
