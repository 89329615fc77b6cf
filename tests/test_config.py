"""MemoryConfig: the paper's sizes to the digit, what it refuses, and its file."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_hiermem.config import DTYPE_BYTES, KINDS, AnchorShape, MemoryConfig, placement
from mlx_hiermem.errors import ConfigError

# Layers, hidden, FFN, heads, head size. The first three are the paper's; of the others only
# layers and hidden matter to an FFN memory.
ANCHORS = {
    "160M": AnchorShape(35, 512, 2048, 12, 32),
    "410M": AnchorShape(24, 1024, 2816, 16, 64),
    "1.4B": AnchorShape(24, 2048, 5632, 16, 128),
    "Gemma 3 270M": AnchorShape(18, 640, 2048, 4, 256),
    "Qwen 2.5 0.5B": AnchorShape(24, 896, 4864, 14, 64),
    "Llama 3.2 1B": AnchorShape(16, 2048, 8192, 32, 64),
}

SIZE_TABLE = [
    ("160M", (256, 64, 16, 0), 18_063_360, 4_624_220_160),
    ("410M", (512, 128, 32, 0), 49_545_216, 12_683_575_296),
    ("1.4B", (768, 256, 16, 0), 153_354_240, 21_139_292_160),
    ("Gemma 3 270M", (512, 128, 32, 0), 23_224_320, 5_945_425_920),
    ("Qwen 2.5 0.5B", (512, 128, 32, 0), 43_352_064, 11_098_128_384),
    ("Llama 3.2 1B", (768, 256, 16, 0), 102_236_160, 14_092_861_440),
]


@pytest.mark.parametrize(("anchor", "ranks", "fetch", "bank"), SIZE_TABLE)
def test_sizes_of_the_paper(anchor, ranks, fetch, bank):
    config = MemoryConfig(ranks=ranks)
    assert config.fetch_size(ANCHORS[anchor]) == fetch
    assert config.bank_size(ANCHORS[anchor]) == bank


def test_bank_with_a_fourth_level():
    config = MemoryConfig(ranks=(256, 64, 16, 4))
    assert config.fetch_size(ANCHORS["160M"]) == 18_278_400
    assert f"{config.bank_size(ANCHORS['160M']) / 1e9:.1f}B" == "18.7B"


def test_levels_blocks_and_bytes():
    config = MemoryConfig(ranks=(3, 0, 1), branching=4, layers=(0, 2), dtype="bfloat16")
    anchor = AnchorShape(4, 8, 16, 2, 4)
    assert config.levels == 3
    assert config.memory_levels == (1, 3)
    assert [config.clusters(level) for level in (1, 2, 3)] == [4, 16, 64]
    assert config.memory_layers(anchor) == (0, 2)
    assert config.row_widths(anchor) == (8,) * 6
    assert [config.block_size(level, anchor) for level in (1, 2, 3)] == [144, 0, 48]
    assert config.block_bytes(1, anchor) == 288
    assert config.fetch_size(anchor) == 192
    assert config.bank_size(anchor) == 4 * 144 + 64 * 48


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ranks": ()}, "ranks"),
        ({"ranks": (0, 0)}, "ranks"),
        ({"ranks": (4, -1)}, "ranks"),
        ({"ranks": (4, 1.5)}, "ranks"),
        ({"ranks": (True, 1)}, "ranks"),
        ({"ranks": 4}, "ranks"),
        ({"ranks": "42"}, "ranks"),
        ({"kind": "mlp"}, "kind"),
        ({"kind": None}, "kind"),
        ({"branching": 1}, "branching"),
        ({"branching": 16.0}, "branching"),
        ({"branching": True}, "branching"),
        ({"levels": 3}, "levels"),
        ({"levels": 2.0}, "levels"),
        ({"ranks": (1,) * 16, "branching": 16}, "16^16"),
        ({"layers": ()}, "layers"),
        ({"layers": (1, 1)}, "layers"),
        ({"layers": (2, 1)}, "layers"),
        ({"layers": (-1,)}, "layers"),
        ({"layers": "01"}, "layers"),
        ({"encoder": {}}, "encoder"),
        ({"encoder": {"type": "word2vec"}}, "encoder"),
        ({"encoder": "bert"}, "encoder"),
        ({"dtype": "int8"}, "dtype"),
        ({"dtype": ["float32"]}, "dtype"),
        ({"quantization": {"bits": 4}}, "quantization"),
        ({"base_anchor": {"name": "160M"}}, "base_anchor"),
        ({"base_anchor": {"shape": {"hidden_size": 8}}}, "num_hidden_layers"),
        ({"format_version": 2}, "format_version"),
        ({"rank": (4, 1)}, "rank"),
    ],
)
def test_unknown_and_contradictory_values_are_refused_by_name(change, named):
    with pytest.raises(ConfigError) as caught:
        MemoryConfig.from_dict({"ranks": (4, 1), **change})
    text = str(caught.value)
    assert named in text
    assert "\n" not in text


def test_layers_that_the_anchor_has_not():
    shape = {"num_hidden_layers": 4, "hidden_size": 8, "intermediate_size": 16}
    shape |= {"num_attention_heads": 2, "head_dim": 4}
    with pytest.raises(ConfigError, match="names layer 4, but the anchor has 4 layers"):
        MemoryConfig(ranks=(2,), layers=(0, 4), base_anchor={"name": "a", "shape": shape})
    with pytest.raises(ConfigError, match="names layer 4"):
        MemoryConfig(ranks=(2,), layers=(0, 4)).fetch_size(shape)


def test_ranks_are_required():
    with pytest.raises(ConfigError, match="ranks is missing"):
        MemoryConfig.from_dict({"kind": "ffn"})


def test_sizes_need_an_anchor():
    with pytest.raises(ConfigError, match="base_anchor is null"):
        MemoryConfig(ranks=(2,)).fetch_size()


def test_head_size_is_its_own_field():
    sizes = {"num_hidden_layers": 35, "hidden_size": 512, "intermediate_size": 2048}
    sizes["num_attention_heads"] = 12
    assert AnchorShape.of({**sizes, "head_dim": 32}) == ANCHORS["160M"]
    assert AnchorShape.of({**sizes, "num_attention_heads": 16}).head_dim == 32


@pytest.mark.parametrize("size", [0, -8, 8.0, "8", True, None])
def test_anchor_sizes_are_positive_integers(size):
    sizes = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "head_dim": 4}
    with pytest.raises(ConfigError, match="intermediate_size"):
        AnchorShape.of({**sizes, "intermediate_size": size})


@st.composite
def configs(draw) -> MemoryConfig:
    layers = draw(st.none() | st.sets(st.integers(0, 5), min_size=1))
    shape = dict(zip(AnchorShape.__annotations__, (6, 8, 16, 2, 4, 1), strict=True))
    return MemoryConfig(
        ranks=draw(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any)),
        kind=draw(st.sampled_from(KINDS)),
        branching=draw(st.integers(2, 32)),
        layers=None if layers is None else sorted(layers),
        encoder={"type": draw(st.sampled_from(["bert", "embeddings"])), "name": draw(st.text())},
        dtype=draw(st.sampled_from(sorted(DTYPE_BYTES))),
        base_anchor=draw(st.none() | st.just({"name": "tiny", "shape": shape})),
    )


@given(configs())
def test_json_brings_back_an_equal_config(config):
    assert MemoryConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_file_brings_back_an_equal_config(tmp_path):
    config = MemoryConfig(ranks=(4, 1), encoder={"type": "bert", "name": "köln"})
    config.save(tmp_path / "config.json")
    assert MemoryConfig.load(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        (b'{"ranks": [4', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "expected a JSON object"),
        (b'{"ranks": [4, 1], "kind": "mlp"}', "kind is 'mlp'"),
    ],
)
def test_errors_of_a_file_name_the_file(tmp_path, content, said):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        MemoryConfig.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("where", "layers", "expected"),
    [
        ("uniform", 5, None), ("early", 4, (0, 1)), ("middle", 4, (1, 2)), ("late", 4, (2, 3)),
        ("early", 5, (0, 1, 2)), ("middle", 5, (1, 2, 3)), ("late", 5, (2, 3, 4)),
        ("late", 1, (0,)), ("0", 3, (0,)), ("0, 2", 3, (0, 2)),
    ],
)  # fmt: skip
def test_placements(where, layers, expected):
    assert placement(where, layers) == expected


@pytest.mark.parametrize("where", ["", "first", "late,1", "1,,2", "-1", "1.5", "²", "9" * 99])
def test_a_placement_that_is_none(where):
    with pytest.raises(ConfigError, match="expected one of uniform, early, middle, late, or"):
        placement(where, 4)


def test_the_shape_of_an_anchor_that_sees_is_that_of_its_language_model():
    sizes = dict(
        num_hidden_layers=2, hidden_size=8, intermediate_size=9, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    found = AnchorShape.of({"model_type": "any", "text_config": sizes})
    assert found == AnchorShape(2, 8, 9, 4, 2, 2)
    assert (found.attention_width, found.key_value_width) == (8, 4)


def test_a_shape_from_before_heads_could_share_keys():
    shape = {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 9}
    shape |= {"num_attention_heads": 4, "head_dim": 2}
    assert AnchorShape.of(shape).num_key_value_heads == 4
