"""Tiny random checkpoints of every family, made by transformers with every parameter perturbed, and ways to read them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB = 300  # 256 bytes, a few merges, specials
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 1,
    "bos_token_id": 0,
    "pad_token_id": None,
}


def sizes(D: int, F: int, L: int, N: int, K: int) -> dict:
    """`SIZES` with others in their place; letters as in CONTRIBUTING.md."""
    names = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"
    return SIZES | dict(zip(names, (D, F, L, N, K), strict=True))


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, head_dim=8, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=12, tie_word_embeddings=False),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SIZES,
        head_dim=12,
        tie_word_embeddings=False,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=20,
        norm_topk_prob=True,
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **{**SIZES, "num_hidden_layers": 4, "intermediate_size": 20},
        head_dim=12,
        tie_word_embeddings=False,
        num_local_experts=6,
        num_experts_per_tok=2,
        sliding_window=9,
        rope_parameters={**YARN, "truncate": False},
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4},
        tie_word_embeddings=False,
        first_k_dense_replace=1,
        moe_intermediate_size=20,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        q_lora_rank=18,
        kv_lora_rank=22,
        qk_nope_head_dim=10,
        qk_rope_head_dim=6,
        v_head_dim=14,
        rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
    ),
}
# transformers has no Kimi-K2: its files are those of a DeepSeek-V3 whose experts are one group.
CONFIGS["kimi_k2"] = lambda: transformers.DeepseekV3Config(
    **sizes(D=32, F=48, L=2, N=4, K=4),
    tie_word_embeddings=False,
    first_k_dense_replace=1,
    moe_intermediate_size=22,
    n_routed_experts=7,
    n_shared_experts=1,
    num_experts_per_tok=3,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=2.827,
    q_lora_rank=20,
    kv_lora_rank=18,
    qk_nope_head_dim=6,
    qk_rope_head_dim=8,
    v_head_dim=10,
    rope_parameters={**YARN, "beta_fast": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
)
FAMILIES = tuple(CONFIGS)
DENSE = FAMILIES[:3]
# Two more of each family, of other sizes, options and weights, for parity alone. The first word of a name is the family.
CONFIGS |= {
    "llama untied": lambda: transformers.LlamaConfig(**SIZES, head_dim=8, tie_word_embeddings=False),
    "llama deep": lambda: transformers.LlamaConfig(
        **sizes(D=20, F=36, L=5, N=5, K=1), head_dim=6, tie_word_embeddings=True, rms_norm_eps=1e-4
    ),
    "qwen2 tied": lambda: transformers.Qwen2Config(**sizes(D=40, F=36, L=2, N=5, K=1), tie_word_embeddings=True),
    "qwen2 yarn": lambda: transformers.Qwen2Config(
        **sizes(D=24, F=50, L=4, N=6, K=3), tie_word_embeddings=False, rope_parameters=YARN
    ),
    "qwen3 tied": lambda: transformers.Qwen3Config(**sizes(D=28, F=60, L=2, N=3, K=1), head_dim=20, tie_word_embeddings=True),
    "qwen3 yarn": lambda: transformers.Qwen3Config(
        **sizes(D=44, F=26, L=5, N=4, K=4), head_dim=6, tie_word_embeddings=False, rope_parameters=YARN
    ),
    "qwen3_moe mixed": lambda: transformers.Qwen3MoeConfig(
        **{**SIZES, "num_hidden_layers": 7},
        head_dim=8,
        tie_word_embeddings=True,
        num_experts=5,
        num_experts_per_tok=3,
        moe_intermediate_size=24,
        norm_topk_prob=False,
        decoder_sparse_step=2,
        mlp_only_layers=[5],
    ),
    "qwen3_moe single": lambda: transformers.Qwen3MoeConfig(
        **sizes(D=26, F=34, L=2, N=3, K=3),
        head_dim=10,
        tie_word_embeddings=False,
        num_experts=7,
        num_experts_per_tok=1,
        moe_intermediate_size=18,
        norm_topk_prob=False,
    ),
    "gpt_oss odd": lambda: transformers.GptOssConfig(
        **sizes(D=40, F=28, L=3, N=5, K=1),
        head_dim=8,
        tie_word_embeddings=False,
        num_local_experts=5,
        num_experts_per_tok=3,
        sliding_window=5,
        rope_parameters={"rope_type": "default", "rope_theta": 150_000.0},
    ),
    "gpt_oss every": lambda: transformers.GptOssConfig(
        **sizes(D=28, F=18, L=3, N=4, K=4),
        head_dim=6,
        tie_word_embeddings=False,
        num_local_experts=4,
        num_experts_per_tok=4,
        sliding_window=17,
        layer_types=["full_attention", "full_attention", "sliding_attention"],
        rope_parameters=YARN,
    ),
    "deepseek_v3 direct": lambda: transformers.DeepseekV3Config(
        **sizes(D=36, F=52, L=2, N=3, K=3),
        tie_word_embeddings=False,
        first_k_dense_replace=0,
        moe_intermediate_size=22,
        n_routed_experts=6,
        n_shared_experts=2,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
        q_lora_rank=None,
        kv_lora_rank=14,
        qk_nope_head_dim=8,
        qk_rope_head_dim=10,
        v_head_dim=6,
        rope_interleave=False,
    ),
    "deepseek_v3 deep": lambda: transformers.DeepseekV3Config(
        **sizes(D=20, F=30, L=5, N=2, K=2),
        tie_word_embeddings=False,
        first_k_dense_replace=2,
        moe_intermediate_size=14,
        n_routed_experts=9,
        n_shared_experts=1,
        num_experts_per_tok=4,
        n_group=3,
        topk_group=2,
        routed_scaling_factor=1.5,
        q_lora_rank=26,
        kv_lora_rank=10,
        qk_nope_head_dim=12,
        qk_rope_head_dim=4,
        v_head_dim=18,
        rope_parameters={**YARN, "mscale": 0.8, "mscale_all_dim": 1.0},
    ),
    "kimi_k2 deep": lambda: transformers.DeepseekV3Config(
        **sizes(D=24, F=34, L=4, N=3, K=3),
        tie_word_embeddings=False,
        first_k_dense_replace=1,
        moe_intermediate_size=26,
        n_routed_experts=10,
        n_shared_experts=1,
        num_experts_per_tok=5,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.827,
        q_lora_rank=14,
        kv_lora_rank=26,
        qk_nope_head_dim=14,
        qk_rope_head_dim=4,
        v_head_dim=8,
        rope_parameters={**YARN, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    "kimi_k2 single": lambda: transformers.DeepseekV3Config(
        **sizes(D=40, F=26, L=3, N=2, K=2),
        tie_word_embeddings=False,
        first_k_dense_replace=1,
        moe_intermediate_size=16,
        n_routed_experts=5,
        n_shared_experts=1,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.5,
        q_lora_rank=30,
        kv_lora_rank=16,
        qk_nope_head_dim=10,
        qk_rope_head_dim=12,
        v_head_dim=22,
    ),
}


def family_of(name: str) -> str:
    """The family of one of `CONFIGS`."""
    return name.split()[0]


@cache
def tokenizer_json() -> str:
    """A byte-level BPE tokenizer of VOCAB entries that round-trips any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog ate the hat " * 50], trainer)
    return tokenizer.to_str()


