"""A config names its encoder; what it names wrongly is refused in one line."""

from __future__ import annotations

import pytest

from mlx_hiermem.errors import ConfigError, FormatError
from mlx_hiermem.routing import load_encoder


@pytest.mark.parametrize(
    "config, says",
    [
        ({"type": "word2vec"}, "type is 'word2vec'; known are embeddings, bert"),
        ({}, "type is None"),
        ("bert", "type is None"),
        ({"type": "embeddings", "lower": True}, "unknown key lower"),
        ({"type": "embeddings", "lowercase": 1}, "lowercase is 1; expected .* bool"),
        ({"type": "embeddings"}, "needs the anchor"),
        ({"type": "bert", "layers": 6}, "unknown key layers"),
        ({"type": "bert", "model": 6}, "model is 6; expected .* str"),
        ({"type": "bert", "max_length": True}, "max_length is True"),
        ({"type": "bert", "model": "no such folder"}, "neither a folder nor"),
        ({"type": "bert", "model": "../missing"}, "neither a folder nor"),
    ],
)
def test_a_wrong_config_is_refused(tmp_path, config, says):
    with pytest.raises(ConfigError, match=says) as error:
        load_encoder(config, folder=tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_file_elsewhere_are_refused(tmp_path):
    import mlx.nn as nn

    anchor, tokenizer = nn.Embedding(4, 4), object()
    config = {"type": "embeddings", "file": "encoder.safetensors"}
    with pytest.raises(FormatError, match="encoder.safetensors: no such file"):
        load_encoder(config, folder=tmp_path, anchor=anchor, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="without a folder"):
        load_encoder(
            {**config, "file": "../x"}, folder=tmp_path, anchor=anchor, tokenizer=tokenizer
        )


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ConfigError, match=r"someone/model cannot be fetched .*no route to host"):
        load_encoder({"type": "bert", "model": "someone/model"}, folder=tmp_path)


def test_the_room_imports_no_framework():
    import subprocess
    import sys

    code = (
        "import sys, mlx_hiermem.routing, mlx_hiermem.routing.grow, mlx_hiermem.routing.embeddings;"
        "sys.exit(any(name in sys.modules for name in ('mlx.core', 'transformers', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
