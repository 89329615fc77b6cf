"""``mlx_hiermem cluster``: documents in, packed sequences with their clusters out."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..corpus.config import CorpusConfig
from ..errors import InputError
from .options import parse_bytes
from .settings import add_settings, read_settings, show_settings
from .tables import table

if TYPE_CHECKING:
    from ..corpus.runners import Runner

EXIT_INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class ClusterSettings(CorpusConfig):
    """The settings of the command: those of the corpus, where it goes, and who does the work."""

    out: Path = field(metadata={"help": "the corpus folder to make", "metavar": "FOLDER"})
    runner: Literal["local", "ray"] = field(
        default="local", metadata={"help": "who embeds and assigns: this process, or Ray's workers"}
    )
    workers: int | None = field(
        default=None, metadata={"help": "worker processes of Ray", "default": "2 with Ray"}
    )
    worker_gpus: float = field(
        default=0.0, metadata={"help": "share of a GPU that each worker of Ray asks for"}
    )
    unit_size: int = field(
        default=8 << 20,
        metadata={
            "help": "bytes of .txt and .jsonl that are done, and resumed, as one",
            "type": parse_bytes,
            "default": "8MiB",
        },
    )
    keep_work: bool = field(
        default=False, metadata={"help": "keep the vectors and parts in work/ at the end"}
    )
    names: bool = field(
        default=True,
        metadata={"help": "name the clusters by the telling words of their documents"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.runner == "local" and (self.workers is not None or self.worker_gpus):
            raise InputError("--workers and --worker-gpus are for --runner ray; add it")
        if self.workers is not None and self.workers < 1:
            raise InputError(f"--workers is {self.workers}; expected at least 1")
        if self.worker_gpus < 0:
            raise InputError(f"--worker-gpus is {self.worker_gpus}; expected 0 or more")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, ClusterSettings)
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")


def run(args: argparse.Namespace) -> int:
    settings = read_settings(ClusterSettings, args)
    values = settings.values
    runner = _runner(values)
    print(show_settings(settings), file=sys.stderr)

    from ..corpus.build import build_corpus

    config = CorpusConfig(**{f.name: getattr(values, f.name) for f in fields(CorpusConfig)})
    try:
        summary = build_corpus(
            values.out,
            config,
            runner,
            unit_bytes=values.unit_size,
            keep_work=values.keep_work,
            names=values.names,
        )
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    if args.json:
        print(json.dumps({"out": str(values.out), "settings": settings.to_dict(), **summary}))
    else:
        print(show_summary(values.out, summary))
    return 0


def _runner(values: ClusterSettings) -> Runner:
    if values.runner == "local":
        from ..corpus.runners import LocalRunner

        return LocalRunner()
    from ..corpus.ray_runner import RayRunner

    return RayRunner(values.workers or 2, values.worker_gpus)


def show_summary(out: Path, summary: dict[str, Any]) -> str:
    """The summary of a corpus as tables."""
    lines = [
        f"{summary['documents']:,} documents, {summary['windows']:,} windows, "
        f"{summary['tokens']:,} tokens"
    ]
    if summary["empty_documents"]:
        lines.append(f"{summary['empty_documents']:,} documents had no token and are left out")
    if summary["copies_per_window"] > 1:
        lines.append(f"each window is packed under {summary['copies_per_window']:.2f} leaves")
    splits = [
        (
            name,
            *(f"{split[key]:,}" for key in ("documents", "tokens", "sequences")),
            _percent(split["fill"]),
        )
        for name, split in summary["splits"].items()
    ]
    levels = [
        (
            level["level"],
            f"{level['clusters']:,}",
            f"{level['used']:,}",
            *(_percent(level[key]) for key in ("smallest", "median", "largest")),
            f"{level['balance']:.2f}",
        )
        for level in summary["levels"]
    ]
    samples = [
        (sample["level"], sample["cluster"], _percent(sample["share"]), text[:60])
        for sample in summary["samples"]
        for text in sample["texts"][:2]
    ]
    header = ("level", "clusters", "used", "smallest %", "median %", "largest %", "largest/fair")
    parts = [
        "\n".join(lines),
        table(("split", "documents", "tokens", "sequences", "fill %"), splits),
        table(header, levels),
        table(("level", "cluster", "share %", "begins"), samples),
        f"corpus: {out} (revision {summary['revision'][:12]})",
    ]
    return "\n\n".join(parts)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"
