"""The OpenLM anchor as an mlx-lm model: sizes, loading, decoding, caches, quantisation, dtypes."""

from __future__ import annotations

from dataclasses import asdict

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from mlx_hiermem.anchors import get_model_classes, load_anchor
from mlx_hiermem.anchors.openlm import PRESETS, Model, ModelArgs, init_weights
from mlx_hiermem.config import AnchorShape
from mlx_hiermem.errors import FormatError

# Every width is a multiple of 32, which quantisation in groups of 32 needs.
ARGS = ModelArgs(64, 2, 96, 3, 32, vocab_size=61, max_position_embeddings=128)
TIED = ModelArgs(64, 2, 96, 3, 32, vocab_size=61, tie_word_embeddings=True)


def random_model(args: ModelArgs = ARGS, seed: int = 0) -> Model:
    model = Model(args)
    mx.random.seed(seed)
    init_weights(model)
    mx.eval(model.parameters())
    return model


def random_tokens(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).integers(0, 61, shape))


def save(folder, model: Model, **config) -> None:
    """A folder as mlx-lm writes one."""
    folder.mkdir(exist_ok=True)
    save_model(folder, model)
    save_config({**asdict(model.args), **config}, folder / "config.json")


def decode(model, prompt: list[int], count: int, cache=None) -> list[int]:
    steps = generate_step(mx.array(prompt), model, max_tokens=count, prompt_cache=cache)
    return [token for token, _ in steps]


