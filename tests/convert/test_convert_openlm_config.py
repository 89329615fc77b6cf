"""What an OpenLM checkpoint is: from its configs, against its tensors; nothing is guessed."""

from __future__ import annotations

import json

import pytest
import torch

from mlx_hiermem.convert.openlm.named import named
from mlx_hiermem.errors import FormatError, InputError
from tests.convert.openlm_reading import ARGS, PARAMS, read, refused, without
from tests.convert.openlm_states import CONFIG, VOCAB, D, save, state_dict, write

# ---- where configs come from -----------------------------------------------------------


def test_a_json_beside_the_run(tmp_path):
    found = read(save(tmp_path, state_dict(), model_config__json=CONFIG))
    assert found.args == ARGS and found.notices == ()
    assert found.files == (tmp_path / "model_config.json",)


def test_a_json_that_is_given_wins_over_everything(tmp_path):
    path = save(tmp_path, state_dict(), model_config__json={**CONFIG, "n_heads": 1})
    given = write(tmp_path / "other.json", CONFIG)
    assert read(path, model_config=given).args == ARGS


def test_params_txt_and_the_json_that_it_names(tmp_path):
    own = without(CONFIG, "qk_norm", "model_norm", "positional_embedding_type")
    for model in ("tiny", "tiny.json", "/elsewhere/on/the/cluster/tiny.json"):
        folder = tmp_path / str(len(model))
        path = save(folder, state_dict(), params__txt={**PARAMS, "model": model}, tiny__json=own)
        found = read(path)
        assert found.args == ARGS
        assert [file.name for file in found.files] == ["tiny.json", "params.txt"]


def test_the_json_wins_over_params_txt(tmp_path):
    path = save(
        tmp_path, state_dict(),
        params__txt={**PARAMS, "model": "tiny", "qk_norm": False, "model_norm": "rms_norm"},
        tiny__json=CONFIG,
    )  # fmt: skip
    assert read(path).args == ARGS


def test_a_name_that_openlm_knows(tmp_path):
    sizes = named("open_lm_test_tiny")
    assert sizes["hidden_dim"] == 16 and sizes["vocab_size"] == 16 and sizes["n_heads"] == 2
    state = state_dict()
    state["tok_embeddings.weight"] = state["tok_embeddings.weight"][:16]
    path = save(tmp_path, state, params__txt={**PARAMS, "model": "open_lm_test_tiny"})
    args = read(path).args
    assert (args.vocab_size, args.max_position_embeddings, args.head_dim) == (16, 16, 8)
    assert named("open_lm_7b")["n_layers"] == 32 and named("my_model") is None


def test_a_name_that_nobody_knows_is_asked_for(tmp_path):
    path = save(tmp_path, state_dict(), params__txt={**PARAMS, "model": "../../etc/mine"})
    text = refused(path, r"params.txt: model is '../../etc/mine'.*'mine.json' beside it.*--model-c")
    assert "params.txt" in text


def test_nothing_at_all_is_asked_for(tmp_path):
    refused(save(tmp_path, state_dict()), "epoch_1.pt: no config; expected params.txt.*--model-c")
    refused(
        save(tmp_path, state_dict()), "no such file", InputError, model_config=tmp_path / "none"
    )


