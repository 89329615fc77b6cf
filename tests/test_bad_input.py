"""Bad input on the command line: one line of what and where, exit code 2, nothing written."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlx_hiermem import ClusterTree, cli
from mlx_hiermem.bank.manifest import write_manifest
from tests.tiny import make_tiny_model

SHARD = "memory/level-2-00001-of-00003.safetensors"
GENERATE = ["generate", "--prompt", "gold is", "--max-tokens", "2"]


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("original") / "tiny")


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return shutil.copytree(original, tmp_path / "tiny")


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the last change of everything in a folder."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        stat = path.lstat()
        found[str(path.relative_to(folder))] = (stat.st_size, stat.st_mtime_ns)
    return found


@pytest.fixture
def refused(folder, capsys) -> Callable[..., str]:
    """Runs a command that has to fail, and returns the line that it prints."""

    def run(*arguments: str) -> str:
        before = listing(folder)
        assert cli.main([*arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        return check(captured.err, folder, before)

    return run


def check(line: str, folder: Path, before: dict) -> str:
    assert re.fullmatch(r"mlx_hiermem: error: [^\n]+\n", line), line
    assert "Traceback" not in line and "fault of ours" not in line
    assert listing(folder) == before
    return line


# ---- damage ----------------------------------------------------------------------------


def truncate(name: str, keep: float = 0.5) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return damage


def delete(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_text(text)

    return damage


def edit(name: str, **changes) -> Callable[[Path], None]:
    """Other values in a JSON file."""

    def damage(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(values | changes))

    return damage


def retype(name: str, dtype: str) -> Callable[[Path], None]:
    """The tensors of a file in another dtype."""

    def damage(folder: Path) -> None:
        tensors = {key: array.astype(dtype) for key, array in load_file(folder / name).items()}
        save_file(tensors, folder / name, {"format": "mlx"})

    return damage


def other_tree(branching: int, width: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        centroids = [np.ones((branching**level, width), np.float32) for level in (1, 2)]
        ClusterTree(centroids).save(folder / "memory" / "tree.safetensors")

    return damage


def listed(damage: Callable[[Path], None]) -> Callable[[Path], None]:
    """Damage that the manifest agrees with: the files contradict each other alone."""

    def damage_and_list(folder: Path) -> None:
        damage(folder)
        write_manifest(folder / "memory")

    return damage_and_list


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-7] ^= 0x10
    path.write_bytes(data)


BASE_SHAPE = {
    "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 99,
    "num_attention_heads": 2, "head_dim": 8,
}  # fmt: skip

#: What is done to the folder, and what the line must name: the file, and what to expect or do.
DAMAGE = {
    "no anchor config": (delete("config.json"), r"tiny: no config\.json; expected a model folder"),
    "no weights": (delete("model.safetensors"), r"tiny: the anchor cannot be loaded \(.*No safet"),
    "no tokenizer": (delete("tokenizer.json"), r"tiny: the tokenizer cannot be loaded"),
    "no memory": (lambda folder: shutil.rmtree(folder / "memory"), r"tiny/memory: no such folder"),
    "no memory config": (delete("memory/config.json"), r"memory/config\.json: no such file; "),
    "no manifest": (delete("memory/manifest.json"), r"memory/manifest\.json: no such file; "),
    "no tree": (delete("memory/tree.safetensors"), r"memory/tree\.safetensors: no such file; "),
    "no encoder": (delete("memory/encoder.safetensors"), r"encoder\.safetensors: no such file; "),
    "no generic memory": (delete("memory/generic.safetensors"), r"generic\.saf.*: no such file"),
    "no shard": (delete(SHARD), rf"{SHARD}: no such file; "),
    "shard cut in half": (truncate(SHARD), rf"{SHARD}: truncated.*; .*download"),
    "shard cut in its header": (truncate(SHARD, 0.01), rf"{SHARD}: .*download"),
    "empty shard": (truncate(SHARD, 0), rf"{SHARD}: .*download"),
    "anchor cut in half": (truncate("model.safetensors"), r"model\.safetensors: not a readable "),
    "tree cut in half": (truncate("memory/tree.safetensors"), r"tree\.safetensors: "),
    "shard of another dtype": (
        retype(SHARD, "float16"), rf"{SHARD}: holds float16, but config\.json says dtype float32; ",
    ),
    "bank config of another dtype": (
        edit("memory/config.json", dtype="bfloat16"), r"holds float32, but config\.json says dtype",
    ),
    "anchor of integers": (
        retype("model.safetensors", "int32"), r"tiny: the anchor's .* is stored as .*int32; expect",
    ),
    "another rank": (
        edit("memory/config.json", ranks=[4, 3]), r"level-2-.*shape is .*asks for .*; download",
    ),
    "another branching": (
        edit("memory/config.json", branching=2), r"manifest\.json: does not list level-2",
    ),
    "another level": (
        edit("memory/config.json", ranks=[4, 2, 1], levels=3), r"manifest\.json: does not list",
    ),
    "levels against ranks": (
        edit("memory/config.json", levels=3), r"config\.json: .*levels is 3 but ranks has 2",
    ),
    "an unknown key": (
        edit("memory/config.json", colour=1), r"config\.json: .*unknown key colour; known keys",
    ),
    "memory config that is no JSON": (
        write("memory/config.json", "{"), r"memory/config\.json: not valid JSON",
    ),
    "anchor config that is no JSON": (
        write("config.json", "{"), r"tiny/config\.json: not valid JSON .*; fetch it again",
    ),
    "anchor config that is a list": (
        write("config.json", "[]"), r"tiny/config\.json: no model_type; expected",
    ),
    "anchor config of another width": (
        edit("config.json", hidden_size=32), r"tiny: the anchor cannot be loaded \(.*shape",
    ),
    "anchor config without a width": (
        edit("config.json", hidden_size=None), r"tiny/config\.json: .*hidden_size is None; expect",
    ),
    "anchor config with words for numbers": (
        edit("config.json", head_dim="eight"), r"tiny/config\.json: .*head_dim is 'eight'; expect",
    ),
    "no heads": (
        edit("config.json", num_attention_heads=0), r"config\.json: .*num_attention_heads is 0; ",
    ),
    "anchor of an unknown kind": (
        edit("config.json", model_type="unheard"), r"tiny: the anchor cannot .*unheard.*; fetch",
    ),
    "anchor of another kind": (
        edit("config.json", model_type="llama"), r"tiny: the anchor cannot be loaded \(",
    ),
    "a context of no length": (
        edit("config.json", max_position_embeddings="long"), r"max_position_embeddings is 'long'",
    ),
    "a bank of another anchor": (
        listed(edit("memory/config.json", base_anchor={"name": "x", "shape": BASE_SHAPE})),
        r"tiny/memory: .*trained for .*intermediate_size=99.*this one .*=32.*; use the anchor that",
    ),
    "an encoder that is unknown": (
        listed(edit("memory/config.json", encoder={"type": "ears"})), r"config\.json: .*'ears'",
    ),
    "a tree of another branching": (
        listed(other_tree(2, 16)), r"tree\.safetensors: branching 2.*says 3 and 2; .*download",
    ),
    "a tree of another width": (
        listed(other_tree(3, 8)), r"tree\.safetensors: .*vectors 8 wide, the .* 16; .*download",
    ),
    "a tree that the manifest does not know": (
        other_tree(3, 8), r"tree\.safetensors: .*manifest\.json says .*; copy or download",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_folders(name, folder, refused):
    damage, says = DAMAGE[name]
    damage(folder)
    assert re.search(says, refused(*GENERATE, "--model", str(folder)))


def test_missing_folders(folder, refused, tmp_path):
    line = refused(*GENERATE, "--model", str(tmp_path / "none"))
    assert f"{tmp_path}/none: no such folder; give a model folder" in line
    line = refused(*GENERATE, "--model", str(folder), "--bank", str(tmp_path / "none"))
    assert f"{tmp_path}/none: no such folder" in line
    line = refused("bank", "verify", "--bank", str(tmp_path / "none"))
    assert f"{tmp_path}/none: no such folder; expected the memory folder of a model" in line
    line = refused(*GENERATE, "--model", str(folder / "config.json"))
    assert "config.json: " in line and "folder" in line


@pytest.mark.parametrize(
    "command",
    [
        ["block", "1:0"],
        ["unblock", "1:0"],
        ["checksums"],
        ["names", "--text", "texts.txt"],
        ["remove", "--block", "2:0", "--yes"],
        ["add", "--corpus", "texts.txt", "--name", "mine"],
    ],
    ids=lambda command: command[0],
)
def test_the_cache_of_the_hub_is_not_changed(original, tmp_path, capsys, monkeypatch, command):
    """There a commit's folder would no longer be the commit, and the next download forget it."""
    snapshot = tmp_path / "models--me--tiny" / "snapshots" / ("0" * 40)
    folder = shutil.copytree(original, snapshot)
    (tmp_path / "texts.txt").write_text("gold is a metal\n\niron is another one\n")
    monkeypatch.chdir(tmp_path)
    before = listing(tmp_path)
    assert cli.main(["bank", *command, "--model", str(folder)]) == 2
    line = capsys.readouterr().err
    assert "lies in the cache of the Hub" in line and f"cp -rL {folder} my-model" in line
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", [SHARD, "memory/generic.safetensors", "memory/tree.safetensors"])
def test_verify_finds_a_flipped_bit(name, folder, refused):
    flip_a_bit(folder / name)
    line = refused("bank", "verify", "--model", str(folder))
    assert f"{folder / name}: altered: sha256 is " in line


