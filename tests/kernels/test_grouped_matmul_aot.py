"""Grouped products compile for one H200 with the Mosaic kernel, and hold nothing beside their operands and results."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tinker_jax import sharding
from tinker_jax.kernels.grouped_matmul import grouped_matmul

TOKENS, CHOSEN, E = 16_384, 8, 128  # Qwen3-30B-A3B


@pytest.mark.gpu_aot
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("S", [TOKENS * CHOSEN, 64 * CHOSEN, CHOSEN])
@pytest.mark.parametrize(
    ("D", "N", "transposed"),
    [
        (2048, 768, True),  # gate and up
        (768, 2048, True),  # down
    ],
)
def test_a_layer_of_qwen3_30b_takes_no_temporaries_in_either_direction(D, N, transposed, S, h200):
    def abstract(shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.replicated(h200))

    w = abstract((E, N, D) if transposed else (E, D, N))

    def forward_and_dx(x, w, sizes, g):
        def ours(x):
            return grouped_matmul(x, w, sizes, transposed=transposed, frozen=True, mesh=h200, implementation="mosaic")

        y, vjp = jax.vjp(ours, x)
        return y, vjp(g)[0]

    compiled: Any = jax.jit(forward_and_dx).lower(abstract((S, D)), w, abstract((E,), jnp.int32), abstract((S, N))).compile()
    assert compiled.as_text().count("mosaic_gpu") >= 2
    assert compiled.memory_analysis().temp_size_in_bytes < 1 << 20