def flat() -> dict:
    """The config.json of the first wrapper of Hugging Face: names of OpenLM's Params."""
    values = without(CONFIG, "hidden_dim", "model_norm", "qk_norm")
    return {
        **values, "dim": D, "norm_type": "gain_only_layer_norm", "apply_qk_norm": True,
        "model_type": "openlm", "architectures": ["OpenLMForCausalLM"], "attn_name": "auto",
        "moe_num_experts": 8, "norm_eps": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip


def wrapped(inner: dict) -> dict:
    return {"model_type": "openlm", "params": None, "params_args_dict": inner, "n_heads": 7}


@pytest.mark.parametrize(
    "config",
    [flat(), wrapped({**PARAMS, **flat()}), wrapped({**PARAMS, **CONFIG})],
    ids=["flat", "args, flat names", "args, names of a model_config"],
)
def test_both_wrappers_of_hugging_face(tmp_path, config):
    tmp_path = tmp_path / "hf"
    tmp_path.mkdir()
    torch.save(
        {f"model.{name}": tensor for name, tensor in state_dict().items()},
        tmp_path / "pytorch_model.bin",
    )
    write(tmp_path / "config.json", config)
    assert read(tmp_path).args == ARGS


def test_a_wrapper_that_names_its_config(tmp_path):
    state = state_dict()
    state["tok_embeddings.weight"] = state["tok_embeddings.weight"][:16]
    inner = {**without(PARAMS, "vocab_size", "seq_len"), "model": "open_lm_test_tiny"}
    path = save(tmp_path, state, config__json=wrapped(inner))
    assert read(path).args.vocab_size == 16


def test_an_mlx_model_is_no_openlm_config(tmp_path):
    config = {"model_type": "openlm", "hidden_size": 4, "num_hidden_layers": 2}
    refused(save(tmp_path, state_dict(), config__json=config), "hidden_size.*MLX or Hugging Face")


def test_values_of_params_txt_are_data(tmp_path):
    path = save(tmp_path, state_dict(), model_config__json=without(CONFIG, "qk_norm"))
    lines = ["qk_norm: True", "precision: __import__('os').system('false')", "  - a list: 3", ":"]
    (tmp_path / "params.txt").write_text("\n".join(lines))
    assert read(path).args == ARGS
    (tmp_path / "params.txt").write_text("qk_norm: True\nqk_norm: False\n")
    refused(path, "params.txt: qk_norm is both True and False")


# ---- the size of a head ----------------------------------------------------------------


@pytest.mark.parametrize("key", ["head_dim", "head_size", "dim_head"])
def test_a_head_apart_from_d_by_heads(tmp_path, key):
    path = save(tmp_path, state_dict(head_dim=12), model_config__json={**CONFIG, key: 12})
    assert read(path).args.head_dim == 12


def test_a_head_that_no_config_tells(tmp_path):
    path = save(tmp_path, state_dict(head_dim=12), model_config__json=CONFIG)
    text = refused(path, r"in_proj.weight has 72 rows; expected 3 \* 2 heads \* 8.*--head-dim")
    assert "hidden_dim 16" in text and "n_heads 2" in text
    assert read(path, head_dim=12).args.head_dim == 12
    refused(path, r"72 rows; expected 3 \* 2 heads \* 10 \(--head-dim\)", head_dim=10)
    refused(path, "--head-dim 0: expected", InputError, head_dim=0)
    write(tmp_path / "model_config.json", {**CONFIG, "head_dim": 10})  # an option wins
    assert read(path, head_dim=12).args.head_dim == 12


def test_a_wrong_number_of_heads_is_not_corrected(tmp_path):
    refused(
        save(tmp_path, state_dict(), model_config__json={**CONFIG, "n_heads": 3}),
        r"48 rows; expected 3 \* 3 heads \* 5",
    )


def test_openlm_rounds_a_head_down(tmp_path):
    """open_lm_87m: 488 / 12 heads are heads of 40 numbers, as OpenLM's model.py has it."""
    state = state_dict(head_dim=7, base=None)
    path = save(tmp_path, state, model_config__json={**CONFIG, "hidden_dim": 15})
    refused(path, "heads of 7 numbers; a rotary embedding needs an even")
    config = {**CONFIG, "hidden_dim": 15, "positional_embedding_type": "none"}
    write(tmp_path / "model_config.json", config)
    assert read(path).args.head_dim == 7
    torch.save({k: v for k, v in state.items() if "in_proj" not in k}, path)
    refused(path, "leaves a rest.*--head-dim")


# ---- what a config leaves unsaid -------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "norm"),
    [(("weight", "bias"), "default_layer_norm"), ((), "no_wb_layer_norm"), (("weight",), None)],
)
def test_a_norm_that_is_not_said(tmp_path, parts, norm):
    config = without(CONFIG, "model_norm")
    path = save(tmp_path, state_dict(norm_parts=parts), model_config__json=config)
    if norm is None:  # a LayerNorm with gains looks like an RMSNorm
        refused(path, "no model_norm.*gain_only_layer_norm.*rms_norm.*--model-config")
    else:
        assert read(path).args.norm_type == norm


