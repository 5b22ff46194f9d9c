"""Training step and sampler of Qwen3-8B, DeepSeek-V3.1 and Kimi-K2 compile for TPU slices within the memory of a chip."""

import dataclasses
import math
import os
import re

import aot
import jax
import jax.numpy as jnp
import pytest
from hub_configs import HUB
from jax.experimental import topologies

from tinker_jax import sharding
from tinker_jax.kernels.grouped_matmul import grouped_matmul
from tinker_jax.models.registry import parse

pytestmark = pytest.mark.tpu_aot

# Of the 16, 32 and 96 GiB on the chip, what the compiler may use.
V5E, V6E, V5P = int(15.75 * 2**30), int(31.25 * 2**30), int(95.73 * 2**30)
DEEPSEEK, KIMI = "deepseek-ai/DeepSeek-V3.1", "moonshotai/Kimi-K2-Instruct"


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("topology", "shape", "chip_bytes"),
    [
        ("v5e:4x4", (1, 16, 1), V5E),
        ("v5e:4x4", (1, 4, 4), V5E),
        ("v6e:2x4", (1, 8, 1), V6E),
        ("v6e:2x4", (2, 2, 2), V6E),
    ],
)
def test_the_step_holds_splash_attention_and_fits_the_chip(topology, shape, chip_bytes):
    pytest.importorskip("libtpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    lowered = aot.lower_step(aot.mesh_of(devices, shape), chip_bytes)
    text = lowered.as_text()
    for phase in ("fwd_segmented_residuals", "dq_segmented_no_residuals", "dkv_segmented_no_residuals"):
        assert f"splash_mha_{phase}" in text
    assert aot.needed_bytes(lowered.compile()) < chip_bytes


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 1, 8)])
def test_decode_and_prefill_hold_paged_attention_and_fit_the_chip(shape):
    pytest.importorskip("libtpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc("v5e:4x4", platform="tpu").devices
    decode, prefill, pool_bytes = aot.lower_sampler(aot.mesh_of(devices, shape), V5E)
    for lowered in (decode, prefill):
        assert "ragged_paged_attention" in lowered.as_text()
        compiled = lowered.compile()
        assert compiled.memory_analysis().alias_size_in_bytes >= pool_bytes
        assert aot.needed_bytes(compiled) < V5E / 2


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("rows", "longest"), [(32, 262_144), (256, 32_768)])
def test_a_context_of_262144_tokens_decodes_in_tables_that_the_kernel_can_hold(rows, longest):
    pytest.importorskip("libtpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc("v6e:2x4", platform="tpu").devices
    cfg = dataclasses.replace(aot.QWEN3_8B, context_length=262_144)
    mesh = aot.mesh_of(devices, (1, 1, 8))
    for lowered in aot.lower_sampler(mesh, V6E, rows=rows, tokens=1024, cfg=cfg, longest=longest)[:2]:
        assert "ragged_paged_attention" in lowered.as_text()
        lowered.compile()


def compiled_with_text(lowered, folder):
    """The program, and its text from a dump: jaxlib cannot print some of libtpu's asynchronous collectives."""
    compiled = lowered.compile(compiler_options={"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True})
    (path,) = folder.glob("*.after_optimizations.txt")
    return compiled, path.read_text()


def largest_gather(text):
    """Elements of the largest result of an all-gather."""
    shapes = re.findall(r" = \w+\[([\d,]+)\]\S* all-gather\(", text)
    return max(math.prod(int(n) for n in shape.split(",")) for shape in shapes)


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("model", "topology", "expert", "tensor"),
    [(DEEPSEEK, "v5p:2x4x4", 8, 4), (KIMI, "v5p:2x4x4", 8, 4), (KIMI, "v5p:4x4x4", 16, 4)],
)
def test_a_step_of_a_large_mixture_fits_the_chip_with_its_optimiser_and_gathers_no_weights(
    model, topology, expert, tensor, tmp_path
):
    pytest.importorskip("libtpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    devices, cfg, length = topologies.get_topology_desc(topology, platform="tpu").devices, parse(HUB[model][0]), 4096
    lowered = aot.lower_step(aot.mesh_of(devices, (1, 1, tensor), expert), V5P, cfg, length)
    assert "splash_mha_dkv_segmented_no_residuals" in lowered.as_text()
    compiled, text = compiled_with_text(lowered, tmp_path)
    adapter = compiled.memory_analysis().output_size_in_bytes  # its gradients; two moments and the gradients so far lie beside
    assert aot.needed_bytes(compiled) + 3 * adapter < V5P
    assert largest_gather(text) <= expert * length * cfg.D


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("model", [DEEPSEEK, KIMI])
def test_decode_and_prefill_of_a_large_mixture_fit_the_chip_and_gather_no_weights(model, tmp_path):
    pytest.importorskip("libtpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    devices, cfg = topologies.get_topology_desc("v5p:2x4x4", platform="tpu").devices, parse(HUB[model][0])
    *programs, pool_bytes = aot.lower_sampler(aot.mesh_of(devices, (1, 1, 4), expert=8), V5P, cfg=cfg, longest=4096)
    for name, lowered in zip(("decode", "prefill"), programs, strict=True):
        compiled, text = compiled_with_text(lowered, tmp_path / name)
        assert compiled.memory_analysis().alias_size_in_bytes >= pool_bytes
        assert aot.needed_bytes(compiled) < 0.8 * V5P
        assert largest_gather(text) <= 16 * 256 * cfg.D


@pytest.mark.parametrize("here", [4, 32])
def test_a_product_of_deepseeks_experts_multiplies_each_row_once_and_holds_one_more_result_at_most(here):
    pytest.importorskip("libtpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc("v5p:2x2x1", platform="tpu").devices
    mesh = aot.mesh_of(devices[:1], (1, 1, 1))
    S, D, F = 4096 * 8, 7168, 2048

    def abstract(shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.replicated(mesh))

    def forward_and_dx(x, w, sizes, g):
        y, vjp = jax.vjp(lambda x: grouped_matmul(x, w, sizes, transposed=True, frozen=True, mesh=mesh), x)
        return y, vjp(g)[0]

    sizes = abstract((here,), jnp.int32)
    for out, fan_in in ((F, D), (D, F)):
        args = abstract((S, fan_in)), abstract((here, out, fan_in)), sizes, abstract((S, out))
        compiled = jax.jit(forward_and_dx).lower(*args).compile()
        assert compiled.cost_analysis()["flops"] < 1.01 * 2 * 2 * S * D * F
        assert compiled.memory_analysis().temp_size_in_bytes < 1.01 * 2 * S * max(out, fan_in)
