"""Tiny OpenLM-shaped checkpoints with a memory bank, in every layout and format of docs/convert.md.

``python -m tests.convert.checkpoints --out DIR`` writes one of each, for people to look at.

Everything is written by the libraries that write such files in earnest: ``torch.save``,
safetensors, ``torch.distributed.checkpoint`` from two processes.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.convert.example import MATRICES, Example, make_numbers
from tests.convert.save_dcp import Job, save_dcp

__all__ = [
    "FORMATS", "KEY_MAP", "LAYOUTS", "MATRICES", "Example", "Job", "Written", "foreign_names",
    "make_numbers", "memory_state", "save_dcp", "write_all", "write_checkpoint", "write_foreign",
    "write_per_cluster", "write_per_layer", "write_stacked", "write_state", "write_subtrees",
]  # fmt: skip

LAYOUTS = ("stacked", "per_layer", "per_cluster")
FORMATS = ("pt", "safetensors", "safetensors_sharded", "dcp")


# ---- names -----------------------------------------------------------------------------


def memory_state(
    example: Example,
    layout: str = "stacked",
    *,
    subtree: int | None = None,
    transposed: Sequence[str] = (),
    generic: str | None = "joined",
) -> dict[str, torch.Tensor]:
    """The state dict of a bank.

    Args:
        layout: one of ``LAYOUTS``.
        subtree: only the clusters of this level-1 subtree.
        transposed: matrices whose last two axes are (w, r).
        generic: "joined" (all levels), "by level", or None: leave it out.
    """
    found: dict[str, torch.Tensor] = {}

    def turned(matrix: str, array: torch.Tensor) -> torch.Tensor:
        array = array.transpose(-1, -2) if matrix in transposed else array
        return array.clone(memory_format=torch.contiguous_format)

    for level, arrays in example.blocks.items():
        below = example.branching ** (level - 1)
        count = example.branching**level
        first, count = (0, count) if subtree is None else (subtree * below, below)
        for name, whole in arrays.items():
            array = turned(name, whole[first : first + count])
            if layout == "stacked":
                found[f"memory.level{level}.{name}"] = array
                continue
            for position, n in enumerate(example.layers):
                if layout == "per_layer":
                    key = f"layers.{n}.memory.level{level}.{name}"
                    found[key] = array[:, position].clone()
                    continue
                for row in range(count):
                    key = f"memory.level{level}.{first + row}.layers.{n}.{name}"
                    found[key] = array[row, position].clone()
    pieces = {} if generic is None else {"": example.generic}
    if generic == "by level":
        sizes = [example.ranks[level - 1] for level in example.levels]
        cut = {name: array.split(sizes, dim=1) for name, array in example.generic.items()}
        pieces = {
            f".level{level}": {name: parts[at] for name, parts in cut.items()}
            for at, level in enumerate(example.levels)
        }
    for part, arrays in pieces.items():
        for name, whole in arrays.items():
            array = turned(name, whole)
            if layout == "stacked":
                found[f"memory.generic{part}.{name}"] = array
                continue
            for position, n in enumerate(example.layers):
                front, back = (
                    (f"layers.{n}.", "") if layout == "per_layer" else ("", f".layers.{n}")
                )
                found[f"{front}memory.generic{part}{back}.{name}"] = array[position].clone()
    return found


#: Renames the keys of :func:`foreign_names` to ours; what leaves them out is null.
KEY_MAP: dict[str, str | None] = {
    r"^bank/depth_(\d+)/(\w+)$": r"memory.level\1.\2",
    r"^bank/shared/(\w+)$": r"memory.generic.\1",
    r"^bank/steps$": None,
}


def foreign_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A stacked bank under somebody else's names, with a counter; ``KEY_MAP`` fits it."""
    found = {
        name.replace("memory.level", "bank/depth_")
        .replace("memory.generic", "bank/shared")
        .replace(".", "/"): tensor
        for name, tensor in state.items()
    }
    return {**found, "bank/steps": torch.tensor(1000)}


