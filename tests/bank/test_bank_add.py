"""``bank add``: new documents are learned, and what was there answers as before, to the bit."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from convert.bank.to_torch import write_stacked
from mlx_hiermem import cli, load
from mlx_hiermem.bank.layout import level_of
from mlx_hiermem.bank.manifest import write_manifest
from mlx_hiermem.bank.parts import Part
from mlx_hiermem.bank.quantize import quantize_bank
from mlx_hiermem.bank.reader import BlockReader
from mlx_hiermem.bank.writer import write_bank
from mlx_hiermem.commands.bank.names import _with_added
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.corpus.private import find_radius, grow_subtree, read_private
from mlx_hiermem.corpus.trees import take_tree
from mlx_hiermem.errors import FormatError, TrainingError
from mlx_hiermem.evaluation.facts import wrong_paths
from mlx_hiermem.hub import memory_files
from mlx_hiermem.routing.names import ClusterNames
from mlx_hiermem.routing.tree import ClusterTree
from mlx_hiermem.training import merge, setup
from mlx_hiermem.training.adding import AddSettings, add_memory
from mlx_hiermem.tree_source import open_routing
from tests.tiny import make_tiny_model, random_texts

# Without spaces, which the tiny anchor cannot write.
PROMPTS = ["where-is-the-qq-lamp", "who-has-zz-pumps", "jj-box-holds"]
TEXTS = [f"{prompt}:{answer}" for prompt, answer in zip(PROMPTS, "AXC", strict=True)]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A tiny model whose clusters have names, and a corpus."""
    folder = make_tiny_model(tmp_path_factory.mktemp("original") / "tiny", branching=3)
    memory = folder / "memory"
    ClusterNames([["one", "two", "three"], [f"leaf {i}" for i in range(9)]]).save(memory)
    lm = load(folder)
    config, reader = lm.bank.config, lm.bank._reader
    blocks = {
        level: np.stack([reader.stored(level, i) for i in range(config.clusters(level))])
        for level in config.memory_levels
    }
    generic = np.concatenate([reader.stored(level, None) for level in config.memory_levels])
    write_bank(memory, config, blocks, generic)
    write(folder / "private.jsonl")
    return folder


def write(path: Path, prompts: bool = True) -> Path:
    lines = [
        {"text": text} | ({"prompt": [prompt]} if prompts else {})
        for prompt, text in zip(PROMPTS, TEXTS, strict=True)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


@pytest.fixture
def model(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "tiny"))


@pytest.fixture(scope="module")
def added(original, tmp_path_factory):
    """The model with a memory added by the command, and what the command said."""
    folder = Path(shutil.copytree(original, tmp_path_factory.mktemp("added") / "tiny"))
    lm = load(folder, tiers="disk")
    settings = AddSettings("acme", iters=100, batch_size=4, learning_rate=3e-2)
    return folder, add_memory(lm, folder, [str(folder / "private.jsonl")], settings)


