"""Memories on an anchor: OpenLM's and mlx-lm's own llama, one memory or one for each sequence."""

from __future__ import annotations

import threading
from dataclasses import asdict, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama, starcoder2
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

from mlx_hiermem.anchors import openlm
from mlx_hiermem.config import AnchorShape, MemoryConfig
from mlx_hiermem.errors import ConfigError
from mlx_hiermem.memories import MemoryModel, attach, detach

D, LAYERS, VOCAB = 32, 3, 40
CONFIG = MemoryConfig(ranks=(4, 2), branching=2)
R = sum(CONFIG.ranks)


def make_openlm() -> nn.Module:
    return openlm.Model(openlm.ModelArgs(D, LAYERS, 48, 2, 8, vocab_size=VOCAB))


def make_llama() -> nn.Module:
    return llama.Model(
        llama.ModelArgs(
            model_type="llama", hidden_size=D, num_hidden_layers=LAYERS, intermediate_size=48,
            num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, vocab_size=VOCAB,
        )
    )  # fmt: skip


@pytest.fixture(params=[make_openlm, make_llama], ids=["openlm", "llama"])
def anchor(request) -> nn.Module:
    mx.random.seed(0)
    model = request.param()
    mx.eval(model.parameters())
    return model


def tokens(rows: int = 2, length: int = 9) -> mx.array:
    return mx.array(np.random.default_rng(0).integers(0, VOCAB, (rows, length)))


def random_memory(batch: int, layers: int = LAYERS, seed: int = 0) -> mx.array:
    rng = np.random.default_rng(seed)
    return mx.array(rng.standard_normal((batch, layers * 3 * R * D), dtype=np.float32))


def filled_cache(model: MemoryModel, memory: mx.array | None) -> list:
    return model.make_cache(memory)


def assert_equal(left: mx.array, right: mx.array) -> None:
    np.testing.assert_array_equal(np.array(left), np.array(right))


def assert_close(left: mx.array, right: mx.array) -> None:
    np.testing.assert_allclose(np.array(left), np.array(right), rtol=0, atol=1e-4)


def effect(left: mx.array, right: mx.array) -> float:
    return mx.abs(left - right).max().item()


def test_start_values_have_no_effect(anchor):
    bare = anchor(tokens())
    model = attach(anchor, CONFIG)
    memory = model.join([mx.array(model.init_block(level, 1))[None] for level in (1, 2)])
    assert memory.shape == (1, LAYERS * 3 * R * D)
    assert mx.abs(memory).max() > 0
    assert_equal(model(tokens(), memory=memory), bare)


def test_memory_off_is_the_bare_anchor(anchor):
    bare = anchor(tokens())
    model = attach(anchor, CONFIG)
    assert_equal(model(tokens()), bare)
    assert_equal(model(tokens(), cache=filled_cache(model, None)), bare)
    assert effect(model(tokens(), memory=random_memory(1)), bare) > 0.1


def test_a_memory_widens_the_matrices_of_the_anchor(anchor):
    memory = random_memory(1)
    logits = attach(anchor, CONFIG)(tokens(), memory=memory)
    for layer, (m1, m2, m3) in zip(anchor.layers, memory.reshape(LAYERS, 3, R, D), strict=True):
        mlp = layer.mlp
        mlp.gate_proj.weight = mx.concatenate([mlp.gate_proj.weight, m1])
        mlp.up_proj.weight = mx.concatenate([mlp.up_proj.weight, m2])
        mlp.down_proj.weight = mx.concatenate([mlp.down_proj.weight, m3.T], axis=1)
    assert_close(logits, anchor(tokens()))


def test_a_batch_of_memories_equals_single_runs(anchor):
    model = attach(anchor, CONFIG)
    memory = random_memory(3)
    batch = model(tokens(3), memory=memory)
    for row in range(3):
        alone = model(tokens(3)[row : row + 1], memory=memory[row : row + 1])
        assert_close(batch[row : row + 1], alone)
        other = (row + 1) % 3
        swapped = model(tokens(3)[row : row + 1], memory=memory[other : other + 1])
        assert effect(swapped, alone) > 0.1


