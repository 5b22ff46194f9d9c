"""Experts of one layer on a CPU, in turns with PyTorch: the same adapter over its grouped product.

Prints, for each case, the median milliseconds of both sides, their ratio, and the rates: GFLOP/s of the base weights' products,
and GB/s of the experts that the batch needs, each read once.

    python benchmarks/experts.py [--repeats 9]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import _torch_experts
import jax
import jax.numpy as jnp
import numpy as np
import torch

from tinker_jax.models.experts import Experts, Layout
from tinker_jax.models.qwen3_moe import SoftmaxRouter

# name: (tokens, experts a token, experts, D, F)
CASES = {
    "training, small": (1024, 8, 64, 256, 128),
    "training, Qwen3-30B's widths, half of its experts": (1024, 8, 64, 2048, 768),
    "training, few experts": (1024, 2, 8, 384, 256),
    "decode, one row, small": (1, 8, 64, 256, 128),
    "decode, one row": (1, 8, 64, 2048, 768),
    "decode, 16 rows": (16, 8, 64, 2048, 768),
}
RANK = 16


def case(name: str, M: int, k: int, E: int, D: int, F: int, repeats: int) -> None:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) / shape[-1] ** 0.5

    experts = Experts(D, F, E, SoftmaxRouter(k, renormalise=True), Layout(None, "experts"))
    router, gate, up, down, x = draw(E, D), draw(E, F, D), draw(E, F, D), draw(E, D, F), draw(M, D)
    params = {"router.kernel": router, "gate_experts.kernel": gate, "up_experts.kernel": up, "down_experts.kernel": down}
    factors = draw(D, RANK), draw(2, E, RANK, F), draw(E, F, RANK), draw(RANK, D)
    lora = {"gate_up_experts": {"a": factors[0], "b": factors[1]}, "down_experts": {"a": factors[2], "b": factors[3]}}
    params, lora, x_MD = jax.tree.map(jnp.asarray, (params, lora, x))
    tokens: Any = SimpleNamespace(mesh=None, slots_MR=None, kept=M < 128, real_M=jnp.ones(M, bool))

    def forward(lora, x_MD, params):
        return experts(params, x_MD, tokens, lora)[0]

    base = SimpleNamespace(gate_up_proj=torch.from_numpy(np.concatenate([gate, up], 1)), down_proj=torch.from_numpy(down))
    theirs = _torch_experts.LoraExperts(base, RANK, 1.0)
    b = np.concatenate(factors[1], -1)
    with torch.no_grad():
        for parameter, value in zip(theirs.parameters(), (factors[0], b, *factors[2:]), strict=True):
            parameter.copy_(torch.from_numpy(value))
    x_torch = torch.from_numpy(x).requires_grad_()
    router_torch = torch.from_numpy(router)

    def torch_forward() -> torch.Tensor:
        top, ids = torch.topk(torch.softmax(x_torch.detach() @ router_torch.T, -1), k)
        return theirs(x_torch, ids, top / top.sum(-1, keepdim=True))

    def torch_step() -> None:
        theirs.zero_grad()
        out = torch_forward()
        out.backward(torch.ones_like(out))

    flops = 2 * M * k * 3 * D * F
    busy = len(np.unique(np.argsort(-(x @ router.T), axis=1)[:, :k]))
    read = 4.0 * busy * 3 * D * F
    run = jax.jit(forward)
    np.testing.assert_allclose(run(lora, x_MD, params), torch_forward().detach().numpy(), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        _compare(f"{name}: forward", lambda: run(lora, x_MD, params), torch_forward, flops, read, repeats)
    if M < 128:
        return

    @jax.jit
    def step(lora, x_MD, params):
        out, pull = jax.vjp(lambda lora, x_MD: forward(lora, x_MD, params), lora, x_MD)
        return pull(jnp.ones_like(out))

    _compare(f"{name}: and backward", lambda: step(lora, x_MD, params), torch_step, 2 * flops, 2 * read, repeats)


def _compare(name: str, ours: Callable[[], Any], theirs: Callable[[], Any], flops: float, read: float, repeats: int) -> None:
    def seconds(run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - start

    sides = (ours, theirs)
    for run in sides:
        seconds(run)
    taken = [[seconds(run) for run in sides] for _ in range(repeats)]
    a, b = (statistics.median(side) for side in zip(*taken, strict=True))
    rates = f"{flops / a / 1e9:6.1f} GFLOP/s {read / a / 1e9:5.1f} GB/s, torch {flops / b / 1e9:6.1f} {read / b / 1e9:5.1f}"
    print(f"{name:64} {a * 1e3:8.2f} ms, torch {b * 1e3:8.2f} ms, torch/ours {b / a:5.2f}   {rates}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, jax {jax.__version__}, torch {torch.__version__}")
    for name, shape in CASES.items():
        case(name, *shape, repeats=repeats)


if __name__ == "__main__":
    main()
