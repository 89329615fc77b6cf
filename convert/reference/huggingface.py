"""transformers' own forward of a Hugging Face model, with memories put in by hooks.

Nothing in the model is changed: hooks widen what its linear layers give and take, so that its own
activation, norms and attention are used whatever they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_hiermem.errors import ConfigError, one_line

from . import Memory, import_torch

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

ALPHA = 2.0
_FFN = ("gate_proj", "up_proj", "down_proj")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
#: Of each LoRA kind the linear layers that it adapts.
_ADAPTED = {
    "lora_qk": ("q_proj", "k_proj"),
    "lora_vo": ("v_proj", "o_proj"),
    "lora_ffn": _FFN,
}
_QUERY_NORMS = ("q_norm", "q_layernorm", "query_layernorm")


class HuggingFaceReference:
    """A model as transformers runs it, in float32.

    Args:
        folder: with ``config.json`` and safetensors; nothing is downloaded, no code of it is run.
        kind: of the memories that it will be given.

    Raises:
        ConfigError: torch is not installed, or transformers cannot load the model.
    """

    def __init__(self, folder: Path, kind: str | None = None) -> None:
        self._torch = import_torch()
        self._folder, self._kind = folder, kind
        from transformers import AutoModelForCausalLM

        try:
            self._model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=self._torch.float32,
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,  # never a pickle
                attn_implementation="eager",
            ).eval()
        except Exception as error:  # code of any architecture, on files of anybody
            reason = one_line(f"{type(error).__name__}: {error}")
            raise ConfigError(
                f"{folder}: transformers cannot load the original ({reason}); convert without "
                "--verify"
            ) from error

    def logits(self, tokens: np.ndarray, memory: Memory | None = None) -> np.ndarray:
        """(T,) tokens -> (T, V) float32.

        Raises:
            ConfigError: a layer has no place for this kind of memory.
        """
        torch = self._torch
        with ExitStack() as hooks, torch.no_grad():
            for index, matrices in (memory or {}).items():
                given = [torch.as_tensor(np.asarray(one, np.float32)) for one in matrices]
                for hook in self._hooks(self._layers()[index], given):
                    hooks.enter_context(_removed(hook))
            rows = torch.as_tensor(np.asarray(tokens, np.int64))[None]
            return self._model(rows, use_cache=False).logits[0].float().numpy()

    def _layers(self) -> Any:
        return self._model.get_decoder().layers

    def _part(self, layer: Module, names: tuple[str, ...]) -> Module:
        for child in layer.children():
            if all(hasattr(child, name) for name in names):
                return child
        raise ConfigError(
            f"{self._folder}: a layer of transformers' {type(self._model).__name__} has no part "
            f"with {', '.join(names)}, so a memory of kind {self._kind} cannot be compared; "
            "convert without --verify"
        )

    def _hooks(self, layer: Module, memory: list[Tensor]) -> Iterator[Any]:
        """Put one layer's memory in; yields the handles that take it out again."""
        if self._kind == "ffn":
            yield from _widen(self._torch, self._part(layer, _FFN), *memory)
        elif self._kind == "kv":
            yield from self._attend(self._part(layer, _ATTENTION), *memory)
        elif self._kind in _ADAPTED:
            names = _ADAPTED[self._kind]
            part = self._part(layer, _FFN if self._kind == "lora_ffn" else _ATTENTION)
            for name, a, b in zip(names, memory[::2], memory[1::2], strict=True):
                yield getattr(part, name).register_forward_hook(_adapter(a, b))
        else:
            raise ConfigError(f"memories of kind {self._kind} cannot be compared with torch")

    def _attend(self, attention: Module, keys: Tensor, values: Tensor) -> Iterator[Any]:
        """Add each head's attention to the pairs to what the output projection takes."""
        torch = self._torch
        config = self._model.config.get_text_config()
        heads = config.num_attention_heads
        shared = getattr(config, "num_key_value_heads", None) or heads
        size = values.shape[1] // shared
        keys, values = (
            one.reshape(-1, shared, size).repeat_interleave(heads // shared, 1)
            for one in (keys, values)
        )
        scale = getattr(attention, "scaling", size**-0.5)
        seen: dict[str, Tensor] = {}

        def remember(_module: Module, _inputs: Any, out: Tensor) -> None:
            seen["queries"] = _normed(attention, out.reshape(*out.shape[:2], heads, size))

        def add(_module: Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            scores = torch.einsum("bthd,rhd->bhtr", seen.pop("queries"), keys) * scale
            extra = torch.einsum("bhtr,rhd->bthd", scores.softmax(-1), values)
            return (inputs[0] + extra.reshape(inputs[0].shape), *inputs[1:])

        yield attention.q_proj.register_forward_hook(remember)
        yield attention.o_proj.register_forward_pre_hook(add)


def _normed(attention: Module, queries: Tensor) -> Tensor:
    """Queries (B, T, heads, size) behind the attention's query norm, if it has one."""
    norm = next((getattr(attention, n) for n in _QUERY_NORMS if hasattr(attention, n)), None)
    if norm is None:
        return queries
    gain = getattr(norm, "weight", None)
    if gain is None:  # a norm of its own for each head, which wants heads before time
        return norm(queries.transpose(1, 2)).transpose(1, 2)
    if gain.numel() == queries.shape[2] * queries.shape[3] and gain.ndim == 1:
        return norm(queries.flatten(2)).reshape(queries.shape)
    return norm(queries)


def _adapter(a: Tensor, b: Tensor) -> Callable[..., Tensor]:
    def add(_module: Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out + ALPHA * (inputs[0] @ a.T) @ b

    return add


def _widen(torch: Any, ffn: Module, m1: Tensor, m2: Tensor, m3: Tensor) -> Iterator[Any]:
    """Let gate and up give R numbers more, and take those off again before down."""
    inner: dict[str, Tensor] = {}

    def widened(rows: Tensor) -> Callable[..., Tensor]:
        def hook(_module: Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
            return torch.cat([out, inputs[0] @ rows.T], -1)

        return hook

    def take(_module: Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        width = inputs[0].shape[-1] - len(m3)
        inner["memory"] = inputs[0][..., width:]
        return (inputs[0][..., :width], *inputs[1:])

    def add(_module: Module, _inputs: Any, out: Tensor) -> Tensor:
        return out + inner.pop("memory") @ m3

    yield ffn.gate_proj.register_forward_hook(widened(m1))
    yield ffn.up_proj.register_forward_hook(widened(m2))
    yield ffn.down_proj.register_forward_pre_hook(take)
    yield ffn.down_proj.register_forward_hook(add)


@contextmanager
def _removed(hook: Any) -> Iterator[None]:
    try:
        yield
    finally:
        hook.remove()
