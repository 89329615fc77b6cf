"""The encoder of a corpus: which one is asked for, what of it goes into ``routing/``, opening it.

A corpus and the model that is made from it stand on their own: a BERT from a folder is copied
(``routing/encoder/``), one from the Hub stays a name, and of the encoder that is made of the
anchor's token embeddings its own weights are kept, the table being the anchor's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, FormatError, InputError
from ..routing.embeddings import FILE, EmbeddingEncoder
from ..routing.encoder import Encoder
from ..routing.loading import load_encoder
from .config import DEFAULT_ENCODER, EMBEDDINGS, CorpusConfig
from .info import INFO
from .prepare import prepare
from .sources import Unit
from .windows import Windower, copy_files, load_tokenizer
from .workfolder import WorkFolder, read_json, write_array

TREE = "tree.safetensors"

#: The name of a BERT's copy in the routing folder, and its files.
_COPY = "encoder"
_BERT_FILES = (
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt",
    "special_tokens_map.json",
)  # fmt: skip

#: Documents that the encoder of embeddings is fitted on, and the units that they are drawn from.
FIT_DOCUMENTS, FIT_UNITS = 100_000, 256

_MAX_LENGTH = 256


@dataclass(frozen=True)
class Chosen:
    """The encoder of a corpus.

    Attributes:
        config: its entry in a memory's config.
        embedding_sha256: of the anchor's table (float32), for the type "embeddings".
    """

    config: dict[str, Any]
    embedding_sha256: str | None


def open_encoder(work: WorkFolder, config: Mapping[str, Any]) -> Encoder:
    """The encoder of a corpus in the making.

    Raises:
        ConfigError, FormatError: as :func:`load_encoder`.
    """
    if config["type"] == EMBEDDINGS:
        values = {key: value for key, value in config.items() if key != "type"}
        table = np.load(work.embeddings, mmap_mode="r", allow_pickle=False)
        return EmbeddingEncoder.load(work.routing, table, load_tokenizer(work.tokenizer), **values)
    return load_encoder(config, folder=work.routing)


def choose_encoder(
    work: WorkFolder,
    config: CorpusConfig,
    model: Path | None,
    units: Sequence[Unit],
    windower: Windower,
) -> Chosen:
    """Put the encoder that is asked for into the routing folder.

    Args:
        model: the anchor's folder.
        units, windower: the corpus, for an encoder that has to be fitted to it.

    Raises:
        ConfigError: the encoder is not the one of the tree that is asked for, or cannot be had.
        FormatError: files are damaged or cannot be written.
    """
    given = None if config.tree is None else _encoder_of_tree(config.tree)
    place = config.tree or Path(".")  # of the encoder that is given
    if config.encoder is None and given is not None:
        found = _copied(given, place, work.routing, config.encoder_max_length)
    elif config.encoder == EMBEDDINGS:
        found = given or {"type": EMBEDDINGS}
        if found["type"] != EMBEDDINGS:
            raise _another(config, found)
    else:
        name = config.encoder or DEFAULT_ENCODER
        wanted: dict[str, Any] = {"type": "bert", "model": name}
        length = config.encoder_max_length or (given or {}).get("max_length")
        wanted["max_length"] = length or _max_length(wanted)
        if given is not None and _identity(given, place) != _identity(wanted, Path(".")):
            raise _another(config, given)
        found = _copied(given or wanted, place, work.routing, None)
    if found["type"] != EMBEDDINGS:
        return Chosen(found, None)
    if model is None:
        raise ConfigError(
            f"{config.tree}: its encoder is made of the anchor's embeddings; give the anchor with "
            "--model"
        )
    sha256 = _write_table(work, model)
    if given is not None:
        _check_table(config, place, sha256)
        found = _copied(given, place, work.routing, None)
    else:
        found = _fit(work, config, units, windower)
    return Chosen(found, sha256)


def _another(config: CorpusConfig, given: Mapping[str, Any]) -> ConfigError:
    return ConfigError(
        f"{config.tree}: the tree was grown with the encoder {_told(given)}, not with --encoder "
        f"{config.encoder}; a tree means nothing to another encoder: leave --encoder out, or "
        "grow a tree"
    )


def _told(encoder: Mapping[str, Any]) -> str:
    told = ", ".join(f"{key} {value}" for key, value in encoder.items() if key != "type")
    return f"{encoder.get('type')} ({told})"


def _encoder_of_tree(folder: Path) -> dict[str, Any]:
    """The encoder's config that belongs to the tree in a routing or memory folder."""
    from ..routing.tree import ClusterTree

    tree = ClusterTree.load(folder / TREE)
    found = tree.encoder
    if found is None and (folder / "config.json").is_file():
        found = read_json(folder / "config.json").get("encoder")
    if not isinstance(found, Mapping) or found.get("type") not in (EMBEDDINGS, "bert"):
        raise ConfigError(
            f"{folder / TREE}: does not say which encoder it was grown with; grow one with "
            "mlx_hiermem cluster"
        )
    return dict(found)


