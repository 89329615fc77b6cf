"""What the files beside an OpenLM checkpoint say: model_config JSON, params.txt, config.json.

Notable: several files may speak of one model, under several names for one thing. In OpenLM the
model's JSON wins over the arguments of the training run (params.txt), and so it does here. Within
one file two names may not contradict each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from mlx_hiermem.bank.files import read_text
from mlx_hiermem.errors import ConfigError, InputError
from mlx_hiermem.shapes import shown

from ..sources.tables import read_table
from .named import named

#: For each thing the names that it has in some file.
NAMES: dict[str, tuple[str, ...]] = {
    "hidden_dim": ("hidden_dim", "dim"),
    "n_layers": ("n_layers",),
    "n_heads": ("n_heads",),
    "seq_len": ("seq_len",),
    "vocab_size": ("vocab_size",),
    "post_embed_norm": ("post_embed_norm",),
    "weight_tying": ("weight_tying",),
    "model_norm": ("model_norm", "norm_type"),
    "norm_eps": ("norm_eps",),
    "qk_norm": ("qk_norm", "apply_qk_norm"),
    "positional_embedding_type": ("positional_embedding_type",),
    "ffn_type": ("ffn_type",),
    "moe_freq": ("moe_freq",),
    "attn_name": ("attn_name",),
    "attn_activation": ("attn_activation",),
    "attn_seq_scalar": ("attn_seq_scalar",),
    "attn_seq_scalar_alpha": ("attn_seq_scalar_alpha",),
    "model": ("model",),
    "precision": ("precision",),
    "fsdp_amp": ("fsdp_amp",),
    "fsdp_pure_bf16": ("fsdp_pure_bf16",),
    # Not OpenLM's own: of trainers that changed it, and of what we write ourselves.
    "head_dim": ("head_dim", "head_size", "dim_head"),
    "rope_theta": ("rope_theta", "rotary_base", "rope_base"),
    "rope_inv_freq_dtype": ("rope_inv_freq_dtype",),
    "intermediate_size": ("intermediate_size", "ffn_dim", "ffn_hidden_dim"),
}
#: Without these there is no model; where a file has none of them, ``model`` names a config.
SIZES = ("hidden_dim", "n_layers", "n_heads")
_LIMIT = 1 << 20
_PARAMS, _JSONS = "params.txt", ("model_config.json", "config.json")


@dataclass(frozen=True)
class Said:
    """A value, and where it stands (file and key, for messages)."""

    value: Any
    where: str

    def refuse(self, reason: str) -> NoReturn:
        """Raise ConfigError: the value, and what is wrong with it."""
        raise ConfigError(f"{self.where} is {shown(self.value)}; {reason}")


@dataclass
class Fields:
    """What all files say, by our names (the keys of ``NAMES``).

    Attributes:
        said: the value that counts, for each name that some file has.
        files: what was read, the first wins.
    """

    said: dict[str, Said] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    def add(self, path: Path, values: Mapping[str, Any], what: str | None = None) -> None:
        """Take what was not said before.

        Args:
            what: for messages, in place of the path.

        Raises:
            ConfigError: two names of one thing have different values.
        """
        where = what or str(path)
        for name, keys in NAMES.items():
            given = [
                Said(values[key], f"{where}: {key}") for key in keys if values.get(key) is not None
            ]
            for other in given[1:]:
                if other.value != given[0].value:
                    other.refuse(f"but {given[0].where} is {shown(given[0].value)}; correct one")
            if given:
                self.said.setdefault(name, given[0])
        if path not in self.files:
            self.files.append(path)

    def known_files(self) -> str:
        """The files, for messages."""
        return ", ".join(map(str, self.files)) or "no file"

    # ---- values of the right type ------------------------------------------------------

    def size(self, name: str, most: int, least: int = 1) -> int | None:
        """A whole number from ``least`` to ``most``; None: nothing is said."""
        if (said := self.said.get(name)) is None:
            return None
        if type(said.value) is not int or not least <= said.value <= most:
            said.refuse(f"expected a whole number from {least} to {most}")
        return said.value

    def positive(self, name: str) -> float | None:
        """A finite number above 0."""
        if (said := self.said.get(name)) is None:
            return None
        try:
            number = float(said.value) if type(said.value) in (int, float) else 0.0
        except OverflowError:
            number = math.inf
        if not 0 < number < math.inf:
            said.refuse("expected a finite number above 0")
        return number

    def flag(self, name: str) -> bool | None:
        """True or false."""
        if (said := self.said.get(name)) is None:
            return None
        if type(said.value) is not bool:
            said.refuse("expected true or false")
        return said.value

    def one_of(self, name: str, known: Sequence[str]) -> str | None:
        """A word out of a list."""
        if (said := self.said.get(name)) is None:
            return None
        if not isinstance(said.value, str) or said.value not in known:
            said.refuse(f"known are {', '.join(known)}")
        return said.value


def read_fields(source: Path, model_config: Path | None = None) -> Fields:
    """Read what the files beside a checkpoint say.

    Args:
        source: the checkpoint, a file or a folder. Looked at are its own folder, and that of the
            run where it lies in ``<run>/checkpoints``.
        model_config: a JSON or a params.txt that wins over all of them.

    Raises:
        ConfigError, InputError, FormatError: there is none, it cannot be read, or it names a model
            that nothing is known of.
    """
    fields = Fields()
    folder = _folder_with_config(source)
    params: list[Path] = []
    if folder is not None and (folder / _PARAMS).is_file():
        params.append(folder / _PARAMS)
    jsons: list[Path] = []
    if model_config is not None:
        if not model_config.is_file():
            raise InputError(f"--model-config {model_config}: no such file")
        if model_config.suffix == ".txt":
            params = [model_config]
        else:
            jsons.append(model_config)
    elif folder is not None:
        jsons = [folder / name for name in _JSONS if (folder / name).is_file()]
    for path in jsons:
        _add_with_named(fields, path, _from_json(path))
    for path in params:
        _add_with_named(fields, path, _from_params(path))
    if not fields.files:
        raise ConfigError(
            f"{source}: no config; expected params.txt, model_config.json or config.json beside it "
            "or in the folder of the run; give --model-config"
        )
    return fields


def _folder_with_config(source: Path) -> Path | None:
    start = (source if source.is_dir() else source.parent).resolve()
    tried = [start]
    if source.is_dir() or start.name == "checkpoints":
        tried.append(start.parent)
    if start.parent.name == "checkpoints":
        tried.append(start.parent.parent)
    for folder in tried:
        if any((folder / name).is_file() for name in (_PARAMS, *_JSONS)):
            return folder
    return None


def _from_json(path: Path) -> dict[str, Any]:
    """A model_config JSON, or the config.json of one of the two Hugging Face wrappers."""
    values = read_table(path, _LIMIT)
    inner = values.get("params_args_dict")
    if inner is not None:
        if not isinstance(inner, dict):
            raise ConfigError(f"{path}: params_args_dict is {shown(inner)}; expected an object")
        return inner
    if "hidden_size" in values and "num_hidden_layers" in values:
        raise ConfigError(
            f"{path}: has hidden_size and num_hidden_layers, so it is no config of OpenLM but of "
            "an MLX or Hugging Face model; expected hidden_dim, n_layers and n_heads"
        )
    return values


def _from_params(path: Path) -> dict[str, Any]:
    """The lines ``name: value`` that OpenLM writes of its arguments."""
    values: dict[str, Any] = {}
    for line in read_text(path.parent, path.name, _LIMIT).splitlines():
        name, colon, text = line.partition(":")
        name = name.strip()
        if not colon or not name.isidentifier():
            continue
        value = _scalar(text.strip())
        if name in values and values[name] != value:
            raise ConfigError(
                f"{path}: {name} is both {shown(values[name])} and {shown(value)}; correct one"
            )
        values[name] = value
    return values


def _scalar(text: str) -> Any:
    """A value as Python prints it; what is no number, truth or None is text."""
    words = {"None": None, "True": True, "False": False}
    if text in words:
        return words[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text.strip("'\"")


def _add_with_named(fields: Fields, path: Path, values: Mapping[str, Any]) -> None:
    """Add a file, and before it the config that it names, unless sizes are known."""
    model = values.get("model")
    if isinstance(model, str) and "mamba" in model.lower() or "d_model" in values:
        raise ConfigError(
            f"{path}: is of a Mamba model ({'model' if model else 'd_model'}), which is not "
            "supported; expected a transformer of OpenLM"
        )
    has_sizes = any(values.get(key) is not None for name in SIZES for key in NAMES[name])
    if isinstance(model, str) and not has_sizes and "hidden_dim" not in fields.said:
        # Only its name counts: a path in a file from elsewhere could lead anywhere.
        stem = model.replace("\\", "/").rpartition("/")[2].removesuffix(".json")
        beside = path.parent / f"{stem}.json"
        known = named(stem)
        if stem and not stem.startswith(".") and beside.is_file():
            fields.add(beside, _from_json(beside))
        elif known is not None:
            fields.add(path, known, f"OpenLM's config {stem} (which {path} names)")
        else:
            raise ConfigError(
                f"{path}: model is {shown(model)}, of which nothing is known; put "
                f"{shown(stem + '.json')} beside it, or give --model-config"
            )
    fields.add(path, values)
