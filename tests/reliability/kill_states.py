"""What may be found after a command was stopped: nothing that loads and is wrong."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mlx_hiermem import cli, load
from mlx_hiermem.bank.journal import JOURNAL
from mlx_hiermem.bank.manifest import MANIFEST
from mlx_hiermem.corpus.folder import file_sha256
from tests.reliability.kill_jobs import Job, K
from tests.reliability.kill_process import Before, Ended, run

#: Name -> sha256 of each file of a folder.
Files = dict[str, str]


def files_of(folder: Path, rest: str | None = None) -> Files:
    """The sha256 of every file in a folder, by its name in it; not of names that begin with
    ``rest``."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {
        name: file_sha256(folder / name)
        for name in sorted(names)
        if rest is None or not name.startswith(rest)
    }


def verify(model: Path) -> Ended:
    """``bank verify``, which reads every byte of a bank; in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = cli.main(["bank", "verify", "--model", str(model), "--json"])
    return Ended(code, out.getvalue(), err.getvalue())


@dataclass
class States:
    """Every state that a job may leave behind.

    Attributes:
        last: the files of the result when the job was done.
        banks: revision -> the files of the bank, in the order of the states.
        answers: revision -> what a model with that bank answers, for a job that changes a model.
        known: the sha256 of every file in any of them.
    """

    job: Job
    last: Files = field(default_factory=dict)
    banks: dict[str, Files] = field(default_factory=dict)
    answers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, job: Job, place: Path, folder: Path, before: Before = None) -> States:
        """Make them, in ``folder``: by running the command, and by ``job.between``.

        Args:
            before: called in the new process, before the command.
        """
        states, work = cls(job), folder / "work"
        if job.source is not None:
            states._enter(place / job.source)
        for change in job.between:
            job.prepare(place, work)
            change(work / "model")
            states._enter(work / "model")
        job.prepare(place, work)
        ended = run(job.words(place, work), before)
        assert ended.code == 0, ended
        states.last = states._enter(work / job.result)
        expected = 1 + (job.source is not None) + len(job.between)
        assert len(states.banks) in (0, expected) and job.done(work)
        shutil.rmtree(work)
        return states

    def _enter(self, result: Path) -> Files:
        """Note a state; its bank has to be what it says of itself."""
        files = files_of(result)
        self.known |= set(files.values())
        if (result / "memory").exists():
            revision = _revision(verify(result))
            self.banks[revision] = files_of(result / "memory")
            if self.job.source is not None:
                self.answers[revision] = _answers(result)
        return files

    # ---- after a command was stopped ---------------------------------------------------

    def check(self, work: Path) -> str:
        """See that nothing in ``work`` loads and is wrong.

        Returns:
            "as before", "between" or "done": the state of what is there; "none": no result.

        Raises:
            AssertionError: something does.
        """
        if self.job.result == "model":
            self._check_files(work)
        if self.job.source is not None:
            return self._check_changed(work / "model")
        result = work / self.job.result
        hidden = result.parent / f".{result.name}.partial"
        if self.banks and hidden.exists():
            self._check_hidden(hidden)
        if not self.job.done(work):
            if self.banks:
                ended = verify(result)
                assert ended.code == 2 and "no such" in ended.complaint, ended
            return "none"
        assert files_of(result, self.job.rest) == self.last
        if self.banks:
            _revision(verify(result))
        return "done"

    def _check_files(self, work: Path) -> None:
        """Also of files that have no name yet: one that can be read is one of those known."""
        for path in (path for path in work.rglob("*") if path.is_file()):
            if _loads(path):
                name = path.relative_to(work)
                assert file_sha256(path) in self.known, f"loads and is wrong: {name}"

    def _check_hidden(self, model: Path) -> None:
        """A model in the making: nobody opens it, but if it opens, it is right."""
        ended = verify(model)
        if ended.code == 0:
            (whole,) = self.banks.values()
            for name, sha256 in files_of(model / "memory").items():
                # The manifest may have been written before the last of the files.
                assert name == MANIFEST or whole[name] == sha256
        else:
            assert ended.code == 2 and ended.complaint

    def _check_changed(self, model: Path) -> str:
        ended = verify(model)
        revision = _revision(ended)
        assert revision in self.banks, f"a bank that never was: {revision}"
        found = {one["file"]: one["sha256"] for one in json.loads(ended.out)["files"]}
        found[MANIFEST] = self.banks[revision][MANIFEST]  # it is what the revision was read from
        assert found == self.banks[revision]
        assert _answers(model) == self.answers[revision]
        number = list(self.banks).index(revision)
        return ("as before", *["between"] * (len(self.banks) - 2), "done")[number]

    def check_ended(self, work: Path, ended: Ended) -> None:
        """See that a command that was run again has come to the end that it always comes to."""
        if ended.code != 0:  # it had come to its end before it was stopped
            assert ended.code == 2 and self.job.again in ended.complaint, ended
        assert files_of(work / self.job.result, self.job.rest) == self.last
        assert [path.name for path in work.iterdir()] == [self.job.result.split("/")[0]]


def _revision(ended: Ended) -> str:
    assert ended.code == 0, ended
    return json.loads(ended.out)["revision"]


def _answers(model: Path) -> tuple[str, ...]:
    """What a model writes along paths to its first leaf and its last one."""
    lm = load(model, tiers="disk")
    with lm.bank as bank:
        config = bank.config
        assert lm.tree.roots == config.roots
        last = [config.roots * K**level - 1 for level in range(config.levels)]
        paths = ((0,) * config.levels, tuple(last))
        return tuple(lm.generate("gold", path, max_tokens=8) for path in paths)


def _loads(path: Path) -> bool:
    """Whether a file is whole for who reads such files."""
    name = path.name.removesuffix(".partial")
    try:
        if name.endswith(".safetensors"):
            with safe_open(path, framework="numpy"):
                return True
        if name.endswith(".json") and not name.endswith((MANIFEST, JOURNAL)):
            json.loads(path.read_text(encoding="utf-8"))
            return True
    except (SafetensorError, ValueError, OSError):
        pass
    return False
