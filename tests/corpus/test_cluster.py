"""The whole of ``cluster``: each token once, the same bytes however it is run, and going on."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlx_hiermem import cli
from mlx_hiermem.anchors import load_anchor_tokenizer
from mlx_hiermem.corpus import build, embedding, plan
from mlx_hiermem.corpus.build import build_corpus
from mlx_hiermem.corpus.config import CorpusConfig
from mlx_hiermem.corpus.folder import Corpus
from mlx_hiermem.corpus.part import read_part
from mlx_hiermem.corpus.runners import LocalRunner
from mlx_hiermem.corpus.workfolder import WorkFolder
from mlx_hiermem.errors import InputError
from mlx_hiermem.routing import load_encoder
from mlx_hiermem.routing.embeddings import EmbeddingEncoder, embedding_table
from tests.corpus.corpora import (
    EOT,
    count_tokens,
    files_of,
    make_documents,
    make_tiny_bert,
    pieces_of,
    text_of,
    write_jsonl,
)  # fmt: skip
from tests.tiny import make_tiny_model

DOCUMENTS = make_documents(300)
UNIT = 4000


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny model, a tiny BERT and a corpus."""
    place = tmp_path_factory.mktemp("place")
    make_tiny_model(place / "model")
    make_tiny_bert(place / "bert")
    write_jsonl(place / "some.jsonl", DOCUMENTS)
    return place


