"""Model folders that are not what they were: loaded, and asked for one token."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from random import Random

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import llama

import mlx_hiermem
from tests.bank.mutations import mutated_json
from tests.reliability.fuzz_mutations import WORDS, anywhere, as_json, as_lines, as_safetensors
from tests.reliability.fuzz_process import FolderTarget
from tests.tiny import END_OF_TEXT, make_tiny_model

#: Keys that make other loaders run a program of the folder, and names of such programs.
_PROGRAM = "program.py"
_RUNS = {
    "model_file": _PROGRAM,
    "auto_map": {
        "AutoConfig": "program.Config",
        "AutoModelForCausalLM": "program.Model",
        "AutoTokenizer": ["program.Tokenizer", "program.Tokenizer"],
    },
    "trust_remote_code": True,
    "tokenizer_file": "../../x.json",
    "tokenizer_class": "program.Tokenizer",
    "chat_template_type": "program",
    "tool_parser_type": "..program",
}
#: Values that other architectures have keys for.
_CONFIG = {
    "model_type": [
        "llama", "openlm", "qwen2", "gemma3", "mixtral", "mamba", "gpt2", "deepseek_v3",
        "../llama", "os", "base", "cache", "switch_layers", "pixtral", "LLAMA", "llama\0",
        "mlx_lm.models.llama",
    ],
    "quantization": [
        {"group_size": 32, "bits": 4}, {"group_size": 0, "bits": 4}, {"bits": -1}, [], "x",
        {"group_size": 2**40, "bits": 3, "mode": "affine"}, {"mode": "mxfp4"},
        {"group_size": 32, "bits": 4, "model.embed_tokens": False},
        {"group_size": 32, "bits": 4, "model.layers.0.mlp.gate_proj": {"bits": 2**70}},
    ],
    "quantization_config": [
        {"quant_method": "mxfp4"}, {"quant_method": "bitnet"}, {"quant_method": "awq"},
        {"quant_method": "compressed-tensors"}, {"quant_method": []}, {"group_size": 64}, "x", 3,
    ],
    "rope_scaling": [
        {"type": "linear", "factor": 0}, {"type": "yarn"}, {"type": "x"}, {"factor": "a"}, [], 1,
        {"type": "llama3", "factor": 8.0, "low_freq_factor": 0, "high_freq_factor": 0,
         "original_max_position_embeddings": 0},
    ],
    "num_hidden_layers": [0, -1, 3, 500, 9_999, 10_001, 2**20, 2**31, 1.5, "2"],
    "vocab_size": [0, -1, 1, 256, 258, 2**31, 2**40, None],
    "hidden_size": [0, -16, 15, 2**15, 2**31 - 1, 2**40],
    "intermediate_size": [0, -1, 31, 2**30, 2**31 - 1],
    "num_attention_heads": [0, -1, 3, 2**31],
    "num_key_value_heads": [0, -1, 3, 2**31],
    "head_dim": [0, -8, 7, 2**31],
    "rope_theta": [0, -1, "NaN", 1e308],
    "eos_token_id": [-1, 2**70, [], [[1]], ["a"], "a", {"a": 1}, None],
    "max_position_embeddings": [1, 2, 4, 2**31, -3, 1.5],
    "tie_word_embeddings": [True, None, "yes"],
    "text_config": [{}, [], {"hidden_size": 2**40}, {"model_type": "llama"}],
    "layer_types": [[], ["full_attention"], ["sliding_attention"] * 2, [3]],
}  # fmt: skip


class Models(FolderTarget):
    """Two models with a bank: the paper's anchor, and one of mlx-lm's."""

    def make(self) -> None:
        """Write them."""
        for name in ("openlm", "llama"):
            folder = make_tiny_model(self.folder / name, ranks=(2, 1), branching=2)
            chat = json.loads((folder / "tokenizer_config.json").read_text())
            chat["chat_template"] = "{% for m in messages %}{{ m.content }}{% endfor %}"
            (folder / "tokenizer_config.json").write_text(json.dumps(chat))
            generation = {"max_length": 20, "eos_token_id": 256, "temperature": 0.7, "top_p": 0.9}
            (folder / "generation_config.json").write_text(json.dumps(generation))
            special = {"eos_token": END_OF_TEXT, "pad_token": {"content": END_OF_TEXT}}
            (folder / "special_tokens_map.json").write_text(json.dumps(special))
        _write_llama(self.folder / "llama")
        for folder in self.folder.iterdir():
            assert len(_ask(folder)) > 0

    def change(self, random: Random) -> str:
        """Change a file of one of the models, or several."""
        self.home = random.choice(["openlm", "llama"])
        kind = random.choice(["config"] * 5 + ["json"] * 2 + ["any"] * 5 + ["program", "missing"])
        names = [
            name for name in self.files
            if name.startswith(f"{self.home}/") and "/memory/" not in name
        ]  # fmt: skip
        if kind == "config":
            return self._config(random)
        if kind == "json":
            name = f"{self.home}/config.json"
            self.put(
                name, mutated_json(random, self.files[name].decode()).encode("utf-8", "replace")
            )
            return name
        if kind == "program":
            return self._program(random)
        name = random.choice(names)
        if kind == "missing":
            self.remove(name)
            if random.random() < 0.3:
                other = random.choice(
                    [
                        "model.safetensors.index.json",
                        "pytorch_model.bin",
                        "tokenizer.model",
                        "vocab.json",
                        "chat_template.jinja",
                    ]
                )
                self.put(f"{self.home}/{other}", anywhere(random, self.files[name][:5000]))
            return f"without {name}"
        self.put(name, self._changed(random, name))
        return name

    def _changed(self, random: Random, name: str) -> bytes:
        data = self.files[name]
        if random.random() < 0.05:
            return random.choice(list(self.files.values()))
        if name.endswith(".safetensors"):
            return as_safetensors(random, data)
        if name.endswith(".json"):
            return as_json(random, data)
        return as_lines(random, data)

    def _config(self, random: Random) -> str:
        name = f"{self.home}/config.json"
        config = json.loads(self.files[name])
        chosen = {key: random.choice(_CONFIG[key]) for key in random.choices(list(_CONFIG), k=2)}
        if random.random() < 0.1:
            chosen[random.choice(list(config))] = random.choice(WORDS)
        self.put(name, json.dumps({**config, **chosen}).encode())
        return f"{name}: {chosen}"

    def _program(self, random: Random) -> str:
        """Files that ask to be run."""
        code = f"open({str(self.canary)!r}, 'w').close()\nclass Model: pass\n"
        for other in (_PROGRAM, "modeling_openlm.py", "tokenization_openlm.py", "__init__.py"):
            self.put(f"{self.home}/{other}", code.encode())
        keys = random.sample(list(_RUNS), random.randint(1, len(_RUNS)))
        chosen = {key: _RUNS[key] for key in keys}
        for name in ("config.json", "tokenizer_config.json"):
            where = f"{self.home}/{name}"
            table = {**json.loads(self.files[where]), **chosen}
            if random.random() < 0.3:
                table["model_type"] = random.choice(["program", "custom", "llama"])
            self.put(where, json.dumps(table).encode())
        if random.random() < 0.5:
            self.remove(f"{self.home}/tokenizer.json")
        return f"{self.home}: {chosen}"

    def look(self, random: Random) -> None:
        """Load it and ask for a token."""
        _ask(self.folder / self.home)

    def restore(self) -> None:
        """Nothing of the models before is kept either."""
        super().restore()
        shutil.rmtree(self.folder / self.home / "__pycache__", ignore_errors=True)
        mx.clear_cache()


def _ask(folder: Path) -> str:
    lm = mlx_hiermem.load(folder)
    try:
        return lm.generate("gold", max_tokens=1)
    finally:
        lm.bank.close()


def _write_llama(folder: Path) -> None:
    """Put another anchor of the same sizes in the place of the paper's."""
    args = llama.ModelArgs(
        model_type="llama", hidden_size=16, num_hidden_layers=2, intermediate_size=32,
        num_attention_heads=2, head_dim=8, vocab_size=257, max_position_embeddings=256,
        rms_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip
    rng = np.random.default_rng(1)
    weights = {
        name: mx.array(rng.standard_normal(value.shape, dtype=np.float32) * 0.3)
        for name, value in tree_flatten(llama.Model(args).parameters())
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps({**asdict(args), "eos_token_id": 256}))
