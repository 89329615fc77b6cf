"""Files of PyTorch that are not what they were: opened without PyTorch, and their tensors read.

Archives and legacy files of ``torch.save``, folders of torch.distributed.checkpoint, and sharded
safetensors with an index. Part of them begin as attacks, whose code would make the canary.
"""

from __future__ import annotations

import json
import os
import pickle
import warnings
from random import Random

import torch
from huggingface_hub import save_torch_state_dict

from mlx_hiermem.bank.dtypes import STORAGE
from mlx_hiermem.convert.sources import open_source
from tests.convert.attack_dcp import save_dcp
from tests.convert.attacks import CODE, Call, archive, records, touch
from tests.reliability.fuzz_mutations import (
    anywhere,
    as_json,
    as_pickle,
    as_safetensors,
    as_zip,
    in_zip,
)
from tests.reliability.fuzz_process import FolderTarget


class Checkpoints(FolderTarget):
    """The same tensors in every format, and attacks."""

    def make(self) -> None:
        """Write them."""
        generator = torch.Generator().manual_seed(0)
        state = {
            "a": torch.randn(4, 6, generator=generator),
            "b": torch.ones(5, dtype=torch.bfloat16),
            "c.d": torch.arange(3).half(),
        }
        state["e"] = state["a"][1:]
        torch.save({"state_dict": state, "epoch": 3, "name": "x"}, self.folder / "zip.pt")
        torch.save(
            {"state_dict": state, "epoch": 3},
            self.folder / "legacy.pt",
            _use_new_zipfile_serialization=False,
        )
        plain = {name: tensor.contiguous() for name, tensor in state.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save_dcp(self.folder / "dcp", {"model": plain, "epoch": 3})
        (self.folder / "sharded").mkdir()
        save_torch_state_dict(plain, self.folder / "sharded", max_shard_size=60)
        (self.folder / "attacks").mkdir()
        for number, (make, _) in enumerate(CODE.values()):
            make(self.folder / "attacks" / f"{number}.pt", self.canary)
        # What would run, to be put into honest pickles.
        call = pickle.dumps(Call(os.system, touch(self.canary)), 2)
        self.calls = [call[2:-1], pickle.dumps(Call(open, str(self.canary), "w"), 2)[2:-1]]
        assert not self.canary.exists()
        for name in ("zip.pt", "dcp", "sharded"):
            self.path = name
            self.look(Random(0))

    def change(self, random: Random) -> str:
        """Change a file of one of the checkpoints."""
        kind = random.choice(["zip.pt"] * 4 + ["legacy.pt"] + ["dcp"] * 3 + ["sharded", "attacks"])
        self.path = kind
        inside = [name for name in self.files if name == kind or name.startswith(f"{kind}/")]
        name = random.choice(inside)
        if kind == "dcp" and random.random() < 0.6:
            name = "dcp/.metadata"
        if kind == "attacks":
            self.path = name
        data = self._changed(random, name)
        self.put(name, data)
        return f"{name}: {data[:300]!r}"

    def _changed(self, random: Random, name: str) -> bytes:
        data = self.files[name]
        if random.random() < 0.02:
            return random.choice(list(self.files.values()))
        if name.endswith(".safetensors"):
            return as_safetensors(random, data)
        if name.endswith(".json"):
            return as_json(random, data)
        if name.endswith(".metadata"):
            return as_pickle(random, data, self.calls)
        if name == "legacy.pt" or name.startswith("dcp/"):
            return random.choice([anywhere, as_pickle])(random, data)
        kind = random.choice(["zip", "pickle", "pickle", "made"])
        if kind == "zip":
            return as_zip(random, data)
        if kind == "pickle":
            return in_zip(random, data, "data.pkl", self.calls)
        made = pickle.dumps(random.choice(_ODD), 2)
        return archive(records(as_pickle(random, made, self.calls)))

    def look(self, random: Random) -> None:
        """Open it, and read what it holds."""
        path = self.folder / self.path
        with open_source(path) as source:
            assert json.dumps(source.extras)
            read = 0
            for tensor in list(source.tensors.values())[:50]:
                if tensor.dtype in STORAGE:
                    read += tensor.read().nbytes
            assert read < 1 << 16, f"{read} bytes out of files of a few thousand"


_ODD = [
    {},
    [],
    (),
    {"a": (1, 2.5, None, True)},
    {1: {2: {3: "x"}}},
    "text",
    b"bytes",
    {"a": 10**40},
]
