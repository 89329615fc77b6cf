"""Loading from the Hub: which files come, from which commit, and what the cache can do alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.hub.conftest import REPO, contents
from tests.hub.files import File

ANCHOR = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def level(number: int, index: int, count: int = 3) -> str:
    return f"memory/level-{number}-{index:05}-of-{count:05}.safetensors"


LEVEL_1 = level(1, 0, 1)
LEVELS = {LEVEL_1, *(level(number, index) for number in (2, 3) for index in range(3))}


@pytest.fixture(scope="session")
def files(model) -> dict[str, bytes]:
    """What the repository holds: the model, and what nobody should download."""
    return contents(model) | {
        ".gitattributes": b"",
        "README.md": b"# tiny",
        "adapters.safetensors": b"no part of the model",
        "memory/run.py": b"raise SystemExit('run')",
        "memory/weights.bin": b"pickle",
        "modeling_tiny.py": b"raise SystemExit('run')",
        "original/model.safetensors": b"another copy",
        "pytorch_model.bin": b"pickle",
        "tokenizer.py": b"raise SystemExit('run')",
    }


@pytest.fixture(scope="session")
def others(model) -> set[str]:
    """The files of the bank that every part needs."""
    return {name for name in contents(model) if name.startswith("memory/")} - LEVELS


@pytest.fixture
def commit(hub, files) -> str:
    return hub.add(REPO, files)


def test_the_whole_model(hub, commit, find, files, others):
    found = find()
    assert set(found["files"]) == ANCHOR | others | LEVELS
    assert found["commit"] == commit and Path(found["folder"]).name == commit
    assert contents(Path(found["folder"])) == {name: files[name] for name in found["files"]}
    assert all(count == 1 for count in hub.downloads().values())
    assert {"config.json", "memory/manifest.json", LEVEL_1} <= set(hub.downloads())


def test_only_the_part(hub, find_all, files, others):
    parts = [
        ({"levels": [1]}, {LEVEL_1}),
        ({"levels": [1, 2]}, {LEVEL_1, *(level(2, index) for index in range(3))}),
        ({"levels": [3]}, {level(3, index) for index in range(3)}),
        ({"subtrees": [2]}, {LEVEL_1, level(2, 2), level(3, 2)}),
        ({"levels": [2], "subtrees": [0, 1]}, {level(2, 0), level(2, 1)}),
    ]
    for number, _ in enumerate(parts):
        hub.add(f"someone/m{number}", files)
    asked = [{"repo": f"someone/m{number}", **part} for number, (part, _) in enumerate(parts)]
    for found, (_, expected) in zip(find_all(asked), parts, strict=True):
        assert set(found["files"]) == ANCHOR | others | expected
    expected_count = sum(len(ANCHOR | others | expected) for _, expected in parts)
    assert sum(hub.downloads().values()) == expected_count  # and nothing else came and went


def test_more_later_brings_only_what_is_missing(hub, commit, find, find_all):
    first = find(levels=[1])
    hub.requests.clear()
    second, again = find_all([{"levels": [1, 2], "subtrees": [1]}] * 2)
    assert second["folder"] == first["folder"] and again == second
    assert hub.downloads() == {level(2, 1): 1}


def test_one_commit_though_the_branch_moves_between_the_files(hub, commit, find_all, files):
    moved = []

    def move() -> None:
        changed = {name: data + b" " for name, data in files.items()}
        moved.append(hub.add(REPO, changed))

    # As the first large file comes, when the branch has been looked at.
    hub.fail("GET /storage/model.safetensors", do=move)
    found, later = find_all([{"levels": [1]}] * 2)
    assert moved and found["commit"] == commit and later["commit"] == moved[0]
    assert contents(Path(found["folder"])) == {name: files[name] for name in found["files"]}


def test_a_pinned_revision_stays(hub, commit, find_all, files):
    newer = hub.add(REPO, files | {LEVEL_1: files[level(2, 0)]})
    hub.repos[REPO].refs["v1"] = commit
    asked = [{"revision": commit}, {"revision": "v1"}, {}]
    found = find_all([{**one, "levels": [1]} for one in asked])
    assert [one["commit"] for one in found] == [commit, commit, newer]
    # What did not change has the same content hash: it is linked, not downloaded.
    counts = hub.downloads()
    assert counts.pop(LEVEL_1) == 2 and set(counts.values()) == {1}


def test_a_cached_commit_needs_no_request(hub, commit, find):
    found = find(revision=commit, levels=[1])
    hub.requests.clear()
    assert find(revision=commit, levels=[1]) == found
    assert hub.requests == []


def test_offline_afterwards(hub, commit, find, find_all, environment):
    whole = find(subtrees=[1])
    asked = [
        {"subtrees": [1]},
        {"revision": "main", "levels": [1]},
        {"revision": commit, "levels": [2], "subtrees": [1]},
        {"subtrees": [2]},
        {},
        {"repo": "someone/else"},
    ]

    def check(reason: str) -> None:
        *same, lacking, all_of_it, other = find_all(asked)
        assert same == [whole, whole, whole]
        error = lacking["error"]
        files = f"{level(2, 2)}, {level(3, 2)} not in the cache"
        assert error.startswith(f"ConfigError: {REPO}: {files}, and the Hub {reason}")
        assert "\n" not in error
        assert all_of_it["error"].startswith(f"ConfigError: {REPO}: {level(2, 0)}, ")
        start = f"ConfigError: someone/else: no such folder, and the Hub {reason}"
        assert other["error"].startswith(start)

    environment["HF_HUB_OFFLINE"] = "1"
    hub.requests.clear()
    check("may not be asked (HF_HUB_OFFLINE is set); unset it")
    assert hub.requests == []
    del environment["HF_HUB_OFFLINE"]
    hub.close()
    check("cannot be reached (ConnectError: ")


# ---- what goes wrong -------------------------------------------------------------------


def test_a_connection_that_breaks_in_the_middle_of_a_file_goes_on_there(hub, find, files):
    name, chunk = "evaluation/large.safetensors", 10 * 2**20  # what the client writes at once
    content = bytes(range(256)) * 2**16
    hub.add(REPO, files | {name: content})
    hub.fail(f"GET /storage/{name}", after=chunk + 1000)
    found = find(levels=[1])
    assert (Path(found["folder"]) / name).read_bytes() == content
    assert hub.ranges[name] == ["", f"bytes={chunk}-"]


def test_an_interrupted_download_goes_on_with_the_other_files(hub, commit, find):
    hub.fail(f"GET /storage/{level(3, 1)}", status=403, times=99)
    error = find()["error"]
    assert error.startswith(f"ConfigError: {REPO}: ") and "the Hub refuses (403" in error
    there = set(hub.downloads()) - {level(3, 1)}
    assert LEVEL_1 in there
    hub.faults.clear()
    hub.requests.clear()
    assert set(find()["files"]) >= LEVELS
    assert level(3, 1) in hub.downloads() and not ANCHOR & set(hub.downloads())


def test_the_hub_is_down(hub, commit, find):
    hub.fail("GET /api/", status=503, times=99)
    error = find()["error"]
    assert "no such folder, and the Hub answers 503" in error and "try again later" in error


def test_errors_in_one_line(hub, commit, find_all, environment, files):
    hub.add("someone/private", files, private=True)
    hub.add("someone/gated", files, gated=True)
    environment["HF_TOKEN"] = "wrong"
    cases = [
        ("someone/none", None, "the Hub has no such repository, or not for you; check the name"),
        ("someone/private", None, "the Hub has no such repository, or not for you; check the"),
        ("someone/gated", None, "the Hub gives it to those who accepted its terms; accept them"),
        (REPO, "v9", "the Hub has no revision 'v9' of it; give a branch, tag or commit of it"),
        (REPO, "0" * 40, f"the Hub has no revision '{'0' * 40}' of it; give a branch, tag or"),
        ("some one/x", None, "it is no name of a Hub repository; give owner/name"),
    ]
    answers = find_all([{"repo": repo, "revision": revision} for repo, revision, _ in cases])
    for (repo, _, expected), answer in zip(cases, answers, strict=True):
        assert answer["error"].startswith(f"ConfigError: {repo}: no such folder, and {expected}")
        assert "\n" not in answer["error"] and len(answer["error"]) < 400


def test_a_level_that_the_bank_does_not_have(hub, commit, find_all):
    for answer in find_all([{"levels": [4]}, {"subtrees": [3]}]):
        assert answer["error"].startswith("PathError: ")
    assert not LEVELS & set(hub.downloads())


def test_a_repository_with_a_part_of_the_bank(hub, find_all, files):
    hub.add(REPO, {name: data for name, data in files.items() if name != level(3, 2)})
    whole, part = find_all([{}, {"subtrees": [0, 1]}])
    assert f"has no {level(3, 2)}; ask for the levels and subtrees that it has" in whole["error"]
    assert level(3, 1) in part["files"]


def test_a_plain_model_without_a_bank(hub, find, environment, files):
    hub.add(REPO, {name: files[name] for name in ANCHOR})
    found = find(levels=[1])
    assert set(found["files"]) == ANCHOR
    environment["HF_HUB_OFFLINE"] = "1"
    assert find(levels=[1]) == found


def test_no_space(hub, find, files):
    large = File(files[LEVEL_1], large=True, claim=1 << 60)
    hub.add(REPO, files | {LEVEL_1: large})
    error = find(levels=[1])["error"]
    assert f"{REPO}: 1,152,921,504," in error and " bytes to download, but " in error
    assert "set HF_HOME" in error and LEVEL_1 not in hub.downloads()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs ulimit")
def test_a_full_disk(hub, commit, find):
    # No file may have more than 8 KiB: what a write to a full disk is, another errno apart.
    error = find(prefix=("bash", "-c", 'ulimit -f 8; exec "$@"', "bash"))["error"]
    assert "cannot be used (File too large); free some space, or set HF_HOME" in error
