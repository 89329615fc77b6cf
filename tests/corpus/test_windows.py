"""Windows and views: the tokens of a document, the texts they are assigned by."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mlx_hiermem.corpus import windows as windows_module
from mlx_hiermem.corpus.views import check_views, sentences, view_texts
from mlx_hiermem.corpus.windows import (
    Windower,
    copy_tokenizer,
    find_end_of_text,
    load_tokenizer,
    vocabulary,
)  # fmt: skip
from mlx_hiermem.errors import ConfigError, FormatError, InputError
from tests.tiny import END_OF_TEXT, make_tiny_model

EOT = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny model's tokenizer, one token per byte, in a folder without config.json."""
    target = tmp_path_factory.mktemp("bytes") / "tokenizer"
    copy_tokenizer(make_tiny_model(tmp_path_factory.mktemp("model")), target)
    return target


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A byte-level BPE with merges, so that tokens are of several letters."""
    target = tmp_path_factory.mktemp("words")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(["the weather of the island is mild"] * 9, trainer)
    tokenizer.save(str(target / "tokenizer.json"))
    config = {"eos_token": END_OF_TEXT, "tokenizer_class": "PreTrainedTokenizerFast"}
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    return target


def test_tokens_are_the_documents_with_one_end_of_text(folder):
    for found, text in zip(Windower(folder, 8, EOT)(["abc", "é"]), ["abc", "é"], strict=True):
        assert found.tokens.dtype == np.uint16 and found.tokens[-1] == EOT
        assert load_tokenizer(folder).decode(found.tokens[:-1].tolist()) == text


@given(st.text(st.sampled_from("ab é𝄞\n"), min_size=1, max_size=60), st.integers(2, 9))
def test_the_texts_of_windows_are_pieces_of_the_document_in_order(folder, text, window):
    (found,) = Windower(folder, window, EOT)([text])
    data = text.encode()
    if not text.strip():
        assert found is None
        return
    assert len(found.tokens) == len(data) + 1
    assert len(found.texts) == -(-len(found.tokens) // window)
    for number, piece in enumerate(found.texts):
        # A character that two windows share is in the texts of both.
        mine = data[number * window : (number + 1) * window] or data[(number - 1) * window :]
        assert mine in piece.encode() and len(piece.encode()) <= len(mine) + 6
        assert piece in text
    assert (found.tokens == EOT).sum() == 1


def test_tokens_of_several_letters_are_cut_where_tokens_are(words):
    text = "the weather of the island is mild and the weather is the weather"
    (found,) = Windower(words, 4, 0)([text])
    assert "".join(found.texts[:-1]) + found.texts[-1] == text or found.texts[-1] == found.texts[-2]
    tokenizer = load_tokenizer(words)
    for number, piece in enumerate(found.texts):
        ids = [i for i in found.tokens[4 * number : 4 * number + 4].tolist() if i != 0]
        if ids:
            assert tokenizer.decode(ids) == piece


def test_a_window_of_the_end_of_text_alone_belongs_with_the_one_before(folder):
    (found,) = Windower(folder, 4, EOT)(["abcdefgh"])
    assert len(found.tokens) == 9 and found.texts == ["abcd", "efgh", "efgh"]


def test_a_special_token_that_a_text_spells_out_is_plain_text(folder):
    (found,) = Windower(folder, 64, EOT)([f"before {END_OF_TEXT} after"])
    assert (found.tokens == EOT).sum() == 1
    assert len(found.tokens) == len(f"before {END_OF_TEXT} after") + 1
    # What routes at run time takes it for the token, as transformers does.
    assert EOT in load_tokenizer(folder).encode(f"before {END_OF_TEXT} after")


def test_a_long_text_is_tokenised_in_pieces_and_nothing_is_lost(folder, monkeypatch):
    text = "some words of a long text, " * 40 + "x" * 300 + " end"
    (whole,) = Windower(folder, 16, EOT)([text])
    monkeypatch.setattr(windows_module, "_MAX_PIECE", 100)
    pieces = list(windows_module._pieces(text))
    assert "".join(pieces) == text and max(map(len, pieces)) <= 100
    (cut,) = Windower(folder, 16, EOT)([text])
    np.testing.assert_array_equal(cut.tokens, whole.tokens)
    assert cut.texts == whole.texts


def test_documents_without_tokens_are_none(folder):
    assert Windower(folder, 8, EOT)(["", " \n ", "a"])[:2] == [None, None]


def test_the_end_of_text_is_the_tokenizers_or_the_configs(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    assert find_end_of_text(folder, tokenizer) == EOT and vocabulary(tokenizer) == 257
    copy_tokenizer(folder, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="names no end-of-text token"):
        find_end_of_text(tmp_path, load_tokenizer(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    nameless = load_tokenizer(tmp_path)
    assert find_end_of_text(tmp_path, nameless) == 7


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        copy_tokenizer(tmp_path, tmp_path / "copy")
    (tmp_path / "tokenizer.json").write_text("{")
    copy_tokenizer(tmp_path, tmp_path / "copy")
    with pytest.raises(FormatError, match="the tokenizer cannot be loaded"):
        Windower(tmp_path / "copy", 8, 0)


# ---- views -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("One. Two? Three!", ["One.", "Two?", "Three!"]),
        ('He said "no." Then he left.', ['He said "no."', "Then he left."]),
        ("A title\n\nThe text\ngoes on. End", ["A title", "The text\ngoes on.", "End"]),
        ("It is 3.14 here", ["It is 3.14 here"]),
        ("鉄は元素。金も元素。", ["鉄は元素。", "金も元素。"]),
        (" \n ", []),
    ],
)
def test_sentences(text, expected):
    assert sentences(text) == expected


@given(st.text(st.sampled_from("ab. \n?!\"'。"), max_size=40))
def test_sentences_hold_every_letter_in_order(text):
    def letters(text: str) -> str:
        return "".join(text.split())

    assert letters("".join(sentences(text))) == letters(text)


def test_views_are_distinct_and_in_the_order_that_was_asked_for():
    text = "One two three four five six seven eight nine. Ten. Ten."
    fields = {"q": ["What?", "", "Ten."], "title": ["T"]}
    assert view_texts(["text"], text, {}) == [text]
    assert view_texts(["prefix"], text, {}) == ["One two three four five six seven eight"]
    assert view_texts(["first-sentence"], text, {}) == [text[:45]]
    assert view_texts(["field:q", "sentences"], text, fields) == ["What?", "Ten.", text[:45]]
    assert view_texts(["field:title", "text"], text, fields) == ["T", text]
    assert view_texts(["field:nothing"], text, fields) == []
    assert view_texts(["sentences"], " ", {}) == [" "]


@pytest.mark.parametrize("views", [["texts"], ["text", "field:"], []])
def test_an_unknown_view_is_refused(views):
    with pytest.raises(InputError, match="known are text, prefix, first-sentence, sentences and f"):
        check_views(views)
