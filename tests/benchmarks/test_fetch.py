"""What the fetch benchmark compares is what it says."""

import json
import time

import numpy as np
import pytest

from benchmarks import fetch, fetch_bank
from benchmarks.fetch_media import Medium, ThrottledReader, Turn
from benchmarks.harness import main
from mlx_hiermem.bank.store import MemoryBank
from mlx_hiermem.errors import InputError


@pytest.fixture(scope="module")
def config():
    return fetch_bank.make_config(fetch_bank.SMOKE, (8, 4, 2, 0), 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, config):
    folder = tmp_path_factory.mktemp("bank")
    fetch_bank.write_random_bank(folder, config, "a test")
    return folder


def test_the_bank_is_the_papers():
    config = fetch_bank.make_config(fetch_bank.ANCHOR_160M, fetch_bank.RANKS, fetch_bank.BRANCHING)
    assert config.fetch_size() == 18_063_360 and config.bank_size() == 4_624_220_160
    flat = fetch_bank.flat_config(config, fetch_bank.ANCHOR_160M, 256)
    assert flat.fetch_size() == config.fetch_size() and flat.bank_size() == config.bank_size()


def test_the_floor_reads_the_bytes_of_the_fetch(folder, config):
    floor = fetch.Pread(folder, config)
    path = fetch_bank.path_to(config, 77)
    floor.drop(path)
    floor.read(path)
    with MemoryBank.open(folder, tiers="disk") as bank:
        found = b"".join(np.array(block.view(fetch.mx.uint8)) for block in bank.fetch(path).blocks)
        assert bytes(floor._buffer) == found
        assert len(found) == bank.fetch(path).report.bytes
    floor.close()


def test_two_paths_apart_share_no_block(config):
    for leaf in (0, 77, 255):
        one, two = fetch._apart(config, fetch_bank.path_to(config, leaf))
        assert all(a != b for a, b in zip(one, two, strict=True))


def test_a_throttled_medium_is_as_slow_as_it_says(folder, config):
    size = config.block_bytes(1) + config.block_bytes(2) + config.block_bytes(3)
    reader = ThrottledReader(folder)
    turn = Turn(size / 0.2)
    reader.throttle({1: turn, 2: turn, 3: turn})
    with MemoryBank.of(reader, tiers="disk") as bank:
        start = time.perf_counter()
        fetched = bank.fetch(fetch_bank.path_to(config, 77))
        assert time.perf_counter() - start >= 0.2
        assert fetched.report.bytes_read == size
        with MemoryBank.open(folder) as other:
            again = other.fetch(fetch_bank.path_to(config, 77))
            assert fetch.mx.array_equal(again.joined, fetched.joined)


@pytest.mark.parametrize("text", ["flash", "flash=", "=1", "flash=fast", "flash=-1", "x=nan"])
def test_a_medium_that_is_none(text):
    with pytest.raises(InputError, match="--media: .* is none; give NAME=SPEED in GB/s"):
        Medium.parse(text)
    assert Medium.parse("flash=1.5") == Medium("flash", 1.5e9)


def test_what_cannot_be_measured_is_one_line(tmp_path, capsys):
    arguments = ["--smoke", "--folder", str(tmp_path / "none")]
    assert main(fetch.NAME, fetch.measure, arguments, fetch.options) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_a_smoke_run_has_every_row(tmp_path, capsys):
    path, png = tmp_path / "rows.json", tmp_path / "fetch.png"
    arguments = ["--smoke", "--json", str(path), "--png", str(png), "--folder", str(tmp_path)]
    arguments += ["--media", "card=0.05"]
    assert main(fetch.NAME, fetch.measure, arguments, fetch.options) == 0
    rows = {row["id"]: row for row in json.loads(path.read_text())["rows"]}
    assert {id: row["goal"] for id, row in rows.items() if row["goal"]} == {
        "fetch.warm_vs_pread": "<= 1.1",
        "fetch.cold_vs_pread": "<= 1.1",
        "fetch.flat_vs_hierarchical": ">= 5",
        "fetch.topic_flat_vs_hierarchical": ">= 4",
        "fetch.rss_vs_floor": "<= 1.1",
    }
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fetch.png", "rows.json"]
