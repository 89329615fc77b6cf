"""Thousands of mutated files: a bank opens and is read, or one line says what is wrong with it.

Never another error, a hang, or memory that grows with what a file claims. Half of the mutations
come with a manifest that agrees with them (and some with checksums that do), because those get past
the first checks. ``mutations`` makes them.
"""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from zlib import crc32

import numpy as np
import pytest
from hypothesis import HealthCheck, given, note, seed, settings
from hypothesis import strategies as st

from mlx_hiermem.bank.manifest import read_manifest, write_manifest
from mlx_hiermem.bank.quantize import quantize_bank
from mlx_hiermem.bank.store import MemoryBank
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.routing.embeddings import EmbeddingEncoder
from mlx_hiermem.routing.tree import ClusterTree
from tests.bank.mutations import mutated, redo_checksums, refusing, reseal, small_memory

LEVEL = "level-3-00001-of-00002.safetensors"
KINDS = {
    "level": [LEVEL, "level-1-00000-of-00001.safetensors"],
    "generic": ["generic.safetensors"],
    "checksums": ["checksums.safetensors"],
    "manifest": ["manifest.json"],
    "config": ["config.json"],
    "blocked": ["blocked.json"],
    "journal": [".edit.json", ".edit-manifest.json"],
}
# An edit that was put in force and stopped there: what makes it up, and what the files hold.
EDIT = {
    ".edit.json": ".edit.json",
    ".edit-manifest.json": "manifest.json",
    ".edit-blocked.json": "blocked.json",
}
BANKS = ("bfloat16", "float32", "affine", "nvfp4")
# Mutated files in the fast suite: 4 banks * 7 kinds * 80, and 2 * 150 of the files that route.
EXAMPLES, ROUTING_EXAMPLES = 80, 150
#: Seconds after which an example counts as hanging: the process then ends and shows where it was.
_HANGS = 120


