"""config.json is read right, and what it asks for and we lack is refused by name."""

import json

import odd_values as odd
import pytest
import tiny

from tinker_jax.models.registry import parse
from tinker_jax.models.rope import Llama3, Rope
from tinker_jax.types.errors import BadRequestError, UnsupportedError

LLAMA = tiny.CONFIGS["llama"]().to_dict()
QWEN3 = tiny.CONFIGS["qwen3"]().to_dict()


def test_the_rope_of_both_transformers_formats_is_understood():
    old = {k: v for k, v in LLAMA.items() if k != "rope_parameters"}
    old |= {"rope_theta": 10_000.0, "rope_scaling": {k: v for k, v in tiny.LLAMA3_ROPE.items() if k != "rope_theta"}}
    assert parse(old).rope == parse(LLAMA).rope == Rope(8, 10_000.0, Llama3(8.0, 1.0, 4.0, 32))


def test_head_width_falls_back_as_each_family_defines():
    def without(cfg):
        return {k: v for k, v in cfg.items() if k != "head_dim"}

    assert parse(without(LLAMA)).H == 32 // 4
    assert parse(without(QWEN3)).H == 128


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"model_type": "gpt2"}, UnsupportedError, "model_type 'gpt2' is not supported; supported: llama, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, UnsupportedError, "hidden_act='gelu' is not supported for qwen3; only 'silu' is"),
        ({"use_sliding_window": True}, UnsupportedError, "use_sliding_window=True"),
        ({"attention_bias": True}, UnsupportedError, "attention_bias=True"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
            BadRequestError,
            "llama3 rope scaling lacks 'factor'",
        ),
        (
            {"rope_parameters": {**tiny.LLAMA3_ROPE, "high_freq_factor": 1.0}},
            BadRequestError,
            "high_freq_factor=1.0 must be above low_freq_factor=1.0",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            UnsupportedError,
            "partial_rotary_factor=0.5",
        ),
        ({"hidden_size": None}, BadRequestError, "hidden_size is missing; a qwen3 model needs it"),
        ({"num_key_value_heads": 3}, BadRequestError, "num_attention_heads=4 is no multiple of num_key_value_heads=3"),
        ({"head_dim": 7}, UnsupportedError, "head_dim=7 is odd"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change, error, text):
    with pytest.raises(error, match=text):
        parse({**QWEN3, **change})


@pytest.mark.parametrize(
    ("family", "change", "error", "text"),
    [
        ("qwen3_moe", {"hidden_act": "gelu"}, UnsupportedError, "hidden_act='gelu' is not supported for qwen3_moe"),
        ("qwen3_moe", {"num_experts_per_tok": 7}, BadRequestError, "num_experts_per_tok=7 is above num_local_experts=6"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, BadRequestError, "decoder_sparse_step: .*got int 0"),
        ("qwen3_moe", {"mlp_only_layers": 1}, BadRequestError, "mlp_only_layers: expected a list"),
        ("qwen3_moe", {"mlp_only_layers": [0, "1"]}, BadRequestError, r"mlp_only_layers\[1\]: "),
        ("qwen3_moe", {"mlp_only_layers": [-1]}, BadRequestError, r"mlp_only_layers\[0\]: .*-1"),
        ("gpt_oss", {"hidden_act": "gelu"}, UnsupportedError, "hidden_act='gelu' is not supported for gpt_oss"),
        ("gpt_oss", {"sliding_window": None}, BadRequestError, "sliding_window is missing"),
        ("gpt_oss", {"sliding_window": 0}, BadRequestError, "sliding_window: .*got int 0"),
        ("gpt_oss", {"layer_types": ["full_attention"] * 3}, BadRequestError, "layer_types: .*num_hidden_layers=4"),
        ("gpt_oss", {"layer_types": ["chunked_attention"] * 4}, UnsupportedError, "layer_types: 'chunked_attention' is not"),
        ("gpt_oss", {"num_key_value_heads": 3}, BadRequestError, "num_attention_heads=4 is no multiple"),
        ("deepseek_v3", {"scoring_func": "softmax"}, UnsupportedError, "scoring_func='softmax'"),
        ("deepseek_v3", {"topk_method": "greedy"}, UnsupportedError, "topk_method='greedy'"),
        ("deepseek_v3", {"n_group": 3}, BadRequestError, "n_group=3 and topk_group=2"),
        ("deepseek_v3", {"topk_group": 5}, BadRequestError, "n_group=4 and topk_group=5"),
        ("deepseek_v3", {"num_experts_per_tok": 5}, BadRequestError, "num_experts_per_tok=5 is above the 4 experts"),
        ("deepseek_v3", {"qk_rope_head_dim": 7}, UnsupportedError, "qk_rope_head_dim=7 is odd"),
        ("deepseek_v3", {"first_k_dense_replace": 4}, BadRequestError, "first_k_dense_replace: .*got int 4"),
    ],
)
def test_what_a_family_of_experts_cannot_do_is_refused_by_name(family, change, error, text):
    with pytest.raises(error, match=text):
        parse({**tiny.CONFIGS[family]().to_dict(), **change})


def _in_json(value):
    try:
        return json.loads(json.dumps(value)) == value or value != value
    except Exception:  # what json cannot write, whatever its reason
        return False


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_odd_values_of_any_key_are_read_or_refused_by_a_library_error(family):
    config = tiny.CONFIGS[family]().to_dict()
    for key in config:
        for value in filter(_in_json, [x.value for x in odd.ODD] + [{}, [None], [[]], {"a": 1}]):
            odd.outcome(lambda changed={**config, key: value}: parse(changed).groups)
