"""``mlx_hiermem train``: train an anchor, or memories on it, on a corpus made by ``cluster``."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import HierMemError, InputError
from ..training.config import Cadence, TrainConfig
from .options import parse_bytes
from .settings import add_settings, read_settings, show_settings
from .tables import table

if TYPE_CHECKING:
    from ..config import MemoryConfig
    from ..corpus.folder import Corpus
    from ..training.distributed import Processes
    from ..training.setup import Start
    from ..training.trainer import Trainer

EXIT_OTHER, EXIT_INTERRUPTED = 2, 130  # bad input that another process has told of


def _words(text: str, **more: Any) -> dict[str, Any]:
    return {"help": text, **more}


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where things are, and what the bank is to be."""

    data: Path = field(metadata=_words("corpus folder, as cluster wrote it"))
    run: Path = field(metadata=_words("folder of the run: checkpoints, curves, the model"))
    model: str | None = field(
        default=None,
        metadata=_words("trained anchor: model folder, name of a model that ships, or repository"),
    )
    anchor: str | None = field(
        default=None,
        metadata=_words("anchor with random weights: 160M, 410M, 1.4B, or a JSON file"),
    )
    ranks: tuple[int, ...] | None = field(
        default=None,
        metadata=_words(
            "memory config, one rank per level",
            default="those of the model's bank, else 256,64,16,0 for 4 levels",
        ),
    )
    kind: str | None = field(
        default=None,
        metadata=_words(
            "of memory: ffn, kv, lora_ffn, lora_qk or lora_vo",
            default="that of the model's bank, else ffn",
        ),
    )
    memory_layers: tuple[str, ...] | None = field(
        default=None,
        metadata=_words(
            "with memory: uniform, early, middle, late, or indices such as 0,3,5",
            default="those of the model's bank, else uniform",
        ),
    )
    bank_dtype: Literal["bfloat16", "float16", "float32"] | None = field(
        default=None,
        metadata=_words(
            "of the blocks in the finished model",
            default="that of the model's bank, else bfloat16",
        ),
    )
    memory_budget: int | None = field(
        default=None,
        metadata=_words(
            "bytes that rows of the bank and their optimizer state may take in memory",
            type=parse_bytes,
            metavar="SIZE",
            default="a quarter of the system's memory",
        ),
    )
    freeze: tuple[str, ...] = field(
        default=(),
        metadata=_words("parameters of the anchor that do not learn, such as '*embed_tokens*'"),
    )
    subtree: int | None = field(
        default=None,
        metadata=_words("train this level-1 subtree alone, for merge (regime frozen)"),
    )
    fresh_memory: bool = field(
        default=False, metadata=_words("start a new bank even if the model has one")
    )


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Cadence, TrainConfig, Places):
    """The settings of the command."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        Cadence.__post_init__(self)

    @classmethod
    def defaults(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The paper's numbers for the regime; bfloat16 where MLX computes on a GPU."""
        from ..backend import backend_name

        dtype = "float32" if backend_name() == "cpu" else "bfloat16"
        found = TrainConfig.defaults(given) | {"dtype": dtype}
        if given.get("subtree") is not None:
            found["generic_probability"] = 0.0  # one generic memory cannot belong to 16 jobs
        return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, TrainSettings)
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint of the run"
    )
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="with --resume: go on although rates, decay, clipping or iters are not what they were",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")


def run(args: argparse.Namespace) -> int:
    from ..training.distributed import OtherProcessError, Processes

    processes = Processes()
    try:
        return _run(args, processes)
    except OtherProcessError:
        return EXIT_OTHER