def decode_without_cache(model, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(model(mx.array([tokens]))[0, -1].argmax().item())
    return tokens[len(prompt) :]


def assert_same(left: mx.array, right: mx.array, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(np.array(left), np.array(right), rtol=0, atol=atol)


@pytest.mark.parametrize(
    "name, count", [("160M", 163_510_016), ("410M", 411_665_408), ("1.4B", 1_439_893_504)]
)
def test_presets_have_the_papers_parameter_counts(name, count):
    # Never evaluated, so the weights take no memory.
    parameters = tree_flatten(Model(PRESETS[name]).parameters())
    assert sum(array.size for _, array in parameters) == count
    assert {array.dtype for _, array in parameters} == {mx.float32}


def test_presets_shapes():
    assert AnchorShape.of(PRESETS["160M"]) == AnchorShape(35, 512, 2048, 12, 32)
    shapes = dict(tree_flatten(Model(PRESETS["160M"]).parameters()))
    assert shapes["model.layers.34.self_attn.q_proj.weight"].shape == (384, 512)
    assert shapes["model.layers.0.self_attn.k_norm.weight"].shape == (384,)
    assert not any(name.endswith("bias") for name in shapes)
    assert "lm_head.weight" not in shapes


@pytest.mark.parametrize("args", [ARGS, TIED], ids=["head", "tied"])
def test_a_folder_is_a_model_of_mlx_lm(tmp_path, args):
    model = random_model(args)
    save(tmp_path / "model", model)
    loaded, config = load_model(tmp_path / "model", get_model_classes=get_model_classes)
    assert config["model_type"] == "openlm"
    assert loaded.args == args
    tokens = random_tokens(2, 9)
    np.testing.assert_array_equal(np.array(loaded(tokens)), np.array(model(tokens)))
    ours, _ = load_anchor(tmp_path / "model")
    np.testing.assert_array_equal(np.array(ours(tokens)), np.array(model(tokens)))


def test_generate_step_equals_decoding_without_a_cache():
    model = random_model()
    prompt = random_tokens(7).tolist()
    answer = decode(model, prompt, 12)
    assert answer == decode_without_cache(model, prompt, 12)
    assert len(set(answer)) > 2


def test_prefill_in_steps_changes_nothing():
    model = random_model()
    prompt = random_tokens(20)
    steps = generate_step(prompt, model, max_tokens=5, prefill_step_size=3)
    assert [token for token, _ in steps] == decode(model, prompt.tolist(), 5)


def test_prompt_cache_survives_a_file(tmp_path):
    model = random_model()
    tokens = random_tokens(15).tolist()
    cache = make_prompt_cache(model)
    model(mx.array([tokens[:10]]), cache=cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert loaded[0].offset == 10
    assert decode(model, tokens[10:], 8, loaded) == decode(model, tokens, 8)


def test_rows_of_a_batch_do_not_see_each_other():
    model = random_model()
    tokens = random_tokens(3, 8)
    assert len(set(map(tuple, tokens.tolist()))) == 3
    batch = model(tokens)
    for row in range(3):
        assert_same(batch[row], model(tokens[row : row + 1])[0])


def test_causal():
    model = random_model()
    tokens = random_tokens(1, 8)
    changed = mx.concatenate([tokens[:, :5], (tokens[:, 5:] + 1) % 61], axis=1)
    before, after = model(tokens), model(changed)
    assert_same(before[:, :5], after[:, :5])
    assert mx.abs(before[:, 5:] - after[:, 5:]).max() > 0.01


def test_document_mask_parts_two_documents_in_one_row():
    """What training packs: positions only matter relative to each other, so parts stand alone."""
    model = random_model()
    tokens = random_tokens(1, 9)
    document = mx.array([0, 0, 0, 0, 1, 1, 1, 1, 1])
    mask = (document[:, None] == document) & mx.tril(mx.ones((9, 9), mx.bool_))
    packed = model(tokens, mask=mask)
    assert_same(packed[:, :4], model(tokens[:, :4]))
    assert_same(packed[:, 4:], model(tokens[:, 4:]))
    assert mx.abs(model(tokens)[:, 4:] - packed[:, 4:]).max() > 0.01


def test_input_embeddings_take_the_place_of_tokens():
    model = random_model()
    tokens = random_tokens(2, 6)
    given = model(tokens * 0, input_embeddings=model.model.embed_tokens(tokens))
    np.testing.assert_array_equal(np.array(given), np.array(model(tokens)))


@pytest.mark.parametrize("dtype, atol", [(mx.float16, 0.02), (mx.bfloat16, 0.1)])
def test_half_precision(dtype, atol):
    model, half = random_model(), random_model()
    half.set_dtype(dtype)
    tokens = random_tokens(2, 9)
    logits = half(tokens)
    assert logits.dtype == dtype
    assert_same(logits.astype(mx.float32), model(tokens), atol)
    assert mx.abs(model(tokens)).max() > 10 * atol
    # Cached decode in the same dtype.
    cache = make_prompt_cache(half)
    half(tokens[:, :6], cache=cache)
    rest = mx.concatenate([half(tokens[:, t : t + 1], cache=cache) for t in range(6, 9)], axis=1)
    assert rest.dtype == dtype
    assert_same(rest.astype(mx.float32), logits[:, 6:].astype(mx.float32), atol)


@pytest.mark.parametrize("args", [ARGS, TIED], ids=["head", "tied"])
def test_quantised(args):
    model, quantised = random_model(args), random_model(args)
    nn.quantize(quantised, group_size=32, bits=4)
    assert isinstance(quantised.layers[0].self_attn.q_proj, nn.QuantizedLinear)
    assert isinstance(quantised.model.embed_tokens, nn.QuantizedEmbedding)
    tokens = random_tokens(2, 9)
    exact, rough = np.array(model(tokens)), np.array(quantised(tokens))
    assert 0 < np.abs(exact - rough).mean() < 0.3 * np.abs(exact).mean()
    prompt = tokens[0].tolist()
    assert decode(quantised, prompt, 6) == decode_without_cache(quantised, prompt, 6)


def test_quantised_by_mlx_lm_and_loaded_again(tmp_path):
    model = random_model()
    model, config = quantize_model(model, asdict(model.args), group_size=32, bits=4)
    save(tmp_path / "q4", model, **{key: config[key] for key in ("quantization",)})
    loaded, _ = load_anchor(tmp_path / "q4")
    assert isinstance(loaded.layers[1].mlp.down_proj, nn.QuantizedLinear)
    tokens = random_tokens(1, 9)
    np.testing.assert_array_equal(np.array(loaded(tokens)), np.array(model(tokens)))


def test_half_precision_weights_are_widened_on_the_cpu(tmp_path):
    model = random_model()
    model.set_dtype(mx.bfloat16)
    save(tmp_path / "half", model)
    loaded, _ = load_anchor(tmp_path / "half")
    expected = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    assert {array.dtype for _, array in tree_flatten(loaded.parameters())} == {expected}


def test_start_values():
    """Truncated normals: nothing beyond two deviations, the residual's writers smaller by depth."""
    model = random_model(ModelArgs(256, 2, 512, 4, 32, vocab_size=500))
    of_truncation = 0.8796  # deviation of a unit normal cut at 2

    def check(weight: mx.array, std: float) -> None:
        assert mx.abs(weight).max().item() <= 2 * std * 1.0001
        assert weight.std().item() == pytest.approx(of_truncation * std, rel=0.02)

    check(model.model.embed_tokens.weight, 256**-0.5)
    check(model.lm_head.weight, 256**-0.5)
    for n, layer in enumerate(model.layers):
        check(layer.self_attn.q_proj.weight, 256**-0.5)
        check(layer.mlp.up_proj.weight, 256**-0.5)
        check(layer.self_attn.o_proj.weight, 128**-0.5 / (2 * (n + 1)) ** 0.5)
        check(layer.mlp.down_proj.weight, 512**-0.5 / (2 * (n + 1)) ** 0.5)
        assert (layer.input_layernorm.weight == 1).all()


def test_weights_of_a_wrong_dtype_are_refused(tmp_path):
    model = random_model()
    save(tmp_path / "model", model)
    weights = mx.load(str(tmp_path / "model" / "model.safetensors"))
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name].astype(mx.int32)
    mx.save_safetensors(str(tmp_path / "model" / "model.safetensors"), weights)
    with pytest.raises(FormatError, match=rf"{name} is stored as .*int32; expected floating"):
        load_anchor(tmp_path / "model")
