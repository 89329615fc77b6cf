"""OpenLM's forward in torch, from a state dict under OpenLM's own names, with memories.

Float32 throughout; written from the formulas: section 3 and appendix A of the paper; model.py,
norms.py and positional_embedding/ of mlfoundations/open_lm; docs/format.md for what a memory does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from mlx_hiermem.anchors.openlm_args import ModelArgs
from mlx_hiermem.bank.dtypes import from_storage

from ..sources.tensor import SourceTensor
from . import Memory, import_torch

if TYPE_CHECKING:
    from torch import Tensor

#: What B A x is multiplied with in a LoRA memory.
ALPHA = 2.0


class OpenLMReference:
    """An OpenLM checkpoint as it is, one sequence at a time.

    Args:
        tensors: by OpenLM's names without prefixes; read when this is made, into float32.
        args: its sizes and kinds.
        kind: of the memories that it will be given.

    Raises:
        ConfigError: torch is not installed.
        FormatError: a file cannot be read.
    """

    def __init__(
        self, tensors: Mapping[str, SourceTensor], args: ModelArgs, kind: str | None = None
    ) -> None:
        self._torch = import_torch()
        self._args, self._kind = args, kind
        self._weights: dict[str, Tensor] = {
            name: self._torch.from_numpy(from_storage(tensor.read(), tensor.dtype))
            for name, tensor in tensors.items()
            if name.startswith(("tok_embeddings.", "output.", "norm.", "post_embed_norm."))
            or (name.startswith("layers.") and ".memory." not in name)
        }

    def logits(self, tokens: np.ndarray, memory: Memory | None = None) -> np.ndarray:
        """(T,) tokens -> (T, V) float32."""
        torch, args = self._torch, self._args
        given = {
            layer: [torch.as_tensor(np.asarray(matrix, np.float32)) for matrix in matrices]
            for layer, matrices in (memory or {}).items()
        }
        embedding = self._weights.get("tok_embeddings.weight")
        head = self._weights.get("output.weight")
        if args.tie_word_embeddings:
            embedding = head = head if embedding is None else embedding
        assert embedding is not None and head is not None, "both are there, or one that is tied"
        with torch.no_grad():
            x = embedding[torch.as_tensor(np.asarray(tokens, np.int64))]
            if args.post_embed_norm:
                x = self._norm("post_embed_norm", x)
            angles = self._angles(len(x))
            for n in range(args.num_hidden_layers):
                mine = given.get(n)
                x = x + self._attention(
                    n, self._norm(f"layers.{n}.attention_norm", x), angles, mine
                )
                x = x + self._ffn(n, self._norm(f"layers.{n}.ffn_norm", x), mine)
            return (self._norm("norm", x) @ head.T).numpy()

    def _norm(self, name: str, x: Tensor) -> Tensor:
        eps = self._args.norm_eps
        if self._args.norm_type == "rms_norm":
            out = x * self._torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
        else:
            out = x - x.mean(-1, keepdim=True)
            out = out * self._torch.rsqrt((out * out).mean(-1, keepdim=True) + eps)
        if (gain := self._weights.get(f"{name}.weight")) is not None:
            out = out * gain
        bias = self._weights.get(f"{name}.bias")
        return out if bias is None else out + bias

    def _angles(self, length: int) -> Tensor | None:
        """(T, hd / 2) float64; None without a positional embedding."""
        torch, args = self._torch, self._args
        if args.positional_embedding_type == "none":
            return None
        exponents = torch.arange(0, args.head_dim, 2, dtype=torch.float64) / args.head_dim
        frequencies = (args.rope_theta**-exponents).float()
        if args.rope_inv_freq_dtype == "bfloat16":
            frequencies = frequencies.bfloat16()
        return torch.outer(torch.arange(length, dtype=torch.float64), frequencies.double())

    def _rotate(self, x: Tensor, angles: Tensor | None) -> Tensor:
        """(T, heads, hd), each pair of numbers turned by its angle."""
        if angles is None:
            return x
        torch = self._torch
        cos, sin = angles.cos().float()[:, None], angles.sin().float()[:, None]
        if self._args.positional_embedding_type == "llama_rotary":
            left, right = x[..., ::2], x[..., 1::2]
        else:
            left, right = x.chunk(2, -1)
        turned = (left * cos - right * sin, left * sin + right * cos)
        if self._args.positional_embedding_type == "llama_rotary":
            return torch.stack(turned, -1).flatten(-2)
        return torch.cat(turned, -1)

    def _attention(
        self, n: int, x: Tensor, angles: Tensor | None, memory: list[Tensor] | None
    ) -> Tensor:
        torch, args = self._torch, self._args
        name = f"layers.{n}.attention"
        heads, size = args.num_attention_heads, args.head_dim
        q, k, v = (x @ self._weights[f"{name}.in_proj.weight"].T).chunk(3, -1)
        if memory is not None and self._kind == "lora_qk":
            a_q, b_q, a_k, b_k = memory
            q = q + ALPHA * (x @ a_q.T) @ b_q
            k = k + ALPHA * (x @ a_k.T) @ b_k
        if memory is not None and self._kind == "lora_vo":
            v = v + ALPHA * (x @ memory[0].T) @ memory[1]
        if args.qk_norm:
            q, k = self._norm(f"{name}.q_norm", q), self._norm(f"{name}.k_norm", k)
        q, k, v = (one.reshape(len(x), heads, size) for one in (q, k, v))
        scores = torch.einsum("qhd,khd->hqk", self._rotate(q, angles), self._rotate(k, angles))
        later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        weights = (scores * size**-0.5).masked_fill(later, -torch.inf).softmax(-1)
        out = torch.einsum("hqk,khd->qhd", weights, v)
        if memory is not None and self._kind == "kv":
            keys, values = (one.reshape(-1, heads, size) for one in memory)
            weights = (torch.einsum("qhd,rhd->hqr", q, keys) * size**-0.5).softmax(-1)
            out = out + torch.einsum("hqr,rhd->qhd", weights, values)
        out = out.reshape(len(x), heads * size)
        result = out @ self._weights[f"{name}.out_proj.weight"].T
        if memory is not None and self._kind == "lora_vo":
            result = result + ALPHA * (out @ memory[2].T) @ memory[3]
        return result

    def _ffn(self, n: int, x: Tensor, memory: list[Tensor] | None) -> Tensor:
        torch = self._torch
        name = f"layers.{n}.feed_forward"
        w1, w2 = self._weights[f"{name}.w12.weight"].chunk(2, 0)
        w3 = self._weights[f"{name}.w3.weight"]
        if memory is not None and self._kind == "ffn":
            m1, m2, m3 = memory
            w1, w2, w3 = torch.cat([w1, m1]), torch.cat([w2, m2]), torch.cat([w3, m3.T], 1)
        gate, up = x @ w1.T, x @ w2.T
        if memory is not None and self._kind == "lora_ffn":
            gate = gate + ALPHA * (x @ memory[0].T) @ memory[1]
            up = up + ALPHA * (x @ memory[2].T) @ memory[3]
        inner = gate * torch.sigmoid(gate) * up
        out = inner @ w3.T
        if memory is not None and self._kind == "lora_ffn":
            out = out + ALPHA * (inner @ memory[4].T) @ memory[5]
        return out
