"""``mlx_hiermem serve``: its options, what it prints, and how it ends."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from mlx_hiermem import cli
from mlx_hiermem.commands import serve
from tests.serving.processes import LONG, REPOSITORY
from tests.tiny import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("serve") / "a folder" / "tiny")


def refused(capsys, *arguments: str) -> str:
    """The line of a command that cannot run."""
    assert cli.main(["serve", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"mlx_hiermem: error: [^\n]+\n", captured.err), captured.err
    return captured.err


@pytest.mark.parametrize(
    "option, value",
    [
        ("--max-tokens", "0"), ("--max-tokens", "99999999999"), ("--max-concurrent", "0"),
        ("--max-waiting", "0"), ("--max-waiting", "-1"), ("--timeout", "0"), ("--timeout", "nan"),
        ("--timeout", "inf"), ("--shutdown-timeout", "-1"), ("--api-key", ""),
        ("--api-key", "two words"), ("--api-key", "kl\xfcssel"), ("--allow-origin", "example.org"),
        ("--allow-origin", "http://example.org/"), ("--max-body", "9TB"),
    ],
)  # fmt: skip
def test_options_out_of_range(capsys, option, value):
    assert option.strip("-").split("-")[0] in refused(capsys, f"{option}={value}")


@pytest.mark.parametrize("option", ["--max-body=0", "--prompt-cache-bytes=some"])
def test_sizes_that_are_none(capsys, option):
    assert "a number of bytes" in refused(capsys, option)


def test_a_key_of_the_environment_is_checked_too(capsys, monkeypatch):
    monkeypatch.setenv("MLX_HIERMEM_API_KEY", "")
    assert "MLX_HIERMEM_API_KEY" in refused(capsys)


@pytest.mark.parametrize("port", ["-1", "65536", "99999999999999999999"])
def test_ports_that_are_none(capsys, port):
    assert "cannot be listened on" in refused(capsys, f"--port={port}")


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port}" in refused(capsys, "--port", port)
    assert "cannot be listened on" in refused(capsys, "--host", "no.such.host.invalid")
    assert "error: '', port 8080: cannot be listened on" in refused(capsys, "--host", "")


def test_a_folder_that_is_no_model(capsys, tmp_path):
    assert "no such folder" in refused(capsys, "--model", str(tmp_path), "--port", "0")


def test_a_bank_that_is_damaged(capsys, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "tiny")
    (folder / "memory/config.json").write_text("{")
    refused(capsys, "--model", str(folder), "--port", "0")


@pytest.mark.parametrize(
    "host, private", [("127.0.0.1", True), ("localhost", True), ("[::1]", True), ("0.0.0.0", False)]
)
def test_who_is_let_in(host, private):
    assert serve._is_private(host) == private


def run(model: Path, log: Path, *options: str, **environment: str) -> subprocess.Popen:
    """The command as users run it."""
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "mlx_hiermem", "serve", "--model", str(model), *options],
            cwd=REPOSITORY,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        )


def test_it_prints_where_it_is_and_ends_in_order(model, tmp_path):
    log = tmp_path / "log"
    options = ("--port", "0", "--max-tokens", "3", "--memory-budget", "1MB", "--host", "0.0.0.0")
    process = run(model, log, *options, MLX_HIERMEM_API_KEY="sekrit")
    try:
        line = process.stdout.readline()
        found = re.fullmatch(r"tiny: http://0\.0\.0\.0:(\d+)/v1\n", line)
        assert found, log.read_text()
        url = f"http://127.0.0.1:{found[1]}"
        headers = {"authorization": "Bearer sekrit"}
        answers = [
            httpx.get(f"{url}/v1/models", timeout=LONG),
            httpx.get(f"{url}/v1/models", headers=headers, timeout=LONG),
            httpx.get(f"{url}/health", timeout=LONG),
            httpx.get(f"{url}/metrics", headers=headers, timeout=LONG),
        ]
        for body in ({"prompt": "gold is"}, {"prompt": "gold is", "memory": {"path": [0, 99]}}):
            answers.append(
                httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=LONG)
            )
        assert [one.status_code for one in answers] == [401, 200, 200, 200, 200, 400]
        assert answers[4].json()["usage"]["completion_tokens"] == 3
        for answer in answers:
            told = f"{answer.text} {answer.headers}"
            assert "a folder" not in told and "/tmp" not in told and str(Path.home()) not in told
        process.send_signal(signal.SIGINT)
        assert process.wait(LONG) == 0
        assert process.stdout.read() == ""
        assert "Traceback" not in log.read_text() and "sekrit" not in log.read_text()
        assert "warning" not in log.read_text()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_settings_name_the_model_and_hide_its_folders(model):
    parser = cli.argparse.ArgumentParser()
    serve.add_arguments(parser)
    args = parser.parse_args(["--model", str(model), "--bank", "~/bank", "--max-body", "1KiB"])
    found = serve.settings(args, None)
    assert (found.model, found.max_body) == ("tiny", 1024)
    assert str(model) in found.roots and str(Path.home() / "bank") in found.roots
    assert serve.settings(parser.parse_args([]), "key").model == "atlas"
    assert parser.parse_args(["--prompt-cache-bytes", "0"]).prompt_cache_bytes == 0
