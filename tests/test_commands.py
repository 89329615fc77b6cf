"""generate, chat and bank on a whole model: what they print, and where."""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from mlx_hiermem import MemoryBank, cli, load
from tests.tiny import make_tiny_model

PROMPT = "what is the capital?"
COUNT = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def lm(folder):
    """The same model through the API: what the commands have to agree with."""
    return load(folder)


@pytest.fixture(scope="module")
def templated(folder, tmp_path_factory) -> Path:
    """The model with a chat template."""
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("models") / "chat")
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{% for m in messages %}{{ m.role[0] + ':' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    return copy


@pytest.fixture
def run(folder, capsys):
    def command(*arguments: str, model: Path = folder) -> tuple[str, str]:
        assert cli.main([*arguments, "--model", str(model)]) == 0
        captured = capsys.readouterr()
        return captured.out, captured.err

    return command


@pytest.fixture
def answer(run):
    """``generate --json`` on PROMPT; the parsed object."""

    def command(*arguments: str, prompt: str = PROMPT, **options) -> dict:
        out, err = run(
            "generate", "--prompt", prompt, "--max-tokens", str(COUNT), "--json", *arguments,
            **options,
        )  # fmt: skip
        assert err == "" and out.count("\n") == 1
        return json.loads(out)

    return command


# ---- generate --------------------------------------------------------------------------


def test_json_fields(answer, lm):
    given = answer()
    assert list(given) == [
        "text", "path", "memory", "fetch", "prompt_tokens", "generation_tokens",
        "generation_tps", "peak_memory",
    ]  # fmt: skip
    assert list(given["fetch"]) == ["bytes", "ms", "blocks"]
    for block in given["fetch"]["blocks"]:
        assert list(block) == ["level", "cluster", "bytes", "ms", "source", "blocked"]
    assert given["text"] == lm.generate(PROMPT, max_tokens=COUNT)
    assert given["path"] == list(lm.route(PROMPT).ids)
    assert given["memory"] == "fetched"
    assert given["prompt_tokens"] == len(PROMPT)
    assert given["generation_tokens"] == COUNT
    assert given["generation_tps"] > 0 and given["peak_memory"] > 0


def test_bytes_are_the_block_sizes_of_the_config(answer, lm):
    fetch = answer()["fetch"]
    sizes = [lm.bank.config.block_bytes(level) for level in (1, 2)]
    assert sizes == [4 * 2 * 3 * 16 * 4, 2 * 2 * 3 * 16 * 4]  # rank, layers, M1 to M3, d, float32
    assert [block["bytes"] for block in fetch["blocks"]] == sizes
    assert fetch["bytes"] == sum(sizes)
    assert fetch["ms"] >= sum(block["ms"] for block in fetch["blocks"]) > 0
    assert [block["level"] for block in fetch["blocks"]] == [1, 2]
    assert [block["source"] for block in fetch["blocks"]] == ["resident", "disk"]


def test_memory_none_and_generic_say_so(answer, lm):
    none = answer("--memory", "none")
    assert none["memory"] == "none" and none["path"] is None
    assert none["fetch"] == {"bytes": 0, "ms": 0, "blocks": []}
    generic = answer("--memory", "generic")
    assert generic["memory"] == "generic" and generic["path"] is None
    assert [block["cluster"] for block in generic["fetch"]["blocks"]] == [None, None]
    assert generic["fetch"]["bytes"] == answer()["fetch"]["bytes"]
    assert len({none["text"], generic["text"], answer()["text"]}) == 3


def test_path_overrides_the_memory(answer, lm):
    given = answer("--path", " 1, 4", "--memory", "none")
    assert given["memory"] == "path" and given["path"] == [1, 4]
    assert [block["cluster"] for block in given["fetch"]["blocks"]] == [1, 4]
    assert given["text"] == lm.generate(PROMPT, (1, 4), COUNT)
    assert given["text"] != answer()["text"]


def test_a_blocked_block_reads_nothing_and_changes_the_answer(answer, lm):
    path = lm.route(PROMPT).ids
    free, blocked = answer(), answer("--block", f"1:{path[0]}")
    first, second = blocked["fetch"]["blocks"]
    assert (first["bytes"], first["blocked"], first["source"]) == (0, True, "blocked")
    assert (second["bytes"], second["blocked"]) == (lm.bank.config.block_bytes(2), False)
    assert blocked["fetch"]["bytes"] == second["bytes"]
    assert blocked["path"] == free["path"] and blocked["text"] != free["text"]
    both = answer("--block", f"1:{path[0]}", "--block", f"2:{path[1]}")
    assert both["fetch"]["bytes"] == 0 and both["memory"] == "fetched"
    assert both["text"] == answer("--memory", "none")["text"]
    other = answer("--block", f"1:{(path[0] + 1) % 3}")
    assert other["text"] == free["text"] and other["fetch"]["bytes"] == free["fetch"]["bytes"]


def test_seeds_reproduce_and_differ(answer):
    def sample(*arguments: str) -> str:
        return answer("--temp", "3", *arguments)["text"]

    assert sample("--seed", "1") == sample("--seed", "1") != sample("--seed", "2")
    # So narrow a nucleus holds the likeliest token alone, and one of nothing has to hold one.
    for share in ("0.0001", "1e-9", "0"):
        assert sample("--top-p", share, "--seed", "1") == answer()["text"]
    # No float32 is the inverse of it.
    assert answer("--temp", "1e-40")["text"] == answer()["text"]


def test_the_answer_goes_to_stdout_and_the_report_to_stderr(run, lm):
    out, err = run("generate", "--prompt", PROMPT, "-m", str(COUNT))
    assert out == lm.generate(PROMPT, max_tokens=COUNT) + "\n"
    path = lm.route(PROMPT).ids
    head, titles, first, second, speed = err.splitlines()
    assert head == f"memory fetched, path {path[0]},{path[1]}"
    assert titles.split() == ["level", "cluster", "bytes", "ms", "source", "blocked"]
    for line, expected in ((first, ["1", path[0], "1,536"]), (second, ["2", path[1], "768"])):
        assert line.split()[:3] == list(map(str, expected))
        assert line.split()[5] == "no"
    assert first.split()[4] == "resident" and second.split()[4] == "disk"
    assert f"prompt {len(PROMPT)} tokens" in speed and f"answer {COUNT} tokens" in speed


def test_the_answer_is_written_as_it_comes(run, lm, monkeypatch):
    seen = []

    class Watched(io.StringIO):
        def flush(self) -> None:
            seen.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Watched())
    run("generate", "--prompt", PROMPT, "-m", str(COUNT))
    text = lm.generate(PROMPT, max_tokens=COUNT)
    assert [part for part in seen if part in text] == [text[: i + 1] for i in range(COUNT)]


def test_text_report_of_other_memories(run, lm):
    def report(*arguments: str) -> list[str]:
        return run("generate", "--prompt", PROMPT, "-m", "1", *arguments)[1].splitlines()

    assert report("--memory", "none")[0] == "memory none (nothing is fetched)"
    generic = report("--memory", "generic")
    assert generic[0] == "memory generic" and generic[2].split()[:2] == ["1", "generic"]
    blocked = report("--block", f"2:{lm.route(PROMPT).ids[1]}")
    assert blocked[3].split()[2::2] == ["0", "blocked"] and blocked[3].endswith("yes")


@pytest.mark.parametrize("end", ["", "\n"])
def test_prompt_from_stdin_without_the_shells_newline(answer, monkeypatch, end):
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT + end))
    given = answer(prompt="-")
    assert given["prompt_tokens"] == len(PROMPT)
    assert given["text"] == answer()["text"]