def model(family: str, **changes) -> transformers.PreTrainedModel:
    """A random model in float32, of a seed of its own in its family; norms, biases, routers and everything else moved off
    their initial values."""
    torch.manual_seed([name for name in CONFIGS if family_of(name) == family_of(family)].index(family))
    config = CONFIGS[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    # torch's grouped product, the default, takes widths of whole 16 bytes alone.
    tiny = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").float().eval()
    stored = tiny.state_dict()
    buffers = [buffer for name, buffer in tiny.named_buffers() if name in stored]  # a bias that steers a router is one
    with torch.no_grad():
        for tensor in (*tiny.parameters(), *buffers):
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return tiny


def save(family: str, directory: Path, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB", **changes) -> Path:
    """Writes the checkpoint of `family`, its config changed so, tokenizer included, as a Hugging Face directory."""
    directory.mkdir(parents=True, exist_ok=True)
    model(family, **changes).to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    config = directory / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": family_of(family)}, indent=2))
    (directory / "tokenizer.json").write_text(tokenizer_json())
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eos|>", "bos_token": "<|bos|>"})
    )
    return directory


def add_predictor(directory: Path) -> dict[str, torch.Tensor]:
    """Adds a layer of multi-token prediction, as on the hub, to a one-file checkpoint of DeepSeek-V3; returns its tensors."""
    file, config_file = directory / "model.safetensors", directory / "config.json"
    tensors, config = load_file(file), json.loads(config_file.read_text())
    layers = config["num_hidden_layers"]
    last = {name: tensor for name, tensor in tensors.items() if name.startswith(f"model.layers.{layers - 1}.")}
    further = {name.replace(f".{layers - 1}.", f".{layers}.", 1): tensor + 1 for name, tensor in last.items()}
    further |= {f"model.layers.{layers}.{name}.weight": tensors["model.norm.weight"] + 1 for name in ("enorm", "hnorm")}
    further[f"model.layers.{layers}.shared_head.head.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors | further, file, {"format": "pt"})
    config_file.write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    return further


def base_params(family: str, tiny_model: transformers.PreTrainedModel) -> tuple:
    """(config, flat parameter dict as NumPy) of a transformers model, without going through a file."""
    from tinker_jax.models.registry import parse
    from tinker_jax.models.weights import weights

    cfg = parse(tiny_model.config.to_dict() | {"model_type": family_of(family)})
    state = {name: tensor.detach().numpy() for name, tensor in tiny_model.state_dict().items()}

    def of_layer(w, layer):
        if not w.experts:
            return state[w.hf.format(layer=layer)]
        return np.stack([w.cut(part) for part in state[w.fused.hf.format(layer=layer)]])

    return cfg, {w.name: np.stack([of_layer(w, i) for i in w.layers]) if w.layers else state[w.hf] for w in weights(cfg)}
