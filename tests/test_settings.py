"""Settings: flags and YAML to a dataclass, where each value came from, and what is refused."""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mlx_hiermem.commands.options import parse_bytes
from mlx_hiermem.commands.settings import add_settings, read_settings, show_settings
from mlx_hiermem.errors import ConfigError, InputError, TrainingError


@dataclass(frozen=True)
class Example:
    data: str = field(metadata={"help": "corpus folder"})
    regime: Literal["anchor", "frozen"] = field(
        default="frozen", metadata={"help": "what learns, 100% of it"}
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "peak", "default": "5e-3 for anchors, else 1e-4"}
    )
    iters: int = 1000
    clip: float = 1.0
    mask: bool = True
    shuffle: Optional[bool] = None  # noqa: UP045 (both ways of writing it have to work)
    ranks: tuple[int, ...] = (4, 2)
    betas: tuple[float, float] = (0.9, 0.95)
    layers: tuple[int, ...] | None = None
    freeze: tuple[str, ...] = ()
    texts: tuple[str, ...] = field(default=(), metadata={"split": False})
    budget: int | None = field(default=None, metadata={"type": parse_bytes, "metavar": "SIZE"})
    save_steps: int = field(default=100, metadata={"flag": "save-every"})
    run: Path = Path("run")
    hidden: str = field(default="x", metadata={"flag": None})

    def __post_init__(self) -> None:
        if self.iters < 1:
            raise TrainingError(f"iters is {self.iters}: expected at least 1")

    @classmethod
    def defaults(cls, given: dict) -> dict:
        return {"learning_rate": 5e-3 if given["regime"] == "anchor" else 1e-4}


def read(*argv: str, cls: type = Example):
    parser = argparse.ArgumentParser()
    add_settings(parser, cls)
    return read_settings(cls, parser.parse_args(argv))


def read_yaml(tmp_path: Path, text: str | bytes, *argv: str):
    path = tmp_path / "settings.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read("-c", str(path), *argv)


def test_flags_of_every_type():
    values = read(
        "--data", "a,b", "--regime", "anchor", "--iters", "10_000", "--clip", "inf", "--no-mask",
        "--shuffle", "--ranks", "256,64", "16", "0", "--betas", "0.8", "0.9", "--layers", "1,2",
        "--freeze", "a,b", "--texts", "x,y.txt", "--budget", "2GB", "--save-every", "5", "--run",
        "out/run", "--learning-rate", "1e-2",
    ).values  # fmt: skip
    assert values == Example(
        data="a,b", regime="anchor", iters=10_000, clip=float("inf"), mask=False, shuffle=True,
        ranks=(256, 64, 16, 0), betas=(0.8, 0.9), layers=(1, 2), freeze=("a", "b"),
        texts=("x,y.txt",), budget=2 * 10**9, save_steps=5, run=Path("out/run"), learning_rate=0.01,
    )  # fmt: skip


def test_a_flag_wins_over_the_file_and_the_file_over_a_default(tmp_path):
    settings = read_yaml(tmp_path, "data: here\niters: 5\nclip: 2\n", "--iters", "7")
    assert (settings.values.data, settings.values.iters, settings.values.clip) == ("here", 7, 2.0)
    assert isinstance(settings.values.clip, float)
    assert settings.sources["data"] == "file" and settings.sources["iters"] == "flag"
    assert settings.sources["mask"] == "default"
    assert list(settings.sources) == list(Example.__dataclass_fields__)


def test_yaml_takes_the_names_of_fields_and_flags_and_numbers_that_yaml_reads_as_text(tmp_path):
    values = read_yaml(
        tmp_path,
        "data: x\nlearning-rate: 1e-4\nsave_every: 3\nranks: [8, 4]\nfreeze: a\nbudget: 1GiB\n"
        "mask: off\nlayers: null\nhidden: y\nrun: a/b\nbetas: 0.5, 0.6\n",
    ).values
    assert values.learning_rate == 1e-4 and values.save_steps == 3 and values.ranks == (8, 4)
    assert values.freeze == ("a",) and values.budget == 1 << 30 and values.mask is False
    assert values.layers is None and values.hidden == "y" and values.run == Path("a/b")
    assert values.betas == (0.5, 0.6)


