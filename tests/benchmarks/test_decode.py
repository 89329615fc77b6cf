"""What the decoding benchmark compares is what it says."""

import json
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from benchmarks import decode, fetch_bank
from benchmarks import decode_models as models
from benchmarks.harness import main
from mlx_hiermem import load
from mlx_hiermem.config import MemoryConfig

SIZES = models.sizes("160M", smoke=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decode")
    models.write_model(folder / "model", SIZES)
    return folder


@pytest.fixture
def lm(folder):
    lm = load(folder / "model")
    yield lm
    lm.bank.close()


@pytest.fixture
def calls(lm, monkeypatch):
    """What the model is called with: (shape of the tokens, memory of the cache, of the call)."""
    made = []
    call = type(lm.model).__call__

    def spy(self, inputs, cache=None, *args, **kwargs):
        held = cache[-1].cache[0]
        given = kwargs.get("memory")
        made.append((inputs.shape, held, given and given[0][0]))
        return call(self, inputs, cache, *args, **kwargs)

    monkeypatch.setattr(type(lm.model), "__call__", spy)
    return made


@pytest.mark.parametrize(
    "anchor, fetch", [("160M", 18_063_360), ("410M", 49_545_216), ("1.4B", 153_354_240)]
)
def test_the_memories_are_the_papers(anchor, fetch):
    sizes = models.sizes(anchor, smoke=False)
    assert MemoryConfig(ranks=sizes.ranks).fetch_size(sizes.anchor) == fetch


def test_the_dense_model_has_the_parameters_of_anchor_and_memory(lm):
    dense = models.dense(SIZES, lm.dtype)
    anchor, fetched = models.parameters(lm.model.anchor), lm.bank.config.fetch_size()
    assert models.parameters(dense) == anchor + fetched
    assert {value.dtype for _, value in tree_flatten(dense.parameters())} == {lm.dtype}


def test_the_bare_anchor_is_the_anchor_on_the_same_weights(lm):
    bare = models.twin(lm.model.anchor)
    tokens = mx.array(decode.prompts(SIZES, 2, 5))
    assert mx.array_equal(bare(tokens), lm.model(tokens))
    assert not any(hasattr(type(module), "anchor_class") for module in bare.modules())
    ours = dict(tree_flatten(lm.model.anchor.parameters()))
    assert all(value is ours[name] for name, value in tree_flatten(bare.parameters()))


def test_what_a_token_reads():
    tied = fetch_bank.openlm.Model(SIZES.anchor)
    assert models.read_per_token(tied) == models.parameters(tied)
    separate = fetch_bank.openlm.Model(replace(SIZES.anchor, tie_word_embeddings=False))
    assert models.read_per_token(separate) == models.parameters(tied) + SIZES.anchor.hidden_size


def test_a_turn_decodes_its_tokens_with_the_memory(lm, calls):
    path = fetch_bank.path_to(lm.bank.config, 0)
    memory = lm.model.matrices(lm.fetch(path).memory)[0][0]
    for name, one in decode.contestants(lm, SIZES).items():
        with ExitStack() as stack:
            turn = decode._answer(stack, SIZES, *one)
            turn()
            for _ in range(3):
                calls.clear()
                turn()
                expected = [(1, 1)] * SIZES.tokens if name == "memory" else []
                assert [shape for shape, *_ in calls] == expected, name
                assert all(mx.array_equal(held, memory) for _, held, _ in calls)


def test_a_prompt_is_read_with_the_memory(lm, calls):
    assert decode.prefill(lm, SIZES).id == "decode.prefill_vs_anchor"
    # All but the last token, and that one, warm-up included.
    assert [shape for shape, *_ in calls] == [(1, SIZES.prompt - 1), (1, 1)] * 3
    assert all(held is not None for _, held, _ in calls)


def test_a_batch_holds_as_many_memories_as_it_says(lm, calls):
    with ExitStack() as stack:
        for name, turn in decode.batch_tasks(stack, lm, SIZES).items():
            turn()
            calls.clear()
            turn()
            assert [shape for shape, *_ in calls] == [(SIZES.batch, 1)] * SIZES.batch_tokens
            _, held, given = calls[-1]
            if name == "shared":
                assert held is None and given.shape[0] == 1
                continue
            assert held.shape[0] == SIZES.batch and given is None
            apart = {bytes(memoryview(one)) for one in held}
            assert len(apart) == (SIZES.batch if name == "mixed" else 1), name


def test_an_adapter_is_no_larger_than_a_memory(folder):
    for anchor in ("160M", "410M"):
        sizes = models.sizes(anchor, smoke=False)
        fetched = MemoryConfig(ranks=sizes.ranks).fetch_size(sizes.anchor)
        rank = models.lora_rank(sizes.anchor, fetched)
        assert 0.95 * fetched < models.lora_size(sizes.anchor, rank) <= fetched
        assert models.lora_size(sizes.anchor, rank + 1) > fetched
    rank = models.lora_rank(SIZES.anchor, MemoryConfig(ranks=SIZES.ranks).fetch_size(SIZES.anchor))
    for name in models.ADAPTERS:
        stored = mx.load(str(folder / name / "adapters.safetensors"))
        assert sum(value.size for value in stored.values()) == models.lora_size(SIZES.anchor, rank)


def test_a_model_is_loaded_with_the_other_adapter(folder, lm):
    names = models.ADAPTERS
    first, second = (
        models.load_with_adapter(folder / "model", folder / name, mx.float32) for name in names
    )
    for name, model in zip(names, (first, second), strict=True):
        found = dict(tree_flatten(model.parameters()))
        assert {value.dtype for value in found.values()} == {mx.float32}
        stored = mx.load(str(folder / name / "adapters.safetensors"))
        assert stored and all(mx.array_equal(found[key], stored[key]) for key in stored)
    tokens = mx.array(decode.prompts(SIZES, 1, 5))
    outputs = [model(tokens) for model in (first, second, lm.model)]
    assert not any(mx.allclose(outputs[i], outputs[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_a_change_of_memory_moves_all_of_it(folder, lm, monkeypatch):
    reports, held, adapters = [], [], []
    fetch, make_cache = lm.fetch, lm.model.make_cache
    monkeypatch.setattr(models, "load_with_adapter", lambda *where: adapters.append(where[1:]))

    def spy(memory="fetched", text=None):
        fetched = fetch(memory, text)
        reports.append((memory, fetched.report))
        return fetched

    monkeypatch.setattr(lm, "fetch", spy)
    monkeypatch.setattr(
        type(lm.model), "make_cache", lambda self, memory: held.append(memory) or make_cache(memory)
    )
    row = decode.swap(lm, folder, SIZES)
    assert row.id == "swap.lora_vs_memory" and "to route first" in row.detail
    for one, other in zip(adapters, adapters[1:], strict=False):
        assert one[0].name in models.ADAPTERS and one[0] != other[0]
    assert {dtype for _, dtype in adapters} == {mx.float32, mx.bfloat16}
    paths = [report for memory, report in reports if memory != "fetched"]
    assert len(paths) >= 4 and len(paths) < len(reports) == len(held)
    config = lm.bank.config
    for report in paths:
        assert report.bytes == 2 * config.fetch_size()
        assert "kept" not in {block.source for block in report.blocks}
    assert all(memory.shape == (1, config.fetch_size()) for memory in held)


def test_what_cannot_be_measured_is_one_line(tmp_path, capsys):
    arguments = ["--smoke", "--folder", str(tmp_path / "none")]
    assert main(decode.NAME, decode.measure, arguments, decode.options) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        main(decode.NAME, decode.measure, ["--anchor", "9B"], decode.options)


def test_a_smoke_run_has_every_row_and_leaves_nothing(tmp_path):
    path = tmp_path / "rows.json"
    (tmp_path / "disk").mkdir()
    command = [sys.executable, "-m", "benchmarks.decode", "--smoke", "--json", str(path)]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path / "disk")],
        cwd=Path(decode.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "smoke run: the values say nothing" in done.stdout
    assert not any((tmp_path / "disk").iterdir())
    report = json.loads(path.read_text())
    assert report["benchmark"] == "decode" and report["smoke"]
    assert {row["id"]: row["goal"] for row in report["rows"]} == {
        "decode.memory_vs_anchor": ">= 0.88",
        "decode.memory_vs_dense": ">= 1.0",
        "decode.mixed_vs_same": ">= 0.85",
        "decode.mixed_vs_shared": "",
        "decode.prefill_vs_anchor": "",
        "swap.lora_vs_memory": ">= 20",
    }
    details = {row["id"]: row["detail"] for row in report["rows"]}
    assert "bound 0.9" in details["decode.memory_vs_anchor"]
    assert "exactly the anchor's and the memory's" in details["decode.memory_vs_dense"]
    assert all(row["value"] > 0 and "rounds" in row["detail"] for row in report["rows"])