@pytest.fixture(scope="module")
def config(place) -> CorpusConfig:
    return CorpusConfig(
        data=(str(place / "some.jsonl"),), model=str(place / "model"), encoder="embeddings",
        sequence_length=32, window=64, branching=3, levels=2, validation=0.1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(place, config) -> Path:
    """The corpus of ``config``, with its work folder."""
    build_corpus(place / "made", config, unit_bytes=UNIT, keep_work=True)
    return place / "made"


def result_of(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_of(folder).items() if not name.startswith("work")}


# ---- what is in it ---------------------------------------------------------------------


def test_every_token_of_every_document_is_there_exactly_once(made):
    corpus = Corpus.open(made)
    assert len(list((made / "work" / "parts").glob("*.safetensors"))) > 10  # of several units
    expected = Counter(byte for document in DOCUMENTS for byte in document["text"].encode())
    assert count_tokens(corpus) == expected
    # Documents that fit into a sequence are whole, in one split, once.
    short = [d["text"].encode() for d in DOCUMENTS if len(d["text"].encode()) < 32]
    pieces = Counter(
        piece
        for split in corpus.splits.values()
        for piece in pieces_of(split.take(np.arange(len(split)))[0])
    )
    assert len(short) > 25 and all(pieces[text] == 1 for text in short)
    summary = json.loads((made / "summary.json").read_text())
    assert summary["documents"] == 300 and summary["empty_documents"] == 0
    assert summary["tokens"] == sum(expected.values()) + 300
    assert sum(split["documents"] for split in summary["splits"].values()) == 300
    assert 10 < summary["splits"]["validation"]["documents"] < 60
    assert summary["revision"] == corpus.revision
    corpus.verify()


def test_leaves_are_those_that_the_text_of_a_window_is_routed_to(made, place):
    """The whole chain, done by hand for each document of one window."""
    corpus, tree = Corpus.open(made), Corpus.open(made).tree()
    from mlx_hiermem.anchors import load_anchor

    anchor, anchor_config = load_anchor(place / "model")
    tokenizer = load_anchor_tokenizer(place / "model", anchor_config)
    encoder = load_encoder(
        corpus.info.encoder, folder=made / "routing", anchor=anchor, tokenizer=tokenizer
    )
    leaf = {
        document["text"].encode(): tree.route(encoder.encode([document["text"]]))[0].ids[-1]
        for document in DOCUMENTS
        if len(document["text"]) < 32
    }
    seen = 0
    for split in corpus.splits.values():
        tokens, leaves = split.take(np.arange(len(split)))
        for row, assigned in zip(tokens, leaves, strict=True):
            for piece in pieces_of(row[None]):
                if piece in leaf:
                    assert leaf[piece] == assigned
                    seen += 1
    assert seen == len(leaf) > 25
    assert len(set(leaf.values())) > 3


def test_the_tree_is_grown_on_training_documents_alone(place, config, made, tmp_path):
    """Other documents for validation, same tree: what they are makes no difference to it."""
    held = Corpus.open(made).validation
    texts = {bytes(p) for p in pieces_of(held.take(np.arange(len(held)))[0])}
    rows = [d for d in DOCUMENTS if d["text"].encode() not in texts or len(d["text"]) >= 32]
    assert len(rows) < len(DOCUMENTS)
    # An encoder that was fitted to the same corpus: taken from the tree of the first.
    again = replace(
        config, data=(str(write_jsonl(tmp_path / "some.jsonl", rows)),),
        encoder=str(place / "bert"), encoder_max_length=32,
    )  # fmt: skip
    build_corpus(tmp_path / "less", again, unit_bytes=UNIT)
    build_corpus(tmp_path / "all", replace(again, data=config.data), unit_bytes=UNIT)
    trees = [Corpus.open(tmp_path / name).tree() for name in ("less", "all")]
    for one, other in zip(trees[0].centroids, trees[1].centroids, strict=True):
        # Batches differ, and with them the last bits of vectors.
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_equal_texts_are_in_one_split(place, config, tmp_path):
    rows = [document for document in DOCUMENTS for _ in range(3)]
    data = (str(write_jsonl(tmp_path / "some.jsonl", rows)),)
    build_corpus(tmp_path / "c", replace(config, data=data, validation=0.5), unit_bytes=UNIT)
    corpus = Corpus.open(tmp_path / "c")
    sides = [
        {p for p in pieces_of(s.take(np.arange(len(s)))[0]) if p[:1].isdigit()}
        for s in (corpus.train, corpus.validation)
    ]
    assert all(len(side) > 50 for side in sides) and not sides[0] & sides[1]


def test_a_window_is_packed_once_under_each_distinct_leaf_of_its_views(config, tmp_path):
    views = ("field:questions", "text", "field:title")
    summary = build_corpus(
        tmp_path / "c", replace(config, views=views), unit_bytes=UNIT, keep_work=True
    )
    corpus, work = Corpus.open(tmp_path / "c"), WorkFolder(tmp_path / "c")
    assert summary["copies_per_window"] > 1.5
    for name, split in corpus.splits.items():
        assert corpus.info.splits[name].tokens == summary["splits"][name]["tokens"]
        tokens, leaves = split.take(np.arange(len(split)))
        packed = Counter()
        mine = {d["text"].encode() for d in DOCUMENTS}
        for row, leaf in zip(tokens, leaves.tolist(), strict=True):
            packed.update((piece, leaf) for piece in pieces_of(row[None]) if piece in mine)
        assert max(packed.values()) == 1
        found: dict[bytes, set[int]] = {}
        for piece, leaf in packed:
            found.setdefault(piece, set()).add(leaf)
        # What the views of each short document were assigned to.
        expected: dict[bytes, set[int]] = {}
        for unit in sorted(path.stem for path in work.parts.glob("*-*.json")):
            part = read_part(work.part(unit, 0))
            rows = work.array(unit, 0, "leaves")
            for window in np.flatnonzero(part.lengths <= 33).tolist():
                text = text_of(part.tokens[part.starts[window] : part.starts[window + 1]])
                landed = rows[part.rows_window == window].tolist()
                expected[text] = set(landed[:1] if name == "validation" else landed)
        short = set(found) & set(expected)
        assert len(short) == len(found) >= 3
        assert {text: found[text] for text in short} == {text: expected[text] for text in short}


def test_all_formats_give_one_corpus(place, config, tmp_path):
    lines = (place / "some.jsonl").read_bytes()
    texts = [document["text"] for document in DOCUMENTS]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.txt").write_text("\n\n".join(texts))
    pq.write_table(pa.table({"text": texts}), tmp_path / "d.parquet", row_group_size=70)
    (tmp_path / "set").mkdir()
    shutil.copy(place / "some.jsonl", tmp_path / "set" / "a.jsonl")
    bert = replace(config, encoder=str(place / "bert"), encoder_max_length=32)
    sources = [
        {"data": config.data},
        *({"data": (str(path),)} for path in sorted(tmp_path.glob("*.*"))),
        {"data": (), "dataset": str(tmp_path / "set")},
    ]
    results = []
    for number, source in enumerate(sources):
        out = tmp_path / f"corpus{number}"
        build_corpus(out, replace(bert, **source), unit_bytes=UNIT)
        results.append(Corpus.open(out).info)
    assert len(results) == 5
    assert len({info.source["fingerprint"] for info in results}) == 1
    # The batches that the encoder gets differ, and with them the last bits of the vectors: of
    # the tree, not of the texts and their splits.
    for info in results[1:]:
        for name, split in results[0].splits.items():
            assert (info.splits[name].documents, info.splits[name].tokens) == (
                split.documents, split.tokens,
            )  # fmt: skip


def test_a_part_ends_when_it_is_full_and_nothing_is_lost(config, made, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "PART_TOKENS", 3000)
    data = Path(config.data[0]).read_bytes()
    (tmp_path / "some.jsonl.gz").write_bytes(gzip.compress(data))
    again = replace(config, data=(str(tmp_path / "some.jsonl.gz"),))
    build_corpus(tmp_path / "c", again, keep_work=True)
    parts = WorkFolder(tmp_path / "c").parts
    assert len(list(parts.glob("*.safetensors"))) > 4 and len(list(parts.glob("*-*.json"))) == 1
    assert count_tokens(Corpus.open(tmp_path / "c")) == count_tokens(Corpus.open(made))


# ---- going on --------------------------------------------------------------------------


class Stopped(LocalRunner):
    """Stops, as with Ctrl-C, before item ``after`` of map number ``stage`` (from 1)."""

    def __init__(self, stage: int, after: int) -> None:
        self.stage, self.after = stage, after

    def run(self, factory, items, report):
        self.stage -= 1
        if self.stage:
            return super().run(factory, items, report)
        super().run(factory, items[: self.after], report)
        raise KeyboardInterrupt


@pytest.mark.parametrize("stage, after", [(1, 0), (1, 3), (2, 0), (2, 3)])
def test_a_run_that_is_stopped_goes_on_and_comes_to_the_same_bytes(
    config, made, tmp_path, stage, after
):
    out = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        build_corpus(out, config, Stopped(stage, after), unit_bytes=UNIT)
    records = {path: path.stat().st_mtime_ns for path in (out / "work").rglob("*-*.json")}
    assert len(records) == (after if stage == 1 else len(list(made.rglob("work/parts/*-*.json"))))
    build_corpus(out, config, unit_bytes=UNIT, keep_work=True)
    assert {path: path.stat().st_mtime_ns for path in records} == records  # not done again
    assert result_of(out) == result_of(made)


@pytest.mark.parametrize(
    "what", ["grow_tree", "place", "write_split", "summarize", "write_json", "remove_work"]
)
def test_a_run_that_is_stopped_between_stages_goes_on_too(
    config, made, tmp_path, monkeypatch, what
):
    def stop(*arguments, **more):
        raise KeyboardInterrupt

    out = tmp_path / "c"
    if what == "write_json":  # the plan is written with it, the summary too: stop the second
        with pytest.raises(KeyboardInterrupt):
            build_corpus(out, config, Stopped(1, 2), unit_bytes=UNIT)
    with monkeypatch.context() as patch:
        patch.setattr(build, what, stop)
        with pytest.raises(KeyboardInterrupt):
            build_corpus(out, config, unit_bytes=UNIT)
    if what == "remove_work":
        assert result_of(out) == result_of(made)
        with pytest.raises(InputError, match="is a corpus already"):
            build_corpus(out, config, unit_bytes=UNIT)
        return
    assert not (out / "corpus.json").exists()
    build_corpus(out, config, unit_bytes=UNIT)
    assert result_of(out) == result_of(made) and not (out / "work").exists()


def test_a_run_that_is_killed_goes_on(place, config, made, tmp_path):
    out = tmp_path / "c"
    command = [
        sys.executable, "-m", "mlx_hiermem", "cluster", "--out", str(out), "--data", *config.data,
        "--model", config.model, "--encoder", "embeddings", "--sequence-length", "32",
        "--window", "64", "--branching", "3", "--levels", "2", "--validation", "0.1",
        "--unit-size", str(UNIT),
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ})
    while not list(out.glob("work/parts/*-*.json")) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (out / "corpus.json").exists()
    assert cli.main([*command[3:], "--json"]) == 0
    assert result_of(out) == result_of(made)