def test_flags_that_are_not_said(tmp_path):
    config = without(CONFIG, "qk_norm", "post_embed_norm", "weight_tying")
    for changes in ({}, {"qk_norm": False}, {"post_embed_norm": True}):
        path = save(tmp_path, state_dict(**changes), model_config__json=config)
        args = read(path).args
        assert args.qk_norm == changes.get("qk_norm", True)
        assert args.post_embed_norm == changes.get("post_embed_norm", False)
        assert not args.tie_word_embeddings
    state = {k: v for k, v in state_dict(tied=True).items() if k != "output.weight"}
    assert read(save(tmp_path, state, model_config__json=config)).args.tie_word_embeddings
    config["model_norm"] = "no_wb_layer_norm"
    path = save(tmp_path, state_dict(norm_parts=()), model_config__json=config)
    refused(path, "no qk_norm.*leaves no trace")


def test_defaults_of_openlm_that_are_told(tmp_path):
    config = without(CONFIG, "seq_len", "positional_embedding_type", "vocab_size")
    found = read(save(tmp_path, state_dict(), model_config__json=config))
    assert found.args.max_position_embeddings == 2048 and found.args.vocab_size == VOCAB
    assert len(found.notices) == 2
    assert "2,048" in found.notices[0] and "rotary" in found.notices[1]


@pytest.mark.parametrize("name", ["hidden_dim", "n_layers", "n_heads"])
def test_sizes_that_are_missing_are_asked_for(tmp_path, name):
    path = save(tmp_path, state_dict(), model_config__json=without(CONFIG, name))
    refused(path, f"model_config.json: no {name};.*--model-config")


# ---- what is refused -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"ffn_type": "gelu"}, "ffn_type is 'gelu'.*not supported.*swiglu, swiglu_torch"),
        ({"ffn_type": "gemma_geglu"}, "ffn_type is 'gemma_geglu'"),
        ({"ffn_type": "moe"}, "ffn_type is 'moe'"),
        ({"ffn_type": "relu"}, "ffn_type is 'relu'; known are swiglu"),
        ({"moe_freq": 2}, "moe_freq is 2; mixtures of experts"),
        ({"positional_embedding_type": "head_rotary"}, "head_rotary', an old bug of OpenLM"),
        ({"positional_embedding_type": "alibi"}, "'alibi'; known are rotary, llama_rotary, none"),
        ({"model_norm": "group_norm"}, "'group_norm'; known are gain_only_layer_norm"),
        ({"attn_name": "custom_attn", "attn_activation": "relu"}, "attn_name.*plain softmax"),
        (
            {"attn_name": "custom_attn", "attn_activation": "softmax",
             "attn_seq_scalar": "max", "attn_seq_scalar_alpha": 1.0},
            "attn_name is 'custom_attn'",
        ),
        ({"d_model": 768, "n_layer": 24}, "Mamba"),
        ({"dim": 32}, "dim is 32; but .*hidden_dim is 16; correct one"),
        ({"norm_type": "rms_norm"}, "norm_type is 'rms_norm'; but .*model_norm"),
        ({"intermediate_size": 25}, "intermediate_size is 25; but .*w12.weight is for 24"),
        ({"hidden_dim": 0}, "hidden_dim is 0; expected a whole number from 1 to"),
        ({"hidden_dim": -16}, "hidden_dim is -16"),
        ({"hidden_dim": 2**31}, "hidden_dim is 2147483648"),
        ({"hidden_dim": 16.0}, "hidden_dim is 16.0"),
        ({"hidden_dim": True}, "hidden_dim is True"),
        ({"n_layers": 10_001}, "n_layers is 10001; expected a whole number from 1 to 10000"),
        ({"n_heads": "2"}, "n_heads is '2'"),
        ({"n_heads": 10**40}, "n_heads is 1000"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"seq_len": 1}, "seq_len is 1; expected a whole number from 2"),
        ({"qk_norm": 1}, "qk_norm is 1; expected true or false"),
        ({"weight_tying": "yes"}, "weight_tying is 'yes'; expected true or false"),
        ({"norm_eps": 0}, "norm_eps is 0; expected a finite number above 0"),
        ({"norm_eps": [1]}, r"norm_eps is \[1\]"),
        ({"norm_eps": 10**400}, r"norm_eps is 1000.*\.\.\.; expected a finite number"),
        ({"head_dim": 9}, r"48 rows; expected 3 \* 2 heads \* 9 .*head_dim\)"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"ffn_type": "x" * 9999}, r"ffn_type is 'xxx.*\.\.\.; known"),
        ({"rope_inv_freq_dtype": "int4"}, "rope_inv_freq_dtype is 'int4'; known are float32"),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_refused_with_file_and_key(tmp_path, values, says):
    path = save(tmp_path, state_dict(), model_config__json={**CONFIG, **values})
    text = refused(path, says)
    assert str(tmp_path / "model_config.json") in text or "epoch_1.pt" in text