# ---- files -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """Where a checkpoint was written.

    Attributes:
        model: the checkpoint with the anchor; ``bank``: that with the memory, maybe the same.
        model_config, params, memory_config, tree: the files beside them; ``tree`` is a .npz.
        key_map: of foreign names, else None.
    """

    model: Path
    bank: Path
    model_config: Path
    params: Path
    memory_config: Path
    tree: Path
    key_map: Path | None = None

    def arguments(self) -> list[str]:
        """Arguments of ``mlx_hiermem convert``, all but ``--mlx-path`` and ``--tokenizer``."""
        found = ["--model", str(self.model), "--tree", str(self.tree)]
        found += ["--model-config", str(self.model_config)]
        found += ["--memory-config", str(self.memory_config)]
        if self.bank != self.model:
            found += ["--bank", str(self.bank)]
        return found if self.key_map is None else [*found, "--key-map", str(self.key_map)]


def write_state(
    state: Mapping[str, torch.Tensor],
    folder: Path,
    name: str = "epoch_1",
    format: str = "pt",
    *,
    prefix: str | Callable[[str], str] = "",
    bare: bool = False,
    jobs: list[Job] | None = None,
) -> Path:
    """Write one state dict.

    Args:
        format: one of ``FORMATS``.
        prefix: in front of every key, such as ``module.`` or ``_orig_mod.``; or what renames keys.
        bare: a .pt of the state dict itself, and not of what OpenLM puts around it. Of DCP: not
            as ``{"model": state, "epoch": 1}``.
        jobs: DCP folders are put on this list for one :func:`save_dcp`, and not saved yet.

    Returns:
        The file, or the folder.
    """
    from huggingface_hub import save_torch_state_dict
    from safetensors.torch import save_file

    rename = prefix if callable(prefix) else lambda key: prefix + key
    state = {rename(key): tensor for key, tensor in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    if format == "pt":
        path = folder / f"{name}.pt"
        around = {"epoch": 1, "name": "tiny", "state_dict": state, "evaluation_metrics": []}
        torch.save(state if bare else around, path)
        return path
    if format == "dcp":
        path = folder / name
        whole = [key for key in state if key.endswith("inv_freq")]
        job = Job(path, state if bare else {"model": state, "epoch": 1}, whole=whole)
        if jobs is None:
            save_dcp([job])
        else:
            jobs.append(job)
        return path
    kept, seen = {}, set()  # safetensors holds no tensor twice: of a tied head, one is left out
    for key, tensor in state.items():
        if tensor.numel() == 0 or tensor.data_ptr() not in seen:
            kept[key] = tensor.contiguous()
        seen.add(tensor.data_ptr())
    if format == "safetensors":
        path = folder / f"{name}.safetensors"
        save_file(kept, path, metadata={"format": "pt"})
        return path
    path = folder / name
    path.mkdir(exist_ok=True)
    size = sum(tensor.nbytes for tensor in kept.values())
    largest = max(tensor.nbytes for tensor in kept.values())
    save_torch_state_dict(kept, path, max_shard_size=max(math.ceil(size / 3), largest))
    return path


def write_checkpoint(
    example: Example,
    folder: str | Path,
    layout: str = "stacked",
    format: str = "pt",
    *,
    together: bool = True,
    prefix: str | Callable[[str], str] = "",
    bare: bool = False,
    transposed: Sequence[str] = (),
    generic: str | None = "joined",
    jobs: list[Job] | None = None,
) -> Written:
    """Write anchor and bank as an OpenLM run: ``params.txt``, ``checkpoints/epoch_1.*``.

    Args:
        layout: one of ``LAYOUTS``, or "foreign".
        together: anchor and memory in one state dict; else the memory is in ``bank/memory.*``.
        others: as :func:`memory_state` and :func:`write_state` have them.
    """
    folder = Path(folder)
    stacked = "stacked" if layout == "foreign" else layout
    memory = memory_state(example, stacked, transposed=transposed, generic=generic)
    if layout == "foreign":
        memory = foreign_names(memory)
    options = {"prefix": prefix, "bare": bare, "jobs": jobs}
    anchor = {**example.anchor, **(memory if together else {})}
    model = write_state(anchor, folder / "checkpoints", "epoch_1", format, **options)
    bank = model
    if not together:
        bank = write_state(memory, folder / "bank", "memory", format, **options)
    written = _write_beside(example, folder, model, bank, transposed)
    if layout != "foreign":
        return written
    key_map = folder / "key_map.json"
    key_map.write_text(json.dumps(KEY_MAP, indent=2), encoding="utf-8")
    return replace(written, key_map=key_map)


def write_stacked(example: Example, folder: str | Path, format: str = "pt", **more: Any) -> Written:
    """Layout 1; options as :func:`write_checkpoint`."""
    return write_checkpoint(example, folder, "stacked", format, **more)


def write_per_layer(
    example: Example, folder: str | Path, format: str = "pt", **more: Any
) -> Written:
    """Layout 2."""
    return write_checkpoint(example, folder, "per_layer", format, **more)


def write_per_cluster(
    example: Example, folder: str | Path, format: str = "pt", **more: Any
) -> Written:
    """Layout 3."""
    return write_checkpoint(example, folder, "per_cluster", format, **more)


def write_foreign(example: Example, folder: str | Path, format: str = "pt", **more: Any) -> Written:
    """Layout 5: names of somebody else, and the key map for them."""
    return write_checkpoint(example, folder, "foreign", format, **more)


def write_subtrees(
    example: Example,
    folder: str | Path,
    layouts: Sequence[str] = LAYOUTS,
    format: str = "pt",
    *,
    folders: bool = False,
    generic: str | None = "joined",
    generic_in: str = "first",
    transposed: Sequence[str] = (),
    prefix: str | Callable[[str], str] = "",
    bare: bool = False,
    jobs: list[Job] | None = None,
) -> Written:
    """Layout 4: ``bank/`` with one checkpoint per level-1 subtree, the anchor apart.

    Args:
        layouts: those of the subtrees, in turn.
        folders: ``subtree_0/epoch_1.pt`` and not ``subtree-00.pt``.
        generic_in: "first" or "all": which of them hold the generic memory.
    """
    folder = Path(folder)
    options = {"prefix": prefix, "bare": bare, "jobs": jobs}
    model = write_state(example.anchor, folder / "checkpoints", "epoch_1", format, **options)
    for subtree in range(example.branching):
        state = memory_state(
            example,
            layouts[subtree % len(layouts)],
            subtree=subtree,
            transposed=transposed,
            generic=generic if generic_in == "all" or subtree == 0 else None,
        )
        place, name = folder / "bank", f"subtree-{subtree:02}"
        if folders and format in ("pt", "safetensors"):
            place, name = place / f"subtree_{subtree}", "epoch_1"
        write_state(state, place, name, format, **options)
    return _write_beside(example, folder, model, folder / "bank", transposed)


def _write_beside(
    example: Example, folder: Path, model: Path, bank: Path, transposed: Sequence[str]
) -> Written:
    def write_json(path: Path, value: Any) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        return path

    model_config = write_json(folder / "tiny.json", example.model_config)
    params = {**example.params, "model": str(model_config), "name": "tiny", "lr": 0.003}
    text = "".join(f"{name}: {value}\n" for name, value in sorted(params.items()))
    (folder / "params.txt").write_text(text, encoding="utf-8")
    described = {**example.memory_config, "transposed": list(transposed)}
    inside = bank if bank.suffix == "" else bank.parent  # a folder may be saved only later
    memory_config = write_json(inside / "memory_config.json", described)
    tree = folder / "tree.npz"
    np.savez(tree, **{f"level{level}": array for level, array in enumerate(example.tree, 1)})
    return Written(model, bank, model_config, folder / "params.txt", memory_config, tree)


# ---- all of them, for people -----------------------------------------------------------


def write_all(out: str | Path) -> dict[str, Written]:
    """One folder for each layout, format, kind and way of saving: name -> where."""
    out, jobs = Path(out), []
    example = make_numbers(width=384)  # as the default encoder's vectors
    found: dict[str, Written] = {}
    for format in FORMATS:
        for layout in (*LAYOUTS, "foreign"):
            name = f"{layout}-{format}"
            found[name] = write_checkpoint(example, out / name, layout, format, jobs=jobs)
        found[f"subtrees-{format}"] = write_subtrees(
            example, out / f"subtrees-{format}", format=format, jobs=jobs
        )
    for kind in MATRICES:
        numbers = make_numbers(
            kind=kind, ranks=(4, 2, 0), n_layers=3, layers=(0, 2), head_dim=6, width=384
        )
        found[kind] = write_stacked(numbers, out / kind, together=False)
    half = make_numbers(dtype=torch.bfloat16, tied=True, post_embed_norm=True, width=384)
    found["tied-bfloat16"] = write_per_layer(half, out / "tied-bfloat16", generic="by level")
    found["transposed"] = write_stacked(example, out / "transposed", transposed=("w3",))
    for prefix in ("module.", "_orig_mod."):
        found[f"prefix-{prefix}"] = write_stacked(example, out / f"prefix-{prefix}", prefix=prefix)
    found["bare"] = write_stacked(example, out / "bare", bare=True)
    save_dcp(jobs)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Write all of them to ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="folder to write to; is made")
    out = parser.parse_args(arguments).out
    for name, written in write_all(out).items():
        print(name, *written.arguments())


if __name__ == "__main__":
    main()
