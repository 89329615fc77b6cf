"""Keys that transformers 5 writes, in the words of mlx-lm's models."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from mlx_lm.models import gemma3_text, llama, ministral3, stablelm

from mlx_hiermem.anchors import get_model_classes
from mlx_hiermem.anchors.rope import older_keys
from mlx_hiermem.errors import ConfigError

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}


def test_a_config_in_the_older_words_stays_as_it_is():
    assert older_keys({"rope_theta": 5.0}, llama.ModelArgs) == {}
    new = {"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}
    assert older_keys(new, llama.ModelArgs) == {"rope_theta": 7.0}
    assert older_keys({**new, "rope_theta": 5.0}, llama.ModelArgs) == {}


def test_scaling_and_types_of_layers():
    scaled = {"rope_parameters": {"rope_theta": 7.0, **LLAMA3}}
    assert older_keys(scaled, llama.ModelArgs) == {"rope_theta": 7.0, "rope_scaling": LLAMA3}
    local = {"rope_theta": 5.0, "rope_type": "default"}
    types = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    config = {
        "rope_parameters": {
            "full_attention": {"rope_theta": 9.0, **LLAMA3},
            "sliding_attention": local,
        },
        "layer_types": types,
    }
    assert older_keys(config, gemma3_text.ModelArgs) == {
        "rope_theta": 9.0,
        "rope_scaling": LLAMA3,
        "rope_local_base_freq": 5.0,
        "sliding_window_pattern": 3,
    }


def test_the_part_of_the_width_that_is_rotated_and_a_language_model_within():
    given = {"rope_theta": 7.0, "rope_type": "default", "partial_rotary_factor": 0.5}
    older = {"rope_theta": 7.0, "partial_rotary_factor": 0.5}
    assert older_keys({"rope_parameters": given}, stablelm.ModelArgs) == older
    assert older_keys({"rope_parameters": given}, llama.ModelArgs) == {"rope_theta": 7.0}
    config = {"model_type": "mistral3", "text_config": {"rope_parameters": given, "x": 1}}
    get_model_classes(config)
    assert config["text_config"] == {"rope_parameters": given, "x": 1, **older}


def test_a_model_that_reads_the_new_words_or_has_no_rotary_embedding_gets_nothing():
    @dataclass
    class Plain:
        hidden_size: int = 1

    new = {"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}
    assert older_keys(new, ministral3.ModelArgs) == older_keys(new, Plain) == {}


@pytest.mark.parametrize("wrong", [3, "x", [1], {"rope_type": "default"}, {"full_attention": 1}])
def test_rope_parameters_that_are_none(wrong):
    with pytest.raises(ConfigError, match="rope_parameters is .*; expected an object with"):
        older_keys({"rope_parameters": wrong}, llama.ModelArgs)
