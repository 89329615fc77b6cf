"""Our BERT encoder against transformers and torch, at a tiny size, through a folder on disk."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizerFast

from mlx_hiermem.errors import ConfigError, FormatError
from mlx_hiermem.routing import load_encoder
from mlx_hiermem.routing.bert import BertEncoder

WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] the of is what atomic number capital haf ##nium ##ium iron "
    "gold a b c ##a ##b ##c , . ?"
).split()

TEXTS = [
    "What is the atomic number of hafnium?",
    "gold",
    "",
    "iron, gold, iron, gold, iron, gold, iron, gold, iron, gold.",
    "capital of abc",
    "some unknown words",
    "the " * 60,
]
MAX_LENGTH = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random BERT in the Hugging Face layout, with a WordPiece tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=40,
        initializer_range=0.3,
        layer_norm_eps=1e-3,
    )
    model = BertModel(config).eval()
    with torch.no_grad():  # biases and gains start at 0 and 1, where a mix-up would not show
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def load(folder, **options) -> BertEncoder:
    config = {"type": "bert", "model": str(folder), "max_length": MAX_LENGTH, **options}
    return load_encoder(config, folder=folder)


def reference(folder, texts: list[str]) -> np.ndarray:
    """Mean over the mask, normalised, from transformers; one padded batch."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(
        texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
    )
    with torch.no_grad():
        states = BertModel.from_pretrained(folder).eval()(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].float()
    mean = (states * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1).numpy()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_unit_vectors_equal_those_of_transformers(folder, batch_size):
    expected = reference(folder, TEXTS)
    # The texts differ, so that a mix-up of rows or a constant answer would show.
    assert np.abs(expected[0] - expected[1:]).max(axis=1).min() > 0.05
    vectors = load(folder).encode(TEXTS, batch_size=batch_size)
    assert vectors.dtype == np.float32 and vectors.shape == (len(TEXTS), 48)
    assert np.abs(vectors - expected).max() <= 1e-4
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_tokens_are_those_of_word_piece(folder):
    ids = load(folder).tokenizer("What is Hafnium?")["input_ids"]
    assert [WORDS[i] for i in ids] == ["[CLS]", "what", "is", "haf", "##nium", "?", "[SEP]"]


def test_long_texts_are_cut_at_max_length(folder):
    encoder = load(folder, max_length=8)
    start = "the " * 6
    long, short, other = encoder.encode([start + "iron gold", start, "the " * 5 + "iron"])
    np.testing.assert_allclose(long, short, atol=1e-6)
    assert np.abs(long - other).max() > 1e-3


def test_padding_beyond_the_mask_does_not_count(folder):
    encoder = load(folder)
    alone = encoder.encode(["gold"])
    with_long = encoder.encode(["gold", TEXTS[3]])
    np.testing.assert_allclose(alone[0], with_long[0], atol=1e-5)


def test_no_texts_no_vectors(folder):
    assert load(folder).encode([]).shape == (0, 48)


def test_the_config_loads_the_same_encoder_and_names_resolve_in_the_memory_folder(folder):
    encoder = load(folder)
    again = load_encoder(encoder.to_config(), folder=".")
    np.testing.assert_array_equal(again.encode(TEXTS), encoder.encode(TEXTS))
    inside = load_encoder(
        {"type": "bert", "model": folder.name, "max_length": MAX_LENGTH}, folder=folder.parent
    )
    np.testing.assert_array_equal(inside.encode(TEXTS), encoder.encode(TEXTS))


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "bert")


def rewrite(copy, change) -> None:
    path = copy / "model.safetensors"
    save_file(change(load_file(path)), path)


def test_other_names_and_left_over_parts_are_sanitised(folder, copy):
    def old(weights):
        weights = {f"bert.{name}": weight for name, weight in weights.items()}
        assert any("pooler" in name for name in weights)
        weights["bert.embeddings.position_ids"] = np.arange(40)[None]
        weights["cls.predictions.bias"] = np.zeros(3, np.float32)
        return {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): weight
            for name, weight in weights.items()
        }

    rewrite(copy, old)
    np.testing.assert_array_equal(load(copy).encode(TEXTS), load(folder).encode(TEXTS))


def test_half_precision_weights_compute_in_float32(folder, copy):
    rewrite(copy, lambda weights: {n: w.astype(np.float16) for n, w in weights.items()})
    encoder = load(copy)
    assert encoder.model.layers[0].query.weight.dtype == mx.float32
    assert np.abs(encoder.encode(TEXTS) - load(folder).encode(TEXTS)).max() < 0.02


QUERY = "encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda w: {n: x for n, x in w.items() if n != QUERY}, "lacks layers.1.query.weight"),
        (
            lambda w: {**w, "encoder.layer.9.output.dense.bias": w["embeddings.LayerNorm.bias"]},
            "holds layers.9.down.bias",
        ),
        (lambda w: {**w, QUERY: w[QUERY][:4].copy()}, r"layers.1.query.weight has shape \(4, 48\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(copy, change, says):
    rewrite(copy, change)
    with pytest.raises(FormatError, match=says) as error:
        load(copy)
    assert "model.safetensors" in str(error.value)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"model_type": "roberta"}, "model_type is 'roberta'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"num_attention_heads": 5}, "48 is not a multiple"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers is '3'"),
        ({"hidden_size": None}, "hidden_size is None"),
    ],
)
def test_another_architecture_is_refused(copy, change, says):
    path = copy / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=says) as error:
        load(copy)
    assert str(path) in str(error.value)


def test_damaged_and_missing_files_are_refused(copy):
    path = copy / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(FormatError, match="not a readable safetensors file"):
        load(copy)
    path.unlink()
    with pytest.raises(FormatError, match="no such file"):
        load(copy)
    path.write_bytes(data)
    load(copy)
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(FormatError, match="tokenizer cannot be read"):
        load(copy)
    for name in ("tokenizer.json", "vocab.txt"):
        (copy / name).unlink(missing_ok=True)
    with pytest.raises(FormatError, match="tokenizer is missing"):
        load(copy)
    (copy / "config.json").unlink()
    with pytest.raises(ConfigError, match="config.json: cannot be read"):
        load(copy)


def test_max_length_has_to_fit_the_positions(folder):
    for length in (2, 41):
        with pytest.raises(ConfigError, match=f"max_length is {length}; .* 3 to 40"):
            load(folder, max_length=length)
