"""``convert --to torch``: an MLX model folder as PyTorch would have saved it, in safetensors.

An OpenLM anchor gets OpenLM's names again. Any other anchor is a Hugging Face model that mlx-lm has
converted, and stays what it is: only its bank is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_hiermem.anchors.openlm_args import ModelArgs
from mlx_hiermem.bank.reader import BlockReader
from mlx_hiermem.errors import FormatError, InputError
from mlx_hiermem.files import AtomicFile
from mlx_hiermem.folders import check_new, copy_file, model_folder
from mlx_hiermem.models import find_model
from mlx_hiermem.tree_source import TREE

from .bank.description import CONFIG as DESCRIPTION
from .bank.rows import CHUNK_BYTES, check_finite
from .bank.to_torch import description, write_stacked
from .openlm.weights import Joined, openlm_config, to_openlm
from .run import check_space
from .scattered import ScatteredFile
from .sources import Source, SourceTensor, open_source
from .tokenizer import tokenizer_files

#: Called with (what, bytes in all, bytes since the call before).
Progress = Callable[[str, int, int], None]

ANCHOR = "anchor.safetensors"
INDEX = "model.safetensors.index.json"
MODEL_CONFIG = "model_config.json"


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: where.
        tensors: how many.
        bytes: of all of them.
        anchor, bank: whether the anchor's weights and the bank are among them.
    """

    folder: Path
    tensors: int
    bytes: int
    anchor: bool
    bank: bool

    def to_dict(self) -> dict[str, Any]:
        """A mapping for JSON."""
        return {**vars(self), "folder": str(self.folder)}

    def to_text(self) -> str:
        """The same for people."""
        what = " and ".join(
            name for name, there in (("anchor", self.anchor), ("bank", self.bank)) if there
        )
        return f"{self.folder}: {what}, {self.tensors} tensors, {self.bytes:,} bytes"


def to_torch(
    model: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write a model folder for PyTorch: layout 1 of docs/convert.md, ``format: pt``.

    Args:
        model: a model folder, the name of a model that ships, or a Hub repository.
        out: the folder to write.
        overwrite: replace what an export before has written there.

    Raises:
        InputError: ``out`` exists, or there is nothing to write.
        FormatError: the anchor or the bank is quantised, the bank has what PyTorch would not know
            of (added memories, blocked blocks), or a file cannot be read or written.
    """
    tell = progress or (lambda what, total, count: None)
    out = Path(out).expanduser()
    check_new(out, overwrite)
    folder = find_model(model)
    args = _arguments(folder)
    has_bank = (folder / "memory").is_dir()
    if args is None and not has_bank:
        raise InputError(
            f"{model}: neither an OpenLM anchor nor a memory bank; its weights are those of a "
            "Hugging Face model, which PyTorch loads as it is"
        )
    with model_folder(out, overwrite=overwrite) as target:
        where: dict[str, str] = {}
        total = 0
        if args is not None:
            with open_source(folder) as source:
                sizes = sum(tensor.nbytes for tensor in source.tensors.values())
                check_space(target, sizes)
                where |= _write_anchor(source, target, args, lambda n: tell("anchor", sizes, n))
            total += sizes
            _write_json(target, MODEL_CONFIG, openlm_config(args))
            # What says to `convert --model` that the folder is one of OpenLM.
            _write_json(target, "config.json", {"model_type": "openlm", **openlm_config(args)})
            for name in tokenizer_files(folder):
                copy_file(folder / name, target, name)
        if has_bank:
            with closing(BlockReader(folder / "memory")) as reader:
                config = reader.config
                size = sum(
                    config.block_bytes(level) * (config.clusters(level) + 1)  # and the generic one
                    for level in config.memory_levels
                )
                check_space(target, size)
                where |= write_stacked(reader, target, lambda n: tell("bank", size, n))
                total += size
                _write_json(target, DESCRIPTION, description(config))
                for file in (TREE, config.encoder.get("file")):
                    if isinstance(file, str) and file in reader.manifest.files:
                        copy_file(reader.real_path(file), target, file)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        _write_json(target, INDEX, index)
    return Exported(out, len(where), total, args is not None, has_bank)


def _arguments(folder: Path) -> ModelArgs | None:
    """The arguments of an OpenLM anchor of ours; None for any other."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{folder / 'config.json'}: cannot be read ({error})") from None
    if config.get("model_type") != "openlm":
        return None
    if "quantization" in config:
        raise FormatError(
            f"{folder}: the anchor is quantised; PyTorch gets the anchor that it was made from"
        )
    return ModelArgs.from_dict(config)


def _write_anchor(
    source: Source, folder: Path, args: ModelArgs, progress: Callable[[int], None]
) -> dict[str, str]:
    """Write the anchor under OpenLM's names, rows of fused matrices one behind the other."""
    joined = _without_copy(to_openlm(args), args)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for one in joined:
        parts = [_tensor(source, name, (rows, *one.shape[1:])) for name, rows in one.parts]
        if len({part.dtype for part in parts}) > 1:
            raise FormatError(f"{parts[0].where}: of another dtype than {parts[-1].name}")
        tensors[one.name] = (parts[0].dtype, one.shape)
    with ScatteredFile(folder, ANCHOR, tensors) as out:
        for one in joined:
            start = 0
            for name, rows in one.parts:
                tensor = source.tensors[name]
                step = max(1, CHUNK_BYTES // max(1, tensor.nbytes // rows))
                for first in range(0, rows, step):
                    array = tensor.read(first, min(step, rows - first))
                    check_finite(array, tensor.dtype, tensor.where)
                    out.put(one.name, start + first, array)
                    progress(array.nbytes)
                start += rows
    return dict.fromkeys(tensors, ANCHOR)


def _without_copy(joined: Sequence[Joined], args: ModelArgs) -> list[Joined]:
    """Without the head where it is the embedding: safetensors keeps no tensor twice."""
    tied = args.tie_word_embeddings
    return [one for one in joined if not (tied and one.name == "output.weight")]


def _tensor(source: Source, name: str, shape: tuple[int, ...]) -> SourceTensor:
    tensor = source.tensors.get(name)
    if tensor is None or tensor.shape != shape:
        found = "missing" if tensor is None else f"of shape {tensor.shape}"
        raise FormatError(f"{source.path}: {name} is {found}, expected {shape}; convert it again")
    return tensor


def _write_json(folder: Path, name: str, value: dict[str, Any]) -> None:
    with AtomicFile(folder, name) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())
