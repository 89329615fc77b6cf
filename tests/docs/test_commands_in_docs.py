"""Every command of README.md and docs/ is run as a reader would run it, in a small world.

What cannot be run in a test is parsed by the program's own parser; ``ONLY_PARSED`` and
``NOT_EXECUTED`` say what that is, and why. Code within a line is checked too: its options, its
modules, its names and its files have to exist.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_hiermem import cli
from mlx_hiermem.training import adding, curves
from tests.docs import parsing, shell
from tests.docs.pages import REPOSITORY, Block, blocks, pages, spans
from tests.docs.world import BEFORE, NEEDS, SMALL, make_world

#: Commands that are parsed and not run: their words, in this order, and why.
ONLY_PARSED = {
    ("serve",): "it does not end; test_serve_page.py runs it as a process",
    ("demo",): "it does not end; tests/browser open it",
    ("bank", "push", "--hf-path"): "it asks the Hub; tests/hub do it against a server of ours",
    ("evaluate", "lm-eval"): "it loads lm-eval for many seconds; the slow test runs it",
    ("evaluate", "CK,SK"): "it downloads the tasks' data",
    ("evaluate", "boolq"): "it downloads the task's data",
    ("--revision",): "it names a commit on the Hub; tests/hub do it against a server of ours",
}

#: Python blocks that are compiled, imported and held against signatures, and why.
NOT_EXECUTED = {
    ("docs/evaluate.md", "lm_eval.simple_evaluate("): "it downloads the task's data",
    ("docs/hub.md", "download("): "it asks the Hub",
    ("docs/serve.md", "OpenAI("): "it needs the server; test_serve_page.py runs it",
}

#: Pages whose commands train for a while as they stand: `make slow` runs them so.
IN_FULL = ("README.md", "docs/tutorial.md")

#: What names in a block of Python stand for.
NAMES: dict[str, str] = {
    "docs/adding.md": "from pathlib import Path; folder = Path('my-model')",
    "docs/topics.md": "from mlx_hiermem import load; lm = load('my-model'); prompt = 'gold is'",
}

#: Options in the text of programs that are not ours.
FOREIGN = {"--include", "--sparse=always", "--no-deps", "--force-reinstall", "--hostfile", "--json"}

PLAYED = ("mlx_hiermem", "python", "mlx.launch", "make", "pip", "hf", "curl")


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(original, tmp_path, monkeypatch) -> Path:
    """A copy of the world, which is the folder we are in."""
    folder = shutil.copytree(original, tmp_path / "world", symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    return folder


def with_commands(page: str) -> bool:
    return any(block.is_shell or block.language == "python" for block in blocks(page))


PAGES = [page for page in pages() if with_commands(page)]


@pytest.mark.parametrize("page", PAGES)
def test_blocks_of_a_page(page, world, tmp_path, monkeypatch):
    monkeypatch.setattr(adding, "MOST", 2)  # steps of a training without a command
    # Of 16 jobs, drawing takes nearly all of the time.
    monkeypatch.setattr(curves, "draw", lambda *_: None)
    run_page(page, world, tmp_path, full=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", IN_FULL)
def test_blocks_of_a_page_in_full(page, world, tmp_path):
    """The answers and figures that stand below the commands are those that they give."""
    run_page(page, world, tmp_path, full=True)


@pytest.mark.slow
def test_lm_eval_with_tasks_of_ones_own(world, tmp_path):
    NEEDS["docs/evaluate.md"](world)
    shown = (block.text for block in blocks("docs/evaluate.md") if block.is_shell)
    command = shlex.split(next(text for text in shown if "my_task" in text))
    _, printed = run_in_process([*command[1:], "--limit", "2"])
    assert "my_task" in printed


# ---- running ---------------------------------------------------------------------------


def run_page(page: str, world: Path, folder: Path, full: bool) -> None:
    """Run the blocks of a page in their order, in one folder."""
    if page in NEEDS:
        NEEDS[page](world)
    namespace: dict[str, Any] = {}
    exec(NAMES.get(page, ""), namespace)
    said: list[str] = []  # what the block before has printed
    for block in blocks(page):
        for (where, words), prepare in BEFORE.items():
            if where == page and words in block.text:
                prepare(world)
        try:
            if block.is_shell and not block.is_synopsis:
                said = []
                run_shell(block, world, folder, full, said)
            elif block.is_shell:
                check_synopsis(block)
            elif block.language == "python":
                said = [run_python(block, namespace)]
            elif block.language == "text" and full:
                check_output(block, "".join(said))
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{block}: {type(error).__name__}: {error}") from error


def run_shell(block: Block, world: Path, folder: Path, full: bool, said: list[str]) -> None:
    text = block.text.replace("/Volumes/external", f"{world}/external")

    def play_command(command: list[str]) -> tuple[int, str]:
        code, printed = play(command, {} if full else SMALL)
        said.append(printed)
        return code, printed

    shell.run(text, world, PLAYED, play_command, folder / "printed.txt")


def play(command: list[str], small: dict[tuple[str, ...], tuple[str, ...]]) -> tuple[int, str]:
    """What a command prints, and its exit code; or its arguments are checked, and no more."""
    program, *arguments = command
    if program == "mlx.launch":  # two processes; tests/training/test_distributed.py has them
        parsing.parse(["python", *arguments[arguments.index("--") + 2 :]])
        return 0, ""
    if program == "python" and arguments[:2] == ["-m", "mlx_hiermem"]:
        program, arguments = "mlx_hiermem", arguments[2:]
    if program == "mlx_hiermem" and not only_parsed(arguments):
        return run_in_process([*arguments, *smaller(arguments, small)])
    if program in ("mlx_hiermem", "python"):
        parsing.parse([program, *arguments])
    elif program == "make":
        for target in arguments:
            name, equals, _ = target.partition("=")
            known = make_variables() if equals else make_targets()
            assert name in known, f"make {target}: no such name in the Makefile"
    elif program == "pip":
        check_extras(" ".join(arguments))
    else:  # others' programs: hf, curl
        assert arguments
    return 0, ""


class Terminal(io.StringIO):
    """What is printed to it may be of any letters."""

    encoding = "utf-8"


def run_in_process(arguments: list[str]) -> tuple[int, str]:
    out, err = Terminal(), Terminal()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(arguments)
        except SystemExit as left:
            code = int(left.code or 0)
    assert code == 0, f"mlx_hiermem {' '.join(arguments)}: {err.getvalue()[-1000:]}"
    return code, out.getvalue() + err.getvalue()


def only_parsed(arguments: list[str]) -> bool:
    def has(words: tuple[str, ...]) -> bool:
        rest = iter(arguments)
        return all(word in rest for word in words)

    return any(has(words) for words in ONLY_PARSED)


def smaller(arguments: list[str], small: dict[tuple[str, ...], tuple[str, ...]]) -> tuple[str, ...]:
    """The options of ``SMALL`` for the most words that a command begins with."""
    fitting = [words for words in small if tuple(arguments[: len(words)]) == words]
    return small[max(fitting, key=len)] if fitting else ()


def check_synopsis(block: Block) -> None:
    """What stands outside of brackets is parsed, and each option in brackets is known."""
    for line in block.text.splitlines():
        bare = re.sub(r" \[[^\]]*\]| \.\.\.", "", line)
        words = shlex.split(bare, comments=True)
        programs = [words]
        if words[0] == "python" and words[2].endswith(".NAME"):
            package = words[2].removesuffix("NAME")
            programs = [["python", "-m", f"{package}{name}"] for name in names_below(block)]
        for program in programs:
            parsing.parse(program)
            if bare != line:
                start = 2 if program[0] == "mlx_hiermem" else 3
                known = parsing.options(tuple(program[:start]))
                check_options(re.findall(r"\[(--[\w-]+)", line), known)


def names_below(block: Block) -> list[str]:
    """The first column of the table that follows a block."""
    lines = (REPOSITORY / block.page).read_text().splitlines()[block.line :]
    start = next(i for i, line in enumerate(lines) if line.startswith("| `"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("| `"):
            break
        if "`python -m " not in line:  # a command of its own
            rows.append(line.split("`")[1])
    return rows


def check_output(block: Block, said: str) -> None:
    """Each line of a block of output was printed, but for its numbers; ... leaves lines out."""

    def plain(text: str) -> str:
        return re.sub(r"[\d.,]+", "0", " ".join(text.split()))

    printed = [plain(line) for line in said.splitlines()]
    for line in block.text.splitlines():
        if line.strip() not in ("", "..."):
            assert plain(line) in printed, f"{line!r} was not printed, but {said}"


def run_python(block: Block, namespace: dict[str, Any]) -> str:
    """Run a block; its names stay for the next one of the page."""
    tree = ast.parse(block.text, str(block))
    if any(page == block.page and words in block.text for page, words in NOT_EXECUTED):
        check_calls(tree)
        return ""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(tree, str(block), "exec"), namespace)
    return out.getvalue()


def check_calls(tree: ast.Module) -> None:
    """The imports of a block exist, and what is called of them takes the arguments given."""
    namespace: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(compile(ast.Module([node], []), "imports", "exec"), namespace)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[0] in namespace:
            called = eval(ast.unparse(node.func), namespace)
            keywords = {keyword.arg or "": None for keyword in node.keywords}
            inspect.signature(called).bind(*node.args, **keywords)


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.M))


def make_variables() -> set[str]:
    return set(re.findall(r"^(\w+) [?:]= ", (REPOSITORY / "Makefile").read_text(), re.M))


def check_extras(requirements: str) -> None:
    """The extras that are asked of pip are in pyproject.toml."""
    text = (REPOSITORY / "pyproject.toml").read_text()
    table = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    known = set(re.findall(r"^([\w-]+) = ", table, re.M))
    for extra in re.findall(r"(?:mlx-hiermem|\.)\[([\w,-]+)\]", requirements):
        assert set(extra.split(",")) <= known, f"pyproject.toml has no extra {extra}"


# ---- code within a line ----------------------------------------------------------------


@pytest.mark.parametrize("page", pages())
def test_code_within_lines(page):
    wrong = []
    for where, code in spans(page):
        try:
            check_span(code, page)
        except AssertionError as error:
            wrong.append(f"{where}: `{code}`: {error}")
    assert not wrong, "\n".join(wrong)


def check_span(code: str, page: str) -> None:
    words = code.split()
    if words[0] == "python" and words[1:2] == ["-m"] and "NAME" not in code:
        check_options(words, parsing.options(tuple(words[:3])))
    elif words[0] == "make" and len(words) > 1:
        assert set(words[1:2]) <= make_targets(), "no such target in the Makefile"
    elif words[0] == "pip":
        check_extras(code)
    elif words[0] in ("mlx_hiermem", *cli.COMMANDS) and is_command(words):
        command, *rest = words[words[0] == "mlx_hiermem" :]
        action = rest[0] if command == "bank" and rest and not rest[0].startswith("-") else None
        if command == "--help" or command.isupper():
            return
        check_options(rest, parsing.options_of(command, action))
    elif words[0].startswith("--"):
        # Of our own programs, or of one that the page names.
        check_options(words, parsing.every_option() | FOREIGN | options_named_on(page))
    elif re.fullmatch(r"mlx_hiermem(\.\w+)+(\(.*\))?", code):
        check_name(code.partition("(")[0])
    elif re.fullmatch(r"(mlx_hiermem|tests|benchmarks|apps|convert)/[\w./*-]*", code):
        assert list(REPOSITORY.glob(code.rstrip("/"))), "no such file"


def is_command(words: list[str]) -> bool:
    """Whether words that begin with a subcommand's name are a command, and not only a word."""
    return words[0] == "mlx_hiermem" or any(word.startswith("--") for word in words[1:]) or (
        words[0] == "bank" and len(words) > 1
    )  # fmt: skip


