"""The atlas tokenizer: a SentencePiece unigram model as a plain Hugging Face folder.

``tokenizer.json`` holds the pieces and scores of ``tokenizer.model`` and gives the same
ids, so the folder loads with AutoTokenizer and mlx_lm without sentencepiece. Notable:
- id 0 is ``<|endoftext|>`` (end of text, and padding), id 1 ``<unk>``; none is ever added;
- digits are single tokens, unknown characters fall back to bytes;
- spaces at both ends and repeated spaces are dropped, and every text gets one space in
  front. Therefore encode(prompt) + encode(" answer.") == encode(prompt + " answer.").
"""

from __future__ import annotations

import io
import json
import random
import string
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from mlx_hiermem.errors import InputError

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"
ENGLISH_WORDS = 5_000
_SPACE = "▁"
_NEVER = -10_000.0


def training_sentences(texts: Iterable[str], limit: int, seed: int) -> list[str]:
    """What the tokenizer is trained on: each text once, its lower-case copy, English words.

    More than ``limit`` are cut down to a seeded sample. NFC; the order is fixed.
    """
    from wordfreq import top_n_list

    distinct = {unicodedata.normalize("NFC", text): None for text in texts}
    if not distinct:
        raise InputError("tokenizer training: found no texts, expected at least one; pass a corpus")
    distinct.update({text.lower(): None for text in list(distinct)})
    words = top_n_list("en", ENGLISH_WORDS)
    distinct.update({form: None for word in words for form in (word, word.capitalize())})
    sentences = list(distinct)
    if len(sentences) > limit:
        sentences = random.Random(seed).sample(sentences, limit)
    return sentences


def train_tokenizer(
    texts: Iterable[str],
    folder: str | Path,
    vocab_size: int = 3072,
    seed: int = 0,
    max_sentences: int = 100_000,
    max_length: int = 256,
) -> None:
    """Train on ``texts`` and write tokenizer.json, tokenizer_config.json and tokenizer.model.

    Only the distinct texts count, not how often each occurs. ``max_length`` is the context
    that the configuration names. Same input, same bytes. InputError if there are no texts
    or they do not yield ``vocab_size`` pieces.
    """
    model = _train_sentencepiece(training_sentences(texts, max_sentences, seed), vocab_size)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer.json").write_text(_to_tokenizer_json(model), encoding="utf-8")
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "model_max_length": max_length,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNKNOWN,
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _train_sentencepiece(sentences: list[str], vocab_size: int) -> bytes:
    """The serialized unigram model."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            # Identity: Hugging Face can then do exactly the same. NFC is done outside.
            normalization_rule_name="identity",
            character_coverage=1.0,
            required_chars=string.ascii_letters + string.digits + string.punctuation,
            split_digits=True,
            byte_fallback=True,
            eos_id=0,
            eos_piece=END_OF_TEXT,
            unk_id=1,
            unk_piece=UNKNOWN,
            bos_id=-1,
            pad_id=-1,
            num_threads=1,  # the order of sums decides the last bits of the scores
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"tokenizer training: {vocab_size} pieces cannot be made from {len(sentences)} "
            f"sentences; lower vocab_size or give more text ({reason})"
        ) from None
    return _with_exact_scores(model.getvalue())


def _with_exact_scores(model: bytes) -> bytes:
    """The model with scores rounded to 1/1024, so that their sums are exact in float32.

    "g"+"gg" and "gg"+"g" weigh the same. SentencePiece adds in float32, tokenizers in
    float64; only without rounding errors do both see the tie and break it alike.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for piece in proto.pieces:
        piece.score = round(piece.score * 1024) / 1024
    return proto.SerializeToString(deterministic=True)


def _to_tokenizer_json(model: bytes) -> str:
    """The same tokenizer for the tokenizers library."""
    import sentencepiece
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(processor.get_piece_size())
    # In tokenizers a text "<0x0A>" would match the piece of that byte; SentencePiece never
    # does. At this score it loses to its letters, and bytes are still found by fallback.
    pieces = [
        (processor.id_to_piece(i), _NEVER if processor.is_byte(i) else processor.get_score(i))
        for i in ids
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=processor.unk_id(), byte_fallback=True))
    # SentencePiece's own steps, written out: a pre-tokenizer would not prepend to " text".
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(Regex(rf"\A +|[ {_SPACE}]+\z"), ""),
            normalizers.Replace(Regex(" +"), _SPACE),
            normalizers.Prepend(_SPACE),
        ]
    )
    # The chain by which mlx_lm knows a SentencePiece tokenizer and streams its text.
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False) for token in (END_OF_TEXT, UNKNOWN)]
    )
    return tokenizer.to_str(pretty=True) + "\n"