def test_a_run_that_is_killed_while_it_prepares_leaves_nothing_in_the_way(
    config, made, tmp_path, monkeypatch
):
    class Killed(BaseException):
        pass

    def kill(*arguments):
        raise Killed

    out = tmp_path / "c"
    monkeypatch.setattr(plan, "_forget", lambda *arguments: None)  # a killed run tidies nothing
    with monkeypatch.context() as patch:
        patch.setattr(plan, "_write_plan", kill)
        with pytest.raises(Killed):
            build_corpus(out, config, unit_bytes=UNIT)
    assert (out / "routing" / "encoder.safetensors").exists()
    build_corpus(out, config, unit_bytes=UNIT)
    assert result_of(out) == result_of(made)


def test_control_c_says_how_to_go_on(config, tmp_path, monkeypatch, capsys):
    def stop(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "grow_tree", stop)
    found = cli.main(
        ["cluster", "--out", str(tmp_path / "c"), "--data", *config.data, "--model", config.model,
         "--encoder", "embeddings"]
    )  # fmt: skip
    assert found == 130
    assert capsys.readouterr().err.endswith("stopped; the same command goes on from here\n")


def test_other_settings_are_refused_by_name_and_nothing_is_lost(config, place, made, tmp_path):
    out = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        build_corpus(out, config, Stopped(2, 3), unit_bytes=UNIT)
    before = files_of(out)
    other = write_jsonl(tmp_path / "other.jsonl", DOCUMENTS[:50])
    for change, says in (
        ({"views": ("text", "prefix")}, r"begun with views \['text'\], this run says"),
        ({"window": 96}, "begun with window 64, this run says 96"),
        ({"seed": 1}, "begun with seed 0, this run says 1"),
        ({"encoder": str(place / "bert")}, "begun with encoder embeddings, this run"),
        ({"data": (*config.data, str(other))}, r"begun with other files \(1, now 2\)"),
        ({"levels": 1}, "grown with levels 2, this run says 1"),
        ({"validation": 0.2}, "grown with validation 0.1, this run says 0.2"),
    ):
        with pytest.raises(InputError, match=says):
            build_corpus(out, replace(config, **change), unit_bytes=UNIT)
        assert files_of(out) == before
    with pytest.raises(InputError, match="begun with unit_bytes 4000, this run says 4001"):
        build_corpus(out, config, unit_bytes=UNIT + 1)
    build_corpus(out, replace(config, sequence_length=16), unit_bytes=UNIT)
    assert Corpus.open(out).info.sequence_length == 16


