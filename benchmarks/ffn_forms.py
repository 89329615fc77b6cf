"""Two forms of an FFN memory in decoding: a branch beside the FFN, or wider matrices.

``python -m benchmarks.ffn_forms [--smoke] [--json FILE]``. The FFNs of the paper's 160M anchor, one
token at a time, with the memory of (256,64,16,0). Rows are times ÷ that of the FFNs without memory:

- ``forms.branch``: what the package does (``kinds/ffn.py``): M1 and M2 are one product;
- ``forms.branch_of_three``: M1 and M2 are a product each;
- ``forms.widened``: the paper's concatenation, the block's rows in spare rows of the matrices;
- ``...@compiled``: the same under ``mx.compile``, with the weights as arguments;
- ``forms.write``: copying a fetched block into the spare rows, which a branch does without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mlx_hiermem.backend import backend_name, preload_blas

preload_blas()

import mlx.core as mx  # noqa: E402  (after the BLAS)
from mlx_lm.models.activations import swiglu  # noqa: E402

from mlx_hiermem.anchors import openlm  # noqa: E402
from mlx_hiermem.kinds import ffn  # noqa: E402

from .harness import Row, interleave, main, ratio  # noqa: E402

NAME = "ffn_forms"

#: d, f, R and layers: the paper's, and of a smoke run.
PAPER, SMOKE = (512, 2048, 336, 35), (32, 64, 8, 2)

#: The weights of one layer in one form.
Weights = tuple[mx.array, ...]


def plain(x: mx.array, gate: mx.array, up: mx.array, down: mx.array) -> mx.array:
    """An FFN, with spare rows or without."""
    return swiglu(x @ gate.T, x @ up.T) @ down.T


def three(x: mx.array, gate: mx.array, up: mx.array, down: mx.array, *memory: mx.array) -> mx.array:
    """A branch of three products beside it."""
    m1, m2, m3 = memory
    return plain(x, gate, up, down) + swiglu(x @ m1.T, x @ m2.T) @ m3


def measure(smoke: bool) -> list[Row]:
    """All rows."""
    width, inner, rank, layers = SMOKE if smoke else PAPER
    dtype = mx.float32 if backend_name() == "cpu" else mx.bfloat16
    mx.random.seed(0)

    def matrix(rows: int, columns: int) -> mx.array:
        # Small, since nothing normalises what goes from one FFN into the next.
        return (0.3 * columns**-0.5 * mx.random.normal((rows, columns))).astype(dtype)

    args = openlm.ModelArgs(width, 1, inner, 1, 8, vocab_size=2)
    activation = ffn.activation_of(openlm.MLP(args))

    def branch(x: mx.array, gate: mx.array, up: mx.array, down: mx.array, *memory) -> mx.array:
        m12, m3 = memory
        return ffn.with_branch(plain(x, gate, up, down), x, m12, m3, activation)

    anchor, one, fused, wide = [], [], [], []
    for _ in range(layers):
        own = matrix(inner, width), matrix(inner, width), matrix(width, inner)
        m1, m2, m3 = (matrix(rank, width) for _ in range(3))
        anchor.append(own)
        one.append((*own, m1, m2, m3))
        fused.append((*own, mx.concatenate([m1, m2])[None], m3[None]))
        wide.append(
            (
                mx.concatenate([own[0], m1]),
                mx.concatenate([own[1], m2]),
                mx.concatenate([own[2], m3.T], axis=1),
            )
        )
    mx.eval(anchor, one, fused, wide)
    forms: dict[str, tuple[Callable, Sequence[Weights]]] = {
        "anchor": (plain, anchor),
        "branch": (branch, fused),
        "branch_of_three": (three, one),
        "widened": (plain, wide),
    }
    forms |= {f"{name}@compiled": (mx.compile(f), weights) for name, (f, weights) in forms.items()}
    x = mx.random.normal((1, 1, width)).astype(dtype)
    mx.eval(x)

    def token(form: Callable, weights: Sequence[Weights]) -> mx.array:
        h = x
        for layer in weights:
            h = h + form(h, *layer)
        mx.eval(h)
        return h

    expected = token(*forms["widened"]).astype(mx.float32)
    for name, form in forms.items():
        if not name.startswith("anchor"):
            error = (
                mx.abs(token(*form).astype(mx.float32) - expected).max() / mx.abs(expected).max()
            )
            assert error.item() < (1e-4 if dtype == mx.float32 else 5e-2), (name, error)
    tasks = {name: lambda form=form: token(*form) for name, form in forms.items()}
    tasks["write"] = writing(wide, one, inner)
    times = interleave(tasks, 3 if smoke else 60, warmup=2)
    about = (
        f"{layers} layers, d {width}, f {inner}, R {rank}, {dtype} on {backend_name()}; bound by "
        f"bytes {1 + rank / inner:.3f}"
    )
    return [ratio(f"forms.{name}", times, name, "anchor", "", about) for name in list(tasks)[1:]]


def writing(
    wide: Sequence[Weights], memories: Sequence[Weights], inner: int
) -> Callable[[], object]:
    """Copies the memory into the spare rows, and columns, of all layers; in new arrays, as MLX has
    it where nothing else refers to the old ones."""
    target = [list(layer) for layer in wide]

    def write() -> None:
        for layer, memory in zip(target, memories, strict=True):
            m1, m2, m3 = memory[3:]
            layer[0][inner:], layer[1][inner:] = m1, m2
            layer[2][:, inner:] = m3.T
        mx.eval(target)

    return write


if __name__ == "__main__":
    main(NAME, measure)
