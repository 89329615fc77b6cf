"""The encoder of token embeddings: what SIF says, and a unit vector for whatever text."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from mlx_hiermem.errors import ConfigError, FormatError, InputError
from mlx_hiermem.routing import load_encoder
from mlx_hiermem.routing.embeddings import EmbeddingEncoder, embedding_table

V, D = 64, 8


class Words:
    """Words from a fixed list, in the manner of a Hugging Face tokenizer; id 0 is unknown."""

    def __init__(self, words: str) -> None:
        self.ids = {word: i for i, word in enumerate(words.split(), 1)}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        special = [V - 1] if add_special_tokens else []
        return special + [self.ids.get(word, 0) for word in text.split()]


TOKENIZER = Words("the of is what number hafnium iron gold Gold please")
CORPUS = ["the number of hafnium", "the number of iron is", "the number of gold", "the of"]


def table(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(V, D)).astype(np.float32)


class Anchor(nn.Module):
    """As deep in the module tree as mlx-lm keeps it, next to a shorter table."""

    def __init__(self, rows: np.ndarray, dtype=mx.float32) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.positions = nn.Embedding(8, rows.shape[1])
        self.model.embed_tokens = nn.Embedding(*rows.shape)
        self.model.embed_tokens.weight = mx.array(rows).astype(dtype)


def test_a_vector_is_what_the_formula_says():
    rng = np.random.default_rng(0)
    weights = rng.uniform(size=V).astype(np.float32)
    components = np.linalg.qr(rng.normal(size=(D, 2)))[0].T.astype(np.float32)
    encoder = EmbeddingEncoder(table(), TOKENIZER, weights, components)
    (vector,) = encoder.encode(["the gold GOLD"])

    unit = table() / np.linalg.norm(table(), axis=1, keepdims=True)
    total = weights[1] * unit[1] + 2 * weights[8] * unit[8]
    for component in components:
        total = total - (total @ component) * component
    np.testing.assert_allclose(vector, total / np.linalg.norm(total), atol=1e-6)
    assert encoder.width == D and vector.dtype == np.float32


def test_case_counts_only_if_asked():
    weights, none = np.ones(V, np.float32), np.empty((0, D), np.float32)
    lowered = EmbeddingEncoder(table(), TOKENIZER, weights, none, lowercase=True)
    cased = EmbeddingEncoder(table(), TOKENIZER, weights, none, lowercase=False)
    assert np.array_equal(*lowered.encode(["gold", "Gold"]))
    assert not np.array_equal(*cased.encode(["gold", "Gold"]))


def test_fit_weighs_by_share_and_gives_unseen_tokens_nothing():
    encoder = EmbeddingEncoder.fit(table(), TOKENIZER, CORPUS, a=0.1, components=0)
    total = 15
    for word, count in (("the", 4), ("number", 3), ("hafnium", 1)):
        expected = 0.1 / (0.1 + count / total)
        assert encoder.weights[TOKENIZER.ids[word]] == pytest.approx(expected)
    for token in (0, TOKENIZER.ids["please"], V - 1):
        assert encoder.weights[token] == 0


def test_ordinary_frequencies_lower_the_weight_of_common_words():
    texts = [*CORPUS, "please"]
    plain = EmbeddingEncoder.fit(table(), TOKENIZER, texts, a=0.1, components=0)
    extra = {"please": 0.6, "what": 0.2}
    blended = EmbeddingEncoder.fit(
        table(), TOKENIZER, texts, a=0.1, components=0, extra_counts=extra
    )
    please, iron, what = (TOKENIZER.ids[w] for w in ("please", "iron", "what"))
    assert plain.weights[please] == plain.weights[iron]
    assert blended.weights[please] == pytest.approx(0.1 / (0.1 + (1 / 16 + 0.75) / 2))
    assert blended.weights[iron] > plain.weights[iron]
    assert blended.weights[what] == 0


def test_common_components_are_those_of_an_svd_and_are_gone():
    rows = table() + 2 * np.eye(D, dtype=np.float32)[3]
    plain = EmbeddingEncoder.fit(rows, TOKENIZER, CORPUS, components=0)
    fitted = EmbeddingEncoder.fit(rows, TOKENIZER, CORPUS, components=2)
    expected = np.linalg.svd(plain.encode(CORPUS))[2][:2]
    np.testing.assert_allclose(np.abs(np.sum(expected * fitted.components, axis=1)), 1, atol=1e-4)
    np.testing.assert_allclose(fitted.encode(CORPUS) @ fitted.components.T, 0, atol=1e-5)


def test_fit_is_deterministic_and_the_sample_is_bounded():
    texts = [f"{word} {other}" for word in TOKENIZER.ids for other in TOKENIZER.ids]

    def fit(seed):
        return EmbeddingEncoder.fit(table(), TOKENIZER, iter(texts), sample=20, seed=seed)

    np.testing.assert_array_equal(fit(0).components, fit(0).components)
    assert not np.array_equal(fit(0).components, fit(1).components)
    np.testing.assert_array_equal(fit(0).weights, fit(1).weights)


def test_the_sample_is_drawn_evenly_from_the_whole_corpus():
    texts = list(TOKENIZER.ids)[:4]
    plain = EmbeddingEncoder.fit(table(), TOKENIZER, texts, components=0).encode(texts)
    drawn = np.zeros(4)
    for seed in range(200):
        # With a sample of one text, its vector is the common component, up to the sign.
        fitted = EmbeddingEncoder.fit(table(), TOKENIZER, iter(texts), sample=1, seed=seed)
        drawn[np.abs(plain @ fitted.components[0]).argmax()] += 1
    assert drawn.min() > 25 and drawn.max() < 75


FITTED = EmbeddingEncoder.fit(table(), TOKENIZER, CORPUS, components=1)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.sampled_from([*TOKENIZER.ids, "zzz", "😀"])).map(" ".join)))
def test_unit_length_whatever_the_text_and_the_batch(texts):
    vectors = FITTED.encode(texts)
    assert vectors.shape == (len(texts), D)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    for text, vector in zip(texts, vectors, strict=True):
        np.testing.assert_array_equal(FITTED.encode([text])[0], vector)


def test_texts_of_which_nothing_is_left_go_to_one_place():
    first = np.eye(D, dtype=np.float32)[0]
    np.testing.assert_array_equal(FITTED.encode(["", "please", "zzz"]), [first] * 3)
    unit = table()[7:8] / np.linalg.norm(table()[7])
    gone = EmbeddingEncoder(table(), TOKENIZER, np.ones(V, np.float32), unit)
    np.testing.assert_array_equal(gone.encode(["iron", "iron iron"]), [first] * 2)


def test_save_and_load_through_the_config(tmp_path):
    FITTED.save(tmp_path)
    config = FITTED.to_config()
    assert config == {"type": "embeddings", "lowercase": True, "file": "encoder.safetensors"}
    assert set(load_file(tmp_path / "encoder.safetensors")) == {"weights", "components"}
    again = load_encoder(config, folder=tmp_path, anchor=Anchor(table()), tokenizer=TOKENIZER)
    np.testing.assert_array_equal(again.encode(CORPUS), FITTED.encode(CORPUS))
    assert again.to_config() == config


def test_no_components_survive_saving(tmp_path):
    plain = EmbeddingEncoder.fit(table(), TOKENIZER, CORPUS, components=0, lowercase=False)
    plain.save(tmp_path)
    again = EmbeddingEncoder.load(tmp_path, table(), TOKENIZER, lowercase=False)
    np.testing.assert_array_equal(again.encode(CORPUS), plain.encode(CORPUS))


def test_the_table_is_the_anchors_also_in_bf16_and_quantised():
    rows = np.random.default_rng(0).normal(size=(V, 64)).astype(np.float32)
    np.testing.assert_array_equal(embedding_table(Anchor(rows)), rows)
    half = embedding_table(Anchor(rows, mx.bfloat16))
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, rows, rtol=2**-8)
    quantised = Anchor(rows)
    nn.quantize(quantised, bits=8)
    np.testing.assert_allclose(embedding_table(quantised), rows, atol=0.03)
    with pytest.raises(ConfigError, match="token embedding"):
        embedding_table(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "tensors, says",
    [
        ({"weights": np.ones(V + 1, np.float32)}, rf"weights has shape \({V + 1},\).*\({V},\)"),
        ({"components": np.ones((1, D + 1), np.float32)}, "components has shape"),
        ({"components": np.ones(D, np.float32)}, "components has shape"),
        ({"weights": np.ones(V, np.float64)}, "weights has dtype F64"),
        ({"weights": np.full(V, np.inf, np.float32)}, "weights .* not finite"),
        ({"weights": np.full(V, -1, np.float32)}, "weights holds -1.0"),
        ({"other": np.ones(1, np.float32)}, "tensors are components, other, weights"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, tensors, says):
    path = tmp_path / "encoder.safetensors"
    good = {"weights": np.ones(V, np.float32), "components": np.ones((1, D), np.float32)}
    save_file({**good, **tensors}, path)
    with pytest.raises(FormatError, match=says) as error:
        EmbeddingEncoder.load(tmp_path, table(), TOKENIZER)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_bad_texts_and_foreign_tokenizers_are_refused():
    with pytest.raises(InputError, match="one string"):
        FITTED.encode("the")
    with pytest.raises(InputError, match="entry 1 is a int"):
        FITTED.encode(["the", 3])
    with pytest.raises(InputError, match="no token"):
        EmbeddingEncoder.fit(table(), TOKENIZER, ["", ""])
    with pytest.raises(InputError, match="components 8"):
        EmbeddingEncoder.fit(table(), TOKENIZER, CORPUS, components=D)
    with pytest.raises(ConfigError, match="gives id 10.* 5 token"):
        EmbeddingEncoder.fit(table()[:5], TOKENIZER, ["please"])