def test_the_tree_may_be_shaped_anew_until_it_is_grown(config, tmp_path):
    out = tmp_path / "c"
    with pytest.raises(InputError) as error:
        build_corpus(out, replace(config, branching=12, levels=3), unit_bytes=UNIT)
    assert "fewer than the 1728 clusters of 3 levels of 12" in str(error.value)
    assert "--levels 2" in str(error.value)
    build_corpus(out, config, unit_bytes=UNIT)
    assert Corpus.open(out).info.branching == 3


def test_a_file_that_was_mended_is_read_again_and_the_others_are_not(place, config, tmp_path):
    good = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:200])
    bad = write_jsonl(tmp_path / "b.jsonl", DOCUMENTS[200:])
    text = bad.read_text()
    bad.write_text(text.replace('"text": "260.', '"txt": "260.'))
    mine = replace(
        config, data=(str(good), str(bad)), encoder=str(place / "bert"), encoder_max_length=32
    )
    with pytest.raises(InputError, match='b.jsonl: line 61: expected an object with a "text"'):
        build_corpus(tmp_path / "c", mine, unit_bytes=UNIT)
    records = {p: p.stat().st_mtime_ns for p in (tmp_path / "c" / "work").rglob("000000-*.json")}
    assert records
    bad.write_text(text.replace('"text": "200.', '"text": "200!'))  # its unit was done already
    build_corpus(tmp_path / "c", mine, unit_bytes=UNIT, keep_work=True)
    assert {path: path.stat().st_mtime_ns for path in records} == records
    build_corpus(tmp_path / "fresh", mine, unit_bytes=UNIT)
    assert result_of(tmp_path / "c") == result_of(tmp_path / "fresh")


def test_two_processes_do_not_work_on_one_folder(config, tmp_path):
    from mlx_hiermem.corpus.plan import only_one

    with only_one(tmp_path / "c"):
        with pytest.raises(InputError, match="another process is at work on it"):
            build_corpus(tmp_path / "c", config)