def test_a_default_may_depend_on_another_setting(tmp_path):
    assert read("--data", "x").values.learning_rate == 1e-4
    assert read("--data", "x", "--regime", "anchor").values.learning_rate == 5e-3
    assert read_yaml(tmp_path, "data: x\nregime: anchor").values.learning_rate == 5e-3
    given = read("--data", "x", "--regime", "anchor", "--learning-rate", "3")
    assert given.values.learning_rate == 3 and given.sources["learning_rate"] == "flag"
    assert read("--data", "x").sources["learning_rate"] == "default"


def test_none_takes_back_what_the_file_sets(tmp_path):
    text = "data: x\nlayers: [1]\nbudget: 5\n"
    settings = read_yaml(tmp_path, text, "--layers", "none", "--budget", "none")
    assert settings.values.layers is None and settings.values.budget is None
    assert settings.sources["budget"] == "flag"


def test_the_table_shows_every_setting_with_its_value_and_source(tmp_path):
    settings = read_yaml(tmp_path, "data: here\n", "--no-mask")
    lines = {line.split()[0]: line.split()[1:] for line in show_settings(settings).splitlines()}
    assert lines["data"] == ["here", "file"] and lines["mask"] == ["no", "flag"]
    assert lines["learning_rate"] == ["0.0001", "default"] and lines["ranks"] == ["4,2", "default"]
    assert lines["layers"] == ["none", "default"] and lines["freeze"] == ["(empty)", "default"]
    assert len(lines) == 1 + len(Example.__dataclass_fields__)
    assert settings.to_dict()["run"] == {"value": "run", "from": "default"}
    many = read("--data", "x", "--freeze", *(f"name{i}" for i in range(100)))
    assert "(100 values)" in show_settings(many)
    assert max(map(len, show_settings(many).splitlines())) < 100


def test_help_shows_defaults_and_imports_no_yaml(capsys):
    parser = argparse.ArgumentParser()
    add_settings(parser, Example)
    words = " ".join(parser.format_help().split())
    for expected in (
        "--learning-rate X peak (default: 5e-3 for anchors, else 1e-4)",
        "--data TEXT corpus folder (required)",
        "what learns, 100% of it (default: frozen)",
        "--regime {anchor,frozen}",
        "--mask, --no-mask (default: yes)",
        "--ranks N [N ...] (default: 4,2)",
        "--budget SIZE",
        "--save-every N",
        "-c FILE",
    ):
        assert expected in words
    assert "--hidden" not in words and "==SUPPRESS==" not in words
    code = "import mlx_hiermem.commands.settings, sys; assert 'yaml' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_flags_do_not_touch_other_arguments_of_the_parser():
    parser = argparse.ArgumentParser()
    add_settings(parser, Example)
    parser.set_defaults(run="the function that the dispatcher calls")
    args = parser.parse_args(["--data", "x", "--run", "folder"])
    assert args.run == "the function that the dispatcher calls"
    assert read_settings(Example, args).values.run == Path("folder")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--iters", "many"], "--iters: found 'many'; expected a whole number"),
        (["--iters", "1.5"], "expected a whole number"),
        (["--clip", "nan"], "--clip: found 'nan'; expected a number"),
        (["--regime", "frozn"], "expected one of anchor, frozen; did you mean frozen?"),
        (["--betas", "1"], "--betas: found 1 values; expected 2 values, each a number"),
        (["--ranks", "4,,2"], "--ranks: found ''; expected a list, each a whole number"),
        (["--budget", "lots"], "--budget: a number of bytes: 'lots' is none"),
        (["--data", ""], "--data: found ''; expected text"),
        (["--iters", "9" * 5000], "--iters: found"),
    ],
)
def test_wrong_flags_are_one_line(argv, words):
    with pytest.raises(InputError) as error:
        read("--data", "x", *argv)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 250


def test_a_missing_setting_is_one_line():
    @dataclass(frozen=True)
    class Two:
        data: str
        run_folder: str

    with pytest.raises(InputError, match="^--data is missing; give it as a flag, or in the file"):
        read("--run-folder", "x", cls=Two)
    with pytest.raises(InputError, match="^--data, --run-folder are missing; give them"):
        read(cls=Two)


