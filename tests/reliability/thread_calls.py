"""The public calls, for the test that makes them from many threads.

Each is a function of what all threads share and of a number, and gives what can be compared. A call
is ``owned`` if it belongs to the thread that opened its model or bank, and ``free`` otherwise.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

import mlx_hiermem
from mlx_hiermem import ClusterTree, MemoryBank, MemoryConfig, MemoryLM
from mlx_hiermem.bank.prefetch import Prefetch
from mlx_hiermem.bank.reader import BlockReader
from mlx_hiermem.bank.report import FetchedMemory
from mlx_hiermem.config import AnchorShape
from mlx_hiermem.conversation import Conversation
from mlx_hiermem.routing.bert import BertEncoder
from mlx_hiermem.routing.tree import AddedTree

TEXTS = ["gold of the north", "a city by the sea"]
PATHS = [(0, 1, 3), (2, 7, 21)]


@dataclass
class Shared:
    """What all threads call; made in the main thread.

    Attributes:
        folder: of the model.
        added: a file to be written, of an added tree for the tree of the model.
    """

    folder: Path
    lm: MemoryLM
    bert: BertEncoder
    added: Path
    reader: BlockReader = field(init=False)
    memory: FetchedMemory = field(init=False)
    ahead: Prefetch = field(init=False)
    talk: Conversation = field(init=False)

    def __post_init__(self) -> None:
        self.added.write_bytes(self.tree.with_added([_added()]).added_bytes(0))
        self.reader = BlockReader(self.folder / "memory")
        self.memory = self.lm.bank.fetch(PATHS[0])
        self.ahead = self.lm.bank.prefetch(PATHS[1])
        self.talk = Conversation(self.lm)

    @property
    def tree(self) -> ClusterTree:
        assert self.lm.tree is not None
        return self.lm.tree

    @property
    def config(self) -> MemoryConfig:
        return self.lm.bank.config


def _bytes(array: Any) -> bytes:
    return np.array(array).tobytes()


def _memory(memory: FetchedMemory) -> bytes:
    return _bytes(memory.joined)


def _tree(tree: ClusterTree) -> list[bytes]:
    return [_bytes(level) for level in tree.centroids]


def _vectors(number: int) -> np.ndarray:
    vectors = np.random.default_rng(number).standard_normal((50, 16)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _added() -> AddedTree:
    return AddedTree([np.full((3**level, 16), 0.1, np.float32) for level in range(3)], 0.5)


def _open(shared: Shared, number: int) -> bytes:
    with MemoryBank.open(shared.folder / "memory", tiers=("disk", None)[number]) as bank:
        return _memory(bank.fetch(PATHS[number]))


def _load(shared: Shared, number: int) -> str:
    lm = mlx_hiermem.load(shared.folder)
    answer = lm.generate(TEXTS[number], max_tokens=8)
    lm.bank.close()
    del lm
    gc.collect()  # it goes in the thread that made it
    return answer


def _model(shared: Shared, number: int) -> bytes:
    tokens = mx.array(list(range(10 + number, 20 + 3 * number)))
    return _bytes(shared.lm.model(tokens[None], memory=shared.memory.joined[None]))


Call = Callable[[Shared, int], Any]

#: Name -> what calls it.
OWNED: dict[str, Call] = {
    "MemoryLM.assign": lambda s, n: s.lm.assign([TEXTS[n]]).tolist(),
    "MemoryLM.check_thread": lambda s, n: s.lm.check_thread(),
    "MemoryLM.fetch": lambda s, n: _bytes(s.lm.fetch("fetched", TEXTS[n]).memory),
    "MemoryLM.fetch_batch": lambda s, n: [
        _bytes(one.memory) for one in s.lm.fetch_batch(("fetched", "generic")[n], TEXTS)
    ],
    "MemoryLM.generate": lambda s, n: s.lm.generate(TEXTS[n], max_tokens=4),
    "MemoryLM.perplexity": lambda s, n: s.lm.perplexity(TEXTS[n:]),
    "MemoryLM.prefetch": lambda s, n: s.lm.prefetch(TEXTS[n]),
    "MemoryLM.prompt_cache": lambda s, n: _bytes(s.lm.prompt_cache(PATHS[n])[-1].cache[0]),
    "MemoryLM.route": lambda s, n: s.lm.route(TEXTS[n]),
    "MemoryLM.score": lambda s, n: s.lm.score(TEXTS[n], " gold"),
    "MemoryLM.tokenize": lambda s, n: s.lm.tokenize(TEXTS[n]),
    "MemoryBank.block": lambda s, n: s.lm.bank.block(1, n),
    "MemoryBank.unblock": lambda s, n: s.lm.bank.unblock(1, n),
    "MemoryBank.bytes_held": lambda s, n: s.lm.bank.bytes_held,
    "MemoryBank.fetch": lambda s, n: _memory(s.lm.bank.fetch(PATHS[n])),
    "MemoryBank.fetch_many": lambda s, n: list(map(_memory, s.lm.bank.fetch_many(PATHS[n:]))),
    "MemoryBank.generic": lambda s, n: _memory(s.lm.bank.generic()),
    "MemoryBank.inspect": lambda s, n: s.lm.bank.inspect(),
    "MemoryBank.prefetch": lambda s, n: s.lm.bank.prefetch(PATHS[n]).path,
    "MemoryBank.verify": lambda s, n: s.lm.bank.verify(),
    "FetchedMemory.share": lambda s, n: _memory(s.memory.share()),
    "Conversation.check_thread": lambda s, n: s.talk.check_thread(),
    "Conversation.reset": lambda s, n: s.talk.reset(),
}
FREE: dict[str, Call] = {
    "load": _load,
    "MemoryModel": _model,
    "MemoryBank.open": _open,
    "MemoryBank.blocked": lambda s, n: s.lm.bank.blocked,
    "MemoryBank.removed": lambda s, n: s.lm.bank.removed,
    "MemoryBank.bytes_on_disk": lambda s, n: s.lm.bank.bytes_on_disk,
    "MemoryBank.file_name": lambda s, n: s.lm.bank.file_name("generic.safetensors"),
    "MemoryBank.resident_levels": lambda s, n: s.lm.bank.resident_levels,
    "MemoryBank.slots_made": lambda s, n: s.lm.bank.slots_made > 0,
    "FetchedMemory.blocks": lambda s, n: list(map(_bytes, s.memory.blocks)),
    "FetchedMemory.lent": lambda s, n: s.memory.lent,
    "Prefetch.done": lambda s, n: s.ahead.wait() and s.ahead.done,
    "Prefetch.wait": lambda s, n: s.ahead.wait(10),
    "Conversation.is_kept": lambda s, n: s.talk.is_kept,
    "Conversation.refetch": lambda s, n: s.talk.refetch,
    "ClusterTree.added_bytes": lambda s, n: s.tree.with_added([_added()]).added_bytes(0),
    "ClusterTree.assign": lambda s, n: [_bytes(one) for one in s.tree.assign(_vectors(n))],
    "ClusterTree.branching": lambda s, n: s.tree.branching,
    "ClusterTree.levels": lambda s, n: s.tree.levels,
    "ClusterTree.load": lambda s, n: _tree(ClusterTree.load(s.folder / "memory/tree.safetensors")),
    "ClusterTree.load_added": lambda s, n: _tree(s.tree.load_added(s.added, 1)),
    "ClusterTree.route": lambda s, n: s.tree.route(_vectors(n)),
    "ClusterTree.width": lambda s, n: s.tree.width,
    "ClusterTree.with_added": lambda s, n: _tree(s.tree.with_added([_added()])),
    "Encoder.encode": lambda s, n: _bytes(s.bert.encode(TEXTS[n:])),
    "EmbeddingEncoder.encode": lambda s, n: _bytes(s.lm.encoder.encode(TEXTS[n:])),
    "Encoder.to_config": lambda s, n: (s.lm.encoder.to_config(), s.bert.to_config()),
    "Encoder.width": lambda s, n: (s.lm.encoder.width, s.bert.width),
    "MemoryConfig.added": lambda s, n: s.config.added,
    "MemoryConfig.added_roots": lambda s, n: s.config.added_roots(),
    "MemoryConfig.anchor_shape": lambda s, n: s.config.anchor_shape(),
    "MemoryConfig.bank_size": lambda s, n: s.config.bank_size(),
    "MemoryConfig.base_anchor": lambda s, n: s.config.base_anchor,
    "MemoryConfig.block_bytes": lambda s, n: s.config.block_bytes(1 + n),
    "MemoryConfig.block_size": lambda s, n: s.config.block_size(1 + n),
    "MemoryConfig.branching": lambda s, n: s.config.branching,
    "MemoryConfig.clusters": lambda s, n: s.config.clusters(1 + n),
    "MemoryConfig.dtype": lambda s, n: s.config.dtype,
    "MemoryConfig.fetch_size": lambda s, n: s.config.fetch_size(),
    "MemoryConfig.format_version": lambda s, n: s.config.format_version,
    "MemoryConfig.from_dict": lambda s, n: MemoryConfig.from_dict(s.config.to_dict()),
    "MemoryConfig.kind": lambda s, n: s.config.kind,
    "MemoryConfig.layers": lambda s, n: s.config.layers,
    "MemoryConfig.levels": lambda s, n: s.config.levels,
    "MemoryConfig.load": lambda s, n: MemoryConfig.load(s.folder / "memory/config.json"),
    "MemoryConfig.memory_layers": lambda s, n: s.config.memory_layers(
        AnchorShape.of(s.lm.model.anchor)
    ),
    "MemoryConfig.memory_levels": lambda s, n: s.config.memory_levels,
    "MemoryConfig.packing": lambda s, n: s.config.packing,
    "MemoryConfig.quantization": lambda s, n: s.config.quantization,
    "MemoryConfig.roots": lambda s, n: s.config.roots,
    "MemoryConfig.row_parts": lambda s, n: s.config.row_parts(),
    "MemoryConfig.row_widths": lambda s, n: s.config.row_widths(),
    "MemoryConfig.stored_dtype": lambda s, n: s.config.stored_dtype,
    "MemoryConfig.stored_size": lambda s, n: s.config.stored_size(1 + n),
    "MemoryConfig.to_dict": lambda s, n: s.config.to_dict(),
    "MemoryConfig.with_added": lambda s, n: s.config.with_added([]),
    "BlockReader.block": lambda s, n: _bytes(s.reader.block(1 + n, n)),
    "BlockReader.checksums": lambda s, n: sorted(s.reader.checksums or ()),
    "BlockReader.find": lambda s, n: s.reader.find(1 + n, n)[1],
    "BlockReader.has": lambda s, n: s.reader.has(1, n),
    "BlockReader.locate": lambda s, n: s.reader.locate(2, 8),
    "BlockReader.place": lambda s, n: s.reader.place(1),
    "BlockReader.real_name": lambda s, n: s.reader.real_name("generic.safetensors"),
    "BlockReader.real_path": lambda s, n: s.reader.real_path("generic.safetensors"),
    "BlockReader.shards": lambda s, n: s.reader.shards(1 + n),
    "BlockReader.stored": lambda s, n: _bytes(s.reader.stored(3, 20 + n)),
    "BlockReader.stored_shard": lambda s, n: _bytes(s.reader.stored_shard(3, n)),
}
#: Calls that take long are made less often: so many times.
COSTS = {"load": 100, "MemoryBank.open": 20, "Encoder.encode": 10, "MemoryModel": 5}
