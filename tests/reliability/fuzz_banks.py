"""Memory folders that are not what they were: opened, read, verified, and edited.

Beside ``tests/bank/test_bank_fuzz.py``: banks of format version 2 with added memories, blocks that
were removed, names, and the journals of every command, each stopped where it counts. Who edits such
a folder does what its journal says, so there the rest of the disk is looked at as well.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np

from mlx_hiermem.bank import extend
from mlx_hiermem.bank.dtypes import to_storage
from mlx_hiermem.bank.edit import BankEdit
from mlx_hiermem.bank.manifest import write_manifest
from mlx_hiermem.bank.quantize import quantize_bank
from mlx_hiermem.bank.reader import BlockReader
from mlx_hiermem.bank.remove import finish, remove
from mlx_hiermem.bank.store import MemoryBank
from mlx_hiermem.bank.verify import compute_digests
from mlx_hiermem.bank.writer import write_bank
from mlx_hiermem.config import Added, MemoryConfig
from mlx_hiermem.errors import HierMemError
from mlx_hiermem.routing.names import ClusterNames
from mlx_hiermem.routing.tree import AddedTree, ClusterTree
from mlx_hiermem.tree_source import open_routing
from tests.bank.mutations import reseal
from tests.reliability.fuzz_mutations import WORDS, as_json, as_safetensors
from tests.reliability.fuzz_process import FolderTarget

K, P, WIDTH = 2, 2, 4
_JOURNAL = ".edit.json"
#: What a journal may name, and what it may not.
_NAMES = ["../canary", "../../now", "/etc/passwd", ".edit.json", "manifest.json", "config.json",
          "x/y", "new.json", "level-1-00000-of-00001.safetensors", *WORDS[:8]]  # fmt: skip


class _Stopped(Exception):
    """Here the process is killed."""


class Banks(FolderTarget):
    """Banks: plain, quantised, with an added memory; and each command's edit, half done."""

    def make(self) -> None:
        """Write them."""
        for name in ("bfloat16", "float32", "affine"):
            _make(self.folder / name, name)
        self.banks = ["bfloat16", "float32", "affine"]
        self.edits: list[str] = []
        for name, edit in _EDITS.items():
            folder = self.folder / name
            shutil.copytree(self.folder / "bfloat16", folder)
            try:
                edit(folder)
            except _Stopped:
                pass
            assert (folder / _JOURNAL).exists(), name
            self.edits.append(name)
        for name in (*self.banks, *self.edits):
            _look(self.folder / name, True)

    def change(self, random: Random) -> str:
        """Change a file of one of the banks."""
        edited = random.random() < 0.4
        self.home = random.choice(self.edits if edited else self.banks)
        self.edit = edited and random.random() < 0.7
        self.writes = self.edit
        names = sorted(name for name in self.files if name.startswith(f"{self.home}/"))
        small = [name for name in names if name.endswith(".json")]
        name = random.choice(random.choice([names, small]))
        if edited and random.random() < 0.5:
            name = f"{self.home}/{_JOURNAL}"
        data = self.files[name]
        if random.random() < 0.04:
            data = self.files[random.choice(sorted(self.files))]
        elif name.endswith(_JOURNAL) and random.random() < 0.5:
            data = _other_journal(random, data)
        else:
            data = (as_json if name.endswith(".json") else as_safetensors)(random, data)
        self.put(name, data)
        plain = Path(name).name
        if not plain.startswith(".") and random.random() < 0.6:
            self._put.add(f"{self.home}/manifest.json")
            reseal(self.folder / self.home, [] if plain == "manifest.json" else [plain])
        return f"{name}, edit {self.edit}: {data[:200]!r}"

    def look(self, random: Random) -> None:
        """Read it, or edit it."""
        folder = self.folder / self.home
        if not self.edit:
            return _look(folder, random.random() < 0.5)
        edit = random.choice([_block, finish, lambda one: remove(one, [(1, 0)]), _checksums])
        edit(folder)
        _look(folder, False)


def _look(folder: Path, check_blocks: bool) -> None:
    """Everything that reads a bank."""
    problem: HierMemError | None = None
    with MemoryBank.open(folder, check_blocks=check_blocks) as bank:
        config = bank.config
        last = [config.clusters(level) - 1 for level in range(1, config.levels + 1)]
        acts: list[Callable[[], object]] = [
            lambda: bank.fetch([0] * config.levels).release(),
            lambda: bank.fetch(last).release(),
            lambda: bank.generic().release(),
            bank.verify,
            bank.inspect,
            lambda: ClusterNames.load(folder),
        ]
        if not (folder / _JOURNAL).exists():
            acts.append(lambda: open_routing(folder))
        for act in acts:
            try:
                act()
            except HierMemError as error:
                problem = problem or error
    if problem is not None:
        raise problem


