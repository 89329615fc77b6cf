"""Run a block of shell commands as a reader would, with some programs played by a function.

The block goes to a real bash, which does what a shell does: quotes, comments, loops, here documents
and pipes. Where it calls a program that is played, the arguments come here, and the function says
what the program prints and its exit code. So ``mlx_hiermem`` can run in this process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Collection
from pathlib import Path

#: Gets the arguments of a command, the program first; gives its exit code and what it prints.
Player = Callable[[list[str]], tuple[int, str]]

_ASK = r"""
set -eo pipefail
_ask() {
  printf '%s\0' "$#" "$@" >&"$ASK"
  local code
  read -r code <&"$ANSWER"
  cat "$PRINTED"
  return "$code"
}
"""


def run(text: str, folder: Path, programs: Collection[str], play: Player, printed: Path) -> None:
    """Run ``text`` in ``folder``.

    Args:
        programs: those that are played.
        play: plays them, in this thread.
        printed: a file that may be overwritten.

    Raises:
        AssertionError: a command ended with another code than 0.
        Exception: whatever ``play`` raises; the rest of the block is not run then.
    """
    bash = shutil.which("bash")
    assert bash is not None, "there is no bash to run the commands of the docs with"
    functions = "".join(f'{name}() {{ _ask {name} "$@"; }}\n' for name in programs)
    asked, ask = os.pipe()
    answer, answered = os.pipe()
    environment = {**os.environ, "ASK": str(ask), "ANSWER": str(answer), "PRINTED": str(printed)}
    with subprocess.Popen(
        [bash, "-c", _ASK + functions + text],
        cwd=folder, env=environment, pass_fds=(ask, answer), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        os.close(ask)
        os.close(answer)
        output: list[str] = []
        reading = threading.Thread(target=lambda: output.extend(process.stdout or ()))
        reading.start()
        try:
            with open(asked, "rb") as requests, open(answered, "w", buffering=1) as answers:
                while (command := _read(requests)) is not None:
                    code, text = play(command)
                    printed.write_text(text, encoding="utf-8")
                    answers.write(f"{code}\n")
        except BaseException:
            process.kill()
            raise
        finally:
            reading.join()
    assert process.returncode == 0, f"exit code {process.returncode}: {''.join(output)[-2000:]}"


def _read(requests) -> list[str] | None:
    """The next command, or None at the end."""
    count = _text(requests)
    return None if count is None else [_text(requests) or "" for _ in range(int(count))]


def _text(requests) -> str | None:
    data = bytearray()
    while (byte := requests.read(1)) != b"\0":
        if not byte:
            return None
        data += byte
    return data.decode()
