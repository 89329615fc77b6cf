"""What every kind of memory has to do, on anchors that differ in what matters."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import batch_generate, generate_step

from mlx_hiermem import kinds
from mlx_hiermem.config import KINDS, AnchorShape, MemoryConfig
from mlx_hiermem.errors import ConfigError, InputError
from mlx_hiermem.memories import attach, detach
from mlx_hiermem.memories.recompute import recompute_layers
from tests.kinds.anchors import ANCHORS, LAYERS, VOCAB, make

RANKS = (4, 2)

every_kind = pytest.mark.parametrize("kind", KINDS)
every_anchor = pytest.mark.parametrize("name", ANCHORS)


def config(kind: str, layers: tuple[int, ...] | None = None) -> MemoryConfig:
    return MemoryConfig(RANKS, kind=kind, branching=2, layers=layers)


def tokens(rows: int = 2, length: int = 9) -> mx.array:
    return mx.array(np.random.default_rng(0).integers(0, VOCAB, (rows, length)))


def memories(model, count: int, seed: int = 0) -> mx.array:
    """Memories whose effect is plain to see, (count, N)."""
    rng = np.random.default_rng(seed)
    size = model.config.fetch_size(model)
    return mx.array(0.7 * rng.standard_normal((count, size), dtype=np.float32))


def close(left: mx.array, right: mx.array) -> None:
    np.testing.assert_allclose(np.array(left), np.array(right), rtol=0, atol=2e-4)


def effect(left: mx.array, right: mx.array) -> float:
    return mx.abs(left - right).max().item()


@every_kind
@every_anchor
def test_start_values_and_memory_off_are_the_bare_anchor(kind, name):
    anchor = make(name)
    bare = anchor(tokens())
    model = attach(anchor, config(kind))
    start = model.join([mx.array(model.init_block(level, 1))[None] for level in (1, 2)])
    assert mx.abs(start).max() > 0
    for memory in (start, None, mx.zeros_like(start), mx.concatenate([start, 0 * start])):
        assert mx.array_equal(model(tokens(), memory=memory), bare)
    cache = model.make_cache(start)
    assert mx.array_equal(
        model(tokens(1), cache=cache), anchor(tokens(1), cache=make_cache(anchor))
    )
    assert effect(model(tokens(), memory=memories(model, 1)), bare) > 0.05


def make_cache(anchor: nn.Module) -> list:
    from mlx_lm.models.cache import make_prompt_cache

    return make_prompt_cache(anchor)


@every_kind
@every_anchor
def test_a_batch_of_memories_equals_single_runs(kind, name):
    model = attach(make(name), config(kind))
    given = memories(model, 3)
    given = mx.concatenate([given[:2], mx.zeros_like(given[:1])])  # the last one has none
    batch = model(tokens(3), memory=given)
    for row in range(3):
        one = slice(row, row + 1)
        memory = None if row == 2 else given[one]
        close(batch[one], model(tokens(3)[one], memory=memory))
    assert effect(batch[:1], model(tokens(3)[:1], memory=given[1:2])) > 0.05
    close(model(tokens(3), memory=given[:1]), model(tokens(3), memory=mx.repeat(given[:1], 3, 0)))


@every_kind
@every_anchor
def test_decoding_token_by_token_gives_what_the_whole_gives(kind, name):
    model = attach(make(name), config(kind))
    memory = memories(model, 1)
    whole = model(tokens(1), memory=memory)
    cache = model.make_cache(memory)
    pieces = [model(tokens(1)[:, :4], cache=cache)]
    pieces += [model(tokens(1)[:, t : t + 1], cache=cache) for t in range(4, 9)]
    close(mx.concatenate(pieces, axis=1), whole)


class Tokenizer:
    eos_token_ids: tuple[int, ...] = ()
    eos_token_id = -1

    def decode(self, tokens):
        return str(tokens)


@every_kind
@every_anchor
def test_mlx_lms_batches_hold_a_memory_for_each_sequence(kind, name):
    model = attach(make(name), config(kind))
    given = [memories(model, 1, seed) for seed in (1, 2)] + [None]
    prompts = [tokens(1, length)[0].tolist() for length in (3, 6, 4)]
    found = batch_generate(
        model, Tokenizer(), prompts, max_tokens=6, return_token_ids=True,
        prompt_caches=[model.make_cache(memory) for memory in given],
    ).token_ids  # fmt: skip
    for prompt, memory, answer in zip(prompts, given, found, strict=True):
        steps = generate_step(
            mx.array(prompt), model, max_tokens=6, prompt_cache=model.make_cache(memory)
        )
        assert [token for token, _ in steps] == answer


@every_kind
@every_anchor
def test_recomputing_layers_leaves_the_gradients(kind, name):
    def gradients(recompute: bool):
        model = attach(make(name), config(kind, layers=(0, 2)))
        if recompute:
            recompute_layers(model)
        given = model.matrices(memories(model, 2))
        loss = mx.value_and_grad(lambda memory: model(tokens(), memory=memory).square().mean())
        return [array for _, array in tree_flatten(loss(given)[1])]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        assert mx.abs(plain).max() > 0
        np.testing.assert_allclose(np.array(plain), np.array(again), rtol=1e-4, atol=1e-7)


@every_kind
def test_gradients_are_those_of_differences(kind):
    model = attach(make("llama"), config(kind, layers=(1,)))
    memory = memories(model, 1)
    along = memories(model, 1, seed=5)

    def loss(memory: mx.array) -> mx.array:
        return model(tokens(), memory=memory).square().mean()

    slope = (mx.grad(loss)(memory) * along).sum().item()
    step = 1e-3
    difference = (loss(memory + step * along) - loss(memory - step * along)).item() / (2 * step)
    assert difference == pytest.approx(slope, rel=0.02)


@every_kind
def test_the_anchor_comes_back_as_it_was(kind):
    anchor = make("qwen3")
    bare = anchor(tokens())
    before = [(path, type(module)) for path, module in anchor.named_modules()]
    names = [path for path, _ in tree_flatten(anchor.parameters())]
    model = attach(anchor, config(kind))
    model(tokens(), memory=memories(model, 1))
    assert [path for path, _ in tree_flatten(anchor.parameters())] == names
    with pytest.raises(ConfigError, match="has a memory already"):
        attach(anchor, config(kind))
    assert detach(model) is anchor
    assert [(path, type(module)) for path, module in anchor.named_modules()] == before
    assert mx.array_equal(anchor(tokens()), bare)
    attach(anchor, config(kind))


@every_kind
@pytest.mark.parametrize(
    "how", [(32, 8, "affine"), (32, 4, "affine"), (32, 4, "mxfp4")], ids=["8", "4", "mxfp4"]
)
def test_a_quantised_anchor_takes_memories_untouched(kind, how):
    anchor = make("llama")
    group_size, bits, mode = how

    def fits(_, module: nn.Module) -> bool:  # the FFN's inner width is no multiple of 32
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0

    nn.quantize(anchor, group_size, bits, mode=mode, class_predicate=fits)
    assert isinstance(anchor.layers[0].mlp.gate_proj, nn.QuantizedLinear)
    bare = anchor(tokens())
    weights = dict(tree_flatten(anchor.parameters()))
    model = attach(anchor, config(kind))
    assert mx.array_equal(model(tokens()), bare)
    for dtype in (mx.float32, mx.bfloat16):
        memory = memories(model, 1).astype(dtype)
        logits = model(tokens(), memory=memory)
        assert logits.dtype == bare.dtype and effect(logits, bare) > 0.05
    after = dict(tree_flatten(anchor.parameters()))
    assert weights.keys() == after.keys()
    assert all(mx.array_equal(weights[key], after[key]) for key in weights)


@every_kind
def test_a_batch_of_another_size_is_refused(kind):
    model = attach(make("llama"), config(kind))
    with pytest.raises(InputError, match="a batch of 2 is given 3 memories"):
        model(tokens(2), memory=memories(model, 3))


@every_kind
def test_a_kind_says_how_large_it_is(kind):
    """The rows that are drawn, those that are counted and those that are handed over agree."""
    shape = AnchorShape.of(make("llama"))
    one = kinds.find(kind)
    widths = one.row_widths(shape)
    drawn = one.start(5, shape, np.random.default_rng(0))
    assert [matrix.shape for matrix in drawn] == [(5, width) for width in widths]
    assert all(matrix.dtype == np.float32 for matrix in drawn)
    assert sum(one.groups) == len(widths) == len(set(one.matrices)) == len(one.matrices)
    assert config(kind).fetch_size(shape) == LAYERS * sum(RANKS) * sum(widths)


def test_sizes_of_the_papers_formulas():
    """Section 3 of the paper, for the 160M anchor; A is the width of all heads together."""
    shape = AnchorShape(35, 512, 2048, 12, 32)
    L, d, f, A = 35, 512, 2048, 12 * 32
    expected = {
        "ffn": 3 * L * d,
        "lora_qk": 2 * L * (d + A),
        "lora_vo": 2 * L * (d + A),
        "lora_ffn": 3 * L * (d + f),
        "kv": 2 * L * A,
    }
    assert set(expected) <= set(KINDS)
    for kind, numbers in expected.items():
        assert MemoryConfig((10, 3), kind=kind).fetch_size(shape) == 13 * numbers


@pytest.mark.parametrize("kind", ["kv", "lora_qk", "lora_vo"])
def test_heads_that_share_keys_make_their_matrices_smaller(kind):
    many, few = AnchorShape(1, 32, 48, 4, 8), AnchorShape(1, 32, 48, 4, 8, 2)
    assert sum(kinds.find(kind).row_widths(few)) < sum(kinds.find(kind).row_widths(many))