def test_verify_of_a_truncated_shard(folder, refused):
    truncate(SHARD)(folder)
    for arguments in (["--model", str(folder)], ["--bank", str(folder / "memory"), "--json"]):
        assert f"{SHARD}: truncated" in refused("bank", "verify", *arguments)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--prompt", ""], r"--prompt: it is empty; give"),
        (["--prompt", " \n\t"], r"--prompt: it is empty; give"),
        (["--prompt", "a" * 256], r"prompt has 256 tokens, .* ends at 256.*; shorten"),
        (["--prompt", "gold \udcff"], r"not valid Unicode \(character 6\); give it as UTF-8"),
        (["--path", "3,9"], r"cluster '3' of level 1 does not exist; its clusters are 0 to 2"),
        (["--path", "0,5"], r"cluster 5 of level 2 is not a child of cluster 0 .* are 0 to 2"),
        (["--path", "1"], r"has 1 ids, expected 2"),
        (["--path", "1,4,7"], r"has 3 ids, expected 2"),
        (["--path", "3;50"], r"--path: '3;50' is no cluster path; give one id per level"),
        (["--path", ""], r"--path: '' is no cluster path"),
        (["--path", "1,,4"], r"--path: '1,,4' is no cluster path"),
        (["--path", "1,4.0"], r"--path: '1,4\.0' is no cluster path"),
        (["--path=-1,4"], r"--path: '-1,4' is no cluster path"),
        (["--path", "1,²"], r"--path: '1,²' is no cluster path"),
        (["--path", "1," + "9" * 5000], r"--path: 9+\.\.\. is too large"),
        (["--block", "1"], r"block '1': expected LEVEL:CLUSTER, such as 1:3"),
        (["--block", "1:x"], r"block '1:x': expected LEVEL:CLUSTER"),
        (["--block", "1:2:3"], r"block '1:2:3': expected LEVEL:CLUSTER"),
        (["--block", "1:3"], r"cluster '3' of level 1 does not exist; its clusters are 0 to 2"),
        (["--block", "3:0"], r"level '3' has no memory; levels with memory are 1, 2"),
        (["--block", "0:0"], r"level '0' has no memory"),
        (["--memory-budget", "100"], r"100 bytes cannot hold one block .* give at least 1536"),
        (["--memory-budget", "some"], r"'some' is none; give one above 0"),
        (["--max-tokens", "0"], r"--max-tokens: 0 is out of range; give a number from 1"),
        (["--temp", "-1"], r"--temp: -1\.0 is out of range"),
        (["--temp", "nan"], r"--temp: nan is out of range"),
        (["--top-p", "1.5"], r"--top-p: 1\.5 is out of range; give a number from 0 to 1"),
        (["--seed", "-1"], r"--seed: -1 is out of range"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_values_that_cannot_be(folder, refused, arguments, says):
    line = refused(*GENERATE, "--model", str(folder), *arguments)
    assert re.search(says, line), line
    assert len(line) < 500


def test_stdin_that_is_no_text(folder, refused, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"gold \xff"), "utf-8"))
    assert "stdin is not UTF-8" in refused("generate", "--model", str(folder), "--prompt", "-")


