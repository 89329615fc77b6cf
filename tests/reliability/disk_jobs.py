"""The commands, small and all of them, for tests of disks and of memory."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_hiermem.training.checkpoint import holds_run
from tests.reliability.kill_jobs import JOBS, SMALL, Job, make_place
from tests.reliability.kill_process import Before, Ended, run
from tests.reliability.kill_states import Files, States, files_of
from tests.training.runs import arguments
from tests.training.runs import make_place as make_training_place

#: Where in ``place`` the models and corpora of the training tests are.
TRAINING = "training"


def make_small_place(place: Path, ranks: tuple[int, ...] = SMALL) -> Path:
    """What all jobs of this module start from."""
    make_training_place(place / TRAINING)
    return make_place(place, ranks)


def _train(place: Path, work: Path) -> list[str]:
    run = work / "run"
    return arguments(
        place / TRAINING, run, regime="cotrain", freeze="*embed*", bank_dtype="float32", iters=12,
        save_every=3, batch_size=2, memory_budget=2 * 12 * 576,
        resume=(holds_run(run / "state") or (run / "model").exists()) or None,
    )  # fmt: skip


def _cluster(place: Path, work: Path) -> list[str]:
    source = place / TRAINING
    return [
        "cluster", "--data", str(source / "some.jsonl"), "--model", str(source / "anchor"),
        "--encoder", "embeddings", "--sequence-length", "32", "--window", "64", "--branching", "3",
        "--levels", "2", "--validation", "0.1", "--unit-size", "4KiB", "--out",
        str(work / "corpus"),
    ]  # fmt: skip


def _init(place: Path, work: Path) -> list[str]:
    return [
        "init", "--model", str(place / TRAINING / "anchor"), "--config", "64,32,16", "--branching",
        "4", "--mlx-path", str(work / "model"),
    ]  # fmt: skip


def generate_words(model: Path) -> list[str]:
    """``generate`` on a model, with all that it answers as JSON."""
    words = ["generate", "--model", str(model), "--prompt", "what is it?", "--max-tokens", "200"]
    return [*words, "--temp", "0", "--json"]


def answer(ended: Ended) -> tuple[str, list[int]]:
    """What ``generate`` has answered, and with which memory."""
    assert ended.code == 0, ended
    found = json.loads(ended.out)
    return found["text"], found["path"]


#: What writes or changes something, by name.
WRITING = {
    job.name: job
    for job in (
        Job("train", _train, "the run is finished", result="run/model"),
        *(replace(job, name=job.name.removesuffix(" --subtree")) for job in JOBS[:5]),
        Job("init", _init, "model: exists already"),
        Job(
            "cluster",
            _cluster,
            "corpus: is a corpus already",
            result="corpus",
            mark="corpus.json",
            rest="work/",
        ),
    )  # fmt: skip
}
#: What a command that has failed, as opposed to one that was killed, may leave beside the result.
_RESUMED = {"train": "run", "cluster": "corpus"}


@dataclass
class Stopping:
    """A job that something happens to, and what may come of that.

    Attributes:
        place: what it starts from, which stays as it is.
        expected: every state that it may leave behind.
        before: what each process does before the command, where nothing happens to it.
    """

    job: Job
    place: Path
    expected: States
    before: Before
    _place_files: Files

    @classmethod
    def of(cls, job: Job, place: Path, folder: Path, before: Before = None) -> Stopping:
        """Run it once, in ``folder``, to know what it writes."""
        states = States.of(job, place, folder / "reference", before)
        return cls(job, place, states, before, files_of(place))

    def words(self, work: Path) -> list[str]:
        """The arguments now: one that was stopped may have to be told to resume."""
        return self.job.words(self.place, work)

    def check_failed(self, work: Path, ended: Ended) -> str:
        """After a command that has ended by itself, on a disk that can be read.

        Returns:
            "done", or "refused": with one clear line, and nothing lost or left half done.

        Raises:
            AssertionError: anything else.
        """
        state = self.check(work)
        if ended.code == 0:
            assert state == "done", state
            return state
        assert ended.code == 2 and ended.complaint, ended
        names = [path.name for path in work.iterdir()]
        if self.job.source is not None:
            assert names == ["model"]
            if state != "done":
                assert state == "as before" and not hidden(work), hidden(work)
                return "refused"
            assert "it is in force all the same" in ended.complaint, ended
            return "done"
        assert state == "none", state
        assert set(names) <= {_RESUMED.get(self.job.name)}, names
        return "refused"

    def check(self, work: Path) -> str:
        """See that nothing is lost, and that nothing loads and is wrong; see ``States.check``."""
        assert files_of(self.place) == self._place_files, "the sources were changed"
        return self.expected.check(work)

    def finish(self, work: Path) -> None:
        """Run it again, where nothing happens to it: it ends as it always does.

        Only the names that it writes may be in ``work`` by then.
        """
        self.expected.check_ended(work, run(self.words(work), self.before))


def hidden(folder: Path) -> list[str]:
    """Names that are not meant to be seen, in a folder and all below."""
    return [
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.name.startswith(".")
    ]


def empty(folder: Path) -> None:
    """Remove what is in a folder, which stays (something is mounted there)."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lost+found":
            path.unlink()
