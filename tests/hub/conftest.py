"""Real processes against a stand-in of the Hub, each with a cache of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub.files import TOKEN
from tests.hub.server import Hub
from tests.tiny import make_tiny_model

ROOT = Path(__file__).parents[2]
REPO = "someone/tiny"

# Downloads, one after the other, in a process of their own: what is asked for is a JSON list, and
# so are the answers.
_FIND = """
import json, sys
from mlx_hiermem.bank.parts import Part
from mlx_hiermem.errors import HierMemError
from mlx_hiermem.hub import download
answers = []
for asked in json.loads(sys.argv[1]):
    part = Part.of(asked.get("levels"), asked.get("subtrees"))
    part = None if part.whole else part
    try:
        found = download(asked["repo"], asked.get("revision"), part)
    except HierMemError as error:
        answers.append({"error": f"{type(error).__name__}: {error}"})
    else:
        files = [path.relative_to(found.folder).as_posix() for path in found.folder.rglob("*")
                 if path.is_file()]
        answers.append({"folder": str(found.folder), "commit": found.commit, "files": files})
print(json.dumps(answers))
"""


# Commands, one after the other, in a process of their own: starting one costs most of the time.
_RUN = """
import contextlib, io, json, sys
from mlx_hiermem import cli
answers = []
for line in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(line)
    answers.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(answers))
"""


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A tiny model; levels 2 and 3 of its bank have one file for each of three subtrees."""
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", ranks=(4, 2, 1))
    (folder / "README.md").write_text("---\nlibrary_name: mlx\n---\n\n# tiny\n")
    return folder


@pytest.fixture
def copy(model, tmp_path) -> Path:
    """A copy of the model, to be changed."""
    return shutil.copytree(model, tmp_path / "copy")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture
def environment(hub, tmp_path) -> dict[str, str]:
    """What the processes see; tests may change it."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("HF_", "HUGGING")) and not key.lower().endswith("_proxy")
    }
    return kept | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",  # the stand-in stores large files as LFS does
        "HF_TOKEN": TOKEN,
    }


@pytest.fixture
def command(environment) -> Callable[..., subprocess.CompletedProcess]:
    """``mlx_hiermem`` with these arguments."""

    def run(*arguments: object) -> subprocess.CompletedProcess:
        return _run([sys.executable, "-m", "mlx_hiermem", *map(str, arguments)], environment)

    return run


@pytest.fixture
def commands(environment) -> Callable[..., list[tuple[int, str, str]]]:
    """``mlx_hiermem`` with one list of arguments after the other: code, stdout, stderr of each."""

    def run(*lines: list[object]) -> list[tuple[int, str, str]]:
        text = json.dumps([list(map(str, line)) for line in lines])
        done = _run([sys.executable, "-c", _RUN, text], environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture
def find_all(environment) -> Callable[..., list[dict[str, Any]]]:
    """For each ``{"repo", "revision", "levels", "subtrees"}`` what ``hub.download`` gives: folder,
    commit and files, or ``{"error": ...}``; in one process."""

    def run(asked: list[dict[str, Any]], prefix: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        text = json.dumps([{"repo": REPO, **one} for one in asked])
        done = _run([*prefix, sys.executable, "-c", _FIND, text], environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture
def find(find_all) -> Callable[..., dict[str, Any]]:
    """One download in a process of its own."""

    def run(prefix: tuple[str, ...] = (), **asked: Any) -> dict[str, Any]:
        return find_all([asked], prefix)[0]

    return run


def _run(line: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        line, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
