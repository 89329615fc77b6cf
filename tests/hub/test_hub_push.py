"""``bank push``: what is sent, in one commit; what is refused; and what readers then get."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mlx_hiermem.bank.manifest import write_manifest
from mlx_hiermem.bank.writer import write_bank
from mlx_hiermem.config import MemoryConfig
from tests.hub.conftest import REPO, contents
from tests.hub.server import Fault, Hub
from tests.tiny import make_tiny_model

LEVEL_3 = "memory/level-3-00000-of-00003.safetensors"


@pytest.fixture
def push(commands):
    """``bank push --json``, once for each list of arguments after the folder: what each prints."""

    def run(folder: Path, *lines: list[object], repo: str = REPO) -> list[dict]:
        start = ["bank", "push", "--json", "--hf-path", repo, "--model", folder]
        answers = commands(*([*start, *line] for line in lines or [[]]))
        assert all(code == 0 for code, _, _ in answers), answers
        return [json.loads(out) for _, out, _ in answers]

    return run


@pytest.fixture
def refused(commands):
    """``bank push`` that has to fail, once for each list of arguments: the one line of each."""

    def run(*lines: list[object]) -> list[str]:
        found = []
        for code, out, err in commands(*(["bank", "push", *line] for line in lines)):
            assert (code, out, err.count("\n")) == (2, "", 1), err
            assert err.startswith("mlx_hiermem: error: ")
            found.append(err.removeprefix("mlx_hiermem: error: ").rstrip("\n"))
        return found

    return run


def rewrite(folder: Path, value: float) -> None:
    """Put another bank of the same shape in its place."""
    config = MemoryConfig.load(folder / "memory" / "config.json")
    rows = {
        level: np.full((config.clusters(level), config.block_size(level)), value, np.float32)
        for level in config.memory_levels
    }
    write_bank(folder / "memory", config, rows, np.full(config.fetch_size(), value, np.float32))


def without_attributes(hub: Hub) -> dict[str, bytes]:
    """The files of REPO, but for the one that every repository begins with."""
    files = hub.files(REPO)
    del files[".gitattributes"]
    return files


def test_push_then_load_it_whole(hub, command, find, model):
    done = command("bank", "push", "--model", model, "--hf-path", REPO)
    assert (done.returncode, done.stderr.count("error")) == (0, 0), done.stderr
    commit = hub.repos[REPO].refs["main"]
    assert f"{hub.url}/{REPO}: " in done.stdout and f"commit {commit}" in done.stdout
    assert hub.files(REPO) == {
        ".gitattributes": hub.files(REPO)[".gitattributes"],
        **contents(model),
    }
    assert len(hub.repos[REPO].commits) == 2  # the one that made the repository, and this
    found = Path(find()["folder"])
    names = [name for name in contents(model) if name != "README.md"]
    assert contents(found) == {name: contents(model)[name] for name in names}


def test_answering_with_a_part_of_the_bank(hub, command, commands, model):
    commit = hub.add(REPO, contents(model))
    hub.add(REPO, {"config.json": b"{}"})  # what comes after the commit that is pinned
    asked = ["--model", REPO, "--revision", commit, "--levels", "1,2", "--json"]
    done = command("generate", *asked, "--prompt", "hello", "--max-tokens", 2)
    assert done.returncode == 0, done.stderr
    blocks = json.loads(done.stdout)["fetch"]["blocks"]
    assert [block["source"] == "absent" for block in blocks] == [False, False, True]
    assert not any("level-3" in name for name in hub.downloads())
    hub.close()
    ((code, out, err),) = commands(["bank", "verify", *asked])
    assert code == 0, err
    assert Path(json.loads(out)["folder"]).parent.name == commit


def test_push_again_sends_what_has_changed(hub, push, copy):
    first, again = push(copy, [], [])
    assert again["commit"] == first["commit"] == hub.repos[REPO].refs["main"]
    before = contents(copy)
    rewrite(copy, 2.0)
    hub.requests.clear()
    (third,) = push(copy)
    assert third["commit"] != first["commit"] and third["bank_revision"] != first["bank_revision"]
    assert without_attributes(hub) == contents(copy)
    changed = {
        hashlib.sha256(data).hexdigest()
        for name, data in contents(copy).items()
        if name.endswith(".safetensors") and data != before[name]
    }
    sent = [line for line in hub.requests if line.startswith("PUT ")]
    assert sorted(line.rsplit("/")[-1] for line in sent) == sorted(changed)


def test_what_is_sent_and_what_is_not(hub, push, copy):
    (copy / ".DS_Store").write_bytes(b"x")
    (copy / "notes.py").write_text("print()")
    (copy / "optimizer.safetensors").write_bytes(b"x")
    (copy / "LICENSE").write_text("MIT")
    shutil.copytree(copy, copy / "runs" / "old")
    (dry,) = push(copy, ["--dry-run"])
    assert hub.requests == [] and dry["dry_run"] and "commit" not in dry
    (sent,) = push(copy)
    names = {file["file"] for file in sent["files"]}
    assert names == {file["file"] for file in dry["files"]}
    assert names == set(without_attributes(hub))
    assert sent["left_out"] == [".DS_Store", "notes.py", "optimizer.safetensors", "runs"]
    assert "LICENSE" in names and not any(name.startswith("runs") for name in names)


def test_a_folder_without_a_card_gets_one_on_the_hub_only(hub, push, copy):
    (copy / "README.md").unlink()
    config = json.loads((copy / "memory" / "config.json").read_text())
    assert config["base_anchor"]["name"] == "tiny"  # no repository
    (made,) = push(copy)
    card = hub.files(REPO)["README.md"].decode()
    assert made["card"] is True and not (copy / "README.md").exists()
    assert card.startswith("---\n") and "library_name: mlx\n" in card
    assert "pipeline_tag: text-generation" in card and "- mlx-hiermem" in card
    assert "base_model" not in card
    hub.add(REPO, {**hub.files(REPO), "README.md": b"---\nlicense: mit\n---\nby hand"})
    (kept,) = push(copy)
    assert kept["card"] is False and hub.files(REPO)["README.md"].endswith(b"by hand")


def test_private(hub, push, refused, copy):
    push(copy, ["--private"], ["--private"])
    assert hub.repos[REPO].private and len(hub.repos[REPO].commits) == 2
    hub.repos[REPO].private = False
    (line,) = refused(["--hf-path", REPO, "--model", copy, "--private"])
    assert "is public, and --private was given" in line
    assert len(hub.repos[REPO].commits) == 2


def test_a_branch(hub, push, find, copy):
    main = hub.add(REPO, contents(copy))
    rewrite(copy, 3.0)
    (other,) = push(copy, ["--revision", "next/v2"])
    assert hub.repos[REPO].refs == {"main": main, "next/v2": other["commit"]}
    assert find(revision="next/v2", levels=[1])["commit"] == other["commit"]


def test_some_levels(hub, push, refused, find_all, copy):
    (part,) = push(copy, ["--levels", "1,2"], repo="someone/part")
    _, rest = push(copy, ["--levels", "1,2"], ["--levels", "3"])
    assert LEVEL_3 not in hub.files("someone/part") and LEVEL_3 in hub.files(REPO)
    found, whole = find_all([{"repo": "someone/part", "levels": [1, 2]}, {}])
    assert len(found["files"]) == len(part["files"]) - 1  # all but the card
    assert (
        without_attributes(hub) == contents(copy) and len(whole["files"]) == len(contents(copy)) - 1
    )
    rewrite(copy, 2.0)
    (line,) = refused(["--hf-path", REPO, "--model", copy, "--levels", "3"])
    assert "memory/level-1-00000-of-00001.safetensors is of another bank" in line
    assert len(hub.repos[REPO].commits) == 3 and rest["deleted"] == []


def test_a_bank_with_fewer_levels_leaves_no_file_of_the_old_one(hub, push, copy, tmp_path):
    hub.add(REPO, contents(copy))
    smaller = make_tiny_model(tmp_path / "smaller", ranks=(4, 2))
    (sent,) = push(smaller)
    assert LEVEL_3 in sent["deleted"]
    assert {name for name in hub.files(REPO) if name.startswith("memory/")} == {
        name for name in contents(smaller) if name.startswith("memory/")
    }


def test_folders_that_are_not_whole_are_refused(hub, refused, model, tmp_path):
    cases: list[tuple[Path, str]] = [
        (tmp_path / "none", "no such folder; give a model folder on this machine"),
        (tmp_path, "memory: no such folder; expected a model with a bank"),
    ]

    def case(expected: str) -> Path:
        copy = shutil.copytree(model, tmp_path / str(len(cases)))
        cases.append((copy, expected))
        return copy

    (case(".manifest.json.partial: ") / "memory" / ".manifest.json.partial").write_bytes(b"{")
    (case("manifest.json: no such file") / "memory" / "manifest.json").unlink()
    (case("no model*.safetensors") / "model.safetensors").unlink()
    memory = case("run.py: is listed in manifest.json, but nobody would download") / "memory"
    (memory / "run.py").write_text("raise SystemExit('run')")
    write_manifest(memory)
    level = case("altered: ") / LEVEL_3
    data = level.read_bytes()
    level.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (case("truncated: ") / LEVEL_3).write_bytes(data[:-1])
    for name in (LEVEL_3, "model.safetensors"):
        file = case("outside of the folder") / name
        file.unlink()
        file.symlink_to(model / name)
    lines = refused(*(["--hf-path", REPO, "--model", folder] for folder, _ in cases))
    for line, (folder, expected) in zip(lines, cases, strict=True):
        assert expected in line and str(folder) in line
    assert hub.requests == []


def test_what_the_hub_refuses(hub, refused, environment, copy):
    storage = Fault("PUT ", status=403, times=99)

    def meanwhile() -> None:
        hub.add("someone/d", {"config.json": b"{}"})

    hub.fail("POST .*/someone/b/preupload/", do=lambda: hub.faults.append(storage))
    hub.fail("POST .*/someone/c/preupload/", do=lambda: hub.faults.remove(storage))
    hub.fail("POST .*/someone/c/commit/", status=503)
    hub.fail("POST .*/someone/d/preupload/", do=meanwhile)
    cases = [
        ("others/a", "the Hub refuses (403: You don't have the rights"),
        ("a b", "it is no name of a Hub repository; give owner/name"),
        ("someone/b", "the Hub refuses (403: ordered by the test); log in with `hf auth login`"),
        ("someone/c", "the Hub answers 503 (ordered by the test); try again later"),
        ("someone/d", "the Hub refuses (412: A commit has happened since. Please refresh.); som"),
    ]
    lines = refused(*(["--model", copy, "--hf-path", repo] for repo, _ in cases))
    del environment["HF_TOKEN"]
    lines += refused(["--model", copy, "--hf-path", REPO])
    hub.close()
    lines += refused(["--model", copy, "--hf-path", REPO])
    cases.append((REPO, "the Hub refuses (401: Invalid username or password.); log in"))
    cases.append((REPO, "the Hub cannot be reached (ConnectError: "))
    for line, (repo, expected) in zip(lines, cases, strict=True):
        assert line.startswith(f"{repo}: {expected}")
    for made in hub.repos.values():
        assert all("memory/manifest.json" not in files for files in made.commits.values())
