"""What docs/serve.md shows, against a server that runs."""

from __future__ import annotations

import contextlib
import io
import re

import httpx
import pytest

from mlx_hiermem.models import find_model
from tests.docs import shell
from tests.docs.pages import blocks
from tests.serving.processes import Served

PAGE = "docs/serve.md"


@pytest.mark.slow
def test_the_client_and_curl(tmp_path):
    shown = {word: block.text for block in blocks(PAGE) for word in ("OpenAI(", "curl ")
             if word in block.text}  # fmt: skip
    assert len(shown) == 2

    def play(command: list[str]) -> tuple[int, str]:
        """curl, as far as the page needs it: not every machine has one."""
        _, url, *options = command
        given = dict(zip(options[::2], options[1::2], strict=True))
        assert set(given) == {"-H", "-d"}
        name, _, value = given["-H"].partition(": ")
        answer = httpx.post(url, headers={name: value}, content=given["-d"], timeout=60)
        answers.append(answer.raise_for_status().json())
        return 0, answer.text

    answers: list[dict] = []
    with Served(find_model("atlas"), tmp_path) as served:
        here = re.compile(r"http://127\.0\.0\.1:8080/v1")
        client = here.sub(served.v1, shown["OpenAI("])
        assert client != shown["OpenAI("]
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(client, {})
        assert said.getvalue().split(maxsplit=1) == ["72.", "[10, 171]\n"]
        text = here.sub(served.v1, shown["curl "])
        shell.run(text, tmp_path, ["curl"], play, tmp_path / "printed.txt")
    [answer] = answers
    assert answer["memory"]["kind"] == "none" and answer["choices"][0]["text"].strip() != "72."
