"""Converting: plan, then write, then verify; nothing appears under its name before all is done."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_hiermem.anchors import load_anchor_tokenizer
from mlx_hiermem.bank.manifest import FileEntry
from mlx_hiermem.errors import FormatError, HierMemError, InputError
from mlx_hiermem.files import AtomicFile
from mlx_hiermem.folders import check_new, model_folder
from mlx_hiermem.models import find_model
from mlx_hiermem.tree_source import check_embeddings

from .bank.rows import BlockRows
from .bank.writing import write_planned
from .card import model_card
from .planning import Conversion, plan_conversion
from .reference import import_torch
from .report import Report, to_text
from .request import Request
from .resume import JOURNAL, Journal, job_of, states_of
from .tokenizer import copy_tokenizer, tokenizer_files

if TYPE_CHECKING:
    from .verify import Verification

#: Called with (what, how much in all, how much since the call before).
Progress = Callable[[str, int, int], None]

_CARD = "README.md"


@dataclass(frozen=True)
class Done:
    """What a conversion did, or would do.

    Attributes:
        report: the plan.
        folder: the model folder; None after a dry run.
        revision: of the bank, if there is one.
        resumed: bytes that a conversion before had written.
        verification: what ``--verify`` found.
    """

    report: Report
    folder: Path | None = None
    revision: str | None = None
    resumed: int = 0
    verification: Verification | None = None

    def to_dict(self) -> dict[str, Any]:
        """A mapping for JSON."""
        found = None if self.verification is None else self.verification.to_dict()
        return {
            **self.report.to_dict(),
            "folder": None if self.folder is None else str(self.folder),
            "revision": self.revision,
            "resumed": self.resumed,
            "verification": found,
        }

    def to_text(self) -> str:
        """The same for people."""
        from .card import verification_table

        lines = [to_text(self.report, mapping=False)]
        if self.resumed:
            lines.append(f"went on from {self.resumed:,} bytes that were there")
        if self.verification is not None:
            lines += ["", *verification_table(self.verification)]
        lines.append(
            f"{self.folder}" + ("" if self.revision is None else f": revision {self.revision[:12]}")
        )
        return "\n".join(lines)


def convert(request: Request, progress: Progress | None = None) -> Done:
    """Convert an anchor, a bank, or both.

    Raises:
        InputError, ConfigError, FormatError: in one line, why it cannot be done; then nothing was
            written, and what was there is still there.
    """
    tell = progress or (lambda what, total, count: None)
    check_new(request.mlx_path, request.overwrite)
    with ExitStack() as stack:
        plan = plan_conversion(request, stack)
        if request.dry_run:
            return Done(plan.report)
        if plan.report.problem is not None:
            raise plan.error or FormatError(plan.report.problem)
        return _write(request, plan, tell)


def _write(request: Request, plan: Conversion, tell: Progress) -> Done:
    if request.verify:
        import_torch()  # after hours of writing is too late
    job, out = _job(request, plan), request.mlx_path
    with model_folder(
        out, overwrite=request.overwrite, keep=lambda folder: Journal.fits(folder, job)
    ) as folder:
        journal = Journal(folder, job)
        journal.open()
        resumed = journal.bytes_done
        check_space(folder, plan.report.bytes_written - resumed)
        _write_anchor(request, plan, folder, journal, tell)
        revision = None
        if plan.bank is not None:
            if plan.routing is not None and plan.routing.ours is not None:
                check_embeddings(plan.routing.ours, folder)
            memory = folder / "memory"
            memory.mkdir(exist_ok=True)
            others = {} if plan.routing is None else plan.routing.write(memory)
            total = plan.bank_bytes
            _, revision = write_planned(
                plan.bank, memory, journal, packing=plan.packing, others=others,
                progress=lambda count: tell("bank", total, count),
            )  # fmt: skip
        found = None
        if request.verify:
            found = _verify(plan, folder, tell)
        card = model_card(
            Path(request.model).name, plan.anchor.about, plan.report.config, plan.report.notices,
            found,
        )  # fmt: skip
        with AtomicFile(folder, _CARD) as file:
            file.write(card.encode())
        journal.remove()
    return Done(plan.report, out, revision, resumed, found)


def _job(request: Request, plan: Conversion) -> str:
    """A name for this conversion: its options, and all that it reads."""
    folder = plan.anchor.tokenizer
    if request.tokenizer is not None:
        folder = find_model(request.tokenizer)
    files = [] if folder is None else [folder / name for name in tokenizer_files(folder)]
    read = {"sources": plan.fingerprint, "tokenizer_files": states_of(files)}
    return job_of({**request.decisions(), **read})


def _write_anchor(
    request: Request, plan: Conversion, folder: Path, journal: Journal, tell: Progress
) -> None:
    """Write the anchor and the tokenizer, unless the journal knows them; config.json is last."""
    if "config.json" in journal.done:
        return
    for path in folder.iterdir():  # what a kill has left of it
        if path.name != JOURNAL:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    plan.anchor.write(folder, lambda total, count: tell("anchor", total, count))
    if request.tokenizer is not None:
        copy_tokenizer(request.tokenizer, folder)
    elif plan.anchor.tokenizer is not None:
        copy_tokenizer(plan.anchor.tokenizer, folder)
    size = (folder / "config.json").stat().st_size
    # What matters of it is that it is there: everything else of the anchor was written before.
    journal.add("config.json", FileEntry(size, ""))


def _verify(plan: Conversion, folder: Path, tell: Progress) -> Verification:
    from .verify import prompt_tokens, verify  # imports mlx-lm, which takes seconds

    rows = None if plan.bank is None else BlockRows(plan.bank)
    try:
        tokenizer = load_anchor_tokenizer(folder, plan.anchor.about)
    except HierMemError:
        tokenizer = None
    prompts = prompt_tokens(tokenizer, plan.anchor.vocabulary)
    kind = None if plan.bank is None else plan.bank.config.kind
    found = verify(
        folder, plan.anchor.reference(kind), rows, prompts,
        exact=plan.exact, progress=lambda total, count: tell("verify", total, count),
    )  # fmt: skip
    if found.agrees is False:
        worst = max(found.differences, key=lambda one: one.largest)
        raise FormatError(
            f"verify: with memory {worst.memory} the logits differ from the original by up to "
            f"{worst.largest:.3g} (largest logit {worst.scale:.3g}), more than rounding explains; "
            "nothing was written; please report this"
        )
    return found


def check_space(folder: Path, needed: int) -> None:
    """Raise InputError where the disk of a folder has not so many bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder.parent}: {free:,} bytes are free, {needed:,} are needed; make space, or give "
            "a folder on another disk"
        )
