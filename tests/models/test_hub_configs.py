"""The configurations of the hub's models: they are read, and describe models of the size in their names."""

import math

import pytest
import tiny

from tinker_jax.models.registry import FAMILIES, parse
from tinker_jax.models.weights import weights
from tinker_jax.types.errors import BadRequestError

LLAMA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
}
QWEN2 = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "use_sliding_window": False,
    "sliding_window": 131072,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": False,
}
QWEN3 = {
    "model_type": "qwen3",
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "hidden_act": "silu",
    "attention_bias": True,
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150_000,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    },
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "mxfp4"},
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "attention_bias": False,
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
KIMI_K2 = DEEPSEEK_V3 | {
    "model_type": "kimi_k2",
    "vocab_size": 163840,
    "num_nextn_predict_layers": 0,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 384,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.827,
    "max_position_embeddings": 131072,
    "rope_theta": 50000.0,
    "rope_scaling": DEEPSEEK_V3["rope_scaling"] | {"factor": 32.0, "beta_fast": 1.0},
}


def sizes(D, F, L, N):
    """Letters as in CONTRIBUTING.md."""
    return {"hidden_size": D, "intermediate_size": F, "num_hidden_layers": L, "num_attention_heads": N}


TIED, LLAMA_32 = {"tie_word_embeddings": True}, {"rope_scaling": LLAMA["rope_scaling"] | {"factor": 32.0}}
HUB = {
    "meta-llama/Llama-3.2-1B": (LLAMA | LLAMA_32 | TIED | sizes(2048, 8192, 16, 32) | {"head_dim": 64}, 1.24e9),
    "meta-llama/Llama-3.2-3B": (LLAMA | LLAMA_32 | TIED | sizes(3072, 8192, 28, 24) | {"head_dim": 128}, 3.21e9),
    "meta-llama/Llama-3.1-8B": (LLAMA | sizes(4096, 14336, 32, 32), 8.03e9),
    "meta-llama/Llama-3.3-70B-Instruct": (LLAMA | sizes(8192, 28672, 80, 64), 70.6e9),
    "Qwen/Qwen2.5-0.5B": (QWEN2 | TIED | sizes(896, 4864, 24, 14) | {"num_key_value_heads": 2, "vocab_size": 151936}, 0.494e9),
    "Qwen/Qwen2.5-7B": (QWEN2 | sizes(3584, 18944, 28, 28) | {"num_key_value_heads": 4}, 7.62e9),
    "Qwen/Qwen2.5-72B": (QWEN2 | sizes(8192, 29568, 80, 64) | {"num_key_value_heads": 8}, 72.7e9),
    "Qwen/Qwen3-0.6B": (QWEN3 | TIED | sizes(1024, 3072, 28, 16), 0.596e9),
    "Qwen/Qwen3-4B-Instruct-2507": (
        QWEN3 | TIED | sizes(2560, 9728, 36, 32) | {"max_position_embeddings": 262144, "rope_theta": 5_000_000},
        4.02e9,
    ),
    "Qwen/Qwen3-8B": (QWEN3 | sizes(4096, 12288, 36, 32), 8.19e9),
    "Qwen/Qwen3-32B": (QWEN3 | sizes(5120, 25600, 64, 64), 32.8e9),
    "Qwen/Qwen3-30B-A3B": (
        QWEN3_MOE | sizes(2048, 6144, 48, 32) | {"moe_intermediate_size": 768},
        30.5e9,
    ),
    "Qwen/Qwen3-235B-A22B": (
        QWEN3_MOE | sizes(4096, 12288, 94, 64) | {"moe_intermediate_size": 1536},
        235e9,
    ),
    "openai/gpt-oss-20b": (GPT_OSS | {"num_hidden_layers": 24, "num_local_experts": 32}, 20.9e9),
    "openai/gpt-oss-120b": (GPT_OSS | {"num_hidden_layers": 36, "num_local_experts": 128}, 116.8e9),
    "deepseek-ai/DeepSeek-V3.1": (DEEPSEEK_V3, 671e9),
    "moonshotai/Kimi-K2-Instruct": (KIMI_K2, 1.03e12),
    "moonshotai/Kimi-K2-Thinking": (
        KIMI_K2
        | {
            "max_position_embeddings": 262144,
            "rope_scaling": KIMI_K2["rope_scaling"] | {"factor": 64.0, "beta_fast": 32.0},
            "quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        },
        1.03e12,
    ),
}


@pytest.mark.parametrize("name", HUB)
def test_a_model_of_the_hub_has_the_number_of_parameters_in_its_name(name, record_property):
    config, parameters = HUB[name]
    assert sum(math.prod(w.full_shape) for w in weights(parse(config))) == pytest.approx(parameters, rel=0.01)
    record_property("family", config["model_type"])
    record_property("hub", name)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_old_and_new_keys_of_the_rope_are_read_alike(family):
    new = tiny.CONFIGS[family]().to_dict()
    rope = {key: value for key, value in new["rope_parameters"].items() if key != "rope_theta"}
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    assert parse(old | {"rope_theta": new["rope_parameters"]["rope_theta"], "rope_scaling": rope}) == parse(new)


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("qwen3_moe", ("num_experts", "num_local_experts")),
        ("gpt_oss", ("num_experts", "num_local_experts")),
        ("deepseek_v3", ("n_routed_experts", "num_local_experts")),
    ],
)
def test_every_name_of_the_number_of_experts_is_read_alike(family, keys):
    config = tiny.CONFIGS[family]().to_dict()
    bare = {key: value for key, value in config.items() if key not in keys}
    first, second = (parse(bare | {key: 8}) for key in keys)
    assert first == second and first.E == 8


def test_every_family_is_refused_without_the_keys_it_needs():
    for family in FAMILIES:
        with pytest.raises(BadRequestError, match=f"is missing; a {family} model needs it"):
            parse({"model_type": family})
