"""Training step and sampler compile for one H200 within its memory: Qwen3-8B, and models with experts."""

import os
from dataclasses import replace
from types import SimpleNamespace

import _shapes
import aot
import jax
import jax.numpy as jnp
import pytest
from hlo_bytes import Hlo
from jax.experimental import topologies

from tinker_jax import lora, memory, sharding
from tinker_jax.models.weights import lora_targets
from tinker_jax.sampling.model_runner import STEPS
from tinker_jax.training import trainer

pytestmark = pytest.mark.gpu_aot

H200_BYTES = 139 << 30


@pytest.mark.timeout(3000)
def test_the_step_holds_cudnn_attention_and_fits_the_card(monkeypatch):
    pytest.importorskip("jax_cuda13_plugin")
    from jax._src.cudnn import fused_attention_stablehlo as private

    # It asks the devices of this process, not those compiled for.
    monkeypatch.setattr(private, "check_compute_capability", lambda capability: capability <= "9.0")
    monkeypatch.setitem(os.environ, "JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    devices = topologies.get_topology_desc("", platform="cuda", target_config=aot.H200, topology="1x1x1").devices
    compiled = aot.lower_step(aot.mesh_of(devices, (1, 1, 1)), H200_BYTES).compile()
    text = compiled.as_text()
    assert "__cudnn$fmhaSoftmax" in text and "__cudnn$fmhaSoftmaxBackward" in text
    assert aot.needed_bytes(compiled) < H200_BYTES


@pytest.mark.timeout(3000)
def test_decode_and_prefill_fit_the_card_and_leave_the_pool_in_place(monkeypatch):
    pytest.importorskip("jax_cuda13_plugin")
    monkeypatch.setitem(os.environ, "JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    devices = topologies.get_topology_desc("", platform="cuda", target_config=aot.H200, topology="1x1x1").devices
    decode, prefill, pool_bytes = aot.lower_sampler(aot.mesh_of(devices, (1, 1, 1)), H200_BYTES)
    for lowered in (decode, prefill):
        compiled = lowered.compile()
        assert compiled.memory_analysis().alias_size_in_bytes >= pool_bytes
        assert aot.needed_bytes(compiled) < H200_BYTES


QWEN3_06B = replace(aot.QWEN3_8B, D=1024, L=28, N=16, F=3072, tied=True)
TOKENS = 1000  # that each row attends to


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("rows", [1, 64, 256])
@pytest.mark.parametrize(("name", "cfg"), [("Qwen3-0.6B", QWEN3_06B), ("Qwen3-8B", aot.QWEN3_8B)])
def test_a_decode_step_moves_at_most_three_halves_of_the_bytes_that_it_must(name, cfg, rows, monkeypatch, capsys):
    """It prints the table of docs/performance.md. What cuDNN reads of the pool is added by hand: every key and value once."""
    pytest.importorskip("jax_cuda13_plugin")
    monkeypatch.setitem(os.environ, "JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    devices = topologies.get_topology_desc("", platform="cuda", target_config=aot.H200, topology="1x1x1").devices
    decode, _, pool_bytes = aot.lower_sampler(aot.mesh_of(devices, (1, 1, 1)), H200_BYTES, rows, 1024, cfg, longest=1024)
    hlo = Hlo(decode.compile().as_text(), pool_bytes / 4)
    step = hlo.loop_with("fmhaSoftmax")
    weights = memory.base_bytes(cfg, 2) - (0 if cfg.tied else 2 * cfg.V * cfg.D)
    adapter = 2 * lora.count(lora.abstract(lora_targets(cfg), aot.LORA.rank, trainer.groups(aot.LORA)))
    cache = rows * TOKENS * memory.token_bytes(cfg, 2)
    least = weights + adapter + cache + rows * memory.token_bytes(cfg, 2)
    moved = hlo.bytes(step) + cache
    once = (hlo.bytes(hlo.entry) - hlo.bytes(step)) / STEPS
    with capsys.disabled():
        print("".join(f"\n  {size / 1e9:.2f} GB {kind}" for kind, size in hlo.largest(step)[:8]))
        figures = f"{least / 1e9:.2f} | {moved / 1e9:.2f} | {moved / least:.2f} | {once / 1e9:.2f}"
        print(f"| {name}, {rows} rows | {figures} |")
    assert moved < 1.5 * least


@pytest.mark.timeout(3000)
def test_the_step_of_qwen3_30b_takes_what_was_planned(h200):
    cfg = _shapes.QWEN3_30B_A3B
    compiled = aot.lower_step(h200, H200_BYTES, cfg, 4096).compile()
    assert aot.needed_bytes(compiled) < H200_BYTES
    plan = memory.plan(cfg, 2, H200_BYTES, h200.shape)
    planned = memory.planned_bytes(cfg, 2, plan, h200.shape)["activations"]
    assert compiled.memory_analysis().temp_size_in_bytes < 1.1 * planned


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("cfg", [_shapes.QWEN3_30B_A3B, _shapes.GPT_OSS_20B], ids=["Qwen3-30B-A3B", "gpt-oss-20B"])
def test_decode_of_experts_fits_the_card(cfg, h200):
    decode, _, pool_bytes = aot.lower_sampler(h200, H200_BYTES, 64, 4096, cfg, longest=4096)
    compiled = decode.compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= pool_bytes
    assert aot.needed_bytes(compiled) < H200_BYTES


@pytest.mark.timeout(3000)
def test_experts_of_a_layer_take_at_most_three_times_their_activations(h200):
    """Forward and backward, adapter's gradients included, of 16,384 tokens of Qwen3-30B-A3B."""
    cfg, M = _shapes.QWEN3_30B_A3B, 16_384
    experts, everywhere = cfg.groups[0][0].block.mlp, sharding.replicated(h200)

    def abstract(shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    params, x = {w.name: abstract(w.shape) for w in experts.weights()}, abstract((M, cfg.D))
    adapter = lora.abstract(lora_targets(cfg), 32, ("mlp",))["layers"]
    adapter = jax.tree.map(lambda factor: abstract(factor.shape[1:], factor.dtype), adapter)
    tokens = SimpleNamespace(mesh=h200, slots_MR=None, kept=False, real_M=jnp.ones(M, bool))

    def both_ways(params, x, adapter, g):
        out, pullback = jax.vjp(lambda x, adapter: experts(params, x, tokens, adapter)[0], x, adapter)
        return out, pullback(g)

    compiled = jax.jit(both_ways).lower(params, x, adapter, x).compile()
    chosen = M * experts.router.k * (2 * experts.D + 3 * experts.F)  # rows in and out, gate, up and their product
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * 2 * (chosen + 2 * M * experts.D)
