"""What runs for long neither grows nor loses anything: 10,000 answers, an hour of the server."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from benchmarks import serve
from benchmarks.serve_soak import soak

pytestmark = pytest.mark.soak

ROOT = Path(__file__).parents[2]
#: Answers, of which so many come first: caches fill, and the allocator finds its size.
ANSWERS, WARM = 10_000, 2_000
#: Seconds of the server under load, of which so many come first.
HOUR, SETTLED = 3600, 600
CLIENTS, VANISH = 8, 20

CHILD = """
import gc, json, os, sys
from mlx_hiermem.backend import preload_blas
preload_blas()
import psutil
from mlx_hiermem import load

answers, warm = map(int, sys.argv[1:])
lm = load("atlas", memory_budget=2_000_000, tiers="cached")
process = psutil.Process()
leaves = lm.bank.config.clusters(lm.bank.config.levels)
k, p = lm.bank.config.branching, lm.bank.config.levels
names = "capital of France", "atomic number of hafnium", "currency of Japan"
prompts = [f"The {name} is" for name in names]
seen, first = {}, None
for number in range(answers):
    leaf = number % leaves
    path = tuple(leaf // k ** (p - level) for level in range(1, p + 1))
    # A way for each kind of call: pinned, routed, generic, none, in pieces.
    prompt = prompts[number // leaves % len(prompts)]
    kind = number // (leaves * len(prompts)) % 4
    memory = (path, "fetched", "generic", "none")[kind]
    if number % 2:
        text = lm.generate(prompt, memory, max_tokens=4)
    else:
        text = "".join(piece.text for piece in lm.stream(prompt, memory, max_tokens=4))
    key = (prompt, memory)
    if seen.setdefault(key, text) != text:
        sys.exit(f"call {number}: {key} was answered {seen[key]!r}, and now {text!r}")
    if number + 1 in (warm, answers):
        gc.collect()
        now = process.memory_info().rss, process.num_fds(), process.num_threads()
        print(json.dumps(now), flush=True)
print(json.dumps(len(seen)))
"""


def test_ten_thousand_answers(scaled, figure):
    answers = scaled(ANSWERS)
    warm = max(1, answers * WARM // ANSWERS)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(answers), str(warm)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (rss, handles, threads), (rss_end, handles_end, threads_end), ways = map(
        json.loads, done.stdout.splitlines()
    )
    growth = 100 * (rss_end / rss - 1)
    figure("answers", answers, f"of {ways} ways to ask, each answered alike every time")
    figure("answers.memory", f"{growth:+.2f} %", f"resident, from call {warm} to {answers}")
    figure("answers.handles", handles_end - handles, "file handles more at the end")
    figure("answers.threads", threads_end - threads, "threads more at the end")
    assert handles_end == handles and threads_end == threads
    assert growth < 1 or answers < ANSWERS


def test_an_hour_of_the_server(scaled, figure, tmp_path):
    seconds = scaled(HOUR)
    settled = seconds * SETTLED / HOUR
    model = tmp_path / "model"
    serve.write_soak_model(model)
    lm = serve.load_exact(model)
    expected = serve.alone(lm)
    lm.bank.close()
    answered = vanished = lost = mixed_up = 0
    sizes: list[tuple[float, int, int]] = []
    reasons: tuple[str, ...] = ()
    with closing(serve.start(model, True, 1 << 24, serve.load_exact)) as server:
        process = psutil.Process(server._process.pid)
        rude, stop = [0], threading.Event()
        thread = threading.Thread(target=_rude, args=(server._address, stop, rude))
        thread.start()
        begun = time.monotonic()
        try:
            while (now := time.monotonic() - begun) < seconds or len(sizes) < 2:
                sizes.append((now, process.memory_info().rss, process.num_fds()))
                found = soak(server, expected, 200, CLIENTS, VANISH)
                answered, vanished = answered + found.answered, vanished + found.vanished
                lost, mixed_up = lost + found.lost, mixed_up + found.mixed_up
                reasons = (*reasons, *found.reasons)[:3]
        finally:
            stop.set()
            thread.join()
        time.sleep(1)  # connections that were cut last are closed
        sizes.append((time.monotonic() - begun, process.memory_info().rss, process.num_fds()))
    first = next((one for one in sizes if one[0] >= settled), sizes[-1])
    growth = 100 * (sizes[-1][1] / first[1] - 1)
    figure("server.seconds", round(sizes[-1][0]), f"{CLIENTS} clients at once")
    figure("server.answered", answered, "requests, each answered as it is alone")
    figure("server.vanished", vanished, "requests whose client went away in mid-stream")
    figure("server.rude", rude[0], "connections that sent half a request, rubbish or nothing")
    figure("server.wrong", lost + mixed_up, "requests that were lost or mixed up")
    figure("server.memory", f"{growth:+.2f} %", f"resident, from second {first[0]:.0f} on")
    figure("server.handles", sizes[-1][2] - sizes[0][2], "file handles more at the end")
    assert not lost and not mixed_up, reasons
    assert vanished and rude[0]
    assert sizes[-1][2] <= sizes[0][2]
    assert growth < 5 or seconds < HOUR


def _rude(address: str, stop: threading.Event, count: list[int]) -> None:
    """Connections that are no good, one after another, until told to stop."""
    host, port = address.split(":")
    rng = random.Random(0)
    words = [
        b"", b"GET /v1/models HTTP/1.1\r\nHost: x\r\n", os.urandom(300), b"\r\n" * 100,
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n\r\n{\"prompt\":",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ]  # fmt: skip
    while not stop.wait(0.2):
        try:
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                connection.sendall(rng.choice(words))
                if rng.random() < 0.5:
                    connection.settimeout(0.05)
                    connection.recv(100)
        except OSError:
            pass  # the server may close it first
        count[0] += 1


def test_handles_are_not_kept_by_models_that_are_dropped(scaled, figure):
    """Opened and dropped many times, without a close."""
    code = (
        "import gc, sys, psutil\n"
        "from mlx_hiermem.backend import preload_blas\n"
        "preload_blas()\n"
        "from mlx_hiermem import load\n"
        "process, seen = psutil.Process(), []\n"
        "for number in range(int(sys.argv[1])):\n"
        "    lm = load('atlas'); lm.generate('gold is', max_tokens=1); del lm; gc.collect()\n"
        "    seen.append((process.num_fds(), process.memory_info().rss))\n"
        "print(seen[-1][0] - seen[1][0], seen[-1][1] / seen[len(seen) // 2][1])"
    )
    times = max(4, scaled(200))
    done = subprocess.run(
        [sys.executable, "-c", code, str(times)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    handles, growth = done.stdout.split()
    figure("reload.handles", int(handles), f"file handles more after {times} models")
    figure("reload.memory", f"{100 * (float(growth) - 1):+.2f} %", "resident, in the second half")
    assert int(handles) == 0