def _run(args: argparse.Namespace, processes: Processes) -> int:
    with processes.together():
        settings = read_settings(TrainSettings, args)
        values = settings.values
        _check(values)

    from ..backend import backend_name, keep_freed_memory
    from ..training.checkpoint import holds_run

    # Killed before its first checkpoint, a process has none though the others do.
    holds = any(processes.all(int(holds_run(values.run / "state"))))
    with processes.together():
        _check_run(values.run, args.resume, holds)

    if backend_name() == "cpu":
        keep_freed_memory()
    if processes.rank == 0:
        print(show_settings(settings), file=sys.stderr)
    try:
        result = _train(values, args, processes)
    except KeyboardInterrupt:
        if processes.rank == 0 and holds_run(values.run / "state"):
            print("stopped; go on with the same command and --resume", file=sys.stderr)
        return EXIT_INTERRUPTED
    if processes.rank == 0:
        if args.json:
            print(json.dumps({"settings": settings.to_dict(), **result}, indent=2))
        else:
            print(_text(values, result))
    return EXIT_INTERRUPTED if result["stopped"] else 0


def _check(values: TrainSettings) -> None:
    """Refuse what cannot go together before anything is loaded."""
    trains_new = values.regime in ("anchor", "scratch")
    if values.model is not None and values.anchor is not None:
        raise InputError("--model and --anchor: give one of them, a trained or a fresh anchor")
    if values.model is None and values.anchor is None:
        what = "--anchor, such as 160M, or --model" if trains_new else "--model"
        raise InputError(f"regime {values.regime}: no anchor is given; give {what}")
    if values.anchor is not None and not trains_new:
        raise InputError(
            f"--anchor: regime {values.regime} needs a trained anchor; give --model, or the "
            "regime scratch"
        )
    if values.model is not None and values.regime == "scratch":
        raise InputError("--model: regime scratch starts from random weights; give --anchor")
    if values.subtree is not None and values.regime != "frozen":
        raise InputError(
            f"--subtree: jobs are independent with a frozen anchor only, not in {values.regime}"
        )


def _check_run(folder: Path, resume: bool, holds_run: bool) -> None:
    """Refuse to start where a run is, and to go on where none is."""
    for name in ("model", "subtree"):
        if (folder / name).exists():
            if resume:  # what a run that was killed right at its end has left
                shutil.rmtree(folder / "state", ignore_errors=True)
            raise InputError(
                f"--run {folder}: the run is finished, its result is {folder / name}; name "
                "another folder"
            )
    if holds_run and not resume:
        raise InputError(
            f"--run {folder}: holds a run; add --resume to go on with it, or name another folder"
        )
    if resume and not holds_run:
        raise InputError(f"--run {folder}: no run to resume there; start without --resume")


