"""``--refetch`` and ``--kv-cache`` of chat and generate, and ``/refetch``."""

from __future__ import annotations

import argparse
import io
import json
import sys

import pytest

from mlx_hiermem import cli, load
from mlx_hiermem.commands.generate import add_refetch_arguments
from mlx_hiermem.conversation import Conversation
from mlx_hiermem.refetch import DEFAULT_KV_CACHE, KV_CACHES, Refetch
from tests.topics import make_chat_models

COUNT = 10


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_chat_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def run(folders, capsys, monkeypatch):
    def command(*arguments, lines=(), model="chat", code=0):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        given = [*arguments, "--model", str(folders[model]), "--max-tokens", str(COUNT)]
        assert cli.main(given) == code
        captured = capsys.readouterr()
        return captured.out.splitlines(), captured.err.splitlines()

    return command


def texts_of_other_topics(lm):
    """Two texts with different paths."""
    words = "gold iron book a king the sea north".split()
    first = words[0]
    return first, next(word for word in words if lm.route(word).ids != lm.route(first).ids)


@pytest.mark.parametrize("kv_cache", KV_CACHES)
@pytest.mark.parametrize("when", ["turn", "never", "tokens:4"])
def test_chat_talks_as_a_conversation_does(run, folders, when, kv_cache):
    lm = load(folders["chat"])
    first, second = texts_of_other_topics(lm)
    conversation = Conversation(lm, refetch=Refetch.parse(when, kv_cache))
    options = ["--refetch", when, "--kv-cache", kv_cache]
    out, err = run("chat", *options, lines=[first, second, first])
    for number, text in enumerate((first, second, first)):
        pieces = list(conversation.answer(text, COUNT))
        last = pieces[-1]
        assert out[1 + number] == "".join(piece.text for piece in pieces)
        assert f"path {','.join(map(str, last.path.ids))}, " in err[number]
        reused = f"; {last.cached_tokens} of {last.prompt_tokens} prompt tokens reused"
        assert (reused in err[number]) == bool(last.cached_tokens)
        assert ("changed" in err[number]) == bool(last.refetches)


def test_chat_changes_its_ways_by_a_command(run, folders):
    lm = load(folders["chat"])
    first, second = texts_of_other_topics(lm)
    conversation = Conversation(lm)
    out, err = run(
        "chat",
        lines=[first, "/refetch never", second, "/refetch turn recompute", second,
               "/refetch tokens:2", first, "/refetch", "/refetch often", "/refetch turn sometimes",
               "/refetch turn keep now", "/refetch tokens:0"],
    )  # fmt: skip
    expected = []
    for text, policy, kv_cache, told in (
        (first, "turn", "keep", None),
        (second, "never", "keep", "refetch never, keys and values: keep"),
        (second, "turn", "recompute", "refetch turn, keys and values: recompute"),
        (first, "tokens:2", "recompute", "refetch tokens:2, keys and values: recompute"),
    ):
        conversation.refetch = Refetch.parse(policy, kv_cache)
        expected += [told] if told else []
        expected.append("".join(piece.text for piece in conversation.answer(text, COUNT)))
    assert out[1:] == expected
    assert len(err) == 4 + 5
    assert all(line.startswith("error: /refetch: ") for line in err[4:])
    assert "kv_cache is 'sometimes'" in err[6] and "expected one or two words" in err[7]


@pytest.mark.parametrize("command", [["chat"], ["generate", "--prompt", "gold"]], ids=["c", "g"])
def test_bad_options_are_one_line(run, command):
    for when in ("sometimes", "tokens:0", "tokens:x"):
        out, err = run(*command, "--refetch", when, code=2)
        assert not out and len(err) == 1
        assert f"error: --refetch is '{when}'; expected never, turn, or tokens:N" in err[0]
    with pytest.raises(SystemExit) as ended:
        run(*command, "--kv-cache", "drop")
    assert ended.value.code == 2


def test_defaults_of_the_options():
    parser = argparse.ArgumentParser()
    add_refetch_arguments(parser, "turn")
    given = parser.parse_args([])
    assert (given.refetch, given.kv_cache) == ("turn", DEFAULT_KV_CACHE)
    for kv_cache in KV_CACHES:
        parser.parse_args(["--kv-cache", kv_cache])


def test_generate_tells_how_often_the_memory_changed(run, folders):
    lm = load(folders["plain"])
    prompt = texts_of_other_topics(lm)[0]
    for when in ("tokens:1", "tokens:3"):
        last = list(lm.stream(prompt, max_tokens=COUNT, refetch=when))[-1]
        options = ["generate", "--prompt", prompt, "--refetch", when]
        out, err = run(*options, "--json", model="plain")
        given = json.loads(out[0])
        assert given["refetches"] == last.refetches
        assert given["path"] == list(last.path.ids)
        assert given["text"] == lm.generate(prompt, max_tokens=COUNT, refetch=when)
        times = "once" if last.refetches == 1 else f"{last.refetches} times"
        assert f"memory changed {times}" in run(*options, model="plain")[1]
    assert last.refetches
    for options in ([], ["--refetch", "never"], ["--refetch", "turn"]):
        given = json.loads(
            run("generate", "--prompt", prompt, "--json", *options, model="plain")[0][0]
        )
        assert "refetches" not in given
