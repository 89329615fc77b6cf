"""Names without the prefixes of wrappers, and renamed by a key map."""

from __future__ import annotations

import json

import pytest

from mlx_hiermem.convert.sources import clean, load_key_map
from mlx_hiermem.errors import ConfigError, FormatError


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("module.a.weight", "a.weight"),
        ("_orig_mod.module.a", "a"),
        ("layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.w", "layers.0.w"),
        ("model.a", "model.a"),
        ("module_list.0.w", "module_list.0.w"),
        ("my_module.w", "my_module.w"),
    ],
)
def test_clean(name, short):
    assert clean([name]) == {name: short}


def test_clean_collision():
    with pytest.raises(FormatError, match="'a.b' and 'a.module.b' are both 'a.b'"):
        clean(["a.b", "c", "a.module.b"])


def key_map(folder, table):
    path = folder / "map.json"
    path.write_text(table if isinstance(table, str) else json.dumps(table))
    return load_key_map(path)


def test_key_map(tmp_path):
    table = {
        r"blocks\.(\d+)\.mem\.(w\d)": r"layers.\1.memory.level1.\2",
        r"head\..*": None,
        r"blocks\..*": "never",
        "nothing": "x",
    }
    rules = key_map(tmp_path, table)
    assert rules.unused == list(table)
    renamed, left_out = rules.apply(["blocks.3.mem.w1", "head.bias", "norm", "xhead.y"])
    assert renamed == {
        "blocks.3.mem.w1": "layers.3.memory.level1.w1",
        "norm": "norm",
        "xhead.y": "xhead.y",
    }
    assert left_out == ["head.bias"]
    assert rules.unused == [r"blocks\..*", "nothing"]


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ("[]", "not a JSON object"),
        ("{", "not valid JSON"),
        ('{"a": "b", "a": "c"}', "twice"),
        ({"(": "a"}, "not a valid regular expression"),
        ({"a": r"\1"}, "not a valid regular expression or replacement"),
        ({"(a)": r"\g<b>"}, "not a valid regular expression or replacement"),
        ({"a": 7}, "expected a name or null"),
    ],
)
def test_bad_key_map(tmp_path, table, reason):
    with pytest.raises(ConfigError, match=reason) as error:
        key_map(tmp_path, table)
    assert "\n" not in str(error.value)


def test_key_map_collision(tmp_path):
    with pytest.raises(ConfigError, match="'a1' and 'a2' the same name, 'b'"):
        key_map(tmp_path, {"a.": "b"}).apply(["a1", "a2"])
    with pytest.raises(ConfigError, match="empty name"):
        key_map(tmp_path, {"a(.?)": r"\1"}).apply(["a"])
    with pytest.raises(ConfigError, match="no such file"):
        load_key_map(tmp_path / "no.json")
