"""Rotary embedding equals transformers' for every kind of scaling, and what a file says wrongly of it is refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import odd_values as odd
import pytest
import tiny
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek_v3
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.llama import modeling_llama as llama

from tinker_jax.models.rope import Llama3, Rope, Yarn, parse_rope, rope_frequencies, rope_table, rotate, softmax_factor
from tinker_jax.types.errors import BadRequestError, UnsupportedError

LLAMA3 = tiny.LLAMA3_ROPE
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 8.0, "original_max_position_embeddings": 256}
DEEPSEEK = YARN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1}
SCALINGS = {
    "llama 3.1": LLAMA3 | {"rope_theta": 500_000.0, "original_max_position_embeddings": 8192},
    "llama3 within few turns": LLAMA3,
    "qwen3": YARN | {"rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32_768},
    "gpt-oss": YARN | {"rope_theta": 150_000.0, "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False},
    "deepseek": DEEPSEEK,
    "kimi": DEEPSEEK | {"rope_theta": 5e4, "factor": 32.0, "beta_fast": 1.0, "original_max_position_embeddings": 4096},
    "a step instead of a blend": YARN | {"beta_fast": 1.0, "truncate": False},
    "one mscale": {**YARN, "mscale_all_dim": 0.5},
    "both mscales": DEEPSEEK | {"mscale": 0.707, "mscale_all_dim": 0.4},
    "an attention factor": DEEPSEEK | {"attention_factor": 1.5, "mscale": 0.707},
    "other betas": YARN | {"beta_fast": 4.0, "beta_slow": 0.25, "truncate": False},
    "an empty blend": YARN | {"original_max_position_embeddings": 4},
    "a blend beyond the last plane": YARN | {"rope_theta": 1.5},
    "a factor below one": YARN | {"factor": 0.5},
    "the original context left out": {key: value for key, value in YARN.items() if not key.startswith("original")},
    "nulls": YARN | {"beta_fast": None, "beta_slow": None, "attention_factor": None, "mscale": None, "mscale_all_dim": None},
}
T = 300  # beyond the original contexts of 32 and 256


def llama_config(rope_parameters, **other):
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64, "max_position_embeddings": 2048}
    return transformers.LlamaConfig(**sizes, rope_parameters=dict(rope_parameters), **other)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_frequencies_and_factors_are_those_of_transformers(scaling):
    params = SCALINGS[scaling]
    config = llama_config(params)
    expected, factor = ROPE_INIT_FUNCTIONS[params["rope_type"]](config)
    rope = parse_rope(config.to_dict(), 64)
    np.testing.assert_allclose(rope_frequencies(rope), expected, rtol=1e-6)
    assert rope.attention_factor == pytest.approx(factor, rel=1e-12)
    assert softmax_factor(rope) == pytest.approx(deepseek_v3.yarn_apply_mscale(params, 1.0), rel=1e-12)


def test_unscaled_frequencies_are_those_of_transformers():
    config = llama_config({"rope_type": "default", "rope_theta": 5e5})
    expected, _ = llama.LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    rope = parse_rope(config.to_dict(), 64)
    np.testing.assert_allclose(rope_frequencies(rope), expected, rtol=1e-6)
    assert rope.attention_factor == softmax_factor(rope) == 1


def deepseek_config(rope_parameters):
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "qk_rope_head_dim": 16, "qk_nope_head_dim": 8}
    return transformers.DeepseekV3Config(**sizes, max_position_embeddings=2048, rope_parameters=rope_parameters)


@pytest.mark.parametrize(
    ("config", "embedding", "apply", "interleaved"),
    [
        (llama_config(LLAMA3), llama.LlamaRotaryEmbedding, llama.apply_rotary_pos_emb, False),
        (llama_config(YARN), llama.LlamaRotaryEmbedding, llama.apply_rotary_pos_emb, False),
        (transformers.GptOssConfig(head_dim=16), gpt_oss.GptOssRotaryEmbedding, gpt_oss.apply_rotary_pos_emb, False),
        *(
            (deepseek_config(params), deepseek_v3.DeepseekV3RotaryEmbedding, apply, interleaved)
            for params in (DEEPSEEK, DEEPSEEK | {"mscale": 0.707})
            for apply, interleaved in (
                (deepseek_v3.apply_rotary_pos_emb_interleave, True),
                (deepseek_v3.apply_rotary_pos_emb, False),
            )
        ),
    ],
)
def test_rotated_queries_and_keys_are_those_of_transformers(config, embedding, apply, interleaved):
    rope = parse_rope(config.to_dict(), config.head_dim, interleaved=interleaved)
    random = np.random.default_rng(0)
    q_TNH, k_TKH = (random.normal(size=(T, heads, rope.width)).astype(np.float32) for heads in (4, 1))
    q, k = (torch.tensor(x)[None].transpose(1, 2) for x in (q_TNH, k_TKH))
    expected = apply(q, k, *embedding(config)(q, torch.arange(T)[None]))

    table = rope_table(rope, jnp.arange(T))
    for x, theirs in zip((q_TNH, k_TKH), expected, strict=True):
        ours = rotate(jnp.asarray(x), table, interleaved=rope.interleaved)
        # Angles of up to 300 radians are rounded to 1e-5.
        np.testing.assert_allclose(ours, theirs[0].transpose(0, 1), atol=1e-4)


def test_the_softmax_factor_is_that_of_deepseek():
    for mscale_all_dim in (0, 0.707, 1.0):
        config = deepseek_config(DEEPSEEK | {"mscale_all_dim": mscale_all_dim})
        scaling = deepseek_v3.DeepseekV3Attention(config, 0).scaling
        rope = parse_rope(config.to_dict(), 16, interleaved=True)
        assert 24**-0.5 * softmax_factor(rope) == pytest.approx(scaling, rel=1e-12)


def test_bfloat16_heads_are_rotated_in_float32():
    x = jax.random.normal(jax.random.key(0), (T, 2, 8), jnp.bfloat16)
    table = rope_table(Rope(8, 1e4), jnp.arange(T))
    assert rotate(x, table).dtype == jnp.bfloat16
    np.testing.assert_array_equal(rotate(x, table), rotate(x.astype(jnp.float32), table).astype(jnp.bfloat16))


def test_both_formats_of_transformers_are_understood():
    for params, scaling in (
        (LLAMA3, Llama3(8.0, 1.0, 4.0, 32)),
        (DEEPSEEK, Yarn(40.0, 256, 32.0, 1.0, mscale=1.0, mscale_all_dim=1.0)),
    ):
        rest = {key: value for key, value in params.items() if key not in ("rope_type", "rope_theta")}
        new = {"rope_theta": 2e4, "rope_parameters": params}
        old = {"rope_theta": 1e4, "rope_scaling": {"type": params["rope_type"], **rest}}
        for cfg in (new, old, {**old, "rope_parameters": params}):
            assert parse_rope(cfg, 64) == Rope(64, 1e4, scaling)
    assert parse_rope({}, 64) == parse_rope({"rope_scaling": {}}, 64) == Rope(64, 1e4)


def test_the_original_context_of_the_file_goes_before_that_of_the_object():
    config = llama_config(YARN, original_max_position_embeddings=128)
    expected, _ = ROPE_INIT_FUNCTIONS["yarn"](config)
    rope = parse_rope({"rope_parameters": YARN, "original_max_position_embeddings": 128}, 64)
    assert rope.scaling == Yarn(8.0, 128)
    np.testing.assert_allclose(rope_frequencies(rope), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"rope_parameters": [1]}, BadRequestError, r"rope_parameters: expected an object or null, got list \[1\]"),
        ({"rope_scaling": "yarn"}, BadRequestError, "rope_scaling: expected an object or null, got str 'yarn'"),
        ({"rope_parameters": YARN, "rope_scaling": YARN | {"factor": 4.0}}, BadRequestError, "rope_scaling disagree; keep the"),
        (
            {"rope_parameters": {"rope_type": "longrope"}},
            UnsupportedError,
            "'longrope' is not supported; supported are 'default'",
        ),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, UnsupportedError, r"rope scaling \['yarn'\] is not supported"),
        ({"rope_parameters": YARN | {"partial_rotary_factor": 0.5}}, UnsupportedError, "partial_rotary_factor=0.5"),
        ({"partial_rotary_factor": 0.5}, UnsupportedError, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"rope_type": "llama3"}}, BadRequestError, "llama3 rope scaling lacks 'factor'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, BadRequestError, "yarn rope scaling lacks 'factor'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, BadRequestError, "yarn rope scaling lacks 'max_position_embeddings'"),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, BadRequestError, "1.0 must be above low_freq_factor=1.0"),
        ({"rope_parameters": YARN | {"beta_fast": 0.5}}, BadRequestError, "beta_fast=0.5 is below beta_slow=1.0"),
        (
            {"rope_parameters": YARN | {"rope_theta": 1.0}},
            BadRequestError,
            "rope_theta: expected a finite number > 1, got float 1.0",
        ),
        ({"rope_parameters": YARN | {"factor": 0}}, BadRequestError, "factor: expected a finite number > 0, got int 0"),
    ],
)
def test_what_is_wrong_or_not_supported_is_refused_by_name(change, error, text):
    with pytest.raises(error, match=text):
        parse_rope(change, 64)


POSITIVE, OPTIONAL = odd.real(0, without=[0]), odd.either(odd.none, odd.real(0, without=[0]))
CONTEXT = odd.whole(1, 2**31 - 1)
ACCEPTED = {
    "llama3": {
        "rope_theta": POSITIVE,
        "factor": POSITIVE,
        "low_freq_factor": odd.real(0, 3.9, without=[0]),  # below high_freq_factor, 4
        "high_freq_factor": odd.real(1, without=[1]),
        "original_max_position_embeddings": CONTEXT,
    },
    "yarn": {
        "rope_theta": odd.real(1, without=[1]),
        "factor": POSITIVE,
        "beta_fast": odd.either(odd.none, odd.real(1)),
        "beta_slow": odd.either(odd.none, odd.real(0, 32, without=[0])),
        "truncate": odd.truth,
        "attention_factor": OPTIONAL,
        "mscale": odd.either(odd.none, odd.real(0)),
        "mscale_all_dim": odd.either(odd.none, odd.real(0)),
        "original_max_position_embeddings": CONTEXT,
    },
}


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, keys in ACCEPTED.items() for key in keys])
def test_odd_values_are_accepted_or_refused_by_name(kind, key):
    for value in odd.ODD:
        params = {"llama3": LLAMA3, "yarn": YARN}[kind] | {key: value.value}
        with np.errstate(over="ignore"):
            error = odd.outcome(lambda params=params: rope_frequencies(parse_rope({"rope_parameters": params}, 64)))
        assert (error is None) == ACCEPTED[kind][key](value), (value.name, error)
        assert error is None or key in str(error)
