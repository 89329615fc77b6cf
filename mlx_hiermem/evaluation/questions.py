"""The file of held-out questions, ``evaluation/facts.jsonl.gz`` of a model folder.

One JSON object a line. The first is ``{"buckets": [names, from the most frequent facts to the
rarest]}``; each of the others is a :class:`Question`. Equal questions make equal bytes.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import FormatError
from ..files import AtomicFile


@dataclass(frozen=True)
class Question:
    """One fact, asked in a wording that no training text has.

    Attributes:
        prompt: the question; also what is routed.
        continuation: what has to follow the prompt, with the full stop, such as " 72.".
        answer: the part of the continuation that is the answer, such as "72".
        family: what kind of fact it is, such as "element".
        count: documents about the fact in the training corpus.
        bucket: index into the buckets' names; 0 holds the most frequent facts.
        leaves: ids of the leaf clusters under which documents of the fact were trained.
    """

    prompt: str
    continuation: str
    answer: str
    family: str
    count: int
    bucket: int
    leaves: list[int]


def write_questions(
    path: str | Path, questions: Iterable[Question], bucket_names: Sequence[str]
) -> None:
    """Write the questions, whole or not at all.

    Raises:
        FormatError: a question is not as :class:`Question` says, or the file cannot be written.
    """
    path = Path(path)
    head = {"buckets": list(bucket_names)}
    buckets = _buckets(head, f"{path}: line 1")
    lines = [head]
    for number, question in enumerate(questions, 2):
        lines.append(asdict(question))
        _question(lines[-1], len(buckets), f"{path}: line {number}")
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    packed = io.BytesIO()
    # Without a name and a time in the header, so that equal questions make equal bytes.
    with gzip.GzipFile("", "wb", 9, packed, mtime=0) as file:
        file.write(text.encode("utf-8"))
    with AtomicFile(path.parent, path.name) as file:
        file.write(packed.getvalue())


def read_questions(
    path: str | Path, leaf_clusters: int | None = None
) -> tuple[list[Question], list[str]]:
    """Read what :func:`write_questions` wrote.

    Args:
        path: of the file.
        leaf_clusters: clusters at the deepest level of the tree that ``leaves`` belong to; None
            leaves that unchecked.

    Returns:
        The questions, in the order of the file, and the names of the buckets.

    Raises:
        FormatError: the file is missing, damaged or not as :class:`Question` says; the text names
            the line.
    """
    path = Path(path)
    lines = _lines(path)
    where, head = next(lines, (f"{path}: line 1", None))
    buckets = _buckets(head, where)
    questions = [_question(line, len(buckets), where, leaf_clusters) for where, line in lines]
    if not questions:
        raise FormatError(f"{path}: holds no questions; write at least one")
    return questions, buckets


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Each line's place, for errors, and its value."""
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}: line {number}"
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise FormatError(f"{where}: not valid JSON ({error})") from None
                yield where, value
    except FileNotFoundError:
        raise FormatError(
            f"{path}: no such file; expected the held-out questions of a model that is measured "
            "on facts; `evaluate --task perplexity --text FILE` measures any model"
        ) from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: not readable gzip text ({error}); get it again") from None


def _buckets(head: Any, where: str) -> list[str]:
    names = head.get("buckets") if isinstance(head, dict) and len(head) == 1 else None
    if (
        not isinstance(names, list)
        or not names
        or not all(isinstance(name, str) and name for name in names)
        or len(set(names)) != len(names)
    ):
        raise FormatError(
            f'{where}: expected {{"buckets": [names, from most frequent to rarest]}}, each name '
            f"once; found {str(head)[:80]!r}"
        )
    return names


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _are_leaves(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


_TEXT, _COUNT = ("text", _is_text), ("an integer >= 0", _is_count)
#: Per key of a question what it has to be, and the test of that.
_KEYS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "prompt": _TEXT,
    "continuation": _TEXT,
    "answer": _TEXT,
    "family": _TEXT,
    "count": _COUNT,
    "bucket": _COUNT,
    "leaves": ("a list of integers >= 0", _are_leaves),
}


def _question(value: Any, buckets: int, where: str, leaf_clusters: int | None = None) -> Question:
    if not isinstance(value, dict) or set(value) != set(_KEYS):
        found = ", ".join(value) if isinstance(value, dict) else type(value).__name__
        raise FormatError(f"{where}: expected the keys {', '.join(_KEYS)}; found {found[:80]!r}")
    for name, (expected, is_right) in _KEYS.items():
        if not is_right(value[name]):
            raise FormatError(f"{where}: {name} is {str(value[name])[:40]!r}; expected {expected}")
    question = Question(**value)
    if question.answer not in question.continuation:
        raise FormatError(
            f"{where}: continuation {question.continuation[:40]!r} does not hold the answer "
            f"{question.answer[:40]!r}"
        )
    if question.bucket >= buckets:
        raise FormatError(
            f"{where}: bucket is {question.bucket}; line 1 names buckets 0 to {buckets - 1}"
        )
    if leaf_clusters is not None and max(question.leaves, default=0) >= leaf_clusters:
        raise FormatError(
            f"{where}: leaf {max(question.leaves)} does not exist; the model's tree has leaves 0 "
            f"to {leaf_clusters - 1}; the questions belong to another bank"
        )
    return question