def check_options(words: list[str], known: frozenset[str]) -> None:
    for word in words:
        name = word.partition("=")[0].rstrip(",")
        if re.fullmatch(r"--[a-z][\w-]*", name):
            assert {name, word} & known, f"no option {name}"


def options_named_on(page: str) -> frozenset[str]:
    """The options of the programs `python -m ...` that a page names."""
    text = (REPOSITORY / page).read_text()
    modules = set(re.findall(r"python\s+-m\s+((?:benchmarks|apps|tests)(?:\.\w+)*)", text))
    if "benchmarks.studies.NAME" in modules:  # any of those in the tables
        names = re.findall(r"^\| `(\w+)` \|(?!.*`python -m)", text, re.M)
        modules |= {f"benchmarks.studies.{name}" for name in names}
        modules.remove("benchmarks.studies.NAME")
    found = (parsing.options(("python", "-m", name)) for name in modules)
    return frozenset().union(*found)


def check_name(name: str) -> None:
    """A dotted name is a module, or something in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            assert hasattr(found, part), f"no {part} in it"
            found = getattr(found, part)
        return
    raise AssertionError("no such module")


def test_links_of_the_readme_lead_somewhere():
    text = (REPOSITORY / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("https://") or (REPOSITORY / link).exists(), link


def test_what_is_only_parsed_is_still_there():
    """No entry of the lists of exceptions is left over from a command that is gone."""
    shells = [b.text for page in pages() for b in blocks(page) if b.is_shell]
    for words in ONLY_PARSED:
        fits = re.compile(r".*\s".join(map(re.escape, words)), re.S)
        assert any(fits.search(text) for text in shells), words
    for page, words in NOT_EXECUTED:
        assert any(words in block.text for block in blocks(page)), words