def _train(values: TrainSettings, args: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    from ..corpus.folder import Corpus
    from ..training import setup
    from ..training.checkpoint import state_folder

    with processes.together():
        corpus = Corpus.open(values.data)
        start = setup.open_start(corpus, values.model, values.anchor, values.seed)
        setup.check_tokens(corpus, start)
        config = _train_config(values, setup.takes_mask(start.anchor))
        if values.document_mask and not config.document_mask and processes.rank == 0:
            print("document mask off: this anchor's network takes no mask", file=sys.stderr)
        frozen = setup.freeze(start.anchor, values.freeze, config.trains_anchor)
        # Of what the run is, in the order in which a resume compares it.
        identity = {
            "corpus": corpus.revision,
            "anchor": setup.fingerprint(start.anchor),
            "subtree": values.subtree,
            "processes": processes.size,
            "settings": asdict(config),
            "frozen": frozen,
        }
    state = values.run / "state"
    with ExitStack() as stack:
        with processes.together():
            folder = stack.enter_context(state_folder(state / f"rank-{processes.rank}"))
        result = _train_in(folder, values, args, processes, corpus, start, config, identity)
        if not result["stopped"]:
            shutil.rmtree(folder, ignore_errors=True)  # the rows may be large
    if not result["stopped"]:
        try:
            state.rmdir()
        except OSError:
            pass  # another process's is still there, or the folder is not ours to change
    return result


def _train_in(
    folder: Path,
    values: TrainSettings,
    args: argparse.Namespace,
    processes: Processes,
    corpus: Corpus,
    start: Start,
    config: TrainConfig,
    identity: dict[str, Any],
) -> dict[str, Any]:
    """Train with checkpoints and rows in ``folder``, and write the result."""
    from ..memories import attach
    from ..training import setup
    from ..training.checkpoint import Checkpoints
    from ..training.run import run as run_steps
    from ..training.run import with_advice
    from ..training.trainer import Trainer

    sequences, held_out = corpus.train, corpus.validation
    memory, rows, model = None, None, start.anchor
    try:
        with processes.together():
            if config.with_memory:
                corpus.tree()  # is checked by that; it goes into the model
                setup.check_encoder(corpus, start.anchor, config.trains_anchor)
                anchor = values.model or values.anchor
                assert anchor is not None, "one of them is given: _check"
                bank = None if values.fresh_memory else setup.bank_folder(start)
                layers = ",".join(values.memory_layers) if values.memory_layers else None
                chosen = setup.like_bank(
                    corpus, bank, values.ranks, layers, values.bank_dtype, values.kind
                )
                memory = setup.memory_config(corpus, start.anchor, Path(anchor).name, *chosen)
                model = attach(start.anchor, memory)
                if values.subtree is not None:
                    sequences, held_out = setup.of_subtree(corpus, memory, values.subtree)
                budget = values.memory_budget or setup.default_budget()
                rows = setup.open_rows(corpus, memory, values.seed, bank, folder, budget)
                identity |= {"bank": setup.bank_revision(bank), "memory": memory.to_dict()}
            trainer = Trainer(model, sequences, config, rows, processes)
        cadence = Cadence(**{f.name: getattr(values, f.name) for f in fields(Cadence)})
        same = identity | {"cadence": asdict(cadence), "--resume": args.resume}
        processes.check_same(same)
        checkpoints = Checkpoints(folder, identity, processes)
        if args.resume:
            changed = checkpoints.resume(trainer, args.accept_changes)
            if processes.rank == 0:
                words = [f"{name} {now} (was {then})" for name, (then, now) in changed.items()]
                more = f" with {', '.join(words)}" if words else ""
                print(f"resumed at step {trainer.done}{more}", file=sys.stderr)
        result = run_steps(trainer, values.run, checkpoints, held_out, cadence)
        if not result["stopped"]:
            with processes.together():
                if processes.rank == 0:
                    try:
                        result |= _write(values, trainer, corpus, start, memory, identity, result)
                    except HierMemError as error:
                        raise with_advice(error, checkpoints) from None
        return result
    finally:
        if rows is not None:
            rows.close()


def _train_config(values: TrainSettings, takes_mask: bool) -> TrainConfig:
    settings = {f.name: getattr(values, f.name) for f in fields(TrainConfig)}
    return TrainConfig(**settings | {"document_mask": values.document_mask and takes_mask})


def _write(
    values: TrainSettings,
    trainer: Trainer,
    corpus: Corpus,
    start: Start,
    memory: MemoryConfig | None,
    identity: dict[str, Any],
    result: dict[str, Any],
) -> dict[str, Any]:
    """Write what the run leaves; returns where it is."""
    from ..training import results

    if values.subtree is not None:
        assert memory is not None, "a subtree is of regime frozen, which has memories: _check"
        out = values.run / "subtree"
        results.write_subtree_result(out, trainer, corpus, start, memory, values.subtree, identity)
        return {"subtree": str(out)}
    out = values.run / "model"
    card = results.model_card(trainer, corpus, memory, result)
    results.write_model(out, trainer, start, memory, card)
    return {"model": str(out)}


def _text(values: TrainSettings, result: dict[str, Any]) -> str:
    if result["stopped"]:
        return (
            f"stopped at step {result['step']} of {values.iters}, with a checkpoint; go on with "
            "the same command and --resume"
        )
    lines = [f"{result['step']} steps done"]
    if result["loss"] is not None:  # None: a run that was stopped after its last step
        lines[0] += f", loss {result['loss']:.4f} nats at the end"
    if result["validation"]:
        rows = [(name, f"{loss:.4f}") for name, loss in result["validation"].items()]
        lines.append(table(("memory", "validation loss"), rows))
    lines.append(f"curves: {values.run / 'curves.png'}")
    if "subtree" in result:
        lines.append(f"result: {result['subtree']} (mlx_hiermem merge puts all subtrees together)")
    else:
        lines.append(f"model: {result['model']}")
    return "\n".join(lines)
