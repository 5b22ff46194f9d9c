"""Quantised copies of tiny checkpoints, laid out as on the hub, each beside a bfloat16 checkpoint of the same weights."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FP8_BLOCK = (32, 16)
INT4_GROUP = 16
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])

Parts = dict[str, torch.Tensor]


def mxfp4(name: str, weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """Parts on disk, and the values that they stand for, of experts [E, in, out]."""
    blocks = weight.float().transpose(1, 2).unflatten(-1, (-1, 32))
    exponent = blocks.abs().amax(-1).clamp(min=1e-30).log2().floor() - 2
    codes = (blocks / exponent.exp2()[..., None]).unsqueeze(-1).sub(E2M1).abs().argmin(-1)
    packed = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
    values = E2M1[codes] * exponent.exp2()[..., None]
    parts = {f"{name}_blocks": packed, f"{name}_scales": (exponent + 127).to(torch.uint8)}
    return parts, values.flatten(-2).transpose(1, 2).bfloat16()


def fp8(name: str, weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """Parts on disk, and the values that they stand for, of a matrix."""
    (n, k), (N, K) = FP8_BLOCK, weight.shape
    blocks = torch.nn.functional.pad(weight.float(), (0, -K % k, 0, -N % n)).unflatten(1, (-1, k)).unflatten(0, (-1, n))
    scale = blocks.abs().amax((1, 3)).clamp(min=1e-30) / 448

    def whole(blocks: torch.Tensor) -> torch.Tensor:
        return blocks.flatten(2, 3).flatten(0, 1)[:N, :K].contiguous()

    codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    parts = {name: whole(codes.float()).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}
    return parts, whole(codes.float() * scale[:, None, :, None]).bfloat16()


def int4(name: str, weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """Parts on disk, and the values that they stand for, of a matrix."""
    groups = weight.float().unflatten(1, (-1, INT4_GROUP))
    scale = (groups.abs().amax(-1) / 7).clamp(min=1e-30).bfloat16()
    codes = (groups / scale[..., None].float()).round().clamp(-8, 7)
    eights = (codes.flatten(1).unflatten(1, (-1, 8)).long() + 8) << 4 * torch.arange(8)
    packed = eights.sum(-1)
    parts = {
        f"{name}_packed": torch.where(packed < 2**31, packed, packed - 2**32).to(torch.int32),
        f"{name}_scale": scale,
        f"{name}_shape": torch.tensor(weight.shape, dtype=torch.int32),
    }
    return parts, (codes * scale[..., None].float()).flatten(1).bfloat16()


@dataclass(frozen=True)
class Layout:
    """Which tensors are quantised, how, and what config.json says of it."""

    names: str
    encode: Callable[[str, torch.Tensor], tuple[Parts, torch.Tensor]]
    section: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)


LAYOUTS = {
    "mxfp4": Layout(
        r"mlp\.experts\.(gate_up|down)_proj",
        mxfp4,
        {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
    ),
    "fp8": Layout(
        r"_proj(_with_mqa)?\.weight",
        fp8,
        {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": list(FP8_BLOCK)},
    ),
    "int4": Layout(
        r"mlp\.experts\.\d+\.(gate|up|down)_proj\.weight",
        int4,
        {
            "config_groups": {
                "group_0": {
                    "input_activations": None,
                    "output_activations": None,
                    "targets": ["Linear"],
                    "weights": {
                        "actorder": None,
                        "block_structure": None,
                        "dynamic": False,
                        "group_size": INT4_GROUP,
                        "num_bits": 4,
                        "observer": "minmax",
                        "observer_kwargs": {},
                        "strategy": "group",
                        "symmetric": True,
                        "type": "int",
                    },
                }
            },
            "format": "pack-quantized",
            "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
            "kv_cache_scheme": None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        },
        {"model_type": "kimi_k2"},
    ),
}


def save(source: Path, encoding: str, target: Path) -> tuple[Path, Path]:
    """Quantises the one-file checkpoint in `source`.

    Returns:
        Two directories: the quantised checkpoint, and one in bfloat16 that transformers loads, with the same weights.
    """
    layout = LAYOUTS[encoding]
    quantised, plain = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        # The hub has the router's bias in float32 (DeepSeek-V3, Kimi-K2).
        plain[name] = tensor.float() if name.endswith("e_score_correction_bias") else tensor.bfloat16()
        parts = {name: plain[name]}
        if re.search(f"{layout.names}$", name):
            parts, plain[name] = layout.encode(name, tensor)
        quantised |= parts
    config = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    for directory, tensors, changes in (
        (target / "quantised", quantised, layout.changes | {"quantization_config": layout.section}),
        (target / "plain", plain, {}),
    ):
        shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.safetensors"))
        save_file(
            {name: part.contiguous() for name, part in tensors.items()}, directory / "model.safetensors", {"format": "pt"}
        )
        (directory / "config.json").write_text(json.dumps(config | changes, indent=2))
    return target / "quantised", target / "plain"