def test_the_public_model_with_the_old_bug(tmp_path):
    path = save(tmp_path, state_dict(), params__txt={"model": "open_lm_1b_old"})
    refused(path, "open_lm_1b_old.*params.txt.*head_rotary.*along the heads")


@pytest.mark.parametrize("model", ["mamba_1b", "my_Mamba.json"])
def test_mamba(tmp_path, model):
    path = save(tmp_path, state_dict(), params__txt={"model": model})
    refused(path, "params.txt: is of a Mamba model")


def test_custom_attention_that_is_a_softmax(tmp_path):
    config = {
        **CONFIG, "attn_name": "custom_attn", "attn_activation": "softmax",
        "attn_seq_scalar": "none", "attn_seq_scalar_alpha": 1.0,
    }  # fmt: skip
    assert read(save(tmp_path, state_dict(), model_config__json=config)).args == ARGS


@pytest.mark.parametrize(
    ("key", "says"),
    [("feed_forward.gate_proj.weight", "gemma_geglu"), ("_ff_w1.weight", "gelu")],
)
def test_an_ffn_that_only_the_names_tell(tmp_path, key, says):
    state = {f"layers.0.{key}": torch.ones(2, 2), **state_dict()}
    path = save(tmp_path, state, model_config__json=CONFIG)
    refused(path, f"layers.0.{key}.*ffn_type is '{says}'")


@pytest.mark.parametrize(("w12", "w3"), [((49, D), (D, 24)), ((48, D), (D, 20)), ((48,), (D, 24))])
def test_an_ffn_that_does_not_fit_itself(tmp_path, w12, w3):
    state = state_dict()
    state["layers.0.feed_forward.w12.weight"] = torch.ones(w12)
    state["layers.0.feed_forward.w3.weight"] = torch.ones(w3)
    path = save(tmp_path, state, model_config__json=CONFIG)
    refused(path, r"w12.weight has the shape", FormatError)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "a": 2}', "1" * 9999, "[" * 99999])
def test_a_json_that_is_none(tmp_path, text):
    path = save(tmp_path, state_dict())
    (tmp_path / "model_config.json").write_text(text)
    refused(path, "model_config.json: ", FormatError)


def test_params_args_dict_that_is_none(tmp_path):
    path = save(tmp_path, state_dict(), config__json={"params_args_dict": [1]})
    refused(path, r"config.json: params_args_dict is \[1\]")


def test_huge_numbers_in_a_json(tmp_path):
    path = save(tmp_path, state_dict(base=None))
    text = json.dumps(CONFIG)[:-1] + ', "rope_theta": 1e999, "norm_eps": NaN}'
    (tmp_path / "model_config.json").write_text(text)
    refused(path, "rope_theta is inf|norm_eps is nan")
