"""An OpenLM checkpoint as an anchor that can be converted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_hiermem.shapes import AnchorShape

from ..anchor import Anchor, Progress
from ..anchor_writer import nbytes_of, write_anchor
from ..bank.keys import is_memory_key
from ..fold import fold
from ..quantized_anchor import quantized
from ..report import Line
from ..request import Request
from ..sources import SourceTensor
from ..tokenizer import tokenizer_files
from .config import read_openlm_config
from .weights import Target, map_anchor, without_prefix

if TYPE_CHECKING:
    from ..verify import Reference

#: OpenLM's end-of-text token.
END_OF_TEXT = 0


class OpenLMAnchor(Anchor):
    """An anchor under OpenLM's names.

    Args:
        path: the checkpoint.
        tensors: of it, without those of a memory.
        request: the options.

    Raises:
        ConfigError, FormatError, InputError: the config or the tensors are not those of an anchor.
    """

    def __init__(self, path: Path, tensors: Mapping[str, SourceTensor], request: Request) -> None:
        self.path = path
        self._request = request
        self._tensors = without_prefix(tensors, is_memory_key)
        found = read_openlm_config(
            path,
            self._tensors,
            model_config=request.model_config,
            head_dim=request.head_dim,
            rope_theta=request.rope_theta,
            rope_bf16=request.rope_bf16,
        )
        mapped = map_anchor(self._tensors, found.args, is_memory_key)
        self._args, self._targets = found.args, mapped.targets
        self.shape = AnchorShape.of(found.args)
        self.vocabulary = found.args.vocab_size
        self.about = {**asdict(found.args)}
        self.missing, self.left_over, self.ignored = mapped.missing, mapped.surplus, mapped.ignored
        self.notices = list(found.notices)
        self.lines = _lines(mapped.targets)
        self.nbytes = sum(nbytes_of(one, request.dtype) for one in mapped.targets)
        kept = request.dtype in (None, "float32") or {one.dtype for one in mapped.targets} == {
            request.dtype
        }
        self.exact = kept and not request.packs_anchor
        folder = path if path.is_dir() else path.parent
        self.tokenizer = folder if tokenizer_files(folder) else None
        if self.tokenizer is None and request.tokenizer is None:
            self.notices.append(
                "no tokenizer: OpenLM's checkpoints have none; give --tokenizer PATH_OR_REPO (it "
                "was trained with that of EleutherAI/gpt-neox-20b unless told otherwise)"
            )

    def write(self, folder: Path, progress: Progress | None = None) -> None:
        config: dict[str, Any] = {**asdict(self._args), "eos_token_id": END_OF_TEXT}
        tell = None if progress is None else partial(progress, self.nbytes)
        with quantized(folder, self._request) as plain:
            write_anchor(plain, self._targets, config, self._request.dtype, tell)

    def reference(self, kind: str | None) -> Reference:
        from ..reference.openlm import OpenLMReference

        return OpenLMReference(self._tensors, self._args, kind)


def _lines(targets: Sequence[Target]) -> list[Line]:
    """The mapping, one line for each kind of tensor of the source."""
    into: dict[str, list[Target]] = {}
    tensors: dict[str, SourceTensor] = {}
    for target in targets:
        for part in target.parts:
            into.setdefault(part.tensor.name, []).append(target)
            tensors[part.tensor.name] = part.tensor
    lines = []
    for pattern, names in fold(into).items():
        written = dict.fromkeys(target.name for name in names for target in into[name])
        shape, dtype = tensors[names[0]].shape, tensors[names[0]].dtype
        nbytes = sum(tensors[name].nbytes for name in names)
        lines.append(Line(pattern, _braces(list(fold(written))), len(names), shape, dtype, nbytes))
    return lines


def _braces(names: Sequence[str]) -> str:
    """Names that differ in one of their parts only: ``self_attn.{q_proj,k_proj,v_proj}.weight``."""
    columns = list(zip(*(name.replace("..", "\0").split(".") for name in names), strict=True))
    pieces = [
        column[0] if len(set(column)) == 1 else "{" + ",".join(column) + "}" for column in columns
    ]
    return ".".join(pieces).replace("\0", "..")
