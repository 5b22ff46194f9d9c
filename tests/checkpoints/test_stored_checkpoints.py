"""Quantised checkpoints of whole models: every tensor of the bf16 checkpoint is there, with the same bits."""

from __future__ import annotations

import json

import numpy as np
import pytest
import quantised
import torch
import transformers

from tinker_jax.checkpoints.stored import quantization, stored_tensors
from tinker_jax.checkpoints.tensor_files import read_index

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def deepseek() -> transformers.DeepseekV3Config:
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    ranks = {"q_lora_rank": 24, "kv_lora_rank": 40, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    return transformers.DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 4}, **experts, **ranks, intermediate_size=112, moe_intermediate_size=48
    )


CONFIGS = {
    "mxfp4": lambda: transformers.GptOssConfig(
        **SIZES, head_dim=16, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2
    ),
    "fp8": deepseek,
    "int4": deepseek,
}


@pytest.mark.parametrize("encoding", CONFIGS)
def test_a_quantised_checkpoint_holds_the_tensors_of_its_bf16_checkpoint(tmp_path, encoding):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[encoding]())
    model.save_pretrained(tmp_path / "source")
    directory, plain = quantised.save(tmp_path / "source", encoding, tmp_path)
    announced = quantization(json.loads((directory / "config.json").read_text()))
    found, expected = stored_tensors(read_index(directory), announced), read_index(plain)
    assert set(found) == set(expected)
    encoded = [name for name, tensor in found.items() if tensor.is_encoded]
    assert len(encoded) == {"mxfp4": 4, "fp8": 5 + 3 + 5 + 3 * 4 + 3, "int4": 3 * 4}[encoding]
    for name, tensor in found.items():
        assert tensor.shape == expected[name].shape
        assert tensor.dtype == expected[name].stored_dtype
        np.testing.assert_array_equal(tensor.read(), expected[name].read())
    original = read_index(tmp_path / "source")
    for name in encoded:
        exact, read = (each.read().astype(np.float32) for each in (original[name], found[name]))
        assert 0 < np.abs(read - exact).max() < 0.3 * np.abs(exact).max()
    # On a CPU transformers decodes MXFP4 by itself; of FP8 it takes whole blocks alone, and for 4 bits it needs a package.
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory if encoding == "mxfp4" else plain, dtype="bfloat16")
    if encoding == "mxfp4":
        parameters = dict(loaded.named_parameters())
        for name in encoded:
            np.testing.assert_array_equal(found[name].read().astype(np.float32), parameters[name].detach().float().numpy())