def _copied(
    encoder: Mapping[str, Any], source: Path, routing: Path, max_length: int | None
) -> dict[str, Any]:
    """Copy what the encoder's config names into the routing folder; returns the config there."""
    found = dict(encoder)
    if max_length is not None and found.get("max_length", max_length) != max_length:
        raise InputError(
            f"--encoder-max-length is {max_length}, but the tree was grown with "
            f"{found['max_length']}; leave it out"
        )
    if found["type"] == EMBEDDINGS:
        file = found.get("file", FILE)
        if Path(file).name != file:
            raise ConfigError(f"encoder: file is {file!r}; expected a name without a folder")
        if (source / file).is_file():
            copy_files(source, routing, [file])
        return found
    folder = _local(found, source)
    if folder is None:
        return found  # a Hub repository: it is fetched by its name
    names = [name for name in _BERT_FILES if (folder / name).is_file()]
    copy_files(folder, routing / _COPY, names)
    return found | {"model": _COPY}


def _local(encoder: Mapping[str, Any], source: Path) -> Path | None:
    """The folder that a BERT's config names, seen from ``source``; None for a repository."""
    name = encoder.get("model", DEFAULT_ENCODER)
    return next((p for p in (source / name, Path(name).expanduser()) if p.is_dir()), None)


def _max_length(encoder: Mapping[str, Any]) -> int:
    """The default, or what the positions of a BERT from a folder allow, where they are fewer."""
    folder = _local(encoder, Path("."))
    if folder is None or not (folder / "config.json").is_file():
        return _MAX_LENGTH
    positions = read_json(folder / "config.json").get("max_position_embeddings")
    return min(_MAX_LENGTH, positions) if type(positions) is int and positions > 2 else _MAX_LENGTH


def _identity(encoder: Mapping[str, Any], source: Path) -> Any:
    """What two configs of one encoder have in common, wherever its folder is."""
    if encoder["type"] == EMBEDDINGS:
        return EMBEDDINGS
    length = encoder.get("max_length", _MAX_LENGTH)
    folder = _local(encoder, source)
    if folder is None:
        return encoder.get("model", DEFAULT_ENCODER), encoder.get("revision"), length
    digest = hashlib.sha256()
    for name in _BERT_FILES[:3]:
        path = folder / name
        digest.update(hashlib.sha256(path.read_bytes() if path.is_file() else b"").digest())
    return digest.hexdigest(), length


# ---- the encoder that is made of the anchor's embeddings --------------------------------


def _anchor_table(model: Path) -> np.ndarray:
    from ..anchors import load_anchor
    from ..routing.embeddings import embedding_table

    return np.ascontiguousarray(embedding_table(load_anchor(model)[0]), np.float32)


def _write_table(work: WorkFolder, model: Path) -> str:
    table = _anchor_table(model)
    write_array(work.embeddings, table)
    return hashlib.sha256(table.tobytes()).hexdigest()


def _check_table(config: CorpusConfig, tree: Path, sha256: str) -> None:
    """Raise ConfigError where the tree was grown with the embeddings of another anchor."""
    beside = tree.resolve().parent
    if (beside / INFO).is_file():
        theirs = read_json(beside / INFO).get("embedding_sha256")
    elif (beside / "config.json").is_file():  # memory/ of a model folder
        theirs = hashlib.sha256(_anchor_table(beside).tobytes()).hexdigest()
    else:
        return
    if theirs != sha256:
        raise ConfigError(
            f"{config.tree}: the tree was grown with the token embeddings of another anchor than "
            f"--model {config.model}; give the anchor that it belongs to, or grow a tree"
        )


def _fit(
    work: WorkFolder, config: CorpusConfig, units: Sequence[Unit], windower: Windower
) -> dict[str, Any]:
    """Fit weights and common components to a sample of the corpus, and save them."""
    from tqdm import tqdm

    table = np.load(work.embeddings, mmap_mode="r", allow_pickle=False)
    texts = _sample(config, units, windower)
    with tqdm(texts, desc="fitting the encoder", unit=" texts", disable=None) as bar:
        encoder = EmbeddingEncoder.fit(table, load_tokenizer(work.tokenizer), bar, seed=config.seed)
    try:
        encoder.save(work.routing)
    except OSError as error:
        raise FormatError(f"{work.routing}: cannot be written ({error.strerror})") from None
    return encoder.to_config()


def _sample(config: CorpusConfig, units: Sequence[Unit], windower: Windower) -> Iterator[str]:
    """Texts of the first documents of some units, drawn evenly.

    Raises:
        InputError: there is not one.
    """
    order = np.random.default_rng([config.seed, 2]).permutation(len(units))[:FIT_UNITS]
    each, found = -(-FIT_DOCUMENTS // len(order)), False
    for number in order.tolist():
        left = each
        for batch in prepare(units[number], windower, config.text_field, config.views):
            for document in batch[:left]:
                if document is not None:
                    found = True
                    yield from document.texts
            left -= len(batch)
            if left <= 0:
                break
    if not found:
        raise InputError("the corpus holds no document with text in it; give some")
