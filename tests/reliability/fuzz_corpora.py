"""Corpora that are not what ``cluster`` wrote: opened, read, verified, and routed with."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from random import Random

import numpy as np

from mlx_hiermem.corpus.folder import Corpus, file_sha256, folder_sha256
from mlx_hiermem.corpus.windows import load_tokenizer
from mlx_hiermem.routing.names import ClusterNames
from mlx_hiermem.tree_source import open_routing
from tests.corpus.corpora import make_documents, write_jsonl
from tests.reliability.fuzz_mutations import WORDS, anywhere, as_json, as_safetensors
from tests.reliability.fuzz_process import FolderTarget
from tests.tiny import make_tiny_model
from tests.training.runs import make_corpus

_INFO = "corpus.json"
#: What the header of an array may say instead.
_DTYPES = ["|O", "<u4", ">u2", "<i8", "|S5", "[('a', '<u2')]", "<f8", "|V2", "<u2\x00"]
_SHAPES = ["(2, 32)", "(10, 32)", "(1e9,)", "(4611686018427387904, 4)", "(-1, 32)", "()", "(0, 32)",
           "(99999999999999999999, 1)", "[3]", "None", "(True, 32)"]  # fmt: skip


class Corpora(FolderTarget):
    """A corpus of two splits with the tokenizer, the tree, the encoder and the names."""

    def make(self) -> None:
        """Cluster some documents."""
        place = self.folder.parent / "place"
        make_tiny_model(place / "model")
        shutil.copytree(place / "model", place / "anchor", ignore=shutil.ignore_patterns("memory"))
        write_jsonl(place / "some.jsonl", make_documents(120))
        make_corpus(place, "corpus")
        shutil.copytree(place / "corpus", self.folder, dirs_exist_ok=True)
        shutil.rmtree(place)
        self.look(Random(0))

    def change(self, random: Random) -> str:
        """Change one of the files; the table agrees with it then, or not."""
        arrays = [name for name in self.files if name.endswith(".npy")]
        name = random.choice([_INFO, _INFO, random.choice(arrays), random.choice(list(self.files))])
        data = self.files[name]
        if random.random() < 0.04:
            data = self.files[random.choice(list(self.files))]
        elif name.endswith(".npy"):
            data = _other_array(random, data)
        elif name.endswith(".json"):
            data = as_json(random, data)
        elif name.endswith(".safetensors"):
            data = as_safetensors(random, data)
        else:
            data = anywhere(random, data)
        self.put(name, data)
        sealed = random.random() < 0.7
        if sealed:
            self._put.add(_INFO)
            _reseal(self.folder)
        return f"{name}, sealed {sealed}: {data[:200]!r}"

    def look(self, random: Random) -> None:
        """Everything that reads a corpus."""
        corpus = Corpus.open(self.folder)
        corpus.tree()
        for split in corpus.splits.values():
            tokens, leaves = split.take(np.arange(min(len(split), 20)))
            assert len(tokens) == len(leaves)
            split.take(np.array([len(split) - 1]))
        ClusterNames.load(corpus.routing_folder)
        open_routing(self.folder)
        if random.random() < 0.5:
            corpus.verify()
        if random.random() < 0.2:
            load_tokenizer(corpus.tokenizer_folder)


def _other_array(random: Random, data: bytes) -> bytes:
    """A .npy with another header, or other numbers."""
    if random.random() < 0.4:
        return anywhere(random, data)
    length = int.from_bytes(data[8:10], "little")
    header, numbers = data[10 : 10 + length].decode("latin-1"), data[10 + length :]
    kind = random.choice(["dtype", "shape", "order", "word", "version", "length", "numbers"])
    if kind == "dtype":
        dtype = random.choice(_DTYPES)
        header = re.sub("'descr': '[^']*'", lambda _: f"'descr': {dtype!r}", header)
    elif kind == "shape":
        header = header.replace(header[header.index("(") : header.index(")") + 1],
                                random.choice(_SHAPES))  # fmt: skip
    elif kind == "order":
        header = header.replace("False", random.choice(["True", "1", "open('x')", "[" * 999]))
    elif kind == "word":
        header = random.choice(WORDS)[:5000].encode("utf-8", "replace").decode("latin-1")
    elif kind == "version":
        return data[:6] + random.randbytes(2) + data[8:]
    elif kind == "length":
        return data[:8] + random.choice([0, 1, 9, 2**16 - 1]).to_bytes(2, "little") + data[10:]
    else:
        number = random.choice([-1, 2**62, 2**63 - 1, -(2**63), 9])
        numbers = number.to_bytes(8, "little", signed=True) + numbers[8:]
    text = header.encode("latin-1")
    return data[:8] + len(text).to_bytes(2, "little") + text + numbers


def _reseal(folder: Path) -> None:
    """Make the table agree with the files, as somebody would who changes them on purpose."""
    path = folder / _INFO
    try:
        table = json.loads(path.read_text())
        for name, split in table["splits"].items():
            for shard in split["shards"]:
                for kind in ("tokens", "leaves"):
                    shard[f"{kind}_sha256"] = file_sha256(folder / name / shard[kind])
        table["tree_sha256"] = file_sha256(folder / "routing" / "tree.safetensors")
        table["tokenizer"]["sha256"] = folder_sha256(folder / "tokenizer")
        table.pop("revision")
        text = json.dumps(table, sort_keys=True, separators=(",", ":"))
        revision = hashlib.sha256(text.encode()).hexdigest()
        path.write_text(json.dumps({"revision": revision, **table}))
    except Exception:
        pass  # what is there is no table any more
