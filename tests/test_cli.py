"""The dispatcher, its exit codes, what it leaves unimported, and the fast BLAS."""

from __future__ import annotations

import ctypes
import errno
import json
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest

import mlx_hiermem
from mlx_hiermem import backend, cli
from mlx_hiermem.errors import FormatError, InputError

HEAVY = {"mlx.core", "mlx_lm", "numpy", "transformers", "gradio", "torch"}


def python(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints that runs ``code``."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True
    ).stdout


def modules_after(statement: str) -> set[str]:
    """Names of the modules that a fresh interpreter holds after ``statement``."""
    code = f"import contextlib, io, json, sys\n{statement}\nprint(json.dumps(list(sys.modules)))"
    return set(json.loads(python(code)))


def help_statement(*arguments: str) -> str:
    return (
        "from mlx_hiermem.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        f"    main({[*arguments, '--help']!r})"
    )


@pytest.fixture
def run_command(monkeypatch):
    """Makes ``generate`` run a function of the test."""

    def install(run):
        command = SimpleNamespace(add_arguments=lambda parser: None, run=run)
        monkeypatch.setitem(sys.modules, "mlx_hiermem.commands.generate", command)
        return ["generate"]

    return install


def raising(error: BaseException):
    def run(args):
        raise error

    return run


def test_help_lists_every_command_and_imports_none():
    listed = python("from mlx_hiermem.cli import main; main(['--help'])")
    for name, summary in cli.COMMANDS.items():
        assert name in listed
        assert summary in " ".join(listed.split())
    loaded = modules_after(help_statement())
    assert "mlx_hiermem.cli" in loaded
    assert not HEAVY & loaded
    assert not [name for name in loaded if name.startswith("mlx_hiermem.commands")]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_a_command_loads_no_backend(command):
    loaded = modules_after(help_statement(command))
    assert f"mlx_hiermem.commands.{command}" in loaded
    assert not HEAVY & loaded


def test_help_takes_less_than_half_a_second():
    # Processor time, so that a busy machine does not count against it.
    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    subprocess.run([sys.executable, "-m", "mlx_hiermem", "--help"], check=True, capture_output=True)
    assert spent() - before < 0.5


def test_version(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"mlx_hiermem {mlx_hiermem.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["remember"], ["doctor", "--colour"], ["--model", "x"]])
def test_wrong_use_leaves_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    assert "error" in capsys.readouterr().err


def test_result_of_a_command_is_the_exit_code(run_command):
    assert cli.main(run_command(lambda args: 0)) == 0
    assert cli.main(run_command(lambda args: 7)) == 7


def test_bad_input_is_one_line_and_2(run_command, capsys):
    arguments = run_command(raising(InputError("prompt: it is empty;\nwrite something")))
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err == "mlx_hiermem: error: prompt: it is empty; write something\n"
    assert captured.out == ""


def test_fault_of_ours_is_one_line_and_1(run_command, capsys):
    assert cli.main(run_command(raising(KeyError("rank")))) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("mlx_hiermem: error: KeyError: 'rank'")
    assert "--debug" in captured.err
    assert captured.err.count("\n") == 1


def wrapped(error: Exception) -> FormatError:
    """As an error comes from who took it for a damaged file."""
    try:
        raise FormatError("model: the anchor cannot be loaded; fetch it again") from error
    except FormatError as found:
        return found


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "not enough memory (MemoryError: ); end other programs, or allow"),
        (wrapped(MemoryError()), "not enough memory"),
        (ImportError("a\nb\nOriginal error was: x.so: failed to map segment from it"),
         "not enough memory (x.so: failed to map segment from it)"),
        (RuntimeError("can't start new thread"), "not enough memory"),
        (RuntimeError("[malloc] Unable to allocate 7 bytes."), "not enough memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "not enough memory"),
        (OSError(errno.EIO, "Input/output error", "a/b"), "a/b: Input/output error; check the"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system; check the"),
    ],
)  # fmt: skip
def test_what_the_machine_has_not_is_one_line_and_2(run_command, capsys, error, told):
    assert cli.main(run_command(raising(error))) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"mlx_hiermem: error: {told}")
    assert captured.err.count("\n") == 1 and captured.out == "" and "fault" not in captured.err


@pytest.mark.parametrize("error", [InputError("empty"), KeyError("rank")])
def test_debug_shows_the_traceback(run_command, error):
    with pytest.raises(type(error)):
        cli.main([*run_command(raising(error)), "--debug"])


def test_interrupt_is_130(run_command):
    assert cli.main(run_command(raising(KeyboardInterrupt()))) == 130


def test_output_may_be_cut_off():
    code = (
        "import sys; from types import SimpleNamespace; from mlx_hiermem.cli import main\n"
        "run = lambda args: [print('x' * 1000) for _ in range(1000)]\n"
        "command = SimpleNamespace(add_arguments=lambda parser: None, run=run)\n"
        "sys.modules['mlx_hiermem.commands.generate'] = command\n"
        "sys.exit(main(['generate']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1


def test_public_names_resolve():
    for name in mlx_hiermem.__all__:
        assert getattr(mlx_hiermem, name) is not None
        assert name in dir(mlx_hiermem)
    with pytest.raises(AttributeError, match="no attribute 'memorise'"):
        mlx_hiermem.memorise  # noqa: B018


def test_import_of_the_package_is_light():
    loaded = modules_after("import mlx_hiermem")
    assert not HEAVY & loaded
    assert not [name for name in loaded if name.startswith("mlx_hiermem.")]


def test_preloaded_blas_is_the_one_that_mlx_uses():
    """Where the system has OpenBLAS, matmul gets several times faster; else nothing happens."""
    code = (
        "import sys; from mlx_hiermem import backend\n"
        "loaded = sys.argv[1] == 'yes' and backend.preload_blas()\n"
        "print(int(loaded), backend.matmul_gflops(512, 0.1, cpu=True))"
    )
    plain_loaded, plain = map(float, python(code, "no").split())
    loaded, fast = map(float, python(code, "yes").split())
    assert not plain_loaded
    assert bool(loaded) == (sys.platform == "linux" and has_openblas())
    if loaded and plain < backend.SLOW_GFLOPS:  # else something fast is preloaded for everyone
        assert fast > 3 * plain


def test_preload_after_mlx_does_nothing():
    code = (
        "import ctypes, mlx.core; from mlx_hiermem.backend import preload_blas\n"
        "ctypes.CDLL = None  # would be called\n"
        "print(preload_blas())"
    )
    assert python(code) == "False\n"


def has_openblas() -> bool:
    for name in backend.OPENBLAS:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False
