"""The state dict of OpenLM and the weights of our model: which rows of which are which.

There is one table, :func:`to_openlm`; both directions follow it. OpenLM keeps queries, keys and
values in one matrix, and gate and up in another; everything else differs in its name only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_hiermem.anchors.norms import PARAMETERS
from mlx_hiermem.anchors.openlm_args import ModelArgs
from mlx_hiermem.errors import FormatError
from mlx_hiermem.shapes import shown

from ..sources.tensor import SourceTensor

_ANCHOR_KEY = re.compile(
    r"(?:(?:tok_embeddings|output|norm|post_embed_norm)"
    r"|layers\.\d+\.(?:attention\.(?:in_proj|out_proj|q_norm|k_norm)"
    r"|attention_norm|ffn_norm|feed_forward\.(?:w12|w3)))\.(?:weight|bias)"
)
_BUFFER_KEY = re.compile(r"layers\.\d+\.attention\.pos_embed\.inv_freq")
_EMBEDDING, _HEAD = "tok_embeddings.weight", "output.weight"
_PREFIX = "model."
# Bytes of two tied matrices that are compared at a time.
_CHUNK = 1 << 24
#: Dtypes that weights may be stored as.
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Joined:
    """A tensor of OpenLM: tensors of our model, one behind the other along their rows.

    Attributes:
        name: in OpenLM's state dict.
        shape: of the whole.
        parts: (name in our model, its rows), in order.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Part:
    """Rows ``first`` to ``first + count`` of a tensor of the source."""

    tensor: SourceTensor
    first: int
    count: int


@dataclass(frozen=True)
class Target:
    """A tensor to write: parts of the source, one behind the other along their rows."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def dtype(self) -> str:
        """Of the source."""
        return self.parts[0].tensor.dtype


@dataclass(frozen=True)
class Mapped:
    """How a source becomes an anchor.

    Attributes:
        targets: everything that is there, in the order of the model.
        missing: names of OpenLM that the anchor needs and the source lacks.
        surplus: names that nothing is known of.
        ignored: buffers that are left out, and the second copy of tied embeddings.
    """

    targets: tuple[Target, ...]
    missing: tuple[str, ...]
    surplus: tuple[str, ...]
    ignored: tuple[str, ...]


def is_anchor_key(name: str) -> bool:
    """Whether a name without prefixes is one of OpenLM's state dict, a buffer included."""
    return bool(_ANCHOR_KEY.fullmatch(name) or _BUFFER_KEY.fullmatch(name))


def without_prefix(
    tensors: Mapping[str, SourceTensor], is_memory_key: Callable[[str], bool] = lambda _: False
) -> dict[str, SourceTensor]:
    """The tensors without the prefix ``model.`` of the Hugging Face wrappers.

    It is taken off where all of the anchor's names have it; names of the memory lose it too.

    Raises:
        FormatError: two names become one.
    """
    short = {name: name.removeprefix(_PREFIX) for name in tensors if name.startswith(_PREFIX)}
    if not any(map(is_anchor_key, short.values())) or any(map(is_anchor_key, tensors)):
        return dict(tensors)
    found: dict[str, SourceTensor] = {}
    for name, tensor in tensors.items():
        new = short.get(name, name)
        if not (is_anchor_key(new) or is_memory_key(new)):
            new = name
        if new in found:
            raise FormatError(
                f"{tensor.where}: there is {shown(new)} with and without the prefix "
                f"{_PREFIX!r}; save the checkpoint again with one of them"
            )
        found[new] = tensor
    return found


def to_openlm(args: ModelArgs) -> list[Joined]:
    """OpenLM's state dict, made of the weights of our model; tied heads appear twice.

    Shapes and rows are those of the tensors as they are stored: (out, in).
    """
    d, f = args.hidden_size, args.intermediate_size
    width = args.num_attention_heads * args.head_dim
    found: list[Joined] = []

    def matrix(name: str, columns: int, *parts: tuple[str, int]) -> None:
        rows = tuple((f"{part}.weight", count) for part, count in parts)
        shape = (sum(count for _, count in parts), columns)
        found.append(Joined(f"{name}.weight", shape, rows))

    def norm(name: str, ours: str, size: int) -> None:
        for part in PARAMETERS[args.norm_type]:
            found.append(Joined(f"{name}.{part}", (size,), ((f"{ours}.{part}", size),)))

    matrix("tok_embeddings", d, ("model.embed_tokens", args.vocab_size))
    if args.post_embed_norm:
        norm("post_embed_norm", "model.post_embed_norm", d)
    for n in range(args.num_hidden_layers):
        theirs, ours = f"layers.{n}", f"model.layers.{n}"
        attention = f"{ours}.self_attn"
        norm(f"{theirs}.attention_norm", f"{ours}.input_layernorm", d)
        matrix(
            f"{theirs}.attention.in_proj", d,
            *((f"{attention}.{name}_proj", width) for name in "qkv"),
        )  # fmt: skip
        matrix(f"{theirs}.attention.out_proj", width, (f"{attention}.o_proj", d))
        if args.qk_norm:
            norm(f"{theirs}.attention.q_norm", f"{attention}.q_norm", width)
            norm(f"{theirs}.attention.k_norm", f"{attention}.k_norm", width)
        norm(f"{theirs}.ffn_norm", f"{ours}.post_attention_layernorm", d)
        gate, up = f"{ours}.mlp.gate_proj", f"{ours}.mlp.up_proj"
        matrix(f"{theirs}.feed_forward.w12", d, (gate, f), (up, f))
        matrix(f"{theirs}.feed_forward.w3", f, (f"{ours}.mlp.down_proj", d))
    norm("norm", "model.norm", d)
    head = "model.embed_tokens" if args.tie_word_embeddings else "lm_head"
    matrix("output", d, (head, args.vocab_size))
    return found


