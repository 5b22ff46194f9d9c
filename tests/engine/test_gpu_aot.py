"""Training step and sampler of Qwen3-8B compile for one H200 within its memory, the former with cuDNN's attention."""

import os

import aot
import pytest
from jax.experimental import topologies

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