def test_bank_with_a_budget_that_is_too_small(folder, refused):
    line = refused("bank", "inspect", "--model", str(folder), "--memory-budget", "1kB")
    assert "memory budget: 1000 bytes cannot hold one block of level 1 (1536 bytes)" in line


def test_a_bad_chat_template(folder, refused):
    edit("tokenizer_config.json", chat_template="{{ raise_exception('no\nsystem') }}")(folder)
    line = refused(*GENERATE, "--model", str(folder))
    assert "chat template cannot be applied (no system); mend" in line


@pytest.mark.parametrize(
    "command", [["generate"], ["chat", "--prompt", "x"], ["bank"], ["bank", "destroy"]], ids=str
)
def test_wrong_use(command, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(command)
    assert left.value.code == 2
    assert "error: " in capsys.readouterr().err


# ---- the same through the real command -------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mlx_hiermem", *arguments], capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "arguments, damage, says",
    [
        ([*GENERATE, "--path", "9,9"], lambda folder: None, r"cluster '9' of level 1 does not"),
        ([*GENERATE], truncate(SHARD), rf"{SHARD}: truncated"),
        (["bank", "verify"], lambda folder: flip_a_bit(folder / SHARD), rf"{SHARD}: altered"),
        ([*GENERATE], lambda folder: None, None),
    ],
    ids=["path", "truncated", "flipped", "all well"],
)
def test_the_real_command(folder, arguments, damage, says):
    damage(folder)
    before = listing(folder)
    result = command(*arguments, "--model", str(folder))
    if says is None:  # the same call, undamaged, does its work and writes nothing either
        assert result.returncode == 0 and len(result.stdout) == 3
        assert result.stderr.startswith("memory fetched, path ")
        assert listing(folder) == before
        return
    assert result.returncode == 2 and result.stdout == ""
    assert re.search(says, check(result.stderr, folder, before))
