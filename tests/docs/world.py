"""The folder that commands of the docs run in: what they name is there, in small.

Names that stand for something of the reader's (``MODEL``, ``my-texts/``, ``epoch_9.pt``) are simply
files and folders of these names, so commands run as they stand.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from mlx_hiermem import cli
from tests.docs.pages import REPOSITORY, blocks
from tests.tiny import make_tiny_model, random_texts

K, RANKS = 16, (4, 2)

#: What is appended to a command, to make it small: by its first words. An option that is given
#: twice counts the second time, so what stands in the docs is parsed all the same.
SMALL = {
    ("generate",): ("--max-tokens", "2"),
    ("evaluate",): ("--limit", "2"),
    ("evaluate", "--model", "my-model", "--task", "leakage"): (),
    ("init",): ("--config", "4,2"),
    ("cluster",): ("--levels", "2", "--sequence-length", "64", "--encoder", "embeddings"),
    ("train",): ("--ranks", "4,2", "--iters", "1", "--learning-rate", "1e-3", "--val-batches", "0",
                 "--freeze", "*embed*"),
    ("bank", "add"): ("--iters", "2", "--roots", "1"),
    ("bank", "remove"): ("--yes",),  # nobody is there to be asked
    ("convert", "--model"): ("--encoder", '{"type": "bert", "model": "bert", "max_length": 32}'),
}  # fmt: skip


def make_world(folder: Path) -> Path:
    """Make what all pages need: ``MODEL`` and so on are anchors, ``my-model`` has a bank."""
    make_tiny_model(folder / "my-model", ranks=RANKS, branching=K)
    for name in ("PATH_OR_REPO", "me/my-model"):
        shutil.copytree(folder / "my-model", folder / name)
    bare = shutil.ignore_patterns("memory")
    for name in ("MODEL", "ANCHOR", "REPO_OR_FOLDER", "anchor", "my-anchor"):
        shutil.copytree(folder / "my-model", folder / name, ignore=bare)
    texts = random_texts(400)
    (folder / "my-texts").mkdir()
    (folder / "my-texts" / "some.txt").write_text("\n\n".join(texts))
    (folder / "some.txt").write_text("\n\n".join(texts[:3]))
    for name in ("more.jsonl", "documents.jsonl", "private.jsonl"):
        lines = (json.dumps({"text": text, "prompt": text[:9]}) for text in texts[:20])
        (folder / name).write_text("\n".join(lines))
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").write_text("")
    (folder / "mlx_hiermem").symlink_to(REPOSITORY / "mlx_hiermem")  # for paths in a clone
    return folder


def run(*arguments: str) -> None:
    """Run a subcommand that has to succeed."""
    assert cli.main([*arguments]) == 0, arguments


# ---- what single pages need besides ----------------------------------------------------


def _corpus(world: Path) -> None:
    # With the tree of my-model, whose anchor has the embeddings that it was made of.
    run(
        *("cluster", "--data", f"{world}/my-texts", "--model", f"{world}/ANCHOR"),
        *("--tree", f"{world}/my-model/memory", "--sequence-length", "64"),
        *("--out", f"{world}/corpus"),
    )


def _bank(world: Path) -> None:
    _corpus(world)
    (world / "other").mkdir()
    shutil.copytree(world / "my-model", world / "other" / "two-levels")


def _three_levels(world: Path) -> None:
    """For blocks that name a third level: the bank has one, which lies on another disk."""
    shutil.rmtree(world / "my-model")
    make_tiny_model(world / "my-model", ranks=(4, 2, 2), branching=3)
    (world / "external").mkdir()
    (world / "external" / "memory").symlink_to(world / "my-model" / "memory")


def _two_levels(world: Path) -> None:
    shutil.rmtree(world / "my-model")
    shutil.copytree(world / "other" / "two-levels", world / "my-model")


def _corpora(world: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (world / "dump").mkdir()
    table = pyarrow.table({"text": random_texts(40, seed=1)})
    pyarrow.parquet.write_table(table, world / "dump" / "a.parquet")


def _checkpoints(world: Path) -> None:
    """An OpenLM run with a bank in PyTorch, and the tokenizer that its files lack."""
    from tests.convert.checkpoints import make_numbers, write_subtrees
    from tests.corpus.corpora import make_tiny_bert

    shutil.rmtree(world / "my-model")
    written = write_subtrees(make_numbers(vocab=257, width=24), world / "run")
    written.model.rename(written.model.with_name("epoch_9.pt"))
    shutil.move(written.bank, world / "bank")
    (world / "centroids").mkdir()
    shutil.move(written.tree, world / "centroids" / "tree.npz")
    shutil.copytree(world / "anchor", world / "EleutherAI" / "gpt-neox-20b")
    make_tiny_bert(world / "bert")


def _private_memory(world: Path) -> None:
    """A memory of the name that is in the docs, and questions to be asked when it is gone."""
    run(
        *("bank", "add", "--model", f"{world}/my-model", "--corpus", f"{world}/private.jsonl"),
        *("--name", "acme", "--iters", "2", "--roots", "1"),
    )
    _questions(world / "my-model")


def _questions(model: Path) -> None:
    (model / "evaluation").mkdir()
    rows: list[dict] = [{"buckets": ["all"]}]
    rows += [
        {"prompt": text, "continuation": " x.", "answer": "x", "family": "f", "count": 1,
         "bucket": 0, "leaves": [0]}
        for text in random_texts(400)
    ]  # fmt: skip
    lines = "\n".join(map(json.dumps, rows))
    (model / "evaluation" / "facts.jsonl.gz").write_bytes(gzip.compress(lines.encode()))


def _tasks(world: Path) -> None:
    """The task of the page, on data that lies here."""
    (world / "tasks").mkdir()
    task = next(block for block in blocks("docs/evaluate.md") if block.language == "yaml")
    (world / "tasks" / "my_task.yaml").write_text(task.text.replace("/data/", f"{world}/"))
    rows = [{"question": f"{i}?", "choices": ["a", "b"], "answer": i % 2} for i in range(8)]
    for name in ("train.jsonl", "test.jsonl"):
        (world / name).write_text("\n".join(map(json.dumps, rows)))


def _no_model_yet(world: Path) -> None:
    shutil.rmtree(world / "my-model")
    shutil.rmtree(world / "my-texts")


#: Page -> what is done before its first block.
NEEDS: dict[str, Callable[[Path], None]] = {
    "README.md": _no_model_yet,
    "docs/tutorial.md": _no_model_yet,
    "docs/anchors.md": lambda world: shutil.rmtree(world / "my-model"),
    "docs/bank.md": _bank,
    "docs/convert.md": _checkpoints,
    "docs/corpus.md": _corpora,
    "docs/evaluate.md": _tasks,
    "docs/merge.md": _corpus,
    "docs/removing.md": _private_memory,
}

#: What is done before a block that has these words in it.
BEFORE: dict[tuple[str, str], Callable[[Path], None]] = {
    ("docs/bank.md", "--level-folder 3="): _three_levels,
    ("docs/bank.md", "--text documents.jsonl --tree"): _two_levels,
    ("docs/anchors.md", "make_model("): lambda world: shutil.rmtree(world / "my-model"),
    ("docs/merge.md", "--generic runs-generic"): lambda world: shutil.rmtree(world / "merged"),
    ("docs/corpus.md", "gunzip"): lambda world: shutil.rmtree(world / "corpus"),
}