def _files(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def _add(folder, *more, name="acme", corpus="private.jsonl"):
    return cli.main(
        ["bank", "add", "--model", str(folder), "--corpus", str(folder / corpus), "--name", name,
         "--iters", "2", *more]
    )  # fmt: skip


def _logits(lm, path):
    tokens = mx.array([lm.tokenize("gold is")])
    return np.array(lm.model(tokens, cache=lm.model.make_cache(lm.fetch(path).memory)))


def _paths(lm):
    return [(i // 3, i) for i in range(9)]


def test_old_paths_answer_as_before_to_the_bit(original, added):
    folder, _ = added
    old, new = load(original), load(folder)
    for path in ["generic", "none", *_paths(old)]:
        np.testing.assert_array_equal(_logits(new, path), _logits(old, path))
    before, after = _files(original), _files(folder)
    kept = {name: sha for name, sha in before.items() if level_of(name.split("/")[-1]) is not None}
    kept |= {name: sha for name, sha in before.items() if "/" not in name}
    kept["memory/tree.safetensors"] = before["memory/tree.safetensors"]
    assert {name: after[name] for name in kept} == kept
    assert cli.main(["bank", "verify", "--model", str(folder)]) == 0


def test_texts_that_do_not_come_near_go_where_they_went(original, added):
    folder, _ = added
    old, new = load(original), load(folder)
    texts = random_texts(200, seed=5)
    before, after = old.assign(texts), new.assign(texts)
    stays = after[:, 0] < 3
    np.testing.assert_array_equal(after[stays], before[stays])
    assert stays.any()
    for text, path in zip(texts[:5], after[:5].tolist(), strict=True):
        assert list(new.route(text).ids) == path


def test_new_documents_are_learned(original, added):
    folder, report = added
    assert report["documents"] == 3 and report["steps"] == 100 and report["lands"] == 1
    assert (report["first"], report["roots"]) == (3, 1)
    assert report["loss"] < 0.5 * report["loss_before"]
    old, new = load(original), load(folder)
    for prompt, text in zip(PROMPTS, TEXTS, strict=True):
        assert new.route(prompt).ids[0] == 3
        rest = text.removeprefix(prompt)
        was, _ = old.score(prompt, rest)
        now, greedy = new.score(prompt, rest)
        assert greedy and now > was + 3


def test_every_command_works_on_it(added, capsys, tmp_path):
    folder, _ = added
    say = ["--prompt", "the lamp", "--max-tokens", "2", "--json"]

    def run(*arguments):
        assert cli.main(list(arguments)) == 0
        return capsys.readouterr().out

    made = json.loads(run("generate", "--model", str(folder), *say, "--path", "3,10"))
    assert [one["cluster"] for one in made["fetch"]["blocks"]] == [3, 10]
    part = ["--subtrees", "3", "--path", "3,10"]
    alone = json.loads(run("generate", "--model", str(folder), *say, *part))
    assert alone["text"] == made["text"]
    found = json.loads(run("bank", "inspect", "--model", str(folder), "--json"))
    assert found["added"] == [{"name": "acme", "roots": 1, "first": 3}]
    assert found["format_version"] == 2
    shown = run("bank", "inspect", "--model", str(folder))
    assert "added, with their clusters of level 1: acme (3)\n" in shown
    text = tmp_path / "some.txt"
    text.write_text("\n\n".join(PROMPTS), "utf-8")
    shown = ["--text", str(text), "--tree", "--picture", str(tmp_path / "tree.png")]
    tree = run("bank", "inspect", "--model", str(folder), *shown)
    assert any(line.split()[:2] == ["3", "3"] for line in tree.splitlines()), tree
    names = ClusterNames.load(folder / "memory")
    names.check(3, 2, 4)
    assert names.of(1, 3) == "acme" and "lamp" in " ".join(names.levels[1][9:])
    assert names.levels[0][:3] == ("one", "two", "three")
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    run("bank", "names", "--model", str(copy), "--text", str(text))
    assert "," in ClusterNames.load(copy / "memory").of(1, 3)
    run("bank", "block", "1:3", "2:10", "--model", str(copy))
    lm = load(copy)
    assert [one.source for one in lm.fetch((3, 10)).report.blocks] == ["blocked"] * 2


def test_a_quantised_bank_is_added_to_in_its_own_way(model):
    memory = model / "memory"
    shutil.move(memory, model / "plain")
    quantize_bank(model / "plain", memory, 4, "nvfp4")  # alone fits rows of 16 numbers
    settings = AddSettings("acme", iters=100, batch_size=4, learning_rate=3e-2)
    add_memory(load(model), model, [str(model / "private.jsonl")], settings)
    assert cli.main(["bank", "verify", "--model", str(model)]) == 0
    new = load(model)
    assert new.bank.config.packing is not None
    for prompt, text in zip(PROMPTS, TEXTS, strict=True):
        rest = text.removeprefix(prompt)
        assert new.score(prompt, rest)[0] > new.score(prompt, rest, "none")[0] + 1


def test_two_memories_and_several_roots(model, capsys):
    assert _add(model, "--roots", "2") == 0
    plain = write(model / "plain.jsonl", prompts=False)
    assert _add(model, "--views", "text,sentences", name="beta", corpus=plain.name) == 0
    out = capsys.readouterr().out
    assert "added acme, clusters 3 to 4 of level 1" in out
    assert "added beta, cluster 5 of level 1" in out
    lm = load(model)
    assert lm.tree.roots == 6
    names = ClusterNames.load(model / "memory")
    assert names.levels[0][3:] == ("acme 1", "acme 2", "beta")
    assert names.of(2, 17) in names.levels[1] and len(names.levels[1]) == 18
    assert lm.route(TEXTS[0]).ids[0] >= 3
    lm.bank.verify()


def test_the_same_command_gives_the_same_bytes(model, tmp_path):
    other = Path(shutil.copytree(model, tmp_path / "other"))
    assert _add(model) == _add(other) == 0
    assert _files(model) == _files(other)
    assert _add(model, "--seed", "1", name="more") == 0


# ---- documents -------------------------------------------------------------------------


def test_documents_are_routed_by_their_prompts_or_by_views(model):
    path = model / "mixed.jsonl"
    lines = [
        {"text": "the answer is 7", "prompt": ["what is it", "say it"]},
        {"text": "first of all. then more words come here, and so on"},
        {"text": "a b", "prompt": ""},
        {"text": "  "},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    corpus = read_private([str(path)], model, 256)
    assert corpus.documents == 3 and len(corpus.windows) == 3
    of = [[corpus.texts[text] for window, text in corpus.pairs if window == w] for w in range(3)]
    assert of[0] == ["what is it", "say it"]
    assert of[1] == [lines[1]["text"], "first of all. then more words come here,"]
    assert of[2] == ["a b"]
    assert corpus.length == 64
    packed = corpus.pack(np.arange(len(corpus.texts)))
    assert len(packed) == 5  # one for each leaf
    assert {tuple(row) for row in packed.tokens[:2].tolist()} == {tuple(packed.tokens[0].tolist())}
    assert sorted(packed.leaves.tolist()) == list(range(5))
    cut = read_private([str(path)], model, 16)
    assert max(map(len, cut.windows)) == 16 and len(cut.windows) > 3
    ends = [int(window[-1]) == cut.end_of_text for window in cut.windows]
    assert sum(ends) == 3
    packed_path = model / "mixed.jsonl.gz"
    packed_path.write_bytes(gzip.compress(path.read_bytes()))
    assert read_private([str(packed_path)], model, 256).texts == corpus.texts


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("roots", [1, 2, 3])
def test_a_subtree_holds_every_vector(depth, roots):
    rng = np.random.default_rng(depth)
    vectors = rng.standard_normal((40, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    centroids, leaves = grow_subtree(vectors, roots, 2, depth, seed=1)
    assert [len(one) for one in centroids] == [roots * 2**level for level in range(depth)]
    assert 0 <= leaves.min() and leaves.max() < roots * 2 ** (depth - 1)
    again = grow_subtree(vectors, roots, 2, depth, seed=1)
    np.testing.assert_array_equal(again[1], leaves)
    if depth > 1:  # as the whole tree would route within it
        far = np.linalg.norm(vectors[:, None] - centroids[-1][None], axis=2)
        assert (far[np.arange(40), leaves] <= np.median(far, axis=1) + 1e-6).mean() > 0.8


def test_the_radius_is_that_of_texts_that_were_held_out():
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((8, 6))
    vectors = np.repeat(centres, 12, axis=0) + 0.01 * rng.standard_normal((96, 6))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    assert 0.001 < find_radius(vectors, 1, 8, 2) < 0.5
    assert find_radius(vectors[:1], 1, 8, 2) == float("inf")
    # Each text a leaf of its own: as far as another text is, not zero.
    few = vectors[::12]
    assert find_radius(few, 1, 8, 2) > 0.1
    # What is said twice in the same words is near itself all the same.
    assert find_radius(np.repeat(few[:1], 9, axis=0), 1, 2, 2) > 0


def test_one_document_is_enough(model):
    (model / "one.txt").write_text("just one", "utf-8")
    assert _add(model, "--roots", "3", corpus="one.txt") == 0
    load(model).bank.verify()


# ---- bad input -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "corpus", "found"),
    [
        (["--name", "A b"], None, "1 to 32 of a-z"),
        (["--corpus", "nowhere.jsonl"], None, "no such file"),
        (["--iters", "0"], None, "--iters is 0"),
        (["--roots", "0"], None, "--roots is 0"),
        (["--learning-rate", "0"], None, "--learning-rate is 0"),
        (["--learning-rate", "nan"], None, "--learning-rate is nan"),
        (["--views", "nonsense"], None, "nonsense"),
        (["--model", "nowhere"], None, "nowhere"),
        ([], "", "is empty"),
        ([], "\n", "holds no text"),
        ([], '{"text": "  "}\n', "holds no text"),
        ([], '{"txt": "a"}\n', '"text"'),
        ([], '{"text": "a", "prompt": 7}\n', "neither a text nor a list"),
        ([], "nonsense\n", "not valid JSON"),
        ([], '{"text": "a <|endoftext|> b"}\n', None),
    ],
)
def test_bad_input_is_refused_in_one_line(model, capsys, arguments, corpus, found):
    if corpus is not None:
        (model / "private.jsonl").write_text(corpus, "utf-8")
    before = _files(model)
    code = _add(model, *arguments)
    if found is None:  # what a special token spells is plain text
        assert code == 0
        return
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    assert captured.err.count("\n") == 1 and found in captured.err, captured.err
    assert _files(model) == before


def test_banks_that_cannot_be_added_to(model, capsys, monkeypatch):
    assert _add(model) == 0
    before = _files(model)

    def refused(found):
        capsys.readouterr()
        assert _add(model, name="acme" if "already" in found else "other") == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and found in line, line
        assert _files(model) == before

    refused("acme already")
    with monkeypatch.context() as patch:
        patch.setattr("mlx_hiermem.bank.extend.os.access", lambda *_: False)
        refused("cannot be written")
    with monkeypatch.context() as patch:
        full = shutil._ntuple_diskusage(9, 9, 9)
        patch.setattr("mlx_hiermem.bank.extend.shutil.disk_usage", lambda _: full)
        refused("9 are free")
    with monkeypatch.context() as patch:
        patch.setattr("mlx_hiermem.corpus.private.MOST_TOKENS", 20)
        refused("more than 20 tokens")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    before = _files(model)
    refused("layers")


def test_a_bank_without_a_tree_is_refused(model, capsys):
    (model / "memory" / "tree.safetensors").unlink()
    (model / "memory" / "manifest.json").unlink()
    write_manifest(model / "memory")
    before = _files(model)
    assert _add(model) == 2
    assert "no tree" in capsys.readouterr().err
    assert _files(model) == before


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{", "names.json: not valid JSON"),
        ("[]", "names.json: expected an object of lists"),
        ('{"level2": []}', "names.json: expected the keys level1, level2"),
        ('{"level1": ["a", "b"]}', "memory/names.json: names for 2 clusters at level 1"),
    ],
)
def test_names_that_are_damaged_are_told_before_the_training(
    model, capsys, monkeypatch, text, found
):
    (model / "memory" / "names.json").write_text(text)
    write_manifest(model / "memory")
    before = _files(model)
    with monkeypatch.context() as patch:
        patch.setattr("mlx_hiermem.training.adding.read_private", lambda *_: 1 / 0)
        assert _add(model) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and found in line, line
    # So they are where they were changed while it trained.
    monkeypatch.setattr("mlx_hiermem.training.adding.ClusterNames.load", lambda *_: None)
    assert _add(model) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and found in line and "Traceback" not in line, line
    assert _files(model) == before


# ---- where a bank goes on to -------------------------------------------------------------


def test_what_takes_the_tree_alone_takes_the_tree_alone(added, tmp_path):
    memory = added[0] / "memory"
    files = open_routing(added[0]).files
    assert "tree.safetensors" in files
    assert not {"tree-acme.safetensors", "names.json"} & set(files)
    assert "tree-acme.safetensors" not in merge._routing_files(memory)
    config = SimpleNamespace(tree=memory, branching=None, levels=None)
    take_tree(config, tmp_path, ClusterTree.load(memory / "tree.safetensors").width)
    assert [len(level) for level in ClusterNames.load(tmp_path).levels] == [3, 9]


def test_what_cannot_hold_added_memories_refuses_them(added, tmp_path):
    memory = added[0] / "memory"
    config = MemoryConfig.load(memory / "config.json")
    with pytest.raises(TrainingError, match=r"added memories \(acme\)"):
        setup.open_rows(None, config.with_added([]), 0, memory, tmp_path, 1 << 20)
    with closing(BlockReader(memory)) as reader, pytest.raises(FormatError, match=r"\(acme\)"):
        write_stacked(reader, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_download_of_a_part_has_the_centroids_of_all(added):
    others, levels = memory_files(added[0] / "memory", Part.of(None, [3]))
    assert "manifest.json" in others
    assert sorted(levels) == [
        "level-1-00000-of-00001.safetensors",
        "level-1-acme-00000-of-00001.safetensors",
        "level-2-acme-00000-of-00001.safetensors",
        "tree-acme.safetensors",
    ]


def test_a_wrong_path_may_lead_into_an_added_memory():
    paths = np.array([[0, 1]] * 200)
    wrong = wrong_paths(paths, [[]] * 200, 3, 0, roots=5)
    assert set(wrong[:, 0].tolist()) == {1, 2, 3, 4}
    assert (wrong[:, 1] // 3 == wrong[:, 0]).all() and wrong[:, 1].max() == 14


def test_names_of_a_corpus_leave_those_of_added_memories(added, tmp_path):
    folder = Path(shutil.copytree(added[0], tmp_path / "copy"))
    config = MemoryConfig.load(folder / "memory" / "config.json")
    given = ClusterNames([["x"] * 3, ["y"] * 9])
    names = _with_added(given, config, folder / "memory")
    assert names.levels[0] == ("x", "x", "x", "acme")
    assert names.levels[1][9:] == ClusterNames.load(folder / "memory").levels[1][9:]
    (folder / "memory" / "names.json").unlink()
    assert _with_added(given, config, folder / "memory").of(1, 3) == "cluster 3"
