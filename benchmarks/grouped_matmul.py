"""Grouped products on a CPU, in turns with PyTorch's loop over experts with exact sizes.

Prints, for each case, the median milliseconds of both sides, their ratio, and the rate: GFLOP/s, and GB/s of the weights that
the batch needs, each read once.

    python benchmarks/grouped_matmul.py [--repeats 9]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import torch

from tinker_jax.kernels.grouped_matmul import grouped_matmul

# name: (tokens, experts a token, experts, D, N)
CASES = {
    "training, small": (1024, 8, 64, 512, 256),
    "training, Qwen3-30B's widths": (1024, 8, 64, 2048, 768),
    "training, few experts": (1024, 2, 8, 576, 1536),
    "decode, one row, small": (1, 8, 64, 512, 256),
    "decode, one row": (1, 8, 64, 2048, 768),
    "decode, 16 rows": (16, 8, 64, 2048, 768),
}
RANK = 32


def routed(tokens: int, chosen: int, E: int) -> np.ndarray:
    """Rows of each expert, uneven as a router's are."""
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((tokens, E)) + 0.5 * rng.standard_normal(E)
    return np.bincount(np.argsort(-scores, axis=1)[:, :chosen].ravel(), minlength=E).astype(np.int32)


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def compare(
    name: str, ours: Callable[[], object], theirs: Callable[[], object], flops: float, read: float, repeats: int
) -> None:
    sides = (ours, theirs)
    for run in sides:
        seconds(run)
    taken = [[seconds(run) for run in sides] for _ in range(repeats)]
    a, b = (statistics.median(side) for side in zip(*taken, strict=True))
    rates = f"{flops / a / 1e9:6.1f} GFLOP/s {read / a / 1e9:5.1f} GB/s, torch {flops / b / 1e9:6.1f} {read / b / 1e9:5.1f}"
    print(f"{name:48} {a * 1e3:9.2f} ms, torch {b * 1e3:9.2f} ms, ours/torch {a / b:5.2f}   {rates}", flush=True)


def case(name: str, tokens: int, chosen: int, E: int, D: int, N: int, repeats: int) -> None:
    rng, sizes, S = np.random.default_rng(1), routed(tokens, chosen, E), tokens * chosen
    ends, busy = np.cumsum(sizes), int(np.sum(sizes > 0))
    groups = [(e, int(ends[e] - sizes[e]), int(ends[e])) for e in range(E) if sizes[e]]

    def product(label: str, D: int, N: int, transposed: bool) -> None:
        x = rng.standard_normal((S, D), np.float32)
        w = rng.standard_normal((E, N, D) if transposed else (E, D, N), np.float32)
        run = jax.jit(lambda x, w, sizes: grouped_matmul(x, w, sizes, transposed=transposed, frozen=True))
        arrays, tensors = [jnp.asarray(a) for a in (x, w, sizes)], [torch.from_numpy(a) for a in (x, w)]

        def theirs() -> torch.Tensor:
            y, (x, w) = torch.empty(S, N), tensors
            for e, first, end in groups:
                torch.mm(x[first:end], w[e].T if transposed else w[e], out=y[first:end])
            return y

        np.testing.assert_allclose(run(*arrays), theirs().numpy(), rtol=1e-3, atol=1e-3)
        compare(f"{name}: {label}", lambda: run(*arrays), theirs, 2 * S * D * N, 4 * busy * D * N, repeats)

    def gradient(label: str, D: int, N: int) -> None:
        x, g, w = (rng.standard_normal(shape, np.float32) for shape in ((S, D), (S, N), (E, D, N)))

        def dw(x, w, sizes, g):
            return jax.vjp(lambda w: grouped_matmul(x, w, sizes, transposed=False, frozen=False), w)[1](g)[0]

        run = jax.jit(dw)
        arrays, tensors = [jnp.asarray(a) for a in (x, w, sizes, g)], [torch.from_numpy(a) for a in (x, g)]

        def theirs() -> torch.Tensor:
            dw, (x, g) = torch.zeros(E, D, N), tensors
            for e, first, end in groups:
                torch.mm(x[first:end].T, g[first:end], out=dw[e])
            return dw

        np.testing.assert_allclose(run(*arrays), theirs().numpy(), rtol=1e-3, atol=1e-2)
        compare(f"{name}: {label}", lambda: run(*arrays), theirs, 2 * S * D * N, 0, repeats)

    product("x wᵀ", D, N, True)
    if tokens < 128:
        return
    product("dx", N, D, False)
    product(f"LoRA [{D}, {RANK}]", D, RANK, False)
    product(f"LoRA [{RANK}, {N}]", RANK, N, False)
    gradient(f"gradient of LoRA [{D}, {RANK}]", D, RANK)
    gradient(f"gradient of LoRA [{RANK}, {N}]", RANK, N)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, jax {jax.__version__}, torch {torch.__version__}")
    for name, shape in CASES.items():
        case(name, *shape, repeats=repeats)


if __name__ == "__main__":
    main()
