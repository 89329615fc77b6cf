"""What a command reads goes away while it reads: it ends well, or in one clear line, never wrong.

Folders are moved or removed, files are cut short, disks unmounted or cut off; the server goes on,
and answers as before once everything is back.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest

from tests.reliability.disk_jobs import (
    WRITING,
    Stopping,
    answer,
    generate_words,
    make_small_place,
)
from tests.reliability.disk_mounts import Image, can_cut_off
from tests.reliability.kill_process import Command, run
from tests.reliability.test_disks import Seen
from tests.serving.processes import Served
from tests.tiny import random_texts

pytestmark = pytest.mark.soak

#: Faults of each kind for each command.
FAULTS = 10
#: Commands that read more than they change.
READING = ("train", "merge", "convert", "quantize", "init", "cluster")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_place(tmp_path_factory.mktemp("vanish"))


# ---- what happens to a folder ----------------------------------------------------------


@contextmanager
def in_folder(source: Path, copy_of: Path) -> Iterator[None]:
    """A copy that is a folder like any other."""
    shutil.copytree(copy_of, source)
    try:
        yield
    finally:
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(_away(source), ignore_errors=True)


def _away(source: Path) -> Path:
    return source.with_name("away")


def moved(source: Path) -> Callable[[], object]:
    """Another name; returns what brings it back."""
    source.rename(_away(source))
    return lambda: _away(source).rename(source)


def removed(source: Path) -> Callable[[], object]:
    """Without its files. What brings it back puts them there anew."""
    shutil.copytree(source, _away(source))
    shutil.rmtree(source)
    return lambda: _away(source).rename(source)


def cut_short(source: Path) -> Callable[[], object]:
    """Each file has its first half. What brings it back writes the other half."""
    paths = [path for path in source.rglob("*") if path.is_file()]
    contents = {path: path.read_bytes() for path in paths}
    for path, data in contents.items():
        with path.open("r+b") as file:
            file.truncate(len(data) // 2)
    return lambda: [path.write_bytes(data) for path, data in contents.items()]


class OnImage:
    """A copy on a disk of its own, which can go."""

    def __init__(self) -> None:
        self.disk: Image | None = None

    @contextmanager
    def copy(self, source: Path, copy_of: Path) -> Iterator[None]:
        """As :func:`in_folder`."""
        with Image(source, 128 << 20) as self.disk:
            shutil.copytree(copy_of, source, dirs_exist_ok=True)
            self.disk.sync()
            self.disk.connect()  # so that nothing of it is in memory
            yield

    def cut_off(self, _: Path) -> Callable[[], object]:
        """The disk fails."""
        self.disk.cut_off()
        return self.disk.connect

    def unmounted(self, _: Path) -> Callable[[], object]:
        """The disk is taken out, as far as the system lets it go."""
        self.disk.take_out()
        return self.disk.put_in


def _kinds() -> dict[str, tuple[Callable, Callable]]:
    """Name -> what makes a copy, and what takes it away."""
    found = {kind.__name__: (in_folder, kind) for kind in (moved, removed, cut_short)}
    if can_cut_off():
        image = OnImage()
        found |= {
            "cut_off": (image.copy, image.cut_off),
            "unmounted": (image.copy, image.unmounted),
        }
    return found


# ---- commands --------------------------------------------------------------------------


@pytest.mark.parametrize("name", READING)
def test_what_is_read_goes_away(name, place, tmp_path, scaled, figure):
    source, work = tmp_path / "source", tmp_path / "work"
    with in_folder(source, place):  # what it reads has the same name in every run
        stopping = Stopping.of(WRITING[name], source, tmp_path / "stopping")
        stopping.job.prepare(source, work)
        command = Command(stopping.words(work))
        seconds = command.ended_after()
    seen, rng = Seen(), random.Random(name)

    def check(copy: Callable, take: Callable, share: float) -> str:
        with copy(source, place):
            stopping.job.prepare(source, work)
            command = Command(stopping.words(work))
            command.lives(share * seconds)
            bring_back = take(source)
            ended = command.wait()
            bring_back()
            found = stopping.check_failed(work, ended)
            stopping.finish(work)
            return found

    count = scaled(FAULTS)
    for kind, (copy, take) in _kinds().items():
        for number in range(count):
            share = (number + rng.random()) / count
            seen.see(kind.replace("_", " "), partial(check, copy, take, share))
    seen.tell(figure, f"disks.vanish.{name}", "what it reads, at a random moment")


def test_a_model_that_goes_away_while_it_answers(place, tmp_path, scaled, figure):
    source = tmp_path / "source"
    words, seen, rng = generate_words(source), Seen(), random.Random(0)
    with in_folder(source, place / "model"):
        expected = answer(run(words))
        seconds = Command(words).ended_after()

    def check(copy: Callable, take: Callable, share: float) -> str:
        with copy(source, place / "model"):
            command = Command(words)
            command.lives(share * seconds)
            bring_back = take(source)
            ended = command.wait()
            bring_back()
            assert answer(run(words)) == expected
        if ended.code == 0:
            assert answer(ended) == expected
            return "answered"
        assert ended.code == 2 and ended.complaint and not ended.out, ended
        return "refused"

    count = scaled(FAULTS)
    for kind, (copy, take) in _kinds().items():
        for number in range(count):
            share = (number + rng.random()) / count
            seen.see(kind.replace("_", " "), partial(check, copy, take, share))
    seen.tell(figure, "disks.vanish.generate", "the model, at a random moment")


# ---- the server ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", _kinds())
def test_a_model_that_goes_away_while_it_is_served(kind, place, tmp_path, scaled, figure):
    """Each request is answered as ever or told that it cannot be; the server stays."""
    copy, take = _kinds()[kind]
    source = tmp_path / "source"
    prompts = random_texts(24, seed=5)
    counts = {"right": 0, "refused": 0, "wrong": 0}

    def ask(served: Served, prompt: str) -> httpx.Response:
        body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "memory": "fetched"}
        return served.http.post(f"{served.v1}/completions", json=body)

    def text(response: httpx.Response) -> str:
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["text"]

    every = ["--tier", "1=disk", "--tier", "2=disk", "--tier", "3=disk"]
    with copy(source, place / "model"):
        with Served(source, tmp_path / "expected", *every) as served:
            expected = {prompt: text(ask(served, prompt)) for prompt in prompts}
        with Served(source, tmp_path / "served", *every) as served:
            for _ in range(scaled(FAULTS)):
                for prompt in prompts[:8]:
                    assert text(ask(served, prompt)) == expected[prompt]
                bring_back = take(source)
                for prompt in prompts:
                    response = ask(served, prompt)
                    if response.status_code == 200:
                        right = text(response) == expected[prompt]
                        counts["right" if right else "wrong"] += 1
                    else:
                        assert response.status_code == 500, response.text
                        message = response.json()["error"]["message"]
                        assert "\n" not in message and str(tmp_path) not in message
                        counts["refused"] += 1
                assert served.http.get(f"{served.url}/health").status_code == 200
                bring_back()
                for prompt in prompts:
                    assert text(ask(served, prompt)) == expected[prompt]
            served.signal()
            assert served.wait() == 0
    figure(
        f"disks.vanish.serve {kind.replace('_', ' ')}.wrong", counts["wrong"],
        f"{counts['right']} answered as ever, {counts['refused']} refused while it was away; all "
        "answered as ever once it was back",
    )  # fmt: skip
    assert not counts["wrong"]
