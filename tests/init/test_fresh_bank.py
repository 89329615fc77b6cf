"""A bank of zeros: the same as one that is written, but without its size in time or memory."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

from mlx_hiermem import MemoryConfig
from mlx_hiermem.bank import fresh, layout
from mlx_hiermem.bank.manifest import read_manifest
from mlx_hiermem.bank.writer import write_bank
from mlx_hiermem.corpus.config import _MOST_CLUSTERS
from mlx_hiermem.errors import FormatError
from mlx_hiermem.making import make_model
from tests.init.fresh import SMALL, disk_bytes, init, zeros


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("ranks", [(4, 2), (3, 0, 1), (0, 5)])
def test_the_bank_is_the_one_that_writing_zeros_gives(place, tmp_path, monkeypatch, ranks, dtype):
    """Byte for byte, which the manifest's revision says, also where levels are cut into shards."""
    monkeypatch.setattr(layout, "MAX_SHARD_SIZE", 600)
    made = make_model(place / "anchor", tmp_path / "out", ranks, branching=4, dtype=dtype)
    config = made.config
    assert len(layout.shards(config, len(ranks))) > 4  # more than one of each subtree
    levels = {
        level: np.zeros((config.clusters(level), config.block_size(level)), np.float32)
        for level in config.memory_levels
    }
    whole = np.zeros(config.fetch_size(), np.float32)
    assert write_bank(tmp_path / "whole", config, levels, whole) == made.bank.revision
    theirs = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    ours = {path.name: path.read_bytes() for path in (tmp_path / "out" / "memory").iterdir()}
    assert ours == theirs


# ---- its size --------------------------------------------------------------------------


def test_files_are_sparse(place, tmp_path):
    made = make_model(place / "llama", tmp_path / "out", (60000, 20000), branching=4)
    folder = tmp_path / "out" / "memory"
    assert made.bank.bytes > 90_000_000 and made.bank.sparse
    sizes = 0
    for name in zeros(tmp_path / "out"):
        status = (folder / name).stat()
        assert status.st_size > 1_000_000 and 512 * status.st_blocks < 100_000
        sizes += status.st_size
    assert made.bank.bytes == sizes
    assert made.bank.stored == disk_bytes(tmp_path / "out")
    assert os.stat(folder / "config.json").st_blocks  # a file system that counts none shows nothing


#: Makes a small bank, then a large one, and prints the peak memory after each, in bytes.
PEAKS = """
import re, resource, sys
from pathlib import Path
from mlx_hiermem import cli

def peak():
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # The other one counts the process that this one was forked from.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

model, small, large, config = sys.argv[1:]
for out, ranks in ((small, "1,0,0,0"), (large, config)):
    assert cli.main(["init", "--model", model, "--config", ranks, "--mlx-path", out]) == 0
    print("peak", peak())
"""


#: What the config.json of Llama 3.2 1B says.
LLAMA_1B = {
    "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16,
    "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "rms_norm_eps": 1e-5, "vocab_size": 128256, "tie_word_embeddings": True,
    "rope_theta": 500000.0, "max_position_embeddings": 131072,
    "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "numbers"),
    [
        ("768,0,0,0", 1_207_959_552),
        pytest.param("768,256,16,0", 14_092_861_440, marks=pytest.mark.slow),
    ],
)
def test_memory_does_not_grow_with_the_bank(place, tmp_path, config, numbers):
    """One block of level 1 alone has 151 MB, and the anchor 2.5 GB."""
    model = shutil.copytree(place / "llama", tmp_path / "llama")
    (model / "config.json").write_text(json.dumps(LLAMA_1B))
    places = [model, tmp_path / "small", tmp_path / "large"]
    command = [sys.executable, "-c", PEAKS, *map(str, places), config]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    small, large = map(int, re.findall(rb"peak (\d+)", said))
    assert large < small + 40_000_000 < 1_000_000_000
    made = MemoryConfig.load(tmp_path / "large" / "memory" / "config.json")
    assert made.bank_size() == numbers
    assert disk_bytes(tmp_path / "large") < 1_000_000


def test_progress_counts_every_byte_once(place, tmp_path, monkeypatch):
    monkeypatch.setattr(fresh, "_TICK", 0.001)
    calls = []
    made = make_model(
        place / "llama", tmp_path / "out", (60000, 20000), branching=4,
        progress=lambda *given: calls.append(given),
    )  # fmt: skip
    anchor = sum(path.stat().st_size for path in (place / "llama").iterdir())
    for what, size in (("checksums", made.bank.bytes), ("anchor", anchor)):
        mine = [(total, count) for name, total, count in calls if name == what]
        assert len(mine) > 1 and {total for total, _ in mine} == {size}
        assert sum(count for _, count in mine) == size


def test_stopped_while_it_hashes(place, tmp_path, monkeypatch):
    """All threads end long before they are through, and nothing is left."""
    stopping, sizes = threading.Event(), []
    pieces = fresh._File.pieces

    def waiting(file):
        """The pieces of a file; none but the first before the threads are told to stop."""
        for number, piece in enumerate(pieces(file)):
            if number:
                stopping.wait(timeout=10)
            sizes.append(len(piece))
            yield piece

    def interrupt(what, total, count):
        assert total > 3_000_000_000
        raise KeyboardInterrupt

    monkeypatch.setattr(fresh, "Event", lambda: stopping)
    monkeypatch.setattr(fresh._File, "pieces", waiting)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        make_model(place / "llama", tmp_path / "out", (600_000, 40_000), progress=interrupt)
    assert threading.active_count() == before
    assert sum(sizes) < 1_000_000_000
    assert not list(tmp_path.iterdir())


# ---- where the file system has no sparse files -----------------------------------------


def written_in_full(fd: int, size: int) -> None:
    os.pwrite(fd, b"x" * size, 0)


def no_room(fd: int, size: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_sparse_files_are_found_out(tmp_path, monkeypatch):
    assert fresh.has_sparse_files(tmp_path)
    for other in (written_in_full, no_room):
        monkeypatch.setattr(os, "ftruncate", other)
        assert not fresh.has_sparse_files(tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_sparse_files(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fresh, "has_sparse_files", lambda folder: False)
    assert init(place / "llama", tmp_path / "out", *SMALL) == 0
    said = capsys.readouterr().out
    assert "in files that take 20 kB of the disk: this file system has no sparse ones" in said
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    assert init(place / "llama", tmp_path / "next", *SMALL) == 2
    line = capsys.readouterr().err
    assert re.search(r"the bank takes [\d,]+ bytes, and 1,000 are free .*; give a folder on", line)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_bank_is_not_overwritten(place, tmp_path):
    config = MemoryConfig.load(place / "model" / "memory" / "config.json")
    before = read_manifest(place / "model" / "memory").revision
    with pytest.raises(FormatError, match="holds a bank already"):
        fresh.write_fresh_bank(place / "model" / "memory", config)
    assert read_manifest(place / "model" / "memory").revision == before


def test_as_many_clusters_as_cluster_grows():
    assert fresh.MOST_CLUSTERS == _MOST_CLUSTERS


def test_a_disk_without_room_for_the_length(place, tmp_path, monkeypatch, capsys):
    def refuse(path, size):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr(os, "truncate", refuse)
    assert init(place / "llama", tmp_path / "out", *SMALL) == 2
    line = capsys.readouterr().err
    assert re.search(r"level-1-.*: cannot be written \(File too large\); check the folder", line)
    assert not list(tmp_path.iterdir())