def test_errors_of_the_dataclass_come_through():
    with pytest.raises(TrainingError, match="iters is 0"):
        read("--data", "x", "--iters", "0")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: x\nlerning_rate: 1\n", "line 2: 'lerning_rate' is no setting; did you mean learn"),
        ("data: x\nzzz: 1\n", "known are data, regime, learning_rate"),
        ("data: x\niters: 1\niters: 2\n", "line 3: 'iters' is set twice, first in line 2"),
        ("data: x\nsave_steps: 1\nsave-every: 2\n", "'save-every' is set twice, first in line 2"),
        ("data: [1\niters: }\n", "not valid YAML"),
        ("data: x\n\titers: 3\n", "line 2: not valid YAML"),
        ("- data\n- x\n", "holds a list; expected lines such as"),
        ("just words\n", "holds one value; expected lines such as"),
        ("data: x\niters: ten\n", "line 2: 'iters': found 'ten'; expected a whole number"),
        ("data: x\niters: 1.5\n", "'iters': found 1.5; expected a whole number"),
        ("data: x\niters: true\n", "'iters': found true; expected a whole number"),
        ("data: x\niters: null\n", "'iters': found nothing (null); expected a whole number"),
        ("data: 5\n", "line 1: 'data': found 5; expected text, in quotes"),
        ("data: x\nregime: off\n", "'regime': found false; expected one of anchor, frozen"),
        ("data: x\nmask: maybe\n", "'mask': found 'maybe'; expected true or false"),
        ("data: x\nranks: {a: 1}\n", "'ranks': found a mapping; expected a list, each a whole"),
        ("data: x\nranks: [1, [2]]\n", "'ranks': found a list; expected a list, each a whole"),
        ("data: x\nclip: 2024-99-01\n", "line 2: 'clip': not a value (month must be"),
        ("data: !!python/object/apply:os.getcwd []\n", "line 1: 'data': could not determine a con"),
        ("data: !!python/name:os.system\n", "write a plain value"),
        ("? [a, b]\n: x\n", "line 1: a list or mapping as a name; expected a word"),
        ("data: *nowhere\n", "line 1: not valid YAML (found undefined alias"),
        ("data: x\n---\ndata: y\n", "line 2: not valid YAML"),
        (b"data: \x00\n", "not valid YAML"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
        ("data: " + "[" * 5000, "not valid YAML"),
        ("x" * (1 << 20) + "y", "more than 1048576 bytes"),
    ],
)
def test_a_bad_file_is_one_line_that_says_where(tmp_path, text, words):
    with pytest.raises(ConfigError) as error:
        read_yaml(tmp_path, text)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert "settings.yaml" in str(error.value) and len(str(error.value)) < 500


def test_an_alias_cannot_blow_an_error_up(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    with pytest.raises(ConfigError, match="'a0' is no setting"):
        read_yaml(tmp_path, "\n".join(lines))
    bomb = "\n".join(["data: x", "freeze:", *(f"- {line.split(': ', 1)[1]}" for line in lines)])
    with pytest.raises(ConfigError, match="'freeze': found a list; expected a list, each text"):
        read_yaml(tmp_path, bomb)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read("-c", str(tmp_path / "no.yaml"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read("-c", str(tmp_path))
    assert read_yaml(tmp_path, "# nothing yet\n", "--data", "x").values.data == "x"


@given(
    iters=st.integers(1, 10**12),
    rate=st.floats(0, 1e6),
    ranks=st.lists(st.integers(0, 4096), min_size=1, max_size=5),
    data=st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1).filter(
        lambda text: text.strip() == text
    ),
    mask=st.booleans(),
)
def test_flags_and_file_give_the_same_values(tmp_path_factory, iters, rate, ranks, data, mask):
    values = {"iters": iters, "learning_rate": rate, "ranks": ranks, "data": data, "mask": mask}
    path = tmp_path_factory.mktemp("yaml") / "settings.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    from_file = read("--config", str(path)).values
    flags = [
        f"--data={data}", f"--iters={iters}", f"--learning-rate={rate!r}",
        f"--ranks={','.join(map(str, ranks))}", "--mask" if mask else "--no-mask",
    ]  # fmt: skip
    assert read(*flags).values == from_file
    assert from_file.ranks == tuple(ranks) and from_file.learning_rate == rate
