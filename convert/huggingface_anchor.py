"""A model of Hugging Face, or one of mlx-lm, as an anchor that can be converted."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from mlx_hiermem.errors import ConfigError
from mlx_hiermem.folders import anchor_files
from mlx_hiermem.making import build_anchor
from mlx_hiermem.models import find_model

from .anchor import Anchor, Progress
from .fold import fold
from .report import Line
from .request import DEFAULT_BITS, Request
from .sources import SourceTensor, open_source
from .tokenizer import tokenizer_files
from .verify import Reference

_ITEM = {"float32": 4, "float16": 2, "bfloat16": 2}
# What architectures call the table of their tokens' embeddings.
_TABLES = (
    "embed_tokens", "wte", "word_embeddings", "tok_embeddings", "token_embeddings", "embed_in",
    "embeddings", "embedding", "embed",
)  # fmt: skip


class HuggingFaceAnchor(Anchor):
    """An anchor that mlx-lm converts.

    Args:
        folder: with config.json and safetensors.
        config: its config.json.
        request: the options.

    Raises:
        ConfigError: mlx-lm has no such architecture, or an option is for OpenLM only; or ``verify``
            is asked for, and nothing tells which tokens there are.
        FormatError: a file is damaged.
    """

    def __init__(self, folder: Path, config: dict[str, Any], request: Request) -> None:
        for option in ("model_config", "head_dim", "rope_theta", "rope_bf16"):
            if getattr(request, option):
                raise ConfigError(
                    f"--{option.replace('_', '-')}: is for OpenLM checkpoints; {folder} says all "
                    "in its config.json"
                )
        self.path, self._request = folder, request
        names = {*anchor_files(folder), *tokenizer_files(folder)}
        self.files = [folder / name for name in sorted(names)]
        network, self.shape = build_anchor(folder)
        del network  # its weights were never computed
        text = config.get("text_config") or config
        self.vocabulary = int(text.get("vocab_size") or config.get("vocab_size") or 0)
        self.about = {
            key: text.get(key, config.get(key))
            for key in ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size",
                        "num_attention_heads", "vocab_size")
            if text.get(key, config.get(key)) is not None
        }  # fmt: skip
        with ExitStack() as stack:
            source = stack.enter_context(open_source(folder))
            tensors = dict(source.tensors)
            self.is_mlx = source.extras.get("format") == "mlx"
        # A config may leave it to the defaults of its architecture.
        self.vocabulary = self.vocabulary or _rows_of_table(tensors)
        if request.verify and not self.vocabulary:
            raise ConfigError(
                f"{folder}: config.json has no vocab_size, and no tensor has the name of a table "
                "of tokens, so there are none to compare with; add it, or convert without --verify"
            )
        self.lines = [_line(pattern, [tensors[name] for name in names])
                      for pattern, names in fold(tensors).items()]  # fmt: skip
        self.nbytes = sum(
            _size(tensor.shape) * _ITEM.get(request.dtype or tensor.dtype, 4)
            for tensor in tensors.values()
        )
        dtypes = {tensor.dtype for tensor in tensors.values()}
        kept = request.dtype in (None, "float32") or dtypes == {request.dtype}
        self.exact = kept and not request.packs_anchor and "quantization" not in config
        # Its tokenizer comes along with it.
        self.notices = []
        if not tokenizer_files(folder) and request.tokenizer is None:
            self.notices.append(f"no tokenizer in {folder.name}; give --tokenizer PATH_OR_REPO")

    def write(self, folder: Path, progress: Progress | None = None) -> None:
        from .huggingface import convert_huggingface

        request = self._request
        packing: dict[str, Any] = {}
        if request.packs_anchor:
            packing = {
                "quantize": True,
                "q_bits": request.q_bits or DEFAULT_BITS,
                "q_group_size": request.q_group_size,
                "q_mode": request.q_mode,
            }
        if request.tokenizer is not None:
            packing["tokenizer"] = find_model(request.tokenizer)
        tell = None if progress is None else partial(progress, self.nbytes)
        convert_huggingface(self.path, folder, dtype=request.dtype, progress=tell, **packing)

    def reference(self, kind: str | None) -> Reference:
        from .reference.huggingface import HuggingFaceReference

        return HuggingFaceReference(self.path, kind)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for one in shape:
        size *= one
    return size


def _rows_of_table(tensors: Mapping[str, SourceTensor]) -> int:
    """Rows of the table of the tokens' embeddings, by its name; 0: no tensor has one of these."""
    rows = [
        tensor.shape[0]
        for name, tensor in tensors.items()
        if len(tensor.shape) == 2 and name.endswith(".weight") and name.split(".")[-2] in _TABLES
    ]
    return min(rows, default=0)  # of several, tokens that all of them have


def _line(pattern: str, tensors: list[SourceTensor]) -> Line:
    nbytes = sum(_size(one.shape) * _ITEM.get(one.dtype, 4) for one in tensors)
    first = tensors[0]
    return Line(pattern, "the anchor, by mlx-lm", len(tensors), first.shape, first.dtype, nbytes)
