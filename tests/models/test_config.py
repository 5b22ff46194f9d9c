"""config.json is read right, and what it asks for and we lack is refused by name."""

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
