"""Attention over pages compiles for TPU slices, with Pallas' kernel, and for one H200, and moves nothing of the pool's size."""

import os

import aot
import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from tinker_jax import sharding
from tinker_jax.kernels.decode_attention import PAGE, mosaic, paged_attention_on
from tinker_jax.kernels.heads import Heads

HEADS = Heads(32, 8, 128)  # of Qwen3-8B


def lower_steps(mesh, R, T, tokens, heads=HEADS, implementation=None, window=None, sinks=False):
    """Eight steps of R rows with tables of so many tokens, over a donated pool that holds them all; and the pool."""
    paged = paged_attention_on(mesh, heads, jnp.bfloat16, implementation, sinks=sinks)
    N, K, H, W, parts = heads.N, heads.K, heads.H, tokens // PAGE, sharding.parts(mesh, "rows")
    cut = K % mesh.shape["tensor"] == 0

    def abstract(shape, dtype, axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.named(mesh, axes))

    empty = jax.jit(lambda: paged.empty(R // parts * W + 1))
    pool = jax.tree.map(
        lambda x: abstract(x.shape, x.dtype, ("rows", None, "kv_heads" if cut else None)), jax.eval_shape(empty)
    )
    q, k, v = (abstract((R, T, n, H), jnp.bfloat16, ("rows", None, "heads")) for n in (N, K, K))
    tables, positions = (abstract((R, n), jnp.int32, ("rows",)) for n in (W, T))

    def steps(pool, q, k, v, tables, positions):
        sinks_N = jnp.linspace(-2, 3, N) if sinks else None

        def one(i, carry):
            pool, q = carry
            pool = paged.write(pool, k, v, tables, positions + i)
            return pool, paged.attend(pool, q, tables, positions + i, scale=H**-0.5, window=window, sinks_N=sinks_N)

        return jax.lax.fori_loop(0, 8, one, (pool, q))

    return jax.jit(steps, donate_argnums=0).lower(pool, q, k, v, tables, positions), pool


def check_pool_stays(compiled, pool, devices):
    memory = compiled.memory_analysis()
    pool_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pool)) // devices
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 4


@pytest.mark.tpu_aot
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 1, 8), (1, 16, 1)])
@pytest.mark.parametrize(("R", "T", "tokens"), [(64, 1, 4096), (16, 256, 4096)])
def test_decode_and_prefill_of_qwen3_8b_hold_the_ragged_kernel_and_leave_the_pool_in_place(shape, R, T, tokens):
    pytest.importorskip("libtpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    mesh = aot.mesh_of(topologies.get_topology_desc("v5e:4x4", platform="tpu").devices, shape)
    lowered, pool = lower_steps(mesh, R, T, tokens)
    compiled = lowered.compile()
    text = compiled.as_text()
    assert "ragged_paged_attention_kernel" in text and "tpu_custom_call" in text
    check_pool_stays(compiled, pool, mesh.size)


@pytest.mark.gpu_aot
@pytest.mark.timeout(3000)
def test_decode_of_qwen3_8b_leaves_the_pool_in_place_on_an_h200(h200):
    lowered, pool = lower_steps(h200, 64, 1, 4096)
    compiled = lowered.compile()
    assert "__cudnn$fmhaSoftmax" in compiled.as_text()
    check_pool_stays(compiled, pool, 1)


@pytest.mark.gpu_aot
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("heads", "more"),
    [
        (HEADS, {}),
        (Heads(16, 8, 128), {}),  # Qwen3-0.6B
        (Heads(64, 8, 64), {"sinks": True}),  # gpt-oss-20b, every second layer
        (Heads(64, 8, 64), {"sinks": True, "window": 128}),
    ],
)
@pytest.mark.parametrize("R", [1, 64])
def test_the_mosaic_kernel_compiles_for_an_h200_and_leaves_the_pool_in_place(heads, more, R, h200):
    if jax.__version_info__[:2] < mosaic._JAX:
        pytest.skip(f"jax {jax.__version__} is too old for the kernel")
    lowered, pool = lower_steps(h200, R, 1, 16_384, heads, "mosaic", **more)
    compiled = lowered.compile()
    text = compiled.as_text()
    assert "mosaic_gpu" in text and "paged_decode_attention" in text
    check_pool_stays(compiled, pool, 1)
