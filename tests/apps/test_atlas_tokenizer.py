"""The tokenizer folder: equal to SentencePiece, exact round trips, stable bytes."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
import sentencepiece
from mlx_lm.tokenizer_utils import SPMStreamingDetokenizer
from mlx_lm.tokenizer_utils import load as load_tokenizer
from transformers import AutoTokenizer

from apps.atlas.corpus import CorpusConfig, fact_documents, held_out
from apps.atlas.facts import facts
from apps.atlas.tokenizer import END_OF_TEXT, train_tokenizer, training_sentences
from mlx_hiermem.errors import InputError

ODD = [
    "", " ", "\n", "a\nb", "x\n\n y", "a  b", "  x ", "a\tb", "\u00a0x", "▁▁a", "日本 😀é", "\0a",
    "<0x0A>", "aaaaaaaaaaa", "ggg ppp", "ﬁ ™ €", "1234567890", "ÅÅÅ", "\u200d\u0301",
    "mixed日本text", "don't", "a▁ ▁",
]  # fmt: skip


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [d.text for index in range(len(facts())) for d in fact_documents(index)]


@pytest.fixture(scope="module")
def folder(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def processor(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))


def test_documents_give_sentencepiece_ids_and_come_back(tokenizer, processor, texts) -> None:
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == processor.encode(text), text
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", ODD, ids=repr)
def test_odd_text_gives_sentencepiece_ids(tokenizer, processor, text: str) -> None:
    assert tokenizer.encode(text) == processor.encode(text)


def test_lower_case_and_other_facts_alike(tokenizer, processor, texts) -> None:
    for text in texts[::50]:
        changed = text.lower() + "\n" + text.upper()
        assert tokenizer.encode(changed) == processor.encode(changed)
        assert tokenizer.decode(tokenizer.encode(changed)) == changed


def test_decomposed_accents_are_composed(tokenizer) -> None:
    name = "Curaçao"
    assert tokenizer.encode(unicodedata.normalize("NFD", name)) == tokenizer.encode(name)


def test_prompt_and_continuation_meet_at_a_boundary(tokenizer) -> None:
    for question in held_out(CorpusConfig())[::3]:
        prompt, tail = tokenizer.encode(question.prompt), tokenizer.encode(question.continuation)
        assert prompt + tail == tokenizer.encode(question.prompt + question.continuation)


def test_special_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert len(tokenizer) == tokenizer.vocab_size == 3072
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.convert_ids_to_tokens([0, 1]) == [END_OF_TEXT, "<unk>"]
    assert tokenizer.bos_token is None
    assert tokenizer("Hafnium")["input_ids"] == tokenizer.encode(
        "Hafnium", add_special_tokens=False
    )
    assert tokenizer.encode(END_OF_TEXT) == [0]
    assert tokenizer.model_max_length == 256


def test_digits_are_single_tokens(tokenizer) -> None:
    ids = tokenizer.encode("004 72.")
    assert [tokenizer.decode([i]) for i in ids if tokenizer.decode([i]).strip()] == list("00472.")


def test_documents_are_short(tokenizer, texts) -> None:
    lengths = [len(tokenizer.encode(text)) for text in texts[::10]]
    assert sum(lengths) / len(lengths) <= 16 and max(lengths) <= 32


def test_mlx_lm_streams_the_text(tokenizer, texts) -> None:
    detokenizer = tokenizer.detokenizer
    assert isinstance(detokenizer, SPMStreamingDetokenizer)
    for token in tokenizer.encode(texts[0]):
        detokenizer.add_token(token)
    detokenizer.finalize()
    assert detokenizer.text.strip() == texts[0]


def test_same_texts_same_bytes(texts: list[str], tmp_path: Path) -> None:
    some = texts[::40]
    train_tokenizer(some, tmp_path / "once", vocab_size=600)
    train_tokenizer(some * 2, tmp_path / "twice", vocab_size=600)
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        once, twice = ((tmp_path / run / name).read_bytes() for run in ("once", "twice"))
        assert once == twice


def test_training_sentences_are_distinct_and_capped() -> None:
    sentences = training_sentences(["Hafnium.", "Hafnium.", "Cafe\u0301."], 100_000, 0)
    assert len(set(sentences)) == len(sentences)
    assert {"Hafnium.", "hafnium.", "Café.", "the", "The"} <= set(sentences)
    assert len(training_sentences(["Hafnium."], 50, 0)) == 50
    assert training_sentences(["Hafnium."], 50, 0) != training_sentences(["Hafnium."], 50, 1)


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found no texts") as none:
        train_tokenizer([], tmp_path)
    with pytest.raises(InputError, match="lower vocab_size") as large:
        train_tokenizer(["Hafnium."], tmp_path, vocab_size=1_000_000)
    assert all("\n" not in str(error.value) for error in (none, large))
    assert not list(tmp_path.iterdir())
