"""The models of the CPU benchmarks, one directory for both sides, and the machine's rates that their speeds are set against.

tiny        random Qwen3: hidden 256, 4 layers, 8 heads, 4 key/value heads of width 32, vocabulary as a case says
real        SmolLM2-135M-Instruct as `make real-model` builds it: Llama, 30 layers, vocabulary 49,152
qwen3-0.6b  the published shape of Qwen3-0.6B with random weights: 28 layers, vocabulary 151,936
moe8        random Qwen3-MoE: hidden 384, 16 layers of 8 experts of width 256, 2 of them a token, vocabulary 8,192
moe64       random Qwen3-MoE: hidden 256, 16 layers of 64 experts of width 128, 8 of them a token, vocabulary 8,192
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _sides

from tinker_jax.models import registry
from tinker_jax.models.config import ModelConfig
from tinker_jax.models.weights import weights

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
import real_model

RANKS = {"tiny": 32, "real": 16, "qwen3-0.6b": 16, "moe8": 16, "moe64": 16}
_MOE = {
    "model_type": "qwen3_moe",
    "vocab_size": 8192,
    "num_hidden_layers": 16,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "qwen3",
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "tie_word_embeddings": False,
    },
    "real": {  # what a toy keeps of it
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "moe8": _MOE
    | {
        "hidden_size": 384,
        "num_attention_heads": 12,
        "moe_intermediate_size": 256,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    "moe64": _MOE
    | {
        "hidden_size": 256,
        "num_attention_heads": 8,
        "moe_intermediate_size": 128,
        "num_experts": 64,
        "num_experts_per_tok": 8,
    },
}
TOY = {"vocab_size": _sides.VOCAB, "hidden_size": 72, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
ITEMSIZE = {"float32": 4, "bfloat16": 2}
ABSENT = "the model is not there; `make real-model` builds it"


def locate(root: Path, model: str, vocab: int = _sides.VOCAB, *, quick: bool) -> Path | None:
    """The directory of a model, written first where that is needed.

    Args:
        root: where random models go.
        model: key of `RANKS`.
        vocab: of a tiny one.
        quick: a random toy of the same family and heads instead of a large one.

    Returns:
        None: the real model is not built.
    """
    if model == "real" and not quick:
        return real_model.directory() if real_model.built() else None
    directory = root / f"{model}-{vocab}"
    if not directory.exists():
        _random(model, vocab, quick).save_pretrained(directory)
    return directory


def _random(model: str, vocab: int, quick: bool) -> Any:
    """A transformers model with random weights: the tiny one in float32, others in bfloat16, as published."""
    import torch
    import transformers

    torch.manual_seed(0)
    kinds = {
        "llama": transformers.LlamaForCausalLM,
        "qwen3": transformers.Qwen3ForCausalLM,
        "qwen3_moe": transformers.Qwen3MoeForCausalLM,
    }
    shape = {"vocab_size": vocab, "max_position_embeddings": 16_384, **SHAPES[model]}
    if quick and model != "tiny":
        shape |= TOY
    kind = kinds[shape.pop("model_type")]
    return kind(kind.config_class(**shape)).to(torch.float32 if model == "tiny" else torch.bfloat16)


def shape_of(directory: Path) -> ModelConfig:
    """Its numbers."""
    return registry.parse(json.loads((directory / "config.json").read_text()))


def weight_bytes(cfg: ModelConfig, dtype: str) -> int:
    """Bytes of the base weights that a decode step reads: all but an embedding that is not the head too."""
    looked_up = 0 if cfg.tied else cfg.V * cfg.D
    return ITEMSIZE[dtype] * (sum(math.prod(weight.full_shape) for weight in weights(cfg)) - looked_up)


# ---- the machine ----


def machine() -> dict[str, float]:
    """Rates of this machine, the best of several tries on every core.

    Returns:
        `flops_per_s` of a float32 product of 2,048 × 2,048 matrices; `bytes_per_s` of summing 1 GiB of float32.
    """
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    square, long = torch.ones(2048, 2048), torch.ones(2**28)
    return {
        "flops_per_s": 2 * 2048**3 / _fastest(lambda: square @ square),
        "bytes_per_s": 4 * 2**28 / _fastest(lambda: long.sum()),
    }


def _fastest(run: Callable[[], object]) -> float:
    return min(_sides.seconds(run) for _ in range(8))


def describe(rates: dict[str, float]) -> str:
    """`machine` in a line."""
    return (
        f"float32 product of 2,048 × 2,048: {rates['flops_per_s'] / 1e9:.0f} GFLOP/s; "
        f"memory read: {rates['bytes_per_s'] / 1e9:.1f} GB/s"
    )
