"""Planning a conversion: opening what is to be converted and finding what goes where.

Of the weights little is read here: the generic memories of several subtrees, which have to be the
same, and in a dry run a part of the bank, as a trial of how long it takes.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_hiermem.bank.checksums import SIZE
from mlx_hiermem.bank.quantize import Packer
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.errors import FormatError, HierMemError, InputError
from mlx_hiermem.quantization import Quantization

from .anchor import Anchor
from .anchors import open_anchor
from .bank.description import CONFIG, Entry, read_description
from .bank.gather import open_checkpoints, sort_tensors
from .bank.plan import BankPlan, make_plan
from .bank.rows import BlockRows
from .bank.writing import stored_config
from .openlm.weights import is_anchor_key
from .report import Report, memory_lines
from .request import DEFAULT_BITS, Request
from .resume import states_of
from .routing import BankRouting, find_routing
from .sources import Source
from .sources.names import load_key_map

# Headers, manifest, tokenizer and card, roughly.
_SMALL_FILES = 1 << 24


@dataclass
class Conversion:
    """A plan.

    Attributes:
        report: for people.
        anchor: what writes the anchor.
        bank: what goes into the bank; None: there is none.
        routing: its tree, if one is given.
        packing: how its blocks are quantised.
        error: why it cannot be done.
        sources: the checkpoints, open.
        files: ``states_of`` the other files that are read, but for the tokenizer's.
    """

    report: Report
    anchor: Anchor
    bank: BankPlan | None = None
    routing: BankRouting | None = None
    packing: Quantization | None = None
    error: HierMemError | None = None
    sources: list[Source] = field(default_factory=list)
    files: list[list[Any]] = field(default_factory=list)

    @property
    def config(self) -> MemoryConfig | None:
        """Of the bank that is written."""
        return None if self.bank is None else stored_config(self.bank, self.packing)

    @property
    def bank_bytes(self) -> int:
        """Bytes of all blocks that are written."""
        config = self.config
        if config is None:
            return 0
        return sum(
            config.block_bytes(level) * config.clusters(level) for level in config.memory_levels
        )

    @property
    def fingerprint(self) -> list[Any]:
        """Of what is read, but the tokenizer: whether it is the same as before.

        Configs and trees count by what they say, all other files by their size and time.
        """
        tree, config = self.routing, self.config
        centroids = [] if tree is None else [
            hashlib.sha256(level.tobytes()).hexdigest() for level in tree.tree.centroids
        ]  # fmt: skip
        return [
            [one.fingerprint for one in self.sources], self.files, str(self.anchor.path),
            self.anchor.about, None if config is None else config.to_dict(), centroids,
        ]  # fmt: skip

    @property
    def exact(self) -> bool:
        """Whether all numbers that are written are those of the source, or wider."""
        if self.bank is None:
            return self.anchor.exact
        dtypes = {
            part.tensor.dtype
            for groups in self.bank.levels.values()
            for group in groups
            for part in group.parts
        }
        kept = self.bank.config.dtype == "float32" or dtypes == {self.bank.config.dtype}
        return self.anchor.exact and kept and self.packing is None


def plan_conversion(request: Request, stack: ExitStack) -> Conversion:
    """Open the sources and plan.

    Args:
        stack: closes the sources.

    Returns:
        The plan; what is wrong with the mapping is its ``report.problem``.

    Raises:
        InputError, ConfigError, FormatError: a source cannot be opened or an option is wrong.
    """
    # Before they are read: a change that comes later must not look as if it had been read.
    described = (request.key_map, _description(request))
    files = states_of(path for path in described if path is not None)
    key_map = None if request.key_map is None else load_key_map(request.key_map)
    anchor, own, sources, ignored = open_anchor(request, key_map, stack)
    files += states_of(anchor.files)
    _check_apart(request)
    entries, bank_ignored, left_over = own, [], list(anchor.left_over)
    if request.bank is not None:
        if own:
            raise InputError(
                f"{request.model}: holds a memory of its own ({own[0].tensor.name}), and --bank "
                "is given; leave one out (--ignore 'REGEX')"
            )
        opened = open_checkpoints(request.bank, stack)
        found = sort_tensors(opened, key_map, request.ignore)
        entries, sources = list(found.memory), [*sources, *(one for one, _ in opened)]
        anchors = [name for name in found.others if is_anchor_key(name)]
        bank_ignored = [*found.left_out, *anchors]
        left_over += [name for name in found.others if name not in set(anchors)]
        if not entries:
            raise FormatError(
                f"{request.bank}: no tensor of a memory ({_some(left_over or anchors)}); expected "
                "names such as memory.level1.w1; see docs/convert.md, or give --key-map"
            )
    report = Report(
        model=str(request.model),
        bank=str(request.bank or request.model) if entries else None,
        tree=None if request.tree is None else str(request.tree),
        out=str(request.mlx_path),
        anchor=dict(anchor.about),
        lines=[*anchor.lines, *memory_lines(entries)],
        ignored=[*ignored, *anchor.ignored, *bank_ignored],
        missing=list(anchor.missing),
        left_over=left_over,
        notices=list(anchor.notices),
        disk_free=_free(request.mlx_path),
    )
    plan = Conversion(report, anchor, sources=sources, files=files)
    try:
        _check_names(report)
        if entries:
            _plan_bank(request, plan, entries)
        elif request.tree is not None or request.packs_bank and request.quantize == "bank":
            raise InputError(
                f"{request.model}: has no memory, so there is nothing for --tree or --quantize "
                "bank; give --bank"
            )
    except HierMemError as error:
        plan.error = error
        report.problem = str(error)
    if key_map is not None:
        report.notices += [f"--key-map: {one} fits no name" for one in key_map.unused]
    _sizes(request, plan)
    return plan


def _plan_bank(request: Request, plan: Conversion, entries: Sequence[Entry]) -> None:
    described = read_description(_description(request))
    branching = described.branching
    levels = described.levels or (None if described.ranks is None else len(described.ranks))
    routing = None
    if request.tree is not None:
        encoder = request.encoder or described.encoder
        routing = find_routing(request.tree, encoder, branching, levels)
    bank = make_plan(
        entries,
        described,
        plan.anchor.shape,
        {"name": Path(request.model).name},
        where=Path(request.bank or request.model),
        tree=None if routing is None else (routing.tree.branching, routing.tree.levels),
        dtype=request.dtype,
        zero_generic=request.zero_generic,
        encoder=None if routing is None else routing.encoder,
    )
    if request.packs_bank:
        plan.packing = Quantization.choose(
            bank.config.row_widths(), request.q_bits or DEFAULT_BITS, request.q_mode,
            request.q_group_size,
        )  # fmt: skip
    plan.bank, plan.routing = bank, routing
    plan.report.config, plan.report.layouts = plan.config, bank.layouts
    plan.report.notices += bank.notices
    if routing is None:
        plan.report.notices.append(
            "no tree: nothing can be routed, only paths can be named; give --tree"
        )


def _description(request: Request) -> Path | None:
    """The memory_config.json: told, or beside the bank."""
    if request.memory_config is not None:
        return request.memory_config
    bank = request.bank or Path(request.model).expanduser()
    folder = bank if bank.is_dir() else bank.parent
    return folder / CONFIG if (folder / CONFIG).is_file() else None


def _check_names(report: Report) -> None:
    if report.missing:
        raise FormatError(
            f"{report.model}: {_some(report.missing)} missing; --dry-run shows the whole mapping"
        )
    if report.left_over:
        raise FormatError(
            f"{report.bank or report.model}: {_some(report.left_over)} left over: nothing is "
            "known of such names; rename them with --key-map, or leave them out with --ignore"
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name[:80] for name in names[:3]) + more


def _check_apart(request: Request) -> None:
    """Raise InputError where what is written lies in what is read, or the other way round."""
    out = request.mlx_path.resolve()
    for name, given in (("--model", request.model), ("--bank", request.bank)):
        if given is None or not Path(given).expanduser().exists():
            continue
        source = Path(given).expanduser().resolve()
        if out == source or source.is_relative_to(out):
            raise InputError(
                f"--mlx-path {request.mlx_path}: holds {name} {given}, which it would replace; "
                "give another folder"
            )


def _free(out: Path) -> int:
    folder = out.parent.resolve()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _sizes(request: Request, plan: Conversion) -> None:
    """Fill in what is read and written, and how long that takes."""
    report, config = plan.report, plan.config
    report.bytes_read = sum(line.bytes for line in report.lines)
    report.bytes_written = plan.anchor.nbytes + _SMALL_FILES
    if request.packs_anchor:  # once as it is, and once more in fewer bits
        report.bytes_written += plan.anchor.nbytes
    if plan.routing is not None:
        report.bytes_written += plan.routing.nbytes
    if config is None or plan.bank is None:
        return
    clusters = sum(config.clusters(level) for level in config.memory_levels)
    generic = sum(config.block_bytes(level) for level in config.memory_levels)
    report.bytes_written += plan.bank_bytes + generic + clusters * SIZE
    if request.dry_run and report.problem is None:
        report.seconds = _trial(plan.bank, plan.packing) * (plan.bank_bytes + plan.anchor.nbytes)


def _trial(bank: BankPlan, packing: Quantization | None) -> float:
    """Seconds per byte that is written: a part of the bank is read, packed and hashed."""
    config = bank.config
    packer = None if packing is None else Packer(config, packing)
    level = max(config.memory_levels, key=lambda one: config.ranks[one - 1] * config.clusters(one))
    started, done = time.perf_counter(), 0
    for chunk in BlockRows(bank).level(level, 0, min(config.clusters(level), 64)):
        if packer is not None:
            chunk = packer.pack(chunk, f"level {level}")
        # Once for the file, once for the blocks, and once in place of writing.
        for _ in range(3):
            hashlib.sha256(chunk).digest()
        done += chunk.nbytes
        if time.perf_counter() - started > 1:
            break
    return (time.perf_counter() - started) / done
