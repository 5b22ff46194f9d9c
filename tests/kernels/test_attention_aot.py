"""Attention over packed rows compiles for a TPU slice, with Pallas' kernel, also where values are narrower than keys."""

import os

import aot
import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from tinker_jax import sharding
from tinker_jax.kernels.attention import attention_on
from tinker_jax.kernels.heads import Heads


@pytest.mark.tpu_aot
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("heads", [Heads(32, 8, 128), Heads(16, 16, 192, values=128)])  # Qwen3-8B; of DeepSeek-V3 some
def test_the_splash_kernel_compiles_for_a_tpu_slice_forward_and_backward(heads):
    pytest.importorskip("libtpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    mesh = aot.mesh_of(topologies.get_topology_desc("v5e:4x4", platform="tpu").devices, (1, 16, 1))
    attention = attention_on(mesh, heads, jnp.dtype(jnp.bfloat16))

    def abstract(shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((16, 2048, *shape), dtype, sharding=sharding.named(mesh, ("rows",)))

    def both(q, k, v, g, segment_ids):
        out, vjp = jax.vjp(lambda *qkv: attention(*qkv, segment_ids, scale=heads.H**-0.5), q, k, v)
        return out, *vjp(g)

    shapes = (heads.N, heads.H), (heads.K, heads.H), (heads.K, heads.V), (heads.N, heads.V)
    text = jax.jit(both).lower(*map(abstract, shapes), abstract((), jnp.int32)).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3  # forward, dq, dk and dv
