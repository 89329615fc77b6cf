"""Ray's workers make the corpus of the single process, and a killed one loses nothing."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest

from mlx_hiermem import cli
from mlx_hiermem.corpus import ray_runner
from mlx_hiermem.corpus.build import build_corpus
from mlx_hiermem.corpus.config import CorpusConfig
from mlx_hiermem.errors import ConfigError, InputError
from tests.corpus.corpora import files_of, make_documents, make_tiny_bert, write_jsonl
from tests.tiny import make_tiny_model

UNIT = 3000


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("place")
    make_tiny_model(place / "model")
    make_tiny_bert(place / "bert", layers=6, width=192)
    write_jsonl(place / "some.jsonl", make_documents(2000))
    return place


@pytest.fixture(scope="module")
def config(place) -> CorpusConfig:
    return CorpusConfig(
        data=(str(place / "some.jsonl"),), model=str(place / "model"),
        encoder=str(place / "bert"), sequence_length=32, branching=3, levels=2,
        validation=0.1,
    )  # fmt: skip


class Killer(threading.Thread):
    """Kills one of Ray's workers as soon as some units are done."""

    def __init__(self, parts: Path, after: int) -> None:
        super().__init__(daemon=True)
        self.parts, self.after = parts, after
        self.killed: int | None = None
        self.done_then = 0

    def run(self) -> None:
        while len(list(self.parts.glob("*-*.json"))) < self.after:
            time.sleep(0.005)
        for process in psutil.Process().children(recursive=True):
            if "MapWorker" in " ".join(process.cmdline()):
                process.kill()
                self.killed = process.pid
                self.done_then = len(list(self.parts.glob("*-*.json")))
                return


@pytest.mark.slow
def test_two_workers_one_of_them_killed_make_the_same_corpus(place, config, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("RAY_ADDRESS", "")  # not a cluster that happens to be there
    build_corpus(place / "local", config, unit_bytes=UNIT)
    out = place / "ray"
    killer = Killer(out / "work" / "parts", after=5)
    killer.start()
    build_corpus(out, config, ray_runner.RayRunner(2), unit_bytes=UNIT)
    units = -(-(place / "some.jsonl").stat().st_size // UNIT)
    assert killer.killed is not None and killer.done_then < units - 5
    assert files_of(out) == files_of(place / "local")


@pytest.mark.slow
def test_bad_input_found_by_a_worker_is_one_line(place, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("RAY_ADDRESS", "")
    documents = make_documents(100)
    documents[70] = {"txt": "no text"}
    data = write_jsonl(tmp_path / "a.jsonl", documents)
    found = cli.main([
        "cluster", "--out", str(tmp_path / "c"), "--data", str(data), "--model",
        str(place / "model"), "--encoder", str(place / "bert"), "--unit-size", str(UNIT),
        "--runner", "ray", "--workers", "2",
    ])  # fmt: skip
    assert found == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(f'mlx_hiermem: error: {data}: line 71: expected an object with a "text"')


@pytest.mark.slow
def test_gpus_that_nobody_has_are_refused_instead_of_waited_for(config, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "")
    with pytest.raises(ConfigError, match="--worker-gpus is 99.5, but Ray's machines have"):
        build_corpus(tmp_path / "c", config, ray_runner.RayRunner(1, gpus=99.5))


# ---- a worker, without Ray -------------------------------------------------------------


@dataclass(frozen=True)
class Fails:
    error: Exception

    def __call__(self, item: int) -> None:
        if item == 1:
            raise self.error


def test_a_worker_turns_errors_of_bad_input_into_rows():
    worker = ray_runner._Worker(partial(Fails, InputError("line 5: no text")), [0, 1])
    assert worker({"number": 0}) == {"number": 0, "error": "", "text": ""}
    told = {"number": 1, "error": "InputError", "text": "line 5: no text"}
    assert worker({"number": 1}) == told
    full = OSError(28, "No space left on device", "some/file")
    worker = ray_runner._Worker(partial(Fails, full), [0, 1])
    assert worker({"number": 1})["error"] == "FormatError"
    assert "some/file: cannot be read or written (No space left" in worker({"number": 1})["text"]
    worker = ray_runner._Worker(partial(Fails, RuntimeError("a fault of ours")), [0, 1])
    with pytest.raises(RuntimeError):
        worker({"number": 1})


def test_a_worker_whose_encoder_cannot_be_opened_says_so():
    def factory():
        raise ConfigError("encoder: no such model")

    assert ray_runner._Worker(factory, [0])({"number": 0})["text"] == "encoder: no such model"