def test_a_corpus_that_another_process_has_finished_meanwhile_stays(
    config, made, tmp_path, monkeypatch
):
    out = tmp_path / "c"

    def check_then_finish(folder):
        plan.check_folder(folder)
        shutil.copytree(made, folder, ignore=shutil.ignore_patterns("work"))

    monkeypatch.setattr(build, "check_folder", check_then_finish)
    with pytest.raises(InputError, match="is a corpus already"):
        build_corpus(out, config, unit_bytes=UNIT)
    assert files_of(out) == result_of(made) and not (out / "work").exists()


def test_an_interrupt_while_the_work_is_removed_leaves_the_corpus(
    config, made, tmp_path, monkeypatch
):
    def interrupted(work):
        work.plan.unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "remove_work", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_corpus(tmp_path / "c", config, unit_bytes=UNIT)
    assert result_of(tmp_path / "c") == result_of(made)


# ---- trees and encoders ----------------------------------------------------------------


def test_a_tree_is_taken_as_it_is_and_assigns_alike(config, made, tmp_path):
    out = tmp_path / "c"
    mine = replace(config, tree=made / "routing", encoder=None, branching=None, levels=None)
    build_corpus(out, mine, unit_bytes=UNIT, keep_work=True)
    ours, theirs = Corpus.open(out), Corpus.open(made)
    assert ours.info.tree_sha256 == theirs.info.tree_sha256
    assert ours.info.encoder == theirs.info.encoder
    assert {n: d for n, d in result_of(out).items() if n.startswith(("train", "valid"))} == {
        n: d for n, d in result_of(made).items() if n.startswith(("train", "valid"))
    }
    parts = [read_part(path) for path in (out / "work" / "parts").glob("*.safetensors")]
    assert parts and all(part.vectors.shape[1] == 0 for part in parts)  # vectors are not kept


def test_the_tree_of_a_model_is_taken_with_its_encoder(place, config, tmp_path):
    memory = place / "model" / "memory"
    mine = replace(config, tree=memory, branching=None, levels=None)
    build_corpus(tmp_path / "c", mine, unit_bytes=UNIT)
    routing = tmp_path / "c" / "routing"
    for name in ("tree.safetensors", "encoder.safetensors"):
        assert (routing / name).read_bytes() == (memory / name).read_bytes()


def test_a_bert_from_a_folder_is_copied_so_that_the_corpus_stands_on_its_own(
    place, config, tmp_path
):
    bert = shutil.copytree(place / "bert", tmp_path / "bert")
    mine = replace(config, encoder=str(bert), encoder_max_length=32)
    build_corpus(tmp_path / "c", mine, unit_bytes=UNIT)
    corpus = Corpus.open(tmp_path / "c")
    assert corpus.info.encoder == {"type": "bert", "model": "encoder", "max_length": 32}
    # The tree of one corpus is the tree of another, and its encoder is known by what it is.
    again = replace(mine, tree=corpus.routing_folder, branching=None, levels=None)
    build_corpus(tmp_path / "d", again, unit_bytes=UNIT)
    shutil.rmtree(bert)
    build_corpus(tmp_path / "e", replace(again, encoder=None), unit_bytes=UNIT)
    for name in ("d", "e"):
        assert Corpus.open(tmp_path / name).info.encoder == corpus.info.encoder
        encoder = load_encoder(corpus.info.encoder, folder=tmp_path / name / "routing")
        assert encoder.encode(["some text"]).shape == (1, 24)


def test_the_encoder_of_embeddings_is_fitted_to_the_views(place, config, made):
    from mlx_hiermem.anchors import load_anchor

    anchor, anchor_config = load_anchor(place / "model")
    tokenizer = load_anchor_tokenizer(place / "model", anchor_config)
    table = embedding_table(anchor)
    mine = EmbeddingEncoder.load(made / "routing", table, tokenizer)
    # Letters that the documents hold weigh something, the more so the rarer they are.
    letters = Counter(b for document in DOCUMENTS for b in document["text"].lower().encode())
    common, _ = letters.most_common(1)[0]
    ids = {chr(letter): tokenizer.encode(chr(letter))[0] for letter in letters}
    assert (mine.weights > 0).sum() == len(letters)
    assert min(ids, key=lambda letter: mine.weights[ids[letter]]) == chr(common)
    assert EOT == tokenizer.eos_token_id
