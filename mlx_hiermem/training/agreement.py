"""What results of ``train --subtree`` have to agree in before they are merged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..anchors import load_anchor, load_anchor_tokenizer
from ..errors import TrainingError
from ..memories import attach
from ..routing.tree import ClusterTree
from .fingerprints import TREE, anchor_bytes, anchor_sha256, tree_sha256
from .subtree import FILE, SubtreeResult, read_subtree

#: Settings in which merged runs may differ: how long each one trained, and what changes no number.
MAY_DIFFER = frozenset({"iters", "grad_checkpoint"})

#: progress(what, bytes done since the last call, bytes in all)
Progress = Callable[[str, int, int], None]


def open_results(runs: Sequence[str | Path]) -> list[SubtreeResult]:
    """The results of all subtrees, in their order.

    Args:
        runs: folders that hold ``subtree.json``, or the folder ``subtree`` with it.

    Raises:
        TrainingError: a subtree is missing or there twice, or two results differ in what has to
            be the same; the message names them and what it is.
        FormatError: a result is missing or damaged.
    """
    results = []
    for run in runs:
        folder = Path(run).expanduser()
        inner = folder / "subtree"
        results.append(read_subtree(inner if (inner / FILE).exists() else folder))
    if not results:
        raise TrainingError("merge: no run is given; give the runs of all subtrees")
    first = results[0]
    found: dict[int, SubtreeResult] = {}
    for result in results:
        for what, theirs, ours in _differences(result, first):
            raise TrainingError(
                f"{result.folder}: {what} is {_brief(theirs)}, but {_brief(ours)} in "
                f"{first.folder}; runs that are merged have to agree in it"
            )
        other = found.setdefault(result.subtree, result)
        if other is not result:
            raise TrainingError(
                f"{result.folder}: is subtree {result.subtree}, and so is {other.folder}; give "
                "one run of each subtree"
            )
    missing = sorted(set(range(first.config.branching)) - set(found))
    if missing:
        names = ", ".join(map(str, missing[:16])) + (" and more" if len(missing) > 16 else "")
        raise TrainingError(
            f"merge: {len(missing)} of the {first.config.branching} subtrees are missing: {names}; "
            "give the runs of all of them"
        )
    return [found[subtree] for subtree in sorted(found)]


def _differences(result: SubtreeResult, first: SubtreeResult) -> Iterator[tuple[str, Any, Any]]:
    """(what, here, there) for everything in which a result may not differ from another one."""
    # An anchor goes by its fingerprint: the name that its folder had does not matter.
    configs = [
        {**one.config.to_dict(), "base_anchor": one.config.anchor_shape()}
        for one in (result, first)
    ]
    settings = [
        {name: value for name, value in one.settings.items() if name not in MAY_DIFFER}
        for one in (result, first)
    ]
    facts = [
        {
            "the anchor (sha256)": one.anchor_sha256,
            "the tree (sha256)": one.tree_sha256,
            "the corpus (revision)": one.corpus_revision,
        }
        for one in (result, first)
    ]
    for kind, (here, there) in (
        ("memory config: ", configs), ("", facts), ("setting ", settings),
    ):  # fmt: skip
        for name in sorted({*here, *there}):
            if here.get(name) != there.get(name):
                yield f"{kind}{name}", here.get(name, "not set"), there.get(name, "not set")


def check_anchor(folder: Path, result: SubtreeResult, progress: Progress | None) -> None:
    """Raise TrainingError where the model in ``folder`` is not the anchor of the runs."""
    model, config = load_anchor(folder)
    load_anchor_tokenizer(folder, config)
    if (sha256 := fingerprint(model, progress)) != result.anchor_sha256:
        raise TrainingError(
            f"{folder}: is not the anchor that the memories were trained on: sha256 of its weights "
            f"is {sha256[:12]}…, {result.folder} says {result.anchor_sha256[:12]}…; give the model "
            "folder that was --model of the runs"
        )
    attach(model, result.config)


def fingerprint(model: Any, progress: Progress | None) -> str:
    total = anchor_bytes(model)
    return anchor_sha256(model, progress and (lambda count: progress("anchor", count, total)))


def find_routing(results: Sequence[SubtreeResult], anchor: Path) -> Path:
    """The folder with the tree of the runs: a run's ``routing``, or the anchor's memory folder."""
    wanted = results[0].tree_sha256
    places = [place for one in results for place in (one.folder, one.folder.parent)]
    places = [place / "routing" for place in places] + [anchor / "memory"]
    found = [place for place in places if (place / TREE).is_file()]
    if not found:
        raise TrainingError(
            f"{results[0].folder}: no routing/{TREE} there or beside any of the runs; copy the "
            "folder routing/ of the corpus into one of them"
        )
    for place in found:
        if tree_sha256(place) == wanted:
            tree, config = ClusterTree.load(place / TREE), results[0].config
            if (tree.branching, tree.levels) != (config.branching, config.levels):
                raise TrainingError(
                    f"{place / TREE}: branching {tree.branching}, levels {tree.levels}; the memory "
                    f"config of the runs says {config.branching} and {config.levels}"
                )
            return place
    raise TrainingError(
        f"{found[0] / TREE}: is not the tree that the runs were trained with (sha256 "
        f"{wanted[:12]}…); copy the folder routing/ of their corpus into one of them"
    )


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 70 else f"{text[:69]}…"