def test_a_prompt_in_any_script(answer):
    given = answer(prompt="naïve 東京 🙂")
    assert given["prompt_tokens"] == len("naïve 東京 🙂".encode())


def test_memory_budget_and_bank(answer, folder, tmp_path):
    plenty, little = answer(), answer("--memory-budget", "2kB")
    assert [block["source"] for block in little["fetch"]["blocks"]] == ["disk", "disk"]
    assert little["text"] == plenty["text"]
    bank = make_tiny_model(tmp_path / "other", seed=1) / "memory"
    other = answer("--bank", str(bank), "--path", "0,0")
    assert other["text"] != answer("--path", "0,0")["text"]


def test_a_chat_template_is_applied_but_not_routed_on(answer, templated, lm):
    given = answer(model=templated)
    framed = f"u:{PROMPT}\na:"
    assert given["prompt_tokens"] == len(framed)
    assert given["path"] == list(lm.route(PROMPT).ids)
    expected = [piece.text for piece in lm.stream(framed, max_tokens=COUNT, route_on=PROMPT)]
    assert given["text"] == "".join(expected)
    plain = answer("--ignore-chat-template", model=templated)
    assert plain["text"] == answer()["text"] != given["text"]


def test_the_real_command_prints_json_alone(folder, lm):
    result = subprocess.run(
        [sys.executable, "-m", "mlx_hiermem", "generate", "--model", str(folder), "--json",
         "--prompt", PROMPT, "--max-tokens", str(COUNT)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(result.stdout)["text"] == lm.generate(PROMPT, max_tokens=COUNT)
    assert result.stderr == ""


# ---- chat ------------------------------------------------------------------------------


@pytest.fixture
def chat(run, monkeypatch):
    """Feeds lines to ``chat``; returns what it printed to stdout, by line, and to stderr."""

    def talk(*lines: str, options: tuple[str, ...] = (), **model) -> tuple[list[str], list[str]]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        out, err = run("chat", "--max-tokens", str(COUNT), *options, **model)
        return out.splitlines(), err.splitlines()

    return talk


def test_without_a_template_each_line_is_a_prompt(chat, lm):
    out, err = chat("gold is", "", "iron is", "/quit", "never read")
    assert "no chat template: each line is a prompt of its own" in out[0]
    assert out[1:] == [lm.generate(text, max_tokens=COUNT) for text in ("gold is", "iron is")]
    path = lm.route("iron is").ids
    assert len(err) == 2
    assert err[1].startswith(f"[memory fetched, path {path[0]},{path[1]}, 2,304 bytes in ")


def test_commands_of_a_chat(chat, lm):
    path = lm.route("gold").ids
    out, err = chat(
        "/path", "gold", "/path", "/memory none", "gold", "/memory generic", "gold",
        "/memory fetched", f"/block 1:{path[0]}", "gold", f"/block 2:{path[1]}", "gold",
        f"/unblock 1:{path[0]}", f"/unblock 2:{path[1]}", "gold", "/help",
    )  # fmt: skip
    assert err[0] == "error: /path: there is no answer yet; ask something first"
    fetched, none, generic = (
        lm.generate("gold", memory, COUNT) for memory in ("fetched", "none", "generic")
    )
    assert out[1] == fetched
    assert out[2] == f"memory fetched, path {path[0]},{path[1]}"
    assert out[3].split()[:3] == ["level", "cluster", "bytes"]
    rest = iter(out[7:])
    assert [next(rest) for _ in range(5)] == ["memory none", none, "memory generic", generic,
                                              "memory fetched"]  # fmt: skip
    assert next(rest) == f"blocked: 1:{path[0]}"
    half = next(rest)
    assert half not in (fetched, none)
    assert next(rest) == f"blocked: 1:{path[0]}, 2:{path[1]}"
    assert next(rest) == none
    assert next(rest) == f"blocked: 2:{path[1]}"
    assert next(rest) == "blocked: nothing"
    assert next(rest) == fetched
    assert next(rest).startswith("/memory fetched|generic|none")


def test_an_error_is_shown_and_the_chat_goes_on(chat, lm):
    out, err = chat("/memory all", "/block 1", "/block 1:9", "/forget", "a" * 300, "\udcff", "gold")
    assert out[-1] == lm.generate("gold", max_tokens=COUNT)
    assert [line.startswith("error: ") for line in err] == [True] * 6 + [False]
    for line, says in zip(
        err,
        ("/memory: 'all' is unknown; give fetched", "expected LEVEL:CLUSTER", "clusters are 0 to 2",
         "/forget: no such command; /help", "has 300 tokens", "not valid Unicode"),
        strict=False,
    ):  # fmt: skip
        assert says in line


def test_options_of_a_chat(chat, lm):
    path = lm.route("gold").ids
    out, _ = chat("gold", options=("--memory", "none"))
    assert out[1] == lm.generate("gold", "none", COUNT)
    out, _ = chat("gold", "/path", options=("--block", f"1:{path[0]}", "--block", f"2:{path[1]}"))
    assert out[1] == lm.generate("gold", "none", COUNT)
    assert out[4].endswith("yes") and out[5].endswith("yes")
    twice = [chat("gold", "gold", options=("--temp", "3", "--seed", "5"))[0] for _ in range(2)]
    assert twice[0] == twice[1] and twice[0][1] != twice[0][2]


def test_with_a_template_the_conversation_is_kept(chat, templated, lm):
    out, err = chat("gold is", "iron is", "/path", "/reset", "iron is", model=templated)
    assert out[0] == "The conversation is kept; /help lists the commands."

    def reply(prompt: str, route_on: str) -> str:
        return lm.generate(prompt, max_tokens=COUNT, route_on=route_on)

    first = reply("u:gold is\na:", "gold is")
    second = f"u:gold is\na:{first}\nu:iron is\na:"
    assert out[1:3] == [first, reply(second, "iron is")]
    path = lm.route("iron is").ids
    assert out[3] == f"memory fetched, path {path[0]},{path[1]}"
    assert f"prompt {len(second)} tokens" in out[7]
    assert out[8:] == ["the conversation is forgotten", reply("u:iron is\na:", "iron is")]


def test_a_conversation_longer_than_the_context(chat, templated, lm):
    out, err = chat("a" * 200, "b" * 60, "/reset", "b" * 60, model=templated)
    assert "ends at 256" in err[1] and err[1].endswith("; /reset forgets the conversation so far")
    assert out[-1] == lm.generate(f"u:{'b' * 60}\na:", max_tokens=COUNT, route_on="b" * 60)


@pytest.mark.parametrize("leave", [EOFError, KeyboardInterrupt])
def test_a_chat_ends_with_the_input_or_by_ctrl_c(run, monkeypatch, leave):
    class Terminal(io.StringIO):
        def readline(self, *size: int) -> str:
            raise leave

    monkeypatch.setattr(sys, "stdin", Terminal())
    out, err = run("chat")
    assert out.count("\n") == 1 and err == ""  # the greeting alone


# ---- bank ------------------------------------------------------------------------------


def test_inspect_as_json(run, folder):
    report = json.loads(run("bank", "inspect", "--json")[0])
    with MemoryBank.open(folder / "memory") as bank:
        assert report == bank.inspect()
    assert [row["block_bytes"] for row in report["levels"]] == [1536, 768]
    budget = json.loads(run("bank", "inspect", "--json", "--memory-budget", "1600")[0])
    assert [row["tier"] for row in budget["levels"]] == ["cached", "cached"]


def test_inspect_as_a_table(run, folder):
    lines = run("bank", "inspect")[0].splitlines()
    assert lines[0].startswith(f"{folder / 'memory'}: ffn memories, branching 3, revision ")
    assert "2,880 numbers, 576 in one fetched memory" in lines[1]
    assert lines[2].split()[:4] == ["level", "clusters", "rank", "numbers"]
    row = "1 3 4 384 float32 1.5 kB 4.6 kB 1 resident 0 level 1 is small"
    assert lines[3].split() == row.split()
    assert lines[4].split()[:12] == "2 9 2 192 float32 768 B 6.9 kB 3 disk 0".split()


def test_verify(run, folder):
    text, err = run("bank", "verify")
    files = {path.name: path.stat().st_size for path in (folder / "memory").iterdir()}
    size = files.pop("manifest.json") and sum(files.values())
    for name, count in files.items():
        assert any(line.split() == ["ok", name, f"{count:,}"] for line in text.splitlines())
    assert f"{len(files)} files, {size:,} bytes" in text.splitlines()[-1]
    assert err == ""
    report = json.loads(run("bank", "verify", "--json")[0])
    assert list(report) == ["folder", "revision", "ok", "bytes", "files"]
    assert report["ok"] is True and report["bytes"] == size
    assert {file["file"]: file["bytes"] for file in report["files"]} == files


def test_bank_by_its_own_folder(capsys, folder):
    assert cli.main(["bank", "inspect", "--json", "--bank", str(folder / "memory")]) == 0
    assert json.loads(capsys.readouterr().out)["folder"] == str(folder / "memory")


def test_verify_shows_its_progress_on_a_terminal(folder):
    terminal, end = os.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # rows, columns
    os.set_blocking(terminal, False)  # were nothing shown, a read would wait for ever
    result = subprocess.run(
        [sys.executable, "-m", "mlx_hiermem", "bank", "verify", "--model", str(folder)],
        stdout=subprocess.PIPE, stderr=end, check=True,
    )  # fmt: skip
    shown = os.read(terminal, 100_000).decode()
    os.close(end)
    os.close(terminal)
    assert "verify:" in shown and "B/s" in shown
    assert b"verify:" not in result.stdout and b"as the manifest says" in result.stdout
