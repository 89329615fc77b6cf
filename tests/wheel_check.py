"""``python -m tests.wheel_check``: the wheel in an empty environment of this Python.

Builds it, installs it with what it depends on, asks every subcommand for its help, and the model
that ships for an answer. Needs a package index. Not a test, because of that and of its timing.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "mlx_hiermem", "apps", "convert")
#: Seconds for the help of a subcommand: the best of some, so that a busy machine is not blamed.
LIMIT, TRIES = 0.5, 5
PROMPT = "The atomic number of hafnium is"


def main() -> int:
    with tempfile.TemporaryDirectory() as place:
        python = install(Path(place))
        version = said(python, "--version")
        print(f"{version.strip()}: installed")
        late = []
        for command in ["", *subcommands(python)]:
            seconds = min(help_seconds(python, command) for _ in range(TRIES))
            print(f"  {command or '(none)':12} --help  {seconds:.2f} s")
            if seconds > LIMIT:
                late.append(command)
        told = [python, "-m", "mlx_hiermem", "generate", "--model", "atlas", "--prompt", PROMPT]
        answer = subprocess.run(told, cwd=place, check=True, capture_output=True, text=True).stdout
        print(f"  {PROMPT}{answer.rstrip()}")
        assert "72" in answer, answer
    if late:
        print(f"slower than {LIMIT} s: {', '.join(late)}")
    return 1 if late else 0


def install(place: Path) -> str:
    """Build the wheel, and install it; the environment's Python."""
    source = place / "source"
    source.mkdir()
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(path, source)
    venv.create(place / "env", with_pip=True)
    python = str(place / "env" / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(place), str(source)], check=True)
    (wheel,) = place.glob("*.whl")
    subprocess.run([*pip, "install", str(wheel)], check=True)
    shutil.rmtree(source)
    return python


def subcommands(python: str) -> list[str]:
    return said(python, "-c", "from mlx_hiermem.cli import COMMANDS; print(*COMMANDS)").split()


def help_seconds(python: str, command: str) -> float:
    begun = time.perf_counter()
    said(python, "-m", "mlx_hiermem", *([command] if command else []), "--help")
    return time.perf_counter() - begun


def said(python: str, *arguments: str) -> str:
    return subprocess.run(
        [python, *arguments], check=True, capture_output=True, text=True, cwd="/"
    ).stdout


if __name__ == "__main__":
    sys.exit(main())