def _other_journal(random: Random, data: bytes) -> bytes:
    """A journal that names other files, or other bytes of them."""
    table = json.loads(data)
    for _ in range(random.randint(1, 2)):
        kind = random.choice(["add", "replace", "overwrite", "ranges", "both"])
        name = random.choice(_NAMES)
        if kind in ("add", "both"):
            table["files"].append(name)
        elif kind == "replace":
            table["files"][random.randrange(len(table["files"]))] = name
        if kind in ("overwrite", "both"):
            ranges = [[0, random.choice([1, 10, 2**40])]]
            table.setdefault("overwrite", {})[name] = ranges
        elif kind == "ranges":
            name = random.choice(table["files"])
            low, high = random.choice([(0, 2**62), (-1, 3), (5, 5), (2**63, 2**64), (0, 4096)])
            table.setdefault("overwrite", {})[name] = [[low, high]] * random.choice([1, 1000])
    return json.dumps(table).encode()


# ---- the honest ones -------------------------------------------------------------------


def _make(folder: Path, name: str) -> None:
    """A bank with tree, names, checksums, an added memory, blocked and removed blocks."""
    shape = {
        "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64,
        "num_attention_heads": 2, "head_dim": 16,
    }  # fmt: skip
    config = MemoryConfig(
        ranks=(2, 1), branching=K, dtype="float32" if name == "float32" else "bfloat16",
        base_anchor={"name": "test", "revision": None, "shape": shape},
    )  # fmt: skip
    rng = np.random.default_rng(0)
    plain = folder if name != "affine" else folder.with_name("plain")
    plain.mkdir()
    levels = [rng.standard_normal((K**level, WIDTH), np.float32) for level in range(1, P + 1)]
    ClusterTree(levels, config.encoder).save(plain / "tree.safetensors")
    ClusterNames([[f"base {i}" for i in range(K**level)] for level in (1, 2)]).save(plain)
    blocks = {
        level: rng.standard_normal((config.clusters(level), config.block_size(level)), np.float32)
        for level in config.memory_levels
    }
    write_bank(plain, config, blocks, rng.standard_normal(config.fetch_size(), np.float32))
    _add(plain, "acme")
    if name == "affine":
        quantize_bank(plain, folder, 4, "affine")
        shutil.rmtree(plain)
    remove(folder, [(2, 1)])
    _block(folder)


def _add(folder: Path, name: str, step: Callable[[str], None] | None = None) -> None:
    """Add a memory of one root."""
    reader = BlockReader(folder)
    config = reader.config.with_added([*reader.config.added, Added(name, 1)])
    reader.close()
    rng = np.random.default_rng(1)
    rows = {
        level: to_storage(
            rng.standard_normal((K ** (level - 1), config.block_size(level)), np.float32),
            config.dtype,
        )
        for level in config.memory_levels
    }
    centroids = [rng.standard_normal((K**level, WIDTH)).astype(np.float32) for level in range(P)]
    tree = ClusterTree.load(folder / "tree.safetensors")

    def names(data: bytes) -> bytes:
        table = json.loads(data)
        for level, found in enumerate(table.values()):
            found += [f"{name} {i}" for i in range(K**level)]
        return (json.dumps(table) + "\n").encode()

    data = tree.with_added([AddedTree(centroids, 1.5)]).added_bytes(0)
    extend.add(folder, name, 1, lambda level: [rows[level]], data, names, step=step)


def _stop(name: str) -> None:
    if name == "apply" or name == "rename":
        raise _Stopped


def _block(folder: Path, step: Callable[[str], None] | None = None) -> None:
    with BankEdit(folder, step=step) as bank:
        bank.set_blocked([(1, 0), (2, 2)] if step is None else [(1, 1)])


def _without_checksums(folder: Path) -> None:
    (folder / "checksums.safetensors").unlink()
    write_manifest(folder)


def _checksums(folder: Path, step: Callable[[str], None] | None = None) -> None:
    with BankEdit(folder, step=step) as bank:
        bank.set_checksums(compute_digests(bank.reader))


def _name(folder: Path, step: Callable[[str], None] | None = None) -> None:
    with BankEdit(folder, step=step) as bank:
        levels = [bank.config.clusters(level) for level in (1, 2)]
        names = ClusterNames([[f"new {i}" for i in range(count)] for count in levels])
        bank.set_names(names.to_bytes(), forget=True)


#: Each command, stopped when its edit counts and nothing is in its place yet.
_EDITS: dict[str, Callable[[Path], object]] = {
    "block": lambda folder: _block(folder, _stop),
    "remove": lambda folder: remove(folder, [(2, 0), (1, 1)], step=_stop),
    "add": lambda folder: _add(folder, "beta", _stop),
    "drop": lambda folder: extend.drop(folder, "acme", step=_stop),
    "checksums": lambda folder: (_without_checksums(folder), _checksums(folder, _stop)),
    "names": lambda folder: _name(folder, _stop),
}