def map_anchor(
    tensors: Mapping[str, SourceTensor],
    args: ModelArgs,
    is_memory_key: Callable[[str], bool] = lambda _: False,
) -> Mapped:
    """Find the weights of our model in a state dict of OpenLM.

    Args:
        tensors: by their names without prefixes (:func:`without_prefix`).
        is_memory_key: whether a name belongs to a memory, which is somebody else's business.

    Raises:
        FormatError: a tensor has another shape or dtype, or tied matrices differ.
    """
    wanted = to_openlm(args)
    targets: list[Target] = []
    missing: list[str] = []
    done: set[str] = set()
    for one in wanted:
        tensor = tensors.get(one.name)
        if tensor is None:
            missing.append(one.name)
            continue
        _check(tensor, one)
        start = 0
        for name, rows in one.parts:
            if name not in done:
                shape = (rows, *one.shape[1:])
                targets.append(Target(name, shape, (Part(tensor, start, rows),)))
                done.add(name)
            start += rows
    tied = args.tie_word_embeddings
    if tied and _EMBEDDING in tensors and _HEAD in tensors:
        _check_same(tensors[_EMBEDDING], tensors[_HEAD])
    elif tied and len({_EMBEDDING, _HEAD} & set(missing)) == 1:
        # One of the two is enough: safetensors files keep no second copy.
        missing = [name for name in missing if name not in (_EMBEDDING, _HEAD)]
    names = {one.name for one in wanted}
    rest = [name for name in tensors if name not in names and not is_memory_key(name)]
    ignored = [name for name in rest if _BUFFER_KEY.fullmatch(name)]
    return Mapped(
        tuple(targets),
        tuple(missing),
        tuple(name for name in rest if not _BUFFER_KEY.fullmatch(name)),
        (*ignored, *((_HEAD,) if tied and {_EMBEDDING, _HEAD} <= set(tensors) else ())),
    )


def openlm_config(args: ModelArgs) -> dict[str, Any]:
    """The model_config JSON of OpenLM for an anchor.

    OpenLM itself takes heads of hidden_dim // n_heads and the base 10,000, whatever it is told, and
    reads none of the last five keys; :func:`~.config.read_openlm_config` reads all.
    """
    return {
        "hidden_dim": args.hidden_size,
        "n_layers": args.num_hidden_layers,
        "n_heads": args.num_attention_heads,
        "seq_len": args.max_position_embeddings,
        "vocab_size": args.vocab_size,
        "post_embed_norm": args.post_embed_norm,
        "weight_tying": args.tie_word_embeddings,
        "model_norm": args.norm_type,
        "qk_norm": args.qk_norm,
        "positional_embedding_type": args.positional_embedding_type,
        "ffn_type": "swiglu",
        "norm_eps": args.norm_eps,
        "head_dim": args.head_dim,
        "intermediate_size": args.intermediate_size,
        "rope_theta": args.rope_theta,
        "rope_inv_freq_dtype": args.rope_inv_freq_dtype,
    }


def _check(tensor: SourceTensor, expected: Joined) -> None:
    if tensor.shape != expected.shape:
        raise FormatError(
            f"{tensor.where} has the shape {tensor.shape}; expected {expected.shape} by the "
            "config; check that the config is this checkpoint's"
        )
    if tensor.dtype not in DTYPES:
        raise FormatError(
            f"{tensor.where} is stored as {tensor.dtype}; expected {', '.join(DTYPES)}; save the "
            "checkpoint again in one of them"
        )


def _check_same(embedding: SourceTensor, head: SourceTensor) -> None:
    """Raise FormatError where tied matrices are not the same bytes."""
    same = embedding.dtype == head.dtype and embedding.shape == head.shape
    if same and list(embedding.boxes) == list(head.boxes):
        return  # the very same bytes of the file
    rows = max(1, _CHUNK // max(1, head.nbytes // head.shape[0])) if same else 1
    for first in range(0, head.shape[0], rows):
        if not same:
            break
        count = min(rows, head.shape[0] - first)
        left, right = embedding.read(first, count), head.read(first, count)
        same = left.tobytes() == right.tobytes()
    if not same:
        raise FormatError(
            f"{head.where} is not {_EMBEDDING}, although the config says weight_tying; correct "
            "the config, or save the checkpoint again"
        )
