"""The sizes and kinds of an OpenLM checkpoint: from its configs, checked against its tensors.

What shapes cannot tell (how many heads, which kind of norm has gains only) is never guessed: it is
read from a config, or asked for. Defaults are OpenLM's own; where one is taken that changes what is
computed, a notice says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_hiermem.anchors.norms import NORMS, PARAMETERS
from mlx_hiermem.anchors.openlm_args import HEAD_ROTARY, ModelArgs, check_kinds
from mlx_hiermem.anchors.rotary import FREQUENCY_DTYPES, INTERLEAVED
from mlx_hiermem.errors import ConfigError, FormatError, InputError
from mlx_hiermem.shapes import MAX_LAYERS, MAX_SIZE, AnchorShape, shown

from ..sources.tensor import SourceTensor
from .fields import SIZES, Fields, Said, read_fields
from .positions import Rotary, rotary_of

#: FFN types of OpenLM that are one formula, and those that are others.
SWIGLU = ("swiglu", "swiglu_torch")
OTHER_FFN = ("gelu", "gemma_geglu", "moe")

Tensors = Mapping[str, SourceTensor]


@dataclass(frozen=True)
class OpenLMConfig:
    """What is known of a checkpoint.

    Attributes:
        args: of the MLX model.
        notices: sentences for the report: what was assumed.
        files: the configs that were read.
    """

    args: ModelArgs
    notices: tuple[str, ...]
    files: tuple[Path, ...]


def read_openlm_config(
    source: Path,
    tensors: Tensors,
    *,
    model_config: Path | None = None,
    head_dim: int | None = None,
    rope_theta: float | None = None,
    rope_bf16: bool = False,
) -> OpenLMConfig:
    """Read what a checkpoint is.

    Args:
        source: the checkpoint, a file or folder; ``fields.read_fields`` says which configs count.
        tensors: under OpenLM's names, without prefixes (``weights.without_prefix``).
        model_config: a file that wins over those beside the checkpoint.
        head_dim: numbers of a head; None: what a config says, else hidden_dim / n_heads.
        rope_theta: base of the rotary embedding; None: from a config, or the checkpoint's buffer,
            else OpenLM's 10,000.
        rope_bf16: round inverse frequencies to bfloat16.

    Raises:
        ConfigError: something is missing, unknown, not supported, or contradicts the tensors.
        InputError: an option is out of range.
        FormatError: a file is damaged.
    """
    fields = read_fields(source, model_config)
    _refuse_others(fields, tensors)
    notices: list[str] = []
    sizes = {name: _needed(fields, name) for name in SIZES}
    heads, width = sizes["n_heads"], sizes["hidden_dim"]
    head_dim = _head_dim(fields, tensors, heads, width, head_dim)
    vocabulary = fields.size("vocab_size", MAX_SIZE - 1)
    if vocabulary is None:
        table = tensors.get("tok_embeddings.weight", tensors.get("output.weight"))
        if table is None or not table.shape:
            raise ConfigError(
                f"{fields.known_files()}: no vocab_size, and no tok_embeddings.weight in the "
                "checkpoint; add it to a --model-config"
            )
        vocabulary = table.shape[0]
    length = fields.size("seq_len", MAX_SIZE - 1, 2)
    if length is None:
        length = 2048
        notices.append("No config says seq_len; OpenLM's default of 2,048 tokens is taken.")
    norm = _norm(fields, tensors)
    rotary = fields.one_of("positional_embedding_type", tuple(INTERLEAVED))
    if rotary is None:
        rotary = "rotary"
        notices.append(
            "No config says positional_embedding_type; OpenLM's default, rotary, is taken."
        )
    qk_norm = _flag(fields, tensors, "qk_norm", norm, "layers.0.attention.q_norm")
    frequencies: Rotary = rotary_of(
        fields, tensors, rotary, head_dim, norm if qk_norm else None,
        theta=rope_theta, rounded=rope_bf16,
    )  # fmt: skip
    notices += frequencies.notices
    try:
        args = ModelArgs(
            hidden_size=width,
            num_hidden_layers=sizes["n_layers"],
            intermediate_size=_ffn_width(fields, tensors),
            num_attention_heads=heads,
            head_dim=head_dim,
            vocab_size=vocabulary,
            norm_eps=fields.positive("norm_eps") or 1e-5,
            rope_theta=frequencies.theta,
            qk_norm=qk_norm,
            tie_word_embeddings=_tied(fields, tensors),
            max_position_embeddings=length,
            norm_type=norm,
            post_embed_norm=_flag(fields, tensors, "post_embed_norm", norm, "post_embed_norm"),
            positional_embedding_type=rotary,
            rope_inv_freq_dtype=FREQUENCY_DTYPES[frequencies.rounded],
        )
        AnchorShape.of(args)
    except ConfigError as error:
        raise ConfigError(f"{fields.known_files()}: {error}") from None
    return OpenLMConfig(args, tuple(notices), tuple(fields.files))


def _refuse_others(fields: Fields, tensors: Tensors) -> None:
    """Raise ConfigError for what OpenLM has and we have not, by its name."""
    rotary = fields.said.get("positional_embedding_type")
    if rotary is not None and rotary.value == HEAD_ROTARY:
        try:
            check_kinds({"positional_embedding_type": HEAD_ROTARY})
        except ConfigError as error:
            raise ConfigError(f"{rotary.where}: {error}") from None
    fields.one_of("ffn_type", (*SWIGLU, *OTHER_FFN))
    ffn = fields.said.get("ffn_type")
    if ffn is None:
        for key, kind in (
            ("layers.0._ff_w1.weight", "gelu"),
            ("layers.0.feed_forward.0.weight", "gelu"),
            ("layers.0.feed_forward.gate_proj.weight", "gemma_geglu"),
        ):
            if key in tensors:
                ffn = Said(kind, f"{tensors[key].where}, which says that ffn_type")
    if ffn is not None and ffn.value in OTHER_FFN:
        ffn.refuse(
            "an FFN that is not supported, because memories widen a gated one; known are "
            + ", ".join(SWIGLU)
        )
    experts = fields.said.get("moe_freq")
    if experts is not None and experts.value != 0:
        experts.refuse("mixtures of experts (MoE) are not supported; expected 0")
    attention = fields.said.get("attn_name")
    if attention is not None and attention.value == "custom_attn":
        alpha = fields.said.get("attn_seq_scalar_alpha")
        scalar = fields.said.get("attn_seq_scalar")
        activation = fields.said.get("attn_activation")
        plain = (alpha is None or alpha.value == 0) or (scalar is None or scalar.value == "none")
        if activation is None or activation.value != "softmax" or not plain:
            attention.refuse(
                "its attention is not a plain softmax "
                f"(attn_activation {shown(activation and activation.value)}, attn_seq_scalar "
                f"{shown(scalar and scalar.value)}), which is not supported"
            )


def _needed(fields: Fields, name: str) -> int:
    found = fields.size(name, MAX_LAYERS if name == "n_layers" else MAX_SIZE - 1)
    if found is None:
        raise ConfigError(
            f"{fields.known_files()}: no {name}; expected hidden_dim, n_layers and n_heads, which "
            "shapes do not tell; give --model-config with a JSON of OpenLM's model_configs"
        )
    return found


def _head_dim(fields: Fields, tensors: Tensors, heads: int, width: int, given: int | None) -> int:
    """Numbers of a head, which the first layer's in_proj has to agree with.

    Without a config OpenLM takes hidden_dim // n_heads, also where a rest is left (open_lm_87m).
    """
    if given is not None and (type(given) is not int or not 1 <= given < MAX_SIZE):
        raise InputError(f"--head-dim {shown(given)}: expected a whole number above 0")
    said = fields.size("head_dim", MAX_SIZE - 1)
    found = given or said or width // heads
    origin = "--head-dim" if given else fields.said["head_dim"].where if said else (
        f"{fields.said['hidden_dim'].where} {width} / {fields.said['n_heads'].where} {heads}"
    )  # fmt: skip
    name = "layers.0.attention.in_proj.weight"
    in_proj = tensors.get(name)
    if in_proj is not None and in_proj.shape and in_proj.shape[0] != 3 * heads * found:
        raise ConfigError(
            f"{in_proj.where} has {in_proj.shape[0]} rows; expected 3 * {heads} heads * {found} "
            f"({origin}); give the size of a head with --head-dim"
        )
    if in_proj is None and not given and not said and width % heads:
        raise ConfigError(
            f"{origin} leaves a rest, and the checkpoint has no {name} to tell the size of a head; "
            "give --head-dim"
        )
    if found < 1:
        raise ConfigError(f"{origin} is less than 1 number for a head; correct the config")
    return found


def _ffn_width(fields: Fields, tensors: Tensors) -> int:
    said = fields.size("intermediate_size", MAX_SIZE - 1)
    w12 = tensors.get("layers.0.feed_forward.w12.weight")
    w3 = tensors.get("layers.0.feed_forward.w3.weight")
    if w12 is None or w3 is None:
        raise ConfigError(
            f"{fields.known_files()}: the checkpoint has no layers.0.feed_forward.w12.weight and "
            "w3.weight, so it is none of OpenLM with a SwiGLU; expected the names of its state dict"
        )
    rows = w12.shape[0] if len(w12.shape) == 2 else 0
    found = w3.shape[1] if len(w3.shape) == 2 else 0
    if not rows or rows != 2 * found:
        raise FormatError(
            f"{w12.where} has the shape {w12.shape} and w3.weight {w3.shape}; expected (2h, d) and "
            "(d, h)"
        )
    if said is not None and said != found:
        fields.said["intermediate_size"].refuse(f"but {w12.where} is for {found}; correct one")
    return found


def _norm(fields: Fields, tensors: Tensors) -> str:
    found = fields.one_of("model_norm", tuple(NORMS))
    if found is not None:
        return found
    has = tuple(part for part in ("weight", "bias") if f"norm.{part}" in tensors)
    fitting = [kind for kind, parts in PARAMETERS.items() if parts == has]
    formulas = {kind.replace("_lp_", "_").replace("lp_", "default_") for kind in fitting}
    if len(formulas) == 1:  # the lp kinds have the formula of the others
        return formulas.pop()
    raise ConfigError(
        f"{fields.known_files()}: no model_norm, and the checkpoint's norms "
        f"({' and '.join(has) or 'nothing'}) fit {', '.join(fitting) or 'no kind'}; add it to a "
        "--model-config"
    )


def _flag(fields: Fields, tensors: Tensors, name: str, norm: str, key: str) -> bool:
    """Whether a norm is there that a config may leave unsaid."""
    found = fields.flag(name)
    if found is not None:
        return found
    if not PARAMETERS[norm]:
        raise ConfigError(
            f"{fields.known_files()}: no {name}, and a norm without numbers leaves no trace in the "
            "checkpoint; add it to a --model-config"
        )
    return f"{key}.weight" in tensors


def _tied(fields: Fields, tensors: Tensors) -> bool:
    found = fields.flag("weight_tying")
    return "output.weight" not in tensors if found is None else found
