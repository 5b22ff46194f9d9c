"""The training step of Qwen3-8B compiles for one H200, with cuDNN's attention, within its memory."""

import os

import aot
import pytest
from jax.experimental import topologies

pytestmark = pytest.mark.gpu_aot

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98 device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H200"
"""
H200_BYTES = 139 << 30


@pytest.mark.timeout(3000)
def test_the_step_holds_cudnn_attention_and_fits_the_card(monkeypatch):
    pytest.importorskip("jax_cuda13_plugin")
    from jax._src.cudnn import fused_attention_stablehlo as private

    # It asks the devices of this process, not those compiled for.
    monkeypatch.setattr(private, "check_compute_capability", lambda capability: capability <= "9.0")
    monkeypatch.setitem(os.environ, "JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    devices = topologies.get_topology_desc("", platform="cuda", target_config=H200, topology="1x1x1").devices
    compiled = aot.lower_step(aot.mesh_of(devices, (1, 1, 1)), H200_BYTES).compile()
    text = compiled.as_text()
    assert "__cudnn$fmhaSoftmax" in text and "__cudnn$fmhaSoftmaxBackward" in text
    assert aot.needed_bytes(compiled) < H200_BYTES
