"""Experts of transformers' Qwen3-MoE in torch, with an adapter in Tinker's parametrisation.

Tokens are sorted by expert and multiplied by torch's grouped product, which on a CPU trains as fast as a loop over the experts
and samples a little faster. Frozen matrices get no gradient; no expert's update is ever built.
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
        ends_E = torch.bincount(ids_MK.flatten(), minlength=len(self.down_a)).cumsum(0, dtype=torch.int32)

        def product(rows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
            return F.grouped_mm(rows, matrices.to(dtype), offs=ends_E)

        x_SD, z_SR = x_MD[token_S], (self.scale * (x_MD @ self.gate_up_a.to(dtype)))[token_S]
        gate, up = (product(x_SD, self.base.gate_up_proj.mT) + product(z_SR, self.gate_up_b)).chunk(2, dim=-1)
        h_SF = F.silu(gate) * up * weights_MK.flatten()[order_S, None]
        sorted_rows = product(h_SF, self.base.down_proj.mT), product(h_SF, self.down_a)
        out_MD, z_MR = (rows[place_S].view(M, K, -1).sum(1) for rows in sorted_rows)
        return torch.addmm(out_MD, z_MR, self.down_b.to(dtype), alpha=self.scale)


def adapt(model: Any, rank: int, scale: float) -> None:
    """Puts adapters on the experts of a transformers model."""
    for layer in model.model.layers:
        layer.mlp.experts = LoraExperts(layer.mlp.experts, rank, scale)
