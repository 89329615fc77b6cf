"""The commands that write a model or change one, as jobs that can be stopped and run again.

What they start from is made once, in a folder ``place`` that none of them changes. What they write
or change is in a folder ``work`` of its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlx_hiermem.bank.edit import BankEdit
from mlx_hiermem.bank.remove import remove
from mlx_hiermem.commands.bank.remove import names_without
from mlx_hiermem.routing.names import ClusterNames
from tests.convert.checkpoints import make_numbers, write_stacked
from tests.corpus.corpora import write_jsonl
from tests.reliability.kill_process import run
from tests.tiny import make_tiny_model, random_texts
from tests.training.test_merge import write_results

K, LEVELS = 4, 3
#: Memory configs of a bank of some 45 MB, whose writing takes the time that a kill can hit, and of
#: one of 0.7 MB.
LARGE, SMALL = (4096, 2048, 1024), (64, 32, 16)
#: The memory that is added, and taken off again: its clusters are behind those of the tree.
ADDED, ROOTS = "acme", (K, K + 1)
_SUBTREE = 1
_ENCODER = json.dumps({"type": "bert", "model": "somewhere"})


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        name: of it.
        words: its arguments, given ``place`` and ``work``.
        again: what it says instead of doing all again, when it had come to its end before.
        source: the folder in ``place`` that is copied to ``work``/model, where it is changed; None:
            the command writes ``result``.
        result: the folder in ``work`` that is whole, or is not there.
        mark: a file of the result without which it is none; "": the folder itself.
        rest: how names in the result begin that are not part of it, and may stay.
        between: brings a copy of ``source`` to each state in which a stopped command may leave it
            besides the first and the last.
        gone: pairs (level, cluster) whose numbers have to be gone from the disk afterwards.
    """

    name: str
    words: Callable[[Path, Path], list[str]]
    again: str
    source: str | None = None
    result: str = "model"
    mark: str = ""
    rest: str | None = None
    between: tuple[Callable[[Path], object], ...] = ()
    gone: frozenset[tuple[int, int]] = frozenset()

    def prepare(self, place: Path, work: Path) -> None:
        """Make ``work`` anew, with what has to be in it."""
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        if self.source is not None:
            shutil.copytree(place / self.source, work / "model")

    def done(self, work: Path) -> bool:
        """Whether there is a result."""
        return (work / self.result / self.mark).exists()


def make_place(place: Path, ranks: tuple[int, ...]) -> Path:
    """What all jobs start from: a model, the same with a memory added, results, a checkpoint, and
    documents."""
    model = make_tiny_model(place / "model", ranks=ranks, branching=K)
    names = [[f"{level}-{i}" for i in range(K**level)] for level in range(1, LEVELS + 1)]
    with BankEdit(model / "memory") as edit:
        edit.set_names(ClusterNames(names).to_bytes())
    write_results(model, place / "results")
    half = tuple(rank // 2 for rank in ranks)
    write_stacked(make_numbers(branching=K, ranks=half), place / "checkpoint")
    texts = random_texts(40, seed=3)
    write_jsonl(place / "private.jsonl", [{"text": text, "prompt": [text[:9]]} for text in texts])
    added = shutil.copytree(model, place / "added")
    ended = run(_add_words(added, place, 1))
    assert ended.code == 0, ended
    return place


def _add_words(model: Path, place: Path, iters: int) -> list[str]:
    words = ["bank", "add", "--model", str(model), "--corpus", str(place / "private.jsonl")]
    return [*words, "--name", ADDED, "--roots", str(len(ROOTS)), "--iters", str(iters)]


def _merge(place: Path, work: Path) -> list[str]:
    runs = [str(place / "results" / f"run-{i}") for i in range(K)]
    model = ["--model", str(place / "model"), "--generic", str(place / "model")]
    return ["merge", *runs, *model, "--mlx-path", str(work / "model")]


def _convert(place: Path, work: Path) -> list[str]:
    source = place / "checkpoint"
    return [
        "convert", "--model", str(source / "checkpoints" / "epoch_1.pt"),
        "--model-config", str(source / "tiny.json"), "--tree", str(source / "tree.npz"),
        "--memory-config", str(source / "checkpoints" / "memory_config.json"),
        "--encoder", _ENCODER, "--mlx-path", str(work / "model"),
    ]  # fmt: skip


def _quantize(place: Path, work: Path) -> list[str]:
    return ["bank", "quantize", "--model", str(place / "model"), "--mlx-path", str(work / "model")]


def _add(place: Path, work: Path) -> list[str]:
    return _add_words(work / "model", place, 2)


def _remove(*what: str) -> Callable[[Path, Path], list[str]]:
    return lambda _, work: ["bank", "remove", "--model", str(work / "model"), *what, "--yes"]


def _without_numbers(model: Path) -> None:
    """The numbers of the added memory are removed, but it is not taken off yet."""
    remove(model / "memory", subtrees=ROOTS, names=names_without)


def _below(*roots: int) -> frozenset[tuple[int, int]]:
    return frozenset(
        (level, cluster)
        for level in range(1, LEVELS + 1)
        for root in roots
        for cluster in range(root * K ** (level - 1), (root + 1) * K ** (level - 1))
    )


#: In the order of the issue, but for training, whose kills have a test of their own.
JOBS = (
    Job("merge", _merge, "model: exists already"),
    Job("convert", _convert, "model: exists already"),
    Job("quantize", _quantize, "model: exists already"),
    Job("add", _add, f"has an added memory {ADDED} already", "model"),
    Job(
        "remove --subtree", _remove("--subtree", str(_SUBTREE)),
        "what was named has been removed already", "model", gone=_below(_SUBTREE),
    ),
    Job(
        "remove --name", _remove("--name", ADDED), f"has no added memory {ADDED}", "added",
        between=(_without_numbers,), gone=_below(*ROOTS),
    ),
)  # fmt: skip
