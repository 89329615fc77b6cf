"""``python -m tests.browser.held FOLDER ARGUMENTS...``: the command line, with a model that waits.

A prompt with "wait for gate NAME" in it is not answered until the file NAME is in FOLDER; one with
"pause at gate NAME" waits after its first :data:`FIRST` tokens, then takes its time. Of one with
"light at gate NAME", level 1 is not lit up until NAME1 is there, level 2 not until NAME2. So a test
can look at a line of visitors, or at an answer that is being written, for as long as it needs to.
What is left of all visitors when one of them has left is written to :data:`LEFT` in FOLDER.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

#: Tokens before the pause.
FIRST = 5

#: File with "N visitors, M conversations".
LEFT = "left.txt"


def main() -> int:
    from mlx_hiermem.apps.demo.desk import Desk
    from mlx_hiermem.cli import main
    from mlx_hiermem.engine import MemoryLM, Response

    folder, fetch, stream = Path(sys.argv[1]), MemoryLM.fetch, MemoryLM.stream
    light, leave = Desk._light, Desk.leave

    def shut(words: str, text: object, number: object = "") -> bool:
        found = re.search(rf"{words} gate (\w+)", text) if isinstance(text, str) else None
        return found is not None and not (folder / f"{found[1]}{number}").exists()

    def wait(words: str, text: object) -> None:
        while shut(words, text):
            time.sleep(0.01)

    def held_fetch(lm, memory="fetched", text=None, *more, **options):
        wait("wait for", text)
        return fetch(lm, memory, text, *more, **options)

    def held_stream(lm, prompt, *more, **options) -> Iterator[Response]:
        # mlx-lm's generators are closed by name, as the demo does.
        responses = stream(lm, prompt, *more, **options)
        try:
            for count, response in enumerate(responses):
                if count >= FIRST and isinstance(prompt, str) and "pause at" in prompt:
                    wait("pause at", prompt)
                    time.sleep(0.1)  # thousands of tokens: longer than any test waits
                yield response
        finally:
            responses.close()

    def held_light(desk, state) -> None:
        if not shut("light at", state.ask.prompt, state.lit + 1):
            light(desk, state)

    def seen_leave(desk, session) -> None:
        leave(desk, session)
        desk.thread.call(lambda lm: None).result()  # what was asked of it before is done
        text = f"{len(desk.visitors)} visitors, {desk.thread.conversations()} conversations"
        (folder / LEFT).write_text(text, encoding="utf-8")

    MemoryLM.fetch, MemoryLM.stream = held_fetch, held_stream
    Desk._light, Desk.leave = held_light, seen_leave
    return main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