def test_one_memory_serves_a_whole_batch(anchor):
    model = attach(anchor, CONFIG)
    one = random_memory(1)
    assert_close(model(tokens(3), memory=one), model(tokens(3), memory=mx.repeat(one, 3, axis=0)))


def test_the_cache_carries_the_memory_through_decoding(anchor):
    model = attach(anchor, CONFIG)
    memory = random_memory(2)
    whole = model(tokens(), memory=memory)
    cache = filled_cache(model, memory)
    pieces = [model(tokens()[:, :4], cache=cache)]
    pieces += [model(tokens()[:, t : t + 1], cache=cache) for t in range(4, 9)]
    assert_close(mx.concatenate(pieces, axis=1), whole)
    assert_equal(mx.concatenate([one.reshape(2, -1) for one in cache[-1].cache], axis=1), memory)


def test_a_memory_that_is_passed_goes_before_that_of_the_cache(anchor):
    model = attach(anchor, CONFIG)
    first, second = random_memory(2, seed=1), random_memory(2, seed=2)
    assert_equal(
        model(tokens(), cache=filled_cache(model, first), memory=second),
        model(tokens(), memory=second),
    )


@pytest.mark.parametrize("on", [True, False], ids=["memory", "no memory"])
def test_cache_with_a_memory_survives_a_file(anchor, tmp_path, on):
    model = attach(anchor, CONFIG)
    cache = filled_cache(model, random_memory(1) if on else None)
    model(tokens(1)[:, :5], cache=cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert len(loaded) == LAYERS + 1
    rest = tokens(1)[:, 5:]
    assert_equal(model(rest, cache=loaded), model(rest, cache=cache))


def test_extract_takes_one_sequence_out_of_a_batch(anchor):
    model = attach(anchor, CONFIG)
    memory = random_memory(3)
    entry = filled_cache(model, memory)[-1]
    for one, whole in zip(entry.extract(1).cache, entry.cache, strict=True):
        assert_equal(one, whole[1:2])
    assert filled_cache(model, None)[-1].extract(1)[0] is None


def test_only_the_layers_of_the_config_change(anchor):
    classes = [type(layer.mlp) for layer in anchor.layers]
    model = attach(anchor, MemoryConfig(ranks=(4, 2), branching=2, layers=(0, 2)))
    assert [type(layer.mlp) is old for layer, old in zip(anchor.layers, classes, strict=True)] == [
        False, True, False,
    ]  # fmt: skip
    blocks = [mx.array(model.init_block(level, 0))[None] for level in (1, 2)]
    assert model.join(blocks).shape == (1, 2 * 3 * R * D)
    memory = random_memory(1, layers=2)
    logits = model(tokens(), memory=memory)
    first, last = mx.split(memory, 2, axis=1)
    padded = mx.concatenate([first, mx.zeros((1, 3 * R * D)), last], axis=1)
    assert_close(logits, attach(detach(model), CONFIG)(tokens(), memory=padded))


def test_detach_gives_the_anchor_back(anchor):
    bare = anchor(tokens())
    classes = [type(layer.mlp) for layer in anchor.layers]
    names = [name for name, _ in tree_flatten(anchor.parameters())]
    model = attach(anchor, CONFIG)
    model(tokens(), memory=random_memory(1))
    assert detach(model) is anchor
    assert [type(layer.mlp) for layer in anchor.layers] == classes
    assert [name for name, _ in tree_flatten(anchor.parameters())] == names
    assert_equal(anchor(tokens()), bare)
    attach(anchor, CONFIG)  # and it can be had again


def test_names_of_the_weights_stay(anchor):
    names = {name for name, _ in tree_flatten(anchor.parameters())}
    model = attach(anchor, CONFIG)
    assert {name for name, _ in tree_flatten(anchor.parameters())} == names
    assert {name for name, _ in tree_flatten(model.parameters())} == {
        f"anchor.{name}" for name in names
    }


def test_a_quantised_anchor_takes_memories(anchor):
    # Of the FFN alone: the widths of the heads are no multiple of 32.
    nn.quantize(anchor, 32, 4, class_predicate=lambda path, _: path.endswith("gate_proj"))
    bare = anchor(tokens())
    model = attach(anchor, CONFIG)
    assert isinstance(anchor.layers[0].mlp.gate_proj, nn.QuantizedLinear)
    assert_equal(model(tokens()), bare)
    memory = random_memory(1)
    before = model(tokens(), memory=memory)
    assert effect(before, bare) > 0.1


def test_quantising_after_attaching_keeps_the_memory(anchor):
    model = attach(anchor, CONFIG)
    memory = random_memory(1)
    exact = model(tokens(), memory=memory)
    nn.quantize(model, 32, 8, class_predicate=lambda path, _: path.endswith("gate_proj"))
    assert 0 < effect(model(tokens(), memory=memory), exact) < 0.2 * mx.abs(exact).max()


def test_two_models_do_not_share_a_memory(anchor):
    other = make_openlm()
    bare = other(tokens())
    model, second = attach(anchor, CONFIG), attach(other, CONFIG)
    seen = []

    # What the second model gives in the middle of a call of the first.
    _during_call(model, lambda: seen.append(second(tokens())))
    model(tokens(), memory=random_memory(1))
    assert_equal(seen[0], bare)


def test_another_thread_sees_no_memory_of_this_one(anchor):
    model = attach(anchor, CONFIG)
    seen = []

    def watch():
        thread = threading.Thread(target=lambda: seen.append(model._call.layers))
        thread.start()
        thread.join()
        seen.append(model._call.layers)

    _during_call(model, watch)
    model(tokens(), memory=random_memory(1))
    assert seen[0] is None and seen[1] is not None


def test_an_error_in_a_call_leaves_no_memory_behind(anchor):
    bare = anchor(tokens())
    model = attach(anchor, CONFIG)
    with pytest.raises(ValueError):
        model(tokens(), memory=random_memory(1)[:, :5])
    assert_equal(model(tokens()), bare)


def _during_call(model: MemoryModel, watch) -> None:
    """Calls ``watch`` before the second layer of each call."""

    class Watched(type(model.layers[1])):
        def __call__(self, x, *args, **options):
            watch()
            return super().__call__(x, *args, **options)

    model.layers[1].__class__ = Watched


# ---- errors ----------------------------------------------------------------------------


def test_attaching_twice_is_refused(anchor):
    attach(anchor, CONFIG)
    for kind in ("ffn", "lora_ffn", "kv"):
        with pytest.raises(ConfigError, match="the anchor has a memory already"):
            attach(anchor, replace(CONFIG, kind=kind))


def test_another_anchor_than_the_banks_is_refused(anchor):
    shape = asdict(AnchorShape.of(anchor))
    base = {"name": "other", "shape": {**shape, "intermediate_size": 64}}
    config = MemoryConfig(ranks=(4, 2), branching=2, base_anchor=base)
    with pytest.raises(ConfigError, match="intermediate_size=64.* this one is .*=48"):
        attach(anchor, config)
    attach(anchor, MemoryConfig((4, 2), branching=2, base_anchor={"name": "it", "shape": shape}))


def test_a_layer_that_the_anchor_lacks_is_refused(anchor):
    with pytest.raises(ConfigError, match="layers names layer 3, but the anchor has 3 layers"):
        attach(anchor, MemoryConfig((4, 2), branching=2, layers=(1, 3)))


def test_an_ffn_without_a_gate_is_refused():
    args = starcoder2.ModelArgs(
        model_type="starcoder2", hidden_size=D, num_hidden_layers=2, intermediate_size=48,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCAB,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="layer 0 .*starcoder2.* has no FFN with gate_proj"):
        attach(starcoder2.Model(args), CONFIG)


def test_a_refused_anchor_is_unchanged(anchor):
    del anchor.layers[1].mlp.up_proj
    classes = [type(layer.mlp) for layer in anchor.layers]
    with pytest.raises(ConfigError, match="layer 1 "):
        attach(anchor, CONFIG)
    assert [type(layer.mlp) for layer in anchor.layers] == classes
