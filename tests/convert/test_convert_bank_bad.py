"""Banks that are not whole, not consistent, or not what is said of them: one line each."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from mlx_hiermem.convert.bank.description import read_description
from mlx_hiermem.convert.bank.parts import Part
from mlx_hiermem.errors import HierMemError
from tests.convert.banks import plan
from tests.convert.checkpoints import (
    LAYOUTS,
    make_numbers,
    memory_state,
    write_checkpoint,
    write_state,
    write_subtrees,
)

EXAMPLE = make_numbers(ranks=(4, 2), branching=3)


def refuses(bank: Path, words: str, example=EXAMPLE, **options) -> None:
    """Planning raises one line that has the words."""
    with ExitStack() as stack, pytest.raises(HierMemError) as caught:
        plan(example, bank, stack, **options)
    text = str(caught.value)
    assert words in text
    assert "\n" not in text and len(text) < 600


def described(tmp_path: Path, **values) -> Path:
    path = tmp_path / "memory_config.json"
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_matrix_is_missing(tmp_path, layout):
    state = memory_state(EXAMPLE, layout)
    name = {
        "stacked": "memory.level2.w2",
        "per_layer": "layers.1.memory.level2.w2",
        "per_cluster": "memory.level2.4.layers.1.w2",
    }[layout]
    del state[name]
    first = "0 to 8" if layout != "per_cluster" else "4 to 4"
    layer = 0 if layout == "stacked" else 1
    refuses(
        write_state(state, tmp_path), f"level 2, clusters {first}: w2 of layer {layer} is missing"
    )


def test_a_cluster_is_missing(tmp_path):
    state = memory_state(EXAMPLE, "per_cluster")
    gone = [name for name in state if name.startswith(("memory.level2.4.", "memory.level2.5."))]
    for name in gone:
        del state[name]
    refuses(write_state(state, tmp_path), "level 2: clusters 4 to 5 are missing")


def test_the_last_cluster_is_missing(tmp_path):
    state = memory_state(EXAMPLE, "per_cluster")
    for name in [name for name in state if name.startswith("memory.level2.8.")]:
        del state[name]
    where = described(tmp_path, branching=3)
    bank = write_state(state, tmp_path)
    refuses(bank, "level 2: clusters 8 to 8 are missing", memory_config=where)
    refuses(bank, "no powers of one branching")


def test_a_level_is_missing(tmp_path):
    state = {name: one for name, one in memory_state(EXAMPLE).items() if "level2" not in name}
    refuses(
        write_state(state, tmp_path),
        "level 2: clusters 0 to 8 are missing",
        memory_config=described(tmp_path, ranks=[4, 2]),
    )


def test_a_level_is_left_over(tmp_path):
    bank = write_state(memory_state(EXAMPLE), tmp_path)
    where = described(tmp_path, ranks=[4, 0])
    refuses(bank, "has blocks of level 2, but ranks are [4, 0]", memory_config=where)


def test_a_block_is_there_twice(tmp_path):
    state = {**memory_state(EXAMPLE, "per_layer"), **memory_state(EXAMPLE, "stacked")}
    refuses(write_state(state, tmp_path), "leave one out")
    state = {**memory_state(EXAMPLE, "per_cluster"), **memory_state(EXAMPLE, "stacked")}
    where = described(tmp_path, branching=3)
    refuses(write_state(state, tmp_path), "which another tensor has too", memory_config=where)


def test_the_generic_memory(tmp_path):
    bank = write_state(memory_state(EXAMPLE, generic=None), tmp_path, "none")
    refuses(bank, "has no generic memory (memory.generic.*); give --zero-generic")
    state = memory_state(EXAMPLE)
    del state["memory.generic.w3"]
    refuses(write_state(state, tmp_path, "part"), "the generic memory: w3 of layer 0 is missing")
    state = memory_state(EXAMPLE, generic="by level")
    state = {name: one for name, one in state.items() if "generic.level2" not in name}
    refuses(write_state(state, tmp_path, "level"), "the generic memory has levels [1]")
    only = {name: one for name, one in memory_state(EXAMPLE).items() if "generic" in name}
    refuses(write_state(only, tmp_path, "only"), "has no blocks of any level")


def test_subtrees(tmp_path):
    bank = write_subtrees(EXAMPLE, tmp_path / "a", ("stacked",)).bank
    shutil.copy(bank / "subtree-01.pt", bank / "subtree-04.pt")
    refuses(
        bank, "of subtree 4, but branching is 3", memory_config=described(tmp_path, branching=3)
    )
    os.rename(bank / "subtree-04.pt", bank / "subtree_1.pt")
    refuses(bank, "of subtree 1, as subtree-01.pt is")
    os.remove(bank / "subtree_1.pt")
    os.remove(bank / "subtree-01.pt")
    refuses(bank, "level 1: clusters 1 to 1 are missing")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_subtree_is_missing(tmp_path, layout, gone):
    """Whichever: k is read off the deeper levels, or told."""
    bank = write_subtrees(EXAMPLE, tmp_path / "a", (layout,), generic_in="all").bank
    os.remove(bank / f"subtree-{gone:02}.pt")
    where = described(tmp_path, branching=3)
    refuses(bank, f"level 1: clusters {gone} to {gone} are missing", memory_config=where)
    if layout != "per_cluster":
        refuses(bank, f"level 1: clusters {gone} to {gone} are missing")


def test_subtrees_that_overlap(tmp_path):
    bank = write_subtrees(EXAMPLE, tmp_path / "a", ("per_cluster",)).bank
    state = memory_state(EXAMPLE, "per_cluster", subtree=1, generic=None)
    state |= {
        name: one
        for name, one in memory_state(EXAMPLE, "per_cluster", subtree=2).items()
        if name.startswith("memory.level2.6.")
    }
    write_state(state, bank, "subtree-01")
    refuses(bank, "cluster 6 of level 2, expected 3 to 5 in subtree 1")


def test_generic_memories_that_differ(tmp_path):
    bank = write_subtrees(EXAMPLE, tmp_path / "a", ("stacked",), generic_in="all").bank
    state = memory_state(EXAMPLE, subtree=2)
    state["memory.generic.w2"][1, 3, 4] += 1
    write_state(state, bank, "subtree-02")
    refuses(bank, "another generic memory than that of")


def test_generic_memories_are_read_once_to_be_compared(tmp_path, monkeypatch):
    bank = write_subtrees(EXAMPLE, tmp_path / "a", ("per_layer",), generic_in="all").bank
    reads, read = [], Part.read

    def count(part, *arguments):
        reads.append(part)
        return read(part, *arguments)

    monkeypatch.setattr(Part, "read", count)
    with ExitStack() as stack:
        planned = plan(EXAMPLE, bank, stack)
    parts = sum(len(one) for one in planned.generic.values())
    # Each subtree's but the first is compared with the first's.
    assert len(reads) == 2 * (EXAMPLE.branching - 1) * parts


def test_a_subtree_that_is_a_link_out_of_the_folder(tmp_path):
    bank = write_subtrees(EXAMPLE, tmp_path / "a").bank
    os.rename(bank / "subtree-02.pt", tmp_path / "elsewhere.pt")
    os.symlink(tmp_path / "elsewhere.pt", bank / "subtree-02.pt")
    refuses(bank, "is a link out of the folder")


def test_shapes(tmp_path):
    state = memory_state(EXAMPLE)
    state["memory.level2.w3"] = state["memory.level2.w3"].transpose(-1, -2).contiguous()
    bank = write_state(state, tmp_path, "turned")
    where = described(tmp_path, ranks=[4, 2])
    refuses(bank, "it lies the other way: name w3 as transposed", memory_config=where)
    refuses(bank, "name it as transposed in memory_config.json")
    bank = write_state(memory_state(EXAMPLE), tmp_path, "straight")
    where = described(tmp_path, ranks=[4, 2], transposed=["w3"])
    refuses(bank, "take w3 out of transposed", memory_config=where)
    state["memory.level2.w3"] = torch.zeros(9, 2, 2, 17)
    refuses(write_state(state, tmp_path, "wide"), "shape is (9, 2, 2, 17), expected (9, 2, 2, 16)")
    state = memory_state(EXAMPLE)
    state["memory.level1.w1"] = torch.zeros(())
    refuses(write_state(state, tmp_path, "scalar"), "")


def test_another_number_of_layers(tmp_path):
    some = make_numbers(n_layers=3, layers=(0, 2))
    bank = write_state(memory_state(some), tmp_path)
    refuses(bank, "write into memory_config.json which layers have memory", example=some)
    where = described(tmp_path, layers=[0, 5])
    refuses(bank, "layers names layer 5", example=some, memory_config=where)
    bank = write_state(memory_state(some, "per_layer"), tmp_path, "layers")
    where = described(tmp_path, layers=[0])
    refuses(bank, "of layer 2, which has no memory", example=some, memory_config=where)


def test_dtypes(tmp_path):
    state = memory_state(EXAMPLE)
    state["memory.level2.w1"] = state["memory.level2.w1"].half()
    refuses(write_state(state, tmp_path), "is float16, but memory.level1.w1 is float32; give --dt")
    state["memory.level2.w1"] = state["memory.level2.w1"].double()
    refuses(write_state(state, tmp_path), "is float64", dtype="float32")
    state["memory.level2.w1"] = state["memory.level2.w1"].int()
    refuses(write_state(state, tmp_path), "is int32")


def test_a_tree_of_another_shape(tmp_path):
    bank = write_state(memory_state(EXAMPLE), tmp_path)
    refuses(bank, "expected (4, 2, 4, 16)", tree=(4, 2))
    where = described(tmp_path, branching=3, ranks=[4, 2])
    refuses(bank, "branching 3 and 2 levels, the tree branching 3 and 3", tree=(3, 3),
            memory_config=where)  # fmt: skip
    refuses(bank, "the tree branching 4", tree=(4, 2), memory_config=where)


def test_kinds(tmp_path):
    bank = write_state(memory_state(EXAMPLE), tmp_path)
    refuses(bank, "but kind kv has keys, values", memory_config=described(tmp_path, kind="kv"))
    state = {name.replace("w3", "w9"): one for name, one in memory_state(EXAMPLE).items()}
    refuses(write_state(state, tmp_path), "those of no one kind of memory")


@pytest.mark.parametrize(
    "text, words",
    [
        ("[1]", "expected a JSON object"),
        ("{", "not valid JSON"),
        ('{"rank": 1}', "unknown key 'rank'"),
        ('{"kind": "moe"}', "kind is 'moe'"),
        ('{"branching": true}', "wrong type"),
        ('{"ranks": [4, "2"]}', "expected a list of integers"),
        ('{"ranks": [4, -2]}', "expected a list of integers"),
        ('{"transposed": ["w4"]}', "expected names of matrices"),
        ('{"transposed": [["w3"]]}', "expected names of matrices"),
        ('{"alpha": 16}', "alpha is not 2"),
        ("[" * 100_000, "not valid JSON"),
        ('{"encoder": "bert"}', "wrong type"),
    ],
)
def test_descriptions(tmp_path, text, words):
    path = tmp_path / "memory_config.json"
    path.write_text(text)
    with pytest.raises(HierMemError, match="memory_config.json") as caught:
        read_description(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_description_that_is_not_there(tmp_path):
    with pytest.raises(HierMemError, match="cannot be read"):
        read_description(tmp_path / "none.json")


def test_whole_checkpoints_in_the_same_folder_are_no_subtrees(tmp_path):
    """A name that only has the word in it."""
    where = write_checkpoint(EXAMPLE, tmp_path / "mysubtrees", together=False)
    with ExitStack() as stack:
        assert plan(EXAMPLE, where.bank, stack).layouts == ("stacked",)
