"""Experts of transformers' Qwen3-MoE in torch, with an adapter in Tinker's parametrisation.

Tokens are sorted by expert and each expert multiplies its own, with exact sizes. Frozen matrices get no gradient; no expert's
update is ever built.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


class LoraExperts(torch.nn.Module):
    """down(silu(gate x) · up x) of the chosen experts, gate, up and down with an adapter.

    Gate and up of all experts share `gate_up_a` [D, R], and each expert has `gate_up_b` [E, R, 2 F], gate's half before up's;
    each expert has `down_a` [E, F, R], and all share `down_b` [R, D].
    """

    def __init__(self, base: Any, rank: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        (E, D, width), factor = base.down_proj.shape, torch.nn.Parameter
        self.gate_up_a = factor(torch.randn(D, rank) / D**0.5)
        self.gate_up_b = factor(torch.zeros(E, rank, 2 * width))
        self.down_a = factor(torch.randn(E, width, rank) / width**0.5)
        self.down_b = factor(torch.zeros(rank, D))

    def forward(self, x_MD: torch.Tensor, ids_MK: torch.Tensor, weights_MK: torch.Tensor) -> torch.Tensor:
        (M, K), dtype = ids_MK.shape, x_MD.dtype
        order_S = torch.argsort(ids_MK.flatten(), stable=True)
        place_S, token_S = torch.argsort(order_S), order_S // K
        sizes_E = torch.bincount(ids_MK.flatten(), minlength=len(self.down_a)).tolist()
        z_MR = self.scale * (x_MD @ self.gate_up_a.to(dtype))
        # `unbind` has one gradient for all experts; indexing would clear a whole tensor for each of them.
        experts = zip(
            sizes_E,
            x_MD[token_S].split(sizes_E),
            z_MR[token_S].split(sizes_E),
            weights_MK.flatten()[order_S, None].split(sizes_E),
            self.base.gate_up_proj,
            self.gate_up_b.to(dtype).unbind(),
            self.base.down_proj,
            self.down_a.to(dtype).unbind(),
            strict=True,
        )
        out, z_down = [], []
        for size, x, z, weight, gate_up, gate_up_b, down, down_a in experts:
            if not size:
                continue
            gate, up = torch.addmm(x @ gate_up.T, z, gate_up_b).chunk(2, dim=-1)
            h = F.silu(gate) * up * weight
            out.append(h @ down.T)
            z_down.append(h @ down_a)
        out_MD, z_down_MR = (torch.cat(rows)[place_S].view(M, K, -1).sum(1) for rows in (out, z_down))
        return torch.addmm(out_MD, z_down_MR, self.down_b.to(dtype), alpha=self.scale)


def adapt(model: Any, rank: int, scale: float) -> None:
    """Puts adapters on the experts of a transformers model."""
    for layer in model.model.layers:
        layer.mlp.experts = LoraExperts(layer.mlp.experts, rank, scale)