def _examples(count, name):
    """Calls a function with so many sources of chance: those of ``name``, the same in each run."""

    def decorate(run):
        options = settings(
            max_examples=count,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        # Chance in one piece, rather than choices that hypothesis knows of: it would try the same
        # few again and again.
        return seed(crc32(name.encode()))(options(given(st.randoms(use_true_random=True))(run)))

    return decorate


@pytest.fixture(scope="module")
def banks(tmp_path_factory, make):
    """For each name a bank of levels 1 and 3 with everything a memory folder may hold."""
    home = tmp_path_factory.mktemp("fuzz")
    made = {}
    for name in BANKS:
        folder = home / name / "memory"
        dtype = "float32" if name == "float32" else "bfloat16"
        config = make.config(ranks=(2, 0, 1), hidden=32, dtype=dtype)
        if name in ("affine", "nvfp4"):
            make.bank(home / name / "plain", config)
            quantize_bank(home / name / "plain", folder, 4, name)
        else:
            make.bank(folder, config)
        (folder / "blocked.json").write_text('{"blocked": [[1, 0], [3, 5]]}\n')
        write_manifest(folder)
        config = MemoryConfig.load(folder / "config.json")
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        files[".edit.json"] = b'{"files": ["blocked.json", "manifest.json"]}\n'
        files[".edit-manifest.json"] = files["manifest.json"]
        made[name] = SimpleNamespace(
            folder=folder,
            config=config,
            files=files,
            revision=read_manifest(folder).revision,
        )
    return made


@pytest.fixture
def watched(capfd):
    """A context manager around each example that ends the process where it hangs."""
    with capfd.disabled():
        terminal = os.dup(2)

    @contextmanager
    def watch() -> Iterator[None]:
        faulthandler.dump_traceback_later(_HANGS, exit=True, file=terminal)
        try:
            with small_memory():
                yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    yield watch
    os.close(terminal)


def _rows(bank, name, data):
    """The stored blocks of a file, each as bytes; None if it is too short to hold them."""
    config = bank.config
    sizes = [config.block_bytes(level) for level in config.memory_levels]
    if name.startswith("level-"):
        level = int(name[6])
        rows = config.clusters(level) // (1 if level == 1 else config.branching)
        sizes = [config.block_bytes(level)] * rows
    if len(data) < sum(sizes):
        return None
    start, rows = len(data) - sum(sizes), []
    for size in sizes:
        rows.append(data[start : start + size])
        start += size
    return rows


def _paths(config):
    yield [0] * config.levels
    yield [config.clusters(level) - 1 for level in range(1, config.levels + 1)]


def _look(folder, check_blocks):
    """Open a bank and do all that reads its files: the errors, and the revision if it opened."""
    with refusing(folder) as errors, MemoryBank.open(folder, check_blocks=check_blocks) as bank:
        for path in _paths(bank.config):
            with refusing(folder) as found:
                bank.fetch(path).release()
            errors += found
        with refusing(folder) as found:
            bank.generic().release()
        errors += found
        with refusing(folder) as found:
            bank.verify()
        errors += found
        bank.inspect()
        return errors, bank.revision
    return errors, None


def _finite(bank, rows):
    """Whether the numbers of a bank that is not quantised are finite."""
    data = b"".join(rows)
    if bank.config.dtype == "bfloat16":
        numbers = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    else:
        numbers = np.frombuffer(data, "<f4")
    return np.isfinite(numbers).all()


def _try(bank, name, data, sealed, check_blocks):
    """One mutated file in its place; ``sealed``: 0 as it is, 1 in the manifest, 2 also in the
    checksums of blocks."""
    folder = bank.folder
    blocks = name.startswith(("level-", "generic"))
    rows = _rows(bank, name, data) if blocks else None
    edit = EDIT if name.startswith(".") else {}
    try:
        for one in edit:
            (folder / one).write_bytes(bank.files[EDIT[one]])
        (folder / name).write_bytes(data)
        if sealed and not edit:
            reseal(folder, [] if name == "manifest.json" else [name])
        if sealed == 2 and rows:
            redo_checksums(folder, name, rows)
        errors, revision = _look(folder, check_blocks)
        if errors:
            return
        # It works: then it is what the manifest says, and blocks are those of the checksums.
        if edit or not sealed:
            assert edit or name == "manifest.json", "an altered file was not noticed"
            assert revision == bank.revision
        if blocks and sealed == 1:
            assert rows == _rows(bank, name, bank.files[name]), "altered blocks were not noticed"
        if blocks and sealed == 2 and bank.config.quantization is None:
            assert _finite(bank, rows), "blocks that are not finite were not noticed"
    finally:
        for one in edit:
            (folder / one).unlink()
        for one in {name, "manifest.json", "checksums.safetensors"} - set(edit):
            (folder / one).write_bytes(bank.files[one])


def _fuzz(bank, kind, watched, examples):
    @_examples(examples, f"{bank.folder.parent.name} {kind}")
    def run(random):
        name = random.choice(KINDS[kind])
        others = [bank.files[one] for one in sorted(bank.files) if one != name]
        content = mutated(random, name, bank.files[name], others)
        sealed, check_blocks = random.choice([0, 1, 1, 2]), random.random() < 0.5
        note(f"{name}, sealed {sealed}, check_blocks {check_blocks}: {content[:2000]}")
        with watched():
            _try(bank, name, content, sealed, check_blocks)

    run()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BANKS)
def test_mutated_files_of_a_bank(banks, watched, name, kind):
    _fuzz(banks[name], kind, watched, EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BANKS)
def test_many_mutated_files_of_a_bank(banks, watched, name, kind):
    _fuzz(banks[name], kind, watched, 760)


def _write_tree(folder):
    random = np.random.default_rng(0)
    centroids = [random.standard_normal((2**level, 4), dtype=np.float32) for level in (1, 2)]
    ClusterTree(centroids, {"type": "bert"}).save(folder / "tree.safetensors")


def _write_encoder(folder):
    _encoder(np.ones(6, np.float32), np.zeros((1, 4), np.float32)).save(folder)


def _encoder(weights, components):
    return EmbeddingEncoder(np.ones((6, 4), np.float32), None, weights, components)


def _load_encoder(path):
    EmbeddingEncoder.load(path.parent, np.ones((6, 4), np.float32), None)


ROUTING = {
    "tree.safetensors": (_write_tree, ClusterTree.load),
    "encoder.safetensors": (_write_encoder, _load_encoder),
}


def _fuzz_routing(folder, name, watched, examples):
    write, load = ROUTING[name]
    write(folder)
    path = folder / name
    whole = path.read_bytes()

    @_examples(examples, name)
    def run(random):
        content = mutated(random, name, whole, [])
        note(repr(content[:2000]))
        path.write_bytes(content)
        with watched(), refusing(folder):
            load(path)

    run()


@pytest.mark.parametrize("name", ROUTING)
def test_mutated_files_that_route(tmp_path, watched, name):
    _fuzz_routing(tmp_path, name, watched, ROUTING_EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUTING)
def test_many_mutated_files_that_route(tmp_path, watched, name):
    _fuzz_routing(tmp_path, name, watched, 1000)
